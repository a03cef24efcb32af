"""Which images of a list can be used, and what is wrong with the others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from pssl.core.errors import InputError

from .open import DataFolder
from .pictures import load_image, open_picture, shown_size

__all__ = ["Problems", "check_images", "check_labels"]

TAIL = 4096  # bytes; cameras append a little after an image's end marker
END = {"JPEG": b"\xff\xd9", "PNG": b"IEND", "MPO": b"\xff\xd9"}


@dataclass
class Problems:
    """What `check_images` found, by image, one line each that names the file."""

    images: dict[str, list[str]] = field(default_factory=dict)
    """Of image files: such an image cannot be trained on."""
    masks: dict[str, list[str]] = field(default_factory=dict)
    """Of masks: such an image cannot be scored."""

    def lines(self) -> list[str]:
        """All problems, images first."""
        return [line for found in (self.images, self.masks) for lines in found.values() for line in lines]


def check_images(
    folder: DataFolder, ids: Sequence[str], *, masks: bool, decode: bool = False, compare: bool = False
) -> Problems:
    """Look at the files of `ids`: missing, no images, truncated, masks of another size; nothing is raised.

    Without `decode`, only an image's header and end are read; one that does not end as its format does is decoded, to
    see. With `decode`, every pixel is, and masks must hold only the folder's labels.

    Args:
        masks: masks are expected too.
        compare: with `decode`, classes that a mask shows must be among the image-level labels. For reports only: weakly
            supervised training may not choose its images by their masks.
    """
    problems = Problems()
    for image_id in ids:
        found: list[str] = []
        size = _attempt(found, _whole, folder.image_path(image_id), decode)
        if found:
            problems.images[image_id] = found
        path = folder.mask_path(image_id) if masks else None
        if not masks or (path is None and not folder.has_mask(image_id)):
            continue
        found = []
        if path is not None:
            mask_size = _attempt(found, _whole, path, False)
            # some tools draw on the stored pixels of an image that EXIF turns
            if None not in (size, mask_size) and mask_size not in (
                size,
                _stored_size(folder.image_path(image_id)),
            ):
                found.append(f"{path}: expected the image's {size} pixels (width, height), got {mask_size}")
        if decode and not found:
            mask = _attempt(found, folder.mask, image_id)
            _attempt(found, folder.parts, image_id)
            if mask is not None and compare:
                found += _compare(folder, image_id, mask)
        if found:
            problems.masks[image_id] = found
    return problems


def check_labels(folder: DataFolder, ids: Sequence[str]) -> dict[str, str]:
    """Images of `ids` whose image-level labels cannot be read, and why."""
    found: list[str] = []
    _attempt(found, folder.image_labels, [])
    if found:  # it is not about any image
        return dict.fromkeys(ids, found[0])
    return _unlabelled(folder, ids)


def _unlabelled(folder: DataFolder, ids: Sequence[str]) -> dict[str, str]:
    """As `check_labels`. Halves are looked at until they are sound or one image: a source may take long to read."""
    found: list[str] = []
    _attempt(found, folder.image_labels, ids)
    if not found:
        return {}
    if len(ids) == 1:
        return {ids[0]: found[0]}
    half = len(ids) // 2
    return _unlabelled(folder, ids[:half]) | _unlabelled(folder, ids[half:])


def _attempt(found: list[str], read, *arguments):
    """The result of `read`, or None with the error's text added to `found`."""
    try:
        return read(*arguments)
    except (OSError, ValueError) as error:
        found.append(str(error))
        return None


def _stored_size(path: Path) -> tuple[int, int]:
    with open_picture(path) as picture:
        return picture.size


def _whole(path: Path, decode: bool) -> tuple[int, int]:
    """An image file's width and height. FileNotFoundError, or ValueError for one that is none or is cut off."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        with open_picture(path) as picture:
            size, end = shown_size(picture), END.get(picture.format or "")
    except InputError:
        raise InputError(f"{path}: not an image") from None
    if not decode:
        with path.open("rb") as stream:
            stream.seek(max(path.stat().st_size - TAIL, 0))
            decode = end is None or end not in stream.read()
    if decode:
        load_image(path)
    return size


def _compare(folder: DataFolder, image_id: str, mask: np.ndarray) -> list[str]:
    """The classes that a mask shows and the image-level labels do not name."""
    labels = _attempt([], folder.image_labels, [image_id])
    if labels is None:
        return []
    shown = [int(region) for region in np.unique(mask) if 0 < region < 255]
    extra = [folder.classes[region - 1] for region in shown if not labels[0, region - 1]]
    name = folder.mask_path(image_id) or f"{folder.root}: the mask of {image_id}"
    return [f"{name}: shows {', '.join(extra)}, which the image-level labels do not name"] if extra else []
