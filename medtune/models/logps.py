"""Log-probs of single tokens: a causal language model's head on the positions that matter, in chunks.

A row of logits over a vocabulary of 152,000 takes 0.6 MB in float32, so logits of whole batches would fill a GPU. Both
ways below compute them in chunks, as the model's own forward pass scales and caps them.

    logps = SparseHead(model).logps(model, input_ids, attention_mask, mask=is_reply[:, 1:])
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from medtune.models.text_attention import Layout, forward_inputs, places
from medtune.models.text_part import inside_peft

# Positions whose float32 logits exist at a time: 256 x 152k x 4 bytes = 0.15 GB.
CHUNK_POSITIONS = 256
# From [n, vocabulary] logits and [n] int64 ids, or what else of n rows they are compared with, to [k, n] float32: k
# figures of each position, the first of which may have a gradient.
Compute = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def log_probs(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """[1, n] float32 log-probs in nats of [n] ids under [n, vocabulary] logits."""
    return -F.cross_entropy(logits.float(), ids, reduction="none")[None]


def rounding(dtype: torch.dtype) -> float:
    """How far apart in the mean log-probs, in nats, or scores may be that the same operations give in parts of other
    sizes: a few numbers of this type round to a neighbour.
    """
    return max(1e-4, 2 * torch.finfo(dtype).eps)


class _WithGradient(torch.autograd.Function):
    """Figures of positions with the gradient of each by its state, computed together, so that no logits have to be kept
    or computed again: a position's figure depends on its own state alone, and a frozen head needs no gradient.
    """

    @staticmethod
    def forward(ctx, states: torch.Tensor, ids: torch.Tensor, of_chunk: Compute, chunk: int) -> torch.Tensor:
        figures, gradients = [], []
        for part, part_ids in zip(states.split(chunk), ids.split(chunk), strict=True):
            with torch.enable_grad():
                part = part.detach().requires_grad_()
                of_part = of_chunk(part, part_ids)
                gradients += torch.autograd.grad(of_part[0].sum(), part)
            figures.append(of_part.detach())
        ctx.save_for_backward(torch.cat(gradients))
        return torch.cat(figures, dim=1)

    @staticmethod
    def backward(ctx, of_figures: torch.Tensor) -> tuple:
        (gradients,) = ctx.saved_tensors
        return (of_figures[0][:, None] * gradients).to(gradients.dtype), None, None, None


def in_chunks(
    head: Callable[[torch.Tensor], torch.Tensor],
    states: torch.Tensor,
    ids: torch.Tensor,
    compute: Compute,
    chunk: int = CHUNK_POSITIONS,
    is_frozen: bool = False,
) -> torch.Tensor:
    """[k, N] float32: `compute` on the logits of [N, hidden] states and on [N] ids, `chunk` rows at a time.

    In the place of ids [N, ...] may be anything else of each position, such as another model's states.

    For the gradient of the weights of a head that is not frozen, the backward pass computes each chunk again.
    """

    def of_chunk(states: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        return compute(head(states), ids)

    learns = torch.is_grad_enabled() and len(ids) > 0
    if learns and is_frozen and states.requires_grad:
        return _WithGradient.apply(states, ids, of_chunk, chunk)
    chunks = list(zip(states.split(chunk), ids.split(chunk), strict=True))
    if learns and len(chunks) > 1:
        return torch.cat([checkpoint(of_chunk, *each, use_reentrant=False) for each in chunks], dim=1)
    return torch.cat([of_chunk(*each) for each in chunks], dim=1)


def own_logits(model: PreTrainedModel, output_class: type[ModelOutput], states: torch.Tensor) -> torch.Tensor:
    """[N, V] logits of [N, hidden] last states by the model's own forward pass, which may scale or cap them, with the
    states in place of what its backbone computes.

    output_class: of the backbone's output.
    """
    backbone = model.base_model
    own_forward = vars(backbone).get("forward")  # accelerate sets one where weights are quantized
    backbone.forward = lambda *args, **kwargs: output_class(last_hidden_state=states[None])
    try:
        ids = torch.zeros(1, len(states), dtype=torch.long, device=states.device)
        return model(input_ids=ids, use_cache=False).logits[0]
    finally:
        del backbone.forward
        if own_forward is not None:
            backbone.forward = own_forward


class SparseHead:
    """Forward passes of a causal language model (also in PEFT, DDP or DeepSpeed) with the head on some positions.

    Two hooks do it: within the pass the head gets one position, and after it the others in chunks.
    Other passes, such as those of generation, stay as they are.

    Args:
        one_pass: all positions in the pass itself, for weights that cannot be used outside of it (ZeRO-3).
        with_router_loss: in training, keep the load-balancing loss of each pass in `router_loss`.
    """

    def __init__(self, model: PreTrainedModel | PeftModel, one_pass: bool = False, with_router_loss: bool = False):
        self.model = inside_peft(model)
        self.one_pass = one_pass
        self.with_router_loss = with_router_loss
        self.router_loss: torch.Tensor | None = None  # [] of the last pass
        self.places: tuple[torch.Tensor, torch.Tensor] | None = None  # rows and columns of the scored positions
        self.states: torch.Tensor | None = None  # [batch, length, hidden], of the backbone
        self.scored: torch.Tensor | None = None  # [positions, hidden] of these
        self.hooks = [
            self.model.base_model.register_forward_hook(self._note_states),
            self.model.get_output_embeddings().register_forward_pre_hook(self._keep_positions),
        ]

    def close(self) -> None:
        """Leave the model as it was."""
        for hook in self.hooks:
            hook.remove()

    def _note_states(self, backbone: torch.nn.Module, inputs: tuple, outputs: ModelOutput) -> None:
        if self.places is not None:
            self.output_class, self.states = type(outputs), getattr(outputs, "last_hidden_state", None)

    def _keep_positions(self, head: torch.nn.Module, inputs: tuple[torch.Tensor]) -> tuple | None:
        """Reduce [batch, length, hidden] to one of the scored positions, and keep the states of all for later."""
        if self.places is None:
            return None
        states = inputs[0]
        places = tuple(index.to(states.device) for index in self.places)
        # Without states the model's own forward passes its backbone by, and nothing could be computed later.
        if self.one_pass or self.states is None:
            return (states[places],)
        device = states.device.type
        self.autocast = partial(
            torch.autocast, device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
        )
        self.scored = self.states[places]
        return (states[places][:1],)

    def __call__(
        self,
        model: torch.nn.Module,
        batch: dict[str, torch.Tensor],
        mask: torch.Tensor,
        ids: torch.Tensor,
        compute: Compute,
        layout: Layout = Layout.PADDED,
    ) -> torch.Tensor:
        """[k, N] float32: `compute` on the logits at the N positions of the mask and on their ids.

        Args:
            model: the model as its trainer wraps it, or as it is.
            batch: padded rows, as `forward_inputs` takes them.
            mask: [batch, length] bool, True at a position that predicts one of the ids.
            ids: [N] int64, in the order of the mask.
            layout: in which the rows pass through the model.
        """
        self.places = places(mask, batch, layout)
        options = {"output_router_logits": True} if self.with_router_loss and model.training else {}
        try:
            outputs = model(**forward_inputs(batch, layout), use_cache=False, **options)
        finally:
            states = self.scored
            self.places = self.states = self.scored = None
        logits, self.router_loss = outputs.logits, outputs.aux_loss if options else None
        if states is None:
            return in_chunks(lambda logits: logits, logits, ids.to(logits.device), compute).to(mask.device)
        head = partial(own_logits, self.model, self.output_class)
        is_frozen = not any(weight.requires_grad for weight in self.model.get_output_embeddings().parameters())
        # A trained head's chunks are computed twice where there are several, so they are larger.
        chunk = CHUNK_POSITIONS if is_frozen else 4 * CHUNK_POSITIONS
        with self.autocast():
            figures = in_chunks(head, states, ids.to(states.device), compute, chunk, is_frozen)
        return figures.to(mask.device)

    def logps(
        self,
        model: torch.nn.Module,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        mask: torch.Tensor,
        layout: Layout = Layout.PADDED,
    ) -> torch.Tensor:
        """[batch, length - 1] float32 log-probs in nats of the tokens from the second on; 0 outside the mask.

        Args:
            model, layout: as for a call.
            input_ids, attention_mask: [batch, length] int64.
            mask: [batch, length - 1] bool.
        """
        batch = {"input_ids": input_ids, "attention_mask": attention_mask}
        (logps,) = self(model, batch, F.pad(mask, (0, 1), value=False), input_ids[:, 1:][mask], log_probs, layout)
        return torch.zeros(mask.shape, device=mask.device).masked_scatter(mask, logps)
