#!/usr/bin/env bash
# The base model in base_model/, from nothing: writes the text, makes a tokenizer and random weights, trains them by
# pretraining.py, and publishes bfloat16 weights with a card. Needs no GPU; a sitting takes three to five hours on two cores.
#
#   mkdir -p logs && nohup bash scripts/train_base_model.sh > logs/base_model.log 2>&1 &
#   SITTING=2 nohup bash scripts/train_base_model.sh > logs/base_model.log 2>&1 &
#
# The first sitting begins with random weights, each later one with the published weights and a new optimizer. So every
# sitting ends at a learning rate of zero, and its weights can be used. The same command after an interruption goes on.
#
# Tokens a second of processor time, one thread, steps of 8 x 512 tokens, beside other work on an AMD EPYC:
#   6 layers of 256: 1,147 in float32, 1,709 with bfloat16 autocast; 8 layers of 256 with narrower MLPs: 952 in float32;
#   4 layers of 320: 1,334 in float32.
set -euo pipefail
cd "$(dirname "$0")/.."

# ---------------------------------------------------------------- edit block
SITTING=${SITTING:-1}
STEPS=${STEPS:-4500} # of 16 blocks of 512 tokens
CPU_BF16=${CPU_BF16:-} # autocast or False; empty: autocast where this processor is faster with it
DECAY_STEPS=$((STEPS / 5)) # the last ones, in which the learning rate falls to zero
OUTPUT=${OUTPUT:-outputs-base-$SITTING}
PUBLISHED=${PUBLISHED:-base_model}
CORPUS=${CORPUS:-cache/base-corpus}
PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python)}
# Two processes of one thread are faster than one of two.
export N_PROCESSES=${N_PROCESSES:-2} OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} HF_HUB_OFFLINE=1 CUDA_VISIBLE_DEVICES=
# glibc returns large tensors to the system after each use, and getting them back takes time.
export MALLOC_TRIM_THRESHOLD_=1073741824 MALLOC_MMAP_THRESHOLD_=1073741824

fail() { echo "error: $*" >&2; exit 2; }
[ "$STEPS" -ge 400 ] || fail "STEPS=$STEPS: 200 steps are warm-up and a fifth is decay; give 400 or more"
[ "$SITTING" = 1 ] || [ -f "$PUBLISHED/config.json" ] ||
    fail "SITTING=$SITTING goes on from $PUBLISHED, and no model is there: begin with SITTING=1"

flag="from medtune.training.precision import autocast_where_faster as flag; print(flag(256))"
CPU_BF16=${CPU_BF16:-$("$PYTHON" -c "$flag")}
"$PYTHON" scripts/build_sample_data.py --corpus "$CORPUS/pretrain/documents.jsonl"
model=$PUBLISHED
if [ "$SITTING" = 1 ]; then
    model=${OUTPUT%/}-untrained # beside the run: another OUTPUT may be of another shape or corpus
    "$PYTHON" scripts/build_tiny_model.py --shape base --data_dir "$CORPUS" --output_dir "$model"
fi

args=(
    --model_name_or_path "$model"
    --train_file_dir "$CORPUS/pretrain"
    --validation_file_dir "$CORPUS/pretrain" # a part of it is held out
    --do_train
    --do_eval
    --max_eval_samples 400
    --block_size 512
    --per_device_train_batch_size 8
    --per_device_eval_batch_size 8
    --gradient_accumulation_steps $((2 / N_PROCESSES))
    --max_steps "$STEPS"
    --use_peft False
    --learning_rate 2e-3
    --lr_scheduler_type warmup_stable_decay
    --lr_scheduler_kwargs "{\"num_decay_steps\": $DECAY_STEPS}"
    --warmup_steps 200
    --weight_decay 0.05
    --adam_beta2 0.98
    --seed 42 # holds out the same documents in every sitting
    --data_seed "$SITTING"
    --gradient_checkpointing False
    --cpu_bf16 "$CPU_BF16"
    --logging_steps 20
    --eval_strategy steps
    --eval_steps 400
    --save_strategy steps
    --save_steps 400
    --save_total_limit 1
    --preprocessing_num_workers 2
    --output_dir "$OUTPUT"
    --resume_from_checkpoint True
)
"$PYTHON" -m medtune.launch pretraining.py "${args[@]}" "$@"
"$PYTHON" scripts/evaluate_model.py --base_model "$OUTPUT/checkpoint-best" --test_file data/eval/questions.jsonl \
    --num_samples 200 --max_new_tokens 64 --batch_size 32 --output_dir "$OUTPUT/evaluation" --overwrite
"$PYTHON" scripts/publish_base_model.py --run "$OUTPUT" --sitting "$SITTING" --tokens_per_step $((16 * 512)) \
    --corpus "$CORPUS/pretrain/documents.jsonl" --output_dir "$PUBLISHED"
