"""Draw the diagrams of the guides, .github/assets/{method,bank,index}.svg, readable on a light and a dark page.

python tests/makers/diagram.py
"""

from pathlib import Path
from typing import NamedTuple

ASSETS = Path(__file__).parents[2] / ".github" / "assets"
FROZEN, TRAINED, NEUTRAL = "#dbe7f3", "#fde3c8", "#eeeeee"


class Diagram(NamedTuple):
    """A drawing of boxes and arrows, in pixels."""

    width: int
    height: int
    boxes: list[tuple[int, int, int, int, str, list[str]]]
    """Left, top, width, height, color, and the lines of each box."""
    arrows: list[tuple[int, ...]]
    """The corners of each arrow: x, y, x, y, …"""


DIAGRAMS = {
    "method": Diagram(
        810,
        230,
        boxes=[
            (10, 85, 90, 60, NEUTRAL, ["images"]),
            (130, 75, 150, 80, FROZEN, ["encoder", "frozen,", "once a step"]),
            (330, 20, 150, 70, FROZEN, ["teacher's blocks", "frozen"]),
            (330, 140, 150, 70, TRAINED, ["student's blocks", "trained"]),
            (520, 30, 110, 50, NEUTRAL, ["norm_mean", "→ target"]),
            (520, 150, 110, 50, NEUTRAL, ["norm_mean", "→ prediction"]),
            (680, 80, 120, 70, NEUTRAL, ["mean", "squared error"]),
        ],
        arrows=[
            (100, 115, 130, 115),
            (280, 115, 305, 115, 305, 55, 330, 55),
            (280, 115, 305, 115, 305, 175, 330, 175),
            (480, 55, 520, 55),
            (480, 175, 520, 175),
            (630, 55, 655, 55, 655, 105, 680, 105),
            (630, 175, 655, 175, 655, 125, 680, 125),
        ],
    ),
    "bank": Diagram(
        810,
        190,
        boxes=[
            (10, 15, 140, 60, NEUTRAL, ["query", "a test image"]),
            (10, 115, 140, 60, NEUTRAL, ["bank", "the train images"]),
            (180, 65, 130, 60, FROZEN, ["model", "embeds both"]),
            (340, 65, 190, 60, NEUTRAL, ["top-k", "k nearest in the bank"]),
            (560, 65, 240, 60, NEUTRAL, ["right", "if any has the query's class"]),
        ],
        arrows=[
            (150, 45, 245, 45, 245, 65),
            (150, 145, 245, 145, 245, 125),
            (310, 95, 340, 95),
            (530, 95, 560, 95),
        ],
    ),
    "index": Diagram(
        810,
        190,
        boxes=[
            (10, 15, 120, 60, NEUTRAL, ["collection", "once"]),
            (10, 115, 120, 60, NEUTRAL, ["query", "each time"]),
            (170, 15, 130, 60, FROZEN, ["teacher", "large"]),
            (170, 115, 130, 60, TRAINED, ["student", "small"]),
            (340, 115, 220, 60, TRAINED, ["matrix", "fitted without labels"]),
            (610, 15, 190, 60, NEUTRAL, ["old index", "stays as it is"]),
            (610, 115, 190, 60, NEUTRAL, ["search", "by cosine"]),
        ],
        arrows=[
            (130, 45, 170, 45),
            (130, 145, 170, 145),
            (300, 45, 610, 45),
            (300, 145, 340, 145),
            (560, 145, 610, 145),
            (705, 75, 705, 115),
        ],
    ),
}
PAGE = """<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif"
font-size="15">
<defs><marker id="head" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="8" markerHeight="8" orient="auto"><path
d="M0,0 L8,4 L0,8 z" fill="#444"/></marker></defs>
<rect width="{width}" height="{height}" rx="8" fill="white"/>
{shapes}
</svg>
"""


def box(left: int, top: int, width: int, height: int, color: str, lines: list[str]) -> str:
    """Return a box with centered lines of text; the first names it."""
    texts = [f'<rect x="{left}" y="{top}" width="{width}" height="{height}" rx="6" fill="{color}" stroke="#888"/>']
    first = top + height / 2 + 5 - 9 * (len(lines) - 1)
    for number, line in enumerate(lines):
        weight = "normal" if number else "bold"
        place = f'x="{left + width / 2}" y="{first + 18 * number}" text-anchor="middle"'
        texts.append(f'<text {place} font-weight="{weight}" fill="#222">{line}</text>')
    return "\n".join(texts)


def arrow(*corners: int) -> str:
    """Return a line through the corners with a head at its end."""
    points = " ".join(map(str, corners))
    return f'<polyline points="{points}" fill="none" stroke="#444" stroke-width="1.5" marker-end="url(#head)"/>'


if __name__ == "__main__":
    for name, (width, height, boxes, arrows) in DIAGRAMS.items():
        shapes = [*(arrow(*corners) for corners in arrows), *(box(*about) for about in boxes)]
        page = PAGE.format(width=width, height=height, shapes="\n".join(shapes))
        (ASSETS / f"{name}.svg").write_text(page)
