"""The model a second time: dense, direct and slow, from a state with published names.

Nothing here is shared with `timo`. Gyroscope attention takes the direct form with all energies of
a query in one row; frames are never padded and tokens never gathered before the stem.
"""

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor


def relative_error(got: Tensor, exact: Tensor) -> float:
    """Largest difference over the largest exact value."""
    assert got.shape == exact.shape, f"shape {tuple(got.shape)}, not {tuple(exact.shape)}"
    assert got.isfinite().all(), "not finite"
    return ((got.double() - exact).abs().max() / exact.abs().max().clamp_min(1e-300)).item()


def assert_same(got: Tensor, exact: Tensor, name: str = "") -> None:
    """Check two float64 computations of the same thing, as the conformance vectors do."""
    error = relative_error(got, exact)
    assert error <= 1e-10, f"{name}: relative error {error:.2e}"


def code1d(position: float, dim: int) -> list[float]:
    angles = [position / 10000 ** (i / (dim / 2)) for i in range(dim // 2)]
    return [math.sin(a) for a in angles] + [math.cos(a) for a in angles]


def code(times: list[float], height: int, width: int, dim: int) -> Tensor:
    """(T, h, w, D)"""
    rows = [
        [
            [code1d(t, dim // 2) + code1d(x, dim // 4) + code1d(y, dim // 4) for x in range(width)]
            for y in range(height)
        ]
        for t in times
    ]
    return torch.tensor(rows, dtype=torch.float64)


@dataclass
class Oracle:
    """A model's state and shape; `after` collects running statistics in training mode."""

    state: dict[str, Tensor]
    num_heads: tuple[int, ...]
    depths: tuple[int, ...]
    kinds: tuple[str, ...] = ("gyroscope", "gyroscope", "joint", "joint")
    training: bool = False
    after: dict[str, Tensor] = field(default_factory=dict)

    def linear(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x, self.state[f"{name}.weight"], self.state.get(f"{name}.bias"))

    def layer_norm(self, name: str, x: Tensor, eps: float) -> Tensor:
        weight, bias = self.state[f"{name}.weight"], self.state[f"{name}.bias"]
        return F.layer_norm(x, x.shape[-1:], weight, bias, eps)

    def conv(self, name: str, x: Tensor, stride: int, padding: int) -> Tensor:
        weight, bias = self.state[f"{name}.weight"], self.state.get(f"{name}.bias")
        return F.conv2d(x, weight, bias, stride, padding)

    def batch_norm(self, name: str, x: Tensor, valid: Tensor) -> Tensor:
        """x (..., C), valid (...)."""
        mean, var = self.state[f"{name}.running_mean"], self.state[f"{name}.running_var"]
        if self.training:
            entries = x[valid]
            self.after[f"{name}.running_mean"] = 0.9 * mean + 0.1 * entries.mean(0).detach()
            self.after[f"{name}.running_var"] = 0.9 * var + 0.1 * entries.var(0).detach()
            mean, var = entries.mean(0), entries.var(0, correction=0)
        x = (x - mean) / torch.sqrt(var + 1e-5)
        return x * self.state[f"{name}.weight"] + self.state[f"{name}.bias"]

    def attention(self, name: str, x: Tensor, heads: int, kind: str, valid: Tensor) -> Tensor:
        """x (B, T, N, dim), valid (B, T, N)."""
        B, T, N, dim = x.shape
        q = self.linear(f"{name}.q", x).view(B, T, N, heads, -1)
        kv = self.linear(f"{name}.kv", x).view(B, T, N, 2, heads, -1)
        k, v = kv[..., 0, :, :], kv[..., 1, :, :]
        if kind == "joint":
            energy = torch.einsum("btnhd,bsmhd->btnhsm", q, k) / math.sqrt(dim // heads)
            energy = energy.masked_fill(~valid[:, None, None, None], -torch.inf).flatten(4)
            weights = energy.softmax(-1).nan_to_num(0).unflatten(-1, (T, N))
            out = torch.einsum("btnhsm,bsmhd->btnhd", weights, v)
        else:
            out = self.gyroscope(name, q, k, v, valid)
        return self.linear(f"{name}.proj", out.reshape(B, T, N, dim))

    def gyroscope(self, name: str, q: Tensor, k: Tensor, v: Tensor, valid: Tensor) -> Tensor:
        B, T, N, H, D = q.shape
        qm, km = lower_median(q, valid), lower_median(k, valid)
        gate = self.linear(f"{name}.cheap_operation.0", q - qm[:, None])  # [B, T, N, H, 1]
        entries = valid[..., None].expand(B, T, N, H)
        gate = F.relu(self.batch_norm(f"{name}.cheap_operation.1", gate, entries))
        temporal = torch.einsum("btnhd,bsnhd->btnhs", q, k)
        barred = torch.eye(T, dtype=torch.bool)[:, None] | ~valid.transpose(1, 2)[:, None]
        temporal = temporal.masked_fill(barred[:, :, :, None], -torch.inf)
        spatial = torch.einsum("bnhd,bmhd->bnhm", qm, km)[:, None] + gate
        spatial = spatial.masked_fill(~valid[:, :, None, None], -torch.inf)
        weights = torch.cat([temporal, spatial], -1).softmax(-1).nan_to_num(0)
        out = torch.einsum("btnhs,bsnhd->btnhd", weights[..., :T], v)
        out = out + torch.einsum("btnhm,btmhd->btnhd", weights[..., T:], v)
        return out * valid[..., None, None]

    def blocks(self, name: str, x: Tensor, depth: int, heads: int, kind: str, valid: Tensor):
        for j in range(depth):
            p = f"{name}.{j}"
            x = x + self.attention(
                f"{p}.attn", self.layer_norm(f"{p}.norm1", x, 1e-6), heads, kind, valid
            )
            hidden = self.linear(f"{p}.mlp.fc1", self.layer_norm(f"{p}.norm2", x, 1e-6))
            x = x + self.linear(f"{p}.mlp.fc2", F.gelu(hidden))
        return x

    def stem(self, image: Tensor, valid: Tensor) -> Tensor:
        """image (B, T, C, H, W), valid (B, T, H, W) -> (B, T, H/4, W/4, D)."""
        B, T = image.shape[:2]
        x = self.conv("patch_embed1.conv.0", image.flatten(0, 1), 2, 3).movedim(1, -1)
        half = coarser(valid).flatten(0, 1)
        x = F.relu(self.batch_norm("patch_embed1.conv.1", x, half)).movedim(-1, 1)
        x = self.conv("patch_embed1.conv.3", x, 2, 0).movedim(1, -1)
        return self.layer_norm("patch_embed1.norm", x, 1e-5).unflatten(0, (B, T))

    def stages(self, x: Tensor, valid: Tensor) -> list[Tensor]:
        """x (B, T, h, w, D) and valid (B, T, h, w) of stride 4; T counts units in pretraining."""
        B, T = x.shape[:2]
        out = []
        for i in range(1, 5):
            if i > 1:
                x = self.conv(f"patch_embed{i}.proj", x.flatten(0, 1).movedim(-1, 1), 2, 1)
                x = self.layer_norm(f"patch_embed{i}.norm", x.movedim(1, -1), 1e-5)
                x = x.unflatten(0, (B, T))
                valid = coarser(valid)
            shape = x.shape
            x = self.blocks(
                f"block{i}", x.flatten(2, 3), self.depths[i - 1], self.num_heads[i - 1],
                self.kinds[i - 1], valid.flatten(2),
            )  # fmt: skip
            x = self.layer_norm(f"norm{i}", x, 1e-6).view(shape) * valid[..., None]
            out.append(x)
        return out

    def encoder(self, frames: Tensor, valid: Tensor | None = None, months=None) -> list[Tensor]:
        """Feature maps (B, T, D, h, w) of frames whose sides are multiples of 4."""
        B, T, _, H, W = frames.shape
        valid = torch.ones(B, T, H, W, dtype=torch.bool) if valid is None else valid
        x = self.stem(frames.where(valid[:, :, None], torch.zeros_like(frames)), valid)
        times = months if months is not None else [[*range(T)]] * B
        x = x + torch.stack([code(t, *x.shape[2:]) for t in times])
        return [y.movedim(-1, 2) for y in self.stages(x, coarser(coarser(valid)))]

    def mae(
        self, frames, visible, decoder_heads: int, decoder_depth: int, norm: str = "none",
        valid: Tensor | None = None, months=None,
    ):  # fmt: skip
        """Loss, prediction of every unit (B, units, C·32·32) and latents (B, K, D).

        visible (B, units) bool; statistics of the stem are over all masked frames.
        """
        B, T, C, H, W = frames.shape
        rows, columns = H // 32, W // 32
        valid = torch.ones(B, T, H, W, dtype=torch.bool) if valid is None else valid
        kept = visible.view(B, T, rows, columns)
        kept = kept.repeat_interleave(32, 2).repeat_interleave(32, 3) & valid
        x = self.stem(frames.where(kept[:, :, None], torch.zeros_like(frames)), valid)
        times = months if months is not None else [[*range(T)]] * B
        x = x + torch.stack([code(t, *x.shape[2:]) for t in times])

        def units(y: Tensor, side: int) -> Tensor:  # (B, T, h, w, ...) -> (B, units, s, s, ...)
            y = y.unflatten(3, (columns, side)).unflatten(2, (rows, side))
            return y.transpose(3, 4).flatten(1, 3)

        tokens = torch.stack([u[m] for u, m in zip(units(x, 8), visible)])
        seen = torch.stack([u[m] for u, m in zip(units(coarser(coarser(valid)), 8), visible)])
        latent = self.stages(tokens, seen)[-1].flatten(2)

        sequence = []
        for b in range(B):
            row = self.state["mask_token"].view(1, -1).repeat(visible.shape[1], 1)
            row[visible[b]] = self.linear("decoder_embed", latent[b])
            sequence.append(row)
        x = torch.stack(sequence)
        x = x + torch.stack([code(t, rows, columns, x.shape[-1]).flatten(0, 2) for t in times])
        usable = units(valid, 32).flatten(2).any(2)
        x = self.blocks(
            "decoder_blocks", x[:, None], decoder_depth, decoder_heads, "joint", usable[:, None]
        )
        pred = self.linear("decoder_pred", self.layer_norm("decoder_norm", x[:, 0], 1e-6))
        target = units(frames.movedim(2, -1), 32).movedim(-1, 2).flatten(2)
        scored = units(valid, 32)[:, :, None].expand(-1, -1, C, -1, -1).flatten(2)
        scored = scored & ~visible[..., None]
        if norm == "batch":
            target = (target - target[scored].mean()) / torch.sqrt(target[scored].var() + 1e-6)
        elif norm == "patch":
            target = target.clone()
            for b, u in (scored.any(2)).nonzero().tolist():
                pixels = target[b, u][scored[b, u]]
                target[b, u] = (target[b, u] - pixels.mean()) / torch.sqrt(pixels.var() + 1e-6)
        return (pred - target)[scored].square().mean(), pred, latent


def lower_median(x: Tensor, valid: Tensor) -> Tensor:
    """(B, T, N, H, D) -> (B, N, H, D), by torch.median of the valid dates of each position."""
    B, T, N = valid.shape
    out = x.new_zeros(B, N, *x.shape[3:])
    for b in range(B):
        for n in range(N):
            if valid[b, :, n].any():
                out[b, n] = x[b, valid[b, :, n], n].median(0).values
    return out


def coarser(valid: Tensor) -> Tensor:
    """(..., h, w) -> (..., ceil(h/2), ceil(w/2)): valid if any of 2×2 is."""
    shape = valid.shape
    x = F.max_pool2d(valid.double().reshape(-1, 1, *shape[-2:]), 2, ceil_mode=True)
    return (x > 0).view(*shape[:-2], *x.shape[-2:])
