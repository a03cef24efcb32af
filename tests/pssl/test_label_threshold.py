"""The background threshold that pssl.refine chooses for its labels."""

import itertools
import json

import pytest
from refining import labels_of, tiny_refine

from pssl import refine
from pssl.config.refine import RefineSettings
from pssl.core.checkpoint import load_weights
from pssl.data import VOCFolder
from pssl.data.voc import read_label_png
from pssl.method import refinement
from pssl.scoring.scoring import LabelScorer
from pssl.scoring.thresholds import hill_climb


@pytest.mark.parametrize("peak", [0.2, 0.3, 0.52, 0.01, 0.99])
def test_climbing_ends_on_the_peak(peak):
    asked = []

    def score(threshold):
        asked.append(threshold)
        return -abs(threshold - peak)

    scores = hill_climb(score, 0.3)
    assert asked == list(scores) and len(set(asked)) == len(asked), "nothing is scored twice"
    best = max(scores, key=scores.get)
    assert abs(best - peak) <= 0.025 and 0 < min(scores) and max(scores) < 1
    assert all(round((threshold - 0.3) / 0.025, 6) % 1 == 0 for threshold in scores)
    assert len(scores) <= abs(peak - 0.3) / 0.05 + 5, "the way there is gone in the larger steps"


def test_the_threshold_is_that_of_the_best_labels(tiny_cams, tmp_path, quiet):
    """Of those tried none gives the training images better labels, and the labels are those at it."""
    own = load_weights(tiny_cams.checkpoint)[1]["thresholds"]["cam"]
    config = tiny_refine(tiny_cams, tmp_path / "chosen", "crf")
    chosen = refine.run(config, quiet)["background"]
    kept = json.loads((config.out / "threshold.json").read_text())
    assert kept["threshold"] == chosen["threshold"] and len(kept["miou"]) >= 2 and str(own) in kept["miou"]
    folder = VOCFolder(tiny_cams.root)
    ids = folder.ids("train")
    for threshold, miou in kept["miou"].items():
        given = tiny_refine(tiny_cams, tmp_path / threshold, "crf", threshold=float(threshold))
        assert refine.run(given, quiet)["background"]["chosen_by"] == "given"
        scorer = LabelScorer(len(folder.classes) + 1)
        for image_id in ids:
            scorer.add(
                read_label_png(given.out / f"{image_id}.png", len(folder.classes)), folder.mask(image_id)
            )
        assert scorer.result().summary(("background", *folder.classes), "missed")["miou"] == miou
        if float(threshold) == chosen["threshold"]:
            assert labels_of(given.out, ids) == labels_of(config.out, ids)
    assert kept["miou"][str(chosen["threshold"])] == max(kept["miou"].values())
    carried_on = tiny_refine(tiny_cams, tmp_path / "chosen", "crf")
    assert refine.run(carried_on, quiet)["background"] == chosen


def test_masks_of_other_images_choose_no_threshold(tiny_cams, tmp_path, quiet):
    own = load_weights(tiny_cams.checkpoint)[1]["thresholds"]["cam"]
    expected = {"threshold": own, "power": None, "chosen_by": "CAMs"}
    held = tiny_refine(tiny_cams, tmp_path / "val", "crf", split="val")
    held.cams = tiny_cams.val
    assert refine.run(held, quiet)["background"] == expected
    without = tiny_refine(tiny_cams, tmp_path / "none", "crf", threshold_images=0)
    assert refine.run(without, quiet)["background"] == expected
    assert not (held.out / "threshold.json").exists() and not (without.out / "threshold.json").exists()
    with pytest.raises(ValueError, match="threshold_images: expected 0 or more, got -1"):
        RefineSettings(threshold_images=-1)


def test_stopped_run_chooses_its_threshold_once(tiny_cams, tmp_path, quiet, monkeypatch):
    """Stopped between the choice and the last label, it goes on with the threshold it had, asking no image again."""
    config = tiny_refine(tiny_cams, tmp_path / "whole", "crf")
    chosen = refine.run(config, quiet)["background"]
    ids = VOCFolder(tiny_cams.root).ids("train")
    expected = labels_of(config.out, ids)

    broken = tiny_refine(tiny_cams, tmp_path / "broken", "crf")
    broken.workers = 1
    write, written = refine.write_label_png, itertools.count()

    def stop(*arguments):
        if next(written) == 5:
            raise KeyboardInterrupt
        write(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(refine, "write_label_png", stop)
        with pytest.raises(KeyboardInterrupt):
            refine.run(broken, quiet)
    assert len(list(broken.out.glob("*.png"))) == 5

    refined = []
    step = refinement.crf_step
    monkeypatch.setattr(refinement, "crf_step", lambda *arguments: refined.append(1) or step(*arguments))
    result = refine.run(broken, quiet)
    assert (result["written"], result["kept"], result["background"]) == (11, 5, chosen)
    assert len(refined) <= 11, "the threshold was chosen again"
    assert labels_of(broken.out, ids) == expected
