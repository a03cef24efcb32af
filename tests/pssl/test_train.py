"""The commands end to end on a tiny set: files, table, CAM files, scores, repeats."""

import csv
import dataclasses
import io
import json
import shutil

import numpy as np
import pytest
import torch
from rich.console import Console

from pssl import cams, evaluate, train
from pssl.cli import parse
from pssl.config.data import FolderConfig
from pssl.config.train import TrainConfig
from pssl.core.log import Log
from pssl.data import VOCFolder, open_folder, write_label_csv
from pssl.data.split import open_split
from pssl.method.arms import DEFAULT_ARMS
from pssl.models.cam_files import write_cams
from pssl.models.checkpoints import load_net


@pytest.fixture(autouse=True)
def deterministic_mode_ends_with_the_test():
    yield
    torch.use_deterministic_algorithms(False)


def quiet() -> Log:
    return Log(Console(file=io.StringIO(), width=120))


def without_times(value):
    if isinstance(value, dict):
        return {k: without_times(v) for k, v in value.items() if not k.startswith("seconds")}
    return [without_times(v) for v in value] if isinstance(value, list) else value


def test_all_arms_leave_their_files(tiny_config):
    log = quiet()
    metrics = train.run(tiny_config, log)
    out = tiny_config.out
    assert parse(TrainConfig, ["--config", str(out / "config.yaml")]) == dataclasses.replace(
        tiny_config, recipe="synthetic"
    )
    assert json.loads((out / "metrics.json").read_text()) == json.loads(json.dumps(metrics))
    assert list(metrics["runs"][0]["arms"]) == list(DEFAULT_ARMS)
    for arm, entry in metrics["runs"][0]["arms"].items():
        assert entry["steps_after_stage_1"] == (0 if arm == "classifier" else 4)
        assert load_net(out / "checkpoints" / f"{arm}.safetensors").description["arm"] == arm
        for readout in ("cam", "prototype"):
            scores = entry["readouts"][readout]
            assert (scores["train"]["images"], scores["val"]["images"]) == (16, 6)
            assert scores["val"]["threshold"] == scores["train"]["best_threshold_on_this_split"]
            assert scores["val"]["threshold_from"] == "train" and len(scores["val"]["curve"]) == 9
            assert set(scores["val"]["iou"]) == {"background", *metrics["data"]["classes"]}
            assert set(scores["val"]["activation"]) == {"part", "body", "background"}
    rows = list(csv.DictReader((out / "summary.csv").open()))
    assert [(r["arm"], r["readout"]) for r in rows] == [
        (a, r) for a in DEFAULT_ARMS for r in ("cam", "prototype")
    ]
    columns = ("train_split", "train_images", "val_split", "val_images")
    assert {tuple(row[name] for name in columns) for row in rows} == {("train", "16", "val", "6")}
    losses = list(csv.DictReader((out / "losses.csv").open()))
    assert len(losses) == 5 * 4 and losses[-1]["rcm"] and losses[-1]["mam"] and not losses[0]["rcm"]
    assert len(list((out / "pictures").glob("*.png"))) == 1
    table = log.console.file.getvalue()
    assert (
        all(arm in table for arm in DEFAULT_ARMS) and "mIoU val" in table and "threshold picked on" in table
    )
    assert "train: 16 images of train; val: 6 images of val" in " ".join(table.split())


def test_same_seed_same_metrics_and_other_seed_others(tiny_config):
    tiny_config.arms = ("rcm+mam",)
    first = train.run(tiny_config, quiet())
    second = train.run(tiny_config, quiet())
    assert without_times(first) == without_times(second)
    tiny_config.seed = 1
    assert without_times(train.run(tiny_config, quiet()))["runs"] != without_times(first)["runs"]


def test_several_seeds_report_mean_and_spread(tiny_config):
    tiny_config.arms, tiny_config.seeds = ("classifier",), (0, 1)
    metrics = train.run(tiny_config, quiet())
    values = [run["arms"]["classifier"]["readouts"]["cam"]["val"]["miou"] for run in metrics["runs"]]
    row = metrics["summary"][0]
    assert row["val_miou"] == pytest.approx(np.mean(values))
    assert row["val_miou_std"] == pytest.approx(np.std(values, ddof=1)) and row["seeds"] == 2
    assert (tiny_config.out / "seed_1/checkpoints/classifier.safetensors").is_file()


def test_resumed_run_gives_the_same_numbers(tiny_config):
    tiny_config.arms = ("rcm",)
    first = train.run(tiny_config, quiet())
    losses = (tiny_config.out / "losses.csv").read_text()
    (tiny_config.out / "checkpoints/rcm.state.pt").unlink()
    stage_1 = tiny_config.out / "checkpoints/classifier.state.pt"
    written = stage_1.stat().st_mtime_ns
    tiny_config.resume = True
    assert without_times(train.run(tiny_config, quiet())) == without_times(first)
    assert stage_1.stat().st_mtime_ns == written, "stage 1 was trained again"
    assert (tiny_config.out / "losses.csv").read_text() == losses, "resumed steps count too"
    written = (tiny_config.out / "config.yaml").read_text()
    tiny_config.schedule.lr, tiny_config.pictures = 0.5, 0
    with pytest.raises(
        ValueError, match=r"run: .* which differ in schedule\.lr \(0\.002, now 0\.5\); name another"
    ):
        train.run(tiny_config, quiet())
    tiny_config.schedule.lr, tiny_config.seed = 0.002, 1
    with pytest.raises(ValueError, match=r"which differ in seed \(0, now 1\)"):
        train.run(tiny_config, quiet())
    assert (tiny_config.out / "config.yaml").read_text() == written


