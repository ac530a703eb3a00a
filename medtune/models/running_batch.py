"""Replies that are generated together: rows join a batch, get a token each per forward pass, and leave when finished.

transformers' own continuous batching (`generate_batch` of 5.24) has neither seeds nor stop texts of a single request
and is many times slower on a CPU; `generate` computes finished rows until the last one is. The forward passes here are
those of `generate`: prompts padded on the left, positions from the mask, a cache, logits of the last position.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from inspect import signature

import torch
import torch.nn.functional as F
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import (
    Cache,
    DummyLayer,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
    LinearAttentionLayer,
)

from medtune.models.decoding import Decoding, draw_tokens, penalize_repetition

# Rows that wait join once so large a share of a batch is free: each joining copies the cache and costs a forward pass.
REFILLED_SHARE = 0.25
# Tokens of room that a cache grows by at least.
LEAST_ROOM = 64

# ---------------------------------------------------------------- rows


@dataclass(eq=False)
class Row:
    """A prompt and its reply so far.

    prompt, ids: token ids, of the reply with its end token.
    seed: decides the draws of a reply with a temperature, and nothing else does.
    logps: of the ids, where a server wrote them and gives them.
    ended: by one of the stop ids.
    finished: nothing more is generated.
    """

    prompt: list[int]
    stop_ids: frozenset[int]
    decoding: Decoding
    seed: int = 0
    ids: list[int] = field(default_factory=list)
    logps: list[float] | None = None
    ended: bool = False
    finished: bool = False

    def __post_init__(self):
        self.generator: torch.Generator | None = None
        # The end token stands in every turn of the prompt: made less likely, replies would not end.
        self.penalized = set(self.prompt) - self.stop_ids if self.decoding.repetition_penalty != 1 else None

    def append(self, token: int) -> None:
        self.ids.append(token)
        self.ended = token in self.stop_ids
        self.finished = self.ended or self.is_complete() or len(self.ids) == self.decoding.max_new_tokens
        if self.penalized is not None and not self.ended:
            self.penalized.add(token)

    def is_complete(self) -> bool:
        """Whether what was generated is enough; asked after each token."""
        return False

    @staticmethod
    def draw(logits: torch.Tensor, rows: "Sequence[Row]") -> torch.Tensor:
        """[B] ids, the next ones of rows that have a temperature, from their [B, V] logits."""
        for row in rows:
            row.generator = row.generator or torch.Generator(logits.device).manual_seed(row.seed)
        return draw_tokens(logits, [row.decoding for row in rows], [row.generator for row in rows])


def complete_rows(
    core: PreTrainedModel, rows: Sequence[Row], batch_size: int, on_progress: Callable[[int], None] | None = None
) -> None:
    """Generate until all rows are finished, at most `batch_size` of them at a time.

    on_progress: called with the number of finished rows whenever there are more.
    """
    waiting = deque(rows[index] for index in order_of_prompts([row.prompt for row in rows]))
    batch, n_finished = RunningBatch(core), 0
    while waiting or batch.rows:
        n_free = batch_size - len(batch.rows)
        if waiting and (not batch.rows or n_free >= REFILLED_SHARE * batch_size):
            batch.add([waiting.popleft() for _ in range(min(n_free, len(waiting)))])
        else:
            batch.step()
        n_before, n_finished = n_finished, len(rows) - len(waiting) - len(batch.rows)
        if on_progress is not None and n_finished > n_before:
            on_progress(n_finished)


def order_of_prompts(prompts: Sequence[list[int]]) -> list[int]:
    """Indices in the order of generating: the longest first, so that too large a batch fails at once; like lengths
    together, which wastes little padding, and equal prompts, which are then computed once."""
    return sorted(range(len(prompts)), key=lambda index: (len(prompts[index]), prompts[index]), reverse=True)


# ---------------------------------------------------------------- the batch


class RunningBatch:
    """The rows that are being generated, and the cache of all but the last token of each.

    The cache has `n_columns` columns; each row ends at the last one and has padding before its first token.
    """

    def __init__(self, core: PreTrainedModel):
        """core: a causal language model in evaluation mode, without a wrapper of PEFT around it."""
        self.core = core
        self.device = core.get_input_embeddings().weight.device
        self.accepted = signature(core.forward).parameters.keys()
        self.rows: list[Row] = []
        self.cache: Cache | None = None
        self.n_columns = 0

    def add(self, rows: Sequence[Row]) -> None:
        """Take rows in, and choose the next token of each of them."""
        if self.rows and not _can_join(self.cache):
            rows, self.rows = [*self.rows, *rows], []  # all are computed anew
        others = RunningBatch(self.core)
        others._start(list(rows))
        if not self.rows:
            self.rows, self.cache, self.n_columns = others.rows, others.cache, others.n_columns
        elif others.rows:
            _join(self.cache, others.cache)
            self.rows += others.rows
            self.n_columns = max(self.n_columns, others.n_columns)

    def step(self) -> None:
        """Choose the next token of each row; those that are finished leave."""
        self.n_columns += 1
        lengths = [len(row.prompt) + len(row.ids) for row in self.rows]
        self._append_tokens(self._forward([row.ids[-1:] for row in self.rows], lengths))

    def _start(self, rows: list[Row]) -> None:
        self.rows = rows
        self.cache = DynamicCache(config=self.core.config.get_text_config(decoder=True))
        self.cache.layers = [_RoomyLayer() if type(layer) is DynamicLayer else layer for layer in self.cache.layers]
        texts = [(*row.prompt, *row.ids) for row in rows]
        self.n_columns = max(map(len, texts))
        # Replies to one prompt begin with the same states, which are computed once.
        distinct = [*dict.fromkeys(texts)] if _can_join(self.cache) else texts
        logits = self._forward(distinct, [*map(len, distinct)], is_first_iteration=True)
        if len(distinct) < len(texts):
            places = torch.tensor([distinct.index(text) for text in texts], device=self.device)
            self.cache.reorder_cache(places)
            logits = logits[places]
        self._append_tokens(logits)

    @torch.no_grad()
    def _forward(
        self, new_ids: Sequence[Sequence[int]], lengths: Sequence[int], is_first_iteration: bool = False
    ) -> torch.Tensor:
        """[B, V] float32 logits after texts of these lengths, by a forward pass over their last ids, which the cache
        does not have yet."""
        width = max(map(len, new_ids))
        padded = torch.tensor([[0] * (width - len(ids)) + [*ids] for ids in new_ids], device=self.device)
        # Columns before each text's first token.
        n_before = [self.n_columns - length for length in lengths]
        before = torch.tensor(n_before, device=self.device)[:, None]
        columns = torch.arange(self.n_columns, device=self.device)
        inputs = {
            "attention_mask": (columns >= before).long() if any(n_before) else None,  # none is faster
            "position_ids": (columns[-width:] - before).clamp(min=0),
            "logits_to_keep": 1,
        }
        inputs = {name: value for name, value in inputs.items() if name in self.accepted}
        inputs = self.core.prepare_inputs_for_generation(
            padded, cache=self.cache, use_cache=True, is_first_iteration=is_first_iteration, **inputs
        )
        return self.core(**inputs, return_dict=True).logits[:, -1].float().to(self.device)

    def _append_tokens(self, logits: torch.Tensor) -> None:
        """Choose the next token of each row from [B, V] logits; those that are finished leave."""
        for index, row in enumerate(self.rows):
            if row.penalized:
                seen = torch.tensor(list(row.penalized), device=self.device)
                logits[index] = penalize_repetition(logits[index], seen, row.decoding.repetition_penalty)
        tokens = logits.argmax(dim=-1)
        if drawn := [index for index, row in enumerate(self.rows) if row.decoding.temperature > 0]:
            rows = [self.rows[index] for index in drawn]
            tokens[drawn] = rows[0].draw(logits[drawn], rows)
        for row, token in zip(self.rows, tokens.tolist(), strict=True):
            row.append(token)
        self._keep([index for index, row in enumerate(self.rows) if not row.finished])

    def _keep(self, indices: list[int]) -> None:
        """Drop all other rows from the batch and its cache."""
        if len(indices) == len(self.rows):
            return
        self.rows = [self.rows[index] for index in indices]
        if not self.rows:
            self.cache, self.n_columns = None, 0
            return
        self.cache.reorder_cache(torch.tensor(indices, device=self.device))
        if _can_join(self.cache):
            # Of a row, all but its last token is in the cache.
            longest = max(len(row.prompt) + len(row.ids) - 1 for row in self.rows)
            _drop_columns(self.cache, self.n_columns - longest)
            self.n_columns = longest


# ---------------------------------------------------------------- caches


class _RoomyLayer(DynamicLayer):
    """States of full attention [B, heads, columns, size], written into room that is kept behind them.

    DynamicLayer copies all of them for each new token; StaticLayer attends to its whole room.
    """

    rooms: tuple[torch.Tensor, torch.Tensor]
    shown: torch.Tensor | None = None

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        begin = self.get_seq_length()
        end = begin + key_states.shape[-2]
        if self.keys is not self.shown or self.shown is None or end > self.rooms[0].shape[-2]:
            states = (self.keys, self.values) if begin else (key_states[..., :0, :], value_states[..., :0, :])
            self.rooms = tuple(_with_room(part, end + max(end // 4, LEAST_ROOM)) for part in states)
        for room, new in zip(self.rooms, (key_states, value_states), strict=True):
            room[..., begin:end, :] = new
        self.keys, self.values = (room[..., :end, :] for room in self.rooms)
        self.shown, self.is_initialized, self.device = self.keys, True, self.keys.device
        return self.keys, self.values


def _with_room(states: torch.Tensor, n_columns: int) -> torch.Tensor:
    room = states.new_empty(*states.shape[:-2], n_columns, states.shape[-1])
    room[..., : states.shape[-2], :] = states
    return room


# Layers whose states are known, so that they can be joined; of others the rows are computed anew.
KNOWN_LAYERS = {
    _RoomyLayer,
    DummyLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
}


def _can_join(cache: Cache) -> bool:
    return KNOWN_LAYERS.issuperset(map(type, cache.layers))


def _join(cache: Cache, other: Cache) -> None:
    """Append the rows of another cache; all end at the last column."""
    for layer, its in zip(cache.layers, other.layers, strict=True):
        if getattr(layer, "keys", None) is not None:
            layer.keys, layer.values = _stacked(layer.keys, its.keys), _stacked(layer.values, its.values)
        if isinstance(layer, DynamicSlidingWindowLayer):
            layer.cumulative_length = max(layer.cumulative_length, its.cumulative_length)
        if isinstance(layer, LinearAttentionLayer):
            for states, more in ((layer.conv_states, its.conv_states), (layer.recurrent_states, its.recurrent_states)):
                for index, state in states.items():
                    states[index] = None if state is None else torch.cat([state, more[index]])


def _stacked(states: torch.Tensor, more: torch.Tensor) -> torch.Tensor:
    """[A + B, heads, columns, size] of [A, ...] and [B, ...] states, the one with fewer columns padded on the left."""
    n_columns = max(states.shape[-2], more.shape[-2])
    return torch.cat([F.pad(part, (0, 0, n_columns - part.shape[-2], 0)) for part in (states, more)])


def _drop_columns(cache: Cache, n_columns: int) -> None:
    """Drop the first columns, which are padding in all rows."""
    for layer in cache.layers:
        if getattr(layer, "keys", None) is None:
            continue
        n_kept = layer.get_seq_length() - n_columns
        if isinstance(layer, DynamicSlidingWindowLayer):
            layer.cumulative_length = n_kept
            n_kept = min(n_kept, layer.sliding_window - 1)
        begin = layer.keys.shape[-2] - n_kept
        layer.keys, layer.values = layer.keys[..., begin:, :], layer.values[..., begin:, :]
