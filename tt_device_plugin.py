#!/usr/bin/env python3
"""A Kubernetes device plugin for Tenstorrent cards, in one file, to be read from top to bottom.

What the kubelet expects of a device plugin, in five steps (README.md has the diagram):

1. **Discover.** Find the cards of this node and judge their health: here once a second, in sysfs.
2. **Register.** Serve the DevicePlugin service on a Unix socket beside the kubelet's own, and tell the kubelet the
   socket's name and the resource, such as `tenstorrent.com/n150`.
3. **ListAndWatch.** The kubelet opens one stream and keeps it; each message is the whole list of cards.
4. **Allocate.** For each container that asks for cards: which device nodes, environment and mounts it gets.
5. **PreStartContainer.** Before each start and restart of that container: are its cards still there and fit?

What this plugin promises beyond that:

- A resource is registered if and only if a ListAndWatch stream of it is open. The end of the stream is the only signal,
  and whatever ended it, the plugin registers again as soon as a kubelet answers.
- A card's ID is its chip's own number, never its place in /dev; a card that was offered stays listed, Unhealthy with a
  reason, until it is back.
- Unknown is not dead: missing files, old drivers and late telemetry decide nothing.
- No device node is ever opened, only the driver's files in sysfs and /proc, and a read that hangs costs its own card only.

One idea carries all of it: a thread reads sysfs into an immutable snapshot, and everything else reads the newest snapshot.
Decisions are pure functions of what was read, what is remembered, and `now`.

Words: a *chip* is one PCIe device, /dev/tenstorrent/N. A *card* is what a Pod gets: one chip, or the two of a p300. The
*device node* is the file; *node* alone is the Kubernetes node. A *snapshot* holds the cards, each with its *verdict*.
"""

from __future__ import annotations

# Imported where they are used, as only one flag needs each, and each costs every start time and memory: http.server,
# ipaddress, shutil, tempfile.
import argparse
import asyncio
import contextlib
import dataclasses
import errno
import fcntl
import functools
import itertools
import json
import logging
import math
import os
import queue
import re
import signal
import socket
import stat
import sys
import textwrap
import threading
import time
import urllib.parse
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from resource import RLIMIT_NOFILE, getpagesize, getrlimit
from typing import Any, ClassVar, NamedTuple, TextIO, TypeVar, cast

import google.protobuf.message
import grpc
import grpc.aio

import api_pb2 as api
import api_pb2_grpc as rpc

__version__ = "0.1.0"

STARTED = time.time()

log = logging.getLogger("tt-device-plugin")


@dataclass(frozen=True, slots=True)
class Settings:
    """What the flags say; the field names are the flags' names (section 7 has their meaning)."""

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
    """There is no use in starting: the text says which folder, which user, and what to do."""


class Trouble:
    """A lasting problem in the log: said once when it begins or becomes another one, and once when it is over."""

    def __init__(self) -> None:
        self.problem = ""

    def is_now(self, problem: str, over: str = "") -> None:
        """`problem` is a sentence, or "" when there is none (any more); then `over` is said, if there was one."""
        before, self.problem = self.problem, problem
        if problem and problem != before:
            log.warning("%s", problem)
        elif before and not problem and over:
            log.info("%s", over)


# ======================================================================================================================
# 1. Discovery: sysfs -> chips
#
# tt-kmd makes one class device a chip, /sys/class/tenstorrent/tenstorrent!N, with a link `device` to the PCI function.
# The tt_* files in it appear when the chip's firmware has delivered its telemetry: with the device node, up to two
# minutes later (Wormhole), or never. Which of them there are depends on driver and firmware: any may be missing.
# ======================================================================================================================

VENDOR = "0x1e52"
"""Tenstorrent's PCI vendor id (tt-kmd enumerate.h)."""

ARCHITECTURES = {0x401E: "wormhole", 0xB140: "blackhole"}
"""PCI device id -> architecture, as tt-kmd names it in /dev/tenstorrent/by-id (enumerate.h and its udev rule, 2.6.0)."""

GALAXIES = {0x0035: "galaxy-wormhole", 0x0047: "galaxy-blackhole"}
"""PCI subsystem device id -> card type of a Galaxy's chips, known without firmware (tt-kmd enumerate.c, 2.8.0)."""

SYSFS_ATTRIBUTE_BYTES = 4096
"""A sysfs attribute holds at most one page (Linux Documentation/filesystems/sysfs.rst)."""

SHORTAGES = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
"""Errors of a read that are this process's or host's trouble: they say nothing about a chip, and end the poll."""

SENSORS_S = 5.0
"""How often sensors are read: they decide nothing, and cost more than all the rest of a poll."""


class Sensor(NamedTuple):
    """One reading of a chip."""

    file: str  # below the class device's folder; hwmon/ stands for that of the PCI device, proc/ for tt-kmd's in /proc
    highest: int  # more cannot be: junk of stale telemetry, of a dead bus, or of a value below 0 read as unsigned
    scale: int  # what to divide by for the metric's unit
    metric: str  # as the vendor's tt-telemetry has it, where it has it and Prometheus' conventions allow it
    help: str


SENSORS = {
    "temperature": Sensor("hwmon/temp1_input", 150_000, 1000, "tt_asic_temperature_celsius", "Temperature of the chip."),
    "limit": Sensor("hwmon/temp1_max", 150_000, 1000, "tt_thermal_throttle_limit_celsius", "Where it throttles."),
    "clock": Sensor("tt_aiclk", 5_000, 1, "tt_ai_clock_mhz", "AI clock."),
    "power": Sensor("hwmon/power1_input", 2_000_000_000, 1_000_000, "tt_tdp_w", "Power that the chip draws."),
    "current": Sensor("hwmon/curr1_input", 2_000_000, 1000, "tt_tdc_a", "Current that the chip draws."),
    "voltage": Sensor("hwmon/in0_input", 5_000, 1000, "tt_vcore_v", "Core voltage."),
    "fan": Sensor("hwmon/fan1_input", 50_000, 1, "tt_fan_speed_rpm", "Speed of the board's fan."),
    "trips": Sensor("tt_therm_trip_count", 0xFFFFFFFE, 1, "tt_thermal_trips_total", "Shutdowns by critical temperature."),
    "users": Sensor("proc/pids", 4096, 1, "tt_device_plugin_device_node_users", "Processes that have the device node open."),
}
"""Units, and junk that was seen: tt-kmd telemetry.c 2.10.0, tt-kmd#213, #121, tt-metal#30055. tt-telemetry's names:
docs.tenstorrent.com/tt-telemetry. /proc/driver/tenstorrent/N/pids has a process id a line (tt-kmd 2.5.0, chardev.c)."""

CLASS_ENTRY = re.compile(r"tenstorrent!(0|[1-9][0-9]{0,5})")
PCI_ADDRESS = re.compile(r"[0-9a-f]{4,8}:[0-9a-f]{2}:[0-9a-f]{2}\.[0-7]")
HEX_ID = re.compile(r"[0-9A-F]{16}")
CARD_TYPE = re.compile(r"[a-z0-9]([-a-z0-9.]{0,14}[a-z0-9])?")  # valid in a resource's name, and as short as a socket's needs


@dataclass(frozen=True, slots=True)
class Chip:
    """What does not change while a chip's class device exists. Texts are "" and numbers None where sysfs has none."""

    pci: str  # PCI address, 0000:01:00.0
    index: int = -1  # N of /dev/tenstorrent/N, another one after a reset, so never an identity; -1: no class device
    stamp: tuple[int, int] = (0, 0)  # inode and change time of the class device's folder: with another one, read it anew
    driver: str = ""  # the PCI driver that is bound, asked only where there is no class device
    dev: str = ""  # "major:minor" of the device node
    arch: str = ""  # wormhole, blackhole
    card_type: str = ""  # n150, p300a, unknown; "" until there is telemetry
    galaxy: str = ""  # galaxy-wormhole, galaxy-blackhole by PCI subsystem, else ""
    asic_id: str = ""  # 16 hex digits, unique on a host
    serial: str = ""  # 16 hex digits, the board's: all chips of a Galaxy show the same
    firmware: str = ""  # bundle version, 19.5.0.0
    numa_node: int | None = None
    iommu: str = ""  # type of its IOMMU group: DMA, DMA-FQ, identity; "" without an IOMMU
    pci_path: tuple[str, ...] = ()  # root bus and bridges above it, outermost first

    @property
    def identified(self) -> bool:
        """Whether its telemetry has told what it is; a dead bus answers with a type, "unknown", but with no number."""
        return bool(self.card_type) and (self.card_type != "unknown" or bool(self.asic_id or self.serial))

    @property
    def id(self) -> str:
        """The chip's lasting identity: its name in /dev/tenstorrent/by-id, else its PCI address."""
        return f"{self.arch}-{self.asic_id}" if self.arch and self.asic_id else self.pci

    @property
    def model(self) -> str:
        """The resource's name before folding: a chip of unknown type is offered as its architecture; "" if unknown."""
        if self.card_type == "unknown":
            return self.galaxy or self.arch
        return self.card_type or self.galaxy

    @property
    def tray(self) -> tuple[str, int] | None:
        """A Galaxy chip's tray (PCI domain, high nibble of the bus) and position on it (low nibble; tt-kmd enumerate.c)."""
        domain, bus, _ = self.pci.split(":")
        return (f"{domain}:{bus[0]}", int(bus[1], 16)) if self.model.startswith("galaxy-") else None


class Signs(NamedTuple):
    """What one poll saw of a chip's life."""

    heartbeat: int | None = None  # None: there is no such file, or nothing sensible in it
    fault: str = ""  # a kind of FAULTS that needs no history, "" if none
    heartbeat_read: bool = False  # the file exists: a heartbeat of None is then a failed read
    readings: Mapping[str, int] | None = None  # by names of SENSORS, as read; None: this poll did not look


class Sighting(NamedTuple):
    """One chip, as one poll found it."""

    chip: Chip
    signs: Signs


def read_attribute(path: str | Path) -> str:
    """The text of one sysfs attribute without its newline; bytes that are no ASCII become '?'.

    Raises OSError. Blocks for as long as the driver does, so it is called in the polling thread only.
    """
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.read(fd, SYSFS_ATTRIBUTE_BYTES).decode("ascii", "replace").replace("\ufffd", "?").strip()
    finally:
        os.close(fd)


@contextlib.contextmanager
def unknown_is_fine() -> Iterator[None]:
    """Takes an OSError of a read for "unknown", unless it is a lack of descriptors or memory, which says nothing of a chip."""
    try:
        yield
    except OSError as error:
        if error.errno in SHORTAGES:
            raise


def attribute(path: str | Path, pattern: re.Pattern[str] | None = None) -> str:
    """The text of one attribute; "" where it is missing, cannot be read or does not match. Raises OSError for SHORTAGES."""
    text = ""
    with unknown_is_fine():
        text = read_attribute(path)
    return text if pattern is None or pattern.fullmatch(text) else ""


def number(text: str, base: int = 10) -> int | None:
    """`text` as a non-negative integer, None if it is none."""
    try:
        return value if (value := int(text, base)) >= 0 else None
    except ValueError:
        return None


def hex_id(path: str) -> str:
    """An ASIC id or board serial; "" where missing, or when a dead bus (all ones) or empty fuses (all zeros) answered."""
    text = attribute(path, HEX_ID)
    return "" if text in ("F" * 16, "0" * 16) else text


def class_indices(sysfs: Path) -> list[int]:
    """N of each class device there is, ascending; [] without the driver. Raises OSError if that cannot be told."""
    try:
        names = os.listdir(sysfs / "class/tenstorrent")
    except (FileNotFoundError, NotADirectoryError):
        return []
    return sorted(int(match[1]) for match in map(CLASS_ENTRY.fullmatch, names) if match)


def class_device(sysfs: Path, index: int) -> str:
    """The folder of the tt_* files of /dev/tenstorrent/`index`. A text: joining Paths takes longer than reading the file."""
    return f"{sysfs}/class/tenstorrent/tenstorrent!{index}"


def architecture(device: str | Path) -> str:
    """The architecture of a PCI function, "" if it is none of ARCHITECTURES."""
    return ARCHITECTURES.get(number(attribute(f"{device}/device"), 16) or 0, "")


def find_chip(sysfs: Path, index: int, known: Chip | None = None) -> Chip:
    """The chip of /dev/tenstorrent/`index`, from links and metadata alone: nothing in here can hang on the hardware.

    `known` if the class entry still leads to that one's folder: another chip's has another stamp. Raises OSError if it
    vanished meanwhile, ValueError if the entry does not lead to a PCI function.
    """
    folder = class_device(sysfs, index)
    status = os.stat(folder)
    stamp = (status.st_ino, status.st_ctime_ns)
    if known is not None and known.stamp == stamp:
        return known
    device = os.path.realpath(f"{folder}/device", strict=True)
    pci_path = tuple(part for part in device.split("/") if part.startswith("pci") or PCI_ADDRESS.fullmatch(part))
    if not pci_path or not PCI_ADDRESS.fullmatch(pci_path[-1]):
        raise ValueError(f"{folder}/device leads to {device}, which is no PCI function")
    return Chip(pci_path[-1], index, stamp, pci_path=pci_path[:-1])


def identify(sysfs: Path, chip: Chip) -> Chip:
    """`chip` with all that sysfs tells about it. May hang with the driver."""
    folder = class_device(sysfs, chip.index)
    device = f"{folder}/device"
    card_type = attribute(f"{folder}/tt_card_type")
    return replace(
        chip,
        dev=attribute(f"{folder}/dev", re.compile(r"[0-9]+:[0-9]+")),
        arch=architecture(device),
        card_type=card_type if CARD_TYPE.fullmatch(card_type) or not card_type else "unknown",
        galaxy=GALAXIES.get(number(attribute(f"{device}/subsystem_device"), 16) or 0, ""),
        asic_id=hex_id(f"{folder}/tt_asic_id"),
        serial=hex_id(f"{folder}/tt_serial"),
        firmware=attribute(f"{folder}/tt_fw_bundle_ver", re.compile(r"[0-9.]{1,40}")),
        numa_node=number(attribute(f"{device}/numa_node")),  # -1: the firmware does not know
        iommu=attribute(f"{device}/iommu_group/type", re.compile(r"[A-Za-z-]{1,20}")),
    )


