"""gyroscope_attention: every backend against the direct form in float64."""

import math
import subprocess
import sys

import pytest
import torch

import timo
from tests.ops.backends import cases, skip_reason, slow
from tests.ops.direct import direct, energies, magnitudes
from tests.tolerance import assert_close
from timo.ops import dispatch, gyroscope_attention
from timo.ops.gyroscope_attention import BACKWARD, FORWARD

module = sys.modules["timo.ops.gyroscope_attention"]
NAMES = ("out", "q", "k", "v", "q_median", "k_median", "gate")
KINDS = ("none", "date", "position")
SHAPES = [  # B, T, N, H, D
    (1, 1, 1, 1, 8),
    (1, 2, 1, 1, 8),
    (2, 1, 5, 2, 32),
    (1, 2, 7, 3, 16),
    (2, 3, 11, 2, 40),
    (1, 5, 49, 1, 64),
    (1, 10, 9, 2, 32),
    (1, 38, 3, 1, 8),
    (1, 3, 17, 1, 128),
]
WIDE_SHAPES = [  # enough terms in every gradient for errors to be compared by their greatest
    (2, 4, 16, 3, 16),
    (2, 5, 16, 2, 40),
    (1, 5, 49, 1, 64),
    (1, 10, 24, 2, 32),
    (1, 38, 24, 2, 8),
    (2, 5, 17, 1, 128),
]


def make(shape, kind, seed, dtype=torch.float64, energy=1.0):
    """Six inputs in storage of other strides, validity, and a cotangent; invalid entries are 0.

    `energy` is about the standard deviation of the energies.
    """
    B, T, N, H, D = shape
    g = torch.Generator().manual_seed(seed)
    size = {"none": None, "date": (B, T), "position": (B, T, N)}[kind]
    valid = None if size is None else torch.rand(size, generator=g) < 0.7
    usable = spread(valid, shape)
    qk = torch.randn(B, N, T, 2, H, D, generator=g, dtype=torch.float64) * (energy / D**0.5) ** 0.5
    q, k = qk[:, :, :, 0].transpose(1, 2), qk[:, :, :, 1].transpose(1, 2)
    v = torch.randn(T, B, H, N, D, generator=g, dtype=torch.float64).permute(1, 0, 3, 2, 4)
    m = torch.randn(2, B, H, N, D + 1, generator=g, dtype=torch.float64)[..., 1:]
    m = m.transpose(2, 3) * (energy / D**0.5) ** 0.5
    gate = torch.randn(B, H, T, N, generator=g, dtype=torch.float64).relu().permute(0, 2, 3, 1)
    cotangent = torch.randn(B, T, H, N, D, generator=g, dtype=torch.float64).transpose(2, 3)
    inputs = [fill(x.to(dtype), usable, 0) for x in (q, k, v, m[0], m[1], gate)]
    return inputs, valid, fill(cotangent.to(dtype), usable, 0)


def spread(valid, shape):
    B, T, N = shape[:3]
    if valid is None:
        return torch.ones(B, T, N, dtype=torch.bool)
    return valid if valid.ndim == 3 else valid[:, :, None].expand(B, T, N)


def fill(x, usable, value):
    """Write `value` where an input (or output) belongs to no usable entry; keeps the strides."""
    if usable.shape != x.shape[:3]:  # a median
        usable = usable.any(1)
    x[~usable] = value
    return x


def poison(inputs, valid):
    return [fill(x.clone(), spread(valid, inputs[0].shape), torch.nan) for x in inputs]


def evaluate(op, inputs, valid, cotangent, scale, **kwargs):
    """Output and the six gradients."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = op(*leaves, valid, scale, **kwargs)
    return out.detach(), *torch.autograd.grad(out, leaves, cotangent)


def check(got, exact, plain=(None,) * 7, terms=(None,) * 7):
    """Parity of the output and six gradients; float64 must be exact to 1e-12.

    `terms` as `magnitudes` gives them, for energies in the hundreds: forward and backward
    may round those differently, by the order in which a product is summed.
    """
    names = NAMES if len(got) == len(NAMES) else ("out", "v")
    for name, x, y, p, m in zip(names, got, exact, plain, terms):
        name = f"{name} {tuple(x.shape)}"
        if x.dtype == torch.float64:
            error = (x.cpu() - y).abs().max().item()
            assert error <= 1e-12 * max(1.0, y.abs().max().item()), f"{name}: error {error:.1e}"
        else:
            assert_close(x.cpu(), y, p, name, m)


@pytest.fixture(autouse=True)
def one_thread():
    """Small shapes: threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def small_blocks(monkeypatch):
    """Block sizes that cut heads and queries of small shapes into uneven blocks."""
    return lambda size: monkeypatch.setattr(module, "BLOCK", size)


