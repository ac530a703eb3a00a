"""Export a merged model or full checkpoint: GGUF for llama.cpp and Ollama, or 4/8-bit weights by bitsandbytes.

Input: a merged model (merge_peft_adapter.py) or a full checkpoint; GGUF for Qwen2 and Qwen2.5 models.
Output: `--output_dir` with model.gguf and, for ChatML templates, a Modelfile for Ollama; or a folder that
transformers and vLLM load. It is loaded back and its perplexity on `--eval_file` compared before it appears.

    python scripts/export_model.py --model outputs-dpo-qwen2.5-3b-merged --output_dir outputs-gguf --gguf_type q8_0
    python scripts/export_model.py --model outputs-dpo-qwen2.5-3b-merged --output_dir outputs-4bit --format bnb-4bit
    ollama create medical -f outputs-gguf/Modelfile && ollama run medical
"""

import json
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import medtune.libraries  # noqa: F401 - first: it imports the libraries in half of their time

# isort: split
import gguf
import torch
from loguru import logger
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from medtune.arguments import StageArgumentParser
from medtune.errors import Unusable, UserError, run_script
from medtune.models.lineage import is_adapter
from medtune.models.loading import dtype_for_use, load_base_model, place_for_use
from medtune.models.model_folder import choose_template, describe_folder, refuse_reward_model
from medtune.models.vocabulary import check_vocabulary
from medtune.output_files import new_folder
from medtune.reading.finding import find_files
from medtune.reading.readers import load_dialogues
from medtune.reading.tokenization import IGNORED_LABEL, encode_dialogue, stop_token_ids
from medtune.training.log import start_log
from template import ChatTemplate, Message

GGUF_FILE = "model.gguf"
GGUF_TYPES = {
    "f32": gguf.LlamaFileType.ALL_F32,
    "f16": gguf.LlamaFileType.MOSTLY_F16,
    "bf16": gguf.LlamaFileType.MOSTLY_BF16,
    "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
    "q4_0": gguf.LlamaFileType.MOSTLY_Q4_0,
}
# A copy whose perplexity differs by more is faulty. Eight bits move that of a trained model by 0.0001 and that
# of random weights by 0.03; four bits by 0.004 and 0.23.
LARGEST_CHANGE = {
    **dict.fromkeys(("f32", "f16", "bf16"), 0.02),
    **{"q8_0": 0.05, "bnb-8bit": 0.1, "q4_0": 0.3, "bnb-4bit": 0.3},
}
MAX_EVAL_TOKENS = 1024
# Fields of a Qwen2 config.json that `write_gguf` writes, and those that change nothing a trained model says; rope
# parameters and sliding windows are looked at one by one.
WRITTEN = {
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings", "rope_parameters"),
}
WITHOUT_EFFECT = {
    *("transformers_version", "architectures", "dtype", "id2label", "label2id", "problem_type", "_name_or_path"),
    *("output_hidden_states", "output_attentions", "return_dict", "use_cache", "initializer_range"),
    *("attention_dropout", "pad_token_id", "bos_token_id", "eos_token_id"),
    *("use_sliding_window", "sliding_window", "max_window_layers"),  # `layer_types` says where one is used
}
# Names in rope_parameters and in GGUF of what the scalings that llama.cpp knows are made of.
ROPE_SCALING_KEYS = {
    "rope_type": gguf.Keys.Rope.SCALING_TYPE,
    "factor": gguf.Keys.Rope.SCALING_FACTOR,
    "original_max_position_embeddings": gguf.Keys.Rope.SCALING_ORIG_CTX_LEN,
}
# Where others are left out or say this, llama.cpp computes as transformers does.
ROPE_DEFAULTS = {"beta_fast": 32, "beta_slow": 1, "truncate": True, "partial_rotary_factor": 1.0}

# ---------------------------------------------------------------- arguments


@dataclass
class ExportArguments:
    model: str = field(metadata={"help": "Folder of a merged model or a full checkpoint."})
    output_dir: str = field(metadata={"help": "New folder for the export."})
    format: Literal["gguf", "bnb-4bit", "bnb-8bit"] = field(
        default="gguf", metadata={"help": "gguf for llama.cpp and Ollama; the others for transformers and vLLM."}
    )
    gguf_type: Literal["f32", "f16", "bf16", "q8_0", "q4_0"] = field(
        default="q8_0", metadata={"help": "Type of the weights in a GGUF file."}
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
) -> list[tuple[list[int], list[int]]]:
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


