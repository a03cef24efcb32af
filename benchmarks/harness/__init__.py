"""Runs providers of one computation beside each other: first do they agree, then time, memory, share of a copy's speed.

`problem` what is compared; `measure` and `memory` how; `results`, `report`, `plot` what becomes of it; `goals` and
`compare` what it is held to; `runner` the command line of a script.
"""
