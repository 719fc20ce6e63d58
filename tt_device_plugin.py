#!/usr/bin/env python3
"""A Kubernetes device plugin for Tenstorrent cards, in one file, to read from the top.

A device plugin tells the kubelet which cards a node has, and what a container needs to
use them. It takes five steps. The file shows the calls first (section 3), then the
registration (section 4), then how cards are found and judged (section 5).

1. **Discover.** Find the cards of this node and judge their health: here in sysfs, once
   a second by default (section 5).
2. **Register.** Serve the DevicePlugin service on a Unix socket beside the kubelet's
   own, and tell the kubelet the socket's name and the resource, such as
   `tenstorrent.com/n150` (section 4).
3. **ListAndWatch.** The kubelet opens one stream and keeps it. Each message is the
   whole list of cards, each with its health. New Pods get Healthy cards only (section
   3).
4. **Allocate.** When a Pod is admitted, the kubelet asks once for each container that
   wants cards: which device nodes, environment variables and mounts does it get? The
   kubelet stores the answer, and repeats it at each restart of the container (section
   3).
5. **PreStartContainer.** Before each start and restart of such a container, the kubelet
   asks whether it may start (section 3).

What this plugin adds to that:

- A resource counts as registered while the kubelet keeps a ListAndWatch stream of it
  open. When the stream ends, for whatever reason, the plugin registers again.
- A card's ID comes from its hardware: a p300's from the serial of its board, any
  other's from the ASIC id of its chip, or from the PCI address if the driver has no
  ASIC id.
- A card that was offered stays listed while the plugin runs: Unhealthy, with a reason,
  until it is back.
- A container does not start with a chip that another Pod holds, even if an upgrade, a
  flag or the driver has given the chip's card another ID or resource: the plugin looks
  it up in the kubelet's own record, as long as that can be read.
- A chip with a heartbeat becomes Healthy only once the heartbeat has changed.
- Unknown is not dead: a chip that has no heartbeat, or one that cannot be read, is
  Healthy.
- A read of a chip that hangs affects only its own card. No call waits for one. A poll
  waits only for the first reads of new chips, for 2 s at most.

What it does not do: it opens no device node, resets no card, and wipes no memory
between Pods. It knows of a card's health only what the driver shows in sysfs. It talks
to the kubelet only, unless flags ask for more: --listen answers HTTP requests;
--cdi-dir and --labels-dir keep files for other tools.

The one idea: a thread polls, that is, it makes an immutable snapshot of all cards,
again and again. The kubelet gets what the newest snapshot says. Judging does no I/O: it
follows from what was read, what is remembered, and the time.

The threads:

- The main thread runs the event loop, which serves the kubelet.
- One thread polls.
- One thread for each chip reads its files.
- Small ones write the log and files, wait for signals, and do reads that could block
  the event loop.

Words: a *chip* is one PCIe device, /dev/tenstorrent/N. A *card* is what a Pod gets: one
chip, or the two of a p300. A card is *offered* if the kubelet is told of it. The
kubelet counts cards by *resource*, such as `tenstorrent.com/n150`. The *device node* is
the file; *node* alone is the Kubernetes node. A *snapshot* holds the cards, each with a
*verdict*: its health, and the reason for it.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import concurrent.futures
import contextlib
import errno
import fcntl
import functools
import ipaddress
import json
import logging
import logging.handlers
import math
import os
import queue
import re
import signal
import socket
import stat
import sys
import threading
import time
import urllib.parse
from collections import Counter, deque
from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    Coroutine,
    Iterable,
    Mapping,
    Sequence,
)
from dataclasses import dataclass, field, fields, replace
from http import HTTPStatus
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, Protocol, TypeVar

# Must be set before grpc is imported. It keeps gRPC's own messages, such as that a peer
# went away, off stderr.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")

import google.protobuf.message
import grpc.aio
from grpc import StatusCode

import api_pb2 as api
import api_pb2_grpc as rpc

__version__ = "0.1.0"
log = logging.getLogger("tt-device-plugin")

# ==== 1. Settings =====================================================================


@dataclass(frozen=True, slots=True)
class Settings:
    """What the flags say. The fields are named after the flags."""

    kubelet_dir: Path = Path("/var/lib/kubelet")  # sockets are in its device-plugins
    sysfs_root: Path = Path("/sys")
    dev_root: Path = Path("/dev")  # where the plugin sees the host's /dev
    poll_seconds: float = 1.0
    resource_domain: str = "tenstorrent.com"  # what comes before the slash
    variants: bool = False  # p150a, p150b and p150c instead of p150
    hugepages: str = "auto"  # auto, always or never: see wants_hugepages
    cdi_dir: Path | None = None  # where to keep a CDI specification
    labels_dir: Path | None = None  # where to keep a file of node labels
    listen: tuple[str, int] | None = None  # address and port; "" for all addresses
    fake: Mapping[str, int] | None = None  # made-up cards: model -> how many

    @property
    def plugin_dir(self) -> Path:
        """The folder that the kubelet and its plugins share sockets in."""
        return self.kubelet_dir / "device-plugins"


class CannotWork(Exception):
    """The plugin cannot start or go on. The text says why, and what to do."""


class LogOnChange:
    """A lasting problem. It is logged when it changes, not each time it is found."""

    def __init__(self) -> None:
        self.problem = ""  # "" while there is none

    def set(self, problem: str, cleared: str = "") -> None:
        """Log `problem` once when it appears or changes.

        Log `cleared` once when the problem is over, that is, when `problem` is "".
        """
        before = self.problem
        self.problem = problem
        if problem and problem != before:
            log.warning("%s", problem)
        elif before and not problem and cleared:
            log.info("%s", cleared)


# ==== 2. Records: what was read, what follows from it, and what everybody sees ========

# The health of a chip or card. The first two are the words of the device plugin API.
HEALTHY = "Healthy"
UNHEALTHY = "Unhealthy"
# The kubelet is not told of such a card. If it was told of it earlier, the card is
# listed as Unhealthy instead. --list prints this word.
NOT_OFFERED = "pending"
DEVICES = (
    "/dev/tenstorrent"  # the folder of the device nodes, on hosts and in containers
)


def chips_per_card(card_type: str) -> int:
    """How many chips a card of this type has."""
    return 2 if card_type.startswith("p300") else 1


@dataclass(frozen=True, slots=True)
class ClassDevice:
    """Identity of a class device, which the driver makes when it finds a chip."""

    index: int
    inode: int
    pci: str


@dataclass(frozen=True, slots=True)
class Chip:
    """Facts about one chip. A text is "" where the fact is not known.

    They are read until the chip is identified, and again if an ASIC id comes late.
    `firmware` is read again after a reset.
    """

    pci: str  # PCI address, 0000:01:00.0
    index: int = -1  # N of /dev/tenstorrent/N, which can change in a reset; -1: none
    inode: int = 0  # of the class device's folder in sysfs; a new probe changes it
    pci_path: tuple[str, ...] = ()  # root bus and bridges above it, outermost first
    dev: str = ""  # "major:minor" of the device node
    arch: str = ""  # wormhole, blackhole
    card_type: str = ""  # n150, p300a; "unknown" if the driver does not know it
    asic_id: str = ""  # 16 hex digits, unique on a host; "" if the driver has none
    serial: str = ""  # 16 hex digits, the board's: not unique, a Galaxy has one for all
    firmware: str = ""  # version of the firmware bundle, 19.5.0.0
    numa_node: int | None = None
    iommu: str = ""  # type of its IOMMU group: DMA, DMA-FQ, identity; "" without one
    unidentified: str = "pending"  # why: a key of KINDS; "" once it is identified

    @property
    def class_device(self) -> ClassDevice:
        """Identity of its class device; a new probe changes it."""
        return ClassDevice(self.index, self.inode, self.pci)

    @property
    def device_node(self) -> str:
        """Its device node, on the host and in a container."""
        return f"{DEVICES}/{self.index}"

    @property
    def id(self) -> str:
        """Its name in /dev/tenstorrent/by-id, or else its PCI address."""
        return f"{self.arch}-{self.asic_id}" if self.asic_id else self.pci

    @property
    def card_id(self) -> str:
        """The ID of the card that it is part of, from the hardware alone.

        The kubelet remembers IDs across restarts of the plugin. If a chip's ID changed,
        the kubelet could give it to two Pods. An unidentified chip is listed by its PCI
        address, and not offered.
        """
        if self.unidentified:
            return self.pci
        if chips_per_card(self.card_type) == 2:
            return f"p300-{self.serial}"
        return self.id


class Verdict(NamedTuple):
    """The health of a chip or a card."""

    health: str  # HEALTHY, UNHEALTHY or NOT_OFFERED
    kind: str  # a key of KINDS
    reason: str  # for the admin; "" for the kind `ok`


@dataclass(frozen=True, slots=True)
class Card:
    """What a Pod gets."""

    id: str  # at most 63 characters
    model: str  # n150; "" if not known
    resource: str | None  # tenstorrent.com/n150; None if it is not offered
    chips: tuple[Chip, ...]  # ordered by PCI address; as they were last seen
    verdict: Verdict
    since: float = 0.0  # time.monotonic() since when it has had this health

    @property
    def numa_nodes(self) -> list[int]:
        """The NUMA nodes of its chips; [] if none is known."""
        known = {chip.numa_node for chip in self.chips if chip.numa_node is not None}
        return sorted(known)

    @property
    def device_nodes(self) -> list[str]:
        """Where its chips' device nodes are now, or were last."""
        return [chip.device_node for chip in self.chips if chip.index >= 0]

    def __str__(self) -> str:
        about = [self.model or "model unknown", *self.device_nodes]
        return f"card {self.id} ({', '.join(about)})"


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The node's cards at one moment."""

    # Sorted by resource, then PCI address; cards that are not offered come last.
    cards: tuple[Card, ...] = ()
    driver: str = ""  # version of tt-kmd, "" if it is not loaded
    polled: bool = False  # False: nothing has been looked at yet

    def of(self, resource: str) -> dict[str, Card]:
        """The cards of one resource, by ID."""
        return {card.id: card for card in self.cards if card.resource == resource}

    @property
    def resources(self) -> list[str]:
        """The resources to register."""
        return sorted({card.resource for card in self.cards if card.resource})


# ==== 3. The DevicePlugin service: the calls that the kubelet makes ===================
# The kubelet sets no time limit on most calls, and a slow answer stalls the admission
# of every Pod on the node. So calls look only at links, folders and device nodes, which
# never block. The one file that they need, the kubelet's record, is read in a thread.

HUGEPAGES = "/dev/hugepages-1G"  # where tt-umd wants 1 GiB pages (its hugepage.cpp)
# Announced twice: kubelets up to 1.24 take them from Register, later ones call
# GetDevicePluginOptions.
OPTIONS = api.DevicePluginOptions(
    pre_start_required=True, get_preferred_allocation_available=True
)


class Refusal(Exception):
    """A call that is refused, with a gRPC status and a sentence for the Pod's event."""

    def __init__(self, code: StatusCode, sentence: str) -> None:
        super().__init__(sentence)
        self.code = code
        self.sentence = sentence


# How preferred allocation chooses: cards by ID, available IDs, IDs that it must have,
# how many -> the IDs that suit best. Raises Refusal.
Choose = Callable[[Mapping[str, Card], Sequence[str], Sequence[str], int], list[str]]
Labels = tuple[tuple[str, str], ...]  # names and values


@dataclass
class Shared:
    """What all registrations share. Only the event loop writes to it."""

    inventory: Inventory
    choose: Choose
    counts: Counter[tuple[str, Labels]] = field(default_factory=Counter)  # by metric
    record_trouble: LogOnChange = field(default_factory=LogOnChange)

    def count(self, metric: str, by: int = 1, **labels: str) -> None:
        """Add to a counter of /metrics."""
        self.counts[metric, tuple(labels.items())] += by


def device_list(snapshot: Snapshot, resource: str) -> api.ListAndWatchResponse:
    """The message that a ListAndWatch stream of `resource` should have sent last.

    It has NUMA nodes only if they are known of each card: with a mix, the kubelet
    cannot place a request for two (topology_hints.go). A NUMA node of -1 would make the
    policy `single-numa-node` reject the Pod.
    """
    cards = snapshot.of(resource).values()
    all_known = all(card.numa_nodes for card in cards)
    answer = api.ListAndWatchResponse()
    for card in cards:
        device = answer.devices.add(ID=card.id, health=card.verdict.health)
        if all_known:
            device.topology.nodes.extend(api.NUMANode(ID=n) for n in card.numa_nodes)
    return answer


def resolve_cards(snapshot: Snapshot, resource: str, ids: Sequence[str]) -> list[Card]:
    """The cards with these IDs, ordered by PCI address.

    Raises Refusal if there is no ID, or one that is unknown or named twice.
    """
    if not ids:
        sentence = f"no card IDs of {resource} in the request"
        raise Refusal(StatusCode.INVALID_ARGUMENT, sentence)

    cards = snapshot.of(resource)
    for card_id, count in Counter(ids).items():
        name = f"{card_id[:80]!r} of {resource}"
        if card_id not in cards:
            raise Refusal(
                StatusCode.NOT_FOUND,
                f"there is no card {name} on this node now. If it stays away, or if "
                "another plugin gave it to this Pod, delete the Pod",
            )
        if count > 1:
            sentence = f"the card ID {name} is named twice in one request"
            raise Refusal(StatusCode.INVALID_ARGUMENT, sentence)
    chosen = [cards[card_id] for card_id in ids]
    return sorted(chosen, key=lambda card: card.chips[0].pci)


def utc(moment: float) -> str:
    """A moment of time.monotonic() as an RFC 3339 text of whole seconds."""
    seconds = time.time() - time.monotonic() + moment
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))


def find_problem(discovery: Discovery, card: Card) -> str:
    """Why no container may have the card now, or ""."""
    if card.verdict.health != HEALTHY:
        return f"not healthy since {utc(card.since)}: {card.verdict.reason}"
    for chip in card.chips:
        # The snapshot may be a poll old, and a newly probed chip immediately takes the
        # lowest free N.
        there = discovery.chip_at(chip.index)
        if not there or there.class_device != chip.class_device:
            return (
                f"{chip.device_node} is no longer chip {chip.pci}, which was reset or "
                "removed a moment ago"
            )
        if not is_device_node(f"{discovery.dev_folder}/{chip.index}", chip.dev):
            return make_verdict("no-node", chip=chip).reason
    return ""


def check_cards(inventory: Inventory, cards: Iterable[Card]) -> None:
    """Raise Refusal if a container may not have one of these cards now."""
    for card in cards:
        problem = find_problem(inventory.discovery, card)
        if problem:
            raise Refusal(StatusCode.FAILED_PRECONDITION, f"{card}: {problem}")


def host_path(inventory: Inventory, chip: Chip) -> str:
    """The path on the host that a container gets a chip's device node from.

    A link in /dev/tenstorrent/by-id is preferred, if it leads to the same device. The
    kubelet repeats the answer at each restart of the container, and the runtime
    resolves the link anew: so the container gets the right chip after a reset that has
    changed N (tt-kmd#170).
    """
    if inventory.settings.fake:
        return os.devnull
    link = f"by-id/{chip.id}"
    if is_device_node(f"{inventory.discovery.dev_folder}/{link}", chip.dev):
        return f"{DEVICES}/{link}"
    return chip.device_node


def wants_hugepages(settings: Settings, chips: Iterable[Chip]) -> bool:
    """Whether to mount the host's 1 GiB pages.

    A chip behind a DMA IOMMU domain needs none (tt-umd pci_device.cpp). Where the mount
    unit failed, /dev/hugepages-1G is a plain folder, of no use to a container.
    """
    if settings.hugepages != "auto":
        return settings.hugepages == "always"
    if all(chip.iommu.startswith("DMA") for chip in chips):
        return False
    return os.path.ismount(f"{settings.dev_root}/hugepages-1G")


def container_response(
    settings: Settings, resource: str, chips: Sequence[Chip], paths: Sequence[str]
) -> api.ContainerAllocateResponse:
    """What a container gets for its `chips`, with device nodes at host `paths`."""
    answer = api.ContainerAllocateResponse()
    # N is the same inside: the driver library names its locks and huge page files after
    # it. TT_VISIBLE_DEVICES is not set: its meaning changed in tt-umd 0.9.3, and the
    # device nodes alone decide what is visible.
    for chip, path in zip(chips, paths, strict=True):
        answer.devices.add(
            container_path=chip.device_node, host_path=path, permissions="rw"
        )
    # The kubelet merges the environments of several resources by name, so this name has
    # the resource in it.
    variable = "PCIDEVICE_" + re.sub("[^A-Z0-9]", "_", resource.upper())
    answer.envs[variable] = ",".join(chip.pci for chip in chips)
    if wants_hugepages(settings, chips):
        answer.mounts.add(container_path=HUGEPAGES, host_path=HUGEPAGES)
    return answer


# ---- The five calls ----

Request = TypeVar("Request")
Answer = TypeVar("Answer")


