"""Streaming over a link, against the link's own time and QEMU's `block-stream`: interleaved rounds, medians, one table.

Run as `python -m contrib.bench.streaming [--quick] [--only TEXT] [--rounds N] [--folder DIR]`.
"""

from __future__ import annotations

import argparse
import mmap
import os
import platform
import random
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from contrib.bench import rig
from contrib.bench.link import Carrying, link
from contrib.bench.rig import CLUSTER, MIB, Served, fresh_leaf, mounted

GIGABIT = 125e6
"""Bytes per second of the link."""
PAGE = 4096
LOCAL = 32 * MIB
"""Bytes that are local before the latency of local reads is looked at."""
IDLE_SECONDS = 2.0


@dataclass(frozen=True)
class Sizes:
    """Bytes of what is streamed, and how often what is only looked at."""

    full: int
    part: int
    """For the peer, which takes a round trip for each half MiB, and for the data of the sparse base."""
    sparse: int
    misses: int
    trace: int
    """Reads of the trace that looks like a boot."""


FULL = Sizes(1024 * MIB, 256 * MIB, 8192 * MIB, 60, 400)
QUICK = Sizes(256 * MIB, 64 * MIB, 2048 * MIB, 20, 150)


@dataclass(frozen=True)
class Figure:
    """One line of the table: what was measured, as shown and as compared with the aim."""

    shown: str
    value: float


@dataclass(frozen=True)
class Aim:
    """What to reach: at least, or (`most`) at most `value`."""

    value: float
    most: bool = False

    def reached(self, value: float) -> bool:
        return value <= self.value if self.most else value >= self.value

    def __str__(self) -> str:
        return f"{'≤' if self.most else '≥'} {self.value:g}"


@dataclass(frozen=True)
class Bench:
    """Where everything is. `nbd` is the unix socket of the NBD server, `http` the port of nginx."""

    folder: Path
    nbd: Path
    http: str
    sizes: Sizes

    @property
    def leaf(self) -> Path:
        return self.folder / "leaf.qed"

    @contextmanager
    def over(
        self, kind: str, round_trip: float, rate: float = GIGABIT
    ) -> Iterator[tuple[Carrying, Callable[[str], str]]]:
        """Have a link; yield it, and what gives the name of a base behind it."""
        with link(str(self.nbd) if kind == "nbd" else self.http, rate, round_trip) as carrying:
            yield carrying, lambda name: f"{kind}://127.0.0.1:{carrying.port}/{name}"

    def local(self, kind: str, name: str) -> str:
        return f"http://127.0.0.1:{self.http}/{name}" if kind == "http" else f"nbd+unix:///{name}?socket={self.nbd}"

    def streamed(self, backing: str) -> tuple[float, float]:
        """Stream a fresh leaf; return the seconds, and those of the processor."""
        with mounted(fresh_leaf(self.leaf, backing)) as served:
            before = served.processor()
            seconds = served.stream()
            return seconds, served.processor() - before


Job = Callable[[Bench], Figure]


def over_link(kind: str, round_trip: float) -> Job:
    """Random data over a link of 1 Gbit/s: the share of the link, and what QEMU reached on it."""

    def job(bench: Bench) -> Figure:
        with bench.over(kind, round_trip) as (_, name):
            seconds, processor = bench.streamed(name("full.raw"))
            # Debian's storage daemon speaks no HTTP.
            peer = rig.qemu_stream(bench.leaf, name("part.raw")) if kind == "nbd" else None
        share = bench.sizes.full / seconds / GIGABIT
        theirs = f" (QEMU {bench.sizes.part / peer / GIGABIT:.2f})" if peer else ""
        return Figure(f"{share:.2f} of the link{theirs}, processor {processor / seconds:.0%}", share)

    return job


def without_link(kind: str) -> Job:
    """The same without a proxy, against nbdcopy to a file: MB/s, or twice the ratio if that is better for 400 MB/s."""

    def job(bench: Bench) -> Figure:
        seconds, processor = bench.streamed(bench.local(kind, "full.raw"))
        bench.leaf.unlink()
        copy = bench.folder / "copy.raw"
        with copy.open("wb") as file:
            file.truncate(bench.sizes.full)
        start = time.monotonic()
        rig.run("nbdcopy", bench.local("nbd", "full.raw"), copy)
        peer = time.monotonic() - start
        copy.unlink()
        speed, ratio = bench.sizes.full / seconds / 1e6, peer / seconds
        shown = f"{speed:.0f} MB/s, {ratio:.2f} of nbdcopy, processor {processor / seconds:.0%}"
        return Figure(shown, speed if kind == "http" else max(speed / 400, ratio / 0.5))

    return job