def sense(settings: Settings, chip: Chip, driver: str, sensors: bool = True) -> Signs:
    """One poll's look at a chip: its device node and heartbeat, and `sensors` if wanted. May hang with the driver.

    A driver before 2.7 has no heartbeat, and could oops the kernel when read from while the chip goes (tt-kmd a972eed): of
    it nothing is read once the chip is identified. Opening a file that is not there does not reach the driver.
    """
    entry = class_device(settings.sysfs_root, chip.index)
    try:
        beat = number(read_attribute(f"{entry}/tt_heartbeat"))
        signs = Signs(beat, "bus-dead" if beat == 0xFFFFFFFF else "", True)  # a dead PCIe endpoint reads as all ones
    except OSError as error:
        if error.errno in SHORTAGES:
            raise
        fault = {errno.ENODEV: "gone", errno.ENODATA: "resetting"}.get(error.errno or 0, "")
        signs = Signs(None, fault, error.errno != errno.ENOENT)
    if not signs.fault and not is_device_node(f"{settings.dev_root}/tenstorrent/{chip.index}", chip.dev):
        signs = signs._replace(fault="no-node")
    if sensors and signs.fault in ("", "no-node") and (signs.heartbeat_read or version(driver) >= (2, 7)):
        signs = signs._replace(readings=read_sensors(settings.sysfs_root, chip))
    return signs


def read_sensors(sysfs: Path, chip: Chip) -> dict[str, int]:
    """What a chip's sensors say, by names of SENSORS; what is missing or no number is left out. May hang with the driver."""
    entry = class_device(sysfs, chip.index)
    places = {
        "": entry,
        "hwmon": newest_sensors(f"{entry}/device/hwmon"),
        "proc": f"{sysfs.parent}/proc/driver/tenstorrent/{chip.index}",  # beside sysfs, also where both are mounted elsewhere
    }
    readings = {}
    for name, sensor in SENSORS.items():
        place, _, file = sensor.file.rpartition("/")
        with unknown_is_fine():
            text = read_attribute(f"{places[place]}/{file}")
            value = len(text.split()) if place == "proc" else number(text)
            if value is not None:
                readings[name] = value
    return readings


def newest_sensors(folder: str) -> str:
    """The hwmonX in `folder` with the highest X; `folder` if there is none. Raises OSError for SHORTAGES.

    Found anew each time: a reset makes another hwmonX, and old drivers left the dead one behind (tt-kmd#25).
    """
    names: list[str] = []
    with unknown_is_fine():
        names = [name for name in os.listdir(folder) if name.startswith("hwmon")]
    return f"{folder}/{max(names, key=lambda name: number(name[5:]) or 0, default='')}"


def version(text: str) -> tuple[int, ...]:
    """A driver's version, 2.10.0 or 2.7.0-rc1, for comparing; () if unknown."""
    return tuple(int(part) for part in re.findall(r"[0-9]+", text)[:3])


def is_device_node(path: str, dev: str) -> bool:
    """Whether `path` is, or links to, the character device that sysfs calls `dev`. Looks, never opens."""
    try:
        status = os.stat(path)
    except OSError:
        return False
    return stat.S_ISCHR(status.st_mode) and f"{os.major(status.st_rdev)}:{os.minor(status.st_rdev)}" == dev


def bare_functions(sysfs: Path) -> list[Chip]:
    """Tenstorrent's PCI functions, of which some may have no class device: another driver has them, or the probe failed."""
    chips = []
    for device in sorted((sysfs / "bus/pci/devices").glob("*")):
        if PCI_ADDRESS.fullmatch(device.name) and attribute(device / "vendor") == VENDOR:
            driver = os.path.basename(os.path.realpath(device / "driver")) if (device / "driver").exists() else "none"
            chips.append(Chip(device.name, arch=architecture(device), driver=driver))
    return chips


def host_numa_nodes(sysfs: Path) -> tuple[int, ...]:
    """The NUMA nodes of this host, from the kernel's list format (0-1,4); () if unknown."""
    nodes: list[int] = []
    for part in attribute(sysfs / "devices/system/node/online", re.compile(r"[0-9]+(-[0-9]+)?(,[0-9]+(-[0-9]+)?)*")).split(","):
        first, _, last = part.partition("-")
        nodes += range(int(first or 0), min(int(last or first or -1), 1023) + 1)
    return tuple(nodes)


# ======================================================================================================================
# 2. Health: what is remembered + what was read + now -> a verdict, each with a reason
#
# Judged anew at each poll, in both directions. There are no events to miss, and nothing to clear after a recovery.
# ======================================================================================================================

HEALTHY, UNHEALTHY, PENDING = "Healthy", "Unhealthy", "pending"

HEARTBEAT_S = 12.0
"""A heartbeat that stays equal for longer than this is a hung chip: the firmware's own watchdog takes 10 s
(auto_reset_timeout in tt-kmd module.c)."""

HEARTBEAT_READS = 3
"""... and has been read equal at least so often since: time alone also passes while this process is stopped."""

TELEMETRY_S = 130.0
"""Time from a chip's appearance in which its telemetry may still come: the driver asks 120 times, once a second
(tt-kmd wormhole.c, since 2.4.0)."""

COOL_MC = 3_000
"""How far below its limit a throttling chip must come before it counts as cool: one log line, not one a second."""

FAULTS = {
    "gone": "it is gone from sysfs: in a reset, unplugged, or the driver is unloaded; if it stays away, see dmesg",
    "resetting": "it is being reset and does not answer yet; if this lasts for minutes, reset it again: tt-smi -r",
    "bus-dead": "its PCIe bus answers all ones: reset it with tt-smi -r, or power-cycle the host",
    "no-node": "its device node /dev/tenstorrent/{index} is missing or another device: is --dev-root the host's /dev?",
    "hung": "its heartbeat has stopped, so its firmware hangs: reset it with tt-smi -r",
    "read-hangs": "a read of its sysfs files does not return: the driver hangs on it; see dmesg, and reboot if it stays",
    "pending": "its telemetry is not there yet: the firmware may take two minutes (and a driver before 1.28 has none)",
    "no-telemetry": "it has no telemetry, so its model is unknown: firmware that does not answer, or a driver before 1.28",
    "half": "the other chip of its p300 board may still come",
    "id-taken": "another card has its ID: restart the plugin once the cards of this node have settled",
    "no-driver": "it has no device node: its PCI driver is {driver}, not tenstorrent; see dmesg if it should be",
}
"""Kind of a verdict -> its reason: what is wrong and what to do, without the card's name and the time."""


NOT_TO_BE_OFFERED = ("pending", "no-telemetry", "half", "id-taken", "no-driver")
"""Kinds that keep a card off the list, if it was not on it; all others show it there, Unhealthy."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """Health of a chip or card."""

    health: str = HEALTHY  # HEALTHY, UNHEALTHY or PENDING (never offered yet, and not to be offered now)
    kind: str = "ok"  # ok, twin, alone, or a key of FAULTS
    reason: str = ""  # for the admin, "" if ok; never with numbers that change from poll to poll
    since: float = 0.0  # time.time() since when it has had this health, to be shown; 0.0 for a chip
    began: float = 0.0  # time.monotonic() of that, for durations: a clock that is set must not show in them


FIT = Verdict()
TWIN = Verdict(HEALTHY, "twin", "another chip claims the same ASIC id: it goes by its PCI address, which a reset may change")
ALONE = Verdict(HEALTHY, "alone", "one chip of a p300 by itself: no other chip, or more than one, has its board's serial")


@dataclass(frozen=True, slots=True)
class Pulse:
    """What is remembered of one chip from poll to poll. Times are time.monotonic()."""

    appeared: float
    inode: int = 0  # of the class device's folder: a chip that was probed anew has another one
    beat: int | None = None  # the last heartbeat that could be read
    changed: float = 0.0  # when it was first read as such
    equal_reads: int = 0  # polls since then that saw no change
    owed: int = 0  # changes that a chip which has failed must show before it is trusted again
    fault: str = ""  # why
    hot: bool = False  # it throttles
    junk: int = 0  # readings outside physical range so far, which are ignored
    readings: Mapping[str, int] = field(default_factory=dict)  # the newest ones that can be, by names of SENSORS
    trips: int | None = None  # the newest reading of this name; the only thing that outlives the chip's absence


def judge(pulse: Pulse | None, sighting: Sighting, now: float) -> tuple[Pulse, Verdict]:
    """One chip's new memory and verdict.

    A chip without a tt_heartbeat (driver before 2.7, or firmware that does not report it) has no heartbeat to stop; a
    file that is there and cannot be read is one that has. A hung chip is trusted after two changes, as one could be the
    last of a dying chip; one whose bus was dead, or that was in a reset, after one. Nothing is remembered of a time
    without a class device.
    """
    chip, signs = sighting
    if pulse is None or chip.index < 0 or pulse.inode != chip.stamp[0]:
        pulse = Pulse(now, chip.stamp[0], changed=now, trips=pulse.trips if pulse else None)
    pulse = feel(pulse, signs)
    felt = signs.heartbeat_read and signs.fault != "gone"
    if signs.heartbeat is not None and signs.heartbeat != pulse.beat and signs.fault != "bus-dead":
        owed = max(0, pulse.owed - 1) if pulse.beat is not None else pulse.owed
        pulse = replace(pulse, beat=signs.heartbeat, changed=now, equal_reads=0, owed=owed)
    elif felt:
        pulse = replace(pulse, equal_reads=pulse.equal_reads + 1)
    if signs.fault in ("resetting", "bus-dead"):
        pulse = replace(pulse, owed=max(1, pulse.owed), fault=pulse.fault if pulse.owed else signs.fault)
    elif felt and pulse.beat is not None and pulse.equal_reads >= HEARTBEAT_READS and now - pulse.changed > HEARTBEAT_S:
        pulse = replace(pulse, owed=2, fault="hung")
    if signs.fault:
        return pulse, verdict(signs.fault, chip)
    if not chip.identified:
        late = now - pulse.appeared > TELEMETRY_S
        return pulse, verdict("no-telemetry" if late else "pending", chip)
    # A chip in trouble before its first heartbeat could be read owes nothing: there is nothing to compare with.
    if pulse.owed and pulse.beat is not None:
        return pulse, verdict(pulse.fault, chip)
    return replace(pulse, owed=0) if pulse.owed else pulse, FIT


def feel(pulse: Pulse, signs: Signs) -> Pulse:
    """`pulse` with what the sensors say. That never is a verdict: throttling is the firmware's way of staying well."""
    if signs.fault not in ("", "no-node"):
        return replace(pulse, readings={})
    if signs.readings is None:
        return pulse
    readings = {name: value for name, value in signs.readings.items() if value <= SENSORS[name].highest}
    pulse = replace(pulse, readings=readings, junk=pulse.junk + len(signs.readings) - len(readings))
    heat, limit = readings.get("temperature"), readings.get("limit")
    if heat is not None and limit:
        pulse = replace(pulse, hot=heat > (limit - COOL_MC if pulse.hot else limit))
    return replace(pulse, trips=readings.get("trips", pulse.trips))


def events(before: Pulse | None, now: Pulse | None) -> list[str]:
    """What an admin should hear of a chip, besides its verdict."""
    if before is None or now is None:
        return []
    told = []
    if now.hot != before.hot:
        told.append("is above its temperature limit and throttles: look at the cooling" if now.hot else "throttles no longer")
    if now.junk and not before.junk:
        told.append("reports readings that cannot be; they are ignored (firmware newer than the loaded driver? reload it)")
    if before.trips is not None and now.trips is not None and now.trips > before.trips:
        told.append(f"was shut down by critical temperature; that makes {now.trips} times since power-on")
    return told


def verdict(kind: str, chip: Chip) -> Verdict:
    """The verdict of a kind of FAULTS on `chip`."""
    health = PENDING if kind in NOT_TO_BE_OFFERED else UNHEALTHY
    return Verdict(health, kind, FAULTS[kind].format(index=chip.index, driver=chip.driver))


# ======================================================================================================================
# 3. The inventory: chips -> cards -> the snapshot; the polling thread; waking the streams
# ======================================================================================================================

HANG_TICKS = 4
"""Watchdog ticks, half a second each, in which one chip's read must not end before it counts as hanging. Ticks,
not time: after a SIGSTOP of this process the clock has jumped, but the reader has had no chance yet."""


@dataclass(frozen=True, slots=True)
class Card:
    """What a Pod gets."""

    id: str  # at most 63 characters; a checkpoint of the kubelet holds it across reboots
    model: str  # n150; "" if not known
    resource: str | None  # tenstorrent.com/n150; None: not offered, the verdict says why
    chips: tuple[Chip, ...]  # one, or the two of a p300, ordered by PCI address; as last seen
    verdict: Verdict

    @property
    def numa_nodes(self) -> tuple[int, ...]:
        """The NUMA nodes of its chips; () if none is known."""
        return tuple(sorted({chip.numa_node for chip in self.chips if chip.numa_node is not None}))

    @property
    def device_nodes(self) -> list[str]:
        """Where its chips' device nodes are now, or were last."""
        return [f"/dev/tenstorrent/{chip.index}" for chip in self.chips if chip.index >= 0]

    def __str__(self) -> str:
        return f"card {self.id} ({', '.join([self.model or 'model unknown', *self.device_nodes])})"


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The node's cards at one moment."""

    cards: tuple[Card, ...] = ()  # ordered by resource, then PCI address; those not offered last
    numa_nodes: tuple[int, ...] = ()  # of the host
    driver: str = ""  # version of tt-kmd, "" if not loaded
    polled: bool = False  # False: nothing has been looked at yet

    def of(self, resource: str) -> dict[str, Card]:
        """The cards of one resource by ID."""
        return {card.id: card for card in self.cards if card.resource == resource}

    @property
    def resources(self) -> list[str]:
        """The resources to register."""
        return sorted({card.resource for card in self.cards if card.resource})


