"""A report as one HTML file that needs nothing else: no server, no network, no other file.

Pictures are there twice: as SVG, for printing and where scripts are off, and as Vega-Lite
specifications that the Vega inside the page draws over them, with tooltips.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files

import vl_convert

from coldmerge.report.charts import Spec

POLICY = (
    "default-src 'none'; script-src 'unsafe-inline' 'unsafe-eval'; "
    "style-src 'unsafe-inline'; img-src data:"
)


@dataclass(frozen=True)
class Figure:
    """A picture with a heading above and a sentence below."""

    title: str
    caption: str
    spec: Spec


@dataclass(frozen=True)
class Table:
    """Rows of text under a heading.

    Cells of `numeric` columns stand to the right; those of `prose` columns have lines that break.
    """

    title: str
    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    numeric: frozenset[int] = frozenset()
    prose: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Code:
    """Lines to type, under a heading."""

    title: str
    caption: str
    lines: Sequence[str]


@dataclass(frozen=True)
class Page:
    """A report: a headline, some large numbers, then sections in order."""

    title: str
    lead: str
    numbers: Sequence[tuple[str, str]]
    sections: Sequence[Figure | Table | Code]
    footer: str = ""


def render(page: Page) -> str:
    """The whole HTML file. The same page always gives the same text."""
    specs: list[Spec] = []
    sections = []
    for section in page.sections:
        if isinstance(section, Figure):
            body = _picture(section, len(specs))
            specs.append(section.spec)
        else:
            body = _table(section) if isinstance(section, Table) else _code(section)
        caption = f"<p class='caption'>{escape(section.caption)}</p>" if section.caption else ""
        sections.append(f"<section><h2>{escape(section.title)}</h2>{body}{caption}</section>")
    numbers = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>"
        for name, value in page.numbers
    )
    return "\n".join(
        [
            "<!DOCTYPE html>",
            '<html lang="en">',
            "<head>",
            '<meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{escape(page.title)}</title>",
            f"<style>{files(__package__).joinpath('page.css').read_text('utf-8')}</style>",
            "</head>",
            "<body><main>",
            f"<header><h1>{escape(page.title)}</h1><p>{escape(page.lead)}</p></header>",
            f"<dl class='numbers'>{numbers}</dl>",
            *sections,
            f"<footer>{escape(page.footer)}</footer>",
            "</main>",
            _scripts(specs),
            "</body></html>\n",
        ]
    )


def _picture(figure: Figure, place: int) -> str:
    svg = vl_convert.vegalite_to_svg(figure.spec)
    return f"<div class='picture' id='picture-{place}'>{svg}</div>"


def _table(table: Table) -> str:
    def cells(tag: str, values: Sequence[str]) -> str:
        return "".join(
            f"<{tag}{_kind(table, place)}>{escape(value)}</{tag}>"
            for place, value in enumerate(values)
        )

    body = "".join(f"<tr>{cells('td', row)}</tr>" for row in table.rows)
    head = cells("th", table.columns)
    return (
        f"<div class='scroll'><table><thead><tr>{head}</tr></thead>"
        f"<tbody>{body}</tbody></table></div>"
    )


def _kind(table: Table, place: int) -> str:
    if place in table.numeric:
        return " class=number"
    return " class=prose" if place in table.prose else ""


def _code(code: Code) -> str:
    return f"<pre>{escape(chr(10).join(code.lines))}</pre>"


def _scripts(specs: Sequence[Spec]) -> str:
    if not specs:
        return ""
    given = json.dumps(list(specs), sort_keys=True)
    draw = (
        f"const specs = {given};\n"
        "specs.forEach((spec, place) => vegaEmbed(`#picture-${place}`, spec, "
        "{actions: false, renderer: 'svg'}));"
    )
    bundle = vl_convert.javascript_bundle(draw).replace("</script", "<\\/script")
    return f'<script type="module">{bundle}</script>'
