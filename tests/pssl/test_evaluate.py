"""Scores of CAMs and label images against confusion matrices counted pixel by pixel."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from refining import tiny_refine

from pssl import evaluate, refine
from pssl.data import VOCFolder, write_label_png
from pssl.models.cam_files import read_cams
from pssl.scoring.scoring import confusion, iou


def literal_scores(labels, truths, regions: int, unsure: str) -> tuple[np.ndarray, list[float]]:
    """Counts [C,C+1] and IoU in percent, a pixel at a time."""
    counts = np.zeros((regions, regions + 1), int)
    for label, truth in zip(labels, truths, strict=True):
        for own, wanted in zip(label.ravel().tolist(), truth.ravel().tolist(), strict=True):
            if wanted != 255:
                counts[wanted, regions if own == 255 else own] += 1
    values = []
    for region in range(regions):
        row = counts[region, : regions + (unsure == "missed")].sum()
        union = row + counts[:, region].sum() - counts[region, region]
        values.append(100 * counts[region, region] / union if union else float("nan"))
    return counts, values


def scored(quiet, **settings) -> dict:
    return evaluate.run(evaluate.EvaluateConfig(**settings), quiet)


@pytest.fixture
def random_labels(tiny_cams, tmp_path):
    """Random label PNGs of the held images, a tenth of the pixels unsure; with what they are."""
    folder, source = VOCFolder(tiny_cams.root), np.random.default_rng(0)
    labels = []
    for image_id in folder.ids("val"):
        label = source.integers(0, 4, folder.mask(image_id).shape).astype(np.uint8)
        label[source.random(label.shape) < 0.1] = 255
        write_label_png(tmp_path / f"{image_id}.png", label)
        labels.append(label)
    return labels


@pytest.mark.parametrize("unsure", ["missed", "ignored"])
def test_label_images_score_exactly(tiny_cams, tmp_path, quiet, random_labels, unsure):
    folder = VOCFolder(tiny_cams.root)
    truths = [folder.mask(image_id) for image_id in folder.ids("val")]
    counts, values = literal_scores(random_labels, truths, len(folder.classes) + 1, unsure)
    result = scored(quiet, labels=tmp_path, data=tiny_cams.data.folder, split="val", unsure=unsure)
    assert result["confusion"] == counts.tolist()
    assert [np.nan if v is None else v for v in result["iou"].values()] == pytest.approx(
        values, abs=1e-4, nan_ok=True
    )
    assert result["miou"] == pytest.approx(np.nanmean(values), abs=1e-4)
    assert list(result["iou"]) == ["background", *folder.classes]
    assert (result["scored"], result["split"], result["images"], result["unsure"]) == (
        "labels",
        "val",
        6,
        unsure,
    )
    assert result["unsure_pixels"] == counts[:, -1].sum() > 0 and result["pixels"] == counts.sum()
    assert json.loads((tmp_path / "scores.json").read_text())["miou"] == result["miou"]


@pytest.mark.parametrize("settings", [{"threshold": 0.37}, {"powers": (3.0,)}])
def test_cams_score_exactly_at_a_fixed_background(tiny_cams, tmp_path, quiet, settings):
    folder = VOCFolder(tiny_cams.root)
    labels, truths = [], []
    for image_id in folder.ids("train"):
        cams, class_ids = (a.numpy() for a in read_cams(tiny_cams.train, image_id))
        best = cams.astype(np.float64).max(0)
        background = 0.37 if "threshold" in settings else (1 - best) ** 3
        labels.append(np.where(best > background, class_ids[cams.argmax(0)], 0).astype(np.uint8))
        truths.append(folder.mask(image_id))
    _, values = literal_scores(labels, truths, len(folder.classes) + 1, "missed")
    out = tmp_path / "scores.json"
    result = scored(quiet, cams=tiny_cams.train, data=tiny_cams.data.folder, out=out, **settings)
    assert [np.nan if v is None else v for v in result["iou"].values()] == pytest.approx(
        values, abs=1e-4, nan_ok=True
    )
    assert (result["threshold_from"], result["split"], result["scored"]) == ("given", "train", "cams")
    assert result["power"] == settings.get("powers", (None,))[0] and out.is_file()


def test_swept_powers_name_the_best(tiny_cams, tmp_path, quiet):
    out = tmp_path / "scores.json"
    one_by_one = {
        power: scored(quiet, cams=tiny_cams.train, data=tiny_cams.data.folder, powers=(power,), out=out)[
            "miou"
        ]
        for power in (1.0, 4.0, 16.0)
    }
    result = scored(quiet, cams=tiny_cams.train, data=tiny_cams.data.folder, powers=(1.0, 4.0, 16.0), out=out)
    assert result["curve"] == list(one_by_one.values()) and result["powers"] == list(one_by_one)
    assert result["power"] == max(one_by_one, key=one_by_one.get) and result["threshold_from"] == "train"
    text = quiet.console.file.getvalue()
    assert (
        f"background power {result['power']:g} (best on train)" in text
        and "background power 4 (given)" in text
    )


def test_pseudo_labels_by_threshold_score_as_their_cams(tiny_cams, tmp_path, quiet):
    """The files of --method none, scored as labels, give what the CAMs give at that threshold."""
    refine.run(tiny_refine(tiny_cams, tmp_path, threshold=0.3), quiet)
    labels = scored(quiet, labels=tmp_path, data=tiny_cams.data.folder)
    cams = scored(
        quiet, cams=tiny_cams.train, data=tiny_cams.data.folder, threshold=0.3, out=tmp_path / "cams.json"
    )
    assert labels["iou"] == cams["iou"] and labels["miou"] == cams["miou"] and labels["unsure_pixels"] == 0


def test_wrong_label_images_are_named(tiny_cams, tmp_path, quiet, random_labels):
    first = VOCFolder(tiny_cams.root).ids("val")[0]
    settings = dict(labels=tmp_path, data=tiny_cams.data.folder, split="val")
    write_label_png(tmp_path / f"{first}.png", np.zeros((4, 5), np.uint8))
    with pytest.raises(
        ValueError, match=rf"{first}.png: expected the ground truth's size \(48, 48\), got \(4, 5\)"
    ):
        scored(quiet, **settings)
    write_label_png(tmp_path / f"{first}.png", np.full((48, 48), 200, np.uint8))
    with pytest.raises(ValueError, match=rf"{first}.png: expected labels 0\.\."):
        scored(quiet, **settings)
    Image.new("RGB", (48, 48)).save(tmp_path / f"{first}.png")
    with pytest.raises(ValueError, match=rf"{first}.png: expected a palette"):
        scored(quiet, **settings)
    (tmp_path / f"{first}.png").unlink()
    with pytest.raises(FileNotFoundError, match=rf"{first}.png"):
        scored(quiet, **settings)


def test_settings_that_contradict_are_refused():
    for settings, text in (
        ({"unsure": "maybe"}, "unsure: expected 'missed' or 'ignored'"),
        ({"powers": (2.0,), "threshold": 0.2}, "powers: expected none beside a threshold"),
        ({"threshold": 1.5}, "threshold: expected a value of 0 or more, below 1"),
    ):
        with pytest.raises(ValueError, match=text):
            evaluate.EvaluateConfig(**settings)


def test_confusion_of_other_sizes_is_refused():
    with pytest.raises(ValueError, match="confusion: expected labels of the ground truth's size"):
        confusion(np.zeros((2, 2), np.uint8), np.zeros((2, 3), np.uint8), 2)
    counts = confusion(np.array([[0, 255]], np.uint8), np.array([[0, 0]], np.uint8), 2)
    assert counts.tolist() == [[1, 0, 1], [0, 0, 0]]
    assert iou(counts[None])[0, 0] == 0.5 and torch.isnan(iou(counts[None])[0, 1])
