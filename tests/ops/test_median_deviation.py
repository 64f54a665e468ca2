"""median_deviation: every backend against the definition in float64, gradients by autograd."""

import pytest
import torch

import timo
from tests.ops.backends import cases, places, skip_reason
from tests.ops.test_temporal_median import loop
from tests.tolerance import assert_close
from timo.ops import dispatch, median_deviation, temporal_median
from timo.ops.median_deviation import BACKWARD, FORWARD

KINDS = ["none", "date", "position"]
SHAPES = [  # B, T, N, H, D
    (1, 1, 1, 1, 1),
    (2, 3, 5, 2, 16),
    (1, 4, 7, 3, 5),
    (2, 2, 9, 1, 24),
    (1, 10, 6, 2, 32),
    (1, 7, 19, 1, 65),
    (1, 38, 2, 4, 32),
    (2, 5, 3, 1, 128),
    (1, 64, 3, 2, 8),
]
NAMES = "values", "deviation", "dq", "dweight"


def spread(valid, shape):
    """Validity (B, T, N), whatever was given."""
    if valid is None:
        return torch.ones(shape[:3], dtype=torch.bool)
    return valid if valid.ndim == 3 else valid[:, :, None].expand(shape[:3])


def definition(q, weight, valid, indices):
    """Medians and deviations from them, in whatever dtype, where the selected dates are known."""
    usable = spread(valid, q.shape)[..., None, None]
    chosen = torch.where(usable, q, 0).gather(1, indices.clamp_min(0)[:, None])
    return chosen[:, 0], (torch.where(usable, q - chosen, 0) * weight).sum(-1)


def exact_results(q, weight, valid, indices, dvalues, ddeviation):
    """Values, deviation, dq and dweight in float64; and of each the sum of its terms' sizes."""
    usable = spread(valid, q.shape)
    grad = torch.where(usable[..., None], ddeviation, 0).double()
    leaves = [x.double().requires_grad_() for x in (q, weight)]
    outputs = definition(*leaves, valid, indices)
    moved = torch.where(usable.any(1)[..., None, None], dvalues, 0).double()
    results = [x.detach() for x in outputs]
    results += torch.autograd.grad(outputs, leaves, [moved, grad])
    values, grad = results[0], grad.abs()
    apart = torch.where(usable[..., None, None], q.double() - values[:, None], 0).abs()
    size = weight.double().abs()
    terms = [values.abs(), (apart * size).sum(-1)]
    terms += [grad.sum(1)[..., None] * size + moved.abs()]
    terms += [(grad[..., None] * apart).sum((0, 1, 2, 3))]
    return results, terms


def check(got, q, weight, valid, indices, dvalues, ddeviation):
    """Hold values, deviation and gradients to float64, and what is not valid to exactly 0."""
    results, terms = exact_results(q, weight, valid, indices, dvalues, ddeviation)
    assert torch.equal(got[0].double(), results[0])
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    assert [x.dtype for x in got] == [q.dtype, wide, q.dtype, weight.dtype]
    for name, x, y, size in zip(NAMES[1:], got[1:], results[1:], terms[1:]):
        # Half results are rounded once, at the end.
        rounded = y.to(x.dtype) if x.dtype.itemsize == 2 else None
        assert_close(x, y, rounded, f"{name} {tuple(q.shape)}", size)
    hidden = ~spread(valid, q.shape)
    assert not got[1][hidden].any() and not got[2][hidden].any()


def run(q, weight, valid, dvalues, ddeviation, backend):
    """Indices; and values, deviation, dq, dweight."""
    leaves = [x.detach().requires_grad_() for x in (q, weight)]
    values, indices, deviation = median_deviation(*leaves, valid, backend=backend)
    grads = torch.autograd.grad([values, deviation], leaves, [dvalues, ddeviation])
    return indices, [values.detach(), deviation.detach(), *grads]


def make(shape, dtype, kind, seed, weight_dtype=torch.float32):
    """q with ties, in storage of other strides; weight, validity and cotangents.

    What is not valid, and the cotangents of it, are NaN.
    """
    B, T, N, H, D = shape
    g = torch.Generator().manual_seed(seed)
    q = torch.randn(B, N, T, 2, H, D, generator=g)
    q = torch.where(torch.rand(q.shape, generator=g) < 0.5, (q * 2).round() / 2, q).to(dtype)
    q = q[:, :, :, 1].transpose(1, 2)
    weight = torch.randn(D, 2, generator=g).to(weight_dtype)[:, 0]
    size = {"none": None, "date": (B, T), "position": (B, T, N)}[kind]
    valid = None if size is None else torch.rand(size, generator=g) < 0.6
    dvalues = torch.randn(N, B, H, D, generator=g).to(dtype).transpose(0, 1)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    ddeviation = torch.randn(B, N, T, H, generator=g).to(wide).transpose(1, 2)
    usable = spread(valid, shape)
    q[~usable], ddeviation[~usable], dvalues[~usable.any(1)] = torch.nan, torch.nan, torch.nan
    return q, weight, valid, dvalues, ddeviation


