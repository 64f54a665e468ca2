"""The compiled CPU kernels of gyroscope_attention, by the outputs of the internal operators.

Oracle: the reference in float64, itself held to the direct form by test_gyroscope_attention.
"""

import math
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from tests.guards import poisoned_workspace
from tests.ops import tiers
from tests.ops.direct import magnitudes
from tests.tolerance import assert_close
from timo.ops import dispatch

NAMES = "out lse spatial_lse dq dk dv dq_median dk_median dgate".split()
KINDS = ("none", "date", "position")
SINGLE, HALVES = torch.float32, (torch.bfloat16, torch.float16)
SHAPES = [  # B, T, N, H, D
    (2, 1, 1, 1, 8),
    (8, 2, 1, 2, 32),
    (1, 1, 33, 2, 32),
    (2, 2, 50, 3, 16),
    (1, 3, 131, 2, 32),
    (1, 7, 100, 1, 40),
    (1, 10, 47, 2, 32),
    (1, 38, 49, 1, 24),
    (2, 5, 65, 2, 64),
    (1, 10, 61, 1, 128),
    (1, 3, 49, 2, 12),
]
pytestmark = pytest.mark.skipif(
    dispatch.unavailable("cpp") is not None, reason="timo._C is not built"
)


def problem(shape, kind="none", dtype=SINGLE, seed=0, energy=1.0, gate_dtype=None):
    """Arguments of the operator and a cotangent: strides of a projection, NaN where not valid.

    `energy` is about the standard deviation of the energies.
    """
    B, T, N, H, D = shape
    g = torch.Generator().manual_seed(seed)
    size = {"none": None, "date": (B, T), "position": (B, T, N)}[kind]
    valid = None if size is None else torch.rand(size, generator=g) < 0.6
    amplitude = (energy / D**0.5) ** 0.5
    q, k, v = (torch.randn(B, T, N, 3, H, D, generator=g) * amplitude).to(dtype).unbind(3)
    medians = (torch.randn(B, N, 2, H, D, generator=g) * amplitude).to(dtype)
    gate = torch.randn(B, N, H, T, generator=g).relu().to(gate_dtype or dtype).permute(0, 3, 1, 2)
    cotangent = torch.randn(B, T, N, H, D, generator=g).to(dtype)
    inputs = [q, k, v, medians[:, :, 0], medians[:, :, 1], gate]
    if valid is not None:
        usable = valid if valid.ndim == 3 else valid[:, :, None].expand(B, T, N)
        for x in (q, k, v, gate, cotangent):
            x[~usable] = torch.nan
        medians[~usable.any(1)] = torch.nan
    return [*inputs, valid], cotangent


def evaluate(backend, arguments, cotangent, scale=1.0):
    """The three outputs and the six gradients, all from `backend`."""
    outputs = torch.ops.timo.gyroscope_attention(*arguments, scale, backend)
    grads = torch.ops.timo.gyroscope_attention_backward(
        cotangent, *arguments, scale, *outputs, backend
    )
    return [*outputs, *grads]


def widen(x):
    return x if x is None or x.dtype == torch.bool else x.double()


def check(arguments, cotangent, scale=1.0):
    """Parity of all nine results of the compiled kernels, which are returned."""
    got = evaluate("cpp", arguments, cotangent, scale)
    compare(got, arguments, cotangent, scale)
    return got


def compare(got, arguments, cotangent, scale=1.0):
    """Hold the results of `evaluate` to the reference in float64.

    Logarithms are float32 sums on every tier. Output and gradients are sums of products of q's
    dtype, whose terms may cancel.
    """
    *inputs, valid = arguments
    exact = evaluate("reference", [*map(widen, arguments)], cotangent.double(), scale)
    plain = evaluate("reference", arguments, cotangent, scale)
    wide = [x.double().nan_to_num() for x in (*inputs, cotangent)]
    out, *grads = magnitudes(wide[:6], valid, wide[6], scale, cotangent.dtype)
    terms = dict(zip(NAMES, (out, None, None, *grads)))
    for name, x, y, p in zip(NAMES, got, exact, plain):
        assert x.dtype == p.dtype and x.stride() == p.stride(), name
        infinite = y.isinf()
        assert torch.equal(x.isinf(), infinite), name
        p = p if terms[name] is None else p.to(cotangent.dtype)
        assert_close(x.masked_fill(infinite, 0), y.masked_fill(infinite, 0),
                     p.masked_fill(infinite, 0), f"{name} {tuple(inputs[0].shape)}",
                     terms[name])  # fmt: skip


