"""Which backend runs an op: capability records, selection, explanation, one error.

Every op file states one `Backend` record per implementation. The record alone decides: selection
looks at device, dtype and sizes of the arguments, never tries a kernel to see if it raises.
"""

import importlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor

REFERENCE, CPP, TRITON, CUDA = "reference", "cpp", "triton", "cuda"
TRITON_ATOMIC = "triton_atomic"  # Triton kernels that add up some gradient in any order
ANY_DEVICE = ("cpu", "cuda", "mps", "xpu")  # where PyTorch alone runs
BACKENDS = (CUDA, TRITON, TRITON_ATOMIC, CPP, REFERENCE)


@dataclass(frozen=True)
class Request:
    """What an op is asked to do, as far as the choice of a backend depends on it."""

    device: torch.device
    dtype: torch.dtype
    dates: int | None = None
    head_dim: int | None = None


@dataclass(frozen=True)
class Backend:
    """Capability record of one implementation of one op."""

    name: str
    run: Callable
    devices: tuple[str, ...]
    dtypes: tuple[torch.dtype, ...]
    max_dates: int | None = None
    head_dims: tuple[int, int] | None = None  # least and greatest
    min_capability: tuple[int, int] | None = None
    deterministic: bool = True  # the same bits in every run; "auto" takes no other
    # Compute capabilities on which the parity suite has passed, each with the committed file that
    # says so. A test reads the files.
    proven: Mapping[str, str] = field(default_factory=dict)

    def refusals(self, request: Request) -> list[str]:
        """Why this backend cannot run the request; empty if it can."""
        reasons = []
        missing = unavailable(self.name)
        if missing:
            reasons.append(missing)
        if not self.deterministic and torch.are_deterministic_algorithms_enabled():
            reasons.append("adds up in any order: not under torch.use_deterministic_algorithms")
        if request.device.type not in self.devices:
            reasons.append(f"runs on {' or '.join(self.devices)}, not on {request.device.type}")
        if request.dtype not in self.dtypes:
            known = ", ".join(str(d).removeprefix("torch.") for d in self.dtypes)
            reasons.append(f"takes {known}, not {str(request.dtype).removeprefix('torch.')}")
        if self.max_dates and request.dates and request.dates > self.max_dates:
            reasons.append(f"takes at most {self.max_dates} dates, not {request.dates}")
        if self.head_dims and request.head_dim:
            low, high = self.head_dims
            if not low <= request.head_dim <= high:
                reasons.append(f"takes head dimensions {low} to {high}, not {request.head_dim}")
        if not reasons and self.min_capability and request.device.type == "cuda":
            found = torch.cuda.get_device_capability(request.device)
            if found < self.min_capability:
                reasons.append(
                    f"requires capability {self.min_capability}, this device has {found}"
                )
        return reasons

    def unproven(self, request: Request) -> str | None:
        """Why `auto` passes over a backend that could run; None if it does not."""
        if not self.deterministic:
            return f'adds up in any order; ask for it by backend="{self.name}"'
        if self.name == TRITON and request.device.type == "cpu":
            return "runs in Triton's interpreter, for tests"
        if self.name == REFERENCE or request.device.type != "cuda" or self.evidence(request):
            return None
        return (
            f"no committed parity result on {capability(request.device)} yet; "
            f'ask for it by backend="{self.name}" or TIMO_BACKEND={self.name}'
        )

    def evidence(self, request: Request) -> str | None:
        """The results file by which this backend has passed on the request's kind of GPU."""
        if request.device.type != "cuda":
            return None
        return self.proven.get(capability(request.device))


@dataclass(frozen=True)
class Choice:
    """What `explain` returns: the backend that runs and why each other does not.

    `evidence` is the committed results file by which `auto` trusts the backend on this GPU.
    """

    op: str
    backend: str | None
    reasons: dict[str, str] = field(default_factory=dict)
    evidence: str | None = None

    def __str__(self) -> str:
        proof = f" (passed: {self.evidence})" if self.evidence else ""
        lines = [f"{self.op}: {self.backend or 'no backend can run this'}{proof}"]
        lines += [f"  {name}: {reason}" for name, reason in self.reasons.items()]
        return "\n".join(lines)


