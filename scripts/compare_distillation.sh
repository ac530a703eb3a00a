#!/usr/bin/env bash
# On-policy distillation beside more SFT on the teacher's replies, in the same minutes, with the demo's models on a CPU.
# The teacher is the demo's DPO model, the student SFT on half of its dialogues; both ways begin with the student, train
# adapters of the same size and see the same prompts. The minute that the teacher's replies take is SFT's gift.
#
#   mkdir -p logs && nohup bash scripts/compare_distillation.sh > logs/compare_distillation.log 2>&1 &
#
# After run_demo.sh; by the times of its stages a quarter of an hour on two cores. Started again it goes on where it stopped;
# `rm -r outputs-*-half cache/replies-half*` starts anew. Flags behind the script's name are of all three trainings.
set -euo pipefail
cd "$(dirname "$0")/.."

START=${START:-outputs-pt-demo/checkpoint-best}    # of the student, before SFT
TEACHER=${TEACHER:-outputs-dpo-demo/checkpoint-best}
EPISODES=${EPISODES:-1280}
PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python)}
# As in run_demo.sh, which says why.
N_PROCESSES=$(($(nproc) > 1 ? 2 : 1))
export START TEACHER PYTHON N_PROCESSES OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 CUDA_VISIBLE_DEVICES="" TEMPLATE=chatml
export MALLOC_TRIM_THRESHOLD_=1073741824 MALLOC_MMAP_THRESHOLD_=1073741824
precision=$("$PYTHON" -c "from medtune.training.precision import autocast_where_faster as flag; print(flag(256))")
student=outputs-sft-half/checkpoint-best
distilled=outputs-distill-half more_sft=outputs-moresft-half replies=cache/replies-half
fail() { echo "error: $*" >&2; exit 2; }
for model in "$START" "$TEACHER"; do
    [ -d "$model" ] || fail "$model is not there: bash run_demo.sh makes it"
done

common="--gradient_checkpointing False --lr_scheduler_type cosine --save_total_limit 1 --weight_decay 0"
common+=" --cpu_bf16 $precision --report_to none"
lora="--lora_rank 32 --lora_alpha 64 --lora_dropout 0"

echo "== the student"
# shellcheck disable=SC2086  # words: flags without blanks in their values
MODEL=$START OUTPUT=outputs-sft-half BATCH=2 ACCUMULATION=$((2 / N_PROCESSES)) MAX_LENGTH=512 RATE=1e-3 bash run_sft.sh \
    --use_peft False --adam_beta2 0.99 --packing True --num_train_epochs 2 --max_train_samples 7600 \
    --eval_strategy epoch $common "$@"

echo "== distillation"
# shellcheck disable=SC2086
MODEL=$student OUTPUT=$distilled TRAIN_DATA=data/ppo EVAL_DATA=data/ppo TEACHER_DEVICE="" BATCH=16 \
    ACCUMULATION=$((4 / N_PROCESSES)) RATE=1e-3 MAX_PROMPT=512 MAX_REPLY=128 bash run_distill.sh --beta 1 \
    --eval_steps 5 --max_eval_samples 52 --rollout_batch_size 64 --total_episodes "$EPISODES" $lora $common "$@"

echo "== the teacher's replies to the same prompts"
if [ ! -f "$replies/train.jsonl" ]; then
    mkdir -p "$replies"
    [ -f "$replies.jsonl" ] || OMP_NUM_THREADS=$N_PROCESSES "$PYTHON" inference.py --base_model "$TEACHER" \
        --batch_size 64 --data_file data/ppo/prompts.jsonl --output_file "$replies.jsonl" --max_new_tokens 128
    "$PYTHON" -c "
import json, sys
for row in map(json.loads, sys.stdin):
    reply = {'role': 'assistant', 'content': row['output']}
    print(json.dumps({'messages': [*row['messages'], reply]}, ensure_ascii=False))
" < "$replies.jsonl" > "$replies/unfinished"
    mv "$replies/unfinished" "$replies/train.jsonl"
fi

echo "== more SFT, as long as distillation took, and half a minute to start"
seconds=$("$PYTHON" -c "import json; print(round(json.load(open('$distilled/train_results.json'))['seconds']) + 30)")
if [ ! -f "$more_sft/is_done" ]; then
    rm -rf "$more_sft" # its minutes are counted from the start
    # shellcheck disable=SC2086
    MODEL=$student OUTPUT=$more_sft TRAIN_DATA=$replies EVAL_DATA=$replies BATCH=16 \
        ACCUMULATION=$((2 / N_PROCESSES)) RATE=1e-3 MAX_LENGTH=512 timeout "$seconds" bash run_sft.sh \
        --max_eval_samples 52 --max_steps 100000 --eval_strategy no $lora $common \
        --lr_scheduler_type constant "$@" || [ $? = 124 ] # it saves a checkpoint at the signal
    touch "$more_sft/is_done"
fi
trained=$(find "$more_sft" -maxdepth 1 -name 'checkpoint-[0-9]*' | sort -V | tail -n 1)

echo "== held-out figures with their intervals"
safety="data/eval/safety.jsonl data/eval/emergency_twins.jsonl data/eval/unsafe_requests.jsonl"
measured="--test_file data/eval/questions.jsonl $safety --num_samples 100 --max_new_tokens 160 --batch_size 32 --overwrite"
export OMP_NUM_THREADS=$N_PROCESSES
# shellcheck disable=SC2086
"$PYTHON" scripts/evaluate_model.py --base_model $student --compare base $distilled/checkpoint-best "$trained" \
    $measured --output_dir outputs-eval-half --reuse
# shellcheck disable=SC2086
"$PYTHON" scripts/evaluate_model.py --base_model "$TEACHER" $measured --output_dir outputs-eval-teacher-half --reuse
