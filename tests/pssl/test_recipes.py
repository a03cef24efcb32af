"""Every recipe loads, says where it comes from, and describes networks, rates and inputs that can be built."""

import ast
import dataclasses
import importlib
import inspect
import io
import pkgutil
import shutil
import textwrap

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from rich.console import Console

from pssl import cams, evaluate, method, pipeline, refine, segment
from pssl import config as configuration
from pssl.cli import RECIPES, parse
from pssl.config.mapping import overlay, to_dict
from pssl.config.model import ModelConfig
from pssl.config.reading import InferenceConfig
from pssl.config.train import TrainConfig
from pssl.core.log import Log
from pssl.data import VOCFolder
from pssl.data.transforms import random_colours
from pssl.inputs.images import FileInputs
from pssl.method.arms import ARMS
from pssl.method.inference import ImageMaps, read_images
from pssl.method.objective import Objective
from pssl.models.backbones import backbone_names, find_backbone
from pssl.models.build import build_cam_net, build_segmenter
from pssl.training.optimizer import build_optimizer, head_layers

NAMES = sorted(path.stem for path in RECIPES.glob("*.yaml"))


def recipe(name: str) -> TrainConfig:
    flags = ["--recipe", name]
    return parse(TrainConfig, flags)


@pytest.mark.parametrize("name", NAMES)
def test_recipe_is_loaded_and_fits_together(name):
    config = recipe(name)
    assert config.recipe == name
    written = yaml.safe_load((RECIPES / f"{name}.yaml").read_text())

    def assert_held(values, held):
        for key, value in values.items():
            if isinstance(value, dict):
                assert_held(value, held[key])
            else:
                assert held[key] == value, key

    assert_held(written, to_dict(config))
    assert (RECIPES / f"{name}.yaml").read_text().startswith("# "), "says what it is for"
    if name != "photographs":
        assert not (config.data.loading == "files" and config.model.frozen)


SEGMENT = sorted(path.stem for path in (RECIPES / "segment").glob("*.yaml"))


@pytest.mark.parametrize("name", SEGMENT)
def test_segmentation_recipe_builds(name, request):
    """Alone and within the pipeline: what the file says is held, and makes a network and groups of rates."""
    path = RECIPES / f"segment/{name}.yaml"
    written = yaml.safe_load(path.read_text())
    config = parse(segment.SegmentConfig, ["--recipe", name])
    within = parse(pipeline.PipelineConfig, ["--segment.recipe", name, "--model.backbone", "resnet38d"])
    assert within.train.recipe == "voc12_resnet38d" and path.read_text().startswith("# "), (
        "says what it is for"
    )
    config = config.settings
    for found in (config, within.segment):
        held = to_dict(found)
        assert found.recipe == name and overlay(found, ("again", written)) == found
        assert {key: held[key] for key in written if not isinstance(written[key], dict)} == {
            key: value for key, value in written.items() if not isinstance(value, dict)
        }
    assert config.size == written.get("size")
    if config.model.backbone == "timm":
        request.getfixturevalue("timm")
    with torch.device("meta"):
        net = build_segmenter(config.model, 20)
    optimizer = build_optimizer(net, config.schedule.lr, config.schedule, ("head.",))
    rates = {round(group["peak_lr"] / config.schedule.lr, 2) for group in optimizer.param_groups}
    assert config.schedule.head_lr_factor in rates
    if name == "voc12_resnet101":
        assert rates == {1, 10, 20} and net.head.classifiers[3].dilation == (24, 24)
        assert net.backbone.stride == 8 and net.backbone.channels == 2048


def test_segmentation_starts_from_the_recipe_of_its_backbone():
    assert parse(segment.SegmentConfig, []).settings.recipe == "synthetic"
    config = parse(segment.SegmentConfig, ["--model.backbone", "timm", "--schedule.epochs", "3"]).settings
    assert (config.recipe, config.model.head, config.schedule.epochs) == ("voc12_resnet101", "v2", 3)
    config = parse(pipeline.PipelineConfig, ["--model.backbone", "efficientnet_lite0"])
    assert (config.train.recipe, config.segment.recipe) == ("photographs", "photographs")
    assert config.segment.model.backbone == "efficientnet_lite0"
    assert {find_backbone(backbone).segment_recipe for backbone in backbone_names()} == set(SEGMENT)
    with pytest.raises(ValueError, match=r"recipe: expected one of photographs, synthetic, .*, got 'voc'"):
        parse(segment.SegmentConfig, ["--recipe", "voc"])


def on_meta(config: TrainConfig, classes: int):
    with torch.device("meta"):
        net = build_cam_net(config.model, classes)
        terms = [term for terms in ARMS.values() for term in terms]
        objective = Objective(
            config.method, terms, classes=classes, dim=net.dim, size=config.data.splits.size
        )
    return net.train(), objective


