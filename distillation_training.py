"""On-policy distillation: a larger model teaches the student on the student's own replies, token by token.

Input: dialogues as in SFT, whose user turns (with their history) are the prompts; a base model or the SFT model as the
student; a teacher of the same tokenizer, loaded here or asked of a vLLM server (medtune/rl/teacher.py).
Output: `--output_dir` with checkpoint-N, checkpoint-best (the student's LoRA adapter, relative to the base model),
train_results.json, eval_results.json, trainer_state.json, curves.png and TensorBoard events in runs/.
Loss: with the distributions p_S of the student and p_T of the teacher, of each token y_t of a reply to a prompt x

    -r_t (log p_T(y_t | x, y_<t) - log p_S(y_t | x, y_<t)),   r_t = p_S / p_S,old = 1

a reward whose mean is -KL(p_S || p_T); or with --beta the generalized Jensen-Shannon divergence of p_T and p_S at each
token (Agarwal et al. 2024, "GKD", https://arxiv.org/abs/2306.13649). medtune/rl/distillation_math.py holds both.

    for each update:
        with --on_policy_share: sample the student's reply to each of a batch of prompts; otherwise take the data's own
        the teacher's log-probs of the replies' tokens
        a step on the loss, averaged over the tokens of all replies

The student is the role "policy" of medtune/rl/roles.py; the teacher takes no gradient.

    CUDA_VISIBLE_DEVICES=0,1 python distillation_training.py --sft_model_path outputs-sft-.../checkpoint-best \\
        --teacher_model_path Qwen/Qwen2.5-7B-Instruct --teacher_device cuda:1 ...
    CUDA_VISIBLE_DEVICES=0,1 torchrun --nproc_per_node 2 distillation_training.py ...

Launcher: run_distill.sh.
"""

import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import medtune.libraries  # noqa: F401 - first: it imports the libraries in half of their time

# isort: split
import torch
from accelerate.utils import gather_object
from datasets import Dataset
from loguru import logger

from medtune.arguments import DataArguments, LoraArguments, StageArgumentParser
from medtune.errors import UserError, run_script
from medtune.models.lineage import check_model_path
from medtune.models.loading import load_tokenizer
from medtune.models.model_folder import lineage_of
from medtune.models.vocabulary import check_vocabulary
from medtune.reading.encoders import AnsweredPromptEncoder, PromptEncoder
from medtune.reading.tokenization import load_chat_template
from medtune.rl.alarms import count_in_a_row, find_teacher_alarm, find_update_alarm, find_warnings
from medtune.rl.arguments import (
    RLModelArguments,
    RLRunArguments,
    RLTrainingArguments,
    check_combination,
    fixed_settings,
)
from medtune.rl.distillation_arguments import DistillationArguments, TeacherArguments, check_teacher_flags
from medtune.rl.distillation_math import sampled_losses
from medtune.rl.log import distillation_figures
from medtune.rl.measures import ReplyMeasures, TokenMeans, summarize_replies
from medtune.rl.off_policy import check_sampler, sampler_weights
from medtune.rl.ppo_math import episode_order, k3
from medtune.rl.prompts import prepare_prompts
from medtune.rl.roles import CHECKED_PROMPTS, load_roles
from medtune.rl.rollout import PolicyReplies, Sampling, add_logps, choose_sampling, collect_replies, replies_of_data
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
from medtune.rl.teacher import LocalTeacher, Teacher, choose_device, describe_teacher, load_teacher, teacher_settings
from medtune.rl.vllm_servers import connect_servers
from medtune.training.interruption import SignalListener
from medtune.training.log import log_block
from medtune.training.precision import CPU_BF16, base_dtype, cpu_bf16_of
from medtune.training.run import start_run
from medtune.training.template_choice import choose_thinking

# ---------------------------------------------------------------- replies


def is_on_policy(update: int, share: float) -> bool:
    """Whether an update learns from the student's own replies: in turns, so that the share is exact and the same in all
    processes and after a resume. GKD draws it (algorithm 1)."""
    return int((update + 1) * share) > int(update * share)


