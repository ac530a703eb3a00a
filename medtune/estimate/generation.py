"""The moments of generation: the prompts' pass, and the last token's with the cache at its largest."""

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import CacheLayerMixin

from medtune.estimate.meter import Meter
from medtune.models.decoding import Decoding
from medtune.models.running_batch import Row, RunningBatch
from medtune.rl.ppo_math import inverse_transform


class _CountedBatch(RunningBatch):
    """A batch whose tokens are drawn, but from logits without values."""

    def _append_tokens(self, logits: torch.Tensor) -> None:
        inverse_transform(logits, [0.5] * len(self.rows), 1.0)
        for row in self.rows:
            row.append(1)

    def skip(self, n_tokens: int) -> None:
        """Fill the cache as so many tokens would, which makes it grow as often."""
        for layer in self.cache.layers:
            _lengthen(layer, n_tokens)
        for row in self.rows:
            row.ids += [1] * n_tokens
        self.n_columns += n_tokens


def _lengthen(layer: CacheLayerMixin, n_tokens: int) -> None:
    while n_tokens > 0:
        room = layer.rooms[0].shape[-2] - layer.get_seq_length() if hasattr(layer, "rooms") else n_tokens
        n_next = min(n_tokens, max(room, 1))
        shape = (*layer.keys.shape[:-2], n_next, layer.keys.shape[-1])
        layer.update(layer.keys.new_empty(shape), layer.values.new_empty(shape))
        n_tokens -= n_next


def run_generation(core: PreTrainedModel, prompts: Sequence[list[int]], n_tokens: int, meter: Meter, name: str) -> None:
    """Generate replies of so many tokens under the meter, in its moments `name: prompts` and `name: last token`.

    core: in evaluation mode, without a wrapper of PEFT around it.
    """
    batch = _CountedBatch(core)
    rows = [Row(prompt, frozenset(), Decoding(max_new_tokens=n_tokens + 1)) for prompt in prompts]
    with torch.no_grad():
        with meter.moment(f"{name}: prompts"):
            batch._start(rows)
        with meter.moment(f"{name}: last token"):
            batch.skip(max(n_tokens - 2, 0))
            start = meter.work()
            batch.step()
        meter.moments[f"{name}: last token"].work = meter.work() - start
