"""The pieces of a report's page: tables, heat maps, bars and the line chart, as HTML and inline SVG. All text is escaped here."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import Any

MISSING = "–"


class Raw(str):
    """HTML that is escaped already."""


def text(value: Any) -> str:
    """Escaped, unless it is `Raw`."""
    return value if isinstance(value, Raw) else escape(str(value), quote=True)


def percent(value: float | None, digits: int = 1) -> str:
    return MISSING if value is None else f"{100 * value:.{digits}f}"


def size(count: float | None) -> str:
    """Bytes in a unit that fits, 1 kB = 1000 bytes."""
    if count is None:
        return MISSING
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count:.0f} bytes"


def section(title: str, *parts: str) -> str:
    return f"<section><h2>{text(title)}</h2>{''.join(parts)}</section>"


def note(words: str) -> str:
    return f'<p class="note">{text(words)}</p>'


def scroll(label: str, inner: str) -> str:
    """A container that scrolls by itself, reachable by keyboard."""
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{text(label)}">{inner}</div>'
    )


def table(label: str, head: Sequence[Any], rows: Sequence[Sequence[Any]], words: int = 1) -> str:
    """Columns; the first is the row's header, those from `words` on are numbers, aligned to the right."""

    def cell(tag: str, i: int, value: Any) -> str:
        extra = ' scope="row"' if tag == "th" else ""
        return f"<{tag}{extra}{' class=n' if i >= words else ''}>{text(value)}</{tag}>"

    top = "".join(
        f'<th scope="col"{" class=n" if i >= words else ""}>{text(name)}</th>'
        for i, name in enumerate(head)
    )
    body = "".join(
        f"<tr>{''.join(cell('th' if i == 0 else 'td', i, v) for i, v in enumerate(row))}</tr>"
        for row in rows
    )
    return scroll(label, f"<table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>")


def bar(share: float) -> Raw:
    """A bar of `share` in [0, 1] of its cell; the number stands beside it."""
    return Raw(
        f'<span class="bar" aria-hidden="true"><span style="width:{100 * min(max(share, 0), 1):.1f}%"></span></span>'
    )


def heat_map(
    label: str,
    corner: str,
    columns: Sequence[tuple[str, str]],
    rows: Sequence[tuple[str, Sequence[tuple[float | None, str, str]]]],
) -> str:
    """columns: (short, tooltip). rows: (header, cells); a cell: (value that sets the shade or None, text, tooltip).

    Short rows are filled with empty cells. The shade runs from the lowest value to the highest; every cell has its number.
    """
    values = [value for _, cells in rows for value, _, _ in cells if value is not None]
    low, span = (min(values), max(values) - min(values)) if values else (0.0, 0.0)
    top = "".join(
        f'<th scope="col" title="{text(tip)}">{text(short)}</th>' for short, tip in columns
    )
    body = []
    for header, cells in rows:
        line = [f'<th scope="row" title="{text(header)}">{text(header)}</th>']
        for value, shown, tip in cells:
            shade = (
                ""
                if value is None
                else f' style="--v:{100 * ((value - low) / span if span else 1):.0f}%"'
            )
            line.append(
                f'<td title="{text(tip)}"{" class=none" if value is None else shade}>{text(shown)}</td>'
            )
        body.append(
            f"<tr>{''.join(line)}{'<td class=empty></td>' * (len(columns) - len(cells))}</tr>"
        )
    head = f'<thead><tr><th scope="col">{text(corner)}</th>{top}</tr></thead>'
    return scroll(label, f'<table class="heat">{head}<tbody>{"".join(body)}</tbody></table>')


