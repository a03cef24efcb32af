"""SEAM and PPC: against their formulas written out, and as arms of a run."""

import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pssl.method.objective import Objective
from pssl.method.terms.ppc import PPCConfig, confidences, hard_contrast, ppc_loss, view_of
from pssl.method.terms.registry import MethodConfig
from pssl.method.terms.seam import SEAMConfig, seam_loss
from pssl.models.backbones.small import SmallBackbone
from pssl.models.cam_net import CamNet, CamOutput
from pssl.models.pixel_correlation import PixelCorrelation

LABELS = torch.tensor([[1.0, 0, 1], [0, 1, 0]])


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_pixel_correlation_is_the_formula():
    torch.manual_seed(0)
    module = PixelCorrelation((5, 7), colours=True)
    cam, images = random(2, 3, 4, 6, seed=1), random(2, 3, 16, 24, seed=2)
    low = (random(2, 5, 4, 6, seed=3), random(2, 7, 8, 12, seed=4))
    refined = module(cam.requires_grad_(), low, images)
    assert refined.shape == (2, 4, 4, 6)

    def at(x):
        return F.interpolate(x, size=(4, 6), mode="bilinear", align_corners=True)

    with torch.no_grad():
        parts = [at(images)] + [layer(at(x)).relu() for layer, x in zip(module.low, low, strict=True)]
        phi = module.embed(torch.cat(parts, 1)).flatten(2)
        for b in range(2):
            scores = torch.zeros(4, 24)
            positive = cam[b].detach().relu().flatten(1)
            for k in range(3):
                scores[k + 1] = (positive[k] - 1e-5).relu() / (positive[k].max() + 1e-5)
            scores[0] = 1 - scores[1:].max(0).values
            for pixel in range(24):
                for k in range(1, 4):
                    if scores[k, pixel] < scores[1:, pixel].max():
                        scores[k, pixel] = 0
            unit = phi[b] / (phi[b].norm(dim=0) + 1e-5)
            alike = (unit.T @ unit).relu()
            alike = alike / (alike.sum(0) + 1e-5)
            torch.testing.assert_close(refined[b].flatten(1), scores @ alike, rtol=1e-4, atol=1e-5)
    refined.square().sum().backward()
    assert cam.grad is None and all(p.grad is not None for p in module.parameters())


def two_views(dtype=torch.float32):
    """Outputs for a 5 x 5 and a 3 x 3 grid."""
    views = []
    for number, side in enumerate((5, 3)):
        cam = random(2, 3, side, side, seed=number).to(dtype).requires_grad_()
        features = random(2, 6, side, side, seed=5 + number).to(dtype).requires_grad_()
        refined = random(2, 4, side, side, seed=9 + number).to(dtype).requires_grad_()
        views.append(CamOutput(features, cam, refined))
    return views


def spread(m):
    m = m.relu()
    low, high = m.flatten(2).min(2).values[..., None, None], m.flatten(2).max(2).values[..., None, None]
    return (m - low - 1e-5).relu() / (high - low + 1e-5)


