"""The background threshold of pseudo labels: the one whose labels, refined, are best on training images.

What is best for CAMs is not what is best before a CRF: where CAMs stop short of an object the CRF takes the rest for
background, and gives what they spill onto the scenery back, so that a lower threshold loses less.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from torch import Tensor

from pssl.core import ranks
from pssl.core.files import write_text
from pssl.core.log import Log
from pssl.core.threads import over_images
from pssl.data.open import DataFolder
from pssl.data.split import even_selection
from pssl.scoring.scoring import LabelScorer

STEPS = (0.05, 0.025)  # the second since the best threshold may be as low as 0.15


def hill_climb(
    score: Callable[[float], float], start: float, steps: Sequence[float] = STEPS
) -> dict[float, float]:
    """Return `score` at `start` and at the thresholds of a hill climb from it.

    Thresholds a step apart are tried downwards as long as the score rises, else upwards; then from the best of them
    with the next step.
    """
    best, scores = start, {start: score(start)}
    for step in steps:
        begin = best
        for direction in (-1, 1):
            while 0 < (then := round(best + direction * step, 6)) < 1:
                if then not in scores:
                    scores[then] = score(then)
                if scores[then] <= scores[best]:
                    break
                best = then
            if best != begin:
                break
    return scores


def choose_threshold(
    label: Callable[[str, float], Tensor],
    folder: DataFolder,
    scored: Sequence[str],
    images: int,
    start: float,
    path: Path,
    workers: int | None,
    log: Log,
) -> tuple[float, int]:
    """Return the threshold whose labels have the highest mIoU on some images, and how many images that were.

    Args:
        label: from an image's id and a threshold to its labels uint8 [H,W].
        scored: images that have a mask; without any, the result is `start` and 0.
        images: how many of them to label, evenly spaced.
        start: where to begin, the best threshold of the CAMs.
        path: the JSON file that keeps what was found, for a run that carries on.
    """
    if path.is_file():
        kept = json.loads(path.read_text(encoding="utf-8"))
        return kept["threshold"], kept["images"]
    scored = even_selection(scored, images)
    own = ranks.share(scored)

    def score(threshold: float) -> float:
        scorer = LabelScorer(len(folder.classes) + 1)
        with log.progress(f"threshold {threshold:.3f}", len(own)) as bar:
            for image_id, labels in zip(
                own, over_images(lambda i: label(i, threshold), own, workers), strict=True
            ):
                scorer.add(labels.numpy(), folder.mask(image_id))
                bar.advance()
        return scorer.result().summary(("background", *folder.classes), "missed")["miou"]

    if not scored:
        return start, 0
    scores = hill_climb(score, start)
    best = max(sorted(scores), key=scores.__getitem__)
    log.say(
        f"threshold {best:.3f}: the labels of {len(scored)} training images have an mIoU of {scores[best]:.1f}, "
        f"{scores[start]:.1f} at the CAMs' own, {start:.3f}"
    )
    if ranks.is_first():
        found = {
            "threshold": best,
            "images": len(scored),
            "miou": {str(t): scores[t] for t in sorted(scores)},
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(found, indent=1))
    ranks.wait()
    return best, len(scored)