def sparse_time(bench: Bench) -> Figure:
    with bench.over("nbd", 0.02) as (_, name):
        scattered, _ = bench.streamed(name("sparse.raw"))
        plain, _ = bench.streamed(name("part.raw"))
    return Figure(f"{scattered:.1f} s, {scattered / plain:.2f} of that of the data alone", scattered / plain)


def sparse_bytes(bench: Bench) -> Figure:
    with bench.over("nbd", 0.001) as (carrying, name):
        bench.streamed(name("sparse.raw"))
        excess = carrying.carried() - bench.sizes.part
    return Figure(f"{excess / 1e3:.0f} kB beside the data (headers, extents)", excess / bench.sizes.part)


def local_latency(round_trip: float | None) -> Job:
    """p99 of local 4K reads while streaming (None: without a proxy), as a multiple of that of an idle mount.

    Told with it: p99 while the same disk streams in another mount, which is what the machine's processors make of it.
    """

    def job(bench: Bench) -> Figure:
        with bench.over("nbd", round_trip or 0.0) as (_, name):
            backing = bench.local("nbd", "full.raw") if round_trip is None else name("full.raw")
            other = bench.folder / "other.qed"
            with mounted(fresh_leaf(bench.leaf, backing)) as served, mounted(fresh_leaf(other, backing)) as neighbour:
                served.set("prefetch", f"0 {LOCAL}")
                rig.until(lambda: int(served.get("allocated_bytes")) >= LOCAL, "the prefetch", 0.05)
                end = time.monotonic() + IDLE_SECONDS
                idle = latency(served, lambda: time.monotonic() > end)
                neighbour.set("mode", "stream")
                beside = latency(served, lambda: neighbour.get("state") == "complete")
                served.set("mode", "stream")
                streaming = latency(served, lambda: served.get("state") == "complete")
            other.unlink()
        shown = f"{streaming * 1e6:.0f} µs, idle {idle * 1e6:.0f} µs: {streaming / idle:.1f} times (another mount streams: {beside / idle:.1f})"
        return Figure(shown, streaming / idle)

    return job


