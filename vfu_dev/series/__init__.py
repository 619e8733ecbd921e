"""Many moves, counted: scenarios, the runs of them, their rows and statistics.

`scenario` says what is to be done and `run` does it, point by point; `shuttle` moves one VM back and forth.
`rows` and `summary` are what a run leaves behind, `compare` holds two of them against each other.
"""
