"""Proximal policy optimization: raise the scores of a model's own replies, held near where it started.

Input: dialogues as in SFT, whose user turns (with their history) are the prompts, or exam questions; the SFT model; the
reward model, or other `--rewards`.
Output: `--output_dir` with checkpoint-N, checkpoint-best (the policy's LoRA adapter, relative to the base model),
train_results.json, eval_results.json, trainer_state.json, curves.png and TensorBoard events in runs/.
Loss: the clipped surrogate of Schulman et al. 2017 (https://arxiv.org/abs/1707.06347) on token rewards made of the
score and of the KL from the start (Ziegler et al. 2019, https://arxiv.org/abs/1909.08593); details after Huang et al.
2024, "The N+ Implementation Details of RLHF with PPO" (https://arxiv.org/abs/2403.17031). docs/ppo.md lists them.

    for each update:
        sample a reply to each of a batch of prompts
        log-probs of its tokens under policy and reference, a value for each token, a score for the whole
        token rewards: -kl_coef x KL each, the score at the last one
        advantages and returns by GAE
        for each of --num_ppo_epochs, for each minibatch:
            a step on the clipped policy loss and the clipped value loss

Policy, reference, reward and value model are adapters on one base; medtune/rl/roles.py says which is trained.

    CUDA_VISIBLE_DEVICES=0 python ppo_training.py --sft_model_path outputs-sft-.../checkpoint-best \\
        --reward_model_path outputs-rm-.../checkpoint-best ...
    CUDA_VISIBLE_DEVICES=0,1 torchrun --nproc_per_node 2 ppo_training.py ...

Launcher: run_ppo.sh.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import medtune.libraries  # noqa: F401 - first: it imports the libraries in half of their time

# isort: split
import torch
from accelerate.utils import gather_object
from datasets import Dataset

from medtune.arguments import DataArguments, LoraArguments, StageArgumentParser
from medtune.errors import UserError, run_script
from medtune.models.lineage import check_model_path
from medtune.models.loading import load_tokenizer
from medtune.models.model_folder import lineage_of
from medtune.models.vocabulary import check_vocabulary
from medtune.reading.encoders import PromptEncoder
from medtune.reading.exams import ExamFormat
from medtune.reading.tokenization import load_chat_template
from medtune.rl.alarms import find_alarm, find_update_alarm
from medtune.rl.arguments import (
    PPOArguments,
    RewardArguments,
    RLModelArguments,
    RLRunArguments,
    RLTrainingArguments,
    check_combination,
    check_mini_batches,
    fixed_settings,
)
from medtune.rl.exam_scores import chosen_by_exam, exam_scores, mean_scores
from medtune.rl.log import ppo_figures
from medtune.rl.measures import EpisodeMeasures, TokenMeans, summarize
from medtune.rl.off_policy import check_sampler, sampler_weights
from medtune.rl.ppo_math import (
    SumOverProcesses,
    adapted_kl_coef,
    advantages_and_returns,
    episode_order,
    k3,
    masked_whiten,
    policy_losses,
    token_rewards,
    value_losses,
)
from medtune.rl.prompts import prepare_prompts
from medtune.rl.reward_texts import load_reward_texts
from medtune.rl.rewards import REWARD_MODEL, load_rewards, reward_settings
from medtune.rl.roles import load_roles
from medtune.rl.rollout import (
    Rollout,
    Sampling,
    Scorer,
    center_scores,
    choose_sampling,
    collect_rollout,
    without_unjudged,
)
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
from medtune.training.run import start_run
from medtune.training.template_choice import choose_thinking

# The dialogues' own replies whose mean score becomes the score 0.
CENTERING_REPLIES = 64

# ---------------------------------------------------------------- what to learn


@dataclass
class Targets:
    """The targets of an update: [N, T] whitened advantages and returns, 0 outside the mask.

    cliprange_value: how far a value may move from what it was.
    figures: the update's log figures that are known before its first step.
    """

    advantages: torch.Tensor
    returns: torch.Tensor
    cliprange_value: float
    figures: dict[str, float]


def compute_targets(
    rollout: Rollout, kl_coef: float, ppo_args: PPOArguments, sum_over_processes: SumOverProcesses
) -> Targets:
    """From scores and KL to token rewards, advantages and returns."""
    mask = rollout.mask
    kl = (rollout.policy_logps - rollout.ref_logps) * mask  # k1: its token-wise sum is the reply's log-ratio
    scores = rollout.scores - ppo_args.missing_eos_penalty * ~rollout.ended
    rewards = token_rewards(scores, kl, mask, kl_coef)
    if ppo_args.whiten_rewards:
        rewards = masked_whiten(rewards, mask, shift_mean=False, sum_over_processes=sum_over_processes)
    advantages, returns = advantages_and_returns(rewards, rollout.values, mask, ppo_args.gamma, ppo_args.lam)
    # Detail: whitened after the returns are made of them, over all replies of the update.
    advantages = masked_whiten(advantages, mask, sum_over_processes=sum_over_processes)
    moments, error = TokenMeans(sum_over_processes), returns - rollout.values
    moments.add(mask, {"return": returns, "return^2": returns**2, "error": error, "error^2": error**2, "kl": kl})
    means = moments.means()
    variance = means["return^2"] - means["return"] ** 2
    error_variance = means["error^2"] - means["error"] ** 2
    # Detail: the value's clip counts in standard deviations of the returns, or a reward model of large scores would
    # hold the value where it is.
    cliprange_value = ppo_args.cliprange_value * math.sqrt(max(variance, 0.0))
    figures = {
        "value/explained_var": 1 - error_variance / max(variance, 1e-12),
        "reply/non_score_reward": -kl_coef * means["kl"],
    }
    return Targets(advantages, returns, cliprange_value, figures)


# ---------------------------------------------------------------- update


def ppo_update(run: Run, rollout: Rollout, ppo_args: PPOArguments) -> dict[str, float]:
    """Run the epochs of optimizer steps on one rollout; returns means over its tokens, over all processes.

    Raises UserError if a loss or gradient is not finite, or a matrix of the policy's adapter gets no gradient.
    """
    roles, policy, value, update = run.roles, run.learners["policy"], run.learners["value"], run.state.global_step
    sum_over_processes = partial(run.accelerator.reduce, reduction="sum")
    targets = compute_targets(rollout, run.state.kl_coef, ppo_args, sum_over_processes)
    # Replies of one score and no KL, as rules may give at the start, have advantages of 0, and no gradient.
    has_signal = bool(sum_over_processes(targets.advantages.abs().sum()) > 0)
    measured = TokenMeans(sum_over_processes)
    norms = []
    for epoch in range(ppo_args.num_ppo_epochs):
        # Detail: one shuffle for all processes, from the seed and the place in the run.
        generator = torch.Generator().manual_seed(run.training_args.seed + 7919 * update + epoch)
        shuffled = torch.randperm(len(rollout.ids), generator=generator).to(rollout.ids.device)
        for minibatch in shuffled.chunk(ppo_args.num_mini_batches):
            # Every token of a minibatch counts the same, in whatever micro-batch and process it is.
            n_tokens = sum_over_processes(rollout.mask[minibatch].sum().double())
            for rows in minibatch.split(run.training_args.per_device_train_batch_size):
                part = rollout.take(rows)
                text, width = (part.ids, part.attention_mask, part.mask), part.mask.shape[1]
                advantages, returns = targets.advantages[rows, :width], targets.returns[rows, :width]
                logps, *_ = policy.forward(roles.logps, "policy", *text, ppo_args.temperature)
                losses, clipped = policy_losses(logps, part.policy_logps, advantages, ppo_args.cliprange)
                losses = losses * sampler_weights(part, ppo_args.vllm_is_cap)
                policy.backward((losses * part.mask).sum() / n_tokens)
                values = value.forward(roles.values, *text)
                errors, held = value_losses(values, part.values, returns, targets.cliprange_value)
                value.backward(ppo_args.vf_coef * (errors * part.mask).sum() / n_tokens)
                with torch.no_grad():
                    columns = {"policy/loss": losses, "policy/clip_frac": clipped}
                    columns["policy/approx_kl"] = k3(part.policy_logps, logps)
                    columns["policy/ratio"] = (logps - part.policy_logps).exp()
                    columns |= {"value/loss": errors, "value/clip_frac": held}
                    measured.add(part.mask, columns)
            norms.append(run.step(measured.means(), has_gradients=has_signal))
    for learner in run.learners.values():
        learner.scheduler.step()
    mean_norms = {f"{role}/grad_norm": sum(norm[role] for norm in norms) / len(norms) for role in run.learners}
    return measured.means() | mean_norms | targets.figures


# ---------------------------------------------------------------- evaluation


def evaluate(
    run: Run,
    rows: Sequence[dict],
    ppo_args: PPOArguments,
    sampling: Sampling,
    scorer: Scorer,
    exam_format: ExamFormat,
    stop: SignalListener,
) -> dict[str, float]:
    """Measures of greedy replies to held-out prompts; before and after training the first replies go into the log."""
    own, padded = run.own_rows(rows)
    with run.accelerator.autocast():
        rollout = collect_rollout(run.roles, padded, None, sampling, scorer, stop)
    measures = EpisodeMeasures.join(gather_object([EpisodeMeasures.of(rollout).first(len(own)).judged()]))
    run.show_replies(own, rollout.reply_ids())
    metrics = summarize(measures, scorer.rewards, ppo_args.kl_coef, ppo_args.missing_eos_penalty)
    names = {name: name.replace("reward/", "objective/reward_").partition("/")[2] for name in metrics}
    figures = {names[name]: figure for name, figure in metrics.items()}
    scores = [exam_scores(reply, exam_format) for reply in scorer.read(padded, rollout)[: len(own)]]
    figures |= mean_scores(gather_object(scores), exam_format)
    return {f"eval_{name}": figure for name, figure in figures.items()}


# ---------------------------------------------------------------- the loop


def train_ppo(
    run: Run,
    prompts: Dataset,
    eval_rows: Sequence[dict],
    ppo_args: PPOArguments,
    sampling: Sampling,
    scorer: Scorer,
    exam_format: ExamFormat,
) -> None:
    """Run the remaining updates: collect, check, update, record, evaluate, save.

    Exits with 128 + signal number when a signal stopped the run after its checkpoint was saved.
    """
    state, accelerator, per_update = run.state, run.accelerator, run.per_update
    order = episode_order(len(prompts), run.n_updates * per_update, sampling.seed)
    with run.guarded(sampling.batch_size) as stop:
        measure = partial(evaluate, run, eval_rows, ppo_args, sampling, scorer, exam_format, stop)
        if eval_rows and run.evaluation_is_due():
            run.record_evaluation(measure())
        for update in range(state.global_step, run.n_updates):
            started = time.monotonic()
            # Collect.
            episodes = list(run.own_part(range(update * per_update, (update + 1) * per_update)))
            rows = [prompts[order[episode]] for episode in episodes]
            with accelerator.autocast():
                rollout = collect_rollout(run.roles, rows, episodes, sampling, scorer, stop)
            if scorer.rewards.judge is not None:
                rollout = without_unjudged(rollout)
            measures = EpisodeMeasures.join(gather_object([EpisodeMeasures.of(rollout)]))

            # Alarm.
            of_sampler = check_sampler(accelerator, run.roles, rollout, ppo_args)
            state.updates_without_end = 0 if measures.ended.any() else state.updates_without_end + 1
            has_signal = measures.scores.std(correction=0) > 1e-6
            state.streaks["no signal"] = 0 if has_signal else state.streaks.get("no signal", 0) + 1
            never_had_one = state.streaks["no signal"] == update + 1
            without = state.updates_without_end, update + 1 if never_had_one else 0
            if alarm := find_alarm(measures, scorer.rewards, ppo_args.stop_at_kl, *without):
                raise UserError(f"update {update + 1}: {alarm}")

            # Update. From here on the weights change: a signal waits for the end of the update.
            metrics = summarize(measures, scorer.rewards, state.kl_coef, ppo_args.missing_eos_penalty)
            metrics |= {"objective/kl_coef": state.kl_coef, "learning_rate": run.learning_rate()} | of_sampler
            metrics |= ppo_update(run, rollout, ppo_args)
            if alarm := find_update_alarm(metrics):
                raise UserError(f"update {update + 1}: {alarm}")
            if ppo_args.adaptive_kl:
                state.kl_coef = adapted_kl_coef(
                    state.kl_coef, metrics["objective/kl"], ppo_args.target_kl, per_update, ppo_args.kl_horizon
                )

            # Record, evaluate, save.
            run.record_update(metrics, time.monotonic() - started)
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
    run: Run, ppo_args: PPOArguments, sampling: Sampling, scorer: Scorer, n_prompts: int
) -> dict[str, str]:
    """The facts to log of sampling, scores and batch arithmetic."""
    rewards, reward_texts, shift = scorer.rewards, scorer.reward_texts, run.state.score_shift
    facts = {}
    if reward_texts is not None and reward_texts.reward_tokenizer is not None:
        facts["reward texts"] = "the reward model reads replies again in its own tokens and template"
    facts["rewards"] = " + ".join(f"{weight:g} x {name}" for name, weight in rewards.weight_by_name.items())
    if rewards.has_model:
        facts["scores"] = "as the reward model gives them, since the prompts have no replies to centre them by"
    if shift:
        facts["scores"] = f"less {shift:.3f}, the mean of up to {CENTERING_REPLIES} replies of the dialogues"
    steps = f"{ppo_args.num_ppo_epochs} epochs of {ppo_args.num_mini_batches} step(s)"
    facts["batch"] = f"{run.batch} episodes an update, {steps}"
    facts["updates"] = f"{run.n_updates} ({run.n_updates * run.per_update} episodes, {n_prompts} prompts)"
    return run.describe(ppo_args, sampling, facts)


# ---------------------------------------------------------------- main


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    # ------------------------------------------------------------ arguments
    groups = (RLModelArguments, DataArguments, LoraArguments, RLRunArguments, RewardArguments, PPOArguments)
    parser = StageArgumentParser([*groups, RLTrainingArguments])
    model_args, data_args, lora_args, run_args, reward_args, ppo_args, training_flags = parser.parse(argv)
    training_args = training_flags.training_arguments()
    check_model_path(model_args.sft_model_path, "--sft_model_path", model_args.allow_pickle_weights)
    if reward_args.reward_model_path:
        check_model_path(reward_args.reward_model_path, "--reward_model_path", model_args.allow_pickle_weights)
    check_combination(lora_args, ppo_args, training_args)
    check_mini_batches(ppo_args, training_args)
    rewards = load_rewards(reward_args, ppo_args.response_length)

    # ------------------------------------------------------------ run
    checkpoint = start_run("proximal policy optimization", training_args, run_args, parser.notes)
    model_args.torch_dtype = base_dtype(model_args, lora_args, training_args, parser.given, checkpoint)
    accelerator = start_accelerator("ppo", training_args, run_args.logging_dir)

    # ------------------------------------------------------------ tokenizer and template
    sft, rm, hub_options = model_args.sft_model_path, reward_args.reward_model_path, model_args.hub_options
    folder_options = hub_options | {"allow_pickle_weights": model_args.allow_pickle_weights}
    tokenizer = load_tokenizer(sft, model_args.tokenizer_name_or_path, flag="--sft_model_path", **hub_options)
    chat_template = load_chat_template(tokenizer, ppo_args.template_name, choose_thinking(ppo_args, sft, checkpoint))
    sampling = choose_sampling(ppo_args, tokenizer, chat_template, training_args.seed)
    reward_texts = rm and load_reward_texts(tokenizer, chat_template, sampling.stop_ids, rm, **folder_options)
    scorer = Scorer(tokenizer, rewards, reward_texts, sampling.batch_size)

    # ------------------------------------------------------------ data
    asked = {"exam_format": reward_args.exam_format, "needed_keys": rewards.needed_keys}
    encoder = PromptEncoder(tokenizer, chat_template, ppo_args.max_source_length, ppo_args.truncation, **asked)
    data = prepare_prompts(encoder, data_args, training_args, model_args.cache_dir)
    rewards.rehearse(data.train)
    n_prompts, per_update = len(data.train), count_episodes(training_args)
    n_updates = count_updates(n_prompts, per_update, ppo_args.total_episodes, training_args)

    # ------------------------------------------------------------ what a resumed run goes on with
    record = {"stage": "ppo", "template": ppo_args.template_name, "thinking": chat_template.thinking}
    lineage = lineage_of(model_args, data_args, **record, flags=parser.given, flag="--sft_model_path")
    own = reward_settings(reward_args, **hub_options) | {"--kl_coef": ppo_args.kl_coef}
    settings = fixed_settings("ppo", model_args, training_args, ppo_args, per_update, n_prompts, own)
    begins = {CPU_BF16: cpu_bf16_of(training_args, model_args.torch_dtype == "bfloat16")}
    state = resumed_state(checkpoint, settings) if checkpoint else State(settings | begins, kl_coef=ppo_args.kl_coef)
    if checkpoint and is_done(state, lineage, checkpoint, n_updates):
        return {}

    # ------------------------------------------------------------ model
    servers = connect_servers(ppo_args, sft, lora_args, sampling.stop_ids, training_args, **hub_options)
    sampling = replace(sampling, servers=servers)
    roles, facts = load_roles(
        sft, rm, lora_args, accelerator.device, checkpoint=checkpoint, **model_args.loading_options
    )
    check_vocabulary(tokenizer, roles.model)
    with accelerator.autocast():
        settle_layout(roles, state, data.train, ppo_args, sft, resumed=bool(checkpoint))
    if training_args.gradient_checkpointing:
        roles.enable_checkpointing(training_args.gradient_checkpointing_kwargs)
    if rewards.has_model and not checkpoint:
        dialogues = data.train.select(range(min(CENTERING_REPLIES, n_prompts))).to_list()
        with accelerator.autocast():
            state.score_shift = center_scores(roles, dialogues, reward_texts, sampling.batch_size)
    roles.add_value_head(state.score_shift, rewards.weight_by_name.get(REWARD_MODEL, 1.0))

    # ------------------------------------------------------------ train
    shown = ppo_figures(rewards.names, chosen_by_exam(data.eval, rewards, reward_args.exam_format))
    run = Run(training_args, accelerator, roles, state, tokenizer, lineage, n_updates, per_update, shown)
    if checkpoint:
        run.load(checkpoint)
    log_block(facts | data.facts | describe_run(run, ppo_args, sampling, scorer, n_prompts))
    train_ppo(run, data.train, data.eval, ppo_args, sampling, scorer, reward_args.exam_format)

    # ------------------------------------------------------------ save and evaluate
    return run.finish()


if __name__ == "__main__":
    run_script(main)
