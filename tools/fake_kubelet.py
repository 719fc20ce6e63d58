"""A fake kubelet for the tests: a kubelet's device manager, as a process of its own.

The kubelet contract. This is what a device plugin meets on kubelets in the field, read
in the sources of Kubernetes 1.20, 1.32 and 1.36 (pkg/kubelet/cm/devicemanager) and seen
on kubelets 1.20.2 and 1.36.2. The folder is /var/lib/kubelet/device-plugins, on every
kubelet.

 1. Start. It makes the folder (mode 0750), deletes every socket in it and nothing else,
    and binds kubelet.sock. The file is there before anybody listens: ECONNREFUSED.
 2. Register fails unless the version is v1beta1, the endpoint is a file name in the
    folder, and the resource is domain/name with a name of at most 63 [A-Za-z0-9._-].
 3. Up to 1.24 Register returns at once. The kubelet dials the endpoint afterwards, for
    up to 10 s; 1.20 takes the options from the request. From 1.25 it dials and calls
    GetDevicePluginOptions before Register returns, and that answer counts.
 4. It opens one ListAndWatch stream for each Register, and never a second one. When the
    stream ends, for any reason, nothing of the resource is allocatable until the plugin
    registers again; 5 minutes later the resource leaves the node's status. The kubelet
    notices the end of a killed plugin within about 15 ms. A stopped kubelet keeps it.
 5. A race, up to 1.36: plugins are looked up by resource name. The end of a resource's
    older stream disconnects the newer plugin, which nobody dials again.
 6. Each ListAndWatch message is the whole list. An Unhealthy device counts as capacity
    and is not allocatable; a device that is missing from the list does not exist.
 7. A NUMA node of -1 matches no mask: strict policies reject the Pod. Nor is there a
    hint where some devices of a resource have a topology and the others have none.
 8. kubelet_internal_checkpoint, in the same folder (mode 0600, replaced by a rename),
    has each container's resource, device IDs and answer, and outlives kubelet and
    reboot. It is written at each ListAndWatch message and at each admission. Pods that
    have ended are forgotten at the next admission, in memory: until it is written the
    file has them.
 9. After a restart a container gets the very same IDs if they are registered and
    healthy, and UnexpectedAdmissionError if they are not.
10. GetPreferredAllocation, if announced, comes before each Allocate, without a time
    limit. Its answer is a wish: what is not available is left out, what is missing is
    filled up.
11. Allocate comes once for each container and resource, with the IDs in random order
    and without a time limit: a slow plugin stalls the admission of every Pod. An error
    is in the Pod's event. The answer is kept (8) and used for every later start.
12. The answers of a container's resources are merged by variable name, annotation and
    container path: of two values for one key the second is dropped, silently.
13. PreStartContainer, if announced, comes before every start and restart of a
    container, with a limit of 30 s. An error keeps the container from starting; it is
    tried again.
14. The runtime resolves symbolic links among the host paths anew at each start. The
    limit of huge pages is 0 unless the container's spec names one, whatever is mounted.
15. Names of CDI devices in the answer reach the runtime from 1.28 on.

Not modelled: 5 minutes of 4, the huge page limit of 14, and what shows the health of a
running Pod's devices in its status (feature gate ResourceHealthStatus, from 1.31).
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import os
import random
import re
import socket
import time
import zlib
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import grpc.aio
from google.protobuf import json_format

import api_pb2 as api
import api_pb2_grpc as rpc

Event = dict[str, Any]  # what the fake kubelet tells the test
# What can be made to go wrong: Register fails; it hangs; no stream follows it; the
# stream is ended by the kubelet after its first message.
Fault = Literal["register_fails", "register_hangs", "no_stream", "drop_streams"]

METHODS = api.DESCRIPTOR.services_by_name["DevicePlugin"].methods_by_name
LOCAL = (
    "grpc.use_local_subchannel_pool",
    1,
)  # a connection of its own for each channel
NO_NUMA_NODE = -1  # in the checkpoint, for a device without topology

# What may be the name of a resource (2).
LABEL = "[a-z0-9]([-a-z0-9]*[a-z0-9])?"
NAME = "[A-Za-z0-9]([A-Za-z0-9_.-]*[A-Za-z0-9])?"
RESOURCE = re.compile(
    r"(?!requests\.|.*kubernetes\.io/)(?=[^/]{1,244}/.{1,63}$)"
    rf"{LABEL}(\.{LABEL})*/{NAME}"
)


def as_dict(message: Any) -> dict[str, Any]:
    """A message with the proto's names and every field: no list is an empty one."""
    return json_format.MessageToDict(
        message,
        preserving_proto_field_name=True,
        always_print_fields_with_no_presence=True,
    )