@pytest.mark.parametrize("readout", ["cam", "prototype"])
def test_cam_files_score_as_training_said(tiny_config, tmp_path, readout):
    tiny_config.arms = ("rcm",)
    metrics = train.run(tiny_config, quiet())
    for split in ("train", "val"):
        folder = tmp_path / f"{readout}_{split}"
        written = cams.run(
            cams.CamsConfig(
                checkpoint=tiny_config.out / "checkpoints/rcm.safetensors",
                data=tiny_config.data.folder,
                split=split,
                readout=readout,
                inference=tiny_config.inference,
                out=folder,
            ),
            quiet(),
        )
        said = metrics["runs"][0]["arms"]["rcm"]["readouts"][readout][split]
        assert written == said["images"]
        config = evaluate.EvaluateConfig(
            cams=folder,
            data=tiny_config.data.folder,
            split=split,
            threshold=said["threshold"],
            evaluation=tiny_config.evaluation.sweep,
        )
        scored = evaluate.run(config, quiet())
        for key in ("miou", "iou", "curve", "activation", "best_threshold_on_this_split", "images"):
            assert scored[key] == said[key], key
        assert json.loads((folder / "scores.json").read_text())["miou"] == said["miou"]


def test_images_that_cannot_be_used_are_named_and_left_out(tiny_config, tmp_path):
    root = tmp_path / "damaged"
    shutil.copytree(tiny_config.data.folder.root, root)
    folder = VOCFolder(root)
    train_ids, val_ids = folder.ids("train"), folder.ids("val")
    folder.image_path(train_ids[0]).unlink()
    path = folder.image_path(train_ids[1])
    path.write_bytes(path.read_bytes()[:-100])
    folder.mask_path(train_ids[2]).unlink()
    folder.mask_path(val_ids[0]).unlink()
    tiny_config.data.folder.root, tiny_config.arms = root, ("classifier",)
    log = quiet()
    metrics = train.run(tiny_config, log)
    said = log.console.file.getvalue()
    for path in (
        folder.image_path(train_ids[0]),
        folder.mask_path(train_ids[2]),
        folder.mask_path(val_ids[0]),
    ):
        assert f"problem: {path}: no such file" in said
    assert f"problem: {folder.image_path(train_ids[1])}: expected a whole image file" in said
    assert "train: 14 of 16 images are left, 13 of them with a mask" in said
    assert "val: 6 of 6 images are left, 5 of them with a mask" in said
    scores = metrics["runs"][0]["arms"]["classifier"]["readouts"]["cam"]
    assert metrics["data"]["train"]["images"] == 14
    assert (scores["train"]["images"], scores["val"]["images"]) == (13, 5)
    for image_id in val_ids:
        folder.mask_path(image_id).unlink(missing_ok=True)
    scores = train.run(tiny_config, quiet())["runs"][0]["arms"]["classifier"]["readouts"]["cam"]
    assert scores["train"]["miou"] is not None and scores["val"]["miou"] is None


def test_images_without_labels_are_left_out_and_a_broken_label_file_is_named_once(tiny_root, tmp_path):
    folder = VOCFolder(tiny_root)
    ids, path, log = folder.ids("train"), tmp_path / "labels.csv", quiet()
    write_label_csv(path, ids[2:5], folder.image_labels(ids[2:5]), folder.classes)
    left = open_split(open_folder(tiny_root, labels=str(path)), "train", FolderConfig(), log)
    assert left.ids == ids[2:5]
    said = log.console.file.getvalue()
    assert all(f"problem: {path}: no image-level labels for {i}\n" in said for i in ids[:2] + ids[5:])
    assert "train: 3 of 16 images are left, 3 of them with a mask" in said
    path.write_text("nothing of the kind")
    log = quiet()
    with pytest.raises(ValueError, match="split train: expected images, got none that can be used"):
        open_split(open_folder(tiny_root, labels=str(path)), "train", FolderConfig(), log)
    assert log.console.file.getvalue().count("problem: ") == 1


def test_checkpoint_of_other_classes_is_refused(tiny_config, photographs, tmp_path):
    tiny_config.arms = ("classifier",)
    train.run(tiny_config, quiet())
    config = cams.CamsConfig(checkpoint=tiny_config.out / "checkpoints/classifier.safetensors", out=tmp_path)
    config.data.root = photographs
    with pytest.raises(ValueError, match="expected the checkpoint's classes"):
        cams.run(config, quiet())


def test_missing_cam_files_are_named_and_any_threshold_is_taken(tiny_config, tmp_path):
    config = evaluate.EvaluateConfig(
        cams=tmp_path, data=tiny_config.data.folder, split="val", threshold=0.123
    )
    with pytest.raises(FileNotFoundError, match="expected a file"):
        evaluate.run(config, quiet())
    for image_id in VOCFolder(tiny_config.data.folder.root).ids("val"):
        write_cams(tmp_path, image_id, torch.zeros(1, 48, 48), torch.tensor([1]))
    result = evaluate.run(config, quiet())
    assert 0.123 in result["thresholds"] and result["threshold"] == 0.123 and len(result["curve"]) == 100
