"""What tests and benchmarks run the plugin with: kubelets, chips, processes.

It is a plugin of pytest, too: the fixtures stand at the end, and the summary of a run
says which promised times were not judged because the machine was busy.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import multiprocessing
import os
import queue
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Concatenate, ParamSpec, TypeVar

import grpc
import pytest
from fake_kubelet import (
    LOCAL,
    METHODS,
    Behaviour,
    Event,
    FakeKubelet,
    Fault,
    Refusal,
    as_dict,
    run_fake_kubelet,
)

import api_pb2 as api
import api_pb2_grpc as rpc
import tt_device_plugin as tt

__all__ = ["Event", "Refusal", "as_dict"]  # with what is defined here

P = ParamSpec("P")
T = TypeVar("T")
Predicate = Callable[[Any], object]
Finished = subprocess.CompletedProcess[str]

HERE = Path(__file__).resolve().parents[1]
COMMAND = [sys.executable, str(HERE / "tt_device_plugin.py")]
LONG = bool(os.environ.get("TT_TEST_LONG"))  # ./build.sh test --long

# Whatever plugins said in this run: log lines, outputs, refusals. README's symptoms are
# looked up in it.
SAID: set[str] = set()

# A fork of a process that has imported these takes milliseconds, importing them far
# more.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["grpc.aio", "google.protobuf.json_format", "pytest"])


# ==== Waiting =========================================================================


def anything(item: object) -> bool:
    """A predicate that every item fits."""
    return True


class Log:
    """What another process said, in order. Tests wait on a condition and never poll."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.items: list[Any] = []
        self.changed = threading.Condition()
        self.closed = False  # nothing will follow

    def append(self, item: Any) -> None:
        """Called by the thread that reads what the process says."""
        with self.changed:
            self.items.append(item)
            self.changed.notify_all()

    def close(self) -> None:
        """Called by that thread when the process has ended."""
        with self.changed:
            self.closed = True
            self.changed.notify_all()

    def mark(self) -> int:
        """Now, as a position: pass it as `after` to see only what follows."""
        return len(self.items)

    def seen(self, fits: Predicate, after: int = 0) -> list[Any]:
        """The items so far that fit."""
        return [item for item in self.items[after:] if fits(item)]

    def wait_for(
        self, fits: Predicate, timeout: float, after: int = 0, what: str = "that"
    ) -> Any:
        """The first item after the position that fits, waiting for it if need be."""
        return self.wait_for_count(1, fits, timeout, after, what)[0]

    def wait_for_count(
        self,
        count: int,
        fits: Predicate = anything,
        timeout: float = 5.0,
        after: int = 0,
        what: str = "that many",
    ) -> list[Any]:
        """Wait until so many items fit. Returns all that do."""

        def enough() -> bool:
            return self.closed or len(self.seen(fits, after)) >= count

        with self.changed:
            self.changed.wait_for(enough, timeout)
            found = self.seen(fits, after)
        if len(found) >= count:
            return found
        ended = "before it ended" if self.closed else f"in {timeout} s"
        tail = "\n  ".join(map(str, self.items[-25:]))
        raise AssertionError(f"no {what} from {self.name} {ended}; its last:\n  {tail}")

    def expect_nothing(
        self, seconds: float, after: int, fits: Predicate = anything
    ) -> None:
        """Fail if anything that fits comes after the position, within these seconds."""
        with self.changed:
            found = self.changed.wait_for(lambda: self.seen(fits, after), seconds)
        assert not found, f"{self.name} said {found[0]}, which nothing had caused"


def event_is(event: str, **fields: Any) -> Predicate:
    """A predicate that events of this kind with these fields fit."""
    wanted = {"event": event, **fields}.items()

    def fits(one: Event) -> bool:
        return wanted <= one.items()

    return fits


def wait_until(condition: Callable[[], object]) -> None:
    """Wait for a condition that no process reports."""
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


# ==== The fake kubelet, seen from the test ============================================


