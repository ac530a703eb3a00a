#!/usr/bin/env bash
# The whole way on a CPU in minutes: set up, take the small base model of base_model/ through all stages of run_all.sh on
# the sample data, and show its answers before training and after each stage. Nothing is downloaded but the Python packages.
#
#   bash run_demo.sh
#
# Started again it goes on where it stopped; `rm -r outputs-*-demo` starts anew.
set -euo pipefail
cd "$(dirname "$0")"

bash setup.sh
PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python)}
export PYTHON HF_HUB_OFFLINE=1 CUDA_VISIBLE_DEVICES= # also where there are GPUs
export MODEL=base_model NAME=demo DO_PT=1 ALIGN=both
export TEMPLATE=chatml # without the system prompt that Qwen's template adds to each dialogue
# Two processes of one thread are faster here than one of two; on one core the second half is accumulated.
N_PROCESSES=$(($(nproc) > 1 ? 2 : 1))
export N_PROCESSES OMP_NUM_THREADS=1 ACCUMULATION=$((2 / N_PROCESSES))
# glibc returns large tensors to the system after each use, and getting them back was a third of DPO's time.
export MALLOC_TRIM_THRESHOLD_=1073741824 MALLOC_MMAP_THRESHOLD_=1073741824
# Products in bfloat16 where this processor is faster with them.
precision=$("$PYTHON" -c "from medtune.training.precision import autocast_where_faster as flag; print(flag(256))")

common="--gradient_checkpointing False --lr_scheduler_type cosine --preprocessing_num_workers 2 --save_total_limit 1"
common+=" --weight_decay 0 --eval_strategy epoch --cpu_bf16 $precision"
whole="--use_peft False --adam_beta2 0.99 --logging_steps 20 $common"
lora="--lora_rank 32 --lora_alpha 64 --lora_dropout 0 --max_eval_samples 300 --per_device_train_batch_size 4"
lora+=" --per_device_eval_batch_size 8 --max_source_length 512 --group_by_length True $common"
pairs="--validation_file_dir data/eval/preference_pairs.jsonl"
# Conditions that the base model has never read of.
export PT_DATA=data/pretrain/new_conditions.txt
export PT_FLAGS="--block_size 256 --num_train_epochs 3 --learning_rate 1e-3 --max_eval_samples 40 $whole"
export SFT_FLAGS="--packing True --model_max_length 512 --per_device_train_batch_size 2 --num_train_epochs 2 \
    --max_train_samples 20000 --learning_rate 1e-3 $whole"
export RM_FLAGS="$pairs --learning_rate 1e-3 --num_train_epochs 1 $lora"
# AdamW takes learning rate x decay of the new adapter away at each step, which draws the policy back to SFT's answers.
export DPO_FLAGS="$pairs --learning_rate 8e-4 --max_steps 320 --beta 0.4 --loss_type sigmoid sft --loss_weights 1 1 \
    $lora --weight_decay 16"
# Prompts that SFT did not teach the replies to, among them many emergencies and their harmless twins.
export PPO_DATA=data/ppo
export PPO_FLAGS="--eval_steps 2 --total_episodes 1280 --per_device_train_batch_size 16 \
    --gradient_accumulation_steps $((8 / N_PROCESSES)) --rollout_batch_size 64 --num_ppo_epochs 2 --num_mini_batches 2 \
    --learning_rate 5e-4 --lr_scheduler_type constant --lora_rank 16 --kl_coef 0.3 --temperature 1 \
    --response_length 128 --gradient_checkpointing False --cpu_bf16 $precision"
# The sample data's files, among them questions on the conditions that only continued pretraining tells of.
export TEST_FILES="data/eval/guide_questions.jsonl data/eval/everyday_questions.jsonl data/eval/questions.jsonl \
    data/eval/unseen_conditions.jsonl data/eval/exam.jsonl data/eval/safety.jsonl data/eval/emergency_twins.jsonl \
    data/eval/unsafe_requests.jsonl"
export EVAL_FLAGS="--num_samples 100 --max_new_tokens 160 --batch_size 32"
bash "${1:-run_all.sh}" # or another script, with these flags
