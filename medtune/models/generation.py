"""Generate text: many prompts in batches, or one reply as a stream.

Prompts are ids (encoding.encode_prompt), so that generation continues exactly what training saw. What a
checkpoint's generation_config.json asks for plays no part: decoding is what `Decoding` says.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from transformers import (
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    RepetitionPenaltyLogitsProcessor,
)
from transformers.generation.streamers import BaseStreamer

from medtune.errors import UserError

LEAST_TEMPERATURE = 1e-6


@dataclass(frozen=True)
class Decoding:
    """How tokens are chosen and when generation stops; the fields are flags of the generating tools."""

    max_new_tokens: int = field(default=512, metadata={"help": "A reply is cut after so many tokens."})
    temperature: float = field(default=0.0, metadata={"help": "0 takes the likeliest token; above 0 draws at random."})
    top_p: float = field(
        default=1.0,
        metadata={"help": "Draw from the likeliest tokens that hold this share of the chance; 1: all."},
    )
    top_k: int = field(default=0, metadata={"help": "Draw from so many of the likeliest tokens; 0: all."})
    repetition_penalty: float = field(
        default=1.0,
        metadata={
            "help": "Above 1 makes tokens of the prompt and the reply, but the end token, less likely; 1 is off."
        },
    )
    stop: list[str] | None = field(
        default=None, metadata={"help": "Texts that end a reply, which does not hold them; the end token does anyway."}
    )

    def __post_init__(self):
        if self.max_new_tokens < 1:
            raise UserError(f"--max_new_tokens {self.max_new_tokens}: give a number of tokens of at least 1")
        # Divided by less, the scores of tokens overflow.
        if self.temperature != 0 and not self.temperature >= LEAST_TEMPERATURE:
            raise UserError(f"--temperature {self.temperature}: give 0 (greedy) or at least {LEAST_TEMPERATURE}")
        if not 0 < self.top_p <= 1:
            raise UserError(f"--top_p {self.top_p}: give a share above 0 and at most 1")
        if self.top_k < 0:
            raise UserError(f"--top_k {self.top_k}: give 0 (all tokens) or more")
        if self.repetition_penalty <= 0:
            raise UserError(f"--repetition_penalty {self.repetition_penalty}: give a number above 0; 1 is off")
        if self.temperature == 0 and (self.top_p < 1 or self.top_k > 0):
            raise UserError("--top_p and --top_k choose what is drawn from: give a --temperature above 0 with them")
        if "" in (self.stop or ()):
            raise UserError("--stop: an empty text would end every reply at once; give words")


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
        stop_ids: ids that end a reply (encoding.stop_token_ids).
        on_progress: called after each batch with the number of prompts done.
    """
    # Like lengths together waste little padding; the longest first, so that too large a batch fails at once.
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]), reverse=True)
    replies: list[Reply | None] = [None] * len(prompts)
    with _ready_to_generate(model) as core:
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            rows = _generate(core, tokenizer, [prompts[index] for index in batch], stop_ids, decoding)
            for index, row in zip(batch, rows, strict=True):
                replies[index] = _reply(tokenizer, row, stop_ids, decoding)
            if on_progress is not None:
                on_progress(start + len(batch))
    return replies


def stream_reply(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: list[int],
    stop_ids: Sequence[int],
    decoding: Decoding,
    on_text: Callable[[str], None],
) -> Reply:
    """Generate one reply and pass its text to `on_text` piece by piece, never a part of a character."""
    with _ready_to_generate(model) as core:
        pieces = _Pieces(tokenizer, stop_ids, on_text, decoding.stop)
        (row,) = _generate(core, tokenizer, [prompt], stop_ids, decoding, streamer=pieces)
    return _reply(tokenizer, row, stop_ids, decoding)


class _RepetitionPenalty(RepetitionPenaltyLogitsProcessor):
    """transformers' penalty, except on stop tokens: the prompt's turns contain them, and replies would not end."""

    def __init__(self, penalty: float, stop_ids: Sequence[int]):
        super().__init__(penalty)
        self.stop_ids = list(stop_ids)

    def __call__(self, input_ids: torch.LongTensor, scores: torch.Tensor) -> torch.Tensor:
        is_stop = torch.isin(input_ids, torch.tensor(self.stop_ids, device=input_ids.device))
        return super().__call__(input_ids.masked_fill(is_stop, scores.shape[-1]), scores)  # an id that is ignored


