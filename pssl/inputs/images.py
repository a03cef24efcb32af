"""What the network is fed: images, or a frozen backbone's activations, at the scales a step asks for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from pssl.core.errors import InputError
from pssl.data.open import DataFolder
from pssl.data.pictures import open_picture, shown_size
from pssl.data.transforms import random_colours, random_flip, random_resized_crop, to_float
from pssl.data.voc import read_label_png
from pssl.inputs.activations import ActivationSet, resized


class Views(NamedTuple):
    """Images as a step sees them: `inputs` of a CamNet by scale, and the `pixels` [B,3,S,S] in 0..1 behind them."""

    inputs: dict[float, Tensor]
    pixels: Tensor


class Inputs(Protocol):
    """The images of one split as inputs of a CamNet. `ids` in the order of the split; `labels` float32 [N,K]."""

    ids: Sequence[str]
    labels: Tensor
    ahead: bool
    """Whether to prepare a step while the one before is computed, in another thread."""

    def training(
        self, indices: Sequence[int], generators: Sequence[torch.Generator], scales: Sequence[float]
    ) -> Views:
        """These images, each changed at random by its own generator, and alike at every scale."""

    def batches(self, indices: Sequence[int], size: int) -> Iterator[list[int]]:
        """These images in groups of at most `size` that :meth:`plain` takes; perhaps in another order."""

    def plain(self, indices: Sequence[int], scale: float, flip: bool) -> Tensor:
        """Inputs of these images as they are, or mirrored."""

    def pixels(self, indices: Sequence[int]) -> Tensor:
        """These images as they are, [B,3,h,w] in 0..1."""


class OneSize:
    """Of inputs whose images all have one size: any of them can be read together."""

    ahead = False

    def batches(self, indices: Sequence[int], size: int) -> Iterator[list[int]]:
        for begin in range(0, len(indices), size):
            yield list(indices[begin : begin + size])


def load_square_images(folder: DataFolder, ids: Sequence[str], size: int) -> Tensor:
    """Images resized (bilinear with antialiasing) to size x size, uint8 [N,3,size,size]."""
    images = torch.empty(len(ids), 3, size, size, dtype=torch.uint8)
    for index, image_id in enumerate(ids):
        pixels = folder.image(image_id)
        if pixels.shape[:2] != (size, size):
            pixels = np.asarray(Image.fromarray(pixels).resize((size, size), Image.Resampling.BILINEAR))
        images[index] = torch.from_numpy(np.array(pixels)).permute(2, 0, 1)
    return images


def grid_labels(folder: Path, ids: Sequence[str], grid: tuple[int, int], classes: int) -> Tensor:
    """Label PNGs of `folder` on a grid, by nearest pixel: uint8 [N,h,w]."""
    maps = torch.empty(len(ids), *grid, dtype=torch.uint8)
    for row, image_id in enumerate(ids):
        labels = torch.from_numpy(read_label_png(folder / f"{image_id}.png", classes))
        maps[row] = F.interpolate(labels[None, None], size=grid, mode="nearest-exact")[0, 0]
    return maps


class ImageInputs(OneSize):
    """Inputs of a backbone that is trained: images, flipped and cropped at random in training.

    Args:
        ids: image ids.
        images: uint8 [N,3,S,S].
        labels: float32 [N,K].
        normalise: the backbone's.
        zoom: range of the random resizing before the random crop (`random_resized_crop`).
        device: where inputs go.
        colours: largest random changes of colours (`random_colours`), empty for none.
        memory_format: of the batches.
    """

    def __init__(
        self,
        ids,
        images: Tensor,
        labels: Tensor,
        normalise,
        zoom,
        device,
        colours: Sequence[float] = (),
        memory_format: torch.memory_format = torch.channels_last,
    ) -> None:
        self.ids = ids
        self.images = images
        self.labels = labels
        self.normalise = normalise
        self.zoom = zoom
        self.size = images.shape[-1]
        self.device = device
        self.colours = colours
        self.memory_format = memory_format

    def training(
        self, indices: Sequence[int], generators: Sequence[torch.Generator], scales: Sequence[float]
    ) -> Views:
        changed = []
        for index, own in zip(indices, generators, strict=True):
            changed.append(random_view(self.images[index], self.size, own, self.zoom, self.colours))
        pixels = self._placed(torch.stack(changed))
        batch = self.normalise(pixels)
        return Views({scale: resized(batch, scale) for scale in scales}, pixels)

    def plain(self, indices: Sequence[int], scale: float, flip: bool) -> Tensor:
        batch = resized(self.normalise(self.pixels(indices)), scale)
        return batch.flip(3) if flip else batch

    def pixels(self, indices: Sequence[int]) -> Tensor:
        return self._placed(to_float(self.images[list(indices)]))

    def _placed(self, images: Tensor) -> Tensor:  # [B,3,S,S]
        """Images on the device, in the memory order asked for."""
        return images.to(self.device, memory_format=self.memory_format)


def random_view(
    image: Tensor,  # [3,H,W]
    size: int,
    own: torch.Generator,
    zoom: Sequence[float],
    colours: Sequence[float],
) -> Tensor:
    """An image as training shows it, [3,size,size] in 0..1: resized, cut, mirrored, its colours changed at random."""
    view = random_flip(random_resized_crop(image, size, own, scale=tuple(zoom)), own)
    return random_colours(view, own, colours) if colours else view


class FileInputs:
    """Inputs read from files when they are needed, in their own proportions (`data.loading: files`).

    Args:
        folder: where images are.
        ids: image ids.
        labels: float32 [N,K].
        normalise: the backbone's.
        size: side of the training crop.
        zoom, colours, memory_format: as for `ImageInputs`.
        device: where inputs go.
        workers: threads that decode.
    """

    ahead = True

    def __init__(
        self,
        folder: DataFolder,
        ids: Sequence[str],
        labels: Tensor,
        normalise,
        size: int,
        zoom: Sequence[float],
        device,
        *,
        colours: Sequence[float] = (),
        memory_format: torch.memory_format = torch.channels_last,
        workers: int = 4,
    ) -> None:
        self.folder = folder
        self.ids = ids
        self.labels = labels
        self.normalise = normalise
        self.size = size
        self.zoom = zoom
        self.device = device
        self.colours = colours
        self.memory_format = memory_format
        self.workers = max(workers, 1)
        self._held: tuple[list[int], Tensor] = ([], torch.empty(0))  # normalised

    def batches(self, indices: Sequence[int], size: int) -> Iterator[list[int]]:
        """Images of one size together, by the headers of their files; what fills no batch comes last.

        A batch has no more pixels than `size` squares of the training's side, for its memory to be what was asked for.
        """
        waiting: dict[tuple[int, int], list[int]] = {}
        for index in indices:
            with open_picture(self.folder.image_path(self.ids[index])) as picture:
                width, height = shown_size(picture)
            group = waiting.setdefault((width, height), [])
            group.append(index)
            if len(group) == max(size * self.size**2 // (width * height), 1):
                yield waiting.pop((width, height))
        yield from waiting.values()

    def _read(self, index: int) -> Tensor:
        return torch.from_numpy(self.folder.image(self.ids[index])).permute(2, 0, 1)

    def training(
        self, indices: Sequence[int], generators: Sequence[torch.Generator], scales: Sequence[float]
    ) -> Views:
        def view(index: int, own: torch.Generator) -> Tensor:
            return random_view(self._read(index), self.size, own, self.zoom, self.colours)

        with ThreadPoolExecutor(self.workers) as threads:
            views = list(threads.map(view, indices, generators))
        pixels = torch.stack(views).to(self.device, memory_format=self.memory_format)
        batch = self.normalise(pixels)
        return Views({scale: resized(batch, scale) for scale in scales}, pixels)

    def plain(self, indices: Sequence[int], scale: float, flip: bool) -> Tensor:
        """Images of one size, at that size times `scale`, [n,3,h,w]; ValueError where sizes differ."""
        if self._held[0] != list(indices):  # one after the other, all scales of a batch are asked for
            self._held = (list(indices), self.normalise(self.pixels(indices)))
        image = resized(self._held[1], scale)
        return image.flip(3) if flip else image

    def pixels(self, indices: Sequence[int]) -> Tensor:
        """Images of one size, at that size, [n,3,h,w]; ValueError where sizes differ."""
        with ThreadPoolExecutor(self.workers) as threads:
            images = [to_float(image) for image in threads.map(self._read, indices)]
        shapes = sorted({tuple(image.shape[1:]) for image in images})
        if len(shapes) != 1:
            raise InputError(f"FileInputs.plain: expected images of one size (height, width), got {shapes}")
        return torch.stack(images).to(self.device, memory_format=self.memory_format)


class ActivationInputs(OneSize):
    """Inputs of a frozen backbone's head: cached activations, of the mirrored image half the time in training.

    Args:
        ids: image ids.
        images: uint8 [N,3,S,S], what the activations are of.
        activations: of all scales that are to be asked for.
        labels: float32 [N,K].
        device: where inputs go.
    """

    def __init__(self, ids, images: Tensor, activations: ActivationSet, labels: Tensor, device) -> None:
        self.ids = ids
        self.images = images
        self.activations = activations
        self.labels = labels
        self.device = device

    def training(
        self, indices: Sequence[int], generators: Sequence[torch.Generator], scales: Sequence[float]
    ) -> Views:
        flips = [int(torch.rand((), generator=own) < 0.5) for own in generators]
        inputs = {scale: self.activations.rows(indices, flips, scale).to(self.device) for scale in scales}
        images = [
            self.images[i].flip(2) if flip else self.images[i] for i, flip in zip(indices, flips, strict=True)
        ]
        return Views(inputs, to_float(torch.stack(images)).to(self.device))

    def pixels(self, indices: Sequence[int]) -> Tensor:
        return to_float(self.images[list(indices)]).to(self.device)

    def plain(self, indices: Sequence[int], scale: float, flip: bool) -> Tensor:
        return self.activations.rows(indices, [int(flip)] * len(indices), scale).to(self.device)

    def channel_statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation [channels] of the activations at scale 1, both flips, in float64 sums."""
        array = self.activations.scales[1.0]
        total = np.zeros((2, array.shape[2]))
        for index in range(array.shape[1]):
            rows = array[:, index].astype(np.float64)
            total += rows.sum((0, 2, 3)), np.square(rows).sum((0, 2, 3))
        mean, square = total / (array.size / array.shape[2])
        std = np.sqrt(np.maximum(square - mean**2, 1e-12))
        return torch.from_numpy(mean).float(), torch.from_numpy(std).float()
