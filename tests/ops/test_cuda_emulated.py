"""The CUDA kernels on the CPU (tests/cuda_emulation): the parity tests of the compiled backends.

In this file backend "cpp" is the module in which the CUDA kernels stand for those of the CPU.
"""

import ctypes
import re
import shutil

import pytest
import torch

from tests import cuda_emulation
from tests.fences import fences
from tests.ops import fuzz, fuzz_units
from tests.ops import test_gather_units as of_gather
from tests.ops import test_masked_pixel_loss as of_loss
from tests.ops import test_scatter_units as of_scatter
from tests.ops import test_temporal_median as of_median
from tests.ops import test_units_compiled as of_units
from timo.ops import dispatch, gather_units_compiled, temporal_median
from timo.ops import masked_pixel_loss_compiled as loss_compiled
from timo.ops import scatter_units_compiled as scatter_compiled
from timo.ops.gather_units import HALF_AND_SINGLE, NARROW

pytestmark = pytest.mark.skipif(
    shutil.which(cuda_emulation.compiler()) is None, reason="no C++ compiler"
)
PLACE = ("cpp", "cpu")


@pytest.fixture(autouse=True)
def emulated(monkeypatch):
    module = cuda_emulation.load()
    monkeypatch.setattr(dispatch, "compiled", lambda: module)
    yield module
    cuda_emulation.set_order("forward")


def turn(*parameters) -> None:
    """An order of blocks and threads for each test, so that every order meets every kind."""
    number = sum(map(len, map(str, parameters)))
    cuda_emulation.set_order(cuda_emulation.ORDERS[number % 3])


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("kind", of_gather.KINDS)
def test_gather_units(dtype, kind, poisoned):
    turn(dtype, kind)
    of_gather.test_parity(*PLACE, dtype, kind, None)


@pytest.mark.parametrize("dtype", HALF_AND_SINGLE)
@pytest.mark.parametrize("kind", of_gather.KINDS)
def test_gather_units_backward(dtype, kind, poisoned):
    turn(dtype, kind)
    of_gather.test_gradient(*PLACE, dtype, kind)


@pytest.mark.parametrize("frames_dtype", NARROW)
@pytest.mark.parametrize("dtype", HALF_AND_SINGLE)
def test_gather_units_dtypes(frames_dtype, dtype, poisoned):
    of_units.test_gather_dtypes(*PLACE, frames_dtype, dtype, None)


@pytest.mark.parametrize("dtype", HALF_AND_SINGLE)
def test_scatter_units(dtype, poisoned):
    turn(dtype)
    of_scatter.test_parity(*PLACE, dtype, None)


@pytest.mark.parametrize("dtype", HALF_AND_SINGLE)
@pytest.mark.parametrize("norm", of_loss.NORMS)
@pytest.mark.parametrize("kind", of_loss.KINDS)
def test_masked_pixel_loss(dtype, kind, norm, poisoned):
    turn(dtype, kind, norm)
    of_loss.test_parity(*PLACE, dtype, kind, norm, None)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["none", "date", "position"])
def test_temporal_median(dtype, kind, poisoned):
    turn(dtype, kind)
    of_median.test_parity(*PLACE, dtype, kind, None)


@pytest.mark.parametrize(
    "test, arguments",
    [
        (of_gather.test_every_16_bit_number, ()),
        (of_scatter.test_mask_token_gradient_is_summed_in_float32, ()),
        (of_units.test_scatter_takes_parameters_of_other_dtypes, (None,)),
        (of_units.test_offsets_beyond_32_bits, ()),
        *((of_units.test_large_tiles, (torch.uint16, dense, None)) for dense in (0, 1)),
        (of_units.test_large_tiles, (torch.float32, 1, None)),
        *((of_units.test_loss_of_wide_units, (n, d, None)) for n in of_loss.NORMS for d in (0, 1)),
        *((of_units.test_internal_results_of_the_loss, (norm, None)) for norm in of_loss.NORMS),
        *((of_units.test_a_million_values, (norm,)) for norm in ("patch", "batch")),
        *((of_loss.test_nothing_to_score, (norm,)) for norm in of_loss.NORMS),
        *((of_loss.test_one_value_has_no_variance, (norm,)) for norm in ("patch", "batch")),
        (of_loss.test_statistics_of_large_numbers, ()),
        *((of_median.test_not_a_number_is_returned, (x,)) for x in HALF_AND_SINGLE),
    ],
    ids=lambda x: x.__name__ if callable(x) else "-".join(map(str, x)),
)
def test_beyond_parity(test, arguments):
    turn(test, arguments)
    test(*PLACE, *arguments)


