"""The masked autoencoder: pretraining on a quarter of the 32×32 units."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from timo import ops
from timo.layers import Block, Linear
from timo.layers.position import grid_code, unit_code
from timo.layers.validity import per_map, pool_valid
from timo.models.encoder import Encoder, run_blocks
from timo.models.inputs import UNIT, check_series, pad_valid
from timo.models.masking import (
    draw_units,
    least_usable,
    unit_grid,
    usable_units,
    visible_count,
)
from timo.models.statistics import HALO, first_seen
from timo.models.weights import initialise
from timo.ops.checks import dtype_name
from timo.ops.gather_units import check_id_values, check_ids


class MAEOutput(NamedTuple):
    """What the masked autoencoder returns; ids as in `timo.ops.gather_units`."""

    loss: Tensor  # scalar, mean squared error over valid pixels of masked units
    pred: Tensor  # (B, M, C·32·32), channel-major, in the order of masked_ids
    visible_ids: Tensor  # (B, K) int64, ascending
    masked_ids: Tensor  # (B, M) int64, ascending: the other units
    latent: Tensor  # (B, K, D), the encoder's output of the visible units


class Decoder(nn.Module):
    """From visible latents to the pixels of masked units (specification: model.md §2).

    Args:
        in_dim: channels of the latents.
        dim, num_heads, depth: width, heads and number of blocks.
        out_dim: values of a unit, C·32·32.
        checkpoint_blocks: see `timo.models.encoder.Stage`.
    """

    def __init__(
        self, in_dim: int, dim: int, num_heads: int, depth: int, out_dim: int,
        checkpoint_blocks: bool = False,
    ):  # fmt: skip
        super().__init__()
        self.checkpoint_blocks = checkpoint_blocks
        self.embed = Linear(in_dim, dim)
        self.mask_token = nn.Parameter(torch.empty(1, 1, dim))
        self.blocks = nn.ModuleList(Block(dim, num_heads) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.pred = Linear(dim, out_dim)
        self.apply(initialise)
        nn.init.normal_(self.mask_token, std=0.02)

    def forward(
        self, latent: Tensor, visible_ids: Tensor, masked_ids: Tensor, time: Tensor,
        grid: tuple[int, int], valid: Tensor | None,
    ) -> Tensor:  # fmt: skip
        """Predictions of the masked units.

        Args:
            latent: (B, K, in_dim).
            visible_ids, masked_ids: (B, K) and (B, M) int64.
            time: temporal positions, (T,) or (B, T).
            grid: rows and columns of units in a frame.
            valid: (B, units) bool or None; other units are no keys.

        Returns:
            (B, M, out_dim).
        """
        token = self.mask_token.flatten()
        x = self.embed(latent).to(token.dtype)  # the residual stream stays wide under autocast
        code = grid_code(time, *grid, len(token), token.dtype).flatten(-4, -2)
        if code.ndim == 2:
            x = ops.scatter_units(x, visible_ids, token, code)
        else:  # positions differ between the samples
            x = ops.scatter_units(x, visible_ids, token, torch.zeros_like(code[0])) + code
        x = run_blocks(self.blocks, x, x.shape[1], valid, self.checkpoint_blocks)
        x = x.gather(1, masked_ids[..., None].expand(-1, -1, x.shape[2]))
        return self.pred(self.norm(x))


class MaskedAutoencoder(nn.Module):
    """Masked autoencoder with joint attention over visible tokens (specification: model.md §2).

    Args:
        encoder: the encoder, with joint attention in every stage.
        decoder_embed_dim, decoder_num_heads, decoder_depth: of the decoder.
        pixel_norm: normalisation of the target, see `timo.ops.masked_pixel_loss`.
        stem_statistics: in training mode, batch statistics of the stem over the positions of
            "visible" units, or of "all" the masked frames as in the published code, which learned
            faster (docs/training.md). Either is computed from visible units alone.
    """

    def __init__(
        self,
        encoder: Encoder,
        decoder_embed_dim: int = 512,
        decoder_num_heads: int = 16,
        decoder_depth: int = 8,
        pixel_norm: str = "none",
        stem_statistics: str = "visible",
    ):
        super().__init__()
        self.encoder = encoder
        self.pixel_norm, self.stem_statistics = pixel_norm, stem_statistics
        values = encoder.stem.conv.in_channels * UNIT**2
        self.decoder = Decoder(
            encoder.embed_dims[-1], decoder_embed_dim, decoder_num_heads, decoder_depth, values,
            encoder.checkpoint_blocks,
        )  # fmt: skip

    def extra_repr(self) -> str:
        return f"pixel_norm={self.pixel_norm!r}, stem_statistics={self.stem_statistics!r}"

    def forward(
        self,
        frames: Tensor,
        mask_ratio: float = 0.75,
        visible_ids: Tensor | None = None,
        dates: Tensor | None = None,
        valid: Tensor | None = None,
        *,
        scale: Tensor | float | None = None,
        offset: Tensor | float | None = None,
        generator: torch.Generator | None = None,
    ) -> MAEOutput:
        """Reconstruct masked units.

        Args:
            frames: (B, T, C, H, W) uint8, uint16 or floating, at least two units in all.
            mask_ratio: share of units to hide, between 0 and 1; unused with `visible_ids`.
            visible_ids: (B, K) int64, ascending units to keep, as `timo.models.masking` draws
                them; drawn at random if None, which waits for the device if `valid` is given, for
                K depends on it.
            dates: (B, T) int64 days; used with temporal_position="days" only.
            valid: (B, T) or (B, T, H, W) bool, true where usable; all usable if None.
            scale, offset: number or (C,) tensor; a pixel x is seen as `x * scale + offset`.
                Integer frames need `scale`.
            generator: of the random draw, on the device of the frames.

        Raises:
            TypeError, ValueError: names the argument, what it was and what it must be.
        """
        encoder, weight = self.encoder, self.encoder.stem.conv.weight
        check_series(frames, dates, valid, weight, encoder.temporal_position, raw=True)
        if not frames.is_floating_point() and scale is None:
            raise ValueError(
                f"frames is {dtype_name(frames.dtype)} and scale is missing; raw values need "
                "scale (and offset if not 0), as scale=1 / 255"
            )
        dates_and_grid = unit_grid(frames)
        units, grid = math.prod(dates_and_grid), dates_and_grid[1:]
        pixels, usable = pad_valid(valid, frames), usable_units(frames, valid)
        if units < 2:
            raise ValueError(
                f"frames has shape {tuple(frames.shape)}, a single unit of {UNIT}×{UNIT} pixels; "
                "at least two are needed: pass more dates or a larger window"
            )
        if visible_ids is None:
            shape, device = (len(frames),), frames.device
            key = torch.randint(2**63 - 1, shape, generator=generator, device=device)
            keep = visible_count(least_usable(frames, usable), mask_ratio)
            visible_ids = draw_units(key, dates_and_grid, keep, usable=usable)
        else:
            check_ids("visible_ids", visible_ids, frames)
            if not torch.compiler.is_compiling():
                check_id_values("visible_ids", visible_ids, units)
            if visible_ids.shape[1] >= units:
                raise ValueError(
                    f"visible_ids has shape {tuple(visible_ids.shape)}; at least one of the "
                    f"{units} units must be masked"
                )
        masked_ids = complement(visible_ids, units)
        time = encoder.time(frames, dates, valid)
        values: dict[str, Any] = dict(scale=scale, offset=offset, valid=valid)
        seen = None if pixels is None else select_units(pixels, visible_ids, grid)
        entries, count, halo = pool_valid(seen, 2), None, (3, 2)
        if self.training and self.stem_statistics == "all":
            entries, count = first_seen(visible_ids, dates_and_grid, pixels)
            halo = HALO
        tiles = ops.gather_units(
            frames, visible_ids, halo=halo, dtype=compute_dtype(weight), **values
        )
        tokens = encoder.stem(tiles.flatten(0, 1), per_map(entries), halo=True, count=count)
        tokens = tokens.unflatten(0, visible_ids.shape)  # [B, K, 8, 8, D]
        side, dim = tokens.shape[3:]
        tokens = tokens + unit_code(time, visible_ids, grid, side, dim, tokens.dtype)
        latent = encoder.run_stages(tokens, pool_valid(seen, 4))[-1][0].flatten(2)
        pred = self.decoder(latent, visible_ids, masked_ids, time, grid, usable)
        loss = ops.masked_pixel_loss(pred, frames, masked_ids, norm=self.pixel_norm, **values)
        return MAEOutput(loss, pred, visible_ids, masked_ids, latent)


def compute_dtype(weight: Tensor) -> torch.dtype:
    """What a convolution with `weight` computes in: autocast's dtype where it is on."""
    if torch.is_autocast_enabled(weight.device.type):
        return torch.get_autocast_dtype(weight.device.type)
    return weight.dtype


def complement(ids: Tensor, units: int) -> Tensor:
    """The other units, ascending: (B, K) -> (B, units − K)."""
    B, K = ids.shape
    kept = torch.zeros((B, units), dtype=torch.uint8, device=ids.device).scatter(1, ids, 1)
    return kept.argsort(stable=True, dim=1)[:, : units - K]


def select_units(x: Tensor, ids: Tensor, grid: tuple[int, int]) -> Tensor:
    """The units `ids` of maps.

    Args:
        x: (B, T), or (B, T, h, w, ...) where a unit is s×s entries.

    Returns:
        (B, K), or (B, K, s, s, ...).
    """
    sample = torch.arange(len(ids), device=ids.device)[:, None]
    rows, columns = grid
    if x.ndim == 2:
        return x[sample, ids // (rows * columns)]
    x = x.unflatten(3, (columns, -1)).unflatten(2, (rows, -1)).transpose(3, 4)
    return x[sample, ids // (rows * columns), ids // columns % rows, ids % columns]
