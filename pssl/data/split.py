"""The images of a split that count."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pssl.core.log import Log
from pssl.data.check import check_images, check_labels
from pssl.data.open import DataFolder


@dataclass(frozen=True)
class UsableImages:
    """The images of a split that can be used: `ids` to be shown to a network, `scored` those of them with a mask."""

    ids: list[str]
    scored: frozenset[str]


def usable_images(
    folder: DataFolder, split: str, check: Literal["headers", "decode", "nothing"], log: Log
) -> UsableImages:
    """The images of `split` that can be used; the others are named in the log, with what is wrong with each.

    An image is left out whose file is missing, damaged or without image-level labels; one without a sound mask is
    trained on, but not scored. Raises ValueError if nothing is left.
    """
    ids = folder.ids(split)
    if check == "nothing":
        return UsableImages(ids, frozenset(ids))
    found = check_images(folder, ids, masks=True, decode=check == "decode")
    unlabelled = check_labels(folder, [i for i in ids if i not in found.images])
    with_masks = [image_id for image_id in ids if image_id not in found.masks]
    lines = [*(line for lines in found.images.values() for line in lines), *unlabelled.values()]
    if with_masks:  # a split without any mask has none on purpose
        lines += [line for lines in found.masks.values() for line in lines]
    for line in dict.fromkeys(lines):  # a broken label file is one problem, not one an image
        log.say(f"problem: {line}")
    kept = [image_id for image_id in ids if image_id not in found.images and image_id not in unlabelled]
    if len(kept) < len(ids) or lines:
        scored = len(set(kept) & set(with_masks))
        log.say(f"{split}: {len(kept)} of {len(ids)} images are left, {scored} of them with a mask")
    if not kept:
        raise ValueError(f"{folder.root}, split {split}: expected images, got none that can be used")
    return UsableImages(kept, frozenset(with_masks))
