"""Many moves, counted: scenarios, the runs of them, their rows and statistics.

`scenario` describes a series and `run` carries it out, point by point; `shuttle` moves one VM back and forth.
`rows` and `summary` are the results of a run, `compare` compares two results.
"""
