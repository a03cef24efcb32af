"""Pictures of a report as PNG data URIs."""

from __future__ import annotations

import base64
import io

import numpy as np
from PIL import Image

from pssl.data.palette import colour_labels, label_image

SIDE = 224  # pixels of a picture's longer side, at most: small files, and two screen pixels for each on most screens


def data_uri(picture: Image.Image) -> str:
    """A PNG as `data:image/png;base64,…`."""
    stream = io.BytesIO()
    picture.save(stream, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode("ascii")


def _fitted(picture: Image.Image, method: Image.Resampling) -> Image.Image:
    ratio = min(SIDE / max(picture.size), 1.0)
    size = (max(round(picture.width * ratio), 1), max(round(picture.height * ratio), 1))
    return picture if size == picture.size else picture.resize(size, method)


def photo(image: np.ndarray) -> str:  # uint8 [H,W,3]
    """An image."""
    return data_uri(_fitted(Image.fromarray(image), Image.Resampling.LANCZOS))


def labels(label: np.ndarray) -> str:  # uint8 [H,W], 255: no region
    """A label image in VOC's colours."""
    return data_uri(_fitted(label_image(label), Image.Resampling.NEAREST))


def heat(image: np.ndarray, cams: np.ndarray) -> str:  # uint8 [H,W,3], [k,H,W] in 0..1
    """The largest CAM of each pixel over the darkened image: the stronger, the less of the image shows through."""
    from matplotlib import colormaps

    strength = (
        cams.astype(np.float32).max(0).clip(0, 1) if len(cams) else np.zeros(image.shape[:2], np.float32)
    )
    colours = colormaps["turbo"](strength)[..., :3] * 255
    share = 0.75 * strength[..., None]
    mixed = (1 - share) * 0.8 * image + share * colours
    return photo(mixed.round().astype(np.uint8))


def colour_of(region: int) -> str:
    """VOC's colour of a region for a style sheet."""
    red, green, blue = colour_labels(np.array([[region]], np.uint8))[0, 0].tolist()
    return f"#{red:02x}{green:02x}{blue:02x}"