def refusing(
    call: Callable[[DevicePlugin, Request], Awaitable[Answer]],
) -> Callable[[DevicePlugin, Request, Any], Awaitable[Answer]]:
    """Make `call` a method for gRPC. A Refusal becomes a status, logged and counted."""

    @functools.wraps(call)
    async def method(
        self: DevicePlugin,
        request: Request,
        context: grpc.aio.ServicerContext[Request, Answer],
    ) -> Answer:
        try:
            return await call(self, request)
        except Refusal as refusal:
            name = call.__name__
            resource = self.resource
            self.shared.count(
                "tt_device_plugin_refusals_total",
                resource=resource,
                call=name,
                code=refusal.code.name,
            )
            about = {"resource": resource}
            log.warning("%s of %s refused: %s", name, resource, refusal, extra=about)
            await context.abort(refusal.code, refusal.sentence)

    return method


class DevicePlugin(rpc.DevicePluginServicer):
    """The service of one resource, for one registration.

    `stream_task` serves the first ListAndWatch call, which must be the kubelet's: it
    makes one per Register, and only it knows this socket's name.
    """

    def __init__(self, shared: Shared, resource: str) -> None:
        self.shared = shared
        self.inventory = shared.inventory
        self.resource = resource
        self.stream_task: asyncio.Task[Any] | None = None
        self.opened_at = 0.0  # time.monotonic() when that stream was opened
        self.closing = False  # set to end all streams

    async def GetDevicePluginOptions(
        self, request: Any, context: Any
    ) -> api.DevicePluginOptions:
        """The same options as in Register."""
        return OPTIONS

    # A coroutine that writes, not a generator: it ends as soon as the kubelet drops the
    # stream, because gRPC then cancels it.
    async def ListAndWatch(  # type: ignore[override]
        self, request: Any, context: Any
    ) -> None:
        """Send the list at once, and again when it has changed."""
        if self.stream_task is None:
            self.stream_task = asyncio.current_task()
            self.opened_at = time.monotonic()
        sent = None
        while not self.closing:
            # The event before the snapshot: so a change in between is not missed.
            changed = self.inventory.changed
            devices = device_list(self.inventory.snapshot, self.resource)
            if devices == sent:
                await changed.wait()
            else:
                await context.write(devices)
                sent = devices

    @refusing
    async def GetPreferredAllocation(
        self, request: api.PreferredAllocationRequest
    ) -> api.PreferredAllocationResponse:
        """The cards that suit a container best, where the kubelet has a choice."""
        cards = self.inventory.snapshot.of(self.resource)
        answer = api.PreferredAllocationResponse()
        for container in request.container_requests:
            chosen = self.shared.choose(
                cards,
                container.available_deviceIDs,
                container.must_include_deviceIDs,
                container.allocation_size,
            )
            answer.container_responses.add(deviceIDs=chosen)
        return answer

    @refusing
    async def Allocate(self, request: api.AllocateRequest) -> api.AllocateResponse:
        """What each container gets. One card that is refused refuses the request."""
        snapshot = self.inventory.snapshot
        containers = [list(one.devices_ids) for one in request.container_requests]
        # All together, since one card may not go to two containers.
        all_ids = list(chain(*containers))
        allocated = resolve_cards(snapshot, self.resource, all_ids)
        check_cards(self.inventory, allocated)

        answer = api.AllocateResponse()
        for ids in containers:
            cards = resolve_cards(snapshot, self.resource, ids)
            chips = [chip for card in cards for chip in card.chips]
            paths = [host_path(self.inventory, chip) for chip in chips]
            settings = self.inventory.settings
            response = container_response(settings, self.resource, chips, paths)
            answer.container_responses.append(response)

        metric = "tt_device_plugin_allocations_total"
        self.shared.count(metric, len(containers), resource=self.resource)
        names = ", ".join(map(str, allocated))
        log.info("allocated %s", names, extra={"resource": self.resource})
        return answer

    @refusing
    async def PreStartContainer(
        self, request: api.PreStartContainerRequest
    ) -> api.PreStartContainerResponse:
        """Refuse what must not start: see find_problem and find_conflict."""
        ids = request.devices_ids
        # IDs that make no sense are refused before anything is read.
        resolve_cards(self.inventory.snapshot, self.resource, ids)
        record = await read_record_if_possible(self.shared)

        snapshot = self.inventory.snapshot
        cards = resolve_cards(snapshot, self.resource, ids)
        check_cards(self.inventory, cards)
        if not self.inventory.settings.fake:  # made-up cards are all the same device
            discovery = self.inventory.discovery
            conflict = find_conflict(discovery, snapshot, self.resource, cards, record)
            if conflict:
                raise Refusal(StatusCode.FAILED_PRECONDITION, conflict)
        return api.PreStartContainerResponse()


# ==== 4. Registration: serve, register, expect the stream, wait for its end, again ====
# Whatever goes wrong, the stream ends, so the plugin watches only the stream. Two
# failures show nowhere else. A kubelet drops a stream and keeps running. And when an
# old stream of a resource ends, a kubelet up to 1.36 disconnects the new one of that
# resource as well (kubernetes devicemanager/plugin/v1beta1/handler.go).

# How often to look for the kubelet and to try the lock. The goal is to be registered
# 0.1 s after a kubelet answers, and Register takes a few milliseconds.
LOOK_S = 0.05
# Limit of Register: from 1.25 on, the kubelet dials back inside it, for 10 s at most.
REGISTER_S = 12.0
# How soon after Register the kubelet must open its stream: up to 1.24, it dials back
# only then, for 10 s at most.
STREAM_S = 12.0
# A stream that was open for less than this was cut short.
LASTING_S = 1.0
# The pause before the same kubelet is tried again, after a registration whose stream
# was cut short or never open. It doubles each time.
SHORTEST_PAUSE_S = 0.01
LONGEST_PAUSE_S = 5.0
MANY_CUT_SHORT = 3  # this many streams in a row: perhaps another plugin ends them
STOP_S = 0.2  # how long a server that stops waits for calls under way
REQUEST_BYTES = 256 * 1024  # largest request: ten times the IDs of the largest node


def socket_name(model: str, token: str) -> str:
    """The file name of a socket. `token` is 6 hex digits."""
    return f"tenstorrent-{model}-{token}.sock"


HEX = "[0-9a-f]"
ANY_SOCKET = f"tenstorrent-?*-{HEX}{HEX}{HEX}{HEX}{HEX}{HEX}.sock"  # as a glob pattern


