"""Merge a LoRA adapter of any stage into its base model, and write it only if the outputs agree.

Input: the base model and the adapter's folder. An adapter trained on a 4-bit or 8-bit base merges into the unquantized
one: merged into the quantized base, most of what it learned is rounded away.
Output: `--output_dir`, which loads like a downloaded model: safetensors in shards, the adapter's tokenizer and chat
template, generation settings that stop at the template's end tokens, lineage.json. What else the base's checkpoint
holds, such as a vision tower, is copied as it is.

The check: the model is written beside --output_dir, loaded again, and compared with the adapter on its base on 32 fixed
medical prompts, both in the type that is written. At 99 % of all positions the merged model must prefer the same next
token. A token that the unmerged model ranks below its first by no more than NEAR_TIE units of rounding is the same: in
bfloat16 such near ties fall either way. A reward model's scores must agree to SCORE_TOLERANCE of the largest.

    python merge_peft_adapter.py --base_model Qwen/Qwen2.5-3B-Instruct \\
        --lora_model outputs-dpo-qwen2.5-3b/checkpoint-best --output_dir outputs-dpo-qwen2.5-3b-merged
"""

import gc
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

import medtune.libraries  # noqa: F401 - first: it imports the libraries in half of their time

# isort: split
import torch
from loguru import logger
from peft import PeftModel
from transformers import (
    AutoModelForSequenceClassification,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from medtune.arguments import StageArgumentParser
from medtune.errors import UserError, run_script
from medtune.models.adapters import load_with_adapter
from medtune.models.families import check_same_family
from medtune.models.lineage import Lineage, is_adapter, read_adapter_config, read_lineage
from medtune.models.loading import load_base_model, weights_fingerprint
from medtune.models.model_folder import describe_folder
from medtune.models.reward_card import write_reward_card
from medtune.models.score_heads import register_scoring_class
from medtune.models.text_part import language_model_class, loaded_config
from medtune.models.vocabulary import check_vocabulary
from medtune.models.whole_checkpoint import add_other_parts, summarize_parts
from medtune.output_files import new_folder, refuse_unwritable
from medtune.reading.chat_template import ChatTemplate
from medtune.reading.tokenization import encode_prompt, stop_token_ids
from medtune.training.log import start_log

LEAST_AGREEMENT = 0.99
NEAR_TIE = 2  # units of rounding at the size of the largest logit
SCORE_TOLERANCE = {"float32": 0.001, "float16": 0.01, "bfloat16": 0.05}
N_TOP = 8  # logits that are kept of each position
MAX_SHARD_SIZE = "5GB"

# The guide's four questions come first.
CHINESE_QUESTIONS = (
    *("感冒了应该怎么办？", "高血压患者在饮食上需要注意什么？", "糖尿病有哪些早期症状？", "如何预防心血管疾病？"),
    *("孩子发烧到39度要不要去医院？", "胃痛吃什么药好？", "孕妇可以喝咖啡吗？", "失眠怎么调理？"),
    *("痛风发作时怎么缓解？", "体检发现甲状腺结节严重吗？", "贫血的人应该多吃什么？", "青霉素过敏能用头孢吗？"),
    *("被狗咬了多久内打疫苗？", "腰椎间盘突出能做运动吗？", "突然胸痛、出冷汗是怎么回事？", "幽门螺杆菌会传染吗？"),
)
ENGLISH_QUESTIONS = (
    *("How is iron deficiency treated?", "What should I eat when I have gout?", "Is a fever of 38.5 °C dangerous?"),
    *("Can I take ibuprofen with aspirin?", "How long does the flu last?", "What are the signs of a stroke?"),
    *("Why do my hands go numb at night?", "How can I lower my cholesterol?", "When does a cough need an X-ray?"),
    *("What causes kidney stones?", "How do I treat a small burn?", "Is metformin safe in pregnancy?"),
    *("What does a high TSH mean?", "How much sleep does a child need?", "Can stress cause chest pain?"),
    "How is asthma different from COPD?",
)
CHINESE_REPLY = "一般建议先休息、多喝水、清淡饮食，并留意症状的变化；如果症状加重或持续不缓解，请及时到医院就诊。"
ENGLISH_REPLY = "It depends on the cause: rest, drink enough, and see a doctor if the symptoms get worse or stay."

# ---------------------------------------------------------------- arguments


@dataclass
class MergeArguments:
    lora_model: str = field(metadata={"help": "Folder of the adapter."})
    output_dir: str = field(metadata={"help": "New folder for the merged model."})
    base_model: str | None = field(
        default=None,
        metadata={"help": "Hub name or folder of the model that the adapter was trained on; by default what it names."},
    )
    torch_dtype: Literal["bfloat16", "float16", "float32"] = field(
        default="bfloat16", metadata={"help": "Type of the merged weights, in which the two models are compared too."}
    )
    cache_dir: str | None = field(default=None, metadata={"help": "Folder for downloaded models."})
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Run Python code that the model's repository ships."}
    )
    allow_pickle_weights: bool = field(
        default=False, metadata={"help": "Also load .bin weights, which can run code when they are opened."}
    )