class Refusal(Exception):
    """Why a command failed: the plugin's gRPC status, or the kubelet's own refusal."""


@dataclass(frozen=True)
class Behaviour:
    """How one life of the fake kubelet goes."""

    generation: str = "1.36"  # or "1.20"
    listen_delay: float = 0.0  # from bind, when the file is visible, to listen (1)
    dial_delay: float = 0.0  # 1.20: from the answer to Register to the dial (3)
    dial_limit: float = 10.0  # how long it dials
    faults: Mapping[Fault, int] = field(default_factory=dict)  # how many times each


@dataclass
class Client:
    """The kubelet's connection to one registered plugin socket."""

    resource: str
    endpoint: str
    channel: grpc.aio.Channel
    options: Any  # DevicePluginOptions
    stopped: bool = (
        False  # the stream has ended: calls do not reach the plugin any more
    )
    reader: asyncio.Task[None] | None = None  # reads the ListAndWatch stream


@dataclass(frozen=True)
class Held:
    """What a container holds of one resource: one entry of the checkpoint."""

    pod: str
    container: str
    resource: str
    ids_by_numa: Mapping[int, Sequence[str]]  # an ID stands at each of its NUMA nodes
    answer: api.ContainerAllocateResponse

    @property
    def ids(self) -> list[str]:
        """All device IDs, each once."""
        return sorted({one for ids in self.ids_by_numa.values() for one in ids})

    def as_json(self) -> dict[str, Any]:
        """The entry in the kubelet's own format."""
        return {
            "PodUID": self.pod,
            "ContainerName": self.container,
            "ResourceName": self.resource,
            "DeviceIDs": {str(node): [*ids] for node, ids in self.ids_by_numa.items()},
            "AllocResp": base64.b64encode(self.answer.SerializeToString()).decode(),
        }

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> Held:
        """The opposite."""
        return cls(
            pod=entry["PodUID"],
            container=entry["ContainerName"],
            resource=entry["ResourceName"],
            ids_by_numa={int(node): ids for node, ids in entry["DeviceIDs"].items()},
            answer=api.ContainerAllocateResponse.FromString(
                base64.b64decode(entry["AllocResp"])
            ),
        )


