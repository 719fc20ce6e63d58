#!/usr/bin/env bash
# Builds, runs and tests the Tenstorrent device plugin.
#
#   ./build.sh                make dist/tt-device-plugin.pyz: one executable file for this Python
#   ./build.sh --universal    make dist/tt-device-plugin-universal.pyz: one for CPython 3.10 to
#                             3.15, x86_64 and aarch64
#   ./build.sh run [ARGS]     build if anything changed, then run it: run --fake n150=2 --dry-run
#   ./build.sh image [NAME]   make an OCI image with docker, podman or buildah, and
#                             dist/daemonset.yaml, the manifest for it
#   ./build.sh unit           print a systemd unit that runs dist/tt-device-plugin.pyz on a node
#   ./build.sh test [--long] [PYTEST ARGS]
#                             all tests, in an environment of their own: test -k registration -x
#                             --long: with a hundred restarts, a thousand dropped streams
#   ./build.sh bench [--json] [--quick] [NAME...]
#                             measure it, each figure beside a bare baseline of the same run
#   ./build.sh check          formatting, lint (ruff), types (mypy --strict) and sizes of the files
#                             written by hand; whether the stubs are what api.proto makes
#   ./build.sh stubs [DIR]    generate api_pb2.py and api_pb2_grpc.py from api.proto, here or in DIR
#   ./build.sh lock [UV ARGS] make requirements.txt anew; newer versions only with --upgrade
#   ./build.sh help           print this
#
# It needs Linux and CPython 3.10 or newer with pip, and no root. PYTHON names the interpreter
# (default: python3). pip's own settings (proxy, mirror, certificates) hold. Everything it makes is
# in build/ and dist/; only `stubs` and `lock` touch other files, those they are for. The same input
# gives the same file.
#
# For image: BASE is the image to start from (default: docker.io/library/python:3.13-slim; any with
# glibc and CPython 3.10 to 3.15), TOOL one of the tools, PLATFORMS what to build for (default: this
# machine; linux/amd64,linux/arm64 needs qemu-user-static with a podman or buildah of Debian 12).
#
# Exit codes: 0 done; 1 this machine lacks something (the message says what) or a step failed;
# 2 usage; 3 this Python is too new for `stubs`.

set -euo pipefail

TOP=$(CDPATH= cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
TOOLS=$TOP/tools
BUILD=$TOP/build
DIST=$TOP/dist
PYTHON=${PYTHON:-python3}

# What the file is made from.
INPUTS=(tt_device_plugin.py api_pb2.py api_pb2_grpc.py requirements.txt build.sh
    tools/pack.py tools/starter.py)

# What the universal file is for; each pair adds 7 MB. Not musl: protobuf has no wheel for it.
PYTHONS=(3.10 3.11 3.12 3.13 3.14 3.15)
CPUS=(x86_64 aarch64)

# What is asked for; the part of requirements.txt with the same name has what follows from it, with
# hashes. A generator's code runs on its own protobuf and all later ones, so the stubs come from an
# old one: they load on grpcio 1.51 as well as on today's.
PARTS=(runtime test sbom uv stubs)
asked_for() { # PART
    case $1 in
        runtime) echo grpcio==1.85.1 protobuf==7.36.2 ;;
        test) echo pytest hypothesis PyYAML prometheus-client kubernetes-validate pip ruff mypy \
            mypy-protobuf types-protobuf types-grpcio types-PyYAML ;;
        sbom) echo cyclonedx-bom ;;
        uv) echo uv==0.13.9 ;;
        stubs) echo grpcio-tools==1.62.3 ;;
    esac
}

# pip: never ask, never complain about root, and install where we say even if its settings say
# otherwise. uv: likewise, and fetch no Python.
export PIP_NO_INPUT=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
export PIP_REQUIRE_VIRTUALENV=0 PIP_USER=0
export UV_NO_CONFIG=1 UV_PYTHON_DOWNLOADS=never UV_CACHE_DIR=$BUILD/cache/uv


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

# Prints one part of requirements.txt.
part() { sed -n "/^# ---- $1 /,/^# ---- /p" "$TOP/requirements.txt" | sed '/^#/d; /^$/d'; }

# Dies if requirements.txt was made from other lists than those above.
check_lock() {
    local name
    for name in "${PARTS[@]}"; do
        grep -qxF "# asked for: $(asked_for "$name")" "$TOP/requirements.txt" ||
            die "requirements.txt was not made from '$(asked_for "$name")': run ./build.sh lock"
    done
}

