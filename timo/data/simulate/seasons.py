"""Crop rotations, and the colour of each parcel, stand and lot at each date."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from timo.data.simulate.landscape import CONIFER_STANDS, LOTS, STANDS, Landscape
from timo.data.simulate.spectra import (
    ALFALFA,
    CROP_CLASSES,
    SPECTRA,
    SPRING_CROPS,
    crop_cover,
    leaf_cover,
    ramp,
)


@dataclass
class Calendar:
    """Dates `(T,)` int64 in days since 1970-01-01, split into year (from 0) and day of the year."""

    days: np.ndarray
    year: np.ndarray
    day: np.ndarray
    years: int

    @classmethod
    def of(cls, days: np.ndarray) -> Calendar:
        date = days.astype("datetime64[D]")
        year = date.astype("datetime64[Y]")
        day = (date - year.astype("datetime64[D]")).astype(np.int64)
        index = year.astype(np.int64) - year[0].astype(np.int64)
        return cls(days, index, day, int(index[-1]) + 1)


def draw_rotation(rng: np.random.Generator, years: int, parcels: int) -> np.ndarray:
    """Crop of each parcel and harvest year, int64 `(years, parcels)`, codes of CROP_CLASSES.

    No field bears the same crop two years running, but for alfalfa, which stays some years.
    """
    crops = len(CROP_CLASSES) - 1
    weights = rng.dirichlet(np.full(crops, 1.2))  # each region has its own crops
    weights = 0.8 * weights + 0.2 / crops
    wanted = 1 + rng.choice(crops, (years, parcels), p=weights)
    other = rng.integers(1, crops, (years, parcels))
    stays = rng.random((years, parcels)) < 0.6
    for year in range(1, years):
        last = wanted[year - 1]
        changed = np.where(wanted[year] == last, (last - 1 + other[year]) % crops + 1, wanted[year])
        wanted[year] = np.where((last == ALFALFA) & stays[year], ALFALFA, changed)
    return wanted


@dataclass
class Colours:
    """Tables of reflectance, float32 `(T, C, U)`, of the `U` units of a landscape at each date.

    mean: reflectance; vigour, soil: its change with one unit of Landscape.vigour and .soil.
    felled: `(T, C)`, ground after a clearing, weeds: `(T, C)`, the green that comes back on it.
    water: `(T, C)` calm water. mud: `(C,)` flood water.
    """

    mean: np.ndarray
    vigour: np.ndarray
    soil: np.ndarray
    felled: np.ndarray
    weeds: np.ndarray
    water: np.ndarray
    mud: np.ndarray


def draw_colours(
    rng: np.random.Generator,
    landscape: Landscape,
    calendar: Calendar,
    rotation: np.ndarray,
    columns: np.ndarray,
) -> Colours:
    """Colours of a landscape in the bands of SENTINEL2_BANDS picked by `columns` `(C,)`."""
    spectra = {name: values[columns] for name, values in SPECTRA.items()}
    dates = len(calendar.days)
    season = _Season(
        delay=rng.normal(0, 7, calendar.years + 1)[calendar.year],
        greenness=rng.normal(1, 0.08, calendar.years + 1)[calendar.year],
        drought=rng.beta(1.5, 2.5, calendar.years + 1)[calendar.year],
        wetness=1 - 0.32 * rng.beta(1, 2, dates),
    )
    tables = [
        _parcel_colours(rng, landscape.meadow, calendar, rotation, season, spectra),
        _stand_colours(rng, STANDS, calendar, season, spectra),
        _lot_colours(rng, calendar, season, spectra),
        _stand_colours(rng, 1, calendar, season, spectra),  # hedges
        _track_colours(season, spectra),
    ]
    mean, vigour, soil = (
        np.concatenate(parts, 0).transpose(1, 2, 0).astype(np.float32) for parts in zip(*tables)
    )
    clarity = np.clip(rng.beta(2.5, 1.6) + rng.normal(0, 0.12, dates), 0, 1)[:, None]
    felled = 0.6 * spectra["slash"] + 0.4 * _soil_colour(rng, spectra)
    growing = 0.55 + 0.45 * _grass_season(calendar.day - season.delay)
    return Colours(
        mean,
        vigour,
        soil,
        felled=(felled * season.wetness[:, None]).astype(np.float32),
        weeds=_mix(spectra, {"grass": growing, "dry grass": 1 - growing}).astype(np.float32),
        water=(
            clarity * spectra["clear water"] + 0.7 * (1 - clarity) * spectra["muddy water"]
        ).astype(np.float32),
        mud=spectra["muddy water"] * np.float32(rng.uniform(0.85, 1.25)),
    )


@dataclass
class _Season:
    """The weather of each date's year, `(T,)`: delay in days, factors, and soil brightness."""

    delay: np.ndarray
    greenness: np.ndarray
    drought: np.ndarray
    wetness: np.ndarray


