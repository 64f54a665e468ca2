"""Which (backend, device, dtype) an op is tested on: read off its capability records."""

import os

import torch

from timo.ops import dispatch


def cases(op: dispatch.Op) -> list[tuple[str, str, torch.dtype]]:
    return [
        (backend.name, device, dtype)
        for backend in op.backends.values()
        for device in ("cpu", "cuda")
        if device in backend.devices
        for dtype in backend.dtypes
        if device == "cpu" or torch.cuda.is_available()
    ]


def skip_reason(backend: str, device: str) -> str | None:
    """Why a case cannot run here; the reason is shown in the summary."""
    if missing := dispatch.unavailable(backend):
        return missing
    if backend == dispatch.TRITON and device == "cpu":
        if os.environ.get("TRITON_INTERPRET") != "1":
            return "TRITON_INTERPRET is not 1"
    return None
