"""The C++ and CUDA kernels of the unit ops beyond parity: dtypes, layouts, threads, far offsets."""

import pytest
import torch

from tests.ops import tiers
from tests.ops.test_gather_units import CASES, KINDS, draw_ids, loop, make, spread
from tests.ops.test_masked_pixel_loss import check
from tests.ops.test_masked_pixel_loss import loop as loss_loop
from tests.ops.test_masked_pixel_loss import make as make_loss
from tests.ops.test_scatter_units import make as make_scatter
from tests.tolerance import assert_close
from timo.ops import dispatch, gather_units, masked_pixel_loss, scatter_units, temporal_median
from timo.ops.gather_units import HALF_AND_SINGLE, NARROW

FAR = 2**31 + 64
PLACES = [("cpp", "cpu")] + [("cuda", "cuda")] * torch.cuda.is_available()
compiled = pytest.mark.parametrize("backend, device", PLACES)


PROVES = ("gather_units", "masked_pixel_loss", "scatter_units")
pytestmark = pytest.mark.skipif(
    dispatch.unavailable("cpp") is not None, reason="timo._C is not built"
)


def to(device, *tensors):
    return [None if x is None else x.to(device) for x in tensors]


@compiled
@pytest.mark.parametrize("frames_dtype", NARROW)
@pytest.mark.parametrize("dtype", HALF_AND_SINGLE)
def test_gather_dtypes(backend, device, frames_dtype, dtype, poisoned):
    """Every pair of dtypes, at every case and kind of validity; masked units hold NaN."""
    for seed, case in enumerate(CASES):
        unit, halo = case[5:7]
        kind = KINDS[(seed + HALF_AND_SINGLE.index(dtype)) % 3]
        frames, ids, scale, offset, valid = make(case, kind, frames_dtype, seed + 50)
        if not frames_dtype.is_floating_point:
            scale = scale / torch.iinfo(frames_dtype).max
        leaf = frames.double().requires_grad_()
        exact = loop(leaf, ids, scale, offset, valid, unit, halo)
        cotangent = torch.randn(exact.shape).to(dtype)
        (expected,) = torch.autograd.grad(exact, leaf, cotangent.double())
        if frames_dtype.is_floating_point:
            seen = seen_pixels(frames, ids, valid, unit)
            frames = torch.where(seen, frames, torch.nan)
        frames, *given, cotangent = to(device, frames, ids, scale, offset, valid, cotangent)
        frames.requires_grad_(frames_dtype.is_floating_point)
        tiles = gather_units(
            frames, given[0], scale=given[1], offset=given[2], valid=given[3], unit=unit,
            halo=halo, dtype=dtype, backend=backend,
        )  # fmt: skip
        assert tiles.dtype == dtype
        assert_close(tiles.detach().cpu(), exact.detach(), name=f"{case} {kind}")
        if frames.requires_grad:
            (grad,) = torch.autograd.grad(tiles, frames, cotangent)
            assert_close(grad.cpu(), expected, name=f"gradient {case} {kind}")
            hidden = ~seen.expand(grad.shape)
            assert (grad.cpu()[hidden] == 0).all(), "a hidden pixel has a gradient"


