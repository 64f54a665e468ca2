"""The CUDA build against the committed table of registers, shared memory and spills."""

import json

import pytest

from tests.cuda_resources import TABLE, measured, nvcc_release, reports, stale

ARCHITECTURES = {"sm_80", "sm_90a", "sm_100", "sm_120"}


def test_kernels_are_those_of_the_table_and_use_no_more():
    """Another nvcc may place registers otherwise: then spills alone count."""
    paths = reports()
    if not paths:
        pytest.skip("built without CUDA: no nvcc")
    if stale(paths):
        pytest.skip("csrc/cuda has changed since it was built: build it again")
    table, found = json.loads(TABLE.read_text()), measured(paths)
    assert all(use["spills"] == 0 for kernel in found.values() for use in kernel.values())
    again = "; if this is meant: python -m tests.cuda_resources"
    assert set(found) == set(table["kernels"]), f"kernels come and go{again}"
    if nvcc_release(paths) != table["nvcc"]:
        return
    for name, kernel in found.items():
        for arch, use in kernel.items():
            known = table["kernels"][name].get(arch)
            assert known, f"{name} is new on {arch}{again}"
            for what in ("registers", "shared"):
                assert use[what] <= known[what], f"{name} {arch}: {use} but {known}{again}"


def test_table_is_complete():
    kernels = json.loads(TABLE.read_text())["kernels"]
    assert len(kernels) > 60
    for name, kernel in kernels.items():
        assert set(kernel) == ARCHITECTURES, name
        for use in kernel.values():
            assert use["spills"] == 0 and 0 < use["registers"] <= 255, name
