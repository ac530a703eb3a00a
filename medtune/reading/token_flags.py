"""The flags by which the data tools count in tokens, as a stage would."""

import argparse
from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
from itertools import accumulate
from typing import get_args

from medtune.errors import UserError
from medtune.reading.kinds import Kind
from medtune.reading.thinking import Thinking


def lengths_at(lengths: Counter[int], shares: Sequence[float]) -> list[int]:
    """Quantiles of the lengths: for each share the least length that at least so many records do not exceed."""
    ordered = sorted(lengths)
    up_to = list(accumulate(lengths[length] for length in ordered))
    return [ordered[bisect_left(up_to, share * up_to[-1])] for share in shares]


# The limits of the stages: of which kinds of records, and by default how many tokens.
LIMITS: dict[str, tuple[tuple[Kind, ...], int, str]] = {
    "model_max_length": (("dialogues",), 2048, "dialogue"),
    "max_source_length": (("pairs", "replies"), 1024, "prompt of a pair or labelled reply"),
    "max_target_length": (("pairs", "replies"), 512, "reply of a pair, or labelled reply"),
}


def add_token_flags(parser: argparse._ActionsContainer) -> None:
    """The tokenizer, and the flags that say how a stage would use it."""
    parser.add_argument("--model_name_or_path", "--tokenizer", dest="tokenizer", help="hub name or folder of the model")
    parser.add_argument("--template_name", help="named prompt template instead of the tokenizer's own")
    parser.add_argument("--thinking", choices=get_args(Thinking), help="what the stage learns of thoughts")
    for name, (_, default, what) in LIMITS.items():
        parser.add_argument(f"--{name}", type=int, help=f"tokens of the longest {what} (default: {default})")


def settle_token_flags(args: argparse.Namespace, kind: Kind) -> list[str]:
    """With a tokenizer, set the default limits of this kind; a note for each given flag that has no effect.

    Raises UserError where there is no tokenizer to count by, or nothing fits.
    """
    for name in ("template_name", "thinking", *LIMITS):
        value = getattr(args, name)
        if value is not None and not args.tokenizer:
            raise UserError(f"--{name} {value}: counts in tokens, so name the model too: --model_name_or_path")
        if name in LIMITS and value is not None and value < 8:
            raise UserError(f"--{name} {value}: nothing fits; give a number of tokens")
    notes = []
    for name, (limited, default, _) in LIMITS.items():
        value = getattr(args, name)
        if kind not in limited:
            if value is not None:
                notes.append(f"--{name} {value}: limits {' and '.join(limited)}, and these are {kind}")
            setattr(args, name, None)
        elif value is None and args.tokenizer:
            setattr(args, name, default)
    return notes


def limits_of(args: argparse.Namespace) -> str:
    """The limits that hold, as flags."""
    return " ".join(f"--{name} {getattr(args, name)}" for name in LIMITS if getattr(args, name) is not None)
