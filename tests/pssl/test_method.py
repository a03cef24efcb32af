"""SupportNet, RCM, MAM and the objective, against literal loops."""

import pytest
import torch
import torch.nn.functional as F

from pssl.config.model import ModelConfig
from pssl.method.objective import Objective
from pssl.method.readout import map_regions, readout_maps
from pssl.method.support import SupportNet
from pssl.method.terms import Step
from pssl.method.terms.classification import classification_loss
from pssl.method.terms.mam import MAMConfig
from pssl.method.terms.rcm import RCM, PrototypeMemory, RCMConfig, image_prototypes, leave_one_out
from pssl.method.terms.registry import MethodConfig
from pssl.models.build import build_cam_net
from pssl.models.cam_net import CamOutput
from pssl.models.prototypes import Prototypes


@pytest.fixture
def net():
    torch.manual_seed(0)
    return build_cam_net(ModelConfig(dim=8, width=16, logit_scale=1.0), 3)


def inputs(scales, batch=4, size=24):
    generator = torch.Generator().manual_seed(1)
    return {s: torch.rand(batch, 3, int(size * s), int(size * s), generator=generator) for s in scales}


def labels(batch=4):
    return torch.tensor([[1.0, 0, 0], [1, 1, 0], [0, 0, 1], [0, 1, 0]])[:batch]


def test_ema_formula(net):
    support = SupportNet(net, "ema", 0.9)
    before = {k: v.clone() for k, v in support.net.state_dict().items()}
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(torch.randn_like(parameter))
    net.train()(inputs([1.0])[1.0])  # moves batch norm's statistics
    support.update(net)
    for name, value in support.net.state_dict().items():
        main = net.state_dict()[name]
        if value.is_floating_point():
            torch.testing.assert_close(value, 0.9 * before[name] + 0.1 * main, rtol=1e-5, atol=1e-6)
        else:
            assert torch.equal(value, main)


def test_frozen_support_stays_and_shared_support_follows(net):
    frozen, shared = SupportNet(net, "frozen"), SupportNet(net, "shared")
    before = frozen.net.embed.weight.clone()
    with torch.no_grad():
        net.embed.weight.add_(1)
    for support in (frozen, shared):
        support.update(net)
    assert torch.equal(frozen.net.embed.weight, before)
    assert shared.net is net


@pytest.mark.parametrize("mode", ["ema", "frozen", "shared"])
def test_support_has_no_gradient_and_uses_running_statistics(net, mode):
    support = SupportNet(net, mode).train()
    net.train()
    x = inputs([1.0])[1.0]
    before = net.state_dict()["backbone.layers.1.running_mean"].clone()
    output = support(x)
    assert not output.cam.requires_grad and net.training
    assert torch.equal(before, net.state_dict()["backbone.layers.1.running_mean"])
    torch.testing.assert_close(output.cam, net.eval()(x).cam.detach())


@pytest.mark.parametrize(("name", "value"), [("mode", "mean"), ("momentum", 1.5)])
def test_support_arguments(net, name, value):
    with pytest.raises(ValueError, match=name):
        SupportNet(net, **{name: value})


def test_image_prototypes_are_mean_directions():
    features = torch.randn(2, 5, 3, 3, dtype=torch.float64)
    regions = torch.tensor(
        [[[0, 0, 1], [1, 2, 2], [255, 255, 0]], [[0, 0, 0], [0, 0, 0], [1, 1, 255]]]
    ).byte()
    prototypes, present = image_prototypes(features, regions, 4)
    assert present.tolist() == [[True, True, True, False], [True, True, False, False]]
    for b in range(2):
        for c in range(3):
            if present[b, c]:
                pixels = features[b, :, regions[b] == c]
                mean = (pixels / pixels.norm(dim=0)).mean(1)
                torch.testing.assert_close(prototypes[b, c], mean / mean.norm())


