"""Reflectance of materials in the Sentinel-2 bands, and the seasons of fields, grass and forest."""

from __future__ import annotations

import numpy as np

# name: (centre wavelength in nm, ground sampling distance in metres)
SENTINEL2_BANDS = {
    "B01": (443, 60),
    "B02": (490, 10),
    "B03": (560, 10),
    "B04": (665, 10),
    "B05": (705, 20),
    "B06": (740, 20),
    "B07": (783, 20),
    "B08": (842, 10),
    "B8A": (865, 20),
    "B09": (945, 60),
    "B10": (1375, 60),
    "B11": (1610, 20),
    "B12": (2190, 20),
}

CROP_CLASSES = (
    "background",
    "winter wheat",
    "winter barley",
    "rapeseed",
    "maize",
    "sunflower",
    "sugar beet",
    "potato",
    "alfalfa",
)

# Typical bottom-of-atmosphere reflectance, columns in the order of SENTINEL2_BANDS. B10 (cirrus)
# hardly sees the ground.
_TABLE = {
    "dark soil": "050 060 077 097 112 124 134 144 150 155 1 205 175",
    "pale soil": "095 118 156 200 222 236 248 262 272 278 2 340 300",
    "red soil": "050 058 088 150 180 198 214 232 242 248 2 300 250",
    "canopy": "020 028 062 030 098 330 440 470 490 480 2 215 098",
    "grass": "030 040 082 056 118 265 325 355 368 370 2 245 135",
    "dry grass": "065 085 125 150 185 220 240 260 275 285 2 330 240",
    "straw": "085 112 162 208 240 266 286 310 325 335 2 375 275",
    "rapeseed bloom": "045 055 185 155 235 400 455 480 495 490 2 240 120",
    "sunflower bloom": "030 038 110 090 150 330 410 440 455 450 2 230 115",
    "broadleaf summer": "015 022 046 022 073 235 310 340 358 365 2 168 072",
    "broadleaf spring": "020 028 070 034 105 290 380 405 420 425 2 195 085",
    "broadleaf autumn": "028 036 070 082 118 190 220 245 258 265 2 200 115",
    "broadleaf winter": "021 027 038 044 058 080 094 108 119 124 2 138 098",
    "conifer": "013 019 032 019 050 130 165 185 195 200 2 095 042",
    "red roof": "085 098 125 180 196 206 216 226 234 240 2 275 255",
    "grey roof": "150 172 188 198 205 210 215 222 228 230 2 240 225",
    "white roof": "330 370 395 405 410 412 415 420 420 415 5 380 340",
    "asphalt": "075 085 095 102 107 110 113 118 121 123 1 135 128",
    "gravel": "120 145 178 205 220 230 240 250 256 260 2 300 280",
    "garden": "035 045 075 058 110 220 265 290 302 308 2 200 115",
    "slash": "055 068 092 120 142 160 175 192 204 212 2 275 215",
    "clear water": "028 029 033 017 012 008 007 006 005 004 1 003 002",
    "muddy water": "044 056 082 086 078 050 046 042 037 026 1 010 007",
    "cloud": "760 750 740 750 755 760 765 770 770 560 60 520 400",
}
SPECTRA = {
    name: np.array([int(value) for value in row.split()], np.float32) / 1000
    for name, row in _TABLE.items()
}

# Day of the harvest year (1 January = 0) unless said: sowing of the winter cover, its greenness,
# spring growth, its time constant in days, full greenness, ripening, its time constant, ploughing,
# residue left, flowering (-1: none to see).
_CROP_CALENDAR = np.array(
    [
        # sown winter growth tau full ripe tau plough residue bloom
        [0, 0.00, 0, 10, 0.00, 400, 9, 400, 0.0, -1],  # background
        [-45, 0.28, 86, 13, 0.95, 182, 7, 245, 0.95, -1],  # winter wheat
        [-55, 0.32, 78, 13, 0.92, 163, 7, 226, 0.95, -1],  # winter barley
        [-105, 0.55, 74, 12, 0.95, 178, 8, 218, 0.80, 112],  # rapeseed
        [-300, 0.00, 160, 9, 0.95, 260, 10, 306, 0.70, -1],  # maize
        [-300, 0.00, 160, 9, 0.85, 235, 10, 278, 0.60, 193],  # sunflower
        [-300, 0.00, 154, 9, 0.98, 298, 8, 300, 0.20, -1],  # sugar beet
        [-300, 0.00, 152, 8, 0.92, 240, 9, 264, 0.30, -1],  # potato
        [-120, 0.50, 80, 14, 0.92, 345, 15, 400, 0.30, -1],  # alfalfa
    ],
    np.float32,
)
SPRING_CROPS = np.array([False, False, False, False, True, True, True, True, False])
ALFALFA = CROP_CLASSES.index("alfalfa")


def ramp(days: np.ndarray, middle: np.ndarray | float, tau: np.ndarray | float) -> np.ndarray:
    """Logistic rise from 0 to 1 around `middle`, with time constant `tau` days."""
    return 1 / (1 + np.exp(np.clip((middle - days) / tau, -30, 30)))


def crop_cover(
    crop: np.ndarray, day: np.ndarray, shift: np.ndarray, vigour: np.ndarray, catch: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ground shares of green canopy, dry straw and bloom, each float32 `(P, T)`, of `P` fields.

    crop: `(P, T)` codes of CROP_CLASSES, `day`: `(P, T)` days since 1 January of the harvest year,
    shift: `(P, T)` days of delay, vigour: `(P, T)` factor on the full cover, catch: `(P, T)` bool,
    a green winter cover ahead of a spring crop. A double logistic, after Beck et al. (2006).
    """
    calendar = np.moveaxis(_CROP_CALENDAR[crop], -1, 0)
    sown, winter, growth, tau, full, ripe, ripe_tau, plough, residue, bloom = calendar
    day = day - shift
    ripened = ramp(day, ripe, ripe_tau)
    emerged = ramp(day, sown, 10)
    green = (winter * emerged + (full - winter) * ramp(day, growth, tau)) * (1 - ripened)
    green = green * vigour + 0.5 * catch * ramp(day, -100, 10) * (1 - ramp(day, 55, 6))
    for cut in (142, 188, 236, 284):
        since = day - cut
        mown = np.exp(-np.clip(since, 0, 300) / 16) * (since >= 0) * (crop == ALFALFA)
        green = green * (1 - 0.65 * mown)
    dry = residue * ripened * (1 - ramp(day, plough, 3))
    flower = 0.85 * green * np.exp(-(((day - bloom) / 13) ** 2)) * (bloom > 0)
    return green - flower, dry, flower


def leaf_cover(day: np.ndarray, shift: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Shares of spring, summer and autumn foliage of broadleaf trees (the rest is bare), `(S, T)`.

    day: `(S, T)` day of the year, shift: `(S, T)` days of delay.
    """
    day = day - shift
    leaves = ramp(day, 112, 6) * (1 - ramp(day, 312, 6))
    spring = leaves * (1 - ramp(day, 150, 8))
    autumn = leaves * ramp(day, 284, 7)
    return spring, leaves - spring - autumn, autumn
