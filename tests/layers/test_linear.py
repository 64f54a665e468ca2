"""Linear layers by a convolution: the same function, and only where it is meant to run."""

import pytest
import torch
import torch.nn.functional as F

from tests.tolerance import assert_close
from timo.layers import Linear
from timo.layers import linear as module


@pytest.fixture
def slow_mkl(monkeypatch):
    monkeypatch.setattr(module, "_mkl_on_amd", lambda: True)


@pytest.fixture
def convolutions(monkeypatch):
    calls, real = [], F.conv2d
    monkeypatch.setattr(F, "conv2d", lambda *args: (calls.append(args), real(*args))[1])
    return calls


def layer_and_input(dtype, *shape, bias=True):
    torch.manual_seed(0)
    layer = Linear(24, 40, bias=bias).to(dtype)
    return layer, torch.randn(*shape, 24, dtype=dtype, requires_grad=True)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("strided", [True, False])
def test_equals_the_product(slow_mkl, convolutions, bias, strided):
    layer, x = layer_and_input(torch.float32, 2, 97, bias=bias)
    cotangent = torch.randn(2, 97, 40)

    def run(function, dtype):
        inputs = [t.detach().to(dtype).requires_grad_() for t in (x, *layer.parameters())]
        seen = inputs[0].repeat_interleave(2, 1)[:, ::2] if strided else inputs[0]
        out = function(seen, *inputs[1:], *[None] * (not bias))
        return out, *torch.autograd.grad(out, inputs, cotangent.to(dtype))

    got = run(module.linear, torch.float32)
    assert len(convolutions) == 1
    for mine, exact, plain in zip(got, run(F.linear, torch.float64), run(F.linear, torch.float32)):
        assert_close(mine, exact, plain)


def test_second_derivative(slow_mkl, convolutions):
    layer, x = layer_and_input(torch.float32, 130)

    def run(function, dtype):
        inputs = [t.detach().to(dtype).requires_grad_() for t in (x, *layer.parameters())]
        first = torch.autograd.grad(function(*inputs).square().sum(), inputs, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), inputs)

    got = run(module.linear, torch.float32)
    assert convolutions
    for mine, exact, plain in zip(got, run(F.linear, torch.float64), run(F.linear, torch.float32)):
        assert_close(mine, exact, plain)


def test_compiles_into_one_graph(slow_mkl):
    layer, x = layer_and_input(torch.float32, 2, 97)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), layer(x))


def test_where_the_product_stays(slow_mkl, convolutions, monkeypatch):
    for dtype, rows in ((torch.float64, 200), (torch.bfloat16, 200), (torch.float32, 127)):
        layer, x = layer_and_input(dtype, rows)
        assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))
    layer, x = layer_and_input(torch.float32, 200)
    with torch.autocast("cpu"):
        assert layer(x).dtype == torch.bfloat16
    monkeypatch.setattr(module, "_mkl_on_amd", lambda: False)
    assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))
    assert not convolutions


def test_exported_graphs_hold_no_convolution(slow_mkl):
    """And are for any number of rows."""
    layer, x = layer_and_input(torch.float32, 200)
    rows = torch.export.Dim("rows", min=1, max=1024)
    graph = torch.export.export(layer, (x.detach(),), dynamic_shapes=({0: rows},))
    assert not any("conv" in str(node.target) for node in graph.graph.nodes)
