"""What replies are scored by: rules whose answer can be checked, a reward model, and functions of the user's own file.

exam         1 if the reply commits to the right letter in the strict form, else 0
format       1 if the reply has the form that is asked for, else 0
length       from 0 to -1 over the last tokens before the limit
reference    likeness to the reference answer, 0 to 1
judge        the share of a rubric's points that a judge gives, at most 1
reward_model the reward model's score, centred
"""

import importlib.util
import inspect
import json
import math
import re
import sys
import traceback
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import ModuleType

import torch
from datasets import Dataset

from medtune.errors import UserError
from medtune.measuring.text_metrics import rouge
from medtune.models.loading import weights_fingerprint
from medtune.reading.finding import sha256_of
from medtune.rl.arguments import LARGEST_REWARD, RewardArguments
from medtune.rl.judge_reward import JudgeReward
from medtune.rl.scored_replies import ScoredReply
from medtune.training.interruption import SignalListener

JUDGE = "judge"
REWARD_MODEL = "reward_model"
# What a reward needs of a prompt's record.
_NEEDED_KEYS = {"exam": "answer", "reference": "reference", JUDGE: "rubrics"}
# So many prompts' records are tried before weights load.
REHEARSED_PROMPTS = 4

# ---------------------------------------------------------------- the rules

_TAG = re.compile(r"<answer>([^<>]*)</answer>\Z")


def strict_letter(reply: ScoredReply) -> str | None:
    """The letter that a reply commits to: alone in its only <answer> tag, which ends it, or without tags on its last
    line; None in every other form.

    Not the evaluation's reader, which makes the best of any wording: what is rewarded must leave nothing to interpret.
    """
    is_tagged = "answer>" in reply.answer
    content = _tagged(reply.answer) if is_tagged else reply.answer.rpartition("\n")[2]
    letter = unicodedata.normalize("NFKC", content).strip()
    return letter if letter in reply.record["options"] else None


def _tagged(answer: str) -> str:
    """What stands in the only <answer> tag, which ends the answer; "" if it does not, and for several tags."""
    tag = _TAG.search(answer)
    return tag[1].strip() if tag and answer.count("answer>") == 2 else ""


def exam_reward(reply: ScoredReply) -> float:
    """1 for the right letter in the strict form, else 0."""
    return float(strict_letter(reply) == reply.record["answer"])


def format_reward(reply: ScoredReply) -> float:
    """1 if a thought, where there is one, is closed, and the answer ends in its only <answer> tag, else 0.

    In the tag stands a letter of an exam question's options, or for any other question some text.
    """
    content = unicodedata.normalize("NFKC", _tagged(reply.answer))
    return float(content in reply.record.get("options", [content]) and content != "")


def length_reward(reply: ScoredReply, max_tokens: int, buffer: int) -> float:
    """0 up to `max_tokens - buffer` tokens, then linearly down to -1 (the soft overlong punishment of Yu et al. 2025,
    DAPO, https://arxiv.org/abs/2503.14476, equation 13)."""
    return max(-1.0, min(0.0, (max_tokens - buffer - reply.n_tokens) / buffer))


def reference_reward(reply: ScoredReply) -> float:
    """F1 of the longest common subsequence of characters with the reference answer, ROUGE-L, 0 to 1."""
    return rouge(reply.answer, reply.record["reference"])["rouge_l"]


# ---------------------------------------------------------------- all rewards