def accepts_connections(path: Path) -> bool:
    """Whether a process accepts connections there.

    A socket file proves nothing: it exists before listen() and after a crash. Raises
    OSError for a problem on this side.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(os.fspath(path))
        except (FileNotFoundError, NotADirectoryError, ConnectionError):
            return False
        except BlockingIOError:  # its queue is full, so it accepts nothing now
            return False
        return True


def grpc_target(path: Path) -> str:
    """A Unix socket as gRPC names it: a URI, so a % in the path must be escaped."""
    return "unix:" + urllib.parse.quote(os.fspath(path))


def file_id(path: Path) -> str:
    """What tells a file from the next one of that name: device, inode, mtime.

    It is "" if there is no such file. Raises OSError.
    """
    try:
        status = os.stat(path)
    except FileNotFoundError:
        return ""
    return f"{status.st_dev} {status.st_ino} {status.st_mtime_ns}"


async def cancel_and_wait(tasks: Iterable[asyncio.Task[Any]]) -> None:
    """Cancel tasks, and wait until they have cleaned up."""
    pending = set(tasks)
    while pending:
        for task in pending:
            task.cancel()
        # Again, if need be: asyncio.wait_for, which gRPC uses, loses a cancellation
        # that comes as it ends (before Python 3.12).
        _, pending = await asyncio.wait(pending, timeout=2 * STOP_S)


@contextlib.asynccontextmanager
async def running(server: grpc.aio.Server) -> AsyncIterator[None]:
    """Start a gRPC server, and stop it at the end."""
    # Shielded: a start() that is cancelled half-way makes stop() raise
    # InvalidStateError.
    starting = asyncio.create_task(server.start())
    try:
        await asyncio.shield(starting)
        yield
    finally:
        await asyncio.shield(starting)
        await server.stop(STOP_S)


@contextlib.asynccontextmanager
async def serving(plugin: DevicePlugin, folder: Path) -> AsyncIterator[str]:
    """Serve `plugin` on a new socket in `folder`, and give its name. Raises OSError.

    Each registration has a name of its own, so that an older instance that is slow to
    end cannot remove this socket.
    """
    model = plugin.resource.partition("/")[2]
    path = folder / socket_name(model, os.urandom(3).hex())
    server = grpc.aio.server(
        options=[("grpc.max_receive_message_length", REQUEST_BYTES)]
    )
    rpc.add_DevicePluginServicer_to_server(plugin, server)
    try:
        server.add_insecure_port(grpc_target(path))
    except RuntimeError as error:  # grpcio does not say why
        reason = f"cannot make a socket in {folder} (no space, no inodes?)"
        raise OSError(errno.EIO, reason) from error

    try:
        async with running(server):
            try:
                yield path.name
            finally:  # its streams end; calls under way have STOP_S
                plugin.closing = True
                plugin.inventory.notify()
    finally:
        # gRPC may have removed it, or a kubelet at its start.
        with contextlib.suppress(OSError):
            path.unlink()


class Outcome(NamedTuple):
    """How one registration ended."""

    cause: str  # a word for the metric; the next registration reports it
    problem: str = ""  # a sentence, if it failed before the stream was open
    open_s: float = 0.0  # how long the stream was open


class Registrar:
    """Keeps every resource of the newest snapshot registered."""

    def __init__(self, shared: Shared) -> None:
        self.shared = shared
        self.inventory = shared.inventory
        self.folder = shared.inventory.settings.plugin_dir
        self.kubelet_socket = self.folder / "kubelet.sock"
        self.lock = InstanceLock(self.folder)
        self._streams: dict[str, asyncio.Task[Any]] = {}  # resource -> its newest one
        self._waiting = LogOnChange()  # for the folder, the lock or a kubelet
        self._trouble: dict[str, LogOnChange] = {}  # resource -> why it fails

    async def run(self) -> None:
        """Run the loop of each resource until this is cancelled. Raises CannotWork."""
        tasks: dict[str, asyncio.Task[Any]] = {}
        try:
            while True:
                changed = self.inventory.changed
                for resource in self.inventory.snapshot.resources:  # none ever goes
                    if resource not in tasks:
                        loop = self.run_resource(resource)
                        tasks[resource] = asyncio.create_task(loop)

                if not tasks:  # also without cards, only one instance is active
                    self.lock.try_acquire()

                waiter = asyncio.create_task(changed.wait())
                try:
                    await asyncio.wait(
                        [waiter, *tasks.values()],
                        timeout=None if tasks else 1,
                        return_when=asyncio.FIRST_COMPLETED,
                    )
                finally:
                    waiter.cancel()
                for task in tasks.values():
                    if task.done():
                        task.result()  # raises what has ended it
        finally:
            await cancel_and_wait(tasks.values())

    async def run_resource(self, resource: str) -> None:
        """Register a resource again and again, for ever. Raises CannotWork."""
        trouble = self._trouble[resource] = LogOnChange()
        kubelet_id = ""  # file_id of the socket of the kubelet that was tried last
        cause = "start"
        pause = 0.0
        cut_short = 0  # streams in a row
        while True:
            found_id = await self.wait_for_kubelet(kubelet_id, pause)
            if found_id != kubelet_id:  # another kubelet
                kubelet_id = found_id
                pause = 0.0
                cut_short = 0

            outcome = await self._register_safely(resource, kubelet_id, cause)
            cause = outcome.cause
            if outcome.open_s >= LASTING_S:
                pause = 0.0
                cut_short = 0
            else:
                pause = min(max(2 * pause, SHORTEST_PAUSE_S), LONGEST_PAUSE_S)
                cut_short = cut_short + 1 if outcome.open_s > 0 else 0

            if outcome.problem:
                trouble.set(f"{resource}: {outcome.problem}; trying again")
            elif cut_short >= MANY_CUT_SHORT:
                trouble.set(
                    f"{resource}: its stream ends again and again within a second: "
                    "does another plugin register the same resource? See the other "
                    f"sockets in {self.folder}; trying again, less often"
                )
            else:
                trouble.set("")

    async def _register_safely(
        self, resource: str, kubelet_id: str, cause: str
    ) -> Outcome:
        """Call register_once, and turn exceptions into an outcome."""
        try:
            return await self.register_once(resource, kubelet_id, cause)
        except OSError as error:
            return Outcome("no-socket", str(error.strerror or error))
        except Exception as error:  # a defect must cost one try, not the resource
            log.exception("registering %s failed", resource)
            return Outcome("defect", repr(error))

    async def register_once(
        self, resource: str, kubelet_id: str, cause: str
    ) -> Outcome:
        """One registration, from its socket to the end of its stream.

        `kubelet_id` is the file_id of the kubelet's socket, `cause` what ended the last
        registration. Raises OSError.
        """
        plugin = DevicePlugin(self.shared, resource)
        async with serving(plugin, self.folder) as endpoint:
            try:
                await self._call_register(resource, endpoint)
            except grpc.aio.AioRpcError as error:
                if not accepts_connections(self.kubelet_socket):
                    # The kubelet has ended: as if this had not been tried.
                    return Outcome(cause)
                details = f"{error.code().name}: {error.details()}"
                # A name that is new each time would make this a new problem each time.
                answer = details.replace(endpoint, "its socket")
                problem = f"the kubelet has not registered it: {answer}"
                return Outcome("register-failed", problem)

            problem = await self._wait_for_stream(plugin, kubelet_id)
            if plugin.stream_task is None:
                return Outcome("no-stream", problem)
            self._streams[resource] = plugin.stream_task
            self._report_registration(resource, endpoint, cause)
            await asyncio.wait([plugin.stream_task])
            open_s = time.monotonic() - plugin.opened_at
            about = {"resource": resource}
            text = "the kubelet's stream of %s has ended: registering again"
            log.warning(text, resource, extra=about)
        return Outcome("stream-ended", open_s=open_s)

    async def _call_register(self, resource: str, endpoint: str) -> None:
        request = api.RegisterRequest(
            version="v1beta1",
            endpoint=endpoint,
            resource_name=resource,
            options=OPTIONS,
        )
        # gRPC's shared pool of connections backs off for 1 s after a failed dial: use
        # another one.
        options = [("grpc.use_local_subchannel_pool", 1)]
        target = grpc_target(self.kubelet_socket)
        async with grpc.aio.insecure_channel(target, options) as channel:
            await rpc.RegistrationStub(channel).Register(request, timeout=REGISTER_S)

    async def _wait_for_stream(self, plugin: DevicePlugin, kubelet_id: str) -> str:
        """Wait until the stream is open. Returns "", or why it is not."""
        until = time.monotonic() + STREAM_S
        while plugin.stream_task is None:
            # If the kubelet has ended since Register, no stream ever comes.
            if file_id(self.kubelet_socket) != kubelet_id:
                return "the kubelet has accepted it, but has ended since"
            if time.monotonic() > until:
                late = f"opened no stream within {STREAM_S:.0f} s"
                return f"the kubelet has accepted it, but {late}"
            await asyncio.sleep(0.02)
        return ""

    def _report_registration(self, resource: str, endpoint: str, cause: str) -> None:
        self.shared.count(
            "tt_device_plugin_registrations_total", resource=resource, cause=cause
        )
        cards = self.inventory.snapshot.of(resource).values()
        healthy = sum(card.verdict.health == HEALTHY for card in cards)
        log.info(
            "registered %s with the kubelet: %d cards, %d healthy; socket %s; "
            "cause: %s",
            resource,
            len(cards),
            healthy,
            endpoint,
            cause,
            extra={"resource": resource, "reason": cause},
        )

    async def wait_for_kubelet(self, tried_id: str, pause: float) -> str:
        """Wait until this instance holds the lock, and a kubelet listens.

        Returns the file_id of the kubelet's socket. A socket that is `tried_id` is left
        alone for `pause` seconds; another one is not. Raises CannotWork.
        """
        pause_ends = time.monotonic() + pause
        await asyncio.sleep(min(pause, LOOK_S))
        while True:
            is_pausing = time.monotonic() < pause_ends
            try:
                found_id = self._find_kubelet(tried_id, is_pausing)
                if found_id:
                    return found_id
            except OSError as error:
                text = f"cannot reach the kubelet at {self.kubelet_socket}"
                self._waiting.set(f"{text}: {error.strerror}")
            await asyncio.sleep(LOOK_S)

    def _find_kubelet(self, tried_id: str, is_pausing: bool) -> str:
        """The file_id of a kubelet's socket that accepts connections, or "".

        What this instance waits for is logged, once. Raises CannotWork, OSError.
        """
        problem = self.lock.try_acquire()
        if problem:
            self._waiting.set(problem)
            return ""

        found_id = file_id(self.kubelet_socket)
        if found_id and found_id == tried_id and is_pausing:
            return ""
        if found_id and accepts_connections(self.kubelet_socket):
            text = f"a kubelet answers at {self.kubelet_socket}"
            self._waiting.set("", cleared=text)
            return found_id
        text = f"no kubelet listens at {self.kubelet_socket}: waiting for it to start"
        self._waiting.set(text)
        return ""

    def registration_status(self) -> dict[str, str]:
        """Resource -> "" if it is registered, else why not. Callable in any thread."""
        status = {}
        for resource in self.inventory.snapshot.resources:
            stream = self._streams.get(resource)
            trouble = self._trouble.get(resource)
            if stream and not stream.done():
                status[resource] = ""
            elif self._waiting.problem:
                status[resource] = self._waiting.problem
            elif trouble and trouble.problem:
                status[resource] = trouble.problem
            else:
                status[resource] = "waiting for the kubelet's answer"
        return status


# ==== 5. Cards: chips -> cards -> the next snapshot; the threads that read and poll ===


class Reading(NamedTuple):
    """How a chip was at one read."""

    heartbeat: int | None = None  # None if it has none, or none could be read
    fault: str = ""  # a kind, "" if nothing is wrong
    detail: str = ""  # for the kind `unreadable`: the error's name, such as EIO
    changed: bool = False  # the heartbeat was seen to change during this read


class JudgedChip(NamedTuple):
    """A chip with its verdict."""

    chip: Chip
    verdict: Verdict


class Discovery(Protocol):
    """What the plugin asks of the part that knows a vendor's driver.

    For another vendor's cards, write this class, and see README for the rest. A *class
    device* is what a driver makes for each chip: a folder in sysfs, and a device node
    in `dev_folder`. All methods but `read` must return at once. OSError means that
    nothing can be found out now, such as for lack of file descriptors.
    """

    dev_folder: str  # with the device nodes N, and links by-id/ID if there are any

    def driver_version(self) -> str:
        """The version of the loaded driver, or ""."""

    def chips(self) -> list[Chip]:
        """The chips that have a class device, each as `chip_at` gives it."""

    def chip_at(self, index: int) -> Chip | None:
        """The chip whose class device has N = `index` now, unidentified; or None."""

    def unclaimed(self, known: set[str]) -> list[JudgedChip]:
        """The chips without a class device; `known` are PCI addresses of the others."""

    def read(self, chip: Chip) -> tuple[Chip, Reading]:
        """Identify a chip, as far as that is possible now, and read its health.

        It may hang: each chip is read by a thread of its own.
        """


def model_of(chip: Chip, settings: Settings) -> str:
    """The model, such as n150; if the driver does not know it, the architecture."""
    model = chip.arch if chip.card_type == "unknown" else chip.card_type
    if settings.variants:
        return model
    return re.sub(r"^(p\d+)[abc]$", r"\1", model)


def group_by_card(judged: Iterable[JudgedChip]) -> dict[str, list[JudgedChip]]:
    """Card ID -> its chips, ordered by PCI address."""
    at_address: dict[str, list[JudgedChip]] = {}
    for member in judged:
        at_address.setdefault(member.chip.pci, []).append(member)

    def how_new(member: JudgedChip) -> tuple[bool, int, int]:
        # A newer class device has a higher inode number: sysfs counts them up.
        chip = member.chip
        return member.verdict.kind != "gone", chip.inode, chip.index

    groups: dict[str, list[JudgedChip]] = {}
    for pci in sorted(at_address):
        # At the end of a reset, a chip can be there twice (tt-kmd#112).
        newest = max(at_address[pci], key=how_new)
        groups.setdefault(newest.chip.card_id, []).append(newest)
    return groups


def describe_absent(
    absent: Sequence[Chip], unidentified_at: Mapping[str, JudgedChip]
) -> str:
    """What has become of the other chip, if only one of a card's two is there.

    `absent` are the chips that the card had and has no more. `unidentified_at` has the
    chips that are there, but not identified, by PCI address.
    """
    remedy = "reset the card with tt-smi -r, and look for both in lspci -d 1e52:"
    if not absent and unidentified_at:
        others = ", ".join(unidentified_at)
        return f"the other one may be here, not identified: {others}"
    if not absent:
        return f"the other one is missing: {remedy}"
    pci = absent[0].pci
    if pci not in unidentified_at:
        return f"the other one, {pci}, is missing: {remedy}"
    why = unidentified_at[pci].verdict.reason
    return f"the other one, {pci}, is there, but not identified: {why}"


def judge_card(
    members: Sequence[JudgedChip],
    absent: Sequence[Chip],
    unidentified_at: Mapping[str, JudgedChip],
) -> Verdict:
    """A card's verdict, from those of its chips. See describe_absent.

    Half a p300 is never offered: its chip would have one ID alone, and another one as
    part of the pair.
    """
    first = members[0].chip
    wanted = 1 if first.unidentified else chips_per_card(first.card_type)
    here = ", ".join(member.chip.pci for member in members)
    if len(members) < wanted:
        other = describe_absent(absent, unidentified_at)
        return make_verdict("half", here=here, other=other)
    if len(members) > wanted:
        return make_verdict("same-id", here=here)

    # A chip that is Unhealthy counts first, then one with something to note.
    def severity(member: JudgedChip) -> tuple[bool, bool]:
        return member.verdict.health == UNHEALTHY, member.verdict.reason != ""

    worst = max(members, key=severity)
    if wanted == 1 or not worst.verdict.reason:
        return worst.verdict
    reason = f"chip {worst.chip.pci}: {worst.verdict.reason}"
    return worst.verdict._replace(reason=reason)


def make_card(
    members: Sequence[JudgedChip],
    before: Card | None,
    unidentified_at: Mapping[str, JudgedChip],
    settings: Settings,
) -> Card:
    """The card that `members` make up.

    `before` is the card with this ID as it was offered last, None if it never was. Once
    offered, a card stays listed, and keeps its resource even if its model turns out to
    be another one: the kubelet records by resource and ID who holds a card.
    """
    first = members[0].chip
    chips = [member.chip for member in members]
    if before is None:
        verdict = judge_card(members, [], unidentified_at)
        model = model_of(first, settings)
        is_offered = not first.unidentified and verdict.health != NOT_OFFERED
        resource = f"{settings.resource_domain}/{model}" if is_offered else None
        return Card(first.card_id, model, resource, tuple(chips), verdict)

    here = {chip.id for chip in chips}
    absent = [chip for chip in before.chips if chip.id not in here]
    verdict = judge_card(members, absent, unidentified_at)
    if verdict.health == NOT_OFFERED:
        verdict = verdict._replace(health=UNHEALTHY)
    if verdict.kind == "half":  # go on to show the chip that is missing
        chips = sorted([*chips, *absent], key=lambda chip: chip.pci)
    model = before.model if first.unidentified else model_of(first, settings)
    return Card(before.id, model, before.resource, tuple(chips), verdict)


def judge_gone(card: Card, member_at: Mapping[str, JudgedChip]) -> Verdict:
    """The verdict of an offered card none of whose chips is there under its ID.

    `member_at` has the chips that are there, by PCI address.
    """
    for chip in card.chips:
        there = member_at.get(chip.pci)
        if there is None or there.chip.index < 0:  # it has no class device
            continue
        if there.chip.unidentified:
            why = there.verdict.reason
            return make_verdict("returning", pci=chip.pci, why=why)
        return make_verdict("replaced", pci=chip.pci, card_id=there.chip.card_id)
    return make_verdict("gone")


def with_since(card: Card, last: Card | None, now: float) -> Card:
    """`card`, and since when it has had this health; `last` is how it was before."""
    if last and last.verdict.health == card.verdict.health:
        return replace(card, since=last.since)
    return replace(card, since=now)


def next_snapshot(
    old: Snapshot, judged: Sequence[JudgedChip], settings: Settings, now: float
) -> Snapshot:
    """The snapshot that follows from the last one and one poll.

    `judged` is in any order; `now` is of time.monotonic(). Once offered, a card is kept
    until the plugin restarts, even if it is gone or replaced: a Pod may still hold it,
    and its container should get a reason when it restarts.
    """
    groups = group_by_card(judged)
    offered = {card.id: card for card in old.cards if card.resource}
    member_at = {member.chip.pci: member for member in chain(*groups.values())}
    unidentified_at = {
        pci: member for pci, member in member_at.items() if member.chip.unidentified
    }

    cards = []
    for card_id, members in groups.items():
        before = offered.get(card_id)
        cards.append(make_card(members, before, unidentified_at, settings))
    for card_id, card in offered.items():
        if card_id not in groups:
            cards.append(replace(card, verdict=judge_gone(card, member_at)))

    def place(card: Card) -> tuple[bool, str, str]:
        return card.resource is None, card.resource or "", card.chips[0].pci

    last = {card.id: card for card in old.cards}
    cards = [with_since(card, last.get(card.id), now) for card in cards]
    return replace(old, cards=tuple(sorted(cards, key=place)), polled=True)


# If no read has returned for this long, the driver hangs. See ChipReader for how it is
# counted.
READ_HANGS_S = 5.0
# How long a poll waits for the first reads of new chips, for all of them together.
FIRST_READS_S = 2.0


class ChipReader:
    """Reads one class device in a thread of its own, once per poll interval.

    A read that hangs holds up no other chip: the polling thread takes the readings that
    are there, and waits only for the first one.
    """

    def __init__(
        self, discovery: Discovery, chip: Chip, interval: float, now: float
    ) -> None:
        self.history = HealthHistory(now)
        self.has_read = threading.Event()  # the first read has returned
        self.polls_since_read = 0
        # In polls, not seconds: while this process is stopped, time.monotonic() goes
        # on, and nothing runs. At least two, as polls and reads are not in step.
        self._hanging_polls = max(2, math.ceil(READ_HANGS_S / interval))
        self._chip = chip
        self._reading = Reading()
        # Read, and not judged yet. Bounded, in case polls keep failing.
        self._unjudged: deque[tuple[Chip, Reading]] = deque(maxlen=100)
        self._ended = False
        # A daemon: one that hangs in a read must not keep the process from ending.
        threading.Thread(
            target=self._run,
            args=(discovery, chip, interval),
            name=f"chip {chip.pci}",
            daemon=True,
        ).start()

    def judge(self, now: float) -> JudgedChip:
        """The chip and what its newest reading means. To be called once per poll."""
        self.polls_since_read += 1
        while self._unjudged:  # each one counts, such as that of a short reset
            self._chip, self._reading = self._unjudged.popleft()
            self.history.observe(self._reading, now)
            self.polls_since_read = 0

        reading = self._reading
        if self.polls_since_read >= self._hanging_polls:
            reading = Reading(fault="read-hangs")
        return JudgedChip(self._chip, self.history.verdict(self._chip, reading, now))

    def end(self) -> None:
        """Let the thread end, once its read has returned."""
        self._ended = True

    def _run(self, discovery: Discovery, chip: Chip, interval: float) -> None:
        reading = Reading()
        while not self._ended:
            try:
                chip, reading = read_chip(discovery, chip, reading)
            except Exception as error:  # a defect costs this chip's readings, no others
                if reading.detail != repr(error):  # once
                    log.exception("chip %s cannot be read", chip.pci)
                reading = Reading(fault="unreadable", detail=repr(error))
            self._unjudged.append((chip, reading))
            self.has_read.set()
            time.sleep(interval)


class Inventory:
    """The newest snapshot, and the polling thread that makes it."""

    def __init__(self, settings: Settings, discovery: Discovery | None = None) -> None:
        self.settings = settings
        self.discovery = discovery or TenstorrentDiscovery(settings)
        self.snapshot = Snapshot()
        self.changed = asyncio.Event()  # set, and replaced, at each change
        # Called after each poll, with the snapshot before and the new one.
        self.on_snapshot: list[Callable[[Snapshot, Snapshot], object]] = []
        self.readers: dict[ClassDevice, ChipReader] = {}
        self.poll_trouble = LogOnChange()  # why the last poll failed
        self.polled_at = time.monotonic()  # end of the last poll that did not fail
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stopped = threading.Event()
        # Held while a snapshot is published, never during a read.
        self._lock = threading.Lock()

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Start the polling thread, which wakes those who wait on `loop`."""
        self._loop = loop
        threading.Thread(target=self._run, name="poll", daemon=True).start()

    def stop(self) -> None:
        """End the polling thread. A poll that is under way is not published."""
        with self._lock:
            self._stopped.set()

    def notify(self) -> None:
        """Wake all who wait for a change. In the event loop's thread."""
        changed = self.changed
        self.changed = asyncio.Event()
        changed.set()

    def poll(self, now: float) -> Snapshot:
        """One pass: find the chips, judge what was read of them, publish.

        Returns the snapshot. It takes about 2 s at most. Raises OSError if the chips
        cannot be listed, such as for lack of file descriptors.
        """
        found = {chip.class_device: chip for chip in self.discovery.chips()}
        self._start_and_end_readers(found, now)
        judged = [reader.judge(now) for reader in self.readers.values()]
        known = {member.chip.pci for member in judged}
        judged += self.discovery.unclaimed(known)

        new = next_snapshot(self.snapshot, judged, self.settings, now)
        self._publish(replace(new, driver=self.discovery.driver_version()))
        return self.snapshot

    def _start_and_end_readers(
        self, found: Mapping[ClassDevice, Chip], now: float
    ) -> None:
        for device in self.readers.keys() - found.keys():
            self.readers.pop(device).end()

        new = []
        for device in found.keys() - self.readers.keys():
            interval = self.settings.poll_seconds
            reader = ChipReader(self.discovery, found[device], interval, now)
            self.readers[device] = reader
            new.append(reader)

        # Counted, not timed, as above. All readers together have these steps.
        step = 0.05
        steps = round(FIRST_READS_S / step)
        for reader in new:
            while steps > 0 and not reader.has_read.wait(step):
                steps -= 1

    def _publish(self, new: Snapshot) -> None:
        with self._lock:
            if self._stopped.is_set():
                return
            old = self.snapshot
            self.snapshot = new
            # First of all, since the kubelet must hear of it at once.
            if self._loop and new != old:
                self._loop.call_soon_threadsafe(self.notify)
            self.polled_at = time.monotonic()
            for callback in self.on_snapshot:
                try:
                    callback(old, new)
                except Exception:
                    log.exception("a part of the plugin missed a change of the cards")

    def _run(self) -> None:
        while not self._stopped.is_set():
            began = time.monotonic()
            try:
                self.poll(began)
                self.poll_trouble.set("", cleared="the cards can be looked for again")
            except Exception as error:  # it must cost one poll, not all that follow
                if not isinstance(error, OSError) and not self.poll_trouble.problem:
                    log.exception("a poll failed")
                problem = f"{type(error).__name__}: {error}"
                self.poll_trouble.set(
                    f"cannot look for cards, the last list stands: {problem}"
                )
            next_poll = began + self.settings.poll_seconds
            self._stopped.wait(max(0.0, next_poll - time.monotonic()))


# ==== 6. serve(): the wiring ==========================================================


async def serve(settings: Settings) -> None:
    """The whole plugin, until it is cancelled. Raises CannotWork.

    It wires in parts D to F of the appendix.
    """
    os.umask(0o077)  # sockets for root alone: the folder may be open to more
    inventory = Inventory(settings)
    registrar = Registrar(Shared(inventory, choose=preferred_allocation))
    files = KeptFiles(settings)
    # Now, so that the first poll knows whether it is held.
    registrar.lock.try_acquire()

    def keep_files(old: Snapshot, new: Snapshot) -> None:
        if registrar.lock.held:  # another instance's files are not to be overwritten
            files.keep(new)

    inventory.on_snapshot = [functools.partial(log_changes, settings), keep_files]
    inventory.start(asyncio.get_running_loop())
    tasks = [
        asyncio.create_task(registrar.run()),
        asyncio.create_task(serve_pages(registrar)),
    ]
    try:
        # The registrar does not end by itself: what ends it, or a defect, is raised
        # here.
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
        for task in done:
            task.result()
    finally:
        inventory.stop()
        # Once: run() needs time to cancel its own tasks.
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        if registrar.lock.held:
            files.remove()
        registrar.lock.release()


# You can stop reading here: you have seen how a device plugin works. What follows is an
# appendix: A. what is known of Tenstorrent's driver; B. how a chip's health is judged;
# C. two guards against double use; D to F. what serve() wires in; G. the command line.


# ==== A. Discovery: Tenstorrent's sysfs -> chips and readings =========================
# tt-kmd, the driver, creates one class device per chip: a folder tenstorrent!N in
# /sys/class/tenstorrent, whose link `device` leads to the PCI function. The tt_* files
# in it appear once the chip's firmware has delivered its telemetry: at once, up to two
# minutes later (Wormhole), or never. Which of them exist depends on driver and
# firmware.

DRIVER = "tenstorrent"  # in the names of its module, class, PCI driver and device nodes
VENDOR = "0x1e52"  # Tenstorrent's PCI vendor id (tt-kmd enumerate.h)
# PCI device id -> architecture, as in the names in by-id (tt-kmd 2.6.0, its udev rule).
ARCHITECTURES = {"0x401e": "wormhole", "0xb140": "blackhole"}
PCI_ADDRESS = re.compile(r"[0-9a-f]{4,8}:[0-9a-f]{2}:[0-9a-f]{2}\.[0-7]")
# The PCI parts of a path in sysfs: the root bus, such as pci0000:00, and addresses.
PCI_PATH = re.compile(rf"pci[0-9a-f]{{4,8}}:[0-9a-f]{{2}}|{PCI_ADDRESS.pattern}")
CLASS_DEVICE = re.compile(rf"{DRIVER}!(0|[1-9][0-9]{{0,5}})")
# A model becomes part of a resource's and a socket's name, so its length is limited.
MODEL_LENGTH = 16
CARD_TYPE = rf"[a-z0-9]([-a-z0-9.]{{0,{MODEL_LENGTH - 2}}}[a-z0-9])?"
ALL_ONES = 0xFFFF_FFFF  # what a read of 32 bits gives on a dead PCIe bus
# Telemetry that is incomplete is read a second time after this: the driver makes the
# tt_* files one after another, and a bus that is dead for a moment makes every type
# "unknown".
SECOND_LOOK_S = 0.1


