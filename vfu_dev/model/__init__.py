"""Arithmetic: will a migration converge, and what will it take? docs/model.md derives it.

`link` is what the state goes through, `writing` what a load dirties, `predict` the migration that follows;
`presets` makes loads whose outcome is certain.
"""
