"""The hierarchical encoder of satellite image time series."""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from timo.layers import Block, PatchMerging, Stem
from timo.layers.norm import untracked
from timo.layers.position import grid_code, months_since_first
from timo.layers.validity import per_map, per_token, pool_valid, zero_invalid
from timo.models.inputs import check_series, clear_invalid, pad_frames, pad_valid
from timo.models.weights import initialise

STRIDES = (4, 8, 16, 32)


class Stage(nn.Module):
    """Embedding, blocks and the closing layer norm of one stage.

    With `checkpoint_blocks`, training keeps the input of each block alone and runs the block again
    in the backward: less memory for one more forward of every block.

    Shape of `forward`, which runs the blocks and the norm: (B, T, h, w, D) -> the same.
    """

    def __init__(
        self,
        embed: Stem | PatchMerging,
        blocks: Sequence[Block],
        dim: int,
        checkpoint_blocks: bool = False,
    ):
        super().__init__()
        self.checkpoint_blocks = checkpoint_blocks
        self.embed: Any = embed
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(dim, eps=1e-6)

    def forward(self, x: Tensor, valid: Tensor | None) -> Tensor:
        shape, usable = x.shape, per_token(valid)
        x = x.flatten(1, 3)  # [B, T·h·w, D]
        x = run_blocks(self.blocks, x, shape[1], usable, self.checkpoint_blocks)
        return self.norm(x).view(shape)


def run_blocks(
    blocks: nn.ModuleList, x: Tensor, num_dates: int, valid: Tensor | None, again: bool
) -> Tensor:
    """Blocks one after the other; shapes as `timo.layers.Block`.

    Args:
        again: keep the input of each block alone in training, and run it again in the backward.
    """
    again = again and blocks.training and torch.is_grad_enabled()
    for block in blocks:
        args = x, num_dates, valid
        x = _run_again_in_backward(block, *args) if again else block(*args)
    return x


def _run_again_in_backward(block: nn.Module, *args) -> Tensor:
    if torch.compiler.is_compiling():  # a graph moves running statistics once, in its forward
        return checkpoint(block, *args, use_reentrant=False)

    # The second run must not move running statistics once more.
    def contexts():
        return nullcontext(), untracked(block)

    return checkpoint(block, *args, use_reentrant=False, context_fn=contexts)


class Encoder(nn.Module):
    """TiMo encoder: four stages of strides 4, 8, 16, 32 (specification: model.md §1 and §3).

    Args:
        in_chans: bands C.
        embed_dims, num_heads, depths: of the four stages.
        attention: "gyroscope" or "joint" for each stage.
        drop_path_rate: stochastic depth of the last block; rises linearly from 0.
        layer_scale: see `timo.layers.Block`.
        temporal_position: "index" codes the frame's index, "days" the months since the earliest
            valid date.
        checkpoint_blocks: see Stage.
    """

    stage1: Stage
    stage2: Stage
    stage3: Stage
    stage4: Stage

    def __init__(
        self,
        in_chans: int,
        embed_dims: Sequence[int],
        num_heads: Sequence[int],
        depths: Sequence[int],
        attention: Sequence[str],
        drop_path_rate: float = 0.0,
        layer_scale: float | None = None,
        temporal_position: str = "index",
        checkpoint_blocks: bool = False,
    ):
        super().__init__()
        self.embed_dims = tuple(embed_dims)
        self.temporal_position, self.checkpoint_blocks = temporal_position, checkpoint_blocks
        total, done = sum(depths), 0
        for i, dim in enumerate(embed_dims):
            rates = [drop_path_rate * k / max(total - 1, 1) for k in range(done, done + depths[i])]
            blocks = [Block(dim, num_heads[i], attention[i], rate, layer_scale) for rate in rates]
            embed = PatchMerging(embed_dims[i - 1], dim) if i else Stem(in_chans, dim)
            setattr(self, f"stage{i + 1}", Stage(embed, blocks, dim, checkpoint_blocks))
            done += depths[i]
        self.apply(initialise)

    def extra_repr(self) -> str:
        return f"temporal_position={self.temporal_position!r}"

    @property
    def stem(self) -> Stem:
        return self.stage1.embed

    def forward(
        self, frames: Tensor, dates: Tensor | None = None, valid: Tensor | None = None
    ) -> list[Tensor]:
        """Feature maps of every frame.

        Args:
            frames: (B, T, C, H, W) floating values of any T, H, W >= 1.
            dates: (B, T) int64 days; used with temporal_position="days" only.
            valid: (B, T) or (B, T, H, W) bool, true where usable; all usable if None.

        Returns:
            four maps (B, T, D_i, ceil(H / s), ceil(W / s)) for s = 4, 8, 16, 32; 0 at tokens
            without a valid pixel.

        Raises:
            TypeError, ValueError: see `timo.models.inputs.check_series`.
        """
        check_series(frames, dates, valid, self.stem.conv.weight, self.temporal_position)
        return self.features(frames, dates, valid)[0]

    def features(
        self, frames: Tensor, dates: Tensor | None, valid: Tensor | None
    ) -> tuple[list[Tensor], list[Tensor | None]]:
        """`forward` of checked inputs, with the validity of the maps beside them.

        Returns:
            maps as `forward`; and for each None, (B, T) or (B, T, h, w) bool.
        """
        H, W = frames.shape[3:]
        time = self.time(frames, dates, valid)
        valid = pad_valid(valid, frames)
        frames = pad_frames(frames.to(self.stem.conv.weight.dtype))
        frames = clear_invalid(frames, valid)
        x = self.stem(frames.flatten(0, 1), per_map(pool_valid(valid, 2)))
        x = x.unflatten(0, frames.shape[:2])  # [B, T, h, w, D]
        h, w, dim = x.shape[2:]
        x = x + grid_code(time, h, w, dim, x.dtype)
        maps, valids = [], []
        for (tokens, usable), s in zip(self.run_stages(x, pool_valid(valid, 4)), STRIDES):
            h, w = -(-H // s), -(-W // s)
            maps.append(tokens[:, :, :h, :w].permute(0, 1, 4, 2, 3))
            if usable is not None and usable.ndim == 4:
                usable = usable[:, :, :h, :w]
            valids.append(usable)
        return maps, valids

    def time(self, frames: Tensor, dates: Tensor | None, valid: Tensor | None) -> Tensor:
        """Temporal positions of the frames: (T,) indices or (B, T) months."""
        if self.temporal_position == "days" and dates is not None:
            return months_since_first(dates, valid)
        return torch.arange(frames.shape[1], device=frames.device)

    def run_stages(self, x: Tensor, valid: Tensor | None) -> list[tuple[Tensor, Tensor | None]]:
        """The four stages on embedded tokens.

        Args:
            x: (B, T, h, w, D) tokens of stride 4; in pretraining T counts mask units.
            valid: None, (B, T) or (B, T, h, w) bool.

        Returns:
            each stage's map (B, T, h_i, w_i, D_i), 0 where invalid, and its validity.
        """
        out: list[tuple[Tensor, Tensor | None]] = []
        for stage in (self.stage1, self.stage2, self.stage3, self.stage4):
            if out:
                x = stage.embed(x.flatten(0, 1)).unflatten(0, x.shape[:2])
                valid = pool_valid(valid, 2)
            x = zero_invalid(stage(x, valid), valid)
            out.append((x, valid))
        return out