def read_attribute(path: str) -> str:
    """Read a sysfs attribute: its text, stripped; non-ASCII bytes become "?".

    Raises OSError. Blocks as long as the driver does, so only chip readers and /metrics
    call it for files that the driver fills.
    """
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        # A sysfs attribute holds at most one page (Linux: filesystems/sysfs.rst).
        data = os.read(fd, 4096)
    finally:
        os.close(fd)
    return data.decode("ascii", "replace").replace("\ufffd", "?").strip()


def class_folder(sysfs_root: Path, index: int) -> str:
    """The folder of class device `index`, with its tt_* files."""
    return f"{sysfs_root}/class/{DRIVER}/{DRIVER}!{index}"


def is_device_node(path: str, dev: str) -> bool:
    """Whether `path` is, or links to, the character device `dev`, a "major:minor".

    Opens nothing.
    """
    try:
        status = os.stat(path)
    except OSError:
        return False
    found = f"{os.major(status.st_rdev)}:{os.minor(status.st_rdev)}"
    return stat.S_ISCHR(status.st_mode) and found == dev


class Telemetry(NamedTuple):
    """The files that identify a chip."""

    card_type: str  # "" while there is no telemetry
    asic_id: str | None  # "" if the driver has no such file, None if it makes no sense
    serial: str | None  # likewise

    @property
    def is_complete(self) -> bool:
        """Whether everything is there that can be."""
        known_type = self.card_type not in ("", "unknown")
        return known_type and bool(self.asic_id) and bool(self.serial)


class TenstorrentDiscovery:
    """What depends on the Tenstorrent driver's layout of sysfs. Implements Discovery.

    `read` reads a file; tests pass another one.
    """

    def __init__(
        self, settings: Settings, read: Callable[[str], str] = read_attribute
    ) -> None:
        self.sysfs_root = settings.sysfs_root
        self.dev_folder = f"{settings.dev_root}/{DRIVER}"
        self._read_file = read
        self._vendors: dict[str, str] = {}  # PCI address -> vendor id

    def driver_version(self) -> str:
        """The version of the loaded driver, or ""."""
        return self._text(
            f"{self.sysfs_root}/module/{DRIVER}/version", r"[\w.+~-]{1,40}"
        )

    def chips(self) -> list[Chip]:
        """The chips that have a class device; [] without the driver. Raises OSError."""
        try:
            names = os.listdir(f"{self.sysfs_root}/class/{DRIVER}")
        except (FileNotFoundError, NotADirectoryError):
            return []

        chips = []
        for name in names:
            match = CLASS_DEVICE.fullmatch(name)
            chip = self.chip_at(int(match[1])) if match else None
            if chip:
                chips.append(chip)
        return chips

    def chip_at(self, index: int) -> Chip | None:
        """The chip whose class device has N = `index` now, unidentified; or None.

        Uses only readlink and stat, which cannot hang. One class device is told from
        the next by its inode. Times would not do: sysfs sets them when an inode enters
        the cache.
        """
        folder = class_folder(self.sysfs_root, index)
        # The entry is a link. In a copied tree it is a folder; its link `device` has no
        # bridges.
        link = folder if os.path.islink(folder) else f"{folder}/device"
        try:
            target = os.readlink(link)
            inode = os.stat(folder).st_ino
        except OSError:  # it has just vanished
            return None

        *above, pci = PCI_PATH.findall(target) or [""]
        if not PCI_ADDRESS.fullmatch(pci):
            return None
        return Chip(pci, index, inode, pci_path=tuple(above))

    def unclaimed(self, known: set[str]) -> list[JudgedChip]:
        """Tenstorrent's PCI functions that have no class device, and why.

        `known` are the PCI addresses of those that have one. Raises OSError.
        """
        folder = f"{self.sysfs_root}/bus/pci/devices"
        try:
            addresses = os.listdir(folder)
        except FileNotFoundError:
            return []

        # A host has hundreds of PCI functions, so each is asked for its vendor once.
        before = self._vendors
        self._vendors = {}
        found = []
        for pci in addresses:
            function = f"{folder}/{pci}"
            vendor = before.get(pci) or self._text(f"{function}/vendor")
            self._vendors[pci] = vendor
            if vendor == VENDOR and pci not in known:
                chip = Chip(pci, arch=self._architecture(function))
                found.append(JudgedChip(chip, self._why_unclaimed(function)))
        return found

    def _why_unclaimed(self, function: str) -> Verdict:
        try:
            driver = os.path.basename(os.readlink(f"{function}/driver"))
        except OSError:
            driver = "none"
        # The driver is bound a moment before it has made the class device.
        return make_verdict(
            "pending" if driver == DRIVER else "no-driver", driver=driver
        )

    def read(self, chip: Chip) -> tuple[Chip, Reading]:
        """Identify a chip, as far as that is possible now, and read its health.

        It may hang, as the driver may.
        """
        folder = class_folder(self.sysfs_root, chip.index)
        known = chip
        # Looking whether a file is there cannot hang, nor oops: see _read_heartbeat.
        has_late_id = not chip.asic_id and os.path.lexists(f"{folder}/tt_asic_id")
        if chip.unidentified or has_late_id:
            known = self._identify(chip)
        if not known.firmware:
            firmware = self._text(f"{folder}/tt_fw_bundle_ver", r"[0-9.]{1,40}")
            known = replace(known, firmware=firmware)

        reading = self._read_heartbeat(folder)
        # A reset may bring other firmware, and a dead bus shows none: read that again.
        if reading.fault in ("resetting", "bus-dead"):
            known = replace(known, firmware="")
        node = f"{self.dev_folder}/{chip.index}"
        works = not reading.fault or KINDS[reading.fault].health == HEALTHY
        if works and not is_device_node(node, known.dev):
            reading = reading._replace(fault="no-node")

        # What was read may be another chip's, which has taken N meanwhile.
        try:
            is_same = os.stat(folder).st_ino == chip.inode
        except OSError:
            is_same = False
        return (known, reading) if is_same else (chip, Reading(fault="gone"))

    def _identify(self, chip: Chip) -> Chip:
        """`chip` with all that sysfs tells about it."""
        folder = class_folder(self.sysfs_root, chip.index)
        telemetry = self._read_telemetry(folder)
        if telemetry.card_type and not telemetry.is_complete:
            time.sleep(SECOND_LOOK_S)
            telemetry = self._read_telemetry(folder)

        dev = self._text(f"{folder}/dev", r"[0-9]+:[0-9]+")
        arch = self._architecture(f"{folder}/device")
        # It is -1 if the host does not know.
        numa_node = self._text(f"{folder}/device/numa_node", r"[0-9]{1,4}")
        iommu = self._text(f"{folder}/device/iommu_group/type", r"[A-Za-z-]{1,20}")
        return replace(
            chip,
            dev=dev,
            arch=arch,
            card_type=telemetry.card_type,
            asic_id=telemetry.asic_id or "",
            serial=telemetry.serial or "",
            numa_node=int(numa_node) if numa_node else None,
            iommu=iommu,
            unidentified=why_unidentified(telemetry, arch, dev),
        )

    def _read_telemetry(self, folder: str) -> Telemetry:
        return Telemetry(
            card_type=self._text(f"{folder}/tt_card_type", CARD_TYPE),
            asic_id=self._hardware_id(f"{folder}/tt_asic_id"),
            serial=self._hardware_id(f"{folder}/tt_serial"),
        )

    def _read_heartbeat(self, folder: str) -> Reading:
        """A reading from the heartbeat alone.

        A driver before 2.7 has no such file, and opening it does not reach the driver:
        just as well, since reading telemetry while a chip disappears can oops the
        kernel there (tt-kmd a972eed).
        """
        try:
            text = self._read_file(f"{folder}/tt_heartbeat")
        except OSError as error:
            return self._explain(folder, error)

        if not re.fullmatch(r"[0-9]{1,10}", text):
            return Reading(fault="unreadable", detail="not a number")
        if int(text) == ALL_ONES:
            return Reading(fault="bus-dead")
        return Reading(int(text))

    def _explain(self, folder: str, error: OSError) -> Reading:
        """What an error of the heartbeat means (tt-kmd telemetry.c, from 2.9)."""
        if error.errno == errno.ENOENT:
            return Reading()
        if error.errno == errno.ENODEV:  # the chip is detached
            return Reading(fault="gone")
        if error.errno != errno.ENODATA:
            name = errno.errorcode.get(error.errno or 0, "unknown error")
            return Reading(fault="unreadable", detail=name)

        # In a reset, no file can be read. If another one can, the firmware may have no
        # heartbeat, such as after a downgrade; or the reset has ended in between, and
        # now the heartbeat can be read, too.
        in_reset = not self._text(f"{folder}/tt_card_type")
        if in_reset or self._text(f"{folder}/tt_heartbeat"):
            return Reading(fault="resetting")
        return Reading(fault="no-heartbeat")

    def _architecture(self, function: str) -> str:
        return ARCHITECTURES.get(self._text(f"{function}/device"), "")

    def _text(self, path: str, pattern: str = r"[ -~]+") -> str:
        """The text of one file; "" if it is missing, unreadable or does not match."""
        try:
            text = self._read_file(path)
        except OSError:
            return ""
        return text if re.fullmatch(pattern, text) else ""

    def _hardware_id(self, path: str) -> str | None:
        """An ASIC id or board serial, 16 hex digits; "" if there is no such file.

        None if the value is unusable: unreadable, all ones (dead bus) or all zeros
        (unprogrammed fuses).
        """
        text = self._text(path, r"[0-9A-F]{16}")
        if text not in ("", "F" * 16, "0" * 16):
            return text
        return None if os.path.lexists(path) else ""


def why_unidentified(telemetry: Telemetry, arch: str, dev: str) -> str:
    """The kind that says why it is not known which card a chip is part of, or ""."""
    if not telemetry.card_type or not dev:
        return "pending"
    if telemetry.asic_id is None or not arch:
        return "unidentified"
    if telemetry.card_type == "unknown" and telemetry.serial is None:  # a dead bus
        return "unidentified"
    if chips_per_card(telemetry.card_type) == 1:
        return ""
    # The chips of one card are found by their serial.
    if not telemetry.serial:
        return "unidentified"
    # Early boards have only the product code; so has what the vendor's tool recovered.
    return "no-serial" if telemetry.serial.endswith("0" * 8) else ""


# ==== B. Health: kinds of verdicts; what is remembered + a reading + now -> verdict ===


class Kind(NamedTuple):
    """One kind of verdict.

    The reason says what is wrong and what to do, without numbers that would change at
    each poll.
    """

    health: str  # NOT_OFFERED becomes UNHEALTHY if the card was offered before
    reason: str


# All kinds of verdicts, as in README's table "Health". Where several fit one chip, that
# of the group with the lowest number counts.
KINDS = {
    # 1. What is seen now. Two are remembered, too: see 4.
    "gone": Kind(
        UNHEALTHY,
        "it is gone from sysfs: it is in a reset, was unplugged, or the driver was "
        "unloaded. If it stays away, see dmesg. If it was taken out for good, restart "
        "the plugin, which then forgets it",
    ),
    "returning": Kind(
        UNHEALTHY,
        "a chip is back at {pci}, but it is not known yet which card it is: {why}",
    ),
    "replaced": Kind(
        UNHEALTHY,
        "at its PCI address, {pci}, is card {card_id} now: another card, or this one "
        "by the ID that it has now. Restart the plugin, which then forgets this ID",
    ),
    "resetting": Kind(
        UNHEALTHY,
        "it is in a reset and does not answer yet. If this lasts for minutes, reset it "
        "again: tt-smi -r",
    ),
    "bus-dead": Kind(
        UNHEALTHY,
        "its PCIe bus answers all ones: reset it with tt-smi -r, or power-cycle the "
        "host",
    ),
    "no-node": Kind(
        UNHEALTHY,
        "its device node {chip.device_node} is missing, or is not the device that "
        "sysfs names: see dmesg",
    ),
    "read-hangs": Kind(
        UNHEALTHY,
        "a read of its sysfs files does not return: the driver hangs on it. See dmesg, "
        "and reboot the node if it stays so",
    ),
    # 2. It is not known which card the chip is part of.
    "pending": Kind(
        NOT_OFFERED,
        "its telemetry is not there yet: the firmware may take two minutes, or a read "
        "takes long (and a driver before 1.28 has none)",
    ),
    "no-telemetry": Kind(
        NOT_OFFERED,
        "it has no telemetry, so its model is not known: its firmware does not answer, "
        "or the driver is older than 1.28",
    ),
    "unidentified": Kind(
        NOT_OFFERED,
        "its ASIC id, board serial or PCI device id makes no sense, so it is not known "
        "which card it is: reset it with tt-smi -r, or update its firmware and the "
        "driver",
    ),
    "no-serial": Kind(
        NOT_OFFERED,
        "the serial of its board, {chip.serial}, is not programmed, so it is not known "
        "which two chips are one card: ask the vendor to program it",
    ),
    "no-driver": Kind(
        NOT_OFFERED,
        "it has no device node: its PCI driver is {driver}, not tenstorrent. See dmesg "
        "if it should be",
    ),
    # 3. Of a card: its chips do not make it up.
    "half": Kind(
        NOT_OFFERED,
        "a p300 has two chips, and only {here} is there; {other}",
    ),
    "same-id": Kind(
        NOT_OFFERED,
        "more chips than a card has report this ID: {here}. Update their firmware, or "
        "take one of these cards out",
    ),
    # 4. What the chip has not recovered from: resetting, bus-dead, or
    "hung": Kind(
        UNHEALTHY,
        "its heartbeat stands still, so its firmware hangs: reset it with tt-smi -r",
    ),
    # 5. It works. The first two are notes.
    "unreadable": Kind(
        HEALTHY,
        "its heartbeat cannot be read ({detail}), so a hang would not be noticed: see "
        "dmesg, and whether a security policy forbids the read",
    ),
    "no-heartbeat": Kind(
        HEALTHY,
        "its firmware has no heartbeat, so a hang would not be noticed: update its "
        "firmware",
    ),
    "ok": Kind(HEALTHY, ""),
}


def make_verdict(kind: str, **facts: object) -> Verdict:
    """The verdict of this kind, with `facts` filled in. KeyError if one is missing."""
    health, reason = KINDS[kind]
    return Verdict(health, kind, reason.format(**facts))


# A chip hangs if its heartbeat stays the same for longer than this: the firmware's own
# watchdog takes 10 s (auto_reset_timeout in tt-kmd module.c).
HEARTBEAT_S = 12.0
# And it must be read as the same at least this many times: while this process is
# stopped, time.monotonic() goes on, and nothing runs.
HEARTBEAT_READS = 3
# How long after a chip appears its telemetry may still come: the driver asks for it 120
# times, once a second (tt-kmd wormhole.c, since 2.4.0).
TELEMETRY_S = 130.0


# A new heartbeat is read again after this time, at most LOOKS times, until it changes.
# Firmware beats ten times a second, so a start takes 0.1 s longer.
LOOK_AGAIN_S = 0.05
LOOKS = 24


def read_chip(
    discovery: Discovery, chip: Chip, before: Reading
) -> tuple[Chip, Reading]:
    """Read a chip. `before` is its last reading, Reading() at first.

    A chip that hangs shows a heartbeat, too, so that each one has to prove itself by a
    change. So that this takes no whole poll, a heartbeat that was not there `before` is
    read again until it changes.
    """
    was_identified = not chip.unidentified
    chip, reading = discovery.read(chip)
    first = reading.heartbeat
    was_there = was_identified and before.heartbeat is not None
    if first is None or chip.unidentified or was_there:
        return chip, reading

    for _ in range(LOOKS):
        time.sleep(LOOK_AGAIN_S)
        chip, reading = discovery.read(chip)
        if reading.heartbeat != first:
            break
    has_changed = reading.heartbeat is not None and reading.heartbeat != first
    return chip, reading._replace(changed=has_changed)


