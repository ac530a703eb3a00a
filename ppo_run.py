"""What surrounds a PPO run: measures of replies, alarms, the state and its checkpoints, signals, the log."""

import json
import math
import signal
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from accelerate import Accelerator
from loguru import logger
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerBase

from checkpoints import delete_oldest, put_in_place, unfinished_folder, write_manifest
from errors import UserError, end_at_next_signal
from model_loading import Lineage

if TYPE_CHECKING:
    from ppo_roles import Roles

# Alarms: so many updates in a row without a reply that ends; so many standard errors from what should be.
UPDATES_WITHOUT_END = 5
STANDARD_ERRORS = 5.0


# ---------------------------------------------------------------- signals


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


# ---------------------------------------------------------------- measures and alarms


def summarize(measures: list[list[float]], kl_coef: float, missing_eos_penalty: float) -> dict[str, float]:
    """The means over replies under the names of the log."""
    score, ended, tokens, kl, kl_k3, entropy, *_ = torch.tensor(measures, dtype=torch.float64).T
    penalized = score - missing_eos_penalty * (1 - ended)
    return {
        "objective/score": score.mean().item(),
        "objective/score_std": score.std(correction=0).item(),
        "objective/kl": kl.mean().item(),
        "objective/kl_k3": kl_k3.mean().item(),
        "objective/entropy": (entropy.sum() / tokens.sum()).item(),
        "objective/rlhf_reward": (penalized - kl_coef * kl).mean().item(),
        "reply/mean_len": tokens.mean().item(),
        "reply/eos_frac": ended.mean().item(),
    }


def find_alarm(measures: list[list[float]], stop_at_kl: float, updates_without_end: int) -> str | None:
    """What the replies of an update show to be wrong with the run, before anything is learned from them; None if sound.

    Args:
        measures: of `episode_measures`, of replies sampled from the policy.
        updates_without_end: how many updates in a row, this one included, had no reply with an end token.
    """
    score, _, tokens, kl, _, _, surprise, variance = torch.tensor(measures, dtype=torch.float64).T
    n_replies = len(measures)
    if not torch.isfinite(score).all():
        return "the reward model gives scores that are not finite: its weights are broken; train it anew"
    if n_replies > 1 and tokens.std() > 0 and score.std() < 1e-6:
        return (
            f"the reward model gives {n_replies} different replies the same score, {score[0].item():g}: there is "
            "nothing to learn from; look at it with reward_modeling.py --do_eval"
        )
    if not torch.isfinite(kl).all():
        return "the KL from the reference is not finite: the policy is broken; lower --learning_rate"
    mean_kl = kl.mean().item()
    if mean_kl > stop_at_kl:
        return (
            f"the KL from the reference is {mean_kl:.1f} nats a reply, over --stop_at_kl {stop_at_kl:g}: the policy "
            "has left what the reward model can judge; lower --learning_rate, or raise --kl_coef"
        )
    # For tokens drawn from the policy, surprisal less entropy has mean 0, and the variance that the policy gives it.
    gap, error, n_tokens = surprise.sum().item(), math.sqrt(variance.sum().item()), tokens.sum().item()
    if abs(gap) > max(STANDARD_ERRORS * error, 0.1 * n_tokens):
        return (
            f"replies are not drawn from the policy: their tokens' surprisal differs from its entropy by "
            f"{gap / n_tokens:.2f} nats a token on average; generation and training disagree, try "
            "--flash_attn False, or --torch_dtype float32"
        )
    if n_replies > 1 and mean_kl < -1 and mean_kl < -STANDARD_ERRORS * kl.std().item() / math.sqrt(n_replies):
        return (
            f"the KL from the reference is {mean_kl:.1f} nats a reply, clearly below 0, which no policy's own replies "
            "have: they are less likely under the policy than under the reference; lower --learning_rate"
        )
    if updates_without_end >= UPDATES_WITHOUT_END:
        return (
            f"no reply of {updates_without_end} updates in a row has an end token: raise --response_length, or train "
            "SFT longer so that its replies end; --stop_token must be the token that ends them"
        )
    return None


# ---------------------------------------------------------------- checkpoints


@dataclass
class Optimization:
    """What changes in an update besides the weights."""

    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    kl_coef: float


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


def read_state(checkpoint: str, settings: dict[str, object]) -> State:
    """The state in a checkpoint; UserError where the command asks for another run."""
    values = json.loads(Path(checkpoint, "trainer_state.json").read_text(encoding="utf-8"))
    recorded = values.get("settings")
    if recorded is None:
        raise UserError(f"--resume_from_checkpoint {checkpoint}: not a checkpoint of PPO; name another --output_dir")
    for flag, value in settings.items():
        if recorded.get(flag) != value:
            raise UserError(
                f"{flag} {value}: the run in {Path(checkpoint).parent} was started with {recorded.get(flag)}; leave it "
                "as it was, start again (--resume_from_checkpoint False --overwrite_output_dir True), or name another "
                "--output_dir"
            )
    return State(**values)


def save_policy(folder: Path, roles: "Roles", tokenizer: PreTrainedTokenizerBase, lineage: Lineage) -> None:
    roles.model.save_pretrained(str(folder), selected_adapters=["default"])
    tokenizer.save_pretrained(str(folder))
    lineage.save(folder)


def save_checkpoint(
    output_dir: Path,
    roles: "Roles",
    optimization: Optimization,
    state: State,
    tokenizer: PreTrainedTokenizerBase,
    lineage: Lineage,
    save_total_limit: int | None,
) -> None:
    """checkpoint-N with all that a resumed run needs, whole or not at all."""
    place = output_dir / f"checkpoint-{state.global_step}"
    partial = unfinished_folder(place)
    save_policy(partial, roles, tokenizer, lineage)
    value = get_peft_model_state_dict(roles.model, adapter_name="value")
    value |= {f"head.{name}": tensor for name, tensor in roles.value_head.state_dict().items()}
    save_file({name: tensor.contiguous() for name, tensor in value.items()}, partial / "value_model.safetensors")
    torch.save(optimization.optimizer.state_dict(), partial / "optimizer.pt")
    torch.save(optimization.scheduler.state_dict(), partial / "scheduler.pt")
    # All draws come from seed, update and episode; this is for a model that draws by itself.
    torch.save(torch.get_rng_state(), partial / "rng_state.pth")
    state.save(partial / "trainer_state.json")
    write_manifest(partial)
    put_in_place(place)
    delete_oldest(output_dir, save_total_limit)


def load_checkpoint(checkpoint: str, roles: "Roles", optimization: Optimization) -> None:
    """The inverse of `save_checkpoint`; the state is read before."""
    folder, device = Path(checkpoint), roles.model.device
    set_peft_model_state_dict(roles.model, load_file(folder / "adapter_model.safetensors"), adapter_name="default")
    value = load_file(folder / "value_model.safetensors")
    head = {name.removeprefix("head."): tensor for name, tensor in value.items() if name.startswith("head.")}
    roles.value_head.load_state_dict(head)
    matrices = {name: tensor for name, tensor in value.items() if not name.startswith("head.")}
    set_peft_model_state_dict(roles.model, matrices, adapter_name="value")
    optimization.optimizer.load_state_dict(torch.load(folder / "optimizer.pt", map_location=device, weights_only=True))
    optimization.scheduler.load_state_dict(torch.load(folder / "scheduler.pt", weights_only=True))
    torch.set_rng_state(torch.load(folder / "rng_state.pth", weights_only=True))


# ---------------------------------------------------------------- log


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
