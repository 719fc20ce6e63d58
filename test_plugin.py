"""What the Tenstorrent device plugin promises, a test for each promise.

The tests stand in the order of tt_device_plugin.py, then what is packed, then what
README and the manifest say. tools/harness.py runs the plugin on made-up chips. The
kubelet that it meets is tools/fake_kubelet.py.

Names that occur throughout (the fixtures and helpers are in tools/harness.py):

N                   of /dev/tenstorrent/N: a chip's number, which a reset can change
kind                why a card has its health, such as `gone`: see README's "Health"
"+", "-", "?"       before a kind: Healthy, Unhealthy, not offered (see summary())
kubelet contract 5  what real kubelets do: point 5 in fake_kubelet.py's docstring
tt-kmd#112          an issue of the driver, github.com/tenstorrent/tt-kmd

FIRST .. FOURTH     four n150, a chip each; IDS are their cards' IDs
P300, P300_ID       the two chips of a p300, and its card's ID
R150, R300          the resources tenstorrent.com/n150 and tenstorrent.com/n300
tree, four          a made-up sysfs and /dev: without chips, with FIRST to FOURTH
tree.still          PCI addresses of chips whose heartbeat does not change
tree.hang, release  from now on reads of a file hang; they return
plugin              one that runs on `four` and is registered with `kubelet`
launch(...)         starts a plugin; offers=4: returns once the kubelet has 4 n150;
                    launch(None, ...): on no tree, for the flag --fake
wait_status(...)    waits until the node has so many cards of a resource as capacity,
                    and so many of them allocatable
log.mark(), after=  a position in what a process has said: only what follows counts
both_generations    runs a test with a kubelet of 1.36, and with one of 1.20
refused(code, ...)  the call inside is refused with this gRPC status and these words
bound(what, seconds, promised)
                    a promised time; on a busy machine a slow one is reported only
long_only           runs with ./build.sh test --long
@rows               a table of cases. The first column is the test's ID, columns are
                    two spaces or more apart, a backslash continues a line, and "..."
                    at the start of an ID means "as above, and"
"""

from __future__ import annotations

import asyncio
import base64
import calendar
import contextlib
import errno
import functools
import hashlib
import http.client
import itertools
import json
import logging
import operator
import os
import platform
import random
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from http import HTTPStatus
from pathlib import Path
from resource import RLIMIT_NOFILE, prlimit
from typing import Any, NamedTuple

import grpc.aio
import hypothesis
import kubernetes_validate  # type: ignore[import-untyped]
import pytest
import yaml
from google.protobuf import descriptor_pb2
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

import api_pb2 as api
import api_pb2_grpc as rpc
import tt_device_plugin as tt

sys.path.insert(0, str(Path(__file__).resolve().with_name("tools")))
pytest.register_assert_rewrite("harness")  # before it is imported

from fake_kubelet import LOCAL, Fault  # noqa: E402
from harness import (  # noqa: E402
    COMMAND,
    FIRST,
    FOURTH,
    HERE,
    IDS,
    LONG,
    N150,
    P300,
    P300_ID,
    R150,
    R300,
    SECOND,
    THIRD,
    Bound,
    Chip,
    Event,
    Finished,
    Kubelet,
    Launch,
    Plugin,
    Puppets,
    Tree,
    both_generations,
    device,
    environment,
    event_is,
    finish,
    long_only,
    refused,
    relink,
    rows,
    run,
    wait_until,
)

pytest_plugins = ["harness"]  # its fixtures, and the summary of promised times

README = (HERE / "README.md").read_text()
FAST = "--poll-seconds=0.1"
HTTP = "--listen=127.0.0.1:0"
# Links lead a device node to one of them, where chips must not look alike.
DEVICES = ("/dev/null", "/dev/zero")


def nothing(*_: object) -> None:
    """A callback that does nothing."""


def inventory_of(tree: Tree) -> tt.Inventory:
    """The plugin's inventory of this tree."""
    return tt.Inventory(tt.Settings(sysfs_root=tree.sys, dev_root=tree.dev))


def summary(snapshot: tt.Snapshot) -> str:
    """Each card's resource, ID and N, and its health's mark with its verdict's kind.

    Marks are "+" for Healthy, "-" for Unhealthy and "?" for not offered. Sixteen equal
    digits of an ASIC id are shortened to one, the ID of the p300 to P300.
    """
    marks = {"Healthy": "+", "Unhealthy": "-", "pending": "?"}
    cards = []
    for card in snapshot.cards:
        model = (card.resource or "-").rpartition("/")[2]
        nodes = [path.removeprefix("/dev/tenstorrent/") for path in card.device_nodes]
        kind = f"{marks[card.verdict.health]}{card.verdict.kind}"
        cards.append(f"{model} {card.id} {','.join(nodes)} {kind}")
    text = ", ".join(cards).replace(P300_ID, "P300")
    return re.sub(r"([0-9A-F])\1{15}", r"\1", text)


# ==== Section 3. The DevicePlugin service: five calls, answered from the snapshot =====

OPTIONS = {"pre_start_required": True, "get_preferred_allocation_available": True}


# NUMA nodes of a healthy card, and of an unhealthy one; []: not known.
@pytest.mark.parametrize(
    ("healthy", "unhealthy"), [([0], [1]), ([1], [0, 1]), ([0], []), ([], [])]
)
def test_device_list(healthy: list[int], unhealthy: list[int]) -> None:
    """The whole list of a resource, each card with its health.

    NUMA nodes are there if all the resource's cards have some (kubelet contract 7).
    """
    cards = []
    wanted = []
    for health, nodes in (("Healthy", healthy), ("Unhealthy", unhealthy)):
        known: list[int | None] = [*nodes]
        chips = [tt.Chip("0000:01:00.0", numa_node=node) for node in known or [None]]
        verdict = tt.Verdict(health, "ok", "")
        cards.append(tt.Card(health, "n150", R150, tuple(chips), verdict))
        wanted.append(api.Device(ID=health, health=health))
        if healthy and unhealthy:
            topology = api.TopologyInfo(nodes=[api.NUMANode(ID=node) for node in nodes])
            wanted[-1].topology.CopyFrom(topology)
    others = [replace(cards[0], id="other", resource=name) for name in (R300, None)]
    listed = tt.device_list(tt.Snapshot((*cards, *others)), R150)
    assert listed == api.ListAndWatchResponse(devices=wanted)


def test_container_response(tmp_path: Path) -> None:
    """Device nodes and a variable of the resource's own, and nothing that is shared."""
    chips = [tt.Chip("0000:01:00.0", 0), tt.Chip("0000:02:00.0", 5)]
    settings = tt.Settings(dev_root=tmp_path)
    answer = tt.container_response(settings, "a-b.org/c.d", chips, ["/x", "/y"])
    assert answer == api.ContainerAllocateResponse(
        envs={"PCIDEVICE_A_B_ORG_C_D": "0000:01:00.0,0000:02:00.0"},
        devices=[
            api.DeviceSpec(
                container_path="/dev/tenstorrent/0", host_path="/x", permissions="rw"
            ),
            api.DeviceSpec(
                container_path="/dev/tenstorrent/5", host_path="/y", permissions="rw"
            ),
        ],
    )


@rows(
    "flag, folder, mounted",
    """
    by the flag             always  no   yes
    ... whatever is there   never   yes  no
    a host without          auto    no   no
    a folder, not a mount   auto    yes  no
    """,
)
def test_huge_pages(tmp_path: Path, flag: str, folder: str, mounted: str) -> None:
    """The host's 1 GiB pages by the flag; else not from a plain folder."""
    if folder == "yes":
        (tmp_path / "hugepages-1G").mkdir()
    chips = [tt.Chip("", iommu="identity")]
    settings = tt.Settings(dev_root=tmp_path, hugepages=flag)
    answer = tt.container_response(settings, R150, chips, ["/x"])
    mount = api.Mount(container_path="/dev/hugepages-1G", host_path="/dev/hugepages-1G")
    assert [*answer.mounts] == [mount] * (mounted == "yes")


def test_huge_pages_come_from_a_mount_point(tree: Tree) -> None:
    """For a card of which a chip is not behind a DMA IOMMU domain."""
    needs_namespace("mount")
    pages = tree.dev / "hugepages-1G"
    pages.mkdir()
    tree.add(FIRST)
    tree.add(replace(SECOND, iommu=""))
    for chip, iommu in zip(P300, ("DMA", "identity"), strict=True):
        tree.add(replace(chip, index=chip.index + 2, iommu=iommu))

    words = ["unshare", "--mount", "sh", "-ec", 'mount -t tmpfs x "$0"; exec "$@"']
    done = run([*words, str(pages), *COMMAND, *tree.flags, "--dry-run"])
    assert done.returncode == 0, done.stdout
    given = set()
    for step in done.stdout.split("\n\n"):
        if "mount /dev/hugepages-1G" in step:
            given.update(re.findall("could get (.*):", step))
    assert given == {SECOND.id, P300_ID}


# Cards of each container, by their N where they are numbers; how the call is refused.
REFUSED_CALLS = [
    (
        [["0"], ["x" * 999]],
        "NOT_FOUND",
        f"no card '{'x' * 80}' of {R150} on this node",
    ),
    ([[]], "INVALID_ARGUMENT", f"no card IDs of {R150} in the request"),
    ([["0"], []], "INVALID_ARGUMENT", f"no card IDs of {R150} in the request"),
    (
        [["1"], ["1"]],
        "INVALID_ARGUMENT",
        f"the card ID '{IDS[1]}' of {R150} is named twice",
    ),
]


def allocate_request(containers: list[list[str]]) -> Event:
    """An AllocateRequest for these cards."""
    requests = []
    for words in containers:
        ids = [IDS[int(word)] if word.isdigit() else word for word in words]
        requests.append({"devices_ids": ids})
    return {"container_requests": requests}


@both_generations
def test_allocate_answers_each_container(kubelet: Kubelet, plugin: Plugin) -> None:
    """Its cards' device nodes in the order of N, however the IDs are ordered."""
    for containers, expected in (
        ([["3", "0", "1"]], [["0", "1", "3"]]),
        ([["2"], ["1", "0"]], [["2"], ["0", "1"]]),
    ):
        request = allocate_request(containers)
        shown = []
        for one in kubelet.rpc(R150, "Allocate", request)["container_responses"]:
            paths = [device["host_path"] for device in one["devices"]]
            shown.append([path.removeprefix("/dev/tenstorrent/") for path in paths])
        assert shown == expected


@pytest.mark.parametrize(("containers", "code", "sentence"), REFUSED_CALLS)
def test_allocate_is_refused_as_a_whole(
    kubelet: Kubelet,
    plugin: Plugin,
    containers: list[list[str]],
    code: str,
    sentence: str,
) -> None:
    """By a status with a sentence, and the next call is answered."""
    with refused(code, sentence):
        kubelet.rpc(R150, "Allocate", allocate_request(containers))
    assert kubelet.allocate(R150, IDS)["devices"]


def test_allocate_names_no_cdi_device(
    kubelet: Kubelet, four: Tree, launch: Launch, tmp_path: Path
) -> None:
    """The CDI file is for podman and docker: its names follow N, and cards move."""
    launch(four, kubelet, f"--cdi-dir={tmp_path}", offers=4)
    wait_until((tmp_path / CDI).exists)
    assert kubelet.allocate(R150, IDS)["cdi_devices"] == []


@both_generations
def test_get_preferred_allocation(kubelet: Kubelet, plugin: Plugin) -> None:
    """What is preferred, or a refusal."""
    request = {
        "available_deviceIDs": IDS,
        "must_include_deviceIDs": [SECOND.id],
        "allocation_size": 2,
    }
    answer = kubelet.rpc(
        R150, "GetPreferredAllocation", {"container_requests": [request]}
    )
    (preferred,) = answer["container_responses"]
    assert preferred["deviceIDs"] == [SECOND.id, FIRST.id]
    request["available_deviceIDs"] = [SECOND.id]
    with refused("INVALID_ARGUMENT", "cannot choose 2 of 1"):
        kubelet.rpc(R150, "GetPreferredAllocation", {"container_requests": [request]})


@both_generations
def test_calls_are_counted(kubelet: Kubelet, four: Tree, launch: Launch) -> None:
    """Containers by resource, and refusals by call and status, too."""
    plugin = launch(four, kubelet, HTTP, offers=4)
    kubelet.rpc(R150, "Allocate", allocate_request([["0"], ["1", "2"]]))
    kubelet.allocate(R150, IDS)
    with refused("NOT_FOUND"):
        kubelet.allocate(R150, ["nobody"])
    for _ in range(2):
        with refused("INVALID_ARGUMENT"):
            kubelet.rpc(R150, "GetPreferredAllocation", {"container_requests": [{}]})
    _, page = fetch(plugin, "/metrics")
    refusals = "refusals_total call={} code={} resource={} {}"
    assert {
        f"allocations_total resource={R150} 3",
        refusals.format("Allocate", "NOT_FOUND", R150, 1),
        refusals.format("GetPreferredAllocation", "INVALID_ARGUMENT", R150, 2),
    } <= {*samples(page)}


@both_generations
def test_options(kubelet: Kubelet, plugin: Plugin) -> None:
    """They are in the request and in the answer (kubelet contract 3)."""
    assert kubelet.rpc(R150, "GetDevicePluginOptions", {}) == OPTIONS
    options = kubelet.last("register")["options"]
    assert {name: options[name] for name in OPTIONS} == OPTIONS


@rows(
    "link, target, host_path",
    """
    it leads to the chip     by-id/ID  ../0  /dev/tenstorrent/by-id/ID
    it leads to another one  by-id/ID  ../1  /dev/tenstorrent/0
    it leads nowhere         by-id/ID  ../7  /dev/tenstorrent/0
    """,
)
def test_host_paths(
    kubelet: Kubelet,
    tree: Tree,
    launch: Launch,
    link: str,
    target: str,
    host_path: str,
) -> None:
    """A link of udev's is preferred where it leads to the chip."""
    chip = replace(FIRST, by_id=True)
    tree.add(chip)
    tree.add(replace(SECOND, target=DEVICES[1]))
    launch(tree, kubelet, "--poll-seconds=60", offers=2)
    relink(tree.dev / "tenstorrent" / link.replace("ID", chip.id), target)
    (device,) = kubelet.allocate(R150, [chip.id])["devices"]
    assert device["container_path"] == "/dev/tenstorrent/0"
    assert device["host_path"] == host_path.replace("ID", chip.id)


def use_another_device(tree: Tree) -> str:
    """The device node is replaced: the words of the refusal."""
    relink(tree.node(FIRST.pci), "/dev/zero")
    return "/dev/tenstorrent/0 is missing, or is not the device that sysfs names"


def unplug(tree: Tree) -> str:
    """The chip goes."""
    tree.remove(FIRST.pci)
    return f"/dev/tenstorrent/0 is no longer chip {FIRST.pci}"


def swap(tree: Tree) -> str:
    """Another chip has its N: only sysfs tells, as a device number goes with N."""
    tree.remove(FIRST.pci)
    tree.add(replace(tree.remove(SECOND.pci), index=0, target=FIRST.target))
    return f"/dev/tenstorrent/0 is no longer chip {FIRST.pci}"


def reset(tree: Tree) -> str:
    """It has another class device under the same N."""
    probe_anew(tree, FIRST.pci)
    return f"/dev/tenstorrent/0 is no longer chip {FIRST.pci}"


@pytest.mark.parametrize("happen", [use_another_device, unplug, swap, reset])
def test_a_pod_gets_no_other_card(
    kubelet: Kubelet, tree: Tree, launch: Launch, happen: Callable[[Tree], str]
) -> None:
    """Whatever has happened since the last poll: the call is refused."""
    tree.add(FIRST)
    tree.add(replace(SECOND, target=DEVICES[1]))
    launch(tree, kubelet, "--poll-seconds=60", offers=2)
    words = happen(tree)
    for call in (kubelet.allocate, kubelet.pre_start):
        with refused("FAILED_PRECONDITION", f"card {FIRST.id} (n150, ", words):
            call(R150, [FIRST.id])


# ---- Hostile calls ----


def dial(kubelet: Kubelet) -> grpc.Channel:
    """A connection to the plugin's one socket, beside the kubelet's."""
    (name,) = kubelet.plugin_sockets()
    return grpc.insecure_channel(f"unix:{kubelet.folder / name}", [LOCAL])


def send(channel: Any, data: bytes, method: str = "Allocate") -> Any:
    """Call a method with these bytes: the call, which is under way."""
    call = channel.unary_unary(f"/v1beta1.DevicePlugin/{method}")
    return call.future(data, timeout=30)


def allocate_data(ids: Sequence[str]) -> bytes:
    """An AllocateRequest for one container."""
    one = api.ContainerAllocateRequest(devices_ids=ids)
    return api.AllocateRequest(container_requests=[one]).SerializeToString()


def hostile_requests() -> Iterator[bytes]:
    """Too many IDs, too many containers, noise."""
    many = [f"wormhole-{number:016X}" for number in range(100_000)]
    yield allocate_data(many)
    yield allocate_data(many[:9000])
    yield b"\x0a\xc0\xdf\x0f" + b"\x0a\x00" * 128_992  # as many IDs as fit in a request
    yield b"\n\2\n\0" * 1000
    noise = random.Random(4711)
    for _ in range(40):
        yield noise.randbytes(noise.randrange(300))


def test_hostile_calls_are_refused(kubelet: Kubelet, plugin: Plugin) -> None:
    """Whatever is sent, there is a status with a sentence, and nothing ends."""
    methods = ("Allocate", "GetPreferredAllocation", "PreStartContainer", "Nothing")
    with dial(kubelet) as enemy:
        for data, method in itertools.product(hostile_requests(), methods):
            call = send(enemy, data, method)
            code = call.code().name
            assert code not in ("DEADLINE_EXCEEDED", "UNAVAILABLE"), data[:20]
            assert code == "OK" or call.details(), data[:20]
    assert kubelet.allocate(R150, IDS)["devices"]
    assert not kubelet.seen("stream_end")
    assert not plugin.lines("exception|defect")


def test_honest_callers_hardly_notice_a_flood(
    kubelet: Kubelet, plugin: Plugin, bound: Bound
) -> None:
    """200 streams and 1000 calls of another."""
    honest = allocate_data(IDS)
    times = []
    with dial(kubelet) as enemy, dial(kubelet) as friend:
        watch = rpc.DevicePluginStub(enemy).ListAndWatch
        streams = [watch(api.Empty(), timeout=60) for _ in range(200)]
        assert {len(next(stream).devices) for stream in streams} == {4}
        calls = [send(enemy, b"") for _ in range(1000)]
        for _ in range(40):
            began = time.monotonic()
            assert send(friend, honest).code().name == "OK"
            times.append(time.monotonic() - began)
        assert {call.code().name for call in calls} == {"INVALID_ARGUMENT"}
    bound("Allocate beside a flood, median", sorted(times)[20], 0.05)


def test_each_stream_is_told_each_change(
    kubelet: Kubelet, four: Tree, plugin: Plugin
) -> None:
    """And nothing else, whatever becomes of other streams."""
    with dial(kubelet) as channel:
        watch = rpc.DevicePluginStub(channel).ListAndWatch
        streams = [watch(api.Empty(), timeout=60) for _ in range(20)]
        assert {len(next(stream).devices) for stream in streams} == {4}
        for stream in streams[::2]:
            stream.cancel()
        mark = kubelet.log.mark()
        four.remove(FIRST.pci)
        for stream in streams[1::2]:
            health = {device.ID: device.health for device in next(stream).devices}
            assert health == {**dict.fromkeys(IDS, "Healthy"), FIRST.id: "Unhealthy"}
        kubelet.wait_status(R150, 4, 3, after=mark)
    kubelet.log.expect_nothing(1.3, kubelet.log.mark())  # for more than a poll
    assert kubelet.kinds(R150, mark) == ["devices", "status"]


# ==== Section 4. Registration: whatever ends one, the next follows ====================

STANDING_BY = "standing by until it ends"
# From a kubelet that answers, a dropped stream or another instance's end, to the list.
AGAIN_S = 0.1


class Serving:
    """A plugin that is registered, and the ways to end its registration.

    Each way returns the event from which on the promised time counts.
    """

    def __init__(self, kubelet: Kubelet, tree: Tree, launch: Launch) -> None:
        self.kubelet = kubelet
        self.tree = tree
        self.launch = launch
        self.holder = launch(tree, kubelet, FAST, offers=4)

    def restart_the_kubelet(self) -> str:
        """It is killed, and started again."""
        self.kubelet.kill()
        self.kubelet.start()
        return "listening"

    def restart_it_in_a_new_folder(self) -> str:
        """As after somebody has emptied /var/lib/kubelet."""
        self.kubelet.kill()
        self.kubelet.delete_folder()
        self.kubelet.start()
        return "listening"

    def restart_it_slowly(self) -> str:
        """Its socket is there before it listens (kubelet contract 1)."""
        self.kubelet.kill()
        self.kubelet.start(wait="bound", listen_delay=0.3)
        return "listening"

    def drop_the_stream(self) -> str:
        """The kubelet ends the stream, and keeps running."""
        self.kubelet.drop_stream(R150)
        return "dropped"

    def terminate_for_an_heir(self) -> str:
        """Another instance stands by, and this one is told to stop."""
        return self.end_for_an_heir(signal.SIGTERM)

    def kill_for_an_heir(self) -> str:
        """Another instance stands by, and this one is killed."""
        return self.end_for_an_heir(signal.SIGKILL)

    def end_for_an_heir(self, how: signal.Signals) -> str:
        """Another instance takes over."""
        heir = self.launch(self.tree, self.kubelet, FAST)
        heir.wait_for_line(STANDING_BY)
        self.holder.end(how)
        assert len(heir.lines("standing by")) == 1, "it says so once"
        self.holder = heir
        return "stream_end"

    def restart_it_while_register_hangs(self) -> str:
        """The stream is dropped, the next Register not answered, the kubelet killed."""
        return self.restart_it_after("register_hangs", "register")

    def restart_it_while_no_stream_follows(self) -> str:
        """The stream is dropped, no other one opened, the kubelet killed."""
        return self.restart_it_after("no_stream", "no_stream")

    def restart_it_after(self, fault: Fault, event: str) -> str:
        """The next registration gets no further than this event."""
        mark = self.kubelet.log.mark()
        self.kubelet.set_fault(fault, 1)
        self.kubelet.drop_stream(R150)
        self.kubelet.wait(event, after=mark)
        return self.restart_the_kubelet()


LOST = ["stream_end", "disconnected", "status"]
# A way to end it; what the kubelet sees before the Register that holds.
ENDINGS: list[tuple[Callable[[Serving], str], list[str]]] = [
    (Serving.restart_the_kubelet, []),
    (Serving.restart_it_in_a_new_folder, []),
    (Serving.restart_it_slowly, []),
    (Serving.drop_the_stream, ["dropped", *LOST]),
    (Serving.terminate_for_an_heir, LOST),
    (Serving.kill_for_an_heir, LOST),
    (Serving.restart_it_while_register_hangs, ["dropped", *LOST, "register"]),
    (
        Serving.restart_it_while_no_stream_follows,
        ["dropped", *LOST, "register", "no_stream"],
    ),
]


@both_generations
def test_registers_again(
    kubelet: Kubelet, four: Tree, launch: Launch, bound: Bound
) -> None:
    """Whatever ends a registration, and in any order, it is there again within 0.1 s.

    It takes one Register, the old socket is gone, and news arrive by the new stream.
    """
    serving = Serving(kubelet, four, launch)
    order = random.Random(7).sample(ENDINGS * 2, 2 * len(ENDINGS)) * (10 if LONG else 1)
    for end, before in order:
        endpoint = kubelet.last("register")["endpoint"]
        serving.holder.wait_for_line(f"socket {endpoint}")
        kubelet.renew_socket()  # so that no pause is left from the ending before
        mark = kubelet.log.mark()
        since = kubelet.wait(end(serving), after=mark)["t"]
        offered = kubelet.wait_status(R150, 4, 4, after=mark)
        bound(f"{end.__name__}: registered again", offered - since, AGAIN_S)
        kinds = [kind for kind in kubelet.kinds(R150, mark) if kind != "options"]
        again = ["register", "stream", "devices", "status"]
        assert kinds == [*before, *again], end
        assert kubelet.plugin_sockets() == [kubelet.last("register")["endpoint"]], end
    mark = kubelet.log.mark()
    kubelet.log.expect_nothing(0.5, mark)
    four.remove(FIRST.pci)  # no dead stream takes this from the live one
    kubelet.wait_status(R150, 4, 3, after=mark)


@both_generations
def test_registers_again_after_the_kubelets_race(
    kubelet: Kubelet, four: Tree, launch: Launch, puppets: Puppets, bound: Bound
) -> None:
    """The end of another plugin's older stream ends ours (kubelet contract 5)."""
    kubelet.start()
    older = puppets(R150)
    older.register()
    kubelet.wait("stream")
    launch(four, kubelet, FAST, offers=4)
    mark = kubelet.log.mark()
    older.close()
    ended = kubelet.wait("stream_end", after=mark)["t"]
    kubelet.wait_status(R150, 4, 0, after=mark)
    offered = kubelet.wait_status(R150, 4, 4, after=mark)
    bound("the race: registered again", offered - ended, AGAIN_S)
    assert len(kubelet.seen("register", after=mark)) == 1


# ---- The first registration ----


def check_first_registration(kubelet: Kubelet) -> None:
    """One Register, and all cards in the first list."""
    kubelet.wait_status(R150, 4, 4)
    (request,) = kubelet.seen("register")
    assert (request["version"], request["resource_name"]) == ("v1beta1", R150)
    (listed,) = kubelet.seen("devices")
    assert sorted(listed["devices"]) == IDS
    assert kubelet.plugin_sockets() == [request["endpoint"]]


@both_generations
def test_first_registration_is_prompt(
    kubelet: Kubelet, four: Tree, launch: Launch, bound: Bound
) -> None:
    """Half a second after the start, by one Register, also if the kubelet is slow."""
    kubelet.start(dial_delay=0.5)
    plugin = launch(four, kubelet)
    request = kubelet.wait("register")
    bound("start: first Register", request["t"] - plugin.started, 0.5)
    check_first_registration(kubelet)


@both_generations
@pytest.mark.parametrize(
    "waits", ["is not there yet: waiting", "no kubelet listens at"]
)
def test_a_late_kubelet_is_met_at_once(
    kubelet: Kubelet, four: Tree, launch: Launch, bound: Bound, waits: str
) -> None:
    """Without one the plugin waits, and says so once."""
    if waits == "no kubelet listens at":
        kubelet.folder.mkdir(parents=True)
    plugin = launch(four, kubelet)
    plugin.log.wait_for_count(6, what="lines on what it finds")
    plugin.log.expect_nothing(0.3, after=6)
    assert len(plugin.lines(waits)) == 1
    answering = kubelet.start(dial_delay=0.5)
    request = kubelet.wait("register")
    bound(f"{waits}: first Register", request["t"] - answering, AGAIN_S)
    check_first_registration(kubelet)


def test_numa_nodes_reach_the_kubelet(kubelet: Kubelet, plugin: Plugin) -> None:
    """So that it can give hints (kubelet contract 7)."""
    assert kubelet.topology_hints(R150, 2) == [[0], [1], [0, 1]]


def test_the_socket_is_for_root_alone(kubelet: Kubelet, plugin: Plugin) -> None:
    """Its mode says so."""
    (name,) = kubelet.plugin_sockets()
    assert stat.S_IMODE((kubelet.folder / name).stat().st_mode) == 0o700


# ---- Pauses ----

# How a registration ends: see below.
OUTCOMES = {
    "failed": tt.Outcome("register-failed", "the kubelet has not registered it"),
    "cut": tt.Outcome("stream-ended", open_s=0.999),
    "lasted": tt.Outcome("stream-ended", open_s=1.0),
}


class Tries(tt.Registrar):
    """Its registrations end at once, each as the next word of `outcomes` says.

    "failed": its stream was never open; "cut": for less than a second; "lasted": for a
    second. "new" is none: there is a new kubelet.sock.
    """

    def __init__(self, outcomes: str) -> None:
        inventory = tt.Inventory(tt.Settings())
        super().__init__(tt.Shared(inventory, choose=tt.preferred_allocation))
        self.left = outcomes.split()
        self.pauses: list[int] = []  # before each try, in milliseconds

    async def wait_for_kubelet(self, tried_id: str, pause: float) -> str:
        """Return at once: the same kubelet, or a new one."""
        self.pauses.append(round(pause * 1000))
        if not self.left:
            raise tt.CannotWork("that was all")
        if self.left[0] == "new":
            self.left.pop(0)
            return f"{tried_id}+"
        return tried_id or "first"

    async def register_once(
        self, resource: str, kubelet_id: str, cause: str
    ) -> tt.Outcome:
        """End at once."""
        return OUTCOMES[self.left.pop(0)]

    def try_all(self) -> None:
        """Do what `outcomes` says."""
        with pytest.raises(tt.CannotWork, match="that was all"):
            asyncio.run(self.run_resource(R150))


@rows(
    "outcomes, pauses",
    """
    failures                failed failed failed failed        0 10 20 40 80
    streams cut short       cut cut cut                        0 10 20 40
    both                    cut failed cut                     0 10 20 40
    one that lasts          failed failed lasted failed        0 10 20 0 10
    a new kubelet           failed failed new failed failed    0 10 20 10 20
    """,
)
def test_pauses_double(outcomes: str, pauses: str) -> None:
    """From 10 ms on, until a registration lasts or there is a new kubelet."""
    tries = Tries(outcomes)
    tries.try_all()
    assert tries.pauses == [int(pause) for pause in pauses.split()]


def test_pauses_end_at_five_seconds() -> None:
    """They do not grow for ever."""
    tries = Tries("failed " * 12)
    tries.try_all()
    assert tries.pauses[-4:] == [2560, 5000, 5000, 5000]


@rows(
    "outcomes, questions",
    """
    three in a row            cut cut cut                     1
    no more than once         cut cut cut cut cut             1
    only two                  cut cut                         0
    mere failures             failed failed failed failed     0
    a failure in between      cut cut failed cut cut          0
    one that lasts between    cut cut lasted cut cut          0
    a new kubelet between     cut cut new cut cut             0
    it was over in between    cut cut cut lasted cut cut cut  2
    """,
)
def test_another_plugin_is_asked_about(
    caplog: pytest.LogCaptureFixture, outcomes: str, questions: str
) -> None:
    """If three streams in a row are cut short, another plugin may do that."""
    Tries(outcomes).try_all()
    question = "does another plugin register the same resource?"
    assert caplog.text.count(question) == int(questions)


# What goes wrong, and the pauses between one try and the next.
PAUSES: dict[Fault, list[float]] = {
    "register_fails": [0.01, 0.02, 0.04, 0.08, 0.16],
    "drop_streams": [0.01, 0.02, 0.04, 0.08, 0.16],
    "no_stream": [12.0],
    "register_hangs": [12.0],
}


@pytest.mark.parametrize(
    "fault",
    [
        "register_fails",
        "drop_streams",
        pytest.param("no_stream", marks=long_only),
        pytest.param("register_hangs", marks=long_only),
    ],
)
def test_failed_registration_backs_off(
    kubelet: Kubelet, four: Tree, launch: Launch, bound: Bound, fault: Fault
) -> None:
    """It is tried again, ever more slowly, and said once."""
    pauses = PAUSES[fault]
    kubelet.start(faults={fault: len(pauses)})
    plugin = launch(four, kubelet)
    tries = kubelet.log.wait_for_count(len(pauses) + 1, event_is("register"), 20)
    kubelet.wait("devices", endpoint=tries[-1]["endpoint"])
    times = [event["t"] for event in tries]
    gaps = [after - before for before, after in itertools.pairwise(times)]
    beyond = [gap - pause for gap, pause in zip(gaps, pauses, strict=True)]
    assert min(beyond) >= 0, beyond
    bound(f"{fault}: more than the pause", max(beyond), AGAIN_S)
    assert len(plugin.lines("trying again")) == 1


