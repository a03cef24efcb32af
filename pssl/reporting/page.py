"""The page of a report: one HTML text with its style, nothing fetched, no script."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

STYLE = """
:root { color-scheme: light dark; --page:#f7f7f5; --card:#fff; --ink:#1d1f23; --soft:#5d636d; --rule:#e2e2de;
  --s0:#2563c9; --s1:#c8610a; --s2:#1f8a5b; --s3:#7a4bc2; --s4:#b83a72; --s5:#6b7280; --good:#1f8a5b; --bad:#b83a3a; }
@media (prefers-color-scheme: dark) { :root { --page:#15171a; --card:#1d2024; --ink:#e7e8ea; --soft:#9aa1ac;
  --rule:#32363d; --s0:#74a9ff; --s1:#f2a25c; --s2:#62c79a; --s3:#b99bf5; --s4:#f08ab5; --s5:#a3abb8; --good:#62c79a;
  --bad:#f08a8a; } }
* { box-sizing:border-box; }
body { margin:0; background:var(--page); color:var(--ink);
  font:15px/1.5 system-ui,-apple-system,"Segoe UI",sans-serif; }
main { max-width:1180px; margin:0 auto; padding:32px 20px 64px; }
h1 { font-size:26px; margin:0 0 4px; letter-spacing:-.01em; } h2 { font-size:18px; margin:40px 0 4px; }
h3 { font-size:14px; margin:0 0 8px; font-weight:600; } p { margin:4px 0 14px; color:var(--soft); max-width:75ch; }
nav { display:flex; flex-wrap:wrap; gap:4px 16px; margin:14px 0 0; } a { color:var(--s0); text-decoration:none; }
a:hover { text-decoration:underline; }
.tiles { display:grid; grid-template-columns:repeat(auto-fit,minmax(190px,1fr)); gap:12px; margin:22px 0 0; }
.tile,.card { background:var(--card); border:1px solid var(--rule); border-radius:10px; padding:14px 16px; }
.tile b { display:block; font-size:28px; line-height:1.2; font-variant-numeric:tabular-nums; }
.tile span { color:var(--soft); }
.grid2 { display:grid; grid-template-columns:repeat(auto-fit,minmax(min(440px,100%),1fr)); gap:14px; }
.scroll { overflow-x:auto; }
table { border-collapse:collapse; width:100%; font-variant-numeric:tabular-nums; }
th,td { padding:6px 10px; text-align:right; border-bottom:1px solid var(--rule); white-space:nowrap; }
th { color:var(--soft); font-weight:600; font-size:13px; } tr:last-child td { border-bottom:0; }
.text { text-align:left; } td.best { font-weight:700; color:var(--good); }
figure { margin:0; } .narrow { max-width:820px; } .chart svg { width:100%; height:auto; display:block; }
svg text { fill:var(--soft); font-size:12px; } svg .name { fill:var(--ink); } svg .value { font-size:10px; }
.grid { stroke:var(--rule); stroke-width:1; } .line { fill:none; stroke-width:2; stroke-linejoin:round; }
.faint { opacity:.25; stroke-width:1; }
.mark { fill:var(--card); stroke:var(--ink); stroke-width:2; }
.line.s0{stroke:var(--s0)}.line.s1{stroke:var(--s1)}.line.s2{stroke:var(--s2)}.line.s3{stroke:var(--s3)}
.line.s4{stroke:var(--s4)}.line.s5{stroke:var(--s5)}.bar.s0{fill:var(--s0)}.bar.s1{fill:var(--s1)}.bar.s2{fill:var(--s2)}
.bar.s3{fill:var(--s3)}.bar.s4{fill:var(--s4)}.bar.s5{fill:var(--s5)}
.k0{background:var(--s0)}.k1{background:var(--s1)}.k2{background:var(--s2)}.k3{background:var(--s3)}.k4{background:var(--s4)}
.k5{background:var(--s5)}
.legend { list-style:none; display:flex; flex-wrap:wrap; gap:4px 16px; margin:8px 0 0; padding:0; font-size:13px; }
.key { display:inline-block; width:11px; height:11px; border-radius:3px; margin-right:6px;
  border:1px solid var(--rule); }
.panels { display:grid; gap:14px; } .panel { overflow-x:auto; }
.row { display:grid; grid-template-columns:repeat(var(--n),minmax(104px,1fr)); gap:8px;
  min-width:calc(var(--n)*112px); }
.row img { width:100%; display:block; border-radius:6px; background:var(--rule); image-rendering:auto; }
.row img.pixels { image-rendering:pixelated; } figcaption { color:var(--soft); font-size:12px; margin-top:3px; }
.panel h3 small { color:var(--soft); font-weight:400; }
pre { overflow:auto; margin:10px 0 0; font-size:12.5px; line-height:1.45; max-height:520px; }
summary { cursor:pointer; font-weight:600; } footer { color:var(--soft); font-size:13px; margin-top:40px; }
"""


def page(
    title: str, subtitle: str, sections: Sequence[tuple[str, str, str]], tiles: str, closing: str
) -> str:
    """The whole page; a section is (anchor, heading, HTML), left out where its HTML is empty."""
    sections = [section for section in sections if section[2]]
    links = "".join(f'<a href="#{anchor}">{escape(heading)}</a>' for anchor, heading, _ in sections)
    body = "".join(
        f'<section id="{anchor}"><h2>{escape(heading)}</h2>{html}</section>'
        for anchor, heading, html in sections
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        '<link rel="icon" href="data:,">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body><main>"
        f"<header><h1>{escape(title)}</h1><p>{escape(subtitle)}</p><nav>{links}</nav></header>"
        f'<div class="tiles">{tiles}</div>{body}<footer>{escape(closing)}</footer></main></body></html>'
    )


def tile(value: str, text: str) -> str:
    """A figure with what it is."""
    return f'<div class="tile"><b>{escape(value)}</b><span>{escape(text)}</span></div>'


def card(title: str, html: str) -> str:
    """A box with a heading; empty where there is nothing in it."""
    return f'<div class="card"><h3>{escape(title)}</h3>{html}</div>' if html else ""


def note(text: str) -> str:
    """A paragraph of explanation."""
    return f"<p>{escape(text)}</p>"


def table(head: Sequence[str], rows: Sequence[Sequence[str]], best: Sequence[int] = ()) -> str:
    """A table; in the columns `best` the highest number stands out. Columns without numbers are set as text."""
    words = [not any(_number(row[column]) is not None for row in rows) for column in range(len(head))]
    highest = {}
    for column in best:
        values = [number for row in rows if (number := _number(row[column])) is not None]
        highest[column] = max(values) if len(values) > 1 else None
    lines = []
    for row in rows:
        cells = []
        for column, cell in enumerate(row):
            best_one = highest.get(column) is not None and _number(cell) == highest[column]
            kind = ' class="best"' if best_one else ' class="text"' if words[column] else ""
            cells.append(f"<td{kind}>{escape(cell)}</td>")
        lines.append(f"<tr>{''.join(cells)}</tr>")
    heads = "".join(
        f'<th scope="col"{" class=text" if text else ""}>{escape(name)}</th>'
        for name, text in zip(head, words, strict=True)
    )
    body = f"<thead><tr>{heads}</tr></thead><tbody>{''.join(lines)}</tbody>"
    return f'<div class="card scroll"><table>{body}</table></div>'


def _number(cell: str) -> float | None:
    """The number that a cell begins with."""
    try:
        return float(cell.split()[0])
    except (ValueError, IndexError):
        return None


def panel(title: str, note_text: str, pictures: Sequence[tuple[str, str, bool]], columns: int) -> str:
    """A row of pictures: (caption, data URI, whether its pixels are to stay sharp)."""
    figures = "".join(
        f'<figure><img src="{uri}" alt="{escape(caption)} of {escape(title)}"{" class=pixels" if sharp else ""}>'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
        for caption, uri, sharp in pictures
    )
    return (
        f'<div class="card panel"><h3>{escape(title)} <small>{escape(note_text)}</small></h3>'
        f'<div class="row" style="--n:{columns}">{figures}</div></div>'
    )


def legend(items: Sequence[tuple[str, str]]) -> str:
    """Names with their colours."""
    keys = "".join(
        f'<li><span class="key" style="background:{colour}"></span>{escape(name)}</li>'
        for name, colour in items
    )
    return f'<ul class="legend">{keys}</ul>'
