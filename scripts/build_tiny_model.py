"""Make a tiny Qwen2 with random weights and its own tokenizer, to try every stage offline on a CPU.

The tokenizer is a byte-level BPE in Qwen's form, trained on the texts under `--data_dir`; the model has about
two million parameters. The folder loads like a downloaded model: `--model_name_or_path models/tiny-qwen2`.

    python scripts/build_tiny_model.py

`--shape base` is what scripts/train_base_model.sh pretrains: about seven million parameters.
"""

import argparse
import hashlib
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from medtune.errors import UserError, run_script
from medtune.output_files import refuse_unwritable
from template import named_template

if TYPE_CHECKING:
    from transformers import Qwen2ForCausalLM, Qwen2Tokenizer

# In the order of their ids, which follow the learned vocabulary as in Qwen2.5.
SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
VOCAB_SIZE = 4096
# Of each shape: what its configuration has instead of `build_model`'s, and the most bytes of a token. Text that repeats
# its phrases would make whole phrases tokens, so that no other wording begins as they do: four Chinese characters.
SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {"vocab_size": VOCAB_SIZE},
    "base": {"vocab_size": 8192, "max_token_length": 12, "intermediate_size": 768, "num_hidden_layers": 6},
}
CONTEXT_LENGTH = 2048
# Not the rejected replies: sentences that return in many of them would take the place of medical words.
TRAINING_PARTS = ("pretrain", "finetune")
RECORD_FILE = "tiny_model.json"

# ---------------------------------------------------------------- texts


def read_texts(data_dir: Path) -> list[str]:
    """All texts to train on: the lines of .txt files, and the texts in the records of .jsonl files.

    What evaluates a model stays unseen by its tokenizer too.
    """
    paths = sorted(
        path for part in TRAINING_PARTS for path in (data_dir / part).rglob("*") if path.suffix in {".txt", ".jsonl"}
    )
    texts = [text for path in paths for text in read_file_texts(path)]
    if not texts:
        raise UserError(f"--data_dir {data_dir}: no .txt or .jsonl file with text in it")
    return texts


def read_file_texts(path: Path) -> Iterator[str]:
    """The texts of one file, in its order."""
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            if path.suffix == ".txt":
                yield from filter(None, [line.strip()])
            elif line.strip():
                try:
                    record = json.loads(line)
                except json.JSONDecodeError as error:
                    raise UserError(f"{path}:{number}: not a JSON record ({error.msg})") from None
                yield from texts_in(record)


def texts_in(value: Any) -> Iterator[str]:
    """All strings in a JSON value, without the names of speakers."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for item in value:
            yield from texts_in(item)
    elif isinstance(value, dict):
        for key, item in value.items():
            if key not in {"from", "role"}:
                yield from texts_in(item)


# ---------------------------------------------------------------- tokenizer and model


def train_tokenizer(
    texts: Iterable[str], vocab_size: int = VOCAB_SIZE, max_token_length: int | None = None
) -> "Qwen2Tokenizer":
    """A Qwen2 tokenizer with at most `vocab_size` entries (fewer where the texts have no more to merge).

    Args:
        max_token_length: bytes of the longest token; None for no limit.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import Qwen2Tokenizer

    smallest = len(pre_tokenizers.ByteLevel.alphabet()) + len(SPECIAL_TOKENS)
    if vocab_size < smallest:
        raise UserError(f"--vocab_size {vocab_size}: the bytes and special tokens alone need {smallest}")

    qwen = Qwen2Tokenizer().backend_tokenizer
    backend = Tokenizer(models.BPE())
    backend.normalizer, backend.pre_tokenizer = qwen.normalizer, qwen.pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIAL_TOKENS),
        min_frequency=2,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
        max_token_length=max_token_length,
    )
    # The words that templates put around every turn are single tokens, as in Qwen's vocabulary.
    backend.train_from_iterator([*texts, *["system\nuser\nassistant\n"] * len(texts)], trainer)

    learned = json.loads(backend.to_str())["model"]
    specials = {token: len(learned["vocab"]) + i for i, token in enumerate(SPECIAL_TOKENS)}
    tokenizer = Qwen2Tokenizer(
        vocab=learned["vocab"] | specials,
        merges=[tuple(merge) for merge in learned["merges"]],
        unk_token=None,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=["<|im_start|>"],
        model_max_length=CONTEXT_LENGTH,
    )
    tokenizer.chat_template = named_template("qwen")
    return tokenizer


