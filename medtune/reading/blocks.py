"""Documents for continued pretraining: join their ids, cut them into blocks, and count bytes per token."""

import re
from collections.abc import Iterable, Sequence

import numpy as np
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from medtune.errors import UserError
from medtune.reading.tokenization import IGNORED_LABEL

# What tokenizers call the token that ends a text; the eos of a chat model's may end turns.
ENDS_OF_TEXT = ("<|endoftext|>", "<|end_of_text|>", "<eos>", "</s>", "<EOS_TOKEN>", "<｜end▁of▁sentence｜>")


def document_end_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token after each document: the tokenizer's end of text, which of a chat model's is often not its eos.

    Raises UserError if the tokenizer has no end token.
    """
    special = {str(token): token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special}
    if tokenizer.eos_token is None:
        raise UserError(f"the tokenizer of {tokenizer.name_or_path} has no end token to join documents by")
    is_end_of_turn = tokenizer.eos_token not in ENDS_OF_TEXT
    ends = [special[name] for name in ENDS_OF_TEXT if is_end_of_turn and name in special]
    return ends[0] if ends else tokenizer.eos_token_id


def document_start_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What the tokenizer itself writes before a text: the bos of Gemma, Llama 3 and others, and mostly nothing."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    ids = tokenizer("a")["input_ids"]
    return next(ids[:start] for start in range(len(ids)) if ids[start : start + len(bare)] == bare)


def cut_blocks(
    documents: Dataset | dict[str, list],
    block_size: int,
    packing_across_documents: bool = False,
    one_document_a_row: bool = False,
) -> dict[str, list]:
    """Join the documents in their order and cut them into blocks; the last block may be shorter.

    A last token that would have a block to itself, with nothing before it to learn it by, is left out.

    Args:
        documents: columns `input_ids` and `source`.
        block_size: tokens a block.
        packing_across_documents: attend across the documents of a block. Otherwise each attends only to itself
            (`seq_lengths`), and its first token is not learned, since it has no context.
        one_document_a_row: cut each document by itself, so that its last block may be shorter.

    Returns:
        Columns `input_ids`, `labels`, `seq_lengths`, `length` and `source` (of every document in the block).
    """
    lengths = np.array([len(ids) for ids in documents["input_ids"]], dtype=np.int64)
    ids = np.concatenate([[], *documents["input_ids"]]).astype(np.int32)
    ends = lengths.cumsum()
    starts = ends - lengths
    wholes = zip(starts, ends, strict=True) if one_document_a_row else [(0, len(ids))]
    cuts = [
        (start, min(start + block_size, end)) for begin, end in wholes for start in range(begin, end - 1, block_size)
    ]
    columns: dict[str, list] = {"input_ids": [], "labels": [], "seq_lengths": [], "length": [], "source": []}
    for start, end in cuts:
        block = ids[start:end]
        first = int(np.searchsorted(ends, start, side="right"))
        last = int(np.searchsorted(starts, end, side="left"))
        borders = [0, *(starts[first + 1 : last] - start).tolist()]
        if packing_across_documents:
            borders = [0]
        labels = block.copy()
        labels[borders] = IGNORED_LABEL
        columns["input_ids"].append(block)
        columns["labels"].append(labels)
        columns["seq_lengths"].append(np.diff([*borders, len(block)]).tolist())
        columns["length"].append(len(block))
        columns["source"].append(list(documents["source"][first:last]))
    return columns


def learned_bytes_per_token(tokenizer: PreTrainedTokenizerBase, labels: Iterable[Sequence[int]]) -> float:
    """The mean number of UTF-8 bytes that a learned token of these rows of labels stands for."""
    learned = np.concatenate([np.asarray(row) for row in labels])
    return float(token_byte_lengths(tokenizer)[learned[learned != IGNORED_LABEL]].mean())


def token_byte_lengths(tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    """[vocabulary] UTF-8 bytes that each token stands for; 0 for special tokens."""
    is_byte_level = "ByteLevel" in str(tokenizer.backend_tokenizer.decoder)
    lengths = np.zeros(len(tokenizer), dtype=np.int64)
    for token, token_id in tokenizer.get_vocab().items():
        if is_byte_level:
            lengths[token_id] = len(token)  # one letter of its alphabet a byte
        elif re.fullmatch("<0x[0-9A-F]{2}>", token):
            lengths[token_id] = 1
        else:
            lengths[token_id] = len(token.replace("\u2581", " ").encode())
    for token_id, token in tokenizer.added_tokens_decoder.items():
        lengths[token_id] = 0 if token.special else len(str(token).encode())
    return lengths
