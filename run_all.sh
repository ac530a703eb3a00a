#!/usr/bin/env bash
# Everything in one go: PT if wanted, SFT, then DPO or RM and PPO, merging, evaluation and a report.
#
# Needs: what the stages need, see run_pt.sh to run_ppo.sh. No GPU: a small model on the CPU.
#
#   mkdir -p logs && DO_PT=0 ALIGN=dpo nohup bash run_all.sh > logs/all.log 2>&1 &
#   tail -f logs/all.log logs/sft.log
#
# Started on a terminal without DO_PT or ALIGN it asks for them. Each stage is its own launcher and logs to
# logs/STAGE.log; what else is set in the environment (BATCH, CUDA_VISIBLE_DEVICES, TEMPLATE) and flags after the
# script's name go to all training stages, flags in PT_FLAGS, SFT_FLAGS, RM_FLAGS, DPO_FLAGS and PPO_FLAGS to one.
# The same command after an interruption skips finished stages and goes on within the interrupted one.
set -euo pipefail
cd "$(dirname "$0")"
{ # Bash reads a script while it runs; in braces it has read all of it, and editing it during the hours does no harm.

# ---------------------------------------------------------------- edit block
DO_PT=${DO_PT:-}                           # 1: continued pretraining first
ALIGN=${ALIGN:-}                           # dpo, ppo (RM and PPO), both, or none
PT_DATA=${PT_DATA:-./data/pretrain}
SFT_DATA=${SFT_DATA:-./data/finetune}
PAIR_DATA=${PAIR_DATA:-./data/reward}
PPO_DATA=${PPO_DATA:-$SFT_DATA}             # the prompts of PPO
TEST_FILES=${TEST_FILES:-data/eval/questions.jsonl data/eval/exam.jsonl data/eval/safety.jsonl}
EVAL_FLAGS=${EVAL_FLAGS:---num_samples 200 --max_new_tokens 256}
FOLLOW=${FOLLOW:-}                         # 1: show the stages' logs here too, as on a terminal; 0: do not

# ---------------------------------------------------------------- the guide's questions
if [ -t 0 ] && [ -z "$DO_PT" ]; then
    read -r -p "先做增量预训练吗？ Continued pretraining first? [y/N] " reply
    case $reply in [yY]*) DO_PT=1 ;; *) DO_PT=0 ;; esac
fi
if [ -t 0 ] && [ -z "$ALIGN" ]; then
    read -r -p "偏好对齐 Alignment: 1) DPO  2) RM + PPO  3) both  4) none [1] " reply
    case $reply in 2) ALIGN=ppo ;; 3) ALIGN=both ;; 4) ALIGN=none ;; *) ALIGN=dpo ;; esac
fi
DO_PT=${DO_PT:-0}
ALIGN=${ALIGN:-dpo}
if [ -t 1 ]; then FOLLOW=${FOLLOW:-1}; else FOLLOW=${FOLLOW:-0}; fi
case $DO_PT in 0 | 1) ;; *) echo "error: DO_PT=$DO_PT: give 0 or 1" >&2 && exit 2 ;; esac
case $ALIGN in dpo | ppo | both | none) ;; *) echo "error: ALIGN=$ALIGN: give dpo, ppo, both or none" >&2 && exit 2 ;; esac
if [ -n "${TRAIN_DATA:-}${EVAL_DATA:-}" ]; then
    echo "error: TRAIN_DATA and EVAL_DATA are of one stage: set PT_DATA, SFT_DATA, PAIR_DATA or PPO_DATA, and" \
        "for held-out records flags such as SFT_FLAGS='--validation_file_dir FOLDER'" >&2
    exit 2
fi

