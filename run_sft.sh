#!/usr/bin/env bash
# Stage 2, supervised fine-tuning: teach a model to answer, from dialogues in data/finetune.
#
# Needs: 1 or 2 GPUs of 24 GB or more for Qwen2.5-3B with LoRA (2 x RTX 4090, 2 x A100). No GPU: a small model on the CPU.
#
#   mkdir -p logs && nohup bash run_sft.sh > logs/sft_training.log 2>&1 &
#   tail -f logs/sft_training.log
#
# A variable of the edit block set in the environment wins over it, a flag after the script's name wins over both:
#   MODEL=outputs-pt-qwen2.5-3b/checkpoint-best bash run_sft.sh --learning_rate 1e-5
#   MODEL=Qwen/Qwen3-4B-Instruct-2507 TEMPLATE= bash run_sft.sh     # other models: docs/models.md
# The same command after an interruption goes on from the newest checkpoint. Several machines: docs/reliability.md.
set -euo pipefail
cd "$(dirname "$0")"

# ---------------------------------------------------------------- edit block
MODEL=${MODEL:-Qwen/Qwen2.5-3B-Instruct}   # hub name, folder, or the adapter of the stage before
TEMPLATE=${TEMPLATE-qwen}                  # template.py lists the names; "" takes the tokenizer's own
TRAIN_DATA=${TRAIN_DATA:-./data/finetune}
EVAL_DATA=${EVAL_DATA:-./data/finetune}    # the training folder again: a part of it is held out
OUTPUT=${OUTPUT:-outputs-sft-qwen2.5-3b}
# Keep BATCH x ACCUMULATION x number of GPUs constant: 2 x 16 x 2 = 64 dialogues a step.
BATCH=${BATCH:-2}
ACCUMULATION=${ACCUMULATION:-16}
RATE=${RATE:-2e-5}                         # learning rate; "lora" is 2e-4, what is usual for adapters
MAX_LENGTH=${MAX_LENGTH:-2048}
DEEPSPEED=${DEEPSPEED:-}                    # ds_configs/zero2.json shards the optimizer over the GPUs
export CUDA_VISIBLE_DEVICES=${CUDA_VISIBLE_DEVICES-0,1} # one process for each that is there; "" is the CPU
PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python)}

[ "$RATE" != lora ] || RATE=2e-4
args=(
    --model_name_or_path "$MODEL"
    --train_file_dir "$TRAIN_DATA"
    --validation_file_dir "$EVAL_DATA"
    --do_train
    --do_eval
    --max_train_samples 10000
    --max_eval_samples 100
    --model_max_length "$MAX_LENGTH"
    --per_device_train_batch_size "$BATCH"
    --per_device_eval_batch_size "$BATCH"
    --gradient_accumulation_steps "$ACCUMULATION"
    --num_train_epochs 3
    --learning_rate "$RATE"
    --warmup_ratio 0.05
    --weight_decay 0.05
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
    --eval_steps 100
    --save_strategy steps
    --save_steps 500
    --save_total_limit 3
    --preprocessing_num_workers 8
    --ddp_timeout 30000
    --ddp_find_unused_parameters False
    --report_to tensorboard
    --cache_dir ./cache
    --output_dir "$OUTPUT"
    --resume_from_checkpoint True
    ${TEMPLATE:+--template_name "$TEMPLATE"}
    ${DEEPSPEED:+--deepspeed "$DEEPSPEED"}
)

# exec: a signal to this script's process id reaches the training, which then saves a checkpoint.
exec "$PYTHON" -m medtune.launch supervised_finetuning.py "${args[@]}" "$@"
