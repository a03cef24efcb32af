"""Forward passes that leave something to the backward pass where that pays: the same bits as without, at any tiling."""

import pytest
import torch
from support import planted

from pssl_ext import prototype_contrast
from pssl_ext.dispatch import has_kernel
from pssl_ext.op import OPS

SPEC = OPS["prototype_contrast"]

pytestmark = pytest.mark.skipif(
    not has_kernel("prototype_contrast_saving", "cpu"),
    reason="only the native kernels for the CPU save products",
)


def arguments(
    d: int = 64, c: int = 5, size: tuple[int, int] = (9, 40), labels: tuple[int, int] | None = None
) -> dict:
    g = torch.Generator().manual_seed(3)
    regions = torch.randint(0, c, (2, *(labels or size)), generator=g)
    regions[:, 0, :7] = 255
    return dict(
        features=torch.randn(2, d, *size, generator=g).requires_grad_(),
        prototypes=torch.randn(c, d, generator=g).requires_grad_(),
        regions=regions,
        temperature=torch.tensor(0.3, requires_grad=True),
        weights=torch.rand(regions.shape, generator=g).requires_grad_(),
        reduction="none",
    )


def leaves(args: dict) -> list[torch.Tensor]:
    return [args[name] for name in SPEC.differentiable]


def gradients(args: dict, seed: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return torch.autograd.grad(prototype_contrast(**args, backend="native"), leaves(args), seed)


def elements_saved(args: dict) -> list[int]:
    """Elements of what autograd keeps beside the arguments."""
    own = {t.data_ptr() for t in args.values() if isinstance(t, torch.Tensor)}
    kept: list[int] = []

    def pack(t: torch.Tensor) -> torch.Tensor:
        if t.data_ptr() not in own and t.numel() > 1:
            kept.append(t.numel())
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        prototype_contrast(**args, backend="native")
    return kept


@pytest.mark.parametrize("transposed", [False, True], ids=["rows", "transposed gradient"])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_the_same_bits_as_without(monkeypatch, memory_format, transposed):
    """A gradient that cannot be read as one row makes other tiles than the forward pass had."""
    args = arguments()
    args["features"] = args["features"].detach().contiguous(memory_format=memory_format).requires_grad_()
    seed = torch.randn(2, 9, 40)
    if transposed:
        seed = seed.mT.contiguous().mT
    found = gradients(args, seed)
    with monkeypatch.context() as without:
        without.setattr("pssl_ext.dispatch.has_kernel", lambda op, device: not op.endswith("_saving"))
        expected = gradients(args, seed)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


def test_what_is_saved_serves_more_than_one_backward():
    args = arguments()
    loss = prototype_contrast(**args, backend="native")
    seed = torch.randn(loss.shape)
    first = torch.autograd.grad(loss, leaves(args), seed, retain_graph=True)
    torch.autograd.grad(loss, leaves(args), -seed, retain_graph=True)
    again = torch.autograd.grad(loss, leaves(args), seed)
    for a, b in zip(first, again, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("d", [48, 64, 256])
def test_an_eighth_of_the_features_at_most(d):
    """5 classes and the square: 24 bytes a pixel."""
    args = arguments(d)
    kept = elements_saved(args)
    assert len(kept) == 1
    # [tiles, C + 1, room for a tile's pixels]
    assert 6 * 2 * 9 * 40 <= kept[0] <= 6 * 2 * (9 * 40 + 512)


@pytest.mark.parametrize(
    "args",
    [arguments(d=40), arguments(labels=(18, 80)), {**arguments(), "backend": "reference"}],
    ids=["many classes", "finer labels", "reference"],
)
def test_elsewhere_nothing_is_saved(args):
    calls = []
    with planted("prototype_contrast_saving", lambda *a: calls.append(a)):
        prototype_contrast(**{"backend": "native", **args}).sum().backward()
    assert not calls


def test_without_a_gradient_nothing_is_saved():
    calls = []
    args = arguments()
    with planted("prototype_contrast_saving", lambda *a: calls.append(a)), torch.no_grad():
        prototype_contrast(**args, backend="native")
    for leaf in leaves(args):
        leaf.requires_grad_(False)
    with planted("prototype_contrast_saving", lambda *a: calls.append(a)):
        prototype_contrast(**args, backend="native")
    assert not calls


def test_what_another_call_saved_is_refused():
    args = arguments()
    given = [args[n] for n in ("features", "prototypes", "regions", "temperature")]
    given = [t.detach() for t in given] + [None, args["weights"].detach(), 255, False, 1e-12]
    loss, total, saved = torch.ops.pssl.prototype_contrast_saving(*given)
    with pytest.raises(RuntimeError, match="prototype_contrast: saved must be what the forward pass"):
        torch.ops.pssl.prototype_contrast_backward_saved(loss, total, saved[1:], *given, [True] * 4)
