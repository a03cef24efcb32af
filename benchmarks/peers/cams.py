"""MAM's loss, the region mask and the threshold sweep as peers write them.

``peers`` resizes all maps of all classes and multiplies absent ones by 0; ``present`` is the best without a kernel of
one's own: present classes alone, gathered first. The sweeps are numpy, as evaluation scripts are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from .rcm import IGNORE, upsample

FOREGROUND = 0.3
EPS = 1e-5


def split(maps: dict[str, Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """(main, support) of the inputs main_0 … support_0 …"""
    main, support = ([t for n, t in maps.items() if n.startswith(side)] for side in ("main", "support"))
    return main, support


# -- cam_compare: (image_labels [B,K], main_i, support_i [B,K,h,w]) -> [] ----------------------------------------------


def _attended_l1(main: list[Tensor], support: list[Tensor]) -> list[Tensor]:
    """|M_s − mean_t w_st S_t| for resized maps [*,*,H,W]."""
    found = []
    for m in main:
        target = torch.zeros_like(m)
        for s in support:
            with torch.no_grad():
                attention = 2 - F.cosine_similarity(m.flatten(2), s.flatten(2), dim=2)
            target = target + attention[:, :, None, None] * s / len(support)
        found.append((m - target).abs())
    return found


def compare_all(size: tuple[int, int]) -> Callable[..., Tensor]:
    def loss(image_labels: Tensor, **maps: Tensor) -> Tensor:
        masked = (
            [upsample(c, size).relu() * image_labels[:, :, None, None] for c in cams] for cams in split(maps)
        )
        return sum(d.mean() for d in _attended_l1(*masked))

    return loss


def compare_present(size: tuple[int, int]) -> Callable[..., Tensor]:
    def loss(image_labels: Tensor, **maps: Tensor) -> Tensor:
        where = image_labels.nonzero(as_tuple=True)
        present = ([upsample(c[where][None], size).relu() for c in cams] for cams in split(maps))
        return sum(d.sum() for d in _attended_l1(*present)) / (image_labels.numel() * size[0] * size[1])

    return loss


# -- cam_regions: (image_labels [B,K], cam_i [B,K,h,w]) -> uint8 [B,H,W] -----------------------------------------------


def regions_all(size: tuple[int, int]) -> Callable[..., Tensor]:
    def mask(image_labels: Tensor, **cams: Tensor) -> Tensor:
        total = sum(upsample(c, size).relu() for c in cams.values()) * image_labels[:, :, None, None]
        total = total / (total.amax((2, 3), keepdim=True) + EPS)
        best, index = total.max(1)
        return torch.where(best >= FOREGROUND, index + 1, 0).to(torch.uint8)

    return mask


def regions_present(size: tuple[int, int]) -> Callable[..., Tensor]:
    """Image by image, its classes alone."""

    def mask(image_labels: Tensor, **cams: Tensor) -> Tensor:
        found = []
        for b, labels in enumerate(image_labels):
            present = labels.nonzero()[:, 0]
            total = sum(upsample(c[b, present][None], size)[0].relu() for c in cams.values())
            total = total / (total.amax((1, 2), keepdim=True) + EPS)
            best, index = total.max(0)
            found.append(torch.where(best >= FOREGROUND, present[index] + 1, 0))
        return torch.stack(found).to(torch.uint8)

    return mask


# -- cam_sweep: (cam_i [k,h,w], ids_i [k], truth_i [H,W]) -> int64 [T,C,C] ---------------------------------------------


def images(inputs: dict[str, Tensor]) -> list[tuple[Tensor, Tensor, Tensor]]:
    """(cam, ids, truth) of each image of the inputs cam_0, ids_0, truth_0, cam_1 …"""
    return [
        (inputs[n], inputs["ids" + n[3:]], inputs["truth" + n[3:]]) for n in inputs if n.startswith("cam")
    ]


def each_image(sweep: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    return lambda **inputs: sum(sweep(*image) for image in images(inputs))


def _resized(cam: Tensor, truth: Tensor) -> np.ndarray:
    return upsample(cam[None], tuple(truth.shape))[0].cpu().numpy()


def _predictions(cam: Tensor, ids: Tensor, truth: Tensor, thresholds: Sequence[float], c: int):
    """The label map of each threshold: the threshold is background's score, the classes' scores are the CAMs."""
    scores = np.zeros((c, *truth.shape), np.float32)
    scores[ids.cpu().numpy()] = _resized(cam, truth)
    for threshold in thresholds:
        scores[0] = threshold
        yield scores.argmax(0)


def sweep_loop(thresholds: Sequence[float], c: int) -> Callable[..., Tensor]:
    """An argmax and a confusion matrix for each threshold."""

    def sweep(cam: Tensor, ids: Tensor, truth: Tensor) -> Tensor:
        labels, counts = truth.cpu().numpy(), []
        for prediction in _predictions(cam, ids, truth, thresholds, c):
            counted = labels < IGNORE
            cells = c * labels[counted].astype(np.int64) + prediction[counted]
            counts.append(np.bincount(cells, minlength=c * c).reshape(c, c))
        return torch.from_numpy(np.stack(counts))

    return each_image(sweep)


def sweep_torchmetrics(thresholds: Sequence[float], c: int) -> Callable[..., Tensor]:
    """The same with torchmetrics' confusion matrix."""

    def sweep(cam: Tensor, ids: Tensor, truth: Tensor) -> Tensor:
        from torchmetrics.functional.classification import multiclass_confusion_matrix

        labels = truth.cpu().long()
        return torch.stack(
            [
                multiclass_confusion_matrix(
                    torch.from_numpy(prediction), labels, num_classes=c, ignore_index=IGNORE
                )
                for prediction in _predictions(cam, ids, truth, thresholds, c)
            ]
        )

    return each_image(sweep)


def sweep_one_pass(thresholds: Sequence[float], c: int) -> Callable[..., Tensor]:
    """One histogram for all thresholds: what numpy can do at best."""

    def sweep(cam: Tensor, ids: Tensor, truth: Tensor) -> Tensor:
        maps, labels, bins = _resized(cam, truth), truth.cpu().numpy(), len(thresholds) + 1
        best, region = maps.max(0), ids.cpu().numpy()[maps.argmax(0)]
        below = np.searchsorted(np.asarray(thresholds, np.float32), best)
        counted = labels < IGNORE
        cells = (labels[counted].astype(np.int64) * c + region[counted]) * bins + below[counted]
        histogram = np.bincount(cells, minlength=c * c * bins).reshape(c, c, bins)
        up_to = histogram.cumsum(2)[..., :-1]
        counts = histogram.sum(2, keepdims=True) - up_to
        counts[:, 0] += up_to.sum(1)
        return torch.from_numpy(np.moveaxis(counts, 2, 0).copy())

    return each_image(sweep)
