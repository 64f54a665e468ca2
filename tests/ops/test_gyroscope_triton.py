"""The Triton backend of gyroscope_attention, in the interpreter or on a GPU."""

import math
import os

import pytest
import torch

from tests.ops.direct import direct, magnitudes
from tests.ops.test_gyroscope_attention import KINDS, check, evaluate, fill, make, poison, spread
from timo.ops import dispatch, gyroscope_attention
from timo.ops.gyroscope_attention import BACKWARD, FORWARD

pytest.importorskip("triton")
BACKEND = "triton"
DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
if DEVICE == "cuda" and not torch.cuda.is_available():
    pytest.skip("no GPU, and TRITON_INTERPRET is not 1", allow_module_level=True)
from timo.kernels import gyroscope_attention as kernels  # noqa: E402

SHAPES = [  # B, T, N, H, D
    (1, 3, 1, 8, 24),
    (2, 2, 9, 2, 16),
    (1, 3, 21, 2, 40),
    (1, 5, 33, 1, 32),
    (1, 10, 7, 1, 64),
    (1, 17, 5, 1, 8),
    (1, 2, 18, 1, 128),
]
DTYPES = torch.float32, torch.float16, torch.bfloat16
ATOMIC = dispatch.TRITON_ATOMIC
REQUEST = dispatch.Request(torch.device(DEVICE), torch.float32, 3, 24)
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def small_tiles(monkeypatch):
    """Several blocks of queries and keys, and several tiles of dates of different widths."""

    def tile(kernel, dates, head_dim, *_):
        return kernels.config.Tile(kernels.config.widths(dates, 64, head_dim, 64), 16, 16, 4, 1)

    monkeypatch.setattr(kernels.config, "tile", tile)


@pytest.fixture
def wide_tiles(monkeypatch):
    """Tiles of more columns than an epilogue takes, and left operands held in registers."""

    def tile(kernel, dates, head_dim, *_):
        return kernels.config.Tile(kernels.config.widths(dates, 256, head_dim, 256), 16, 16, 4, 1)

    monkeypatch.setattr(kernels.config, "tile", tile)
    monkeypatch.setattr(kernels.config, "held", lambda *_: True)


def compare(shape, kind, dtype, seed, scale=1.0, energy=0.25, backend=BACKEND):
    """Output and gradients of float16, bfloat16 and float32 inputs against float64."""
    inputs, valid, cotangent = make(shape, kind, seed, dtype, energy)
    plain = evaluate(direct, inputs, valid, cotangent, scale)
    if dtype.itemsize == 2:
        inputs[5] = inputs[5].float()
    wide = [x.double() for x in (*inputs, cotangent)]
    exact = evaluate(direct, wide[:6], valid, wide[6], scale)
    dirty = [x.to(DEVICE) for x in poison([*inputs, cotangent], valid)]
    kept = [x.clone() for x in dirty]
    there = None if valid is None else valid.to(DEVICE)
    got = evaluate(gyroscope_attention, dirty[:6], there, dirty[6], scale, backend=backend)
    assert [x.dtype for x in got] == [x.dtype for x in (inputs[0], *inputs)]
    check(got, exact, plain, magnitudes(wide[:6], valid, wide[6], scale, dtype))
    usable = spread(valid, shape)
    for x in got:
        hidden = ~usable if x.shape[:3] == usable.shape else ~usable.any(1)
        assert not x.cpu()[hidden].any(), "not exactly 0 where nothing is valid"
    for x, y in zip(dirty, kept):
        assert torch.equal(x.nan_to_num(), y.nan_to_num()), "an input was written to"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_parity(kind, dtype, poisoned):
    """Half of the shapes each, so that every shape meets every kind and every dtype."""
    turn = KINDS.index(kind) + DTYPES.index(dtype)
    for seed, shape in list(enumerate(SHAPES))[turn % 2 :: 2]:
        compare(shape, kind, dtype, seed, scale=(1.0, 0.7)[seed % 2])


@pytest.mark.parametrize("kind", KINDS)
def test_several_blocks_and_tiles(kind, small_tiles, poisoned):
    compare((1, 3, 35, 1, 32), kind, torch.float32, 1)
    compare((1, 3, 18, 2, 24), kind, torch.float16, 2)
    compare((2, 6, 17, 1, 16), kind, torch.bfloat16, 3)


@pytest.mark.parametrize("kind", KINDS)
def test_wide_tiles(kind, wide_tiles, poisoned):
    compare((1, 7, 32, 1, 32), kind, torch.bfloat16, 4)  # whole blocks alone
    compare((1, 9, 19, 1, 16), kind, torch.float16, 5)
    compare((1, 5, 21, 1, 24), kind, torch.float32, 6)
    compare((1, 2, 67, 1, 16), kind, torch.bfloat16, 7)  # 64 keys at a time at first


def test_wide_tiles_with_a_maximum_of_their_own(wide_tiles, poisoned, monkeypatch):
    monkeypatch.setattr(kernels, "most", lambda dtype: 2.0**-100)
    compare((1, 3, 19, 1, 32), "position", torch.bfloat16, 8)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", [ATOMIC])
