#!/usr/bin/env python3
"""A Kubernetes device plugin for Tenstorrent cards, in one file, to be read from top to bottom.

What the kubelet expects of a device plugin, in five steps (README.md has the diagram):

1. **Discover.** Find the cards of this node and judge their health; here once a second, in sysfs
   (sections 3 to 5).
2. **Register.** Serve the DevicePlugin service on a Unix socket beside the kubelet's own, and tell
   the kubelet the socket's name and the resource, such as `tenstorrent.com/n150` (section 7).
3. **ListAndWatch.** The kubelet opens one stream and keeps it. Each message is the whole list. New
   Pods get Healthy cards only; a Pod that runs is left alone, whatever becomes of its cards (6).
4. **Allocate.** Once for each container that asks for cards, when its Pod is admitted: its device
   nodes, environment and mounts. The kubelet repeats the answer at each restart of the container.
5. **PreStartContainer.** Before each start and restart of it: are its cards there and healthy?

What this plugin guarantees beyond that:

- A resource is registered as long as a ListAndWatch stream of it is open. Whatever ends the stream,
  the plugin registers again once a kubelet answers.
- A card's ID comes from its hardware alone. A card that was offered stays listed while the plugin
  runs, Unhealthy with a reason until it is back.
- Unknown is not dead: missing files, old drivers and late telemetry decide nothing.
- A read that hangs costs its own card only, and no call waits for a read.

What it does not do: it opens no device node, resets no card, wipes no memory between Pods, and
talks to nobody but the kubelet. It knows of a card's health only what the driver shows in sysfs.

The one idea: a thread reads sysfs into an immutable snapshot, and everything else reads the newest
snapshot. Decisions are functions of what was read, what is remembered, and `now`. Three kinds of
threads: one for each chip's reads, one that polls, and the event loop, which serves the kubelet.

Words: a *chip* is one PCIe device, /dev/tenstorrent/N. A *card* is what a Pod gets: one chip, or
the two of a p300. It is *offered* if the kubelet is told of it, under a resource. The *device node*
is the file; *node* alone is the Kubernetes node. A *snapshot* holds the cards, each with its
*verdict* and the *reason* for it.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import errno
import fcntl
import functools
import io
import ipaddress
import json
import logging
import logging.handlers
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
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

# Read at the import: gRPC's own lines, such as that a peer has gone away, would be noise on stderr.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")

import google.protobuf.message
import grpc.aio
from grpc import StatusCode

import api_pb2 as api
import api_pb2_grpc as rpc

__version__ = "0.1.0"
log = logging.getLogger("tt-device-plugin")

# ==== 1. Settings =================================================================================


@dataclass(frozen=True, slots=True)
class Settings:
    """What the flags say. The fields are named after the flags; `--help` has their meaning."""

    kubelet_dir: Path = Path("/var/lib/kubelet")
    sysfs_root: Path = Path("/sys")
    dev_root: Path = Path("/dev")
    poll_seconds: float = 1.0
    resource_domain: str = "tenstorrent.com"
    variants: bool = False
    hugepages: str = "auto"
    cdi_dir: Path | None = None
    labels_dir: Path | None = None
    listen: tuple[str, int] | None = None  # "" for all addresses
    fake: Mapping[str, int] | None = None  # model -> how many; its tree is at sysfs_root, dev_root

    @property
    def plugin_dir(self) -> Path:
        """The folder that the kubelet and its plugins share sockets in."""
        return self.kubelet_dir / "device-plugins"


class CannotWork(Exception):
    """The plugin cannot start or go on. The text names the folder, the user, and the remedy."""


class LogOnChange:
    """A lasting problem, logged when it changes and not each time that it is found again."""

    problem = ""  # "" while there is none

    def set(self, problem: str, cleared: str = "", about: str = "") -> None:
        """Logs `problem` once when it appears or changes, and `cleared` once when it clears. Each
        line begins with `about`."""
        before, self.problem = self.problem, problem
        if problem and problem != before:
            log.warning("%s%s", about, problem)
        elif before and not problem and cleared:
            log.info("%s%s", about, cleared)


# ==== 2. Records: what was read, what follows from it, and what everybody else sees ===============

HEALTHY, UNHEALTHY = "Healthy", "Unhealthy"  # the device plugin API's words for a card's health
PENDING = "pending"  # ours: not to be offered; one that was before is Unhealthy, see make_card


@dataclass(frozen=True, slots=True)
class Chip:
    """Facts of a chip that stay while its class device exists. Texts are "" where there is none."""

    pci: str  # PCI address, 0000:01:00.0
    index: int = -1  # N of /dev/tenstorrent/N, another one after a reset; -1: no class device
    inode: int = 0  # of the class device's folder in sysfs: a chip that was probed anew has another
    pci_path: tuple[str, ...] = ()  # root bus and bridges above it, outermost first
    dev: str = ""  # "major:minor" of the device node
    arch: str = ""  # wormhole, blackhole
    card_type: str = ""  # n150, p300a, unknown (to the driver); "" without telemetry
    asic_id: str = ""  # 16 hex digits, unique on a host; "" if the driver has none
    serial: str = ""  # 16 hex digits, the board's: all chips of a Galaxy show the same
    firmware: str = ""  # bundle version, 19.5.0.0
    numa_node: int | None = None
    iommu: str = ""  # type of its IOMMU group: DMA, DMA-FQ, identity; "" without an IOMMU
    unknown: str = "pending"  # why nobody knows which card this is: a key of REASONS; "" if known

    @property
    def class_device(self) -> tuple[int, int, str]:
        """What tells its class device from all others."""
        return self.index, self.inode, self.pci

    @property
    def node(self) -> str:
        """Its device node, on the host and in a container."""
        return f"/dev/tenstorrent/{self.index}"

    @property
    def id(self) -> str:
        """Its name in /dev/tenstorrent/by-id; the PCI address where the driver has no ASIC id."""
        return f"{self.arch}-{self.asic_id}" if self.asic_id else self.pci

    @property
    def card_id(self) -> str:
        """The ID of the card that it is part of, from the chip's hardware alone: the kubelet
        remembers IDs across restarts of the plugin, and a chip that went by another one later would
        be given to two Pods. One that is not known is listed by its PCI address, not offered."""
        if self.unknown:
            return self.pci
        return f"p300-{self.serial}" if self.card_type.startswith("p300") else self.id


class Reading(NamedTuple):
    """What one poll saw of a chip."""

    heartbeat: int | None = None  # None: there is no such file, or it was not read: see `fault`
    fault: str = ""  # a key of REASONS that needs no history; "" if there is none
    detail: str = ""  # the error's name, such as EIO, for the fault `unreadable`


@dataclass(frozen=True, slots=True)
class Verdict:
    """The health of a chip or card."""

    health: str = HEALTHY  # HEALTHY, UNHEALTHY or PENDING
    kind: str = "ok"  # ok, or a key of REASONS
    reason: str = ""  # for the admin; without numbers that change from poll to poll


@dataclass(frozen=True, slots=True)
class Card:
    """What a Pod gets."""

    id: str  # at most 63 characters
    model: str  # n150; "" if not known
    resource: str | None  # tenstorrent.com/n150; None: not offered, the verdict says why
    chips: tuple[Chip, ...]  # one, or the two of a p300, ordered by PCI address; as last seen
    verdict: Verdict
    since: float = 0.0  # time.monotonic() since when it has had this health

    @property
    def numa_nodes(self) -> list[int]:
        """The NUMA nodes of its chips; [] if none is known."""
        return sorted({chip.numa_node for chip in self.chips if chip.numa_node is not None})

    @property
    def device_nodes(self) -> list[str]:
        """Where its chips' device nodes are now, or were last."""
        return [chip.node for chip in self.chips if chip.index >= 0]

    def __str__(self) -> str:
        return f"card {self.id} ({', '.join([self.model or 'model unknown', *self.device_nodes])})"


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The node's cards at one moment."""

    cards: tuple[Card, ...] = ()  # by resource, then PCI address; those that are not offered last
    driver: str = ""  # version of tt-kmd, "" if it is not loaded
    polled: bool = False  # False: nothing has been looked at yet

    def of(self, resource: str) -> dict[str, Card]:
        """The cards of one resource by ID."""
        return {card.id: card for card in self.cards if card.resource == resource}

    @property
    def resources(self) -> list[str]:
        """The resources to register."""
        return sorted({card.resource for card in self.cards if card.resource})


# ==== 3. Discovery: sysfs -> chips and readings ===================================================
# tt-kmd makes one class device a chip, /sys/class/tenstorrent/tenstorrent!N, with a link `device`
# to the PCI function. The tt_* files in it appear when the chip's firmware has delivered its
# telemetry: at once, up to two minutes later (Wormhole), or never. Driver and firmware decide which
# of them there are: any may be missing.

VENDOR = "0x1e52"  # Tenstorrent's PCI vendor id (tt-kmd enumerate.h)
# PCI device id -> architecture, as in /dev/tenstorrent/by-id (tt-kmd 2.6.0, its udev rule)
ARCHITECTURES = {"0x401e": "wormhole", "0xb140": "blackhole"}
PCI_ADDRESS = re.compile(r"[0-9a-f]{4,8}:[0-9a-f]{2}:[0-9a-f]{2}\.[0-7]")
PCI_PATH = re.compile(rf"pci[0-9a-f]{{4,8}}:[0-9a-f]{{2}}|{PCI_ADDRESS.pattern}")  # its parts
CARD_TYPE = r"[a-z0-9]([-a-z0-9.]{0,14}[a-z0-9])?"  # fits into the name of a resource and a socket


