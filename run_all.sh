#!/usr/bin/env bash
# The whole pipeline: pretraining if wanted, SFT, then DPO or a reward model and PPO, merging, evaluation.
#
# Needs what its stages need, see run_pt.sh, run_sft.sh, run_dpo.sh, run_rm.sh and run_ppo.sh.
#
#   mkdir -p logs && DO_PT=0 ALIGN=dpo nohup bash run_all.sh > logs/all.log 2>&1 &
#   tail -f logs/all.log
#
# On a terminal it asks for DO_PT and ALIGN where they are not set. Each stage is its own launcher with its own log,
# logs/NAME/STAGE.log; a variable that all launchers read (CUDA_VISIBLE_DEVICES, DEEPSPEED, N_PROCESSES ...) reaches all.
# The same command after an interruption skips what is done and resumes what is not.
set -euo pipefail
cd "$(dirname "$0")"

# ---------------------------------------------------------------- edit block
MODEL=${MODEL:-Qwen/Qwen2.5-3B-Instruct}   # hub name or folder
NAME=${NAME:-qwen2.5-3b}                   # of the run: outputs-STAGE-NAME, logs/NAME
TEMPLATE=${TEMPLATE-qwen}                  # prompt template; "" takes the tokenizer's own
DO_PT=${DO_PT:-}                           # 1: pretrain first; 0: begin with SFT
ALIGN=${ALIGN:-}                           # dpo, ppo (with its reward model), both, none
TEXT_DATA=${TEXT_DATA:-./data/pretrain}
DIALOGUE_DATA=${DIALOGUE_DATA:-./data/finetune}
PAIR_DATA=${PAIR_DATA:-./data/reward}
EVAL_PAIRS=${EVAL_PAIRS:-$PAIR_DATA}       # the training folder again: a part of it is held out
TEST_FILE=${TEST_FILE:-./data/eval/questions.jsonl}
TEST_SAMPLES=${TEST_SAMPLES:-200}          # questions of it that each model answers
# More flags for the stages, as words: SFT_FLAGS="--num_train_epochs 2 --learning_rate 1e-5"
PT_FLAGS=${PT_FLAGS:-} SFT_FLAGS=${SFT_FLAGS:-} RM_FLAGS=${RM_FLAGS:-} DPO_FLAGS=${DPO_FLAGS:-} PPO_FLAGS=${PPO_FLAGS:-}

PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python)}
export PYTHON TEMPLATE
logs=logs/$NAME
out() { echo "outputs-$1-$NAME"; }

# ---------------------------------------------------------------- questions
ask() { # variable, default, question
    [ -n "${!1}" ] && return
    [ ! -t 0 ] || read -rp "$3 [$2] " "${1?}"
    printf -v "$1" '%s' "${!1:-$2}"
}
ask DO_PT 0 "Pretrain first on $TEXT_DATA? 1 or 0"
ask ALIGN dpo "Align by dpo, ppo, both or none?"
case "$DO_PT $ALIGN" in
    [01]\ dpo | [01]\ ppo | [01]\ both | [01]\ none) ;;
    *) echo "error: DO_PT=$DO_PT ALIGN=$ALIGN: DO_PT is 0 or 1, ALIGN is dpo, ppo, both or none" >&2; exit 2 ;;
esac

# ---------------------------------------------------------------- stages
# A signal reaches the stage that runs, which saves a checkpoint and ends; then this script ends with its code.
child=
stop() { stopped=1; [ -z "$child" ] || kill -s "$1" "$child" 2> /dev/null || true; }
stopped=
trap 'stop TERM' TERM
trap 'stop INT' INT

stage() { # name, folder that it leaves, command: skipped where the same command has left the folder before
    local name=$1 left=$2 code=0
    shift 2
    local log=$logs/$name.log done=$logs/$name.done
    if [ -d "$left" ] && [ "$(cat "$done" 2> /dev/null)" = "$*" ]; then
        echo "== $name: done before, in $left"
        return
    fi
    echo "== $name: log in $log"
    rm -f "$done"
    "$@" > >(tee -a "$log") 2>&1 &
    child=$!
    wait "$child" || code=$?
    while kill -0 "$child" 2> /dev/null; do wait "$child" || code=$?; done
    child=
    if [ "$code" -ne 0 ] || [ -n "$stopped" ]; then
        [ -z "$stopped" ] || code=$((code > 128 ? code : 143))
        sleep 1 # tee writes the last lines
        echo "error: $name ended with $code; the end of $log:" >&2
        tail -n 15 "$log" | sed 's/^/    /' >&2
        echo "started again, the same command goes on from here" >&2
        exit "$code"
    fi
    echo "$*" > "$done"
}

