"""Trained reward models, loaded for use, and what they read."""

from pathlib import Path

import torch
from peft import PeftModel, TaskType
from safetensors.torch import load_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from medtune.errors import UserError
from medtune.models.adapters import add_adapter, put_adapter_on, without_head
from medtune.models.families import check_same_family
from medtune.models.lineage import read_adapter_config
from medtune.models.loading import load_tokenizer
from medtune.models.model_files import ADAPTER_WEIGHTS
from medtune.models.score_heads import UNTRAINED_HEAD, check_score_head, is_head, load_scoring_base
from medtune.reading.chat_template import ChatTemplate
from medtune.reading.messages import Message
from medtune.reading.thoughts import split_reply
from medtune.reading.tokenization import encode_exchange, encode_prompt


def load_reward_model(
    base_model: str, lora_model: str | None, *, flag: str = "--reward_model_path", **base_options
) -> PreTrainedModel | PeftModel:
    """A trained reward model for use: an adapter with a score head on its base, or (None) a whole model.

    A batch of ids gives `.logits` of [batch, 1], the score at each row's last token.

    Raises:
        UserError: it has no score head, or one that is all zeros and so was never trained.
    """
    hub_options = {name: base_options[name] for name in ("cache_dir", "trust_remote_code") if name in base_options}
    path = lora_model or base_model
    pad_token_id = load_tokenizer(path, flag=flag, **hub_options).pad_token_id
    if lora_model:
        check_score_head(lora_model, flag)
        check_same_family(base_model, lora_model, **hub_options)
        base = load_scoring_base(base_model, pad_token_id=pad_token_id, flag=flag, **base_options)
        return put_adapter_on(base, lora_model, flag).eval()
    model = load_scoring_base(base_model, pad_token_id=pad_token_id, flag=flag, needs_head=True, **base_options)
    if not model.score.weight.any():
        raise UserError(f"{flag} {path}: {UNTRAINED_HEAD}")
    return model.eval()


def add_reward_adapter(model: PeftModel, path: str, name: str, flag: str = "--reward_model_path") -> torch.Tensor:
    """Put a reward model's LoRA matrices, frozen, on a language model of the same base.

    Returns the [1, hidden] float32 weights of its score head: the last token's last state times them is the score.

    Raises:
        UserError: it has no trained score head, does not fit this base, or holds nan.
    """
    check_score_head(path, flag)
    config = without_head(read_adapter_config(path))
    config.task_type, config.lora_dropout = TaskType.CAUSAL_LM.value, 0.0
    weights = load_file(Path(path, ADAPTER_WEIGHTS))
    broken = [key for key, tensor in weights.items() if not torch.isfinite(tensor).all()]
    if broken:
        raise UserError(f"{flag} {path}: {len(broken)} tensors hold nan or inf, such as {broken[0]}; take another one")
    matrices = {key: tensor for key, tensor in weights.items() if not is_head(key)}
    add_adapter(model, name, config, matrices, f"{flag} {path}")
    return next(weights[key].float() for key in weights if "score" in key.split("."))


def reward_ids(
    tokenizer: PreTrainedTokenizerBase,
    chat_template: ChatTemplate,
    messages: list[Message],
    reply: str,
    tools: list[dict] | None = None,
    *,
    ended: bool = True,
    reads_thoughts: bool = False,
) -> list[int]:
    """The ids of a reply for a reward model, as in training; a reply that was cut has no end token.

    Args:
        tokenizer, chat_template: the reward model's own.
        reads_thoughts: whether it was trained on replies with thoughts, which are left out for any other.
    """
    if not reads_thoughts:
        reply = split_reply(reply).answer
        messages = [
            message | {"content": split_reply(message["content"]).answer} if message["role"] == "assistant" else message
            for message in messages
        ]
        if not reply and not ended:  # cut in its thought
            return encode_prompt(tokenizer, chat_template, messages, tools)
    prompt_ids, reply_ids = encode_exchange(tokenizer, chat_template, messages, reply, tools, ended=ended)
    return prompt_ids + reply_ids
