"""gather_units: raw bytes to tiles in the compute dtype, a quarter of the units visible.

Floor: every pixel of a visible unit is read once, every tile is written once.
"""

from functools import partial

import torch
import torch.nn.functional as F

from timo import ops
from timo.ops.gather_units import FORWARD

from ..runner import Call, Problem, able

LAYOUT = "B,T,C,H,W"
# On GPUs several times what a cache holds.
SHAPES = [(1024, 3, 3, 224, 224), (128, 10, 10, 224, 224), (64, 10, 3, 512, 512)]
CPU_SHAPES = [(2, 3, 3, 224, 224), (2, 10, 10, 224, 224)]
UNIT, HALO = 32, (3, 2)


def problem(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Problem:
    B, T, C, H, W = shape
    frames, scale, offset = bands(shape, device)
    visible, _ = units(shape, device)

    def ours(backend):
        out = ops.gather_units(
            frames, visible, scale=scale, offset=offset, dtype=dtype, backend=backend
        )
        return (out,)

    backends, skipped = able(FORWARD, FORWARD.request(frames, dtype=dtype))
    calls: dict[str, Call] = {name: partial(ours, name) for name in backends}
    compiled = torch.compile(dense, dynamic=False)
    calls["dense"] = lambda: (dense(frames, visible, scale, offset, dtype),)
    calls["dense-compiled"] = lambda: (compiled(frames, visible, scale, offset, dtype),)

    def exact():
        tiles = ops.gather_units(
            frames, visible, scale=scale.double(), offset=offset.double(), dtype=torch.float64,
            backend="reference",
        )  # fmt: skip
        return [tiles], []

    values = visible.numel() * C
    return Problem(
        calls, backends, [], [], exact,
        flop={"forward": 0.0},
        traffic={"forward": values * (UNIT**2 + (sum(HALO) + UNIT) ** 2 * dtype.itemsize)},
        baseline=("dense", "reference"), skipped=skipped,
    )  # fmt: skip


def bands(shape, device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Frames of random bytes, and the scale and offset of each band."""
    options = {"generator": torch.Generator(device).manual_seed(0), "device": device}
    frames = torch.randint(256, shape, dtype=torch.uint8, **options)
    deviation = torch.rand(shape[2], **options) + 0.5
    return frames, deviation / 64, -2 * deviation


def units(shape, device) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids of the visible units, a quarter of all, and of the masked ones: (B, K) and (B, M)."""
    B, T, _, H, W = shape
    count = T * -(-H // UNIT) * -(-W // UNIT)
    order = torch.rand(B, count, generator=torch.Generator().manual_seed(1)).argsort(1).to(device)
    visible = max(1, count // 4)
    masked = max(1, count - visible)
    return order[:, :visible].sort(1).values, order[:, -masked:].sort(1).values


def dense(frames, visible, scale, offset, dtype) -> torch.Tensor:
    """As published: normalise all, blank what is masked, cut all tiles, keep some."""
    B, T, C, H, W = frames.shape
    h, w = -(-H // UNIT), -(-W // UNIT)
    seen = torch.zeros(B, T * h * w, dtype=torch.bool, device=frames.device)
    seen = seen.scatter(1, visible, True).view(B, T, 1, h, w)
    seen = seen.repeat_interleave(UNIT, 3).repeat_interleave(UNIT, 4)[..., :H, :W]
    pixels = torch.where(seen, frames * scale.view(-1, 1, 1) + offset.view(-1, 1, 1), 0).to(dtype)
    below, right = h * UNIT - H + HALO[1], w * UNIT - W + HALO[1]
    pixels = F.pad(pixels, (HALO[0], right, HALO[0], below))
    size = sum(HALO) + UNIT
    tiles = pixels.unfold(3, size, UNIT).unfold(4, size, UNIT)  # [B, T, C, h, w, S, S]
    tiles = tiles.permute(0, 1, 3, 4, 2, 5, 6).flatten(1, 3)
    return tiles[torch.arange(B, device=frames.device)[:, None], visible]