# ---------------------------------------------------------------- before weights load


def check_room(output_dir: Path, n_bytes: int) -> None:
    """Refuse a disk without room for the merged weights."""
    existing = next(folder for folder in output_dir.absolute().parents if folder.is_dir())
    free = shutil.disk_usage(existing).free
    if free < 1.05 * n_bytes:  # the tokenizer and the configuration are small
        raise UserError(
            f"--output_dir {output_dir}: the merged weights take {n_bytes / 1e9:.1f} GB and {existing} has "
            f"{free / 1e9:.1f} GB free; make room or name a folder on another disk"
        )


def weight_bytes(config: PretrainedConfig, model_class: type, merge_args: MergeArguments) -> int:
    """Size of the merged weights, from the configuration alone."""
    with torch.device("meta"):
        model = model_class.from_config(loaded_config(config), trust_remote_code=merge_args.trust_remote_code)
    return sum(parameter.numel() for parameter in model.parameters()) * getattr(torch, merge_args.torch_dtype).itemsize


# ---------------------------------------------------------------- the merge


def merge(model: PeftModel) -> PreTrainedModel:
    """The base with the adapter in its weights; the base is changed in place."""
    untie_adapted_head(model.get_base_model())
    return model.merge_and_unload(safe_merge=True)


def untie_adapted_head(base: PreTrainedModel) -> None:
    """Untie the head from the embedding if LoRA changes one of them (small models share these weights)."""
    if base.get_output_embeddings() is None:
        return
    layers = [base.get_output_embeddings(), base.get_input_embeddings()]
    head, embedding = (getattr(layer, "base_layer", layer) for layer in layers)
    adapted = any(hasattr(layer, "base_layer") for layer in layers)
    if adapted and getattr(head, "weight", None) is getattr(embedding, "weight", head):
        head.weight = torch.nn.Parameter(head.weight.detach().clone(), requires_grad=False)


def stopping_generation_config(
    config: GenerationConfig, stop_ids: Sequence[int], pad_token_id: int
) -> GenerationConfig:
    """The base's generation config with every stop id, so that servers end replies where training did."""
    own = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    config.eos_token_id = list(dict.fromkeys([*stop_ids, *(token for token in own if token is not None)]))
    config.pad_token_id = pad_token_id
    drawing = (config.temperature, config.top_p, config.min_p, config.typical_p)
    if not config.do_sample and any(value not in (None, 1.0) for value in drawing):
        # transformers 5.24 saves no temperature without it; servers sample by the temperature anyway.
        config.do_sample = True
    return config


def write_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, lineage: Lineage, folder: Path) -> None:
    model.save_pretrained(folder, max_shard_size=MAX_SHARD_SIZE)
    tokenizer.save_pretrained(folder)
    lineage.save(folder)
    # safetensors 0.8 lets only its user read what it writes, which keeps a server under another name out.
    for file in folder.glob("*.safetensors"):
        file.chmod(Path(folder, "config.json").stat().st_mode)


# ---------------------------------------------------------------- the comparison


class Reference(NamedTuple):
    """The unmerged model's output for one prompt: its largest logits at each position, or its score.

    values: float32 [positions, k]; ids: int64 [positions, k].
    """

    values: torch.Tensor
    ids: torch.Tensor


class Difference(NamedTuple):
    """The difference of a model from the references: the share of agreeing positions, and |logit difference|."""

    agreement: float
    mean: float
    largest: float