# Pretraining starts from the model that was not yet taught to chat, as in the guide.
MODEL=${MODEL:-$([ "$DO_PT" = 1 ] && echo Qwen/Qwen2.5-3B || echo Qwen/Qwen2.5-3B-Instruct)}
lower_name=$(basename "${MODEL%/checkpoint-*}" | tr '[:upper:]' '[:lower:]')
NAME=${NAME:-$(sed 's/^outputs-[a-z]*-//; s/-instruct$//' <<< "$lower_name")}
PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python)}
export PYTHON
gpus=$("$PYTHON" -m medtune.devices "$@") # it ends here, with a line, where torch cannot use the GPUs
[ "$gpus" != cpu ] || export CUDA_VISIBLE_DEVICES= # --use_cpu for what follows the training stages too
mkdir -p logs
# The stages inherit the lock, so one that outlived this script is not joined by a second one. It is the folder's,
# because runs of two names would mix their logs.
exec 9> logs/.run_all.lock
flock -n 9 || {
    echo "error: run_all.sh or a stage of it is still at work in this folder; wait for it, or stop it (ps -ef)" >&2
    exit 2
}

# ---------------------------------------------------------------- one stage
child=
follower=
# shellcheck disable=SC2329  # the trap calls it
interrupted() {
    echo "$(date '+%F %T') interrupted: the stage saves a checkpoint; the same command goes on with it" >&2
    [ -z "$child" ] || kill -TERM "$child" 2> /dev/null || true
    [ -z "$child" ] || wait "$child" || true
    [ -z "$follower" ] || wait "$follower" || true
    exit 130
}
trap interrupted INT TERM HUP

# follow NAME START: the lines that come in, and one of its own where none came for eight seconds.
follow() {
    local line code
    while true; do
        code=0
        IFS= read -r -t 8 line || code=$?
        if [ "$code" -eq 0 ]; then
            printf '%s\n' "$line"
        elif [ "$code" -gt 128 ]; then
            echo "$(date '+%F %T') $1: at work, $((SECONDS - $2)) s"
        else
            return 0
        fi
    done
}

# stage NAME OUTPUT "MODELS IT STARTS FROM" COMMAND...: skip it if this command has ended well, otherwise run it.
stage() {
    local name=$1 output=$2 parents=$3 log=logs/$1.log parent newer='' done_file=$2/.done_by_run_all
    shift 3
    local start=$SECONDS code=0 n_before command="${*#"$PYTHON" }"
    # A merged model is there whole or not at all; the merge outlives this script where only this was killed.
    if [ "$name" = merge ] && [ -f "$output/config.json" ] && [ ! -e "$done_file" ]; then
        echo "$command" > "$done_file"
        touch -r "$output/config.json" "$done_file"
    fi
    for parent in $parents; do
        [ ! "$parent" -nt "$done_file" ] || newer=$parent
    done
    if [ -n "$newer" ] && [ -e "$done_file" ] && [[ $name != evaluation && $name != report ]]; then
        echo "error: $output was made from an earlier $newer: move $output away, or set NAME" >&2
        exit 2
    fi
    if [ -z "$newer" ] && [ "$(cat "$done_file" 2> /dev/null)" = "$command" ]; then
        echo "$(date '+%F %T') $name: done already, in $output"
        return
    fi
    echo "$(date '+%F %T') $name: started; tail -f $log"
    touch "$log"
    n_before=$(wc -l < "$log")
    # Job control gives the stage a process group of its own: Ctrl-C reaches it once, through the trap.
    set -m
    env "$@" >> "$log" 2>&1 < /dev/null &
    child=$!
    if [ "$FOLLOW" = 1 ]; then
        { tail -n "+$((n_before + 1))" -f --pid="$child" "$log" | follow "$name" "$start"; } 9>&- &
        follower=$!
    fi
    set +m
    wait "$child" || code=$?
    child=
    [ -z "$follower" ] || wait "$follower" || true
    follower=
    if [ "$code" -ne 0 ]; then
        echo "$(date '+%F %T') error: $name ended with exit code $code; the end of $log:" >&2
        tail -n "+$((n_before + 1))" "$log" | tail -n 15 | sed 's/^/    /' >&2
        echo "When it is mended, the same command goes on here." >&2
        exit "$code"
    fi
    echo "$command" > "$done_file"
    echo "$(date '+%F %T') $name: done in $((SECONDS - start)) s, in $output"
    [ "$FOLLOW" = 0 ] || return 0
    # The tables of an evaluation, of another stage its last lines.
    local shown=(tail -n 6)
    [ "$name" != evaluation ] || shown=(sed -n "/ records)$/,\$p")
    tail -n "+$((n_before + 1))" "$log" | "${shown[@]}" | sed 's/^/    /'
}

