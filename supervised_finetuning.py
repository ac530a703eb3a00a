"""Supervised fine-tuning: teach a model to answer, from dialogues.

Input: dialogues (ShareGPT, OpenAI messages, Alpaca or question/answer; jsonl, json, csv, parquet).
Output: `--output_dir` with checkpoint-N, checkpoint-best (a LoRA adapter, or a model with --use_peft False),
train_results.json, eval_results.json, trainer_state.json, loss.png and TensorBoard events in runs/.
Loss: cross entropy on the assistant's replies and their end tokens, the mean over all learned tokens of a step
(Ouyang et al. 2022, https://arxiv.org/abs/2203.02155, section 3.5).

    CUDA_VISIBLE_DEVICES=0 python supervised_finetuning.py --model_name_or_path Qwen/Qwen2.5-3B-Instruct ...
    CUDA_VISIBLE_DEVICES=0,1 torchrun --nproc_per_node 2 supervised_finetuning.py ...

Launcher: run_sft.sh.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import medtune.libraries  # noqa: F401 - first: it imports the libraries in half of their time

# isort: split
from datasets import Dataset
from loguru import logger

from medtune.arguments import DataArguments, LoraArguments, ModelArguments, RunArguments, StageArgumentParser
from medtune.errors import UserError, run_script
from medtune.models.adapters import load_for_training
from medtune.models.lineage import check_model_path
from medtune.models.loading import load_tokenizer
from medtune.models.lora_layers import describe_trainable
from medtune.models.model_folder import lineage_of
from medtune.models.vocabulary import check_vocabulary, warn_of_dead_tokens
from medtune.reading.encoders import DialogueEncoder
from medtune.reading.readers import read_dialogues
from medtune.reading.stage_data import prepare_data
from medtune.reading.tokenization import load_chat_template, mark_learned, turn_token_ids
from medtune.training.causal_lm_trainer import CausalLMConfig, CausalLMTrainer, Collator
from medtune.training.checkpoints import BEST
from medtune.training.layout import TextsOfRow, refuse_mixed_texts
from medtune.training.log import log_facts
from medtune.training.precision import base_dtype
from medtune.training.run import finish_run, inference_command, is_finished, start_run, train
from medtune.training.template_choice import TemplateArguments, choose_thinking

# ---------------------------------------------------------------- arguments


@dataclass
class SFTArguments(TemplateArguments):
    model_max_length: int = field(default=2048, metadata={"help": "Longest dialogue in tokens, prompt and replies."})
    truncation: Literal["drop", "cut_prompt_start", "cut_reply"] = field(
        default="drop",
        metadata={
            "help": "A dialogue over --model_max_length: leave it out and count it, leave out its oldest exchanges, "
            "or cut its end (that reply then gets no end token)."
        },
    )
    train_on_inputs: bool = field(default=False, metadata={"help": "Learn the prompts too, not the replies alone."})
    packing: bool = field(
        default=False, metadata={"help": "Several dialogues a row, of at most --model_max_length tokens in all."}
    )

    def __post_init__(self):
        if self.model_max_length < 8:
            raise UserError(f"--model_max_length {self.model_max_length}: no dialogue fits; give a number of tokens")


# ---------------------------------------------------------------- data

DIALOGUES = TextsOfRow("dialogue", "--packing False gives each a row of its own")


def pack(dataset: Dataset, max_length: int) -> Dataset:
    """Best-fit-decreasing packing into rows of at most `max_length` tokens; positions restart with each dialogue."""
    from trl import pack_dataset  # seconds that only who packs should wait

    sources = dataset["source"][:]
    # pack_dataset joins list columns of one length, so each token carries the index of its dialogue.
    indexed = dataset.map(lambda row, index: {"dialogue": [index] * row["length"]}, with_indices=True)
    packed = pack_dataset(indexed.select_columns(["input_ids", "labels", "dialogue"]), max_length, strategy="bfd")

    def describe(row: dict) -> dict:
        return {"source": [sources[index] for index in dict.fromkeys(row["dialogue"])], "length": len(row["input_ids"])}

    return packed.map(describe, remove_columns=["dialogue"])


# ---------------------------------------------------------------- main


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    # ------------------------------------------------------------ arguments
    parser = StageArgumentParser(
        [ModelArguments, DataArguments, LoraArguments, RunArguments, SFTArguments, CausalLMConfig]
    )
    model_args, data_args, lora_args, run_args, sft_args, training_args = parser.parse(argv)
    path = model_args.model_name_or_path
    check_model_path(path, "--model_name_or_path", model_args.allow_pickle_weights)
    if sft_args.packing:
        refuse_mixed_texts(DIALOGUES, path, **model_args.hub_options)

    # ------------------------------------------------------------ run
    checkpoint = start_run("supervised fine-tuning", training_args, run_args, parser.notes)
    model_args.torch_dtype = base_dtype(model_args, lora_args, training_args, parser.given, checkpoint)

    # ------------------------------------------------------------ tokenizer and template
    tokenizer = load_tokenizer(path, model_args.tokenizer_name_or_path, **model_args.hub_options)
    thinking = choose_thinking(sft_args, path, checkpoint)
    chat_template = load_chat_template(tokenizer, sft_args.template_name, thinking)

    # ------------------------------------------------------------ data
    encoder = DialogueEncoder(
        tokenizer, chat_template, sft_args.model_max_length, sft_args.truncation, sft_args.train_on_inputs
    )
    data = prepare_data(read_dialogues, encoder, data_args, training_args, model_args.cache_dir)
    train_dataset = data.train
    example = mark_learned(tokenizer, train_dataset[0]["input_ids"], train_dataset[0]["labels"])
    if sft_args.packing:
        train_dataset = pack(train_dataset, sft_args.model_max_length)
        data.facts["packed rows"] = f"{len(train_dataset)} of at most {sft_args.model_max_length} tokens"

    # ------------------------------------------------------------ what a resumed run goes on with
    template = sft_args.template_name
    record = {"stage": "sft", "template": template, "thinking": chat_template.thinking, "flags": parser.given}
    lineage = lineage_of(model_args, data_args, **record)
    if is_finished(training_args, train_dataset, lineage, checkpoint):
        return {}

    # ------------------------------------------------------------ model
    model = load_for_training(path, lora_args, checkpoint=checkpoint, **model_args.loading_options)
    check_vocabulary(tokenizer, model)
    warn_of_dead_tokens(model, tokenizer, *turn_token_ids(tokenizer, chat_template))

    # ------------------------------------------------------------ train
    trainer = CausalLMTrainer(
        model=model,
        args=training_args,
        data_collator=Collator(tokenizer.pad_token_id),
        train_dataset=train_dataset,
        eval_dataset=data.eval,
        texts_of_row=DIALOGUES if sft_args.packing else None,
        processing_class=tokenizer,
    )
    facts = {"model": f"{path}: {describe_trainable(model)}"}
    facts |= {"template": lineage.asked_by} | data.facts
    log_facts(trainer, facts)
    logger.info(f"the first example, learned tokens between « and »:\n{example}")
    keeper = train(trainer, lineage, checkpoint, run_args, model_args.hub_options)

    # ------------------------------------------------------------ save and evaluate
    best = Path(training_args.output_dir, BEST)
    return finish_run(trainer, keeper, inference_command(lineage, best, lora_args.use_peft))


if __name__ == "__main__":
    run_script(main)
