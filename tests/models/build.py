"""Small models with random statistics and gates, and the oracle of the same weights."""

import torch
from torch import Tensor, nn

import timo
from tests.models.oracle import Oracle, assert_same
from timo.models.names import published

SMALL = dict(embed_dims=(16, 16, 32, 32), num_heads=(2, 2, 4, 4), depths=(1, 1, 2, 1))
DECODER = dict(decoder_embed_dim=32, decoder_num_heads=4, decoder_depth=2)


def build(task: str = "encoder", seed: int = 0, **options) -> nn.Module:
    """A float64 model whose parameters and running statistics are all at random."""
    torch.manual_seed(seed)
    options = SMALL | (DECODER if task == "mae" else {}) | dict(drop_path_rate=0.0) | options
    model = timo.create_model("timo_tiny", task, **options).double()
    for name, x in model.state_dict().items():
        if x.is_floating_point():
            base = 1.0 if "norm" in name or ".bn." in name or "running_var" in name else 0.0
            base = 0.0 if name.endswith(("bias", "running_mean")) else base
            x.copy_(base + (torch.rand_like(x) - 0.5) * (0.6 if x.ndim < 2 else 0.3))
    return model.eval()


def oracle(model: nn.Module, requires_grad: bool = False) -> Oracle:
    """The oracle of a model's weights; a segmenter's or classifier's own head is not part of it."""
    state = {published(k, ""): v.detach().clone() for k, v in model.state_dict().items()}
    if requires_grad:
        trained = {published(k, "") for k, _ in model.named_parameters()}
        for name in trained:
            state[name].requires_grad_()
    config = model.config
    kinds = config.get("attention", ("joint",) * 4)
    return Oracle(state, config["num_heads"], config["depths"], kinds, model.training)


def assert_same_gradients(model: nn.Module, other: Oracle) -> None:
    """Compare the gradients of all parameters."""
    for name, p in model.named_parameters():
        assert p.grad is not None, f"{name} has no gradient"
        assert_same(p.grad, other.state[published(name, "")].grad, name)


def assert_same_statistics(model: nn.Module, other: Oracle) -> None:
    """Compare the running statistics that a training step has moved."""
    own = {published(name, ""): x for name, x in model.state_dict().items()}
    assert other.after
    for name, exact in other.after.items():
        assert_same(own[name], exact, name)


def series(B=2, T=3, H=64, W=32, C=3, seed=1) -> Tensor:
    """Frames (B, T, C, H, W), float64."""
    return torch.randn(B, T, C, H, W, generator=torch.Generator().manual_seed(seed)).double()


def clouds(B=2, T=3, H=64, W=32, seed=2) -> Tensor:
    """Validity by 8×8 patches, so that tokens of every stage are partly and wholly invalid."""
    g = torch.Generator().manual_seed(seed)
    coarse = torch.rand(B, T, -(-H // 8), -(-W // 8), generator=g) > 0.4
    fine = coarse.repeat_interleave(8, 2).repeat_interleave(8, 3)[:, :, :H, :W]
    return fine & (torch.rand(B, T, H, W, generator=g) > 0.2)
