"""How long a run takes on a card, from the operations of its steps, and what it leaves on the disk."""

import math
from dataclasses import dataclass

import numpy as np

from medtune.estimate.cards import Card
from medtune.estimate.memory import Memory
from medtune.estimate.meter import Work
from medtune.estimate.plan import RunPlan
from medtune.estimate.role_moments import TEACHERS_PASS
from medtune.estimate.rows import RunRows, count_tokens, lengths_of_rows, padded_tokens
from medtune.estimate.shapes import Shape
from medtune.models.text_attention import Layout
from medtune.rl.run import count_updates

# Shares of a card's own figures that training reaches: the best case and the worst.
UTILISATION = (0.5, 0.25)
BANDWIDTH = (0.7, 0.4)
# Seconds that starting an operation takes, and of a run before its first step.
LAUNCH = (6e-6, 14e-6)
START = (60.0, 240.0)
# Of --response_length, what the longest reply of a batch has.
REPLIES = (0.5, 1.0)
# Replies that a server of vLLM 0.32 writes at a time.
SERVED_AT_ONCE = 256
# Bytes a second that a disk writes.
DISK = (1e9, 2e8)


@dataclass
class Hours:
    """Seconds of each phase in the best case and in the worst; steps (or updates), and tokens trained on."""

    phases: dict[str, tuple[float, float]]
    n_steps: int
    n_tokens: float

    @property
    def total(self) -> tuple[float, float]:
        low, high = (sum(seconds[case] for seconds in self.phases.values()) / 3600 for case in (0, 1))
        return low, high


def estimate_hours(plan: RunPlan, memory: Memory, rows: RunRows, card: Card) -> Hours:
    cases = [_Case(card, plan, case) for case in (0, 1)]
    phases_of = _rl_phases if plan.is_rl else _trainer_phases
    n_steps, n_tokens = count_steps_and_tokens(plan, rows, memory.layout)
    best, worst = (phases_of(plan, memory, rows, case, n_steps) for case in cases)
    phases = {name: (best[name], worst[name]) for name in best}
    saving = count_saves(plan, rows, n_steps) * sum(checkpoint_bytes(plan, memory))
    phases |= {"saving": (saving / DISK[0], saving / DISK[1])}
    return Hours({"start": START} | phases, n_steps, n_tokens)


@dataclass
class _Case:
    card: Card
    plan: RunPlan
    index: int

    def seconds(self, work: Work, tokens: float = 1.0, pairs: float = 1.0, batches: float = 1.0) -> float:
        """Of so many batches: products repeated `tokens` times, attention `pairs` times."""
        operations = work.products * tokens + work.attention * pairs
        rate = self.card.tflops * 1e12 * UTILISATION[self.index]
        return max(operations / rate, work.n_operations * LAUNCH[self.index] * batches)

    def served(self, work: Work, times: float) -> float:
        """As `seconds`, with operations that are recorded and start at no cost, as vLLM's do."""
        return self.seconds(work, times, times, 0.0)

    def reading(self, n_bytes: float) -> float:
        return n_bytes / (self.card.gb_s * 1e9 * BANDWIDTH[self.index])


def count_steps_and_tokens(plan: RunPlan, rows: RunRows, layout: Layout) -> tuple[int, float]:
    """Optimizer steps, or updates with rollouts, and the tokens of their rows without padding."""
    args, n_rows, per_step = plan.training_args, len(rows.lengths), _rows_per_step(plan)
    if plan.is_rl:
        size = plan.own_args.num_generations if plan.stage == "grpo" else 1
        n_steps = count_updates(n_rows * size, per_step, plan.own_args.total_episodes, args)
        return n_steps, n_steps * per_step * (float(np.mean(rows.lengths)) + plan.own_args.response_length / 2)
    n_steps = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * _steps_per_epoch(plan, rows))
    return n_steps, n_steps * per_step * rows.tokens[layout] / n_rows


def _rows_per_step(plan: RunPlan) -> int:
    args = plan.training_args
    return args.per_device_train_batch_size * args.gradient_accumulation_steps * plan.n_gpus


def _steps_per_epoch(plan: RunPlan, rows: RunRows) -> int:
    return max(math.ceil(len(rows.lengths) / _rows_per_step(plan)), 1)


