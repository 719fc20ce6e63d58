#!/usr/bin/env bash
# Builds, runs and tests the Tenstorrent device plugin.
#
#   ./build.sh                    make dist/tt-device-plugin.pyz: one executable file for this machine's Python
#   ./build.sh --universal        make dist/tt-device-plugin-universal.pyz: one for CPython 3.10 to 3.15, x86_64 and aarch64
#   ./build.sh image [NAME:TAG]   make an OCI image with docker, podman or buildah, whichever is there
#   ./build.sh run [ARGS]         build if anything changed, then run it:  ./build.sh run --fake n150=2 --dry-run
#   ./build.sh test [--long] [PYTEST ARGS]
#                                 all tests, in an environment of their own:  ./build.sh test -k registration -x
#                                 --long: with a hundred restarts, a thousand dropped streams and long pauses
#   ./build.sh bench [--json] [--quick] [NAME...]
#                                 measure it, every figure beside a bare baseline of the same run; names: see --help
#   ./build.sh check              lint (ruff) and type-check (mypy --strict) the files written by hand
#   ./build.sh stubs [DIR]        generate api_pb2.py and api_pb2_grpc.py from api.proto, here or into DIR
#   ./build.sh lock [UV ARGS]     make requirements.txt anew; newer versions only with --upgrade
#   ./build.sh help               print this
#
# It needs Linux and CPython 3.10 or newer with pip, and for test and check also venv. PYTHON names the interpreter
# (default: python3). It needs no root, and pip's own settings (proxy, mirror, certificates) hold. Everything it makes is
# in build/ and dist/; only `stubs` and `lock` touch other files, those they are for. The same input gives the same file.
#
# For image: BASE is the image to start from (default: docker.io/library/python:3.13-slim; any with a Python of 3.10 to
# 3.15 and glibc will do), PLATFORMS is what to build for (default: this machine; linux/amd64,linux/arm64 needs no
# emulation), and TOOL names one of the tools.
#
# Exit codes: 0 done; 1 this machine lacks something (the message says what) or a step failed; 2 usage; 3 this Python is
# too new for `stubs`.

set -euo pipefail

TOP=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
BUILD=$TOP/build
PYZ=$TOP/dist/tt-device-plugin.pyz
UNIVERSAL=$TOP/dist/tt-device-plugin-universal.pyz
PYTHON=${PYTHON:-python3}

# What goes into the file, and what else it is made from.
SOURCES=(tt_device_plugin.py api_pb2.py api_pb2_grpc.py)
INPUTS=("${SOURCES[@]}" requirements.txt build.sh)

# What the universal file is for: each pair adds 7 MB. Not musl: protobuf has no native module for it.
PYTHONS=(3.10 3.11 3.12 3.13 3.14 3.15)
CPUS=(x86_64 aarch64)

# What is asked for; requirements.txt has what follows from it, with hashes. A generator's code runs on its own protobuf
# and all later ones, so the stubs come from an old one: they load on grpcio 1.51 as well as on today's.
RUNTIME=(grpcio==1.85.1 protobuf==7.36.2)
TEST=(pytest hypothesis PyYAML prometheus-client jsonschema kubernetes-validate 'cyclonedx-python-lib[json-validation]'
    ruff mypy mypy-protobuf types-protobuf types-grpcio types-PyYAML types-jsonschema)
STUBS=(grpcio-tools==1.62.3)
UV=uv==0.13.9

# pip: never ask, never complain about root, and install where we say even if its settings say otherwise.
export PIP_NO_INPUT=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore PIP_REQUIRE_VIRTUALENV=0 PIP_USER=0


# ---- Small things ----