# What took time to make has beside it the text that it was made from, and stays while that holds.
made_from() { [[ -e $1 && -f $1.made-from && $(<"$1.made-from") == "$2" ]]; }

# Looks at $PYTHON once: makes it an absolute path (not a shim that depends on the folder), and sets
# TAG to what native modules for it are named after, such as cpython-311-x86_64-linux-gnu.
find_python() {
    local answer
    command -v -- "$PYTHON" >/dev/null ||
        die "there is no $PYTHON: install python3 (Debian, Ubuntu), or set PYTHON"
    answer=$("$PYTHON" "$TOOLS/interpreter.py") || exit 1
    { read -r PYTHON; read -r TAG; } <<<"$answer"
}

version() { sed -n 's/^__version__ = "\(.*\)"$/\1/p' "$TOP/tt_device_plugin.py"; }


# ---- Packages ----

# Installs parts of requirements.txt into a folder, wheels only:  install DIR "PARTS" INSTALLER...
install() {
    local dir=$1 part wanted
    wanted=$(for part in $2; do part "$part"; done)
    [[ $3 != as_environment ]] || wanted+=$'\n'"# $dir $PYTHON $TAG" # all these are written in it
    made_from "$dir" "$wanted" && return
    rm -rf "$dir" "$dir.made-from"
    mkdir -p "$(dirname "$dir")"
    echo "$wanted" >"$dir.requirements"
    "${@:3}" "$dir" --no-deps --only-binary=:all: --require-hashes \
        --requirement "$dir.requirements" ||
        die "could not fetch what $dir.requirements lists (see above)"
    echo "$wanted" >"$dir.made-from"
}

with_pip() { # DIR PIP_ARGS...
    "$PYTHON" -m pip --version >/dev/null 2>&1 ||
        die "$PYTHON has no pip: install python3-pip (Debian, Ubuntu)"
    TMPDIR=$BUILD/tmp "$PYTHON" -m pip install -qq --no-compile --target "$@"
}

with_uv() { # PYTHON_VERSION UV_PLATFORM DIR UV_ARGS...
    uv pip install --quiet --python "$PYTHON" --python-version "$1" --python-platform "$2" \
        --target "${@:3}"
}

as_environment() { # DIR UV_ARGS...: one whose bin/python has these packages and no others
    uv venv --quiet --python "$PYTHON" "$1"
    uv pip install --quiet --compile-bytecode --python "$1/bin/python" "${@:2}"
}

uv() { "$BUILD/uv/bin/uv" "$@"; }

# Fetches uv, which does in seconds what takes pip half a minute, and hands pip's settings on to it.
get_uv() {
    local settings scope name value
    install "$BUILD/uv" uv with_pip
    settings=$("$PYTHON" -m pip config list)
    for scope in global install :env:; do # the later overrides the earlier
        while IFS='=' read -r name value; do
            value=${value//\'/} value=${value//\\n/ }
            case ${name#"$scope".} in
                index-url) export UV_DEFAULT_INDEX=$value ;;
                extra-index-url) export UV_INDEX=$value UV_INDEX_STRATEGY=unsafe-best-match ;;
                find-links) export UV_FIND_LINKS=${value// /,} ;;
                no-index) export UV_NO_INDEX=$value ;;
                trusted-host) export UV_INSECURE_HOST=$value ;;
                proxy) export ALL_PROXY=$value ;;
                cert) export SSL_CERT_FILE=$value ;;
                client-cert) export SSL_CLIENT_CERT=$value ;;
            esac
        done <<<"$settings"
    done
}


# ---- The file ----

build() { # [--universal]
    local sites=() python cpu
    case $* in
        "")
            install "$BUILD/site/$TAG" runtime with_pip
            make_file tt-device-plugin.pyz "$BUILD/site/$TAG"
            ;;
        --universal)
            get_uv
            for python in "${PYTHONS[@]}"; do
                for cpu in "${CPUS[@]}"; do
                    sites+=("$BUILD/site/universal/cpython-${python/./}-$cpu-linux-gnu")
                    install "${sites[-1]}" runtime with_uv "$python" "$cpu-manylinux2014"
                done
            done
            make_sbom
            make_file tt-device-plugin-universal.pyz --sbom "$BUILD/sbom/sbom.json" "${sites[@]}"
            ;;
        *) die -2 "build knows only --universal, not '$*'" ;;
    esac
}

