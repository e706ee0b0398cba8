"""Seeded drawings: glyphs for pre-training, and the images of the demo tasks `shapes` and `count`.

Images are drawn at four times their size and reduced, which gives smooth edges. Each function takes a
`numpy.random.Generator` and returns a PIL image. The same seed gives the same image.
"""

import math
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

SIDE_PX = 32
_OVERSAMPLE = 4
SHAPES = ("circle", "cross", "diamond", "square", "star", "triangle")
COUNTS = tuple(str(n) for n in range(1, 9))

Point = tuple[float, float]
Floats = npt.NDArray[np.float64]


def shape_image(rng: np.random.Generator, shape: str) -> Image.Image:
    """Draw one of `SHAPES`, filled or outlined, at a random position, size, angle and pair of colours.

    Raises:
        ValueError: `shape` is not one of `SHAPES`.
    """
    image, draw, ink = _canvas(rng)
    radius = rng.uniform(0.22, 0.42)
    centre = rng.uniform(radius, 1 - radius, size=2)
    # At most 15 degrees of rotation, otherwise a square could become a diamond (45 degrees).
    angle = rng.uniform(-math.pi / 12, math.pi / 12)
    outline = _scaled((x, y) for x, y in _outline(shape, radius, angle, centre))
    if rng.random() < 0.5:
        draw.polygon(outline, fill=ink)
    else:
        draw.line([*outline, outline[0], outline[1]], fill=ink, width=int(rng.integers(7, 12)), joint="curve")
    return _finish(image, rng)


def count_image(rng: np.random.Generator, count: int) -> Image.Image:
    """Draw `count` dots of random sizes and one colour, without contact.

    Raises:
        ValueError: `count` is not between 1 and 8.
    """
    if not 1 <= count <= 8:
        raise ValueError(f"count must be between 1 and 8, got {count}")
    image, draw, ink = _canvas(rng)
    dots: list[tuple[float, float, float]] = []
    while len(dots) < count:
        radius = rng.uniform(0.045, 0.085)
        x, y = rng.uniform(radius + 0.02, 0.98 - radius, size=2)
        if all(math.hypot(x - u, y - v) > radius + other + 0.05 for u, v, other in dots):
            dots.append((x, y, radius))
    side = SIDE_PX * _OVERSAMPLE
    for x, y, radius in dots:
        draw.ellipse([(x - radius) * side, (y - radius) * side, (x + radius) * side, (y + radius) * side], fill=ink)
    return _finish(image, rng)


def glyph_strokes(rng: np.random.Generator) -> list[Floats]:
    """Return a random character: 2 to 4 quadratic Bezier strokes, each (3, 2) control points in [0, 1]."""
    strokes = []
    start = rng.uniform(0.15, 0.85, size=2)
    for _ in range(int(rng.integers(2, 5))):
        middle, end = rng.uniform(0.05, 0.95, size=(2, 2))
        strokes.append(np.stack([start, middle, end]))
        # As in handwriting, most strokes start at the end of the previous one.
        start = end if rng.random() < 0.7 else rng.uniform(0.15, 0.85, size=2)
    return strokes


def glyph_image(rng: np.random.Generator, strokes: list[Floats]) -> Image.Image:
    """Draw a glyph in white on black, with noise on its control points and a random pen width."""
    image = Image.new("L", (SIDE_PX * _OVERSAMPLE,) * 2, 0)
    draw = ImageDraw.Draw(image)
    width = int(rng.integers(6, 16))
    t = np.linspace(0, 1, 16)[:, None]
    for stroke in strokes:
        p0, p1, p2 = stroke + rng.normal(0, 0.035, size=(3, 2))
        curve = (1 - t) ** 2 * p0 + 2 * t * (1 - t) * p1 + t**2 * p2
        draw.line(_scaled((x, y) for x, y in curve), fill=255, width=width, joint="curve")
    return image.resize((SIDE_PX, SIDE_PX), Image.Resampling.BOX)


def _outline(shape: str, radius: float, angle: float, centre: Floats) -> list[Point]:
    if shape not in SHAPES:
        raise ValueError(f"shape must be one of {', '.join(SHAPES)}, got {shape!r}")
    if shape == "circle":
        polar = [(radius, 2 * math.pi * i / 48) for i in range(48)]
    elif shape == "star":
        polar = [(radius if i % 2 == 0 else radius * 0.42, math.pi * i / 5 - math.pi / 2) for i in range(10)]
    elif shape == "cross":
        arm, spread = radius, 0.32
        polar = [(arm, math.pi * i / 2 + side * spread) for i in range(4) for side in (-1, 1)]
        corner = arm * math.sin(spread) * math.sqrt(2)
        for i in range(4):
            polar.insert(3 * i + 2, (corner, math.pi * i / 2 + math.pi / 4))
    else:
        corners, start = {"triangle": (3, -math.pi / 2), "square": (4, math.pi / 4), "diamond": (4, 0.0)}[shape]
        polar = [(radius, start + 2 * math.pi * i / corners) for i in range(corners)]
    return [(centre[0] + r * math.cos(a + angle), centre[1] + r * math.sin(a + angle)) for r, a in polar]


def _canvas(rng: np.random.Generator) -> tuple[Image.Image, ImageDraw.ImageDraw, tuple[int, ...]]:
    """Return a canvas and an ink colour. Their brightness differs by at least 90 of 255."""
    while True:
        paper, ink = rng.integers(0, 256, size=(2, 3))
        if abs(float(paper.mean()) - float(ink.mean())) >= 90:
            break
    image = Image.new("RGB", (SIDE_PX * _OVERSAMPLE,) * 2, tuple(int(v) for v in paper))
    return image, ImageDraw.Draw(image), tuple(int(v) for v in ink)


def _scaled(points: Iterable[Point]) -> list[Point]:
    """Scale points from [0, 1] to pixels of the canvas."""
    side = SIDE_PX * _OVERSAMPLE
    return [(float(x) * side, float(y) * side) for x, y in points]


def _finish(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Reduce the canvas to SIDE_PX and add noise."""
    small = np.asarray(image.resize((SIDE_PX, SIDE_PX), Image.Resampling.BOX), dtype=np.float32)
    noisy = small + rng.normal(0, 8, size=small.shape)
    return Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8))