def test_gradient_of_medians_in_any_order(backend, kind, small_tiles, poisoned):
    """Several programs and several tiles of dates add to the same rows of it."""
    compare((1, 3, 35, 2, 24), kind, torch.float32, 1, 0.7, backend=backend)
    compare((2, 6, 18, 1, 16), kind, torch.bfloat16, 2, backend=backend)
    compare((1, 5, 17, 1, 32), kind, torch.float16, 3, backend=backend)


@pytest.mark.parametrize("op", [FORWARD, BACKWARD])
def test_any_order_only_on_request(op, monkeypatch):
    assert op.choose(REQUEST, ATOMIC).backend == ATOMIC
    assert "any order; ask for it by" in op.choose(REQUEST).reasons[ATOMIC]
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    choice = op.choose(REQUEST, ATOMIC)
    assert choice.backend is None
    assert "use_deterministic_algorithms" in choice.reasons[ATOMIC]


@pytest.mark.parametrize("dtype, backend", [*((x, BACKEND) for x in DTYPES), (DTYPES[0], ATOMIC)])
def test_every_row_with_its_own_maximum(dtype, backend, small_tiles, poisoned, monkeypatch):
    """The second launches alone must give all rows."""
    monkeypatch.setattr(kernels, "most", lambda dtype: 2.0**-100)
    compare((2, 3, 19, 1, 32), "position", dtype, 4, backend=backend)


@pytest.mark.parametrize("dtype", DTYPES)
def test_own_maximum_far_below_the_shared_one(dtype, small_tiles):
    """Dates that cannot use the key with the greatest energy, by e ** 150, beside ones that can."""
    shape = (1, 3, 20, 2, 32)
    inputs, _, cotangent = make(shape, "none", 5, dtype)
    inputs[3][..., 0] += 13.0
    inputs[4][:, 17, :, 0] += 13.0  # an energy of about 170, in the second block of keys
    valid = torch.ones(1, 3, 20, dtype=torch.bool)
    valid[0, 0, 17] = valid[0, 2, 17] = valid[0, 1, 3] = False
    valid[0, :, 6] = False
    low = [fill(x, spread(valid, shape), 0) for x in (*inputs, cotangent)]
    plain = evaluate(direct, low[:6], valid, low[6], 1.0)
    wide = [x.double() for x in low]
    exact = evaluate(direct, wide[:6], valid, wide[6], 1.0)
    assert exact[0][0, 0, :4].abs().amax() > 0.1
    dirty = [x.to(DEVICE) for x in poison(low, valid)]
    got = evaluate(
        gyroscope_attention, dirty[:6], valid.to(DEVICE), dirty[6], 1.0, backend="triton"
    )
    check(got, exact, plain, magnitudes(wide[:6], valid, wide[6], 1.0, dtype))


def test_great_gradients_beside_weights_above_one(small_tiles):
    """float16 holds neither their product nor sums of it, but the second launches need none."""
    shape = (1, 2, 20, 1, 16)
    inputs, _, cotangent = make(shape, "none", 3, torch.float16)
    inputs[0].zero_()
    inputs[3][..., 0] = 2.0
    inputs[4][..., 0] = 0.0
    inputs[4][:, 7, :, 0] = math.log(60 * 20) / 2  # 60 times the weight of all other keys
    valid = torch.ones(1, 2, 20, dtype=torch.bool)
    valid[0, 0, 7] = False
    cotangent = fill(cotangent * 2000, spread(valid, shape), 0)
    plain = evaluate(direct, inputs, valid, cotangent, 1.0)
    wide = [x.double() for x in (*inputs, cotangent)]
    exact = evaluate(direct, wide[:6], valid, wide[6], 1.0)
    there = [x.to(DEVICE) for x in (*inputs, valid, cotangent)]
    got = evaluate(gyroscope_attention, there[:6], there[6], there[7], 1.0, backend=BACKEND)
    check(got, exact, plain, magnitudes(wide[:6], valid, wide[6], 1.0, torch.float16))


def test_valid_nan_leaves_invalid_queries_alone(small_tiles):
    inputs, valid, _ = make((1, 3, 20, 1, 16), "position", 4, torch.float32)
    inputs[2][:, 1] = torch.nan
    there = [x.to(DEVICE) for x in (*inputs, valid)]
    out = gyroscope_attention(*there, backend=BACKEND).cpu()
    assert out[valid].isnan().any() and not out[~valid].any()


def test_energies_that_differ_by_hundreds(small_tiles):
    for kind in KINDS:
        compare((1, 3, 34, 1, 32), kind, torch.float32, 7, energy=150.0)


