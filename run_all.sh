#!/usr/bin/env bash
# Everything in one go: PT if wanted, SFT, then DPO, RM and PPO, or GRPO, merging, evaluation, a report, and some answers
# before training and after each stage.
#
# Needs: what the stages need, see run_pt.sh to run_grpo.sh. No GPU: a small model on the CPU.
#
#   mkdir -p logs && DO_PT=0 ALIGN=dpo nohup bash run_all.sh > logs/all.log 2>&1 &
#   tail -f logs/all.log
#
# Started on a terminal without DO_PT or ALIGN it asks for them. What else is set in the environment (BATCH, TEMPLATE,
# CUDA_VISIBLE_DEVICES) and flags after the script's name go to all training stages, those in PT_FLAGS, SFT_FLAGS,
# RM_FLAGS, DPO_FLAGS, PPO_FLAGS and GRPO_FLAGS to one. What a stage says is in logs/STAGE.log too.
# The same command after an interruption goes on where it stopped: each stage finds its newest checkpoint, or that it is
# finished, and refuses what is not the run that it began.
set -euo pipefail
cd "$(dirname "$0")"
{ # Bash reads a script while it runs; in braces it has read all of it, and editing it during the hours does no harm.

# ---------------------------------------------------------------- edit block
DO_PT=${DO_PT:-}                           # 1: continued pretraining first
ALIGN=${ALIGN:-}                           # dpo, ppo (RM and PPO), both, grpo, all, or none
PT_DATA=${PT_DATA:-./data/pretrain}
SFT_DATA=${SFT_DATA:-./data/finetune}
PAIR_DATA=${PAIR_DATA:-./data/reward}
PPO_DATA=${PPO_DATA:-$SFT_DATA}             # the prompts of PPO
GRPO_DATA=${GRPO_DATA:-./data/exam}         # exam questions
safety="data/eval/safety.jsonl data/eval/emergency_twins.jsonl data/eval/unsafe_requests.jsonl"
asked="data/eval/guide_questions.jsonl data/eval/everyday_questions.jsonl data/eval/questions.jsonl"
TEST_FILES=${TEST_FILES:-$asked data/eval/exam.jsonl $safety}
EVAL_FLAGS=${EVAL_FLAGS:---num_samples 200 --max_new_tokens 256}
ESTIMATE=${ESTIMATE:-}                      # 1: print what the training stages will take, and train nothing

# ---------------------------------------------------------------- the guide's questions
fail() { echo "error: $*" >&2; exit "${code:-2}"; }
if [ -t 0 ]; then
    [ -n "$DO_PT" ] || read -r -p "先做增量预训练吗？ Continued pretraining first? [y/N] " DO_PT
    [ -n "$ALIGN" ] || read -r -p "偏好对齐 Alignment: 1) DPO  2) RM + PPO  3) both  4) none  5) GRPO  6) all [1] " ALIGN
fi
case ${DO_PT,,} in 1 | y | yes) DO_PT=1 ;; 0 | n | no | '') DO_PT=0 ;; *) fail "DO_PT=$DO_PT: give 0 or 1" ;; esac
case $ALIGN in 1 | '') ALIGN=dpo ;; 2) ALIGN=ppo ;; 3) ALIGN=both ;; 4) ALIGN=none ;; 5) ALIGN=grpo ;; 6) ALIGN=all ;; esac
[[ $ALIGN =~ ^(dpo|ppo|both|grpo|all|none)$ ]] || fail "ALIGN=$ALIGN: give dpo, ppo, both, grpo, all or none"
[[ ! $ALIGN =~ ^(grpo|all)$ ]] || [ -e "$GRPO_DATA" ] || fail "GRPO_DATA=$GRPO_DATA: no such folder; name one of exam questions"
[ -z "${TRAIN_DATA:-}${EVAL_DATA:-}" ] || fail "TRAIN_DATA and EVAL_DATA are of one stage: set PT_DATA, SFT_DATA," \
    "PAIR_DATA, PPO_DATA or GRPO_DATA, and for held-out records flags such as SFT_FLAGS='--validation_file_dir FOLDER'"
# Pretraining starts from the model that was not yet taught to chat, as in the guide.
MODEL=${MODEL:-Qwen/Qwen2.5-3B$([ "$DO_PT" = 1 ] || echo -Instruct)}
NAME=${NAME:-$(basename "${MODEL%/checkpoint-*}" | sed 's/.*/\L&/; s/^outputs-[a-z]*-//; s/-instruct$//')}
export PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python)}
[ "$ESTIMATE" != 0 ] || ESTIMATE=
# Which starts this script again, for the stages' commands.
[ -z "$ESTIMATE" ] || [ -n "${ESTIMATE_COMMANDS:-}" ] ||
    DO_PT=$DO_PT ALIGN=$ALIGN exec "$PYTHON" scripts/estimate_run.py run_all.sh "$@"
