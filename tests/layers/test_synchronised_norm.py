"""Statistics of a batch that several processes share."""

import os

import torch
from torch import distributed as dist
from torch import multiprocessing

from tests.tolerance import assert_close
from timo.layers import MaskedBatchNorm


def inputs():
    torch.manual_seed(0)
    x = torch.randn(11, 3, 4, dtype=torch.float64) * 2 + 1
    return x, torch.rand(11, 4) > 0.3, torch.randn_like(x)


def run(x, valid, cotangent, count=None, compiled=False):
    """Output, gradients of x, weight and bias, running statistics, and a second derivative."""
    norm = MaskedBatchNorm(3).double()
    norm.synchronised = True
    torch.nn.init.constant_(norm.weight, 1.5)
    x = x.clone().requires_grad_()
    layer = torch.compile(norm, fullgraph=True, backend="eager") if compiled else norm
    out = layer(x, valid, count)
    leaves = x, norm.weight, norm.bias
    grads = torch.autograd.grad(out, leaves, cotangent, create_graph=not compiled)
    second = torch.zeros_like(x)
    if not compiled:
        (second,) = torch.autograd.grad(grads[0].square().sum(), x)
    results = out, *grads, norm.running_mean, norm.running_var, norm.num_batches_tracked, second
    return tuple(y.detach() for y in results)


def cases(valid, cotangent):
    """With validity, compiled too; without; with as many zeros left out as entries are valid."""
    yield valid, cotangent, None, True
    yield valid, cotangent
    yield None, cotangent
    yield valid, cotangent, 2 * valid.sum()


def process(rank: int, folder: str) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo"}
    dist.init_process_group("gloo", f"file://{folder}/group", rank=rank, world_size=2)
    part = slice(0, 4) if rank == 0 else slice(4, 11)
    x, valid, cotangent = (y[part] for y in inputs())
    results = [run(x, *case) for case in cases(valid, cotangent)]
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_equal_one(tmp_path):
    """Unequal shares of a batch."""
    multiprocessing.spawn(process, (str(tmp_path),), nprocs=2)
    shared = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    x, valid, cotangent = inputs()
    for case, arguments in enumerate(cases(valid, cotangent)):
        whole = run(x, *arguments[:3])
        parts = [shared[rank][case] for rank in range(2)]
        compiled = len(arguments) > 3
        for i in (0, 1) if compiled else (0, 1, 7):  # of x: a part each
            assert_close(torch.cat([p[i] for p in parts]), whole[i])
        for i in (2, 3):  # gradients of weight and bias: summed by the training loop
            assert_close(parts[0][i] + parts[1][i], whole[i])
        for part in parts:
            for i in (4, 5):
                assert_close(part[i], whole[i])
            assert part[6] == 1
