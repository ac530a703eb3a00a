"""Bits per byte of held-out text: models beside n-gram models counted on the training text.

The documents are held out as `pretraining.py --do_eval` holds them out, given the same files, seed and number. Each
is told alone, without its first token. One n-gram model tells the models' tokens and one tells bytes; both
interpolate all orders as Witten and Bell (1991) did, down to unigrams with one added to each count.

    python scripts/compare_with_ngrams.py --models models/tiny-qwen2 outputs-pt/checkpoint-best \\
        --train_file_dir data/pretrain --max_eval_samples 100
"""

import argparse
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from medtune.errors import UserError, run_script
from medtune.reading.finding import TEXT_ENDINGS, find_files
from medtune.reading.holdout import choose_part
from medtune.reading.readers import load_documents
from medtune.reading.records import Document

ORDER = 5  # tokens of an n-gram
# Gives the natural log-probability of each token of a document after its first.
LogProbs = Callable[[list[int]], Sequence[float]]


def ngram_log_probs(train_ids: Sequence[list[int]], vocab_size: int, order: int = ORDER) -> LogProbs:
    """An n-gram model of the training documents over the whole vocabulary."""
    from nltk.lm import Vocabulary, WittenBellInterpolated
    from nltk.util import everygrams

    # Its vocabulary takes words: a token's number, written out.
    documents = [[str(token_id) for token_id in ids] for ids in train_ids]
    model = WittenBellInterpolated(order, vocabulary=Vocabulary(map(str, range(vocab_size)), unk_cutoff=1))
    # The lowest order has nothing to fall back on: every token is counted once more there.
    model.fit(
        [*(everygrams(document, max_len=order) for document in documents), [(str(i),) for i in range(vocab_size)]]
    )

    def log_probs(ids: list[int]) -> list[float]:
        words = [str(token_id) for token_id in ids]
        return [math.log(model.score(words[end], words[max(0, end - order + 1) : end])) for end in range(1, len(words))]

    return log_probs


def model_log_probs(path: str) -> LogProbs:
    """A causal language model, or an adapter on its base."""
    import torch

    from medtune.models.adapters import load_with_adapter
    from medtune.models.lineage import base_of, check_model_path, is_adapter
    from medtune.models.loading import load_base_model

    check_model_path(path, "--models")
    model = (load_with_adapter(base_of(path), path) if is_adapter(path) else load_base_model(path)).eval()

    @torch.inference_mode()
    def log_probs(ids: list[int]) -> list[float]:
        batch = torch.tensor([ids], device=model.device)
        logits = model(input_ids=batch).logits[0, :-1].float()
        return torch.log_softmax(logits, dim=-1).gather(1, batch[0, 1:, None])[:, 0].tolist()

    return log_probs


def bits_per_byte(log_probs: LogProbs, documents: Sequence[list[int]], byte_lengths: Sequence[int]) -> float:
    """-sum(log2 p) / bytes, over all tokens but the first of each document."""
    nats = -sum(sum(log_probs(ids)) for ids in documents)
    return nats / math.log(2) / sum(byte_lengths[token_id] for ids in documents for token_id in ids[1:])


def tokenized(documents: Sequence[Document], tokenizer) -> list[list[int]]:
    ids = tokenizer([document.text for document in documents], add_special_tokens=False)["input_ids"]
    return [document for document in ids if len(document) > 1]


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Print a line a model; returns the bits per byte by name."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", required=True, help="folders or hub names that share a tokenizer")
    parser.add_argument("--train_file_dir", required=True, help="documents: the n-gram model is counted on them")
    parser.add_argument("--validation_file_dir", help="documents to measure on; else some of the others are held out")
    parser.add_argument("--max_eval_samples", type=int, default=100, help="documents to hold out and to measure on")
    parser.add_argument("--seed", type=int, default=42, help="decides which documents are held out")
    args = parser.parse_args(argv)
    if args.max_eval_samples < 1:
        raise UserError(f"--max_eval_samples {args.max_eval_samples}: give at least 1")

    from medtune.models.loading import load_tokenizer
    from medtune.reading.blocks import token_byte_lengths

    tokenizer = load_tokenizer(args.models[0], flag="--models")
    for other in args.models[1:]:
        if load_tokenizer(other, flag="--models").get_vocab() != tokenizer.get_vocab():
            raise UserError(f"--models: {other} has another tokenizer than {args.models[0]}; compare them apart")

    held_out = args.validation_file_dir is None
    parts, in_bytes = {}, {}
    for part, flag in (("train", "train_file_dir"), ("eval", "validation_file_dir")):
        path = args.train_file_dir if held_out else getattr(args, flag)
        documents, _ = load_documents(find_files(path, f"--{flag}", TEXT_ENDINGS)[0], None)
        chosen = choose_part(documents, part, held_out, None, args.max_eval_samples, args.seed)
        parts[part] = tokenized(chosen, tokenizer)
        in_bytes[part] = [list(document.text.encode()) for document in chosen]

    byte_lengths = token_byte_lengths(tokenizer)
    print(f"{len(parts['eval'])} held-out documents, {sum(map(len, parts['eval'])):,} tokens")

    def measured() -> Iterator[tuple[str, float]]:
        for path in args.models:
            yield path, bits_per_byte(model_log_probs(path), parts["eval"], byte_lengths)
        of_tokens = ngram_log_probs(parts["train"], len(tokenizer))
        yield f"{ORDER}-grams of tokens", bits_per_byte(of_tokens, parts["eval"], byte_lengths)
        of_bytes = ngram_log_probs(in_bytes["train"], 256)
        yield f"{ORDER}-grams of bytes", bits_per_byte(of_bytes, in_bytes["eval"], [1] * 256)

    results = {}
    for name, figure in measured():
        results[name] = figure
        print(f"{figure:.3f} bits per byte  {name}", flush=True)
    return results


if __name__ == "__main__":
    run_script(main)