@dataclass(frozen=True)
class Rewards:
    """The rewards of the flags.

    names: of K rewards; weights: [K] float32 in their order.
    functions: by name, from N replies to N numbers; the reward model, whose scores the caller has, has none.
    """

    names: tuple[str, ...]
    weights: torch.Tensor
    functions: dict[str, Callable[[Sequence[ScoredReply]], list[float]]]

    @property
    def weight_by_name(self) -> dict[str, float]:
        return dict(zip(self.names, self.weights.tolist(), strict=True))

    @property
    def has_model(self) -> bool:
        """Whether the reward model's scores are among them."""
        return REWARD_MODEL in self.names

    @property
    def needed_keys(self) -> tuple[str, ...]:
        """The keys that every prompt's record must have, for `PromptEncoder.needed_keys`."""
        return tuple(_NEEDED_KEYS[name] for name in self.names if name in _NEEDED_KEYS)

    def __call__(
        self,
        replies: Sequence[ScoredReply],
        model_scores: torch.Tensor | None = None,
        stop: SignalListener | None = None,
    ) -> torch.Tensor:
        """[N, K] float32 rewards, not weighted; NaN for a reply that the judge could not judge.

        Args:
            model_scores: [N], where the reward model is among them.
            stop: what breaks off a judge, where one is among them.

        Raises UserError for a fault of the user's function, and what `JudgeReward` raises.
        """
        assert (model_scores is not None) == self.has_model, self.names
        device = None if model_scores is None else model_scores.device
        columns = []
        for name in self.names:
            if name == REWARD_MODEL:
                columns.append(model_scores.float())
            else:
                own = self.judge(replies, stop) if name == JUDGE else self.functions[name](replies)
                columns.append(torch.tensor(own, device=device))
        return torch.stack(columns, dim=1)

    def total(self, rewards: torch.Tensor) -> torch.Tensor:
        """[N] weighted sums of [N, K] rewards."""
        return (rewards * self.weights.to(rewards.device)).sum(dim=1)

    def rehearse(self, prompts: Dataset) -> None:
        """Score made-up replies to some rows of `PromptEncoder`, so that a fault shows before weights load."""
        rows = prompts.select(range(min(REHEARSED_PROMPTS, len(prompts))))
        texts = ("", "<think>\n想一想。\n</think>\n\n<answer>A</answer>")
        replies = [
            ScoredReply(text, len(text) + 1, bool(text), json.loads(row["messages"])[0], json.loads(row["record"]))
            for row in rows
            for text in texts
        ]
        if self.judge is not None:
            self.judge.rehearse([reply for reply in replies if reply.answer])
        if rules := tuple(name for name in self.names if name != JUDGE):
            replace(self, names=rules)(replies, torch.zeros(len(replies)) if self.has_model else None)

    @property
    def judge(self) -> JudgeReward | None:
        return self.functions.get(JUDGE)


