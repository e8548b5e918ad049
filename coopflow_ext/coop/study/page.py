"""The pieces of an HTML page that needs no other file: pictures, tables, charts, folded parts."""

from __future__ import annotations

import base64
import html
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

PICTURES = {".png": "image/png", ".gif": "image/gif"}

_STYLE = """
:root { color-scheme: light dark; --ground: #fff; --text: #1b1f24; --quiet: #59626d;
  --edge: #d5dae0; --shade: #f4f6f8; --a: #0b62c4; --b: #c2570c; --reference: #59626d; }
@media (prefers-color-scheme: dark) {
  :root { --ground: #14171b; --text: #e4e8ec; --quiet: #9aa5b1; --edge: #363d45; --shade: #1e2329;
    --a: #69aef5; --b: #f2a15c; --reference: #9aa5b1; } }
* { box-sizing: border-box; }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--text); background: var(--ground);
  max-width: 62rem; margin: 0 auto; padding: 1.5rem 1rem 3rem; overflow-wrap: break-word; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0; }
h2 { font-size: 1.25rem; margin: 2.5rem 0 .75rem; }
h3 { font-size: 1rem; margin: 1.5rem 0 .25rem; }
p { margin: .5rem 0; max-width: 44rem; }
.quiet, small, figcaption { color: var(--quiet); }
small, figcaption { font-size: .875rem; }
.lead { font-size: 1.125rem; }
.warning { border-left: 4px solid var(--b); padding: .25rem 0 .25rem .75rem; }
figure { margin: 1rem 0; }
figcaption { margin-top: .35rem; }
img { display: block; max-width: 100%; height: auto; background: #fff; border-radius: 4px; }
img.large { width: 100%; max-width: 44rem; }
.side-by-side { display: grid; gap: 1rem 2rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 23rem), 1fr)); }
.side-by-side figure { margin: .5rem 0; max-width: 30rem; }
.charts h3 { margin-top: 0; }
table { border-collapse: collapse; width: 100%; max-width: 44rem; margin: .75rem 0; }
th, td { border-bottom: 1px solid var(--edge); padding: .4rem .5rem .4rem 0; text-align: left;
  vertical-align: top; font-weight: normal; }
th small { display: block; }
thead th { color: var(--quiet); font-size: .875rem; vertical-align: bottom; }
td, thead th { text-align: right; font-variant-numeric: tabular-nums; }
.ours th, .ours td { font-weight: 600; }
svg { display: block; width: 100%; height: auto; max-width: 32rem; }
svg text { fill: var(--quiet); }
svg .grid { stroke: var(--edge); }
svg .reference { stroke: var(--reference); stroke-width: 1.5; stroke-dasharray: 5 4; }
svg polyline { fill: none; stroke-width: 2; stroke-linejoin: round; }
svg .line-a { stroke: var(--a); } svg .line-b { stroke: var(--b); }
svg circle.line-a { fill: var(--a); } svg circle.line-b { fill: var(--b); }
.key { display: inline-block; margin-right: 1rem; color: var(--text); }
.key::before { content: ""; display: inline-block; width: 1.2em; margin-right: .4em;
  border-top: 3px solid; vertical-align: .25em; }
.key.line-a::before { color: var(--a); } .key.line-b::before { color: var(--b); }
.key.reference::before { color: var(--reference); border-top-style: dashed; }
pre { background: var(--shade); border-radius: 4px; padding: .6rem .75rem; margin: .5rem 0;
  white-space: pre-wrap; font-size: .875rem; }
details { border: 1px solid var(--edge); border-radius: 4px; padding: .5rem .75rem;
  margin: .5rem 0; }
details table { font-size: .875rem; max-width: none; table-layout: fixed; }
summary { cursor: pointer; }
"""


def document(title: str, parts: Iterable[str]) -> str:
    """The whole page; parts that are empty are left out."""
    return (
        "<!doctype html>\n<html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head><body>\n"
        + "\n".join(part for part in parts if part)
        + "\n</body></html>\n"
    )


