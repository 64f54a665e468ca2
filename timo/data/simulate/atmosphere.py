"""Clouds, their shadows, haze, and the sensor's blur."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from timo.data.simulate.noise import smooth_noise
from timo.data.simulate.spectra import SENTINEL2_BANDS, SPECTRA


@dataclass
class Clouds:
    """Clouds over each date, float32 and bool `(T, H, W)`.

    opacity: share of the ground's light that clouds hide, shade: share of direct sunlight that
    they keep from the ground, brightness: factor on the reflectance of a cloud, covered: pixels
    lost to clouds or shadows.
    """

    opacity: np.ndarray
    shade: np.ndarray
    brightness: np.ndarray
    covered: np.ndarray


def draw_clouds(
    rng: np.random.Generator, dates: int, shape: tuple[int, int], fraction: float
) -> Clouds:
    """Clouds that, with their shadows, cover on average `fraction` of the pixels.

    The cover of a date follows a U-shaped law: mostly clear or mostly overcast.
    """
    height, width = shape
    cover = np.full(dates, fraction)
    if 0 < fraction < 1:
        cover = rng.beta(0.8 * fraction, 0.8 * (1 - fraction), dates)
    cover[cover * height * width < 1] = 0
    opacity = np.zeros((dates, height, width), np.float32)
    shade, brightness = np.zeros_like(opacity), np.ones_like(opacity)
    covered = np.zeros(opacity.shape, bool)

    # The sun stands in the south-east at the satellite's overpass: shadows fall to the north-west.
    reach = rng.uniform(4, 16, dates)
    azimuth = rng.normal(np.pi / 4, 0.25, dates)
    shift_y = np.clip(np.rint(reach * np.sin(azimuth)), 1, 16).astype(int)
    shift_x = np.clip(np.rint(reach * np.cos(azimuth)), 1, 16).astype(int)
    softness = rng.uniform(0.2, 0.9, dates)
    albedo = rng.uniform(0.5, 1.0, dates)  # from grey stratus to white cumulus
    scale = rng.choice((40, 70, 110), dates)
    cloudy = np.flatnonzero(cover)
    if not len(cloudy):
        return Clouds(opacity, shade, brightness, covered)

    fields = smooth_noise(rng, (height + 16, width + 16), scale[cloudy].tolist(), slope=2.3)
    for field, frame in zip(fields, cloudy):
        above = (slice(height), slice(width))
        dy, dx = shift_y[frame], shift_x[frame]
        sunward = (slice(dy, dy + height), slice(dx, dx + width))
        thickest = np.maximum(field[above], field[sunward])
        # The threshold leaves the drawn share of the pixels below it.
        clear = int((1 - cover[frame]) * height * width)
        field -= np.partition(thickest.ravel(), clear)[clear]
        # max(field, 0) with a rounded corner: clouds fray out just beyond their mask.
        depth = (field + np.sqrt(field * field + 0.002)) / (2 * softness[frame])
        veil = 1 - np.exp(-depth)
        opacity[frame], shade[frame] = veil[above], veil[sunward]
        lit = field[above] - field[8 : 8 + height, 8 : 8 + width]
        rounded = 0.9 - 0.28 * np.exp(-0.5 * depth[above]) + 0.07 * lit
        brightness[frame] = albedo[frame] * rounded
        covered[frame] = np.maximum(field[above], field[sunward]) >= 0
    return Clouds(opacity, shade, np.clip(brightness, 0.3, 1.15), covered)


def add_atmosphere(
    rng: np.random.Generator, image: np.ndarray, clouds: Clouds, columns: np.ndarray
) -> None:
    """Put shadows, clouds and haze over ground reflectance `(T, C, H, W)`, in place."""
    dates = len(image)
    wavelength = np.array([band[0] for band in SENTINEL2_BANDS.values()], np.float32)[columns]
    # What is left of Rayleigh and aerosol scattering after correction, strongest in the blue.
    haze = rng.gamma(1.2, 0.004, (dates, 1)) * (wavelength / 490) ** -1.6
    gain = 1 + rng.normal(0, 0.02, (dates, 1, 1, 1))
    # Skylight, which is blue, still falls into a shadow.
    skylight = np.clip(0.5 * (wavelength / 490) ** -1.0, 0.12, 0.6)
    image *= gain.astype(np.float32)
    image += haze.astype(np.float32)[:, :, None, None]
    cloud = SPECTRA["cloud"][columns]
    for frame in np.flatnonzero(clouds.covered.any(axis=(1, 2))):
        shade = clouds.shade[frame]
        opacity = clouds.opacity[frame]
        for band in range(len(columns)):
            ground = image[frame, band]
            ground *= 1 - (1 - skylight[band]) * shade
            ground += opacity * (cloud[band] * clouds.brightness[frame] - ground)


def blur(image: np.ndarray, columns: np.ndarray) -> None:
    """Blur `(T, C, H, W)` in place as far as each band's ground sampling distance says."""
    distances = [band[1] for band in SENTINEL2_BANDS.values()]
    for index, column in enumerate(columns):
        for _ in range({10: 1, 20: 4, 60: 30}[distances[column]]):
            for axis in (1, 2):
                _blur_axis(image[:, index], axis)


def _blur_axis(plane: np.ndarray, axis: int) -> None:
    """Three-tap mean (1, 4, 1) / 6 along one axis, borders repeated, in place."""
    plane = np.moveaxis(plane, axis, 0)
    first, last = plane[0].copy(), plane[-1].copy()
    before = np.concatenate([first[None], plane[:-1]])
    after = np.concatenate([plane[1:], last[None]])
    plane *= 4 / 6
    before += after
    before *= 1 / 6
    plane += before