def fold(model: str, variants: bool) -> str:
    """A model without its variant letter: p150a -> p150, unless `variants`."""
    return model if variants else re.sub(r"^(p\d+)[abc]$", r"\1", model)


def distinct(sightings: Iterable[Sighting]) -> dict[str, Sighting]:
    """The sightings by PCI address; ASIC ids that two chips share are dropped, so that both go by their PCI address.

    A chip that is seen twice, as at the end of a reset (tt-kmd#112), counts with its higher N: the newer entry.
    """
    by_pci = {s.chip.pci: s for s in sorted(sightings, key=lambda s: s.chip.index)}
    by_id: dict[str, list[str]] = {}
    for pci, sighting in by_pci.items():
        by_id.setdefault(sighting.chip.id, []).append(pci)
    for pci in itertools.chain.from_iterable(same for same in by_id.values() if len(same) > 1):
        by_pci[pci] = by_pci[pci]._replace(chip=replace(by_pci[pci].chip, asic_id=""))
    return by_pci


def same_chip(known: Chip, free: Mapping[str, Chip], offered: set[str]) -> Chip | None:
    """The chip that was offered as `known`, as it is now among the `free` ones by PCI address, or None.

    By ASIC id; by PCI address only while one of the two has no ASIC id, as when a reset chip's telemetry is not back: then it
    keeps what was known of it. But not one whose ID is among those `offered`: that is another card's, in this one's place.
    A chip of another type is another chip.
    """
    found = next((chip for chip in free.values() if chip.asic_id == known.asic_id and chip.id == known.id), None)
    there = free.get(known.pci)
    if found is None and there is not None and not (known.asic_id and there.asic_id) and there.id not in offered - {known.id}:
        found = there
    if found is None or found.card_type not in ("", "unknown", known.card_type):
        return None
    if found.identified:  # a type once known is not unlearnt: a p300 whose chip is "unknown" for a while would fall apart
        return found if found.card_type != "unknown" else replace(found, card_type=known.card_type)
    return replace(known, index=found.index, stamp=found.stamp, pci=found.pci, dev=found.dev, driver=found.driver)


def new_cards(chips: Sequence[Chip]) -> list[tuple[str, tuple[Chip, ...]]]:
    """ID and chips of each card that `chips` make up, which belong to none yet.

    A p300 is one card of two chips if exactly two share its serial, and the serial's low word is not 0: early boards
    have 0 there. No other serial is a key: the 32 chips of a Galaxy show the same (dstack#2898).
    """
    boards: dict[str, list[Chip]] = {}
    for chip in chips:
        paired = chip.card_type.startswith("p300") and chip.serial and chip.serial[8:] != "0" * 8
        boards.setdefault(f"p300-{chip.serial}" if paired else chip.id, []).append(chip)
    cards: list[tuple[str, tuple[Chip, ...]]] = []
    for board, members in boards.items():
        if len(members) == 2:
            cards.append((board, tuple(sorted(members, key=lambda chip: chip.pci))))
        else:
            cards += [(chip.id, (chip,)) for chip in members]
    return cards


def assess(
    old: Snapshot, pulses: Mapping[str, Pulse], sightings: Sequence[Sighting], settings: Settings, now: float, wall: float
) -> tuple[Snapshot, dict[str, Pulse]]:
    """The next snapshot and the memory for the one after it, from the last ones and one poll's sightings.

    Pulses are keyed by PCI address. `now` is time.monotonic(), `wall` time.time(). The result does not depend on the
    order of the sightings. The snapshot's host facts are the old one's.
    """
    seen = distinct(sightings)
    twins = {chip.pci for chip, _ in sightings if chip.asic_id and not seen[chip.pci].chip.asic_id}
    judged = {pci: judge(pulses.get(pci), sighting, now) for pci, sighting in seen.items()}
    free = {pci: seen[pci].chip for pci in sorted(seen)}
    cards: dict[str, Card] = {}
    present: set[str] = set()
    offered_ids = {chip.id for card in old.cards if card.resource is not None for chip in card.chips}
    for card in old.cards:  # first those that were offered: they keep ID and chips, whatever has become of these
        if card.resource is not None:
            chips, verdicts = [], []
            for known in card.chips:
                chip = same_chip(known, free, offered_ids)
                chips.append(chip or known)
                verdicts.append(judged[chip.pci][1] if chip else verdict("gone", known))
                if chip:
                    del free[chip.pci]
                    present.add(card.id)
            cards[card.id] = replace(card, chips=tuple(chips), verdict=worst(chips, verdicts, offered=True))
    strangers = not all(chip.identified for chip in free.values())
    for card_id, members in new_cards(list(free.values())):
        model = fold(members[0].model, settings.variants)
        found = worst(members, [judged[chip.pci][1] for chip in members], offered=False)
        young = now - judged[members[0].pci][0].appeared <= TELEMETRY_S
        if model.startswith("p300") and len(members) == 1 and young and strangers:
            found = verdict("half", members[0])
        if card_id in present:
            card_id, found = f"{card_id}@{members[0].pci}", verdict("id-taken", members[0])
        offered = model and found.health != PENDING and all(chip.identified for chip in members)
        # Under the ID of a card that is gone only if its chip has become another model: then the old card makes way.
        cards[card_id] = Card(card_id, model, f"{settings.resource_domain}/{model}" if offered else None, members, found)
    before = {card.id: card.verdict for card in old.cards}
    result = []
    for card in cards.values():
        found, last = card.verdict, before.get(card.id)
        if found.kind == "ok" and any(chip.pci in twins for chip in card.chips):
            found = TWIN
        elif found.kind == "ok" and card.model.startswith("p300") and len(card.chips) == 1:
            found = ALONE
        since, began = (last.since, last.began) if last and last.health == found.health else (wall, now)
        result.append(replace(card, verdict=replace(found, since=since, began=began)))
    result.sort(key=lambda card: (card.resource is None, card.resource or "", card.chips[0].pci, card.id))
    # Of a chip that is away only the thermal trips are kept: such a trip is what may have taken it away.
    absent = {pci: Pulse(now, changed=now, trips=pulse.trips) for pci, pulse in pulses.items() if pulse.trips is not None}
    return replace(old, cards=tuple(result)), absent | {pci: pulse for pci, (pulse, _) in judged.items()}


def worst(chips: Sequence[Chip], verdicts: Sequence[Verdict], offered: bool) -> Verdict:
    """A card's verdict: its worst chip's; of two chips the reason names the one. One that was offered is never pending."""
    order = [HEALTHY, PENDING, UNHEALTHY]
    found, chip = max(zip(verdicts, chips, strict=True), key=lambda pair: order.index(pair[0].health))
    if len(chips) > 1 and found.reason:
        found = replace(found, reason=f"chip {chip.pci}: {found.reason}")
    return replace(found, health=UNHEALTHY) if offered and found.health == PENDING else found


class Bell:
    """Wakes all who wait for a change. A waiter checks its condition, then waits, with no `await` in between."""

    def __init__(self) -> None:
        self._event = asyncio.Event()

    def ring(self) -> None:
        """Wakes those who wait now. On the event loop only."""
        self._event.set()
        self._event = asyncio.Event()

    def wait(self) -> Coroutine[Any, Any, object]:
        """Until the next ring from now on, whenever it is awaited."""
        return self._event.wait()


Place = tuple[int, tuple[int, int]]  # N of a class device, and its stamp
HOST: Place = (-1, (0, 0))  # what belongs to no chip