def test_leave_one_out_equals_the_literal_loop():
    generator = torch.Generator().manual_seed(3)
    prototypes = F.normalize(torch.randn(6, 4, 5, generator=generator), dim=-1)
    present = torch.rand(6, 4, generator=generator) < 0.5
    present[:, 3] = False
    present[1:, 2], present[0, 2] = False, True
    prototypes = torch.where(present[..., None], prototypes, 0)
    memory = torch.randn(4, 5, generator=generator)
    filled = torch.tensor([True, True, True, False])
    result, valid = leave_one_out(prototypes[2:4], present[2:4], prototypes, present, memory, filled)
    for row, image in enumerate((2, 3)):
        for region in range(4):
            others = [prototypes[j, region] for j in range(6) if j != image and present[j, region]]
            assert bool(valid[row, region]) == (len(others) > 0 or bool(filled[region]))
            expected = torch.stack(others).mean(0) if others else memory[region]
            torch.testing.assert_close(result[row, region], expected)
    alone, alone_valid = leave_one_out(prototypes[:1], present[:1], prototypes, present, memory, ~filled)
    assert not alone_valid[0, 2], "an image must not be compared with itself"
    assert alone.shape == (1, 4, 5)


def test_memory_holds_the_last_ones():
    memory = PrototypeMemory(2, 3, depth=2)
    assert memory.mean()[1].tolist() == [False, False]
    rows = torch.arange(4.0)[:, None, None].expand(4, 2, 3)
    present = torch.tensor([[True, False], [True, False], [False, True], [True, False]])
    memory.push(rows, present)
    mean, filled = memory.mean()
    assert filled.tolist() == [True, True]
    assert mean[0].tolist() == [2.0] * 3 and mean[1].tolist() == [2.0] * 3  # (1 + 3) / 2, and 2
    nothing = PrototypeMemory(2, 3, depth=0)
    nothing.push(rows, present)
    assert nothing.mean()[1].tolist() == [False, False]


@pytest.mark.parametrize("depth", [1, 3, 5])
def test_memory_equals_the_literal_ring(depth):
    """Batches with fewer and with more images of a region than it holds."""
    generator = torch.Generator().manual_seed(5)
    memory, rings = PrototypeMemory(4, 2, depth), [[] for _ in range(4)]
    for images in (1, 9, 2, 0, 6):
        rows = torch.randn(images, 4, 2, generator=generator)
        present = torch.rand(images, 4, generator=generator) < 0.6
        present[:, 3] = False
        memory.push(rows, present)
        for image, region in present.nonzero().tolist():
            rings[region].append(rows[image, region])
        mean, filled = memory.mean()
        assert filled.tolist() == [len(ring) > 0 for ring in rings] and not filled[3]
        for region, ring in enumerate(rings):
            for position, row in list(enumerate(ring))[-depth:]:
                assert torch.equal(memory.rows[region, position % depth], row)
            if ring:
                torch.testing.assert_close(mean[region], torch.stack(ring[-depth:]).mean(0))


