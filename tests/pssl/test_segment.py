"""Segmentation: heads and loss against literal computations; training, resuming, predicting end to end."""

import csv
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from refining import tiny_refine

from pssl import evaluate, refine, segment
from pssl.config.model import BackboneConfig, ModelConfig, SegmenterConfig
from pssl.config.segment import SegmentSettings
from pssl.core.checkpoint import load_weights
from pssl.data import VOCFolder, random_labelled_crop, write_label_png
from pssl.data.voc import read_label_png
from pssl.models.backbones import build_backbone
from pssl.models.backbones.small import SmallBackbone
from pssl.models.build import new_segmenter
from pssl.models.checkpoints import load_segmenter
from pssl.models.deeplab import DeepLab, segmentation_loss
from pssl.training import segmentation
from pssl.training.base import Draw
from pssl_ext import dense_crf


@pytest.fixture(autouse=True)
def deterministic_mode_ends_with_the_test():
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def tiny_labels(tiny_cams, tmp_path, quiet):
    """Pseudo labels of the training images, by threshold."""
    out = tmp_path / "labels"
    refine.run(
        tiny_refine(tiny_cams, out, threshold=0.4),
        quiet,
    )
    return out


def tiny_segment(tiny_cams, labels, out, **more) -> segment.SegmentConfig:
    """A run of eight steps."""
    own = {name: more.pop(name) for name in list(more) if name in SegmentSettings.__dataclass_fields__}
    settings = SegmentSettings(**own)
    settings.model.width, settings.model.dim, settings.model.rates = 16, 8, (2,)
    settings.schedule.epochs, settings.schedule.batch_size = 2, 4
    settings.predict.scales = (1.0, 1.5)
    return segment.SegmentConfig(settings, labels, tiny_cams.data, out=out, workers=2, **more)


def net_of(head: str, backbone: str = "small", **more) -> DeepLab:
    torch.manual_seed(0)
    rates = (2,) if head == "largefov" else (1, 2)
    return DeepLab(
        build_backbone(BackboneConfig(backbone, width=8)), 4, head=head, dim=8, rates=rates, **more
    ).eval()


def test_largefov_is_the_literal_formula():
    net, images = net_of("largefov"), torch.rand(2, 3, 24, 20)
    state = net.state_dict()
    x = net.backbone(images)
    x = F.conv2d(x, state["head.fc6.weight"], state["head.fc6.bias"], padding=2, dilation=2).relu()
    x = F.conv2d(x, state["head.fc7.weight"], state["head.fc7.bias"]).relu()
    torch.testing.assert_close(
        net(images), F.conv2d(x, state["head.classifier.weight"], state["head.classifier.bias"])
    )
    assert net(images).shape == (2, 4, 6, 5)


def test_v2_is_the_literal_formula():
    net, images = net_of("v2"), torch.rand(2, 3, 24, 20)
    state, x = net.state_dict(), net.backbone(images)
    expected = torch.zeros(2, 4, 6, 5)
    for number, rate in enumerate((1, 2)):
        weight, bias = (state[f"head.classifiers.{number}.{part}"] for part in ("weight", "bias"))
        expected += F.conv2d(x, weight, bias, padding=rate, dilation=rate)
    torch.testing.assert_close(net(images), expected)
    assert sum("head." in name for name in state) == 4


