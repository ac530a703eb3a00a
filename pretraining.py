"""Continued pretraining: teach a base model the language and the facts of medical text.

Input: plain text, a document a line (.txt), or records with `text` (jsonl, json, csv, parquet).
Output: `--output_dir` with checkpoint-N, checkpoint-best (a LoRA adapter, or a model with --use_peft False),
train_results.json, eval_results.json, trainer_state.json, loss.png and TensorBoard events in runs/.
Loss: cross entropy on every token that something in its own document precedes (Gururangan et al. 2020,
https://arxiv.org/abs/2004.10964). Documents are joined by the end token and cut into blocks.

    CUDA_VISIBLE_DEVICES=0 python pretraining.py --model_name_or_path Qwen/Qwen2.5-3B ...
    CUDA_VISIBLE_DEVICES=0,1 torchrun --nproc_per_node 2 pretraining.py ...

Launcher: run_pt.sh.
"""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path

# Before the libraries: it keeps one of them from a misleading line.
from medtune.errors import UserError, run_script

# isort: split
import torch
from datasets import IterableDataset
from loguru import logger
from transformers import PreTrainedTokenizerBase

from medtune.arguments import DataArguments, LoraArguments, ModelArguments, RunArguments, StageArgumentParser
from medtune.models.adapters import load_for_training
from medtune.models.lineage import Lineage, base_of, check_model_path
from medtune.models.loading import load_tokenizer, weights_fingerprint
from medtune.models.lora_layers import describe_trainable
from medtune.models.vocabulary import check_vocabulary
from medtune.reading.blocks import cut_blocks, encode_documents, learned_bytes_per_token
from medtune.reading.encoding import mark_learned
from medtune.reading.finding import TEXT_ENDINGS, are_same_files, find_files
from medtune.reading.record_sets import read_documents
from medtune.reading.records import Document
from medtune.reading.rows import BLOCK_FEATURES, cached_blocks, load_part
from medtune.training.causal_lm_trainer import CausalLMConfig, CausalLMTrainer, Collator, TextsOfRow
from medtune.training.checkpoints import BEST, find_checkpoint
from medtune.training.log import log_facts
from medtune.training.run import finish_run, is_finished, start_run, train

# Documents that streaming tokenizes at a time; the buffer that it shuffles in blocks.
STREAM_BATCH = 1000
STREAM_SHUFFLE = 1000
# Of the first block, for the log.
EXAMPLE_TOKENS = 200

# ---------------------------------------------------------------- arguments


@dataclass
class PTTrainingArguments(CausalLMConfig):
    """Documents are always packed, by this stage itself."""

    packing: bool = field(default=False, init=False)
    padding_free: bool = field(default=False, init=False)


@dataclass
class PTArguments:
    block_size: int = field(default=1024, metadata={"help": "Tokens a block: what the model sees at a time."})
    packing_across_documents: bool = field(
        default=False,
        metadata={
            "help": "Let a document see the ones before it in its block; by default it does not, or the run is refused."
        },
    )
    streaming: bool = field(
        default=False,
        metadata={"help": "Read and tokenize while training, for text that does not fit; needs --max_steps."},
    )

    def __post_init__(self):
        if self.block_size < 8:
            raise UserError(f"--block_size {self.block_size}: too little to learn from; give a number of tokens")


# ---------------------------------------------------------------- data