@pytest.mark.parametrize("seed", range(12))
def test_reference_is_exact(seed, small_blocks):
    """Eighteen random shapes and the fixed ones, forward and all gradients, to 1e-12."""
    g = torch.Generator().manual_seed(seed)

    def draw(low, high):
        return int(torch.randint(low, high + 1, (), generator=g))

    shapes = [(draw(1, 2), draw(1, 6), draw(1, 24), draw(1, 4), draw(8, 48)) for _ in range(18)]
    for i, shape in enumerate(shapes + SHAPES):
        small_blocks((2**20, 2000, 300)[draw(0, 2)])
        scale = (1.0, 0.3, -0.7)[i % 3]
        inputs, valid, cotangent = make(shape, KINDS[(i + seed) % 3], 1000 * seed + i)
        exact = evaluate(direct, inputs, valid, cotangent, scale)
        dirty = poison([*inputs, cotangent], valid)
        got = evaluate(gyroscope_attention, dirty[:6], valid, dirty[6], scale, backend="reference")
        check(got, exact)
        usable = spread(valid, shape)
        for x in got:
            hidden = ~usable if x.shape[:3] == usable.shape else ~usable.any(1)
            assert torch.equal(x[hidden], torch.zeros_like(x[hidden])), "not exactly 0"


@pytest.mark.parametrize("backend, device, dtype", cases(FORWARD))
@pytest.mark.parametrize("kind", KINDS)
def test_parity(backend, device, dtype, kind):
    if why := skip_reason(backend, device):
        pytest.skip(why)
    limits = FORWARD.backends[backend]
    shapes = list(enumerate(WIDE_SHAPES))
    if slow(backend, device):  # test_gyroscope_triton has more
        shapes = shapes[:1]
    elif device == "cuda":  # every shape is compiled: half of them each
        shapes = shapes[(KINDS.index(kind) + list(limits.dtypes).index(dtype)) % 2 :: 2]
    for seed, shape in shapes:
        request = dispatch.Request(torch.device(device), dtype, shape[1], shape[4])
        if limits.refusals(request):
            continue
        inputs, valid, cotangent = make(shape, kind, seed, dtype, energy=0.25)
        plain = (None,) * 7
        if dtype.itemsize == 2:
            plain = evaluate(direct, inputs, valid, cotangent, 1.0)
            inputs[5] = inputs[5].float()
        wide = [x.double() for x in (*inputs, cotangent)]
        exact = evaluate(direct, wide[:6], valid, wide[6], 1.0)
        dirty = [x.to(device) for x in poison([*inputs, cotangent], valid)]
        kept = [x.clone() for x in dirty]
        there = None if valid is None else valid.to(device)
        got = evaluate(gyroscope_attention, dirty[:6], there, dirty[6], 1.0, backend=backend)
        assert [x.dtype for x in got] == [x.dtype for x in (inputs[0], *inputs)]
        check(got, exact, plain)
        for x, y in zip(dirty, kept):
            assert torch.equal(x.nan_to_num(), y.nan_to_num()), "an input was written to"