def line_chart(
    label: str, ticks: Sequence[str], series: Sequence[tuple[str, Sequence[float | None]]]
) -> str:
    """Fractions over tasks. The first line is solid with dots, the second dashed with squares; a gap where a value is None."""
    width = min(
        720, max(290, 64 + 56 * (len(ticks) - 1))
    )  # few tasks fit a phone; many scroll, and stay legible
    height, left, right, top, bottom = 280, 48, 16, 12, 40
    known = [v for _, values in series for v in values if v is not None]
    low = math.floor(10 * min(known)) / 10 if known else 0.0
    low = min(low, 0.9)

    def x(i: int) -> float:
        return left + (width - left - right) * (i / (len(ticks) - 1) if len(ticks) > 1 else 0.5)

    def y(value: float) -> float:
        return top + (height - top - bottom) * (1 - value) / (1 - low)

    step = 0.1 if 1 - low <= 0.5 else 0.2
    levels = [1 - step * k for k in range(int((1 - low) / step + 1e-9) + 1)]
    grid = "".join(
        f'<line class="grid" x1="{left}" x2="{width - right}" y1="{y(v):.1f}" y2="{y(v):.1f}"/>'
        f'<text x="{left - 8}" y="{y(v) + 4:.1f}" text-anchor="end">{100 * v:.0f} %</text>'
        for v in levels
    )
    every = math.ceil(len(ticks) / 20)
    names = "".join(
        f'<text x="{x(i):.1f}" y="{height - 20}" text-anchor="middle">{text(name)}</text>'
        for i, name in enumerate(ticks)
        if i % every == 0
    )
    names += f'<text x="{(left + width - right) / 2}" y="{height - 3}" text-anchor="middle">after task</text>'
    drawn = "".join(
        _line(k, name, values, ticks, x, y)
        for k, (name, values) in reversed(list(enumerate(series)))
    )
    legend = "".join(
        f'<span><svg class="key" width="34" height="12" aria-hidden="true"><line class="s{k}" x1="1" x2="33" y1="6" y2="6"/>'
        f"{_marker(k, 17, 6)}</svg>{text(name)}</span>"
        for k, (name, _) in enumerate(series)
    )
    image = f'<svg class="chart" width="{width}" height="{height}" viewBox="0 0 {width} {height}" role="img" aria-label="{text(label)}">{grid}{names}{drawn}</svg>'
    return f'<p class="legend">{legend}</p>' + scroll(label, image)


def _line(
    k: int, name: str, values: Sequence[float | None], ticks: Sequence[str], x: Any, y: Any
) -> str:
    path, pen, marks = [], "M", []
    for i, value in enumerate(values):
        if value is None:
            pen = "M"
            continue
        path.append(f"{pen}{x(i):.1f} {y(value):.1f}")
        pen = "L"
        tip = f"<title>{text(name)} after task {text(ticks[i])}: {percent(value)} %</title>"
        marks.append(_marker(k, x(i), y(value), tip))
    return f'<path class="s{k}" d="{" ".join(path)}"/>{"".join(marks)}'


def _marker(k: int, x: float, y: float, tip: str = "") -> str:
    if k == 0:
        return f'<circle class="m{k}" cx="{x:.1f}" cy="{y:.1f}" r="4">{tip}</circle>'
    return (
        f'<rect class="m{k}" x="{x - 3.5:.1f}" y="{y - 3.5:.1f}" width="7" height="7">{tip}</rect>'
    )