def seen_pixels(frames, ids, valid, unit):
    """Valid pixels of visible units, (B, T, 1, H, W)."""
    B, T, _, H, W = frames.shape
    h, w = -(-H // unit), -(-W // unit)
    units = torch.zeros(B, T * h * w, dtype=torch.bool).scatter(1, ids, True).view(B, T, h, w)
    units = units.repeat_interleave(unit, 2).repeat_interleave(unit, 3)[..., :H, :W]
    return (units & spread(valid, frames))[:, :, None]


LARGE = [  # all units, more bands than are kept at a time, bands that are not kept whole, long rows
    (1, 1, 2, 20, 24, 4, (3, 2), 30),
    (2, 2, 41, 16, 24, 8, (3, 2), 5),
    (1, 1, 2, 100, 164, 80, (3, 2), 3),
    (1, 2, 3, 61, 90, 75, (1, 5), 2),
    (1, 1, 1, 9, 40, 2600, (0, 1), 1),
    (1, 1, 1, 3, 3, 1, (50, 50), 4),  # neighbours fill the shared memory beside a tile
]


@compiled
@pytest.mark.parametrize("dense", [True, False])
@pytest.mark.parametrize("frames_dtype", [torch.uint8, torch.uint16, torch.float32])
def test_large_tiles(backend, device, frames_dtype, dense, poisoned):
    for seed, case in enumerate(LARGE):
        unit, halo = case[5:7]
        frames, ids, scale, offset, valid = make(case, KINDS[seed % 3], frames_dtype, seed)
        exact = loop(frames, ids, scale, offset, valid, unit, halo)
        frames = frames.contiguous() if dense else frames
        frames, ids, *given = to(device, frames, ids, scale, offset, valid)
        tiles = gather_units(
            frames, ids, scale=given[0], offset=given[1], valid=given[2], unit=unit, halo=halo,
            dtype=torch.float32, backend=backend,
        )  # fmt: skip
        assert_close(tiles.cpu(), exact, name=f"{case}")


@compiled
@pytest.mark.parametrize("norm", ["none", "patch", "batch"])
@pytest.mark.parametrize("dense", [True, False])
def test_loss_of_wide_units(backend, device, norm, dense, poisoned):
    """Bands and rows longer than a vector; dense frames, and frames whose columns lie apart."""
    case = (2, 2, 3, 75, 132, 36, None, 5)
    for kind in KINDS:
        args = make_loss(case, kind, torch.float32, torch.uint16, 7)
        pred, frames, ids, scale, offset, valid = args
        frames = frames.contiguous() if dense else frames
        leaf = pred.double().requires_grad_()
        exact = loss_loop(leaf, *args[1:], 36, norm)
        (expected,) = torch.autograd.grad(exact, leaf, torch.tensor(0.3).double())
        pred, frames, ids, scale, offset, valid = to(
            device, pred, frames, ids, scale, offset, valid
        )
        pred.requires_grad_()
        loss = masked_pixel_loss(
            pred, frames, ids, scale=scale, offset=offset, valid=valid, unit=36, norm=norm,
            backend=backend,
        )  # fmt: skip
        (grad,) = torch.autograd.grad(loss, pred, torch.tensor(0.3, device=device))
        check(loss.detach().cpu(), exact.detach(), f"{kind} {norm}")
        check(grad.cpu(), expected, f"gradient {kind} {norm}")


@compiled
@pytest.mark.parametrize("norm", ["none", "patch", "batch"])
def test_internal_results_of_the_loss(backend, device, norm, poisoned):
    """Mean, rstd and count, which backward depends on, as the reference gives them in float64."""
    args = make_loss((2, 3, 2, 20, 13, 8, None, 7), "pixel", torch.float32, torch.float32, 2)
    exact = torch.ops.timo.masked_pixel_loss(
        args[0].double(), args[1], args[2], args[3].double(), args[4].double(), args[5], 8, norm,
        "reference",
    )  # fmt: skip
    got = torch.ops.timo.masked_pixel_loss(*to(device, *args), 8, norm, backend)
    for name, x, y in zip(("loss", "mean", "rstd"), got, exact):
        assert_close(x.cpu(), y, name=name)
    assert got[3].item() == exact[3].item()


@compiled
@pytest.mark.parametrize("norm", ["patch", "batch"])
def test_a_million_values(backend, device, norm):
    """Far from zero with little spread: float32 sums, or E[x^2] - E[x]^2, would be off."""
    g = torch.Generator().manual_seed(1)
    frames = (torch.randn(1, 1, 4, 512, 512, generator=g) * 2 + 30000).round().to(torch.uint16)
    units = 4 if norm == "batch" else 1
    unit = 256 if norm == "batch" else 512
    ids = torch.arange(units)[None]
    pred = torch.randn(1, units, 4 * unit**2, generator=g)
    exact = torch.ops.timo.masked_pixel_loss(
        pred.double(), frames, ids, None, None, None, unit, norm, "reference"
    )
    got = torch.ops.timo.masked_pixel_loss(
        *to(device, pred, frames, ids), None, None, None, unit, norm, backend
    )
    assert_close(got[1].cpu(), exact[1], name="mean")
    assert_close(got[2].cpu(), exact[2], name="rstd")


@compiled
def test_scatter_takes_parameters_of_other_dtypes(backend, device, poisoned):
    for dtype in HALF_AND_SINGLE:
        for parameters in HALF_AND_SINGLE:
            tokens, ids, mask, position, cotangent = make_scatter((2, 5, 70, 40), dtype, 3)
            leaves = [tokens, mask.to(parameters), position.to(parameters)]
            wide = [x.double().requires_grad_() for x in leaves]
            exact = scatter_units(wide[0], ids, *wide[1:], backend="reference")
            expected = torch.autograd.grad(exact, wide, cotangent.double())
            leaves = [x.to(device).requires_grad_() for x in leaves]
            out = scatter_units(leaves[0], ids.to(device), *leaves[1:], backend=backend)
            grads = torch.autograd.grad(out, leaves, cotangent.to(device))
            assert out.dtype == dtype
            assert_close(out.detach().cpu(), exact.detach())
            for x, y, leaf in zip(grads, expected, leaves):
                assert x.dtype == leaf.dtype
                assert_close(x.cpu(), y)


@compiled
def test_offsets_beyond_32_bits(backend, device):
    """Frames, validity and tokens whose last part lies beyond 2^31 elements of a sparse storage."""
    storage = torch.empty(FAR + 4096, dtype=torch.uint8, device=device)
    frames = storage.as_strided((1, 2, 1, 8, 8), (0, FAR, 64, 8, 1))
    frames[0, 0], frames[0, 1] = 5, 3
    near = frames.clone()
    valid = storage.view(torch.bool).as_strided((1, 2, 8, 8), (0, FAR, 8, 1))
    ids, pred = torch.tensor([[0, 5, 7]]), torch.randn(1, 3, 16)
    ids, pred = to(device, ids, pred)
    for usable in (None, valid):
        tiles = gather_units(frames, ids, valid=usable, unit=4, halo=(1, 1), backend=backend)
        expected = gather_units(near, ids, unit=4, halo=(1, 1), backend="reference")
        assert torch.equal(tiles, expected)
        loss = masked_pixel_loss(pred, frames, ids, valid=usable, unit=4, backend=backend)
        expected = masked_pixel_loss(pred, near, ids, unit=4, backend="reference")
        torch.testing.assert_close(loss, expected)
    del storage, frames, valid
    storage = torch.empty(FAR + 64, dtype=torch.bfloat16, device=device)
    tokens = storage.as_strided((1, 2, 8), (0, FAR, 1))
    tokens[0, 0], tokens[0, 1] = 1.0, 2.0
    zeros = torch.zeros(9, 8, device=device)
    out = scatter_units(tokens, ids[:, :2], zeros[0], zeros[:8], backend=backend)
    assert out[0, :, 0].tolist() == [1.0, 0, 0, 0, 0, 2.0, 0, 0]


@compiled
def test_a_run_repeats_itself_bit_for_bit(backend, device):
    first, second = results(backend, device), results(backend, device)
    assert all(map(torch.equal, first, second))


def results(backend, device="cpu"):
    """Outputs and gradients of all three ops on problems of several blocks."""
    frames, ids, scale, offset, valid = make(
        (3, 2, 2, 70, 45, 8, (5, 9), 40), "pixel", torch.float32, 11
    )
    given = to(device, frames, ids, scale, offset, valid)
    leaf = given[0].requires_grad_()
    tiles = gather_units(
        leaf, given[1], scale=given[2], offset=given[3], valid=given[4], unit=8, halo=(5, 9),
        backend=backend,
    )  # fmt: skip
    found = [tiles.detach(), *torch.autograd.grad(tiles, leaf, tiles.detach())]
    tokens, ids, *parameters, cotangent = to(
        device, *make_scatter((4, 36, 147, 48), torch.float32, 12)
    )
    leaves = [x.requires_grad_() for x in (tokens, *parameters)]
    out = scatter_units(leaves[0], ids, *leaves[1:], backend=backend)
    found += [out.detach(), *torch.autograd.grad(out, leaves, cotangent)]
    for norm in ("none", "patch", "batch"):
        args = make_loss((3, 2, 2, 70, 45, 8, None, 40), "pixel", torch.bfloat16, torch.float16, 13)
        args = to(device, *args)
        pred = args[0].requires_grad_()
        outputs = torch.ops.timo.masked_pixel_loss(*args, 8, norm, backend)
        found += [x.detach() for x in outputs]
        found += torch.autograd.grad(outputs[0], pred)
    return [x.cpu() for x in found]


def test_any_number_of_threads_gives_the_same_bits():
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(results("cpp"))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))


