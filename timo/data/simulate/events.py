"""What happens to a landscape: acquisition dates, clearings and floods."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from timo.data.simulate.landscape import BANK_SLOPE, Landscape

FLOOD_CLASSES = ("none", "permanent water", "flood")
DEFORESTATION_CLASSES = ("kept", "cleared")
REVISIT = 5  # days between passes of the two Sentinel-2 satellites


def draw_dates(rng: np.random.Generator, count: int, first: int, last: int) -> np.ndarray:
    """`count` distinct days of [first, last), int64, ascending, irregular.

    They are passes of a satellite with a revisit of 5 days as long as the period has enough.
    """
    passes = np.arange(first + rng.integers(REVISIT), last, REVISIT)
    if count > len(passes):
        passes = np.arange(first, last)
    return np.sort(rng.choice(passes, count, replace=False)).astype(np.int64)


@dataclass
class Clearing:
    """Forest felled at once: pixels `where` `(H, W)`, on `day`, seen from frame `frame` on."""

    where: np.ndarray
    day: int
    frame: int


def draw_clearings(
    rng: np.random.Generator, landscape: Landscape, dates: np.ndarray
) -> list[Clearing]:
    """One to three clearings of forest, each between two of the `dates` (none for one date)."""
    forest = landscape.forest & (landscape.height > 0)
    rows, columns = np.nonzero(forest)
    clearings: list[Clearing] = []
    if len(dates) < 2 or not len(rows):
        return clearings
    y, x = np.indices(forest.shape, np.float32)
    for _ in range(rng.integers(1, 4)):
        seed = rng.integers(len(rows))
        angle = rng.uniform(0, np.pi)
        cos, sin = np.float32(np.cos(angle)), np.float32(np.sin(angle))
        dx, dy = x - columns[seed], y - rows[seed]
        u, v = (cos * dx + sin * dy), (cos * dy - sin * dx) * np.float32(rng.uniform(1, 2))
        power = rng.choice([2.5, 6])  # rounded, or nearly a rectangle
        radius = rng.uniform(6, 15)
        reach = (np.abs(u / radius) ** power + np.abs(v / radius) ** power) ** (1 / power)
        where = forest & (reach + 0.12 * landscape.soil < 1)
        frame = int(rng.integers(1, len(dates)))
        day = int(rng.integers(dates[frame - 1] + 1, dates[frame] + 1))
        forest = forest & ~where
        clearings.append(Clearing(where, day, frame))
    return clearings


def draw_water_levels(rng: np.random.Generator, dates: np.ndarray) -> np.ndarray:
    """Water level in metres above the usual one at each date, float32 `(T,)`: one or two floods.

    Each flood peaks close to one of the dates and falls within some two weeks.
    """
    level = np.zeros(len(dates), np.float32)
    for frame in rng.choice(len(dates), min(len(dates), int(rng.integers(1, 3))), replace=False):
        peak = rng.uniform(0.6, 1.7)
        days = dates - (dates[frame] + rng.integers(-4, 5))
        level = np.maximum(level, peak * np.exp(-((days / 9.0) ** 2)))
    return np.where(level > 0.2, level, 0).astype(np.float32)


def flood_map(landscape: Landscape, level: np.ndarray) -> np.ndarray:
    """Codes of FLOOD_CLASSES for water levels `(T,)`: uint8 `(T, H, W)`."""
    height = landscape.height
    open_ground = landscape.road < 0.5
    flooded = (height[None] < level[:, None, None]) & open_ground
    return np.where((height < 0) & open_ground, 1, 2 * flooded).astype(np.uint8)


def water_share(landscape: Landscape, level: np.ndarray) -> np.ndarray:
    """Share of each pixel under water at levels `(T,)`: float32 `(T, H, W)`.

    A shore crosses about one pixel; roads stand above the water.
    """
    depth = level[:, None, None] - landscape.height
    return np.clip(depth / BANK_SLOPE + 0.5, 0, 1) * (1 - landscape.road)
