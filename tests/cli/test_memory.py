"""Freed memory stays with the commands that compute, unless the user has said otherwise."""

import os
import platform
import subprocess
import sys

import pytest

from timo.cli import memory
from timo.cli.main import main
from timo.cli.memory import SETTINGS

FAULTS = """
import resource
import torch
from timo.cli.memory import keep_freed_memory

keep_freed_memory()
count = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
faults = []
for _ in range(20):
    before = count()
    [torch.empty(64 << 20, dtype=torch.uint8) for _ in range(40)]  # more than 2 GiB, not touched
    torch.ones(64 << 20, dtype=torch.uint8)
    faults.append(count() - before)
print(sum(faults[10:]))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_large_tensors_take_the_memory_of_those_before():
    clean = {k: v for k, v in os.environ.items() if k not in SETTINGS}
    told = subprocess.run(
        [sys.executable, "-c", FAULTS], env=clean, capture_output=True, text=True, check=True
    )
    pages = (64 << 20) // os.sysconf("SC_PAGE_SIZE")
    assert int(told.stdout) < pages, "ten tensors took as many pages as one is large"


@pytest.mark.parametrize("setting, kept", [(None, True), *((name, False) for name in SETTINGS)])
def test_settings_of_the_user_stand(setting, kept, monkeypatch):
    class Library:
        def mallopt(self, parameter, value):
            calls.append(parameter)

    calls = []
    monkeypatch.setattr("ctypes.CDLL", lambda name: Library())
    monkeypatch.setattr("platform.libc_ver", lambda: ("glibc", "2.36"))
    for name in SETTINGS:
        monkeypatch.delenv(name, raising=False)
    if setting is not None:
        monkeypatch.setenv(setting, "")
    memory.keep_freed_memory()
    assert bool(calls) == kept


@pytest.mark.parametrize("name, kept", [("evaluate", True), ("info", False)])
def test_only_commands_that_compute_in_a_process_of_their_own_keep_it(name, kept, monkeypatch):
    calls = []
    module = sys.modules["timo.cli.main"]  # of that name the package has the function
    monkeypatch.setattr(module, "keep_freed_memory", lambda: calls.append(name))
    monkeypatch.setattr(sys, "argv", ["timo", name, "--no-such-option"])
    for arguments in ([name, "--no-such-option"], None):
        try:
            main(arguments)
        except SystemExit as end:  # of the parsers of simple commands
            assert end.code == 2
        assert bool(calls) == (kept and arguments is None)