@pytest.fixture
def flushed():
    """Subnormal float32 numbers are 0 in this thread."""
    torch.set_flush_denormal(True)
    yield
    torch.set_flush_denormal(False)


@pytest.mark.parametrize("tier", tiers.OF_ALL_OPS)
def test_small_float16_numbers_stay_where_subnormals_are_flushed(tier, flushed):
    """Those below 2^-14 are subnormal in float16, not in float32."""
    every = torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16).view(torch.float16)
    every = torch.where(every.isfinite(), every, 0).view(1, 1, 1, 256, 256)
    small = torch.arange(1.0, 1025.0).view(1, 1, 1024).mul(2.0**-24).half()
    ids, zeros = torch.zeros(1, 1, dtype=torch.int64), torch.zeros(2, 1024)
    with tiers.forced(tier):
        tiles = gather_units(every, ids, unit=256, halo=(0, 0), dtype=torch.float32, backend="cpp")
        sequence = scatter_units(small, ids, zeros[0], zeros, backend="cpp")
        pred = small.clone().requires_grad_()
        frames = torch.zeros(1, 1, 1, 32, 32, dtype=torch.uint8)
        loss = masked_pixel_loss(pred, frames, ids, backend="cpp")
        (grad,) = torch.autograd.grad(loss, pred, torch.tensor(512.0))
        values, indices = temporal_median(small.view(1, 1024, 1, 1, 1), backend="cpp")
    assert torch.equal(tiles.flatten(), every.flatten().double().float())
    assert torch.equal(sequence[0, 0], small[0, 0]) and not sequence[0, 1].any()
    assert_close(loss.detach(), small.double().square().mean())
    assert torch.equal(grad, small)
    assert values.item() == small[0, 0, 511] and indices.item() == 511


