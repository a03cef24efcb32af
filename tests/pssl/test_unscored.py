"""Without masks everything runs: what needs them is left out and said, what does not stands instead."""

import json
import shutil

import numpy as np
import pytest
import torch

from pssl import evaluate, pipeline, train
from pssl.config.data import FolderConfig
from pssl.data import VOCFolder
from pssl.scoring.scoring import Score
from pssl.scoring.unscored import RULES, UnscoredCounter, average_precision, otsu


@pytest.fixture
def unmasked(tiny_root, tmp_path):
    """A copy of the tiny folder without masks, parts and anything else that says where objects are."""
    root = shutil.copytree(tiny_root, tmp_path / "unmasked")
    for name in ("SegmentationClass", "Parts"):
        shutil.rmtree(root / name, ignore_errors=True)
    return root


def test_otsu_separates_two_groups():
    values = np.concatenate([np.random.default_rng(0).normal(0.2, 0.03, 5000), np.full(900, 0.81)]).clip(0, 1)
    counts = torch.histc(torch.from_numpy(values), 1000, 0, 1).long()
    assert 0.28 < otsu(counts) < 0.81
    between = []
    for t in np.arange(0.01, 1.0, 0.01):
        low, high = values[values <= t], values[values > t]
        spread = len(low) * len(high) * (low.mean() - high.mean()) ** 2 if len(low) and len(high) else -1.0
        between.append(spread)
    assert between[round(otsu(counts) * 100) - 1] >= 0.999 * max(between)
    assert 0.01 <= otsu(torch.zeros(1000, dtype=torch.int64)) <= 0.99, "no pixel at all"


def test_average_precision_is_the_sum_over_ranks():
    draws = np.random.default_rng(1)
    scores = draws.integers(0, 6, (40, 3)).astype(float)  # many equal ones
    labels = (draws.random((40, 3)) < 0.3).astype(np.uint8)
    labels[:, 2] = 0
    found = average_precision(scores, labels)
    for column in range(2):
        total, before = 0.0, 0.0
        for cut in sorted(set(scores[:, column]), reverse=True):
            taken = scores[:, column] >= cut
            recall = labels[taken, column].sum() / labels[:, column].sum()
            total += (recall - before) * labels[taken, column].mean()
            before = recall
        assert found[column] == pytest.approx(total)
    assert np.isnan(found[2])
    assert average_precision(np.array([[3.0], [2.0], [1.0]]), np.array([[1], [1], [0]]))[0] == 1.0


def test_counting_maps():
    counter = UnscoredCounter()
    counter.add(torch.tensor([[[0.1, 0.9]], [[0.4, 0.2]]]))
    counter.add(torch.zeros(0, 1, 2))
    found = counter.result()
    assert found.images == 2 and int(found.counts.sum()) == 4
    assert found.foreground(0.3) == 0.5 and found.foreground(0.5) == 0.25
    assert found.threshold("prototype") == 0.66 and found.summary((), 0.3, "x")["miou"] is None


def test_few_masks_stay_near_where_thresholds_are():
    """The highest of a flat curve would be chance."""
    thresholds = [i / 100 for i in range(1, 100)]
    curve = torch.full((99, 2), 0.5, dtype=torch.float64)
    curve[79] += 0.001
    score = Score(thresholds, curve, 20, {})
    assert score.best_threshold == 0.8 and score.best_near(0.25) == 0.25
    curve[39] += 0.1
    assert score.best_near(0.25) == 0.4