class Inventory:
    """The newest snapshot, and the thread that makes it."""

    def __init__(self, settings: Settings, polled: Callable[[Snapshot, Snapshot], object] = lambda old, new: None) -> None:
        """`polled` is called in the polling thread after each poll, with the last snapshot and the new one."""
        self.settings = settings
        self.snapshot = Snapshot()
        self.pulses: dict[str, Pulse] = {}  # what is remembered of each chip, by PCI address; replaced, never changed
        self.trouble = Trouble()  # why the last poll failed
        self.alive_at = self.watched_at = time.monotonic()  # last sign of life of the polling thread, and of the event loop
        self.polls, self.polls_s = 0, 0.0  # how many there were, and how long they took in all
        self._polled = polled
        self._sensed = -math.inf  # when sensors were read last
        self._seen: dict[int, Chip] | None = None  # N -> chip as identified; None before the first poll
        self._functions: list[Chip] = []  # see bare_functions()
        self._host_read = False  # whether the facts of the host have ever been read
        self._stuck: set[Place] = set()  # where a read hangs
        self._reading: tuple[Place, int] | None = None  # where the polling thread reads now, and which read it is
        self._reads = itertools.count()
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()  # held for assignments only, never during a read

    def poll(self, now: float) -> None:
        """One pass: reads, judges, publishes. Only an OSError that is no chip's fault comes out (no descriptors, ...)."""
        sysfs, last = self.settings.sysfs_root, self.snapshot
        sensors = now - self._sensed >= SENSORS_S
        if sensors:
            self._sensed = now
        sightings, seen = self._look(self._seen or {}, sensors)
        host, functions, host_read = replace(last, polled=True), self._functions, self._host_read
        there = {sighting.chip.pci for sighting in sightings}
        bare = any(chip.pci not in there for chip in functions)  # such a one may go, or change its driver, at any time
        if (seen != self._seen or bare or not host_read) and HOST not in self._stuck:
            with self._watched(HOST):
                driver = attribute(sysfs / "module/tenstorrent/version", re.compile(r"[\w.+~-]{1,40}"))
                host = replace(host, numa_nodes=host_numa_nodes(sysfs), driver=driver)
                functions, host_read = bare_functions(sysfs), True
        sightings += [Sighting(chip, Signs(fault="no-driver")) for chip in functions if chip.pci not in there]
        new, pulses = assess(host, self.pulses, sightings, self.settings, now, time.time())
        with self._lock:
            if self._thread not in (None, threading.current_thread()):
                return  # the watchdog has replaced this thread: what it has read is out of date
            before, self.snapshot, self.pulses = self.pulses, new, pulses
            self._seen, self._functions, self._host_read = seen, functions, host_read
        self.alive_at = time.monotonic()
        self.polls, self.polls_s = self.polls + 1, self.polls_s + self.alive_at - now
        self._polled(last, new)
        for card in new.cards:
            for chip in card.chips:
                for event in events(before.get(chip.pci), pulses.get(chip.pci)):
                    log.warning("chip %s of %s %s", chip.pci, card, event, extra={"card": card.id, "resource": card.resource})

    def _look(self, before: Mapping[int, Chip], sensors: bool) -> tuple[list[Sighting], dict[int, Chip]]:
        """This poll's sightings, and the chips by N, as they were `before` where they are the same."""
        sysfs = self.settings.sysfs_root
        sightings: list[Sighting] = []
        seen: dict[int, Chip] = {}
        for index in class_indices(sysfs):
            try:
                seen[index] = chip = find_chip(sysfs, index, before.get(index))
                if (index, chip.stamp) in self._stuck:
                    sightings.append(Sighting(chip, Signs(fault="read-hangs")))
                    continue
                with self._watched((index, chip.stamp)):
                    if not chip.dev or not chip.identified:  # new, or its telemetry was not there
                        seen[index] = chip = identify(sysfs, chip)
                    signs = sense(self.settings, chip, self.snapshot.driver, sensors)
                sightings.append(Sighting(chip, signs))
                if signs.fault == "resetting":  # it may come back with other firmware: identify it anew
                    seen[index] = replace(chip, dev="")
            except (OSError, ValueError) as error:  # vanished between listing and reading, or no chip at all
                if isinstance(error, OSError) and error.errno in SHORTAGES:
                    raise
                seen.pop(index, None)
                log.debug("%s is left out: %s", class_device(sysfs, index), error)
        return sightings, seen

    @contextlib.contextmanager
    def _watched(self, place: Place) -> Iterator[None]:
        """Lets the watchdog see that a read is under way there."""
        mine = threading.current_thread()
        with self._lock:
            if self._thread in (None, mine):
                self._reading = (place, next(self._reads))
        try:
            yield
        finally:
            with self._lock:
                if self._thread in (None, mine):
                    self._reading = None
                else:  # replaced while it hung, and the read has returned after all: it may be tried again
                    self._stuck.discard(place)

    def _run(self) -> None:
        """The polling thread."""
        while self._thread is threading.current_thread():
            try:
                self.poll(time.monotonic())
                self.trouble.is_now("", "the cards can be looked for again")
            except OSError as error:
                self.trouble.is_now(f"cannot look for cards, the last list stands: {error}")
            except Exception as error:  # a defect must cost one poll, not all that follow
                if not self.trouble.problem:
                    log.exception("a poll failed, the last list stands")
                self.trouble.is_now(f"polls fail, the last list stands: {error!r}")
            time.sleep(self.settings.poll_seconds)

    def start(self) -> None:
        """Starts the polling thread, or one that takes the place of a hanging one."""
        self.alive_at = time.monotonic()
        # A daemon: one that hangs in a read must not keep the process from ending.
        self._thread = threading.Thread(target=self._run, name="poll", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Lets the polling thread end, after a poll that is under way; that one is not published any more."""
        with self._lock:
            self._thread = threading.main_thread()

    async def watch(self) -> None:
        """The watchdog: gives up on a polling thread whose read hangs, and polls on in a new one without that chip."""
        last, ticks = None, 0
        while True:
            self.watched_at = time.monotonic()
            await asyncio.sleep(0.5)
            reading = self._reading
            ticks = ticks + 1 if reading is not None and reading == last else 0
            last = reading
            if reading is not None and ticks >= HANG_TICKS:
                with self._lock:
                    if self._reading == reading:  # it has not returned at the last moment
                        self._stuck.add(reading[0])
                        self._reading = None
                        self.start()


def report(old: Snapshot, new: Snapshot) -> None:
    """Logs what changed between two snapshots, one line a card."""
    if not new.cards and (old.cards or not old.polled):
        log.info("no cards here, driver %s: waiting for some to appear", new.driver or "not loaded")
    before = {card.id: card for card in old.cards}
    for card in new.cards:
        last = before.pop(card.id, None)
        if last is not None and (last.verdict, last.resource) == (card.verdict, card.resource):
            continue
        extra = {"card": card.id, "resource": card.resource, "reason": card.verdict.reason, "since": card.verdict.since}
        if card.resource is None:
            log.warning("%s is not offered: %s", card, card.verdict.reason or "its model is unknown", extra=extra)
        elif card.verdict.health == HEALTHY:
            back = last is not None and last.resource is not None and last.verdict.health != HEALTHY
            text = f" again, after {card.verdict.began - last.verdict.began:.0f} s" if last is not None and back else ""
            log.info("%s is Healthy%s%s", card, text, card.verdict.reason and f": {card.verdict.reason}", extra=extra)
        else:
            log.error("%s is Unhealthy: %s", card, card.verdict.reason, extra=extra)
    chips = {chip.pci for card in new.cards for chip in card.chips}
    for card in before.values():
        if any(chip.pci in chips for chip in card.chips):
            continue  # it is another card now: its telemetry has come
        log.warning("%s is gone; it was not offered", card, extra={"card": card.id, "resource": card.resource})


# ======================================================================================================================
# 4. The DevicePlugin service: five calls, each answered from the newest snapshot
#
# The kubelet sets no time limit on most of them, and a slow answer stalls the admission of every Pod on the node: no call
# reads sysfs files or waits for a lock. What they do look at are links and device nodes, which never reach the driver.
# ======================================================================================================================

HUGEPAGES = "/dev/hugepages-1G"
"""Where the user-mode driver insists on finding 1 GiB pages inside the container (tt-umd hugepage.cpp)."""

OPTIONS = api.DevicePluginOptions(pre_start_required=True, get_preferred_allocation_available=True)
"""Announced twice: kubelet 1.20 takes them from Register, 1.32 and later from GetDevicePluginOptions."""


Context = grpc.aio.ServicerContext[Any, Any]
Answer = TypeVar("Answer")


class Refusal(Exception):
    """A call that cannot be granted: a gRPC status, and a sentence that ends up in the Pod's event."""

    def __init__(self, code: grpc.StatusCode, sentence: str) -> None:
        super().__init__(sentence)
        self.code = code


def malformed(sentence: str) -> Refusal:
    """The request breaks the device plugin API."""
    return Refusal(grpc.StatusCode.INVALID_ARGUMENT, sentence)


def unfit(card: Card, sentence: str) -> Refusal:
    """The card cannot be used now."""
    return Refusal(grpc.StatusCode.FAILED_PRECONDITION, f"{card}: {sentence}")


class Ledger:
    """What this process has done so far, across all registrations. Written on the event loop alone, read in any thread."""

    def __init__(self) -> None:
        self.counts: Counter[tuple[str, ...]] = Counter()  # (metric, label values ...) -> how often
        self.allocated: dict[str, list[str]] = {}  # card -> the host paths that it was given out by
        self.cdi: KeptFile | None = None  # see cdi_spec


def listing(snapshot: Snapshot, resource: str) -> api.ListAndWatchResponse:
    """What a ListAndWatch stream of `resource` should have sent last.

    A card without a NUMA node beside cards with one gets all nodes of the host: if a resource mixes cards with and without
    topology, the kubelet gives no hint at all for two of them (topology_hints.go). Nor may -1 be sent: it matches nothing,
    and the policies `restricted` and `single-numa-node` would reject the Pod.
    """
    cards = snapshot.of(resource).values()
    fallback = snapshot.numa_nodes if any(card.numa_nodes for card in cards) else ()
    devices = []
    for card in cards:
        nodes = [api.NUMANode(ID=node) for node in card.numa_nodes or fallback]
        topology = api.TopologyInfo(nodes=nodes) if nodes else None
        devices.append(api.Device(ID=card.id, health=card.verdict.health, topology=topology))
    return api.ListAndWatchResponse(devices=devices)


def pick(snapshot: Snapshot, resource: str, ids: Sequence[str]) -> list[Card]:
    """The cards of `ids`, ordered by PCI address. Raises Refusal for no id, one named twice, or one that is unknown."""
    if not ids:
        raise malformed(f"no card IDs of {resource} in the request")
    if len(set(ids)) < len(ids):
        raise malformed(f"a card ID of {resource} is named twice in one request: {Counter(ids).most_common(1)[0][0][:80]!r}")
    cards = snapshot.of(resource)
    for card_id in ids:
        if card_id not in cards:
            raise Refusal(grpc.StatusCode.NOT_FOUND, f"there is no card {card_id[:80]!r} of {resource} on this node")
    return sorted((cards[card_id] for card_id in ids), key=lambda card: card.chips[0].pci)


def require_healthy(card: Card) -> None:
    """Raises Refusal with the card's reason if it is not Healthy."""
    if card.verdict.health != HEALTHY:
        raise unfit(card, f"not healthy since {utc(card.verdict.since)}: {card.verdict.reason}")


def host_path(settings: Settings, card: Card, chip: Chip) -> str:
    """The path of a chip's device node on the host. Raises Refusal if it is not the chip that the snapshot says.

    A link of /dev/tenstorrent/by-id is preferred where it leads to the same device: the kubelet repeats this answer at
    every restart of the container, and the runtime resolves the link anew each time, so that a reset that has given the
    chip another N hands out the right chip (tt-kmd#170).
    """
    node = f"tenstorrent/{chip.index}"
    # The snapshot may be one poll old, and N is reused at once: is it this chip's still?
    try:
        now_there = find_chip(settings.sysfs_root, chip.index, known=chip).pci
    except (OSError, ValueError):
        now_there = ""
    if now_there != chip.pci:
        raise unfit(card, f"/dev/{node} is no longer chip {chip.pci}: it has just been reset or removed; try again")
    if not is_device_node(f"{settings.dev_root}/{node}", chip.dev):
        raise unfit(card, FAULTS["no-node"].format(index=chip.index))
    if settings.fake:
        return os.devnull
    by_id = f"tenstorrent/by-id/{chip.id}"
    return f"/dev/{by_id if is_device_node(f'{settings.dev_root}/{by_id}', chip.dev) else node}"


def wants_hugepages(settings: Settings, cards: Iterable[Card]) -> bool:
    """Whether to mount the host's 1 GiB pages: needed by each chip that is not behind a DMA IOMMU domain (tt-umd)."""
    if settings.hugepages != "auto":
        return settings.hugepages == "always"
    needed = any(not chip.iommu.startswith("DMA") for card in cards for chip in card.chips)
    return needed and os.path.isdir(f"{settings.dev_root}/hugepages-1G")


def grant(settings: Settings, resource: str, cards: Sequence[Card]) -> api.ContainerAllocateResponse:
    """What one container gets for `cards`. Raises Refusal.

    The number inside is the one outside: it is part of the names of the user-mode driver's locks and hugepage files. No
    TT_VISIBLE_DEVICES: the set of device nodes decides what is visible, and the variable's meaning has changed in
    tt-umd 0.9.3. The one variable is named after the resource, as the answers of several resources are merged by key.
    """
    answer = api.ContainerAllocateResponse()
    for card in cards:
        require_healthy(card)
        for chip in card.chips:
            path = host_path(settings, card, chip)
            answer.devices.add(container_path=f"/dev/tenstorrent/{chip.index}", host_path=path, permissions="rw")
    name = "PCIDEVICE_" + re.sub("[^A-Z0-9]", "_", resource.upper())
    answer.envs[name] = ",".join(chip.pci for card in cards for chip in card.chips)
    if wants_hugepages(settings, cards):
        answer.mounts.add(container_path=HUGEPAGES, host_path=HUGEPAGES)
    return answer


def prefer(cards: Mapping[str, Card], available: Sequence[str], must: Sequence[str], size: int) -> list[str]:
    """The `size` IDs of `available` that suit one container best. Raises Refusal if the request cannot be met.

    Kept in any case: `must`. Then fewest NUMA nodes; then fewest branches at each level of the tree below (Galaxy tray, or
    PCI root bus and bridges), from the top; then, on a tray, neighbouring positions; then the choice that leaves the
    other groups as whole as possible for the next Pod. Deterministic, whatever the order of the request.
    """
    asked, wanted = set(available) | set(must), set(must)
    if not 0 < size <= len(asked) or len(wanted) > size:
        raise malformed(f"cannot choose {size} of {len(asked)} cards with {len(wanted)} of them required")
    fit = {card_id: branch(card) for card_id, card in cards.items() if card_id in asked and card.verdict.health == HEALTHY}
    paths = sorted((path, card_id) for card_id, path in fit.items())
    pool = [card_id for _, card_id in paths]
    # Lost since the kubelet read the list: the last resort, and not part of the choice, however many are named.
    lost = sorted(asked.difference(pool), key=lambda card_id: (card_id not in wanted, card_id))
    lost = lost[: max(len(wanted.difference(pool)), size - len(pool))]
    depth = max((len(path) for path, _ in paths), default=0)
    ways = [path + ("",) * (depth - len(path)) for path, _ in paths]
    if not pool:
        return lost
    required = {i for i, card_id in enumerate(pool) if card_id in wanted}
    best = choices(ways, required, list(range(len(pool))), 0, depth)
    return [pool[i] for i in best[size - len(lost)][1]] + lost


def branch(card: Card) -> tuple[str, ...]:
    """A card's way from the host's top to itself: NUMA node, then Galaxy tray and position, or root bus and bridges."""
    chip = card.chips[0]
    numa = "/".join(f"{node:04}" for node in card.numa_nodes)
    if chip.tray is not None:
        return (numa, f"tray {chip.tray[0]}", f"position {chip.tray[1]:02}", chip.pci)
    return (numa, *chip.pci_path, chip.pci)


Cost = tuple[int, ...]
Choices = dict[int, tuple[Cost, tuple[int, ...]]]  # how many -> the cheapest choice of so many


def choices(
    paths: Sequence[tuple[str, ...]], required: set[int], members: list[int], level: int, depth: int
) -> Choices:
    """For each possible count: the cheapest choice of so many of `members`, which share the first `level` parts.

    A cost is a vector, compared from the left: groups touched at level 1, 2, ..., positions skipped, and the negative
    sum of squares of what stays free in the groups of level 1, 2, .... Costs of different groups add up, so the best
    choice for a group is made of best choices for its parts: exact, in O(cards squared) additions.
    """
    zero: Cost = (0,) * (2 * depth + 1)
    if level == depth:  # paths are as long, and differ: one card
        return {count: (zero, tuple(members[:count])) for count in (0, 1) if count or members[0] not in required}
    groups: dict[str, list[int]] = {}
    for i in members:
        groups.setdefault(paths[i][level], []).append(i)
    total: Choices = {0: (zero, ())}
    for inside in groups.values():
        within = neighbours if paths[inside[0]][level].startswith("tray") else choices
        part = within(paths, required, inside, level + 1, depth)
        merged: Choices = {}
        for (have, (cost, chosen)), (count, (extra, more)) in itertools.product(total.items(), part.items()):
            here = list(extra)
            here[level] += count > 0
            here[depth + 1 + level] -= (len(inside) - count) ** 2
            candidate = (tuple(map(sum, zip(cost, here, strict=True))), chosen + more)
            if have + count not in merged or candidate < merged[have + count]:
                merged[have + count] = candidate
        total = merged
    return total


def neighbours(
    paths: Sequence[tuple[str, ...]], required: set[int], members: list[int], level: int, depth: int
) -> Choices:
    """`choices` on one Galaxy tray, where each level below holds one card: all subsets of the eight, by skipped positions."""
    best: Choices = {}
    must = required & set(members)
    below = depth - level
    for count in range(len(members) + 1):
        for chosen in itertools.combinations(members, count):
            if must <= set(chosen):
                places = [int(paths[i][level].split()[1]) for i in chosen]
                skipped = places[-1] - places[0] + 1 - count if places else 0
                free = count - len(members)
                cost = (0,) * level + (count,) * below + (skipped,) + (0,) * level + (free,) * below
                best[count] = min(best.get(count, (cost, chosen)), (cost, chosen))
    return best


def decided(call: Callable[[Any, Any], Answer]) -> Callable[[Any, Any, Context], Coroutine[Any, Any, Answer]]:
    """A method that answers at once, as a gRPC call: its Refusal becomes a status, and is logged and counted."""

    @functools.wraps(call)
    async def answer(self: DevicePlugin, request: Any, context: Context) -> Answer:
        try:
            return call(self, request)
        except Refusal as refusal:
            self.ledger.counts["refusals", self.resource, call.__name__, refusal.code.name] += 1
            log.warning("%s of %s refused: %s", call.__name__, self.resource, refusal, extra={"resource": self.resource})
            return await context.abort(refusal.code, str(refusal))

    return answer


class DevicePlugin(rpc.DevicePluginServicer):
    """The service of one resource for one registration: a thin shell around the functions above.

    `opened` and `ended` tell the registration loop of the first ListAndWatch stream, which is the kubelet's: it opens one
    for each Register, and nobody else knows this socket's name yet.
    """

    def __init__(self, inventory: Inventory, bell: Bell, resource: str, ledger: Ledger) -> None:
        self.inventory = inventory
        self.bell = bell
        self.resource = resource
        self.ledger = ledger
        self.opened = asyncio.Event()
        self.ended = asyncio.Event()
        self.closing = False

    def close(self) -> None:
        """Ends all streams; calls under way are finished."""
        self.closing = True
        self.bell.ring()

    async def GetDevicePluginOptions(self, request: api.Empty, context: Context) -> api.DevicePluginOptions:
        """The same options as in Register."""
        return OPTIONS

    # A coroutine that writes, not a generator: when the call is cancelled, its `finally` runs there and then.
    async def ListAndWatch(self, request: api.Empty, context: Context) -> None:  # type: ignore[override]
        """The list at once, then after each change of what *this* stream sent last; steps in between may be skipped."""
        first = not self.opened.is_set()
        self.opened.set()
        try:
            sent = None
            while not self.closing:
                devices = listing(self.inventory.snapshot, self.resource)
                if devices != sent:
                    await context.write(devices)
                    sent = devices
                else:
                    await self.bell.wait()
        finally:  # also when cancelled: the kubelet has gone, or has dropped this stream
            if first:
                self.ended.set()

    @decided
    def GetPreferredAllocation(self, request: api.PreferredAllocationRequest) -> api.PreferredAllocationResponse:
        """See prefer()."""
        cards = self.inventory.snapshot.of(self.resource)
        answer = api.PreferredAllocationResponse()
        for one in request.container_requests:
            ids = prefer(cards, one.available_deviceIDs, one.must_include_deviceIDs, one.allocation_size)
            answer.container_responses.add(deviceIDs=ids)
        return answer

    @decided
    def Allocate(self, request: api.AllocateRequest) -> api.AllocateResponse:
        """See grant(). All or nothing: one card that is refused refuses the request."""
        snapshot = self.inventory.snapshot
        containers = [list(one.devices_ids) for one in request.container_requests]
        if len(containers) != 1:
            pick(snapshot, self.resource, list(itertools.chain.from_iterable(containers)))  # no card for two of them
        granted = [pick(snapshot, self.resource, ids) for ids in containers]
        answer = api.AllocateResponse()
        answer.container_responses.extend(grant(self.inventory.settings, self.resource, cards) for cards in granted)
        for cards, got in zip(granted, answer.container_responses, strict=True):  # nothing is refused from here on
            # A CDI name that leads nowhere would stop the container; the device nodes are there in any case.
            if self.ledger.cdi is not None and all(self.ledger.cdi.says(f'"{card.id}"') for card in cards):
                got.cdi_devices.extend(api.CDIDevice(name=f"{CDI_KIND}={card.id}") for card in cards)
            given = iter(got.devices)
            for card in cards:
                paths = [next(given).host_path for _ in card.chips]
                # By CDI the chip would have its number of the container's start, by the link's device node that of now.
                self.ledger.allocated[card.id] = card.device_nodes if got.cdi_devices else paths
            self.ledger.counts["allocations", self.resource] += 1
            # Once the answer is on its way: the kubelet admits no other Pod meanwhile, and writing a line takes its time.
            line = functools.partial(log.info, "allocated %s", ", ".join(map(str, cards)), extra={"resource": self.resource})
            asyncio.get_running_loop().call_soon(line)
        return answer

    @decided
    def PreStartContainer(self, request: api.PreStartContainerRequest) -> api.PreStartContainerResponse:
        """Refuses a card that is not healthy, or whose device node the container's stored answer no longer names."""
        for card in pick(self.inventory.snapshot, self.resource, request.devices_ids):
            require_healthy(card)
            now = [host_path(self.inventory.settings, card, chip) for chip in card.chips]
            then = self.ledger.allocated.get(card.id, now)
            if then not in (now, card.device_nodes):
                raise unfit(card, f"it was {', '.join(then)} when this Pod was admitted: delete the Pod, so that a new one "
                                  "gets the right device (/dev/tenstorrent/by-id on the host avoids this)")  # fmt: skip
        return api.PreStartContainerResponse()


# ======================================================================================================================
# 5. Registration: one loop per resource, for ever: serve, register, expect the stream, wait until it ends, again
#
# Why the end of the stream, and nothing else, is the signal: it comes whatever has happened, also in the cases that leave
# no trace in the file system. A kubelet drops a stream and keeps running; or, up to 1.36, the end of an older stream of
# the same resource disconnects the newer registration (handler.go), for good, with both processes running.
# ======================================================================================================================

API_VERSION = "v1beta1"

PACE_S = 0.05
"""How often to look for the kubelet or the lock: a registration takes a few ms more, 0.1 s are promised."""

REGISTER_S = 12.0
"""Limit of Register: kubelets from 1.32 on dial back inside it, with a limit of 10 s (kubelet endpoint.go)."""

STREAM_S = 5.0
"""How soon after Register the kubelet must open its stream."""

PATIENCE_S = 5.0
"""How long to leave a kubelet alone that has failed a registration, at most; the first time twice PACE_S, then doubled."""

STOP_S = 0.2
"""Grace for calls under way when a server stops; its streams end by themselves."""

SOCKET_PATH_BYTES = 107
"""Longest path of a Unix socket (Linux unix(7): 108 with the NUL)."""

REQUEST_BYTES = 256 * 1024
"""Largest request taken: ten times the IDs of the largest node. More is refused by gRPC before it costs anybody time."""

SOCKET = "tenstorrent-{model}-{token}.sock"
STALE_SOCKETS = re.compile(r"tenstorrent-.+-[0-9a-f]{6}\.sock")


class Stay:
    """This process's place in the kubelet folder: an flock on the folder itself, so one plugin at a time.

    The folder and not a file in it: it is there on a full disk, nothing stale is left behind, and the usual advice to
    empty device-plugins cannot take the lock away. The kernel frees it when its holder ends, however it ends.
    """

    def __init__(self, settings: Settings) -> None:
        self.folder = settings.plugin_dir
        self.held = False
        self.second = ""  # says so, if another instance held it at the last look
        self._fd = -1
        self._links = 0  # to the folder, when it was locked

    def look(self) -> str:
        """One try: "" if the lock is held, else what it waits for. Raises CannotWork if that can never be."""
        second = ""
        try:
            if not self.holds():
                self.release()
                self._fd = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
                fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                remove_stale_sockets(self.folder)
                self.held, self._links = True, os.fstat(self._fd).st_nlink
            return ""
        except FileNotFoundError:
            return f"{self.folder} is not there yet: waiting for a kubelet that makes it"
        except BlockingIOError:
            second = f"another instance serves {self.folder}: standing by until it ends"
            return second
        except OSError as error:
            return f"cannot lock {self.folder}: {error.strerror}; {no_access(self.folder)}".removesuffix("; ")
        finally:
            self.second = second

    def holds(self) -> bool:
        """Whether the lock is held on the folder that is there now. Raises CannotWork if it is only a mount's memory of one.

        One that was deleted and made anew is another one. A container's mount goes on showing the deleted one, for ever.
        """
        if not self.held:
            return False
        mine = os.fstat(self._fd)
        with contextlib.suppress(OSError):
            if os.path.samestat(mine, os.stat(self.folder)):
                if mine.st_nlink == 0 < self._links:
                    raise CannotWork(f"{self.folder} was deleted on the host, and a mount shows the deleted one: start again")
                return True
        return False

    def release(self) -> None:
        """Lets the next instance in."""
        if self._fd >= 0:
            os.close(self._fd)
        self._fd, self.held = -1, False


def no_access(folder: Path) -> str:
    """Why this process may not make sockets in the kubelet's folder; "" if it may, or if there is no such folder."""
    try:
        status = os.stat(folder)
        if os.access(folder, os.R_OK | os.W_OK | os.X_OK, effective_ids=True):
            return ""
        problem = f"it belongs to uid {status.st_uid}, mode {stat.S_IMODE(status.st_mode):04o}, or is mounted read-only"
    except (FileNotFoundError, NotADirectoryError):
        return ""
    except OSError as error:
        problem = str(error.strerror)
    return (
        f"uid {os.geteuid()} cannot make sockets in {folder}: {problem}. The kubelet makes this folder for root alone: run the "
        "plugin as uid 0 (it needs no capabilities), with the folder mounted for writing"
    )


def remove_stale_sockets(folder: Path) -> None:
    """Removes what a killed instance has left: sockets named as ours that nobody listens on. Call it with the lock held."""
    for name in sorted(filter(STALE_SOCKETS.fullmatch, os.listdir(folder))):
        with contextlib.suppress(OSError):
            if stat.S_ISSOCK(os.lstat(folder / name).st_mode) and not listens(folder / name):
                os.unlink(folder / name)
                log.info("removed %s: left behind by an instance that was killed", name)


def listens(path: Path) -> bool:
    """Whether a process accepts connections there. Between a kubelet's bind and listen nobody does, and a dead one's socket
    file stays; a connection tells, in 20 microseconds, where a failing Register would take milliseconds. Raises OSError
    for a problem on this side."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC) as probe:
        try:
            probe.connect(os.fspath(path))
        except (FileNotFoundError, ConnectionError, BlockingIOError, NotADirectoryError):
            return False  # BlockingIOError: its queue is full, so it accepts nothing now
        return True


Identity = tuple[int, int, int]  # device, inode and time of change: another file, or another kubelet, has another one


def identity_of(path: Path) -> Identity | None:
    """Which file is at `path`; None if there is none. Raises OSError."""
    try:
        status = os.stat(path)
    except FileNotFoundError:
        return None
    return (status.st_dev, status.st_ino, status.st_mtime_ns)


def unix_target(path: Path) -> str:
    """gRPC's name for a Unix socket; it reads names as URIs."""
    return "unix:" + urllib.parse.quote(os.fspath(path))


@contextlib.asynccontextmanager
async def serving(plugin: DevicePlugin, folder: Path, model: str) -> AsyncIterator[str]:
    """Serves `plugin` on a new socket in `folder`, whose name it gives. Raises OSError if it cannot be bound.

    Each registration has a socket of its own name: whatever still knows an older one (an instance that ends late, a kubelet
    that gets round to an old Register) can neither remove it nor take it for its own.
    """
    endpoint = SOCKET.format(model=model, token=os.urandom(3).hex())
    server = grpc.aio.server(options=[("grpc.max_receive_message_length", REQUEST_BYTES)])
    rpc.add_DevicePluginServicer_to_server(plugin, server)
    try:
        server.add_insecure_port(unix_target(folder / endpoint))
    except RuntimeError as error:  # grpcio does not say why; the file system might
        raise OSError(errno.EIO, f"cannot make a socket in {folder} (no space, no inodes?)") from error
    try:
        await server.start()
        yield endpoint
    finally:
        plugin.close()
        try:
            await server.stop(STOP_S)
        finally:  # also when cancelled meanwhile; gRPC may have removed it, or a kubelet at its start
            with contextlib.suppress(FileNotFoundError):
                os.unlink(folder / endpoint)


async def register(kubelet: Path, endpoint: str, resource: str) -> None:
    """Calls Register. Raises grpc.aio.AioRpcError."""
    # A subchannel pool of its own: the shared one remembers a failed dial, and makes the next one wait for a second.
    options = [("grpc.use_local_subchannel_pool", 1)]
    async with grpc.aio.insecure_channel(unix_target(kubelet), options=options) as channel:
        request = api.RegisterRequest(version=API_VERSION, endpoint=endpoint, resource_name=resource, options=OPTIONS)
        await rpc.RegistrationStub(channel).Register(request, timeout=REGISTER_S)


NOT_YET = "waiting for the kubelet's answer"


class NoStream(Exception):
    """The kubelet has accepted a registration, but has not opened its stream: why."""


class Registrar:
    """Keeps every resource of the newest snapshot registered."""

    def __init__(self, settings: Settings, inventory: Inventory, bell: Bell) -> None:
        self.settings = settings
        self.inventory = inventory
        self.bell = bell
        self.stay = Stay(settings)
        self.ledger = Ledger()
        self._registered: set[str] = set()
        self._waiting = Trouble()  # for the folder, for another instance's end, for a kubelet
        self._refused: dict[str, Trouble] = {}  # resource -> the kubelet has not registered it

    def states(self) -> dict[str, str]:
        """Each resource of this node -> "" if it is registered, else why not. Callable in any thread."""
        states = {}
        for resource, refused in dict(self._refused).items():
            why = self._waiting.problem or refused.problem or NOT_YET
            states[resource] = "" if resource in self._registered else why
        return states

    async def run(self) -> None:
        """One keep() for each resource there is, until cancelled; then all of them are closed. Raises CannotWork."""
        tasks: dict[str, asyncio.Task[None]] = {}
        try:
            while True:
                wanted = self.inventory.snapshot.resources
                for resource in wanted:
                    if resource not in tasks:
                        tasks[resource] = asyncio.create_task(self.keep(resource), name=resource)
                if gone := [resource for resource in tasks if resource not in wanted]:
                    await end(tasks.pop(resource) for resource in gone)
                    for resource in gone:
                        self._refused.pop(resource, None)
                    continue
                rung = asyncio.create_task(self.bell.wait())
                try:
                    done, _ = await asyncio.wait([rung, *tasks.values()], return_when=asyncio.FIRST_COMPLETED)
                finally:
                    rung.cancel()
                for task in done - {rung}:
                    task.result()  # none of them returns by itself: it raises what ended it
        finally:
            try:
                await end(tasks.values())
            finally:
                self.stay.release()

    async def kubelet(self, path: Path, failed: Identity | None, patience_s: float) -> Identity:
        """Returns once this instance is the one that serves and a kubelet listens at `path`: which one.

        The one that has `failed` is left alone for `patience_s`; any other is met at the next look. Raises CannotWork.
        """
        until = time.monotonic() + patience_s
        while True:
            problem = self.stay.look()
            if not problem:
                try:
                    identity = identity_of(path)
                    if identity is None or identity != failed or time.monotonic() >= until:
                        if identity is not None and listens(path):
                            self._waiting.is_now("", f"a kubelet answers at {path}")
                            return identity
                        problem = f"no kubelet listens at {path}: waiting for it to start"
                except OSError as error:
                    problem = f"cannot reach the kubelet at {path}: {error.strerror}"
            if problem:
                self._waiting.is_now(problem)
            await asyncio.sleep(PACE_S)

    async def keep(self, resource: str) -> None:
        """The loop. Whatever goes wrong in one registration, the next one follows. Raises CannotWork."""
        path = self.settings.plugin_dir / "kubelet.sock"
        refused = self._refused[resource] = Trouble()
        failed, failures, drops, cause = None, 0, 0, "start"
        while True:
            try:
                failed = kubelet = await self.kubelet(path, failed, min(PATIENCE_S, PACE_S * 2**failures))
                began = time.monotonic()
                await self.once(path, kubelet, resource, cause)
                failed, failures, cause = None, 0, "stream-ended"
                refused.is_now("")
                # A stream that is dropped again and again: soon, but not in a busy loop.
                drops = min(drops + 1, 5) if time.monotonic() - began < 1 else 0
                await asyncio.sleep(min(0.03, 0.001 * 2**drops) if drops else 0)
                continue
            except CannotWork:
                raise
            except NoStream as no_stream:
                cause = "no-stream"
                problem = f"the kubelet has accepted it, but {no_stream}"
            except grpc.aio.AioRpcError as error:
                cause = "register-failed"
                problem = f"the kubelet has not registered it: {error.code().name}: {error.details()}"
            except OSError as error:
                cause = "no-socket"
                problem = f"{error.strerror} {error.filename or ''}".rstrip()
            except Exception as error:  # a defect must cost one try, not the resource
                log.exception("registering %s failed", resource)
                cause = "defect"
                problem = repr(error)
                await asyncio.sleep(PACE_S)
            failures = min(failures + 1, 10)
            refused.is_now(f"{resource}: {problem}; trying again")

    async def once(self, path: Path, kubelet: Identity, resource: str, cause: str) -> None:
        """One registration, from its socket to the end of its stream; `cause`: what ended the last one. Raises AioRpcError,
        NoStream, OSError."""
        plugin = DevicePlugin(self.inventory, self.bell, resource, self.ledger)
        async with serving(plugin, self.settings.plugin_dir, resource.partition("/")[2]) as endpoint:
            await register(path, endpoint, resource)
            until = time.monotonic() + STREAM_S
            while not plugin.opened.is_set():
                # A kubelet that ends just now leaves no stream whose end would tell; the next one's socket does.
                if identity_of(path) != kubelet:
                    raise NoStream("has ended since")
                if time.monotonic() > until:
                    raise NoStream(f"opened no stream within {STREAM_S:.0f} s")
                with contextlib.suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(plugin.opened.wait(), PACE_S)
            cards = self.inventory.snapshot.of(resource).values()
            healthy = sum(card.verdict.health == HEALTHY for card in cards)
            self.ledger.counts["registrations", resource, cause] += 1
            self._registered.add(resource)
            text = "registered %s with the kubelet: %d cards, %d healthy; socket %s; cause: %s"
            log.info(text, resource, len(cards), healthy, endpoint, cause, extra={"resource": resource, "reason": cause})
            try:
                await plugin.ended.wait()
            finally:
                self._registered.discard(resource)
            log.warning("the kubelet's stream of %s has ended: registering again", resource, extra={"resource": resource})


async def end(tasks: Iterable[asyncio.Task[None]]) -> None:
    """Cancels tasks, and waits until they have cleaned up."""
    pending = set(tasks)
    while pending:
        for task in pending:
            task.cancel()
        # Again, if need be: before 3.12, asyncio.wait_for loses a cancellation that comes as it ends, also gRPC's own.
        _, pending = await asyncio.wait(pending, timeout=2 * STOP_S)


# ======================================================================================================================
# 6. Operations: the log; /healthz, /readyz and /metrics; files for other tools (CDI, node labels)
#
# None of it is in the way of sections 1 to 5: HTTP and each file have threads of their own, and what fails here is said in the
# log and tried again, while the cards go on being served.
# ======================================================================================================================

COLOURS = {"ERROR": "31", "WARNING": "33", UNHEALTHY: "31", PENDING: "33", HEALTHY: "32"}
"""Log level or health -> ANSI colour."""


class TextFormatter(logging.Formatter):
    """One line for people: time, level, message; the level in colour on a terminal."""

    def __init__(self, coloured: bool) -> None:
        super().__init__()
        self.coloured = coloured

    def format(self, record: logging.LogRecord) -> str:
        """The line, and a traceback below it."""
        return f"{utc(record.created)} {paint(record.levelname, self.coloured)} {super().format(record)}"


class JsonFormatter(logging.Formatter):
    """One JSON object a line, with the keys ts, level, msg, and card, resource, reason, since where the line has them."""

    def format(self, record: logging.LogRecord) -> str:
        """The line; a traceback goes into `exception`."""
        line: dict[str, Any] = {"ts": utc(record.created), "level": record.levelname.lower(), "msg": record.getMessage()}
        for key in ("card", "resource", "reason"):
            if value := getattr(record, key, None):
                line[key] = value
        if since := getattr(record, "since", None):
            line["since"] = utc(since)
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line)


