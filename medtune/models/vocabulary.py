"""Whether tokenizer and embeddings fit, and which tokens of the template the model never learned."""

from contextlib import AbstractContextManager, nullcontext

import torch
from loguru import logger
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from medtune.errors import UserError


def has_tied_head(model: PreTrainedModel) -> bool:
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    return head is not None and head.weight is embeddings.weight


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel | PeftModel) -> None:
    """Refuse a tokenizer with ids beyond the model's embedding, which is never resized silently."""
    embeddings = model.get_input_embeddings()
    n_rows = getattr(embeddings, "base_layer", embeddings).num_embeddings  # LoRA may be on it
    if len(tokenizer) > n_rows:
        raise UserError(
            f"the tokenizer of {tokenizer.name_or_path} has {len(tokenizer)} entries and the model embeddings for "
            f"{n_rows}: give the model's own tokenizer, or resize the model's embeddings and save it first"
        )


def warn_of_dead_tokens(
    model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, turn_ids: list[int], reply_ids: list[int]
) -> None:
    """Warn of turn tokens that the base never learned and this run does not train.

    Args:
        turn_ids, reply_ids: of `turn_token_ids`, what the template writes, and of it what the model has to write
            itself.
    """
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    names = {module: name.rpartition(".")[2] for name, module in model.named_modules() if module in (embeddings, head)}
    dead, untrained = set(), []
    for module, ids in ((embeddings, turn_ids), (head, reply_ids)):
        if not any(weight.requires_grad for weight in module.parameters()):
            untrained.append(names[module])
            dead |= dead_rows(module.weight, ids)
    if dead:
        if has_tied_head(model):
            untrained = [names[embeddings]]
        logger.warning(
            f"{', '.join(tokenizer.convert_ids_to_tokens(sorted(dead)))}: the model has never learned these tokens of "
            "the template, and this adapter leaves their rows as they are, so that replies may never end: take the "
            "Instruct model, or a --template_name whose tokens the model knows, or train the rows with "
            f"--modules_to_save {','.join(untrained)} or --use_peft False"
        )


def dead_rows(weight: torch.Tensor, ids: list[int]) -> set[int]:
    """Those of the ids whose rows of [vocabulary, hidden] were surely never trained.

    Such a row is all but zero or all but the mean of the rows, as resized embeddings begin (20 times nearer to it
    than the median row), or equals that of another of the ids or of two more tokens. A row that still has a random
    start of its own looks like a trained one and is not found.
    """
    with _gathered(weight):
        sample = weight[:: max(len(weight) // 4096, 1)].float()
        centers = (torch.zeros_like(sample[0]), weight.mean(dim=0, dtype=torch.float32))
        limits = [(sample - center).norm(dim=1).median() / 20 for center in centers]
        dead = set()
        for index in ids:
            row = weight[index]
            near = any((row - center).norm() < limit for center, limit in zip(centers, limits, strict=True))
            same = (weight[:, 0] == row[0]).nonzero().flatten()
            same = set(same[(weight[same] == row).all(dim=1)].tolist()) - {index}
            if near or len(same) > 1 or same & set(ids):
                dead.add(index)
    return dead


def _gathered(weight: torch.Tensor) -> AbstractContextManager:
    """Where ZeRO-3 has split a weight over the processes, the whole of it."""
    if not hasattr(weight, "ds_id"):
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters([weight])
