"""Starts the device plugin from inside its archive, as __main__.py, and writes nothing to any disk.

Python imports its own files from a zip, but not native modules: the dynamic linker wants a file.
So each native module is copied to a file in memory, which the linker opens as /proc/self/fd/N.
There is no cache folder that would have to be writable, trusted, found room for and cleaned up.

Nothing here may be newer than what an old Python 3 can parse: it has to be able to say that it is
too old.
"""
# ruff: noqa: E402, UP031

import os
import signal

# Before anything that takes time: as process 1 of a container, Python ignores SIGTERM until there
# is a handler. Until now it may be blocked: daemonset.yaml starts this file with exec, and does so.
signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])

import sys
from importlib.machinery import EXTENSION_SUFFIXES, ExtensionFileLoader, ModuleSpec
from importlib.util import spec_from_file_location

# "cpython-311-x86_64-linux-gnu" in the names of native modules: for which Python, on what.
TAG = EXTENSION_SUFFIXES[0][1:-3]
PLATFORM = TAG.split("-", 2)[-1]

LOADER = globals()["__loader__"]
ARCHIVE = os.path.realpath(LOADER.archive)  # its real name, also if started as /proc/self/fd/N


def read_native_module(name: str) -> bytes:
    """The module that fits this Python.

    Its name follows the same rule as on disk, but below a folder of the platform: a module of the
    kind .abi3.so fits all Pythons, and has no platform in its name.
    """
    for suffix in EXTENSION_SUFFIXES:
        try:
            return bytes(LOADER.get_data("native/" + PLATFORM + "/" + name + suffix))
        except OSError:
            pass
    python = "%s %s (%s)" % (sys.implementation.name, sys.version.split()[0], TAG)
    sys.exit("%s is not for this Python, %s. It is for %s" % (ARCHIVE, python, built_for()))


def built_for() -> str:
    """What the archive was built for, in words."""
    import re
    import zipfile

    names = "\n".join(zipfile.ZipFile(LOADER.archive).namelist())
    found = re.findall(r"cygrpc\.cpython-3(\d+)-(\S+)\.so$", names, re.M)
    versions = ["3.%d" % minor for minor in sorted({int(minor) for minor, _ in found})]
    platforms = sorted({platform for _, platform in found})
    return "CPython %s on %s" % (", ".join(versions), " or ".join(platforms))


def memory_file(name: str) -> str:
    """A new file with the native module in it, as a path.

    It is never closed: the next one would get the same path, and the linker would take that for the
    library that it has already.
    """
    content = read_native_module(name)
    try:
        fd = os.memfd_create(name)
    except (AttributeError, OSError):  # an old kernel, or a sandbox that refuses: a nameless file
        import tempfile

        with tempfile.TemporaryFile() as file:
            fd = os.dup(file.fileno())
    with open(fd, "wb", closefd=False) as file:
        file.write(content)
    return "/proc/self/fd/%d" % fd


class NativeModules:
    """Tells the import system where the native modules are."""

    def __init__(self, *names: str) -> None:
        self.paths = {name: memory_file(name) for name in names}

    def find_spec(
        self, name: str, path: object = None, target: object = None
    ) -> "ModuleSpec | None":
        if name not in self.paths:
            return None
        file = self.paths[name]
        return spec_from_file_location(name, file, loader=ExtensionFileLoader(name, file))


sys.meta_path.insert(0, NativeModules("grpc._cython.cygrpc", "google._upb._message"))
for name in [each for each in sys.modules if each.partition(".")[0] == "google"]:
    del sys.modules[name]  # a node's other packages may have claimed that name at the start

try:
    from tt_device_plugin import main
except ImportError as error:  # such as no libstdc++.so.6, or what Debian's python3-minimal lacks
    need = "It needs all of python3's standard library, libstdc++6, and /proc"
    sys.exit("%s cannot start: %s. %s" % (ARCHIVE, error, need))

main()
