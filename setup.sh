#!/usr/bin/env bash
# Make the Python environment of this repository; what is already installed is not installed again.
#
#   bash setup.sh             .venv with requirements.txt: training and inference
#   bash setup.sh --dev       requirements/dev.txt too: the tests
#   bash setup.sh --gpu       requirements/gpu.txt too: DeepSpeed (flash-attn: see that file), and the build of torch that
#                             the driver and the GPUs run (medtune/torch_builds.py)
#   bash setup.sh --active    into the active conda or virtual environment of a rented server, not .venv
#                             (USE_ACTIVE_ENV=1 does the same)
#
# PYTHON=python3.12 bash setup.sh makes .venv with that interpreter. pip's own settings hold as they are: a mirror
# by PIP_INDEX_URL, torch for a machine without GPU by PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu.
#
# The launchers find the environment by one line, after which .venv wins over the active environment:
#   PYTHON=${PYTHON:-$( [ -x .venv/bin/python ] && echo .venv/bin/python || echo python )}
set -euo pipefail
cd "$(dirname "$0")"

fail() {
    echo "error: $*" >&2
    exit 2
}

check_interpreter() {
    command -v "$interpreter" > /dev/null || fail "$interpreter was not found: set PYTHON to a Python 3.11 or newer"
    # transformers 5.24 and trl 1.16 need 3.11; pip would only say that no version matches.
    "$interpreter" -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
        || fail "$interpreter is $("$interpreter" --version 2>&1): Python 3.11 or newer is needed, set PYTHON to one"
}

# The CUDA that the installed torch was built with; nothing where there is no torch.
installed_cuda() {
    "$interpreter" -c 'import torch; print(torch.version.cuda)' 2> /dev/null || true
}

mkdir -p logs # where the launchers' `nohup ... > logs/...` writes
active=${USE_ACTIVE_ENV:-0}
files=(requirements.txt)
gpu=0
for flag in "$@"; do
    case $flag in
        --dev) files+=(requirements/dev.txt) ;;
        --gpu) files+=(requirements/gpu.txt) gpu=1 ;;
        --active) active=1 ;;
        *) fail "unknown flag $flag: bash setup.sh [--dev] [--gpu] [--active]" ;;
    esac
done

if [ "$active" = 1 ]; then
    environment=${VIRTUAL_ENV:-${CONDA_PREFIX:-}}
    [ -n "$environment" ] || fail "--active: no conda or virtual environment is active; activate one or leave the flag out"
    interpreter=$environment/bin/python
else
    environment=.venv
    interpreter=${PYTHON:-python3}
fi

# The stamp holds the sha256sum line of each requirements file that is installed completely, and torch's build.
stamp=$environment/requirements.sha256
missing=()
for file in "${files[@]}"; do
    grep -qxsF "$(sha256sum "$file")" "$stamp" || missing+=("$file")
done
torch=$(grep '^torch==' requirements.txt) cuda=
if [ "$gpu" = 1 ]; then
    check_interpreter
    build=$("$interpreter" -m medtune.torch_builds) || exit
    [ -z "$build" ] || { read -r cuda torch && read -r reason; } <<< "$build"
    echo "setup: ${reason:-nvidia-smi lists no GPU here: torch as pip finds it}"
fi
if [ -x "$environment/bin/python" ] && [ ${#missing[@]} = 0 ] && { [ -z "$cuda" ] || grep -qxsF "$torch" "$stamp"; }; then
    echo "setup: $environment already has ${files[*]}: nothing to do"
    exit 0
fi
check_interpreter

# Whatever stops the script from here on, the environment counts as not installed.
still_true=$([ ! -f "$stamp" ] || { sha256sum requirements.txt requirements/*.txt | grep -xFf "$stamp"; grep ^torch "$stamp"; } || true)
rm -f "$stamp"
if [ "$active" != 1 ]; then
    [ -x .venv/bin/python ] || "$interpreter" -m venv --clear .venv
    interpreter=.venv/bin/python
fi
"$interpreter" -m pip --version > /dev/null 2>&1 || "$interpreter" -m ensurepip

echo "setup: installing $torch ${missing[*]} into $environment"
# torch first and alone: next to the others a dependency could pull in another build of it.
# For pip another build of the same version is the same.
if [ -n "$cuda" ]; then
    case $(installed_cuda) in "" | "$cuda") ;; *) "$interpreter" -m pip uninstall --yes torch ;; esac
fi
# shellcheck disable=SC2086  # words
"$interpreter" -m pip install --no-input $torch
[ ${#missing[@]} = 0 ] || "$interpreter" -m pip install --no-input "${missing[@]/#/--requirement=}"
[ -z "$cuda" ] || [ "$(installed_cuda)" = "$cuda" ] \
    || fail "pip installed torch for CUDA $(installed_cuda), not $cuda: PIP_EXTRA_INDEX_URL or PIP_FIND_LINKS leads there"

{
    [ -z "$still_true" ] || echo "$still_true"
    [ ${#missing[@]} = 0 ] || sha256sum "${missing[@]}"
    [ -z "$cuda" ] || echo "$torch"
} > "$stamp"
echo "setup: done; the interpreter is $interpreter"
