"""Tests of the Tenstorrent device plugin, and the fake kubelet that they run against.

  1. The wire: the kubelet's API as a table. The fake kubelet builds its messages from this table,
     not from the plugin's stubs, so every test of the plugin is also a test of the wire.
  2. The fake kubelet: a process of its own, so that killing and pausing it are the real thing.
  3. The harness: kubelet, plugin and sysfs as a test sees them. Nothing in it waits by sleeping.
  4. Tests of the wire and of the fake kubelet: a wrong kubelet would prove nothing.

"Contract 5" is a point of the kubelet contract, "story 5" what users of device plugins suffer from.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import functools
import hashlib
import http.client
import importlib
import itertools
import json
import logging
import os
import platform
import queue
import random
import re
import select
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import zipfile
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any, Generic, NamedTuple, TypeVar

import grpc
import grpc.aio
import hypothesis
import kubernetes_validate  # type: ignore[import-untyped]
import pytest
import yaml
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from google.protobuf import (
    descriptor_pb2,
    descriptor_pool,
    json_format,
    message_factory,
)
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

import tt_device_plugin as tt

HERE = Path(__file__).resolve().parent

####################################################################################################
# 1. The wire
####################################################################################################

# Kubernetes 1.36, package v1beta1: the fields of each message, numbered from 1 in this order.
# "*" is repeated, "map" goes from string to string.
WIRE_TEXT = """
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
ContainerAllocateResponse: map envs, *Mount mounts, *DeviceSpec devices, map annotations, \
*CDIDevice cdi_devices
Mount: string container_path, string host_path, bool read_only
DeviceSpec: string container_path, string host_path, string permissions
CDIDevice: string name
PreStartContainerRequest: *string devices_ids
PreStartContainerResponse:
"""
WIRE = dict(line.split(":") for line in WIRE_TEXT.split("\n")[1:-1])

# Service, method: request and response, "*" if that is a stream.
SERVICES = {
    "Registration": {"Register": "RegisterRequest Empty"},
    "DevicePlugin": {
        "GetDevicePluginOptions": "Empty DevicePluginOptions",
        "ListAndWatch": "Empty *ListAndWatchResponse",
        "GetPreferredAllocation": "PreferredAllocationRequest PreferredAllocationResponse",
        "Allocate": "AllocateRequest AllocateResponse",
        "PreStartContainer": "PreStartContainerRequest PreStartContainerResponse",
    },
}


def build_messages() -> dict[str, Any]:
    """The table's message classes, in a pool of their own: the plugin's stubs claim the default."""
    proto = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="wire", package="v1beta1", syntax="proto3")
    for message, fields in WIRE.items():
        made = file.message_type.add(name=message)
        for number, text in enumerate(filter(None, fields.split(",")), start=1):
            kind, name = text.split()
            if kind == "map":  # on the wire a map is repeated pairs, in the descriptor a message
                entry = made.nested_type.add(name=name.capitalize() + "Entry")
                entry.options.map_entry = True
                entry.field.add(number=1, name="key", type=proto.TYPE_STRING, label=1)
                entry.field.add(number=2, name="value", type=proto.TYPE_STRING, label=1)
                kind = f"*{message}.{entry.name}"
            new = made.field.add(number=number, name=name, label=3 if kind[0] == "*" else 1)
            if (kind := kind.lstrip("*")) in ("string", "bool", "int32", "int64"):
                new.type = proto.Type.Value(f"TYPE_{kind.upper()}")
            else:
                new.type, new.type_name = proto.TYPE_MESSAGE, f".v1beta1.{kind}"
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    find = pool.FindMessageTypeByName
    return {name: message_factory.GetMessageClass(find(f"v1beta1.{name}")) for name in WIRE}


MESSAGES = build_messages()


def as_dict(message: Any) -> dict[str, Any]:
    """A message with the proto's names and with every field: an absent list is an empty one."""
    return json_format.MessageToDict(
        message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )


def stub(channel: Any, service: str, method: str) -> Any:
    """The client's side of a method, on a channel of grpc or of grpc.aio."""
    request, response = SERVICES[service][method].split()
    make = channel.unary_stream if response[0] == "*" else channel.unary_unary
    from_bytes = MESSAGES[response.lstrip("*")].FromString
    return make(f"/v1beta1.{service}/{method}", MESSAGES[request].SerializeToString, from_bytes)


def serve(server: Any, service: str, behaviour: Callable[[str], Any]) -> None:
    """Add a service to a server of grpc or of grpc.aio; `behaviour` has the handler of a method."""
    handlers = {}
    for method, types in SERVICES[service].items():
        request, response = types.split()
        kind = "unary_stream" if response[0] == "*" else "unary_unary"
        make = getattr(grpc, f"{kind}_rpc_method_handler")
        to_bytes = MESSAGES[response.lstrip("*")].SerializeToString
        handlers[method] = make(behaviour(method), MESSAGES[request].FromString, to_bytes)
    made = grpc.method_handlers_generic_handler(f"v1beta1.{service}", handlers)
    server.add_generic_rpc_handlers((made,))


####################################################################################################
# 2. The fake kubelet
####################################################################################################

DIAL_S = 10.0  # the kubelet's limit for dialling a plugin (contract 2)
PRE_START_S = 30.0  # and for PreStartContainer (contract 15)
LOCAL = ("grpc.use_local_subchannel_pool", 1)  # a connection of its own for each channel
# The parts of a container's answer: what is its key there (contract 14); "" of a map.
PARTS = {"envs": "", "annotations": "", "mounts": "container_path", "devices": "container_path"}
PARTS["cdi_devices"] = "name"


class Refusal(Exception):
    """What a command of the test meets: a gRPC status of the plugin, or the kubelet's refusal."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(f"{code}: {message}")
        self.code, self.message = code, message


@dataclass
class Device:
    healthy: bool
    numa: list[int] | None  # None: no topology was sent


@dataclass
class Client:
    """The kubelet's connection to one registered plugin socket."""

    resource: str
    endpoint: str
    channel: grpc.aio.Channel
    options: Any  # DevicePluginOptions
    stopped: bool = False  # the stream has ended: calls fail without reaching the plugin
    reader: asyncio.Task[None] | None = None  # reads the ListAndWatch stream

    def emit(self, event: str, **more: Any) -> None:
        emit(event, resource=self.resource, endpoint=self.endpoint, **more)


class Held(NamedTuple):
    ids: list[str]
    answer: Any  # asked for once, used again for every start (contract 13)


def invalid_registration(request: Any) -> str:
    """Why the kubelet refuses to register this, in its words where they are known (contract 2)."""
    limits = r"(?!requests\.|.*kubernetes\.io/)(?=[^/]{1,244}/.{1,63}$)"
    label, name = "[a-z0-9]([-a-z0-9]*[a-z0-9])?", "[A-Za-z0-9]([A-Za-z0-9_.-]*[A-Za-z0-9])?"
    if request.version != "v1beta1":
        return f'requested API version "{request.version}" is not supported by kubelet'
    if not re.fullmatch(rf"{limits}{label}(\.{label})*/{name}", request.resource_name):
        return f'the ResourceName "{request.resource_name}" is invalid'
    if not request.endpoint or "/" in request.endpoint:
        return f'the endpoint "{request.endpoint}" is not a file name'
    return ""


async def splice(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Pass on all bytes, and the end."""
    with contextlib.suppress(ConnectionError):
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
    writer.close()


@dataclass
class FakeKubelet:
    """The kubelet's device manager. What it sees or decides is one JSON line each on stdout.

    A method do_x(...) is what a test calls as kubelet.x(...)."""

    root: str
    generation: str = "1.36"  # or "1.20"
    listen_delay: float = 0.0  # between bind, when the file is visible, and listen
    dial_delay: float = 0.0  # 1.20: between the answer to Register and the dial-back
    dial_limit: float = DIAL_S
    faults: Counter[str] = field(default_factory=Counter)  # name: how many times it still happens
    fault_code = "UNAVAILABLE"

    def __post_init__(self) -> None:
        self.old = self.generation == "1.20"
        self.folder = Path(self.root) / "device-plugins"
        self.checkpoint = self.folder / "kubelet_internal_checkpoint"
        self.faults = Counter(self.faults)
        self.clients: dict[str, Client] = {}  # the newest of each resource, while it is connected
        self.endpoints: dict[str, Client] = {}  # who is asked for a Pod: the newest, even if dead
        self.devices: dict[str, dict[str, Device]] = {}
        self.status: dict[str, tuple[int, int]] = {}  # as last emitted: capacity, allocatable
        self.held: dict[str, dict[str, Held]] = {}  # Pod: resource: what its one container holds
        self.admission = asyncio.Lock()  # a slow plugin stalls all Pods (contract 12)
        self.tasks: set[asyncio.Task[Any]] = set()

    async def do_start(self) -> None:
        """Contract 1: the folder, no socket in it but ours, visible a moment before it listens."""
        self.folder.mkdir(mode=0o750, parents=True, exist_ok=True)
        removed = []
        for entry in sorted(self.folder.iterdir()):
            with contextlib.suppress(FileNotFoundError):  # its plugin may remove it meanwhile
                if stat.S_ISSOCK(entry.lstat().st_mode):
                    entry.unlink()
                    removed.append(entry.name)
        # A restarted kubelet knows its Pods and the resources' names, but no device yet.
        data = json.loads(self.checkpoint.read_text()) if self.checkpoint.exists() else {}
        self.devices = {resource: {} for resource in data.get("registered", ())}
        for pod, holder in data.get("held", {}).items():
            self.held[pod] = {one: Held(*held) for one, held in holder.items()}
        # gRPC binds and listens in one go: it serves a name in no folder, and the socket that
        # plugins see passes bytes on to it.
        inner = f"fake-kubelet-{os.getpid()}"
        self.server = grpc.aio.server()  # kept: a server that nobody refers to stops
        serve(self.server, "Registration", lambda _: self.register)
        self.server.add_insecure_port(f"unix-abstract:{inner}")
        await self.server.start()
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.bind(str(self.folder / "kubelet.sock"))
        emit("bound", removed=removed)
        await asyncio.sleep(self.listen_delay)

        async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            theirs = await asyncio.open_unix_connection(f"\0{inner}")
            await asyncio.gather(splice(reader, theirs[1]), splice(theirs[0], writer))

        self.listener = await asyncio.start_unix_server(connected, sock=sock)
        emit("listening")

    # Registration

    async def register(self, request: Any, context: Any) -> Any:
        """Contract 2: 1.20 returns at once and dials later, 1.36 dials before it returns."""
        emit("register", **as_dict(request))
        unknown = grpc.StatusCode.UNKNOWN  # what a plain Go error becomes
        if self.fault("register_fails"):
            code = getattr(grpc.StatusCode, self.fault_code)
            await context.abort(code, "the fake kubelet was told to fail")
        if self.fault("register_hangs"):
            await asyncio.Event().wait()
        if problem := invalid_registration(request):
            emit("rejected", problem=problem)
            await context.abort(unknown, problem)
        address = str(self.folder / request.endpoint)
        authority = [("grpc.default_authority", address)] * self.old  # of its Go library
        channel = grpc.aio.insecure_channel(f"unix:{address}", [LOCAL, *authority])
        client = Client(request.resource_name, request.endpoint, channel, request.options)
        if self.old:
            self.spawn(self.dial(client))
        elif problem := await self.dial(client):
            await context.abort(unknown, f"failed to dial {request.endpoint}: {problem}")
        return MESSAGES["Empty"]()

    async def dial(self, client: Client) -> str:
        """What went wrong, if anything, which 1.20 logs and tells nobody. It dials later, and takes
        the options of the request. The newest client of a resource takes the place of the one
        before, whose stream stays."""
        try:
            if self.old:
                await asyncio.sleep(self.dial_delay)
            else:
                self.clients[client.resource] = client
            await asyncio.wait_for(client.channel.channel_ready(), self.dial_limit)
            if not self.old:
                ask = stub(client.channel, "DevicePlugin", "GetDevicePluginOptions")
                client.options = await ask(MESSAGES["Empty"]())
                client.emit("options", **as_dict(client.options))
        except (asyncio.TimeoutError, grpc.aio.AioRpcError) as error:
            if not self.old:  # the client before is forgotten, too
                self.clients.pop(client.resource, None)
            client.emit("dial_failed", error=repr(error))
            await client.channel.close()
            return repr(error)
        if self.old:
            self.clients[client.resource] = client
        self.endpoints[client.resource] = client
        if self.fault("no_stream"):
            client.emit("no_stream")
        else:  # the one stream of this registration: there is no second (contract 3)
            client.reader = self.spawn(self.watch(client))
        return ""

    async def watch(self, client: Client) -> None:
        """Read the stream until it ends, whoever ends it."""
        stream = stub(client.channel, "DevicePlugin", "ListAndWatch")(MESSAGES["Empty"]())
        client.emit("stream")
        how = "OK"
        try:
            drop = self.fault("drop_streams")
            async for message in stream:
                self.receive(client, message)
                if drop:
                    raise asyncio.CancelledError
        except grpc.aio.AioRpcError as error:
            how = f"{error.code().name}: {error.details()}"
        except asyncio.CancelledError:  # by drop_stream, or by the race
            how = "closed by the kubelet"
        stream.cancel()
        client.emit("stream_end", how=how)
        client.stopped = True
        await client.channel.close()
        # Contract 4 and 5: the client to disconnect is looked up by the resource's *name*: if a
        # plugin registered anew meanwhile, that is the new one, which nobody will ever dial again.
        # (The code of 1.20 compared clients; the contract's harsher words hold here.)
        if victim := self.clients.pop(client.resource, None):
            victim.stopped = True
            victim.emit("disconnected", ended=client.endpoint)
            if victim is not client and victim.reader:
                victim.reader.cancel()
            for device in self.devices.get(client.resource, {}).values():
                device.healthy = False
            self.update(client.resource)

    def receive(self, client: Client, message: Any) -> None:
        """Each message is the whole list (contract 8)."""
        devices = self.devices[client.resource] = {}
        for one in message.devices:
            numa = [node.ID for node in one.topology.nodes] if one.HasField("topology") else None
            devices[one.ID] = Device(one.health == "Healthy", numa)
        client.emit("devices", devices={one.ID: one.health for one in message.devices})
        self.save_checkpoint()
        self.update(client.resource)

    def healthy(self, resource: str) -> list[str]:
        return [name for name, one in self.devices.get(resource, {}).items() if one.healthy]

    def update(self, resource: str) -> None:
        """Unhealthy devices count as capacity, but are not allocatable."""
        status = (len(self.devices.get(resource, {})), len(self.healthy(resource)))
        if status != self.status.get(resource):
            self.status[resource] = status
            emit("status", resource=resource, capacity=status[0], allocatable=status[1])

    def free(self, resource: str) -> list[str]:
        """Healthy, and held by no container."""
        holders = self.held.values()
        used = {name for holder in holders if (one := holder.get(resource)) for name in one.ids}
        return [name for name in self.healthy(resource) if name not in used]

    async def do_hints(self, resource: str, size: int) -> list[list[int]] | None:
        """Contract 10: on which sets of NUMA nodes can so many free devices be had? None: no
        device has a topology. An empty list: on none, and strict policies reject the Pod."""
        devices = self.devices.get(resource, {})
        if all(device.numa is None for device in devices.values()):
            return None
        free = [set(devices[name].numa or ()) for name in self.free(resource)]
        masks = ([0], [1], [0, 1])
        return [mask for mask in masks if sum(bool(numa & {*mask}) for numa in free) >= size]

    # Calls for a Pod

    async def do_rpc(self, resource: str, method: str, request: Any, timeout: Any = 10.0) -> Any:
        """One call as it is, malformed ones, too, to the plugin that registered last."""
        client = self.endpoints.get(resource)
        if client is None or client.stopped:
            text = "has been stopped" if client else "is not registered"
            raise Refusal("KUBELET", f"the endpoint of {resource} {text}")
        message = MESSAGES[SERVICES["DevicePlugin"][method].split()[0]]()
        json_format.ParseDict(request, message)
        try:
            call = stub(client.channel, "DevicePlugin", method)
            return as_dict(await call(message, timeout=timeout))
        except grpc.aio.AioRpcError as error:
            raise Refusal(error.code().name, error.details() or "") from error

    async def do_allocate(self, resource: str, ids: list[str], timeout: Any = 10.0) -> Any:
        """Allocate for one container, in random order, as the kubelet keeps sets: its answer."""
        request = {"container_requests": [{"devices_ids": random.sample(ids, len(ids))}]}
        answer = await self.do_rpc(resource, "Allocate", request, timeout)
        if len(answers := answer["container_responses"]) != 1:
            raise Refusal("KUBELET", "no containers return in allocation response")
        return answers[0]

    async def do_pre_start(self, resource: str, ids: list[str]) -> None:
        """PreStartContainer, in random order."""
        request = {"devices_ids": random.sample(ids, len(ids))}
        await self.do_rpc(resource, "PreStartContainer", request, PRE_START_S)

    async def do_admit(self, pod: str, want: dict[str, int], must: Any = None) -> dict[str, Any]:
        """Admit a container that wants so many of each resource (contract 9, 12, 13): ids, envs,
        mounts, devices, cdi_devices. `must` are ids that its init container held, by resource."""
        async with self.admission:
            holder = self.held.setdefault(pod, {})
            for resource, size in want.items():
                if resource in holder:  # after a restart: the very same ids, and healthy
                    healthy = self.healthy(resource)
                    if missing := [name for name in holder[resource].ids if name not in healthy]:
                        text = f"previously allocated devices are no longer healthy; {missing}"
                        none = f"no healthy devices present; cannot allocate {resource}"
                        raise Refusal("UnexpectedAdmissionError", text if healthy else none)
                    continue
                ids = sorted(await self.choose(resource, size, (must or {}).get(resource, [])))
                holder[resource] = Held(ids, await self.do_allocate(resource, ids, None))
                emit("allocated", pod=pod, resource=resource, ids=ids)
                self.save_checkpoint()
            return {"ids": {name: held.ids for name, held in holder.items()}, **self.merged(pod)}

    async def choose(self, resource: str, size: int, must: list[str]) -> list[str]:
        """Free ids: those that the plugin prefers, filled up at random."""
        available = self.free(resource)
        available += [name for name in must if name not in available]  # an init container's
        if len(available) < size:
            text = f"requested number of devices unavailable for {resource}. "
            text += f"Requested: {size}, Available: {len(available)}"
            raise Refusal("UnexpectedAdmissionError", text)
        random.shuffle(available)
        chosen, client = list(must), self.endpoints.get(resource)
        if client and client.options.get_preferred_allocation_available:
            one = {"available_deviceIDs": available, "must_include_deviceIDs": must}
            request = {"container_requests": [{**one, "allocation_size": size}]}
            answer = await self.do_rpc(resource, "GetPreferredAllocation", request, None)
            (answered,) = answer["container_responses"]
            preferred = answered["deviceIDs"]
            chosen += [name for name in preferred if name in available and name not in chosen]
        return [*chosen, *(name for name in available if name not in chosen)][:size]

    def merged(self, pod: str) -> dict[str, Any]:
        """Contract 14: answers are merged by key; a key's second value is dropped silently."""
        merged: dict[str, dict[str, Any]] = {part: {} for part in PARTS}
        for resource, held in self.held[pod].items():
            for part, key in PARTS.items():
                found = held.answer[part]
                for name, value in [(one[key], one) for one in found] if key else found.items():
                    if merged[part].setdefault(name, value) != value:
                        emit("conflict", kind=part, resource=resource, key=name)
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
                await self.do_pre_start(resource, held.ids)
        options = self.merged(pod)
        for spec in options["devices"]:
            # containerd follows symbolic links anew at each start (contract 16).
            host = f"{Path(self.root).parent}{spec['host_path']}"
            spec["resolved"] = os.path.realpath(host)
            if not os.path.exists(host):
                raise Refusal("RunContainerError", f"{host} does not exist")
        return options

    async def do_delete_pod(self, pod: str) -> None:
        """Its devices are free again."""
        del self.held[pod]
        self.save_checkpoint()

    def save_checkpoint(self) -> None:
        """Contract 9: who holds what, and what was registered, outlives it, if it can."""
        draft = self.checkpoint.with_name(f".{self.checkpoint.name}")
        with contextlib.suppress(OSError):
            draft.write_text(json.dumps({"held": self.held, "registered": list(self.devices)}))
            draft.replace(self.checkpoint)

    async def do_faults(self, code: str = "", **counts: int) -> None:
        """From now on, so many times each: register_fails (with this status code), register_hangs,
        no_stream (none follows a Register), drop_streams (each ends after its first message)."""
        self.fault_code = code or self.fault_code
        self.faults.update(counts)

    async def do_drop_stream(self, resource: str) -> float:
        """End the resource's stream from this side, and nothing else. When it did so."""
        if (client := self.clients.get(resource)) and client.reader:
            client.emit("dropped")
            client.reader.cancel()
        return time.monotonic()

    def fault(self, name: str) -> bool:
        """Whether this fault is due; each counts down, so "3" is three times and then no more."""
        due = self.faults[name] > 0
        self.faults[name] -= due
        return due

    def spawn(self, work: Awaitable[Any]) -> asyncio.Task[Any]:
        """A task that is kept until it is done: the event loop refers to it only weakly."""
        task: asyncio.Task[Any] = asyncio.ensure_future(work)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)
        return task


def emit(event: str, **fields: Any) -> None:
    """time.monotonic is the same clock in every process of a Linux host."""
    print(json.dumps({"t": time.monotonic(), "event": event, **fields}), flush=True)


async def take_commands() -> None:
    """One JSON line each from stdin, until told to stop or until the test is gone. The first is
    {"id": 1, "command": "start", "args": [], "more": {"root": DIR, ... fields of FakeKubelet}}."""
    loop = asyncio.get_running_loop()
    # A kubelet that ends leaves its sockets as they are, so nothing here may tidy up.
    loop.add_signal_handler(signal.SIGTERM, os._exit, 0)
    reader = asyncio.StreamReader(limit=1 << 26)
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    emit("prepared", pid=os.getpid())
    kubelet: FakeKubelet | None = None

    async def obey(request: dict[str, Any]) -> None:
        number, work = request["id"], getattr(kubelet, "do_" + request["command"])
        try:
            emit("reply", id=number, result=await work(*request["args"], **request["more"]))
        except Exception as error:
            refusal = error if isinstance(error, Refusal) else Refusal("BUG", repr(error))
            emit("reply", id=number, code=refusal.code, message=refusal.message)

    while line := await reader.readline():
        request = json.loads(line)
        if not kubelet:
            kubelet, request["more"] = FakeKubelet(**request["more"]), {}
        kubelet.spawn(obey(request))
    os._exit(0)


