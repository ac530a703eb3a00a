#!/usr/bin/env bash
# Make the Python environment of this repository; what is already installed is not installed again.
#
#   bash setup.sh             .venv with requirements.txt: training and inference
#   bash setup.sh --dev       requirements/dev.txt too: the tests
#   bash setup.sh --gpu       requirements/gpu.txt too: DeepSpeed (flash-attn: see that file)
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

mkdir -p logs # where the launchers' `nohup ... > logs/...` writes
active=${USE_ACTIVE_ENV:-0}
files=(requirements.txt)
for flag in "$@"; do
    case $flag in
        --dev) files+=(requirements/dev.txt) ;;
        --gpu) files+=(requirements/gpu.txt) ;;
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

# The stamp holds the sha256sum line of each requirements file that is installed completely.
stamp=$environment/requirements.sha256
missing=()
for file in "${files[@]}"; do
    grep -qxsF "$(sha256sum "$file")" "$stamp" || missing+=("$file")
done
if [ -x "$environment/bin/python" ] && [ ${#missing[@]} = 0 ]; then
    echo "setup: $environment already has ${files[*]}: nothing to do"
    exit 0
fi

command -v "$interpreter" > /dev/null || fail "$interpreter was not found: set PYTHON to a Python 3.11 or newer"
# transformers 5.24 and trl 1.16 need 3.11; pip would only say that no version matches.
"$interpreter" -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
    || fail "$interpreter is $("$interpreter" --version 2>&1): Python 3.11 or newer is needed, set PYTHON to one"

# Whatever stops the script from here on, the environment counts as not installed.
still_true=$([ ! -f "$stamp" ] || sha256sum requirements.txt requirements/*.txt | grep -xFf "$stamp" || true)
rm -f "$stamp"
if [ "$active" != 1 ]; then
    [ -x .venv/bin/python ] || "$interpreter" -m venv --clear .venv
    interpreter=.venv/bin/python
fi
"$interpreter" -m pip --version > /dev/null 2>&1 || "$interpreter" -m ensurepip

echo "setup: installing ${missing[*]} into $environment"
# torch first and alone: next to the others a dependency could pull in another build of it.
"$interpreter" -m pip install --no-input "$(grep '^torch==' requirements.txt)"
"$interpreter" -m pip install --no-input "${missing[@]/#/--requirement=}"

{
    [ -z "$still_true" ] || echo "$still_true"
    sha256sum "${missing[@]}"
} > "$stamp"
echo "setup: done; the interpreter is $interpreter"