@pytest.mark.parametrize("name", NAMES)
def test_recipe_builds(name, request):
    config = recipe(name)
    if config.model.backbone == "timm":
        request.getfixturevalue("timm")
    classes = 80 if config.data.folder.layout == "coco" else 20
    net, objective = on_meta(config, classes)
    side = config.data.splits.size // 8 * 8
    if (
        config.model.backbone != "timm"
    ):  # timm's transformers ask for values, which the meta device has none of
        output = net(torch.empty(2, 3, side, side, device="meta"))
        grid = -(-side // net.backbone.stride)
        assert output.cam.shape == (2, classes, grid, grid) and output.features.shape[1] == config.model.dim
    assert 1.0 in objective.scales
    optimizer = build_optimizer(net, config.schedule.lr, config.schedule, head_layers(config.schedule))
    trained = sum(p.requires_grad for p in net.parameters())
    assert sum(len(group["params"]) for group in optimizer.param_groups) == trained
    assert find_backbone(config.model.backbone).train_recipe in NAMES


def test_seams_groups_of_rates():
    config = recipe("voc12_resnet38d")
    net, _ = on_meta(config, 20)
    groups = build_optimizer(
        net, config.schedule.lr, config.schedule, head_layers(config.schedule)
    ).param_groups
    # ResNet38d has no biases but its fixed norms', so x2 is empty; the head has both kinds.
    assert [(round(g["peak_lr"], 4), g["weight_decay"]) for g in groups] == [
        (0.01, 5e-4),
        (0.1, 5e-4),
        (0.2, 0.0),
    ]
    assert config.data.zoom[1] * config.data.splits.size == pytest.approx(768)
    assert (config.schedule.batch_size, config.schedule.poly_power, config.data.splits.size) == (8, 0.9, 448)


def test_every_option_says_what_it_is():
    """Each field of each configuration is followed by a text, which --help shows."""
    rooms = (configuration, method.terms)
    names = [
        f"{room.__name__}.{module.name}" for room in rooms for module in pkgutil.iter_modules(room.__path__)
    ]
    modules = (*map(importlib.import_module, names), cams, evaluate, pipeline, refine, segment)
    kinds = {kind for module in modules for _, kind in inspect.getmembers(module, inspect.isclass)}
    kinds = {kind for kind in kinds if dataclasses.is_dataclass(kind)}
    kinds = {kind for kind in kinds if kind.__name__.endswith(("Config", "Settings"))}
    assert len(kinds) > 20
    for kind in kinds:
        body = ast.parse(textwrap.dedent(inspect.getsource(kind))).body[0].body
        for place, entry in enumerate(body):
            if isinstance(entry, ast.AnnAssign):
                section = getattr(entry.annotation, "id", "") in {other.__name__ for other in kinds}
                section = section or "PART" in ast.unparse(entry.annotation)
                after = body[place + 1] if place + 1 < len(body) else None
                text = (
                    isinstance(after, ast.Expr)
                    and isinstance(after.value, ast.Constant)
                    and after.value.value
                )
                assert section or (text and len(text) > 15), f"{kind.__name__}.{entry.target.id}"


@pytest.fixture
def file_inputs(tiny_root, tmp_path):
    folder = VOCFolder(shutil.copytree(tiny_root, tmp_path / "own"))
    ids = folder.ids("val")
    wide = np.zeros((30, 60, 3), np.uint8) + np.arange(60, dtype=np.uint8)[:, None] * 4
    Image.fromarray(wide).save(folder.image_path(ids[0]), quality=100)
    labels = torch.from_numpy(folder.image_labels(ids)).float()
    return FileInputs(
        folder,
        ids,
        labels,
        lambda x: x * 2 - 1,
        24,
        (1.0, 1.5),
        "cpu",
        colours=(0.3, 0.3, 0.3, 0.1),
        workers=3,
    )


def test_inputs_from_files(file_inputs):
    inputs = file_inputs
    draws = lambda: [torch.Generator().manual_seed(seed) for seed in (1, 2, 3)]  # noqa: E731
    batch, pixels = inputs.training([0, 2, 0], draws(), (0.5, 1.0))
    again, _ = inputs.training([0, 2, 0], draws(), (0.5, 1.0))
    assert batch[1.0].shape == (3, 3, 24, 24) and batch[0.5].shape == (3, 3, 12, 12)
    assert torch.equal(batch[1.0], again[1.0]) and not torch.equal(batch[1.0][0], batch[1.0][2])
    torch.testing.assert_close(inputs.normalise(pixels), batch[1.0])
    alone, _ = inputs.training([2], draws()[1:2], (1.0,))
    assert torch.equal(alone[1.0][0], batch[1.0][1]), "an image does not depend on the others"
    assert inputs.plain([0], 1.0, False).shape == (1, 3, 30, 60)
    half = inputs.plain([0], 0.5, True)
    assert half.shape == (1, 3, 15, 30) and float(half[0, 0, 0, 0]) > float(half[0, 0, 0, -1])
    with pytest.raises(ValueError, match=r"expected images of one size .*, got \[\(30, 60\), \(48, 48\)\]"):
        inputs.plain([0, 1], 1.0, False)


def test_images_of_one_size_are_read_together(file_inputs):
    """CAMs of a split with two sizes are those of its images alone."""
    assert list(file_inputs.batches([1, 0, 2, 3, 4], 12)) == [
        [1, 2, 3],
        [0],
        [4],
    ]  # 12 of 24 x 24, 3 of 48 x 48
    assert list(file_inputs.batches([0, 1, 2], 4)) == [[0], [1], [2]]
    torch.manual_seed(0)
    net = build_cam_net(ModelConfig(dim=8, width=16, logit_scale=1.0), file_inputs.labels.shape[1]).eval()

    def read(batch_size: int) -> dict[str, ImageMaps]:
        config = InferenceConfig(scales=(0.5, 1.0), batch_size=batch_size)
        maps = read_images(
            net, file_inputs, range(5), lambda i: file_inputs.folder.image(i).shape[:2], config, None
        )
        return {one.id: one for one in maps}

    together, alone = read(12), read(1)
    assert together.keys() == alone.keys() == set(file_inputs.ids[:5])
    for name, one in alone.items():
        assert torch.equal(one.class_ids, together[name].class_ids)
        torch.testing.assert_close(together[name].maps["cam"], one.maps["cam"], rtol=0, atol=2e-3)
        assert name != file_inputs.ids[0] or one.maps["cam"].shape[1:] == (30, 60)


def test_colours_change_as_in_hsv():
    import colorsys

    image = torch.rand(3, 4, 5, generator=torch.Generator().manual_seed(0))
    turned = random_colours(image, torch.Generator().manual_seed(3), (0.0, 0.0, 0.0, 0.1))
    shifts = set()
    for y in range(4):
        for x in range(5):
            before = colorsys.rgb_to_hsv(*image[:, y, x].tolist())
            after = colorsys.rgb_to_hsv(*turned[:, y, x].tolist())
            assert after[1:] == pytest.approx(before[1:], abs=1e-5)
            shifts.add(round((after[0] - before[0] + 0.5) % 1 - 0.5, 4))
    assert len(shifts) <= 2 and max(shifts) - min(shifts) < 2e-4 and 0 < abs(min(shifts)) <= 0.1
    grey = (image * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(0)
    for place, towards in enumerate((0.0, grey.mean(), grey)):
        strength = [0.0] * 4
        strength[place] = 0.3
        changed = random_colours(image, torch.Generator().manual_seed(7), strength)
        factor = 1 + 0.3 * (2 * torch.rand(4, generator=torch.Generator().manual_seed(7))[place] - 1)
        torch.testing.assert_close(changed, ((image - towards) * factor + towards).clamp(0, 1))
    assert torch.equal(random_colours(image, None, (0, 0, 0, 0)), image)
    with pytest.raises(ValueError, match="expected four strengths"):
        random_colours(image, None, (0.3,))


def test_a_run_from_files_with_a_best_epoch_and_tensorboard(tiny_config):
    from pssl import train
    from pssl.models.checkpoints import load_net

    tiny_config.arms, tiny_config.pictures, tiny_config.data.splits.train_split = ("classifier",), 0, "val"
    tiny_config.data.loading, tiny_config.data.splits.size = "files", 40
    tiny_config.inference.scales, tiny_config.method.support.scales = (1.0,), (1.0,)
    tiny_config.schedule.classifier_epochs, tiny_config.evaluation.every = 2, 1
    tiny_config.engine.channels_last = False
    try:
        import tensorboard  # noqa: F401

        tiny_config.engine.tensorboard = True
    except ImportError:
        with pytest.raises(ImportError, match=r"engine\.tensorboard: .*pip install pssl\[tensorboard\]"):
            Log(Console(file=io.StringIO())).open_tensorboard(tiny_config.out)
    try:
        metrics = train.run(tiny_config, Log(Console(file=io.StringIO(), width=120)))
    finally:
        torch.use_deterministic_algorithms(False)
    entry = metrics["runs"][0]["arms"]["classifier"]
    best = load_net(tiny_config.out / "checkpoints/classifier.best.safetensors")
    assert best.description["epoch"] == entry["best_epoch"]["epoch"]
    last = entry["readouts"]["cam"]["train"]["best_miou_on_this_split"]
    assert best.loading == "files", "so that pssl.cams reads the images so too"
    assert entry["best_epoch"]["miou"] >= last - 1e-3
    assert (tiny_config.out / "tensorboard").is_dir() == tiny_config.engine.tensorboard
    names = {path.name for path in (tiny_config.out / "checkpoints").iterdir()}
    assert names == {"classifier.safetensors", "classifier.best.safetensors", "classifier.state.pt"}
