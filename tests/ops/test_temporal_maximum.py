"""temporal_maximum: every backend against one maximum over all enlarged maps in float64."""

import pytest
import torch
import torch.nn.functional as F

import timo
from tests.guards import guarded
from tests.ops import tiers
from tests.ops.backends import cases, places, share, skip_reason, slow
from tests.tolerance import assert_close
from timo.ops import dispatch
from timo.ops.checks import FLOATS
from timo.ops.temporal_maximum import BACKWARD, FORWARD, as_maps

SHAPES = [  # B, T, C, h, w, factor
    (1, 1, 1, 1, 1, 1),
    (1, 1, 3, 2, 2, 4),
    (2, 3, 5, 4, 3, 4),
    (1, 5, 65, 1, 6, 2),
    (2, 4, 128, 3, 1, 3),
    (1, 7, 70, 5, 5, 1),
    (1, 300, 2, 2, 9, 4),  # more columns than are mixed at a time
]
KINDS = ("none", "date", "position")


def all_maps(x, valid, factor):
    """Enlarged maps (B, T, C, fh, fw), and where they are usable."""
    maps = F.interpolate(
        x.flatten(0, 1), scale_factor=factor, mode="bilinear", align_corners=False
    ).unflatten(0, x.shape[:2])
    usable = torch.ones_like(maps, dtype=torch.bool)
    if valid is not None:
        wide = valid.view(*valid.shape[:2], 1, *(valid.shape[2:] or (1, 1))).double()
        wide = wide.expand(-1, -1, 1, *x.shape[3:]).flatten(0, 1)
        usable &= F.interpolate(wide, scale_factor=factor).unflatten(0, x.shape[:2]) > 0
    return maps, usable


def make(shape, dtype, kind, seed, device="cpu"):
    """Maps in storage of some strides, with NaN between; validity with dead dates and series."""
    B, T, C, h, w, factor = shape
    g = torch.Generator().manual_seed(seed)
    near = [
        torch.full((B, h, T, w, C + 3), torch.nan)[..., 1 : C + 1].permute(0, 2, 4, 1, 3),
        torch.empty(B, T, C, h, w),
        as_maps(torch.empty(B, T, C, h, w)),
    ][seed % 3]
    x = near.copy_(torch.randn(B, T, C, h, w, generator=g)).to(dtype)
    size = {"none": None, "date": (T, B), "position": (B, T, w, h)}[kind]
    valid = None if size is None else torch.rand(size, generator=g) < 0.6
    valid = valid if valid is None else valid.T if kind == "date" else valid.transpose(2, 3)
    if kind == "position" and B > 1:
        valid[0, :, 0] = False
    return x.to(device), None if valid is None else valid.to(device)


def exact_gradient(dates, cotangent, shape):
    """Through the dates that were found: near ties are decided in lower precision."""
    B, T, C, h, w, factor = shape
    x = torch.zeros(B, T, C, h, w, dtype=torch.float64, requires_grad=True)
    maps, _ = all_maps(x, None, factor)
    taken = maps.gather(1, dates.clamp_min(0).long()[:, None])[:, 0]
    out = torch.where(dates >= 0, taken, 0)
    return torch.autograd.grad(out, x, cotangent.double())[0]


def check(got, dates, grad, x, valid, cotangent, shape):
    """Values, dates and gradient against those of the exact maps."""
    maps, usable = all_maps(x.double(), valid, shape[5])
    best = torch.where(usable, maps, -torch.inf).amax(1)
    exact = torch.where(usable.any(1), best, 0)
    assert_close(got, exact, name=f"values {shape}")
    assert torch.equal(dates >= 0, usable.any(1)), "dates without a valid one"
    at = dates.clamp_min(0).long()[:, None]
    assert (usable.gather(1, at)[:, 0] | (dates < 0)).all(), "an invalid date"
    held = torch.where(dates >= 0, maps.gather(1, at)[:, 0], 0)
    assert_close(held.to(got.dtype), exact, name=f"what the dates hold {shape}")
    exact, terms = (exact_gradient(dates, y, shape) for y in (cotangent, cotangent.abs()))
    assert_close(grad, exact, name=f"gradient {shape}", terms=terms)


