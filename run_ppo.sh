#!/usr/bin/env bash
# Stage 4, proximal policy optimization: raise the reward model's scores of the SFT model's own replies.
#
# Needs: 1 GPU of 24 GB or more for Qwen2.5-3B (A100, RTX 4090), or several: the four roles of PPO are adapters on one
# base model. No GPU: a small model on the CPU.
#
#   mkdir -p logs && nohup bash run_ppo.sh > logs/ppo_training.log 2>&1 &
#   tail -f logs/ppo_training.log
#
# A variable of the edit block set in the environment wins over it, a flag after the script's name wins over both:
#   EPISODES=2000 bash run_ppo.sh --kl_coef 0.1
# Another model and its TEMPLATE are those of SFT: docs/models.md.
# The same command after an interruption goes on from the newest checkpoint. Several machines: docs/reliability.md.
set -euo pipefail
cd "$(dirname "$0")"

# ---------------------------------------------------------------- edit block
MODEL=${MODEL:-outputs-sft-qwen2.5-3b/checkpoint-best}   # the adapter of SFT, or a hub name or folder
REWARD_MODEL=${REWARD_MODEL-outputs-rm-qwen2.5-3b/checkpoint-best} # "" with other --rewards, such as exam
TEMPLATE=${TEMPLATE-qwen}                  # the one of SFT; "" takes the tokenizer's own
TRAIN_DATA=${TRAIN_DATA:-./data/finetune}
EVAL_DATA=${EVAL_DATA:-./data/finetune}    # the training folder again: a part of it is held out
OUTPUT=${OUTPUT:-outputs-ppo-qwen2.5-3b}
# Keep BATCH x ACCUMULATION x number of GPUs constant: 1 x 8 x 2 = 16 episodes an update.
BATCH=${BATCH:-1}
ACCUMULATION=${ACCUMULATION:-8}
EPISODES=${EPISODES:-10000}
MAX_PROMPT=${MAX_PROMPT:-1024}             # tokens
MAX_REPLY=${MAX_REPLY:-512}
DEEPSPEED=${DEEPSPEED:-}                    # ds_configs/zero2.json shards gradients and optimizer over the GPUs
export VLLM_GPUS=${VLLM_GPUS:-}            # so many of the GPUs for vLLM, which then writes the replies: docs/vllm.md
export VLLM_MEMORY=${VLLM_MEMORY:-}        # share of a GPU that vLLM takes; "" is 0.9, or 0.4 where training shares it
export CUDA_VISIBLE_DEVICES=${CUDA_VISIBLE_DEVICES-0,1} # one process for each that is there; "" is the CPU
PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python)}

args=(
    --sft_model_path "$MODEL"
    --train_file_dir "$TRAIN_DATA"
    --validation_file_dir "$EVAL_DATA"
    --do_train
    --max_source_length "$MAX_PROMPT"
    --response_length "$MAX_REPLY"
    --per_device_train_batch_size "$BATCH"
    --gradient_accumulation_steps "$ACCUMULATION"
    --total_episodes "$EPISODES"
    --num_train_epochs 1
    --missing_eos_penalty 1.0
    --torch_dtype bfloat16
    --gradient_checkpointing True     # off is faster where memory allows
    --eval_strategy steps
    --eval_steps 100                  # updates
    --report_to tensorboard
    --cache_dir ./cache
    --output_dir "$OUTPUT"
    --resume_from_checkpoint True
    ${REWARD_MODEL:+--reward_model_path "$REWARD_MODEL"}
    ${TEMPLATE:+--template_name "$TEMPLATE"}
    ${DEEPSPEED:+--deepspeed "$DEEPSPEED"}
)

# exec: a signal to this script's process id reaches the training, which then saves a checkpoint.
exec "$PYTHON" -m medtune.launch ppo_training.py "${args[@]}" "$@"