def latency(served: Served, ended: Callable[[], bool]) -> float:
    """Return the p99 seconds of 4K O_DIRECT reads of local data, one after the other until `ended`, asked now and then."""
    chance = random.Random(4)
    taken = []
    with mmap.mmap(-1, PAGE) as buffer:
        fd = os.open(served.file, os.O_RDONLY | os.O_DIRECT)
        try:
            while not ended():
                for _ in range(100):
                    pos = chance.randrange(LOCAL // PAGE) * PAGE
                    start = time.perf_counter()
                    os.preadv(fd, [buffer], pos)
                    taken.append(time.perf_counter() - start)
        finally:
            os.close(fd)
    return statistics.quantiles(taken, n=100)[-1]


def rare_flush(bench: Bench) -> Figure:
    """A sector written and flushed every half second while streaming without a link: mean milliseconds."""
    taken = []
    with mounted(fresh_leaf(bench.leaf, bench.local("nbd", "full.raw"))) as served, mmap.mmap(-1, PAGE) as buffer:
        fd = os.open(served.file, os.O_RDWR | os.O_DIRECT)
        try:
            os.pwritev(fd, [buffer], 0)
            os.fdatasync(fd)
            served.set("mode", "stream")
            while served.get("state") != "complete":
                time.sleep(0.5)
                start = time.perf_counter()
                os.pwritev(fd, [buffer], 0)
                os.fdatasync(fd)
                taken.append(time.perf_counter() - start)
        finally:
            os.close(fd)
    mean = statistics.mean(taken) * 1e3
    return Figure(f"{mean:.0f} ms, mean of {len(taken)}; most {max(taken) * 1e3:.0f} ms", mean)


def demand_miss(bench: Bench) -> Figure:
    """Mean wait of a miss while streaming at full speed at 20 ms, in round trips."""
    round_trip, waits = 0.02, []
    chance = random.Random(1)
    with bench.over("nbd", round_trip) as (_, name), mounted(fresh_leaf(bench.leaf, name("full.raw"))) as served:
        served.set("mode", "stream")
        time.sleep(1.0)  # at full speed, as what is measured
        for _ in range(bench.sizes.misses):
            took = read_once(served, chance.randrange(bench.sizes.full // PAGE) * PAGE)
            if took > round_trip / 2:  # else it was local already
                waits.append(took)
            if served.get("state") == "complete":
                break
            time.sleep(0.03)
    mean = statistics.mean(waits) / round_trip
    return Figure(f"{mean:.2f} round trips, mean of {len(waits)}; most {max(waits) / round_trip:.1f}", mean)


def cold_read(kind: str) -> Job:
    """A cold 4K read on an idle link of 20 ms, in round trips."""

    def job(bench: Bench) -> Figure:
        round_trip = 0.02
        chance = random.Random(2)
        with (
            bench.over(kind, round_trip) as (_, name),
            mounted(fresh_leaf(bench.leaf, name("full.raw")), "mode=cor") as served,
        ):
            read_once(served, 0)  # connects
            clusters = chance.sample(range(1, bench.sizes.full // CLUSTER), bench.sizes.misses)
            mean = statistics.mean(read_once(served, cluster * CLUSTER) for cluster in clusters) / round_trip
        return Figure(f"{mean:.2f} round trips", mean)

    return job


def sequential(kind: str) -> Job:
    """A cold buffered read from the start on through the mount, at 20 ms: the share of the link."""

    def job(bench: Bench) -> Figure:
        with (
            bench.over(kind, 0.02) as (_, name),
            mounted(fresh_leaf(bench.leaf, name("part.raw")), "mode=cor") as served,
            served.file.open("rb", buffering=0) as file,
        ):
            start = time.monotonic()
            while file.read(MIB):
                pass
            share = bench.sizes.part / (time.monotonic() - start) / GIGABIT
        return Figure(f"{share:.2f} of the link", share)

    return job


def boot_profile(bench: Bench) -> Figure:
    """The same trace twice, each time on a fresh leaf: the second mount knows from the first what comes."""
    profiles = bench.folder / "profile"
    profiles.unlink(missing_ok=True)
    with bench.over("nbd", 0.02) as (_, name):
        times = []
        for options in ("boot_profile=off", f"boot_profile={profiles}", f"boot_profile={profiles}"):
            with mounted(fresh_leaf(bench.leaf, name("full.raw")), f"mode=cor,{options}") as served:
                times.append(trace(bench, served))
    without, _, second = times
    return Figure(f"{second:.2f} s, without {without:.2f} s: {second / without:.2f}", second / without)


def second_leaf(bench: Bench) -> Figure:
    """The same trace on two fresh leaves of one backing, with a shared cache: what the second one fetches, as a share."""
    caches, fetched, times = bench.folder / "caches", [], []
    with bench.over("http", 0.02) as (carrying, name):
        for _ in range(2):
            leaf = fresh_leaf(bench.leaf, name("full.raw"))
            before = carrying.carried()
            with mounted(leaf, f"mode=cor,readahead=0,shared_cache={caches}") as served:
                times.append(trace(bench, served))
            fetched.append((carrying.carried() - before) / MIB)
    shutil.rmtree(caches)
    first, second = fetched
    shown = f"{second * 1024:.1f} KiB in {times[1]:.2f} s, the first one {first:.1f} MiB in {times[0]:.2f} s"
    return Figure(shown, second / first)


def trace(bench: Bench, served: Served) -> float:
    """Read as a machine does that boots: one after the other, a few files here and there, thinking in between; seconds."""
    chance = random.Random(3)
    start = time.monotonic()
    place = 0
    for _ in range(bench.sizes.trace):
        if chance.random() < 0.3:
            place = chance.randrange(bench.sizes.full // PAGE - 64) * PAGE
        length = chance.choice((1, 1, 4, 8, 32)) * PAGE
        read_once(served, place, length)
        place = min(place + length, bench.sizes.full - 32 * PAGE)
        time.sleep(0.002)  # a guest computes, too
    return time.monotonic() - start


def read_once(served: Served, pos: int, length: int = PAGE) -> float:
    """Read past the page cache; return the seconds it took."""
    with mmap.mmap(-1, length) as buffer:
        fd = os.open(served.file, os.O_RDONLY | os.O_DIRECT)
        try:
            start = time.monotonic()
            if os.preadv(fd, [buffer], pos) != length:
                raise rig.BenchError(f"a short read at {pos}")
            return time.monotonic() - start
        finally:
            os.close(fd)


JOBS: dict[str, tuple[Job, Aim]] = {
    **{f"NBD, 1 Gbit/s, {trip} ms": (over_link("nbd", trip / 1000), Aim(0.9)) for trip in (1, 20, 80)},
    "NBD on this machine (1: 400 MB/s, or half of nbdcopy)": (without_link("nbd"), Aim(1)),
    "sparse base: time": (sparse_time, Aim(1.3, most=True)),
    "sparse base: bytes of holes": (sparse_bytes, Aim(0.01, most=True)),
    "local 4K reads while streaming, 1 Gbit/s, 20 ms: p99": (local_latency(0.02), Aim(3, most=True)),
    "local 4K reads while streaming, no link: p99": (local_latency(None), Aim(3, most=True)),
    "a flush each half second while streaming, no link: ms": (rare_flush, Aim(100, most=True)),
    "miss while streaming, 20 ms": (demand_miss, Aim(2, most=True)),
    "boot with a profile, 20 ms": (boot_profile, Aim(0.5, most=True)),
    "cold sequential read through the mount, NBD, 20 ms": (sequential("nbd"), Aim(0.8)),
    "cold 4K read, NBD, 20 ms": (cold_read("nbd"), Aim(1.3, most=True)),
    **{f"HTTP, 1 Gbit/s, {trip} ms": (over_link("http", trip / 1000), Aim(0.8)) for trip in (20, 80)},
    "second leaf with a shared cache, HTTP, 20 ms: of what the first one fetched": (second_leaf, Aim(0.001, most=True)),
    "HTTP on this machine: MB/s": (without_link("http"), Aim(300)),
    "cold sequential read through the mount, HTTP, 20 ms": (sequential("http"), Aim(0.8)),
    "cold 4K read, HTTP, 20 ms": (cold_read("http"), Aim(1.3, most=True)),
}


def measured(job: Job, bench: Bench, rounds: int) -> Figure:
    """Return the round in the middle."""
    figures = sorted((job(bench) for _ in range(rounds)), key=lambda figure: figure.value)
    return figures[len(figures) // 2]


def make_bases(folder: Path, sizes: Sizes) -> None:
    folder.mkdir()
    rig.make_random(folder / "full.raw", sizes.full)
    rig.make_random(folder / "part.raw", sizes.part)
    rig.make_scattered(folder / "sparse.raw", sizes.sparse, sizes.part)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m contrib.bench.streaming", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a quarter of the data, one round")
    parser.add_argument("--rounds", type=int, default=None, help="default 3, quick 1; the one in the middle is told")
    parser.add_argument("--only", default="", help="jobs whose name contains this")
    parser.add_argument("--folder", type=Path, default=None, help="where the images go (4 GiB)")
    arguments = parser.parse_args()
    rig.need("nbdkit", "nbdcopy", "nginx", "qemu-storage-daemon")
    sizes = QUICK if arguments.quick else FULL
    rounds = arguments.rounds or (1 if arguments.quick else 3)
    with tempfile.TemporaryDirectory(prefix="qedfs-bench-", dir=arguments.folder) as name:
        folder = Path(name).absolute()
        make_bases(folder / "bases", sizes)
        print(f"Linux {platform.release()}, {os.cpu_count()} cores, Python {platform.python_version()}")
        print(
            f"{rig.run('qemu-storage-daemon', '--version').splitlines()[0]}; {rig.run('nbdkit', '--version').strip()}"
        )
        print(f"{sizes.full // MIB} MiB, the round in the middle of {rounds}\n")
        print("| job | reached | aim | |\n|---|---|---:|---|")
        with rig.nbd_server(folder / "bases") as nbd, rig.http_server(folder / "bases") as http:
            bench = Bench(folder, nbd, http, sizes)
            for title, (job, aim) in JOBS.items():
                if arguments.only in title:
                    figure = measured(job, bench, rounds)
                    verdict = "yes" if aim.reached(figure.value) else "**no**"
                    print(f"| {title} | {figure.shown} | {aim} | {verdict} |", flush=True)


if __name__ == "__main__":
    main()
