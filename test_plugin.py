"""Tests of the Tenstorrent device plugin, and the fake kubelet that they run against.

How to read it, top to bottom:
  1. The wire: the kubelet's API as a table. The fake kubelet builds its messages from this table and not from the plugin's
     stubs, so every test below is also a test of the wire.
  2. The fake kubelet: what a kubelet does, as a program. It is a process of its own, so that killing, pausing and
     stopping it are the real thing. `python test_plugin.py --fake-kubelet DIR` starts one by hand.
  3. The harness: the kubelet, the plugin and a sysfs tree as seen from a test; nothing in it waits by sleeping.
  4. Unit tests.
  5. Tests of the fake kubelet itself, against a puppet of a plugin: a wrong kubelet would prove nothing.
  6. Tests of the plugin: registration, health, calls for a Pod, command line, faults, operations.
  7. Tests of the packed file. 8. Tests of README and daemonset.yaml. 9. Benchmarks.

Numbers such as "contract 5" are the points of the kubelet contract, "story 5" those of what users of other plugins suffer
from: each story is shown by the tests that name it.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import errno
import itertools
import json
import os
import random
import re
import signal
import socket
import stat
import sys
import time
import zlib
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
from google.protobuf import descriptor_pb2, descriptor_pool, json_format, message_factory

HERE = Path(__file__).resolve().parent

########################################################################################################################
# 1. The wire
########################################################################################################################

# Kubernetes 1.36, package v1beta1. One field: number, name, type ("*" repeated, "map" string to string), JSON name.
WIRE: dict[str, list[tuple[int, str, str, str]]] = {
    "Empty": [],
    "DevicePluginOptions": [
        (1, "pre_start_required", "bool", "preStartRequired"),
        (2, "get_preferred_allocation_available", "bool", "getPreferredAllocationAvailable"),
    ],
    "RegisterRequest": [
        (1, "version", "string", "version"),
        (2, "endpoint", "string", "endpoint"),
        (3, "resource_name", "string", "resourceName"),
        (4, "options", "DevicePluginOptions", "options"),
    ],
    "ListAndWatchResponse": [(1, "devices", "*Device", "devices")],
    "Device": [(1, "ID", "string", "ID"), (2, "health", "string", "health"), (3, "topology", "TopologyInfo", "topology")],
    "TopologyInfo": [(1, "nodes", "*NUMANode", "nodes")],
    "NUMANode": [(1, "ID", "int64", "ID")],
    "PreferredAllocationRequest": [(1, "container_requests", "*ContainerPreferredAllocationRequest", "containerRequests")],
    "ContainerPreferredAllocationRequest": [
        (1, "available_deviceIDs", "*string", "availableDeviceIDs"),
        (2, "must_include_deviceIDs", "*string", "mustIncludeDeviceIDs"),
        (3, "allocation_size", "int32", "allocationSize"),
    ],
    "PreferredAllocationResponse": [(1, "container_responses", "*ContainerPreferredAllocationResponse", "containerResponses")],
    "ContainerPreferredAllocationResponse": [(1, "deviceIDs", "*string", "deviceIDs")],
    "AllocateRequest": [(1, "container_requests", "*ContainerAllocateRequest", "containerRequests")],
    "ContainerAllocateRequest": [(1, "devices_ids", "*string", "devicesIds")],
    "AllocateResponse": [(1, "container_responses", "*ContainerAllocateResponse", "containerResponses")],
    "ContainerAllocateResponse": [
        (1, "envs", "map", "envs"),
        (2, "mounts", "*Mount", "mounts"),
        (3, "devices", "*DeviceSpec", "devices"),
        (4, "annotations", "map", "annotations"),
        (5, "cdi_devices", "*CDIDevice", "cdiDevices"),
    ],
    "Mount": [
        (1, "container_path", "string", "containerPath"),
        (2, "host_path", "string", "hostPath"),
        (3, "read_only", "bool", "readOnly"),
    ],
    "DeviceSpec": [
        (1, "container_path", "string", "containerPath"),
        (2, "host_path", "string", "hostPath"),
        (3, "permissions", "string", "permissions"),
    ],
    "CDIDevice": [(1, "name", "string", "name")],
    "PreStartContainerRequest": [(1, "devices_ids", "*string", "devicesIds")],
    "PreStartContainerResponse": [],
}

# Method: request, response, whether the response is a stream.
REGISTRATION = {"Register": ("RegisterRequest", "Empty", False)}
DEVICE_PLUGIN = {
    "GetDevicePluginOptions": ("Empty", "DevicePluginOptions", False),
    "ListAndWatch": ("Empty", "ListAndWatchResponse", True),
    "GetPreferredAllocation": ("PreferredAllocationRequest", "PreferredAllocationResponse", False),
    "Allocate": ("AllocateRequest", "AllocateResponse", False),
    "PreStartContainer": ("PreStartContainerRequest", "PreStartContainerResponse", False),
}


def build_messages() -> dict[str, Any]:
    """The message classes of the table, in a descriptor pool of their own: the plugin's stubs claim the default one."""
    field_type = descriptor_pb2.FieldDescriptorProto
    scalars = {"string": field_type.TYPE_STRING, "bool": field_type.TYPE_BOOL}
    scalars |= {"int32": field_type.TYPE_INT32, "int64": field_type.TYPE_INT64}
    file = descriptor_pb2.FileDescriptorProto(name="kubelet.proto", package="v1beta1", syntax="proto3")
    for message, fields in WIRE.items():
        proto = file.message_type.add(name=message)
        for number, name, kind, json_name in fields:
            new = proto.field.add(number=number, name=name, json_name=json_name, label=field_type.LABEL_OPTIONAL)
            if kind == "map":  # on the wire a map is repeated pairs, in the descriptor a nested message
                entry = proto.nested_type.add(name=name.capitalize() + "Entry")
                entry.options.map_entry = True
                for part, part_name in ((1, "key"), (2, "value")):
                    entry.field.add(number=part, name=part_name, type=field_type.TYPE_STRING, label=field_type.LABEL_OPTIONAL)
                kind = f"*{message}.{entry.name}"
            if kind.startswith("*"):
                new.label = field_type.LABEL_REPEATED
            kind = kind.lstrip("*")
            if kind in scalars:
                new.type = scalars[kind]
            else:
                new.type, new.type_name = field_type.TYPE_MESSAGE, f".v1beta1.{kind}"
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return {name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"v1beta1.{name}")) for name in WIRE}


MESSAGES = build_messages()


def as_dict(message: Any) -> dict[str, Any]:
    """A message as the proto names it, every field present: an absent list reads as an empty one."""
    return json_format.MessageToDict(message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True)


########################################################################################################################
# 2. The fake kubelet
########################################################################################################################

# Generation "later": what the contract says of kubelets after 1.36, a list of clients per resource (contract 5).
GENERATIONS = ("1.20", "1.36", "later")
DIAL_S = 10.0  # the kubelet's limit for dialling a plugin (contract 2)
PRE_START_S = 30.0  # and for PreStartContainer (contract 15)
GRACE_S = 300.0  # a resource without a stream leaves the node's status after this (contract 4)


class Refusal(Exception):
    """What a command of the test meets: a gRPC status of the plugin, or the kubelet's own refusal."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(f"{code}: {message}")
        self.code = code
        self.message = message


@dataclass
class Device:
    """One device of a resource as the plugin announced it last."""

    healthy: bool
    numa: list[int] | None  # None: no topology was sent


@dataclass
class Client:
    """The kubelet's connection to one registered plugin socket."""

    resource: str
    endpoint: str
    channel: grpc.aio.Channel
    pre_start: bool = False
    preferred: bool = False
    stopped: bool = False  # the stream has ended: calls fail without reaching the plugin
    reader: asyncio.Task[None] | None = None  # reads the ListAndWatch stream

    def method(self, name: str) -> Any:
        """The stub of one method of the DevicePlugin service."""
        request, response, streams = DEVICE_PLUGIN[name]
        kind = self.channel.unary_stream if streams else self.channel.unary_unary
        path = f"/v1beta1.DevicePlugin/{name}"
        return kind(path, MESSAGES[request].SerializeToString, MESSAGES[response].FromString)


@dataclass
class Held:
    """What one container holds of one resource, as the checkpoint keeps it."""

    ids: list[str]
    answer: Any  # ContainerAllocateResponse: asked for once, used again for every start of the container (contract 13)


def invalid_registration(request: Any) -> str | None:
    """Why the kubelet refuses to register this, in the kubelet's words where they are known (contract 2)."""
    if request.version != "v1beta1":
        return f'requested API version "{request.version}" is not supported by kubelet. Supported version is ["v1beta1"]'
    domain, slash, name = request.resource_name.partition("/")
    label = r"[a-z0-9]([-a-z0-9]*[a-z0-9])?"
    good_domain = re.fullmatch(rf"{label}(\.{label})*", domain) and len("requests." + domain) <= 253
    good_name = re.fullmatch(r"[A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?", name) and len(name) <= 63
    reserved = "kubernetes.io/" in request.resource_name or domain.startswith("requests.")
    if not (slash and good_domain and good_name) or reserved:
        return f'the ResourceName "{request.resource_name}" is invalid'
    if not request.endpoint or "/" in request.endpoint:
        return f'the endpoint "{request.endpoint}" is not a file name'
    return None


class FakeKubelet:
    """The kubelet's device manager. Each thing that it sees or decides is one JSON line on stdout, with the time of it."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.folder = Path(options.fake_kubelet) / "device-plugins"
        self.checkpoint = self.folder / "kubelet_internal_checkpoint"
        self.generation: str = options.generation
        self.listen_delay: float = options.listen_delay  # between bind, when the file is visible, and listen
        self.dial_limit: float = options.dial_limit
        self.dial_delay: float = options.dial_delay  # 1.20: between the answer to Register and the dial-back
        self.grace: float = options.grace
        self.dev_root: str = options.dev_root  # where the host's /dev is, for what containerd does with host paths
        self.numa_nodes: list[int] = options.numa_nodes
        self.faults = Counter(json.loads(options.faults))  # name: how many times it still happens
        self.fault_code = "UNAVAILABLE"
        self.clients: dict[str, list[Client]] = {}  # connected; up to 1.36 only the newest of a resource is kept
        self.endpoints: dict[str, Client] = {}  # who is asked for a Pod: the newest, even if its stream has ended
        self.devices: dict[str, dict[str, Device]] = {}
        self.status: dict[str, tuple[int, int]] = {}  # as last emitted: capacity, allocatable
        self.held: dict[str, dict[str, Held]] = {}  # "pod/container": resource: what it holds
        self.removals: dict[str, asyncio.TimerHandle] = {}  # resources without a stream, until they leave the status
        self.admission = asyncio.Lock()  # Pods are admitted one by one: a slow plugin stalls all of them (contract 12)
        self.tasks: set[asyncio.Task[None]] = set()

    # Start ------------------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Contract 1: the folder, no socket in it but ours, which is visible a moment before it listens."""
        self.folder.mkdir(mode=0o750, parents=True, exist_ok=True)
        removed = []
        for entry in sorted(self.folder.iterdir()):
            with contextlib.suppress(FileNotFoundError):  # its plugin may remove it at the same time
                if stat.S_ISSOCK(entry.lstat().st_mode):
                    entry.unlink()
                    removed.append(entry.name)
        self.load_checkpoint()
        # gRPC binds and listens in one go, so it serves on a name in no folder, and the real socket passes bytes on to it.
        inner = f"fake-kubelet-{os.getpid()}"
        server = grpc.aio.server()
        request, response, _ = REGISTRATION["Register"]
        handler = grpc.unary_unary_rpc_method_handler(
            self.register, MESSAGES[request].FromString, MESSAGES[response].SerializeToString
        )
        server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler("v1beta1.Registration", {"Register": handler})])
        server.add_insecure_port(f"unix-abstract:{inner}")
        await server.start()
        self.server = server  # a server that nobody refers to stops
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.bind(str(self.folder / "kubelet.sock"))
        self.emit("bound", removed=removed)
        await asyncio.sleep(self.listen_delay)

        async def splice(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            try:
                while data := await reader.read(65536):
                    writer.write(data)
                    await writer.drain()
            except ConnectionError:
                pass
            writer.close()

        async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            inner_reader, inner_writer = await asyncio.open_unix_connection(f"\0{inner}")
            await asyncio.gather(splice(reader, inner_writer), splice(inner_reader, writer))

        self.listener = await asyncio.start_unix_server(connected, sock=sock)
        self.emit("listening")

    # Registration -----------------------------------------------------------------------------------------------------

    async def register(self, request: Any, context: Any) -> Any:
        """Contract 2. The 1.20 kubelet returns at once and dials later, the 1.36 kubelet dials before it returns."""
        self.emit("register", **as_dict(request))
        if self.fault("register_fails"):
            await context.abort(getattr(grpc.StatusCode, self.fault_code), "the fake kubelet was told to fail")
        if self.fault("register_hangs"):
            await asyncio.Event().wait()
        if problem := invalid_registration(request):
            self.emit("rejected", problem=problem)
            await context.abort(grpc.StatusCode.UNKNOWN, problem)  # a plain Go error arrives as UNKNOWN
        path = self.folder / request.endpoint
        options: list[tuple[str, Any]] = [("grpc.use_local_subchannel_pool", 1)]
        if self.generation == "1.20":
            options.append(("grpc.default_authority", str(path)))  # as the old Go library did
        known = [client.endpoint for client in self.clients.get(request.resource_name, [])]
        if self.generation == "later" and request.endpoint in known:
            self.emit("ignored", resource=request.resource_name, endpoint=request.endpoint)
            return MESSAGES["Empty"]()
        client = Client(request.resource_name, request.endpoint, grpc.aio.insecure_channel(f"unix:{path}", options))
        if self.generation == "1.20":
            client.pre_start = request.options.pre_start_required
            client.preferred = request.options.get_preferred_allocation_available
            self.spawn(self.dial_back(client))
            return MESSAGES["Empty"]()
        self.keep(client)
        try:
            await asyncio.wait_for(client.channel.channel_ready(), self.dial_limit)
            answer = await client.method("GetDevicePluginOptions")(MESSAGES["Empty"]())
        except (asyncio.TimeoutError, grpc.aio.AioRpcError) as error:
            # Kept by name: the failure of the new client forgets an older one, too.
            self.clients.pop(client.resource, None)
            self.emit("dial_failed", resource=client.resource, endpoint=client.endpoint, error=repr(error))
            await client.channel.close()
            await context.abort(grpc.StatusCode.UNKNOWN, f"failed to dial device plugin {client.endpoint}: {error!r}")
        self.emit("options", resource=client.resource, **as_dict(answer))
        client.pre_start, client.preferred = answer.pre_start_required, answer.get_preferred_allocation_available
        self.connected(client)
        return MESSAGES["Empty"]()

    async def dial_back(self, client: Client) -> None:
        """1.20: a dial that fails is logged, and that is all: the plugin is never told."""
        await asyncio.sleep(self.dial_delay)
        try:
            await asyncio.wait_for(client.channel.channel_ready(), self.dial_limit)
        except asyncio.TimeoutError as error:
            self.emit("dial_failed", resource=client.resource, endpoint=client.endpoint, error=repr(error))
            await client.channel.close()
            return
        self.keep(client)
        self.connected(client)

    def keep(self, client: Client) -> None:
        """Up to 1.36 the newest client of a resource takes the place of the others, whose streams stay open."""
        others = self.clients.get(client.resource, []) if self.generation == "later" else []
        self.clients[client.resource] = [*others, client]

    def connected(self, client: Client) -> None:
        """The one ListAndWatch stream of this registration; nobody ever opens a second one (contract 3)."""
        self.endpoints[client.resource] = client
        if self.fault("no_stream"):
            self.emit("no_stream", resource=client.resource, endpoint=client.endpoint)
            return
        client.reader = self.spawn(self.watch(client))

    async def watch(self, client: Client) -> None:
        """Read the stream until it ends, whoever ends it."""
        stream = client.method("ListAndWatch")(MESSAGES["Empty"]())
        self.emit("stream", resource=client.resource, endpoint=client.endpoint)
        how = "OK"
        try:
            drop = self.fault("drop_streams")
            async for message in stream:
                self.receive(client, message)
                if drop:
                    raise asyncio.CancelledError
        except grpc.aio.AioRpcError as error:
            how = f"{error.code().name}: {error.details()}"
        except asyncio.CancelledError:  # drop_stream, or close() for the race
            how = "closed by the kubelet"
        stream.cancel()
        self.emit("stream_end", resource=client.resource, endpoint=client.endpoint, how=how)
        client.stopped = True
        await client.channel.close()
        self.stream_ended(client)

    def stream_ended(self, client: Client) -> None:
        """Contract 4 and 5. Up to 1.36 the client that is disconnected is looked up by the resource's *name* when a
        stream ends: if a plugin registered anew meanwhile, that is the new one, which nobody will ever dial again.

        (The code of 1.20 itself compared the clients; the contract says "up to 1.36", and the harsher reading of it holds
        here for both generations.)"""
        connected = self.clients.get(client.resource, [])
        victim = next((one for one in connected if one is client or self.generation != "later"), None)
        if victim is None:
            return
        connected.remove(victim)
        victim.stopped = True
        self.emit("disconnected", resource=client.resource, endpoint=victim.endpoint, ended=client.endpoint)
        if victim is not client and victim.reader:
            victim.reader.cancel()
        if connected:
            return
        del self.clients[client.resource]
        for device in self.devices.get(client.resource, {}).values():
            device.healthy = False
        self.update(client.resource)
        loop = asyncio.get_running_loop()
        self.removals[client.resource] = loop.call_later(self.grace, self.forget, client.resource)

    def forget(self, resource: str) -> None:
        """The resource leaves the node's status (contract 4)."""
        self.devices.pop(resource, None)
        self.status.pop(resource, None)
        self.emit("forgotten", resource=resource)

    # Devices ----------------------------------------------------------------------------------------------------------

    def receive(self, client: Client, message: Any) -> None:
        """Contract 8: each message is the whole list; contract 11: a change of what a Pod holds shows in its status."""
        before = self.devices.get(client.resource, {})
        now: dict[str, Device] = {}
        for device in message.devices:
            numa = [node.ID for node in device.topology.nodes] if device.HasField("topology") else None
            now[device.ID] = Device(device.health == "Healthy", numa)
        self.devices[client.resource] = now
        if timer := self.removals.pop(client.resource, None):
            timer.cancel()
        sent = {device.ID: device.health for device in message.devices}
        self.emit("devices", resource=client.resource, endpoint=client.endpoint, devices=sent, count=len(message.devices))
        for container, resources in self.held.items():
            for device_id in resources[client.resource].ids if client.resource in resources else ():
                old, new = before.get(device_id), now.get(device_id)
                if self.generation != "1.20" and (old and old.healthy) != (new and new.healthy):
                    self.emit("pod_health", container=container, id=device_id, healthy=bool(new and new.healthy))
        self.save_checkpoint()
        self.update(client.resource)

    def update(self, resource: str) -> None:
        """Unhealthy devices count as capacity, but are not allocatable."""
        devices = self.devices.get(resource, {})
        status = (len(devices), sum(device.healthy for device in devices.values()))
        if status != self.status.get(resource):
            self.status[resource] = status
            self.emit("status", resource=resource, capacity=status[0], allocatable=status[1])

    def hints(self, resource: str, size: int) -> list[list[int]] | None:
        """Contract 10, the topology manager's question: on which sets of NUMA nodes can `size` free devices be had?

        None: no preference (no device has a topology). An empty list: on none, and strict policies reject the Pod."""
        devices = self.devices.get(resource, {})
        if all(device.numa is None for device in devices.values()):
            return None
        free = [devices[device_id] for device_id in self.free(resource)]
        counts = range(1, len(self.numa_nodes) + 1)
        masks = [set(mask) for count in counts for mask in itertools.combinations(self.numa_nodes, count)]
        return [sorted(mask) for mask in masks if sum(bool(mask & set(device.numa or ())) for device in free) >= size]

    def free(self, resource: str) -> list[str]:
        """Healthy, and held by no container."""
        used = {device_id for resources in self.held.values() if resource in resources for device_id in resources[resource].ids}
        return [name for name, device in self.devices.get(resource, {}).items() if device.healthy and name not in used]

    # Calls for a Pod --------------------------------------------------------------------------------------------------

    async def call(self, resource: str, method: str, request: Any, timeout: float | None = None) -> Any:
        """One call to the plugin that registered last. Most have no time limit (contract 12, 13)."""
        client = self.endpoints.get(resource)
        if client is None:
            raise Refusal("KUBELET", f"no device plugin is registered for {resource}")
        if client.stopped:
            raise Refusal("KUBELET", f"endpoint {client.endpoint} has been stopped")
        try:
            return await client.method(method)(request, timeout=timeout)
        except grpc.aio.AioRpcError as error:
            raise Refusal(error.code().name, error.details() or "") from error

    async def admit(self, pod: str, container: str, want: dict[str, int], must: dict[str, list[str]]) -> dict[str, Any]:
        """Admission of one container (contract 9, 12, 13): choose the ids, allocate, keep the answer."""
        async with self.admission:
            holder = self.held.setdefault(f"{pod}/{container}", {})
            for resource, size in want.items():
                if resource in holder:
                    self.readmit(resource, holder[resource])
                    continue
                ids = await self.choose(resource, size, must.get(resource, []))
                request = MESSAGES["AllocateRequest"]()
                random.shuffle(ids)  # the kubelet keeps sets: the order is random
                request.container_requests.add(devices_ids=ids)
                answer = await self.call(resource, "Allocate", request)
                if len(answer.container_responses) != 1:
                    raise Refusal("KUBELET", "no containers return in allocation response")
                holder[resource] = Held(sorted(ids), answer.container_responses[0])
                self.emit("allocated", container=f"{pod}/{container}", resource=resource, ids=sorted(ids))
                self.save_checkpoint()
            return {"ids": {resource: held.ids for resource, held in holder.items()}, **self.merged(holder)}

    def readmit(self, resource: str, held: Held) -> None:
        """After a restart of the kubelet or a reboot: the very same ids, registered and healthy (contract 9)."""
        devices = self.devices.get(resource, {})
        if not any(device.healthy for device in devices.values()):
            text = f"no healthy devices present; cannot allocate unhealthy devices {resource}"
            raise Refusal("UnexpectedAdmissionError", text)
        if missing := [name for name in held.ids if name not in devices or not devices[name].healthy]:
            raise Refusal("UnexpectedAdmissionError", f"previously allocated devices are no longer healthy; {missing}")

    async def choose(self, resource: str, size: int, must: list[str]) -> list[str]:
        """Free ids; the plugin is asked which it prefers, and what it does not fill is filled at random."""
        available = self.free(resource)
        available += [name for name in must if name not in available]  # those of an init container: held, and usable again
        if len(available) < size:
            text = f"requested number of devices unavailable for {resource}. Requested: {size}, Available: {len(available)}"
            raise Refusal("UnexpectedAdmissionError", text)
        random.shuffle(available)
        chosen = list(must)
        client = self.endpoints.get(resource)
        if client and client.preferred:
            request = MESSAGES["PreferredAllocationRequest"]()
            request.container_requests.add(available_deviceIDs=available, must_include_deviceIDs=must, allocation_size=size)
            answer = await self.call(resource, "GetPreferredAllocation", request)
            preferred = list(answer.container_responses[0].deviceIDs) if answer.container_responses else []
            self.emit("preferred", resource=resource, available=sorted(available), must=must, size=size, answer=preferred)
            chosen += [name for name in preferred if name in available and name not in chosen]
        chosen += [name for name in available if name not in chosen]
        return chosen[:size]

    def merged(self, holder: dict[str, Held]) -> dict[str, Any]:
        """Contract 14: answers of several resources are merged by key, the second value of a key is dropped silently."""
        result: dict[str, dict[str, Any]] = {"envs": {}, "annotations": {}, "mounts": {}, "devices": {}}
        names: list[str] = []
        for resource, held in holder.items():
            answer = as_dict(held.answer)
            items = [(kind, key, value) for kind in ("envs", "annotations") for key, value in answer[kind].items()]
            items += [(kind, one["container_path"], one) for kind in ("mounts", "devices") for one in answer[kind]]
            for kind, key, value in items:
                if result[kind].setdefault(key, value) != value:
                    self.emit("conflict", kind=kind, key=key, resource=resource, dropped=value, kept=result[kind][key])
            names += [one["name"] for one in answer["cdi_devices"] if one["name"] not in names]
        lists = {"mounts": list(result["mounts"].values()), "devices": list(result["devices"].values())}
        # Kubelets before 1.28 do not know field 5 (contract 18).
        return {**result, **lists, "cdi_devices": [] if self.generation == "1.20" else names}

    async def start_container(self, pod: str, container: str) -> dict[str, Any]:
        """One start *or restart* of an admitted container: PreStartContainer each time, Allocate never again."""
        holder = self.held.get(f"{pod}/{container}", {})
        for resource, held in holder.items():
            client = self.endpoints.get(resource)
            if client is None or client.pre_start:
                ids = random.sample(held.ids, len(held.ids))
                request = MESSAGES["PreStartContainerRequest"](devices_ids=ids)
                await self.call(resource, "PreStartContainer", request, PRE_START_S)
        options = self.merged(holder)
        for spec in options["devices"] if self.dev_root else ():
            # containerd follows symbolic links anew at each start (contract 16).
            spec["resolved"] = os.path.realpath(self.dev_root + spec["host_path"].removeprefix("/dev"))
            if not os.path.exists(spec["resolved"]):
                raise Refusal("RunContainerError", f"error gathering device information: {spec['host_path']} does not exist")
        self.emit("started", container=f"{pod}/{container}")
        return options

    # The checkpoint ---------------------------------------------------------------------------------------------------

    def save_checkpoint(self) -> None:
        """Contract 9: who holds what, and what was registered, in the kubelet's own file and shape."""
        entries = [
            {
                "PodUID": container.partition("/")[0],
                "ContainerName": container.partition("/")[2],
                "ResourceName": resource,
                "DeviceIDs": {"-1": held.ids},
                "AllocResp": base64.b64encode(held.answer.SerializeToString()).decode(),
            }
            for container, resources in self.held.items()
            for resource, held in resources.items()
        ]
        healthy = {name: [key for key, one in devices.items() if one.healthy] for name, devices in self.devices.items()}
        data = {"PodDeviceEntries": entries, "RegisteredDevices": healthy}
        text = json.dumps({"Data": data, "Checksum": zlib.crc32(json.dumps(data).encode())})
        draft = self.checkpoint.with_name(f".{self.checkpoint.name}")
        try:
            draft.write_text(text)
            draft.replace(self.checkpoint)
        except OSError as error:  # logged by the real one, too: a full disk does not stop it
            self.emit("checkpoint_failed", error=str(error))

    def load_checkpoint(self) -> None:
        """A restarted kubelet knows its Pods and the resources' names; no device is there until the plugin registers."""
        if not self.checkpoint.exists():
            return
        data = json.loads(self.checkpoint.read_text())["Data"]
        self.devices = {resource: {} for resource in data["RegisteredDevices"]}
        for entry in data["PodDeviceEntries"]:
            answer = MESSAGES["ContainerAllocateResponse"].FromString(base64.b64decode(entry["AllocResp"]))
            holder = self.held.setdefault(f"{entry['PodUID']}/{entry['ContainerName']}", {})
            holder[entry["ResourceName"]] = Held([name for ids in entry["DeviceIDs"].values() for name in ids], answer)

    # Commands of the test ---------------------------------------------------------------------------------------------

    async def command(self, name: str, args: dict[str, Any]) -> Any:
        """What a test can make this kubelet do; see class Kubelet for the meaning of each."""
        if name == "start":
            await self.start()
        elif name == "rpc":
            request = json_format.ParseDict(args["request"], MESSAGES[DEVICE_PLUGIN[args["method"]][0]]())
            return as_dict(await self.call(args["resource"], args["method"], request, args["timeout"]))
        elif name == "admit":
            return await self.admit(**args)
        elif name == "start_container":
            return await self.start_container(**args)
        elif name == "delete_pod":
            self.held = {key: value for key, value in self.held.items() if key.partition("/")[0] != args["pod"]}
            self.save_checkpoint()
        elif name == "hints":
            return self.hints(**args)
        elif name == "faults":
            self.fault_code = args.pop("code", None) or self.fault_code
            self.faults.update(args)
        elif name == "drop_stream":
            for client in self.clients.get(args["resource"], []):
                self.emit("dropped", resource=client.resource, endpoint=client.endpoint)
                assert client.reader
                client.reader.cancel()
        else:
            raise Refusal("KUBELET", f"unknown command {name}")
        return None

    async def run(self) -> None:
        """Take commands, one JSON line each, until told to stop or until the test is gone."""
        loop = asyncio.get_running_loop()
        # A kubelet that ends leaves its sockets as they are, so nothing here may tidy up.
        loop.add_signal_handler(signal.SIGTERM, os._exit, 0)
        reader = asyncio.StreamReader(limit=1 << 26)
        await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
        self.emit("prepared", pid=os.getpid())

        async def answer(request: dict[str, Any]) -> None:
            try:
                self.emit("reply", id=request["id"], result=await self.command(request["command"], request["args"]))
            except Refusal as error:
                self.emit("reply", id=request["id"], code=error.code, message=error.message)
            except Exception as error:
                self.emit("reply", id=request["id"], code="BUG", message=repr(error))
                raise

        while line := await reader.readline():
            self.spawn(answer(json.loads(line)))
        os._exit(0)

    def spawn(self, work: Awaitable[None]) -> asyncio.Task[None]:
        """A task that is kept until it is done: the event loop alone refers to tasks only weakly."""
        task: asyncio.Task[None] = asyncio.ensure_future(work)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)
        return task

    def fault(self, name: str) -> bool:
        """Whether this fault is due; each counts down, so "3" is three times and then no more."""
        due = self.faults[name] > 0
        self.faults[name] -= due
        return due

    def emit(self, event: str, **fields: Any) -> None:
        """time.monotonic is the same clock in every process of a Linux host."""
        print(json.dumps({"t": time.monotonic(), "event": event, **fields}), flush=True)


def fake_kubelet(arguments: list[str]) -> None:
    """The program: `test_plugin.py --fake-kubelet DIR`, sockets in DIR/device-plugins."""
    parser = argparse.ArgumentParser(description="A fake kubelet, driven by JSON lines on stdin")
    parser.add_argument("--fake-kubelet", metavar="DIR", required=True)
    parser.add_argument("--generation", choices=GENERATIONS, default="1.36")
    parser.add_argument("--listen-delay", type=float, default=0.0, metavar="S")
    parser.add_argument("--dial-delay", type=float, default=0.0, metavar="S")
    parser.add_argument("--dial-limit", type=float, default=DIAL_S, metavar="S")
    parser.add_argument("--grace", type=float, default=GRACE_S, metavar="S")
    parser.add_argument("--dev-root", default="", metavar="DIR")
    parser.add_argument("--numa-nodes", type=json.loads, default=[0, 1], metavar="JSON")
    parser.add_argument("--faults", default="{}", metavar="JSON")
    kubelet = parser.parse_args(arguments)

    async def run() -> None:
        await FakeKubelet(kubelet).run()

    asyncio.run(run())


if __name__ == "__main__" and sys.argv[1:2] != ["--bench"]:  # which is at the end
    # Before the imports of the tests' half, which would add a third of a second to each start of a kubelet.
    fake_kubelet(sys.argv[1:])
    sys.exit()

import compileall  # noqa: E402
import datetime  # noqa: E402
import fcntl  # noqa: E402
import http.client  # noqa: E402
import importlib  # noqa: E402
import math  # noqa: E402
import platform  # noqa: E402
import queue  # noqa: E402
import shutil  # noqa: E402
import struct  # noqa: E402
import subprocess  # noqa: E402
import tempfile  # noqa: E402
import termios  # noqa: E402
import textwrap  # noqa: E402
import threading  # noqa: E402
from concurrent.futures import ThreadPoolExecutor  # noqa: E402
from resource import RLIMIT_NOFILE, RUSAGE_CHILDREN, getrlimit, getrusage, prlimit, setrlimit  # noqa: E402
from types import MappingProxyType  # noqa: E402
from typing import Generic, NamedTuple, TypeVar  # noqa: E402

import pytest  # noqa: E402
import yaml  # noqa: E402
from hypothesis import HealthCheck, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from prometheus_client.parser import text_string_to_metric_families  # noqa: E402

import tt_device_plugin as tt  # noqa: E402

########################################################################################################################
# 3. The harness
########################################################################################################################

Item = TypeVar("Item")
Event = dict[str, Any]  # one line of the fake kubelet


class Log(Generic[Item]):
    """What another process said, in order. A reader thread appends, tests wait on a condition and never poll."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.items: list[Item] = []
        self.closed = False  # nothing will follow
        self.changed = threading.Condition()

    def append(self, item: Item) -> None:
        """Called by the reader thread."""
        with self.changed:
            self.items.append(item)
            self.changed.notify_all()

    def close(self) -> None:
        """Called by the reader thread: the process has ended."""
        with self.changed:
            self.closed = True
            self.changed.notify_all()

    def mark(self) -> int:
        """Now, as a position: pass it as `after` to see only what follows."""
        with self.changed:
            return len(self.items)

    def seen(self, predicate: Callable[[Item], bool], after: int = 0) -> list[Item]:
        """All that came so far."""
        with self.changed:
            return [item for item in self.items[after:] if predicate(item)]

    def wait_for(self, predicate: Callable[[Item], bool], timeout: float, after: int = 0, what: str = "") -> Item:
        """The first item after the position that fits, waiting for it if need be."""
        found = self.look(predicate, timeout, after)
        if not found:
            tail = "\n  ".join(str(item) for item in self.items[-25:])
            ended = " before it ended" if self.closed else ""
            what = what or "what was expected"
            raise AssertionError(f"{self.name} did not say {what} in {timeout} s{ended}; its last:\n  {tail}")
        return found[0]

    def never(self, predicate: Callable[[Item], bool], seconds: float, after: int) -> None:
        """Nothing that fits comes after the position within so many seconds from now."""
        if found := self.look(predicate, seconds, after):
            raise AssertionError(f"{self.name} said {found[0]}, which nothing had caused")

    def look(self, predicate: Callable[[Item], bool], timeout: float, after: int) -> list[Item]:
        """The first item that fits, as a list of one or none."""
        deadline = time.monotonic() + timeout
        with self.changed:
            while True:
                for position in range(after, len(self.items)):
                    if predicate(self.items[position]):
                        return [self.items[position]]
                after = max(after, len(self.items))
                left = deadline - time.monotonic()
                if left <= 0 or self.closed:
                    return []
                self.changed.wait(left)


class Kubelet:
    """A fake kubelet on one folder, over any number of its lives: start, stop, kill, and start again."""

    def __init__(self, root: Path, generation: str = "1.36", dev_root: Path | None = None) -> None:
        self.root = root
        self.folder = root / "device-plugins"
        self.generation = generation
        self.dev_root = dev_root
        self.log: Log[Event] = Log(f"the fake kubelet {generation}")  # all lives of it
        self.process: subprocess.Popen[str] | None = None
        self.next: subprocess.Popen[str] | None = None  # started, waiting for the command that makes it a kubelet
        self.readers: list[threading.Thread] = []
        self.numbers = itertools.count(1)
        self.answering = 0.0  # when the present life began to answer
        self.paused = False

    # Its life

    def prepare(self, **settings: Any) -> None:
        """Start the next life's process, so that start() takes milliseconds and not the time of Python's imports.

        Settings are those of its command line, such as listen_delay=2 or faults={"register_fails": 3}."""
        arguments = ["--fake-kubelet", str(self.root), "--generation", self.generation]
        if self.dev_root:
            arguments += ["--dev-root", str(self.dev_root)]
        for name, value in settings.items():
            arguments += [f"--{name.replace('_', '-')}", value if isinstance(value, str) else json.dumps(value)]
        command = [sys.executable, str(HERE / "test_plugin.py"), *arguments]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.next = process

        def read() -> None:
            assert process.stdout
            for line in process.stdout:
                self.log.append(json.loads(line))

        self.readers.append(threading.Thread(target=read, daemon=True))
        self.readers[-1].start()
        pid = process.pid
        self.log.wait_for(lambda event: event["event"] == "prepared" and event["pid"] == pid, 20, what="prepared")

    def start(self, wait: str = "listening", **settings: Any) -> None:
        """Return when it listens (or is only "bound", with a listen_delay)."""
        if not self.next:
            self.prepare(**settings)
        assert self.process is None, "one life at a time"
        self.process, self.next = self.next, None
        mark = self.log.mark()
        number = self.send("start")
        ready, failed = fits(wait, {}), fits("reply", {"id": number, "result": None})
        event = self.log.wait_for(lambda event: ready(event) or (failed(event) and "code" in event), 10, mark, wait)
        assert event["event"] == wait, event
        self.answering = event["t"]
        if wait == "listening":  # and let the reply to this command be the last event, so that a test sees only what follows
            self.wait("reply", after=mark, id=number)

    def stop(self) -> None:
        """SIGTERM; like a real one it leaves its sockets behind."""
        self.end(signal.SIGTERM)

    def kill(self) -> None:
        """SIGKILL: every connection of it breaks."""
        self.end(signal.SIGKILL)

    def end(self, how: signal.Signals) -> None:
        """End this life and wait until the process is gone."""
        assert self.process
        self.process.send_signal(how)
        self.process.wait()  # no time limit here: with one, Popen polls
        self.process = None

    def delete_folder(self) -> None:
        """The folder device-plugins goes, with all in it: all at once, as a plugin may remove its socket meanwhile."""
        shutil.rmtree(self.folder.rename(self.folder.with_name("deleted")))

    def pause(self) -> None:
        """SIGSTOP: the streams stay open, nobody reads them."""
        assert self.process
        self.process.send_signal(signal.SIGSTOP)
        self.paused = True

    def resume(self) -> None:
        """SIGCONT."""
        assert self.process
        self.process.send_signal(signal.SIGCONT)
        self.paused = False

    def close(self) -> None:
        """For the end of the test: nothing of it stays."""
        for process in (self.process, self.next):
            if process:
                process.kill()
                process.wait()
        for reader in self.readers:
            reader.join(5)
        self.process = self.next = None

    # What it is made to do

    def send(self, command: str, **args: Any) -> int:
        """Send a command, and do not wait for the answer; its number finds the reply."""
        assert self.process and self.process.stdin
        number = next(self.numbers)
        self.process.stdin.write(json.dumps({"id": number, "command": command, "args": args}) + "\n")
        self.process.stdin.flush()
        return number

    def call(self, command: str, *, limit: float = 15.0, **args: Any) -> Any:
        """Send a command and wait for its result; a gRPC error status or a refusal of the kubelet raises Refusal."""
        mark = self.log.mark()
        number = self.send(command, **args)
        reply = self.log.wait_for(lambda event: event["event"] == "reply" and event["id"] == number, limit, mark, command)
        if "code" in reply:
            raise Refusal(reply["code"], reply["message"])
        return reply["result"]

    def rpc(self, resource: str, method: str, request: dict[str, Any], timeout: float | None = 10.0) -> Any:
        """Any call to the registered plugin, as it is: malformed ones, too."""
        return self.call("rpc", resource=resource, method=method, request=request, timeout=timeout)

    def allocate(self, resource: str, ids: list[str]) -> Any:
        """Allocate for one container, in random order; the answer of that container. Nothing is checkpointed."""
        request = {"container_requests": [{"devices_ids": random.sample(ids, len(ids))}]}
        answer = self.rpc(resource, "Allocate", request)
        assert len(answer["container_responses"]) == 1, answer
        return answer["container_responses"][0]

    def preferred(self, resource: str, available: list[str], size: int, must: list[str] | None = None) -> list[str]:
        """GetPreferredAllocation for one container."""
        one = {"available_deviceIDs": available, "must_include_deviceIDs": must or [], "allocation_size": size}
        answer = self.rpc(resource, "GetPreferredAllocation", {"container_requests": [one]})
        assert len(answer["container_responses"]) == 1, answer
        return list(answer["container_responses"][0]["deviceIDs"])

    def pre_start(self, resource: str, ids: list[str]) -> None:
        """PreStartContainer."""
        self.rpc(resource, "PreStartContainer", {"devices_ids": random.sample(ids, len(ids))})

    def admit(self, pod: str, want: dict[str, int], must: dict[str, list[str]] | None = None, container: str = "main") -> Any:
        """Admit one container of a Pod that wants so many of each resource: ids, envs, mounts, devices, cdi_devices."""
        return self.call("admit", pod=pod, container=container, want=want, must=must or {})

    def start_container(self, pod: str, container: str = "main") -> Any:
        """Start or restart an admitted container: what the runtime is given, each device with the path it `resolved` to."""
        return self.call("start_container", limit=PRE_START_S + 5, pod=pod, container=container)

    def delete_pod(self, pod: str) -> None:
        """The Pod's devices are free again."""
        self.call("delete_pod", pod=pod)

    def hints(self, resource: str, size: int) -> Any:
        """The topology manager's hints for so many devices: None for no preference, else a list of NUMA node sets."""
        return self.call("hints", resource=resource, size=size)

    def drop_stream(self, resource: str) -> float:
        """End the resource's stream from the kubelet's side; sockets and everything else stay. When it did so."""
        mark = self.log.mark()
        self.call("drop_stream", resource=resource)
        return float(self.wait("dropped", after=mark, resource=resource)["t"])

    def faults(self, code: str = "", **counts: int) -> None:
        """From now on, so many times each: register_fails (with this status code), register_hangs, no_stream (none follows a
        Register), drop_streams (each ends after its first message)."""
        self.call("faults", code=code, **counts)

    # What it saw

    def wait(self, event: str, *, timeout: float = 5.0, after: int = 0, **fields: Any) -> Event:
        """The first event of this kind and with these fields after the position."""
        return self.log.wait_for(fits(event, fields), timeout, after, f"{event} {fields}")

    def seen(self, event: str, *, after: int = 0, **fields: Any) -> list[Event]:
        """All such events so far."""
        return self.log.seen(fits(event, fields), after)

    def wait_status(self, resource: str, capacity: int, allocatable: int, *, timeout: float = 5.0, after: int = 0) -> float:
        """Wait until the node's status shows this; when it did."""
        found = self.wait("status", timeout=timeout, after=after, resource=resource, capacity=capacity, allocatable=allocatable)
        return float(found["t"])

    def wait_health(self, resource: str, device_id: str, health: str, *, timeout: float = 5.0, after: int = 0) -> float:
        """Wait until the plugin has sent this health of this device; when it did."""

        def shows(event: Event) -> bool:
            same = event["event"] == "devices" and event["resource"] == resource
            return same and bool(event["devices"].get(device_id) == health)

        return float(self.log.wait_for(shows, timeout, after, f"{device_id} {health}")["t"])

    def ids(self, resource: str) -> list[str]:
        """The ids of the newest list."""
        return sorted(self.seen("devices", resource=resource)[-1]["devices"])


def fits(event: str, fields: dict[str, Any]) -> Callable[[Event], bool]:
    """A predicate for events."""
    return lambda seen: seen["event"] == event and all(seen.get(name) == value for name, value in fields.items())


@dataclass(frozen=True)
class Chip:
    """One PCIe device with its driver's files. What is None is a file that this driver or firmware does not make."""

    bdf: str  # PCI address: what a chip is known by in these tests
    n: int  # /dev/tenstorrent/N
    card_type: str | None = "n150"
    asic_id: str | None = None  # since driver 2.3
    serial: str | None = None
    firmware: str | None = "80.17.0.0"
    heartbeat: bool = True  # since driver 2.7
    arch: str = "wormhole"
    node: str = "/dev/null"  # what stands for the device node: any character device that is there without root
    numa: int = 0
    iommu: str | None = "DMA-FQ"
    hwmon: bool = True
    by_id: bool = False  # udev's link, since driver 2.6
    subsystem_device: str = "0x0018"

    @property
    def id(self) -> str:
        """The card's ID at the kubelet, if this chip is a card of its own."""
        return f"{self.arch}-{self.asic_id}" if self.asic_id else self.bdf


class Tree:
    """A sysfs and a /dev as the driver lays them down, in a folder. Files change atomically, as sysfs's reads are."""

    def __init__(self, root: Path, chips: list[Chip] | tuple[Chip, ...] = (), driver: str | None = "2.10.0") -> None:
        self.root = root
        self.sys = root / "sys"
        self.dev = root / "dev"
        self.drafts = root / "drafts"  # on the same file system, seen by nobody
        self.chips: dict[str, Chip] = {}
        self.lock = threading.Lock()  # the hearts beat in a thread of their own
        self.beats = itertools.count(1000, 3)
        for folder in (self.drafts, self.dev, self.sys / "bus/pci/devices"):
            folder.mkdir(parents=True)
        self.write(self.sys / "devices/system/node/online", "0-1\n")
        if driver:  # without it there is no such class
            (self.sys / "class/tenstorrent").mkdir(parents=True)
            self.write(self.sys / "module/tenstorrent/version", f"{driver}\n")
        for chip in chips:
            self.add(chip)

    @property
    def flags(self) -> list[str]:
        """The plugin's flags for this tree."""
        return ["--sysfs-root", str(self.sys), "--dev-root", str(self.dev)]

    def pci(self, bdf: str) -> Path:
        """The PCI device's folder."""
        return self.sys / "devices" / f"pci{bdf[:4]}:00" / bdf

    def entry(self, bdf: str) -> Path:
        """The folder of the driver's attributes, behind the link in the class."""
        return self.pci(bdf) / "tenstorrent" / f"tenstorrent!{self.chips[bdf].n}"

    def class_link(self, bdf: str) -> Path:
        """What a listing of the class shows."""
        return self.sys / "class/tenstorrent" / f"tenstorrent!{self.chips[bdf].n}"

    def node(self, bdf: str) -> Path:
        """The device node."""
        return self.dev / "tenstorrent" / str(self.chips[bdf].n)

    def write(self, path: Path, text: str | bytes) -> None:
        """A file that is never seen half written. In sysfs a new value changes no folder's times, so it must not do so here."""
        data = text.encode() if isinstance(text, str) else text
        if path.is_file() and path.stat().st_size == len(data):
            with path.open("r+b", buffering=0) as file:
                file.write(data)
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = self.drafts / f"{threading.get_ident()}"
        draft.write_bytes(data)
        draft.replace(path)

    def add(self, chip: Chip) -> None:
        """The PCI device is probed: attributes first, the link in the class last."""
        with self.lock:
            assert chip.bdf not in self.chips and chip.n not in [other.n for other in self.chips.values()], chip
            self.chips[chip.bdf] = chip
            self.add_pci(chip)
            entry = self.entry(chip.bdf)
            rdev = os.stat(chip.node).st_rdev
            self.write(entry / "dev", f"{os.major(rdev)}:{os.minor(rdev)}\n")
            (entry / "device").symlink_to(f"../../../{chip.bdf}")
            (entry / "subsystem").symlink_to(os.path.relpath(self.sys / "class/tenstorrent", entry))
            attributes = {
                "tt_card_type": chip.card_type,
                "tt_asic_id": chip.asic_id,
                "tt_serial": chip.serial,
                "tt_fw_bundle_ver": chip.firmware,
                "tt_heartbeat": str(next(self.beats)) if chip.heartbeat else None,
                "tt_aiclk": "500" if chip.card_type else None,
            }
            for name, text in attributes.items():
                if text is not None:
                    self.write(entry / name, f"{text}\n")
            self.node(chip.bdf).parent.mkdir(exist_ok=True)
            self.node(chip.bdf).symlink_to(chip.node)
            if chip.by_id and chip.asic_id:
                link = self.dev / "tenstorrent/by-id" / chip.id
                link.parent.mkdir(exist_ok=True)
                link.symlink_to(f"../{chip.n}")
            self.class_link(chip.bdf).symlink_to(os.path.relpath(entry, self.sys / "class/tenstorrent"))

    def add_pci(self, chip: Chip) -> None:
        """The files of the PCI device and its sensors, units as the driver's (millidegrees, mV, mA, microwatts)."""
        pci = self.pci(chip.bdf)
        files = {
            "vendor": "0x1e52",
            "device": {"wormhole": "0x401e", "blackhole": "0xb140"}[chip.arch],
            "subsystem_device": chip.subsystem_device,
            "numa_node": str(chip.numa),
        }
        # 54.3 C, 100 W limit, 75 C limit, 1000 MHz, 240 A: captured (tt-smi-s_n150); the rest of the n150 values is from
        # another plugin's unit test, "plausible, not captured" (sysfs_n150_community-plugin).
        sensors = {
            "name": chip.arch,
            "temp1_input": "54300",
            "temp1_max": "75000",
            "in0_input": "795",
            "in0_max": "1000",
            "curr1_input": "18000",
            "curr1_max": "240000",
            "power1_input": "15000000",
            "power1_max": "100000000",
        }
        if chip.hwmon:
            files |= {f"hwmon/hwmon{chip.n + 2}/{name}": text for name, text in sensors.items()}
        for name, text in files.items():
            self.write(pci / name, f"{text}\n")
        if chip.iommu:
            group = self.sys / "kernel/iommu_groups" / str(20 + chip.n)
            self.write(group / "type", f"{chip.iommu}\n")
            (pci / "iommu_group").symlink_to(os.path.relpath(group, pci))
        (self.sys / "bus/pci/devices" / chip.bdf).symlink_to(os.path.relpath(pci, self.sys / "bus/pci/devices"))

    def remove(self, bdf: str) -> Chip:
        """The PCI device goes, by hot-unplug or reset: sysfs and device node vanish, /dev/tenstorrent with the last node."""
        with self.lock:
            self.class_link(bdf).unlink()
            self.node(bdf).unlink()
            chip = self.chips[bdf]
            with contextlib.suppress(FileNotFoundError):
                (self.dev / "tenstorrent/by-id" / chip.id).unlink()
                (self.dev / "tenstorrent/by-id").rmdir() if not any((self.dev / "tenstorrent/by-id").iterdir()) else None
            if not any((self.dev / "tenstorrent").iterdir()):
                (self.dev / "tenstorrent").rmdir()
            (self.sys / "bus/pci/devices" / bdf).unlink()
            shutil.rmtree(self.pci(bdf))
            return self.chips.pop(bdf)

    def renumber(self, numbers: dict[str, int], nodes: dict[str, str] | None = None) -> None:
        """The driver is loaded anew and hands out other numbers: all of these chips go, then all come back."""
        gone = [self.remove(bdf) for bdf in numbers]
        for chip in gone:
            self.add(replace(chip, n=numbers[chip.bdf], node=(nodes or {}).get(chip.bdf, chip.node)))

    def set(self, bdf: str, file: str, text: str | bytes | None) -> None:
        """Write one of the driver's files (or `device/...`, one of the PCI device's); None removes it."""
        path = self.pci(bdf) / file.removeprefix("device/") if file.startswith("device/") else self.entry(bdf) / file
        if text is None:
            path.unlink()
        else:
            self.write(path, text)


class Beating:
    """The chips' firmware: five times a second each live heart changes. A context; stop() stops one chip's."""

    def __init__(self, tree: Tree) -> None:
        self.tree = tree
        self.stopped: set[str] = set()
        self.done = threading.Event()
        self.thread = threading.Thread(target=self.run, daemon=True)

    def __enter__(self) -> Beating:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.done.set()
        self.thread.join()

    def run(self) -> None:
        """Until the end of the context."""
        while not self.done.wait(0.2):
            with self.tree.lock:
                for bdf, chip in self.tree.chips.items():
                    if chip.heartbeat and bdf not in self.stopped:
                        self.tree.set(bdf, "tt_heartbeat", f"{next(self.tree.beats)}\n")

    def stop(self, bdf: str) -> float:
        """This chip's firmware hangs from now on."""
        with self.tree.lock:
            self.stopped.add(bdf)
        return time.monotonic()

    def resume(self, bdf: str) -> float:
        """And works again."""
        with self.tree.lock:
            self.stopped.discard(bdf)
        return time.monotonic()


# Four n150. The first: bus, serial and firmware captured (tt-smi-s_n150_kmd1.33); the serials of the second (another plugin's
# unit test, plausible) and the third (tt-smi#20) from sysfs_n150_community-plugin and misc_board_ids. That host had driver
# 1.33, so every asic id and heartbeat, as well as the buses 2 to 4, the fourth serial and all numbers N, is made up.
N150 = (
    Chip("0000:01:00.0", 0, asic_id="0D0CB6F1E7A50001", serial="0100018611902010"),
    Chip("0000:02:00.0", 1, asic_id="0D0CB6F1E7A50002", serial="010001851180B42E"),
    Chip("0000:41:00.0", 2, asic_id="0D0CB6F1E7A50003", serial="010001851170C06C", numa=1),
    Chip("0000:c1:00.0", 3, asic_id="0D0CB6F1E7A50004", serial="0100018611902014", numa=1),
)

# The n150 of tt-smi-s_n150_kmd1.33 as its driver showed it: no asic id (2.3), no heartbeat (2.7). N and NUMA are made up.
N150_OLD_DRIVER = replace(N150[0], asic_id=None, heartbeat=False)

# QuietBox, 4 x n300 = four PCIe devices (tt-smi-s_quietbox_4xn300_kmd1.34): buses, serials and their order are captured, and
# bus order is not number order. Driver 1.34 has neither asic id nor heartbeat: those are made up, for a newer driver on
# the same host. The fixture's telemetry is a copy of the n150's, so it is not used.
N300 = tuple(
    Chip(bdf, n, "n300", asic_id=f"0D0CB6F1E7A5030{n}", serial=serial, subsystem_device="0x0014")
    for n, (bdf, serial) in enumerate(
        [
            ("0000:c1:00.0", "010001451172208F"),
            ("0000:01:00.0", "0100014511722053"),
            ("0000:02:00.0", "010001451172209C"),
            ("0000:41:00.0", "0100014511722058"),
        ]
    )
)

# A p300's two chips with one serial: derived, not captured (derived_blackhole_boards); asic ids made up.
P300 = tuple(
    Chip(f"0000:0{3 + n}:00.0", n, "p300a", asic_id=f"0D0CB6F1E7A50B0{n}", serial="000004513190F004", arch="blackhole")
    for n in (0, 1)
)
P300_ID = "p300-000004513190F004"

# Character devices that every host has, for the tests in which chips must not look alike.
NODES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom")

R150 = "tenstorrent.com/n150"
R300 = "tenstorrent.com/n300"


class Line(NamedTuple):
    """One line of the plugin's stderr."""

    t: float
    text: str


class Plugin:
    """A running plugin process."""

    def __init__(self, command: list[str], **popen: Any) -> None:
        self.log: Log[Line] = Log("the plugin")
        environment = {name: value for name, value in os.environ.items() if not name.startswith("TT_DEVICE_PLUGIN_")}
        self.started = time.monotonic()
        self.ended = 0.0
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, errors="replace", env=environment, **popen)
        self.reader = threading.Thread(target=self.read, daemon=True)
        self.reader.start()

    def read(self) -> None:
        """In a thread: the lines, and the end, each with its time."""
        assert self.process.stderr
        for line in self.process.stderr:
            self.log.append(Line(time.monotonic(), line.rstrip("\n")))
        self.process.wait()
        self.ended = time.monotonic()
        self.log.close()

    def wait_for_line(self, pattern: str, timeout: float = 5.0, after: int = 0) -> Line:
        """The first line that matches; case does not matter."""
        regex = re.compile(pattern, re.IGNORECASE)
        return self.log.wait_for(lambda line: bool(regex.search(line.text)), timeout, after, f"/{pattern}/")

    def lines(self, pattern: str = "") -> list[str]:
        """The lines so far that match."""
        regex = re.compile(pattern, re.IGNORECASE)
        return [line.text for line in self.log.seen(lambda line: bool(regex.search(line.text)))]

    def send(self, number: signal.Signals) -> float:
        """Send it; when."""
        sent = time.monotonic()
        self.process.send_signal(number)
        return sent

    def end(self, number: signal.Signals = signal.SIGTERM, timeout: float = 10.0) -> tuple[int, float]:
        """Signal it and wait for the end: exit code and how long it took."""
        sent = self.send(number)
        self.reader.join(timeout)
        text = "\n".join(self.lines())
        assert not self.reader.is_alive(), f"the plugin did not end on {number.name} in {timeout} s:\n{text}"
        assert self.process.returncode is not None
        return self.process.returncode, self.ended - sent

    def close(self) -> None:
        """For the end of the test: the process is gone, and no traceback went by unseen."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGCONT)
            self.process.kill()
        self.reader.join(10)
        text = "\n".join(self.lines())
        assert "Traceback (most recent call last)" not in text, text


class Puppet:
    """A device plugin of another maker, moved by the test: for tests of the fake kubelet, and as a neighbour of ours."""

    def __init__(self, folder: Path, resource: str, endpoint: str = "puppet.sock", **announced: bool) -> None:
        self.folder, self.resource, self.endpoint = folder, resource, endpoint
        self.announced = announced  # options, the same in both places
        self.lists: queue.Queue[Any] = queue.Queue()  # what the stream sends next; None ends it
        self.answer: dict[str, Any] = {}  # the ContainerAllocateResponse
        self.calls: list[tuple[str, Any]] = []
        self.fails: dict[str, str] = {}  # method: the message of its error

        def handler(name: str) -> Any:
            request, response, streams = DEVICE_PLUGIN[name]
            kind = grpc.unary_stream_rpc_method_handler if streams else grpc.unary_unary_rpc_method_handler
            behaviour = self.list_and_watch if streams else lambda message, context: self.reply(name, message, context)
            return kind(behaviour, MESSAGES[request].FromString, MESSAGES[response].SerializeToString)

        self.server = grpc.server(ThreadPoolExecutor(4))
        handlers = {name: handler(name) for name in DEVICE_PLUGIN}
        self.server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("v1beta1.DevicePlugin", handlers),))
        self.server.add_insecure_port(f"unix:{folder / endpoint}")
        self.server.start()

    def reply(self, name: str, message: Any, context: Any) -> Any:
        """Every method but ListAndWatch."""
        self.calls.append((name, as_dict(message)))
        if name in self.fails:
            context.abort(grpc.StatusCode.FAILED_PRECONDITION, self.fails[name])
        if name == "GetDevicePluginOptions":
            return MESSAGES["DevicePluginOptions"](**self.announced)
        if name == "GetPreferredAllocation":
            asked = message.container_requests[0]
            answer = MESSAGES["PreferredAllocationResponse"]()
            answer.container_responses.add(deviceIDs=sorted(asked.available_deviceIDs)[: asked.allocation_size])
            return answer
        if name == "Allocate":
            return json_format.ParseDict({"container_responses": [self.answer]}, MESSAGES["AllocateResponse"]())
        return MESSAGES[DEVICE_PLUGIN[name][1]]()

    def list_and_watch(self, message: Any, context: Any) -> Iterator[Any]:
        """Send what the test puts into the queue."""
        context.add_callback(lambda: self.lists.put(None))
        while (devices := self.lists.get()) is not None:
            yield json_format.ParseDict({"devices": devices}, MESSAGES["ListAndWatchResponse"]())

    def send(self, **health: bool | int | tuple[bool, int]) -> None:
        """One whole list: id=True, or id=(True, numa_node)."""
        devices = []
        for name, value in health.items():
            healthy, numa = value if isinstance(value, tuple) else (value, None)
            device: dict[str, Any] = {"ID": name, "health": "Healthy" if healthy else "Unhealthy"}
            if numa is not None:
                device["topology"] = {"nodes": [{"ID": numa}]}
            devices.append(device)
        self.lists.put(devices)

    def register(self, **fields: Any) -> None:
        """Register, with other values where given; grpc.RpcError if the kubelet refuses."""
        values = {"version": "v1beta1", "endpoint": self.endpoint, "resource_name": self.resource, "options": self.announced}
        request = MESSAGES["RegisterRequest"](**{**values, **fields})
        address = f"unix:{self.folder / 'kubelet.sock'}"
        with grpc.insecure_channel(address, [("grpc.use_local_subchannel_pool", 1)]) as channel:
            to_bytes, from_bytes = MESSAGES["RegisterRequest"].SerializeToString, MESSAGES["Empty"].FromString
            channel.unary_unary("/v1beta1.Registration/Register", to_bytes, from_bytes)(request, timeout=10)

    def close(self) -> None:
        """The server and its streams end."""
        self.lists.put(None)
        self.server.stop(None).wait()


# Fixtures ---------------------------------------------------------------------------------------------------------------

Launch = Callable[..., Plugin]


@pytest.fixture
def room() -> Iterator[Path]:
    """A folder with a short name: a socket's path may have 107 bytes, and pytest's tmp_path takes most of them."""
    folder = Path(tempfile.mkdtemp(prefix="tt-"))
    folder.chmod(0o755)  # also for the tests that run the plugin as another user
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def kubelet(request: pytest.FixtureRequest, room: Path) -> Iterator[Kubelet]:
    """A kubelet of 1.36, or of the generation that a parameter names; not started."""
    with contextlib.closing(Kubelet(room / "k", getattr(request, "param", "1.36"), room / "dev")) as made:
        yield made


both_generations = pytest.mark.parametrize("kubelet", ["1.36", "1.20"], indirect=True)  # for what may depend on them


@pytest.fixture
def tree(room: Path) -> Tree:
    """A node with the driver and no card."""
    return Tree(room)


@pytest.fixture
def beating(tree: Tree) -> Iterator[Beating]:
    """The hearts of this tree's chips."""
    with Beating(tree) as hearts:
        yield hearts


@pytest.fixture
def four(tree: Tree, beating: Beating) -> Tree:
    """A node with four n150, beating."""
    for chip in N150:
        tree.add(chip)
    return tree


PYZ = HERE / "dist/tt-device-plugin.pyz"


@pytest.fixture(params=["module", "pyz"])
def command(request: pytest.FixtureRequest) -> list[str]:
    """The two ways to run the plugin."""
    if request.param == "module":
        return [sys.executable, str(HERE / "tt_device_plugin.py")]
    if not PYZ.exists():
        pytest.skip("dist/tt-device-plugin.pyz is not built: ./build.sh makes it")
    return [sys.executable, str(PYZ)]


@pytest.fixture
def launch(command: list[str]) -> Iterator[Launch]:
    """Start plugin processes: launch(tree, kubelet, "--more", "flags"). They end with the test, whatever happens."""
    running: list[Plugin] = []

    def start(tree: Tree | None, kubelet: Kubelet, *flags: str, **popen: Any) -> Plugin:
        roots = tree.flags if tree else []
        running.append(Plugin([*command, "--kubelet-dir", str(kubelet.root), *roots, *flags], **popen))
        return running[-1]

    with contextlib.ExitStack() as stack:
        stack.callback(lambda: [stack.callback(plugin.close) for plugin in running])
        yield start


@pytest.fixture
def plugin(kubelet: Kubelet, four: Tree, launch: Launch) -> Plugin:
    """One whose four cards the kubelet offers: where most tests begin."""
    kubelet.start()
    started = launch(four, kubelet)
    kubelet.wait_status(R150, 4, 4)
    return started


def run(command: list[str], *flags: str, timeout: float = 30.0, **environment: str) -> subprocess.CompletedProcess[str]:
    """A plugin process that ends by itself."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("TT_DEVICE_PLUGIN_")}
    done = subprocess.run([*command, *flags], capture_output=True, text=True, timeout=timeout, env={**clean, **environment})
    assert "Traceback" not in done.stderr, done.stderr
    return done


def sockets(kubelet: Kubelet) -> list[str]:
    """The plugins' sockets in the kubelet's folder."""
    if not kubelet.folder.exists():
        return []
    return sorted(path.name for path in kubelet.folder.iterdir() if path.is_socket() and path.name != "kubelet.sock")


@contextlib.contextmanager
def refused(code: str, *words: str) -> Iterator[None]:
    """What is inside is refused with this status, and a message with these words (any case)."""
    with pytest.raises(Refusal) as caught:
        yield
    assert caught.value.code == code, caught.value
    missing = [word for word in words if word.lower() not in caught.value.message.lower()]
    assert not missing, f"{caught.value.message!r} does not say {missing}"


SLACK = 5.0  # what a busy machine may add to a promised time; `./build.sh bench` has the times themselves


def quick(seconds: float, limit: float, what: str) -> None:
    """Fails where something took several times its `limit`, so that it waits for what it should not; keeps the worst time."""
    assert 0 <= seconds < SLACK * limit, f"{what} took {seconds * 1000:.1f} ms, promised are {limit * 1000:.0f} ms"
    WORST[what] = max(seconds, WORST.get(what, 0.0))


WORST: dict[str, float] = {}  # the worst time of each bound in this run, for the report at the end


@pytest.fixture(scope="session", autouse=True)
def report_worst_times(request: pytest.FixtureRequest) -> Iterator[None]:
    """Print the worst times when all is done, past pytest's capture."""
    yield
    reporter = request.config.pluginmanager.get_plugin("terminalreporter")
    capture = request.config.pluginmanager.get_plugin("capturemanager")
    if reporter and capture and WORST:
        with capture.global_and_fixture_disabled():
            reporter.write_line("")
            for what, seconds in sorted(WORST.items()):
                reporter.write_line(f"worst: {what}: {seconds * 1000:.1f} ms")


########################################################################################################################
# 4. Unit tests: discovery, verdicts, choice, the edges of registration
########################################################################################################################


def sighting(pci: str = "0000:01:00.0", beat: int | None = 1, fault: str = "", **facts: Any) -> tt.Sighting:
    """What one poll saw of a healthy n150, with other facts where given; a heartbeat of None is a missing file."""
    known = {"index": 0, "arch": "wormhole", "card_type": "n150", "dev": "1:3", "asic_id": f"{zlib.crc32(pci.encode()):016X}"}
    chip = tt.Chip(pci, **{**known, **facts})
    return tt.Sighting(chip, tt.Signs(beat, fault, beat is not None))


def judge_all(*polls: tuple[float, tt.Sighting]) -> list[str]:
    """The kinds of the verdicts over polls at these times."""
    pulse, kinds = None, []
    for now, seen in polls:
        pulse, found = tt.judge(pulse, seen, now)
        kinds.append(found.kind)
    return kinds


MUTE = sighting(beat=None)  # there is no such file
SILENT = tt.Sighting(sighting().chip, tt.Signs(None, "", True))  # the heartbeat's file cannot be read


@pytest.mark.parametrize(
    "polls, kinds",
    [
        pytest.param([(0, sighting()), (1, sighting(beat=2))], ["ok", "ok"], id="beats"),
        pytest.param([(0, sighting(beat=9)), (1, sighting(beat=2))], ["ok", "ok"], id="wraps or starts anew"),
        pytest.param([(t, sighting(beat=None)) for t in (0, 9, 99)], ["ok"] * 3, id="a driver without heartbeat"),
        pytest.param([(t, sighting()) for t in (0, 4, 8, 12, 12.5)], ["ok"] * 4 + ["hung"], id="stops for 12 s"),
        pytest.param([(t, sighting()) for t in (0, 30, 31, 32)], ["ok"] * 3 + ["hung"], id="a pause is no proof"),
        pytest.param([(0, sighting())] + [(t, SILENT) for t in (5, 9, 15)], ["ok"] * 3 + ["hung"], id="not readable"),
        pytest.param([(0, sighting()), *((t, MUTE) for t in (5, 9, 15, 20))], ["ok"] * 5, id="its file goes away"),
        pytest.param([*((t, sighting()) for t in (0, 1, 2, 3)), (20, MUTE)], ["ok"] * 5, id="its file goes away later"),
        pytest.param(
            [(0, sighting()), *((t, sighting(fault="gone")) for t in (9, 15, 20)), (21, sighting())],
            ["ok", "gone", "gone", "gone", "ok"],
            id="detached is not hung",
        ),
        pytest.param(
            [(0, sighting()), *((t, sighting(index=-1, beat=None, fault="no-driver")) for t in (9, 99)), (100, sighting())],
            ["ok", "no-driver", "no-driver", "ok"],
            id="the driver is loaded anew",
        ),
        pytest.param([(t, SILENT) for t in (0, 9, 99, 100, 101)], ["ok"] * 5, id="never readable is no evidence"),
        pytest.param(
            [*((t, sighting()) for t in (0, 5, 10, 13)), *((t, sighting(beat=b)) for t, b in ((14, 2), (15, 2), (16, 3)))],
            ["ok"] * 3 + ["hung"] * 3 + ["ok"],
            id="trusted after two changes",
        ),
        pytest.param(
            [(0, sighting()), (1, sighting(beat=None, fault="resetting")), (2, sighting()), (3, sighting(beat=2))],
            ["ok", "resetting", "resetting", "ok"],
            id="a reset is over with the next change",
        ),
        pytest.param(
            [(0, sighting()), (1, sighting(beat=0xFFFFFFFF, fault="bus-dead")), (2, sighting()), (3, sighting(beat=2))],
            ["ok", "bus-dead", "bus-dead", "ok"],
            id="a dead bus",
        ),
        pytest.param(
            [(0, sighting(fault="resetting", beat=None)), (1, sighting(beat=None))],
            ["resetting", "ok"],
            id="in a reset at first sight, no heartbeat",
        ),
        pytest.param([(0, sighting(fault="gone")), (1, sighting())], ["gone", "ok"], id="gone and back"),
        pytest.param(
            [(0, sighting(beat=1)), (9, sighting(beat=2, fault="no-node")), (14, sighting(beat=3))],
            ["ok", "no-node", "ok"],
            id="it beats while its device node is missing",
        ),
        pytest.param(
            [(t, sighting(card_type="", asic_id="")) for t in (0, 130, 131)],
            ["pending", "pending", "no-telemetry"],
            id="telemetry may take 130 s",
        ),
        pytest.param([(0, sighting(card_type="unknown", asic_id=""))], ["pending"], id="unknown, and no number either"),
        pytest.param([(0, sighting(card_type="unknown"))], ["ok"], id="unknown but alive"),
    ],
)
def test_judge(polls: list[tuple[float, tt.Sighting]], kinds: list[str]) -> None:
    """A chip's verdicts from poll to poll (facts, section 7)."""
    assert judge_all(*polls) == kinds


def told(*readings: tuple[int | None, int | None], limit: int | None = 75_000) -> list[str]:
    """The events over polls with these temperatures (C) and thermal trips, at this limit (mC)."""
    pulse, words = None, []
    for now, (heat, trips) in enumerate(readings):
        read = {"temperature": heat and heat * 1000, "limit": limit, "trips": trips}
        signs = tt.Signs(now, "", True, {name: value for name, value in read.items() if value is not None})
        after, found = tt.judge(pulse, tt.Sighting(sighting().chip, signs), now)
        assert found.kind == "ok", "no reading of a sensor is a verdict"
        words += tt.events(pulse or after, after)
        pulse = after
    return words


def test_events() -> None:
    """Throttling once, not again while it swings about the limit; junk once; a thermal trip only if it is a new one."""
    assert told((54, 2), (75, 2), (54, 2)) == [] == told((54, None), (54, 3))
    hot = told((54, None), (76, None), (74, None), (77, None), (71, None))
    assert [line.split(":")[0] for line in hot] == ["is above its temperature limit and throttles", "throttles no longer"]
    junk = told((54, None), (65535, None), (54, None), (65535, None))  # below 0 C, read as unsigned (facts, section 2)
    assert len(junk) == 1 and "ignored" in junk[0]
    assert told((54, 2), (54, 5), (54, 5)) == ["was shut down by critical temperature; that makes 5 times since power-on"]
    assert told((None, None), (None, 0xFFFFFFFF), (54, None)) == junk == told((54, 2), (54, 0xFFFFFFFF), (54, 2))
    assert told((76, 0), (200, 0), limit=None) == junk, "nobody has said what is too hot"
    assert told((None, 0), (76, 0), limit=0) == [], "nor is that a limit"


def test_thermal_trip_over_an_absence() -> None:
    """A chip that its own heat has shut down is away for a while; the trip is told when it is back."""
    pulses: dict[str, tt.Pulse] = {}
    snapshot, chip = tt.Snapshot(), sighting().chip
    for now, trips in enumerate((1, None, 2)):
        before = pulses
        seen = [] if trips is None else [tt.Sighting(chip, tt.Signs(now, "", True, {"trips": trips}))]
        snapshot, pulses = tt.assess(snapshot, pulses, seen, tt.Settings(), now, now)
    assert [line[:14] for line in tt.events(before[chip.pci], pulses[chip.pci])] == ["was shut down "]


@pytest.mark.parametrize(
    "driver, heartbeat, read", [("2.6.1", False, False), ("2.9.0", False, True), ("2.7.0-rc1", True, True), ("", True, True)]
)
def test_old_drivers_are_left_alone(tree: Tree, driver: str, heartbeat: bool, read: bool) -> None:
    """Before 2.7 nothing is read once the chip is identified: a read during removal could oops the kernel."""
    tree.add(replace(N150[0], heartbeat=heartbeat))
    chip = tt.identify(tree.sys, tt.find_chip(tree.sys, 0))
    signs = tt.sense(tt.Settings(sysfs_root=tree.sys, dev_root=tree.dev), chip, driver)
    assert (signs.fault, (signs.readings or {}).get("temperature")) == ("", 54300 if read else None)


def test_junk_sensors(tree: Tree) -> None:
    """Captured junk (hwmon_junk_stale-tags, hwmon_dead-chip): no verdict from it; the newest hwmon counts."""
    tree.add(N150[0])
    settings = tt.Settings(sysfs_root=tree.sys, dev_root=tree.dev)
    chip = tt.identify(tree.sys, tt.find_chip(tree.sys, 0))
    tree.set(N150[0].bdf, "device/hwmon/hwmon10/temp1_input", "65535999\n")
    tree.set(N150[0].bdf, "device/hwmon/hwmon10/in0_input", "3211313\n")
    signs = tt.sense(settings, chip, "2.10.0")
    pulse, found = tt.judge(None, tt.Sighting(chip, signs), 0.0)
    assert signs.readings and signs.readings["temperature"] == 65535999
    assert pulse.junk == 2 and not {"temperature", "voltage"} & set(pulse.readings) and found.kind == "ok"


def test_no_descriptors_for_an_attribute(tree: Tree) -> None:
    """A lack of descriptors says nothing about a chip: it comes out, where each other error is a file that is not there."""
    tree.add(N150[0])
    path = tree.entry(N150[0].bdf) / "tt_card_type"
    limits = getrlimit(RLIMIT_NOFILE)
    try:
        setrlimit(RLIMIT_NOFILE, (0, limits[1]))
        with pytest.raises(OSError, match="Too many open files"):
            tt.attribute(path)
    finally:
        setrlimit(RLIMIT_NOFILE, limits)
    assert tt.attribute(path) == "n150"


def test_trouble_before_its_device_node(tree: Tree) -> None:
    """A chip whose bus is dead, and whose device node is gone with it: the reason is the bus, whatever /dev shows."""
    tree.add(N150[0])
    settings = tt.Settings(sysfs_root=tree.sys, dev_root=tree.dev)
    chip = tt.identify(tree.sys, tt.find_chip(tree.sys, 0))
    tree.node(N150[0].bdf).unlink()
    assert tt.sense(settings, chip, "2.10.0").fault == "no-node"
    tree.set(N150[0].bdf, "tt_heartbeat", "4294967295\n")
    assert tt.sense(settings, chip, "2.10.0").fault == "bus-dead"


def assess_all(
    *polls: list[tt.Sighting], step: float = 1.0, settings: tt.Settings | None = None
) -> tt.Snapshot:
    """The snapshot after polls, `step` seconds apart."""
    snapshot, pulses = tt.Snapshot(), dict[str, tt.Pulse]()
    for number, sightings in enumerate(polls):
        now = number * step
        snapshot, pulses = tt.assess(
            snapshot, pulses, sightings, settings or tt.Settings(), now, 1e9 + now
        )
    return snapshot


def shown(snapshot: tt.Snapshot) -> list[tuple[str, str | None, str, str]]:
    """ID, resource without its domain, health and kind of each card."""
    return [
        (card.id, card.resource and card.resource.partition("/")[2], card.verdict.health, card.verdict.kind)
        for card in snapshot.cards
    ]


def p300(bus: int, serial: str = "000004513190F004", **facts: Any) -> tt.Sighting:
    """One chip of a p300 (serial from derived_blackhole_boards)."""
    known = {"arch": "blackhole", "card_type": "p300a", "serial": serial}
    return sighting(f"0000:{bus:02x}:00.0", **{**known, "asic_id": f"B{bus:015X}", **facts})


def test_p300_pairs() -> None:
    """Exactly two chips with one serial whose low word is not 0 are one card; all others are cards by themselves."""
    pair = [p300(3), p300(4)]
    assert shown(assess_all(pair)) == [("p300-000004513190F004", "p300", "Healthy", "ok")]
    early = [p300(bus, "0000045100000000") for bus in (3, 4)]
    assert [card[0] for card in shown(assess_all(early))] == ["blackhole-B000000000000003", "blackhole-B000000000000004"]
    three = [*pair, p300(5)]
    assert {card[3] for card in shown(assess_all(three))} == {"alone"} and len(assess_all(three).cards) == 3
    galaxy = [sighting(f"0000:{bus:02x}:00.0", card_type="galaxy-wormhole", serial="0100035100000000") for bus in (1, 2)]
    assert len(assess_all(galaxy).cards) == 2


def test_p300_waits_for_its_other_chip() -> None:
    """While another chip has no telemetry yet, half a board is not offered: its ID and resource would change later."""
    pair = [p300(3), p300(4)]
    half = [p300(3), p300(4, card_type="", asic_id="", serial="")]
    assert [card[1:] for card in shown(assess_all(half))] == [(None, "pending", "half"), (None, "pending", "pending")]
    for fault in ("no-node", "resetting", "bus-dead"):  # trouble of the first chip does not split the board either
        assert shown(assess_all([p300(3, fault=fault), half[1]], pair))[0][:2] == ("p300-000004513190F004", "p300")
    bare = [p300(bus, card_type="", asic_id="", serial="", index=-1, fault="no-driver") for bus in (3, 4)]
    assert len(assess_all(*[bare] * 4, half, pair, step=66).cards) == 1, "nor a driver that is loaded late"
    late = assess_all(*[half] * 3, step=66)
    assert [card[1:] for card in shown(late)] == [("p300", "Healthy", "alone"), (None, "pending", "no-telemetry")]
    mute = [p300(3, beat=None), half[1]]
    assert shown(assess_all(*[mute] * 5, step=66)) == shown(late), "and so it stays"
    assert shown(assess_all(half, [p300(3), p300(4)])) == [("p300-000004513190F004", "p300", "Healthy", "ok")]


def test_type_is_not_unlearnt() -> None:
    """A chip that is "unknown" for a while belongs to its card all the same, and is not offered beside it afterwards."""
    odd = [p300(3), p300(4, card_type="unknown")]
    stages = [assess_all(*history) for history in ([[p300(3), p300(4)], odd], [[p300(3), p300(4)], odd, [p300(3), p300(4)]])]
    assert [[card[:3] for card in shown(stage)] for stage in stages] == [[("p300-000004513190F004", "p300", "Healthy")]] * 2


def test_another_cards_chip_in_its_place() -> None:
    """A card known by its PCI address does not take the chip that another one knows by its ASIC id, wherever that is now."""
    by_place = sighting("0000:01:00.0", asic_id="")
    by_id = sighting("0000:09:00.0", asic_id="A" * 16)
    moved = sighting("0000:01:00.0", asic_id="A" * 16)
    assert {card[0]: card[3] for card in shown(assess_all([by_place, by_id], [moved]))} == {
        "0000:01:00.0": "gone",
        "wormhole-AAAAAAAAAAAAAAAA": "ok",
    }


def test_probed_anew_between_two_polls() -> None:
    """Another class device in the same slot: its telemetry has its full time, and its heartbeat no past."""
    blind = sighting(card_type="", asic_id="", serial="", beat=None, stamp=(1, 1))
    pulse, _ = tt.judge(None, blind, 0.0)
    assert tt.judge(pulse, blind, 200.0)[1].kind == "no-telemetry"
    assert tt.judge(pulse, blind._replace(chip=replace(blind.chip, stamp=(2, 2))), 200.0)[1].kind == "pending"


def test_late_telemetry_is_one_line(caplog: pytest.LogCaptureFixture) -> None:
    """A card that gets another ID with its telemetry is not said to be gone."""
    caplog.set_level("INFO")
    before, after = sighting(card_type="", asic_id="", serial="", beat=None), sighting()
    snapshot, pulses = tt.assess(tt.Snapshot(), {}, [before], tt.Settings(), 0.0, 1e9)
    tt.report(snapshot, tt.assess(snapshot, pulses, [after], tt.Settings(), 1.0, 1e9)[0])
    assert [message.endswith("is Healthy") for message in caplog.messages] == [True]


def test_folder_deleted_under_a_mount(room: Path) -> None:
    """A container's mount shows the deleted folder for ever, and only a new container sees the new one: this one ends."""
    (room / "k").mkdir()
    (room / "host").mkdir()
    fd = os.open(room / "host", os.O_RDONLY)
    try:
        (room / "k/device-plugins").symlink_to(f"/proc/self/fd/{fd}")  # like a mount, it leads to the folder, not to its name
        stay = tt.Stay(tt.Settings(kubelet_dir=room / "k"))
        assert stay.look() == ""
        (room / "host").rmdir()
        with pytest.raises(tt.CannotWork, match="deleted on the host"):
            stay.look()
    finally:
        os.close(fd)


def test_p300_loses_one_chip() -> None:
    """The card stays one card, Unhealthy, and its reason names the chip; the other one does not become a card of its own."""
    pair = [p300(3), p300(4)]
    for lost in ([p300(3)], [p300(3), p300(4, fault="resetting", beat=None)]):
        snapshot = assess_all(pair, lost)
        assert [card[:3] for card in shown(snapshot)] == [("p300-000004513190F004", "p300", "Unhealthy")]
        assert snapshot.cards[0].verdict.reason.startswith("chip 0000:04:00.0: ")
        assert shown(assess_all(pair, lost, [p300(3, beat=2), p300(4, beat=2)]))[0][2] == "Healthy"


def test_card_keeps_its_id_over_a_reset() -> None:
    """Gone, back at another N before its telemetry, then whole again: one card, one ID."""
    before = sighting(index=0)
    blind = sighting(index=5, card_type="", asic_id="", beat=None)
    after = sighting(index=5, beat=7)
    history = [[before], [], [blind], [after]]
    stages = [assess_all(*history[:n]) for n in range(1, 5)]
    assert [shown(stage)[0][2:] for stage in stages] == [
        ("Healthy", "ok"), ("Unhealthy", "gone"), ("Unhealthy", "pending"), ("Healthy", "ok"),
    ]  # fmt: skip
    assert {card.id for stage in stages for card in stage.cards} == {before.chip.id}
    assert [stage.cards[0].device_nodes for stage in stages[2:]] == [["/dev/tenstorrent/5"]] * 2
    assert [stage.cards[0].verdict.since - 1e9 for stage in stages] == [0, 1, 1, 3], "since when it has had this health"


@pytest.mark.parametrize("jump", [3600.0, -3600.0])
def test_clock_is_set(jump: float, caplog: pytest.LogCaptureFixture) -> None:
    """A wall clock that jumps changes no verdict, tells no change that there was not, and shows in no duration."""
    caplog.set_level("INFO")
    snapshot, pulses, kinds = tt.Snapshot(), dict[str, tt.Pulse](), []
    wall = 1e9
    for now, seen in [(0.0, [sighting()]), (1.0, [sighting(beat=2)]), (2.0, []), (4.0, [sighting(beat=3)])]:
        wall += jump
        last = snapshot
        snapshot, pulses = tt.assess(last, pulses, seen, tt.Settings(), now, wall)
        tt.report(last, snapshot)
        kinds.append(snapshot.cards[0].verdict.kind)
    assert kinds == ["ok", "ok", "gone", "ok"]
    healthy, unhealthy, again = caplog.messages
    assert healthy.endswith("is Healthy") and "Unhealthy" in unhealthy and again.endswith("is Healthy again, after 2 s")
    assert snapshot.cards[0].verdict.since == wall, "what is shown is the clock's time"


def test_card_moves_to_another_slot() -> None:
    """The ASIC id counts, not the PCI address; and a new card in the old one's slot is a new card."""
    first, other = sighting("0000:01:00.0", asic_id="A" * 16), sighting("0000:01:00.0", asic_id="B" * 16)
    moved = sighting("0000:09:00.0", asic_id="A" * 16)
    assert shown(assess_all([first], [moved, other])) == [
        ("wormhole-BBBBBBBBBBBBBBBB", "n150", "Healthy", "ok"),
        ("wormhole-AAAAAAAAAAAAAAAA", "n150", "Healthy", "ok"),
    ]
    assert shown(assess_all([first], [other]))[0][2:] == ("Unhealthy", "gone")


def test_equal_asic_ids() -> None:
    """Two chips that claim one ASIC id both go by their PCI address; one that was offered keeps its ID."""
    twins = [sighting("0000:01:00.0", asic_id="A" * 16), sighting("0000:02:00.0", asic_id="A" * 16)]
    assert [card[0] for card in shown(assess_all(twins))] == ["0000:01:00.0", "0000:02:00.0"]
    assert [card[0] for card in shown(assess_all(twins[:1], twins))] == ["wormhole-AAAAAAAAAAAAAAAA", "0000:02:00.0"]


def test_models() -> None:
    """Folded variants, a chip of unknown type by its architecture, a Galaxy by its PCI subsystem; a dead one not at all."""

    def models(variants: bool, **facts: Any) -> list[str | None]:
        settings = tt.Settings(variants=variants)
        return [card[1] for card in shown(assess_all([sighting(**facts)], settings=settings))]

    assert models(False, card_type="p150a") == ["p150"] and models(True, card_type="p150a") == ["p150a"]
    assert models(False, card_type="p300c") == ["p300"] and models(False, card_type="n150") == ["n150"]
    assert models(False, card_type="unknown") == ["wormhole"]
    assert models(False, card_type="unknown", galaxy="galaxy-wormhole") == ["galaxy-wormhole"]
    assert models(False, card_type="unknown", asic_id="", serial="0100018611902010") == ["wormhole"]
    assert models(False, card_type="unknown", asic_id="", fault="bus-dead", beat=0xFFFFFFFF) == [None]
    assert models(False, card_type="", asic_id="", galaxy="galaxy-wormhole") == [None]


def test_another_model_under_the_same_id() -> None:
    """A board that has been flashed as another model leaves its old resource."""
    assert shown(assess_all([sighting()], [sighting(card_type="n300")]))[0][:2] == (sighting().chip.id, "n300")


# A chip's type goes with its ASIC id, as test_another_model_under_the_same_id has the other case.
TYPES = {"": "n150", "A" * 16: "n150", "B" * 16: "p300a", "C" * 16: "p300b", "D" * 16: "galaxy-wormhole"}
CHIPS = st.builds(
    lambda asic_id, blind, **facts: sighting(asic_id=asic_id, card_type=TYPES[asic_id] if blind is None else blind, **facts),
    blind=st.sampled_from([None, None, "", "unknown"]),
    pci=st.sampled_from([f"0000:0{bus}:00.0" for bus in range(1, 5)]),
    beat=st.none() | st.integers(0, 3) | st.just(0xFFFFFFFF),
    fault=st.sampled_from(["", "", "", "gone", "resetting", "bus-dead", "no-node", "read-hangs", "no-driver"]),
    index=st.integers(0, 5),
    asic_id=st.sampled_from(sorted(TYPES)),
    arch=st.sampled_from(["wormhole", "blackhole", ""]),
    serial=st.sampled_from(["", "000004513190F004", "0000045100000000"]),
)


@given(st.lists(st.lists(CHIPS, max_size=6), max_size=6), st.randoms(use_true_random=False))
def test_assess_holds_for_any_tree(polls: list[list[tt.Sighting]], order: random.Random) -> None:
    """Whatever is read: nothing raises, no two cards share a chip or an ID, what was offered stays, and order is nothing."""
    polls = [list({seen.chip.pci: seen for seen in poll}.values()) for poll in polls]
    offered: set[str] = set()
    for n in range(len(polls) + 1):
        snapshot = assess_all(*polls[:n])
        ids = [card.id for card in snapshot.cards]
        here = {seen.chip.pci for seen in polls[n - 1]} if n else set()
        chips = {chip.pci for card in snapshot.cards for chip in card.chips}
        healthy = [(chip.pci, chip.index) for card in snapshot.cards if card.verdict.health == "Healthy" for chip in card.chips]
        assert len(set(ids)) == len(ids)
        assert len({pci for pci, _ in healthy}) == len(healthy)
        assert here <= chips, "a chip has got lost"
        assert offered <= set(ids), "an offered card has left the list"
        offered = {card.id for card in snapshot.cards if card.resource}
        assert all(card.resource or card.verdict.kind != "ok" or not card.model for card in snapshot.cards)
        assert all(len(card.id) <= 63 for card in snapshot.cards)
    assert assess_all(*[order.sample(poll, len(poll)) for poll in polls]) == assess_all(*polls)


def galaxy_chips(arch: str, **facts: Any) -> list[Chip]:
    """A Galaxy's 32 chips in the order of their buses (tt-smi-s_galaxy-wh_32 for Wormhole; the Blackhole one's are from the
    driver's rule). Serials captured; asic ids, N in bus order and NUMA nodes made up."""
    serial, subsystem = {"wormhole": ("0100035100000000", "0x0035"), "blackhole": ("0000047131831011", "0x0047")}[arch]
    known = {"card_type": f"galaxy-{arch}", "serial": serial, "subsystem_device": subsystem, "arch": arch}
    return [
        Chip(f"0000:{bus:02x}:00.0", n, **{**known, "asic_id": f"6A1A{bus:012X}", "numa": bus >> 7, **facts})
        for n, bus in enumerate(tray + position for tray in (0x00, 0x40, 0x80, 0xC0) for position in range(1, 9))
    ]


# QuietBox 2: two p300c. The first serial and bus are captured (misc_board_ids), all else is made up.
QUIETBOX_2 = [
    Chip(f"0000:0{1 + n}:00.0", n, "p300c", f"0D0CB6F1E7A50C0{n}", serial, "19.5.0.0", arch="blackhole")
    for n, serial in enumerate(["000004613193411B"] * 2 + ["000004613193411C"] * 2)
]
# Four p150: serials from misc_board_ids, buses and asic ids made up.
P150 = [
    Chip(f"0000:{bus:02x}:00.0", n, card_type, f"0D0CB6F1E7A5150{n}", serial, arch="blackhole")
    for n, (bus, card_type, serial) in enumerate(
        [(0x01, "p150b", "0000041231914096"), (0x41, "p150b", "0000041231914097"),
         (0x42, "p150a", "0000040331914049"), (0xC1, "p150c", "0000042331914049")]
    )
]  # fmt: skip
BLIND: dict[str, Any] = dict.fromkeys(["card_type", "asic_id", "serial", "firmware"]) | {"heartbeat": False, "hwmon": False}
ALL_ONES: dict[str, Any] = {"card_type": "unknown", "asic_id": "F" * 16, "serial": "F" * 16, "firmware": "255.255.255.255"}

EXPERT: list[Any] = [
    ("n150", N150[:1], "2.10.0", ["n150 wormhole-0D0CB6F1E7A50001 0 Healthy"]),
    ("n300, one device node for its two chips", N300[:1], "2.10.0", ["n300 wormhole-0D0CB6F1E7A50300 0 Healthy"]),
    (
        "QuietBox, by PCI address, not by N",
        N300,
        "2.10.0",
        [f"n300 wormhole-0D0CB6F1E7A5030{n} {n} Healthy" for n in (1, 2, 3, 0)],
    ),
    ("p150 x 4, all variants", P150, "2.10.0", [f"p150 blackhole-0D0CB6F1E7A5150{n} {n} Healthy" for n in range(4)]),
    (
        "QuietBox 2",
        QUIETBOX_2,
        "2.10.0",
        ["p300 p300-000004613193411B 0,1 Healthy", "p300 p300-000004613193411C 2,3 Healthy"],
    ),
    (
        "p300 with one dead chip",
        [P300[0], replace(P300[1], **ALL_ONES)],
        "2.10.0",
        ["- blackhole-0D0CB6F1E7A50B00 0 pending: other chip", "- 0000:04:00.0 1 Unhealthy: all ones"],
    ),
    ("p300 with one chip off the bus", P300[:1], "2.10.0", ["p300 blackhole-0D0CB6F1E7A50B00 0 Healthy: by itself"]),
    (
        "Wormhole Galaxy",
        galaxy_chips("wormhole"),
        "2.10.0",
        [f"galaxy-wormhole wormhole-{chip.asic_id} {chip.n} Healthy" for chip in galaxy_chips("wormhole")],
    ),
    (
        "Blackhole Galaxy, type unknown to the driver",
        galaxy_chips("blackhole", card_type="unknown"),
        "2.10.0",
        [f"galaxy-blackhole blackhole-{chip.asic_id} {chip.n} Healthy" for chip in galaxy_chips("blackhole")],
    ),
    (
        "Galaxy without telemetry (sysfs_no_telemetry)",
        galaxy_chips("wormhole", **BLIND)[:1],
        "1.32",
        ["- 0000:01:00.0 0 pending: telemetry"],
    ),
    ("dead bus", [replace(N150[0], **ALL_ONES)], "2.10.0", ["- 0000:01:00.0 0 Unhealthy: all ones"]),
    ("empty fuses", [replace(N150[0], asic_id="0" * 16)], "2.10.0", ["n150 0000:01:00.0 0 Healthy"]),
    ("driver 1.28: no asic id, no heartbeat", [N150_OLD_DRIVER], "1.28", ["n150 0000:01:00.0 0 Healthy"]),
    ("driver 2.3: asic id", [replace(N150[0], heartbeat=False)], "2.3.0", ["n150 wormhole-0D0CB6F1E7A50001 0 Healthy"]),
    ("driver 2.6", [replace(N150[0], heartbeat=False, by_id=True)], "2.6.0", ["n150 wormhole-0D0CB6F1E7A50001 0 Healthy"]),
    ("driver 1.27: no telemetry files at all", [replace(N150[0], **BLIND)], "1.27", ["- 0000:01:00.0 0 pending: 1.28"]),
    ("a type that no driver knows", [replace(N150[0], card_type="unknown")], "2.10.0",
     ["wormhole wormhole-0D0CB6F1E7A50001 0 Healthy"]),
    (
        "one asic id for two",
        [N150[0], replace(N150[1], asic_id=N150[0].asic_id)],
        "2.10.0",
        ["n150 0000:01:00.0 0 Healthy: same ASIC id", "n150 0000:02:00.0 1 Healthy: same ASIC id"],
    ),
    ("early serial (sysfs_p150-early)", [replace(P150[0], serial="0000036100000000")], "1.35",
     ["p150 blackhole-0D0CB6F1E7A51500 0 Healthy"]),
]  # fmt: skip


@pytest.mark.parametrize("chips, driver, expected", [pytest.param(*row[1:], id=row[0]) for row in EXPERT])
def test_list_as_an_expert_would_write_it(
    tree: Tree, chips: list[Chip], driver: str, expected: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Model, ID, device numbers, health and the point of the reason, on each kind of node there is."""
    tree.write(tree.sys / "module/tenstorrent/version", f"{driver}\n")
    for chip in chips:
        tree.add(chip)
        if chip.firmware == "255.255.255.255":
            tree.set(chip.bdf, "tt_heartbeat", "4294967295\n")
    snapshot = asyncio.run(tt.take_stock(tt.Settings(sysfs_root=tree.sys, dev_root=tree.dev)))
    tt.print_list(snapshot, as_json=True)
    cards = json.loads(capsys.readouterr().out)
    assert len(cards) == len(expected)
    for card, line in zip(cards, expected, strict=True):
        fixed, _, reason = line.partition(": ")
        nodes = ",".join(path.removeprefix("/dev/tenstorrent/") for path in card["device_nodes"])
        resource = (card["resource"] or "-").removeprefix("tenstorrent.com/")
        assert f"{resource} {card['id']} {nodes} {card['health']}" == fixed
        assert bool(card["reason"]) == bool(reason) and reason in card["reason"]
    tt.print_list(snapshot, as_json=False)
    assert all(len(row) <= 120 for row in capsys.readouterr().out.splitlines())


def place(numa: int | None, *pci_path: str, bus: int, model: str = "n150") -> tt.Card:
    """A card for the tests of choosing."""
    chip = tt.Chip(f"0000:{bus:02x}:00.0", card_type=model, numa_node=numa, pci_path=pci_path)
    return tt.Card(f"{bus:02x}", model, f"tenstorrent.com/{model}", (chip,), tt.Verdict())


def galaxy() -> dict[str, tt.Card]:
    """A Wormhole Galaxy: four trays of eight, two to a NUMA node (which ones is made up)."""
    buses = [(tray, tray + position) for tray in (0xC0, 0x80, 0x00, 0x40) for position in range(1, 9)]
    cards = [place(tray // 0x80, "pci0000:00", bus=bus, model="galaxy-wormhole") for tray, bus in buses]
    return {card.id: card for card in cards}


def price(cards: dict[str, tt.Card], available: set[str], chosen: set[str]) -> tuple[float, ...]:
    """What a choice costs, said another way than in the plugin: groups at each level, gaps on trays, what is broken."""
    paths = {one: tt.branch(cards[one]) for one in available}
    depth = max(map(len, paths.values()))
    paths = {one: path + ("",) * (depth - len(path)) for one, path in paths.items()}
    touched = [float(len({paths[one][: level + 1] for one in chosen})) for level in range(depth)]
    gaps = 0.0
    for tray in {path[:2] for path in paths.values() if path[2:3] and path[2].startswith("position")}:
        places = sorted(int(paths[one][2].split()[1]) for one in chosen if paths[one][:2] == tray)
        gaps += places[-1] - places[0] + 1 - len(places) if places else 0
    whole = []
    for level in range(depth):
        left = Counter(paths[one][: level + 1] for one in available - chosen)
        whole.append(-float(sum(count * count for count in left.values())))
    return (*touched, gaps, *whole)


@given(st.data())
def test_preferred_is_the_best_of_all(data: st.DataObject) -> None:
    """Against every possible choice, on a Galaxy and on hosts with bridges."""
    cards = galaxy()
    if data.draw(st.booleans()):
        spots = st.tuples(st.sampled_from([None, 0, 1]), st.sampled_from(["a", "b"]), st.sampled_from(["x", "y", "z"]))
        drawn = data.draw(st.lists(spots, min_size=8, max_size=8))
        made = [place(numa, root, port, bus=bus) for bus, (numa, root, port) in enumerate(drawn)]
        cards = {card.id: card for card in made}
    available = data.draw(st.lists(st.sampled_from(sorted(cards)), min_size=1, max_size=8, unique=True))
    size = data.draw(st.integers(1, len(available)))
    must = data.draw(st.lists(st.sampled_from(available), max_size=size, unique=True))
    chosen = tt.prefer(cards, available, must, size)
    assert len(set(chosen)) == size and set(must) <= set(chosen) <= set(available)
    every = [set(one) | set(must) for one in itertools.combinations(sorted(set(available) - set(must)), size - len(must))]
    best = min(price(cards, set(available), one) for one in every)
    assert price(cards, set(available), set(chosen)) == best
    assert tt.prefer(cards, available[::-1], must[::-1], size) == chosen


def test_preferred_on_a_galaxy() -> None:
    """Whole trays, then neighbours, and from the tray that is broken already."""
    cards = galaxy()
    for size in (8, 16, 32):
        trays = Counter(card_id[0] for card_id in tt.prefer(cards, list(cards), [], size))
        assert set(trays.values()) == {8} and len(trays) == size // 8
    assert tt.prefer(cards, list(cards), ["43"], 2) == ["42", "43"]
    assert tt.prefer(cards, ["c1", "c4", "c5", "c8"], [], 2) == ["c4", "c5"]
    broken = [card_id for card_id in cards if card_id not in ("41", "42", "43")]
    assert tt.prefer(cards, broken, [], 4) == ["44", "45", "46", "47"]


def test_preferred_on_two_galaxies() -> None:
    """A tray is one Galaxy's, though the other one has the same buses in its own PCI domain."""
    chips = {f"{domain}{card_id}": (domain, card) for domain in (1, 2) for card_id, card in galaxy().items()}
    cards = {}
    for card_id, (domain, card) in chips.items():
        (chip,) = card.chips
        cards[card_id] = replace(card, id=card_id, chips=(replace(chip, pci=f"{domain:04}{chip.pci[4:]}"),))
    chosen = tt.prefer(cards, list(cards), [], 8)
    assert len({card_id[:2] for card_id in chosen}) == 1


def test_preferred_refuses_the_impossible() -> None:
    """Sizes that no choice has; an ID that the kubelet still has and the list does not is the last resort."""
    cards = galaxy()
    no: list[str] = []
    two = ["01", "02"]
    for available, must, size in (["01"], no, 2), (["01"], no, 0), (["01"], no, -1), (two, two, 1), (no, no, 1):
        with pytest.raises(tt.Refusal):
            tt.prefer(cards, available, must, size)
    assert tt.prefer(cards, ["gone", "c1"], [], 1) == ["c1"]
    assert tt.prefer(cards, ["gone", "c1"], [], 2) == ["c1", "gone"]
    assert tt.prefer(cards, ["lost", "gone", "c1", "01"], [], 2) == ["01", "c1"], "also where it spans NUMA nodes"
    assert tt.prefer(cards, ["lost", "gone", "c1"], ["lost"], 2) == ["c1", "lost"]
    assert tt.prefer(cards, ["lost", "gone"], ["lost"], 1) == ["lost"]
    cards["01"] = replace(cards["01"], verdict=tt.Verdict(tt.UNHEALTHY))
    assert [tt.prefer(cards, ["01", "c1"], [], size) for size in (1, 2)] == [["c1"], ["c1", "01"]], "nor one that is not fit"


def test_preferred_is_fast() -> None:
    """Story 15: 32 cards, all sizes: the slowest choice, in the best of three rounds, as others may take the CPU."""
    cards = galaxy()
    rounds = []
    for _ in range(3):
        times = []
        for size in range(1, 33):
            began = time.perf_counter()
            tt.prefer(cards, list(cards), [], size)
            times.append(time.perf_counter() - began)
        rounds.append(max(times))
    quick(min(rounds), 0.010, "GetPreferredAllocation of 32 cards")


def test_listing_topology() -> None:
    """Cards without a NUMA node among others get all of the host's; where none has one, none is sent (contract 10)."""

    def nodes(*numa: int | None) -> list[list[int]]:
        cards = tuple(place(one, bus=bus) for bus, one in enumerate(numa, 1))
        listing = tt.listing(tt.Snapshot(cards, (0, 1)), R150)
        assert all(device.HasField("topology") == bool(device.topology.nodes) for device in listing.devices)
        return [[node.ID for node in device.topology.nodes] for device in listing.devices]

    assert nodes(0, 1) == [[0], [1]] and nodes(None, None) == [[], []] and nodes(None, 1) == [[0, 1], [1]]


@pytest.mark.parametrize(
    "flag, iommu, there, mounted",
    [
        ("auto", "DMA-FQ", True, False),
        ("auto", "identity", True, True),
        ("auto", "", True, True),
        ("auto", "", False, False),
        ("always", "DMA", False, True),
        ("never", "", True, False),
    ],
)
def test_hugepages(tmp_path: Path, flag: str, iommu: str, there: bool, mounted: bool) -> None:
    """Needed by a chip that is not behind a DMA IOMMU domain, and mounted if the host has them (facts, section 4)."""
    if there:
        (tmp_path / "hugepages-1G").mkdir()
    chip = replace(place(0, bus=1).chips[0], iommu=iommu)
    card = replace(place(0, bus=1), chips=(chip,))
    settings = tt.Settings(dev_root=tmp_path, hugepages=flag)
    assert tt.wants_hugepages(settings, [card]) is mounted


GARBAGE = st.sampled_from(
    [b"", b"\0", b"\xff\xfe", b"-1", b"n150\n", b"N/A\n", b"../..", b"1" * 5000, b"1" * 2**20, b"unknown\n", b"F" * 16 + b"\n"]
)
FILES = ["tt_card_type", "tt_asic_id", "tt_serial", "tt_fw_bundle_ver", "tt_heartbeat", "dev", "device/device",
         "device/numa_node", "device/subsystem_device"]  # fmt: skip


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60, deadline=None)
@given(st.dictionaries(st.sampled_from(FILES), GARBAGE | st.none() | st.binary(max_size=30)))
def test_garbage_in_sysfs(garbage: dict[str, bytes | None]) -> None:
    """No content of any file makes discovery raise, and the neighbour's card is as it was."""
    with tempfile.TemporaryDirectory() as folder:
        tree = Tree(Path(folder), [N150[0], N150[1]])
        for file, content in garbage.items():
            tree.set(N150[0].bdf, file, content)
        inventory = tt.Inventory(tt.Settings(sysfs_root=tree.sys, dev_root=tree.dev))
        inventory.poll(0.0)
        inventory.poll(1.0)
        cards = {card.chips[0].pci: card for card in inventory.snapshot.cards}
        assert set(cards) == {N150[0].bdf, N150[1].bdf}
        assert (cards[N150[1].bdf].id, cards[N150[1].bdf].verdict.health) == (N150[1].id, "Healthy")
        tt.print_list(inventory.snapshot, as_json=True)


def bound(path: Path) -> None:
    """A socket's file, which cannot be opened. By way of its folder's descriptor, as a socket's path must be short."""
    folder = os.open(path.parent, os.O_PATH)
    with socket.socket(socket.AF_UNIX) as one:
        one.bind(f"/proc/self/fd/{folder}/{path.name}")
    os.close(folder)


# Files that cannot be read, for root neither, each with its own error; ENODEV and ENODATA only drivers give: see 6b.
UNREADABLE: dict[int, Callable[[Path], None]] = {
    errno.EIO: lambda path: path.symlink_to("/proc/self/mem"),  # nothing is mapped at 0
    errno.EACCES: lambda path: path.symlink_to(next(Path("/sys/bus").glob("*/drivers_probe"))),  # of mode 0200, in any sysfs
    errno.EISDIR: lambda path: path.mkdir(),
    errno.ENXIO: bound,
    errno.ELOOP: lambda path: path.symlink_to(path.name),
}


@pytest.mark.parametrize("error", UNREADABLE, ids=errno.errorcode.get)
@pytest.mark.parametrize("file", FILES)
def test_unreadable_files(room: Path, error: int, file: str) -> None:
    """A file that is there and cannot be read is as one that is not there (stories 6, 7), and no other card's matter."""
    tree = Tree(room, [N150[0], N150[1]])
    inventory = tt.Inventory(tt.Settings(sysfs_root=tree.sys, dev_root=tree.dev))
    tree.set(N150[0].bdf, file, None)
    inventory.poll(0.0)
    without = [replace(card.chips[0], stamp=(0, 0)) for card in inventory.snapshot.cards]
    path = tree.pci(N150[0].bdf) / file.removeprefix("device/") if "/" in file else tree.entry(N150[0].bdf) / file
    UNREADABLE[error](path)
    with pytest.raises(OSError) as caught:
        tt.read_attribute(path)
    assert caught.value.errno == error
    for one in (inventory, tt.Inventory(inventory.settings)):  # one that knew the card, and one that is new to it
        for now in (1.0, 2.0):
            one.poll(now)
        assert [replace(card.chips[0], stamp=(0, 0)) for card in one.snapshot.cards] == without
        assert [card.id for card in one.snapshot.cards if card.verdict.kind == "ok"][-1:] == [N150[1].id]


@pytest.mark.parametrize("file", ["tt_card_type", "tt_heartbeat"])
def test_chip_that_goes_while_it_is_read(tree: Tree, file: str) -> None:
    """sysfs had the chip when it was listed, and nothing of it is left when the next file is read (story 17)."""
    for chip in N150[:2]:
        tree.add(chip)
    inventory = tt.Inventory(tt.Settings(sysfs_root=tree.sys, dev_root=tree.dev))
    if file == "tt_heartbeat":
        inventory.poll(0.0)
    gate = tree.root / "gate"  # the reader stops here, in the middle of the poll
    os.mkfifo(gate)
    tree.set(N150[0].bdf, file, None)
    (tree.entry(N150[0].bdf) / file).hardlink_to(gate)
    with ThreadPoolExecutor(1) as thread:
        poll = thread.submit(inventory.poll, 1.0)
        with gate.open("w"):  # opens when the reader is there
            tree.remove(N150[0].bdf)
        poll.result()
    inventory.poll(2.0)
    gone = [(N150[0].id, "n150", "Unhealthy", "gone")] if file == "tt_heartbeat" else []
    assert shown(inventory.snapshot) == [*gone, (N150[1].id, "n150", "Healthy", "ok")]


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda entry: entry.symlink_to(entry.name), id="a link to itself"),
        pytest.param(lambda entry: entry.symlink_to("nowhere"), id="a link to nowhere"),
        pytest.param(lambda entry: entry.write_text(""), id="a file"),
        pytest.param(lambda entry: entry.mkdir(), id="an empty folder"),
        pytest.param(lambda entry: (entry.mkdir(), (entry / "device").symlink_to("/")), id="a device that is none"),
        pytest.param(lambda entry: (entry.mkdir(), (entry / "device").symlink_to("0000:09:00.0")), id="a device that is gone"),
    ],
)
@pytest.mark.parametrize("name", ["tenstorrent!7", "by-id", "tenstorrent!x", "tenstorrent!07", "tenstorrent!"])
def test_odd_class_entries(tree: Tree, make: Callable[[Path], object], name: str) -> None:
    """Entries that lead to no chip are no cards, and cost no other card anything."""
    tree.add(N150[0])
    make(tree.sys / "class/tenstorrent" / name)
    inventory = tt.Inventory(tt.Settings(sysfs_root=tree.sys, dev_root=tree.dev))
    inventory.poll(0.0)
    assert [card.id for card in inventory.snapshot.cards] == [N150[0].id]


def test_place_in_the_pci_tree(tree: Tree) -> None:
    """A chip below bridges: its own address is the last part of the path, root bus and bridges are what is above it."""
    bridges = ("pci0000:40", "0000:40:01.1", "0000:41:00.0")
    device = tree.sys.joinpath("devices", *bridges, "0000:42:00.0")
    entry = device / "tenstorrent/tenstorrent!3"
    entry.mkdir(parents=True)
    (entry / "device").symlink_to("../..")
    (tree.sys / "class/tenstorrent/tenstorrent!3").symlink_to(entry)
    chip = tt.find_chip(tree.sys, 3)
    assert (chip.pci, chip.index, chip.pci_path) == ("0000:42:00.0", 3, bridges)


def test_id_of_a_chip() -> None:
    """The architecture is part of the name in /dev/tenstorrent/by-id: without either half the PCI address is the ID."""
    found = [sighting(arch=arch, asic_id=asic_id).chip.id for arch in ("wormhole", "") for asic_id in ("A" * 16, "")]
    assert found == ["wormhole-AAAAAAAAAAAAAAAA", "0000:01:00.0", "0000:01:00.0", "0000:01:00.0"]


@pytest.mark.parametrize(
    "online, nodes",
    [("0\n", (0,)), ("0-1,4\n", (0, 1, 4)), ("2-3\n", (2, 3)), ("", ()), ("none\n", ()), ("0-99999999\n", tuple(range(1024)))],
)
def test_numa_nodes_of_the_host(tree: Tree, online: str, nodes: tuple[int, ...]) -> None:
    """The kernel's list format; nonsense is no node, and no endless list of them."""
    tree.write(tree.sys / "devices/system/node/online", online)
    assert tt.host_numa_nodes(tree.sys) == nodes


def test_device_nodes(tmp_path: Path) -> None:
    """A device node is what sysfs says only with that number, as a character device, through links too."""
    (tmp_path / "link").symlink_to("/dev/null")
    (tmp_path / "file").write_text("")
    cases = [("/dev/null", "1:3"), ("link", "1:3"), ("/dev/null", "1:5"), ("/dev/null", ""), ("file", "0:0"), ("none", "")]
    assert [tt.is_device_node(str(tmp_path / path), dev) for path, dev in cases] == [True, True, False, False, False, False]


def test_function_without_a_driver(tree: Tree) -> None:
    """A PCI function that another driver has is listed with the reason, and not offered."""
    tree.add(N150[0])
    tree.add_pci(N150[1])
    vfio = tree.sys / "bus/pci/drivers/vfio-pci"
    vfio.mkdir(parents=True)
    (tree.pci(N150[1].bdf) / "driver").symlink_to(vfio)
    inventory = tt.Inventory(tt.Settings(sysfs_root=tree.sys, dev_root=tree.dev))
    inventory.poll(0.0)
    assert shown(inventory.snapshot)[1:] == [(N150[1].bdf, None, "pending", "no-driver")]
    assert "vfio-pci" in inventory.snapshot.cards[1].verdict.reason


def test_listens(room: Path) -> None:
    """Only a socket at which somebody accepts; a full queue or a dead owner is nobody, and neither makes the caller wait."""
    path = room / "s"
    with socket.socket(socket.AF_UNIX) as server, contextlib.ExitStack() as stack:
        assert not tt.listens(path)
        server.bind(str(path))
        assert not tt.listens(path), "bound only"
        server.listen(0)
        assert tt.listens(path)
        with pytest.raises(BlockingIOError):
            for _ in range(100):
                client = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK))
                client.connect(str(path))
        assert not tt.listens(path), "its queue is full"
    assert path.is_socket() and not tt.listens(path), "nobody has it open any more"
    (room / "file").write_text("")
    assert not tt.listens(room / "file") and not tt.listens(room / "file" / "s")


def test_lock_of_the_folder(room: Path) -> None:
    """The lock is kept while its folder is, and goes with it: whoever is first has the new one."""
    first, second = (tt.Stay(tt.Settings(kubelet_dir=room)) for _ in range(2))
    folder = room / "device-plugins"
    assert "not there yet" in first.look() and not first.held
    folder.mkdir()
    assert first.look() == "" and "standing by" in second.look() and (first.held, second.held) == (True, False)
    mine = first._fd
    assert first.look() == "" and first._fd == mine, "asked for again, it is not let go for a moment"
    shutil.rmtree(folder)
    folder.mkdir()
    assert second.look() == "" and "standing by" in first.look() and not first.held
    second.release()
    assert first.look() == "" and "standing by" in second.look()
    shutil.rmtree(folder)
    folder.write_text("no folder")
    assert "cannot lock" in first.look() and not first.held
    first.release()
    second.release()


def test_a_failed_kubelet_is_left_alone(room: Path) -> None:
    """The kubelet that has failed is met again after the pause; another one, on the same path, at once."""

    async def look(path: Path, server: socket.socket) -> None:
        server.bind(str(path))
        server.listen()
        settings = tt.Settings(kubelet_dir=room)
        registrar = tt.Registrar(settings, tt.Inventory(settings), tt.Bell())
        failed = tt.identity_of(path)
        began = time.monotonic()
        assert await registrar.kubelet(path, failed, 0.3) == failed
        assert time.monotonic() - began >= 0.3
        meeting = asyncio.create_task(registrar.kubelet(path, failed, 60))
        await asyncio.sleep(0)  # it has begun to wait
        assert not meeting.done()
        path.unlink()
        with socket.socket(socket.AF_UNIX) as other:
            other.bind(str(path))
            other.listen()
            began = time.monotonic()
            assert await meeting != failed
            quick(time.monotonic() - began, AGAIN_S, "another kubelet's socket to seen")

    with socket.socket(socket.AF_UNIX) as server:
        (room / "device-plugins").mkdir()
        asyncio.run(look(room / "device-plugins/s", server))


########################################################################################################################
# 5. Tests of the wire and of the fake kubelet
########################################################################################################################


def wire_type(one: Any) -> str:
    """A field's type as the table writes it."""
    if one.message_type is not None and one.message_type.GetOptions().map_entry:
        assert [part.type for part in one.message_type.fields] == [one.TYPE_STRING] * 2
        return "map"
    names = {one.TYPE_STRING: "string", one.TYPE_BOOL: "bool", one.TYPE_INT32: "int32", one.TYPE_INT64: "int64"}
    return ("*" if one.is_repeated else "") + (one.message_type.name if one.message_type else names[one.type])


def test_wire_messages() -> None:
    """Field numbers, names, types and JSON names of the plugin's stubs are those of the table."""
    stubs = importlib.import_module("api_pb2").DESCRIPTOR
    assert stubs.package == "v1beta1"
    found = {
        name: [(one.number, one.name, wire_type(one), one.json_name) for one in message.fields]
        for name, message in stubs.message_types_by_name.items()
    }
    assert found == WIRE


def test_wire_services() -> None:
    """Both services have exactly the table's methods, at the paths that the kubelet calls."""
    stubs = importlib.import_module("api_pb2").DESCRIPTOR
    found = {
        service.full_name: {
            one.name: (one.input_type.name, one.output_type.name, one.server_streaming) for one in service.methods
        }
        for service in stubs.services_by_name.values()
    }
    assert found == {"v1beta1.Registration": REGISTRATION, "v1beta1.DevicePlugin": DEVICE_PLUGIN}
    text = (HERE / "api_pb2_grpc.py").read_text()
    for service, methods in found.items():
        assert [name for name in methods if f"'/{service}/{name}'" not in text] == []


def test_stubs_are_generated_from_the_proto(tmp_path: Path) -> None:
    """`./build.sh stubs DIR` makes the committed stubs, byte for byte."""
    done = subprocess.run([str(HERE / "build.sh"), "stubs", str(tmp_path)], capture_output=True, text=True, timeout=300)
    if done.returncode == 3:  # the old generator has no wheel for CPython 3.13 and later
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stderr
    for name in ("api_pb2.py", "api_pb2_grpc.py"):
        assert (tmp_path / name).read_bytes() == (HERE / name).read_bytes(), f"{name} is not made from api.proto"


@pytest.fixture
def puppets(kubelet: Kubelet) -> Iterator[Callable[..., Puppet]]:
    """Make puppets in the kubelet's folder."""
    with contextlib.ExitStack() as stack:
        yield lambda *args, **announced: stack.enter_context(contextlib.closing(Puppet(kubelet.folder, *args, **announced)))


def refusal(caught: pytest.ExceptionInfo[grpc.RpcError]) -> tuple[grpc.StatusCode, str]:
    """Status and message of a failed Register."""
    error: Any = caught.value
    return error.code(), error.details()


def test_kubelet_start_clears_sockets(kubelet: Kubelet) -> None:
    """Contract 1: its folder has mode 0750, every socket in it goes, files and folders stay; bound, then listening."""
    kubelet.folder.mkdir(parents=True)
    kubelet.folder.chmod(0o700)
    (kubelet.folder / "keep").write_text("a file")
    (kubelet.folder / "subfolder").mkdir()
    for name in ("plugin-a.sock", "kubelet.sock"):
        with socket.socket(socket.AF_UNIX) as one:
            one.bind(str(kubelet.folder / name))
    kubelet.start(wait="bound", listen_delay=0.3)
    assert kubelet.seen("bound")[0]["removed"] == ["kubelet.sock", "plugin-a.sock"]
    with socket.socket(socket.AF_UNIX) as one, pytest.raises(ConnectionRefusedError):
        one.connect(str(kubelet.folder / "kubelet.sock"))
    inode = (kubelet.folder / "kubelet.sock").stat().st_ino
    kubelet.wait("listening")
    with socket.socket(socket.AF_UNIX) as one:
        one.connect(str(kubelet.folder / "kubelet.sock"))
    assert inode == (kubelet.folder / "kubelet.sock").stat().st_ino, "one and the same socket, bound and then listening"
    assert sorted(path.name for path in kubelet.folder.iterdir()) == ["keep", "kubelet.sock", "subfolder"]
    kubelet.kill()
    kubelet.delete_folder()
    kubelet.start()
    assert stat.S_IMODE(kubelet.folder.stat().st_mode) == 0o750 & ~current_umask()


def current_umask() -> int:
    """The umask, which can only be read by setting it."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"version": "v1alpha"}, "v1alpha"),
        ({"version": ""}, "version"),
        ({"resource_name": "n150"}, "invalid"),
        ({"resource_name": "tenstorrent.com/"}, "invalid"),
        ({"resource_name": "tenstorrent.com/-n150"}, "invalid"),
        ({"resource_name": "tenstorrent.com/n150."}, "invalid"),
        ({"resource_name": "tenstorrent.com/" + "x" * 64}, "invalid"),
        ({"resource_name": "tenstorrent.com/a/b"}, "invalid"),
        ({"resource_name": "Tenstorrent.com/n150"}, "invalid"),
        ({"resource_name": "kubernetes.io/n150"}, "invalid"),
        ({"endpoint": "/var/lib/kubelet/device-plugins/puppet.sock"}, "file name"),
        ({"endpoint": ""}, "file name"),
    ],
)
def test_kubelet_refuses_registrations(kubelet: Kubelet, puppets: Callable[..., Puppet], fields: Event, words: str) -> None:
    """Contract 2: a wrong version, name or endpoint fails the call, and nothing is kept."""
    kubelet.start()
    with pytest.raises(grpc.RpcError) as caught:
        puppets("example.com/x").register(**fields)
    code, message = refusal(caught)
    assert code is grpc.StatusCode.UNKNOWN and words in message
    assert not kubelet.seen("stream")


def test_kubelet_accepts_the_longest_name(kubelet: Kubelet, puppets: Callable[..., Puppet]) -> None:
    """Contract 2: 63 characters of [A-Za-z0-9._-] are fine."""
    kubelet.start()
    puppets("example.com/" + "aB.-_" * 12 + "xyz").register()
    kubelet.wait("stream")


@both_generations
def test_kubelet_generations(kubelet: Kubelet) -> None:
    """Contract 2: 1.20 answers, then dials, and takes the request's options; 1.36 dials first and takes the plugin's."""
    kubelet.start(dial_delay=0.2)
    with contextlib.closing(Puppet(kubelet.folder, "example.com/x", pre_start_required=True)) as puppet:
        puppet.register(options={"pre_start_required": False})
        answered = time.monotonic()
        opened = kubelet.wait("stream")["t"]
        puppet.send(a=True)
        kubelet.wait_status("example.com/x", 1, 1)
        kubelet.admit("pod", {"example.com/x": 1})
        kubelet.start_container("pod")
        names = [name for name, _ in puppet.calls]
    if kubelet.generation == "1.20":
        assert opened > answered and names == ["Allocate"]
    else:
        assert opened < answered + 0.1 and names == ["GetDevicePluginOptions", "Allocate", "PreStartContainer"]


def test_kubelet_fails_a_dial(room: Path) -> None:
    """Contract 2: 1.36 fails the Register of a socket that nobody serves, when its time for the dial is over."""
    with contextlib.closing(Kubelet(room / "k")) as kubelet:
        kubelet.start(dial_limit=1)
        with contextlib.closing(Puppet(kubelet.folder, "example.com/x")) as puppet, pytest.raises(grpc.RpcError):
            puppet.register(endpoint="nobody.sock")
        assert kubelet.seen("dial_failed") and not kubelet.seen("stream")


def test_kubelet_lists_are_whole(kubelet: Kubelet, puppets: Callable[..., Puppet]) -> None:
    """Contract 4 and 8: Unhealthy is capacity, missing is not; a stream's end leaves nothing allocatable."""
    kubelet.start(grace=0.3)
    puppet = puppets("example.com/x")
    puppet.register()
    puppet.send(a=True, b=True)
    kubelet.wait_status("example.com/x", 2, 2)
    puppet.send(a=True, b=False)
    kubelet.wait_status("example.com/x", 2, 1)
    puppet.send(a=True)
    kubelet.wait_status("example.com/x", 1, 1)
    puppet.lists.put(None)
    kubelet.wait("disconnected", endpoint="puppet.sock", ended="puppet.sock")
    kubelet.wait_status("example.com/x", 1, 0)
    with refused("KUBELET", "stopped"):
        kubelet.allocate("example.com/x", ["a"])
    kubelet.wait("forgotten")


@pytest.mark.parametrize("generation", ["1.36", "later"])
def test_kubelet_race(room: Path, generation: str) -> None:
    """Contract 5: up to 1.36 the end of an older stream disconnects the newer client of the resource."""
    with contextlib.ExitStack() as stack:
        kubelet = stack.enter_context(contextlib.closing(Kubelet(room / "k", generation)))
        kubelet.start()
        old = stack.enter_context(contextlib.closing(Puppet(kubelet.folder, "example.com/x", "old.sock")))
        old.register()
        old.send(a=True)
        kubelet.wait_status("example.com/x", 1, 1)
        new = stack.enter_context(contextlib.closing(Puppet(kubelet.folder, "example.com/x", "new.sock")))
        new.register()
        new.send(a=True, b=True)
        kubelet.wait_status("example.com/x", 2, 2)
        mark = kubelet.log.mark()
        old.lists.put(None)
        kubelet.wait("stream_end", endpoint="old.sock", after=mark)
        if generation == "1.36":
            kubelet.wait("disconnected", endpoint="new.sock", ended="old.sock", after=mark)
            kubelet.wait("stream_end", endpoint="new.sock", how="closed by the kubelet", after=mark)
            kubelet.wait_status("example.com/x", 2, 0, after=mark)
        else:
            kubelet.wait("disconnected", endpoint="old.sock", ended="old.sock", after=mark)
            mark = kubelet.log.mark()
            new.register()  # for a socket that it still holds
            kubelet.wait("ignored", endpoint="new.sock", after=mark)
            new.send(a=True)
            kubelet.wait_status("example.com/x", 1, 1, after=mark)


def test_kubelet_keeps_the_answer(kubelet: Kubelet, puppets: Callable[..., Puppet]) -> None:
    """Contract 9, 12, 13, 15: prefer, allocate once, pre-start each time; a restarted kubelet wants the same ids healthy."""
    kubelet.start()
    puppet = puppets("example.com/x", pre_start_required=True, get_preferred_allocation_available=True)
    puppet.answer = {"envs": {"X": "first"}}
    puppet.register()
    puppet.send(a=True, b=True, c=True)
    kubelet.wait_status("example.com/x", 3, 3)
    assert kubelet.admit("pod", {"example.com/x": 2}, {"example.com/x": ["a"]})["ids"] == {"example.com/x": ["a", "b"]}
    assert kubelet.start_container("pod")["envs"] == {"X": "first"}
    with refused("UnexpectedAdmissionError", "Requested: 2, Available: 1"):
        kubelet.admit("second", {"example.com/x": 2})
    kubelet.kill()
    puppet.close()
    kubelet.start()
    with refused("UnexpectedAdmissionError", "no healthy devices"):
        kubelet.admit("pod", {"example.com/x": 2})
    puppet = puppets("example.com/x", pre_start_required=True)
    puppet.answer = {"envs": {"X": "second"}}
    puppet.register()
    puppet.send(a=True, b=False, c=True)
    mark = kubelet.log.mark()
    kubelet.wait_status("example.com/x", 3, 2)
    with refused("UnexpectedAdmissionError", "b"):
        kubelet.admit("pod", {"example.com/x": 2})
    puppet.send(a=True, b=True, c=True)
    kubelet.wait("pod_health", container="pod/main", id="b", healthy=True, after=mark)
    kubelet.wait_status("example.com/x", 3, 3, after=mark)
    assert kubelet.admit("pod", {"example.com/x": 2})["envs"] == {"X": "first"}
    for _ in range(2):
        kubelet.start_container("pod")
    assert [name for name, _ in puppet.calls] == ["GetDevicePluginOptions", "PreStartContainer", "PreStartContainer"]
    puppet.fails["PreStartContainer"] = "no, because"
    with refused("FAILED_PRECONDITION", "no, because"):
        kubelet.start_container("pod")
    kubelet.delete_pod("pod")
    assert kubelet.admit("second", {"example.com/x": 3})["envs"] == {"X": "second"}


def test_kubelet_merges_by_key(kubelet: Kubelet, puppets: Callable[..., Puppet]) -> None:
    """Contract 14: two resources of one container that use one name: the second value is dropped silently."""
    kubelet.start()
    for number in (1, 2):
        puppet = puppets(f"example.com/r{number}", f"r{number}.sock")
        device = {"container_path": f"/dev/{number}", "host_path": "/dev/null", "permissions": "rw"}
        puppet.answer = {"envs": {"SHARED": str(number), f"OWN_{number}": "x"}, "devices": [device]}
        puppet.register()
        puppet.send(a=True)
        kubelet.wait_status(f"example.com/r{number}", 1, 1)
    merged = kubelet.admit("pod", {"example.com/r1": 1, "example.com/r2": 1})
    assert merged["envs"] == {"SHARED": "1", "OWN_1": "x", "OWN_2": "x"}
    assert [one["container_path"] for one in merged["devices"]] == ["/dev/1", "/dev/2"]
    assert kubelet.seen("conflict")[0]["key"] == "SHARED"


def test_kubelet_topology_hints(kubelet: Kubelet, puppets: Callable[..., Puppet]) -> None:
    """Contract 10: -1 matches nothing, and one device without topology takes the hints from a request for two."""
    kubelet.start()
    puppet = puppets("example.com/x")
    puppet.register()
    cases: list[tuple[dict[str, Any], int, Any]] = [
        ({"a": (True, 0), "b": (True, 1)}, 1, [[0], [1], [0, 1]]),
        ({"a": (True, 0), "b": (True, 1)}, 2, [[0, 1]]),
        ({"a": (True, 0), "b": (False, 1)}, 1, [[0], [0, 1]]),
        ({"a": (True, -1), "b": (True, -1)}, 1, []),
        ({"a": (True, 0), "b": True}, 2, []),
        ({"a": True, "b": True}, 2, None),
    ]
    for devices, size, expected in cases:
        mark = kubelet.log.mark()
        puppet.send(**devices)
        kubelet.wait("devices", after=mark)
        assert kubelet.hints("example.com/x", size) == expected, devices


@pytest.mark.parametrize("fault", ["register_fails", "register_hangs", "no_stream", "drop_streams"])
def test_kubelet_faults(kubelet: Kubelet, puppets: Callable[..., Puppet], fault: str) -> None:
    """The switches do what they say, as often as they say."""
    kubelet.start(faults={fault: 1})
    puppet = puppets("example.com/x")
    if fault == "register_fails":
        with pytest.raises(grpc.RpcError) as caught:
            puppet.register()
        assert refusal(caught)[0] is grpc.StatusCode.UNAVAILABLE
    elif fault == "register_hangs":

        def hang() -> None:
            with contextlib.suppress(grpc.RpcError):
                puppet.register()

        threading.Thread(target=hang, daemon=True).start()
        kubelet.wait("register")
    else:
        puppet.register()
        puppet.send(a=True)
        kubelet.wait("no_stream" if fault == "no_stream" else "stream_end")
    mark = kubelet.log.mark()
    puppets("example.com/x", "again.sock").register()
    kubelet.wait("stream", endpoint="again.sock", after=mark)


########################################################################################################################
# 6a. Tests of the plugin: registration
########################################################################################################################

# Bounds of the end-to-end issue, in seconds.
LONG = bool(os.environ.get("TT_TEST_LONG"))  # ./build.sh test --long
START_S = 0.5  # process start to registered
AGAIN_S = 0.1  # a kubelet that answers, a dropped stream, the end of another instance: to registered
UNPLUG_S = 1.5  # card gone to Unhealthy
REPLUG_S = 3.0  # card back to Healthy
HANG_S = 15.0  # heart stopped to Unhealthy
TERM_S = 1.0  # SIGTERM to the end

RESTARTS = 20
OPTIONS = {"pre_start_required": True, "get_preferred_allocation_available": True}
STANDING_BY = r"stand(s|ing)? by"

long_only = pytest.mark.skipif(not LONG, reason="takes long: ./build.sh test --long")
module_only = pytest.mark.parametrize("command", ["module"], indirect=True)  # for what packing cannot change


@both_generations
def test_registers_at_start(kubelet: Kubelet, four: Tree, launch: Launch) -> None:
    """Half a second after the process was started all four cards are offered, in the first list (story 8), at the kubelet
    of the folder that was named (story 25)."""
    kubelet.start()
    plugin = launch(four, kubelet)
    offered = kubelet.wait_status(R150, 4, 4)
    quick(offered - plugin.started, START_S, "process start to registered")
    (request,) = kubelet.seen("register")
    assert request["version"] == "v1beta1" and request["resource_name"] == R150
    assert request["options"] == OPTIONS, "what a 1.20 kubelet goes by"
    assert sockets(kubelet) == [request["endpoint"]]
    assert kubelet.ids(R150) == sorted(chip.id for chip in N150)
    if kubelet.generation == "1.36":
        (options,) = kubelet.seen("options")
        assert {name: options[name] for name in OPTIONS} == OPTIONS


@module_only
def test_says_nothing_without_a_change(kubelet: Kubelet, four: Tree, plugin: Plugin) -> None:
    """Hearts beat and temperatures move; the kubelet hears nothing, and nothing is registered twice (story 13).

    Nor is anything watched that the kernel has few of (story 11)."""
    plugin.wait_for_line(f"registered {R150}")
    mark, lines = kubelet.log.mark(), plugin.log.mark()
    four.set(N150[0].bdf, "device/hwmon/hwmon2/temp1_input", "60000\n")
    kubelet.log.never(lambda event: True, 3.0, mark)
    assert plugin.log.mark() == lines, plugin.lines()[lines:]
    assert not [link for fd in Path(f"/proc/{plugin.process.pid}/fd").iterdir() if "inotify" in (link := os.readlink(fd))]


@both_generations
@pytest.mark.parametrize("how", ["stop", "kill"])
def test_kubelet_restarts(kubelet: Kubelet, four: Tree, plugin: Plugin, how: str) -> None:
    """After each of many restarts the cards are offered again at once, by exactly one Register per life."""
    for number in range(RESTARTS // 2):  # this many of each kind
        if number % 2:  # a gap of milliseconds, or one of the time that a Python process needs
            kubelet.prepare()
        kubelet.stop() if how == "stop" else kubelet.kill()
        mark = kubelet.log.mark()
        kubelet.start()
        offered = kubelet.wait_status(R150, 4, 4, after=mark)
        quick(offered - kubelet.answering, AGAIN_S, f"kubelet {kubelet.generation} answers again to registered")
        assert len(kubelet.seen("register", after=mark)) == 1
        assert sockets(kubelet) == [event["endpoint"] for event in kubelet.seen("register", after=mark)]
    four.remove(N150[0].bdf)  # and no dead stream takes a change away from the live one (story 12)
    kubelet.wait_health(R150, N150[0].id, "Unhealthy", after=mark)
    assert plugin.process.poll() is None


@both_generations
def test_kubelet_drops_the_stream(kubelet: Kubelet, plugin: Plugin) -> None:
    """Only the stream ends, all sockets stay (story 1): the cards are offered again at once, each time."""
    for _ in range(RESTARTS):
        mark = kubelet.log.mark()
        dropped = kubelet.drop_stream(R150)
        kubelet.wait_status(R150, 4, 0, after=mark)
        offered = kubelet.wait_status(R150, 4, 4, after=mark)
        quick(offered - dropped, AGAIN_S, "stream dropped to registered")
    kubelet.log.never(lambda event: True, 0.5, kubelet.log.mark())
    assert sockets(kubelet) == [kubelet.seen("register")[-1]["endpoint"]], "one socket, not one for each registration"


@both_generations
@pytest.mark.parametrize("ending", [signal.SIGTERM, signal.SIGKILL])
def test_takeover(kubelet: Kubelet, four: Tree, plugin: Plugin, launch: Launch, ending: signal.Signals) -> None:
    """A second instance stands by and takes over at once when the first ends (story 4), again and again."""
    holder = plugin
    for _ in range(3):
        heir = launch(four, kubelet)
        heir.wait_for_line(STANDING_BY)
        mark = kubelet.log.mark()
        holder.end(ending)
        ended = kubelet.wait("stream_end", after=mark)["t"]
        offered = kubelet.wait_status(R150, 4, 4, after=mark)
        quick(offered - ended, AGAIN_S, f"holder's stream ended by {ending.name} to registered by the heir")
        assert len(heir.lines(STANDING_BY)) == 1
        assert sockets(kubelet) == [kubelet.seen("register")[-1]["endpoint"]], "the heir's alone: no leftover, nothing removed"
        holder = heir
    mark = kubelet.log.mark()
    kubelet.log.never(lambda event: True, 1.0, mark)
    kubelet.stop()  # and the heir is no less steady than the first
    kubelet.start()
    quick(kubelet.wait_status(R150, 4, 4, after=mark) - kubelet.answering, AGAIN_S, "kubelet answers again to the heir")


@pytest.mark.parametrize("ending", [signal.SIGTERM, signal.SIGKILL])
@module_only
def test_the_one_standing_by_ends(
    kubelet: Kubelet, four: Tree, plugin: Plugin, launch: Launch, ending: signal.Signals
) -> None:
    """The other order: the second instance comes and goes, and neither the first nor the kubelet notices."""
    mark, before = kubelet.log.mark(), sockets(kubelet)
    second = launch(four, kubelet)
    second.wait_for_line(STANDING_BY)
    second.end(ending)
    kubelet.log.never(lambda event: True, 0.5, mark)
    assert sockets(kubelet) == before and plugin.process.poll() is None


# State of the registration loop: how the kubelet starts (None: it does not), and what the plugin says when it is reached.
STATES: dict[str, tuple[dict[str, Any] | None, str]] = {
    "in its first poll": (None, "kubelet folder"),
    "no folder": (None, "not there yet"),
    "no kubelet": (None, "no kubelet listens"),
    "nobody listens": ({"wait": "bound", "listen_delay": 60}, "no kubelet listens"),
    "Register hangs": ({"faults": {"register_hangs": 1}}, ""),
    "Register has failed": ({"faults": {"register_fails": 99}}, "trying again"),
    "no stream yet": ({"faults": {"no_stream": 1}}, ""),
    "registered": ({}, "registered"),
    "kubelet gone": ({}, "registered"),
    "folder gone": ({}, "registered"),
    "standing by": ({}, STANDING_BY),
}


@pytest.mark.parametrize("state", STATES)
def test_sigterm(kubelet: Kubelet, four: Tree, launch: Launch, state: str) -> None:
    """SIGTERM in each state: exit code 0 within a second, and no socket of this process is left."""
    start, says = STATES[state]
    first = None
    if state == "in its first poll":  # which does not end
        with four.lock:
            four.chips[N150[0].bdf] = replace(N150[0], heartbeat=False)
            four.set(N150[0].bdf, "tt_card_type", None)
            os.mkfifo(four.entry(N150[0].bdf) / "tt_card_type")
    if state == "no kubelet":
        kubelet.folder.mkdir(parents=True)
    if start is not None:
        kubelet.start(**start)
    if state == "standing by":
        first = launch(four, kubelet)
        kubelet.wait_status(R150, 4, 4)
    before = sockets(kubelet)
    plugin = launch(four, kubelet)
    plugin.wait_for_line(says)
    if event := {"Register hangs": "register", "no stream yet": "no_stream"}.get(state):
        kubelet.wait(event)
    lines = plugin.log.mark()
    if state == "kubelet gone":
        kubelet.kill()
        plugin.wait_for_line("ended", after=lines)
    elif state == "folder gone":
        kubelet.delete_folder()
    code, seconds = plugin.end(signal.SIGTERM)
    assert code == 0, plugin.lines()
    quick(seconds, TERM_S, "SIGTERM to the end")
    assert sockets(kubelet) == before
    assert not first or first.process.poll() is None


@module_only
def test_sigterm_during_allocate(kubelet: Kubelet, plugin: Plugin) -> None:
    """Calls under way get a card or a status, and keep nobody from ending."""
    one = MESSAGES["ContainerAllocateRequest"](devices_ids=[N150[0].id])
    request = MESSAGES["AllocateRequest"](container_requests=[one]).SerializeToString()
    with grpc.insecure_channel(f"unix:{kubelet.folder / sockets(kubelet)[0]}") as channel:
        calls = [raw(channel, "/v1beta1.DevicePlugin/Allocate").future(request, timeout=10) for _ in range(1000)]
        assert calls[0].result() and not all(call.done() for call in calls)
        code, seconds = plugin.end(signal.SIGTERM)
        codes = Counter(call.code() for call in calls)
    assert code == 0 and not sockets(kubelet)
    quick(seconds, TERM_S, "SIGTERM to the end with calls under way")
    assert set(codes) <= {grpc.StatusCode.OK, grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED}, codes


@module_only
def test_sigterm_while_a_stream_ends(kubelet: Kubelet, four: Tree, launch: Launch) -> None:
    """SIGTERM in the moment in which the plugin takes down the server of a lost stream, which may swallow a cancellation.

    A matter of microseconds, hence more than one try."""
    for _ in range(8):
        kubelet.start()
        mark = kubelet.log.mark()
        plugin = launch(four, kubelet)
        kubelet.wait_status(R150, 4, 4, after=mark)
        plugin.wait_for_line(f"registered {R150}")
        lines = plugin.log.mark()
        kubelet.kill()
        plugin.wait_for_line("ended", after=lines)
        code, seconds = plugin.end(signal.SIGTERM, timeout=3)
        assert code == 0, plugin.lines()
        quick(seconds, TERM_S, "SIGTERM to the end")


def test_sigint(kubelet: Kubelet, plugin: Plugin) -> None:
    """Ctrl-C is as good."""
    code, seconds = plugin.end(signal.SIGINT)
    assert code == 0 and not sockets(kubelet)
    quick(seconds, TERM_S, "SIGINT to the end")


@pytest.mark.parametrize("driver", [None, "2.10.0"])
@module_only
def test_node_without_cards(kubelet: Kubelet, room: Path, launch: Launch, driver: str | None) -> None:
    """No card, with or without the driver: it waits quietly (story 10), and a card that comes later is offered (story 9)."""
    tree = Tree(room, driver=driver)
    kubelet.start()
    plugin = launch(tree, kubelet)
    plugin.wait_for_line("")
    kubelet.log.never(fits("register", {}), 1.5, 0)
    assert plugin.process.poll() is None and len(plugin.lines()) <= 5, plugin.lines()
    (tree.sys / "class/tenstorrent").mkdir(parents=True, exist_ok=True)
    with Beating(tree):
        tree.add(N150[0])
        kubelet.wait_status(R150, 1, 1, timeout=REPLUG_S)


@both_generations
@pytest.mark.parametrize("folder", ["missing", "empty"])
def test_kubelet_comes_later(kubelet: Kubelet, four: Tree, launch: Launch, folder: str) -> None:
    """The plugin is there first, even before the kubelet's folder is (story 3): it waits, and says so once."""
    if folder == "empty":
        kubelet.folder.mkdir(parents=True)
    plugin = launch(four, kubelet)
    plugin.wait_for_line(re.escape(str(kubelet.root)))
    kubelet.prepare()
    lines = plugin.log.mark()
    kubelet.start()
    offered = kubelet.wait_status(R150, 4, 4)
    quick(offered - kubelet.answering, AGAIN_S, "kubelet answers for the first time to registered")
    assert lines <= 8, plugin.lines()


@both_generations
@module_only
def test_two_models(kubelet: Kubelet, tree: Tree, beating: Beating, launch: Launch) -> None:
    """Two models are two resources on two sockets; a model comes and goes while the other is left alone."""
    tree.add(N150[0])
    n300 = replace(N300[0], n=5)
    tree.add(n300)
    kubelet.start()
    launch(tree, kubelet)
    kubelet.wait_status(R150, 1, 1)
    kubelet.wait_status(R300, 1, 1)
    assert len(sockets(kubelet)) == 2
    mark = kubelet.log.mark()
    tree.remove(n300.bdf)
    kubelet.wait_status(R300, 1, 0, timeout=UNPLUG_S, after=mark)
    tree.add(n300)
    kubelet.wait_status(R300, 1, 1, timeout=REPLUG_S, after=mark)
    p150 = Chip("0000:81:00.0", 7, "p150b", asic_id="0D0CB6F1E7A5B150", serial="0000041231914096", arch="blackhole")
    tree.add(p150)
    kubelet.wait_status("tenstorrent.com/p150", 1, 1, timeout=REPLUG_S, after=mark)
    assert [event["resource_name"] for event in kubelet.seen("register", after=mark)] == ["tenstorrent.com/p150"]
    assert len(sockets(kubelet)) == 3
    assert not kubelet.seen("devices", after=mark, resource=R150)


@both_generations
@module_only
def test_model_changes(kubelet: Kubelet, four: Tree, plugin: Plugin) -> None:
    """The last card of a model comes back as another model: the old resource ends, and its socket, and no other stream."""
    mark = kubelet.log.mark()
    p150 = Chip("0000:81:00.0", 7, "p150b", asic_id="0D0CB6F1E7A5B150", arch="blackhole")
    four.add(p150)
    kubelet.wait_status("tenstorrent.com/p150", 1, 1, timeout=REPLUG_S, after=mark)
    four.remove(p150.bdf)
    kubelet.wait_status("tenstorrent.com/p150", 1, 0, timeout=UNPLUG_S, after=mark)
    four.add(replace(p150, card_type="p100a"))
    kubelet.wait_status("tenstorrent.com/p100", 1, 1, timeout=REPLUG_S, after=mark)
    kubelet.wait("stream_end", after=mark, resource="tenstorrent.com/p150")
    four.remove(N150[0].bdf)
    kubelet.wait_status(R150, 4, 3, timeout=UNPLUG_S, after=mark)
    assert len(sockets(kubelet)) == 2
    assert {event["resource"] for event in kubelet.seen("stream_end")} == {"tenstorrent.com/p150"}


@module_only
def test_bound_but_not_listening(kubelet: Kubelet, four: Tree, launch: Launch) -> None:
    """kubelet.sock is there before it listens (story 3, contract 1): one refused connection must not be the last."""
    launch(four, kubelet)
    kubelet.start(listen_delay=1)
    offered = kubelet.wait_status(R150, 4, 4)
    quick(offered - kubelet.answering, AGAIN_S, "kubelet listens to registered")


@module_only
def test_late_dial_back(room: Path, four: Tree, launch: Launch) -> None:
    """A busy 1.20 kubelet dials back a second after its answer: the plugin waits for it and does not register twice."""
    with contextlib.closing(Kubelet(room / "k", "1.20")) as kubelet:
        kubelet.start(dial_delay=1)
        launch(four, kubelet)
        kubelet.wait_status(R150, 4, 4)
        assert len(kubelet.seen("register")) == 1


@pytest.mark.parametrize(
    ("faults", "limit"),
    [
        pytest.param({"register_fails": 4}, 2.5, id="register_fails"),
        pytest.param({"register_hangs": 1}, 13.0, id="register_hangs", marks=long_only),
        pytest.param({"no_stream": 1}, 6.0, id="no_stream"),
        pytest.param({"drop_streams": 5}, 1.0, id="drop_streams"),
    ],
)
@module_only
def test_registration_goes_round(kubelet: Kubelet, four: Tree, launch: Launch, faults: dict[str, int], limit: float) -> None:
    """A Register that fails or hangs, that no stream follows, or whose stream ends at once: tried again until it holds."""
    kubelet.start(faults=faults)
    launch(four, kubelet)
    first = kubelet.wait("register")["t"]
    tries = 1 + sum(faults.values())
    kubelet.log.wait_for(lambda _: len(kubelet.seen("register")) == tries, limit + 1, what=f"{tries} times Register")
    last = kubelet.seen("register")[-1]
    kubelet.wait("devices", endpoint=last["endpoint"])
    quick(last["t"] - first, limit, f"{' '.join(faults)}: first to last Register")
    assert sockets(kubelet) == [last["endpoint"]]


@module_only
def test_streams_dropped_for_ever(kubelet: Kubelet, four: Tree, launch: Launch) -> None:
    """A kubelet that ends each stream at once is met soon, but not in a busy loop: 30 ms apart, a second has 33 tries."""
    kubelet.start(faults={"drop_streams": 100_000})
    launch(four, kubelet)
    kubelet.wait("stream_end")
    mark = kubelet.log.mark()
    kubelet.log.never(lambda _: len(kubelet.seen("register", after=mark)) > 50, 1.0, mark)


@module_only
def test_hanging_kubelet_ends(kubelet: Kubelet, four: Tree, launch: Launch) -> None:
    """A Register that hangs ends with its kubelet, and the next kubelet is met at once."""
    kubelet.start(faults={"register_hangs": 1})
    launch(four, kubelet)
    kubelet.wait("register")
    kubelet.kill()
    kubelet.start()
    quick(kubelet.wait_status(R150, 4, 4) - kubelet.answering, AGAIN_S, "the next kubelet answers to registered")


@module_only
def test_streams_share_nothing(kubelet: Kubelet, four: Tree, plugin: Plugin) -> None:
    """Each of several streams is told each change, whatever becomes of the others (story 12); the kubelet's alone counts."""
    mark = kubelet.log.mark()
    with grpc.insecure_channel(f"unix:{kubelet.folder / sockets(kubelet)[0]}") as channel:
        streams = [raw(channel, "/v1beta1.DevicePlugin/ListAndWatch")(b"", timeout=20) for _ in range(6)]
        assert len({next(stream) for stream in streams}) == 1
        for stream in streams[::2]:
            stream.cancel()
        chip = four.remove(N150[0].bdf)
        kubelet.wait_health(R150, chip.id, "Unhealthy", after=mark)
        (news,) = {next(stream) for stream in streams[1::2]}
        devices = MESSAGES["ListAndWatchResponse"].FromString(news).devices
        assert [device.ID for device in devices if device.health != "Healthy"] == [chip.id]
    kubelet.log.never(fits("stream_end", {}), 0.3, mark)


########################################################################################################################
# 6b. Tests of the plugin: health
########################################################################################################################


@both_generations
def test_card_removed_and_back(kubelet: Kubelet, four: Tree, plugin: Plugin) -> None:
    """A reset in a hot-plug slot: Unhealthy, and Healthy again under the same ID with another number (stories 16, 17).

    While it is away, Allocate refuses it (story 18)."""
    mark = kubelet.log.mark()
    gone = time.monotonic()
    chip = four.remove(N150[1].bdf)
    seen = kubelet.wait_health(R150, chip.id, "Unhealthy", after=mark)
    quick(seen - gone, UNPLUG_S, "card removed to Unhealthy")
    kubelet.wait_status(R150, 4, 3, after=mark)
    with refused("FAILED_PRECONDITION", chip.id):
        kubelet.allocate(R150, [chip.id])
    mark = kubelet.log.mark()
    back = time.monotonic()
    four.add(replace(chip, n=9))
    seen = kubelet.wait_health(R150, chip.id, "Healthy", after=mark)
    quick(seen - back, REPLUG_S, "card back to Healthy")
    kubelet.wait_status(R150, 4, 4, after=mark)
    assert [one["container_path"] for one in kubelet.allocate(R150, [chip.id])["devices"]] == ["/dev/tenstorrent/9"]


@module_only
def test_heart_stops_and_beats_again(kubelet: Kubelet, beating: Beating, plugin: Plugin) -> None:
    """Firmware hangs: this card and no other is Unhealthy; it recovers with its heart (stories 5, 6)."""
    mark = kubelet.log.mark()
    chip = N150[2]
    stopped = beating.stop(chip.bdf)
    seen = kubelet.wait_health(R150, chip.id, "Unhealthy", timeout=HANG_S + 2, after=mark)
    quick(seen - stopped, HANG_S, "heart stopped to Unhealthy")
    assert seen - stopped > 9.0, "the firmware's own watchdog has 10 s"
    kubelet.wait_status(R150, 4, 3, after=mark)
    assert len(plugin.lines(chip.id)) >= 1, plugin.lines()
    for call in (kubelet.allocate, kubelet.pre_start):
        with refused("FAILED_PRECONDITION", "heart"):
            call(R150, [chip.id])
    mark = kubelet.log.mark()
    resumed = beating.resume(chip.bdf)
    seen = kubelet.wait_health(R150, chip.id, "Healthy", after=mark)
    quick(seen - resumed, REPLUG_S, "heart beats again to Healthy")


@pytest.mark.parametrize("file", ["tt_heartbeat", "tt_card_type", "device/hwmon/hwmon2/temp1_input"])
@module_only
def test_read_that_hangs(kubelet: Kubelet, four: Tree, launch: Launch, file: str) -> None:
    """A FIFO in the place of one card's file: that card alone is not Healthy, the others are watched on, SIGTERM works.

    No call for a Pod waits for it (story 14)."""
    victim, other = N150[0], N150[1]
    path = four.pci(victim.bdf) / file.removeprefix("device/") if "hwmon" in file else four.entry(victim.bdf) / file
    started = file == "tt_card_type"  # at the start, or later
    if not started:
        kubelet.start()
        plugin = launch(four, kubelet)
        kubelet.wait_status(R150, 4, 4)
    with four.lock:  # the heart of this chip must not wait for a reader
        four.chips[victim.bdf] = replace(victim, heartbeat=False)
        path.unlink()
        os.mkfifo(path)
    if started:
        kubelet.start()
        plugin = launch(four, kubelet)
        kubelet.wait_status(R150, 3, 3, timeout=10)
    else:
        began = time.monotonic()
        assert kubelet.admit("pod", {R150: 1}, {R150: [other.id]}) and kubelet.start_container("pod")
        quick(time.monotonic() - began, 0.05, "a Pod's three calls while a read hangs")
        kubelet.wait_status(R150, 4, 3, timeout=10)
        assert "does not return" in plugin.wait_for_line(f"{victim.id}.*unhealthy").text
    mark = kubelet.log.mark()
    four.remove(other.bdf)
    kubelet.wait_health(R150, other.id, "Unhealthy", after=mark)
    four.add(other)
    kubelet.wait_health(R150, other.id, "Healthy", after=mark)
    if file == "tt_heartbeat":  # the read returns after all
        os.close(os.open(path, os.O_RDWR | os.O_NONBLOCK))
        with open(path, "w") as writer:
            writer.write("77\n")
        four.set(victim.bdf, file, "78\n")
        kubelet.wait_health(R150, victim.id, "Healthy", after=mark, timeout=10)
    code, seconds = plugin.end(signal.SIGTERM)
    assert code == 0
    quick(seconds, TERM_S, "SIGTERM to the end while a read hangs")


@contextlib.contextmanager
def failing(plugin: Plugin, path: Path, error: str) -> Iterator[None]:
    """Each read of this file by the plugin fails with this error of the kernel's."""
    command = ["strace", "-f", "-p", str(plugin.process.pid), "-P", str(path), "-e", f"inject=read:error={error}"]
    if not shutil.which("strace"):
        pytest.skip("only strace makes a file fail with an error that drivers alone give (Debian: strace)")
    strace = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert strace.stderr
    try:
        if "attached" not in (said := strace.stderr.readline()):
            pytest.skip(f"strace may not look into the plugin here: {said}")
        yield
    finally:
        strace.terminate()
        said = strace.communicate()[1]
    assert "INJECTED" in said, said


@pytest.mark.parametrize(
    ("error", "reason"),
    [("ENODATA", "being reset"), ("ENODEV", "gone from sysfs"), ("EIO", ""), ("EACCES", "")],
)
@module_only
def test_heartbeat_fails(kubelet: Kubelet, four: Tree, beating: Beating, plugin: Plugin, error: str, reason: str) -> None:
    """What tt-kmd answers in a reset and after a detach is evidence at once; any other error is not (stories 6, 7)."""
    chip = N150[0]
    beating.stop(chip.bdf)
    mark = kubelet.log.mark()
    with failing(plugin, four.entry(chip.bdf) / "tt_heartbeat", error):
        if reason:
            kubelet.wait_health(R150, chip.id, "Unhealthy", after=mark)
            plugin.wait_for_line(f"{chip.id}.*is Unhealthy.*{reason}")
            kubelet.wait_status(R150, 4, 3, after=mark)
        else:
            kubelet.log.never(lambda event: True, 2.5, mark)
    beating.resume(chip.bdf)
    if reason:
        kubelet.wait_health(R150, chip.id, "Healthy", after=mark)


@module_only
def test_new_firmware_after_a_reset(kubelet: Kubelet, four: Tree, launch: Launch) -> None:
    """The class device stays as it is in a reset in place, and the chip may have been flashed: it is identified anew."""
    kubelet.start()
    plugin = launch(four, kubelet, "--listen=127.0.0.1:0")
    kubelet.wait_status(R150, 4, 4)
    mark = kubelet.log.mark()
    with failing(plugin, four.entry(N150[0].bdf) / "tt_heartbeat", "ENODATA"):
        kubelet.wait_health(R150, N150[0].id, "Unhealthy", after=mark)
        four.set(N150[0].bdf, "tt_fw_bundle_ver", "80.18.0.0\n")
    kubelet.wait_health(R150, N150[0].id, "Healthy", after=mark, timeout=10)
    metrics = page(plugin, "/metrics")[1]
    assert [line.split('firmware="')[1].split('"')[0] for line in metrics.splitlines() if "chip_info{" in line] == [
        "80.18.0.0",
        *["80.17.0.0"] * 3,
    ]


@module_only
def test_device_node_missing(kubelet: Kubelet, four: Tree, plugin: Plugin) -> None:
    """sysfs has the card and /dev does not: Unhealthy until the node is there."""
    mark = kubelet.log.mark()
    four.node(N150[0].bdf).unlink()
    kubelet.wait_health(R150, N150[0].id, "Unhealthy", timeout=UNPLUG_S, after=mark)
    mark = kubelet.log.mark()
    four.node(N150[0].bdf).symlink_to(N150[0].node)
    kubelet.wait_health(R150, N150[0].id, "Healthy", timeout=REPLUG_S, after=mark)


@module_only
def test_device_node_is_another_device(kubelet: Kubelet, four: Tree, plugin: Plugin) -> None:
    """The node's number is not what sysfs says of the chip (always 5): Unhealthy, and never handed out."""
    mark = kubelet.log.mark()
    node = four.node(N150[0].bdf)
    node.unlink()
    node.symlink_to("/dev/zero")
    with refused("FAILED_PRECONDITION"):
        kubelet.allocate(R150, [N150[0].id])
    kubelet.wait_health(R150, N150[0].id, "Unhealthy", timeout=UNPLUG_S, after=mark)


@module_only
def test_old_driver(kubelet: Kubelet, tree: Tree, launch: Launch) -> None:
    """Driver 1.33 knows no asic id and no heartbeat: unknown is not dead (story 7), the ID is the PCI address."""
    tree.add(N150_OLD_DRIVER)
    kubelet.start()
    launch(tree, kubelet)
    kubelet.wait_status(R150, 1, 1)
    assert kubelet.ids(R150) == ["0000:01:00.0"]


@module_only
def test_quietbox(kubelet: Kubelet, tree: Tree, beating: Beating, launch: Launch) -> None:
    """Four n300 are four cards with one PCIe device each, though they have eight chips."""
    for chip in N300:
        tree.add(chip)
    kubelet.start()
    launch(tree, kubelet)
    kubelet.wait_status(R300, 4, 4)
    assert kubelet.ids(R300) == sorted(chip.id for chip in N300)
    answer = kubelet.allocate(R300, [chip.id for chip in N300])
    assert answer["envs"] == {"PCIDEVICE_TENSTORRENT_COM_N300": "0000:01:00.0,0000:02:00.0,0000:41:00.0,0000:c1:00.0"}


@module_only
def test_p300_is_a_pair(kubelet: Kubelet, tree: Tree, beating: Beating, launch: Launch) -> None:
    """Two PCIe devices, one card; it is as healthy as the worse of its chips."""
    for chip in P300:
        tree.add(chip)
    kubelet.start()
    launch(tree, kubelet)
    kubelet.wait_status("tenstorrent.com/p300", 1, 1)
    assert kubelet.ids("tenstorrent.com/p300") == [P300_ID]
    answer = kubelet.allocate("tenstorrent.com/p300", [P300_ID])
    assert [one["container_path"] for one in answer["devices"]] == ["/dev/tenstorrent/0", "/dev/tenstorrent/1"]
    assert answer["envs"] == {"PCIDEVICE_TENSTORRENT_COM_P300": "0000:03:00.0,0000:04:00.0"}
    mark = kubelet.log.mark()
    tree.remove(P300[1].bdf)
    kubelet.wait_status("tenstorrent.com/p300", 1, 0, timeout=UNPLUG_S, after=mark)
    tree.add(P300[1])
    kubelet.wait_status("tenstorrent.com/p300", 1, 1, timeout=REPLUG_S, after=mark)
    assert {name for event in kubelet.seen("devices") for name in event["devices"]} == {P300_ID}, "never half a board"


@pytest.mark.parametrize(
    ("numa", "size", "hints"),
    [
        ((0, 0, 1, 1), 2, [[0], [1], [0, 1]]),
        ((0, 0, 1, 1), 3, [[0, 1]]),
        ((-1, -1, -1, -1), 2, None),  # an ID of -1 would match no mask
        ((0, 0, 0, -1), 4, [[0], [0, 1]]),  # the unknown one has every node, or
        ((0, 0, 0, -1), 4, None),  # none has a topology; but never a mixture
    ],
)
@module_only
def test_numa(
    kubelet: Kubelet, tree: Tree, launch: Launch, numa: tuple[int, ...], size: int, hints: list[list[int]] | None
) -> None:
    """The topology manager finds its hints (story 19), also where the host does not know a card's node."""
    for chip, node in zip(N150, numa, strict=True):
        tree.add(replace(chip, numa=node))
    kubelet.start()
    launch(tree, kubelet)
    kubelet.wait_status(R150, 4, 4)
    found = kubelet.hints(R150, size)
    either = [[[0], [0, 1]], None] if numa == (0, 0, 0, -1) else [hints]
    assert found in either


########################################################################################################################
# 6c. Tests of the plugin: calls for a Pod
########################################################################################################################


@both_generations
def test_allocate(kubelet: Kubelet, plugin: Plugin) -> None:
    """What a Pod gets for two cards, in whatever order their ids come; asked twice, it gets the same."""
    for _ in range(5):
        answer = kubelet.allocate(R150, [N150[3].id, N150[0].id])
        paths = ["/dev/tenstorrent/0", "/dev/tenstorrent/3"]
        assert answer["devices"] == [{"container_path": path, "host_path": path, "permissions": "rw"} for path in paths]
        assert answer["envs"] == {"PCIDEVICE_TENSTORRENT_COM_N150": "0000:01:00.0,0000:c1:00.0"}
        assert answer["mounts"] == [] and answer["cdi_devices"] == []


def test_allocate_prefers_by_id_links(kubelet: Kubelet, tree: Tree, beating: Beating, launch: Launch) -> None:
    """A by-id link that leads to the device is the host path; one that leads elsewhere is not."""
    right, wrong = (replace(chip, by_id=True, node=NODES[chip.n]) for chip in N150[:2])
    tree.add(right)
    tree.add(wrong)
    link = tree.dev / "tenstorrent/by-id" / wrong.id
    link.unlink()
    link.symlink_to("../0")
    kubelet.start()
    launch(tree, kubelet)
    kubelet.wait_status(R150, 2, 2)
    answers = [kubelet.allocate(R150, [chip.id])["devices"] for chip in (right, wrong)]
    assert [[(one["container_path"], one["host_path"]) for one in answer] for answer in answers] == [
        [("/dev/tenstorrent/0", f"/dev/tenstorrent/by-id/{right.id}")],
        [("/dev/tenstorrent/1", "/dev/tenstorrent/1")],
    ]


BAD_REQUESTS = [
    ("Allocate", {"container_requests": [{"devices_ids": ["wormhole-FFFF"]}]}, "NOT_FOUND", "wormhole-FFFF"),
    ("Allocate", {"container_requests": [{"devices_ids": [N150[0].id, "x"]}]}, "NOT_FOUND", "x"),
    ("Allocate", {"container_requests": [{"devices_ids": []}]}, "INVALID_ARGUMENT", "id"),
    ("Allocate", {"container_requests": []}, "INVALID_ARGUMENT", "request"),
    ("Allocate", {"container_requests": [{"devices_ids": [N150[0].id] * 2}]}, "INVALID_ARGUMENT", N150[0].id),
    ("Allocate", {"container_requests": [{"devices_ids": [N150[0].id]}] * 2}, "INVALID_ARGUMENT", N150[0].id),
    ("PreStartContainer", {"devices_ids": ["wormhole-FFFF"]}, "NOT_FOUND", "wormhole-FFFF"),
    ("PreStartContainer", {"devices_ids": []}, "INVALID_ARGUMENT", "id"),
]


@pytest.mark.parametrize(("method", "request_", "code", "word"), BAD_REQUESTS)
@module_only
def test_bad_requests(kubelet: Kubelet, plugin: Plugin, method: str, request_: dict[str, Any], code: str, word: str) -> None:
    """A refusal is a status with a sentence (story 18), and the next good request is served (always 11)."""
    with refused(code, word, " "):
        kubelet.rpc(R150, method, request_)
    assert kubelet.allocate(R150, [N150[0].id])["devices"]


@module_only
def test_allocate_several_containers(kubelet: Kubelet, plugin: Plugin) -> None:
    """The API allows several containers in one request: an answer for each, in their order."""
    request = {"container_requests": [{"devices_ids": [N150[2].id]}, {"devices_ids": [N150[1].id, N150[0].id]}]}
    answers = kubelet.rpc(R150, "Allocate", request)["container_responses"]
    assert [len(answer["devices"]) for answer in answers] == [1, 2]
    assert answers[0]["devices"][0]["container_path"] == "/dev/tenstorrent/2"


@module_only
def test_preferred_allocation(kubelet: Kubelet, plugin: Plugin) -> None:
    """As many as asked for, of those available, with those that must be; all of one NUMA node where that is possible."""
    ids = [chip.id for chip in N150]
    for size in (1, 2, 3, 4):
        chosen = kubelet.preferred(R150, random.sample(ids, 4), size)
        assert len(chosen) == len(set(chosen)) == size and set(chosen) <= set(ids)
    assert set(kubelet.preferred(R150, ids, 2, [ids[2]])) == {ids[2], ids[3]}
    assert set(kubelet.preferred(R150, [ids[0], ids[2], ids[3]], 2)) == {ids[2], ids[3]}


@both_generations
def test_pod(kubelet: Kubelet, four: Tree, launch: Launch, plugin: Plugin) -> None:
    """A Pod's life: admitted once, started often, over restarts of kubelet and plugin, with the first answer all the time."""
    first = kubelet.admit("pod", {R150: 2})
    assert kubelet.start_container("pod")["envs"] == first["envs"]
    plugin.wait_for_line(f"allocated .*{first['ids'][R150][0]}")
    mark = kubelet.log.mark()
    plugin.end(signal.SIGKILL)
    kubelet.wait_status(R150, 4, 0, after=mark)
    launch(four, kubelet)
    kubelet.wait_status(R150, 4, 4, after=mark)
    kubelet.start_container("pod")
    kubelet.kill()
    mark = kubelet.log.mark()
    kubelet.start()
    kubelet.wait_status(R150, 4, 4, after=mark)
    assert kubelet.admit("pod", {R150: 2}) == first
    kubelet.start_container("pod")
    assert len(kubelet.seen("allocated")) == 1
    rest = kubelet.admit("second", {R150: 2})
    assert sorted(first["ids"][R150] + rest["ids"][R150]) == sorted(chip.id for chip in N150)


def test_pod_with_two_resources(kubelet: Kubelet, tree: Tree, beating: Beating, launch: Launch) -> None:
    """Nothing in the answers of two resources has the same name with another value (contract 14)."""
    tree.add(N150[0])
    tree.add(replace(N300[3], n=4, bdf="0000:42:00.0"))
    kubelet.start()
    launch(tree, kubelet)
    kubelet.wait_status(R150, 1, 1)
    kubelet.wait_status(R300, 1, 1)
    answer = kubelet.admit("pod", {R150: 1, R300: 1})
    assert not kubelet.seen("conflict")
    assert [one["container_path"] for one in answer["devices"]] == ["/dev/tenstorrent/0", "/dev/tenstorrent/4"]
    assert sorted(answer["envs"]) == ["PCIDEVICE_TENSTORRENT_COM_N150", "PCIDEVICE_TENSTORRENT_COM_N300"]


def numbered(chips: tuple[Chip, ...], by_id: bool = False) -> list[Chip]:
    """Chips whose device nodes can be told apart. As on a real host the device's number follows N, not the chip."""
    return [replace(chip, node=NODES[chip.n], by_id=by_id) for chip in chips]


@pytest.mark.parametrize("by_id", [False, True])
@module_only
def test_renumbered_before_allocate(kubelet: Kubelet, tree: Tree, beating: Beating, launch: Launch, by_id: bool) -> None:
    """Two cards swap their numbers between a poll and an Allocate (story 16): the right card, or a refusal, never the other."""
    for chip in numbered(N150[:2], by_id):
        tree.add(chip)
    kubelet.start()
    launch(tree, kubelet, "--poll-seconds", "5")  # the plugin cannot have seen it yet
    kubelet.wait_status(R150, 2, 2)
    first, second = N150[0], N150[1]
    tree.renumber({first.bdf: 1, second.bdf: 0}, {first.bdf: NODES[1], second.bdf: NODES[0]})
    with refused("FAILED_PRECONDITION", first.id):
        kubelet.pre_start(R150, [first.id])
    try:
        (device,) = kubelet.allocate(R150, [first.id])["devices"]
    except Refusal as error:
        assert error.code == "FAILED_PRECONDITION"
    else:
        assert os.path.realpath(tree.dev / device["host_path"].removeprefix("/dev/")) == NODES[1]


@module_only
def test_stale_by_id_link(kubelet: Kubelet, tree: Tree, beating: Beating, launch: Launch) -> None:
    """udev lags behind a renumbering: the stored link leads to another card, so the container does not start with it."""
    first, second = numbered(N150[:2], by_id=True)
    tree.add(first)
    tree.add(second)
    kubelet.start()
    launch(tree, kubelet)
    kubelet.wait_status(R150, 2, 2)
    kubelet.admit("pod", {R150: 1}, {R150: [first.id]})
    link = tree.dev / "tenstorrent/by-id" / first.id
    link.unlink()
    link.symlink_to(f"../{second.n}")
    with refused("FAILED_PRECONDITION", f"by-id/{first.id} when this Pod was admitted"):
        kubelet.start_container("pod")
    link.unlink()
    link.symlink_to(f"../{first.n}")
    kubelet.start_container("pod")


@pytest.mark.parametrize("by_id", [False, True])
@module_only
def test_renumbered_before_restart(kubelet: Kubelet, tree: Tree, beating: Beating, launch: Launch, by_id: bool) -> None:
    """Cards swap their numbers while a Pod holds one; its container restarts with the old answer (contract 13, 15, 16).

    A by-id path leads to the right card again; a bare number would be another Pod's card, so the start is refused."""
    first, second = numbered(N150[:2], by_id)
    tree.add(first)
    tree.add(second)
    kubelet.start()
    launch(tree, kubelet)
    kubelet.wait_status(R150, 2, 2)
    kubelet.admit("pod", {R150: 1}, {R150: [first.id]})
    assert kubelet.start_container("pod")["devices"][0]["resolved"] == first.node
    mark = kubelet.log.mark()
    tree.remove(first.bdf)
    tree.remove(second.bdf)
    kubelet.wait_status(R150, 2, 0, after=mark)
    with refused("FAILED_PRECONDITION", first.id):
        kubelet.start_container("pod")
    tree.add(replace(first, n=1, node=NODES[1]))
    tree.add(replace(second, n=0, node=NODES[0]))
    kubelet.wait_status(R150, 2, 2, after=mark)
    if by_id:
        assert kubelet.start_container("pod")["devices"][0]["resolved"] == NODES[1]
    else:
        with refused("FAILED_PRECONDITION", first.id):
            kubelet.start_container("pod")


########################################################################################################################
# 6d. Tests of the plugin: command line
########################################################################################################################

LIST_KEYS = [
    "id",
    "resource",
    "model",
    "arch",
    "device_nodes",
    "pci_addresses",
    "numa_node",
    "board_serial",
    "firmware",
    "health",
    "reason",
]


def test_list_json(command: list[str], tree: Tree) -> None:
    """One object per card, with the keys of the design; a card that is not offered has no resource, and a reason."""
    tree.add(N150[0])
    for chip in P300:
        tree.add(replace(chip, n=chip.n + 4))
    tree.add(replace(N150[1], card_type=None, asic_id=None, serial=None, firmware=None, heartbeat=False, hwmon=False))
    done = run(command, *tree.flags, "--list", "--json")
    assert done.returncode == 0, done.stderr
    cards = {card["id"]: card for card in json.loads(done.stdout)}
    assert [list(card) for card in cards.values()] == [LIST_KEYS] * 3
    first = cards[N150[0].id]
    assert first["health"] == "Healthy" and {**first, "reason": ""} == {
        "id": N150[0].id,
        "resource": R150,
        "model": "n150",
        "arch": "wormhole",
        "device_nodes": ["/dev/tenstorrent/0"],
        "pci_addresses": ["0000:01:00.0"],
        "numa_node": 0,
        "board_serial": "0100018611902010",
        "firmware": "80.17.0.0",
        "health": "Healthy",
        "reason": "",
    }
    assert cards[P300_ID]["device_nodes"] == ["/dev/tenstorrent/4", "/dev/tenstorrent/5"]
    (other,) = (card for name, card in cards.items() if name not in (N150[0].id, P300_ID))
    assert other["resource"] is None and other["reason"] and other["pci_addresses"] == ["0000:02:00.0"]


def test_list(command: list[str], four: Tree) -> None:
    """A table of aligned columns that fits 120, with a line for each card."""
    for chip in P300:
        four.add(replace(chip, n=chip.n + 4))
    done = run(command, *four.flags, "--list")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert max(len(line) for line in lines) <= 120, done.stdout
    for name in [*(chip.id for chip in N150), P300_ID]:
        assert sum(name in line for line in lines) == 1, done.stdout
    starts = {line.index(R150) for line in lines if R150 in line}
    assert len(starts) == 1, f"not aligned:\n{done.stdout}"


@pytest.mark.parametrize("flags", [["--list"], ["--list", "--json"]])
def test_list_without_cards(command: list[str], tree: Tree, flags: list[str]) -> None:
    """No card is an answer, not an error."""
    done = run(command, *tree.flags, *flags)
    assert done.returncode == 0, done.stderr
    if "--json" in flags:
        assert json.loads(done.stdout) == []


def steps(text: str) -> list[str]:
    """The numbers of the numbered steps, in the order in which each appears first (most come once a resource or card)."""
    return list(dict.fromkeys(re.findall(r"^ *([1-9])[.):]", text, re.MULTILINE)))


def test_dry_run(command: list[str], four: Tree, kubelet: Kubelet) -> None:
    """The five steps of README's diagram on this node's cards; the real kubelet does not notice."""
    kubelet.start()
    mark = kubelet.log.mark()
    done = run(command, *four.flags, "--dry-run", "--kubelet-dir", str(kubelet.root))
    assert done.returncode == 0, done.stdout + done.stderr
    assert steps(done.stdout) == ["1", "2", "3", "4", "5"], done.stdout
    for word in (R150, "/dev/tenstorrent/3", "PCIDEVICE_TENSTORRENT_COM_N150", *(chip.id for chip in N150)):
        assert word in done.stdout, done.stdout
    assert kubelet.log.mark() == mark and not sockets(kubelet)


@pytest.mark.parametrize("why", ["no cards", "no healthy card"])
def test_dry_run_fails(command: list[str], tree: Tree, why: str) -> None:
    """Exit code 1, and the failing step has a name."""
    if why == "no healthy card":
        tree.add(N150[0])
        tree.node(N150[0].bdf).unlink()
    done = run(command, *tree.flags, "--dry-run")
    assert done.returncode == 1, done.stdout + done.stderr
    assert re.search(r"\bstep [1-5]\b", done.stdout + done.stderr, re.IGNORECASE), done.stdout + done.stderr


def test_fake_dry_run(command: list[str]) -> None:
    """The first command of README: no card, no cluster, exit code 0."""
    done = run(command, "--fake", "n150=2,p300=1", "--dry-run")
    assert done.returncode == 0, done.stdout + done.stderr
    assert steps(done.stdout) == ["1", "2", "3", "4", "5"], done.stdout
    assert "tenstorrent.com/n150" in done.stdout and "tenstorrent.com/p300" in done.stdout


@pytest.mark.parametrize("ending", [signal.SIGTERM, signal.SIGINT])
def test_fake_cards(kubelet: Kubelet, launch: Launch, ending: signal.Signals) -> None:
    """Made-up cards go the way of real ones: taken out of the tree by hand they are Unhealthy; the tree goes at exit."""
    kubelet.start()
    plugin = launch(None, kubelet, "--fake", "n150=2,p300=1")
    kubelet.wait_status(R150, 2, 2)
    kubelet.wait_status("tenstorrent.com/p300", 1, 1)
    answer = kubelet.allocate("tenstorrent.com/p300", kubelet.ids("tenstorrent.com/p300"))
    assert len(answer["devices"]) == 2
    line = plugin.wait_for_line(r"/\S+")
    paths = [Path(path.rstrip(".,;:'\")")) for text in plugin.lines() for path in re.findall(r"(?<![\w.])/[^\s'\"]+", text)]
    root = min(path for path in paths if any(path.glob("*/class/tenstorrent/tenstorrent!*")))
    assert line.t < kubelet.wait_status(R150, 2, 2), "the path is said at start"
    mark = kubelet.log.mark()
    (card,) = [path for path in root.rglob("class/tenstorrent/tenstorrent!0")]
    card.unlink() if card.is_symlink() else shutil.rmtree(card)
    kubelet.log.wait_for(lambda event: event["event"] == "status" and event["allocatable"] < event["capacity"], UNPLUG_S, mark)
    code, seconds = plugin.end(ending)
    assert code == 0 and not root.exists() and not sockets(kubelet)
    quick(seconds, TERM_S, f"{ending.name} to the end")


BAD_FLAGS = [
    (["--poll-seconds", "0"], "--poll-seconds"),
    (["--poll-seconds", "often"], "--poll-seconds"),
    (["--poll-seconds", "-1"], "--poll-seconds"),
    (["--poll-seconds", "nan"], "--poll-seconds"),
    (["--hugepages", "maybe"], "--hugepages"),
    (["--fake", "n150"], "--fake"),
    (["--fake", "n150=x"], "--fake"),
    (["--fake", "n150=-1"], "--fake"),
    (["--fake", "n151=1"], "--fake"),
    (["--fake", ""], "--fake"),
    (["--resource-domain", "tenstorrent.com/x"], "--resource-domain"),
    (["--resource-domain", "Tenstorrent_"], "--resource-domain"),
    (["--resource-domain", "kubernetes.io"], "--resource-domain"),
    (["--log-level", "loud"], "--log-level"),
    (["--listen", "7762"], "--listen"),
    (["--listen", "localhost:7762"], "--listen"),
    (["--listen", "127.0.0.1"], "--listen"),
    (["--listen", "127.0.0.1:70000"], "--listen"),
    (["--listen", "::1:80"], "--listen"),
    (["--listen", "user@127.0.0.1:80/x"], "--listen"),
    (["--cdi-dir", "relative"], "--cdi-dir"),
    (["--labels-dir", ""], "--labels-dir"),
    (["--json"], "--json"),
    (["--nonsense"], "--nonsense"),
    (["surplus"], "surplus"),
]


@pytest.mark.parametrize(("flags", "word"), BAD_FLAGS, ids=[" ".join(flags) for flags, _ in BAD_FLAGS])
@module_only
def test_bad_flags(command: list[str], flags: list[str], word: str) -> None:
    """Exit code 2, and a sentence with the flag in it."""
    done = run(command, *flags, timeout=10)
    assert done.returncode == 2, done
    assert word in done.stderr.splitlines()[-1], done.stderr


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("TT_DEVICE_PLUGIN_POLL_SECONDS", "often"),
        ("TT_DEVICE_PLUGIN_FAKE", "n150"),
        ("TT_DEVICE_PLUGIN_HUGEPAGES", "maybe"),
        ("TT_DEVICE_PLUGIN_LOG_LEVEL", "loud"),
        ("TT_DEVICE_PLUGIN_VARIANTS", "perhaps"),
    ],
)
@module_only
def test_bad_environment(command: list[str], name: str, value: str) -> None:
    """Exit code 2, and a sentence with the variable in it: nobody gave that flag."""
    done = run(command, timeout=10, **{name: value})
    assert done.returncode == 2, done
    assert name in done.stderr.splitlines()[-1], done.stderr


@module_only
def test_environment(command: list[str], four: Tree, kubelet: Kubelet) -> None:
    """Every flag has a variable; a flag wins over it."""
    names: dict[str, Any] = {"TT_DEVICE_PLUGIN_SYSFS_ROOT": str(four.sys), "TT_DEVICE_PLUGIN_DEV_ROOT": str(four.dev)}
    names |= {"TT_DEVICE_PLUGIN_LIST": "true", "TT_DEVICE_PLUGIN_JSON": "1", "TT_DEVICE_PLUGIN_RESOURCE_DOMAIN": "example.com"}
    cards = json.loads(run(command, **names).stdout)
    assert [card["resource"] for card in cards] == ["example.com/n150"] * 4
    cards = json.loads(run(command, "--resource-domain", "example.org", **names).stdout)
    assert [card["resource"] for card in cards] == ["example.org/n150"] * 4


def test_version_and_help(command: list[str]) -> None:
    """--version says it in one line; --help names every flag of the design that this plugin has."""
    done = run(command, "--version")
    assert done.returncode == 0 and re.search(r"\d+\.\d+", done.stdout) and len(done.stdout.splitlines()) == 1
    done = run(command, "--help")
    assert done.returncode == 0
    flags = "list json dry-run fake kubelet-dir sysfs-root dev-root poll-seconds resource-domain variants hugepages version "
    flags += "cdi-dir labels-dir listen log-format log-level"
    assert [flag for flag in flags.split() if f"--{flag}" not in done.stdout] == []


@pytest.mark.parametrize(("variants", "model"), [([], "p150"), (["--variants"], "p150b")])
@module_only
def test_variants(command: list[str], tree: Tree, variants: list[str], model: str) -> None:
    """The variant letter is dropped, unless it is asked for."""
    tree.add(Chip("0000:a1:00.0", 0, "p150b", asic_id="CEF5729692C19E6D", serial="0000041231914096", arch="blackhole"))
    (card,) = json.loads(run(command, *tree.flags, "--list", "--json", *variants).stdout)
    assert (card["model"], card["resource"], card["id"]) == (model, f"tenstorrent.com/{model}", "blackhole-CEF5729692C19E6D")


NOBODY = 65534


def test_no_permission(command: list[str], four: Tree, kubelet: Kubelet, launch: Launch) -> None:
    """Exit code 1; the message names the folder, the uid and the remedy (story 21)."""
    kubelet.folder.mkdir(mode=0o750, parents=True)
    popen: dict[str, Any] = {}
    if os.getuid() == 0:
        popen = {"user": NOBODY, "group": NOBODY, "extra_groups": []}
        try:
            subprocess.run([sys.executable, "-c", f"open({command[-1]!r})"], check=True, **popen)
        except (PermissionError, subprocess.CalledProcessError):
            pytest.skip(f"uid {NOBODY} may not read {sys.executable} or {command[-1]}")
    else:
        kubelet.folder.chmod(0)
    plugin = launch(four, kubelet, **popen)
    plugin.reader.join(10)
    assert plugin.process.returncode == 1, plugin.lines()
    uid = str(NOBODY if os.getuid() == 0 else os.getuid())
    text = " ".join(plugin.lines())
    assert str(kubelet.folder) in text and uid in text and re.search(r"root|uid 0|run ", text), text


########################################################################################################################
# 6e. Tests of the plugin: faults and load
########################################################################################################################


class Vitals(NamedTuple):
    """What a process holds."""

    private_kib: int
    threads: int
    descriptors: int


def vitals(plugin: Plugin) -> Vitals:
    """Private memory, threads and descriptors of a running plugin."""
    return held_by(plugin.process.pid)


def held_by(pid: int) -> Vitals:
    """The same of any running process."""
    proc = Path("/proc") / str(pid)
    private = re.findall(r"^Private_\w+: +(\d+) kB", (proc / "smaps_rollup").read_text(), re.M)
    threads = len(list((proc / "task").iterdir()))
    return Vitals(sum(map(int, private)), threads, len(list((proc / "fd").iterdir())))


@contextlib.contextmanager
def busy_machine() -> Iterator[None]:
    """Every core is kept busy by another process."""
    command = [sys.executable, "-c", "while True: pass"]
    with contextlib.ExitStack() as stack:
        for _ in range(os.cpu_count() or 1):
            spinner = subprocess.Popen(command)
            stack.callback(spinner.wait)
            stack.callback(spinner.kill)
        yield


@pytest.mark.parametrize("how", ["stop", "kill"])
@module_only
def test_restarts_under_load(kubelet: Kubelet, plugin: Plugin, how: str) -> None:
    """Stories 2 and 3: with all cores busy, each new kubelet has the cards within a second of answering."""
    with busy_machine():
        for _ in range(100 if LONG else 5):
            mark = kubelet.log.mark()
            kubelet.stop() if how == "stop" else kubelet.kill()
            kubelet.start()
            offered = kubelet.wait_status(R150, 4, 4, after=mark)
            quick(offered - kubelet.answering, 1.0, f"busy machine: kubelet after a {how} answers to registered")


@module_only
def test_dropped_streams_leave_nothing(kubelet: Kubelet, plugin: Plugin) -> None:
    """Stories 12, 13, 22: many dropped streams cost no memory, thread or descriptor, and the machine no busy loop."""
    seen: list[Vitals] = []
    for number in range(1001 if LONG else 151):
        if number in ((100, 1000) if LONG else (50, 150)):
            seen.append(vitals(plugin))
        mark = kubelet.log.mark()
        kubelet.drop_stream(R150)
        kubelet.wait_status(R150, 4, 0, after=mark)
        kubelet.wait_status(R150, 4, 4, after=mark)
    before, after = seen
    assert after.private_kib - before.private_kib <= 1024, seen
    assert after[1:] == before[1:], seen
    assert len(sockets(kubelet)) == 1


@both_generations
@module_only
def test_paused_kubelet(kubelet: Kubelet, four: Tree, plugin: Plugin) -> None:
    """A kubelet that is stopped for a while keeps its stream (contract 7): nothing happens, and what changed comes after."""
    mark = kubelet.log.mark()
    kubelet.pause()
    four.remove(N150[0].bdf)
    kubelet.log.never(lambda event: True, 30.0 if LONG else 3.0, mark)
    kubelet.resume()
    kubelet.wait_health(R150, N150[0].id, "Unhealthy", after=mark)
    assert not kubelet.seen("register", after=mark)


@module_only
def test_paused_plugin(kubelet: Kubelet, plugin: Plugin) -> None:
    """A plugin that is stopped for longer than a heartbeat may stand still judges nobody by its own absence."""
    mark = kubelet.log.mark()
    plugin.send(signal.SIGSTOP)
    kubelet.log.never(lambda event: True, 30.0 if LONG else 13.0, mark)
    plugin.send(signal.SIGCONT)
    kubelet.log.never(lambda event: True, 3.0, mark)
    assert not plugin.lines("unhealthy")
    assert kubelet.admit("pod", {R150: 1})["ids"]


@module_only
def test_folder_made_anew(kubelet: Kubelet, four: Tree, plugin: Plugin, launch: Launch) -> None:
    """The device-plugins folder is deleted and made anew by the next kubelet: the lock, the socket and the cards follow."""
    heir = launch(four, kubelet)
    heir.wait_for_line(STANDING_BY)
    for _ in range(3):
        mark = kubelet.log.mark()
        kubelet.kill()
        kubelet.delete_folder()
        kubelet.start()
        kubelet.wait_status(R150, 4, 4, after=mark)
        kubelet.log.never(lambda event: True, 0.5, kubelet.log.mark())
        assert len(sockets(kubelet)) == 1
    assert plugin.process.poll() is None and heir.process.poll() is None


@module_only
def test_folder_made_anew_under_a_waiting_holder(kubelet: Kubelet, four: Tree, plugin: Plugin, launch: Launch) -> None:
    """The holder waits for a kubelet in a folder that goes: who has the new folder's lock, and nobody else, registers."""
    launch(four, kubelet).wait_for_line(STANDING_BY)
    kubelet.kill()
    plugin.wait_for_line("no kubelet listens")
    kubelet.delete_folder()
    mark = kubelet.log.mark()
    kubelet.start()
    kubelet.wait_status(R150, 4, 4, after=mark)
    kubelet.log.never(fits("register", {}), 0.5, kubelet.log.mark())
    assert len(kubelet.seen("register", after=mark)) == 1


@module_only
def test_folder_deleted_on_the_host(room: Path, four: Tree, kubelet: Kubelet, launch: Launch) -> None:
    """In a container, whose mount goes on showing the deleted folder: exit code 1, so that a new container sees the new one."""
    (room / "host").mkdir()
    kubelet.root.mkdir()
    fd = os.open(room / "host", os.O_RDONLY)
    try:
        kubelet.folder.symlink_to(f"/proc/{os.getpid()}/fd/{fd}")  # like a mount, it leads to the folder, not to its name
        plugin = launch(four, kubelet)
        plugin.wait_for_line("no kubelet listens")
        (room / "host").rmdir()
        plugin.reader.join(5)
        assert plugin.process.returncode == 1
        assert "was deleted on the host" in plugin.lines()[-1]
    finally:
        os.close(fd)


@pytest.mark.parametrize(
    "order", ["the old one ends", "the old one drops its stream", "the new one is late", "the new one ends"]
)
@module_only
def test_two_kubelets(kubelet: Kubelet, plugin: Plugin, order: str) -> None:
    """A new kubelet starts in the folder of one that lives: cards and Pods are the old one's while it keeps its stream, and
    then at once the new one's, though its start has removed the plugin's socket."""
    held = kubelet.admit("pod", {R150: 2})["ids"]
    free = next(chip.id for chip in N150 if chip.id not in held[R150])
    with contextlib.closing(Kubelet(kubelet.root, "1.36", kubelet.dev_root)) as new:
        mark = kubelet.log.mark()
        late: dict[str, Any] = {"wait": "bound", "listen_delay": 1}
        new.start(**(late if order == "the new one is late" else {}))
        assert not sockets(kubelet)
        new.log.never(fits("register", {}), 0.3, 0)
        assert kubelet.allocate(R150, [free])["devices"]
        if order == "the new one ends":
            new.kill()
            assert kubelet.allocate(R150, [free])["devices"]
        assert not kubelet.seen("stream_end", after=mark)
        if order == "the old one drops its stream":
            kubelet.drop_stream(R150)
        else:
            kubelet.kill()
        ended = time.monotonic()
        if order == "the new one ends":
            new.start()
        offered, answers = new.wait_status(R150, 4, 4), new.seen("listening")[-1]["t"]
        quick(max(0.0, offered - max(ended, answers)), AGAIN_S, "the older of two kubelets ends to registered with the newer")
        assert new.admit("pod", {R150: 2})["ids"] == held
        new.start_container("pod")
        mark = new.log.mark()
        kubelet.close()
        new.log.never(lambda event: True, 0.3, mark)
        assert sockets(new) == [event["endpoint"] for event in new.seen("register")]


def lives(number: int) -> list[str]:
    """Every order in which so many instances can start and end, without regard to their names: + the next one, 0 1 2 it."""

    def go(word: str, started: int, there: str) -> Iterator[str]:
        if started == number and not there:
            yield word
        if started < number:
            yield from go(f"{word}+", started + 1, f"{there}{started}")
        for one in there:
            yield from go(word + one, started, there.replace(one, ""))

    return list(go("", 0, ""))


@pytest.mark.parametrize("word", lives(2) + lives(3))
@module_only
def test_instances(kubelet: Kubelet, four: Tree, launch: Launch, word: str) -> None:
    """Two and three instances (story 4) that start and end in each order, all but the second by SIGKILL: one serves as long
    as one is there, and only the end of that one reaches the kubelet. A lock or socket of the dead stops nobody."""
    kubelet.start()
    started: list[Plugin] = []
    there: set[int] = set()
    for step in word:
        mark, held = kubelet.log.mark(), holder(kubelet)
        if step == "+":
            started.append(launch(four, kubelet))
            there.add(started[-1].process.pid)
            if held:
                started[-1].wait_for_line(STANDING_BY)
        else:
            one = started[int(step)]
            one.end(signal.SIGTERM if step == "1" else signal.SIGKILL)
            there.remove(one.process.pid)
            if one.process.pid == held:
                kubelet.wait_status(R150, 4, 0, after=mark)
        if held in there:
            kubelet.log.never(lambda event: True, 0.1, mark)
            assert holder(kubelet) == held
        elif there:
            kubelet.wait_status(R150, 4, 4, after=mark)
            assert holder(kubelet) in there
            assert sockets(kubelet) == [event["endpoint"] for event in kubelet.seen("register", after=mark)]


def holder(kubelet: Kubelet) -> int:
    """The process that holds the lock on the kubelet's folder, as the kernel says; 0 if none does."""
    locks = re.findall(r"FLOCK +ADVISORY +WRITE (\d+) \S+:(\d+) ", Path("/proc/locks").read_text())
    return next((int(pid) for pid, inode in locks if int(inode) == kubelet.folder.stat().st_ino), 0)


@module_only
def test_stale_sockets(kubelet: Kubelet, four: Tree, plugin: Plugin, launch: Launch) -> None:
    """Story 20: what a killed instance has left goes away; other plugins' sockets, and what is no socket, do not."""
    mark = kubelet.log.mark()
    plugin.end(signal.SIGKILL)
    kubelet.wait_status(R150, 4, 0, after=mark)
    (stale,) = sockets(kubelet)
    for name in ("nvidia-gpu.sock", "tenstorrent-n150-zzzzzz.sock"):  # nobody listens on them either
        with socket.socket(socket.AF_UNIX) as other:
            other.bind(str(kubelet.folder / name))
    (kubelet.folder / "tenstorrent-n150-abcdef.sock").write_text("no socket")
    with socket.socket(socket.AF_UNIX) as alive:
        alive.bind(str(kubelet.folder / "tenstorrent-n150-012345.sock"))
        alive.listen()
        launch(four, kubelet)
        kubelet.wait_status(R150, 4, 4, after=mark)
    assert stale not in sockets(kubelet) and len(sockets(kubelet)) == 4
    assert (kubelet.folder / "tenstorrent-n150-abcdef.sock").read_text() == "no socket"


@pytest.mark.parametrize("code", ["INVALID_ARGUMENT", "UNKNOWN", "UNIMPLEMENTED"])
@module_only
def test_kubelet_refuses_for_ever(kubelet: Kubelet, four: Tree, launch: Launch, code: str) -> None:
    """A kubelet that rejects each Register: few tries, each said with the kubelet's words; the next kubelet is met at once."""
    kubelet.start()
    kubelet.faults(code, register_fails=1000)
    plugin = launch(four, kubelet)
    kubelet.log.wait_for(lambda _: len(kubelet.seen("register")) == 4, 5, what="four tries")
    before = len(kubelet.seen("register"))
    mark = kubelet.log.mark()
    kubelet.log.never(lambda event: len(kubelet.seen("register")) > before + 2, 3.0, mark)
    assert plugin.lines(f"{R150}.*{code}")
    kubelet.kill()
    kubelet.start()
    quick(kubelet.wait_status(R150, 4, 4, after=mark) - kubelet.answering, AGAIN_S, "a better kubelet answers to registered")
    lines, mark = plugin.log.mark(), kubelet.log.mark()
    kubelet.faults(code, register_fails=1)
    kubelet.drop_stream(R150)
    plugin.wait_for_line(f"{R150}.*{code}", after=lines)  # a new trouble, though its words are those of the last one
    kubelet.wait_status(R150, 4, 4, after=mark)


@module_only
def test_no_descriptors(kubelet: Kubelet, four: Tree, plugin: Plugin) -> None:
    """EMFILE: no card is judged by it, and when there are descriptors again, all goes on."""
    mark = kubelet.log.mark()
    limits = prlimit(plugin.process.pid, RLIMIT_NOFILE)
    prlimit(plugin.process.pid, RLIMIT_NOFILE, (3, limits[1]))
    plugin.wait_for_line("too many open files")
    kubelet.log.never(lambda event: True, 2.0, mark)
    prlimit(plugin.process.pid, RLIMIT_NOFILE, limits)
    plugin.wait_for_line("can be looked for again")
    four.remove(N150[0].bdf)
    kubelet.wait_health(R150, N150[0].id, "Unhealthy", after=mark)


@pytest.mark.parametrize("option", ["size=64k", "nr_inodes=50"])
@module_only
def test_full_disk(kubelet: Kubelet, four: Tree, launch: Launch, option: str) -> None:
    """A kubelet folder without space or inodes: said, waited for, and served when there is room."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root")
    kubelet.root.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", option, "none", str(kubelet.root)], capture_output=True).returncode:
        pytest.skip("this machine does not let root mount a tmpfs")
    try:
        kubelet.start()
        fillers = [kubelet.root / f"filler {number}" for number in range(200)]
        for filler in fillers:
            with contextlib.suppress(OSError):
                filler.write_bytes(b"x" * 8192)
        plugin = launch(four, kubelet)
        if option.startswith("nr_inodes"):  # a socket takes an inode and no space
            plugin.wait_for_line(f"{R150}: cannot make a socket .*no space, no inodes")
            for filler in fillers:
                filler.unlink(missing_ok=True)
        kubelet.wait_status(R150, 4, 4, timeout=8)
    finally:
        kubelet.close()
        subprocess.run(["umount", "-l", str(kubelet.root)], check=True)


def raw(channel: grpc.Channel, method: str) -> Any:
    """A method that takes and gives bytes."""
    return channel.unary_stream(method) if method.endswith("ListAndWatch") else channel.unary_unary(method)


def call(channel: grpc.Channel, method: str, request: bytes, timeout: float = 10.0) -> tuple[grpc.StatusCode, str]:
    """One call with any bytes: the status and its sentence."""
    try:
        raw(channel, method)(request, timeout=timeout)
    except grpc.RpcError as error:
        return error.code(), error.details() or ""
    return grpc.StatusCode.OK, ""


@module_only
def test_hostile_calls(kubelet: Kubelet, plugin: Plugin) -> None:
    """Whatever is sent, there is a status with a sentence, and honest callers hardly notice (story 14)."""
    target = f"unix:{kubelet.folder / sockets(kubelet)[0]}"
    service = "/v1beta1.DevicePlugin/"
    noise = random.Random(4711)
    ids = MESSAGES["ContainerAllocateRequest"](devices_ids=[f"wormhole-{n:016X}" for n in range(100_000)])
    allocate = MESSAGES["AllocateRequest"](container_requests=[ids]).SerializeToString()
    strangers = [f"{n:x}" for n in range(30_000)]
    one = MESSAGES["ContainerPreferredAllocationRequest"](available_deviceIDs=strangers, allocation_size=15_000)
    preferred = MESSAGES["PreferredAllocationRequest"](container_requests=[one]).SerializeToString()
    hostile = [
        (service + "Allocate", allocate),
        (service + "Allocate", b"\x0a\x02\x0a\x00" * 1000),
        (service + "Allocate", b"\x0a\xc0\xdf\x0f" + b"\x0a\x00" * 128_992),  # as many IDs as a request may hold
        (service + "GetPreferredAllocation", preferred),
        (service + "Allocate", b""),
        (service + "Nothing", b""),
        ("/v1beta1.Registration/Register", b""),
        (service + "PreStartContainer", b"\x0a\x04\xff\xfe\xfd\xfc"),
        (service + "GetPreferredAllocation", b"\x0a\x0b\x18\xff\xff\xff\xff\xff\xff\xff\xff\x7f\x01"),
        *((service + name, noise.randbytes(noise.randrange(1, 300))) for name in ("Allocate", "PreStartContainer") * 20),
    ]
    honest = MESSAGES["AllocateRequest"](
        container_requests=[MESSAGES["ContainerAllocateRequest"](devices_ids=[N150[0].id])]
    ).SerializeToString()
    options = [("grpc.use_local_subchannel_pool", 1)]
    with grpc.insecure_channel(target, options) as enemy, grpc.insecure_channel(target, options) as friend:
        assert call(friend, service + "Allocate", honest)[0] is grpc.StatusCode.OK
        for method, request in hostile:
            code, sentence = call(enemy, method, request)
            assert code is grpc.StatusCode.OK or sentence, (method, request[:20], code)
            assert code is not grpc.StatusCode.DEADLINE_EXCEEDED, (method, request[:20])
        streams = [raw(enemy, service + "ListAndWatch")(b"") for _ in range(200)]
        for stream in streams:
            assert next(stream)
        flood = [raw(enemy, service + "Allocate").future(b"", timeout=30) for _ in range(1000)]
        times = []
        for _ in range(20):
            began = time.monotonic()
            assert call(friend, service + "Allocate", honest)[0] is grpc.StatusCode.OK
            times.append(time.monotonic() - began)
        assert all(one.code() is not None for one in flood)
        for _ in range(20):
            began = time.monotonic()
            assert call(friend, service + "Allocate", honest)[0] is grpc.StatusCode.OK
            times.append(time.monotonic() - began)
        quick(sorted(times)[len(times) // 2], 0.050, "Allocate beside 200 streams and 1000 calls, median")
        for stream in streams:
            stream.cancel()
    assert not kubelet.log.seen(lambda event: event["event"] == "stream_end")
    assert not plugin.lines("exception|defect")


@module_only
def test_flapping_card(kubelet: Kubelet, four: Tree, launch: Launch) -> None:
    """A card that comes and goes at each poll costs the others nothing, and ends as what it is at last."""
    kubelet.start()
    launch(four, kubelet, "--poll-seconds=0.1")
    kubelet.wait_status(R150, 4, 4)
    mark = kubelet.log.mark()
    for _ in range(10):
        chip = four.remove(N150[0].bdf)
        kubelet.wait_health(R150, chip.id, "Unhealthy", after=mark)
        four.add(chip)
        mark = kubelet.log.mark()
        kubelet.wait_health(R150, chip.id, "Healthy", after=mark)
    lists = [event["devices"] for event in kubelet.seen("devices", resource=R150)]
    assert all(devices[chip.id] == "Healthy" for devices in lists for chip in N150[1:])
    assert len(kubelet.seen("register")) == 1


########################################################################################################################
# 6f. Tests of the plugin: HTTP, logs, CDI, labels
########################################################################################################################


def page(plugin: Plugin, path: str) -> tuple[int, str]:
    """Status and text of one of the plugin's pages."""
    port = re.search(r"INFO HTTP on port (\d+)", plugin.wait_for_line("INFO HTTP on port").text)
    assert port
    connection = http.client.HTTPConnection("127.0.0.1", int(port[1]), timeout=10)
    with contextlib.closing(connection):
        connection.request("GET", path)
        answer = connection.getresponse()
        return answer.status, answer.read().decode()


def samples(text: str) -> dict[str, float]:
    """A metrics page as Prometheus reads it: 'name{label="value"}', labels sorted, -> value."""
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        assert family.type != "unknown" and family.documentation, family.name
        for one in family.samples:
            labels = ",".join(f'{name}="{value}"' for name, value in sorted(one.labels.items()))
            name = f"{one.name}{{{labels}}}" if labels else one.name
            assert name not in found, f"{name} twice"
            found[name] = one.value
    return found


def verdict_in(found: dict[str, float], card: str, resource: str) -> tuple[str, float]:
    """What a metrics page says of a card: the kind of its verdict, and whether it is healthy."""
    mine = f'tt_device_plugin_card_verdict{{card="{card}"'
    (kind,) = (name.split('kind="')[1].split('"')[0] for name in found if name.startswith(mine))
    return kind, found[f'tt_device_plugin_card_healthy{{card="{card}",resource="{resource}"}}']


def chip_of(chip: Chip) -> str:
    """The labels of a chip that is a card of its own."""
    return f'{{card="{chip.id}",chip="{chip.bdf}"}}'


@contextlib.contextmanager
def polled(tree: Tree, *times: float, **settings: Any) -> Iterator[tuple[tt.Inventory, tt.Registrar]]:
    """An inventory that has polled at these times (seconds of time.monotonic()), and the registrar that goes with it."""

    async def registrar(inventory: tt.Inventory) -> tt.Registrar:
        return tt.Registrar(inventory.settings, inventory, tt.Bell())

    inventory = tt.Inventory(tt.Settings(sysfs_root=tree.sys, dev_root=tree.dev, **settings))
    for now in times:
        inventory.poll(now)
    yield inventory, asyncio.run(registrar(inventory))


def test_metrics_of_chips(tree: Tree) -> None:
    """Each sensor in its base unit, by tt-telemetry's names; what cannot be is absent, and counted."""
    for chip in (N150[0], replace(P300[0], n=5), replace(N150[2], card_type=None, asic_id=None, serial=None)):
        tree.add(chip)
    tree.set(N150[0].bdf, "device/hwmon/hwmon2/in0_input", "3211313\n")
    tree.set(P300[0].bdf, "tt_therm_trip_count", "2\n")
    tree.write(tree.root / "proc/driver/tenstorrent/0/pids", "17\n4711\n")
    with polled(tree, 100.0, 101.0) as (inventory, registrar):
        text = tt.exposition(tt.metrics(inventory, registrar, 109.0))
    found = samples(text)
    n150, p300 = chip_of(N150[0]), f'{{card="{P300[0].id}",chip="{P300[0].bdf}"}}'
    expected = {
        "tt_asic_temperature_celsius": 54.3,
        "tt_thermal_throttle_limit_celsius": 75.0,
        "tt_ai_clock_mhz": 500.0,
        "tt_tdp_w": 15.0,
        "tt_tdc_a": 18.0,
        "tt_vcore_v": None,
        "tt_thermal_trips_total": None,
        "tt_device_plugin_device_node_users": 2.0,
        "tt_device_plugin_heartbeat_age_seconds": 9.0,
        "tt_device_plugin_junk_readings_total": 1.0,
    }
    assert {name: found.get(name + n150) for name in expected} == expected
    assert found["tt_thermal_trips_total" + p300] == 2
    assert "tt_device_plugin_device_node_users" + p300 not in found
    assert verdict_in(found, N150[0].id, R150) == ("ok", 1)
    assert verdict_in(found, P300[0].id, "") == ("half", 0)
    assert found["tt_device_plugin_cards_not_offered"] == 2
    assert found["tt_device_plugin_polls_total"] == 2 and found["tt_device_plugin_poll_seconds_total"] > 0
    (info,) = (name for name in found if name.startswith("tt_device_plugin_chip_info") and N150[0].bdf in name)
    for fact in ("n150", "wormhole", N150[0].serial, N150[0].firmware, "/dev/tenstorrent/0"):
        assert f'"{fact}"' in info


def test_metrics_of_a_lost_card(tree: Tree) -> None:
    """A card that is gone keeps its verdict and loses its readings: the last ones would be read as those of now."""
    tree.add(N150[0])
    with polled(tree, 100.0) as (inventory, registrar):
        tree.remove(N150[0].bdf)
        inventory.poll(101.0)
        found = samples(tt.exposition(tt.metrics(inventory, registrar, 101.0)))
    assert verdict_in(found, N150[0].id, R150) == ("gone", 0)
    assert found[f'tt_device_plugin_cards{{health="Unhealthy",resource="{R150}"}}'] == 1
    assert not [name for name in found if name.endswith(chip_of(N150[0]))]


def test_sensors_are_read_seldom(tree: Tree) -> None:
    """They decide nothing, and cost more than the rest of a poll: every 5 s is enough (see SENSORS_S)."""
    tree.add(N150[0])
    heat = "tt_asic_temperature_celsius" + chip_of(N150[0])
    with polled(tree, 100.0) as (inventory, registrar):
        tree.set(N150[0].bdf, "device/hwmon/hwmon2/temp1_input", "60000\n")
        inventory.poll(104.9)
        assert samples(tt.exposition(tt.metrics(inventory, registrar, 105.0)))[heat] == 54.3
        inventory.poll(105.0)
        assert samples(tt.exposition(tt.metrics(inventory, registrar, 105.0)))[heat] == 60.0


def test_metrics_escape() -> None:
    """Any text may stand in a label."""
    text = tt.exposition([("x", "A test.", [({"a": 'q"uote\\ and\nline', "b": ""}, 1.5)]), ("y", "Another.", [])])
    ((family,),) = (list(text_string_to_metric_families(text)),)
    assert family.samples[0].labels == {"a": 'q"uote\\ and\nline', "b": ""} and family.samples[0].value == 1.5


@pytest.fixture
def every_metric(tree: Tree) -> str:
    """A page with a sample of each metric."""
    for chip in (*N150, *(replace(chip, n=chip.n + 4) for chip in P300)):
        tree.add(chip)
    tree.set(P300[0].bdf, "tt_therm_trip_count", "2\n")
    tree.set(P300[0].bdf, "device/hwmon/hwmon6/fan1_input", "1200\n")
    tree.write(tree.root / "proc/driver/tenstorrent/0/pids", "17\n")
    with polled(tree, 100.0) as (inventory, registrar):
        registrar._refused[R150] = tt.Trouble()
        for key in (("registrations", R150, "start"), ("allocations", R150), ("refusals", R150, "Allocate", "NOT_FOUND")):
            registrar.ledger.counts[key] += 1
        text = tt.exposition(tt.metrics(inventory, registrar, 101.0) + tt.process_metrics())
    for metric in (*(sensor.metric for sensor in tt.SENSORS.values()), "tt_device_plugin_refusals_total", "process_open_fds"):
        assert f"\n{metric}" in text, metric
    return text


def test_metrics_are_in_readme(every_metric: str) -> None:
    """README's table has each metric, and no other."""
    table = set(re.findall(r"`(tt_[a-z_]+)`", "\n".join(line for line in README.splitlines() if line.startswith("| `tt_"))))
    names = {name for name in re.findall(r"^# TYPE (\w+)", every_metric, re.M) if not name.startswith("process_")}
    assert table - {"tt_thermal_trip_count"} == names


PROMTOOL = shutil.which("promtool", path=f"{os.environ.get('PATH', '')}:{HERE / 'build/promtool/usr/bin'}")


@pytest.mark.skipif(PROMTOOL is None, reason="there is no promtool (Debian: package prometheus)")
def test_metrics_suit_promtool(every_metric: str) -> None:
    """`promtool check metrics` has nothing to say about any name, type or unit."""
    done = subprocess.run([str(PROMTOOL), "check", "metrics"], input=every_metric, capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_metrics_of_a_galaxy(room: Path) -> None:
    """32 cards are scraped in under 20 ms, in a few hundred series."""
    tt.make_fake_tree(room, {"galaxy-wormhole": 32})
    inventory = tt.Inventory(tt.Settings(sysfs_root=room / "sys", dev_root=room / "dev"))
    inventory.poll(100.0)
    inventory.pulses = {  # the made-up tree has no sensors: let each have them all
        pci: replace(pulse, readings=dict.fromkeys(tt.SENSORS, 1)) for pci, pulse in inventory.pulses.items()
    }

    async def scrape() -> tuple[str, float]:
        registrar = tt.Registrar(inventory.settings, inventory, tt.Bell())
        began = time.monotonic()
        text = tt.exposition(tt.metrics(inventory, registrar, 101.0) + tt.process_metrics())
        return text, time.monotonic() - began

    text, _ = asyncio.run(scrape())
    quick(min(asyncio.run(scrape())[1] for _ in range(5)), 0.020, "metrics of 32 cards, the best of 5")
    assert 32 * len(tt.SENSORS) < len(samples(text)) < 32 * (len(tt.SENSORS) + 5) + 40


def test_alive() -> None:
    """/healthz: a dead polling thread or event loop counts; how long is long follows --poll-seconds."""
    inventory = tt.Inventory(tt.Settings())
    inventory.alive_at = inventory.watched_at = 1000.0
    assert tt.alive(inventory, 1009.0) == (True, "ok: the last poll ended 9.0 s ago")
    assert tt.alive(inventory, 1011.0) == (False, "stuck: the last poll ended 11 s ago.")
    inventory.watched_at = 900.0
    assert tt.alive(inventory, 1001.0) == (False, "stuck: the event loop ran last 101 s ago.")
    inventory = tt.Inventory(tt.Settings(poll_seconds=60))
    inventory.alive_at = inventory.watched_at = 1000.0
    assert tt.alive(inventory, 1179.0)[0] and not tt.alive(inventory, 1181.0)[0]


@module_only
def test_pages(kubelet: Kubelet, four: Tree, launch: Launch) -> None:
    """/readyz says what is missing, /metrics counts what happens, through the life of a node."""
    kubelet.folder.mkdir(parents=True)
    plugin = launch(four, kubelet, "--listen=127.0.0.1:0")
    plugin.wait_for_line("no kubelet listens")
    status, text = page(plugin, "/readyz")
    assert status == 503 and R150 in text and "no kubelet listens" in text
    assert page(plugin, "/healthz")[0] == 200, "a missing kubelet is nothing that a restart would mend"
    kubelet.start()
    kubelet.wait_status(R150, 4, 4)
    plugin.wait_for_line("registered")
    assert page(plugin, "/readyz") == (200, f"{R150}: registered\n")
    mark, line = kubelet.log.mark(), plugin.log.mark()
    kubelet.drop_stream(R150)
    kubelet.wait_status(R150, 4, 4, after=mark)
    plugin.wait_for_line("registered .* cause: stream-ended", after=line)
    kubelet.allocate(R150, [N150[0].id])
    with refused("NOT_FOUND"):
        kubelet.allocate(R150, ["nonsense"])
    found = samples(page(plugin, "/metrics")[1])
    assert {name: value for name, value in found.items() if R150 in name and "card_" not in name} == {
        f'tt_device_plugin_registered{{resource="{R150}"}}': 1,
        f'tt_device_plugin_registrations_total{{cause="start",resource="{R150}"}}': 1,
        f'tt_device_plugin_registrations_total{{cause="stream-ended",resource="{R150}"}}': 1,
        f'tt_device_plugin_cards{{health="Healthy",resource="{R150}"}}': 4,
        f'tt_device_plugin_cards{{health="Unhealthy",resource="{R150}"}}': 0,
        f'tt_device_plugin_allocations_total{{resource="{R150}"}}': 1,
        f'tt_device_plugin_refusals_total{{call="Allocate",code="NOT_FOUND",resource="{R150}"}}': 1,
    }
    assert found["process_resident_memory_bytes"] > 10e6 and found["process_open_fds"] > 5
    assert abs(found["process_start_time_seconds"] - time.time()) < 60 and found["process_cpu_seconds_total"] > 0.01
    assert page(plugin, "/nonsense") == (404, "no such page; there are /healthz, /readyz, /metrics\n")
    line = plugin.log.mark()
    kubelet.stop()
    plugin.wait_for_line("no kubelet listens", after=line)
    status, text = page(plugin, "/readyz")
    assert status == 503 and "not registered" in text
    assert samples(page(plugin, "/metrics")[1])[f'tt_device_plugin_registered{{resource="{R150}"}}'] == 0


@module_only
def test_ready_without_cards_and_in_second_place(kubelet: Kubelet, tree: Tree, beating: Beating, launch: Launch) -> None:
    """A node without cards is ready (story 10), and so is an instance that stands by: a rollout waits for it."""
    kubelet.start()
    first = launch(tree, kubelet, "--listen=127.0.0.1:0")
    first.wait_for_line("no cards here")
    assert page(first, "/readyz") == (200, "no cards to register: waiting for some to appear\n")
    tree.add(N150[0])
    kubelet.wait_status(R150, 1, 1)
    second = launch(tree, kubelet, "--listen=127.0.0.1:0")
    second.wait_for_line(STANDING_BY)
    status, text = page(second, "/readyz")
    assert status == 200 and "another instance serves" in text
    mark = kubelet.log.mark()
    first.end(signal.SIGKILL)
    kubelet.wait_status(R150, 1, 1, after=mark)
    second.wait_for_line(f"registered {R150}")
    assert page(second, "/readyz") == (200, f"{R150}: registered\n")


@module_only
def test_pages_while_a_read_hangs(kubelet: Kubelet, four: Tree, beating: Beating, launch: Launch) -> None:
    """A card whose driver hangs makes that card Unhealthy, not the plugin."""
    kubelet.start()
    plugin = launch(four, kubelet, "--listen=127.0.0.1:0")
    kubelet.wait_status(R150, 4, 4)
    beating.stop(N150[1].bdf)
    heart = four.entry(N150[1].bdf) / "tt_heartbeat"
    heart.unlink()
    os.mkfifo(heart)
    kubelet.wait_health(R150, N150[1].id, "Unhealthy", timeout=10)
    assert page(plugin, "/healthz")[0] == 200 and page(plugin, "/readyz")[0] == 200
    found = samples(page(plugin, "/metrics")[1])
    assert verdict_in(found, N150[1].id, R150) == ("read-hangs", 0)


@module_only
def test_host_file_hangs_at_the_start(kubelet: Kubelet, four: Tree, launch: Launch) -> None:
    """A file of the host, not of a chip, hangs: the cards are served all the same, and its facts are there once it answers."""
    version = four.sys / "module/tenstorrent/version"
    version.unlink()
    os.mkfifo(version)
    pipe = os.open(version, os.O_RDWR)
    kubelet.start()
    plugin = launch(four, kubelet, "--listen=127.0.0.1:0")
    kubelet.wait_status(R150, 4, 4, timeout=10)
    assert 'driver=""' in page(plugin, "/metrics")[1]
    version.unlink()
    version.write_text("2.10.0\n")
    os.write(pipe, b"old\n")
    os.close(pipe)
    mark = kubelet.log.mark()
    four.remove(N150[0].bdf)  # two polls later at the most
    kubelet.wait_health(R150, N150[0].id, "Unhealthy", after=mark)
    four.add(N150[0])
    kubelet.wait_health(R150, N150[0].id, "Healthy", after=mark)
    assert 'driver="2.10.0"' in page(plugin, "/metrics")[1]


@module_only
def test_pages_under_bad_clients(kubelet: Kubelet, four: Tree, launch: Launch) -> None:
    """Clients that say nothing, or nonsense, hold up neither the kubelet nor the next client for long."""
    kubelet.start()
    plugin = launch(four, kubelet, "--listen=127.0.0.1:0")
    kubelet.wait_status(R150, 4, 4)
    port = int(plugin.wait_for_line("HTTP on port").text.split("port ")[1].split()[0])
    for nonsense in (b"\0\xff" * 400 + b"\r\n\r\n", b"GET /metrics HTTP/9.9\r\n\r\n", b"PUT / HTTP/1.0\r\n\r\n", b"A" * 70_000):
        with socket.create_connection(("127.0.0.1", port), timeout=10) as client, contextlib.suppress(ConnectionError):
            client.sendall(nonsense)
            client.shutdown(socket.SHUT_WR)
            assert b"metrics" not in client.recv(100)
    with contextlib.ExitStack() as stack:
        for _ in range(5 * tt.CONNECTIONS):
            stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=10))
        began = time.monotonic()
        kubelet.allocate(R150, [N150[0].id])
        quick(time.monotonic() - began, 0.050, "Allocate beside silent HTTP clients")
        assert page(plugin, "/healthz")[0] == 200, "the oldest of them make room"
    assert not plugin.lines("traceback|exception")


@module_only
def test_port_is_taken(kubelet: Kubelet, four: Tree, launch: Launch) -> None:
    """The cards are served without it; it is taken as soon as it is free."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        kubelet.start()
        plugin = launch(four, kubelet, f"--listen=127.0.0.1:{other.getsockname()[1]}")
        kubelet.wait_status(R150, 4, 4)
        line = plugin.wait_for_line("no HTTP on port")
        assert "Address already in use" in line.text and "trying again" in line.text
    assert page(plugin, "/healthz")[0] == 200
    assert len(plugin.lines("no HTTP")) == 1


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [("127.0.0.1:80", "127.0.0.1", 80), (":7762", "", 7762), ("[::1]:0", "::1", 0), ("0.0.0.0:1", "0.0.0.0", 1)],
)
def test_listen_address(text: str, host: str, port: int) -> None:
    """IPv4, IPv6, all."""
    assert tt.address(text) == (host, port)


def test_listens_everywhere() -> None:
    """Without an address: on all of them, IPv4 and, where there is any, IPv6: a Pod's address may be of either kind."""
    _, port = tt.listen(("", 0), {"/x": lambda: (True, "y")})
    for host in ("127.0.0.1", *(["::1"] if socket.has_dualstack_ipv6() else [])):
        connection = http.client.HTTPConnection(host, port, timeout=10)
        connection.request("HEAD", "/x?z")
        answer = connection.getresponse()
        assert (answer.status, answer.read(), answer.headers["Content-Length"]) == (200, b"", "2")


INCIDENT = [
    "INFO tt-device-plugin VERSION, Python VERSION, grpcio VERSION, driver 2.10.0; kubelet folder DIR/k/device-plugins, "
    "sysfs DIR/sys, dev DIR/dev; cards: 2 n150",
    "INFO card wormhole-0D0CB6F1E7A50001 (n150, /dev/tenstorrent/0) is Healthy",
    "INFO card wormhole-0D0CB6F1E7A50002 (n150, /dev/tenstorrent/1) is Healthy",
    "INFO registered tenstorrent.com/n150 with the kubelet: 2 cards, 2 healthy; socket tenstorrent-n150-XXXXXX.sock; "
    "cause: start",
    # the kubelet is stopped and started
    "WARNING the kubelet's stream of tenstorrent.com/n150 has ended: registering again",
    "WARNING no kubelet listens at DIR/k/device-plugins/kubelet.sock: waiting for it to start",
    "INFO a kubelet answers at DIR/k/device-plugins/kubelet.sock",
    "INFO registered tenstorrent.com/n150 with the kubelet: 2 cards, 2 healthy; socket tenstorrent-n150-XXXXXX.sock; "
    "cause: stream-ended",
    # a card is lost
    "ERROR card wormhole-0D0CB6F1E7A50002 (n150, /dev/tenstorrent/1) is Unhealthy: it is gone from sysfs: in a reset, "
    "unplugged, or the driver is unloaded; if it stays away, see dmesg",
    # it comes back with another number
    "INFO card wormhole-0D0CB6F1E7A50002 (n150, /dev/tenstorrent/5) is Healthy again, after N s",
    # a Pod gets it
    "INFO allocated card wormhole-0D0CB6F1E7A50002 (n150, /dev/tenstorrent/5)",
    "INFO told to stop, and done",
]


@pytest.mark.parametrize("style", ["text", "json"])
@module_only
def test_incident_in_the_log(kubelet: Kubelet, tree: Tree, beating: Beating, launch: Launch, style: str) -> None:
    """A kubelet's restart, a card's loss in a reset and its return read as a story: these lines and no others."""
    for chip in N150[:2]:
        tree.add(chip)
    kubelet.start()
    plugin = launch(tree, kubelet, f"--log-format={style}")
    plugin.wait_for_line("registered")
    line = plugin.log.mark()
    kubelet.stop()
    plugin.wait_for_line("no kubelet listens", after=line)
    kubelet.start()
    plugin.wait_for_line("cause: stream-ended", after=line)
    chip = tree.remove(N150[1].bdf)
    plugin.wait_for_line("is gone from sysfs")
    tree.add(replace(chip, n=5))
    plugin.wait_for_line("healthy again")
    kubelet.allocate(R150, [chip.id])
    plugin.wait_for_line("allocated")
    plugin.end()
    lines = plugin.lines()
    if style == "json":
        objects = [json.loads(line) for line in lines]
        known = {"ts", "level", "msg", "card", "resource", "reason", "since"}
        assert not [one for one in objects if set(one) - known or not {"ts", "level", "msg"} <= set(one)]
        (lost,) = (one for one in objects if one["level"] == "error")
        assert (lost["card"], lost["resource"]) == (chip.id, R150)
        assert lost["reason"] in lost["msg"] and lost["since"] <= lost["ts"]
        lines = [f"{one['ts']} {one['level'].upper()} {one['msg']}" for one in objects]
    times = [datetime.datetime.fromisoformat(line.split()[0].replace("Z", "+00:00")) for line in lines]
    assert times == sorted(times)
    story = []
    for each in lines:
        text = each.split(" ", 1)[1].replace(str(tree.root), "DIR")
        text = re.sub(r"(tt-device-plugin|Python|grpcio) \d+\.\d+\.\d+[^,;]*", r"\1 VERSION", text)
        text = re.sub(r"n150-[0-9a-f]{6}\.sock", "n150-XXXXXX.sock", text)
        story.append(re.sub(r"after [0-9]+ s", "after N s", text))
    assert story == INCIDENT


def on_a_terminal(command: list[str], columns: int, **environment: str) -> str:
    """What a program writes to a terminal of so many columns, on stdout and stderr."""
    leader, follower = os.openpty()
    with open(leader, "rb", buffering=0) as terminal:
        try:
            fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("4H", 40, columns, 0, 0))
            clean = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "NO_COLOR")}
            done = subprocess.Popen(command, stdin=follower, stdout=follower, stderr=follower, env=clean | environment)
        finally:
            os.close(follower)
        text = b""
        with contextlib.suppress(OSError):  # EIO: the program has ended, and nobody else has the terminal open
            while piece := terminal.read(4096):
                text += piece
        assert done.wait(30) == 0, text
    return text.decode().replace("\r\n", "\n")


ANSI = re.compile(r"\033\[[0-9]*m")


@pytest.mark.parametrize("columns", [80, 120])
@module_only
def test_list_on_a_terminal(command: list[str], tree: Tree, columns: int) -> None:
    """Healthy green, the rest in red or yellow, the reason in words; it fits, and what is left out is not what matters."""
    tree.add(N150[0])
    for chip in P300:
        tree.add(replace(chip, n=chip.n + 4))
    tree.add(replace(N150[1], heartbeat=True))
    tree.set(N150[1].bdf, "tt_heartbeat", "4294967295\n")
    tree.add(replace(N150[2], card_type=None, asic_id=None, serial=None, firmware=None, heartbeat=False, hwmon=False))
    shown = on_a_terminal([*command, *tree.flags, "--list"], columns)
    assert "\033[32mHealthy\033[0m" in shown and "\033[31mUnhealthy\033[0m" in shown and "\033[33mpending\033[0m" in shown
    plain = ANSI.sub("", shown)
    assert max(map(len, plain.splitlines())) <= columns, plain
    for words in (N150[0].id, P300_ID, "not offered", "its PCIe bus answers all ones", "its telemetry is not there yet"):
        assert words in " ".join(plain.split())
    assert ("0000:03:00.0" in plain) == (columns == 120), plain
    assert ANSI.sub("", on_a_terminal([*command, *tree.flags, "--list"], columns, NO_COLOR="1")) == plain
    assert "\033" not in on_a_terminal([*command, *tree.flags, "--list"], columns, NO_COLOR="1")


@module_only
def test_list_while_a_read_hangs(command: list[str], tree: Tree) -> None:
    """--list says which card it is, and does not hang with it."""
    for chip in N150[:2]:
        tree.add(chip)
    heart = tree.entry(N150[0].bdf) / "tt_heartbeat"
    heart.unlink()
    os.mkfifo(heart)
    first, second = json.loads(run(command, *tree.flags, "--list", "--json", timeout=20).stdout)
    assert (first["id"], first["resource"]) == (N150[1].id, R150)
    assert second["resource"] is None and "does not return" in second["reason"]


CDI = "tenstorrent.com-card.json"


def cdi_devices(path: Path) -> dict[str, list[str]]:
    """The devices of a CDI specification: name -> host paths; "" for what has no such path."""
    spec = json.loads(path.read_text())
    assert (spec["cdiVersion"], spec["kind"]) == ("0.5.0", "tenstorrent.com/card")
    return {one["name"]: [node["hostPath"] for node in one["containerEdits"]["deviceNodes"]] for one in spec["devices"]}


@module_only
def test_cdi(kubelet: Kubelet, four: Tree, launch: Launch) -> None:
    """One specification: each card by ID and number, and all; in step with what is there (stories 23, 24)."""
    kubelet.start()
    folder = kubelet.root / "cdi"
    plugin = launch(four, kubelet, "--cdi-dir", str(folder))
    kubelet.wait_status(R150, 4, 4)
    path = folder / CDI
    assert stat.S_IMODE(path.stat().st_mode) == 0o644 and stat.S_IMODE(folder.stat().st_mode) == 0o755
    nodes = [f"/dev/tenstorrent/{chip.n}" for chip in N150]
    each = {name: [node] for chip, node in zip(N150, nodes, strict=True) for name in (chip.id, str(chip.n))}
    assert cdi_devices(path) == each | {"all": nodes}
    answer = kubelet.allocate(R150, [N150[1].id])
    assert [one["name"] for one in answer["cdi_devices"]] == [f"tenstorrent.com/card={N150[1].id}"]
    assert [one["host_path"] for one in answer["devices"]] == [nodes[1]], "runtimes without CDI go by these"
    mark = kubelet.log.mark()
    chip = four.remove(N150[1].bdf)
    kubelet.wait_health(R150, chip.id, "Unhealthy", after=mark)
    assert chip.id not in cdi_devices(path) and len(cdi_devices(path)["all"]) == 3
    four.add(replace(chip, n=7))
    kubelet.wait_health(R150, chip.id, "Healthy", after=kubelet.log.mark())
    assert cdi_devices(path)[chip.id] == ["/dev/tenstorrent/7"]
    assert os.listdir(folder) == [CDI], "no draft is left"
    plugin.end()
    assert os.listdir(folder) == []


@module_only
def test_cdi_and_a_new_number(kubelet: Kubelet, tree: Tree, beating: Beating, launch: Launch) -> None:
    """By CDI the container would get the new number, by the stored answer's link the old one: two nodes for one chip."""
    tree.add(replace(N150[0], by_id=True))
    kubelet.start()
    launch(tree, kubelet, "--cdi-dir", str(kubelet.root / "cdi"))
    kubelet.wait_status(R150, 1, 1)
    kubelet.allocate(R150, [N150[0].id])
    kubelet.pre_start(R150, [N150[0].id])
    mark = kubelet.log.mark()
    tree.remove(N150[0].bdf)
    kubelet.wait_health(R150, N150[0].id, "Unhealthy", after=mark)
    mark = kubelet.log.mark()
    tree.add(replace(N150[0], by_id=True, n=4))
    kubelet.wait_health(R150, N150[0].id, "Healthy", after=mark)
    with refused("FAILED_PRECONDITION", "/dev/tenstorrent/0", "delete the Pod"):
        kubelet.pre_start(R150, [N150[0].id])


@module_only
def test_cdi_is_not_written(kubelet: Kubelet, four: Tree, launch: Launch) -> None:
    """A name that leads nowhere would stop the container: without the file there is none, with it again there is."""
    kubelet.start()
    folder = kubelet.root / "cdi"
    folder.write_text("")  # a file where the folder should be
    plugin = launch(four, kubelet, "--cdi-dir", str(folder))
    kubelet.wait_status(R150, 4, 4)
    assert f"cannot keep {folder}/{CDI}" in plugin.wait_for_line("cannot keep").text
    assert "cdi_devices" not in {name for name, value in kubelet.allocate(R150, [N150[0].id]).items() if value}
    folder.unlink()
    plugin.wait_for_line(f"{CDI} is kept again")
    assert kubelet.allocate(R150, [N150[0].id])["cdi_devices"]
    (folder / CDI).unlink()
    assert not kubelet.allocate(R150, [N150[0].id]).get("cdi_devices")


def test_kept_file(room: Path) -> None:
    """Written when it should say something else or is gone; ours alone is removed, and what a killed instance has left."""

    file = tt.KeptFile(room / "x/file")
    file.keep("one")
    first = file.path.stat()
    file.keep("one")
    assert file.path.stat() == first, "not written without need"
    file.keep("two")
    assert file.path.read_text() == "two" and not file.says("one")
    file.path.unlink()
    assert not file.says("two")
    file.keep("two")
    assert file.path.read_text() == "two"
    file.keep("")
    assert not file.path.exists()
    file.keep("three")
    other = tt.KeptFile(file.path)  # of the instance that takes over
    other.keep("three")
    file.end()
    assert other.says("three") and not file.says("three")
    other.end()
    other.keep("late")  # the polling thread's last word
    assert not file.path.exists()
    file.path.write_text("of an instance that was killed")
    last = tt.KeptFile(file.path)
    last.keep("")
    last.end()
    assert not file.path.exists()


@module_only
def test_a_write_that_hangs(kubelet: Kubelet, four: Tree, launch: Launch) -> None:
    """The folder for CDI is on a disk that hangs: the cards are served, and the process ends when it is told to."""
    kubelet.start()
    folder = kubelet.root / "cdi"
    folder.mkdir()
    os.mkfifo(folder / f".{CDI}.new")
    plugin = launch(four, kubelet, "--cdi-dir", str(folder))
    kubelet.wait_status(R150, 4, 4)
    mark = kubelet.log.mark()
    four.remove(N150[0].bdf)
    kubelet.wait_health(R150, N150[0].id, "Unhealthy", after=mark)
    code, seconds = plugin.end()
    assert code == 0
    quick(seconds, 1.5, "SIGTERM to the end while a write hangs")


@module_only
def test_second_instance_writes_no_files(kubelet: Kubelet, four: Tree, launch: Launch) -> None:
    """It leaves them to the one that serves, and has them when that has gone."""
    kubelet.start()
    flags = ["--cdi-dir", str(kubelet.root / "cdi"), "--labels-dir", str(kubelet.root / "labels")]
    first = launch(four, kubelet, *flags)
    kubelet.wait_status(R150, 4, 4)
    path = kubelet.root / "cdi" / CDI
    before = path.stat()
    second = launch(four, kubelet, *flags)
    second.wait_for_line(STANDING_BY)
    assert path.stat() == before
    mark = kubelet.log.mark()
    first.end()
    kubelet.wait_status(R150, 4, 4, after=mark)
    second.wait_for_line("registered")
    mark = kubelet.log.mark()
    four.remove(N150[0].bdf)
    kubelet.wait_health(R150, N150[0].id, "Unhealthy", after=mark)
    assert len(cdi_devices(path)["all"]) == 3 and (kubelet.root / "labels/tt-device-plugin").exists()


def labels_of(cards: dict[str, int], room: Path, **settings: Any) -> dict[str, str]:
    """The labels of a node with such made-up cards."""
    tt.make_fake_tree(room, cards)
    inventory = tt.Inventory(tt.Settings(sysfs_root=room / "sys", dev_root=room / "dev", **settings))
    inventory.poll(100.0)
    return dict(line.split("=", 1) for line in tt.node_labels(inventory.settings, inventory.snapshot).splitlines())


@pytest.mark.parametrize(
    ("cards", "topology"),
    [
        ({"n300": 4}, "t3000"),
        ({"n300": 3}, None),
        ({"n300": 4, "n150": 1}, None),
        ({"galaxy-wormhole": 32}, "galaxy"),
        ({"galaxy-blackhole": 32}, "galaxy"),
        ({"galaxy-wormhole": 31}, None),
        ({"p300": 2}, None),
    ],
)
def test_labels(room: Path, cards: dict[str, int], topology: str | None) -> None:
    """Per model the count and the firmware, the driver, and the topology where it is certain."""
    expected = {f"tenstorrent.com/{model}.count": str(count) for model, count in cards.items()}
    expected |= {f"tenstorrent.com/{model}.firmware": "19.5.0.0" for model in cards}
    expected |= {"tenstorrent.com/driver-version": "2.10.0"}
    if topology:
        expected |= {"tenstorrent.com/topology": topology}
    assert labels_of(cards, room) == expected


def test_labels_are_valid(tree: Tree) -> None:
    """Any driver's version becomes a label's value; two firmwares give none; no cards give no file."""
    settings = tt.Settings(sysfs_root=tree.sys, dev_root=tree.dev, resource_domain="example.com")
    snapshot = asyncio.run(tt.take_stock(settings))
    assert tt.node_labels(settings, snapshot) == ""
    tree.add(N150[0])
    tree.add(replace(N150[1], firmware="19.5.0.0"))
    tree.write(tree.sys / "module/tenstorrent/version", "2.10.1~pre+x-\n")
    snapshot = asyncio.run(tt.take_stock(settings))
    assert tt.node_labels(settings, snapshot) == "example.com/n150.count=2\nexample.com/driver-version=2.10.1_pre_x\n"


@module_only
def test_labels_file(kubelet: Kubelet, four: Tree, launch: Launch) -> None:
    """Written for Node Feature Discovery's worker to read, removed at a clean exit."""
    kubelet.start()
    folder = kubelet.root / "features.d"
    plugin = launch(four, kubelet, "--labels-dir", str(folder))
    kubelet.wait_status(R150, 4, 4)
    (path,) = folder.iterdir()
    assert path.name == "tt-device-plugin" and stat.S_IMODE(path.stat().st_mode) == 0o644
    assert "tenstorrent.com/n150.count=4\n" in path.read_text()
    plugin.end()
    assert not path.exists()


########################################################################################################################
# 7. Tests of the file: build, interpreters, image
########################################################################################################################

import functools  # noqa: E402
import hashlib  # noqa: E402
import http.server  # noqa: E402
import shlex  # noqa: E402
import urllib.parse  # noqa: E402
import zipfile  # noqa: E402

from cyclonedx.schema import SchemaVersion  # noqa: E402
from cyclonedx.validation.json import JsonStrictValidator  # noqa: E402

UNIVERSAL = HERE / "dist/tt-device-plugin-universal.pyz"
PARTS = ["build.sh", "requirements.txt", "tt_device_plugin.py", "api_pb2.py", "api_pb2_grpc.py"]  # what the file is made from
PYTHONS = [10, 11, 12, 13, 14, 15]  # the minor versions that the universal file is for
CPU = {"x86_64": "amd64", "aarch64": "arm64"}.get(platform.machine(), platform.machine())  # as Debian calls it
USER = 65532  # "nonroot" of many images

Finished = subprocess.CompletedProcess[str]

needs_root = pytest.mark.skipif(os.getuid() != 0, reason="mounts and a change of root need root")


def build(folder: Path, *arguments: str, env: dict[str, str] | None = None, umask: int = 0o022) -> Finished:
    """`./build.sh ARGUMENTS` of that folder, with this interpreter unless env has a PYTHON."""
    command = [str(folder / "build.sh"), *arguments]
    variables = {**os.environ, "PYTHON": sys.executable, **(env or {})}
    return subprocess.run(command, capture_output=True, text=True, env=variables, umask=umask, timeout=600)


def copy_project(folder: Path) -> Path:
    """All that the file is made from, in a folder that has built nothing yet."""
    folder.mkdir()
    for name in PARTS:
        shutil.copy(HERE / name, folder)
    return folder


@pytest.fixture(scope="session")
def universal() -> Path:
    """The file for every interpreter, built if anything has changed."""
    done = build(HERE, "--universal")
    assert done.returncode == 0, done.stdout + done.stderr
    return UNIVERSAL


@functools.cache
def interpreters() -> dict[int, str]:
    """The CPythons 3.N of this machine, by N: pyenv's, and those on PATH."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    candidates = sorted(str(path) for path in pyenv.glob("versions/3.*/bin/python3"))
    candidates += [path for minor in range(4, 20) if (path := shutil.which(f"python3.{minor}"))]
    found: dict[int, str] = {}
    for path in candidates:
        question = "import sys; print(sys.implementation.name, *sys.version_info[:2])"
        done = subprocess.run([path, "-c", question], capture_output=True, text=True)
        name, major, minor = done.stdout.split() if done.returncode == 0 else ("", "", "")  # pyenv's shims may refuse
        if (name, major) == ("cpython", "3"):
            found.setdefault(int(minor), path)
    return found


def interpreter(minor: int) -> str:
    """A CPython 3.N of this machine."""
    if minor not in interpreters():
        pytest.skip(f"there is no CPython 3.{minor} here, neither pyenv's nor python3.{minor} on PATH")
    return interpreters()[minor]


def check_serving(kubelet: Kubelet, command: list[str], timeout: float = 30.0) -> None:
    """The kubelet, which runs already, gets all of `four` registered, listed and allocated, and the plugin ends when told."""
    with contextlib.closing(Plugin(command, cwd="/")) as plugin:
        kubelet.wait_status(R150, 4, 4, timeout=timeout)
        answer = kubelet.allocate(R150, [N150[2].id])
        assert [device["host_path"] for device in answer["devices"]] == ["/dev/tenstorrent/2"]
        kubelet.pre_start(R150, [N150[2].id])
        assert plugin.end()[0] == 0, plugin.lines()


# What goes in -----------------------------------------------------------------------------------------------------------


def test_same_input_same_bytes(universal: Path, tmp_path: Path) -> None:
    """Two folders, umasks, locales and time zones make the same file; for the universal one with another interpreter."""
    one, two = copy_project(tmp_path / "one"), copy_project(tmp_path / "and another")
    done = build(one, umask=0o077, env={"LC_ALL": "C", "TZ": "Pacific/Auckland"})
    assert done.returncode == 0, done.stdout + done.stderr
    assert build(two, umask=0o000, env={"LC_ALL": "C.UTF-8", "TZ": "America/Lima"}).returncode == 0
    first = (one / "dist" / PYZ.name).read_bytes()
    assert first == (two / "dist" / PYZ.name).read_bytes()
    assert hashlib.sha256(first).hexdigest() in done.stdout and f" {len(first)} bytes" in done.stdout

    # What pip fetched has been checked against hashes, and 12 times 20 MB take a while.
    shutil.copytree(HERE / "build/site/universal", two / "build/site/universal", copy_function=os.link)
    others = [path for minor, path in interpreters().items() if minor >= 10 and minor != sys.version_info.minor]
    python = others[0] if others else sys.executable
    done = build(two, "build", "--universal", umask=0o002, env={"LC_ALL": "POSIX", "TZ": "Asia/Kolkata", "PYTHON": python})
    assert done.returncode == 0, done.stdout + done.stderr
    assert (two / "dist" / UNIVERSAL.name).read_bytes() == universal.read_bytes()


@contextlib.contextmanager
def proxy(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """An HTTP proxy that answers for every host from this folder: its address, and what it was asked for."""
    asked: list[str] = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.path = urllib.parse.urlsplit(self.path).path
            super().do_GET()

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(folder))) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", asked
        finally:
            server.shutdown()
            thread.join()


def test_builds_behind_a_proxy_from_a_mirror(tmp_path: Path) -> None:
    """pip's own settings hold: an index that only the proxy reaches, and nothing else is reached."""
    project = copy_project(tmp_path / "project")
    text = (HERE / "requirements.txt").read_text()
    (tmp_path / "wanted").write_text(text[: text.index("# ---- test")])
    download = ["pip", "download", "-qq", "--no-deps", "--only-binary=:all:", "--require-hashes"]
    subprocess.run([sys.executable, "-m", *download, "-r", tmp_path / "wanted", "-d", tmp_path], check=True)
    for wheel in tmp_path.glob("*.whl"):
        folder = tmp_path / "mirror/simple" / wheel.name.split("-")[0].replace("_", "-")
        folder.mkdir(parents=True)
        wheel.rename(folder / wheel.name)
    with proxy(tmp_path / "mirror") as (address, asked):
        settings = {"INDEX_URL": "http://mirror.invalid/simple", "TRUSTED_HOST": "mirror.invalid", "PROXY": address}
        settings |= {"CONFIG_FILE": os.devnull, "NO_CACHE_DIR": "1", "FIND_LINKS": "", "EXTRA_INDEX_URL": ""}
        done = build(project, env={f"PIP_{name}": value for name, value in settings.items()})
    assert done.returncode == 0, done.stdout + done.stderr
    assert (project / "dist" / PYZ.name).read_bytes() == PYZ.read_bytes()
    assert {path.rsplit("/", 1)[1].split("-")[0] for path in asked if path.endswith(".whl")} == {
        "grpcio", "protobuf", "typing_extensions"
    }  # fmt: skip


def test_other_bytes_are_refused(tmp_path: Path) -> None:
    """A package whose files have other hashes than requirements.txt says, as from a tampered mirror, is not packed."""
    project = copy_project(tmp_path / "project")
    before, protobuf, after = re.split(r"(\nprotobuf==(?:.*\\\n)+)", (project / "requirements.txt").read_text())
    protobuf = re.sub(r"sha256:(.)", lambda match: "sha256:" + ("1" if match[1] == "0" else "0"), protobuf)
    (project / "requirements.txt").write_text(before + protobuf + after)
    done = build(project)
    assert done.returncode == 1 and not (project / "dist").exists(), done.stderr
    assert "do not match the hashes" in done.stderr.lower() and "protobuf" in done.stderr.lower(), done.stderr


@pytest.mark.parametrize(("old", "new"), [("grpcio==", "grpcio!="), ("TEST=(pytest", "TEST=(pytest six")])
def test_requirements_are_those_asked_for(tmp_path: Path, old: str, new: str) -> None:
    """A list in build.sh that was changed without `./build.sh lock` stops every build, and this one has not been."""
    project = copy_project(tmp_path / "project")
    script = (project / "build.sh").read_text()
    assert script.count(old) == 1
    (project / "build.sh").write_text(script.replace(old, new))
    done = build(project)
    assert done.returncode == 1 and "./build.sh lock" in done.stderr, done.stderr
    assert PYZ.exists(), "with the lists as they are it was built"


def pins() -> dict[str, str]:
    """Name and version of each package in the runtime part of requirements.txt."""
    part = (HERE / "requirements.txt").read_text().split("# ---- ")[1]
    return dict(re.findall(r"^([\w.-]+)==(\S+)", part, re.MULTILINE))


@pytest.mark.parametrize("file", ["pyz", "universal"])
def test_what_is_inside(universal: Path, file: str) -> None:
    """The list of what is inside is valid CycloneDX and true; nothing says where or when it was built."""
    with zipfile.ZipFile(PYZ if file == "pyz" else universal) as archive:
        entries = archive.infolist()
        content = {entry.filename: archive.read(entry) for entry in entries}
    assert list(content) == sorted(content)
    assert {(entry.date_time, entry.external_attr >> 16) for entry in entries} == {((1980, 1, 1, 0, 0, 0), 0o100644)}
    ours = {name: data for name, data in content.items() if not name.startswith("native/")}
    assert [name for name, data in ours.items() if str(HERE).encode() in data] == []
    licenses = {name.split("/")[1].replace("_", "-") for name in content if name.startswith("licenses/")}
    assert licenses == pins().keys()

    text = content["sbom.cdx.json"].decode()
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(text) is None
    sbom = json.loads(text)
    plugin, libraries = sbom["metadata"]["component"], sbom["components"]
    assert (plugin["name"], plugin["version"]) == ("tt-device-plugin", tt.__version__)
    assert {library["name"].replace("_", "-"): library["version"] for library in libraries} == pins()
    assert {library["purl"] for library in libraries} == {f"pkg:pypi/{name}@{version}" for name, version in pins().items()}
    assert all(library["licenses"] for library in libraries)
    files = [part for component in (plugin, *libraries) for part in component.get("components", [])]
    listed = {part["name"]: part["hashes"][0]["content"] for part in files}
    assert listed == {name: hashlib.sha256(content[name]).hexdigest() for name in listed}
    assert {name for name in content if name.startswith("native/")} == {name for name in listed if name.startswith("native/")}
    assert {"__main__.py", "tt_device_plugin.py", "api_pb2.py", "api_pb2_grpc.py"} <= set(listed)

    natives = [name for name in listed if "cygrpc" in name]
    pairs = {(minor, cpu) for minor in PYTHONS for cpu in ("x86_64", "aarch64")}
    if file == "pyz":
        pairs = {(sys.version_info.minor, platform.machine())}
    assert sorted(natives) == sorted(
        f"native/{cpu}-linux-gnu/grpc._cython.cygrpc.cpython-3{minor}-{cpu}-linux-gnu.so" for minor, cpu in pairs
    )


# Where it runs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("minor", PYTHONS)
def test_serves_on(universal: Path, four: Tree, kubelet: Kubelet, minor: int) -> None:
    """The universal file, on the CPythons of this machine, with an empty environment; --version says which."""
    command = ["env", "-i", interpreter(minor), str(universal)]
    done = run(command, "--version")
    versions = f"Python 3.{minor}." + r"\S+, grpcio " + re.escape(f"{pins()['grpcio']}, protobuf {pins()['protobuf']}")
    assert re.fullmatch(rf"tt-device-plugin {re.escape(tt.__version__)} \({versions}\)\n", done.stdout), done.stdout
    kubelet.start()
    check_serving(kubelet, [*command, "--kubelet-dir", str(kubelet.root), *four.flags])


@pytest.mark.parametrize("file", ["pyz", "universal"])
def test_says_what_it_is_for(universal: Path, file: str) -> None:
    """A Python that is not in the file gets one sentence, and exit code 1."""
    wrong = [minor for minor in interpreters() if minor not in ([sys.version_info.minor] if file == "pyz" else PYTHONS)]
    if not wrong:
        pytest.skip("every CPython of this machine is in the file")
    for minor in wrong:
        done = run([interpreters()[minor], str(PYZ if file == "pyz" else universal)], "--version")
        assert done.returncode == 1 and done.stderr.count("\n") == 1 and not done.stdout, done.stderr
        assert f"cpython 3.{minor}." in done.stderr
        for right in [sys.version_info.minor] if file == "pyz" else PYTHONS:
            assert re.search(rf"It is for CPython .*\b3\.{right}\b.* on .*\b{platform.machine()}-linux-gnu", done.stderr)


@pytest.mark.parametrize("file", ["pyz", "universal"])
def test_first_start_of_many(universal: Path, tmp_path: Path, file: str) -> None:
    """Twenty at once, through a link, from a folder with spaces and as a command: all start and none leaves anything."""
    folder = tmp_path / "a folder with spaces"
    folder.mkdir()
    shutil.copy(PYZ if file == "pyz" else universal, folder / "the file")
    (tmp_path / "link").symlink_to(folder / "the file")
    empty = tmp_path / "empty"
    empty.mkdir()
    variables = {"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin", "HOME": str(empty), "TMPDIR": str(empty)}
    ways = itertools.islice(itertools.cycle([tmp_path / "link", folder / "the file"]), 20)
    popen: dict[str, Any] = {"stdout": subprocess.PIPE, "text": True, "env": variables, "cwd": empty}
    running = [subprocess.Popen([way, "--version"], **popen) for way in ways]
    answers = {process.communicate(timeout=120)[0] for process in running}
    assert [process.returncode for process in running] == [0] * 20
    assert len(answers) == 1 and tt.__version__ in answers.pop()
    assert list(empty.iterdir()) == [] and [path.name for path in folder.iterdir()] == ["the file"]


def test_without_memory_files(universal: Path) -> None:
    """A kernel or sandbox that has no memfd_create: a nameless temporary file does."""
    program = "import os, runpy, sys; del os.memfd_create; del sys.argv[0]; runpy.run_path(sys.argv[0], run_name='__main__')"
    done = run([sys.executable, "-c", program, str(universal)], "--version")
    assert done.returncode == 0 and tt.__version__ in done.stdout, done.stderr


def debian_root(suite: str, packages: str, cpu: str = CPU) -> Path:
    """A bare Debian with these packages and what they depend on, unpacked but not set up. It stays in build/."""
    if not shutil.which("mmdebstrap"):
        pytest.skip("needs mmdebstrap: apt-get install mmdebstrap")
    if subprocess.run(["unshare", "--mount", "true"], capture_output=True).returncode:
        pytest.skip("this root may not make a mount namespace")
    # Mirrors and snapshots may be older than a release's lists are meant to be used.
    options = ["--variant=extract", f"--architectures={cpu}", '--aptopt=Acquire::Check-Valid-Until "false"']
    options += [f"--include=base-files,libstdc++6,{packages}", suite]
    root = HERE / "build/roots" / f"{suite}-{cpu}-{hashlib.sha256(repr(options).encode()).hexdigest()[:12]}"
    if not root.exists():
        with tempfile.TemporaryDirectory(dir=HERE / "build") as draft:  # a root that is there is whole
            done = subprocess.run(["mmdebstrap", *options, f"{draft}/root"], capture_output=True, text=True, umask=0o022)
            assert done.returncode == 0, done.stderr
            for name in ("dev", "proc", "mnt", "srv", "opt"):  # for box() to mount things on
                Path(draft, "root", name).mkdir(exist_ok=True)
            root.parent.mkdir(exist_ok=True)
            Path(draft, "root").rename(root)
    return root


def box(root: Path, mounts: dict[str, Path], writable: str = "", env: str = "") -> list[str]:
    """A command that runs the rest of the line in that root as USER, with only this NAME=VALUE in the environment, and
    everything read-only but one folder. Mounts: where in the root, and what of this machine. All vanishes with the process."""
    quote = shlex.quote
    lines = ["set -e", f"cd {quote(str(root))}", "mount --bind . .", f"cd {quote(str(root))}"]
    lines += ["mount --bind /dev dev", "mount --bind /proc proc"]
    for inside, outside in mounts.items():
        lines += [f"mount --bind {quote(str(outside))} .{inside}", f"mount -o remount,bind,ro .{inside}"]
        if writable.startswith(inside):
            lines += [f"mount --bind {quote(str(outside) + writable.removeprefix(inside))} .{writable}"]
    variables = f"PATH=/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin {env}"
    lines += ["mount -o remount,bind,ro .", f'exec env -i {variables} chroot --userspec={USER}:{USER} . "$@"']
    return ["unshare", "--mount", "sh", "-c", "\n".join(lines), "sh"]


def check_serving_in_a_box(
    kubelet: Kubelet, root: Path, mounts: dict[str, Path], command: list[str], python: str, timeout: float = 30.0, env: str = ""
) -> None:
    """As check_serving, in a box: not root, and there is nothing to write to but the kubelet's folder."""
    kubelet.start()
    os.chown(kubelet.folder, USER, USER)
    (kubelet.folder / "kubelet.sock").chmod(0o666)
    prefix = box(root, {"/mnt": kubelet.root.parent, **mounts}, "/mnt/k/device-plugins", env)
    words = [*command[: command.index(python) + 1], "-c", "import os, tempfile; print(os.getuid()); tempfile.TemporaryFile()"]
    done = subprocess.run([*prefix, *words], capture_output=True, text=True, cwd="/")
    assert done.stdout == f"{USER}\n" and "No usable temporary directory" in done.stderr, done.stderr
    flags = ["--kubelet-dir", "/mnt/k", "--sysfs-root", "/mnt/sys", "--dev-root", "/mnt/dev"]
    check_serving(kubelet, [*prefix, *command, *flags], timeout)


@pytest.mark.parametrize(
    ("suite", "python"),
    [
        ("bookworm", "python3"),  # 3.11
        pytest.param("trixie", "python3", marks=long_only),  # 3.13
        pytest.param("forky", "python3", marks=long_only),  # 3.14
        pytest.param("forky", "python3.15", marks=long_only),
    ],
)
@needs_root
def test_serves_in_a_bare_debian(universal: Path, four: Tree, kubelet: Kubelet, suite: str, python: str) -> None:
    """Python and libstdc++6 are all that it needs."""
    root = debian_root(suite, python)
    check_serving_in_a_box(kubelet, root, {"/srv": universal.parent}, [python, f"/srv/{universal.name}"], python)


@long_only
@needs_root
def test_plain_files_on_the_distribution_packages(four: Tree, kubelet: Kubelet) -> None:
    """The three .py files run on Debian 12's own grpcio 1.51 and protobuf 3.21, with no archive."""
    root = debian_root("bookworm", "python3,python3-grpcio,python3-protobuf")
    command = ["python3", "-B", "/srv/tt_device_plugin.py"]
    check_serving_in_a_box(kubelet, root, {"/srv": HERE}, command, "python3")


@long_only
@needs_root
def test_serves_on_the_other_cpu(universal: Path, four: Tree, kubelet: Kubelet) -> None:
    """The same file on the other CPU, emulated; the file for one Python says that it is not for it."""
    cpu, machine = {"amd64": ("arm64", "aarch64"), "arm64": ("amd64", "x86_64")}[CPU]
    emulator = shutil.which(f"qemu-{machine}-static")
    if not emulator:
        pytest.skip(f"needs qemu-{machine}-static: apt-get install qemu-user-static")
    root = debian_root("trixie", "python3", cpu)
    mounts = {"/srv": universal.parent, "/opt": Path(emulator).parent}
    command = [f"/opt/{Path(emulator).name}", "/usr/bin/python3"]
    done = run([*box(root, mounts), *command], f"/srv/{PYZ.name}", "--version", timeout=300.0)
    assert done.returncode == 1 and f"{machine}-linux-gnu). It is for CPython" in done.stderr, done.stderr
    check_serving_in_a_box(kubelet, root, mounts, [*command, f"/srv/{universal.name}"], "/usr/bin/python3", 300.0)


def test_says_what_it_lacks(universal: Path, tmp_path: Path) -> None:
    """Where a library or a module of Python itself is missing, one sentence says what to install."""
    (tmp_path / "asyncio.py").write_text("raise ImportError('there is no asyncio here')\n")
    done = run([sys.executable, str(universal)], "--version", PYTHONPATH=str(tmp_path))
    assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
    assert "there is no asyncio here" in done.stderr and "libstdc++6" in done.stderr


# The image --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def storage(tmp_path: Path) -> Iterator[dict[str, str]]:
    """Environment variables with which podman and buildah keep all that they make in a folder of this test."""
    text = f'[storage]\ndriver = ""\ngraphroot = "{tmp_path}/images"\nrunroot = "{tmp_path}/run"\n'
    (tmp_path / "storage.conf").write_text(text)
    yield {"CONTAINERS_STORAGE_CONF": str(tmp_path / "storage.conf"), "BUILDAH_ISOLATION": "chroot"}
    mounted = [line.split()[1] for line in Path("/proc/self/mounts").read_text().splitlines()]
    for point in reversed([point for point in mounted if point.startswith(f"{tmp_path}/")]):
        subprocess.run(["umount", point], check=True)
    shutil.rmtree(tmp_path / "images")


@pytest.mark.parametrize("tool", ["podman", pytest.param("buildah", marks=long_only)])
@needs_root
def test_image(universal: Path, four: Tree, kubelet: Kubelet, tmp_path: Path, storage: dict[str, str], tool: str) -> None:
    """An image from a base that has a Python; its entry point serves, read-only and not as root, and nothing is compiled."""
    if not shutil.which(tool):
        pytest.skip(f"needs {tool}")
    root = debian_root("bookworm", "python3")

    def call(*words: str, stdin: str = "") -> str:
        done = subprocess.run([tool, *words], input=stdin, capture_output=True, text=True, env={**os.environ, **storage})
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    call("build", "-q", "-t", "localhost/base", "-f", "-", str(root), stdin="FROM scratch\nCOPY . /\n")
    done = build(HERE, "image", "localhost/plugin:test", env={"TOOL": tool, "BASE": "localhost/base", **storage})
    assert done.returncode == 0 and "localhost/plugin:test" in done.stdout, done.stdout + done.stderr

    about = json.loads(call("inspect", "--type=image", "localhost/plugin:test"))
    about = about["OCIv1"] if tool == "buildah" else about[0]
    config = about["config" if tool == "buildah" else "Config"]
    assert config["Labels"]["org.opencontainers.image.version"] == tt.__version__
    assert not config.get("Cmd") and not config.get("User")
    if tool == "podman":
        files = Path(call("image", "mount", "localhost/plugin:test"))
    else:
        files = Path(call("mount", call("from", "localhost/plugin:test")))
    folder = files / "opt/tt-device-plugin"
    sources = [path for path in folder.rglob("*.py")]
    assert len(sources) > 50 and (folder / "sbom.cdx.json").exists()
    (core,) = folder.glob("grpc/_cython/*.so")
    assert platform.machine() in core.name
    (env,) = (variable for variable in config["Env"] if not variable.startswith("PATH="))
    python, *rest = config["Entrypoint"]
    done = run(box(files, {}, env=env), python, "-v", *rest, "--version")
    compiled = re.findall(r"^# code object from '?(/.*\.py)'?$", done.stderr, re.MULTILINE)
    assert "/bytecode/opt/tt-device-plugin/tt_device_plugin." in done.stderr and compiled == [], compiled
    check_serving_in_a_box(kubelet, files, {}, config["Entrypoint"], python, env=env)


def test_image_without_a_tool(tmp_path: Path) -> None:
    """A sentence, and not a build, where there is no container tool."""
    done = build(copy_project(tmp_path / "project"), "image", env={"TOOL": "no-such-tool"})
    assert done.returncode == 1 and "no-such-tool" in done.stderr and "podman" in done.stderr, done.stderr
    assert not (tmp_path / "project/dist").exists()


########################################################################################################################
# 8. Tests of what README and daemonset.yaml say
########################################################################################################################

import copy  # noqa: E402

import jsonschema  # noqa: E402
import kubernetes_validate  # type: ignore[import-untyped]  # noqa: E402

README = (HERE / "README.md").read_text()
DAEMONSET = (HERE / "daemonset.yaml").read_text()


def blocks(language: str) -> list[str]:
    """README's code blocks of a language."""
    return [textwrap.dedent(block) for block in re.findall(rf"^```{language}\n(.*?)^```$", README, re.M | re.S)]


def rows(heading: str) -> list[list[str]]:
    """The cells of the first table below a heading of README, without the table's own heading."""
    table = re.search(r"(^\|.*\|\n)+", README.split(f"\n## {heading}\n")[1].split("\n## ")[0], re.M)
    assert table, heading
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in table[0].splitlines()[2:]]


def code(cell: str) -> str:
    """The code in a cell."""
    found = re.search(r"`([^`]+)`", cell)
    assert found, cell
    return found[1]


# daemonset.yaml ---------------------------------------------------------------------------------------------------------


def daemonset() -> dict[str, Any]:
    """The manifest."""
    manifest: dict[str, Any] = yaml.safe_load(DAEMONSET)
    return manifest


def container_of(manifest: dict[str, Any]) -> dict[str, Any]:
    """Its only container."""
    (container,) = manifest["spec"]["template"]["spec"]["containers"]
    return dict(container)


KUBERNETES = sorted(set(kubernetes_validate.utils.all_versions()), key=lambda version: [int(n) for n in version.split(".")])


@pytest.mark.parametrize("version", KUBERNETES)
def test_daemonset_schema(version: str) -> None:
    """No field is unknown or of the wrong type in any Kubernetes whose schema there is."""
    assert kubernetes_validate.validate(daemonset(), version, strict=True) == version.rpartition(".")[0]


def test_daemonset_schema_is_strict() -> None:
    """A misspelt field would be found."""
    manifest = daemonset()
    manifest["spec"]["template"]["spec"]["containers"][0]["securityContext"]["readOnlyRootFileSystem"] = True
    with pytest.raises(kubernetes_validate.ValidationError, match="readOnlyRootFileSystem"):
        kubernetes_validate.validate(manifest, KUBERNETES[-1], strict=True)


# What must be so: where, and the value. None: not there at all, which is the same as false.
POD_RULES: list[tuple[str, Any]] = [
    ("priorityClassName", "system-node-critical"),
    ("automountServiceAccountToken", False),
    ("enableServiceLinks", False),
    ("tolerations", [{"operator": "Exists"}]),
    ("nodeSelector", {"kubernetes.io/os": "linux"}),
    ("hostNetwork", None),
    ("hostPID", None),
    ("hostIPC", None),
    ("initContainers", None),
    ("serviceAccountName", None),
    ("securityContext", None),
]
CONTAINER_RULES: list[tuple[str, Any]] = [
    ("imagePullPolicy", "IfNotPresent"),
    ("command", None),
    ("env", None),
    ("securityContext.runAsUser", 0),
    ("securityContext.privileged", False),
    ("securityContext.allowPrivilegeEscalation", False),
    ("securityContext.readOnlyRootFilesystem", True),
    ("securityContext.capabilities", {"drop": ["ALL"]}),
    ("securityContext.seccompProfile", {"type": "RuntimeDefault"}),
    ("securityContext.seLinuxOptions", {"type": "container_device_plugin_t"}),
    ("resources.requests", {"cpu": "10m", "memory": "48Mi"}),
    ("resources.limits", {"memory": "96Mi"}),
    ("livenessProbe.httpGet", {"path": "/healthz", "port": "metrics"}),
    ("readinessProbe.httpGet", {"path": "/readyz", "port": "metrics"}),
    ("lifecycle", None),
]


def at(value: Any, path: str) -> Any:
    """What is at a path of keys, None if it is not there."""
    for key in path.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    return value


@pytest.mark.parametrize(("path", "want"), POD_RULES, ids=[path for path, _ in POD_RULES])
def test_daemonset_pod(path: str, want: Any) -> None:
    """One rule for the Pod."""
    assert at(daemonset()["spec"]["template"]["spec"], path) == want


@pytest.mark.parametrize(("path", "want"), CONTAINER_RULES, ids=[path for path, _ in CONTAINER_RULES])
def test_daemonset_container(path: str, want: Any) -> None:
    """One rule for the container."""
    assert at(container_of(daemonset()), path) == want


def test_daemonset_update() -> None:
    """The new Pod comes before the old one goes, and both are found by the same labels."""
    spec = daemonset()["spec"]
    assert spec["updateStrategy"] == {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 1, "maxUnavailable": 0}}
    assert spec["selector"]["matchLabels"].items() <= spec["template"]["metadata"]["labels"].items()


def test_daemonset_image() -> None:
    """It runs what `./build.sh image` makes of this version, and has no file from the host."""
    assert container_of(daemonset())["image"] == f"tt-device-plugin:{tt.__version__}"


def test_daemonset_host() -> None:
    """Nothing of the host but two folders, and of these the kubelet's alone is writable; the flags name the same paths."""
    spec = daemonset()["spec"]["template"]["spec"]
    mounts = {mount["name"]: mount for mount in container_of(daemonset())["volumeMounts"]}
    hosts = {volume["hostPath"]["path"]: mounts[volume["name"]] for volume in spec["volumes"]}
    assert hosts.keys() == {"/var/lib/kubelet/device-plugins", "/dev"}
    assert {path for path, mount in hosts.items() if not mount.get("readOnly")} == {"/var/lib/kubelet/device-plugins"}
    settings = tt.parse(container_of(daemonset())["args"], {})
    assert str(settings.dev_root) == hosts["/dev"]["mountPath"]
    assert f"{settings.kubelet_dir}/device-plugins" == hosts["/var/lib/kubelet/device-plugins"]["mountPath"]


def test_daemonset_port() -> None:
    """What the plugin listens on is the port that is declared, probed and scraped."""
    container = container_of(daemonset())
    (port,) = container["ports"]
    annotations = daemonset()["spec"]["template"]["metadata"]["annotations"]
    assert tt.parse(container["args"], {}).listen == ("", port["containerPort"])
    assert annotations["prometheus.io/port"] == str(port["containerPort"]) and port["name"] == "metrics"
    assert (annotations["prometheus.io/scrape"], annotations["prometheus.io/path"]) == ("true", "/metrics")


def patched(manifest: dict[str, Any], patch: list[dict[str, Any]]) -> dict[str, Any]:
    """A JSON patch (RFC 6902), of which README uses `add` at the end of a list and `replace`."""
    for step in patch:
        *path, last = step["path"].strip("/").split("/")
        target: Any = manifest
        for key in path:
            target = target[int(key) if isinstance(target, list) else key]
        if step["op"] == "add" and last == "-":
            target.append(step["value"])
        else:
            assert step["op"] == "replace" and target[int(last)], step
            target[int(last)] = step["value"]
    return manifest


@module_only
def test_readme_cards_made_up_on_a_cluster(kubelet: Kubelet, launch: Launch) -> None:
    """README's patch for a cluster without cards: valid, with a folder for the made-up tree, and its cards are offered."""
    (patch,) = [json.loads(found) for block in blocks("sh") for found in re.findall(r"--patch '(\[.*?\])'", block, re.S)]
    manifest = patched(daemonset(), patch)
    kubernetes_validate.validate(manifest, KUBERNETES[-1], strict=True)
    container = container_of(manifest)
    volumes = {volume["name"]: volume for volume in manifest["spec"]["template"]["spec"]["volumes"]}
    assert [volumes[mount["name"]] for mount in container["volumeMounts"] if mount["mountPath"] == "/tmp"] == [
        {"name": "tmp", "emptyDir": {}}
    ]
    settings = tt.parse(container["args"], {})
    assert settings.listen == tt.parse(container_of(daemonset())["args"], {}).listen, "the probes still find it"
    kubelet.start()
    plugin = launch(None, kubelet, *(flag for flag in container["args"] if flag.startswith("--fake")))
    kubelet.wait_status(R150, 2, 2)
    kubelet.wait_status("tenstorrent.com/p300", 1, 1)
    plugin.end()


# README: what can be run -------------------------------------------------------------------------------------------------


def readme_pods() -> list[dict[str, Any]]:
    """The Pods in README.md."""
    documents = [yaml.safe_load(block) for block in blocks("yaml") if "kind: Pod" in block]
    assert documents, "README has no Pods"
    return documents


def test_readme_pods(kubelet: Kubelet, tree: Tree, launch: Launch) -> None:
    """README's Pods are admitted and started on a node that has such cards, with what README says they find."""
    (tree.dev / "hugepages-1G").mkdir()
    chips = [*(replace(chip, iommu=None) for chip in N150[:3]), *P300, *galaxy_chips("wormhole")]
    for n, chip in enumerate(chips):
        bdf = chip.bdf if n < 5 else "0001" + chip.bdf[4:]  # a Galaxy beside other cards: in another PCI domain
        tree.add(replace(chip, n=n, bdf=bdf, heartbeat=False))
    kubelet.start()
    launch(tree, kubelet)
    for resource, count in ((R150, 3), ("tenstorrent.com/p300", 1), ("tenstorrent.com/galaxy-wormhole", 32)):
        kubelet.wait_status(resource, count, count)
    got = {}
    for pod in readme_pods():
        (container,) = pod["spec"]["containers"]
        want = {name: count for name, count in container["resources"]["limits"].items() if name.startswith("tenstorrent.com/")}
        name = pod["metadata"]["name"]
        kubelet.admit(name, want)
        got[name] = kubelet.start_container(name)
    assert {name: len(answer["devices"]) for name, answer in got.items()} == {
        "one-n150": 1, "one-p300": 2, "two-n150-with-hugepages": 2, "one-galaxy-tray": 8,
    }  # fmt: skip
    assert [mount["container_path"] for mount in got["two-n150-with-hugepages"]["mounts"]] == ["/dev/hugepages-1G"]
    tray = got["one-galaxy-tray"]["envs"]["PCIDEVICE_TENSTORRENT_COM_GALAXY_WORMHOLE"].split(",")
    assert len({address[:6] for address in tray}) == 1, "eight chips of one tray"


@pytest.mark.parametrize("version", KUBERNETES)
def test_readme_pods_schema(version: str) -> None:
    """README's Pods are valid."""
    for pod in readme_pods():
        kubernetes_validate.validate(pod, version, strict=True)


def test_readme_unit(tmp_path: Path) -> None:
    """README's systemd unit, taken out by README's own command: systemd finds no fault, and the exposure README says."""
    if not shutil.which("systemd-analyze"):
        pytest.skip("there is no systemd-analyze: it is in the package systemd")
    (line,) = [line for block in blocks("sh") for line in block.splitlines() if line.startswith("sed -n")]
    unit = tmp_path / "tt-device-plugin.service"
    take = line.replace("/etc/systemd/system/tt-device-plugin.service", str(unit)).replace("README.md", str(HERE / "README.md"))
    subprocess.run(["sh", "-ec", take], check=True)
    (file,) = re.findall(r"^ExecStart=\S+ (\S+)$", unit.read_text(), re.M)
    assert any(file in block for block in blocks("sh") if "install -D" in block), "the unit starts what was installed"
    verify = subprocess.run(["systemd-analyze", "verify", str(unit)], capture_output=True, text=True)
    assert verify.returncode == 0 and not verify.stderr, verify.stderr
    check = ["systemd-analyze", "security", "--offline=true", str(unit)]
    if "--offline" not in subprocess.run(["systemd-analyze", "--help"], capture_output=True, text=True).stdout:
        pytest.skip("this systemd-analyze is older than 250: it judges loaded units only")
    text = subprocess.run(check, capture_output=True, text=True, env={**os.environ, "LC_ALL": "C.UTF-8"}).stdout
    found, said = re.search(r"exposure level for \S+: (\d+\.\d)", text), re.search(r"exposure level of (\d+\.\d)", README)
    assert found and said, text
    assert float(found[1]) <= float(said[1]) < 2, text


def test_readme_apply() -> None:
    """README's line puts the image's name into the manifest, and changes nothing else."""
    (line,) = [line for block in blocks("sh") for line in block.splitlines() if line.endswith("| kubectl apply -f -")]
    (name,) = [line for block in blocks("sh") for line in block.splitlines() if line.startswith("IMAGE=")]
    script = f"{name}\n{line.removesuffix('| kubectl apply -f -')}"
    manifest = yaml.safe_load(subprocess.run(["sh", "-ec", script], capture_output=True, cwd=HERE, check=True).stdout)
    image = manifest["spec"]["template"]["spec"]["containers"][0].pop("image")
    assert f"IMAGE={image}" == name
    wanted = daemonset()
    del wanted["spec"]["template"]["spec"]["containers"][0]["image"]
    assert manifest == wanted


def test_readme_install(tmp_path: Path) -> None:
    """README's line puts the file where the unit starts it, executable for all and writable for its owner alone."""
    (line,) = {line for block in blocks("sh") for line in block.splitlines() if line.startswith("install -D")}
    (tmp_path / "dist").mkdir()
    (tmp_path / "dist/tt-device-plugin.pyz").write_bytes(b"#!")
    subprocess.run(["sh", "-ec", line.replace(" /opt", f" {tmp_path}/opt")], check=True, cwd=tmp_path)
    mode = (tmp_path / "opt/tenstorrent/tt-device-plugin.pyz").stat().st_mode
    assert stat.S_IMODE(mode) == 0o755


def readme_command() -> list[str]:
    """The flags of the first command in README, which needs neither cards nor a cluster."""
    (flags,) = re.findall(r"^\./build\.sh run (.*)$", blocks("sh")[0], re.M)
    return list(flags.split())


def test_readme_first_command(command: list[str]) -> None:
    """README's first output is what the command prints, where it is not cut."""
    done = run(command, *readme_command())
    assert done.returncode == 0, done.stdout + done.stderr
    printed = [" ".join(line.split()) for line in done.stdout.splitlines()]
    for line in blocks("text")[0].splitlines():
        pattern = re.escape(" ".join(line.split())).replace(r"\.\.\.", ".*")
        pattern = re.sub(r"-[0-9a-f]{6}\\\.sock", r"-[0-9a-f]{6}\.sock", pattern)  # another process, another name
        assert any(re.fullmatch(pattern, one) for one in printed), f"{line!r} is not in:\n{done.stdout}"


# README: what it lists ---------------------------------------------------------------------------------------------------


@module_only
def test_readme_flags(command: list[str]) -> None:
    """README has each flag that --help has, with its variable, and no other."""
    known = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", run(command, "--help", COLUMNS="200").stdout))
    listed: dict[str, str] = {}
    for flags, variable, *_ in rows("Flags"):
        for flag in re.findall(r"--[a-z][a-z-]+", flags):
            listed[flag] = variable.strip("`")
    assert listed.keys() == known
    assert {flag: variable for flag, variable in listed.items() if variable != "none"} == {
        flag: "TT_DEVICE_PLUGIN_" + flag[2:].upper().replace("-", "_") for flag in known - {"--help", "--version"}
    }


@module_only
def test_readme_no_stale_flags(command: list[str]) -> None:
    """Every flag that README or daemonset.yaml gives to the plugin is one."""
    known = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", run(command, "--help", COLUMNS="200").stdout))
    lines = re.findall(r"\.pyz --.*$|^\./build\.sh run .*$", README, re.M)
    used = {flag for line in lines for flag in re.findall(r"--[a-z-]+", line)}
    used |= {flag.partition("=")[0] for flag in container_of(daemonset())["args"]}
    assert used and used <= known


def test_readme_files() -> None:
    """README lists each file of the repository, and no other."""
    if not (HERE / ".git").exists() or not shutil.which("git"):
        pytest.skip("no git here, so it is not known which files belong to the repository")
    known = subprocess.run(["git", "ls-files"], cwd=HERE, capture_output=True, text=True, check=True).stdout.split()
    listed = [name for cell, *_ in rows("Files") for name in re.findall(r"`([^`]+)`", cell)]
    assert sorted(listed) == sorted(set(known) - {".gitignore", "README.md"})


def test_readme_links() -> None:
    """Each link within README leads to a heading."""
    headings = {re.sub(r"[^a-z0-9 -]", "", line.lower()).replace(" ", "-") for line in re.findall(r"^#+ (.*)$", README, re.M)}
    links = set(re.findall(r"\]\(#([^)]+)\)", README))
    assert links and links <= headings


def test_readme_version() -> None:
    """README names this version where it names one."""
    assert set(re.findall(r"tt-device-plugin:(\d+\.\d+\.\d+)", README)) == {tt.__version__}


# README: troubleshooting. Each row's symptom is made here, and must read as README says ("..." stands for anything) --------


@dataclass
class Scene:
    """What a symptom is made with."""

    tree: Tree
    kubelet: Kubelet
    launch: Launch
    command: list[str]
    room: Path

    def log(self, pattern: str, *flags: str, **popen: Any) -> str:
        """The plugin's line that matches, once it is there."""
        return self.launch(self.tree, self.kubelet, *flags, **popen).wait_for_line(pattern).text

    def list(self) -> str:
        """What --list prints, in one line."""
        return " ".join(run(self.command, *self.tree.flags, "--list").stdout.split())

    def serve(self, *chips: Chip) -> Plugin:
        """A node with these chips, all of them registered."""
        for chip in chips:
            self.tree.add(replace(chip, heartbeat=False))
        self.kubelet.start()
        plugin = self.launch(self.tree, self.kubelet, "--poll-seconds", "0.1")
        self.kubelet.wait_status(R150, len(chips), len(chips))
        return plugin


def no_kubelet(scene: Scene) -> str:
    """A card, the folder, and no kubelet in it."""
    scene.tree.add(N150[0])
    scene.kubelet.folder.mkdir(parents=True)
    return scene.log("kubelet.sock")


def no_driver(scene: Scene) -> str:
    """A node without tt-kmd."""
    shutil.rmtree(scene.tree.sys / "class")
    shutil.rmtree(scene.tree.sys / "module")
    return scene.log("no cards")


def other_driver(scene: Scene) -> str:
    """A PCI function bound to vfio-pci."""
    scene.tree.add(N150[0])
    scene.tree.class_link(N150[0].bdf).unlink()
    shutil.rmtree(scene.tree.pci(N150[0].bdf) / "tenstorrent")
    scene.tree.node(N150[0].bdf).unlink()
    (scene.tree.sys / "bus/pci/drivers/vfio-pci").mkdir(parents=True)
    (scene.tree.pci(N150[0].bdf) / "driver").symlink_to(scene.tree.sys / "bus/pci/drivers/vfio-pci")
    return scene.list()


def no_telemetry(scene: Scene) -> str:
    """A chip whose firmware has not answered yet."""
    scene.tree.add(replace(N150[0], card_type=None, asic_id=None, serial=None, firmware=None, heartbeat=False, hwmon=False))
    return scene.list()


def half_a_p300(scene: Scene) -> str:
    """One of its two chips."""
    scene.tree.add(P300[0])
    return scene.list()


def unknown_model(scene: Scene) -> str:
    """A board newer than the driver."""
    scene.tree.add(replace(N150[0], card_type="unknown"))
    return scene.list()


def wrong_dev(scene: Scene) -> str:
    """sysfs has a chip, and /dev does not."""
    scene.tree.add(N150[0])
    scene.tree.node(N150[0].bdf).unlink()
    return scene.list()


def card_gone(scene: Scene) -> str:
    """A card vanishes."""
    plugin = scene.serve(N150[0])
    scene.tree.remove(N150[0].bdf)
    return plugin.wait_for_line("unhealthy").text


def admitted_too_late(scene: Scene) -> str:
    """A Pod was scheduled to a card that has failed."""
    scene.serve(N150[0])
    mark = scene.kubelet.log.mark()
    scene.tree.remove(N150[0].bdf)
    scene.kubelet.wait_status(R150, 1, 0, after=mark)
    with pytest.raises(Refusal) as caught:
        scene.kubelet.allocate(R150, [N150[0].id])
    return caught.value.message


def number_moved(scene: Scene) -> str:
    """A card comes back with another N while a Pod holds it; there are no by-id links."""
    scene.serve(N150[0])
    scene.kubelet.admit("pod", {R150: 1})
    mark = scene.kubelet.log.mark()
    scene.tree.remove(N150[0].bdf)
    scene.kubelet.wait_status(R150, 1, 0, after=mark)
    scene.tree.add(replace(N150[0], n=1, heartbeat=False))
    scene.kubelet.wait_status(R150, 1, 1, after=mark)
    with pytest.raises(Refusal) as caught:
        scene.kubelet.start_container("pod")
    return caught.value.message


def not_root(scene: Scene) -> str:
    """The folder is another user's. Root passes all the same, but for one without capabilities, as in the DaemonSet."""
    scene.kubelet.folder.mkdir(parents=True, mode=0)
    without: list[str] = []
    if os.getuid() == 0:
        if not shutil.which("setpriv"):
            pytest.skip("there is no setpriv to take root's capabilities away: it is in the package util-linux")
        os.chown(scene.kubelet.folder, NOBODY, NOBODY)
        without = ["setpriv", "--bounding-set=-all", "--inh-caps=-all"]
    done = run([*without, *scene.command], "--kubelet-dir", str(scene.kubelet.root), *scene.tree.flags)
    assert done.returncode == 1
    return done.stderr


def second_instance(scene: Scene) -> str:
    """Two of them."""
    scene.serve(N150[0])
    return scene.log("standing by")


def kubelet_refuses(scene: Scene) -> str:
    """A kubelet that answers with an error."""
    scene.tree.add(N150[0])
    scene.kubelet.start(faults={"register_fails": 1000})
    return scene.log("has not registered")


def other_python(scene: Scene) -> str:
    """A file with the native modules of no Python."""
    if not PYZ.exists():
        pytest.skip("dist/tt-device-plugin.pyz is not built: ./build.sh makes it")
    other = scene.room / "other.pyz"
    with zipfile.ZipFile(PYZ) as packed, zipfile.ZipFile(other, "w") as made:
        made.writestr("__main__.py", packed.read("__main__.py"))
    done = subprocess.run([sys.executable, str(other)], capture_output=True, text=True)
    assert done.returncode == 1
    return done.stderr


def port_taken(scene: Scene) -> str:
    """Another program listens."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        line = scene.log("no HTTP", "--listen", f"127.0.0.1:{taken.getsockname()[1]}")
        return line.replace(str(taken.getsockname()[1]), "7762")


SCENES: dict[str, Callable[[Scene], str]] = {
    "no kubelet listens at ...kubelet.sock: waiting for it to start": no_kubelet,
    "no cards here, driver not loaded: waiting for some to appear": no_driver,
    "it has no device node: its PCI driver is vfio-pci, not tenstorrent": other_driver,
    "its telemetry is not there yet": no_telemetry,
    "one chip of a p300 by itself": half_a_p300,
    "tenstorrent.com/wormhole": unknown_model,
    "its device node /dev/tenstorrent/0 is missing or another device": wrong_dev,
    "is Unhealthy: ...": card_gone,
    "not healthy since ...": admitted_too_late,
    "it was /dev/tenstorrent/0 when this Pod was admitted": number_moved,
    "cannot make sockets in ...": not_root,
    "another instance serves ...: standing by until it ends": second_instance,
    "the kubelet has not registered it: ...": kubelet_refuses,
    "is not for this Python": other_python,
    "no HTTP on port 7762 of ...: Address already in use": port_taken,
}


def test_troubleshooting_is_all_made() -> None:
    """Each row of the table has its scene, and each scene its row."""
    assert sorted(code(symptom) for symptom, *_ in rows("Troubleshooting")) == sorted(SCENES)


@pytest.mark.parametrize("symptom", SCENES)
@module_only
def test_troubleshooting(tree: Tree, kubelet: Kubelet, launch: Launch, command: list[str], room: Path, symptom: str) -> None:
    """The symptom reads as README says."""
    text = SCENES[symptom](Scene(tree, kubelet, launch, command, room))
    assert re.search(".+".join(map(re.escape, symptom.split("..."))), text), text


# CDI, as the runtimes read it ---------------------------------------------------------------------------------------------

# From the CDI specification and what its Go library refuses (tags.cncf.io/container-device-interface, SPEC.md, pkg/parser,
# pkg/cdi). One mistake voids the whole file, and podman 4.3 then says no more than "unresolvable CDI devices".
CDI_EDITS: dict[str, Any] = {
    "type": "object",
    "minProperties": 1,  # a device that changes nothing is refused
    "additionalProperties": False,
    "properties": {
        "env": {"type": "array", "minItems": 1, "items": {"type": "string", "pattern": "^[^=]+="}},
        "deviceNodes": {
            "type": "array",
            "minItems": 1,
            "items": {
                "type": "object",
                "required": ["path"],
                "additionalProperties": False,
                "properties": {
                    "path": {"type": "string", "pattern": "^/dev/."},
                    "hostPath": {"type": "string", "pattern": "^/dev/."},
                    "permissions": {"type": "string", "pattern": "^[rwm]{1,3}$"},
                },  # type, major, minor are left out: the runtime looks, when the container starts, and a major is not for ever
            },
        },
        "mounts": {
            "type": "array",
            "minItems": 1,
            "items": {
                "type": "object",
                "required": ["hostPath", "containerPath"],
                "additionalProperties": False,
                "properties": {
                    "hostPath": {"type": "string", "pattern": "^/."},
                    "containerPath": {"type": "string", "pattern": "^/."},
                    "options": {"type": "array", "items": {"type": "string"}},
                },
            },
        },
    },
}
CDI_NAME = "^[A-Za-z0-9]([A-Za-z0-9_.:-]*[A-Za-z0-9])?$"
CDI_SCHEMA: dict[str, Any] = {
    "type": "object",
    "required": ["cdiVersion", "kind", "devices"],
    "additionalProperties": False,
    "properties": {
        "cdiVersion": {"enum": ["0.3.0", "0.4.0", "0.5.0"]},  # what podman 4.3 takes
        "kind": {"type": "string", "pattern": r"^[A-Za-z][A-Za-z0-9_.-]*[A-Za-z0-9]/[A-Za-z][A-Za-z0-9_-]*[A-Za-z0-9]$"},
        "containerEdits": CDI_EDITS,
        "devices": {
            "type": "array",
            "minItems": 1,
            "items": {
                "type": "object",
                "required": ["name", "containerEdits"],
                "additionalProperties": False,
                "properties": {"name": {"type": "string", "pattern": CDI_NAME}, "containerEdits": CDI_EDITS},
            },
        },
    },
}


def check_cdi_spec(path: Path) -> dict[str, Any]:
    """The specification in a file, which every runtime since podman 4.3 takes; AssertionError or ValidationError if not."""
    spec: dict[str, Any] = json.loads(path.read_text())
    jsonschema.validate(spec, CDI_SCHEMA)
    assert path.name == spec["kind"].replace("/", "-") + ".json" and stat.S_IMODE(path.stat().st_mode) == 0o644, path
    names = [device["name"] for device in spec["devices"]]
    assert len(names) == len(set(names)), f"a name twice: {names}"
    edits = [device["containerEdits"] for device in spec["devices"]]
    nodes = [node for edit in edits for node in edit.get("deviceNodes", [])]
    newer = any("hostPath" in node for node in nodes) or any(name[0].isdigit() for name in names)
    assert not newer or spec["cdiVersion"] == "0.5.0", "hostPath, and names that begin with a digit, came with 0.5.0"
    for edit in edits:
        inside = [node["path"] for node in edit.get("deviceNodes", [])]
        assert len(inside) == len(set(inside)), f"one path for two device nodes: {inside}"
    for node in nodes:  # a link is refused when a container starts
        host = Path(node.get("hostPath", node["path"]))
        assert "by-id" not in host.parts and not host.is_symlink(), f"{host} is a link"
    return spec


GOOD_SPEC: dict[str, Any] = {
    "cdiVersion": "0.5.0",
    "kind": "tenstorrent.com/card",
    "devices": [
        {
            "name": name,
            "containerEdits": {"deviceNodes": [{"path": "/dev/tenstorrent/0", "hostPath": "/dev/null", "permissions": "rw"}]},
        }
        for name in ("wormhole-FA4E001800000000", "0", "0000:01:00.0", "all")
    ],
}

# Each was refused by podman 4.3.1, or would be by a later one.
BAD_SPECS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "a version that podman 4.3 does not know": lambda spec: spec.update(cdiVersion="0.6.0"),
    "hostPath in a version without it": lambda spec: spec.update(cdiVersion="0.4.0"),
    "no devices": lambda spec: spec.update(devices=[]),
    "an unknown field": lambda spec: spec.update(comment="made by hand"),
    "annotations, which need 0.6.0": lambda spec: spec.update(annotations={"a": "b"}),
    "a dot in the class, which needs 0.6.0": lambda spec: spec.update(kind="tenstorrent.com/card.n150"),
    "a kind without a vendor": lambda spec: spec.update(kind="card"),
    "a device that changes nothing": lambda spec: spec["devices"][0].update(containerEdits={}),
    "a device without edits": lambda spec: spec["devices"][0].pop("containerEdits"),
    "a name twice": lambda spec: spec["devices"].append(spec["devices"][0]),
    "a slash in a name": lambda spec: spec["devices"][0].update(name="n150/0"),
    "a name that ends with a dash": lambda spec: spec["devices"][0].update(name="n150-"),
    "permissions that are none": lambda spec: spec["devices"][0]["containerEdits"]["deviceNodes"][0].update(permissions="x"),
    "a link as device node": lambda spec: spec["devices"][0]["containerEdits"]["deviceNodes"][0].update(hostPath="/dev/stdin"),
    "a device node twice": lambda spec: spec["devices"][0]["containerEdits"]["deviceNodes"].append(
        {"path": "/dev/tenstorrent/0", "hostPath": "/dev/zero"}
    ),
}


def write_spec(folder: Path, spec: dict[str, Any]) -> Path:
    """The file, as a runtime looks for it."""
    path = folder / "tenstorrent.com-card.json"
    path.write_text(json.dumps(spec))
    path.chmod(0o644)
    return path


def test_check_of_cdi_specs(tmp_path: Path) -> None:
    """The check itself: what podman took."""
    assert check_cdi_spec(write_spec(tmp_path, GOOD_SPEC)) == GOOD_SPEC


@pytest.mark.parametrize("mistake", BAD_SPECS)
def test_check_of_bad_cdi_specs(tmp_path: Path, mistake: str) -> None:
    """The check itself: one mistake at a time."""
    spec = copy.deepcopy(GOOD_SPEC)
    BAD_SPECS[mistake](spec)
    with pytest.raises((AssertionError, jsonschema.ValidationError)):
        check_cdi_spec(write_spec(tmp_path, spec))


# In a mount namespace of its own, with an empty /run, so that no spec and no container of this machine is in the way. As
# hardly any container lets one raise limits, the limits stay what they are. runc, as crun refuses some hosts' cgroups.
PODMAN = r"""
mount -t tmpfs none /run
mkdir /run/cdi
cp "$1" /run/cdi
shift
exec podman --root "$STATE/root" --runroot "$STATE/run" --tmpdir "$STATE/tmp" --cgroup-manager cgroupfs --runtime runc \
    run --rm --network none --ulimit nofile=1024:1024 --ulimit nproc=1024:1024 "$@"
"""


@module_only
def test_podman_takes_the_cdi_spec(kubelet: Kubelet, launch: Launch, room: Path) -> None:
    """README's --device tenstorrent.com/card=...: a container of podman gets the device nodes of that card, and no other."""
    missing = [tool for tool in ("podman", "runc", "busybox", "unshare") if not shutil.which(tool)]
    if missing or os.getuid() != 0:
        pytest.skip(f"needs root, and podman, runc, busybox (static) and unshare; missing: {missing or 'root'}")
    (room / "cdi").mkdir()
    (room / "state").mkdir()
    (room / "root/bin").mkdir(parents=True)
    for name in ("dev", "proc", "sys", "run", "etc"):
        (room / "root" / name).mkdir()
    shutil.copy(str(shutil.which("busybox")), room / "root/bin/busybox")
    kubelet.start()
    plugin = launch(None, kubelet, "--fake", "n150=2,p300=1", "--cdi-dir", str(room / "cdi"))
    kubelet.wait_status("tenstorrent.com/p300", 1, 1)
    path = room / "cdi/tenstorrent.com-card.json"
    check_cdi_spec(path)
    (p300,) = kubelet.ids("tenstorrent.com/p300")
    ls, environment = ["/bin/busybox", "ls", "/dev/tenstorrent"], {**os.environ, "STATE": str(room / "state")}
    for name, nodes in {"all": "0 1 2 3", "1": "1", p300: "2 3"}.items():
        arguments = [str(path), "--device", f"tenstorrent.com/card={name}", "--rootfs", str(room / "root"), *ls]
        command = ["unshare", "--mount", "sh", "-ec", PODMAN, "sh", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)
        assert done.returncode == 0, done.stderr
        assert done.stdout.split() == nodes.split(), done.stdout
    plugin.end()


########################################################################################################################
# 9. Benchmarks: ./build.sh bench, or python test_plugin.py --bench
#
# Every figure stands beside a bare baseline that is measured in the same run and in turn with it, so that a busy machine
# slows both, and the ratio holds. Nothing here fails a build: a target that is missed is marked, no more.
########################################################################################################################

# What a plugin cannot be smaller than: a gRPC server with the stubs' service, and handlers that answer nothing.
EMPTY_SERVER = """
import asyncio, sys
import grpc, grpc.aio
import api_pb2 as api, api_pb2_grpc as rpc

class Empty(rpc.DevicePluginServicer):
    async def Allocate(self, request, context):
        return api.AllocateResponse()
    async def GetPreferredAllocation(self, request, context):
        return api.PreferredAllocationResponse()

async def main():
    server = grpc.aio.server()
    rpc.add_DevicePluginServicer_to_server(Empty(), server)
    server.add_insecure_port("unix:" + sys.argv[1])
    await server.start()
    print("serving", flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""

# One poll after the first, and what no poll can do without, each between two marks for whoever reads the trace.
TRACED_POLL = """
import os, sys, time
from pathlib import Path
import tt_device_plugin as tt

def mark():
    try:
        os.stat("/mark of the benchmark")
    except OSError:
        pass

inventory = tt.Inventory(tt.Settings(sysfs_root=Path(sys.argv[1]), dev_root=Path(sys.argv[2])))
inventory.poll(time.monotonic())
mark()
inventory.poll(time.monotonic())
mark()
top = sys.argv[1] + "/class/tenstorrent"
for name in os.listdir(top):
    fd = os.open(top + "/" + name + "/tt_heartbeat", os.O_RDONLY)
    os.read(fd, 4096)
    os.close(fd)
mark()
"""


class Figure(NamedTuple):
    """One line of the table."""

    name: str
    unit: str
    samples: list[float]
    bare: list[float]  # the baseline's; [] if it has none
    against: str  # what the baseline is
    most: Mapping[str, float] = MappingProxyType({})  # targets: the largest p50, p99 or ratio (of both p50) that is wanted

    def numbers(self) -> dict[str, float]:
        """What the table shows: n, p50, p99, and with a baseline also base and ratio."""
        shown = {"n": len(self.samples), "p50": percentile(self.samples, 0.5), "p99": percentile(self.samples, 0.99)}
        if self.bare:
            shown["base"] = percentile(self.bare, 0.5)
            if shown["base"] > 0:
                shown["ratio"] = shown["p50"] / shown["base"]
        return shown

    def missed(self) -> list[str]:
        """The targets that this run has missed."""
        numbers = self.numbers()
        return [what for what, limit in self.most.items() if numbers.get(what, 0.0) > limit]


def percentile(samples: list[float], part: float) -> float:
    """The smallest sample that so many of all do not exceed: of less than 100, the 99th percentile is the largest."""
    return sorted(samples)[max(0, math.ceil(part * len(samples)) - 1)]


class Stage:
    """Where the benchmarks run: a folder, and what they start in it. A context; everything ends with it."""

    def __init__(self, quick: bool) -> None:
        self.quick = quick
        self.numbers = itertools.count()
        self.stack = contextlib.ExitStack()
        self.room = Path(tempfile.mkdtemp(prefix="tt-"))
        self.stack.callback(shutil.rmtree, self.room, ignore_errors=True)

    def __enter__(self) -> Stage:
        return self

    def __exit__(self, *_: object) -> None:
        self.stack.close()

    def times(self, often: int, few: int) -> range:
        """How often to repeat."""
        return range(few if self.quick else often)

    def tree(self, count: int) -> Tree:
        """A node with so many n150."""
        chips = [Chip(f"{n >> 8:04x}:{n & 255:02x}:00.0", n, asic_id=f"0D0CB6F1E7A5{n:04X}") for n in range(count)]
        return Tree(self.room / f"tree{next(self.numbers)}", chips)

    def galaxy(self) -> Tree:
        """A Galaxy: four trays of eight chips; the bus numbers are facts, the rest is made up."""
        places = [(tray, position) for tray in (0xC0, 0x80, 0x00, 0x40) for position in range(1, 9)]
        chips = [
            Chip(f"0000:{tray + position:02x}:00.0", n, GALAXY, f"0D0CB6F1E7A5{n:04X}", subsystem_device="0x0035")
            for n, (tray, position) in enumerate(places)
        ]
        return Tree(self.room / f"tree{next(self.numbers)}", chips)

    def beat(self, tree: Tree) -> None:
        """Keeps the hearts of this tree's chips beating till the end. In place, as in sysfs: a folder that a file is moved
        into has another change time, and the plugin takes it for another chip's."""
        files = [self.stack.enter_context((tree.entry(bdf) / "tt_heartbeat").open("r+b", buffering=0)) for bdf in tree.chips]
        done = threading.Event()

        def run() -> None:
            for beat in itertools.count(1000):
                for file in files:
                    os.pwrite(file.fileno(), b"%d\n" % beat, 0)
                if done.wait(0.4):
                    return

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        self.stack.callback(thread.join)
        self.stack.callback(done.set)

    def kubelet(self) -> Kubelet:
        """One that answers."""
        kubelet = self.stack.enter_context(contextlib.closing(Kubelet(self.room / f"k{next(self.numbers)}")))
        kubelet.start()
        return kubelet

    def plugin(self, way: Way, tree: Tree, kubelet: Kubelet, *flags: str, read_log: bool = True) -> Plugin:
        """A plugin process."""
        command = [*way.command, "--kubelet-dir", str(kubelet.root), *tree.flags, *flags]
        if not read_log:
            command = ["sh", "-c", 'exec "$@" 2>"$0"', str(self.room / f"log{next(self.numbers)}"), *command]
        return self.stack.enter_context(contextlib.closing(Plugin(command, cwd=way.folder)))

    def empty(self, way: Way) -> tuple[subprocess.Popen[str], str]:
        """An empty server that serves, and gRPC's name for its socket."""
        path = self.room / f"empty{next(self.numbers)}.sock"
        command = [sys.executable, "-c", EMPTY_SERVER, str(path)]
        server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=way.folder)
        self.stack.callback(server.wait)
        self.stack.callback(server.kill)
        assert server.stdout and server.stdout.readline() == "serving\n"
        return server, f"unix:{path}"

    def module(self) -> Way:
        """`python3 -m` of the three files, with bytecode."""
        folder = self.room / "module"
        if not folder.exists():
            lay_out(folder)
        return Way([sys.executable, "-m", "tt_device_plugin"], folder)

    def ways(self) -> dict[str, Way]:
        """All ways to start the plugin. `script` compiles itself at each start, the others have bytecode."""
        image = self.room / "image"
        site = Path(grpc.__file__).parents[1]
        for package in ("grpc", "google"):  # with their bytecode, which fits by date
            shutil.copytree(site / package, image / package)
        lay_out(image)
        ways = {
            "script": Way([sys.executable, str(HERE / "tt_device_plugin.py")], HERE),
            "module": self.module(),
            # Not the test environment's Python but the one behind it, so that the folder's packages are the only ones.
            "image": Way([os.path.realpath(sys.executable), "-m", "tt_device_plugin"], image),
        }
        if PYZ.exists():
            ways["pyz"] = Way([sys.executable, str(PYZ)], self.room)
        return ways


def lay_out(folder: Path) -> None:
    """The plugin's files, with bytecode."""
    folder.mkdir(exist_ok=True)
    for name in ("tt_device_plugin.py", "api_pb2.py", "api_pb2_grpc.py"):
        shutil.copy(HERE / name, folder)
    compileall.compile_dir(folder, quiet=2, maxlevels=0)


class Way(NamedTuple):
    """A command that starts the plugin, and the folder to start it in."""

    command: list[str]
    folder: Path


GALAXY = "galaxy-wormhole"
SYSFS_FILE = Path("/sys/class/net/lo/mtu")  # one that every Linux has
SERVICE = "/v1beta1.DevicePlugin/"


class Effort(NamedTuple):
    """What a process has used since it began."""

    cpu_s: float
    wakeups: int


def effort(pid: int) -> Effort:
    """Of all its threads; one that ends meanwhile is left out."""
    cpu = wakeups = 0
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            cpu += int((task / "schedstat").read_text().split()[0])
            wakeups += int(re.findall(r"^voluntary_ctxt_switches:\s+(\d+)", (task / "status").read_text(), re.M)[0])
    return Effort(cpu / 1e9, wakeups)


def bench_start(stage: Stage) -> Iterator[Figure]:
    """Process start to Register at the kubelet. CPU time beside it: a busy machine stretches one, not the other."""
    ways, tree, kubelet = stage.ways(), stage.tree(4), stage.kubelet()
    wall: dict[str, list[float]] = {}
    cpu: dict[str, list[float]] = {}
    for _ in stage.times(20, 1):
        used, began = getrusage(RUSAGE_CHILDREN), time.monotonic()
        subprocess.run([sys.executable, "-c", "import grpc"], check=True)
        wall.setdefault("bare", []).append((time.monotonic() - began) * 1e3)
        now = getrusage(RUSAGE_CHILDREN)
        cpu.setdefault("bare", []).append((now.ru_utime + now.ru_stime - used.ru_utime - used.ru_stime) * 1e3)
        began = time.monotonic()
        server, _ = stage.empty(ways["module"])
        wall.setdefault("empty", []).append((time.monotonic() - began) * 1e3)
        cpu.setdefault("empty", []).append(effort(server.pid).cpu_s * 1e3)
        server.kill()
        for name, way in ways.items():
            mark = kubelet.log.mark()
            plugin = stage.plugin(way, tree, kubelet)
            registered = kubelet.wait("register", after=mark, timeout=30)["t"]
            cpu.setdefault(name, []).append(effort(plugin.process.pid).cpu_s * 1e3)
            wall.setdefault(name, []).append((registered - plugin.started) * 1e3)
            kubelet.wait_status(R150, 4, 4, after=mark)
            plugin.end()
    against = "import grpc"
    yield Figure("empty server to serving", "ms", wall["empty"], wall["bare"], against)
    yield Figure("the same, CPU", "ms", cpu["empty"], cpu["bare"], against)
    for name in ways:
        yield Figure(f"{name} to Register", "ms", wall[name], wall["bare"], against, {"ratio": 1.6} if name == "module" else {})
        yield Figure("the same, CPU", "ms", cpu[name], cpu["bare"], against)
    if "pyz" in ways:
        more = [pyz - module for pyz, module in zip(wall["pyz"], wall["module"], strict=True)]
        yield Figure("pyz, more than module", "ms", more, [], "", {"p50": 250.0})


def bench_memory(stage: Stage) -> Iterator[Figure]:
    """What a process holds that has four cards registered and has answered a call.

    Anonymous is what no file on a disk backs. The pyz's native modules lie in files in memory besides, which count as
    resident only as far as they have been used.
    """
    ways, tree, kubelet = stage.ways(), stage.tree(4), stage.kubelet()
    held: dict[tuple[str, str], list[float]] = {}

    def look(way: str, pid: int) -> None:
        rollup = dict(re.findall(r"^(\w+): +(\d+) kB", Path(f"/proc/{pid}/smaps_rollup").read_text(), re.M))
        memory_files = {(one.st_dev, one.st_ino): one.st_blocks * 512 for one in open_files(pid) if not one.st_nlink}
        held.setdefault((way, "resident"), []).append(int(rollup["Rss"]) / 1024)
        held.setdefault((way, "anonymous"), []).append(int(rollup["Anonymous"]) / 1024)
        held.setdefault((way, "memory files"), []).append(sum(memory_files.values()) / 2**20)
        held.setdefault((way, "threads"), []).append(float(held_by(pid).threads))

    for _ in stage.times(5, 1):
        server, address = stage.empty(ways["module"])
        with grpc.insecure_channel(address) as channel:
            raw(channel, SERVICE + "Allocate")(b"", timeout=10)
        look("empty", server.pid)
        server.kill()
        for name, way in ways.items():
            mark = kubelet.log.mark()
            plugin = stage.plugin(way, tree, kubelet)
            kubelet.wait_status(R150, 4, 4, after=mark, timeout=30)
            kubelet.allocate(R150, kubelet.ids(R150)[:1])
            look(name, plugin.process.pid)
            plugin.end()
    for name, what in held:
        if name != "empty" and any(held[name, what]):
            most = {"ratio": 1.12} if (name, what) == ("module", "resident") else {}
            unit = "" if what == "threads" else "MiB"
            yield Figure(f"{name}, {what}", unit, held[name, what], held["empty", what], "empty server", most)


def open_files(pid: int) -> list[os.stat_result]:
    """What a process has open, except what it closes meanwhile."""
    found = []
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            found.append(link.stat())
    return found


def bench_calls(stage: Stage) -> Iterator[Figure]:
    """Allocate and GetPreferredAllocation, by one client, in turn with the same call of the empty server."""
    way = stage.module()
    _, address = stage.empty(way)
    for tree, resource, many in (
        (stage.tree(4), R150, 1),
        (stage.galaxy(), f"tenstorrent.com/{GALAXY}", 8),
    ):
        stage.beat(tree)
        kubelet = stage.kubelet()
        stage.plugin(way, tree, kubelet, read_log=False)  # reading it in this process would hold up its client
        count = len(tree.chips)
        kubelet.wait_status(resource, count, count, timeout=30)
        ids = kubelet.ids(resource)
        endpoint = kubelet.seen("register")[-1]["endpoint"]
        allocate = MESSAGES["AllocateRequest"](container_requests=[{"devices_ids": ids[:many]}])
        one = {"available_deviceIDs": ids, "allocation_size": many}
        prefer = MESSAGES["PreferredAllocationRequest"](container_requests=[one])
        with grpc.insecure_channel(f"unix:{kubelet.folder / endpoint}") as ours, grpc.insecure_channel(address) as theirs:
            for method, request in (("Allocate", allocate), ("GetPreferredAllocation", prefer)):
                calls = [raw(channel, SERVICE + method) for channel in (ours, theirs)]
                times: tuple[list[float], list[float]] = ([], [])
                for number in stage.times(2000, 20):
                    for side in (number % 2, 1 - number % 2):
                        began = time.perf_counter()
                        calls[side](request.SerializeToString(), timeout=10)
                        times[side].append((time.perf_counter() - began) * 1e3)
                most = {"ratio": 1.3} if (method, many) == ("Allocate", 1) else {}
                yield Figure(f"{method}, {many} of {count}", "ms", *times, "empty handler", most)


def bench_again(stage: Stage) -> Iterator[Figure]:
    """To registered, that is to the list at the kubelet, from a dropped stream, a new kubelet, the end of another instance.

    The bare baseline has nothing to notice and nothing to start: a plugin that serves already connects and calls Register.
    """
    way, tree, kubelet = stage.module(), stage.tree(4), stage.kubelet()
    stage.beat(tree)
    bare: list[float] = []

    def register() -> None:
        with contextlib.closing(Puppet(kubelet.folder, "example.com/bare", f"bare{next(stage.numbers)}.sock")) as puppet:
            began = time.monotonic()
            puppet.register()
            bare.append((time.monotonic() - began) * 1e3)

    against, most = "connect, Register", {"p50": 15.0, "p99": 50.0}
    holder = stage.plugin(way, tree, kubelet)
    kubelet.wait_status(R150, 4, 4, timeout=30)
    drops, restarts, takeovers = list[float](), list[float](), list[float]()

    def drop() -> None:
        mark = kubelet.log.mark()
        dropped = kubelet.drop_stream(R150)
        kubelet.wait_status(R150, 4, 0, after=mark)
        drops.append((kubelet.wait_status(R150, 4, 4, after=mark) - dropped) * 1e3)
        register()

    for _ in stage.times(50, 1):
        time.sleep(1)  # a stream that has lasted so long: after shorter ones, the plugin takes its time
        drop()
    yield Figure("stream dropped", "ms", list(drops), list(bare), against, most)
    drops.clear()
    bare.clear()
    for _ in stage.times(200, 3):
        drop()
    yield Figure("dropped again and again", "ms", drops, list(bare), against)
    bare.clear()
    for _ in stage.times(50, 1):
        kubelet.prepare()
        kubelet.kill()
        mark = kubelet.log.mark()
        kubelet.start()
        restarts.append((kubelet.wait_status(R150, 4, 4, after=mark) - kubelet.answering) * 1e3)
        register()
    yield Figure("a new kubelet answers", "ms", restarts, list(bare), against)
    bare.clear()
    for _ in stage.times(20, 1):
        heir = stage.plugin(way, tree, kubelet)
        heir.wait_for_line(STANDING_BY, timeout=30)
        mark = kubelet.log.mark()
        holder.end(signal.SIGKILL)
        ended = kubelet.wait("stream_end", after=mark, resource=R150)["t"]
        takeovers.append((kubelet.wait_status(R150, 4, 4, after=mark) - ended) * 1e3)
        holder = heir
        register()
    yield Figure("the other instance killed", "ms", takeovers, list(bare), against)


def bench_fault(stage: Stage) -> Iterator[Figure]:
    """A card vanishes, at any moment between two polls: till the kubelet has it as Unhealthy.

    The bare baseline polls as often, does nothing but list the class, and is done when the name is missing.
    """
    poll_s = 0.1 if stage.quick else 1.0
    tree, kubelet = stage.tree(4), stage.kubelet()
    stage.beat(tree)
    bdf = next(iter(tree.chips))
    chip, name = tree.chips[bdf], tree.class_link(bdf).name
    stage.plugin(stage.module(), tree, kubelet, f"--poll-seconds={poll_s}")
    kubelet.wait_status(R150, 4, 4, timeout=30)
    done, looks = threading.Event(), Log[tuple[bool, float]]("the bare loop")

    def look() -> None:
        while not done.wait(poll_s):
            looks.append((name in os.listdir(tree.sys / "class/tenstorrent"), time.monotonic()))

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    seen, bare = list[float](), list[float]()
    for _ in stage.times(30, 2):
        time.sleep(random.uniform(0, poll_s))
        mark, then = kubelet.log.mark(), looks.mark()
        began = time.monotonic()
        tree.remove(bdf)
        seen.append((kubelet.wait_health(R150, chip.id, "Unhealthy", after=mark) - began) * 1e3)
        bare.append((looks.wait_for(lambda one: not one[0], 10, then)[1] - began) * 1e3)
        tree.add(chip)
        kubelet.wait_health(R150, chip.id, "Healthy", after=mark)
    done.set()
    thread.join()
    yield Figure(f"card gone, poll {poll_s:g} s", "ms", seen, bare, "loop of listdir", {"p99": poll_s * 1000 + 20})


def bench_poll(stage: Stage) -> Iterator[Figure]:
    """One poll, by chip: CPU time of its thread, and system calls. The baseline lists the class and reads one file a chip.

    The trees are files on a disk; what a file of real sysfs costs beyond that is measured first, and to be added for each
    of the files that a poll reads.
    """

    def read(path: Path) -> float:
        began = time.thread_time()
        for _ in range(50):
            tt.read_attribute(path)
        return (time.thread_time() - began) / 50 * 1e6

    (stage.room / "attribute").write_bytes(SYSFS_FILE.read_bytes())
    pairs = [(read(SYSFS_FILE), read(stage.room / "attribute")) for _ in stage.times(200, 2)]
    yield Figure("one file of real sysfs", "us", [real for real, _ in pairs], [disk for _, disk in pairs], "file on a disk")
    for count in (4,) if stage.quick else (4, 32, 256):
        tree = stage.tree(count)
        top = f"{tree.sys}/class/tenstorrent"
        inventory = tt.Inventory(tt.Settings(sysfs_root=tree.sys, dev_root=tree.dev))
        hearts = [(tree.entry(bdf) / "tt_heartbeat").open("r+b", buffering=0) for bdf in tree.chips]

        def read_bare(top: str = top) -> None:
            for name in os.listdir(top):
                fd = os.open(f"{top}/{name}/tt_heartbeat", os.O_RDONLY)
                os.read(fd, 4096)
                os.close(fd)

        inventory.poll(time.monotonic())
        polls, bare = list[float](), list[float]()
        for number in stage.times(max(20, 4000 // count), 2):
            for heart in hearts:
                os.pwrite(heart.fileno(), b"%d\n" % (1001 + number), 0)
            began = time.thread_time()
            inventory.poll(time.monotonic())
            between = time.thread_time()
            read_bare()
            polls.append((between - began) / count * 1e6)
            bare.append((time.thread_time() - between) / count * 1e6)
        for heart in hearts:
            heart.close()
        against = "1 read a chip"
        yield Figure(f"{count} chips, CPU a chip", "us", polls, bare, against, {"p50": 60.0})
        if counts := system_calls(tree, stage.room):
            poll, least = (each / count for each in counts)
            yield Figure(f"{count} chips, calls a chip", "", [poll], [least], against)


def system_calls(tree: Tree, room: Path) -> tuple[int, int] | None:
    """The system calls of one poll, and of the bare baseline; None where strace is missing or may not trace."""
    command = [sys.executable, "-c", TRACED_POLL, str(tree.sys), str(tree.dev)]
    try:
        subprocess.run(["strace", "-o", room / "trace", *command], check=True, cwd=HERE, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    lines = (room / "trace").read_text().splitlines()
    marks = [number for number, line in enumerate(lines) if "/mark of the benchmark" in line]
    return marks[1] - marks[0] - 1, marks[2] - marks[1] - 1


def bench_idle(stage: Stage) -> Iterator[Figure]:
    """All at once, for a minute in which nothing changes but heartbeats: CPU in per cent of one core, and wake-ups."""
    way = stage.module()
    server, _ = stage.empty(way)
    pids = {0: server.pid}
    for count in (4, 32):
        tree, kubelet = stage.tree(count), stage.kubelet()
        stage.beat(tree)
        pids[count] = stage.plugin(way, tree, kubelet).process.pid
        kubelet.wait_status(R150, count, count, timeout=30)
    before = {count: effort(pid) for count, pid in pids.items()}
    began = time.monotonic()
    time.sleep(1 if stage.quick else 60)
    seconds = time.monotonic() - began
    after = {count: effort(pid) for count, pid in pids.items()}
    cpu = {count: [(after[count].cpu_s - before[count].cpu_s) / seconds * 100] for count in pids}
    wakeups = {count: [(after[count].wakeups - before[count].wakeups) / seconds] for count in pids}
    for count, most in ((4, 0.3), (32, 1.0)):
        yield Figure(f"{count} cards, CPU", "% core", cpu[count], cpu[0], "empty server", {"p50": most})
        yield Figure(f"{count} cards, wake-ups", "/s", wakeups[count], wakeups[0], "empty server")


def bench_growth(stage: Stage) -> Iterator[Figure]:
    """What a thousand registrations, and a thousand clients of the empty server, leave behind; the first hundred warm up."""
    way, tree, kubelet = stage.module(), stage.tree(4), stage.kubelet()
    stage.beat(tree)
    server, address = stage.empty(way)
    plugin = stage.plugin(way, tree, kubelet)
    kubelet.wait_status(R150, 4, 4, timeout=30)
    count, warm = (6, 2) if stage.quick else (1100, 100)
    held: list[tuple[Vitals, Vitals]] = []
    for number in range(count + 1):
        if number in (warm, count):
            held.append((vitals(plugin), held_by(server.pid)))
        mark = kubelet.log.mark()
        kubelet.drop_stream(R150)
        kubelet.wait_status(R150, 4, 0, after=mark)
        kubelet.wait_status(R150, 4, 4, after=mark)
        with grpc.insecure_channel(address, [("grpc.use_local_subchannel_pool", 1)]) as channel:
            raw(channel, SERVICE + "Allocate")(b"", timeout=10)
    for place, (what, unit) in enumerate((("private memory", "KiB"), ("threads", ""), ("descriptors", ""))):
        ours, theirs = (float(held[1][side][place] - held[0][side][place]) for side in (0, 1))
        yield Figure(f"{what}, {count - warm} drops", unit, [ours], [theirs], "as many clients")


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


def machine() -> dict[str, str]:
    """What the figures were measured on."""
    model = re.findall(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.M)
    return {
        "cpu": model[0] if model else platform.machine(),
        "cores": str(len(os.sched_getaffinity(0))),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "grpcio": grpc.__version__,
        "load": f"{os.getloadavg()[0]:.1f}",
    }


def measure(names: Sequence[str], quick: bool) -> dict[str, list[Figure]]:
    """The figures of these benchmarks, each with a stage of its own; what is going on is said on stderr."""
    results = {}
    for name in names:
        print(f"{name}: {(BENCHMARKS[name].__doc__ or '').splitlines()[0]}", file=sys.stderr, flush=True)
        with Stage(quick) as stage:
            results[name] = list(BENCHMARKS[name](stage))
    return results


def as_table(results: dict[str, list[Figure]]) -> str:
    """For people: at most 120 columns."""
    rows = [["", "n", "p50", "p99", "unit", "baseline", "p50", "ratio", "at most (! = more)"]]
    for name, figures in results.items():
        rows.append([name, *[""] * 8])
        for figure in figures:
            numbers, missed = figure.numbers(), figure.missed()
            shown = {key: f"{numbers[key]:.4g}" if key in numbers else "-" for key in ("p50", "p99", "base", "ratio")}
            wanted = [f"{what} {most:g}{'!' if what in missed else ''}" for what, most in figure.most.items()]
            row = [f"  {figure.name}", str(len(figure.samples)), shown["p50"], shown["p99"], figure.unit]
            rows.append([*row, figure.against, shown["base"], shown["ratio"], ", ".join(wanted)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    aligned = [str.ljust, str.rjust, str.rjust, str.rjust, str.ljust, str.ljust, str.rjust, str.rjust, str.ljust]
    return "\n".join(
        "  ".join(align(cell, width) for cell, align, width in zip(row, aligned, widths, strict=True)).rstrip() for row in rows
    )


def as_json(results: dict[str, list[Figure]]) -> str:
    """For programs."""
    figures = [
        {"benchmark": name, "name": one.name, "unit": one.unit, **one.numbers(), "baseline": one.against}
        | {"wanted_at_most": dict(one.most), "missed": one.missed()}
        for name, many in results.items()
        for one in many
    ]
    return json.dumps({"machine": machine(), "figures": figures}, indent=2)


def bench(arguments: list[str]) -> None:
    """The program: `test_plugin.py --bench [--quick] [--json] [NAME...]`."""
    parser = argparse.ArgumentParser(prog="bench", description="Every figure beside a bare baseline of the same run")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--quick", action="store_true", help="a few repetitions: shows that it runs, not how fast")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(BENCHMARKS)}; default: all")
    options = parser.parse_args(arguments)
    if unknown := sorted(set(options.names) - set(BENCHMARKS)):
        parser.error(f"there is no benchmark {', '.join(unknown)}: choose of {', '.join(BENCHMARKS)}")
    results = measure(options.names or list(BENCHMARKS), options.quick)
    if options.json:
        print(as_json(results))
    else:
        print("\n".join(f"{what:8}{text}" for what, text in machine().items()), end="\n\n")
        print(as_table(results))


def test_benchmarks_run() -> None:
    """Each benchmark, with a few repetitions, fills its lines of the table; what the figures are is no test's business."""
    results = measure(list(BENCHMARKS), quick=True)
    for name, figures in results.items():
        assert figures, name
        for figure in figures:
            numbers = figure.numbers()
            assert numbers["n"] >= 1 and numbers["p50"] <= numbers["p99"], figure
            assert numbers["p50"] > 0 or name in ("start", "growth", "idle"), figure  # those that are differences
            assert set(figure.most) <= {"p50", "p99", "ratio"} and set(figure.missed()) <= set(figure.most)
            assert bool(figure.bare) == bool(figure.against)
    table = as_table(results).splitlines()
    assert max(map(len, table)) <= 120
    assert len(table) == 1 + len(results) + sum(map(len, results.values()))
    told = json.loads(as_json(results))
    assert set(told["machine"]) == {"cpu", "cores", "kernel", "python", "grpcio", "load"} and all(told["machine"].values())
    assert [figure["benchmark"] for figure in told["figures"]] == [name for name, many in results.items() for _ in many]


def test_percentile() -> None:
    """Nearest rank: always one of the samples."""
    assert percentile([3.0], 0.99) == percentile([3.0], 0.5) == 3.0
    assert percentile([2.0, 1.0], 0.5) == 1.0 and percentile([2.0, 1.0], 0.99) == 2.0
    assert percentile([float(n) for n in range(1, 201)], 0.99) == 198.0


def test_missed_targets() -> None:
    """A target is missed only above it, and a ratio of what has no baseline never."""
    figure = Figure("any", "ms", [2.0, 4.0], [1.0], "bare", {"p50": 2.0, "p99": 3.9, "ratio": 1.9})
    assert figure.missed() == ["p99", "ratio"]
    assert figure._replace(bare=[], most={"ratio": 0.1}).missed() == []
    assert "p50 2, p99 3.9!, ratio 1.9!" in as_table({"one": [figure]})


def test_bench_usage() -> None:
    """The command line: one benchmark by name as JSON; an unknown one is refused with the names there are."""
    command = [sys.executable, str(HERE / "test_plugin.py"), "--bench", "--quick"]
    done = subprocess.run([*command, "--json", "poll"], capture_output=True, text=True, check=True)
    assert {figure["benchmark"] for figure in json.loads(done.stdout)["figures"]} == {"poll"}
    refused = subprocess.run([*command, "pool"], capture_output=True, text=True)
    assert refused.returncode == 2 and "choose of start, memory" in refused.stderr


if __name__ == "__main__":
    bench(sys.argv[2:])
