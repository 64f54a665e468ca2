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


def magnitudes(
    inputs: list[Tensor], valid: Tensor | None, cotangent: Tensor, scale: float, dtype: torch.dtype
) -> list[Tensor]:
    """Sums of the absolute values of what the output and the six gradients are sums of.

    Gradients of energies are differences, often of nearly equal numbers: a rounding is one of these
    sums, whatever is left of them. Each weight errs as well by roundings, in float32, of its energy
    and its log-sum-exp; they count in units of `dtype`'s. Weights below 2^-60 may be dropped.

    Args:
        inputs, cotangent: float64, 0 where not valid.
        dtype: what the implementation under test is given.
    """
    q, k, v, q_median, k_median, _ = (x.abs() for x in inputs)
    usable = spread(valid, q)
    live = usable[:, None, ..., None]  # [B, 1, T, N, 1]
    scores = torch.where(live, energies(*inputs[:2], *inputs[3:], valid, scale), 0)
    logs = scores.logsumexp(-1, keepdim=True)
    weights = torch.where(live, (scores - logs).exp(), 0)
    unit = torch.finfo(dtype).eps
    roundings = torch.finfo(torch.float32).eps / unit * (scores.clamp_min(-1e3).abs() + logs.abs())
    weights = weights * (1 + roundings) + 2.0**-60 / unit * live
    T = q.shape[1]
    dates, positions = weights[..., :T], weights[..., T:]
    dout = cotangent.abs()
    out = torch.einsum("bhtns,bsnhd->btnhd", dates, v)
    out += torch.einsum("bhtnm,btmhd->btnhd", positions, v)
    delta = (dout * out).sum(-1).permute(0, 3, 1, 2)[..., None]
    ddates = dates * (torch.einsum("btnhd,bsnhd->bhtns", dout, v) + delta)
    dpositions = positions * (torch.einsum("btnhd,btmhd->bhtnm", dout, v) + delta)
    dv = torch.einsum("bhtns,btnhd->bsnhd", dates, dout)
    dv += torch.einsum("bhtnm,btnhd->btmhd", positions, dout)
    denergies = abs(scale) * dpositions.sum(2)
    return [
        out,
        abs(scale) * torch.einsum("bhtns,bsnhd->btnhd", ddates, k),
        abs(scale) * torch.einsum("bhtns,btnhd->bsnhd", ddates, q),
        dv,
        torch.einsum("bhnm,bmhd->bnhd", denergies, k_median),
        torch.einsum("bhnm,bnhd->bmhd", denergies, q_median),
        (ddates.sum(-1) + dpositions.sum(-1)).permute(0, 2, 3, 1),
    ]