class HealthHistory:
    """What is remembered of one chip while its class device exists.

    Times are those of time.monotonic().
    """

    def __init__(self, appeared: float) -> None:
        self.appeared = appeared
        self.heartbeat: int | None = None  # the newest one; None before the first
        self.changed_at = appeared  # when it was first read
        self.equal_reads = 0  # how often the same was read since
        self.failure = ""  # a kind: what the chip has not recovered from; "" if nothing
        self.changes_needed = 0  # heartbeat changes until it counts as recovered

    def observe(self, reading: Reading, now: float) -> None:
        """Take in a new reading."""
        if reading.fault in ("resetting", "bus-dead"):
            # The first heartbeat after a reset always differs, so it proves nothing.
            self.heartbeat = None
            self._fail(reading.fault, changes_needed=1)
        elif reading.fault == "no-heartbeat":
            self.heartbeat = None
            self.failure = ""
        elif reading.heartbeat is None:
            pass  # it tells nothing of the heartbeat
        elif reading.heartbeat == self.heartbeat:
            self._observe_silence(now)
        else:
            self._observe_new_value(reading, now)

    def _observe_silence(self, now: float) -> None:
        self.equal_reads += 1
        is_long = now - self.changed_at > HEARTBEAT_S
        if is_long and self.equal_reads >= HEARTBEAT_READS:
            # Two changes: a single one could be the last of a dying chip.
            self._fail("hung", changes_needed=2)

    def _observe_new_value(self, reading: Reading, now: float) -> None:
        is_first = self.heartbeat is None
        self.heartbeat = reading.heartbeat
        self.changed_at = now
        self.equal_reads = 0
        if is_first and not self.failure:
            self._fail("hung", changes_needed=1)  # until it has proven itself
        if self.failure and (reading.changed or not is_first):
            self.changes_needed -= 1
            if self.changes_needed == 0:
                self.failure = ""

    def _fail(self, kind: str, changes_needed: int) -> None:
        self.failure = kind
        self.changes_needed = changes_needed

    def verdict(self, chip: Chip, reading: Reading, now: float) -> Verdict:
        """What the newest reading means. The order is that of KINDS."""
        fault = reading.fault
        # When a chip goes away, the driver removes its files first (tt-kmd
        # enumerate.c).
        file_has_gone = reading.heartbeat is None and self.heartbeat is not None
        if file_has_gone and not fault:
            fault = "gone"
        if fault and KINDS[fault].health == UNHEALTHY:
            return make_verdict(fault, chip=chip)

        if chip.unidentified == "pending" and now - self.appeared > TELEMETRY_S:
            return make_verdict("no-telemetry")
        if chip.unidentified:
            return make_verdict(chip.unidentified, chip=chip)
        if self.failure:
            return make_verdict(self.failure)
        return make_verdict(fault or "ok", detail=reading.detail)


# ==== C. Guards: one plugin per node; no chip for two Pods ============================


class InstanceLock:
    """One plugin per kubelet folder: an flock on the folder itself.

    It ends with its holder. It is not on a file in the folder: so it works on a full
    disk, leaves nothing stale, and survives whoever empties the folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.held = False
        self.standby_reason = ""  # set while another instance holds the lock
        self._fd = -1

    def try_acquire(self) -> str:
        """Take the lock if it is free. Returns "" once it is held, else why not.

        Raises CannotWork.
        """
        self.standby_reason = ""
        try:
            self._acquire()
        except FileNotFoundError:
            return (
                f"{self.folder} is not there yet: waiting for a kubelet that makes it"
            )
        except BlockingIOError:
            self.standby_reason = (
                f"another instance serves {self.folder}: standing by until it ends"
            )
            return self.standby_reason
        except PermissionError as error:
            raise CannotWork(
                f"uid {os.geteuid()} cannot make sockets in {self.folder}. The kubelet "
                "makes this folder for root alone: run the plugin as uid 0 (it needs "
                "no capabilities), with the folder mounted for writing"
            ) from error
        except OSError as error:
            return f"cannot lock {self.folder}: {error.strerror}"
        return ""

    def _acquire(self) -> None:
        there = os.stat(self.folder)
        if self.held and os.path.samestat(there, os.fstat(self._fd)):
            if there.st_nlink == 0:
                raise CannotWork(
                    f"{self.folder} was deleted on the host, and a mount shows the "
                    "deleted one: start again"
                )
            return

        # Not held yet; or the folder was made anew, and has to be locked again.
        self.release()
        self._fd = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        if not os.access(self.folder, os.W_OK | os.X_OK, effective_ids=True):
            raise PermissionError
        fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        self.held = True
        self._remove_stale_sockets()

    def release(self) -> None:
        """Let the next instance in."""
        if self._fd >= 0:
            os.close(self._fd)
        self._fd = -1
        self.held = False

    def _remove_stale_sockets(self) -> None:
        for path in self.folder.glob(ANY_SOCKET):
            with contextlib.suppress(OSError):
                if path.is_socket() and not accepts_connections(path):
                    path.unlink()
                    text = "removed %s: left behind by an instance that was killed"
                    log.info(text, path.name)


# ---- The kubelet's own record: which Pod holds which IDs, and what it was given ----
# The kubelet gives an ID of a resource to one Pod at a time. It does not know when two
# IDs stand for one chip: after a change of plugin, of --variants, of the domain or of
# the driver. And it repeats what a container was given, although chips may have moved.


class Holding(NamedTuple):
    """What one container holds of one resource, by the kubelet's record."""

    pod_uid: str
    resource: str
    ids: frozenset[str]
    answer: api.ContainerAllocateResponse  # repeated at each start of the container


def parse_holding(entry: Mapping[str, Any]) -> Holding:
    """One of PodDeviceEntries. Raises many exceptions if it is of another form."""
    ids = entry["DeviceIDs"] or []
    if isinstance(ids, dict):  # by NUMA node; a plain list before 1.20
        ids = chain(*ids.values())
    answer = base64.b64decode(entry["AllocResp"] or "")
    return Holding(
        pod_uid=str(entry["PodUID"]),
        resource=str(entry["ResourceName"]),
        ids=frozenset(map(str, ids)),
        answer=api.ContainerAllocateResponse.FromString(answer),
    )


def read_record(path: Path) -> list[Holding]:
    """Read the kubelet's record of all containers that hold devices.

    It survives restarts of the kubelet and of its plugins (kubernetes
    devicemanager/checkpoint/checkpoint.go, the same in 1.20 and 1.36). The kubelet
    writes it when it admits a Pod, after it has forgotten the Pods that have ended.
    Raises OSError, and ValueError if it has another form: it is an internal file.
    """
    text = path.read_text()
    try:
        entries = json.loads(text)["Data"]["PodDeviceEntries"] or []
        return [parse_holding(entry) for entry in entries]
    except Exception as error:
        raise ValueError(f"its form is not known: {error!r}") from error


def given_devices(holding: Holding) -> list[api.DeviceSpec]:
    """Tenstorrent's device nodes among those that the container was given."""
    devices = holding.answer.devices
    return [one for one in devices if one.host_path.startswith(f"{DEVICES}/")]


def leads_to(discovery: Discovery, path: str, chips: Iterable[Chip]) -> bool:
    """Whether a host path is the device node of one of `chips` now."""
    seen_here = f"{discovery.dev_folder}/{path.removeprefix(f'{DEVICES}/')}"
    for chip in chips:
        if is_device_node(seen_here, chip.dev):
            return True
        # A link of the chip's own that leads nowhere: udev is about to make it again.
        if path.endswith(f"/by-id/{chip.id}") and not os.path.exists(seen_here):
            return True
    return False


def find_wrong_replay(
    discovery: Discovery, holding: Holding, cards: Sequence[Card]
) -> str:
    """Why a container must not start with what it was given once, or "".

    `cards` are those that it holds, as they are now.
    """
    chips = [chip for card in cards for chip in card.chips]
    remedy = "Delete the Pod, so that a new one gets the right device"
    given = given_devices(holding)
    for device in given:
        if not leads_to(discovery, device.host_path, chips):
            return (
                f"it was {device.host_path} when this Pod was admitted, and that is "
                f"another device now. {remedy} (udev's links in /dev/tenstorrent/by-id "
                "avoid this)"
            )

    nodes_now = {chip.device_node for chip in chips}
    moved = {device.container_path for device in given} - nodes_now
    if not moved:
        return ""
    old_nodes = ", ".join(sorted(moved))
    if any(mount.host_path == HUGEPAGES for mount in holding.answer.mounts):
        # The driver library names its huge page files after N.
        return (
            f"it is {old_nodes} in this container, and another card may have that "
            f"number now: both would use the same huge page files. {remedy}"
        )
    if holding.answer.cdi_devices:  # in the answers of an earlier version
        return (
            f"it was {old_nodes} when this Pod was admitted, and the CDI name that the "
            f"Pod was given leads elsewhere now. {remedy}"
        )
    return ""


def holds_card(
    discovery: Discovery, holding: Holding, card: Card, present_ids: set[str]
) -> bool:
    """Whether a container holds `card`, under whatever resource or ID.

    `present_ids` are the IDs of all cards that are there now.
    """
    addresses = {chip.pci for chip in card.chips}
    names = {card.id} | addresses | {chip.id for chip in card.chips}
    if holding.ids & names:
        return True
    if holding.ids <= present_ids:  # other cards, that are there
        return False

    # IDs that stand for nothing now: another plugin's, such as "0", or of a time when
    # the driver told more or less of the chip. This plugin's answers have PCI
    # addresses.
    given_addresses: set[str] = set()
    for variable, value in holding.answer.envs.items():
        if variable.startswith("PCIDEVICE_"):
            given_addresses.update(value.split(","))
    if given_addresses:
        return not given_addresses.isdisjoint(addresses)
    paths = [device.host_path for device in given_devices(holding)]
    return any(leads_to(discovery, path, card.chips) for path in paths)


def find_conflict(
    discovery: Discovery,
    snapshot: Snapshot,
    resource: str,
    cards: Sequence[Card],
    record: Iterable[Holding],
) -> str:
    """Why, by the kubelet's record, a container must not start with `cards`, or ""."""
    ids = {card.id for card in cards}
    own: list[Holding] = []
    others: list[Holding] = []
    for holding in record:
        is_own = holding.resource == resource and not ids.isdisjoint(holding.ids)
        (own if is_own else others).append(holding)

    for holding in own:
        # An init container of the Pod may have held more cards. It is not starting now.
        if holding.ids <= ids:
            held = [card for card in cards if card.id in holding.ids]
            problem = find_wrong_replay(discovery, holding, held)
            if problem:
                return f"{', '.join(map(str, held))}: {problem}"

    own_pods = {holding.pod_uid for holding in own}
    present_ids = {
        card.id
        for card in snapshot.cards
        if card.verdict.kind not in ("gone", "returning", "replaced")
    }
    for holding in others:
        for card in cards:
            is_other_pod = holding.pod_uid not in own_pods
            if is_other_pod and holds_card(discovery, holding, card, present_ids):
                return describe_holder(card, holding)
    return ""


def describe_holder(card: Card, holding: Holding) -> str:
    """Who else holds a card, and what to do."""
    ids = ", ".join(sorted(holding.ids))
    return (
        f"{card}: Pod {holding.pod_uid} holds it as {ids} of {holding.resource}, by "
        "the kubelet's record. Delete that Pod. If it has ended already, delete this "
        "one: the kubelet forgets Pods that have ended when it admits a new one"
    )


Result = TypeVar("Result")


async def in_thread(function: Callable[..., Result], *arguments: Any) -> Result:
    """Call a function that may block, in a daemon thread.

    The threads of asyncio.to_thread would keep the process from ending.
    """
    future: concurrent.futures.Future[Result] = concurrent.futures.Future()

    def run() -> None:
        if not future.set_running_or_notify_cancel():
            return
        try:
            result = function(*arguments)
        except Exception as error:
            future.set_exception(error)
        else:
            future.set_result(result)

    threading.Thread(target=run, daemon=True).start()
    return await asyncio.wrap_future(future)


RECORD_S = 5.0  # how long the start of a container waits for the record


async def read_record_if_possible(shared: Shared) -> list[Holding]:
    """The kubelet's record; [] if it cannot be read, which is logged once."""
    path = shared.inventory.settings.plugin_dir / "kubelet_internal_checkpoint"
    try:
        record = await asyncio.wait_for(in_thread(read_record, path), RECORD_S)
    except asyncio.TimeoutError:
        problem = "it takes too long"
    except OSError as error:
        problem = error.strerror or str(error)
    except ValueError as error:
        problem = str(error)
    else:
        shared.record_trouble.set("", cleared=f"{path} can be read again")
        return record
    shared.record_trouble.set(
        f"cannot read {path}: {problem}. Containers start without a look at who holds "
        "their cards"
    )
    return []


# ==== D. Preferred allocation: which of the free cards suit one container best ========

# A Galaxy has 32 chips: four trays, by the high digit of the PCI bus, with positions 1
# to 8, its low digit (tt-kmd enumerate.c, tt-smi constants.py; Wormhole's trays 1 to 4
# are c, 8, 0, 4, Blackhole's 0, 4, c, 8).
GALAXY_BUSES = {f"{tray}{position}" for tray in "048c" for position in range(1, 9)}


def galaxy_trays(cards: Iterable[Card]) -> dict[str, str]:
    """Card ID -> tray, for the chips of whole Galaxies.

    Only the vendor's own numbering has trays: in a virtual machine the same chips sit
    on other buses. So all 32 must be there, in one PCI domain.
    """
    by_domain: dict[str, dict[str, Card]] = {}  # PCI domain -> bus -> card
    for card in cards:
        if card.model.startswith("galaxy-"):
            domain, bus, _ = card.chips[0].pci.split(":")
            by_domain.setdefault(domain, {})[bus] = card

    trays = {}
    for domain, by_bus in by_domain.items():
        if by_bus.keys() == GALAXY_BUSES:
            for bus, card in by_bus.items():
                trays[card.id] = f"{domain}:{bus[0]}"
    return trays


def topology_path(card: Card, trays: Mapping[str, str]) -> tuple[str, ...]:
    """From the top of the host down to a card.

    First its NUMA node; then its Galaxy tray, or root bus and bridges; then its PCI
    address.
    """
    numa = "/".join(f"{node:04}" for node in card.numa_nodes)
    chip = card.chips[0]
    above = (trays[card.id],) if card.id in trays else chip.pci_path
    return (numa, *above, chip.pci)


def healthy_paths(
    cards: Mapping[str, Card], ids: Iterable[str]
) -> dict[tuple[str, ...], str]:
    """The path of each healthy card among these IDs -> its ID."""
    trays = galaxy_trays(cards.values())
    id_at = {}
    for card_id in ids:
        card = cards.get(card_id)
        if card and card.verdict.health == HEALTHY:
            id_at[topology_path(card, trays)] = card_id
    return id_at


def shared_levels(one: tuple[str, ...], other: tuple[str, ...]) -> int:
    """How many levels two paths have in common, from the top."""
    levels = 0
    while one[: levels + 1] == other[: levels + 1] and levels < len(one):
        levels += 1
    return levels


def best_fit(paths: Sequence[tuple[str, ...]], count: int) -> list[tuple[str, ...]]:
    """Choose `count` of `paths`, which are sorted.

    They are from the smallest group of the tree that has room, so that larger groups
    stay whole for the next Pod; in it, the nearest neighbours by PCI address.
    """
    sizes = Counter(path[:n] for path in paths for n in range(len(path) + 1))

    def sizes_upwards(group: tuple[str, ...]) -> list[int]:
        """The size of a group, then of the one that it is in, and so on to the host."""
        return [sizes[group[:n]] for n in range(len(group), -1, -1)]

    roomy = [group for group, size in sizes.items() if size >= count]
    group = min(roomy, key=sizes_upwards)
    inside = [path for path in paths if path[: len(group)] == group]

    def spread(neighbours: Sequence[tuple[str, ...]]) -> int:
        addresses = [int(re.sub(r"\W", "", path[-1]), 16) for path in neighbours]
        return max(addresses) - min(addresses)

    rows = [inside[n : n + count] for n in range(len(inside) - count + 1)]
    return min(rows, key=spread)


def preferred_allocation(
    cards: Mapping[str, Card], available: Sequence[str], must: Sequence[str], size: int
) -> list[str]:
    """Choose the `size` IDs of `available` that suit one container best.

    All of `must`, and what is nearest to them; without `must`, see best_fit. Cards that
    were lost since the kubelet read the list come last. The order of the request does
    not matter. Raises Refusal.
    """
    required = set(must)
    asked = set(available) | required
    if not 0 < size <= len(asked) or len(required) > size:
        sentence = (
            f"cannot choose {size} of {len(asked)} cards with {len(required)} required"
        )
        raise Refusal(StatusCode.INVALID_ARGUMENT, sentence)

    id_at = healthy_paths(cards, asked)
    fixed = sorted(path for path, card_id in id_at.items() if card_id in required)

    # Of the lost ones: those that are required, and as many as it would lack.
    lost = asked - set(id_at.values())
    lost_first = sorted(lost, key=lambda card_id: (card_id not in required, card_id))
    many_lost = max(len(lost & required), size - len(id_at))
    count = size - many_lost - len(fixed)

    def nearness(path: tuple[str, ...]) -> int:
        """How many levels of the tree it shares with the nearest required card."""
        return max(shared_levels(path, near) for near in fixed)

    free = sorted(id_at.keys() - set(fixed))
    if count == 0:
        chosen = []
    elif fixed:
        chosen = sorted(free, key=nearness, reverse=True)[:count]
    else:
        chosen = best_fit(free, count)
    return [id_at[path] for path in (*fixed, *chosen)] + lost_first[:many_lost]


