"""Decoder input: visible latents at their places, the mask token elsewhere, plus position.

Memory-bound: forward reads tokens once and writes the sequence once; positions come from L2 for
all samples but the first. Backward reads the gradient once: rows of visible units are copied, the
others summed, first over the rows of a program and then, by torch, over the programs.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from timo.kernels.gather_units import near, places
from timo.kernels.launch import grid


@triton.jit
def rows_and_channels(p_places, units, D, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Part of all rows, sample, units [ROWS] and channels [BLOCK] of this program, the units'
    places, and both masks."""
    blocks, parts = tl.cdiv(D, BLOCK), tl.cdiv(units, ROWS)
    part = tl.program_id(0) // blocks
    b = (part // parts).to(tl.int64)
    u = part % parts * ROWS + tl.arange(0, ROWS)
    d = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    place = tl.load(p_places + b * units + u, mask=u < units, other=-1)
    return part.to(tl.int64), b, u.to(tl.int64), d, place, u < units, d < D


@triton.jit(do_not_specialize=("K", "units"))
def scatter_kernel(
    p_tokens, p_places, p_mask_token, p_position, p_out,
    K, units, D, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: ROWS units of one sample, BLOCK channels."""
    _, b, u, d, place, m_u, m_d = rows_and_channels(p_places, units, D, ROWS, BLOCK)
    visible = (place >= 0)[:, None]
    m = m_u[:, None] & m_d[None, :]  # [ROWS, BLOCK]
    p_row = p_tokens + (b * K + place)[:, None] * D + d[None, :]
    token = tl.load(p_row, mask=m & visible, other=0.0).to(tl.float32)
    mask_token = tl.load(p_mask_token + d, mask=m_d, other=0.0).to(tl.float32)
    position = tl.load(p_position + u[:, None] * D + d[None, :], mask=m, other=0.0).to(tl.float32)
    out = tl.where(visible, token, mask_token[None, :]) + position
    p_out += (b * units + u)[:, None] * D + d[None, :]
    tl.store(p_out, out.to(p_out.dtype.element_ty), mask=m)


@triton.jit(do_not_specialize=("K", "units"))
def scatter_backward_kernel(
    p_grad, p_places, p_tokens, p_partial,
    K, units, D, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: ROWS units of one sample, BLOCK channels."""
    part, b, u, d, place, m_u, m_d = rows_and_channels(p_places, units, D, ROWS, BLOCK)
    visible = (place >= 0)[:, None]
    m = m_u[:, None] & m_d[None, :]  # [ROWS, BLOCK]
    grad = tl.load(p_grad + (b * units + u)[:, None] * D + d[None, :], mask=m, other=0.0)
    p_row = p_tokens + (b * K + place)[:, None] * D + d[None, :]
    tl.store(p_row, grad, mask=m & visible)
    masked = tl.sum(tl.where(visible, 0.0, grad.to(tl.float32)), 0)  # [BLOCK]
    tl.store(p_partial + part * D + d, masked, mask=m_d)


def forward(tokens, visible_ids, mask_token, position) -> Tensor:
    """As `timo.ops.scatter_units.reference`, on the tokens' device."""
    B, K, D = tokens.shape
    units = len(position)
    tokens, ids, mask_token, position = map(near, (tokens, visible_ids, mask_token, position))
    out = torch.empty((B, units, D), dtype=tokens.dtype, device=tokens.device)
    with torch.cuda.device_of(tokens):
        scatter_kernel[programs(B, units, D)](
            tokens, places(ids, units), mask_token, position, out, K, units, D, **tile(D)
        )
    return out


def backward(grad, visible_ids, mask_dtype) -> tuple[Tensor, Tensor]:
    """As `timo.ops.scatter_units.reference_backward`, on the gradient's device."""
    (B, units, D), K = grad.shape, visible_ids.shape[1]
    grad, ids = map(near, (grad, visible_ids))
    tokens = torch.empty((B, K, D), dtype=grad.dtype, device=grad.device)
    parts = B * triton.cdiv(units, tile(D)["ROWS"])
    partial = torch.empty((parts, D), dtype=torch.float32, device=grad.device)
    with torch.cuda.device_of(grad):
        scatter_backward_kernel[programs(B, units, D)](
            grad, places(ids, units), tokens, partial, K, units, D, **tile(D)
        )
    return tokens, partial.sum(0).to(mask_dtype)


def tile(D: int) -> dict[str, int]:
    """Tile of (units, channels): 16 values a thread; of a wide row 128 channels, so that there
    are programs enough for small batches."""
    block = min(128, max(16, triton.next_power_of_2(D)))
    return {"ROWS": 4096 // block, "BLOCK": block, "num_warps": 8}


def programs(B: int, units: int, D: int) -> tuple[int]:
    config = tile(D)
    return grid(B, triton.cdiv(units, config["ROWS"]), triton.cdiv(D, config["BLOCK"]))