@pytest.mark.parametrize("backend, device, dtype", cases(FORWARD))
def test_own_maximum_far_below_the_shared_one(backend, device, dtype):
    """Date 0 cannot use the position that holds the greatest energy, by hundreds."""
    if why := skip_reason(backend, device):
        pytest.skip(why)
    inputs, _, cotangent = make((1, 3, 12, 2, 32), "none", 5)
    q, k, v, q_median, k_median, gate = inputs
    q_median[..., 0] += 19.0
    k_median[:, 4, :, 0] += 20.0  # energy about 380, the others below 60
    q[:, 0] *= 0.1
    valid = torch.ones(1, 3, 12, dtype=torch.bool)
    valid[0, 0, 4] = False
    low = [fill(x.to(dtype), valid, 0) for x in (*inputs, cotangent)]
    plain = evaluate(direct, low[:6], valid, low[6], 1.0)
    wide = [x.double() for x in low]
    exact = evaluate(direct, wide[:6], valid, wide[6], 1.0)
    assert exact[0][0, 0, :4].abs().amax() > 0.1
    there = [x.to(device) for x in (*low, valid)]
    got = evaluate(gyroscope_attention, there[:6], there[7], there[6], 1.0, backend=backend)
    terms = magnitudes(wide[:6], valid, wide[6], 1.0, dtype)
    if dtype != torch.float64:
        # Nearly all weight of the other dates is on one key: the exact gradients of energies are
        # differences of equal numbers, and only the output and v tell something in low precision.
        got, exact, plain, terms = ((x[0], x[3]) for x in (got, exact, plain, terms))
    check(got, exact, plain, terms)


@pytest.mark.parametrize("kind", KINDS)
def test_energies_that_differ_by_hundreds(kind):
    inputs, valid, cotangent = make((2, 4, 30, 2, 32), kind, 7, energy=300.0)
    exact = evaluate(direct, inputs, valid, cotangent, 1.0)
    check(evaluate(gyroscope_attention, inputs, valid, cotangent, 1.0), exact)
    single = [x.float() for x in (*inputs, cotangent)]
    wide = [x.double() for x in single]
    exact = evaluate(direct, wide[:6], valid, wide[6], 1.0)
    plain = evaluate(direct, single[:6], valid, single[6], 1.0)
    got = evaluate(gyroscope_attention, single[:6], valid, single[6], 1.0)
    check(got, exact, plain)


@pytest.mark.parametrize("kind", KINDS)
def test_padding_changes_nothing(kind):
    shape = B, T, N, H, D = (2, 3, 10, 2, 16)
    inputs, valid, cotangent = make(shape, kind, 11)
    g = torch.Generator().manual_seed(12)

    def pad(x):
        """One more date and three more positions, or positions alone, of random numbers."""
        extra = (B, T + 1, N + 3, *x.shape[3:]) if x.shape[1] == T else (B, N + 3, *x.shape[2:])
        wide = torch.randn(extra, dtype=x.dtype, generator=g)
        wide[:, :T, :N] = x if x.shape[1] == T else wide[:, :T, :N]
        if x.shape[1] != T:
            wide[:, :N] = x
        return wide

    padded = torch.zeros(B, T + 1, N + 3, dtype=torch.bool)
    padded[:, :T, :N] = spread(valid, shape)
    wide = [pad(x) for x in (*inputs, cotangent)]
    before = evaluate(gyroscope_attention, inputs, valid, cotangent, 1.0)
    after = evaluate(gyroscope_attention, wide[:6], padded, wide[6], 1.0)
    check([x[:, :T, :N] if x.shape[1] == T + 1 else x[:, :N] for x in after], before)
    if kind == "date":  # padding by dates alone, as (B, T)
        wide = [x[:, :, :N] if x.shape[1] == T + 1 else x[:, :N] for x in wide]
        padded = torch.cat([valid, torch.zeros(B, 1, dtype=torch.bool)], 1)
        after = evaluate(gyroscope_attention, wide[:6], padded, wide[6], 1.0)
        check([x[:, :T] if x.shape[1] == T + 1 else x for x in after], before)


def test_one_date_is_spatial_attention():
    inputs, _, cotangent = make((2, 1, 13, 2, 16), "none", 3)
    got = evaluate(gyroscope_attention, inputs, None, cotangent, 0.5)
    q, k, v = (x.transpose(1, 2) for x in (inputs[3], inputs[4], inputs[2][:, 0]))
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=0.5)
    torch.testing.assert_close(got[0][:, 0], expected.transpose(1, 2), rtol=0, atol=1e-13)
    for name, x in zip(NAMES, got):
        assert name not in ("q", "k", "gate") or not x.any(), f"{name} has a gradient"


