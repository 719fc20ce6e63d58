"""Unpacks the universal file into the image's folder:  image_folder.py ARCHIVE FOLDER

It runs in the base image, with the Python that will run the plugin, on any CPU. The
environment variable TARGETARCH, amd64 or arm64, says which CPU the folder is for.
"""

from __future__ import annotations

import os
import py_compile
import subprocess
import sys
import zipfile
from importlib.machinery import EXTENSION_SUFFIXES
from importlib.util import cache_from_source
from pathlib import Path

PLACE = Path("/opt/tt-device-plugin")  # in the image
CPUS = {"amd64": "x86_64", "arm64": "aarch64"}
NATIVE = ("google._upb._message", "grpc._cython.cygrpc")

MAIN = '''\
"""Starts the device plugin:  python3 FOLDER"""

import os
import signal

# This comes before anything that takes time. As process 1, Python ignores SIGTERM until
# there is a handler; and on SIGINT it would print a traceback.
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, lambda *_: os._exit(0))

from tt_device_plugin import main

main()
'''

# What the plugin imports, and what it imports only when it needs that.
IMPORTS = """\
import sys
sys.path.insert(0, sys.argv[1])
import tt_device_plugin, tempfile
for module in list(sys.modules.values()):
    print(getattr(module, "__file__", None))
"""


def unpack(archive: zipfile.ZipFile, folder: Path, cpu: str) -> None:
    """Unpacks what this version of Python needs on that CPU."""
    names = archive.namelist()
    for name in names:
        if not name.startswith("native/") and name != "__main__.py":
            archive.extract(name, folder)

    suffixes = [
        suffix.replace(os.uname().machine, cpu) for suffix in EXTENSION_SUFFIXES
    ]
    for module in NATIVE:
        path = f"native/{cpu}-linux-gnu/{module}"
        fitting = [suffix for suffix in suffixes if path + suffix in names]
        if not fitting:
            python = f"Python {sys.version.split()[0]} ({suffixes[0]})"
            sys.exit(f"the base image has {python}, and there is no {module} for that")
        native = archive.read(path + fitting[0])
        (folder / (module.replace(".", "/") + fitting[0])).write_bytes(native)

    (folder / "__main__.py").write_text(MAIN)


def library_files(archive: str) -> list[Path]:
    """The files of Python's own library that the plugin uses.

    The images python:*-slim come without bytecode, which makes a start twice as slow.
    """
    folder = Path("/tmp/native")
    unpack(zipfile.ZipFile(archive), folder, os.uname().machine)
    command = [sys.executable, "-B", "-c", IMPORTS, str(folder)]
    answer = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    files = [Path(line) for line in answer.stdout.splitlines()]
    return [
        path for path in files if path.suffix == ".py" and folder not in path.parents
    ]


def compile_file(source: Path, place: Path, folder: Path) -> None:
    """Adds the bytecode of a source that the image has at `place`."""
    bytecode = folder / Path(cache_from_source(str(place))).relative_to(PLACE)
    py_compile.compile(
        str(source),
        str(bytecode),
        str(place),
        doraise=True,
        # By hash: the sources may get other dates on their way into the image.
        invalidation_mode=py_compile.PycInvalidationMode.CHECKED_HASH,
    )


def main(archive: str, folder: Path) -> None:
    """The program."""
    unpack(zipfile.ZipFile(archive), folder, CPUS[os.environ["TARGETARCH"]])

    sys.pycache_prefix = str(PLACE / "bytecode")
    for source in sorted(folder.rglob("*.py")):
        compile_file(source, PLACE / source.relative_to(folder), folder)
    for source in library_files(archive):
        compile_file(source, source, folder)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