@pytest.mark.parametrize("prototypes", ["leave_one_out", "batch"])
def test_rcm_loss_is_cross_entropy_of_cosines(prototypes):
    """The whole module against the formulas, at label resolution above the feature grid."""
    generator = torch.Generator().manual_seed(4)
    config = RCMConfig(temperature=0.2, foreground=0.5, background=0.3, prototypes=prototypes)
    rcm = RCM(3, 6, 8, config)
    whole = prototypes == "batch"
    main = torch.randn(4, 6, 4, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    support = torch.randn(4, 6, 4, 4, generator=generator, dtype=torch.float64)
    cams = [torch.randn(4, 3, n, n, generator=generator, dtype=torch.float64) for n in (2, 4)]
    loss = rcm(main, support, [CamOutput(support, cam) for cam in cams], labels())
    loss.backward()

    def up(x):
        return F.interpolate(x, size=(8, 8), mode="bilinear", align_corners=False)

    total = sum(up(c).relu() for c in cams) * labels()[:, :, None, None]
    total = total / (total.amax((2, 3), keepdim=True) + 1e-5)
    best, index = total.max(1)
    regions = torch.where(best >= 0.5, index + 1, torch.where(best < 0.3, 0, 255))
    own, present = image_prototypes(support, regions.byte(), 4)
    values, wanted = [], []
    pixels = F.normalize(up(main.detach()), dim=1)
    for image in range(4):
        rows = {}
        for region in range(4):
            others = [own[j, region] for j in range(4) if (whole or j != image) and present[j, region]]
            if others:
                rows[region] = F.normalize(torch.stack(others).mean(0), dim=0)
        for y in range(8):
            for x in range(8):
                if int(regions[image, y, x]) in rows:
                    values.append(
                        torch.stack([pixels[image, :, y, x] @ p.to(pixels) / 0.2 for p in rows.values()])
                    )
                    wanted.append(list(rows).index(int(regions[image, y, x])))
    expected = torch.stack(
        [F.cross_entropy(v[None], torch.tensor([w])) for v, w in zip(values, wanted, strict=True)]
    ).mean()
    torch.testing.assert_close(loss.detach().double(), expected, rtol=1e-5, atol=1e-6)
    assert main.grad is not None and support.grad is None
    assert rcm.memory.pushed.tolist() == present.sum(0).tolist()


def test_regions_of_the_readout_are_the_thresholded_margins():
    """Pixel by pixel: softmax of cosines over the image's regions, mean over scales, two thresholds."""
    generator = torch.Generator().manual_seed(5)
    rows = F.normalize(torch.randn(4, 6, generator=generator), dim=1)
    valid = torch.tensor([True, True, True, False])
    features = [torch.randn(4, 6, n, n, generator=generator) for n in (3, 5)]
    readout = readout_maps(features, Prototypes(rows, valid, 0.3), labels(), size=(7, 7))
    regions = map_regions(readout, foreground=0.7, background=0.4)
    assert regions.dtype == torch.uint8
    for image in range(4):
        classes = [c for c in (labels()[image].nonzero().flatten() + 1).tolist() if valid[c]]
        if not classes:
            continue
        allowed = [0, *classes]
        maps = torch.zeros(len(classes), 7, 7)
        for grid in features:
            cosines = torch.einsum("dhw,cd->chw", F.normalize(grid[image], dim=0), rows[allowed])
            p = (cosines / 0.3).softmax(0)
            maps += F.interpolate((p[1:] - p[:1])[None], size=(7, 7), mode="bilinear")[0]
        best, index = ((1 + maps / 2) / 2).max(0)
        expected = torch.where(best >= 0.7, torch.tensor(classes)[index], torch.where(best < 0.4, 0, 255))
        assert torch.equal(regions[image].long(), expected)
    assert {0, 255} < set(regions.unique().tolist())


def test_anchored_rcm_takes_its_masks_from_the_readout():
    config = RCMConfig(temperature=0.3, readout_foreground=0.6, readout_background=0.5)
    rcm = RCM(3, 6, 8, config)
    generator = torch.Generator().manual_seed(6)
    support = [
        CamOutput(torch.randn(4, 6, 4, 4, generator=generator), torch.randn(4, 3, 4, 4, generator=generator))
    ]
    prototypes = Prototypes(
        F.normalize(torch.randn(4, 6, generator=generator), dim=1), torch.ones(4, dtype=torch.bool), 0.3
    )
    rcm(support[0].features, support[0].features, support, labels())
    by_cam = rcm.regions(support, labels())
    rcm.anchor(prototypes)
    assert rcm.memory.pushed.sum() == 0, "old prototypes live in another embedding"
    readout = rcm.readout(support, labels(), None)
    torch.testing.assert_close(
        readout, readout_maps([support[0].features], prototypes, labels(), size=(8, 8)), rtol=0, atol=0
    )
    expected = map_regions(readout, foreground=0.6, background=0.5)
    assert torch.equal(rcm.regions(support, labels(), readout), expected)
    assert not torch.equal(expected, by_cam)
    again = RCM(3, 6, 8, config)
    again.load_state_dict(rcm.state_dict())
    assert again.anchored, "a resumed run must go on as it was"
    assert torch.equal(again.readout(support, labels(), None), readout)


def count_passes(module):
    """The list that input sizes are added to as `module` is called."""
    seen = []
    module.register_forward_hook(lambda module, args, output: seen.append(args[0].shape[-1]))
    return seen


@pytest.mark.parametrize(("rcm", "mam"), [(False, False), (True, False), (False, True), (True, True)])
def test_each_scale_is_passed_once(net, rcm, mam):
    names = [name for name, there in (("rcm", rcm), ("mam", mam)) if there]
    objective = Objective(MethodConfig(), names, classes=3, dim=8, size=24)
    support = SupportNet(net)
    main_sizes, support_sizes = count_passes(net), count_passes(support)
    given = inputs(objective.scales)
    losses = objective(net, support, given, labels())
    sizes = [int(24 * s) for s in (0.5, 1, 1.5, 2)]
    assert sorted(main_sizes) == ([12, 24, 48] if mam else [24])
    assert sorted(support_sizes) == (sizes if rcm or mam else [])
    assert set(losses) == {"classification", "total", *(["rcm"] if rcm else []), *(["mam"] if mam else [])}
    terms = [losses[name] for name in losses if name != "total"]
    torch.testing.assert_close(losses["total"], sum(terms))
    losses["total"].backward()
    assert all(p.grad is not None for p in net.parameters())
    assert all(p.grad is None for p in support.parameters())


@pytest.mark.parametrize("pairs", ["all", "same", "other"])
def test_mam_loss_equals_the_formula(net, pairs):
    objective = Objective(MethodConfig(mam=MAMConfig(pairs=pairs)), ("mam",), classes=3, dim=8, size=24)
    given = inputs(objective.scales)
    support = SupportNet(net)
    with torch.no_grad():
        net.classifier.weight.mul_(1.5)
        value = objective(net.eval(), support, given, labels())["mam"]
        present = labels()[:, :, None, None]

        def at_grid(x):
            return F.interpolate(x, size=(6, 6), mode="bilinear", align_corners=False).relu() * present

        all_targets = {t: at_grid(support(given[t]).cam) for t in (0.5, 1.0, 1.5, 2.0)}
        expected = 0.0
        for scale in (0.5, 1.0, 2.0):
            main = at_grid(net(given[scale]).cam)
            wanted = {"all": all_targets, "same": [scale], "other": all_targets.keys() - {scale}}[pairs]
            targets = [all_targets[t] for t in sorted(wanted)]
            weighted = 0.0
            for target in targets:
                weight = 2 - F.cosine_similarity(main.flatten(2), target.flatten(2), dim=2)
                weighted = weighted + weight[:, :, None, None] * target / len(targets)
            expected = expected + F.l1_loss(main, weighted)
    torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6)


