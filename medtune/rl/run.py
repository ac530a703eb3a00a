"""The run around the algorithm: processes, signals, memory errors, checkpoints and the log."""

import json
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration
from datasets import Dataset
from loguru import logger
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerBase, TrainingArguments

from medtune.errors import UserError
from medtune.models.lineage import Lineage
from medtune.reading.reply_text import ReplyDecoder
from medtune.rl.arguments import EPISODES_AN_UPDATE, RolloutArguments
from medtune.rl.learner import Learner, load_optimizers, save_optimizers
from medtune.rl.log import ShownFigures, log_evaluation, log_update
from medtune.rl.roles import CHECKED_PROMPTS, Roles
from medtune.rl.rollout import Sampling
from medtune.rl.vllm_servers import ServerError
from medtune.rl.zero import ZeroLearner, load_engines, save_engines
from medtune.training.checkpoints import (
    BEST,
    PADDING_FREE,
    UNFINISHED,
    delete_oldest,
    follow_schedule,
    n_bytes,
    no_other_run,
    optimizer_bytes,
    put_in_place,
    read_state,
    refuse_changed,
    refuse_small_disk,
    unfinished_folder,
    write_manifest,
)
from medtune.training.interruption import SignalListener, StoppedInRolloutError, exit_interrupted
from medtune.training.log import memory_figures, peak_memory_gib, plot_curves
from medtune.training.out_of_memory import batch_remedies, explain_full_memory_or_disk
from medtune.training.precision import describe_precision
from medtune.training.processes import leave_process_group
from medtune.training.run import inference_command, leave_finished_run

# Replies of the first evaluation and of the last that the log shows.
SHOWN_REPLIES = 2

# ---------------------------------------------------------------- before the loop


def start_accelerator(
    stage: str, training_args: TrainingArguments, logging_dir: str | None, n_other_gpus: int = 0
) -> Accelerator:
    """Set up processes, autocast and trackers; warns of idle GPUs.

    stage: ppo, grpo or distillation.
    n_other_gpus: that other models have.
    """
    trackers = [name for name in training_args.report_to if name != "none"]
    accelerator = Accelerator(
        cpu=training_args.use_cpu,
        mixed_precision="bf16" if training_args.bf16 else "no",
        log_with=trackers or None,
        project_config=ProjectConfiguration(
            project_dir=training_args.output_dir, logging_dir=logging_dir or str(Path(training_args.output_dir, "runs"))
        ),
    )
    if trackers:
        accelerator.init_trackers(training_args.run_name or stage)
    if not training_args.use_cpu and torch.cuda.device_count() > accelerator.num_processes + n_other_gpus:
        logger.info(
            f"{torch.cuda.device_count()} GPUs are visible and {accelerator.num_processes} used: torchrun "
            f"--nproc_per_node {torch.cuda.device_count()} {stage}_training.py uses them all"
        )
    return accelerator


def count_episodes(training_args: TrainingArguments) -> int:
    """Of an update, in all processes."""
    args = training_args
    return args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size


def count_updates(n_prompts: int, per_update: int, total_episodes: int | None, training_args: TrainingArguments) -> int:
    """--max_steps, or --total_episodes, or --num_train_epochs of the prompts, in whole updates."""
    if training_args.max_steps > 0:
        return training_args.max_steps
    if total_episodes is not None:
        logger.info(f"--total_episodes {total_episodes} decides how long to train, whatever --num_train_epochs says")
        return math.ceil(total_episodes / per_update)
    return math.ceil(training_args.num_train_epochs * n_prompts / per_update)


# ---------------------------------------------------------------- where a run is


@dataclass
class State:
    """The state of a run: trainer_state.json in a checkpoint.

    settings: the flags that a resumed run must keep.
    groups_drawn: of GRPO, groups of replies so far, those without a signal included.
    streaks: for how many updates in a row something has been so, by its name; start: figures of the first update.
    """

    settings: dict[str, object]
    global_step: int = 0
    kl_coef: float = 0.0
    score_shift: float = 0.0
    updates_without_end: int = 0
    groups_drawn: int = 0
    streaks: dict[str, int] = field(default_factory=dict)
    start: dict[str, float] = field(default_factory=dict)
    best_reward: float | None = None
    best_step: int | None = None
    seconds: float = 0.0
    log_history: list[dict] = field(default_factory=list)

    def save(self, file: Path) -> None:
        file.write_text(json.dumps(vars(self), indent=2) + "\n", encoding="utf-8")

    def evaluations(self) -> dict[int, dict]:
        """The evaluations so far, by update."""
        return {entry["step"]: entry for entry in self.log_history if any(name.startswith("eval_") for name in entry)}