def read_attribute(path: str) -> str:
    """The text of a sysfs attribute, stripped; bytes that are no ASCII become '?'. Raises OSError.
    Blocks as long as the driver does: files that it fills are for a ChipReader alone."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        # A sysfs attribute holds at most one page (Linux Documentation/filesystems/sysfs.rst).
        return os.read(fd, 4096).decode("ascii", "replace").replace("\ufffd", "?").strip()
    finally:
        os.close(fd)


def attribute(path: str, pattern: str = r"[ -~]+") -> str:
    """The text of one attribute; "" where it is missing, cannot be read, or does not match."""
    with contextlib.suppress(OSError):
        text = read_attribute(path)
        if re.fullmatch(pattern, text):
            return text
    return ""


def hardware_id(path: str) -> str | None:
    """An ASIC id or board serial, 16 hex digits; "" if there is no such file. None if what it says
    makes no sense now: an error, or the all ones of a dead bus, or the all zeros of empty fuses."""
    text = attribute(path, r"[0-9A-F]{16}")
    if text in ("", "F" * 16, "0" * 16):
        return None if os.path.lexists(path) else ""
    return text


def is_device_node(path: str, dev: str) -> bool:
    """Whether `path` is, or links to, the character device `dev` ("major:minor"). Opens nothing."""
    with contextlib.suppress(OSError):
        status = os.stat(path)
        found = f"{os.major(status.st_rdev)}:{os.minor(status.st_rdev)}"
        return stat.S_ISCHR(status.st_mode) and found == dev
    return False


class Discovery:
    """All that the plugin knows of where Tenstorrent's chips are and what they say. README's "For
    another vendor's card" lists what else is Tenstorrent's own."""

    def __init__(self, settings: Settings) -> None:
        self.sysfs = str(settings.sysfs_root)
        self.dev_folder = f"{settings.dev_root}/tenstorrent"
        self._vendors: dict[str, str] = {}  # PCI address -> vendor id

    def folder(self, index: int) -> str:
        """The folder of class device `index`, with its tt_* files."""
        return f"{self.sysfs}/class/tenstorrent/tenstorrent!{index}"

    def driver_version(self) -> str:
        """The version of the loaded driver, or ""."""
        return attribute(f"{self.sysfs}/module/tenstorrent/version", r"[\w.+~-]{1,40}")

    def chips(self) -> list[Chip]:
        """The chips that have a class device; [] without the driver. Raises OSError."""
        names: list[str] = []
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            names = os.listdir(f"{self.sysfs}/class/tenstorrent")
        matches = (re.fullmatch(r"tenstorrent!(0|[1-9][0-9]{0,5})", name) for name in names)
        chips = (self.chip_at(int(match[1])) for match in matches if match)
        return [chip for chip in chips if chip]

    def chip_at(self, index: int) -> Chip | None:
        """The chip that is N now, as far as links tell, which never hang; None without one. The
        inode number tells one class device from the next in sysfs. Time stamps do not: they are
        made up when the folder comes into the cache."""
        folder = self.folder(index)
        with contextlib.suppress(OSError):  # it has just vanished
            # In a copied tree the entry is a plain folder; its link `device` lacks the bridges.
            link = os.readlink(folder if os.path.islink(folder) else f"{folder}/device")
            *above, pci = PCI_PATH.findall(link) or [""]
            if PCI_ADDRESS.fullmatch(pci):
                return Chip(pci, index, os.stat(folder).st_ino, tuple(above))
        return None

    def pci_functions(self, known: set[str]) -> Iterable[tuple[Chip, str]]:
        """Tenstorrent's PCI functions except those at `known` addresses, each with its PCI driver's
        name, or "none". Raises OSError."""
        folder, addresses = f"{self.sysfs}/bus/pci/devices", list[str]()
        with contextlib.suppress(FileNotFoundError):
            addresses = os.listdir(folder)
        before, self._vendors = self._vendors, {}
        for pci in addresses:  # a host has hundreds: each is asked for its vendor once
            vendor = self._vendors[pci] = before.get(pci) or attribute(f"{folder}/{pci}/vendor")
            if vendor == VENDOR and pci not in known:
                arch = ARCHITECTURES.get(attribute(f"{folder}/{pci}/device"), "")
                link = Path(folder, pci, "driver")
                yield Chip(pci, arch=arch), link.resolve().name if link.exists() else "none"

    def read(self, chip: Chip) -> tuple[Chip, Reading]:
        """What a chip is, as far as that was not known, and how it is. May hang with the driver."""
        if chip.unknown:
            chip = self.identify(chip)
        if not chip.firmware:
            file = f"{self.folder(chip.index)}/tt_fw_bundle_ver"
            chip = replace(chip, firmware=attribute(file, r"[0-9.]{1,40}"))
        reading = self.read_health(chip)
        # A reset may bring other firmware, and a dead bus shows none: read that again.
        if reading.fault in ("resetting", "bus-dead"):
            chip = replace(chip, firmware="")
        return chip, reading

    def identify(self, chip: Chip) -> Chip:
        """`chip` with all that sysfs tells about it."""
        folder = self.folder(chip.index)
        # A second look where the first one is incomplete: the driver makes the tt_* files one after
        # another, and a bus that is dead for a moment makes any type "unknown".
        for pause in (0.0, 0.1):
            time.sleep(pause)
            card_type = attribute(f"{folder}/tt_card_type", CARD_TYPE)
            asic_id, serial = (hardware_id(f"{folder}/tt_{name}") for name in ("asic_id", "serial"))
            if not card_type or (card_type != "unknown" and asic_id and serial):
                break
        dev = attribute(f"{folder}/dev", r"[0-9]+:[0-9]+")
        arch = ARCHITECTURES.get(attribute(f"{folder}/device/device"), "")
        numa = attribute(f"{folder}/device/numa_node", r"[0-9]{1,4}")  # -1: the host does not know
        iommu = attribute(f"{folder}/device/iommu_group/type", r"[A-Za-z-]{1,20}")
        # A p300 is paired by its serial. That of early boards ends in zeros and is not unique.
        unpaired = card_type.startswith("p300") and (serial or "")[8:] in ("", "0" * 8)
        nonsense = asic_id is None or (card_type == "unknown" and serial is None)
        unknown = "unidentified" if nonsense or unpaired or not arch else ""
        chip = replace(chip, arch=arch, card_type=card_type, asic_id=asic_id or "", dev=dev)
        chip = replace(chip, serial=serial or "", numa_node=int(numa) if numa else None)
        return replace(chip, iommu=iommu, unknown=unknown if card_type and dev else "pending")

    def read_health(self, chip: Chip) -> Reading:
        """One look at a chip's heartbeat and device node. A driver before 2.7 has no heartbeat, and
        a read while the chip goes away could oops the kernel (tt-kmd a972eed): opening a file that
        is not there does not reach the driver."""
        heartbeat, fault, detail = None, "", ""
        try:
            text = read_attribute(f"{self.folder(chip.index)}/tt_heartbeat")
            if not re.fullmatch(r"[0-9]{1,10}", text):
                fault, detail = "unreadable", "not a number"
            elif (heartbeat := int(text)) == 0xFFFFFFFF:
                fault = "bus-dead"
        except OSError as error:
            # tt-kmd telemetry.c, from 2.9: ENODEV for a chip that is detached, ENODATA in a reset.
            known = {errno.ENOENT: "", errno.ENODEV: "gone", errno.ENODATA: "resetting"}
            fault = known.get(error.errno or 0, "unreadable")
            detail = errno.errorcode.get(error.errno or 0, "unknown error")
        node = f"{self.dev_folder}/{chip.index}"
        if fault in ("", "unreadable") and not is_device_node(node, chip.dev):
            fault = "no-node"
        return Reading(heartbeat, fault, detail)


# ==== 4. Health: what is remembered of a chip + a reading + now -> a verdict with its reason ======
# Judged anew at each poll, in both directions. README's table "Health" is the specification.

# A heartbeat that stays equal for longer is a hung chip: the firmware's own watchdog takes 10 s
# (auto_reset_timeout in tt-kmd module.c). It must also be read as equal so often: while this
# process is stopped, only time passes.
HEARTBEAT_S, HEARTBEAT_READS = 12.0, 3
# How long after a chip's appearance its telemetry may still come: the driver asks 120 times, once a
# second (tt-kmd wormhole.c, since 2.4.0).
TELEMETRY_S = 130.0
# Kind of a verdict -> what is wrong and what to do, without the card's name and the time.
REASONS = {
    "gone": "it is gone from sysfs: in a reset, unplugged, or the driver is unloaded; if it stays "
    "away, see dmesg; if it was taken out for good, restart the plugin, which then forgets it",
    "resetting": "it is being reset and does not answer yet; if this lasts for minutes, reset it "
    "again: tt-smi -r",
    "bus-dead": "its PCIe bus answers all ones: reset it with tt-smi -r, or power-cycle the host",
    "no-node": "its device node {chip.node} is missing or another device: is --dev-root the host's "
    "/dev?",
    "hung": "its heartbeat has stopped, so its firmware hangs: reset it with tt-smi -r",
    "read-hangs": "a read of its sysfs files does not return: the driver hangs on it; see dmesg, "
    "and reboot if it stays",
    "unreadable": "its heartbeat cannot be read ({detail}), so a hang would not be noticed: see "
    "dmesg, and whether a policy keeps this process from reading it",
    "pending": "its telemetry is not there yet: the firmware may take two minutes (and a driver "
    "before 1.28 has none)",
    "no-telemetry": "it has no telemetry, so its model is unknown: firmware that does not answer, "
    "or a driver before 1.28",
    "unidentified": "its ASIC id, board serial or PCI device id makes no sense, so nobody knows "
    "which card it is: reset it with tt-smi -r, or update its firmware and the driver",
    "half": "a p300 has two chips, and only {here} is there; missing: {missing}. Reset it with "
    "tt-smi -r, and look for both in lspci -d 1e52:",
    "same-id": "more chips than a card has claim this ID: {here}. Update their firmware, or take "
    "one of these cards out",
    "no-driver": "it has no device node: its PCI driver is {driver}, not tenstorrent; see "
    "dmesg if it should be",
}
# Kinds that keep a card off the list if it was not on it, and the kind that is Healthy, with
# something that the admin should know. All others are Unhealthy.
NOT_OFFERED = ("pending", "no-telemetry", "unidentified", "half", "same-id", "no-driver")
HARMLESS = ("unreadable",)


def make_verdict(kind: str, **facts: object) -> Verdict:
    """The verdict of one kind of REASONS. Raises KeyError if its text needs another fact."""
    health = PENDING if kind in NOT_OFFERED else HEALTHY if kind in HARMLESS else UNHEALTHY
    return Verdict(health, kind, REASONS[kind].format(**facts))


class HealthHistory:
    """What is remembered of one chip while its class device exists. Times are time.monotonic()."""

    def __init__(self, appeared: float) -> None:
        self.appeared = appeared
        self.heartbeat: int | None = None  # the newest that could be read
        self.changed_at = appeared  # when it was first read as such
        self.equal_reads = 0  # how often it was read as equal since
        self.failure = ""  # the last one: hung, resetting or bus-dead
        self.recovery_beats = 0  # heartbeat changes still needed before it counts as Healthy

    def update(self, chip: Chip, reading: Reading, now: float) -> Verdict:
        """Takes in one reading, and says what it means."""
        kind = reading.fault
        if kind in ("resetting", "bus-dead"):
            # Without the old heartbeat: the first one after a reset differs, and proves nothing.
            self.failure, self.recovery_beats, self.heartbeat = kind, 1, None
        elif reading.heartbeat is None:  # a driver before 2.7 or firmware has none, or not read
            # When a chip goes away, the driver removes its files first (tt-kmd enumerate.c, 2.7.0).
            if not kind and self.heartbeat is not None:
                kind = "gone"
        elif reading.heartbeat != self.heartbeat:
            if self.heartbeat is not None:
                self.recovery_beats = max(0, self.recovery_beats - 1)
            self.heartbeat, self.changed_at, self.equal_reads = reading.heartbeat, now, 0
        else:
            self.equal_reads += 1
            if self.equal_reads >= HEARTBEAT_READS and now - self.changed_at > HEARTBEAT_S:
                # Two: one alone could be the last of a dying chip.
                self.failure, self.recovery_beats = "hung", 2
        if kind in ("", *HARMLESS):  # else what is seen now counts before what is remembered
            kind = chip.unknown or (self.failure if self.recovery_beats else kind)
        if kind == "pending" and now - self.appeared > TELEMETRY_S:
            kind = "no-telemetry"
        return make_verdict(kind, chip=chip, detail=reading.detail) if kind else Verdict()


# ==== 5. Cards: chips -> cards -> the next snapshot; the polling thread, which wakes the streams ==

READ_S = 2.0  # how long a poll waits for the reads of all chips together
Judged = tuple[Chip, Verdict]


def judge_card(members: Sequence[Judged], away: Sequence[Chip]) -> Verdict:
    """A card's verdict from those of its chips. `away` are those that it had, and has no more. Half
    a p300 is never offered: its chips would go by one ID alone and by another as a pair."""
    first, here = members[0][0], ", ".join(chip.pci for chip, _ in members)
    wanted = 2 if first.card_id.startswith("p300-") else 1
    if len(members) < wanted:
        missing = ", ".join(chip.pci for chip in away) or "the other one"
        return make_verdict("half", here=here, missing=missing)
    if len(members) > wanted:
        return make_verdict("same-id", here=here)
    chip, worst = max(members, key=lambda each: (each[1].health == UNHEALTHY, each[1].reason))
    if wanted > 1 and worst.reason:
        worst = replace(worst, reason=f"chip {chip.pci}: {worst.reason}")
    return worst


def make_card(members: Sequence[Judged], before: Card | None, settings: Settings) -> Card:
    """The card that `members` make up. `before` is the card of this ID as it was offered last, if
    ever: it stays offered, Unhealthy where another card would be left out."""
    first, chips = members[0][0], [chip for chip, _ in members]
    away = [chip for chip in before.chips if chip.id != first.id] if before else []
    verdict = judge_card(members, away)
    if verdict.kind == "half":  # go on to show the chip that is away
        chips = sorted([*chips, *away], key=lambda chip: chip.pci)
    model = first.arch if first.card_type == "unknown" else first.card_type
    if not settings.variants:
        model = re.sub(r"^(p\d+)[abc]$", r"\1", model)
    if before:
        model = before.model if first.unknown else model
        if verdict.health == PENDING:
            verdict = replace(verdict, health=UNHEALTHY)
    offered = bool(before) or (verdict.health != PENDING and not first.unknown)
    resource = f"{settings.resource_domain}/{model}" if offered else None
    return Card(first.card_id, model, resource, tuple(chips), verdict)


def next_snapshot(
    old: Snapshot, judged: Iterable[Judged], settings: Settings, now: float
) -> Snapshot:
    """The snapshot that follows from the last one and one poll, with `judged` in any order, at
    `now` of time.monotonic(). A card that was offered stays until the plugin restarts, also when it
    is gone or was replaced: a Pod may still hold it, as far as the plugin knows, and its container
    gets a reason when it restarts."""
    # A chip that is seen twice, as at the end of a reset (tt-kmd#112), counts with its higher N.
    by_pci = {each[0].pci: each for each in sorted(judged, key=lambda each: each[0].index)}
    groups: dict[str, list[Judged]] = {}
    for _, each in sorted(by_pci.items()):
        groups.setdefault(each[0].card_id, []).append(each)
    offered = {card.id: card for card in old.cards if card.resource}
    cards = [make_card(group, offered.get(card_id), settings) for card_id, group in groups.items()]
    gone = make_verdict("gone")
    cards += [replace(card, verdict=gone) for card in offered.values() if card.id not in groups]
    since = {(card.id, card.verdict.health): card.since for card in old.cards}
    cards = [replace(c, since=since.get((c.id, c.verdict.health), now)) for c in cards]
    cards.sort(key=lambda card: (not card.resource, card.resource or "", card.chips[0].pci))
    return replace(old, cards=tuple(cards), polled=True)


class ChipReader:
    """A thread that reads one class device when asked: a read that hangs holds up no other chip."""

    def __init__(self, discovery: Discovery, chip: Chip) -> None:
        self.chip, self.reading = chip, Reading()  # as the last read that has returned found them
        self.history = HealthHistory(time.monotonic())
        self.idle = threading.Event()  # cleared while a read is under way
        self.idle.set()
        self._requests: queue.SimpleQueue[bool] = queue.SimpleQueue()
        # A daemon: one that hangs in a read must not keep the process from ending.
        name = f"chip {chip.pci}"
        threading.Thread(target=self._run, args=(discovery,), name=name, daemon=True).start()

    def ask(self) -> bool:
        """Starts a read, unless the last one is still under way. Returns whether it did."""
        if not self.idle.is_set():
            return False
        self.idle.clear()
        self._requests.put(True)
        # Chip after chip: all threads at once would cost three times the CPU time. Chips that hang
        # do not add up in so short a time.
        self.idle.wait(0.002)
        return True

    def judge(self, now: float) -> Judged:
        """The chip, and what its newest reading means, or that there is none."""
        reading = self.reading if self.idle.is_set() else Reading(fault="read-hangs")
        return self.chip, self.history.update(self.chip, reading, now)

    def end(self) -> None:
        """Lets the thread end, once its read has returned."""
        self._requests.put(False)

    def _run(self, discovery: Discovery) -> None:
        while self._requests.get():
            try:
                self.chip, self.reading = discovery.read(self.chip)
            except Exception as error:  # a defect costs this chip's readings, not all polls
                if self.reading.detail != repr(error):  # once
                    log.exception("chip %s cannot be read", self.chip.pci)
                self.reading = Reading(None, "unreadable", repr(error))
            self.idle.set()


class Inventory:
    """The newest snapshot, and the polling thread that makes it."""

    def __init__(self, settings: Settings, discovery: Discovery | None = None) -> None:
        self.settings, self.discovery = settings, discovery or Discovery(settings)
        self.snapshot = Snapshot()
        self.changed = asyncio.Event()  # set at the next change of the cards, then replaced
        self.on_snapshot: list[Callable[[Snapshot, Snapshot], object]] = []  # after each poll
        self.readers: dict[tuple[int, int, str], ChipReader] = {}  # by Chip.class_device
        self.failure = LogOnChange()  # why the last poll failed
        self.polled_at = time.monotonic()  # when the last poll that did not fail ended
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stopped = threading.Event()
        self._lock = threading.Lock()  # held while a snapshot is published, never during a read

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Starts the polling thread, which wakes those who wait on `loop`."""
        self._loop = loop
        threading.Thread(target=self._run, name="poll", daemon=True).start()

    def stop(self) -> None:
        """Ends the polling thread. A poll that is under way is not published any more."""
        with self._lock:
            self._stopped.set()

    def notify(self) -> None:
        """Wakes all who wait for a change. In the event loop's thread."""
        changed, self.changed = self.changed, asyncio.Event()
        changed.set()

    def poll(self, now: float) -> Snapshot:
        """One pass: find the chips, read, judge, publish. Returns the snapshot, after 2 s and a bit
        at most. Raises OSError for what no chip caused, such as too few file descriptors."""
        found = {chip.class_device: chip for chip in self.discovery.chips()}
        for each in self.readers.keys() - found.keys():
            self.readers.pop(each).end()
        for each in found.keys() - self.readers.keys():
            self.readers[each] = ChipReader(self.discovery, found[each])
        asked = [reader for reader in self.readers.values() if reader.ask()]
        waits = round(READ_S / 0.05)
        for reader in asked:
            # Counted, not timed: when the process was stopped, no thread has run, but time passed.
            while waits and not reader.idle.wait(0.05):
                waits -= 1
        judged = [reader.judge(now) for reader in self.readers.values()]
        for chip, driver in self.discovery.pci_functions({chip.pci for chip, _ in judged}):
            # The driver is bound a moment before it has made the class device.
            kind = "pending" if driver == "tenstorrent" else "no-driver"
            judged.append((chip, make_verdict(kind, driver=driver)))
        old = replace(self.snapshot, driver=self.discovery.driver_version())
        self._publish(next_snapshot(old, judged, self.settings, now))
        return self.snapshot

    def _publish(self, new: Snapshot) -> None:
        with self._lock:
            if self._stopped.is_set():
                return
            old, self.snapshot = self.snapshot, new
            # Before the callbacks, which may fail: the kubelet must hear of every change.
            if self._loop and new != old:
                self._loop.call_soon_threadsafe(self.notify)
            self.polled_at = time.monotonic()
            for callback in self.on_snapshot:
                try:
                    callback(old, new)
                except Exception:
                    log.exception("a part of the plugin has missed a change of the cards")

    def _run(self) -> None:
        while not self._stopped.is_set():
            began = time.monotonic()
            try:
                self.poll(began)
                self.failure.set("", "the cards can be looked for again")
            except Exception as error:  # it must cost one poll, not all that follow
                if not isinstance(error, OSError) and not self.failure.problem:
                    log.exception("a poll failed")
                problem = f"{type(error).__name__}: {error}"
                self.failure.set(f"cannot look for cards, the last list stands: {problem}")
            self._stopped.wait(max(0.0, began + self.settings.poll_seconds - time.monotonic()))


