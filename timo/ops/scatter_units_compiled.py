"""Compiled scatter_units, on the CPU and on CUDA devices.

The mask token and the position are read as float32, so those of half precision are copied.
"""

import torch
from torch import Tensor

from timo.ops import dispatch
from timo.ops.compiled import address, launch


def forward(tokens: Tensor, visible_ids: Tensor, mask_token: Tensor, position: Tensor) -> Tensor:
    """The sequence as the reference gives it."""
    B, K, D = tokens.shape
    if tokens.stride(2) != 1:
        tokens = tokens.contiguous()
    mask_token, position = (x.float().contiguous() for x in (mask_token, position))
    sequence = torch.empty((B, len(position), D), dtype=tokens.dtype, device=tokens.device)
    _launch("scatter_units", tokens, visible_ids.contiguous(), mask_token, position, sequence)
    return sequence


def backward(grad: Tensor, visible_ids: Tensor, mask_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Gradients of tokens and mask token; workspace of 4 D bytes for each 64 rows of `grad`."""
    (B, L, D), K, device = grad.shape, visible_ids.shape[1], grad.device
    tokens = torch.empty((B, K, D), dtype=grad.dtype, device=device)
    mask_token = torch.empty((D,), dtype=torch.float32, device=device)
    chunks = -(-B * L // dispatch.compiled().scatter_units_chunk)
    partial = torch.empty((chunks, D), dtype=torch.float32, device=device)
    grad, ids = grad.contiguous(), visible_ids.contiguous()
    _launch("scatter_units_backward", tokens, ids, mask_token, None, grad, partial)
    return tokens, mask_token.to(mask_dtype)


def _launch(name, tokens, ids, mask_token, position, sequence, partial=None) -> None:
    B, K, D = tokens.shape
    addresses = map(address, (tokens, ids, mask_token, position, sequence, partial))
    launch(
        name, tokens.device, list(addresses), list(tokens.stride()[:2]),
        [B, K, sequence.shape[1], D], dispatch.dtype_code(tokens.dtype),
    )  # fmt: skip