# ==== E. Operations: the log; /healthz, /readyz and /metrics ==========================

PYTHON_VERSION = sys.version.split()[0]


class BoundedQueueHandler(logging.handlers.QueueHandler):
    """Hands lines to the thread that writes them, or drops them if it cannot.

    So a log that nobody reads holds up nobody.
    """

    dropped = 0

    def emit(self, record: logging.LogRecord) -> None:
        """Queue a line if there is room. It is formatted later, by the other thread."""
        try:
            if self.dropped:
                text = f"{self.dropped} lines were dropped: nobody read the log"
                line = {"levelname": "WARNING", "msg": text}
                self.queue.put_nowait(logging.makeLogRecord(line))
                self.dropped = 0
            self.queue.put_nowait(record)
        except queue.Full:
            self.dropped += 1


class JsonFormatter(logging.Formatter):
    """One JSON object per line: ts, level, msg, and what else is known of the line."""

    def format(self, record: logging.LogRecord) -> str:
        """The line, with card, resource, reason, since, exception if it has any."""
        line = {
            "ts": self.formatTime(record, self.datefmt),
            "level": record.levelname.lower(),
            "msg": record.getMessage(),
        }
        for name in ("card", "resource", "reason", "since"):
            fact = getattr(record, name, "")
            if fact:
                line[name] = fact
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line)


def in_one_line(record: logging.LogRecord) -> bool:
    """A log filter: gRPC logs a malformed request with a traceback of itself."""
    error = record.exc_info[1] if record.exc_info else None
    if isinstance(error, google.protobuf.message.DecodeError):  # the caller's fault
        record.msg = f"refused a malformed request: {error}"
        record.args = ()
        record.exc_info = None
    return True


def set_up_logging(style: str, level: str) -> queue.Queue[logging.LogRecord]:
    """Log to stderr, in a thread. Returns the queue of lines not written yet."""
    kind = JsonFormatter if style == "json" else logging.Formatter
    formatter = kind("%(asctime)s %(levelname)s %(message)s", "%Y-%m-%dT%H:%M:%SZ")
    formatter.converter = time.gmtime
    stderr = logging.StreamHandler()
    stderr.setFormatter(formatter)

    lines: queue.Queue[logging.LogRecord] = queue.Queue(1000)
    handler = BoundedQueueHandler(lines)
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    logging.getLogger("asyncio").setLevel(logging.WARNING)
    logging.getLogger("grpc._cython.cygrpc").addFilter(in_one_line)
    logging.handlers.QueueListener(lines, stderr).start()
    return lines


def log_start(settings: Settings, snapshot: Snapshot) -> None:
    """Log what runs here, and where."""
    models = Counter(card.model or "of unknown model" for card in snapshot.cards)
    cards = ", ".join(f"{count} {model}" for model, count in sorted(models.items()))
    log.info(
        "tt-device-plugin %s, Python %s, grpcio %s, driver %s; kubelet folder %s, "
        "sysfs %s, dev %s; cards: %s",
        __version__,
        PYTHON_VERSION,
        grpc.__version__,
        snapshot.driver or "not loaded",
        settings.plugin_dir,
        settings.sysfs_root,
        settings.dev_root,
        cards or "none",
    )


def log_card(settings: Settings, last: Card | None, card: Card) -> None:
    """Log what has become of a card. `last` is what it was in the snapshot before."""
    level = logging.INFO
    text = "is Healthy"
    if not card.resource:
        level = logging.WARNING
        text = "is not offered"
    elif card.verdict.health == UNHEALTHY:
        level = logging.ERROR
        text = "is Unhealthy"
    elif last and last.resource and last.verdict.health == UNHEALTHY:
        text = f"is Healthy again, after {card.since - last.since:.0f} s"

    if card.verdict.reason:
        text = f"{text}: {card.verdict.reason}"
    if card.verdict.kind == "no-node":  # the admin's business, not that of a Pod's user
        text = f"{text}. Looked for in {settings.dev_root}: is that the host's /dev?"
    about = {
        "card": card.id,
        "resource": card.resource,
        "reason": card.verdict.reason,
        "since": utc(card.since),
    }
    log.log(level, "%s %s", card, text, extra=about)


def log_changes(settings: Settings, old: Snapshot, new: Snapshot) -> None:
    """Log what changed between two snapshots: at first all, then a line per card."""
    if not old.polled:
        log_start(settings, new)
    if not new.cards and (old.cards or not old.polled):
        driver = new.driver or "not loaded"
        log.info("no cards here, driver %s: waiting for some to appear", driver)

    before = {card.id: card for card in old.cards}
    for card in new.cards:
        last = before.pop(card.id, None)
        is_same = (
            last and last.verdict == card.verdict and last.resource == card.resource
        )
        if not is_same:
            log_card(settings, last, card)

    # Those that were listed and are not any more. One whose chips are there under
    # another ID has got its telemetry.
    addresses = {chip.pci for card in new.cards for chip in card.chips}
    for card in before.values():
        if not any(chip.pci in addresses for chip in card.chips):
            log.warning("%s is gone; it was not offered", card, extra={"card": card.id})


# ---- Metrics ----


def whole_number(text: str) -> float:
    """A decimal number without a sign. Raises ValueError."""
    if not re.fullmatch("[0-9]{1,20}", text):
        raise ValueError(text)
    return int(text)


def link_speed(text: str) -> float:
    """Read "16.0 GT/s PCIe". Raises ValueError."""
    return float(text.partition(" GT/s")[0])


def total_errors(text: str) -> float:
    """The sum, at the end of a table of errors by kind. Raises ValueError."""
    return whole_number(text.rpartition("TOTAL_ERR_COR ")[2])


def count_words(text: str) -> float:
    """How many process ids there are, each on a line."""
    return len(text.split())


class Sensor(NamedTuple):
    """A metric that a scrape reads from a file."""

    metric: str
    folder: str  # class, pci or hwmon: that device's; proc: the driver's
    file: str
    largest: float  # plausible value, in the file's unit
    divisor: float  # what to divide by, to get the metric's unit
    help: str
    parse: Callable[[str], float] = whole_number


# Above `largest`: stale telemetry, a dead bus, or a negative number read as unsigned.
# Names, where Prometheus' conventions allow them: docs.tenstorrent.com/tt-telemetry.
# Units and junk that was seen: tt-kmd telemetry.c 2.10.0, tt-kmd#213, #121,
# tt-metal#30055. PCI: Linux Documentation/ABI/testing/sysfs-bus-pci. proc/pids: tt-kmd
# chardev.c, 2.5.0.
SENSORS = (
    Sensor(
        "tt_asic_temperature_celsius",
        "hwmon",
        "temp1_input",
        150_000,
        1000,
        "Temperature.",
    ),
    Sensor(
        "tt_thermal_throttle_limit_celsius",
        "hwmon",
        "temp1_max",
        150_000,
        1000,
        "Temperature above which the chip is throttled.",
    ),
    Sensor("tt_ai_clock_mhz", "class", "tt_aiclk", 5000, 1, "AI clock."),
    Sensor("tt_arc_clock_mhz", "class", "tt_arcclk", 5000, 1, "ARC clock."),
    Sensor("tt_axi_clock_mhz", "class", "tt_axiclk", 5000, 1, "AXI clock."),
    Sensor("tt_tdp_w", "hwmon", "power1_input", 2e9, 1e6, "Power drawn."),
    Sensor("tt_tdp_limit_w", "hwmon", "power1_max", 2e9, 1e6, "Power limit."),
    Sensor("tt_tdc_a", "hwmon", "curr1_input", 2_000_000, 1000, "Current drawn."),
    Sensor("tt_vcore_v", "hwmon", "in0_input", 5000, 1000, "Core voltage."),
    Sensor("tt_fan_speed_rpm", "hwmon", "fan1_input", 50_000, 1, "Speed of its fan."),
    Sensor(
        "tt_thermal_trips_total",
        "class",
        "tt_therm_trip_count",
        ALL_ONES - 1,
        1,
        "Shutdowns by critical temperature since power-on.",
    ),
    Sensor(
        "tt_pcie_link_speed_gts",
        "pci",
        "current_link_speed",
        128,
        1,
        "PCIe speed per lane, in GT/s.",
        link_speed,
    ),
    Sensor(
        "tt_pcie_link_max_speed_gts",
        "pci",
        "max_link_speed",
        128,
        1,
        "Largest PCIe speed per lane that the chip can do, in GT/s.",
        link_speed,
    ),
    Sensor(
        "tt_pcie_link_width", "pci", "current_link_width", 32, 1, "PCIe lanes in use."
    ),
    Sensor(
        "tt_pcie_link_max_width",
        "pci",
        "max_link_width",
        32,
        1,
        "PCIe lanes of the chip.",
    ),
    Sensor(
        "tt_pcie_correctable_errors_total",
        "pci",
        "aer_dev_correctable",
        2**63,
        1,
        "PCIe errors that were corrected.",
        total_errors,
    ),
    Sensor(
        "tt_device_plugin_device_node_users",
        "proc",
        "pids",
        4096,
        1,
        "How often its device node is open.",
        count_words,
    ),
)
HELP = {
    "tt_device_plugin_info": "Versions; always 1.",
    "tt_device_plugin_registered": "1 while the resource's stream is open.",
    "tt_device_plugin_registrations_total": "Registrations, by what came before.",
    "tt_device_plugin_allocations_total": "Containers that were given cards.",
    "tt_device_plugin_refusals_total": "Calls refused.",
    "tt_device_plugin_cards": "Cards offered.",
    "tt_device_plugin_cards_not_offered": "Cards not offered.",
    "tt_device_plugin_card_healthy": "1 if the card is offered and Healthy.",
    "tt_device_plugin_card_verdict": "Why the card is healthy or not; always 1.",
    "tt_device_plugin_chip_info": "Facts about a chip; always 1.",
    "tt_device_plugin_heartbeat_age_seconds": "Since the heartbeat was seen to change.",
    "tt_device_plugin_junk_readings_total": "Sensor values that cannot be.",
} | {sensor.metric: sensor.help for sensor in SENSORS}


class MetricsPage:
    """A page in Prometheus' text format 0.0.4."""

    def __init__(self) -> None:
        self._lines: dict[str, list[str]] = {}  # all of one metric must stand together

    def add(self, metric: str, value: float, **labels: str) -> None:
        """Add a sample."""
        if metric not in self._lines:
            kind = "counter" if metric.endswith("_total") else "gauge"
            help_line = f"# HELP {metric} {HELP[metric]}"
            self._lines[metric] = [help_line, f"# TYPE {metric} {kind}"]
        # Texts are printable ASCII: JSON quotes and escapes that as this format does.
        pairs = [f"{name}={json.dumps(text)}" for name, text in labels.items()]
        self._lines[metric].append(f"{metric}{{{','.join(pairs)}}} {float(value)}")

    def text(self) -> str:
        """The page."""
        return "".join(f"{line}\n" for line in chain(*self._lines.values()))


class Metrics:
    """What a scrape gets. Callable in any thread."""

    def __init__(self, registrar: Registrar) -> None:
        self.registrar = registrar
        self.inventory = registrar.inventory
        self.junk: Counter[str] = Counter()  # PCI address -> values that cannot be
        self._reading: set[ChipReader] = set()  # of whose chips a scrape reads sensors

    def page(self, now: float) -> str:
        """All metrics. `now` is of time.monotonic()."""
        page = MetricsPage()
        snapshot = self.inventory.snapshot
        page.add(
            "tt_device_plugin_info",
            1,
            version=__version__,
            python=PYTHON_VERSION,
            grpcio=grpc.__version__,
            driver=snapshot.driver,
        )
        self._add_resources(page, snapshot)
        not_offered = [card for card in snapshot.cards if not card.resource]
        page.add("tt_device_plugin_cards_not_offered", len(not_offered))

        for card in snapshot.cards:
            labels = {"card": card.id, "resource": card.resource or ""}
            healthy = bool(card.resource) and card.verdict.health == HEALTHY
            page.add("tt_device_plugin_card_healthy", healthy, **labels)
            kind = card.verdict.kind
            page.add("tt_device_plugin_card_verdict", 1, **labels, kind=kind)
            for chip in card.chips:
                self._add_chip(page, card, chip, now)
        return page.text()

    def _add_resources(self, page: MetricsPage, snapshot: Snapshot) -> None:
        counts = dict(self.registrar.shared.counts)
        for resource, problem in self.registrar.registration_status().items():
            page.add("tt_device_plugin_registered", not problem, resource=resource)
            cards = snapshot.of(resource).values()
            healths = Counter(card.verdict.health for card in cards)
            for health in (HEALTHY, UNHEALTHY):
                page.add(
                    "tt_device_plugin_cards",
                    healths[health],
                    resource=resource,
                    health=health,
                )
            # A counter that is there before its first event shows that event as one.
            counts.setdefault(
                ("tt_device_plugin_allocations_total", (("resource", resource),)), 0
            )
        for (metric, labels), count in counts.items():
            page.add(metric, count, **dict(labels))

    def _add_chip(self, page: MetricsPage, card: Card, chip: Chip, now: float) -> None:
        labels = {"card": card.id, "chip": chip.pci}
        reader = self.inventory.readers.get(chip.class_device)  # None: it is gone
        page.add(
            "tt_device_plugin_chip_info",
            1,
            **labels,
            model=card.model,
            arch=chip.arch,
            serial=chip.serial,
            firmware=chip.firmware,
            device_node=chip.device_node if reader else "",
        )
        if not reader:
            return

        history = reader.history
        if history.heartbeat is not None:
            age = now - history.changed_at
            page.add("tt_device_plugin_heartbeat_age_seconds", age, **labels)
        if self._may_read(reader):
            self._reading.add(reader)
            try:
                self._add_sensors(page, chip, labels)
            finally:
                self._reading.discard(reader)
        junk = self.junk[chip.pci]
        page.add("tt_device_plugin_junk_readings_total", junk, **labels)

    def _may_read(self, reader: ChipReader) -> bool:
        """Whether to read sensors of this reader's chip.

        Not with a driver before 2.7: such a read while the chip disappears can oops the
        kernel (tt-kmd a972eed). Not of a chip whose reads hang. If it begins to hang in
        a scrape, that one waits, and the others do without it.
        """
        numbers = re.findall("[0-9]+", self.inventory.snapshot.driver)
        version = [int(number) for number in numbers]
        answers = reader.has_read.is_set() and reader.polls_since_read < 2
        return version >= [2, 7] and answers and reader not in self._reading

    def _add_sensors(
        self, page: MetricsPage, chip: Chip, labels: Mapping[str, str]
    ) -> None:
        sysfs_root = self.inventory.settings.sysfs_root
        folder = class_folder(sysfs_root, chip.index)
        # The newest: a reset makes another hwmonX, and old drivers leave the dead one
        # (tt-kmd#25).
        monitors = [str(path) for path in Path(f"{folder}/device/hwmon").glob("hwmon*")]
        newest = max(monitors, key=lambda path: (len(path), path), default="")
        folders = {
            "class": folder,
            "pci": f"{folder}/device",
            "hwmon": newest,
            "proc": f"{sysfs_root.parent}/proc/driver/{DRIVER}/{chip.index}",
        }
        for sensor in SENSORS:
            try:
                text = read_attribute(f"{folders[sensor.folder]}/{sensor.file}")
            except OSError:
                continue
            try:
                value = sensor.parse(text)
            except ValueError:
                value = math.inf
            if 0 <= value <= sensor.largest:
                page.add(sensor.metric, value / sensor.divisor, **labels)
            else:
                self.junk[chip.pci] += 1


# ---- HTTP pages ----


class Page(NamedTuple):
    """What an HTTP request is answered with."""

    status: HTTPStatus
    text: str


def healthz(inventory: Inventory, now: float) -> Page:
    """Whether this process works, whatever state the cards and the kubelet are in.

    If the event loop is stuck, there is no answer at all.
    """
    age = max(0.0, now - inventory.polled_at)
    trouble = inventory.poll_trouble.problem
    if age > max(10.0, 3 * inventory.settings.poll_seconds):
        text = f"stuck: the last poll ended {age:.0f} s ago. {trouble}"
        return Page(HTTPStatus.SERVICE_UNAVAILABLE, text)
    return Page(HTTPStatus.OK, f"ok: the last poll ended {age:.1f} s ago. {trouble}")


def readyz(registrar: Registrar) -> Page:
    """Whether all resources are registered, if any, or this instance stands by."""
    if not registrar.inventory.snapshot.polled:
        text = "the first poll has not ended yet"
        return Page(HTTPStatus.SERVICE_UNAVAILABLE, text)
    if registrar.lock.standby_reason:
        return Page(HTTPStatus.OK, registrar.lock.standby_reason)
    status = registrar.registration_status()
    if not status:
        text = "no cards to register: waiting for some to appear"
        return Page(HTTPStatus.OK, text)

    lines = []
    for resource, problem in status.items():
        text = f"not registered: {problem}" if problem else "registered"
        lines.append(f"{resource}: {text}")
    is_ready = not any(status.values())
    code = HTTPStatus.OK if is_ready else HTTPStatus.SERVICE_UNAVAILABLE
    return Page(code, "\n".join(lines))


