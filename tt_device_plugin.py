#!/usr/bin/env python3
"""A Kubernetes device plugin for Tenstorrent cards, in one file, to be read from top to bottom.

What the kubelet expects of a device plugin, in five steps (README.md has the diagram):

1. **Discover.** Find the cards of this node and judge their health: here once a second, in sysfs.
2. **Register.** Serve the DevicePlugin service on a Unix socket beside the kubelet's own, and tell
   the kubelet the socket's name and the resource, such as `tenstorrent.com/n150`.
3. **ListAndWatch.** The kubelet opens one stream and keeps it. Each message is the whole list.
4. **Allocate.** For each container that asks for cards: its device nodes, environment and mounts.
5. **PreStartContainer.** Before each start and restart of it: are its cards there and healthy?

What this plugin guarantees beyond that:

- A resource is registered if and only if a ListAndWatch stream of it is open. The end of the
  stream is the only signal. Whatever ended it, the plugin registers again once a kubelet answers.
- A card's ID comes from its hardware alone. A card that was offered stays listed, Unhealthy with a
  reason, until it is back.
- Unknown is not dead: missing files, old drivers and late telemetry decide nothing.
- A read that hangs costs its own card only, and no call waits for a read.

What it does not do: it opens no device node, resets no card, wipes no memory between Pods, and
talks to nobody but the kubelet. It knows of a card's health only what the driver shows in sysfs.

The one idea: a thread reads sysfs into an immutable snapshot, and everything else reads the newest
snapshot. Decisions are functions of what was read, what is remembered, and `now`.

Words: a *chip* is one PCIe device, /dev/tenstorrent/N. A *card* is what a Pod gets: one chip, or
the two of a p300. The *device node* is the file; *node* alone is the Kubernetes node. A *snapshot*
holds the cards, each with its *verdict* and the *reason* for it.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import errno
import fcntl
import functools
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
from collections.abc import (
    AsyncIterator,
    Callable,
    Coroutine,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from dataclasses import dataclass, field, fields, replace
from itertools import chain, takewhile
from pathlib import Path
from typing import Any, NamedTuple

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
    fake: bool = False

    @property
    def plugin_dir(self) -> Path:
        """The folder that the kubelet and its plugins share sockets in."""
        return self.kubelet_dir / "device-plugins"


class CannotWork(Exception):
    """The plugin cannot start or go on. The text names the folder, the user, and the remedy."""


class LogOnChange:
    """A lasting problem, logged when it changes and not each time that it is found again."""

    def __init__(self) -> None:
        self.problem = ""  # "" while there is none

    def set(self, problem: str, over: str = "") -> None:
        """Logs `problem` once when it appears or changes, and `over` once when it clears."""
        before, self.problem = self.problem, problem
        if problem and problem != before:
            log.warning("%s", problem)
        elif before and not problem and over:
            log.info("%s", over)


# ==== 2. Records: what was read, what follows from it, and what everybody else sees ===============

HEALTHY, UNHEALTHY = "Healthy", "Unhealthy"
"""The two words of the device plugin API for a card's health."""

PENDING = "pending"
"""Our own third word: not to be offered. A card that was offered before is Unhealthy instead."""


@dataclass(frozen=True, slots=True)
class Chip:
    """Facts of a chip that stay while its class device exists. Texts are "" where there is none."""

    pci: str  # PCI address, 0000:01:00.0
    index: int = -1  # N of /dev/tenstorrent/N, another one after a reset; -1: no class device
    inode: int = 0  # of the class device's folder in sysfs: a chip that was probed anew has another
    pci_path: tuple[str, ...] = ()  # root bus and bridges above it, outermost first
    driver: str = ""  # PCI driver, asked only where there is no class device
    dev: str = ""  # "major:minor" of the device node
    arch: str = ""  # wormhole, blackhole
    card_type: str = ""  # n150, p300a, unknown (to the driver); "" without telemetry
    asic_id: str = ""  # 16 hex digits, unique on a host; "" if the driver has none
    serial: str = ""  # 16 hex digits, the board's: all chips of a Galaxy show the same
    firmware: str = ""  # bundle version, 19.5.0.0
    numa_node: int | None = None
    iommu: str = ""  # type of its IOMMU group: DMA, DMA-FQ, identity; "" without an IOMMU
    unidentified: str = "pending"  # why nobody knows which card this is, a key of REASONS, or ""

    @property
    def place(self) -> tuple[int, int, str]:
        """What tells its class device from all others: see Discovery.place."""
        return self.index, self.inode, self.pci

    @property
    def id(self) -> str:
        """Its name in /dev/tenstorrent/by-id; the PCI address where the driver has no ASIC id."""
        return f"{self.arch}-{self.asic_id}" if self.asic_id else self.pci

    @property
    def card_id(self) -> str:
        """The ID of the card that this chip is part of: a function of the chip's hardware alone.

        The kubelet remembers IDs across restarts of the plugin. A chip that went by one ID now and
        by another later would be given to two Pods. A chip that is not identified has its PCI
        address here, to be listed by, and is not offered.
        """
        if self.unidentified:
            return self.pci
        return f"p300-{self.serial}" if self.card_type.startswith("p300") else self.id


class Reading(NamedTuple):
    """What one poll saw of a chip."""

    heartbeat: int | None = None  # None: there is no such file, or it could not be read
    fault: str = ""  # a key of REASONS that needs no history; "" if there is none
    detail: str = ""  # the error's name, such as EIO, for the fault `unreadable`


@dataclass(frozen=True, slots=True)
class Verdict:
    """The health of a chip or card."""

    health: str = HEALTHY  # HEALTHY, UNHEALTHY or PENDING
    kind: str = "ok"  # ok, or a key of REASONS
    reason: str = ""  # for the admin; without numbers that change from poll to poll
    since: float = 0.0  # time.time() since when a card has had this health
    began: float = 0.0  # the same moment in time.monotonic(), which nobody sets


@dataclass(frozen=True, slots=True)
class Card:
    """What a Pod gets."""

    id: str  # at most 63 characters
    model: str  # n150; "" if not known
    resource: str | None  # tenstorrent.com/n150; None: not offered, the verdict says why
    chips: tuple[Chip, ...]  # one, or the two of a p300, ordered by PCI address; as last seen
    verdict: Verdict

    @property
    def numa_nodes(self) -> list[int]:
        """The NUMA nodes of its chips; [] if none is known."""
        return sorted({chip.numa_node for chip in self.chips if chip.numa_node is not None})

    @property
    def device_nodes(self) -> list[str]:
        """Where its chips' device nodes are now, or were last."""
        return [f"/dev/tenstorrent/{chip.index}" for chip in self.chips if chip.index >= 0]

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
#
# tt-kmd makes one class device a chip, /sys/class/tenstorrent/tenstorrent!N, with a link `device`
# to the PCI function. The tt_* files in it appear when the chip's firmware has delivered its
# telemetry: at once, up to two minutes later (Wormhole), or never. Driver and firmware decide which
# of them there are: any may be missing.

VENDOR = "0x1e52"
"""Tenstorrent's PCI vendor id (tt-kmd enumerate.h)."""

ARCHITECTURES = {"0x401e": "wormhole", "0xb140": "blackhole"}
"""PCI device id -> architecture, as in /dev/tenstorrent/by-id (tt-kmd 2.6.0, its udev rule)."""

PCI_ADDRESS = re.compile(r"[0-9a-f]{4,8}:[0-9a-f]{2}:[0-9a-f]{2}\.[0-7]")

CARD_TYPE = r"[a-z0-9]([-a-z0-9.]{0,14}[a-z0-9])?"
"""What fits into the name of a resource, and of its socket."""

Place = tuple[int, int, str]
"""N of a class device, the inode number of its folder, and the PCI address that it leads to."""


def read_attribute(path: str) -> str:
    """The text of a sysfs attribute, stripped; bytes that are no ASCII become '?'. Raises OSError.

    Blocks for as long as the driver does: files that the driver fills are for a ChipReader alone.
    """
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
    try:
        status = os.stat(path)
    except OSError:
        return False
    found = f"{os.major(status.st_rdev)}:{os.minor(status.st_rdev)}"
    return stat.S_ISCHR(status.st_mode) and found == dev


class Discovery:
    """All that the plugin knows of where Tenstorrent's chips are and what they say."""

    def __init__(self, settings: Settings) -> None:
        self.sysfs = str(settings.sysfs_root)
        self.nodes = f"{settings.dev_root}/tenstorrent"

    def folder(self, index: int) -> str:
        """The folder of the tt_* files of /dev/tenstorrent/`index`."""
        return f"{self.sysfs}/class/tenstorrent/tenstorrent!{index}"

    def driver(self) -> str:
        """The version of the loaded driver, or ""."""
        return attribute(f"{self.sysfs}/module/tenstorrent/version", r"[\w.+~-]{1,40}")

    def places(self) -> list[Place]:
        """The class devices there are; [] without the driver. Raises OSError."""
        names: list[str] = []
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            names = os.listdir(f"{self.sysfs}/class/tenstorrent")
        found = (re.fullmatch(r"tenstorrent!(0|[1-9][0-9]{0,5})", name) for name in names)
        places = (self.place(int(match[1])) for match in found if match)
        return [place for place in places if place]

    def place(self, index: int) -> Place | None:
        """The class device that is N now, from links alone, which never hang; None without one.

        In sysfs, the inode number alone tells one from the next: the times of a folder are those at
        which it came into the cache. Other file systems give out the same number again at once.
        """
        folder = self.folder(index)
        try:
            inode = os.stat(folder).st_ino
            linked = os.readlink(folder if os.path.islink(folder) else f"{folder}/device")
        except OSError:  # it has just vanished
            return None
        addresses = PCI_ADDRESS.findall(linked)
        return (index, inode, addresses[-1]) if addresses else None

    def locate(self, place: Place) -> Chip | None:
        """The chip of a class device, from links alone; None if it is no PCI function."""
        try:
            parts = os.path.realpath(f"{self.folder(place[0])}/device", strict=True).split("/")
        except OSError:
            return None
        path = [part for part in parts if part.startswith("pci") or PCI_ADDRESS.fullmatch(part)]
        index, inode, pci = place
        return Chip(pci, index, inode, tuple(path[:-1])) if path[-1:] == [pci] else None

    def functions(self) -> list[Chip]:
        """Tenstorrent's PCI functions, also those with another driver or a failed probe."""
        chips = []
        for device in sorted(Path(self.sysfs, "bus/pci/devices").glob("*")):
            if PCI_ADDRESS.fullmatch(device.name) and attribute(f"{device}/vendor") == VENDOR:
                link = device / "driver"
                driver = link.resolve().name if link.exists() else "none"
                arch = ARCHITECTURES.get(attribute(f"{device}/device"), "")
                chips.append(Chip(device.name, arch=arch, driver=driver))
        return chips

    def look_at(self, chip: Chip) -> tuple[Chip, Reading]:
        """What a chip is, as far as that was not known, and how it is. May hang with the driver."""
        if chip.unidentified:
            chip = self.identify(chip)
        if not chip.firmware:
            file = f"{self.folder(chip.index)}/tt_fw_bundle_ver"
            chip = replace(chip, firmware=attribute(file, r"[0-9.]{1,40}"))
        reading = self.sense(chip)
        if reading.fault == "resetting":  # a reset may bring other firmware: read that again
            chip = replace(chip, firmware="")
        return chip, reading

    def identify(self, chip: Chip) -> Chip:
        """`chip` with all that sysfs tells about it."""
        folder = self.folder(chip.index)
        device = f"{folder}/device"
        for pause in (0.0, 0.1):
            time.sleep(pause)
            card_type = attribute(f"{folder}/tt_card_type", CARD_TYPE)
            asic_id, serial = (
                hardware_id(f"{folder}/{name}") for name in ("tt_asic_id", "tt_serial")
            )
            # The driver makes the tt_* files one after another, and a bus that is dead for a moment
            # makes any type "unknown". Only what is the same a moment later is a fact.
            if not card_type or (card_type != "unknown" and asic_id):
                break
        arch = ARCHITECTURES.get(attribute(f"{device}/device"), "")
        # A p300 is paired by its serial. That of early boards ends in zeros and is not unique.
        unpaired = card_type.startswith("p300") and (serial or "")[8:] in ("", "0" * 8)
        nonsense = asic_id is None or (card_type == "unknown" and serial is None)
        unidentified = "unidentified" if nonsense or unpaired or not arch else ""
        dev = attribute(f"{folder}/dev", r"[0-9]+:[0-9]+")
        numa_node = attribute(f"{device}/numa_node", r"[0-9]{1,4}")  # -1: the host does not know
        return replace(
            chip,
            dev=dev,
            arch=arch,
            card_type=card_type,
            asic_id=asic_id or "",
            serial=serial or "",
            numa_node=int(numa_node) if numa_node else None,
            iommu=attribute(f"{device}/iommu_group/type", r"[A-Za-z-]{1,20}"),
            unidentified=unidentified if card_type and dev else "pending",
        )

    def sense(self, chip: Chip) -> Reading:
        """One look at a chip's heartbeat and device node.

        A driver before 2.7 has no heartbeat, and could oops the kernel when read from while a chip
        goes (tt-kmd a972eed): opening a file that is not there does not reach the driver.
        """
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
        node = f"{self.nodes}/{chip.index}"
        if fault in ("", "unreadable") and not is_device_node(node, chip.dev):
            fault = "no-node"
        return Reading(heartbeat, fault, detail)


