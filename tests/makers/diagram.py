"""Draw the diagram of the method guide, .github/assets/method.svg, readable on a light and on a dark page.

python tests/makers/diagram.py
"""

from pathlib import Path

PICTURE = Path(__file__).parents[2] / ".github" / "assets" / "method.svg"
FROZEN, TRAINED, NEUTRAL = "#dbe7f3", "#fde3c8", "#eeeeee"
# Left, top, width, height, color, and the lines of a box.
BOXES = [
    (10, 85, 90, 60, NEUTRAL, ["images"]),
    (130, 75, 150, 80, FROZEN, ["encoder", "frozen,", "once a step"]),
    (330, 20, 150, 70, FROZEN, ["teacher's blocks", "frozen"]),
    (330, 140, 150, 70, TRAINED, ["student's blocks", "trained"]),
    (520, 30, 110, 50, NEUTRAL, ["norm_mean", "→ target"]),
    (520, 150, 110, 50, NEUTRAL, ["norm_mean", "→ prediction"]),
    (680, 80, 120, 70, NEUTRAL, ["mean", "squared error"]),
]
# The corners of an arrow: x, y, x, y, …
ARROWS = [
    (100, 115, 130, 115),
    (280, 115, 305, 115, 305, 55, 330, 55),
    (280, 115, 305, 115, 305, 175, 330, 175),
    (480, 55, 520, 55),
    (480, 175, 520, 175),
    (630, 55, 655, 55, 655, 105, 680, 105),
    (630, 175, 655, 175, 655, 125, 680, 125),
]
PAGE = """<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 810 230" font-family="sans-serif" font-size="15">
<defs><marker id="head" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="8" markerHeight="8" orient="auto"><path
d="M0,0 L8,4 L0,8 z" fill="#444"/></marker></defs>
<rect width="810" height="230" rx="8" fill="white"/>
{}
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
    shapes = [*(arrow(*corners) for corners in ARROWS), *(box(*about) for about in BOXES)]
    PICTURE.write_text(PAGE.format("\n".join(shapes)))