@torch.no_grad()
def perplexity(model: PreTrainedModel, rows: Sequence[tuple[list[int], list[int]]]) -> float:
    """exp of the mean negative log-likelihood of the learned tokens, those of the replies."""
    total, n_tokens = 0.0, 0
    for ids, labels in rows:
        logits = model(input_ids=torch.tensor([ids], device=model.device), use_cache=False).logits[0, :-1].float()
        targets = torch.tensor(labels[1:], device=model.device)
        total += torch.nn.functional.cross_entropy(logits, targets, ignore_index=IGNORED_LABEL, reduction="sum").item()
        n_tokens += int((targets != IGNORED_LABEL).sum())
    return math.exp(total / n_tokens)


# ---------------------------------------------------------------- GGUF


def check_exportable(model_path: str, tokenizer: PreTrainedTokenizerBase, architecture: str) -> None:
    """Refuse what llama.cpp would read otherwise than transformers does."""
    if architecture != "Qwen2ForCausalLM":
        raise UserError(
            f"--model {model_path}: {architecture}; GGUF is written for Qwen2ForCausalLM (Qwen2, Qwen2.5) alone, "
            "others by llama.cpp's convert_hf_to_gguf.py"
        )
    split = json.loads(tokenizer.backend_tokenizer.to_str())["pre_tokenizer"]
    # The pattern that llama.cpp knows by the name qwen2.
    known = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
        r"\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    if known not in [part.get("pattern", {}).get("Regex") for part in (split or {}).get("pretokenizers", [])]:
        raise UserError(
            f"--model {model_path}: its tokenizer splits text otherwise than Qwen2's, and no GGUF is written for it"
        )


def check_settings(model_path: str, config: PretrainedConfig) -> None:
    """Refuse fields of config.json that change what the model says and have no place in the file."""
    default = type(config)(num_hidden_layers=config.num_hidden_layers).to_dict()
    default["head_dim"] = config.hidden_size // config.num_attention_heads
    default["quantization_config"] = None
    odd = {
        name: getattr(config, name)
        for name in default.keys() - WRITTEN - WITHOUT_EFFECT
        if getattr(config, name, default[name]) != default[name]
    }
    if odd.pop("layer_types", None) and config.sliding_window < config.max_position_embeddings:
        odd["sliding_window"] = config.sliding_window
    rope = config.rope_parameters
    if rope["rope_type"] not in ("default", "linear", "yarn"):
        odd["rope_type"] = rope["rope_type"]
    elif rope["rope_type"] != "default":
        known = rope.keys() & {*ROPE_SCALING_KEYS, "rope_theta", "type"}
        odd |= {name: rope[name] for name in rope.keys() - known if rope[name] not in (None, ROPE_DEFAULTS.get(name))}
    if odd:
        named = ", ".join(f"{name} {value!s:.60}" for name, value in sorted(odd.items()))
        raise UserError(
            f"--model {model_path}: {named} in its config.json: the GGUF file would leave it out and say something "
            "else; llama.cpp's convert_hf_to_gguf.py may know it, and --format bnb-8bit or bnb-4bit keeps it"
        )


