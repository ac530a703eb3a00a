#!/usr/bin/env bash
# Standard benchmarks with lm-evaluation-harness: the exam of the sample data offline, and others by name.
#
# Needs: pip install -r requirements/eval.txt, 1 GPU of 16 GB or more for Qwen2.5-3B. No GPU: a small model on the CPU.
#
#   mkdir -p logs && nohup bash run_eval.sh > logs/eval.log 2>&1 &
#   tail -f logs/eval.log
#
#   LORA=outputs-sft-qwen2.5-3b/checkpoint-best TASKS=medical_exam,medical_en bash run_eval.sh
#
# eval_tasks/ holds the tasks of this project; all but medical_exam and medical_en read files that you put into
# data/benchmarks/ (each task file says which). Any name of `lm-eval ls tasks` works where the hub is reachable. Flags
# after the script's name go to lm-eval: --limit 100, --num_fewshot 5.
set -euo pipefail
cd "$(dirname "$0")"

# ---------------------------------------------------------------- edit block
MODEL=${MODEL:-Qwen/Qwen2.5-3B-Instruct}   # hub name or folder of a base, merged or whole model
LORA=${LORA:-}                             # folder of an adapter on it
TASKS=${TASKS:-medical_exam}               # names, separated by commas
DTYPE=${DTYPE:-auto}
BATCH=${BATCH:-8}
OUTPUT=${OUTPUT:-outputs-benchmarks}       # a folder in it for each model, a file for each run

PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python)}
# Where torch cannot use the GPUs lm-eval would take the CPU without a word; its own flag for --use_cpu is --device.
flags=()
previous=
for word in "$@"; do
    [[ $word == --use_cpu* || ($previous == --use_cpu && $word != --*) ]] || flags+=("$word")
    previous=$word
done
if [[ " $* " != *" --device "* ]]; then
    gpus=$("$PYTHON" -m medtune.devices "$@")
    [ "$gpus" != cpu ] || flags+=(--device cpu)
fi
if ! "$PYTHON" -c "import lm_eval" 2> /dev/null; then
    echo "error: lm-evaluation-harness is not installed: $PYTHON -m pip install -r requirements/eval.txt" >&2
    exit 2
fi
for task in ${TASKS//,/ }; do
    mapfile -t files < <(grep -ohE 'data/benchmarks/[a-z0-9_/]+\.(jsonl|csv|parquet)' "eval_tasks/$task.yaml" 2> /dev/null)
    for file in "${files[@]}"; do
        [ -f "$file" ] || {
            echo "error: TASKS=$TASKS: there is no $file; eval_tasks/$task.yaml says what to put there" >&2
            exit 2
        }
    done
done

exec "$PYTHON" -m lm_eval run \
    --model hf \
    --model_args "pretrained=$MODEL,dtype=$DTYPE${LORA:+,peft=$LORA,tokenizer=$LORA}" \
    --tasks "$TASKS" \
    --include_path eval_tasks \
    --apply_chat_template \
    --batch_size "$BATCH" \
    --output_path "$OUTPUT" \
    --log_samples \
    "${flags[@]}"