@pytest.mark.parametrize("op", ["gather_units", "scatter_units", "temporal_median"])
@pytest.mark.parametrize("number", range(0, 960, 96))
def test_random_shapes(op, number):
    """Some of the shapes of test_fuzz.py, which run between guards."""
    checks = fuzz.CHECKS | fuzz_units.CHECKS
    for i, kind in enumerate(fuzz.KINDS):
        dtype = HALF_AND_SINGLE[(number // 96 + i) % 3]
        turn(op, kind, dtype)
        checks[op](fuzz.random_case(number, kind, dtype, 100_000))(backend="cpp")


def test_every_order_gives_the_same_bits():
    """Of blocks and of threads between barriers: a missing barrier would show."""
    found = []
    for order in cuda_emulation.ORDERS:
        cuda_emulation.set_order(order)
        x, valid = of_median.make((2, 9, 5, 2, 40), torch.float32, "position", 3)
        x.requires_grad_()
        values, indices = temporal_median(x, valid, backend="cpp")
        (grad,) = torch.autograd.grad(values, x, values.detach())
        found.append([values.detach(), indices, grad, *of_units.results("cpp")])
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))


@pytest.mark.parametrize("at_end", [True, False], ids=["end", "begin"])
@pytest.mark.parametrize("frames_dtype", NARROW)
def test_nothing_beside_a_tensor_is_touched(frames_dtype, at_end, poisoned):
    """All arguments lie beside pages that cannot be read; vectors of four and single elements.

    Among the ids are some that no frame has, which are not looked at on a GPU.
    """
    dtype = HALF_AND_SINGLE[NARROW.index(frames_dtype) % 3]
    g = torch.Generator().manual_seed(1)
    for H, W, unit in ((20, 13, 8), (16, 24, 8), (9, 7, 3), (5, 5, 12)):
        case = (2, 3, 3, H, W, unit, None, 3)
        frames, ids, scale, offset, valid = of_gather.make(case, "pixel", frames_dtype, 5)
        ids[0, -1], ids[1, 0], ids[1, -1] = 2**40, -5, 3 * -(-H // unit) * -(-W // unit)
        pred = torch.randn(2, 3, 3 * unit**2, generator=g).to(dtype)
        tokens, sequence = torch.randn(2, 3, 36, generator=g), torch.randn(2, 18, 36, generator=g)
        with fences(at_end) as fence:
            # Rows a multiple of four apart, which begin at the second of four pixels.
            shifted = frames.new_zeros((*frames.shape[:4], -(-W // 4) * 4 + 4))
            shifted[..., 1 : W + 1] = frames
            for x in map(fence, (frames, frames.contiguous(), shifted)):
                x = x[..., 1 : W + 1] if x.shape[4] > W else x
                near, s, o, v = map(fence, (ids, scale, offset, valid))
                tiles = gather_units_compiled.forward(x, near, s, o, v, unit, 3, 2, dtype)
                if frames_dtype.is_floating_point:
                    gather_units_compiled.backward(
                        fence(tiles), near, s, v, 3, H, W, unit, 3, 2, frames_dtype
                    )
                for norm in of_loss.NORMS:
                    given = fence(pred), x, near, s, o, v, unit
                    _, *saved = loss_compiled.forward(*given, norm)
                    loss_compiled.backward(fence(saved[0][0, 0]), *given, *map(fence, saved))
            for D in (36, 33):
                given = tokens[..., :D].contiguous(), sequence[..., :D].contiguous()
                rows, grads = (fence(x.to(dtype)) for x in given)
                position = fence(sequence[0, :, :D].contiguous())
                scatter_compiled.forward(rows, fence(ids), fence(tokens[0, 0, :D]), position)
                scatter_compiled.backward(grads, fence(ids), torch.float32)
            for kind in ("date", "position"):
                x, usable = of_median.make((2, 5, 9, 2, 7), dtype, kind, 2)
                values, indices = temporal_median(fence(x), fence(usable), backend="cpp")
                torch.ops.timo.temporal_median_backward(fence(values), fence(indices), 5, "cpp")


def test_nothing_to_gather():
    frames, ids = torch.zeros(1, 1, 0, 8, 8), torch.zeros(1, 1, dtype=torch.int64)
    tiles = gather_units_compiled.forward(frames, ids, None, None, None, 8, 3, 2, torch.float32)
    assert tiles.shape == (1, 1, 0, 13, 13)


@pytest.mark.parametrize("backward", ["", "_backward"])
def test_more_than_a_grid_holds_is_an_error(emulated, backward):
    """Sizes of tensors that no memory holds: refused before anything is launched."""

    def units(B, C, K):
        return [0] * 5, [0] * 5, [0] * 4, [B, 1, C, 8, 8, K, 8], 0

    many = 70_000
    sizes = units(many, many, 1) if backward else units(many, 1, many)
    with pytest.raises(ValueError, match="is 4900000000; the CUDA kernels take at most 2"):
        getattr(emulated, f"gather_units{backward}_cpu")(sizes, 0, 0, 0, 0)
    with pytest.raises(ValueError, match="masked units is 4900000000; the CUDA kernels take"):
        getattr(emulated, f"masked_pixel_loss{backward}_cpu")(units(many, 1, many), [0] * 8, 0, 0)
    with pytest.raises(ValueError, match="rows is 4900000000; the CUDA kernels take at most"):
        getattr(emulated, f"scatter_units{backward}_cpu")([0] * 6, [0, 0], [many, 1, many, 8], 0)


@pytest.fixture(scope="session")
def faulty():
    return ctypes.CDLL(str(cuda_emulation.link(cuda_emulation.HERE / "faults.cu")))


def run_fault(faulty, which, order="forward", threads=64, blocks_y=1):
    said = ctypes.create_string_buffer(256)
    out = (ctypes.c_int * 64)(1)
    order = cuda_emulation.ORDERS.index(order)
    code = faulty.run_fault(which, order, threads, blocks_y, out, said)
    return code, out[0], said.value.decode()


@pytest.mark.parametrize("order", cuda_emulation.ORDERS)
def test_sound_kernel_runs(faulty, order):
    """The emulation itself: what thread 0 gets from shared memory, shuffles and votes."""
    assert run_fault(faulty, 0, order) == (0, sum(range(32, 64)) + 2, "")


@pytest.mark.parametrize("order", cuda_emulation.ORDERS)
@pytest.mark.parametrize(
    "which, said",
    [
        (1, "threads wait at tests/cuda_emulation/faults.cu:.* and tests/cuda_emulation/faults.cu"),
        (2, r"thread \(5, 0, 0\): left while others wait at tests/cuda_emulation/faults.cu"),
        (3, "left while others wait at"),
        (4, "wrote outside the dynamic shared memory"),
        (5, "an index beyond an array"),
        (6, "an address that is not aligned"),
        (7, "touches memory at 0x40"),
        (8, "a signed overflow"),
    ],
)
def test_faults_are_found(faulty, order, which, said):
    code, _, found = run_fault(faulty, which, order)
    assert code == -1 and re.search(said, found), found


def test_races_differ_between_orders(faulty):
    found = {run_fault(faulty, 9, order)[1] for order in cuda_emulation.ORDERS}
    assert len(found) > 1, found


def test_launches_beyond_the_limits_are_refused(faulty):
    assert run_fault(faulty, 0, threads=2048)[0] == 1
    assert run_fault(faulty, 0, threads=0)[0] == 1
    assert run_fault(faulty, 0, blocks_y=65536)[0] == 1