def test_seam_loss_is_the_formula():
    """Step by step as the paper's training script computes it, background as channel 0."""
    first, second = two_views()
    loss = seam_loss(first, second, LABELS, (7, 7), SEAMConfig())
    loss.backward()
    label = torch.cat([torch.ones(2, 1), LABELS], 1)[:, :, None, None]

    def at(x):
        return F.interpolate(x, size=(7, 7), mode="bilinear", align_corners=True)

    cams, refined, low = [], [], []
    for view in (first, second):
        cam = torch.cat([torch.zeros(2, 1, 7, 7), at(spread(view.cam.detach()))], 1) * label
        cam[:, 0] = 1 - cam[:, 1:].max(1).values
        cams.append(cam)
        refined.append(at(spread(view.refined.detach())) * label)
        strongest = (view.refined.detach() * label)[:, 1:].max(1).values.flatten(1).sort(1).values
        quarter = strongest.shape[1] // 4
        low.append(strongest[:, :quarter].relu().sum() / (2 * quarter))
    expected = (cams[0][:, 1:] - cams[1][:, 1:]).abs().mean() + (low[0] + low[1]) / 2
    for target, maps in ((cams[1].clone(), refined[0]), (cams[0].clone(), refined[1])):
        classes = target[:, 1:]
        classes[classes != classes.max(1, keepdim=True).values] = 0
        difference = (target - maps).abs().flatten(1).sort(1, descending=True).values
        expected = expected + difference[:, : int(4 * 49 * 0.2)].mean()
    torch.testing.assert_close(loss.detach(), expected, rtol=1e-5, atol=1e-6)
    for view in (first, second):
        assert view.cam.grad.abs().sum() > 0 and view.refined.grad.abs().sum() > 0
        absent = (LABELS == 0)[:, :, None, None].expand_as(view.cam)
        assert not view.cam.grad[absent].any(), "absent classes learn nothing"


def test_ppc_views_are_the_formula():
    features, refined = random(2, 6, 4, 4, seed=1), random(2, 4, 4, 4, seed=2)
    labels = torch.tensor([[1.0, 0, 1], [1, 0, 0]])
    view = view_of(features, refined, labels, PPCConfig())
    scores = spread(refined)
    scores[:, 0] = 0.2
    scores = scores * torch.cat([torch.ones(2, 1), labels], 1)[:, :, None, None]
    torch.testing.assert_close(confidences(refined, labels, 0.2), scores)
    assert torch.equal(view.labels, scores.argmax(1))
    pixels = features.permute(0, 2, 3, 1).reshape(-1, 6)
    for region in (1, 3):
        values = scores[:, region].reshape(-1)
        top = values.topk(2).indices  # an eighth of 4 x 4 cells
        mean = (values[top, None] * pixels[top]).sum(0) / values[top].sum()
        torch.testing.assert_close(view.prototypes[region], mean / mean.norm())
    background = pixels[(view.labels == 0).flatten()].mean(0)
    torch.testing.assert_close(view.prototypes[0], background / background.norm())
    assert view.valid.tolist() == [True, True, False, True], "no image has the second class"


