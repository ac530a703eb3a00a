"""Flags of older libraries and versions, and what each means now."""

# Flags that the current libraries renamed: the new name takes the same value.
RENAMED = {
    "--evaluation_strategy": "--eval_strategy",
    "--no_cuda": "--use_cpu",
    "--per_gpu_train_batch_size": "--per_device_train_batch_size",
    "--per_gpu_eval_batch_size": "--per_device_eval_batch_size",
    "--warmup_ratio": "--warmup_steps",  # below 1 it is a share of the steps
    "--dtype": "--torch_dtype",
    "--dataset_num_proc": "--preprocessing_num_workers",
}
# Flags whose effect is settled here; the value that means something else is refused.
FIXED_FLAGS = {
    "--save_safetensors": (True, "weights are always written as safetensors"),
    "--use_fast_tokenizer": (True, "the tokenizer is always the fast one"),
    "--push_to_hub": (False, "nothing is uploaded"),
    "--auto_find_batch_size": (
        False,
        "it was removed; the batch stays that of --per_device_train_batch_size, and out of memory a run names remedies",
    ),
}
# Flags of older versions, and what to do now.
REMOVED = {
    "--f_divergence_type": "the reverse KL is always taken; leave it out",
    "--f_alpha_divergence_coef": "the reverse KL is always taken; leave it out",
    "--ld_alpha": "--loss_type simpo takes the length out of the comparison",
    "--use_weighting": "leave it out",
    "--discopop_tau": "its loss is gone too; leave it out",
    "--activation_offloading": "--gradient_checkpointing True saves that memory",
}
# Values in the guide's commands that are always in force in a stage without the flag.
ALWAYS_SO = {
    "--fp16": "False",
    "--logging_strategy": "steps",
    "--ddp_find_unused_parameters": "False",
    "--remove_unused_columns": "False",
}