# train NAME DATA MODEL FLAGS...: a training stage; its model is `best` afterwards.
train() {
    local name=$1 data=$2 model=$3 output=outputs-$1-$NAME flags_name=${1^^}_FLAGS
    shift 3
    local parents='' parent
    for parent in "$model" "$REWARD_MODEL"; do
        [[ $parent != outputs-* ]] || parents+=" $parent"
    done
    # Words of a variable: flags without blanks in their values.
    # shellcheck disable=SC2086
    stage "$name" "$output" "$parents" MODEL="$model" TRAIN_DATA="$data" EVAL_DATA="$data" OUTPUT="$output" \
        bash "run_$name.sh" "$@" ${!flags_name:-}
    runs+=("$output")
    best=$output/checkpoint-best
    # A model of which all weights were trained is the base of the adapters after it.
    [[ $name != pt && $name != sft || -f $best/adapter_config.json ]] || base=$best
}

# ---------------------------------------------------------------- all stages
echo "$(date '+%F %T') MODEL=$MODEL NAME=$NAME DO_PT=$DO_PT ALIGN=$ALIGN"
runs=()
best=$MODEL
base=$MODEL # of the adapters that the stages write
if [ -f "$MODEL/adapter_config.json" ]; then
    base=$("$PYTHON" -c 'if True:
        import json, sys
        try:
            print(json.load(sys.stdin)["base_model_name_or_path"])
        except (ValueError, LookupError, TypeError):
            sys.exit(2)' < "$MODEL/adapter_config.json") || {
        echo "error: $MODEL/adapter_config.json: it names no base model; copy or download it again" >&2
        exit 2
    }
fi
REWARD_MODEL=
[ "$DO_PT" = 0 ] || train pt "$PT_DATA" "$MODEL" "$@"
train sft "$SFT_DATA" "$best" "$@"
sft=$best
compared=("$MODEL" "$sft")
if [[ $ALIGN = dpo || $ALIGN = both ]]; then
    train dpo "$PAIR_DATA" "$sft" "$@"
    compared+=("$best")
fi
if [[ $ALIGN = ppo || $ALIGN = both ]]; then
    train rm "$PAIR_DATA" "$sft" "$@"
    export REWARD_MODEL=$best
    train ppo "$PPO_DATA" "$sft" "$@"
    compared+=("$best")
fi

if [ -f "$best/adapter_config.json" ]; then
    merged=${best%/checkpoint-best}-merged
    stage merge "$merged" "$best" "$PYTHON" merge_peft_adapter.py --base_model "$base" --lora_model "$best" \
        --output_dir "$merged"
else
    merged=$best # all weights were trained
fi

[ "$base" != "$MODEL" ] || compared[0]=base
# shellcheck disable=SC2086
stage evaluation "outputs-eval-$NAME" "${runs[*]/%//checkpoint-best}" "$PYTHON" scripts/evaluate_model.py \
    --base_model "$base" --compare "${compared[@]}" ${REWARD_MODEL:+--reward_model "$REWARD_MODEL"} \
    --test_file $TEST_FILES $EVAL_FLAGS --output_dir "outputs-eval-$NAME" --overwrite

stage report "outputs-report-$NAME" "outputs-eval-$NAME/metrics.json" "$PYTHON" scripts/write_report.py \
    --runs "${runs[@]}" --evaluation "outputs-eval-$NAME" --output_dir "outputs-report-$NAME" --overwrite

echo "$(date '+%F %T') all done. The report: outputs-report-$NAME/report.html and report.md"
echo "next: $(basename "$PYTHON") inference.py --base_model $merged --interactive"
exit
}
