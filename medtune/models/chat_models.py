"""Trained models ready to be asked: a base, adapters on it, whole models, each with the prompts it was trained on.

Those that share a base share its weights in memory: their adapters are switched. A reward model scores what they say.
"""

import socket
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from medtune.errors import UserError
from medtune.models.adapters import load_with_adapters
from medtune.models.lineage import Lineage, base_of, check_model_path, is_adapter, read_adapter_config, read_lineage
from medtune.models.loading import load_base_model, load_config, load_tokenizer
from medtune.models.reward_models import load_reward_model
from medtune.models.vocabulary import check_vocabulary
from medtune.reading.encoding import encode_exchange, load_chat_template, stop_token_ids
from template import ChatTemplate, Message

# The word that stands for the base model without an adapter, where models are listed.
BASE = "base"
NOTICE = "回答由模型生成，仅供研究，不构成医疗建议。 Answers are generated, for research only, and no medical advice."

LOOPBACK = ("127.0.0.1", "localhost", "::1")

# ---------------------------------------------------------------- arguments


@dataclass
class ChatModelArguments:
    base_model: str = field(metadata={"help": "Hub name or folder of a model; an adapter's folder stands for both."})
    lora_model: str | None = field(default=None, metadata={"help": "Folder of a LoRA adapter trained on it."})
    reward_model: str | None = field(
        default=None, metadata={"help": "Folder of a reward model (adapter or whole) that scores each reply."}
    )
    template_name: str | None = field(
        default=None, metadata={"help": "Named prompt template of template.py instead of the tokenizer's own."}
    )
    torch_dtype: Literal["auto", "bfloat16", "float16", "float32"] = field(
        default="auto", metadata={"help": "Type of the weights; auto takes the checkpoint's. float32 without CUDA."}
    )
    load_in_8bit: bool = field(default=False, metadata={"help": "Base weights in 8 bit (bitsandbytes)."})
    load_in_4bit: bool = field(default=False, metadata={"help": "Base weights in 4-bit NF4 (bitsandbytes)."})
    device_map: str | None = field(default=None, metadata={"help": "auto splits the model over several GPUs."})
    use_cpu: bool = field(default=False, metadata={"help": "The CPU, though there are GPUs."})
    flash_attn: bool = field(
        default=False, metadata={"help": "FlashAttention 2 if it is installed, otherwise PyTorch's SDPA."}
    )
    cache_dir: str | None = field(default=None, metadata={"help": "Folder for downloaded models."})
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Run Python code that the model's repository ships."}
    )
    allow_pickle_weights: bool = field(
        default=False, metadata={"help": "Also load .bin weights, which can run code when they are opened."}
    )

    def __post_init__(self):
        if self.load_in_8bit and self.load_in_4bit:
            raise UserError("--load_in_8bit and --load_in_4bit exclude each other: give one of them")

    @property
    def hub_options(self) -> dict:
        return {"cache_dir": self.cache_dir, "trust_remote_code": self.trust_remote_code}

    @property
    def load_options(self) -> dict:
        names = ("torch_dtype", "load_in_4bit", "load_in_8bit", "device_map", "flash_attn", "allow_pickle_weights")
        return {name: getattr(self, name) for name in names} | self.hub_options


def check_address(host: str, port: int) -> None:
    """Refuse an address that cannot be listened on; asked before weights are loaded."""
    if not 0 < port < 65536:
        raise UserError(f"--port {port}: give a number from 1 to 65535")
    try:
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # the rest of a stopped server is no hindrance
            probe.bind((host, port))
    except OSError as error:
        raise UserError(
            f"--host {host} --port {port}: cannot be listened on ({error.strerror}); give another"
        ) from error


# ---------------------------------------------------------------- models and their prompts


@dataclass
class ChatModel:
    """A model with all that a prompt and a reply need.

    name: what the user calls it.
    lora_model: the folder of the adapter in use, None for the base or a whole model.
    context: the longest prompt and reply in tokens.
    adapter_name: PEFT's name of the adapter, None for none.
    model: None until `load_weights`.
    """

    name: str
    base_model: str
    lora_model: str | None
    tokenizer: PreTrainedTokenizerBase
    chat_template: ChatTemplate
    stop_ids: list[int]
    context: int
    adapter_name: str | None = None
    model: PreTrainedModel | PeftModel | None = None

    @contextmanager
    def in_use(self) -> Iterator[PreTrainedModel | PeftModel]:
        """The model with this adapter switched on, or none; not for two threads at once."""
        if isinstance(self.model, PeftModel) and self.adapter_name is not None:
            self.model.set_adapter(self.adapter_name, inference_mode=True)
        bare = isinstance(self.model, PeftModel) and self.adapter_name is None
        with self.model.disable_adapter() if bare else nullcontext():
            yield self.model