# ==== 4. Health: what is remembered of a chip + a reading + now -> a verdict with its reason ======
#
# Judged anew at each poll, in both directions. README's table "Health" is the specification.

HEARTBEAT_S = 12.0
"""A heartbeat that stays equal for longer is a hung chip: the firmware's own watchdog takes 10 s
(auto_reset_timeout in tt-kmd module.c)."""

HEARTBEAT_READS = 3
"""... if it was read as equal so often: while this process is stopped, only time passes."""

TELEMETRY_S = 130.0
"""How long after a chip's appearance its telemetry may still come: the driver asks 120 times, once
a second (tt-kmd wormhole.c, since 2.4.0)."""

REASONS = {
    "gone": "it is gone from sysfs: in a reset, unplugged, or the driver is unloaded; if it stays "
    "away, see dmesg; if it was taken out for good, restart the plugin, which then forgets it",
    "resetting": "it is being reset and does not answer yet; if this lasts for minutes, reset it "
    "again: tt-smi -r",
    "bus-dead": "its PCIe bus answers all ones: reset it with tt-smi -r, or power-cycle the host",
    "no-node": "its device node /dev/tenstorrent/{chip.index} is missing or another device: is "
    "--dev-root the host's /dev?",
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
    "no-driver": "it has no device node: its PCI driver is {chip.driver}, not tenstorrent; see "
    "dmesg if it should be",
}
"""Kind of a verdict -> what is wrong and what to do, without the card's name and the time."""

NOT_OFFERED = ("pending", "no-telemetry", "unidentified", "half", "same-id", "no-driver")
"""Kinds that keep a card off the list, if it was not on it. Others show it there, Unhealthy..."""

HARMLESS = ("unreadable",)
"""... except these: Healthy, with something that the admin should know."""


def make_verdict(kind: str, **facts: object) -> Verdict:
    """The verdict of one kind of REASONS. Raises KeyError for a fact that its text lacks."""
    health = PENDING if kind in NOT_OFFERED else HEALTHY if kind in HARMLESS else UNHEALTHY
    return Verdict(health, kind, REASONS[kind].format(**facts))


class HealthHistory:
    """What is remembered of one chip while its class device exists. Times are time.monotonic().

    A chip that has failed is trusted again after `recovery_beats` changes of its heartbeat: two
    after it was hung, as one could be the last of a dying chip; one after a reset or a dead bus.
    """

    def __init__(self, appeared: float) -> None:
        self.appeared = appeared
        self.heartbeat: int | None = None  # the newest that could be read
        self.changed_at = appeared  # when it was first read as such
        self.equal_reads = 0  # how often it was read as equal since
        self.failure = ""  # the last one: hung, resetting or bus-dead
        self.recovery_beats = 0  # changes still needed before the chip counts as Healthy

    def update(self, chip: Chip, reading: Reading, now: float) -> Verdict:
        """Takes in one reading, and says what it means."""
        self._observe(reading, now)
        kind = reading.fault
        if not kind or kind in HARMLESS:
            kind = chip.unidentified or (self.failure if self.recovery_beats else kind)
        if kind == "pending" and now - self.appeared > TELEMETRY_S:
            kind = "no-telemetry"
        return make_verdict(kind, chip=chip, detail=reading.detail) if kind else Verdict()

    def _observe(self, reading: Reading, now: float) -> None:
        if reading.fault in ("resetting", "bus-dead"):
            self.failure, self.recovery_beats = reading.fault, 1
            self.heartbeat = None  # the first one after a reset differs, and proves nothing
        elif reading.heartbeat is None:
            if not reading.fault:  # no such file: a driver before 2.7, or firmware without it
                self.recovery_beats = 0
        elif reading.heartbeat != self.heartbeat:
            if self.heartbeat is not None:
                self.recovery_beats = max(0, self.recovery_beats - 1)
            self.heartbeat, self.changed_at, self.equal_reads = reading.heartbeat, now, 0
        else:
            self.equal_reads += 1
            if self.equal_reads >= HEARTBEAT_READS and now - self.changed_at > HEARTBEAT_S:
                self.failure, self.recovery_beats = "hung", 2


# ==== 5. Cards: chips -> cards -> the next snapshot; the polling thread, which wakes the streams ==

READ_S = 2.0
"""How long a poll waits for the reads of all chips together."""

Judged = tuple[Chip, Verdict]


def judge_card(members: Sequence[Judged], known: Card | None) -> Verdict:
    """A card's verdict from those of its chips. `known` is the card as it was offered before.

    Half a p300 is never offered: its chips would go by one ID alone and by another as a pair.
    """
    first, here = members[0][0], ", ".join(chip.pci for chip, _ in members)
    wanted = 2 if first.card_id.startswith("p300-") else 1
    if len(members) < wanted:
        away = [chip.pci for chip in known.chips if chip.id != first.id] if known else []
        return make_verdict("half", here=here, missing=", ".join(away) or "the other one")
    if len(members) > wanted:
        return make_verdict("same-id", here=here)
    order = (HEALTHY, PENDING, UNHEALTHY)
    chip, worst = max(members, key=lambda each: (order.index(each[1].health), each[1].reason))
    several = wanted > 1 and worst.reason
    return replace(worst, reason=f"chip {chip.pci}: {worst.reason}") if several else worst


def make_card(members: Sequence[Judged], known: Card | None, settings: Settings) -> Card:
    """The card that `members` make up. `known` is the card of this ID as it was offered before."""
    first, verdict = members[0][0], judge_card(members, known)
    chips = [chip for chip, _ in members]
    if known and verdict.kind == "half":  # go on to show the chip that is away
        chips += [chip for chip in known.chips if chip.id != first.id]
        chips.sort(key=lambda chip: chip.pci)
    model = first.arch if first.card_type == "unknown" else first.card_type
    if not settings.variants:
        model = re.sub(r"^(p\d+)[abc]$", r"\1", model)
    offered = verdict.health != PENDING and not first.unidentified
    if known:
        offered, model = True, known.model if first.unidentified else model
        health = UNHEALTHY if verdict.health == PENDING else verdict.health
        verdict = replace(verdict, health=health)
    resource = f"{settings.resource_domain}/{model}" if offered else None
    return Card(first.card_id, model, resource, tuple(chips), verdict)


def next_snapshot(
    old: Snapshot, judged: Iterable[Judged], settings: Settings, now: float, wall: float
) -> Snapshot:
    """The snapshot that follows from the last one and one poll. `judged` may be in any order.

    `now` is time.monotonic(), `wall` time.time(). A card that was offered stays, also when it is
    gone: a Pod may still hold it, and its container gets a reason when it restarts. Whether one
    does, the plugin cannot know. So a card that was replaced stays until the plugin restarts.
    """
    # A chip that is seen twice, as at the end of a reset (tt-kmd#112), counts with its higher N.
    by_pci = {each[0].pci: each for each in sorted(judged, key=lambda each: each[0].index)}
    groups: dict[str, list[Judged]] = {}
    for _, each in sorted(by_pci.items()):
        groups.setdefault(each[0].card_id, []).append(each)
    offered = {card.id: card for card in old.cards if card.resource}
    cards = [make_card(group, offered.get(card_id), settings) for card_id, group in groups.items()]
    gone = make_verdict("gone")
    cards += [replace(card, verdict=gone) for card in offered.values() if card.id not in groups]
    before = {card.id: card.verdict for card in old.cards}
    for i, card in enumerate(cards):
        last = before.get(card.id, Verdict(""))
        same = last.health == card.verdict.health
        since, began = (last.since, last.began) if same else (wall, now)
        cards[i] = replace(card, verdict=replace(card.verdict, since=since, began=began))
    cards.sort(key=lambda card: (not card.resource, card.resource or "", card.chips[0].pci))
    return replace(old, cards=tuple(cards), polled=True)


class ChipReader:
    """A thread that reads one class device, when asked: a read that hangs holds up no other chip.

    A chip that is probed anew gets another class device, so a new reader with an empty history.
    """

    def __init__(self, discovery: Discovery, chip: Chip) -> None:
        self.chip = chip  # as the newest read has identified it
        self.reading = Reading()
        self.history = HealthHistory(time.monotonic())
        self.busy = False  # asked, and not back yet
        self._discovery = discovery
        self._requests: queue.SimpleQueue[Chip | None] = queue.SimpleQueue()
        self._answers: queue.SimpleQueue[tuple[Chip, Reading]] = queue.SimpleQueue()
        # A daemon: one that hangs in a read must not keep the process from ending.
        threading.Thread(target=self._run, name=f"chip {chip.pci}", daemon=True).start()

    def ask(self) -> bool:
        """Starts a read, unless the last one is still under way. Returns whether it did."""
        self.wait(0)
        if self.busy:
            return False
        self.busy = True
        self._requests.put(self.chip)
        return True

    def wait(self, seconds: float) -> None:
        """Takes in what was read, if it comes in time."""
        if self.busy:
            with contextlib.suppress(queue.Empty):
                self.chip, self.reading = self._answers.get(timeout=seconds)
                self.busy = False

    def judge(self, now: float) -> Judged:
        """The chip, and what its newest reading means, or that there is none."""
        reading = Reading(fault="read-hangs") if self.busy else self.reading
        return self.chip, self.history.update(self.chip, reading, now)

    def end(self) -> None:
        """Lets the thread end, once its read has returned."""
        self._requests.put(None)

    def _run(self) -> None:
        while (chip := self._requests.get()) is not None:
            try:
                self._answers.put(self._discovery.look_at(chip))
            except Exception as error:  # a defect costs this chip's readings, not all polls
                log.exception("chip %s cannot be read", chip.pci)
                self._answers.put((chip, Reading(None, "unreadable", repr(error))))


