"""The page of a report: one HTML text with its style, nothing fetched, no script."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from jinja2 import Environment, PackageLoader, StrictUndefined

from pssl.reporting.sections import Tile

TEMPLATE = "page.html.jinja"


def render(
    title: str, subtitle: str, tiles: Sequence[Tile], sections: Mapping[str, object], closing: str
) -> str:
    """Return the page. `sections` are the data of the template's sections by anchor; what is empty is left out.

    The template escapes every text; only drawings, which are `markupsafe.Markup`, come in as they are.
    """
    environment = Environment(
        loader=PackageLoader("pssl.reporting", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(TEMPLATE).render(
        title=title, subtitle=subtitle, tiles=tiles, sections=sections, closing=closing
    )