def describe_model(model_args: ChatModelArguments) -> ChatModel:
    """The model of `--base_model` and `--lora_model`, checked, before its weights are loaded."""
    base_model, lora_model = model_args.base_model, model_args.lora_model
    check_model_path(base_model, "--base_model", model_args.allow_pickle_weights)
    if lora_model:
        if is_adapter(base_model):
            raise UserError(
                f"--base_model {base_model}: an adapter too; a later stage's adapter holds what came before, so give "
                f"the base: --base_model {base_of(base_model)}"
            )
    elif is_adapter(base_model):
        return _describe(base_model, base_of(base_model), base_model, model_args, lora_flag="--base_model")
    return _describe(lora_model or base_model, base_model, lora_model, model_args)


def describe_models(paths: Sequence[str], flag: str, model_args: ChatModelArguments) -> list[ChatModel]:
    """Several models to choose from or to compare: `base`, adapters on `--base_model`, whole models."""
    check_model_path(model_args.base_model, "--base_model", model_args.allow_pickle_weights)
    base_model = base_of(model_args.base_model)
    models = []
    for path in dict.fromkeys(paths):
        if path != BASE:
            check_model_path(path, flag, model_args.allow_pickle_weights)
        if path == BASE:
            models.append(_describe(path, base_model, None, model_args))
        elif is_adapter(path):
            models.append(_describe(path, base_model, path, model_args, lora_flag=flag))
        else:
            models.append(_describe(path, path, None, model_args, base_flag=flag))
    return models


def _describe(
    name: str,
    base_model: str,
    lora_model: str | None,
    model_args: ChatModelArguments,
    base_flag: str = "--base_model",
    lora_flag: str = "--lora_model",
) -> ChatModel:
    config = load_config(base_model, flag=base_flag, **model_args.hub_options)
    # A reward model scores replies; loaded as a language model it would speak like its base, or at random.
    reason = "a reward model, which scores replies and writes none; --reward_model takes it"
    if lora_model and read_adapter_config(lora_model).task_type == "SEQ_CLS":
        raise UserError(f"{lora_flag} {lora_model}: {reason}")
    if any("SequenceClassification" in architecture for architecture in config.architectures or []):
        raise UserError(f"{base_flag} {base_model}: {reason}")
    # An adapter's own tokenizer has the template it was trained with; another tool's adapter may have none.
    has_tokenizer = lora_model is not None and Path(lora_model, "tokenizer_config.json").is_file()
    source = lora_model if has_tokenizer else base_model
    tokenizer = load_tokenizer(source, flag=lora_flag if has_tokenizer else base_flag, **model_args.hub_options)
    lineage = read_lineage(lora_model or base_model)
    trained = has_tokenizer or lineage is not None
    chat_template = choose_template(tokenizer, model_args.template_name, lineage, trained)
    context = getattr(config.get_text_config(), "max_position_embeddings", None) or sys.maxsize
    stop_ids = stop_token_ids(tokenizer, chat_template)
    return ChatModel(name, base_model, lora_model, tokenizer, chat_template, stop_ids, context)


# ---------------------------------------------------------------- template

_QUESTION = {"role": "user", "content": "probe question"}
_PROBE = [_QUESTION, {"role": "assistant", "content": "probe answer"}, _QUESTION]
_PROBES = (_PROBE, [{"role": "system", "content": "probe system"}, *_PROBE])


