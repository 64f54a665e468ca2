"""Build a store in parallel, so that a build killed at any moment goes on to the same bytes."""

import csv
import fcntl
import functools
import hashlib
import json
import math
import multiprocessing
import os
import shutil
import signal
import threading
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from multiprocessing.connection import wait
from pathlib import Path

import numpy as np

from timo.data.building.choose import Rules, choose
from timo.data.building.sources import Source
from timo.data.building.tiffs import degrees
from timo.data.contract import DataError, with_progress
from timo.data.store import (
    FORMAT,
    INDEX,
    MANIFEST,
    REJECTED,
    REPORT,
    check_sizes,
    read_manifest,
    settle,
    sha256,
    shard_header,
    shard_name,
    write_index,
    write_manifest,
)

_SHARD_BYTES = 512 << 20
_PLAN, _PARTS, _LOCK = "build.json", "parts", ".lock"
_VISIBLE = ({"B02", "B03", "B04"}, {"Blue", "Green", "Red"}, {"B2", "B3", "B4"})


def build_store(
    source: Source,
    out: Path,
    dates: int = 10,
    max_cloud: float = 0.5,
    max_nodata: float = 0.2,
    bright: float | None = None,
    workers: int = 0,
) -> dict:
    """Build a store, or go on with one that was stopped; returns the counts of report.json.

    The unit of work is a shard: a fixed run of the source's sorted locations. It appears under
    its own name when it is whole, and a small file in `parts/` then says what it holds; what has
    such a file is not made again. So neither a kill at any moment nor the number of workers
    changes a byte of the result.

    Args:
        source: where the scenes come from; with the same settings when going on.
        out: folder of the store; new, empty, or that of a build to go on with.
        dates, max_cloud, max_nodata: see `Rules`.
        bright: see `Rules`; None for 204 (uint8) or 3000 (uint16, reflectance 0.3).
        workers: processes; 0 works in this one.

    Raises:
        DataError: `out` holds something else, or a build with other settings, or another process
            builds there, or a finished store that lost files; or no location was accepted.
    """
    for name, share in (("max_cloud", max_cloud), ("max_nodata", max_nodata)):
        if not 0 <= share <= 1:
            raise ValueError(f"{name}: must be a share in 0 ... 1, got {share}")
    if dates < 1 or workers < 0:
        raise ValueError(f"dates: must be at least 1 and workers 0, got {dates} and {workers}")
    content = source.content
    if bright is None:
        bright = 204 if content.dtype == "uint8" else 3000
    visible = next((v for v in _VISIBLE if v <= set(content.bands)), set(content.bands))
    positions = tuple(i for i, band in enumerate(content.bands) if band in visible)
    rules = Rules(dates, max_cloud, max_nodata, bright, positions)
    names = source.names()
    if not names:
        raise DataError("root: holds no location; see docs/data.md for the layouts")
    location = dates * len(content.bands) * source.size**2 * np.dtype(content.dtype).itemsize
    # 512 MiB, or less where that would leave few shards to share among workers.
    per_shard = min(max(1, _SHARD_BYTES // location), max(16, math.ceil(len(names) / 64)))
    job = _Job(source, rules, Path(out), names, per_shard)
    _open_folder(job.out)
    with _lock(job.out):
        if (job.out / MANIFEST).exists():
            manifest = read_manifest(job.out)
            _same_plan(manifest["build"], job.plan(), job.out)
            check_sizes(job.out, manifest)
        else:
            _begin(job)
            _make_shards(job, workers)
            _finish(job)
        _clear(job.out)
    return json.loads((job.out / REPORT).read_text())


@dataclass(frozen=True)
class _Job:
    source: Source
    rules: Rules
    out: Path
    names: list[str]
    per_shard: int  # candidates

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(T, C, H, W) of a location."""
        size = self.source.size
        return self.rules.dates, len(self.source.content.bands), size, size

    @property
    def shards(self) -> int:
        return math.ceil(len(self.names) / self.per_shard)

    def plan(self) -> dict:
        """What must be the same for a build to go on."""
        digest = hashlib.sha256("\n".join(self.names).encode()).hexdigest()
        plan = {
            "source": type(self.source).__name__, "content": asdict(self.source.content),
            "size": self.source.size, "rules": asdict(self.rules), "locations": len(self.names),
            "names": digest, "per_shard": self.per_shard,
            **self.source.inputs(),
        }  # fmt: skip
        return json.loads(json.dumps(plan))


def _open_folder(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise DataError(f"{out}: is a file; name a folder to build in")
    out.mkdir(parents=True, exist_ok=True)
    visible = {path.name for path in out.iterdir() if not path.name.startswith(".")}
    if visible and not visible & {_PLAN, MANIFEST}:
        raise DataError(f"{out}: holds no build to go on with; empty it or name another folder")


@contextmanager
def _lock(out: Path):
    """Keep other builds out; the system releases the lock however this process ends."""
    with open(out / _LOCK, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(f"{out}: another process builds here; wait for it or stop it") from None
        yield
        (out / _LOCK).unlink(missing_ok=True)


def _same_plan(begun: dict, now: dict, out: Path) -> None:
    differs = [key for key in now if begun.get(key) != now[key]]
    if differs:
        raise DataError(
            f"{out}: was begun with other settings or sources: "
            + "; ".join(f"{key} was {begun.get(key)}, is {now[key]}" for key in differs)
            + ". Give the same as then, or name another folder"
        )


def _begin(job: _Job) -> None:
    plan = job.out / _PLAN
    if plan.exists():
        _same_plan(json.loads(plan.read_text()), job.plan(), job.out)
    else:
        _write(plan, json.dumps(job.plan(), indent=1) + "\n")
    for folder in ("shards", _PARTS):
        (job.out / folder).mkdir(exist_ok=True)
        for left in (job.out / folder).glob(".*.partial"):
            left.unlink(missing_ok=True)


def _make_shards(job: _Job, workers: int) -> None:
    todo = [number for number in range(job.shards) if not _is_made(job.out, number)]
    if workers == 0 or not todo:
        for number in with_progress(todo, "building"):
            _make_shard(job, number)
        return
    # Workers start from a clean process: forking one with threads may lock up.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["timo.data.building"])
    others = set(multiprocessing.active_children())
    with ProcessPoolExecutor(
        min(workers, len(todo)), context, initializer=_start_worker, initargs=(job,)
    ) as pool:
        try:
            futures = [pool.submit(_work, number) for number in todo]
            for future in with_progress(futures, "building"):
                future.result()
        except BaseException as error:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in set(multiprocessing.active_children()) - others:
                process.terminate()
            if isinstance(error, BrokenProcessPool):
                raise DataError(
                    f"{job.out}: a worker ended early, perhaps for want of memory; run the same "
                    "command again, with fewer workers, to go on. A script must call build_store "
                    'under if __name__ == "__main__": as workers import it'
                ) from error
            raise


_JOB: _Job


def _start_worker(job: _Job) -> None:
    global _JOB
    _JOB = job
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None  # this process is a worker
    watch = functools.partial(_end_with, parent.sentinel)
    threading.Thread(target=watch, daemon=True).start()


def _end_with(sentinel: int) -> None:
    """End this worker when the build does, also when that was killed."""
    wait([sentinel])
    os._exit(1)


def _work(number: int) -> None:
    _make_shard(_JOB, number)


def _part(out: Path, number: int) -> Path:
    return out / _PARTS / f"{number:05d}.json"


def _is_made(out: Path, number: int) -> bool:
    part = _part(out, number)
    if not part.exists():
        return False
    shard = out / shard_name(number)
    size = json.loads(part.read_text())["bytes"]
    return size == 0 or (shard.exists() and shard.stat().st_size == size)


def _make_shard(job: _Job, number: int) -> None:
    """Write shard `number`, if any of its candidates is accepted, and then its part file."""
    dtype = np.dtype(job.source.content.dtype)
    names = job.names[number * job.per_shard : (number + 1) * job.per_shard]
    shard = job.out / shard_name(number)
    partial = shard.with_name(f".{shard.stem}.{os.getpid()}.partial")
    rows: list[dict] = []
    log, centres = [], []
    scenes: Counter[str] = Counter()
    locations = Counter(candidates=len(names))
    with open(partial, "wb") as file:
        file.write(shard_header((0, *job.shape), dtype))
        for name in names:
            try:
                candidates = job.source.load(name)
            except (DataError, FileNotFoundError, NotADirectoryError, PermissionError) as error:
                locations["unreadable"] += 1
                log.append((name, "", "unreadable", str(error)))
                continue
            chosen, counts, rejected = choose(candidates, job.rules)
            scenes["candidates"] += len(candidates.scenes) + len(candidates.rejected)
            scenes += counts
            log += [(name, *entry) for entry in rejected]
            if chosen is None:
                usable = len(candidates.scenes) + len(candidates.rejected) - len(rejected)
                locations["too few dates"] += 1
                detail = f"{usable} usable dates, {job.rules.dates} are needed"
                log.append((name, "", "too few dates", detail))
                continue
            for scene in chosen.scenes:
                file.write(scene.pixels.astype(dtype.newbyteorder("<"), copy=False).data)
            rows.append({
                "name": name, "shard": number, "slot": len(rows),
                "dates": [int(s.moment.astype("datetime64[D]").astype(int)) for s in chosen.scenes],
                "valid": chosen.valid, "cloud": chosen.cloud,
                "source": [scene.source for scene in chosen.scenes],
            })  # fmt: skip
            centres.append(candidates.centre)
        for row, (longitude, latitude) in zip(rows, degrees(centres)):
            row |= {"longitude": longitude, "latitude": latitude}
        file.seek(0)
        file.write(shard_header((len(rows), *job.shape), dtype))
    record = {"bytes": 0, "sha256": ""}
    if rows:
        record = _describe(partial)
        settle(partial, shard)
    else:
        partial.unlink()
    locations["accepted"] = len(rows)
    scenes["accepted"] = len(rows) * job.rules.dates
    record |= {"rows": rows, "log": log, "scenes": scenes, "locations": locations}
    _write(_part(job.out, number), json.dumps(record))


def _finish(job: _Job) -> None:
    """Write the index, the report and the log, and then the manifest that makes it a store."""
    rows, log, files, shards = [], [], {}, []
    counts: dict[str, Counter[str]] = {"locations": Counter(), "scenes": Counter()}
    for number in range(job.shards):
        part = json.loads(_part(job.out, number).read_text())
        shards.append(len(part["rows"]))
        rows += part["rows"]
        log += part["log"]
        for what, total in counts.items():
            total.update(part[what])
        if part["rows"]:
            files[shard_name(number)] = {key: part[key] for key in ("bytes", "sha256")}
    _write(job.out / REPORT, json.dumps(counts, indent=1, sort_keys=True) + "\n")
    with open(job.out / f".{REJECTED}.partial", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerows([("location", "scene", "reason", "detail"), *log])
    settle(job.out / f".{REJECTED}.partial", job.out / REJECTED)
    if not rows:
        raise DataError(
            f"{job.out}: none of the {len(job.names)} locations was accepted ("
            + ", ".join(f"{why}: {n}" for why, n in counts["scenes"].most_common())
            + f"); {job.out / REJECTED} says why"
        )
    write_index(job.out / f".{INDEX}.partial", rows, job.rules.dates)
    settle(job.out / f".{INDEX}.partial", job.out / INDEX)
    content = job.source.content
    ones = len(content.bands) * (1.0,)
    write_manifest(job.out, {
        "format": FORMAT, "shape": list(job.shape), "dtype": content.dtype,
        "bands": list(content.bands), "units": content.units,
        "scale": list(content.scale or ones), "offset": list(content.offset or len(ones) * (0.0,)),
        "shards": shards, "build": job.plan(),
        "files": files | {name: _describe(job.out / name) for name in (INDEX, REPORT, REJECTED)},
    })  # fmt: skip


def _clear(out: Path) -> None:
    """Remove what only a build in progress needs."""
    shutil.rmtree(out / _PARTS, ignore_errors=True)
    for left in (out / _PLAN, *out.glob(".*.partial"), *out.glob("shards/.*.partial")):
        left.unlink(missing_ok=True)


def _describe(path: Path) -> dict:
    return {"bytes": path.stat().st_size, "sha256": sha256(path)}


def _write(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.stem}.{os.getpid()}.partial")
    partial.write_text(text, encoding="utf-8")
    settle(partial, path)