def write_gguf(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, source: Path, file: Path, gguf_type: str
) -> None:
    """Weights, hyper-parameters and tokenizer in one file, under the names that llama.cpp gives them."""
    config = model.config
    architecture = gguf.MODEL_ARCH.QWEN2
    writer = gguf.GGUFWriter(file, gguf.MODEL_ARCH_NAMES[architecture])
    writer.add_name(source.name)
    writer.add_file_type(GGUF_TYPES[gguf_type])
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    rope = config.rope_parameters
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] != "default":
        writer.add_rope_scaling_type(gguf.RopeScalingType(rope["rope_type"]))
        writer.add_rope_scaling_factor(rope["factor"])
    if rope["rope_type"] == "yarn":
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)

    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    texts, types = zip(*vocabulary(tokenizer, config.vocab_size), strict=True)
    writer.add_token_list(texts)
    writer.add_token_types(types)
    special = gguf.SpecialVocab(source, load_merges=True, n_vocab=config.vocab_size)
    special.chat_template = tokenizer.chat_template
    special.special_token_ids |= {"eos": tokenizer.eos_token_id, "pad": tokenizer.pad_token_id}
    special.add_to_gguf(writer, quiet=True)
    writer.add_add_bos_token(False)

    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    for name, tensor in tensors_of(model):
        new_name = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert new_name is not None, f"{name} has no name in GGUF"
        writer.add_tensor(new_name, *convert_tensor(tensor, gguf_type))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def vocabulary(tokenizer: PreTrainedTokenizerBase, n_rows: int) -> Iterator[tuple[str, gguf.TokenType]]:
    """Text and kind of each row of the embedding; rows beyond the tokenizer are marked as unused."""
    by_id = {index: token for token, index in tokenizer.get_vocab().items()}
    for index in range(n_rows):
        if index not in by_id:
            yield f"[PAD{index}]", gguf.TokenType.UNUSED
        elif index in tokenizer.added_tokens_decoder:
            added = tokenizer.added_tokens_decoder[index]
            yield added.content, gguf.TokenType.CONTROL if added.special else gguf.TokenType.USER_DEFINED
        else:
            yield by_id[index], gguf.TokenType.NORMAL


def tensors_of(model: PreTrainedModel) -> Iterator[tuple[str, torch.Tensor]]:
    """Each tensor once: a head that shares the embedding's weights is left out, as llama.cpp expects."""
    tied = model.config.tie_word_embeddings
    for name, tensor in model.state_dict().items():
        if not (tied and name == "lm_head.weight"):
            yield name, tensor


def convert_tensor(tensor: torch.Tensor, gguf_type: str) -> tuple:
    """The values for GGUF and their type; norms, biases and rows not divisible into blocks stay float32."""
    values = tensor.float().cpu().numpy()
    kind = gguf.GGMLQuantizationType[gguf_type.upper()]
    block_size, _ = gguf.GGML_QUANT_SIZES[kind]
    if tensor.ndim == 1 or tensor.shape[-1] % block_size:
        kind = gguf.GGMLQuantizationType.F32
    return gguf.quants.quantize(values, kind), None, kind


def load_gguf(file: Path) -> PreTrainedModel:
    """Load a GGUF file with its rope scaling, which transformers 5.24 reads for gpt-oss only."""
    config = AutoConfig.from_pretrained(file.parent, gguf_file=file.name)
    fields = gguf.GGUFReader(file).fields
    for name, key in ROPE_SCALING_KEYS.items():
        if field := fields.get(key.format(arch=config.model_type)):
            config.rope_parameters[name] = field.contents()
    return AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, config=config, dtype=torch.float32)


# ---------------------------------------------------------------- Ollama


def modelfile(chat_template: ChatTemplate, context: int) -> str | None:
    """Ollama's Modelfile for a ChatML template; None for any other, which its TEMPLATE cannot reproduce."""
    default_system = default_system_of(chat_template)
    probe: list[Message] = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "u"},
        {"role": "assistant", "content": "a"},
        {"role": "user", "content": "v"},
    ]
    try:
        is_chatml = chat_template.prompt(probe) == chatml(probe)
    except UserError:
        is_chatml = False
    if default_system is None or not is_chatml:
        return None
    lines = [f"FROM ./{GGUF_FILE}"]
    lines += [
        'TEMPLATE """{{ range .Messages }}<|im_start|>{{ .Role }}',
        "{{ .Content }}<|im_end|>",
        "{{ end }}<|im_start|>assistant",
        '"""',
    ]
    lines += [f'SYSTEM """{default_system}"""'] if default_system else []
    lines += [f'PARAMETER stop "{token}"' for token in chat_template.stop_tokens]
    lines += [f"PARAMETER num_ctx {min(context, 4096)}", "PARAMETER temperature 0", "PARAMETER repeat_penalty 1.0"]
    return "\n".join(lines) + "\n"


def chatml(messages: Sequence[Message]) -> str:
    turns = [f"<|im_start|>{message['role']}\n{message['content']}<|im_end|>\n" for message in messages]
    return "".join(turns) + "<|im_start|>assistant\n"