die() { # [-CODE] SENTENCE
    local code=1
    if [[ $1 == -[0-9] ]]; then code=${1#-}; shift; fi
    echo "build.sh: $*" >&2
    exit "$code"
}

usage() { sed -n '2,/^$/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; }

# Runs a function with build/ to itself: two builds at once would get into each other's way.
alone() { mkdir -p "$BUILD/tmp"; (flock 9; "$@") 9>"$BUILD/.lock"; }

# Prints one part of requirements.txt: runtime, test or stubs.
part() { sed -n "/^# ---- $1: /,/^# ---- /p" "$TOP/requirements.txt" | sed '/^#/d; /^$/d'; }

# Dies if requirements.txt was made from other lists than those above.
check_lock() {
    local list
    for list in "${RUNTIME[*]}" "${TEST[*]}" "${STUBS[*]}"; do
        grep -qxF "# asked for: $list" "$TOP/requirements.txt" ||
            die "requirements.txt was not made from 'asked for: $list': run ./build.sh lock"
    done
}

# A folder that took time to make has beside it the text that it was made from, and stays while that is the same.
made_from() { [[ -e $1 && -f $1.made-from && $(<"$1.made-from") == "$2" ]]; }

# Looks at $PYTHON once: makes it an absolute path (not a shim that depends on the folder) and sets TAG to what native
# modules for it are named after, such as cpython-311-x86_64-linux-gnu.
find_python() {
    command -v -- "$PYTHON" >/dev/null || die "there is no $PYTHON: install python3 (Debian, Ubuntu), or set PYTHON"
    local answer
    answer=$("$PYTHON" - <<'EOF'
import importlib.machinery, platform, sys, sysconfig
if sys.implementation.name != "cpython" or sys.version_info < (3, 10) or sys.platform != "linux":
    sys.exit("build.sh: CPython 3.10 or newer on Linux is needed, and %s is %s %s on %s; set PYTHON to another one" % (
        sys.executable, platform.python_implementation(), platform.python_version(), sys.platform))
if sysconfig.get_config_var("Py_GIL_DISABLED"):
    sys.exit("build.sh: %s is a free-threaded build, for which there is no grpcio; set PYTHON to another one" % sys.executable)
print(sys.executable)
print(importlib.machinery.EXTENSION_SUFFIXES[0][1:-3])
EOF
    ) || exit 1
    { read -r PYTHON; read -r TAG; } <<<"$answer"
}

# Installs packages into a folder, wheels only, nothing compiled:  install_into DIR PIP_ARGS...
# The list of requirements comes on standard input.
install_into() {
    local dir=$1 wanted; shift
    wanted=$(cat)
    made_from "$dir" "$wanted" && return
    "$PYTHON" -m pip --version >/dev/null 2>&1 || die "$PYTHON has no pip: install python3-pip (Debian, Ubuntu)"
    rm -rf "$dir" "$dir.made-from"
    mkdir -p "$(dirname "$dir")"
    echo "$wanted" >"$dir.requirements"
    TMPDIR=$BUILD/tmp "$PYTHON" -m pip install -qq --target "$dir" --no-deps --only-binary=:all: --no-compile "$@" \
        --requirement "$dir.requirements" || die "pip could not fetch what $dir.requirements lists (see above)"
    echo "$wanted" >"$dir.made-from"
}


# ---- The file ----

build() { # [--universal]
    local site=$BUILD/site/$TAG python cpu sites=()
    case $* in
        "")
            part runtime | install_into "$site" --require-hashes
            make_file "$PYZ" "$site"
            ;;
        --universal)
            for python in "${PYTHONS[@]}"; do
                for cpu in "${CPUS[@]}"; do
                    site=$BUILD/site/universal/cpython-${python/./}-$cpu-linux-gnu
                    part runtime | install_into "$site" --require-hashes \
                        --implementation cp --python-version "$python" --platform "manylinux2014_$cpu"
                    sites+=("$site")
                done
            done
            make_file "$UNIVERSAL" "${sites[@]}"
            ;;
        *) die -2 "build knows only --universal, not '$*'" ;;
    esac
}