@pytest.mark.parametrize("kubelet", ["1.20"], indirect=True)
@pytest.mark.parametrize("delay", [1.0, pytest.param(10.0, marks=long_only)])
def test_a_kubelet_that_dials_back_late_is_waited_for(
    kubelet: Kubelet, four: Tree, launch: Launch, delay: float
) -> None:
    """Up to 1.24 it dials after Register, for 10 s at most (kubelet contract 3)."""
    assert min(tt.REGISTER_S, tt.STREAM_S) > 10
    kubelet.start(dial_delay=delay)
    launch(four, kubelet)
    kubelet.wait_status(R150, 4, 4, timeout=20)
    assert len(kubelet.seen("register")) == 1


def test_a_better_kubelet_is_met_at_once(
    kubelet: Kubelet, four: Tree, launch: Launch, bound: Bound
) -> None:
    """However often another one has failed. If it fails once, it is tried again."""
    kubelet.start(faults={"register_fails": 99})
    plugin = launch(four, kubelet)
    said = f"{R150}: the kubelet has not registered it: UNIMPLEMENTED: the fake kubelet"
    plugin.wait_for_line(said)
    kubelet.log.wait_for_count(7, event_is("register"), what="seven tries")
    kubelet.kill()
    mark = kubelet.log.mark()
    answering = kubelet.start(faults={"register_fails": 1})
    seconds = kubelet.wait_status(R150, 4, 4, after=mark) - answering
    bound("a better kubelet answers: registered", seconds, AGAIN_S)


# ---- Sockets ----


def test_who_listens_accepts_connections(workdir: Path) -> None:
    """Not a socket that is only bound, nor one whose queue is full."""
    path = workdir / "one.sock"
    with contextlib.ExitStack() as stack:
        one = stack.enter_context(socket.socket(socket.AF_UNIX))
        one.bind(str(path))
        assert not tt.accepts_connections(path)
        one.listen(0)
        assert tt.accepts_connections(path)
        while tt.accepts_connections(path):
            client = stack.enter_context(socket.socket(socket.AF_UNIX))
            client.connect(str(path))
    for other in (path, path / "x", workdir / "x", workdir):
        assert not tt.accepts_connections(other)


def private_memory(plugin: Plugin) -> int:
    """What the process alone uses, in KiB."""
    text = Path(f"/proc/{plugin.process.pid}/smaps_rollup").read_text()
    return sum(map(int, re.findall(r"^Private_\w+: +(\d+)", text, re.MULTILINE)))