@pytest.mark.parametrize("tier", tiers.OF_ALL_OPS)
def test_every_instruction_set(tier):
    expected = results("reference")
    with tiers.forced(tier):
        found = results("cpp")
    for x, y in zip(found, expected):
        if x.is_floating_point():
            assert_close(x, y.double())
        else:
            assert torch.equal(x, y)


@compiled
def test_float64_is_left_to_the_reference(backend, device):
    frames = torch.zeros(1, 1, 1, 8, 8, device=device)
    ids = torch.zeros(1, 1, dtype=torch.int64, device=device)
    with pytest.raises(RuntimeError, match=f"{backend}: takes .*, not float64"):
        gather_units(frames, ids, unit=8, dtype=torch.float64, backend=backend)
    with pytest.raises(RuntimeError, match=f"{backend}: takes .*, not float64"):
        tokens = torch.zeros(1, 1, 4, device=device)
        scatter_units(tokens, ids, tokens[0, 0].double(), tokens[0], backend=backend)
    with pytest.raises(RuntimeError, match=f"{backend}: takes .*, not float64"):
        pred = torch.zeros(1, 1, 64, device=device)
        masked_pixel_loss(pred, frames.double(), ids, unit=8, backend=backend)


@compiled
def test_compiles_whole_with_any_batch(backend, device):
    def step(frames, ids, mask, position):
        tiles = gather_units(frames, ids, unit=8, halo=(1, 1), backend=backend)
        tokens = scatter_units(tiles.flatten(2), ids, mask, position, backend=backend)
        return masked_pixel_loss(tokens[:, : ids.shape[1], :64], frames, ids, unit=8, norm="patch",
                                 backend=backend)  # fmt: skip

    torch._dynamo.reset()
    run = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    g = torch.Generator().manual_seed(0)
    for i, B in enumerate((3, 5, 4)):
        frames = torch.rand(B, 2, 1, 20, 24, generator=g)
        args = to(device, frames, draw_ids(B, 18, 6, g), torch.rand(100), torch.rand(18, 100))
        leaf = args[0].requires_grad_()
        with torch._dynamo.config.patch(error_on_recompile=i > 0):
            (grad,) = torch.autograd.grad(run(*args), leaf)
        (expected,) = torch.autograd.grad(step(*args), leaf)
        assert torch.equal(grad, expected)


@compiled
def test_opcheck(backend, device):
    frames, ids, scale, offset, valid = to(device, *make(CASES[2], "pixel", torch.bfloat16, 5))
    args = (frames.requires_grad_(), ids, scale, offset, valid, 8, 3, 2, torch.float16, backend)
    torch.library.opcheck(torch.ops.timo.gather_units, args)
    tokens, places, *parameters, _ = to(device, *make_scatter((2, 3, 6, 4), torch.float16, 6))
    args = (tokens.requires_grad_(), places, *parameters, backend)
    torch.library.opcheck(torch.ops.timo.scatter_units, args)
    args = make_loss((2, 2, 2, 20, 13, 8, None, 7), "date", torch.float16, torch.uint8, 5)
    pred, *others = to(device, *args)
    args = (pred.requires_grad_(), *others, 8, "batch", backend)
    torch.library.opcheck(torch.ops.timo.masked_pixel_loss, args)
