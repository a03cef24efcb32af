"""All stages in one go, stopped and carried on, from one configuration."""

import json

import pytest
import torch

from pssl import pipeline, segment, train
from pssl.cli import parse
from pssl.config.mapping import overlay
from pssl.data import VOCFolder


@pytest.fixture(autouse=True)
def deterministic_mode_ends_with_the_test():
    yield
    torch.use_deterministic_algorithms(False)


def stamps(folder) -> dict:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def test_pipeline_stops_and_carries_on(tiny_pipeline, tiny_root, tmp_path, quiet, monkeypatch):
    config = tiny_pipeline(tmp_path / "run")

    def stop(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(segment, "predict", stop)
        with pytest.raises(KeyboardInterrupt):
            pipeline.run(config, quiet)
    assert sorted(path.stem for path in (config.out / "done").iterdir()) == ["cams", "refine", "train"]
    before = stamps(config.out)
    result = pipeline.run(config, quiet)
    after = stamps(config.out)
    changed = [path for path in before if after[path] != before[path]]
    assert {path.relative_to(config.out).parts[0] for path in changed} <= {"segment"}, (
        "a finished stage ran again"
    )
    state = config.out / "segment/checkpoints/segment.state.pt"
    assert after[state] == before[state], "segmentation was trained again"

    scores = result["stages"]["evaluate"]
    assert set(scores) >= {"cams_train", "cams_val", "labels_train", "labels_val", "predictions_val"}
    said = json.loads((config.out / "train/metrics.json").read_text())["runs"][0]["arms"]["classifier"][
        "readouts"
    ]
    assert scores["cams_val"] == pytest.approx(said["cam"]["val"]["miou"], abs=1e-4)
    assert scores["predictions_val"] == json.loads((config.out / "segment/segment.json").read_text())["miou"]
    for role, split in (("train", "train"), ("val", "val")):
        ids = set(VOCFolder(tiny_root).ids(split))
        assert {path.stem for path in (config.out / "labels" / role).glob("*.png")} == ids
    assert json.loads((config.out / "scores/cams_val.json").read_text())["threshold_from"] == "given"
    text = quiet.console.file.getvalue()
    assert "pseudo labels (affinity+crf)" in text and "predictions (largefov)" in text

    assert pipeline.run(config, quiet)["stages"] == result["stages"]
    assert quiet.console.file.getvalue().count("done earlier") == 3 + 5
    again = stamps(config.out)
    written = {path.name for path in after if again[path] != after[path]}
    assert written == {"pipeline.json", "report.html"}

    config.train.seed = 1
    with pytest.raises(ValueError, match=r"differ in seed \(0, now 1\)"):
        pipeline.run(config, quiet)
    config.train.resume = False
    with pytest.raises(ValueError, match="expected a new folder without resume"):
        pipeline.run(config, quiet)


def test_configuration_is_one_and_checked():
    config = parse(pipeline.PipelineConfig, ["--refine.method", "par+crf", "--segment.model.head", "v3plus"])
    assert config.train.method.rcm.weight == 3.0, "the recipe of the backbone"
    arm = config.out / "train/checkpoints/rcm+mam.safetensors"
    assert pipeline.segment_config(config).settings.model.init == arm and config.segment.model.init is None
    for flags in (["--no-warm-start"], ["--segment.model.width", "32"], ["--model.frozen"]):
        assert pipeline.segment_config(parse(pipeline.PipelineConfig, flags)).settings.model.init is None
    assert config.refine.steps == ("par", "crf") and config.segment.model.head == "v3plus"
    for wrong, text in (
        ({"arm": "mam"}, "arm: expected one of the arms classifier_long, rcm.mam, got 'mam'"),
        ({"seeds": [0, 1]}, "seeds: expected none"),
        (
            {"refine": {"methods": "crf"}},
            "unknown key 'refine.methods'; the nearest known key is 'refine.method'",
        ),
    ):
        with pytest.raises(ValueError, match=text):
            overlay(pipeline.PipelineConfig(), ("file.yaml", wrong))
    assert train.TrainConfig().resume is False and pipeline.PipelineConfig().train.resume is True