def test_classification_loss_is_the_soft_margin_and_the_binary_cross_entropy():
    logits = torch.randn(4, 3)
    expected = -(labels() * F.logsigmoid(logits) + (1 - labels()) * F.logsigmoid(-logits)).mean()
    torch.testing.assert_close(classification_loss(logits, labels()), expected)
    torch.testing.assert_close(F.binary_cross_entropy_with_logits(logits, labels()), expected)


def test_terms_begin_in_their_epochs(net):
    """Before that they are not among the losses, and nothing is passed for them alone."""
    config = MethodConfig(rcm=RCMConfig(from_epoch=1), mam=MAMConfig(from_epoch=2))
    objective = Objective(config, ("rcm", "mam"), classes=3, dim=8, size=24)
    support, given = SupportNet(net), inputs(objective.scales)
    main_sizes, support_sizes = count_passes(net), count_passes(support)
    expected = [({"classification"}, 1, 0), ({"classification", "rcm"}, 1, 4)]
    expected += [({"classification", "rcm", "mam"}, 3, 4)] * 2
    for epoch, (names, main_passes, support_passes) in enumerate(expected):
        main_sizes.clear(), support_sizes.clear()
        losses = objective(net, support, given, labels(), epoch)
        assert losses.keys() == {*names, "total"}
        assert (len(main_sizes), len(support_sizes)) == (main_passes, support_passes)
        torch.testing.assert_close(losses["total"], sum(losses[name] for name in names))
    assert objective.rcm.memory.pushed.sum() > 0


@pytest.mark.parametrize("mode", ["ema", "shared"])
def test_a_frozen_backbone_passes_each_scale_once(mode):
    """And what it gives serves both networks as if each had passed it itself."""
    torch.manual_seed(0)
    main = build_cam_net(ModelConfig(dim=8, width=16, logit_scale=1.0, frozen=True), 3).train()
    main.set_channel_statistics(torch.rand(16), 1 + torch.rand(16))
    support = SupportNet(main, mode)
    objective = Objective(MethodConfig(), ("rcm", "mam"), classes=3, dim=8, size=24)
    images = inputs(objective.scales)
    passed = []
    main.backbone.register_forward_hook(lambda module, args, output: passed.append(args[0].shape[-1]))
    losses = objective(main, support, images, labels())
    assert sorted(passed) == [12, 24, 36, 48]
    seen = {scale: main(images[scale]) for scale in objective.main_scales()}
    target = {scale: support(images[scale]) for scale in objective.support_scales()}
    objective.rcm.memory = PrototypeMemory(4, 8, objective.config.rcm.memory)
    step = Step(seen, target, labels(), None, objective.views, objective.terms)
    for name, term in objective.terms.items():
        assert torch.equal(term(step), losses[name]), name
