"""What surrounds PPO's algorithm: its flags, the processes, what is saved and logged."""

import json
import math
import signal
import time
from dataclasses import dataclass, field, fields
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration
from loguru import logger
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerBase, TrainingArguments

from medtune.errors import UserError, end_at_next_signal
from medtune.models.lineage import Lineage
from medtune.rl.roles import Learner, Roles
from medtune.training.checkpoints import (
    BEST,
    UNFINISHED,
    delete_oldest,
    follow_schedule,
    n_bytes,
    optimizer_bytes,
    put_in_place,
    refuse_small_disk,
    unfinished_folder,
    write_manifest,
)

# TrainingArguments that the loop heeds; another one that is given is refused.
HEEDED = {
    *("output_dir", "do_train", "do_eval", "eval_strategy", "eval_steps", "per_device_train_batch_size", "seed"),
    *("gradient_accumulation_steps", "num_train_epochs", "max_steps", "learning_rate", "weight_decay", "adam_beta1"),
    *("adam_beta2", "adam_epsilon", "max_grad_norm", "optim", "optim_args", "lr_scheduler_type", "warmup_steps"),
    *("lr_scheduler_kwargs", "logging_steps", "save_strategy", "save_steps", "save_total_limit", "bf16", "tf32"),
    *("gradient_checkpointing", "gradient_checkpointing_kwargs", "use_cpu", "ddp_timeout", "ddp_backend"),
    *("report_to", "run_name", "resume_from_checkpoint", "disable_tqdm", "local_rank", "log_level", "deepspeed"),
    # These are settled elsewhere, by the parser or by transformers, and mean nothing here.
    *("logging_first_step", "logging_nan_inf_filter", "ddp_find_unused_parameters", "remove_unused_columns"),
    *("activation_checkpointing", "activation_checkpointing_kwargs", "include_num_input_tokens_seen", "debug"),
}


@dataclass
class PPOTrainingArguments(TrainingArguments):
    adam_epsilon: float = field(default=1e-5, metadata={"help": "Epsilon of Adam."})
    learning_rate: float = field(default=1e-5, metadata={"help": "Highest learning rate, of policy and value model."})
    logging_steps: float = field(default=1, metadata={"help": "A line in the log every so many updates."})

    def __post_init__(self):
        for spec in fields(TrainingArguments):
            default = spec.default_factory() if callable(spec.default_factory) else spec.default
            if spec.name not in HEEDED and getattr(self, spec.name) != default:
                raise UserError(f"--{spec.name}: PPO does not heed it; leave it out")
        if self.deepspeed:
            zero = json.loads(Path(self.deepspeed).read_text(encoding="utf-8")).get("zero_optimization", {})
            if zero.get("stage") not in (1, 2):
                raise UserError(
                    f"--deepspeed {self.deepspeed}: PPO takes ZeRO-1 and 2; ZeRO-3 would gather all weights for every "
                    "token that is generated. Take ds_configs/zero2.json, and --load_in_4bit True where memory is short"
                )
        # DeepSpeed is `Learner`'s own: to accelerate, which would take one model for it, this is a run like any other.
        deepspeed, self.deepspeed = self.deepspeed, None
        super().__post_init__()
        self.deepspeed = deepspeed
        if not self.do_train:
            raise UserError("--do_train is missing; scripts/evaluate_model.py measures a trained model")
        for name in ("eval_steps", "save_steps", "logging_steps"):
            value = getattr(self, name)
            if value is not None and (value < 1 or value != int(value)):
                raise UserError(f"--{name} {value:g}: give a whole number of updates")
        if self.eval_strategy == "epoch" or self.save_strategy not in ("no", "steps"):
            raise UserError("--eval_strategy and --save_strategy: say no or steps; a step is an update")


def start_accelerator(training_args: PPOTrainingArguments, logging_dir: str | None) -> Accelerator:
    """Processes, autocast and trackers; says so where GPUs would be idle."""
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
        accelerator.init_trackers(training_args.run_name or "ppo")
    if not training_args.use_cpu and torch.cuda.device_count() > accelerator.num_processes:
        logger.info(
            f"{torch.cuda.device_count()} GPUs are visible and {accelerator.num_processes} used: torchrun "
            f"--nproc_per_node {torch.cuda.device_count()} ppo_training.py uses them all"
        )
    return accelerator


