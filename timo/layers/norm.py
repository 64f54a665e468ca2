"""Batch normalisation whose statistics leave out invalid entries."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch import distributed as dist


class MaskedBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch normalisation over the valid entries of (M, C, ...) (specification: model.md §3).

    Without `valid`, and in evaluation mode, it is `torch.nn.BatchNorm` itself. With `valid`, in
    training mode, batch statistics and running statistics come from the valid entries alone;
    invalid entries are normalised by them too. Statistics are float32 for half inputs. A batch
    without a valid entry leaves the running statistics as they are, and a single one is normalised
    to the bias. With `count`, statistics are those of `count` entries: the valid ones, and zeros
    that x lacks.

    Where `synchronised` is set, a training batch is that of all processes of the default group.

    Shape:
        x: (M, C, ...), any floating dtype.
        valid: (M, ...) bool, or broadcastable to it; true where usable.
        count: integer tensor of no dimension.
        output: as x.
    """

    momentum: float | None  # None: running statistics are means over the batches
    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor
    synchronised = False
    tracking = True  # whether training batches move the running statistics

    def _check_input_dim(self, x: Tensor) -> None:
        if x.ndim < 2 or x.shape[1] != self.num_features:
            raise ValueError(
                f"x has shape {tuple(x.shape)}; it must be (M, {self.num_features}, ...)"
            )

    def forward(
        self, x: Tensor, valid: Tensor | None = None, count: Tensor | None = None
    ) -> Tensor:
        if not self.training:
            return super().forward(x)
        shared = self.synchronised and dist.is_initialized() and dist.get_world_size() > 1
        several = x.numel() > self.num_features  # which torch's own insists on
        if valid is None and count is None and several and not shared:
            if self.tracking:
                return super().forward(x)
            mean, var = self.running_mean.clone(), self.running_var.clone()
            return F.batch_norm(x, mean, var, self.weight, self.bias, True, 0.0, self.eps)
        self._check_input_dim(x)
        usable = x.new_ones((), dtype=torch.bool) if valid is None else valid
        usable = usable.expand(x.shape[0], *x.shape[2:]).unsqueeze(1)  # [M, 1, ...]
        present = usable.sum()
        lacking = torch.zeros_like(present) if count is None else count - present
        args = x, self.weight, self.bias, usable, lacking, self.eps, shared
        out, mean, variance, count = _Normalise.apply(*args)
        self._track(mean, variance, count)
        return out

    @torch.no_grad()
    def _track(self, mean: Tensor, variance: Tensor, count: Tensor) -> None:
        """Move the running statistics towards the batch's; the variance is kept unbiased."""
        if not self.tracking:
            return
        seen = count > 0
        self.num_batches_tracked.add_(seen)
        step = seen.to(self.running_mean.dtype)
        if self.momentum is None:
            step = step / self.num_batches_tracked.clamp_min(1)
        else:
            step = step * self.momentum
        unbiased = variance * count / (count - 1).clamp_min(1)
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), step)
        self.running_var.lerp_(unbiased.to(self.running_var.dtype), step)


class _Normalise(torch.autograd.Function):
    """Batch normalisation with the statistics of the usable entries and of `lacking` zeros.

    Of what is as large as x, the backward keeps x alone.
    """

    @staticmethod
    def forward(
        x: Tensor, weight: Tensor, bias: Tensor, usable: Tensor, lacking: Tensor, eps: float,
        shared: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        """Output as x; mean and variance, (C,); their number of entries."""
        mean, variance, count, centred = _statistics(x, usable, lacking, shared)
        scale = weight * (variance + eps).rsqrt()
        out = centred.mul_(_as(scale, x)).add_(_as(bias, x))
        return out.to(x.dtype), mean, variance, count

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        x, weight, _, usable, lacking, ctx.eps, ctx.shared = inputs
        _, mean, variance, count = output
        ctx.mark_non_differentiable(mean, variance, count)
        ctx.save_for_backward(x, weight, usable, lacking, mean, variance, count)

    @staticmethod
    def backward(ctx, grad: Tensor, *_):
        x, weight, usable, lacking, mean, variance, count = ctx.saved_tensors
        if torch.is_grad_enabled():  # to be differentiated again
            mean, variance, count, centred = _statistics(x, usable, lacking, ctx.shared)
        else:
            centred = x - _as(mean, x)
        dims = _dims(x)
        deviation = (variance + ctx.eps).rsqrt()
        shift, slope = grad.sum(dims, dtype=centred.dtype), (grad * centred).sum(dims) * deviation
        grad_weight, grad_bias = slope, shift
        if ctx.shared:
            shift, slope = _SumOfProcesses.apply(shift), _SumOfProcesses.apply(slope)
        scale = weight * deviation
        share = -scale / count.clamp_min(1)
        shift, slope, scale = (_as(y, x) for y in (share * shift, share * slope * deviation, scale))
        if torch.is_grad_enabled():
            through = torch.where(usable, centred * slope + shift, 0) + grad * scale
        else:  # in place: this is where the memory of training peaks
            through = centred.mul_(slope).add_(shift).masked_fill_(~usable, 0).addcmul_(grad, scale)
        return through.to(x.dtype), grad_weight, grad_bias, None, None, None, None


def _statistics(
    x: Tensor, usable: Tensor, lacking: Tensor, shared: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Mean and variance (C,) of the usable entries and zeros, their number, and x less the mean."""
    dims, wide = _dims(x), x.to(torch.promote_types(x.dtype, torch.float32))
    count, total = usable.sum() + lacking, torch.where(usable, wide, 0).sum(dims)
    if shared:
        dist.all_reduce(count)
        total = _SumOfProcesses.apply(total)
    mean = total / count.clamp_min(1)  # [C]
    centred = wide - _as(mean, x)
    spread = torch.where(usable, centred, 0).square().sum(dims) + lacking * mean.square()
    if shared:
        spread = _SumOfProcesses.apply(spread)
    return mean, spread / count.clamp_min(1), count, centred


def _dims(x: Tensor) -> tuple[int, ...]:
    """All dimensions but that of the channels."""
    return (0, *range(2, x.ndim))


def _as(value: Tensor, x: Tensor) -> Tensor:
    """A value for each channel of x (M, C, ...)."""
    return value.view(1, -1, *(1,) * (x.ndim - 2))


class _SumOfProcesses(torch.autograd.Function):
    """Sum over the processes of the default group, as is the gradient."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return _sum_of_processes(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return _sum_of_processes(grad)


def _sum_of_processes(x: Tensor) -> Tensor:
    x = x.clone()
    dist.all_reduce(x)
    return x


@contextmanager
def untracked(module: nn.Module) -> Iterator[None]:
    """Leave running statistics inside `module` alone: a batch that is seen again counts once."""
    norms = [m for m in module.modules() if isinstance(m, MaskedBatchNorm)]
    for norm in norms:
        norm.tracking = False
    try:
        yield
    finally:
        for norm in norms:
            norm.tracking = True