@contextmanager
def _ready_to_generate(model: PreTrainedModel) -> Iterator[PreTrainedModel]:
    """The model (inside its PEFT wrapper) without dropout and without its checkpoint's decoding settings."""
    core = model.get_base_model() if hasattr(model, "get_base_model") else model
    # Module by module: a frozen copy inside a training model is not to be switched to training.
    in_training = [module for module in model.modules() if module.training]
    own_config, core.generation_config = core.generation_config, GenerationConfig()
    model.eval()
    try:
        yield core
    finally:
        core.generation_config = own_config
        for module in in_training:
            module.training = True


def _generate(
    core: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    stop_ids: Sequence[int],
    decoding: Decoding,
    streamer: BaseStreamer | None = None,
) -> list[list[int]]:
    """The generated ids of each prompt, through the first stop id or the token that completes a stop text."""
    longest = max(map(len, prompts))
    # Left padding: every row's reply starts at the same column.
    padded = [[tokenizer.pad_token_id] * (longest - len(ids)) + ids for ids in prompts]
    mask = [[0] * (longest - len(ids)) + [1] * len(ids) for ids in prompts]
    device = core.get_input_embeddings().weight.device
    penalty = decoding.repetition_penalty
    output = core.generate(
        input_ids=torch.tensor(padded, device=device),
        attention_mask=torch.tensor(mask, device=device),
        generation_config=_generation_config(decoding, stop_ids, tokenizer.pad_token_id),
        logits_processor=[] if penalty == 1 else [_RepetitionPenalty(penalty, stop_ids)],
        streamer=streamer,
        **({"tokenizer": tokenizer} if decoding.stop else {}),
    )
    stops = set(stop_ids)
    rows = []
    for row in output[:, longest:].tolist():
        # A row that a stop text ended is filled up with padding, which need not be a stop id.
        while decoding.stop and row and row[-1] == tokenizer.pad_token_id and row[-1] not in stops:
            row.pop()
        end = next((position for position, token in enumerate(row) if token in stops), len(row))
        rows.append(row[: end + 1])
    return rows


def _generation_config(decoding: Decoding, stop_ids: Sequence[int], pad_token_id: int) -> GenerationConfig:
    # transformers warns of sampling flags in greedy decoding, so they are set for sampling only.
    sampling = (
        {"temperature": decoding.temperature, "top_p": decoding.top_p, "top_k": decoding.top_k}
        if decoding.temperature > 0
        else {}
    )
    return GenerationConfig(
        do_sample=decoding.temperature > 0,
        max_new_tokens=decoding.max_new_tokens,
        eos_token_id=list(stop_ids),
        pad_token_id=pad_token_id,
        stop_strings=decoding.stop or None,
        use_cache=True,
        **sampling,
    )


def _reply(tokenizer: PreTrainedTokenizerBase, row: list[int], stop_ids: Sequence[int], decoding: Decoding) -> Reply:
    ended = bool(row) and row[-1] in stop_ids
    text = _decode(tokenizer, row[:-1] if ended else row)
    kept = _before_stop(text, decoding.stop)
    return Reply(kept.strip(), ended or kept != text, len(row))


def _before_stop(text: str, stop: Sequence[str] | None) -> str:
    """The text before the first stop text in it."""
    return text[: min((text.index(word) for word in stop or () if word in text), default=len(text))]


def _before_part_of_stop(text: str, stop: Sequence[str] | None) -> str:
    """The text without an end that may become a stop text with the next tokens."""
    for start in range(max(len(text) - max(map(len, stop or ("",))), 0), len(text)):
        if any(word.startswith(text[start:]) for word in stop or ()):
            return text[:start]
    return text


def _decode(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


class _Pieces(BaseStreamer):
    """Passes on new text; text that ends in U+FFFD or a part of a stop text waits for the next tokens."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        stop_ids: Sequence[int],
        on_text: Callable[[str], None],
        stop: Sequence[str] | None = None,
    ):
        self.tokenizer = tokenizer
        self.stop_ids = set(stop_ids)
        self.on_text = on_text
        self.stop = stop
        self.ids: list[int] | None = None
        self.n_handed_on = 0

    def put(self, value: torch.Tensor) -> None:
        if self.ids is None:  # the first call brings the prompt
            self.ids = []
            return
        self.ids += [token for token in value.flatten().tolist() if token not in self.stop_ids]
        text = _decode(self.tokenizer, self.ids).lstrip()
        if not text.endswith("\ufffd"):
            self._hand_on(_before_part_of_stop(_before_stop(text, self.stop), self.stop))

    def end(self) -> None:
        self._hand_on(_before_stop(_decode(self.tokenizer, self.ids or []).lstrip(), self.stop))

    def _hand_on(self, text: str) -> None:
        # The whole reply is decoded each time: in some vocabularies a token's text depends on those before it.
        if len(text) > self.n_handed_on:
            self.on_text(text[self.n_handed_on :])
            self.n_handed_on = len(text)