def collect(
    run: Run,
    teacher: Teacher,
    prompts: Dataset,
    order: Sequence[int],
    args: DistillationArguments,
    sampling: Sampling,
    stop: SignalListener,
) -> PolicyReplies:
    """The replies of this process that the next update learns from, the student's own or the data's.

    Where sampled tokens are rewarded, the teacher's log-probs of them are `ref_logps`.
    """
    accelerator, update = run.accelerator, run.state.global_step
    episodes = list(run.own_part(range(update * run.per_update, (update + 1) * run.per_update)))
    rows = [prompts[order[episode]] for episode in episodes]
    with accelerator.autocast():
        if is_on_policy(update, args.on_policy_share):
            replies = collect_replies(run.roles, rows, episodes, sampling, stop)
        else:
            replies = replies_of_data(rows, sampling, run.roles.model.device)
        replies = add_logps(run.roles, rows, replies, sampling, stop)
        return replies if args.beta is not None else replace(replies, ref_logps=teacher.logps(replies, stop))


# ---------------------------------------------------------------- update


def distillation_update(
    run: Run, teacher: Teacher, replies: PolicyReplies, args: DistillationArguments
) -> dict[str, float]:
    """A step on the replies; returns means over their tokens, over all processes.

    Raises UserError if a loss or gradient is not finite, or a matrix of the student's adapter gets no gradient.
    """
    roles, student, accelerator, temperature = run.roles, run.learners["policy"], run.accelerator, args.temperature
    sum_over_processes = partial(accelerator.reduce, reduction="sum")
    # Every token of the update counts the same, in whatever micro-batch and process it is.
    n_tokens = sum_over_processes(replies.mask.sum().double())
    longest_first = replies.attention_mask.sum(dim=1).argsort(descending=True, stable=True)
    micro_batches = longest_first.split(run.training_args.per_device_train_batch_size)
    measured = TokenMeans(sum_over_processes)
    for rows in micro_batches:
        part = replies.take(rows)
        text = part.ids, part.attention_mask, part.mask
        if args.beta is None:
            logps, *_ = student.forward(roles.logps, "policy", *text, temperature)
            losses = sampled_losses(logps, part.policy_logps, part.ref_logps) * sampler_weights(part, args.vllm_is_cap)
            kl = part.policy_logps - part.ref_logps
        else:
            with accelerator.autocast():
                of_teacher = teacher.predict(part)
            losses, kl = student.forward(roles.divergences, *text, temperature, *of_teacher, args.beta)
        student.backward((losses * part.mask).sum() / n_tokens)
        measured.add(part.mask, {"policy/loss": losses, "teacher/kl": kl, "|loss|": losses.abs()})
    means = measured.means()
    # A student that is its teacher has no gradient.
    norm = run.step(means, has_gradients=means.pop("|loss|") > 0)["policy"]
    student.scheduler.step()
    # How far the update moved the student, on the longest replies.
    part, moved = replies.take(micro_batches[0]), TokenMeans(sum_over_processes)
    with torch.no_grad(), accelerator.autocast():
        logps, *_ = roles.logps("policy", part.ids, part.attention_mask, part.mask, temperature)
    moved.add(part.mask, {"policy/approx_kl": k3(part.policy_logps, logps)})
    return means | moved.means() | {"policy/grad_norm": norm}


# ---------------------------------------------------------------- evaluation


def evaluate(
    run: Run, teacher: Teacher, rows: Sequence[dict], sampling: Sampling, stop: SignalListener
) -> dict[str, float]:
    """The student's KL from the teacher on its replies to held-out prompts, in nats a token.

    The replies are sampled as those that it learns from, by the same draws at each evaluation.
    """
    own, padded = run.own_rows(rows)
    first, step = run.accelerator.process_index, run.accelerator.num_processes
    episodes = [first + step * index for index in range(len(padded))]
    with run.accelerator.autocast():
        replies = collect_replies(run.roles, padded, episodes, sampling, stop)
        kl = teacher.kl(run.roles, replies, stop)
    run.show_replies(own, replies.reply_ids())
    figures = torch.stack([kl.double().sum(dim=1), replies.mask.sum(dim=1), replies.ended], dim=1)[: len(own)]
    kl, n_tokens, ended = torch.tensor(gather_object(figures.tolist()), dtype=torch.float64).unbind(dim=1)
    means = {"teacher_kl": kl.sum() / n_tokens.sum(), "mean_len": n_tokens.mean(), "eos_frac": ended.mean()}
    return {f"eval_{name}": mean.item() for name, mean in means.items()}