def paint(word: str, coloured: bool) -> str:
    """`word` in its colour of COLOURS, if it is to be coloured and has one."""
    return f"\033[{COLOURS[word]}m{word}\033[0m" if coloured and word in COLOURS else word


def on_terminal(stream: TextIO) -> bool:
    """Whether to use colours there (https://no-color.org)."""
    return stream.isatty() and not os.environ.get("NO_COLOR")


def utc(seconds: float) -> str:
    """time.time() as an RFC 3339 text of whole seconds."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))


def set_up_logging(style: str, level: str) -> None:
    """Logs to stderr: `text`, or `json`."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter() if style == "json" else TextFormatter(on_terminal(sys.stderr)))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False  # nobody shows them; a line costs less
    logging.getLogger("asyncio").setLevel(logging.WARNING)
    logging.getLogger("grpc._cython.cygrpc").addFilter(in_one_line)


def in_one_line(record: logging.LogRecord) -> bool:
    """gRPC logs a request that cannot be decoded with a traceback of itself: the fault is the caller's, one line will do."""
    if record.exc_info and isinstance(record.exc_info[1], google.protobuf.message.DecodeError):
        record.msg, record.args, record.exc_info = f"refused a malformed request: {record.exc_info[1]}", (), None
    return True


STALE_S = 10.0
"""A poll, or a look of the watchdog, that is older than this and than three polls is a sign that the plugin is stuck. A read
that hangs delays a poll by about 2 s, and is then given up."""


