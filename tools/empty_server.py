"""The baseline of the benchmarks:  empty_server.py SOCKET.

What a plugin cannot be smaller than: a server of the same service with empty answers.
"""

import asyncio
import sys
from typing import Any

import grpc.aio

import api_pb2 as api
import api_pb2_grpc as rpc


class Empty(rpc.DevicePluginServicer):
    """The two calls that are measured."""

    async def Allocate(self, request: Any, context: Any) -> Any:
        return api.AllocateResponse()

    async def GetPreferredAllocation(self, request: Any, context: Any) -> Any:
        return api.PreferredAllocationResponse()


async def main() -> None:
    """The program."""
    server = grpc.aio.server()
    rpc.add_DevicePluginServicer_to_server(Empty(), server)  # type: ignore[abstract]
    server.add_insecure_port(f"unix:{sys.argv[1]}")
    await server.start()
    print("serving", flush=True)
    await server.wait_for_termination()


asyncio.run(main())