# ==== 6. The DevicePlugin service: five calls, each answered from the newest snapshot =============
# The kubelet sets no time limit on most of them, and a slow answer stalls the admission of every
# Pod on the node. So no call opens a file or waits for a thread. They look at links, folders and
# device nodes, which never reaches the driver.

HUGEPAGES = "/dev/hugepages-1G"  # where tt-umd hugepage.cpp insists on 1 GiB pages in a container
# Announced twice: kubelet 1.20 takes them from Register, later ones from GetDevicePluginOptions.
OPTIONS = api.DevicePluginOptions(pre_start_required=True, get_preferred_allocation_available=True)


class Refusal(Exception):
    """A call that is refused: the name of a gRPC status, and a sentence for the Pod's event."""


@dataclass
class Shared:
    """What all registrations of all resources share. Only the event loop writes to it."""

    inventory: Inventory
    # (cards by ID, available IDs, IDs that it must have, size) -> the IDs that suit best
    choose: Callable[[Mapping[str, Card], Sequence[str], Sequence[str], int], list[str]]
    cdi_names: Callable[[Sequence[Card]], list[str]]  # [] if not all of the cards have one
    counts: Counter[tuple[Any, ...]] = field(default_factory=Counter)
    allocated: dict[str, list[str]] = field(default_factory=dict)  # card ID -> its host paths then

    def count(self, metric: str, by: int = 1, **labels: str) -> None:
        """Adds to a counter of /metrics."""
        key = (metric, *labels.items())
        self.counts[key] += by


def device_list(snapshot: Snapshot, resource: str) -> api.ListAndWatchResponse:
    """What a ListAndWatch stream of `resource` should have sent last. Topology for all cards or for
    none: where only some have it, the kubelet has no hint for two (topology_hints.go). A NUMA node
    of -1 would make `single-numa-node` reject the Pod."""
    cards = snapshot.of(resource).values()
    known = all(card.numa_nodes for card in cards)
    answer = api.ListAndWatchResponse()
    for card in cards:
        device = answer.devices.add(ID=card.id, health=card.verdict.health)
        if known:
            device.topology.nodes.extend(api.NUMANode(ID=node) for node in card.numa_nodes)
    return answer


def resolve_cards(snapshot: Snapshot, resource: str, ids: Sequence[str]) -> list[Card]:
    """The cards of `ids`, by PCI address. Raises Refusal: no ID, one named twice, or unknown."""
    cards = snapshot.of(resource)
    if not ids:
        raise Refusal("INVALID_ARGUMENT", f"no card IDs of {resource} in the request")
    for card_id, count in Counter(ids).items():
        name = f"{card_id[:80]!r} of {resource}"
        if card_id not in cards:
            raise Refusal("NOT_FOUND", f"there is no card {name} on this node")
        if count > 1:
            raise Refusal("INVALID_ARGUMENT", f"the card ID {name} is named twice in one request")
    return sorted((cards[card_id] for card_id in ids), key=lambda card: card.chips[0].pci)


def utc(moment: float) -> str:
    """A moment of time.monotonic() as an RFC 3339 text of whole seconds."""
    seconds = time.time() - time.monotonic() + moment
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))


def find_problem(discovery: Discovery, card: Card) -> str:
    """Why no container may have `card` now; "" if one may."""
    if card.verdict.health != HEALTHY:
        return f"not healthy since {utc(card.since)}: {card.verdict.reason}"
    for chip in card.chips:
        # The snapshot may be a poll old, and a chip that is probed takes the lowest N at once.
        there = discovery.chip_at(chip.index)
        if not there or there.class_device != chip.class_device:
            moved = "it was reset or removed a moment ago; try again"
            return f"{chip.node} is no longer chip {chip.pci}: {moved}"
        if not is_device_node(f"{discovery.dev_folder}/{chip.index}", chip.dev):
            return REASONS["no-node"].format(chip=chip)
    return ""


def host_paths(inventory: Inventory, card: Card) -> list[str]:
    """The host path of each of a card's device nodes. Raises Refusal if it cannot be used now. A
    link of /dev/tenstorrent/by-id is preferred where it leads to the same device: the kubelet
    repeats this answer at each restart of the container, and the runtime resolves the link anew.
    After a reset that gave the chip another N, the container has the right one (tt-kmd#170)."""
    if problem := find_problem(inventory.discovery, card):
        raise Refusal("FAILED_PRECONDITION", f"{card}: {problem}")
    if inventory.settings.fake:
        return [os.devnull for _ in card.chips]
    folder, paths = inventory.discovery.dev_folder, []
    for chip in card.chips:
        linked = is_device_node(f"{folder}/by-id/{chip.id}", chip.dev)
        paths.append(f"/dev/tenstorrent/by-id/{chip.id}" if linked else chip.node)
    return paths


def wants_hugepages(settings: Settings, chips: Iterable[Chip]) -> bool:
    """Whether to mount the host's 1 GiB pages. Behind a DMA IOMMU domain, a chip needs none
    (tt-umd pci_device.cpp)."""
    if settings.hugepages != "auto":
        return settings.hugepages == "always"
    needed = not all(chip.iommu.startswith("DMA") for chip in chips)
    return needed and os.path.isdir(f"{settings.dev_root}/hugepages-1G")


