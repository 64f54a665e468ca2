"""A build killed at any moment goes on to the same bytes."""

import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from tests.data.corpora import DATES, write_published_layout, write_seco
from timo.data import PublishedCorpus, StoreSeries
from timo.data.building import SecoSource, SeriesSource, build_store, builder


@pytest.fixture
def small_shards(monkeypatch):
    """Two candidates in each shard."""
    monkeypatch.setattr(builder, "_SHARD_BYTES", 2 * 10 * 3 * 16 * 16)


def tree(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def in_child(action) -> int:
    """Process id of a forked child that runs `action` and ends."""
    child = os.fork()
    if child == 0:
        os.setsid()
        try:
            action()
        finally:
            os._exit(0)
    return child


def kill_after(seconds: float, action) -> bool:
    """Run `action` in a child for so long, then kill it; whether it was still at work."""
    child = in_child(action)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def seco(tmp_path) -> SecoSource:
    root = write_seco(tmp_path / "seco", locations=7, dates=DATES[:11], size=16)
    (root / "000002" / f"{DATES[0]}T101031_{DATES[0]}T101026_T32TQM" / "B3.tif").write_bytes(b"")
    (root / "000004" / f"{DATES[0]}T101031_{DATES[0]}T101026_T32TQM" / "B3.tif").unlink()
    (root / "000004" / f"{DATES[1]}T101031_{DATES[1]}T101026_T32TQM" / "B3.tif").unlink()
    return SecoSource(root, 16, None)


def test_twenty_random_moments(tmp_path, small_shards):
    source = seco(tmp_path)
    report = build_store(source, tmp_path / "whole")
    assert report["locations"] == {"candidates": 7, "accepted": 6, "too few dates": 1}
    expected = tree(tmp_path / "whole")
    assert len(expected) == 8 and StoreSeries(tmp_path / "whole").verify() == []
    started = time.monotonic()
    build_store(source, tmp_path / "again")
    duration = time.monotonic() - started
    rng = np.random.default_rng(0)
    killed = attempt = 0
    while killed < 20:
        attempt += 1
        assert attempt < 60, "builds end before they are killed"
        out = tmp_path / f"store{attempt}"
        moment = rng.uniform(0, duration)
        if kill_after(moment, lambda out=out: build_store(source, out)):
            killed += 1
        else:  # machines are faster at times: the next is killed before
            duration = moment
        if (out / "store.json").exists():
            assert tree(out).items() >= expected.items()
        build_store(source, out)
        assert tree(out) == expected, attempt


def test_every_step(tmp_path, small_shards, monkeypatch):
    """Killed before and after each file takes or loses its name."""
    source = SeriesSource(PublishedCorpus(write_published_layout(tmp_path / "in", 5, size=16)))
    calls = []
    steps = ("replace", "unlink", "rmdir", "fsync")
    real = {name: getattr(os, name) for name in steps}

    def counted(name, fatal):
        def step(*arguments, **options):
            calls.append(name)
            if len(calls) == fatal:
                os.kill(os.getpid(), signal.SIGKILL)
            result = real[name](*arguments, **options)
            if len(calls) == -fatal:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return step

    def build(out, fatal=0):
        calls.clear()
        with monkeypatch.context() as patch:
            for name in steps:
                patch.setattr(os, name, counted(name, fatal))
            build_store(source, out)

    build(tmp_path / "whole")
    expected, count = tree(tmp_path / "whole"), len(calls)
    assert count > 30 and calls.count("replace") == 3 + 3 + 1 + 4
    for fatal in range(1, count + 1):
        out = tmp_path / f"{fatal}"
        child = in_child(lambda out=out, at=fatal if fatal % 2 else -fatal: build(out, at))
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        build_store(source, out)
        assert tree(out) == expected, fatal


def test_workers_give_the_same_bytes_and_end_with_their_build(tmp_path, small_shards):
    source = seco(tmp_path)
    build_store(source, tmp_path / "whole")
    out = tmp_path / "store"

    def unfinished():
        builder._finish = lambda job: signal.pause()  # however late the signal comes
        build_store(source, out, workers=2)

    child = in_child(unfinished)
    while not list(out.glob("parts/*.json")):
        assert os.waitpid(child, os.WNOHANG) == (0, 0), "the build ended early"
        time.sleep(0.005)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    deadline = time.monotonic() + 600
    while members(child) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not members(child), "workers outlive a killed build"
    assert not (out / "store.json").exists()
    build_store(source, out, workers=2)
    assert tree(out) == tree(tmp_path / "whole")


def members(session: int) -> list[str]:
    """Processes of a session that still run."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = status.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[3]) == session and fields[0] != "Z":
            found.append(status.parent.name)
    return found
