#!/usr/bin/env bash
# Everything a change must pass: ruff, shellcheck and the tests. CI runs this same command.
#
#   bash run_tests.sh                       without the tests marked slow
#   bash run_tests.sh --all                 with them, as CI does
#   bash run_tests.sh --gpu                 those that need a GPU, and no others; what they say is in logs/gpu_report.txt
#   bash run_tests.sh tests/test_house.py   further arguments go to pytest
set -euo pipefail
cd "$(dirname "$0")"

selection=(-m "not slow and not gpu")
[ -z "${CI:-}" ] || selection=(-m "not gpu")
gpu=0 pytest_args=()
for argument in "$@"; do
    case $argument in
        --all) selection=(-m "not gpu") ;;
        --gpu) gpu=1 ;;
        *) pytest_args+=("$argument") ;;
    esac
done

if [ "$gpu" = 1 ] && ! command -v nvidia-smi > /dev/null; then
    echo "error: --gpu: there is no nvidia-smi, so no GPU; leave the flag out" >&2
    exit 2
fi
if [ "$gpu" = 1 ] && ! listed=$(nvidia-smi --query-gpu=index --format=csv,noheader 2>&1); then
    echo "error: --gpu: nvidia-smi lists no GPU (${listed//$'\n'/ }); bash check_machine.sh says more" >&2
    exit 2
fi

setup_flags=(--dev)
[ "$gpu" = 0 ] || setup_flags+=(--gpu)
bash setup.sh "${setup_flags[@]}"
[ "${USE_ACTIVE_ENV:-0}" = 1 ] || PATH="$PWD/.venv/bin:$PATH"
export PATH TOKENIZERS_PARALLELISM=false

if [ "$gpu" = 1 ]; then
    GPU_TESTS=${CUDA_VISIBLE_DEVICES-$(paste -sd , <<< "$listed")}
    export GPU_TESTS
    code=0
    { # One test after the other, since they share the GPUs; what is wrong with the machine stands in the report too.
        bash check_machine.sh || true
        python -m pip list --format freeze | grep -iE '^(torch|transformers|trl|peft|accelerate|bitsandbytes|deepspeed|flash)'
        python -m pytest -m gpu -n 0 --durations 0 -rA "${pytest_args[@]:-tests/gpu}"
    } 2>&1 | tee logs/gpu_report.txt || code=$?
    echo "the report to send: logs/gpu_report.txt"
    exit "$code"
fi

export HF_HUB_OFFLINE=1
shopt -s nullglob
shell_scripts=(*.sh scripts/*.sh .ci/run)

ruff check .
ruff format --check .
shellcheck "${shell_scripts[@]}"
for script in "${shell_scripts[@]}"; do bash -n "$script"; done
python -m pytest -n auto --maxprocesses 8 --dist loadfile --durations 20 "${selection[@]}" "${pytest_args[@]}"