# ---------------------------------------------------------------- the loop


def train_distillation(
    run: Run,
    teacher: Teacher,
    prompts: Dataset,
    eval_rows: Sequence[dict],
    args: DistillationArguments,
    sampling: Sampling,
) -> None:
    """Run the remaining updates: collect, check, update, record, evaluate, save.

    Exits with 128 + signal number when a signal stopped the run after its checkpoint was saved.
    """
    state = run.state
    order = episode_order(len(prompts), run.n_updates * run.per_update, sampling.seed)
    with run.guarded(sampling.batch_size) as stop:
        measure = partial(evaluate, run, teacher, eval_rows, sampling, stop)
        if eval_rows and run.evaluation_is_due():
            run.record_evaluation(measure())
        for update in range(state.global_step, run.n_updates):
            started = time.monotonic()
            # Collect.
            replies = collect(run, teacher, prompts, order, args, sampling, stop)
            measures = ReplyMeasures.join(gather_object([ReplyMeasures.of(replies)]))
            metrics = {"learning_rate": run.learning_rate()}

            # Alarm. Only what the student wrote tells how it is.
            if is_on_policy(update, args.on_policy_share):
                metrics |= summarize_replies(measures) | check_sampler(run.accelerator, run.roles, replies, args)
                count_in_a_row(state.streaks, state.start, metrics)
                if alarm := find_teacher_alarm(measures, state.streaks):
                    raise UserError(f"update {update + 1}: {alarm}")
                for warning in find_warnings(metrics, state.streaks, state.start):
                    logger.warning(f"update {update + 1}: {warning}")

            # Update. From here on the weights change: a signal waits for the end of the update.
            metrics |= distillation_update(run, teacher, replies, args)
            if alarm := find_update_alarm(metrics):
                raise UserError(f"update {update + 1}: {alarm}")

            # Record, evaluate, save.
            seconds = time.monotonic() - started
            metrics |= {"tokens_per_second": measures.n_tokens.sum().item() / seconds}
            run.record_update(metrics, seconds)
            if eval_rows and run.evaluation_is_due():
                run.record_evaluation(measure())
            if run.save_is_due():
                run.save()
        if not eval_rows:
            run.keep_best({})
        run.save()


# ---------------------------------------------------------------- facts


def describe_run(
    run: Run, teacher: Teacher, args: DistillationArguments, sampling: Sampling, n_prompts: int
) -> dict[str, str]:
    """The facts to log of teacher, loss and batch arithmetic."""
    divergence = f"generalized JSD with beta {args.beta:g}" if args.beta is not None else "reverse KL of sampled tokens"
    own = {
        "batch": f"{run.batch} replies an update",
        "loss": f"{divergence}, {args.on_policy_share:.0%} of the updates on the student's own replies",
        "updates": f"{run.n_updates} ({run.n_updates * run.per_update} replies, {n_prompts} prompts)",
    }
    # The teacher stands behind the template.
    return {"template": run.lineage.asked_by, "teacher": teacher.description} | run.describe(args, sampling, own)