def stream_training_part(
    data_args: DataArguments,
    pt_args: PTArguments,
    training_args: PTTrainingArguments,
    tokenizer: PreTrainedTokenizerBase,
) -> tuple[IterableDataset, dict[str, str]]:
    """The training documents as blocks that are made while training asks for them, over and over."""
    if training_args.max_steps <= 0:
        raise UserError("--streaming True: nobody knows where the data end, so give --max_steps")
    if data_args.max_train_samples is not None:
        raise UserError(
            "--streaming True: --max_train_samples draws from all records, which are not read; leave it out"
        )
    if training_args.do_eval and are_same_files(data_args.train_file_dir, data_args.validation_file_dir, TEXT_ENDINGS):
        raise UserError(
            "--streaming True: no part of the training files is held out; give --validation_file_dir others"
        )
    files, unread = find_files(data_args.train_file_dir or "", "--train_file_dir", TEXT_ENDINGS)
    stream = partial(stream_blocks, files, tokenizer, pt_args, data_args.on_bad_data)
    dataset = IterableDataset.from_generator(stream, features=BLOCK_FEATURES)
    dataset = dataset.shuffle(seed=training_args.seed, buffer_size=STREAM_SHUFFLE).repeat(None)
    # Each process reads all and takes its part: rows with names in them cannot be sent from one to the others.
    training_args.accelerator_config.dispatch_batches = False
    not_read = f", {len(unread)} with other endings not read" if unread else ""
    return dataset, {"train files": f"{len(files)} in {data_args.train_file_dir}{not_read}, streamed"}


def stream_blocks(
    files: Sequence[Path], tokenizer: PreTrainedTokenizerBase, pt_args: PTArguments, on_bad_data: str
) -> Iterator[dict]:
    """The blocks of the whole text, batch by batch: what a batch leaves over begins the next one.

    Raises UserError at the first bad record under "error"; the others are named in the log and left out.
    """
    waiting: dict[str, list] = {"input_ids": [], "source": []}
    results = read_documents(files)
    while batch := list(islice(results, STREAM_BATCH)):
        good = [result for result in batch if isinstance(result, Document)]
        encoded = encode_documents(tokenizer, {"text": [d.text for d in good], "source": [d.source for d in good]})
        bad = [str(result) for result in batch if not isinstance(result, Document)]
        for ids, source, fault in zip(encoded["input_ids"], encoded["source"], encoded["fault"], strict=True):
            if fault:
                bad.append(f"{source}: {fault.replace(chr(9), ': ')}")
            else:
                waiting["input_ids"].append(ids)
                waiting["source"].append(source)
        for line in bad:
            if on_bad_data == "error":
                raise UserError(f"{line}; mend it, or go on without: --on_bad_data drop")
            logger.warning(f"left out: {line}")
        if waiting["input_ids"]:
            *whole, tail = rows_of(cut_blocks(waiting, pt_args.block_size, pt_args.packing_across_documents))
            yield from whole
            waiting = last_tokens(waiting, tail["length"])
    if waiting["input_ids"]:
        yield from rows_of(cut_blocks(waiting, pt_args.block_size, pt_args.packing_across_documents))


def rows_of(blocks: dict[str, list]) -> list[dict]:
    """One dictionary of plain lists a block."""
    lists = blocks | {name: [ids.tolist() for ids in blocks[name]] for name in ("input_ids", "labels")}
    return [dict(zip(lists, row, strict=True)) for row in zip(*lists.values(), strict=True)]


def last_tokens(documents: dict[str, list], n_tokens: int) -> dict[str, list]:
    """The end of the joined documents: the last ones whole, and of the one before them what is left."""
    first = len(documents["input_ids"])
    while n_tokens > 0:
        first -= 1
        n_tokens -= len(documents["input_ids"][first])
    ids = documents["input_ids"][first:]
    if n_tokens < 0:
        ids[0] = ids[0][-n_tokens:]
    return {"input_ids": ids, "source": documents["source"][first:]}


def needs_one_row(model: torch.nn.Module) -> bool:
    """Whether a batch's blocks must be one row: FlashAttention (transformers 5.24) keeps documents apart only there."""
    return "flash" in model.config._attn_implementation


