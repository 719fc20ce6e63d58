"""Measures the plugin:  ./build.sh bench [--json] [--quick] [NAME...].

Every figure stands beside a bare baseline that is measured in the same run and in turn
with it, so that a busy machine slows both, and the ratio holds. Nothing here fails: a
target that is missed is marked, no more.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from resource import RUSAGE_CHILDREN, getrusage
from signal import SIGKILL
from typing import Any

import grpc
from fake_kubelet import LOCAL
from figures import (
    Figure,
    as_json,
    as_table,
    cpu_and_wakeups,
    cpu_us,
    machine,
    resources_of,
)
from harness import Kubelet, Log, Puppet, Tree, make_chips
from testbed import Testbed

import api_pb2 as api
import tt_device_plugin as tt

N150 = "tenstorrent.com/n150"
GALAXY = "tenstorrent.com/galaxy-wormhole"
SYSFS_FILE = Path("/sys/class/net/lo/mtu")  # one that every Linux has


def poller(sys_root: str | Path, dev_root: str | Path) -> Callable[[], object]:
    """What does one poll of this tree, and one read of each chip, as its reader would.

    Only this knows the module from inside.
    """
    settings = tt.Settings(
        sysfs_root=Path(sys_root), dev_root=Path(dev_root), poll_seconds=60
    )
    inventory = tt.Inventory(settings)  # its own readers read once, at the first poll

    def poll() -> None:
        for card in inventory.poll(time.monotonic()).cards:
            for chip in card.chips:
                inventory.discovery.read(chip)

    return poll


def read(path: str | Path) -> None:
    """Open, read and close a file."""
    fd = os.open(path, os.O_RDONLY)
    os.read(fd, 4096)
    os.close(fd)


def bare_poll(sys_root: str | Path) -> None:
    """The least that a poll can do: list the class, and read one file of each chip."""
    top = f"{sys_root}/class/tenstorrent"
    for name in os.listdir(top):
        read(f"{top}/{name}/tt_heartbeat")


def traced_poll(sys_root: str, dev_root: str) -> None:
    """For strace: one poll after the first, and a bare one, each between two marks."""
    poll = poller(sys_root, dev_root)
    for act in (poll, poll, partial(bare_poll, sys_root)):
        act()
        os.path.exists("/mark of the benchmark")


def unary(channel: grpc.Channel, method: str) -> Any:
    """A method of the DevicePlugin service that takes and gives bytes."""
    return channel.unary_unary(f"/v1beta1.DevicePlugin/{method}")


# ==== Start and memory ================================================================


@dataclass
class Times:
    """Of one way to start, in ms."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)


