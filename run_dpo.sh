#!/usr/bin/env bash
# Stage 3B, direct preference optimization, instead of RM and PPO: teach a model which of two replies is better.
#
# Needs: 1 or 2 GPUs of 24 GB or more for Qwen2.5-3B with LoRA (2 x A100, 2 x RTX 4090). No GPU: a small model on the CPU.
#
#   mkdir -p logs && nohup bash run_dpo.sh > logs/dpo_training.log 2>&1 &
#   tail -f logs/dpo_training.log
#
# A variable of the edit block set in the environment wins over it, a flag after the script's name wins over both:
#   MODEL=Qwen/Qwen2.5-3B-Instruct bash run_dpo.sh --beta 0.2
# Another model and its TEMPLATE are those of SFT: docs/models.md.
# The same command after an interruption goes on from the newest checkpoint. Several machines: docs/reliability.md.
set -euo pipefail
cd "$(dirname "$0")"

# ---------------------------------------------------------------- edit block
MODEL=${MODEL:-outputs-sft-qwen2.5-3b/checkpoint-best}   # the adapter of SFT, or a hub name or folder
TEMPLATE=${TEMPLATE-qwen}                  # the one of SFT; "" takes the tokenizer's own
TRAIN_DATA=${TRAIN_DATA:-./data/reward}
EVAL_DATA=${EVAL_DATA:-./data/reward}      # the training folder again: a part of it is held out
OUTPUT=${OUTPUT:-outputs-dpo-qwen2.5-3b}
# Keep BATCH x ACCUMULATION x number of GPUs constant: 2 x 16 x 2 = 64 pairs a step.
BATCH=${BATCH:-2}
ACCUMULATION=${ACCUMULATION:-16}
STEPS=${STEPS:-2000}
MAX_PROMPT=${MAX_PROMPT:-1024}             # tokens
MAX_REPLY=${MAX_REPLY:-512}
DEEPSPEED=${DEEPSPEED:-}                    # ds_configs/zero2.json shards the optimizer over the GPUs
export CUDA_VISIBLE_DEVICES=${CUDA_VISIBLE_DEVICES-0,1} # one process for each that is there; "" is the CPU
PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python)}

args=(
    --model_name_or_path "$MODEL"
    --train_file_dir "$TRAIN_DATA"
    --validation_file_dir "$EVAL_DATA"
    --do_train
    --do_eval
    --max_train_samples 5000
    --max_eval_samples 100
    --max_source_length "$MAX_PROMPT"
    --max_target_length "$MAX_REPLY"
    --per_device_train_batch_size "$BATCH"
    --per_device_eval_batch_size 1
    --gradient_accumulation_steps "$ACCUMULATION"
    --max_steps "$STEPS"
    --learning_rate 5e-6
    --use_peft True
    --target_modules all
    --lora_rank 16
    --lora_alpha 32
    --lora_dropout 0.05
    --torch_dtype bfloat16
    --bf16 True
    --fp16 False
    --device_map auto
    --gradient_checkpointing True     # off is faster where memory allows
    --eval_steps 100
    --save_steps 500
    --remove_unused_columns False
    --report_to tensorboard
    --cache_dir ./cache
    --output_dir "$OUTPUT"
    --resume_from_checkpoint True
    ${TEMPLATE:+--template_name "$TEMPLATE"}
    ${DEEPSPEED:+--deepspeed "$DEEPSPEED"}
)

# exec: a signal to this script's process id reaches the training, which then saves a checkpoint.
exec "$PYTHON" -m medtune.launch dpo_training.py "${args[@]}" "$@"