@pytest.mark.parametrize("kind", KINDS)
def test_sums_kept_for_backward(kind):
    """What another backend's backward may rely on: base 2, +inf where nothing is valid."""
    shape = (2, 3, 9, 2, 16)
    inputs, valid, _ = make(shape, kind, 22)
    q, k, v, *rest = inputs
    usable = spread(valid, shape)
    scores = energies(q, k, *rest, valid, 0.8)  # [B, H, T, N, T + N]
    lse = scores.logsumexp(-1).permute(0, 2, 3, 1)
    lse = torch.where(usable[..., None], lse / math.log(2), torch.inf)
    gates = rest[2].permute(0, 3, 1, 2)[..., None]
    spatial = (scores[..., 3:] - gates).amax(2).logsumexp(-1).transpose(1, 2)  # any date
    spatial = torch.where(usable.any(1)[..., None], spatial / math.log(2), torch.inf)
    _, *got = torch.ops.timo.gyroscope_attention(*inputs, valid, 0.8, "reference")
    for x, y in zip(got, (lse, spatial)):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-12)


def test_block_size_does_not_matter(small_blocks):
    inputs, valid, cotangent = make((2, 3, 40, 4, 16), "position", 21)
    whole = evaluate(gyroscope_attention, inputs, valid, cotangent, 1.0)
    small_blocks(1)
    assert len(list(module.tiles(inputs[0]))[0][2]) == 40
    check(evaluate(gyroscope_attention, inputs, valid, cotangent, 1.0), whole)


@pytest.mark.parametrize("kind", KINDS)
def test_derivatives(kind):
    inputs, valid, _ = make((1, 3, 3, 2, 2), kind, 31)
    leaves = [x.requires_grad_() for x in inputs]

    def run(*xs):
        return gyroscope_attention(*xs, valid, 0.8)

    assert torch.autograd.gradcheck(run, leaves)
    leaves = [x[..., :1].detach().requires_grad_() for x in leaves[:5]]
    assert torch.autograd.gradgradcheck(run, [*leaves, inputs[5]])


def test_third_derivative_is_refused():
    inputs, _, cotangent = make((1, 2, 3, 1, 2), "none", 32)
    q = inputs[0].requires_grad_()
    out = gyroscope_attention(q, *inputs[1:])
    (first,) = torch.autograd.grad(out, q, cotangent, create_graph=True)
    with pytest.raises(RuntimeError, match="third derivatives of gyroscope_attention"):
        torch.autograd.grad(first, q, cotangent, create_graph=True)


def test_one_tensor_in_several_places():
    """Self-attention of tokens: gradients of equal arguments add up, to any order."""
    inputs, _, cotangent = make((1, 2, 4, 1, 3), "none", 33)
    x = inputs[0].requires_grad_()

    def run(x):
        return gyroscope_attention(x, x, x, inputs[3], inputs[4], inputs[5])

    assert torch.autograd.gradcheck(run, x) and torch.autograd.gradgradcheck(run, x)


@pytest.mark.parametrize("kind", ["none", "position"])
def test_opcheck(kind):
    inputs, valid, cotangent = make((2, 3, 5, 2, 8), kind, 41, torch.float32)
    leaves = [x.requires_grad_() for x in inputs]
    op = torch.ops.timo.gyroscope_attention
    torch.library.opcheck(op, (*leaves, valid, 1.0, "auto"))
    saved = [x.detach() for x in op(*leaves, valid, 1.0, "auto")]
    args = (cotangent.requires_grad_(), *leaves, valid, 1.0, *saved, "auto")
    torch.library.opcheck(torch.ops.timo.gyroscope_attention_backward, args)


@pytest.mark.parametrize("kind", KINDS)
def test_compile(kind):
    torch._dynamo.reset()
    run = torch.compile(gyroscope_attention, fullgraph=True, dynamic=True, backend="aot_eager")
    for i, shape in enumerate([(3, 4, 6, 2, 8), (5, 3, 9, 2, 8), (2, 6, 2, 2, 8)]):
        inputs, valid, cotangent = make(shape, kind, 50 + i)
        with torch._dynamo.config.patch(error_on_recompile=i > 0):
            got = evaluate(run, inputs, valid, cotangent, 0.7)
        exact = evaluate(direct, inputs, valid, cotangent, 0.7)
        check(got, exact)


class Layer(torch.nn.Module):
    def forward(self, q, k, v, q_median, k_median, gate, valid):
        return gyroscope_attention(q, k, v, q_median, k_median, gate, valid)