def time_import(times: Times) -> None:
    """A Python that imports grpc, and ends."""
    before = getrusage(RUSAGE_CHILDREN)
    began = time.monotonic()
    subprocess.run([sys.executable, "-c", "import grpc"], check=True)
    times.wall.append((time.monotonic() - began) * 1e3)
    after = getrusage(RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    times.cpu.append(seconds * 1e3)


def time_empty_server(bed: Testbed, times: Times) -> None:
    """An empty server, until it serves."""
    began = time.monotonic()
    server, _ = bed.empty_server()
    times.wall.append((time.monotonic() - began) * 1e3)
    cpu, _ = cpu_and_wakeups(server.pid)
    times.cpu.append(cpu * 1e3)
    server.kill()


def bench_start(bed: Testbed) -> Iterator[Figure]:
    """Process start to Register, and CPU time: a busy machine stretches only one."""
    launchers = bed.launchers()
    tree = bed.tree(4)
    bed.enter_context(tree.beating())
    kubelet = bed.kubelet()
    imports = Times()
    times = {name: Times() for name in ("empty", *launchers)}
    for _ in bed.repeat(20, quick=1):
        time_import(imports)
        time_empty_server(bed, times["empty"])
        for name, launcher in launchers.items():
            mark = kubelet.log.mark()
            plugin = bed.plugin(launcher, tree, kubelet)
            registered = kubelet.wait("register", after=mark, timeout=30)["t"]
            cpu, _ = cpu_and_wakeups(plugin.process.pid)
            times[name].cpu.append(cpu * 1e3)
            times[name].wall.append((registered - plugin.started) * 1e3)
            kubelet.wait_status(N150, 4, 4, after=mark)
            plugin.end()

    for name, mine in times.items():
        what = f"{name} to Register"
        if name == "empty":
            what = "empty server to serving"
        targets = {"ratio": 1.6} if name == "module" else {}
        yield Figure(what, "ms", mine.wall, imports.wall, "import grpc", targets)
        yield Figure("the same, CPU", "ms", mine.cpu, imports.cpu, "import grpc")
    if "pyz" in launchers:
        pairs = zip(times["pyz"].wall, times["module"].wall, strict=True)
        more = [pyz - module for pyz, module in pairs]
        yield Figure("pyz, more than module", "ms", more, [], "", {"p50": 250.0})


def bench_memory(bed: Testbed) -> Iterator[Figure]:
    """What a process holds that has four cards registered and has answered a call."""
    launchers = bed.launchers()
    tree = bed.tree(4)
    bed.enter_context(tree.beating())
    kubelet = bed.kubelet()
    empty = []
    found: dict[str, list[dict[str, float]]] = {name: [] for name in launchers}
    for _ in bed.repeat(5, quick=1):
        server, address = bed.empty_server()
        with grpc.insecure_channel(address) as channel:
            unary(channel, "Allocate")(b"", timeout=10)
        empty.append(resources_of(server.pid))
        server.kill()
        for name, launcher in launchers.items():
            mark = kubelet.log.mark()
            plugin = bed.plugin(launcher, tree, kubelet)
            kubelet.wait_status(N150, 4, 4, after=mark, timeout=30)
            first, *_ = kubelet.last("devices")["devices"]
            kubelet.allocate(N150, [first])
            found[name].append(resources_of(plugin.process.pid))
            plugin.end()

    for name, mine in found.items():
        for what in ("resident", "anonymous", "memory files", "threads"):
            samples = [one[what] for one in mine]
            baseline = [one[what] for one in empty]
            if any(samples):
                targets = {}
                if (name, what) == ("module", "resident"):
                    targets = {"ratio": 1.12}
                unit = "" if what == "threads" else "MiB"
                title = f"{name}, {what}"
                yield Figure(title, unit, samples, baseline, "empty server", targets)


# ==== Calls ===========================================================================


def bench_calls(bed: Testbed) -> Iterator[Figure]:
    """Allocate and GetPreferredAllocation, in turn with the empty server's."""
    _, address = bed.empty_server()
    yield from time_calls(bed, address, bed.tree(4), N150, size=1)
    # The buses of a Wormhole Galaxy's 32 chips, as captured on one.
    places = [
        f"{tray + position:02x} 6A{tray + position:02X} 0100035100000000"
        for tray in range(0, 256, 64)
        for position in range(1, 9)
    ]
    galaxy = Tree(bed.new_path("tree"), make_chips("galaxy-wormhole", *places))
    yield from time_calls(bed, address, galaxy, GALAXY, size=8)


def requests_for(ids: list[str], size: int) -> dict[str, bytes]:
    """Each call that is measured: a request for so many of these cards."""
    container = api.ContainerAllocateRequest(devices_ids=ids[:size])
    allocate = api.AllocateRequest(container_requests=[container])
    preference = api.ContainerPreferredAllocationRequest(
        available_deviceIDs=ids, allocation_size=size
    )
    prefer = api.PreferredAllocationRequest(container_requests=[preference])
    return {
        "Allocate": allocate.SerializeToString(),
        "GetPreferredAllocation": prefer.SerializeToString(),
    }


def time_calls(
    bed: Testbed, address: str, tree: Tree, resource: str, size: int
) -> Iterator[Figure]:
    """Both calls for so many cards of this node. `address` is the empty server's."""
    bed.enter_context(tree.beating())
    kubelet = bed.kubelet()
    count = len(tree.chips)
    # Reading its log in this process would hold up its client.
    bed.plugin(bed.module(), tree, kubelet, log=str(bed.new_path("log")))
    kubelet.wait_status(resource, count, count, timeout=30)
    ids = sorted(kubelet.last("devices")["devices"])
    socket = kubelet.folder / kubelet.last("register")["endpoint"]
    with (
        grpc.insecure_channel(f"unix:{socket}") as plugin,
        grpc.insecure_channel(address) as empty,
    ):
        for method, data in requests_for(ids, size).items():
            sides: list[tuple[Any, list[float]]] = [
                (unary(channel, method), []) for channel in (plugin, empty)
            ]
            for _ in bed.repeat(2000, quick=20):
                sides.reverse()  # who is first
                for call, times in sides:
                    began = time.perf_counter()
                    call(data, timeout=10)
                    times.append((time.perf_counter() - began) * 1e3)
            (_, samples), (_, baseline) = sides
            targets = {"ratio": 1.3} if (method, size) == ("Allocate", 1) else {}
            title = f"{method}, {size} of {count}"
            yield Figure(title, "ms", samples, baseline, "empty handler", targets)


# ==== Registration ====================================================================


class Registered:
    """A plugin that is registered, and what ends its registration.

    Each method returns the seconds until its list is at the kubelet again.
    """

    def __init__(self, bed: Testbed) -> None:
        self.bed = bed
        self.launcher = bed.module()
        self.tree = bed.tree(4)
        self.kubelet = bed.kubelet()
        bed.enter_context(self.tree.beating())
        self.holder = bed.plugin(self.launcher, self.tree, self.kubelet)
        self.kubelet.wait_status(N150, 4, 4, timeout=30)

    def drop_the_stream(self) -> float:
        """It has lasted a second: after shorter ones the plugin takes its time."""
        time.sleep(1.1)
        mark = self.kubelet.log.mark()
        dropped = drop(self.kubelet)
        return self.kubelet.wait_status(N150, 4, 4, after=mark) - dropped

    def restart_the_kubelet(self) -> float:
        """Counted from when it listens."""
        self.kubelet.kill()
        mark = self.kubelet.log.mark()
        answering = self.kubelet.start()
        return self.kubelet.wait_status(N150, 4, 4, after=mark) - answering

    def kill_the_other_instance(self) -> float:
        """One stands by."""
        heir = self.bed.plugin(self.launcher, self.tree, self.kubelet)
        heir.wait_for_line("standing by", timeout=30)
        mark = self.kubelet.log.mark()
        self.holder.end(SIGKILL)
        self.holder = heir
        ended = self.kubelet.wait("stream_end", after=mark, resource=N150)["t"]
        return self.kubelet.wait_status(N150, 4, 4, after=mark) - float(ended)

    def register_a_puppet(self) -> float:
        """The baseline: one that has nothing to notice and nothing to start."""
        endpoint = self.bed.new_path("bare").name
        puppet = Puppet(self.kubelet, "example.com/bare", endpoint)
        with contextlib.closing(puppet):
            began = time.monotonic()
            puppet.register()
            return time.monotonic() - began


def drop(kubelet: Kubelet) -> float:
    """The kubelet ends the stream, and has noticed it: when it was ended."""
    mark = kubelet.log.mark()
    kubelet.drop_stream(N150)
    dropped = kubelet.wait("dropped", after=mark)["t"]
    kubelet.wait_status(N150, 4, 0, after=mark)
    return float(dropped)


def bench_again(bed: Testbed) -> Iterator[Figure]:
    """To the list: from a dropped stream, a new kubelet, another instance's end.

    The baseline is a server that is there already, connects and calls Register.
    """
    plugin = Registered(bed)
    targets = {"p50": 15.0, "p99": 50.0}
    yield from again(plugin, "stream dropped", plugin.drop_the_stream, 50, targets)
    yield from again(plugin, "a new kubelet answers", plugin.restart_the_kubelet, 50)
    yield from again(
        plugin, "the other instance killed", plugin.kill_the_other_instance, 20
    )


def again(
    plugin: Registered,
    name: str,
    end: Callable[[], float],
    times: int,
    targets: dict[str, float] | None = None,
) -> Iterator[Figure]:
    """End the registration so many times."""
    samples = []
    baseline = []
    for _ in plugin.bed.repeat(times, quick=1):
        samples.append(end() * 1e3)
        baseline.append(plugin.register_a_puppet() * 1e3)
    yield Figure(name, "ms", samples, baseline, "connect, Register", targets or {})


def bench_growth(bed: Testbed) -> Iterator[Figure]:
    """What a thousand registrations, and clients of the empty server, leave behind.

    The first hundred warm up.
    """
    tree = bed.tree(4)
    bed.enter_context(tree.beating())
    kubelet = bed.kubelet()
    server, address = bed.empty_server()
    plugin = bed.plugin(bed.module(), tree, kubelet)
    kubelet.wait_status(N150, 4, 4, timeout=30)

    def register_anew(times: range) -> tuple[dict[str, float], dict[str, float]]:
        for _ in times:
            kubelet.renew_socket()  # so that the plugin makes no pause
            mark = kubelet.log.mark()
            drop(kubelet)
            kubelet.wait_status(N150, 4, 4, after=mark)
            with grpc.insecure_channel(address, [LOCAL]) as channel:
                unary(channel, "Allocate")(b"", timeout=10)
        return resources_of(plugin.process.pid), resources_of(server.pid)

    register_anew(bed.repeat(100, quick=2))
    before, server_before = register_anew(range(1))
    times = bed.repeat(1000, quick=4)
    after, server_after = register_anew(times)
    for what, unit in (("private memory", "KiB"), ("threads", ""), ("descriptors", "")):
        samples = [after[what] - before[what]]
        baseline = [server_after[what] - server_before[what]]
        title = f"{what}, {len(times)} drops"
        yield Figure(title, unit, samples, baseline, "as many clients")


# ==== Polls ===========================================================================


def bench_fault(bed: Testbed) -> Iterator[Figure]:
    """A card vanishes between two polls: until the kubelet has it as Unhealthy.

    The baseline polls as often, and does nothing but list the class.
    """
    poll_s = 0.1 if bed.quick else 1.0
    tree = bed.tree(4)
    kubelet = bed.kubelet()
    bed.enter_context(tree.beating())
    first, *_ = tree.chips.values()
    bed.plugin(bed.module(), tree, kubelet, f"--poll-seconds={poll_s}")
    kubelet.wait_status(N150, 4, 4, timeout=30)
    done = threading.Event()
    lists = Log("the bare loop")
    arguments = (tree.sys / "class/tenstorrent", poll_s, done, lists)
    thread = threading.Thread(target=list_often, args=arguments, daemon=True)
    thread.start()
    samples = list[float]()
    baseline = list[float]()
    for _ in bed.repeat(30, quick=2):
        time.sleep(random.uniform(0, poll_s))
        mark = kubelet.log.mark()
        lists_mark = lists.mark()
        began = time.monotonic()
        tree.remove(first.pci)
        seen = kubelet.wait_status(N150, 4, 3, after=mark)
        _, listed = lists.wait_for(lambda one: one[0] < 4, 10, lists_mark)
        samples.append((seen - began) * 1e3)
        baseline.append((listed - began) * 1e3)
        tree.add(first)
        kubelet.wait_status(N150, 4, 4, after=mark)
    done.set()
    thread.join()
    title = f"card gone, poll {poll_s:g} s"
    targets = {"p99": poll_s * 1000 + 20}
    yield Figure(title, "ms", samples, baseline, "loop of listdir", targets)


def list_often(folder: Path, pause: float, done: threading.Event, log: Log) -> None:
    """The baseline of bench_fault: log how many entries there are, and when."""
    while not done.wait(pause):
        log.append((len(os.listdir(folder)), time.monotonic()))


def bench_poll(bed: Testbed) -> Iterator[Figure]:
    """One poll with one read of each chip, by chip: CPU time and system calls.

    The baseline lists the class and reads one file a chip. The trees are files on a
    disk. What a file of real sysfs costs beyond that is measured first, and to be added
    for each of the files that are read.
    """
    yield time_sysfs_file(bed)
    for count in (4,) if bed.quick else (4, 32, 256):
        tree = bed.tree(count)
        poll = poller(tree.sys, tree.dev)
        write = bed.heartbeats(tree)
        poll()
        samples = []
        baseline = []
        for number in bed.repeat(max(20, 4000 // count), quick=2):
            write(1001 + number)
            samples.append(cpu_us(poll) / count)
            baseline.append(cpu_us(partial(bare_poll, tree.sys)) / count)
        title = f"{count} chips, CPU a chip"
        targets = {"p50": 60.0}
        yield Figure(title, "us", samples, baseline, "1 read a chip", targets)
        calls = system_calls(tree, bed.workdir / "trace")
        if calls:
            mine, bare = calls
            title = f"{count} chips, calls a chip"
            yield Figure(title, "", [mine / count], [bare / count], "1 read a chip")


def time_sysfs_file(bed: Testbed) -> Figure:
    """What it costs to read a file of real sysfs, and one on a disk."""
    copy = bed.workdir / "attribute"
    copy.write_bytes(SYSFS_FILE.read_bytes())
    samples = []
    baseline = []
    for _ in bed.repeat(200, quick=2):
        samples.append(cpu_us(partial(read, SYSFS_FILE), 50))
        baseline.append(cpu_us(partial(read, copy), 50))
    return Figure("one file of real sysfs", "us", samples, baseline, "file on a disk")


def system_calls(tree: Tree, trace: Path) -> tuple[int, int] | None:
    """Those of one poll, and of a bare one; None where strace may not trace."""
    program = "import bench, sys; bench.traced_poll(*sys.argv[1:])"
    command = [sys.executable, "-c", program, str(tree.sys), str(tree.dev)]
    try:
        strace = ["strace", "-f", "-o", str(trace), *command]
        folder = Path(__file__).parent
        subprocess.run(strace, check=True, cwd=folder, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    # A call that another thread's interrupts has two lines.
    lines = [one for one in trace.read_text().splitlines() if "resumed>" not in one]
    marks = [
        number for number, line in enumerate(lines) if "/mark of the benchmark" in line
    ]
    first, second, third = marks
    return second - first - 1, third - second - 1


def bench_idle(bed: Testbed) -> Iterator[Figure]:
    """A minute in which only heartbeats change: CPU in per cent of a core, wake-ups."""
    server, _ = bed.empty_server()
    pids = {0: server.pid}  # by number of cards
    for count in (4, 32):
        tree = bed.tree(count)
        kubelet = bed.kubelet()
        bed.enter_context(tree.beating())
        pids[count] = bed.plugin(bed.module(), tree, kubelet).process.pid
        kubelet.wait_status(N150, count, count, timeout=30)

    before = {count: cpu_and_wakeups(pid) for count, pid in pids.items()}
    began = time.monotonic()
    time.sleep(1 if bed.quick else 60)
    seconds = time.monotonic() - began
    cpu = {}
    wakeups = {}
    for count, pid in pids.items():
        cpu_before, wakeups_before = before[count]
        cpu_after, wakeups_after = cpu_and_wakeups(pid)
        cpu[count] = [(cpu_after - cpu_before) / seconds * 100]
        wakeups[count] = [(wakeups_after - wakeups_before) / seconds]
    for count, most in ((4, 0.3), (32, 1.0)):
        title = f"{count} cards, CPU"
        targets = {"p50": most}
        yield Figure(title, "% core", cpu[count], cpu[0], "empty server", targets)
        title = f"{count} cards, wake-ups"
        yield Figure(title, "/s", wakeups[count], wakeups[0], "empty server")


# ==== The program =====================================================================

BENCHMARKS: dict[str, Callable[[Testbed], Iterator[Figure]]] = {
    "start": bench_start,
    "memory": bench_memory,
    "calls": bench_calls,
    "again": bench_again,
    "fault": bench_fault,
    "poll": bench_poll,
    "idle": bench_idle,
    "growth": bench_growth,
}


def parse() -> argparse.Namespace:
    """The command line."""
    _, description, *_ = (__doc__ or "").split("\n\n")
    names = ", ".join(BENCHMARKS)
    parser = argparse.ArgumentParser(prog="./build.sh bench", description=description)
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument(
        "--quick", action="store_true", help="to see that it runs, not how fast"
    )
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help=f"of {names}; default: all"
    )
    options = parser.parse_args()
    unknown = sorted(set(options.names) - set(BENCHMARKS))
    if unknown:
        parser.error(f"there is no {', '.join(unknown)}: choose of {names}")
    return options


def main() -> None:
    """The program."""
    options = parse()
    results = {}
    for name in options.names or BENCHMARKS:
        summary, *_ = (BENCHMARKS[name].__doc__ or "").splitlines()
        print(f"{name}: {summary}", file=sys.stderr, flush=True)
        with Testbed(options.quick) as bed:
            results[name] = list(BENCHMARKS[name](bed))
    if options.json:
        print(as_json(results))
    else:
        for what, text in machine().items():
            print(f"{what:8}{text}")
        print()
        print(as_table(results))


if __name__ == "__main__":
    main()
