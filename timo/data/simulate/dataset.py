"""Simulated Sentinel-2 series as a dataset."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from timo.data.contract import IGNORE_INDEX, SeriesDataset
from timo.data.simulate.atmosphere import add_atmosphere, blur, draw_clouds
from timo.data.simulate.events import (
    DEFORESTATION_CLASSES,
    FLOOD_CLASSES,
    Clearing,
    draw_clearings,
    draw_dates,
    draw_water_levels,
    flood_map,
    water_share,
)
from timo.data.simulate.landscape import (
    BARE,
    CROPLAND,
    GRASSLAND,
    LAND_COVER_CLASSES,
    Landscape,
    draw_landscape,
)
from timo.data.simulate.seasons import Calendar, Colours, draw_colours, draw_rotation
from timo.data.simulate.spectra import CROP_CLASSES, SENTINEL2_BANDS, SPECTRA

TARGETS = {
    "land_cover": LAND_COVER_CLASSES,
    "crops": CROP_CLASSES,
    "deforestation": DEFORESTATION_CLASSES,
    "flood": FLOOD_CLASSES,
}
_QUANTUM = 1e-4  # reflectance of one digital number
_REGROWTH = 540.0  # days until grass covers two thirds of a clearing


@dataclass
class _Scene:
    """Everything that is drawn of a sample before its pixels."""

    landscape: Landscape
    calendar: Calendar
    rotation: np.ndarray
    clearings: list[Clearing]
    level: np.ndarray

    @property
    def cleared_on(self) -> np.ndarray:
        """Day of felling, int64 `(H, W)`; 0 where the forest, or no forest, stayed."""
        day = np.zeros(self.landscape.cover.shape, np.int64)
        for clearing in self.clearings:
            day[clearing.where] = clearing.day
        return day


class SimulatedSeries(SeriesDataset):
    """Endless variety of simulated Sentinel-2 series with exact truth, made from a seed.

    Each sample is a landscape of fields, grassland, forest, water and settlements, seen on
    irregular dates through its seasons: crops rotate from year to year, clouds and their shadows
    hide parts, dates are missing, forest is cleared, rivers flood. Sample `i` depends on
    `(seed, i)` and the arguments alone, whatever the worker or the order; the choice of `bands`,
    `target` and `output` changes no other part of it.

    A sample is a dict of "image" `(T, C, H, W)`, float32 reflectance or uint16 digital numbers
    (reflectance = 1e-4 · DN, as `scale` and `offset` say); "dates" int64 `(T,)`, days since
    1970-01-01, ascending and distinct; "valid" bool `(T, H, W)`, False under clouds and shadows
    (which the image shows) and on missing dates (0 in the image); "name"; and, unless `target` is
    None, "mask" int64:

    - "land_cover" `(H, W)`: LAND_COVER_CLASSES on the last date;
    - "crops" `(H, W)`: CROP_CLASSES in the calendar year of the last date, 0 off the fields;
    - "deforestation" `(H, W)`: 1 where forest was cleared between the first and the last date;
    - "flood" `(T, H, W)`: FLOOD_CLASSES on each date, 255 (ignored) where not valid.

    Args:
        length: number of samples.
        seed: integer of at least 0.
        dates: number T of acquisition dates.
        bands: names out of SENTINEL2_BANDS, in any order.
        size: pixels (of 10 m) of a side, or (H, W); at least 8.
        start, years: dates lie within `years` years from the day `start` (YYYY-MM-DD).
        target: what "mask" holds; see above.
        cloud_fraction: expected share of pixels lost to clouds and their shadows, in [0, 1].
        missing: probability that a date is missing, in [0, 1); one date at least is present.
        clearing, flood: probability of the event in a sample, in [0, 1].
        output: "reflectance" or "DN".

    Raises:
        ValueError: an argument out of its range. IndexError: a sample beyond `length`.
    """

    def __init__(
        self,
        length: int = 1000,
        *,
        seed: int = 0,
        dates: int = 10,
        bands: Sequence[str] = ("B02", "B03", "B04", "B08"),
        size: int | tuple[int, int] = 64,
        start: str = "2016-01-01",
        years: int = 5,
        target: str | None = "land_cover",
        cloud_fraction: float = 0.25,
        missing: float = 0.05,
        clearing: float = 0.5,
        flood: float = 0.5,
        output: str = "reflectance",
    ) -> None:
        for name, value, least in (
            ("length", length, 0),
            ("seed", seed, 0),
            ("dates", dates, 1),
            ("years", years, 1),
        ):
            if not _is_integer(value) or value < least:
                raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")
        sides = tuple(size) if isinstance(size, Sequence) else (size, size)
        if len(sides) != 2 or not all(_is_integer(side) and side >= 8 for side in sides):
            raise ValueError(
                f"size must be an integer or a pair (H, W) of integers of at least 8, got {size!r}"
            )
        for name, share in (
            ("cloud_fraction", cloud_fraction),
            ("missing", missing),
            ("clearing", clearing),
            ("flood", flood),
        ):
            if not 0 <= share <= 1 or (name == "missing" and share == 1):
                interval = "[0, 1)" if name == "missing" else "[0, 1]"
                raise ValueError(f"{name} must lie in {interval}, got {share!r}")
        if target is not None and target not in TARGETS:
            raise ValueError(f"target must be one of {', '.join(TARGETS)} or None, got {target!r}")
        if output not in ("reflectance", "DN"):
            raise ValueError(f"output must be 'reflectance' or 'DN', got {output!r}")
        self._columns = _band_columns(bands)
        self._first, self._last = _period(start, years)
        if dates > self._last - self._first:
            raise ValueError(
                f"dates must be at most the {self._last - self._first} days of {years} years from "
                f"{start}, got {dates}"
            )

        super().__init__(bands, "reflectance", _QUANTUM if output == "DN" else 1.0)
        self.length = length
        self.seed = seed
        self.num_dates = dates
        self.size = sides
        self.target = target
        self.classes = TARGETS[target] if target is not None else ()
        self.output = output
        self._cloud_fraction, self._missing = cloud_fraction, missing
        self._clearing, self._flood = clearing, flood
        self.arguments = {
            "length": length,
            "seed": seed,
            "dates": dates,
            "bands": list(self.bands),
            "size": list(sides),
            "start": str(start),
            "years": years,
            "target": target,
            "cloud_fraction": cloud_fraction,
            "missing": missing,
            "clearing": clearing,
            "flood": flood,
            "output": output,
        }

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict:
        index = self._checked(index)
        streams = self._streams(index)
        scene = self._scene(streams)
        clouds = draw_clouds(streams["clouds"], self.num_dates, self.size, self._cloud_fraction)
        present = streams["missing"].random(self.num_dates) >= self._missing
        if not present.any():
            present[streams["missing"].integers(self.num_dates)] = True
        valid = ~clouds.covered & present[:, None, None]

        image = self._ground(streams["seasons"], scene)
        blur(image, self._columns)
        self._add_grain(index, image)
        add_atmosphere(streams["atmosphere"], image, clouds, self._columns)
        np.clip(image, _QUANTUM, 1.2, out=image)
        image[~present] = 0
        if self.output == "DN":
            image = np.rint(image / np.float32(_QUANTUM)).astype(np.uint16)

        sample = {
            "image": torch.from_numpy(image),
            "dates": torch.from_numpy(scene.calendar.days),
            "valid": torch.from_numpy(valid),
            "name": f"simulated-{self.seed}-{index:06d}",
        }
        if self.target is not None:
            mask = self._truth(scene)[self.target]
            if self.target == "flood":
                mask = np.where(valid, mask, IGNORE_INDEX)
            sample["mask"] = torch.from_numpy(mask.astype(np.int64))
        return sample

    def truth(self, index: int) -> dict[str, torch.Tensor]:
        """All truth of a sample, int64, under the names of the targets, none of it ignored.

        Besides, "cleared_on" `(H, W)`: the day of felling since 1970-01-01, 0 where none was.
        """
        scene = self._scene(self._streams(self._checked(index)))
        maps = {**self._truth(scene), "cleared_on": scene.cleared_on}
        return {name: torch.from_numpy(value.astype(np.int64)) for name, value in maps.items()}

    def _checked(self, index: int) -> int:
        if not -self.length <= index < self.length:
            raise IndexError(f"sample {index} of a simulated series of {self.length} samples")
        return int(index) % self.length

    def _streams(self, index: int) -> dict[str, np.random.Generator]:
        """One generator for each aspect of a sample, so that none disturbs another."""
        names = ("events", "landscape", "seasons", "clouds", "missing", "atmosphere")
        children = np.random.SeedSequence([self.seed, index]).spawn(len(names))
        return {name: np.random.default_rng(child) for name, child in zip(names, children)}

    def _scene(self, streams: dict[str, np.random.Generator]) -> _Scene:
        events = streams["events"]
        floods, clears = events.random(2) < (self._flood, self._clearing)
        landscape = draw_landscape(
            streams["landscape"], self.size, needs_forest=clears, needs_river=floods
        )
        days = draw_dates(events, self.num_dates, self._first, self._last)
        calendar = Calendar.of(days)
        rotation = draw_rotation(events, calendar.years + 1, len(landscape.meadow))
        level = np.zeros(self.num_dates, np.float32)
        if floods:
            level = draw_water_levels(events, days)
        clearings = draw_clearings(events, landscape, days) if clears else []
        return _Scene(landscape, calendar, rotation, clearings, level)

    def _truth(self, scene: _Scene) -> dict[str, np.ndarray]:
        landscape = scene.landscape
        cover = landscape.cover.copy()
        last = scene.calendar.days[-1]
        for clearing in scene.clearings:
            cover[clearing.where] = BARE if last - clearing.day < _REGROWTH else GRASSLAND
        fields = landscape.cover == CROPLAND
        parcel = np.where(fields, landscape.unit, 0)
        crops = np.where(fields, scene.rotation[scene.calendar.years - 1][parcel], 0)
        return {
            "land_cover": cover,
            "crops": crops,
            "deforestation": (scene.cleared_on > 0).astype(np.uint8),
            "flood": flood_map(landscape, scene.level),
        }

    def _ground(self, rng: np.random.Generator, scene: _Scene) -> np.ndarray:
        """Reflectance of the ground without atmosphere or blur, float32 `(T, C, H, W)`."""
        landscape, calendar = scene.landscape, scene.calendar
        colours = draw_colours(rng, landscape, calendar, scene.rotation, self._columns)
        image = np.take(colours.mean, landscape.unit, axis=2)
        image += np.take(colours.vigour, landscape.unit, axis=2) * landscape.vigour
        image += np.take(colours.soil, landscape.unit, axis=2) * landscape.soil
        self._fell(image, colours, scene)
        # A low winter sun deepens the relief, and forest shows it most.
        winter = 0.5 + 0.5 * np.cos(2 * np.pi * (calendar.day + 10) / 365)
        depth = (0.03 + 0.06 * landscape.forest) * landscape.relief
        light = 1 + depth * (0.6 + winter[:, None, None])
        image *= (landscape.grain * light).astype(np.float32)[:, None]
        road = landscape.road * np.float32(0.85)
        asphalt = SPECTRA["asphalt"][self._columns]
        image += road * (asphalt[:, None, None] - image)
        self._wet(image, colours, scene)
        return image

    def _fell(self, image: np.ndarray, colours: Colours, scene: _Scene) -> None:
        """Show clearings in `image` from their frame on: bare ground that weeds slowly cover."""
        for clearing in scene.clearings:
            since = scene.calendar.days[clearing.frame :] - clearing.day
            green = (0.8 * (1 - np.exp(-since / _REGROWTH))).astype(np.float32)[:, None]
            felled = colours.felled[clearing.frame :]
            colour = felled + green * (colours.weeds[clearing.frame :] - felled)
            patch = 1 + 0.12 * scene.landscape.soil[clearing.where]
            image[clearing.frame :, :, clearing.where] = colour[..., None] * patch

    def _wet(self, image: np.ndarray, colours: Colours, scene: _Scene) -> None:
        """Lay rivers, lakes and floods over `image`."""
        landscape, level = scene.landscape, scene.level
        if landscape.height.min() > level.max() + 0.1:
            return
        share = water_share(landscape, level)[:, None]
        mud = np.clip(level / 0.6, 0, 1)[:, None]
        water = colours.water + mud * (colours.mud - colours.water)
        # Currents of a flood carry more or less mud.
        flooded = (level > 0)[:, None, None, None]
        shade = 1 + 0.06 * landscape.soil + 0.1 * flooded * landscape.relief.clip(-2, 2)
        image += share * (water[..., None, None] * shade - image)

    def _add_grain(self, index: int, image: np.ndarray) -> None:
        """Noise of the sensor and of unresolved detail, band by band, in place."""
        for band, column in enumerate(self._columns):
            rng = np.random.default_rng([self.seed, index, int(column)])
            # The difference of two uniforms: close to normal, and drawn in a third of the time.
            pair = rng.random((2, *image[:, band].shape), dtype=np.float32)
            noise = pair[0] - pair[1]
            image[:, band] += noise * (0.003 + 0.03 * image[:, band])


def _is_integer(value: object) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _band_columns(bands: Sequence[str]) -> np.ndarray:
    """Places of `bands` in SENTINEL2_BANDS, int64 `(C,)`."""
    names = list(SENTINEL2_BANDS)
    unknown = [] if isinstance(bands, str) else [band for band in bands if band not in names]
    if isinstance(bands, str) or not len(bands) or unknown or len(set(bands)) != len(bands):
        raise ValueError(f"bands must be distinct names out of {', '.join(names)}, got {bands!r}")
    return np.array([names.index(band) for band in bands])


def _period(start: str, years: int) -> tuple[int, int]:
    """First day and day after the last, since 1970-01-01."""
    try:
        first = np.datetime64(start, "D")
    except ValueError:
        first = None
    if first is None or np.isnat(first):
        raise ValueError(f"start must be a date YYYY-MM-DD, got {start!r}")
    day = int(first.astype(np.int64))
    return day, day + int(years * 365.25)