def test_training_without_masks(tiny_config, unmasked, quiet):
    tiny_config.data.folder.root, tiny_config.arms = unmasked, ("classifier", "rcm")
    metrics = train.run(tiny_config, quiet)
    said = quiet.console.file.getvalue()
    assert (
        said.count("no masks of held-out images") == 1
        and "problem" not in said
        and "mIoU" not in said.split("no mIoU")[1]
    )
    (run,) = metrics["runs"]
    for arm, entry in run["arms"].items():
        assert 0 <= entry["label_precision"]["mean"] <= 100, arm
        assert set(entry["label_precision"]["classes"]) == set(VOCFolder(unmasked).classes)
        for readout, scores in entry["readouts"].items():
            for role, count in (("train", 16), ("val", 6)):
                score = scores[role]
                assert score["miou"] is None and score["images"] == count and 0 <= score["foreground"] <= 1
                assert (
                    score["threshold_from"] == RULES[readout].said() and "at worst" in score["threshold_from"]
                )
    assert 0 <= run["agreement"]["same_pixels"]["classifier | rcm"] <= 100
    text = (tiny_config.out / "metrics.json").read_text()
    assert "NaN" not in text and json.loads(text)["data"]["val"]["masks_left_out"] == 0
    assert len(list((tiny_config.out / "pictures").glob("*.png"))) == 1
    assert len((tiny_config.out / "summary.csv").read_text().splitlines()) == 5


def test_some_masks_choose_the_threshold(tiny_config, unmasked, tiny_root, quiet):
    """Of 16 training images 6 have a mask, no held-out one does."""
    ids = VOCFolder(tiny_root).ids("train")[:6]
    (unmasked / "SegmentationClass").mkdir()
    for image_id in ids:
        shutil.copy(tiny_root / f"SegmentationClass/{image_id}.png", unmasked / "SegmentationClass")
    tiny_config.data.folder.root, tiny_config.arms = unmasked, ("classifier",)
    scores = train.run(tiny_config, quiet)["runs"][0]["arms"]["classifier"]["readouts"]["cam"]
    assert scores["train"]["threshold_from"] == "6 masks of train" and scores["train"]["images"] == 6
    assert scores["train"]["miou"] > 0 and scores["val"]["miou"] is None
    tiny_config.evaluation.masks_for_threshold = 0
    scores = train.run(tiny_config, quiet)["runs"][0]["arms"]["classifier"]["readouts"]["cam"]
    assert scores["train"]["threshold_from"] == RULES["cam"].said()


def test_fewer_than_one_image_is_refused():
    for name, value in (("train_images", 0), ("train_images", -5), ("masks_for_threshold", -1)):
        with pytest.raises(ValueError, match=f"{name}: expected"):
            from pssl.config.reading import EvaluationConfig

            EvaluationConfig(**{name: value})


def test_the_pipeline_without_masks(tiny_pipeline, unmasked, tmp_path, quiet):
    config = tiny_pipeline(tmp_path / "run")
    config.train.data.folder.root = unmasked
    result = pipeline.run(config, quiet)
    assert set(result["stages"]["evaluate"]) == {"seconds"}
    said = quiet.console.file.getvalue()
    assert "thresholds.png" in said and "--threshold 0.4` takes the one that looks best" in said
    for role in ("train", "val"):
        assert (config.out / "cams" / role / "thresholds.png").stat().st_size > 1000
        assert len(list((config.out / "labels" / role).glob("*.png"))) == (16 if role == "train" else 6)
    assert len(list((config.out / "segment/results").rglob("*.png"))) == 6
    page = (config.out / "report.html").read_text()
    assert "Without masks" in page and "sure" in page and "mIoU held out" not in page
    assert "ground truth" not in page


def test_pictures_at_thresholds_stand_beside_scores(tiny_cams, tmp_path, quiet):
    cams = shutil.copytree(tiny_cams.val, tmp_path / "cams")
    result = evaluate.run(evaluate.EvaluateConfig(cams=cams, looks=(0.1, 0.5)), quiet)
    assert result["miou"] is not None and (cams / "thresholds.png").is_file()
    assert "at the thresholds 0.1, 0.5" in quiet.console.file.getvalue()
    with pytest.raises(ValueError, match=r"looks: expected thresholds between 0 and 1"):
        evaluate.EvaluateConfig(looks=(0.5, 1.5))
    with pytest.raises(ValueError, match="expected masks to score label images by, found none"):
        data = FolderConfig(root=shutil.copytree(tiny_cams.root, tmp_path / "data"))
        shutil.rmtree(tmp_path / "data/SegmentationClass")
        evaluate.run(evaluate.EvaluateConfig(labels=tiny_cams.root / "SegmentationClass", data=data), quiet)
