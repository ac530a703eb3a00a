"""How the next token is chosen: the settings of a reply, and the draw from the logits of a batch."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from transformers import TopKLogitsWarper, TopPLogitsWarper

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


def penalize_repetition(logits: torch.Tensor, seen: torch.Tensor, penalty: float) -> torch.Tensor:
    """[V] logits with those of seen tokens ([n] ids) made less likely (Keskar et al. 2019,
    https://arxiv.org/abs/1909.05858, section 4.1)."""
    own = logits[seen]
    return logits.scatter(0, seen, torch.where(own < 0, own * penalty, own / penalty))


def choose_tokens(
    logits: torch.Tensor, decodings: Sequence[Decoding], uniforms: Sequence[float | None]
) -> torch.Tensor:
    """[B] ids, each chosen from a row of [B, V] logits by the settings of its own.

    uniforms: of a row that is drawn, its number in [0, 1); None for one that takes the likeliest token.
    """
    tokens = logits.argmax(dim=-1)
    alike: dict[tuple, list[int]] = {}
    for row, (decoding, uniform) in enumerate(zip(decodings, uniforms, strict=True)):
        if uniform is not None:
            alike.setdefault((decoding.temperature, decoding.top_k, decoding.top_p), []).append(row)
    for (temperature, top_k, top_p), rows in alike.items():
        scores = logits[rows].double() / temperature
        if top_k > 0:
            scores = TopKLogitsWarper(top_k)(None, scores)
        if top_p < 1:
            scores = TopPLogitsWarper(top_p)(None, scores)
        tokens[rows] = inverse_transform(scores, [uniforms[row] for row in rows])
    return tokens


def inverse_transform(scores: torch.Tensor, uniforms: Sequence[float]) -> torch.Tensor:
    """[B] ids drawn from the softmax of [B, V] float64 scores: the first whose cumulative chance exceeds the uniform
    number of its row.

    A draw depends on its own row alone, whatever the batch; raises RuntimeError where scores are not finite numbers.
    """
    cumulative = scores.softmax(dim=-1).cumsum(dim=-1)
    if cumulative[:, -1].isnan().any():
        raise RuntimeError("the model's probabilities of the next token are not numbers")
    drawn = torch.tensor(uniforms, dtype=torch.float64, device=scores.device)[:, None] * cumulative[:, -1:]
    return (cumulative <= drawn).sum(dim=-1).clamp(max=scores.shape[-1] - 1)