REQUEST_S = 5.0  # how long a client may take to ask, and then to read the answer
REQUEST_HEAD_BYTES = 8192
CLIENTS = 100  # connections at once; polls need file descriptors, too
BACKLOG = (
    512  # connections that wait to be accepted; a full queue costs others a second
)


class PageServer:
    """A small HTTP server on the event loop. `pages`: path -> what makes the page."""

    def __init__(self, pages: Mapping[str, Callable[[], Awaitable[Page]]]) -> None:
        self.pages = pages
        self._failures: dict[str, str] = {}  # path -> how it failed last
        # In the order in which they came; the values have no meaning.
        self._clients: dict[asyncio.StreamWriter, None] = {}

    async def listen(self, address: tuple[str, int]) -> asyncio.Server:
        """Open the port; address "" is all, IPv4 and IPv6. Raises OSError."""
        host, port = address
        everywhere = host == "" and socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if everywhere or ":" in host else socket.AF_INET
        listener = socket.create_server(
            (host, port), family=family, backlog=BACKLOG, dualstack_ipv6=everywhere
        )
        return await asyncio.start_server(
            self._serve_client, sock=listener, limit=REQUEST_HEAD_BYTES, backlog=BACKLOG
        )

    def close_clients(self) -> None:
        """End all connections."""
        for writer in self._clients:
            writer.transport.abort()

    async def _serve_client(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self._clients[writer] = None
        if len(self._clients) > CLIENTS:
            # Clients that say nothing must not keep out one that asks.
            oldest = next(iter(self._clients))
            del self._clients[oldest]
            oldest.transport.abort()
        try:
            answer = await self._answer(reader)
            writer.write(answer)
            writer.write_eof()
            await asyncio.wait_for(finish(reader, writer), REQUEST_S)
        except (OSError, EOFError, asyncio.TimeoutError) as error:
            log.debug("HTTP: %r", error)
        finally:
            self._clients.pop(writer, None)
            writer.close()

    async def _answer(self, reader: asyncio.StreamReader) -> bytes:
        """Read a request and answer it. Raises TimeoutError, EOFError, OSError."""
        try:
            head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), REQUEST_S)
        except asyncio.LimitOverrunError:
            text = f"a request may have a head of {REQUEST_HEAD_BYTES} bytes"
            return response(Page(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, text))

        request_line = re.match(rb"([A-Z]+) ([^ ?]+)\S* HTTP/1\.\d\r\n", head)
        if not request_line:
            return response(Page(HTTPStatus.BAD_REQUEST, "this is no HTTP/1 request"))
        method = request_line.group(1).decode()
        path = request_line.group(2).decode("ascii", "replace")
        if method not in ("GET", "HEAD"):
            text = f"there is only GET and HEAD, not {method}"
            return response(Page(HTTPStatus.METHOD_NOT_ALLOWED, text))
        return response(await self._make_page(path), with_text=method == "GET")

    async def _make_page(self, path: str) -> Page:
        if path not in self.pages:
            text = f"no such page; there are {', '.join(self.pages)}"
            return Page(HTTPStatus.NOT_FOUND, text)
        try:
            return await self.pages[path]()
        except Exception as error:  # a defect must be seen, in the page and in the log
            if self._failures.get(path) != repr(error):  # once, not at each scrape
                log.exception("%s failed", path)
            self._failures[path] = repr(error)
            return Page(HTTPStatus.INTERNAL_SERVER_ERROR, repr(error))


def response(page: Page, with_text: bool = True) -> bytes:
    """The bytes of an HTTP response."""
    body = page.text.rstrip().encode() + b"\n"
    head = [
        f"HTTP/1.1 {page.status.value} {page.status.phrase}",
        "Content-Type: text/plain; version=0.0.4; charset=utf-8",
        f"Content-Length: {len(body)}",
        "Allow: GET, HEAD",
        "Connection: close",
        "\r\n",
    ]
    return "\r\n".join(head).encode() + (body if with_text else b"")


