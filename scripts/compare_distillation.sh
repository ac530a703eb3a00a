#!/usr/bin/env bash
# On-policy distillation beside more SFT on the teacher's replies, in the same minutes, with the demo's models on a CPU.
# The teacher is the demo's PPO model, the student SFT on half of its dialogues; both ways begin with the student, train
# adapters of the same size and see the same prompts. The minutes that the teacher's replies take are SFT's gift.
#
#   mkdir -p logs && nohup bash scripts/compare_distillation.sh > logs/compare_distillation.log 2>&1 &
#
# After run_demo.sh. Started again it goes on where it stopped; `rm -r outputs-*-half` starts anew.
set -euo pipefail
cd "$(dirname "$0")/.."

EPISODES=${EPISODES:-4000}
PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python)}
export PYTHON HF_HUB_OFFLINE=1 CUDA_VISIBLE_DEVICES="" TEMPLATE=chatml N_PROCESSES=1 TEACHER_DEVICE=""
teacher=outputs-ppo-demo/checkpoint-best student=outputs-sft-half/checkpoint-best
distilled=outputs-distill-half more_sft=outputs-moresft-half replies=cache/replies-half
fail() { echo "error: $*" >&2; exit 2; }
[ -d "$teacher" ] || fail "$teacher is not there: bash run_demo.sh makes it"

common="--gradient_checkpointing False --weight_decay 0 --save_total_limit 1 --cpu_bf16 False --report_to none"
lora="--lora_rank 32 --lora_alpha 64 --lora_dropout 0"

echo "== the student"
# shellcheck disable=SC2086  # words: flags without blanks in their values
MODEL=outputs-pt-demo/checkpoint-best OUTPUT=outputs-sft-half ACCUMULATION=2 bash run_sft.sh --use_peft False --learning_rate 2e-3 \
    --adam_beta2 0.99 --packing True --model_max_length 320 --per_device_train_batch_size 1 --num_train_epochs 6 \
    --max_train_samples 3400 --eval_strategy epoch $common

echo "== distillation"
# shellcheck disable=SC2086
MODEL=$student TEACHER=$teacher OUTPUT=$distilled TRAIN_DATA=data/ppo EVAL_DATA=data/ppo BATCH=16 ACCUMULATION=4 \
    RATE=1e-3 MAX_REPLY=128 bash run_distill.sh --beta 1 --eval_steps 10 --rollout_batch_size 64 \
    --total_episodes "$EPISODES" $lora $common

echo "== the teacher's replies to the same prompts"
if [ ! -f "$replies/train.jsonl" ]; then
    mkdir -p "$replies"
    "$PYTHON" inference.py --base_model outputs-sft-demo/checkpoint-best --lora_model "$teacher" --batch_size 64 \
        --data_file data/ppo/prompts.jsonl --output_file "$replies.jsonl" --max_new_tokens 128
    "$PYTHON" -c "
import json, sys
for row in map(json.loads, sys.stdin):
    reply = {'role': 'assistant', 'content': row['output']}
    print(json.dumps({'messages': [*row['messages'], reply]}, ensure_ascii=False))
" < "$replies.jsonl" > "$replies/train.jsonl"
fi

echo "== more SFT, as long as distillation took"
seconds=$("$PYTHON" -c "import json; print(round(json.load(open('$distilled/train_results.json'))['seconds']))")
if [ ! -d "$more_sft" ]; then
    # shellcheck disable=SC2086
    MODEL=$student OUTPUT=$more_sft TRAIN_DATA=$replies EVAL_DATA=$replies BATCH=16 ACCUMULATION=1 \
        timeout "$seconds" bash run_sft.sh --learning_rate 1e-3 --max_steps 100000 --lr_scheduler_type constant \
        --eval_strategy no $lora $common || [ $? = 124 ] # it saves a checkpoint at the signal
fi
trained=$(ls -d $more_sft/checkpoint-[0-9]*)

echo "== held-out figures with their intervals"
test_files="data/eval/questions.jsonl data/eval/safety.jsonl data/eval/emergency_twins.jsonl"
# shellcheck disable=SC2086
"$PYTHON" scripts/evaluate_model.py --base_model $student --compare base $distilled/checkpoint-best "$trained" \
    --test_file $test_files --max_new_tokens 160 --batch_size 32 --output_dir outputs-eval-half --overwrite
# shellcheck disable=SC2086
"$PYTHON" scripts/evaluate_model.py --base_model outputs-sft-demo/checkpoint-best --lora_model $teacher \
    --test_file $test_files --max_new_tokens 160 --batch_size 32 --output_dir outputs-eval-teacher --overwrite
