"""Generate text: many prompts in batches, or one reply as a stream.

Prompts are ids (tokenization.encode_prompt), so that generation continues exactly what training saw. What a
checkpoint's generation_config.json asks for plays no part: decoding is what `Decoding` says.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from medtune.models.decoding import Decoding
from medtune.models.running_batch import Row, complete_rows
from medtune.models.text_part import inside_peft
from medtune.reading.reply_text import ReplyDecoder
from medtune.reading.thoughts import before_part_of


@dataclass(frozen=True)
class Reply:
    """A generated reply.

    text: without its end token and the white space around it.
    ended: by the model, or by a stop text; False where `max_new_tokens` cut it.
    n_tokens: generated tokens, the end token included.
    """

    text: str
    ended: bool
    n_tokens: int


def generate_replies(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    stop_ids: Sequence[int],
    decoding: Decoding,
    batch_size: int = 8,
    on_progress: Callable[[int], None] | None = None,
) -> list[Reply]:
    """One reply for each prompt, in the order given.

    Args:
        model: a causal language model, or a PEFT model around one; its training state is put back afterwards.
        prompts: ids, without padding.
        stop_ids: ids that end a reply (tokenization.stop_token_ids).
        on_progress: called with the number of prompts done whenever there are more.

    A prompt's greedy reply, and in float32 its drawn one too, is the same in every batch; what torch's random state is
        before decides the draws.
    """
    seeds = _seeds(len(prompts), decoding)
    rows = [ReplyRow(tokenizer, prompt, stop_ids, decoding, seed) for prompt, seed in zip(prompts, seeds, strict=True)]
    with ready_to_generate(model) as core:
        complete_rows(core, rows, batch_size, on_progress)
    return [row.reply() for row in rows]


def stream_reply(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: list[int],
    stop_ids: Sequence[int],
    decoding: Decoding,
    on_text: Callable[[str], None],
) -> Reply:
    """Generate one reply and pass its text to `on_text` piece by piece, never a part of a character."""
    (seed,) = _seeds(1, decoding)
    row = ReplyRow(tokenizer, prompt, stop_ids, decoding, seed, on_text)
    with ready_to_generate(model) as core:
        complete_rows(core, [row], batch_size=1)
    return row.reply()


def _seeds(n_replies: int, decoding: Decoding) -> list[int]:
    """A seed for each reply from torch's random state, so that batches change no draw; greedy ones leave it alone."""
    return torch.randint(2**63 - 1, (n_replies,)).tolist() if decoding.temperature > 0 else [0] * n_replies


@contextmanager
def ready_to_generate(model: PreTrainedModel) -> Iterator[PreTrainedModel]:
    """The model (inside its PEFT wrapper) without dropout."""
    core = inside_peft(model)
    # Module by module: a frozen copy inside a training model is not to be switched to training.
    in_training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield core
    finally:
        for module in in_training:
            module.training = True


# ---------------------------------------------------------------- text


class ReplyRow(Row):
    """A row whose ids are text: it ends at a stop text too, and passes its text on while it grows."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        prompt: list[int],
        stop_ids: Sequence[int],
        decoding: Decoding,
        seed: int,
        on_text: Callable[[str], None] | None = None,
    ):
        """on_text: gets new text; what ends in U+FFFD or in a part of a stop text waits for the next tokens."""
        super().__init__(prompt, frozenset(stop_ids), decoding, seed)
        self.decode = ReplyDecoder(tokenizer)
        self.on_text = on_text
        self.n_handed_on = 0

    def reply(self) -> Reply:
        text = self._text()
        kept = _before_stop(text, self.decoding.stop)
        return Reply(kept.strip(), self.ended or kept != text, len(self.ids))

    def append(self, token: int) -> None:
        super().append(token)
        if self.on_text is not None:
            self._hand_on(self._text().lstrip())

    def is_complete(self) -> bool:
        return bool(self.decoding.stop) and any(word in self._text() for word in self.decoding.stop)

    def _text(self) -> str:
        return self.decode(self.ids[:-1] if self.ended else self.ids)

    def _hand_on(self, text: str) -> None:
        text = _before_stop(text, self.decoding.stop)
        if not self.finished:
            text = "" if text.endswith("\ufffd") else before_part_of(self.decoding.stop or (), text)
        # The whole reply is decoded each time: in some vocabularies a token's text depends on those before it.
        if len(text) > self.n_handed_on:
            self.on_text(text[self.n_handed_on :])
            self.n_handed_on = len(text)


def _before_stop(text: str, stop: Sequence[str] | None) -> str:
    """The text before the first stop text in it."""
    return text[: min((text.index(word) for word in stop or () if word in text), default=len(text))]
