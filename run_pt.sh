#!/usr/bin/env bash
# Stage 1, continued pretraining: teach a base model medical language and facts, from plain text in data/pretrain.
#
# Needs: 1 or 2 GPUs of 24 GB or more for Qwen2.5-3B with LoRA (2 x A100, 2 or 4 x RTX 4090). No GPU: a small model on the CPU.
#
#   mkdir -p logs && nohup bash run_pt.sh > logs/pt_training.log 2>&1 &
#   tail -f logs/pt_training.log
#
# A variable of the edit block set in the environment wins over it, a flag after the script's name wins over both:
#   MODEL=Qwen/Qwen2.5-7B bash run_pt.sh --learning_rate 1e-4
#   MODEL=Qwen/Qwen3-4B-Base bash run_pt.sh     # other models: docs/models.md
# The same command after an interruption goes on from the newest checkpoint. Several machines: docs/reliability.md.
set -euo pipefail
cd "$(dirname "$0")"

# ---------------------------------------------------------------- edit block
MODEL=${MODEL:-Qwen/Qwen2.5-3B}            # hub name, folder, or an adapter to continue
TRAIN_DATA=${TRAIN_DATA:-./data/pretrain}
EVAL_DATA=${EVAL_DATA:-./data/pretrain}    # the training folder again: a part of it is held out
OUTPUT=${OUTPUT:-outputs-pt-qwen2.5-3b}
# Keep BATCH x ACCUMULATION x number of GPUs constant: 2 x 16 x 2 = 64 blocks a step.
BATCH=${BATCH:-2}
ACCUMULATION=${ACCUMULATION:-16}
BLOCK_SIZE=${BLOCK_SIZE:-1024}
DEEPSPEED=${DEEPSPEED:-}                    # ds_configs/zero2.json shards the optimizer over the GPUs
export CUDA_VISIBLE_DEVICES=${CUDA_VISIBLE_DEVICES-0,1} # one process for each that is there; "" is the CPU
PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python)}

args=(
    --model_name_or_path "$MODEL"
    --train_file_dir "$TRAIN_DATA"
    --validation_file_dir "$EVAL_DATA"
    --do_train
    --do_eval
    --max_train_samples 100000
    --max_eval_samples 500
    --block_size "$BLOCK_SIZE"
    --per_device_train_batch_size "$BATCH"
    --per_device_eval_batch_size "$BATCH"
    --gradient_accumulation_steps "$ACCUMULATION"
    --num_train_epochs 1
    --learning_rate 2e-4
    --warmup_ratio 0.05
    --weight_decay 0.01
    --use_peft True
    --target_modules all
    --lora_rank 16
    --lora_alpha 32
    --lora_dropout 0.05
    --torch_dtype bfloat16
    --bf16 True
    --device_map auto
    --gradient_checkpointing True     # off is faster where memory allows
    --logging_strategy steps
    --logging_steps 10
    --logging_first_step True
    --eval_strategy steps
    --eval_steps 500
    --save_strategy steps
    --save_steps 1000
    --save_total_limit 3
    --preprocessing_num_workers 8
    --group_by_length True
    --seed 42
    --ddp_timeout 30000
    --ddp_find_unused_parameters False
    --report_to tensorboard
    --cache_dir ./cache
    --output_dir "$OUTPUT"
    --resume_from_checkpoint True
    ${DEEPSPEED:+--deepspeed "$DEEPSPEED"}
)

# exec: a signal to this script's process id reaches the training, which then saves a checkpoint.
exec "$PYTHON" -m medtune.launch pretraining.py "${args[@]}" "$@"