def count_updates(n_prompts: int, per_update: int, total_episodes: int | None, training_args: TrainingArguments) -> int:
    """--max_steps, or --total_episodes, or --num_train_epochs of the prompts, in whole updates."""
    if training_args.max_steps > 0:
        if total_episodes is not None:
            raise UserError("--max_steps and --total_episodes both say how long to train: give one of them")
        return training_args.max_steps
    if total_episodes is not None:
        logger.info(f"--total_episodes {total_episodes} decides how long to train, whatever --num_train_epochs says")
        return math.ceil(total_episodes / per_update)
    return math.ceil(training_args.num_train_epochs * n_prompts / per_update)


def out_of_memory_advice(training_args: TrainingArguments, rollout_batch_size: int, is_quantized: bool) -> str:
    """The remedies that the run has not taken yet, mildest first, with its own values."""
    batch, accumulation = training_args.per_device_train_batch_size, training_args.gradient_accumulation_steps
    remedies = []
    if rollout_batch_size > 1:
        remedies.append(f"--rollout_batch_size {rollout_batch_size // 2} (now {rollout_batch_size})")
    if batch > 1:
        longer = math.ceil(accumulation * batch / (batch // 2))
        remedies.append(
            f"--per_device_train_batch_size {batch // 2} --gradient_accumulation_steps {longer} (now {batch} and "
            f"{accumulation})"
        )
    if not training_args.gradient_checkpointing:
        remedies.append("--gradient_checkpointing True")
    if not is_quantized:
        remedies.append("--load_in_4bit True")
    remedies.append("a shorter --max_source_length or --response_length")
    return f"out of memory; in this order: {'; '.join(remedies)}"


class StopSignal:
    """SIGTERM, SIGINT and a lost terminal's SIGHUP; a second one ends the process at once."""

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        self.received = 0
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:  # nohup
                signal.signal(number, self._receive)

    def _receive(self, number: int, frame: object) -> None:
        end_at_next_signal(number)
        self.received = number
        logger.warning(f"{signal.Signals(number).name}: saving a checkpoint and stopping; again to stop at once")

    def check(self) -> None:
        """Raise Stopped in all processes once a signal has reached one of them."""
        received = torch.tensor([self.received], device=self.accelerator.device)
        self.received = int(self.accelerator.gather(received).max())
        if self.received:
            raise Stopped


class Stopped(Exception):  # noqa: N818 - it ends a rollout that a signal made useless
    """A signal came while replies were written."""


@dataclass
class State:
    """Where a run is; trainer_state.json in a checkpoint.

    settings: the flags whose change would make a resumed run another one.
    """

    settings: dict[str, object]
    global_step: int = 0
    kl_coef: float = 0.0
    score_shift: float = 0.0
    updates_without_end: int = 0
    best_reward: float | None = None
    best_step: int | None = None
    seconds: float = 0.0
    log_history: list[dict] = field(default_factory=list)

    def save(self, file: Path) -> None:
        file.write_text(json.dumps(vars(self), indent=2) + "\n", encoding="utf-8")

    def evaluations(self) -> dict[int, dict]:
        """The evaluations so far, by update."""
        return {entry["step"]: entry for entry in self.log_history if "eval_score" in entry}


def read_state(checkpoint: str, settings: dict[str, object]) -> State:
    """The state in a checkpoint; UserError where the command asks for another run."""
    values = json.loads(Path(checkpoint, "trainer_state.json").read_text(encoding="utf-8"))
    recorded = values.get("settings")
    if recorded is None:
        raise UserError(f"--resume_from_checkpoint {checkpoint}: not a checkpoint of PPO; name another --output_dir")
    for flag, value in settings.items():
        if recorded.get(flag, value) != value:
            how = " (on half the GPUs accumulate twice as many)" if flag == "episodes an update" else ""
            raise UserError(
                f"{flag} {value}: the run in {Path(checkpoint).parent} was started with {recorded[flag]}; leave it as "
                f"it was{how}, start again (--resume_from_checkpoint False --overwrite_output_dir True), or name "
                "another --output_dir"
            )
    return State(**values)


@dataclass
class Run:
    """What a run saves and says on its way, in all processes at once."""

    training_args: PPOTrainingArguments
    accelerator: Accelerator
    roles: Roles
    learners: dict[str, Learner]
    state: State
    tokenizer: PreTrainedTokenizerBase
    lineage: Lineage
    n_updates: int
    per_update: int
    saved_at: int | None = None

    def __post_init__(self):
        self.output_dir = Path(self.training_args.output_dir)
        self.first = self.state.global_step
        self.started = time.monotonic()

    # ------------------------------------------------------------ checkpoints

    def refuse_small_disk(self) -> None:
        """Raise UserError where the checkpoints of the run will not fit on the disk, by an estimate of their size."""
        args, policy, value = self.training_args, self.learners["policy"].weights, self.learners["value"].weights
        n_saves = math.ceil(self.n_updates / args.save_steps) if args.save_strategy == "steps" else 1
        checkpoint = n_bytes([*policy, *value]) + optimizer_bytes([*policy, *value], args)
        refuse_small_disk(self.output_dir, n_bytes(policy), checkpoint, n_saves, args.save_total_limit)

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
            for role, learner in self.learners.items():  # every process has a part of the optimizer
                learner.engine.save_checkpoint(self._engines_folder(place.parent / UNFINISHED / place.name), tag=role)
            self.accelerator.wait_for_everyone()
        if is_main:
            write_manifest(unfinished)
            put_in_place(place)
            delete_oldest(self.output_dir, self.training_args.save_total_limit)
        self.accelerator.wait_for_everyone()
        self.saved_at = self.state.global_step

    def save_interrupted(self, number: int) -> None:
        self.save()
        step = self.state.global_step
        logger.warning(
            f"{signal.Signals(number).name}: stopped at update {step}/{self.n_updates}, saved in "
            f"{self.output_dir / f'checkpoint-{step}'}; the same command with --resume_from_checkpoint True goes on"
        )

    def _engines_folder(self, checkpoint: Path) -> str:
        return str(checkpoint / f"global_step{self.state.global_step}")

    def _write_weights_and_states(self, folder: Path) -> None:
        self.save_policy(folder)
        value = get_peft_model_state_dict(self.roles.model, adapter_name="value")
        value |= {f"head.{name}": tensor for name, tensor in self.roles.value_head.state_dict().items()}
        save_file({name: tensor.contiguous() for name, tensor in value.items()}, folder / "value_model.safetensors")
        if not self.training_args.deepspeed:
            torch.save({role: it.optimizer.state_dict() for role, it in self.learners.items()}, folder / "optimizer.pt")
        torch.save({role: it.scheduler.state_dict() for role, it in self.learners.items()}, folder / "scheduler.pt")
        # All draws come from seed, update and episode; this is for a model that draws by itself.
        torch.save(torch.get_rng_state(), folder / "rng_state.pth")
        self.state.save(folder / "trainer_state.json")

    def load(self, checkpoint: str) -> None:
        """The inverse of `save`; the state is read before."""
        folder, model = Path(checkpoint), self.roles.model
        set_peft_model_state_dict(model, load_file(folder / "adapter_model.safetensors"), adapter_name="default")
        value = load_file(folder / "value_model.safetensors")
        head = {name.removeprefix("head."): tensor for name, tensor in value.items() if name.startswith("head.")}
        self.roles.value_head.load_state_dict(head)
        matrices = {name: tensor for name, tensor in value.items() if not name.startswith("head.")}
        set_peft_model_state_dict(model, matrices, adapter_name="value")
        if not self.training_args.deepspeed:
            optimizers = torch.load(folder / "optimizer.pt", map_location=model.device, weights_only=True)
        schedulers = torch.load(folder / "scheduler.pt", weights_only=True)
        for role, learner in self.learners.items():
            if self.training_args.deepspeed:
                learner.engine.load_checkpoint(self._engines_folder(folder), tag=role)
            else:
                learner.optimizer.load_state_dict(optimizers[role])
            learner.scheduler.load_state_dict(schedulers[role])
        jumps = {
            follow_schedule(it.scheduler, self.state.global_step, self.output_dir) for it in self.learners.values()
        }
        for jump in jumps - {None}:
            logger.warning(jump)
        torch.set_rng_state(torch.load(folder / "rng_state.pth", weights_only=True))
        self.saved_at = self.state.global_step

    def keep_best(self, metrics: dict[str, float]) -> None:
        """checkpoint-best: the most held-out reward less KL, or without evaluation the last."""
        reward = metrics.get("eval_rlhf_reward")
        if reward is not None and self.state.best_reward is not None and reward <= self.state.best_reward:
            return
        self.state.best_reward, self.state.best_step = reward, self.state.global_step
        if self.accelerator.is_main_process:
            self.save_policy(unfinished_folder(self.output_dir / BEST))
            put_in_place(self.output_dir / BEST)
        self.accelerator.wait_for_everyone()

    # ------------------------------------------------------------ what is due, and what was measured

    def evaluation_is_due(self) -> bool:
        """At the start, and every --eval_steps; a resumed run does the one that a signal cut short."""
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
        log_evaluation(metrics, self.state)
        step = self.state.global_step
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
        metrics = metrics | episodes
        is_first = state.global_step == 1 and args.logging_first_step
        if is_first or state.global_step % int(args.logging_steps) == 0 or state.global_step == self.n_updates:
            state.log_history.append({"step": state.global_step} | metrics)
            self.accelerator.log(metrics, step=state.global_step)
            log_update(metrics, state, self.n_updates, f"  {left} left" if n_done > 3 else "")
        if n_done == 3:
            logger.info(f"about {left} left, at the speed of the first three updates")

    def write_results(self) -> dict[str, float]:
        """The files of a run that is done; returns what was measured of checkpoint-best."""
        state = self.state
        metrics = state.evaluations().get(state.best_step, {})
        if self.accelerator.is_main_process:
            results = {"updates": state.global_step, "episodes": state.global_step * self.per_update}
            write_json(self.output_dir / "train_results.json", results | {"seconds": state.seconds})
            if metrics:
                write_json(self.output_dir / "eval_results.json", metrics)
            state.save(self.output_dir / "trainer_state.json")
            plot_curves(state.log_history, self.output_dir / "curves.png")
        return metrics


def log_update(metrics: dict[str, float], state: State, n_updates: int, time_left: str) -> None:
    shown = (
        *(("objective/score", "score", ".3f"), ("objective/kl", "kl", ".3f"), ("objective/entropy", "entropy", ".3f")),
        *(("objective/rlhf_reward", "reward", ".3f"), ("policy/loss", "policy loss", ".4f")),
        *(("policy/approx_kl", "approx kl", ".4f"), ("policy/clip_frac", "clipped", ".3f")),
        *(("value/loss", "value loss", ".4f"), ("value/explained_var", "explained", ".2f")),
        *(("reply/mean_len", "tokens", ".0f"), ("reply/eos_frac", "ended", ".2f"), ("learning_rate", "lr", ".2e")),
        *(("episodes_per_second", "episodes/s", ".2f"), ("peak_memory_gib", "peak GiB", ".1f")),
    )
    line = "  ".join(f"{short} {metrics[name]:{form}}" for name, short, form in shown)
    logger.info(f"update {state.global_step}/{n_updates}  {line}{time_left}")


def log_evaluation(metrics: dict[str, float], state: State) -> None:
    shown = "  ".join(f"{name.removeprefix('eval_')} {value:.3f}" for name, value in metrics.items())
    logger.info(f"update {state.global_step}  evaluation: {shown}")


def plot_curves(log_history: list[dict], file: Path) -> None:
    """Score and KL, of the updates and of the evaluations, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for axes, name, label in zip(panels, ("score", "kl"), ("score", "KL a reply (nats)"), strict=True):
        for key, who, style in ((f"objective/{name}", "sampled", "-"), (f"eval_{name}", "held-out, greedy", "o-")):
            points = [(entry["step"], entry[key]) for entry in log_history if key in entry]
            if points:
                axes.plot(*zip(*points, strict=True), style, label=who, markersize=4)
        axes.set(xlabel="update", ylabel=label)
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend()
    figure.savefig(file, dpi=120)
    pyplot.close(figure)


def write_json(file: Path, values: dict[str, float]) -> None:
    file.write_text(json.dumps(values, indent=4) + "\n", encoding="utf-8")
