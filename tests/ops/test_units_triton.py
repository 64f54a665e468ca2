"""The Triton kernels of the unit ops beyond parity: dtypes of tiles, far offsets, launches."""

import os

import pytest
import torch

from tests.ops.test_gather_units import draw_ids, loop, make, spread
from tests.tolerance import assert_close
from timo.ops import gather_units

pytest.importorskip("triton")
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler.compiler import make_backend  # noqa: E402
from triton.runtime.jit import JITFunction, create_function_from_signature  # noqa: E402

from timo.kernels import gather_units as gather_kernels  # noqa: E402

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
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
        counts.append(len(launches))
    assert counts == [3] * 4, launches
