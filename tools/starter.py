"""Starts the device plugin from inside its archive, as __main__.py. Leaves no files.

Python imports its own files from a zip, but not native modules: the dynamic linker
wants a file. So each native module is copied to a file in memory, which the linker
opens as /proc/self/fd/N. There is no cache folder that would have to be writable,
trusted and cleaned up, and that could run full.

Nothing here may be newer than what an old Python 3 can parse: this file has to be able
to say that the Python is too old.
"""
# ruff: noqa: E402, UP031

import os
import signal

# This comes before anything that takes time. As process 1 of a container, Python
# ignores SIGTERM until there is a handler; and on SIGINT it would print a traceback.
# The plugin itself takes both signals over. SIGTERM may be blocked until now, since
# daemonset.yaml starts this file with exec and blocks it before that.
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, lambda *_: os._exit(0))
signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])

import sys
from importlib.machinery import EXTENSION_SUFFIXES, ExtensionFileLoader, ModuleSpec
from importlib.util import spec_from_file_location

# "cpython-311-x86_64-linux-gnu" in the names of native modules: Python and platform.
TAG = EXTENSION_SUFFIXES[0][1:-3]
PLATFORM = TAG.split("-", 2)[-1]

# Flags of memfd_create, from linux/memfd.h. os does not have the last two.
MFD_CLOEXEC = 0x1
MFD_NOEXEC_SEAL = 0x8  # since Linux 6.3
MFD_EXEC = 0x10  # since Linux 6.3

LOADER = globals()["__loader__"]
# The archive's real name, also if it was started as /proc/self/fd/N.
ARCHIVE = os.path.realpath(LOADER.archive)


def read_native_module(name: str) -> bytes:
    """The module that fits this Python.

    Its name follows the same rule as on disk, but it lies in a folder of the platform:
    a module of the kind .abi3.so fits all Pythons, and has no platform in its name.
    """
    for suffix in EXTENSION_SUFFIXES:
        try:
            return bytes(LOADER.get_data("native/" + PLATFORM + "/" + name + suffix))
        except OSError:
            pass

    python = "%s %s (%s)" % (sys.implementation.name, sys.version.split()[0], TAG)
    here = "%s is not for this Python, %s" % (ARCHIVE, python)
    sys.exit("%s. It is for %s" % (here, built_for()))


def built_for() -> str:
    """What the archive was built for, in words."""
    import re
    import zipfile

    names = "\n".join(zipfile.ZipFile(LOADER.archive).namelist())
    found = re.findall(r"cygrpc\.cpython-3(\d+)-(\S+)\.so$", names, re.M)
    versions = ["3.%d" % minor for minor in sorted({int(minor) for minor, _ in found})]
    platforms = sorted({platform for _, platform in found})
    return "CPython %s on %s" % (", ".join(versions), " or ".join(platforms))


def memory_file(name: str) -> int:
    """A new, empty file without a name, as a descriptor. OSError if none can be made.

    MFD_EXEC is tried first: with vm.memfd_noexec=1 a file without it is sealed against
    being executed. With vm.memfd_noexec=2 the kernel refuses MFD_EXEC and takes only
    MFD_NOEXEC_SEAL, and such a file can still be mapped as code. Kernels before 6.3
    know neither flag. A sandbox may refuse memfd_create altogether.
    """
    for flag in (MFD_EXEC, MFD_NOEXEC_SEAL, 0):
        try:
            return os.memfd_create(name, MFD_CLOEXEC | flag)
        except (AttributeError, OSError):
            pass

    import tempfile

    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


def copy_native_module(name: str) -> str:
    """The path of a file in memory that holds the module.

    It is never closed: the next one would get the same path, and the linker would take
    that for the library that it has already.
    """
    content = read_native_module(name)
    try:
        fd = memory_file(name)
        with open(fd, "wb", closefd=False) as file:
            file.write(content)
    except OSError as error:
        need = "It needs memfd_create, or a folder for temporary files"
        sys.exit("%s cannot start: %s. %s" % (ARCHIVE, error, need))
    return "/proc/self/fd/%d" % fd


class NativeModules:
    """Tells the import system where the native modules are."""

    def __init__(self, *names: str) -> None:
        self.paths = {name: copy_native_module(name) for name in names}

    def find_spec(
        self, name: str, path: object = None, target: object = None
    ) -> "ModuleSpec | None":
        if name not in self.paths:
            return None
        file = self.paths[name]
        loader = ExtensionFileLoader(name, file)
        return spec_from_file_location(name, file, loader=loader)


sys.meta_path.insert(0, NativeModules("grpc._cython.cygrpc", "google._upb._message"))
for module in [name for name in sys.modules if name.partition(".")[0] == "google"]:
    del sys.modules[module]  # a node's other packages may have claimed that name

try:
    from tt_device_plugin import main
except ImportError as error:  # no libstdc++.so.6, or what python3-minimal lacks
    packages = "libstdc++6 (Fedora: libstdc++), and /proc"
    need = "It needs all of python3's standard library, " + packages
    sys.exit("%s cannot start: %s. %s" % (ARCHIVE, error, need))

main()
