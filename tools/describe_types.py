"""Writes api_pb2.pyi and api_pb2_grpc.pyi, for mypy:  describe_types.py FOLDER

mypy reads them instead of the generated code. What protoc itself can write does not
pass --strict and knows no services. mypy-protobuf's does, and needs no protoc: api_pb2
has the description that its generators ask for.
"""

import subprocess
import sys
from pathlib import Path

from google.protobuf.compiler.plugin_pb2 import (
    CodeGeneratorRequest,
    CodeGeneratorResponse,
)

import api_pb2

request = CodeGeneratorRequest(file_to_generate=[api_pb2.DESCRIPTOR.name])
api_pb2.DESCRIPTOR.CopyToProto(request.proto_file.add())
for generator in ("protoc-gen-mypy", "protoc-gen-mypy_grpc"):
    command = [Path(sys.executable).with_name(generator)]
    answer = subprocess.run(
        command, input=request.SerializeToString(), capture_output=True, check=True
    )
    for file in CodeGeneratorResponse.FromString(answer.stdout).file:
        Path(sys.argv[1], file.name).write_text(file.content)
