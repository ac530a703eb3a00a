"""The flags of the guide's stage commands: the contract. A repeated flag after them wins."""

GUIDE_PT = """
    --model_name_or_path Qwen/Qwen2.5-3B
    --train_file_dir ./data/pretrain --validation_file_dir ./data/pretrain
    --per_device_train_batch_size 2 --per_device_eval_batch_size 2
    --do_train --do_eval --use_peft True --seed 42
    --max_train_samples 100000 --max_eval_samples 500
    --num_train_epochs 1 --learning_rate 2e-4 --warmup_ratio 0.05 --weight_decay 0.01
    --logging_strategy steps --logging_steps 10
    --eval_steps 500 --eval_strategy steps
    --save_steps 1000 --save_strategy steps --save_total_limit 3
    --gradient_accumulation_steps 16 --preprocessing_num_workers 8
    --group_by_length True
    --output_dir outputs-pt-qwen2.5-3b --overwrite_output_dir
    --ddp_timeout 30000 --logging_first_step True
    --target_modules all --lora_rank 16 --lora_alpha 32 --lora_dropout 0.05
    --torch_dtype bfloat16 --bf16 --device_map auto
    --report_to tensorboard --ddp_find_unused_parameters False
    --gradient_checkpointing True --cache_dir ./cache
"""
GUIDE_SFT = """
    --model_name_or_path Qwen/Qwen2.5-3B-Instruct
    --train_file_dir ./data/finetune --validation_file_dir ./data/finetune
    --per_device_train_batch_size 2 --per_device_eval_batch_size 2
    --do_train --do_eval --template_name qwen --use_peft True
    --max_train_samples 10000 --max_eval_samples 100 --model_max_length 2048
    --num_train_epochs 3 --learning_rate 2e-5 --warmup_ratio 0.05 --weight_decay 0.05
    --logging_strategy steps --logging_steps 10
    --eval_steps 100 --eval_strategy steps
    --save_steps 500 --save_strategy steps --save_total_limit 3
    --gradient_accumulation_steps 16 --preprocessing_num_workers 8
    --output_dir outputs-sft-qwen2.5-3b --overwrite_output_dir
    --ddp_timeout 30000 --logging_first_step True
    --target_modules all --lora_rank 16 --lora_alpha 32 --lora_dropout 0.05
    --torch_dtype bfloat16 --bf16 --device_map auto
    --report_to tensorboard --ddp_find_unused_parameters False
    --gradient_checkpointing True --cache_dir ./cache
"""
GUIDE_RM = """
    --model_name_or_path outputs-sft-qwen2.5-3b/checkpoint-best
    --train_file_dir ./data/reward --validation_file_dir ./data/reward
    --per_device_train_batch_size 2 --gradient_accumulation_steps 8 --per_device_eval_batch_size 2
    --do_train --do_eval --use_peft True --seed 42
    --max_train_samples 5000 --max_eval_samples 100
    --num_train_epochs 2 --learning_rate 2e-5 --warmup_ratio 0.05 --weight_decay 0.001
    --logging_strategy steps --logging_steps 10 --eval_steps 100 --eval_strategy steps
    --save_steps 500 --save_strategy steps --save_total_limit 2
    --output_dir outputs-rm-qwen2.5-3b --overwrite_output_dir
    --ddp_timeout 30000 --logging_first_step True
    --target_modules all --lora_rank 16 --lora_alpha 32 --lora_dropout 0.05
    --bf16 --torch_dtype bfloat16 --device_map auto --report_to tensorboard
    --ddp_find_unused_parameters False --remove_unused_columns False
    --gradient_checkpointing True --cache_dir ./cache
"""
GUIDE_DPO = """
    --model_name_or_path outputs-sft-qwen2.5-3b/checkpoint-best --template_name qwen
    --train_file_dir ./data/reward --validation_file_dir ./data/reward
    --per_device_train_batch_size 2 --gradient_accumulation_steps 16 --per_device_eval_batch_size 1
    --do_train --do_eval --use_peft True
    --max_train_samples 5000 --max_eval_samples 100
    --max_steps 2000 --eval_steps 100 --save_steps 500
    --learning_rate 5e-6
    --output_dir outputs-dpo-qwen2.5-3b
    --target_modules all --lora_rank 16 --lora_alpha 32 --lora_dropout 0.05
    --torch_dtype bfloat16 --bf16 True --fp16 False --device_map auto
    --report_to tensorboard --remove_unused_columns False
    --gradient_checkpointing True --cache_dir ./cache
"""
GUIDE_PPO = """
    --model_name_or_path outputs-sft-qwen2.5-3b/checkpoint-best --template_name qwen
    --torch_dtype bfloat16 --train_file_dir ./data/finetune --validation_file_dir ./data/finetune
    --per_device_train_batch_size 1 --gradient_accumulation_steps 8 --gradient_checkpointing True
    --do_train --output_dir outputs-ppo-qwen2.5-3b
    --eval_strategy steps --eval_steps 100 --num_train_epochs 1
    --report_to tensorboard --cache_dir ./cache
"""