def fake_kubelet() -> None:
    """The program: a kubelet for each pair of descriptors that comes from stdin, a socket. A fork
    takes milliseconds, whereas Python's imports take a quarter of a second."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for them
    orders = socket.socket(fileno=0)
    while fds := socket.recv_fds(orders, 1, 2)[1]:
        if not os.fork():
            orders.detach()
            os.dup2(fds[0], 0)
            os.dup2(fds[1], 1)
            asyncio.run(take_commands())
        for fd in fds:
            os.close(fd)


if __name__ == "__main__":
    fake_kubelet()
    sys.exit()

####################################################################################################
# 3. The harness
####################################################################################################

Item = TypeVar("Item")
Fits = Callable[[Any], Any]  # of an item: whether it is meant
Event = dict[str, Any]  # one line of the fake kubelet
Finished = subprocess.CompletedProcess[str]
SAID: set[str] = set()  # what plugins said in this session: log lines, outputs, refusals


@dataclass
class Log(Generic[Item]):
    """What another process said, in order. Tests wait on a condition and never poll."""

    name: str
    items: list[Item] = field(default_factory=list)
    closed: bool = False  # nothing will follow
    changed: threading.Condition = field(default_factory=threading.Condition)

    def append(self, *items: Item, closed: bool = False) -> None:
        """Called by the thread that reads."""
        with self.changed:
            self.items += items
            self.closed = closed
            self.changed.notify_all()

    def mark(self) -> int:
        """Now, as a position: pass it as `after` to see only what follows."""
        return len(self.items)

    def seen(self, fits: Fits, after: int = 0) -> list[Item]:
        """All that fit and came so far."""
        return [item for item in self.items[after:] if fits(item)]

    def wait_for(self, fits: Fits, timeout: float, after: int = 0, what: str = "that") -> Item:
        """The first item after the position that fits, waiting for it if need be."""
        with self.changed:
            self.changed.wait_for(lambda: self.seen(fits, after) or self.closed, timeout)
            if found := self.seen(fits, after):
                return found[0]
        tail = "\n  ".join(map(str, self.items[-25:]))
        ended = " before it ended" if self.closed else ""
        text = f"no {what} from {self.name} in {timeout} s{ended}; its last:\n  {tail}"
        raise AssertionError(text)

    def never(self, fits: Fits, seconds: float, after: int) -> None:
        """Nothing that fits comes after the position within so many seconds from now."""
        with self.changed:
            found = self.changed.wait_for(lambda: self.seen(fits, after), seconds)
        assert not found, f"{self.name} said {found[0]}, which nothing had caused"


def fits(event: str, fields: Event) -> Fits:
    """A predicate for events of this kind, with these fields; a field may be a predicate itself."""
    wanted = {"event": event, **fields}.items()
    return lambda event: all(
        one(event.get(name)) if callable(one) else event.get(name) == one for name, one in wanted
    )


class Kubelet:
    """A fake kubelet on one folder, over any number of its lives: start, stop, kill, start again.

    Most methods that wait take `after`, a position of `log.mark()`."""

    nursery: socket.socket | None = None  # to the process that forks kubelets, one for all tests
    nurse: subprocess.Popen[bytes]

    def __init__(self, root: Path, generation: str = "1.36") -> None:
        self.root, self.generation, self.folder = root, generation, root / "device-plugins"
        self.log: Log[Event] = Log(f"the fake kubelet {generation}")  # all lives of it
        self.stdin: IO[str] | None = None  # of the present life, or of the prepared one
        self.numbers = itertools.count(1)
        self.answering = 0.0  # when the present life began to answer

    def prepare(self) -> None:
        """Make the next life's process, unless one lives; it does nothing until start()."""
        if self.stdin:
            return
        if not Kubelet.nursery:
            Kubelet.nursery, theirs = socket.socketpair()
            words = [sys.executable, __file__, "--fake-kubelet"]
            Kubelet.nurse = subprocess.Popen(words, stdin=theirs.fileno())
            theirs.close()
        (in_read, in_write), (out_read, out_write) = os.pipe(), os.pipe()
        socket.send_fds(Kubelet.nursery, [b"1"], [in_read, out_write])
        os.close(in_read)
        os.close(out_write)
        self.stdin = os.fdopen(in_write, "w")

        def read() -> None:
            with os.fdopen(out_read) as lines:
                for line in lines:
                    self.log.append(json.loads(line))

        mark = self.log.mark()
        self.reader = threading.Thread(target=read, daemon=True)
        self.reader.start()
        self.pidfd = os.pidfd_open(self.wait("prepared", timeout=20, after=mark)["pid"])

    def start(self, wait: str = "listening", **settings: Any) -> None:
        """Return when it listens (or is only "bound", with a listen_delay). Settings are fields of
        FakeKubelet, such as listen_delay=2 or faults={"register_fails": 3}."""
        self.prepare()
        mark = self.log.mark()
        self.send("start", root=str(self.root), generation=self.generation, **settings)
        event = self.log.wait_for(lambda event: event["event"] in (wait, "reply"), 10, mark, wait)
        assert event["event"] == wait, event
        self.answering = event["t"]
        if wait == "listening":  # the reply shall be the last event: a test sees what follows
            self.wait("reply", after=mark)

    def send_signal(self, how: signal.Signals) -> None:
        """SIGSTOP pauses it: it keeps its streams, and nobody reads them. SIGCONT resumes."""
        signal.pidfd_send_signal(self.pidfd, how)

    def end(self, how: signal.Signals) -> None:
        """End this life and wait until the process is gone."""
        assert self.stdin
        self.send_signal(how)
        select.select([self.pidfd], [], [])
        os.close(self.pidfd)
        self.reader.join()
        self.stdin.close()
        self.stdin = None

    # Like a real one it leaves its sockets behind. Killed, all its connections break.
    stop = functools.partialmethod(end, signal.SIGTERM)
    kill = functools.partialmethod(end, signal.SIGKILL)
    pause = functools.partialmethod(send_signal, signal.SIGSTOP)
    resume = functools.partialmethod(send_signal, signal.SIGCONT)

    def delete_folder(self) -> None:
        """device-plugins goes in one step: a plugin may remove its socket meanwhile."""
        shutil.rmtree(self.folder.rename(self.folder.with_name("deleted")))

    def close(self) -> None:
        """For the end of the test: nothing of it stays."""
        if self.stdin:
            self.kill()

    def send(self, command: str, *args: Any, **more: Any) -> int:
        """Send a command, and do not wait for the answer; its number finds the reply."""
        number = next(self.numbers)
        request = {"id": number, "command": command, "args": args, "more": more}
        print(json.dumps(request), file=self.stdin, flush=True)
        return number

    def __getattr__(self, command: str) -> Callable[..., Any]:
        """FakeKubelet's do_x as x: its result, or Refusal if the plugin or the kubelet refuses."""
        if not hasattr(FakeKubelet, f"do_{command}"):
            raise AttributeError(command)

        def call(*args: Any, **more: Any) -> Any:
            mark, number = self.log.mark(), self.send(command, *args, **more)
            reply = self.wait("reply", timeout=PRE_START_S + 5, after=mark, id=number)
            if "code" not in reply:
                return reply["result"]
            SAID.add(reply["message"])
            raise Refusal(reply["code"], reply["message"])

        return call

    def wait(self, event: str, *, timeout: float = 5.0, after: int = 0, **fields: Any) -> Event:
        """The first event of this kind and with these fields."""
        return self.log.wait_for(fits(event, fields), timeout, after, f"{event} {fields}")

    def seen(self, event: str, *, after: int = 0, **fields: Any) -> list[Event]:
        """All such events so far."""
        return self.log.seen(fits(event, fields), after)

    def kinds(self, resource: str, after: int = 0) -> list[str]:
        """What came for this resource, in order: register, options, stream, devices, status ..."""
        names = ("resource", "resource_name")
        mine = self.log.seen(lambda event: resource in map(event.get, names), after)
        return [event["event"] for event in mine]

    def wait_status(self, resource: str, capacity: int, allocatable: int, **more: Any) -> float:
        """Wait until the node's status shows this (`timeout`, `after` as for wait); when it did."""
        status = {"resource": resource, "capacity": capacity, "allocatable": allocatable}
        return float(self.wait("status", **{**status, **more})["t"])

    def wait_health(self, resource: str, name: str, health: str, **more: Any) -> float:
        """Wait until the plugin has sent this health of this device; when it did."""
        more["devices"] = lambda sent: sent.get(name) == health
        return float(self.wait("devices", resource=resource, **more)["t"])

    def ids(self, resource: str) -> list[str]:
        """The ids of the newest list."""
        return sorted(self.seen("devices", resource=resource)[-1]["devices"])


@dataclass(frozen=True)
class Chip:
    """One PCIe device. What is None is a file that this driver or firmware does not make."""

    bdf: str  # PCI address: what a chip is known by in these tests
    n: int  # /dev/tenstorrent/N
    card_type: str | None = "n150"
    asic_id: str | None = None  # since driver 2.3
    serial: str | None = None
    firmware: str | None = "80.17.0.0"
    heartbeat: bool = True  # since driver 2.7
    arch: str = "wormhole"
    node: str = "/dev/null"  # stands for the device node: a character device that needs no root
    numa: int = 0
    iommu: str | None = "DMA-FQ"
    hwmon: bool = True
    by_id: bool = False  # udev's link, since driver 2.6

    @property
    def id(self) -> str:
        """The card's ID at the kubelet, if this chip is a card of its own."""
        return f"{self.arch}-{self.asic_id}" if self.asic_id else self.bdf


# 54.3 C, 75 C, 240 A and 100 W: captured (tt-smi-s_n150_kmd1.33). The rest is from another plugin's
# unit test, plausible, not captured (sysfs_n150_community-plugin).
SENSORS = "temp1_input=54300 temp1_max=75000 in0_input=795 in0_max=1000 curr1_input=18000 "
SENSORS += "curr1_max=240000 power1_input=15000000 power1_max=100000000"


class Tree:
    """A sysfs and a /dev, as the driver lays them out. Files change atomically, as in sysfs."""

    def __init__(self, root: Path, chips: Sequence[Chip] = (), driver: Any = "2.10.0") -> None:
        self.root, self.sys, self.dev = root, root / "sys", root / "dev"
        self.flags = ["--sysfs-root", str(self.sys), "--dev-root", str(self.dev)]  # the plugin's
        self.drafts = root / "drafts"  # on the same file system, seen by nobody
        self.by_id = self.dev / "tenstorrent/by-id"
        self.chips: dict[str, Chip] = {}
        self.lock = threading.Lock()  # the hearts beat in a thread of their own
        self.beats = itertools.count(1_000_000)
        self.still: set[str] = set()  # whose hearts do not beat: a test adds and discards
        for folder in (self.drafts, self.dev, self.sys / "bus/pci/devices"):
            folder.mkdir(parents=True)
        self.write(self.sys / "devices/system/node/online", "0-1\n")
        if driver:  # None: it is not loaded
            (self.sys / "class/tenstorrent").mkdir(parents=True)
            self.write(self.sys / "module/tenstorrent/version", f"{driver}\n")
        for chip in chips:
            self.add(chip)

    def pci(self, bdf: str) -> Path:
        """The PCI device's folder."""
        return self.sys / "devices" / f"pci{bdf[:7]}" / bdf

    def entry(self, bdf: str) -> Path:
        """The folder of the driver's attributes, behind the link in the class."""
        return self.pci(bdf) / "tenstorrent" / f"tenstorrent!{self.chips[bdf].n}"

    def node(self, bdf: str) -> Path:
        """The device node."""
        return self.dev / "tenstorrent" / str(self.chips[bdf].n)

    def path(self, bdf: str, file: str) -> Path:
        """One of the driver's files, or `device/...`, one of the PCI device's."""
        inside = file.removeprefix("device/")
        return self.entry(bdf) / file if inside == file else self.pci(bdf) / inside

    def write(self, path: Path, text: str | bytes) -> None:
        """A file that is never seen half written. In sysfs a new value changes no folder's times,
        so one of the same length does not do so here."""
        data = text.encode() if isinstance(text, str) else text
        if path.is_file() and path.stat().st_size == len(data):
            with path.open("r+b", buffering=0) as file:
                file.write(data)
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = self.drafts / f"{threading.get_ident()}"
        draft.write_bytes(data)
        draft.replace(path)

    def set(self, bdf: str, file: str, text: str | bytes | None) -> None:
        """Write a file of path(); None removes it."""
        if text is None:
            self.path(bdf, file).unlink()
        else:
            self.write(self.path(bdf, file), text)

    def add(self, chip: Chip) -> None:
        """The PCI device is probed: attributes first, the link in the class last."""
        with self.lock:
            assert chip.n not in [other.n for other in self.chips.values()], chip
            entry, rdev = f"tenstorrent/tenstorrent!{chip.n}", os.stat(chip.node).st_rdev
            files: dict[str, Any] = {
                "vendor": "0x1e52",
                "device": "0x401e" if chip.arch == "wormhole" else "0xb140",
                "numa_node": chip.numa,
                f"{entry}/dev": f"{os.major(rdev)}:{os.minor(rdev)}",
                f"{entry}/tt_card_type": chip.card_type,
                f"{entry}/tt_asic_id": chip.asic_id,
                f"{entry}/tt_serial": chip.serial,
                f"{entry}/tt_fw_bundle_ver": chip.firmware,
                f"{entry}/tt_heartbeat": next(self.beats) if chip.heartbeat else None,
                f"{entry}/tt_aiclk": 500 if chip.card_type else None,
            }
            for sensor in f"name={chip.arch} {SENSORS}".split() if chip.hwmon else ():
                name, _, value = sensor.partition("=")
                files[f"hwmon/hwmon{chip.n + 2}/{name}"] = value
            draft = self.drafts / "probe"
            for name, value in files.items():
                if value is not None:
                    self.write(draft / name, f"{value}\n")
            (draft / entry / "device").symlink_to("../..")
            if chip.iommu:
                group = f"kernel/iommu_groups/{20 + chip.n}"
                self.write(self.sys / group / "type", f"{chip.iommu}\n")
                (draft / "iommu_group").symlink_to(f"../../../{group}")
            self.chips[chip.bdf] = chip
            self.pci(chip.bdf).parent.mkdir(exist_ok=True)
            draft.rename(self.pci(chip.bdf))
            self.node(chip.bdf).parent.mkdir(exist_ok=True)
            self.node(chip.bdf).symlink_to(chip.node)
            if chip.by_id:
                self.by_id.mkdir(exist_ok=True)
                (self.by_id / chip.id).symlink_to(f"../{chip.n}")
            up = f"../../../devices/pci{chip.bdf[:7]}/{chip.bdf}"
            (self.sys / "bus/pci/devices" / chip.bdf).symlink_to(up)
            link = self.sys / "class/tenstorrent" / self.entry(chip.bdf).name
            link.symlink_to(f"{up[3:]}/{entry}")

    def remove(self, bdf: str, driver: str = "") -> Chip:
        """The chip goes, by hot-unplug or reset: sysfs, device node, and the folder with the last.
        With another driver's name its PCI function stays, bound to that."""
        with self.lock:
            (self.sys / "class/tenstorrent" / self.entry(bdf).name).unlink()
            self.node(bdf).unlink()
            (self.by_id / self.chips[bdf].id).unlink(missing_ok=True)
            for folder in (self.by_id, self.by_id.parent):
                with contextlib.suppress(OSError):  # there is another one in it, or it is not there
                    folder.rmdir()
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
            (self.drafts / "fifo").replace(self.path(bdf, file))

    def release(self, bdf: str, file: str, text: str) -> None:
        """The reads that hang return with this text, as all later ones do. The heart beats."""
        with self.lock:
            fifo = os.open(self.path(bdf, file), os.O_RDWR | os.O_NONBLOCK)
            self.write(self.path(bdf, file), text)
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
        known = {"asic_id": f"0D0CB6F1E7A5{asic}", "serial": serial, "numa": int(bus > "40")}
        made.append(Chip(f"0000:{bus}:00.0", n, card_type, **{**known, **facts}))
    return tuple(made)


# The first: tt-smi-s_n150_kmd1.33. The serials of the second (plausible, another plugin's test) and
# the third: sysfs_n150_community-plugin, misc_board_ids.
N150 = chips(
    *("n150", "01 0001 0100018611902010", "02 0002 010001851180B42E"),
    *("41 0003 010001851170C06C", "c1 0004 0100018611902014"),
)
N150_OLD_DRIVER = replace(N150[0], asic_id=None, heartbeat=False)  # that host, as it was
# QuietBox (tt-smi-s_quietbox_4xn300_kmd1.34): buses, serials and their order.
N300 = chips(
    *("n300", "c1 0300 010001451172208F", "01 0301 0100014511722053"),
    *("02 0302 010001451172209C", "41 0303 0100014511722058"),
)
# A p300's two chips with one serial: derived, not captured (derived_blackhole_boards).
P300 = chips("p300a", *(f"0{n} 0B0{n - 3} 000004513190F004" for n in (3, 4)), arch="blackhole")
P300_ID = "p300-000004513190F004"
# Character devices that every host has, for tests in which chips must not look alike.
NODES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom")
R150, R300 = "tenstorrent.com/n150", "tenstorrent.com/n300"


def galaxy_chips(arch: str, **facts: Any) -> tuple[Chip, ...]:
    """A Galaxy's 32 chips by bus (tt-smi-s_galaxy-wh_32; Blackhole's by the driver's rule)."""
    serial = "0100035100000000" if arch == "wormhole" else "0000047131831011"
    buses = [f"{tray + position:02x}" for tray in range(0, 256, 64) for position in range(1, 9)]
    places = [f"{bus} 6A{bus.upper()} {serial}" for bus in buses]
    return chips(f"galaxy-{arch}", *places, arch=arch, **facts)


class Line(NamedTuple):
    """One line of the plugin's stderr."""

    t: float
    text: str


class Plugin:
    """A running plugin process."""

    def __init__(self, command: Sequence[str], **popen: Any) -> None:
        self.log: Log[Line] = Log("the plugin")
        self.started = time.monotonic()
        self.ended = 0.0
        options = {"stderr": subprocess.PIPE, "text": True, "env": environment(), **popen}
        self.process = subprocess.Popen(command, errors="replace", **options)
        self.reader = threading.Thread(target=self.read, daemon=True)
        self.reader.start()

    def read(self) -> None:
        """In a thread: the lines, and the end, each with its time."""
        assert self.process.stderr
        for line in self.process.stderr:
            self.log.append(Line(time.monotonic(), line.rstrip("\n")))
            SAID.add(line.rstrip("\n"))
        self.process.wait()
        self.ended = time.monotonic()
        self.log.append(closed=True)

    def wait_for_line(self, pattern: str, timeout: float = 5.0, after: int = 0) -> Line:
        """The first line that matches; case does not matter."""
        match = re.compile(pattern, re.IGNORECASE).search
        return self.log.wait_for(lambda line: match(line.text), timeout, after, pattern)

    def lines(self, pattern: str = "", after: int = 0) -> list[str]:
        """The lines so far that match."""
        match = re.compile(pattern, re.IGNORECASE).search
        return [line.text for line in self.log.items[after:] if match(line.text)]

    def send(self, number: signal.Signals) -> float:
        """Send it; when."""
        sent = time.monotonic()
        self.process.send_signal(number)
        return sent

    def end(self, how: signal.Signals = signal.SIGTERM, timeout: float = 10) -> tuple[int, float]:
        """Signal it and wait for the end: exit code and how long it took."""
        sent = self.send(how)
        self.reader.join(timeout)
        text = "\n".join(self.lines())
        assert not self.reader.is_alive(), f"no end on {how.name} in {timeout} s:\n{text}"
        return int(self.process.returncode), self.ended - sent

    def close(self) -> None:
        """For the end of the test: the process is gone, and no traceback went by unseen."""
        self.process.kill()
        self.reader.join(10)
        text = "\n".join(self.lines())
        assert "Traceback (most recent call last)" not in text, text


def environment(**more: str) -> dict[str, str]:
    """This process's, without the plugin's variables."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith("TT_DEVICE_PLUGIN_")}
    return {**clean, **more}


def finish(command: Sequence[str | Path], **options: Any) -> Finished:
    """Any process that ends by itself, with what it said."""
    options = {"capture_output": True, "text": True, "timeout": 600, **options}
    done: Finished = subprocess.run(command, **options)
    return done


def run(command: Sequence[str], *flags: str, timeout: float = 30.0, **variables: str) -> Finished:
    """A plugin process that ends by itself."""
    done = finish([*command, *flags], timeout=timeout, env=environment(**variables))
    assert "Traceback" not in done.stderr, done.stderr
    SAID.update(" ".join(text.split()) for text in (done.stdout, done.stderr))
    return done


class Puppet:
    """A device plugin of another maker, moved by the test."""

    def __init__(self, folder: Path, resource: str, endpoint: str = "a.sock", **announced: Any):
        self.folder, self.resource, self.endpoint = folder, resource, endpoint
        self.announced = announced  # options, the same in both places
        self.lists: queue.Queue[Any] = queue.Queue()  # what the stream sends next; None ends it
        self.answer: dict[str, Any] = {}  # the ContainerAllocateResponse
        self.calls: list[str] = []
        self.server = grpc.server(ThreadPoolExecutor(4))
        serve(self.server, "DevicePlugin", self.behaviour)
        self.server.add_insecure_port(f"unix:{folder / endpoint}")
        self.server.start()

    def behaviour(self, method: str) -> Any:
        """The handler of a method."""

        def watch(_: Any, context: Any) -> Iterator[Any]:
            context.add_callback(lambda: self.lists.put(None))
            while (devices := self.lists.get()) is not None:
                yield MESSAGES["ListAndWatchResponse"](devices=devices)

        def reply(message: Any, _: Any) -> Any:
            self.calls.append(method)
            asked = as_dict(message).get("container_requests", [{}])[0]
            ids = sorted(asked.get("available_deviceIDs", ()))[: asked.get("allocation_size", 0)]
            answers: dict[str, Event] = {
                "GetDevicePluginOptions": self.announced,
                "GetPreferredAllocation": {"container_responses": [{"deviceIDs": ids}]},
                "Allocate": {"container_responses": [self.answer]},
            }
            response = MESSAGES[SERVICES["DevicePlugin"][method].split()[1]]()
            return json_format.ParseDict(answers.get(method, {}), response)

        return watch if method == "ListAndWatch" else reply

    def send(self, **health: Any) -> None:
        """One whole list: id=True, or id=(True, numa_node)."""
        devices: list[Event] = []
        for name, value in health.items():
            healthy, *nodes = value if isinstance(value, tuple) else (value,)
            devices.append({"ID": name, "health": "Healthy" if healthy else "Unhealthy"})
            if nodes:
                devices[-1]["topology"] = {"nodes": [{"ID": node} for node in nodes]}
        self.lists.put(devices)

    def register(self, **fields: Any) -> None:
        """Register, with other values where given; grpc.RpcError if the kubelet refuses."""
        values = {"version": "v1beta1", "endpoint": self.endpoint, "resource_name": self.resource}
        request = MESSAGES["RegisterRequest"](**{**values, "options": self.announced, **fields})
        with grpc.insecure_channel(f"unix:{self.folder / 'kubelet.sock'}", [LOCAL]) as channel:
            stub(channel, "Registration", "Register")(request, timeout=10)

    def close(self) -> None:
        """The server and its streams end."""
        self.lists.put(None)
        self.server.stop(None).wait()


def sockets(kubelet: Kubelet) -> list[str]:
    """The plugins' sockets in the kubelet's folder."""
    found = (path.name for path in kubelet.folder.glob("*") if path.is_socket())
    return sorted(name for name in found if name != "kubelet.sock")


@contextlib.contextmanager
def refused(code: str, *words: str) -> Iterator[None]:
    """What is inside is refused with this status, and a message with these words (any case)."""
    with pytest.raises(Refusal) as caught:
        yield
    assert caught.value.code == code, caught.value
    missing = [word for word in words if word.lower() not in caught.value.message.lower()]
    assert not missing, f"{caught.value.message!r} does not say {missing}"


# Fixtures

Launch = Callable[..., Plugin]
Puppets = Callable[..., Puppet]
LONG = bool(os.environ.get("TT_TEST_LONG"))  # ./build.sh test --long

long_only = pytest.mark.skipif(not LONG, reason="takes long: ./build.sh test --long")
both_generations = pytest.mark.parametrize("kubelet", ["1.36", "1.20"], indirect=True)


@pytest.fixture
def room() -> Iterator[Path]:
    """A folder with a short name: a socket's path may have 107 bytes, and tmp_path takes most."""
    folder = Path(tempfile.mkdtemp(prefix="tt-"))
    folder.chmod(0o755)  # also for tests that run the plugin as another user
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


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
def command() -> list[str]:
    """How to run the plugin that is read here."""
    return [sys.executable, str(HERE / "tt_device_plugin.py")]


@pytest.fixture
def launch(command: list[str]) -> Iterator[Launch]:
    """Start plugins: launch(tree, kubelet, "--more", "flags"). They end with the test."""
    with contextlib.ExitStack() as stack:

        def start(tree: Tree | None, kubelet: Kubelet, *flags: str, **popen: Any) -> Plugin:
            words = [*command, "--kubelet-dir", str(kubelet.root), *(tree.flags if tree else [])]
            return stack.enter_context(contextlib.closing(Plugin([*words, *flags], **popen)))

        yield start


@pytest.fixture
def plugin(kubelet: Kubelet, four: Tree, launch: Launch) -> Plugin:
    """One whose four cards the kubelet offers: where most tests begin."""
    kubelet.start()
    started = launch(four, kubelet)
    kubelet.wait_status(R150, 4, 4)
    return started


@pytest.fixture
def puppets(kubelet: Kubelet) -> Iterator[Puppets]:
    """Make puppets in the kubelet's folder: puppets(resource, endpoint, **options)."""
    with contextlib.ExitStack() as stack:

        def make(*args: str, **announced: Any) -> Puppet:
            puppet = Puppet(kubelet.folder, *args, **announced)
            return stack.enter_context(contextlib.closing(puppet))

        yield make


# Times. What follows on what is asserted by events; how soon, once for each promise.

QUIET = 0.1  # the share of the time in which a process may wait for a CPU on a quiet machine
WORST: dict[str, tuple[float, str]] = {}  # what: the worst of this run, with what is promised
Bound = Callable[[str, float, float], None]


def cpu_pressure() -> float:
    """Seconds in which some process of this machine waited for a CPU; 0 if Linux does not say."""
    with contextlib.suppress(OSError):
        return int(Path("/proc/pressure/cpu").read_text().split("total=")[1].split()[0]) / 1e6
    return 0.0