class Inventory:
    """The newest snapshot, and the polling thread that makes it."""

    def __init__(self, settings: Settings, discovery: Discovery | None = None) -> None:
        self.settings = settings
        self.discovery = discovery or Discovery(settings)
        self.snapshot = Snapshot()
        self.changed = asyncio.Condition()  # notified after each change of the cards
        self.on_snapshot: list[Callable[[Snapshot, Snapshot], object]] = []  # after each poll
        self.readers: dict[Place, ChipReader] = {}  # replaced, never changed
        self.failure = LogOnChange()  # why the last poll failed
        self.polled_at = time.monotonic()  # when the last poll that did not fail ended
        self._bare: list[Chip] = []  # PCI functions without a class device
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

    async def notify(self) -> None:
        """Wakes all who wait for a change."""
        async with self.changed:
            self.changed.notify_all()

    def poll(self, now: float) -> None:
        """One pass: find the chips, read, judge, publish. Takes about 2 s at most. Raises OSError
        for what is no chip's fault, such as a lack of file descriptors."""
        bare, driver = self._find_chips()
        spare, asked = 0.5, []
        for reader in self.readers.values():
            if reader.ask():
                asked.append(reader)
                # Chip after chip, as all threads at once would cost three times the CPU time, but
                # half a second in all: chips that hang must not add up.
                reader.wait(max(0.0, min(0.02, spare)))
                spare -= 0.02 * reader.busy
        until, moment = time.monotonic() + READ_S, 0.05
        for reader in asked:
            # One moment more: after a SIGSTOP the clock has jumped, and no thread has run yet.
            left = until - time.monotonic()
            reader.wait(max(left, moment))
            moment = moment if left > 0 else 0.0
        judged = [reader.judge(now) for reader in self.readers.values()]
        for chip in bare:  # the driver is bound a moment before it has made the class device
            kind = "pending" if chip.driver == "tenstorrent" else "no-driver"
            judged.append((chip, make_verdict(kind, chip=chip)))
        old = replace(self.snapshot, driver=driver)
        self._publish(next_snapshot(old, judged, self.settings, now, time.time()))

    def _find_chips(self) -> tuple[list[Chip], str]:
        """A reader for each class device. Returns the PCI functions without one, and the driver."""
        readers: dict[Place, ChipReader] = {}
        for place in self.discovery.places():
            if place in self.readers:
                readers[place] = self.readers[place]
            elif chip := self.discovery.locate(place):
                readers[place] = ChipReader(self.discovery, chip)
        there = {reader.chip.pci for reader in readers.values()}
        for place in self.readers.keys() - readers.keys():
            self.readers[place].end()
        bare, driver = self._bare, self.snapshot.driver
        changed, self.readers = readers.keys() != self.readers.keys(), readers
        # Where a function has no class device, its driver may change, or the function go.
        if not self.snapshot.polled or bare or changed:
            bare = [chip for chip in self.discovery.functions() if chip.pci not in there]
            driver = self.discovery.driver()
        self._bare = bare
        return bare, driver

    def _publish(self, new: Snapshot) -> None:
        with self._lock:
            if self._stopped.is_set():
                return
            old, self.snapshot = self.snapshot, new
            # First of all: a wake-up that is lost is a change that the kubelet never hears of.
            if self._loop and new != old:
                asyncio.run_coroutine_threadsafe(self.notify(), self._loop)
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
            except OSError as error:
                self.failure.set(f"cannot look for cards, the last list stands: {error}")
            except Exception as error:  # a defect must cost one poll, not all that follow
                if not self.failure.problem:
                    log.exception("a poll failed, the last list stands")
                self.failure.set(f"polls fail, the last list stands: {error!r}")
            self._stopped.wait(max(0.0, began + self.settings.poll_seconds - time.monotonic()))


# ==== 6. The DevicePlugin service: five calls, each answered from the newest snapshot =============
#
# The kubelet sets no time limit on most of them, and a slow answer stalls the admission of every
# Pod on the node. So no call opens a file or waits for a thread. They look at links, folders and
# device nodes, which never reaches the driver.

HUGEPAGES = "/dev/hugepages-1G"
"""Where the user-mode driver insists on 1 GiB pages inside the container (tt-umd hugepage.cpp)."""

OPTIONS = api.DevicePluginOptions(pre_start_required=True, get_preferred_allocation_available=True)
"""Announced twice: kubelet 1.20 takes them from Register, 1.32 from GetDevicePluginOptions."""


class Refusal(Exception):
    """A call that is refused: a gRPC status, and a sentence that ends up in the Pod's event."""

    def __init__(self, code: StatusCode, sentence: str) -> None:
        super().__init__(sentence)
        self.code = code


@dataclass
class Shared:
    """What all registrations of all resources share. Only the event loop writes to it."""

    inventory: Inventory
    # (cards by ID, available IDs, IDs that it must have, size) -> the IDs that suit best
    choose: Callable[[Mapping[str, Card], Sequence[str], Sequence[str], int], list[str]]
    cdi_names: Callable[[Sequence[Card]], list[str]]  # [] if not all of them have one
    counts: Counter[tuple[str, ...]] = field(default_factory=Counter)  # (metric, labels...) -> n
    allocated: dict[str, list[str]] = field(default_factory=dict)  # card ID -> its host paths then


def device_list(snapshot: Snapshot, resource: str) -> api.ListAndWatchResponse:
    """What a ListAndWatch stream of `resource` should have sent last.

    Topology for all cards or for none: where only some have it, the kubelet has no hint for two
    (topology_hints.go). A NUMA node of -1 would make `single-numa-node` reject the Pod.
    """
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
        raise Refusal(StatusCode.INVALID_ARGUMENT, f"no card IDs of {resource} in the request")
    for card_id, count in Counter(ids).items():
        name = repr(card_id[:80])
        if card_id not in cards:
            sentence = f"there is no card {name} of {resource} on this node"
            raise Refusal(StatusCode.NOT_FOUND, sentence)
        if count > 1:
            sentence = f"the card ID {name} of {resource} is named twice in one request"
            raise Refusal(StatusCode.INVALID_ARGUMENT, sentence)
    return sorted((cards[card_id] for card_id in ids), key=lambda card: card.chips[0].pci)


def host_paths(inventory: Inventory, card: Card) -> list[str]:
    """The host path of each of a card's device nodes. Raises Refusal if it cannot be used now.

    A link of /dev/tenstorrent/by-id is preferred where it leads to the same device. The kubelet
    repeats this answer at each restart of the container, and the runtime resolves the link anew:
    after a reset that gave the chip another N, the container has the right one (tt-kmd#170).
    """
    discovery, paths, problem = inventory.discovery, [], ""
    if card.verdict.health != HEALTHY:
        problem = f"not healthy since {utc(card.verdict.since)}: {card.verdict.reason}"
    for chip in card.chips if not problem else ():
        by_id = f"{discovery.nodes}/by-id/{chip.id}"
        # The snapshot may be a poll old, and a chip that is probed takes the lowest N at once.
        if discovery.place(chip.index) != chip.place:
            problem = (
                f"/dev/tenstorrent/{chip.index} is no longer chip {chip.pci}: it was reset or "
            )
            problem += "removed a moment ago; try again"
        elif not is_device_node(f"{discovery.nodes}/{chip.index}", chip.dev):
            problem = REASONS["no-node"].format(chip=chip)
        name = f"by-id/{chip.id}" if is_device_node(by_id, chip.dev) else str(chip.index)
        paths.append(os.devnull if inventory.settings.fake else f"/dev/tenstorrent/{name}")
    if problem:
        raise Refusal(StatusCode.FAILED_PRECONDITION, f"{card}: {problem}")
    return paths


def utc(seconds: float) -> str:
    """time.time() as an RFC 3339 text of whole seconds."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))


def wants_hugepages(settings: Settings, chips: Iterable[Chip]) -> bool:
    """Whether to mount the host's 1 GiB pages. Behind a DMA IOMMU domain, a chip needs none
    (tt-umd pci_device.cpp)."""
    needed = not all(chip.iommu.startswith("DMA") for chip in chips)
    auto = needed and os.path.isdir(f"{settings.dev_root}/hugepages-1G")
    return {"always": True, "never": False}.get(settings.hugepages, auto)


def container_response(
    settings: Settings, resource: str, chips: Sequence[Chip], paths: Sequence[str]
) -> api.ContainerAllocateResponse:
    """What one container gets for its `chips`, whose device nodes are at `paths` on the host.

    N is the same inside: the user-mode driver's locks and hugepage files are named after it. There
    is no TT_VISIBLE_DEVICES, whose meaning changed in tt-umd 0.9.3: the device nodes decide what is
    visible. The variable's name has the resource in it, as the kubelet merges answers by key.
    """
    answer = api.ContainerAllocateResponse()
    for chip, path in zip(chips, paths, strict=True):
        inside = f"/dev/tenstorrent/{chip.index}"
        answer.devices.add(container_path=inside, host_path=path, permissions="rw")
    name = "PCIDEVICE_" + re.sub("[^A-Z0-9]", "_", resource.upper())
    answer.envs[name] = ",".join(chip.pci for chip in chips)
    if wants_hugepages(settings, chips):
        answer.mounts.add(container_path=HUGEPAGES, host_path=HUGEPAGES)
    return answer


def refusing(call: Callable[[Any, Any], Any]) -> Callable[[Any, Any, Any], Any]:
    """`call` as a gRPC method: the Refusal that it raises becomes a status, logged and counted."""

    @functools.wraps(call)
    async def method(self: DevicePlugin, request: Any, context: Any) -> Any:
        try:
            return call(self, request)
        except Refusal as refusal:
            where, extra = (call.__name__, self.resource), {"resource": self.resource}
            self.shared.counts["refusals", self.resource, call.__name__, refusal.code.name] += 1
            log.warning("%s of %s refused: %s", *where, refusal, extra=extra)
            return await context.abort(refusal.code, str(refusal))

    return method


class DevicePlugin(rpc.DevicePluginServicer):
    """The service of one resource for one registration.

    `opened` and `ended` are set by the first ListAndWatch stream. That is the kubelet's: it opens
    one for each Register, and nobody else knows this socket's name yet.
    """

    def __init__(self, shared: Shared, resource: str) -> None:
        self.shared, self.resource, self.inventory = shared, resource, shared.inventory
        self.opened, self.ended = asyncio.Event(), asyncio.Event()
        self.closing = False

    async def close(self) -> None:
        """Ends all streams. Calls under way are finished."""
        self.closing = True
        await self.inventory.notify()

    async def GetDevicePluginOptions(self, request: Any, context: Any) -> api.DevicePluginOptions:
        """The same options as in Register."""
        return OPTIONS

    # A coroutine that writes, not a generator: its `finally` runs as soon as the call is cancelled.
    async def ListAndWatch(self, request: Any, context: Any) -> None:  # type: ignore[override]
        """The list at once, and again when it differs from what *this* stream has sent last."""
        first, changed = not self.opened.is_set(), self.inventory.changed
        self.opened.set()
        try:
            while not self.closing:
                sent = device_list(self.inventory.snapshot, self.resource)
                await context.write(sent)
                async with changed:
                    while not self.closing and sent == device_list(
                        self.inventory.snapshot, self.resource
                    ):
                        await changed.wait()
        finally:  # also when it is cancelled: the kubelet has ended, or has dropped this stream
            if first:
                self.ended.set()

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
        resolve_cards(snapshot, self.resource, list(chain(*containers)))  # no card for two of them
        answer = api.AllocateResponse()
        allocated: dict[str, list[str]] = {}
        for ids in containers:
            cards = resolve_cards(snapshot, self.resource, ids)
            paths = {card.id: host_paths(self.inventory, card) for card in cards}
            chips = [chip for card in cards for chip in card.chips]
            nodes = list(chain(*paths.values()))
            response = container_response(settings, self.resource, chips, nodes)
            names = self.shared.cdi_names(cards)
            response.cdi_devices.extend(api.CDIDevice(name=name) for name in names)
            answer.container_responses.append(response)
            # CDI takes no links: a card that has moved would be two device nodes for one chip.
            allocated |= {card.id: card.device_nodes for card in cards} if names else paths
        self.shared.allocated |= allocated
        self.shared.counts["allocations", self.resource] += len(containers)
        given = ", ".join(str(snapshot.of(self.resource)[card_id]) for card_id in allocated)
        log.info("allocated %s", given, extra={"resource": self.resource})
        return answer

    @refusing
    def PreStartContainer(self, request: Any) -> api.PreStartContainerResponse:
        """Refuses a card that is not healthy, or that has moved since the container's Allocate."""
        for card in resolve_cards(self.inventory.snapshot, self.resource, request.devices_ids):
            now = host_paths(self.inventory, card)
            then = self.shared.allocated.get(card.id, now)
            if then not in (now, card.device_nodes):
                raise Refusal(
                    StatusCode.FAILED_PRECONDITION,
                    f"{card}: it was {', '.join(then)} when this Pod was admitted: delete the Pod, "
                    "so that a new one gets the right device (/dev/tenstorrent/by-id on the host "
                    "avoids this)",
                )
        return api.PreStartContainerResponse()


