"""Gyroscope attention by what PyTorch offers, without this project's kernels.

All functions take q, k, v (B, T, N, H, D), q_median, k_median (B, N, H, D) and gate (B, T, N, H),
everything valid, and give (B, T, N, H, D). What is not a product is computed in float32 at least.
"""

from collections.abc import Callable
from functools import cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor


def direct(q, k, v, q_median, k_median, gate) -> Tensor:
    """As published: all T - 1 + N energies of every query side by side, one softmax."""
    T = q.shape[1]
    temporal = _temporal_energies(q, k)  # [B, H, T, N, T]
    spatial = torch.einsum("bnhd,bmhd->bhnm", q_median, k_median)
    spatial = spatial[:, :, None] + gate.permute(0, 3, 1, 2)[..., None]  # [B, H, T, N, N]
    weights = torch.cat([temporal, spatial], -1).softmax(-1, _wide(v.dtype)).to(v.dtype)
    out = torch.einsum("bhtns,bsnhd->btnhd", weights[..., :T], v)
    return out + torch.einsum("bhtnm,btmhd->btnhd", weights[..., T:], v)


def direct_bytes(shape: tuple[int, ...]) -> tuple[float, float]:
    """Memory of `direct`, forward alone and with backward.

    In float32, 3.1 and 3.2 times the energies were measured; 16-bit inputs add copies in backward.
    """
    B, T, N, H, _ = shape
    energies = 4.0 * B * T * N * H * (N + T)
    return 3.2 * energies, 4.5 * energies


def factored(q, k, v, q_median, k_median, gate) -> Tensor:
    """Spatial weights once for all dates, in full."""
    energies = torch.einsum("bnhd,bmhd->bhnm", q_median, k_median).to(_wide(q.dtype))
    top = energies.detach().amax(-1, keepdim=True)
    weights = (energies - top).exp()  # [B, H, N, N]
    mass = weights.sum(-1, keepdim=True)
    values = v.permute(0, 3, 2, 1, 4).flatten(3)  # [B, H, N, T * D]
    spatial = (weights.to(v.dtype) @ values) / mass
    return merge(spatial, (top + mass.log()).squeeze(-1), q, k, v, gate)


def factored_bytes(shape: tuple[int, ...]) -> tuple[float, float]:
    """The same of `factored`."""
    B, _, N, H, _ = shape
    return 3 * 4.0 * B * N * N * H, 5 * 4.0 * B * N * N * H


