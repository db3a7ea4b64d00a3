"""Training logs as a small picture: the loss of answers by kind of row, in SVG."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

Curves = dict[str, list[tuple[float, float]]]  # (hours, loss) by kind of row

WIDTH, HEIGHT, MARGIN = 720, 300, 44
TOP_LOSS = 1.2
SMOOTHING = 0.7  # of each point by those before it
COLOURS = {
    "clip": "#1f77b4",
    "long": "#d62728",
    "mixed": "#2ca02c",
    "stream": "#9467bd",
    "still": "#ff7f0e",
    "varied": "#7f7f7f",
}
DASHES = {"+": ' stroke-dasharray="4 2"', "-": ' stroke-dasharray="1 2"'}


def read_log(logs: Sequence[Path]) -> Curves:
    """Losses over the hours of all runs, one run after the other.

    A trailing + is rows of carriers, a trailing - rows whose media lost tokens.
    """
    curves: Curves = defaultdict(list)
    before = 0.0
    for log in logs:
        last = 0.0
        for line in log.read_text().splitlines():
            row = json.loads(line)
            last = row["seconds"] / 3600
            for name, value in row.items():
                if name.rstrip("+-") in COLOURS:
                    curves[name].append((before + last, float(value)))
        before += last
    return curves


def curves_svg(curves: Curves) -> str:
    longest = max((points[-1][0] for points in curves.values()), default=1.0)

    def place(hours: float, loss: float) -> str:
        x = MARGIN + (WIDTH - 2 * MARGIN) * hours / longest
        y = HEIGHT - MARGIN - (HEIGHT - 2 * MARGIN) * min(loss, TOP_LOSS) / TOP_LOSS
        return f"{x:.1f},{y:.1f}"

    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}"'
        ' font-family="sans-serif" font-size="11">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
    ]
    for loss in (0.0, 0.4, 0.8, 1.2):
        x, y = place(0, loss).split(",")
        lines.append(f'<path d="M{x},{y}H{WIDTH - MARGIN}" stroke="#ddd"/>')
        lines.append(f'<text x="{float(x) - 6}" y="{float(y) + 4}" text-anchor="end">{loss}</text>')
    for number, (name, points) in enumerate(sorted(curves.items())):
        smooth, drawn = points[0][1], []
        for hours, loss in points:
            smooth = SMOOTHING * smooth + (1 - SMOOTHING) * loss
            drawn.append(place(hours, smooth))
        colour, dashes = COLOURS[name.rstrip("+-")], DASHES.get(name[-1], "")
        lines.append(
            f'<polyline points="{" ".join(drawn)}" fill="none" stroke="{colour}" stroke-width="1.5"{dashes}/>'
        )
        label = name.replace("+", " (carriers)").replace("-", " (reduced)")
        left = MARGIN + 8 + 110 * (number % 6)
        lines.append(f'<text x="{left}" y="{14 + 14 * (number // 6)}" fill="{colour}">{label}</text>')
    total = f"{longest:.1f} hours of one core"
    lines.append(f'<text x="{WIDTH - MARGIN}" y="{HEIGHT - 14}" text-anchor="end">{total}</text>')
    return "\n".join([*lines, "</svg>\n"])
