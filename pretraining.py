"""Continued pretraining: teach a base model the language and the facts of medical text.

Input: plain text, a document a line (.txt), or records with `text` (jsonl, json, csv, parquet).
Output: `--output_dir` with checkpoint-N, checkpoint-best (a LoRA adapter, or a model with --use_peft False),
train_results.json, eval_results.json, trainer_state.json, loss.png and TensorBoard events in runs/.
Loss: cross entropy on every token that something in its own document precedes (Gururangan et al. 2020,
https://arxiv.org/abs/2004.10964). Documents end with the end-of-text token, begin with what the tokenizer puts before
a text (Gemma's, Llama 3's bos), and are joined and cut into blocks; where a model's recurrent layers would mix those of
a block, each has rows of its own.

    CUDA_VISIBLE_DEVICES=0 python pretraining.py --model_name_or_path Qwen/Qwen2.5-3B ...
    CUDA_VISIBLE_DEVICES=0,1 torchrun --nproc_per_node 2 pretraining.py ...

Launcher: run_pt.sh.
"""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import count, islice
from pathlib import Path

import medtune.libraries  # noqa: F401 - first: it imports the libraries in half of their time

# isort: split
from datasets import IterableDataset
from loguru import logger

from medtune.arguments import DataArguments, LoraArguments, ModelArguments, RunArguments, StageArgumentParser
from medtune.errors import Unusable, UserError, run_script
from medtune.models.adapters import load_for_training
from medtune.models.lineage import check_model_path
from medtune.models.loading import load_tokenizer
from medtune.models.lora_layers import describe_trainable
from medtune.models.model_folder import lineage_of
from medtune.models.recurrence import why_texts_mix
from medtune.models.vocabulary import check_vocabulary
from medtune.reading.blocks import learned_bytes_per_token
from medtune.reading.encoders import DocumentEncoder
from medtune.reading.finding import RecordFile
from medtune.reading.parts import find_parts
from medtune.reading.readers import read_documents
from medtune.reading.records import BadRecord
from medtune.reading.stage_data import Data, prepare_data
from medtune.reading.tokenization import mark_learned
from medtune.training.causal_lm_trainer import CausalLMConfig, CausalLMTrainer, Collator
from medtune.training.checkpoints import BEST
from medtune.training.layout import TextsOfRow
from medtune.training.log import log_facts
from medtune.training.precision import base_dtype
from medtune.training.run import finish_run, is_finished, start_run, train

# Documents that streaming tokenizes at a time; the buffer that it shuffles in blocks.
STREAM_BATCH = 1000
STREAM_SHUFFLE = 1000
# Of the first block, for the log.
EXAMPLE_TOKENS = 200

# ---------------------------------------------------------------- arguments


