"""The Triton kernels of the unit ops beyond parity: dtypes of tiles, far offsets, launches."""

import os

import numpy as np
import pytest
import torch

from tests.ops.test_gather_units import draw_ids, loop, make, spread
from tests.ops.test_masked_pixel_loss import NORMS
from tests.ops.test_masked_pixel_loss import loop as loss_loop
from tests.ops.test_scatter_units import loop as scatter_loop
from tests.tolerance import assert_close
from timo.ops import gather_units, masked_pixel_loss, scatter_units
from timo.ops.masked_pixel_loss import BACKWARD as LOSS_BACKWARD
from timo.ops.masked_pixel_loss import FORWARD as LOSS_FORWARD

pytest.importorskip("triton")
import triton.language as tl  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler.compiler import make_backend  # noqa: E402
from triton.runtime.jit import JITFunction, create_function_from_signature  # noqa: E402

from timo.kernels import gather_units as gather_kernels  # noqa: E402
from timo.kernels import masked_pixel_loss as loss_kernels  # noqa: E402
from timo.kernels import scatter_units as scatter_kernels  # noqa: E402

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
BACKEND, DEVICE = "triton", "cpu" if INTERPRETED else "cuda"
PROVES = ("gather_units", "masked_pixel_loss", "scatter_units")
runs = pytest.mark.skipif(
    DEVICE == "cuda" and not torch.cuda.is_available(),
    reason="no GPU, and TRITON_INTERPRET is not 1",
)
RAW = torch.uint8, torch.uint16, torch.float16, torch.bfloat16, torch.float32
FLOATS = RAW[2:]
FAR = 2**31 + 64


@runs
@pytest.mark.parametrize("frames_dtype", RAW)
@pytest.mark.parametrize("dtype", FLOATS)
def test_gather_dtypes(frames_dtype, dtype, poisoned):
    """Every dtype of frames and tiles; nothing of a masked unit comes through."""
    case = (1, 2, 2, 19, 13, 8, (3, 2), 5)
    frames, ids, scale, offset, valid = make(case, "pixel", frames_dtype, 1)
    scale = scale if frames_dtype.is_floating_point else scale / torch.iinfo(frames_dtype).max
    leaf = frames.double().requires_grad_()
    exact = loop(leaf, ids, scale, offset, valid, 8, (3, 2))
    cotangent = torch.randn(exact.shape, generator=torch.Generator().manual_seed(2)).to(dtype)
    (expected,) = torch.autograd.grad(exact, leaf, cotangent.double())
    if frames_dtype.is_floating_point:
        units = torch.zeros(1, 12, dtype=torch.bool).scatter(1, ids, True).view(1, 2, 3, 2)
        seen = units.repeat_interleave(8, 2).repeat_interleave(8, 3)[:, :, :19, :13]
        frames[~(seen & spread(valid, frames))[:, :, None].expand(frames.shape)] = torch.nan
    there = [x.to(DEVICE) for x in (frames, ids, scale, offset, valid)]
    there[0].requires_grad_(frames_dtype.is_floating_point)
    tiles = gather_units(
        *there[:2], scale=there[2], offset=there[3], valid=there[4], unit=8, dtype=dtype,
        backend="triton",
    )  # fmt: skip
    assert tiles.dtype == dtype
    assert_close(tiles.detach().cpu(), exact.detach())
    if frames_dtype.is_floating_point:
        (grad,) = torch.autograd.grad(tiles, there[0], cotangent.to(DEVICE))
        assert grad.dtype == frames_dtype
        assert_close(grad.cpu(), expected)


def far_frames(far_stride: int, generator: torch.Generator) -> torch.Tensor:
    """Frames (2, 2, 2, 4, 4) with one stride beyond 2^31; only the pages that are touched exist."""
    strides = [128, 64, 32, 8, 1]
    strides[far_stride] = FAR
    reach = FAR * (3 if far_stride == 3 else 1) + 256
    storage = torch.empty(reach, dtype=torch.uint8, device=DEVICE)
    frames = storage.as_strided((2, 2, 2, 4, 4), strides)
    drawn = torch.randint(0, 256, frames.shape, generator=generator, dtype=torch.uint8)
    return frames.copy_(drawn)


