"""Tests of the Tenstorrent device plugin, and the fake kubelet that they run against.

"Contract 5" is a point of the kubelet contract, "story 5" what users of device plugins suffer from.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import functools
import hashlib
import http.client
import itertools
import json
import logging
import multiprocessing
import os
import platform
import queue
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
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc.aio
import hypothesis
import kubernetes_validate  # type: ignore[import-untyped]
import pytest
import yaml
from google.protobuf import descriptor_pb2, json_format
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

import api_pb2 as api
import api_pb2_grpc as rpc
import tt_device_plugin as tt

HERE = Path(__file__).resolve().parent

# ==== The wire ====================================================================================

# Kubernetes 1.36: the fields of each message, numbered from 1 in this order, and the methods. "*":
# repeated, or a stream. The fake kubelet has the plugin's stubs: test_wire holds them against this.
WIRE = """
Empty:
DevicePluginOptions: bool pre_start_required, bool get_preferred_allocation_available
RegisterRequest: string version, string endpoint, string resource_name, DevicePluginOptions options
ListAndWatchResponse: *Device devices
Device: string ID, string health, TopologyInfo topology
TopologyInfo: *NUMANode nodes
NUMANode: int64 ID
PreferredAllocationRequest: *ContainerPreferredAllocationRequest container_requests
ContainerPreferredAllocationRequest: *string available_deviceIDs, *string must_include_deviceIDs, \
int32 allocation_size
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
DevicePlugin/GetPreferredAllocation: PreferredAllocationRequest, PreferredAllocationResponse
DevicePlugin/Allocate: AllocateRequest, AllocateResponse
DevicePlugin/PreStartContainer: PreStartContainerRequest, PreStartContainerResponse
"""
METHODS = api.DESCRIPTOR.services_by_name["DevicePlugin"].methods_by_name


def as_dict(message: Any) -> dict[str, Any]:
    """A message with the proto's names and with every field: an absent list is an empty one."""
    return json_format.MessageToDict(
        message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )


# ==== The fake kubelet ============================================================================

LOCAL = ("grpc.use_local_subchannel_pool", 1)  # a connection of its own for each channel
# What may be a resource's name (contract 2).
LABEL, NAME = "[a-z0-9]([-a-z0-9]*[a-z0-9])?", "[A-Za-z0-9]([A-Za-z0-9_.-]*[A-Za-z0-9])?"
RESOURCE = r"(?!requests\.|.*kubernetes\.io/)(?=[^/]{1,244}/.{1,63}$)"
RESOURCE += rf"{LABEL}(\.{LABEL})*/{NAME}"
# The parts of a container's answer: what is its key there (contract 14); "" of a map.
PARTS = {"envs": "", "annotations": "", "mounts": "container_path", "devices": "container_path"}
PARTS["cdi_devices"] = "name"


class Refusal(Exception):
    """What a command of the test meets: a gRPC status of the plugin, or the kubelet's refusal."""


@dataclass
class Client:
    """The kubelet's connection to one registered plugin socket."""

    resource: str
    endpoint: str
    channel: grpc.aio.Channel
    options: Any  # DevicePluginOptions
    stopped: bool = False  # the stream has ended: calls fail without reaching the plugin
    reader: asyncio.Task[None] | None = None  # reads the ListAndWatch stream