_Tables = tuple[np.ndarray, np.ndarray, np.ndarray]  # mean, vigour, soil: (units, T, C)


def _mix(spectra: dict[str, np.ndarray], shares: dict[str, np.ndarray]) -> np.ndarray:
    """Sum of spectra `(C,)` by their shares `(...)`: `(..., C)`."""
    return sum(share[..., None] * spectra[name] for name, share in shares.items())


def _soil_colour(rng: np.random.Generator, spectra: dict[str, np.ndarray]) -> np.ndarray:
    """The soil of a region, `(C,)`."""
    shares = rng.dirichlet((1.6, 1.2, 0.5))
    return sum(s * spectra[name] for s, name in zip(shares, ("dark soil", "pale soil", "red soil")))


def _grass_season(day: np.ndarray) -> np.ndarray:
    """Growth of grass over the year in [0, 1]."""
    return ramp(day, 85, 12) * (1 - ramp(day, 305, 15))


def _parcel_colours(
    rng: np.random.Generator,
    meadow: np.ndarray,
    calendar: Calendar,
    rotation: np.ndarray,
    season: _Season,
    spectra: dict[str, np.ndarray],
) -> _Tables:
    count, years = len(meadow), rotation.shape[0]
    shift = rng.normal(0, 6, (years, count))
    strength = np.clip(rng.normal(0.97, 0.1, (years, count)), 0.6, 1.05)
    catch = rng.random((years, count)) < 0.45
    brightness = rng.normal(1, 0.12, count)[:, None]
    region = _soil_colour(rng, spectra)

    # The crop on the field, and the one sown this autumn for the next harvest.
    covers = []
    for ahead in (0, 1):
        harvest = calendar.year + ahead
        crop = rotation[harvest].T
        day = np.broadcast_to(calendar.day - 365 * ahead, crop.shape)
        covers.append(
            crop_cover(
                crop,
                day,
                shift[harvest].T + season.delay,
                strength[harvest].T * season.greenness,
                catch[harvest].T & SPRING_CROPS[crop],
            )
        )
    now, following = covers
    dry, flower = now[1], now[2]
    green = np.minimum(now[0] + following[0], 1 - dry - flower)

    # Meadows: green all year, greener in the season, yellow in a dry summer, paler when mown.
    growth = _grass_season(calendar.day - shift[0][:, None] - season.delay)
    midsummer = np.exp(-(((calendar.day - 225) / 35) ** 2))
    thirst = np.clip(season.drought * rng.uniform(0.6, 1.4, (count, 1)), 0, 1) * midsummer
    since = calendar.day - rng.uniform(135, 200, (count, 1))
    mown = 0.45 * (rng.random((count, 1)) < 0.7) * np.exp(-np.abs(since) / 18) * (since > 0)
    turf = (0.5 + 0.42 * growth * strength[0][:, None]) * (1 - 0.75 * thirst) * (1 - mown)
    straw = np.minimum(0.15 + 0.7 * thirst + 0.6 * mown, 1 - turf)

    is_meadow = meadow[:, None]
    green = np.where(is_meadow, turf, green)
    dry = np.where(is_meadow, straw, dry)
    flower = np.where(is_meadow, 0, flower)
    sunflower = rotation[calendar.year].T == CROP_CLASSES.index("sunflower")
    cover = _mix(
        spectra,
        {
            "canopy": np.where(is_meadow, 0.3 * green, green),
            "grass": np.where(is_meadow, 0.7 * green, 0),
            "straw": np.where(is_meadow, 0, dry),
            "dry grass": np.where(is_meadow, dry, 0),
            "rapeseed bloom": np.where(sunflower, 0, flower),
            "sunflower bloom": np.where(sunflower, flower, 0),
        },
    )
    ground = region * (brightness * season.wetness)[..., None]
    bare = (1 - green - dry - flower)[..., None]
    # A thinner canopy shows more ground; the steps between sparse and dense plants matter most.
    patchiness = (0.35 * green * (1.15 - green))[..., None] + 0.03 * green[..., None]
    vigour = patchiness * (spectra["canopy"] - ground)
    return cover + bare * ground, vigour, 0.13 * bare * ground