@pytest.mark.parametrize("backend, device, dtype", cases(FORWARD))
@pytest.mark.parametrize("kind", KINDS)
def test_parity(backend, device, dtype, kind, poisoned):
    if why := skip_reason(backend, device):
        pytest.skip(why)
    for seed, shape in enumerate(SHAPES):
        other = (torch.float32, dtype, torch.bfloat16)[seed % 3]  # of the weight
        inputs = make(shape, dtype, kind, seed, other)
        there = [None if x is None else x.to(device) for x in inputs]
        kept = [x.clone() for x in there if x is not None]
        indices, got = run(*there, backend)
        q, weight, valid, *cotangents = inputs
        _, where = loop(q, valid)
        assert torch.equal(indices.cpu(), where)
        check([x.cpu() for x in got], q, weight, valid, where, *cotangents)
        for x, y in zip([x for x in there if x is not None], kept):
            assert torch.equal(x.nan_to_num(), y.nan_to_num()), "an input was written to"


@pytest.mark.parametrize("level", [0, 1, 2])
@pytest.mark.parametrize("dtype", FORWARD.backends["cpp"].dtypes)
def test_every_instruction_set(level, dtype):
    compiled = dispatch.compiled()
    if compiled is None or compiled.isa_level() < level:
        pytest.skip(f"this CPU has no level {level}")
    for seed, shape in enumerate(SHAPES):
        q, weight, valid, *cotangents = make(shape, dtype, KINDS[seed % 3], seed + 20)
        compiled.cap_isa(level)
        try:
            indices, got = run(q, weight, valid, *cotangents, "cpp")
        finally:
            compiled.cap_isa(99)
        assert torch.equal(indices, temporal_median(q, valid, backend="reference")[1])
        check(got, q, weight, valid, indices, *cotangents)


@pytest.mark.parametrize("backend, device", places(FORWARD))
def test_numbers_that_are_not_finite_stay_in_their_head(backend, device):
    if why := skip_reason(backend, device):
        pytest.skip(why)
    q = torch.randn(1, 4, 2, 3, 5, generator=torch.manual_seed(0)).to(device)
    weight = torch.ones(5, device=device)
    clean = median_deviation(q, weight, backend=backend)[2]
    q[0, 1, 0, 1, 0], q[0, 2, 1, 2, 4] = torch.nan, torch.inf
    values, indices, deviation = median_deviation(q, weight, backend=backend)
    assert values[0, 0, 1, 0].isnan() and indices[0, 0, 1, 0] == 1
    assert deviation[0, :, 0, 1].isnan().all() and deviation[0, 2, 1, 2] == torch.inf
    same = deviation == clean
    same[0, :, 0, 1] = same[0, :, 1, 2] = True
    assert same.all()


def test_gradient_of_the_weight_does_not_depend_on_threads():
    if dispatch.unavailable("cpp"):
        pytest.skip("timo._C is not built")
    inputs = make((2, 3, 77, 2, 33), torch.float32, "position", 1)
    threads, results = torch.get_num_threads(), []
    for n in (1, 2, 3):
        torch.set_num_threads(n)
        results.append(run(*inputs, "cpp")[1])
    torch.set_num_threads(threads)
    assert all(torch.equal(x, y) for r in results[1:] for x, y in zip(r[1:], results[0][1:]))


def test_derivatives():
    q, weight, valid, *_ = make((2, 3, 2, 2, 3), torch.float64, "position", 5, torch.float64)
    q = torch.randperm(q.numel(), generator=torch.manual_seed(0)).view(q.shape).double() / 10
    leaves = [q.requires_grad_(), weight.requires_grad_()]
    for v in (None, valid):

        def outputs(q, weight, v=v):
            values, _, deviation = median_deviation(q, weight, v)
            return values.sin(), deviation.square()

        assert torch.autograd.gradcheck(outputs, leaves)
        assert torch.autograd.gradgradcheck(outputs, leaves)


def test_third_derivatives_are_refused():
    q, weight = torch.randn(1, 3, 2, 1, 4).requires_grad_(), torch.randn(4).requires_grad_()
    out = median_deviation(q, weight)[2].square().sum()
    (first,) = torch.autograd.grad(out, q, create_graph=True)
    with pytest.raises(RuntimeError, match="third derivatives of median_deviation"):
        torch.autograd.grad(first.square().sum(), weight, create_graph=True)


