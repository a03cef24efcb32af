"""Matplotlib's figures as inline SVG, coloured by the page's style sheet: the same figure in light and in dark."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from xml.etree import ElementTree

from markupsafe import Markup
from matplotlib import style
from matplotlib.artist import Artist
from matplotlib.figure import Figure

POINTS = 72  # an inch; at as many dots, a unit of the SVG is a point

SERIES = (
    "s0",
    "s1",
    "s2",
    "s3",
    "s4",
    "s5",
)  # of the style sheet's custom properties; more series begin again
COLOURS = (*SERIES, "ink", "soft", "rule", "card")
NOT_IN_XML = re.compile("[\\x00-\\x08\\x0b\\x0c\\x0e-\\x1f\\ud800-\\udfff\\ufffe\\uffff]")  # not even escaped


def colour(name: str) -> str:
    """Return the colour that stands for a custom property of the style sheet until `inline_svg` puts it in place."""
    return f"#0000{COLOURS.index(name) + 1:02x}"


SETTINGS = {
    "figure.dpi": POINTS,
    "figure.frameon": False,
    "figure.constrained_layout.use": True,
    "svg.fonttype": "none",  # text stays text, in the page's font
    "text.parse_math": False,  # a class may be called "$"
    "font.size": 12,
    "axes.axisbelow": True,
    "axes.labelcolor": colour("soft"),
    "grid.color": colour("rule"),
    "grid.linewidth": 1,
    "lines.linewidth": 2,
    "lines.solid_capstyle": "butt",
    "patch.linewidth": 0,
    "xtick.color": colour("soft"),
    "ytick.color": colour("soft"),
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "xtick.major.pad": 8,
    "ytick.major.pad": 8,
}


@contextmanager
def page_style() -> Iterator[None]:
    """Draw figures of the page within this context: whatever the user's matplotlibrc says, they come out the same."""
    with style.context(["default", SETTINGS]), warnings.catch_warnings():
        # matplotlib measures text with a font of its own, the browser shows it with one that has the letters.
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        yield


def named(artist: Artist, kind: str, tooltip: str = "") -> None:
    """Give the group of an artist a class for the style sheet, and a tooltip."""
    artist.set_gid(f"{kind} {tooltip}")


def inline_svg(figure: Figure, description: str) -> Markup:
    """Return the figure as an SVG element for an HTML page. Call it within `page_style`.

    It holds no ids, so that several figures may stand on one page, and no date: the same figure gives the same bytes.
    """
    stream = io.StringIO()
    figure.savefig(stream, format="svg")
    root = ElementTree.fromstring(NOT_IN_XML.sub(" ", stream.getvalue()))
    view_box = root.get("viewBox", "")
    root.attrib.clear()  # without a width of its own, it takes the page's
    root.attrib |= {"viewBox": view_box, "role": "img", "aria-label": NOT_IN_XML.sub(" ", description)}
    _clean(root)
    return Markup(ElementTree.tostring(root, encoding="unicode"))


def _clean(element: ElementTree.Element) -> None:
    """Leave of an element and those in it what an HTML page needs."""
    element.tag = element.tag.rpartition("}")[2]  # HTML knows SVG without its namespace
    attributes = element.attrib
    attributes.pop("clip-path", None)  # only circles reach beyond the axes, and they are shown whole
    if "style" in attributes:
        attributes["style"] = _page_style(attributes["style"])
    for name in {"d", "x", "y", "transform"} & attributes.keys():
        short = re.sub(r"\d+\.\d+", lambda n: f"{float(n[0]):.1f}", attributes[name])
        attributes[name] = " ".join(short.split())
    kind, given, tooltip = attributes.pop("id", "").partition(" ")
    for child in list(element):
        _clean(child)
        # `defs` holds the clip paths, and a style sheet that would rule the whole page.
        if child.tag in ("metadata", "defs") or (child.tag == "g" and not len(child)):
            element.remove(child)
        child.tail = None
    if len(element):
        element.text = None
    if given:
        attributes["class"] = kind
        if tooltip:
            title = ElementTree.Element("title")
            title.text = tooltip
            element.insert(0, title)


def _page_style(declarations: str) -> str:
    """Return the style of an element without its font, in colours of the style sheet."""
    kept = [part.strip() for part in declarations.split(";") if not part.strip().startswith("font")]
    return re.sub(r"#0000([0-9a-f]{2})\b", lambda n: f"var(--{COLOURS[int(n[1], 16) - 1]})", ";".join(kept))