def _stand_colours(
    rng: np.random.Generator,
    count: int,
    calendar: Calendar,
    season: _Season,
    spectra: dict[str, np.ndarray],
) -> _Tables:
    """Forest stands, conifers first; a single one is broadleaf (a hedge)."""
    day = np.broadcast_to(calendar.day, (count, len(calendar.day)))
    shift = rng.normal(0, 5, (count, 1)) + season.delay
    spring, summer, autumn = leaf_cover(day, shift)
    foliage = _mix(
        spectra,
        {
            "broadleaf spring": spring,
            "broadleaf summer": summer,
            "broadleaf autumn": autumn,
            "broadleaf winter": 1 - spring - summer - autumn,
        },
    )
    conifers = rng.uniform(0.0, 0.25, count)
    if count > CONIFER_STANDS:
        conifers[:CONIFER_STANDS] = rng.uniform(0.8, 1.0, CONIFER_STANDS)
    needles = spectra["conifer"] * (0.88 + 0.12 * _grass_season(calendar.day))[:, None]
    conifers = conifers[:, None, None]
    density = rng.normal(1, 0.07, (count, 1, 1))
    mean = (conifers * needles + (1 - conifers) * foliage) * density
    return mean, 0.07 * mean, 0 * mean


def _lot_colours(
    rng: np.random.Generator, calendar: Calendar, season: _Season, spectra: dict[str, np.ndarray]
) -> _Tables:
    garden_share = np.clip(np.linspace(0.95, 0.1, LOTS) + rng.normal(0, 0.1, LOTS), 0, 1)
    roofs = rng.dirichlet((0.9, 0.7, 0.06, 0.7, 0.3), LOTS)
    names = ("red roof", "grey roof", "white roof", "asphalt", "gravel")
    sealed = sum(roofs[:, i, None] * spectra[name] for i, name in enumerate(names))
    growth = 0.45 + 0.55 * _grass_season(calendar.day - season.delay)
    garden = _mix(spectra, {"garden": growth, "dry grass": 0.4 * (1 - growth)})
    garden = garden + 0.3 * (1 - growth)[:, None] * spectra["dark soil"]
    share = garden_share[:, None, None]
    mean = share * garden + (1 - share) * sealed[:, None]
    return mean, 0.05 * mean, 0 * mean


def _track_colours(season: _Season, spectra: dict[str, np.ndarray]) -> _Tables:
    mean = 0.6 * spectra["gravel"] * season.wetness[:, None] + 0.4 * spectra["dry grass"]
    return mean[None], 0 * mean[None], 0 * mean[None]
