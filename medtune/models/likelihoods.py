"""How likely a model finds given replies: of each the logits that predict it, many in a batch."""

from collections.abc import Iterator, Sequence
from contextlib import closing
from functools import partial

import torch
from torch.nn.utils.rnn import pad_sequence

from medtune.errors import Unusable
from medtune.models.chat_models import ChatModel
from medtune.models.logps import Compute, SparseHead, rounding
from medtune.models.text_attention import Layout, exact_layout
from medtune.reading.messages import Message
from medtune.reading.tokenization import encode_exchange


def reply_ids(chat_model: ChatModel, messages: list[dict], reply: str) -> list[int]:
    """What the model should write after the prompt, its end token included."""
    return encode_exchange(chat_model.tokenizer, chat_model.chat_template, messages, reply)[1]


@torch.no_grad()
def score_replies(
    chat_model: ChatModel,
    prompts: Sequence[list[int]],
    replies: Sequence[list[int]],
    batch_size: int,
    compute: Compute,
) -> Iterator[tuple[int, torch.Tensor]]:
    """Yield each row's number and `compute` of the logits that predict its reply, [k, reply length] float32."""
    order = sorted(range(len(prompts)), key=lambda n: len(prompts[n]) + len(replies[n]), reverse=True)
    with chat_model.in_use() as model, closing(SparseHead(model)) as head:
        device = model.get_input_embeddings().weight.device

        def figures_of(batch: Sequence[int], layout: Layout) -> torch.Tensor:
            rows = [torch.tensor(prompts[n] + replies[n], device=device) for n in batch]
            # A reply's tokens are predicted from the prompt's last token on, to the one before its own last.
            predicts = [
                torch.tensor([False] * (len(prompts[n]) - 1) + [True] * len(replies[n]) + [False], device=device)
                for n in batch
            ]
            inputs = {
                "input_ids": pad_sequence(rows, batch_first=True, padding_value=chat_model.tokenizer.pad_token_id),
                "attention_mask": pad_sequence([torch.ones_like(row) for row in rows], batch_first=True),
            }
            ids = torch.tensor([token for n in batch for token in replies[n]], device=device)
            return head(model, inputs, pad_sequence(predicts, batch_first=True), ids, compute, layout)

        few = partial(figures_of, order[-2:])  # the shortest
        layout = exact_layout(head.model, few, rounding(head.model.dtype))
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            figures = figures_of(batch, layout)
            yield from zip(batch, figures.split([len(replies[n]) for n in batch], dim=1), strict=True)


def begin_answers(
    chat_model: ChatModel, messages: list[Message], letters: Sequence[str]
) -> tuple[list[int], dict[str, int]]:
    """The ids that the template writes before every answer, an empty thought, and behind them the first of each letter.

    Raises Unusable where letters begin with the same token.
    """
    if chat_model.chat_template.opens_thought:
        answers = [chat_model.tokenizer.encode(letter, add_special_tokens=False) for letter in letters]
    else:
        answers = [reply_ids(chat_model, messages, letter) for letter in letters]
    n_lead = next((n for n, ids in enumerate(zip(*answers, strict=False)) if len(set(ids)) > 1), 0)
    first = {letter: ids[n_lead] for letter, ids in zip(letters, answers, strict=True)}
    if len(set(first.values())) < len(first):
        raise Unusable("same token", f"the tokenizer begins {', '.join(letters)} with the same token")
    return answers[0][:n_lead], first
