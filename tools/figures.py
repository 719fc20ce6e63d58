"""The figures of the benchmarks: how they are measured, summed up and shown."""

from __future__ import annotations

import contextlib
import json
import math
import os
import platform
import re
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import grpc


class Figure(NamedTuple):
    """One line of the table."""

    name: str
    unit: str
    samples: Sequence[float]
    bare: Sequence[float]  # the baseline's; [] if it has none
    against: str  # what the baseline is
    # Targets: the largest p50, p99 or ratio.
    most: Mapping[str, float] = MappingProxyType({})

    def numbers(self) -> dict[str, float]:
        """What the table shows: n, p50, p99; with a baseline also base and ratio."""
        shown: dict[str, float] = {"n": len(self.samples)}
        shown |= {f"p{part}": percentile(self.samples, part) for part in (50, 99)}
        if self.bare:
            shown["base"] = percentile(self.bare, 50)
            if shown["base"] > 0:
                shown["ratio"] = shown["p50"] / shown["base"]
        return shown

    def missed(self) -> list[str]:
        """The targets that this run has missed."""
        numbers = self.numbers()
        return [
            what for what, limit in self.most.items() if numbers.get(what, 0.0) > limit
        ]


Results = Mapping[str, Sequence[Figure]]  # by benchmark


def percentile(samples: Sequence[float], part: int) -> float:
    """The smallest sample that so many of 100 do not exceed.

    Of fewer than 100 samples the 99th percentile is the largest.
    """
    return sorted(samples)[max(0, math.ceil(part * len(samples) / 100) - 1)]


def cpu_us(act: Callable[[], object], times: int = 1) -> float:
    """CPU time that an act takes in all threads of this process."""
    began = time.process_time()
    for _ in range(times):
        act()
    return (time.process_time() - began) / times * 1e6


def effort(pid: int) -> tuple[float, int]:
    """Seconds of CPU and wake-ups of a process so far.

    A thread that ends meanwhile is left out.
    """
    cpu = wakeups = 0
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            cpu += int((task / "schedstat").read_text().split()[0])
            status = (task / "status").read_text()
            switches = re.findall(r"^voluntary_ctxt_switches:\s+(\d+)", status, re.M)
            wakeups += int(switches[0])
    return cpu / 1e9, wakeups


def held(pid: int) -> dict[str, float]:
    """What a process holds: memory in MiB (private in KiB), threads, descriptors.

    Anonymous is what no file on a disk backs. Memory files count as resident only as
    far as they have been used.
    """
    proc = Path(f"/proc/{pid}")
    kib: dict[str, int] = {}
    rollup = (proc / "smaps_rollup").read_text()
    for name, size in re.findall(r"^(\w+): +(\d+) kB", rollup, re.M):
        kind = name.split("_")[0]  # Private_Clean and Private_Dirty, for one
        kib[kind] = kib.get(kind, 0) + int(size)
    links = list((proc / "fd").iterdir())
    memory_files = {}
    for link in links:
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            if not (about := link.stat()).st_nlink:
                memory_files[about.st_dev, about.st_ino] = about.st_blocks * 512 / 2**20
    return {
        "resident": kib["Rss"] / 1024,
        "anonymous": kib["Anonymous"] / 1024,
        "memory files": sum(memory_files.values()),
        "private memory": kib["Private"],
        "threads": len(os.listdir(proc / "task")),
        "descriptors": len(links),
    }


def machine() -> dict[str, str]:
    """What the figures were measured on."""
    cpuinfo = Path("/proc/cpuinfo").read_text()
    model = re.findall(r"^model name\s*: (.*)$", cpuinfo, re.M)
    return {
        "cpu": model[0] if model else platform.machine(),
        "cores": str(len(os.sched_getaffinity(0))),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "grpcio": grpc.__version__,
        "load": f"{os.getloadavg()[0]:.1f}",
    }


def as_table(results: Results) -> str:
    """For people."""
    heads = ["", "n", "p50", "p99", "unit", "baseline", "p50", "ratio"]
    rows = [[*heads, "at most (! = more)"]]
    for name, figures in results.items():
        rows.append([name, *[""] * 8])
        for one in figures:
            numbers, missed = one.numbers(), one.missed()
            p50, p99, base, ratio = (
                f"{numbers[key]:.4g}" if key in numbers else "-"
                for key in ("p50", "p99", "base", "ratio")
            )
            most = [
                f"{what} {m:g}{'!' if what in missed else ''}"
                for what, m in one.most.items()
            ]
            row = [f"  {one.name}", str(len(one.samples)), p50, p99, one.unit]
            rows.append([*row, one.against, base, ratio, ", ".join(most)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    formats = [
        f"{{:{side}{width}}}" for side, width in zip("<>>><<>><", widths, strict=True)
    ]
    return "\n".join("  ".join(formats).format(*row).rstrip() for row in rows)


def as_json(results: Results) -> str:
    """For programs."""
    figures = [
        {"benchmark": name, "name": one.name, "unit": one.unit, **one.numbers()}
        | {
            "baseline": one.against,
            "wanted_at_most": dict(one.most),
            "missed": one.missed(),
        }
        for name, many in results.items()
        for one in many
    ]
    return json.dumps({"machine": machine(), "figures": figures}, indent=2)
