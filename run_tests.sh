#!/usr/bin/env bash
# Everything a change must pass: ruff, shellcheck and the tests. CI runs this same command.
#
#   bash run_tests.sh                       without the tests marked slow
#   bash run_tests.sh --all                 with them, as CI does
#   bash run_tests.sh tests/test_house.py   further arguments go to pytest
set -euo pipefail
cd "$(dirname "$0")"

bash setup.sh --dev
[ "${USE_ACTIVE_ENV:-0}" = 1 ] || PATH="$PWD/.venv/bin:$PATH"
export PATH HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

selection=(-m "not slow")
[ -z "${CI:-}" ] || selection=()
pytest_args=()
for argument in "$@"; do
    if [ "$argument" = --all ]; then selection=(); else pytest_args+=("$argument"); fi
done

shopt -s nullglob
shell_scripts=(*.sh scripts/*.sh .ci/run)

ruff check .
ruff format --check .
shellcheck "${shell_scripts[@]}"
for script in "${shell_scripts[@]}"; do bash -n "$script"; done
python -m pytest -n auto --maxprocesses 8 --dist loadfile --durations 20 "${selection[@]}" "${pytest_args[@]}"
