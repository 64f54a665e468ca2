"""Which scenes of a location enter the store, and why the others do not."""

from collections import Counter
from dataclasses import dataclass, field

import numpy as np

_YEAR = 365.2425
_GRID = 8  # clouds are estimated, and repetitions sought, on every eighth pixel


@dataclass
class Scene:
    """One acquisition: `pixels` (C, H, W), 0 where the source has no data.

    `cloudy` bool (H, W) where the source marks clouds; None where it does not.
    """

    source: str
    moment: np.datetime64
    pixels: np.ndarray
    cloudy: np.ndarray | None = None


@dataclass
class Candidates:
    """All scenes of a location, and those that could not be read as (source, reason, detail).

    `centre` is (CRS, x, y), or None where it is not known.
    """

    scenes: list[Scene]
    rejected: list[tuple[str, str, str]] = field(default_factory=list)
    centre: tuple[str, float, float] | None = None


@dataclass(frozen=True)
class Rules:
    """What a scene must be, and how many of them make a location.

    Args:
        dates: scenes of a location.
        max_cloud, max_nodata: largest share of pixels lost to clouds, and without data.
        bright: raw value above which the darkest visible band looks like cloud, where the source
            marks no clouds.
        visible: positions of the visible bands.
    """

    dates: int
    max_cloud: float
    max_nodata: float
    bright: float
    visible: tuple[int, ...]


@dataclass
class Chosen:
    """Scenes in ascending order of date, with shares of clouds and of pixels with data (T,)."""

    scenes: list[Scene]
    cloud: list[float]
    valid: list[float]


def choose(candidates: Candidates, rules: Rules) -> tuple[Chosen | None, Counter, list]:
    """The scenes to keep, or None; how many scenes each reason rejected; and which, a row each.

    Scenes are rejected that are blank, hold too little data or too many clouds, repeat another's
    pixels, or share a day with a clearer one. Of the others `dates` are chosen that spread over
    seasons and years, clear ones first.
    """
    log = list(candidates.rejected)
    scenes = sorted(candidates.scenes, key=lambda scene: (scene.moment, scene.source))
    bright = _look_like_cloud(scenes, rules)
    kept: list[tuple[Scene, float, float]] = []
    seen: dict[bytes, list[Scene]] = {}
    for number, scene in enumerate(scenes):
        held = np.bitwise_or.reduce(scene.pixels, axis=0) != 0
        data = float(np.count_nonzero(held)) / held.size
        if scene.cloudy is None:
            cloud = bright[number]
        else:
            cloud = float(np.count_nonzero(held & scene.cloudy)) / held.size
        reason = detail = ""
        if _is_blank(scene.pixels):
            reason, detail = "blank", "one value everywhere"
        elif 1 - data > rules.max_nodata:
            reason, detail = "nodata", f"{1 - data:.1%} of the pixels hold no data"
        elif cloud > rules.max_cloud:
            reason, detail = "cloud", f"{cloud:.1%} of the pixels are cloudy"
        else:
            few = scene.pixels[:, ::_GRID, ::_GRID].tobytes()
            alike = seen.setdefault(few, [])
            double = next((s for s in alike if np.array_equal(s.pixels, scene.pixels)), None)
            if double is not None:
                reason, detail = "duplicate pixels", f"the same as {double.source}"
            else:
                alike.append(scene)
        if reason:
            log.append((scene.source, reason, detail))
        else:
            kept.append((scene, cloud, data))
    kept = _one_a_day(kept, log)
    counts = Counter(reason for _, reason, _ in log)
    if len(kept) < rules.dates:
        return None, counts, log
    days = [scene.moment.astype("datetime64[D]").astype(int) for scene, _, _ in kept]
    clear = [max(1e-3, data - cloud) for _, cloud, data in kept]
    picked = [kept[i] for i in spread(days, clear, rules.dates)]
    if len(kept) > len(picked):
        counts["not chosen"] = len(kept) - len(picked)
    return _masked(picked), counts, log


def spread(days: list[int], clear: list[float], count: int) -> list[int]:
    """Ascending positions of `count` dates that spread over years and over seasons.

    Begins with the clearest and goes on with the date whose share of clear pixels, divided by how
    crowded it is, is greatest. Each chosen date crowds others by a bell over their distance in
    time (as wide as the whole span / `count`), and by one over their distance in the year (as
    wide as an eighth of it).
    """
    t, weight = np.asarray(days, float), np.asarray(clear, float)
    width = max(1.0, float(np.ptp(t)) / count)
    crowd = np.full(len(t), 1e-3)
    chosen: list[int] = []
    while len(chosen) < count:
        score = weight / crowd
        score[chosen] = -1
        chosen.append(int(np.argmax(score)))
        apart = np.abs(t - t[chosen[-1]])
        season = np.abs((apart + _YEAR / 2) % _YEAR - _YEAR / 2)
        crowd += np.exp(-((apart / width) ** 2)) + np.exp(-((season / (_YEAR / 8)) ** 2))
    return sorted(chosen)


def _masked(picked: list[tuple[Scene, float, float]]) -> Chosen:
    """Pixels under clouds that the source marks become 0, without data."""
    valid = []
    for scene, _, data in picked:
        if scene.cloudy is not None and scene.cloudy.any():
            scene.pixels[:, scene.cloudy] = 0
            held = np.bitwise_or.reduce(scene.pixels, axis=0) != 0
            data = float(np.count_nonzero(held)) / held.size
        valid.append(data)
    return Chosen([scene for scene, _, _ in picked], [cloud for _, cloud, _ in picked], valid)


def _is_blank(pixels: np.ndarray) -> bool:
    return all(plane.min() == plane.max() for plane in pixels)


def _one_a_day(kept: list, log: list) -> list:
    """Of several scenes of one day the clearest; the others go to the log."""
    best: dict[np.datetime64, tuple] = {}
    for entry in kept:
        day = entry[0].moment.astype("datetime64[D]")
        other = best.setdefault(day, entry)
        if other is not entry:
            worse = entry
            if entry[2] - entry[1] > other[2] - other[1]:
                best[day], worse = entry, other
            log.append((worse[0].source, "duplicate date", f"{day} has {best[day][0].source}"))
    return list(best.values())


def _look_like_cloud(scenes: list[Scene], rules: Rules) -> list[float]:
    """Share of pixels of each scene that are bright in all visible bands and usually are not.

    "Usually" is the lower quartile of the location's dates, so that sand, salt and roofs do not
    count; snow does. Only ranks and rejects scenes: no pixel is altered for it.
    """
    if all(scene.cloudy is not None for scene in scenes):
        return [0.0] * len(scenes)
    small = np.s_[list(rules.visible), ::_GRID, ::_GRID]
    darkest = np.stack([scene.pixels[small].min(0) for scene in scenes])
    usual = np.sort(darkest, axis=0)[(len(scenes) - 1) // 4]
    cloudy = (darkest > rules.bright) & (usual < rules.bright)
    return cloudy.mean((1, 2)).tolist()
