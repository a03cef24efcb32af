"""Puts this folder on the path: its modules are also a pytest plugin and a script, so that it is no package."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