@dataclass
class PTArguments:
    block_size: int = field(default=1024, metadata={"help": "Tokens a block: what the model sees at a time."})
    packing_across_documents: bool = field(
        default=False,
        metadata={
            "help": "Let a document see the ones before it in its block; by default it does not, and where a model "
            "cannot keep them apart it has rows of its own, or the run is refused."
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


def stream_data(
    encoder: DocumentEncoder, data_args: DataArguments, training_args: CausalLMConfig, cache_dir: str | None
) -> Data:
    """`prepare_data`, but the training blocks are made while training asks for them, over and over."""
    if training_args.max_steps <= 0:
        raise UserError("--streaming True: nobody knows where the data end, so give --max_steps")
    if data_args.max_train_samples is not None:
        raise UserError(
            "--streaming True: --max_train_samples draws from all records, which are not read; leave it out"
        )
    listings, held_out = find_parts(data_args, training_args.do_eval, encoder.kind, encoder.endings, cache_dir)
    if held_out:
        raise UserError(
            "--streaming True: no part of the training files is held out; give --validation_file_dir others"
        )
    blocks = partial(stream_blocks, listings["train"].files, encoder, data_args.on_bad_data)
    one_pass = IterableDataset.from_generator(blocks, features=encoder.block_features)
    passes = partial(shuffled_passes, one_pass, training_args.seed)
    dataset = IterableDataset.from_generator(passes, features=encoder.block_features)
    # Each process reads all and takes its part: rows with names in them cannot be sent from one to the others.
    training_args.accelerator_config.dispatch_batches = False
    facts = {name: f"{value}, streamed" for name, value in listings["train"].describe("train").items()}
    evaluation = prepare_data(read_documents, encoder, data_args, training_args, cache_dir, parts=("eval",))
    return Data(dataset, evaluation.eval, facts | evaluation.facts)


def shuffled_passes(one_pass: IterableDataset, seed: int) -> Iterator[dict]:
    """The blocks over and over, in another order each time."""
    for number in count():
        yield from one_pass.shuffle(seed=seed + number, buffer_size=STREAM_SHUFFLE)


def stream_blocks(files: Sequence[RecordFile], encoder: DocumentEncoder, on_bad_data: str) -> Iterator[dict]:
    """The blocks of the whole text, batch by batch; the tokens left over begin the next batch.

    Raises UserError at the first bad record under "error"; the others are named in the log and left out.
    """
    waiting: dict[str, list] = {"input_ids": [], "source": []}
    results = read_documents(files)
    while batch := list(islice(results, STREAM_BATCH)):
        for result in batch:
            try:
                if isinstance(result, BadRecord):
                    raise Unusable(result.reason, result.detail)
                waiting["input_ids"].append(encoder(result)["input_ids"])
                waiting["source"].append(result.source)
            except Unusable as fault:
                bad = BadRecord(result.source, fault.reason, fault.detail)
                if on_bad_data == "error":
                    raise UserError(f"{bad}; fix it, or go on without: --on_bad_data drop") from None
                logger.warning(f"left out: {bad}")
        if waiting["input_ids"] and encoder.one_document_a_row:
            yield from rows_of(encoder.blocks(waiting))
            waiting = {"input_ids": [], "source": []}
        elif waiting["input_ids"]:
            whole = rows_of(encoder.blocks(waiting))[:-1]
            yield from whole
            n_left = sum(map(len, waiting["input_ids"])) - sum(row["length"] for row in whole)
            waiting = last_tokens(waiting, n_left)
    if waiting["input_ids"]:
        yield from rows_of(encoder.blocks(waiting))


def rows_of(blocks: dict[str, list]) -> list[dict]:
    """One dictionary of plain lists a block."""
    lists = blocks | {name: [ids.tolist() for ids in blocks[name]] for name in ("input_ids", "labels")}
    return [dict(zip(lists, row, strict=True)) for row in zip(*lists.values(), strict=True)]


def last_tokens(documents: dict[str, list], n_tokens: int) -> dict[str, list]:
    """The last tokens of the joined documents: whole documents, and the rest of the one before them."""
    first = len(documents["input_ids"])
    while n_tokens > 0:
        first -= 1
        n_tokens -= len(documents["input_ids"][first])
    ids = documents["input_ids"][first:]
    if n_tokens < 0:
        ids[0] = ids[0][-n_tokens:]
    return {"input_ids": ids, "source": documents["source"][first:]}


# ---------------------------------------------------------------- main


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    # ------------------------------------------------------------ arguments
    parser = StageArgumentParser(
        [ModelArguments, DataArguments, LoraArguments, RunArguments, PTArguments, CausalLMConfig]
    )
    model_args, data_args, lora_args, run_args, pt_args, training_args = parser.parse(argv)
    check_model_path(model_args.model_name_or_path, "--model_name_or_path", model_args.allow_pickle_weights)

    # ------------------------------------------------------------ run
    checkpoint = start_run("continued pretraining", training_args, run_args, parser.notes)
    model_args.torch_dtype = base_dtype(model_args, lora_args, training_args, parser.given, checkpoint)

    # ------------------------------------------------------------ tokenizer
    path = model_args.model_name_or_path
    tokenizer = load_tokenizer(path, model_args.tokenizer_name_or_path, **model_args.hub_options)

    # ------------------------------------------------------------ data
    mixing = "" if pt_args.packing_across_documents else why_texts_mix(path, **model_args.hub_options)
    encoder = DocumentEncoder(tokenizer, pt_args.block_size, pt_args.packing_across_documents, bool(mixing))
    if pt_args.streaming:
        data = stream_data(encoder, data_args, training_args, model_args.cache_dir)
    else:
        data = prepare_data(read_documents, encoder, data_args, training_args, model_args.cache_dir)
    first = next(iter(data.train))
    example = mark_learned(tokenizer, first["input_ids"][:EXAMPLE_TOKENS], first["labels"][:EXAMPLE_TOKENS])

    # ------------------------------------------------------------ what a resumed run goes on with
    lineage = lineage_of(model_args, data_args, stage="pt", documents=encoder.form, flags=parser.given)
    if is_finished(training_args, data.train, lineage, checkpoint):
        return {}

    # ------------------------------------------------------------ model
    model = load_for_training(path, lora_args, checkpoint=checkpoint, **model_args.loading_options)
    check_vocabulary(tokenizer, model)

    # ------------------------------------------------------------ train
    alone = TextsOfRow(
        "document", "--packing_across_documents True goes on, and lets a document see the ones before it in its block"
    )
    trainer = CausalLMTrainer(
        model=model,
        args=training_args,
        data_collator=Collator(tokenizer.pad_token_id),
        train_dataset=data.train,
        eval_dataset=data.eval,
        bytes_per_token=learned_bytes_per_token(tokenizer, data.eval["labels"]) if data.eval else None,
        texts_of_row=None if pt_args.packing_across_documents or mixing else alone,
        processing_class=tokenizer,
    )
    facts = {"model": f"{path}: {describe_trainable(model)}"} | data.facts
    if pt_args.packing_across_documents:
        facts["a document sees"] = "the ones before it in its block"
    elif mixing:
        facts["a document has"] = f"rows of its own, which are padded: {mixing}"
    log_facts(trainer, facts)
    logger.info(f"the first block begins, learned tokens between « and »:\n{example}")
    keeper = train(trainer, lineage, checkpoint, run_args, model_args.hub_options)

    # ------------------------------------------------------------ save and evaluate
    best = Path(training_args.output_dir, BEST)
    return finish_run(
        trainer,
        keeper,
        next_command=f"{Path(sys.executable).name} supervised_finetuning.py --model_name_or_path {best} ...",
    )


if __name__ == "__main__":
    run_script(main)