async def finish(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Send what is left, and wait until the client hangs up.

    Bytes that are unread when a connection is closed make Linux reset it, and the
    client can lose the end of the page (DingoCache#347).
    """
    await writer.drain()
    while await reader.read(REQUEST_HEAD_BYTES):
        pass


async def serve_pages(registrar: Registrar) -> None:
    """Serve the HTTP pages, if they are wanted, until this is cancelled.

    While the port is taken, it tries again once a second.
    """
    address = registrar.inventory.settings.listen
    if address is None:
        return
    metrics = Metrics(registrar)

    async def make_healthz() -> Page:
        return healthz(registrar.inventory, time.monotonic())

    async def make_readyz() -> Page:
        return readyz(registrar)

    async def make_metrics() -> Page:  # it reads files
        return Page(HTTPStatus.OK, await in_thread(metrics.page, time.monotonic()))

    pages = PageServer(
        {"/healthz": make_healthz, "/readyz": make_readyz, "/metrics": make_metrics}
    )
    host = f"[{address[0]}]" if ":" in address[0] else address[0] or "all addresses"
    trouble = LogOnChange()
    server = None
    while server is None:
        try:
            server = await pages.listen(address)
        except OSError as error:  # an instance that ends may still have it
            why = os.strerror(error.errno or 0)
            trouble.set(f"no HTTP on port {address[1]} of {host}: {why}; trying again")
            await asyncio.sleep(1)

    port = server.sockets[0].getsockname()[1]
    log.info("HTTP on port %d of %s: %s", port, host, ", ".join(pages.pages))
    try:
        await asyncio.Event().wait()
    finally:
        server.close()
        pages.close_clients()


# ==== F. Files for other tools: a CDI specification, and node labels ==================

CDI_KIND = "tenstorrent.com/card"
CDI_FILE = "tenstorrent.com-card.json"
# The lowest with hostPath and names that begin with a digit, and podman 4.3's highest.
CDI_VERSION = "0.5.0"
LABELS_FILE = "tt-device-plugin"


def cdi_devices(snapshot: Snapshot) -> dict[str, list[Chip]]:
    """CDI name -> chips: healthy cards by ID, by the N of each chip, and `all`."""
    named: dict[str, list[Chip]] = {}
    for card in snapshot.cards:
        if card.resource and card.verdict.health == HEALTHY:
            numbers = [str(chip.index) for chip in card.chips]
            for name in (card.id, *numbers, "all"):
                named.setdefault(name, []).extend(card.chips)
    return named


def cdi_spec(settings: Settings, snapshot: Snapshot) -> str:
    """The CDI specification of the healthy cards, for podman and docker.

    It is "" without cards, since an empty one is invalid. Its device nodes are not
    links, which runtimes refuse here: so it follows N.
    """
    devices = []
    for name, chips in sorted(cdi_devices(snapshot).items()):
        nodes = []
        for chip in chips:
            host = os.devnull if settings.fake else chip.device_node
            node = {"path": chip.device_node, "hostPath": host, "permissions": "rw"}
            nodes.append(node)
        edits: dict[str, Any] = {"deviceNodes": nodes}
        if wants_hugepages(settings, chips):
            mount = {
                "hostPath": HUGEPAGES,
                "containerPath": HUGEPAGES,
                "options": ["rbind", "rw"],
            }
            edits["mounts"] = [mount]
        devices.append({"name": name, "containerEdits": edits})
    if not devices:
        return ""
    spec = {"cdiVersion": CDI_VERSION, "kind": CDI_KIND, "devices": devices}
    return json.dumps(spec, indent=2) + "\n"


def node_topology(cards: Sequence[Card]) -> str:
    """What tt-metal calls a node with these cards, if they leave no doubt, or ""."""
    models = Counter(card.model for card in cards)
    if models == {"n300": 4}:
        return "t3000"  # also called QuietBox
    if len(cards) == 32 and len(galaxy_trays(cards)) == 32:
        return "galaxy"
    return ""


def node_labels(settings: Settings, snapshot: Snapshot) -> str:
    """Node Feature Discovery's features.d file: what seldom changes, so no health."""
    labels = {}
    for resource in snapshot.resources:
        model = resource.partition("/")[2]
        cards = snapshot.of(resource).values()
        labels[f"{model}.count"] = str(len(cards))
        firmware = {chip.firmware for card in cards for chip in card.chips}
        if len(firmware) == 1:
            labels[f"{model}.firmware"] = firmware.pop()
    offered = [card for card in snapshot.cards if card.resource]
    labels["topology"] = node_topology(offered)
    labels["driver-version"] = snapshot.driver if offered else ""

    lines = []
    for name, value in labels.items():
        # A value has at most 63 letters, digits and -_. with no sign at either end.
        value = re.sub("[^A-Za-z0-9_.-]", "_", value)[:63].strip("-_.")
        if value:
            lines.append(f"{settings.resource_domain}/{name}={value}\n")
    return "".join(lines)


class KeptFile(NamedTuple):
    """A file that is kept as the newest snapshot says."""

    path: Path
    make: Callable[[Settings, Snapshot], str]  # its text; "" for no file
    trouble: LogOnChange

    @property
    def draft(self) -> Path:
        """Where it is written. Not *.json, which CDI runtimes read."""
        return self.path.with_name(f".{self.path.name}.new")

    def keep(self, settings: Settings, snapshot: Snapshot) -> None:
        """Write it if it says something else."""
        try:
            text = self.make(settings, snapshot)
            there = ""
            if self.path.exists():
                there = self.path.read_text(errors="replace")
            if text != there:
                self._write(text)
            self.trouble.set("", cleared=f"{self.path} is kept again")
        except OSError as error:
            why = error.strerror
            self.trouble.set(f"cannot keep {self.path}: {why}; trying again")

    def _write(self, text: str) -> None:
        if not text:
            self.path.unlink()
            return
        folder = self.path.parent
        if not folder.is_dir():
            folder.mkdir()
            folder.chmod(0o755)  # whoever reads them may be another user
        self.draft.write_text(text)
        self.draft.chmod(0o644)
        self.draft.replace(self.path)  # so that nobody reads half of it


class KeptFiles:
    """The files that --cdi-dir and --labels-dir ask for.

    They are written in a thread that nothing waits for: their folder may hang.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._files = []
        if settings.cdi_dir:
            path = settings.cdi_dir / CDI_FILE
            self._files.append(KeptFile(path, cdi_spec, LogOnChange()))
        if settings.labels_dir:
            path = settings.labels_dir / LABELS_FILE
            self._files.append(KeptFile(path, node_labels, LogOnChange()))
        self._thread = threading.Thread()  # the one that writes

    def keep(self, snapshot: Snapshot) -> None:
        """Make them say what `snapshot` does. Each poll calls it, so it tries again."""
        if self._files and not self._thread.is_alive():
            self._thread = threading.Thread(
                target=self._keep, args=(snapshot,), daemon=True
            )
            self._thread.start()

    def _keep(self, snapshot: Snapshot) -> None:
        for file in self._files:
            file.keep(self.settings, snapshot)

    def remove(self) -> None:
        """Remove them, once they are written. Waits for that for 0.5 s at most."""
        ending = threading.Thread(target=self._remove, daemon=True)
        ending.start()
        ending.join(0.5)

    def _remove(self) -> None:
        if self._thread.is_alive():
            self._thread.join()
        for file in self._files:
            for path in (file.path, file.draft):
                with contextlib.suppress(OSError):
                    path.unlink()


# ==== G. The command line: --fake, --list, --dry-run, and main() ======================


class FakeModel(NamedTuple):
    """How the made-up cards of a model look."""

    card_type: str  # in tt_card_type
    arch: str
    product: int  # product code in the serial (tt-kmd telemetry.c)
    trays: str = ""  # of a Galaxy: the high hex digit of the buses of trays 1 to 4


FAKE_CARDS = {
    "n150": FakeModel("n150", "wormhole", 0x18),
    "n300": FakeModel("n300", "wormhole", 0x14),
    "galaxy-wormhole": FakeModel("galaxy-wormhole", "wormhole", 0x35, trays="c804"),
    "p100": FakeModel("p100a", "blackhole", 0x43),
    "p150": FakeModel("p150a", "blackhole", 0x40),
    "p300": FakeModel("p300a", "blackhole", 0x45),
    "galaxy-blackhole": FakeModel("galaxy-blackhole", "blackhole", 0x47, trays="04c8"),
}
FAKE_CHIPS = 200  # at most


def lay_out(top: Path, chip: Chip, node: str = os.devnull) -> None:
    """Make what tt-kmd 2.10 shows of `chip`, in the folders sys and dev of `top`.

    Its device node is a link to `node`. A fact that is "" is a file that is not there.
    As in a probe, the link in the class comes last.
    """
    device = f"sys/devices/pci{chip.pci[:7]}/{chip.pci}"
    entry = f"{device}/{DRIVER}/{DRIVER}!{chip.index}"
    rdev = os.stat(node).st_rdev
    device_id = {arch: number for number, arch in ARCHITECTURES.items()}[chip.arch]
    files = {
        f"sys/module/{DRIVER}/version": "2.10.0",
        f"{device}/vendor": VENDOR,
        f"{device}/device": device_id,
        f"{device}/numa_node": "-1" if chip.numa_node is None else str(chip.numa_node),
        f"{device}/iommu_group/type": chip.iommu,
        f"{entry}/dev": f"{os.major(rdev)}:{os.minor(rdev)}",
        f"{entry}/tt_card_type": chip.card_type,
        f"{entry}/tt_asic_id": chip.asic_id,
        f"{entry}/tt_serial": chip.serial,
        f"{entry}/tt_fw_bundle_ver": chip.firmware,
    }
    for path, text in files.items():
        if text:
            (top / path).parent.mkdir(parents=True, exist_ok=True)
            (top / path).write_text(text)

    links = {
        f"{entry}/device": "../..",
        f"sys/bus/pci/devices/{chip.pci}": f"../../../../{device}",
        f"dev/{DRIVER}/{chip.index}": node,
        f"sys/class/{DRIVER}/{DRIVER}!{chip.index}": f"../../../{entry}",
    }
    for path, target in links.items():
        (top / path).parent.mkdir(parents=True, exist_ok=True)
        (top / path).symlink_to(target)


def fake_address(model: FakeModel, board: int, index: int) -> str:
    """A PCI address: N + 1 as the bus, or a place in a Galaxy.

    Each Galaxy has a PCI domain of its own, with four trays of eight chips.
    """
    if not model.trays:
        return f"0000:{index + 1:02x}:00.0"
    galaxy, place = divmod(board, 32)
    tray, position = divmod(place, 8)
    domain = galaxy + (1 if model.arch == "wormhole" else 17)
    return f"{domain:04x}:{model.trays[tray]}{position + 1}:00.0"


def make_fake_tree(top: Path, cards: Mapping[str, int]) -> None:
    """Lay out these cards, a number for each model, in `top`."""
    index = 0
    for name, count in cards.items():
        model = FAKE_CARDS[name]
        for board in range(count):
            serial = f"{model.product << 36 | 0xFA4E0000 | board + 1:016X}"
            for part in range(chips_per_card(model.card_type)):
                asic_id = 0xFA4E << 48 | model.product << 32 | board << 8 | part
                chip = Chip(
                    fake_address(model, board, index),
                    index,
                    arch=model.arch,
                    card_type=model.card_type,
                    asic_id=f"{asic_id:016X}",
                    serial=serial,
                    firmware="19.5.0.0",
                )
                lay_out(top, chip)
                index += 1


# ---- Flags. What reads a value raises ValueError for one that is wrong. ----


def switch(text: str) -> bool:
    """The value of an environment variable for a flag without a value."""
    words = {
        "true": True,
        "1": True,
        "yes": True,
        "false": False,
        "0": False,
        "no": False,
    }
    if text.lower() not in words:
        raise ValueError
    return words[text.lower()]


def fake_spec(text: str) -> dict[str, int]:
    """Read "n150=2,p300=1"."""
    cards: dict[str, int] = {}
    chips = 0
    for part in text.split(","):
        model, _, count = part.strip().partition("=")
        if model not in FAKE_CARDS or model in cards or int(count) < 1:
            raise ValueError
        cards[model] = int(count)
        chips += int(count) * chips_per_card(FAKE_CARDS[model].card_type)
    if chips > FAKE_CHIPS:
        raise ValueError
    return cards


def absolute_path(text: str) -> Path:
    """A path that does not depend on the current folder."""
    if not text.startswith("/") or "\0" in text:
        raise ValueError
    return Path(text)


def poll_seconds(text: str) -> float:
    """Seconds, from 0.1 to 60."""
    seconds = float(text)
    if not 0.1 <= seconds <= 60:
        raise ValueError
    return seconds


def domain(text: str) -> str:
    """What may stand before the slash of a resource."""
    label = "[a-z0-9]([-a-z0-9]*[a-z0-9])?"
    is_reserved = re.search(r"kubernetes\.io$|^requests\.", text)
    if (
        len(text) > 253
        or is_reserved
        or not re.fullmatch(rf"{label}(\.{label})*", text)
    ):
        raise ValueError
    return text


def listen_address(text: str) -> tuple[str, int]:
    """An IP address, "" for all, and a port, 0 for any free one."""
    parts = urllib.parse.urlsplit(f"//{text}")
    if parts.netloc != text or "@" in text or parts.port is None:
        raise ValueError
    host = str(ipaddress.ip_address(parts.hostname)) if parts.hostname else ""
    return host, parts.port


def one_of(*words: str) -> Callable[[str], str]:
    """What reads one of these words."""

    def read(text: str) -> str:
        if text not in words:
            raise ValueError
        return text

    return read


class Flag(NamedTuple):
    """One flag, and the environment variable for it."""

    name: str
    metavar: str  # "" for a switch
    read: Callable[[str], Any]
    wanted: str  # what a value must be
    default: Any
    help: str  # the first words of its meaning in README

    @property
    def key(self) -> str:
        """Its name as an attribute."""
        return self.name.removeprefix("--").replace("-", "_")

    @property
    def variable(self) -> str:
        """The environment variable."""
        return f"TT_DEVICE_PLUGIN_{self.key.upper()}"

    def value(self, text: str) -> Any:
        """Read a value. Raises argparse.ArgumentTypeError."""
        try:
            return self.read(text)
        except ValueError:
            message = f"{text!r} is not {self.wanted}"
            raise argparse.ArgumentTypeError(message) from None


PATH = "an absolute path"
TRUTH = "true or false"
ON_OFF = (switch, TRUTH, False)
MODELS = ", ".join(FAKE_CARDS)
LEVELS = ("debug", "info", "warning", "error")
HUGEPAGES_MODES = ("auto", "always", "never")
DEFAULTS = Settings()
FLAGS = (
    Flag(
        "--list", "", *ON_OFF, "print what would be offered, and what would not and why"
    ),
    Flag("--json", "", *ON_OFF, "print the list as JSON; only with --list"),
    Flag(
        "--dry-run", "", *ON_OFF, "walk through the five steps with a built-in kubelet"
    ),
    Flag(
        "--fake",
        "MODEL=N[,...]",
        fake_spec,
        f"MODEL=N,... of {MODELS}, up to {FAKE_CHIPS} chips",
        DEFAULTS.fake,
        "use made-up cards instead of this node's, such as n150=2,p300=1",
    ),
    Flag(
        "--kubelet-dir",
        "DIR",
        absolute_path,
        PATH,
        DEFAULTS.kubelet_dir,
        "the kubelet's folder, with the sockets in DIR/device-plugins",
    ),
    Flag(
        "--sysfs-root",
        "DIR",
        absolute_path,
        PATH,
        DEFAULTS.sysfs_root,
        "where sysfs is mounted",
    ),
    Flag(
        "--dev-root",
        "DIR",
        absolute_path,
        PATH,
        DEFAULTS.dev_root,
        "where the plugin sees the host's /dev",
    ),
    Flag(
        "--poll-seconds",
        "S",
        poll_seconds,
        "seconds, from 0.1 to 60",
        DEFAULTS.poll_seconds,
        "seconds between polls, from 0.1 to 60",
    ),
    Flag(
        "--resource-domain",
        "D",
        domain,
        "a DNS name that resources may have, such as tenstorrent.com",
        DEFAULTS.resource_domain,
        "what comes before the slash in a resource's name",
    ),
    Flag(
        "--variants", "", *ON_OFF, "offer p150a, p150b and p150c as separate resources"
    ),
    Flag(
        "--hugepages",
        "|".join(HUGEPAGES_MODES),
        one_of(*HUGEPAGES_MODES),
        f"one of {', '.join(HUGEPAGES_MODES)}",
        DEFAULTS.hugepages,
        "whether containers get the host's /dev/hugepages-1G",
    ),
    Flag(
        "--cdi-dir",
        "DIR",
        absolute_path,
        PATH,
        DEFAULTS.cdi_dir,
        "keep a CDI specification in DIR, for podman and docker",
    ),
    Flag(
        "--labels-dir",
        "DIR",
        absolute_path,
        PATH,
        DEFAULTS.labels_dir,
        "keep a file of node labels in DIR, for Node Feature Discovery",
    ),
    Flag(
        "--listen",
        "ADDR:PORT",
        listen_address,
        "IP-ADDRESS:PORT, such as [::1]:7762, or :7762 for all addresses",
        DEFAULTS.listen,
        "serve /healthz, /readyz and /metrics over HTTP",
    ),
    Flag(
        "--log-format",
        "text|json",
        one_of("text", "json"),
        "one of text, json",
        "text",
        "write the log, on stderr, as text or as JSON",
    ),
    Flag(
        "--log-level",
        "LEVEL",
        one_of(*LEVELS),
        f"one of {', '.join(LEVELS)}",
        "info",
        "the least severe messages to log: debug, info, warning or error",
    ),
)


def parse(argv: Sequence[str], environment: Mapping[str, str]) -> argparse.Namespace:
    """The flags: those of `argv` win over the environment's.

    Exits with code 2 if one is wrong.
    """
    parser = argparse.ArgumentParser(
        prog="tt-device-plugin",
        description="Kubernetes device plugin for Tenstorrent cards. It serves until "
        "SIGTERM.",
        epilog="Every flag can be set by an environment variable: --kubelet-dir is "
        "TT_DEVICE_PLUGIN_KUBELET_DIR, and so on. A flag without a value takes true "
        "or false there. Exit codes: 0 done, or told to stop; 1 cannot work; 2 wrong "
        "usage.",
        allow_abbrev=False,
    )
    problems = []
    for flag in FLAGS:
        default = flag.default
        text = environment.get(flag.variable)
        if text:
            try:
                default = flag.value(text)
            except argparse.ArgumentTypeError as error:
                problems.append(f"environment variable {flag.variable}: {error}")
        about = flag.help
        if flag.default:
            about = f"{flag.help} (default: {flag.default})"
        kind: dict[str, Any] = {"type": flag.value, "metavar": flag.metavar}
        if not flag.metavar:
            kind = {"action": "store_true"}
        parser.add_argument(flag.name, default=default, help=about, **kind)
    parser.add_argument("--version", action="version", version=version_text())
    options = parser.parse_args(argv)
    problems += find_wrong_combination(options)
    if problems:
        parser.error(problems[0])
    return options


def version_text() -> str:
    """What --version prints."""
    packages = f"grpcio {grpc.__version__}, protobuf {google.protobuf.__version__}"
    return f"tt-device-plugin {__version__} (Python {PYTHON_VERSION}, {packages})"


def find_wrong_combination(options: argparse.Namespace) -> list[str]:
    """What is wrong with flags that are right one by one."""
    if options.json and not options.list:
        return ["--json goes with --list"]
    if options.list and options.dry_run:
        return ["--list and --dry-run exclude each other"]

    folder = Settings(kubelet_dir=options.kubelet_dir).plugin_dir
    longest = folder / socket_name("m" * MODEL_LENGTH, "0" * 6)
    excess = len(os.fsencode(longest)) - 107  # Linux unix(7): 108 with the NUL
    if excess > 0:
        text = f"is {excess} bytes too long for the paths of sockets in it"
        return [f"--kubelet-dir {options.kubelet_dir} {text}"]
    return []


# ---- --list ----


def describe(card: Card) -> dict[str, Any]:
    """A card as --list --json prints it."""
    return {
        "id": card.id,
        "resource": card.resource,
        "model": card.model,
        "arch": card.chips[0].arch,
        "device_nodes": card.device_nodes,
        "pci_addresses": [chip.pci for chip in card.chips],
        "numa_node": next(iter(card.numa_nodes), None),
        "board_serial": card.chips[0].serial,
        "firmware": card.chips[0].firmware,
        "health": card.verdict.health,
        "reason": card.verdict.reason,
    }


def list_text(snapshot: Snapshot) -> str:
    """The cards of a snapshot in columns, with the reasons below."""
    if not snapshot.cards:
        driver = (
            f"driver {snapshot.driver}" if snapshot.driver else "no driver is loaded"
        )
        return f"No Tenstorrent cards ({driver})."

    rows = [("RESOURCE", "ID", "DEVICE", "PCI ADDRESS", "NUMA", "HEALTH")]
    for card in snapshot.cards:
        row = (
            card.resource or "not offered",
            card.id,
            ",".join(str(chip.index) for chip in card.chips if chip.index >= 0),
            ",".join(chip.pci for chip in card.chips),
            ",".join(map(str, card.numa_nodes)) or "-",
            card.verdict.health,
        )
        rows.append(row)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        lines.append("  ".join(cells).rstrip())
    for card in snapshot.cards:
        if card.verdict.reason:
            lines.append(f"\n{card.id}: {card.verdict.reason}")
    return "\n".join(lines)


# ---- --dry-run ----


class DryRunKubelet(rpc.RegistrationServicer):
    """A kubelet that takes any registration."""

    def __init__(self) -> None:
        self.requests: asyncio.Queue[api.RegisterRequest] = asyncio.Queue()

    async def Register(self, request: api.RegisterRequest, context: Any) -> api.Empty:
        """Hand it on."""
        await self.requests.put(request)
        return api.Empty()


async def show(*lines: object) -> None:
    """Print lines, in a thread: a pipe that nobody reads must stop nothing else."""
    await in_thread(functools.partial(print, *lines, sep="\n", flush=True))


async def show_step(step: str, *facts: object) -> None:
    """Print one of the five steps, and what goes with it, each fact on one line."""
    lines = [" ".join(str(fact).split()) for fact in facts]
    await show(f"\n{step}", *lines)


async def dry_run(settings: Settings) -> int:
    """Play the kubelet for the real plugin, and show the five steps.

    Returns the exit code.
    """
    log.setLevel(logging.ERROR)  # the steps tell the story
    settings.plugin_dir.mkdir()
    server = grpc.aio.server()
    kubelet = DryRunKubelet()
    rpc.add_RegistrationServicer_to_server(kubelet, server)
    try:
        server.add_insecure_port(grpc_target(settings.plugin_dir / "kubelet.sock"))
        async with running(server):
            await dry_run_steps(settings, kubelet)
    except asyncio.TimeoutError:
        problem = "no answer in time"
    except grpc.aio.AioRpcError as error:
        problem = error.details() or error.code().name
    except (CannotWork, OSError, RuntimeError) as error:
        problem = str(error)
    else:
        await show("\nEvery step held.")
        return 0
    await show(f"\nFAILED after the step above: {problem}")
    return 1


async def dry_run_steps(settings: Settings, kubelet: DryRunKubelet) -> None:
    """All steps of all resources.

    Raises CannotWork, OSError, AioRpcError, TimeoutError.
    """
    await show_step(f"1. Discover: the cards under {settings.sysfs_root}")
    snapshot = await in_thread(Inventory(settings).poll, time.monotonic())
    await show(list_text(snapshot))
    left = set(snapshot.resources)
    if not left:
        raise CannotWork("no card could be offered")

    plugin = asyncio.create_task(serve(settings))
    try:
        while left:
            request = await next_request(kubelet, plugin)
            # A resource whose stream has ended registers again.
            if request.resource_name in left:
                left.remove(request.resource_name)
                await show_step("2. Register: the plugin calls the kubelet", request)
                target = grpc_target(settings.plugin_dir / request.endpoint)
                async with grpc.aio.insecure_channel(target) as channel:
                    await dry_run_resource(rpc.DevicePluginStub(channel), request)
    finally:
        await cancel_and_wait([plugin])


async def next_request(
    kubelet: DryRunKubelet, plugin: asyncio.Task[None]
) -> api.RegisterRequest:
    """The next registration. Raises TimeoutError, or what ended the plugin."""
    request = asyncio.create_task(kubelet.requests.get())
    done, _ = await asyncio.wait(
        [request, plugin], timeout=5, return_when=asyncio.FIRST_COMPLETED
    )
    if request in done:
        return request.result()
    request.cancel()
    if plugin in done:
        plugin.result()
    raise asyncio.TimeoutError


async def dry_run_resource(plugin: Any, request: api.RegisterRequest) -> None:
    """Steps 3 to 5 of one resource. Raises CannotWork, AioRpcError, TimeoutError."""
    resource = request.resource_name
    stream = plugin.ListAndWatch(api.Empty())
    message = await asyncio.wait_for(stream.read(), 5)
    step = f"the kubelet calls {request.endpoint}, and keeps the stream open"
    await show_step(f"3. ListAndWatch: {step}", *message.devices)
    healthy = [device.ID for device in message.devices if device.health == HEALTHY]
    if not healthy:
        raise CannotWork(f"no card of {resource} is healthy: its Pods would wait")

    for card_id in healthy:
        container = api.ContainerAllocateRequest(devices_ids=[card_id])
        allocate = api.AllocateRequest(container_requests=[container])
        answer = await plugin.Allocate(allocate, timeout=5)
        response = answer.container_responses[0]
        facts = [
            f"device {d.container_path} from {d.host_path} ({d.permissions})"
            for d in response.devices
        ]
        facts += [f"env {name}={value}" for name, value in response.envs.items()]
        facts += [
            f"mount {m.container_path} from {m.host_path}" for m in response.mounts
        ]
        step = f"a Pod that asks for one {resource} could get {card_id}:"
        await show_step(f"4. Allocate: {step}", *facts)

        start = api.PreStartContainerRequest(devices_ids=[card_id])
        await plugin.PreStartContainer(start, timeout=5)
        await show_step(f"5. PreStartContainer: {card_id} is still there and healthy")


# ---- main() ----

STOP_SIGNALS = {signal.SIGTERM, signal.SIGINT}


async def until_signal(work: Coroutine[Any, Any, int | None]) -> int:
    """Run `work` to its end, or until SIGTERM or SIGINT cancels it.

    Returns the exit code. Both signals are blocked in all threads, so that none can
    kill the process while it starts or ends; a thread waits for the first one.
    """
    task = asyncio.ensure_future(work)
    loop = asyncio.get_running_loop()

    def wait_for_signal() -> None:
        signal.sigwait(STOP_SIGNALS)
        # RuntimeError: the loop is closed, as the work has ended by itself.
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(task.cancel)

    threading.Thread(target=wait_for_signal, name="signals", daemon=True).start()
    try:
        return await task or 0
    except asyncio.CancelledError:
        log.info("told to stop, and done")
        return 0
    finally:
        # gRPC's handlers end after their server. asyncio.run would cancel them, with a
        # traceback.
        ending = asyncio.all_tasks() - {asyncio.current_task()}
        if ending:
            await asyncio.wait(ending, timeout=STOP_S)


def temporary_folder(stack: contextlib.ExitStack) -> Path:
    """A folder that goes with `stack`. Raises CannotWork."""
    import tempfile  # takes 5 ms, and only made-up cards and dry runs need it

    try:
        folder = tempfile.TemporaryDirectory(
            prefix="tt-plugin-", ignore_cleanup_errors=True
        )
    except OSError as error:
        remedy = "set TMPDIR to a folder that can be written"
        text = f"cannot make a temporary folder: {error}; {remedy}"
        raise CannotWork(text) from error
    return Path(stack.enter_context(folder))


def run(options: argparse.Namespace, stack: contextlib.ExitStack) -> int:
    """Do what the flags say. Returns the exit code. Raises CannotWork, OSError."""
    names = [one.name for one in fields(Settings)]
    settings = Settings(**{name: getattr(options, name) for name in names})
    if options.fake:
        top = temporary_folder(stack)
        make_fake_tree(top, options.fake)
        settings = replace(settings, sysfs_root=top / "sys", dev_root=top / "dev")

    if options.list:
        snapshot = Inventory(settings).poll(time.monotonic())
        cards = [describe(card) for card in snapshot.cards]
        print(json.dumps(cards, indent=2) if options.json else list_text(snapshot))
        sys.stdout.flush()
        return 0
    if options.dry_run:
        folder = temporary_folder(stack)
        settings = replace(
            settings, kubelet_dir=folder, cdi_dir=None, labels_dir=None, listen=None
        )
        return asyncio.run(until_signal(dry_run(settings)))
    if options.fake:
        log.info(
            "made-up cards in %s: remove a tenstorrent!N in sys/class/tenstorrent to "
            "see one vanish",
            top,
        )
    return asyncio.run(until_signal(serve(settings)))


def exit_quietly(number: int, frame: object) -> NoReturn:
    """Handle a signal: leave, and clean up on the way out."""
    raise SystemExit(0)


def main() -> NoReturn:
    """The program. Ends the process; raises SystemExit(2) for wrong flags."""
    options = parse(sys.argv[1:], os.environ)
    for number in STOP_SIGNALS:
        signal.signal(number, exit_quietly)
    if not options.list:
        # Before any thread starts, which inherits this: see until_signal.
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    lines = set_up_logging(options.log_format, options.log_level)
    try:
        with contextlib.ExitStack() as stack:
            code = run(options, stack)
    except SystemExit:  # from exit_quietly
        code = 0
    except BrokenPipeError:  # --list, whose reader has gone
        code = 1
    except Exception as error:
        is_defect = not isinstance(error, (CannotWork, OSError))
        log.error("%s", error, exc_info=is_defect)
        code = 1

    # What has been logged is to be written, unless nobody reads it.
    with lines.all_tasks_done:
        lines.all_tasks_done.wait_for(lambda: not lines.unfinished_tasks, 0.5)
    # Python's own way out can wait for ever: for gRPC's threads, or for a reader of the
    # log or of what was printed.
    os._exit(code)


if __name__ == "__main__":
    main()
