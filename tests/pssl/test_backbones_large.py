"""ResNet38d and timm's networks: what they compute, which weights fit them, what stays fixed."""

import sys

import pytest
import torch
import torch.nn.functional as F

from pssl.config.model import ModelConfig
from pssl.core.errors import MissingPackage
from pssl.models.backbones.resnet38d import ResNet38d, name_from_mxnet
from pssl.models.backbones.small import SmallBackbone
from pssl.models.build import build_cam_net, new_net
from pssl.models.cam_net import CamNet
from pssl.models.weights import best_prefix, load_weights, read_tensors


@pytest.fixture(scope="module")
def resnet38d() -> ResNet38d:
    """One of random weights whose batch norms do something."""
    generator = torch.Generator().manual_seed(0)
    net = ResNet38d().eval()
    with torch.no_grad():
        for name, value in net.state_dict().items():
            if ".bn_" in name or name.startswith("bn7"):
                if value.is_floating_point():
                    value.copy_(torch.rand(value.shape, generator=generator) + 0.5)
    return net


def literal(state: dict[str, torch.Tensor], x: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """ResNet38d from its state dict, as the layer table of AffinityNet's network reads."""

    def norm(x, name):
        mean, var = state[f"{name}.running_mean"], state[f"{name}.running_var"]
        return F.batch_norm(x, mean, var, state[f"{name}.weight"], state[f"{name}.bias"], eps=1e-5).relu()

    def conv(x, name, stride=1, dilation=1):
        weight = state[f"{name}.weight"]
        return F.conv2d(x, weight, None, stride, dilation * (weight.shape[2] // 2), dilation)

    x, low = conv(x, "conv1a"), []
    for stage, repeats, stride, dilation in ((2, 3, 2, 1), (3, 3, 2, 1), (4, 6, 2, 1), (5, 3, 1, 2)):
        for repeat in range(repeats):
            block = f"b{stage}" + (f"_{repeat}" if repeat else "")
            first = repeat == 0
            opened = norm(x, f"{block}.bn_branch2a")
            if first and stage == 5:
                low.append(opened)
            y = conv(opened, f"{block}.conv_branch2a", stride if first else 1, 1 if first else dilation)
            y = conv(norm(y, f"{block}.bn_branch2b1"), f"{block}.conv_branch2b1", 1, dilation)
            x = y + (conv(opened, f"{block}.conv_branch1", stride) if first else x)
    for block in ("b6", "b7"):
        opened = norm(x, f"{block}.bn_branch2a")
        if block == "b6":
            low.append(opened)
        y = norm(conv(opened, f"{block}.conv_branch2a"), f"{block}.bn_branch2b1")
        y = norm(conv(y, f"{block}.conv_branch2b1", 1, 4), f"{block}.bn_branch2b2")
        x = conv(y, f"{block}.conv_branch2b2") + conv(opened, f"{block}.conv_branch1")
    return norm(x, "bn7"), low


def test_resnet38d_computes_the_layer_table(resnet38d):
    images = torch.rand(1, 3, 30, 41, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected, expected_low = literal(resnet38d.state_dict(), images)
        out, low, _ = resnet38d.pyramid(images)
        scale = expected.abs().max()
        assert out.shape == (1, 4096, 4, 6) and [t.shape[1] for t in low] == list(ResNet38d.low_channels)
        torch.testing.assert_close(out / scale, expected / scale, rtol=1e-4, atol=1e-5)
        for got, wanted in zip(low, expected_low, strict=True):
            torch.testing.assert_close(got / wanted.abs().max(), wanted / wanted.abs().max())
        folded = resnet38d.folded()(images)
        torch.testing.assert_close(folded / scale, expected / scale, rtol=1e-3, atol=1e-4)


def test_resnet38d_drops_channels_in_its_last_blocks_only():
    rates = {n: m.p for n, m in ResNet38d_on_meta().named_modules() if isinstance(m, torch.nn.Dropout2d)}
    assert rates == {"b6.dropout": 0.3, "b7.dropout": 0.5}


def ResNet38d_on_meta() -> ResNet38d:
    with torch.device("meta"):
        return ResNet38d()


def test_names_of_mxnet_weights_are_the_networks():
    """The names in ilsvrc-cls_rna-a1_cls1000_ep-0001.params, from the architecture, cover ours exactly."""
    names = ["arg:conv1a_weight", "arg:linear1000_weight", "arg:linear1000_bias"]

    def batch_norm(name):
        names.extend([f"arg:{name}_gamma", f"arg:{name}_beta"])
        names.extend([f"aux:{name}_moving_mean", f"aux:{name}_moving_var"])

    for stage, repeats in ((2, 3), (3, 3), (4, 6), (5, 3), (6, 1), (7, 1)):
        for repeat in range(repeats):
            unit = f"{stage}a" if repeat == 0 else f"{stage}b{repeat}"
            branches = ["2a", "2b1"] + (["2b2"] if stage > 5 else [])
            for branch in branches:
                names.append(f"arg:res{unit}_branch{branch}_weight")
                batch_norm(f"bn{unit}_branch{branch}")
            if repeat == 0:
                names.append(f"arg:res{unit}_branch1_weight")
    batch_norm("bn7")
    mapped = [name_from_mxnet(name) for name in names]
    assert [name for name, ours in zip(names, mapped, strict=True) if ours is None] == names[1:3]
    own = {name for name in ResNet38d_on_meta().state_dict() if not name.endswith("num_batches_tracked")}
    assert {name for name in mapped if name} == own and len(own) == len(names) - 2
    assert name_from_mxnet("arg:bn7_weight") == "bn7.weight" or name_from_mxnet("arg:bn7_size") is None


def test_fixed_layers_have_no_gradient_and_no_statistics_of_their_own():
    with torch.device("meta"):
        net = build_cam_net(ModelConfig(backbone="resnet38d", fixed="early", dropout=0.5), 20).train()
    backbone = net.backbone
    trained = {n.split(".")[0] for n, p in backbone.named_parameters() if p.requires_grad}
    assert trained == {
        "b3",
        "b3_1",
        "b3_2",
        "b4",
        *(f"b4_{i}" for i in range(1, 6)),
        "b5",
        "b5_1",
        "b5_2",
        "b6",
        "b7",
    }
    norms = [m for m in backbone.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert norms and not any(m.training or m.weight.requires_grad for m in norms)
    assert net.dropout.training and net.dropout.p == 0.5 and backbone.b6.dropout.training
    assert net.twin().train().backbone.bn7.training is False

    still = CamNet(SmallBackbone(16), 3, 8, fixed="norms").train()
    before = {k: v.clone() for k, v in still.backbone.state_dict().items()}
    still(torch.rand(2, 3, 16, 16)).cam.sum().backward()
    assert all(torch.equal(v, before[k]) for k, v in still.backbone.state_dict().items())
    assert still.backbone.layers[0].weight.grad is not None and still.backbone.layers[1].weight.grad is None


def test_fixed_layers_need_weights():
    with pytest.raises(ValueError, match=r"model\.fixed=norms: expected a backbone with weights"):
        new_net(ModelConfig(fixed="norms", width=16), 3, 0)


@pytest.mark.parametrize("prefix", ["", "module.", "backbone.", "module.resnet38."])
def test_peers_state_dicts_fit_under_any_prefix(tmp_path, prefix):
    state = SmallBackbone(16).state_dict()
    held = {prefix + name: value for name, value in state.items()} | {"fc8.weight": torch.ones(2)}
    torch.save({"state_dict": held, "epoch": 3}, tmp_path / "peer.pth")
    model = SmallBackbone(16)
    report = load_weights(model, tmp_path / "peer.pth")
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert report.unused == ("fc8.weight",) and report.matched == len(state)
    assert report.prefix == prefix.removeprefix("module.")
    assert "1 left (fc8.weight)" in str(report)


def test_irns_double_names():
    wanted = {"conv1.weight", "layer1.0.conv1.weight", "layer1.0.bn1.bias"}
    held = [f"resnet50.{name}" for name in wanted] + [
        "stage1.0.weight",
        "stage1.4.0.conv1.weight",
        "classifier.weight",
    ]
    assert best_prefix(wanted, held) == "resnet50."
    assert best_prefix(wanted, ["something.else"]) == ""


def test_broken_weights_files_are_named(tmp_path):
    (tmp_path / "a.safetensors").write_bytes(b"no tensors")
    with pytest.raises(ValueError, match=r"a\.safetensors: expected a safetensors file"):
        read_tensors(tmp_path / "a.safetensors")
    (tmp_path / "a.pth").write_bytes(b"no tensors")
    with pytest.raises(ValueError, match=r"a\.pth: expected a state dict of tensors .* cannot be read"):
        read_tensors(tmp_path / "a.pth")
    torch.save([1, 2], tmp_path / "b.pth")
    with pytest.raises(ValueError, match=r"b\.pth: expected a state dict of tensors, got list"):
        read_tensors(tmp_path / "b.pth")


def test_timm_networks(timm, tmp_path):
    config = ModelConfig(backbone="timm", timm="resnet18", output_stride=16, fixed="early")
    config.weights = tmp_path / "resnet18.pth"
    source = timm.create_model("resnet18")
    torch.save(source.state_dict(), config.weights)
    said = []
    net = new_net(config, 3, 0, said.append).eval()
    assert net.backbone.stride == 16 and not net.backbone.model.conv1.weight.requires_grad
    assert "2 left (fc.weight, fc.bias)" in said[0]
    images = torch.rand(1, 3, 64, 48)
    with torch.no_grad():
        out, low, fine = net.backbone.pyramid(images)
        at_32 = build_cam_net(ModelConfig(backbone="timm", timm="resnet18"), 3).backbone
        load_weights(at_32, config.weights)
        torch.testing.assert_close(at_32.eval()(images), source.eval().forward_features(images))
    assert fine.shape == (1, net.backbone.fine_channels, 16, 12)
    assert out.shape == (1, 512, 4, 3) and [t.shape[1] for t in low] == list(net.backbone.low_channels)
    assert torch.equal(net.backbone.normalise(images), (images - images.new_tensor(net.backbone.mean).view(3, 1, 1))
                       / images.new_tensor(net.backbone.std).view(3, 1, 1))  # fmt: skip


def test_timm_transformer(timm, tmp_path):
    config = ModelConfig(backbone="timm", timm="vit_tiny_patch16_224", weights=tmp_path / "vit.pth")
    source = timm.create_model("vit_tiny_patch16_224", dynamic_img_size=True).eval()
    torch.save(source.state_dict(), config.weights)
    net = new_net(config, 3, 0).eval()
    images = torch.rand(1, 3, 64, 80)
    with torch.no_grad():
        tokens = source.forward_features(images)[:, 1:]
        torch.testing.assert_close(
            net.backbone(images).flatten(2).transpose(1, 2), tokens, rtol=1e-4, atol=1e-4
        )
        assert net.backbone(torch.rand(1, 3, 70, 33)).shape == (1, 192, 4, 2)
        assert net.backbone.fine_channels is None and net.backbone.pyramid(images).fine is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"timm is not installed; `pip install pssl\[timm\]`"),
        (
            # what a torchvision built for CUDA says beside a CPU torch
            "raise RuntimeError('operator torchvision::nms does not exist')",
            r"timm is installed but cannot be imported \(operator torchvision::nms does not exist\)\. It needs "
            "torchvision, and one built for CUDA fails beside torch .*: install both from the same index",
        ),
        ("import torchvision_that_is_missing", r"timm is installed but cannot be imported \(No module named"),
    ],
)
def test_missing_or_broken_timm_is_said_in_words(tmp_path, monkeypatch, content, message):
    for name in [name for name in sys.modules if name.partition(".")[0] == "timm"]:
        monkeypatch.delitem(sys.modules, name)
    if content is None:
        monkeypatch.setitem(sys.modules, "timm", None)  # as if there were none
    else:
        (tmp_path / "timm.py").write_text(content)
        monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(MissingPackage, match=rf"model\.backbone=timm: {message}"):
        build_cam_net(ModelConfig(backbone="timm"), 3)


def test_timm_errors(timm):
    with pytest.raises(ValueError, match=r"model\.timm: expected a name of timm .*, got 'resnet5000'"):
        build_cam_net(ModelConfig(backbone="timm", timm="resnet5000"), 3)
    with pytest.raises(
        ValueError, match=r"model\.output_stride: vit_tiny_patch16_224 does not offer stride 8"
    ):
        build_cam_net(ModelConfig(backbone="timm", timm="vit_tiny_patch16_224", output_stride=8), 3)
