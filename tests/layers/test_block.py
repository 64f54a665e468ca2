"""Block, stochastic depth, layer scale."""

import pytest
import torch

from tests.models.oracle import assert_same
from timo.layers import Block, DropPath, GyroscopeAttention


def test_drop_path_drops_whole_samples_and_keeps_the_mean():
    torch.manual_seed(0)
    out = DropPath(0.25).train()(torch.ones(4000, 2, 3))
    per_sample = out.flatten(1)
    assert (per_sample == per_sample[:, :1]).all()
    values, counts = per_sample[:, 0].unique(return_counts=True)
    assert torch.allclose(values, torch.tensor([0.0, 1 / 0.75]))
    assert abs(counts[0].item() / 4000 - 0.25) < 0.03


def test_drop_path_is_the_identity_in_evaluation():
    x = torch.randn(5, 2)
    assert torch.equal(DropPath(0.9).eval()(x), x)
    with pytest.raises(ValueError, match="rate is 1.0"):
        DropPath(1.0)


@pytest.mark.parametrize("scale", [None, 0.25])
def test_both_branches_are_added(scale):
    torch.manual_seed(0)
    block = Block(16, 2, "gyroscope", layer_scale=scale).double().eval()
    assert isinstance(block.attn, GyroscopeAttention)
    x = torch.randn(2, 12, 16, dtype=torch.float64)
    factor = 1 if scale is None else scale
    middle = x + factor * block.attn(block.norm1(x), 3)
    hidden = block.mlp.fc1(block.norm2(middle))
    hidden = hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5))  # exact GELU
    assert_same(block(x, 3), middle + factor * block.mlp.fc2(hidden))
    assert block.norm1.eps == block.norm2.eps == 1e-6
    assert block.mlp.fc1.out_features == 64


def test_a_dropped_branch_leaves_the_input():
    torch.manual_seed(0)
    block = Block(16, 2, drop_path=0.999).train()
    x = torch.randn(2, 12, 16)
    assert torch.equal(block(x, 3), x)


def test_unknown_attention_is_named():
    with pytest.raises(ValueError, match="'full'; it must be gyroscope or joint"):
        Block(16, 2, "full")
