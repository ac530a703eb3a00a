"""Group relative policy optimization: raise rewards of a model's own replies, each held against others to its prompt.

Input: exam questions, or dialogues as in SFT, as prompts; a base model or the SFT model; rewards that check a reply
(`--rewards`: medtune/rl/rewards.py), a reward model among them where wanted. There is no value model.
Output: `--output_dir` with checkpoint-N, checkpoint-best (the policy's LoRA adapter, relative to the base model),
train_results.json, eval_results.json, trainer_state.json, curves.png and TensorBoard events in runs/.
Loss: with r_t = pi(o_t) / pi_old(o_t), of each token of a reply with advantage A

    -min(r_t A, clip(r_t, 1 - epsilon, 1 + epsilon_high) A) + beta KL(pi || pi_ref)

after Shao et al. 2024 (https://arxiv.org/abs/2402.03300, equation 3). `--loss_type` says how tokens become one number:
each token alike (dapo: Yu et al. 2025, https://arxiv.org/abs/2503.14476), each reply alike (grpo), over a constant
(dr_grpo: Liu et al. 2025, https://arxiv.org/abs/2503.20783), or each reply with one ratio (gspo: Zheng et al. 2025,
https://arxiv.org/abs/2507.18071). medtune/rl/grpo_math.py holds them, docs/grpo.md the details.

    for each update:
        sample a group of G replies to each of a batch of prompts
        rewards r_1..G of a group; advantages A_i = (r_i - mean(r_1..G)) / std(r_1..G)
        leave out groups whose rewards are all equal
        log-probs of the replies' tokens under the policy as it is, pi_old, and under the reference where beta > 0
        for each of --num_iterations:
            a step on the loss, averaged over the tokens of all replies

    CUDA_VISIBLE_DEVICES=0 python grpo_training.py --sft_model_path outputs-sft-.../checkpoint-best \\
        --rewards exam:1 format:0.2 ...
    CUDA_VISIBLE_DEVICES=0,1 torchrun --nproc_per_node 2 grpo_training.py ...

Launcher: run_grpo.sh.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import medtune.libraries  # noqa: F401 - first: it imports the libraries in half of their time

# isort: split
import torch
import torch.nn.functional as F
from accelerate.utils import gather_object
from datasets import Dataset
from loguru import logger
from transformers import TrainingArguments

from medtune.arguments import DataArguments, LoraArguments, StageArgumentParser
from medtune.errors import UserError, run_script
from medtune.models.lineage import check_model_path
from medtune.models.loading import load_tokenizer
from medtune.models.model_folder import lineage_of
from medtune.models.vocabulary import check_vocabulary
from medtune.reading.encoders import PromptEncoder
from medtune.reading.exams import ExamFormat
from medtune.reading.tokenization import load_chat_template
from medtune.rl.alarms import count_in_a_row, find_group_alarm, find_update_alarm, find_warnings
from medtune.rl.arguments import (
    GRPOArguments,
    GRPORewardArguments,
    RLModelArguments,
    RLRunArguments,
    RLTrainingArguments,
    check_combination,
    check_groups,
    fixed_settings,
)
from medtune.rl.exam_scores import chosen_by_exam, exam_scores, mean_scores
from medtune.rl.grpo_math import LOSS_TYPES, Whole, fill_missing, group_advantages, has_signal, surrogate_losses
from medtune.rl.log import grpo_figures
from medtune.rl.measures import GroupMeasures, TokenMeans, summarize_groups
from medtune.rl.off_policy import check_sampler, sampler_weights
from medtune.rl.ppo_math import episode_order, k3
from medtune.rl.prompts import prepare_prompts
from medtune.rl.reward_texts import load_reward_texts
from medtune.rl.rewards import load_rewards, reward_settings
from medtune.rl.roles import load_roles
from medtune.rl.rollout import PolicyReplies, Replies, Sampling, Scorer, add_logps, choose_sampling, collect_replies
from medtune.rl.run import (
    Run,
    State,
    count_episodes,
    count_updates,
    is_done,
    resumed_state,
    settle_layout,
    start_accelerator,
)
from medtune.rl.vllm_servers import connect_servers
from medtune.training.interruption import SignalListener
from medtune.training.log import log_block
from medtune.training.precision import CPU_BF16, base_dtype, cpu_bf16_of
from medtune.training.processes import largest_of_processes
from medtune.training.run import start_run
from medtune.training.template_choice import choose_thinking

# ---------------------------------------------------------------- groups


@dataclass
class Groups:
    """The groups of replies of an update.

    replies: those of this process, with their [N] advantages; learns: [N] bool, True in a group with a signal.
    measures, metrics: of all replies of all processes.
    """

    replies: PolicyReplies
    advantages: torch.Tensor
    learns: torch.Tensor
    measures: GroupMeasures
    metrics: dict[str, float]


def collect_groups(
    run: Run,
    prompts: Dataset,
    order: Sequence[int],
    grpo_args: GRPOArguments,
    sampling: Sampling,
    scorer: Scorer,
    stop: SignalListener,
) -> Groups:
    """Sample the groups of an update, reward their replies, and compare each with its group.

    order: the prompt of each group. With --redraw_groups further prompts stand in for groups without a signal.
    """
    accelerator, roles, size = run.accelerator, run.roles, grpo_args.num_generations
    drawn, missing = run.state.groups_drawn, run.per_update // size
    parts, measured = [], []
    for _ in range(1 + grpo_args.redraw_groups):
        episodes = list(run.own_part(range(drawn * size, (drawn + missing) * size)))
        rows = [prompts[order[episode // size]] for episode in episodes]
        with accelerator.autocast():
            replies = collect_replies(roles, rows, episodes, sampling, stop)
            rewards = scorer.score(roles, rows, replies, stop)
            parts.append(add_logps(roles, rows, replies, sampling, stop))
        measured.append(GroupMeasures.interleave(gather_object([GroupMeasures.of(parts[-1], rewards)])))
        drawn += missing
        filled = fill_missing(measured[-1].rewards, size)
        missing -= int(has_signal(scorer.rewards.total(filled), size).sum()) // size
        if missing == 0:
            break
    run.state.groups_drawn = drawn
    replies, measures = PolicyReplies.join(parts), GroupMeasures.join(measured)
    # What the judge could not judge has no reward: it is no reply to learn from, and moves no other's advantage.
    is_judged = ~measures.rewards.isnan().any(dim=1)
    measures.rewards = fill_missing(measures.rewards, size)
    totals = scorer.rewards.total(measures.rewards)
    learns = has_signal(totals, size) & is_judged
    advantages = group_advantages(totals, size, scale=grpo_args.scale_rewards == "group").float()
    metrics = summarize_groups(measures, totals, learns, scorer.rewards.names, roles.has_reference)
    if scorer.rewards.judge is not None:
        metrics["reply/unjudged_frac"] = 1 - is_judged.double().mean().item()
    advantages, learns = (run.own_part(of_all).to(replies.ids.device) for of_all in (advantages, learns))
    return Groups(replies, advantages, learns, measures, metrics)


# ---------------------------------------------------------------- update


def grpo_update(run: Run, groups: Groups, grpo_args: GRPOArguments) -> dict[str, float]:
    """Run the optimizer steps on the groups of an update; returns means over its tokens, over all processes.

    Raises UserError if a loss or gradient is not finite, or a matrix of the policy's adapter gets no gradient.
    """
    roles, policy, replies, temperature = run.roles, run.learners["policy"], groups.replies, grpo_args.temperature
    log_ratios_of, average = LOSS_TYPES[grpo_args.loss_type]
    sum_over_processes = partial(run.accelerator.reduce, reduction="sum")
    learns = groups.learns & replies.ended if grpo_args.mask_truncated_completions else groups.learns
    counts = torch.stack([learns.sum(), replies.mask[learns].sum()]).double()
    whole = Whole(*sum_over_processes(counts).tolist(), grpo_args.response_length)
    if whole.n_replies == 0:
        policy.skip()
        return dict.fromkeys(("policy/loss", "policy/clip_frac", "policy/approx_kl", "policy/grad_norm"), 0.0)
    micro_batches = split_evenly(replies, learns, run.training_args, by_prompt=roles.padding_free)
    measured, total_loss, norms = TokenMeans(sum_over_processes), torch.zeros((), device=replies.ids.device), []
    for iteration in range(1, grpo_args.num_iterations + 1):
        for rows, counted in micro_batches:
            part = replies.take(rows)
            text, mask = (part.ids, part.attention_mask, part.mask), part.mask & counted[:, None]
            logps, *_ = policy.forward(roles.logps, "policy", *text, temperature)
            log_ratios, advantages = log_ratios_of(logps, part.policy_logps, mask), groups.advantages[rows]
            losses, clipped = surrogate_losses(log_ratios, advantages, grpo_args.epsilon, grpo_args.epsilon_high)
            losses = losses * sampler_weights(part, grpo_args.vllm_is_cap)
            if part.ref_logps is not None:
                losses = losses + grpo_args.beta * k3(logps, part.ref_logps)
            loss = average(losses, mask, whole)
            policy.backward(loss)
            total_loss += loss.detach()
            measured.add(mask, {"policy/clip_frac": clipped, "policy/ratio": log_ratios.exp()})
        means = measured.means() | {"policy/loss": sum_over_processes(total_loss).item() / iteration}
        norms.append(run.step(means, has_gradients=bool(learns.any()))["policy"])
    policy.scheduler.step()
    # How far the update moved the policy, on the longest replies: another pass through all would cost as much as a
    # fourth of the update.
    rows, counted = micro_batches[0]
    part, moved = replies.take(rows), TokenMeans(sum_over_processes)
    with torch.no_grad(), run.accelerator.autocast():
        logps, *_ = roles.logps("policy", part.ids, part.attention_mask, part.mask, temperature)
    moved.add(part.mask & counted[:, None], {"policy/approx_kl": k3(part.policy_logps, logps)})
    return means | moved.means() | {"policy/grad_norm": sum(norms) / len(norms)}


def split_evenly(
    replies: Replies, learns: torch.Tensor, training_args: TrainingArguments, by_prompt: bool
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Micro-batches of the replies to learn from, the longest first: indices of rows, and whether each counts.

    All processes have as many, as ZeRO asks: one with fewer replies repeats a row that does not count.

    by_prompt: replies to one prompt stay together, since joined rows pass it once; otherwise like lengths, which waste
        little padding.
    """
    rows = learns.nonzero().flatten()
    lengths = replies.attention_mask[rows].sum(dim=1)
    if by_prompt:
        _, prompt = replies.ids[rows, : replies.n_prompt].unique(dim=0, return_inverse=True)
        longest = torch.zeros_like(lengths).scatter_reduce(0, prompt, lengths, "amax")
        lengths = longest[prompt] * len(rows) + prompt
    rows = rows[lengths.argsort(descending=True, stable=True)]
    n_filling = largest_of_processes(len(rows), training_args) - len(rows)
    counts = F.pad(torch.ones_like(rows, dtype=torch.bool), (0, n_filling))
    batch_size = training_args.per_device_train_batch_size
    return list(zip(F.pad(rows, (0, n_filling)).split(batch_size), counts.split(batch_size), strict=True))