gpus=$("$PYTHON" -m medtune.devices "$@") || exit # where torch cannot use the GPUs, which it has said
[ "$gpus" != cpu ] || export CUDA_VISIBLE_DEVICES= # --use_cpu for what follows the training stages too
export ESTIMATE ESTIMATE_BASE=$MODEL
mkdir -p logs
exec 9> logs/.run_all.lock # the stages inherit it: one that outlived this script holds it
[ -n "$ESTIMATE" ] || flock -n 9 ||
    fail "run_all.sh or a stage of it is still at work in this folder; wait for it, or stop it (ps -ef)"

# ---------------------------------------------------------------- one stage
# `|| true`: there may be no stage, and a terminal that is lost takes no line.
trap 'kill -TERM $(jobs -p) 2> /dev/null || true; wait
    echo "interrupted: the same command goes on from the last checkpoint" >&2 || true; exit 130' INT TERM HUP
stage() { # NAME COMMAND...
    [ -z "$ESTIMATE" ] || { "${@:2}"; return; }
    local name=$1 code=0
    echo "$(date '+%F %T') $name: started; tail -f logs/$name.log"
    set -m # in a process group of its own, so that Ctrl-C reaches the stage once, through the trap
    "${@:2}" < /dev/null 2>&1 | tee -ap "logs/$name.log" &
    set +m
    wait $! || code=$?
    [ "$code" = 0 ] || fail "$name ended with exit code $code: see logs/$name.log; then the same command goes on here"
}

train() { # NAME DATA MODEL FLAGS...: its model is `best` afterwards
    local output=outputs-$1-$NAME own=${1^^}_FLAGS
    # shellcheck disable=SC2086  # words: flags without blanks in their values
    stage "$1" env TRAIN_DATA="$2" EVAL_DATA="$2" MODEL="$3" OUTPUT="$output" bash "run_$1.sh" "${@:4}" ${!own:-}
    runs+=("$output") best=$output/checkpoint-best
}

# ---------------------------------------------------------------- all stages
echo "$(date '+%F %T') MODEL=$MODEL NAME=$NAME DO_PT=$DO_PT ALIGN=$ALIGN"
runs=() best=$MODEL REWARD_MODEL=
[ "$DO_PT" = 0 ] || train pt "$PT_DATA" "$MODEL" "$@"
train sft "$SFT_DATA" "$best" "$@"
sft=$best compared=("$MODEL" "$best")
if [[ $ALIGN =~ ^(dpo|both|all)$ ]]; then
    train dpo "$PAIR_DATA" "$sft" "$@"
    compared+=("$best")
fi
if [[ $ALIGN =~ ^(ppo|both|all)$ ]]; then
    train rm "$PAIR_DATA" "$sft" "$@"
    export REWARD_MODEL=$best
    train ppo "$PPO_DATA" "$sft" "$@"
    compared+=("$best")
fi
if [[ $ALIGN =~ ^(grpo|all)$ ]]; then
    train grpo "$GRPO_DATA" "$sft" "$@"
    compared+=("$best")
fi
[ -z "$ESTIMATE" ] || exit 0
merged=$best # where all weights were trained
if [ -f "$best/adapter_config.json" ]; then
    merged=${best%/checkpoint-best}-merged
    stage merge "$PYTHON" merge_peft_adapter.py --lora_model "$best" --output_dir "$merged"
fi
# shellcheck disable=SC2086
stage evaluation "$PYTHON" scripts/evaluate_model.py --base_model "$best" --compare "${compared[@]}" \
    ${REWARD_MODEL:+--reward_model "$REWARD_MODEL"} --test_file $TEST_FILES $EVAL_FLAGS \
    --output_dir "outputs-eval-$NAME" --reuse --overwrite
stage report "$PYTHON" scripts/write_report.py --runs "${runs[@]}" --evaluation "outputs-eval-$NAME" \
    --output_dir "outputs-report-$NAME" --overwrite
stage answers "$PYTHON" scripts/show_answers.py "outputs-eval-$NAME"
echo "$(date '+%F %T') all done. The report: outputs-report-$NAME/report.html and report.md"
echo "next: $(basename "$PYTHON") inference.py --base_model $merged --interactive"
exit; }
