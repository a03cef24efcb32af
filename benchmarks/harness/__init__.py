"""Runs providers of one computation beside each other: first do they agree, then time, memory, share of a copy's speed.

`problem` what is compared; `measure` and `memory` how; `results`, `report`, `plot` what becomes of it; `goals` and
`compare` what it is held to; `runner` the command line of a script.
"""

import os

# PyTorch's profiler, which tells the memory of a call, else prints a line at every start and stop
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