# ---------------------------------------------------------------- evaluation


def evaluate(
    run: Run, rows: Sequence[dict], sampling: Sampling, scorer: Scorer, exam_format: ExamFormat, stop: SignalListener
) -> dict[str, float]:
    """Measures of greedy replies to held-out prompts; before and after training the first replies go into the log."""
    own, padded = run.own_rows(rows)
    with run.accelerator.autocast():
        replies = collect_replies(run.roles, padded, None, sampling, stop)
        rewards = scorer.score(run.roles, padded, replies, stop)
    run.show_replies(own, replies.reply_ids())
    read = scorer.read(padded, replies)[: len(own)]
    rewards = rewards[: len(own)].tolist()
    figures = []
    for reply, of_reply in zip(read, rewards, strict=True):
        measured = {"reward": scorer.rewards.total(torch.tensor([of_reply])).item()}
        measured |= {f"reward_{name}": value for name, value in zip(scorer.rewards.names, of_reply, strict=True)}
        measured |= {"mean_len": float(reply.n_tokens), "eos_frac": float(reply.ended)}
        judged = {name: value for name, value in measured.items() if not math.isnan(value)}
        figures.append(judged | exam_scores(reply, exam_format))
    return {f"eval_{name}": mean for name, mean in mean_scores(gather_object(figures), exam_format).items()}