def test_dropped_streams_leave_nothing(kubelet: Kubelet, plugin: Plugin) -> None:
    """Many of them cost no memory, thread, descriptor or socket."""
    proc = Path(f"/proc/{plugin.process.pid}")

    def drop(times: int) -> None:
        for _ in range(times):
            mark = kubelet.log.mark()
            kubelet.renew_socket()  # so that there is no pause
            kubelet.drop_stream(R150)
            kubelet.wait_status(R150, 4, 0, after=mark)
            kubelet.wait_status(R150, 4, 4, after=mark)

    def counts() -> list[int]:
        held = [len(os.listdir(proc / name)) for name in ("task", "fd")]
        return [*held, len(kubelet.plugin_sockets())]

    rounds = 1000 if LONG else 100
    drop(rounds // 4)
    memory = private_memory(plugin)
    before = counts()
    drop(rounds)
    # Not at once: a chip's file may just be open, or the last connection be closing.
    wait_until(lambda: all(map(operator.le, counts(), before)))
    assert private_memory(plugin) - memory <= 1024


# ---- Cards that come and go ----


def test_a_node_without_cards_waits_quietly(
    kubelet: Kubelet, tree: Tree, launch: Launch
) -> None:
    """It registers nothing, and says so once."""
    kubelet.start()
    plugin = launch(tree, kubelet, FAST)
    plugin.wait_for_line("waiting for some")
    kubelet.log.expect_nothing(0.5, 0, event_is("register"))
    assert len(plugin.lines()) == 2, plugin.lines()


def test_a_resource_is_registered_with_its_first_card(
    kubelet: Kubelet, tree: Tree, launch: Launch
) -> None:
    """The streams of others are left alone."""
    kubelet.start()
    launch(tree, kubelet, FAST)
    mark = kubelet.log.mark()
    for chip, resource in ((FIRST, R150), (replace(SECOND, card_type="n300"), R300)):
        tree.add(chip)
        kubelet.wait_status(resource, 1, 1)
    assert len(kubelet.seen("register", after=mark)) == 2
    assert not kubelet.seen("stream_end", after=mark)


@rows(
    "asic_id, resource, cards",
    """
    the card, of another type now  0D0CB6F1E7A50002  tenstorrent.com/n300  1
    another card in its place      0D0CB6F1E7A5FFFF  tenstorrent.com/n150  2
    """,
)
def test_a_resource_stays_registered(
    kubelet: Kubelet,
    tree: Tree,
    launch: Launch,
    asic_id: str,
    resource: str,
    cards: str,
) -> None:
    """Even if its last card has gone. A card that was offered keeps its resource."""
    tree.add(FIRST)
    tree.add(replace(SECOND, card_type="n300"))
    launch(tree, kubelet, FAST, offers=1)
    kubelet.wait_status(R300, 1, 1)
    mark = kubelet.log.mark()
    tree.remove(SECOND.pci)
    kubelet.wait_status(R300, 1, 0, after=mark)
    tree.add(replace(SECOND, asic_id=asic_id))
    kubelet.wait_status(resource, int(cards), int(cards), after=mark)
    kubelet.log.expect_nothing(0.3, mark, event_is("stream_end"))
    assert not kubelet.seen("register", after=mark)
    assert len(kubelet.plugin_sockets()) == 2


# ==== Section 5. Cards: chips -> cards -> the next snapshot; who reads and polls ======


def make_chip(
    index: int, bus: str, card_type: str, asic_id: str = "", serial: str = ""
) -> Chip:
    """A chip, whose ASIC id is one digit sixteen times."""
    return Chip(
        pci=f"0000:{bus}:00.0",
        index=index,
        arch="blackhole" if card_type.startswith("p") else "wormhole",
        card_type=card_type,
        asic_id=asic_id * 16,
        serial=serial,
    )


# The chips of the tests of cards, by letter.
CHIPS = {
    # Two p300, the second one with another letter in its type.
    "a": make_chip(0, "03", "p300a", "A", "000004513190F004"),
    "b": make_chip(1, "04", "p300a", "B", "000004513190F004"),
    "d": make_chip(2, "05", "p300c", "D", "000004613193411B"),
    "e": make_chip(3, "06", "p300c", "E", "000004613193411B"),
    # Two halves of different p300, whose serials end in zeros: not to be paired.
    "f": make_chip(4, "07", "p300a", "7", "0000045100000000"),
    "k": make_chip(11, "0b", "p300a", "8", "0000045100000000"),
    # Cards of one chip. The last one's model is not known to its driver.
    "n": make_chip(5, "01", "n150", "1", "0100018611902010"),
    "m": make_chip(6, "02", "n150", "2", "010001851180B42E"),
    "g": make_chip(7, "11", "galaxy-wormhole", "3", "0100035100000000"),
    "h": make_chip(8, "12", "galaxy-wormhole", "4", "0100035100000000"),
    "p": make_chip(9, "00", "p150a", "9", "0000036100000000"),
    "u": make_chip(10, "0a", "unknown", "6", "0100099911902010"),
    # Another board with the serial of a and b; n's twin; n by a driver without ASIC
    # ids.
    "c": make_chip(2, "08", "p300a", "C", "000004513190F004"),
    "t": make_chip(6, "02", "n150", "1"),
    "x": make_chip(5, "01", "n150"),
}
WORD = re.compile(r"(.)(?:@(.))?(?:/(..))?(\??)=?(.*)")


def judged(word: str) -> tt.JudgedChip:
    """A chip in one poll, by its letter in CHIPS and how it differs from there.

    "@5" is its N, "/09" its bus; "?" if it is not identified; "=hung" the kind.
    """
    match = WORD.fullmatch(word)
    assert match
    letter, index, bus, unknown, kind = match.groups(default="")
    chip = replace(CHIPS[letter], unidentified="")
    if unknown:
        kind = kind or "pending"
        chip = replace(chip, arch="", card_type="", asic_id="", unidentified="pending")
    pci = f"0000:{bus}:00.0" if bus else chip.pci
    chip = replace(chip, pci=pci, index=int(index or chip.index))
    return tt.JudgedChip(chip, tt.make_verdict(kind or "ok", chip=chip, detail=""))


def snapshot_after(polls: str) -> tt.Snapshot:
    """The snapshot after these polls, of which there is one a second."""
    snapshot = tt.Snapshot()
    for now, poll in enumerate(polls.split(";")):
        seen = [judged(word) for word in poll.split()]
        snapshot = tt.next_snapshot(snapshot, seen, tt.Settings(), now)
    return snapshot


# How to read a row of the next three tables, such as
#
#     it is back, not known       n; ; n@7?        n150 wormhole-1 5 -returning,\
#  - 0000:01:00.0 7 ?pending  back at 0000:01:00.0, .*: its telemetry
#
# The first poll finds the chip n. The second one finds nothing. The third one finds n
# again, with N = 7 ("@7") and not identified ("?"): see judged(). Then there are two
# cards: see summary(). The n150 with the ID wormhole-1 had N = 5, and is Unhealthy with
# the kind `returning`. The chip at 0000:01:00.0 has no resource ("-"), and is not
# offered with the kind `pending`. Last comes a pattern for the first card's reason.


def check_cards(polls: str, expected: str, reason: str) -> None:
    """Assert that these are the cards after the last poll."""
    snapshot = snapshot_after(polls)
    assert summary(snapshot) == expected.replace("no cards", "")
    if reason:
        assert re.search(reason, snapshot.cards[0].verdict.reason)


@rows(
    "polls, expected, reason",
    """
    a p300 is one card          a b              p300 P300 0,1 +ok  ^$
    half a p300 is no card      a                - P300 0 ?half\
  only 0000:03.*; the other one is missing
    ... the other not known     a b?             - P300 0 ?half,\
 - 0000:04:00.0 1 ?pending  ; the other one may be here, not identified: 0000:04
    it loses a half             a b; a           p300 P300 0,1 -half\
  only 0000:03.*; the other one, 0000:04.*, is missing
    ... then the other          a b; a; b        p300 P300 0,1 -half\
  only 0000:04.*; the other one, 0000:03.*, is missing
    ... one is back, not known  a b; a; a b@5?   p300 P300 0,1 -half,\
 - 0000:04:00.0 5 ?pending  ; the other one, 0000:04.*, is there, .*: its telemetry
    ... none is known           a b; a? b?       p300 P300 0,1 -returning,\
 - 0000:03:00.0 0 ?pending, - 0000:04:00.0 1 ?pending  at 0000:03.*: its telemetry
    ... and is whole again      a b; a; a b@5    p300 P300 0,5 +ok
    one half in trouble         a=gone b=unreadable  p300 P300 0,1 -gone\
  ^chip 0000:03.*: it is
    ... beside a note           a=unreadable b=gone  p300 P300 0,1 -gone\
  ^chip 0000:04.*: it is
    a note about one half       a b=unreadable   p300 P300 0,1 +unreadable\
  ^chip 0000:04.*: its
    two boards with one serial  a b; a b c       p300 P300 0,1,2 -same-id\
  ID: 0000:03.*04.*08
    """,
)
def test_a_p300_is_offered_if_both_its_chips_are_there(
    polls: str, expected: str, reason: str
) -> None:
    """Its health is that of the chip which is worse, and the reason names that chip."""
    check_cards(polls, expected, reason)


@rows(
    "polls, expected, reason",
    """
    late telemetry              n?; n            n150 wormhole-1 5 +ok
    a card is gone              n;               n150 wormhole-1 5 -gone\
  ^it is gone.*restart
    ... was not offered         n?;              no cards
    ... and is back             n; ; n@7         n150 wormhole-1 7 +ok
    ... in another slot         n; n/09 m/01     n150 wormhole-2 6 +ok,\
 n150 wormhole-1 5 +ok
    it is back, not known       n; ; n@7?        n150 wormhole-1 5 -returning,\
 - 0000:01:00.0 7 ?pending  back at 0000:01:00.0, .*: its telemetry
    ... as the bus is dead      n; n?=bus-dead   n150 wormhole-1 5 -returning,\
 - 0000:01:00.0 5 -bus-dead  back at 0000:01:00.0, .*: its PCIe bus answers
    a dead bus at first sight   n?=bus-dead      - 0000:01:00.0 5 -bus-dead
    """,
)
def test_a_card_that_comes_back_is_the_same_card(
    polls: str, expected: str, reason: str
) -> None:
    """It keeps its ID and its resource, in whatever slot and with whatever N."""
    check_cards(polls, expected, reason)


@rows(
    "polls, expected, reason",
    """
    by resource, PCI address    a p m@4 n        n150 wormhole-1 5 +ok,\
 n150 wormhole-2 4 +ok, p150 blackhole-9 9 +ok, - P300 0 ?half
    no ASIC id, in a reset      x; x@3?          n150 0000:01:00.0 3 -pending
    ... and its ASIC id comes   x; n             n150 wormhole-1 5 +ok,\
 n150 0000:01:00.0 5 -replaced
    equal ASIC ids              n t              - wormhole-1 5,6 ?same-id\
  ID: 0000:01:00.0, 0
    seen twice (tt-kmd#112)     n@7 n=gone       n150 wormhole-1 7 +ok
    ... the higher N is gone    n n@7=gone       n150 wormhole-1 5 +ok
    ... both are gone           n=gone n@7=gone  n150 wormhole-1 7 -gone
    """,
)
def test_a_chip_is_in_one_card_and_cards_are_in_order(
    polls: str, expected: str, reason: str
) -> None:
    """A chip without an ASIC id has its PCI address as ID."""
    check_cards(polls, expected, reason)


@rows(
    "polls, since",
    """
    it is Healthy           a b                          0
    its reason has changed  n; n=unreadable              0
    it is gone              n; n;                        2
    ... then resetting      n; n; ; n=resetting          2
    ... then returning      n; ; n@7?                    1
    it is Healthy again     n; ; n=resetting; n; n       3
    """,
)
def test_since_is_when_the_health_has_changed(polls: str, since: str) -> None:
    """A change of the reason alone does not count."""
    assert snapshot_after(polls).cards[0].since == float(since)


def test_an_offered_card_keeps_its_resource() -> None:
    """Even if its model becomes known later; only a plugin restart adopts that.

    The kubelet records by resource and ID who holds a card.
    """
    unknown = replace(CHIPS["u"], unidentified="")
    known = replace(unknown, card_type="n150")

    def poll(old: tt.Snapshot, chip: tt.Chip) -> tt.Snapshot:
        seen = [tt.JudgedChip(chip, tt.make_verdict("ok"))]
        return tt.next_snapshot(old, seen, tt.Settings(), 0.0)

    (card,) = poll(poll(tt.Snapshot(), unknown), known).cards
    assert card.resource == "tenstorrent.com/wormhole"
    assert card.model == "n150"
    (card,) = poll(tt.Snapshot(), known).cards
    assert card.resource == R150


def test_an_offered_card_keeps_its_model() -> None:
    """Even while its chip is there and cannot be identified, such as in a reset."""
    (card,) = snapshot_after("x; x?").cards
    assert card.verdict.kind == "pending"
    assert card.model == "n150"


def test_half_a_card_says_where_the_other_chip_is() -> None:
    """Even if that has no class device because no driver takes it."""
    chip = tt.Chip(CHIPS["b"].pci)
    without_driver = tt.JudgedChip(chip, tt.make_verdict("no-driver", driver="none"))
    seen = [judged("a"), without_driver]
    card = tt.next_snapshot(snapshot_after("a b"), seen, tt.Settings(), 1.0).cards[0]
    assert card.verdict.kind == "half"
    there = "0000:04:00.0, is there, but not identified: it has no device node"
    assert there in card.verdict.reason


@pytest.mark.parametrize("newer", [4, 5])
def test_of_two_class_devices_of_a_chip_the_newer_counts(newer: int) -> None:
    """In sysfs that is the one with the higher inode number, whatever its N is."""
    seen = []
    for index in (5, 4):
        inode = 8 if index == newer else 7
        chip = replace(CHIPS["n"], unidentified="", index=index, inode=inode)
        seen.append(tt.JudgedChip(chip, tt.make_verdict("ok")))
    snapshot = tt.next_snapshot(tt.Snapshot(), seen, tt.Settings(), 0.0)
    assert summary(snapshot) == f"n150 wormhole-1 {newer} +ok"


# ---- Whatever chips do, and whatever their files say ----

NOT_PAIRED = "it cannot be paired"
# The chips of a node, and the one card that each is always part of.
NODE = [
    (CHIPS[letter], card)
    for letter, card in (
        ("a", "p300 P300"),
        ("b", "p300 P300"),
        ("d", "p300 p300-000004613193411B"),
        ("e", "p300 p300-000004613193411B"),
        ("f", NOT_PAIRED),
        ("k", NOT_PAIRED),
        ("n", "n150 wormhole-1"),
        ("m", "n150 wormhole-2"),
        ("g", "galaxy-wormhole wormhole-3"),
        ("h", "galaxy-wormhole wormhole-4"),
        ("p", "p150 blackhole-9"),
        ("u", "wormhole wormhole-6"),
    )
]
# What the files say while a chip fails, resets or (the last) starts. The ASIC id comes
# with the type, and a type is known if the serial is.
WRONG: dict[str, dict[str, str]] = {
    "nothing": {},
    "ASIC id all ones": {"asic_id": "F" * 16},
    "ASIC id all zeros": {"asic_id": "0" * 16},
    "ASIC id junk": {"asic_id": "junk"},
    "type unknown, serial all ones": {"card_type": "unknown", "serial": "F" * 16},
    "type unknown, serial all zeros": {"card_type": "unknown", "serial": "0" * 16},
    "serial all ones": {"serial": "F" * 16},
    "serial all zeros": {"serial": "0" * 16},
    "serial junk": {"serial": "junk"},
    "no serial": {"serial": ""},
    "no telemetry": {"card_type": "", "asic_id": "", "serial": ""},
}
FAULTS = [
    *("", "", "resetting", "bus-dead", "gone", "no-node", "read-hangs"),
    *("unreadable", "no-heartbeat"),
]


class Seen(NamedTuple):
    """A chip in one poll."""

    wrong: str = "nothing"  # a key of WRONG
    fault: str = ""


class Poll(NamedTuple):
    """One poll."""

    restarted: bool = False  # the plugin has just been started
    moved: int = 0  # by how many slots the chips have moved
    chips: Sequence[Seen | None] = (Seen(),) * len(NODE)  # None: it is away


WRONG_MOSTLY_NOTHING = st.sampled_from(["nothing"] * 4 + list(WRONG))
SEEN = st.none() | st.builds(Seen, WRONG_MOSTLY_NOTHING, st.sampled_from(FAULTS))
ALL_SEEN = st.tuples(*[SEEN] * len(NODE))
POLL = st.builds(Poll, st.booleans(), st.integers(0, 3), ALL_SEEN)
Identified = dict[str, list[tt.Chip]]


@pytest.fixture(scope="module")
def identified(tmp_path_factory: pytest.TempPathFactory) -> Identified:
    """By key of WRONG: what discovery makes of NODE's chips if that is wrong."""
    folder = tmp_path_factory.mktemp("wrong")
    found = {}
    with ThreadPoolExecutor(len(NODE)) as pool:  # it looks twice at what makes no sense
        for name, wrong in WRONG.items():
            facts: dict[str, Any] = {**wrong}
            chips = [replace(chip, **facts) for chip, _ in NODE]
            discovery = inventory_of(Tree(folder / name, chips)).discovery
            there = [discovery.chip_at(chip.index) for chip in chips]
            found[name] = [chip for chip, _ in pool.map(discovery.read, there)]
    return found


class Step(NamedTuple):
    """One poll, and what came of it."""

    old: tt.Snapshot
    judged: list[tt.JudgedChip]
    owners: dict[str, str]  # PCI address -> the card in NODE whose chip is there
    new: tt.Snapshot


def judge_poll(
    identified: Identified, poll: Poll, now: float
) -> tuple[list[tt.JudgedChip], dict[str, str]]:
    """What is judged in one poll, and the owners."""
    judged = []
    owners = {}
    for number, seen in enumerate(poll.chips):
        if seen:
            pci = f"0000:{(number + poll.moved) % len(NODE):02x}:00.0"
            chip = identified[seen.wrong][number]
            chip = replace(chip, pci=pci, index=number ^ poll.moved)
            reading = tt.Reading(1, seen.fault, changed=True)
            history = tt.HealthHistory(0.0)
            history.observe(reading, now)
            judged.append(tt.JudgedChip(chip, history.verdict(chip, reading, now)))
            _, owners[pci] = NODE[number]
    return judged, owners


def take_steps(identified: Identified, polls: list[Poll]) -> Iterator[Step]:
    """The steps of these polls, and one in which nothing is wrong any more."""
    snapshot = tt.Snapshot()
    for now, poll in enumerate([*polls, Poll()]):
        old = tt.Snapshot() if poll.restarted else snapshot
        judged, owners = judge_poll(identified, poll, now)
        snapshot = tt.next_snapshot(old, judged, tt.Settings(), now)
        yield Step(old, judged, owners, snapshot)


def name_of(card: tt.Card) -> str:
    """Its resource and ID, as in NODE."""
    resource, card_id, *_ = summary(tt.Snapshot((card,))).split(" ")
    return f"{resource} {card_id}"


def whatever_chips_do(test: Callable[..., None]) -> Callable[..., None]:
    """Run a test on all sorts of polls. In between, the plugin may be restarted."""
    no_checks = list(hypothesis.HealthCheck)
    settings = hypothesis.settings(deadline=None, suppress_health_check=no_checks)
    two_halves_without_a_serial = Poll(chips=[Seen("no serial")] * 2)
    example = hypothesis.example(polls=[two_halves_without_a_serial])
    some_polls = given(polls=st.lists(POLL, min_size=1, max_size=6))
    return settings(example(some_polls(test)))


@whatever_chips_do
def test_no_chip_is_healthy_under_two_ids(
    identified: Identified, polls: list[Poll]
) -> None:
    """A Healthy card has its hardware's name and all its chips, at all times."""
    for step in take_steps(identified, polls):
        for card in step.new.cards:
            if card.verdict.health == "Healthy":
                size = 2 if card.model == "p300" else 1
                owners = [step.owners.get(chip.pci) for chip in card.chips]
                assert owners == [name_of(card)] * size


@whatever_chips_do
def test_every_chip_is_listed_and_no_id_twice(
    identified: Identified, polls: list[Poll]
) -> None:
    """A chip can be in two cards: a lost card keeps those that it had."""
    for step in take_steps(identified, polls):
        ids = [card.id for card in step.new.cards]
        assert len(set(ids)) == len(ids)
        listed = {chip.pci for card in step.new.cards for chip in card.chips}
        assert listed >= step.owners.keys()


@whatever_chips_do
def test_what_was_offered_stays(identified: Identified, polls: list[Poll]) -> None:
    """It stays under its ID and resource until the plugin is restarted."""
    for step in take_steps(identified, polls):
        offered = {(card.id, card.resource) for card in step.old.cards if card.resource}
        assert offered <= {(card.id, card.resource) for card in step.new.cards}


@whatever_chips_do
def test_the_order_of_reading_means_nothing(
    identified: Identified, polls: list[Poll]
) -> None:
    """Chips are found and read in any order."""
    any_order = random.Random(4711)
    for now, step in enumerate(take_steps(identified, polls)):
        for _ in range(5):
            any_order.shuffle(step.judged)
            again = tt.next_snapshot(step.old, step.judged, tt.Settings(), now)
            assert again == step.new


@whatever_chips_do
def test_all_is_well_when_nothing_is_wrong_any_more(
    identified: Identified, polls: list[Poll]
) -> None:
    """No card keeps anything of what was wrong."""
    *_, last = take_steps(identified, polls)
    well = {name_of(card) for card in last.new.cards if card.verdict.kind == "ok"}
    assert well == {name for _, name in NODE} - {NOT_PAIRED}


# ---- Another vendor's discovery ----


class Acme:
    """Another vendor's discovery, as README's "For another vendor's card" asks for."""

    def __init__(self, folder: Path, poll_seconds: float = 0.02) -> None:
        self.dev_folder = str(folder)
        self.there: list[int] = []  # N of each chip
        self.reads = Counter[int]()  # by N: how many have begun
        # N -> how many of its reads return; later ones hang until they are released.
        self.reads_that_return: dict[int, int] = {}
        self.released = threading.Event()
        self.readings: list[tt.Reading] = []  # what the next reads say
        self.find: Callable[[], object] = nothing  # called at each poll
        self.look: Callable[[tt.Chip], object] = nothing  # called at each read
        settings = tt.Settings(resource_domain="x.org", poll_seconds=poll_seconds)
        self.inventory = tt.Inventory(settings, self)

    def driver_version(self) -> str:
        """There is none."""
        return ""

    def chips(self) -> list[tt.Chip]:
        """The chips that are there."""
        self.find()
        return [chip for chip in map(self.chip_at, self.there) if chip]

    def chip_at(self, index: int) -> tt.Chip | None:
        """The chip that has this N now."""
        chip = tt.Chip(f"0000:{index:02x}:00.0", index, 100 + index)
        return chip if index in self.there else None

    def unclaimed(self, known: set[str]) -> list[tt.JudgedChip]:
        """There is none."""
        return []

    def read(self, chip: tt.Chip) -> tuple[tt.Chip, tt.Reading]:
        """What a chip is, and how it is."""
        self.reads[chip.index] += 1
        self.look(chip)
        if self.reads[chip.index] > self.reads_that_return.get(chip.index, 10**9):
            assert self.released.wait(60)
        known = replace(
            chip,
            dev="1:3",
            arch="acme",
            card_type="x1",
            asic_id=f"{chip.index}",
            unidentified="",
        )
        return known, self.readings.pop(0) if self.readings else tt.Reading()

    def poll(self) -> dict[str, int]:
        """Poll once. Returns how many cards have which kind of verdict."""
        snapshot = self.inventory.poll(0.0)
        return Counter(card.verdict.kind for card in snapshot.cards)

    def poll_after_reads(self) -> dict[str, int]:
        """Poll once each chip has been read with the present `look`."""
        before = self.reads.copy()
        # The next read may have begun already, but not the one that follows it.
        wait_until(lambda: all(self.reads[n] >= before[n] + 2 for n in self.there))
        return self.poll()

    def close(self) -> None:
        """Called when the test ends: all threads end."""
        self.released.set()
        self.inventory.stop()
        for thread in threading.enumerate():
            if thread.name == "poll":
                thread.join(10)
        self.find = nothing
        self.there = []
        self.inventory.poll(0.0)


@pytest.fixture
def acme(workdir: Path) -> Iterator[Acme]:
    """A discovery that is polled and read fifty times a second."""
    with contextlib.closing(Acme(workdir)) as made:
        yield made


def test_another_vendor_needs_only_another_discovery(workdir: Path, acme: Acme) -> None:
    """Everything else works unchanged: the list, and what a Pod gets."""
    acme.there = [1, 2, 3]
    for index in acme.there:
        (workdir / str(index)).symlink_to("/dev/null")
    acme.poll()
    shared = tt.Shared(acme.inventory, choose=tt.preferred_allocation)
    plugin = tt.DevicePlugin(shared, "x.org/x1")

    async def allocate(*ids: str) -> api.ContainerAllocateResponse:
        one = api.ContainerAllocateRequest(devices_ids=ids)
        request = api.AllocateRequest(container_requests=[one])
        (answer,) = (await plugin.Allocate(request, None)).container_responses
        return answer

    answer = asyncio.run(allocate("acme-3", "acme-1"))
    paths = [device.host_path for device in answer.devices]
    assert paths == ["/dev/tenstorrent/1", "/dev/tenstorrent/3"]
    assert answer.envs == {"PCIDEVICE_X_ORG_X1": "0000:01:00.0,0000:03:00.0"}

    acme.there = [1, 2]
    acme.poll()
    expected = "x1 acme-1 1 +ok, x1 acme-2 2 +ok, x1 acme-3 3 -gone"
    assert summary(acme.inventory.snapshot) == expected


# ---- The threads that read and poll ----


def test_new_chips_that_hang_hold_up_one_poll(acme: Acme, bound: Bound) -> None:
    """Thirty of them together cost one poll 2 s, and nobody else anything."""
    acme.there = [*range(32)]
    acme.reads_that_return = dict.fromkeys(range(2, 32), 0)
    for promised in (2.5, 0.1):
        began = time.monotonic()
        assert acme.poll() == {"ok": 2, "pending": 30}
        bound(f"a poll within {promised} s", time.monotonic() - began, promised)


def test_a_new_chip_that_hangs_is_offered_when_it_answers(acme: Acme) -> None:
    """After a while it is reported as hanging, but not offered until it answers."""
    acme.there = [1]
    acme.reads_that_return = {1: 0}
    wait_until(lambda: acme.poll() == {"read-hangs": 1})
    assert not acme.inventory.snapshot.resources
    acme.released.set()
    assert acme.poll_after_reads() == {"ok": 1}
    assert acme.inventory.snapshot.resources == ["x.org/x1"]


@rows(
    "poll_seconds, polls",
    """
    each second       1    5
    ten times in one  0.1  50
    each minute       60   2
    """,
)
def test_a_read_hangs_if_it_takes_five_seconds(
    workdir: Path, poll_seconds: str, polls: str
) -> None:
    """A shorter read is no fault.

    Polls (at least two) are counted, not seconds, so a stopped process blames nobody.
    """
    with contextlib.closing(Acme(workdir, float(poll_seconds))) as acme:
        acme.there = [1]
        acme.reads_that_return = {1: 1}
        assert acme.poll() == {"ok": 1}
        for _ in range(int(polls) - 1):
            assert acme.poll() == {"ok": 1}
        assert acme.poll() == {"read-hangs": 1}


def test_a_chip_is_read_at_most_once_per_poll_interval(acme: Acme) -> None:
    """Its thread reads at its own pace, and pauses in between."""
    times: list[float] = []

    def note(chip: tt.Chip) -> None:
        times.append(time.monotonic())

    acme.look = note
    acme.there = [1]
    acme.poll()
    acme.poll_after_reads()
    acme.poll_after_reads()
    assert all(later - earlier >= 0.02 for earlier, later in itertools.pairwise(times))


def test_no_reading_between_two_polls_is_lost(acme: Acme) -> None:
    """A reset can begin and end there: its chip has to prove itself again."""
    beats = [tt.Reading(1), tt.Reading(2)]
    acme.readings = [*beats, tt.Reading(fault="resetting")]
    acme.there = [1]
    assert acme.poll() == {"ok": 1}
    assert acme.poll_after_reads() == {"resetting": 1}


def test_a_removal_beside_hanging_chips_is_known_within_a_poll(
    workdir: Path, bound: Bound
) -> None:
    """Six chips hang, and a seventh one is removed: streams are woken for it."""

    async def remove_one(acme: Acme) -> float:
        def six_hang() -> bool:
            return all(acme.reads[n] == 2 for n in range(6))

        acme.inventory.start(asyncio.get_running_loop())
        await asyncio.to_thread(wait_until, six_hang)
        removed = time.monotonic()
        acme.there = [*range(6)]
        last = None
        while not last or last.verdict.kind != "gone":
            await asyncio.wait_for(acme.inventory.changed.wait(), 10)
            *_, last = acme.inventory.snapshot.cards
        acme.inventory.stop()
        return time.monotonic() - removed

    with contextlib.closing(Acme(workdir, poll_seconds=1.0)) as acme:
        acme.there = [*range(7)]
        acme.reads_that_return = dict.fromkeys(range(6), 1)
        seconds = asyncio.run(remove_one(acme))
    bound("removed beside six hanging chips: in the snapshot", seconds, 1.1)


def test_a_defect_costs_its_chip_only(
    acme: Acme, caplog: pytest.LogCaptureFixture
) -> None:
    """Its traceback is logged once. The card stays Healthy: nobody knows better."""
    acme.there = [1, 2]
    acme.poll()
    acme.look = lambda chip: 1 // (chip.index - 1)
    for _ in range(2):
        assert acme.poll_after_reads() == {"ok": 1, "unreadable": 1}
    (record,) = caplog.records
    assert record.getMessage() == "chip 0000:01:00.0 cannot be read"
    assert "\nTraceback" in caplog.text
    card, _ = acme.inventory.snapshot.cards
    assert card.verdict.health == "Healthy"
    assert "ZeroDivisionError" in card.verdict.reason
    acme.look = nothing
    assert acme.poll_after_reads() == {"ok": 2}


def test_a_reader_ends_when_its_chip_is_gone(acme: Acme) -> None:
    """No chip's thread outlives it."""
    before = set(threading.enumerate())
    acme.there = [*range(3)]
    assert acme.poll() == {"ok": 3}
    readers = set(threading.enumerate()) - before
    assert len(readers) == 3
    acme.there = []
    assert acme.poll() == {"gone": 3}
    for thread in readers:
        thread.join(10)
        assert not thread.is_alive()


class PolledThread:
    """A polling thread, what its discovery finds, and two callbacks."""

    def __init__(self, acme: Acme, found: Sequence[list[int] | Exception]) -> None:
        self.acme = acme
        self.acme.find = self.find
        self.found = deque(found)
        self.reported: list[str] = []  # what the second callback was called with
        self.woken = threading.Semaphore(0)  # how often a stream was woken
        self.last = threading.Event()  # the last poll is under way
        self.stopped = threading.Event()  # and may end
        self.seconds = 0.0  # how long all polls before that took
        self.acme.inventory.on_snapshot = [self.fail, self.report]

    def find(self) -> None:
        """Called at each poll."""
        now = self.found.popleft()
        if isinstance(now, Exception):
            raise now
        self.acme.there = now
        if not self.found:
            self.last.set()
            assert self.stopped.wait(20)

    def fail(self, old: tt.Snapshot, new: tt.Snapshot) -> None:
        """The first callback: it fails at each change, and says if a stream woke up."""
        if old != new:
            raise ValueError(f"woken: {self.woken.acquire(timeout=10)}")

    def report(self, old: tt.Snapshot, new: tt.Snapshot) -> None:
        """The second callback."""
        self.reported.append(summary(new))

    def run(self) -> None:
        """Poll, with a stream that waits for news, until the last poll is under way.

        The thread is asked to stop then. It does when that poll may end.
        """
        asyncio.run(self._run())

    async def _run(self) -> None:

        async def stream() -> None:
            while await self.acme.inventory.changed.wait():
                self.woken.release()

        task = asyncio.create_task(stream())
        await asyncio.sleep(0)  # it waits now
        began = time.monotonic()
        self.acme.inventory.start(asyncio.get_running_loop())
        assert await asyncio.to_thread(self.last.wait, 20)
        self.seconds = time.monotonic() - began
        self.acme.inventory.stop()
        task.cancel()


NO_FILES = OSError(errno.EMFILE, "")
DEFECT = ValueError(1)
# What each poll finds: the N of all chips, or an error.
FOUND: list[list[int] | Exception] = [
    [],  # the first snapshot is news: a stream wakes up, and the first callback fails
    [1],  # so is this one
    [1],  # nothing is new
    NO_FILES,  # a warning
    NO_FILES,  # nothing is new
    [1],  # polls work again, and this is logged; nothing is new to streams
    DEFECT,  # its traceback, and a warning
    DEFECT,  # nothing is new
    [1, 2],  # polls work again, and this is news: the first callback fails
    [1],  # still running when the thread is asked to stop
]


@pytest.fixture
def polled(acme: Acme, caplog: pytest.LogCaptureFixture) -> Iterator[PolledThread]:
    """A polling thread that will find FOUND."""
    caplog.set_level(logging.INFO)
    thread = PolledThread(acme, FOUND)
    yield thread
    thread.stopped.set()


def test_polls_pause_in_between(polled: PolledThread) -> None:
    """They pause for --poll-seconds, even after a poll that failed."""
    polled.run()
    assert polled.seconds >= (len(FOUND) - 1) * 0.02


def test_streams_are_woken_by_news_only(
    polled: PolledThread, caplog: pytest.LogCaptureFixture
) -> None:
    """They wake up before any callback runs."""
    polled.run()
    assert caplog.text.count("ValueError: woken: True") == 3
    assert not polled.woken.acquire(blocking=False)


def test_a_callback_that_fails_hurts_nobody(polled: PolledThread) -> None:
    """The other callbacks run. A poll still running at shutdown is discarded."""
    polled.run()
    one = "x1 acme-1 1 +ok"
    two = "x1 acme-1 1 +ok, x1 acme-2 2 +ok"
    (thread,) = [each for each in threading.enumerate() if each.name == "poll"]
    polled.stopped.set()
    thread.join(10)
    assert not thread.is_alive()
    assert polled.reported == ["", one, one, one, two]
    assert summary(polled.acme.inventory.snapshot) == two


def test_a_poll_that_fails_leaves_the_last_list(
    polled: PolledThread, caplog: pytest.LogCaptureFixture
) -> None:
    """The failure and the recovery are each logged once."""
    polled.run()
    levels = [record.levelname for record in caplog.records]
    assert levels == [
        *("ERROR", "ERROR"),  # the callback fails at the first two changes
        *("WARNING", "INFO"),  # polls fail for lack of files; they work again
        *("ERROR", "WARNING"),  # the traceback of a defect; polls fail
        *("ERROR", "INFO"),  # the callback fails; polls work again
    ]
    problems = re.findall(
        "cannot look for cards, the last list stands: (.*)", caplog.text
    )
    assert problems == ["OSError: [Errno 24] ", "ValueError: 1"]


# ==== Section 6. serve(): what a plugin process does as a whole =======================

# ---- Cards in trouble ----

# How a card gets into trouble, and how soon the kubelet knows, with a poll each second:
# that it is gone within one, what its files say within two.
TROUBLES = {
    "gone from sysfs": 1.1,
    "device node": 2.2,
    "its heartbeat stands still": 15,
}


def make_trouble(tree: Tree) -> None:
    """Three cards, a kind of TROUBLES each."""
    tree.remove(FIRST.pci)
    relink(tree.node(SECOND.pci), "/dev/zero")
    tree.still.add(THIRD.pci)


def end_trouble(tree: Tree) -> None:
    """They are back; the first one has another N."""
    tree.add(replace(FIRST, index=9))
    relink(tree.node(SECOND.pci), SECOND.target)
    tree.still.discard(THIRD.pci)


def wait_health(kubelet: Kubelet, name: str, health: str, after: int = 0) -> float:
    """Wait until this card is listed with this health; the time when it was."""

    def fits(event: Event) -> bool:
        return bool(event.get("devices", {}).get(name) == health)

    return float(kubelet.log.wait_for(fits, 20, after, f"{name} {health}")["t"])


def test_card_in_trouble_is_not_handed_out(
    kubelet: Kubelet, four: Tree, plugin: Plugin, bound: Bound
) -> None:
    """It is Unhealthy until it is back, also with another N. Others are left alone."""
    began = time.monotonic()
    make_trouble(four)
    for name, reason in zip(IDS, TROUBLES, strict=False):
        seen = wait_health(kubelet, name, "Unhealthy") - began
        bound(f"{reason}: Unhealthy", seen, TROUBLES[reason])
        for call in (kubelet.allocate, kubelet.pre_start):
            with refused("FAILED_PRECONDITION", name, "not healthy since 20", reason):
                call(R150, [name])
    assert seen > 10, "the firmware's own watchdog takes so long"

    mark = kubelet.log.mark()
    began = time.monotonic()
    end_trouble(four)
    seen = kubelet.wait_status(R150, 4, 4, after=mark) - began
    bound("cards back: Healthy", seen, 3.2)
    (back,) = kubelet.allocate(R150, [FIRST.id])["devices"]
    assert back["container_path"] == "/dev/tenstorrent/9"
    listed = [event["devices"] for event in kubelet.seen("devices")]
    assert {devices[FOURTH.id] for devices in listed} == {"Healthy"}


def test_a_stopped_plugin_judges_nobody_by_its_own_absence(
    kubelet: Kubelet, plugin: Plugin
) -> None:
    """SIGSTOP for longer than a heart may stand still."""
    mark = kubelet.log.mark()
    plugin.send(signal.SIGSTOP)
    kubelet.log.expect_nothing(14.0, mark)
    plugin.send(signal.SIGCONT)
    kubelet.log.expect_nothing(1.0, mark)
    assert not plugin.lines("unhealthy")
    assert kubelet.admit("pod", {R150: 1})["ids"]


EIGHT = [
    replace(FIRST, pci=f"0000:{bus:02x}:00.0", index=bus, asic_id=f"{bus:016X}")
    for bus in range(1, 9)
]


@pytest.fixture
def six_hang(kubelet: Kubelet, tree: Tree, launch: Launch) -> Tree:
    """A node with eight cards that are offered. From now on, reads of six hang."""
    for chip in EIGHT:
        tree.add(chip)
    launch(tree, kubelet, offers=8)
    for chip in EIGHT[:6]:
        tree.hang(chip.pci, "tt_heartbeat")
    return tree


def test_hanging_reads_hold_up_no_news(
    kubelet: Kubelet, six_hang: Tree, bound: Bound
) -> None:
    """That a card is gone is known within a poll. Nor do calls wait."""
    with open(six_hang.entry(EIGHT[0].pci) / "tt_heartbeat", "w"):  # waits for a read
        mark = kubelet.log.mark()
        gone = time.monotonic()
        six_hang.remove(EIGHT[6].pci)
        began = time.monotonic()
        kubelet.admit("pod", {R150: 1}, {R150: [EIGHT[7].id]})
        kubelet.start_container("pod")
        bound("a Pod's calls while reads hang", time.monotonic() - began, 0.05)
        seen = wait_health(kubelet, EIGHT[6].id, "Unhealthy", mark)
    bound("card gone while six others hang: Unhealthy", seen - gone, 1.1)


def test_card_whose_reads_hang_is_unhealthy(
    kubelet: Kubelet, six_hang: Tree, bound: Bound
) -> None:
    """After five seconds, not before; and until a read returns."""
    began = time.monotonic()
    seen = kubelet.wait_status(R150, 8, 2, timeout=20) - began
    bound("reads hang: Unhealthy", seen, 7.2)
    assert seen > 4
    with refused("FAILED_PRECONDITION", "a read of its sysfs files does not return"):
        kubelet.allocate(R150, [EIGHT[0].id])
    mark = kubelet.log.mark()
    six_hang.release(EIGHT[1].pci, "tt_heartbeat", "77\n")
    kubelet.wait_status(R150, 8, 3, after=mark)


# ---- Stopping ----

CDI = "tenstorrent.com-card.json"
LABELS = "tt-device-plugin"
KEPT = {CDI, LABELS}  # files for other tools


@dataclass(frozen=True)
class State:
    """Where a plugin is when it is told to stop."""

    said: str  # when it is there: a line of its log
    event: str = ""  # or an event of the kubelet
    kubelet: bool = True  # whether one is started
    faults: Mapping[Fault, int] = field(default_factory=dict)  # of the kubelet
    folder: bool = False  # whether the kubelet's folder is there without it


BOTH_SIGNALS = pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
STATES = {
    "no folder": State("is not there yet", kubelet=False),
    "no kubelet": State("no kubelet listens", kubelet=False, folder=True),
    "Register hangs": State("", "register", faults={"register_hangs": 9}),
    "Register fails": State("trying again", faults={"register_fails": 99}),
    "no stream": State("", "no_stream", faults={"no_stream": 9}),
    "registered": State("registered"),
}


@pytest.fixture
def keep(tmp_path: Path) -> list[str]:
    """Flags of a plugin that keeps files for other tools in tmp_path."""
    return [FAST, f"--cdi-dir={tmp_path}", f"--labels-dir={tmp_path}"]


def are_kept(folder: Path) -> bool:
    """Whether these files are in the folder, and nothing else."""
    return {*os.listdir(folder)} == KEPT


def stop(plugin: Plugin, bound: Bound, how: signal.Signals = signal.SIGTERM) -> None:
    """It ends within a second, with exit code 0."""
    code, seconds = plugin.end(how)
    assert code == 0, plugin.lines()
    bound(f"{how.name} to the end", seconds, 1.0)


@BOTH_SIGNALS
@pytest.mark.parametrize("name", STATES)
def test_stops_in_each_state(
    kubelet: Kubelet,
    four: Tree,
    launch: Launch,
    bound: Bound,
    tmp_path: Path,
    keep: list[str],
    name: str,
    how: signal.Signals,
) -> None:
    """No socket and no file of it is left."""
    state = STATES[name]
    if state.folder:
        kubelet.folder.mkdir(parents=True)
    if state.kubelet:
        kubelet.start(faults=state.faults)
    plugin = launch(four, kubelet, *keep)
    if state.event:
        kubelet.wait(state.event)
    else:
        plugin.wait_for_line(state.said)
    if name != "no folder":
        wait_until(functools.partial(are_kept, tmp_path))
    stop(plugin, bound, how)
    assert not kubelet.plugin_sockets()
    assert not os.listdir(tmp_path)


@BOTH_SIGNALS
@pytest.mark.parametrize("flag", [FAST, "--list", "--dry-run"])
def test_stops_while_its_first_poll_hangs(
    kubelet: Kubelet,
    four: Tree,
    launch: Launch,
    bound: Bound,
    flag: str,
    how: signal.Signals,
) -> None:
    """A read of sysfs that does not return holds up no end."""
    four.hang(FIRST.pci, "tt_card_type")
    plugin = launch(four, kubelet, flag, stdout=subprocess.DEVNULL)
    with open(four.entry(FIRST.pci) / "tt_card_type", "w"):  # waits for the read
        stop(plugin, bound, how)


@contextlib.contextmanager
def full_pipe() -> Iterator[int]:
    """A pipe that is full and that nobody reads: its end to write to."""
    ends = os.pipe()
    os.set_blocking(ends[1], False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(ends[1], bytes(4096))
    os.set_blocking(ends[1], True)
    try:
        yield ends[1]
    finally:
        for end in ends:
            os.close(end)


def waits_to_print(plugin: Plugin) -> bool:
    """Whether a thread of it is in a call whose first argument is 1, its stdout."""
    for path in Path(f"/proc/{plugin.process.pid}/task").glob("*/syscall"):
        with contextlib.suppress(OSError):  # the thread has just ended
            if re.match(r"\d+ 0x1 ", path.read_text()):
                return True
    return False


@BOTH_SIGNALS
@pytest.mark.parametrize("fake", [[], ["--fake=n150=2"]])
@pytest.mark.parametrize("flag", ["--list", "--dry-run"])
def test_stops_while_nobody_reads_what_it_prints(
    kubelet: Kubelet,
    four: Tree,
    launch: Launch,
    workdir: Path,
    bound: Bound,
    flag: str,
    fake: list[str],
    how: signal.Signals,
) -> None:
    """Such as `--list | less`. No folder of made-up cards is left."""
    kept = workdir / "kept"  # with a short name: a dry run makes sockets in it
    kept.mkdir()
    variables = environment(TMPDIR=str(kept))
    with full_pipe() as stdout:
        plugin = launch(four, kubelet, flag, *fake, stdout=stdout, env=variables)
        wait_until(functools.partial(waits_to_print, plugin))
        stop(plugin, bound, how)
    assert not os.listdir(kept)


def test_stops_by_many_signals(kubelet: Kubelet, plugin: Plugin, bound: Bound) -> None:
    """Ctrl-C, again and again."""
    sent = plugin.send(signal.SIGINT)
    while plugin.process.poll() is None:
        plugin.send(signal.SIGINT)
    plugin.reader.join(10)
    assert plugin.process.returncode == 0, plugin.lines()
    bound("Ctrl-C to the end", plugin.ended - sent, 1.0)
    assert not kubelet.plugin_sockets()


def test_stops_when_the_folder_is_gone(
    kubelet: Kubelet, plugin: Plugin, bound: Bound
) -> None:
    """With its socket in it."""
    kubelet.delete_folder()
    stop(plugin, bound)


def test_stops_where_the_folder_was_deleted_on_the_host(
    kubelet: Kubelet, four: Tree, launch: Launch
) -> None:
    """By itself, with exit code 1: a mount goes on to show the deleted folder."""
    host = kubelet.root / "host"
    host.mkdir(parents=True)
    fd = os.open(host, os.O_RDONLY)
    kubelet.folder.symlink_to(
        f"/proc/{os.getpid()}/fd/{fd}"
    )  # by no name, like a mount
    plugin = launch(four, kubelet)
    plugin.wait_for_line("no kubelet listens")
    host.rmdir()
    plugin.reader.join(5)
    os.close(fd)
    assert plugin.process.returncode == 1
    assert "was deleted on the host" in plugin.lines()[-1]


def test_one_that_stood_by_leaves_all_to_the_holder(
    kubelet: Kubelet,
    four: Tree,
    launch: Launch,
    bound: Bound,
    tmp_path: Path,
    keep: list[str],
) -> None:
    """Its socket, and its files for other tools."""
    holder = launch(four, kubelet, *keep, offers=4)
    wait_until(functools.partial(are_kept, tmp_path))
    sockets = kubelet.plugin_sockets()
    plugin = launch(four, kubelet, *keep)
    plugin.wait_for_line(STANDING_BY)
    stop(plugin, bound)
    assert kubelet.plugin_sockets() == sockets
    assert are_kept(tmp_path)
    assert holder.process.poll() is None


def handles_sigterm(plugin: Plugin) -> bool:
    """Whether its own code runs: it blocks the signal, or has a handler for it."""
    status = Path(f"/proc/{plugin.process.pid}/status").read_text()
    masks = re.findall(r"Sig(?:Blk|Cgt):\s(\w+)", status)
    return any(int(mask, 16) >> (signal.SIGTERM - 1) & 1 for mask in masks)


def stop_at_random(plugin: Plugin, number: int) -> None:
    """A signal within its first 0.5 s; none to each sixth, a dry run that ends."""
    moment = random.Random(number).uniform(0, 0.5)
    wait_until(functools.partial(handles_sigterm, plugin))
    time.sleep(moment)
    if number % 6:
        plugin.send(signal.SIGINT if number % 2 else signal.SIGTERM)
    plugin.reader.join(30)
    assert plugin.process.returncode == 0, (number, moment, plugin.lines())


@contextlib.contextmanager
def busy_cores() -> Iterator[None]:
    """Two processes have always something to do."""
    with contextlib.ExitStack() as stack:
        for _ in range(2):
            loop = Plugin([sys.executable, "-c", "while True: 1"])
            stack.enter_context(contextlib.closing(loop))
        yield


@pytest.mark.parametrize("busy", [False, True])
def test_stops_at_any_moment(
    kubelet: Kubelet, launch: Launch, workdir: Path, busy: bool
) -> None:
    """With a kubelet, and without one on busy cores: no traceback, nothing left.

    So do dry runs, which write nothing to stderr.
    """
    kept = workdir / "kept"  # with a short name: the dry runs make sockets in it
    kept.mkdir()
    flags = ["--fake=n150=2,p300=1", FAST, f"--cdi-dir={kept}", f"--labels-dir={kept}"]
    options = {"env": environment(TMPDIR=str(kept)), "stdout": subprocess.DEVNULL}

    def start_and_stop(number: int) -> None:
        dry = number % 3 == 0
        words = [*flags, "--dry-run"] if dry else flags
        plugin = launch(None, kubelet, *words, **options)
        stop_at_random(plugin, number)
        assert not (dry and plugin.lines())

    count = 750 if LONG else 15
    if not busy:
        kubelet.start()
    crowd = busy_cores() if busy else contextlib.nullcontext()
    with crowd, ThreadPoolExecutor(2) as pool:
        list(pool.map(start_and_stop, range(busy * count, (1 + busy) * count)))
    assert not kubelet.plugin_sockets()
    assert not os.listdir(kept)


# ---- A log that nobody reads ----


def flood(kubelet: Kubelet, allocate: Any, count: int) -> float:
    """So many refused calls, a log line each: how long an honest one then takes."""
    for _ in range(count // 500):
        calls = [allocate.future(api.AllocateRequest()) for _ in range(500)]
        assert {call.code().name for call in calls} == {"INVALID_ARGUMENT"}
    began = time.monotonic()
    assert kubelet.allocate(R150, IDS)["devices"]
    return time.monotonic() - began


def test_log_lines_that_nobody_reads_are_counted(
    kubelet: Kubelet, plugin: Plugin, bound: Bound
) -> None:
    """No call waits. Once somebody reads, the log says how many lines were dropped."""
    reading = plugin.log.changed  # who reads its stderr waits for this lock
    with dial(kubelet) as channel, reading:
        seconds = flood(kubelet, rpc.DevicePluginStub(channel).Allocate, 3000)
    bound("Allocate while nobody reads the log", seconds, 0.05)
    plugin.log.wait_for_count(1000, what="a thousand lines")
    for call in (kubelet.allocate, kubelet.pre_start):
        with refused("INVALID_ARGUMENT"):
            call(R150, [])
    plugin.wait_for_line("PreStartContainer of .* refused")
    text = "\n".join(plugin.lines())
    dropped = re.findall(r"(\d+) lines were dropped: nobody read", text)
    shown = plugin.lines("Allocate of|allocated")
    assert sum(map(int, dropped)) + len(shown) == 3002


def test_stops_while_nobody_reads_the_log(
    kubelet: Kubelet, plugin: Plugin, bound: Bound
) -> None:
    """Nor do calls under way hold up the end."""
    reading = plugin.log.changed  # who reads its stderr waits for this lock
    with dial(kubelet) as channel, reading:
        allocate = rpc.DevicePluginStub(channel).Allocate
        seconds = flood(kubelet, allocate, 100_000 if LONG else 3000)
        bound("Allocate while nobody reads the log", seconds, 0.05)
        calls = [allocate.future(api.AllocateRequest()) for _ in range(1000)]
        assert calls[0].code()
        assert not calls[-1].done()
        sent = plugin.send(signal.SIGTERM)
        assert plugin.process.wait(10) == 0
        bound("SIGTERM to the end, nobody reads the log", time.monotonic() - sent, 2)
        assert not kubelet.plugin_sockets()
    codes = {call.code().name for call in calls}
    assert codes <= {"INVALID_ARGUMENT", "UNAVAILABLE", "CANCELLED"}


# ==== Appendix A. Discovery: Tenstorrent's sysfs -> chips and readings ================

# A chip that no heartbeat has to prove: its driver is older than 2.7.
SILENT = replace(FIRST, heartbeat=False)
UNREADABLE = "/proc/self/mem"  # a link to it: reading fails with EIO, also for root
NONSENSE = (UNREADABLE, "", "\0\xff/..", "-1", "1" * 5000)
# What no ASIC id or serial looks like: a dead bus, empty fuses, lower case, too short.
NO_ID = ("F" * 16, "0" * 16, "0d0cb6f1e7a50001", "D0CB6F1E7A50001")


class Driver:
    """What discovery reads files through, with errors that only a driver makes."""

    def __init__(self, tree: Tree) -> None:
        settings = tt.Settings(sysfs_root=tree.sys, dev_root=tree.dev)
        self.discovery = tt.TenstorrentDiscovery(settings, read=self.read)
        self.errors: dict[str, int] = {}  # name of a file -> its errno
        self.files: list[str] = []  # names of those that were read, in order
        self.before_read: Callable[[str], object] = nothing  # called with the name

    def read(self, path: str) -> str:
        """Read a file, or fail."""
        name = Path(path).name
        self.before_read(name)
        self.files.append(name)
        if name in self.errors:
            raise OSError(self.errors[name], "")
        return tt.read_attribute(path)

    def chip(self, index: int = 0) -> tt.Chip:
        """The chip that has this N, not identified."""
        chip = self.discovery.chip_at(index)
        assert chip
        return chip

    def identify(self) -> tt.Chip:
        """The chip that has N = 0, identified."""
        chip, _ = self.discovery.read(self.chip())
        return chip


def probe_anew(tree: Tree, address: str) -> None:
    """The driver makes the class device anew, with the same N and the same files."""
    entry = tree.entry(address)
    with tree.lock:
        shutil.copytree(entry, tree.drafts / "new", symlinks=True)
        entry.rename(tree.drafts / "old")
        (tree.drafts / "new").rename(entry)


@rows(
    "file, fact, why_unidentified, without_file",
    """
    card type      tt_card_type             card_type  pending       pending
    ASIC id        tt_asic_id               asic_id    unidentified
    serial         tt_serial                serial
    firmware       tt_fw_bundle_ver         firmware
    device number  dev                      dev        pending       pending
    architecture   device/device            arch       unidentified  unidentified
    IOMMU          device/iommu_group/type  iommu
    NUMA node      device/numa_node         numa_node
    """,
)
def test_each_fact_of_a_chip_is_one_file(
    workdir: Path, file: str, fact: str, why_unidentified: str, without_file: str
) -> None:
    """A file that is missing or makes no sense costs its fact only.

    A missing ASIC id is no fault, because some drivers have none: the chip goes by its
    PCI address.
    """
    tree = Tree(workdir, [FIRST])
    driver = Driver(tree)
    bare = driver.chip()
    whole, reading = driver.discovery.read(bare)
    lacking: dict[str, Any] = {fact: getattr(bare, fact)}
    if file == "dev":
        reading = reading._replace(fault="no-node")

    path = tree.entry(FIRST.pci) / file
    nonsense = replace(whole, **lacking, unidentified=why_unidentified)
    for text in NONSENSE + NO_ID * (file in ("tt_asic_id", "tt_serial")):
        path.unlink()
        if text == UNREADABLE:
            path.symlink_to(UNREADABLE)
        else:
            tree.set(FIRST.pci, file, text.encode("latin-1"))
        assert driver.discovery.read(bare) == (nonsense, reading), text
    path.unlink()
    missing = replace(whole, **lacking, unidentified=without_file)
    assert driver.discovery.read(bare) == (missing, reading)


def test_an_identified_chip_has_all_these_facts(workdir: Path) -> None:
    """Each is read from sysfs."""
    tree = Tree(workdir, [FIRST])
    chip = Driver(tree).identify()
    assert chip == tt.Chip(
        FIRST.pci,
        0,
        inode=tree.entry(FIRST.pci).stat().st_ino,
        pci_path=("pci0000:01",),
        dev="1:3",
        arch="wormhole",
        card_type="n150",
        asic_id=FIRST.asic_id,
        serial=FIRST.serial,
        firmware="80.17.0.0",
        numa_node=0,
        iommu="DMA-FQ",
        unidentified="",
    )


# A text "E..." is the error that the read fails with. The last column is the fault if
# the device node is wrong as well.
@rows(
    "text, heartbeat, fault, detail, fault_and_wrong_node",
    """
    it beats           5            5  -             -             no-node
    no such file       ENOENT       -  -             -             no-node
    all ones           4294967295   -  bus-dead      -             bus-dead
    no number          N/A          -  unreadable    not a number  no-node
    11 digits          10000000000  -  unreadable    not a number  no-node
    a policy's EACCES  EACCES       -  unreadable    EACCES        no-node
    firmware has none  ENODATA      -  no-heartbeat  -             no-node
    detached           ENODEV       -  gone          -             gone
    """,
)
def test_a_heartbeat_file_says_what_is_wrong(
    workdir: Path,
    text: str,
    heartbeat: str,
    fault: str,
    detail: str,
    fault_and_wrong_node: str,
) -> None:
    """A missing or wrong device node is reported only if nothing worse is."""
    tree = Tree(workdir, [FIRST])
    driver = Driver(tree)
    chip = driver.identify()
    if text.startswith("E"):
        driver.errors["tt_heartbeat"] = getattr(errno, text)
    else:
        tree.set(FIRST.pci, "tt_heartbeat", text)
    beat = None if heartbeat == "-" else int(heartbeat)
    _, reading = driver.discovery.read(chip)
    assert reading == tt.Reading(beat, fault.strip("-"), detail.strip("-"))

    for wrong_node in ("/dev/zero", "/dev", "nowhere"):
        relink(tree.node(FIRST.pci), wrong_node)
        _, reading = driver.discovery.read(chip)
        assert reading.fault == fault_and_wrong_node, wrong_node
        assert reading.heartbeat == beat, wrong_node


def test_a_folder_is_no_device_node(workdir: Path) -> None:
    """It is none even if it has the chip's device number."""
    assert not tt.is_device_node(str(workdir), "0:0")


@rows(
    "unreadable, heals, fault",
    """
    no file can be read           tt_heartbeat,tt_card_type  no   resetting
    the heartbeat alone can't     tt_heartbeat               no   no-heartbeat
    a reset ends in between       tt_heartbeat               yes  resetting
    """,
)
def test_a_reset_is_not_taken_for_firmware_without_a_heartbeat(
    workdir: Path, unreadable: str, heals: str, fault: str
) -> None:
    """Both give ENODATA, but in a reset each file does."""
    driver = Driver(Tree(workdir, [FIRST]))
    chip = driver.identify()
    driver.errors = dict.fromkeys(unreadable.split(","), errno.ENODATA)

    def end_reset(name: str) -> None:
        if name == "tt_card_type":
            driver.errors.clear()

    if heals == "yes":
        driver.before_read = end_reset
    _, reading = driver.discovery.read(chip)
    assert reading == tt.Reading(None, fault)


def test_a_dead_bus_is_reported_before_what_it_hides(workdir: Path) -> None:
    """None of its files makes sense, but the card is not just unidentified."""
    ones = "F" * 16
    chip = replace(FIRST, card_type="unknown", asic_id=ones, serial=ones)
    tree = Tree(workdir, [chip])
    tree.set(FIRST.pci, "tt_heartbeat", f"{0xFFFFFFFF}")
    snapshot = inventory_of(tree).poll(0.0)
    assert summary(snapshot) == f"- {FIRST.pci} 0 -bus-dead"


def test_an_asic_id_is_waited_for_if_the_card_type_is_there(workdir: Path) -> None:
    """The driver makes one file after the other."""
    tree = Tree(workdir, [replace(FIRST, asic_id="")])
    path = tree.entry(FIRST.pci) / "tt_asic_id"
    driver = Driver(tree)

    def appear(name: str) -> None:
        if name == "tt_card_type" and name in driver.files:
            path.write_text("A" * 16)

    driver.before_read = appear
    began = time.monotonic()
    assert driver.identify().card_id == "wormhole-" + "A" * 16
    assert time.monotonic() - began >= 0.1, "the driver may take that long"


def test_an_asic_id_that_comes_late_is_taken(workdir: Path) -> None:
    """Until then the card goes by its PCI address, as if its driver had no ASIC ids."""
    tree = Tree(workdir, [replace(FIRST, asic_id="")])
    driver = Driver(tree)
    chip = driver.identify()
    assert chip.card_id == FIRST.pci
    tree.set(FIRST.pci, "tt_asic_id", f"{FIRST.asic_id}\n")
    known, _ = driver.discovery.read(chip)
    assert known.card_id == FIRST.id


@rows(
    "serial, unidentified",
    """
    its own             000004513190F004  -
    not programmed      0000045100000000  no-serial
    empty fuses         0000000000000000  unidentified
    no such file        -                 unidentified
    """,
)
def test_a_p300_without_a_serial_of_its_own_is_not_identified(
    workdir: Path, serial: str, unidentified: str
) -> None:
    """Nobody knows which two chips are on one board."""
    tree = Tree(workdir, [replace(P300[0], index=0, serial=serial.strip("-"))])
    chip = Driver(tree).identify()
    assert chip.unidentified == unidentified.strip("-")


def test_a_serial_that_is_not_programmed_is_named(workdir: Path) -> None:
    """No remedy is named, because neither a reset nor an update helps."""
    serial = "0000045100000000"
    chips = [replace(chip, heartbeat=False, serial=serial) for chip in P300]
    snapshot = inventory_of(Tree(workdir, chips)).poll(0.0)
    kinds = "- 0000:03:00.0 0 ?no-serial, - 0000:04:00.0 1 ?no-serial"
    assert summary(snapshot) == kinds
    reason = snapshot.cards[0].verdict.reason
    assert f"{serial}, is not programmed" in reason
    assert "tt-smi" not in reason


# A driver before 2.7 makes neither heartbeat nor ASIC id.
@pytest.mark.parametrize("chip", [FIRST, replace(SILENT, asic_id="")])
def test_an_identified_chip_has_one_file_read(workdir: Path, chip: Chip) -> None:
    """It is the heartbeat: before driver 2.7 any other read could oops the kernel."""
    driver = Driver(Tree(workdir, [chip]))
    known = driver.identify()
    driver.files.clear()
    open_files = len(os.listdir("/proc/self/fd"))
    again, _ = driver.discovery.read(known)
    assert again == known
    assert driver.files == ["tt_heartbeat"]
    assert len(os.listdir("/proc/self/fd")) == open_files


def test_firmware_is_read_again_after_a_reset_in_place(workdir: Path) -> None:
    """It is not read while the bus is dead."""
    tree = Tree(workdir, [FIRST])
    driver = Driver(tree)
    chip = driver.identify()
    tree.set(FIRST.pci, "tt_fw_bundle_ver", "80.18.0.0\n")
    driver.errors = dict.fromkeys(("tt_heartbeat", "tt_card_type"), errno.ENODATA)
    resetting, _ = driver.discovery.read(chip)
    assert resetting == replace(chip, firmware="")

    driver.errors.clear()
    tree.set(FIRST.pci, "tt_heartbeat", f"{0xFFFFFFFF}")
    dead, _ = driver.discovery.read(resetting)
    assert dead == resetting
    tree.set(FIRST.pci, "tt_heartbeat", "5")
    back, _ = driver.discovery.read(resetting)
    assert back == replace(chip, firmware="80.18.0.0")


def test_a_chip_that_is_probed_anew_is_identified_anew(workdir: Path) -> None:
    """It is recognised by its folder's inode; the folder's timestamps mean nothing."""
    tree = Tree(workdir, [SILENT])
    inventory = inventory_of(tree)
    inventory.poll(0.0)
    tree.set(FIRST.pci, "tt_serial", "A" * 16)
    os.utime(tree.entry(FIRST.pci), (1, 1))
    (card,) = inventory.poll(1.0).cards
    assert card.chips[0].serial == FIRST.serial

    probe_anew(tree, FIRST.pci)
    (card,) = inventory.poll(2.0).cards
    assert card.chips[0].serial == "A" * 16


@pytest.mark.parametrize("taken", [True, False], ids=["taken", "vanished"])
def test_what_is_read_while_n_is_taken_is_nothing(workdir: Path, taken: bool) -> None:
    """If another chip takes N during the read, or N vanishes, the first one is gone."""
    tree = Tree(workdir, [FIRST, SECOND])
    link = tree.sys / "class/tenstorrent/tenstorrent!0"
    driver = Driver(tree)

    def go_away(name: str) -> None:
        if name == "tt_card_type":
            link.unlink()
            if taken:
                link.symlink_to(tree.entry(SECOND.pci))

    driver.before_read = go_away
    chip = driver.chip()
    assert driver.discovery.read(chip) == (chip, tt.Reading(fault="gone"))


def test_only_class_entries_that_lead_to_a_pci_function_are_chips(
    workdir: Path,
) -> None:
    """The entry's name has the driver's form. The function may be below any bridge."""
    tree = Tree(workdir, [FIRST])
    folder = tree.sys / "class/tenstorrent"
    bridges = ("pci10000:40", "10000:40:01.1", "10000:41:00.0")
    below = tree.sys.joinpath("devices", *bridges, "10000:42:00.0")
    below.mkdir(parents=True)
    for name in (
        "by-id",
        *(f"tenstorrent!{n}" for n in ("", "x", "00", "0x", "1" * 7)),
    ):
        (folder / name).symlink_to(tree.entry(FIRST.pci))
    (folder / "tenstorrent!2").symlink_to("nowhere")
    for index, target in enumerate((str(below), "device", "/", ".."), start=13):
        (folder / f"tenstorrent!{index}").mkdir()
        (folder / f"tenstorrent!{index}/device").symlink_to(target)
    found = inventory_of(tree).discovery.chips()
    assert sorted((chip.index, chip.pci, chip.pci_path) for chip in found) == [
        (0, FIRST.pci, ("pci0000:01",)),
        (13, "10000:42:00.0", bridges),
    ]


def test_a_class_that_cannot_be_listed_is_an_error(workdir: Path) -> None:
    """It is not taken for a node without cards."""
    tree = Tree(workdir, [FIRST])
    shutil.rmtree(tree.sys / "class")
    (tree.sys / "class").symlink_to("class")
    with pytest.raises(OSError, match="symbolic links"):
        inventory_of(tree).discovery.chips()


@rows(
    "link, kind, driver",
    """
    another driver has it     drivers/vfio-pci     no-driver  vfio-pci
    none has it               -                    no-driver  none
    a driver of an odd name   drivers/driver       no-driver  driver
    the driver's link dangles  drivers/{gone}      no-driver  {gone}
    it is bound a moment ago  drivers/tenstorrent  pending    -
    """,
)
def test_pci_functions_without_a_class_device_are_listed(
    workdir: Path, link: str, kind: str, driver: str
) -> None:
    """They are listed with the driver that has them, and are not offered.

    The right driver has one a moment before the device node is there.
    """
    tree = Tree(workdir, [SILENT, SECOND])
    tree.remove(SECOND.pci, driver="x")
    (tree.pci(SECOND.pci) / "driver").unlink()
    if link != "-":
        (tree.pci(SECOND.pci) / "driver").symlink_to(f"../../../bus/pci/{link}")
    tree.write(tree.sys / "bus/pci/devices/0000:99:00.0/vendor", "0x8086\n")
    snapshot = inventory_of(tree).poll(0.0)
    assert summary(snapshot) == f"n150 {FIRST.id} 0 +ok, - {SECOND.pci}  ?{kind}"
    _, card = snapshot.cards
    assert (f" is {driver}, not" in card.verdict.reason) == (kind == "no-driver")
    assert card.chips[0].arch == "wormhole"


def test_a_driver_that_lets_go_has_no_name(workdir: Path) -> None:
    """The link to it may vanish at any moment: then it is "none", and not "driver"."""
    tree = Tree(workdir, [SECOND])
    tree.remove(SECOND.pci, driver="vfio-pci")
    link = tree.pci(SECOND.pci) / "driver"
    discovery = inventory_of(tree).discovery
    done = threading.Event()

    def bind_and_unbind() -> None:
        while not done.is_set():
            relink(link, os.readlink(link))

    names: set[str] = set()

    def several_are_seen() -> bool:
        for _ in range(2000):
            (listed,) = discovery.unclaimed(set())
            names.update(re.findall(r"driver is (\S+),", listed.verdict.reason))
        return len(names) > 1

    with ThreadPoolExecutor(1) as pool:
        binding = pool.submit(bind_and_unbind)
        try:
            wait_until(several_are_seen)
        finally:
            done.set()
    binding.result()
    assert names == {"none", "vfio-pci"}


def test_a_card_without_its_driver_is_gone(workdir: Path) -> None:
    """Its PCI function is still there, and is listed by its address."""
    tree = Tree(workdir, [SILENT])
    inventory = inventory_of(tree)
    inventory.poll(0.0)
    tree.remove(FIRST.pci, driver="vfio-pci")
    expected = f"n150 {FIRST.id} 0 -gone, - {FIRST.pci}  ?no-driver"
    assert summary(inventory.poll(1.0)) == expected


def test_a_pci_function_is_asked_for_its_vendor_once(workdir: Path) -> None:
    """A host has hundreds of them, and each poll looks at all."""
    tree = Tree(workdir, [SILENT])
    tree.write(tree.sys / "bus/pci/devices/0000:99:00.0/vendor", "0x8086\n")
    driver = Driver(tree)
    for _ in range(3):
        assert not driver.discovery.unclaimed({FIRST.pci})
    assert driver.files == ["vendor", "vendor"]


def test_a_pci_function_that_comes_later_is_listed(workdir: Path) -> None:
    """It is found even though no driver takes it, so no class device has come."""
    tree = Tree(workdir, [SILENT])
    inventory = inventory_of(tree)
    inventory.poll(0.0)
    tree.write(tree.sys / "module/tenstorrent/version", "2.11.0\n")
    tree.write(tree.sys / "bus/pci/devices/0000:98:00.0/vendor", "0x1e52\n")
    inventory.poll(1.0)
    assert inventory.snapshot.driver == "2.11.0"
    expected = f"n150 {FIRST.id} 0 +ok, - 0000:98:00.0  ?no-driver"
    assert summary(inventory.snapshot) == expected


# ==== Appendix B. Health: what follows from one reading after another =================


def test_readme_names_each_kind_of_verdict() -> None:
    """Its table has each kind's health, for a card that was never offered."""
    named = {}
    for seen, verdict, _ in table("what the plugin sees, once a second"):
        (kind, *_) = in_code(seen)
        named[kind] = "pending" if verdict == "not offered" else verdict
    assert named == {kind: health for kind, (health, _) in tt.KINDS.items()}


# A poll is "t=9 beat=1 -> hung": the time in seconds, what is read, and the kind of the
# verdict. "beat=1+" was seen to change during the read; "no-file" is a chip that has no
# heartbeat. Any other word is the fault that is read, or why the chip is not
# identified; without "->", the verdict has that kind, too.
HEALTH_POLL = re.compile(r"t=([\d.]+)(?: ([a-z-]+))?(?: beat=(\d+)(\+?))?(?: -> (.+))?")
NOT_IDENTIFIED = ("pending", "unidentified", "no-serial")
HANGS = "t=0 beat=1+ -> ok; t=1 beat=1 -> ok; t=2 beat=1 -> ok; t=13 beat=1 -> hung"
RESETS = "t=0 beat=1+ -> ok; t=1 resetting"


def check_health(polls: str) -> None:
    """Assert each poll's verdict on a chip that has appeared at t=0."""
    history = tt.HealthHistory(1e6)
    for poll in polls.split("; "):
        match = HEALTH_POLL.fullmatch(poll)
        assert match, poll
        seconds, seen, beat, changed, kind = match.groups(default="")
        now = 1e6 + float(seconds)
        why_unidentified = seen if seen in NOT_IDENTIFIED else ""
        is_fault = seen not in ("no-file", *NOT_IDENTIFIED)
        chip = replace(FIRST, unidentified=why_unidentified)
        reading = tt.Reading(
            heartbeat=int(beat) if beat else None,
            fault=seen if is_fault else "",
            changed=changed == "+",
        )
        history.observe(reading, now)
        verdict = history.verdict(chip, reading, now)
        assert verdict.kind == (kind or seen), poll


@rows(
    "polls",
    """
    it changes, or begins anew  t=0 beat=4294967294+ -> ok; t=1 beat=0 -> ok;\
 t=99 beat=7 -> ok; t=200 beat=3 -> ok
    no file                     t=0 no-file -> ok; t=50 no-file -> ok;\
 t=99 no-file -> ok; t=999 no-file -> ok
    it has to change once       t=0 beat=1 -> hung; t=1 beat=1 -> hung;\
 t=99 beat=1 -> hung; t=100 beat=2 -> ok
    ... even if it comes later  t=0 no-file -> ok; t=9 beat=1 -> hung;\
 t=10 beat=2 -> ok
    ... or can be read later    t=0 unreadable; t=9 beat=1 -> hung; t=10 beat=2 -> ok
    ... or is known later       t=0 pending beat=1; t=9 beat=1 -> hung;\
 t=10 beat=2 -> ok
    ... or at once              t=0 unreadable; t=9 beat=1+ -> ok
    """,
)
def test_a_heartbeat_has_to_change_once(polls: str) -> None:
    """A chip without a heartbeat is Healthy without that."""
    check_health(polls)


@rows(
    "polls",
    f"""
    equal for over 12 s        t=0 beat=1+ -> ok; t=4 beat=1 -> ok; t=8 beat=1 -> ok;\
 t=12 beat=1 -> ok; t=12.1 beat=1 -> hung; t=99 beat=1 -> hung
    ... and in 3 reads         t=0 beat=1+ -> ok; t=30 beat=1 -> ok;\
 t=31 beat=1 -> ok; t=32 beat=1 -> hung
    ... since it last changed  t=0 beat=1+ -> ok; t=99 beat=2 -> ok;\
 t=100 beat=2 -> ok; t=101 beat=2 -> ok; t=102 beat=2 -> ok; t=111.1 beat=2 -> hung
    ... until 2 changes        {HANGS}; t=14 beat=2 -> hung; t=15 beat=2 -> hung;\
 t=16 beat=3 -> ok
    ... and again              {HANGS}; t=14 beat=2 -> hung; t=15 beat=2 -> hung;\
 t=16 beat=2 -> hung; t=27 beat=2 -> hung; t=28 beat=3 -> hung; t=29 beat=4 -> ok
    ... and its files go       {HANGS}; t=14 no-file -> gone; t=15 beat=2 -> hung
    SIGSTOP is no silence      t=0 beat=1+ -> ok; t=1 beat=1 -> ok;\
 t=600 beat=1 -> ok; t=600.1 beat=2 -> ok; t=601 beat=2 -> ok
    """,
)
def test_a_heartbeat_that_stands_still_is_a_hang(polls: str) -> None:
    """Two changes end it, because one can be the last."""
    check_health(polls)


@rows(
    "polls",
    f"""
    a reset until 1 change after  {RESETS}; t=2 beat=7 -> resetting;\
 t=3 beat=7 -> resetting; t=4 beat=8 -> ok
    ... in the first read         {RESETS}; t=2 beat=7+ -> ok
    ... then its files go         {RESETS}; t=2 no-file -> resetting;\
 t=3 beat=1 -> resetting; t=4 no-file -> gone
    ... ends a hang               {HANGS}; t=14 resetting; t=15 beat=2 -> resetting;\
 t=16 beat=3 -> ok
    a dead bus until 1 change     t=0 beat=1+ -> ok; t=1 bus-dead;\
 t=2 beat=1 -> bus-dead; t=3 beat=2 -> ok
    """,
)
def test_a_reset_or_a_dead_bus_ends_when_the_heartbeat_changes(polls: str) -> None:
    """Even a chip that hung before is Healthy then."""
    check_health(polls)


@rows(
    "polls",
    f"""
    gone until it is back          t=0 beat=1+ -> ok; t=1 gone; t=99 gone;\
 t=100 beat=1 -> ok; t=101 no-file -> gone; t=102 beat=1 -> ok
    no device node                 t=0 beat=1+ -> ok; t=1 no-node beat=2;\
 t=14 no-node beat=3; t=15 beat=4 -> ok
    ... while it hangs             t=0 beat=1+ -> ok; t=4 beat=1 -> ok;\
 t=8 beat=1 -> ok; t=13 no-node beat=1; t=14 beat=1 -> hung
    a read hangs until it returns  t=0 beat=1+ -> ok; t=2 read-hangs; t=99 read-hangs;\
 t=100 beat=1 -> ok
    ... is no equal read           t=0 beat=1+ -> ok; t=1 beat=1 -> ok;\
 t=2 read-hangs; t=99 beat=1 -> ok; t=99.1 beat=1 -> hung
    not readable is not dead       t=0 beat=1+ -> ok; t=1 unreadable; t=9 unreadable;\
 t=99 unreadable; t=100 beat=1 -> ok
    ... nor healed                 {HANGS}; t=14 unreadable -> hung;\
 t=15 beat=3 -> hung; t=16 beat=4 -> ok
    firmware has none              t=0 beat=1+ -> ok; t=1 no-heartbeat;\
 t=99 no-heartbeat; t=100 beat=1 -> hung; t=101 beat=2 -> ok
    ... since a reset              {RESETS}; t=2 no-heartbeat
    """,
)
def test_other_faults_end_when_they_are_not_seen_any_more(polls: str) -> None:
    """None of them heals a hang, or proves one."""
    check_health(polls)


@rows(
    "polls",
    f"""
    no telemetry for 130 s  t=0 pending; t=130 pending;\
 t=130.1 pending -> no-telemetry; t=132 beat=1+ -> ok
    ... and a dead bus      t=0 bus-dead; t=200 pending -> no-telemetry
    not identified          t=0 unidentified; t=999 unidentified; t=1000 beat=1+ -> ok
    its serial is empty     t=0 no-serial; t=999 no-serial
    a hang is remembered    {HANGS}; t=14 unidentified beat=2; t=15 beat=2 -> hung
    """,
)
def test_an_unidentified_chip_has_the_kind_that_says_why(polls: str) -> None:
    """Its verdict does not change until it is identified, except for `no-telemetry`."""
    check_health(polls)


# ---- A chip proves itself before it is Healthy ----


def test_a_chip_that_hangs_before_the_start_is_not_healthy(
    tree: Tree, bound: Bound
) -> None:
    """The chip beside it is Healthy in the first snapshot, which waits for both."""
    tree.still.add(FIRST.pci)
    tree.add(FIRST)
    tree.add(SECOND)
    began = time.monotonic()
    snapshot = inventory_of(tree).poll(began)
    seconds = time.monotonic() - began
    bound("a first poll with a hung chip", seconds, 1.5)
    assert seconds >= 1.1, "a chip that beats once a second must get its chance"
    assert summary(snapshot) == f"n150 {FIRST.id} 0 -hung, n150 {SECOND.id} 1 +ok"


def test_a_chip_that_is_probed_anew_proves_itself_anew(tree: Tree) -> None:
    """After a reset it has another class device, but its heartbeat may be the same."""
    tree.add(FIRST)
    inventory = inventory_of(tree)
    assert summary(inventory.poll(0.0)) == f"n150 {FIRST.id} 0 +ok"
    tree.still.add(FIRST.pci)
    probe_anew(tree, FIRST.pci)
    assert summary(inventory.poll(1.0)) == f"n150 {FIRST.id} 0 -hung"


def test_a_proof_takes_two_beats_at_most(four: Tree, bound: Bound) -> None:
    """At ten beats a second, a start takes at most 0.2 s longer."""
    began = time.monotonic()
    snapshot = inventory_of(four).poll(began)
    bound("four cards found and proven", time.monotonic() - began, 0.2)
    assert [card.verdict.kind for card in snapshot.cards] == ["ok"] * 4


def test_one_proof_is_enough(workdir: Path) -> None:
    """Later reads read the heartbeat once. After a reset a chip proves itself again."""
    tree = Tree(workdir, [FIRST])
    driver = Driver(tree)

    def beat(name: str) -> None:
        tree.beat()

    driver.before_read = beat
    chip, first = tt.read_chip(driver.discovery, driver.chip(), tt.Reading())
    assert first.changed
    driver.files.clear()
    _, second = tt.read_chip(driver.discovery, chip, first)
    assert driver.files == ["tt_heartbeat"]
    assert not second.changed

    driver.files.clear()
    _, after = tt.read_chip(driver.discovery, chip, tt.Reading(fault="resetting"))
    assert driver.files == ["tt_heartbeat"] * 2
    assert after.changed


def test_a_chip_is_proven_as_soon_as_it_is_identified(workdir: Path) -> None:
    """Before that, its heartbeat is read once, without waiting for a change."""
    tree = Tree(workdir, [replace(FIRST, card_type="")])
    driver = Driver(tree)
    chip, first = tt.read_chip(driver.discovery, driver.chip(), tt.Reading())
    assert driver.files.count("tt_heartbeat") == 1

    def beat(name: str) -> None:
        tree.beat()

    driver.before_read = beat
    tree.set(FIRST.pci, "tt_card_type", "n150\n")
    _, second = tt.read_chip(driver.discovery, chip, first)
    assert second.changed


# ==== Appendix C. Guards: one plugin per node; no chip for two Pods ===================

# ---- Instances ----


class Instances:
    """Instances that start and end: which of them holds the lock."""

    def __init__(self, kubelet: Kubelet, tree: Tree, launch: Launch) -> None:
        self.kubelet = kubelet
        self.tree = tree
        self.launch = launch
        self.started: list[Plugin] = []
        self.there: set[int] = set()  # process IDs
        self.holder = 0  # its process ID, or 0
        kubelet.start()

    def start(self) -> None:
        """The next instance starts. It serves if it is the only one."""
        mark = self.kubelet.log.mark()
        plugin = self.launch(self.tree, self.kubelet)
        self.started.append(plugin)
        self.there.add(plugin.process.pid)
        if self.holder:
            plugin.wait_for_line(STANDING_BY)
        self.check(mark)

    def end(self, number: int, how: signal.Signals = signal.SIGKILL) -> None:
        """One instance ends. Another one serves, if there is one."""
        mark = self.kubelet.log.mark()
        plugin = self.started[number]
        self.there.remove(plugin.process.pid)
        plugin.end(how)
        self.check(mark)

    def replace_the_folder(self) -> None:
        """A new kubelet makes its folder anew: nobody has a lock on that."""
        mark = self.kubelet.log.mark()
        self.kubelet.kill()
        self.kubelet.delete_folder()
        self.kubelet.start()
        self.holder = 0
        self.check(mark)

    def check(self, mark: int) -> None:
        """One of them serves, and only the end of that one reaches the kubelet."""
        if self.holder in self.there:
            self.kubelet.log.expect_nothing(0.1, mark)
        elif self.there:
            self.kubelet.wait_status(R150, 4, 4, after=mark)
            registered = self.kubelet.seen("register", after=mark)
            endpoints = [event["endpoint"] for event in registered]
            assert self.kubelet.plugin_sockets() == endpoints
        holders = self.lock_holders() & self.there
        assert len(holders) == bool(self.there)
        assert self.holder in holders or self.holder not in self.there
        self.holder = max(holders, default=0)

    def lock_holders(self) -> set[int]:
        """Process IDs that hold the lock, by what Linux says."""
        inode = self.kubelet.folder.stat().st_ino
        locks = Path("/proc/locks").read_text()
        return {*map(int, re.findall(rf"FLOCK .* (\d+) \S+:{inode} 0", locks))}


@pytest.fixture
def instances(kubelet: Kubelet, four: Tree, launch: Launch) -> Instances:
    """None is started yet."""
    return Instances(kubelet, four, launch)


def test_one_instance_serves_at_a_time(instances: Instances) -> None:
    """One after another."""
    instances.start()
    instances.end(0)
    instances.start()
    instances.end(1, signal.SIGTERM)


def test_the_next_instance_takes_over(instances: Instances) -> None:
    """However the one before it has ended."""
    for _ in range(3):
        instances.start()
    instances.end(0)
    holder = 1 if instances.holder == instances.started[1].process.pid else 2
    instances.end(holder, signal.SIGTERM)
    instances.end(3 - holder)


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_the_end_of_one_that_stands_by_is_nothing(
    instances: Instances, how: signal.Signals
) -> None:
    """The kubelet hears of the holder only."""
    instances.start()
    instances.start()
    instances.end(1, how)
    instances.start()
    instances.end(0)
    instances.end(2)


def test_a_new_folder_has_a_new_lock(instances: Instances) -> None:
    """One of two instances gets it."""
    instances.start()
    instances.start()
    instances.replace_the_folder()
    instances.end(1, signal.SIGTERM)
    instances.end(0)


def test_the_lock_goes_last(kubelet: Kubelet, four: Tree) -> None:
    """serve() ends when all that it began has ended.

    The next instance finds no socket, and no registration of this one follows. A stream
    that ends at the same time is no exception.
    """
    settings = tt.Settings(kubelet.root, four.sys, four.dev)
    kubelet.start()

    async def main() -> None:
        for number in range(10):
            mark = kubelet.log.mark()
            plugin = asyncio.create_task(tt.serve(settings))
            await asyncio.to_thread(kubelet.wait_status, R150, 4, 4, after=mark)
            if number % 2:
                await asyncio.to_thread(kubelet.drop_stream, R150)
            await asyncio.sleep(number / 1000)
            plugin.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await plugin
            assert not kubelet.plugin_sockets()
            tasks = [task for task in asyncio.all_tasks() if "Registrar" in repr(task)]
            assert not tasks

    with contextlib.ExitStack() as stack:
        stack.callback(os.umask, os.umask(0o077))  # this process's is as before
        asyncio.run(main())


def test_stale_sockets_are_removed(
    kubelet: Kubelet, four: Tree, plugin: Plugin, launch: Launch
) -> None:
    """Those that a killed instance has left."""
    (stale,) = kubelet.plugin_sockets()
    plugin.end(signal.SIGKILL)
    kubelet.wait_status(R150, 4, 0)
    assert kubelet.plugin_sockets() == [stale]
    heir = launch(four, kubelet, offers=4)
    assert stale not in kubelet.plugin_sockets()
    heir.wait_for_line(f"removed {stale}: left behind")


def test_what_is_not_stale_stays(kubelet: Kubelet, four: Tree, launch: Launch) -> None:
    """Sockets of others, one at which somebody listens, and what is no socket."""
    kubelet.start()
    names = ("nvidia-gpu", "tenstorrent-n150-zzzzzz", "tenstorrent-n150-aaaaaa")
    paths = [kubelet.folder / f"{name}.sock" for name in names]
    no_socket = kubelet.folder / "tenstorrent-n150-bbbbbb.sock"
    no_socket.touch()
    with contextlib.ExitStack() as stack:
        for path in paths:
            other = stack.enter_context(socket.socket(socket.AF_UNIX))
            other.bind(str(path))
        other.listen(0)
        launch(four, kubelet, offers=4)
        assert all(path.is_socket() for path in paths)
    assert no_socket.exists()


def test_without_cards_one_instance_stands_by(
    kubelet: Kubelet, tree: Tree, launch: Launch
) -> None:
    """As it would with cards, so that a rolling update goes on."""
    kubelet.start()
    first = launch(tree, kubelet, HTTP)
    first.wait_for_line("waiting for some")
    second = launch(tree, kubelet, HTTP)
    second.wait_for_line("waiting for some")  # its first poll has ended
    assert STANDING_BY in fetch(second, "/readyz")[1]
    first.end()

    def serves() -> bool:
        return "no cards to register" in fetch(second, "/readyz")[1]

    wait_until(serves)


# ---- The kubelet's own record: moved cards ----


@pytest.fixture
def two(tree: Tree) -> Tree:
    """A node with two n150, whose device nodes lead to different devices.

    A device number goes with N. Udev has made no links.
    """
    tree.add(FIRST)
    tree.add(replace(SECOND, target=DEVICES[1]))
    return tree


def swap_numbers(kubelet: Kubelet, tree: Tree) -> None:
    """Two cards come back from a reset, each with the other's N."""
    mark = kubelet.log.mark()
    first = tree.remove(FIRST.pci)
    second = tree.remove(SECOND.pci)
    kubelet.wait_status(R150, 2, 0, after=mark)
    tree.add(replace(first, index=1, target=DEVICES[1]))
    tree.add(replace(second, index=0, target=DEVICES[0]))
    kubelet.wait_status(R150, 2, 2, after=mark)


@both_generations
@pytest.mark.parametrize("restarts", ["nothing", "the plugin", "the kubelet"])
def test_no_container_restarts_on_another_card(
    kubelet: Kubelet, two: Tree, launch: Launch, restarts: str
) -> None:
    """Its answer names /dev/tenstorrent/0, which is another Pod's card by now."""
    plugin = launch(two, kubelet, FAST, offers=2)
    kubelet.admit("pod", {R150: 1}, {R150: [FIRST.id]})
    (device,) = kubelet.start_container("pod")["devices"]
    assert device["resolved"] == DEVICES[0]

    mark = kubelet.log.mark()
    if restarts == "the plugin":
        plugin.end(signal.SIGKILL)
        launch(two, kubelet, FAST, offers=2)
    if restarts == "the kubelet":
        kubelet.kill()
        kubelet.start()
        kubelet.wait_status(R150, 2, 2, after=mark)
    swap_numbers(kubelet, two)
    with refused(
        "FAILED_PRECONDITION",
        f"card {FIRST.id} (n150, /dev/tenstorrent/1): it was /dev/tenstorrent/0 when",
    ):
        kubelet.start_container("pod")


@rows(
    "hugepages, refused_by",
    """
    without huge pages  never
    with huge pages     always  both would use the same huge page files
    """,
)
def test_a_container_gets_its_moved_card_by_udevs_link(
    kubelet: Kubelet, two: Tree, launch: Launch, hugepages: str, refused_by: str
) -> None:
    """Not with huge pages, whose files are named after the N that it has inside."""
    two.link(FIRST.pci)
    flags = [FAST, f"--hugepages={hugepages}"]
    plugin = launch(two, kubelet, *flags, offers=2)
    kubelet.admit("pod", {R150: 1}, {R150: [FIRST.id]})
    swap_numbers(kubelet, two)
    two.link(FIRST.pci)
    plugin.end(signal.SIGKILL)
    launch(two, kubelet, *flags, offers=2)
    if refused_by:
        with refused("FAILED_PRECONDITION", f"card {FIRST.id} ", refused_by):
            kubelet.start_container("pod")
    else:
        (device,) = kubelet.start_container("pod")["devices"]
        assert device["container_path"] == "/dev/tenstorrent/0"
        assert device["resolved"] == DEVICES[1]


def test_udevs_links_may_come_later_and_be_away(
    kubelet: Kubelet, tree: Tree, launch: Launch
) -> None:
    """A container restarts, as long as none leads to another card."""
    resource = "tenstorrent.com/p300"
    one, other = P300
    tree.add(replace(one, by_id=True))
    tree.add(other)
    kubelet.start()
    launch(tree, kubelet)
    kubelet.wait_status(resource, 1, 1)
    devices = kubelet.admit("pod", {resource: 1})["devices"]
    paths = [device["host_path"] for device in devices]
    assert paths == [f"/dev/tenstorrent/by-id/{one.id}", "/dev/tenstorrent/1"]

    tree.link(other.pci)
    kubelet.start_container("pod")
    (tree.by_id / one.id).unlink()
    kubelet.pre_start(resource, [P300_ID])  # the runtime would try again
    (tree.by_id / one.id).symlink_to("../7")  # udev is late: nothing is there
    kubelet.pre_start(resource, [P300_ID])


def discovery_of(tree: Tree) -> tt.Discovery:
    """What the plugin sees of this tree."""
    settings = tt.Settings(sysfs_root=tree.sys, dev_root=tree.dev)
    return tt.TenstorrentDiscovery(settings)


def snapshot_of(tree: Tree) -> tt.Snapshot:
    """The cards of this tree, all healthy: those with one chip."""
    discovery = discovery_of(tree)
    members = []
    for listed in discovery.chips():
        chip, _ = discovery.read(listed)
        members.append(tt.JudgedChip(chip, tt.make_verdict("ok")))
    return tt.next_snapshot(tt.Snapshot(), members, tt.Settings(), now=0.0)


@pytest.fixture
def swapped(workdir: Path) -> Tree:
    """The first card is N = 1, and the second N = 0. Udev has made links to both."""
    first = replace(FIRST, index=1, target=DEVICES[1], by_id=True)
    return Tree(workdir, [first, replace(SECOND, index=0, by_id=True)])


def held(
    resource: str,
    *ids: str,
    pod: str = "other",
    paths: Sequence[str] = (),
    inside: str = "0",
    **answer: Any,
) -> tt.Holding:
    """What a container holds: `paths` in /dev/tenstorrent, which is N = `inside`."""
    devices = []
    for path in paths:
        host = Path("/dev/tenstorrent") / path  # an absolute one stays as it is
        node = f"/dev/tenstorrent/{inside}"
        devices.append(api.DeviceSpec(container_path=node, host_path=str(host)))
    given = api.ContainerAllocateResponse(devices=devices, **answer)
    return tt.Holding(pod, resource, frozenset(ids), given)


# What a container was given of the first card: a path, its N inside, and what else.
# "late": the card's link still leads to the other card.
@rows(
    "path, inside, also, why",
    """
    its node is as before       1             1
    its link, another N inside  by-id/FIRST   0  -
    ... and huge pages          by-id/FIRST   0  pages  it is /dev/tenstorrent/0 in
    huge pages, N as before     by-id/FIRST   1  pages
    a CDI name, another N       by-id/FIRST   0  cdi    it was /dev/tenstorrent/0 when
    a CDI name, N as before     by-id/FIRST   1  cdi
    its link leads elsewhere    by-id/FIRST   1  late   it was /dev/tenstorrent/by-id/
    another card's node         0             0  -      it was /dev/tenstorrent/0 when
    another card's link         by-id/SECOND  0  -      it was /dev/tenstorrent/by-id/
    a node that is gone         7             7  -      it was /dev/tenstorrent/7 when
    a link that is gone         by-id/NOBODY  0  -      it was /dev/tenstorrent/by-id/
    another maker's device      /dev/nvidia0  1
    """,
)
def test_what_was_given_must_still_be_right(
    swapped: Tree, path: str, inside: str, also: str, why: str
) -> None:
    """Each thing that would be wrong in the container keeps it from starting."""
    path = path.replace("FIRST", FIRST.id).replace("SECOND", SECOND.id)
    answer: dict[str, Any] = {}
    if also == "pages":
        answer["mounts"] = [api.Mount(host_path="/dev/hugepages-1G")]
    if also == "cdi":
        answer["cdi_devices"] = [api.CDIDevice(name="tenstorrent.com/card=0")]
    if also == "late":
        relink(swapped.by_id / FIRST.id, "../0")
    own = held(R150, FIRST.id, pod="own", paths=[path], inside=inside, **answer)

    snapshot = snapshot_of(swapped)
    cards = [snapshot.of(R150)[FIRST.id]]
    problem = tt.find_conflict(discovery_of(swapped), snapshot, R150, cards, [own])
    assert (why in problem) if why else (problem == ""), problem


def test_each_card_must_still_be_right(swapped: Tree) -> None:
    """Of several, the one that is wrong is found, whichever container holds it."""
    snapshot = snapshot_of(swapped)
    cards = [*snapshot.of(R150).values()]
    good = held(R150, FIRST.id, paths=["1"], inside="1")
    bad = held(R150, SECOND.id, paths=["1"], inside="1")
    for record in ([good, bad], [bad, good]):
        problem = tt.find_conflict(discovery_of(swapped), snapshot, R150, cards, record)
        assert problem.startswith(f"card {SECOND.id} (n150, /dev/tenstorrent/0): it ")


# ---- The kubelet's own record: who holds a card ----

P150 = replace(FIRST, arch="blackhole", card_type="p150a")
P150_RESOURCE = "tenstorrent.com/p150"


@pytest.mark.parametrize(
    ("before", "flags", "resource"),
    [
        (P150, ["--variants"], "tenstorrent.com/p150a"),
        (P150, ["--resource-domain=example.com"], "example.com/p150"),
        (replace(P150, asic_id=""), [], P150_RESOURCE),
    ],
    ids=["--variants", "--resource-domain", "ASIC id"],
)
def test_a_card_under_another_name_does_not_go_to_a_second_pod(
    kubelet: Kubelet,
    tree: Tree,
    launch: Launch,
    before: Chip,
    flags: list[str],
    resource: str,
) -> None:
    """A flag was changed, or the driver has learned the ASIC id."""
    tree.add(before)
    kubelet.start()
    plugin = launch(tree, kubelet)
    kubelet.wait_status(P150_RESOURCE, 1, 1)
    (name,) = kubelet.admit("old", {P150_RESOURCE: 1})["ids"][P150_RESOURCE]
    plugin.end()
    tree.set(before.pci, "tt_asic_id", P150.asic_id)
    mark = kubelet.log.mark()
    launch(tree, kubelet, *flags)
    kubelet.wait_status(resource, 1, 1, after=mark)
    kubelet.admit("new", {resource: 1})
    words = f"Pod old holds it as {name} of {P150_RESOURCE}, by the kubelet's record"
    with refused("FAILED_PRECONDITION", f"card {P150.id} ", words):
        kubelet.start_container("new")


def give_card_by_another_plugin(
    kubelet: Kubelet, puppets: Puppets, pod: str, number: int
) -> None:
    """A Pod gets N = `number`, under that ID, from a plugin that ends then."""
    node = f"/dev/tenstorrent/{number}"
    device_spec = {"container_path": node, "host_path": node, "permissions": "rw"}
    plugin = puppets(R150)
    plugin.answers["Allocate"] = {"container_responses": [{"devices": [device_spec]}]}
    plugin.register()
    plugin.send(device(str(number)))
    kubelet.admit(pod, {R150: 1})
    plugin.close()


@both_generations
def test_a_card_of_another_plugins_pod_waits_for_its_end(
    kubelet: Kubelet, two: Tree, launch: Launch, puppets: Puppets
) -> None:
    """The kubelet forgets an ended Pod when it admits one (kubelet contract 8)."""
    kubelet.start()
    give_card_by_another_plugin(kubelet, puppets, "old", 0)
    launch(two, kubelet, offers=2)
    kubelet.admit("new", {R150: 1}, {R150: [FIRST.id]})
    kubelet.admit("beside", {R150: 1}, {R150: [SECOND.id]})
    kubelet.start_container("beside")
    words = (f"card {FIRST.id} ", f"Pod old holds it as 0 of {R150}", "delete this one")
    with refused("FAILED_PRECONDITION", *words):
        kubelet.start_container("new")
    kubelet.end_pod("old")
    with refused("FAILED_PRECONDITION", *words):
        kubelet.start_container("new")

    kubelet.end_pod("new")
    kubelet.admit("newer", {R150: 1}, {R150: [FIRST.id]})
    kubelet.start_container("newer")


def test_containers_of_one_pod_share_cards(
    kubelet: Kubelet, two: Tree, launch: Launch
) -> None:
    """An init container may have had more of them (kubelet contract 8)."""
    launch(two, kubelet, offers=2)
    ids = kubelet.admit("pod", {R150: 2}, container="init")["ids"][R150]
    kubelet.admit("pod", {R150: 1}, {R150: ids[:1]})
    for _ in range(2):
        kubelet.start_container("pod", "init")
        kubelet.start_container("pod")


# A container of another Pod: what it holds under another resource, the paths that it
# was given, the PCI addresses in its environment.
@rows(
    "ids, paths, addresses, holds",
    """
    by its ID                      FIRST         0             -            yes
    by its PCI address             0000:01:00.0  7             -            yes
    another card that is there     SECOND        1             -            no
    another that has gone          THIRD         7             -            no
    its node, by another plugin    0             1             -            yes
    its link, by another plugin    0             by-id/FIRST   -            yes
    another's node                 0             0             -            no
    both nodes                     0 1           0 1           -            yes
    no card of Tenstorrent's       GPU-1         /dev/nvidia1  -            no
    an ID of earlier, its address  p300-1        0             FIRST         yes
    ... as one of two addresses    p300-1        0             FIRST SECOND  yes
    ... another's address          p300-1        1             SECOND        no
    ... beside one that is there   p300-1 SECOND  0            FIRST SECOND  yes
    """,
)
def test_who_holds_a_card(
    swapped: Tree, ids: str, paths: str, addresses: str, holds: str
) -> None:
    """By an ID of its hardware; else by the addresses in the answer; else by paths."""
    names = {"FIRST": FIRST, "SECOND": SECOND, "THIRD": THIRD}
    envs = {"PATH": FIRST.pci}
    if addresses != "-":
        found = [names[word].pci for word in addresses.split()]
        envs["PCIDEVICE_X"] = ",".join(found)
    other = held(
        "example.com/x",
        *[names[word].id if word in names else word for word in ids.split()],
        paths=[path.replace("FIRST", FIRST.id) for path in paths.split()],
        envs=envs,
    )
    snapshot = snapshot_of(swapped)
    cards = [snapshot.of(R150)[FIRST.id]]
    problem = tt.find_conflict(discovery_of(swapped), snapshot, R150, cards, [other])
    assert ("Pod other holds it as" in problem) == (holds == "yes"), problem


@rows(
    "kind, holds",
    """
    a card that is there     ok         no
    gone                     gone       yes
    back, not identified     returning  yes
    its chip has another ID  replaced   yes
    """,
)
def test_an_id_of_earlier_may_still_be_listed(
    swapped: Tree, kind: str, holds: str
) -> None:
    """By the address, it may be this card that another Pod holds as a p300."""
    snapshot = snapshot_of(swapped)
    card = snapshot.of(R150)[FIRST.id]
    listed = replace(card, id=P300_ID, verdict=tt.Verdict("", kind, ""))
    snapshot = replace(snapshot, cards=(*snapshot.cards, listed))
    other = held(R300, P300_ID, envs={"PCIDEVICE_X": FIRST.pci})
    problem = tt.find_conflict(discovery_of(swapped), snapshot, R150, [card], [other])
    assert (f"holds it as {P300_ID}" in problem) == (holds == "yes"), problem


def test_a_chip_of_a_card_is_held_by_its_own_id(workdir: Path) -> None:
    """As long as a driver did not know that two chips are one card."""
    tree = Tree(workdir, P300)
    snapshot = snapshot_of(tree)
    (card,) = snapshot.cards
    assert card.resource
    for chip in P300:
        other = held("tenstorrent.com/blackhole", chip.id)
        problem = tt.find_conflict(
            discovery_of(tree), snapshot, card.resource, [card], [other]
        )
        assert f"Pod other holds it as {chip.id} of " in problem


def test_what_is_no_conflict(swapped: Tree) -> None:
    """The kubelet itself keeps one ID of one resource from two Pods.

    A Pod that has ended may still be in the record with it, and a Pod may hold a card
    under two resources.
    """
    snapshot = snapshot_of(swapped)
    cards = [snapshot.of(R150)[FIRST.id]]
    own = held(R150, FIRST.id, pod="own")
    ended = held(R150, FIRST.id, pod="ended")
    twice = held(R300, FIRST.id, pod="own")
    for record in ([], [own], [own, ended], [twice, own]):
        problem = tt.find_conflict(discovery_of(swapped), snapshot, R150, cards, record)
        assert problem == ""
    problem = tt.find_conflict(discovery_of(swapped), snapshot, R150, cards, [twice])
    assert "Pod own holds it" in problem


# ---- The kubelet's own record: reading it ----


@pytest.mark.parametrize(
    "ids", [{"-1": ["a", "b"]}, {"0": ["a", "b"], "1": ["b"]}, ["a", "b"]]
)
def test_records_of_all_kubelets_are_read(tmp_path: Path, ids: object) -> None:
    """IDs are listed by NUMA node, and before 1.20 without."""
    answer = api.ContainerAllocateResponse(envs={"A": "b"})
    entry = {
        "PodUID": "other",
        "ContainerName": "main",
        "ResourceName": R150,
        "DeviceIDs": ids,
        "AllocResp": base64.b64encode(answer.SerializeToString()).decode(),
    }
    record = {"Data": {"PodDeviceEntries": [entry]}, "Checksum": 1}
    path = tmp_path / "record"
    path.write_text(json.dumps(record))
    assert tt.read_record(path) == [held(R150, "a", "b", envs={"A": "b"})]


def test_a_record_may_be_empty(tmp_path: Path) -> None:
    """Go writes an empty list as null."""
    path = tmp_path / "record"
    path.write_text('{"Data": {"PodDeviceEntries": null}, "Checksum": 1}')
    assert tt.read_record(path) == []
    entry = {"PodUID": "other", "ResourceName": R150, "DeviceIDs": None}
    data = {"PodDeviceEntries": [{**entry, "AllocResp": None}]}
    path.write_text(json.dumps({"Data": data}))
    assert tt.read_record(path) == [held(R150)]


NO_RECORDS = {
    "No such file": None,
    "line 1 column 1 ": b"",
    "Unterminated string": b'{"Data": {"PodDev',
    "KeyError": b'{"Data": {"Pods": []}}',
    "TypeError": b'{"Data": []}',
    "decode byte": b"\xff",
}


def test_a_record_that_cannot_be_read_refuses_nothing(
    kubelet: Kubelet, plugin: Plugin
) -> None:
    """It is logged once, and so is its return."""
    kubelet.admit("pod", {R150: 1})
    for why, data in NO_RECORDS.items():
        kubelet.checkpoint.unlink()
        if data is not None:
            kubelet.checkpoint.write_bytes(data)
        for _ in range(2):
            kubelet.start_container("pod")
        plugin.wait_for_line(f"cannot read {kubelet.checkpoint}: .*{why}")
        kubelet.checkpoint.touch()
    assert len(plugin.lines("cannot read")) == len(NO_RECORDS)

    kubelet.admit("another", {R150: 1})  # which writes the record anew
    for _ in range(2):
        kubelet.start_container("pod")
    plugin.wait_for_line(f"{kubelet.checkpoint} can be read again")
    assert len(plugin.lines("can be read again")) == 1


def test_a_record_that_hangs_holds_up_no_call(
    kubelet: Kubelet, plugin: Plugin, bound: Bound
) -> None:
    """Only the container that starts waits for it."""
    text = kubelet.checkpoint.read_text()
    kubelet.checkpoint.unlink()
    os.mkfifo(kubelet.checkpoint)
    request = api.PreStartContainerRequest(devices_ids=IDS[:1])
    with dial(kubelet) as channel:
        call = send(channel, request.SerializeToString(), "PreStartContainer")
        with open(kubelet.checkpoint, "w") as record:  # waits for a read
            began = time.monotonic()
            assert kubelet.allocate(R150, IDS)["devices"]
            bound("Allocate while the record hangs", time.monotonic() - began, 0.05)
            assert not call.done()
            record.write(text)
        assert call.code().name == "OK"
    assert not plugin.lines("cannot read")


@long_only
def test_a_record_that_hangs_refuses_nothing(kubelet: Kubelet, plugin: Plugin) -> None:
    """It is waited for, for 5 s: the kubelet gives up after 30 s."""
    kubelet.admit("pod", {R150: 1})
    kubelet.checkpoint.unlink()
    os.mkfifo(kubelet.checkpoint)
    kubelet.start_container("pod")
    plugin.wait_for_line("cannot read .*: it takes too long")


# ==== Appendix D. Preferred allocation ================================================

WELL = tt.make_verdict("ok")
UNWELL = tt.make_verdict("gone")


def host_of(
    name: str, numa_node: int | None, above: str, buses: str, domain: str = "0000"
) -> dict[str, tt.Card]:
    """Cards of one chip each below this PCI path, by bus, which is their ID, too."""
    cards = {}
    for bus in buses.split():
        path = tuple(above.format(bus=bus).split("/"))
        chip = tt.Chip(f"{domain}:{bus}:00.0", pci_path=path, numa_node=numa_node)
        cards[bus] = tt.Card(bus, f"{name}-x", f"x.org/{name}", (chip,), WELL)
    return cards


# Four trays of 8, two on each NUMA node: which ones share one is made up.
GALAXY = host_of(
    "galaxy", 1, "pci0000:00", "c1 c2 c3 c4 c5 c6 c7 c8 81 82 83 84 85 86 87 88"
) | host_of(
    "galaxy", 0, "pci0000:00", "01 02 03 04 05 06 07 08 41 42 43 44 45 46 47 48"
)
# Two switches on one NUMA node, none on the other.
HOST = {
    **host_of("host", 0, "pci0000:00/0000:00:01.0", "01 02 03"),
    **host_of("host", 0, "pci0000:00/0000:00:02.0", "05 06"),
    **host_of("host", 1, "pci0000:{bus}", "41 51 61 71"),
}
# A host that says nothing of NUMA nodes and bridges.
FLAT = host_of("flat", None, "-", "01 02 09 0a 0b")
HOSTS = {"galaxy": GALAXY, "host": HOST, "flat": FLAT}


@rows(
    "host, available, must, size, chosen",
    """
    smallest group with room   host    01 02 03 05 06 41 51 61 71  -     4  41 51 61 71
    ... the last one           host    01 03 05 41 51 61 71        -     1  05
    one NUMA node before all   host    01 02 03 05 06 41 51 61 71  -     5\
  01 02 03 05 06
    largest whole, and rest    host    01 02 03 05 06 41 51 61 71  -     7\
  01 02 03 05 06 41 51
    neighbours                 flat    01 02 09 0a 0b              -     3  09 0a 0b
    ... the first of equals    flat    01 02 09 0a 0b              -     2  01 02
    near to what it must have  host    01 02 03 05 06 41 51        06    3  06 05 01
    the tray of what it must   galaxy  01 02 43 44 81              43    2  43 44
    lost ones come last        host    lost gone 41                -     2  41 gone
    ... unless it must         host    gone lost 41                lost  2  41 lost
    """,
)
def test_preferred_allocation(
    host: str, available: str, must: str, size: str, chosen: str
) -> None:
    """The same NUMA node, then the smallest group that has room, then neighbours."""
    required = must.strip("-").split()
    found = tt.preferred_allocation(HOSTS[host], available.split(), required, int(size))
    assert found == chosen.split()


@pytest.mark.parametrize("size", [8, 16, 24, 32])
def test_trays_are_taken_whole(bound: Bound, size: int) -> None:
    """A Galaxy's trays, where that is possible."""
    began = time.thread_time()
    chosen = tt.preferred_allocation(GALAXY, list(GALAXY), [], size)
    bound("a choice out of 32 cards", time.thread_time() - began, 0.002)
    trays = Counter(card_id[0] for card_id in chosen)
    assert list(trays.values()) == [8] * (size // 8)


def test_a_broken_tray_is_used_up_first() -> None:
    """So that the others stay whole."""
    free = set(GALAXY)
    for size, tray in ((1, "0"), (2, "0"), (8, "4"), (5, "0"), (8, "8"), (8, "c")):
        chosen = tt.preferred_allocation(GALAXY, sorted(free), [], size)
        free -= set(chosen)
        assert {card_id[0] for card_id in chosen} == {tray}


# What buses the chips of a Galaxy can be seen on.
BUSES = {
    "all 32": " ".join(GALAXY),
    "31": " ".join(list(GALAXY)[1:]),
    "two trays": " ".join(list(GALAXY)[:16]),
    "the others": " ".join(list(GALAXY)[16:]),
    "01 to 20": " ".join(f"{bus:02x}" for bus in range(1, 33)),
}


@rows(
    "domain, buses, next_domain, next_buses, trays, topology",
    """
    a Galaxy               0000   all 32     -     -           0000:0 0000:4 0000:8\
 0000:c  galaxy
    five digits of domain  10000  all 32     -     -           10000:0 10000:4 10000:8\
 10000:c  galaxy
    31 of its chips        0000   31         -     -           -                  -
    a virtual machine      0000   01 to 20   -     -           -                  -
    two domains            0000   two trays  0001  the others  -                  -
    another, not whole     0001   31         0002  all 32      0002:0 0002:4 0002:8\
 0002:c  -
    """,
)
def test_only_a_whole_galaxy_has_trays(
    domain: str,
    buses: str,
    next_domain: str,
    next_buses: str,
    trays: str,
    topology: str,
) -> None:
    """Its 32 chips on the vendor's buses, all in one PCI domain.

    The node's label follows the same rule.
    """
    made = [*host_of("galaxy", 0, "pci", BUSES[buses], domain).values()]
    if next_domain != "-":
        made += host_of("galaxy", 0, "pci", BUSES[next_buses], next_domain).values()
    cards = [replace(card, id=card.chips[0].pci) for card in made]
    found = tt.galaxy_trays(cards)
    assert Counter(found.values()) == dict.fromkeys(trays.strip("-").split(), 8)
    assert all(card_id.startswith(tray) for card_id, tray in found.items())
    assert tt.node_topology(cards) == topology.strip("-")


@dataclass(frozen=True)
class Choice:
    """What preferred allocation is asked."""

    cards: dict[str, tt.Card]
    available: list[str]
    must: list[str]
    size: int

    @property
    def well(self) -> set[str]:
        """The healthy ones of those that are available."""
        known = self.cards.keys() & {*self.available}
        return {name for name in known if self.cards[name].verdict == WELL}


@st.composite
def choices(draw: st.DrawFn, too_many: bool = False) -> Choice:
    """Any choice that can be made; with `too_many`, one that cannot."""
    cards = dict(draw(st.sampled_from(list(HOSTS.values()))))
    for name in draw(st.lists(st.sampled_from(sorted(cards)), max_size=4)):
        cards[name] = replace(cards[name], verdict=UNWELL)
    names = st.sampled_from([*cards, "gone"])
    available = draw(st.lists(names, min_size=1, unique=True))
    must = draw(st.lists(st.sampled_from(available), max_size=3, unique=True))
    least = max(1, len(must))
    sizes = st.integers(least, len(available))
    if too_many:
        sizes = st.sampled_from([-1, 0, least - 1, len(available) + 1])
    return Choice(cards, available, must, draw(sizes))


def choose(choice: Choice) -> list[str]:
    """What preferred allocation answers."""
    return tt.preferred_allocation(
        choice.cards, choice.available, choice.must, choice.size
    )


@given(choices(), st.randoms())
def test_any_choice_has_what_was_asked_for(
    choice: Choice, shuffle: random.Random
) -> None:
    """As many as asked for, with those that it must have, in whatever order asked."""
    chosen = choose(choice)
    assert len(chosen) == len(set(chosen)) == choice.size
    assert {*choice.must} <= {*chosen} <= {*choice.available}
    shuffle.shuffle(choice.available)
    shuffle.shuffle(choice.must)
    assert choose(choice) == chosen


@given(choices(too_many=True))
def test_a_choice_that_cannot_be_made_is_refused(choice: Choice) -> None:
    """Fewer cards than it must have, or more than there are."""
    about = f"{len(choice.available)} cards with {len(choice.must)} required"
    with pytest.raises(tt.Refusal) as refusal:
        choose(choice)
    assert refusal.value.code == grpc.StatusCode.INVALID_ARGUMENT
    assert str(refusal.value) == f"cannot choose {choice.size} of {about}"


@given(choices())
def test_healthy_cards_are_chosen_first(choice: Choice) -> None:
    """A card that is not healthy is chosen only if it must be, or none else is left."""
    unwell = {*choose(choice)} - choice.well
    required = {*choice.must} - choice.well
    assert len(unwell) == max(len(required), choice.size - len(choice.well))


@given(choices())
def test_one_numa_node_is_chosen_if_it_has_room(choice: Choice) -> None:
    """Where no card is required."""
    choice = replace(choice, must=[])
    nodes = {name: card.chips[0].numa_node for name, card in choice.cards.items()}
    room = Counter(nodes[name] for name in choice.well)
    hypothesis.assume(max(room.values(), default=0) >= choice.size)
    assert len({nodes[name] for name in choose(choice)}) == 1


# ==== Appendix E. Operations: the log; /healthz, /readyz and /metrics =================

PREFIX = "tt_device_plugin_"
# A card without telemetry goes. Another card gets into trouble, is lost in a reset,
# comes back with another N, and a Pod gets it. The kubelet is restarted.
LOST_CARD = "card wormhole-0D0CB6F1E7A50002 (n150, /dev/tenstorrent/"
GONE = tt.KINDS["gone"].reason
REGISTERED = (
    f"INFO registered {R150} with the kubelet: 2 cards, 2 healthy; "
    "socket S.sock; cause: "
)
INCIDENT = f"""
INFO tt-device-plugin VERSION, Python VERSION, grpcio VERSION, driver 2.10.0; kubelet \
folder DIR/k/device-plugins, sysfs DIR/sys, dev DIR/dev; cards: 2 n150, \
1 of unknown model
INFO card wormhole-0D0CB6F1E7A50001 (n150, /dev/tenstorrent/0) is Healthy
INFO {LOST_CARD}1) is Healthy
WARNING card 0000:41:00.0 (model unknown, /dev/tenstorrent/2) is not offered: \
{tt.KINDS["pending"].reason}
{REGISTERED}start
WARNING card 0000:41:00.0 (model unknown, /dev/tenstorrent/2) is gone; \
it was not offered
ERROR {LOST_CARD}1) is Unhealthy: its device node /dev/tenstorrent/1 is missing, or is \
not the device that sysfs names: see dmesg. Looked for in DIR/dev: is that the host's \
/dev?
ERROR {LOST_CARD}1) is Unhealthy: {GONE}
INFO {LOST_CARD}5) is Healthy again, after N s
INFO allocated card wormhole-0D0CB6F1E7A50001 (n150, /dev/tenstorrent/0), {LOST_CARD}5)
WARNING the kubelet's stream of {R150} has ended: registering again
WARNING no kubelet listens at DIR/k/device-plugins/kubelet.sock: waiting for it to start
INFO a kubelet answers at DIR/k/device-plugins/kubelet.sock
{REGISTERED}stream-ended
INFO told to stop, and done"""


def port_of(plugin: Plugin) -> int:
    """The port of the plugin's HTTP pages."""
    line = plugin.wait_for_line('(INFO |")HTTP on port')
    (port,) = re.findall(r"port (\d+)", line)
    return int(port)


def fetch(server: Plugin | int, path: str, host: str = "127.0.0.1") -> tuple[int, str]:
    """Status and text of a page of a plugin, or of the server on this port."""
    port = port_of(server) if isinstance(server, Plugin) else server
    client = http.client.HTTPConnection(host, port, timeout=10)
    with contextlib.closing(client):
        client.request("GET", path)
        answer = client.getresponse()
        return answer.status, answer.read().decode()


def samples(page: str, word: str = "") -> list[str]:
    """A metrics page as Prometheus reads it: those samples that have this word.

    A line is a name, without the plugin's prefix, labels and a value.
    """
    lines = []
    for family in text_string_to_metric_families(page):
        assert family.type in ("counter", "gauge"), family.name
        assert family.documentation, family.name
        for name, labels, value, *_ in family.samples:
            pairs = [f"{key}={text}" for key, text in sorted(labels.items())]
            lines.append(" ".join([name.removeprefix(PREFIX), *pairs, f"{value:g}"]))
    return [line for line in lines if word in line]


def let_it_happen(
    kubelet: Kubelet, tree: Tree, launch: Launch, log_format: str
) -> tuple[Plugin, str]:
    """Go through INCIDENT. Returns the plugin and its last registration's cause."""
    for chip in (replace(THIRD, card_type=""), FIRST, SECOND):
        tree.add(chip)
    kubelet.start()
    flags = [HTTP, f"--log-format={log_format}", "--poll-seconds=0.3"]
    plugin = launch(tree, kubelet, *flags)
    plugin.wait_for_line("registered")
    tree.remove(THIRD.pci)
    plugin.wait_for_line("it was not offered")
    relink(tree.node(SECOND.pci), "/dev/zero")
    plugin.wait_for_line("is not the device that sysfs names")
    tree.remove(SECOND.pci)
    plugin.wait_for_line("is gone from sysfs")
    tree.add(replace(SECOND, index=5))
    plugin.wait_for_line("healthy again")
    kubelet.allocate(R150, IDS[:2])
    plugin.wait_for_line("allocated")
    kubelet.kill()
    plugin.wait_for_line("no kubelet listens")
    assert f"registered resource={R150} 0" in samples(fetch(plugin, "/metrics")[1])
    kubelet.start()
    # A kubelet that is being killed may still take the connection of one more try.
    again = plugin.wait_for_line("cause: (stream-ended|register-failed)")
    (cause,) = re.findall(r"cause: (stream-ended|register-failed)", again)
    return plugin, cause


def without_varying(text: str, tree: Tree, cause: str) -> str:
    """Log lines without what differs from run to run."""
    text = text.replace(str(tree.root), "DIR")
    text = text.replace(f"cause: {cause}", "cause: stream-ended")
    text = re.sub(
        r"(plugin|Python|grpcio) \d+\.\d+\.\d+[^,;]*",
        r"\1 VERSION",
        text,
    )
    text = re.sub(r"tenstorrent-n150-[0-9a-f]{6}\.sock", "S.sock", text)
    text = re.sub(r"\n20\d\d-\d\d-\d\dT\d\d:\d\d:\d\dZ ", "\n", text)
    return re.sub(r"after \d+", "after N", text)


def log_of(plugin: Plugin) -> list[str]:
    """Its lines, without those that may or may not come at any time."""
    return plugin.lines("^(?!.*(HTTP on|has not registered it))")


def test_log_of_an_incident(kubelet: Kubelet, tree: Tree, launch: Launch) -> None:
    """It says which card, what, since when and what to do, and nothing else."""
    plugin, cause = let_it_happen(kubelet, tree, launch, "text")
    page = samples(fetch(plugin, "/metrics")[1], "registrations")
    counted = "registrations_total cause={} " + f"resource={R150} 1"
    assert page == [counted.format("start"), counted.format(cause)]
    plugin.end()
    text = "\n".join(["", *log_of(plugin)])
    assert without_varying(text, tree, cause) == INCIDENT


def test_json_log_of_an_incident(kubelet: Kubelet, tree: Tree, launch: Launch) -> None:
    """It has the same lines, with fields for card, resource, since when and why."""
    plugin, cause = let_it_happen(kubelet, tree, launch, "json")
    plugin.end()
    objects = [json.loads(line) for line in log_of(plugin)]
    lines = [f"{one['ts']} {one['level'].upper()} {one['msg']}" for one in objects]
    assert without_varying("\n".join(["", *lines]), tree, cause) == INCIDENT

    plain = {"ts", "level", "msg"}
    by_message = {without_varying(one["msg"], tree, cause): one for one in objects}
    allocated = next(one for text, one in by_message.items() if "allocated" in text)
    back = by_message[f"{LOST_CARD}5) is Healthy again, after N s"]
    lost = by_message[f"{LOST_CARD}1) is Unhealthy: {GONE}"]
    assert objects[0].keys() == plain
    assert allocated.keys() == {*plain, "resource"}
    assert back.keys() == {*plain, "resource", "card", "since"}
    assert lost.keys() == {*plain, "resource", "card", "since", "reason"}
    assert (lost["card"], lost["resource"]) == (SECOND.id, R150)
    assert lost["reason"] == GONE
    first, _ = [one["ts"] for one in objects if "is Unhealthy" in one["msg"]]
    assert seconds_of(first) - seconds_of(lost["since"]) in (0, 1)  # a line comes later


def seconds_of(text: str) -> int:
    """An RFC 3339 text in seconds since 1970."""
    return calendar.timegm(time.strptime(text, "%Y-%m-%dT%H:%M:%SZ"))


def test_a_traceback_is_one_line_of_json() -> None:
    """Without it no defect could be found. Lines of its own would not be JSON."""
    try:
        raise ValueError("WHY\nAND HOW")
    except ValueError:
        record = log_record("it failed", exc_info=sys.exc_info())
    line = tt.JsonFormatter().format(record)
    assert "\n" not in line
    shown = json.loads(line)["exception"]
    assert shown.startswith("Traceback")
    assert shown.endswith("ValueError: WHY\nAND HOW")


def log_record(text: str, **facts: Any) -> logging.LogRecord:
    """A line of the log."""
    return logging.makeLogRecord({"msg": text, "levelname": "ERROR", **facts})


# ---- Metrics ----

DRIVER = '2.10.0-"q\\uote"\n'  # all that has to be escaped in a label
# What PAGE says instead of a label's value. PCI addresses are shortened to the bus.
SHORT = {
    grpc.__version__: "G",
    sys.version.split()[0]: "P",
    tt.__version__: "V",
    DRIVER: "DRIVER",
    FIRST.id: "A",
    SECOND.id: "B",
    FIRST.serial: "S",
    SECOND.serial: "T",
    FIRST.firmware: "F",
    R150: "R",
    "/dev/tenstorrent/0": "DEV/0",
    "/dev/tenstorrent/2": "DEV/2",
}
# Every metric, with its labels, on a node with three cards. The first one has all
# sensors; its chip was reset, and the dead hwmon is still there. The second card is
# gone. The third one has no telemetry yet.
PAGE = """
info driver=DRIVER grpcio=G python=P version=V 1
registered resource=R 0
cards health=Healthy resource=R 1
cards health=Unhealthy resource=R 1
allocations_total resource=R 3
registrations_total cause=start resource=R 2
refusals_total call=Allocate code=NOT_FOUND resource=R 1
cards_not_offered 1
card_healthy card=A resource=R 1
card_healthy card=B resource=R 0
card_healthy card=41 resource= 0
card_verdict card=A kind=ok resource=R 1
card_verdict card=B kind=gone resource=R 1
card_verdict card=41 kind=pending resource= 1
chip_info arch=wormhole card=A chip=01 device_node=DEV/0 firmware=F model=n150 \
serial=S 1
chip_info arch=wormhole card=B chip=02 device_node= firmware=F model=n150 serial=T 1
chip_info arch=wormhole card=41 chip=41 device_node=DEV/2 firmware= model= serial= 1
junk_readings_total card=41 chip=41 0
heartbeat_age_seconds card=A chip=01 9
tt_asic_temperature_celsius card=A chip=01 54.3
tt_thermal_throttle_limit_celsius card=A chip=01 75
tt_ai_clock_mhz card=A chip=01 500
tt_arc_clock_mhz card=A chip=01 540
tt_axi_clock_mhz card=A chip=01 900
tt_tdp_w card=A chip=01 15
tt_tdp_limit_w card=A chip=01 100
tt_tdc_a card=A chip=01 18
tt_vcore_v card=A chip=01 0.795
tt_fan_speed_rpm card=A chip=01 1200
tt_thermal_trips_total card=A chip=01 2
tt_pcie_link_speed_gts card=A chip=01 2.5
tt_pcie_link_max_speed_gts card=A chip=01 16
tt_pcie_link_width card=A chip=01 8
tt_pcie_link_max_width card=A chip=01 16
tt_pcie_correctable_errors_total card=A chip=01 3
device_node_users card=A chip=01 2
junk_readings_total card=A chip=01 0
"""
# What only some chips, firmwares and hosts have. The table of errors has Linux' form.
MORE_SENSORS = {
    "tt_arcclk": "540",
    "tt_axiclk": "900",
    "tt_therm_trip_count": "2",
    "device/current_link_speed": "2.5 GT/s PCIe",
    "device/max_link_speed": "16.0 GT/s PCIe",
    "device/current_link_width": "8",
    "device/max_link_width": "16",
    "device/aer_dev_correctable": "RxErr 2\nBadTLP 1\nBadDLLP 0\nTOTAL_ERR_COR 3",
}


def metrics_of(root: Path) -> tt.Metrics:
    """What a scrape reads of a plugin that has polled this tree once.

    Each chip is read once: the interval is long. After two more polls its reader would
    count as one that hangs.
    """
    settings = tt.Settings(
        sysfs_root=root / "sys", dev_root=root / "dev", poll_seconds=60.0
    )
    inventory = tt.Inventory(settings)
    inventory.poll(100.0)
    return tt.Metrics(tt.Registrar(tt.Shared(inventory, tt.preferred_allocation)))


def add_all_sensors(tree: Tree) -> None:
    """The first chip has what not every chip has; its old hwmon is dead."""
    monitors = tree.pci(FIRST.pci) / "hwmon"
    shutil.copytree(monitors / "hwmon2", monitors / "hwmon10")
    (monitors / "hwmon2/temp1_input").write_text("99000\n")
    (monitors / "hwmon10/fan1_input").write_text("1200\n")
    for file, text in MORE_SENSORS.items():
        tree.set(FIRST.pci, file, f"{text}\n")
    tree.write(tree.root / "proc/driver/tenstorrent/0/pids", "17\n4711\n")


def shortened(page: str) -> list[str]:
    """The samples of a metrics page with the labels that PAGE has."""
    text = "\n".join(samples(page))
    text = re.sub(r"=0000:(..):00\.0 ", r"=\1 ", text)
    for value, short in SHORT.items():
        text = text.replace(f"={value} ", f"={short} ")
    return text.splitlines()


def test_the_page_has_every_metric(tree: Tree) -> None:
    """A gone card keeps its verdict, but exports no readings.

    They would look current.
    """
    blind = replace(
        THIRD, card_type="", asic_id="", serial="", firmware="", heartbeat=False
    )
    for chip in (FIRST, SECOND, blind):
        tree.add(chip)
    add_all_sensors(tree)
    metrics = metrics_of(tree.root)
    tree.remove(SECOND.pci)
    metrics.inventory.poll(101.0)
    metrics.inventory.snapshot = replace(metrics.inventory.snapshot, driver=DRIVER)
    count = metrics.registrar.shared.count
    count(f"{PREFIX}allocations_total", 3, resource=R150)
    count(f"{PREFIX}registrations_total", 2, resource=R150, cause="start")
    count(f"{PREFIX}refusals_total", resource=R150, call="Allocate", code="NOT_FOUND")
    page = metrics.page(109.0)
    assert {*re.findall(r"^# TYPE (\S+) ", page, re.MULTILINE)} == tt.HELP.keys()
    assert sorted(shortened(page)) == sorted(PAGE.strip().splitlines())


# How a sensor's file writes a number.
FORMS: dict[Any, str] = {
    tt.whole_number: "{}",
    tt.link_speed: "{} GT/s PCIe",
    tt.total_errors: "RxErr 1\nTOTAL_ERR_COR {}\n",
}
# All but the number of a device node's users, which cannot be junk.
NUMBERS = [sensor for sensor in tt.SENSORS if sensor.parse in FORMS]


@pytest.fixture
def heartless(workdir: Path) -> Tree:
    """A node with one chip that has no heartbeat, as drivers before 2.7 have it."""
    return Tree(workdir, [replace(FIRST, heartbeat=False)])


@pytest.mark.parametrize("sensor", NUMBERS, ids=[sensor.metric for sensor in NUMBERS])
def test_junk_readings_are_counted_and_not_shown(
    heartless: Tree, sensor: tt.Sensor
) -> None:
    """Stale telemetry, a dead bus and values below 0 were seen on real chips."""
    metrics = metrics_of(heartless.root)
    folders = {"class": ".", "pci": "device", "hwmon": "device/hwmon/hwmon2"}
    file = f"{folders[sensor.folder]}/{sensor.file}"
    form = FORMS[sensor.parse]
    largest = int(sensor.largest)

    def shown(text: str | None) -> tuple[bool, str]:
        heartless.set(FIRST.pci, file, text)
        *page, junk = samples(metrics.page(109.0), f"chip={FIRST.pci}")
        return any(sensor.metric in line for line in page), junk.split()[-1]

    assert shown(form.format(largest)) == (True, "0")
    texts = [form.format(largest + 1), form.format(2**64), form.format(-1), "N/A", ""]
    for count, text in enumerate(texts, start=1):
        assert shown(text) == (False, f"{count}"), text
    assert shown(None) == (False, f"{len(texts)}")


@rows(
    "metric, file, text, value",
    """
    PCIe 4          link_speed_gts      current_link_speed   16.0 GT/s PCIe   16
    PCIe 1          link_speed_gts      current_link_speed   2.5 GT/s PCIe    2.5
    an old kernel   link_max_speed_gts  max_link_speed       8 GT/s           8
    no link         link_speed_gts      current_link_speed   Unknown          -
    no link's most  link_max_speed_gts  max_link_speed       Unknown          -
    lanes           link_width          current_link_width   4                4
    no link's       link_max_width      max_link_width       255              -
    a table's sum   correctable_errors  aer_dev_correctable\
  RxErr 2|Rollover 5|TOTAL_ERR_COR 7  7
    no sum          correctable_errors  aer_dev_correctable  RxErr 2|Rollover 5  -
    """,
)
def test_the_pci_link_is_shown_as_linux_writes_it(
    heartless: Tree, metric: str, file: str, text: str, value: str
) -> None:
    """What is no number is counted as junk."""
    heartless.set(FIRST.pci, f"device/{file}", text.replace("|", "\n") + "\n")
    *page, junk = samples(metrics_of(heartless.root).page(109.0), "chip=")
    found = [line.split()[-1] for line in page if f"tt_pcie_{metric}" in line]
    assert found == [value] * (value != "-")
    assert junk.split()[-1] == f"{int(value == '-')}"


@rows(
    "driver, readable",
    """
    before 2.7        2.6.1      no
    before 2          1.34       no
    not known         -          no
    a candidate       2.7.0-rc1  yes
    after 2.7         3.0        yes
    """,
)
def test_sensors_are_read_from_driver_2_7_on(
    heartless: Tree, driver: str, readable: str
) -> None:
    """Before driver 2.7 a read could oops the kernel."""
    metrics = metrics_of(heartless.root)
    snapshot = replace(metrics.inventory.snapshot, driver=driver.strip("-"))
    metrics.inventory.snapshot = snapshot
    shown = samples(metrics.page(109.0), "tt_ai_clock_mhz")
    assert len(shown) == (readable == "yes")


def temperatures(page: str) -> list[str]:
    """Chip and value of each temperature on a metrics page."""
    lines = samples(page, "asic_temperature")
    return [line.split("chip=")[1] for line in lines]


TEMPERATURE = "device/hwmon/hwmon2/temp1_input"
SECOND_SHOWN = f"{SECOND.pci} 54.3"


@contextlib.contextmanager
def hanging_scrape(
    tree: Tree, scrape: Callable[[], Any]
) -> Iterator[tuple[Future[Any], ThreadPoolExecutor]]:
    """A scrape that hangs in a read of the first chip's temperature, until the end.

    It runs in this pool, which is also for other scrapes that could hang.
    """
    tree.hang(FIRST.pci, TEMPERATURE)
    with ThreadPoolExecutor() as pool:
        hanging = pool.submit(scrape)
        # Opening a FIFO waits for who reads it.
        with open(tree.entry(FIRST.pci) / TEMPERATURE, "w"):
            try:
                yield hanging, pool
            finally:
                tree.release(FIRST.pci, TEMPERATURE, "60000\n")


def test_a_sensor_that_hangs_holds_up_one_scrape(tree: Tree) -> None:
    """Later scrapes leave that chip out until the read returns."""
    tree.add(FIRST)
    tree.add(SECOND)
    metrics = metrics_of(tree.root)
    scrape = functools.partial(metrics.page, 101.0)
    with hanging_scrape(tree, scrape) as (first, pool):
        assert temperatures(pool.submit(scrape).result(5)) == [SECOND_SHOWN]
        assert not first.done()
    expected = [f"{FIRST.pci} 60", SECOND_SHOWN]
    assert temperatures(first.result(5)) == expected
    assert temperatures(scrape()) == expected


def test_a_sensor_that_hangs_holds_up_no_probe(
    kubelet: Kubelet, four: Tree, launch: Launch, bound: Bound
) -> None:
    """It holds up no poll either: a scrape reads files in a thread of its own."""
    plugin = launch(four, kubelet, HTTP, offers=4)
    mark = kubelet.log.mark()
    ask = functools.partial(fetch, plugin, "/metrics")
    with hanging_scrape(four, ask) as (scrape, _):
        began = time.monotonic()
        assert fetch(plugin, "/healthz")[0] == 200
        bound("a probe while a scrape hangs", time.monotonic() - began, 1.0)
        four.remove(FOURTH.pci)
        kubelet.wait_status(R150, 4, 3, after=mark)
        assert not scrape.done()
    _, page = scrape.result(5)
    assert f"{FIRST.pci} 60" in temperatures(page)


def test_no_scrape_waits_for_a_chip_whose_reader_hangs(
    kubelet: Kubelet, four: Tree, launch: Launch
) -> None:
    """It is left out because its sensors may hang, too. The others are shown."""
    plugin = launch(four, kubelet, FAST, HTTP, offers=4)
    four.hang(FIRST.pci, "tt_heartbeat")
    three = [f"{chip.pci} 54.3" for chip in (SECOND, THIRD, FOURTH)]
    wait_until(lambda: temperatures(fetch(plugin, "/metrics")[1]) == three)
    four.hang(FIRST.pci, TEMPERATURE)
    assert temperatures(fetch(plugin, "/metrics")[1]) == three


# ---- Pages ----


@pytest.mark.parametrize(("poll_seconds", "limit"), [(0.1, 10), (60.0, 180)])
def test_healthz_is_503_once_polls_have_stopped(
    poll_seconds: float, limit: int
) -> None:
    """How long is too long follows from --poll-seconds."""
    inventory = tt.Inventory(tt.Settings(poll_seconds=poll_seconds))
    inventory.polled_at = 1000.0
    inventory.poll_trouble.problem = "WHY"
    text = f"stuck: the last poll ended {limit + 1} s ago. WHY"
    assert tt.healthz(inventory, 1001.0 + limit) == (503, text)
    text = f"ok: the last poll ended {limit}.0 s ago. WHY"
    assert tt.healthz(inventory, 1000.0 + limit) == (200, text)


def test_readyz_is_503_before_the_first_poll() -> None:
    """Nobody knows yet what there is to register."""
    shared = tt.Shared(tt.Inventory(tt.Settings()), tt.preferred_allocation)
    expected = (503, "the first poll has not ended yet")
    assert tt.readyz(tt.Registrar(shared)) == expected


def test_readyz_is_200_once_all_cards_are_registered(
    kubelet: Kubelet, tree: Tree, launch: Launch
) -> None:
    """Without cards there is nothing to wait for, so it is 200, too."""
    kubelet.start(faults={"register_fails": 1000})
    plugin = launch(tree, kubelet, HTTP)
    plugin.wait_for_line("no cards here")
    text = "no cards to register: waiting for some to appear\n"
    assert fetch(plugin, "/readyz") == (200, text)
    tree.add(replace(FIRST, asic_id="", heartbeat=False))  # of an old driver
    plugin.wait_for_line("the kubelet has not registered it")
    status, text = fetch(plugin, "/readyz")
    assert status == 503
    assert "the kubelet has not registered it: UNIMPLEMENTED" in text
    kubelet.set_fault("register_fails", 0)
    kubelet.renew_socket()
    plugin.wait_for_line("registered tenstorrent")
    assert fetch(plugin, "/readyz") == (200, f"{R150}: registered\n")
    assert kubelet.allocate(R150, [FIRST.pci])["devices"]


def test_a_port_that_is_taken_costs_no_card(
    kubelet: Kubelet, four: Tree, launch: Launch
) -> None:
    """The plugin tries again, and logs this once."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        plugin = launch(four, kubelet, f"--listen=127.0.0.1:{port}", offers=4)
        plugin.wait_for_line(
            "no HTTP on port .*: Address already in use.*; trying again"
        )
    assert fetch(plugin, "/readyz")[0] == 200
    assert len(plugin.lines("no HTTP")) == 1


def test_a_plugin_waits_for_the_driver_to_be_loaded(
    kubelet: Kubelet, tree: Tree, launch: Launch
) -> None:
    """Without the driver's class in sysfs it says so, and offers cards that come."""
    shutil.rmtree(tree.sys / "class")
    shutil.rmtree(tree.sys / "module")
    kubelet.start()
    plugin = launch(tree, kubelet, FAST)
    plugin.wait_for_line("no cards here, driver not loaded: waiting for some")
    (tree.sys / "class/tenstorrent").mkdir(parents=True)
    tree.add(FIRST)
    kubelet.wait_status(R150, 1, 1)


def test_an_unknown_page_is_404_and_names_the_others(
    kubelet: Kubelet, tree: Tree, launch: Launch
) -> None:
    """So whoever looks for a page finds it."""
    plugin = launch(tree, kubelet, HTTP)
    text = "no such page; there are /healthz, /readyz, /metrics\n"
    assert fetch(plugin, "/") == (404, text)


# ---- The HTTP server ----

LARGE = "x" * 4_000_000  # more than the buffers of a connection hold


async def large_page() -> tt.Page:
    """A page of a server for tests."""
    return tt.Page(HTTPStatus.OK, LARGE)


async def small_page() -> tt.Page:
    """A page that fits into one packet."""
    return tt.Page(HTTPStatus.OK, "text")


async def broken_page() -> tt.Page:
    """A page with a defect."""
    raise ValueError("WHY")


PAGES = {"/large": large_page, "/small": small_page, "/broken": broken_page}


@contextlib.contextmanager
def serving_pages(address: str = "127.0.0.1:0") -> Iterator[int]:
    """The port of the plugin's HTTP server with PAGES, which runs in a thread."""
    port: Future[int] = Future()
    ended = threading.Event()

    async def serve() -> None:
        pages = tt.PageServer(PAGES)
        server = await pages.listen(tt.listen_address(address))
        port.set_result(server.sockets[0].getsockname()[1])
        await asyncio.to_thread(ended.wait)
        server.close()
        pages.close_clients()

    thread = threading.Thread(target=asyncio.run, args=(serve(),))
    thread.start()
    try:
        yield port.result(10)
    finally:
        ended.set()
        thread.join()


@pytest.fixture
def pages() -> Iterator[int]:
    """The port of a server with PAGES."""
    with serving_pages() as port:
        yield port


def dial_http(port: int) -> socket.socket:
    """A new connection. Its reads give up before the server would."""
    return socket.create_connection(("127.0.0.1", port), timeout=tt.REQUEST_S - 1)


def receive_all(client: socket.socket) -> bytes:
    """What comes until the server closes the connection. A reset raises OSError."""
    return b"".join(iter(functools.partial(client.recv, 65536), b""))


def answer_to(port: int, request: bytes) -> tuple[int, bytes]:
    """Status, and the whole answer."""
    with dial_http(port) as client:
        client.sendall(request)
        answer = receive_all(client)
    return int(answer.split(b" ")[1]), answer


@rows(
    "said_by_client, status",
    """
    GET                   GET /small HTTP/1.1|Host: x   200
    an old client         GET /small HTTP/1.0           200
    a query               GET /small?y=z HTTP/1.1       200
    no such page          GET / HTTP/1.1                404
    no page of that form  GET http://x/small HTTP/1.1   404
    POST                  POST /small HTTP/1.1          405
    DELETE                DELETE /small HTTP/1.1        405
    another HTTP          GET /small HTTP/9.9           400
    no HTTP               GET /small                    400
    a lower-case method   get /small HTTP/1.1           400
    binary                \x01\x02\x03                  400
    """,
)
def test_each_request_has_its_status(
    pages: int, said_by_client: str, status: str
) -> None:
    """A request ends with an empty line. ("|" stands for an end of line.)"""
    text = said_by_client.replace("|", "\r\n") + "\r\n\r\n"
    found, answer = answer_to(pages, text.encode())
    assert found == int(status)
    head, body = answer.split(b"\r\n\r\n")
    assert f"\r\nContent-Length: {len(body)}\r\n".encode() in head
    assert b"\r\nAllow: GET, HEAD\r\n" in head


def test_head_is_answered_with_the_head_of_the_page(pages: int) -> None:
    """The head has the page's length, and no text follows."""
    _, whole = answer_to(pages, b"GET /small HTTP/1.1\r\n\r\n")
    _, head = answer_to(pages, b"HEAD /small HTTP/1.1\r\n\r\n")
    assert whole == head + b"text\n"


def test_a_request_in_two_packets_is_one_request(pages: int) -> None:
    """It is not answered before it is complete."""
    with dial_http(pages) as client:
        client.sendall(b"GET /sm")
        # By then the server has read the first packet.
        assert fetch(pages, "/small")[0] == 200
        client.sendall(b"all HTTP/1.1\r\n\r\n")
        assert receive_all(client).startswith(b"HTTP/1.1 200 OK\r\n")


@pytest.mark.parametrize(("size", "status"), [(8192, 200), (8300, 431), (80_000, 431)])
def test_a_head_may_have_8_kib(pages: int, size: int, status: int) -> None:
    """A longer one gets 431, even if it never ends."""
    text = b"GET /small HTTP/1.1\r\nX: "
    padding = b"x" * (size - len(text) - 4)
    assert answer_to(pages, text + padding + b"\r\n\r\n")[0] == status
    if status == 431:
        assert answer_to(pages, text + padding)[0] == status


def test_unread_bytes_do_not_reset_the_connection(pages: int) -> None:
    """A client that sends more than it has to gets the whole page."""
    with dial_http(pages) as client:
        client.sendall(b"GET /large HTTP/1.1\r\n\r\n" + b"x" * 300_000)
        answer = receive_all(client)
    _, body = answer.split(b"\r\n\r\n")
    assert body.decode() == f"{LARGE}\n"


def test_a_page_that_fails_is_seen(
    pages: int, caplog: pytest.LogCaptureFixture
) -> None:
    """It is 500 and a line in the log, with a traceback. The next page is answered."""
    assert fetch(pages, "/broken") == (500, "ValueError('WHY')\n")
    (record,) = caplog.records
    assert record.getMessage() == "/broken failed"
    assert record.exc_info
    assert fetch(pages, "/small") == (200, "text\n")


def test_the_client_that_has_waited_longest_is_dropped(pages: int) -> None:
    """That happens once there are too many. The others can still ask."""
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(dial_http(pages)) for _ in range(tt.CLIENTS)]
        assert fetch(pages, "/small")[0] == 200
        assert receive_all(clients[0]) == b""
        for client in (clients[1], clients[-1]):
            client.sendall(b"GET /small HTTP/1.1\r\n\r\n")
            assert receive_all(client).endswith(b"text\n")


@pytest.mark.parametrize("host", ["127.0.0.1", "[::1]"])
def test_listens_on_one_address_or_all(host: str) -> None:
    """A Pod's address may be IPv4 or IPv6."""
    if host == "[::1]" and not socket.has_dualstack_ipv6():
        pytest.skip("this machine has no sockets for both IPv4 and IPv6")
    for address in (f"{host}:0", ":0"):
        with serving_pages(address) as port:
            assert fetch(port, "/small", host.strip("[]"))[0] == 200


def peak_memory(plugin: Plugin) -> int:
    """The most that was ever resident, in KiB, with what it shares with others."""
    text = Path(f"/proc/{plugin.process.pid}/status").read_text()
    (most,) = re.findall(r"^VmHWM:\s+(\d+) kB", text, re.MULTILINE)
    return int(most)


HUGE_HEAD = b"GET / HTTP/1.1\r\n" + b"x: " + b"a" * 6_000_000  # it does not end
BAD_REQUESTS = [b"\0\xff" * 400 + b"\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", HUGE_HEAD]


def test_hostile_http_clients_cost_no_memory(
    kubelet: Kubelet, tree: Tree, launch: Launch
) -> None:
    """Some send nonsense, of 6 MB even, and some half a request."""
    plugin = launch(tree, kubelet, HTTP)
    port = port_of(plugin)
    fetch(port, "/healthz")
    before = peak_memory(plugin)
    with contextlib.ExitStack() as stack:
        for sent in BAD_REQUESTS * 10:
            client = stack.enter_context(dial_http(port))
            with contextlib.suppress(ConnectionError):  # the server reads no more
                client.sendall(sent)
                assert client.recv(100).startswith(b"HTTP/1.1 4")
        for _ in range(50):
            client = stack.enter_context(dial_http(port))
            client.sendall(b"GET /metr")
        status, text = fetch(port, "/healthz")
        assert peak_memory(plugin) - before < 3000
    assert status == 200
    assert re.fullmatch(r"ok: the last poll ended [01]\.\d s ago\.\n", text)


@contextlib.contextmanager
def silent_clients(port: int) -> Iterator[threading.Semaphore]:
    """A thousand that send nothing, and a hundred more each second: each is counted."""
    clients = [dial_http(port) for _ in range(1000)]
    arrived = threading.Semaphore(0)
    done = threading.Event()

    def keep_coming() -> None:
        while not done.wait(0.01):
            clients.append(dial_http(port))
            arrived.release()

    with ThreadPoolExecutor() as pool:
        coming = pool.submit(keep_coming)
        try:
            yield arrived
        finally:
            done.set()
    coming.result()
    for client in clients:
        client.close()


def test_silent_http_clients_hold_up_no_probe(
    kubelet: Kubelet, tree: Tree, launch: Launch, bound: Bound
) -> None:
    """There are a thousand, and a hundred more each second; 1,024 files may be open."""
    plugin = launch(tree, kubelet, HTTP)
    port = port_of(plugin)
    prlimit(plugin.process.pid, RLIMIT_NOFILE, (1024, 1024))
    slowest = 0.0
    with silent_clients(port) as arrived:
        for number in range(200):
            assert arrived.acquire(timeout=10)
            if number % 10 == 0:
                began = time.monotonic()
                assert fetch(port, "/healthz")[0] == 200
                slowest = max(slowest, time.monotonic() - began)
    bound("a probe beside 1,000 silent HTTP clients", slowest, 1.0)
    assert peak_memory(plugin) < 60 * 1024
    assert not plugin.lines("ERROR|WARNING")


def test_stops_while_pages_are_asked_for(
    kubelet: Kubelet, four: Tree, launch: Launch, bound: Bound
) -> None:
    """Another client sends nothing meanwhile. Until then each page is answered."""
    plugin = launch(four, kubelet, HTTP, offers=4)
    port = port_of(plugin)
    answered = threading.Semaphore(0)

    def ask(path: str) -> None:
        with contextlib.suppress(OSError, http.client.HTTPException):
            while fetch(port, path)[0] == 200:
                answered.release()

    with ThreadPoolExecutor() as pool, dial_http(port):
        for path in ("/readyz", "/metrics", *["/healthz"] * 10):
            pool.submit(ask, path)
        for _ in range(50):
            assert answered.acquire(timeout=10)
        code, seconds = plugin.end()
    assert code == 0
    bound("SIGTERM to the end while pages are asked for", seconds, 1.0)


# ==== Appendix F. Files for other tools: a CDI specification, and node labels =========


class Keeper:
    """The files for other tools, of a node with an n150 and a p300."""

    def __init__(self, folder: Path) -> None:
        self.tree = Tree(folder)
        later = [replace(chip, index=chip.index + 4) for chip in P300]
        for chip in (FIRST, *later):
            self.tree.add(replace(chip, heartbeat=False))
        self.cdi = folder / "cdi"
        self.labels = folder / "labels"
        self.settings = tt.Settings(
            sysfs_root=self.tree.sys,
            dev_root=self.tree.dev,
            hugepages="always",
            cdi_dir=self.cdi,
            labels_dir=self.labels,
            poll_seconds=0.1,  # a reader counts as one that hangs after 50 polls
        )
        self.inventory = tt.Inventory(self.settings)
        self.files = tt.KeptFiles(self.settings)
        self.file = self.cdi / CDI
        self.draft = self.cdi / f".{CDI}.new"

    def keep(self) -> dict[str, str]:
        """Poll, and write the files if need be. Returns {} if there is no CDI file.

        Otherwise the result has each name in it, with its device nodes.
        """
        self.files.keep(self.inventory.poll(time.monotonic()))
        self.files._thread.join(5)
        if not self.file.exists():
            return {}
        nodes = {}
        for one in json.loads(self.file.read_text())["devices"]:
            paths = [node["hostPath"] for node in one["containerEdits"]["deviceNodes"]]
            nodes[one["name"]] = " ".join(paths)
        return nodes

    def listing(self) -> list[str]:
        """The names of all kept files."""
        return [*os.listdir(self.cdi), *os.listdir(self.labels)]


P300_NODES = "/dev/tenstorrent/4 /dev/tenstorrent/5"
CDI_NAMES = {
    FIRST.id: "/dev/tenstorrent/0",
    "0": "/dev/tenstorrent/0",
    P300_ID: P300_NODES,
    "4": P300_NODES,
    "5": P300_NODES,
    "all": f"/dev/tenstorrent/0 {P300_NODES}",
}


def test_the_cdi_file_names_each_healthy_card(workdir: Path) -> None:
    """It names it by ID and by N. Another name is that of all cards."""
    keeper = Keeper(workdir)
    assert keeper.keep() == CDI_NAMES
    assert keeper.file.read_text().count('"containerPath": "/dev/hugepages-1G"') == 6
    assert keeper.listing() == [CDI, LABELS]


def test_kept_files_are_written_if_need_be(workdir: Path) -> None:
    """They are not written again while they are right, but when they are gone."""
    keeper = Keeper(workdir)
    keeper.keep()
    before = keeper.file.stat()
    assert keeper.keep() == CDI_NAMES
    assert keeper.file.stat() == before
    keeper.file.unlink()
    assert keeper.keep() == CDI_NAMES


def test_the_cdi_file_follows_n_and_health(workdir: Path) -> None:
    """Without healthy cards there is no CDI file."""
    keeper = Keeper(workdir)
    keeper.tree.move(FIRST.pci, 7)
    assert keeper.keep()["7"] == "/dev/tenstorrent/7"
    keeper.tree.remove(FIRST.pci)
    assert keeper.keep()["all"] == P300_NODES
    keeper.tree.remove(P300[0].pci)
    assert not keeper.keep()
    assert keeper.listing() == [LABELS]


def test_a_file_that_cannot_be_written_is_tried_again(
    workdir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The problem and its end are each logged once. The old file stays meanwhile."""
    caplog.set_level(logging.INFO, "tt-device-plugin")
    keeper = Keeper(workdir)
    keeper.keep()
    keeper.draft.mkdir()
    keeper.tree.move(FIRST.pci, 7)
    assert [keeper.keep(), keeper.keep()] == [CDI_NAMES, CDI_NAMES]
    keeper.draft.rmdir()
    assert "7" in keeper.keep()
    assert "7" in keeper.keep()
    assert [record.getMessage() for record in caplog.records] == [
        f"cannot keep {keeper.file}: Is a directory; trying again",
        f"{keeper.file} is kept again",
    ]


def test_a_folder_that_hangs_costs_no_card(
    kubelet: Kubelet, tree: Tree, launch: Launch, bound: Bound, tmp_path: Path
) -> None:
    """It does not hold up the plugin's end either."""
    tree.add(FIRST)
    os.mkfifo(tmp_path / f".{CDI}.new")
    plugin = launch(tree, kubelet, f"--cdi-dir={tmp_path}", offers=1)
    assert kubelet.allocate(R150, [FIRST.id])["devices"]
    bound("SIGTERM to the end while a write hangs", plugin.end()[1], 1.5)


@pytest.fixture
def kept(tmp_path: Path) -> list[Path]:
    """Where the kept files will be, in folders that do not exist yet."""
    return [tmp_path / "cdi" / CDI, tmp_path / "labels" / LABELS]


def keep_flags(kept: list[Path]) -> list[str]:
    """The flags of a plugin that keeps these files."""
    cdi, labels = kept
    return [f"--cdi-dir={cdi.parent}", f"--labels-dir={labels.parent}"]


def test_kept_files_are_for_everybody(
    kubelet: Kubelet, four: Tree, launch: Launch, kept: list[Path]
) -> None:
    """Their readers may be other users."""
    launch(four, kubelet, *keep_flags(kept), offers=4)
    for path in kept:
        wait_until(path.exists)
        assert stat.S_IMODE(path.stat().st_mode) == 0o644
        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o755


def test_pods_are_given_no_cdi_name(
    kubelet: Kubelet, tree: Tree, launch: Launch, kept: list[Path]
) -> None:
    """It would follow N, not the card. The file is for podman and docker."""
    tree.add(replace(FIRST, by_id=True))
    launch(tree, kubelet, *keep_flags(kept), offers=1)
    wait_until(kept[0].exists)
    answer = kubelet.allocate(R150, [FIRST.id])
    assert answer["devices"]
    assert not answer["cdi_devices"]
    assert not answer["annotations"]


def written(path: Path) -> tuple[int, int]:
    """What changes if a file is written anew."""
    status = path.stat()
    return status.st_ino, status.st_mtime_ns


def test_one_without_the_lock_leaves_the_files_alone(
    kubelet: Kubelet, four: Tree, launch: Launch, kept: list[Path]
) -> None:
    """It does so even where the lock cannot be had at all, and at its end."""
    launch(four, kubelet, *keep_flags(kept), FAST, offers=4)
    for path in kept:
        wait_until(path.exists)
    before = [written(path) for path in kept]
    elsewhere = four.root / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "device-plugins").touch()  # no folder, so it cannot be locked
    flags = [*four.flags, *keep_flags(kept), f"--kubelet-dir={elsewhere}"]
    flags += ["--hugepages=always", "--resource-domain=x.org"]  # it would write others
    with contextlib.closing(Plugin([*COMMAND, *flags])) as other:
        other.wait_for_line("cannot lock .*: Not a directory")
        other.wait_for_line(f"{FOURTH.id} .* is Healthy")
        assert other.end()[0] == 0
    assert [written(path) for path in kept] == before


def test_one_that_stands_by_leaves_the_files_alone(
    kubelet: Kubelet, four: Tree, launch: Launch, kept: list[Path]
) -> None:
    """It is ready meanwhile, and keeps them once it has taken over."""
    flags = keep_flags(kept)
    first = launch(four, kubelet, *flags, offers=4)
    for path in kept:
        wait_until(path.exists)
    before = [written(path) for path in kept]
    other = launch(four, kubelet, *flags, HTTP)
    other.wait_for_line(STANDING_BY)
    other.wait_for_line(f"{FIRST.id} .* is Healthy")
    status, text = fetch(other, "/readyz")
    assert status == 200
    assert text.startswith("another instance serves")
    assert [written(path) for path in kept] == before
    first.end()
    for path in kept:
        wait_until(path.exists)
    other.end()
    assert not any(path.exists() for path in kept)


# ---- Labels ----


@pytest.mark.parametrize("variants", [False, True])
@rows(
    "cards, topology",
    """
    T3000             n300=4                t3000
    three n300        n300=3
    not only n300     n300=4,n150=2
    WH Galaxy         galaxy-wormhole=32    galaxy
    a part of it      galaxy-wormhole=31
    BH Galaxy         galaxy-blackhole=32   galaxy
    more than one     galaxy-blackhole=33
    all models        n150=2,n300=2,p100=2,p150=2,p300=2,galaxy-wormhole=40,\
galaxy-blackhole=9
    """,
)
def test_labels_say_counts_firmware_driver_and_topology(
    workdir: Path, cards: str, topology: str, variants: bool
) -> None:
    """The topology is there only if it is beyond doubt. --variants keeps a letter."""
    made = tt.fake_spec(cards)
    tt.make_fake_tree(workdir, made)
    (workdir / "sys/module/tenstorrent/version").write_text("2.10.0+git~")
    settings = tt.Settings(
        sysfs_root=workdir / "sys",
        dev_root=workdir / "dev",
        resource_domain="a.b",
        variants=variants,
    )
    snapshot = tt.Inventory(settings).poll(100.0)
    expected = {"a.b/driver-version=2.10.0_git"}  # a valid label
    if topology:
        expected.add(f"a.b/topology={topology}")
    models = Counter[str]()
    for model, count in made.items():
        name = f"{model}a" if variants and model.startswith("p") else model
        models[name] = count
        expected |= {f"a.b/{name}.count={count}", f"a.b/{name}.firmware=19.5.0.0"}
    healthy = [card for card in snapshot.cards if card.verdict.health == "Healthy"]
    assert Counter(card.model for card in healthy) == models
    assert {*tt.node_labels(settings, snapshot).splitlines()} == expected


def test_no_label_for_different_firmware(workdir: Path) -> None:
    """Without cards there is no label at all."""
    tt.make_fake_tree(workdir, {"n150": 2})
    inventory = metrics_of(workdir).inventory
    settings = inventory.settings
    first, second = inventory.snapshot.cards
    assert "firmware" in tt.node_labels(settings, inventory.snapshot)
    (chip,) = first.chips
    other = replace(first, chips=(replace(chip, firmware="1"),))
    mixed = replace(inventory.snapshot, cards=(other, second))
    assert "firmware" not in tt.node_labels(settings, mixed)
    assert tt.node_labels(settings, replace(mixed, cards=())) == ""


# ==== Appendix G. The command line: flags, --list, --dry-run, --fake ==================

# Each flag, two values that are right, and wrong ones. "-": a switch, whose variable
# has a value.
FLAGS = f"""
--list - true perhaps
--dry-run - YES 2
--variants - 1 on
--fake n300=4 n150=2,p300=1 n150 n150=x n150=-1 n150=0 n151=1 p100=1, n150=1000 p300=101
--kubelet-dir /k /l k ./k
--sysfs-root /s /t s
--dev-root /d /e d
--cdi-dir /c /d c
--labels-dir /l /m l
--poll-seconds 0.1 60 0 0.09 61 -1 nan inf often
--resource-domain a-b.example x x/y X_ kubernetes.io a.kubernetes.io requests.a -a \
a..b {"a" * 254}
--hugepages always never maybe
--listen [::1]:0 :7762 7762 localhost:7762 127.0.0.1 1.2.3.4:70000 ::1:80 u@1.2.3.4:80 \
1.2.3.4:80/x
--log-format text json xml
--log-level error debug loud
""".split("\n")[1:-1]


def variable_of(flag: str) -> str:
    """The environment variable of a flag."""
    return "TT_DEVICE_PLUGIN_" + flag.removeprefix("--").upper().replace("-", "_")


@pytest.mark.parametrize("line", FLAGS)
def test_each_flag_has_a_variable(line: str) -> None:
    """The command line wins over it. An empty variable is none."""
    flag, other, value, *_ = line.split()
    variable = variable_of(flag)
    plain = tt.parse([], {})
    options = tt.parse([], {variable: value})
    assert options != plain
    assert tt.parse([], {variable: ""}) == plain
    if other == "-":
        assert options == tt.parse([flag], {})
    else:
        assert options == tt.parse([f"{flag}={value}"], {})
        both = tt.parse([f"{flag}={other}"], {variable: value})
        assert both == tt.parse([f"{flag}={other}"], {})


@pytest.mark.parametrize("line", FLAGS)
def test_a_wrong_value_is_quoted_with_its_place(
    line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The place is the flag or its variable. The exit code is 2."""
    flag, other, _, *wrong = line.split()
    variable = variable_of(flag)
    for text in wrong:
        tries: list[tuple[str, list[str], dict[str, str]]] = [
            (variable, [], {variable: text})
        ]
        if other != "-":
            tries.append((flag, [f"{flag}={text}"], {}))
        for place, argv, variables in tries:
            with pytest.raises(SystemExit, match="2"):
                tt.parse(argv, variables)
            message = capsys.readouterr().err.splitlines()[-1]
            assert f" {place}: '{text}' is not " in message


find_flags = re.compile(r"(?<![\w-])--[a-z-]+").findall
FLAG_NAMES = {*(line.split()[0] for line in FLAGS), "--json", "--help", "--version"}


def test_help_names_each_flag() -> None:
    """It names no other flag."""
    done = run(COMMAND, "--help", COLUMNS="200")
    assert {*find_flags(done.stdout)} == FLAG_NAMES


def test_readme_names_each_flag() -> None:
    """Its table has each flag's variable. Its commands have no other flag."""
    expected = {flag: [variable_of(flag)] for flag in FLAG_NAMES}
    expected |= {"--help": [], "--version": []}
    named = {}
    for flags, variables, *_ in table("flag"):
        for flag in find_flags(flags):
            named[flag] = in_code(variables)
    assert named == expected
    commands = re.findall(r"(?:\.pyz|^\./build\.sh run) (--.*)$", README, re.MULTILINE)
    assert commands
    arguments = [*commands, *container_of(MANIFEST)["args"]]
    assert {*find_flags(" ".join(arguments))} <= FLAG_NAMES


def test_readme_sets_no_unknown_variable() -> None:
    """It would have no effect, and no message would say so."""
    named = {*re.findall(r"\bTT_DEVICE_PLUGIN_[A-Z_]+", README)}
    assert named
    assert named <= {variable_of(flag) for flag in FLAG_NAMES}


def test_readme_and_help_have_one_wording() -> None:
    """A flag's meaning in README begins with what --help says."""
    meanings = {}
    for flags, _, _, meaning in table("flag"):
        name, _, metavar = in_code(flags)[0].replace("\\|", "|").partition(" ")
        meanings[name] = (metavar, meaning.replace("`", ""))
    shown = " ".join(run(COMMAND, "--help", COLUMNS="300").stdout.split())
    for flag in tt.FLAGS:
        metavar, meaning = meanings[flag.name]
        assert metavar == flag.metavar
        assert re.fullmatch(re.escape(flag.help) + r"([;.] .+)?", meaning), flag.name
        about = f"{flag.name} {flag.metavar}".strip()
        assert f"{about} {flag.help}" in shown


def test_readme_and_help_have_one_default() -> None:
    """It is the value of a flag that is not set. README says "off" for none."""
    shown = " ".join(run(COMMAND, "--help", COLUMNS="300").stdout.split())
    for flags, _, default, _ in table("flag")[:-1]:
        (name,) = find_flags(flags)
        text = default.strip("`")
        options = tt.parse([], {})
        value = getattr(options, name.removeprefix("--").replace("-", "_"))
        if text == "off":
            assert not value, name
        else:
            assert str(value).removesuffix(".0") == text
            assert f"(default: {value})" in shown


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--json", "--json goes with --list"),
        ("--list --dry-run", "--list and --dry-run exclude each other"),
        ("surplus", "unrecognized arguments: surplus"),
        ("--vers", "unrecognized arguments: --vers"),
        (f"--kubelet-dir=/{'k' * 60}", "is 10 bytes too long for the paths of sockets"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(words: str, message: str) -> None:
    """The exit code is 2, and a sentence says why."""
    done = run(COMMAND, *words.split())
    assert done.returncode == 2
    assert message in done.stderr.splitlines()[-1]


def test_readme_names_each_exit_code() -> None:
    """Tests of stopping, of the dry run and of wrong values have 0, 1 and 2."""
    assert [row[0] for row in table("exit code")] == ["0", "1", "2"]


# ---- --list ----


def list_cards(tree: Tree, *flags: str) -> str:
    """What --list prints."""
    done = run(COMMAND, *tree.flags, "--list", *flags)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_list_without_cards(workdir: Path) -> None:
    """No cards is a valid answer."""
    tree = Tree(workdir)
    assert list_cards(tree, "--json") == "[]\n"
    assert list_cards(tree) == "No Tenstorrent cards (driver 2.10.0).\n"


@pytest.fixture
def mixed(tree: Tree) -> Tree:
    """A node with cards in any state."""
    tree.add(FIRST)
    tree.add(FOURTH)
    tree.add(replace(SECOND, card_type=""))
    tree.add(replace(THIRD, card_type="unknown"))
    for chip in P300:
        tree.add(replace(chip, index=chip.index + 4))
    tree.remove(SECOND.pci, driver="vfio-pci")
    tree.node(THIRD.pci).unlink()
    return tree


def test_list_as_json(mixed: Tree) -> None:
    """Cards are ordered by resource, then by PCI address."""
    cards = json.loads(list_cards(mixed, "--json"))
    assert cards[0] == {
        "id": FIRST.id,
        "resource": R150,
        "model": "n150",
        "arch": "wormhole",
        "device_nodes": ["/dev/tenstorrent/0"],
        "pci_addresses": [FIRST.pci],
        "numa_node": 0,
        "board_serial": FIRST.serial,
        "firmware": "80.17.0.0",
        "health": "Healthy",
        "reason": "",
    }
    assert [(card["resource"], card["health"]) for card in cards] == [
        (R150, "Healthy"),
        (R150, "Healthy"),
        ("tenstorrent.com/p300", "Healthy"),
        ("tenstorrent.com/wormhole", "Unhealthy"),
        (None, "pending"),
    ]


def test_list_in_columns(mixed: Tree) -> None:
    """Each card has a line. The reasons stand below all lines."""
    cards = json.loads(list_cards(mixed, "--json"))
    columns, *below = list_cards(mixed).strip().split("\n\n")
    lines = [re.split("  +", line) for line in columns.splitlines()[1:]]
    assert [(line[0], line[1], line[-1]) for line in lines] == [
        (card["resource"] or "not offered", card["id"], card["health"])
        for card in cards
    ]
    reasons = [f"{card['id']}: {card['reason']}" for card in cards if card["reason"]]
    assert below == reasons
    no_node, no_driver = below
    assert "device node /dev/tenstorrent/2 is missing" in no_node
    assert "vfio-pci" in no_driver


# ---- --dry-run ----


def dry_run(tree: Tree, kubelet: Kubelet, *flags: str) -> Finished:
    """A dry run with the flags of a plugin on this kubelet's folder."""
    own = [f"--kubelet-dir={kubelet.root}", f"--cdi-dir={kubelet.root}/cdi"]
    return run([*COMMAND, *tree.flags, *own, "--dry-run"], *flags)


def test_dry_run_leaves_the_kubelet_alone(four: Tree, kubelet: Kubelet) -> None:
    """It has this node's cards and a kubelet of its own, and writes no file.

    test_readme_shows_what_its_first_command_prints has what it prints.
    """
    kubelet.start()
    done = dry_run(four, kubelet)
    assert (done.returncode, done.stderr) == (0, "")
    assert FOURTH.id in done.stdout
    assert not kubelet.seen("register")
    assert os.listdir(kubelet.root) == ["device-plugins"]


@pytest.mark.parametrize(
    ("flags", "step"),
    [([], "3. ListAndWatch: "), (["--sysfs-root=/nowhere"], "1. Discover: ")],
)
def test_dry_run_says_after_which_step_it_failed(
    four: Tree, kubelet: Kubelet, flags: list[str], step: str
) -> None:
    """Its exit code is 1."""
    for chip in N150:
        four.node(chip.pci).unlink()
    done = dry_run(four, kubelet, *flags)
    assert done.returncode == 1
    assert "\nFAILED after the step above: " in done.stdout
    assert done.stdout.split("\n\n")[-2].lstrip().startswith(step), done.stdout


def test_a_dry_run_says_why_its_plugin_has_ended() -> None:
    """It does not wait for a registration that will not come."""

    async def fail() -> None:
        raise tt.CannotWork("WHY")

    async def wait() -> None:
        plugin = asyncio.create_task(fail())
        await tt.next_request(tt.DryRunKubelet(), plugin)

    with pytest.raises(tt.CannotWork, match="WHY"):
        asyncio.run(wait())


# Runs the plugin in an interpreter to which something was done first.
PROGRAM = """
import importlib.machinery, os, runpy, signal, sys, tempfile
{}
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
NO_TEMPORARY_FOLDER = "tempfile._candidate_tempdir_list = lambda: ['/nowhere']"


@pytest.mark.parametrize("flag", ["--dry-run", "--list"])
def test_cannot_work_without_a_temporary_folder(flag: str) -> None:
    """The exit code is 1, and a sentence says what to set."""
    path = f"sys.path.insert(0, {str(HERE)!r})"
    program = PROGRAM.format(f"{path}; {NO_TEMPORARY_FOLDER}")
    command = [sys.executable, "-c", program, COMMAND[-1]]
    done = run(command, "--fake=n150=1", flag)
    assert done.returncode == 1
    assert re.search(
        r"^\S+ ERROR cannot make a temporary folder: .*set TMPDIR.*\n$", done.stderr
    )


@pytest.mark.parametrize("uid", [0, 65534])
def test_cannot_work_without_the_right_to_make_sockets(
    four: Tree, kubelet: Kubelet, uid: int
) -> None:
    """The exit code is 1, and a sentence names folder, user and remedy."""
    user = ["setpriv", "--bounding-set=-all", "--inh-caps=-all"]
    user += [f"--reuid={uid}", f"--regid={uid}", "--clear-groups", *COMMAND]
    if os.getuid() or finish([*user, "--version"]).returncode:
        pytest.skip(f"needs setpriv, root, and an interpreter that uid {uid} can read")
    kubelet.folder.mkdir(mode=0o755, parents=True)  # it may be opened
    os.chown(kubelet.folder, 65533, 65533)
    done = run(user, f"--kubelet-dir={kubelet.root}", *four.flags)
    assert done.returncode == 1
    assert f"uid {uid} cannot make sockets in {kubelet.folder}. " in done.stderr
    assert "run the plugin as uid 0" in done.stderr


# ==== The packed file: what is in it, and where it runs ===============================

PYZ = HERE / "dist/tt-device-plugin.pyz"
UNIVERSAL = HERE / "dist/tt-device-plugin-universal.pyz"
PYTHONS = range(10, 16)  # minor versions of CPython that the universal file is for
# Machine, and what Debian calls it.
DEBIAN_CPU = {"x86_64": "amd64", "aarch64": "arm64"}


def build(folder: Path, *words: str, umask: int = 0o022, **variables: Any) -> Finished:
    """Run `./build.sh WORDS` in that folder, with this interpreter or PYTHON."""
    env = {**os.environ, "PYTHON": sys.executable, **variables}
    return finish([folder / "build.sh", *words], env=env, umask=umask)


def build_words(packed: Path) -> list[str]:
    """The arguments of build.sh that make this file."""
    return ["--universal"] if packed == UNIVERSAL else []


@pytest.fixture(
    params=[PYZ, pytest.param(UNIVERSAL, marks=long_only)],
    ids=[PYZ.name, UNIVERSAL.name],
)
def packed(request: pytest.FixtureRequest) -> Path:
    """The file for this interpreter; with --long also the universal one."""
    path = Path(request.param)
    done = build(HERE, *build_words(path))
    assert done.returncode == 0, done.stdout + done.stderr
    return path


def interpreters() -> dict[int, str]:
    """The CPythons 3.N of this machine, by N.

    pyenv's own come before those on PATH, because its shims may refuse.
    """
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    folders = [*map(str, pyenv.glob("versions/3.*/bin")), os.environ["PATH"]]
    found = {}
    for minor in range(4, 20):
        path = shutil.which(f"python3.{minor}", path=os.pathsep.join(folders))
        if path:
            found[minor] = path
    return found


def test_builds_are_reproducible(packed: Path) -> None:
    """The same bytes come out anywhere. The build prints their SHA-256."""
    before = packed.read_bytes()
    python = sys.executable
    if packed == UNIVERSAL:
        for minor, path in interpreters().items():
            if minor in PYTHONS:
                python = path
    packed.unlink()
    variables: dict[str, Any] = {"LC_ALL": "C", "TZ": "Asia/Kolkata", "PYTHON": python}
    done = build(HERE, *build_words(packed), umask=0o077, **variables)
    assert done.returncode == 0, done.stdout + done.stderr
    assert packed.read_bytes() == before
    assert hashlib.sha256(before).hexdigest() in done.stdout
    assert stat.S_IMODE(packed.stat().st_mode) == 0o755, "any user may run it"


def test_packed_file_has_modules_for_just_its_pythons(packed: Path) -> None:
    """Nothing in it is of this machine."""
    with zipfile.ZipFile(packed) as archive:
        content = {entry: archive.read(entry) for entry in archive.infolist()}
    for entry, data in content.items():
        assert entry.date_time[0] == 1980
        assert entry.external_attr >> 16 == 0o100644
        assert str(HERE).encode() not in data, entry.filename
    names = "\n".join(entry.filename for entry in content)
    pattern = r"cygrpc\.cpython-3(\d+)-(\w+)-linux-gnu\.so$"
    found = re.findall(pattern, names, re.MULTILINE)
    expected = {(str(sys.version_info.minor), platform.machine())}
    if packed == UNIVERSAL:
        expected = {(str(minor), cpu) for minor in PYTHONS for cpu in DEBIAN_CPU}
    assert {*found} == expected
    assert len(found) == len(expected)


@long_only
def test_sbom_lists_the_locked_packages_with_licences() -> None:
    """The SBOM is in the universal file."""
    assert build(HERE, "--universal").returncode == 0
    with zipfile.ZipFile(UNIVERSAL) as archive:
        sbom = json.loads(archive.read("sbom.cdx.json"))
    listed = {}
    for component in sbom["components"]:
        assert component["licenses"], component
        listed[component["name"].replace("_", "-")] = component["version"]
    _, runtime, *_ = (HERE / "requirements.txt").read_text().split("# ---- ")
    assert listed == dict(re.findall(r"^([\w.-]+)==(\S+)", runtime, re.MULTILINE))


NOBODY = "http://127.0.0.1:1/simple"  # nobody listens there
INDEX = {
    "PIP_INDEX_URL": NOBODY,
    "PIP_EXTRA_INDEX_URL": NOBODY,
    "PIP_FIND_LINKS": "",
    "PIP_CONFIG_FILE": "/dev/null",
    "PIP_NO_CACHE_DIR": "1",
    "PIP_RETRIES": "0",
}


# What is changed in requirements.txt: a pattern, and what replaces it.
Edit = tuple[str, str]
TAMPERED: Edit = (r"sha256:\w{8}", "sha256:00000000")
NOT_LOCKED: Edit = ("for: grpcio==", "for: grpcio!=")


@pytest.mark.parametrize(
    ("edit", "words", "variables", "message"),
    [
        pytest.param(None, [], INDEX, "grpcio", id="no index but the user's"),
        pytest.param(TAMPERED, [], {}, "hash", id="a tampered mirror"),
        pytest.param(NOT_LOCKED, [], {}, r"\./build\.sh lock", id="no lock"),
        pytest.param(
            None, ["image"], {"TOOL": "no-tool"}, "no-tool(.|\n)*podman", id="no tool"
        ),
    ],
)
def test_builds_that_cannot_be_right_are_refused(
    tmp_path: Path,
    edit: Edit | None,
    words: list[str],
    variables: dict[str, Any],
    message: str,
) -> None:
    """A sentence says why, the exit code is 1, and there is no file."""
    ignore = shutil.ignore_patterns("build", "dist", ".git", "__pycache__", ".*cache")
    project = Path(shutil.copytree(HERE, tmp_path / "project", ignore=ignore))
    path = project / "requirements.txt"
    if edit:
        pattern, text = edit
        path.write_text(re.sub(pattern, text, path.read_text()))
    done = build(project, *words, **variables)
    assert done.returncode == 1
    assert re.search(message, done.stderr, re.IGNORECASE), done.stderr
    assert not (project / "dist").exists()


# ---- Where it runs ----


def offers_cards(
    kubelet: Kubelet, command: Sequence[str], root: str, **box: str
) -> None:
    """Assert that a command offers four cards, gives one to a Pod, and ends by SIGTERM.

    `root` is where the command sees the test's folder.
    """
    flags = [
        f"--kubelet-dir={root}/k",
        f"--sysfs-root={root}/sys",
        f"--dev-root={root}/dev",
    ]
    running = Plugin([*command, *flags], cwd="/", env=environment(**box))
    with contextlib.closing(running) as plugin:
        kubelet.wait_status(R150, 4, 4, timeout=300)
        (node,) = kubelet.allocate(R150, [THIRD.id])["devices"]
        assert node["host_path"] == "/dev/tenstorrent/2"
        assert plugin.end()[0] == 0, plugin.lines()


@pytest.mark.parametrize(
    "minor", [10, *(pytest.param(n, marks=long_only) for n in PYTHONS[1:])]
)
def test_serves_on_each_python(four: Tree, kubelet: Kubelet, minor: int) -> None:
    """It is the universal file, run in an empty environment."""
    python = interpreters().get(minor)
    if not python:
        pytest.skip(f"there is no python3.{minor} here, neither pyenv's nor on PATH")
    assert build(HERE, "--universal").returncode == 0
    kubelet.start()
    command = ["env", "-i", python, str(UNIVERSAL)]
    offers_cards(kubelet, command, str(kubelet.root.parent))


def needs_namespace(*tools: str) -> None:
    """Skip a test that needs these tools, and the right to make a mount namespace."""
    missing = [tool for tool in tools if not shutil.which(tool)]
    if missing or finish(["unshare", "-m", "true"]).returncode:
        pytest.skip(
            f"needs root that may make a mount namespace, and {', '.join(tools)}"
        )


OTHER_CPU = "aarch64" if platform.machine() == "x86_64" else "x86_64"
QEMU = f"qemu-{OTHER_CPU}-static"


@dataclass(frozen=True)
class Box:
    """A bare Debian, and how the plugin is run in it."""

    suite: str
    packages: str
    # /srv is this folder there, and /home this machine's /usr/bin.
    command: list[str]
    cpu: str = platform.machine()
    tool: str = "unshare"  # what it needs beside mmdebstrap


PACKED = f"/srv/dist/{UNIVERSAL.name}"
BOXES = {
    # Without the archive, on Debian 12's own grpcio 1.51 and protobuf 3.21.
    "Debian's packages": Box(
        "bookworm",
        "python3,python3-grpcio,python3-protobuf",
        ["python3", "-B", "/srv/tt_device_plugin.py"],
    ),
    "bookworm": Box("bookworm", "python3", ["python3", PACKED]),
    "trixie": Box("trixie", "python3", ["python3", PACKED]),
    "forky": Box("forky", "python3.15", ["python3.15", PACKED]),
    "other CPU": Box(
        "trixie",
        "python3",
        [f"/home/{QEMU}", "/usr/bin/python3", PACKED],
        OTHER_CPU,
        QEMU,
    ),
}

# Runs the rest of the line in $ROOT, as the user "nonroot" of many images, with only
# these $VARIABLES in the environment. Everything but the kubelet's folder is read-only,
# and all mounts vanish with the process.
IN_BOX_SCRIPT = r"""
cd "$ROOT"; mkdir -p dev proc mnt srv home; mount --bind . .; cd "$ROOT"
mount --bind /dev dev; mount --bind /proc proc
mount --bind "$WORKDIR" mnt; mount --bind "$HERE" srv; mount --bind /usr/bin home
for each in mnt srv home; do mount -o remount,bind,ro $each; done
mount --bind "$WORKDIR/k/device-plugins" mnt/k/device-plugins
mount -o remount,bind,ro .
# shellcheck disable=SC2086  # $VARIABLES are several words
exec env -i PATH=/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin $VARIABLES \
    chroot --userspec=65532:65532 . "$@"
"""
IN_BOX = ["unshare", "--mount", "sh", "-ec", IN_BOX_SCRIPT, "sh"]


def debian_root(box: Box) -> Path:
    """A bare Debian with its packages, unpacked but not set up. It stays in build/."""
    cpu = DEBIAN_CPU[box.cpu]
    root = HERE / "build/roots" / f"{box.suite}-{cpu}-{box.packages}"
    if not root.exists():  # one that is there is whole
        root.parent.mkdir(exist_ok=True)
        options = [
            "--variant=extract",
            # Mirrors and snapshots may be older than a release's lists are meant for.
            '--aptopt=Acquire::Check-Valid-Until "false"',
            f"--architectures={cpu}",
            f"--include=base-files,libstdc++6,{box.packages}",
        ]
        with tempfile.TemporaryDirectory(dir=root.parent) as draft:
            words = ["mmdebstrap", *options, box.suite, f"{draft}/root"]
            done = finish(words, umask=0o022)
            assert done.returncode == 0, done.stderr
            Path(draft, "root").rename(root)
    return root


@pytest.fixture
def open_kubelet(kubelet: Kubelet) -> Kubelet:
    """A kubelet whose folder and socket "nonroot" may use."""
    kubelet.start()
    os.chown(kubelet.folder, 65532, 65532)
    kubelet.socket.chmod(0o666)
    return kubelet


@long_only
@pytest.mark.parametrize("name", BOXES)
def test_serves_in_a_bare_debian(four: Tree, open_kubelet: Kubelet, name: str) -> None:
    """It needs nothing but Python and libstdc++6, and no rights."""
    box = BOXES[name]
    needs_namespace("mmdebstrap", box.tool)
    assert build(HERE, "--universal").returncode == 0
    offers_cards(
        open_kubelet,
        [*IN_BOX, *box.command],
        "/mnt",
        ROOT=str(debian_root(box)),
        WORKDIR=str(four.root),
        HERE=str(HERE),
        VARIABLES="",
    )


# Makes an image from $ROOT, and prints its configuration, and where its files are. All
# that podman makes is in the folder $1, and with vfs nothing is mounted.
IMAGE = r"""
cd "$1"
printf '[storage]\ndriver="vfs"\ngraphroot="%s/images"\n' "$1" >conf
printf 'runroot="%s/run"\n' "$1" >>conf
export CONTAINERS_STORAGE_CONF="$1/conf" BUILDAH_ISOLATION=chroot TOOL=podman
export BASE=localhost/base
printf 'FROM scratch\nCOPY . /\n' | podman build -q -t $BASE -f - "$ROOT"
"$HERE/build.sh" image localhost/plugin:1
podman image inspect --format '{{json .Config}}' localhost/plugin:1
podman image mount localhost/plugin:1
"""


@long_only
def test_serves_as_an_image(four: Tree, open_kubelet: Kubelet, tmp_path: Path) -> None:
    """It needs no rights, and compiles nothing at its start."""
    needs_namespace("mmdebstrap", "podman")
    box: dict[str, Any] = {
        "ROOT": str(debian_root(BOXES["bookworm"])),
        "WORKDIR": str(four.root),
        "HERE": str(HERE),
    }
    done = finish(["sh", "-ec", IMAGE, "sh", str(tmp_path)], env=environment(**box))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "image: localhost/plugin:1\n" in (HERE / "dist/daemonset.yaml").read_text()
    *_, text, box["ROOT"] = done.stdout.splitlines()
    config = json.loads(text)
    box["VARIABLES"] = " ".join([*config["Env"], "TMPDIR=/mnt/k/device-plugins"])
    python, *words = config["Entrypoint"]

    # Made-up cards need what the plugin imports last, and a folder to write to.
    flags = ["--fake=n150=1", "--list"]
    done = run([*IN_BOX, python, "-v", *words, *flags], **box)
    pattern = r"^# code object from '?(/.*\.py)'?$"
    assert done.returncode == 0
    assert re.findall(pattern, done.stderr, re.MULTILINE) == []
    offers_cards(open_kubelet, [*IN_BOX, python, *words], "/mnt", **box)


def test_packed_file_starts(packed: Path, tmp_path: Path) -> None:
    """Eight start at once, each as a command, and none leaves a file."""
    file = tmp_path / "a folder with spaces/the file"
    empty = tmp_path / "empty"
    file.parent.mkdir()
    empty.mkdir()
    shutil.copy(packed, file)
    path = f"{Path(sys.executable).parent}:/usr/bin:/bin"
    env = {"PATH": path, "HOME": str(empty), "TMPDIR": str(empty)}
    running = [
        subprocess.Popen(
            [file, "--version"], stdout=subprocess.PIPE, text=True, env=env, cwd=empty
        )
        for _ in range(8)
    ]
    for process in running:
        answer, _ = process.communicate(timeout=120)
        assert process.returncode == 0
        assert tt.__version__ in answer
    assert [*empty.iterdir(), *file.parent.iterdir()] == [file]


def check_version(command: Sequence[str], code: int, says: str) -> None:
    """Assert that `--version` ends with this code, and says this in one line."""
    done = run(command, "--version")
    said = done.stdout + done.stderr
    assert done.returncode == code, said
    assert said.count("\n") == 1
    assert re.search(says, said), said


def changed(packed: Path, change: str) -> list[str]:
    """A command that runs a packed file in an interpreter changed like this."""
    return [sys.executable, "-c", PROGRAM.format(change), str(packed)]


@pytest.mark.parametrize(
    ("change", "code", "says"),
    [
        ("del os.memfd_create", 0, f"^tt-device-plugin {tt.__version__} "),
        (
            f"del os.memfd_create; {NO_TEMPORARY_FOLDER}",
            1,
            "cannot start: .* needs memfd_create, or a folder for temporary files",
        ),
        (
            "sys.modules['asyncio'] = None",
            1,
            r"import of asyncio halted.* libstdc\+\+6",
        ),
    ],
)
def test_packed_file_says_what_is_missing(
    packed: Path, change: str, code: int, says: str
) -> None:
    """It is one sentence. The file can do without memfd_create."""
    check_version(changed(packed, change), code, says)


@pytest.mark.parametrize("how", ["SIGINT", "SIGTERM"])
def test_packed_file_ends_by_a_signal_while_it_starts(packed: Path, how: str) -> None:
    """Its exit code is 0, and there is no traceback."""
    change = f"""
def send(event, arguments):
    if event == "import" and arguments[0] == "grpc":
        signal.raise_signal(signal.{how})
sys.addaudithook(send)
"""
    done = run(changed(packed, change), "--version")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def not_for_this_python(packed: Path) -> str:
    """A pattern for what a packed file says to a Python that it is not for."""
    minors = PYTHONS if packed == UNIVERSAL else [sys.version_info.minor]
    versions = ", ".join(f"3.{minor}" for minor in minors)
    return f"is not for this Python.* CPython {versions} on "


def test_packed_file_names_its_pythons(packed: Path) -> None:
    """Another one, such as one that is newer, gets a sentence and exit code 1."""
    change = "importlib.machinery.EXTENSION_SUFFIXES[:] = ['.cpython-399-other.so']"
    check_version(changed(packed, change), 1, not_for_this_python(packed))


def test_packed_file_names_its_pythons_to_an_old_one(packed: Path) -> None:
    """It is read by a Python that may not know its syntax."""
    old = [path for minor, path in interpreters().items() if minor < min(PYTHONS)]
    if not old:
        pytest.skip("there is no CPython 3.4 to 3.9 here, neither pyenv's nor on PATH")
    for path in old:
        check_version([path, str(packed)], 1, not_for_this_python(packed))


# ==== README and daemonset.yaml: what they say ========================================

MANIFEST_TEXT = (HERE / "daemonset.yaml").read_text()
ACCOUNT, MANIFEST = yaml.safe_load_all(MANIFEST_TEXT)


def kubernetes_versions() -> list[str]:
    """Oldest and newest Kubernetes versions the validator knows."""
    versions = kubernetes_validate.utils.all_versions()
    versions.sort(key=lambda text: [*map(int, text.split("."))])
    return [versions[0], versions[-1]]


def blocks(language: str) -> list[str]:
    """README's code blocks of a language."""
    pattern = rf"^```{language}\n(.*?)^```$"
    return re.findall(pattern, README, re.MULTILINE | re.DOTALL)


def table(head: str) -> list[list[str]]:
    """The cells of README's table whose first column has this head."""
    pattern = rf"^\| {head} \|.*\n\|[-|: ]+\|\n((?:\|.*\|\n)+)"
    found = re.search(pattern, README, re.MULTILINE)
    assert found, f"README has no table of {head}"
    cells = []
    for line in found[1].splitlines():
        _, *inner, _ = re.split(r"(?<!\\)\|", line)
        cells.append([cell.strip() for cell in inner])
    return cells


def in_code(cell: str) -> list[str]:
    """What is in backticks in a cell."""
    return re.findall(r"`([^`]+)`", cell)


(POD,) = map(yaml.safe_load, blocks("yaml"))


def container_of(manifest: Event) -> Event:
    """Its only container."""
    (container,) = manifest["spec"]["template"]["spec"]["containers"]
    return dict(container)


IMAGE_NAME = "registry.example/plugin:7"


@pytest.fixture(params=["file", "image"])
def objects(request: pytest.FixtureRequest) -> list[Event]:
    """The manifest's objects: for the file on the node, and for an image."""
    if request.param == "file":
        return [ACCOUNT, MANIFEST]
    done = finish([sys.executable, HERE / "tools/manifest.py", IMAGE_NAME])
    made = list(yaml.safe_load_all(done.stdout))
    assert container_of(made[-1])["image"] == IMAGE_NAME
    return made


@pytest.fixture
def manifest(objects: list[Event]) -> Event:
    """The DaemonSet of either manifest."""
    _, daemonset = objects
    return daemonset


@pytest.mark.parametrize("version", kubernetes_versions())
def test_manifest_is_valid(objects: list[Event], version: str) -> None:
    """README's Pod is valid, too."""
    for one in (*objects, POD):
        kubernetes_validate.validate(one, version, strict=True)


# README's words for an edit of the manifest, and the edit: a pattern, and what replaces
# it.
EDITS: dict[str, Edit] = {
    "delete `seLinuxOptions` and the line below it": (r"^ *seLinuxOptions:\n.*\n", ""),
    "delete `rollingUpdate` and the two lines below it": (
        r"^ *rollingUpdate:\n.*\n.*\n",
        "",
    ),
    "uncomment `tenstorrent.com/cards`": (r"# (tenstorrent\.com/cards: )", r"\1"),
    "uncomment the Node Feature Discovery lines": (
        r"# (- key: feature.*\n *)# (.*\n *)# ",
        r"\1\2",
    ),
}


@pytest.mark.parametrize("words", EDITS)
def test_manifest_can_be_edited_as_readme_says(words: str) -> None:
    """It stays valid, and means something else."""
    assert words in " ".join(README.split())
    pattern, new = EDITS[words]
    text, count = re.subn(pattern, new, MANIFEST_TEXT, flags=re.MULTILINE)
    assert count == 1
    account, edited = yaml.safe_load_all(text)
    assert account == ACCOUNT
    assert edited != MANIFEST
    for version in kubernetes_versions():
        kubernetes_validate.validate(edited, version, strict=True)


def test_manifest_takes_what_it_needs_of_the_host(manifest: Event) -> None:
    """It takes nothing else, and writes to the kubelet's folder alone."""
    container = container_of(manifest)
    volumes = manifest["spec"]["template"]["spec"]["volumes"]
    paths = {volume["name"]: volume["hostPath"]["path"] for volume in volumes}
    mounts = {paths[mount["name"]]: mount for mount in container["volumeMounts"]}
    folder = "/var/lib/kubelet/device-plugins"  # --kubelet-dir's default
    expected = {folder, "/dev"}
    if container["image"] != IMAGE_NAME:
        expected.add("/opt/tenstorrent")
    assert mounts.keys() == expected
    assert [path for path in mounts if not mounts[path].get("readOnly")] == [folder]
    assert mounts[folder]["mountPath"] == folder
    assert f"--dev-root={mounts['/dev']['mountPath']}" in container["args"]
    # So that it sees huge pages that are mounted after its start.
    assert mounts["/dev"]["mountPropagation"] == "HostToContainer"


def test_manifest_runs_on_each_real_node(manifest: Event) -> None:
    """It tolerates any taint. On a virtual node the Pod would be Pending for ever."""
    spec = manifest["spec"]["template"]["spec"]
    assert spec["tolerations"] == [{"operator": "Exists"}]
    assert spec["nodeSelector"] == {"kubernetes.io/os": "linux"}
    affinity = spec["affinity"]["nodeAffinity"]
    wanted = affinity["requiredDuringSchedulingIgnoredDuringExecution"]
    (term,) = wanted["nodeSelectorTerms"]
    virtual = {"key": "type", "operator": "NotIn", "values": ["virtual-kubelet"]}
    assert term == {"matchExpressions": [virtual]}


def test_manifest_updates_without_a_gap(manifest: Event) -> None:
    """The new Pod starts beside the old one. No minReadySeconds: that can stall it."""
    spec = manifest["spec"]
    surge = {"maxSurge": 1, "maxUnavailable": 0}
    strategy = {"type": "RollingUpdate", "rollingUpdate": surge}
    assert spec["updateStrategy"] == strategy
    assert "minReadySeconds" not in spec


def test_manifest_has_an_account_of_its_own(objects: list[Event]) -> None:
    """The account has no token. README names it for OpenShift."""
    account, manifest = objects
    spec = manifest["spec"]["template"]["spec"]
    name = account["metadata"]["name"]
    namespace = account["metadata"]["namespace"]
    assert (account["kind"], manifest["kind"]) == ("ServiceAccount", "DaemonSet")
    assert spec["serviceAccountName"] == name
    assert manifest["metadata"]["namespace"] == namespace
    assert account["automountServiceAccountToken"] is False
    assert f"add-scc-to-user privileged -z {name} -n {namespace}`" in README


def test_images_are_named_with_their_registry() -> None:
    """Some container runtimes refuse short names (cri-o#9401)."""
    (container,) = POD["spec"]["containers"]
    for image in (container_of(MANIFEST)["image"], container["image"]):
        assert image.startswith("docker.io/library/")
    texts = [README, *(path.read_text() for path in (HERE / "tools").glob("*"))]
    texts += [MANIFEST_TEXT, (HERE / "build.sh").read_text()]
    for text in texts:
        for registry, image in re.findall(
            r"(\S*?)\b(busybox|python:3\.[\w.-]+)(?=[\s`}])", text
        ):
            assert registry.endswith("docker.io/library/"), image


def test_manifest_has_one_port(manifest: Event) -> None:
    """The plugin listens there, and it is declared, probed and scraped."""
    container = container_of(manifest)
    (port,) = container["ports"]
    assert f"--listen=:{port['containerPort']}" in container["args"]
    for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
        assert container[probe]["httpGet"]["port"] == port["name"]
    annotations = manifest["spec"]["template"]["metadata"]["annotations"]
    assert annotations["prometheus.io/port"] == str(port["containerPort"])


def test_manifest_has_no_privileges(manifest: Event) -> None:
    """It is root without capabilities, on a read-only file system."""
    spec = manifest["spec"]["template"]["spec"]
    context = container_of(manifest)["securityContext"]
    expected = {
        "runAsUser": 0,
        "capabilities": {"drop": ["ALL"]},
        "readOnlyRootFilesystem": True,
        "allowPrivilegeEscalation": False,
        "privileged": False,
        "seccompProfile": {"type": "RuntimeDefault"},
    }
    assert context.items() >= expected.items()
    assert spec["automountServiceAccountToken"] is False
    assert not {"hostNetwork", "hostPID", "hostIPC"} & spec.keys()


def manifest_command(folder: Path, port: int = 0) -> list[str]:
    """What the manifest's container runs, with this folder as the host's."""
    container = container_of(MANIFEST)
    words = [*container["command"], *container["args"]]
    return [
        word.replace("/opt/tenstorrent", str(folder)).replace("7762", f"{port}")
        for word in words
    ]


def test_manifest_waits_for_the_file(workdir: Path) -> None:
    """One line says what to copy. Once the file is there, it is run with the flags."""
    with zipfile.ZipFile(workdir / "draft", "w") as file:
        program = "import sys; sys.exit('RUNS ' + ' '.join(sys.argv))"
        file.writestr("__main__.py", program)
    with contextlib.closing(Plugin(manifest_command(workdir))) as waiting:
        waiting.wait_for_line(r"tt-device-plugin\.pyz")
        (workdir / "draft").rename(workdir / "tt-device-plugin.pyz")
        line = waiting.wait_for_line("^RUNS", timeout=30)
        assert "--listen" in line
        assert len(waiting.lines()) == 2, waiting.lines()


def test_waiting_for_the_file_answers_probes(workdir: Path) -> None:
    """So the Pod is Ready. Its pages say what is missing, in a comment of Prometheus.

    HEAD gets the head alone.
    """
    with socket.create_server(("", 0)) as other:
        port = other.getsockname()[1]
    with contextlib.closing(Plugin(manifest_command(workdir, port))) as waiting:
        line = waiting.wait_for_line(r"tt-device-plugin\.pyz")
        for path in ("/healthz", "/readyz", "/metrics"):
            assert fetch(port, path) == (200, f"# {line}\n")
        _, head = answer_to(port, b"HEAD /healthz HTTP/1.1\r\n\r\n")
        assert head.endswith(b"\r\n\r\n")


def test_waiting_for_the_file_ends_by_sigterm(workdir: Path) -> None:
    """So nobody waits for the end of the Pod's grace period."""
    with contextlib.closing(Plugin(manifest_command(workdir))) as waiting:
        waiting.wait_for_line(r"tt-device-plugin\.pyz")
        code, seconds = waiting.end(signal.SIGTERM)
    assert code == 0
    assert seconds < 5


# ---- --fake ----


def test_readmes_pod_gets_made_up_cards(kubelet: Kubelet, launch: Launch) -> None:
    """README's Pod gets what it asks for, and one with two resources gets the rest.

    Their answers do not conflict (kubelet contract 12).
    """
    flags = ["--fake=n150=196,p300=2", "--hugepages=always"]
    launch(None, kubelet, *flags, offers=196)
    kubelet.wait_status("tenstorrent.com/p300", 2, 2)
    (container,) = POD["spec"]["containers"]
    first = kubelet.admit("first", container["resources"]["limits"])
    second = kubelet.admit("second", {R150: 195, "tenstorrent.com/p300": 2})
    devices = [*first["devices"], *second["devices"]]
    assert sorted(one["container_path"] for one in devices) == sorted(
        f"/dev/tenstorrent/{number}" for number in range(200)
    )
    assert {one["host_path"] for one in devices} == {"/dev/null"}
    assert len(second["mounts"]) == 1
    assert not kubelet.seen("conflict")


def test_made_up_cards_are_files_that_can_be_removed(
    kubelet: Kubelet, launch: Launch
) -> None:
    """A card without its files is Unhealthy. The rest goes with the process."""
    plugin = launch(None, kubelet, "--fake=n150=2", offers=2)
    line = plugin.wait_for_line("made-up cards in")
    (folder,) = re.findall("made-up cards in ([^:]*):", line)
    (Path(folder) / "sys/class/tenstorrent/tenstorrent!0").unlink()
    kubelet.wait_status(R150, 2, 1)
    assert plugin.end()[0] == 0
    assert not Path(folder).exists()
    assert not kubelet.plugin_sockets()


# ---- README ----


def test_readme_shows_what_its_first_command_prints() -> None:
    """In README "..." stands for what is left out."""
    (words,) = re.findall(r"^\./build\.sh (run .*)$", blocks("sh")[0], re.MULTILINE)
    done = build(HERE, *words.split())
    assert done.returncode == 0, done.stdout + done.stderr
    printed = "\n".join(" ".join(line.split()) for line in done.stdout.splitlines())
    for line in blocks("text")[0].splitlines():
        pattern = re.escape(" ".join(line.split())).replace(r"\.\.\.", ".*")
        # The name of a socket is the process's own.
        pattern = re.sub(r"-[0-9a-f]{6}\\\.sock", r"-[0-9a-f]{6}\.sock", pattern)
        shown = re.search(f"^{pattern}$", printed, re.MULTILINE)
        assert shown, f"{line!r}:\n{printed}"


def test_unit_is_valid_and_as_confined_as_readme_says(tmp_path: Path) -> None:
    """`./build.sh unit` prints it. It runs the file that README installs."""
    if not shutil.which("systemd-analyze"):
        pytest.skip("there is no systemd-analyze: it is in the package systemd")
    unit = tmp_path / "tt-device-plugin.service"
    unit.write_text(build(HERE, "unit").stdout)
    (file,) = re.findall(r"^ExecStart=\S+ (\S+)$", unit.read_text(), re.MULTILINE)
    assert any(file in block for block in blocks("sh")), "README installs it there"
    verify = finish(["systemd-analyze", "verify", unit])
    assert verify.returncode == 0
    assert not verify.stderr

    security = ["systemd-analyze", "security", "--offline=true", str(unit)]
    level = r"exposure level (?:of|for \S+:) (\d+\.\d)"
    found = re.findall(level, finish(security, env=environment(LC_ALL="C")).stdout)
    if not found:
        pytest.skip("systemd-analyze before 250 judges nothing but loaded units")
    (said,) = re.findall(level, README)
    assert float(found[0]) <= float(said) < 2


def test_readme_names_each_metric() -> None:
    """It names no other metric."""
    named = {name for row in table("metric") for name in in_code(row[0])}
    assert named == tt.HELP.keys()


def test_readme_names_what_there_is_to_change() -> None:
    """Each name in its table is defined in the module."""
    names = {name for _, change in table("to add") for name in in_code(change)}
    source = (HERE / "tt_device_plugin.py").read_text()
    pattern = r"^ *(?:(?:async )?def|class) (\w+)|^(\w+)(?:: .*)? = "
    defined = {*itertools.chain(*re.findall(pattern, source, re.MULTILINE))}
    assert names
    assert names <= defined


def test_readme_names_the_files_in_tools() -> None:
    """Each file that its table names is there."""
    names = {name for files, _ in table("in `tools/`") for name in in_code(files)}
    assert names
    assert names <= {*os.listdir(HERE / "tools")}


def test_readme_links_lead_to_headings_and_files() -> None:
    """Links to other sites are not followed."""
    anchors = set()
    for head in re.findall(r"^#+ (.*)$", README, re.MULTILINE):
        words = re.sub(r"[^a-z0-9 _-]", "", head.lower())
        anchors.add("#" + words.replace(" ", "-"))
    links = {link for link in re.findall(r"\]\(([^)]+)\)", README) if "://" not in link}
    assert links
    for link in links:
        assert link in anchors or (HERE / link).is_file(), link


def test_readme_names_this_version_only() -> None:
    """It does so in the names of images."""
    assert {*re.findall(r"tt-device-plugin:(\d+\.\d+\.\d+)", README)} == {
        tt.__version__
    }


# Runs a container with podman, on a CDI spec. /run is empty, so that no other spec or
# container is in the way. Limits stay as they are, because hardly any container may
# raise them. It is runc, because crun refuses some hosts' cgroups.
PODMAN = r"""
mount -t tmpfs none /run
cd /run
mkdir -p cdi root/bin root/dev root/proc root/sys root/run
cp "$1" cdi
cp "$(command -v busybox)" root/bin/busybox
exec podman --root /run/storage --cgroup-manager cgroupfs --runtime runc run --rm \
    --network none --ulimit nofile=1024:1024 --ulimit nproc=1024:1024 \
    --device "tenstorrent.com/card=$2" \
    --rootfs /run/root /bin/busybox ls /dev/tenstorrent
"""


def test_podman_takes_the_cdi_spec(workdir: Path) -> None:
    """`--device tenstorrent.com/card=...` gives that card's device nodes alone."""
    needs_namespace("podman", "runc", "busybox")
    made = {"n150": 2, "p300": 1}
    tt.make_fake_tree(workdir, made)
    inventory = metrics_of(workdir).inventory
    settings = replace(inventory.settings, fake=made)
    spec = workdir / CDI
    spec.write_text(tt.cdi_spec(settings, inventory.snapshot))
    *_, p300 = inventory.snapshot.cards
    for name, nodes in {"all": "0 1 2 3", "1": "1", p300.id: "2 3"}.items():
        words = ["unshare", "--mount", "sh", "-ec", PODMAN, "sh", str(spec), name]
        done = finish(words, timeout=60)
        assert done.stdout.split() == nodes.split(), done.stderr


def test_readme_symptoms_are_what_plugins_say(
    request: pytest.FixtureRequest, said: str
) -> None:
    """Each was said by a plugin in another test of this run.

    In README "..." stands for anything.
    """
    everything = {name for name in globals() if name.startswith("test_")}
    selected = {getattr(item, "originalname", "") for item in request.session.items}
    missing = everything - selected
    if missing:
        example = min(missing)
        pytest.skip(f"only a part runs, without {len(missing)} tests such as {example}")
    symptoms = [symptom for cell, *_ in table("symptom") for symptom in in_code(cell)]
    assert {
        "does another plugin register the same resource?",
        "Pod ... holds it as ...",
    } <= {*symptoms}
    for symptom in symptoms:
        pattern = ".+".join(map(re.escape, symptom.split("...")))
        assert re.search(pattern, said), symptom


# ==== You can stop reading here =======================================================
# What follows tests what the tests above stand on: the wire, and the fake kubelet.

# The API of Kubernetes 1.36: each message with its fields, which are numbered from 1 in
# this order, and each method with its request and answer. "*" is repeated, or a stream.
WIRE = """
Empty:
DevicePluginOptions: bool pre_start_required, bool get_preferred_allocation_available
RegisterRequest: string version, string endpoint, string resource_name, \
DevicePluginOptions options
ListAndWatchResponse: *Device devices
Device: string ID, string health, TopologyInfo topology
TopologyInfo: *NUMANode nodes
NUMANode: int64 ID
PreferredAllocationRequest: *ContainerPreferredAllocationRequest container_requests
ContainerPreferredAllocationRequest: *string available_deviceIDs, \
*string must_include_deviceIDs, int32 allocation_size
PreferredAllocationResponse: *ContainerPreferredAllocationResponse container_responses
ContainerPreferredAllocationResponse: *string deviceIDs
AllocateRequest: *ContainerAllocateRequest container_requests
ContainerAllocateRequest: *string devices_ids
AllocateResponse: *ContainerAllocateResponse container_responses
ContainerAllocateResponse: *EnvsEntry envs, *Mount mounts, *DeviceSpec devices, \
*AnnotationsEntry annotations, *CDIDevice cdi_devices
EnvsEntry: string key, string value
AnnotationsEntry: string key, string value
Mount: string container_path, string host_path, bool read_only
DeviceSpec: string container_path, string host_path, string permissions
CDIDevice: string name
PreStartContainerRequest: *string devices_ids
PreStartContainerResponse:
Registration/Register: RegisterRequest, Empty
DevicePlugin/GetDevicePluginOptions: Empty, DevicePluginOptions
DevicePlugin/ListAndWatch: Empty, *ListAndWatchResponse
DevicePlugin/GetPreferredAllocation: PreferredAllocationRequest, \
PreferredAllocationResponse
DevicePlugin/Allocate: AllocateRequest, AllocateResponse
DevicePlugin/PreStartContainer: PreStartContainerRequest, PreStartContainerResponse
"""


def wire_line(message: Any) -> str:
    """A message as a line of WIRE."""
    fields = []
    for number, one in enumerate(message.field, start=1):
        assert one.number == number
        star = "*" if one.label == one.LABEL_REPEATED else ""
        plain = one.Type.Name(one.type).removeprefix("TYPE_").lower()
        kind = one.type_name.rpartition(".")[2] or plain
        fields.append(f" {star}{kind} {one.name}")
    return f"{message.name}:{','.join(fields)}"


def test_the_stubs_have_the_messages_and_methods_of_kubernetes() -> None:
    """They have no others."""
    file = descriptor_pb2.FileDescriptorProto()
    api.DESCRIPTOR.CopyToProto(file)
    assert (file.package, file.syntax) == ("v1beta1", "proto3")
    lines = []
    for message in file.message_type:
        lines += [wire_line(one) for one in (message, *message.nested_type)]
    for service in file.service:
        for method in service.method:
            star = "*" if method.server_streaming else ""
            types = f"{method.input_type}, {star}{method.output_type}"
            name = f"{service.name}/{method.name}"
            lines.append(f"{name}: {types.replace('.v1beta1.', '')}")
    assert sorted(lines) == sorted(WIRE.strip().splitlines())


X = "example.com/x"


def test_fake_kubelet_clears_sockets(kubelet: Kubelet, puppets: Puppets) -> None:
    """Sockets go, files stay (kubelet contract 1)."""
    kubelet.start()
    assert stat.S_IMODE(kubelet.folder.stat().st_mode) in (0o750, 0o700), (
        "less the umask"
    )
    kubelet.kill()
    puppets(X)
    (kubelet.folder / "folder").mkdir()
    (kubelet.folder / "file").touch()
    mark = kubelet.log.mark()
    kubelet.start()
    (bound,) = kubelet.seen("bound", after=mark)
    assert sorted(bound["removed"]) == ["a.sock", "kubelet.sock"]
    left = {path.name for path in kubelet.folder.iterdir()}
    assert left == {"file", "folder", "kubelet.sock"}


def test_fake_kubelet_listens_after_it_was_bound(kubelet: Kubelet) -> None:
    """The file is there, but a dial is refused (kubelet contract 1)."""
    began = kubelet.start(wait="bound", listen_delay=0.3)
    path = kubelet.socket
    inode = path.stat().st_ino
    with socket.socket(socket.AF_UNIX) as client:
        with pytest.raises(ConnectionRefusedError):
            client.connect(str(path))
        assert kubelet.wait("listening")["t"] - began >= 0.3
        client.connect(str(path))
    assert path.stat().st_ino == inode


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        *(
            ("resource_name", name, "invalid")
            for name in (
                "n150",
                "x.com/",
                "x.com/-n",
                "x.com/n.",
                "x.com/a/b",
                "X.com/n",
            )
        ),
        ("resource_name", "kubernetes.io/n", "invalid"),
        ("resource_name", "requests.x/n", "invalid"),
        ("resource_name", "x.com/" + "x" * 64, "invalid"),
        ("version", "", "not supported"),
        ("version", "v1alpha", "not supported"),
        ("endpoint", "", "not a file"),
        ("endpoint", "/var/puppet.sock", "not a file"),
        ("endpoint", "nobody.sock", "failed to dial"),
    ],
)
def test_fake_kubelet_judges_registrations(
    kubelet: Kubelet, puppets: Puppets, field: str, value: str, says: str
) -> None:
    """A wrong field fails the call, and nothing is kept (kubelet contract 2)."""
    kubelet.start(dial_limit=0.3)
    puppet = puppets(X)
    with pytest.raises(grpc.RpcError, match=rf"StatusCode\.UNKNOWN(.|\n)*{says}"):
        puppet.register(**{field: value})
    assert not kubelet.seen("stream")
    puppet.register(resource_name="x.com/" + "aB.-_" * 12 + "xyz")  # 63 characters
    kubelet.wait("stream")


@both_generations
def test_fake_kubelet_generations(kubelet: Kubelet, puppets: Puppets) -> None:
    """1.20 dials afterwards, and takes the request's options (kubelet contract 3)."""
    kubelet.start(dial_delay=0.2)
    puppet = puppets(X, pre_start_required=True)
    puppet.register(options={"pre_start_required": False})
    answered = time.monotonic()
    opened = kubelet.wait("stream")["t"]
    puppet.send(device("a"))
    kubelet.admit("pod", {X: 1})
    kubelet.start_container("pod")
    if kubelet.generation == "1.20":
        assert opened > answered
        assert [*puppet.calls] == ["Allocate"]
    else:
        expected = ["GetDevicePluginOptions", "Allocate", "PreStartContainer"]
        assert [*puppet.calls] == expected
        assert kubelet.kinds(X)[:3] == ["register", "options", "stream"]


def test_fake_kubelet_takes_whole_lists(kubelet: Kubelet, puppets: Puppets) -> None:
    """Unhealthy counts as capacity, missing does not (kubelet contract 6)."""
    kubelet.start()
    puppet = puppets(X)
    puppet.register()
    puppet.send(device("a"), device("b"))
    kubelet.wait_status(X, 2, 2)
    puppet.send(device("a", "Unhealthy"), device("b"))
    kubelet.wait_status(X, 2, 1)
    puppet.send(device("b"))
    kubelet.wait_status(X, 1, 1)


def test_fake_kubelet_has_the_race(kubelet: Kubelet, puppets: Puppets) -> None:
    """An older stream's end disconnects the newer plugin (kubelet contract 5)."""
    kubelet.start()
    old = puppets(X, "old.sock")
    new = puppets(X, "new.sock")
    old.register()
    kubelet.wait("stream", endpoint="old.sock")
    new.register()
    new.send(device("a"), device("b"))
    mark = kubelet.log.mark()
    old.end_stream()
    kubelet.wait("stream_end", endpoint="old.sock", how="OK", after=mark)
    kubelet.wait("disconnected", endpoint="new.sock", ended="old.sock", after=mark)
    how = "closed by the kubelet"
    kubelet.wait("stream_end", endpoint="new.sock", how=how, after=mark)
    kubelet.wait_status(X, 2, 0, after=mark)
    with refused("KUBELET", "stopped"):
        kubelet.allocate(X, ["a"])


def test_fake_kubelet_fills_up_what_is_preferred(
    kubelet: Kubelet, puppets: Puppets
) -> None:
    """It leaves out what is not there (kubelet contract 10)."""
    kubelet.start()
    puppet = puppets(X, get_preferred_allocation_available=True)
    answer = {"container_responses": [{"deviceIDs": ["nobody", "b"]}]}
    puppet.answers["GetPreferredAllocation"] = answer
    puppet.register()
    puppet.send(device("a"), device("b"), device("c"))
    assert kubelet.admit("pod", {X: 2}, {X: ["a"]})["ids"] == {X: ["a", "b"]}
    (request,) = puppet.calls["GetPreferredAllocation"]
    (asked,) = request.container_requests
    assert {*asked.available_deviceIDs} == {"a", "b", "c"}
    assert asked.must_include_deviceIDs == ["a"]
    assert asked.allocation_size == 2
    with refused("UnexpectedAdmissionError", "Requested: 2, Available: 1"):
        kubelet.admit("second", {X: 2})


def answering(puppet: Any, text: str) -> Any:
    """This puppet, whose answers set the variable X to this text."""
    answer = {"container_responses": [{"envs": {"X": text}}]}
    puppet.answers["Allocate"] = answer
    return puppet


def test_fake_kubelet_keeps_the_answer(kubelet: Kubelet, puppets: Puppets) -> None:
    """It outlives restarts of kubelet and plugin (kubelet contract 9, 11 and 13)."""
    kubelet.start()
    puppet = answering(puppets(X, "1.sock", pre_start_required=True), "first")
    puppet.register()
    puppet.send(device("a"), device("b"))
    kubelet.admit("pod", {X: 2})
    assert kubelet.start_container("pod")["envs"] == {"X": "first"}
    kubelet.kill()
    kubelet.start()
    with refused("UnexpectedAdmissionError", "no healthy devices"):
        kubelet.admit("pod", {X: 2})

    puppet = answering(puppets(X, "2.sock", pre_start_required=True), "second")
    puppet.register()
    puppet.send(device("a"), device("b", "Unhealthy"), device("c"))
    with refused("UnexpectedAdmissionError", "['b']"):
        kubelet.admit("pod", {X: 2})
    puppet.send(device("a"), device("b"), device("c"))
    assert kubelet.admit("pod", {X: 2})["envs"] == {"X": "first"}
    kubelet.start_container("pod")
    kubelet.start_container("pod")
    counts = {method: len(requests) for method, requests in puppet.calls.items()}
    assert counts == {"GetDevicePluginOptions": 1, "PreStartContainer": 2}
    assert kubelet.admit("second", {X: 1})["envs"] == {"X": "second"}


def entries(kubelet: Kubelet) -> list[Event]:
    """The Pods' entries in the kubelet's checkpoint."""
    data = json.loads(kubelet.checkpoint.read_text())["Data"]
    found: list[Event] = data["PodDeviceEntries"]
    return found


def test_fake_kubelet_writes_a_checkpoint(kubelet: Kubelet, puppets: Puppets) -> None:
    """It has the kubelet's own format, and is for root (kubelet contract 8)."""
    kubelet.start()
    puppet = answering(puppets(X), "first")
    puppet.register()
    puppet.send(device("a", numa=1), device("b"), device("c", "Unhealthy"))
    kubelet.admit("pod", {X: 2})
    assert stat.S_IMODE(kubelet.checkpoint.stat().st_mode) == 0o600
    content = json.loads(kubelet.checkpoint.read_text())
    assert content.keys() == {"Data", "Checksum"}
    registered = content["Data"]["RegisteredDevices"]
    assert {name: sorted(ids) for name, ids in registered.items()} == {X: ["a", "b"]}
    (entry,) = entries(kubelet)
    answer = api.ContainerAllocateResponse(envs={"X": "first"})
    assert entry == {
        "PodUID": "pod",
        "ContainerName": "main",
        "ResourceName": X,
        "DeviceIDs": {"1": ["a"], "-1": ["b"]},
        "AllocResp": base64.b64encode(answer.SerializeToString()).decode(),
    }


def test_fake_kubelet_forgets_ended_pods_late(
    kubelet: Kubelet, puppets: Puppets
) -> None:
    """The file has them until the next admission (kubelet contract 8)."""
    kubelet.start()
    puppet = puppets(X)
    puppet.register()
    puppet.send(device("a"))
    kubelet.admit("first", {X: 1})
    kubelet.end_pod("first")
    puppet.send(device("a"))
    assert [entry["PodUID"] for entry in entries(kubelet)] == ["first"]
    kubelet.admit("second", {X: 1})
    assert [entry["PodUID"] for entry in entries(kubelet)] == ["second"]


def test_fake_kubelet_has_entries_by_container(
    kubelet: Kubelet, puppets: Puppets
) -> None:
    """A Pod's init and app containers may share IDs (kubelet contract 8)."""
    kubelet.start()
    puppet = puppets(X)
    puppet.register()
    puppet.send(device("a"))
    kubelet.admit("pod", {X: 1}, container="init")
    assert kubelet.admit("pod", {X: 1}, {X: ["a"]})["ids"] == {X: ["a"]}
    names = [entry["ContainerName"] for entry in entries(kubelet)]
    assert names == ["init", "main"]
    with refused("UnexpectedAdmissionError", "Available: 0"):
        kubelet.admit("second", {X: 1})


def test_fake_kubelet_merges_by_key(kubelet: Kubelet, puppets: Puppets) -> None:
    """Of two values for one name, the second is dropped (kubelet contract 12)."""
    kubelet.start()
    for number in "12":
        puppet = puppets(X + number, f"{number}.sock")
        spec = {"container_path": f"/dev/{number}", "host_path": "/dev/null"}
        answer = {"envs": {"SHARED": number, f"OWN_{number}": "x"}, "devices": [spec]}
        puppet.answers["Allocate"] = {"container_responses": [answer]}
        puppet.register()
        puppet.send(device("a"))
    merged = kubelet.admit("pod", {f"{X}1": 1, f"{X}2": 1})
    assert merged["envs"] == {"SHARED": "1", "OWN_1": "x", "OWN_2": "x"}
    paths = [spec["container_path"] for spec in merged["devices"]]
    assert paths == ["/dev/1", "/dev/2"]
    (conflict,) = kubelet.seen("conflict")
    assert conflict["key"] == "SHARED"


@pytest.mark.parametrize(
    ("devices", "size", "hints"),
    [
        ([device("a", numa=0), device("b", numa=1)], 1, [[0], [1], [0, 1]]),
        ([device("a", numa=0), device("b", numa=1)], 2, [[0, 1]]),
        (
            [device("a", numa=0), device("b", "Unhealthy", numa=1)],
            1,
            [[0], [0, 1]],
        ),
        ([device("a", numa=-1), device("b", numa=-1)], 1, []),
        ([device("a", numa=0), device("b")], 2, []),
        ([device("a"), device("b")], 2, None),
    ],
)
def test_fake_kubelet_topology_hints(
    kubelet: Kubelet, puppets: Puppets, devices: list[Any], size: int, hints: Any
) -> None:
    """-1 matches nothing, and a mix has no hints (kubelet contract 7)."""
    kubelet.start()
    puppet = puppets(X)
    puppet.register()
    puppet.send(*devices)
    assert kubelet.topology_hints(X, size) == hints