@pytest.fixture
def bound() -> Iterator[Bound]:
    """bound("stream dropped to registered", seconds, 0.1): a promised time, as it was promised.

    If the machine was busy since the test began, or since the last call, then a time that is over,
    by less than a factor of ten, is not held against the plugin: the test goes on, and is reported
    as skipped at its end."""
    before, busy = (time.monotonic(), cpu_pressure()), list[str]()

    def check(what: str, seconds: float, promised: float) -> None:
        nonlocal before
        now = time.monotonic(), cpu_pressure()
        pressure, before = (now[1] - before[1]) / (now[0] - before[0]), now
        text = f"{what}: {seconds * 1000:.1f} ms, promised are {promised * 1000:.0f} ms"
        if promised < seconds < 10 * promised and pressure > QUIET:
            busy.append(f"{text}, but processes waited for a CPU {pressure:.0%} of the time")
            return
        WORST[what] = max(WORST.get(what, (0.0, "")), (seconds, text))
        assert 0 <= seconds <= promised, text

    yield check
    if busy:
        pytest.skip("; ".join(busy))


# This module is a plugin of pytest, too, for these two hooks.
pytest_plugins = [__name__]


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The table of symptoms looks at what the other tests made the plugin say: it comes last."""
    items.sort(key=lambda item: item.name == "test_readme_symptoms")


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """The times that were bound."""
    for _, text in sorted(WORST.values(), key=lambda worst: worst[1]):
        terminalreporter.write_line(f"worst: {text}")


####################################################################################################
# 4. Tests of the wire and of the fake kubelet
####################################################################################################

X = "example.com/x"


def test_wire() -> None:
    """The plugin's stubs have exactly the table's messages and methods, and call its paths."""
    stubs = importlib.import_module("api_pb2").DESCRIPTOR
    found, wanted = descriptor_pb2.FileDescriptorProto(), descriptor_pb2.FileDescriptorProto()
    stubs.CopyToProto(found)
    MESSAGES["Empty"].DESCRIPTOR.file.CopyToProto(wanted)
    by_name = [{one.name: one for one in file.message_type} for file in (found, wanted)]
    assert found.package == wanted.package and by_name[0] == by_name[1]
    methods, text = dict[str, dict[str, str]](), (HERE / "api_pb2_grpc.py").read_text()
    for service in found.service:
        for one in service.method:
            types = f"{one.input_type} {'*' * one.server_streaming}{one.output_type}"
            methods.setdefault(service.name, {})[one.name] = types.replace(".v1beta1.", "")
            assert f"'/v1beta1.{service.name}/{one.name}'" in text
    assert methods == SERVICES


def test_stubs_are_generated_from_the_proto(tmp_path: Path) -> None:
    """`./build.sh stubs DIR` makes the committed stubs, byte for byte."""
    done = finish([HERE / "build.sh", "stubs", tmp_path])
    if done.returncode == 3:  # the old generator has no wheel for CPython 3.13 and later
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stderr
    for name in ("api_pb2.py", "api_pb2_grpc.py"):
        assert (tmp_path / name).read_bytes() == (HERE / name).read_bytes(), name


def test_kubelet_start_clears_sockets(kubelet: Kubelet) -> None:
    """Contract 1: of mode 0750; sockets go, files stay; one is bound, and listens later."""
    path = kubelet.folder / "kubelet.sock"
    (kubelet.folder / "folder").mkdir(parents=True)
    (kubelet.folder / "file").touch()
    with socket.socket(socket.AF_UNIX) as one, socket.socket(socket.AF_UNIX) as client:
        one.bind(str(path))
        kubelet.start(wait="bound", listen_delay=0.3)
        assert kubelet.seen("bound")[0]["removed"] == ["kubelet.sock"]
        inode = path.stat().st_ino
        with pytest.raises(ConnectionRefusedError):
            client.connect(str(path))
        kubelet.wait("listening")
        client.connect(str(path))
    assert path.stat().st_ino == inode
    assert {one.name for one in kubelet.folder.iterdir()} == {"file", "folder", path.name}
    kubelet.kill()
    kubelet.delete_folder()
    kubelet.start()
    assert stat.S_IMODE(kubelet.folder.stat().st_mode) in (0o750, 0o700), "less the umask"


def test_kubelet_judges_registrations(kubelet: Kubelet, puppets: Puppets) -> None:
    """Contract 2: a wrong version, name or endpoint fails the call, and nothing is kept."""
    kubelet.start(dial_limit=0.3)
    puppet = puppets(X)
    names = "n150 x.com/ x.com/-n x.com/n. x.com/a/b X.com/n kubernetes.io/n requests.x/n x.com/"
    wrong: list[tuple[str, Any, str]] = [
        *(("version", value, "not supported") for value in ("", "v1alpha")),
        *(("endpoint", value, "not a file") for value in ("", "/var/puppet.sock")),
        *(("resource_name", name, "invalid") for name in (names + "x" * 64).split()),
        ("endpoint", "nobody.sock", "failed to dial"),
    ]
    for what, value, says in wrong:
        with pytest.raises(grpc.RpcError, match=rf"StatusCode\.UNKNOWN(.|\n)*{says}"):
            puppet.register(**{what: value})
    assert len(kubelet.seen("rejected")) == len(wrong) - 1 and not kubelet.seen("stream")
    assert kubelet.kinds(X)[-2:] == ["register", "dial_failed"]
    longest: Event = {"resource_name": "x.com/" + "aB.-_" * 12 + "xyz"}  # 63 characters may be
    puppet.register(**longest)
    kubelet.wait("stream")


@both_generations
def test_kubelet_generations(kubelet: Kubelet, puppets: Puppets) -> None:
    """Contract 2: 1.20 answers, then dials, with the request's options; 1.36 dials and asks."""
    kubelet.start(dial_delay=0.2)
    puppet = puppets(X, pre_start_required=True)
    puppet.register(options={"pre_start_required": False})
    answered = time.monotonic()
    opened = kubelet.wait("stream")["t"]
    puppet.send(a=True)
    kubelet.wait_status(X, 1, 1)
    kubelet.admit("pod", {X: 1})
    kubelet.start_container("pod")
    if kubelet.generation == "1.20":
        assert opened > answered and puppet.calls == ["Allocate"]
    else:
        assert puppet.calls == ["GetDevicePluginOptions", "Allocate", "PreStartContainer"]
        assert kubelet.kinds(X)[:3] == ["register", "options", "stream"]


def test_kubelet_race(kubelet: Kubelet, puppets: Puppets) -> None:
    """Contract 4, 5, 8: lists are whole; Unhealthy is capacity, missing is not. The end of an older
    stream disconnects the resource's newer client, and leaves nothing allocatable."""
    kubelet.start()
    old, new = (puppets(X, f"{name}.sock") for name in ("old", "new"))
    lists: list[Event] = [{"a": True, "b": True}, {"a": False, "b": True}, {"b": True}]
    old.register()
    for health in lists:
        mark = kubelet.log.mark()
        old.send(**health)
        kubelet.wait_status(X, len(health), sum(health.values()), after=mark)
    new.register()
    new.send(a=True, b=True)
    kubelet.wait_status(X, 2, 2, after=mark)
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
    puppet.answer = {"envs": {"X": "first"}}
    puppet.register()
    puppet.send(a=True, b=True, c=True)
    kubelet.wait_status(X, 3, 3)
    assert kubelet.admit("pod", {X: 2}, {X: ["a"]})["ids"] == {X: ["a", "b"]}
    assert kubelet.start_container("pod")["envs"] == {"X": "first"}
    with refused("UnexpectedAdmissionError", "Requested: 2, Available: 1"):
        kubelet.admit("second", {X: 2})
    kubelet.kill()
    puppet.close()
    kubelet.start()
    with refused("UnexpectedAdmissionError", "no healthy devices"):
        kubelet.admit("pod", {X: 2})
    puppet = puppets(X, pre_start_required=True)
    puppet.answer = {"envs": {"X": "second"}}
    puppet.register()
    mark = kubelet.log.mark()
    puppet.send(a=True, b=False, c=True)
    kubelet.wait_status(X, 3, 2, after=mark)
    with refused("UnexpectedAdmissionError", "['b']"):
        kubelet.admit("pod", {X: 2})
    puppet.send(a=True, b=True, c=True)
    kubelet.wait_status(X, 3, 3, after=mark)
    assert kubelet.admit("pod", {X: 2})["envs"] == {"X": "first"}
    for _ in range(2):
        kubelet.start_container("pod")
    assert puppet.calls == ["GetDevicePluginOptions", "PreStartContainer", "PreStartContainer"]
    kubelet.delete_pod("pod")
    assert kubelet.admit("second", {X: 3})["envs"] == {"X": "second"}


def test_kubelet_merges_by_key(kubelet: Kubelet, puppets: Puppets) -> None:
    """Contract 14: of two resources' values for one name, the second is dropped silently."""
    kubelet.start()
    for number in "12":
        puppet = puppets(X + number, f"{number}.sock")
        device = {"container_path": f"/dev/{number}", "host_path": "/dev/null"}
        puppet.answer = {"envs": {"SHARED": number, f"OWN_{number}": "x"}, "devices": [device]}
        puppet.register()
        puppet.send(a=True)
        kubelet.wait_status(puppet.resource, 1, 1)
    merged = kubelet.admit("pod", {f"{X}1": 1, f"{X}2": 1})
    assert merged["envs"] == {"SHARED": "1", "OWN_1": "x", "OWN_2": "x"}
    assert [one["container_path"] for one in merged["devices"]] == ["/dev/1", "/dev/2"]
    assert kubelet.seen("conflict")[0]["key"] == "SHARED"


def test_kubelet_topology_hints(kubelet: Kubelet, puppets: Puppets) -> None:
    """Contract 10: -1 matches nothing, and one device without topology takes the hints from all."""
    kubelet.start()
    puppet = puppets(X)
    puppet.register()
    cases: list[tuple[Any, Any, int, Any]] = [
        ((True, 0), (True, 1), 1, [[0], [1], [0, 1]]),
        ((True, 0), (True, 1), 2, [[0, 1]]),
        ((True, 0), (False, 1), 1, [[0], [0, 1]]),
        ((True, -1), (True, -1), 1, []),
        ((True, 0), True, 2, []),
        (True, True, 2, None),
    ]
    for a, b, size, hints in cases:
        mark = kubelet.log.mark()
        puppet.send(a=a, b=b)
        kubelet.wait("devices", after=mark)
        assert kubelet.hints(X, size) == hints, (a, b)


####################################################################################################
# 5. Discovery: what sysfs says, and what is known of a chip by it
####################################################################################################

CALM = hypothesis.settings(deadline=None, suppress_health_check=list(hypothesis.HealthCheck))
BDF = N150[0].bdf
FIRST = tt.Chip(BDF, 0)  # the first chip as it is before it is identified
UNREADABLE = "/proc/self/mem"  # a link to it: reading fails with EIO, also for root
NONSENSE = (UNREADABLE, "", "\0\xff/..", "-1", "1" * 5000)
NO_ID = ("F" * 16, "0" * 16, "0d0cb6f1e7a50001", "D0CB6F1E7A50001", "00D0CB6F1E7A50001")
LACKING: dict[str, dict[str, Any]] = {  # file: what is not known without it
    "tt_card_type": {"card_type": "", "unknown": "pending"},
    "tt_asic_id": {"asic_id": "", "unknown": "unidentified"},
    "tt_serial": {"serial": ""},
    "tt_fw_bundle_ver": {"firmware": ""},
    "dev": {"dev": "", "unknown": "pending"},
    "device/device": {"arch": "", "unknown": "unidentified"},
    "device/iommu_group/type": {"iommu": ""},
    "device/numa_node": {"numa_node": None},
}


def rows(text: str) -> pytest.MarkDecorator:
    """Parametrize `row` by a table: columns are two spaces apart, the first one names the row."""
    split = [re.split("  +", line.strip()) for line in text.strip().splitlines()]
    return pytest.mark.parametrize("row", [pytest.param(row, id=row[0]) for row in split])


def chip_of(text: str) -> Chip:
    """A chip: N, bus, type, ASIC id (one digit for 16 of them), serial; "-" for no such file."""
    n, bus, *known = text.split()
    card_type, asic_id, serial = (None if one == "-" else one for one in known)
    arch = "blackhole" if known[0].startswith("p") else "wormhole"
    return Chip(f"0000:{bus}:00.0", int(n), card_type, asic_id and asic_id * 16, serial, arch=arch)


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


@pytest.mark.parametrize("file", LACKING)
def test_what_sysfs_says_of_a_chip(room: Path, file: str) -> None:
    """Each fact is one file's. Missing, not readable and not to be understood are one: not known.
    Only of ASIC ids it is known where there are none: such a chip goes by its PCI address."""
    tree, fault = Tree(room, N150[:1]), "no-node" if file == "dev" else ""
    look = functools.partial(inventory_of(tree).discovery.read, FIRST)
    whole = tt.Chip(BDF, 0, dev="1:3", arch="wormhole", card_type="n150", firmware="80.17.0.0")
    whole = replace(whole, numa_node=0, iommu="DMA-FQ", unknown="")
    whole = replace(whole, asic_id=N150[0].asic_id or "", serial=N150[0].serial or "")
    assert look() == (whole, tt.Reading(1_000_000))
    for text in (*NONSENSE, *(NO_ID if file in ("tt_asic_id", "tt_serial") else ()), None):
        tree.path(BDF, file).unlink()
        if text == UNREADABLE:
            tree.path(BDF, file).symlink_to(UNREADABLE)
        elif text is not None:
            tree.set(BDF, file, text.encode("latin-1"))
        known = {"unknown": ""} if (file, text) == ("tt_asic_id", None) else {}
        chip = replace(whole, **{**LACKING[file], **known})
        assert look() == (chip, tt.Reading(1_000_000, fault)), text


@rows("""
    by address, not N        0 c1 n300 A -, 1 02 n300 B -     n300 wormhole-B 1 +ok,\
 n300 wormhole-A 0 +ok
    half a serial, a p300's  0 03 p300b A 0000045100000000    - 0000:03:00.0 0 ?unidentified
    no serial, a p300's      0 03 p300b A -                   - 0000:03:00.0 0 ?unidentified
    ... or none for now      0 03 p300c A FFFFFFFFFFFFFFFF    - 0000:03:00.0 0 ?unidentified
    no ASIC id for now       0 03 p300c 0 000004513190F004    - 0000:03:00.0 0 ?unidentified
    ... by its driver: 1.33  0 01 n150 - 0100018611902010     n150 0000:01:00.0 0 +ok
    no telemetry (Galaxy)    5 04 - - -                       - 0000:04:00.0 5 ?pending
    all ones                 0 01 unknown F FFFFFFFFFFFFFFFF  - 0000:01:00.0 0 -bus-dead
    ... for a moment         0 01 unknown A FFFFFFFFFFFFFFFF  - 0000:01:00.0 0 ?unidentified
""")
def test_nodes_as_an_expert_would_list_them(room: Path, row: list[str]) -> None:
    """What the first poll makes of a node. (Captured: tt-smi-s_n150, sysfs_p150-early,
    sysfs_no_telemetry_galaxy, hwmon_dead-chip; the p300s: derived_blackhole_boards)"""
    tree = Tree(room, [chip_of(text) for text in row[1].split(", ")])
    if "all ones" in row[0]:
        tree.set(BDF, "tt_heartbeat", "4294967295\n")
    inventory = inventory_of(tree)
    inventory.poll(0.0)
    assert brief(inventory.snapshot) == row[2]


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
    """An ASIC id whose file comes a moment after the others; the firmware after a reset in place.
    Nothing else of a chip that is known: before driver 2.7 a read could oops the kernel."""
    tree, opened = Tree(room, [replace(N150[0], asic_id=None)]), list[int]()
    discovery, late = inventory_of(tree).discovery, tree.path(BDF, "tt_asic_id")
    with just_before(os.open, lambda n: n == 2 and late.write_text("A" * 16)):
        chip, _ = discovery.read(FIRST)
    assert chip.card_id == "wormhole-" + "A" * 16
    tree.set(BDF, "tt_fw_bundle_ver", "80.18.0.0\n")
    with just_before(os.open, opened.append):
        assert discovery.read(chip)[0] == chip and opened == [0]
    with just_before(os.read, bool, errno.ENODATA):
        resetting, _ = discovery.read(chip)
    assert resetting == replace(chip, firmware="")
    assert discovery.read(resetting)[0] == replace(chip, firmware="80.18.0.0")


def test_class_entries(room: Path) -> None:
    """One of the driver's that leads to a PCI function, below root bus and bridges, is a chip. What
    cannot be listed is an error, and not an empty node."""
    tree, bridges = Tree(room, N150[:1]), ("pci10000:40", "10000:40:01.1", "10000:41:00.0")
    discovery, folder = inventory_of(tree).discovery, tree.sys / "class/tenstorrent"
    below = tree.sys.joinpath("devices", *bridges, "10000:42:00.0")
    below.mkdir(parents=True)
    for name in ("by-id", *(f"tenstorrent!{n}" for n in ("", "x", "07", "7x", "1" * 7))):
        (folder / name).symlink_to(tree.entry(BDF))
    (folder / "tenstorrent!2").symlink_to("nowhere")
    for n, target in enumerate((str(below), "device", "/", ".."), start=13):
        (folder / f"tenstorrent!{n}").mkdir()
        (folder / f"tenstorrent!{n}/device").symlink_to(target)
    first, second = ((folder / f"tenstorrent!{n}").stat().st_ino for n in (0, 13))
    other = tt.Chip("10000:42:00.0", 13, second, bridges)
    chips = [tt.Chip(BDF, 0, first, ("pci0000:01",)), other]
    assert sorted(discovery.chips(), key=lambda chip: chip.index) == chips
    shutil.rmtree(tree.sys / "class")
    shutil.rmtree(tree.sys / "module")
    assert (discovery.chips(), discovery.driver_version()) == ([], "")
    (tree.sys / "class").symlink_to("class")
    with pytest.raises(OSError, match="symbolic links"):
        discovery.chips()


def test_inode_tells_class_devices_apart(room: Path) -> None:
    """The times of a folder of sysfs change while the chip is the same. One that is probed anew has
    another inode, is identified anew, and has no past."""
    tree = Tree(room, N150[:1])
    inventory, entry, draft = inventory_of(tree), tree.entry(BDF), tree.drafts / "new"
    inventory.poll(0.0)
    readers, ((chip,),) = {**inventory.readers}, [card.chips for card in inventory.snapshot.cards]
    tree.set(BDF, "tt_serial", "A" * 16)
    os.utime(entry, (1, 1))
    inventory.poll(1.0)
    assert inventory.readers == readers and inventory.snapshot.cards[0].chips == (chip,)
    there = inventory.discovery.chip_at(0)
    assert there and there.class_device == chip.class_device
    shutil.copytree(entry, draft, symlinks=True)
    for old, new in ((entry, tree.drafts / "old"), (draft, entry)):
        old.rename(new)
        there = inventory.discovery.chip_at(0)
        assert not there or there.class_device != chip.class_device
    inventory.poll(2.0)
    assert not inventory.readers.keys() & readers.keys()
    assert inventory.snapshot.cards[0].chips[0].serial == "A" * 16


def test_pci_functions_without_a_device_node(room: Path) -> None:
    """Ours by vendor; listed with the driver that has them, and not offered. It is bound a moment
    before the device node is there."""
    tree = Tree(room, N150)
    inventory, folder = inventory_of(tree), tree.sys / "bus/pci/devices"
    for chip, driver in zip(N150[1:], ("vfio-pci", "tenstorrent", "x"), strict=True):
        tree.remove(chip.bdf, driver=driver)
    (tree.pci(N150[3].bdf) / "driver").unlink()
    tree.write(folder / "0000:99:00.0/vendor", "0x8086\n")
    tree.write(folder / "odd/vendor", "0x1e52\n")
    inventory.poll(0.0)
    listed, cards = brief(inventory.snapshot).split(", "), inventory.snapshot.cards
    assert listed[1:3] == ["- 0000:02:00.0  ?no-driver", "- 0000:41:00.0  ?pending"]
    assert listed[3:] == ["- 0000:c1:00.0  ?no-driver"] and cards[1].chips[0].arch == "wormhole"
    assert " is vfio-pci, not" in cards[1].verdict.reason
    assert " is none, not" in cards[3].verdict.reason
    for chip in N150[1:]:
        (folder / chip.bdf).unlink()
    tree.write(tree.sys / "module/tenstorrent/version", "2.11.0\n")
    inventory.poll(1.0)  # no class device has come or gone
    assert len(inventory.snapshot.cards) == 1 and inventory.snapshot.driver == "2.11.0"


####################################################################################################
# 6. Health: README's table, row by row
####################################################################################################

FAULTS = ("resetting", "bus-dead", "gone", "no-node", "read-hangs", "unreadable")
READINGS = [*map(tt.Reading, (None, 1, 2, 3)), *(tt.Reading(None, fault) for fault in FAULTS)]