# ==== 7. Registration: serve, register, expect the stream, wait until it ends, and again, for ever
#
# The end of the stream is the signal because it comes in all cases. Some leave no trace in the file
# system: a kubelet drops a stream and keeps running; or, up to 1.36, the end of an older stream of
# the same resource disconnects the newer registration for good (handler.go).

PACE_S = 0.05
"""How often to look for a kubelet and the lock. To register takes a few ms; 0.1 s is promised."""

REGISTER_S = 12.0
"""Limit of Register: from 1.32 the kubelet dials back inside it, for 10 s at most (endpoint.go)."""

STREAM_S = 5.0
"""How soon after Register the kubelet must open its stream."""

FAILED_BACKOFF_S, DROPPED_BACKOFF_S = (0.1, 5.0), (0.002, 0.03)
"""How long a kubelet is left alone that has failed a registration, or that has dropped a stream
within a second: the first time, and at most. It doubles each time. Another kubelet is met at once.
"""

STOP_S = 0.2
"""Grace for calls under way when a server stops. Its streams end by themselves."""

REQUEST_BYTES = 256 * 1024
"""Largest request, ten times the IDs of the largest node. gRPC refuses a larger one early."""

SOCKET = "tenstorrent-{model}-{token}.sock"


def accepts_connections(path: Path) -> bool:
    """Whether a process accepts connections there. A socket file proves nothing: it exists before
    listen() and after a crash. Raises OSError for a problem on this side."""
    kind = socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC
    with socket.socket(socket.AF_UNIX, kind) as probe:
        try:
            probe.connect(os.fspath(path))
        except (FileNotFoundError, NotADirectoryError, ConnectionError, BlockingIOError):
            return False  # BlockingIOError: its queue is full, so it accepts nothing now
        return True


class InstanceLock:
    """One plugin per kubelet folder: an flock on the folder itself, which dies with its holder.

    Not on a file in it: the folder is there on a full disk, nothing stale stays behind, and whoever
    empties device-plugins does not take the lock away.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.held, self._fd = folder, False, -1
        self.standby_reason = ""  # set while another instance holds the lock

    def try_acquire(self) -> str:
        """An empty text if the lock is held now, else what it waits for. Raises CannotWork."""
        standby_reason = ""
        try:
            there = os.stat(self.folder)
            # A folder that was made anew is another one, and to be locked again.
            if self.held and os.path.samestat(there, os.fstat(self._fd)):
                if there.st_nlink:
                    return ""
                reason = "was deleted on the host, and a mount shows the deleted one: start again"
                raise CannotWork(f"{self.folder} {reason}")
            self.release()
            self._fd = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            if not os.access(self.folder, os.W_OK | os.X_OK, effective_ids=True):
                raise PermissionError
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self.held = True
            self._remove_stale_sockets()
            return ""
        except FileNotFoundError:
            return f"{self.folder} is not there yet: waiting for a kubelet that makes it"
        except BlockingIOError:
            standby_reason = f"another instance serves {self.folder}: standing by until it ends"
            return standby_reason
        except PermissionError as error:
            raise CannotWork(
                f"uid {os.geteuid()} cannot make sockets in {self.folder}. The kubelet makes this "
                "folder for root alone: run the plugin as uid 0 (it needs no capabilities), with "
                "the folder mounted for writing"
            ) from error
        except OSError as error:
            return f"cannot lock {self.folder}: {error.strerror}"
        finally:
            self.standby_reason = standby_reason  # in one step: /readyz reads it in another thread

    def release(self) -> None:
        """Lets the next instance in."""
        if self._fd >= 0:
            os.close(self._fd)
        self._fd, self.held = -1, False

    def _remove_stale_sockets(self) -> None:
        pattern = SOCKET.format(model=".+", token="[0-9a-f]{6}").replace(".sock", r"\.sock")
        for path in sorted(self.folder.iterdir()):
            with contextlib.suppress(OSError):
                ours = re.fullmatch(pattern, path.name) and path.is_socket()
                if ours and not accepts_connections(path):
                    path.unlink()
                    log.info("removed %s: left behind by an instance that was killed", path.name)


FileId = tuple[int, int, int]


def file_id(path: Path) -> FileId | None:
    """Device, inode and time of change of a file: the next kubelet's socket has others. None if
    there is no such file. Raises OSError."""
    try:
        status = os.stat(path)
    except FileNotFoundError:
        return None
    return (status.st_dev, status.st_ino, status.st_mtime_ns)


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
async def serving(plugin: DevicePlugin, folder: Path) -> AsyncIterator[str]:
    """Serves `plugin` on a new socket in `folder`; gives its name. Raises OSError.

    Each registration has a name of its own: whoever still knows an older one, such as an instance
    that ends late, can neither remove this socket nor take it for its own.
    """
    model = plugin.resource.partition("/")[2]
    path = folder / SOCKET.format(model=model, token=os.urandom(3).hex())
    server = grpc.aio.server(options=[("grpc.max_receive_message_length", REQUEST_BYTES)])
    rpc.add_DevicePluginServicer_to_server(plugin, server)
    try:
        server.add_insecure_port("unix:" + urllib.parse.quote(os.fspath(path)))
    except RuntimeError as error:  # grpcio does not say why
        reason = f"cannot make a socket in {folder} (no space, no inodes?)"
        raise OSError(errno.EIO, reason) from error
    # Shielded: a start() that is cancelled half-way would make stop() raise InvalidStateError.
    starting = asyncio.create_task(server.start())
    try:
        await asyncio.shield(starting)
        yield path.name
    finally:
        await plugin.close()
        try:
            await asyncio.shield(starting)
            await server.stop(STOP_S)
        finally:  # gRPC may have removed it, or a kubelet at its start
            with contextlib.suppress(OSError):
                path.unlink()


class NoStream(Exception):
    """The kubelet has accepted a registration, but has not opened its stream: why."""


class Registrar:
    """Keeps every resource of the newest snapshot registered."""

    def __init__(self, shared: Shared) -> None:
        self.shared, self.inventory = shared, shared.inventory
        self.folder = shared.inventory.settings.plugin_dir
        self.kubelet = self.folder / "kubelet.sock"
        self.lock = InstanceLock(self.folder)
        self._registered: set[str] = set()
        self._waiting = LogOnChange()  # for the folder, another instance's end, or a kubelet
        self._refused: dict[str, LogOnChange] = {}  # resource -> why it was not registered

    def registration_status(self) -> dict[str, str]:
        """Resource -> "" if it is registered, else why not. Callable in any thread."""
        status = {}
        for resource in self.inventory.snapshot.resources:
            refused = self._refused.get(resource, self._waiting)
            why = self._waiting.problem or refused.problem or "waiting for the kubelet's answer"
            why = "" if resource in self._registered else why.removeprefix(f"{resource}: ")
            status[resource] = why
        return status

    async def run(self) -> None:
        """Runs the loop of each resource there is, until it is cancelled. Raises CannotWork."""
        tasks: dict[str, asyncio.Task[None]] = {}
        try:
            while True:
                resources = self.inventory.snapshot.resources
                for resource in [each for each in resources if each not in tasks]:
                    tasks[resource] = asyncio.create_task(self.run_resource(resource))
                for resource in tasks.keys() - set(resources):
                    await cancel_and_wait([tasks.pop(resource)])
                tasks[""] = asyncio.create_task(self._wait_for_others_than(resources))
                await asyncio.wait(tasks.values(), return_when=asyncio.FIRST_COMPLETED)
                for task in tasks.values():
                    if task.done():
                        task.result()  # raises what has ended it
        finally:
            await cancel_and_wait(tasks.values())

    async def _wait_for_others_than(self, resources: Sequence[str]) -> None:
        async with self.inventory.changed:
            while self.inventory.snapshot.resources == resources:
                await self.inventory.changed.wait()

    async def run_resource(self, resource: str) -> None:
        """The loop. Whatever ends one registration, the next follows. Raises CannotWork."""
        refused = self._refused[resource] = LogOnChange()
        kubelet, tries, cause, problem = None, 0, "start", ""
        while True:
            shortest, longest = FAILED_BACKOFF_S if problem else DROPPED_BACKOFF_S
            backoff = min(longest, shortest * 2 ** (tries - 1)) if tries else 0.0
            kubelet = await self.wait_for_kubelet(kubelet, backoff)
            began, problem = time.monotonic(), ""
            try:
                await self.register_once(resource, kubelet, cause)
                cause = "stream-ended"
            except NoStream as error:
                cause, problem = "no-stream", f"the kubelet has accepted it, but {error}"
            except grpc.aio.AioRpcError as error:
                with contextlib.suppress(OSError):
                    if accepts_connections(self.kubelet):  # else it has ended, and that is all
                        answer = f"{error.code().name}: {error.details()}"
                        problem = f"the kubelet has not registered it: {answer}"
                        cause = "register-failed"
            except OSError as error:
                cause, problem = "no-socket", str(error.strerror)
            except Exception as error:  # a defect must cost one try, not the resource
                log.exception("registering %s failed", resource)
                cause, problem = "defect", repr(error)
            lasted = not problem and time.monotonic() - began > 1
            tries = 0 if lasted else min(tries + 1, 10)
            refused.set(f"{resource}: {problem}; trying again" if problem else "")

    async def wait_for_kubelet(self, last: FileId | None, backoff: float) -> FileId:
        """Returns once this instance holds the lock and a kubelet listens: which one. The `last`
        one is left alone for `backoff` seconds. Raises CannotWork."""
        until, pause = time.monotonic() + backoff, min(backoff, PACE_S)
        while True:
            await asyncio.sleep(pause)
            pause, problem = PACE_S, self.lock.try_acquire()
            try:
                kubelet = None if problem else file_id(self.kubelet)
                if kubelet and kubelet == last and time.monotonic() < until:
                    continue
                if kubelet and accepts_connections(self.kubelet):
                    self._waiting.set("", f"a kubelet answers at {self.kubelet}")
                    return kubelet
                waiting = f"no kubelet listens at {self.kubelet}: waiting for it to start"
                self._waiting.set(problem or waiting)
            except OSError as error:
                self._waiting.set(f"cannot reach the kubelet at {self.kubelet}: {error.strerror}")

    async def register_once(self, resource: str, kubelet: FileId, cause: str) -> None:
        """One registration, from its socket to the end of its stream. `cause`: what ended the last
        one. Raises AioRpcError, NoStream, OSError."""
        plugin, extra = DevicePlugin(self.shared, resource), {"resource": resource, "reason": cause}
        target = "unix:" + urllib.parse.quote(os.fspath(self.kubelet))
        # A pool of its own: the shared one remembers a failed dial, and delays the next by 1 s.
        options = [("grpc.use_local_subchannel_pool", 1)]
        async with serving(plugin, self.folder) as endpoint:
            async with grpc.aio.insecure_channel(target, options=options) as channel:
                request = api.RegisterRequest(version="v1beta1", endpoint=endpoint)
                request.resource_name = resource
                request.options.CopyFrom(OPTIONS)
                await rpc.RegistrationStub(channel).Register(request, timeout=REGISTER_S)
            until = time.monotonic() + STREAM_S
            while not plugin.opened.is_set():
                # A kubelet that has just ended leaves no stream whose end would tell.
                if file_id(self.kubelet) != kubelet:
                    raise NoStream("has ended since")
                if time.monotonic() > until:
                    raise NoStream(f"opened no stream within {STREAM_S:.0f} s")
                await asyncio.sleep(0.005)
            cards = self.inventory.snapshot.of(resource).values()
            healthy = sum(card.verdict.health == HEALTHY for card in cards)
            self.shared.counts["registrations", resource, cause] += 1
            self._registered.add(resource)
            text = "registered %s with the kubelet: %d cards, %d healthy; socket %s; cause: %s"
            log.info(text, resource, len(cards), healthy, endpoint, cause, extra=extra)
            try:
                await plugin.ended.wait()
            finally:
                self._registered.discard(resource)
            log.warning(
                "the kubelet's stream of %s has ended: registering again", resource, extra=extra
            )


# ==== 8. serve(): the wiring ======================================================================


async def serve(settings: Settings) -> None:
    """The whole plugin, until it is cancelled. Raises CannotWork."""
    os.umask(0o077)  # sockets for root alone: the folder may be open to more
    inventory, files = Inventory(settings), KeptFiles(settings)
    registrar = Registrar(Shared(inventory, preferred_allocation, files.cdi_names))
    registrar.lock.try_acquire()

    def keep_files(old: Snapshot, new: Snapshot) -> None:
        if registrar.lock.held:  # two instances would overwrite each other's
            files.keep(new)

    inventory.on_snapshot = [functools.partial(log_changes, settings), keep_files]
    inventory.start(asyncio.get_running_loop())
    work = (registrar.run(), serve_pages(registrar))
    tasks = [asyncio.create_task(each) for each in work]
    try:
        # Neither ends by itself: what ends one is a defect or CannotWork, and is raised here.
        await asyncio.gather(*tasks)
    finally:
        inventory.stop()
        await cancel_and_wait(tasks)
        files.remove(not registrar.lock.standby_reason)  # else they are the other instance's
        registrar.lock.release()


# You can stop reading here: that was the whole plugin. What follows is an appendix. serve() passes
# each part of it in, and each can be taken out.


# ==== A. Preferred allocation: which of the free cards suit one container best ====================


def tray(card: Card) -> str:
    """A Galaxy chip's tray: PCI domain and high nibble of the bus (tt-kmd enumerate.c); or ""."""
    return card.chips[0].pci[:6] if card.model.startswith("galaxy-") else ""