# ---------------------------------------------------------------- main


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    # ------------------------------------------------------------ arguments
    parser = StageArgumentParser(
        [ModelArguments, DataArguments, LoraArguments, RunArguments, PTArguments, PTTrainingArguments]
    )
    model_args, data_args, lora_args, run_args, pt_args, training_args = parser.parse(argv)
    check_model_path(model_args.model_name_or_path, "--model_name_or_path", model_args.allow_pickle_weights)

    # ------------------------------------------------------------ run
    start_run("continued pretraining", training_args, parser.notes)
    checkpoint = find_checkpoint(training_args, run_args.overwrite_output_dir)

    # ------------------------------------------------------------ tokenizer
    hub_options = {"cache_dir": model_args.cache_dir, "trust_remote_code": model_args.trust_remote_code}
    tokenizer = load_tokenizer(model_args.model_name_or_path, model_args.tokenizer_name_or_path, **hub_options)

    # ------------------------------------------------------------ data
    read = partial(
        cached_blocks,
        tokenizer=tokenizer,
        cache_dir=Path(model_args.cache_dir or "cache", "tokenized"),
        block_size=pt_args.block_size,
        packing_across_documents=pt_args.packing_across_documents,
        seed=training_args.seed,
    )
    load = partial(
        load_part,
        kind="documents",
        data_args=data_args,
        do_eval=training_args.do_eval,
        read=read,
        describe=lambda rows: f"{sum(rows['length']):,} in {len(rows):,} blocks of at most {pt_args.block_size}",
        endings=TEXT_ENDINGS,
    )
    train_dataset, train_facts = (
        stream_training_part(data_args, pt_args, training_args, tokenizer) if pt_args.streaming else load("train")
    )
    eval_dataset, eval_facts = load("eval") if training_args.do_eval else (None, {})
    first = next(iter(train_dataset))
    example = mark_learned(tokenizer, first["input_ids"][:EXAMPLE_TOKENS], first["labels"][:EXAMPLE_TOKENS])

    # ------------------------------------------------------------ model
    model = load_for_training(
        model_args.model_name_or_path,
        **vars(lora_args),
        torch_dtype=model_args.torch_dtype,
        load_in_4bit=model_args.load_in_4bit,
        load_in_8bit=model_args.load_in_8bit,
        device_map=model_args.device_map,
        flash_attn=model_args.flash_attn,
        allow_pickle_weights=model_args.allow_pickle_weights,
        **hub_options,
    )
    check_vocabulary(tokenizer, model)
    base_model = base_of(model_args.model_name_or_path)
    lineage = Lineage(
        base_model=base_model,
        parent=model_args.model_name_or_path if base_model != model_args.model_name_or_path else None,
        stage="pt",
        template="",
        data=str(data_args.train_file_dir),
        hidden_size=model.config.hidden_size,
        vocab_size=model.config.vocab_size,
        base_weights=weights_fingerprint(base_model, **hub_options),
        start_weights=weights_fingerprint(model_args.model_name_or_path, **hub_options),
        flags=parser.given,
    )

    # ------------------------------------------------------------ train
    is_one_row = needs_one_row(model)
    alone = TextsOfRow(
        "document", "--packing_across_documents True goes on, and lets a document see the ones before it in its block"
    )
    trainer = CausalLMTrainer(
        model=model,
        args=training_args,
        data_collator=Collator(tokenizer.pad_token_id, padding_free=is_one_row, rows_of_texts=not is_one_row),
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        bytes_per_token=learned_bytes_per_token(tokenizer, eval_dataset["labels"]) if eval_dataset else None,
        texts_of_row=None if pt_args.packing_across_documents else alone,
        processing_class=tokenizer,
    )
    facts = {"model": f"{model_args.model_name_or_path}: {describe_trainable(model)}"} | train_facts | eval_facts
    if pt_args.packing_across_documents:
        facts["a document sees"] = "the ones before it in its block"
    log_facts(trainer, facts)
    logger.info(f"the first block begins, learned tokens between « and »:\n{example}")
    if training_args.do_train and is_finished(trainer, lineage, checkpoint):
        return {}
    keeper = (
        train(trainer, lineage, checkpoint, run_args.logging_dir, run_args.max_bad_steps)
        if training_args.do_train
        else None
    )

    # ------------------------------------------------------------ save and evaluate
    best = Path(training_args.output_dir, BEST)
    return finish_run(
        trainer,
        keeper,
        next_command=f"{Path(sys.executable).name} supervised_finetuning.py --model_name_or_path {best} ...",
    )


if __name__ == "__main__":
    run_script(main)