class Kubelet:
    """A fake kubelet on one folder, over any number of its lives.

    What it sees and decides is in its log, as events of all its lives. What it can be
    told to do are the methods under "Commands": each raises Refusal if the plugin or
    the kubelet refuses.
    """

    def __init__(self, root: Path, generation: str = "1.36") -> None:
        self.root = root
        self.generation = generation
        self.folder = root / "device-plugins"
        self.socket = self.folder / "kubelet.sock"
        self.checkpoint = self.folder / "kubelet_internal_checkpoint"
        self.log = Log(f"the fake kubelet {generation}")
        self.process: Any = None  # of the present life
        self.numbers = itertools.count()
        self.replies: dict[int, Future[Any]] = {}

    def start(
        self,
        wait: str = "listening",
        *,
        listen_delay: float = 0.0,
        dial_delay: float = 0.0,
        dial_limit: float = 10.0,
        faults: Mapping[Fault, int] | None = None,
    ) -> float:
        """Begin a life, and return when it listens, or when the event `wait` is there.

        The parameters are those of Behaviour. The result is the time of that event.
        """
        behaviour = Behaviour(
            self.generation, listen_delay, dial_delay, dial_limit, faults or {}
        )
        mark = self.log.mark()
        self.pipe, theirs = FORKS.Pipe()
        self.process = FORKS.Process(
            target=run_fake_kubelet, args=(theirs, self.root, behaviour), daemon=True
        )
        self.process.start()
        theirs.close()
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()
        return float(self.wait(wait, timeout=20, after=mark)["t"])

    def _read(self) -> None:
        with contextlib.suppress(EOFError, OSError):
            while True:
                event = self.pipe.recv()
                if event["event"] == "reply":
                    self.replies[event["number"]].set_result(event["result"])
                else:
                    self.log.append(event)

    def kill(self) -> None:
        """End this life, if there is one. Sockets stay behind, and streams break."""
        if self.process:
            self.process.kill()
            self.process.join()
            self.reader.join()
            self.process = None

    close = kill  # for the end of the test

    def delete_folder(self) -> None:
        """Remove device-plugins in one step, since plugins may remove their sockets."""
        shutil.rmtree(self.folder.rename(self.folder.with_name("deleted")))

    def renew_socket(self) -> None:
        """Make kubelet.sock look like that of a new kubelet, by its times."""
        os.utime(self.socket)

    def plugin_sockets(self) -> list[str]:
        """The names of the plugins' sockets in the folder."""
        found = [path.name for path in self.folder.glob("*") if path.is_socket()]
        return sorted(name for name in found if name != self.socket.name)

    # ---- Events ----

    def wait(
        self, event: str, *, timeout: float = 5.0, after: int = 0, **fields: Any
    ) -> Event:
        """The first event of this kind and with these fields."""
        found: Event = self.log.wait_for(
            event_is(event, **fields), timeout, after, event
        )
        return found

    def seen(self, event: str, *, after: int = 0, **fields: Any) -> list[Event]:
        """The events so far of this kind and with these fields."""
        return self.log.seen(event_is(event, **fields), after)

    def last(self, event: str) -> Event:
        """The last event of this kind so far."""
        return self.seen(event)[-1]

    def kinds(self, resource: str, after: int = 0) -> list[str]:
        """What came for this resource, in order: register, options, stream ..."""
        seen = self.log.seen(lambda event: event.get("resource") == resource, after)
        return [event["event"] for event in seen]

    def wait_status(
        self,
        resource: str,
        capacity: int,
        allocatable: int,
        *,
        timeout: float = 5.0,
        after: int = 0,
    ) -> float:
        """Wait until the node has so many cards, and so many of them allocatable.

        Returns the time when the status said so.
        """
        event = self.wait(
            "status",
            timeout=timeout,
            after=after,
            resource=resource,
            capacity=capacity,
            allocatable=allocatable,
        )
        return float(event["t"])

    # ---- Commands ----

    def _command(
        self,
        method: Callable[Concatenate[FakeKubelet, P], Awaitable[T]],
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> T:
        number = next(self.numbers)
        reply: Future[Any] = Future()
        self.replies[number] = reply
        self.pipe.send((number, method, args, kwargs))
        result = reply.result(35)
        if isinstance(result, Refusal):
            SAID.add(str(result))
        if isinstance(result, Exception):
            raise result
        answer: T = result
        return answer

    def rpc(
        self, resource: str, method: str, request: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Send a call, even if it is malformed, to the plugin that registered last."""
        return self._command(FakeKubelet.rpc, resource, method, request)

    def allocate(self, resource: str, ids: Sequence[str]) -> dict[str, Any]:
        """Call Allocate for one container. Returns its answer."""
        return self._command(FakeKubelet.allocate, resource, ids)

    def pre_start(self, resource: str, ids: Sequence[str]) -> None:
        """Call PreStartContainer, with the kubelet's time limit."""
        self._command(FakeKubelet.pre_start, resource, ids)

    def admit(
        self,
        pod: str,
        want: Mapping[str, int],
        reusable: Mapping[str, Sequence[str]] | None = None,
        container: str = "main",
    ) -> dict[str, Any]:
        """Admit a container that wants so many of each resource.

        `reusable` are IDs that are taken first, by resource, such as those of init
        containers. Returns `ids`, and the merged answer.
        """
        return self._command(FakeKubelet.admit, pod, want, reusable or {}, container)

    def start_container(self, pod: str, container: str = "main") -> dict[str, Any]:
        """Start or restart a container. Returns what the runtime gets."""
        return self._command(FakeKubelet.start_container, pod, container)

    def end_pod(self, pod: str) -> None:
        """End all containers of the Pod."""
        self._command(FakeKubelet.end_pod, pod)

    def topology_hints(self, resource: str, size: int) -> list[list[int]] | None:
        """The sets of NUMA nodes on which so many free devices can be had."""
        return self._command(FakeKubelet.topology_hints, resource, size)

    def set_fault(self, fault: Fault, times: int) -> None:
        """Make this go wrong so many times from now on; 0 ends it."""
        self._command(FakeKubelet.set_fault, fault, times)

    def drop_stream(self, resource: str) -> None:
        """End the resource's stream from the kubelet's side, and nothing else."""
        self._command(FakeKubelet.drop_stream, resource)


def refused(code: str, *words: str) -> pytest.RaisesExc[Refusal]:
    """The call inside must be refused: this status, and these words in this order."""
    pattern = ".*".join(map(re.escape, words))
    return pytest.raises(Refusal, match=f"(?s)^{code}: .*{pattern}")


# ==== A node with made-up chips =======================================================


@dataclass(frozen=True, slots=True)
class Chip(tt.Chip):
    """One PCIe device. A fact that is "" is a file that this driver does not make."""

    arch: str = "wormhole"
    card_type: str = "n150"
    firmware: str = "80.17.0.0"
    numa_node: int | None = 0
    iommu: str = "DMA-FQ"
    # What the device node links to: a character device that needs no root.
    target: str = "/dev/null"
    heartbeat: bool = True  # since driver 2.7
    by_id: bool = False  # udev's link, since driver 2.6


# Temperatures, current limit and power limit were captured on an n150 with driver 1.33.
# The others are from another plugin's unit test: plausible, not captured.
SENSORS = {
    "temp1_input": 54300,
    "temp1_max": 75000,
    "in0_input": 795,
    "in0_max": 1000,
    "curr1_input": 18000,
    "curr1_max": 240000,
    "power1_input": 15000000,
    "power1_max": 100000000,
}
BEAT_S = 0.1  # the firmware changes the heartbeat ten times a second


class Tree:
    """A made-up sysfs and /dev, as the plugin's --fake makes them.

    Files change atomically, as in sysfs.
    """

    def __init__(self, root: Path, chips: Sequence[Chip] = ()) -> None:
        self.root = root
        self.sys = root / "sys"
        self.dev = root / "dev"
        self.by_id = self.dev / "tenstorrent/by-id"
        self.drafts = root / "drafts"  # on the same file system, seen by nobody
        self.flags = ["--sysfs-root", str(self.sys), "--dev-root", str(self.dev)]
        self.chips: dict[str, Chip] = {}  # by PCI address
        self.lock = threading.Lock()  # the hearts beat in a thread of their own
        self.beats = itertools.count(1_000_000)
        self.still: set[str] = set()  # PCI addresses whose hearts do not beat
        for folder in ("drafts", "dev", "sys/bus/pci/devices", "sys/class/tenstorrent"):
            (root / folder).mkdir(parents=True)
        self.write(self.sys / "module/tenstorrent/version", "2.10.0\n")
        for chip in chips:
            self.add(chip)

    def pci(self, address: str) -> Path:
        """The folder of the PCI device."""
        return self.sys / "devices" / f"pci{address[:7]}" / address

    def entry(self, address: str) -> Path:
        """The folder of the driver's attributes; `device` in it leads to pci()."""
        name = f"tenstorrent!{self.chips[address].index}"
        return self.pci(address) / "tenstorrent" / name

    def node(self, address: str) -> Path:
        """The device node."""
        return self.dev / "tenstorrent" / str(self.chips[address].index)

    def write(self, path: Path, text: str | bytes) -> None:
        """Write a file that is never seen half written."""
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = self.drafts / f"{threading.get_ident()}"
        draft.write_bytes(text.encode() if isinstance(text, str) else text)
        draft.replace(path)

    def set(self, address: str, file: str, text: str | bytes | None) -> None:
        """Write a file of entry(); None removes it."""
        if text is None:
            (self.entry(address) / file).unlink()
        else:
            self.write(self.entry(address) / file, text)

    def add(self, chip: Chip) -> None:
        """Probe the PCI device: attributes first, the link in the class last."""
        with self.lock:
            self.chips[chip.pci] = chip
            if chip.heartbeat:
                self.set(chip.pci, "tt_heartbeat", f"{next(self.beats)}\n")
            if chip.card_type:  # its telemetry is there
                self.set(chip.pci, "tt_aiclk", "500\n")
                monitor = self.pci(chip.pci) / f"hwmon/hwmon{chip.index + 2}"
                for file, value in SENSORS.items():
                    self.write(monitor / file, f"{value}\n")
            if chip.by_id:
                self.link(chip.pci)
            tt.lay_out(self.root, chip, chip.target)

    def link(self, address: str) -> None:
        """Udev makes its link to the device node, in by-id."""
        chip = self.chips[address]
        self.by_id.mkdir(parents=True, exist_ok=True)
        (self.by_id / chip.id).symlink_to(f"../{chip.index}")

    def remove(self, address: str, driver: str = "") -> Chip:
        """Remove the chip from sysfs and /dev, as an unplug or a reset does.

        With another driver's name its PCI function stays, bound to that driver. Returns
        the chip as it was.
        """
        with self.lock:
            (self.sys / "class/tenstorrent" / self.entry(address).name).unlink()
            self.node(address).unlink()
            (self.by_id / self.chips[address].id).unlink(missing_ok=True)
            if driver:
                shutil.rmtree(self.pci(address) / "tenstorrent")
                (self.sys / "bus/pci/drivers" / driver).mkdir(parents=True)
                link = self.pci(address) / "driver"
                link.symlink_to(f"../../../bus/pci/drivers/{driver}")
            else:
                (self.sys / "bus/pci/devices" / address).unlink()
                shutil.rmtree(self.pci(address))
            return self.chips.pop(address)

    def move(self, address: str, index: int) -> None:
        """Remove the chip, and add it again with another N."""
        self.add(replace(self.remove(address), index=index))

    def hang(self, address: str, file: str) -> None:
        """Make reads of this file hang: it becomes a FIFO. The heartbeat stops."""
        with self.lock:
            self.still.add(address)
            fifo = self.drafts / "fifo"
            os.mkfifo(fifo)
            fifo.replace(self.entry(address) / file)

    def release(self, address: str, file: str, text: str) -> None:
        """Make reads that hang return this text, as later ones do. The heart beats."""
        path = self.entry(address) / file
        with self.lock:
            fifo = os.open(path, os.O_RDWR | os.O_NONBLOCK)
            self.write(path, text)
            os.write(fifo, text.encode())
            os.close(fifo)
            self.still.discard(address)

    def beat(self) -> None:
        """Change each heartbeat once, except those that are still."""
        with self.lock:
            for address, chip in self.chips.items():
                if chip.heartbeat and address not in self.still:
                    self.set(address, "tt_heartbeat", f"{next(self.beats)}\n")

    @contextlib.contextmanager
    def beating(self) -> Iterator[Tree]:
        """Play the chips' firmware: heartbeats change all the time meanwhile."""
        done = threading.Event()

        def run() -> None:
            while not done.wait(BEAT_S):
                self.beat()

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        yield self
        done.set()
        thread.join()


def relink(link: Path, target: str) -> None:
    """Make a symbolic link lead elsewhere."""
    link.unlink()
    link.symlink_to(target)


def make_chips(card_type: str, *places: str, **facts: Any) -> tuple[Chip, ...]:
    """Chips of one type in the order of N, each "BUS ASIC-ID'S-END SERIAL".

    ASIC ids, heartbeats, N and NUMA nodes are made up.
    """
    made = []
    for index, place in enumerate(places):
        bus, asic_id, serial = place.split()
        chip = Chip(
            pci=f"0000:{bus}:00.0",
            index=index,
            card_type=card_type,
            asic_id=f"0D0CB6F1E7A5{asic_id}",
            serial=serial,
            numa_node=int(bus > "40"),
        )
        made.append(replace(chip, **facts))
    return tuple(made)


# The serial of the first was captured on an n150 with driver 1.33, that of the third is
# in a public list of boards. The second is from another plugin's unit test, and
# plausible.
N150 = make_chips(
    "n150",
    "01 0001 0100018611902010",
    "02 0002 010001851180B42E",
    "41 0003 010001851170C06C",
    "c1 0004 0100018611902014",
)
FIRST, SECOND, THIRD, FOURTH = N150
IDS = [chip.id for chip in N150]
# A p300's two chips with one serial: derived from the driver's sources, not captured.
P300 = make_chips(
    "p300a",
    "03 0B00 000004513190F004",
    "04 0B01 000004513190F004",
    arch="blackhole",
)
P300_ID = "p300-000004513190F004"
R150 = "tenstorrent.com/n150"
R300 = "tenstorrent.com/n300"


# ==== Processes =======================================================================

# Any process that ends by itself, with what it said.
finish: Callable[..., Finished] = functools.partial(
    subprocess.run, capture_output=True, text=True, timeout=600
)


def environment(**more: str) -> dict[str, str]:
    """This process's environment, without the plugin's variables, and with more."""
    inherited = {
        name: text
        for name, text in os.environ.items()
        if not name.startswith("TT_DEVICE_PLUGIN_")
    }
    return inherited | more


def run(
    command: Sequence[str], *flags: str, timeout: float = 30.0, **variables: Any
) -> Finished:
    """Run a plugin process that ends by itself. Returns how it ended."""
    done = finish([*command, *flags], timeout=timeout, env=environment(**variables))
    assert "Traceback" not in done.stderr, done.stderr
    for text in (done.stdout, done.stderr):
        SAID.add(" ".join(text.split()))
    return done


class Plugin:
    """A running plugin process. Its log has the lines of its stderr."""

    def __init__(self, command: Sequence[str], **popen: Any) -> None:
        self.log = Log("the plugin")
        self.started = time.monotonic()
        self.ended = 0.0
        options = {"stderr": subprocess.PIPE, "text": True, "env": environment()}
        self.process = subprocess.Popen(
            command, errors="replace", **{**options, **popen}
        )
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self) -> None:
        assert self.process.stderr
        for line in self.process.stderr:
            said = line.rstrip("\n")
            self.log.append(said)
            SAID.add(said)
        self.process.wait()
        self.ended = time.monotonic()
        self.log.close()

    def wait_for_line(self, pattern: str, timeout: float = 5.0) -> str:
        """The first line that matches; case does not matter."""
        fits = re.compile(pattern, re.IGNORECASE).search
        return str(self.log.wait_for(fits, timeout, what=pattern))

    def lines(self, pattern: str = "") -> list[str]:
        """The lines so far that match; case does not matter."""
        return self.log.seen(re.compile(pattern, re.IGNORECASE).search)

    def send(self, number: signal.Signals) -> float:
        """Send a signal. Returns when it was sent."""
        sent = time.monotonic()
        self.process.send_signal(number)
        return sent

    def end(
        self, how: signal.Signals = signal.SIGTERM, timeout: float = 10
    ) -> tuple[int, float]:
        """Send a signal and wait for the end. Returns exit code and seconds."""
        sent = self.send(how)
        self.reader.join(timeout)
        assert not self.reader.is_alive(), f"no end in {timeout} s: {self.lines()}"
        return int(self.process.returncode), self.ended - sent

    def close(self) -> None:
        """Called when the test ends: the process is killed, and had no traceback."""
        self.process.kill()
        self.reader.join(10)
        text = "\n".join(self.lines())
        assert "Traceback (most recent call last)" not in text, text


def device(name: str, health: str = "Healthy", numa: int | None = None) -> api.Device:
    """A device of a Puppet's list."""
    made = api.Device(ID=name, health=health)
    if numa is not None:
        made.topology.nodes.add(ID=numa)
    return made


class Puppet:
    """A device plugin of another maker, which does what the test says."""

    def __init__(
        self, kubelet: Kubelet, resource: str, endpoint: str = "a.sock", **options: bool
    ) -> None:
        self.kubelet = kubelet
        self.resource = resource
        self.endpoint = endpoint
        self.options = options  # the same in both places
        self.answers: dict[str, Event] = {
            "GetDevicePluginOptions": {**options},
            "Allocate": {"container_responses": [{}]},
            "PreStartContainer": {},
        }
        self.calls: dict[str, list[Any]] = defaultdict(list)  # method: the requests
        self.lists: queue.Queue[Sequence[api.Device] | None] = queue.Queue()
        self.server = grpc.server(ThreadPoolExecutor(4))
        calls: dict[str, Any] = {
            method: functools.partial(self._reply, method) for method in METHODS
        }
        calls["ListAndWatch"] = self._watch
        servicer: Any = SimpleNamespace(**calls)
        rpc.add_DevicePluginServicer_to_server(servicer, self.server)
        self.server.add_insecure_port(f"unix:{kubelet.folder / endpoint}")
        self.server.start()

    def _watch(self, _: Any, context: Any) -> Iterator[Any]:
        context.add_callback(lambda: self.lists.put(None))
        while (devices := self.lists.get()) is not None:
            yield api.ListAndWatchResponse(devices=devices)

    def _reply(self, method: str, request: Any, _: Any) -> Any:
        self.calls[method].append(request)
        message = getattr(api, METHODS[method].output_type.name)
        return message(**self.answers[method])

    def send(self, *devices: api.Device) -> None:
        """Send one whole list, and wait until the kubelet has it."""
        mark = self.kubelet.log.mark()
        self.lists.put(devices)
        health = {device.ID: device.health for device in devices}
        self.kubelet.wait("devices", endpoint=self.endpoint, devices=health, after=mark)

    def end_stream(self) -> None:
        """End the stream from the plugin's side."""
        self.lists.put(None)

    def register(self, **fields: Any) -> None:
        """Register, with other values where given. Raises grpc.RpcError if refused."""
        values = {
            "version": "v1beta1",
            "endpoint": self.endpoint,
            "resource_name": self.resource,
            "options": self.options,
        }
        request = api.RegisterRequest(**{**values, **fields})
        with grpc.insecure_channel(f"unix:{self.kubelet.socket}", [LOCAL]) as channel:
            rpc.RegistrationStub(channel).Register(request, timeout=10)

    def close(self) -> None:
        """Called when the test ends: nothing of it stays."""
        self.end_stream()
        self.server.stop(None).wait()


# ==== For pytest ======================================================================

long_only = pytest.mark.skipif(not LONG, reason="takes long: ./build.sh test --long")
both_generations = pytest.mark.parametrize("kubelet", ["1.36", "1.20"], indirect=True)


def rows(columns: str, table: str) -> pytest.MarkDecorator:
    """Parametrize a test by a table with these columns, after one for the row's ID.

    Columns are two spaces or more apart. A row that ends early has "" in the rest.
    """
    names = columns.replace(",", " ").split()
    cases = []
    for line in table.strip().splitlines():
        name, *cells = re.split("  +", line.strip())
        cells += [""] * (len(names) - len(cells))
        cases.append(pytest.param(*cells, id=name))
    return pytest.mark.parametrize(names, cases)


@pytest.fixture
def workdir() -> Iterator[Path]:
    """A folder with a short name, for sockets.

    A socket's path may have 107 bytes, and tmp_path takes most of them.
    """
    with tempfile.TemporaryDirectory(
        prefix="tt-", ignore_cleanup_errors=True
    ) as folder:
        os.chmod(folder, 0o755)  # also for tests that run the plugin as another user
        yield Path(folder)


@pytest.fixture
def kubelet(request: pytest.FixtureRequest, workdir: Path) -> Iterator[Kubelet]:
    """A kubelet of 1.36, or of a parameter's generation. It is not started yet."""
    generation = getattr(request, "param", "1.36")
    with contextlib.closing(Kubelet(workdir / "k", generation)) as made:
        yield made


@pytest.fixture
def tree(workdir: Path) -> Iterator[Tree]:
    """A node with the driver and no card. Heartbeats of added chips change."""
    with Tree(workdir).beating() as made:
        yield made


@pytest.fixture
def four(tree: Tree) -> Tree:
    """A node with four n150."""
    for chip in N150:
        tree.add(chip)
    return tree


Launch = Callable[..., Plugin]
Puppets = Callable[..., Puppet]


@pytest.fixture
def launch() -> Iterator[Launch]:
    """Start plugins: launch(tree, kubelet, "--more", "flags"). They end with the test.

    With offers=N the kubelet, started if need be, has N n150 when this returns.
    """
    with contextlib.ExitStack() as stack:

        def start(
            tree: Tree | None,
            kubelet: Kubelet,
            *flags: str,
            offers: int = 0,
            **popen: Any,
        ) -> Plugin:
            if offers and not kubelet.process:
                kubelet.start()
            folders = ["--kubelet-dir", str(kubelet.root)]
            if tree:
                folders += tree.flags
            mark = kubelet.log.mark()
            plugin = Plugin([*COMMAND, *folders, *flags], **popen)
            stack.enter_context(contextlib.closing(plugin))
            if offers:
                kubelet.wait_status(R150, offers, offers, after=mark, timeout=20)
            return plugin

        yield start


@pytest.fixture
def plugin(kubelet: Kubelet, four: Tree, launch: Launch) -> Plugin:
    """A plugin whose four cards the kubelet offers. Most tests begin with it."""
    return launch(four, kubelet, offers=4)


@pytest.fixture
def puppets(kubelet: Kubelet) -> Iterator[Puppets]:
    """Make puppets in the kubelet's folder: puppets(resource, endpoint, **options)."""
    with contextlib.ExitStack() as stack:

        def make(resource: str, endpoint: str = "a.sock", **options: bool) -> Puppet:
            puppet = Puppet(kubelet, resource, endpoint, **options)
            return stack.enter_context(contextlib.closing(puppet))

        yield make


# ---- Promised times ----

# What follows on what is asserted by events; how soon, once for each promise.
Bound = Callable[[str, float, float], None]


@dataclass
class PromisedTimes:
    """The promised times of this run."""

    count: int = 0
    not_judged: list[str] = field(default_factory=list)


PROMISED_TIMES = pytest.StashKey[PromisedTimes]()


def pytest_configure(config: pytest.Config) -> None:
    """Called by pytest when this plugin is loaded."""
    config.stash[PROMISED_TIMES] = PromisedTimes()


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Called by pytest before the first test: what looks at all said is last."""
    items.sort(key=lambda item: "said" in getattr(item, "fixturenames", ()))


@pytest.fixture
def said() -> str:
    """What plugins have said in all other tests of this run, which run before."""
    return "\n".join(SAID)


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Called by pytest: the last lines say which promised times were not judged."""
    times = config.stash[PROMISED_TIMES]
    if times.not_judged:
        terminalreporter.section(
            f"{len(times.not_judged)} of {times.count} promised times not judged: "
            "the machine was busy"
        )
        for text in times.not_judged:
            terminalreporter.write_line(text)


def cpu_pressure() -> float:
    """Seconds so far in which processes waited for a CPU; 0 if Linux does not say."""
    with contextlib.suppress(OSError):
        text = Path("/proc/pressure/cpu").read_text()
        (microseconds,) = re.findall(r"^some .*total=(\d+)", text, re.MULTILINE)
        return int(microseconds) / 1e6
    return 0.0


@pytest.fixture
def bound(request: pytest.FixtureRequest) -> Bound:
    """Hold a promised time: bound("stream dropped to registered", seconds, 0.1).

    On a machine that was busy since the test or the last call began, one that is over
    by less than a factor of ten is not judged: the summary of the run counts it.
    """
    times = request.config.stash[PROMISED_TIMES]
    since = time.monotonic()
    waited = cpu_pressure()

    def check(what: str, seconds: float, promised: float) -> None:
        nonlocal since, waited
        busy = (cpu_pressure() - waited) / (time.monotonic() - since)
        since = time.monotonic()
        waited = cpu_pressure()

        times.count += 1
        text = f"{what}: {seconds * 1000:.1f} ms, promised {promised * 1000:.0f} ms"
        if promised < seconds < 10 * promised and busy > 0.1:
            times.not_judged.append(
                f"{request.node.name}: {text}; "
                f"processes waited for a CPU {busy:.0%} of the time"
            )
        else:
            assert 0 <= seconds <= promised, text

    return check