def topology_path(card: Card) -> tuple[str, ...]:
    """From the host's top down to a card: NUMA node, then Galaxy tray, or root bus and bridges."""
    numa = "/".join(f"{node:04}" for node in card.numa_nodes)
    chip = card.chips[0]
    return (numa, tray(card), chip.pci) if tray(card) else (numa, *chip.pci_path, chip.pci)


def best_fit(paths: list[tuple[str, ...]], count: int, level: int = 0) -> list[tuple[str, ...]]:
    """`count` of `paths`, which are sorted and share their first `level` parts.

    From the smallest group that has room, so that larger ones stay whole for the next Pod. Where
    none has, the largest group whole, and the rest from the others.
    """
    if len(paths) == count:
        return paths
    groups: dict[str, list[tuple[str, ...]]] = {}
    for path in paths:
        groups.setdefault(path[level], []).append(path)
    if len(groups) == len(paths):  # neighbours: as near to each other by bus number as can be
        buses = [int(path[-1][:-5].replace(":", ""), 16) for path in paths]
        spans = [(buses[i + count - 1] - buses[i], i) for i in range(len(paths) - count + 1)]
        first = min(spans)[1]
        return paths[first : first + count]
    if roomy := [group for group in groups.values() if len(group) >= count]:
        return best_fit(min(roomy, key=len), count, level + 1)
    largest = max(groups.values(), key=len)
    rest = [path for path in paths if path not in largest]
    return largest + best_fit(rest, count - len(largest), level)


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
        raise Refusal(StatusCode.INVALID_ARGUMENT, sentence)
    healthy = {i: card for i, card in cards.items() if card.verdict.health == HEALTHY}
    ids = {topology_path(healthy[i]): i for i in asked & healthy.keys()}
    required = sorted(path for path, i in ids.items() if i in must)
    lost = sorted(asked - healthy.keys(), key=lambda i: (i not in must, i))
    lost = lost[: max(len(set(must)) - len(required), size - len(ids))]
    chosen, count = required, size - len(lost) - len(required)
    if required:

        def nearness(path: tuple[str, ...]) -> int:
            pairs = [zip(path, near, strict=False) for near in required]
            return max(sum(1 for _ in takewhile(lambda ab: ab[0] == ab[1], p)) for p in pairs)

        others = sorted(set(ids) - set(required), key=lambda path: (-nearness(path), path))
        chosen += others[:count]
    elif count:
        chosen = best_fit(sorted(ids), count)
    return [ids[path] for path in chosen] + lost


# ==== B. Operations: the log; /healthz, /readyz and /metrics ======================================

LOG_LINES = 1000
"""How many lines may wait for a reader of the log. More are dropped, and counted."""


class BoundedQueueHandler(logging.handlers.QueueHandler):
    """Hands lines to the thread that writes them: a log that nobody reads holds up nobody."""

    dropped = 0

    def prepare(self, record: logging.LogRecord) -> logging.LogRecord:
        """As it is: it stays in this process."""
        return record

    def enqueue(self, record: logging.LogRecord) -> None:
        """Puts a line into the queue, if there is room."""
        try:
            if self.dropped:
                text = f"{self.dropped} lines were dropped: nobody read the log"
                fields = {"levelno": logging.WARNING, "levelname": "WARNING", "msg": text}
                self.queue.put_nowait(logging.makeLogRecord(fields))
                self.dropped = 0
            self.queue.put_nowait(record)
        except queue.Full:
            self.dropped += 1


class JsonFormatter(logging.Formatter):
    """One JSON object a line: ts, level, msg; card, resource, reason and since where it has one."""

    def format(self, record: logging.LogRecord) -> str:
        """The line; a traceback goes into `exception`."""
        level, text = record.levelname.lower(), record.getMessage()
        line = {"ts": utc(record.created), "level": level, "msg": text}
        for key in ("card", "resource", "reason"):
            if value := getattr(record, key, None):
                line[key] = value
        if since := getattr(record, "since", None):
            line["since"] = utc(since)
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line)


def in_one_line(record: logging.LogRecord) -> bool:
    """gRPC logs a malformed request with a traceback of itself. The fault is the caller's."""
    error = record.exc_info[1] if record.exc_info else None
    if isinstance(error, google.protobuf.message.DecodeError):
        record.msg, record.args, record.exc_info = f"refused a malformed request: {error}", (), None
    return True


def set_up_logging(style: str, level: str) -> Callable[[], bool]:
    """Logs to stderr in a thread. Returns a function that waits 0.5 s at most for the lines that
    are not written yet, and tells whether all are."""
    formatter = (
        JsonFormatter()
        if style == "json"
        else logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%Y-%m-%dT%H:%M:%SZ")
    )
    formatter.converter = time.gmtime
    stderr = logging.StreamHandler()
    stderr.setFormatter(formatter)
    lines: queue.Queue[logging.LogRecord] = queue.Queue(LOG_LINES)
    logging.basicConfig(level=level.upper(), handlers=[BoundedQueueHandler(lines)], force=True)
    logging.getLogger("asyncio").setLevel(logging.WARNING)
    logging.getLogger("grpc._cython.cygrpc").addFilter(in_one_line)
    logging.handlers.QueueListener(lines, stderr).start()

    def drain() -> bool:
        with lines.all_tasks_done:
            return lines.all_tasks_done.wait_for(lambda: not lines.unfinished_tasks, 0.5)

    return drain


def log_changes(settings: Settings, old: Snapshot, new: Snapshot) -> None:
    """Logs what changed between two snapshots: a line a card, and at first what runs here."""
    if not old.polled:
        models = Counter(card.model or "of unknown model" for card in new.cards)
        cards = ", ".join(f"{count} {model}" for model, count in sorted(models.items())) or "none"
        text = "tt-device-plugin %s, Python %s, grpcio %s, driver %s; kubelet folder %s, sysfs %s, "
        versions = (__version__, sys.version.split()[0], grpc.__version__)
        folders = (settings.plugin_dir, settings.sysfs_root, settings.dev_root)
        driver = new.driver or "not loaded"
        log.info(text + "dev %s; cards: %s", *versions, driver, *folders, cards)
    if not new.cards and (old.cards or not old.polled):
        log.info("no cards here, driver %s: waiting for some to appear", new.driver or "not loaded")
    before = {card.id: card for card in old.cards}
    for card in new.cards:
        last, verdict = before.pop(card.id, None), card.verdict
        if last and (last.verdict, last.resource) == (verdict, card.resource):
            continue
        extra = {"card": card.id, "resource": card.resource, "reason": verdict.reason}
        extra["since"] = verdict.since  # type: ignore[assignment]
        if not card.resource:
            log.warning("%s is not offered: %s", card, verdict.reason, extra=extra)
        elif verdict.health == UNHEALTHY:
            log.error("%s is Unhealthy: %s", card, verdict.reason, extra=extra)
        else:
            after = ""
            if last and last.resource and last.verdict.health == UNHEALTHY:
                after = f" again, after {verdict.began - last.verdict.began:.0f} s"
            reason = f": {verdict.reason}" if verdict.reason else ""
            log.info("%s is Healthy%s%s", card, after, reason, extra=extra)
    chips = {chip.pci for card in new.cards for chip in card.chips}
    for card in before.values():
        if not any(chip.pci in chips for chip in card.chips):  # else it has its telemetry now
            log.warning("%s is gone; it was not offered", card, extra={"card": card.id})


class Sensor(NamedTuple):
    """A file that a metric is read from."""

    metric: str  # as the vendor's tt-telemetry has it, where Prometheus' conventions allow it
    file: str  # in the class device's folder; hwmon/ is that of the PCI device, proc/ tt-kmd's
    highest: int  # largest plausible value; above it: stale telemetry, a dead bus, or one below 0
    scale: int  # what to divide by for the metric's unit
    help: str