def container_response(
    settings: Settings, resource: str, chips: Sequence[Chip], paths: Iterable[str]
) -> api.ContainerAllocateResponse:
    """What one container gets for its `chips`, whose device nodes are at `paths` on the host. N is
    the same inside: the user-mode driver's locks and hugepage files are named after it. There is no
    TT_VISIBLE_DEVICES, whose meaning changed in tt-umd 0.9.3: the device nodes decide what is
    visible. The variable's name has the resource in it, as the kubelet merges answers by key."""
    answer = api.ContainerAllocateResponse()
    for chip, path in zip(chips, paths, strict=True):
        answer.devices.add(container_path=chip.node, host_path=path, permissions="rw")
    name = "PCIDEVICE_" + re.sub("[^A-Z0-9]", "_", resource.upper())
    answer.envs[name] = ",".join(chip.pci for chip in chips)
    if wants_hugepages(settings, chips):
        answer.mounts.add(container_path=HUGEPAGES, host_path=HUGEPAGES)
    return answer


def refusing(call: Callable[[Any, Any], Any]) -> Callable[[Any, Any, Any], Any]:
    """`call(self, request)` as gRPC's coroutine: a Refusal becomes a status, logged and counted."""

    @functools.wraps(call)
    async def method(self: DevicePlugin, request: Any, context: Any) -> Any:
        try:
            return call(self, request)
        except Refusal as refusal:
            (code, why), name, resource = refusal.args, call.__name__, self.resource
            self.shared.count("refusals_total", resource=resource, call=name, code=code)
            log.warning("%s of %s refused: %s", name, resource, why, extra={"resource": resource})
            return await context.abort(StatusCode[code], why)

    return method


class DevicePlugin(rpc.DevicePluginServicer):
    """The service of one resource for one registration. `stream` is the task of the first
    ListAndWatch stream, and done when that has ended. It is the kubelet's: it opens one for each
    Register, and nobody else knows this socket's name yet."""

    def __init__(self, shared: Shared, resource: str) -> None:
        self.shared, self.resource, self.inventory = shared, resource, shared.inventory
        self.stream: asyncio.Task[Any] | None = None  # gRPC runs each call in a task of its own
        self.closing = False  # set to end all streams

    async def GetDevicePluginOptions(self, request: Any, context: Any) -> api.DevicePluginOptions:
        """The same options as in Register."""
        return OPTIONS

    # A coroutine that writes, not a generator: it ends as soon as the call is cancelled, because
    # the kubelet has ended or has dropped this stream.
    async def ListAndWatch(self, request: Any, context: Any) -> None:  # type: ignore[override]
        """The list at once, and again when it differs from what *this* stream has sent last."""
        self.stream, sent = self.stream or asyncio.current_task(), None
        while not self.closing:
            changed = self.inventory.changed  # taken first: what comes after the look counts
            devices = device_list(self.inventory.snapshot, self.resource)
            if devices != sent:
                await context.write(sent := devices)
            else:
                await changed.wait()

    @refusing
    def GetPreferredAllocation(self, request: Any) -> api.PreferredAllocationResponse:
        """The cards that suit a container best, where the kubelet has a choice."""
        cards = self.inventory.snapshot.of(self.resource)
        answer = api.PreferredAllocationResponse()
        for each in request.container_requests:
            wanted = (each.available_deviceIDs, each.must_include_deviceIDs, each.allocation_size)
            answer.container_responses.add(deviceIDs=self.shared.choose(cards, *wanted))
        return answer

    @refusing
    def Allocate(self, request: api.AllocateRequest) -> api.AllocateResponse:
        """What each container gets. All or nothing: one card refused refuses the request."""
        snapshot, settings = self.inventory.snapshot, self.inventory.settings
        containers = [list(each.devices_ids) for each in request.container_requests]
        # One card may not go to two containers: the IDs of all must be different.
        given = resolve_cards(snapshot, self.resource, list(chain(*containers)))
        answer = api.AllocateResponse()
        allocated: dict[str, list[str]] = {}
        for ids in containers:
            cards = resolve_cards(snapshot, self.resource, ids)
            paths = {card.id: host_paths(self.inventory, card) for card in cards}
            chips = [chip for card in cards for chip in card.chips]
            one = container_response(settings, self.resource, chips, chain(*paths.values()))
            names = self.shared.cdi_names(cards)
            one.cdi_devices.extend(api.CDIDevice(name=name) for name in names)
            answer.container_responses.append(one)
            # The answer has both. CDI takes no links, so a card that moves would be two nodes.
            if names:
                paths = {card.id: card.device_nodes for card in cards}
            allocated |= paths
        self.shared.allocated |= allocated
        self.shared.count("allocations_total", len(containers), resource=self.resource)
        log.info("allocated %s", ", ".join(map(str, given)), extra={"resource": self.resource})
        return answer

    @refusing
    def PreStartContainer(self, request: Any) -> api.PreStartContainerResponse:
        """Refuses a card that is not healthy, or that has moved since the container's Allocate.
        What an earlier instance allocated is not known: without by-id links, a move is missed."""
        for card in resolve_cards(self.inventory.snapshot, self.resource, request.devices_ids):
            paths = host_paths(self.inventory, card)
            promised = self.shared.allocated.get(card.id, paths)
            if promised != paths and promised != card.device_nodes:  # by-id links may be new
                sentence = f"{card}: it was {', '.join(promised)} when this Pod was admitted: "
                sentence += "delete the Pod, so that a new one gets the right device "
                sentence += "(/dev/tenstorrent/by-id on the host avoids this)"
                raise Refusal("FAILED_PRECONDITION", sentence)
        return api.PreStartContainerResponse()


# ==== 7. Registration: serve, register, expect the stream, wait until it ends, and again, for ever
# The end of the stream is the signal because it comes in all cases. Some leave no trace in the file
# system: a kubelet drops a stream and keeps running; or, up to 1.36, the end of an older stream of
# the same resource disconnects the newer registration for good (handler.go).

# How often to look for a kubelet and the lock. To register takes a few ms; README promises 0.1 s.
PACE_S = 0.05
# Limit of Register: from 1.32 the kubelet dials back inside it, for 10 s at most (endpoint.go).
REGISTER_S = 12.0
STREAM_S = 5.0  # how soon after Register the kubelet must open its stream
# Pause before the same kubelet is tried again: 4 ms, doubled each time, up to FAILED_S after a
# registration that failed, and 32 ms (DROPPED doublings) after one that held for less than a
# second. Another kubelet, which has another kubelet.sock, is tried at once.
FAILED_S, DROPPED = 5.0, 4
STOP_S = 0.2  # grace for calls under way when a server stops; its streams end by themselves
REQUEST_BYTES = 256 * 1024  # largest request: ten times the IDs of the largest node
SOCKET = "tenstorrent-{model}-{token}.sock"


def accepts_connections(path: Path) -> bool:
    """Whether a process accepts connections there. A socket file proves nothing: it exists before
    listen() and after a crash. Raises OSError for a problem on this side."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as probe:
        try:
            probe.connect(os.fspath(path))
        except (FileNotFoundError, NotADirectoryError, ConnectionError, BlockingIOError):
            return False  # BlockingIOError: its queue is full, so it accepts nothing now
        return True


def grpc_target(path: Path) -> str:
    """A Unix socket as gRPC names it: a URI, so that a % in the path has to be escaped."""
    return "unix:" + urllib.parse.quote(os.fspath(path))


class InstanceLock:
    """One plugin per kubelet folder: an flock on the folder itself, which dies with its holder. Not
    on a file in it: the folder is there on a full disk, nothing stale stays behind, and whoever
    empties device-plugins does not take the lock away."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.held, self._fd = folder, False, -1
        self.standby_reason = ""  # set while another instance holds the lock

    def try_acquire(self) -> str:
        """An empty text if the lock is held now, else what it waits for. Raises CannotWork."""
        problem = standby_reason = ""
        try:
            there = os.stat(self.folder)
            # A folder that was made anew is another one, and to be locked again.
            if not self.held or not os.path.samestat(there, os.fstat(self._fd)):
                self.release()
                self._fd = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
                if not os.access(self.folder, os.W_OK | os.X_OK, effective_ids=True):
                    raise PermissionError
                fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                self.held = True
                self._remove_stale_sockets()
            elif not there.st_nlink:
                reason = "was deleted on the host, and a mount shows the deleted one: start again"
                raise CannotWork(f"{self.folder} {reason}")
        except FileNotFoundError:
            problem = f"{self.folder} is not there yet: waiting for a kubelet that makes it"
        except BlockingIOError:
            standby_reason = f"another instance serves {self.folder}: standing by until it ends"
        except PermissionError as error:
            raise CannotWork(
                f"uid {os.geteuid()} cannot make sockets in {self.folder}. The kubelet makes this "
                "folder for root alone: run the plugin as uid 0 (it needs no capabilities), with "
                "the folder mounted for writing"
            ) from error
        except OSError as error:
            problem = f"cannot lock {self.folder}: {error.strerror}"
        self.standby_reason = standby_reason  # in one step: /readyz reads it in another thread
        return problem or standby_reason

    def release(self) -> None:
        """Lets the next instance in."""
        if self._fd >= 0:
            os.close(self._fd)
        self._fd, self.held = -1, False

    def _remove_stale_sockets(self) -> None:
        for path in self.folder.glob(SOCKET.format(model="?*", token="[0-9a-f]" * 6)):
            with contextlib.suppress(OSError):
                if path.is_socket() and not accepts_connections(path):
                    path.unlink()
                    log.info("removed %s: left behind by an instance that was killed", path.name)


def file_id(path: Path) -> str:
    """Device, inode and time of a file's last change: the next kubelet's socket has others. "" if
    there is no such file. Raises OSError."""
    with contextlib.suppress(FileNotFoundError):
        status = os.stat(path)
        return f"{status.st_dev} {status.st_ino} {status.st_mtime_ns}"
    return ""


async def cancel_and_wait(tasks: Iterable[asyncio.Task[Any]]) -> None:
    """Cancels tasks, and waits until they have cleaned up."""
    pending = set(tasks)
    while pending:
        for task in pending:
            task.cancel()
        # Again, if need be: asyncio.wait_for, which gRPC uses, loses a cancellation that comes as
        # it ends (before Python 3.12).
        _, pending = await asyncio.wait(pending, timeout=2 * STOP_S)


@contextlib.asynccontextmanager
async def running(server: grpc.aio.Server) -> AsyncIterator[None]:
    """Starts a gRPC server, and stops it at the end."""
    # Shielded: a start() that is cancelled half-way would make stop() raise InvalidStateError.
    starting = asyncio.create_task(server.start())
    try:
        await asyncio.shield(starting)
        yield
    finally:
        await asyncio.shield(starting)
        await server.stop(STOP_S)


@contextlib.asynccontextmanager
async def serving(plugin: DevicePlugin, folder: Path) -> AsyncIterator[str]:
    """Serves `plugin` on a new socket in `folder`; gives its name. Raises OSError. Each
    registration has a name of its own: whoever still knows an older one, such as an instance that
    ends late, can neither remove this socket nor take it for its own."""
    model = plugin.resource.partition("/")[2]
    path = folder / SOCKET.format(model=model, token=os.urandom(3).hex())
    server = grpc.aio.server(options=[("grpc.max_receive_message_length", REQUEST_BYTES)])
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
            finally:  # its streams end; calls under way are finished
                plugin.closing = True
                plugin.inventory.notify()
    finally:  # gRPC may have removed it, or a kubelet at its start
        with contextlib.suppress(OSError):
            path.unlink()


