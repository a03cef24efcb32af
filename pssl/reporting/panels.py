"""Images of a report: those that are predicted worst and best, beside what each stage made of them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pssl.core.threads import over_images
from pssl.data.voc import read_label_png
from pssl.method.pseudo_labels import best_regions, label_scores
from pssl.models.cam_files import read_cams
from pssl.reporting import pictures
from pssl.reporting.charts import Key
from pssl.reporting.run_files import Run
from pssl.scoring.scoring import confusion, iou


@dataclass(frozen=True)
class Picture:
    """A picture with its caption; `sharp`: its pixels are to stay visible when it grows."""

    caption: str
    uri: str
    sharp: bool


@dataclass(frozen=True)
class Panel:
    """The pictures of one image."""

    image_id: str
    note: str
    pictures: list[Picture]


@dataclass(frozen=True)
class Images:
    """The colours of the regions, and panels under their headings."""

    legend: list[Key]
    groups: dict[str, list[Panel]]


def images(run: Run, most: int) -> Images | None:
    """Return up to `most` of the images that are predicted worst, and of those that are predicted best."""
    if not most:
        return None
    order = sorted((score, image_id) for image_id, score in _scores(run).items() if not np.isnan(score))
    if not order:
        groups = _by_sureness(run, most) if not run.held.scored else {}
        return Images(_legend(run), groups) if groups else None
    count = min(most, len(order) // 2 or 1)
    chosen = {"Worst": order[:count]}
    if len(order) > 1:
        chosen["Best"] = order[len(order) - count :][::-1]
    groups = {
        heading: [_panel(run, image_id, f"mIoU of the prediction {score:.1f}") for score, image_id in group]
        for heading, group in chosen.items()
    }
    return Images(_legend(run), groups)


def _legend(run: Run) -> list[Key]:
    """Return the colours of the regions, and of pixels that are not counted."""
    colours = [Key(name, pictures.colour_of(region)) for region, name in enumerate(run.regions)]
    return [*colours, Key("not counted", pictures.colour_of(255))]


def _by_sureness(run: Run, most: int) -> dict[str, list[Panel]]:
    """Return, without masks, the held-out images of each class whose CAMs are the most and the least sure.

    A CAM is as sure as its mean over the pixels that it gives to its class.
    """
    cams = run.files.root / "cams/val"
    threshold = run.cam_threshold
    sure: dict[int, list[tuple[float, str]]] = {}
    for image_id in run.held.ids if threshold is not None else ():
        if not (cams / f"{image_id}.npz").is_file():
            continue
        maps, class_ids = read_cams(cams, image_id)
        for cam, region in zip(maps.float(), class_ids.tolist(), strict=True):
            above = cam[cam > threshold]
            sure.setdefault(region, []).append((float(above.mean()) if len(above) else 0.0, image_id))
    groups, each = {}, max(most // 2, 1)
    for region, found in sorted(sure.items()):
        found.sort()
        for heading, chosen in (
            ("most", found[::-1][:each]),
            ("least", found[: max(min(each, len(found) - each), 0)]),
        ):
            if chosen:
                name = f"{run.regions[region]}: {heading} sure"
                groups[name] = [_panel(run, i, f"mean CAM of the class {score:.2f}") for score, i in chosen]
    return groups


def _scores(run: Run) -> dict[str, float]:
    """Return mIoU of each held-out image's prediction, over the regions that it has or is given; {} without any."""
    ids = [i for i in run.held.scored if (run.predictions / f"{i}.png").is_file()]

    def score(image_id: str) -> float:
        label = read_label_png(run.predictions / f"{image_id}.png", len(run.folder.classes))
        counts = confusion(label, run.folder.mask(image_id), len(run.regions))
        return float(100 * iou(counts[None]).nanmean())

    return dict(zip(ids, over_images(score, ids), strict=True)) if ids else {}


def _panel(run: Run, image_id: str, note: str) -> Panel:
    """Return image | CAM | region mask | pseudo label | prediction | ground truth, those that there are."""
    image = run.folder.image(image_id)
    shown = [Picture("image", pictures.photo(image), False)]
    cams, labels = run.files.root / "cams/val", run.files.root / "labels/val"
    threshold = run.cam_threshold
    if threshold is not None and (cams / f"{image_id}.npz").is_file():
        maps, class_ids = read_cams(cams, image_id)
        mask = best_regions(*label_scores(maps, class_ids, threshold)).numpy()
        shown.append(Picture("CAM", pictures.heat(image, maps.numpy()), False))
        shown.append(Picture("region mask", pictures.labels(mask), True))
    for caption, folder in (("pseudo label", labels), ("prediction", run.predictions)):
        if (folder / f"{image_id}.png").is_file():
            label = read_label_png(folder / f"{image_id}.png", len(run.folder.classes))
            shown.append(Picture(caption, pictures.labels(label), True))
    if run.folder.has_mask(image_id):
        truth = run.folder.mask(image_id)
        shown.append(Picture("ground truth", pictures.labels(truth), True))
        names = [run.regions[r] for r in np.unique(truth) if 0 < r < 255]
    else:
        present = run.folder.image_labels([image_id])[0]
        names = [name for name, there in zip(run.folder.classes, present, strict=True) if there]
    return Panel(image_id, f"{', '.join(names) or 'no class'}; {note}", shown)