@dataclass
class Op:
    """One op: its records and how to read a request off its arguments."""

    name: str
    request: Callable[..., Request]
    backends: dict[str, Backend] = field(default_factory=dict)

    def choose(self, request: Request, wanted: str = "auto") -> Choice:
        """Pick a backend from the records; `Choice.backend` is None if the request cannot be met.

        `wanted` is "auto" or the backends to choose among, as "triton" or "cpp,reference". With
        "auto", TIMO_BACKEND may name them.
        """
        if wanted == "auto":
            wanted = os.environ.get("TIMO_BACKEND") or "auto"
        listed = reversed(self.backends) if wanted == "auto" else wanted.split(",")
        names = tuple(map(str.strip, listed))
        if unknown := set(names) - set(BACKENDS):
            raise ValueError(
                f"backend is {wanted!r} (argument or TIMO_BACKEND), {sorted(unknown)} is unknown; "
                f"it must be auto or among {', '.join(reversed(BACKENDS))}, separated by commas"
            )
        chosen, reasons = None, {}
        for name in (*names, *(n for n in BACKENDS if n not in names)):
            backend = self.backends.get(name)
            if backend is None:
                reasons[name] = "does not implement this op"
            elif refusals := backend.refusals(request):
                reasons[name] = "; ".join(refusals)
            elif name not in names:
                reasons[name] = f"{wanted} was asked for"
            elif wanted == "auto" and (why := backend.unproven(request)):
                reasons[name] = why
            elif chosen:
                reasons[name] = f"{chosen} is preferred"
            else:
                chosen = name
        evidence = self.backends[chosen].evidence(request) if chosen else None
        return Choice(self.name, chosen, reasons, evidence)

    def select(self, wanted: str, *args, **kwargs) -> Backend:
        """The record that runs these arguments, or one error with every backend's reason."""
        request = self.request(*args, **kwargs)
        choice = self.choose(request, wanted)
        if choice.backend is None:
            shown = [
                f"{tuple(a.shape)} {str(a.dtype).removeprefix('torch.')} on {a.device}"
                for a in (*args, *kwargs.values())
                if isinstance(a, Tensor)
            ]
            raise RuntimeError(f"{choice}\n  arguments: {'; '.join(shown)}")
        return self.backends[choice.backend]


OPS: dict[str, Op] = {}


def register(name: str, request: Callable[..., Request], *backends: Backend) -> Op:
    """Enter an op's records into the registry that dispatch, `explain` and the tests read.

    "auto" takes the last that can run a request and is proven where it is to run.
    """
    op = OPS[name] = Op(name, request, {b.name: b for b in backends})
    return op


def explain(op, *args, backend: str = "auto", **kwargs) -> Choice:
    """Say which backend would run `op` on these arguments and why each other would not.

    Args:
        op: an op's name, or its public function, as `timo.ops.temporal_median`.
        args, kwargs: the op's own arguments. Nothing is computed.
        backend: as for the op.

    Returns:
        A `Choice`; `print` shows it line by line.
    """
    name = op if isinstance(op, str) else op.__name__
    if name not in OPS:
        raise ValueError(f"op is {name!r}; it must be one of {', '.join(OPS)}")
    return OPS[name].choose(OPS[name].request(*args, **kwargs), backend)


def assume_constant_result(function):
    """`torch.compiler.assume_constant_result`, which imports the compiler: 1 s at `import timo`."""
    function._dynamo_marked_constant = True
    return function


@cache
def unavailable(backend: str) -> str | None:
    """Why a backend is missing from this installation; None if it is there."""
    if backend in (CPP, CUDA) and compiled() is None:
        return load_compiled()
    if backend == CUDA and not compiled().has_cuda:
        return "timo._C was built without CUDA"
    if backend in (TRITON, TRITON_ATOMIC):
        try:
            import triton  # noqa: F401
        except ImportError:
            return "triton is not installed"
    return None


@cache
def compiled():
    """The compiled module `timo._C`, or None where it was not built or does not load."""
    module = load_compiled()
    return None if isinstance(module, str) else module


def load_compiled():
    """The compiled module, or why there is none."""
    try:
        return importlib.import_module("timo._C")
    except ModuleNotFoundError:
        return "timo._C is not built"
    except ImportError as error:
        return f"timo._C does not load: {error}"


def capability(device: torch.device) -> str:
    """Of a GPU, as sm_90."""
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def triton_devices() -> tuple[str, ...]:
    """Where Triton kernels run: GPUs, and the CPU under the interpreter."""
    return ("cuda", "cpu") if os.environ.get("TRITON_INTERPRET") == "1" else ("cuda",)


# What records of kernels that have passed on a GPU have in common; see `Backend.proven`.
PROVEN: dict[str, str] = {"sm_90": "benchmarks/results/h200/parity.json"}
BY_TRITON: dict[str, Any] = {"devices": triton_devices(), "proven": PROVEN}
BY_CUDA: dict[str, Any] = {"devices": ("cuda",), "min_capability": (8, 0), "proven": PROVEN}


def dtype_code(dtype: torch.dtype) -> int:
    """The number that csrc/dtype.h gives a dtype."""
    floats = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
    return (*floats, torch.uint8, torch.uint16).index(dtype)
