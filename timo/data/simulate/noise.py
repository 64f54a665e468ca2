"""Smooth random fields and jittered cells, the raw material of simulated landscapes and clouds."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

# Spectral fields are periodic; this margin is cut off, so that opposite borders differ.
_MARGIN = 32


@lru_cache(maxsize=64)
def _amplitude(shape: tuple[int, int], scale: float, slope: float) -> np.ndarray:
    """Filter `(H, W // 2 + 1)`: from uniform noise in (-0.5, 0.5) to a field of variance 1."""
    fy = np.fft.fftfreq(shape[0])[:, None]
    fx = np.fft.fftfreq(shape[1])[None, :]
    # Frequency 0 stays: it is why one sample is mostly forest and the next has none.
    amplitude = (1 + (fy**2 + fx**2) * scale**2) ** (-slope / 2)
    amplitude *= np.sqrt(6 * shape[0] * shape[1] / np.mean(amplitude**2))
    return amplitude[:, : shape[1] // 2 + 1].astype(np.float32)


def smooth_noise(
    rng: np.random.Generator,
    shape: tuple[int, int],
    scales: Sequence[float],
    slope: float = 1.8,
) -> np.ndarray:
    """Gaussian fields, float32 `(len(scales), H, W)`, of mean 0 and variance 1 over draws.

    Field i is white beyond `scales[i]` pixels, and below that its amplitude spectrum falls as
    frequency to the power of -slope (1.8: clouds and relief; 3: smooth).
    """
    full = tuple(-(-(size + _MARGIN) // 16) * 16 for size in shape)
    amplitude = np.stack([_amplitude(full, float(scale), slope) for scale in scales])
    # Uniform parts are cheaper than normal ones, and sums of many are Gaussian all the same.
    white = rng.random((*amplitude.shape, 2), dtype=np.float32) - np.float32(0.5)
    spectrum = white.view(np.complex64)[..., 0] * amplitude
    return np.fft.irfft2(spectrum, s=full)[:, : shape[0], : shape[1]]


def jittered_cells(
    rng: np.random.Generator, u: np.ndarray, v: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Voronoi cells of one random point in every unit square of the coordinates `u`, `v` `(H, W)`.

    Returns the cell of each pixel (int64 from 0, not all of them occurring), the second nearest
    cell, and half the difference of the distances to both: about the distance to the border.
    """
    column = np.floor(u - u.min()).astype(np.int64) + 1
    row = np.floor(v - v.min()).astype(np.int64) + 1
    columns, rows = column.max() + 2, row.max() + 2
    points = rng.uniform(0.1, 0.9, (2, rows * columns)).astype(np.float32)
    points[0] += np.tile(np.arange(columns), rows) + (u.min() - 1)
    points[1] += np.repeat(np.arange(rows), columns) + (v.min() - 1)

    first = np.full(u.shape, np.inf, np.float32)
    second = np.full(u.shape, np.inf, np.float32)
    cell = np.zeros(u.shape, np.int64)
    neighbour = np.zeros(u.shape, np.int64)
    for i in (-1, 0, 1):
        for j in (-1, 0, 1):
            candidate = (row + i) * columns + column + j
            distance = (points[0][candidate] - u) ** 2 + (points[1][candidate] - v) ** 2
            nearer = distance < first
            runner_up = ~nearer & (distance < second)
            neighbour = np.where(nearer, cell, np.where(runner_up, candidate, neighbour))
            second = np.where(nearer, first, np.where(runner_up, distance, second))
            cell = np.where(nearer, candidate, cell)
            first = np.where(nearer, distance, first)
    return cell, neighbour, (np.sqrt(second) - np.sqrt(first)) / 2


def jittered_steps(u: np.ndarray, jitter: np.ndarray) -> np.ndarray:
    """Integer part of `u` with step k moved by `jitter[..., k % K]`, within (-0.5, 0.5).

    `u` is `(H, W)`, `jitter` `(H, W, K)`: strips of irregular width.
    """
    count = jitter.shape[-1]
    step = np.floor(u).astype(np.int64)
    lower = np.take_along_axis(jitter, (step % count)[..., None], -1)[..., 0]
    upper = np.take_along_axis(jitter, ((step + 1) % count)[..., None], -1)[..., 0]
    part = u - step
    return step - (part < lower) + (part >= 1 + upper)
