#!/usr/bin/env bash
# The whole way on a CPU in minutes: set up, make a tiny random model, fine-tune it on the sample dialogues, and ask
# the guide's four questions before and after. Nothing is downloaded but the Python packages.
#
#   bash run_demo.sh
#
# Started again it goes on where it stopped; `rm -r outputs-demo` starts anew.
set -euo pipefail
cd "$(dirname "$0")"

MODEL=models/tiny-qwen2
OUTPUT=outputs-demo

bash setup.sh
PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python)}
export PYTHON HF_HUB_OFFLINE=1

echo "== 1/4 a tiny model with random weights"
"$PYTHON" scripts/build_tiny_model.py --output_dir "$MODEL"

echo "== 2/4 its answers before training (random)"
"$PYTHON" inference.py --base_model "$MODEL" --max_new_tokens 24

echo "== 3/4 supervised fine-tuning on data/finetune, about five minutes on two cores"
# All weights, because a LoRA adapter has nothing to adapt in a random model; and no evaluation, because a model of
# four million weights learns these dialogues by heart and nothing else.
args=(
    --model_name_or_path "$MODEL"
    --template_name qwen
    --use_peft False
    --train_file_dir data/finetune
    --do_train
    --model_max_length 512
    --per_device_train_batch_size 8
    --num_train_epochs 16
    --learning_rate 2e-3
    --warmup_ratio 0.05
    --lr_scheduler_type cosine
    --gradient_checkpointing False
    --logging_steps 10
    --save_steps 100
    --save_total_limit 1
    --preprocessing_num_workers 2
    --report_to tensorboard
    --output_dir "$OUTPUT"
    --resume_from_checkpoint True
)
"$PYTHON" supervised_finetuning.py "${args[@]}" "$@"

echo "== 4/4 its answers after training"
"$PYTHON" inference.py --base_model "$OUTPUT/checkpoint-best" --max_new_tokens 200
