"""Which ptxas assembles Triton's kernels."""

from types import SimpleNamespace

import pytest

pytest.importorskip("triton")
from timo import kernels  # noqa: E402


@pytest.fixture
def machine(monkeypatch):
    """Set up by versions: Triton's ptxas, its other one or None, CUDA of the driver; a GPU."""

    def set_up(version, newer, driver, hopper=True):
        tools = {"ptxas": SimpleNamespace(version=version, path="first")}
        if newer:
            tools["ptxas_blackwell"] = SimpleNamespace(version=newer, path="second")
        monkeypatch.setattr(kernels, "knobs", SimpleNamespace(nvidia=SimpleNamespace(**tools)))
        monkeypatch.setattr(kernels, "driver_major", lambda: driver)
        monkeypatch.setattr(kernels, "has_hopper", lambda: hopper)

    return set_up


@pytest.mark.filterwarnings("error")
def test_the_newer_one_on_hopper(machine):
    for newer, driver in (("12.9", 12), ("12.9", 13), ("13.1", 13)):
        machine("12.8", newer, driver)
        assert kernels.sound_ptxas() == "second"


@pytest.mark.filterwarnings("error")
def test_triton_decides_elsewhere(machine):
    machine("12.8", "13.1", 13, hopper=False)
    assert kernels.sound_ptxas() is None
    machine("12.9", "13.1", 13)
    assert kernels.sound_ptxas() is None


@pytest.mark.parametrize("newer, driver", [(None, 13), ("13.1", 12)])
def test_warning_where_none_is_sound(machine, newer, driver):
    machine("12.8", newer, driver)
    with pytest.warns(UserWarning, match="12.8.*set TRITON_PTXAS_PATH"):
        assert kernels.sound_ptxas() is None


def test_no_driver(monkeypatch):
    def missing(name):
        raise OSError(name)

    monkeypatch.setattr(kernels.ctypes, "CDLL", missing)
    assert kernels.driver_major() == 0
