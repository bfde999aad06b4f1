"""Generated pictures of coloured shapes.

A scene is one to five shapes, each in a cell of its own of a 3x3 arrangement, so that "top left"
or "center" always has one meaning and shapes never overlap. Everything is drawn from the
``random.Random`` that the caller seeds: the same seed gives the same picture.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

from PIL import Image, ImageDraw

COLORS: dict[str, tuple[int, int, int]] = {
    "red": (215, 40, 40),
    "green": (40, 160, 60),
    "blue": (45, 85, 215),
    "yellow": (240, 215, 40),
    "purple": (140, 60, 175),
    "orange": (245, 140, 30),
}
FORMS = ("circle", "square", "triangle", "star", "cross")
# Radius of the circle around a shape, as a share of the arrangement's side.
SIZES: dict[str, tuple[float, float]] = {"small": (0.070, 0.086), "large": (0.122, 0.147)}
# In reading order: cell 0 is the top left one, cell 8 the bottom right one.
PLACES = (
    "at the top left",
    "at the top",
    "at the top right",
    "on the left",
    "in the center",
    "on the right",
    "at the bottom left",
    "at the bottom",
    "at the bottom right",
)
BACKGROUNDS = (
    (255, 255, 255),
    (238, 238, 238),
    (250, 242, 228),
    (226, 236, 248),
    (248, 228, 236),
    (46, 46, 52),
    (20, 20, 20),
)
MAX_SHAPES = 5
# Drawn this many times larger and averaged down: Pillow's own polygons have jagged edges.
OVERSAMPLING = 3


@dataclass(frozen=True)
class Shape:
    """One shape. ``x``, ``y`` and ``radius`` are shares of the arrangement's side."""

    form: str
    color: str
    size: str
    cell: int
    x: float
    y: float
    radius: float
    rotation: float
    rgb: tuple[int, int, int]

    @property
    def place(self) -> str:
        """Where the shape is, as a phrase."""
        return PLACES[self.cell]


@dataclass(frozen=True)
class Scene:
    """What a picture shows: its shapes in reading order, and the canvas they are on."""

    shapes: tuple[Shape, ...]
    background: tuple[int, int, int]
    # Width over height. The arrangement is the central square, which is what the image processor
    # of LLaVA-1.5 keeps of a picture that is not square.
    aspect: float


def _jitter(rng: random.Random, rgb: tuple[int, int, int], by: int) -> tuple[int, int, int]:
    red, green, blue = (min(255, max(0, value + rng.randint(-by, by))) for value in rgb)
    return red, green, blue


def random_scene(rng: random.Random, max_shapes: int = MAX_SHAPES) -> Scene:
    """A scene of one to ``max_shapes`` shapes."""
    count = rng.choice([1, 2, 2, 3, 3, 3, 4, 4, 4, 5, 5, 5])
    count = min(count, max_shapes)
    # Few colours or few forms in half of the scenes, so that "how many" is not always "one".
    colors = rng.sample(list(COLORS), rng.choice([2, 3, 6, 6]))
    forms = rng.sample(FORMS, rng.choice([2, 3, 5, 5]))
    shapes = []
    for cell in sorted(rng.sample(range(9), count)):
        form, color, size = rng.choice(forms), rng.choice(colors), rng.choice(list(SIZES))
        radius = rng.uniform(*SIZES[size])
        # The shape stays inside its cell whatever its rotation.
        slack = 1 / 6 - radius - 0.008
        shapes.append(
            Shape(
                form=form,
                color=color,
                size=size,
                cell=cell,
                x=(cell % 3) / 3 + 1 / 6 + rng.uniform(-slack, slack),
                y=(cell // 3) / 3 + 1 / 6 + rng.uniform(-slack, slack),
                radius=radius,
                rotation=rng.uniform(-12, 12),
                rgb=_jitter(rng, COLORS[color], 14),
            )
        )
    aspect = rng.choice([1.0, 1.0, 1.0, 4 / 3, 3 / 4])
    return Scene(tuple(shapes), _jitter(rng, rng.choice(BACKGROUNDS), 8), aspect)


def outline(shape: Shape) -> list[tuple[float, float]]:
    """Corners of a shape (64 of them for a circle), as shares of the arrangement's side."""
    # (angle in degrees from straight up, distance from the centre in radii)
    if shape.form == "circle":
        corners = [(turn * 360 / 64, 0.88) for turn in range(64)]
    elif shape.form == "square":
        corners = [(45 + 90 * turn, 1.0) for turn in range(4)]
    elif shape.form == "triangle":
        corners = [(120 * turn, 1.0) for turn in range(3)]
    elif shape.form == "star":
        corners = [(36 * turn, 0.42 if turn % 2 else 1.0) for turn in range(10)]
    elif shape.form == "cross":
        corners = []
        for turn in range(4):
            corners += [(90 * turn - 17, 1.0), (90 * turn + 17, 1.0), (90 * turn + 45, 0.414)]
    else:
        raise ValueError(f"unknown form {shape.form!r}")
    points = []
    for angle, distance in corners:
        turned = math.radians(angle + shape.rotation)
        points.append(
            (
                shape.x + shape.radius * distance * math.sin(turned),
                shape.y - shape.radius * distance * math.cos(turned),
            )
        )
    return points


def draw(scene: Scene, side: int) -> Image.Image:
    """The scene as an RGB picture whose shorter side is ``side`` pixels long."""
    width = round(side * max(1.0, scene.aspect))
    height = round(side * max(1.0, 1 / scene.aspect))
    left, top = (width - side) / 2, (height - side) / 2
    scale = OVERSAMPLING
    picture = Image.new("RGB", (width * scale, height * scale), scene.background)
    pen = ImageDraw.Draw(picture)
    for shape in scene.shapes:
        pen.polygon(
            [((left + x * side) * scale, (top + y * side) * scale) for x, y in outline(shape)],
            fill=shape.rgb,
        )
    return picture.reduce(scale)
