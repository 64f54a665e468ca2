"""masked_pixel_loss: predictions against raw bytes, normalised by unit, three quarters masked.

Floor: predictions and masked pixels are read once; backward also writes the gradient.
"""

from functools import partial

import torch

from timo import ops
from timo.ops import dispatch
from timo.ops.masked_pixel_loss import EPS, FORWARD

from ..runner import Call, Problem, able
from .gather_units import CPU_SHAPES, LAYOUT, SHAPES, UNIT, bands, units

__all__ = ["CPU_SHAPES", "LAYOUT", "SHAPES", "problem"]


def problem(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Problem:
    B, T, C, H, W = shape
    frames, scale, offset = bands(shape, device)
    _, masked = units(shape, device)
    generator = torch.Generator(device).manual_seed(2)
    pred = torch.randn(*masked.shape, C * UNIT**2, generator=generator, device=device).to(dtype)
    pred.requires_grad_()

    def loss(prediction, backend):
        return ops.masked_pixel_loss(
            prediction, frames, masked, scale=scale, offset=offset, norm="patch", backend=backend
        )

    def ours(backend):
        return (loss(pred, backend),)

    backends, skipped = able(FORWARD, dispatch.Request(device, dtype))
    calls: dict[str, Call] = {name: partial(ours, name) for name in backends}
    inside = torch.ones(H, W, dtype=torch.bool, device=device)
    compiled = torch.compile(labels, dynamic=False)
    calls["labels"] = lambda: (labels(pred, frames, masked, scale, offset, inside),)
    calls["labels-compiled"] = lambda: (compiled(pred, frames, masked, scale, offset, inside),)
    wide = torch.promote_types(dtype, torch.float32)

    def exact():
        double = pred.detach().double().requires_grad_()
        out = loss(double, "reference")
        return [out.detach()], list(torch.autograd.grad(out, double))

    pixels, predictions = pred.numel() * 1.0, pred.numel() * dtype.itemsize
    traffic = {"forward": predictions + pixels, "backward": 2 * predictions + pixels}
    traffic["both"] = traffic["forward"] + traffic["backward"]
    return Problem(
        calls, backends, [pred], [torch.ones((), dtype=wide, device=device)], exact,
        flop=dict.fromkeys(traffic, 0.0), traffic=traffic, baseline=("labels", "reference"),
        skipped=skipped,
    )  # fmt: skip


def labels(pred, frames, masked, scale, offset, inside) -> torch.Tensor:
    """As published: labels of all units, cut from normalised frames; the masked ones count."""
    wide = torch.promote_types(pred.dtype, torch.float32)
    pixels = frames * scale.to(wide).view(-1, 1, 1) + offset.to(wide).view(-1, 1, 1)
    target = _cut(pixels)  # [B, units, C * unit * unit]
    index = masked[..., None].expand(-1, -1, target.shape[2])
    target = target.gather(1, index)
    usable = _cut(inside.expand(frames.shape)).gather(1, index)
    size = usable.sum(2, keepdim=True)
    mean = target.sum(2, keepdim=True) / size  # pixels outside the frame are 0
    variance = torch.where(usable, target - mean, 0).square().sum(2, keepdim=True) / (size - 1)
    target = (target - mean) / (variance + EPS).sqrt()
    return torch.where(usable, pred - target, 0).square().sum() / size.sum()


def _cut(x: torch.Tensor) -> torch.Tensor:
    """(B, T, C, H, W) -> (B, units, C * unit * unit), padded with 0."""
    H, W = x.shape[-2:]
    x = torch.nn.functional.pad(x, (0, -W % UNIT, 0, -H % UNIT))
    x = x.unflatten(4, (-1, UNIT)).unflatten(3, (-1, UNIT))  # [B, T, C, h, unit, w, unit]
    return x.permute(0, 1, 3, 5, 2, 4, 6).flatten(4).flatten(1, 3)