SENSORS = (
    Sensor("tt_asic_temperature_celsius", "hwmon/temp1_input", 150_000, 1000, "Temperature."),
    Sensor(
        "tt_thermal_throttle_limit_celsius", "hwmon/temp1_max", 150_000, 1000, "Throttle limit."
    ),
    Sensor("tt_ai_clock_mhz", "tt_aiclk", 5_000, 1, "AI clock."),
    Sensor("tt_tdp_w", "hwmon/power1_input", 2_000_000_000, 1_000_000, "Power drawn."),
    Sensor("tt_tdc_a", "hwmon/curr1_input", 2_000_000, 1000, "Current drawn."),
    Sensor("tt_vcore_v", "hwmon/in0_input", 5_000, 1000, "Core voltage."),
    Sensor("tt_fan_speed_rpm", "hwmon/fan1_input", 50_000, 1, "Speed of the board's fan."),
    Sensor("tt_thermal_trips_total", "tt_therm_trip_count", 2**32 - 2, 1, "Thermal shutdowns."),
    Sensor("tt_device_plugin_device_node_users", "proc/pids", 4096, 1, "Processes that hold it."),
)
"""Units and junk that was seen: tt-kmd telemetry.c 2.10.0, tt-kmd#213, #121, tt-metal#30055. Names:
docs.tenstorrent.com/tt-telemetry. proc/pids has a process ID a line (tt-kmd 2.5.0, chardev.c)."""

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
} | {sensor.metric: sensor.help for sensor in SENSORS}

COUNTED = {
    "registrations": ("resource", "cause"),
    "allocations": ("resource",),
    "refusals": ("resource", "call", "code"),
}
"""What Shared.counts counts, and the labels of each count."""

ESCAPE = str.maketrans({"\\": r"\\", '"': r"\"", "\n": r"\n"})


class Metrics:
    """What a scrape gets, in Prometheus' text format 0.0.4. Callable in any thread."""

    def __init__(self, registrar: Registrar) -> None:
        self.registrar, self.inventory = registrar, registrar.inventory
        self.junk: Counter[str] = Counter()  # PCI address -> values that cannot be
        self._reading: set[ChipReader] = set()  # whose sensors a scrape is reading now

    def page(self, now: float) -> str:
        """All metrics. `now` is time.monotonic()."""
        samples: dict[str, list[str]] = {}

        def add(metric: str, value: float, **labels: str) -> None:
            name = metric if metric in METRICS else f"tt_device_plugin_{metric}"
            inside = ",".join(f'{key}="{text.translate(ESCAPE)}"' for key, text in labels.items())
            samples.setdefault(name, []).append(f"{name}{{{inside}}} {float(value)}")

        snapshot, status = self.inventory.snapshot, self.registrar.registration_status()
        python, grpcio = sys.version.split()[0], grpc.__version__
        add("info", 1, version=__version__, python=python, grpcio=grpcio, driver=snapshot.driver)
        for resource, problem in status.items():
            add("registered", not problem, resource=resource)
            healths = [card.verdict.health for card in snapshot.of(resource).values()]
            for health in (HEALTHY, UNHEALTHY):
                add("cards", healths.count(health), resource=resource, health=health)
        counts = dict.fromkeys((("allocations", resource) for resource in status), 0)
        for (metric, *labels), count in (counts | dict(self.registrar.shared.counts)).items():
            add(f"{metric}_total", count, **dict(zip(COUNTED[metric], labels, strict=True)))
        add("cards_not_offered", sum(not card.resource for card in snapshot.cards))
        for card in snapshot.cards:
            of = {"card": card.id, "resource": card.resource or ""}
            add("card_healthy", bool(card.resource) and card.verdict.health == HEALTHY, **of)
            add("card_verdict", 1, **of, kind=card.verdict.kind)
            for chip in card.chips:
                self._add_chip(add, card, chip, now)
        lines = []
        for name, found in samples.items():
            kind = "counter" if name.endswith("_total") else "gauge"
            lines += [f"# HELP {name} {METRICS[name]}", f"# TYPE {name} {kind}", *found]
        return "\n".join([*lines, ""])

    def _add_chip(self, add: Callable[..., None], card: Card, chip: Chip, now: float) -> None:
        of = {"card": card.id, "chip": chip.pci}
        reader = self.inventory.readers.get(chip.place)  # None: it is gone
        facts = {"model": card.model, "arch": chip.arch, "serial": chip.serial}
        node = f"/dev/tenstorrent/{chip.index}" if reader else ""
        add("chip_info", 1, **of, **facts, firmware=chip.firmware, device_node=node)
        if not reader:
            return
        if reader.history.heartbeat is not None:
            add("heartbeat_age_seconds", now - reader.history.changed_at, **of)
        version = [int(part) for part in re.findall("[0-9]+", self.inventory.snapshot.driver)]
        # Of an old driver nothing is read, see Discovery.sense. Of a chip whose reads hang neither,
        # and if it begins to hang in here, one scrape waits, and the others do without it.
        safe = reader.history.heartbeat is not None or version >= [2, 7]
        if safe and not reader.busy and reader not in self._reading:
            self._reading.add(reader)
            try:
                for sensor, value in self._sensors(chip):
                    add(sensor.metric, value, **of)
            finally:
                self._reading.discard(reader)
        add("junk_readings_total", self.junk[chip.pci], **of)

    def _sensors(self, chip: Chip) -> Iterator[tuple[Sensor, float]]:
        sysfs, entry = self.inventory.discovery.sysfs, self.inventory.discovery.folder(chip.index)
        # The newest: a reset makes another hwmonX, and old drivers leave the dead one (tt-kmd#25).
        monitors = sorted(
            Path(f"{entry}/device/hwmon").glob("hwmon*"), key=lambda p: (len(p.name), p)
        )
        proc = f"{os.path.dirname(sysfs)}/proc/driver/tenstorrent/{chip.index}"
        places = {"": entry, "hwmon": str(monitors[-1]) if monitors else "", "proc": proc}
        for sensor in SENSORS:
            place, _, file = sensor.file.rpartition("/")
            with contextlib.suppress(OSError):
                text = read_attribute(f"{places[place]}/{file}")
                text = str(len(text.split())) if place == "proc" else text
                if re.fullmatch("[0-9]+", text) and int(text) <= sensor.highest:
                    yield sensor, int(text) / sensor.scale
                else:
                    self.junk[chip.pci] += 1


def alive(inventory: Inventory, loop: asyncio.AbstractEventLoop, now: float) -> tuple[bool, str]:
    """/healthz: whether this process does its work. Cards in trouble do not count, nor does a
    missing kubelet. `now` is time.monotonic()."""
    age, trouble = max(0.0, now - inventory.polled_at), inventory.failure.problem
    if age > max(10.0, 3 * inventory.settings.poll_seconds):  # reads that hang delay it by 2 s
        return False, f"stuck: the last poll ended {age:.0f} s ago. {trouble}"
    answered = threading.Event()
    loop.call_soon_threadsafe(answered.set)
    if not answered.wait(3):
        return False, "stuck: the event loop does not answer"
    return True, f"ok: the last poll ended {age:.1f} s ago. {trouble}"


def ready(registrar: Registrar) -> tuple[bool, str]:
    """/readyz: (ready, explanation). Ready when every resource is registered, when there is none,
    or when this instance stands by."""
    if not registrar.inventory.snapshot.polled:
        return False, "the first poll has not ended yet"
    status = registrar.registration_status()
    if not status:
        return True, "no cards to register: waiting for some to appear"
    if registrar.lock.standby_reason:
        return True, registrar.lock.standby_reason
    lines = [
        f"{r}: {f'not registered: {why}' if why else 'registered'}" for r, why in status.items()
    ]
    return not any(status.values()), "\n".join(lines)