@pytest.fixture(autouse=True)
def poison():
    with poisoned_workspace():
        yield


@pytest.fixture(params=tiers.TIERS)
def tier(request):
    """Every instruction set in turn, with the dtypes for which it has products of its own."""
    dtype = request.node.callspec.params.get("dtype", torch.bfloat16)
    with tiers.forced(request.param):
        if request.param not in tiers.available("gyroscope_attention", dtype):
            pytest.skip(f"{request.param} has no products of {dtype}")
        yield request.param


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_parity(shape, kind, tier):
    for dtype in (SINGLE, *HALVES):
        if tier in tiers.available("gyroscope_attention", dtype):
            check(*problem(shape, kind, dtype, seed=1), scale=1.0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [SINGLE, torch.bfloat16])
def test_more_than_one_block_of_everything(dtype, kind, tier):
    """Several blocks and tiles of keys and queries, all sizes odd."""
    check(*problem((1, 11, 601, 1, 32), kind, dtype, seed=2))


@pytest.mark.parametrize("scale", [0.3, -0.7])
@pytest.mark.parametrize("dtype", [SINGLE, torch.bfloat16])
def test_scale(dtype, scale, tier):
    check(*problem((1, 3, 77, 2, 32), "position", dtype, seed=3, energy=4), scale)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("gate_dtype", [torch.float32, torch.float64])
def test_gate_of_another_dtype(gate_dtype, dtype):
    check(*problem((1, 3, 49, 2, 32), "position", dtype, gate_dtype=gate_dtype))


@pytest.mark.parametrize("dtype", [SINGLE, torch.bfloat16])
def test_reference_is_renewed(dtype, tier):
    """Energies climb by hundreds along the keys: the first ones are no reference for the last."""
    arguments, cotangent = problem((1, 3, 300, 1, 32), seed=4, dtype=dtype)
    q_median, k_median = arguments[3], arguments[4]
    q_median[..., 0] = 16
    k_median[:, :, 0, 0] = torch.linspace(-10, 14, 300).to(dtype)  # energies -160 to 224
    got = check(arguments, cotangent)
    assert got[2].min() > 200
    k_median[:, 8:, 0, 0] = -10  # and the reverse: the last ones vanish beside the first
    check(arguments, cotangent)


@pytest.mark.parametrize("dtype", [SINGLE, torch.bfloat16])
@pytest.mark.parametrize("gap", [30, 100, 400])
def test_date_whose_own_maximum_is_far_below(gap, dtype, tier):
    """Two of three dates cannot use the keys that hold the greatest energies."""
    arguments, cotangent = problem((1, 3, 150, 2, 32), seed=5, dtype=dtype)
    arguments[3][..., 0] = 16
    arguments[4][:, :, :, 0] = 0
    arguments[4][:, 70:75, :, 0] = gap / 16
    arguments[4][:, 75:80, :, 0] = gap / 32
    arguments[0][:, :2] *= 0.2
    valid = torch.ones(1, 3, 150, dtype=torch.bool)
    valid[0, 0, 70:75] = False
    valid[0, 1, 70:80] = False
    valid[0, 2, 140:] = False
    arguments[6] = valid
    got = check(arguments, cotangent)
    assert got[0][0, :2, :70].abs().amax(-1).min() > 1e-3, "mass was lost"