# ---------------------------------------------------------------- the loop


def train_grpo(
    run: Run,
    prompts: Dataset,
    eval_rows: Sequence[dict],
    grpo_args: GRPOArguments,
    sampling: Sampling,
    scorer: Scorer,
    exam_format: ExamFormat,
) -> None:
    """Run the remaining updates: collect, check, update, record, evaluate, save.

    Exits with 128 + signal number when a signal stopped the run after its checkpoint was saved.
    """
    state, n_groups = run.state, run.per_update // grpo_args.num_generations
    n_groups_at_most = run.n_updates * n_groups * (1 + grpo_args.redraw_groups)
    order = episode_order(len(prompts), n_groups_at_most, sampling.seed)
    with run.guarded(sampling.batch_size) as stop:
        measure = partial(evaluate, run, eval_rows, sampling, scorer, exam_format, stop)
        if eval_rows and run.evaluation_is_due():
            run.record_evaluation(measure())
        for update in range(state.global_step, run.n_updates):
            started = time.monotonic()
            # Collect.
            groups = collect_groups(run, prompts, order, grpo_args, sampling, scorer, stop)
            metrics = groups.metrics | {"learning_rate": run.learning_rate()}

            # Alarm.
            metrics |= check_sampler(run.accelerator, run.roles, groups.replies, grpo_args)
            count_in_a_row(state.streaks, state.start, metrics)
            if alarm := find_group_alarm(groups.measures, metrics, grpo_args.stop_at_kl, state.streaks, n_groups):
                raise UserError(f"update {update + 1}: {alarm}")
            for warning in find_warnings(metrics, state.streaks, state.start):
                logger.warning(f"update {update + 1}: {warning}")

            # Update. From here on the weights change: a signal waits for the end of the update.
            metrics |= grpo_update(run, groups, grpo_args)
            if alarm := find_update_alarm(metrics, grpo_args.stop_at_kl):
                raise UserError(f"update {update + 1}: {alarm}")

            # Record, evaluate, save.
            seconds = time.monotonic() - started
            metrics |= {"tokens_per_second": groups.measures.n_tokens.sum().item() / seconds}
            run.record_update(metrics, seconds)
            if eval_rows and run.evaluation_is_due():
                run.record_evaluation(measure())
            if run.save_is_due():
                run.save()
        if not eval_rows:
            run.keep_best({})
        if scorer.rewards.judge is not None:
            scorer.rewards.judge.log_usage()
        run.save()


