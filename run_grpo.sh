#!/usr/bin/env bash
# Stage 4, group relative policy optimization: raise the share of right answers, or other rewards, of the model's replies.
#
# Needs: 1 GPU of 24 GB or more for Qwen2.5-3B (A100, RTX 4090), or several: policy, and with --beta a reference, are
# adapters on one base model; there is no value model. No GPU: a small model on the CPU.
#
#   mkdir -p logs && nohup bash run_grpo.sh > logs/grpo_training.log 2>&1 &
#   tail -f logs/grpo_training.log
#
# A variable of the edit block set in the environment wins over it, a flag after the script's name wins over both:
#   EPISODES=2000 bash run_grpo.sh --rewards exam:1 length:0.5
# Another model and its TEMPLATE are those of SFT: docs/models.md.
# The same command after an interruption goes on from the newest checkpoint. Several machines: docs/reliability.md.
set -euo pipefail
cd "$(dirname "$0")"

# ---------------------------------------------------------------- edit block
MODEL=${MODEL:-outputs-sft-qwen2.5-3b/checkpoint-best}   # the adapter of SFT, or a hub name or folder
TEMPLATE=${TEMPLATE-qwen}                  # the one of SFT; "" takes the tokenizer's own
TRAIN_DATA=${TRAIN_DATA:-./data/exam}      # questions with options and the right letter
EVAL_DATA=${EVAL_DATA:-./data/exam}        # the training folder again: a part of it is held out
OUTPUT=${OUTPUT:-outputs-grpo-qwen2.5-3b}
# Keep BATCH x ACCUMULATION x number of GPUs constant: 4 x 16 x 2 = 128 replies an update, 16 groups of 8.
BATCH=${BATCH:-4}
ACCUMULATION=${ACCUMULATION:-16}
GROUP=${GROUP:-8}                          # replies to a prompt
EPISODES=${EPISODES:-20000}
MAX_PROMPT=${MAX_PROMPT:-1024}             # tokens
MAX_REPLY=${MAX_REPLY:-1024}
DEEPSPEED=${DEEPSPEED:-}                    # ds_configs/zero2.json shards gradients and optimizer over the GPUs
export VLLM_GPUS=${VLLM_GPUS:-}            # so many of the GPUs for vLLM, which then writes the replies: docs/vllm.md
export VLLM_MEMORY=${VLLM_MEMORY:-}        # share of a GPU that vLLM takes; "" is 0.9, or 0.4 where training shares it
export CUDA_VISIBLE_DEVICES=${CUDA_VISIBLE_DEVICES-0,1} # one process for each that is there; "" is the CPU
PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python)}

args=(
    --sft_model_path "$MODEL"
    --rewards exam                    # or several with weights: exam:1 format:0.2
    --train_file_dir "$TRAIN_DATA"
    --validation_file_dir "$EVAL_DATA"
    --do_train
    --max_source_length "$MAX_PROMPT"
    --response_length "$MAX_REPLY"
    --num_generations "$GROUP"
    --per_device_train_batch_size "$BATCH"
    --gradient_accumulation_steps "$ACCUMULATION"
    --rollout_batch_size 32           # replies that a GPU writes at a time
    --total_episodes "$EPISODES"
    --epsilon_high 0.28
    --torch_dtype bfloat16
    --gradient_checkpointing True     # off is faster where memory allows
    --eval_strategy steps
    --eval_steps 20                   # updates
    --save_steps 20
    --save_total_limit 3
    --report_to tensorboard
    --cache_dir ./cache
    --output_dir "$OUTPUT"
    --resume_from_checkpoint True
    ${TEMPLATE:+--template_name "$TEMPLATE"}
    ${DEEPSPEED:+--deepspeed "$DEEPSPEED"}
)

# exec: a signal to this script's process id reaches the training, which then saves a checkpoint.
exec "$PYTHON" -m medtune.launch grpo_training.py "${args[@]}" "$@"