@pytest.mark.parametrize("dtype", [SINGLE, torch.bfloat16])
def test_what_a_date_has_outlasts_a_new_reference(dtype, tier):
    """The reference rises by 2^126 and more while a date's sum is some 2^59 above the old one."""
    arguments, cotangent = problem((1, 2, 256, 1, 32), seed=6, dtype=dtype)
    arguments[3].zero_()
    arguments[4].zero_()
    arguments[3][..., 0] = 8
    energy = torch.zeros(256)  # in powers of two
    energy[8:128], energy[200], energy[201] = 52, 127, 68
    arguments[4][0, :, 0, 0] = (energy * math.log(2) / 8).to(dtype)
    valid = torch.ones(1, 2, 256, dtype=torch.bool)
    valid[0, 0, 200] = False
    arguments[6] = valid
    arguments[0] *= 0.1
    check(arguments, cotangent)


@pytest.mark.parametrize("dtype", [SINGLE, torch.bfloat16])
def test_nothing_valid(dtype, tier):
    arguments, cotangent = problem((1, 3, 20, 1, 32), "position", dtype)
    for valid in (torch.zeros(1, 3, 20), torch.zeros(1, 3)):
        arguments[6] = valid.bool()
        out, lse, spatial_lse, *grads = evaluate("cpp", arguments, cotangent)
        assert (lse == torch.inf).all() and (spatial_lse == torch.inf).all()
        assert not any(x.any() or x.isnan().any() for x in (out, *grads))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [SINGLE, torch.bfloat16])
def test_every_element_is_written_and_no_other(dtype, kind, tier, poisoned):
    for shape in ((2, 3, 53, 2, 32), (1, 2, 5, 1, 24)):
        arguments, cotangent = problem(shape, kind, dtype, seed=6)
        kept = [None if x is None else x.clone() for x in (*arguments, cotangent)]
        results = evaluate("cpp", arguments, cotangent)
        assert not any(x.isnan().any() for x in results)
        for x, y in zip((*arguments, cotangent), kept):
            assert x is y is None or torch.equal(x.nan_to_num(), y.nan_to_num())


@pytest.mark.parametrize("dtype", [SINGLE, torch.bfloat16])
def test_padding_changes_no_bit(dtype, tier):
    B, T, N, H, D = shape = (2, 4, 101, 2, 32)
    arguments, cotangent = problem(shape, dtype=dtype, seed=7)
    plain = evaluate("cpp", arguments, cotangent)

    def wider(x, more_dates, more):
        """NaN beside the dates and positions of (B, T, N, ...), or the positions of (B, N, ...)."""
        size = list(x.shape)
        inner = [slice(None)] * x.ndim
        if x.shape[1] == N:
            size[1] += more
            inner[1] = slice(N)
        else:
            size[1] += more_dates
            size[2] += more
            inner[1:3] = slice(T), slice(N)
        out = torch.full(size, torch.nan, dtype=x.dtype)
        out[tuple(inner)] = x
        return out, tuple(inner)

    for more_dates, more in ((3, 0), (0, 30)):
        padded = [wider(x, more_dates, more)[0] for x in arguments[:6]]
        if more:
            valid = torch.zeros(B, T, N + more, dtype=torch.bool)
            valid[:, :, :N] = True
        else:
            valid = torch.arange(T + more_dates).expand(B, -1) < T
        results = evaluate("cpp", [*padded, valid], wider(cotangent, more_dates, more)[0])
        for name, x, y in zip(NAMES, results, plain):
            assert torch.equal(x[wider(y, more_dates, more)[1]], y), name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [SINGLE, torch.bfloat16])
def test_threads_change_no_bit(dtype, kind):
    arguments, cotangent = problem((2, 3, 700, 2, 32), kind, dtype, seed=8, energy=60)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(evaluate("cpp", arguments, cotangent))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


