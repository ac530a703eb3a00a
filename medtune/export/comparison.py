"""Whether an export says what the model says: the same token ids, and replies as likely as before."""

import math
from collections.abc import Callable, Sequence

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from medtune.errors import UserError
from medtune.reading.tokenization import IGNORED_LABEL

# Ids of a dialogue, and their labels: IGNORED_LABEL but for the replies.
EncodedReply = tuple[list[int], list[int]]

# A copy whose perplexity differs by more is faulty. Eight bits move that of a trained model by 0.0001 and that
# of random weights by 0.03; four bits by 0.004 and 0.23.
LARGEST_CHANGE = {
    **dict.fromkeys(("f32", "f16", "bf16"), 0.02),
    **{"q8_0": 0.05, "bnb-8bit": 0.1, "q5_K_M": 0.15},
    **dict.fromkeys(("q4_0", "q4_K_M", "bnb-4bit"), 0.3),
}


@torch.no_grad()
def perplexity(model: PreTrainedModel, rows: Sequence[EncodedReply]) -> float:
    """exp of the mean negative log-likelihood of the learned tokens, those of the replies."""
    total, n_tokens = 0.0, 0
    for ids, labels in rows:
        logits = model(input_ids=torch.tensor([ids], device=model.device), use_cache=False).logits[0, :-1].float()
        targets = torch.tensor(labels[1:], device=model.device)
        total += torch.nn.functional.cross_entropy(logits, targets, ignore_index=IGNORED_LABEL, reduction="sum").item()
        n_tokens += int((targets != IGNORED_LABEL).sum())
    return math.exp(total / n_tokens)


def check_same_tokens(
    tokenizer: PreTrainedTokenizerBase, exported: Callable[[str], list[int]], rows: Sequence[EncodedReply]
) -> None:
    """Refuse a file whose vocabulary or merges give other ids.

    Args:
        exported: the ids that the tokenizer in the file gives a text, without a bos token of its own.
    """
    for ids, _ in rows:
        text = tokenizer.decode(ids)
        if exported(text) != tokenizer.encode(text, add_special_tokens=False):
            raise UserError(
                f"the tokenizer in the GGUF file gives other tokens than the model's, such as for {text!r:.60}"
            )
