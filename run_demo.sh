#!/usr/bin/env bash
# The whole way on a CPU in minutes: set up, make a tiny random model, run all stages of run_all.sh on the sample data,
# and ask the guide's four questions before and after. Nothing is downloaded but the Python packages.
#
#   bash run_demo.sh
#
# Started again it goes on where it stopped; `rm -r outputs-*-demo` starts anew.
set -euo pipefail
cd "$(dirname "$0")"

bash setup.sh
PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python)}
export PYTHON HF_HUB_OFFLINE=1 CUDA_VISIBLE_DEVICES= # also where there are GPUs
export MODEL=models/tiny-qwen2 NAME=demo DO_PT=1 ALIGN=both
export TEMPLATE=chatml # without the system prompt that Qwen's template adds to each dialogue
# Two processes of one thread are faster here than one of two; on one core the second half is accumulated.
N_PROCESSES=$(($(nproc) > 1 ? 2 : 1))
export N_PROCESSES OMP_NUM_THREADS=1 ACCUMULATION=$((2 / N_PROCESSES))
# glibc returns large tensors to the system after each use, and getting them back was a third of DPO's time.
export MALLOC_TRIM_THRESHOLD_=1073741824 MALLOC_MMAP_THRESHOLD_=1073741824

common="--gradient_checkpointing False --lr_scheduler_type cosine --preprocessing_num_workers 2 --save_total_limit 1"
common+=" --weight_decay 0 --eval_strategy epoch --cpu_bf16 False"
# All weights, because a LoRA adapter has nothing to adapt in a random model. Many tokens are rare: what Adam saw of the
# others long ago says little about them, hence its beta2.
whole="--use_peft False --learning_rate 2e-3 --adam_beta2 0.99 $common"
lora="--lora_rank 32 --lora_alpha 64 --lora_dropout 0 --max_eval_samples 300 --per_device_train_batch_size 4"
lora+=" --per_device_eval_batch_size 8 --max_source_length 512 --group_by_length True $common"
pairs="--validation_file_dir data/eval/preference_pairs.jsonl"
export PT_FLAGS="--block_size 256 --num_train_epochs 2 --logging_steps 20 $whole"
export SFT_FLAGS="--packing True --model_max_length 320 --per_device_train_batch_size 1 --num_train_epochs 6 \
    --logging_steps 50 $whole"
export RM_FLAGS="$pairs --learning_rate 1e-3 --num_train_epochs 1 $lora"
# AdamW takes learning rate x decay of the new adapter away at each step, which draws the policy back to SFT's answers.
export DPO_FLAGS="$pairs --learning_rate 8e-4 --max_steps 638 --beta 0.4 --loss_type sigmoid sft --loss_weights 1 1 \
    $lora --weight_decay 16"
# Prompts that SFT did not teach the replies to, among them many emergencies.
export PPO_DATA=data/ppo
export PPO_FLAGS="--eval_steps 2 --total_episodes 1280 --per_device_train_batch_size 16 \
    --gradient_accumulation_steps $((8 / N_PROCESSES)) --rollout_batch_size 64 --num_ppo_epochs 2 --num_mini_batches 2 \
    --learning_rate 2e-3 --lr_scheduler_type constant --lora_rank 16 --kl_coef 0.1 --temperature 1 \
    --response_length 128 --gradient_checkpointing False --cpu_bf16 False"
export EVAL_FLAGS="--num_samples 200 --max_new_tokens 160 --batch_size 32"

"$PYTHON" scripts/build_tiny_model.py --output_dir "$MODEL"
echo "== its answers before training (random)"
"$PYTHON" inference.py --base_model "$MODEL" --max_new_tokens 24
bash run_all.sh
echo "== its answers after training"
"$PYTHON" inference.py --base_model outputs-sft-demo/checkpoint-best --lora_model outputs-ppo-demo/checkpoint-best \
    --max_new_tokens 160
