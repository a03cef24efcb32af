"""CAMs on disk: one .npz an image with `cams` float16 [k,H,W] and `class_ids` uint8 [k]; no pickle."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pssl.core.errors import InputError
from pssl.core.files import write_atomically

# NumPy reads an array's header by ast.literal_eval. In Python 3.11 (seen in 3.11.7, not in 3.10, 3.12 or 3.13) two
# threads that build syntax trees at once may end in "SystemError: AST constructor recursion depth mismatch"
# (python/cpython#106905: one counter for all threads, and a collection of garbage in the middle lets another in), so
# files are read by one thread at a time: a millisecond or three each, little beside what is done with them.
_one_parser = threading.Lock()


def write_cams(folder: Path, image_id: str, cams: Tensor, class_ids: Tensor) -> Path:
    """Write one image's maps (float16 [k,H,W]) and their region numbers 1..K ([k]); returns the file's path."""
    path = folder / f"{image_id}.npz"
    arrays = {"cams": cams.half().numpy(), "class_ids": class_ids.to(torch.uint8).numpy()}

    def write(partial: Path) -> None:
        with partial.open("wb") as stream:
            np.savez(stream, **arrays)

    write_atomically(path, write)
    return path


def read_cams(folder: Path, image_id: str) -> tuple[Tensor, Tensor]:
    """The maps and region numbers of :func:`write_cams`; an error names the file and what is wrong with it."""
    path = folder / f"{image_id}.npz"
    if not path.is_file():
        raise FileNotFoundError(f"CAMs: expected a file {path}, found none")
    with _one_parser, np.load(path, allow_pickle=False) as arrays:
        missing = {"cams", "class_ids"} - set(arrays.files)
        if missing:
            raise InputError(f"{path}: expected arrays 'cams' and 'class_ids', missing {sorted(missing)}")
        cams, class_ids = torch.from_numpy(arrays["cams"]), torch.from_numpy(arrays["class_ids"])
    if cams.ndim != 3 or not cams.is_floating_point() or tuple(class_ids.shape) != (cams.shape[0],):
        raise InputError(
            f"{path}: expected floating cams [k,H,W] and class_ids [k], got {cams.dtype} {list(cams.shape)} and "
            f"{list(class_ids.shape)}"
        )
    return cams, class_ids


def ids_of(folder: Path) -> Sequence[str]:
    """The images whose CAMs a folder holds, sorted."""
    return sorted(path.stem for path in folder.glob("*.npz"))
