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


def places(op: dispatch.Op) -> list[tuple[str, str]]:
    """(backend, device) of `cases`, for tests with a dtype of their own."""
    return list(dict.fromkeys(case[:2] for case in cases(op)))


def skip_reason(backend: str, device: str) -> str | None:
    """Why a case cannot run here; the reason is shown in the summary."""
    if missing := dispatch.unavailable(backend):
        return missing
    if slow(backend, device):
        if os.environ.get("TRITON_INTERPRET") != "1":
            return "TRITON_INTERPRET is not 1"
    return None


def slow(backend: str, device: str) -> bool:
    """Whether a case runs in Triton's interpreter."""
    return backend in (dispatch.TRITON, dispatch.TRITON_ATOMIC) and device == "cpu"


def share(cases: list, backend: str, device: str, turn: int) -> list[tuple[int, object]]:
    """Numbered cases to run: all, or every third of them where that is slow.

    Tests that pass the sum of their parameters' places as `turn` still show every case to every
    value of each parameter, if another one has three values.
    """
    numbered = list(enumerate(cases))
    return numbered[turn % 3 :: 3] if slow(backend, device) else numbered


def proves(item) -> list[str]:
    """Ops and backend that a test is evidence for, as "temporal_median triton"; empty off GPUs.

    Backend and device are parameters of the test or constants of its module, BACKEND and DEVICE;
    the op is that of the module's FORWARD, or those in its PROVES.
    """
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    backend, device = (
        parameters.get(name, getattr(item.module, name.upper(), None))
        for name in ("backend", "device")
    )
    if backend is None or device != "cuda":
        return []
    ops = getattr(item.module, "PROVES", None) or [item.module.FORWARD.name]
    return [f"{op} {backend}" for op in ops]
