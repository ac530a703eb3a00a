#!/usr/bin/env bash
# The way on a CPU in minutes: set up, make a tiny random model, pretrain and fine-tune it on the sample data, and ask
# the guide's four questions before and after, and 500 held-out ones. Nothing is downloaded but the Python packages.
#
#   bash run_demo.sh
#
# Started again it goes on where it stopped; `rm -r outputs-demo*` starts anew.
set -euo pipefail
cd "$(dirname "$0")"

MODEL=models/tiny-qwen2
OUTPUT=outputs-demo

bash setup.sh
PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python)}
export PYTHON HF_HUB_OFFLINE=1
# Two processes of one thread are faster here than one of two; on one core the second half is accumulated.
N_PROCESSES=$(($(nproc) > 1 ? 2 : 1))
export OMP_NUM_THREADS=1
launch=("$PYTHON" -m torch.distributed.run --standalone --nproc_per_node "$N_PROCESSES")

echo "== 1/6 a tiny model with random weights"
"$PYTHON" scripts/build_tiny_model.py --output_dir "$MODEL"

echo "== 2/6 its answers before training (random)"
"$PYTHON" inference.py --base_model "$MODEL" --max_new_tokens 24

# All weights, because a LoRA adapter has nothing to adapt in a random model.
args=(
    --use_peft False
    --do_train
    --gradient_accumulation_steps $((2 / N_PROCESSES))
    --learning_rate 2e-3
    --adam_beta2 0.99          # many tokens are rare: what the others did long ago says little about them
    --warmup_ratio 0.05
    --lr_scheduler_type cosine
    --gradient_checkpointing False
    --logging_steps 50
    --save_steps 500
    --save_total_limit 1
    --preprocessing_num_workers 2
    --report_to tensorboard
    --resume_from_checkpoint True
)

echo "== 3/6 continued pretraining on data/pretrain"
pretraining=(
    --model_name_or_path "$MODEL"
    --train_file_dir data/pretrain
    --block_size 256
    --per_device_train_batch_size 2
    --num_train_epochs 2
    --output_dir "$OUTPUT-pt"
)
"${launch[@]}" pretraining.py "${args[@]}" "${pretraining[@]}"

echo "== 4/6 supervised fine-tuning on data/finetune, about ten minutes on two cores"
finetuning=(
    --model_name_or_path "$OUTPUT-pt/checkpoint-best"
    --template_name chatml     # without the system prompt that Qwen's template adds to each dialogue
    --train_file_dir data/finetune
    --model_max_length 320
    --packing True
    --per_device_train_batch_size 1
    --num_train_epochs 5
    --output_dir "$OUTPUT"
)
"${launch[@]}" supervised_finetuning.py "${args[@]}" "${finetuning[@]}" "$@"

echo "== 5/6 its answers after training"
"$PYTHON" inference.py --base_model "$OUTPUT/checkpoint-best" --max_new_tokens 200

echo "== 6/6 held-out questions: replies against references"
"$PYTHON" scripts/evaluate_model.py --base_model "$OUTPUT/checkpoint-best" --test_file data/eval/questions.jsonl \
    --max_new_tokens 160 --batch_size 32 --output_dir "$OUTPUT-eval" --overwrite
