#!/usr/bin/env bash
# Builds, runs and tests the Tenstorrent device plugin.
#
#   ./build.sh                    make dist/tt-device-plugin.pyz: one executable file for this machine's Python
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
# in build/ and dist/; only `stubs` and `lock` touch other files, those they are for.
#
# Exit codes: 0 done; 1 this machine lacks something (the message says what) or a step failed; 2 usage; 3 this Python is
# too new for `stubs`.

set -euo pipefail

TOP=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
BUILD=$TOP/build
PYZ=$TOP/dist/tt-device-plugin.pyz
PYTHON=${PYTHON:-python3}

# What goes into the file, and what else it is made from. A change to any of these makes `run` and `test` build anew.
SOURCES=(tt_device_plugin.py api_pb2.py api_pb2_grpc.py)
INPUTS=("${SOURCES[@]}" requirements.txt build.sh)

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

# A file for an interpreter is named after it; one for several would have several folders of packages.
build() {
    local started=$BUILD/tmp/started site=$BUILD/site/$TAG
    touch "$started"
    part runtime | install_into "$site" --require-hashes
    main_py >"$BUILD/__main__.py"
    mkdir -p "$TOP/dist"
    pack "$PYZ.new" "$site"
    # As old as the start of the build: a source saved during the build is then newer than the file.
    touch -r "$started" "$PYZ.new"
    mv -f "$PYZ.new" "$PYZ"
    echo "$TAG" >"$BUILD/pyz.tag"
    echo "$PYZ for $TAG, $(wc -c <"$PYZ") bytes, SHA-256 $(sha256sum <"$PYZ" | cut -d' ' -f1)"
}

build_if_needed() {
    local input
    if [[ -f $PYZ && -f $BUILD/pyz.tag && $(<"$BUILD/pyz.tag") == "$TAG" ]]; then
        for input in "${INPUTS[@]}"; do
            [[ $PYZ -nt $TOP/$input ]] || { build; return; }
        done
    else
        build
    fi
}

# Writes the archive:  pack FILE SITE...  The same input gives the same bytes: sorted names, one date, one mode, and none
# of pip's notes about where it installed what. Bytecode lies beside each source: compiling them would more than double the
# time to start, and Python keeps none for what it imports from a zip. Another version of Python falls back to the source.
# The fixed hash seed makes it the same at each build (before 3.11 the order of sets shows in it).
pack() {
    cd / && PYTHONHASHSEED=0 "$PYTHON" -s - "$TOP" "$BUILD" "$@" "${SOURCES[@]/#/--source=}" <<'EOF'
import importlib.util, marshal, re, stat, sys, zipfile
from pathlib import Path

top, build, out, *sites = (Path(arg) for arg in sys.argv[1:] if not arg.startswith("--source="))
sources = [arg.removeprefix("--source=") for arg in sys.argv if arg.startswith("--source=")]

# Never read at run time: C++ sources, type stubs, benchmarks, and the certificates that only TLS needs.
UNUSED = re.compile(r"\.(cc|h|pyi|pem|pyx|pxd)$|/py\.typed$|_benchmark\.py$|/testing_refleaks\.py$|/testdata/|/__pycache__/")
NATIVE = {"google._upb._message", "grpc._cython.cygrpc"}  # those that __main__.py looks for

entries = {name: (top / name).read_bytes() for name in sources}
entries["__main__.py"] = (build / "__main__.py").read_bytes()


def add(name, data):
    if entries.setdefault(name, data) != data:
        sys.exit(f"build.sh: two interpreters' packages differ in {name}")


for site in sites:
    _, _, platform = site.name.split("-", 2)  # x86_64-linux-gnu: a module that fits all Pythons still fits one platform
    native = set()
    for path in site.rglob("*"):
        name = path.relative_to(site).as_posix()
        if path.is_dir() or UNUSED.search("/" + name):
            continue
        if ".dist-info/" in name:
            if path.name == "LICENSE":
                add(f"licenses/{name.split('-')[0]}", path.read_bytes())
        elif path.suffix == ".so":
            module = name.split(".")[0].replace("/", ".")
            native.add(module)
            add(f"native/{platform}/{module}{path.name[path.name.index('.'):]}", path.read_bytes())
        elif path.suffix == ".py":
            add(name, path.read_bytes())
        elif not name.startswith("bin/"):
            sys.exit(f"build.sh: what is {path}? Neither Python nor native code: pack() has to be told")
    if native != NATIVE:
        sys.exit(f"build.sh: {site} has the native modules {sorted(native)}, __main__.py loads {sorted(NATIVE)}")

# A package without __init__.py is one whose parts may lie in several places. With one, ours is the only one: a node's own
# google/ is never mixed in, and zipimport needs no entries for folders.
packages = {parent.as_posix() for name in entries if name.endswith(".py") for parent in Path(name).parents} - {"."}
packages |= {"/".join(module.split(".")[:n]) for module in NATIVE for n in range(1, module.count(".") + 1)}
for package in packages:
    entries.setdefault(f"{package}/__init__.py", b"")

UNCHECKED_HASH = (1).to_bytes(4, "little")  # PEP 552: trust the bytecode, whatever the source's date
for name in [name for name in entries if name.endswith(".py") and name != "__main__.py"]:
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
            # 17 MB of native code take 0.07 s and 10 MB of memory to inflate, at each start. Of several, one is used.
            stored = name.startswith("native/") and len(sites) == 1
            info.compress_type = zipfile.ZIP_STORED if stored else zipfile.ZIP_DEFLATED
            archive.writestr(info, data, compresslevel=9)
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
    sys.exit("%s is not for this Python, %s %s (%s). It is for: %s" % (
        __loader__.archive, sys.implementation.name, sys.version.split()[0], TAG, ", ".join(built_for())))


def built_for():
    """What the archive was built for, in words."""
    import re
    import zipfile

    names = "\n".join(zipfile.ZipFile(__loader__.archive).namelist())
    found = re.findall(r"cygrpc\.cpython-(\d)(\d+)-(\S+)\.so$", names, re.M)
    return ["CPython %s.%s (%s)" % match for match in sorted(found, key=lambda match: (match[2], int(match[1])))]


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

from tt_device_plugin import main

raise SystemExit(main())
EOF
}

run() {
    alone build_if_needed >&2
    exec "$PYTHON" "$PYZ" "$@"
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
    alone build_if_needed
    alone make_venv
    keep_caches_in_build
    cd "$TOP"
    if [[ ${1:-} == --long ]]; then export TT_TEST_LONG=1; shift; fi
    exec "$BUILD/venv/bin/python" -m pytest -o cache_dir="$BUILD/cache/pytest" test_plugin.py "$@"
}

bench() {
    alone build_if_needed >&2
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
            printf '\n# ---- %s: %s ----\n' "$name" "${title[$name]}"
            cat "$work/$name.txt"
        done
    } >"$work/requirements.txt"
    mv "$work/requirements.txt" "$TOP/requirements.txt"
}


# ---- What to do ----

command=${1:-build}
[[ $# -eq 0 ]] || shift
case $command in
    help | -h | --help) usage; exit ;;
    build | run | test | bench | check | stubs | lock) find_python ;;
    *) usage >&2; die -2 "there is no command '$command'" ;;
esac
case $command in
    build) alone build ;;
    run) run "$@" ;;
    test) run_tests "$@" ;;
    bench) bench "$@" ;;
    check) check ;;
    stubs) alone stubs "$@" ;;
    lock) alone lock "$@" ;;
esac
