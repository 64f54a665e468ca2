"""Attention layers: validity, padding, degenerate samples, errors.

Against the direct form they are tested as part of the encoder, and by the conformance vectors.
"""

import pytest
import torch

from tests.models.oracle import Oracle, assert_same
from tests.tolerance import assert_close
from timo.layers import GyroscopeAttention, JointAttention
from timo.layers.attention import fast_attention
from timo.models.names import published
from timo.ops import median_deviation

KINDS = {"gyroscope": GyroscopeAttention, "joint": JointAttention}


def layer_of(kind, dim=16, heads=2, bias=True):
    torch.manual_seed(0)
    layer = KINDS[kind](dim, heads, bias).double()
    for p in layer.parameters():
        torch.nn.init.normal_(p, std=0.4)
    return layer


def tokens(B=2, T=3, N=7, dim=16):
    return torch.randn(B, T * N, dim, dtype=torch.float64, generator=torch.manual_seed(1))


VALID = {
    "all": None,
    "dates": torch.tensor([[True, False, True], [True, True, True]]),
    "tokens": torch.rand(2, 3, 7, generator=torch.manual_seed(2)) > 0.4,
}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("which", VALID)
@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_direct_form(kind, which, training, bias):
    layer, x, valid = layer_of(kind, bias=bias).train(training), tokens(), VALID[which]
    state = {published(f"x.attn.{k}", ""): v.clone() for k, v in layer.state_dict().items()}
    other = Oracle(state, (), (), training=training)
    full = torch.ones(2, 3, 7, dtype=torch.bool) if valid is None else valid
    full = full[..., None].expand(2, 3, 7) if full.ndim == 2 else full
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    got = layer(a, 3, valid).view(2, 3, 7, 16)[full]
    exact = other.attention("x.attn", b.view(2, 3, 7, 16), 2, kind, full)[full]
    assert_same(got, exact)
    cotangent = torch.randn_like(exact)
    got.backward(cotangent)
    exact.backward(cotangent)
    assert_same(a.grad, b.grad)
    for name, value in other.after.items():
        own = "gate_norm." + name.rsplit(".", 1)[1]
        assert_same(layer.state_dict()[own], value, own)


@pytest.mark.skipif(not fast_attention("cpu", torch.float32), reason="no kernel for this CPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("which", VALID)
def test_compiled_joint_attention(which, dtype, monkeypatch):
    """Output and every gradient, at valid tokens, as exact as PyTorch's attention."""
    valid = VALID[which]
    full = torch.ones(2, 3, 7, dtype=torch.bool) if valid is None else valid
    full = full[..., None].expand(2, 3, 7) if full.ndim == 2 else full
    torch.manual_seed(3)
    cotangent = torch.randn(tokens().shape, dtype=dtype) * full.flatten(1)[..., None]

    def run(dtype):
        layer, x = layer_of("joint").to(dtype), tokens().to(cotangent.dtype).to(dtype)
        layer.load_state_dict(layer_of("joint").to(cotangent.dtype).state_dict())
        out = layer(x.requires_grad_(), 3, valid)
        out.backward(cotangent.to(dtype))
        grads = {name: p.grad for name, p in layer.named_parameters()}
        return {"out": out.view(2, 3, 7, 16)[full], "x": x.grad} | grads

    got, exact = run(dtype), run(torch.float64)
    monkeypatch.setenv("TIMO_BACKEND", "reference")
    plain = run(dtype)
    assert not torch.equal(got["x"], plain["x"])  # one is the kernel's
    for name in exact:
        assert_close(got[name], exact[name], plain[name], name)


def test_which_joint_attention(monkeypatch):
    assert not fast_attention("cpu", torch.float64)
    assert not fast_attention("cuda", torch.float32)
    monkeypatch.setenv("TIMO_BACKEND", "reference")
    assert not fast_attention("cpu", torch.float32)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_padded_dates_and_their_content_change_nothing(kind, training):
    layer, x, valid = layer_of(kind).train(training), tokens(), VALID["tokens"]
    state = {k: v.clone() for k, v in layer.state_dict().items()}
    expected = layer(x, 3, valid).view(2, 3, 7, 16)
    layer.load_state_dict(state)
    longer = torch.cat([x, 1e3 * torch.randn(2, 14, 16, dtype=torch.float64)], 1)
    padded = torch.cat([valid, torch.zeros(2, 2, 7, dtype=torch.bool)], 1)
    got = layer(longer, 5, padded).view(2, 5, 7, 16)[:, :3]
    assert_same(got[valid], expected[valid])


@pytest.mark.parametrize("kind", KINDS)
def test_a_sample_without_a_valid_token_is_finite(kind):
    layer = layer_of(kind).train()
    x = tokens().requires_grad_()
    out = layer(x, 3, torch.tensor([[False] * 3, [True] * 3]))
    out.square().sum().backward()
    assert out.isfinite().all() and x.grad.isfinite().all()
    assert all(p.grad.isfinite().all() for p in layer.parameters())


@pytest.mark.parametrize("which", VALID)
def test_gate_statistics_are_those_of_float32_under_autocast(which):
    """Of the queries as they come out of their projection, in half precision."""
    layer, x, seen = layer_of("gyroscope").float().train(), tokens().float(), []
    layer.q.register_forward_hook(lambda module, args, out: seen.append(out))
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x, 3, VALID[which])
    assert out.dtype == seen[0].dtype == torch.bfloat16
    q = seen[0].view(2, 3, 7, 2, 8).double()
    _, _, deviation = median_deviation(q, layer.gate.weight[0].double(), VALID[which])
    full = torch.ones(2, 3, 7, dtype=torch.bool) if VALID[which] is None else VALID[which]
    full = full[..., None].expand(2, 3, 7) if full.ndim == 2 else full
    exact = deviation[full]
    norm = layer.gate_norm
    assert_close(norm.running_mean, norm.momentum * exact.mean()[None], terms=exact.abs().mean())
    variance = norm.momentum * exact.var()[None] + (1 - norm.momentum)
    assert_close(norm.running_var, variance)


def test_no_softmax_without_a_key(monkeypatch):
    """What a fully masked row gives differs between the kernels behind torch's attention."""
    masks, real = [], torch.nn.functional.scaled_dot_product_attention

    def attention(q, k, v, attn_mask):
        masks.append(attn_mask)
        return real(q, k, v, attn_mask=attn_mask)

    monkeypatch.setattr("torch.nn.functional.scaled_dot_product_attention", attention)
    layer_of("joint")(tokens(), 3, torch.tensor([[False] * 3, [True, False, False]]))
    assert torch.equal(masks[0].sum(-1).flatten(), torch.tensor([21, 7]))


@pytest.mark.parametrize("kind", KINDS)
def test_bad_arguments_are_named(kind):
    layer = layer_of(kind)
    with pytest.raises(ValueError, match="dim is 16; it must be a multiple of num_heads = 3"):
        KINDS[kind](16, 3)
    with pytest.raises(ValueError, match=r"x has shape \(21, 16\)"):
        layer(tokens()[0], 3)
    with pytest.raises(ValueError, match="last dimension must be dim = 16"):
        layer(tokens(dim=8), 3)
    with pytest.raises(ValueError, match="num_dates is 4; it must divide the 21 tokens"):
        layer(tokens(), 4)
    with pytest.raises(ValueError, match=r"valid has shape \(2, 4\)"):
        layer(tokens(), 3, torch.ones(2, 4, dtype=torch.bool))
    with pytest.raises(TypeError, match="valid is float32"):
        layer(tokens(), 3, torch.ones(2, 3))
    assert repr(layer).count("num_heads=2") == 1