def choose_template(
    tokenizer: PreTrainedTokenizerBase, template_name: str | None, lineage: Lineage | None, trained: bool
) -> ChatTemplate:
    """The template that the model was trained with, or the named one where it renders the same.

    Args:
        lineage: the record of the training, which names a template where the tokenizer has none.
        trained: the tokenizer was saved by a training, so its template is the one that training used.

    Raises UserError for a name that would ask the model in another form than it was taught.
    """
    own_name = lineage.template or None if lineage and tokenizer.chat_template is None else None
    has_template = tokenizer.chat_template is not None or own_name is not None
    if template_name is None or not has_template:
        return load_chat_template(tokenizer, template_name or own_name)
    own_prompts = _rendered_probes(load_chat_template(tokenizer, own_name))
    chat_template = load_chat_template(tokenizer, template_name)
    # Pretraining reads text without turns: any template may be tried on it.
    if trained and not (lineage and lineage.stage == "pt"):
        for own_prompt, prompt in zip(own_prompts, _rendered_probes(chat_template), strict=True):
            if own_prompt is not None and own_prompt != prompt:
                raise UserError(
                    f"--template_name {template_name}: it asks in another form than the model was trained with: "
                    f"{_difference(prompt, own_prompt)}; leave the flag out"
                )
    return chat_template


def _difference(text: str | None, trained_text: str) -> str:
    """Where two renderings part."""
    if text is None:
        return "it refuses a system prompt"
    n_same = next((n for n in range(len(text)) if not trained_text.startswith(text[: n + 1])), len(text))
    return f"{text[n_same:]!r:.60} instead of {trained_text[n_same:]!r:.60}"


def _rendered_probes(chat_template: ChatTemplate) -> list[str | None]:
    """Two short conversations as text; None for one that the template refuses (some have no system turn)."""
    texts = []
    for messages in _PROBES:
        try:
            texts.append(chat_template.prompt(messages))
        except UserError:
            texts.append(None)
    return texts


# ---------------------------------------------------------------- weights


def load_weights(models: Sequence[ChatModel], model_args: ChatModelArguments) -> None:
    """Load each base once, with the adapters of all the models on it, on the GPU if there is one."""
    options = model_args.load_options
    for base_model in dict.fromkeys(chat_model.base_model for chat_model in models):
        sharing = [chat_model for chat_model in models if chat_model.base_model == base_model]
        adapters = {}
        for chat_model in sharing:
            if chat_model.lora_model:
                chat_model.adapter_name = f"adapter{len(adapters)}"
                adapters[chat_model.adapter_name] = chat_model.lora_model
        if adapters:
            model = load_with_adapters(base_model, adapters, **options)
        else:
            model = load_base_model(base_model, flag="--base_model", **options)
        for chat_model in sharing:
            chat_model.model = _placed(model, model_args)
            check_vocabulary(chat_model.tokenizer, model)


def _placed(model: PreTrainedModel | PeftModel, model_args: ChatModelArguments) -> PreTrainedModel | PeftModel:
    if torch.cuda.is_available() and not (model_args.use_cpu or hasattr(model, "hf_device_map")):
        model.to("cuda")
    return model.eval()


# ---------------------------------------------------------------- scores


class RewardModel:
    """The model of `--reward_model` with its own tokenizer and template."""

    def __init__(self, path: str, model_args: ChatModelArguments):
        """Load it; it is checked before any weights are."""
        flag = "--reward_model"
        check_model_path(path, flag, model_args.allow_pickle_weights)
        self.tokenizer = load_tokenizer(path, flag=flag, **model_args.hub_options)
        self.chat_template = choose_template(self.tokenizer, None, read_lineage(path), trained=True)
        lora_model = path if is_adapter(path) else None
        model = load_reward_model(base_of(path), lora_model, flag=flag, **model_args.load_options)
        self.model = _placed(model, model_args)

    def encode(self, messages: list[Message], reply: str, ended: bool = True) -> list[int]:
        """What is scored: the prompt and the reply with its end token, which a reply that was cut has none of."""
        prompt_ids, reply_ids = encode_exchange(self.tokenizer, self.chat_template, messages, reply, ended=ended)
        return prompt_ids + reply_ids

    @torch.no_grad()
    def score(self, rows: Sequence[list[int]], batch_size: int = 8) -> list[float]:
        """The score of each row of ids, in the order given; a longer row is scored in a batch of its like."""
        order = sorted(range(len(rows)), key=lambda index: len(rows[index]), reverse=True)
        scores = [0.0] * len(rows)
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            encoded = self.tokenizer.pad(
                {"input_ids": [rows[index] for index in batch]}, padding_side="right", return_tensors="pt"
            )
            for index, score in zip(batch, self.model(**encoded.to(self.model.device)).logits[:, 0], strict=True):
                scores[index] = score.item()
        return scores
