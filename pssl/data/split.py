"""The images of a split that count: every stage opens its split here, so that all of them mean the same images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from pssl.config.data import FolderConfig
from pssl.core.errors import InputError
from pssl.core.log import Log
from pssl.data.check import check_images, check_labels
from pssl.data.open import DataFolder


@dataclass(frozen=True)
class Split:
    """The images of a split.

    `ids` can be shown to a network, `scored` are those of them with a sound mask, both in the order of the list.
    `left_out` says of the others what is wrong with them, `unscored` of those whose mask is not sound.
    """

    name: str
    ids: list[str]
    scored: list[str]
    left_out: dict[str, str] = field(default_factory=dict)
    unscored: dict[str, str] = field(default_factory=dict)

    def counts(self) -> dict[str, int]:
        """Return how many images there are, for the files of results."""
        return {"images": len(self.ids), "left_out": len(self.left_out), "masks_left_out": len(self.unscored)}

    def said(self) -> str:
        """Return what was left out as the end of a closing line, "" where nothing was."""
        parts = [f"{len(self.left_out)} images"] if self.left_out else []
        parts += [f"{len(self.unscored)} masks"] if self.unscored else []
        return f"; left out of {self.name}: {' and '.join(parts)}" if parts else ""

    def selection(self, limit: int | None) -> Split:
        """Return the split with `limit` of its images, evenly spaced; all of them for None."""
        ids = even_selection(self.ids, limit)
        kept = set(ids)
        return Split(self.name, ids, [i for i in self.scored if i in kept], self.left_out, self.unscored)


def open_split(folder: DataFolder, split: str, config: FolderConfig, log: Log) -> Split:
    """Return the images of `split` that count; the log names the others, once a run, with what is wrong with each.

    An image is left out whose file is missing, damaged or without image-level labels; one whose mask is damaged, of
    another size, or missing where others have one, is used but not scored. `config.check` says how closely files are
    looked at. Raises InputError where no image is left.
    """
    ids = folder.ids(split)
    if config.check == "nothing":
        return Split(split, ids, [image_id for image_id in ids if folder.has_mask(image_id)])
    found = check_images(folder, ids, masks=True, decode=config.check == "decode")
    unlabelled = check_labels(folder, [i for i in ids if i not in found.images])
    left_out = {i: lines[0] for i, lines in found.images.items()} | unlabelled
    kept = [image_id for image_id in ids if image_id not in left_out]
    scored = [i for i in kept if i not in found.masks and folder.has_mask(i)]
    # a split without any mask has none on purpose
    unscored = {i: found.masks[i][0] for i in kept if i in found.masks} if scored else {}
    # a broken label file is one problem, not one an image
    for line in dict.fromkeys([*left_out.values(), *unscored.values()]):
        log.say_once(f"problem: {line}")
    opened = Split(split, kept, scored, left_out, unscored)
    if left_out or unscored:
        log.say_once(f"{split}: {len(kept)} of {len(ids)} images are left, {len(scored)} of them with a mask")
    if not kept:
        raise InputError(f"{folder.root}, split {split}: expected images, got none that can be used")
    return opened


def even_selection(items: Sequence, limit: int | None) -> list:
    """Return all of `items`, or `limit` of them, evenly spaced."""
    count = len(items)
    if limit is None or limit >= count:
        return list(items)
    return [items[i * count // limit] for i in range(limit)]
