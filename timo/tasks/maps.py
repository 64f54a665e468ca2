"""Maps of embeddings: an encoder's features over whole series, window by window, as GeoTIFF."""

from collections.abc import Iterator
from math import nan
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from timo.data import GeoTiffWriter, blend, collate_series, physical
from timo.data.contract import with_progress
from timo.data.series import Series, WindowedSeries
from timo.data.windows import grid_windows
from timo.models.encoder import STRIDES
from timo.tasks.base import SeriesTask
from timo.tasks.data import compact_valid
from timo.tasks.pictures import PIXELS, components_picture, save


def token_size(stage: int) -> int:
    """Pixels along a side of the tokens of an encoder's stage, 1 ... 4."""
    if not 1 <= stage <= len(STRIDES):
        raise ValueError(f"stage is {stage}; it must be 1, 2, 3 or 4")
    return STRIDES[stage - 1]


@torch.inference_mode()
def embed_strips(
    task: SeriesTask,
    dataset: WindowedSeries,
    number: int,
    stage: int = 4,
    tile: int = 96,
    overlap: int = 32,
    batch_size: int = 4,
) -> Iterator[tuple[int, Tensor]]:
    """Embeddings of the tokens of one series, in strips from top to bottom.

    A token's embedding is the mean of the encoder's map over the dates at which it has a valid
    pixel. Windows begin at whole tokens, and are blended where they overlap.

    Args:
        task: a task of any kind in evaluation mode, on the device to run on; see `load_run`.
        dataset: what `task` is to read; its own windows do not matter.
        number: which series of the dataset.
        stage: of the encoder, 1 ... 4: tokens of 4, 8, 16 or 32 pixels.
        tile: size of windows in pixels, a multiple of 32.
        overlap: pixels that neighbouring windows share, a multiple of the token's size.
        batch_size: windows at once.

    Yields:
        (row, values): float32 (D, n, ceil(width / s)) from row `row` of tokens of s pixels on; NaN
        at tokens without a valid pixel.

    Raises:
        DataError: other bands or units than the task's.
        ValueError: a size that does not fit.
    """
    s = token_size(stage)
    if tile < 32 or tile % 32:
        raise ValueError(f"tile is {tile}; it must be a multiple of 32, the last stage's stride")
    if not 0 <= overlap < tile or overlap % s:
        raise ValueError(
            f"overlap is {overlap}; it must be a multiple of {s}, the pixels of a token of stage "
            f"{stage}, from 0 to less than tile, {tile}"
        )
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; it must be at least 1")
    task.read_from(dataset)
    series = dataset.series[number]
    h, w = -(-series.height // s), -(-series.width // s)  # in tokens
    step = tile - overlap
    corners = grid_windows(h * s, w * s, (tile, tile), (step, step))
    encoder: Any = task.model.encoder

    def windows() -> Iterator[tuple[int, int, Tensor]]:
        firsts = range(0, len(corners), batch_size)
        for first in with_progress(firsts, f"embed {series.name}"):
            chosen = corners[first : first + batch_size]
            batch = collate_series([dataset.cut(number, *at, tile, tile) for at in chosen])
            valid = compact_valid(batch["valid"])
            valid = valid if valid is None else valid.to(task.device)
            frames = physical(batch["image"].to(task.device), *task.input_units())
            maps, valids = encoder.features(frames, batch["dates"].to(task.device), valid)
            x, usable = maps[stage - 1].float(), valids[stage - 1]  # [B, T, D, h, w]
            usable = x.new_ones(x.shape[:2], dtype=torch.bool) if usable is None else usable
            usable = usable if usable.ndim == 4 else usable[:, :, None, None]
            count = usable.sum(1).expand(-1, *x.shape[3:])  # [B, h, w]
            mean = x.sum(1) / count.clamp_min(1)[:, None]  # 0 where there is none
            values = torch.cat([mean, (count > 0).to(mean)[:, None]], 1).cpu()
            for (row, col), one in zip(chosen, values):
                yield row // s, col // s, one

    for row, strip in blend(windows(), h, w, overlap // s):
        yield row, torch.where(strip[-1:] > 0.5, strip[:-1], nan)  # all windows agree on validity


def embed_map(
    task: SeriesTask,
    dataset: WindowedSeries,
    out: str | Path,
    number: int = 0,
    stage: int = 4,
    tile: int = 96,
    overlap: int = 32,
    batch_size: int = 4,
    picture: str | Path | None = None,
) -> None:
    """Write the embeddings of one series' tokens as GeoTIFF, and optionally a picture of them.

    Args:
        task, dataset, number, stage, tile, overlap, batch_size: see `embed_strips`.
        out: GeoTIFF, float32, nodata NaN: a band for each channel, a pixel for each token.
        picture: PNG of the first three principal components as red, green and blue.

    Raises:
        DataError, ValueError: see `embed_strips`. Nothing is left at `out` then.
    """
    series, s = dataset.series[number], token_size(stage)
    encoder: Any = task.model.encoder
    shape = encoder.embed_dims[stage - 1], -(-series.height // s), -(-series.width // s)
    step = -(-max(shape[1:]) // PIXELS)
    small = []
    names = [f"channel {i + 1}" for i in range(shape[0])]
    place = series.crs, _coarser(series, s)
    with GeoTiffWriter(out, shape, "float32", *place, nan, names) as file:
        for row, values in embed_strips(task, dataset, number, stage, tile, overlap, batch_size):
            file.write(values, row)
            small.append(values[:, -row % step :: step, ::step])
    if picture:
        save(components_picture(torch.cat(small, 1).numpy(), series.name), picture)


def _coarser(series: Series, factor: int) -> Any:
    """The affine transform of a series' raster with pixels `factor` times as large."""
    if (t := series.transform) is None:
        return None
    return type(t)(t.a * factor, t.b * factor, t.c, t.d * factor, t.e * factor, t.f)