class Registrar:
    """Keeps every resource of the newest snapshot registered."""

    def __init__(self, shared: Shared) -> None:
        self.shared, self.inventory = shared, shared.inventory
        self.folder = shared.inventory.settings.plugin_dir
        self.kubelet = self.folder / "kubelet.sock"
        self.lock = InstanceLock(self.folder)
        self._streams: dict[str, asyncio.Task[Any]] = {}  # resource -> its newest stream
        self._waiting = LogOnChange()  # for the folder, another instance's end, or a kubelet
        self._refused: dict[str, LogOnChange] = {}  # resource -> why it was not registered

    def registration_status(self) -> dict[str, str]:
        """Resource -> "" if it is registered, else why not. Callable in any thread."""
        status = dict.fromkeys(self.inventory.snapshot.resources, "")
        for resource in status:
            stream = self._streams.get(resource)
            if not stream or stream.done():
                why = self._waiting.problem or self._refused.get(resource, LogOnChange()).problem
                status[resource] = why or "waiting for the kubelet's answer"
        return status

    async def run(self) -> None:
        """Runs the loop of each resource there is, until it is cancelled. Raises CannotWork."""
        tasks: dict[str, asyncio.Task[Any]] = {}
        try:
            while True:
                changed, resources = self.inventory.changed, self.inventory.snapshot.resources
                for resource in [each for each in resources if each not in tasks]:
                    tasks[resource] = asyncio.create_task(self.run_resource(resource))
                for resource in tasks.keys() - set(resources):
                    await cancel_and_wait([tasks[resource]])
                    del tasks[resource]
                # Its name "" is no resource's, so the loop above ends it in the next round.
                tasks[""] = asyncio.create_task(changed.wait())
                done, _ = await asyncio.wait(tasks.values(), return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    task.result()  # raises what has ended it
        finally:
            await cancel_and_wait(tasks.values())

    async def run_resource(self, resource: str) -> None:
        """The loop. Whatever ends one registration, the next follows. Raises CannotWork."""
        refused = self._refused[resource] = LogOnChange()
        kubelet, cause, problem, tries = "", "start", "", 0
        while True:
            backoff = min(FAILED_S, 0.002 * 2**tries) if tries else 0.0
            last, kubelet = kubelet, await self.wait_for_kubelet(kubelet, backoff)
            tries = tries if kubelet == last else 0
            began = time.monotonic()
            try:
                cause, problem = await self.register_once(resource, kubelet, cause)
            except OSError as error:
                cause, problem = "no-socket", str(error.strerror or error)
            except Exception as error:  # a defect must cost one try, not the resource
                log.exception("registering %s failed", resource)
                cause, problem = "defect", repr(error)
            lasted = not problem and time.monotonic() - began > 1
            tries = 0 if lasted else min(tries + 1, 20 if problem else DROPPED)
            refused.set(f"{problem}; trying again" if problem else "", about=f"{resource}: ")

    async def wait_for_kubelet(self, last: str, backoff: float) -> str:
        """Returns once this instance holds the lock and a kubelet listens: the file_id of its
        socket. The `last` one is left alone for `backoff` seconds. Raises CannotWork."""
        until = time.monotonic() + backoff
        await asyncio.sleep(min(backoff, PACE_S))
        while True:
            problem = self.lock.try_acquire()
            try:
                kubelet = "" if problem else file_id(self.kubelet)
                if kubelet != last or time.monotonic() >= until:
                    if kubelet and accepts_connections(self.kubelet):
                        self._waiting.set("", f"a kubelet answers at {self.kubelet}")
                        return kubelet
                    waiting = f"no kubelet listens at {self.kubelet}: waiting for it to start"
                    self._waiting.set(problem or waiting)
            except OSError as error:
                self._waiting.set(f"cannot reach the kubelet at {self.kubelet}: {error.strerror}")
            await asyncio.sleep(PACE_S)

    async def register_once(self, resource: str, kubelet: str, cause: str) -> tuple[str, str]:
        """One registration, from its socket to the end of its stream. `cause`: what ended the last
        one. Returns what ended this one, and what was wrong, or "". Raises OSError."""
        plugin, extra = DevicePlugin(self.shared, resource), {"resource": resource, "reason": cause}
        async with serving(plugin, self.folder) as endpoint:
            try:
                await self._register(resource, endpoint)
            except grpc.aio.AioRpcError as error:
                if not accepts_connections(self.kubelet):  # it has ended: the old cause stands
                    return cause, ""
                answer = f"{error.code().name}: {error.details()}".replace(endpoint, "its socket")
                return "register-failed", f"the kubelet has not registered it: {answer}"
            until = time.monotonic() + STREAM_S
            while not plugin.stream:
                # A kubelet that has just ended leaves no stream whose end would tell.
                if file_id(self.kubelet) != kubelet:
                    return "no-stream", "the kubelet has accepted it, but has ended since"
                if time.monotonic() > until:
                    late = f"opened no stream within {STREAM_S:.0f} s"
                    return "no-stream", f"the kubelet has accepted it, but {late}"
                await asyncio.sleep(0.02)
            cards = self.inventory.snapshot.of(resource).values()
            healthy = sum(card.verdict.health == HEALTHY for card in cards)
            self.shared.count("registrations_total", resource=resource, cause=cause)
            self._streams[resource] = plugin.stream
            text = "registered %s with the kubelet: %d cards, %d healthy; socket %s; cause: %s"
            log.info(text, resource, len(cards), healthy, endpoint, cause, extra=extra)
            await asyncio.wait([plugin.stream])
            text = "the kubelet's stream of %s has ended: registering again"
            log.warning(text, resource, extra=extra)
        return "stream-ended", ""

    async def _register(self, resource: str, endpoint: str) -> None:
        request = api.RegisterRequest(version="v1beta1", endpoint=endpoint, resource_name=resource)
        request.options.CopyFrom(OPTIONS)
        # A pool of its own: the shared one remembers a failed dial, and delays the next by 1 s.
        options = [("grpc.use_local_subchannel_pool", 1)]
        async with grpc.aio.insecure_channel(grpc_target(self.kubelet), options) as channel:
            await rpc.RegistrationStub(channel).Register(request, timeout=REGISTER_S)


# ==== 8. serve(): the wiring ======================================================================


async def serve(settings: Settings) -> None:
    """The whole plugin, until it is cancelled. Raises CannotWork."""
    os.umask(0o077)  # sockets for root alone: the folder may be open to more
    inventory, files = Inventory(settings), KeptFiles(settings)
    registrar = Registrar(Shared(inventory, preferred_allocation, files.cdi_names))
    registrar.lock.try_acquire()  # now, so that the first poll knows whether to keep files

    def keep_files(old: Snapshot, new: Snapshot) -> None:
        if registrar.lock.held:  # two instances would overwrite each other's
            files.keep(new)

    inventory.on_snapshot = [functools.partial(log_changes, settings), keep_files]
    inventory.start(asyncio.get_running_loop())
    tasks = [asyncio.create_task(each) for each in (registrar.run(), serve_pages(registrar))]
    try:
        # The registrar does not end by itself: what ends it, or a defect, is raised here.
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
        for task in done:
            task.result()
    finally:
        inventory.stop()
        for task in tasks:  # once: a second time would interrupt run(), which waits for its own
            task.cancel()
        await asyncio.wait(tasks)
        if not registrar.lock.standby_reason:  # else they are the other instance's
            files.remove()
        registrar.lock.release()


# You can stop reading here: that was the whole plugin. What follows is an appendix. serve() passes
# A to C in, and each can be taken out; D is the command line, which calls serve().


# ==== A. Preferred allocation: which of the free cards suit one container best ====================


def tray(card: Card) -> str:
    """A Galaxy chip's tray: PCI domain and high nibble of the bus (tt-kmd enumerate.c); or ""."""
    return card.chips[0].pci[:6] if card.model.startswith("galaxy-") else ""


def topology_path(card: Card) -> tuple[str, ...]:
    """From the host's top down to a card: NUMA node, then Galaxy tray, or root bus and bridges."""
    above = (tray(card),) if tray(card) else card.chips[0].pci_path
    return ("/".join(f"{node:04}" for node in card.numa_nodes), *above, card.chips[0].pci)


def best_fit(paths: Sequence[tuple[str, ...]], count: int) -> list[tuple[str, ...]]:
    """`count` of `paths`, which are sorted: the nearest neighbours by PCI address in the smallest
    group of the tree that has room, so that larger groups stay whole for the next Pod."""
    sizes = Counter(path[:level] for path in paths for level in range(len(path) + 1))
    roomy = [group for group, size in sizes.items() if size >= count]
    # The smallest; of equal ones that in the smallest group, and so on up to the host.
    group = min(roomy, key=lambda path: [sizes[path[:n]] for n in range(len(path), -1, -1)])
    inside = [path for path in paths if path[: len(group)] == group]

    def spread(neighbours: Sequence[tuple[str, ...]]) -> int:
        addresses = [int(re.sub(r"\W", "", path[-1]), 16) for path in neighbours]
        return max(addresses) - min(addresses)

    return min((inside[n:][:count] for n in range(len(inside) - count + 1)), key=spread)


def preferred_allocation(
    cards: Mapping[str, Card], available: Sequence[str], must: Sequence[str], size: int
) -> list[str]:
    """The `size` IDs of `available` that suit one container best. Raises Refusal.

    All of `must`, and what is nearest to them; without `must` see best_fit. Cards that are lost
    since the kubelet read the list come last. The order of the request does not matter.
    """
    asked = set(available) | set(must)
    if not 0 < size <= len(asked) or len(set(must)) > size:
        sentence = f"cannot choose {size} of {len(asked)} cards with {len(set(must))} required"
        raise Refusal("INVALID_ARGUMENT", sentence)
    healthy = {i: card for i, card in cards.items() if card.verdict.health == HEALTHY}
    ids = {topology_path(healthy[i]): i for i in asked & healthy.keys()}
    required = sorted(path for path, i in ids.items() if i in must)
    lost = sorted(asked - healthy.keys(), key=lambda i: (i not in must, i))
    # Of the lost ones, those that it must have, and those without which it would be too few.
    lost = lost[: max(len(set(must)) - len(required), size - len(ids))]
    count = size - len(lost) - len(required)

    def nearness(path: tuple[str, ...]) -> int:
        """How many levels of the tree it shares with the nearest required card."""
        shared = (sum(path[:n] == near[:n] for n in range(len(path))) for near in required)
        return max(shared, default=0)

    free = sorted(ids.keys() - required, key=lambda path: (-nearness(path), path))
    chosen = best_fit(free, count) if count and not required else free[:count]
    return [ids[path] for path in (*required, *chosen)] + lost


# ==== B. Operations: the log; /healthz, /readyz and /metrics ======================================

VERSIONS = f"Python {sys.version.split()[0]}, grpcio {grpc.__version__}"


class BoundedQueueHandler(logging.handlers.QueueHandler):
    """Hands lines to the thread that writes them: a log that nobody reads holds up nobody."""

    dropped = 0

    def emit(self, record: logging.LogRecord) -> None:
        """Queues a line if there is room: as it is, so that no call waits until it is formatted."""
        try:
            if self.dropped:
                text = f"{self.dropped} lines were dropped: nobody read the log"
                self.queue.put_nowait(logging.makeLogRecord({"levelname": "WARNING", "msg": text}))
                self.dropped = 0
            self.queue.put_nowait(record)
        except queue.Full:
            self.dropped += 1


class JsonFormatter(logging.Formatter):
    """One JSON object a line: ts, level, msg; card, resource, reason and since where it has one."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        line = {"ts": self.formatTime(record, self.datefmt), "level": record.levelname.lower()}
        line["msg"] = record.getMessage()
        facts = {key: getattr(record, key, "") for key in ("card", "resource", "reason", "since")}
        facts["exception"] = self.formatException(record.exc_info) if record.exc_info else ""
        return json.dumps(line | {key: text for key, text in facts.items() if text})


def in_one_line(record: logging.LogRecord) -> bool:
    """gRPC logs a malformed request with a traceback of itself. The fault is the caller's."""
    error = record.exc_info[1] if record.exc_info else None
    if isinstance(error, google.protobuf.message.DecodeError):
        record.msg, record.args, record.exc_info = f"refused a malformed request: {error}", (), None
    return True


def set_up_logging(style: str, level: str) -> queue.Queue[logging.LogRecord]:
    """Logs to stderr in a thread. Returns the queue of the lines that it has not written yet."""
    kind = JsonFormatter if style == "json" else logging.Formatter
    formatter = kind("%(asctime)s %(levelname)s %(message)s", "%Y-%m-%dT%H:%M:%SZ")
    formatter.converter = time.gmtime
    stderr = logging.StreamHandler()
    stderr.setFormatter(formatter)
    lines: queue.Queue[logging.LogRecord] = queue.Queue(1000)  # more are dropped, and counted
    logging.basicConfig(level=level.upper(), handlers=[BoundedQueueHandler(lines)], force=True)
    logging.getLogger("asyncio").setLevel(logging.WARNING)
    logging.getLogger("grpc._cython.cygrpc").addFilter(in_one_line)
    logging.handlers.QueueListener(lines, stderr).start()
    return lines


def log_changes(settings: Settings, old: Snapshot, new: Snapshot) -> None:
    """Logs what changed between two snapshots: a line a card, and at first what runs here."""
    driver = new.driver or "not loaded"
    if not old.polled:
        models = Counter(card.model or "of unknown model" for card in new.cards)
        cards = ", ".join(f"{count} {model}" for model, count in sorted(models.items())) or "none"
        folders = f"{settings.plugin_dir}, sysfs {settings.sysfs_root}, dev {settings.dev_root}"
        text = "tt-device-plugin %s, %s, driver %s; kubelet folder %s; cards: %s"
        log.info(text, __version__, VERSIONS, driver, folders, cards)
    if not new.cards and (old.cards or not old.polled):
        log.info("no cards here, driver %s: waiting for some to appear", driver)
    before = {card.id: card for card in old.cards}
    for card in new.cards:
        last, verdict = before.pop(card.id, None), card.verdict
        if last and (last.verdict, last.resource) == (verdict, card.resource):
            continue
        level, text = logging.INFO, "is Healthy"
        if not card.resource:
            level, text = logging.WARNING, "is not offered"
        elif verdict.health == UNHEALTHY:
            level, text = logging.ERROR, "is Unhealthy"
        elif last and last.resource and last.verdict.health == UNHEALTHY:
            text = f"is Healthy again, after {card.since - last.since:.0f} s"
        extra = {"card": card.id, "resource": card.resource, "since": utc(card.since)}
        reason = f": {verdict.reason}" if verdict.reason else ""
        log.log(level, "%s %s%s", card, text, reason, extra=extra | {"reason": verdict.reason})
    chips = {chip.pci for card in new.cards for chip in card.chips}
    for card in before.values():
        if not any(chip.pci in chips for chip in card.chips):  # else it has its telemetry now
            log.warning("%s is gone; it was not offered", card, extra={"card": card.id})


# Metric -> its file in the class device's folder, where hwmon/ is that of the PCI device and proc/
# tt-kmd's own; the largest plausible value, above which it is stale telemetry, a dead bus, or a
# negative number read as unsigned; what to divide by; help. Names, where Prometheus' conventions
# allow them: docs.tenstorrent.com/tt-telemetry. Units and junk that was seen: tt-kmd telemetry.c
# 2.10.0, tt-kmd#213, #121, tt-metal#30055. proc/pids: a line an open file (chardev.c, 2.5.0).
SENSORS = {
    "tt_asic_temperature_celsius": ("hwmon/temp1_input", 150_000, 1000, "Temperature."),
    "tt_thermal_throttle_limit_celsius": ("hwmon/temp1_max", 150_000, 1000, "Throttle limit."),
    "tt_ai_clock_mhz": ("tt_aiclk", 5_000, 1, "AI clock."),
    "tt_tdp_w": ("hwmon/power1_input", 2_000_000_000, 1_000_000, "Power drawn."),
    "tt_tdc_a": ("hwmon/curr1_input", 2_000_000, 1000, "Current drawn."),
    "tt_vcore_v": ("hwmon/in0_input", 5_000, 1000, "Core voltage."),
    "tt_fan_speed_rpm": ("hwmon/fan1_input", 50_000, 1, "Speed of the board's fan."),
    "tt_thermal_trips_total": ("tt_therm_trip_count", 2**32 - 2, 1, "Thermal shutdowns."),
    "tt_device_plugin_device_node_users": ("proc/pids", 4096, 1, "How often it is open."),
}
METRICS = {
    "tt_device_plugin_info": "Versions; always 1.",
    "tt_device_plugin_registered": "1 while the resource's stream is open.",
    "tt_device_plugin_registrations_total": "Registrations, by what ended the one before.",
    "tt_device_plugin_allocations_total": "Containers that have got cards.",
    "tt_device_plugin_refusals_total": "Calls refused.",
    "tt_device_plugin_cards": "Cards offered.",
    "tt_device_plugin_cards_not_offered": "Cards not offered.",
    "tt_device_plugin_card_healthy": "1 if the card is offered and Healthy.",
    "tt_device_plugin_card_verdict": "Why the card is healthy or not; always 1.",
    "tt_device_plugin_chip_info": "Facts of a chip; always 1.",
    "tt_device_plugin_heartbeat_age_seconds": "Since the heartbeat was last seen to change.",
    "tt_device_plugin_junk_readings_total": "Sensor values that cannot be.",
} | {metric: sensor[-1] for metric, sensor in SENSORS.items()}


class Metrics:
    """What a scrape gets, in Prometheus' text format 0.0.4. Callable in any thread."""

    def __init__(self, registrar: Registrar) -> None:
        self.registrar, self.inventory = registrar, registrar.inventory
        self.junk: Counter[str] = Counter()  # PCI address -> values that cannot be
        self._reading: set[ChipReader] = set()  # whose sensors a scrape is reading now

    def page(self, now: float) -> str:
        """All metrics. `now` is time.monotonic()."""
        lines: dict[str, list[str]] = {}  # by metric: all of one must stand together

        def add(metric: str, value: float, **labels: str) -> None:
            name = metric if metric in METRICS else f"tt_device_plugin_{metric}"
            kind = "counter" if name.endswith("_total") else "gauge"
            header = [f"# HELP {name} {METRICS[name]}", f"# TYPE {name} {kind}"]
            # Texts are printable ASCII: JSON quotes and escapes that as this format does.
            inside = ",".join(f"{key}={json.dumps(text)}" for key, text in labels.items())
            lines.setdefault(name, header).append(f"{name}{{{inside}}} {float(value)}")

        snapshot, status = self.inventory.snapshot, self.registrar.registration_status()
        python, grpcio = sys.version.split()[0], grpc.__version__
        add("info", 1, version=__version__, python=python, grpcio=grpcio, driver=snapshot.driver)
        for resource, problem in status.items():
            add("registered", not problem, resource=resource)
            healths = [card.verdict.health for card in snapshot.of(resource).values()]
            for health in (HEALTHY, UNHEALTHY):
                add("cards", healths.count(health), resource=resource, health=health)
        none = dict.fromkeys((("allocations_total", ("resource", each)) for each in status), 0)
        for (metric, *labels), count in (none | dict(self.registrar.shared.counts)).items():
            add(metric, count, **dict(labels))
        add("cards_not_offered", sum(not card.resource for card in snapshot.cards))
        for card in snapshot.cards:
            of = {"card": card.id, "resource": card.resource or ""}
            add("card_healthy", bool(card.resource) and card.verdict.health == HEALTHY, **of)
            add("card_verdict", 1, **of, kind=card.verdict.kind)
            for chip in card.chips:
                self._add_chip(add, card, chip, now)
        return "\n".join([*chain(*lines.values()), ""])

    def _add_chip(self, add: Callable[..., None], card: Card, chip: Chip, now: float) -> None:
        of = {"card": card.id, "chip": chip.pci}
        reader = self.inventory.readers.get(chip.class_device)  # None: it is gone
        facts = {"model": card.model, "arch": chip.arch, "serial": chip.serial}
        node = chip.node if reader else ""
        add("chip_info", 1, **of, **facts, firmware=chip.firmware, device_node=node)
        if not reader:
            return
        if reader.history.heartbeat is not None:
            add("heartbeat_age_seconds", now - reader.history.changed_at, **of)
        # No sensor is read of an old driver, see read_health, nor of a chip whose reads hang. If it
        # begins to hang in here, one scrape waits, and the others do without it.
        version = [int(part) for part in re.findall("[0-9]+", self.inventory.snapshot.driver)]
        if version >= [2, 7] and reader.idle.is_set() and reader not in self._reading:
            self._reading.add(reader)
            try:
                self._add_sensors(add, chip, of)
            finally:
                self._reading.discard(reader)
        add("junk_readings_total", self.junk[chip.pci], **of)

    def _add_sensors(self, add: Callable[..., None], chip: Chip, of: Mapping[str, str]) -> None:
        sysfs, entry = self.inventory.discovery.sysfs, self.inventory.discovery.folder(chip.index)
        # The newest: a reset makes another hwmonX, and old drivers leave the dead one (tt-kmd#25).
        monitors = [str(path) for path in Path(f"{entry}/device/hwmon").glob("hwmon*")]
        newest = max(monitors, key=lambda name: (len(name), name), default="")
        proc = f"{os.path.dirname(sysfs)}/proc/driver/tenstorrent/{chip.index}"
        folders = {"": entry, "hwmon": newest, "proc": proc}
        for metric, (path, highest, scale, _) in SENSORS.items():
            place, _, file = path.rpartition("/")
            with contextlib.suppress(OSError):
                text = read_attribute(f"{folders[place]}/{file}")
                text = str(len(text.split())) if place == "proc" else text
                if re.fullmatch("[0-9]+", text) and int(text) <= highest:
                    add(metric, int(text) / scale, **of)
                else:
                    self.junk[chip.pci] += 1


def alive(inventory: Inventory, loop: asyncio.AbstractEventLoop, now: float) -> tuple[int, str]:
    """/healthz: 200 while this process works, whatever state the cards and the kubelet are in."""
    age, trouble = max(0.0, now - inventory.polled_at), inventory.failure.problem
    if age > max(10.0, 3 * inventory.settings.poll_seconds):  # reads that hang delay it by 2 s
        return 503, f"stuck: the last poll ended {age:.0f} s ago. {trouble}"
    answered = threading.Event()
    loop.call_soon_threadsafe(answered.set)
    if not answered.wait(3):
        return 503, "stuck: the event loop does not answer"
    return 200, f"ok: the last poll ended {age:.1f} s ago. {trouble}"


def ready(registrar: Registrar) -> tuple[int, str]:
    """/readyz: 200 when all resources are registered, there is none, or this instance stands by."""
    status, standby_reason = registrar.registration_status(), registrar.lock.standby_reason
    if not registrar.inventory.snapshot.polled:
        return 503, "the first poll has not ended yet"
    if not status:
        return 200, "no cards to register: waiting for some to appear"
    told = {each: f"not registered: {why}" if why else "registered" for each, why in status.items()}
    lines = [f"{resource}: {text}" for resource, text in told.items()]
    code = 200 if standby_reason or not any(status.values()) else 503
    return code, standby_reason or "\n".join(lines)


def open_port(address: tuple[str, int], pages: Mapping[str, Callable[[], tuple[int, str]]]) -> str:
    """Answers GET in threads. `pages`: path -> status and text. Returns where. Raises OSError."""
    from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer  # 15 ms, only if wanted

    class Handler(BaseHTTPRequestHandler):
        timeout, most = 5, threading.active_count() + 300  # seconds of silence; threads

        def setup(self) -> None:
            super().setup()
            # 100 headers of 64 KiB would fill the memory, and polls need file descriptors, too.
            head = self.connection.recv(8192) if threading.active_count() < self.most else b""
            self.rfile = io.BytesIO(head)

        def do_GET(self) -> None:
            missing = 404, f"no such page; there are {', '.join(pages)}"
            page = pages.get(self.path.partition("?")[0], lambda: missing)
            try:
                code, text = page()
            except Exception as error:  # a defect of a page must be seen, in it and in the log
                log.exception("%s failed", self.path)
                code, text = 500, repr(error)
            self.send_response(code)
            self.send_header("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
            self.end_headers()
            self.wfile.write(text.rstrip().encode() + b"\n")

        def log_message(self, format: str, *args: object) -> None:
            log.debug("HTTP %s: %r", self.client_address, args)

    class Server(ThreadingHTTPServer):
        def handle_error(self, request: Any, client_address: Any) -> None:
            log.debug("HTTP %s: %r", client_address, sys.exc_info()[1])

    everywhere = not address[0] and socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if everywhere or ":" in address[0] else socket.AF_INET
    server = Server(address, Handler, bind_and_activate=False)
    server.socket.close()
    server.socket = socket.create_server(address, family=family, dualstack_ipv6=everywhere)
    threading.Thread(target=server.serve_forever, name="http", daemon=True).start()
    return "port {1} of {0}".format(*server.socket.getsockname())


async def serve_pages(registrar: Registrar) -> None:
    """Opens the HTTP pages that are wanted, then returns. Tries again while the port is taken."""
    inventory, loop, trouble = registrar.inventory, asyncio.get_running_loop(), LogOnChange()
    metrics, wanted = Metrics(registrar), inventory.settings.listen
    pages = {
        "/healthz": lambda: alive(inventory, loop, time.monotonic()),
        "/readyz": lambda: ready(registrar),
        "/metrics": lambda: (200, metrics.page(time.monotonic())),
    }
    while wanted:
        try:
            log.info("HTTP on %s: %s", open_port(wanted, pages), ", ".join(pages))
            return
        except OSError as error:  # an instance that ends may still have it
            where = f"port {wanted[1]} of {wanted[0] or 'all addresses'}"
            trouble.set(f"no HTTP on {where}: {os.strerror(error.errno or 0)}; trying again")
            await asyncio.sleep(1)


# ==== C. Files for other tools: a CDI specification, and node labels ==============================

CDI_KIND, CDI_FILE = "tenstorrent.com/card", "tenstorrent.com-card.json"
CDI_VERSION = "0.5.0"  # lowest with hostPath and names that begin with a digit; podman 4.3's last
DRAFT = ".{}.new"  # not .json: CDI runtimes also read files whose names begin with a dot


def cdi_spec(settings: Settings, snapshot: Snapshot) -> str:
    """The CDI specification of the healthy cards: by ID, by the N of each chip, and all as `all`.

    "" without cards, as an empty one is invalid. Its device nodes are no links, which runtimes
    refuse. So it follows N, and PreStartContainer refuses a card that has moved.
    """
    named: dict[str, list[Chip]] = {}
    for card in snapshot.cards:
        if card.resource and card.verdict.health == HEALTHY:
            for name in (card.id, *(str(chip.index) for chip in card.chips), "all"):
                named.setdefault(name, []).extend(card.chips)
    devices: list[dict[str, Any]] = []
    for name, chips in sorted(named.items()):
        edits: dict[str, Any] = {"deviceNodes": []}
        for chip in chips:
            host = os.devnull if settings.fake else chip.node
            edits["deviceNodes"].append({"path": chip.node, "hostPath": host, "permissions": "rw"})
        if wants_hugepages(settings, chips):
            pages = {"hostPath": HUGEPAGES, "containerPath": HUGEPAGES, "options": ["rbind", "rw"]}
            edits["mounts"] = [pages]
        devices.append({"name": name, "containerEdits": edits})
    spec = {"cdiVersion": CDI_VERSION, "kind": CDI_KIND, "devices": devices}
    return json.dumps(spec, indent=2) + "\n" if devices else ""


def node_labels(settings: Settings, snapshot: Snapshot) -> str:
    """Node Feature Discovery's features.d file: facts that seldom change, so no health."""
    labels = {}
    for resource in snapshot.resources:
        cards, model = snapshot.of(resource).values(), resource.partition("/")[2]
        labels[f"{model}.count"] = str(len(cards))
        firmware = {chip.firmware for card in cards for chip in card.chips}
        labels[f"{model}.firmware"] = firmware.pop() if len(firmware) == 1 else ""
    offered = [card for card in snapshot.cards if card.resource]
    models, trays = Counter(card.model for card in offered), {tray(card) for card in offered}
    whole = len(models) == 1 and len(offered) == 32 and len(trays) == 4
    # By tt-metal's names, where the cards leave no doubt. A t3000 is also called QuietBox.
    labels["topology"] = "t3000" if models == {"n300": 4} else "galaxy" if whole else ""
    labels["driver-version"] = snapshot.driver if offered else ""
    # A label's value has at most 63 letters, digits and -_. with no sign at either end.
    clean = {k: re.sub(r"[^\w.-]", "_", v, flags=re.A)[:63].strip("-_.") for k, v in labels.items()}
    return "".join(f"{settings.resource_domain}/{k}={v}\n" for k, v in clean.items() if v)


class KeptFiles:
    """The files that the flags ask for. Written by rename, so that nobody reads half of one, and in
    a thread that nothing waits for: their folder may hang."""

    def __init__(self, settings: Settings) -> None:
        self.settings, self._thread = settings, threading.Thread()
        cdi, labels = settings.cdi_dir, settings.labels_dir
        wanted = (cdi, CDI_FILE, cdi_spec), (labels, "tt-device-plugin", node_labels)
        self._files = [(top / name, make, LogOnChange()) for top, name, make in wanted if top]
        self._named: dict[str, list[str]] = {}  # card ID in the CDI file -> device nodes

    def keep(self, snapshot: Snapshot) -> None:
        """Makes them say what `snapshot` does. Once a poll, so what has failed is tried again."""
        if self._files and not self._thread.is_alive():
            self._thread = threading.Thread(target=self._keep, args=(snapshot,), daemon=True)
            self._thread.start()

    def remove(self) -> None:
        """Removes them, once they are written. Waits for that for 0.5 s at most."""
        ending = threading.Thread(target=self._remove, daemon=True)
        ending.start()
        ending.join(0.5)

    def _remove(self) -> None:
        if self._thread.is_alive():  # the one that writes
            self._thread.join()
        for path, *_ in self._files:
            for each in (path, path.with_name(DRAFT.format(path.name))):
                with contextlib.suppress(OSError):
                    each.unlink()

    def _keep(self, snapshot: Snapshot) -> None:
        healthy = [card for card in snapshot.cards if card.verdict.health == HEALTHY]
        for path, make, trouble in self._files:
            text, cdi = make(self.settings, snapshot), path.name == CDI_FILE
            try:
                if text != (path.read_text(errors="replace") if path.exists() else ""):
                    self._named = {} if cdi else self._named
                    self._write(path, text)
                if cdi:
                    self._named = {card.id: card.device_nodes for card in healthy}
                trouble.set("", f"{path} is kept again")
            except OSError as error:
                trouble.set(f"cannot keep {path}: {error.strerror}; trying again")

    def _write(self, path: Path, text: str) -> None:
        if not text:
            return path.unlink()
        if not path.parent.is_dir():
            path.parent.mkdir()
            path.parent.chmod(0o755)
        new = path.with_name(DRAFT.format(path.name))
        new.write_text(text)
        new.chmod(0o644)
        new.replace(path)

    def cdi_names(self, cards: Sequence[Card]) -> list[str]:
        """The CDI names of `cards`; [] unless the file has all of them, as they are now: a name
        that leads nowhere would keep the container from starting."""
        known = all(self._named.get(card.id) == card.device_nodes for card in cards)
        return [f"{CDI_KIND}={card.id}" for card in cards] if known else []


# ==== D. The command line: --fake, --list, --dry-run, and main() ==================================

# Model -> tt_card_type, architecture, product code in the serial (tt-kmd telemetry.c), the bus
# numbers at which a Galaxy's trays 1 to 4 begin (tt-smi constants.py).
FAKE_CARDS = {
    "n150": ("n150", "wormhole", 0x18, ()),
    "n300": ("n300", "wormhole", 0x14, ()),
    "galaxy-wormhole": ("galaxy-wormhole", "wormhole", 0x35, (0xC0, 0x80, 0x00, 0x40)),
    "p100": ("p100a", "blackhole", 0x43, ()),
    "p150": ("p150a", "blackhole", 0x40, ()),
    "p300": ("p300a", "blackhole", 0x45, ()),
    "galaxy-blackhole": ("galaxy-blackhole", "blackhole", 0x47, (0x00, 0x40, 0xC0, 0x80)),
}


def lay_out(top: Path, chip: Chip, node: str = os.devnull) -> None:
    """Makes what tt-kmd 2.10 shows of `chip` in the folders sys and dev of `top`; its device node
    is a link to `node`. As in a probe, the link in the class comes last."""
    device = f"devices/pci{chip.pci[:7]}/{chip.pci}"
    entry, rdev = f"{device}/tenstorrent/tenstorrent!{chip.index}", os.stat(node).st_rdev
    tree = {  # path -> text, or target if it has a slash; without a text there is no file
        "sys/module/tenstorrent/version": "2.10.0",
        f"sys/{device}/vendor": VENDOR,
        f"sys/{device}/device": next(i for i, arch in ARCHITECTURES.items() if arch == chip.arch),
        f"sys/{device}/numa_node": "-1" if chip.numa_node is None else str(chip.numa_node),
        f"sys/{device}/iommu_group/type": chip.iommu,
        f"sys/{entry}/dev": f"{os.major(rdev)}:{os.minor(rdev)}",
        f"sys/{entry}/tt_card_type": chip.card_type,
        f"sys/{entry}/tt_asic_id": chip.asic_id,
        f"sys/{entry}/tt_serial": chip.serial,
        f"sys/{entry}/tt_fw_bundle_ver": chip.firmware,
        f"sys/{entry}/device": "../..",
        f"sys/bus/pci/devices/{chip.pci}": f"../../../{device}",
        f"dev/tenstorrent/{chip.index}": node,
        f"sys/class/tenstorrent/tenstorrent!{chip.index}": f"../../{entry}",
    }
    for path, text in tree.items():
        if text:
            (top / path).parent.mkdir(parents=True, exist_ok=True)
            make = (top / path).symlink_to if "/" in text else (top / path).write_text
            make(text)


def make_fake_tree(top: Path, cards: Mapping[str, int]) -> None:
    """Lays out in `top` so many cards of each model."""
    boards = [(model, board) for model, count in cards.items() for board in range(count)]
    chips = [(*each, chip) for each in boards for chip in range(2 if each[0] == "p300" else 1)]
    for index, (model, board, chip) in enumerate(chips):
        card_type, arch, product, trays = FAKE_CARDS[model]
        bus = index + 1
        if trays:  # four trays of eight, positions 1 to 8; a PCI domain for each Galaxy
            pci_domain = board // 32 + (1 if arch == "wormhole" else 17)
            bus = (pci_domain << 8) + trays[board // 8 % 4] + board % 8 + 1
        made = Chip(f"{bus >> 8:04x}:{bus & 0xFF:02x}:00.0", index, arch=arch, card_type=card_type)
        asic_id = f"{0xFA4E << 48 | product << 32 | board << 8 | chip:016X}"
        serial = f"{product << 36 | 0xFA4E0000 | board + 1:016X}"
        lay_out(top, replace(made, asic_id=asic_id, serial=serial, firmware="19.5.0.0"))


def fake_spec(text: str) -> dict[str, int]:
    """n150=2,p300=1 as a dict; at most 200 chips. Raises ValueError."""
    pairs = [part.strip().split("=") for part in text.split(",")]
    cards = {model: int(count) for model, count in pairs}  # ValueError for what is no pair
    chips = sum(cards.values()) + cards.get("p300", 0)
    known = cards.keys() <= FAKE_CARDS.keys() and len(cards) == len(pairs)
    if not known or min(cards.values()) < 1 or chips > 200:
        raise ValueError
    return cards


def listen_address(text: str) -> tuple[str, int]:
    """An IP address, "" for all, and a port, 0 for any. Raises ValueError."""
    parts = urllib.parse.urlsplit(f"//{text}")
    host = str(ipaddress.ip_address(parts.hostname)) if parts.hostname else ""
    if parts.netloc != text or "@" in text or parts.port is None:
        raise ValueError
    return host, parts.port


def domain(text: str) -> str | None:
    """What may come before the slash of a resource; None for what may not."""
    label = "[a-z0-9]([-a-z0-9]*[a-z0-9])?"
    reserved = re.search(r"kubernetes\.io$|^requests\.", text)
    valid = len(text) <= 253 and re.fullmatch(rf"{label}(\.{label})*", text)
    return text if valid and not reserved else None


FLAGS = """
--list                              print what would be advertised, and what would not and why
--json                              with --list: as JSON
--dry-run                           walk through the five steps with an embedded kubelet
--fake MODEL=N[,...]                made-up cards instead of this node's: n150=2,p300=1
--kubelet-dir DIR                   the sockets are in DIR/device-plugins; default: %(default)s
--sysfs-root DIR                    where sysfs is; default: %(default)s
--dev-root DIR                      where the host's /dev is; default: %(default)s
--poll-seconds S                    time between polls, from 0.1 to 60; default: %(default)s
--resource-domain D                 what comes before the slash; default: %(default)s
--variants                          p150a, p150b and p150c instead of p150
--hugepages auto|always|never       mount the host's 1 GiB pages; default: auto, where needed
--cdi-dir DIR                       keep a CDI specification there; usual: /var/run/cdi
--labels-dir DIR                    keep a file of node labels there, for Node Feature Discovery
--listen ADDR:PORT                  HTTP: /healthz, /readyz, /metrics; :PORT for all addresses
--log-format text|json              default: text
--log-level debug|info|warning|error  default: info
"""
SWITCH = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
# Metavar -> what a value must be, and how to read it: None or ValueError for a wrong one.
TYPES: dict[str, tuple[str, Callable[[str], Any]]] = {
    "": ("true or false", lambda t: SWITCH.get(t.lower())),
    "MODEL=N[,...]": (f"MODEL=N,... of {', '.join(FAKE_CARDS)}, up to 200 chips", fake_spec),
    "DIR": ("an absolute path", lambda t: Path(t) if t[:1] == "/" and "\0" not in t else None),
    "S": ("seconds, from 0.1 to 60", lambda t: s if 0.1 <= (s := float(t)) <= 60 else None),
    "D": ("a DNS name that resources may have, such as tenstorrent.com", domain),
    "ADDR:PORT": ("IP-ADDRESS:PORT, such as [::1]:7762, or :7762 for all", listen_address),
}


def flag_value(metavar: str, text: str) -> Any:
    """The value of a flag. Raises argparse.ArgumentTypeError."""
    choices = {each: each for each in metavar.split("|")}
    what, convert = TYPES.get(metavar, (f"one of {metavar}", choices.get))
    with contextlib.suppress(ValueError):
        if (value := convert(text)) is not None:
            return value
    raise argparse.ArgumentTypeError(f"{text!r} is not {what}")


def parse(argv: Sequence[str], environment: Mapping[str, str]) -> argparse.Namespace:
    """The flags: those of `argv` win over the environment's. Exits with code 2 if one is wrong."""
    parser = argparse.ArgumentParser(
        prog="tt-device-plugin",
        description="Kubernetes device plugin for Tenstorrent cards. It serves until SIGTERM.",
        epilog="Every flag can be set by an environment variable: --kubelet-dir is "
        "TT_DEVICE_PLUGIN_KUBELET_DIR, a flag without a value takes true or false there. "
        "Exit codes: 0 told to stop, 1 cannot work, 2 usage.",
        allow_abbrev=False,
    )
    defaults, wrong = {each.name: each.default for each in fields(Settings)}, ""
    defaults |= {"log_format": "text", "log_level": "info"}
    for line in FLAGS.strip().splitlines():
        flag, metavar, text = re.findall(r"^(\S+)(?: (\S+))?  +(.+)$", line)[0]
        name, kind = flag[2:].replace("-", "_"), functools.partial(flag_value, metavar)
        default, variable = defaults.get(name, False), f"TT_DEVICE_PLUGIN_{name.upper()}"
        try:
            default = kind(environment[variable]) if environment.get(variable) else default
        except argparse.ArgumentTypeError as error:
            wrong = f"environment variable {variable}: {error}"
        how: Any = {"type": kind, "metavar": metavar} if metavar else {"action": "store_true"}
        parser.add_argument(flag, **how, default=default, help=text)
    version = f"tt-device-plugin {__version__} ({VERSIONS}, protobuf {google.protobuf.__version__})"
    parser.add_argument("--version", action="version", version=version)
    options = parser.parse_args(argv)
    if wrong:
        parser.error(wrong)
    if options.json and not options.list:
        parser.error("--json goes with --list")
    if options.list and options.dry_run:
        parser.error("--list and --dry-run exclude each other")
    socket_name = SOCKET.format(model=max(FAKE_CARDS, key=len), token="0" * 6)
    longest = Settings(kubelet_dir=options.kubelet_dir).plugin_dir / socket_name
    if (excess := len(os.fsencode(longest)) - 107) > 0:  # Linux unix(7): 108 with the NUL
        text = f"is {excess} bytes too long for the paths of sockets in it"
        parser.error(f"--kubelet-dir {options.kubelet_dir} {text}")
    return options


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


def print_list(snapshot: Snapshot) -> None:
    """Prints the cards of a snapshot in columns, with the reasons below."""
    if not snapshot.cards:
        why = f" (driver {snapshot.driver})." if snapshot.driver else ": the driver is not loaded."
        print("No Tenstorrent cards" + why)
        return
    rows = [("RESOURCE", "ID", "DEVICE", "PCI ADDRESS", "NUMA", "HEALTH")]
    for card in snapshot.cards:
        devices = ",".join(str(chip.index) for chip in card.chips if chip.index >= 0)
        addresses = ",".join(chip.pci for chip in card.chips)
        numa, offered = ",".join(map(str, card.numa_nodes)) or "-", card.resource or "not offered"
        rows.append((offered, card.id, devices, addresses, numa, card.verdict.health))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(map(str.ljust, row, widths)).rstrip())
    for card in snapshot.cards:
        if card.verdict.reason:
            print(f"\n{card.id}: {card.verdict.reason}")


class DryRunKubelet(rpc.RegistrationServicer):
    """A kubelet that takes any registration."""

    def __init__(self) -> None:
        self.requests: asyncio.Queue[api.RegisterRequest] = asyncio.Queue()

    async def Register(self, request: api.RegisterRequest, context: Any) -> api.Empty:
        """Hands it on."""
        await self.requests.put(request)
        return api.Empty()


def print_step(step: str, *lines: object) -> None:
    """Prints one of README's five steps, with messages on one line each."""
    print(f"\n{step}", *(" ".join(str(line).split()) for line in lines), sep="\n", flush=True)


async def dry_run(settings: Settings) -> int:
    """Plays the kubelet for the real plugin, and prints the five steps. Returns the exit code."""
    log.setLevel(logging.ERROR)  # the steps tell the story
    settings.plugin_dir.mkdir()
    server, kubelet = grpc.aio.server(), DryRunKubelet()
    rpc.add_RegistrationServicer_to_server(kubelet, server)
    try:
        server.add_insecure_port(grpc_target(settings.plugin_dir / "kubelet.sock"))
        async with running(server):
            await dry_run_steps(settings, kubelet)
        print("\nEvery step held.")
        return 0
    except (CannotWork, OSError, RuntimeError, grpc.aio.AioRpcError, asyncio.TimeoutError) as error:
        problem = error.details() if isinstance(error, grpc.aio.AioRpcError) else str(error)
        print(f"\nFAILED after the step above: {problem or 'no answer in time'}")
        return 1


async def dry_run_steps(settings: Settings, kubelet: DryRunKubelet) -> None:
    """All steps of all resources. Raises CannotWork, OSError, AioRpcError, TimeoutError."""
    print_step(f"1. Discover: the cards under {settings.sysfs_root}")
    snapshot = Inventory(settings).poll(time.monotonic())
    print_list(snapshot)
    if not (left := set(snapshot.resources)):
        raise CannotWork("no card could be offered")
    plugin = asyncio.create_task(serve(settings))
    try:
        while left:
            request = await asyncio.wait_for(kubelet.requests.get(), STREAM_S)
            if request.resource_name in left:  # else its stream has ended, and it registers again
                left.remove(request.resource_name)
                print_step("2. Register: the plugin calls the kubelet", request)
                target = grpc_target(settings.plugin_dir / request.endpoint)
                async with grpc.aio.insecure_channel(target) as channel:
                    await dry_run_resource(rpc.DevicePluginStub(channel), request)
    finally:
        await cancel_and_wait([plugin])


async def dry_run_resource(plugin: Any, request: api.RegisterRequest) -> None:
    """Steps 3 to 5 of one resource. Raises CannotWork, AioRpcError, TimeoutError."""
    stream = plugin.ListAndWatch(api.Empty())
    devices = (await asyncio.wait_for(stream.read(), STREAM_S)).devices
    step = f"3. ListAndWatch: the kubelet calls {request.endpoint}, and keeps the stream open"
    print_step(step, *devices)
    healthy = [device.ID for device in devices if device.health == HEALTHY]
    if not healthy:
        raise CannotWork(f"no card of {request.resource_name} is healthy: its Pods would wait")
    for card_id in healthy:
        one = api.ContainerAllocateRequest(devices_ids=[card_id])
        allocate = api.AllocateRequest(container_requests=[one])
        answer = (await plugin.Allocate(allocate, timeout=STREAM_S)).container_responses[0]
        step = f"4. Allocate: a Pod that asks for one {request.resource_name} could get {card_id}:"
        lines = [f"device {d.container_path} from {d.host_path} (rw)" for d in answer.devices]
        lines += [f"env {name}={value}" for name, value in answer.envs.items()]
        lines += [f"mount {m.container_path} from {m.host_path}" for m in answer.mounts]
        print_step(step, *lines)
        start = api.PreStartContainerRequest(devices_ids=[card_id])
        await plugin.PreStartContainer(start, timeout=STREAM_S)
        print_step(f"5. PreStartContainer: {card_id} is still there and healthy")


STOP_SIGNALS = {signal.SIGTERM, signal.SIGINT}


async def until_signal(work: Coroutine[Any, Any, int | None]) -> int:
    """Runs `work` to its end, or until SIGTERM or SIGINT cancels it. Returns the exit code.

    Both signals stay blocked in all threads, so that none can kill the process while it starts or
    ends, and a thread waits for the first one.
    """
    task, loop = asyncio.ensure_future(work), asyncio.get_running_loop()

    def wait_for_signal() -> None:
        signal.sigwait(STOP_SIGNALS)
        with contextlib.suppress(RuntimeError):  # the loop is closed: it has ended by itself
            loop.call_soon_threadsafe(task.cancel)

    threading.Thread(target=wait_for_signal, name="signals", daemon=True).start()
    try:
        return await task or 0
    except asyncio.CancelledError:
        log.info("told to stop, and done")
        return 0
    finally:
        # gRPC's handlers end after their server. asyncio.run would cancel them, with a traceback.
        if ending := asyncio.all_tasks() - {asyncio.current_task()}:
            await asyncio.wait(ending, timeout=STOP_S)


def run(options: argparse.Namespace, stack: contextlib.ExitStack) -> int:
    """Does what the flags say. Returns the exit code. Raises CannotWork, OSError."""
    settings = Settings(**{each.name: getattr(options, each.name) for each in fields(Settings)})
    if options.fake or options.dry_run:
        import tempfile

        try:
            folder = tempfile.TemporaryDirectory(prefix="tt-plugin-", ignore_cleanup_errors=True)
        except OSError as error:
            remedy = "set TMPDIR to a folder that can be written"
            raise CannotWork(f"cannot make a temporary folder: {error}; {remedy}") from error
        top = Path(stack.enter_context(folder))
    if options.fake:
        make_fake_tree(top, options.fake)
        settings = replace(settings, sysfs_root=top / "sys", dev_root=top / "dev")
    if options.list:
        snapshot = Inventory(settings).poll(time.monotonic())
        if options.json:
            print(json.dumps([describe(card) for card in snapshot.cards], indent=2))
        else:
            print_list(snapshot)
        return 0
    if options.dry_run:
        settings = replace(settings, kubelet_dir=top, cdi_dir=None, labels_dir=None, listen=None)
        return asyncio.run(until_signal(dry_run(settings)))
    if options.fake:
        remove = "remove a tenstorrent!N in sys/class/tenstorrent to see one vanish"
        log.info("made-up cards in %s: %s", top, remove)
    return asyncio.run(until_signal(serve(settings)))


def main() -> NoReturn:
    """The program. Ends the process; raises SystemExit(2) for wrong flags."""
    # Before any thread is started, which inherits this: see until_signal.
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    options = parse(sys.argv[1:], os.environ)
    lines = set_up_logging(options.log_format, options.log_level)
    try:
        with contextlib.ExitStack() as stack:
            code = run(options, stack)
    except Exception as error:
        log.error("%s", error, exc_info=not isinstance(error, (CannotWork, OSError)))
        code = 1
    with lines.all_tasks_done:  # what has been logged is to be written, unless nobody reads it
        lines.all_tasks_done.wait_for(lambda: not lines.unfinished_tasks, 0.5)
    with contextlib.suppress(OSError):  # nobody reads it any more
        sys.stdout.flush()
    # Python's own way out can wait for ever: for a log that nobody reads, or for gRPC's threads.
    os._exit(code)


if __name__ == "__main__":
    main()
