"""Which images of a split count: one answer for all stages, and a word about the others."""

import json
import shutil

import pytest

from pssl import cams, evaluate, pipeline, refine, segment
from pssl.config.data import FolderConfig
from pssl.data import VOCFolder
from pssl.data.split import even_selection, open_split


@pytest.fixture
def damaged(tiny_root, tmp_path):
    """A copy of the tiny folder: a training and a held-out image cut short, a held-out mask missing, one damaged."""
    folder = VOCFolder(shutil.copytree(tiny_root, tmp_path / "damaged"))
    train_ids, val_ids = folder.ids("train"), folder.ids("val")
    for image_id in (train_ids[3], val_ids[1]):
        path = folder.image_path(image_id)
        path.write_bytes(path.read_bytes()[:300])
    folder.mask_path(val_ids[2]).unlink()
    folder.mask_path(val_ids[4]).write_bytes(b"no image")
    return folder


def test_the_images_that_count(damaged, quiet):
    ids = damaged.ids("val")
    split = open_split(damaged, "val", FolderConfig(), quiet)
    assert split.ids == [ids[0], *ids[2:]] and split.scored == [ids[0], ids[3], ids[5]]
    assert list(split.left_out) == [ids[1]] and list(split.unscored) == [ids[2], ids[4]]
    assert split.counts() == {"images": 5, "left_out": 1, "masks_left_out": 2}
    assert split.said() == "; left out of val: 1 images and 2 masks"
    said = quiet.console.file.getvalue()
    for path in (damaged.image_path(ids[1]), damaged.mask_path(ids[2]), damaged.mask_path(ids[4])):
        assert said.count(f"problem: {path}: ") == 1
    open_split(damaged, "val", FolderConfig(), quiet.stage())
    assert quiet.console.file.getvalue() == said, "a run says each once"
    assert open_split(damaged, "val", FolderConfig(check="nothing"), quiet).ids == ids


def test_a_selection_is_of_what_counts(damaged, quiet):
    split = open_split(damaged, "val", FolderConfig(), quiet).selection(2)
    ids = damaged.ids("val")
    assert split.ids == [ids[0], ids[3]] and split.scored == [ids[0], ids[3]] and len(split.left_out) == 1
    assert even_selection(list("abcdefg"), 3) == ["a", "c", "e"] and even_selection("ab", None) == ["a", "b"]


def test_every_stage_leaves_the_same_images_out(damaged, tiny_pipeline, tmp_path, quiet):
    """The pipeline ends well; what it left out is named once and counted by each stage."""
    config = tiny_pipeline(tmp_path / "run")
    config.train.data.folder.root = damaged.root
    pipeline.run(config, quiet)
    said = quiet.console.file.getvalue()
    assert said.count("problem: ") == 4
    train_ids, val_ids = set(damaged.ids("train")), set(damaged.ids("val"))
    usable = {"train": train_ids - {damaged.ids("train")[3]}, "val": val_ids - {damaged.ids("val")[1]}}
    for role, ids in usable.items():
        assert {path.stem for path in (config.out / "cams" / role).glob("*.npz")} == ids
        assert {path.stem for path in (config.out / "labels" / role).glob("*.png")} == ids
    read = lambda path: json.loads((config.out / path).read_text())  # noqa: E731
    metrics, predicted = read("train/metrics.json")["data"], read("segment/segment.json")
    held = {"left_out": 1, "masks_left_out": 2}
    assert metrics["train"] == {"split": "train", "images": 15, "left_out": 1, "masks_left_out": 0}
    assert metrics["val"] == {"split": "val", "images": 5, **held}
    assert predicted["images"] == 3 and {name: predicted[name] for name in held} == held
    assert predicted["training"]["left_out"] == 1
    assert read("labels/val/refine.json")["left_out"] == 1 and read("scores/cams_val.json")["images"] == 3
    for closing in (
        "train: 1 images; left out of val: 1 images and 2 masks",
        "files in",
        "kept in",
        "predictions in",
    ):
        assert any(closing in line and "left out of" in line for line in said.splitlines()), closing


def test_an_image_damaged_after_training_ends_no_later_stage(tiny_cams, tiny_root, tmp_path, quiet):
    """Each stage looks for itself."""
    folder = VOCFolder(shutil.copytree(tiny_root, tmp_path / "later"))
    ids = folder.ids("val")
    path = folder.image_path(ids[0])
    path.write_bytes(path.read_bytes()[:300])
    data = FolderConfig(root=folder.root)
    out = tmp_path / "cams"
    stage = cams.CamsConfig(checkpoint=tiny_cams.checkpoint, data=data, split="val", out=out)
    assert cams.run(stage, quiet) == 5
    assert evaluate.run(evaluate.EvaluateConfig(cams=out), quiet)["images"] == 5
    labels = refine.RefineConfig(cams=out, out=tmp_path / "labels")
    labels.settings.method = "none"
    assert refine.run(labels, quiet)["written"] == 5
    scored = evaluate.run(evaluate.EvaluateConfig(labels=tmp_path / "labels"), quiet)
    assert (scored["split"], scored["images"], scored["left_out"]) == ("val", 5, 1)


def test_a_held_out_image_is_no_end_of_segmentation(damaged, tiny_cams, tmp_path, quiet):
    labels = refine.RefineConfig(cams=tiny_cams.train, out=tmp_path / "labels")
    labels.settings.method, labels.settings.threshold = "none", 0.3
    refine.run(labels, quiet)
    config = segment.SegmentConfig(labels=tmp_path / "labels", out=tmp_path / "segment")
    config.data.folder.root, config.data.splits.size = damaged.root, 48
    settings = config.settings
    settings.model.width, settings.model.dim, settings.model.rates = 8, 8, (2,)
    settings.schedule.epochs, settings.predict.scales = 1, (1.0,)
    result = segment.run(config, quiet)
    assert result["images"] == 3 and result["training"]["images"] == 15
    assert len(list(config.predictions.glob("*.png"))) == 5
