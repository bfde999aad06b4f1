"""Draws the example pictures: ``python demo/examples.py``."""

from __future__ import annotations

import random
import sys
from pathlib import Path

# Allows `python demo/examples.py` beside `python -m demo.examples`.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from demo.conversations import describe
from demo.shapes import draw, random_scene

PICTURES = Path(__file__).resolve().parent.parent / "examples" / "pictures"
# File name: the seed of its scene. None of them is a picture of the training.
SEEDS = {"five-shapes.png": 31, "wide.jpg": 10, "tall.webp": 50, "dark.png": 44}


def main() -> None:
    """The command."""
    PICTURES.mkdir(parents=True, exist_ok=True)
    for name, seed in SEEDS.items():
        scene = random_scene(random.Random(f"example {seed}"))
        draw(scene, 480).save(PICTURES / name, quality=85)
        print(f"{name}: {describe(scene)}")


if __name__ == "__main__":
    main()
