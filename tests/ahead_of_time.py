"""Compile every shipped Triton configuration for GPUs that need not be there.

Usage: python -m tests.ahead_of_time 90  -> one JSON object a line: kernel, registers, spills, ...
Runs in a process of its own, since TRITON_INTERPRET must not be set.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from tests.ahead_of_time_gyroscope import cases as gyroscope_cases
from tests.ahead_of_time_units import cases as unit_cases
from tests.descriptors import INSTRUCTION, disassemble, foreign_descriptors
from timo.kernels import assemble_by, median_deviation, temporal_maximum, temporal_median

# Shared memory a block may use, bytes (CUDA programming guide, compute capabilities).
SHARED = {80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448, 100: 232_448, 120: 101_376}
ALIGNED = [["tt.divisibility", 16]]
POINTERS = {"fp32": "*fp32", "fp16": "*fp16", "bf16": "*bf16"}


def temporal_median_cases() -> Iterator[tuple]:
    for dates in (1, 3, 10, 38, 128, 256):
        config = temporal_median.forward_config(dates)
        for pointer in POINTERS.values():
            for has_valid in (False, True):
                signature = {
                    "p_x": pointer, "p_valid": "*u8", "p_values": pointer, "p_indices": "*i64",
                    **dict.fromkeys(("channels", "H", "D", "T"), "i32"),
                    **dict.fromkeys(("x_b", "x_t", "x_n", "x_h", "v_b", "v_t", "v_n"), "i64"),
                }  # fmt: skip
                constants = {
                    "HAS_VALID": has_valid, "DATES": config["DATES"], "BLOCK": config["BLOCK"],
                }  # fmt: skip
                label = f"temporal_median T={dates} {pointer} valid={has_valid}"
                kernel = temporal_median.median_kernel
                yield label, kernel, signature, constants, config["num_warps"], 3
    for pointer in POINTERS.values():
        signature = {"p_grad": pointer, "p_indices": "*i64", "p_out": pointer}
        signature |= {"T": "i32", "channels": "i64"}
        label = f"temporal_median_backward {pointer}"
        yield label, temporal_median.scatter_kernel, signature, {"BLOCK": 1024}, 4, 3


def median_deviation_cases() -> Iterator[tuple]:
    sizes = dict.fromkeys(("rows", "H", "D", "T"), "i32")
    strides = dict.fromkeys(("x_b", "x_t", "x_n", "x_h", "v_b", "v_t", "v_n"), "i64")
    for pointer, has_valid in product(POINTERS.values(), (False, True)):
        inputs = {"p_x": pointer, "p_weight": "*fp32", "p_valid": "*u8"}
        inputs |= {"p_values": pointer, "p_indices": "*i64"}
        for dates, head_dim in ((3, 32), (64, 128)):
            config = median_deviation.forward_config(dates, head_dim)
            warps = config.pop("num_warps")
            signature = inputs | {"p_deviation": "*fp32"} | sizes | strides
            label = f"median_deviation T={dates} D={head_dim} {pointer} valid={has_valid}"
            constants = {"HAS_VALID": has_valid, **config}
            yield label, median_deviation.deviation_kernel, signature, constants, warps, 3
        config = median_deviation.backward_config(32)
        warps = config.pop("num_warps")
        signature = inputs | {"p_dvalues": pointer, "p_ddeviation": "*fp32"}
        signature |= {"p_dx": pointer, "p_partial": "*fp32"} | sizes | strides
        label = f"median_deviation_backward {pointer} valid={has_valid}"
        constants = {"HAS_VALID": has_valid, **config}
        yield label, median_deviation.deviation_backward_kernel, signature, constants, warps, 3


def temporal_maximum_cases() -> Iterator[tuple]:
    sizes = dict.fromkeys(("T", "C", "h", "w", "factor"), "i32")
    strides = dict.fromkeys(("x_t", "v_b", "v_t", "v_h", "v_w"), "i64")
    for pointer, C in product(POINTERS.values(), (256, 33, 2)):
        config = temporal_maximum.tile(C)
        launch = config.pop("num_warps"), 3, config.pop("maxnreg")
        label = f"{pointer} C={C}"
        for has_valid in (False, True):
            signature = {"p_maps": pointer, "p_valid": "*u8", "p_values": pointer}
            signature |= {"p_dates": "*i16"} | sizes | strides
            kernel, constants = temporal_maximum.maximum_kernel, {"HAS_VALID": has_valid, **config}
            name = f"temporal_maximum {label} valid={has_valid}"
            yield name, kernel, signature, constants, *launch
        signature = {"p_grad": pointer, "p_dates": "*i16", "p_maps": pointer} | sizes
        kernel = temporal_maximum.maximum_backward_kernel
        yield f"temporal_maximum_backward {label}", kernel, signature, config, *launch
    # A size of 1 is a constant.
    signature = {"p_maps": "*fp32", "p_valid": "*u8", "p_values": "*fp32", "p_dates": "*i16"}
    constants = dict.fromkeys((*sizes, *strides), 1) | {"HAS_VALID": True}
    constants |= {"ENTRIES": 32, "BLOCK": 16}
    kernel = temporal_maximum.maximum_kernel
    yield "temporal_maximum sizes=1", kernel, signature, constants, 4, 3


def compile_one(capability, kernel, signature, constants, *launch) -> dict:
    """Of a kernel; `launch` has warps, stages and, if limited, registers."""
    names = list(signature)
    signature = signature | dict.fromkeys(constants, "constexpr")
    # Pointers are 16-byte aligned at run time, and strides in a tuple of i32 multiples of 16;
    # without saying so vector loads are lost.
    aligned = {}
    for i, name in enumerate(names):
        if isinstance(signature[name], tuple):
            aligned |= {(i, j): ALIGNED for j, x in enumerate(signature[name]) if x == "i32"}
        elif signature[name].startswith("*"):
            aligned[(i,)] = ALIGNED
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    target = GPUTarget("cuda", capability, 32)
    options = dict(zip(("num_warps", "num_stages", "maxnreg"), launch))
    compiled = triton.compile(source, target=target, options=options)
    report = {**assemble(compiled.asm["ptx"], capability), "shared": compiled.metadata.shared}
    if capability == 90:
        code = disassemble(compiled.asm["cubin"], triton.knobs.nvidia.nvdisasm.path)
        report["foreign"] = foreign_descriptors(code)
        report["wgmma"] = sum(name.startswith("HGMMA") for name, _ in INSTRUCTION.findall(code))
    return report


def assemble(ptx: str, capability: int) -> dict:
    """Registers, spills, and whether products of `wgmma` wait for each other, as ptxas reports."""
    nvidia = triton.knobs.nvidia
    tool = nvidia.ptxas_blackwell if capability >= 100 else nvidia.ptxas
    arch = f"sm_{capability}" + ("a" if capability >= 90 else "")
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.ptx")
        source.write_text(ptx)
        command = [tool.path, "-v", f"-arch={arch}", source, "-o", Path(folder, "kernel.cubin")]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    registers = re.search(r"Used (\d+) registers", said)
    spills = re.findall(r"(\d+) bytes spill", said)
    serialized = "wgmma.mma_async instructions are serialized" in said
    return {
        "registers": int(registers[1]), "spills": sum(map(int, spills)), "serialized": serialized
    }  # fmt: skip


def main(capability: int) -> None:
    if capability == 90:  # as where such a GPU is
        assemble_by(triton.knobs.nvidia.ptxas_blackwell.path)
    cases = (
        *temporal_median_cases(), *median_deviation_cases(), *temporal_maximum_cases(),
        *unit_cases(), *gyroscope_cases(capability),
    )  # fmt: skip
    for label, *case in cases:
        print(json.dumps({"kernel": label, **compile_one(capability, *case)}), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]))