# Packs a file, unless it is there already, made from the same input:  make_file NAME PACK_ARGS...
# The fixed hash seed makes equal bytecode at each build: before 3.11 the order of sets shows in it.
make_file() {
    local file=$DIST/$1 note=$BUILD/$1.made-from input sum; shift
    input=$(cd "$TOP" && sha256sum -- "${INPUTS[@]}" && echo "$*")
    if [[ ! -f $file || ! -f $note || $(<"$note") != "$input $(sha256sum <"$file")" ]]; then
        mkdir -p "$DIST"
        PYTHONHASHSEED=0 "$PYTHON" -s "$TOOLS/pack.py" "$file.new" "$@"
        mv -f "$file.new" "$file"
        echo "$input $(sha256sum <"$file")" >"$note"
    fi
    sum=$(sha256sum <"$file")
    echo "$file: $(wc -c <"$file") bytes, SHA-256 ${sum%% *}"
}

# Writes build/sbom/sbom.json: what the file has inside, as CycloneDX. cyclonedx-py lists what is
# installed in an environment, so there is one with just that.
make_sbom() {
    local dir=$BUILD/sbom wanted
    wanted=$(part runtime; part sbom; version)
    made_from "$dir/sbom.json" "$wanted" && return
    install "$dir/runtime" runtime as_environment
    install "$dir/tool" sbom as_environment
    printf '[project]\nname = "tt-device-plugin"\nversion = "%s"\ndependencies = [%s]\n' \
        "$(version)" '"grpcio", "protobuf"' >"$dir/pyproject.toml"
    "$dir/tool/bin/cyclonedx-py" environment "$dir/runtime" --pyproject "$dir/pyproject.toml" \
        --gather-license-texts --output-reproducible --output-file "$dir/sbom.json"
    echo "$wanted" >"$dir/sbom.json.made-from"
}

run() {
    alone build >&2
    exec "$PYTHON" "$DIST/tt-device-plugin.pyz" "$@"
}


# ---- The image ----