def default_system_of(chat_template: ChatTemplate) -> str | None:
    """The system text that the template adds by itself: "" for none, None if the prompt is not ChatML."""
    question: Message = {"role": "user", "content": "u"}
    prompt = chat_template.prompt([question])
    before, question_text, _ = prompt.partition(chatml([question]))
    if not question_text:
        return None
    if not before:
        return ""
    start, end = "<|im_start|>system\n", "<|im_end|>\n"
    return before[len(start) : -len(end)] if before.startswith(start) and before.endswith(end) else None


# ---------------------------------------------------------------- main


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    # ------------------------------------------------------------ arguments
    parser = StageArgumentParser([ExportArguments])
    (export_args,) = parser.parse(argv)
    start_log()
    for note in parser.notes:
        logger.info(note)
    path, as_gguf = export_args.model, export_args.format == "gguf"
    if is_adapter(path):
        raise UserError(f"--model {path}: an adapter; make one model of it and its base with merge_peft_adapter.py")
    if not Path(path).exists():
        raise UserError(f"--model {path}: no such folder; download or merge it first")

    # ------------------------------------------------------------ tokenizer, data
    source = describe_folder(path, "--model")
    refuse_reward_model(source)
    tokenizer, context = source.tokenizer, source.context
    chat_template = choose_template(source, None)
    if as_gguf:
        check_exportable(path, tokenizer, (source.config.architectures or [""])[0])
        check_settings(path, source.config)
    rows = read_dialogues_to_compare(export_args, tokenizer, chat_template, context)

    # ------------------------------------------------------------ export, load back, compare
    with new_folder(Path(export_args.output_dir), "--output_dir", overwrite=False) as folder:
        model = place_for_use(load_base_model(path, flag="--model", torch_dtype=dtype_for_use("auto")))
        check_vocabulary(tokenizer, model)
        before = perplexity(model, rows)

        if as_gguf:
            write_gguf(model, tokenizer, Path(path), folder / GGUF_FILE, export_args.gguf_type)
            del model
            exported = place_for_use(load_gguf(folder / GGUF_FILE))
            check_same_tokens(tokenizer, AutoTokenizer.from_pretrained(folder, gguf_file=GGUF_FILE), rows)
            text = modelfile(chat_template, context)
            if text is not None:
                Path(folder, "Modelfile").write_text(text, encoding="utf-8")
            else:
                logger.info("no Modelfile: the template is no ChatML; llama.cpp takes the one in the GGUF file")
        else:
            del model
            bits = {"bnb-4bit": "load_in_4bit", "bnb-8bit": "load_in_8bit"}[export_args.format]
            model = load_base_model(path, flag="--model", torch_dtype=dtype_for_use("bfloat16"), **{bits: True})
            model.generation_config.eos_token_id = stop_token_ids(tokenizer, chat_template)
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            del model
            exported = load_base_model(str(folder), flag="--output_dir")
        after = perplexity(exported, rows)
        change = after / before - 1
        logger.info(
            f"perplexity of {len(rows)} replies of {export_args.eval_file}: {before:.4f} before, {after:.4f} after "
            f"({change:+.2%})"
        )
        kind = export_args.gguf_type if as_gguf else export_args.format
        if not abs(change) <= LARGEST_CHANGE[kind]:  # nan is no number that passes
            raise UserError(
                f"--output_dir {export_args.output_dir}: perplexity moves by {change:+.2%}, in a sound {kind} export "
                f"by {LARGEST_CHANGE[kind]:.0%} at most: the export differs too much; nothing is written. "
                "These weights do not bear that type: take a finer --gguf_type or --format"
            )
    logger.info(f"done: {export_args.output_dir}")
    return {"before": before, "after": after}


def check_same_tokens(
    tokenizer: PreTrainedTokenizerBase, exported: PreTrainedTokenizerBase, rows: Sequence[tuple[list[int], list[int]]]
) -> None:
    """Refuse a file whose vocabulary or merges give other ids."""
    for ids, _ in rows:
        text = tokenizer.decode(ids)
        if exported.encode(text, add_special_tokens=False) != tokenizer.encode(text, add_special_tokens=False):
            raise UserError(
                f"the tokenizer in the GGUF file gives other tokens than the model's, such as for {text!r:.60}"
            )


if __name__ == "__main__":
    run_script(main)
