"""Pictures of a run: image | ground truth | classifier's CAM | PSSL's CAM."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from pssl.core.files import write_atomically
from pssl.data.palette import colour_labels
from pssl.method.pseudo_labels import best_regions, label_scores


def draw_comparison(
    path: Path,
    image: np.ndarray,  # uint8 [H,W,3]
    mask: np.ndarray | None,  # uint8 [H,W], 255 ignored
    panels: Sequence[tuple[str, Tensor]],  # title, float [k,H,W]
    class_ids: Sequence[int],  # [k], 1..K
    classes: Sequence[str],  # K names
) -> None:
    """Write one PNG: a row per class of the image, a column per panel; without a mask, none of ground truth."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    before = 1 if mask is None else 2
    rows, columns = max(len(class_ids), 1), before + len(panels)
    figure = Figure(figsize=(2.4 * columns, 2.5 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False)
    for row, region in enumerate(class_ids or [0]):
        axes[row, 0].imshow(image)
        axes[row, 0].set_title("image" if row == 0 else "", fontsize=9)
        name = classes[region - 1] if region else "no class"
        if mask is None:
            axes[row, 0].set_title(name, fontsize=9)
        else:
            axes[row, 1].imshow(colour_labels(mask), interpolation="nearest")
            axes[row, 1].set_title(f"ground truth ({name})", fontsize=9)
        for column, (title, maps) in enumerate(panels, start=before):
            axes[row, column].imshow(image)
            if region:
                axes[row, column].imshow(maps[row].float().numpy(), cmap="jet", vmin=0, vmax=1, alpha=0.55)
            axes[row, column].set_title(title, fontsize=9)
    for axis in axes.flat:
        axis.set_axis_off()
    write_atomically(path, lambda partial: figure.savefig(partial, format="png", dpi=110))


def draw_strip(
    path: Path,
    images: Sequence[tuple[str, np.ndarray, Tensor, Tensor]],  # id, uint8 [H,W,3], maps [k,H,W], regions [k]
    thresholds: Sequence[float],
    classes: Sequence[str],
) -> None:
    """Write one PNG: a row per image, the image itself and its labels at each threshold."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = 1 + len(thresholds)
    figure = Figure(figsize=(2.2 * columns, 2.2 * max(len(images), 1)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(max(len(images), 1), columns, squeeze=False)
    for row, (image_id, image, maps, class_ids) in enumerate(images):
        axes[row, 0].imshow(image)
        names = ", ".join(classes[region - 1] for region in class_ids.tolist())
        axes[row, 0].set_title(f"{image_id}: {names or 'no class'}"[:40], fontsize=8)
        for column, threshold in enumerate(thresholds, start=1):
            labels = best_regions(*label_scores(maps, class_ids, threshold)).numpy()
            axes[row, column].imshow(blended(image, labels))
            axes[row, column].set_title(f"{threshold:g}" if row == 0 else "", fontsize=9)
    for axis in axes.flat:
        axis.set_axis_off()
    write_atomically(path, lambda partial: figure.savefig(partial, format="png", dpi=100))


def blended(image: np.ndarray, labels: np.ndarray) -> np.ndarray:  # uint8 [H,W,3], uint8 [H,W]
    """Return the picture with its labels' colours over it, the background as it is: uint8 [H,W,3]."""
    mixed = 0.35 * image + 0.65 * colour_labels(labels)
    return np.where((labels == 0)[..., None], image, mixed).astype(np.uint8)