@pytest.mark.parametrize("backend, device, dtype", cases(FORWARD))
@pytest.mark.parametrize("kind", KINDS)
def test_parity(backend, device, dtype, kind):
    if why := skip_reason(backend, device):
        pytest.skip(why)
    shapes = SHAPES[:-1] if slow(backend, device) else SHAPES
    turn = KINDS.index(kind) + FLOATS.index(dtype)
    for seed, shape in share(shapes, backend, device, turn):
        x, valid = make(shape, dtype, kind, seed, device)
        kept = x.clone()
        with guarded():
            leaf = x.detach().requires_grad_()
            out, dates = timo.ops.temporal_maximum(leaf, valid, shape[5], backend=backend)
            cotangent = torch.randn(out.shape).to(dtype).to(device)
            (grad,) = torch.autograd.grad(out, leaf, cotangent)
        assert out.dtype == grad.dtype == dtype and dates.dtype == torch.int16
        assert torch.equal(x, kept), "the input was written to"
        on_cpu = (y if y is None else y.detach().cpu() for y in (out, dates, grad, x, valid))
        check(*on_cpu, cotangent.cpu(), shape)


@pytest.mark.parametrize("tier", tiers.OF_ALL_OPS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_every_instruction_set(tier, dtype):
    shape = 2, 4, 130, 3, 5, 4
    x, valid = make(shape, dtype, "position", 3)
    leaf = x.detach().requires_grad_()
    with tiers.forced(tier):
        out, dates = timo.ops.temporal_maximum(leaf, valid, 4, backend="cpp")
        cotangent = torch.randn(out.shape).to(dtype)
        (grad,) = torch.autograd.grad(out, leaf, cotangent)
    check(out.detach(), dates, grad, x, valid, cotangent, shape)


@pytest.mark.parametrize("backend, device", places(FORWARD))
def test_ties_and_infinities(backend, device):
    """Of equal dates the earliest; -inf of a valid date is a value, of an invalid one none."""
    if why := skip_reason(backend, device):
        pytest.skip(why)
    inf = torch.inf
    columns = torch.tensor([[1, 1, 1], [0, 2, 2], [-inf] * 3, [inf, 0, inf], [-inf, -5, 0]])
    valid = torch.tensor([[True] * 3, [True] * 3, [False, True, True], [False, True, True],
                          [True, True, False]])  # fmt: skip
    x = columns[:, :, None, None, None].to(device)
    values, dates = timo.ops.temporal_maximum(x, valid.to(device), backend=backend)
    assert values.flatten().tolist() == [1, 2, -inf, inf, -5]
    assert dates.flatten().tolist() == [0, 1, 1, 2, 1]
    values, dates = timo.ops.temporal_maximum(x[:2], valid[:2].to(device), 4, backend=backend)
    assert values[:, 0, 0, 0].tolist() == [1, 2] and dates[:, 0, 0, 0].tolist() == [0, 1]


@pytest.mark.parametrize("backend, device", places(FORWARD))
@pytest.mark.parametrize("factor", [1, 4])
def test_nan_of_a_valid_date_stays_and_of_others_does_not(backend, device, factor):
    if why := skip_reason(backend, device):
        pytest.skip(why)
    for t in range(3):
        x = torch.zeros(1, 3, 1, 1, 1, device=device)
        x[0, t] = torch.nan
        values, dates = timo.ops.temporal_maximum(x, None, factor, backend=backend)
        assert values.isnan().all() and (dates == t).all()
        valid = torch.ones(1, 3, dtype=torch.bool, device=device)
        valid[0, t] = False
        assert (timo.ops.temporal_maximum(x, valid, factor, backend=backend)[0] == 0).all()


@pytest.mark.parametrize("factor", [1, 2, 3])
@pytest.mark.parametrize("backend", ["reference", "cpp"])
def test_gradients(factor, backend):
    if why := skip_reason(backend, "cpu"):
        pytest.skip(why)
    x = torch.randn(1, 3, 2, 2, 3, dtype=torch.float64, requires_grad=True)
    valid = torch.tensor([[True, False, True]])

    def run(x):
        return timo.ops.temporal_maximum(x, valid, factor, backend=backend)[0]

    assert torch.autograd.gradcheck(run, x)
    assert torch.autograd.gradgradcheck(run, x)


def test_no_map_at_full_resolution_is_kept():
    x, kept = torch.randn(1, 6, 8, 4, 4, requires_grad=True), []

    def keep(tensor):
        kept.append(tensor.nbytes)
        return tensor

    valid = torch.ones(1, 6, 4, 4, dtype=torch.bool)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        got, _ = timo.ops.temporal_maximum(x, valid, 4)
    assert sum(kept) == 2 * got.numel()  # its date for each entry


def test_registration():
    x, valid = make((2, 3, 4, 3, 2, 2), torch.float32, "position", 1)
    leaf = x.clone().requires_grad_()
    for backend in ("reference", "auto"):
        torch.library.opcheck(torch.ops.timo.temporal_maximum.default, (leaf, valid, 2, backend))
        values, dates = timo.ops.temporal_maximum(x, valid, 2, backend=backend)
        torch.library.opcheck(
            torch.ops.timo.temporal_maximum_backward.default,
            (values.clone().requires_grad_(), dates, (3, 3, 2), 2, backend),
        )


@pytest.mark.parametrize("backend, device", places(FORWARD))
def test_an_output_is_no_view_of_the_input(backend, device):
    """A single date that is not enlarged, as it lies in memory."""
    if why := skip_reason(backend, device):
        pytest.skip(why)
    x = as_maps(torch.randn(2, 1, 3, 4, 5, device=device))
    values, _ = timo.ops.temporal_maximum(x, backend=backend)
    assert torch.equal(values, x[:, 0]) and values.data_ptr() != x.data_ptr()


@pytest.mark.parametrize("backend", ["cpp", "triton"])
def test_an_infinite_gradient_stays_in_its_place(backend):
    if why := skip_reason(backend, "cpu"):
        pytest.skip(why)
    x = torch.zeros(1, 2, 1, 3, 3, requires_grad=True)
    values, _ = timo.ops.temporal_maximum(x, backend=backend)
    cotangent = torch.zeros(values.shape)
    cotangent[..., 1, 1] = torch.inf
    (grad,) = torch.autograd.grad(values, x, cotangent)
    assert torch.equal(grad[:, 0], cotangent) and not grad[:, 1].any()


def test_compiles_whole_and_dynamic():
    def step(x, valid):
        return timo.ops.temporal_maximum(x, valid, 2)[0].square()

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for shape in ((3, 5, 7, 4, 2, 2), (4, 6, 9, 2, 8, 2), (6, 9, 4, 8, 3, 2)):
            x, valid = make(shape, torch.float32, "position", 1)
            leaves = [x.clone().requires_grad_() for _ in range(2)]
            got, expected = compiled(leaves[0], valid), step(leaves[1], valid)
            assert torch.equal(got, expected)
            for y in (got, expected):
                y.sum().backward()
            assert torch.equal(leaves[0].grad, leaves[1].grad)


def test_exports_for_any_number_of_dates():
    class Maximum(torch.nn.Module):
        def forward(self, x, valid):
            return timo.ops.temporal_maximum(x, valid, 2)[0]

    x, valid = make((2, 3, 4, 2, 8, 2), torch.float32, "date", 1)
    dates = {1: torch.export.Dim("T")}
    program = torch.export.export(Maximum(), (x, valid), dynamic_shapes=(dates, dates))
    x, valid = make((2, 7, 4, 2, 8, 2), torch.float32, "date", 1)
    assert torch.equal(program.module()(x, valid), Maximum()(x, valid))


def test_autocast_leaves_the_dtype():
    x = torch.randn(1, 3, 2, 4, 4)
    with torch.autocast("cpu", torch.bfloat16):
        values, _ = timo.ops.temporal_maximum(x, None, 4)
    assert torch.equal(values, timo.ops.temporal_maximum(x, None, 4)[0])


def test_explains():
    choice = timo.ops.explain(timo.ops.temporal_maximum, torch.zeros(1, 2, 3, 4, 5), factor=4)
    wanted = "reference" if dispatch.unavailable("cpp") else "cpp"
    assert choice.backend == wanted and set(BACKWARD.backends) == set(FORWARD.backends)


@pytest.mark.parametrize(
    "x, valid, factor, error, words",
    [
        (torch.zeros(2, 3), None, 1, ValueError, r"x has shape \(2, 3\).*\(B, T, C, h, w\)"),
        (torch.zeros(1, 2, 0, 1, 4), None, 1, ValueError, r"C is 0"),
        (torch.zeros(1, 2, 2, 1, 4).int(), None, 1, TypeError, "x is int32.*float32"),
        (torch.zeros(1, 2, 2, 1, 4), torch.ones(1, 2, 4, 1).bool(), 1, ValueError,
         r"\(B, T, h, w\) = \(1, 2, 1, 4\)"),
        (torch.zeros(1, 2, 2, 1, 4), None, 0, ValueError, "factor is 0.*at least 1"),
        (torch.zeros(1, 2, 2, 1, 4), None, 1.5, ValueError, "factor is 1.5.*integer"),
        (torch.zeros(1).expand(1, 32768, 1, 1, 1), None, 1, ValueError, "T must be at most 32,767"),
    ],
)  # fmt: skip
def test_bad_input(x, valid, factor, error, words):
    with pytest.raises(error, match=words):
        timo.ops.temporal_maximum(x, valid, factor)