def comparison_prompts(tokenizer: PreTrainedTokenizerBase, chat_template: ChatTemplate | None) -> list[list[int]]:
    """32 questions with the start of a reply, as ids."""
    prompts = []
    for questions, reply in ((CHINESE_QUESTIONS, CHINESE_REPLY), (ENGLISH_QUESTIONS, ENGLISH_REPLY)):
        reply_ids = tokenizer(reply, add_special_tokens=False)["input_ids"]
        for question in questions:
            if chat_template is None:
                question_ids = tokenizer(question)["input_ids"]
            else:
                question_ids = encode_prompt(tokenizer, chat_template, [{"role": "user", "content": question}])
            prompts.append(question_ids + reply_ids)
    return prompts


@torch.no_grad()
def outputs_of(model: torch.nn.Module, prompts: list[list[int]]) -> Iterator[torch.Tensor]:
    """Logits of each prompt, float32 [positions, vocabulary], or its score [1, 1]; one at a time, for the memory."""
    model.eval()
    for ids in prompts:
        logits = model(input_ids=torch.tensor([ids], device=model.device), use_cache=False).logits
        yield logits.float().flatten(0, -2)


def references_of(model: torch.nn.Module, prompts: list[list[int]]) -> list[Reference]:
    return [Reference(*logits.topk(min(N_TOP, logits.shape[-1]))) for logits in outputs_of(model, prompts)]


def difference_from(
    references: list[Reference], model: torch.nn.Module, prompts: list[list[int]], torch_dtype: str
) -> Difference:
    """Compare next tokens, or scores, by the rule in this file's docstring."""
    n_agreeing, differences = 0, []
    largest_score = max(reference.values.abs().max() for reference in references)
    for reference, logits in zip(references, outputs_of(model, prompts), strict=True):
        difference = (logits.gather(-1, reference.ids) - reference.values).abs()
        differences.append(difference.flatten())
        if logits.shape[-1] == 1:
            agrees = difference <= SCORE_TOLERANCE[torch_dtype] * largest_score
        else:
            unit = torch.finfo(getattr(torch, torch_dtype)).eps * reference.values.abs().amax(-1, keepdim=True)
            near_first = reference.values >= reference.values[:, :1] - NEAR_TIE * unit
            # argmax takes nan for the largest value, so nan logits would prefer a token too.
            says_numbers = logits.isfinite().all(-1)
            agrees = ((reference.ids == logits.argmax(-1, keepdim=True)) & near_first).any(-1) & says_numbers
        n_agreeing += int(agrees.sum())
    n_positions = sum(len(reference.values) for reference in references)
    every = torch.cat(differences)
    return Difference(n_agreeing / n_positions, every.mean().item(), every.max().item())


def judge(merged: Difference, base: Difference, torch_dtype: str) -> None:
    """Refuse a merged model whose outputs differ, and warn if rounding lost much of a small adapter.

    Args:
        merged, base: how far the merged model and the bare base are from the adapter on its base.
    """
    facts = (
        f"{merged.agreement:.2%} agreement with the adapter on its base on {len(CHINESE_QUESTIONS + ENGLISH_QUESTIONS)}"
        f" prompts; difference {merged.mean:.2g} on average, {merged.largest:.2g} at most (the adapter itself makes "
        f"{base.mean:.2g} and {base.largest:.2g})"
    )
    if merged.agreement < LEAST_AGREEMENT:
        raise UserError(
            f"the merged model is not the trained one, so nothing is written: {facts}; at least {LEAST_AGREEMENT:.0%} "
            "is needed. --torch_dtype float32 rounds least; if it fails too, the adapter does not merge into this base"
        )
    logger.info(facts)
    if merged.mean > 0.5 * base.mean and base.mean > 0:
        logger.warning(
            f"the adapter changes so little that rounding to {torch_dtype} hides much of it; --torch_dtype float32 "
            "keeps it, or use the adapter unmerged"
        )


# ---------------------------------------------------------------- main


