"""Pictures of a run: image | ground truth | classifier's CAM | PSSL's CAM."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from pssl.core.files import write_atomically
from pssl.data.palette import colour_labels


def draw_comparison(
    path: Path,
    image: np.ndarray,  # uint8 [H,W,3]
    mask: np.ndarray,  # uint8 [H,W], 255 ignored
    panels: Sequence[tuple[str, Tensor]],  # title, float [k,H,W]
    class_ids: Sequence[int],  # [k], 1..K
    classes: Sequence[str],  # K names
) -> None:
    """Write one PNG: a row per class of the image, a column per panel."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows, columns = max(len(class_ids), 1), 2 + len(panels)
    figure = Figure(figsize=(2.4 * columns, 2.5 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False)
    for row, region in enumerate(class_ids or [0]):
        axes[row, 0].imshow(image)
        axes[row, 0].set_title("image" if row == 0 else "", fontsize=9)
        axes[row, 1].imshow(colour_labels(mask), interpolation="nearest")
        name = classes[region - 1] if region else "no class"
        axes[row, 1].set_title(f"ground truth ({name})", fontsize=9)
        for column, (title, maps) in enumerate(panels, start=2):
            axes[row, column].imshow(image)
            if region:
                axes[row, column].imshow(maps[row].float().numpy(), cmap="jet", vmin=0, vmax=1, alpha=0.55)
            axes[row, column].set_title(title, fontsize=9)
    for axis in axes.flat:
        axis.set_axis_off()
    write_atomically(path, lambda partial: figure.savefig(partial, format="png", dpi=110))
