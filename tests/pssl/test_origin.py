"""Folders say which data they were made from, and the next stage takes them from there."""

import json
import os
import shutil

import pytest
import yaml

from pssl import cams, evaluate, refine, segment
from pssl.config.data import FolderConfig, SplitDataConfig, SplitsConfig
from pssl.data import VOCFolder
from pssl.data.origin import (
    Origin,
    folder_from,
    origin_of,
    require_classes,
    same_split,
    split_from,
    splits_from,
)


@pytest.fixture
def written(tmp_path):
    """A folder whose files were made from data/, named relatively."""
    (tmp_path / "data").mkdir()
    before = os.getcwd()
    os.chdir(tmp_path)
    folder = FolderConfig(root="data", labels="labels.csv", masks="Aug")
    folder.root = tmp_path.__class__("data")
    splits = SplitsConfig(train_split="lists/aug.txt", val_split="held", size=7)
    Origin(SplitDataConfig(folder, splits), "lists/aug.txt", ("cat", "dog")).write(tmp_path / "made")
    os.chdir(before)
    return tmp_path / "made"


def test_what_was_written_is_read_from_anywhere(written):
    root = written.parent
    origin = origin_of(written)
    assert origin.classes == ("cat", "dog") and origin.split == str(root / "lists/aug.txt")
    folder = folder_from(written, FolderConfig())
    assert (folder.root, folder.labels, folder.masks) == (root / "data", str(root / "labels.csv"), "Aug")
    assert split_from(written, None) == origin.split and split_from(written, "val") == "val"
    assert splits_from(written, SplitsConfig()).val_split == "held"
    assert same_split(str(root / "lists/aug.txt"), origin.split) and not same_split("train", "val")
    inside = written / "results/VOC2012/Segmentation/comp6_held_cls"
    assert origin_of(inside) == origin, "predictions lie four folders below"


def test_what_is_given_wins(written, tmp_path):
    given = folder_from(written, FolderConfig(masks="Mine"))
    assert (given.root, given.masks) == (tmp_path / "data", "Mine")
    assert folder_from(written, FolderConfig(root=tmp_path / "other")) == FolderConfig(
        root=tmp_path / "other"
    )
    assert splits_from(written, SplitsConfig(val_split="test")).val_split == "test"
    assert folder_from(tmp_path, FolderConfig()) == FolderConfig(), "a folder that says nothing"
    assert split_from(tmp_path, None) == "train"


def test_other_classes_are_refused(written):
    require_classes(written, ["cat", "dog"])
    with pytest.raises(
        ValueError, match="made for the classes cat, dog; expected these of the data folder, got dog"
    ):
        require_classes(written, ["dog", "cat"])
    (written / "data.yaml").write_text("split: train")
    with pytest.raises(ValueError, match=r"data\.yaml: expected the keys data, split and classes"):
        origin_of(written)
    (written / "data.yaml").write_bytes(b"\xff\xfe: [")
    with pytest.raises(ValueError, match=r"data\.yaml: expected a readable YAML file"):
        origin_of(written)


def test_stages_follow_one_another_without_being_told(tiny_cams, tmp_path, quiet):
    """From a checkpoint on, no stage is given the data."""
    out = tmp_path / "cams"
    cams.run(cams.CamsConfig(checkpoint=tiny_cams.checkpoint, out=out), quiet)
    assert len(list(out.glob("*.npz"))) == 16
    assert yaml.safe_load((out / "data.yaml").read_text())["split"] == "train"
    labels = refine.RefineConfig(cams=out, out=tmp_path / "labels")
    labels.settings.method = "none"
    assert refine.run(labels, quiet)["written"] == 16
    config = segment.SegmentConfig(labels=labels.out, out=tmp_path / "segment")
    settings = config.settings
    settings.model.width, settings.model.dim, settings.model.rates = 8, 8, (2,)
    settings.schedule.epochs, settings.predict.scales = 1, (1.0,)
    result = segment.run(config, quiet)
    assert result["data"] == tiny_cams.root.name and result["images"] == 6
    assert yaml.safe_load((config.out / "config.yaml").read_text())["data"]["size"] == 48
    scored = evaluate.run(evaluate.EvaluateConfig(labels=config.predictions), quiet)
    assert scored["split"] == "val" and scored["miou"] == result["miou"]
    assert json.loads((config.predictions / "scores.json").read_text())["split"] == "val"


def test_cams_of_other_classes_are_refused(tiny_cams, tiny_root, tmp_path, quiet):
    data = shutil.copytree(tiny_root, tmp_path / "data")
    (data / "classes.txt").write_text("\n".join(reversed(VOCFolder(data).classes)))
    for job, config in (
        (evaluate.run, evaluate.EvaluateConfig(cams=tiny_cams.train, data=FolderConfig(root=data))),
        (
            refine.run,
            refine.RefineConfig(cams=tiny_cams.train, data=FolderConfig(root=data), out=tmp_path / "x"),
        ),
    ):
        with pytest.raises(ValueError, match="made for the classes"):
            job(config, quiet)
