"""Offsets beyond 2^31 elements in the compiled CPU kernels, along every dimension.

Views whose two entries along one dimension lie that far apart; of the memory between, only the
pages that are touched exist.
"""

from math import prod

import pytest
import torch

from timo.ops import dispatch, gyroscope_attention, median_deviation, temporal_median

FAR = 2**31 + 64
ROOM = 4096  # elements of a tensor's dense part
pytestmark = pytest.mark.skipif(
    dispatch.unavailable("cpp") is not None, reason="timo._C is not built"
)


class Apart:
    """Memory of one dtype for tensors whose dimension `dim` has a stride of FAR elements."""

    def __init__(self, dtype: torch.dtype, tensors: int) -> None:
        self.memory = torch.empty(FAR + tensors * ROOM, dtype=dtype)
        self.taken = 0

    def empty(self, size, dim: int) -> torch.Tensor:
        stride = [prod(size[i + 1 :]) for i in range(len(size))]
        stride[dim] = FAR
        offset, self.taken = self.taken * ROOM, self.taken + 1
        return self.memory.as_strided(size, stride, offset)

    def put(self, x: torch.Tensor, dim: int) -> torch.Tensor:
        return self.empty(x.shape, dim).copy_(x)


def evaluate(op, inputs, cotangent, *rest):
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = op(*leaves, *rest, backend="cpp")
    out = out if isinstance(out, tuple) else (out,)
    return [*out, *torch.autograd.grad(out[0], leaves, cotangent)]


def problem(dtype):
    """Two entries along each dimension."""
    g = torch.Generator().manual_seed(0)
    shapes = [(2, 2, 2, 2, 24)] * 3 + [(2, 2, 2, 24)] * 2 + [(2, 2, 2, 2)]
    inputs = [torch.randn(s, generator=g).to(dtype) for s in shapes]
    valid = torch.ones(2, 2, 2, dtype=torch.bool)
    valid[0, 1, 0] = valid[1, 0, 1] = False
    return inputs, torch.randn(shapes[0], generator=g).to(dtype), valid


@pytest.mark.parametrize("dim", range(4), ids=["sample", "date", "position", "head"])
def test_gyroscope_inputs(dim):
    inputs, cotangent, valid = problem(torch.bfloat16)
    expected = evaluate(gyroscope_attention, inputs, cotangent, valid)
    apart = Apart(torch.bfloat16, 7)
    moved = [apart.put(x, dim) for x in (*inputs[:3], inputs[5])]
    medians = inputs[3:5]
    if dim != 1:  # a median has no dates
        medians = [apart.put(x, max(dim - 1, 0)) for x in medians]
    moved[3:3] = medians
    if dim < 3:
        valid = Apart(torch.bool, 1).put(valid, dim)
    got = evaluate(gyroscope_attention, moved, apart.put(cotangent, dim), valid)
    assert all(map(torch.equal, got, expected))


def test_gyroscope_outputs(monkeypatch):
    """Every result and what is saved for the backward, samples far apart."""
    inputs, cotangent, valid = problem(torch.bfloat16)
    expected = evaluate(gyroscope_attention, inputs, cotangent, valid)
    memory = {torch.bfloat16: Apart(torch.bfloat16, 9), torch.float32: Apart(torch.float32, 2)}
    monkeypatch.setattr(torch, "empty", lambda size, dtype: memory[dtype].empty(size, 0))
    got = evaluate(gyroscope_attention, inputs, cotangent, valid)
    assert all(map(torch.equal, got, expected))
    assert [x.taken for x in memory.values()] == [7, 2]


@pytest.mark.parametrize("dim", range(4), ids=["sample", "date", "position", "head"])
def test_temporal_median(dim):
    inputs, _, valid = problem(torch.bfloat16)
    x, cotangent = inputs[0], inputs[3]
    expected = evaluate(temporal_median, [x], cotangent, valid)
    x = Apart(torch.bfloat16, 1).put(x, dim)
    if dim < 3:
        valid = Apart(torch.bool, 1).put(valid, dim)
    got = evaluate(temporal_median, [x], cotangent, valid)
    assert all(map(torch.equal, got, expected))


@pytest.mark.parametrize("dim", range(4), ids=["sample", "date", "position", "head"])
def test_median_deviation(dim):
    inputs, _, valid = problem(torch.bfloat16)
    q, cotangent, weight = inputs[0], inputs[5].float(), inputs[1][0, 0, 0, 0]

    def op(*arguments, backend):
        return median_deviation(*arguments, backend=backend)[::-1]  # the deviation first

    expected = evaluate(op, [q, weight], cotangent, valid)
    q = Apart(torch.bfloat16, 1).put(q, dim)
    if dim < 3:
        valid = Apart(torch.bool, 1).put(valid, dim)
    got = evaluate(op, [q, weight], cotangent, valid)
    assert all(map(torch.equal, got, expected))
