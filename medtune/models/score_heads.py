"""The head of a reward model: one score from the last token's state, on the language model of any family."""

from pathlib import Path

import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, TaskType
from safetensors import safe_open
from transformers import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_layers import GenericForSequenceClassification

from medtune.errors import UserError
from medtune.models.lineage import read_adapter_config
from medtune.models.loading import load_base_model, load_config
from medtune.models.lora_layers import HEADS
from medtune.models.model_files import ADAPTER_WEIGHTS
from medtune.models.text_attention import Layout, forward_inputs, places
from medtune.models.text_part import inside_peft, language_model_class, loaded_config, text_config

UNTRAINED_HEAD = "its score head is all zeros, so it was never trained; take a later checkpoint, or train it longer"


def is_reward_model(config: PretrainedConfig | LoraConfig) -> bool:
    """Whether a model or an adapter with this configuration scores replies."""
    if isinstance(config, LoraConfig):
        return config.task_type == TaskType.SEQ_CLS
    return any("SequenceClassification" in name for name in config.architectures or [])


def is_head(tensor_name: str) -> bool:
    return bool(set(HEADS) & set(tensor_name.split(".")))


def register_scoring_class(config: PretrainedConfig) -> None:
    """Let AutoModelForSequenceClassification know a class for a checkpoint's language model with a score head.

    It has the language model's names of layers. It is made as transformers makes its own, which many families lack:
    of the part with the head, and of what the family's classes have in common.
    """
    config = loaded_config(config)
    language_models = language_model_class(config)._model_mapping
    if type(config) in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING or type(config) not in language_models:
        return
    if not hasattr(type(text_config(config))(), "num_attention_heads"):
        return  # transformers' part with the head reads attentions, and a Mamba's output has none
    language_model = language_models[type(config)]
    family = next(parent for parent in language_model.__mro__ if parent.__name__.endswith("PreTrainedModel"))
    name = family.__name__.replace("PreTrainedModel", "ForSequenceClassification")
    attributes = {
        "__module__": family.__module__,  # by which transformers knows how checkpoints name the family's weights
        "base_model_prefix": language_model.base_model_prefix,
        "config_class": type(config),
        "_keys_to_ignore_on_load_unexpected": language_model._keys_to_ignore_on_load_unexpected,
    }
    scoring_class = type(name, (GenericForSequenceClassification, family), attributes)
    # Without exist_ok transformers 5.24 would ignore a class for a configuration of its own.
    AutoModelForSequenceClassification.register(type(config), scoring_class, exist_ok=True)


class ScoreHead(torch.nn.Linear):
    """A reward model's head, in float32 inside bfloat16 too, where a score has two or three digits."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            return F.linear(hidden.to(self.weight.device, torch.float32), self.weight)


class LastScores:
    """Scores of the rows of padded batches at their last tokens, by a reward model's forward pass (also in PEFT, DDP or
    DeepSpeed).

    transformers has one score for each row that it reads. Where rows are joined, a hook puts those of all texts there.
    """

    def __init__(self, model: PreTrainedModel | PeftModel):
        self.last: tuple[torch.Tensor, torch.Tensor] | None = None  # rows and columns of joined texts' last tokens
        self.model = inside_peft(model)
        self.model.score.register_forward_hook(self._of_texts)

    def _of_texts(self, head: torch.nn.Module, inputs: tuple, scores: torch.Tensor) -> torch.Tensor | None:
        """[1, tokens, texts]: at each token the scores of all texts, whichever token transformers takes."""
        if self.last is None:
            return None
        return scores[self.last].squeeze(-1).expand(*scores.shape[:2], -1)

    def __call__(
        self, model: torch.nn.Module, batch: dict[str, torch.Tensor], layout: Layout = Layout.PADDED
    ) -> torch.Tensor:
        """[rows] float32.

        Args:
            model: as its trainer wraps it, or as it is.
            batch: `input_ids` and `attention_mask`, [rows, length] int64, padded on the right.
            layout: in which the rows pass through the model.
        """
        if layout is not Layout.PADDED:
            is_token = batch["attention_mask"]
            is_last = is_token.bool() & (is_token.cumsum(dim=1) == is_token.sum(dim=1, keepdim=True))
            self.last = places(is_last, batch, layout)
        try:
            logits = model(**forward_inputs(batch, layout), use_cache=False).logits
        finally:
            self.last = None
        return logits.float().flatten()


def load_scoring_base(
    path: str, *, pad_token_id: int, flag: str = "--model_name_or_path", needs_head: bool = False, **base_options
) -> PreTrainedModel:
    """A base model with a score head; a new head is all zeros, so that every score is 0.

    Args:
        pad_token_id: transformers takes the score at the last token that is not this one, on whichever side the
            padding is; no text that is scored may end with it.
        needs_head: refuse a model without a head of its own, instead of giving it one.
    """
    hub_options = {name: base_options[name] for name in ("cache_dir", "trust_remote_code") if name in base_options}
    config = load_config(path, flag=flag, **hub_options)
    scores_already = is_reward_model(config)
    if scores_already and config.num_labels != 1:
        raise UserError(f"{flag} {path}: a classifier with {config.num_labels} classes; a reward model gives one score")
    if needs_head and not scores_already:
        raise UserError(f"{flag} {path}: no reward model: it has no score head; reward_modeling.py trains one")
    register_scoring_class(config)
    base = load_base_model(
        path, flag=flag, model_class=AutoModelForSequenceClassification, num_labels=1, **base_options
    )
    if not isinstance(getattr(base, "score", None), torch.nn.Linear):
        raise UserError(f"{flag} {path}: its head is not called score, as those of language models are")
    head = ScoreHead(base.score.in_features, 1, bias=False, device=base.score.weight.device, dtype=torch.float32)
    with torch.no_grad():
        head.weight.copy_(base.score.weight) if scores_already else head.weight.zero_()
    base.score = head
    text_config(base.config).pad_token_id = pad_token_id
    return base


def has_untrained_head(model: PreTrainedModel | PeftModel) -> bool:
    """Whether a reward model's trained head is still all zeros."""
    heads = [weights for name, weights in model.named_parameters() if "score" in name.split(".")]
    return not any(weights.any() for weights in heads if weights.requires_grad)


def check_score_head(lora_model: str, flag: str) -> None:
    """Refuse an adapter whose file holds no trained score head; PEFT would go on with a random one."""
    config = read_adapter_config(lora_model)
    if not is_reward_model(config):
        raise UserError(
            f"{flag} {lora_model}: no reward model: a {config.task_type} adapter has no score head; "
            "reward_modeling.py trains one"
        )
    with safe_open(Path(lora_model, ADAPTER_WEIGHTS), framework="pt") as file:
        heads = [name for name in file.keys() if "score" in name.split(".")]  # noqa: SIM118 - it is no mapping
        if not heads:
            raise UserError(f"{flag} {lora_model}: {ADAPTER_WEIGHTS} holds no score head; take another checkpoint")
        if not any(file.get_tensor(name).any() for name in heads):
            raise UserError(f"{flag} {lora_model}: {UNTRAINED_HEAD}")
