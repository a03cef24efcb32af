"""The cache of frozen activations: found again when nothing changed, made anew when anything did."""

import json

import numpy as np
import pytest
import torch

from pssl.core.seeding import generator
from pssl.data.transforms import to_float
from pssl.inputs.activations import cached_activations, resized
from pssl.inputs.images import ActivationInputs
from pssl.models.backbones.small import SmallBackbone

MADE_FROM = {"backbone": "small", "weights": "0"}


@pytest.fixture
def images():
    return torch.randint(
        0, 256, (5, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )


@pytest.fixture
def backbone():
    torch.manual_seed(0)
    return SmallBackbone(16).eval()


class Calls:
    """Remembers progress reports: none means that nothing was computed."""

    def __init__(self):
        self.calls = []

    def __call__(self, done, total):
        self.calls.append((done, total))


def test_hit_and_miss(tmp_path, images, backbone):
    first, again, other, longer, elsewhere = (Calls() for _ in range(5))
    made = cached_activations(tmp_path, images, backbone, [1.0, 0.5], description=MADE_FROM, on_batch=first)
    assert first.calls == [(4, 5), (5, 5)]
    found = cached_activations(tmp_path, images, backbone, [0.5, 1.0], description=MADE_FROM, on_batch=again)
    assert again.calls == [] and found.folder == made.folder
    changed = images.clone()
    changed[3, 0, 0, 0] ^= 1
    cached_activations(tmp_path, changed, backbone, [0.5, 1.0], description=MADE_FROM, on_batch=other)
    cached_activations(tmp_path, images, backbone, [0.5, 1.0, 2.0], description=MADE_FROM, on_batch=longer)
    new = {**MADE_FROM, "weights": "1"}
    cached_activations(tmp_path, images, backbone, [0.5, 1.0], description=new, on_batch=elsewhere)
    assert other.calls and longer.calls and elsewhere.calls
    assert len(list(tmp_path.iterdir())) == 4
    assert json.loads((made.folder / "made_from.json").read_text())["backbone"] == "small"


def test_rows_are_the_backbones_output(tmp_path, images, backbone):
    made = cached_activations(tmp_path, images, backbone, [1.0, 0.5], description=MADE_FROM)
    rows = made.rows([4, 1], [0, 1], 0.5)
    batch = resized(backbone.normalise(to_float(images[[4, 1]])), 0.5)
    batch[1] = batch[1].flip(2)
    with torch.no_grad():
        expected = backbone(batch)
    assert rows.dtype == torch.float32
    torch.testing.assert_close(rows, expected, rtol=1e-3, atol=1e-3)


def test_interrupted_set_is_not_taken(tmp_path, images, backbone):
    def interrupt(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cached_activations(tmp_path, images, backbone, [1.0], description=MADE_FROM, on_batch=interrupt)
    assert list(tmp_path.iterdir()) == []


def test_overflowing_activations_are_an_error(tmp_path, images, backbone):
    with torch.no_grad():
        backbone.layers[-2].bias.fill_(1e6)
    with pytest.raises(ValueError, match="exceed float16"):
        cached_activations(tmp_path, images, backbone, [1.0], description=MADE_FROM)


def test_activation_inputs(tmp_path, images, backbone):
    made = cached_activations(tmp_path, images, backbone, [1.0, 0.5], description=MADE_FROM)
    inputs = ActivationInputs(list("abcde"), images, made, torch.zeros(5, 2), "cpu")
    mean, std = inputs.channel_statistics()
    both = torch.from_numpy(np.array(made.scales[1.0], dtype=np.float64))
    torch.testing.assert_close(mean.double(), both.mean((0, 1, 3, 4)), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(std.double(), both.std((0, 1, 3, 4), correction=0), rtol=1e-4, atol=1e-5)
    draws = [generator(0, i) for i in range(8)]
    batch, pixels = inputs.training([2] * 8, draws, [0.5, 1.0])
    plain = {flip: inputs.plain([2], 0.5, flip)[0] for flip in (False, True)}
    flipped = [torch.equal(row, plain[True]) for row in batch[0.5]]
    assert set(flipped) == {False, True}
    for row, other, flip in zip(batch[0.5], batch[1.0], flipped, strict=True):
        assert torch.equal(row, plain[flip]) and torch.equal(other, inputs.plain([2], 1.0, flip)[0])
    for shown, flip in zip(pixels, flipped, strict=True):
        image = images[2].float() / 255
        torch.testing.assert_close(shown, image.flip(2) if flip else image)
