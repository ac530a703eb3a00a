"""How the next token is chosen: the settings of a reply, and the draw from the logits of a batch."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from transformers import TopKLogitsWarper, TopPLogitsWarper

from medtune.errors import UserError

# Divided by less, the scores of tokens overflow.
LEAST_TEMPERATURE, LEAST_PENALTY = 1e-6, 0.01


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
        if self.temperature != 0 and not self.temperature >= LEAST_TEMPERATURE:
            raise UserError(f"--temperature {self.temperature}: give 0 (greedy) or at least {LEAST_TEMPERATURE}")
        if not 0 < self.top_p <= 1:
            raise UserError(f"--top_p {self.top_p}: give a share above 0 and at most 1")
        if self.top_k < 0:
            raise UserError(f"--top_k {self.top_k}: give 0 (all tokens) or more")
        if not self.repetition_penalty >= LEAST_PENALTY:
            raise UserError(f"--repetition_penalty {self.repetition_penalty}: give at least {LEAST_PENALTY}; 1 is off")
        if self.temperature == 0 and (self.top_p < 1 or self.top_k > 0):
            raise UserError("--top_p and --top_k choose what is drawn from: give a --temperature above 0 with them")
        if "" in (self.stop or ()):
            raise UserError("--stop: an empty text would end every reply at once; give words")


def penalize_repetition(logits: torch.Tensor, seen: torch.Tensor, penalty: float) -> torch.Tensor:
    """[V] logits with those of seen tokens ([n] ids) made less likely (Keskar et al. 2019,
    https://arxiv.org/abs/1909.05858, section 4.1)."""
    own = logits[seen]
    return logits.scatter(0, seen, torch.where(own < 0, own * penalty, own / penalty))


def draw_tokens(
    logits: torch.Tensor, decodings: Sequence[Decoding], generators: Sequence[torch.Generator]
) -> torch.Tensor:
    """[B] ids, each drawn from a row of [B, V] logits by the settings and the generator of its own.

    As `torch.multinomial` draws: the token with the largest chance / noise, where each has exponential noise of its
    own (here -log of a uniform number, which costs a third). Rounding, which differs between batches, changes a
    draw only where two tokens are level; a single number on the cumulative chances falls between rare tokens,
    whose borders rounding moves.

    Raises RuntimeError where chances are not numbers.
    """
    chances = torch.empty_like(logits)
    alike: dict[tuple, list[int]] = {}
    for row, decoding in enumerate(decodings):
        alike.setdefault((decoding.temperature, decoding.top_k, decoding.top_p), []).append(row)
    for (temperature, top_k, top_p), rows in alike.items():
        scores = logits[rows] / temperature
        if top_k > 0:
            scores = TopKLogitsWarper(top_k)(None, scores)
        if top_p < 1:
            scores = TopPLogitsWarper(top_p)(None, scores)
        chances[rows] = scores.softmax(dim=-1)
    if chances.isnan().any():
        raise RuntimeError("the chances of the next token are not numbers: the model's weights or its precision")
    uniforms = torch.empty_like(chances, dtype=torch.float64)
    for row, generator in zip(uniforms, generators, strict=True):
        row.uniform_(generator=generator)
    return (chances / -uniforms.log_()).argmax(dim=-1)