# Packs folders of packages, each named after what its native modules are named after, unless the file is there already,
# made from the same input:  make_file FILE SITE...
make_file() {
    local file=$1 input sum; shift
    input=$(cd "$TOP" && sha256sum -- "${INPUTS[@]}" && echo "$*")
    local note=$BUILD/$(basename "$file").made-from
    if [[ ! -f $file || ! -f $note || $(<"$note") != "$input $(sha256sum <"$file")" ]]; then
        main_py >"$BUILD/__main__.py"
        mkdir -p "$TOP/dist"
        pack "$file.new" "$@"
        mv -f "$file.new" "$file"
        echo "$input $(sha256sum <"$file")" >"$note"
    fi
    sum=$(sha256sum <"$file")
    echo "$file: $(wc -c <"$file") bytes, SHA-256 ${sum%% *}"
}

# Writes the archive:  pack FILE SITE...  The same input gives the same bytes: sorted names, one date, one mode, and none
# of pip's notes about where it installed what.
#
# In a file for one Python, bytecode lies beside each source: compiling them would double the time to start, and Python
# keeps none for what it imports from a zip. The fixed hash seed makes it the same at each build (before 3.11 the order of
# sets shows in it). The universal file has none: bytecode fits one version of Python only, and this file shall come out
# the same whichever version builds it.
pack() {
    cd / && PYTHONHASHSEED=0 "$PYTHON" -s - "$TOP" "$BUILD" "$@" "${SOURCES[@]/#/--source=}" <<'EOF'
import csv, hashlib, importlib.util, json, marshal, re, stat, sys, zipfile
from email.parser import BytesHeaderParser
from pathlib import Path

top, build, out, *sites = (Path(arg) for arg in sys.argv[1:] if not arg.startswith("--source="))
sources = [arg.removeprefix("--source=") for arg in sys.argv if arg.startswith("--source=")]

# Never read at run time: C++ sources, type stubs, benchmarks, and the certificates that only TLS needs.
UNUSED = re.compile(r"\.(cc|h|pyi|pem|pyx|pxd)$|/py\.typed$|_benchmark\.py$|/testing_refleaks\.py$|/testdata/|/__pycache__/")
NATIVE = {"google._upb._message", "grpc._cython.cygrpc"}  # those that __main__.py looks for

entries = {name: (top / name).read_bytes() for name in sources}
entries["__main__.py"] = (build / "__main__.py").read_bytes()
plugin_files = sorted(entries)
SPDX = {"3-Clause BSD License": "BSD-3-Clause"}  # the name for what a package calls its license otherwise
packages = {}  # name: (what it says about itself, the names of its native modules here)


def add(name, data):
    if entries.setdefault(name, data) != data:
        sys.exit(f"build.sh: two interpreters' packages differ in {name}")


def add_site(site):
    _, _, platform = site.name.split("-", 2)  # x86_64-linux-gnu: a module that fits all Pythons still fits one platform
    found = set()
    for info in sorted(site.glob("*.dist-info")):
        about = BytesHeaderParser().parsebytes((info / "METADATA").read_bytes())
        _, natives = packages.setdefault(about["Name"], (about, set()))
        for name, *_ in csv.reader((info / "RECORD").read_text(encoding="utf-8").splitlines()):
            path = site / name
            if UNUSED.search("/" + name) or name.startswith("../"):  # commands go to ../../bin
                continue
            if ".dist-info/" in name:
                if path.name == "LICENSE":
                    add(f"licenses/{about['Name']}", path.read_bytes())
            elif path.suffix == ".so":
                module = name.split(".")[0].replace("/", ".")
                found.add(module)
                packed = f"native/{platform}/{module}{path.name[path.name.index('.'):]}"
                natives.add(packed)
                add(packed, path.read_bytes())
            elif path.suffix == ".py":
                add(name, path.read_bytes())
            else:
                sys.exit(f"build.sh: what is {path}? Neither Python nor native code: pack() has to be told")
    if found != NATIVE:
        sys.exit(f"build.sh: {site} has the native modules {sorted(found)}, __main__.py loads {sorted(NATIVE)}")


def make_sbom():
    """What is inside, as CycloneDX 1.6 has it."""
    version = re.search(rb'^__version__ = "(.+)"$', entries["tt_device_plugin.py"], re.MULTILINE)[1].decode()

    def files(names):
        return [
            {"type": "file", "name": name, "hashes": [{"alg": "SHA-256", "content": hashlib.sha256(entries[name]).hexdigest()}]}
            for name in sorted(names)
        ]

    def component(kind, name, version, purl, **more):
        return {"type": kind, "bom-ref": purl, "name": name, "version": version, "purl": purl, **more}

    plugin = component("application", "tt-device-plugin", version, f"pkg:generic/tt-device-plugin@{version}",
                       components=files(plugin_files))
    libraries = []
    for name, (about, natives) in sorted(packages.items()):
        terms = {"expression": about["License-Expression"] or SPDX[about["License"]]}
        purl = f"pkg:pypi/{name.lower().replace('_', '-')}@{about['Version']}"
        parts = {"components": files(natives)} if natives else {}
        libraries.append(component("library", name, about["Version"], purl, licenses=[terms], **parts))
    by_name = {library["name"]: library["bom-ref"] for library in libraries}
    needs = {plugin["bom-ref"]: ["grpcio", "protobuf"]}
    for name, (about, _) in packages.items():
        required = [line for line in about.get_all("Requires-Dist", []) if "extra ==" not in line]
        needs[by_name[name]] = [re.match(r"[\w.-]+", line)[0].replace("-", "_") for line in required]
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {"component": plugin},
        "components": libraries,
        "dependencies": [{"ref": ref, "dependsOn": sorted(by_name[n] for n in names)} for ref, names in sorted(needs.items())],
    }