# ---------------------------------------------------------------- facts


def describe_run(
    run: Run, grpo_args: GRPOArguments, sampling: Sampling, scorer: Scorer, n_prompts: int
) -> dict[str, str]:
    """The facts to log of sampling, rewards and batch arithmetic."""
    size, weight_by_name = grpo_args.num_generations, scorer.rewards.weight_by_name
    facts = {"rewards": " + ".join(f"{weight:g} x {name}" for name, weight in weight_by_name.items())}
    if scorer.reward_texts is not None and scorer.reward_texts.reward_tokenizer is not None:
        facts["reward texts"] = "the reward model reads replies again in its own tokens and template"
    facts["batch"] = f"{run.batch} replies an update, {run.per_update // size} groups of {size}"
    facts["loss"] = f"{grpo_args.loss_type}, {grpo_args.num_iterations} step(s) an update" + (
        f", {grpo_args.beta:g} x KL from the start" if grpo_args.beta else ", no KL and no reference"
    )
    facts["updates"] = f"{run.n_updates} ({run.n_updates * run.per_update} replies, {n_prompts} prompts)"
    return run.describe(grpo_args, sampling, facts)


# ---------------------------------------------------------------- main


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    # ------------------------------------------------------------ arguments
    groups_of_flags = [RLModelArguments, DataArguments, LoraArguments, RLRunArguments]
    parser = StageArgumentParser([*groups_of_flags, GRPORewardArguments, GRPOArguments, RLTrainingArguments])
    model_args, data_args, lora_args, run_args, reward_args, grpo_args, training_flags = parser.parse(argv)
    training_args = training_flags.training_arguments()
    sft, rm, hub_options = model_args.sft_model_path, reward_args.reward_model_path, model_args.hub_options
    check_model_path(sft, "--sft_model_path", model_args.allow_pickle_weights)
    if rm is not None:
        check_model_path(rm, "--reward_model_path", model_args.allow_pickle_weights)
    check_combination(lora_args, grpo_args, training_args)
    per_update = count_episodes(training_args)
    check_groups(grpo_args, training_args, training_args.world_size)
    rewards = load_rewards(reward_args, grpo_args.response_length)

    # ------------------------------------------------------------ run
    checkpoint = start_run("group relative policy optimization", training_args, run_args, parser.notes)
    model_args.torch_dtype = base_dtype(model_args, lora_args, training_args, parser.given, checkpoint)
    accelerator = start_accelerator("grpo", training_args, run_args.logging_dir)

    # ------------------------------------------------------------ tokenizer and template
    tokenizer = load_tokenizer(sft, model_args.tokenizer_name_or_path, flag="--sft_model_path", **hub_options)
    chat_template = load_chat_template(tokenizer, grpo_args.template_name, choose_thinking(grpo_args, sft, checkpoint))
    sampling = choose_sampling(grpo_args, tokenizer, chat_template, training_args.seed)
    folder_options = hub_options | {"allow_pickle_weights": model_args.allow_pickle_weights}
    reward_texts = rm and load_reward_texts(tokenizer, chat_template, sampling.stop_ids, rm, **folder_options)
    scorer = Scorer(tokenizer, rewards, reward_texts, sampling.batch_size)

    # ------------------------------------------------------------ data
    form = {"exam_format": reward_args.exam_format, "needed_keys": rewards.needed_keys}
    encoder = PromptEncoder(tokenizer, chat_template, grpo_args.max_source_length, grpo_args.truncation, **form)
    data = prepare_prompts(encoder, data_args, training_args, model_args.cache_dir)
    rewards.rehearse(data.train)
    n_prompts = len(data.train)
    n_replies = n_prompts * grpo_args.num_generations
    n_updates = count_updates(n_replies, per_update, grpo_args.total_episodes, training_args)

    # ------------------------------------------------------------ what a resumed run goes on with
    record = {"stage": "grpo", "template": grpo_args.template_name, "thinking": chat_template.thinking}
    lineage = lineage_of(model_args, data_args, **record, flags=parser.given, flag="--sft_model_path")
    kept = ("num_generations", "loss_type", "beta")
    own = reward_settings(reward_args, **hub_options) | {f"--{name}": getattr(grpo_args, name) for name in kept}
    settings = fixed_settings("grpo", model_args, training_args, grpo_args, per_update, n_prompts, own)
    begins = {CPU_BF16: cpu_bf16_of(training_args, model_args.torch_dtype == "bfloat16")}
    state = resumed_state(checkpoint, settings) if checkpoint else State(settings | begins)
    if checkpoint and is_done(state, lineage, checkpoint, n_updates):
        return {}

    # ------------------------------------------------------------ model
    servers = connect_servers(grpo_args, sft, lora_args, sampling.stop_ids, training_args, **hub_options)
    sampling = replace(sampling, servers=servers)
    roles, facts = load_roles(
        sft, rm, lora_args, accelerator.device, with_reference=grpo_args.beta > 0, with_value=False,
        checkpoint=checkpoint, **model_args.loading_options,
    )  # fmt: skip
    check_vocabulary(tokenizer, roles.model)
    with accelerator.autocast():
        settle_layout(roles, state, data.train, grpo_args, sft, resumed=bool(checkpoint))
    if training_args.gradient_checkpointing:
        roles.enable_checkpointing(training_args.gradient_checkpointing_kwargs)

    # ------------------------------------------------------------ train
    shown = grpo_figures(rewards.names, chosen_by_exam(data.eval, rewards, reward_args.exam_format))
    run = Run(training_args, accelerator, roles, state, tokenizer, lineage, n_updates, per_update, shown)
    if checkpoint:
        run.load(checkpoint)
    log_block(facts | data.facts | describe_run(run, grpo_args, sampling, scorer, n_prompts))
    train_grpo(run, data.train, data.eval, grpo_args, sampling, scorer, reward_args.exam_format)

    # ------------------------------------------------------------ save and evaluate
    return run.finish()


if __name__ == "__main__":
    run_script(main)