@runs
@pytest.mark.parametrize("far_stride", range(4))
def test_far_frames(far_stride):
    frames = far_frames(far_stride, torch.Generator().manual_seed(3))
    ids = torch.tensor([[0, 3, 6, 7], [0, 2, 4, 7]], device=DEVICE)
    near = frames.contiguous()
    for kind in (None, (2, 2), (2, 2, 4, 4)):
        valid = None
        if kind:
            valid = torch.ones(kind, dtype=torch.bool, device=DEVICE)
            valid[1, 0] = False
        arguments = {"valid": valid, "unit": 2, "halo": (1, 1), "backend": "triton"}
        tiles = gather_units(frames, ids, **arguments)
        assert tiles.any() and torch.equal(tiles, gather_units(near, ids, **arguments))


@runs
@pytest.mark.parametrize("far_stride", range(4))
def test_far_frames_of_the_loss(far_stride):
    frames = far_frames(far_stride, torch.Generator().manual_seed(4))
    ids = torch.tensor([[1, 6], [3, 7]], device=DEVICE)
    pred = torch.randn(2, 2, 8, generator=torch.Generator().manual_seed(5)).to(DEVICE)
    results = []
    for x in (frames, frames.contiguous()):
        leaf = pred.clone().requires_grad_()
        loss = masked_pixel_loss(leaf, x, ids, unit=2, norm="patch", backend="triton")
        results.append((loss.detach(), *torch.autograd.grad(loss, leaf)))
    assert results[0][0] > 0 and all(map(torch.equal, *results))


interpreted = pytest.mark.skipif(not INTERPRETED, reason="launches single programs: see test")


@pytest.fixture
def only_program(monkeypatch):
    """Launches of a single program, whose number is set by a call of this."""
    from triton.runtime import interpreter as triton_interpreter

    def be(number):
        handle = triton_interpreter.TensorHandle(np.array([number], np.int32), tl.int32)
        builder = triton_interpreter.interpreter_builder
        monkeypatch.setattr(builder, "create_get_program_id", lambda axis: handle)

    return be


@interpreted
def test_far_tiles(only_program):
    """The first tile of a second sample, 2^31 elements away; whole launches would fill memory."""
    K, size = 2**25, 64
    ids = torch.empty(K + 1, dtype=torch.int64)
    tiles = torch.empty((K + 1) * size, dtype=torch.float16)
    frames = torch.arange(128.0).view(2, 1, 1, 8, 8)
    places = torch.zeros(2, 1, dtype=torch.int32)
    ids[0] = ids[K] = 0
    constants = {"UNIT": 8, "BEFORE": 0, "BANDS": 1, "BLOCK": size}
    constants |= {"HAS_SCALE": False, "HAS_VALID": False}
    only_program(K)
    gather_kernels.gather_kernel[(1,)](
        frames, ids, places, None, None, None, tiles, 1, 1, 8, 8, K,
        *frames.stride(), 0, 0, 0, 0, HAS_OFFSET=False, SIZE=8, **constants,
    )  # fmt: skip
    assert torch.equal(tiles[-size:], torch.arange(64.0, 128.0).half())
    out = torch.full_like(frames, torch.nan)
    only_program(1)
    gather_kernels.gather_backward_kernel[(1,)](
        tiles, places, None, None, out, 1, 1, 8, 8, K, 0, 0, 0, 0, AFTER=0, **constants
    )
    assert torch.equal(out[1], frames[1])


@interpreted
def test_far_rows():
    """The first channels of 3 rows of 2^30, forward and backward."""
    D, units = 2**30, 3
    memory = [torch.empty(2 * D + 128, dtype=torch.float16) for _ in range(3)]
    tokens, position, out = (x.as_strided((units, 128), (D, 1)) for x in memory)
    places = torch.tensor([[-1, 1, 2]], dtype=torch.int32)
    rows = torch.arange(3.0)[:, None].expand(units, 128)
    tokens.copy_(rows)
    position.copy_(10 * rows)
    constants = {"ROWS": 4, "BLOCK": 128}
    scatter_kernels.scatter_kernel[(1,)](
        tokens, places, torch.full((128,), 100.0), position, out, units, units, D, **constants
    )
    assert out.unique(dim=1).flatten().tolist() == [100, 11, 22]
    partial = torch.full((128,), torch.nan)
    scatter_kernels.scatter_backward_kernel[(1,)](
        out, places, tokens, partial, units, units, D, **constants
    )
    assert tokens.unique(dim=1).flatten().tolist() == [0, 11, 22]
    assert (partial == 100).all()