# Each poll: time, what is read, kind of the verdict ("=": the same). What is read: a heartbeat; "-"
# for no file; a fault, with a heartbeat after "/" if one is read; or why it is not identified.
@rows("""
    it changes                     0 1 ok, 1 2 ok, 99 3 ok, 200 4 ok
    it wraps, or begins anew       0 4294967294 ok, 13 0 ok, 26 7 ok, 39 3 ok
    no file                        0 - ok, 50 - ok, 99 - ok, 999 - ok
    gone until it is back          0 1 ok, 1 gone =, 99 gone =, 100 1 ok
    hung: equal for over 12 s      0 1 ok, 4 1 ok, 8 1 ok, 12 1 ok, 12.1 1 hung, 99 1 hung
    ... and in 3 reads             0 1 ok, 30 1 ok, 31 1 ok, 32 1 hung
    ... until 2 changes            0 1 ok, 1 1 ok, 2 1 ok, 13 1 hung, 14 2 hung, 15 2 hung, 16 3 ok
    ... and again                  0 1 ok, 1 1 ok, 2 1 ok, 13 1 hung, 14 2 hung, 15 2 hung,\
 16 2 hung, 27 2 hung, 28 3 hung, 29 4 ok
    ... and then no file           0 1 ok, 1 1 ok, 2 1 ok, 13 1 hung, 14 - ok, 15 2 ok
    SIGSTOP is no silence          0 1 ok, 1 1 ok, 600 1 ok, 600.1 2 ok, 601 2 ok
    a reset until 1 change after   0 1 ok, 1 resetting =, 2 7 resetting, 3 8 ok
    ... first seen in it           0 resetting =, 1 1 resetting, 2 1 resetting, 3 2 ok
    ... and no file                0 resetting =, 1 - ok
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
    ... and hung                   0 1 ok, 1 1 ok, 2 1 ok, 13 1 hung, 14 unidentified =, 15 1 hung
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


@CALM
@given(st.lists(st.tuples(st.sampled_from([0.1, 5, 13]), st.sampled_from(READINGS)), max_size=30))
def test_health_of_any_history(polls: list[tuple[float, tt.Reading]]) -> None:
    """Never Healthy while beats are owed, never hung without 12 s and 3 equal reads; a fault that
    is seen is told; and after two more beats any chip is Healthy."""
    history, chip, now = tt.HealthHistory(0.0), replace(FIRST, unknown=""), 0.0
    owed, hung, equal = 0, False, list[tuple[float, int]]()  # when the newest heartbeat was read
    for pause, reading in polls:
        now += pause
        kind = history.update(chip, reading, now).kind
        if reading.fault in ("resetting", "bus-dead"):
            owed, hung, equal = 1, False, []
        elif reading.heartbeat is None:
            owed = owed if reading.fault else 0
        elif equal and equal[-1][1] != reading.heartbeat:
            owed, equal = max(0, owed - 1), [(now, reading.heartbeat)]
        else:
            equal.append((now, reading.heartbeat))
        if kind == "hung" and not (owed and hung):
            assert len(equal) > 3 and now - equal[0][0] > 12
            owed, hung = 2, True
        expected = ("hung", "resetting", "bus-dead") if owed else (reading.fault or "ok",)
        seen = reading.fault and reading.fault != "unreadable"
        assert kind == reading.fault if seen else kind in expected
    verdicts = [history.update(chip, tt.Reading(beat), now + beat) for beat in (7, 8, 9)]
    assert verdicts[-1] == tt.Verdict()


####################################################################################################
# 7. Cards: no chip under two IDs, whatever happens; and what becomes of a card
####################################################################################################

# Chips as chip_of() has them, and the one name of the card that each is part of, at all times.
ACTORS = {
    "a": ("0 03 p300a A 000004513190F004", "p300 P300"),
    "b": ("1 04 p300a B 000004513190F004", "p300 P300"),
    "d": ("2 05 p300c D 000004613193411B", "p300 p300-000004613193411B"),
    "e": ("3 06 p300c E 000004613193411B", "p300 p300-000004613193411B"),
    "f": ("4 07 p300a 7 0000045100000000", "it cannot be paired"),
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
    *({"tt_asic_id": text} for text in ("F" * 16, "0" * 16, "junk")),
    *({"tt_serial": text} for text in ("F" * 16, "0" * 16, "junk")),
    *({"tt_card_type": "unknown", "tt_serial": text} for text in ("F" * 16, "0" * 16)),
    dict.fromkeys(("tt_card_type", "tt_asic_id", "tt_serial")),
]
# A poll: is the plugin started anew? How far have the chips moved? Each is away (None), or has
# something wrong with its files, or nothing, and a fault, or none.
WAYS = st.sampled_from((0, 0, 0, 0, *range(len(WRONG))))
STATE = st.none() | st.tuples(WAYS, st.sampled_from(("", "", *FAULTS)))
POLLS = st.tuples(st.booleans(), st.integers(0, 3), st.tuples(*[STATE] * len(NODE)))


@pytest.fixture
def looks(room: Path) -> list[list[tt.Chip]]:
    """What discovery makes of NODE's chips if all are wrong in one way, for each way."""
    tree, found = Tree(room, [chip for chip, _ in NODE]), []
    chips = [tt.Chip(chip.bdf, chip.n) for chip, _ in NODE]
    with ThreadPoolExecutor(len(NODE)) as pool:  # it looks again at what makes no sense, later
        for wrong in WRONG:
            for chip, _ in NODE:
                ids = {"tt_asic_id": chip.asic_id, "tt_serial": chip.serial}
                for file, text in {"tt_card_type": chip.card_type, **ids, **wrong}.items():
                    tree.set(chip.bdf, file, text)
            found.append(list(pool.map(inventory_of(tree).discovery.identify, chips)))
    return found


@CALM
@given(st.lists(POLLS, min_size=1, max_size=6), st.randoms(use_true_random=False))
def test_no_chip_is_healthy_under_two_ids(
    looks: list[list[tt.Chip]], polls: list[Any], order: random.Random
) -> None:
    """Chips come and go, change slots and numbers, have telemetry or not, are not identified for a
    while, and the plugin forgets all: a Healthy card has the name that its hardware says, and all
    its chips. What was offered stays, no chip is left out, and the order of reading is nothing."""
    snapshot, offered = tt.Snapshot(), set[str]()
    for now, (restarted, shift, states) in enumerate([*polls, (False, 0, [(0, "")] * len(NODE))]):
        if restarted:
            snapshot, offered = tt.Snapshot(), set()
        poll, owner = list[tt.Judged](), dict[str, str]()
        for n, state in enumerate(states):
            if state:
                pci = f"0000:{(n + shift) % len(NODE):02x}:00.0"
                chip = replace(looks[state[0]][n], pci=pci, index=n ^ shift)
                verdict = tt.HealthHistory(0.0).update(chip, tt.Reading(1, state[1]), now)
                poll, owner[pci] = [*poll, (chip, verdict)], NODE[n][1]
        shuffled, made = order.sample(poll, len(poll)), tt.Settings()
        new = tt.next_snapshot(snapshot, poll, made, now)
        assert new == tt.next_snapshot(snapshot, shuffled, made, now)
        names = [" ".join(line.split()[:2]) for line in brief(new).split(", ")]
        for card, name in zip(new.cards, names, strict=False):
            if card.verdict.health == "Healthy":
                size = 2 if card.model == "p300" else 1
                assert [owner.get(chip.pci) for chip in card.chips] == [name] * size
        ids = [card.id for card in new.cards]
        assert len(ids) == len(set(ids)) and offered <= set(ids)
        assert owner.keys() <= {chip.pci for card in new.cards for chip in card.chips}
        snapshot, offered = new, {card.id for card in new.cards if card.resource}
    well = {name for name, card in zip(names, new.cards, strict=True) if card.verdict.kind == "ok"}
    assert well == {name for _, name in NODE} - {"it cannot be paired"}


def judged(word: str) -> tt.Judged:
    """A chip in one poll: its letter; "@5" its N; "/09" its bus; "?" if it is not identified;
    "=hung" the kind of its verdict."""
    letter, index, bus, unknown, kind = re.findall(r"^(.)(@.)?(/..)?(\??)=?(.*)$", word)[0]
    one = chip_of(ACTORS[letter][0])
    chip = tt.Chip(f"0000:{bus[1:] or one.bdf[5:7]}:00.0", int(index[1:] or one.n), unknown="")
    if unknown:
        chip, kind = replace(chip, unknown="pending"), kind or "pending"
    else:
        chip = replace(chip, arch=one.arch, card_type=one.card_type or "")
        chip = replace(chip, asic_id=one.asic_id or "", serial=one.serial or "")
    return chip, tt.make_verdict(kind, chip=chip, detail="EIO") if kind else tt.Verdict()


def follow(polls: str) -> list[tt.Snapshot]:
    """The snapshots after these polls, a second apart, from 100 s on."""
    known = [tt.Snapshot()]
    for now, poll in enumerate(polls.split(";")):
        seen = [judged(word) for word in poll.split()]
        known.append(tt.next_snapshot(known[-1], seen, tt.Settings(), 100 + now))
    return known[1:]


@rows("""
    a p300 is one card          a b              p300 P300 0,1 +ok  ^$
    half a p300 is no card      a                - P300 0 ?half  only 0000:03.*: the other one
    ... while the other starts  a b?             - P300 0 ?half, - 0000:04:00.0 1 ?pending
    it loses a half             a b; a           p300 P300 0,1 -half  only 0000:03.*: 0000:04
    ... then the other          a b; a; b        p300 P300 0,1 -half  only 0000:04.*: 0000:03
    ... one is back, not known  a b; a; a b@5?   p300 P300 0,1 -half, - 0000:04:00.0 5 ?pending
    ... and is whole again      a b; a; a b@5    p300 P300 0,5 +ok
    one half in trouble         a b=hung         p300 P300 0,1 -hung  ^chip 0000:04.*: its heart
    ... a note about the other  a=gone b=unreadable  p300 P300 0,1 -gone  ^chip 0000:03.*: it is
    a note about one half       a b=unreadable   p300 P300 0,1 +unreadable  ^chip 0000:04.*: its
    two boards with one serial  a b c            - P300 0,1,2 ?same-id  ID: 0000:03.*04.*08
    ... the second comes        a b; a b c       p300 P300 0,1,2 -same-id
    equal ASIC ids  n t  - wormhole-1 5,6 ?same-id  ID: 0000:01:00.0, 0000:02
    ... the second comes        n; n t           n150 wormhole-1 5,6 -same-id
    a card is gone              n;               n150 wormhole-1 5 -gone  ^it is gone.*restart
    ... and back                n; ; n@7         n150 wormhole-1 7 +ok
    ... was not offered         n?;              nothing
    ... in another slot         n; n/09 m/01     n150 wormhole-2 6 +ok, n150 wormhole-1 5 +ok
    ... another in its slot     n; m/01          n150 wormhole-2 6 +ok, n150 wormhole-1 5 -gone
    late telemetry              n?; n            n150 wormhole-1 5 +ok
    not to be identified now    n; n?            n150 wormhole-1 5 -gone, - 0000:01:00.0 5 ?pending
    by PCI address, in a reset  x; x@3?          n150 0000:01:00.0 3 -pending
    a dead bus at first sight   n?=bus-dead      - 0000:01:00.0 5 -bus-dead
    seen twice (tt-kmd#112)     n@7 n=gone       n150 wormhole-1 7 +ok
    by resource, PCI address    a p m n          n150 wormhole-1 5 +ok, n150 wormhole-2 6 +ok,\
 p150 blackhole-9 9 +ok, - P300 0 ?half
""")
def test_what_becomes_of_a_card(row: list[str]) -> None:
    """From poll to poll: one card, one ID; and the reason names the chips."""
    snapshot = follow(row[1])[-1]
    assert brief(snapshot) == row[2].replace("nothing", "")
    assert all(re.search(words, snapshot.cards[0].verdict.reason) for words in row[3:])


def test_since_is_when_its_health_changed() -> None:
    """Not when the reason did: gone, then in a reset, is one Unhealthy."""
    cards = [snapshot.cards[0] for snapshot in follow("n; n=unreadable; ; n=resetting; n; n")]
    assert [card.verdict.since - 100 for card in cards] == [0, 0, 2, 2, 4, 4]


####################################################################################################
# 8. The inventory: the thread that polls, and those that read
####################################################################################################


class Acme:
    """Another vendor's discovery: what README's "For another vendor's card" asks for."""

    pci_functions, driver_version = list, str  # none, and no version

    def __init__(self, folder: Path, *there: int) -> None:
        self.dev_folder, self.there = str(folder), list(there)
        self.list: Callable[[], object] = bool
        self.look: Callable[[tt.Chip], object] = bool
        made: Any = self
        self.inventory = tt.Inventory(tt.Settings(resource_domain="x.org", poll_seconds=0.0), made)

    def chips(self) -> list[tt.Chip]:
        self.list()
        return [chip for n in self.there if (chip := self.chip_at(n))]

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
    plugin, container = tt.DevicePlugin(shared, "x.org/x1"), {"devices_ids": ["acme-3", "acme-1"]}
    for n in acme.there:
        (room / str(n)).symlink_to("/dev/null")
    acme.inventory.poll(0.0)
    request: Any = MESSAGES["AllocateRequest"](container_requests=[container])
    (answer,) = as_dict(asyncio.run(plugin.Allocate(request, None)))["container_responses"]
    paths = [device["host_path"] for device in answer["devices"]]
    assert paths == ["/dev/tenstorrent/1", "/dev/tenstorrent/3"]
    assert answer["envs"] == {"PCIDEVICE_X_ORG_X1": "0000:01:00.0,0000:03:00.0"}
    acme.there.remove(3)
    acme.inventory.poll(1.0)
    listed = tt.device_list(acme.inventory.snapshot, "x.org/x1").devices
    health = {"acme-1": "Healthy", "acme-2": "Healthy", "acme-3": "Unhealthy"}
    assert {device.ID: device.health for device in listed} == health


def test_readers(room: Path, caplog: pytest.LogCaptureFixture, bound: Bound) -> None:
    """30 of 32 chips hang, one before it was identified: one poll takes 2 s, and tells of others;
    later polls take no wait, and each card is well again when its read returns. A defect costs its
    chip only. A thread ends when its chip is gone."""
    acme, released, before = Acme(room, *range(31)), threading.Event(), threading.enumerate()

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
    for reader in acme.inventory.readers.values():
        assert reader.idle.wait(10)
    assert poll(lambda chip: 1 // (chip.index - 1), 3.0) == {"ok": 30, "unreadable": 1, "gone": 1}
    assert "chip 0000:01:00.0 cannot be read\nTraceback" in caplog.text and len(caplog.records) == 1
    assert "ZeroDivisionError" in acme.inventory.snapshot.cards[1].verdict.reason
    assert poll(bool, 3.0) == {"ok": 31, "gone": 1}
    acme.there = []
    assert poll(bool, 0.1) == {"gone": 32}
    for thread in set(threading.enumerate()) - set(before):
        thread.join(10)
        assert not thread.is_alive()


def test_polling_thread(room: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A stream is woken by news only, and before any callback runs; one that fails hurts nobody. A
    poll that fails leaves the last list, and is said once; one under way at the end is nothing."""
    caplog.set_level(logging.INFO)
    acme, told, woken = Acme(room), list[str](), threading.Semaphore(0)
    last, stopped, no_files = threading.Event(), threading.Event(), OSError(errno.EMFILE, "")
    found: list[Any] = [
        [],
        [1],
        [1],
        no_files,
        no_files,
        [1],
        ValueError(1),
        ValueError(1),
        [1, 2],
        0,
    ]

    def places() -> None:
        acme.there = now = found.pop(0)
        if isinstance(now, Exception):
            raise now
        if not found:
            last.set()
            acme.there = [1] if stopped.wait(20) else []

    def fail(old: tt.Snapshot, new: tt.Snapshot) -> None:
        if old != new:
            raise ValueError(f"woken: {woken.acquire(timeout=10)}")

    async def stream() -> None:
        async with acme.inventory.changed:
            while await acme.inventory.changed.wait():
                woken.release()

    async def main() -> None:
        task = asyncio.create_task(stream())
        await asyncio.sleep(0)  # it waits
        acme.inventory.start(asyncio.get_running_loop())
        assert await asyncio.to_thread(last.wait, 20)
        acme.inventory.stop()
        task.cancel()

    acme.list = places
    acme.inventory.on_snapshot = [fail, lambda old, new: told.append(brief(new))]
    asyncio.run(main())
    stopped.set()
    for thread in threading.enumerate():
        if thread.name == "poll":
            thread.join(10)
    one, two = "x1 acme-1 1 +ok", "x1 acme-1 1 +ok, x1 acme-2 2 +ok"
    assert told == ["", one, one, one, two] and brief(acme.inventory.snapshot) == two
    assert "".join(record.levelname[0] for record in caplog.records) == "EEWIEWEI"
    assert caplog.text.count("ValueError: woken: True") == 3 and not woken.acquire(blocking=False)
    assert "cannot look for cards, the last list stands: OSError: [Errno 24]" in caplog.text
    assert "cannot look for cards, the last list stands: ValueError: 1" in caplog.text
    assert caplog.text.count("the cards can be looked for again") == 2


####################################################################################################
# A. Preferred allocation
####################################################################################################


SPOTS: list[tuple[str, str, int | None, tuple[str, ...]]] = [  # host, bus, NUMA node, what is above
    # Which trays share a NUMA node is made up. Two switches are on one node, none on the other.
    *(("galaxy", f"{t}{n}", int(t in "c8"), ("pci0000:00",)) for t in "c804" for n in range(1, 9)),
    *(("host", bus, 0, ("pci0000:00", "0000:00:01.0")) for bus in ("01", "02", "03")),
    *(("host", bus, 0, ("pci0000:00", "0000:00:02.0")) for bus in ("05", "06")),
    *(("host", bus, 1, (f"pci0000:{bus}",)) for bus in ("41", "51", "61", "71")),
    *(("flat", bus, None, ()) for bus in ("01", "02", "09", "0a", "0b")),
]
CARDS: dict[str, dict[str, tt.Card]] = {"galaxy": {}, "host": {}, "flat": {}}
for host, bus, numa, above in SPOTS:
    chip = tt.Chip(f"0000:{bus}:00.0", pci_path=above, numa_node=numa)
    CARDS[host][bus] = tt.Card(bus, f"{host}-x", f"tenstorrent.com/{host}-x", (chip,), tt.Verdict())


@rows("""
    smallest group with room   host    01 02 03 05 06 41 51 61 71  -      3  01 02 03
    ... a NUMA node            host    01 02 03 05 06 41 51 61 71  -      4  41 51 61 71
    ... a switch               host    01 02 03 05 06              -      2  05 06
    ... the last one           host    01 03 05 41 51 61 71        -      1  05
    one NUMA node before all   host    01 02 03 05 06 41 51 61 71  -      5  01 02 03 05 06
    largest whole, and rest    host    01 02 03 05 06 41 51 61 71  -      7  01 02 03 05 06 41 51
    ... at each level          host    01 02 03 05 06              -      4  01 02 03 05
    neighbours                 flat    01 02 09 0a 0b              -      3  09 0a 0b
    ... the first of equals    flat    01 02 09 0a 0b              -      2  01 02
    near to what it must have  host    01 02 03 05 06 41 51        03     2  03 01
    ... its switch, its node   host    01 02 03 05 06 41 51        06     3  06 05 01
    ... the nearest of two     host    01 02 03 05 06 41 51        41 06  3  06 41 05
    neighbours on a tray       galaxy  c1 c4 c5 c8                 -      2  c4 c5
    the tray of what it must   galaxy  01 02 43 44 81              43     2  43 44
    the tray that is broken    galaxy  01 02 03 04 05 44 45 46 47  -      4  44 45 46 47
    ... has no room            galaxy  01 02 03 04 05 44 45 46 47  -      5  01 02 03 04 05
    not on the list any more   host    gone lost 41 01             -      2  01 41
    ... comes last             host    lost gone 41                -      2  41 gone
    ... unless it must         host    gone lost 41                lost   2  41 lost
""")
def test_preferred_allocation(row: list[str]) -> None:
    """The same NUMA node, then the smallest group that has room, then neighbours."""
    _, host, available, must, size, chosen = row
    wanted = (available.split(), must.strip("-").split(), int(size))
    assert tt.preferred_allocation(CARDS[host], *wanted) == chosen.split()


def test_trays_stay_whole(bound: Bound) -> None:
    """A Galaxy's trays are taken whole while that is possible, and one that is broken is used up
    first. A tray is one Galaxy's, though another one has the same bus numbers."""
    galaxy, twice, free = CARDS["galaxy"], {}, set(CARDS["galaxy"])
    for size in (8, 16, 24, 32):
        began = time.thread_time()
        chosen = tt.preferred_allocation(galaxy, list(galaxy), [], size)
        bound("a choice out of 32 cards", time.thread_time() - began, 0.002)
        assert list(Counter(card_id[0] for card_id in chosen).values()) == [8] * (size // 8)
    for size, tray in ((1, "0"), (2, "0"), (8, "4"), (5, "0"), (8, "8"), (8, "c")):
        chosen = tt.preferred_allocation(galaxy, sorted(free), [], size)
        free -= set(chosen)
        assert {card_id[0] for card_id in chosen} == {tray}
    for domain, card in itertools.product("12", galaxy.values()):
        chip = replace(card.chips[0], pci=f"000{domain}{card.chips[0].pci[4:]}")
        twice[domain + card.id] = replace(card, chips=(chip,))
    assert len({name[:2] for name in tt.preferred_allocation(twice, list(twice), [], 8)}) == 1


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


####################################################################################################
# 6. The DevicePlugin service: each call is answered from the newest snapshot
####################################################################################################

ID = [chip.id for chip in N150]
OPTIONS = {"pre_start_required": True, "get_preferred_allocation_available": True}
FAST, HTTP = "--poll-seconds=0.1", "--listen=127.0.0.1:0"


# NUMA nodes of the chips of a healthy card, and of an unhealthy one; "-": the host does not know.
@pytest.mark.parametrize("numa", ["0 1", "1 0,1", "0 -", "- -"])
def test_device_list(numa: str) -> None:
    """The whole list of a resource, each card with its health, and with its NUMA nodes if all the
    resource's cards have some."""
    known = [[int(n) for n in nodes.split(",") if n != "-"] for nodes in numa.split()]
    cards, wanted = [], list[Event]()
    for health, nodes in zip(("Healthy", "Unhealthy"), known, strict=True):
        chips = tuple(tt.Chip("0000:01:00.0", numa_node=node) for node in nodes or (None,))
        cards.append(tt.Card(health, "n150", R150, chips, tt.Verdict(health)))
        topology = {"topology": {"nodes": [{"ID": str(node)} for node in nodes]}}
        wanted.append({"ID": health, "health": health, **(topology if all(known) else {})})
    others = [replace(cards[1], id="other", resource=name) for name in (R300, None)]
    assert as_dict(tt.device_list(tt.Snapshot((*cards, *others)), R150)) == {"devices": wanted}


# --hugepages, the IOMMU types of the chips, whether the host has 1 GiB pages, and what follows.
@pytest.mark.parametrize(
    ("flag", "iommus", "facts"),
    [
        ("auto", "DMA-FQ DMA", "there"),
        ("auto", "DMA identity", "there, mounted"),
        ("auto", " DMA", "there, mounted"),
        ("auto", "identity", ""),
        ("always", "DMA", "mounted"),
        ("never", "identity", "there"),
    ],
)
def test_container_response(tmp_path: Path, flag: str, iommus: str, facts: str) -> None:
    """Device nodes, a variable of the resource's own, and 1 GiB pages: if the host has them and a
    chip is not behind a DMA IOMMU domain."""
    (tmp_path / "hugepages-1G" if "there" in facts else tmp_path).mkdir(exist_ok=True)
    chips = [tt.Chip(f"0000:0{n}:00.0", n, iommu=one) for n, one in enumerate(iommus.split(" "))]
    settings = tt.Settings(dev_root=tmp_path, hugepages=flag)
    answer = tt.container_response(settings, "a-b.org/c.d", chips, ["/x", "/y"][: len(chips)])
    nodes = [(one.container_path, one.host_path, one.permissions) for one in answer.devices]
    known = [("/dev/tenstorrent/0", "/x", "rw"), ("/dev/tenstorrent/1", "/y", "rw")]
    assert nodes == known[: len(chips)] and not answer.annotations and not answer.cdi_devices
    assert answer.envs == {"PCIDEVICE_A_B_ORG_C_D": ",".join(chip.pci for chip in chips)}
    mounts = [(one.container_path, one.host_path, one.read_only) for one in answer.mounts]
    assert mounts == [("/dev/hugepages-1G", "/dev/hugepages-1G", False)] * ("mounted" in facts)


# Cards by their N; | between containers, or between what is available and what must be chosen.
CALLS = [
    ("Allocate", "0", "0"),
    ("Allocate", "3 0 1", "0 1 3"),
    ("Allocate", "2 | 1 0", "2 | 0 1"),
    ("Allocate", "0 wormhole-F", f"NOT_FOUND no card 'wormhole-F' of {R150} on this node"),
    ("Allocate", f"0 | {'x' * 999}", f"NOT_FOUND no card '{'x' * 80}' of"),
    ("Allocate", "", f"INVALID_ARGUMENT no card IDs of {R150} in the request"),
    ("Allocate", "0 | ", "INVALID_ARGUMENT no card IDs of"),
    ("Allocate", "1 0 1", f"INVALID_ARGUMENT the card ID '{ID[1]}' of {R150} is named twice"),
    ("Allocate", "1 | 1", f"INVALID_ARGUMENT the card ID '{ID[1]}' of {R150} is named twice"),
    ("PreStartContainer", "1 0", ""),
    ("PreStartContainer", "0 x", "NOT_FOUND no card 'x' of"),
    ("PreStartContainer", "", "INVALID_ARGUMENT no card IDs of"),
    ("GetPreferredAllocation", "3 0 2 | ", "2 3"),
    ("GetPreferredAllocation", "0 1 2 3 | 1", "1 0"),
    ("GetPreferredAllocation", "0 | ", "INVALID_ARGUMENT cannot choose 2 of 1"),
]


def page_text(plugin: Plugin, path: str) -> str:
    """A page of a plugin that was started with HTTP; its status is 200."""
    port = plugin.wait_for_line(r"HTTP on port \d+").text.split(" port ")[1].split()[0]
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", int(port), 5)) as connection:
        connection.request("GET", path)
        answer = connection.getresponse()
        assert answer.status == 200
        return answer.read().decode()


@both_generations
def test_calls(kubelet: Kubelet, four: Tree, launch: Launch) -> None:
    """Each call has its answer, or is refused as a whole by a status with a sentence; no refusal
    hurts what follows. Containers are counted, and refusals by status."""
    kubelet.start()
    plugin, counts = launch(four, kubelet, HTTP), Counter[tuple[str, ...]]()
    kubelet.wait_status(R150, 4, 4)
    for method, words, wanted in random.Random(6).sample(CALLS * 2, 2 * len(CALLS)):
        parts = [part.split() for part in words.split("|")]
        ids = [[ID[int(word)] if word in "0123" else word for word in part] for part in parts]
        request: Event = {"container_requests": [{"devices_ids": each} for each in ids]}
        if method == "GetPreferredAllocation":
            names = ("available_deviceIDs", "must_include_deviceIDs", "allocation_size")
            request = {"container_requests": [dict(zip(names, (*ids, 2), strict=True))]}
        if method == "PreStartContainer":
            request = {"devices_ids": ids[0]}
        if wanted[:1].isupper():
            code, sentence = wanted.split(" ", 1)
            with refused(code, sentence):
                kubelet.rpc(R150, method, request)
            counts["refusals", method, code] += 1
            continue
        answers = kubelet.rpc(R150, method, request).get("container_responses", ())
        if method == "Allocate":
            counts["allocations", "", ""] += len(answers)
            shown = [[one["host_path"][-1] for one in each["devices"]] for each in answers]
        else:
            shown = [[str(ID.index(name)) for name in each["deviceIDs"]] for each in answers]
        assert " | ".join(map(" ".join, shown)) == wanted
    pattern = rf'plugin_(\w+)_total{{resource="{R150}"(?:,call="(\w+)",code="(\w+)")?}} (\d+)\.0$'
    metrics = re.findall(pattern, page_text(plugin, "/metrics"), re.M)
    assert {tuple(labels): int(count) for *labels, count in metrics} == counts
    assert kubelet.rpc(R150, "GetDevicePluginOptions", {}) == OPTIONS


def relink(link: Path, target: str) -> None:
    """A symbolic link leads elsewhere now; "-": it is gone."""
    link.unlink()
    if target != "-":
        link.symlink_to(target)


def swapped(chip: Chip, other: Chip) -> list[Chip]:
    """Two chips after a reset that gave them each other's N. The number of a device node goes with
    N, as on a host: only sysfs tells that they are others now."""
    return [replace(chip, n=other.n, node=other.node), replace(other, n=chip.n, node=chip.node)]


# What became of udev's link, a device node, or a chip since the last poll; the chip's host path in
# an answer, or the words of a refusal.
SINCE_THE_POLL = """
by-id/{chip.id} ../{chip.n}   /dev/tenstorrent/by-id/{chip.id}
by-id/{chip.id} -             /dev/tenstorrent/{chip.n}
by-id/{chip.id} ../{other.n}  /dev/tenstorrent/{chip.n}
by-id/{chip.id} ../99         /dev/tenstorrent/{chip.n}
{chip.n} {other.node}         /dev/tenstorrent/{chip.n} is missing or another device
{chip.n} /etc                 /dev/tenstorrent/{chip.n} is missing or another device
{chip.n} -                    /dev/tenstorrent/{chip.n} is missing or another device
chip gone                     /dev/tenstorrent/{chip.n} is no longer chip {chip.bdf}
chip swapped                  /dev/tenstorrent/{chip.n} is no longer chip {chip.bdf}
"""


def test_device_nodes_are_looked_at(kubelet: Kubelet, tree: Tree, launch: Launch) -> None:
    """Whatever happened since the last poll, a Pod gets the card that it was promised, or a refusal
    (always 5). A link of udev's is preferred if it leads to the chip."""
    rows = SINCE_THE_POLL.strip().splitlines()
    made = chips("n150", *(f"{n + 1:02x} {n:04} 0" for n in range(2 * len(rows))), by_id=True)
    made = tuple(replace(chip, node=NODES[chip.n % 2]) for chip in made)
    for chip in made:
        tree.add(chip)
    kubelet.start()
    launch(tree, kubelet, "--poll-seconds=60")
    kubelet.wait_status(R150, len(made), len(made))
    for row, chip, other in zip(rows, made[::2], made[1::2], strict=True):
        what, target, words = row.format(chip=chip, other=other).split(None, 2)
        if what == "chip":
            tree.remove(chip.bdf)
            for one in swapped(chip, tree.remove(other.bdf)) if target == "swapped" else ():
                tree.add(one)
        else:
            relink(tree.dev / "tenstorrent" / what, target)
        if " " not in words:
            (device,) = kubelet.allocate(R150, [chip.id])["devices"]
            assert device["container_path"] == f"/dev/tenstorrent/{chip.n}"
            assert device["host_path"] == words
            kubelet.pre_start(R150, [chip.id])
            continue
        for call in (kubelet.allocate, kubelet.pre_start):
            with refused("FAILED_PRECONDITION", f"card {chip.id} (n150, ", words):
                call(R150, [chip.id])


def test_renumbered(kubelet: Kubelet, tree: Tree, launch: Launch) -> None:
    """Cards swap their N while two Pods hold them, and containers restart with the old answer:
    by udev's link one gets its card again. A bare N is the other's card now: it does not start."""
    first, second = replace(N150[0], by_id=True), replace(N150[1], node=NODES[1])
    link = tree.dev / "tenstorrent/by-id" / first.id
    tree.add(first)
    tree.add(second)
    kubelet.start()
    launch(tree, kubelet, FAST)
    kubelet.wait_status(R150, 2, 2)
    for pod, chip in (("linked", first), ("bare", second)):
        kubelet.admit(pod, {R150: 1}, {R150: [chip.id]})
        assert kubelet.start_container(pod)["devices"][0]["resolved"] == chip.node
    mark = kubelet.log.mark()
    tree.remove(first.bdf)
    tree.remove(second.bdf)
    kubelet.wait_status(R150, 2, 0, after=mark)
    with refused("FAILED_PRECONDITION", first.id, "gone from sysfs"):
        kubelet.start_container("linked")
    for chip in swapped(first, second):
        tree.add(chip)
    kubelet.wait_status(R150, 2, 2, after=mark)
    assert kubelet.start_container("linked")["devices"][0]["resolved"] == second.node
    with refused("FAILED_PRECONDITION", "it was /dev/tenstorrent/1 when this Pod was admitted"):
        kubelet.start_container("bare")
    relink(link, "../0")  # udev is late
    with refused("FAILED_PRECONDITION", f"it was /dev/tenstorrent/by-id/{first.id} when this Pod"):
        kubelet.start_container("linked")
    relink(link, "../1")
    kubelet.start_container("linked")


def next_kubelet(kubelet: Kubelet, new_folder: bool = False) -> float:
    """The kubelet is killed, and another one starts. How soon that has the cards."""
    mark = kubelet.log.mark()
    kubelet.kill()
    if new_folder:
        kubelet.delete_folder()
    kubelet.start()
    return kubelet.wait_status(R150, 4, 4, after=mark) - kubelet.answering


@both_generations
def test_pod(kubelet: Kubelet, four: Tree, launch: Launch, plugin: Plugin) -> None:
    """A Pod's life: admitted once, started often, with the first answer all the time, whatever
    restarts meanwhile; no other Pod gets its cards."""
    ids = kubelet.admit("pod", {R150: 2})["ids"]
    first = kubelet.start_container("pod")
    plugin.wait_for_line(f"allocated .*{ids[R150][0]}.*{ids[R150][1]}")
    assert kubelet.hints(R150, 1) in ([[0], [0, 1]], [[1], [0, 1]]), "two of one NUMA node are left"
    mark = kubelet.log.mark()
    plugin.end(signal.SIGKILL)
    kubelet.wait_status(R150, 4, 0, after=mark)
    launch(four, kubelet)
    kubelet.wait_status(R150, 4, 4, after=mark)
    assert kubelet.start_container("pod") == first
    next_kubelet(kubelet)
    assert kubelet.admit("pod", {R150: 2})["ids"] == ids
    assert kubelet.start_container("pod") == first and len(kubelet.seen("allocated")) == 1
    assert sorted(ids[R150] + kubelet.admit("second", {R150: 2})["ids"][R150]) == ID


def test_large_pod_with_two_resources(kubelet: Kubelet, room: Path, launch: Launch) -> None:
    """Nothing in the answers of two resources has the same name and another value (contract 14).
    Made-up cards, up to 200, are /dev/null on the host; their folder goes with the plugin."""
    (room / "tmp").mkdir()
    kubelet.start()
    flags = ("--fake=n150=199,n300=1", "--hugepages=always")
    plugin = launch(None, kubelet, *flags, env=environment(TMPDIR=str(room / "tmp")))
    kubelet.wait_status(R150, 199, 199, timeout=20)
    kubelet.wait_status(R300, 1, 1)
    answer = kubelet.admit("pod", {R150: 199, R300: 1})
    assert not kubelet.seen("conflict") and len(answer["mounts"]) == 1
    paths = {one["container_path"]: one["host_path"] for one in answer["devices"]}
    assert paths == {f"/dev/tenstorrent/{n}": "/dev/null" for n in range(200)}
    assert sorted(name[-5:] for name in answer["envs"]) == ["_N150", "_N300"]
    assert plugin.end()[0] == 0 and not list((room / "tmp").iterdir())


def dial(kubelet: Kubelet) -> grpc.Channel:
    """A connection to the plugin's one socket, beside the kubelet's."""
    (name,) = sockets(kubelet)
    return grpc.insecure_channel(f"unix:{kubelet.folder / name}", [LOCAL])


@both_generations
def test_streams_share_nothing(kubelet: Kubelet, four: Tree, launch: Launch) -> None:
    """Each stream is told each change, and nothing but changes, whatever becomes of other streams
    (story 12): it compares with what it has sent itself. The end of the kubelet's alone counts. One
    that is stopped keeps its stream, and hears of the change later (contract 7)."""
    kubelet.start()
    plugin = launch(four, kubelet, FAST)
    kubelet.wait_status(R150, 4, 4)
    plugin.wait_for_line(f"registered {R150}")
    mark, lines = kubelet.log.mark(), plugin.log.mark()
    four.set(N150[0].bdf, "device/hwmon/hwmon2/temp1_input", "60000\n")
    kubelet.log.never(lambda event: True, 1.0, mark)
    assert plugin.log.mark() == lines, plugin.lines(after=lines)
    with dial(kubelet) as channel:
        watch = stub(channel, "DevicePlugin", "ListAndWatch")
        streams = [watch(MESSAGES["Empty"](), timeout=60) for _ in range(6)]
        assert {len(next(stream).devices) for stream in streams} == {4}
        for stream in streams[::2]:
            stream.cancel()
        kubelet.pause()
        four.remove(N150[0].bdf)
        for stream in streams[1::2]:
            health = {device.ID: device.health for device in next(stream).devices}
            assert health == {**dict.fromkeys(ID, "Healthy"), ID[0]: "Unhealthy"}
        kubelet.resume()
        kubelet.wait_health(R150, ID[0], "Unhealthy", after=mark)
    kubelet.log.never(lambda event: event["event"] != "status", 0.3, kubelet.log.mark())
    assert kubelet.kinds(R150, mark) == ["devices", "status"]


def test_hostile_calls(kubelet: Kubelet, plugin: Plugin, bound: Bound) -> None:
    """Whatever is sent, there is a status with a sentence, and honest callers hardly notice."""

    def request(ids: list[str]) -> bytes:
        message = MESSAGES["AllocateRequest"](container_requests=[{"devices_ids": ids}])
        return bytes(message.SerializeToString())

    def send(channel: Any, data: bytes, method: str = "Allocate") -> Any:
        return channel.unary_unary(f"/v1beta1.DevicePlugin/{method}").future(data, timeout=30)

    noise, many = random.Random(4711), [f"wormhole-{n:016X}" for n in range(100_000)]
    most = b"\x0a\xc0\xdf\x0f" + b"\x0a\x00" * 128_992  # as many IDs as a request can hold
    hostile = [request(many), request(many[:9000]), most, b"\n\2\n\0" * 1000]
    hostile += [noise.randbytes(noise.randrange(300)) for _ in range(40)]
    with dial(kubelet) as enemy, dial(kubelet) as friend:
        for data in hostile:
            for method in ("Allocate", "GetPreferredAllocation", "PreStartContainer", "Nothing"):
                call = send(enemy, data, method)
                assert call.code().name not in ("DEADLINE_EXCEEDED", "UNAVAILABLE"), data[:20]
                assert call.code().name == "OK" or call.details(), data[:20]
        watch, times = stub(enemy, "DevicePlugin", "ListAndWatch"), []
        streams = [watch(MESSAGES["Empty"]()) for _ in range(200)]
        assert {len(next(stream).devices) for stream in streams} == {4}
        calls = [send(enemy, b"") for _ in range(1000)]
        for _ in range(40):
            began = time.monotonic()
            assert send(friend, request(ID)).code().name == "OK"
            times.append(time.monotonic() - began)
        assert {call.code().name for call in calls} == {"INVALID_ARGUMENT"}
        bound("Allocate beside 200 streams and 1000 calls, median", sorted(times)[20], 0.05)
        for stream in streams:
            stream.cancel()
    assert not kubelet.seen("stream_end") and not plugin.lines("exception|defect")


####################################################################################################
# 7. Registration: whatever ends one, the next follows at once
####################################################################################################

STANDING_BY = "standing by until it ends"
AGAIN_S = 0.1  # from a kubelet that answers, a dropped stream, or another instance's end

# What ends a registration; the event since when 0.1 s count; what the kubelet sees before the
# Register that holds.
LOST = "stream_end disconnected status"
ENDINGS = [
    ("stop start", "listening", ""),
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
def test_registers_again(kubelet: Kubelet, four: Tree, launch: Launch, bound: Bound) -> None:
    """Whatever ends a registration, and in any order: registered again within 0.1 s of a kubelet
    that answers, by one Register; the old socket is gone, and news arrive by the new stream."""
    kubelet.start()
    holder = heir = launch(four, kubelet, FAST)
    kubelet.wait_status(R150, 4, 4)
    for how, since, before in random.Random(7).sample(ENDINGS * 2, 18) * (10 if LONG else 1):
        mark = kubelet.log.mark()
        holder.wait_for_line(f"socket {sockets(kubelet)[0]}")
        for step in how.split():
            if step[-1] == ":":
                kubelet.faults(**{step[:-1]: 1})
            elif step in ("register", "no_stream"):
                kubelet.wait(step, after=mark)
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
    four.remove(N150[0].bdf)  # no dead stream takes this from the live one
    kubelet.wait_health(R150, ID[0], "Unhealthy", after=mark)


@both_generations
def test_end_of_an_older_stream(
    kubelet: Kubelet, four: Tree, launch: Launch, puppets: Puppets, bound: Bound
) -> None:
    """The race of contract 5: up to 1.36 the end of another plugin's older stream disconnects ours,
    which the end of our own stream reveals."""
    kubelet.start()
    older = puppets(R150)
    older.register()
    kubelet.wait("stream")
    launch(four, kubelet)
    kubelet.wait_status(R150, 4, 4)
    mine, mark = kubelet.seen("register")[-1]["endpoint"], kubelet.log.mark()
    older.lists.put(None)
    ended = kubelet.wait("stream_end", endpoint="a.sock", after=mark)["t"]
    kubelet.wait("disconnected", endpoint=mine, ended="a.sock", after=mark)
    offered = kubelet.wait_status(R150, 4, 4, after=mark)
    bound("end of an older stream: registered again", offered - ended, AGAIN_S)


# What the plugin says if it is there before the kubelet (story 3).
@both_generations
@pytest.mark.parametrize("waits", ["", "is not there yet: waiting", "no kubelet listens at"])
def test_first_registration(
    kubelet: Kubelet, four: Tree, launch: Launch, bound: Bound, waits: str
) -> None:
    """Half a second after the start, or at once when a kubelet comes, all cards are offered, in the
    first list (story 8), with the options in both places. A kubelet that dials late is met once."""
    if waits.startswith("no kubelet"):
        kubelet.folder.mkdir(parents=True)
    kubelet.prepare()
    if waits:
        plugin = launch(four, kubelet)
        plugin.log.wait_for(lambda _: plugin.log.mark() == 6, 5, 0, "what it finds")
        plugin.log.never(lambda line: True, 0.3, 6)
        assert len(plugin.lines(waits)) == 1
    kubelet.start(dial_delay=0.5)
    began = kubelet.answering if waits else launch(four, kubelet).started
    request = kubelet.wait("register")
    bound(f"{waits or 'start'}: first Register", request["t"] - began, AGAIN_S if waits else 0.5)
    kubelet.wait_status(R150, 4, 4)
    assert (request["version"], request["resource_name"]) == ("v1beta1", R150)
    for one in (request["options"], *kubelet.seen("options")):
        assert {name: one[name] for name in OPTIONS} == OPTIONS
    assert kubelet.ids(R150) == ID and len(kubelet.seen("devices")) == 1
    assert sockets(kubelet) == [request["endpoint"]] and len(kubelet.seen("register")) == 1


@pytest.mark.parametrize(
    ("fault", "pauses"),
    [
        ("register_fails", [0.004, 0.008, 0.016, 0.032, 0.064]),
        ("drop_streams", [0.004, 0.008, 0.016, 0.03, 0.03, 0.03]),
        ("no_stream", [5.0]),
        pytest.param("register_hangs", [12.0], marks=long_only),
    ],
)
def test_goes_round(
    kubelet: Kubelet, four: Tree, launch: Launch, bound: Bound, fault: str, pauses: list[float]
) -> None:
    """A Register that fails or hangs, that no stream follows, or whose stream ends at once: tried
    again until it holds, ever more slowly, and said once. Another kubelet is met at once."""
    kubelet.start()
    kubelet.faults("UNIMPLEMENTED", **{fault: len(pauses)})
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
    bound("a better kubelet answers: registered", next_kubelet(kubelet), AGAIN_S)


def lock_holder(kubelet: Kubelet) -> int:
    """The process that holds the lock on the kubelet's folder, as the kernel says; 0 if none."""
    inode = kubelet.folder.stat().st_ino
    found = re.findall(rf"FLOCK .* (\d+) \S+:{inode} 0", Path("/proc/locks").read_text())
    return int(found[0]) if found else 0


# + starts the next instance, a digit ends that one, / is a new kubelet in a new folder.
@pytest.mark.parametrize("word", ["+0+1", "++01", "++10", "++/10", "+++012", "++0+21"])
def test_instances(kubelet: Kubelet, four: Tree, launch: Launch, word: str) -> None:
    """Instances that start and end in any order, all but the second by SIGKILL (story 4): one of
    them serves while there is one, and only the end of that one reaches the kubelet."""
    kubelet.start()
    started, there = list[Plugin](), set[int]()
    for step in word:
        mark, holder = kubelet.log.mark(), lock_holder(kubelet)
        if step == "+":
            started.append(launch(four, kubelet))
            there.add(started[-1].process.pid)
            if holder:
                started[-1].wait_for_line(STANDING_BY)
        elif step == "/":
            next_kubelet(kubelet, new_folder=True)
            holder = 0
        else:
            there.remove(started[int(step)].process.pid)
            started[int(step)].end(signal.SIGTERM if step == "1" else signal.SIGKILL)
        if holder in there:
            kubelet.log.never(lambda event: True, 0.1, mark)
            assert lock_holder(kubelet) == holder
        elif there:
            kubelet.wait_status(R150, 4, 4, after=mark)
            assert lock_holder(kubelet) in there
            registered = kubelet.seen("register", after=mark)
            assert sockets(kubelet) == [event["endpoint"] for event in registered]


def test_stale_sockets(kubelet: Kubelet, four: Tree, plugin: Plugin, launch: Launch) -> None:
    """Story 20: what a killed instance has left goes away; sockets of others, those at which
    somebody listens, and what is no socket, do not. Only who listens accepts connections."""
    mark, mine = kubelet.log.mark(), kubelet.folder / "tenstorrent-n150-012345.sock"
    plugin.end(signal.SIGKILL)
    kubelet.wait_status(R150, 4, 0, after=mark)
    (stale,) = sockets(kubelet)
    (kubelet.folder / "tenstorrent-n150-abcdef.sock").write_text("no socket")
    with contextlib.ExitStack() as stack:
        for name in ("nvidia-gpu.sock", "tenstorrent-n150-zzzzzz.sock", mine.name):
            one = stack.enter_context(socket.socket(socket.AF_UNIX))
            one.bind(str(kubelet.folder / name))
        assert not tt.accepts_connections(mine), "it is only bound"
        one.listen(0)
        launch(four, kubelet)
        kubelet.wait_status(R150, 4, 4, after=mark)
        while tt.accepts_connections(mine):  # until its queue is full
            stack.enter_context(socket.socket(socket.AF_UNIX)).connect(str(mine))
        assert len(sockets(kubelet)) == 4 and stale not in sockets(kubelet)
    assert (kubelet.folder / "tenstorrent-n150-abcdef.sock").read_text() == "no socket"
    for path in (mine, mine / "x", kubelet.folder / "x", kubelet.folder):
        assert not tt.accepts_connections(path)


def test_dropped_streams_leave_nothing(kubelet: Kubelet, plugin: Plugin) -> None:
    """Stories 12, 13, 22: many dropped streams cost no memory, thread, descriptor or socket."""
    proc, seen, rounds = Path(f"/proc/{plugin.process.pid}"), [], 1000 if LONG else 200
    for number in range(rounds + 1):
        if number in (rounds // 4, rounds):
            private = re.findall(r"^Private_\w+: +(\d+)", (proc / "smaps_rollup").read_text(), re.M)
            counts = [len(list((proc / one).iterdir())) for one in ("task", "fd")]
            seen.append((sum(map(int, private)), *counts, len(sockets(kubelet))))
        mark = kubelet.log.mark()
        kubelet.drop_stream(R150)
        kubelet.wait_status(R150, 4, 0, after=mark)
        kubelet.wait_status(R150, 4, 4, after=mark)
    assert seen[0][1:] == seen[1][1:] and seen[1][0] - seen[0][0] <= 1024, seen


@pytest.mark.parametrize("driver", [None, "2.10.0"])
def test_models(kubelet: Kubelet, room: Path, launch: Launch, driver: str | None) -> None:
    """A node without cards waits quietly, with or without the driver (story 10). A card that comes
    is offered (story 9); each model is a resource and a socket of its own, which ends with its last
    card's change into another model. The streams of other models are left alone."""
    tree, made = Tree(room, driver=driver), (N150[0], replace(N300[0], n=5))
    kubelet.start()
    plugin = launch(tree, kubelet, FAST)
    plugin.wait_for_line("waiting for some")
    kubelet.log.never(fits("register", {}), 0.5, 0)
    assert plugin.process.poll() is None and len(plugin.lines()) == 2, plugin.lines()
    (tree.sys / "class/tenstorrent").mkdir(parents=True, exist_ok=True)
    for chip, resource in zip(made, (R150, R300), strict=True):
        tree.add(chip)
        kubelet.wait_status(resource, 1, 1)
    mark = kubelet.log.mark()
    tree.remove(made[1].bdf)
    kubelet.wait_status(R300, 1, 0, after=mark)
    assert not kubelet.seen("register", after=mark)
    tree.add(replace(made[1], card_type="n150"))
    kubelet.wait_status(R150, 2, 2, after=mark)
    kubelet.wait("stream_end", resource=R300, after=mark)
    assert not kubelet.seen("register", after=mark)
    assert [name.split("-")[1] for name in sockets(kubelet)] == ["n150"]


def test_health(kubelet: Kubelet, four: Tree, plugin: Plugin, bound: Bound) -> None:
    """A card that is gone, or whose device node is gone or another device, is Unhealthy, and is not
    handed out. It is back under its ID, with another N, too (stories 16 to 18)."""
    mark, began = kubelet.log.mark(), time.monotonic()
    four.remove(N150[0].bdf)
    relink(four.node(N150[1].bdf), "-")
    relink(four.node(N150[2].bdf), "/dev/zero")
    for name, reason in zip(ID, ["gone from sysfs", *["device node"] * 2], strict=False):
        seen = kubelet.wait_health(R150, name, "Unhealthy", after=mark)
        bound("card or device node gone: Unhealthy", seen - began, 1.5)
        with refused("FAILED_PRECONDITION", name, "not healthy since 20", reason):
            kubelet.allocate(R150, [name])
    kubelet.wait_status(R150, 4, 1, after=mark)
    mark, began = kubelet.log.mark(), time.monotonic()
    four.add(replace(N150[0], n=9))
    four.node(N150[1].bdf).symlink_to(N150[1].node)
    relink(four.node(N150[2].bdf), N150[2].node)
    bound("card back: Healthy", kubelet.wait_status(R150, 4, 4, after=mark) - began, 3.0)
    (device,) = kubelet.allocate(R150, ID[:1])["devices"]
    assert device["container_path"] == "/dev/tenstorrent/9"
    assert all(event["devices"][ID[3]] == "Healthy" for event in kubelet.seen("devices"))


def test_hearts(kubelet: Kubelet, room: Path, plugin: Plugin, launch: Launch, bound: Bound) -> None:
    """A heart that stops makes its card, and no other, Unhealthy before 15 s, and not before the
    firmware's own watchdog, which has 10 s; it recovers with it (stories 5, 6). A plugin that was
    stopped for as long judges nobody by its own absence."""
    mark, other = kubelet.log.mark(), Kubelet(room / "other")
    plugin.send(signal.SIGSTOP)
    with contextlib.closing(other), Tree(room / "tree", N150).beating() as tree:
        other.start()
        launch(tree, other)
        other.wait_status(R150, 4, 4)
        tree.still.add(N150[2].bdf)
        stopped = time.monotonic()
        seen = other.wait_health(R150, ID[2], "Unhealthy", timeout=20)
        plugin.send(signal.SIGCONT)
        bound("heart stopped: Unhealthy", seen - stopped, 15)
        assert seen - stopped > 10 and other.wait_status(R150, 4, 3)
        for call in (other.allocate, other.pre_start):
            with refused("FAILED_PRECONDITION", "its heartbeat has stopped"):
                call(R150, [ID[2]])
        later, began = other.log.mark(), time.monotonic()
        tree.still.discard(N150[2].bdf)
        bound("heart beats again: Healthy", other.wait_status(R150, 4, 4, after=later) - began, 3)
    kubelet.log.never(lambda event: True, 1.0, mark)
    assert not plugin.lines("unhealthy") and kubelet.admit("pod", {R150: 1})["ids"]


def test_hanging_reads(kubelet: Kubelet, tree: Tree, launch: Launch, bound: Bound) -> None:
    """Reads of six chips out of eight hang, and a seventh is removed: the kubelet hears of it in
    4 s. Those that hang are Unhealthy until they answer; no call for a Pod waits for them."""
    eight = chips("n150", *(f"0{n} 000{n} 010001861190201{n}" for n in range(1, 9)))
    for chip in eight:
        tree.add(chip)
    kubelet.start()
    plugin = launch(tree, kubelet, HTTP)
    kubelet.wait_status(R150, 8, 8)
    for chip in eight[:6]:
        tree.hang(chip.bdf, "tt_heartbeat")
    mark, gone = kubelet.log.mark(), time.monotonic()
    tree.remove(eight[6].bdf)
    kubelet.admit("pod", {R150: 1}, {R150: [eight[7].id]})
    kubelet.start_container("pod")
    bound("a Pod's calls while reads hang", time.monotonic() - gone, 0.05)
    seen = kubelet.wait_health(R150, eight[6].id, "Unhealthy", after=mark)
    bound("card gone while six others hang: Unhealthy", seen - gone, 4)
    bound("six hang: Unhealthy", kubelet.wait_status(R150, 8, 1, after=mark) - gone, 4)
    with refused("FAILED_PRECONDITION", "a read of its sysfs files does not return"):
        kubelet.allocate(R150, [eight[0].id])
    assert page_text(plugin, "/healthz").startswith("ok")
    for chip in eight[1:6]:
        tree.release(chip.bdf, "tt_heartbeat", "77\n")
    kubelet.wait_status(R150, 8, 6, after=mark)
    code, seconds = plugin.end()
    bound("SIGTERM to the end", seconds, 1)
    assert code == 0


####################################################################################################
# 8. serve(): however it ends, it ends soon, with exit code 0, and leaves nothing behind
####################################################################################################

KEPT = {"tenstorrent.com-card.json", "tt-device-plugin"}


@pytest.fixture
def kept(room: Path) -> Path:
    """Where the plugin keeps files for other tools, with the flags below, and temporary ones."""
    (room / "kept").mkdir()
    return room / "kept"


def keep_in(kept: Path) -> list[str]:
    """The flags for that."""
    return [FAST, f"--cdi-dir={kept}", f"--labels-dir={kept}"]


def until(true: Callable[[], object]) -> None:
    """Wait for what no process reports."""
    deadline = time.monotonic() + 10
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def takes_signals(plugin: Plugin) -> bool:
    """Whether the plugin's own code runs: it holds SIGTERM back, or has a handler for it."""
    status = Path(f"/proc/{plugin.process.pid}/status").read_text()
    return any(int(mask, 16) >> 14 & 1 for mask in re.findall(r"Sig(?:Blk|Cgt):\s(\w+)", status))


# State: how the kubelet starts, what says that it is reached, and what happens to the kubelet.
STOPPED_IN: dict[str, tuple[Event | None, str, str]] = {
    "first poll": (None, "", ""),  # which does not end
    "no folder": (None, "is not there yet", ""),
    "no kubelet": (None, "no kubelet listens", ""),
    "folder deleted on the host": (None, "no kubelet listens", ""),
    "nobody listens": ({"wait": "bound", "listen_delay": 60}, "no kubelet listens", ""),
    "Register hangs": ({"faults": {"register_hangs": 9}}, "register", ""),
    "Register fails": ({"faults": {"register_fails": 99}}, "trying again", ""),
    "no stream": ({"faults": {"no_stream": 9}}, "no_stream", ""),
    "registered": ({}, "registered", ""),
    "Ctrl-C": ({}, "registered", ""),
    "told again and again": ({}, "registered", ""),
    "kubelet gone": ({}, "registered", "kill"),
    "folder gone": ({}, "registered", "delete_folder"),
    "standing by": ({}, STANDING_BY, ""),
}


@pytest.mark.parametrize("state", STOPPED_IN)
def test_stops(
    kubelet: Kubelet, four: Tree, launch: Launch, bound: Bound, kept: Path, state: str
) -> None:
    """In each state: exit code 0 within a second (1 if a mount goes on to show a folder that was
    deleted); no socket and no file of this process is left, and nothing of another's is taken."""
    settings, says, last = STOPPED_IN[state]
    first, host = None, kept.parent / "host"
    host.mkdir()
    fd = os.open(host, os.O_RDONLY)
    kubelet.root.mkdir()
    if state == "first poll":
        four.hang(N150[0].bdf, "tt_card_type")
    if state == "no kubelet":
        kubelet.folder.mkdir()
    if state == "folder deleted on the host":
        kubelet.folder.symlink_to(f"/proc/{os.getpid()}/fd/{fd}")  # by no name, like a mount
    if settings is not None:
        kubelet.start(**settings)
    if state == "standing by":
        first = launch(four, kubelet, *keep_in(kept), "--poll-seconds=60")
        kubelet.wait_status(R150, 4, 4)
    mine = sockets(kubelet)
    plugin = launch(four, kubelet, *keep_in(kept))
    if says in ("register", "no_stream"):
        kubelet.wait(says)
    else:
        plugin.wait_for_line(says)
    if state == "first poll":
        until(lambda: takes_signals(plugin))
    elif state != "no folder":
        until(lambda: {*os.listdir(kept)} == KEPT)
    if last:
        getattr(kubelet, last)()
    if state == "kubelet gone":
        plugin.wait_for_line("has ended")
    if state == "folder deleted on the host":
        host.rmdir()
        plugin.reader.join(5)
        assert plugin.process.returncode == 1 and "was deleted on the host" in plugin.lines()[-1]
    else:
        number = signal.SIGINT if state == "Ctrl-C" else signal.SIGTERM
        sent = plugin.send(number)
        while state == "told again and again" and plugin.process.poll() is None:
            plugin.send(number)
        assert plugin.end(number)[0] == 0, plugin.lines()
        bound("SIGTERM to the end", plugin.ended - sent, 1.0)
    os.close(fd)
    assert sockets(kubelet) == mine and {*os.listdir(kept)} == (KEPT if first else set())
    assert not first or first.process.poll() is None


def test_an_instance_that_lost_the_lock_leaves_the_files(
    kubelet: Kubelet, four: Tree, launch: Launch, kept: Path
) -> None:
    """While the first instance was stopped, the second has got the lock of a new folder: the files
    are the second one's, and the end of the first takes them from nobody."""
    flags = [f"--cdi-dir={kept}", f"--labels-dir={kept}"]
    kubelet.start()
    first = launch(four, kubelet, FAST, *flags)
    kubelet.wait_status(R150, 4, 4)
    until(lambda: {*os.listdir(kept)} == KEPT)
    launch(four, kubelet, *flags, "--poll-seconds=60").wait_for_line(STANDING_BY)
    first.send(signal.SIGSTOP)
    next_kubelet(kubelet, new_folder=True)
    first.send(signal.SIGCONT)
    first.wait_for_line(STANDING_BY)
    assert first.end()[0] == 0 and {*os.listdir(kept)} == KEPT


def test_stops_at_any_moment(kubelet: Kubelet, launch: Launch, kept: Path) -> None:
    """SIGTERM at a random moment of the first 0.5 s, two at a time, with a kubelet, without, and
    beside processes that keep all cores busy: exit code 0, no traceback, nothing left. So do dry
    runs, every other one of which is left to its end; their stderr is empty."""
    flags, busy = ["--fake=n150=2,p300=1", *keep_in(kept)], [sys.executable, "-c", "while True: 1"]
    options = {"env": environment(TMPDIR=str(kept)), "stdout": subprocess.DEVNULL}

    def stop(number: int) -> None:
        dry, moment = number % 3 == 0, random.Random(number).uniform(0, 0.5)
        plugin = launch(None, kubelet, *flags, *["--dry-run"] * dry, **options)
        until(lambda: takes_signals(plugin))
        time.sleep(moment)
        if number % 6:
            plugin.send(signal.SIGTERM)
        plugin.reader.join(30)
        about = (number, moment, plugin.lines())
        assert plugin.process.returncode == 0 and not (dry and plugin.lines()), about

    half = 750 if LONG else 15
    kubelet.start()
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(stop, range(half)))
        kubelet.kill()
        with contextlib.closing(Plugin(busy)), contextlib.closing(Plugin(busy)):
            list(pool.map(stop, range(half, 2 * half)))
    assert not sockets(kubelet) and not os.listdir(kept)


@pytest.mark.parametrize("read", [False, True])
def test_log_that_nobody_reads(kubelet: Kubelet, plugin: Plugin, bound: Bound, read: bool) -> None:
    """Lines are dropped, and nothing waits for them: not a call, not the end, which calls under way
    do not hold up, either. Once somebody reads, the log says how many lines were dropped."""
    count = 3000 if read else 100_000 if LONG else 20_000
    with plugin.log.changed, dial(kubelet) as channel:  # who reads its stderr waits for this lock
        allocate, nothing = stub(channel, "DevicePlugin", "Allocate"), MESSAGES["AllocateRequest"]()
        for _ in range(count // 500):
            calls = [allocate.future(nothing) for _ in range(500)]
            assert {call.code().name for call in calls} == {"INVALID_ARGUMENT"}
        began = time.monotonic()
        assert kubelet.allocate(R150, ID)["devices"]
        bound("Allocate while nobody reads the log", time.monotonic() - began, 0.05)
        if not read:
            calls = [allocate.future(nothing) for _ in range(1000)]
            assert calls[0].code() and not calls[-1].done()
            sent = plugin.send(signal.SIGTERM)
            assert plugin.process.wait(10) == 0 and not sockets(kubelet)
            bound("SIGTERM to the end, nobody reads the log", time.monotonic() - sent, 2)
            codes = {call.code().name for call in calls}
            assert codes <= {"INVALID_ARGUMENT", "UNAVAILABLE", "CANCELLED"}
            return
    plugin.log.wait_for(lambda _: plugin.log.mark() > 1000, 5, 0, "a thousand lines")
    with refused("INVALID_ARGUMENT"):
        kubelet.rpc(R150, "Allocate", {})
    plugin.wait_for_line("lines were dropped: nobody read the log")
    assert plugin.end()[0] == 0
    dropped = re.findall(r"(\d+) lines were dropped", "\n".join(plugin.lines()))
    said = plugin.lines("Allocate of .* refused|allocated")
    assert sum(map(int, dropped)) + len(said) == count + 2


####################################################################################################
# B. Operations: the log; /healthz, /readyz and /metrics
####################################################################################################

OWN, FIRST_BDF = "tt_device_plugin_", N150[0].bdf
# A card is lost in a reset and comes back with another N, a Pod gets it, the kubelet is restarted.
LOST_CARD = "card wormhole-0D0CB6F1E7A50002 (n150, /dev/tenstorrent/"
REGISTERED = f"INFO registered {R150} with the kubelet: 2 cards, 2 healthy; socket S.sock; cause: "
INCIDENT = [
    "INFO tt-device-plugin VERSION, Python VERSION, grpcio VERSION, driver 2.10.0; kubelet folder "
    "DIR/k/device-plugins, sysfs DIR/sys, dev DIR/dev; cards: 2 n150",
    "INFO card wormhole-0D0CB6F1E7A50001 (n150, /dev/tenstorrent/0) is Healthy",
    f"INFO {LOST_CARD}1) is Healthy",
    f"{REGISTERED}start",
    f"ERROR {LOST_CARD}1) is Unhealthy: it is gone from sysfs: in a reset, unplugged, or the "
    "driver is unloaded; if it stays away, see dmesg; if it was taken out for good, restart the "
    "plugin, "
    "which then forgets it",
    f"INFO {LOST_CARD}5) is Healthy again, after N s",
    f"INFO allocated {LOST_CARD}5)",
    f"WARNING the kubelet's stream of {R150} has ended: registering again",
    "WARNING no kubelet listens at DIR/k/device-plugins/kubelet.sock: waiting for it to start",
    "INFO a kubelet answers at DIR/k/device-plugins/kubelet.sock",
    f"{REGISTERED}stream-ended",
    "INFO told to stop, and done",
]


def fetch(server: Plugin | str, path: str, host: str = "127.0.0.1") -> tuple[int, str]:
    """Status and text of a page of a plugin, or of the server that has said which port it has."""
    if isinstance(server, Plugin):
        server = server.wait_for_line('(INFO |")HTTP on port').text
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
    """The log tells it as a story of which card, what, since when and what to do: these lines, and
    no others. The metrics count it."""
    for chip in N150[:2]:
        tree.add(chip)
    kubelet.start()
    plugin = launch(tree, kubelet, f"--log-format={style}", "--listen=127.0.0.1:0")
    plugin.wait_for_line("registered")
    chip = tree.remove(N150[1].bdf)
    plugin.wait_for_line("is gone from sysfs")
    tree.add(replace(chip, n=5))
    plugin.wait_for_line("healthy again")
    kubelet.allocate(R150, [chip.id])
    plugin.wait_for_line("allocated")
    kubelet.kill()
    plugin.wait_for_line("no kubelet listens")
    assert f"registered resource={R150} 0" in told(fetch(plugin, "/metrics")[1])
    kubelet.start()
    # A kubelet that is being killed may still take the connection of one more try.
    again = plugin.wait_for_line("cause: (stream-ended|register-failed)").text
    cause = re.findall(r"cause: ([a-z-]+)", again)[0]
    page = told(fetch(plugin, "/metrics")[1], f"resource={R150} ")
    assert [line.replace(f"resource={R150} ", "") for line in page if "card_" not in line] == [
        *("registered 1", "cards health=Healthy 2", "cards health=Unhealthy 0"),
        *("allocations_total 1", "registrations_total cause=start 1"),
        f"registrations_total cause={cause} 1",
    ]
    plugin.end()
    lines = plugin.lines("^(?!.*(HTTP on|has not registered it))")  # the first: at any time
    if style == "json":
        objects = [json.loads(line) for line in lines]
        lines = [f"{one['ts']} {one['level'].upper()} {one['msg']}" for one in objects]
        lost, back, allocated = objects[4:7]
        assert allocated.keys() == {*objects[0], "resource"} == {"ts", "level", "msg", "resource"}
        assert back.keys() == {*allocated, "card", "since"} and lost.keys() == {*back, "reason"}
        facts = chip.id, R150, lost["ts"], lost["msg"].partition(" is Unhealthy: ")[2]
        assert (lost["card"], lost["resource"], lost["since"], lost["reason"]) == facts
    assert all(re.match(r"20\d\d-\d\d-\d\dT\d\d:\d\d:\d\dZ ", line) for line in lines)
    story = "\n".join(line[21:] for line in lines).replace(str(tree.root), "DIR")
    story = story.replace(f"cause: {cause}", "cause: stream-ended")
    story = re.sub(r"(plugin|Python|grpcio) \d+\.\d+\.\d+[^,;]*", r"\1 VERSION", story)
    story = re.sub(r"tenstorrent-n150-[0-9a-f]{6}\.sock", "S.sock", story)
    assert re.sub(r"after \d+", r"after N", story).splitlines() == INCIDENT


# What a poll finds, and the line that follows, in which ... is the reason with what to do.
CHANGES = [
    ("pending", "WARNING is not offered: ..."),
    ("pending", ""),
    ("half", "WARNING is not offered: ..."),
    ("no card", "WARNING is gone; it was not offered"),
    ("pending", "WARNING is not offered: ..."),
    ("ok", "INFO is Healthy"),
    ("unreadable", "INFO is Healthy: ..."),
    ("unreadable", ""),
    ("ok", "INFO is Healthy"),
    ("hung", "ERROR is Unhealthy: ..."),
    ("hung", ""),
    ("no card", "ERROR is Unhealthy: ..."),
    ("no card", ""),
    ("half", "ERROR is Unhealthy: ..."),
    ("unreadable", "INFO is Healthy again, after 5 s: ..."),
]


def test_a_change_is_one_line(caplog: pytest.LogCaptureFixture) -> None:
    """It says which card, what, since when and what to do. What stays as it is says nothing."""
    caplog.set_level(logging.INFO, "tt-device-plugin")
    chip, new = tt.Chip("P", 0, arch="a", card_type="n150", asic_id="X"), tt.Snapshot(polled=True)
    chip = replace(chip, unknown="")
    facts = {"chip": chip, "detail": "EIO", "here": "P", "missing": "M"}
    for now, (kind, line) in enumerate(CHANGES):
        verdict = tt.make_verdict(kind, **facts) if kind in tt.REASONS else tt.Verdict()
        old, judged = new, [(chip, verdict)] if kind != "no card" else []
        new = tt.next_snapshot(old, judged, tt.Settings(), now)
        caplog.clear()
        tt.log_changes(tt.Settings(), old, new)
        said = [one for one in caplog.records if vars(one).get("card") == "a-X"]
        text = "".join(f"{one.levelname} {one.getMessage()}" for one in said)
        text = text.replace("card a-X (n150, /dev/tenstorrent/0) ", "")
        assert text == line.replace("...", new.cards[0].verdict.reason if new.cards else "")
        if line and new.cards:
            assert vars(said[0])["since"] == tt.utc(new.cards[0].verdict.since)


def test_log_queue_is_bounded() -> None:
    """When it is full, lines are dropped, and their number is said as soon as there is room."""
    lines: queue.Queue[logging.LogRecord] = queue.Queue(3)
    handler, story = tt.BoundedQueueHandler(lines), []
    for texts, read in (("abcdefghij", 1), ("k", 3), ("lm", 3)):  # no room for "k" at first
        for text in texts:
            handler.handle(logging.makeLogRecord({"msg": text}))
        story += [lines.get_nowait().getMessage() for _ in range(read)]
    dropped = "{} lines were dropped: nobody read the log".format
    assert story == ["a", "b", "c", dropped(7), dropped(1), "l", "m"] and lines.empty()


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
heartbeat_age_seconds card=A chip=01 9
tt_asic_temperature_celsius card=A chip=01 54.3
tt_thermal_throttle_limit_celsius card=A chip=01 75
tt_ai_clock_mhz card=A chip=01 500
tt_tdp_w card=A chip=01 15
tt_tdc_a card=A chip=01 18
tt_vcore_v card=A chip=01 0.795
tt_fan_speed_rpm card=A chip=01 1200
tt_thermal_trips_total card=A chip=01 2
device_node_users card=A chip=01 2
junk_readings_total card=A chip=01 0
junk_readings_total card=41 chip=41 0
"""


def metrics_of(root: Path) -> tt.Metrics:
    """What a scrape reads of a plugin that has polled this tree once."""
    inventory = tt.Inventory(tt.Settings(sysfs_root=root / "sys", dev_root=root / "dev"))
    inventory.poll(100.0)
    return tt.Metrics(tt.Registrar(tt.Shared(inventory, tt.preferred_allocation, lambda cards: [])))


@pytest.fixture
def sensed(room: Path) -> tt.Metrics:
    """The node of PAGE, when it has been polled twice."""
    blind: Any = dict.fromkeys(["card_type", "asic_id", "serial", "firmware"])
    tree = Tree(room, [*N150[:2], replace(N150[2], heartbeat=False, hwmon=False, **blind)])
    monitors = tree.pci(FIRST_BDF) / "hwmon"
    shutil.copytree(monitors / "hwmon2", monitors / "hwmon10")
    (monitors / "hwmon2/temp1_input").write_text("99000\n")
    (monitors / "hwmon10/fan1_input").write_text("1200\n")
    tree.set(FIRST_BDF, "tt_therm_trip_count", "2\n")
    tree.write(room / "proc/driver/tenstorrent/0/pids", "17\n4711\n")
    metrics = metrics_of(room)
    tree.remove(N150[1].bdf)
    metrics.inventory.poll(101.0)
    metrics.inventory.snapshot = replace(metrics.inventory.snapshot, driver=ODD)
    count = metrics.registrar.shared.count
    count("allocations_total", 3, resource=R150)
    count("registrations_total", 2, resource=R150, cause="start")
    count("refusals_total", resource=R150, call="Allocate", code="NOT_FOUND")
    return metrics


@pytest.fixture
def every_metric(sensed: tt.Metrics) -> str:
    """A page with each metric."""
    return sensed.page(109.0)


def test_every_metric(every_metric: str) -> None:
    """Base units, tt-telemetry's names. A card that is gone keeps its verdict and has no readings:
    the last ones would be taken for those of now."""
    text = re.sub(r"0000:(..):00\.0", r"\1", "\n".join(told(every_metric)))
    names: Event = {
        "G": grpc.__version__,
        "P": sys.version.split()[0],
        "V": tt.__version__,
        "R": R150,
    }
    names |= {"A": N150[0].id, "B": N150[1].id, "S": N150[0].serial, "T": N150[1].serial}
    for short, name in {**names, "F": N150[0].firmware, "ODD": ODD}.items():
        text = text.replace(f"={name} ", f"={short} ").replace("/dev/tenstorrent", "DEV")
    assert sorted(text.splitlines()) == sorted(PAGE.strip().splitlines())


PROMTOOL = shutil.which("promtool", path=f"{os.environ.get('PATH')}:{HERE}/build/promtool/usr/bin")


@pytest.mark.skipif(not PROMTOOL, reason="there is no promtool (Debian: package prometheus)")
def test_promtool_takes_the_metrics(every_metric: str) -> None:
    """`promtool check metrics` has nothing to say about any name, type or unit."""
    done = finish([str(PROMTOOL), "check", "metrics"], input=every_metric)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_junk_readings(sensed: tt.Metrics) -> None:
    """Stale telemetry, a dead bus, and what is below 0, read as unsigned (hwmon_junk_stale-tags,
    hwmon_dead-chip): it is not in the page, and is counted. What is not there is neither. With a
    driver before 2.7 nothing is read: a read while the chip goes could oops the kernel."""
    count, inventory = 0, sensed.inventory
    for metric, (file, highest, *_) in [*tt.SENSORS.items()][:-1]:
        good, file = f"{highest}", file.replace("hwmon/", "device/hwmon/hwmon10/")
        path = Path(inventory.discovery.folder(0), file)
        for text in (good, f"{highest + 1}", "4294967295", "-1", "N/A", "", None):
            path.unlink()
            if text is not None:
                path.write_text(text)
            count += text not in (good, None)
            page = told(sensed.page(109.0), f"chip={FIRST_BDF}")
            assert any(metric in line for line in page) == (text == good), (metric, text)
            assert page[-1].endswith(f" {count}"), (metric, text)
    for reader in inventory.readers.values():
        reader.history.heartbeat = None
    for driver, read in (("2.6.1", 0), ("1.34", 0), ("", 0), ("2.7.0-rc1", 1), ("3.0", 1)):
        inventory.snapshot = replace(inventory.snapshot, driver=driver)
        assert len(told(sensed.page(109.0), "device_node_users")) == read


def test_sensors_that_hang(room: Path) -> None:
    """One scrape waits. The next ones leave that chip out and do not wait; nor does the first one,
    if a poll's read of the chip hangs."""
    tree, file = Tree(room, N150[:2]), "device/hwmon/hwmon2/temp1_input"
    metrics, other = metrics_of(room), f"{N150[1].bdf} 54.3"

    def scrape() -> list[str]:
        return [line.split("chip=")[1] for line in told(metrics.page(101.0), "asic_temperature")]

    tree.hang(FIRST_BDF, file)
    with ThreadPoolExecutor() as pool:
        first = pool.submit(scrape)
        with open(tree.path(FIRST_BDF, file), "w"):  # returns when that scrape has opened it
            try:
                assert pool.submit(scrape).result(5) == [other] and not first.done()
            finally:
                tree.release(FIRST_BDF, file, "60000\n")
        assert first.result(5) == scrape() == [f"{FIRST_BDF} 60", other]
    tree.hang(FIRST_BDF, "tt_heartbeat")
    metrics.inventory.poll(102.0)
    assert scrape() == [other]
    tree.release(FIRST_BDF, "tt_heartbeat", "7\n")


def test_alive() -> None:
    """/healthz: polls that stop, or an event loop that does not answer, can be mended by a restart.
    How long is too long follows --poll-seconds."""
    loop = asyncio.new_event_loop()
    for seconds, limit in ((0.1, 10), (60.0, 180)):
        inventory = tt.Inventory(tt.Settings(poll_seconds=seconds))
        inventory.polled_at, inventory.failure.problem = 1000.0, "WHY"
        text = f"stuck: the last poll ended {limit + 1} s ago. WHY"
        assert tt.alive(inventory, loop, 1001 + limit) == (False, text)
    assert tt.alive(inventory, loop, 1180) == (False, "stuck: the event loop does not answer")
    loop.close()


def test_pages(kubelet: Kubelet, room: Path, launch: Launch, bound: Bound) -> None:
    """/readyz is 200 after the first poll without cards, or once all are registered. While the port
    is taken the cards are served without it. Clients that talk nonsense, or stop in the middle, or
    say nothing hold up neither probes nor the kubelet."""
    metrics, tree = metrics_of(room), Tree(room, driver=None)
    metrics.inventory.snapshot = tt.Snapshot()
    assert tt.ready(metrics.registrar) == (False, "the first poll has not ended yet")
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
        tree.add(N150_OLD_DRIVER)
        plugin.wait_for_line("the kubelet has not registered it")
        status, text = fetch(plugin, "/readyz")
        assert status == 503 and "the kubelet has not registered it: UNAVAILABLE" in text
        kubelet.faults(register_fails=-1000)
        plugin.wait_for_line("registered tenstorrent")
        assert fetch(plugin, "/readyz") == (200, f"{R150}: registered\n")
        assert fetch(plugin, "/") == (404, "no such page; there are /healthz, /readyz, /metrics\n")
        nonsense = (b"\0\xff" * 400 + b"\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"A" * 70_000)
        for sent in nonsense + (b"", b"GET /metr") * 50:
            client = stack.enter_context(socket.create_connection(address, timeout=10))
            client.sendall(sent)
            assert sent not in nonsense or b"metrics" not in client.recv(100)
        began = time.monotonic()
        status, text = fetch(plugin, "/healthz")
        bound("a probe beside 100 silent HTTP clients", time.monotonic() - began, 1.0)
        assert status == 200 and re.fullmatch(r"ok: the last poll ended [01]\.\d s ago\.\n", text)
        kubelet.allocate(R150, [FIRST_BDF])


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_listens_on_one_address_or_all(host: str) -> None:
    """IPv4 and IPv6, as a Pod's address may be of either kind. A page that fails says why."""
    if ":" in host and not socket.has_dualstack_ipv6():
        pytest.skip("no IPv6 here")
    pages: Any = {"/x": lambda: (True, "yes"), "/no": lambda: (False, "no"), "/e": lambda: 1 / 0}
    error = "ZeroDivisionError('division by zero')\n"
    for address in (f"[{host}]:0" if ":" in host else f"{host}:0", ":0"):
        said = tt.open_port(tt.listen_address(address), pages)
        answers = [fetch(said, path, host) for path in ("/x?y=z", "/no", "/e")]
        assert answers == [(200, "yes\n"), (503, "no\n"), (500, error)]


####################################################################################################
# C. Files for other tools: a CDI specification, and node labels
####################################################################################################

CDI = "tenstorrent.com-card.json"


def cdi_devices(text: str, key: str = "hostPath") -> dict[str, str]:
    """The devices of a CDI specification, each with its host paths. podman judges the rest."""
    spec = json.loads(text)
    assert (spec["cdiVersion"], spec["kind"]) == ("0.5.0", "tenstorrent.com/card")
    edits = {one["name"]: one["containerEdits"]["deviceNodes"] for one in spec["devices"]}
    return {name: " ".join(node[key] for node in nodes) for name, nodes in edits.items()}


def test_kept_files(room: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The healthy cards by ID, by N, and all, with 1 GiB pages as in Allocate. It follows N and
    health, is written again where it is gone, and not without need. There are no CDI names but
    those of what the file has, and no file without cards, as that would be invalid."""
    caplog.set_level(logging.INFO, "tt-device-plugin")
    tree, folder = Tree(room, [N150[0], *(replace(one, n=one.n + 4) for one in P300)]), room / "cdi"
    inventory = metrics_of(room).inventory
    settings = replace(inventory.settings, hugepages="always", labels_dir=room / "labels")
    files = tt.KeptFiles(replace(settings, cdi_dir=folder))

    def keep() -> str:
        """The file, once it says what the snapshot does, if all cards have a CDI name."""
        files.keep(inventory.snapshot)
        files._thread.join(5)
        return paths[0].read_text() if files.cdi_names(inventory.snapshot.cards) else ""

    paths = [folder / CDI, room / "labels/tt-device-plugin"]
    first, p300 = "/dev/tenstorrent/0", "/dev/tenstorrent/4 /dev/tenstorrent/5"
    expected = {N150[0].id: first, "0": first, P300_ID: p300, "4": p300, "5": p300}
    text, names = keep(), files.cdi_names(inventory.snapshot.cards)
    assert cdi_devices(text) == expected | {"all": f"{first} {p300}"}
    assert names == [f"tenstorrent.com/card={one}" for one in (N150[0].id, P300_ID)]
    assert text.count('"containerPath": "/dev/hugepages-1G"') == 6
    fake = tt.cdi_spec(replace(settings, fake=True, hugepages="never"), inventory.snapshot)
    assert cdi_devices(fake, "path") == cdi_devices(text, "path") and "hugepages" not in fake
    assert cdi_devices(fake)["all"] == "/dev/null /dev/null /dev/null"
    assert [os.listdir(path.parent) for path in paths] == [[path.name] for path in paths]
    before = paths[0].stat()
    assert keep() and paths[0].stat() == before
    paths[0].unlink()
    assert keep() == text
    draft = folder / f".{CDI}.new"
    draft.mkdir()
    for n, now in ((7, 101.0), (0, 102.0)):
        tree.add(replace(tree.remove(FIRST_BDF), n=n))
        inventory.poll(now)
        assert files.cdi_names(inventory.snapshot.cards) == []
        assert n == 0 or keep() == keep() == ""
    draft.rmdir()
    assert keep() == text, "the file was right again before it could be written"
    tree.add(replace(tree.remove(FIRST_BDF), n=7))
    inventory.poll(103.0)
    assert files.cdi_names(inventory.snapshot.cards) == []
    assert cdi_devices(keep())["7"] == "/dev/tenstorrent/7"
    tree.remove(FIRST_BDF)
    inventory.poll(104.0)
    assert keep() == "" and cdi_devices(paths[0].read_text())["all"] == p300
    tree.remove(P300[0].bdf)
    inventory.poll(105.0)
    assert keep() == "" and [path.exists() for path in paths] == [False, True]
    files.remove()
    assert not paths[1].exists()
    trouble = f"cannot keep {paths[0]}: Is a directory; trying again", f"{paths[0]} is kept again"
    assert tuple(line.getMessage() for line in caplog.records) == trouble


def test_files_of_several_instances(kubelet: Kubelet, four: Tree, launch: Launch) -> None:
    """They are the serving instance's. One that stands by, and is ready as a rollout waits for it,
    neither writes nor removes them; it writes its own when it takes over. They go with the last."""
    paths = [kubelet.root / "cdi" / CDI, kubelet.root / "labels/tt-device-plugin"]
    flags = [f"--cdi-dir={paths[0].parent}", f"--labels-dir={paths[1].parent}"]
    kubelet.start()
    first = launch(four, kubelet, *flags)
    kubelet.wait_status(R150, 4, 4)
    until(lambda: kubelet.allocate(R150, [N150[0].id]).get("cdi_devices") and paths[1].exists())
    before = [path.stat() for path in paths]
    modes = [one.stat().st_mode & 0o777 for path in paths for one in (path, path.parent)]
    assert modes == [0o644, 0o755] * 2, "whoever reads them may be another user"
    others = [launch(four, kubelet, *flags, "--listen=127.0.0.1:0") for _ in range(2)]
    for other in others:
        other.wait_for_line("standing by")
        other.wait_for_line(f"{N150[3].id} .* is Healthy")
        status, text = fetch(other, "/readyz")
        assert status == 200 and text.startswith("another instance serves")
    others[0].end()
    assert [path.exists() and path.stat() for path in paths] == before
    first.end()
    others[1].wait_for_line("registered")
    until(lambda: all(path.exists() for path in paths))
    others[1].end()
    assert not [path for path in paths if path.exists()]


def test_files_that_hang(kubelet: Kubelet, tree: Tree, launch: Launch, bound: Bound) -> None:
    """A folder on a disk that hangs costs no card, and not the end. Without the file a card has no
    CDI name; with it, one whose N has changed since is refused: CDI would give the container the
    new device node, the kubelet's stored answer the old one."""
    tree.add(replace(N150[0], by_id=True))
    file, draft = kubelet.root / "cdi" / CDI, kubelet.root / f"cdi/.{CDI}.new"
    file.parent.mkdir(parents=True)
    os.mkfifo(draft)
    kubelet.start()
    for hangs in (True, False):
        mark = kubelet.log.mark()
        plugin = launch(tree, kubelet, "--cdi-dir", str(file.parent))
        kubelet.wait_status(R150, 1, 1, after=mark)
        if hangs:
            assert not kubelet.allocate(R150, [N150[0].id]).get("cdi_devices")
            bound("SIGTERM to the end while a write hangs", plugin.end()[1], 1.5)
            draft.unlink()
    until(lambda: kubelet.allocate(R150, [N150[0].id]).get("cdi_devices"))
    kubelet.pre_start(R150, [N150[0].id])
    tree.add(replace(tree.remove(FIRST_BDF), n=4))
    until(lambda: file.exists() and "/4" in file.read_text())
    with refused("FAILED_PRECONDITION", "/dev/tenstorrent/0", "delete the Pod"):
        kubelet.pre_start(R150, [N150[0].id])


LABELLED = "n300=4 t3000; n300=3; n300=4,n150=1; p300=2; galaxy-wormhole=32 galaxy; "
LABELLED += "galaxy-wormhole=31; galaxy-blackhole=32 galaxy; galaxy-blackhole=33"


@pytest.mark.parametrize("node", LABELLED.split("; "))
def test_labels(room: Path, node: str) -> None:
    """Count and firmware of each model, the driver; the topology where the cards leave no doubt."""
    cards, _, topology = node.partition(" ")
    tt.make_fake_tree(room, tt.fake_spec(cards))
    expected = ["driver-version=2.10.0"] + [f"topology={topology}"] * bool(topology)
    for model, count in tt.fake_spec(cards).items():
        expected += [f"{model}.count={count}", f"{model}.firmware=19.5.0.0"]
    settings = tt.Settings(resource_domain="example.com")
    found = tt.node_labels(settings, metrics_of(room).inventory.snapshot).splitlines()
    assert sorted(found) == sorted(f"example.com/{label}" for label in expected)


@hypothesis.settings(deadline=None)
@given(st.lists(st.text(max_size=70), max_size=2), st.text(max_size=70))
@hypothesis.example(["x" * 62 + "--x"], "--")
def test_labels_are_valid(firmware: list[str], driver: str) -> None:
    """Whatever the versions are. Of different firmware there is none, without cards nothing."""
    chips = [tt.Chip(f"{n}", firmware=text) for n, text in enumerate(firmware)]
    cards = tuple(tt.Card(one.pci, "n150", R150, (one,), tt.Verdict()) for one in chips)
    text = tt.node_labels(tt.Settings(), tt.Snapshot(cards, driver=driver))
    found = dict(line.split("=", 1) for line in text.splitlines())
    valid = re.compile(r"[A-Za-z0-9]([A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?").fullmatch
    assert all(map(valid, found.values())) and bool(found) == bool(cards)
    assert len({*firmware}) == 1 or f"{R150}.firmware" not in found


####################################################################################################
# D. The command line: flags, --list, --dry-run, --fake
####################################################################################################

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
    name = flag[2:].replace("-", "_")
    variable, plain = f"TT_DEVICE_PLUGIN_{name.upper()}", tt.parse([], {})
    options = tt.parse([], {variable: value})
    assert vars(options).keys() == vars(plain).keys() and options != plain
    assert options == tt.parse([flag if other == "-" else f"{flag}={value}"], {})
    assert tt.parse([], {variable: ""}) == plain
    if other != "-":
        assert tt.parse([f"{flag}={other}"], {variable: value}) == tt.parse([f"{flag}={other}"], {})
    for text in wrong:
        for place in (flag, variable) if other != "-" else (variable,):
            argv = [f"{flag}={text}"] if place == flag else []
            with pytest.raises(SystemExit, match="2"):
                tt.parse(argv, {} if argv else {variable: text})
            said = capsys.readouterr().err.splitlines()[-1]
            assert place in said and text.removeprefix("p100=1,") in said, said


def test_usage(command: list[str]) -> None:
    """--help names every flag. What cannot be meant is exit code 2, and a sentence that has it."""
    flags = set(re.findall(r"(?<![\w-])--[a-z-]+", run(command, "--help").stdout))
    assert flags == {*(line.split()[0] for line in FLAGS), "--json", "--help", "--version"}
    done = run(command, "--version")
    assert (done.returncode, done.stdout.count("\n")) == (0, 1) and tt.__version__ in done.stdout
    wrongs = f"--json;--list --dry-run;surplus;--kubelet;--kubelet-dir=/{'k' * 60}"
    for wrong in wrongs.split(";"):
        done = run(command, *wrong.split())
        said = done.stderr.splitlines()[-1]
        assert done.returncode == 2 and wrong.split()[-1].split("=")[0] in said, said
    assert "is 10 bytes too long for the paths of sockets in it" in said


def test_list(command: list[str], room: Path, bound: Bound) -> None:
    """JSON as the design has it; in columns a card is a line, and its reason stands below. No card
    is an answer; a card whose read hangs is not offered, and holds up the others for 2 s."""
    tree = Tree(room)

    def listed() -> list[Event]:
        done = run(command, *tree.flags, "--list", "--json")
        assert done.returncode == 0, done.stderr
        return list(json.loads(done.stdout))

    assert listed() == []
    assert run(command, *tree.flags, "--list").stdout == "No Tenstorrent cards (driver 2.10.0).\n"
    odd = [replace(N150[1], card_type=None), replace(N150[2], card_type="unknown")]
    for chip in (N150[0], N150[3], *odd, *(replace(chip, n=chip.n + 4) for chip in P300)):
        tree.add(chip)
    tree.remove(N150[1].bdf, driver="vfio-pci")
    tree.node(N150[2].bdf).unlink()
    cards, place = listed(), (["/dev/tenstorrent/0"], [FIRST_BDF], 0, N150[0].serial)
    facts = (N150[0].id, R150, "n150", "wormhole", *place, "80.17.0.0", "Healthy", "")
    assert tuple(cards[0].values()) == facts and {" ".join(card) for card in cards} == {
        "id resource model arch device_nodes pci_addresses numa_node board_serial firmware health "
        "reason"
    }
    shown = [(one["resource"] or "not offered", one["id"], one["health"]) for one in cards]
    assert [(resource, health) for resource, _, health in shown] == [
        *[(R150, "Healthy")] * 2,
        *(("tenstorrent.com/p300", "Healthy"), ("tenstorrent.com/wormhole", "Unhealthy")),
        ("not offered", "pending"),
    ]
    table, *below = run(command, *tree.flags, "--list").stdout.strip().split("\n\n")
    head, *rows = table.splitlines()
    a, b, c = (head.index(word) for word in ("ID ", "DEVICE ", "HEALTH"))
    assert [(row[:a].strip(), row[a:b].strip(), row[c:]) for row in rows] == shown
    assert below == [f"{one['id']}: {one['reason']}" for one in cards if one["reason"]]
    assert "device node /dev/tenstorrent/2 is missing" in below[0] and "vfio-pci" in below[1]
    tree.hang(N150[3].bdf, "tt_heartbeat")
    began = time.monotonic()
    (hanging,) = (card for card in listed() if card["id"] == N150[3].bdf)
    bound("--list beside a read that hangs", time.monotonic() - began, 2.5)
    assert hanging["resource"] is None and "does not return" in hanging["reason"]


def test_dry_run(command: list[str], four: Tree, kubelet: Kubelet) -> None:
    """The five steps of README on this node's cards, or on one of each model. No kubelet notices,
    and no file is written. Where it fails, it says after which step."""
    kubelet.start()
    mark, models = kubelet.log.mark(), ",".join(f"{model}=1" for model in tt.FAKE_CARDS)
    own = [*four.flags, f"--kubelet-dir={kubelet.root}", f"--cdi-dir={kubelet.root}/cdi"]
    words = [R150, "/dev/tenstorrent/3", "PCIDEVICE_TENSTORRENT_COM_N150", N150[3].id]
    others = [f'tenstorrent.com/{model}"' for model in tt.FAKE_CARDS]
    for flags, expected in ((own, words), ([f"--fake={models}"], others)):
        done = run(command, *flags, "--dry-run")
        assert (done.returncode, done.stderr) == (0, ""), done
        steps = dict.fromkeys(re.findall(r"^([1-9])\. ", done.stdout, re.M))
        assert list(steps) == list("12345") and done.stdout.endswith("\nEvery step held.\n")
        assert [word for word in expected if word not in done.stdout] == []
    assert kubelet.log.mark() == mark and os.listdir(kubelet.root) == ["device-plugins"]
    for chip in N150:
        four.node(chip.bdf).unlink()
    for flags, step in ([], "3. ListAndWatch: "), (["--sysfs-root=/nowhere"], "1. Discover: "):
        done = run(command, *four.flags, *flags, "--dry-run")
        assert done.returncode == 1 and "\nFAILED after the step above: " in done.stdout
        assert done.stdout.split("\n\n")[-2].lstrip().startswith(step), done


@pytest.mark.parametrize("ending", [signal.SIGTERM, signal.SIGINT])
def test_fake_cards(kubelet: Kubelet, launch: Launch, ending: signal.Signals) -> None:
    """They go the way of real ones: one that is taken out of the tree, whose place is said, is
    Unhealthy. A Pod's device nodes are /dev/null. The tree goes with the process."""
    kubelet.start()
    plugin = launch(None, kubelet, "--fake", "n150=2,p300=1")
    kubelet.wait_status(R150, 2, 2)
    kubelet.wait_status("tenstorrent.com/p300", 1, 1)
    answer = kubelet.allocate("tenstorrent.com/p300", kubelet.ids("tenstorrent.com/p300"))
    assert [node["host_path"] for node in answer["devices"]] == ["/dev/null"] * 2
    place = plugin.wait_for_line("made-up cards in").text.split(" in ")[1].split(":")[0]
    Path(place, "sys/class/tenstorrent/tenstorrent!0").unlink()
    kubelet.wait_status(R150, 2, 1)
    assert plugin.end(ending)[0] == 0 and not Path(place).exists() and not sockets(kubelet)


@pytest.mark.parametrize("variants", [False, True])
def test_fake_tree_of_every_model(room: Path, variants: bool) -> None:
    """Discovery finds in the tree what was asked for: Healthy cards with IDs of their own; a p300
    has two chips, a tray eight cards. --variants keeps the letter of a model."""
    counts = dict.fromkeys(tt.FAKE_CARDS, 2) | {"galaxy-wormhole": 40, "galaxy-blackhole": 9}
    tt.make_fake_tree(room, counts)
    settings = tt.Settings(sysfs_root=room / "sys", dev_root=room / "dev", variants=variants)
    cards = tt.discover_once(settings).cards
    letter = "a" if variants else ""
    models = {model + letter * model.startswith("p"): count for model, count in counts.items()}
    assert Counter(card.model for card in cards if card.verdict.health == "Healthy") == models
    assert {card.resource for card in cards} == {f"tenstorrent.com/{model}" for model in models}
    assert len({card.id for card in cards}) == len(cards) == sum(counts.values())
    assert all(len(card.chips) == 1 + card.model.startswith("p300") for card in cards)
    trays = Counter(tt.tray(card) for card in cards if tt.tray(card))
    assert sorted(trays.values()) == [1, *[8] * 6]


@pytest.mark.parametrize(("uid", "later"), [(0, False), (0, True), (65534, False)])
def test_cannot_work(
    command: list[str], four: Tree, kubelet: Kubelet, uid: int, later: bool
) -> None:
    """Without the right to make sockets, at the start or when the folder is made anew: exit code 1,
    and a sentence that names folder, user and remedy. No file is left."""
    user = ["setpriv", "--bounding-set=-all", "--inh-caps=-all"]
    user += [f"--reuid={uid}", f"--regid={uid}", "--clear-groups"]
    if os.getuid() or finish([*user, *command, "--version"]).returncode:
        pytest.skip(f"needs setpriv, root, and an interpreter that uid {uid} can read")
    file, flags = kubelet.root / "cdi" / CDI, ["--kubelet-dir", str(kubelet.root), *four.flags]
    kubelet.folder.mkdir(mode=0o750, parents=True)
    if not later:
        os.chown(kubelet.folder, 65533, 65533)
    words = [*user, *command, *flags, f"--cdi-dir={file.parent}"]
    with contextlib.closing(Plugin(words)) as plugin:
        if later:
            until(file.exists)
            kubelet.folder.rename(kubelet.root / "old")
            kubelet.folder.mkdir(mode=0)
        plugin.reader.join(10)
        said, name = plugin.lines()[-1], f"uid {uid} cannot make sockets in {kubelet.folder}. "
        assert plugin.process.returncode == 1 and name in said and "run the plugin as uid 0" in said
    assert not file.exists()


####################################################################################################
# 7. Tests of the packed file: what is in it, and where it runs
####################################################################################################


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


@functools.cache
def interpreters() -> dict[int, str]:
    """The CPythons 3.N of this machine, by N: pyenv's, and those on PATH."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    found = {n: path for n in range(4, 20) if (path := shutil.which(f"python3.{n}"))}
    for python in pyenv.glob("versions/3.*/bin/python3"):  # and not its shims, which may refuse
        found[int(python.parts[-3].split(".")[1])] = str(python)
    return found


def pins() -> dict[str, str]:
    """Name and version of each package in the runtime part of requirements.txt."""
    part = (HERE / "requirements.txt").read_text().split("# ---- ")[1]
    return dict(re.findall(r"^([\w.-]+)==(\S+)", part, re.M))


def test_same_input_same_bytes(packed: Path) -> None:
    """Another umask, locale, time zone, for the universal file another interpreter: the same bytes,
    and the build says their SHA-256."""
    before, words = packed.read_bytes(), ["--universal"] if packed == UNIVERSAL else []
    others = [path for n, path in interpreters().items() if words and n in PYTHONS]
    packed.unlink()
    python = [sys.executable, *others][-1]
    done = build(HERE, *words, umask=0o077, LC_ALL="C", TZ="Asia/Kolkata", PYTHON=python)
    assert done.returncode == 0, done.stdout + done.stderr
    assert packed.read_bytes() == before
    assert hashlib.sha256(before).hexdigest() in done.stdout
    assert stat.S_IMODE(packed.stat().st_mode) == 0o755, "any user may run it"


def test_what_is_inside(packed: Path) -> None:
    """Nothing says where or when it was built; native modules are there for just the interpreters
    that it is for. The universal file has a list of contents: valid CycloneDX, and true."""
    with zipfile.ZipFile(packed) as archive:
        entries = archive.infolist()
        content = {entry.filename: archive.read(entry) for entry in entries}
    assert list(content) == sorted(content)
    dates_and_modes = {(entry.date_time[0], entry.external_attr >> 16) for entry in entries}
    assert dates_and_modes == {(1980, 0o100644)}
    assert [name for name, data in content.items() if str(HERE).encode() in data] == []
    found = re.findall(r"cygrpc\.cpython-3(\d+)-(\w+)-linux-gnu\.so$", "\n".join(content), re.M)
    if packed == PYZ:
        assert found == [(str(sys.version_info.minor), platform.machine())]
        return
    assert {*found} == {(str(minor), cpu) for minor in PYTHONS for cpu in DEBIAN_CPU}
    text = content["sbom.cdx.json"].decode()
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(text) is None
    sbom = json.loads(text)
    listed = {one["name"].replace("_", "-"): one["version"] for one in sbom["components"]}
    assert listed == pins() and all(one["licenses"] for one in sbom["components"])
    about = sbom["metadata"]["component"]
    assert (about["name"], about["version"]) == ("tt-device-plugin", tt.__version__)


NOBODY = "PIP_INDEX_URL=http://127.0.0.1:1/simple PIP_EXTRA_INDEX_URL= PIP_FIND_LINKS= "
NOBODY += "PIP_CONFIG_FILE=/dev/null PIP_NO_CACHE_DIR=1 PIP_RETRIES=0"
# What is changed in requirements.txt, the words after ./build.sh, its variables, what it says.
REFUSED = {
    "a tampered mirror": (r"sha256:\w{8}", "sha256:00000000", "", "", "hash"),
    "a list not locked": ("for: grpcio==", "for: grpcio!=", "", "", r"\./build\.sh lock"),
    "the user's index, no other": ("^", "", "", NOBODY, "grpcio"),
    "no container tool": ("^", "", "image", "TOOL=no-such-tool", "no-such-tool(.|\n)*podman"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_builds(tmp_path: Path, case: str) -> None:
    """A sentence and exit code 1, and no file, in a folder that has built nothing yet."""
    ignore = shutil.ignore_patterns("build", "dist", ".git", "__pycache__", ".*cache")
    project = Path(shutil.copytree(HERE, tmp_path / "project", ignore=ignore))
    old, new, words, variables, says = REFUSED[case]
    path = project / "requirements.txt"
    path.write_text(re.sub(old, new, path.read_text()))
    more: dict[str, Any] = dict(one.split("=", 1) for one in variables.split())
    done = build(project, *words.split(), **more)
    assert done.returncode == 1 and re.search(says, done.stderr, re.I), done.stderr
    assert not (project / "dist").exists()


# Where it runs

CPU, OTHER = ("x86_64", "aarch64")[:: 1 if platform.machine() == "x86_64" else -1]
DEBIAN_CPU = {"x86_64": "amd64", "aarch64": "arm64"}
PYZ_THERE = f"/srv/dist/{UNIVERSAL.name}"
# Debian's suite, its packages, and a command there. /srv is this folder, /home this machine's
# /usr/bin. The first is without the archive, on Debian 12's own grpcio 1.51 and protobuf 3.21.
BOXES = {
    "Debian's packages": "bookworm python3,python3-grpcio,python3-protobuf "
    "python3 -B /srv/tt_device_plugin.py",
    "bookworm": f"bookworm python3 python3 {PYZ_THERE}",
    "trixie": f"trixie python3 python3 {PYZ_THERE}",
    "forky": f"forky python3.15 python3.15 {PYZ_THERE}",
    "other CPU": f"trixie python3 /home/qemu-{OTHER}-static /usr/bin/python3 {PYZ_THERE}",
    "image": "bookworm python3",
}
EXTRA_TOOLS = {"image": "podman", "other CPU": f"qemu-{OTHER}-static"}
PLACES = [10, *(pytest.param(one, marks=long_only) for one in (*PYTHONS[1:], *BOXES))]

# Runs the rest of the line in $ROOT as "nonroot" of many images, with only these $VARIABLES in the
# environment; everything is read-only but the kubelet's folder, and all vanishes with the process.
BOX = r"""
cd "$ROOT"; mount --bind . .; cd "$ROOT"
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
    # Mirrors and snapshots may be older than a release's lists are meant to be used.
    options = ["--variant=extract", f"--architectures={DEBIAN_CPU[cpu]}"]
    options += ['--aptopt=Acquire::Check-Valid-Until "false"']
    options += [f"--include=base-files,libstdc++6,{packages}", suite]
    digest = hashlib.sha256(repr(options).encode()).hexdigest()[:12]
    root = HERE / "build/roots" / f"{suite}-{DEBIAN_CPU[cpu]}-{digest}"
    if not root.exists():  # one that is there is whole
        root.parent.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=root.parent) as draft:
            done = finish(["mmdebstrap", *options, f"{draft}/root"], umask=0o022)
            assert done.returncode == 0, done.stderr
            for name in ("dev", "proc", "mnt", "srv", "home"):  # what BOX mounts things on
                Path(draft, "root", name).mkdir(exist_ok=True)
            Path(draft, "root").rename(root)
    return root


@pytest.fixture
def storage(tmp_path: Path) -> Iterator[dict[str, str]]:
    """Variables with which podman keeps all that it makes in a folder of this test."""
    text = f'[storage]\ndriver = ""\ngraphroot = "{tmp_path}/images"\nrunroot = "{tmp_path}/run"\n'
    (tmp_path / "storage.conf").write_text(text)
    conf = str(tmp_path / "storage.conf")
    yield {"CONTAINERS_STORAGE_CONF": conf, "BUILDAH_ISOLATION": "chroot"}
    mounted = re.findall(rf"^\S+ ({tmp_path}/\S+)", Path("/proc/self/mounts").read_text(), re.M)
    for point in reversed(mounted):
        subprocess.run(["umount", point], check=True)
    shutil.rmtree(tmp_path / "images", ignore_errors=True)


def make_image(base: Path, storage: dict[str, Any]) -> tuple[Path, list[str], str]:
    """An image from a base that has a Python: its files, entry point, and variables."""
    name = "localhost/p:1"

    def podman(*words: str, stdin: str = "") -> str:
        done = finish(["podman", *words], input=stdin, env={**os.environ, **storage})
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    words = ["build", "-q", "-t", "localhost/base", "-f", "-", str(base)]
    podman(*words, stdin="FROM scratch\nCOPY . /\n")
    done = build(HERE, "image", name, TOOL="podman", BASE="localhost/base", **storage)
    assert done.returncode == 0 and name in done.stdout, done.stdout + done.stderr
    about = json.loads(podman("inspect", "--type=image", name))[0]["Config"]
    assert about["Labels"]["org.opencontainers.image.version"] == tt.__version__
    assert not about.get("Cmd") and not about.get("User")
    variables = " ".join(one for one in about["Env"] if not one.startswith("PATH="))
    return Path(podman("image", "mount", name)), about["Entrypoint"], variables


@pytest.mark.parametrize("place", PLACES)
def test_serves_on(four: Tree, kubelet: Kubelet, storage: dict[str, str], place: Any) -> None:
    """The universal file on the CPythons of this machine, with an empty environment, and in bare
    Debians, where Python and libstdc++6 are all that it needs; and an image, which compiles nothing
    when it starts. All cards are offered, a Pod gets one, SIGTERM ends the plugin."""
    kubelet.start()
    assert build(HERE, "--universal").returncode == 0
    there = str(kubelet.root.parent)
    box: dict[str, Any] = {"ROOM": there, "HERE": str(HERE), "VARIABLES": ""}
    if isinstance(place, int):
        if not (python := interpreters().get(place)):
            pytest.skip(f"there is no python3.{place} here, neither pyenv's nor on PATH")
        command = ["env", "-i", python, str(UNIVERSAL)]
        packages = f"grpcio {pins()['grpcio']}, protobuf {pins()['protobuf']}"
        pattern = rf"tt-device-plugin {tt.__version__} \(Python 3\.{place}\.\S+, {packages}\)\n"
        assert re.fullmatch(pattern, run(command, "--version").stdout)
    else:
        tools = {"mmdebstrap", EXTRA_TOOLS.get(place, "unshare")}
        if not all(map(shutil.which, tools)) or finish(["unshare", "-m", "true"]).returncode:
            pytest.skip(f"needs root that may make a mount namespace, and {', '.join(tools)}")
        suite, packages, *words = BOXES[place].split()
        root, there = debian_root(suite, packages, OTHER if place == "other CPU" else CPU), "/mnt"
        if place == "image":
            root, words, box["VARIABLES"] = make_image(root, storage)
        box["ROOT"] = str(root)
        os.chown(kubelet.folder, 65532, 65532)
        (kubelet.folder / "kubelet.sock").chmod(0o666)
        if place == "image":
            done = run([*IN_BOX, words[0], "-v", *words[1:], "--version"], **box)
            compiled = re.findall(r"^# code object from '?(/.*\.py)'?$", done.stderr, re.M)
            assert done.returncode == 0 and compiled == [], compiled
        command = [*IN_BOX, *words]
    flags = f"--kubelet-dir={there}/k --sysfs-root={there}/sys --dev-root={there}/dev".split()
    with contextlib.closing(Plugin([*command, *flags], cwd="/", env=environment(**box))) as plugin:
        kubelet.wait_status(R150, 4, 4, timeout=300)
        (device,) = kubelet.allocate(R150, [N150[2].id])["devices"]
        assert device["host_path"] == "/dev/tenstorrent/2"
        assert plugin.end()[0] == 0, plugin.lines()


def test_says_what_it_is_for(packed: Path, tmp_path: Path) -> None:
    """A Python that is not in the file gets one sentence with those that are, and exit code 1."""
    wrong = [path for n, path in interpreters().items() if n < min(PYTHONS)]
    ways = [[python, str(packed)] for python in wrong[:1]]
    bare = tmp_path / "bare.pyz"  # on this Python, without the native modules for it
    with zipfile.ZipFile(packed) as archive, zipfile.ZipFile(bare, "w") as made:
        for name in archive.namelist():
            if not name.endswith(".so"):
                made.writestr(name, archive.read(name))
    for way in [*ways, [sys.executable, str(bare)]]:
        done = run(way, "--version")
        assert done.returncode == 1 and done.stderr.count("\n") == 1 and not done.stdout, done
        assert "is not for this Python" in done.stderr
        for minor in PYTHONS if packed == UNIVERSAL and way in ways else ():
            assert f"3.{minor}" in done.stderr


def test_first_start_of_many(packed: Path, tmp_path: Path) -> None:
    """Eight at once, from a folder with spaces, as a command: all start, and none leaves a file."""
    folder, empty = tmp_path / "a folder with spaces", tmp_path / "empty"
    folder.mkdir()
    empty.mkdir()
    shutil.copy(packed, folder / "the file")
    path = f"{Path(sys.executable).parent}:/usr/bin:/bin"
    env = {"PATH": path, "HOME": str(empty), "TMPDIR": str(empty)}
    popen: dict[str, Any] = {"stdout": subprocess.PIPE, "text": True, "env": env, "cwd": empty}
    running = [subprocess.Popen([folder / "the file", "--version"], **popen) for _ in range(8)]
    (answer,) = {process.communicate(timeout=120)[0] for process in running}
    assert [process.returncode for process in running] == [0] * 8 and tt.__version__ in answer
    assert [*empty.iterdir(), *folder.iterdir()] == [folder / "the file"]


def test_without_what_it_needs(packed: Path, tmp_path: Path) -> None:
    """No memfd_create: a nameless temporary file does. No module of Python's: a sentence."""
    program = "import os, runpy, sys; del os.memfd_create; del sys.argv[0]; "
    program += "runpy.run_path(sys.argv[0], run_name='__main__')"
    done = run([sys.executable, "-c", program, str(packed)], "--version")
    assert done.returncode == 0 and tt.__version__ in done.stdout, done.stderr
    (tmp_path / "asyncio.py").write_text("raise ImportError('there is no asyncio here')\n")
    done = run([sys.executable, str(packed)], "--version", PYTHONPATH=str(tmp_path))
    assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
    assert "there is no asyncio here" in done.stderr and "libstdc++6" in done.stderr


####################################################################################################
# 8. Tests of what README and daemonset.yaml say
####################################################################################################

README = (HERE / "README.md").read_text()
FILE_MANIFEST: Event = yaml.safe_load((HERE / "daemonset.yaml").read_text())
VERSIONS = kubernetes_validate.utils.all_versions()
VERSIONS = sorted(VERSIONS, key=lambda text: [*map(int, text.split("."))])[:: len(VERSIONS) - 1]


def blocks(language: str) -> list[str]:
    """README's code blocks of a language."""
    found = re.findall(rf"^```{language}\n(.*?)^```$", README, re.M | re.S)
    return [textwrap.dedent(block) for block in found]


def table(head: str) -> list[list[str]]:
    """The cells of README's table whose first column has this head."""
    found = re.search(rf"^\| {head} \|.*\n\|[-|: ]+\|\n((?:\|.*\|\n)+)", README, re.M)
    assert found, f"README has no table of {head}"
    lines = found[1].splitlines()
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


def in_code(cell: str) -> list[str]:
    """What is in backticks in a cell."""
    return re.findall(r"`([^`]+)`", cell)


@pytest.fixture(scope="session", params=["daemonset.yaml", "image"])
def manifest(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Event:
    """The manifest for the file on the node, and dist/daemonset.yaml as `./build.sh image` writes
    it: here with a tool that builds nothing."""
    if request.param != "image":
        return FILE_MANIFEST
    tool = tmp_path_factory.mktemp("tool") / "podman"
    tool.write_text("#!/bin/sh\ncat >/dev/null\n")
    tool.chmod(0o755)
    done = build(HERE, "image", "registry.example/plugin:7", TOOL=str(tool))
    assert done.returncode == 0, done.stdout + done.stderr
    return dict(yaml.safe_load((HERE / "dist/daemonset.yaml").read_text()))


def readme_pods() -> list[Event]:
    """The Pods in README.md."""
    found = [yaml.safe_load(block) for block in blocks("yaml") if "kind: Pod\n" in block]
    assert found, "README has no Pods"
    return found


def container_of(manifest: Event) -> Event:
    """Its only container."""
    (container,) = manifest["spec"]["template"]["spec"]["containers"]
    return dict(container)


@pytest.mark.parametrize("version", VERSIONS)
def test_schemas(manifest: Event, version: str) -> None:
    """In manifests and README's Pods no field is unknown, which would be found, or of the wrong
    type, for the oldest and the newest Kubernetes that there are schemas of."""
    for one in (manifest, *readme_pods()):
        kubernetes_validate.validate(one, version, strict=True)
    wrong = {**manifest, "spec": {**manifest["spec"], "replica": 1}}
    with pytest.raises(kubernetes_validate.ValidationError, match="replica"):
        kubernetes_validate.validate(wrong, version, strict=True)


def test_manifest_host(manifest: Event) -> None:
    """Of the host it has the kubelet's folder, /dev and, without an image of its own, the plugin's
    file; the first alone is writable, and the flags name the same paths. The port that the plugin
    listens on is the one that is declared, probed and scraped."""
    template, container = manifest["spec"]["template"], container_of(manifest)
    paths = {one["name"]: one["hostPath"]["path"] for one in template["spec"]["volumes"]}
    mounts = {paths[mount["name"]]: mount for mount in container["volumeMounts"]}
    folder, own = "/var/lib/kubelet/device-plugins", set[str]()
    if "python:" in container["image"]:
        own = {next(path for path in mounts if path.startswith("/opt/tenstorrent"))}
    assert mounts.keys() == {folder, "/dev"} | own
    assert [path for path in mounts if not mounts[path].get("readOnly")] == [folder]
    assert mounts[folder]["mountPath"] == folder, "below --kubelet-dir's default"
    assert f"--dev-root={mounts['/dev']['mountPath']}" in container["args"]
    (port,) = container["ports"]
    assert f"--listen=:{port['containerPort']}" in container["args"]
    for probe in ("livenessProbe", "readinessProbe"):
        assert container[probe]["httpGet"]["port"] in (port["name"], port["containerPort"])
    scraped = template["metadata"]["annotations"]["prometheus.io/port"]
    assert scraped == str(port["containerPort"])


def test_manifest_security(manifest: Event) -> None:
    """uid 0 without any right, and no part in the host's network, processes or API server."""
    spec, context = manifest["spec"]["template"]["spec"], container_of(manifest)["securityContext"]
    assert context["runAsUser"] == 0 and context["capabilities"] == {"drop": ["ALL"]}
    assert context["readOnlyRootFilesystem"] and not context["allowPrivilegeEscalation"]
    assert not context["privileged"] and context["seccompProfile"] == {"type": "RuntimeDefault"}
    assert spec["automountServiceAccountToken"] is False
    assert not {"hostNetwork", "hostPID", "hostIPC", "serviceAccountName"} & spec.keys()


def test_manifest_waits_for_the_file(room: Path) -> None:
    """Where the plugin's file is missing, the container says in one line what to copy, and waits;
    once the file is there, it is run with the manifest's flags. SIGTERM ends the waiting."""
    container, ends = container_of(FILE_MANIFEST), {"/opt/tenstorrent": str(room), "7762": "0"}
    words = [*container["command"], *container["args"]]
    words = [re.sub("|".join(ends), lambda found: ends[found[0]], word) for word in words]
    with zipfile.ZipFile(room / "draft", "w") as file:
        file.writestr("__main__.py", "import sys; sys.exit('RUNS ' + ' '.join(sys.argv))")
    for copied in (True, False):
        with contextlib.closing(Plugin(words)) as waiting:
            waiting.wait_for_line(r"tt-device-plugin\.pyz")
            if copied:
                (room / "draft").rename(room / "tt-device-plugin.pyz")
                line = waiting.wait_for_line("^RUNS", timeout=30).text
                assert "--listen" in line and len(waiting.lines()) == 2, waiting.lines()
                (room / "tt-device-plugin.pyz").unlink()
            else:
                waiting.end(timeout=5)  # and not only by force, after the Pod's grace period


def test_readme_pods(kubelet: Kubelet, launch: Launch) -> None:
    """README's Pods are admitted and started on a node with such cards, and get what it says."""
    kubelet.start()
    plugin = launch(None, kubelet, "--fake=n150=3,p300=1,galaxy-wormhole=32", "--hugepages=always")
    for resource, count in ((R150, 3), ("tenstorrent.com/galaxy-wormhole", 32)):
        kubelet.wait_status(resource, count, count)
    for pod in readme_pods():
        name, (container,) = pod["metadata"]["name"], pod["spec"]["containers"]
        limits = container["resources"]["limits"]
        want = {key: count for key, count in limits.items() if key.startswith("tenstorrent.com/")}
        got = kubelet.admit(name, want)
        each = 2 if "tenstorrent.com/p300" in want else 1
        assert len(got["devices"]) == each * sum(want.values()), name
        for resource, count in want.items():
            kubelet.pre_start(resource, got["ids"][resource])
            variable = "PCIDEVICE_" + re.sub(r"\W", "_", resource).upper()
            addresses = got["envs"][variable].split(",")
            if count == 8:
                assert len({address[:6] for address in addresses}) == 1, "all of one tray"
        kubelet.delete_pod(name)
    plugin.end()  # so that it removes what it made up


def test_readme_first_command() -> None:
    """README's first command prints what README shows, where that is not cut."""
    (words,) = re.findall(r"^\./build\.sh (run .*)$", blocks("sh")[0], re.M)
    done = build(HERE, *words.split())
    assert done.returncode == 0, done.stdout + done.stderr
    printed = [" ".join(line.split()) for line in done.stdout.splitlines()]
    for line in blocks("text")[0].splitlines():
        pattern = re.escape(" ".join(line.split())).replace(r"\.\.\.", ".*")
        pattern = re.sub(r"-[0-9a-f]{6}\\\.sock", r"-[0-9a-f]{6}\.sock", pattern)  # of a process
        assert any(re.fullmatch(pattern, one) for one in printed), f"{line!r}:\n{done.stdout}"


def test_readme_unit(tmp_path: Path) -> None:
    """`./build.sh unit`: no fault, the path that README installs to, the exposure that it says."""
    if not shutil.which("systemd-analyze"):
        pytest.skip("there is no systemd-analyze: it is in the package systemd")
    unit = tmp_path / "tt-device-plugin.service"
    unit.write_text(build(HERE, "unit").stdout)
    (file,) = re.findall(r"^ExecStart=\S+ (\S+)$", unit.read_text(), re.M)
    assert any(file in block for block in blocks("sh")), "README installs what the unit starts"
    verify = finish(["systemd-analyze", "verify", unit])
    assert verify.returncode == 0 and not verify.stderr, verify.stderr
    security = ["systemd-analyze", "security", "--offline=true", str(unit)]
    text = finish(security, env=environment(LC_ALL="C")).stdout
    found = re.search(r"exposure level for \S+: (\d+\.\d)", text)
    if not found:
        pytest.skip("this systemd-analyze is older than 250: it judges loaded units only")
    said = re.search(r"exposure level of (\d+\.\d)", README)
    assert said and float(found[1]) <= float(said[1]) < 2, text


def test_readme_flags(command: list[str]) -> None:
    """README has each flag of --help with its variable, and nothing there is run with another."""
    text = run(command, "--help", COLUMNS="200").stdout
    known = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", text))
    rows = [(flag, row[1]) for row in table("flag") for flag in re.findall("--[a-z-]+", row[0])]
    assert {flag for flag, _ in rows} == known
    variables = {flag: "TT_DEVICE_PLUGIN_" + flag[2:].upper().replace("-", "_") for flag in known}
    assert [flag for flag, cell in rows if in_code(cell) not in ([variables[flag]], [])] == []
    assert {flag for flag, cell in rows if not in_code(cell)} == {"--help", "--version"}
    lines = re.findall(r"\.pyz (--.*)$|^\./build\.sh run (.*)$", README, re.M)
    words = [word for pair in lines for word in " ".join(pair).split()]
    words += container_of(FILE_MANIFEST)["args"]
    used = {flag for word in words for flag in re.findall(r"^--[a-z-]+", word)}
    assert used and used <= known


def test_readme_exit_codes(command: list[str], tree: Tree) -> None:
    """Each of the codes that README has, and no other."""
    ways = (["--list"], ["--dry-run"], ["--no-such-flag"])  # done; a step failed; usage
    codes = [run(command, *tree.flags, *flags).returncode for flags in ways]
    assert [str(code) for code in codes] == [row[0].strip("`") for row in table("exit code")]


def test_readme_metrics(every_metric: str) -> None:
    """README's table has each metric that the plugin exposes, and no other."""
    exposed = set(re.findall(r"^# TYPE (\S+) ", every_metric, re.M))
    assert {name for row in table("metric") for name in in_code(row[0])} == exposed


def test_readme_links() -> None:
    """Each link within README leads to a heading, each relative one to a file."""
    heads = re.findall(r"^#+ (.*)$", README, re.M)
    anchors = {"#" + re.sub(r"[^a-z0-9 _-]", "", head.lower()).replace(" ", "-") for head in heads}
    links = {link for link in re.findall(r"\]\(([^)]+)\)", README) if "://" not in link}
    assert links
    assert [one for one in links if one not in anchors and not (HERE / one).is_file()] == []


def test_readme_version() -> None:
    """README and the manifest name this version where they name one."""
    text = README + (HERE / "daemonset.yaml").read_text()
    assert set(re.findall(r"tt-device-plugin:(\d+\.\d+\.\d+)", text)) <= {tt.__version__}


def test_readme_symptoms(request: pytest.FixtureRequest) -> None:
    """Each symptom in README's table is what the plugin said in some other test of this run ("..."
    stands for anything)."""
    everything = {name for name in globals() if name.startswith("test_")}
    ran = {getattr(item, "originalname", "") for item in request.session.items}
    if missing := everything - ran:
        pytest.skip(f"only a part of the tests runs, without {len(missing)} such as {min(missing)}")
    said = "\n".join(SAID)
    symptoms = [in_code(row[0])[0] for row in table("symptom")]
    patterns = {one: ".+".join(map(re.escape, one.split("..."))) for one in symptoms}
    assert [one for one in symptoms if not re.search(patterns[one], said)] == []


# Without Kubernetes: CDI, as podman reads it. In a mount namespace of its own with an empty /run,
# so that no other spec or container is in the way. As hardly any container lets one raise limits,
# they stay what they are. runc, as crun refuses some hosts' cgroups.
PODMAN = r"""
mount -t tmpfs none /run
mkdir /run/cdi
cp "$1" /run/cdi
shift
exec podman --root "$STATE/root" --runroot "$STATE/run" --tmpdir "$STATE/tmp" \
    --cgroup-manager cgroupfs --runtime runc \
    run --rm --network none --ulimit nofile=1024:1024 --ulimit nproc=1024:1024 "$@"
"""


def test_podman_takes_the_cdi_spec(kubelet: Kubelet, launch: Launch, room: Path) -> None:
    """`--device tenstorrent.com/card=...`: the device nodes of that card, and no other."""
    tools = ("podman", "runc", "busybox", "unshare")
    if missing := [tool for tool in tools if not shutil.which(tool)]:
        pytest.skip(f"needs podman, runc, busybox (static) and unshare; missing: {missing}")
    if os.getuid():
        pytest.skip("needs root, for mounts")
    for name in ("cdi", "state", *(f"root/{one}" for one in ("bin", "dev", "proc", "sys", "run"))):
        (room / name).mkdir(parents=True)
    shutil.copy(str(shutil.which("busybox")), room / "root/bin/busybox")
    kubelet.start()
    plugin = launch(None, kubelet, "--fake", "n150=2,p300=1", "--cdi-dir", str(room / "cdi"))
    kubelet.wait_status("tenstorrent.com/p300", 1, 1)
    (p300,) = kubelet.ids("tenstorrent.com/p300")
    (spec,) = (room / "cdi").iterdir()
    script, env = ["unshare", "--mount", "sh", "-ec", PODMAN, "sh", str(spec)], environment()
    for name, nodes in {"all": "0 1 2 3", "1": "1", p300: "2 3"}.items():
        words = ["--device", f"tenstorrent.com/card={name}", "--rootfs", str(room / "root")]
        words += ["/bin/busybox", "ls", "/dev/tenstorrent"]
        env["STATE"] = str(room / "state")
        done = finish([*script, *words], timeout=60, env=env)
        assert done.returncode == 0, done.stderr
        assert done.stdout.split() == nodes.split(), done.stdout
    plugin.end()  # so that it removes what it made up