def test_energies_far_below_zero(small_tiles):
    """A key beyond the end has energy 0, hundreds above all others: it must not count."""
    inputs, _, cotangent = make((1, 2, 19, 1, 16), "none", 8, torch.float32)
    inputs[3][..., 0] += 20.0
    inputs[4][..., 0] -= 20.0
    plain = evaluate(direct, inputs, None, cotangent, 1.0)
    wide = [x.double() for x in (*inputs, cotangent)]
    exact = evaluate(direct, wide[:6], None, wide[6], 1.0)
    there = [x.to(DEVICE) for x in (*inputs, cotangent)]
    got = evaluate(gyroscope_attention, there[:6], None, there[6], 1.0, backend="triton")
    check(got, exact, plain)


def test_one_entry():
    """One date and one position: the output is the value, and nothing else has a gradient."""
    inputs, _, cotangent = make((2, 1, 1, 3, 8), "none", 9, torch.float32)
    there = [x.to(DEVICE) for x in (*inputs, cotangent)]
    got = evaluate(gyroscope_attention, there[:6], None, there[6], 1.0, backend="triton")
    torch.testing.assert_close(got[0], there[2], rtol=1e-6, atol=0)
    torch.testing.assert_close(got[3], there[6], rtol=1e-6, atol=0)
    assert not got[1].any() and not got[2].any() and not got[6].any()


@pytest.mark.parametrize("kind", KINDS)
def test_backends_mix(kind, small_tiles):
    """Forward of one backend and backward of the other; logarithms are the same quantities."""
    inputs, valid, cotangent = make((1, 3, 19, 2, 24), kind, 10, torch.float32, 0.25)
    arguments = [x.to(DEVICE) for x in inputs], None if valid is None else valid.to(DEVICE), 0.8
    arguments = (*arguments[0], *arguments[1:])
    cotangent = cotangent.to(DEVICE)
    names = ("reference", "triton")
    saved = [FORWARD.backends[name].run(*arguments) for name in names]
    for a, b in zip(*saved):
        assert a.dtype == b.dtype and a.stride() == b.stride()
        torch.testing.assert_close(a, b, rtol=1e-6, atol=4e-6)  # +inf at the same places
    grads = [
        BACKWARD.backends[name].run(cotangent, *arguments, *results)
        for name, results in zip(names, reversed(saved))
    ]
    exact = evaluate(direct, [x.double() for x in inputs], valid, cotangent.double().cpu(), 0.8)
    plain = evaluate(direct, inputs, valid, cotangent.cpu(), 0.8)
    for results in grads:
        check((plain[0], *results), exact, plain)


def test_offsets_beyond_32_bits():
    """Dates further apart than 2^31 elements; only the pages that are touched exist."""
    far = 2**31 + 64
    storage = torch.empty(far + 256, dtype=torch.int16, device=DEVICE).view(torch.bfloat16)
    inputs, _, cotangent = make((1, 2, 5, 1, 8), "none", 11, torch.bfloat16)
    inputs[5] = inputs[5].float()
    expected = evaluate(
        gyroscope_attention, [x.to(DEVICE) for x in inputs], None, cotangent.to(DEVICE), 1.0,
        backend="triton",
    )  # fmt: skip
    there = []
    for i, x in enumerate((*inputs[:3], cotangent)):
        view = storage.as_strided((1, 2, 5, 1, 8), (0, far, 8, 8, 1), 40 * i)
        there.append(view.copy_(x))
    inputs[:3] = there[:3]
    arguments = [x.to(DEVICE) for x in inputs]
    got = evaluate(gyroscope_attention, arguments, None, there[3], 1.0, backend="triton")
    assert all(map(torch.equal, got, expected))


def test_far_slots_of_sums(small_tiles, monkeypatch):
    """Tiles of dates whose sums lie further apart than 2^31 elements in all, by a 32-bit stride."""
    inputs, _, cotangent = make((1, 10, 5, 1, 16), "none", 13, torch.float32)
    arguments = [x.to(DEVICE) for x in inputs], None, cotangent.to(DEVICE), 1.0
    expected = evaluate(gyroscope_attention, *arguments, backend="triton")
    real, seen = torch.empty, []

    def empty(shape, **options):
        if len(shape) != 5 or options["dtype"] != torch.float32 or shape[0] < 3:
            return real(shape, **options)
        seen.append(shape)
        strides = real(shape, device="meta").stride()
        whole = real((shape[0] - 1) * 2**30 + strides[0], **options)
        return whole.as_strided(shape, (2**30, *strides[1:]))

    monkeypatch.setattr(torch, "empty", empty)
    got = evaluate(gyroscope_attention, *arguments, backend="triton")
    assert len(seen) == 2, "the slots of dq_median and dk_median"
    assert all(map(torch.equal, got, expected))


def test_record():
    """Proven on a Hopper GPU; in the interpreter on request alone."""
    inputs, _, _ = make((1, 2, 3, 1, 16), "none", 12, torch.float32)
    choice = FORWARD.choose(dispatch.Request(torch.device("cpu"), torch.float32, 2, 16))
    assert choice.backend != "triton"
    for op in (FORWARD, BACKWARD):
        assert "sm_90" in op.backends["triton"].proven
        request = dispatch.Request(torch.device(DEVICE), torch.float32, 2, 129)
        assert "head dimensions 1 to 128" in "".join(op.backends["triton"].refusals(request))