def heading(title: str, line: str) -> str:
    """The top of the page."""
    return f"<header><h1>{html.escape(title)}</h1><p class='quiet'>{html.escape(line)}</p></header>"


def section(title: str, *content: str) -> str:
    """A heading and what stands below it; nothing where there is nothing."""
    body = "\n".join(part for part in content if part)
    return f"<section><h2>{html.escape(title)}</h2>\n{body}</section>" if body else ""


def paragraph(text: str, style: str = "") -> str:
    """Plain text, or nothing where it is empty."""
    kind = f" class='{style}'" if style else ""
    return f"<p{kind}>{html.escape(text)}</p>" if text else ""


def figure(path: Path, caption: str, style: str = "") -> str:
    """A picture, or nothing where there is no such file; the caption also stands for it where it
    cannot be seen."""
    if not path.exists():
        return ""
    data = base64.b64encode(path.read_bytes()).decode()
    text = html.escape(caption)
    kind = f" class='{style}'" if style else ""
    image = f"<img{kind} alt='{text}' src='data:{PICTURES[path.suffix]};base64,{data}'>"
    return f"<figure>{image}<figcaption>{text}</figcaption></figure>"


def key(style: str, label: str) -> str:
    """What a line of a chart shows."""
    return f"<span class='key {style}'>{html.escape(label)}</span>"


def chart(title: str, note: str, keys: str, svg: str) -> str:
    """A chart below its title and the keys of its lines."""
    return (
        f"<figure><h3>{html.escape(title)}</h3><small>{html.escape(note)}</small>{svg}"
        f"<figcaption>{keys}</figcaption></figure>"
    )


def side_by_side(parts: Iterable[str], style: str = "") -> str:
    """In two columns where the screen is wide enough."""
    content = "".join(parts)
    return f"<div class='side-by-side {style}'>{content}</div>" if content else ""


def table(
    rows: Iterable[tuple[str, str, str]], *, strong: Iterable[int] = (), head: str = ""
) -> str:
    """(name, what to know of it, value) as two columns; the rows ``strong`` stand out."""
    strong = set(strong)
    lines = []
    for i, (name, note, value) in enumerate(rows):
        kind = " class='ours'" if i in strong else ""
        small = f"<small>{html.escape(note)}</small>" if note else ""
        lines.append(
            f"<tr{kind}><th scope='row'>{html.escape(name)}{small}</th>"
            f"<td>{html.escape(value)}</td></tr>"
        )
    caption = f"<thead><tr><th></th><th>{html.escape(head)}</th></tr></thead>" if head else ""
    return f"<table>{caption}<tbody>{''.join(lines)}</tbody></table>" if lines else ""


def columns(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A table of a few columns of short numbers."""
    top = "".join(f"<th scope='col'>{html.escape(cell)}</th>" for cell in head)
    lines = "".join(
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    return f"<table class='columns'><thead><tr>{top}</tr></thead><tbody>{lines}</tbody></table>"


def commands(lines: Iterable[str]) -> str:
    """What to type."""
    return f"<pre>{html.escape(chr(10).join(lines))}</pre>"


def folded(title: str, values: Mapping[str, Any]) -> str:
    """Values by their names in the code, seen on a click; nothing where there are none."""
    rows = [(name, "", text) for name, text in _flat(values)]
    if not rows:
        return ""
    return f"<details><summary>{html.escape(title)}</summary>{table(rows)}</details>"


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, str]]:
    """Of long lists only the length is told."""
    for name, value in values.items():
        if isinstance(value, list) and value and all(isinstance(part, dict) for part in value):
            yield from _flat({str(i): part for i, part in enumerate(value)}, f"{prefix}{name}.")
        elif isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{name}.")
        elif isinstance(value, list) and len(value) > 8:
            yield f"{prefix}{name}", f"{len(value)} values"
        else:
            yield f"{prefix}{name}", f"{value:.6g}" if isinstance(value, float) else str(value)
