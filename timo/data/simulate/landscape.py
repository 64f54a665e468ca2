"""What lies where, before any date: parcels, forest, river and lakes, settlements and roads."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from timo.data.simulate.noise import jittered_cells, jittered_steps, smooth_noise

LAND_COVER_CLASSES = (
    "water",
    "built-up",
    "cropland",
    "grassland",
    "broadleaf forest",
    "conifer forest",
    "bare ground",
)
WATER, BUILT, CROPLAND, GRASSLAND, BROADLEAF, CONIFER, BARE = range(len(LAND_COVER_CLASSES))

STANDS = 8  # forest stands: the first CONIFER_STANDS are conifers
CONIFER_STANDS = 3
LOTS = 16  # kinds of built-up lots
BANK_SLOPE = 0.06  # metres of height per pixel of distance from the water's edge


@dataclass
class Landscape:
    """A piece of country of `(H, W)` pixels of 10 m.

    unit: int64, the pixel's row in the colour tables: parcels first, then STANDS forest stands,
    LOTS built-up lots, a hedge and a farm track. meadow: bool `(P,)`, parcels that are grassland.
    cover: uint8, codes of LAND_COVER_CLASSES. height: float32, metres above the usual water level
    (below 0: water). road: float32, share of the pixel under a road. relief: float32, slope towards
    the sun, mean 0 and variance 1. vigour, soil: float32, smooth within-field variation of plants
    and of soil brightness. grain: float32, pixel-wise brightness factor.
    """

    unit: np.ndarray
    meadow: np.ndarray
    cover: np.ndarray
    height: np.ndarray
    road: np.ndarray
    relief: np.ndarray
    vigour: np.ndarray
    soil: np.ndarray
    grain: np.ndarray

    @property
    def forest(self) -> np.ndarray:
        return (self.cover == BROADLEAF) | (self.cover == CONIFER)


def draw_landscape(
    rng: np.random.Generator, shape: tuple[int, int], needs_forest: bool, needs_river: bool
) -> Landscape:
    """A random landscape of `(H, W)` pixels, with forest or a river where an event needs them."""
    warp_x, warp_y, hills, town = smooth_noise(rng, shape, (70, 70, 90, 40), slope=3.5)
    woods, mixture, vigour, soil = smooth_noise(rng, shape, (60, 30, 14, 14), slope=2.4)
    y, x = np.indices(shape, np.float32)
    bent_x, bent_y = x + 5 * warp_x, y + 5 * warp_y

    parcel, edge, boundary = _draw_parcels(rng, bent_x, bent_y)
    count = parcel.max() + 1
    relief = np.gradient(hills, axis=1) + np.gradient(hills, axis=0)
    relief = relief / (relief.std() + 1e-6)

    height = np.full(shape, 1000.0, np.float32)
    if needs_river or rng.random() < 0.4:
        height = np.minimum(height, _river_distance(rng, x + warp_x, y + warp_y, town))
    for _ in range(rng.poisson(0.25 * max(1.0, x.size / 160**2))):
        height = np.minimum(height, _lake_distance(rng, bent_x, bent_y, town))
    # Floods stop at the steps between parcels as well as at the lie of the land.
    step = rng.normal(0, 0.3, count).astype(np.float32)[parcel]
    rise = np.exp(0.5 * hills + 0.3 * woods + 0.15 * vigour + step)
    height = height * BANK_SLOPE * np.where(height > 0, rise, 1)

    # Meadows favour the wet ground near water; a share of them differs from region to region.
    area = np.bincount(parcel.ravel(), minlength=count) + 1e-6
    parcel_height = np.bincount(parcel.ravel(), height.ravel(), count) / area
    wet = np.exp(-np.clip(parcel_height, 0, 100) / 0.6)
    meadow = rng.random(count) < np.maximum(rng.beta(1.5, 4), 0.7 * wet)

    # Forest borders follow both the lie of the land and the parcels.
    share = rng.beta(1.1, 2.4)
    if needs_forest:
        share = max(share, rng.uniform(0.3, 0.6))
    block_noise = rng.standard_normal(count, dtype=np.float32)[parcel]
    suited = woods + 0.5 * block_noise + 0.3 * hills
    forest = suited > np.quantile(suited, 1 - share)
    forest |= (height < 0.25) & (vigour > 0.5)  # trees along the banks

    density, street = _draw_settlements(rng, bent_x, bent_y, town + 0.5 * vigour)
    built = density > 0
    street[height < 0.1] = 0
    road = np.maximum(_draw_roads(rng, x + 2 * warp_x, y + 2 * warp_y), street)
    forest &= ~built
    hedge, track = boundary
    farmland = ~forest & ~built
    water = (height < 0) & (road < 0.5)

    stand_rank = mixture + rng.normal(0, 0.8)
    stand = np.digitize(stand_rank, (-1.6, -1.1, -0.6, -0.2, 0.2, 0.6, 1.1))
    lot = _draw_lots(rng, bent_x, bent_y, density)
    unit = parcel.copy()
    unit[hedge & farmland] = count + STANDS + LOTS
    unit[track & farmland] = count + STANDS + LOTS + 1
    unit[forest] = count + stand[forest]
    unit[built] = count + STANDS + lot[built]

    cover = np.where(meadow[parcel], GRASSLAND, CROPLAND).astype(np.uint8)
    cover[hedge & farmland] = BROADLEAF
    cover[track & farmland] = BUILT
    cover[forest] = np.where(stand < CONIFER_STANDS, CONIFER, BROADLEAF)[forest]
    cover[built | (road >= 0.5)] = BUILT
    cover[water] = WATER

    rough = np.select([forest, built], [0.15, 0.14], 0.025).astype(np.float32)
    grain = np.exp(rough * rng.standard_normal(shape, dtype=np.float32))
    # A dark seam where blocks of parcels meet.
    grain *= 1 - 0.12 * farmland * np.exp(-((edge / 0.6) ** 2))
    return Landscape(unit, meadow, cover, height, road, relief, vigour, soil, grain)


def _draw_parcels(
    rng: np.random.Generator, x: np.ndarray, y: np.ndarray
) -> tuple[np.ndarray, np.ndarray, tuple[np.ndarray, np.ndarray]]:
    """Parcels numbered from 0 `(H, W)`, distance to the block's edge, and (hedge, track) masks.

    Blocks of land are Voronoi cells, each cut along its own direction into strips, and each strip
    across into parcels, as land consolidation leaves them.
    """
    grain = np.exp(rng.normal(0, 0.3))  # small or large farms
    angle = rng.uniform(0, np.pi)
    along, across = _rotate(x, y, angle)
    block_size = 46 * grain
    block, neighbour, edge = jittered_cells(rng, across / block_size, along / (1.3 * block_size))
    blocks = max(block.max(), neighbour.max()) + 1

    turn = angle + rng.normal(0, 0.2, blocks) + rng.integers(0, 2, blocks) * np.pi / 2
    width = grain * np.exp(rng.normal(np.log(13), 0.35, blocks))
    length = width * rng.uniform(1.5, 4.0, blocks)
    u, v = _rotate(x, y, turn.astype(np.float32)[block])
    jitter = rng.uniform(-0.35, 0.35, (blocks, 8)).astype(np.float32)
    strip = jittered_steps(u / width.astype(np.float32)[block], jitter[block])
    strip_code = (block * 8191 + strip) % 997
    offset = rng.uniform(0, 1, 997).astype(np.float32)
    jitter = rng.uniform(-0.4, 0.4, (997, 8)).astype(np.float32)
    part = v / length.astype(np.float32)[block] + offset[strip_code]
    slot = jittered_steps(part, jitter[strip_code])

    key = (block * 4096 + (strip - strip.min())) * 4096 + (slot - slot.min())
    parcel = np.unique(key, return_inverse=True)[1].reshape(key.shape)

    edge = edge * block_size
    kind = rng.random((blocks, 1)).astype(np.float32)[:, 0]
    pair = (kind[block] + kind[neighbour]) % 1  # the same from both sides of the border
    hedge = (edge < 0.8) & (pair < 0.3)
    track = (edge < 0.6) & (pair > 0.65)
    return parcel, edge, (hedge, track)


def _rotate(
    x: np.ndarray, y: np.ndarray, angle: float | np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    cos, sin = np.cos(angle, dtype=np.float32), np.sin(angle, dtype=np.float32)
    return cos * x + sin * y, cos * y - sin * x


def _river_distance(
    rng: np.random.Generator, x: np.ndarray, y: np.ndarray, outline: np.ndarray
) -> np.ndarray:
    """Distance in pixels to the edge of a river, negative in it: `(H, W)`.

    The centre line is a sine-generated curve (Langbein and Leopold, 1966): its direction swings
    with the distance run, which makes the loops of a meandering river.
    """
    height, width = x.shape
    reach = 1.6 * np.hypot(height, width) + 60
    step = 1.5
    run = np.arange(0, 2.0 * reach, step, dtype=np.float32)
    wavelength = rng.uniform(45, 90)
    swing = rng.uniform(0.5, 1.25)
    phase = rng.uniform(0, 2 * np.pi, 3)
    pace = 2 * np.pi * run / wavelength
    direction = swing * (
        np.sin(pace + phase[0] + 0.9 * np.sin(pace / 3.7 + phase[1]))
        * (0.7 + 0.3 * np.sin(pace / 5.3 + phase[2]))
    )
    heading = rng.uniform(0, 2 * np.pi)
    px = np.cumsum(np.cos(direction + heading)) * step
    py = np.cumsum(np.sin(direction + heading)) * step
    # The middle of the curve crosses the middle part of the scene.
    anchor = len(run) // 2
    px += rng.uniform(0.3, 0.7) * width - px[anchor]
    py += rng.uniform(0.3, 0.7) * height - py[anchor]
    near = (px > -60) & (px < width + 60) & (py > -60) & (py < height + 60)
    squared = np.full(x.shape, 1e6, np.float32)
    for cx, cy in np.stack([px, py], 1)[near].astype(np.float32):
        # Floods reach no further than this window, whatever the size of the scene.
        rows = slice(max(0, int(cy) - 120), max(0, int(cy) + 120))
        columns = slice(max(0, int(cx) - 120), max(0, int(cx) + 120))
        part = squared[rows, columns]
        np.minimum(part, (x[rows, columns] - cx) ** 2 + (y[rows, columns] - cy) ** 2, out=part)
    return np.sqrt(squared) - rng.uniform(1.6, 5.0) * (1 + 0.15 * outline)


def _lake_distance(
    rng: np.random.Generator, x: np.ndarray, y: np.ndarray, outline: np.ndarray
) -> np.ndarray:
    """Distance in pixels to the shore of a lake or pond, negative in it: `(H, W)`."""
    height, width = x.shape
    radius = np.exp(rng.normal(np.log(9), 0.5))
    u, v = _rotate(
        x - rng.uniform(0, 1) * width, y - rng.uniform(0, 1) * height, rng.uniform(0, np.pi)
    )
    return np.hypot(u, v * rng.uniform(1.0, 2.2)) - radius * (1 + 0.35 * outline)


def _draw_settlements(
    rng: np.random.Generator, x: np.ndarray, y: np.ndarray, outline: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Density of settlement, and share of each pixel under streets, float32 `(H, W)` each.

    The density is above 0 where the ground is built up, and about 1 at the heart of a town.
    """
    height, width = x.shape
    density = np.full(x.shape, -1, np.float32)
    street = np.zeros(x.shape, np.float32)
    for _ in range(rng.poisson(0.45 * max(1.0, x.size / 128**2))):
        centre_x, centre_y = rng.uniform(0, width), rng.uniform(0, height)
        radius = np.exp(rng.normal(np.log(16), 0.5))
        u, v = _rotate(x - centre_x, y - centre_y, rng.uniform(0, np.pi))
        town = 0.95 - np.hypot(u, rng.uniform(1, 2) * v) / radius + 0.4 * outline
        spacing = rng.uniform(6, 10)
        grid = np.minimum(np.abs((u / spacing) % 1 - 0.5), np.abs((v / (1.4 * spacing)) % 1 - 0.5))
        line = np.clip(0.9 - grid * spacing, 0, 0.6) * (town > 0)
        street = np.maximum(street, line)
        density = np.maximum(density, town)
    return density, street


