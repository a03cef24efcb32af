"""Configuration: files, flags, recipes, and what happens to a wrong key or value."""

import re
from pathlib import Path

import pytest
import yaml

from pssl.cams import CamsConfig
from pssl.cli import RECIPES, parse
from pssl.config.data import FolderConfig, SplitDataConfig, SplitsConfig
from pssl.config.mapping import changed, from_dict, overlay, to_dict, to_yaml
from pssl.config.train import TrainConfig
from pssl.core.errors import InputError
from pssl.evaluate import EvaluateConfig
from pssl.pipeline import PipelineConfig
from pssl.segment import SegmentConfig


def parse_error(capsys: pytest.CaptureFixture, *argv: str) -> str:
    with pytest.raises((SystemExit, ValueError)) as error:
        parse(TrainConfig, list(argv))
    return f"{error.value} {capsys.readouterr()}"


def test_yaml_round_trip_repeats_the_run(tmp_path):
    flags = ["--model.backbone", "efficientnet_lite0", "--data.root", "somewhere", "--seeds", "0,1,2"]
    config = parse(TrainConfig, [*flags, "--arms", "rcm,rcm+mam", "--method.rcm.background", "0.2"])
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert parse(TrainConfig, ["--config", str(tmp_path / "config.yaml")]) == config
    assert from_dict(TrainConfig, to_dict(config), "here") == config


def test_recipe_then_file_then_flags(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("method: {rcm: {foreground: 0.5}}\nschedule: {batch_size: 8}\n")
    flags = ["--model.backbone", "efficientnet_lite0", "--schedule.batch-size", "4"]
    config = parse(TrainConfig, [f"--config={path}", *flags])
    assert config.recipe == "photographs" and config.model.frozen and config.data.splits.size == 320
    assert config.method.rcm.foreground == 0.5 and config.schedule.batch_size == 4
    assert parse(TrainConfig, []).recipe == "synthetic"


def test_backbone_in_a_file_brings_its_recipe(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("model: {backbone: efficientnet_lite0}")
    assert parse(TrainConfig, ["--config", str(path)]).model.frozen


@pytest.mark.parametrize(
    ("kind", "flag"),
    [
        (TrainConfig, "--model.backbone"),
        (SegmentConfig, "--model.backbone"),
        (PipelineConfig, "--segment.model.backbone"),
    ],
)
@pytest.mark.parametrize("recipe", [[], ["--recipe", "synthetic"]])
def test_an_unknown_backbone_is_refused_before_anything_runs(kind, flag, recipe):
    expected = r"model\.backbone: expected one of efficientnet_lite0, resnet38d, small, timm, got 'vgg'"
    with pytest.raises(InputError, match=expected):
        parse(kind, [flag, "vgg", *recipe])


def test_lists_take_commas_and_blanks():
    assert parse(TrainConfig, ["--seeds", "3,1", "2"]).seed_list == (3, 1, 2)
    assert parse(TrainConfig, ["--inference.scales", "0.5,1"]).inference.scales == (0.5, 1.0)
    assert parse(TrainConfig, ["--seed", "7"]).seed_list == (7,)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("data: {rot: x}", "unknown key 'data.rot'; the nearest known key is 'data.root'"),
        ("backbone: small", "unknown key 'backbone'; the nearest known key is 'model.backbone'"),
        ("data: 3", "data expected a mapping, got 3"),
        ("schedule: {batch_size: many}", "schedule.batch_size expected int, got 'many'"),
        ("arms: [rmc]", "arms: expected names from classifier"),
        ("arms: [pssl, rcm+mam]", "arms: expected each once (pssl is rcm+mam), got pssl, rcm+mam"),
        ("arms: []", "arms: expected at least one, got none"),
        ("inference: {scales: 0.5}", "inference.scales expected a list of float, got 0.5"),
        (
            "inference: {scales: [1, 0]}",
            "inference.scales: expected one or more numbers above 0, got (1.0, 0.0)",
        ),
        ("method: {mam: {scales: []}}", "method.mam.scales: expected one or more numbers above 0, got ()"),
        ("method: {rcm: {temperature: 0}}", "method.rcm.temperature: expected a number above 0, got 0.0"),
        ("schedule: {batch_size: 0}", "schedule.batch_size: expected 1 or more, got 0"),
        (
            "data: {zoom: [2, 1]}",
            "data.zoom: expected two numbers above 0, the smaller first, got (2.0, 1.0)",
        ),
        ("evaluation: {steps: 1}", "evaluation.steps: expected 2 or more, got 1"),
        ("schedule: {lr: high}", "schedule.lr expected float, got 'high'"),
        ("- 1", "expected a mapping of keys to values, got list"),
        ("a: [", "expected a readable YAML file"),
    ],
)
def test_wrong_file_names_file_and_key(tmp_path, capsys, text, expected):
    path = tmp_path / "wrong.yaml"
    path.write_text(text)
    message = parse_error(capsys, "--config", str(path))
    assert expected in message and str(path) in message