def main(argv: Sequence[str] | None = None) -> None:
    # ------------------------------------------------------------ arguments
    parser = StageArgumentParser([MergeArguments])
    (merge_args,) = parser.parse(argv)
    lora_model, output_dir = merge_args.lora_model, Path(merge_args.output_dir)
    base_model = merge_args.base_model or read_adapter_config(lora_model, "--lora_model").base_model_name_or_path
    if is_adapter(base_model):
        raise UserError(f"--base_model {base_model}: an adapter; give the base model it was trained on")

    # ------------------------------------------------------------ run
    start_log()
    for note in parser.notes:
        logger.info(note)

    # ------------------------------------------------------------ base, adapter and room for both
    hub_options = {"cache_dir": merge_args.cache_dir, "trust_remote_code": merge_args.trust_remote_code}
    folder = describe_folder(
        lora_model, "--lora_model", base_model, allow_pickle_weights=merge_args.allow_pickle_weights, **hub_options
    )
    is_reward_model, tokenizer, chat_template = folder.is_reward_model, folder.tokenizer, folder.chat_template
    load_options = hub_options | {
        "torch_dtype": merge_args.torch_dtype,
        "allow_pickle_weights": merge_args.allow_pickle_weights,
        "model_class": AutoModelForSequenceClassification if is_reward_model else language_model_class(folder.config),
    }
    if is_reward_model:
        register_scoring_class(folder.config)
        load_options["num_labels"] = 1
    if hasattr(folder.config, "quantization_config"):
        raise UserError(f"--base_model {base_model}: its weights are quantized; give the model it was made from")
    check_same_family(base_model, lora_model, **hub_options)
    lineage = Lineage(
        base_model=base_model,
        parent=lora_model,
        stage="merge",
        template=folder.lineage.template if folder.lineage else "",
        data=folder.lineage.data if folder.lineage else "",
        hidden_size=folder.config.get_text_config().hidden_size,
        vocab_size=folder.config.get_text_config().vocab_size,
        start_weights=weights_fingerprint(lora_model),
        flags=parser.given,
        thinking=folder.lineage.thinking if folder.lineage else "",
        reads_thoughts=folder.reads_thoughts,
    )
    if read_lineage(output_dir) == lineage:
        logger.info(f"{output_dir} holds this model already, merged by the same flags: nothing to do")
        return
    refuse_unwritable(output_dir, "--output_dir")
    n_bytes = weight_bytes(folder.config, load_options["model_class"], merge_args)
    check_room(output_dir, n_bytes)
    stop_ids = stop_token_ids(tokenizer, chat_template) if chat_template else [tokenizer.eos_token_id]
    prompts = comparison_prompts(tokenizer, chat_template)

    with new_folder(output_dir, "--output_dir", overwrite=None) as written:
        # -------------------------------------------------------- the adapter on its base
        on_gpu = torch.cuda.is_available() and torch.cuda.mem_get_info()[0] > 1.3 * n_bytes
        device = "cuda" if on_gpu else "cpu"
        logger.info(f"merging {lora_model} into {base_model} in {merge_args.torch_dtype} on the {device.upper()}")
        model = load_with_adapter(base_model, lora_model, **load_options).to(device)
        check_vocabulary(tokenizer, model)
        references = references_of(model, prompts)
        with model.disable_adapter():
            base_difference = difference_from(references, model, prompts, merge_args.torch_dtype)

        # -------------------------------------------------------- merge, write, load again, compare
        model = merge(model)
        if model.can_generate():
            own = model.generation_config
            model.generation_config = stopping_generation_config(own, stop_ids, tokenizer.pad_token_id)
        if is_reward_model:  # a score is read in front of the padding
            model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
        write_model(model, tokenizer, lineage, written)
        if is_reward_model:
            write_reward_card(written, model)
        elif others := add_other_parts(written, model, base_model, **hub_options):
            logger.info(f"unchanged from {base_model}: {summarize_parts(others)}")
        del model
        gc.collect()
        merged = load_base_model(str(written), flag="--output_dir", **load_options).to(device)
        merged_difference = difference_from(references, merged, prompts, merge_args.torch_dtype)
        judge(merged_difference, base_difference, merge_args.torch_dtype)

    # ------------------------------------------------------------ next
    logger.info(f"done: {output_dir} ({n_bytes / 1e9:.2f} GB)")
    if is_reward_model:
        logger.info(f"next: ppo_training.py --reward_model_path {output_dir}")
        return
    logger.info(f"next: python inference.py --base_model {output_dir}")
    logger.info(
        f"or serve it: python -m vllm.entrypoints.openai.api_server --model {output_dir} --host 0.0.0.0 --port 8000 "
        f"--dtype {merge_args.torch_dtype} --max-model-len {min(folder.context, 4096)} --gpu-memory-utilization 0.9"
    )


if __name__ == "__main__":
    run_script(main)
