"""Random problems for gyroscope_attention and its medians: shapes, strides, validity, energies.

Everything about a case follows from its number, validity and dtype, so that a failure can be
repeated.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tests.guards import guarded
from tests.ops import test_median_deviation as of_deviation
from tests.ops.direct import direct, magnitudes
from tests.tolerance import assert_close
from timo.ops import gyroscope_attention, temporal_median

KINDS = ("none", "date", "position")
ENERGIES = ("mild", "mild", "mild", "strong", "climbing", "far", "low")


@dataclass(frozen=True)
class Case:
    """One problem. `scale` is the op's; `energy` names how energies are distributed."""

    number: int
    shape: tuple[int, int, int, int, int]  # B, T, N, H, D
    kind: str
    dtype: torch.dtype
    energy: str
    scale: float


def generator(*seeds: int) -> torch.Generator:
    seed = 0
    for x in seeds:
        seed = seed * 1_000_003 + x + 1
    return torch.Generator().manual_seed(seed)


def draw(g: torch.Generator, low: int, high: int) -> int:
    return int(torch.randint(low, high + 1, (), generator=g))


def pick(g: torch.Generator, options):
    return options[draw(g, 0, len(options) - 1)]


def random_shape(g: torch.Generator, work: int) -> tuple[int, int, int, int, int]:
    """(B, T, N, H, D) of about `work` multiplications, each dimension small, odd or great in turn.

    A shape of few numbers gets a greater batch: the greatest of a handful of errors says little.
    """
    while True:
        T = pick(g, (1, 1, 2, 3, 4, 5, 7, draw(g, 6, 17), draw(g, 17, 40)))
        N = pick(g, (1, 2, 3, draw(g, 4, 20), draw(g, 16, 70), draw(g, 64, 300)))
        D = pick(g, (draw(g, 1, 8), 8, 16, 32, 64, draw(g, 9, 40), draw(g, 33, 128), 128))
        H = draw(g, 1, 3)
        B = max(draw(g, 1, 2), -(-200 // (T * N * H * D)))
        if B * H * T * N * (T + N) * D <= work:
            return B, T, N, H, D


def random_case(number: int, kind: str, dtype: torch.dtype, work: int) -> Case:
    """Case `number` with that validity and dtype; its shape depends on the number alone."""
    g = generator(number)
    shape = random_shape(g, work)
    energy = ENERGIES[number % len(ENERGIES)]
    return Case(number, shape, kind, dtype, energy, pick(g, (1.0, 1.0, 0.3, -0.7)))


def random_valid(g: torch.Generator, shape, kind: str) -> Tensor | None:
    """Validity with dead dates, positions and samples, in storage of some strides."""
    B, T, N = shape[:3]
    if kind == "none":
        return None
    share = pick(g, (0.1, 0.5, 0.9))
    if kind == "date":
        valid = torch.rand(T, B, generator=g) < share
        return valid.T if draw(g, 0, 1) else valid.T.contiguous()
    valid = torch.rand(B, N, T, generator=g) < share
    for dead, size in ((valid, B), (valid.transpose(0, 1), N), (valid.transpose(0, 2), T)):
        if draw(g, 0, 2) == 0:
            dead[draw(g, 0, size - 1)] = False
    valid = valid.transpose(1, 2)
    layout = draw(g, 0, 3)
    if layout == 0:  # the same validity at every position, by a stride of 0
        return valid[:, :, :1].expand(B, T, N)
    return valid if layout == 1 else valid.contiguous()


def hidden_entries(valid: Tensor | None, shape) -> list[Tensor]:
    """Of each of the six inputs, which entries belong to nothing valid."""
    usable = torch.ones(shape[:3], dtype=torch.bool) if valid is None else valid
    usable = usable if usable.ndim == 3 else usable[:, :, None].expand(shape[:3])
    series, medians = ~usable, ~usable.any(1)
    return [series, series, series, medians, medians, series]


def laid_out(x: Tensor, g: torch.Generator) -> Tensor:
    """The same values in other storage, as a projection, a transposition or a slice leaves them.

    What lies between them in memory is NaN.
    """
    layout = draw(g, 0, 5)
    if layout == 0:
        return x.clone(memory_format=torch.contiguous_format)
    if layout == 1:  # one of three of a joint projection
        near = torch.full((*x.shape[:-2], 3, *x.shape[-2:]), torch.nan, dtype=x.dtype)[..., 1, :, :]
    elif layout == 2:  # positions before dates, or heads before positions
        near = torch.full(x.transpose(1, 2).shape, torch.nan, dtype=x.dtype).transpose(1, 2)
    elif layout == 3:  # rows of more channels
        near = torch.full((*x.shape[:-1], x.shape[-1] + 5), torch.nan, dtype=x.dtype)
        near = near[..., 3 : 3 + x.shape[-1]]
    elif layout == 4:  # channels not side by side
        near = torch.full(x.transpose(-1, -2).shape, torch.nan, dtype=x.dtype).transpose(-1, -2)
    else:  # dates, or of medians positions, side by side: a format that torch calls channels last
        near = torch.full(x.movedim(1, -1).shape, torch.nan, dtype=x.dtype).movedim(-1, 1)
    return near.copy_(x)


def problem(case: Case) -> tuple[list[Tensor], Tensor | None, Tensor]:
    """q, k, v, q_median, k_median and gate; validity; cotangent. Invalid entries hold NaN."""
    B, T, N, H, D = case.shape
    g = generator(case.number, KINDS.index(case.kind), case.dtype.itemsize)

    def normal(*size):
        return torch.randn(*size, generator=g)

    valid = random_valid(g, case.shape, case.kind)
    amplitude = ((100.0 if case.energy == "strong" else 0.5) / D**0.5) ** 0.5
    q, k = normal(B, T, N, H, D) * amplitude, normal(B, T, N, H, D) * amplitude
    v, cotangent = normal(B, T, N, H, D), normal(B, T, N, H, D)
    q_median, k_median = normal(B, N, H, D) * amplitude, normal(B, N, H, D) * amplitude
    gate = normal(B, T, N, H).relu()
    if case.energy == "climbing":  # the first keys say nothing about the last
        q_median[..., 0] = 16
        k_median[..., 0] = torch.linspace(-10, 14, N)[:, None]
    elif case.energy == "far":  # few positions hold the greatest energies; some dates lack them
        q_median[..., 0] = 16
        k_median[..., 0] = 0
        k_median[:, draw(g, 0, N - 1), :, 0] = pick(g, (2.0, 6.0, 25.0))
        q *= 0.2
    elif case.energy == "low":  # padding, whose energy is 0, would outweigh everything
        q_median[..., 0] = 16
        k_median[..., 0] = -16
    tensors = [x.to(case.dtype) for x in (q, k, v, q_median, k_median, gate, cotangent)]
    if draw(g, 0, 1):
        tensors[5] = tensors[5].float()
    hidden = hidden_entries(valid, case.shape)
    for x, where in zip(tensors, (*hidden, hidden[0])):
        x[where] = torch.nan
    *inputs, cotangent = [laid_out(x, g) for x in tensors]
    return inputs, valid, cotangent


NAMES = ("out", "q", "k", "v", "q_median", "k_median", "gate")


def gyroscope(case: Case) -> Callable[..., None]:
    """A check of output and gradients; its arguments are those that choose a backend."""
    inputs, valid, cotangent = problem(case)
    hidden = hidden_entries(valid, case.shape)
    kept = [x.clone() for x in (*inputs, cotangent)]
    low = [x.nan_to_num() for x in kept]
    wide = [x.double() for x in low]
    exact = evaluate(direct, wide[:6], valid, wide[6], case.scale)
    plain = evaluate(direct, [x.to(case.dtype) for x in low[:6]], valid, low[6], case.scale)
    terms = magnitudes(wide[:6], valid, wide[6], case.scale, case.dtype)

    def check(**backend):
        with guarded():
            got = evaluate(gyroscope_attention, inputs, valid, cotangent, case.scale, **backend)
        for name, x, y, p, m in zip(NAMES, got, exact, plain, terms):
            assert_close(x, y, p, name, m)
        for name, x, like in zip(NAMES, got, (inputs[0], *inputs)):
            assert x.dtype == like.dtype, name
        for name, x, where in zip(NAMES, got, (hidden[0], *hidden)):
            assert not x[where].any(), f"{name} is not exactly 0 where nothing is valid"
        for x, y in zip((*inputs, cotangent), kept):
            assert same_bits(x, y), "an input was written to"

    return check


def evaluate(op, inputs, valid, cotangent, scale, **backend) -> list[Tensor]:
    """Output and the six gradients."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = op(*leaves, valid, scale, **backend)
    return [out.detach(), *torch.autograd.grad(out, leaves, cotangent)]


def median(case: Case) -> Callable[..., None]:
    """The same of temporal_median, which must be exact."""
    g = generator(case.number, KINDS.index(case.kind), case.dtype.itemsize)
    x = torch.randn(case.shape, generator=g)
    x = torch.where(torch.rand(x.shape, generator=g) < 0.5, (x * 2).round() / 2, x)  # ties
    x = laid_out(x.to(case.dtype), g)
    valid = random_valid(g, case.shape, case.kind)
    hidden = hidden_entries(valid, case.shape)[0]
    x[hidden] = torch.nan
    kept = x.clone()
    # Of the valid dates in order, the one in the middle; the first date that holds its value.
    count = (~hidden).sum(1)[:, None, :, None, None]  # [B, 1, N, 1, 1]
    ranked = x.double().masked_fill(hidden[..., None, None], torch.inf).sort(1).values
    middle = ((count - 1) // 2).clamp_min(0).expand(-1, 1, -1, *x.shape[3:])
    values = torch.where(count > 0, ranked.gather(1, middle), 0)
    indices = (x == values).to(torch.uint8).argmax(1, keepdim=True)
    indices = torch.where(count > 0, indices, -1)
    cotangent = laid_out(torch.randn(values[:, 0].shape, generator=g).to(case.dtype), g)
    date = torch.arange(case.shape[1]).view(1, -1, 1, 1, 1)
    grad = torch.where(indices == date, cotangent[:, None], 0)

    def check(**backend):
        leaf = x.detach().requires_grad_()
        with guarded():
            out, where = temporal_median(leaf, valid, **backend)
            (got,) = torch.autograd.grad(out, leaf, cotangent)
        assert torch.equal(out.double(), values[:, 0]), "values"
        assert torch.equal(where, indices[:, 0]), "indices"
        assert torch.equal(got, grad), "gradient"
        assert same_bits(x, kept), "the input was written to"

    return check


def deviation(case: Case) -> Callable[..., None]:
    """The same of median_deviation; with a weight in half or single precision."""
    g = generator(case.number, KINDS.index(case.kind), case.dtype.itemsize)
    q = torch.randn(case.shape, generator=g)
    q = torch.where(torch.rand(q.shape, generator=g) < 0.5, (q * 2).round() / 2, q)  # ties
    q = laid_out(q.to(case.dtype), g)
    valid = random_valid(g, case.shape, case.kind)
    weight = torch.randn(case.shape[4], generator=g).to(pick(g, (case.dtype, torch.float32)))
    dvalues = laid_out(torch.randn(q[:, 0].shape, generator=g).to(case.dtype), g)
    ddeviation = torch.randn(case.shape[:4], generator=g)
    series, *_, medians, _ = hidden_entries(valid, case.shape)
    q[series], ddeviation[series], dvalues[medians] = torch.nan, torch.nan, torch.nan
    indices = temporal_median(q, valid, backend="reference")[1]
    kept = [x.clone() for x in (q, weight, dvalues, ddeviation)]

    def check(**backend):
        with guarded():
            where, got = of_deviation.run(q, weight, valid, dvalues, ddeviation, **backend)
        assert torch.equal(where, indices), "indices"
        of_deviation.check(got, q, weight, valid, indices, dvalues, ddeviation)
        for x, y in zip((q, weight, dvalues, ddeviation), kept):
            assert same_bits(x, y), "an input was written to"

    return check


def same_bits(x: Tensor, y: Tensor) -> bool:
    return torch.equal(x.isnan(), y.isnan()) and torch.equal(x.nan_to_num(), y.nan_to_num())


CHECKS = {
    "gyroscope_attention": gyroscope,
    "temporal_median": median,
    "median_deviation": deviation,
}
