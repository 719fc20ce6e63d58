"""Packs the plugin and what it needs into one executable file:  pack.py FILE [--sbom SBOM] SITE...

A SITE is a folder of installed packages, named after what its native modules are named after, such
as cpython-311-x86_64-linux-gnu. The same input gives the same bytes: sorted names, one date, one
mode, and none of the installer's notes about where it put what.

In a file for one Python, bytecode lies beside each source: compiling them would double the time to
start, and Python keeps none for what it imports from a zip. The file for several Pythons has none:
bytecode fits one version only, and this file shall come out the same whichever version builds it.
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

# Never read at run time: C++ sources, type stubs, benchmarks, the certificates that only TLS needs.
UNUSED = re.compile(
    r"\.(cc|h|pyi|pem|pyx|pxd)$|/py\.typed$|_benchmark\.py$|/testing_refleaks\.py$"
    r"|/testdata/|/__pycache__/"
)

UNCHECKED_HASH = (1).to_bytes(
    4, "little"
)  # PEP 552: trust the bytecode, whatever the source's date


def main() -> None:
    """The program."""
    parser = argparse.ArgumentParser()
    parser.add_argument("file", type=Path)
    parser.add_argument("--sbom", type=Path)
    parser.add_argument("sites", type=Path, nargs="+")
    options = parser.parse_args()
    entries = {name: (TOP / name).read_bytes() for name in SOURCES}
    entries["__main__.py"] = (TOP / "tools/starter.py").read_bytes()
    if options.sbom:
        entries["sbom.cdx.json"] = options.sbom.read_bytes()
    for site in options.sites:
        add_site(entries, site)
    add_packages(entries)
    if len(options.sites) == 1:
        add_bytecode(entries)
    write(options.file, entries, one_python=len(options.sites) == 1)


def add_site(entries: dict[str, bytes], site: Path) -> None:
    """Adds what is used of these packages: Python files, native modules, licenses."""
    # x86_64-linux-gnu: a module that fits all Pythons still fits one platform.
    platform = site.name.split("-", 2)[2]
    found = set()

    def add(name: str, path: Path) -> None:
        data = path.read_bytes()
        if entries.setdefault(name, data) != data:
            sys.exit(f"build.sh: two interpreters' packages differ in {name}")

    for info in sorted(site.glob("*.dist-info")):
        package = BytesHeaderParser().parsebytes((info / "METADATA").read_bytes())["Name"]
        for name, *_ in csv.reader((info / "RECORD").read_text(encoding="utf-8").splitlines()):
            path = site / name
            if UNUSED.search("/" + name) or name.startswith(("../", "bin/")):  # commands
                continue
            if ".dist-info/" in name:
                if path.name == "LICENSE":
                    add(f"licenses/{package}", path)
            elif path.suffix == ".so":
                module = name.split(".")[0].replace("/", ".")
                found.add(module)
                add(f"native/{platform}/{module}{path.name[path.name.index('.') :]}", path)
            elif path.suffix == ".py":
                add(name, path)
            else:
                sys.exit(
                    f"build.sh: {path} is neither Python nor native code: pack.py must be told"
                )
    if found != NATIVE:
        sys.exit(f"build.sh: {site} has the native modules {sorted(found)}, not {sorted(NATIVE)}")


def add_packages(entries: dict[str, bytes]) -> None:
    """Adds an __init__.py to each folder that has none.

    A package without one may have its parts in several places. With one, ours is the only one: a
    node's own google/ is never mixed in, and zipimport needs no entries for folders.
    """
    modules = [name.removesuffix(".py") for name in entries if name.endswith(".py")]
    for module in [*modules, *(name.replace(".", "/") for name in NATIVE)]:
        for folder in list(Path(module).parents)[:-1]:
            entries.setdefault(f"{folder.as_posix()}/__init__.py", b"")


def add_bytecode(entries: dict[str, bytes]) -> None:
    """Adds the bytecode of each Python file but the first, for the Python that runs this."""
    for name in sorted(entries):
        if name.endswith(".py") and name != "__main__.py":
            code = compile(entries[name], name, "exec", dont_inherit=True, optimize=0)
            header = UNCHECKED_HASH + importlib.util.source_hash(entries[name])
            # Version 2: later ones mark what is referred to twice, which differs from run to run.
            entries[name + "c"] = importlib.util.MAGIC_NUMBER + header + marshal.dumps(code, 2)


def write(path: Path, entries: dict[str, bytes], one_python: bool) -> None:
    """Writes the archive, behind the line that makes it a command."""
    with path.open("wb") as file:
        file.write(b"#!/usr/bin/env python3\n")
        with zipfile.ZipFile(file, "w") as archive:
            for name, data in sorted(entries.items()):
                info = zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0))
                info.create_system = 3  # Unix, wherever it is built
                info.external_attr = (stat.S_IFREG | 0o644) << 16
                # 17 MB of native code take 0.1 s and 10 MB of memory to inflate, at each start.
                # Of several, one is used.
                stored = one_python and name.startswith("native/")
                info.compress_type = zipfile.ZIP_STORED if stored else zipfile.ZIP_DEFLATED
                archive.writestr(info, data, compresslevel=6)  # 9: twice the time for 0.5 % less
    path.chmod(0o755)


if __name__ == "__main__":
    main()