for site in sites:
    add_site(site)
entries["sbom.cdx.json"] = json.dumps(make_sbom(), indent=1).encode()

# A package without __init__.py is one whose parts may lie in several places. With one, ours is the only one: a node's own
# google/ is never mixed in, and zipimport needs no entries for folders.
folders = {parent.as_posix() for name in entries if name.endswith(".py") for parent in Path(name).parents} - {"."}
folders |= {"/".join(module.split(".")[:n]) for module in NATIVE for n in range(1, module.count(".") + 1)}
for folder in folders:
    entries.setdefault(f"{folder}/__init__.py", b"")

if len(sites) == 1:
    UNCHECKED_HASH = (1).to_bytes(4, "little")  # PEP 552: trust the bytecode, whatever the source's date
    for name in sorted(name for name in entries if name.endswith(".py") and name != "__main__.py"):
        code = compile(entries[name], name, "exec", dont_inherit=True)
        header = importlib.util.MAGIC_NUMBER + UNCHECKED_HASH + importlib.util.source_hash(entries[name])
        entries[name + "c"] = header + marshal.dumps(code)

with out.open("wb") as file:
    file.write(b"#!/usr/bin/env python3\n")
    with zipfile.ZipFile(file, "w") as archive:
        for name, data in sorted(entries.items()):
            info = zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0))
            info.create_system = 3  # Unix, wherever it is built
            info.external_attr = (stat.S_IFREG | 0o644) << 16
            # 17 MB of native code take 0.1 s and 10 MB of memory to inflate, at each start. Of several, one is used.
            stored = name.startswith("native/") and len(sites) == 1
            info.compress_type = zipfile.ZIP_STORED if stored else zipfile.ZIP_DEFLATED
            archive.writestr(info, data, compresslevel=6)  # 9 takes twice as long for 0.5 % less
out.chmod(0o755)
EOF
}

# The first thing that runs on a node.
main_py() {
    cat <<'EOF'
"""Starts the device plugin from inside its archive, and writes nothing to any disk.

Python imports its own files from a zip, but not native modules: the dynamic linker wants a file. So each native module is
copied to a file in memory, which the linker opens as /proc/self/fd/N. There is no cache folder that would have to be
writable, trusted, found room for and cleaned up.

Nothing here may be newer than what an old Python can parse: it has to be able to say that it is too old.
"""

import signal
import sys

# Before anything that takes time: as process 1 of a container, Python ignores SIGTERM until there is a handler.
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))

import os
from importlib.machinery import EXTENSION_SUFFIXES, ExtensionFileLoader
from importlib.util import spec_from_file_location

