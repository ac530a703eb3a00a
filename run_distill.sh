#!/usr/bin/env bash
# Stage 4, on-policy distillation: a larger model of the same tokenizer teaches the SFT model on its own replies.
#
# Needs: 2 GPUs of 24 GB or more, one for Qwen2.5-3B and one for the teacher Qwen2.5-7B; or 1 for both, with TEACHER_DEVICE=
# and --teacher_bits 4, or of 40 GB. No GPU: small models on the CPU.
#
#   mkdir -p logs && nohup bash run_distill.sh > logs/distillation_training.log 2>&1 &
#   tail -f logs/distillation_training.log
#
# A variable of the edit block set in the environment wins over it, a flag after the script's name wins over both:
#   EPISODES=2000 bash run_distill.sh --beta 0.5 --on_policy_share 0.5
# Another model and its TEMPLATE are those of SFT: docs/models.md.
# The same command after an interruption goes on from the newest checkpoint. Several machines: docs/reliability.md.
set -euo pipefail
cd "$(dirname "$0")"

# ---------------------------------------------------------------- edit block
MODEL=${MODEL:-outputs-sft-qwen2.5-3b/checkpoint-best}   # the student: the adapter of SFT, or a hub name or folder
TEACHER=${TEACHER:-Qwen/Qwen2.5-7B-Instruct}             # hub name or folder, or the folder of an adapter
TEMPLATE=${TEMPLATE-qwen}                  # the one of SFT; "" takes the tokenizer's own
TRAIN_DATA=${TRAIN_DATA:-./data/finetune}
EVAL_DATA=${EVAL_DATA:-./data/finetune}    # the training folder again: a part of it is held out
OUTPUT=${OUTPUT:-outputs-distill-qwen2.5-3b}
# BATCH x ACCUMULATION x N_PROCESSES = 64 replies an update.
BATCH=${BATCH:-4}
ACCUMULATION=${ACCUMULATION:-16}
EPISODES=${EPISODES:-10000}
RATE=${RATE:-1e-4}                         # what is usual for adapters
MAX_PROMPT=${MAX_PROMPT:-1024}             # tokens
MAX_REPLY=${MAX_REPLY:-512}
TEACHER_DEVICE=${TEACHER_DEVICE-cuda:1}    # "" is the student's GPU; without a second GPU give that
export N_PROCESSES=${N_PROCESSES:-1}       # of the student; with 2 and TEACHER_DEVICE=cuda:2 teachers are on cuda:2 and cuda:3
DEEPSPEED=${DEEPSPEED:-}                    # ds_configs/zero2.json shards gradients and optimizer over the GPUs
export VLLM_GPUS=${VLLM_GPUS:-}            # so many of the GPUs for vLLM, which then writes the replies: docs/vllm.md
export VLLM_MEMORY=${VLLM_MEMORY:-}        # share of a GPU that vLLM takes; "" is 0.9, or 0.4 where training shares it
export CUDA_VISIBLE_DEVICES=${CUDA_VISIBLE_DEVICES-0,1} # student and teacher; "" is the CPU
PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python)}

args=(
    --sft_model_path "$MODEL"
    --teacher_model_path "$TEACHER"
    --train_file_dir "$TRAIN_DATA"
    --validation_file_dir "$EVAL_DATA"
    --do_train
    --max_source_length "$MAX_PROMPT"
    --response_length "$MAX_REPLY"
    --per_device_train_batch_size "$BATCH"
    --gradient_accumulation_steps "$ACCUMULATION"
    --total_episodes "$EPISODES"
    --learning_rate "$RATE"
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
    ${TEACHER_DEVICE:+--teacher_device "$TEACHER_DEVICE"}
    ${DEEPSPEED:+--deepspeed "$DEEPSPEED"}
)

# exec: a signal to this script's process id reaches the training, which then saves a checkpoint.
exec "$PYTHON" -m medtune.launch distillation_training.py "${args[@]}" "$@"
