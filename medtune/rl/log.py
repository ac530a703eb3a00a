"""Which figures a stage shows: in the lines of its log, in its plot, and which one chooses checkpoint-best."""

from collections.abc import Sequence
from dataclasses import dataclass

from loguru import logger


@dataclass(frozen=True)
class ShownFigures:
    """What of the measures is shown.

    best_by: the figure of an evaluation whose highest value, or lowest, chooses checkpoint-best.
    columns: of a line of the log: figure, short name, format; a figure that was not measured is left out.
    curves: of the plot: by axis the keys of the log and what they are of.
    """

    best_by: str
    columns: tuple[tuple[str, str, str], ...]
    curves: dict[str, dict[str, str]]
    lowest_is_best: bool = False


_UPDATE = (
    *(("policy/approx_kl", "approx kl", ".4f"), ("policy/clip_frac", "clipped", ".3f")),
    *(("sampler/logp_diff", "vLLM off by", ".4f"), ("sampler/is_ratio", "IS ratio", ".4f")),
)
_REPLY = (("reply/mean_len", "tokens", ".0f"), ("reply/eos_frac", "ended", ".2f"), ("learning_rate", "lr", ".2e"))
_MEMORY = ("peak_memory_gib", "peak GiB", ".1f")
_KL = {"KL a reply (nats)": {"objective/kl": "sampled", "eval_kl": "held-out, greedy"}}


def _columns_of(rewards: Sequence[str]) -> list[tuple[str, str, str]]:
    """A column for each of several rewards."""
    return [(f"reward/{name}", name, ".3f") for name in rewards if len(rewards) > 1]


def _accuracy_curve(exam_accuracy: str | None) -> dict[str, dict[str, str]]:
    return {"exam accuracy": {f"eval_{exam_accuracy}": "held-out, greedy"}} if exam_accuracy else {}


def ppo_figures(rewards: Sequence[str], exam_accuracy: str | None) -> ShownFigures:
    """PPO's, with these rewards; exam_accuracy: what the evaluation calls it, None where it does not choose."""
    return ShownFigures(
        best_by=f"eval_{exam_accuracy}" if exam_accuracy else "eval_rlhf_reward",
        columns=(
            ("objective/score", "score", ".3f"),
            *_columns_of(rewards),
            *(("objective/kl", "kl", ".3f"), ("objective/entropy", "entropy", ".3f")),
            *(("objective/rlhf_reward", "reward", ".3f"), ("policy/loss", "policy loss", ".4f")),
            *_UPDATE,
            *(("value/loss", "value loss", ".4f"), ("value/explained_var", "explained", ".2f")),
            *(*_REPLY, ("episodes_per_second", "episodes/s", ".2f"), _MEMORY),
        ),
        curves={"score": {"objective/score": "sampled", "eval_score": "held-out, greedy"}}
        | _accuracy_curve(exam_accuracy)
        | _KL,
    )


def grpo_figures(rewards: Sequence[str], exam_accuracy: str | None) -> ShownFigures:
    """GRPO's, with these rewards; exam_accuracy: what the evaluation calls it, None where it does not choose."""
    return ShownFigures(
        best_by=f"eval_{exam_accuracy}" if exam_accuracy else "eval_reward",
        columns=(
            ("objective/reward", "reward", ".3f"),
            *_columns_of(rewards),
            *(("groups/no_signal_frac", "no signal", ".2f"), ("objective/token_kl", "kl", ".4f")),
            *(("objective/entropy", "entropy", ".3f"), ("policy/loss", "loss", ".4f")),
            *(*_UPDATE, *_REPLY, ("tokens_per_second", "tokens/s", ".0f"), _MEMORY),
        ),
        curves={"reward": {"objective/reward": "sampled", "eval_reward": "held-out, greedy"}}
        | _accuracy_curve(exam_accuracy),
    )


def distillation_figures() -> ShownFigures:
    return ShownFigures(
        best_by="eval_teacher_kl",
        lowest_is_best=True,
        columns=(
            *(("teacher/kl", "teacher kl", ".4f"), ("policy/loss", "loss", ".4f")),
            *(("objective/entropy", "entropy", ".3f"), *_UPDATE, *_REPLY),
            *(("tokens_per_second", "tokens/s", ".0f"), _MEMORY),
        ),
        curves={"KL from the teacher (nats a token)": {"teacher/kl": "training", "eval_teacher_kl": "held-out"}},
    )


def log_update(metrics: dict[str, float], step: int, n_updates: int, shown: ShownFigures, time_left: str) -> None:
    """A line; z: what is rounded to 0 has no minus."""
    columns = ((name, short, form) for name, short, form in shown.columns if name in metrics)
    line = "  ".join(f"{short} {metrics[name]:z{form}}" for name, short, form in columns)
    logger.info(f"update {step}/{n_updates}  {line}{time_left}")


def log_evaluation(metrics: dict[str, float], step: int) -> None:
    figures = "  ".join(f"{name.removeprefix('eval_')} {value:z.3f}" for name, value in metrics.items())
    logger.info(f"update {step}  evaluation: {figures}")