def open_port(address: tuple[str, int], pages: Mapping[str, Callable[[], tuple[bool, str]]]) -> str:
    """Answers GET of `pages`, path -> (200 or 503, text), in threads. Returns the address. Raises
    OSError."""
    from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer  # 15 ms, only if wanted

    class Handler(BaseHTTPRequestHandler):
        timeout = 5  # for a client that says nothing
        server_version, sys_version = f"tt-device-plugin/{__version__}", ""

        def do_GET(self) -> None:
            page = pages.get(self.path.partition("?")[0])
            try:
                fine, text = (
                    page() if page else (True, f"no such page; there are {', '.join(pages)}")
                )
                code = 404 if not page else 200 if fine else 503
            except Exception as error:  # a defect of a page must be seen, in it and in the log
                log.exception("%s failed", self.path)
                code, text = 500, repr(error)
            self.send_response(code)
            self.send_header("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
            self.end_headers()
            self.wfile.write(text.rstrip().encode() + b"\n")

        def log_message(self, format: str, *args: object) -> None:
            log.debug("HTTP %s: " + format, self.address_string(), *args)

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
    """Opens the HTTP pages, if they are wanted, and tries again while the port is taken."""
    inventory, loop, trouble = registrar.inventory, asyncio.get_running_loop(), LogOnChange()
    metrics, wanted = Metrics(registrar), inventory.settings.listen
    pages: dict[str, Callable[[], tuple[bool, str]]] = {
        "/healthz": lambda: alive(inventory, loop, time.monotonic()),
        "/readyz": lambda: ready(registrar),
        "/metrics": lambda: (True, metrics.page(time.monotonic())),
    }
    while wanted:
        try:
            log.info("HTTP on %s: %s", open_port(wanted, pages), ", ".join(pages))
            break
        except OSError as error:  # an instance that ends may still have it
            where = f"port {wanted[1]} of {wanted[0] or 'all addresses'}"
            trouble.set(f"no HTTP on {where}: {os.strerror(error.errno or 0)}; trying again")
            await asyncio.sleep(1)
    await asyncio.Event().wait()


# ==== C. Files for other tools: a CDI specification, and node labels ==============================

CDI_KIND, CDI_FILE = "tenstorrent.com/card", "tenstorrent.com-card.json"

CDI_VERSION = "0.5.0"
"""The lowest that has hostPath and names that begin with a digit; podman 4.3 takes none above."""

LABELS_FILE = "tt-device-plugin"


def cdi_spec(settings: Settings, snapshot: Snapshot) -> str:
    """The CDI specification of the healthy cards: by ID, by the N of each chip, and all as `all`.

    "" without cards, as an empty one is invalid. Its device nodes are no links, which runtimes
    refuse. So it follows N, and PreStartContainer refuses a card that has moved.
    """
    devices: dict[str, list[Card]] = {}
    for card in snapshot.cards:
        if card.resource and card.verdict.health == HEALTHY:
            for name in (card.id, *(str(chip.index) for chip in card.chips), "all"):
                devices.setdefault(name, []).append(card)

    def edits(cards: Sequence[Card]) -> dict[str, Any]:
        nodes = [
            {"path": node, "hostPath": os.devnull if settings.fake else node, "permissions": "rw"}
            for card in cards
            for node in card.device_nodes
        ]
        pages = {"hostPath": HUGEPAGES, "containerPath": HUGEPAGES, "options": ["rbind", "rw"]}
        wanted = wants_hugepages(settings, [chip for card in cards for chip in card.chips])
        return {"deviceNodes": nodes} | ({"mounts": [pages]} if wanted else {})

    listed = [{"name": k, "containerEdits": edits(cards)} for k, cards in sorted(devices.items())]
    spec = {"cdiVersion": CDI_VERSION, "kind": CDI_KIND, "devices": listed}
    return json.dumps(spec, indent=2) + "\n" if listed else ""


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
    whole = len(models) == 1 and len(offered) == 32 and len(trays) == 4 and "" not in trays
    # By tt-metal's names, where the cards leave no doubt. A t3000 is also called QuietBox.
    labels["topology"] = "t3000" if models == {"n300": 4} else "galaxy" if whole else ""
    labels["driver-version"] = snapshot.driver if offered else ""
    # A label's value has at most 63 letters, digits and -_. with no sign at either end.
    clean = {k: re.sub(r"[^\w.-]", "_", v, flags=re.A)[:63].strip("-_.") for k, v in labels.items()}
    return "".join(f"{settings.resource_domain}/{k}={v}\n" for k, v in clean.items() if v)


class KeptFile:
    """A file for other tools. Written by rename, so that nobody reads half of it, and in a thread
    that nothing waits for."""

    def __init__(self, path: Path, make: Callable[[Settings, Snapshot], str]) -> None:
        self.path, self._make = path, make
        self.contains: dict[str, Card] = {}  # the healthy cards that it was written from, by ID
        self._text: str | None = None  # None: not known
        self._written: FileId | None = None
        self._trouble = LogOnChange()
        self._thread: threading.Thread | None = None

    def keep(self, settings: Settings, snapshot: Snapshot) -> None:
        """Makes the file say what `snapshot` does, once a poll: what has failed is tried again."""
        if not self._thread or not self._thread.is_alive():
            self._start(self._keep, settings, snapshot)

    def remove(self) -> None:
        """Removes the file. Waits for that for 0.5 s at most."""
        for target in (None, functools.partial(self.path.unlink, missing_ok=True)):
            if target:
                self._start(target)
            if self._thread:
                self._thread.join(0.5)
                if self._thread.is_alive():
                    return

    def _start(self, target: Callable[..., object], *args: object) -> None:
        self._thread = threading.Thread(target=target, args=args, daemon=True)
        self._thread.start()

    def _keep(self, settings: Settings, snapshot: Snapshot) -> None:
        text = self._make(settings, snapshot)
        try:
            if text == self._text and file_id(self.path) == self._written:
                return
            self.contains, self._text = {}, None
            if text:
                if not self.path.parent.is_dir():
                    self.path.parent.mkdir()
                    self.path.parent.chmod(0o755)
                # Not .json: CDI runtimes also read files whose names begin with a dot.
                new = self.path.with_name(f".{self.path.name}.new")
                new.write_text(text)
                new.chmod(0o644)
                new.replace(self.path)
            else:
                self.path.unlink(missing_ok=True)
            self._text, self._written = text, file_id(self.path)
            healthy = [card for card in snapshot.cards if card.verdict.health == HEALTHY]
            self.contains = {card.id: card for card in healthy}
            self._trouble.set("", f"{self.path} is kept again")
        except OSError as error:
            self._trouble.set(f"cannot keep {self.path}: {error.strerror}; trying again")


class KeptFiles:
    """The files that the flags ask for."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        cdi, labels = settings.cdi_dir, settings.labels_dir
        self.cdi = KeptFile(cdi / CDI_FILE, cdi_spec) if cdi else None
        self.labels = KeptFile(labels / LABELS_FILE, node_labels) if labels else None
        self._files = [file for file in (self.cdi, self.labels) if file]
        self._lock, self._removed = threading.Lock(), False

    def keep(self, snapshot: Snapshot) -> None:
        """Makes them say what `snapshot` does. Returns at once."""
        with self._lock:
            for file in () if self._removed else self._files:
                file.keep(self.settings, snapshot)

    def remove(self, ours: bool) -> None:
        """Removes them, for good, if they are `ours` and not another instance's."""
        with self._lock:
            self._removed = True
        for file in self._files if ours else ():
            file.remove()

    def cdi_names(self, cards: Sequence[Card]) -> list[str]:
        """The CDI names of `cards`; [] unless the file has all of them, as they are now: a name
        that leads nowhere would keep the container from starting."""
        written = self.cdi.contains if self.cdi else {}
        known = all(
            card.id in written and written[card.id].device_nodes == card.device_nodes
            for card in cards
        )
        return [f"{CDI_KIND}={card.id}" for card in cards] if known else []


# ==== D. The command line: --fake, --list, --dry-run, and main() ==================================

ENVIRONMENT = "TT_DEVICE_PLUGIN_"

FAKE_CARDS = {
    "n150": ("n150", "0x401e", 0x18, ()),
    "n300": ("n300", "0x401e", 0x14, ()),
    "galaxy-wormhole": ("galaxy-wormhole", "0x401e", 0x35, (0xC0, 0x80, 0x00, 0x40)),
    "p100": ("p100a", "0xb140", 0x43, ()),
    "p150": ("p150a", "0xb140", 0x40, ()),
    "p300": ("p300a", "0xb140", 0x45, ()),
    "galaxy-blackhole": ("galaxy-blackhole", "0xb140", 0x47, (0x00, 0x40, 0xC0, 0x80)),
}
"""Model -> tt_card_type, PCI device id, product code in the serial (tt-kmd telemetry.c), the bus
numbers at which a Galaxy's trays 1 to 4 begin (tt-smi constants.py)."""


def fake_spec(text: str) -> dict[str, int]:
    """n150=2,p300=1 as a dict. Raises argparse.ArgumentTypeError."""
    cards: dict[str, int] = {}
    for part in text.split(","):
        model, _, count = part.strip().partition("=")
        if model not in FAKE_CARDS or not re.fullmatch("[1-9][0-9]{0,2}", count) or model in cards:
            models = ", ".join(FAKE_CARDS)
            what = f"MODEL=COUNT, with each MODEL once, of {models}, and COUNT from 1 on"
            raise argparse.ArgumentTypeError(f"{part!r} is not {what}")
        cards[model] = int(count)
    if sum(cards.values()) + cards.get("p300", 0) > 200:
        raise argparse.ArgumentTypeError(f"{text!r} makes more than 200 chips")
    return cards


def make_fake_tree(top: Path, cards: Mapping[str, int]) -> None:
    """Lays out in `top` the folders sys and dev as tt-kmd would for `cards`, with /dev/null as
    every device node."""
    null = os.stat(os.devnull).st_rdev
    boards = [(model, board) for model, count in cards.items() for board in range(count)]
    chips = [(*each, chip) for each in boards for chip in range(2 if each[0] == "p300" else 1)]
    tree = {"sys/module/tenstorrent/version": "2.10.0"}  # path -> text, or target if it has a slash
    for index, (model, board, chip) in enumerate(chips):
        card_type, device_id, product, trays = FAKE_CARDS[model]
        bus = index + 1
        if trays:  # four trays of eight, positions 1 to 8; a PCI domain for each Galaxy
            pci_domain = board // 32 + (1 if device_id == "0x401e" else 17)
            bus = (pci_domain << 8) + trays[board // 8 % 4] + board % 8 + 1
        pci = f"{bus >> 8:04x}:{bus & 0xFF:02x}:00.0"
        device = f"devices/pci{pci[:7]}/{pci}"
        entry = f"{device}/tenstorrent/tenstorrent!{index}"
        tree |= {
            f"sys/{entry}/device": "../..",
            f"sys/class/tenstorrent/tenstorrent!{index}": f"../../{entry}",
            f"sys/bus/pci/devices/{pci}": f"../../../{device}",
            f"dev/tenstorrent/{index}": os.devnull,
            f"sys/{device}/vendor": VENDOR,
            f"sys/{device}/device": device_id,
            f"sys/{device}/numa_node": "-1",
            f"sys/{entry}/dev": f"{os.major(null)}:{os.minor(null)}",
            f"sys/{entry}/tt_card_type": card_type,
            f"sys/{entry}/tt_asic_id": f"{0xFA4E << 48 | product << 32 | board << 8 | chip:016X}",
            f"sys/{entry}/tt_serial": f"{product << 36 | 0xFA4E0000 | board + 1:016X}",
            f"sys/{entry}/tt_fw_bundle_ver": "19.5.0.0",
        }
    for path, text in tree.items():
        (top / path).parent.mkdir(parents=True, exist_ok=True)
        if "/" in text:
            (top / path).symlink_to(text)
        else:
            (top / path).write_text(f"{text}\n")


def absolute_path(text: str) -> Path:
    """A folder. Raises argparse.ArgumentTypeError."""
    if not text.startswith("/") or "\0" in text:
        raise argparse.ArgumentTypeError(f"{text!r} is not an absolute path")
    return Path(text)


def listen_address(text: str) -> tuple[str, int]:
    """An IP address, "" for all, and a port, 0 for any. Raises argparse.ArgumentTypeError."""
    import ipaddress

    with contextlib.suppress(ValueError):
        parts = urllib.parse.urlsplit(f"//{text}")
        host = str(ipaddress.ip_address(parts.hostname)) if parts.hostname else ""
        if parts.netloc == text and parts.port is not None and "@" not in text:
            return host, parts.port
    examples = "such as 127.0.0.1:7762, [::1]:7762, or :7762 for all"
    raise argparse.ArgumentTypeError(f"{text!r} is not ADDRESS:PORT, {examples}")


def poll_seconds(text: str) -> float:
    """Seconds between polls. Raises argparse.ArgumentTypeError."""
    with contextlib.suppress(ValueError):
        if 0.1 <= (seconds := float(text)) <= 60:
            return seconds
    raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds from 0.1 to 60")


def domain(text: str) -> str:
    """What may come before the slash of a resource. Raises argparse.ArgumentTypeError."""
    label = "[a-z0-9]([-a-z0-9]*[a-z0-9])?"
    reserved = re.search(r"(^|\.)kubernetes\.io$|^requests\.", text)
    if len(text) > 253 or not re.fullmatch(rf"{label}(\.{label})*", text) or reserved:
        examples = "a DNS name that resources may have, such as tenstorrent.com"
        raise argparse.ArgumentTypeError(f"{text!r} is not {examples}")
    return text


FLAGS = """
--list                              print what would be advertised, and what would not and why
--json                              with --list: as JSON
--dry-run                           walk through the five steps with an embedded kubelet
--fake MODEL=N[,...]                made-up cards instead of this node's: n150=2,p300=1
--kubelet-dir DIR                   the sockets are in DIR/device-plugins; default: %(default)s
--sysfs-root DIR                    where sysfs is; default: %(default)s
--dev-root DIR                      where the host's /dev is; default: %(default)s
--poll-seconds S                    time between polls, from 0.1 to 60; default: 1
--resource-domain D                 what comes before the slash; default: %(default)s
--variants                          p150a, p150b and p150c instead of p150
--hugepages auto|always|never       mount the host's 1 GiB pages; default: auto, where needed
--cdi-dir DIR                       keep a CDI specification there; usual: /var/run/cdi
--labels-dir DIR                    keep a file of node labels there, for Node Feature Discovery
--listen ADDR:PORT                  HTTP: /healthz, /readyz, /metrics; :PORT for all addresses
--log-format text|json              default: text
--log-level debug|info|warning|error  default: info
"""

TYPES: dict[str, Callable[[str], Any]] = {
    "MODEL=N[,...]": fake_spec,
    "DIR": absolute_path,
    "S": poll_seconds,
    "D": domain,
    "ADDR:PORT": listen_address,
}


def make_parser() -> argparse.ArgumentParser:
    """The flags as argparse takes them."""
    parser = argparse.ArgumentParser(
        prog="tt-device-plugin",
        description="Kubernetes device plugin for Tenstorrent cards. It serves until SIGTERM.",
        epilog="Every flag can be set by an environment variable: --kubelet-dir is "
        f"{ENVIRONMENT}KUBELET_DIR, a flag without a value takes true or false there. Exit codes: "
        "0 told to stop, 1 cannot work, 2 usage.",
        allow_abbrev=False,
        exit_on_error=False,
    )
    defaults = {each.name: each.default for each in fields(Settings) if each.name != "fake"}
    defaults |= {"log_format": "text", "log_level": "info"}
    for line in FLAGS.strip().splitlines():
        flag, metavar, text = re.findall(r"^(\S+)(?: (\S+))?  +(.+)$", line)[0]
        default = defaults.get(flag[2:].replace("-", "_"))
        if not metavar:
            parser.add_argument(flag, action="store_true", help=text)
        elif "|" in metavar:
            choices = metavar.split("|")
            parser.add_argument(flag, choices=choices, default=default, help=text)
        else:
            kind = TYPES[metavar]
            parser.add_argument(flag, type=kind, metavar=metavar, default=default, help=text)
    python, protobuf = sys.version.split()[0], google.protobuf.__version__
    versions = f"(Python {python}, grpcio {grpc.__version__}, protobuf {protobuf})"
    version = f"tt-device-plugin {__version__} {versions}"
    parser.add_argument("--version", action="version", version=version)
    return parser


def parse(argv: Sequence[str], environment: Mapping[str, str]) -> argparse.Namespace:
    """The flags of `argv`, and below them those of the environment. Exits with code 2 and a
    sentence if one is wrong."""
    parser, given = make_parser(), []
    for name, default in vars(parser.parse_args([])).items():
        flag, variable = "--" + name.replace("_", "-"), ENVIRONMENT + name.upper()
        value = environment.get(variable, "")
        switch = {
            "true": [flag],
            "1": [flag],
            "yes": [flag],
            "false": [],
            "0": [],
            "no": [],
            "": [],
        }
        if default is False and value.lower() not in switch:
            parser.error(f"environment variable {variable}: {value!r} is neither true nor false")
        flags = switch[value.lower()] if default is False else [f"{flag}={value}"] if value else []
        try:
            parser.parse_args(flags)
        except argparse.ArgumentError as error:
            parser.error(f"environment variable {variable}: {error.message}")
        given += flags
    try:
        options = parser.parse_args([*given, *argv])
    except argparse.ArgumentError as error:
        parser.error(str(error))
    if options.json and not options.list:
        parser.error("--json goes with --list")
    if options.list and options.dry_run:
        parser.error("--list and --dry-run exclude each other")
    socket_name = SOCKET.format(model=max(FAKE_CARDS, key=len), token="0" * 6)
    longest = options.kubelet_dir / "device-plugins" / socket_name
    if (excess := len(os.fsencode(longest)) - 107) > 0:  # Linux unix(7): 108 with the NUL
        text = f"is {excess} bytes too long for the paths of sockets in it"
        parser.error(f"--kubelet-dir {options.kubelet_dir} {text}")
    return options


def discover_once(settings: Settings) -> Snapshot:
    """The snapshot of one poll. Raises CannotWork."""
    inventory = Inventory(settings)
    try:
        inventory.poll(time.monotonic())
    except OSError as error:
        raise CannotWork(f"cannot look for cards: {error}") from error
    return inventory.snapshot


def describe(card: Card) -> dict[str, Any]:
    """A card as --list --json prints it."""
    first = card.chips[0]
    return {
        "id": card.id,
        "resource": card.resource,
        "model": card.model,
        "arch": first.arch,
        "device_nodes": card.device_nodes,
        "pci_addresses": [chip.pci for chip in card.chips],
        "numa_node": card.numa_nodes[0] if card.numa_nodes else None,
        "board_serial": first.serial,
        "firmware": first.firmware,
        "health": card.verdict.health,
        "reason": card.verdict.reason,
    }


def print_list(snapshot: Snapshot, as_json: bool) -> None:
    """Prints the cards of a snapshot: JSON, or columns, with the reasons below."""
    if as_json:
        print(json.dumps([describe(card) for card in snapshot.cards], indent=2))
        return
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
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        print("  ".join(cells).rstrip())
    for card in snapshot.cards:
        if card.verdict.reason:
            print(f"\n{card.id}: {card.verdict.reason}")


class DryRunKubelet(rpc.RegistrationServicer):
    """A kubelet that keeps the first Register request of each resource."""

    def __init__(self) -> None:
        self.requests: asyncio.Queue[api.RegisterRequest] = asyncio.Queue()
        self._known: set[str] = set()

    async def Register(self, request: api.RegisterRequest, context: Any) -> api.Empty:
        """Takes any registration."""
        if request.resource_name not in self._known:
            self._known.add(request.resource_name)
            await self.requests.put(request)
        return api.Empty()


def print_step(steps: list[str], step: str, *lines: object) -> None:
    """Prints one of README's five steps, messages on one line each, and adds it to `steps`."""
    steps.append(step)
    print(f"\n{step}", *(" ".join(str(line).split()) for line in lines), sep="\n", flush=True)


async def dry_run(settings: Settings) -> int:
    """Plays the kubelet for the real plugin in settings.kubelet_dir, and prints the five steps as
    they happen. Returns 0 if every step held, else 1."""
    logging.getLogger("tt-device-plugin").setLevel(logging.ERROR)  # the steps tell the story
    settings.plugin_dir.mkdir()
    server, kubelet = grpc.aio.server(), DryRunKubelet()
    rpc.add_RegistrationServicer_to_server(kubelet, server)
    plugin, steps = None, ["0: the embedded kubelet"]
    try:
        server.add_insecure_port(f"unix:{settings.plugin_dir}/kubelet.sock")
        await server.start()
        print_step(steps, f"1. Discover: the cards under {settings.sysfs_root}")
        snapshot = discover_once(settings)
        print_list(snapshot, False)
        if not snapshot.resources:
            raise CannotWork("no card could be offered")
        plugin = asyncio.create_task(serve(settings))
        for _ in snapshot.resources:
            request = await asyncio.wait_for(kubelet.requests.get(), STREAM_S)
            print_step(steps, "2. Register: the plugin calls the kubelet", request)
            target = f"unix:{settings.plugin_dir}/{request.endpoint}"
            async with grpc.aio.insecure_channel(target) as channel:
                await dry_run_resource(rpc.DevicePluginStub(channel), request, steps)
        print("\nEvery step held.")
        return 0
    except (CannotWork, grpc.aio.AioRpcError, asyncio.TimeoutError, RuntimeError) as error:
        problem = error.details() if isinstance(error, grpc.aio.AioRpcError) else str(error)
        print(f"\nFAILED: after step {steps[-1]}: {problem or 'no answer in time'}")
        return 1
    finally:
        await cancel_and_wait([plugin] if plugin else [])
        await server.stop(STOP_S)


async def dry_run_resource(plugin: Any, request: api.RegisterRequest, steps: list[str]) -> None:
    """Steps 3 to 5 of one resource. Raises CannotWork, AioRpcError, TimeoutError."""
    options = await plugin.GetDevicePluginOptions(api.Empty(), timeout=STREAM_S)
    if options != request.options:
        raise CannotWork("Register and GetDevicePluginOptions announce different options")
    stream = plugin.ListAndWatch(api.Empty())
    devices = (await asyncio.wait_for(stream.read(), STREAM_S)).devices
    step = f"3. ListAndWatch: the kubelet calls {request.endpoint}, and keeps the stream open"
    print_step(steps, step, *devices)
    healthy = [device.ID for device in devices if device.health == HEALTHY]
    if not healthy:
        raise CannotWork(f"no card of {request.resource_name} is healthy: its Pods would wait")
    for card_id in healthy:
        one = api.ContainerAllocateRequest(devices_ids=[card_id])
        allocate = api.AllocateRequest(container_requests=[one])
        answer = (await plugin.Allocate(allocate, timeout=STREAM_S)).container_responses[0]
        step = f"4. Allocate: a Pod that asks for one {request.resource_name} could get {card_id}:"
        nodes = [
            f"device {d.container_path} from {d.host_path} ({d.permissions})"
            for d in answer.devices
        ]
        envs = [f"env    {name}={value}" for name, value in answer.envs.items()]
        mounts = [
            f"mount  {mount.container_path} from {mount.host_path}" for mount in answer.mounts
        ]
        print_step(steps, step, *nodes, *envs, *mounts)
        start = api.PreStartContainerRequest(devices_ids=[card_id])
        await plugin.PreStartContainer(start, timeout=STREAM_S)
        print_step(steps, f"5. PreStartContainer: {card_id} is still there and healthy")
    stream.cancel()


STOP_SIGNALS = {signal.SIGTERM, signal.SIGINT}


async def until_signal(work: Coroutine[Any, Any, int | None]) -> int:
    """Runs `work` to its end, or until SIGTERM or SIGINT cancels it. Returns the exit code.

    Both signals stay blocked in all threads, so that none can kill the process while it starts or
    ends, and a thread waits for the first one.
    """
    task, stop, loop = asyncio.ensure_future(work), asyncio.Event(), asyncio.get_running_loop()

    def wait_for_signal() -> None:
        signal.sigwait(STOP_SIGNALS)
        with contextlib.suppress(RuntimeError):  # the loop is closed: it has ended by itself
            loop.call_soon_threadsafe(stop.set)

    threading.Thread(target=wait_for_signal, name="signals", daemon=True).start()
    told = asyncio.create_task(stop.wait())
    await asyncio.wait([task, told], return_when=asyncio.FIRST_COMPLETED)
    told.cancel()
    if not task.done():
        task.cancel()
        await asyncio.wait([task])
        log.info("told to stop, and done")
    # gRPC's handlers end a moment after their server. Cancelled by asyncio.run, they would be
    # logged with a traceback.
    if ending := asyncio.all_tasks() - {asyncio.current_task()}:
        await asyncio.wait(ending, timeout=STOP_S)
    return 0 if task.cancelled() else task.result() or 0


def run(options: argparse.Namespace, stack: contextlib.ExitStack) -> int:
    """Does what the flags say. Returns the exit code. Raises CannotWork."""
    import tempfile

    def temporary_folder(name: str) -> Path:
        try:
            folder = tempfile.TemporaryDirectory(prefix=name, ignore_cleanup_errors=True)
        except OSError as error:
            remedy = "set TMPDIR to a folder that can be written"
            raise CannotWork(f"cannot make a temporary folder: {error}; {remedy}") from error
        return Path(stack.enter_context(folder))

    names = {each.name for each in fields(Settings)} - {"fake"}
    settings = Settings(**{name: getattr(options, name) for name in names})
    if options.fake:
        top = temporary_folder("tt-device-plugin-fake-")
        make_fake_tree(top, options.fake)
        settings = replace(settings, sysfs_root=top / "sys", dev_root=top / "dev", fake=True)
    if options.list:
        print_list(discover_once(settings), options.json)
        return 0
    if options.dry_run:
        settings = replace(settings, kubelet_dir=temporary_folder("tt-dry-run-"))
        settings = replace(settings, cdi_dir=None, labels_dir=None, listen=None)
        return asyncio.run(until_signal(dry_run(settings)))
    if options.fake:
        remove = "remove a tenstorrent!N in sys/class/tenstorrent to see one vanish"
        log.info("made-up cards in %s: %s", top, remove)
    return asyncio.run(until_signal(serve(settings)))


def main(argv: Sequence[str] | None = None) -> int:
    """The program. Returns its exit code; raises SystemExit(2) for wrong flags."""
    # Before any thread is started, which inherits this: see until_signal.
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    options = parse(sys.argv[1:] if argv is None else argv, os.environ)
    drain = set_up_logging(options.log_format, options.log_level)
    try:
        with contextlib.ExitStack() as stack:
            code = run(options, stack)
    except (CannotWork, OSError) as error:
        log.error("%s", error)
        code = 1
    if not drain():  # nobody reads stderr: Python's own way out would wait for it, for ever
        os._exit(code)
    return code


if __name__ == "__main__":
    sys.exit(main())