async def forward(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Pass on all bytes, and the end."""
    with contextlib.suppress(ConnectionError):
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
    writer.close()


class FakeKubelet:
    """The device manager of one life of a kubelet. Numbers are the contract's.

    The public coroutines below "Commands" are what a test can ask for; everything that
    the kubelet sees or decides is an event, sent to the test.
    """

    def __init__(self, pipe: Connection, root: Path, behaviour: Behaviour) -> None:
        self.pipe = pipe
        self.host = root.parent  # where the host paths of answers are looked up
        self.folder = root / "device-plugins"
        self.checkpoint = self.folder / "kubelet_internal_checkpoint"
        self.behaviour = behaviour
        self.old = behaviour.generation == "1.20"
        self.faults = Counter[str](
            behaviour.faults
        )  # how many times each still happens
        # The newest client of each resource, while it is connected.
        self.clients: dict[str, Client] = {}
        # Who is asked for a Pod: the newest client of each resource, even if it is
        # dead.
        self.endpoints: dict[str, Client] = {}
        # Resource, then ID: the device as last listed.
        self.devices: dict[str, dict[str, api.Device]] = defaultdict(dict)
        # Resource: capacity and allocatable, as last told to the test.
        self.status: dict[str, tuple[int, int]] = {}
        self.held: list[Held] = []
        self.ended_pods: set[str] = set()  # not forgotten yet (8)
        self.admission = asyncio.Lock()  # one Pod at a time (11)
        self.tasks: list[asyncio.Task[Any]] = []

    async def live(self) -> None:
        """Start, and do what the test commands until it is killed or the test ends."""
        loop = asyncio.get_running_loop()
        await self.start()
        with contextlib.suppress(EOFError):
            while True:
                command = await loop.run_in_executor(None, self.pipe.recv)
                self.spawn(self.obey(*command))
        os._exit(0)

    async def obey(
        self,
        number: int,
        method: Callable[..., Awaitable[Any]],
        arguments: Sequence[Any],
        named: Mapping[str, Any],
    ) -> None:
        """Run one command, and send its result or what went wrong."""
        result: Any
        try:
            result = await method(self, *arguments, **named)
        except Refusal as refusal:
            result = refusal
        except Exception as error:
            result = RuntimeError(f"the fake kubelet has a defect: {error!r}")
        self.emit("reply", number=number, result=result)

    def emit(self, event: str, client: Client | None = None, **facts: Any) -> None:
        """Tell the test. All processes of a host share the clock time.monotonic."""
        about = {"t": time.monotonic(), "event": event}
        if client:
            about |= {"resource": client.resource, "endpoint": client.endpoint}
        self.pipe.send(about | facts)

    def spawn(self, work: Awaitable[Any]) -> asyncio.Task[Any]:
        """A task that is kept: the event loop refers to it only weakly."""
        task = asyncio.ensure_future(work)
        self.tasks.append(task)
        return task

    def fault(self, name: Fault) -> bool:
        """Whether this fault is due now. Each time counts."""
        due = self.faults[name] > 0
        if due:
            self.faults[name] -= 1
        return due

    # ---- Start and registration ----

    async def start(self) -> None:
        """Make the folder, remove the sockets in it, bind, and listen later (1)."""
        self.folder.mkdir(mode=0o750, parents=True, exist_ok=True)
        removed = []
        for path in self.folder.iterdir():
            if path.is_socket() and not path.is_symlink():
                path.unlink(missing_ok=True)  # its plugin may remove it meanwhile
                removed.append(path.name)
        if self.checkpoint.exists():  # it knows its Pods, but no device yet (8)
            entries = json.loads(self.checkpoint.read_text())["Data"][
                "PodDeviceEntries"
            ]
            self.held = [Held.from_json(entry) for entry in entries]

        # gRPC binds and listens in one step. So it serves an abstract name, and the
        # socket that plugins see passes bytes on to it.
        inner = f"fake-kubelet-{os.getpid()}"
        self.server = grpc.aio.server()  # kept: a server that nobody refers to stops
        registration: Any = SimpleNamespace(Register=self.register)
        rpc.add_RegistrationServicer_to_server(registration, self.server)
        self.server.add_insecure_port(f"unix-abstract:{inner}")
        await self.server.start()
        sock = socket.socket(socket.AF_UNIX)
        sock.bind(str(self.folder / "kubelet.sock"))
        self.emit("bound", removed=removed)
        await asyncio.sleep(self.behaviour.listen_delay)

        async def connected(
            reader: asyncio.StreamReader, writer: asyncio.StreamWriter
        ) -> None:
            answers, requests = await asyncio.open_unix_connection(f"\0{inner}")
            await asyncio.gather(forward(reader, requests), forward(answers, writer))

        self.listener = await asyncio.start_unix_server(connected, sock=sock)
        self.emit("listening")

    async def register(self, request: Any, context: Any) -> Any:
        """Judge the request (2); 1.36 dials before it answers, 1.20 afterwards (3)."""
        self.emit("register", resource=request.resource_name, **as_dict(request))
        unknown = grpc.StatusCode.UNKNOWN  # what a plain Go error becomes
        if self.fault("register_fails"):
            code = grpc.StatusCode.UNIMPLEMENTED
            await context.abort(code, "the fake kubelet was told to fail")
        if self.fault("register_hangs"):
            await asyncio.Event().wait()
        if problem := self.problem_of(request):
            await context.abort(unknown, problem)

        address = str(self.folder / request.endpoint)
        options: list[tuple[str, Any]] = [LOCAL]
        if self.old:  # its Go library sends the socket's path
            options.append(("grpc.default_authority", address))
        channel = grpc.aio.insecure_channel(f"unix:{address}", options)
        client = Client(
            request.resource_name, request.endpoint, channel, request.options
        )
        if self.old:
            self.spawn(self.dial_later(client))
        elif problem := await self.dial(client):
            await context.abort(unknown, f"failed to dial {client.endpoint}: {problem}")
        return api.Empty()

    def problem_of(self, request: Any) -> str:
        """Why this request is refused, or "" (2)."""
        if request.version != "v1beta1":
            return (
                f'requested API version "{request.version}" is not supported by kubelet'
            )
        if not RESOURCE.fullmatch(request.resource_name):
            return f'the ResourceName "{request.resource_name}" is invalid'
        if not re.fullmatch("[^/]+", request.endpoint):
            return f'the endpoint "{request.endpoint}" is not a file name'
        return ""

    async def dial(self, client: Client) -> str:
        """1.36: dial, ask for the options, open the stream. What went wrong, or ""."""
        self.clients[client.resource] = client  # the one before it keeps its stream (5)
        try:
            await asyncio.wait_for(
                client.channel.channel_ready(), self.behaviour.dial_limit
            )
            stub = rpc.DevicePluginStub(client.channel)
            client.options = await stub.GetDevicePluginOptions(api.Empty())
        except (asyncio.TimeoutError, grpc.aio.AioRpcError) as error:
            self.clients.pop(
                client.resource, None
            )  # the one before it is forgotten, too
            return await self.give_up(client, error)
        self.emit("options", client, **as_dict(client.options))
        self.open_stream(client)
        return ""

    async def dial_later(self, client: Client) -> None:
        """1.20: dial, keep the options of the request, open the stream."""
        await asyncio.sleep(self.behaviour.dial_delay)
        try:
            await asyncio.wait_for(
                client.channel.channel_ready(), self.behaviour.dial_limit
            )
        except asyncio.TimeoutError as error:
            await self.give_up(client, error)
            return
        self.clients[client.resource] = client
        self.open_stream(client)

    async def give_up(self, client: Client, error: Exception) -> str:
        """This endpoint cannot be dialled: why."""
        self.emit("dial_failed", client, error=repr(error))
        await client.channel.close()
        return repr(error)

    def open_stream(self, client: Client) -> None:
        """The one stream of this registration (4)."""
        self.endpoints[client.resource] = client
        if self.fault("no_stream"):
            self.emit("no_stream", client)
        else:
            client.reader = self.spawn(self.watch(client))

    async def watch(self, client: Client) -> None:
        """Read the stream until it ends, whoever ends it."""
        stream = rpc.DevicePluginStub(client.channel).ListAndWatch(api.Empty())
        self.emit("stream", client)
        drop = self.fault("drop_streams")
        how = "OK"
        try:
            async for message in stream:
                self.take_list(client, message.devices)
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
        # The client to disconnect is looked up by its resource's *name*: if a plugin
        # has registered anew meanwhile, it is the new one (4, 5).
        victim = self.clients.pop(client.resource, None)
        if victim:
            self.disconnect(victim, ended=client)

    def disconnect(self, victim: Client, ended: Client) -> None:
        """Nothing of this client's resource is allocatable from now on."""
        victim.stopped = True
        self.emit("disconnected", victim, ended=ended.endpoint)
        if victim is not ended and victim.reader:
            victim.reader.cancel()
        for device in self.devices[victim.resource].values():
            device.health = "Unhealthy"
        self.update_status(victim.resource)

    # ---- Devices ----

    def take_list(self, client: Client, devices: Sequence[api.Device]) -> None:
        """A message of ListAndWatch: the whole list (6)."""
        self.devices[client.resource] = {device.ID: device for device in devices}
        health = {device.ID: device.health for device in devices}
        self.emit("devices", client, devices=health)
        self.save_checkpoint()
        self.update_status(client.resource)

    def healthy(self, resource: str) -> list[str]:
        """The IDs of its devices that are Healthy."""
        devices = self.devices[resource].values()
        return [device.ID for device in devices if device.health == "Healthy"]

    def update_status(self, resource: str) -> None:
        """Tell the test capacity and allocatable, if they have changed (6)."""
        status = (len(self.devices[resource]), len(self.healthy(resource)))
        if status != self.status.get(resource):
            self.status[resource] = status
            capacity, allocatable = status
            self.emit(
                "status",
                resource=resource,
                capacity=capacity,
                allocatable=allocatable,
            )

    def free(self, resource: str) -> list[str]:
        """The IDs of its devices that are Healthy, and that no container holds."""
        used = set[str]()
        for held in self.held:
            if held.resource == resource:
                used.update(held.ids)
        return [name for name in self.healthy(resource) if name not in used]

    def numa_nodes(self, resource: str, name: str) -> list[int]:
        """Those of a device; only -1 if it has no topology."""
        device = self.devices[resource].get(name, api.Device())
        return [node.ID for node in device.topology.nodes] or [NO_NUMA_NODE]

    def save_checkpoint(self) -> None:
        """Write who holds what, in the kubelet's format, if the folder is there (8)."""
        registered = {resource: self.healthy(resource) for resource in self.devices}
        data = {
            "PodDeviceEntries": [held.as_json() for held in self.held],
            "RegisteredDevices": registered,
        }
        # The kubelet's own checksum is made from a dump of the data by Go: only the
        # kubelet can check it. This one is a number of the same size.
        checksum = zlib.crc32(json.dumps(data).encode())
        draft = self.checkpoint.with_name(f".{self.checkpoint.name}")
        with contextlib.suppress(OSError):
            draft.touch(mode=0o600)
            draft.write_text(json.dumps({"Data": data, "Checksum": checksum}))
            draft.replace(self.checkpoint)

    # ---- Commands: calls of the plugin ----

    async def rpc(
        self,
        resource: str,
        method: str,
        request: Mapping[str, Any],
        timeout: float | None = 10.0,
    ) -> dict[str, Any]:
        """One call as it is, even if malformed, to the plugin that registered last."""
        client = self.endpoints.get(resource)
        if client is None:
            raise Refusal(f"KUBELET: the endpoint of {resource} is not registered")
        if client.stopped:
            raise Refusal(f"KUBELET: the endpoint of {resource} has been stopped")
        message = getattr(api, METHODS[method].input_type.name)(**request)
        call = getattr(rpc.DevicePluginStub(client.channel), method)
        try:
            return as_dict(await call(message, timeout=timeout))
        except grpc.aio.AioRpcError as error:
            raise Refusal(f"{error.code().name}: {error.details()}") from error

    async def allocate(
        self, resource: str, ids: Sequence[str], timeout: float | None = 10.0
    ) -> dict[str, Any]:
        """Allocate for one container, with the IDs in random order (11): its answer."""
        shuffled = random.sample([*ids], len(ids))
        request = {"container_requests": [{"devices_ids": shuffled}]}
        answer = await self.rpc(resource, "Allocate", request, timeout)
        answers: list[dict[str, Any]] = answer["container_responses"]
        if len(answers) != 1:
            raise Refusal("KUBELET: no containers return in allocation response")
        return answers[0]

    async def pre_start(self, resource: str, ids: Sequence[str]) -> None:
        """PreStartContainer, in random order, with the kubelet's time limit (13)."""
        request = {"devices_ids": random.sample([*ids], len(ids))}
        await self.rpc(resource, "PreStartContainer", request, 30.0)

    # ---- Commands: Pods ----

    async def admit(
        self,
        pod: str,
        want: Mapping[str, int],
        reusable: Mapping[str, Sequence[str]],
        container: str,
    ) -> dict[str, Any]:
        """Admit a container that wants so many of each resource.

        The result has its ids by resource, and the merged answer. `reusable`: ids that
        are taken first, by resource, as the kubelet takes those of the Pod's init
        containers.
        """
        async with self.admission:
            self.held = [one for one in self.held if one.pod not in self.ended_pods]
            mine = self.held_by(pod, container)
            for resource, size in want.items():
                if resource in mine:
                    self.check_again(mine[resource])
                    continue
                wanted = reusable.get(resource, [])
                ids = sorted(await self.choose(resource, size, wanted))
                await self.hold(pod, container, resource, ids)
            self.save_checkpoint()
            mine = self.held_by(pod, container)
            ids_by_resource = {resource: held.ids for resource, held in mine.items()}
            return {"ids": ids_by_resource, **self.merged(pod, container)}

    def held_by(self, pod: str, container: str) -> dict[str, Held]:
        """What a container holds, by resource."""
        mine = [held for held in self.held if held.pod == pod]
        return {held.resource: held for held in mine if held.container == container}

    def check_again(self, held: Held) -> None:
        """A container that had devices before: the same and healthy, or refused (9)."""
        healthy = self.healthy(held.resource)
        missing = [name for name in held.ids if name not in healthy]
        if missing and healthy:
            raise Refusal(
                "UnexpectedAdmissionError: previously allocated devices are no longer "
                f"healthy; {missing}"
            )
        if missing:
            raise Refusal(
                "UnexpectedAdmissionError: no healthy devices present; cannot allocate "
                f"{held.resource}"
            )

    async def choose(self, resource: str, size: int, must: Sequence[str]) -> list[str]:
        """Free ids: those that the plugin prefers, filled up at random (10)."""
        available = self.free(resource)
        available += [name for name in must if name not in available]
        if len(available) < size:
            raise Refusal(
                "UnexpectedAdmissionError: Allocate failed due to requested number of "
                f"devices unavailable for {resource}. Requested: {size}, Available: "
                f"{len(available)}, which is unexpected"
            )
        random.shuffle(available)
        chosen = [*must]
        client = self.endpoints.get(resource)
        if client and client.options.get_preferred_allocation_available:
            request = {
                "available_deviceIDs": available,
                "must_include_deviceIDs": must,
                "allocation_size": size,
            }
            answer = await self.rpc(
                resource,
                "GetPreferredAllocation",
                {"container_requests": [request]},
                timeout=None,
            )
            (preferred,) = answer["container_responses"]
            chosen += [name for name in preferred["deviceIDs"] if name in available]
        return list(dict.fromkeys([*chosen, *available]))[:size]

    async def hold(
        self, pod: str, container: str, resource: str, ids: Sequence[str]
    ) -> None:
        """Allocate these, and remember who has them (8, 11)."""
        answer = await self.allocate(resource, ids, timeout=None)
        ids_by_numa = defaultdict[int, list[str]](list)
        for name in ids:
            for node in self.numa_nodes(resource, name):
                ids_by_numa[node].append(name)
        message = json_format.ParseDict(answer, api.ContainerAllocateResponse())
        self.held.append(Held(pod, container, resource, ids_by_numa, message))
        self.emit("allocated", pod=pod, resource=resource, ids=[*ids])

    def merged(self, pod: str, container: str) -> dict[str, Any]:
        """The container's answers as one: a key's second value is dropped (12)."""
        merged: dict[str, dict[str, Any]] = defaultdict(dict)

        def add(resource: str, part: str, key: str, value: Any) -> None:
            if merged[part].setdefault(key, value) != value:
                self.emit("conflict", kind=part, resource=resource, key=key)

        for resource, held in self.held_by(pod, container).items():
            answer = as_dict(held.answer)
            for part in ("envs", "annotations"):
                for key, value in answer[part].items():
                    add(resource, part, key, value)
            for part in ("mounts", "devices"):
                for value in answer[part]:
                    add(resource, part, value["container_path"], value)
            for value in answer["cdi_devices"]:
                add(resource, "cdi_devices", value["name"], value)
        return {
            "envs": merged["envs"],
            "annotations": merged["annotations"],
            "mounts": [*merged["mounts"].values()],
            "devices": [*merged["devices"].values()],
            # Kubelets before 1.28 do not know this field (15).
            "cdi_devices": [] if self.old else [*merged["cdi_devices"]],
        }

    async def start_container(self, pod: str, container: str) -> dict[str, Any]:
        """One start *or restart*: PreStartContainer each time, no Allocate (13).

        What the runtime gets: each device has the path that it is `resolved` to.
        """
        for resource, held in self.held_by(pod, container).items():
            client = self.endpoints.get(resource)
            if client is None or client.options.pre_start_required:
                await self.pre_start(resource, held.ids)
        options = self.merged(pod, container)
        devices = []
        for device in options["devices"]:
            host = f"{self.host}{device['host_path']}"
            if not os.path.exists(host):
                raise Refusal(f"RunContainerError: {host} does not exist")
            # containerd follows symbolic links anew at each start (14).
            devices.append({**device, "resolved": os.path.realpath(host)})
        return {**options, "devices": devices}

    async def end_pod(self, pod: str) -> None:
        """The Pod has ended: its devices are free at the next admission (8)."""
        self.ended_pods.add(pod)

    async def topology_hints(self, resource: str, size: int) -> list[list[int]] | None:
        """The sets of NUMA nodes on which so many free devices can be had (7).

        None: no device has a topology. An empty list: on no set, so strict policies
        reject the Pod.
        """
        devices = self.devices[resource]
        if not any(device.HasField("topology") for device in devices.values()):
            return None
        hints = []
        for mask in ([0], [1], [0, 1]):
            fitting = [
                name
                for name in self.free(resource)
                if not {*mask}.isdisjoint(self.numa_nodes(resource, name))
            ]
            if len(fitting) >= size:
                hints.append(mask)
        return hints

    # ---- Commands: trouble ----

    async def set_fault(self, fault: Fault, times: int) -> None:
        """From now on this goes wrong so many times; 0: not any more."""
        self.faults[fault] = times

    async def drop_stream(self, resource: str) -> None:
        """End the resource's stream from this side, and nothing else."""
        client = self.clients.get(resource)
        if client and client.reader:
            self.emit("dropped", client)
            client.reader.cancel()


def run_fake_kubelet(pipe: Connection, root: Path, behaviour: Behaviour) -> None:
    """The process of one life."""
    asyncio.run(FakeKubelet(pipe, root, behaviour).live())
