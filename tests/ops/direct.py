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
    B, T, N, H, D = q.shape
    if valid is None:
        valid = torch.ones(B, T, dtype=torch.bool, device=q.device)
    usable = valid if valid.ndim == 3 else valid[:, :, None].expand(B, T, N)
    date = torch.arange(T, device=q.device)
    samples = []
    for b in range(B):
        u = usable[b]
        clean = [torch.where(u[:, :, None, None], x[b], 0) for x in (q, k, v)]
        qs, ks, vs = (x.permute(2, 0, 1, 3) for x in clean)  # [H, T, N, D]
        seen = u.any(0)[:, None, None]
        qm, km = (torch.where(seen, x[b], 0).transpose(0, 1) for x in (q_median, k_median))
        g = torch.where(u[:, :, None], gate[b], 0).permute(2, 0, 1)  # [H, T, N]
        temporal = scale * torch.einsum("htnd,hsnd->htns", qs, ks)
        allowed = (date[:, None] != date)[:, None, :] & u.mT[None]  # [T, N, T]
        temporal = temporal.masked_fill(~allowed, -torch.inf)
        spatial = scale * torch.einsum("hnd,hmd->hnm", qm, km)
        spatial = spatial[:, None] + g[..., None]  # [H, T, N, N]
        spatial = spatial.masked_fill(~u[:, None, :], -torch.inf)
        energies = torch.cat([temporal, spatial], -1)
        # A query that is not valid gets energies 0, lest its softmax be 0 / 0; its output is 0.
        energies = torch.where(u[..., None], energies, 0)
        # Not softmax(): in low precision this errs as a backward pass that keeps the log-sum-exp.
        weights = (energies - energies.logsumexp(-1, keepdim=True)).exp()
        weights = torch.where(u[..., None], weights, 0)
        out = torch.einsum("htns,hsnd->htnd", weights[..., :T], vs)
        out = out + torch.einsum("htnm,htmd->htnd", weights[..., T:], vs)
        samples.append(out.permute(1, 2, 0, 3))
    return torch.stack(samples)
