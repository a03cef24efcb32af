"""Fails where a training run has not done what the method promises.

    python .ci/check_training.py runs/train/metrics.json

The CAMs of rcm+mam have to be above those of the classifier that trained as long, and above FLOOR. Measured on the
embedded data, seed 0: 64.4 against 48.8 mIoU on the held-out split.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

FLOOR = 50.0
ARM, BASELINE = "rcm+mam", "classifier_long"


def problems(metrics: dict) -> list[str]:
    """What is wrong with the run, in a line each."""
    found = {s["arm"]: s["val_miou"] for s in metrics["summary"] if s["readout"] == "cam"}
    if missing := {ARM, BASELINE} - set(found):
        return [f"expected the arms {ARM} and {BASELINE}, {', '.join(sorted(missing))} is not there"]
    bounds = {"the floor": FLOOR, BASELINE: found[BASELINE]}
    return [
        f"expected the CAMs of {ARM} above {name} ({bound:.1f}), got {found[ARM]:.1f} mIoU"
        for name, bound in bounds.items()
        if not found[ARM] > bound
    ]


def main(path: str) -> int:
    wrong = problems(json.loads(Path(path).read_text(encoding="utf-8")))
    for problem in wrong:
        print(f"{path}: {problem}", file=sys.stderr)
    if not wrong:
        print(f"{path}: {ARM} is above {BASELINE} and above {FLOOR:g} mIoU")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