async def splice(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Pass on all bytes, and the end."""
    with contextlib.suppress(ConnectionError):
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
    writer.close()


class FakeKubelet:
    """The kubelet's device manager. It sends the test what it sees or decides, one dict each. A
    method do_x(...) is what a test calls as kubelet.x(...)."""

    def __init__(self, pipe: Connection, root: Path, generation: str) -> None:
        self.pipe, self.old, self.host = pipe, generation == "1.20", root.parent
        self.folder = root / "device-plugins"
        self.checkpoint = self.folder / "kubelet_internal_checkpoint"
        self.listen_delay = 0.0  # between bind, when the file is visible, and listen
        self.dial_delay = 0.0  # 1.20: between the answer to Register and the dial-back
        self.dial_limit = 10.0  # contract 2
        self.faults = Counter[str]()  # name: how many times it still happens
        self.clients: dict[str, Client] = {}  # the newest of each resource, while it is connected
        self.endpoints: dict[str, Client] = {}  # who is asked for a Pod: the newest, even if dead
        self.devices: dict[str, dict[str, Any]] = defaultdict(dict)  # resource: ID: Device
        self.status: dict[str, tuple[int, int]] = {}  # as last sent: capacity, allocatable
        # Pod: resource: ids, and the answer: asked for once, used for every start (contract 13).
        self.held: dict[str, dict[str, Any]] = {}
        self.admission = asyncio.Lock()  # a slow plugin stalls all Pods (contract 12)
        self.tasks: list[asyncio.Task[Any]] = []

    async def live(self, **settings: Any) -> None:
        """Start, and do what the test commands, until it is killed or the test ends."""
        loop = asyncio.get_running_loop()

        async def reply(number: int, command: str, args: Any, more: Any) -> None:
            try:
                result = await getattr(self, f"do_{command}")(*args, **more)
            except Exception as error:
                result = error if isinstance(error, Refusal) else Refusal(f"BUG: {error!r}")
            self.emit("reply", number=number, result=result)

        await self.start(**settings)
        with contextlib.suppress(EOFError):
            while True:
                self.spawn(reply(*await loop.run_in_executor(None, self.pipe.recv)))
        os._exit(0)

    def emit(self, event: str, client: Client | None = None, **more: Any) -> None:
        """Tell the test. time.monotonic is the same clock in every process of a Linux host."""
        whose = {"resource": client.resource, "endpoint": client.endpoint} if client else {}
        self.pipe.send({"t": time.monotonic(), "event": event, **whose, **more})

    def spawn(self, work: Awaitable[Any]) -> asyncio.Task[Any]:
        """A task that is kept: the event loop refers to it only weakly."""
        self.tasks.append(asyncio.ensure_future(work))
        return self.tasks[-1]

    async def start(self, faults: Any = (), **delays: float) -> None:
        """Contract 1: the folder, no socket in it but ours, visible a moment before it listens."""
        assert delays.keys() <= vars(self).keys()
        vars(self).update(delays)
        self.faults.update(faults)
        self.folder.mkdir(mode=0o750, parents=True, exist_ok=True)
        paths = [one for one in self.folder.iterdir() if one.is_socket() and not one.is_symlink()]
        for path in paths:
            path.unlink(missing_ok=True)  # its plugin may remove it meanwhile
        if self.checkpoint.exists():  # a restarted kubelet knows its Pods, but no device yet
            self.held = json.loads(self.checkpoint.read_text())
        # gRPC binds and listens in one go: it serves a name in no folder, and the socket that
        # plugins see passes bytes on to it.
        inner = f"fake-kubelet-{os.getpid()}"
        self.server = grpc.aio.server()  # kept: a server that nobody refers to stops
        registration: Any = SimpleNamespace(Register=self.register)
        rpc.add_RegistrationServicer_to_server(registration, self.server)
        self.server.add_insecure_port(f"unix-abstract:{inner}")
        await self.server.start()
        sock = socket.socket(socket.AF_UNIX)
        sock.bind(str(self.folder / "kubelet.sock"))
        self.emit("bound", removed=[path.name for path in paths])
        await asyncio.sleep(self.listen_delay)

        async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            theirs = await asyncio.open_unix_connection(f"\0{inner}")
            await asyncio.gather(splice(reader, theirs[1]), splice(theirs[0], writer))

        self.listener = await asyncio.start_unix_server(connected, sock=sock)
        self.emit("listening")

    async def register(self, request: Any, context: Any) -> Any:
        """Contract 2: 1.20 returns at once and dials later, 1.36 dials before it returns."""
        self.emit("register", resource=request.resource_name, **as_dict(request))
        unknown = grpc.StatusCode.UNKNOWN  # what a plain Go error becomes
        if self.fault("register_fails"):
            await context.abort(grpc.StatusCode.UNIMPLEMENTED, "the fake kubelet was told to fail")
        if self.fault("register_hangs"):
            await asyncio.Event().wait()
        asked, resource, endpoint = request.version, request.resource_name, request.endpoint
        for fine, problem in (
            (asked == "v1beta1", f'requested API version "{asked}" is not supported by kubelet'),
            (re.fullmatch(RESOURCE, resource), f'the ResourceName "{resource}" is invalid'),
            (re.fullmatch("[^/]+", endpoint), f'the endpoint "{endpoint}" is not a file name'),
        ):
            if not fine:
                await context.abort(unknown, problem)
        address = str(self.folder / endpoint)
        authority = [("grpc.default_authority", address)] * self.old  # of its Go library
        channel = grpc.aio.insecure_channel(f"unix:{address}", [LOCAL, *authority])
        client = Client(resource, endpoint, channel, request.options)
        if self.old:
            self.spawn(self.dial(client))
        elif problem := await self.dial(client):
            await context.abort(unknown, f"failed to dial {endpoint}: {problem}")
        return api.Empty()

    async def dial(self, client: Client) -> str:
        """What went wrong, if anything. 1.20 tells nobody, dials later, and takes the request's
        options. A resource's newest client replaces the one before, whose stream stays."""
        try:
            if self.old:
                await asyncio.sleep(self.dial_delay)
            else:
                self.clients[client.resource] = client
            await asyncio.wait_for(client.channel.channel_ready(), self.dial_limit)
            if not self.old:
                ask = rpc.DevicePluginStub(client.channel).GetDevicePluginOptions
                client.options = await ask(api.Empty())
                self.emit("options", client, **as_dict(client.options))
        except (asyncio.TimeoutError, grpc.aio.AioRpcError) as error:
            if not self.old:  # the client before is forgotten, too
                self.clients.pop(client.resource, None)
            self.emit("dial_failed", client, error=repr(error))
            await client.channel.close()
            return repr(error)
        if self.old:
            self.clients[client.resource] = client
        self.endpoints[client.resource] = client
        if self.fault("no_stream"):
            self.emit("no_stream", client)
        else:  # the one stream of this registration: there is no second (contract 3)
            client.reader = self.spawn(self.watch(client))
        return ""

    async def watch(self, client: Client) -> None:
        """Read the stream until it ends, whoever ends it."""
        stream = rpc.DevicePluginStub(client.channel).ListAndWatch(api.Empty())
        self.emit("stream", client)
        resource, how = client.resource, "OK"
        try:
            drop = self.fault("drop_streams")
            async for message in stream:
                # Each message is the whole list (contract 8).
                devices = self.devices[resource] = {one.ID: one for one in message.devices}
                health = {name: one.health for name, one in devices.items()}
                self.emit("devices", client, devices=health)
                self.save_checkpoint()
                self.update(resource)
                if drop:
                    raise asyncio.CancelledError
        except grpc.aio.AioRpcError as error:
            how = f"{error.code().name}: {error.details()}"
        except asyncio.CancelledError:  # by drop_stream, or by the race
            how = "closed by the kubelet"
        stream.cancel()
        self.emit("stream_end", client, how=how)
        client.stopped = True
        await client.channel.close()
        # Contract 4 and 5: the client to disconnect is looked up by the resource's *name*: if a
        # plugin registered anew meanwhile, that is the new one, which nobody will ever dial again.
        if victim := self.clients.pop(resource, None):
            victim.stopped = True
            self.emit("disconnected", victim, ended=client.endpoint)
            if victim is not client and victim.reader:
                victim.reader.cancel()
            for device in self.devices[resource].values():
                device.health = "Unhealthy"
            self.update(resource)

    def healthy(self, resource: str) -> list[str]:
        return [name for name, one in self.devices[resource].items() if one.health == "Healthy"]

    def update(self, resource: str) -> None:
        """Unhealthy devices count as capacity, but are not allocatable."""
        status = len(self.devices[resource]), len(self.healthy(resource))
        if status != self.status.get(resource):
            self.status[resource] = status
            self.emit("status", resource=resource, capacity=status[0], allocatable=status[1])

    def free(self, resource: str) -> list[str]:
        """Healthy, and held by no container."""
        holders = [holder[resource] for holder in self.held.values() if resource in holder]
        used = {name for held in holders for name in held["ids"]}
        return [name for name in self.healthy(resource) if name not in used]

    async def do_hints(self, resource: str, size: int) -> list[list[int]] | None:
        """Contract 10: on which sets of NUMA nodes can so many free devices be had? None: no
        device has a topology. An empty list: on none, and strict policies reject the Pod."""
        devices = self.devices[resource]
        if not any(device.HasField("topology") for device in devices.values()):
            return None
        free = [{node.ID for node in devices[one].topology.nodes} for one in self.free(resource)]
        masks = ([0], [1], [0, 1])
        return [mask for mask in masks if sum(bool(numa & {*mask}) for numa in free) >= size]

    async def do_rpc(self, resource: str, method: str, request: Any, timeout: Any = 10.0) -> Any:
        """One call as it is, malformed ones, too, to the plugin that registered last."""
        client = self.endpoints.get(resource)
        if client is None or client.stopped:
            text = "has been stopped" if client else "is not registered"
            raise Refusal(f"KUBELET: the endpoint of {resource} {text}")
        message = getattr(api, METHODS[method].input_type.name)(**request)
        try:
            call = getattr(rpc.DevicePluginStub(client.channel), method)
            return as_dict(await call(message, timeout=timeout))
        except grpc.aio.AioRpcError as error:
            raise Refusal(f"{error.code().name}: {error.details()}") from error

    async def do_allocate(self, resource: str, ids: list[str], timeout: Any = 10.0) -> Any:
        """Allocate for one container, in random order (contract 13): its answer."""
        request = {"container_requests": [{"devices_ids": random.sample(ids, len(ids))}]}
        answer = await self.do_rpc(resource, "Allocate", request, timeout)
        if len(answers := answer["container_responses"]) != 1:
            raise Refusal("KUBELET: no containers return in allocation response")
        return answers[0]

    async def do_pre_start(self, resource: str, ids: list[str]) -> None:
        """PreStartContainer, in random order, with the kubelet's time limit (contract 15)."""
        request = {"devices_ids": random.sample(ids, len(ids))}
        await self.do_rpc(resource, "PreStartContainer", request, 30.0)

    async def do_admit(self, pod: str, want: dict[str, int], must: Any = None) -> dict[str, Any]:
        """Admit a container that wants so many of each resource (contract 9, 12, 13): ids, envs,
        mounts, devices, cdi_devices. `must` are ids that its init container held, by resource."""
        async with self.admission:
            holder = self.held.setdefault(pod, {})
            for resource, size in want.items():
                if resource in holder:  # after a restart: the very same ids, and healthy
                    healthy = self.healthy(resource)
                    if missing := [one for one in holder[resource]["ids"] if one not in healthy]:
                        text = f"previously allocated devices are no longer healthy; {missing}"
                        none = f"no healthy devices present; cannot allocate {resource}"
                        raise Refusal(f"UnexpectedAdmissionError: {text if healthy else none}")
                    continue
                ids = sorted(await self.choose(resource, size, (must or {}).get(resource, [])))
                answer = await self.do_allocate(resource, ids, None)
                holder[resource] = {"ids": ids, "answer": answer}
                self.emit("allocated", pod=pod, resource=resource, ids=ids)
                self.save_checkpoint()
            return {"ids": {name: held["ids"] for name, held in holder.items()}, **self.merged(pod)}

    async def choose(self, resource: str, size: int, must: list[str]) -> list[str]:
        """Free ids: those that the plugin prefers, filled up at random."""
        available = self.free(resource)
        available += [name for name in must if name not in available]  # an init container's
        if len(available) < size:
            text = f"requested number of devices unavailable for {resource}. "
            text += f"Requested: {size}, Available: {len(available)}"
            raise Refusal(f"UnexpectedAdmissionError: {text}")
        random.shuffle(available)
        chosen, client = list(must), self.endpoints.get(resource)
        if client and client.options.get_preferred_allocation_available:
            one = {"available_deviceIDs": available, "must_include_deviceIDs": must}
            request = {"container_requests": [{**one, "allocation_size": size}]}
            answer = await self.do_rpc(resource, "GetPreferredAllocation", request, None)
            (answered,) = answer["container_responses"]
            chosen += [one for one in answered["deviceIDs"] if one in available]
        return list(dict.fromkeys([*chosen, *available]))[:size]

    def merged(self, pod: str) -> dict[str, Any]:
        """Contract 14: answers are merged by key; a key's second value is dropped silently."""
        merged: dict[str, dict[str, Any]] = {part: {} for part in PARTS}
        for resource, held in self.held[pod].items():
            for part, key in PARTS.items():
                found = held["answer"][part]
                for name, value in [(one[key], one) for one in found] if key else found.items():
                    if merged[part].setdefault(name, value) != value:
                        self.emit("conflict", kind=part, resource=resource, key=name)
        lists = {part: list(merged[part].values()) for part in ("mounts", "devices")}
        # Kubelets before 1.28 do not know field 5 (contract 18).
        names = [] if self.old else list(merged["cdi_devices"])
        return {**merged, **lists, "cdi_devices": names}

    async def do_start_container(self, pod: str) -> dict[str, Any]:
        """One start *or restart*: PreStartContainer each time, Allocate never again. What the
        runtime gets, each device with the path that it is `resolved` to."""
        for resource, held in self.held[pod].items():
            client = self.endpoints.get(resource)
            if client is None or client.options.pre_start_required:
                await self.do_pre_start(resource, held["ids"])
        options, devices = self.merged(pod), []
        for spec in options["devices"]:
            host = f"{self.host}{spec['host_path']}"
            if not os.path.exists(host):
                raise Refusal(f"RunContainerError: {host} does not exist")
            # containerd follows symbolic links anew at each start (contract 16).
            devices.append({**spec, "resolved": os.path.realpath(host)})
        return {**options, "devices": devices}

    def save_checkpoint(self) -> None:
        """Contract 9: who holds what outlives it, if it can."""
        draft = self.checkpoint.with_name(f".{self.checkpoint.name}")
        with contextlib.suppress(OSError):
            draft.write_text(json.dumps(self.held))
            draft.replace(self.checkpoint)

    async def do_faults(self, **counts: int) -> None:
        """From now on, so many times each: register_fails, register_hangs, no_stream (none follows
        a Register), drop_streams (each ends after its first message)."""
        self.faults.update(counts)

    async def do_drop_stream(self, resource: str) -> None:
        """End the resource's stream from this side, and nothing else."""
        if (client := self.clients.get(resource)) and client.reader:
            self.emit("dropped", client)
            client.reader.cancel()

    def fault(self, name: str) -> bool:
        """Whether this fault is due; each counts down, so "3" is three times and then no more."""
        due = self.faults[name] > 0
        self.faults[name] -= due
        return due


def fake_kubelet(*about: Any, **settings: Any) -> None:
    """The process of one life."""
    asyncio.run(FakeKubelet(*about).live(**settings))


# ==== The harness =================================================================================

Fits = Callable[[Any], Any]  # of an item: whether it is meant
Event = dict[str, Any]  # what the fake kubelet sends
Finished = subprocess.CompletedProcess[str]
# Any process that ends by itself, with what it said.
finish: Callable[..., Finished] = functools.partial(
    subprocess.run, capture_output=True, text=True, timeout=600
)
SAID: set[str] = set()  # what plugins said in this session: log lines, outputs, refusals
# A fork of a process that has imported this file takes milliseconds, Python's imports far more.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload([__name__])


class Log:
    """What another process said, in order. Tests wait on a condition and never poll."""

    def __init__(self, name: str) -> None:
        self.name, self.items, self.changed = name, list[Any](), threading.Condition()
        self.closed = False  # nothing will follow

    def append(self, *items: Any, closed: bool = False) -> None:
        """Called by the thread that reads."""
        with self.changed:
            self.items += items
            self.closed = closed
            self.changed.notify_all()

    def mark(self) -> int:
        """Now, as a position: pass it as `after` to see only what follows."""
        return len(self.items)

    def seen(self, fits: Fits, after: int = 0) -> list[Any]:
        return [item for item in self.items[after:] if fits(item)]

    def wait_for(self, fits: Fits, timeout: float, after: int = 0, what: str = "that") -> Any:
        """The first item after the position that fits, waiting for it if need be."""
        with self.changed:
            self.changed.wait_for(lambda: self.seen(fits, after) or self.closed, timeout)
            if found := self.seen(fits, after):
                return found[0]
        tail = "\n  ".join(map(str, self.items[-25:]))
        ended = "before it ended" if self.closed else f"in {timeout} s"
        raise AssertionError(f"no {what} from {self.name} {ended}; its last:\n  {tail}")

    def never(self, fits: Fits, seconds: float, after: int) -> None:
        """Nothing that fits comes after the position within so many seconds from now."""
        with self.changed:
            found = self.changed.wait_for(lambda: self.seen(fits, after), seconds)
        assert not found, f"{self.name} said {found[0]}, which nothing had caused"


def fits(event: str, **fields: Any) -> Fits:
    """A predicate for events of this kind, with these fields."""
    wanted = {"event": event, **fields}.items()
    return lambda one: wanted <= one.items()


class Kubelet:
    """A fake kubelet on one folder, over any number of its lives: start, kill, start again."""

    def __init__(self, root: Path, generation: str = "1.36") -> None:
        self.root, self.generation, self.folder = root, generation, root / "device-plugins"
        self.log = Log(f"the fake kubelet {generation}")  # events, of all lives of it
        self.process: Any = None  # of the present life
        self.replies: dict[int, Future[Any]] = {}

    def read(self) -> None:
        with contextlib.suppress(EOFError, OSError):
            while True:
                event = self.pipe.recv()
                if event["event"] == "reply":
                    self.replies[event["number"]].set_result(event["result"])
                else:
                    self.log.append(event)

    def start(self, wait: str = "listening", **settings: Any) -> float:
        """Return when it listens (or is only "bound", with a listen_delay): since when. Settings
        are those of FakeKubelet.start, such as listen_delay=2 or faults={"register_fails": 3}."""
        self.pipe, theirs = FORKS.Pipe()
        about, mark = (theirs, self.root, self.generation), self.log.mark()
        self.process = FORKS.Process(None, fake_kubelet, None, about, settings, daemon=True)
        self.process.start()
        theirs.close()
        self.reader = threading.Thread(target=self.read, daemon=True)
        self.reader.start()
        return float(self.wait(wait, timeout=20, after=mark)["t"])

    def kill(self) -> None:
        """End this life, if there is one: its sockets stay behind. All connections break."""
        if self.process:
            self.process.kill()
            self.process.join()
            self.reader.join()
            self.process = None

    close = kill  # for the end of the test: nothing of it stays

    def delete_folder(self) -> None:
        """device-plugins goes in one step: a plugin may remove its socket meanwhile."""
        shutil.rmtree(self.folder.rename(self.folder.with_name("deleted")))

    def __getattr__(self, command: str) -> Callable[..., Any]:
        """FakeKubelet's do_x as x: its result, or Refusal if the plugin or the kubelet refuses."""

        def call(*args: Any, **more: Any) -> Any:
            reply: Future[Any] = Future()
            self.replies[id(reply)] = reply
            self.pipe.send((id(reply), command, args, more))
            if isinstance(result := reply.result(35), Refusal):
                SAID.add(str(result))
                raise result
            return result

        return call

    def wait(self, event: str, *, timeout: float = 5.0, after: int = 0, **fields: Any) -> Any:
        """The first event of this kind and with these fields."""
        return self.log.wait_for(fits(event, **fields), timeout, after, event)

    def seen(self, event: str, *, after: int = 0, **fields: Any) -> list[Event]:
        return self.log.seen(fits(event, **fields), after)

    def kinds(self, resource: str, after: int = 0) -> list[str]:
        """What came for this resource, in order: register, options, stream, devices, status ..."""
        seen = self.log.seen(lambda event: event.get("resource") == resource, after)
        return [event["event"] for event in seen]

    def wait_status(self, resource: str, capacity: int, allocatable: int, **more: Any) -> float:
        """Wait until the node's status shows this (`timeout`, `after` as for wait); when it did."""
        more |= {"resource": resource, "capacity": capacity, "allocatable": allocatable}
        return float(self.wait("status", **more)["t"])


@dataclass(frozen=True, slots=True)
class Chip(tt.Chip):
    """One PCIe device. A fact that is "" is a file that this driver or firmware does not make."""

    arch: str = "wormhole"
    card_type: str = "n150"
    firmware: str = "80.17.0.0"
    numa_node: int | None = 0
    iommu: str = "DMA-FQ"
    target: str = "/dev/null"  # the device node links to it: a character device that needs no root
    heartbeat: bool = True  # since driver 2.7
    by_id: bool = False  # udev's link, since driver 2.6


# 54.3 C, 75 C, 240 A and 100 W: captured (tt-smi-s_n150_kmd1.33). The rest is from another plugin's
# unit test, plausible, not captured (sysfs_n150_community-plugin).
SENSORS = "temp1_input=54300 temp1_max=75000 in0_input=795 in0_max=1000 curr1_input=18000 "
SENSORS += "curr1_max=240000 power1_input=15000000 power1_max=100000000"


class Tree:
    """The plugin's own made-up sysfs and /dev. Files change atomically, as in sysfs."""

    def __init__(self, root: Path, chips: Sequence[Chip] = ()) -> None:
        self.root, self.sys, self.dev = root, root / "sys", root / "dev"
        self.flags = ["--sysfs-root", str(self.sys), "--dev-root", str(self.dev)]  # the plugin's
        self.drafts = root / "drafts"  # on the same file system, seen by nobody
        self.by_id = self.dev / "tenstorrent/by-id"
        self.chips: dict[str, Chip] = {}
        self.lock = threading.Lock()  # the hearts beat in a thread of their own
        self.beats = itertools.count(1_000_000)
        self.still: set[str] = set()  # whose hearts do not beat: a test adds and discards
        for folder in ("drafts", "dev", "sys/bus/pci/devices", "sys/class/tenstorrent"):
            (root / folder).mkdir(parents=True)
        self.write(self.sys / "module/tenstorrent/version", "2.10.0\n")
        for chip in chips:
            self.add(chip)

    def pci(self, bdf: str) -> Path:
        return self.sys / "devices" / f"pci{bdf[:7]}" / bdf

    def entry(self, bdf: str) -> Path:
        """The folder of the driver's attributes; `device` in it leads to the PCI device's."""
        return self.pci(bdf) / "tenstorrent" / f"tenstorrent!{self.chips[bdf].index}"

    def node(self, bdf: str) -> Path:
        return self.dev / "tenstorrent" / str(self.chips[bdf].index)

    def write(self, path: Path, text: str | bytes) -> None:
        """A file that is never seen half written."""
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = self.drafts / f"{threading.get_ident()}"
        draft.write_bytes(text.encode() if isinstance(text, str) else text)
        draft.replace(path)

    def set(self, bdf: str, file: str, text: str | bytes | None) -> None:
        """Write a file of entry(); None removes it."""
        if text is None:
            (self.entry(bdf) / file).unlink()
        else:
            self.write(self.entry(bdf) / file, text)

    def add(self, chip: Chip) -> None:
        """The PCI device is probed: attributes first, the link in the class last."""
        with self.lock:
            self.chips[chip.pci] = chip
            if chip.heartbeat:
                self.set(chip.pci, "tt_heartbeat", f"{next(self.beats)}\n")
            if chip.card_type:  # its telemetry is there
                self.set(chip.pci, "tt_aiclk", "500\n")
                for file, text in (each.split("=") for each in SENSORS.split()):
                    path = self.pci(chip.pci) / f"hwmon/hwmon{chip.index + 2}" / file
                    self.write(path, f"{text}\n")
            if chip.by_id:
                self.by_id.mkdir(parents=True, exist_ok=True)
                (self.by_id / chip.id).symlink_to(f"../{chip.index}")
            tt.lay_out(self.root, chip, chip.target)

    def remove(self, bdf: str, driver: str = "") -> Chip:
        """The chip goes, by hot-unplug or reset: from sysfs, and its device node. With another
        driver's name its PCI function stays, bound to that."""
        with self.lock:
            (self.sys / "class/tenstorrent" / self.entry(bdf).name).unlink()
            self.node(bdf).unlink()
            (self.by_id / self.chips[bdf].id).unlink(missing_ok=True)
            if driver:
                shutil.rmtree(self.pci(bdf) / "tenstorrent")
                (self.sys / "bus/pci/drivers" / driver).mkdir(parents=True)
                (self.pci(bdf) / "driver").symlink_to(f"../../../bus/pci/drivers/{driver}")
            else:
                (self.sys / "bus/pci/devices" / bdf).unlink()
                shutil.rmtree(self.pci(bdf))
            return self.chips.pop(bdf)

    def hang(self, bdf: str, file: str) -> None:
        """Reads of this file hang from now on: it is a FIFO. The chip's heart stops."""
        with self.lock:
            self.still.add(bdf)
            os.mkfifo(self.drafts / "fifo")
            (self.drafts / "fifo").replace(self.entry(bdf) / file)

    def release(self, bdf: str, file: str, text: str) -> None:
        """The reads that hang return with this text, as all later ones do. The heart beats."""
        with self.lock:
            fifo = os.open(self.entry(bdf) / file, os.O_RDWR | os.O_NONBLOCK)
            self.write(self.entry(bdf) / file, text)
            os.write(fifo, text.encode())
            os.close(fifo)
            self.still.discard(bdf)

    @contextlib.contextmanager
    def beating(self) -> Iterator[Tree]:
        """The chips' firmware: five times a second each heartbeat changes."""
        done = threading.Event()

        def beat() -> None:
            while not done.wait(0.2):
                with self.lock:
                    for bdf, chip in self.chips.items():
                        if chip.heartbeat and bdf not in self.still:
                            self.set(bdf, "tt_heartbeat", f"{next(self.beats)}\n")

        thread = threading.Thread(target=beat, daemon=True)
        thread.start()
        yield self
        done.set()
        thread.join()


def chips(card_type: str, *places: str, **facts: Any) -> tuple[Chip, ...]:
    """Chips of one type in the order of N, each "BUS ASIC-ID'S-END SERIAL". Asic ids, heartbeats, N
    and NUMA nodes are made up; what else is captured is said."""
    made = []
    for n, (bus, asic, serial) in enumerate(place.split() for place in places):
        known: Any = {"numa_node": int(bus > "40"), "card_type": card_type, **facts}
        known |= {"asic_id": f"0D0CB6F1E7A5{asic}", "serial": serial}
        made.append(Chip(f"0000:{bus}:00.0", n, **known))
    return tuple(made)


# The first: tt-smi-s_n150_kmd1.33. The serials of the second (plausible, another plugin's test) and
# the third: sysfs_n150_community-plugin, misc_board_ids.
N150 = chips(
    *("n150", "01 0001 0100018611902010", "02 0002 010001851180B42E"),
    *("41 0003 010001851170C06C", "c1 0004 0100018611902014"),
)
# A p300's two chips with one serial: derived, not captured (derived_blackhole_boards).
P300 = chips("p300a", *(f"0{n} 0B0{n - 3} 000004513190F004" for n in (3, 4)), arch="blackhole")
P300_ID = "p300-000004513190F004"
NODES = ("/dev/null", "/dev/zero")  # for tests in which chips must not look alike
R150, R300 = "tenstorrent.com/n150", "tenstorrent.com/n300"


class Plugin:
    """A running plugin process. Its log has the lines of its stderr."""

    def __init__(self, command: Sequence[str], **popen: Any) -> None:
        self.log = Log("the plugin")
        self.started, self.ended = time.monotonic(), 0.0
        options = {"stderr": subprocess.PIPE, "text": True, "env": environment(), **popen}
        self.process = subprocess.Popen(command, errors="replace", **options)
        self.reader = threading.Thread(target=self.read, daemon=True)
        self.reader.start()

    def read(self) -> None:
        assert self.process.stderr
        for line in (each.rstrip("\n") for each in self.process.stderr):
            self.log.append(line)
            SAID.add(line)
        self.process.wait()
        self.ended = time.monotonic()
        self.log.append(closed=True)

    def wait_for_line(self, pattern: str, timeout: float = 5.0) -> str:
        """The first line that matches; case does not matter."""
        return str(self.log.wait_for(re.compile(pattern, re.I).search, timeout, 0, pattern))

    def lines(self, pattern: str = "") -> list[str]:
        """The lines so far that match."""
        return self.log.seen(re.compile(pattern, re.I).search)

    def send(self, number: signal.Signals) -> float:
        sent = time.monotonic()
        self.process.send_signal(number)
        return sent

    def end(self, how: signal.Signals = signal.SIGTERM, timeout: float = 10) -> tuple[int, float]:
        """Signal it and wait for the end: exit code and how long it took."""
        sent = self.send(how)
        self.reader.join(timeout)
        assert not self.reader.is_alive(), f"no end on {how.name} in {timeout} s: {self.lines()}"
        return int(self.process.returncode), self.ended - sent

    def close(self) -> None:
        """For the end of the test: the process is gone, and no traceback went by unseen."""
        self.process.kill()
        self.reader.join(10)
        text = "\n".join(self.lines())
        assert "Traceback (most recent call last)" not in text, text


def environment(**more: str) -> dict[str, str]:
    """This process's, without the plugin's variables."""
    return {k: v for k, v in os.environ.items() if not k.startswith("TT_DEVICE_PLUGIN_")} | more


def run(command: Sequence[str], *flags: str, timeout: float = 30.0, **variables: str) -> Finished:
    """A plugin process that ends by itself."""
    done = finish([*command, *flags], timeout=timeout, env=environment(**variables))
    assert "Traceback" not in done.stderr, done.stderr
    SAID.update(" ".join(text.split()) for text in (done.stdout, done.stderr))
    return done


class Puppet:
    """A device plugin of another maker, moved by the test."""

    def __init__(self, kubelet: Kubelet, resource: str, endpoint: str = "a.sock", **options: Any):
        self.kubelet, self.resource, self.endpoint = kubelet, resource, endpoint
        self.options = options  # the same in both places
        self.answers: Event = {"GetDevicePluginOptions": options, "PreStartContainer": {}}
        self.answers["Allocate"] = {"container_responses": [{}]}
        self.calls: dict[str, list[Any]] = defaultdict(list)  # method: the requests
        self.lists: queue.Queue[Any] = queue.Queue()  # what the stream sends next; None ends it
        self.server = grpc.server(ThreadPoolExecutor(4))
        calls = {method: functools.partial(self.reply, method) for method in METHODS}
        servicer: Any = SimpleNamespace(**{**calls, "ListAndWatch": self.watch})
        rpc.add_DevicePluginServicer_to_server(servicer, self.server)
        self.server.add_insecure_port(f"unix:{kubelet.folder / endpoint}")
        self.server.start()

    def watch(self, _: Any, context: Any) -> Iterator[Any]:
        context.add_callback(lambda: self.lists.put(None))
        while (devices := self.lists.get()) is not None:
            yield api.ListAndWatchResponse(devices=devices)

    def reply(self, method: str, request: Any, _: Any) -> Any:
        self.calls[method].append(request)
        return getattr(api, METHODS[method].output_type.name)(**self.answers[method])

    def send(self, words: str) -> None:
        """Send one whole list, and wait until the kubelet has it. Of each device: "-" if it is
        Unhealthy, its id, and its NUMA node, if any: "a -b c@0"."""
        devices, mark = list[Event](), self.kubelet.log.mark()
        for minus, name, numa in re.findall(r"(-?)(\w)@?(\S*)", words):
            devices.append({"ID": name, "health": "Unhealthy" if minus else "Healthy"})
            if numa:
                devices[-1]["topology"] = {"nodes": [{"ID": int(numa)}]}
        self.lists.put(devices)
        health = {device["ID"]: device["health"] for device in devices}
        self.kubelet.wait("devices", endpoint=self.endpoint, devices=health, after=mark)

    def register(self, **fields: Any) -> None:
        """Register, with other values where given; grpc.RpcError if the kubelet refuses."""
        values = {"version": "v1beta1", "endpoint": self.endpoint, "resource_name": self.resource}
        request = api.RegisterRequest(**{**values, "options": self.options, **fields})
        address = f"unix:{self.kubelet.folder / 'kubelet.sock'}"
        with grpc.insecure_channel(address, [LOCAL]) as channel:
            rpc.RegistrationStub(channel).Register(request, timeout=10)

    def close(self) -> None:
        self.lists.put(None)
        self.server.stop(None).wait()


def sockets(kubelet: Kubelet) -> list[str]:
    """The plugins' sockets in the kubelet's folder."""
    found = (path.name for path in kubelet.folder.glob("*") if path.is_socket())
    return sorted(name for name in found if name != "kubelet.sock")


def refused(code: str, *words: str) -> pytest.RaisesExc[Refusal]:
    """What is inside is refused with this status, and a message with these words in this order."""
    return pytest.raises(Refusal, match=f"(?s)^{code}: .*" + ".*".join(map(re.escape, words)))


Launch = Callable[..., Plugin]
Puppets = Callable[..., Puppet]
COMMAND = [sys.executable, str(HERE / "tt_device_plugin.py")]  # the plugin that is read here
LONG = bool(os.environ.get("TT_TEST_LONG"))  # ./build.sh test --long

long_only = pytest.mark.skipif(not LONG, reason="takes long: ./build.sh test --long")
both_generations = pytest.mark.parametrize("kubelet", ["1.36", "1.20"], indirect=True)


@pytest.fixture
def room() -> Iterator[Path]:
    """A folder with a short name: a socket's path may have 107 bytes, and tmp_path takes most."""
    with tempfile.TemporaryDirectory(prefix="tt-", ignore_cleanup_errors=True) as folder:
        os.chmod(folder, 0o755)  # also for tests that run the plugin as another user
        yield Path(folder)


@pytest.fixture
def kubelet(request: pytest.FixtureRequest, room: Path) -> Iterator[Kubelet]:
    """A kubelet of 1.36, or of the generation that a parameter names; not started."""
    with contextlib.closing(Kubelet(room / "k", getattr(request, "param", "1.36"))) as made:
        yield made


@pytest.fixture
def tree(room: Path) -> Iterator[Tree]:
    """A node with the driver and no card; the hearts of what is added beat."""
    with Tree(room).beating() as made:
        yield made


@pytest.fixture
def four(tree: Tree) -> Tree:
    """A node with four n150."""
    for chip in N150:
        tree.add(chip)
    return tree


@pytest.fixture
def launch() -> Iterator[Launch]:
    """Start plugins: launch(tree, kubelet, "--more", "flags"). They end with the test. With
    offers=N the kubelet, started if need be, has so many n150 from it when this returns."""
    with contextlib.ExitStack() as stack:

        def start(
            tree: Tree | None, kubelet: Kubelet, *flags: str, offers: int = 0, **popen: Any
        ) -> Plugin:
            if offers and not kubelet.process:
                kubelet.start()
            words = [*COMMAND, "--kubelet-dir", str(kubelet.root), *(tree.flags if tree else [])]
            mark, plugin = kubelet.log.mark(), Plugin([*words, *flags], **popen)
            stack.enter_context(contextlib.closing(plugin))
            if offers:
                kubelet.wait_status(R150, offers, offers, after=mark, timeout=20)
            return plugin

        yield start


@pytest.fixture
def plugin(kubelet: Kubelet, four: Tree, launch: Launch) -> Plugin:
    """One whose four cards the kubelet offers: where most tests begin."""
    return launch(four, kubelet, offers=4)


@pytest.fixture
def puppets(kubelet: Kubelet) -> Iterator[Puppets]:
    """Make puppets in the kubelet's folder: puppets(resource, endpoint, **options)."""
    with contextlib.ExitStack() as stack:
        yield lambda *about, **options: stack.enter_context(
            contextlib.closing(Puppet(kubelet, *about, **options))
        )


# What follows on what is asserted by events; how soon, once for each promise.
Bound = Callable[[str, float, float], None]


def cpu_pressure() -> float:
    """Seconds in which some process of this machine waited for a CPU; 0 if Linux does not say."""
    with contextlib.suppress(OSError):
        return int(Path("/proc/pressure/cpu").read_text().split("total=")[1].split()[0]) / 1e6
    return 0.0


@pytest.fixture
def bound() -> Iterator[Bound]:
    """bound("stream dropped to registered", seconds, 0.1): a promised time, as it was promised. If
    the machine was busy since the test or the last call began, one that is over by less than a
    factor of ten is not held against the plugin: the test goes on, and ends as skipped."""
    before, busy = (time.monotonic(), cpu_pressure()), list[str]()

    def check(what: str, seconds: float, promised: float) -> None:
        nonlocal before
        now = time.monotonic(), cpu_pressure()
        pressure, before = (now[1] - before[1]) / (now[0] - before[0]), now
        text = f"{what}: {seconds * 1000:.1f} ms, promised are {promised * 1000:.0f} ms"
        if promised < seconds < 10 * promised and pressure > 0.1:  # of the time
            busy.append(f"{text}, but processes waited for a CPU {pressure:.0%} of the time")
        else:
            assert 0 <= seconds <= promised, text

    yield check
    if busy:
        pytest.skip("; ".join(busy))


# ==== Tests of the wire and of the fake kubelet ===================================================

X = "example.com/x"


def test_wire() -> None:
    """The plugin's stubs have exactly the table's messages and methods."""
    file, lines = descriptor_pb2.FileDescriptorProto(), []
    api.DESCRIPTOR.CopyToProto(file)
    nested = [one.nested_type for one in file.message_type]
    for message in itertools.chain(file.message_type, *nested):
        assert [one.number for one in message.field] == [*range(1, len(message.field) + 1)]
        fields = []
        for one in message.field:
            kind = one.type_name.rpartition(".")[2] or one.Type.Name(one.type)[5:].lower()
            fields.append(f" {'*' * (one.label == one.LABEL_REPEATED)}{kind} {one.name}")
        lines.append(f"{message.name}:{','.join(fields)}")
    assert (file.package, file.syntax) == ("v1beta1", "proto3")
    for service in file.service:
        for method in service.method:
            answer = "*" * method.server_streaming + method.output_type
            text = f"{service.name}/{method.name}: {method.input_type}, {answer}"
            lines.append(text.replace(".v1beta1.", ""))
    assert sorted(lines) == sorted(WIRE.strip().splitlines())


def test_kubelet_start_clears_sockets(kubelet: Kubelet, puppets: Puppets) -> None:
    """Contract 1: of mode 0750; sockets go, files stay; one is bound, and listens later."""
    path = kubelet.folder / "kubelet.sock"
    kubelet.start()
    assert stat.S_IMODE(kubelet.folder.stat().st_mode) in (0o750, 0o700), "less the umask"
    kubelet.kill()
    puppets(X)
    (kubelet.folder / "folder").mkdir()
    (kubelet.folder / "file").touch()
    mark = kubelet.log.mark()
    kubelet.start(wait="bound", listen_delay=0.3)
    (bound,) = kubelet.seen("bound", after=mark)
    assert sorted(bound["removed"]) == ["a.sock", path.name]
    inode = path.stat().st_ino
    with socket.socket(socket.AF_UNIX) as client:
        with pytest.raises(ConnectionRefusedError):
            client.connect(str(path))
        assert kubelet.wait("listening", after=mark)["t"] - bound["t"] >= 0.3
        client.connect(str(path))
    assert path.stat().st_ino == inode
    assert {one.name for one in kubelet.folder.iterdir()} == {"file", "folder", path.name}


def test_kubelet_judges_registrations(kubelet: Kubelet, puppets: Puppets) -> None:
    """Contract 2: a wrong version, name or endpoint fails the call, and nothing is kept."""
    kubelet.start(dial_limit=0.3)
    puppet = puppets(X)
    names = "n150 x.com/ x.com/-n x.com/n. x.com/a/b X.com/n kubernetes.io/n requests.x/n x.com/"
    wrong = [("resource_name", name, "invalid") for name in (names + "x" * 64).split()]
    wrong += [("version", value, "not supported") for value in ("", "v1alpha")]
    wrong += [("endpoint", value, "not a file") for value in ("", "/var/puppet.sock")]
    for what, value, says in [*wrong, ("endpoint", "nobody.sock", "failed to dial")]:
        with pytest.raises(grpc.RpcError, match=rf"StatusCode\.UNKNOWN(.|\n)*{says}"):
            puppet.register(**{what: value})
    assert not kubelet.seen("stream")
    puppet.register(resource_name="x.com/" + "aB.-_" * 12 + "xyz")  # 63 characters may be
    kubelet.wait("stream")


@both_generations
def test_kubelet_generations(kubelet: Kubelet, puppets: Puppets) -> None:
    """Contract 2: 1.20 answers, then dials, with the request's options; 1.36 dials and asks."""
    kubelet.start(dial_delay=0.2)
    puppet = puppets(X, pre_start_required=True)
    puppet.register(options={"pre_start_required": False})
    answered = time.monotonic()
    opened = kubelet.wait("stream")["t"]
    puppet.send("a")
    kubelet.admit("pod", {X: 1})
    kubelet.start_container("pod")
    if kubelet.generation == "1.20":
        assert opened > answered and [*puppet.calls] == ["Allocate"]
    else:
        assert [*puppet.calls] == ["GetDevicePluginOptions", "Allocate", "PreStartContainer"]
        assert kubelet.kinds(X)[:3] == ["register", "options", "stream"]


def test_kubelet_race(kubelet: Kubelet, puppets: Puppets) -> None:
    """Contract 4, 5, 8: lists are whole; Unhealthy is capacity, missing is not. The end of an older
    stream disconnects the resource's newer client, and leaves nothing allocatable."""
    kubelet.start()
    old, new = (puppets(X, f"{name}.sock") for name in ("old", "new"))
    old.register()
    for words, capacity, allocatable in (("a b", 2, 2), ("-a b", 2, 1), ("b", 1, 1)):
        old.send(words)
        kubelet.wait_status(X, capacity, allocatable)
    new.register()
    new.send("a b")
    mark = kubelet.log.mark()
    old.lists.put(None)
    kubelet.wait("stream_end", endpoint="old.sock", how="OK", after=mark)
    kubelet.wait("disconnected", endpoint="new.sock", ended="old.sock", after=mark)
    kubelet.wait("stream_end", endpoint="new.sock", how="closed by the kubelet", after=mark)
    kubelet.wait_status(X, 2, 0, after=mark)
    with refused("KUBELET", "stopped"):
        kubelet.allocate(X, ["a"])


def test_kubelet_keeps_the_answer(kubelet: Kubelet, puppets: Puppets) -> None:
    """Contract 9, 12, 13, 15: prefer, allocate once, pre-start often; restarted: the same ids."""
    kubelet.start()
    puppet = puppets(X, pre_start_required=True, get_preferred_allocation_available=True)
    puppet.answers["GetPreferredAllocation"] = {"container_responses": [{"deviceIDs": ["x", "b"]}]}
    puppet.answers["Allocate"] = {"container_responses": [{"envs": {"X": "first"}}]}
    puppet.register()
    puppet.send("a b c")
    assert kubelet.admit("pod", {X: 2}, {X: ["a"]})["ids"] == {X: ["a", "b"]}
    (asked,) = puppet.calls["GetPreferredAllocation"][0].container_requests
    assert {*asked.available_deviceIDs} == {*"abc"} and asked.must_include_deviceIDs == ["a"]
    assert asked.allocation_size == 2
    assert kubelet.start_container("pod")["envs"] == {"X": "first"}
    with refused("UnexpectedAdmissionError", "Requested: 2, Available: 1"):
        kubelet.admit("second", {X: 2})
    kubelet.kill()
    puppet.close()
    kubelet.start()
    with refused("UnexpectedAdmissionError", "no healthy devices"):
        kubelet.admit("pod", {X: 2})
    puppet = puppets(X, pre_start_required=True)
    puppet.answers["Allocate"] = {"container_responses": [{"envs": {"X": "second"}}]}
    puppet.register()
    puppet.send("a -b c")
    with refused("UnexpectedAdmissionError", "['b']"):
        kubelet.admit("pod", {X: 2})
    puppet.send("a b c")
    assert kubelet.admit("pod", {X: 2})["envs"] == {"X": "first"}
    kubelet.start_container("pod")
    kubelet.start_container("pod")
    counts = {method: len(requests) for method, requests in puppet.calls.items()}
    assert counts == {"GetDevicePluginOptions": 1, "PreStartContainer": 2}
    assert kubelet.admit("second", {X: 1})["envs"] == {"X": "second"}


def test_kubelet_merges_by_key(kubelet: Kubelet, puppets: Puppets) -> None:
    """Contract 14: of two resources' values for one name, the second is dropped silently."""
    kubelet.start()
    for number in "12":
        puppet = puppets(X + number, f"{number}.sock")
        device = {"container_path": f"/dev/{number}", "host_path": "/dev/null"}
        answer = {"envs": {"SHARED": number, f"OWN_{number}": "x"}, "devices": [device]}
        puppet.answers["Allocate"] = {"container_responses": [answer]}
        puppet.register()
        puppet.send("a")
    merged = kubelet.admit("pod", {f"{X}1": 1, f"{X}2": 1})
    assert merged["envs"] == {"SHARED": "1", "OWN_1": "x", "OWN_2": "x"}
    assert [one["container_path"] for one in merged["devices"]] == ["/dev/1", "/dev/2"]
    assert kubelet.seen("conflict")[0]["key"] == "SHARED"


def test_kubelet_topology_hints(kubelet: Kubelet, puppets: Puppets) -> None:
    """Contract 10: -1 matches nothing, and one device without topology takes the hints from all."""
    kubelet.start()
    puppet = puppets(X)
    puppet.register()
    for words, size, hints in (
        ("a@0 b@1", 1, [[0], [1], [0, 1]]),
        ("a@0 b@1", 2, [[0, 1]]),
        ("a@0 -b@1", 1, [[0], [0, 1]]),
        ("a@-1 b@-1", 1, []),
        ("a@0 b", 2, []),
        ("a b", 2, None),
    ):
        puppet.send(words)
        assert kubelet.hints(X, size) == hints, words


# ==== Section 3. Discovery: what sysfs says, and what is known of a chip by it ====================

BDF = N150[0].pci
FIRST = tt.Chip(BDF, 0)  # the first chip as it is before it is identified
UNREADABLE = "/proc/self/mem"  # a link to it: reading fails with EIO, also for root
NONSENSE = (UNREADABLE, "", "\0\xff/..", "-1", "1" * 5000)
NO_ID = ("F" * 16, "0" * 16, "0d0cb6f1e7a50001", "D0CB6F1E7A50001", "00D0CB6F1E7A50001")
# File, fact, and why a chip without it is not known, if so.
LACKING = """\
tt_card_type card_type pending, tt_asic_id asic_id unidentified, tt_serial serial, \
tt_fw_bundle_ver firmware, dev dev pending, device/device arch unidentified, \
device/iommu_group/type iommu, device/numa_node numa_node"""


def rows(text: str) -> pytest.MarkDecorator:
    """Parametrize `row` by a table: columns are two spaces apart, the first one names the row."""
    split = [re.split("  +", line.strip()) for line in text.strip().splitlines()]
    return pytest.mark.parametrize("row", [pytest.param(row, id=row[0]) for row in split])


def chip_of(text: str) -> Chip:
    """A chip: N, bus, type, ASIC id (one digit for 16 of them), serial; "-" for no such file."""
    n, bus, *known = text.split()
    card_type, asic_id, serial = (one.strip("-") for one in known)
    chip = Chip(f"0000:{bus}:00.0", int(n), card_type=card_type, asic_id=asic_id * 16)
    arch = "blackhole" if card_type.startswith("p") else "wormhole"
    return replace(chip, serial=serial, arch=arch)


def brief(snapshot: tt.Snapshot) -> str:
    """Of each card: resource, ID, N, kind after "+" (Healthy), "-" (Unhealthy) or "?" (pending)."""
    text, marks = "", {"Healthy": "+", "Unhealthy": "-", "pending": "?"}
    for card in snapshot.cards:
        nodes = ",".join(path.removeprefix("/dev/tenstorrent/") for path in card.device_nodes)
        kind = marks[card.verdict.health] + card.verdict.kind
        text += f", {(card.resource or '-').rpartition('/')[2]} {card.id} {nodes} {kind}"
    return re.sub(r"([0-9A-F])\1{15}", r"\1", text[2:].replace(P300_ID, "P300"))


def inventory_of(tree: Tree) -> tt.Inventory:
    """The plugin's inventory of this tree."""
    return tt.Inventory(tt.Settings(sysfs_root=tree.sys, dev_root=tree.dev))


@contextlib.contextmanager
def just_before(function: Any, do: Callable[[int], object], error: int = 0) -> Iterator[None]:
    """Whenever this thread is about to call a built-in function, do(how often it did so) runs; then
    the call fails with `error`, as only drivers make it fail, and later ones are not met."""
    calls = itertools.count()

    def profile(frame: object, event: str, called: object) -> None:
        if event == "c_call" and called is function:
            do(next(calls))
            if error:
                raise OSError(error, "")

    sys.setprofile(profile)
    try:
        yield
    finally:
        sys.setprofile(None)


@pytest.mark.parametrize("row", LACKING.split(", "))
def test_what_sysfs_says_of_a_chip(room: Path, row: str) -> None:
    """Each fact is one file's. Missing, not readable and not to be understood are one: not known.
    Only of ASIC ids it is known where there are none: such a chip goes by its PCI address."""
    file, fact, *unknown = row.split()
    tree, fault = Tree(room, N150[:1]), "no-node" if file == "dev" else ""
    look = functools.partial(inventory_of(tree).discovery.read, FIRST)
    whole = tt.Chip(BDF, 0, dev="1:3", arch="wormhole", card_type="n150", firmware="80.17.0.0")
    whole = replace(whole, numa_node=0, iommu="DMA-FQ", unknown="")
    whole = replace(whole, asic_id=N150[0].asic_id, serial=N150[0].serial)
    assert tt.ARCHITECTURES == {"0x401e": "wormhole", "0xb140": "blackhole"}
    assert look() == (whole, tt.Reading(1_000_000))
    lacking: Any = {fact: getattr(FIRST, fact), "unknown": "".join(unknown)}
    for text in (*NONSENSE, *(NO_ID if file in ("tt_asic_id", "tt_serial") else ()), None):
        (tree.entry(BDF) / file).unlink()
        if text == UNREADABLE:
            (tree.entry(BDF) / file).symlink_to(UNREADABLE)
        elif text is not None:
            tree.set(BDF, file, text.encode("latin-1"))
        elif file == "tt_asic_id":
            lacking["unknown"] = ""
        assert look() == (replace(whole, **lacking), tt.Reading(1_000_000, fault)), text


@rows("""
    it beats           5            5           -           -
    no such file       -            -           -           ENOENT
    all ones           4294967295   4294967295  bus-dead    -
    no number          N/A          -           unreadable  not a number
    11 digits          10000000000  -           unreadable  not a number
    a policy's EACCES  EACCES       -           unreadable  EACCES
    in a reset         ENODATA      -           resetting   ENODATA
    detached           ENODEV       -           gone        ENODEV
""")
def test_what_a_heartbeat_says(room: Path, row: list[str]) -> None:
    """A device node that is missing, or another device, is told, unless the chip has told worse."""
    text, beat, fault, detail = ("" if cell == "-" else cell for cell in row[1:])
    tree, error = Tree(room, N150[:1]), getattr(errno, text, 0)
    discovery, chip = inventory_of(tree).discovery, replace(FIRST, dev="1:3")
    if not error:
        tree.set(BDF, "tt_heartbeat", text or None)
    for node in ("/dev/null", "/dev/zero", "/dev", "nowhere"):
        tree.node(BDF).unlink()
        tree.node(BDF).symlink_to(node)
        told = "no-node" if node != "/dev/null" and fault in ("", "unreadable") else fault
        with just_before(os.read, bool, error):
            assert discovery.read_health(chip) == (int(beat) if beat else None, told, detail)
    assert not tt.is_device_node(str(room), "0:0")  # it has this number, and is a folder


def test_what_is_read_again(room: Path) -> None:
    """A late ASIC id; the firmware after a reset in place; all of a chip that was probed anew,
    which has another inode. Nothing else: before driver 2.7 a read could oops the kernel."""
    tree, opened = Tree(room, [replace(N150[0], asic_id="")]), list[int]()
    inventory, entry, draft = inventory_of(tree), tree.entry(BDF), tree.drafts / "new"
    discovery = inventory.discovery
    open_files = len(os.listdir("/proc/self/fd"))
    with just_before(os.open, lambda n: n == 2 and (entry / "tt_asic_id").write_text("A" * 16)):
        chip, _ = discovery.read(FIRST)
    assert chip.card_id == "wormhole-" + "A" * 16
    tree.set(BDF, "tt_fw_bundle_ver", "80.18.0.0\n")
    with just_before(os.open, opened.append):
        assert discovery.read(chip)[0] == chip and opened == [0]
    with just_before(os.read, bool, errno.ENODATA):
        resetting, _ = discovery.read(chip)
    assert resetting == replace(chip, firmware="")
    tree.set(BDF, "tt_heartbeat", f"{0xFFFFFFFF}")
    assert discovery.read(resetting)[0] == resetting, "a dead bus shows none"
    tree.set(BDF, "tt_heartbeat", "5")
    assert discovery.read(resetting)[0] == replace(chip, firmware="80.18.0.0")
    assert len(os.listdir("/proc/self/fd")) == open_files
    inventory.poll(0.0)
    cards = inventory.snapshot.cards
    tree.set(BDF, "tt_serial", "A" * 16)
    os.utime(entry, (1, 1))  # sysfs makes the times of a folder up
    inventory.poll(1.0)
    assert inventory.snapshot.cards == cards
    shutil.copytree(entry, draft, symlinks=True)
    entry.rename(tree.drafts / "old")
    draft.rename(entry)
    inventory.poll(2.0)
    assert inventory.snapshot.cards[0].chips[0].serial == "A" * 16


def test_class_entries(room: Path) -> None:
    """One of the driver's that leads to a PCI function, below root bus and bridges, is a chip. What
    cannot be listed is an error, and not an empty node."""
    tree, bridges = Tree(room, N150[:1]), ("pci10000:40", "10000:40:01.1", "10000:41:00.0")
    discovery, folder = inventory_of(tree).discovery, tree.sys / "class/tenstorrent"
    below = tree.sys.joinpath("devices", *bridges, "10000:42:00.0")
    below.mkdir(parents=True)
    for name in ("by-id", *(f"tenstorrent!{n}" for n in ("", "x", "00", "0x", "1" * 7))):
        (folder / name).symlink_to(tree.entry(BDF))
    (folder / "tenstorrent!2").symlink_to("nowhere")
    for n, target in enumerate((str(below), "device", "/", ".."), start=13):
        (folder / f"tenstorrent!{n}").mkdir()
        (folder / f"tenstorrent!{n}/device").symlink_to(target)
    one, two = ((folder / f"tenstorrent!{n}").stat().st_ino for n in (0, 13))
    chips = [tt.Chip(BDF, 0, one, ("pci0000:01",)), tt.Chip("10000:42:00.0", 13, two, bridges)]
    assert sorted(discovery.chips(), key=lambda chip: chip.index) == chips
    shutil.rmtree(tree.sys / "class")
    (tree.sys / "class").symlink_to("class")
    with pytest.raises(OSError, match="symbolic links"):
        discovery.chips()


def test_pci_functions_without_a_device_node(room: Path) -> None:
    """Ours by vendor; listed with the driver that has them, and not offered. It is bound a moment
    before the device node is there."""
    tree = Tree(room, N150)
    inventory, folder = inventory_of(tree), tree.sys / "bus/pci/devices"
    for chip, driver in zip(N150[1:], ("vfio-pci", "tenstorrent", "x"), strict=True):
        tree.remove(chip.pci, driver=driver)
    (tree.pci(N150[3].pci) / "driver").unlink()
    tree.write(folder / "0000:99:00.0/vendor", "0x8086\n")
    inventory.poll(0.0)
    listed = "- 0000:02:00.0  ?no-driver, - 0000:41:00.0  ?pending, - 0000:c1:00.0  ?no-driver"
    assert brief(inventory.snapshot) == f"n150 {N150[0].id} 0 +ok, {listed}"
    _, vfio, _, none = inventory.snapshot.cards
    assert " is vfio-pci, not" in vfio.verdict.reason and vfio.chips[0].arch == "wormhole"
    assert " is none, not" in none.verdict.reason
    for chip in N150[1:]:
        (folder / chip.pci).unlink()
    tree.write(tree.sys / "module/tenstorrent/version", "2.11.0\n")
    tree.write(folder / "0000:98:00.0/vendor", "0x1e52\n")
    inventory.poll(1.0)  # a card comes, and no driver takes it; no class device has come or gone
    assert inventory.snapshot.driver == "2.11.0"
    assert brief(inventory.snapshot) == f"n150 {N150[0].id} 0 +ok, - 0000:98:00.0  ?no-driver"


# ==== Section 4. Health: README's table, row by row ===============================================


# Each poll: time, what is read, kind of the verdict ("=": the same). What is read: a heartbeat; "-"
# for no file; a fault, with a heartbeat after "/" if one is read; or why it is not identified.
@rows("""
    it changes, or begins anew     0 4294967294 ok, 1 0 ok, 99 7 ok, 200 3 ok
    no file                        0 - ok, 50 - ok, 99 - ok, 999 - ok
    gone until it is back          0 1 ok, 1 gone =, 99 gone =, 100 1 ok, 101 - gone, 102 1 ok
    hung: equal for over 12 s      0 1 ok, 4 1 ok, 8 1 ok, 12 1 ok, 12.1 1 hung, 99 1 hung
    ... and in 3 reads             0 1 ok, 30 1 ok, 31 1 ok, 32 1 hung
    ... until 2 changes            0 1 ok, 1 1 ok, 2 1 ok, 13 1 hung, 14 2 hung, 15 2 hung, 16 3 ok
    ... and again                  0 1 ok, 1 1 ok, 2 1 ok, 13 1 hung, 14 2 hung, 15 2 hung,\
 16 2 hung, 27 2 hung, 28 3 hung, 29 4 ok
    ... and its files go           0 1 ok, 1 1 ok, 2 1 ok, 13 1 hung, 14 - gone, 15 2 hung
    SIGSTOP is no silence          0 1 ok, 1 1 ok, 600 1 ok, 600.1 2 ok, 601 2 ok
    a reset until 1 change after   0 1 ok, 1 resetting =, 2 7 resetting, 3 7 resetting, 4 8 ok
    ... and its files go           0 1 ok, 1 resetting =, 2 - resetting, 3 1 resetting, 4 - gone
    ... ends a hang  0 1 ok, 1 1 ok, 2 1 ok, 13 1 hung, 14 resetting =, 15 2 resetting, 16 3 ok
    a dead bus until 1 change      0 1 ok, 1 bus-dead/4294967295 =, 2 1 bus-dead, 3 2 ok
    no device node                 0 1 ok, 1 no-node/2 =, 14 no-node/3 =, 15 4 ok
    ... while it hangs             0 1 ok, 4 1 ok, 8 1 ok, 13 no-node/1 =, 14 1 hung
    a read hangs until it returns  0 1 ok, 2 read-hangs =, 99 read-hangs =, 100 1 ok
    ... is no equal read           0 1 ok, 1 1 ok, 2 read-hangs =, 99 1 ok, 99.1 1 hung
    not readable is not dead       0 1 ok, 1 unreadable =, 9 unreadable =, 99 unreadable =, 100 1 ok
    ... nor healed                 0 1 ok, 1 1 ok, 2 1 ok, 13 1 hung, 14 unreadable hung,\
 15 3 hung, 16 4 ok
    no telemetry for 130 s         0 pending =, 130 pending =, 130.1 pending no-telemetry, 132 1 ok
    ... and a dead bus             0 bus-dead/4294967295 =, 200 pending no-telemetry
    not identified                 0 unidentified =, 999 unidentified =, 1000 1 ok
    ... and hung          0 1 ok, 1 1 ok, 2 1 ok, 13 1 hung, 14 unidentified/2 =, 15 2 hung
""")
def test_health_table(row: list[str]) -> None:
    """README's table "Health": from poll to poll, in both directions."""
    history = tt.HealthHistory(1e6)
    for poll in row[1].split(", "):
        now, seen, kind = poll.split()
        fault, _, beat = seen.partition("/") if seen[0].isalpha() else ("", "", seen)
        why = fault if fault in ("pending", "unidentified") else ""
        reading = tt.Reading(int(beat) if beat.isdigit() else None, "" if why else fault)
        verdict = history.update(replace(FIRST, unknown=why), reading, 1e6 + float(now))
        assert verdict.kind == (fault if kind == "=" else kind), f"at {now}"
        held = ("pending", "no-telemetry", "unidentified")
        marks = dict.fromkeys(("ok", "unreadable"), "Healthy") | dict.fromkeys(held, "pending")
        assert verdict.health == marks.get(verdict.kind, "Unhealthy")


# ==== Section 5. Cards: no chip under two IDs, whatever happens; what becomes of a card ===========

# Chips as chip_of() has them, and the one name of the card that each is part of, at all times.
ACTORS = {
    "a": ("0 03 p300a A 000004513190F004", "p300 P300"),
    "b": ("1 04 p300a B 000004513190F004", "p300 P300"),
    "d": ("2 05 p300c D 000004613193411B", "p300 p300-000004613193411B"),
    "e": ("3 06 p300c E 000004613193411B", "p300 p300-000004613193411B"),
    "f": ("4 07 p300a 7 0000045100000000", "it cannot be paired"),
    "k": ("11 0b p300a 8 0000045100000000", "it cannot be paired"),  # nor is it f's other half
    "n": ("5 01 n150 1 0100018611902010", "n150 wormhole-1"),
    "m": ("6 02 n150 2 010001851180B42E", "n150 wormhole-2"),
    "g": ("7 11 galaxy-wormhole 3 0100035100000000", "galaxy-wormhole wormhole-3"),
    "h": ("8 12 galaxy-wormhole 4 0100035100000000", "galaxy-wormhole wormhole-4"),
    "p": ("9 00 p150a 9 0000036100000000", "p150 blackhole-9"),
    "u": ("10 0a unknown 6 0100099911902010", "wormhole wormhole-6"),
    "c": ("2 08 p300a C 000004513190F004", ""),  # another board with the serial of a and b
    "t": ("6 02 n150 1 -", ""),  # n's twin
    "x": ("5 01 n150 - -", ""),  # n by a driver without ASIC ids
}
NODE = [(chip_of(text), name) for text, name in ACTORS.values() if name]
# What wrong files say while a chip fails, is reset, or starts (the last). The file of an ASIC id
# comes with that of the type (test_what_is_read_again), and a type is known if the serial is.
WRONG: list[dict[str, Any]] = [
    {},
    *({"asic_id": text} for text in ("F" * 16, "0" * 16, "junk")),
    *({"card_type": "unknown", "serial": text} for text in ("F" * 16, "0" * 16)),
    *({"serial": text} for text in ("F" * 16, "0" * 16, "junk", "")),
    dict.fromkeys(("card_type", "asic_id", "serial"), ""),
]
# A poll: is the plugin started anew? How far have the chips moved? Each is away (None), or has
# something wrong with its files, or nothing, and a fault, or none.
WAYS = st.sampled_from((0, 0, 0, 0, *range(len(WRONG))))
FAULTS = ("", "", "resetting", "bus-dead", "gone", "no-node", "read-hangs", "unreadable")
STATE = st.none() | st.tuples(WAYS, st.sampled_from(FAULTS))
POLLS = st.tuples(st.booleans(), st.integers(0, 3), st.tuples(*[STATE] * len(NODE)))


@pytest.fixture
def looks(room: Path) -> list[list[tt.Chip]]:
    """What discovery makes of NODE's chips if all are wrong in one way, for each way."""
    found, chips = [], [tt.Chip(chip.pci, chip.index) for chip, _ in NODE]
    with ThreadPoolExecutor(len(NODE)) as pool:  # it looks again at what makes no sense, later
        for way, wrong in enumerate(WRONG):
            tree = Tree(room / f"{way}", [replace(chip, **wrong) for chip, _ in NODE])
            found.append(list(pool.map(inventory_of(tree).discovery.identify, chips)))
    return found


@hypothesis.settings(deadline=None, suppress_health_check=list(hypothesis.HealthCheck))
@given(st.lists(POLLS, min_size=1, max_size=6), st.randoms(use_true_random=False))
@hypothesis.example([(False, 0, [(-2, "")] * 2)], random.Random(0))  # halves without a serial
def test_no_chip_is_healthy_under_two_ids(
    looks: list[list[tt.Chip]], polls: list[Any], order: random.Random
) -> None:
    """Whatever chips do, and if the plugin forgets all: a Healthy card has its hardware's name and
    all its chips. What was offered stays, no chip is left out, the order of reading is nothing."""
    snapshot = tt.Snapshot()
    for now, (restarted, shift, states) in enumerate([*polls, (False, 0, [(0, "")] * len(NODE))]):
        old = tt.Snapshot() if restarted else snapshot
        poll, owner = list[tt.Judged](), dict[str, str]()
        for n, state in enumerate(states):
            if state:
                pci = f"0000:{(n + shift) % len(NODE):02x}:00.0"
                chip = replace(looks[state[0]][n], pci=pci, index=n ^ shift)
                verdict = tt.HealthHistory(0.0).update(chip, tt.Reading(1, state[1]), now)
                poll, owner[pci] = [*poll, (chip, verdict)], NODE[n][1]
        shuffled = order.sample(poll, len(poll))
        snapshot = tt.next_snapshot(old, poll, tt.Settings(), now)
        assert snapshot == tt.next_snapshot(old, shuffled, tt.Settings(), now)
        names = [" ".join(line.split()[:2]) for line in brief(snapshot).split(", ")]
        named = list(zip(snapshot.cards, names, strict=False))
        for card, name in named:
            if card.verdict.health == "Healthy":
                size = 2 if card.model == "p300" else 1
                assert [owner.get(chip.pci) for chip in card.chips] == [name] * size
        ids = {card.id for card in snapshot.cards}
        assert len(ids) == len(snapshot.cards)
        assert ids >= {card.id for card in old.cards if card.resource}
        assert owner.keys() <= {chip.pci for card in snapshot.cards for chip in card.chips}
    well = {name for card, name in named if card.verdict.kind == "ok"}
    assert well == {name for _, name in NODE} - {"it cannot be paired"}


def judged(word: str) -> tt.Judged:
    """A chip in one poll: its letter; "@5" its N; "/09" its bus; "?" if it is not identified;
    "=hung" the kind of its verdict."""
    letter, index, bus, unknown, kind = re.findall(r"^(.)(?:@(.))?(?:/(..))?(\??)=?(.*)$", word)[0]
    chip = replace(chip_of(ACTORS[letter][0]), unknown=unknown)
    pci = f"0000:{bus or chip.pci[5:7]}:00.0"
    chip = replace(chip, pci=pci, index=int(index or chip.index))
    if unknown:
        chip, kind = replace(chip, arch="", card_type="", asic_id=""), kind or "pending"
    return chip, tt.make_verdict(kind, chip=chip, detail="EIO") if kind else tt.Verdict()


@rows("""
    a p300 is one card          a b              p300 P300 0,1 +ok  ^ since 0$
    half a p300 is no card      a                - P300 0 ?half  only 0000:03.*: the other one
    it loses a half             a b; a           p300 P300 0,1 -half  only 0000:03.*: 0000:04
    ... then the other          a b; a; b        p300 P300 0,1 -half  only 0000:04.*: 0000:03
    ... one is back, not known  a b; a; a b@5?   p300 P300 0,1 -half, - 0000:04:00.0 5 ?pending
    ... and is whole again      a b; a; a b@5    p300 P300 0,5 +ok
    one half in trouble  a=gone b=unreadable     p300 P300 0,1 -gone  ^chip 0000:03.*: it is
    a note about one half       a b=unreadable   p300 P300 0,1 +unreadable  ^chip 0000:04.*: its
    two boards with one serial  a b; a b c       p300 P300 0,1,2 -same-id  ID: 0000:03.*04.*08
    equal ASIC ids              n t              - wormhole-1 5,6 ?same-id  ID: 0000:01:00.0, 0
    a card is gone              n;               n150 wormhole-1 5 -gone  ^it is gone.*restart
    ... and back                n; ; n@7         n150 wormhole-1 7 +ok
    ... was not offered         n?;              nothing
    ... in another slot         n; n/09 m/01     n150 wormhole-2 6 +ok, n150 wormhole-1 5 +ok
    late telemetry              n?; n            n150 wormhole-1 5 +ok
    not to be identified now    n; n?            n150 wormhole-1 5 -gone, - 0000:01:00.0 5 ?pending
    by PCI address, in a reset  x; x@3?          n150 0000:01:00.0 3 -pending
    a dead bus at first sight   n?=bus-dead      - 0000:01:00.0 5 -bus-dead
    seen twice (tt-kmd#112)     n@7 n=gone       n150 wormhole-1 7 +ok
    by resource, PCI address    a p m@4 n        n150 wormhole-1 5 +ok, n150 wormhole-2 4 +ok,\
 p150 blackhole-9 9 +ok, - P300 0 ?half
    since it was first there    n; n=unreadable  n150 wormhole-1 5 +unreadable  ^its .* since 0$
    ... is gone, then reset     n; n; ; n=resetting         n150 wormhole-1 5 -resetting  since 2$
    ... is back                 n; ; n=resetting; n; n      n150 wormhole-1 5 +ok  since 3$
""")
def test_what_becomes_of_a_card(row: list[str]) -> None:
    """From poll to poll: one card, one ID. The reason names the chips; the time is that at which
    its health changed, and not the reason."""
    snapshot = tt.Snapshot()
    for now, poll in enumerate(row[1].split(";")):
        seen = [judged(word) for word in poll.split()]
        snapshot = tt.next_snapshot(snapshot, seen, tt.Settings(), 100 + now)
    assert brief(snapshot) == row[2].replace("nothing", "")
    for words in row[3:]:
        card = snapshot.cards[0]
        assert re.search(words, f"{card.verdict.reason} since {card.since - 100:.0f}")


class Acme:
    """Another vendor's discovery: what README's "For another vendor's card" asks for."""

    driver_version = str  # there is none
    pci_functions: Any = staticmethod(lambda known: [])  # nor a chip without it
    find: Callable[[], object] = bool  # called at each poll
    look: Callable[[tt.Chip], object] = bool  # and at each read

    def __init__(self, folder: Path, *there: int) -> None:
        self.dev_folder, self.there = str(folder), list(there)
        made: Any = self
        self.inventory = tt.Inventory(tt.Settings(resource_domain="x.org", poll_seconds=0.02), made)

    def chips(self) -> list[tt.Chip]:
        self.find()
        return list(filter(None, map(self.chip_at, self.there)))

    def chip_at(self, index: int) -> tt.Chip | None:
        chip = tt.Chip(f"0000:{index:02x}:00.0", index, 100 + index)
        return chip if index in self.there else None

    def read(self, chip: tt.Chip) -> tuple[tt.Chip, tt.Reading]:
        self.look(chip)
        chip = replace(chip, arch="acme", card_type="x1", asic_id=f"{chip.index}", dev="1:3")
        return replace(chip, unknown=""), tt.Reading()


def test_for_another_vendors_card(room: Path) -> None:
    """With another discovery all the rest is as it is: what is listed, and what a Pod gets."""
    acme = Acme(room, 1, 2, 3)
    shared = tt.Shared(acme.inventory, tt.preferred_allocation, lambda cards: [])
    plugin = tt.DevicePlugin(shared, "x.org/x1")
    one = api.ContainerAllocateRequest(devices_ids=["acme-3", "acme-1"])
    request = api.AllocateRequest(container_requests=[one])
    for n in acme.there:
        (room / str(n)).symlink_to("/dev/null")
    acme.inventory.poll(0.0)
    (answer,) = as_dict(asyncio.run(plugin.Allocate(request, None)))["container_responses"]
    paths = [device["host_path"] for device in answer["devices"]]
    assert paths == ["/dev/tenstorrent/1", "/dev/tenstorrent/3"]
    assert answer["envs"] == {"PCIDEVICE_X_ORG_X1": "0000:01:00.0,0000:03:00.0"}
    acme.there.remove(3)
    acme.inventory.poll(1.0)
    assert brief(acme.inventory.snapshot) == "x1 acme-1 1 +ok, x1 acme-2 2 +ok, x1 acme-3 3 -gone"


def test_readers(room: Path, caplog: pytest.LogCaptureFixture, bound: Bound) -> None:
    """30 of 32 chips hang, one before it was identified: one poll takes 2 s, later ones do not
    wait until they return. A defect costs its chip only. A thread ends when its chip is gone."""
    acme, released = Acme(room, *range(31)), threading.Event()
    before = set(threading.enumerate())

    def poll(look: Callable[[tt.Chip], object], promised: float) -> dict[str, int]:
        acme.look, began = look, time.monotonic()
        acme.inventory.poll(0.0)
        bound(f"a poll within {promised} s", time.monotonic() - began, promised)
        return Counter(card.verdict.kind for card in acme.inventory.snapshot.cards)

    def hang(chip: tt.Chip) -> object:
        return chip.index < 2 or released.wait(60)

    assert poll(bool, 3.0) == {"ok": 31}
    acme.there.append(31)
    assert poll(hang, 3.0) == {"ok": 2, "read-hangs": 30}  # a second later: news within 4 s
    assert acme.inventory.snapshot.cards[-1].resource is None
    acme.there.remove(0)
    assert poll(hang, 0.1) == {"ok": 1, "read-hangs": 30, "gone": 1}
    released.set()
    assert all(reader.idle.wait(10) for reader in acme.inventory.readers.values())
    assert poll(lambda chip: 1 // (chip.index - 1), 3.0) == {"ok": 30, "unreadable": 1, "gone": 1}
    assert "chip 0000:01:00.0 cannot be read\nTraceback" in caplog.text and len(caplog.records) == 1
    assert "ZeroDivisionError" in acme.inventory.snapshot.cards[1].verdict.reason
    assert poll(bool, 3.0) == {"ok": 31, "gone": 1}
    acme.there = []
    assert poll(bool, 0.1) == {"gone": 32}
    for thread in set(threading.enumerate()) - before:
        thread.join(10)
        assert not thread.is_alive()


def test_polling_thread(room: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A stream is woken by news only, and before any callback runs; one that fails hurts nobody. A
    poll that fails leaves the last list, and is said once; one under way at the end is nothing."""
    caplog.set_level(logging.INFO)
    acme, told, woken = Acme(room), list[str](), threading.Semaphore(0)
    last, stopped = threading.Event(), threading.Event()
    no_files, defect = OSError(errno.EMFILE, ""), ValueError(1)
    found: list[Any] = [[], [1], [1], no_files, no_files, [1], defect, defect, [1, 2], [1]]

    def find() -> None:
        acme.there = now = found.pop(0)
        if isinstance(now, Exception):
            raise now
        if not found:
            last.set()
            assert stopped.wait(20)

    def fail(old: tt.Snapshot, new: tt.Snapshot) -> None:
        if old != new:
            raise ValueError(f"woken: {woken.acquire(timeout=10)}")

    async def stream() -> None:
        while await acme.inventory.changed.wait():
            woken.release()

    async def main() -> None:
        task = asyncio.create_task(stream())
        await asyncio.sleep(0)  # it waits
        acme.inventory.start(asyncio.get_running_loop())
        assert await asyncio.to_thread(last.wait, 20)
        acme.inventory.stop()
        task.cancel()

    acme.find, began = find, time.monotonic()
    acme.inventory.on_snapshot = [fail, lambda old, new: told.append(brief(new))]
    asyncio.run(main())
    assert time.monotonic() - began >= 9 * 0.02, "it pauses after each poll"
    (thread,) = (one for one in threading.enumerate() if one.name == "poll")
    stopped.set()
    thread.join(10)
    one, two = "x1 acme-1 1 +ok", "x1 acme-1 1 +ok, x1 acme-2 2 +ok"
    assert told == ["", one, one, one, two] and brief(acme.inventory.snapshot) == two
    assert "".join(record.levelname[0] for record in caplog.records) == "EEWIEWEI"
    assert caplog.text.count("ValueError: woken: True") == 3 and not woken.acquire(blocking=False)
    problems = re.findall("cannot look for cards, the last list stands: (.*)", caplog.text)
    assert problems == ["OSError: [Errno 24] ", "ValueError: 1"]


# ==== Appendix A. Preferred allocation ============================================================

# Host, NUMA node, what is above, and the buses of a card each. Which trays share a NUMA node is
# made up. Two switches are on one node, none on the other.
SPOTS = """
galaxy 1 pci0000:00 c1 c2 c3 c4 c5 c6 c7 c8 81 82 83 84 85 86 87 88
galaxy 0 pci0000:00 01 02 03 04 05 06 07 08 41 42 43 44 45 46 47 48
host 0 pci0000:00/0000:00:01.0 01 02 03
host 0 pci0000:00/0000:00:02.0 05 06
host 1 pci0000:{bus} 41 51 61 71
flat - - 01 02 09 0a 0b
"""
CARDS: dict[str, dict[str, tt.Card]] = {"galaxy": {}, "host": {}, "flat": {}}
for host, numa, above, *buses in map(str.split, SPOTS.strip().splitlines()):
    for bus in buses:
        path = tuple(above.format(bus=bus).split("/"))
        node = None if numa == "-" else int(numa)
        chip = tt.Chip(f"0000:{bus}:00.0", pci_path=path, numa_node=node)
        CARDS[host][bus] = tt.Card(bus, f"{host}-x", f"x.org/{host}-x", (chip,), tt.Verdict())


@rows("""
    smallest group with room   host    01 02 03 05 06 41 51 61 71  -      4  41 51 61 71
    ... the last one           host    01 03 05 41 51 61 71        -      1  05
    one NUMA node before all   host    01 02 03 05 06 41 51 61 71  -      5  01 02 03 05 06
    largest whole, and rest    host    01 02 03 05 06 41 51 61 71  -      7  01 02 03 05 06 41 51
    neighbours                 flat    01 02 09 0a 0b              -      3  09 0a 0b
    ... the first of equals    flat    01 02 09 0a 0b              -      2  01 02
    near to what it must have  host    01 02 03 05 06 41 51        06     3  06 05 01
    the tray of what it must   galaxy  01 02 43 44 81              43     2  43 44
    lost ones come last        host    lost gone 41                -      2  41 gone
    ... unless it must         host    gone lost 41                lost   2  41 lost
""")
def test_preferred_allocation(row: list[str]) -> None:
    """The same NUMA node, then the smallest group that has room, then neighbours."""
    _, host, available, must, size, chosen = row
    wanted = (available.split(), must.strip("-").split(), int(size))
    assert tt.preferred_allocation(CARDS[host], *wanted) == chosen.split()


def test_trays_stay_whole(bound: Bound) -> None:
    """A Galaxy's trays are taken whole where that is possible. A broken one is used up first."""
    galaxy, free = CARDS["galaxy"], set(CARDS["galaxy"])
    for size in (8, 16, 24, 32):
        began = time.thread_time()
        chosen = tt.preferred_allocation(galaxy, list(galaxy), [], size)
        bound("a choice out of 32 cards", time.thread_time() - began, 0.002)
        assert list(Counter(card_id[0] for card_id in chosen).values()) == [8] * (size // 8)
    for size, tray in ((1, "0"), (2, "0"), (8, "4"), (5, "0"), (8, "8"), (8, "c")):
        chosen = tt.preferred_allocation(galaxy, sorted(free), [], size)
        free -= set(chosen)
        assert {card_id[0] for card_id in chosen} == {tray}


@given(st.data())
def test_preferred_allocation_of_any_request(data: st.DataObject) -> None:
    """As many as are asked for, with those that it must have, from one NUMA node if one has room,
    healthy ones first, and the same whatever the order of the request; or a refusal."""
    draw, cards = data.draw, dict(data.draw(st.sampled_from(list(CARDS.values()))))
    for name in draw(st.lists(st.sampled_from(sorted(cards)), max_size=4)):
        cards[name] = replace(cards[name], verdict=tt.Verdict(tt.UNHEALTHY))
    available = draw(st.lists(st.sampled_from([*cards, "gone"]), min_size=1, unique=True))
    must = draw(st.lists(st.sampled_from(available), max_size=3, unique=True))
    size = draw(st.integers(-1, len(available) + 1))
    if not max(1, len(must)) <= size <= len(available):
        words = f"cannot choose {size} of {len(available)} cards with {len(must)} required"
        with pytest.raises(tt.Refusal, match=f"INVALID_ARGUMENT.*{words}"):
            tt.preferred_allocation(cards, available, must, size)
        return
    chosen = tt.preferred_allocation(cards, available, must, size)
    assert len(chosen) == len(set(chosen)) == size and set(must) <= set(chosen) <= set(available)
    again = draw(st.permutations(available)), draw(st.permutations(must))
    assert tt.preferred_allocation(cards, *again, size) == chosen
    well = {name for name in available if name in cards and cards[name].verdict == tt.Verdict()}
    assert len(set(chosen) - well) == max(len(set(must) - well), size - len(well))
    room = Counter(cards[name].chips[0].numa_node for name in well)
    if not must and max(room.values(), default=0) >= size:
        assert len({cards[name].chips[0].numa_node for name in chosen}) == 1


# ==== Section 6. The DevicePlugin service: each call is answered from the newest snapshot =========

ID = [chip.id for chip in N150]
OPTIONS = {"pre_start_required": True, "get_preferred_allocation_available": True}
FAST, HTTP = "--poll-seconds=0.1", "--listen=127.0.0.1:0"


# NUMA nodes of a healthy card, and of an unhealthy one; []: not known.
@pytest.mark.parametrize("numa", [([0], [1]), ([1], [0, 1]), ([0], []), ([], [])])
def test_device_list(numa: tuple[list[Any], ...]) -> None:
    """The whole list of a resource, each card with its health, and with its NUMA nodes if all the
    resource's cards have some."""
    cards, wanted = [], list[Event]()
    for health, nodes in zip(("Healthy", "Unhealthy"), numa, strict=True):
        chips = tuple(tt.Chip("0000:01:00.0", numa_node=node) for node in nodes or [None])
        cards.append(tt.Card(health, "n150", R150, chips, tt.Verdict(health)))
        topology = {"topology": {"nodes": [{"ID": f"{node}"} for node in nodes]}}
        wanted.append({"ID": health, "health": health, **(topology if all(numa) else {})})
    others = [replace(cards[1], id="other", resource=name) for name in (R300, None)]
    assert as_dict(tt.device_list(tt.Snapshot((*cards, *others)), R150)) == {"devices": wanted}


@rows("""
    behind DMA domains    auto    DMA-FQ DMA    there
    one chip is not       auto    DMA identity  there, mounted
    one without an IOMMU  auto    - DMA         there, mounted
    a host without        auto    - identity    -
    by the flag           always  DMA DMA       mounted
    ... or not            never   - identity    there
""")
def test_container_response(tmp_path: Path, row: list[str]) -> None:
    """Device nodes, a variable of the resource's own, and 1 GiB pages: if the host has them and a
    chip is not behind a DMA IOMMU domain."""
    _, flag, iommus, facts = row
    (tmp_path / "hugepages-1G" if "there" in facts else tmp_path).mkdir(exist_ok=True)
    types = [text.strip("-") for text in iommus.split()]
    chips = [tt.Chip(f"0000:0{n}:00.0", n, iommu=one) for n, one in enumerate(types)]
    settings = tt.Settings(dev_root=tmp_path, hugepages=flag)
    answer = tt.container_response(settings, "a-b.org/c.d", chips, ["/x", "/y"])
    nodes = [(one.container_path, one.host_path, one.permissions) for one in answer.devices]
    assert nodes == [("/dev/tenstorrent/0", "/x", "rw"), ("/dev/tenstorrent/1", "/y", "rw")]
    assert not answer.annotations and not answer.cdi_devices
    assert answer.envs == {"PCIDEVICE_A_B_ORG_C_D": ",".join(chip.pci for chip in chips)}
    mounts = [(one.container_path, one.host_path, one.read_only) for one in answer.mounts]
    assert mounts == [("/dev/hugepages-1G", "/dev/hugepages-1G", False)] * ("mounted" in facts)


# Cards by their N; | between containers, or between what is available and what must be chosen.
CALLS = [
    ("Allocate", "3 0 1", "0 1 3"),
    ("Allocate", "2 | 1 0", "2 | 0 1"),
    ("Allocate", f"0 | {'x' * 999}", f"NOT_FOUND no card '{'x' * 80}' of {R150} on this node"),
    ("Allocate", "", f"INVALID_ARGUMENT no card IDs of {R150} in the request"),
    ("Allocate", "0 | ", "INVALID_ARGUMENT no card IDs of"),
    ("Allocate", "1 | 1", f"INVALID_ARGUMENT the card ID '{ID[1]}' of {R150} is named twice"),
    ("GetPreferredAllocation", "0 1 2 3 | 1", "1 0"),
    ("GetPreferredAllocation", "0 | ", "INVALID_ARGUMENT cannot choose 2 of 1"),
]


@both_generations
def test_calls(kubelet: Kubelet, four: Tree, launch: Launch) -> None:
    """Each call has its answer, or is refused as a whole by a status with a sentence; no refusal
    hurts what follows. Containers are counted, and refusals by status."""
    plugin, counts = launch(four, kubelet, HTTP, offers=4), Counter[str]()
    for method, words, wanted in random.Random(6).sample(CALLS * 2, 2 * len(CALLS)):
        parts = [part.split() for part in words.split("|")]
        ids = [[ID[int(word)] if word in "0123" else word for word in part] for part in parts]
        request: Event = {"container_requests": [{"devices_ids": each} for each in ids]}
        if method == "GetPreferredAllocation":
            names = ("available_deviceIDs", "must_include_deviceIDs", "allocation_size")
            request = {"container_requests": [dict(zip(names, (*ids, 2), strict=True))]}
        if wanted[:1].isupper():
            code, sentence = wanted.split(" ", 1)
            with refused(code, sentence):
                kubelet.rpc(R150, method, request)
            counts[f"refusals_total call={method} code={code} resource={R150}"] += 1
            continue
        answers = kubelet.rpc(R150, method, request)["container_responses"]
        if method == "Allocate":
            counts[f"allocations_total resource={R150}"] += len(answers)
            shown = [[one["host_path"][-1] for one in each["devices"]] for each in answers]
        else:
            shown = [[str(ID.index(name)) for name in each["deviceIDs"]] for each in answers]
        assert " | ".join(map(" ".join, shown)) == wanted
    lines = (f"{name} {count}" for name, count in counts.items())
    assert {*lines} <= {*told(fetch(plugin, "/metrics")[1])}
    assert kubelet.rpc(R150, "GetDevicePluginOptions", {}) == OPTIONS


def relink(link: Path, target: str) -> None:
    """A symbolic link leads elsewhere now."""
    link.unlink()
    link.symlink_to(target)


# What became of a link, and where it leads; the chip's host path then, or the words of a refusal.
@rows(f"""
    udev's link          by-id/{ID[0]}  ../0       /dev/tenstorrent/by-id/{ID[0]}
    ... of another card  by-id/{ID[0]}  ../1       /dev/tenstorrent/0
    another device       0  /dev/zero  /dev/tenstorrent/0 is missing or another device
    the chip is gone     -  -          /dev/tenstorrent/0 is no longer chip {BDF}
    another has its N    -  other      /dev/tenstorrent/0 is no longer chip {BDF}
""")
def test_device_nodes(kubelet: Kubelet, tree: Tree, launch: Launch, row: list[str]) -> None:
    """Whatever happened since the last poll, a Pod gets the card that it was promised, or a refusal
    (always 5). A link of udev's is preferred if it leads to the chip."""
    link, target, words = row[1:]
    chip, other = replace(N150[0], by_id=True), replace(N150[1], target=NODES[1])
    tree.add(chip)
    tree.add(other)
    launch(tree, kubelet, "--poll-seconds=60", offers=2)
    if link == "-":
        tree.remove(BDF)
    else:
        relink(tree.dev / "tenstorrent" / link, target)
    if target == "other":  # the number of a device node goes with N: only sysfs tells
        tree.add(replace(tree.remove(other.pci), index=0, target=chip.target))
    if " " not in words:
        kubelet.pre_start(R150, [chip.id])  # of an earlier instance's Allocate
        (device,) = kubelet.allocate(R150, [chip.id])["devices"]
        assert (device["container_path"], device["host_path"]) == ("/dev/tenstorrent/0", words)
        return
    for call in (kubelet.allocate, kubelet.pre_start):
        with refused("FAILED_PRECONDITION", f"card {chip.id} (n150, ", words):
            call(R150, [chip.id])


@both_generations
def test_pods_keep_their_cards(kubelet: Kubelet, tree: Tree, launch: Launch) -> None:
    """A container starts with its Pod's first answer, whatever restarts meanwhile. If cards swap
    their N, it gets its card by udev's link; by N it would get the other's, and does not start."""
    first, second = replace(N150[0], by_id=True), replace(N150[1], target=NODES[1])
    tree.add(first)
    tree.add(second)
    plugin = launch(tree, kubelet, FAST, offers=2)
    for pod, chip in (("linked", first), ("bare", second)):
        kubelet.admit(pod, {R150: 1}, {R150: [chip.id]})
        assert kubelet.start_container(pod)["devices"][0]["resolved"] == chip.target
    mark = kubelet.log.mark()
    tree.remove(first.pci)
    tree.remove(second.pci)
    kubelet.wait_status(R150, 2, 0, after=mark)
    kubelet.kill()
    tree.add(replace(first, index=1, target=NODES[1]))
    tree.add(replace(second, index=0, target=NODES[0]))
    kubelet.start()
    kubelet.wait_status(R150, 2, 2, after=mark)
    started = kubelet.start_container("linked")
    assert started["devices"][0]["resolved"] == second.target
    with refused("FAILED_PRECONDITION", "it was /dev/tenstorrent/1 when this Pod was admitted"):
        kubelet.pre_start(R150, [first.id, second.id])  # all cards are looked at
    with refused("FAILED_PRECONDITION", f"card {second.id} "):
        kubelet.start_container("bare")
    relink(tree.by_id / first.id, "../0")  # udev is late
    with refused("FAILED_PRECONDITION", f"it was /dev/tenstorrent/by-id/{first.id} when this Pod"):
        kubelet.start_container("linked")
    relink(tree.by_id / first.id, "../1")
    plugin.end(signal.SIGKILL)
    launch(tree, kubelet, offers=2)
    assert kubelet.start_container("linked") == started


def dial(kubelet: Kubelet) -> grpc.Channel:
    """A connection to the plugin's one socket, beside the kubelet's."""
    (name,) = sockets(kubelet)
    return grpc.insecure_channel(f"unix:{kubelet.folder / name}", [LOCAL])


def test_hostile_calls(kubelet: Kubelet, four: Tree, plugin: Plugin, bound: Bound) -> None:
    """Whatever is sent, there is a status with a sentence, and honest callers hardly notice. Each
    stream is told each change, and nothing else, whatever becomes of others (story 12)."""

    def send(channel: Any, data: bytes, method: str = "Allocate") -> Any:
        return channel.unary_unary(f"/v1beta1.DevicePlugin/{method}").future(data, timeout=30)

    noise, many = random.Random(4711), [f"wormhole-{n:016X}" for n in range(100_000)]
    most = b"\x0a\xc0\xdf\x0f" + b"\x0a\x00" * 128_992  # as many IDs as a request can hold
    lists = [api.ContainerAllocateRequest(devices_ids=ids) for ids in (ID, many, many[:9000])]
    requests = [api.AllocateRequest(container_requests=[one]) for one in lists]
    honest, *hostile = (request.SerializeToString() for request in requests)
    hostile += [most, b"\n\2\n\0" * 1000]
    hostile += [noise.randbytes(noise.randrange(300)) for _ in range(40)]
    with dial(kubelet) as enemy, dial(kubelet) as friend:
        methods = ("Allocate", "GetPreferredAllocation", "PreStartContainer", "Nothing")
        for data, method in itertools.product(hostile, methods):
            call = send(enemy, data, method)
            assert call.code().name not in ("DEADLINE_EXCEEDED", "UNAVAILABLE"), data[:20]
            assert call.code().name == "OK" or call.details(), data[:20]
        watch, times = rpc.DevicePluginStub(enemy).ListAndWatch, []
        streams = [watch(api.Empty(), timeout=60) for _ in range(200)]
        assert {len(next(stream).devices) for stream in streams} == {4}
        calls = [send(enemy, b"") for _ in range(1000)]
        for _ in range(40):
            began = time.monotonic()
            assert send(friend, honest).code().name == "OK"
            times.append(time.monotonic() - began)
        assert {call.code().name for call in calls} == {"INVALID_ARGUMENT"}
        bound("Allocate beside 200 streams and 1000 calls, median", sorted(times)[20], 0.05)
        for stream in streams[::2]:
            stream.cancel()
        mark = kubelet.log.mark()
        four.remove(N150[0].pci)
        for stream in streams[1::2]:
            health = {device.ID: device.health for device in next(stream).devices}
            assert health == {**dict.fromkeys(ID, "Healthy"), ID[0]: "Unhealthy"}
        kubelet.wait_status(R150, 4, 3, after=mark)
    kubelet.log.never(lambda event: True, 1.3, kubelet.log.mark())  # for more than a poll
    assert kubelet.kinds(R150, mark) == ["devices", "status"]
    assert not kubelet.seen("stream_end") and not plugin.lines("exception|defect")


# ==== Sections 7 and 8. Registration and serve(): whatever ends one, the next follows =============

STANDING_BY = "standing by until it ends"
AGAIN_S = 0.1  # from a kubelet that answers, a dropped stream, or another instance's end

# What ends a registration; the event since when 0.1 s count; what the kubelet sees before the
# Register that holds.
LOST = "stream_end disconnected status"
ENDINGS = [
    ("older", "stream_end", f"{LOST} stream_end"),  # another plugin's, and ours (contract 5)
    ("kill start", "listening", ""),
    ("kill delete_folder start", "listening", ""),
    ("kill start_late", "listening", ""),
    ("drop_stream", "dropped", f"dropped {LOST}"),
    ("heir SIGTERM", "stream_end", LOST),
    ("heir SIGKILL", "stream_end", LOST),
    ("register_hangs: drop_stream register kill start", "listening", f"dropped {LOST} register"),
    ("no_stream: drop_stream no_stream kill start", "listening", f"dropped {LOST} no_stream"),
]


@both_generations
def test_registers_again(
    kubelet: Kubelet, four: Tree, launch: Launch, puppets: Puppets, bound: Bound
) -> None:
    """Whatever ends a registration, and in any order: registered again within 0.1 s of a kubelet
    that answers, by one Register; the old socket is gone, and news arrive by the new stream."""
    kubelet.start()
    older = puppets(R150)
    older.register()
    kubelet.wait("stream")
    holder = heir = launch(four, kubelet, FAST, offers=4)
    order = random.Random(7).sample(ENDINGS[1:] * 2, 16) * (10 if LONG else 1)
    for how, since, before in ENDINGS[:1] + order:
        mark = kubelet.log.mark()
        holder.wait_for_line(f"socket {kubelet.seen('register')[-1]['endpoint']}")
        for step in how.split():
            if step[-1] == ":":
                kubelet.faults(**{step[:-1]: 1})
            elif step in ("register", "no_stream"):
                kubelet.wait(step, after=mark)
            elif step == "older":
                older.close()
            elif step == "heir":
                heir = launch(four, kubelet, FAST)
                heir.wait_for_line(STANDING_BY)
            elif step.startswith("SIG"):
                holder.end(signal.Signals[step])
                assert len(heir.lines("standing by")) == 1, "it says so once"
                holder = heir
            elif step == "start_late":
                kubelet.start(wait="bound", listen_delay=0.3)
            else:
                getattr(kubelet, step)(*[R150] if step == "drop_stream" else [])
        began = kubelet.wait(since, after=mark)["t"]
        offered = kubelet.wait_status(R150, 4, 4, after=mark)
        bound(f"{how}: registered again", offered - began, AGAIN_S)
        kinds = [kind for kind in kubelet.kinds(R150, mark) if kind != "options"]
        before = before.replace("no_stream", "register no_stream")
        assert kinds == f"{before} register stream devices status".split(), how
        assert sockets(kubelet) == [kubelet.seen("register")[-1]["endpoint"]], how
    kubelet.log.never(lambda event: True, 0.5, mark := kubelet.log.mark())
    four.remove(N150[0].pci)  # no dead stream takes this from the live one
    kubelet.wait_status(R150, 4, 3, after=mark)


@both_generations
@pytest.mark.parametrize("waits", ["", "is not there yet: waiting", "no kubelet listens at"])
def test_registers(kubelet: Kubelet, four: Tree, launch: Launch, bound: Bound, waits: str) -> None:
    """All cards are offered half a second after the start, or at once when a kubelet comes (story
    3), in the first list (8). The options are in both places. One Register, if it dials late."""
    if waits.startswith("no kubelet"):
        kubelet.folder.mkdir(parents=True)
    if waits:
        plugin = launch(four, kubelet)
        plugin.log.wait_for(lambda _: plugin.log.mark() == 6, 5, 0, "what it finds")
        plugin.log.never(lambda line: True, 0.3, 6)
        assert len(plugin.lines(waits)) == 1
    answering = kubelet.start(dial_delay=0.5)
    began = answering if waits else launch(four, kubelet).started
    request = kubelet.wait("register")
    bound(f"{waits or 'start'}: first Register", request["t"] - began, AGAIN_S if waits else 0.5)
    kubelet.wait_status(R150, 4, 4)
    assert (request["version"], request["resource_name"]) == ("v1beta1", R150)
    for one in (request["options"], *kubelet.seen("options")):
        assert {name: one[name] for name in OPTIONS} == OPTIONS
    assert [sorted(event["devices"]) for event in kubelet.seen("devices")] == [ID]
    assert kubelet.hints(R150, 2) == [[0], [1], [0, 1]]
    assert sockets(kubelet) == [request["endpoint"]] and len(kubelet.seen("register")) == 1
    mode = (kubelet.folder / request["endpoint"]).stat().st_mode
    assert stat.S_IMODE(mode) == 0o700, "for root alone"


# What goes wrong, and the pauses between one try and the next.
PAUSES = {
    "register_fails": [0.004, 0.008, 0.016, 0.032, 0.064],
    "drop_streams": [0.004, 0.008, 0.016, *[0.032] * 5],
    "no_stream": [5.0],
}


@pytest.mark.parametrize("fault", [*PAUSES, pytest.param("register_hangs", marks=long_only)])
def test_goes_round(kubelet: Kubelet, four: Tree, launch: Launch, bound: Bound, fault: str) -> None:
    """A Register that fails or hangs, that no stream follows, or whose stream ends at once: tried
    again, ever more slowly, and said once. Another kubelet is met at once, and tried again soon."""
    pauses = PAUSES.get(fault, [12.0])
    kubelet.start()
    kubelet.faults(**{fault: len(pauses)})
    plugin = launch(four, kubelet)
    kubelet.log.wait_for(lambda _: len(kubelet.seen("register")) > len(pauses), 20, 0, "so many")
    kubelet.wait("devices", endpoint=kubelet.seen("register")[-1]["endpoint"])
    times = [event["t"] for event in kubelet.seen("register")]
    gaps = [after - before for before, after in itertools.pairwise(times)]
    beyond = [gap - pause for gap, pause in zip(gaps, pauses, strict=True)]
    assert min(beyond) >= 0, beyond
    bound(f"{fault}: more than the pause", max(beyond), AGAIN_S)
    assert len(plugin.lines("trying again")) == (fault != "drop_streams")
    kubelet.faults(register_fails=99)
    kubelet.drop_stream(R150)
    plugin.wait_for_line(f"{R150}: the kubelet has not registered it: UNIMPLEMENTED: the fake kub")
    many = len(times) + 2
    kubelet.log.wait_for(lambda _: len(kubelet.seen("register")) > many, 5, 0, "more tries")
    mark = kubelet.log.mark()
    kubelet.kill()
    answering = kubelet.start(faults={"register_fails": 1})
    seconds = kubelet.wait_status(R150, 4, 4, after=mark) - answering
    bound("a better kubelet answers: registered", seconds, AGAIN_S)


def test_the_lock_goes_last(kubelet: Kubelet, four: Tree) -> None:
    """serve() ends when all that it began has ended: the next instance finds no socket, and no
    registration of this one follows. A stream that ends at the same time is no exception."""
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
            assert not sockets(kubelet)
            assert not [task for task in asyncio.all_tasks() if "Registrar" in repr(task)]

    with contextlib.ExitStack() as stack:
        stack.callback(os.umask, os.umask(0o077))  # this process's is as before
        asyncio.run(main())


# + starts the next instance, a digit ends that one, / is a new kubelet in a new folder.
@pytest.mark.parametrize("word", ["+0+1", "++01", "++10", "++/10", "+++012", "++0+21"])
def test_instances(kubelet: Kubelet, four: Tree, launch: Launch, word: str) -> None:
    """Instances that start and end in any order, all but the second by SIGKILL (story 4): one of
    them serves while there is one, and only the end of that one reaches the kubelet."""
    kubelet.start()
    started, there, holder = list[Plugin](), set[int](), 0
    for step in word:
        mark = kubelet.log.mark()
        if step == "+":
            started.append(launch(four, kubelet))
            there.add(started[-1].process.pid)
        elif step == "/":
            kubelet.kill()
            kubelet.delete_folder()
            kubelet.start()
            holder = 0
        else:
            there.remove(started[int(step)].process.pid)
            started[int(step)].end(signal.SIGTERM if step == "1" else signal.SIGKILL)
        if step == "+" and holder:
            started[-1].wait_for_line(STANDING_BY)
        if holder in there:
            kubelet.log.never(lambda event: True, 0.1, mark)
        elif there:
            kubelet.wait_status(R150, 4, 4, after=mark)
            registered = kubelet.seen("register", after=mark)
            assert sockets(kubelet) == [event["endpoint"] for event in registered]
        lock = rf"FLOCK .* (\d+) \S+:{kubelet.folder.stat().st_ino} 0"
        holders = {*map(int, re.findall(lock, Path("/proc/locks").read_text()))} & there
        assert len(holders) == bool(there) and (holder in holders or holder not in there)
        holder = max(holders, default=0)


def test_stale_sockets(kubelet: Kubelet, four: Tree, plugin: Plugin, launch: Launch) -> None:
    """Story 20: what a killed instance has left goes away; sockets of others, those at which
    somebody listens, and what is no socket, do not. Only who listens accepts connections."""
    mine, no_socket = (kubelet.folder / f"tenstorrent-n150-{one * 6}.sock" for one in "ab")
    plugin.end(signal.SIGKILL)
    kubelet.wait_status(R150, 4, 0)
    (stale,) = sockets(kubelet)
    no_socket.touch()
    with contextlib.ExitStack() as stack:
        for name in ("nvidia-gpu.sock", "tenstorrent-n150-zzzzzz.sock", mine.name):
            one = stack.enter_context(socket.socket(socket.AF_UNIX))
            one.bind(str(kubelet.folder / name))
        assert not tt.accepts_connections(mine), "it is only bound"
        one.listen(0)
        launch(four, kubelet, offers=4)
        while tt.accepts_connections(mine):  # until its queue is full
            stack.enter_context(socket.socket(socket.AF_UNIX)).connect(str(mine))
        assert len(sockets(kubelet)) == 4 and stale not in sockets(kubelet) and no_socket.exists()
    for path in (mine, mine / "x", kubelet.folder / "x", kubelet.folder):
        assert not tt.accepts_connections(path)


def private_memory(plugin: Plugin) -> int:
    """What the process alone uses, in KiB."""
    text = Path(f"/proc/{plugin.process.pid}/smaps_rollup").read_text()
    return sum(map(int, re.findall(r"^Private_\w+: +(\d+)", text, re.M)))


def test_dropped_streams_leave_nothing(kubelet: Kubelet, plugin: Plugin) -> None:
    """Stories 12, 13, 22: many dropped streams cost no memory, thread, descriptor or socket."""
    proc, seen, rounds = Path(f"/proc/{plugin.process.pid}"), [], 1000 if LONG else 200
    for number in range(rounds + 1):
        if number in (rounds // 4, rounds):
            counts = [len(list((proc / one).iterdir())) for one in ("task", "fd")]
            seen.append((private_memory(plugin), *counts, len(sockets(kubelet))))
        mark = kubelet.log.mark()
        kubelet.drop_stream(R150)
        kubelet.wait_status(R150, 4, 0, after=mark)
        kubelet.wait_status(R150, 4, 4, after=mark)
    assert seen[0][1:] == seen[1][1:] and seen[1][0] - seen[0][0] <= 1024, seen


def test_models(kubelet: Kubelet, tree: Tree, launch: Launch) -> None:
    """A node without cards waits quietly (story 10). A card that comes is offered (story 9). Each
    model has a resource and a socket until its last card changes. Other streams are left alone."""
    other = replace(N150[1], card_type="n300")
    kubelet.start()
    plugin = launch(tree, kubelet, FAST)
    plugin.wait_for_line("waiting for some")
    kubelet.log.never(fits("register"), 0.5, 0)
    assert len(plugin.lines()) == 2, plugin.lines()
    for chip, resource in ((N150[0], R150), (other, R300)):
        tree.add(chip)
        kubelet.wait_status(resource, 1, 1)
    mark = kubelet.log.mark()
    tree.remove(other.pci)
    kubelet.wait_status(R300, 1, 0, after=mark)
    tree.add(N150[1])
    kubelet.wait_status(R150, 2, 2, after=mark)
    kubelet.wait("stream_end", resource=R300, after=mark)
    assert not kubelet.seen("register", after=mark)
    until(lambda: [name.split("-")[1] for name in sockets(kubelet)] == ["n150"])


def test_health(kubelet: Kubelet, room: Path, plugin: Plugin, launch: Launch, bound: Bound) -> None:
    """A card in trouble is Unhealthy, and is not handed out, until it is back, with another N, too
    (stories 5, 6, 16 to 18). A plugin that was stopped judges nobody by its own absence."""
    mark, other = kubelet.log.mark(), Kubelet(room / "other")
    plugin.send(signal.SIGSTOP)
    with contextlib.closing(other), Tree(room / "tree", N150).beating() as tree:
        launch(tree, other, offers=4)
        began = time.monotonic()
        tree.remove(N150[0].pci)
        relink(tree.node(N150[1].pci), "/dev/zero")
        tree.still.add(N150[2].pci)
        reasons = {"gone from sysfs": 1.5, "device node": 1.5, "its heartbeat has stopped": 15}
        for name, left, (reason, limit) in zip(ID, (2, 2, 1), reasons.items(), strict=False):
            seen = other.wait_status(R150, 4, left, timeout=20) - began
            bound(f"{reason}: Unhealthy", seen, limit)
            for call in (other.allocate, other.pre_start):
                with refused("FAILED_PRECONDITION", name, "not healthy since 20", reason):
                    call(R150, [name])
        plugin.send(signal.SIGCONT)
        assert seen > 10, "the firmware's own watchdog takes so long"
        later, began = other.log.mark(), time.monotonic()
        tree.add(replace(N150[0], index=9))
        relink(tree.node(N150[1].pci), N150[1].target)
        tree.still.discard(N150[2].pci)
        bound("card back: Healthy", other.wait_status(R150, 4, 4, after=later) - began, 3)
        (device,) = other.allocate(R150, ID[:1])["devices"]
        assert device["container_path"] == "/dev/tenstorrent/9"
        assert all(event["devices"][ID[3]] == "Healthy" for event in other.seen("devices"))
    kubelet.log.never(lambda event: True, 1.0, mark)
    assert not plugin.lines("unhealthy") and kubelet.admit("pod", {R150: 1})["ids"]


def test_hanging_reads(kubelet: Kubelet, four: Tree, plugin: Plugin, bound: Bound) -> None:
    """Two chips' reads hang, a third is removed: known within 4 s. No call for a Pod waits."""
    for chip in N150[:2]:
        four.hang(chip.pci, "tt_heartbeat")
    mark, gone = kubelet.log.mark(), time.monotonic()
    four.remove(N150[2].pci)
    with open(four.entry(N150[0].pci) / "tt_heartbeat", "w"):  # returns when a poll has opened it
        began = time.monotonic()
        kubelet.admit("pod", {R150: 1}, {R150: [ID[3]]})
        kubelet.start_container("pod")
        bound("a Pod's calls while reads hang", time.monotonic() - began, 0.05)
        seen = kubelet.wait_status(R150, 4, 1, after=mark)
        bound("card gone while two others hang: all Unhealthy", seen - gone, 4)
        with refused("FAILED_PRECONDITION", "a read of its sysfs files does not return"):
            kubelet.allocate(R150, ID[:1])
        four.release(N150[1].pci, "tt_heartbeat", "77\n")
        kubelet.wait_status(R150, 4, 2, after=mark)


CDI = "tenstorrent.com-card.json"
KEPT = {CDI, "tt-device-plugin"}  # files for other tools


def until(true: Callable[[], object]) -> None:
    """Wait for what no process reports."""
    deadline = time.monotonic() + 10
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.002)


# State: the kubelet's faults, if it is started, and what says that the state is reached.
STOPPED_IN: dict[str, tuple[Event | None, str]] = {
    "first poll": (None, ""),  # which does not end
    "no folder": (None, "is not there yet"),
    "no kubelet": (None, "no kubelet listens"),
    "folder deleted on the host": (None, "no kubelet listens"),
    "Register hangs": ({"register_hangs": 9}, "register"),
    "Register fails": ({"register_fails": 99}, "trying again"),
    "no stream": ({"no_stream": 9}, "no_stream"),
    "registered": ({}, "registered"),
    "Ctrl-C, again and again": ({}, "registered"),
    "folder gone": ({}, "registered"),
    "standing by": ({}, STANDING_BY),
}


@pytest.mark.parametrize("state", STOPPED_IN)
def test_stops(
    kubelet: Kubelet, four: Tree, launch: Launch, bound: Bound, tmp_path: Path, state: str
) -> None:
    """In each state: exit code 0 within a second (1 if a mount goes on to show a folder that was
    deleted); no socket and no file of this process is left, and nothing of another's is taken."""
    (faults, says), first, host = STOPPED_IN[state], None, kubelet.root / "host"
    flags = [FAST, f"--cdi-dir={tmp_path}", f"--labels-dir={tmp_path}"]
    host.mkdir(parents=True)
    fd = os.open(host, os.O_RDONLY)
    if state == "first poll":
        four.hang(N150[0].pci, "tt_card_type")
    if state == "no kubelet":
        kubelet.folder.mkdir()
    if state == "folder deleted on the host":
        kubelet.folder.symlink_to(f"/proc/{os.getpid()}/fd/{fd}")  # by no name, like a mount
    if faults is not None:
        kubelet.start(faults=faults)
    if state == "standing by":
        first = launch(four, kubelet, *flags, "--poll-seconds=60", offers=4)
    mine = sockets(kubelet)
    plugin = launch(four, kubelet, *flags)
    if says in ("register", "no_stream"):
        kubelet.wait(says)
    else:
        plugin.wait_for_line(says)
    if state not in ("first poll", "no folder"):
        until(lambda: {*os.listdir(tmp_path)} == KEPT)
    if state == "folder gone":
        kubelet.delete_folder()
    if state == "folder deleted on the host":
        host.rmdir()
        plugin.reader.join(5)
        assert plugin.process.returncode == 1 and "was deleted on the host" in plugin.lines()[-1]
    else:
        number = signal.SIGINT if "Ctrl-C" in state else signal.SIGTERM
        sent = plugin.send(number)
        while "again" in state and plugin.process.poll() is None:
            plugin.send(number)
        assert plugin.end(number)[0] == 0, plugin.lines()
        bound("SIGTERM to the end", plugin.ended - sent, 1.0)
    os.close(fd)
    assert sockets(kubelet) == mine and {*os.listdir(tmp_path)} == (KEPT if first else set())
    assert not first or first.process.poll() is None


def test_stops_at_any_moment(kubelet: Kubelet, launch: Launch, room: Path) -> None:
    """SIGTERM at a random moment of the first 0.5 s, with a kubelet, without, and on busy cores:
    exit code 0, no traceback, nothing left. So do dry runs, and if left to their end."""
    kept = room / "kept"  # with a short name: the dry runs make sockets in it
    kept.mkdir()
    flags = ["--fake=n150=2,p300=1", FAST, f"--cdi-dir={kept}", f"--labels-dir={kept}"]
    options = {"env": environment(TMPDIR=str(kept)), "stdout": subprocess.DEVNULL}

    def stop(number: int) -> None:
        dry, moment = number % 3 == 0, random.Random(number).uniform(0, 0.5)
        plugin = launch(None, kubelet, *flags, *["--dry-run"] * dry, **options)
        status = Path(f"/proc/{plugin.process.pid}/status")
        masks = re.compile(r"Sig(?:Blk|Cgt):\s(\w+)")  # its own code runs: it blocks SIGTERM
        until(lambda: any(int(one, 16) >> 14 & 1 for one in masks.findall(status.read_text())))
        time.sleep(moment)
        if number % 6:
            plugin.send(signal.SIGTERM)
        plugin.reader.join(30)
        about = (number, moment, plugin.lines())
        assert plugin.process.returncode == 0 and not (dry and plugin.lines()), about

    half, busy = 750 if LONG else 15, [sys.executable, "-c", "while True: 1"]
    kubelet.start()
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(stop, range(half)))
        kubelet.kill()
        with contextlib.closing(Plugin(busy)), contextlib.closing(Plugin(busy)):
            list(pool.map(stop, range(half, 2 * half)))
    assert not sockets(kubelet) and not os.listdir(kept)


def test_log_that_nobody_reads(kubelet: Kubelet, plugin: Plugin, bound: Bound) -> None:
    """Lines are dropped, and nothing waits for them: not a call, not the end, which calls under way
    do not hold up, either. Once somebody reads, the log says how many lines were dropped."""
    reading, nothing = plugin.log.changed, api.AllocateRequest()
    with dial(kubelet) as channel:
        allocate = rpc.DevicePluginStub(channel).Allocate

        def flood(count: int) -> None:
            for _ in range(count // 500):
                calls = [allocate.future(nothing) for _ in range(500)]
                assert {call.code().name for call in calls} == {"INVALID_ARGUMENT"}
            began = time.monotonic()
            assert kubelet.allocate(R150, ID)["devices"]
            bound("Allocate while nobody reads the log", time.monotonic() - began, 0.05)

        with reading:  # who reads its stderr waits for this lock
            flood(3000)
        plugin.log.wait_for(lambda _: plugin.log.mark() > 1000, 5, 0, "a thousand lines")
        for call in (kubelet.allocate, kubelet.pre_start):
            with refused("INVALID_ARGUMENT"):
                call(R150, [])
        plugin.wait_for_line("PreStartContainer of .* refused")
        dropped = re.findall(r"(\d+) lines were dropped: nobody read", "\n".join(plugin.lines()))
        assert sum(map(int, dropped)) + len(plugin.lines("Allocate of|allocated")) == 3002
        with reading:
            flood(100_000 if LONG else 20_000)
            calls = [allocate.future(nothing) for _ in range(1000)]
            assert calls[0].code() and not calls[-1].done()
            sent = plugin.send(signal.SIGTERM)
            assert plugin.process.wait(10) == 0 and not sockets(kubelet)
            bound("SIGTERM to the end, nobody reads the log", time.monotonic() - sent, 2)
        codes = {call.code().name for call in calls}
        assert codes <= {"INVALID_ARGUMENT", "UNAVAILABLE", "CANCELLED"}


# ==== Appendix B. Operations: the log; /healthz, /readyz and /metrics =============================

OWN = "tt_device_plugin_"
# A card without telemetry goes, another is in trouble, is lost in a reset and comes back with
# another N, a Pod gets it, the kubelet is restarted.
LOST_CARD = "card wormhole-0D0CB6F1E7A50002 (n150, /dev/tenstorrent/"
REGISTERED = f"INFO registered {R150} with the kubelet: 2 cards, 2 healthy; socket S.sock; cause: "
INCIDENT = f"""
INFO tt-device-plugin VERSION, Python VERSION, grpcio VERSION, driver 2.10.0; kubelet folder \
DIR/k/device-plugins, sysfs DIR/sys, dev DIR/dev; cards: 2 n150, 1 of unknown model
INFO card wormhole-0D0CB6F1E7A50001 (n150, /dev/tenstorrent/0) is Healthy
INFO {LOST_CARD}1) is Healthy
WARNING card 0000:41:00.0 (model unknown, /dev/tenstorrent/2) is not offered: \
{tt.REASONS["pending"]}
{REGISTERED}start
WARNING card 0000:41:00.0 (model unknown, /dev/tenstorrent/2) is gone; it was not offered
ERROR {LOST_CARD}1) is Unhealthy: its device node /dev/tenstorrent/1 is missing or another \
device: is --dev-root the host's /dev?
ERROR {LOST_CARD}1) is Unhealthy: {tt.REASONS["gone"]}
INFO {LOST_CARD}5) is Healthy again, after N s
INFO allocated card wormhole-0D0CB6F1E7A50001 (n150, /dev/tenstorrent/0), {LOST_CARD}5)
WARNING the kubelet's stream of {R150} has ended: registering again
WARNING no kubelet listens at DIR/k/device-plugins/kubelet.sock: waiting for it to start
INFO a kubelet answers at DIR/k/device-plugins/kubelet.sock
{REGISTERED}stream-ended
INFO told to stop, and done"""


def fetch(server: Plugin | str, path: str, host: str = "127.0.0.1") -> tuple[int, str]:
    """Status and text of a page of a plugin, or of the server that has said which port it has."""
    if isinstance(server, Plugin):
        server = server.wait_for_line('(INFO |")HTTP on port')
    port = int(re.findall(r"port (\d+)", server)[0])
    with contextlib.closing(http.client.HTTPConnection(host, port, timeout=10)) as client:
        client.request("GET", path)
        answer = client.getresponse()
        return answer.status, answer.read().decode()


def told(page: str, of: str = "") -> list[str]:
    """A metrics page as Prometheus reads it, a line a sample: name, labels, value."""
    lines = []
    for family in text_string_to_metric_families(page):
        assert family.type in ("counter", "gauge") and family.documentation, family.name
        for name, labels, value, *_ in family.samples:
            pairs = "".join(f" {key}={text}" for key, text in sorted(labels.items()))
            lines.append(f"{name.removeprefix(OWN)}{pairs} {value:g}")
    return [line for line in lines if of in line]


@pytest.mark.parametrize("style", ["text", "json"])
def test_incident(kubelet: Kubelet, tree: Tree, launch: Launch, style: str) -> None:
    """Which card, what, since when, what to do: these lines, no others. The metrics count it."""
    for chip in (replace(N150[2], card_type=""), *N150[:2]):
        tree.add(chip)
    kubelet.start()
    plugin = launch(tree, kubelet, f"--log-format={style}", HTTP)
    plugin.wait_for_line("registered")
    tree.remove(N150[2].pci)
    plugin.wait_for_line("it was not offered")
    relink(tree.node(chip.pci), "/dev/zero")
    plugin.wait_for_line("another device")
    tree.remove(chip.pci)
    plugin.wait_for_line("is gone from sysfs")
    tree.add(replace(chip, index=5))
    plugin.wait_for_line("healthy again")
    kubelet.allocate(R150, ID[:2])
    plugin.wait_for_line("allocated")
    kubelet.kill()
    plugin.wait_for_line("no kubelet listens")
    assert f"registered resource={R150} 0" in told(fetch(plugin, "/metrics")[1])
    kubelet.start()
    # A kubelet that is being killed may still take the connection of one more try.
    again = plugin.wait_for_line("cause: (stream-ended|register-failed)")
    cause = re.findall(r"cause: ([a-z-]+)", again)[0]
    page = " ".join(told(fetch(plugin, "/metrics")[1], "regist")).replace(f" resource={R150}", "")
    assert page == "registered 1 {0}start 1 {0}{1} 1".format("registrations_total cause=", cause)
    plugin.end()
    lines = plugin.lines("^(?!.*(HTTP on|has not registered it))")  # the first: at any time
    if style == "json":
        objects = [json.loads(line) for line in lines]
        lines = [f"{one['ts']} {one['level'].upper()} {one['msg']}" for one in objects]
        lost, _, back, allocated = objects[6:10]
        assert allocated.keys() == {*objects[0], "resource"} == {"ts", "level", "msg", "resource"}
        assert back.keys() == {*allocated, "card", "since"} and lost.keys() == {*back, "reason"}
        facts = chip.id, R150, lost["ts"], lost["msg"].partition(" is Unhealthy: ")[2]
        assert (lost["card"], lost["resource"], lost["since"], lost["reason"]) == facts
    story = "\n".join(["", *lines]).replace(str(tree.root), "DIR")
    story = story.replace(f"cause: {cause}", "cause: stream-ended")
    story = re.sub(r"(plugin|Python|grpcio) \d+\.\d+\.\d+[^,;]*", r"\1 VERSION", story)
    story = re.sub(r"tenstorrent-n150-[0-9a-f]{6}\.sock", "S.sock", story)
    story = re.sub(r"\n20\d\d-\d\d-\d\dT\d\d:\d\d:\d\dZ ", "\n", story)
    assert re.sub(r"after \d+", "after N", story) == INCIDENT


# Every metric, with its labels, on a node whose first card has all sensors (its chip was reset, and
# the dead hwmon is there still), whose second is gone, whose third has no telemetry yet.
ODD = '2.10.0-"q\\uote"\n'
PAGE = """
info driver=ODD grpcio=G python=P version=V 1
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
chip_info arch=wormhole card=A chip=01 device_node=DEV/0 firmware=F model=n150 serial=S 1
chip_info arch=wormhole card=B chip=02 device_node= firmware=F model=n150 serial=T 1
chip_info arch=wormhole card=41 chip=41 device_node=DEV/2 firmware= model= serial= 1
junk_readings_total card=41 chip=41 0
"""
# ... and of its first card.
READINGS_OF_A = """
heartbeat_age_seconds=9 tt_asic_temperature_celsius=54.3 tt_thermal_throttle_limit_celsius=75
tt_ai_clock_mhz=500 tt_tdp_w=15 tt_tdc_a=18 tt_vcore_v=0.795 tt_fan_speed_rpm=1200
tt_thermal_trips_total=2 device_node_users=2 junk_readings_total=0
"""


def metrics_of(root: Path) -> tt.Metrics:
    """What a scrape reads of a plugin that has polled this tree once."""
    inventory = tt.Inventory(tt.Settings(sysfs_root=root / "sys", dev_root=root / "dev"))
    inventory.poll(100.0)
    return tt.Metrics(tt.Registrar(tt.Shared(inventory, tt.preferred_allocation, lambda cards: [])))


def test_every_metric(room: Path) -> None:
    """A card that is gone keeps its verdict, and has no readings: they would be taken for new."""
    blind: Any = dict.fromkeys(["card_type", "asic_id", "serial", "firmware"], "")
    tree = Tree(room, [*N150[:2], replace(N150[2], heartbeat=False, **blind)])
    monitors = tree.pci(BDF) / "hwmon"
    shutil.copytree(monitors / "hwmon2", monitors / "hwmon10")
    (monitors / "hwmon2/temp1_input").write_text("99000\n")
    (monitors / "hwmon10/fan1_input").write_text("1200\n")
    tree.set(BDF, "tt_therm_trip_count", "2\n")
    tree.write(room / "proc/driver/tenstorrent/0/pids", "17\n4711\n")
    metrics = metrics_of(room)
    tree.remove(N150[1].pci)
    metrics.inventory.poll(101.0)
    metrics.inventory.snapshot = replace(metrics.inventory.snapshot, driver=ODD)
    count = metrics.registrar.shared.count
    count("allocations_total", 3, resource=R150)
    count("registrations_total", 2, resource=R150, cause="start")
    count("refusals_total", resource=R150, call="Allocate", code="NOT_FOUND")
    page = metrics.page(109.0)
    assert {*re.findall(r"^# TYPE (\S+) ", page, re.M)} == tt.METRICS.keys()
    text = re.sub(r"0000:(..):00\.0", r"\1", "\n".join(told(page)))
    one, two = N150[:2]
    names: Event = {"G": grpc.__version__, "P": sys.version.split()[0], "V": tt.__version__}
    names |= {"A": one.id, "B": two.id, "S": one.serial, "T": two.serial, "F": one.firmware}
    for short, name in {**names, "R": R150, "ODD": ODD}.items():
        text = text.replace(f"={name} ", f"={short} ").replace("/dev/tenstorrent", "DEV")
    readings = [reading.replace("=", " card=A chip=01 ") for reading in READINGS_OF_A.split()]
    assert sorted(text.splitlines()) == sorted([*PAGE.strip().splitlines(), *readings])


def test_junk_readings(room: Path) -> None:
    """Stale telemetry, a dead bus, what is below 0 (captured: hwmon_junk_stale-tags, _dead-chip):
    counted, not shown. With a driver before 2.7 nothing is read, as that could oops the kernel."""
    tree, count = Tree(room, N150[:1]), 0
    metrics = metrics_of(room)
    for metric, (file, highest, *_) in [*tt.SENSORS.items()][:-1]:
        file = file.replace("hwmon/", "device/hwmon/hwmon2/")
        for text in (good := f"{highest}", f"{highest + 1}", "4294967295", "-1", "N/A", "", None):
            tree.set(BDF, file, text)
            count += text not in (good, None)
            page = told(metrics.page(109.0), f"chip={BDF}")
            assert any(metric in line for line in page) == (text == good), (metric, text)
            assert page[-1].endswith(f" {count}"), (metric, text)
    tree.set(BDF, "tt_aiclk", "500")
    for driver, read in (("2.6.1", 0), ("1.34", 0), ("", 0), ("2.7.0-rc1", 1), ("3.0", 1)):
        metrics.inventory.snapshot = replace(metrics.inventory.snapshot, driver=driver)
        assert len(told(metrics.page(109.0), "tt_ai_clock_mhz")) == read


def test_sensors_that_hang(room: Path) -> None:
    """One scrape waits, the next ones leave that chip out. None waits if a poll's read hangs."""
    tree, file = Tree(room, N150[:2]), "device/hwmon/hwmon2/temp1_input"
    metrics, other = metrics_of(room), f"{N150[1].pci} 54.3"

    def scrape() -> list[str]:
        return [line.split("chip=")[1] for line in told(metrics.page(101.0), "asic_temperature")]

    tree.hang(BDF, file)
    with ThreadPoolExecutor() as pool:
        first = pool.submit(scrape)
        with open(tree.entry(BDF) / file, "w"):  # returns when that scrape has opened it
            try:
                assert pool.submit(scrape).result(5) == [other] and not first.done()
            finally:
                tree.release(BDF, file, "60000\n")
        assert first.result(5) == scrape() == [f"{BDF} 60", other]
    tree.hang(BDF, "tt_heartbeat")
    metrics.inventory.poll(102.0)
    assert scrape() == [other]
    tree.release(BDF, "tt_heartbeat", "7\n")


def test_alive() -> None:
    """/healthz is 503 for what a restart can mend. How long is too long follows --poll-seconds."""
    loop = asyncio.new_event_loop()
    for seconds, limit in ((0.1, 10), (60.0, 180)):
        inventory = tt.Inventory(tt.Settings(poll_seconds=seconds))
        inventory.polled_at, inventory.failure.problem = 1000.0, "WHY"
        text = f"stuck: the last poll ended {limit + 1} s ago. WHY"
        assert tt.alive(inventory, loop, 1001 + limit) == (503, text)
    assert tt.alive(inventory, loop, 1180) == (503, "stuck: the event loop does not answer")
    loop.close()
    registrar = tt.Registrar(tt.Shared(inventory, tt.preferred_allocation, lambda cards: []))
    assert tt.ready(registrar) == (503, "the first poll has not ended yet")


def test_pages(kubelet: Kubelet, room: Path, launch: Launch, bound: Bound) -> None:
    """/readyz is 200 without cards, or once all are registered. While the port is taken the cards
    are served without it. Clients that talk nonsense, or say nothing, hold up nobody."""
    tree = Tree(room)
    shutil.rmtree(tree.sys)
    kubelet.start(faults={"register_fails": 1000})
    with socket.create_server(("127.0.0.1", 0)) as other, contextlib.ExitStack() as stack:
        address = other.getsockname()
        plugin = launch(tree, kubelet, f"--listen=127.0.0.1:{address[1]}")
        plugin.wait_for_line("no HTTP on port .*: Address already in use.*; trying again")
        plugin.wait_for_line("no cards here, driver not loaded: waiting for some")
        other.close()
        text = "no cards to register: waiting for some to appear\n"
        assert fetch(plugin, "/readyz") == (200, text) and len(plugin.lines("no HTTP")) == 1
        (tree.sys / "class/tenstorrent").mkdir(parents=True)
        tree.add(replace(N150[0], asic_id="", heartbeat=False))  # captured: an old driver
        plugin.wait_for_line("the kubelet has not registered it")
        status, text = fetch(plugin, "/readyz")
        assert status == 503 and "the kubelet has not registered it: UNIMPLEMENTED" in text
        kubelet.faults(register_fails=-1000)
        plugin.wait_for_line("registered tenstorrent")
        assert fetch(plugin, "/readyz") == (200, f"{R150}: registered\n")
        assert fetch(plugin, "/") == (404, "no such page; there are /healthz, /readyz, /metrics\n")
        nonsense = [b"\0\xff" * 400 + b"\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"A" * 70_000]
        head = b"".join(b"x%d: %s\r\n" % (n, b"a" * 65_000) for n in range(90))
        nonsense += [b"GET / HTTP/1.1\r\n" + head + b"\r\n"] * 10
        before = private_memory(plugin)
        for sent in nonsense + [b"", b"GET /metr"] * 50:
            client = stack.enter_context(socket.create_connection(address, timeout=10))
            with contextlib.suppress(ConnectionError):  # it has heard enough
                client.sendall(sent)
                assert sent not in nonsense or b"metrics" not in client.recv(100)
        assert private_memory(plugin) - before < 30_000
        began = time.monotonic()
        status, text = fetch(plugin, "/healthz")
        bound("a probe beside 100 silent HTTP clients", time.monotonic() - began, 1.0)
        assert status == 200 and re.fullmatch(r"ok: the last poll ended [01]\.\d s ago\.\n", text)
        kubelet.allocate(R150, [BDF])


def test_listens_on_one_address_or_all() -> None:
    """IPv4 and IPv6, as a Pod's address may be of either kind. A page that fails says why."""
    pages: Any = {"/x": lambda: 1 / 0}
    for host in ("127.0.0.1", "[::1]")[: 1 + socket.has_dualstack_ipv6()]:
        for address in (f"{host}:0", ":0"):
            said = tt.open_port(tt.listen_address(address), pages)
            failed = 500, "ZeroDivisionError('division by zero')\n"
            assert fetch(said, "/x?y=z", host.strip("[]")) == failed


# ==== Appendix C. Files for other tools: a CDI specification, and node labels =====================


def test_kept_files(room: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The healthy cards by ID, by N, and all. It follows N and health, is written again where it is
    gone, and not without need. Without cards there is none; no CDI name but those in the file."""
    caplog.set_level(logging.INFO, "tt-device-plugin")
    tree = Tree(room, [N150[0], *(replace(one, index=one.index + 4) for one in P300)])
    inventory, cdi, labels = metrics_of(room).inventory, room / "cdi", room / "labels"
    settings = replace(inventory.settings, hugepages="always", cdi_dir=cdi, labels_dir=labels)
    files, file, draft = tt.KeptFiles(settings), cdi / CDI, cdi / f".{CDI}.new"

    def keep() -> dict[str, str]:
        """The file's names, each with its device nodes, once it says what the snapshot does. None
        unless all healthy cards have a name. podman judges the rest of the file."""
        files.keep(inventory.snapshot)
        files._thread.join(5)
        healthy = [card for card in inventory.snapshot.cards if card.verdict.health == "Healthy"]
        devices = json.loads(file.read_text())["devices"] if files.cdi_names(healthy) else []
        nodes = {one["name"]: one["containerEdits"]["deviceNodes"] for one in devices}
        return {name: " ".join(node["hostPath"] for node in nodes[name]) for name in nodes}

    first, p300 = "/dev/tenstorrent/0", "/dev/tenstorrent/4 /dev/tenstorrent/5"
    expected = {N150[0].id: first, "0": first, P300_ID: p300, "4": p300, "5": p300}
    expected |= {"all": f"{first} {p300}"}
    assert keep() == expected
    names = [f"tenstorrent.com/card={one}" for one in (N150[0].id, P300_ID)]
    assert files.cdi_names(inventory.snapshot.cards) == names
    assert file.read_text().count('"containerPath": "/dev/hugepages-1G"') == 6
    assert [os.listdir(cdi), os.listdir(labels)] == [[CDI], ["tt-device-plugin"]]
    before = file.stat()
    assert keep() and file.stat() == before
    file.unlink()
    assert keep() == expected
    draft.mkdir()
    kept = []
    for n in (7, 0, 7):  # at 0 the file is right again before it could be written
        tree.add(replace(tree.remove(BDF), index=n))
        inventory.poll(101.0 + n)
        assert files.cdi_names(inventory.snapshot.cards) == []
        kept += [keep(), keep()]
        if draft.exists():
            draft.rmdir()
    assert kept[:4] == [{}, {}, expected, expected] and kept[4]["7"] == "/dev/tenstorrent/7"
    tree.remove(BDF)
    inventory.poll(110.0)
    assert keep()["all"] == p300
    tree.remove(P300[0].pci)
    inventory.poll(111.0)
    assert not keep() and [*os.listdir(cdi), *os.listdir(labels)] == ["tt-device-plugin"]
    trouble = f"cannot keep {file}: Is a directory; trying again", f"{file} is kept again"
    assert tuple(line.getMessage() for line in caplog.records) == trouble


def test_files_of_instances(kubelet: Kubelet, tree: Tree, launch: Launch, bound: Bound) -> None:
    """A folder that hangs costs no card, and not the end. With CDI a card whose N has changed is
    refused. An instance that stands by is ready, and leaves the files alone until it takes over."""
    tree.add(replace(N150[0], by_id=True))
    paths = [kubelet.root / "cdi" / CDI, kubelet.root / "labels/tt-device-plugin"]
    flags = [f"--cdi-dir={paths[0].parent}", f"--labels-dir={paths[1].parent}"]
    paths[0].parent.mkdir(parents=True)
    os.mkfifo(paths[0].with_name(f".{CDI}.new"))
    hanging = launch(tree, kubelet, *flags, offers=1)
    assert not kubelet.allocate(R150, [N150[0].id]).get("cdi_devices")
    bound("SIGTERM to the end while a write hangs", hanging.end()[1], 1.5)
    shutil.rmtree(paths[0].parent)
    first = launch(tree, kubelet, *flags, offers=1)
    until(lambda: kubelet.allocate(R150, [N150[0].id]).get("cdi_devices") and paths[1].exists())
    modes = [one.stat().st_mode & 0o777 for path in paths for one in (path, path.parent)]
    assert modes == [0o644, 0o755] * 2, "whoever reads them may be another user"
    kubelet.pre_start(R150, [N150[0].id])
    tree.add(replace(tree.remove(BDF), index=4))
    until(lambda: paths[0].exists() and "/4" in paths[0].read_text())
    with refused("FAILED_PRECONDITION", "/dev/tenstorrent/0", "delete the Pod"):
        kubelet.pre_start(R150, [N150[0].id])
    before = [path.stat() for path in paths]
    other = launch(tree, kubelet, *flags, HTTP)
    other.wait_for_line(STANDING_BY)
    other.wait_for_line(f"{N150[0].id} .* is Healthy")
    status, text = fetch(other, "/readyz")
    assert status == 200 and text.startswith("another instance serves")
    assert [path.stat() for path in paths] == before
    first.end()
    until(lambda: all(path.exists() for path in paths))
    other.end()
    assert not any(path.exists() for path in paths)


LABELLED = "n300=4 t3000; n300=3; n300=4,n150=2; galaxy-wormhole=32 galaxy; galaxy-wormhole=31; "
LABELLED += "galaxy-blackhole=32 galaxy; galaxy-blackhole=33; "
LABELLED += "n150=2,n300=2,p100=2,p150=2,p300=2,galaxy-wormhole=40,galaxy-blackhole=9"


@pytest.mark.parametrize("letter", ["", "a"])
@pytest.mark.parametrize("node", LABELLED.split("; "))
def test_labels(room: Path, node: str, letter: str) -> None:
    """All made-up cards are found, and Healthy. Their labels: how many, the firmware if it is one,
    the driver as a valid value, the topology if it is beyond doubt. --variants keeps a letter."""
    spec, _, topology = node.partition(" ")
    made = tt.fake_spec(spec)
    tt.make_fake_tree(room, made)
    (room / "sys/module/tenstorrent/version").write_text("2.10.0+git~")
    settings = tt.Settings(sysfs_root=room / "sys", dev_root=room / "dev", resource_domain="a.b")
    snapshot = tt.Inventory(replace(settings, variants=bool(letter))).poll(100.0)
    models = {model + letter * model.startswith("p"): count for model, count in made.items()}
    healthy = [card for card in snapshot.cards if card.verdict.health == "Healthy"]
    assert Counter(card.model for card in healthy) == models
    expected = {"driver-version=2.10.0_git", *[f"topology={topology}"] * bool(topology)}
    for model, count in models.items():
        expected |= {f"{model}.count={count}", f"{model}.firmware=19.5.0.0"}
    card, *others = snapshot.cards
    other = replace(card, chips=tuple(replace(chip, firmware="1") for chip in card.chips))
    for first, gone in (card, ""), (other, f"{card.model}.firmware=19.5.0.0"):
        text = tt.node_labels(settings, replace(snapshot, cards=(first, *others)))
        assert {*text.splitlines()} == {f"a.b/{label}" for label in expected - {gone}}
    assert tt.node_labels(settings, replace(snapshot, cards=())) == ""


# ==== Appendix D. The command line: flags, --list, --dry-run, --fake ==============================

# Each flag, two values that are right, and wrong ones. "-": a switch; its variable has a value.
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
--resource-domain a-b.example x x/y X_ kubernetes.io a.kubernetes.io requests.a -a a..b {"a" * 254}
--hugepages always never maybe
--listen [::1]:0 :7762 7762 localhost:7762 127.0.0.1 1.2.3.4:70000 ::1:80 u@1.2.3.4:80 1.2.3.4:80/x
--log-format text json xml
--log-level error debug loud
""".split("\n")[1:-1]


@pytest.mark.parametrize("line", FLAGS)
def test_flags(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Each can be set by its variable, too, and the command line wins. A wrong value is exit code
    2, and a sentence with it and where it came from."""
    flag, other, value, *wrong = line.split()
    variable, plain = f"TT_DEVICE_PLUGIN_{flag[2:].upper().replace('-', '_')}", tt.parse([], {})
    options = tt.parse([], {variable: value})
    assert options != plain == tt.parse([], {variable: ""})
    assert options == tt.parse([flag if other == "-" else f"{flag}={value}"], {})
    if other != "-":
        assert tt.parse([f"{flag}={other}"], {variable: value}) == tt.parse([f"{flag}={other}"], {})
    for text in wrong:
        for place in (flag, variable)[other == "-" :]:
            argv = [f"{flag}={text}"] if place == flag else []
            with pytest.raises(SystemExit, match="2"):
                tt.parse(argv, {} if argv else {variable: text})
            said = capsys.readouterr().err.splitlines()[-1]
            assert place in said and text.removeprefix("p100=1,") in said, said


def test_usage() -> None:
    """--help and README name each flag, README with its variable, and nothing there is run with
    another. What cannot be meant is exit code 2, and a sentence that has it."""
    find = re.compile(r"(?<![\w-])--[a-z-]+").findall
    names = [*(line.split()[0] for line in FLAGS), "--json"]
    expected = {name: [f"TT_DEVICE_PLUGIN_{name[2:].upper().replace('-', '_')}"] for name in names}
    expected |= {"--help": [], "--version": []}
    assert {*find(run(COMMAND, "--help", COLUMNS="200").stdout)} == expected.keys()
    rows = table("flag")
    assert {flag: in_code(row[1]) for row in rows for flag in find(row[0])} == expected
    ran = re.findall(r"(?:\.pyz|^\./build\.sh run) (--.*)$", README, re.M)
    assert ran and {*find(" ".join(ran + container_of(FILE_MANIFEST)["args"]))} <= expected.keys()
    for wrong in f"--json;--list --dry-run;surplus;--vers;--kubelet-dir=/{'k' * 60}".split(";"):
        done = run(COMMAND, *wrong.split())
        said = done.stderr.splitlines()[-1]
        assert done.returncode == 2 and wrong.split()[-1].split("=")[0] in said, said
    assert "is 10 bytes too long for the paths of sockets in it" in said
    assert [row[0] for row in table("exit code")] == ["0", "1", "2"]  # 0 and 1: the next two tests


def test_list(room: Path) -> None:
    """JSON as the design has it; in columns a card is a line, and its reason stands below. No card
    is an answer."""
    tree = Tree(room)

    def listed(*flags: str) -> str:
        done = run(COMMAND, *tree.flags, "--list", *flags)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert listed("--json") == "[]\n" and listed() == "No Tenstorrent cards (driver 2.10.0).\n"
    odd = [replace(N150[1], card_type=""), replace(N150[2], card_type="unknown")]
    for chip in (N150[0], N150[3], *odd, *(replace(chip, index=chip.index + 4) for chip in P300)):
        tree.add(chip)
    tree.remove(N150[1].pci, driver="vfio-pci")
    tree.node(N150[2].pci).unlink()
    cards = json.loads(listed("--json"))
    keys = "id resource model arch device_nodes pci_addresses numa_node board_serial firmware "
    place = ["/dev/tenstorrent/0"], [BDF], 0, N150[0].serial, "80.17.0.0"
    facts = N150[0].id, R150, "n150", "wormhole", *place, "Healthy", ""
    assert cards[0] == dict(zip(f"{keys}health reason".split(), facts, strict=True))
    shown = [(one["resource"] or "not offered", one["id"], one["health"]) for one in cards]
    expected = "n150 Healthy, n150 Healthy, p300 Healthy, wormhole Unhealthy, not offered pending"
    said = ", ".join(f"{resource} {health}" for resource, _, health in shown)
    assert said.replace("tenstorrent.com/", "") == expected
    table, *below = listed().strip().split("\n\n")
    rows = [re.split("  +", row) for row in table.splitlines()[1:]]
    assert [(row[0], row[1], row[-1]) for row in rows] == shown
    assert below == [f"{one['id']}: {one['reason']}" for one in cards if one["reason"]]
    assert "device node /dev/tenstorrent/2 is missing" in below[0] and "vfio-pci" in below[1]


def test_dry_run(four: Tree, kubelet: Kubelet) -> None:
    """This node's cards, a built-in kubelet: the real one does not notice, and no file is written.
    Where it fails, it says after which step. For what it prints, see test_readme_first_command."""
    kubelet.start()
    own = [f"--kubelet-dir={kubelet.root}", f"--cdi-dir={kubelet.root}/cdi"]
    dry = [*COMMAND, *four.flags, *own, "--dry-run"]
    done = run(dry)
    assert (done.returncode, done.stderr) == (0, "") and N150[3].id in done.stdout
    assert not kubelet.seen("register") and os.listdir(kubelet.root) == ["device-plugins"]
    for chip in N150:
        four.node(chip.pci).unlink()
    for flags, step in ([], "3. ListAndWatch: "), (["--sysfs-root=/nowhere"], "1. Discover: "):
        done = run(dry, *flags)
        assert done.returncode == 1 and "\nFAILED after the step above: " in done.stdout
        assert done.stdout.split("\n\n")[-2].lstrip().startswith(step), done


@pytest.mark.parametrize("uid", [0, 65534])
def test_cannot_work(four: Tree, kubelet: Kubelet, uid: int) -> None:
    """Without the right to make sockets: exit code 1, and a sentence that names folder, user and
    remedy. What ends it later is in test_stops."""
    user = ["setpriv", "--bounding-set=-all", "--inh-caps=-all"]
    user += [f"--reuid={uid}", f"--regid={uid}", "--clear-groups", *COMMAND]
    if os.getuid() or finish([*user, "--version"]).returncode:
        pytest.skip(f"needs setpriv, root, and an interpreter that uid {uid} can read")
    kubelet.folder.mkdir(mode=0o755, parents=True)  # it may be opened
    os.chown(kubelet.folder, 65533, 65533)
    done = run(user, f"--kubelet-dir={kubelet.root}", *four.flags)
    assert done.returncode == 1 and "run the plugin as uid 0" in done.stderr
    assert f"uid {uid} cannot make sockets in {kubelet.folder}. " in done.stderr


# ==== The packed file: what is in it, and where it runs ===========================================


PYZ = HERE / "dist/tt-device-plugin.pyz"
UNIVERSAL = HERE / "dist/tt-device-plugin-universal.pyz"
PYTHONS = range(10, 16)  # the minor versions of CPython that the universal file is for


def build(folder: Path, *words: str, umask: int = 0o022, **variables: str) -> Finished:
    """`./build.sh WORDS` of that folder, with this interpreter unless PYTHON is another one."""
    env = {**os.environ, "PYTHON": sys.executable, **variables}
    return finish([folder / "build.sh", *words], env=env, umask=umask)


@pytest.fixture(params=[PYZ, pytest.param(UNIVERSAL, marks=long_only)], ids=lambda file: file.name)
def packed(request: pytest.FixtureRequest) -> Path:
    """The file for this interpreter; with --long the universal one, too; built if need be."""
    done = build(HERE, *(["--universal"] if request.param == UNIVERSAL else []))
    assert done.returncode == 0, done.stdout + done.stderr
    return Path(request.param)


def interpreters() -> dict[int, str]:
    """The CPythons 3.N of this machine, by N. Those on PATH come last: shims may refuse."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    folders = [*map(str, pyenv.glob("versions/3.*/bin")), os.environ["PATH"]]
    which = functools.partial(shutil.which, path=os.pathsep.join(folders))
    return {n: path for n in range(4, 20) if (path := which(f"python3.{n}"))}


def test_packed_file(packed: Path) -> None:
    """Wherever it is built: the same bytes, whose SHA-256 the build says, with native modules for
    just its interpreters. The universal file has a list of contents, which is true."""
    before, words = packed.read_bytes(), ["--universal"] if packed == UNIVERSAL else []
    others = [path for n, path in interpreters().items() if words and n in PYTHONS]
    packed.unlink()
    python = [sys.executable, *others][-1]
    done = build(HERE, *words, umask=0o077, LC_ALL="C", TZ="Asia/Kolkata", PYTHON=python)
    assert done.returncode == 0, done.stdout + done.stderr
    assert packed.read_bytes() == before
    assert hashlib.sha256(before).hexdigest() in done.stdout
    assert stat.S_IMODE(packed.stat().st_mode) == 0o755, "any user may run it"
    with zipfile.ZipFile(packed) as archive:
        content = {entry: archive.read(entry) for entry in archive.infolist()}
    assert {(one.date_time[0], one.external_attr >> 16) for one in content} == {(1980, 0o100644)}
    assert [one for one in content if str(HERE).encode() in content[one]] == []
    names = "\n".join(one.filename for one in content)
    found = re.findall(r"cygrpc\.cpython-3(\d+)-(\w+)-linux-gnu\.so$", names, re.M)
    if packed == PYZ:
        assert found == [(str(sys.version_info.minor), platform.machine())]
    else:
        assert {*found} == {(str(minor), cpu) for minor in PYTHONS for cpu in DEBIAN_CPU}
        (sbom,) = (json.loads(content[one]) for one in content if one.filename == "sbom.cdx.json")
        listed = {one["name"].replace("_", "-"): one["version"] for one in sbom["components"]}
        part = (HERE / "requirements.txt").read_text().split("# ---- ")[1]
        assert listed == dict(re.findall(r"^([\w.-]+)==(\S+)", part, re.M))
        assert all(one["licenses"] for one in sbom["components"])


def test_refused_builds(tmp_path: Path) -> None:
    """A sentence and exit code 1, and no file, in a folder that has built nothing yet."""
    ignore = shutil.ignore_patterns("build", "dist", ".git", "__pycache__", ".*cache")
    project = Path(shutil.copytree(HERE, tmp_path / "project", ignore=ignore))
    path, nobody = project / "requirements.txt", "http://127.0.0.1:1/simple"
    index: Any = {"PIP_INDEX_URL": nobody, "PIP_EXTRA_INDEX_URL": nobody, "PIP_FIND_LINKS": ""}
    index |= {"PIP_CONFIG_FILE": "/dev/null", "PIP_NO_CACHE_DIR": "1", "PIP_RETRIES": "0"}
    locked, no_tool = path.read_text(), {"TOOL": "no-such-tool"}
    for old, new, words, variables, says in (
        ("^", "", [], index, "grpcio"),  # the user's index is asked, and no other
        (r"sha256:\w{8}", "sha256:00000000", [], {}, "hash"),  # a tampered mirror
        ("for: grpcio==", "for: grpcio!=", [], {}, r"\./build\.sh lock"),  # a list not locked
        ("^", "", ["image"], no_tool, "no-such-tool(.|\n)*podman"),
    ):
        path.write_text(re.sub(old, new, locked))
        done = build(project, *words, **variables)
        assert done.returncode == 1 and re.search(says, done.stderr, re.I), done.stderr
        assert not (project / "dist").exists()


def needs_namespace(*tools: str) -> None:
    """Skip what needs these tools, and root that may make a mount namespace."""
    if not all(map(shutil.which, tools)) or finish(["unshare", "-m", "true"]).returncode:
        pytest.skip(f"needs root that may make a mount namespace, and {', '.join(tools)}")


CPU, OTHER = ("x86_64", "aarch64")[:: 1 if platform.machine() == "x86_64" else -1]
DEBIAN_CPU = {"x86_64": "amd64", "aarch64": "arm64"}
PYZ_THERE = f"/srv/dist/{UNIVERSAL.name}"
# Debian's suite, its packages, a tool, a command there. /srv is this folder, /home this machine's
# /usr/bin. The first is without the archive, on Debian 12's own grpcio 1.51 and protobuf 3.21.
BOXES = {
    "Debian's packages": "bookworm python3,python3-grpcio,python3-protobuf unshare "
    "python3 -B /srv/tt_device_plugin.py",
    "bookworm": f"bookworm python3 unshare python3 {PYZ_THERE}",
    "trixie": f"trixie python3 unshare python3 {PYZ_THERE}",
    "forky": f"forky python3.15 unshare python3.15 {PYZ_THERE}",
    "other CPU": f"trixie python3 qemu-{OTHER}-static /home/qemu-{OTHER}-static /usr/bin/python3 "
    f"{PYZ_THERE}",
    "image": "bookworm python3 podman",
}
PLACES = [10, *(pytest.param(one, marks=long_only) for one in (*PYTHONS[1:], *BOXES))]

# Runs the rest of the line in $ROOT as "nonroot" of many images, with only these $VARIABLES in the
# environment; everything is read-only but the kubelet's folder, and all vanishes with the process.
BOX = r"""
cd "$ROOT"; mkdir -p dev proc mnt srv home; mount --bind . .; cd "$ROOT"
mount --bind /dev dev; mount --bind /proc proc
mount --bind "$ROOM" mnt; mount --bind "$HERE" srv; mount --bind /usr/bin home
for each in mnt srv home; do mount -o remount,bind,ro $each; done
mount --bind "$ROOM/k/device-plugins" mnt/k/device-plugins
mount -o remount,bind,ro .
exec env -i PATH=/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin $VARIABLES \
    chroot --userspec=65532:65532 . "$@"
"""
IN_BOX = ["unshare", "--mount", "sh", "-ec", BOX, "sh"]


def debian_root(suite: str, packages: str, cpu: str) -> Path:
    """A bare Debian with these packages, unpacked but not set up. It stays in build/."""
    root = HERE / "build/roots" / f"{suite}-{cpu}-{packages}"
    if not root.exists():  # one that is there is whole
        root.parent.mkdir(exist_ok=True)
        # Mirrors and snapshots may be older than a release's lists are meant to be used.
        options = ["--variant=extract", '--aptopt=Acquire::Check-Valid-Until "false"']
        options += [f"--architectures={cpu}", f"--include=base-files,libstdc++6,{packages}"]
        with tempfile.TemporaryDirectory(dir=root.parent) as draft:
            done = finish(["mmdebstrap", *options, suite, f"{draft}/root"], umask=0o022)
            assert done.returncode == 0, done.stderr
            Path(draft, "root").rename(root)
    return root


# Makes an image from $ROOT, and prints its configuration, and where its files are. All that podman
# makes is in the folder $1, and with vfs nothing is mounted.
IMAGE = r"""
cd "$1"
printf '[storage]\ndriver="vfs"\ngraphroot="%s/images"\nrunroot="%s/run"\n' "$1" "$1" >conf
export CONTAINERS_STORAGE_CONF="$1/conf" BUILDAH_ISOLATION=chroot TOOL=podman BASE=localhost/base
printf 'FROM scratch\nCOPY . /\n' | podman build -q -t $BASE -f - "$ROOT"
"$HERE/build.sh" image localhost/plugin:1
podman image inspect --format '{{json .Config}}' localhost/plugin:1
podman image mount localhost/plugin:1
"""


@pytest.mark.parametrize("place", PLACES)
def test_serves_on(four: Tree, kubelet: Kubelet, tmp_path: Path, place: Any) -> None:
    """The universal file on this machine's CPythons, with an empty environment, and in bare Debians
    with libstdc++6; an image, which compiles nothing. It offers cards, a Pod gets one, it ends."""
    kubelet.start()
    assert build(HERE, "--universal").returncode == 0
    there = str(kubelet.root.parent)
    box: dict[str, Any] = {"ROOM": there, "HERE": str(HERE), "VARIABLES": ""}
    if isinstance(place, int):
        if not (python := interpreters().get(place)):
            pytest.skip(f"there is no python3.{place} here, neither pyenv's nor on PATH")
        command = ["env", "-i", python, str(UNIVERSAL)]
    else:
        suite, packages, tool, *words = BOXES[place].split()
        needs_namespace("mmdebstrap", tool)
        cpu = DEBIAN_CPU[OTHER if place == "other CPU" else CPU]
        box["ROOT"], there = str(debian_root(suite, packages, cpu)), "/mnt"
        if place == "image":
            done = finish(["sh", "-ec", IMAGE, "sh", str(tmp_path)], env=environment(**box))
            assert done.returncode == 0, done.stdout + done.stderr
            *_, config, box["ROOT"] = done.stdout.splitlines()
            words, variables = map(json.loads(config).get, ["Entrypoint", "Env"])
            box["VARIABLES"] = " ".join(variables)
            done = run([*IN_BOX, words[0], "-v", *words[1:], "--version"], **box)
            compiled = re.findall(r"^# code object from '?(/.*\.py)'?$", done.stderr, re.M)
            assert done.returncode == 0 and compiled == [], compiled
            assert "image: localhost/plugin:1\n" in (HERE / "dist/daemonset.yaml").read_text()
        os.chown(kubelet.folder, 65532, 65532)
        (kubelet.folder / "kubelet.sock").chmod(0o666)
        command = [*IN_BOX, *words]
    flags = f"--kubelet-dir={there}/k --sysfs-root={there}/sys --dev-root={there}/dev".split()
    with contextlib.closing(Plugin([*command, *flags], cwd="/", env=environment(**box))) as plugin:
        kubelet.wait_status(R150, 4, 4, timeout=300)
        (device,) = kubelet.allocate(R150, [N150[2].id])["devices"]
        assert device["host_path"] == "/dev/tenstorrent/2"
        assert plugin.end()[0] == 0, plugin.lines()


def test_starts(packed: Path, tmp_path: Path) -> None:
    """Eight at once, as a command: all start, and none leaves a file; also without memfd_create.
    What is missing is one sentence and exit code 1; another Python hears which ones it is for."""
    file, empty = tmp_path / "a folder with spaces/the file", tmp_path / "empty"
    file.parent.mkdir()
    empty.mkdir()
    shutil.copy(packed, file)
    path = f"{Path(sys.executable).parent}:/usr/bin:/bin"
    env = {"PATH": path, "HOME": str(empty), "TMPDIR": str(empty)}
    popen: dict[str, Any] = {"stdout": subprocess.PIPE, "text": True, "env": env, "cwd": empty}
    running = [subprocess.Popen([file, "--version"], **popen) for _ in range(8)]
    (answer,) = {process.communicate(timeout=120)[0] for process in running}
    assert [process.returncode for process in running] == [0] * 8 and tt.__version__ in answer
    assert [*empty.iterdir(), *file.parent.iterdir()] == [file]
    minors = PYTHONS if packed == UNIVERSAL else [sys.version_info.minor]
    versions = ", ".join(f"3.{minor}" for minor in minors)
    another = 1, f"is not for this Python.* CPython {versions} on "
    program = "import importlib.machinery, os, runpy, sys; {}; del sys.argv[0]; "
    program += "runpy.run_path(sys.argv[0], run_name='__main__')"
    ways = {
        "del os.memfd_create": (0, f"^tt-device-plugin {tt.__version__} "),
        "sys.modules['asyncio'] = None": (1, r"import of asyncio halted.* libstdc\+\+6"),
        "importlib.machinery.EXTENSION_SUFFIXES[:] = ['.cpython-399-other.so']": another,
    }
    tries = [([sys.executable, "-c", program.format(way)], ways[way]) for way in ways]
    tries += [([one], another) for n, one in interpreters().items() if n < min(PYTHONS)][:1]
    for python, (code, says) in tries:
        done = run([*python, str(packed)], "--version")
        said = done.stdout + done.stderr
        assert done.returncode == code and said.count("\n") == 1 and re.search(says, said), done


# ==== README and daemonset.yaml: what they say ====================================================

README = (HERE / "README.md").read_text()
FILE_MANIFEST: Event = yaml.safe_load((HERE / "daemonset.yaml").read_text())
VERSIONS = kubernetes_validate.utils.all_versions()
VERSIONS = sorted(VERSIONS, key=lambda text: [*map(int, text.split("."))])[:: len(VERSIONS) - 1]


def blocks(language: str) -> list[str]:
    """README's code blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.M | re.S)


def table(head: str) -> list[list[str]]:
    """The cells of README's table whose first column has this head."""
    found = re.search(rf"^\| {head} \|.*\n\|[-|: ]+\|\n((?:\|.*\|\n)+)", README, re.M)
    assert found, f"README has no table of {head}"
    lines = found[1].splitlines()
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


def in_code(cell: str) -> list[str]:
    """What is in backticks in a cell."""
    return re.findall(r"`([^`]+)`", cell)


(POD,) = map(yaml.safe_load, blocks("yaml"))


def container_of(manifest: Event) -> Event:
    """Its only container."""
    (container,) = manifest["spec"]["template"]["spec"]["containers"]
    return dict(container)


@pytest.mark.parametrize("image", ["", "registry.example/plugin:7"])
def test_manifest(image: str) -> None:
    """It, and README's Pod, are valid for the oldest and the newest Kubernetes; of the host it has
    what it needs and no more; one port is listened on, declared, probed and scraped."""
    manifest = FILE_MANIFEST
    if image:
        done = finish([sys.executable, HERE / "tools/manifest.py", image])
        manifest = yaml.safe_load(done.stdout)
        assert container_of(manifest)["image"] == image
    for version, one in itertools.product(VERSIONS, (manifest, POD)):
        kubernetes_validate.validate(one, version, strict=True)
    template, container = manifest["spec"]["template"], container_of(manifest)
    spec, context = template["spec"], container["securityContext"]
    paths = {one["name"]: one["hostPath"]["path"] for one in spec["volumes"]}
    mounts = {paths[mount["name"]]: mount for mount in container["volumeMounts"]}
    folder = "/var/lib/kubelet/device-plugins"  # --kubelet-dir's default
    assert mounts.keys() == {folder, "/dev"} | (set() if image else {"/opt/tenstorrent"})
    assert [path for path in mounts if not mounts[path].get("readOnly")] == [folder]
    assert mounts[folder]["mountPath"] == folder
    assert f"--dev-root={mounts['/dev']['mountPath']}" in container["args"]
    (port,) = container["ports"]
    assert f"--listen=:{port['containerPort']}" in container["args"]
    for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
        assert container[probe]["httpGet"]["port"] == port["name"]
    scraped = template["metadata"]["annotations"]["prometheus.io/port"]
    assert scraped == str(port["containerPort"])
    assert context["runAsUser"] == 0 and context["capabilities"] == {"drop": ["ALL"]}
    assert spec["automountServiceAccountToken"] is False
    assert context["readOnlyRootFilesystem"] and not context["allowPrivilegeEscalation"]
    assert not context["privileged"] and context["seccompProfile"] == {"type": "RuntimeDefault"}
    assert not {"hostNetwork", "hostPID", "hostIPC", "serviceAccountName"} & spec.keys()


def test_manifest_waits_for_the_file(room: Path) -> None:
    """Where the plugin's file is missing, the container says in one line what to copy, and waits;
    once the file is there, it is run with the manifest's flags. SIGTERM ends the waiting."""
    container = container_of(FILE_MANIFEST)
    words = [*container["command"], *container["args"]]
    words = [one.replace("/opt/tenstorrent", str(room)).replace("7762", "0") for one in words]
    with contextlib.closing(Plugin(words)) as waiting:
        waiting.wait_for_line(r"tt-device-plugin\.pyz")
        waiting.end(timeout=5)  # and not only by force, after the Pod's grace period
    with zipfile.ZipFile(room / "draft", "w") as file:
        file.writestr("__main__.py", "import sys; sys.exit('RUNS ' + ' '.join(sys.argv))")
    with contextlib.closing(Plugin(words)) as waiting:
        waiting.wait_for_line(r"tt-device-plugin\.pyz")
        (room / "draft").rename(room / "tt-device-plugin.pyz")
        line = waiting.wait_for_line("^RUNS", timeout=30)
        assert "--listen" in line and len(waiting.lines()) == 2, waiting.lines()


def test_made_up_cards(kubelet: Kubelet, launch: Launch) -> None:
    """With --fake README's Pod gets what it says, and one of two resources the rest, without a
    conflict (contract 14). A card taken out of the tree is Unhealthy. It goes with the process."""
    plugin = launch(None, kubelet, "--fake=n150=196,p300=2", "--hugepages=always", offers=196)
    kubelet.wait_status("tenstorrent.com/p300", 2, 2)
    (container,) = POD["spec"]["containers"]
    wanted = container["resources"]["limits"], {R150: 195, "tenstorrent.com/p300": 2}
    answers = [kubelet.admit(f"pod {number}", want) for number, want in enumerate(wanted)]
    devices = [[one["container_path"] for one in got["devices"]] for got in answers]
    assert sorted(itertools.chain(*devices)) == sorted(f"/dev/tenstorrent/{n}" for n in range(200))
    assert {one["host_path"] for got in answers for one in got["devices"]} == {"/dev/null"}
    assert not kubelet.seen("conflict") and len(answers[1]["mounts"]) == 1
    place = Path(plugin.wait_for_line("made-up cards in").split(" in ")[1].split(":")[0])
    (place / "sys/class/tenstorrent/tenstorrent!0").unlink()
    kubelet.wait_status(R150, 196, 195)
    assert plugin.end()[0] == 0 and not place.exists() and not sockets(kubelet)


def test_readme_first_command() -> None:
    """README's first command prints what README shows, where that is not cut."""
    (words,) = re.findall(r"^\./build\.sh (run .*)$", blocks("sh")[0], re.M)
    done = build(HERE, *words.split())
    assert done.returncode == 0, done.stdout + done.stderr
    printed = "\n".join(" ".join(line.split()) for line in done.stdout.splitlines())
    for line in blocks("text")[0].splitlines():
        pattern = re.escape(" ".join(line.split())).replace(r"\.\.\.", ".*")
        pattern = re.sub(r"-[0-9a-f]{6}\\\.sock", r"-[0-9a-f]{6}\.sock", pattern)  # of a process
        assert re.search(f"^{pattern}$", printed, re.M), f"{line!r}:\n{printed}"


def test_readme_unit(tmp_path: Path) -> None:
    """`./build.sh unit`: no fault, the path that README installs to, the exposure that it says."""
    if not shutil.which("systemd-analyze"):
        pytest.skip("there is no systemd-analyze: it is in the package systemd")
    unit, level = tmp_path / "tt-device-plugin.service", r"exposure level (?:of|for \S+:) (\d+\.\d)"
    unit.write_text(build(HERE, "unit").stdout)
    (file,) = re.findall(r"^ExecStart=\S+ (\S+)$", unit.read_text(), re.M)
    assert any(file in block for block in blocks("sh")), "README installs what the unit starts"
    verify = finish(["systemd-analyze", "verify", unit])
    assert verify.returncode == 0 and not verify.stderr, verify.stderr
    security = ["systemd-analyze", "security", "--offline=true", str(unit)]
    found = re.findall(level, finish(security, env=environment(LC_ALL="C")).stdout)
    if not found:
        pytest.skip("this systemd-analyze is older than 250: it judges loaded units only")
    (said,) = re.findall(level, README)
    assert float(found[0]) <= float(said) < 2


def test_readme_facts() -> None:
    """README has just the metrics that the plugin exposes, links to headings and files that are
    there, and no version but this one."""
    assert {name for row in table("metric") for name in in_code(row[0])} == tt.METRICS.keys()
    heads = re.findall(r"^#+ (.*)$", README, re.M)
    anchors = {"#" + re.sub(r"[^a-z0-9 _-]", "", head.lower()).replace(" ", "-") for head in heads}
    links = {link for link in re.findall(r"\]\(([^)]+)\)", README) if "://" not in link}
    assert links and all(one in anchors or (HERE / one).is_file() for one in links)
    assert set(re.findall(r"tt-device-plugin:(\d+\.\d+\.\d+)", README)) == {tt.__version__}


# CDI as podman reads it, with an empty /run, so that no other spec or container is in the way. As
# hardly any container lets one raise limits, they stay. runc, as crun refuses some hosts' cgroups.
PODMAN = r"""
mount -t tmpfs none /run
cd /run
mkdir -p cdi root/bin root/dev root/proc root/sys root/run
cp "$1" cdi
cp "$(command -v busybox)" root/bin/busybox
exec podman --root /run/storage --cgroup-manager cgroupfs --runtime runc run --rm --network none \
    --ulimit nofile=1024:1024 --ulimit nproc=1024:1024 --device "tenstorrent.com/card=$2" \
    --rootfs /run/root /bin/busybox ls /dev/tenstorrent
"""


def test_podman_takes_the_cdi_spec(room: Path) -> None:
    """`--device tenstorrent.com/card=...`: the device nodes of that card, and no other."""
    needs_namespace("podman", "runc", "busybox")
    made = {"n150": 2, "p300": 1}
    tt.make_fake_tree(room, made)
    inventory = metrics_of(room).inventory
    settings = replace(inventory.settings, fake=made)
    (room / CDI).write_text(tt.cdi_spec(settings, inventory.snapshot))
    p300 = inventory.snapshot.cards[2].id
    for name, nodes in {"all": "0 1 2 3", "1": "1", p300: "2 3"}.items():
        words = ["unshare", "--mount", "sh", "-ec", PODMAN, "sh", str(room / CDI), name]
        done = finish(words, timeout=60)
        assert done.stdout.split() == nodes.split(), done.stderr


def test_readme_symptoms(request: pytest.FixtureRequest) -> None:
    """Each symptom in README's table is what the plugin said in some other test of this run ("..."
    stands for anything): this is the last one."""
    everything = {name for name in globals() if name.startswith("test_")}
    items = request.session.items[: request.session.items.index(request.node) + 1]
    if missing := everything - {getattr(item, "originalname", "") for item in items}:
        pytest.skip(f"only a part of the tests runs, without {len(missing)} such as {min(missing)}")
    said = "\n".join(SAID)
    symptoms = [in_code(row[0])[0] for row in table("symptom")]
    patterns = {one: ".+".join(map(re.escape, one.split("..."))) for one in symptoms}
    assert [one for one in symptoms if not re.search(patterns[one], said)] == []