def _draw_lots(
    rng: np.random.Generator, x: np.ndarray, y: np.ndarray, density: np.ndarray
) -> np.ndarray:
    """Kind of built-up lot, int64 `(H, W)` in [0, LOTS), the greenest first.

    Lots are patches of one to three pixels, greener towards the edge of a town.
    """
    column = np.floor(x / 1.7).astype(np.int64)
    row = np.floor(y / 1.7).astype(np.int64)
    chance = rng.random(4093).astype(np.float32)[(column * 7919 + row * 104729) % 4093]
    rank = 0.75 * chance + 0.45 * np.clip(density, 0, 1)
    return np.clip((rank * LOTS).astype(np.int64), 0, LOTS - 1)


def _draw_roads(rng: np.random.Generator, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Share of each pixel under country roads, float32 `(H, W)`."""
    height, width = x.shape
    road = np.zeros(x.shape, np.float32)
    for _ in range(rng.poisson(0.6 * max(1.0, np.sqrt(x.size) / 96))):
        angle = rng.uniform(0, np.pi)
        _, distance = _rotate(
            x - rng.uniform(0.1, 0.9) * width, y - rng.uniform(0.1, 0.9) * height, angle
        )
        half_width = rng.choice([0.3, 0.45, 0.9], p=[0.45, 0.4, 0.15])
        road = np.maximum(road, np.clip(half_width + 0.5 - np.abs(distance), 0, 1))
    return road
