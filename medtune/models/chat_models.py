"""Trained models for chat: a base, adapters on it, whole models, each with its own prompt template.

Those that share a base share its weights in memory: their adapters are switched. A reward model scores what they say.
"""

import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Literal

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from medtune.arguments import LoadingOptions
from medtune.errors import UserError
from medtune.models.adapter_effect import QUESTION
from medtune.models.adapters import load_with_adapters
from medtune.models.lineage import base_of, check_model_path, is_adapter
from medtune.models.loading import dtype_for_use, load_base_model, place_for_use
from medtune.models.logps import rounding
from medtune.models.model_folder import ModelFolder, choose_template, describe_folder, refuse_reward_model
from medtune.models.reward_models import load_reward_model, reward_ids
from medtune.models.score_heads import LastScores
from medtune.models.text_attention import Layout, exact_layout
from medtune.models.vocabulary import check_vocabulary
from medtune.reading.chat_template import ChatTemplate
from medtune.reading.messages import Message
from medtune.reading.tokenization import encode_prompt, load_chat_template, stop_token_ids
from medtune.reading.tool_calls import CallForm, call_form

# In lists of models, the name of the base model without an adapter.
BASE = "base"
NOTICE = "回答由模型生成，仅供研究，不构成医疗建议。 Answers are generated, for research only, and no medical advice."

LOOPBACK = ("127.0.0.1", "localhost", "::1")

# ---------------------------------------------------------------- arguments


@dataclass
class ChatModelArguments(LoadingOptions):
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
        default=False, metadata={"help": "FlashAttention 2 if installed and possible, otherwise SDPA or eager."}
    )
    cache_dir: str | None = field(default=None, metadata={"help": "Folder for downloaded models."})
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Run Python code that the model's repository ships."}
    )
    allow_pickle_weights: bool = field(
        default=False, metadata={"help": "Also load .bin weights, which can run code when they are opened."}
    )

    @property
    def loading_options(self) -> dict:
        return super().loading_options | {"torch_dtype": dtype_for_use(self.torch_dtype, self.use_cpu)}


