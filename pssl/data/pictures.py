"""Reading pictures: any file that Pillow opens as a photograph, upright, as eight bits of red, green and blue."""

from __future__ import annotations

import unicodedata
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from pssl.core.errors import InputError

__all__ = ["find_picture", "is_hidden", "load_image", "open_picture", "pictures_in", "shown_size", "upright"]

ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".jfif", ".ppm", ".mpo")
"""Endings of pictures, the likeliest first; a file with one of them is taken for a picture even if it is damaged."""
ORIENTATION = 0x0112  # EXIF's tag; 5 to 8 are turned by a quarter
SHOWN = ("RGB", "RGBA", "RGBX", "L", "LA", "P", "PA", "1", "CMYK", "YCbCr", "HSV", "La", "RGBa")
"""Modes that Pillow turns into red, green and blue without loss of meaning."""
SYSTEM_FILES = ("thumbs.db", "desktop.ini")
MOST_PIXELS = 400_000_000  # of a picture: 1.2 GB as red, green and blue


def is_hidden(name: str) -> bool:
    """Return whether a file's or folder's name is one that systems leave behind: .DS_Store, ._x, Thumbs.db."""
    return name.startswith(".") or name.lower() in SYSTEM_FILES or name == "__MACOSX"


def pictures_in(root: Path, below: bool = True) -> Iterator[Path]:
    """Yield the pictures of a folder, and `below` it, in the order of their names; what is hidden is passed over.

    A picture is a file with the ending of one, damaged or not, or any other file that Pillow opens.
    """
    for path in sorted(root.iterdir(), key=lambda entry: unicodedata.normalize("NFC", entry.name)):
        if is_hidden(path.name):
            continue
        if path.is_dir():
            if below:
                yield from pictures_in(path)
        elif path.suffix.lower() in ENDINGS or _opens(path):
            yield path


def _opens(path: Path) -> bool:
    try:
        with _open(path):
            return True
    except (OSError, ValueError):
        return False


def find_picture(folder: Path, name: str) -> Path:
    """Return the picture of that name, without its ending, in a folder; `name`.jpg where there is none."""
    wanted = folder / f"{name}.jpg"
    if wanted.is_file() or not folder.is_dir():
        return wanted
    for ending in ENDINGS:
        for form in (ending, ending.upper()):
            if (folder / f"{name}{form}").is_file():
                return folder / f"{name}{form}"
    return wanted


def open_picture(path: Path) -> Image.Image:
    """Open a picture's file, its pixels not read yet. FileNotFoundError, or InputError for a file that is none."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        return _open(path)
    except (OSError, ValueError) as error:
        raise _damaged(path, error) from None


def _open(path: Path) -> Image.Image:
    """Image.open, with a limit of our own on what a file may claim to hold."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        try:
            picture = Image.open(path)
        except Image.DecompressionBombError as error:
            raise InputError(str(error)) from None
    if picture.width * picture.height > MOST_PIXELS:
        picture.close()
        raise InputError(f"{picture.width}x{picture.height} pixels, more than {MOST_PIXELS}")
    return picture


def shown_size(picture: Image.Image) -> tuple[int, int]:
    """Return width and height as the picture is shown: exchanged where its EXIF orientation turns it by a quarter."""
    width, height = picture.size
    return (height, width) if orientation(picture) >= 5 else (width, height)


def orientation(picture: Image.Image) -> int:
    """Return the EXIF orientation, 1 (as stored) where none is given or it is none of 1 to 8."""
    try:
        value = picture.getexif().get(ORIENTATION, 1)
    except Exception:  # damaged EXIF, for which Pillow has many types: the picture itself may be sound
        return 1
    return value if value in range(1, 9) else 1


def upright(picture: Image.Image) -> Image.Image:
    """Return the picture as it is shown, by its EXIF orientation."""
    return picture if orientation(picture) == 1 else ImageOps.exif_transpose(picture)


def load_image(path: Path) -> np.ndarray:
    """Return a picture's pixels as it is shown, uint8 [H,W,3] RGB.

    Grey values of 16 bits are scaled to 0..255. FileNotFoundError where the file is missing; InputError, naming it,
    where it is damaged or of a mode that has no colours to show (32-bit or floating values, Lab).
    """
    with open_picture(path) as picture:
        try:
            shown = upright(picture)
            if shown.mode.startswith("I;16"):
                return _from_16_bits(np.asarray(shown))
            if shown.mode == "I":
                return _from_integers(path, np.asarray(shown))
            if shown.mode not in SHOWN:
                raise InputError(f"{path}: expected a picture with colours or greys, got mode {shown.mode}")
            return np.array(shown.convert("RGB"))  # a copy: callers may write into it
        except InputError:
            raise
        except (
            OSError,
            SyntaxError,
            ValueError,
        ) as error:  # SyntaxError: how Pillow reports broken PNG chunks
            raise _damaged(path, error) from None


def _from_16_bits(values: np.ndarray) -> np.ndarray:  # [H,W]
    grey = ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)
    return np.repeat(grey[..., None], 3, axis=2)


def _from_integers(path: Path, values: np.ndarray) -> np.ndarray:  # int32 [H,W]
    """Mode "I" is how Pillow reads PNGs of 16 bits; what goes beyond is not a picture."""
    if values.size and (values.min() < 0 or values.max() > 65535):
        raise InputError(
            f"{path}: expected greys of at most 16 bits, got values {int(values.min())} to {int(values.max())}"
        )
    return _from_16_bits(values)


def _damaged(path: Path, error: Exception) -> InputError:
    size = path.stat().st_size
    return InputError(
        f"{path}: expected a whole image file, got {size} bytes that cannot be decoded ({error})"
    )