def _times(plan: RunPlan, rows: RunRows, strategy: object, every: float, n_steps: int) -> float:
    """How often something comes in a run, every so many steps, or by epochs."""
    name = str(getattr(strategy, "value", strategy))
    if name == "best":  # as often as there is an evaluation, at most
        return _times(plan, rows, plan.training_args.eval_strategy, _eval_steps(plan), n_steps)
    if name == "epoch":
        return n_steps / _steps_per_epoch(plan, rows)
    return n_steps / (every if every >= 1 else every * n_steps) if name == "steps" else 0.0


def _eval_steps(plan: RunPlan) -> float:
    return plan.training_args.eval_steps or plan.training_args.logging_steps


def count_evaluations(plan: RunPlan, rows: RunRows, n_steps: int) -> int:
    """With the last one."""
    return 1 + int(_times(plan, rows, plan.training_args.eval_strategy, _eval_steps(plan), n_steps))


def count_saves(plan: RunPlan, rows: RunRows, n_steps: int) -> int:
    """With the last one."""
    args = plan.training_args
    return max(math.ceil(_times(plan, rows, args.save_strategy, args.save_steps, n_steps)), 1)


# ---------------------------------------------------------------- PT, SFT, RM, DPO


def _trainer_phases(plan: RunPlan, memory: Memory, rows: RunRows, case: _Case, n_steps: int) -> dict[str, float]:
    args = plan.training_args
    work = _sum(memory, *memory.works.keys() & {"mismatched replies", "forward pass", "backward pass"})
    n_batches = n_steps * args.gradient_accumulation_steps
    of_rows = rows.longest, rows.lengths, rows.tokens
    share = _share_of_largest(plan, memory.layout, *of_rows, args.per_device_train_batch_size)
    tokens, pairs = (value * n_batches for value in share)
    phases = {"training": case.seconds(work, tokens, pairs, n_batches)}
    if rows.longest_eval:
        n_batches = math.ceil(len(rows.eval_lengths) / args.per_device_eval_batch_size / plan.n_gpus)
        of_rows = rows.longest_eval, rows.eval_lengths, rows.eval_tokens
        share = _share_of_largest(plan, memory.layout, *of_rows, args.per_device_eval_batch_size)
        seconds = case.seconds(memory.works["evaluation"], *(value * n_batches for value in share), n_batches)
        if plan.stage == "dpo":
            seconds += _generation(memory, plan, case, "samples", 256)
        phases["evaluation"] = seconds * count_evaluations(plan, rows, n_steps)
    return phases


def _share_of_largest(
    plan: RunPlan,
    layout: Layout,
    longest: list[dict],
    lengths: np.ndarray,
    tokens: dict[Layout, float],
    batch_size: int,
) -> tuple[float, float]:
    """Of an average batch, the tokens and the squares of the texts' lengths, as shares of the largest batch's."""
    largest = np.array([_length(row) for row in longest], dtype=float)
    if layout is Layout.PADDED:
        grouped = plan.training_args.train_sampling_strategy == "group_by_length"
        of_all = padded_tokens(lengths, batch_size, grouped)
        of_largest = largest.max() * len(largest), largest.max() ** 2 * len(largest)
    else:
        of_all = tokens[layout], float((lengths.astype(float) ** 2).sum())
        of_largest = count_tokens(lengths_of_rows(longest))[layout], float((largest**2).sum())
    n_batches = math.ceil(len(lengths) / batch_size)
    return of_all[0] / n_batches / of_largest[0], of_all[1] / n_batches / of_largest[1]


def _length(row: dict) -> int:
    if "input_ids" in row:
        return len(row["input_ids"])
    replies = [len(row[name]) for name in ("chosen_ids", "rejected_ids", "reply_ids", "mismatched_ids") if name in row]
    return len(row["prompt_ids"]) + max(replies)


# ---------------------------------------------------------------- PPO, GRPO, distillation