def test_one_output_alone_has_gradients():
    q, weight, valid, dvalues, ddeviation = make((1, 5, 4, 2, 8), torch.float32, "position", 7)
    leaves = [q.requires_grad_(), weight.requires_grad_()]
    values, indices, deviation = median_deviation(*leaves, valid)
    zero = torch.zeros_like
    grads = torch.autograd.grad(deviation, leaves, ddeviation, retain_graph=True)
    shown = [values.detach(), deviation.detach(), *grads]
    check(shown, q.detach(), weight.detach(), valid, indices, zero(values.detach()), ddeviation)
    grads = torch.autograd.grad(values, leaves, dvalues)
    shown = [values.detach(), deviation.detach(), *grads]
    check(shown, q.detach(), weight.detach(), valid, indices, dvalues, zero(ddeviation))


def test_registration():
    q, weight, valid, *cotangents = make((2, 3, 4, 2, 8), torch.bfloat16, "date", 1)
    leaves = [q.requires_grad_(), weight.requires_grad_()]
    torch.library.opcheck(torch.ops.timo.median_deviation.default, (*leaves, valid, "auto"))
    values, indices, _ = median_deviation(*leaves, valid)
    arguments = [x.nan_to_num().requires_grad_() for x in cotangents]
    values = values.detach().requires_grad_()
    torch.library.opcheck(
        torch.ops.timo.median_deviation_backward.default,
        (*arguments, *leaves, valid, values, indices, "auto"),
    )


def test_compiles_whole_and_dynamic():
    def step(q, weight, valid):
        values, _, deviation = median_deviation(q, weight, valid)
        return values * 2, deviation.relu()

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=True)
    for i, shape in enumerate(((3, 5, 7, 2, 8), (4, 6, 9, 2, 8), (6, 9, 4, 2, 8))):
        q, weight, valid, *cotangents = make(shape, torch.float32, "date", i)
        leaves = [q.contiguous().requires_grad_(), weight.contiguous().requires_grad_()]
        results = []
        with torch._dynamo.config.patch(error_on_recompile=i > 0):
            for function in (compiled, step):
                outputs = function(*leaves, valid)
                results.append([*outputs, *torch.autograd.grad(outputs, leaves, cotangents)])
        for x, y in zip(*results):
            assert torch.equal(x.nan_to_num(), y.nan_to_num())


def test_exports():
    class Deviation(torch.nn.Module):
        def forward(self, q, weight):
            return median_deviation(q, weight)[2]

    q, weight, *_ = make((2, 3, 4, 2, 8), torch.float32, "none", 0)
    dynamic = ({0: torch.export.Dim("B")}, None)
    program = torch.export.export(Deviation(), (q, weight), dynamic_shapes=dynamic)
    q, *_ = make((3, 3, 4, 2, 8), torch.float32, "none", 1)
    assert torch.equal(program.module()(q, weight), Deviation()(q, weight))


def test_autocast_does_not_round_inside():
    q, weight, *_ = make((2, 3, 4, 2, 8), torch.float32, "none", 0)
    plain = median_deviation(q, weight)[2]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(median_deviation(q, weight)[2], plain)


def test_explain():
    q, weight, *_ = make((2, 65, 4, 2, 8), torch.float32, "none", 0)
    choice = timo.ops.explain(median_deviation, q, weight)
    assert choice.backend in ("cpp", "reference")
    assert choice.reasons["cuda"] == "does not implement this op"
    assert "at most 64 dates, not 65" in choice.reasons["triton"]
    assert BACKWARD.backends.keys() == FORWARD.backends.keys()


Q = torch.zeros(1, 2, 3, 1, 4)


@pytest.mark.parametrize(
    "q, weight, valid, error, words",
    [
        (Q[0], Q[0, 0, 0, 0], None, ValueError, r"q has shape \(2, 3, 1, 4\).*\(B, T, N, H, D\)"),
        (Q[:, :0], Q[0, 0, 0, 0], None, ValueError, r"T is 0"),
        (Q.int(), Q[0, 0, 0, 0], None, TypeError, "q is int32.*float32"),
        (Q, Q[0, 0, 0], None, ValueError, r"weight has shape \(1, 4\); it must be \(D,\)"),
        (Q, torch.zeros(5), None, ValueError, r"weight has shape \(5,\); it must be \(4,\)"),
        (Q, torch.zeros(4).int(), None, TypeError, "weight is int32"),
        (Q, torch.zeros(4, device="meta"), None, ValueError, "weight is on meta but q is on cpu"),
        (Q, torch.zeros(4), torch.ones(1, 3).bool(), ValueError, r"\(B, T\) = \(1, 2\)"),
        (Q, torch.zeros(4), torch.ones(1, 2), TypeError, "valid is float32"),
    ],
)
def test_bad_input(q, weight, valid, error, words):
    with pytest.raises(error, match=words):
        median_deviation(q, weight, valid)