adapter_base() { # the base model of an adapter's folder; fails for a whole model
    [ -f "$1/adapter_config.json" ] || return 1
    "$PYTHON" -c 'import json, sys; print(json.load(open(sys.argv[1]))["base_model_name_or_path"])' \
        "$1/adapter_config.json"
}

evaluate() { # name, model or adapter
    local base model=(--base_model "$2")
    if base=$(adapter_base "$2"); then model=(--base_model "$base" --lora_model "$2"); fi
    stage "evaluate-$1" "$(out eval)/$1" "$PYTHON" scripts/evaluate_model.py "${model[@]}" --test_file "$TEST_FILE" \
        --num_samples "$TEST_SAMPLES" --output_dir "$(out eval)/$1" --overwrite
}

mkdir -p "$logs" "$(out eval)"
models=(base)
paths=("$MODEL")
trained() { models+=("$1"); paths+=("$(out "$1")/checkpoint-best"); }

start=$MODEL
if [ "$DO_PT" = 1 ]; then
    # shellcheck disable=SC2086 # the flags are words
    stage pt "$(out pt)/checkpoint-best" env MODEL="$MODEL" TRAIN_DATA="$TEXT_DATA" EVAL_DATA="$TEXT_DATA" \
        OUTPUT="$(out pt)" bash run_pt.sh $PT_FLAGS
    start=$(out pt)/checkpoint-best
fi
# shellcheck disable=SC2086
stage sft "$(out sft)/checkpoint-best" env MODEL="$start" TRAIN_DATA="$DIALOGUE_DATA" EVAL_DATA="$DIALOGUE_DATA" \
    OUTPUT="$(out sft)" bash run_sft.sh $SFT_FLAGS
trained sft
if [ "$ALIGN" = dpo ] || [ "$ALIGN" = both ]; then
    # shellcheck disable=SC2086
    stage dpo "$(out dpo)/checkpoint-best" env MODEL="$(out sft)/checkpoint-best" TRAIN_DATA="$PAIR_DATA" \
        EVAL_DATA="$EVAL_PAIRS" OUTPUT="$(out dpo)" bash run_dpo.sh $DPO_FLAGS
    trained dpo
fi
if [ "$ALIGN" = ppo ] || [ "$ALIGN" = both ]; then
    # shellcheck disable=SC2086
    stage rm "$(out rm)/checkpoint-best" env MODEL="$(out sft)/checkpoint-best" TRAIN_DATA="$PAIR_DATA" \
        EVAL_DATA="$EVAL_PAIRS" OUTPUT="$(out rm)" bash run_rm.sh $RM_FLAGS
    # shellcheck disable=SC2086
    stage ppo "$(out ppo)/checkpoint-best" env MODEL="$(out sft)/checkpoint-best" \
        REWARD_MODEL="$(out rm)/checkpoint-best" TRAIN_DATA="$DIALOGUE_DATA" EVAL_DATA="$DIALOGUE_DATA" \
        OUTPUT="$(out ppo)" bash run_ppo.sh $PPO_FLAGS
    trained ppo
fi

# ---------------------------------------------------------------- merging, evaluation
final=${paths[-1]}
if base=$(adapter_base "$final"); then
    stage merge "$(out "${models[-1]}")-merged" "$PYTHON" merge_peft_adapter.py --base_model "$base" \
        --lora_model "$final" --output_dir "$(out "${models[-1]}")-merged"
    final=$(out "${models[-1]}")-merged
fi
for index in "${!models[@]}"; do
    evaluate "${models[index]}" "${paths[index]}"
done

# ---------------------------------------------------------------- figures
echo "== figures"
for name in pt sft dpo rm ppo; do
    for results in train eval; do
        file=$(out $name)/${results}_results.json
        [ ! -f "$file" ] || echo "$name $results: $(tr -d '{}\n"' < "$file" | tr -s ' ')"
    done
done
for name in "${models[@]}"; do
    echo "$name answers:"
    grep -m 2 -E "rouge_l|^all" "$logs/evaluate-$name.log" | tail -n 2
done
echo "next: $PYTHON inference.py --base_model $final --interactive"