def composed(attention: Callable, width: int, q, k, v, q_median, k_median, gate) -> Tensor:
    """`attention(q, k, v) -> (out, log-sum-exp)` over positions, as wide as it takes values.

    Dates ride along as value channels, at most `width` of them at a time.
    """
    query, key = (x.transpose(1, 2) for x in (q_median, k_median))  # [B, H, N, D]
    T, D = q.shape[1], q.shape[4]
    count = -(-T // max(1, width // D))  # calls
    parts = []
    for dates in v.tensor_split(count, 1):
        values = dates.permute(0, 3, 2, 1, 4).flatten(3)  # [B, H, N, dates * D]
        out, lse = attention(query, key, values)
        parts.append(out)
    return merge(torch.cat(parts, -1), lse, q, k, v, gate)


def merge(spatial, lse, q, k, v, gate) -> Tensor:
    """Join (B, H, N, T * D) and its log-sum-exp (B, H, N) with the attention over dates."""
    B, T, N, H, D = q.shape
    spatial = spatial.unflatten(-1, (T, D)).permute(0, 3, 2, 1, 4)  # [B, T, N, H, D]
    if T == 1:
        return spatial.to(v.dtype)
    energies = _temporal_energies(q, k)  # [B, H, T, N, T]
    weights = energies.softmax(-1).to(v.dtype)
    temporal = torch.einsum("bhtns,bsnhd->btnhd", weights, v)
    lse_temporal = energies.logsumexp(-1).permute(0, 2, 3, 1)  # [B, T, N, H]
    share = (lse.transpose(1, 2)[:, None] + gate - lse_temporal).sigmoid()[..., None]
    return (share * spatial + (1 - share) * temporal).to(v.dtype)


def _temporal_energies(q: Tensor, k: Tensor) -> Tensor:
    """Of every query with the keys of its position, its own date barred: (B, H, T, N, T)."""
    own = torch.eye(q.shape[1], dtype=torch.bool, device=q.device)[:, None]  # [T, 1, T]
    energies = torch.einsum("btnhd,bsnhd->bhtns", q, k).to(_wide(q.dtype))
    return energies.masked_fill(own, -torch.inf)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


# A fused kernel of torch.ops.aten: name; widest values; whether q and k must be as wide.
FUSED = {
    "sdpa": ("_scaled_dot_product_flash_attention_for_cpu", 512, True),
    "sdpa-flash": ("_scaled_dot_product_flash_attention", 248, True),
    "sdpa-efficient": ("_scaled_dot_product_efficient_attention", 512, False),
    "sdpa-cudnn": ("_scaled_dot_product_cudnn_attention", 120, True),
}
# What a backward kernel calls the results of the forward kernel, where the names differ.
SYNONYMS = {
    "output": "out", "log_sumexp": "logsumexp", "rng_state": "philox_seed",
    "unused": "philox_offset",
}  # fmt: skip
CONSTANTS = {
    "dropout_p": 0.0, "is_causal": False, "return_debug_mask": False, "attn_bias": None,
    "compute_log_sumexp": True, "scale": 1.0, "grad_input_mask": [True, True, True, False],
}  # fmt: skip


class Fused(torch.autograd.Function):
    """scaled_dot_product_attention's kernels with a log-sum-exp that has a gradient.

    The kernels' own formula has none. But they compute energy gradients as
    `P (dout . v - dout . out)`: with one more channel, in which v is 0, dout 1 and out -dlse, that
    becomes `P (dout . v - dout . out + dlse)`, which is what is wanted.
    """

    @staticmethod
    def forward(ctx, query, key, value, name):
        ctx.kernel, _, ctx.equal = FUSED[name]
        wide = value.shape[-1] if ctx.equal else 0
        given = {"query": _widen(query, wide), "key": _widen(key, wide), "value": value}
        results = _call(ctx.kernel, given)
        out, lse = results.pop("out"), results["logsumexp"]
        ctx.save_for_backward(query, key, value, out)
        ctx.results = results
        return out, lse.reshape(*query.shape[:2], -1)[..., : query.shape[2]]

    @staticmethod
    def backward(ctx, dout, dlse):
        query, key, value, out = ctx.saved_tensors
        width = value.shape[-1]
        dout, value, out = (_widen(x, width + 8) for x in (dout, value, out))  # aligned
        dout[..., width] = 1
        out[..., width] = -dlse
        wide = width + 8 if ctx.equal else 0
        given = ctx.results | {
            "grad_out": dout, "grad_out_": dout, "value": value, "out": out,
            "query": _widen(query, wide), "key": _widen(key, wide),
        }  # fmt: skip
        dquery, dkey, dvalue, *_ = _call(ctx.kernel + "_backward", given).values()
        D = query.shape[-1]
        return dquery[..., :D], dkey[..., :D], dvalue[..., :width], None


def _widen(x: Tensor, channels: int) -> Tensor:
    """With zeros after the channels, up to `channels` of them."""
    return F.pad(x, (0, channels - x.shape[-1])) if channels > x.shape[-1] else x


def _call(kernel: str, given: dict) -> dict:
    """Run an aten kernel by the names of its arguments, which differ between versions of torch."""
    op = getattr(torch.ops.aten, kernel).default
    given = CONSTANTS | given
    arguments = {a.name: given[a.name] for a in op._schema.arguments if a.name in given}
    results = op(**arguments)
    names = [r.name or str(i) for i, r in enumerate(op._schema.returns)]
    return {SYNONYMS.get(name, name): x for name, x in zip(names, results)}


def _flex(query, key, value) -> tuple[Tensor, Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    return flex_attention(query, key, value, scale=1.0, return_lse=True)


FLEX_WIDTH = 128


@cache
def implementations(device_type: str) -> dict[str, Callable]:
    """Every baseline by its name in the table; compiled ones are recompiled for every shape."""
    fused = ["sdpa"] if device_type == "cpu" else [n for n in FUSED if n != "sdpa"]
    found = {"direct": direct, "direct-compiled": _compiled(direct)}
    found |= {"factored": factored, "factored-compiled": _compiled(factored)}
    for name in fused:
        found[name] = partial(composed, partial(_fused, name), FUSED[name][1])
    return found | {"flex-compiled": _compiled(partial(composed, _flex, FLEX_WIDTH))}


def _fused(name: str, query, key, value) -> tuple[Tensor, Tensor]:
    return Fused.apply(query, key, value, name)


def _compiled(function: Callable) -> Callable:
    return torch.compile(function, dynamic=False)