def test_numbers_with_exponents(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("schedule: {lr: 1e-3, weight_decay: 5E-4, poly_power: 2}")
    schedule = parse(TrainConfig, ["--config", str(path)]).schedule
    assert (schedule.lr, schedule.weight_decay, schedule.poly_power) == (1e-3, 5e-4, 2.0)


def test_settings_that_do_not_fit_each_other():
    config = parse(TrainConfig, ["--method.mam.pairs", "same", "--method.mam.scales", "0.5,0.75"])
    with pytest.raises(
        ValueError, match=r"mam\.pairs=same: scale 0\.75 of MainNet has no partner among .* 0\.5, 1,"
    ):
        config.check()
    config.arms = ("classifier", "rcm")
    config.check()
    config.method.rcm.from_epoch = 3
    with pytest.raises(ValueError, match=r"rcm\.from_epoch: expected less than the arms' 3 epochs, got 3"):
        config.check()


def test_wrong_flags(capsys):
    assert "expected one of coco14_resnet50, photographs" in parse_error(capsys, "--recipe", "nothing")
    assert "--data.root" in parse_error(capsys, "--data.rot", "x")
    assert "expected a YAML file" in parse_error(capsys, "--config")


def help_of(kind, capsys, monkeypatch, *argv):
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit) as end:
        parse(kind, [*argv, "--help"])
    assert end.value.code in (0, None)
    return capsys.readouterr().out


def words_of_help(kind, capsys, monkeypatch) -> str:
    """The help's text without frames and line breaks."""
    return " ".join(help_of(kind, capsys, monkeypatch).replace("│", " ").split())


def test_help_holds_the_texts_of_the_source(capsys, monkeypatch):
    text = help_of(TrainConfig, capsys, monkeypatch)
    assert max(map(len, text.splitlines())) <= 100
    words = words_of_help(TrainConfig, capsys, monkeypatch)
    assert (
        "--data.check {headers,decode,nothing} What every stage looks at before it starts: whether" in words
    )
    assert "Images that are not are named and left out. (default: headers)" in words


def test_help_shows_the_values_of_the_recipe_and_nothing_without_effect(capsys, monkeypatch):
    shown = help_of(TrainConfig, capsys, monkeypatch, "--recipe", "voc12_resnet38d")
    assert "SEAM 448, IRN 512. (default: 448)" in " ".join(shown.replace("│", " ").split())
    assert "--config FILE.yaml" in shown
    for kind in (CamsConfig, EvaluateConfig):
        shown = help_of(kind, capsys, monkeypatch)
        assert "--data.root" in shown
        assert not {"--data.zoom", "--data.size", "--evaluation.every"} & set(shown.split())


def test_help_names_the_recipes_that_there_are(capsys, monkeypatch):
    for kind, folder in ((TrainConfig, RECIPES), (SegmentConfig, RECIPES / "segment")):
        words = words_of_help(kind, capsys, monkeypatch).partition("Defaults to start from: ")[2]
        assert set(words.partition(" (")[0].split(", ")) == {p.stem for p in folder.glob("*.yaml")}


def test_a_part_has_no_name_of_its_own():
    """Its settings stand among those of what it is a part of, in files and flags; what is read is what was written."""
    config = SegmentConfig(data=SplitDataConfig(FolderConfig(root=Path("somewhere")), SplitsConfig(size=7)))
    values = to_dict(config)
    assert (
        values["data"]["root"] == "somewhere"
        and values["data"]["size"] == 7
        and values["zoom"] == [0.75, 1.5]
    )
    assert from_dict(SegmentConfig, values, "here") == config
    assert changed(config) == {"data": {"root": "somewhere", "size": 7}}
    assert parse(SegmentConfig, ["--data.root", "somewhere", "--data.size", "7"]).data == config.data
    for name in ("data.folder", "settings"):
        with pytest.raises(ValueError, match=f"unknown key '{name}'"):
            overlay(SegmentConfig(), ("here", {"data": {"folder": {}}} if "." in name else {"settings": {}}))


def test_every_field_says_what_it_is(capsys):
    """--help lists each key with a text."""
    with pytest.raises(SystemExit):
        parse(TrainConfig, ["--help"])
    shown = re.sub(r"\s+", " ", capsys.readouterr().out)
    for key in ("--data.root", "--method.rcm.temperature", "--schedule.lr", "--seeds"):
        assert key in shown
    assert yaml.safe_load(to_yaml(TrainConfig()))["method"]["rcm"]["temperature"] == 0.5
