"""temporal_median: every backend against a loop over single channels in float64."""

import os

import pytest
import torch

import timo
from tests.ops import tiers
from tests.ops.backends import cases, skip_reason
from timo.ops import dispatch
from timo.ops.temporal_median import FORWARD

SHAPES = [
    (1, 1, 1, 1, 1),
    (2, 2, 3, 1, 8),
    (1, 3, 5, 2, 16),
    (2, 4, 7, 3, 5),
    (1, 7, 33, 2, 32),
    (1, 10, 9, 1, 65),
    (1, 38, 2, 4, 32),
    (1, 128, 2, 1, 9),
]


def loop(x, valid):
    """Definition, one channel at a time."""
    B, T, N, H, D = x.shape
    values = torch.zeros(B, N, H, D, dtype=x.dtype)
    indices = torch.full((B, N, H, D), -1)
    if valid is None:
        valid = torch.ones(B, T, N, dtype=torch.bool)
    if valid.ndim == 2:
        valid = valid[:, :, None].expand(B, T, N)
    for b in range(B):
        for n in range(N):
            dates = valid[b, :, n].nonzero().flatten()
            if len(dates) == 0:
                continue
            for h in range(H):
                for d in range(D):
                    column = x[b, dates, n, h, d].tolist()
                    middle = sorted(column)[(len(column) - 1) // 2]
                    indices[b, n, h, d] = dates[column.index(middle)]
                    values[b, n, h, d] = middle
    return values, indices


def make(shape, dtype, kind, seed, device="cpu"):
    """Values with many ties, in storage whose strides differ from the dense ones."""
    B, T, N, H, D = shape
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(B, N, T, 2, H, D, generator=g)
    x = torch.where(torch.rand(x.shape, generator=g) < 0.5, (x * 2).round() / 2, x).to(dtype)
    x = x[:, :, :, 1].transpose(1, 2)
    shapes = {"none": None, "date": (B, T), "position": (B, T, N)}
    size = shapes[kind]
    valid = None if size is None else torch.rand(size, generator=g) < 0.6
    return x.to(device), None if valid is None else valid.to(device)


@pytest.mark.parametrize("backend, device, dtype", cases(FORWARD))
@pytest.mark.parametrize("kind", ["none", "date", "position"])
def test_parity(backend, device, dtype, kind, poisoned):
    if why := skip_reason(backend, device):
        pytest.skip(why)
    shapes = SHAPES if backend != dispatch.TRITON or device == "cuda" else SHAPES[:6]
    for seed, shape in enumerate(shapes):
        x, valid = make(shape, dtype, kind, seed, device)
        kept = x.clone()
        x.requires_grad_()
        values, indices = timo.ops.temporal_median(x, valid, backend=backend)
        expected, where = loop(kept.cpu(), None if valid is None else valid.cpu())
        assert torch.equal(values.cpu(), expected), (backend, shape)
        assert torch.equal(indices.cpu(), where), (backend, shape)
        cotangent = torch.randn(values.shape).to(dtype).to(device)
        (grad,) = torch.autograd.grad(values, x, cotangent)
        date = torch.arange(shape[1]).view(1, -1, 1, 1, 1)
        assert torch.equal(
            grad.cpu(), torch.where(where[:, None] == date, cotangent.cpu()[:, None], 0)
        )
        assert torch.equal(x.detach(), kept), "the input was written to"


@pytest.mark.parametrize("backend, device, dtype", cases(FORWARD))
def test_not_a_number_is_returned(backend, device, dtype):
    if why := skip_reason(backend, device):
        pytest.skip(why)
    x = torch.tensor([3.0, float("nan"), 1.0, float("inf"), -float("inf")], dtype=dtype)
    x = x.view(1, 5, 1, 1, 1).to(device)
    values, indices = timo.ops.temporal_median(x, backend=backend)
    assert values.isnan().all() and indices.item() == 1
    hidden = torch.tensor([[True, False, True, True, True]], device=device)
    values, indices = timo.ops.temporal_median(x, hidden, backend=backend)
    assert values.item() == 1.0 and indices.item() == 2


@pytest.mark.parametrize("tier", tiers.OF_ALL_OPS)
def test_every_instruction_set(tier):
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        x, valid = make((2, 9, 5, 2, 40), dtype, "position", 3)
        expected = loop(x, valid)
        with tiers.forced(tier):
            got = timo.ops.temporal_median(x, valid, backend="cpp")
        assert all(map(torch.equal, got, expected))


def test_half_widens_exactly():
    """All 65,536 float16 values through the compiled kernel's own conversion."""
    if dispatch.unavailable("cpp"):
        pytest.skip("timo._C is not built")
    every = torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16).view(torch.float16)
    every = every[~every.isnan()]
    shuffled = every[torch.randperm(len(every), generator=torch.Generator().manual_seed(0))]
    x = torch.stack([every, shuffled, every.flip(0)]).view(1, 3, 1, 1, -1)
    values, _ = timo.ops.temporal_median(x, backend="cpp")
    assert torch.equal(values[0, 0, 0], x.double()[0, :, 0, 0].median(0).values.half())