def resumed_state(checkpoint: str, settings: dict[str, object]) -> State:
    """The state in a checkpoint; raises UserError if the command is for another run."""
    values = read_state(checkpoint)
    recorded = values.get("settings")
    if recorded is None:
        raise UserError(
            f"--resume_from_checkpoint {checkpoint}: not a checkpoint of PPO, GRPO or distillation; name another "
            "--output_dir"
        )
    remedies = {EPISODES_AN_UPDATE: "leave it as it was (on half the GPUs accumulate twice as many)"}
    refuse_changed(Path(checkpoint), recorded, settings, remedies)
    return State(**values | {"settings": recorded | settings})


def is_done(state: State, lineage: Lineage, checkpoint: str, n_updates: int) -> bool:
    """Whether the run to resume is finished with its results written; logs that nothing is trained.

    Raises UserError if it started from other weights or was finished with other flags.
    """
    output_dir = Path(checkpoint).parent
    finished = state.global_step >= n_updates and (output_dir / "train_results.json").is_file()
    lineage.refuse_other_run(checkpoint, finished)
    if not finished:
        return False
    leave_finished_run(output_dir, f"{state.global_step} updates")
    return True


def settle_layout(
    roles: Roles, state: State, prompts: Dataset, args: RolloutArguments, sft: str, resumed: bool
) -> None:
    """Decide whether rows are joined, a resumed run as it began; raises UserError unless log-probs are the model's."""
    padding_free = state.settings.get(PADDING_FREE, "False") if resumed else args.padding_free
    first_prompts = prompts[:CHECKED_PROMPTS]["prompt_ids"]
    roles.check_logps(first_prompts, args.temperature, f"--sft_model_path {sft}", padding_free)
    state.settings[PADDING_FREE] = str(roles.padding_free)


# ---------------------------------------------------------------- the run


