"""The replies that rewards score, as text."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from transformers import PreTrainedTokenizerBase

from medtune.reading.reply_text import ReplyDecoder
from medtune.reading.thoughts import ReplyParts, opens_thought, split_reply

# The last tokens of a prompt, which show whether it opens the thought.
_N_LAST_TOKENS = 16


@dataclass
class ScoredReply:
    """A reply to score.

    text: decoded without special tokens, the thought included; n_tokens: with the end token.
    ended: whether it has an end token; prompt: the messages it answers.
    record: `answer` (the right letter) and `options` of an exam question, `reference` (the data's own reply), and the
        other keys of the data's record.
    opened: the prompt ends in an open thought, so that the text begins inside it.
    """

    text: str
    n_tokens: int
    ended: bool
    prompt: list[dict]
    record: dict
    opened: bool = False

    @cached_property
    def parts(self) -> ReplyParts:
        return split_reply(self.text, self.opened)

    @property
    def thought(self) -> str:
        return self.parts.thought

    @property
    def answer(self) -> str:
        """The text behind the thought, "" where the thought does not end."""
        return self.parts.answer if self.parts.is_closed else ""


def scored_replies(
    tokenizer: PreTrainedTokenizerBase, rows: Sequence[dict], reply_ids: Sequence[list[int]], ended: Sequence[bool]
) -> list[ScoredReply]:
    """The replies to rows of `PromptEncoder`, decoded."""
    decode = ReplyDecoder(tokenizer)
    replies = []
    for row, ids, has_end in zip(rows, reply_ids, ended, strict=True):
        text = decode(ids[:-1] if has_end else ids)
        messages, _ = json.loads(row["messages"])
        opened = opens_thought(tokenizer.decode(row["prompt_ids"][-_N_LAST_TOKENS:]))
        replies.append(ScoredReply(text, len(ids), bool(has_end), messages, json.loads(row["record"]), opened))
    return replies