def alive(inventory: Inventory, now: float) -> tuple[bool, str]:
    """/healthz: whether this process does its work, in words. Cards in trouble do not count, nor does a missing kubelet."""
    limit = max(STALE_S, 3 * inventory.settings.poll_seconds)
    for what, last in (("the last poll ended", inventory.alive_at), ("the event loop ran last", inventory.watched_at)):
        if now - last > limit:
            return False, f"stuck: {what} {now - last:.0f} s ago. {inventory.trouble.problem}".rstrip()
    trouble = inventory.trouble.problem
    return True, f"ok: the last poll ended {max(0.0, now - inventory.alive_at):.1f} s ago" + (trouble and f"; {trouble}")


def ready(snapshot: Snapshot, registrar: Registrar) -> tuple[bool, str]:
    """/readyz: whether there is nothing left to do but wait, in words, a line for each resource."""
    if not snapshot.polled:
        return False, "the first poll has not ended yet"
    if not snapshot.resources:
        return True, "no cards to register: waiting for some to appear"
    if registrar.stay.second:
        return True, registrar.stay.second
    states = dict.fromkeys(snapshot.resources, NOT_YET) | registrar.states()
    lines = [f"{resource}: {f'not registered: {why}' if why else 'registered'}" for resource, why in sorted(states.items())]
    return not any(states.values()), "\n".join(lines)


Sample = tuple[Mapping[str, str], float]
Metric = tuple[str, str, list[Sample]]  # name, what it is, and a value for each set of labels; one named _total is a counter


def exposition(metrics: Iterable[Metric]) -> str:
    """Metrics in Prometheus' text format, version 0.0.4; those without a sample are left out."""
    escape = str.maketrans({"\\": r"\\", '"': r"\"", "\n": r"\n"})
    lines = []
    for name, text, samples in metrics:
        if samples:
            lines += [f"# HELP {name} {text}", f"# TYPE {name} {'counter' if name.endswith('_total') else 'gauge'}"]
        for labels, value in samples:
            inside = ",".join(f'{key}="{label.translate(escape)}"' for key, label in labels.items())
            lines.append(f"{name}{{{inside}}} {float(value)}" if inside else f"{name} {float(value)}")
    return "\n".join([*lines, ""])


def metrics(inventory: Inventory, registrar: Registrar, now: float) -> list[Metric]:
    """What there is to say of cards and chips, a series for each; a reading that cannot be is absent. `now` is
    time.monotonic()."""
    snapshot, pulses, states = inventory.snapshot, inventory.pulses, registrar.states()
    counts = dict(registrar.ledger.counts)
    cards = [({"card": card.id, "resource": card.resource or ""}, card) for card in snapshot.cards]
    by_health = Counter((card.resource, card.verdict.health) for card in snapshot.cards)
    facts: list[Sample] = []
    chips: list[tuple[dict[str, str], Pulse]] = []
    for card in snapshot.cards:
        for chip in card.chips:
            labels = {"card": card.id, "chip": chip.pci}
            pulse = pulses.get(chip.pci)
            here = pulse is not None and pulse.inode == chip.stamp[0]  # else it is gone, and another one may be in its place
            if pulse and here:
                chips.append((labels, pulse))
            fact = {"model": card.model, "arch": chip.arch, "serial": chip.serial, "firmware": chip.firmware}
            facts.append((labels | fact | {"device_node": f"/dev/tenstorrent/{chip.index}" if here else ""}, 1))

    def counted(metric: str, *labels: str) -> list[Sample]:
        return [(dict(zip(labels, key[1:], strict=True)), value) for key, value in counts.items() if key[0] == metric]

    versions = {"version": __version__, "python": sys.version.split()[0], "grpcio": grpc.__version__, "driver": snapshot.driver}
    healths = [(resource, health) for resource in snapshot.resources for health in (HEALTHY, UNHEALTHY)]
    granted: list[Sample] = [({"resource": resource}, counts.get(("allocations", resource), 0)) for resource in states]
    fit: list[Sample] = [(labels, card.verdict.health == HEALTHY and card.resource is not None) for labels, card in cards]
    ages: list[Sample] = [(labels, now - pulse.changed) for labels, pulse in chips if pulse.beat is not None]
    rows: list[Metric] = [
        ("info", "Versions; always 1.", [(versions, 1)]),
        ("registered", "1 while its stream is open.", [({"resource": r}, not why) for r, why in states.items()]),
        ("registrations_total", "By what ended the last one.", counted("registrations", "resource", "cause")),
        ("allocations_total", "Containers that have got cards.", granted),
        ("refusals_total", "Calls refused.", counted("refusals", "resource", "call", "code")),
        ("cards", "Cards offered.", [({"resource": r, "health": h}, by_health[r, h]) for r, h in healths]),
        ("cards_not_offered", "Cards not offered.", [({}, sum(card.resource is None for _, card in cards))]),
        ("card_healthy", "1 if the card is offered and Healthy.", fit),
        ("card_verdict", "Why; always 1.", [(labels | {"kind": card.verdict.kind}, 1) for labels, card in cards]),
        ("chip_info", "Facts of a chip; always 1.", facts),
        ("heartbeat_age_seconds", "Time since the heartbeat was last seen to change.", ages),
        ("junk_readings_total", "Readings that cannot be.", [(labels, pulse.junk) for labels, pulse in chips]),
        ("polls_total", "Looks at all chips.", [({}, inventory.polls)]),
        ("poll_seconds_total", "Time that polls took.", [({}, inventory.polls_s)]),
    ]
    rows = [("tt_device_plugin_" + name, text, samples) for name, text, samples in rows]
    for name, sensor in SENSORS.items():
        fed = [(labels, pulse.readings[name]) for labels, pulse in chips if name in pulse.readings]
        rows.append((sensor.metric, sensor.help, [(labels, value / sensor.scale) for labels, value in fed]))
    return rows


def process_metrics() -> list[Metric]:
    """What Prometheus' client libraries say of their process, by the same names."""
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * getpagesize()
    return [
        ("process_cpu_seconds_total", "CPU time, user and system.", [({}, time.process_time())]),
        ("process_resident_memory_bytes", "Resident memory.", [({}, resident)]),
        ("process_open_fds", "Open file descriptors.", [({}, len(os.listdir("/proc/self/fd")))]),
        ("process_max_fds", "Limit of open file descriptors.", [({}, getrlimit(RLIMIT_NOFILE)[0])]),
        ("process_start_time_seconds", "When the process started, Unix time.", [({}, STARTED)]),
    ]


CONNECTIONS = 16
"""HTTP connections served at once: a kubelet's probes and a few scrapers. One more, and the oldest is closed."""