@dataclass
class Run:
    """A run of the algorithm in all processes: its learners, state, checkpoints and log."""

    training_args: TrainingArguments
    accelerator: Accelerator
    roles: Roles
    state: State
    tokenizer: PreTrainedTokenizerBase
    lineage: Lineage
    n_updates: int
    per_update: int
    shown: ShownFigures
    saved_at: int | None = None

    def __post_init__(self):
        self.output_dir = Path(self.training_args.output_dir)
        kind = ZeroLearner if self.training_args.deepspeed else Learner
        self.learners: dict[str, Learner] = {
            role: kind(self.roles.trained_weights(role), self.training_args, self.n_updates, self.accelerator)
            for role in self.roles.trained
        }
        self.first = self.state.global_step
        self.started = time.monotonic()

    @property
    def batch(self) -> str:
        """The arithmetic of an update's batch, in words."""
        args = self.training_args
        return (
            f"{args.per_device_train_batch_size} a device x {args.gradient_accumulation_steps} accumulated x "
            f"{args.world_size} process(es) = {self.per_update}"
        )

    def describe(self, args: RolloutArguments, sampling: Sampling, own: dict[str, str]) -> dict[str, str]:
        """The facts to log: those that all stages have, around a stage's own."""
        facts = {"template": self.lineage.asked_by}
        facts["stop tokens"] = ", ".join(self.tokenizer.convert_ids_to_tokens(sampling.stop_ids))
        facts |= own
        if sampling.servers is not None:
            facts["replies"] = sampling.servers.describe(args.vllm_is_cap)
        if self.training_args.deepspeed:
            facts["DeepSpeed"] = f"{self.training_args.deepspeed}: gradients and optimizers in parts"
        precision = describe_precision(self.training_args, self.roles.model)
        return facts | {"precision": precision, "output": str(self.output_dir)}

    @contextmanager
    def guarded(self, rollout_batch_size: int) -> Iterator[SignalListener]:
        """A context for the loop: locks the output folder, and explains a full memory or disk.

        If a signal ends a rollout, the last whole update is saved; exits with 128 + signal number. If a server that
        writes the replies fails, it is saved too; raises UserError.
        """
        self._refuse_small_disk()
        stop = SignalListener(self.training_args)
        advice = partial(self._out_of_memory_advice, rollout_batch_size)
        alone = no_other_run(self.output_dir) if self.accelerator.is_main_process else nullcontext()
        with explain_full_memory_or_disk(self.output_dir, advice), alone:
            stop.listen()
            try:
                yield stop
            except StoppedInRolloutError:
                self.save()
                self.accelerator.end_training()
                step = self.state.global_step
                saved = self.output_dir / f"checkpoint-{step}"
                exit_interrupted(stop.received, f"update {step}/{self.n_updates}", saved)
            except ServerError as error:
                self.save()
                saved = self.output_dir / f"checkpoint-{self.state.global_step}"
                raise UserError(
                    f"{error}; saved in {saved}, and the same command with --resume_from_checkpoint True goes on"
                ) from error
            finally:
                stop.stop_listening()

    def _out_of_memory_advice(self, rollout_batch_size: int) -> str:
        """The remedies that the run has not taken yet, mildest first, with its own values."""
        half = f"--rollout_batch_size {rollout_batch_size // 2} (now {rollout_batch_size})"
        remedies = [half] if rollout_batch_size > 1 else []
        remedies += batch_remedies(self.training_args)
        if not getattr(self.roles.model, "is_quantized", False):
            remedies.append("--load_in_4bit True")
        remedies.append("a shorter --max_source_length or --response_length")
        return f"out of memory; in this order: {'; '.join(remedies)}"

    # ------------------------------------------------------------ an optimizer step

    def step(self, means: dict[str, float], has_gradients: bool = True) -> dict[str, float]:
        """A step of every role; returns the norm of each one's gradient.

        Args:
            means: what was measured on the way to the gradients.
            has_gradients: False where this process had no token to learn from.

        Raises UserError if a loss or gradient is not finite, or a matrix of the policy's adapter gets no gradient.
        """
        update, dead = self.state.global_step + 1, self.learners["policy"].unreached
        if not all(map(math.isfinite, means.values())):
            raise UserError(
                f"update {update}: the loss is not finite; lower --learning_rate, and see that the scores in the lines "
                "above are of a sound size"
            )
        if dead and has_gradients:
            raise UserError(
                f"update {update}: {len(dead)} adapter matrices of the policy get no gradient, such as {min(dead)}; "
                "without --gradient_checkpointing, or with other --target_modules, they may"
            )
        norms = {}
        for role, learner in self.learners.items():
            norms[role] = learner.step()
            if not math.isfinite(norms[role]):
                raise UserError(f"update {update}: the {role}'s gradient is not finite; lower --learning_rate")
        return norms

    # ------------------------------------------------------------ checkpoints

    def _refuse_small_disk(self) -> None:
        """Raise UserError if, by an estimate of their size, the run's checkpoints will not fit on the disk."""
        args, policy = self.training_args, n_bytes(self.learners["policy"].weights)
        n_saves = math.ceil(self.n_updates / args.save_steps) if args.save_strategy == "steps" else 1
        trained = [weights for learner in self.learners.values() for weights in learner.weights]
        checkpoint = n_bytes(trained) + optimizer_bytes(trained, args)
        refuse_small_disk(self.output_dir, policy, checkpoint, n_saves, args.save_total_limit)

    def save_policy(self, folder: Path) -> None:
        self.roles.model.save_pretrained(str(folder), selected_adapters=["default"])
        self.tokenizer.save_pretrained(str(folder))
        self.lineage.save(folder)

    def save(self) -> None:
        """checkpoint-N with all that a resumed run needs, whole or not at all."""
        if self.saved_at == self.state.global_step:
            return
        place = self.output_dir / f"checkpoint-{self.state.global_step}"
        is_main = self.accelerator.is_main_process
        if is_main:
            unfinished = unfinished_folder(place)
            self._write_weights_and_states(unfinished)
        if self.training_args.deepspeed:
            self.accelerator.wait_for_everyone()
            save_engines(self.learners, place.parent / UNFINISHED / place.name, self.state.global_step)
            self.accelerator.wait_for_everyone()
        if is_main:
            write_manifest(unfinished)
            put_in_place(place)
            delete_oldest(place, self.training_args.save_total_limit)
        self.accelerator.wait_for_everyone()
        self.saved_at = self.state.global_step

    def _write_weights_and_states(self, folder: Path) -> None:
        self.save_policy(folder)
        if self.roles.value_head is not None:
            value = get_peft_model_state_dict(self.roles.model, adapter_name="value")
            value |= {f"head.{name}": tensor for name, tensor in self.roles.value_head.state_dict().items()}
            save_file({name: tensor.contiguous() for name, tensor in value.items()}, folder / "value_model.safetensors")
        if not self.training_args.deepspeed:
            save_optimizers(self.learners, folder)
        torch.save({role: it.scheduler.state_dict() for role, it in self.learners.items()}, folder / "scheduler.pt")
        # All draws come from seed, update and episode; this is for a model that draws by itself.
        torch.save(torch.get_rng_state(), folder / "rng_state.pth")
        self.state.save(folder / "trainer_state.json")

    def load(self, checkpoint: str) -> None:
        """Load what `save` wrote, except for the state."""
        folder, model = Path(checkpoint), self.roles.model
        set_peft_model_state_dict(model, load_file(folder / "adapter_model.safetensors"), adapter_name="default")
        if self.roles.value_head is not None:
            value = load_file(folder / "value_model.safetensors")
            head = {name.removeprefix("head."): tensor for name, tensor in value.items() if name.startswith("head.")}
            self.roles.value_head.load_state_dict(head)
            matrices = {name: tensor for name, tensor in value.items() if not name.startswith("head.")}
            set_peft_model_state_dict(model, matrices, adapter_name="value")
        if self.training_args.deepspeed:
            load_engines(self.learners, folder, self.state.global_step)
        else:
            load_optimizers(self.learners, folder, model.device)
        schedulers = torch.load(folder / "scheduler.pt", weights_only=True)
        for role, learner in self.learners.items():
            learner.scheduler.load_state_dict(schedulers[role])
        jumps = {
            follow_schedule(it.scheduler, self.state.global_step, self.output_dir) for it in self.learners.values()
        }
        for jump in jumps - {None}:
            logger.warning(jump)
        torch.set_rng_state(torch.load(folder / "rng_state.pth", weights_only=True))
        self.saved_at = self.state.global_step

    def keep_best(self, metrics: dict[str, float]) -> None:
        """Save checkpoint-best: by the stage's figure of the evaluation, or without evaluation the last update.

        An evaluation without the figure, all of whose replies a judge has left out, is not the best.
        """
        reward, best = metrics.get(self.shown.best_by), self.state.best_reward
        if reward is None or math.isnan(reward):
            reward = None
        elif self.shown.lowest_is_best:
            reward = -reward
        is_better = reward is not None and (best is None or reward > best)
        if metrics and self.state.best_step is not None and not is_better:
            return
        self.state.best_reward, self.state.best_step = reward, self.state.global_step
        if self.accelerator.is_main_process:
            self.save_policy(unfinished_folder(self.output_dir / BEST))
            put_in_place(self.output_dir / BEST)
        self.accelerator.wait_for_everyone()

    # ------------------------------------------------------------ what is due, and what was measured

    def own_part(self, of_all: Sequence | torch.Tensor) -> Sequence | torch.Tensor:
        """This process's part: every n-th, so that more processes and more accumulation are the same (detail)."""
        return of_all[self.accelerator.process_index :: self.accelerator.num_processes]

    def own_rows(self, rows: Sequence[dict]) -> tuple[Sequence[dict], list[dict]]:
        """This process's part of the held-out rows, and the same filled up to the longest part with the first row:
        every process takes part in each gathering, so all must have as many batches."""
        own = self.own_part(rows)
        longest = math.ceil(len(rows) / self.accelerator.num_processes)
        return own, [*own, *rows[: longest - len(own)]]

    def show_replies(self, rows: Sequence[dict], replies: Sequence[list[int]]) -> None:
        """Log some replies of the first evaluation and of the last."""
        if self.state.global_step not in (0, self.n_updates):
            return
        for row, ids in list(zip(rows, replies, strict=False))[:SHOWN_REPLIES]:
            question = json.loads(row["messages"])[0][-1]["content"]
            text = ReplyDecoder(self.tokenizer)(ids)
            logger.info(f"question: {' '.join(question.split())[:120]}\nreply: {text}")

    def evaluation_is_due(self) -> bool:
        """Whether to evaluate: at the start and every --eval_steps; a resumed run repeats an interrupted one."""
        step, args = self.state.global_step, self.training_args
        every = int(args.eval_steps or args.logging_steps)
        is_planned = step == 0 or (args.eval_strategy == "steps" and step % every == 0) or step == self.n_updates
        return is_planned and step not in self.state.evaluations()

    def learning_rate(self) -> float:
        return self.learners["policy"].scheduler.get_last_lr()[0]

    def save_is_due(self) -> bool:
        args = self.training_args
        return args.save_strategy == "steps" and self.state.global_step % int(args.save_steps) == 0

    def record_evaluation(self, metrics: dict[str, float]) -> None:
        step = self.state.global_step
        log_evaluation(metrics, step)
        self.accelerator.log(
            {f"eval/{name.removeprefix('eval_')}": value for name, value in metrics.items()}, step=step
        )
        self.state.log_history.append({"step": step} | metrics)
        self.keep_best(metrics)

    def record_update(self, metrics: dict[str, float], seconds: float) -> None:
        """Count an update that is done, and say how it went and how long the rest takes."""
        state, args = self.state, self.training_args
        state.global_step += 1
        state.seconds += seconds
        n_done = state.global_step - self.first
        seconds_left = (time.monotonic() - self.started) / n_done * (self.n_updates - state.global_step)
        left = f"{seconds_left / 3600:.1f} h" if seconds_left >= 3600 else f"{seconds_left / 60:.1f} min"
        episodes = {"episodes": state.global_step * self.per_update, "episodes_per_second": self.per_update / seconds}
        metrics = metrics | {"peak_memory_gib": peak_memory_gib()} | episodes
        is_first = state.global_step == 1 and args.logging_first_step
        if is_first or state.global_step % int(args.logging_steps) == 0 or state.global_step == self.n_updates:
            state.log_history.append({"step": state.global_step} | metrics)
            self.accelerator.log(metrics, step=state.global_step)
            log_update(metrics, state.global_step, self.n_updates, self.shown, f"  {left} left" if n_done > 3 else "")
        if n_done == 3:
            logger.info(f"about {left} left, at the speed of the first three updates")

    def finish(self) -> dict[str, float]:
        """Write the results of a run that is done, and name the next command; returns what was measured of
        checkpoint-best."""
        state = self.state
        metrics = state.evaluations().get(state.best_step, {})
        if self.accelerator.is_main_process:
            results = {"updates": state.global_step, "episodes": state.global_step * self.per_update}
            _write_json(self.output_dir / "train_results.json", results | {"seconds": state.seconds} | memory_figures())
            if metrics:
                _write_json(self.output_dir / "eval_results.json", metrics)
            state.save(self.output_dir / "trainer_state.json")
            plot_curves(state.log_history, self.output_dir / "curves.png", self.shown.curves, xlabel="update")
        logger.info(f"done: {self.output_dir / BEST} (update {state.best_step} of {state.global_step})")
        logger.info(f"results: {self.output_dir}; curves: tensorboard --logdir {self.output_dir}")
        logger.info(f"next: {inference_command(self.lineage, self.output_dir / BEST, use_peft=True)}")
        self.accelerator.end_training()
        leave_process_group()
        return metrics


def _write_json(file: Path, values: dict[str, float]) -> None:
    file.write_text(json.dumps(values, indent=4) + "\n", encoding="utf-8")