@runs
@pytest.mark.parametrize("frames_dtype", RAW)
@pytest.mark.parametrize("norm", NORMS)
def test_loss_dtypes(frames_dtype, norm, poisoned):
    """Every dtype of frames, in rows that wide loads can take; all outputs; backends mix."""
    case = (2, 2, 2, 20, 32, 8, None, 5)
    frames, ids, scale, offset, valid = make(case, "pixel", frames_dtype, 6)
    frames = frames.contiguous()
    scale = scale if frames_dtype.is_floating_point else scale / torch.iinfo(frames_dtype).max
    dtype = FLOATS[(RAW.index(frames_dtype) + NORMS.index(norm)) % 3]
    pred = torch.randn(2, 5, 128, generator=torch.Generator().manual_seed(7)).to(dtype)
    wide = pred.double().requires_grad_()
    exact = loss_loop(wide, frames, ids, scale, offset, valid, 8, norm)
    (exact_grad,) = torch.autograd.grad(exact, wide, torch.tensor(0.75).double())
    if frames_dtype.is_floating_point:
        frames[~valid[:, :, None].expand(frames.shape)] = torch.nan
    tensors = pred, frames, ids, scale, offset, valid
    there = [x.to(DEVICE) for x in tensors]
    assert loss_kernels.arguments(there[1], 5, None, None, None, 8)[2]["STEP"] == 16
    got = LOSS_FORWARD.backends["triton"].run(*there, 8, norm)
    expected = LOSS_FORWARD.backends["reference"].run(
        pred.double(), frames, ids, scale.double(), offset.double(), valid, 8, norm
    )
    assert_close(got[0].cpu(), exact.detach(), name="loss")
    for name, x, y in zip(("mean", "rstd"), got[1:3], expected[1:3]):
        assert x.dtype == torch.float32
        assert_close(x.cpu(), y, name=name)
    assert torch.equal(got[3].cpu(), expected[3])
    plain = LOSS_FORWARD.backends["reference"].run(*there, 8, norm)
    grad = torch.tensor(0.75, device=DEVICE)
    for name, saved in (("triton", got), ("triton", plain), ("reference", got)):
        x = LOSS_BACKWARD.backends[name].run(grad, *there, 8, *saved[1:])
        assert x.dtype == dtype
        assert_close(x.cpu(), exact_grad, name="gradient")


@runs
def test_mean_is_rounded_once():
    """Of large numbers too: what the first pass lost, the second adds."""
    g = torch.Generator().manual_seed(1)
    frames = 65000 + torch.randint(0, 4, (1, 1, 7, 32, 32), generator=g)
    pred = torch.zeros(1, 1, 7 * 1024, device=DEVICE)
    ids = torch.zeros(1, 1, dtype=torch.int64, device=DEVICE)
    there = frames.to(torch.uint16).to(DEVICE)
    _, mean, _, _ = loss_kernels.forward(pred, there, ids, None, None, None, 32, "patch")
    assert abs(mean.item() - frames.double().mean().item()) < 0.51 * 2**-8


@runs
def test_same_bits_twice_and_strided_constants():
    """Sums are in one order; scale, offset, tokens and gradients may lie apart."""
    frames, ids, scale, offset, valid = make((2, 2, 3, 20, 13, 8, None, 5), "date", RAW[4], 8)
    pred = torch.randn(2, 3 * 64, 5).transpose(1, 2)
    apart = [torch.stack([x, x], 1)[:, 0].to(DEVICE) for x in (scale, offset)]
    there = [x.to(DEVICE) for x in (frames, ids, valid, pred)]

    def run(scale, offset):
        frames, ids, valid, pred = there
        frames, pred = frames.clone().requires_grad_(), pred.clone().requires_grad_()
        options = {"scale": scale, "offset": offset, "valid": valid, "backend": "triton"}
        tiles = gather_units(frames, ids, unit=8, **options)
        cotangent = torch.arange(tiles.numel(), device=DEVICE) % 7
        cotangent = cotangent.view(tiles.shape[::-1]).permute(4, 3, 2, 1, 0).to(tiles.dtype)
        loss = masked_pixel_loss(pred, frames.detach(), ids, unit=8, norm="batch", **options)
        grads = torch.autograd.grad(tiles, frames, cotangent), torch.autograd.grad(loss, pred)
        return tiles, loss, grads[0][0], grads[1][0]

    first, second = run(*apart), run(scale.to(DEVICE), offset.to(DEVICE))
    assert all(map(torch.equal, first, second))