def listen(address: tuple[str, int], pages: Mapping[str, Callable[[], tuple[bool, str]]]) -> tuple[str, int]:
    """Answers GET of `pages`, path -> (200 or 503, text), in threads of their own. Returns the address. Raises OSError."""
    from http import HTTPStatus
    from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

    class Handler(BaseHTTPRequestHandler):
        server_version, sys_version, timeout = f"tt-device-plugin/{__version__}", "", 5

        def do_GET(self) -> None:
            page, status = pages.get(self.path.partition("?")[0]), HTTPStatus.OK
            try:
                fine, text = page() if page else (False, f"no such page; there are {', '.join(pages)}")
                status = HTTPStatus.NOT_FOUND if not page else status if fine else HTTPStatus.SERVICE_UNAVAILABLE
            except Exception as error:  # a defect of a page must be seen, in the page and in the log
                log.exception("%s failed", self.path)
                status, text = HTTPStatus.INTERNAL_SERVER_ERROR, repr(error)
            body = text.encode() + b"\n" * (not text.endswith("\n"))
            self.send_response(status)
            self.send_header("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        do_HEAD = do_GET

        def log_message(self, format: str, *args: object) -> None:
            log.debug("HTTP %s: " + format, self.address_string(), *args)

    class Server(ThreadingHTTPServer):
        served: ClassVar[deque[socket.socket]] = deque()

        def process_request_thread(self, request: Any, client_address: Any) -> None:
            self.served.append(request)
            if len(self.served) > CONNECTIONS:  # a slow client must not keep the kubelet's probe out
                with contextlib.suppress(OSError):
                    self.served[0].shutdown(socket.SHUT_RDWR)
            try:
                super().process_request_thread(request, client_address)
            finally:
                self.served.remove(request)

        def handle_error(self, request: Any, client_address: Any) -> None:
            log.debug("HTTP %s: %r", client_address, sys.exc_info()[1])

    host, port = address
    everywhere = not host and socket.has_dualstack_ipv6()  # a Pod's address may be of either kind
    kind = socket.AF_INET6 if everywhere or ":" in host else socket.AF_INET
    bound = socket.create_server((host, port), family=kind, dualstack_ipv6=everywhere)
    server = Server(address, Handler, bind_and_activate=False)
    server.socket.close()
    server.socket = bound
    threading.Thread(target=server.serve_forever, name="http", daemon=True).start()
    return cast("tuple[str, int]", bound.getsockname()[:2])


class KeptFile:
    """A file for other tools, kept to what it should say. Written by rename, so that nobody ever reads half of it.

    In a thread of its own: a write that hangs holds up neither polls nor the end of this process.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._said: str | None = None  # what the file says; None: not known yet, a killed instance may have left one
        self._identity: Identity | None = None  # of the file that this process has written
        self._trouble = Trouble()
        self._wanted: queue.Queue[str | None] = queue.Queue(1)  # None: remove it, and end
        self._done = threading.Event()  # with the newest text
        self._thread = threading.Thread(target=self._run, name=path.name, daemon=True)
        self._thread.start()

    def keep(self, text: str) -> None:
        """Makes the file say `text`; "" is no file. To be called at each poll: what fails or takes long is tried again."""
        self._done.clear()
        with contextlib.suppress(queue.Full):  # the last one has not been written yet
            self._wanted.put_nowait(text)
            self._done.wait(0.1)

    def end(self) -> None:
        """Removes the file, if it is ours: another instance may have taken it over. Waits for that for 0.5 s at most."""
        with contextlib.suppress(queue.Full):
            self._wanted.put(None, timeout=0.5)
            self._thread.join(0.5)

    def says(self, text: str) -> bool:
        """Whether the file is the one that this process has written last, with `text` in it."""
        try:
            return text in (self._said or "") and identity_of(self.path) == self._identity
        except OSError:
            return False

    def _run(self) -> None:
        while (text := self._wanted.get()) is not None:
            try:
                self._put(text)
                self._trouble.is_now("", f"{self.path} is kept again")
            except OSError as error:
                self._trouble.is_now(f"cannot keep {self.path}: {error.strerror}; trying again")
            self._done.set()
        with contextlib.suppress(OSError):
            if self._said and self.says(""):
                self.path.unlink()

    def _put(self, text: str) -> None:
        if text == self._said and (not text or self.says("")):
            return
        if text:
            folder = self.path.parent
            if not folder.is_dir():
                folder.mkdir()
                folder.chmod(0o755)
            new = folder / f".{self.path.name}.new"  # not .json: CDI runtimes also read files whose names begin with a dot
            new.write_text(text)
            new.chmod(0o644)
            self._identity = identity_of(new)
            os.replace(new, self.path)
        else:
            self.path.unlink(missing_ok=True)
        self._said = text


CDI_KIND = "tenstorrent.com/card"

CDI_FILE = "tenstorrent.com-card.json"

CDI_VERSION = "0.5.0"
"""The lowest one that has hostPath and names that begin with a digit (CDI SPEC.md); podman 4.3 takes none above."""


def cdi_spec(settings: Settings, snapshot: Snapshot) -> str:
    """The CDI specification of the healthy cards: each by its ID and by the N of each of its chips, and all of them as `all`.

    "" if there is none, as a specification without devices is invalid. Its device nodes are never links: a runtime refuses
    these. So they move with N, and PreStartContainer sees to it that a stored answer does not name two of them.
    """
    devices: dict[str, list[Card]] = {}
    for card in snapshot.cards:
        if card.resource is not None and card.verdict.health == HEALTHY:
            for name in (card.id, *(str(chip.index) for chip in card.chips), "all"):
                devices.setdefault(name, []).append(card)
    if not devices:
        return ""
    spec = {
        "cdiVersion": CDI_VERSION,
        "kind": CDI_KIND,
        "devices": [{"name": name, "containerEdits": cdi_edits(settings, cards)} for name, cards in sorted(devices.items())],
    }
    return json.dumps(spec, indent=2) + "\n"


def cdi_edits(settings: Settings, cards: Sequence[Card]) -> dict[str, Any]:
    """What a runtime has to do to a container that gets `cards`."""
    nodes = [node for card in cards for node in card.device_nodes]
    edits: dict[str, Any] = {
        "deviceNodes": [
            {"path": node, "hostPath": os.devnull if settings.fake else node, "permissions": "rw"} for node in nodes
        ]
    }
    if wants_hugepages(settings, cards):
        edits["mounts"] = [{"hostPath": HUGEPAGES, "containerPath": HUGEPAGES, "options": ["rbind", "rw"]}]
    return edits


LABELS_FILE = "tt-device-plugin"


def node_labels(settings: Settings, snapshot: Snapshot) -> str:
    """Node Feature Discovery's features.d file: facts that change seldom, so no health. "" without cards."""
    labels: dict[str, str] = {}
    for resource in snapshot.resources:
        cards, model = snapshot.of(resource).values(), resource.partition("/")[2]
        labels[f"{model}.count"] = str(len(cards))
        firmware = {chip.firmware for card in cards for chip in card.chips}
        if len(firmware) == 1:
            labels[f"{model}.firmware"] = firmware.pop()
    if labels:
        labels |= {"driver-version": snapshot.driver, "topology": topology(snapshot)}
    # A label's value: at most 63 letters, digits and -_. , with no sign at either end (Kubernetes; others are dropped by NFD).
    clean = {name: re.sub("[^A-Za-z0-9_.-]", "_", value)[:63].strip("-_.") for name, value in labels.items()}
    return "".join(f"{settings.resource_domain}/{name}={value}\n" for name, value in clean.items() if value)


def topology(snapshot: Snapshot) -> str:
    """What the offered cards make up, by tt-metal's names, where their number and places leave no doubt; else ""."""
    cards = [card for card in snapshot.cards if card.resource is not None]
    models = Counter(card.model for card in cards)
    if models == {"n300": 4}:
        return "t3000"  # also called QuietBox: the same four cards and cables
    trays = {card.chips[0].tray for card in cards}
    return "galaxy" if len(models) == 1 and len(cards) == len(trays) == 32 and None not in trays else ""


# ======================================================================================================================
# 7. Command line and main
# ======================================================================================================================

ENVIRONMENT = "TT_DEVICE_PLUGIN_"

FAKE_CARDS = {
    "n150": ("n150", 0x401E, 0x18),
    "n300": ("n300", 0x401E, 0x14),
    "galaxy-wormhole": ("galaxy-wormhole", 0x401E, 0x35),
    "p100": ("p100a", 0xB140, 0x43),
    "p150": ("p150a", 0xB140, 0x40),
    "p300": ("p300a", 0xB140, 0x45),
    "galaxy-blackhole": ("galaxy-blackhole", 0xB140, 0x47),
}
"""Model -> tt_card_type, PCI device id, product code in the board's serial (tt-kmd telemetry.c)."""

FAKE_TRAYS = {"galaxy-wormhole": (0xC0, 0x80, 0x00, 0x40), "galaxy-blackhole": (0x00, 0x40, 0xC0, 0x80)}
"""Galaxy -> the bus numbers at which its trays 1 to 4 begin (tt-smi constants.py)."""

FAKE_CHIPS = 200


def fake_spec(text: str) -> dict[str, int]:
    """n150=2,p300=1 as a dict. Raises argparse.ArgumentTypeError."""
    cards: dict[str, int] = {}
    for part in text.split(","):
        model, _, count = part.strip().partition("=")
        if model not in FAKE_CARDS or not (amount := number(count)) or model in cards:
            raise argparse.ArgumentTypeError(
                f"{part!r} is not MODEL=COUNT, with each MODEL once, of {', '.join(FAKE_CARDS)}, and COUNT from 1 on"
            )
        cards[model] = amount
    if sum(count * (2 if model == "p300" else 1) for model, count in cards.items()) > FAKE_CHIPS:
        raise argparse.ArgumentTypeError(f"{text!r} makes more than {FAKE_CHIPS} chips")
    return cards


def make_fake_tree(top: Path, cards: Mapping[str, int]) -> None:
    """Lays out in `top` the folders sys and dev as tt-kmd would for `cards`, with /dev/null as every device node."""
    for path in ("sys/module/tenstorrent", "sys/class/tenstorrent", "sys/bus/pci/devices", "dev/tenstorrent"):
        (top / path).mkdir(parents=True)
    (top / "sys/module/tenstorrent/version").write_text("2.10.0\n")
    null = os.stat(os.devnull).st_rdev
    boards = [(model, board) for model, count in cards.items() for board in range(count)]
    chips = [(model, board, chip) for model, board in boards for chip in range(2 if model == "p300" else 1)]
    for index, (model, board, chip) in enumerate(chips):
        card_type, device_id, product = FAKE_CARDS[model]
        bus = index + 1
        if trays := FAKE_TRAYS.get(model):  # four trays of eight, positions 1 to 8; a PCI domain for each Galaxy
            bus = (board // 32 + 1 << 8) + trays[board // 8 % 4] + board % 8 + 1
        pci = f"{bus >> 8:04x}:{bus & 0xFF:02x}:00.0"
        device = top / f"sys/devices/pci{pci[:7]}/{pci}"
        entry = device / f"tenstorrent/tenstorrent!{index}"
        entry.mkdir(parents=True)
        for link, target in (
            (entry / "device", "../.."),
            (top / f"sys/class/tenstorrent/tenstorrent!{index}", f"../../devices/pci{pci[:7]}/{pci}/tenstorrent/{entry.name}"),
            (top / f"sys/bus/pci/devices/{pci}", f"../../../devices/pci{pci[:7]}/{pci}"),
            (top / f"dev/tenstorrent/{index}", os.devnull),
        ):
            link.symlink_to(target)
        for file, value in (
            (device / "vendor", VENDOR),
            (device / "device", f"{device_id:#06x}"),
            (device / "numa_node", "-1"),
            (entry / "dev", f"{os.major(null)}:{os.minor(null)}"),
            (entry / "tt_card_type", card_type),
            (entry / "tt_asic_id", f"{0xFA4E << 48 | product << 32 | board << 8 | chip:016X}"),
            (entry / "tt_serial", f"{product << 36 | 0xFA4E0000 | board + 1:016X}"),
            (entry / "tt_fw_bundle_ver", "19.5.0.0"),
        ):
            file.write_text(value + "\n")


def make_parser() -> argparse.ArgumentParser:
    """The flags."""
    parser = argparse.ArgumentParser(
        prog="tt-device-plugin",
        description="Kubernetes device plugin for Tenstorrent cards. Without --list or --dry-run it serves until SIGTERM.",
        epilog=f"Every flag can be set by an environment variable: --kubelet-dir is {ENVIRONMENT}KUBELET_DIR, a flag without "
        "a value takes true or false there. Exit codes: 0 told to stop, 1 cannot work, 2 usage.",
        allow_abbrev=False,
        exit_on_error=False,
    )
    add = parser.add_argument
    default = Settings()
    add("--list", action="store_true", help="print what would be advertised, and what would not and why")
    add("--json", action="store_true", help="with --list: as JSON")
    add("--dry-run", action="store_true", help="walk through the five steps with an embedded kubelet, on this node's cards")
    add("--fake", type=fake_spec, metavar="MODEL=N[,...]", help="made-up cards instead of this node's: n150=2,p300=1")
    add("--kubelet-dir", type=folder, default=default.kubelet_dir, metavar="DIR", help="default: %(default)s")
    add("--sysfs-root", type=folder, default=default.sysfs_root, metavar="DIR", help="where sysfs is; default: %(default)s")
    add("--dev-root", type=folder, default=default.dev_root, metavar="DIR", help="the host's /dev; default: %(default)s")
    add("--poll-seconds", type=poll_seconds, default=default.poll_seconds, metavar="S", help="from 0.1 to 60; default: 1")
    add("--resource-domain", type=domain, default=default.resource_domain, metavar="D", help="default: %(default)s")
    add("--variants", action="store_true", help="keep the variant letter: p150a, p150b and p150c are otherwise all p150")
    add("--hugepages", choices=["auto", "always", "never"], default="auto", help="mount the host's 1 GiB pages; default: auto")
    add("--cdi-dir", type=folder, metavar="DIR", help=f"keep a CDI specification there, {CDI_FILE}; usual: /var/run/cdi")
    add("--labels-dir", type=folder, metavar="DIR", help="keep a file of node labels there for Node Feature Discovery")
    add("--listen", type=address, metavar="ADDR:PORT", help="answer HTTP: /healthz, /readyz, /metrics; :PORT for all addresses")
    add("--log-format", choices=["text", "json"], default="text", help="default: text")
    add("--log-level", choices=["debug", "info", "warning", "error"], default="info", help="default: info")
    versions = f"tt-device-plugin {__version__} (Python {sys.version.split()[0]}, grpcio {grpc.__version__}, "
    add("--version", action="version", version=versions + f"protobuf {google.protobuf.__version__})")
    return parser


def folder(text: str) -> Path:
    """An absolute path. Raises argparse.ArgumentTypeError."""
    if not text.startswith("/") or "\0" in text:
        raise argparse.ArgumentTypeError(f"{text!r} is not an absolute path")
    return Path(text)


def address(text: str) -> tuple[str, int]:
    """Where to listen: an IP address, "" for all, and a port, 0 for any. Raises argparse.ArgumentTypeError."""
    import ipaddress

    with contextlib.suppress(ValueError):
        parts = urllib.parse.urlsplit(f"//{text}")
        host = str(ipaddress.ip_address(parts.hostname)) if parts.hostname else ""
        if parts.netloc == text and parts.port is not None and "@" not in text:
            return host, parts.port
    raise argparse.ArgumentTypeError(f"{text!r} is not ADDRESS:PORT, such as 127.0.0.1:7762, [::1]:7762, or :7762 for all")


def poll_seconds(text: str) -> float:
    """Seconds between polls. Raises argparse.ArgumentTypeError."""
    with contextlib.suppress(ValueError):
        if 0.1 <= (seconds := float(text)) <= 60:
            return seconds
    raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds from 0.1 to 60")


def domain(text: str) -> str:
    """The part of a resource's name before the slash, a DNS subdomain. Raises argparse.ArgumentTypeError."""
    label = "[a-z0-9]([-a-z0-9]*[a-z0-9])?"
    reserved = text == "kubernetes.io" or text.endswith(".kubernetes.io") or text.startswith("requests.")
    if len(text) > 253 or not re.fullmatch(rf"{label}(\.{label})*", text) or reserved:
        raise argparse.ArgumentTypeError(f"{text!r} is not a DNS name that resources may have, such as tenstorrent.com")
    return text


def parse(argv: Sequence[str], environment: Mapping[str, str]) -> argparse.Namespace:
    """The flags of `argv`, and below them those of the environment. Exits with code 2 and a sentence if one is wrong."""
    parser = make_parser()
    given: list[str] = []
    for name, default in vars(parser.parse_args([])).items():
        flag, variable = "--" + name.replace("_", "-"), ENVIRONMENT + name.upper()
        value = environment.get(variable, "")
        if default is False and value.lower() in ("false", "0", "no"):
            continue
        if default is False and value and value.lower() not in ("true", "1", "yes"):
            parser.error(f"environment variable {variable}: {value!r} is neither true nor false")
        if value:
            given.append(flag if default is False else f"{flag}={value}")
            try:
                parser.parse_args(given[-1:])
            except argparse.ArgumentError as error:
                parser.error(f"environment variable {variable}: {error.message}")
    try:
        options = parser.parse_args([*given, *argv])
    except argparse.ArgumentError as error:
        parser.error(str(error))
    if options.json and not options.list:
        parser.error("--json goes with --list")
    if options.list and options.dry_run:
        parser.error("--list and --dry-run exclude each other")
    longest = options.kubelet_dir / "device-plugins" / SOCKET.format(model=max(FAKE_CARDS, key=len), token="0" * 6)
    if len(os.fsencode(longest)) > SOCKET_PATH_BYTES:
        excess = len(os.fsencode(longest)) - SOCKET_PATH_BYTES
        parser.error(f"--kubelet-dir {options.kubelet_dir} is {excess} bytes too long for the paths of sockets in it")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """The program. Returns its exit code; raises SystemExit(2) for wrong flags."""
    # As PID 1 of a container a process without a handler ignores SIGTERM.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    options = parse(sys.argv[1:] if argv is None else argv, os.environ)
    set_up_logging(options.log_format, options.log_level)
    names = {each.name for each in dataclasses.fields(Settings)}
    settings = Settings(**{name: value for name, value in vars(options).items() if name in names and name != "fake"})
    with contextlib.ExitStack() as stack:
        try:
            if options.fake:
                top = Path(stack.enter_context(temporary_folder("tt-device-plugin-fake-")))
                make_fake_tree(top, options.fake)
                settings = replace(settings, sysfs_root=top / "sys", dev_root=top / "dev", fake=True)
            if options.list:
                print_list(asyncio.run(take_stock(settings)), options.json)
                return 0
            if options.dry_run:
                kubelet_dir = Path(stack.enter_context(temporary_folder("tt-dry-run-")))
                alone = replace(settings, kubelet_dir=kubelet_dir, cdi_dir=None, labels_dir=None, listen=None)
                return asyncio.run(dry_run(alone))
            if options.fake:
                log.info("made-up cards in %s: remove a tenstorrent!N in sys/class/tenstorrent to see one vanish", top)
            return asyncio.run(serve(settings))
        except CannotWork as error:
            log.error("%s", error)
            return 1


@contextlib.contextmanager
def temporary_folder(prefix: str) -> Iterator[str]:
    """A folder that is gone afterwards. Raises CannotWork."""
    import shutil
    import tempfile

    try:
        path = tempfile.mkdtemp(prefix=prefix)
    except OSError as error:
        raise CannotWork(f"cannot make a temporary folder: {error}; set TMPDIR to a folder that can be written") from error
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


async def serve(settings: Settings, stop: asyncio.Event | None = None) -> int:
    """Serves until SIGTERM, SIGINT or `stop`. Raises CannotWork."""
    if problem := no_access(settings.plugin_dir):
        raise CannotWork(problem)
    loop = asyncio.get_running_loop()
    stop = stop or asyncio.Event()
    for each in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(each, stop.set)
    bell = Bell()
    cdi = KeptFile(settings.cdi_dir / CDI_FILE) if settings.cdi_dir else None
    labels = KeptFile(settings.labels_dir / LABELS_FILE) if settings.labels_dir else None
    contents = {file: make for file, make in ((cdi, cdi_spec), (labels, node_labels)) if file is not None}
    texts: dict[KeptFile, str] = {}

    def polled(old: Snapshot, new: Snapshot) -> None:
        changed = new.cards != old.cards or not old.polled
        if not old.polled:
            introduce(settings, new)
        if changed:
            texts.update({file: make(settings, new) for file, make in contents.items()})
        if not registrar.stay.second:  # two instances would overwrite each other's files
            for file, text in texts.items():
                file.keep(text)
        if changed:
            with contextlib.suppress(RuntimeError):  # the loop is closed: the process is ending
                loop.call_soon_threadsafe(bell.ring)
            report(old, new)

    inventory = Inventory(settings, polled)
    registrar = Registrar(settings, inventory, bell)
    registrar.ledger.cdi = cdi
    registrar.stay.look()
    os.umask(0o077)  # sockets for root alone: the folder may be open to more
    inventory.start()
    tasks = [asyncio.create_task(each) for each in (registrar.run(), inventory.watch(), open_pages(inventory, registrar))]
    stopped = asyncio.create_task(stop.wait())
    await asyncio.wait([*tasks, stopped], return_when=asyncio.FIRST_COMPLETED)
    await end(tasks)
    for task in tasks:  # none of them returns by itself: what ended it is a defect, and must be seen
        if not task.cancelled():
            task.result()
    inventory.stop()
    for file in texts:
        file.end()
    log.info("told to stop, and done")
    return 0


def introduce(settings: Settings, snapshot: Snapshot) -> None:
    """The first line of the log: what runs, where, and what it has found."""
    cards = Counter(card.model or "of unknown model" for card in snapshot.cards)
    log.info(
        "tt-device-plugin %s, Python %s, grpcio %s, driver %s; kubelet folder %s, sysfs %s, dev %s; cards: %s",
        *(__version__, sys.version.split()[0], grpc.__version__, snapshot.driver or "not loaded"),
        *(settings.plugin_dir, settings.sysfs_root, settings.dev_root),
        ", ".join(f"{count} {model}" for model, count in sorted(cards.items())) or "none",
    )


async def open_pages(inventory: Inventory, registrar: Registrar) -> None:
    """Opens the HTTP pages, if they are wanted. Trying again if the port is taken: the instance before may still have it."""
    pages = {
        "/healthz": lambda: alive(inventory, time.monotonic()),
        "/readyz": lambda: ready(inventory.snapshot, registrar),
        "/metrics": lambda: (True, exposition(metrics(inventory, registrar, time.monotonic()) + process_metrics())),
    }
    wanted, trouble = inventory.settings.listen, Trouble()
    while wanted is not None:
        try:
            host, port = listen(wanted, pages)
        except OSError as error:
            trouble.is_now(f"no HTTP on port {wanted[1]} of {wanted[0] or 'all addresses'}: {error.strerror}; trying again")
            await asyncio.sleep(1)
        else:
            log.info("HTTP on port %d of %s: %s", port, host, ", ".join(pages))
            break
    await asyncio.Event().wait()


async def take_stock(settings: Settings) -> Snapshot:
    """The snapshot of one poll; a read that hangs costs about 2 s. Raises CannotWork."""
    inventory = Inventory(settings)
    inventory.start()
    watchdog = asyncio.create_task(inventory.watch())
    try:
        while not inventory.snapshot.polled:
            if inventory.trouble.problem:
                raise CannotWork(inventory.trouble.problem)
            await asyncio.sleep(0.005)
    finally:
        inventory.stop()
        await end([watchdog])
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
    """Prints the cards of a snapshot: JSON, or columns as wide as the terminal, with the reasons below.

    From 80 to 120 characters; columns that do not fit are left out, the least useful first (--json has them all).
    """
    cards = [describe(card) for card in snapshot.cards]
    if as_json:
        print(json.dumps(cards, indent=2))
        return
    if not cards:
        print("No Tenstorrent cards" + (f" (driver {snapshot.driver})." if snapshot.driver else ": the driver is not loaded."))
        return
    from shutil import get_terminal_size

    room = min(120, max(80, get_terminal_size((120, 0)).columns))
    table = {
        "RESOURCE": [card["resource"] or "not offered" for card in cards],
        "ID": [card["id"] for card in cards],
        "DEVICE": [",".join(path.removeprefix("/dev/tenstorrent/") for path in card["device_nodes"]) for card in cards],
        "PCI ADDRESS": [",".join(card["pci_addresses"]) for card in cards],
        "NUMA": ["-" if card["numa_node"] is None else str(card["numa_node"]) for card in cards],
        "HEALTH": [card["health"] for card in cards],
    }
    widths = {heading: max(map(len, [heading, *cells])) for heading, cells in table.items()}
    for heading in ("NUMA", "PCI ADDRESS"):
        if sum(widths.values()) + 2 * (len(widths) - 1) > room:
            del widths[heading]
    coloured = on_terminal(sys.stdout)
    for row in range(-1, len(cards)):
        cells = [(heading if row < 0 else table[heading][row]).ljust(width) for heading, width in widths.items()]
        print("  ".join([*cells[:-1], paint(cells[-1].rstrip(), coloured)]))
    for card in cards:
        if card["reason"]:
            print("\n" + textwrap.fill(f"{card['id']}: {card['reason']}", room))


class DryRunKubelet(rpc.RegistrationServicer):
    """A kubelet that keeps the first Register request of each resource."""

    def __init__(self) -> None:
        self.requests: asyncio.Queue[api.RegisterRequest] = asyncio.Queue()
        self.known: set[str] = set()

    async def Register(self, request: api.RegisterRequest, context: Context) -> api.Empty:
        """Takes any registration."""
        if request.resource_name not in self.known:
            self.known.add(request.resource_name)
            await self.requests.put(request)
        return api.Empty()


async def dry_run(settings: Settings) -> int:
    """Plays the kubelet for the real plugin in settings.kubelet_dir, and prints README's five steps as they happen.

    Returns 0 if every step held, else 1, with the failing step printed.
    """
    logging.getLogger("tt-device-plugin").setLevel(logging.ERROR)  # the steps tell the story
    stop = asyncio.Event()
    settings.plugin_dir.mkdir()
    server, kubelet = grpc.aio.server(), DryRunKubelet()
    rpc.add_RegistrationServicer_to_server(kubelet, server)
    plugin = None
    try:
        step = "0. the embedded kubelet"
        server.add_insecure_port(unix_target(settings.plugin_dir / "kubelet.sock"))
        await server.start()
        step = say("1. Discover", f"the cards under {settings.sysfs_root}")
        snapshot = await take_stock(settings)
        print_list(snapshot, False)
        if not snapshot.resources:
            raise CannotWork("no card could be offered")
        plugin = asyncio.create_task(serve(settings, stop))
        for _ in snapshot.resources:
            step = say("2. Register", "the plugin calls the kubelet")
            request = await asyncio.wait_for(kubelet.requests.get(), STREAM_S)
            print(one_line(request))
            async with grpc.aio.insecure_channel(unix_target(settings.plugin_dir / request.endpoint)) as channel:
                async for began in dry_run_resource(rpc.DevicePluginStub(channel), request):
                    step = began
    except (CannotWork, grpc.aio.AioRpcError, asyncio.TimeoutError, RuntimeError) as error:
        problem = f"{error.code().name}: {error.details()}" if isinstance(error, grpc.aio.AioRpcError) else str(error)
        print(f"\nFAILED: step {step}: {problem or 'no answer in time'}")
        return 1
    finally:
        stop.set()
        if plugin is not None:
            await plugin
        await server.stop(None)
    print("\nEvery step held.")
    return 0


async def dry_run_resource(plugin: Any, request: api.RegisterRequest) -> AsyncIterator[str]:
    """Steps 3 to 5 of one resource; gives each step's name as it begins. Raises CannotWork, AioRpcError."""
    yield say("3. ListAndWatch", f"the kubelet calls {request.endpoint}, and keeps the stream open")
    options = await plugin.GetDevicePluginOptions(api.Empty(), timeout=STREAM_S)
    if options != request.options:
        raise CannotWork(f"Register announced {one_line(request.options)}, GetDevicePluginOptions {one_line(options)}")
    stream = plugin.ListAndWatch(api.Empty())
    devices = (await asyncio.wait_for(stream.read(), STREAM_S)).devices
    print("\n".join(map(one_line, devices)))
    healthy = [device.ID for device in devices if device.health == HEALTHY]
    if not healthy:
        raise CannotWork(f"no card of {request.resource_name} is healthy: a Pod that asks for one would stay Pending")
    for card_id in healthy:
        yield say("4. Allocate", f"a Pod that asks for one {request.resource_name} could get {card_id}:")
        one = api.ContainerAllocateRequest(devices_ids=[card_id])
        answer = await plugin.Allocate(api.AllocateRequest(container_requests=[one]), timeout=STREAM_S)
        for got in answer.container_responses:
            for device in got.devices:
                print(f"device {device.container_path} from {device.host_path} ({device.permissions})")
            for name, value in got.envs.items():
                print(f"env    {name}={value}")
            for mount in got.mounts:
                print(f"mount  {mount.container_path} from {mount.host_path}")
        yield say("5. PreStartContainer", f"{card_id} is still there and healthy")
        await plugin.PreStartContainer(api.PreStartContainerRequest(devices_ids=[card_id]), timeout=STREAM_S)
    stream.cancel()


def say(step: str, what: str) -> str:
    """Prints the heading of a step, and gives back its name."""
    print(f"\n{step}: {what}", flush=True)
    return step


def one_line(message: Any) -> str:
    """A protobuf message for people."""
    return " ".join(str(message).split())


if __name__ == "__main__":
    sys.exit(main())