def _rl_phases(plan: RunPlan, memory: Memory, rows: RunRows, case: _Case, n_updates: int) -> dict[str, float]:
    args, own = plan.training_args, plan.own_args
    n_episodes = args.per_device_train_batch_size * args.gradient_accumulation_steps
    n_rollouts = math.ceil(n_episodes / own.rollout_batch_size)
    # Tokens of an average text as a share of the longest one.
    longest = max(len(row["prompt_ids"]) for row in rows.longest) + own.response_length
    share = (float(np.mean(rows.lengths)) + REPLIES[case.index] * own.response_length) / longest
    phases = {"replies": n_updates * _replies(memory, plan, case, n_episodes * plan.n_gpus)}
    scoring = case.seconds(memory.works["scoring"], share, share**2)
    phases["scoring"] = n_updates * n_rollouts * scoring
    of_teacher = 0.0
    if TEACHERS_PASS in memory.works:
        of_teacher = case.seconds(memory.works[TEACHERS_PASS], share, share**2)
        phases["teacher"] = n_updates * n_rollouts * of_teacher
    passes = getattr(own, {"ppo": "num_ppo_epochs", "grpo": "num_iterations"}.get(plan.stage, ""), 1)
    work = _sum(memory, *(name for name in memory.works if name.startswith("update")))
    n_batches = passes * args.gradient_accumulation_steps
    phases["update"] = n_updates * case.seconds(work, share * n_batches, share**2 * n_batches, n_batches)
    if rows.longest_eval:
        n_replies = len(rows.eval_lengths)
        n_batches = math.ceil(n_replies / own.rollout_batch_size / plan.n_gpus)
        if "evaluation" in memory.works:
            scoring = case.seconds(memory.works["evaluation"], share, share**2)
        one = _replies(memory, plan, case, n_replies) + n_batches * (scoring + of_teacher)
        phases["evaluation"] = one * (1 + count_evaluations(plan, rows, n_updates))
    return phases


def _replies(memory: Memory, plan: RunPlan, case: _Case, n_replies: int) -> float:
    """Seconds of so many replies, by all GPUs of training or by vLLM's servers."""
    n_tokens, size = math.ceil(REPLIES[case.index] * plan.own_args.response_length), plan.own_args.rollout_batch_size
    if not plan.servers.n:
        return math.ceil(n_replies / size / plan.n_gpus) * _generation(memory, plan, case, "rollout", n_tokens)
    n_each = math.ceil(n_replies / plan.servers.n)
    times = min(n_each, SERVED_AT_ONCE) / size
    cache = memory.served["rollout: last token"] / 2 * times
    token = case.served(memory.works["rollout: last token"], times)
    a_token = max(token, case.reading(memory.base * 16 / plan.bits + cache))
    one = case.served(memory.works["rollout: prompts"], times) + n_tokens * a_token
    return math.ceil(n_each / SERVED_AT_ONCE) * one


def _generation(memory: Memory, plan: RunPlan, case: _Case, name: str, n_tokens: int) -> float:
    """Seconds of a batch of replies: each token reads all weights once."""
    token = memory.works[f"{name}: last token"]
    a_token = max(case.seconds(token), case.reading(memory.base + memory.moments[f"{name}: last token"] / 2))
    return case.seconds(memory.works[f"{name}: prompts"]) + n_tokens * a_token


def _sum(memory: Memory, *names: str) -> Work:
    works = [memory.works[name] for name in names]
    return Work(*(sum(values) for values in zip(*(vars(work).values() for work in works), strict=True)))


# ---------------------------------------------------------------- disk


# Of run_all.sh, once for all stages.
HUB, MERGED = "model from the hub", "merged model"


def estimate_disk(plan: RunPlan, memory: Memory, rows: RunRows, shape: Shape, n_steps: int) -> dict[str, float]:
    """Bytes on the disk: the downloaded model, the checkpoints that are kept, and the merged model."""
    limit, n_saves = plan.training_args.save_total_limit, count_saves(plan, rows, n_steps)
    n_kept = min(n_saves, limit + 1) if limit else n_saves
    weights, states = checkpoint_bytes(plan, memory)
    checkpoints = f"checkpoint-best and {n_kept} checkpoint{'s' * (n_kept > 1)}"
    disk = {HUB: shape.download, checkpoints: weights + n_kept * (weights + states)}
    return disk | ({MERGED: 2.0 * shape.n_weights} if plan.lora_args.use_peft else {})


def checkpoint_bytes(plan: RunPlan, memory: Memory) -> tuple[float, float]:
    """Of a checkpoint's weights, and of its optimizer, which under DeepSpeed is whole on the disk alone."""
    weights = memory.base
    if plan.lora_args.use_peft:
        weights = memory.parts["adapters and heads"] * plan.n_split
    n_trained = weights / (4 if plan.lora_args.use_peft or plan.model_args.torch_dtype == "float32" else 2)
    return weights, 12 * n_trained if plan.zero_stage else memory.parts["optimizer"] * plan.n_split
