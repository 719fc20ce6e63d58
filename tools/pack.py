"""Packs the plugin and its packages into one file:  pack.py FILE [--sbom SBOM] SITE...

A SITE is a folder of installed packages. Its name is that of its native modules, such
as cpython-311-x86_64-linux-gnu. The same input gives the same bytes: sorted names, one
date, one mode, and none of the installer's notes about where it put what.

In a file for one Python, bytecode lies beside each source: compiling them would double
the time to start, and Python keeps none for what it imports from a zip. The file for
several Pythons has none: bytecode fits one version only, and whichever version builds
this file, it is to be the same.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import marshal
import re
import stat
import sys
import zipfile
from email.parser import BytesHeaderParser
from pathlib import Path

TOP = Path(__file__).resolve().parents[1]
SOURCES = ("tt_device_plugin.py", "api_pb2.py", "api_pb2_grpc.py")
NATIVE = {"google._upb._message", "grpc._cython.cygrpc"}  # those that starter.py loads

# Never read at run time: C++ sources, type stubs, benchmarks, certificates for TLS.
UNUSED = re.compile(
    r"\.(cc|h|pyi|pem|pyx|pxd)$|/py\.typed$|_benchmark\.py$|/testing_refleaks\.py$"
    r"|/testdata/|/__pycache__/"
)

# PEP 552: trust the bytecode, whatever the source's date.
UNCHECKED_HASH = (1).to_bytes(4, "little")


def main() -> None:
    """The program."""
    parser = argparse.ArgumentParser()
    parser.add_argument("file", type=Path)
    parser.add_argument("--sbom", type=Path)
    parser.add_argument("sites", type=Path, nargs="+")
    options = parser.parse_args()
    one_python = len(options.sites) == 1

    entries = {name: (TOP / name).read_bytes() for name in SOURCES}
    entries["__main__.py"] = (TOP / "tools/starter.py").read_bytes()
    if options.sbom:
        entries["sbom.cdx.json"] = options.sbom.read_bytes()
    for site in options.sites:
        add_site(entries, site)
    add_packages(entries)
    if one_python:
        add_bytecode(entries)

    write(options.file, entries, one_python)


def add_site(entries: dict[str, bytes], site: Path) -> None:
    """Adds what is used of these packages: Python files, native modules, licenses."""
    # x86_64-linux-gnu: a module that fits all Pythons still fits one platform.
    platform = site.name.split("-", 2)[2]
    native = set()
    for info in sorted(site.glob("*.dist-info")):
        package = BytesHeaderParser().parsebytes((info / "METADATA").read_bytes())
        for name in installed_files(info):
            path = Path(name)
            if path.parts[0] == info.name:
                if path.name == "LICENSE":
                    add(entries, f"licenses/{package['Name']}", site / name)
            elif path.suffix == ".so":
                stem, _, suffix = name.partition(".")
                module = stem.replace("/", ".")
                native.add(module)
                add(entries, f"native/{platform}/{module}.{suffix}", site / name)
            elif path.suffix == ".py":
                add(entries, name, site / name)
            else:
                sys.exit(f"build.sh: pack.py does not know what {site / name} is for")

    if native != NATIVE:
        found = f"{sorted(native)}, not {sorted(NATIVE)}"
        sys.exit(f"build.sh: {site} has the native modules {found}")


def installed_files(info: Path) -> list[str]:
    """The used files of a package, by its metadata."""
    record = (info / "RECORD").read_text(encoding="utf-8").splitlines()
    names = [name for name, *_ in csv.reader(record)]
    commands = ("../", "bin/")
    return [
        name
        for name in names
        if not name.startswith(commands) and not UNUSED.search(f"/{name}")
    ]


def add(entries: dict[str, bytes], name: str, path: Path) -> None:
    """Adds a file, which has to be the same in all sites."""
    data = path.read_bytes()
    if entries.setdefault(name, data) != data:
        sys.exit(f"build.sh: two interpreters' packages differ in {name}")


def add_packages(entries: dict[str, bytes]) -> None:
    """Adds an __init__.py to each folder that has none.

    A package without one may have its parts in several places. With one, ours is the
    only one: a node's own google/ is never mixed in, and zipimport needs no entries for
    folders.
    """
    modules = [name.removesuffix(".py") for name in entries if name.endswith(".py")]
    modules += [name.replace(".", "/") for name in NATIVE]
    for module in modules:
        for folder in list(Path(module).parents)[:-1]:
            entries.setdefault(f"{folder.as_posix()}/__init__.py", b"")


def add_bytecode(entries: dict[str, bytes]) -> None:
    """Adds the bytecode of each Python file but the starter, for this Python."""
    for name in sorted(entries):
        if name.endswith(".py") and name != "__main__.py":
            source = entries[name]
            code = compile(source, name, "exec", dont_inherit=True, optimize=0)
            header = importlib.util.MAGIC_NUMBER + UNCHECKED_HASH
            header += importlib.util.source_hash(source)
            # Version 2 of marshal: later ones mark what is referred to twice, which
            # differs from run to run.
            entries[name + "c"] = header + marshal.dumps(code, 2)


def write(path: Path, entries: dict[str, bytes], one_python: bool) -> None:
    """Writes the archive, behind the line that makes it a command."""
    with path.open("wb") as file:
        file.write(b"#!/usr/bin/env python3\n")
        with zipfile.ZipFile(file, "w") as archive:
            for name, data in sorted(entries.items()):
                info = zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0))
                info.create_system = 3  # Unix, wherever it is built
                info.external_attr = (stat.S_IFREG | 0o644) << 16
                info.compress_type = zipfile.ZIP_DEFLATED
                # To inflate 17 MB of native code takes 0.1 s and 10 MB of memory at
                # each start. A file for several Pythons would be too large otherwise.
                if one_python and name.startswith("native/"):
                    info.compress_type = zipfile.ZIP_STORED
                # Level 9 takes twice the time, for 0.5 % less.
                archive.writestr(info, data, compresslevel=6)
    path.chmod(0o755)


if __name__ == "__main__":
    main()
