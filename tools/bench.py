"""Measures the plugin:  ./build.sh bench [--json] [--quick] [NAME...]

Every figure stands beside a bare baseline that is measured in the same run and in turn with it, so
that a busy machine slows both, and the ratio holds. Nothing here fails: a target that is missed is
marked, no more.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from resource import RUSAGE_CHILDREN, getrusage
from signal import SIGKILL
from typing import Any

import grpc
from figures import Figure, as_json, as_table, cpu_us, effort, held, machine
from stage import Stage

import api_pb2 as api
import tt_device_plugin as tt
from test_plugin import Log, Puppet, Tree, chips

N150 = "tenstorrent.com/n150"
GALAXY = "tenstorrent.com/galaxy-wormhole"
SYSFS_FILE = Path("/sys/class/net/lo/mtu")  # one that every Linux has


def poller(sys_root: str | Path, dev_root: str | Path) -> Callable[[], object]:
    """What does one poll of this tree. Nothing else here knows the module from inside."""
    settings = tt.Settings(sysfs_root=Path(sys_root), dev_root=Path(dev_root))
    inventory = tt.Inventory(settings)
    return lambda: inventory.poll(time.monotonic())


def read(path: str | Path) -> None:
    """Opens, reads and closes a file."""
    fd = os.open(path, os.O_RDONLY)
    os.read(fd, 4096)
    os.close(fd)


def least(sys_root: str | Path) -> None:
    """The least that a poll can do: lists the class, and reads one file of each chip."""
    top = f"{sys_root}/class/tenstorrent"
    for name in os.listdir(top):
        read(f"{top}/{name}/tt_heartbeat")


def traced_poll(sys_root: str, dev_root: str) -> None:
    """For strace: one poll after the first, and the least, each between two marks."""
    poll = poller(sys_root, dev_root)
    for act in (poll, poll, lambda: least(sys_root)):
        act()
        os.path.exists("/mark of the benchmark")


def unary(channel: grpc.Channel, method: str) -> Any:
    """A method of the DevicePlugin service that takes and gives bytes."""
    return channel.unary_unary(f"/v1beta1.DevicePlugin/{method}")


def bench_start(stage: Stage) -> Iterator[Figure]:
    """Process start to Register at the kubelet, and CPU time: a busy machine stretches only one."""
    ways, tree, kubelet = stage.ways(), stage.tree(4), stage.kubelet()
    wall: dict[str, list[float]] = {name: [] for name in ("import", "empty", *ways)}
    cpu: dict[str, list[float]] = {name: [] for name in wall}
    for _ in stage.times(20, 1):
        used, began = getrusage(RUSAGE_CHILDREN), time.monotonic()
        subprocess.run([sys.executable, "-c", "import grpc"], check=True)
        wall["import"].append((time.monotonic() - began) * 1e3)
        now = getrusage(RUSAGE_CHILDREN)
        cpu["import"].append((sum(now[:2]) - sum(used[:2])) * 1e3)
        began = time.monotonic()
        server, _ = stage.empty()
        wall["empty"].append((time.monotonic() - began) * 1e3)
        cpu["empty"].append(effort(server.pid)[0] * 1e3)
        server.kill()
        for name, way in ways.items():
            mark = kubelet.log.mark()
            plugin = stage.plugin(way, tree, kubelet)
            registered = kubelet.wait("register", after=mark, timeout=30)["t"]
            cpu[name].append(effort(plugin.process.pid)[0] * 1e3)
            wall[name].append((registered - plugin.started) * 1e3)
            kubelet.wait_status(N150, 4, 4, after=mark)
            plugin.end()
    for name in ("empty", *ways):
        what = "empty server to serving" if name == "empty" else f"{name} to Register"
        most = {"ratio": 1.6} if name == "module" else {}
        yield Figure(what, "ms", wall[name], wall["import"], "import grpc", most)
        yield Figure("the same, CPU", "ms", cpu[name], cpu["import"], "import grpc")
    if "pyz" in ways:
        more = [pyz - module for pyz, module in zip(wall["pyz"], wall["module"], strict=True)]
        yield Figure("pyz, more than module", "ms", more, [], "", {"p50": 250.0})


def bench_memory(stage: Stage) -> Iterator[Figure]:
    """What a process holds that has four cards registered and has answered a call."""
    ways, tree, kubelet = stage.ways(), stage.tree(4), stage.kubelet()
    found: dict[str, list[dict[str, float]]] = {name: [] for name in ("empty", *ways)}
    for _ in stage.times(5, 1):
        server, address = stage.empty()
        with grpc.insecure_channel(address) as channel:
            unary(channel, "Allocate")(b"", timeout=10)
        found["empty"].append(held(server.pid))
        server.kill()
        for name, way in ways.items():
            mark = kubelet.log.mark()
            plugin = stage.plugin(way, tree, kubelet)
            kubelet.wait_status(N150, 4, 4, after=mark, timeout=30)
            kubelet.allocate(N150, [*kubelet.seen("devices")[-1]["devices"]][:1])
            found[name].append(held(plugin.process.pid))
            plugin.end()
    for name, what in itertools.product(ways, ("resident", "anonymous", "memory files", "threads")):
        ours, bare = ([one[what] for one in found[each]] for each in (name, "empty"))
        if any(ours):
            most = {"ratio": 1.12} if (name, what) == ("module", "resident") else {}
            unit = "" if what == "threads" else "MiB"
            yield Figure(f"{name}, {what}", unit, ours, bare, "empty server", most)


def bench_calls(stage: Stage) -> Iterator[Figure]:
    """Allocate and GetPreferredAllocation, in turn with the same call of the empty server."""
    _, address = stage.empty()
    # A Galaxy's 32 chips by bus (tt-smi-s_galaxy-wh_32).
    buses = [tray + position for tray in range(0, 256, 64) for position in range(1, 9)]
    places = [f"{bus:02x} 6A{bus:02X} 0100035100000000" for bus in buses]
    galaxy = Tree(stage.new("tree"), chips("galaxy-wormhole", *places))
    for tree, resource, many in ((stage.tree(4), N150, 1), (galaxy, GALAXY, 8)):
        stage.beat(tree)
        kubelet, count = stage.kubelet(), len(tree.chips)
        # Reading its log in this process would hold up its client.
        stage.plugin(stage.module(), tree, kubelet, log=str(stage.new("log")))
        kubelet.wait_status(resource, count, count, timeout=30)
        ids = sorted(kubelet.seen("devices")[-1]["devices"])
        one = api.ContainerAllocateRequest(devices_ids=ids[:many])
        wish = api.ContainerPreferredAllocationRequest(available_deviceIDs=ids)
        wish.allocation_size = many
        requests = {
            "Allocate": api.AllocateRequest(container_requests=[one]),
            "GetPreferredAllocation": api.PreferredAllocationRequest(container_requests=[wish]),
        }
        socket = kubelet.folder / kubelet.seen("register")[-1]["endpoint"]
        channels = [grpc.insecure_channel(each) for each in (f"unix:{socket}", address)]
        for method, request in requests.items():
            calls = [unary(channel, method) for channel in channels]
            data, times = request.SerializeToString(), (list[float](), list[float]())
            for number in stage.times(2000, 20):
                for side in (number % 2, 1 - number % 2):
                    began = time.perf_counter()
                    calls[side](data, timeout=10)
                    times[side].append((time.perf_counter() - began) * 1e3)
            most = {"ratio": 1.3} if (method, many) == ("Allocate", 1) else {}
            yield Figure(f"{method}, {many} of {count}", "ms", *times, "empty handler", most)
        for channel in channels:
            channel.close()


def bench_again(stage: Stage) -> Iterator[Figure]:
    """To the list at the kubelet, from a dropped stream, a new kubelet, another instance's end.

    The baseline has nothing to notice and nothing to start: a server that is there already
    connects and calls Register.
    """
    way, tree, kubelet = stage.module(), stage.tree(4), stage.kubelet()
    stage.beat(tree)
    holder = stage.plugin(way, tree, kubelet)
    kubelet.wait_status(N150, 4, 4, timeout=30)

    def drop() -> float:
        mark = kubelet.log.mark()
        kubelet.drop_stream(N150)
        dropped: float = kubelet.wait("dropped", after=mark)["t"]
        kubelet.wait_status(N150, 4, 0, after=mark)
        return kubelet.wait_status(N150, 4, 4, after=mark) - dropped

    def drop_later() -> float:
        time.sleep(1)  # a stream that has lasted so long: after shorter ones, it takes its time
        return drop()

    def restart() -> float:
        kubelet.kill()
        mark = kubelet.log.mark()
        answering = kubelet.start()
        return kubelet.wait_status(N150, 4, 4, after=mark) - answering

    def take_over() -> float:
        nonlocal holder
        heir = stage.plugin(way, tree, kubelet)
        heir.wait_for_line("standing by", timeout=30)
        mark = kubelet.log.mark()
        holder.end(SIGKILL)
        holder = heir
        ended: float = kubelet.wait("stream_end", after=mark, resource=N150)["t"]
        return kubelet.wait_status(N150, 4, 4, after=mark) - ended

    def register() -> float:
        endpoint = stage.new("bare").name
        with contextlib.closing(Puppet(kubelet, "example.com/bare", endpoint)) as puppet:
            began = time.monotonic()
            puppet.register()
            return time.monotonic() - began

    most = {"p50": 15.0, "p99": 50.0}
    for name, act, often, few, targets in (
        ("stream dropped", drop_later, 50, 1, most),
        ("dropped again and again", drop, 200, 3, {}),
        ("a new kubelet answers", restart, 50, 1, {}),
        ("the other instance killed", take_over, 20, 1, {}),
    ):
        pairs = [(act() * 1e3, register() * 1e3) for _ in stage.times(often, few)]
        ours, bare = zip(*pairs, strict=True)
        yield Figure(name, "ms", ours, bare, "connect, Register", targets)


def bench_fault(stage: Stage) -> Iterator[Figure]:
    """A card vanishes, at any moment between two polls: till the kubelet has it as Unhealthy.

    The baseline polls as often, and does nothing but list the class.
    """
    poll_s = 0.1 if stage.quick else 1.0
    tree, kubelet = stage.tree(4), stage.kubelet()
    stage.beat(tree)
    bdf, chip = next(iter(tree.chips.items()))
    stage.plugin(stage.module(), tree, kubelet, f"--poll-seconds={poll_s}")
    kubelet.wait_status(N150, 4, 4, timeout=30)
    done, looks = threading.Event(), Log("the bare loop")

    def look() -> None:
        while not done.wait(poll_s):
            looks.append((len(os.listdir(tree.sys / "class/tenstorrent")), time.monotonic()))

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    seen, bare = list[float](), list[float]()
    for _ in stage.times(30, 2):
        time.sleep(random.uniform(0, poll_s))
        mark, then, began = kubelet.log.mark(), looks.mark(), time.monotonic()
        tree.remove(bdf)
        seen.append((kubelet.wait_status(N150, 4, 3, after=mark) - began) * 1e3)
        bare.append((looks.wait_for(lambda one: one[0] < 4, 10, then)[1] - began) * 1e3)
        tree.add(chip)
        kubelet.wait_status(N150, 4, 4, after=mark)
    done.set()
    thread.join()
    most = {"p99": poll_s * 1000 + 20}
    yield Figure(f"card gone, poll {poll_s:g} s", "ms", seen, bare, "loop of listdir", most)


def bench_poll(stage: Stage) -> Iterator[Figure]:
    """One poll, by chip: CPU time and system calls. The baseline lists the class and reads one
    file a chip.

    The trees are files on a disk. What a file of real sysfs costs beyond that is measured first,
    and to be added for each of the files that a poll reads.
    """
    copy = stage.room / "attribute"
    copy.write_bytes(SYSFS_FILE.read_bytes())
    reads = [partial(read, file) for file in (SYSFS_FILE, copy)]
    pairs = [[cpu_us(act, 50) for act in reads] for _ in stage.times(200, 2)]
    ours, bare = zip(*pairs, strict=True)
    yield Figure("one file of real sysfs", "us", ours, bare, "file on a disk")
    for count in (4,) if stage.quick else (4, 32, 256):
        tree = stage.tree(count)
        poll, write = poller(tree.sys, tree.dev), stage.hearts(tree)
        poll()
        acts, pairs = (poll, partial(least, tree.sys)), []
        for number in stage.times(max(20, 4000 // count), 2):
            write(1001 + number)
            pairs.append([cpu_us(act) / count for act in acts])
        name, most = f"{count} chips, CPU a chip", {"p50": 60.0}
        ours, bare = zip(*pairs, strict=True)
        yield Figure(name, "us", ours, bare, "1 read a chip", most)
        if calls := system_calls(tree, stage.room / "trace"):
            poll_calls, least_calls = ([each / count] for each in calls)
            name = f"{count} chips, calls a chip"
            yield Figure(name, "", poll_calls, least_calls, "1 read a chip")


def system_calls(tree: Tree, trace: Path) -> tuple[int, int] | None:
    """Those of one poll, and of the least; None where strace is missing or may not trace."""
    program = "import bench, sys; bench.traced_poll(*sys.argv[1:])"
    command = [sys.executable, "-c", program, str(tree.sys), str(tree.dev)]
    try:
        strace = ["strace", "-f", "-o", str(trace), *command]
        subprocess.run(strace, check=True, cwd=Path(__file__).parent, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    # A call that another thread's interrupts has two lines.
    lines = [line for line in trace.read_text().splitlines() if "resumed>" not in line]
    marks = [number for number, line in enumerate(lines) if "/mark of the benchmark" in line]
    return marks[1] - marks[0] - 1, marks[2] - marks[1] - 1


def bench_idle(stage: Stage) -> Iterator[Figure]:
    """A minute in which nothing changes but heartbeats: CPU in per cent of a core, wake-ups."""
    pids = {0: stage.empty()[0].pid}
    for count in (4, 32):
        tree, kubelet = stage.tree(count), stage.kubelet()
        stage.beat(tree)
        pids[count] = stage.plugin(stage.module(), tree, kubelet).process.pid
        kubelet.wait_status(N150, count, count, timeout=30)
    before, began = {count: effort(pid) for count, pid in pids.items()}, time.monotonic()
    time.sleep(1 if stage.quick else 60)
    seconds = time.monotonic() - began
    after = {count: effort(pid) for count, pid in pids.items()}
    cpu = {count: [(after[count][0] - before[count][0]) / seconds * 100] for count in pids}
    wakeups = {count: [(after[count][1] - before[count][1]) / seconds] for count in pids}
    for count, most in ((4, 0.3), (32, 1.0)):
        yield Figure(
            f"{count} cards, CPU", "% core", cpu[count], cpu[0], "empty server", {"p50": most}
        )
        yield Figure(f"{count} cards, wake-ups", "/s", wakeups[count], wakeups[0], "empty server")


def bench_growth(stage: Stage) -> Iterator[Figure]:
    """What a thousand registrations, and clients of the empty server, leave behind.

    The first hundred warm up.
    """
    tree, kubelet = stage.tree(4), stage.kubelet()
    stage.beat(tree)
    server, address = stage.empty()
    plugin = stage.plugin(stage.module(), tree, kubelet)
    kubelet.wait_status(N150, 4, 4, timeout=30)
    count, warm = (6, 2) if stage.quick else (1100, 100)
    found = []
    for number in range(count + 1):
        if number in (warm, count):
            found.append([held(pid) for pid in (plugin.process.pid, server.pid)])
        mark = kubelet.log.mark()
        kubelet.drop_stream(N150)
        kubelet.wait_status(N150, 4, 0, after=mark)
        kubelet.wait_status(N150, 4, 4, after=mark)
        with grpc.insecure_channel(address, [("grpc.use_local_subchannel_pool", 1)]) as channel:
            unary(channel, "Allocate")(b"", timeout=10)
    for what, unit in (("private memory", "KiB"), ("threads", ""), ("descriptors", "")):
        ours, theirs = ([found[1][side][what] - found[0][side][what]] for side in (0, 1))
        name = f"{what}, {count - warm} drops"
        yield Figure(name, unit, ours, theirs, "as many clients")


BENCHMARKS: dict[str, Callable[[Stage], Iterator[Figure]]] = {
    "start": bench_start,
    "memory": bench_memory,
    "calls": bench_calls,
    "again": bench_again,
    "fault": bench_fault,
    "poll": bench_poll,
    "idle": bench_idle,
    "growth": bench_growth,
}


def main() -> None:
    """The program."""
    parser = argparse.ArgumentParser(
        prog="./build.sh bench", description=(__doc__ or "").split("\n\n")[1]
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--quick", action="store_true", help="to see that it runs, not how fast")
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help=f"of {', '.join(BENCHMARKS)}; default: all"
    )
    options = parser.parse_args()
    if unknown := sorted(set(options.names) - set(BENCHMARKS)):
        parser.error(f"there is no {', '.join(unknown)}: choose of {', '.join(BENCHMARKS)}")
    results = {}
    for name in options.names or BENCHMARKS:
        doc = (BENCHMARKS[name].__doc__ or "").splitlines()[0]
        print(f"{name}: {doc}", file=sys.stderr, flush=True)
        with Stage(options.quick) as stage:
            results[name] = list(BENCHMARKS[name](stage))
    if options.json:
        print(as_json(results))
    else:
        print("\n".join(f"{what:8}{text}" for what, text in machine().items()), end="\n\n")
        print(as_table(results))


if __name__ == "__main__":
    main()