def test_gradients():
    x, valid = make((2, 3, 2, 1, 4), torch.float64, "position", 5)
    x = torch.randperm(x.numel()).view(x.shape).double().requires_grad_()
    for v in (None, valid):
        assert torch.autograd.gradcheck(lambda x, v=v: timo.ops.temporal_median(x, v)[0], x)
        assert torch.autograd.gradgradcheck(lambda x, v=v: timo.ops.temporal_median(x, v)[0], x)


def test_registration():
    x, valid = make((2, 3, 4, 1, 8), torch.float32, "date", 1)
    torch.library.opcheck(
        torch.ops.timo.temporal_median.default, (x.clone().requires_grad_(), valid, "auto")
    )
    values, indices = timo.ops.temporal_median(x, valid)
    torch.library.opcheck(
        torch.ops.timo.temporal_median_backward.default,
        (values.clone().requires_grad_(), indices, 3, "auto"),
    )
    values, indices = (y.transpose(1, 2).contiguous().transpose(1, 2) for y in (values, indices))
    torch.library.opcheck(
        torch.ops.timo.temporal_median_backward.default, (values, indices, 3, "reference")
    )


def test_compiles_whole_and_dynamic():
    def step(x, valid):
        values, _ = timo.ops.temporal_median(x, valid)
        return values * 2

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for shape in ((3, 5, 7, 2, 8), (4, 6, 9, 2, 8), (6, 9, 4, 2, 8)):  # no size twice
            x, valid = make(shape, torch.float32, "date", 0)
            x = x.contiguous()
            assert torch.equal(compiled(x, valid), step(x, valid))


def test_exports():
    class Median(torch.nn.Module):
        def forward(self, x):
            return timo.ops.temporal_median(x)[0]

    x, _ = make((2, 3, 4, 2, 8), torch.float32, "none", 0)
    program = torch.export.export(Median(), (x,), dynamic_shapes=({0: torch.export.Dim("B")},))
    assert torch.equal(program.module()(x), Median()(x))


@pytest.mark.parametrize(
    "x, valid, error, words",
    [
        (torch.zeros(2, 3), None, ValueError, r"x has shape \(2, 3\).*\(B, T, N, H, D\)"),
        (torch.zeros(1, 0, 2, 1, 4), None, ValueError, r"T is 0"),
        (torch.zeros(1, 2, 2, 1, 4).int(), None, TypeError, "x is int32.*float32"),
        (torch.zeros(1, 2, 2, 1, 4), torch.ones(1, 3).bool(), ValueError, r"\(B, T\) = \(1, 2\)"),
        (torch.zeros(1, 2, 2, 1, 4), torch.ones(1, 2), TypeError, "valid is float32"),
        ([1.0], None, TypeError, "x is list"),
    ],
)
def test_bad_input(x, valid, error, words):
    with pytest.raises(error, match=words):
        timo.ops.temporal_median(x, valid)


@pytest.mark.parametrize("backend", ["cpp", "triton"])
def test_offsets_beyond_32_bits(backend):
    """Views whose last date lies beyond 2^31 elements; only the pages they touch exist."""
    if why := skip_reason(backend, "cpu"):
        pytest.skip(why)
    far, dates = 2**30, 4  # a stride of 32 bits, an offset of more
    storage = torch.empty(3 * far + 8, dtype=torch.int16).view(torch.bfloat16)
    x = storage.as_strided((1, dates, 1, 1, 8), (0, far, 8, 8, 1))
    for t in range(dates):
        x[0, t] = 5.0 - t
    valid = torch.empty(3 * far + 1, dtype=torch.bool).as_strided((1, dates, 1), (0, far, 1))
    valid.copy_(torch.tensor([True, False, True, True]).view(valid.shape))
    values, indices = timo.ops.temporal_median(x, backend=backend)
    assert (values == 3).all() and (indices == 2).all()
    values, indices = timo.ops.temporal_median(x, valid, backend=backend)
    assert (values == 3).all() and (indices == 2).all()
    valid[0, 2] = False
    values, indices = timo.ops.temporal_median(x, valid, backend=backend)
    assert (values == 2).all() and (indices == 3).all()


def test_triton_interpreter_was_on_where_the_suite_asks_for_it():
    """`make test` sets TRITON_INTERPRET=1 for the kernels' tests; then they must not be skipped."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("TRITON_INTERPRET is not 1")
    assert skip_reason("triton", "cpu") is None
