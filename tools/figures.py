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
    baseline: Sequence[float]  # samples of the baseline; [] if there is none
    baseline_name: str
    # The largest p50, p99 or ratio that is wanted.
    targets: Mapping[str, float] = MappingProxyType({})

    def numbers(self) -> dict[str, float]:
        """n, p50, p99; with a baseline its p50, and the ratio of both."""
        shown: dict[str, float] = {
            "n": len(self.samples),
            "p50": percentile(self.samples, 50),
            "p99": percentile(self.samples, 99),
        }
        if self.baseline:
            shown["base"] = percentile(self.baseline, 50)
            if shown["base"] > 0:
                shown["ratio"] = shown["p50"] / shown["base"]
        return shown

    def missed(self) -> list[str]:
        """The targets that this run has missed."""
        numbers = self.numbers()
        return [
            what
            for what, target in self.targets.items()
            if numbers.get(what, 0.0) > target
        ]


Results = Mapping[str, Sequence[Figure]]  # by benchmark


def percentile(samples: Sequence[float], part: int) -> float:
    """The smallest sample that `part` of 100 do not exceed.

    The 99th of fewer than a hundred is the largest.
    """
    position = math.ceil(part * len(samples) / 100) - 1
    return sorted(samples)[max(0, position)]


def cpu_us(act: Callable[[], object], times: int = 1) -> float:
    """CPU time in microseconds that an act takes in all threads of this process."""
    began = time.process_time()
    for _ in range(times):
        act()
    return (time.process_time() - began) / times * 1e6


def cpu_and_wakeups(pid: int) -> tuple[float, int]:
    """Seconds of CPU and wake-ups of a process so far.

    A thread that ends meanwhile is left out.
    """
    cpu = 0
    wakeups = 0
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            status = (task / "status").read_text()
            pattern = r"^voluntary_ctxt_switches:\s+(\d+)"
            (switches,) = re.findall(pattern, status, re.MULTILINE)
            nanoseconds, *_ = (task / "schedstat").read_text().split()
            cpu += int(nanoseconds)
            wakeups += int(switches)
    return cpu / 1e9, wakeups


def resources_of(pid: int) -> dict[str, float]:
    """What a process holds: memory in MiB, private memory in KiB, and numbers.

    Anonymous is what no file on a disk backs. Memory files count as resident only as
    far as they have been used.
    """
    proc = Path(f"/proc/{pid}")
    kib: dict[str, int] = {}
    lines = (proc / "smaps_rollup").read_text()
    for name, size in re.findall(r"^(\w+): +(\d+) kB", lines, re.MULTILINE):
        kind = name.split("_")[0]  # Private_Clean and Private_Dirty, for one
        kib[kind] = kib.get(kind, 0) + int(size)
    links = list((proc / "fd").iterdir())
    memory_files = {}
    for link in links:
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            about = link.stat()
            if not about.st_nlink:
                mib = about.st_blocks * 512 / 2**20
                memory_files[about.st_dev, about.st_ino] = mib
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
    text = Path("/proc/cpuinfo").read_text()
    models = re.findall(r"^model name\s*: (.*)$", text, re.MULTILINE)
    return {
        "cpu": models[0] if models else platform.machine(),
        "cores": str(len(os.sched_getaffinity(0))),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "grpcio": grpc.__version__,
        "load": f"{os.getloadavg()[0]:.1f}",
    }


# Headings of the table, and on which side their column is flush.
COLUMNS = (
    ("", "<"),
    ("n", ">"),
    ("p50", ">"),
    ("p99", ">"),
    ("unit", "<"),
    ("baseline", "<"),
    ("p50", ">"),
    ("ratio", ">"),
    ("at most (! = more)", "<"),
)


def table_row(figure: Figure) -> list[str]:
    """The cells of one figure."""
    numbers = figure.numbers()
    missed = figure.missed()

    def shown(key: str) -> str:
        return f"{numbers[key]:.4g}" if key in numbers else "-"

    targets = []
    for what, target in figure.targets.items():
        mark = "!" if what in missed else ""
        targets.append(f"{what} {target:g}{mark}")
    return [
        f"  {figure.name}",
        str(len(figure.samples)),
        shown("p50"),
        shown("p99"),
        figure.unit,
        figure.baseline_name,
        shown("base"),
        shown("ratio"),
        ", ".join(targets),
    ]


def as_table(results: Results) -> str:
    """For people."""
    rows = [[heading for heading, _ in COLUMNS]]
    for name, figures in results.items():
        rows.append([name, *[""] * (len(COLUMNS) - 1)])
        rows += [table_row(figure) for figure in figures]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [
            f"{cell:{side}{width}}"
            for cell, (_, side), width in zip(row, COLUMNS, widths, strict=True)
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def as_json(results: Results) -> str:
    """For programs."""
    figures = []
    for name, many in results.items():
        for figure in many:
            about = {"benchmark": name, "name": figure.name, "unit": figure.unit}
            judged = {
                "baseline": figure.baseline_name,
                "wanted_at_most": dict(figure.targets),
                "missed": figure.missed(),
            }
            figures.append({**about, **figure.numbers(), **judged})
    return json.dumps({"machine": machine(), "figures": figures}, indent=2)
