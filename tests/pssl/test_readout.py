"""What the prototype readout teaches: maps refined by colours, and MAM's target made of them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from pssl.config.model import ModelConfig
from pssl.method.objective import Objective
from pssl.method.readout import readout_maps
from pssl.method.support import SupportNet
from pssl.method.terms.mam import MAMConfig, mam_loss, readout_target
from pssl.method.terms.rcm import RCMConfig
from pssl.method.terms.registry import MethodConfig
from pssl.models.build import build_cam_net
from pssl.models.prototypes import Prototypes
from pssl_ext import pixel_refine

LABELS = torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, 0.0], [0.0, 0.0, 0.0]])


def rows(generator, *shape):
    return F.normalize(torch.randn(*shape, generator=generator), dim=-1)


def test_refined_maps_are_the_refined_margins():
    """Class by class, with the growth of PAR's weights (they sum to 1.01) taken back; absent classes stay 0."""
    generator = torch.Generator().manual_seed(1)
    features = [torch.randn(3, 6, n, n, generator=generator) for n in (4, 8)]
    prototypes = Prototypes(rows(generator, 4, 6), torch.ones(4, dtype=torch.bool), 0.3)
    pixels = torch.rand(3, 3, 16, 16, generator=generator)
    plain = readout_maps(features, prototypes, LABELS, size=(16, 16))
    refined = readout_maps(features, prototypes, LABELS, size=(16, 16), pixels=pixels, dilations=(1, 2))
    margin = torch.where(LABELS[..., None, None] > 0, 2 * plain - 1, 0.0)
    expected = pixel_refine(pixels, margin, dilations=(1, 2)) / 1.01**10
    expected = torch.where(LABELS[..., None, None] > 0, (1 + expected) / 2, 0.0)
    torch.testing.assert_close(refined, expected)
    assert not torch.allclose(refined, plain, atol=1e-2)
    assert refined[2].count_nonzero() == 0
    flat = readout_maps(
        features, prototypes, LABELS, size=(16, 16), pixels=torch.full_like(pixels, 0.5), dilations=(1,)
    )
    assert flat[0].max() <= 1 and flat[0].min() >= 0


def test_refinement_needs_the_pixels():
    generator = torch.Generator().manual_seed(2)
    prototypes = Prototypes(rows(generator, 4, 6), torch.ones(4, dtype=torch.bool), 0.3)
    with pytest.raises(ValueError, match="pixels expected"):
        readout_maps([torch.randn(3, 6, 4, 4)], prototypes, LABELS, size=(4, 4), dilations=(1,))


def test_mam_target_lies_where_the_readout_is_and_weighs_what_the_cams_do():
    generator = torch.Generator().manual_seed(3)
    readout = torch.rand(3, 3, 8, 8, generator=generator) * 0.4 + 0.2
    readout[0, 0, 2:4, 2:6] = 0.9
    readout[0, 2] = 0.4  # present, but nowhere likelier than background
    readout[1, 1, :, 4:] = 0.6
    support = [torch.randn(3, 3, n, n, generator=generator) for n in (4, 8)]
    target, labels = readout_target(readout, support, LABELS, (4, 4))
    assert labels.tolist() == [[1, 0, 0], [0, 1, 0], [0, 0, 0]]
    level = (support[0].relu().mean((2, 3)) + support[1].relu().mean((2, 3))) / 2
    for image, cls in ((0, 0), (1, 1)):
        torch.testing.assert_close(target[image, cls].mean(), level[image, cls])
        shares = F.avg_pool2d((2 * readout[image, cls] - 1).clamp(min=0)[None, None], 2)[0, 0]
        torch.testing.assert_close(target[image, cls] / target[image, cls].sum(), shares / shares.sum())
    main = {1.0: torch.randn(3, 3, 4, 4, generator=generator)}
    value = mam_loss(main, dict(enumerate(support)), LABELS, (4, 4), MAMConfig(), readout)
    seen = main[1.0].relu() * labels[..., None, None]
    aim = target * labels[..., None, None]
    weight = 2 - F.cosine_similarity(seen.flatten(2), aim.flatten(2), dim=2)
    torch.testing.assert_close(value, F.l1_loss(seen, weight[..., None, None] * aim), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("target", ["cam", "readout"])
def test_mam_learns_from_the_readout_once_rcm_is_anchored(target):
    torch.manual_seed(4)
    together = torch.tensor([[1.0, 0.0, 1.0], [1.0, 1.0, 0.0], [0.0, 1.0, 1.0]])
    config = MethodConfig(
        rcm=RCMConfig(refine_dilations=(1,), readout_foreground=0.5, readout_background=0.5),
        mam=MAMConfig(target=target),
    )
    net = build_cam_net(ModelConfig(dim=8, width=16, logit_scale=1.0), 3)
    objective, support = Objective(config, ("rcm", "mam"), classes=3, dim=8, size=24), SupportNet(net)
    pixels = torch.rand(3, 3, 24, 24)
    given = {
        s: F.interpolate(pixels - 0.5, scale_factor=s, mode="bilinear", recompute_scale_factor=False)
        for s in objective.scales
    }
    before = objective(net.eval(), support, given, together, pixels=pixels)
    objective.rcm.anchor(Prototypes(rows(None, 4, 8), torch.ones(4, dtype=torch.bool), 0.5))
    after = objective(net.eval(), support, given, together, pixels=pixels)
    assert (after["mam"] == before["mam"]) == (target == "cam")
    factor = 10 if target == "readout" else 1
    torch.testing.assert_close(after["total"], after["classification"] + after["rcm"] + factor * after["mam"])
    assert after["rcm"] != before["rcm"]
    after["total"].backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())
