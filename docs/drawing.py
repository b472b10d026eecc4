"""Boxes, wires and words of a diagram, as SVG.

The colours are those of the page around a diagram, so that it follows light and dark mode, and
have fallbacks for a file that stands alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

STYLE = """
.dd { display: block; width: 100%; max-width: 34rem; height: auto; margin: 1rem auto; \
font-family: inherit; --dd-alone: #1b1b1f; --dd-fg: var(--color-foreground-primary, \
var(--dd-alone)); --dd-brand: var(--color-brand-primary, #4a7bd0); }
@media (prefers-color-scheme: dark) { .dd { --dd-alone: #e8e8ea; } }
.dd text { fill: var(--dd-fg); font-size: 11px; text-anchor: middle; }
.dd .left { text-anchor: start; }
.dd .right { text-anchor: end; }
.dd .name { font-weight: 600; }
.dd a { text-decoration: none; }
.dd a:hover .name, .dd a:focus .name { text-decoration: underline; }
.dd .wire { fill: none; stroke: var(--dd-fg); stroke-width: 1.2; }
.dd .head, .dd .dot { fill: var(--dd-fg); }
.dd .data { fill: none; stroke: var(--dd-fg); }
.dd .trained { fill: var(--dd-brand); fill-opacity: 0.14; stroke: var(--dd-brand); }
.dd .step { fill: none; stroke: var(--dd-fg); stroke-opacity: 0.6; }
.dd .noise { fill: #d98200; fill-opacity: 0.2; stroke: #d98200; }
.dd .frozen { fill: #808690; fill-opacity: 0.16; stroke: #808690; stroke-dasharray: 4 2; }
.dd .frame { fill: none; stroke: var(--dd-fg); stroke-opacity: 0.45; stroke-dasharray: 1 3; }
.dd .noise-wire { stroke: #d98200; }
.dd .noise-head { fill: #d98200; }
"""


def times(*sizes: int | str) -> str:
    """A shape in words, such as ``64 x 8 x 8``."""
    return " × ".join(str(size) for size in sizes)


class Drawing:
    """Boxes, wires and words, in units of about a pixel of a phone."""

    def __init__(self, name: str, height: int, title: str, description: str) -> None:
        self.name, self.height = name, height
        self.head = (
            f'<title id="{name}-title">{escape(title)}</title>\n'
            f'<desc id="{name}-desc">{escape(description)}</desc>'
        )
        self.parts: list[str] = []

    def box(
        self,
        x: float,
        y: float,
        width: float,
        lines: Sequence[str],
        kind: str = "trained",
        *,
        link: str | None = None,
        height: float | None = None,
    ) -> None:
        """A box; its first line is a name, which may link to the API."""
        height = 14 + 15 * len(lines) if height is None else height
        top = y + height / 2 - 7.5 * (len(lines) - 1) + 4
        words = "".join(
            f'<text class="{"" if row else "name"}" x="{x + width / 2:g}" '
            f'y="{top + 15 * row:g}">{escape(line)}</text>'
            for row, line in enumerate(lines)
        )
        shape = (
            f'<rect class="{kind}" x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" '
            f'rx="{12 if kind == "data" else 3}"/>'
        )
        both = shape + words
        self.parts.append(f'<a href="api.html#{link}">{both}</a>' if link else both)

    def wire(self, *points: tuple[float, float], kind: str = "", arrow: bool = True) -> None:
        """A line through points, with an arrow at its end."""
        (x0, y0), (x1, y1) = points[-2:]
        if arrow:
            dx, dy = (x1 > x0) - (x1 < x0), (y1 > y0) - (y1 < y0)
            base = (x1 - 6 * dx, y1 - 6 * dy)
            wings = [(base[0] - 3.5 * dy, base[1] + 3.5 * dx)]
            wings.append((base[0] + 3.5 * dy, base[1] - 3.5 * dx))
            corners = " ".join(f"{x:g},{y:g}" for x, y in [(x1, y1), *wings])
            self.parts.append(
                f'<polygon class="head {kind and kind + "-head"}" points="{corners}"/>'
            )
            points = (*points[:-1], base)
        path = " ".join(f"{x:g},{y:g}" for x, y in points)
        self.parts.append(f'<polyline class="wire {kind and kind + "-wire"}" points="{path}"/>')

    def frame(self, *corners: tuple[float, float]) -> None:
        """A dotted outline around what one class makes."""
        points = " ".join(f"{x:g},{y:g}" for x, y in corners)
        self.parts.append(f'<polygon class="frame" points="{points}"/>')

    def words(
        self, x: float, y: float, text: str, *, side: str = "", link: str | None = None
    ) -> None:
        """One line of text; with a link, the name of a class."""
        line = f'<text class="{side} {"name" if link else ""}" x="{x:g}" y="{y:g}">{text}</text>'
        self.parts.append(f'<a href="api.html#{link}">{line}</a>' if link else line)

    def ring(self, x: float, y: float, sign: str) -> None:
        """A small circle around the sign of an operation."""
        self.parts.append(f'<circle class="wire" cx="{x:g}" cy="{y:g}" r="9"/>')
        self.parts.append(f'<text x="{x:g}" y="{y + 4:g}">{sign}</text>')

    def dot(self, x: float, y: float) -> None:
        """Where wires meet."""
        self.parts.append(f'<circle class="dot" cx="{x:g}" cy="{y:g}" r="3"/>')

    def key(self, x: float, y: float, kind: str, text: str) -> None:
        """One entry of the legend."""
        self.parts.append(f'<rect class="{kind}" x="{x:g}" y="{y:g}" width="14" height="11"/>')
        self.words(x + 20, y + 10, text, side="left")

    def svg(self) -> str:
        """The picture."""
        body = "\n".join(self.parts).replace(' class=""', "").replace(' "', '"')
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" class="dd" viewBox="0 0 360 {self.height}" '
            f'role="img" aria-labelledby="{self.name}-title {self.name}-desc">\n'
            f"{self.head}\n<style>{STYLE}</style>\n{body}\n</svg>\n"
        )
