"""Plots as SVG, drawn here: no script, no picture file, colours from the style sheet."""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup, escape

WIDTH = 640


def bars(values: Sequence[int], labels: Sequence[str], title: str, height: int = 140) -> Markup:
    """A bar for each value, the first and last labels below."""
    most = max([*values, 1])
    step = WIDTH / max(len(values), 1)
    parts = []
    for index, value in enumerate(values):
        tall = value / most * (height - 34)
        parts.append(
            f'<rect class="bar" x="{index * step + 1:.1f}" y="{height - 18 - tall:.1f}" '
            f'width="{max(step - 2, 1):.1f}" height="{tall:.1f}">'
            f"<title>{escape(labels[index])}: {value}</title></rect>"
        )
    parts.append(_text(0, 11, f"{most}", "start"))
    parts.append(f'<line class="axis" x1="0" x2="{WIDTH}" y1="{height - 18}" y2="{height - 18}"/>')
    if labels:
        parts.append(_text(0, height - 4, labels[0], "start"))
        parts.append(_text(WIDTH, height - 4, labels[-1], "end"))
    return _svg(parts, height, f"{title}: {sum(values)} in all, at most {most}")


def shares(rows: Sequence[tuple[str, float, float, float]], title: str, mark: float | None = None) -> Markup:
    """A point with its interval, 0 to 1, for each (name, value, low, high); `mark` is a line to compare."""
    left, line = 190.0, 26
    width = WIDTH - left - 60
    height = line * len(rows) + 22
    parts = []
    for tick in (0.0, 0.5, 1.0):
        x = left + tick * width
        parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="0" y2="{height - 18}"/>')
        parts.append(_text(x, height - 4, f"{tick:g}", "middle"))
    if mark is not None:
        x = left + mark * width
        parts.append(f'<line class="mark" x1="{x:.1f}" x2="{x:.1f}" y1="0" y2="{height - 18}"/>')
    for index, (name, value, low, high) in enumerate(rows):
        y = line * index + 14
        start, end, at = (left + min(max(v, 0.0), 1.0) * width for v in (low, high, value))
        parts.append(_text(left - 10, y + 4, name if len(name) < 25 else name[:24] + "…", "end"))
        parts.append(f'<line class="range" x1="{start:.1f}" x2="{end:.1f}" y1="{y}" y2="{y}"/>')
        parts.append(f'<circle class="point" cx="{at:.1f}" cy="{y}" r="5"/>')
        parts.append(_text(WIDTH, y + 4, f"{value:.2f}", "end"))
    return _svg(parts, height, title)


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _svg(parts: Sequence[str], height: int, label: str) -> Markup:
    body = "".join(parts)
    return Markup(f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(label)}">{body}</svg>')