def check_address(host: str, port: int) -> None:
    """Refuse an address that cannot be listened on, before weights are loaded."""
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
    """A model with its tokenizer, template and stop tokens.

    name: what the user calls it.
    lora_model: the folder of the adapter in use, None for the base or a whole model.
    context: the longest prompt and reply in tokens.
    base_flag: what the base was named with.
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
    base_flag: str = "--base_model"
    adapter_name: str | None = None
    model: PreTrainedModel | PeftModel | None = None

    @contextmanager
    def in_use(self) -> Iterator[PreTrainedModel | PeftModel]:
        """The model with this adapter switched on, or without one. Not thread-safe."""
        if isinstance(self.model, PeftModel) and self.adapter_name is not None:
            self.model.set_adapter(self.adapter_name, inference_mode=True)
        bare = isinstance(self.model, PeftModel) and self.adapter_name is None
        with self.model.disable_adapter() if bare else nullcontext():
            yield self.model

    @cached_property
    def call_form(self) -> CallForm | None:
        """In which form it writes calls of tools, if any."""
        return call_form(self.chat_template)

    @torch.no_grad()
    def change_by_adapter(self) -> float:
        """The largest difference that the adapter makes to a log-prob of the first token of a reply."""
        prompt = encode_prompt(self.tokenizer, self.chat_template, [QUESTION])
        with self.in_use() as model:
            ids = torch.tensor([prompt], device=model.get_input_embeddings().weight.device)
            with_adapter = model(input_ids=ids).logits[0, -1].float().log_softmax(dim=-1)
            with model.disable_adapter():
                without = model(input_ids=ids).logits[0, -1].float().log_softmax(dim=-1)
        return (with_adapter - without).abs().max().item()


def describe_model(model_args: ChatModelArguments, flag: str = "--base_model") -> ChatModel:
    """Check the model of `--base_model` (or `flag`) and `--lora_model`; its weights are loaded later."""
    base_model, lora_model = model_args.base_model, model_args.lora_model
    if lora_model and is_adapter(base_model):
        raise UserError(
            f"--base_model {base_model}: an adapter too; a later stage's adapter holds what came before, so give "
            f"the base: --base_model {base_of(base_model)}"
        )
    if lora_model:
        folder = _describe(lora_model, "--lora_model", model_args, base_model)
    else:
        folder = _describe(base_model, flag, model_args)
    return _chat_model(lora_model or base_model, folder, model_args)


def describe_models(paths: Sequence[str] | None, flag: str, model_args: ChatModelArguments) -> list[ChatModel]:
    """Describe several models: `base`, adapters on `--base_model`, or whole models.

    Args:
        paths: what `flag` names; None for the one of `--base_model` and `--lora_model`.
    """
    if not paths:
        return [describe_model(model_args)]
    if model_args.lora_model:
        raise UserError(f"--lora_model and {flag} exclude each other: name the adapter after {flag}")
    check_model_path(model_args.base_model, "--base_model", model_args.allow_pickle_weights)
    base_model = base_of(model_args.base_model)
    models = []
    for path in dict.fromkeys(paths):
        if path == BASE:
            folder = _describe(base_model, "--base_model", model_args)
        else:
            folder = _describe(path, flag, model_args, base_model if is_adapter(path) else None)
        models.append(_chat_model(path, folder, model_args))
    return models


def _describe(path: str, flag: str, model_args: ChatModelArguments, base_model: str | None = None) -> ModelFolder:
    options = {"allow_pickle_weights": model_args.allow_pickle_weights} | model_args.hub_options
    return describe_folder(path, flag, base_model, **options)


def _chat_model(name: str, folder: ModelFolder, model_args: ChatModelArguments) -> ChatModel:
    refuse_reward_model(folder, "; --reward_model takes it")
    chat_template = choose_template(folder, model_args.template_name)
    return ChatModel(
        name,
        folder.base_model,
        folder.lora_model,
        folder.tokenizer,
        chat_template,
        stop_token_ids(folder.tokenizer, chat_template),
        folder.context,
        folder.base_flag,
    )


# ---------------------------------------------------------------- weights


def load_weights(models: Sequence[ChatModel], model_args: ChatModelArguments) -> None:
    """Load each base once, with the adapters of all the models on it, on the GPU if there is one."""
    options = model_args.loading_options
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
            model = load_base_model(base_model, flag=sharing[0].base_flag, **options)
        for chat_model in sharing:
            chat_model.model = place_for_use(model, model_args.use_cpu)
            check_vocabulary(chat_model.tokenizer, model)


# ---------------------------------------------------------------- scores


class RewardModel:
    """The model of `--reward_model` with its own tokenizer and template."""

    def __init__(self, path: str, model_args: ChatModelArguments):
        """Check the reward model, then load its weights."""
        folder = _describe(path, "--reward_model", model_args)
        self.tokenizer, self.context, self.reads_thoughts = folder.tokenizer, folder.context, folder.reads_thoughts
        # A template that it was trained with is not exchanged for the one that the models are asked in.
        self.chat_template = folder.chat_template or load_chat_template(self.tokenizer, model_args.template_name)
        model = load_reward_model(
            folder.base_model, folder.lora_model, flag="--reward_model", **model_args.loading_options
        )
        self.model = place_for_use(model, model_args.use_cpu)
        self.last_scores = LastScores(self.model)
        self.layout: Layout | None = None  # of batches of several rows, chosen with the first

    def encode(
        self, messages: list[Message], reply: str, ended: bool = True, tools: list[dict] | None = None
    ) -> list[int]:
        """The ids to score: prompt and reply, with the end token unless the reply was cut."""
        options = {"ended": ended, "reads_thoughts": self.reads_thoughts}
        return reward_ids(self.tokenizer, self.chat_template, messages, reply, tools, **options)

    @torch.no_grad()
    def score(self, rows: Sequence[list[int]], batch_size: int = 8) -> list[float]:
        """The score of each row of ids, in the order given; rows of similar length are scored together."""
        order = sorted(range(len(rows)), key=lambda index: len(rows[index]), reverse=True)
        if self.layout is None and len(rows) > 1:
            few = partial(self._score_batch, [rows[index] for index in order[-2:]])
            self.layout = exact_layout(self.last_scores.model, few, rounding(self.model.dtype))
        scores = [0.0] * len(rows)
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            of_batch = self._score_batch([rows[index] for index in batch], self.layout or Layout.PADDED)
            for index, score in zip(batch, of_batch.tolist(), strict=True):
                scores[index] = score
        return scores

    def _score_batch(self, rows: Sequence[list[int]], layout: Layout) -> torch.Tensor:
        """[rows] float32."""
        encoded = self.tokenizer.pad({"input_ids": rows}, padding_side="right", return_tensors="pt")
        return self.last_scores(self.model, encoded.to(self.model.device), layout)