# ---------------------------------------------------------------- main


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    # ------------------------------------------------------------ arguments
    groups_of_flags = [RLModelArguments, TeacherArguments, DataArguments, LoraArguments, RLRunArguments]
    parser = StageArgumentParser([*groups_of_flags, DistillationArguments, RLTrainingArguments])
    model_args, teacher_args, data_args, lora_args, run_args, args, training_flags = parser.parse(argv)
    training_args = training_flags.training_arguments()
    sft, hub_options = model_args.sft_model_path, model_args.hub_options
    check_model_path(sft, "--sft_model_path", model_args.allow_pickle_weights)
    check_combination(lora_args, args, training_args)
    check_teacher_flags(teacher_args, args)

    # ------------------------------------------------------------ run
    checkpoint = start_run("on-policy distillation", training_args, run_args, parser.notes)
    model_args.torch_dtype = base_dtype(model_args, lora_args, training_args, parser.given, checkpoint)
    n_of_teachers = training_args.world_size if teacher_args.teacher_device else 0
    accelerator = start_accelerator("distillation", training_args, run_args.logging_dir, n_of_teachers)

    # ------------------------------------------------------------ tokenizer, template and teacher
    tokenizer = load_tokenizer(sft, model_args.tokenizer_name_or_path, flag="--sft_model_path", **hub_options)
    chat_template = load_chat_template(tokenizer, args.template_name, choose_thinking(args, sft, checkpoint))
    sampling = choose_sampling(args, tokenizer, chat_template, training_args.seed)
    folder_options = hub_options | {"allow_pickle_weights": model_args.allow_pickle_weights}
    teacher_folder = describe_teacher(teacher_args, args, tokenizer, **folder_options)
    teacher_device = choose_device(teacher_args, accelerator.device)

    # ------------------------------------------------------------ data
    encoder_class = PromptEncoder if args.on_policy_share == 1 else AnsweredPromptEncoder
    encoder = encoder_class(tokenizer, chat_template, args.max_source_length, args.truncation)
    data = prepare_prompts(encoder, data_args, training_args, model_args.cache_dir)
    n_prompts, per_update = len(data.train), count_episodes(training_args)
    n_updates = count_updates(n_prompts, per_update, args.total_episodes, training_args)

    # ------------------------------------------------------------ what a resumed run goes on with
    record = {"stage": "distillation", "template": args.template_name, "thinking": chat_template.thinking}
    lineage = lineage_of(model_args, data_args, **record, flags=parser.given, flag="--sft_model_path")
    own = teacher_settings(teacher_args, args, **hub_options)
    settings = fixed_settings("distillation", model_args, training_args, args, per_update, n_prompts, own)
    begins = {CPU_BF16: cpu_bf16_of(training_args, model_args.torch_dtype == "bfloat16")}
    state = resumed_state(checkpoint, settings) if checkpoint else State(settings | begins)
    if checkpoint and is_done(state, lineage, checkpoint, n_updates):
        return {}

    # ------------------------------------------------------------ models
    servers = connect_servers(args, sft, lora_args, sampling.stop_ids, training_args, **hub_options)
    sampling = replace(sampling, servers=servers)
    how = teacher_folder, teacher_args, args, sampling, tokenizer, teacher_device, training_args
    teacher = load_teacher(*how, **model_args.loading_options)
    roles, facts = load_roles(
        sft, None, lora_args, accelerator.device, with_reference=False, with_value=False, checkpoint=checkpoint,
        **model_args.loading_options,
    )  # fmt: skip
    check_vocabulary(tokenizer, roles.model)
    with accelerator.autocast():
        if isinstance(teacher, LocalTeacher):
            teacher.check_logps(data.train[:CHECKED_PROMPTS]["prompt_ids"])
        settle_layout(roles, state, data.train, args, sft, resumed=bool(checkpoint))
    if training_args.gradient_checkpointing:
        roles.enable_checkpointing(training_args.gradient_checkpointing_kwargs)

    # ------------------------------------------------------------ train
    shown = distillation_figures()
    run = Run(training_args, accelerator, roles, state, tokenizer, lineage, n_updates, per_update, shown)
    if checkpoint:
        run.load(checkpoint)
    log_block(facts | data.facts | describe_run(run, teacher, args, sampling, n_prompts))
    train_distillation(run, teacher, data.train, data.eval, args, sampling)

    # ------------------------------------------------------------ save and evaluate
    return run.finish()


if __name__ == "__main__":
    run_script(main)
