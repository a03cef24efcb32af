"""Puts this folder on the path, since one of its modules is a pytest plugin, and that of the operators' tests, whose
cases are used here."""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE)]
sys.path.append(str(HERE.parent / "ops"))
