"""Gyroscope attention as it is defined, all energies at once: the oracle of its tests."""

import torch
from torch import Tensor


def direct(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_median: Tensor,
    k_median: Tensor,
    gate: Tensor,
    valid: Tensor | None = None,
    scale: float = 1.0,
) -> Tensor:
    """All T - 1 + N energies of every query side by side, one softmax; O(T N (T + N)) memory.

    Arguments and result as for `timo.ops.gyroscope_attention`. Entries that are not valid never
    enter the arithmetic, so that autograd through it is an oracle for gradients too.
    """
    T = q.shape[1]
    usable = spread(valid, q)
    scores = energies(q, k, q_median, k_median, gate, valid, scale)
    # A query that is not valid gets energies 0, lest its softmax be 0 / 0; its output is 0.
    live = usable[:, None, ..., None]  # [B, 1, T, N, 1]
    scores = torch.where(live, scores, 0)
    # Not softmax(): in low precision this errs as a backward pass that keeps the log-sum-exp.
    weights = (scores - scores.logsumexp(-1, keepdim=True)).exp()
    weights = torch.where(live, weights, 0)
    values = torch.where(usable[..., None, None], v, 0)
    out = torch.einsum("bhtns,bsnhd->btnhd", weights[..., :T], values)
    return out + torch.einsum("bhtnm,btmhd->btnhd", weights[..., T:], values)


def energies(
    q: Tensor,
    k: Tensor,
    q_median: Tensor,
    k_median: Tensor,
    gate: Tensor,
    valid: Tensor | None,
    scale: float,
) -> Tensor:
    """Of all dates, then all positions: (B, H, T, N, T + N), -inf where a key is barred."""
    B, T, N, H, _ = q.shape
    usable = spread(valid, q)
    q, k = (torch.where(usable[..., None, None], x, 0) for x in (q, k))
    seen = usable.any(1)[..., None, None]
    q_median, k_median = (torch.where(seen, x, 0) for x in (q_median, k_median))
    gate = torch.where(usable[..., None], gate, 0).permute(0, 3, 1, 2)  # [B, H, T, N]

    temporal = scale * torch.einsum("btnhd,bsnhd->bhtns", q, k)
    date = torch.arange(T, device=q.device)
    other = (date[:, None] != date)[:, None, :]  # [T, 1, T]
    allowed = other & usable.mT[:, None, None]  # [B, 1, T, N, T]
    temporal = temporal.masked_fill(~allowed, -torch.inf)

    spatial = scale * torch.einsum("bnhd,bmhd->bhnm", q_median, k_median)
    spatial = spatial[:, :, None] + gate[..., None]  # [B, H, T, N, N]
    spatial = spatial.masked_fill(~usable[:, None, :, None, :], -torch.inf)
    return torch.cat([temporal, spatial], -1)


def spread(valid: Tensor | None, q: Tensor) -> Tensor:
    """Validity as (B, T, N), whatever was given."""
    if valid is None:
        return torch.ones(q.shape[:3], dtype=torch.bool, device=q.device)
    return valid if valid.ndim == 3 else valid[:, :, None].expand(q.shape[:3])