def test_export():
    inputs, valid, _ = make((2, 3, 6, 2, 8), "position", 60)
    B, T, N = (torch.export.Dim(name, min=2, max=64) for name in "BTN")
    series, median = {0: B, 1: T, 2: N}, {0: B, 1: N}
    dynamic = (series, series, series, median, median, series, series)
    program = torch.export.export(Layer(), (*inputs, valid), dynamic_shapes=dynamic)
    inputs, valid, _ = make((3, 4, 5, 2, 8), "position", 61)
    exact = direct(*inputs, valid)
    torch.testing.assert_close(program.module()(*inputs, valid), exact, rtol=0, atol=1e-12)


MEMORY = """
import sys, torch, timo
torch.set_num_threads(2)

def status(key):
    for line in open("/proc/self/status"):
        if line.startswith(key):
            return int(line.split()[1]) * 1024

def inputs(B, T, N, H, D):
    shapes = [(B, T, N, H, D)] * 3 + [(B, N, H, D)] * 2 + [(B, T, N, H)]
    return [torch.randn(s).mul_(0.5).requires_grad_() for s in shapes]

def run(xs):
    out = timo.ops.gyroscope_attention(*xs, backend="reference")
    return (out, *torch.autograd.grad(out, xs, xs[2])) if sys.argv[1] == "backward" else (out,)

run(inputs(1, 2, 64, 1, 32))  # libraries load what they load on first use
xs = inputs(1, 10, 16384, 4, 32)
open("/proc/self/clear_refs", "w").write("5")  # the high-water mark starts from here
before = status("VmRSS")
results = run(xs)
grown = status("VmHWM") - before - sum(x.nbytes for x in results)
print(grown / 2**20)
"""


@pytest.mark.slow
@pytest.mark.parametrize("what", ["forward", "backward"])
def test_peak_memory(what):
    """512 x 512 pixels, 10 dates: 256 MB beside inputs and outputs; the direct form needs 43 GB."""
    if sys.platform != "linux":
        pytest.skip("reads /proc/self/status")
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, what], capture_output=True, text=True, check=True
    )
    assert float(done.stdout) < 256, f"{float(done.stdout):.0f} MiB"


def broken(index, change):
    """Arguments of which one is changed."""
    inputs, _, _ = make((1, 2, 3, 1, 4), "none", 70)
    arguments = [*inputs, None, 1.0]
    arguments[index] = change(arguments[index])
    return arguments


@pytest.mark.parametrize(
    "index, change, error, message",
    [
        (0, lambda q: q[0], ValueError, r"q has shape \(2, 3, 1, 4\); it must be \(B, T, N, H, D"),
        (0, lambda q: q.long(), TypeError, "q is int64"),
        (0, lambda q: None, TypeError, "q is NoneType"),
        (0, lambda q: q[:, :0], ValueError, "T is 0"),
        (1, lambda k: k[:, :1], ValueError, r"k has shape .* must be \(1, 2, 3, 1, 4\) to match q"),
        (2, lambda v: v.float(), TypeError, "v is float32 but q is float64"),
        (2, lambda v: v.to("meta"), ValueError, "v is on meta but q is on cpu"),
        (3, lambda m: m[:, :2], ValueError, "q_median has shape"),
        (4, lambda m: m.half(), TypeError, "k_median is float16 but q is float64"),
        (5, lambda g: g[..., None], ValueError, "gate has shape"),
        (5, lambda g: g.int(), TypeError, "gate is int32"),
        (6, lambda _: torch.ones(1, 2), TypeError, "valid is float32; it must be a bool"),
        (6, lambda _: torch.ones(2, 1).bool(), ValueError, r"valid has shape \(2, 1\)"),
        (7, lambda _: torch.tensor(1.0), TypeError, "scale is Tensor"),
    ],
)
def test_errors(index, change, error, message):
    with pytest.raises(error, match=message):
        gyroscope_attention(*broken(index, change))


def test_explain():
    inputs, _, _ = make((1, 2, 3, 1, 4), "none", 71)
    choice = timo.ops.explain(gyroscope_attention, *inputs)
    assert choice.backend in FORWARD.backends
    assert set(choice.reasons) == set(dispatch.BACKENDS) - {choice.backend}
    assert set(BACKWARD.backends) == set(FORWARD.backends)
    with pytest.raises(ValueError, match="backend is 'fast'"):
        gyroscope_attention(*inputs, backend="fast")