def test_v3plus_is_the_literal_formula():
    net, images = net_of("v3plus"), torch.rand(2, 3, 24, 20)
    state = {name: value for name, value in net.state_dict().items()}

    def unit(x, name, rate=1):
        weight = state[f"{name}.0.weight"]
        x = F.conv2d(x, weight, padding=rate * (weight.shape[2] // 2), dilation=rate)
        norms = (state[f"{name}.1.{part}"] for part in ("running_mean", "running_var", "weight", "bias"))
        return F.batch_norm(x, *norms).relu()

    x, fine = net.backbone(images), net.backbone.layers[:6](images)
    pooled = F.conv2d(
        x.mean((2, 3), keepdim=True), state["head.whole.weight"], state["head.whole.bias"]
    ).relu()
    branches = [unit(x, f"head.branches.{n}", rate) for n, rate in enumerate((1, 1, 2))]
    y = unit(torch.cat([*branches, pooled.expand_as(branches[0])], 1), "head.project")
    y = torch.cat([F.interpolate(y, size=(12, 10), mode="bilinear"), unit(fine, "head.fine")], 1)
    y = unit(unit(y, "head.decoder.0"), "head.decoder.1")
    expected = F.conv2d(y, state["head.classifier.weight"], state["head.classifier.bias"])
    torch.testing.assert_close(net(images), expected)


@pytest.mark.parametrize(
    ("backbone", "head"),
    [
        ("small", "largefov"),
        ("efficientnet_lite0", "largefov"),
        ("efficientnet_lite0", "v2"),
        ("efficientnet_lite0", "v3plus"),
        ("resnet38d", "v2"),
        ("resnet38d", "v3plus"),
    ],
)
def test_backbones_take_heads(backbone, head):
    net = net_of(head, backbone)
    stride = net.backbone.stride
    with torch.no_grad():
        shape = net(torch.zeros(1, 3, 64, 64)).shape
    fine = {4: 2, 8: 4, 16: 4}[stride]
    assert shape == (1, 4, *([64 // (fine if head == "v3plus" else stride)] * 2))


def test_timm_networks_take_all_heads(timm):
    for head, side in (("largefov", 4), ("v2", 4), ("v3plus", 16)):
        net = DeepLab(
            build_backbone(BackboneConfig("timm", timm="resnet18", output_stride=16)),
            4,
            head=head,
            dim=8,
            rates=(2,),
        ).eval()
        with torch.no_grad():
            assert net(torch.zeros(1, 3, 64, 64)).shape == (1, 4, side, side)


def test_wrong_heads_are_named():
    for more, text in (
        ({"head": "psp"}, "head: expected 'largefov', 'v2' or 'v3plus', got 'psp'"),
        ({"head": "largefov", "rates": (6, 12)}, r"rates: expected one dilation for largefov, got \[6, 12\]"),
        ({"head": "v3plus", "rates": ()}, "rates: expected one dilation or more for v3plus"),
        ({"head": "v2", "rates": ()}, "rates: expected one dilation or more for v2"),
    ):
        with pytest.raises(ValueError, match=text):
            DeepLab(SmallBackbone(8), 4, **more)
    coarse = SmallBackbone(8)
    coarse.fine_channels = None
    with pytest.raises(ValueError, match="head: expected largefov or v2 for SmallBackbone"):
        DeepLab(coarse, 4, head="v3plus")


def test_fixed_layers_stay():
    net = net_of("largefov", fixed="early").train()
    assert not net.backbone.layers[1].training and net.head.dropout.training
    assert [p.requires_grad for p in net.backbone.layers[0].parameters()] == [False]
    assert all(p.requires_grad for p in net.head.parameters())


def test_loss_over_literal_pixels():
    logits = torch.randn(2, 3, 2, 3, generator=torch.Generator().manual_seed(0), requires_grad=True)
    labels = torch.randint(0, 3, (2, 4, 6), generator=torch.Generator().manual_seed(1)).to(torch.uint8)
    labels[0, :2] = 255
    p = F.interpolate(logits.detach(), size=(4, 6), mode="bilinear").softmax(1)
    costs = [
        -float(p[b, int(labels[b, y, x]), y, x].log())
        for b in range(2)
        for y in range(4)
        for x in range(6)
        if labels[b, y, x] != 255
    ]
    assert float(segmentation_loss(logits, labels).detach()) == pytest.approx(np.mean(costs), rel=1e-5)
    nothing = segmentation_loss(logits, torch.full_like(labels, 255))
    nothing.backward()
    assert float(nothing.detach()) == 0 and logits.grad.abs().max() == 0


def test_probabilities_are_the_literal_loop():
    net, image = net_of("v3plus"), torch.randint(0, 256, (3, 21, 18), dtype=torch.uint8)
    total = torch.zeros(1, 4, 21, 18)
    for side in ((21, 18), (32, 27)):
        pixels = net.backbone.normalise(image[None].float() / 255)
        if side != (21, 18):
            pixels = F.interpolate(pixels, size=side, mode="bilinear")
        with torch.no_grad():
            for logits in (net(pixels), net(pixels.flip(3)).flip(3)):
                total += F.interpolate(logits, size=(21, 18), mode="bilinear").softmax(1) / 4
    torch.testing.assert_close(net.probabilities(image, (1.0, 1.5), True), total[0])


def test_image_and_labels_change_alike():
    """Labels written into the image's colours stay where the labels are, through zoom, cut, padding and mirroring."""
    labels = torch.zeros(20, 30, dtype=torch.uint8)
    labels[5:15, 3:12] = 200
    image = labels[None].expand(3, -1, -1)
    mirrored = set()
    for seed in range(12):
        pixels, classes = random_labelled_crop(
            image, labels, 24, torch.Generator().manual_seed(seed), scale=(0.6, 1.6), fill=1.0
        )
        assert pixels.shape == (3, 24, 24) and classes.shape == (24, 24) and classes.dtype == torch.uint8
        assert set(classes.unique().tolist()) <= {0, 200, 255}
        expected = torch.where(classes == 255, 1.0, classes.float() / 255)
        assert ((pixels[0] - expected).abs() < 0.01).float().mean() > 0.8, seed
        mirrored.add(bool((classes == 200).float().mean(0).argmax() > 12))
    assert mirrored == {True, False}
    with pytest.raises(
        ValueError, match=r"random_labelled_crop: expected labels of the image's size \[20, 30\]"
    ):
        random_labelled_crop(image, labels[:4], 24)


@pytest.mark.parametrize("head", ["largefov", "v2", "v3plus"])
def test_run_leaves_its_files(tiny_cams, tiny_labels, tmp_path, quiet, head):
    config = tiny_segment(tiny_cams, tiny_labels, tmp_path / "run")
    config.settings.model.head = head
    result = segment.run(config, quiet)
    folder = VOCFolder(tiny_cams.root)
    assert config.predictions == tmp_path / "run/results/VOC2012/Segmentation/comp6_val_cls"
    assert sorted(p.name for p in config.predictions.iterdir()) == sorted(
        f"{i}.png" for i in folder.ids("val")
    )
    net = load_segmenter(tmp_path / "run/checkpoints/segment.safetensors", folder.classes)
    for image_id in folder.ids("val"):
        with Image.open(config.predictions / f"{image_id}.png") as picture:
            assert picture.mode == "P"
        image = torch.from_numpy(folder.image(image_id)).permute(2, 0, 1)
        expected = net.probabilities(image, (1.0, 1.5), True).argmax(0)
        assert np.array_equal(read_label_png(config.predictions / f"{image_id}.png", 20), expected.numpy())
    scored = evaluate.run(
        evaluate.EvaluateConfig(
            labels=config.predictions, data=config.data.folder, split="val", out=tmp_path / "scores.json"
        ),
        quiet,
    )
    assert (scored["miou"], scored["iou"]) == (result["miou"], result["iou"])
    assert json.loads((tmp_path / "run/segment.json").read_text()) == json.loads(json.dumps(result))
    assert result["training"]["steps"] == 8 == len(list(csv.DictReader((tmp_path / "run/losses.csv").open())))
    assert "mean" in quiet.console.file.getvalue()


def test_stopped_training_carries_on(tiny_cams, tiny_labels, tmp_path, quiet):
    whole = segment.run(tiny_segment(tiny_cams, tiny_labels, tmp_path / "whole"), quiet)
    config = tiny_segment(tiny_cams, tiny_labels, tmp_path / "broken", resume=True)

    def stop(text):
        if "loss" in text and stop.calls > 5:
            raise KeyboardInterrupt
        stop.calls += 1

    stop.calls = 0
    quiet.plot = lambda stage, values: stop("loss")
    with pytest.raises(KeyboardInterrupt):
        segment.run(config, quiet)
    steps = []
    quiet.plot = lambda stage, values: steps.append(values["step"])
    assert not (tmp_path / "broken/segment.json").exists()
    quiet.losses.clear()
    resumed = segment.run(config, quiet)
    assert steps == [4, 5, 6, 7] and [row["step"] for row in quiet.losses] == list(range(8))
    assert resumed["iou"] == whole["iou"] and resumed["confusion"] == whole["confusion"]
    weights = [
        load_weights(tmp_path / run / "checkpoints/segment.safetensors")[0] for run in ("whole", "broken")
    ]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
    stamps = {path: path.stat().st_mtime_ns for path in config.predictions.iterdir()}
    next(iter(stamps)).unlink()
    quiet.losses.clear()
    assert segment.run(config, quiet)["iou"] == whole["iou"]
    kept = [path.stat().st_mtime_ns == stamp for path, stamp in stamps.items()]
    assert kept.count(False) == 1, "only the missing prediction is made again"
    config.seed = 1
    with pytest.raises(ValueError, match=r"differ in seed \(0, now 1\)"):
        segment.run(config, quiet)


def test_crf_and_a_given_checkpoint(tiny_cams, tiny_labels, tmp_path, quiet):
    first = tiny_segment(tiny_cams, tiny_labels, tmp_path / "first")
    first.settings.schedule.epochs = 6
    segment.run(first, quiet)
    checkpoint = first.out / "checkpoints/segment.safetensors"
    config = tiny_segment(tiny_cams, tiny_labels, tmp_path / "second", checkpoint=checkpoint)
    config.settings.predict.crf, config.settings.crf.iterations, config.settings.crf.bilateral = (
        True,
        2,
        (5.0, 60.0, 3.0),
    )
    assert segment.run(config, quiet)["training"] == {}
    folder = VOCFolder(tiny_cams.root)
    net, changed = load_segmenter(checkpoint, folder.classes), 0
    for image_id in folder.ids("val"):
        image = torch.from_numpy(folder.image(image_id)).permute(2, 0, 1)
        p = net.probabilities(image, (1.0, 1.5), True)[None]
        refined = dense_crf(
            image[None],
            p,
            iterations=2,
            gaussian=config.settings.crf.gaussian,
            bilateral=config.settings.crf.bilateral,
        )[0].argmax(0)
        assert np.array_equal(read_label_png(config.predictions / f"{image_id}.png", 20), refined.numpy())
        changed += int((refined != p[0].argmax(0)).sum())
    assert changed > 0, "the CRF did nothing"
    with pytest.raises(ValueError, match="expected a segmentation network of"):
        load_segmenter(tiny_cams.checkpoint, folder.classes)


def test_training_shows_squares_of_its_own_size(tiny_cams, tiny_labels, tmp_path, quiet, monkeypatch):
    """`size` in place of the data's, by which CAMs were trained."""
    shown = set()

    def loss(logits, labels):
        shown.add(tuple(labels.shape[1:]))
        return segmentation_loss(logits, labels)

    monkeypatch.setattr("pssl.training.segmentation.segmentation_loss", loss)
    config = tiny_segment(tiny_cams, tiny_labels, tmp_path / "run", size=40)
    config.settings.schedule.epochs = 1
    segment.run(config, quiet)
    assert shown == {(40, 40)} and config.data.splits.size == 48
    assert load_weights(tmp_path / "run/checkpoints/segment.safetensors")[1]["size"] == 40


def test_backbone_of_a_cam_checkpoint(tiny_cams):
    said: list[str] = []
    net = new_segmenter(SegmenterConfig(width=16, dim=8, init=tiny_cams.checkpoint), 6, 0, said.append)
    weights = load_weights(tiny_cams.checkpoint)[0]
    assert all(torch.equal(v, weights[f"net.backbone.{k}"]) for k, v in net.backbone.state_dict().items())
    assert said == [f"backbone weights of {tiny_cams.checkpoint}"]
    with pytest.raises(ValueError, match="expected the weights of a trained efficientnet_lite0 backbone"):
        new_segmenter(SegmenterConfig(backbone="efficientnet_lite0", init=tiny_cams.checkpoint), 6, 0)
    with pytest.raises(ValueError, match="backbone of this width"):
        new_segmenter(SegmenterConfig(width=8, init=tiny_cams.checkpoint), 6, 0)
    assert ModelConfig().backbone == SegmenterConfig().backbone


def frozen_segment(tiny_cams, labels, out, **more) -> segment.SegmentConfig:
    config = tiny_segment(tiny_cams, labels, out, frozen_scales=(0.5, 1.0), **more)
    config.settings.model.frozen, config.settings.model.init = True, tiny_cams.checkpoint
    return config


def test_a_frozen_backbone_trains_by_its_activations(tiny_cams, tiny_labels, tmp_path, quiet, monkeypatch):
    """They are kept; the network that results labels images whole; stopped training carries on to the same."""
    monkeypatch.setenv("PSSL_CACHE", str(tmp_path / "cache"))
    config = frozen_segment(tiny_cams, tiny_labels, tmp_path / "whole")
    result = segment.run(config, quiet)
    assert "found in the cache" not in quiet.console.file.getvalue() and result["miou"] > 0
    tensors = load_weights(config.out / "checkpoints/segment.safetensors")[0]
    for name, value in load_weights(tiny_cams.checkpoint)[0].items():
        if name.startswith("net.backbone."):
            assert torch.equal(tensors[name.removeprefix("net.")], value), name

    config = frozen_segment(tiny_cams, tiny_labels, tmp_path / "broken", resume=True)
    losses = segmentation.FrozenSegmentTraining.losses
    calls = iter(range(6))

    def stop(training, fed):
        if next(calls) == 5:
            raise KeyboardInterrupt
        return losses(training, fed)

    with monkeypatch.context() as patch:
        patch.setattr(segmentation.FrozenSegmentTraining, "losses", stop)
        with pytest.raises(KeyboardInterrupt):
            segment.run(config, quiet)
    assert segment.run(config, quiet)["confusion"] == result["confusion"]
    assert "found in the cache" in quiet.console.file.getvalue()
    resumed = load_weights(config.out / "checkpoints/segment.safetensors")[0]
    assert all(torch.equal(value, resumed[name]) for name, value in tensors.items())


def test_what_a_frozen_backbone_is_fed(tiny_cams, tiny_labels, tmp_path, quiet, monkeypatch):
    """Activations of the image, or of the mirrored one, with labels that are mirrored alike."""
    monkeypatch.setenv("PSSL_CACHE", str(tmp_path / "cache"))
    config, folder = frozen_segment(tiny_cams, tiny_labels, tmp_path), VOCFolder(tiny_cams.root)
    net, ids = new_segmenter(config.settings.model, len(folder.classes), 0).eval(), folder.ids("train")
    training = segmentation.FrozenSegmentTraining(
        net, folder, ids, tiny_labels, 48, config.settings.zoom, config.settings.schedule, 1, 0,
        weights=tiny_cams.checkpoint, backbone="small", scales=(0.5, 1.0), log=quiet,
    )  # fmt: skip
    seen = set()
    for step in range(8):
        draw = Draw(0, step, [step, 3], [torch.Generator().manual_seed(10 * step + n) for n in (0, 1)], 1.0)
        ((activations, labels),) = training.feed(iter([draw]))
        scale = activations.shape[2] / 12
        for own, label, index in zip(activations, labels, draw.indices, strict=True):
            image = torch.from_numpy(folder.image(ids[index])).permute(2, 0, 1)[None].float() / 255
            truth = torch.from_numpy(read_label_png(tiny_labels / f"{ids[index]}.png", 20))
            mirrored = not torch.equal(label, truth)
            assert torch.equal(label, truth.flip(1) if mirrored else truth)
            pixels = net.backbone.normalise(image)
            if scale != 1:
                pixels = F.interpolate(pixels, scale_factor=scale, mode="bilinear")
            with torch.no_grad():
                expected = net.backbone(pixels.flip(3) if mirrored else pixels)[0]
            torch.testing.assert_close(own, expected, rtol=2e-3, atol=2e-3)
            seen.add((scale, mirrored))
    assert seen == {(scale, mirrored) for scale in (0.5, 1.0) for mirrored in (False, True)}
    found = training.losses((activations, labels))["total"]
    torch.testing.assert_close(found, segmentation_loss(net.head(activations), labels))


def test_frozen_backbones_have_weights_and_no_decoder(tiny_cams):
    with pytest.raises(ValueError, match=r"model\.frozen: expected a backbone with weights, got random ones"):
        new_segmenter(SegmenterConfig(frozen=True), 6, 0)
    with pytest.raises(ValueError, match=r"model\.fixed=early: expected a backbone with weights"):
        new_segmenter(SegmenterConfig(fixed="early"), 6, 0)
    with pytest.raises(ValueError, match="head: expected largefov or v2 for a frozen backbone, got v3plus"):
        DeepLab(SmallBackbone(8), 4, head="v3plus", rates=(2,), frozen=True)
    net = net_of("v2", frozen=True).train()
    assert not any(module.training for module in net.backbone.modules()) and net.head.training
    assert not any(p.requires_grad for p in net.backbone.parameters())
    images = torch.rand(1, 3, 16, 16)
    net.eval().head[0].running_var.fill_(4.0)
    torch.testing.assert_close(net(images), net.head[1](net.backbone(images) / (4 + 1e-5) ** 0.5))


def test_missing_and_misfitting_labels_are_named(tiny_cams, tiny_labels, tmp_path, quiet):
    config = tiny_segment(tiny_cams, tiny_labels, tmp_path / "run")
    first = VOCFolder(tiny_cams.root).ids("train")[0]
    (tiny_labels / f"{first}.png").unlink()
    with pytest.raises(FileNotFoundError, match=f"1 are missing: {first}"):
        segment.run(config, quiet)
    write_label_png(tiny_labels / f"{first}.png", np.zeros((3, 4), np.uint8))
    with pytest.raises(
        ValueError, match=rf"{first}.png: expected labels of the image's size \[48, 48\], got \[3, 4\]"
    ):
        segment.run(config, quiet)
