"""Changes of a command that make its run smaller, the mildest first, as the advice for a full memory names them."""

import math

from medtune.estimate.plan import RunPlan


def remedies(plan: RunPlan, longest: int) -> list[list[str]]:
    """Flags to add to the command: each list holds the one before it and goes a step further.

    longest: tokens of the longest row.
    """
    steps, args, own = [], plan.training_args, plan.own_args
    if plan.is_rl:
        steps += [["--rollout_batch_size", str(size)] for size in _halves(own.rollout_batch_size)]
    batch, accumulation = args.per_device_train_batch_size, args.gradient_accumulation_steps
    for size in _halves(batch):
        accumulated = str(math.ceil(accumulation * batch / size))
        steps.append(["--per_device_train_batch_size", str(size), "--gradient_accumulation_steps", accumulated])
    if not plan.is_rl and args.do_eval and args.per_device_eval_batch_size > 1:
        steps.append(["--per_device_eval_batch_size", "1"])
    if not plan.checkpointing:
        steps.append(["--gradient_checkpointing", "True"])
    if not plan.lora_args.use_peft:
        steps.append(["--use_peft", "True"])
    if plan.teacher_place and plan.teacher_args.teacher_bits > 4:
        steps.append(["--teacher_bits", "4"])
    if plan.bits > 4 and plan.zero_stage < 3:
        steps.append([*(["--load_in_8bit", "False"] if plan.bits == 8 else []), "--load_in_4bit", "True"])
    limit = {"pt": "block_size", "sft": "model_max_length"}.get(plan.stage)
    if limit and getattr(own, limit) > 1:
        steps.append([f"--{limit}", str(min(longest, getattr(own, limit)) // 2)])
    elif not limit:
        names = ("max_source_length", "response_length" if plan.is_rl else "max_target_length")
        steps.append([word for name in names for word in (f"--{name}", str(getattr(own, name) // 2))])
    lists: list[list[str]] = []
    for step in steps:
        lists.append([*(lists[-1] if lists else []), *step])
    return [_last_values(words) for words in lists]


def _halves(number: int) -> list[int]:
    return [number // 2**power for power in range(1, number.bit_length())]


def _last_values(words: list[str]) -> list[str]:
    """Each flag once, with its last value."""
    values = dict(zip(words[::2], words[1::2], strict=True))
    return [word for pair in values.items() for word in pair]