@runs
@pytest.mark.parametrize("D", [200, 130])
def test_wide_rows_and_many_units(D, poisoned):
    """Several blocks of channels and of units; the mask token's gradient in two stages."""
    g = torch.Generator().manual_seed(9)
    B, K, units = 2, 9, 70
    tokens, mask_token = torch.randn(B, K, D, generator=g), torch.randn(D, generator=g)
    position, cotangent = torch.randn(units, D, generator=g), torch.randn(B, units, D, generator=g)
    ids = draw_ids(B, units, K, g)
    inputs = tokens, mask_token, position
    wide = [x.double().requires_grad_() for x in inputs]
    exact = scatter_loop(wide[0], ids, *wide[1:])
    expected = exact.detach(), *torch.autograd.grad(exact, wide, cotangent.double())
    there = [x.to(DEVICE).requires_grad_() for x in inputs]
    out = scatter_units(there[0], ids.to(DEVICE), *there[1:], backend="triton")
    got = out.detach(), *torch.autograd.grad(out, there, cotangent.to(DEVICE))
    for name, x, y in zip(("out", "tokens", "mask_token", "position"), got, expected):
        assert_close(x.cpu(), y, name=name)


@runs
def test_places():
    """Bisection among any number of ids, up to all units."""
    for units in (1, 2, 3, 300):
        for K in sorted({1, 2, units // 2, units - 1, units} & set(range(1, units + 1))):
            ids = draw_ids(2, units, K, torch.Generator().manual_seed(units + K))
            places = gather_kernels.places(ids.to(DEVICE), units).cpu()
            expected = torch.full((2, units), -1).scatter(1, ids, torch.arange(K).expand(2, K))
            assert torch.equal(places.long(), expected), (units, K)


@runs
def test_ids_out_of_range_read_nothing():
    """They are not checked on a GPU; the kernels called directly show what happens there."""
    frames = torch.ones(1, 1, 1, 4, 4, device=DEVICE)
    ids = torch.tensor([[-5, 0, 4, 2**40]], device=DEVICE)
    tiles = gather_kernels.forward(frames, ids, None, None, None, 2, 0, 0, torch.float32)
    assert tiles.flatten(1).sum(1).item() == 4 and tiles[0, 1].all()
    pred = torch.zeros(1, 4, 4, device=DEVICE)
    loss, *_, count = loss_kernels.forward(pred, frames, ids, None, None, None, 2, "none")
    assert loss == 1 and count == 4


@pytest.fixture
def launches(monkeypatch):
    """What launches would compile for sm_90, without running anything."""
    if INTERPRETED:
        pytest.skip("the interpreter compiles nothing")
    backend = make_backend(GPUTarget("cuda", 90, 32))
    seen = set()

    def run(kernel, *args, grid, warmup, **options):
        bind = create_function_from_signature(kernel.signature, kernel.params, backend)
        _, specialization, options = bind(*args, **options)
        seen.add((kernel.__name__, str(specialization), str(options)))

    monkeypatch.setattr(JITFunction, "run", run)
    return seen


def test_new_sizes_compile_nothing(launches):
    """Sizes of batch, dates and units that are 1, odd, even and multiples of 16."""
    counts = []
    for B, T, K in ((1, 1, 1), (2, 3, 5), (16, 16, 16), (32, 48, 64)):
        frames = torch.zeros(B, T, 3, 20, 13)
        valid = torch.ones(B, T, 20, 13, dtype=torch.bool)
        g = torch.Generator().manual_seed(B)
        ids = draw_ids(B, T * 6, K, g)
        ones = torch.ones(3)
        tiles = gather_kernels.forward(frames, ids, ones, ones, valid, 8, 3, 2, torch.float32)
        gather_kernels.backward(tiles, ids, ones, valid, T, 20, 13, 8, 3, 2, torch.float32)
        tokens, sequence = torch.zeros(B, K, 48), torch.zeros(B, T * 6, 48)
        scatter_kernels.forward(tokens, ids, torch.zeros(48), sequence[0])
        scatter_kernels.backward(sequence, ids, torch.float32)
        pred = torch.zeros(B, K, 3 * 64)
        arguments = pred, frames, ids, ones, ones, valid, 8
        saved = loss_kernels.forward(*arguments, "batch")
        loss_kernels.backward(saved[0], *arguments, *saved[1:])
        counts.append(len(launches))
    assert counts == [10] * 4, launches