def load_rewards(args: RewardArguments, response_length: int) -> Rewards:
    """The rewards of the flags; raises UserError for names that nothing has and for a file that does not run."""
    buffer = args.length_buffer or max(1, response_length // 5)
    if buffer > response_length:
        raise UserError(f"--length_buffer {buffer}: more than --response_length {response_length}")
    rules = {"exam": exam_reward, "format": format_reward, "reference": reference_reward}
    rules["length"] = partial(length_reward, max_tokens=response_length, buffer=buffer)
    functions = {name: partial(_by_rule, rule) for name, rule in rules.items()}
    own = own_functions(args.reward_file) if args.reward_file else {}
    if taken := own.keys() & {*functions, JUDGE, REWARD_MODEL}:
        raise UserError(f"--reward_file {args.reward_file}: {min(taken)} is a reward here already; rename it")
    functions |= own
    weights = args.reward_weights
    if JUDGE in weights:
        functions[JUDGE] = JudgeReward(args)
    if unknown := [name for name in weights if name not in functions and name != REWARD_MODEL]:
        known = ", ".join(dict.fromkeys([*functions, JUDGE, REWARD_MODEL]))
        where = "" if args.reward_file else "; --reward_file adds functions of your own"
        raise UserError(f"--rewards {unknown[0]}: there are {known}{where}")
    if opposite := [name for name in weights if weights[name] < 0 and name not in own]:
        where = f"--rewards {opposite[0]}:{weights[opposite[0]]:g}"
        raise UserError(
            f"{where}: {opposite[0]} is higher for better replies, and a weight below 0 teaches worse ones; give 0 or "
            "more. Functions of --reward_file may have one, to count faults"
        )
    if own and not own.keys() & weights.keys():
        raise UserError(f"--reward_file {args.reward_file}: name its functions in --rewards: {', '.join(own)}")
    chosen = {name: functions[name] for name in weights if name != REWARD_MODEL}
    for name in own.keys() & weights.keys():
        check_signature(own[name].args[0], f"--reward_file {args.reward_file}: {name}")
    return Rewards(tuple(weights), torch.tensor([*weights.values()]), chosen)


def reward_settings(args: RewardArguments, **hub_options) -> dict[str, object]:
    """What a resumed run must keep of the flags, and of the files that they name."""
    weights = " ".join(f"{name}:{weight:g}" for name, weight in args.reward_weights.items())
    settings: dict[str, object] = {"--rewards": weights, "--length_buffer": args.length_buffer}
    settings |= {"--exam_format": args.exam_format, "--reward_model_path": args.reward_model_path}
    if JUDGE in args.reward_weights:
        settings["--judge_model"] = args.judge_model
    if args.reward_model_path:
        fingerprint = weights_fingerprint(args.reward_model_path, flag="--reward_model_path", **hub_options)
        settings["weights of the reward model"] = fingerprint[:12]
    if args.reward_file:
        settings[f"--reward_file {args.reward_file} with the content"] = sha256_of(Path(args.reward_file))[:12]
    return settings


def _by_rule(rule: Callable[[ScoredReply], float], replies: Sequence[ScoredReply]) -> list[float]:
    return [rule(reply) for reply in replies]


# ---------------------------------------------------------------- functions of the user's own file


class _OneLine:
    """A context in which whatever the user's code raises, and its exit, becomes one line that begins with `where`."""

    def __init__(self, where: str, file: Path):
        self.where, self.file = where, file

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        if not isinstance(error, Exception | SystemExit):  # not Ctrl-C
            return
        lines = [frame.lineno for frame in traceback.extract_tb(trace) if Path(frame.filename) == self.file]
        line = error.lineno if isinstance(error, SyntaxError) else lines[-1] if lines else 1
        message = " ".join(str(error).split())
        raise UserError(f"{self.where}: {self.file}:{line}: {kind.__name__}: {message}".rstrip(": ")) from error


def own_functions(path: str) -> dict[str, Callable[[Sequence[ScoredReply]], list[float]]]:
    """The public functions of a file by name, their results checked. Raises UserError for a file that does not run."""
    file = Path(path).resolve()
    if not file.is_file() or file.suffix != ".py":
        raise UserError(f"--reward_file {path}: {'not a .py file' if file.exists() else 'there is no such file'}")
    spec = importlib.util.spec_from_file_location("own_rewards", file)
    module: ModuleType = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for the file they are in
    with _OneLine(f"--reward_file {path}", file):
        spec.loader.exec_module(module)
    functions = {
        name: value
        for name, value in vars(module).items()
        if callable(value) and not name.startswith("_") and getattr(value, "__module__", "") == spec.name
    }
    if not functions:
        raise UserError(f"--reward_file {path}: it defines no function; docs/ppo.md has an example")
    return {name: partial(_by_own, function, name, file) for name, function in functions.items()}


def check_signature(function: Callable, where: str) -> None:
    """Raise UserError unless a function can be called with replies and records, and answers at once."""
    if inspect.iscoroutinefunction(function) or inspect.isasyncgenfunction(function):
        raise UserError(f"{where} is an async def, which nothing awaits; write def")
    try:
        inspect.signature(function).bind([], [])
    except TypeError as error:
        raise UserError(f"{where} must take (replies, records); it takes {inspect.signature(function)}") from error


def _by_own(function: Callable, name: str, file: Path, replies: Sequence[ScoredReply]) -> list[float]:
    """The numbers that the user's function gives; raises UserError where they are none, or not one for each reply."""
    where = f"reward {name}"
    with _OneLine(where, file):
        result = function(list(replies), [reply.record for reply in replies])
        values = result.tolist() if hasattr(result, "tolist") else result
        is_list = isinstance(values, Iterable) and not isinstance(values, str | bytes | dict)
        values = [value.item() if hasattr(value, "item") else value for value in values] if is_list else []
    where = f"{where} ({file})"
    if not is_list:
        raise UserError(f"{where}: it returned {result!r:.60}; return a list of numbers, one for each reply")
    if len(values) != len(replies):
        raise UserError(f"{where}: it gave {len(values)} numbers for {len(replies)} replies; return one for each")
    for value in values:
        if not isinstance(value, int | float) or not abs(value) < math.inf:
            raise UserError(f"{where}: it gave {value!r:.60} for a reply; return a finite number")
        if abs(value) > LARGEST_REWARD:
            raise UserError(
                f"{where}: it gave {value!r:.60} for a reply, beside which float32 loses the KL and other rewards; "
                f"scale it to a size near 1 (at most {LARGEST_REWARD:g} is taken)"
            )
    return list(map(float, values))
