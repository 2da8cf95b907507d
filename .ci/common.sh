# Sourced by every gate: where things are, what is installed, and what a tree to test in is.
# shellcheck shell=bash
set -euo pipefail
shopt -s inherit_errexit

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cache=${QUANTIZATION_CI_CACHE:-$HOME/.cache/quantization-ci}
mkdir -p "$cache"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

export DEBIAN_FRONTEND=noninteractive PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
unset CC CFLAGS LDFLAGS PYTHONPATH OMP_NUM_THREADS
unset QUANTIZATION_ISA QUANTIZATION_NUM_THREADS QUANTIZATION_DEVICE QUANTIZATION_TEST_SMALL

say() { printf '\n-- %s\n' "$*"; }

fail() {
    printf '\nFAILED: %s\n' "$*" >&2
    exit 1
}

# exclusively NAME COMMAND...: gates run side by side, and share apt and the cache.
exclusively() {
    local name=$1
    shift
    (
        flock 9
        "$@"
    ) 9>"$cache/$name.lock"
}

install_missing() {
    local package missing=()
    for package in "$@"; do
        dpkg-query -W -f='${Status}\n' "$package" 2>/dev/null | grep -q '^install ok installed' || missing+=("$package")
    done
    ((${#missing[@]})) || return 0
    say "apt: ${missing[*]}"
    apt-get -qq -o DPkg::Lock::Timeout=300 update
    apt-get -qq -y -o DPkg::Lock::Timeout=300 --no-install-recommends install "${missing[@]}" >/dev/null
}

# need_packages NAME...: Debian packages; those that are there stay as they are.
need_packages() { exclusively apt install_missing "$@"; }

# Gates compile the same sources with the same flags, each in a tree of its own: whoever comes second takes the first
# one's objects. A file is known by its preprocessed text and flags, and not by the folder it lies in.
need_packages ccache
export PATH=/usr/lib/ccache:$PATH CCACHE_DIR=$cache/ccache CCACHE_NOHASHDIR=1 CCACHE_MAXSIZE=1G

# Debian's Python comes without the means to make environments; others have them.
python3 -c 'import ensurepip' 2>/dev/null || need_packages python3-venv

make_environment() {
    [[ -e $1/complete ]] && return 0
    rm -rf "$1"
    python3 -m venv "$1"
    "$1/bin/python" -m pip install -qq -r "$2"
    touch "$1/complete"
}

# environment NAME FILE: prints the Python of a virtual environment with FILE's requirements, made once.
environment() {
    local key
    key=$({ python3 -VV && cat "$2"; } | sha256sum | cut -c1-16)
    exclusively "environment-$1" make_environment "$cache/$1-$key" "$2" >&2
    printf '%s' "$cache/$1-$key/bin/python"
}

# The package's own dependencies and those of its [test] extra, and the tools.
full_environment() {
    python3 "$root/.ci/requirements.py" "$root/pyproject.toml" test >"$work/full.txt"
    cat "$root/.ci/requirements.txt" >>"$work/full.txt"
    environment full "$work/full.txt"
}

# What runs anywhere, emulated machines included, at the versions of the full environment.
write_small_requirements() {
    local python
    python=$(full_environment)
    "$python" -m pip freeze | grep -iE '^(numpy|pytest|hypothesis|ml[-_]dtypes)==' >"$1"
    [[ $(wc -l <"$1") == 4 ]] || fail "expected numpy, pytest, hypothesis and ml_dtypes in the [test] extra"
}

small_environment() {
    write_small_requirements "$work/small.txt"
    environment small "$work/small.txt"
}

# copy_tree DIRECTORY: what git knows or would add, so that builds never touch the tree under test.
copy_tree() {
    mkdir -p "$1"
    (
        cd "$root"
        git ls-files -z --cached --others --exclude-standard --deduplicate |
            while IFS= read -r -d '' file; do [[ ! -e $file ]] || printf '%s\0' "$file"; done |
            tar --create --null --files-from=- --file=-
    ) | tar --extract --directory="$1"
}

# What reaches every kernel and the binding, for machines that are emulated: the rest of the suite is Python above them.
# shellcheck disable=SC2034 # for the gates
kernel_tests=(tests/test_quantize.py tests/test_quantize_fp.py tests/test_matmul.py tests/test_matmul_fp.py
    tests/test_matmul_float.py tests/test_matmul_float_fp.py tests/test_gather.py tests/test_gather_fp.py
    tests/test_fake_quantize.py tests/test_convert.py tests/test_boundary.py tests/test_kv_codec.py
    tests/test_kv_attention.py)

# build PYTHON [setup.py arguments]: the extension, in place, in the current directory, whose package then is used.
# Where a gate names no flags of its own they are the same for all, so that objects are.
build() {
    CC=${CC-gcc} CFLAGS=${CFLAGS--Wall -Wextra -Werror} "$1" setup.py -q build_ext --inplace --force "${@:2}" \
        >build.log 2>&1 || { cat build.log && fail "build"; }
    export PYTHONPATH=$PWD/src
}

# emulated_python FILE PYTHON EMULATOR...: makes FILE an emulated PYTHON. Python takes FILE for its own executable, so that
# the processes that tests start are emulated too; FILE has to lie beside PYTHON, from where Python finds its library.
emulated_python() {
    # shellcheck disable=SC2016 # $0 and $@ are the made script's
    printf '#!/bin/sh\nexec %s -0 "$0" %s "$@"\n' "${*:3}" "$2" >"$work/emulated"
    chmod +x "$work/emulated"
    mv "$work/emulated" "$1"
}

# expect_isa NAME COMMAND...: COMMAND, a Python, must choose this instruction set; the suite then asserts it per kernel.
expect_isa() {
    local plan
    plan=$("${@:2}" -c 'import quantization as q; print(q.AffineQmmT().compile())')
    printf '%s\n' "$plan"
    grep -qw "$1" <<<"$plan" || fail "expected instruction set $1"
}

# isas yes|no COMMAND...: the names of the instruction sets that are (not) available here, best first.
isas() {
    "${@:2}" -c 'import sys
from quantization import _C
print(*(isa["name"] for isa in _C.isas() if isa["available"] == (sys.argv[1] == "yes")), sep="\n")' "$1"
}