# "cpython-311-x86_64-linux-gnu" in the names of native modules: for which Python, on what.
TAG = EXTENSION_SUFFIXES[0][1:-3]
PLATFORM = TAG.split("-", 2)[-1]


def read_native_module(name):
    """The bytes of the module that fits this Python. Its name follows the same rule as on disk, but by platform: a
    module of the kind .abi3.so fits all Pythons, and has no platform in its name."""
    for suffix in EXTENSION_SUFFIXES:
        try:
            return __loader__.get_data("native/" + PLATFORM + "/" + name + suffix)
        except OSError:
            pass
    sys.exit("%s is not for this Python, %s %s (%s). It is for %s" % (
        __loader__.archive, sys.implementation.name, sys.version.split()[0], TAG, built_for()))


def built_for():
    """What the archive was built for, in words."""
    import re
    import zipfile

    names = "\n".join(zipfile.ZipFile(__loader__.archive).namelist())
    found = re.findall(r"cygrpc\.cpython-3(\d+)-(\S+)\.so$", names, re.M)
    versions = ["3.%d" % minor for minor in sorted({int(minor) for minor, _ in found})]
    return "CPython %s on %s" % (", ".join(versions), " or ".join(sorted({platform for _, platform in found})))


def memory_file(name):
    """A new file with the native module in it, as a path. It is never closed: the next one would get the same path, and the
    linker would take that for the library that it has already."""
    content = read_native_module(name)
    try:
        fd = os.memfd_create(name)
    except (AttributeError, OSError):  # an old kernel, or a sandbox that refuses it: a nameless temporary file
        import tempfile

        with tempfile.TemporaryFile() as file:
            fd = os.dup(file.fileno())
    with open(fd, "wb", closefd=False) as file:
        file.write(content)
    return "/proc/self/fd/%d" % fd


class NativeModules:
    """Tells the import system where the native modules are."""

    def __init__(self, *names):
        self.paths = {name: memory_file(name) for name in names}

    def find_spec(self, name, path=None, target=None):
        if name in self.paths:
            file = self.paths[name]
            return spec_from_file_location(name, file, loader=ExtensionFileLoader(name, file))
        return None


sys.meta_path.insert(0, NativeModules("grpc._cython.cygrpc", "google._upb._message"))
sys.modules.pop("google", None)  # a node's other Python packages may have claimed that name at Python's start

try:
    from tt_device_plugin import main
except ImportError as error:  # such as a missing libstdc++.so.6, or modules that Debian's python3-minimal lacks
    need = "It needs all of python3's standard library, libstdc++6, and /proc"
    sys.exit("%s cannot start: %s. %s" % (__loader__.archive, error, need))

raise SystemExit(main())
EOF
}

run() {
    alone build >&2
    exec "$PYTHON" "$PYZ" "$@"
}


# ---- The image ----