def test_ppc_hard_contrast_is_the_formula():
    labels = torch.ones(2, 3)
    view = view_of(random(2, 6, 5, 5, seed=1), random(2, 4, 5, 5, seed=2), labels, PPCConfig())
    config = PPCConfig(negatives=(0.25, 0.75))
    torch.manual_seed(3)
    loss = hard_contrast(view, config)
    torch.manual_seed(3)
    unit = F.normalize(view.features, dim=1).permute(0, 2, 3, 1).reshape(-1, 6)
    cosines, owner = unit @ view.prototypes.T, view.labels.flatten()
    means = []
    for region in range(4):
        members = [i for i in range(50) if owner[i] == region]
        if len(members) < 2:
            continue
        losses = {}
        for i in members:
            order = sorted(range(4), key=lambda c, i=i: -float(cosines[i, c]))
            rivals = [c for c in order[1:3] if c != region]
            logits = torch.stack([cosines[i, region], *(cosines[i, c] for c in rivals)]) / 0.1
            losses[i] = logits.logsumexp(0) - logits[0]
        drawn = [members[n] for n in torch.randperm(len(members))[: len(members) // 2]]
        rising = sorted(members, key=lambda i: float(cosines[i, owner[i]]))
        most = int(len(members) * 0.6)
        hardest = rising[most - len(members) // 2 : most]
        means.append(torch.stack([losses[i] for i in (*drawn, *hardest)]).mean())
    torch.testing.assert_close(loss, torch.stack(means).mean(), rtol=1e-4, atol=1e-5)


def test_ppc_loss_contrasts_both_views_with_each_other():
    first, second = two_views()
    config = PPCConfig(
        negatives=(0.0, 0.0)
    )  # without rivals the intra-view term is that of the best one only
    torch.manual_seed(0)
    loss = ppc_loss(first, second, LABELS, config)
    maps = [
        [
            F.interpolate(m.detach(), size=(3, 3), mode="bilinear", align_corners=True)
            for m in (v.features, v.refined)
        ]
        for v in (first, second)
    ]
    one, two = (view_of(*m, LABELS, config) for m in maps)

    def contrast(features, view, labels):
        cosines = torch.einsum("bdhw,cd->bchw", F.normalize(features, dim=1), view.prototypes) / 0.1
        cosines = cosines.masked_fill(~view.valid[:, None, None], -torch.inf)
        losses = F.cross_entropy(cosines, labels, reduction="none")
        return losses[view.valid[labels]].mean()

    torch.manual_seed(0)
    expected = hard_contrast(one, config) + hard_contrast(two, config)
    expected = expected + contrast(one.features, two, one.labels) + contrast(two.features, one, two.labels)
    expected = expected + contrast(one.features, one, two.labels) + contrast(two.features, two, one.labels)
    torch.testing.assert_close(loss.detach(), expected / 2, rtol=1e-4, atol=1e-5)
    loss.backward()
    assert first.features.grad.abs().sum() > 0 and first.refined.grad is None


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("ppc", [False, True])
def test_objective_trains_the_module_from_images_and_from_cached_activations(frozen, ppc):
    torch.manual_seed(0)
    net = CamNet(SmallBackbone(16), 3, 8, standardise=frozen, frozen=frozen)
    net.add_pixel_correlation()
    assert net.pixel_correlation.colours != frozen
    names = ("seam", "ppc") if ppc else ("seam",)
    objective = Objective(MethodConfig(), names, classes=3, dim=8, size=24)
    assert objective.scales == (0.3, 1.0) and not objective.support_scales()
    channels = 16 if frozen else 3
    inputs = {scale: random(2, channels, side, side, seed=1) for scale, side in ((1.0, 24), (0.3, 8))}
    losses = objective(net.train(), None, inputs, LABELS)
    assert set(losses) == {"classification", "seam", "total", *(["ppc"] if ppc else [])}
    losses["total"].backward()
    assert all((p.grad is not None) == p.requires_grad for p in net.parameters())
    output = net.eval()(inputs[1.0])
    assert torch.equal(output.maps, output.refined[:, 1:])
    with pytest.raises(ValueError, match="ppc needs seam"):
        Objective(MethodConfig(), ("ppc",), classes=3, dim=8, size=24)


def test_arms_run_and_their_checkpoints_read_alike(tiny_config):
    import io

    from rich.console import Console

    from pssl import train
    from pssl.core.log import Log
    from pssl.models.checkpoints import load_net

    tiny_config.arms = ("classifier", "ppc", "pssl")
    tiny_config.data.splits.train_split, tiny_config.pictures = "val", 0
    tiny_config.method.support.scales = tiny_config.method.mam.scales = tiny_config.inference.scales = (1.0,)
    log = Log(Console(file=io.StringIO(), width=150))
    try:
        metrics = train.run(tiny_config, log)
    finally:
        torch.use_deterministic_algorithms(False)
    assert list(metrics["runs"][0]["arms"]) == ["classifier", "ppc", "pssl"]
    json.dumps(metrics)
    trained = {
        arm: load_net(tiny_config.out / f"checkpoints/{arm}.safetensors") for arm in ("classifier", "ppc")
    }
    assert trained["classifier"].net.pixel_correlation is None
    module = trained["ppc"].net.pixel_correlation
    assert (
        isinstance(module, nn.Module)
        and "pixel_correlation.embed.weight" in trained["ppc"].net.trained_state()
    )
    assert {row["stage"] for row in log.losses if "ppc" in row} == {"0/ppc"}
