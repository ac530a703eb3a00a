#!/usr/bin/env bash
# Stage 3A, reward modelling: teach a model to score replies, from pairs of a better and a worse one in data/reward.
#
# Needs: 1 GPU of 24 GB or more for Qwen2.5-3B with LoRA (A100, RTX 4090), or several. No GPU: a small model on the CPU.
#
#   mkdir -p logs && nohup bash run_rm.sh > logs/rm_training.log 2>&1 &
#   tail -f logs/rm_training.log
#
# A variable of the edit block set in the environment wins over it, a flag after the script's name wins over both:
#   MODEL=Qwen/Qwen2.5-3B-Instruct bash run_rm.sh --learning_rate 1e-5
# Another model is that of SFT, whose template it keeps: docs/models.md.
# The same command after an interruption goes on from the newest checkpoint. Several machines: docs/reliability.md.
set -euo pipefail
cd "$(dirname "$0")"

# ---------------------------------------------------------------- edit block
MODEL=${MODEL:-outputs-sft-qwen2.5-3b/checkpoint-best}   # the adapter of SFT, or a hub name or folder
TRAIN_DATA=${TRAIN_DATA:-./data/reward}
EVAL_DATA=${EVAL_DATA:-./data/reward}      # the training folder again: a part of it is held out
OUTPUT=${OUTPUT:-outputs-rm-qwen2.5-3b}
# Keep BATCH x ACCUMULATION x number of GPUs constant: 2 x 8 x 1 = 16 pairs a step.
BATCH=${BATCH:-2}
ACCUMULATION=${ACCUMULATION:-8}
MAX_PROMPT=${MAX_PROMPT:-1024}             # tokens
MAX_REPLY=${MAX_REPLY:-512}
RATE=${RATE:-2e-5}                         # learning rate; "lora" is 1e-4, what is usual for adapters
DEEPSPEED=${DEEPSPEED:-}                    # ds_configs/zero2.json shards the optimizer over the GPUs
export CUDA_VISIBLE_DEVICES=${CUDA_VISIBLE_DEVICES-0} # one process for each that is there; "" is the CPU
PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python)}

[ "$RATE" != lora ] || RATE=1e-4
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
    --per_device_eval_batch_size "$BATCH"
    --gradient_accumulation_steps "$ACCUMULATION"
    --num_train_epochs 2
    --learning_rate "$RATE"
    --warmup_ratio 0.05
    --weight_decay 0.001
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
    --save_total_limit 2
    --seed 42
    --ddp_timeout 30000
    --ddp_find_unused_parameters False
    --remove_unused_columns False
    --report_to tensorboard
    --cache_dir ./cache
    --output_dir "$OUTPUT"
    --resume_from_checkpoint True
    ${DEEPSPEED:+--deepspeed "$DEEPSPEED"}
)

# exec: a signal to this script's process id reaches the training, which then saves a checkpoint.
exec "$PYTHON" -m medtune.launch reward_modeling.py "${args[@]}" "$@"