# What is in the universal file, laid down as a folder: that starts fastest. The base image's own Python does it, for all
# CPUs on this one, so that nothing has to be emulated; the image itself is then only copied together. That these are two
# builds and not two stages of one is for buildah: it would take the base of the first stage for both (1.28).
image() { # [NAME:TAG]
    [[ $# -le 1 ]] || die -2 "image takes one name, not '$*'"
    local version tool here context=$BUILD/image
    version=$(sed -n 's/^__version__ = "\(.*\)"$/\1/p' "$TOP/tt_device_plugin.py")
    here=linux/$(uname -m | sed 's/x86_64/amd64/; s/aarch64/arm64/')
    local name=${1:-tt-device-plugin:$version} base=${BASE:-docker.io/library/python:3.13-slim} platforms=${PLATFORMS:-$here}
    find_tool
    build --universal

    rm -rf "$context"
    mkdir "$context"
    ln "$UNIVERSAL" "$context/plugin.pyz"
    unpack_py >"$context/unpack.py"
    "$tool" build --platform "$here" --output "type=local,dest=$context/unpacked" -f - "$context" <<EOF
FROM $base AS unpack
COPY plugin.pyz unpack.py /context/
RUN ["python3", "/context/unpack.py", "/context/plugin.pyz", "/unpacked"]
FROM scratch
COPY --from=unpack /unpacked /
EOF

    local as=(--tag "$name")
    if [[ $tool != docker && $platforms == *,* ]]; then # here the name stands for a list of images, made anew
        "$tool" manifest rm "$name" >/dev/null 2>&1 || true
        as=(--manifest "$name")
    fi
    "$tool" build --platform "$platforms" "${as[@]}" -f - "$context/unpacked" <<EOF
FROM $base
ARG TARGETARCH
LABEL org.opencontainers.image.title="tt-device-plugin" org.opencontainers.image.version="$version"
COPY \$TARGETARCH /opt/tt-device-plugin
ENV PYTHONPYCACHEPREFIX=/opt/tt-device-plugin/bytecode
ENTRYPOINT ["python3", "/opt/tt-device-plugin"]
EOF
    echo "$name: for $platforms, from $base, made by $tool"
}

# Sets `tool` to $TOOL, or the first that works: a docker command without its engine does not.
find_tool() {
    for tool in ${TOOL:-docker podman buildah}; do
        "$tool" info >/dev/null 2>&1 && return
    done
    die "none of these works here: ${TOOL:-docker podman buildah}. Install podman or buildah (Debian, Ubuntu), or start docker"
}

unpack_py() {
    cat <<'EOF'
"""Lays an archive out as folders that this version of Python can run, one for each CPU:  unpack.py ARCHIVE FOLDER"""

import os, py_compile, subprocess, sys, zipfile
from importlib.machinery import EXTENSION_SUFFIXES
from importlib.util import cache_from_source
from pathlib import Path

PLACE = Path("/opt/tt-device-plugin")  # in the image

MAIN = '''\
"""Starts the device plugin:  python3 FOLDER"""

import signal
import sys

# Before anything that takes time: as process 1 of a container, Python ignores SIGTERM until there is a handler.
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))

from tt_device_plugin import main

raise SystemExit(main())
'''

archive = zipfile.ZipFile(sys.argv[1])
names = archive.namelist()
for arch, cpu in ("amd64", "x86_64"), ("arm64", "aarch64"):
    folder = Path(sys.argv[2], arch)
    archive.extractall(folder, [name for name in names if not name.startswith("native/") and name != "__main__.py"])
    suffixes = [suffix.replace(os.uname().machine, cpu) for suffix in EXTENSION_SUFFIXES]
    for module in "google._upb._message", "grpc._cython.cygrpc":
        fitting = [suffix for suffix in suffixes if f"native/{cpu}-linux-gnu/{module}{suffix}" in names]
        if not fitting:
            sys.exit(f"the base image has Python {sys.version.split()[0]} ({suffixes[0]}), and {module} is not there for that")
        file = folder / (module.replace(".", "/") + fitting[0])
        file.write_bytes(archive.read(f"native/{cpu}-linux-gnu/{module}{fitting[0]}"))
    (folder / "__main__.py").write_text(MAIN)

# Bytecode, also of what is used of Python's own library: python:*-slim comes without, which makes a start twice as slow.
sys.pycache_prefix = str(PLACE / "bytecode")
top = Path(sys.argv[2], {"x86_64": "amd64", "aarch64": "arm64"}[os.uname().machine])
program = """import sys; sys.path.insert(0, sys.argv[1]); import tt_device_plugin
import http.server, ipaddress, shutil, tempfile  # which it imports only when it needs them
for module in list(sys.modules.values()): print(getattr(module, "__file__", None))"""
answer = subprocess.run([sys.executable, "-B", "-c", program, top], stdout=subprocess.PIPE, text=True, check=True)
library = [path for path in map(Path, answer.stdout.splitlines()) if path.suffix == ".py" and top not in path.parents]
for folder in Path(sys.argv[2]).iterdir():
    for path, place in [(path, PLACE / path.relative_to(folder)) for path in folder.rglob("*.py")] + [(path, path) for path in library]:
        bytecode = folder / Path(cache_from_source(place)).relative_to(PLACE)
        # By hash: whatever dates the sources get on their way into the image.
        checked = py_compile.PycInvalidationMode.CHECKED_HASH
        py_compile.compile(str(path), str(bytecode), str(place), doraise=True, invalidation_mode=checked)
EOF
}


# ---- Tests and checks ----

# Makes build/venv, with what the plugin needs and what its tests need.
make_venv() {
    local venv=$BUILD/venv wanted
    wanted=$(echo "# $venv $("$PYTHON" -c 'import sys; print(sys.executable, sys.version)')"; part runtime; part test)
    made_from "$venv" "$wanted" && return
    "$PYTHON" -c 'import ensurepip, venv' 2>/dev/null || die "$PYTHON has no venv: install python3-venv (Debian, Ubuntu)"
    rm -rf "$venv" "$venv.made-from"
    "$PYTHON" -m venv "$venv"
    echo "$wanted" >"$venv.requirements"
    TMPDIR=$BUILD/tmp "$venv/bin/python" -m pip install -qq --no-deps --only-binary=:all: --require-hashes \
        --requirement "$venv.requirements" || die "pip could not fetch what $venv.requirements lists (see above)"
    echo "$wanted" >"$venv.made-from"
}

# Whatever tools keep from one run to the next belongs in build/.
keep_caches_in_build() {
    # No PYTHONPYCACHEPREFIX: it would hide the bytecode in the venv, and each process of a test would compile all of grpc.
    export PYTHONDONTWRITEBYTECODE=1 HYPOTHESIS_STORAGE_DIRECTORY=$BUILD/cache/hypothesis
    export RUFF_CACHE_DIR=$BUILD/cache/ruff MYPY_CACHE_DIR=$BUILD/cache/mypy
}

run_tests() {
    alone build
    alone make_venv
    keep_caches_in_build
    cd "$TOP"
    if [[ ${1:-} == --long ]]; then export TT_TEST_LONG=1; shift; fi
    exec "$BUILD/venv/bin/python" -m pytest -o cache_dir="$BUILD/cache/pytest" \
        -o tmp_path_retention_policy=failed test_plugin.py "$@"
}

bench() {
    alone build >&2
    alone make_venv
    keep_caches_in_build
    GRPC_VERBOSITY=NONE exec "$BUILD/venv/bin/python" "$TOP/test_plugin.py" --bench "$@"
}

check() {
    alone make_venv
    keep_caches_in_build
    cd "$TOP"
    local python=$BUILD/venv/bin/python status=0
    local files=(tt_device_plugin.py test_plugin.py)

    "$python" -m ruff check --isolated --target-version py310 --line-length 128 \
        --select E,F,W,I,B,UP,SIM,RUF,PLE "${files[@]}" || status=1

    # As if on the oldest Python that we support, so that nothing newer slips in.
    alone describe_types "$BUILD/typing"
    MYPYPATH=$BUILD/typing "$python" -m mypy --config-file= --strict --python-version 3.10 "${files[@]}" || status=1
    return $status
}

# Writes api_pb2.pyi and api_pb2_grpc.pyi, which mypy reads instead of the generated code. The one that protoc itself can
# write does not pass --strict and knows no services; mypy-protobuf's does, and needs no protoc: what it wants to be told,
# api_pb2 knows.
describe_types() {
    mkdir -p "$1"
    PYTHONPATH=$TOP "$BUILD/venv/bin/python" - "$1" <<'EOF'
import subprocess, sys
from pathlib import Path

import api_pb2
from google.protobuf.compiler.plugin_pb2 import CodeGeneratorRequest, CodeGeneratorResponse

request = CodeGeneratorRequest(file_to_generate=[api_pb2.DESCRIPTOR.name])
api_pb2.DESCRIPTOR.CopyToProto(request.proto_file.add())
for generator in "protoc-gen-mypy", "protoc-gen-mypy_grpc":
    answer = subprocess.run(
        [Path(sys.executable).with_name(generator)], input=request.SerializeToString(), capture_output=True, check=True)
    for file in CodeGeneratorResponse.FromString(answer.stdout).file:
        Path(sys.argv[1], file.name).write_text(file.content)
EOF
}


# ---- Files that are generated and kept in git ----

stubs() { # [DIR]
    local dir=${1:-$TOP} tools=$BUILD/stubs/$TAG
    "$PYTHON" -c 'import sys; sys.exit(sys.version_info >= (3, 13))' ||
        die -3 "the generator, ${STUBS[*]}, exists for CPython 3.10 to 3.12 only: set PYTHON to one of these"
    part stubs | install_into "$tools" --require-hashes
    mkdir -p "$dir"
    PYTHONPATH=$tools "$PYTHON" -m grpc_tools.protoc --proto_path="$TOP" --python_out="$dir" --grpc_python_out="$dir" api.proto
}

lock() { # [UV ARGS]
    local work=$BUILD/lock name
    local -A title=(
        [runtime]="what the plugin needs, and what goes into its archive"
        [test]="what './build.sh test' and './build.sh check' need besides"
        [stubs]="what './build.sh stubs' needs; its own dependencies are not wanted, see there"
    )
    local -A asked_for=([runtime]=${RUNTIME[*]} [test]=${TEST[*]} [stubs]=${STUBS[*]})
    install_into "$BUILD/uv" <<<"$UV"
    rm -rf "$work"
    mkdir -p "$work"
    printf '%s\n' "${RUNTIME[@]}" >"$work/runtime.in"
    printf '%s\n' "${TEST[@]}" >"$work/test.in"
    printf '%s\n' "${STUBS[@]}" >"$work/stubs.in"

    # uv does not read pip's settings: hand on the mirror, if there is one.
    local mirror=${PIP_INDEX_URL:-$("$PYTHON" -m pip config get global.index-url 2>/dev/null || true)}
    [[ -z $mirror ]] || export UV_DEFAULT_INDEX=$mirror
    export UV_CACHE_DIR=$BUILD/cache/uv

    compile() { # PART UV_ARGS...: for every Python from 3.10 on and every platform; versions stay as they are
        local name=$1; shift
        [[ ! -f $TOP/requirements.txt ]] || part "$name" >"$work/$name.txt"
        "$BUILD/uv/bin/uv" pip compile --quiet --no-config --universal --python "$PYTHON" --python-version 3.10 \
            --generate-hashes --no-header --no-annotate "$@" --output-file "$work/$name.txt" "$work/$name.in" >/dev/null
    }
    compile runtime "$@"
    local known
    mapfile -t known < <(sed -n 's/^\([A-Za-z0-9._-]*\)==.*/--no-emit-package=\1/p' "$work/runtime.txt")
    compile test --constraints "$work/runtime.txt" "${known[@]}" "$@"
    compile stubs --no-deps "$@"

    {
        echo "# Every package with its version and the hashes of all its files, for every Python and platform."
        echo "# Made by './build.sh lock', which also takes it apart at the lines that begin with '# ----'."
        for name in runtime test stubs; do
            printf '\n# ---- %s: %s ----\n# asked for: %s\n' "$name" "${title[$name]}" "${asked_for[$name]}"
            cat "$work/$name.txt"
        done
    } >"$work/requirements.txt"
    mv "$work/requirements.txt" "$TOP/requirements.txt"
}


# ---- What to do ----

command=${1:-build}
if [[ $command == --universal ]]; then command=build; elif [[ $# -gt 0 ]]; then shift; fi
case $command in
    help | -h | --help) usage; exit ;;
    build | image | run | test | bench | check | stubs) check_lock; find_python ;;
    lock) find_python ;;
    *) usage >&2; die -2 "there is no command '$command'" ;;
esac
case $command in
    build) alone build "$@" ;;
    image) alone image "$@" ;;
    run) run "$@" ;;
    test) run_tests "$@" ;;
    bench) bench "$@" ;;
    check) check ;;
    stubs) alone stubs "$@" ;;
    lock) alone lock "$@" ;;
esac
