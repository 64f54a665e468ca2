"""Batch normalisation whose statistics leave out invalid entries."""

import torch
from torch import Tensor, nn


class MaskedBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch normalisation over the valid entries of (M, C, ...) (specification: model.md §3).

    Without `valid`, and in evaluation mode, it is `torch.nn.BatchNorm` itself. With `valid`, in
    training mode, batch statistics and running statistics come from the valid entries alone;
    invalid entries are normalised by them too. Statistics are float32 for half inputs. A batch
    without a valid entry leaves the running statistics as they are.

    Shape:
        x: (M, C, ...), any floating dtype.
        valid: (M, ...) bool, or broadcastable to it; true where usable.
        output: as x.
    """

    momentum: float
    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def _check_input_dim(self, x: Tensor) -> None:
        if x.ndim < 2 or x.shape[1] != self.num_features:
            raise ValueError(
                f"x has shape {tuple(x.shape)}; it must be (M, {self.num_features}, ...)"
            )

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        if valid is None or not self.training:
            return super().forward(x)
        self._check_input_dim(x)
        self.num_batches_tracked.add_(1)
        dims = (0, *range(2, x.ndim))
        channel = (1, -1) + (1,) * (x.ndim - 2)
        usable = valid.expand(x.shape[0], *x.shape[2:]).unsqueeze(1)  # [M, 1, ...]
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        count = usable.sum().clamp_min(1)
        mean = torch.where(usable, wide, 0).sum(dims) / count  # [C]
        centred = wide - mean.view(channel)
        variance = torch.where(usable, centred, 0).square().sum(dims) / count
        self._track(mean.detach(), variance.detach(), usable.sum())
        scale = self.weight * (variance + self.eps).rsqrt()
        return (centred * scale.view(channel) + self.bias.view(channel)).to(x.dtype)

    @torch.no_grad()
    def _track(self, mean: Tensor, variance: Tensor, count: Tensor) -> None:
        """Move the running statistics towards the batch's; the variance is kept unbiased."""
        step = self.momentum * (count > 0).to(self.running_mean.dtype)
        unbiased = variance * count / (count - 1).clamp_min(1)
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), step)
        self.running_var.lerp_(unbiased.to(self.running_var.dtype), step)