def build_model(tokenizer: "Qwen2Tokenizer", **overrides: Any) -> "Qwen2ForCausalLM":
    """A float32 Qwen2 with random weights for a tokenizer; `overrides` are fields of Qwen2Config."""
    import torch
    from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM

    settings = {
        "vocab_size": len(tokenizer),
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 2,
        # Heads of 64: vLLM on a CPU does not take smaller ones than 32.
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": CONTEXT_LENGTH,
        "tie_word_embeddings": True,
        # 1 / sqrt(hidden size): with Qwen's 0.02, made for 2048, so narrow a model learns ten times as slowly.
        "initializer_range": 0.0625,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    model = Qwen2ForCausalLM(Qwen2Config(**settings | overrides))
    # What a block adds begins as small as the embeddings it is added to: larger, it hides which token it was added to,
    # and a tied embedding cannot be larger, because the head would begin with extreme logits.
    with torch.no_grad():
        for name, weights in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                weights *= model.config.initializer_range
    # Like Qwen2.5's: generation also ends at the end of a document.
    model.generation_config = GenerationConfig(
        eos_token_id=[tokenizer.eos_token_id, tokenizer.pad_token_id], pad_token_id=tokenizer.pad_token_id
    )
    return model


# ---------------------------------------------------------------- the folder


def write_tiny_model(
    output_dir: str | Path,
    texts: list[str],
    seed: int = 42,
    vocab_size: int = VOCAB_SIZE,
    max_token_length: int | None = None,
    **overrides: Any,
) -> bool:
    """Write tokenizer and model into a folder; False if it already has the same ones.

    Raises UserError for a folder with other contents than an earlier tiny model.
    """
    output_dir = Path(output_dir)
    record_file = output_dir / RECORD_FILE
    settings = {"seed": seed, "vocab_size": vocab_size, "max_token_length": max_token_length, **overrides}
    record = {"settings": settings, "fingerprint": fingerprint(settings, texts)}
    record_text = json.dumps(record, indent=2) + "\n"
    if record_file.is_file():
        if record_file.read_text(encoding="utf-8") == record_text:
            return False
    elif output_dir.exists() and (not output_dir.is_dir() or any(output_dir.iterdir())):
        raise UserError(f"--output_dir {output_dir}: holds something else; name another folder")
    refuse_unwritable(output_dir, "--output_dir")

    import torch

    # Empty until everything is written: a run that was stopped is done again.
    output_dir.mkdir(parents=True, exist_ok=True)
    record_file.write_text("{}\n", encoding="utf-8")
    tokenizer = train_tokenizer(texts, vocab_size, max_token_length)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build_model(tokenizer, **overrides)
    tokenizer.save_pretrained(output_dir)
    model.save_pretrained(output_dir)
    record_file.write_text(record_text, encoding="utf-8")
    return True


def fingerprint(settings: dict[str, Any], texts: list[str]) -> str:
    """The sha256 of all that decides the folder's contents: settings, texts, template and this script."""
    decisions = [settings, texts, named_template("qwen"), Path(__file__).read_text(encoding="utf-8")]
    return hashlib.sha256(json.dumps(decisions, sort_keys=True).encode()).hexdigest()


# ---------------------------------------------------------------- main


def main(argv: list[str] | None = None) -> None:
    """Parse the flags, read the texts, write the folder."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output_dir", type=Path, default=Path("models/tiny-qwen2"), help="the new folder")
    parser.add_argument("--data_dir", type=Path, default=Path("data"), help="its texts train the tokenizer")
    parser.add_argument("--shape", choices=SHAPES, default="tiny", help="layers, widths and vocabulary")
    parser.add_argument("--vocab_size", type=int, help="tokenizer entries, at most; by default those of the shape")
    parser.add_argument("--seed", type=int, default=42, help="of the random weights")
    args = parser.parse_args(argv)

    texts = read_texts(args.data_dir)
    shape = SHAPES[args.shape] | ({"vocab_size": args.vocab_size} if args.vocab_size is not None else {})
    if write_tiny_model(args.output_dir, texts, seed=args.seed, **shape):
        print(f"{args.output_dir}: wrote a tiny Qwen2 and its tokenizer, trained on {len(texts):,} texts")
    else:
        print(f"{args.output_dir}: already made with these settings and data, nothing to do")


if __name__ == "__main__":
    run_script(main)
