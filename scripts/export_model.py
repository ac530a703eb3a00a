"""Export a merged model or full checkpoint: GGUF for llama.cpp and Ollama, or 4/8-bit weights by bitsandbytes.

Input: a merged model (merge_peft_adapter.py) or a full checkpoint.
Output: `--output_dir` with model.gguf and, where its template can be told in one, a Modelfile for Ollama; or a folder
that transformers and vLLM load. It is loaded back and its perplexity compared before it appears.

    python scripts/export_model.py --model outputs-dpo-qwen2.5-3b-merged --output_dir outputs-gguf --gguf_type q8_0
    python scripts/export_model.py --model outputs-dpo-qwen2.5-3b-merged --output_dir outputs-4bit --format bnb-4bit
    python scripts/export_model.py --model outputs-merged --output_dir outputs-gguf --gguf_type q4_K_M --llama_cpp DIR
    ollama create medical -f outputs-gguf/Modelfile && ollama run medical

GGUF of Qwen2, Qwen2.5 and Qwen3 is written here; of other families by the converter in `--llama_cpp DIR`, a checkout of
llama.cpp, whose `llama-quantize` makes q4_K_M and q5_K_M.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import medtune.libraries  # noqa: F401 - first: it imports the libraries in half of their time

# isort: split
from loguru import logger
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from medtune.arguments import StageArgumentParser
from medtune.errors import Unusable, UserError, run_script
from medtune.export.comparison import LARGEST_CHANGE, EncodedReply, check_same_tokens, perplexity
from medtune.export.gguf_file import GGUF_TYPES, load_gguf, why_not_written, write_gguf
from medtune.export.llama_cpp import (
    CONVERTER_TYPES,
    convert,
    find_converter,
    find_quantizer,
    quantize,
    scores_by_llama_cpp,
)
from medtune.export.ollama import modelfile
from medtune.models.lineage import is_adapter
from medtune.models.loading import dtype_for_use, load_base_model, place_for_use
from medtune.models.model_folder import ModelFolder, choose_template, describe_folder, refuse_reward_model
from medtune.models.vocabulary import check_vocabulary
from medtune.output_files import new_folder
from medtune.reading.chat_template import ChatTemplate
from medtune.reading.finding import find_files
from medtune.reading.readers import load_dialogues
from medtune.reading.tokenization import encode_dialogue, stop_token_ids
from medtune.training.log import start_log

GGUF_FILE = "model.gguf"
MAX_EVAL_TOKENS = 1024

# ---------------------------------------------------------------- arguments


@dataclass
class ExportArguments:
    model: str = field(metadata={"help": "Folder of a merged model or a full checkpoint."})
    output_dir: str = field(metadata={"help": "New folder for the export."})
    format: Literal["gguf", "bnb-4bit", "bnb-8bit"] = field(
        default="gguf", metadata={"help": "gguf for llama.cpp and Ollama; the others for transformers and vLLM."}
    )
    gguf_type: Literal["f32", "f16", "bf16", "q8_0", "q5_K_M", "q4_K_M", "q4_0"] = field(
        default="q8_0", metadata={"help": "Type of the weights in a GGUF file."}
    )
    llama_cpp: str | None = field(
        default=None,
        metadata={"help": "A checkout of llama.cpp: its converter writes the families that are not written here."},
    )
    eval_file: str = field(
        default="data/eval/questions.jsonl", metadata={"help": "Dialogues whose replies the perplexity is taken on."}
    )
    num_samples: int = field(default=64, metadata={"help": "Dialogues of --eval_file that are used."})

    def __post_init__(self):
        if self.num_samples < 1:
            raise UserError(f"--num_samples {self.num_samples}: give a number of dialogues of at least 1")


# ---------------------------------------------------------------- the comparison


def read_dialogues_to_compare(
    export_args: ExportArguments, tokenizer: PreTrainedTokenizerBase, chat_template: ChatTemplate, context: int
) -> list[EncodedReply]:
    """Ids and labels of the dialogues, cut at the end if long."""
    files, _ = find_files(export_args.eval_file, "--eval_file")
    limit = min(context, MAX_EVAL_TOKENS)
    rows = []
    for dialogue in load_dialogues(files, None)[0][: export_args.num_samples]:
        try:
            ids_and_labels = encode_dialogue(
                tokenizer, chat_template, dialogue.messages, dialogue.tools, max_length=limit, truncation="cut_reply"
            )
        except Unusable as unusable:
            raise UserError(f"{dialogue.source}: {unusable.detail}") from None
        rows.append(ids_and_labels)
    return rows


# ---------------------------------------------------------------- export, load back, compare


def load_to_compare(source: ModelFolder) -> PreTrainedModel:
    model = place_for_use(load_base_model(source.base_model, flag="--model", torch_dtype=dtype_for_use("auto")))
    check_vocabulary(source.tokenizer, model)
    return model


def export_gguf(
    source: ModelFolder,
    chat_template: ChatTemplate,
    rows: list[EncodedReply],
    file: Path,
    gguf_type: str,
    converter: Path | None,
    quantizer: Path | None,
) -> tuple[float, float]:
    """Write a GGUF file, by llama.cpp's converter or the one here, and then by the quantizer if it is given.

    Returns the perplexity before and after: by llama.cpp itself, of the beginnings, where its converter wrote the file.
    """
    model, tokenizer = load_to_compare(source), source.tokenizer
    # Weights of 16 bits go through the quantizer.
    whole, whole_type = (file.with_name("whole.gguf"), "bf16") if quantizer else (file, gguf_type)
    if converter:
        convert(converter, source.base_model, source.config, whole, whole_type)
    else:
        before = perplexity(model, rows)
        write_gguf(model, tokenizer, Path(source.base_model), whole, whole_type)
        del model
    if quantizer:
        quantize(quantizer, whole, file, gguf_type)
    if converter:
        scored, after = scores_by_llama_cpp(file, tokenizer, chat_template, rows)
        return perplexity(model, scored), after
    in_file = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    check_same_tokens(tokenizer, lambda text: in_file.encode(text, add_special_tokens=False), rows)
    return before, perplexity(place_for_use(load_gguf(file)), rows)


def export_quantized(
    source: ModelFolder, chat_template: ChatTemplate, rows: list[EncodedReply], folder: Path, kind: str
) -> tuple[float, float]:
    """Write a folder with the weights in 4 or 8 bits. Returns the perplexity before and after."""
    before = perplexity(load_to_compare(source), rows)
    bits = {"bnb-4bit": "load_in_4bit", "bnb-8bit": "load_in_8bit"}[kind]
    model = load_base_model(source.base_model, flag="--model", torch_dtype=dtype_for_use("bfloat16"), **{bits: True})
    model.generation_config.eos_token_id = stop_token_ids(source.tokenizer, chat_template)
    model.save_pretrained(folder)
    source.tokenizer.save_pretrained(folder)
    del model
    return before, perplexity(load_base_model(str(folder), flag="--output_dir"), rows)


def write_modelfile(chat_template: ChatTemplate, source: ModelFolder, folder: Path) -> None:
    text = modelfile(chat_template, GGUF_FILE, source.context, source.tokenizer.bos_token)
    if text is None:
        logger.info("no Modelfile: the template is more than texts around each turn; llama.cpp takes it from the file")
    else:
        Path(folder, "Modelfile").write_text(text, encoding="utf-8")


# ---------------------------------------------------------------- main


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    # ------------------------------------------------------------ arguments
    parser = StageArgumentParser([ExportArguments])
    (export_args,) = parser.parse(argv)
    start_log()
    for note in parser.notes:
        logger.info(note)
    path, as_gguf = export_args.model, export_args.format == "gguf"
    kind = export_args.gguf_type if as_gguf else export_args.format
    if is_adapter(path):
        raise UserError(f"--model {path}: an adapter; make one model of it and its base with merge_peft_adapter.py")
    if not Path(path).exists():
        raise UserError(f"--model {path}: no such folder; download or merge it first")

    # ------------------------------------------------------------ tokenizer, data
    source = describe_folder(path, "--model")
    refuse_reward_model(source)
    chat_template = choose_template(source, None)
    converter = quantizer = None
    if as_gguf and (why := why_not_written(source.tokenizer, source.config)):
        converter = find_converter(export_args.llama_cpp, f"--model {path}: {why}")
    if as_gguf and kind not in (CONVERTER_TYPES if converter else GGUF_TYPES):
        quantizer = find_quantizer(export_args.llama_cpp, kind)
    rows = read_dialogues_to_compare(export_args, source.tokenizer, chat_template, source.context)

    # ------------------------------------------------------------ export, load back, compare
    with new_folder(Path(export_args.output_dir), "--output_dir", overwrite=False) as folder:
        if as_gguf:
            file = folder / GGUF_FILE
            before, after = export_gguf(source, chat_template, rows, file, kind, converter, quantizer)
            write_modelfile(chat_template, source, folder)
        else:
            before, after = export_quantized(source, chat_template, rows, folder, kind)
        change = after / before - 1
        what = "beginnings of replies" if converter else "replies"
        logger.info(
            f"perplexity of {len(rows)} {what} of {export_args.eval_file}: {before:.4f} before, {after:.4f} after "
            f"({change:+.2%})"
        )
        if not abs(change) <= LARGEST_CHANGE[kind]:  # nan is no number that passes
            raise UserError(
                f"--output_dir {export_args.output_dir}: perplexity moves by {change:+.2%}, in a sound {kind} export "
                f"by {LARGEST_CHANGE[kind]:.0%} at most: the export differs too much; nothing is written. "
                "These weights do not bear that type: take a finer --gguf_type or --format"
            )
    logger.info(f"done: {export_args.output_dir}")
    return {"before": before, "after": after}


if __name__ == "__main__":
    run_script(main)