STYLE = """
:root { color-scheme: light dark; --page: #f6f7f9; --card: #fff; --ink: #16191d; --soft: #59616c; --rule: #d9dde3;
  --cold: #f3f7fc; --hot: #79b0ea; --one: #0b62c4; --two: #a34a00; --track: #e4e9f0; }
@media (prefers-color-scheme: dark) { :root { --page: #111418; --card: #1a1e24; --ink: #e8ebef; --soft: #a3adb9; --rule: #343b45;
  --cold: #1d232b; --hot: #265f9f; --one: #6db3ff; --two: #ffa659; --track: #2a313a; } }
* { box-sizing: border-box; }
body { margin: 0; padding: 1.25rem clamp(.75rem, 3vw, 2rem) 3rem; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; overflow-wrap: anywhere; }
main, header { max-width: 76rem; margin: 0 auto; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: 0 0 .25rem; }
h2 { font-size: 1.1rem; margin: 0 0 .5rem; }
h3 { font-size: .95rem; margin: .75rem 0 .25rem; }
p { margin: 0 0 .6rem; max-width: 70ch; }
.note, .sub { color: var(--soft); } .scroll + .note { margin: .6rem 0 0; } code { white-space: nowrap; font-size: .9em; }
section { background: var(--card); border: 1px solid var(--rule); border-radius: 10px; padding: 1rem; margin-top: 1rem; min-width: 0; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); gap: 0 1rem; }
dl { display: grid; grid-template-columns: repeat(auto-fill, minmax(7.6rem, 1fr)); gap: .75rem; margin: 0; }
dl div { border-left: 3px solid var(--one); padding-left: .6rem; }
dt { color: var(--soft); font-size: .85rem; } dd { margin: 0; font-size: 1.35rem; font-variant-numeric: tabular-nums; }
.scroll { overflow: auto; max-height: 46rem; max-width: 100%; }
.scroll:focus-visible { outline: 2px solid var(--one); outline-offset: 2px; }
table { border-collapse: separate; border-spacing: 0; font-variant-numeric: tabular-nums; font-size: .88rem; overflow-wrap: normal; }
th, td { padding: .25rem .6rem; text-align: left; border-bottom: 1px solid var(--rule); vertical-align: top; }
thead th { position: sticky; top: 0; z-index: 1; background: var(--card); color: var(--soft); font-weight: 600; white-space: nowrap; }
table { width: max-content; } tbody th { font-weight: 500; } tbody th, td { max-width: 11rem; overflow-wrap: break-word; }
.n { text-align: right; white-space: nowrap; }
.heat { border-spacing: 2px; font-size: .82rem; }
.heat th, .heat td { border: 0; padding: .2rem .4rem; text-align: center; white-space: nowrap; }
.heat tbody th { position: sticky; left: 0; background: var(--card); text-align: left; min-width: 0; max-width: 9rem;
  overflow: hidden; text-overflow: ellipsis; }
.heat thead th:first-child { left: 0; z-index: 2; text-align: left; }
.heat td { min-width: 2.9rem; border-radius: 3px; background: color-mix(in oklab, var(--hot) var(--v, 0%), var(--cold)); }
.heat td.none { color: var(--soft); background: none; outline: 1px dashed var(--rule); outline-offset: -1px; }
.heat td.empty { background: none; }
.bar { display: block; width: 8rem; height: .7rem; margin-top: .35rem; background: var(--track); border-radius: 3px; }
.bar span { display: block; height: 100%; background: var(--one); border-radius: 3px; }
.chart { display: block; } .key { flex: none; }
.chart text { fill: var(--soft); font-size: 12px; } .grid { stroke: var(--rule); }
.s0 { stroke: var(--one); stroke-width: 2.5; fill: none; } .s1 { stroke: var(--two); stroke-width: 2; fill: none; stroke-dasharray: 6 4; }
.m0 { fill: var(--one); } .m1 { fill: var(--card); stroke: var(--two); stroke-width: 2; }
.legend { display: flex; flex-wrap: wrap; gap: .25rem 1.25rem; } .legend span { display: inline-flex; align-items: center; gap: .4rem; }
.shots { display: flex; flex-wrap: wrap; gap: 1rem; } figure { margin: 0; max-width: 18rem; } figure img { margin-right: 4px; border-radius: 4px; }
figcaption { font-size: .88rem; }
@media (max-width: 40rem) { tbody th, td { max-width: 7rem; } th, td { padding: .25rem .4rem; } .bar { width: 5rem; } }
@media print { .scroll { max-height: none; overflow: visible; } }
"""
