"""Line plots as inline SVG, drawn with the page's own colours so that they follow light and dark.

Matplotlib's SVG would carry its own colours and 30 KiB of glyphs per plot; a report needs axes, lines and
a legend.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from html import escape

WIDTH, HEIGHT = 560, 290
LEFT, RIGHT, TOP, BOTTOM = 58, 14, 12, 44
DASHES = ("none", "8 5", "2 4", "10 4 2 4", "14 4", "5 3")  # a second sign beside the colour
Point = Sequence[float]


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers that cover `[low, high]`, about `about` of them."""
    if not high > low:
        low, high = (low - abs(low) / 2, high + abs(high) / 2) if low else (0.0, 1.0)
    raw = (high - low) / about
    magnitude = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * magnitude for factor in (1, 2, 2.5, 5, 10) if factor * magnitude >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(number * step, 12) for number in range(first, last + 1)]


def tick_label(value: float) -> str:
    """`20k`, `1.5M`, `0.25`."""
    for size, suffix in ((1e9, "B"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            return f"{value / (1e3 if suffix == 'k' else size):g}{suffix}"
    return f"{value:g}"


def thin(points: Sequence[Point], buckets: int = 300) -> list[Point]:
    """At most two points (lowest and highest) of each bucket of neighbours, so that no peak is lost."""
    if len(points) <= 2 * buckets:
        return list(points)
    kept = []
    for number in range(buckets):
        part = points[number * len(points) // buckets : (number + 1) * len(points) // buckets]
        ends = {
            min(range(len(part)), key=lambda i: part[i][1]),
            max(range(len(part)), key=lambda i: part[i][1]),
        }
        kept += [part[i] for i in sorted(ends)]
    return kept


def plot(
    title: str, curves: Mapping[str, Sequence[Point]], x: str, y: str, lines: Mapping[str, float]
) -> str:
    """One figure with axes, curves, levels and a legend.

    Args:
        title: Shown above and told to screen readers.
        curves: Finite points `(x, y)` by name; drawn in order of x.
        x: Name of the horizontal axis.
        y: Name of the vertical axis.
        lines: Horizontal levels by label.

    Returns:
        An HTML `figure`; a sentence instead of a plot when there is no point at all.
    """
    series = {name: sorted(points, key=lambda point: point[0]) for name, points in curves.items()}
    everything = [point for points in series.values() for point in points]
    head = f"<figure><h3>{escape(title)}</h3>"
    if not everything:
        return f'{head}<p class="soft">No points were logged.</p></figure>'
    picture = drawing(title, series, x, y, lines)
    return f'{head}<div class="scroll">{picture}</div>{legend(series, lines)}</figure>'


def drawing(
    title: str, series: Mapping[str, Sequence[Point]], x: str, y: str, lines: Mapping[str, float]
) -> str:
    everything = [point for points in series.values() for point in points]
    across = [point[0] for point in everything]
    upward = [point[1] for point in everything] + list(lines.values())
    columns, rows = ticks(min(across), max(across)), ticks(min(upward), max(upward))
    first, last = (min(across), max(across)) if max(across) > min(across) else (columns[0], columns[-1])

    def at_x(value: float) -> float:
        return LEFT + (value - first) / (last - first) * (WIDTH - LEFT - RIGHT)

    def at_y(value: float) -> float:
        return HEIGHT - BOTTOM - (value - rows[0]) / (rows[-1] - rows[0]) * (HEIGHT - TOP - BOTTOM)

    def words(x: float, y: float, text: str, anchor: str = "middle") -> str:
        return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'

    floor, end, middle = HEIGHT - BOTTOM, WIDTH - RIGHT, (TOP + HEIGHT - BOTTOM) / 2

    def marks() -> Iterator[str]:
        for tick in rows:
            yield f'<path class="grid" d="M{LEFT} {at_y(tick):.1f}H{end}"/>'
            yield words(LEFT - 8, at_y(tick) + 4, tick_label(tick), "end")
        for tick in columns:
            if first <= tick <= last:
                yield words(at_x(tick), floor + 18, tick_label(tick))
        yield f'<path class="axis" d="M{LEFT} {floor}H{end}"/>'
        yield words((LEFT + end) / 2, HEIGHT - 6, x)
        yield f'<text transform="translate(13 {middle}) rotate(-90)" text-anchor="middle">{escape(y)}</text>'
        for level in lines.values():
            yield f'<path class="level" d="M{LEFT} {at_y(level):.1f}H{end}"/>'
        for number, (name, points) in enumerate(series.items()):
            shown = thin(points)
            path = " ".join(f"{at_x(a):.1f},{at_y(b):.1f}" for a, b in shown)
            dash = DASHES[number % len(DASHES)]
            yield f'<polyline class="curve s{number % 6}" stroke-dasharray="{dash}" points="{path}"/>'
            if len(shown) <= 40:  # few enough to be measured values, each told on hovering
                for a, b in shown:
                    yield (
                        f'<circle class="dot s{number % 6}" cx="{at_x(a):.1f}" cy="{at_y(b):.1f}" r="3">'
                        f"<title>{escape(name)}: {b:.4g} at {a:g}</title></circle>"
                    )

    last_values = [f"{name} ends at {points[-1][1]:.4g}" for name, points in series.items() if points]
    described = escape(f"{title}: {'; '.join(last_values)}")
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{described}">{"".join(marks())}</svg>'


def legend(series: Mapping[str, Sequence[Point]], lines: Mapping[str, float]) -> str:
    def entry(path: str, words: str) -> str:
        return f'<li><svg viewBox="0 0 30 10" aria-hidden="true">{path}</svg>{escape(words)}</li>'

    curves = [
        entry(
            f'<path class="curve s{i % 6}" stroke-dasharray="{DASHES[i % len(DASHES)]}" d="M1 5H29"/>', name
        )
        for i, name in enumerate(series)
    ]
    levels = [
        entry('<path class="level" d="M1 5H29"/>', f"{name} ({value:.3g})") for name, value in lines.items()
    ]
    return f'<ul class="legend">{"".join(curves + levels)}</ul>'