# What is in the universal file, as a folder: that starts fastest. $BUILDPLATFORM needs BuildKit.
image() { # [NAME]
    [[ $# -le 1 ]] || die -2 "image takes one name, not '$*'"
    local tool name=${1:-tt-device-plugin:$(version)} context=$BUILD/image as
    local base=${BASE:-docker.io/library/python:3.13-slim} platforms=${PLATFORMS:-}
    : "${platforms:=linux/$(uname -m | sed 's/x86_64/amd64/; s/aarch64/arm64/')}"
    find_tool
    build --universal
    rm -rf "$context"
    mkdir "$context"
    cp "$DIST/tt-device-plugin-universal.pyz" "$TOOLS/image_folder.py" "$context"
    as=(--tag "$name")
    if [[ $tool != docker && $platforms == *,* ]]; then # the name of a list of images, made anew
        "$tool" manifest rm "$name" >/dev/null 2>&1 || true
        as=(--manifest "$name")
    fi
    DOCKER_BUILDKIT=1 "$tool" build --platform "$platforms" "${as[@]}" --file - "$context" <<EOF
FROM --platform=\$BUILDPLATFORM $base AS layout
ARG TARGETARCH
USER 0
COPY . /context
RUN ["python3", "/context/image_folder.py", "/context/tt-device-plugin-universal.pyz", "/layout"]
FROM $base
LABEL org.opencontainers.image.title=tt-device-plugin org.opencontainers.image.version=$(version)
COPY --from=layout /layout /opt/tt-device-plugin
ENV PYTHONPYCACHEPREFIX=/opt/tt-device-plugin/bytecode
ENTRYPOINT ["python3", "/opt/tt-device-plugin"]
EOF
    "$PYTHON" "$TOOLS/manifest.py" "$name" >"$DIST/daemonset.yaml"
    echo "$name: for $platforms, from $base, made by $tool; $DIST/daemonset.yaml runs it"
}

# Sets `tool` to $TOOL, or the first that works: a docker command without its engine does not.
find_tool() {
    for tool in ${TOOL:-docker podman buildah}; do
        "$tool" info >/dev/null 2>&1 && return
    done
    die "none of these works here: ${TOOL:-docker podman buildah}. Install podman or buildah" \
        "(Debian, Ubuntu), or start docker"
}


# ---- Tests and checks ----

make_venv() { get_uv; install "$BUILD/venv" "runtime test" as_environment; }

# Makes the environment and goes there. Whatever tools keep from one run to the next is in build/.
# No PYTHONPYCACHEPREFIX: it would hide the bytecode in the venv, and each process compile grpc.
enter_venv() {
    alone make_venv
    export PYTHONDONTWRITEBYTECODE=1 HYPOTHESIS_STORAGE_DIRECTORY=$BUILD/cache/hypothesis
    export RUFF_CACHE_DIR=$BUILD/cache/ruff MYPY_CACHE_DIR=$BUILD/cache/mypy
    PYTHON=$BUILD/venv/bin/python
    cd "$TOP"
}

run_tests() {
    alone build
    enter_venv
    if [[ ${1:-} == --long ]]; then export TT_TEST_LONG=1; shift; fi
    exec "$PYTHON" -m pytest -o cache_dir="$BUILD/cache/pytest" \
        -o tmp_path_retention_policy=failed test_plugin.py "$@"
}

bench() {
    alone build >&2
    enter_venv
    GRPC_VERBOSITY=NONE PYTHONPATH=$TOP exec "$PYTHON" "$TOOLS/bench.py" "$@"
}

# Types as if on the oldest Python that we support, so that nothing newer slips in.
check() {
    enter_venv
    local status=0 files=(tt_device_plugin.py test_plugin.py tools/*.py)
    local style=(--isolated --target-version py310 --line-length 100) rules=E,F,W,I,B,UP,SIM,RUF,PLE
    "$PYTHON" -m ruff format --check "${style[@]}" "${files[@]}" || status=1
    "$PYTHON" -m ruff check "${style[@]}" --select "$rules" "${files[@]}" || status=1
    mkdir -p "$BUILD/typing"
    PYTHONPATH=$TOP "$PYTHON" "$TOOLS/describe_types.py" "$BUILD/typing"
    MYPYPATH=$BUILD/typing:$TOP \
        "$PYTHON" -m mypy --config-file= --strict --python-version 3.10 "${files[@]}" || status=1
    "$PYTHON" "$TOOLS/sizes.py" || status=1
    alone stubs "$BUILD/generated" && cmp <(cat "$BUILD"/generated/*.py) <(cat api_pb2*.py) ||
        [[ $? == 3 ]] || status=1
    return $status
}


# ---- Files that are generated and kept in git ----

stubs() { # [DIR]
    local dir=${1:-$TOP} generator=$BUILD/stubs/$TAG
    "$PYTHON" -c 'import sys; sys.exit(sys.version_info >= (3, 13))' ||
        die -3 "$(asked_for stubs) is for CPython 3.10 to 3.12: set PYTHON to one of these"
    install "$generator" stubs with_pip
    mkdir -p "$dir"
    PYTHONPATH=$generator "$PYTHON" -m grpc_tools.protoc \
        --proto_path="$TOP" --python_out="$dir" --grpc_python_out="$dir" api.proto
}

lock() { # [UV ARGS]: for every Python from 3.10 on and every platform; versions stay as they are
    local work=$BUILD/lock name more
    get_uv
    unset UV_INDEX UV_FIND_LINKS # they may lack some files of a version, and so their hashes
    rm -rf "$work"
    mkdir -p "$work"
    exec 3>"$work/requirements.txt"
    echo "# Every package with its version and the hashes of all its files, for all platforms." >&3
    echo "# Made by './build.sh lock', and taken apart at its headings." >&3
    for name in "${PARTS[@]}"; do
        asked_for "$name" | tr ' ' '\n' >"$work/$name.in"
        part "$name" >"$work/$name.txt"
        more=()
        case $name in
            test) # in one environment with the runtime's
                mapfile -t more < <(sed -n 's/^\([^ =]*\)==.*/\1/p' "$work/runtime.txt")
                more=(--constraints "$work/runtime.txt" "${more[@]/#/--no-emit-package=}")
                ;;
            stubs) more=(--no-deps) ;;
        esac
        uv pip compile --quiet --universal --python-version 3.10 --generate-hashes \
            --python "$PYTHON" --no-header --no-annotate "${more[@]}" "$@" \
            --output-file "$work/$name.txt" "$work/$name.in" >/dev/null
        printf '\n# ---- %s ----\n# asked for: %s\n' "$name" "$(asked_for "$name")" >&3
        cat "$work/$name.txt" >&3
    done
    mv "$work/requirements.txt" "$TOP/requirements.txt"
}


# ---- What to do ----

command=${1:-build}
if [[ $command == --universal ]]; then command=build; elif [[ $# -gt 0 ]]; then shift; fi
case $command in
    help | -h | --help) usage; exit ;;
    unit) cat "$TOOLS/tt-device-plugin.service"; exit ;;
    build | image | run | test | bench | check | stubs) check_lock; find_python ;;
    lock) find_python ;;
    *) usage >&2; die -2 "there is no command '$command'" ;;
esac
case $command in
    test) run_tests "$@" ;;
    run | bench | check) "$command" "$@" ;;
    *) alone "$command" "$@" ;;
esac