@pytest.mark.parametrize("dtype", [SINGLE, torch.bfloat16])
def test_nan_stays_in_its_sample(dtype, tier):
    """A thread that has seen NaN goes on to samples without, of fewer positions."""
    arguments, cotangent = problem((2, 1, 40, 1, 8), dtype=dtype, seed=11)
    valid = torch.ones(2, 1, 40, dtype=torch.bool)
    valid[1, :, 10:] = False
    arguments[6] = valid
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        clean = evaluate("cpp", arguments, cotangent)
        arguments[2] = arguments[2].clone()
        arguments[2][0, 0, 25] = torch.nan
        spoilt = evaluate("cpp", arguments, cotangent)
    finally:
        torch.set_num_threads(threads)
    assert spoilt[0][0].isnan().any()
    for name, x, y in zip(NAMES, spoilt, clean):
        assert torch.equal(x[1], y[1]), name


def test_denormal_numbers_work_as_before():
    """The kernels flush them while they run, in every thread."""
    evaluate("cpp", *problem((1, 3, 100, 2, 32)))
    assert (torch.full((64,), 1e-40) * 0.5 > 0).all()


def test_two_python_threads_at_once():
    work = [problem((1, 3, 200 + 50 * i, 2, 32), KINDS[i % 3], seed=i) for i in range(6)]
    alone = [evaluate("cpp", *x) for x in work]
    with ThreadPoolExecutor(2) as pool:
        for _ in range(3):
            for x, y in zip(pool.map(lambda x: evaluate("cpp", *x), work), alone):
                assert all(map(torch.equal, x, y))


def test_more_heads_than_a_group_holds():
    """The backward takes heads by groups that fit its workspace; B * H = 12,800 are two."""
    arguments, cotangent = problem((1600, 1, 64, 8, 8), seed=9)
    whole = evaluate("cpp", arguments, cotangent)
    for part in (slice(0, 800), slice(800, 1600)):
        some = evaluate("cpp", [x if x is None else x[part] for x in arguments], cotangent[part])
        assert all(torch.equal(x[part], y) for x, y in zip(whole, some))


@pytest.mark.parametrize("dtype", [SINGLE, torch.bfloat16])
def test_saved_tensors_serve_every_backend(dtype):
    """A forward by one backend, its backward by the other."""
    arguments, cotangent = problem((1, 3, 90, 2, 32), "position", dtype, seed=10)
    for first, second in (("cpp", "reference"), ("reference", "cpp")):
        saved = torch.ops.timo.gyroscope_attention(*arguments, 1.0, first)
        grads = torch.ops.timo.gyroscope_attention_backward(
            cotangent, *arguments, 1.0, *saved, second
        )
        compare([*saved, *grads], arguments, cotangent)


MEMORY = """
import torch, timo
torch.set_num_threads(2)

def status(key):
    for line in open("/proc/self/status"):
        if line.startswith(key):
            return int(line.split()[1]) / 1024

def inputs(B, T, N, H, D):
    shapes = [(B, T, N, H, D)] * 3 + [(B, N, H, D)] * 2 + [(B, T, N, H)]
    return [torch.randn(s).mul_(0.2) for s in shapes]

def run(xs):
    open("/proc/self/clear_refs", "w").write("5")  # the high-water mark starts from here
    before = status("VmRSS")
    saved = torch.ops.timo.gyroscope_attention(*xs, None, 1.0, "cpp")
    forward = status("VmHWM") - before - sum(x.nbytes for x in saved) / 2**20
    before = status("VmRSS")
    grads = torch.ops.timo.gyroscope_attention_backward(xs[2], *xs, None, 1.0, *saved, "cpp")
    backward = status("VmHWM") - before - sum(x.nbytes for x in grads) / 2**20
    return max(forward, backward)

run(inputs(1, 2, 64, 1, 32))  # libraries load what they load on first use
print(max(run(inputs(*s)) for s in ((1, 38, 4096, 2, 32), (1, 4, 8192, 1, 128))))
"""


def test_workspace():
    """Below 64 MB beside inputs, outputs and saved tensors, where values alone exceed that."""
    if sys.platform != "linux":
        pytest.skip("reads /proc/self/status")
    done = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 64, f"{float(done.stdout):.0f} MiB"
