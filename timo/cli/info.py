"""`timo info`."""

import argparse
import os
from collections.abc import Sequence

import torch

import timo
from timo.ops import dispatch
from timo.ops.checks import dtype_name


def info(arguments: Sequence[str]) -> int:
    """Say what is installed, which devices there are, and which backend runs each op on each."""
    parser = argparse.ArgumentParser("timo info", description=info.__doc__)
    parser.parse_args(arguments)
    compiled = dispatch.compiled()
    print(f"timo {timo.__version__}, torch {torch.__version__}")
    for name in (dispatch.CPP, dispatch.TRITON, dispatch.CUDA):
        print(f"{name:10s} {dispatch.unavailable(name) or 'available'}")
    if compiled:
        tiers = ("portable", "AVX2", "AVX-512", "AVX-512 and its BF16", "AVX-512 and AMX bf16")
        print(f"CPU        {tiers[compiled.isa_level()]}, {torch.get_num_threads()} threads")
    devices = [torch.device("cpu")]
    for index in range(torch.cuda.device_count()):
        devices.append(torch.device("cuda", index))
        name = torch.cuda.get_device_name(index)
        print(f"cuda:{index}     {name}, {dispatch.capability(devices[-1])}")
    if "TIMO_BACKEND" in os.environ:
        print(f"TIMO_BACKEND={os.environ['TIMO_BACKEND']}")
    dtypes = (torch.float32, torch.bfloat16)
    for device in devices:
        print(f"\nbackend of each op on {device}, by dtype (timo.ops.explain says why)")
        for op in dispatch.OPS.values():
            chosen = []
            for dtype in dtypes:
                request = dispatch.Request(device, dtype, dates=10, head_dim=32)
                chosen.append(f"{dtype_name(dtype)} {op.choose(request).backend}")
            print(f"  {op.name:30s} {', '.join(chosen)}")
    print("\nGPU kernels that `auto` takes, with the committed result that each passed on that GPU")
    for op in dispatch.OPS.values():
        for backend in op.backends.values():
            for capability, path in backend.proven.items() if backend.deterministic else ():
                print(f"  {op.name:30s} {backend.name:7s} {capability:7s} {path}")
    if not any(b.proven for op in dispatch.OPS.values() for b in op.backends.values()):
        print("  none yet: `make gpu` makes such a result on a machine with a GPU")
    return 0
