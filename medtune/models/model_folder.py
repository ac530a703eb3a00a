"""How a trained model is asked: its tokenizer, the template of its training, its context, and whether it scores.

Everything that uses a trained model starts here, so that its prompts are those of training; `lineage_of` makes the
record that training leaves for it.
"""

import sys
from collections.abc import Mapping
from dataclasses import dataclass

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from medtune.arguments import DataArguments, ModelArguments
from medtune.errors import UserError
from medtune.models.lineage import (
    Lineage,
    base_of,
    check_model_path,
    is_adapter,
    read_adapter_config,
    read_lineage,
    tokenizer_source,
)
from medtune.models.loading import load_config, load_tokenizer, weights_fingerprint
from medtune.models.score_heads import is_reward_model
from medtune.reading.chat_template import ChatTemplate
from medtune.reading.thinking import NOTHINK, Thinking, has_switch
from medtune.reading.tokenization import load_chat_template
from template import named_template

# ---------------------------------------------------------------- a model to be used


@dataclass(frozen=True)
class ModelFolder:
    """A model to be used, before its weights are loaded.

    base_model, base_flag: hub name or folder of an adapter's base or of a whole model, and the flag that named it.
    lora_model: the adapter's folder, None for a whole model.
    scorer: flag and path of what scores replies, the adapter or the whole model; "" where it writes them.
    config: of the base model.
    lineage: the record that training left in the folder, if any.
    tokenizer_source: the folder that the tokenizer was read from.
    chat_template: the one of training; None for a model without turns.
    """

    base_model: str
    base_flag: str
    lora_model: str | None
    scorer: str
    config: PretrainedConfig
    lineage: Lineage | None
    tokenizer_source: str
    tokenizer: PreTrainedTokenizerBase
    chat_template: ChatTemplate | None

    @property
    def is_reward_model(self) -> bool:
        return bool(self.scorer)

    @property
    def context(self) -> int:
        """The longest prompt and reply in tokens."""
        return getattr(self.config.get_text_config(), "max_position_embeddings", None) or sys.maxsize

    @property
    def reads_thoughts(self) -> bool:
        """Whether a reward model was trained on replies with thoughts, and so scores them."""
        return self.lineage is not None and self.lineage.reads_thoughts


def describe_folder(
    path: str, flag: str, base_model: str | None = None, *, allow_pickle_weights: bool = False, **hub_options
) -> ModelFolder:
    """What is at `path`, which `flag` named: a whole model, or an adapter.

    Args:
        base_model: what `--base_model` names, for an adapter at `path`; None for the base that it records.

    Raises UserError if one of them is not a complete model.
    """
    base_flag = "--base_model" if base_model else flag
    check_model_path(base_model or path, base_flag, allow_pickle_weights)
    lora_config = read_adapter_config(path, flag) if base_model or is_adapter(path) else None
    base_model = base_model or base_of(path)
    config = load_config(base_model, flag=base_flag, **hub_options)
    scorer = f"{base_flag} {base_model}" if is_reward_model(config) else ""
    if lora_config and is_reward_model(lora_config):
        scorer = f"{flag} {path}"
    source, lineage = tokenizer_source(path, base_model), read_lineage(path)
    tokenizer = load_tokenizer(source, flag=flag if source == path else base_flag, **hub_options)
    return ModelFolder(
        base_model=base_model,
        base_flag=base_flag,
        lora_model=path if lora_config else None,
        scorer=scorer,
        config=config,
        lineage=lineage,
        tokenizer_source=source,
        tokenizer=tokenizer,
        chat_template=_own_template(tokenizer, lineage),
    )


def refuse_reward_model(folder: ModelFolder, instead: str = "") -> None:
    """Refuse a reward model where replies are generated; `instead` says what to do with it."""
    if folder.is_reward_model:
        raise UserError(f"{folder.scorer}: a reward model, which scores replies and writes none{instead}")


# ---------------------------------------------------------------- template


def _own_template(tokenizer: PreTrainedTokenizerBase, lineage: Lineage | None) -> ChatTemplate | None:
    """The template saved with the tokenizer, or else the one that the lineage names."""
    thinking = _thinking_of(lineage)
    if tokenizer.chat_template is not None:
        return load_chat_template(tokenizer, None, thinking)
    return load_chat_template(tokenizer, lineage.template, thinking) if lineage and lineage.template else None


def _thinking_of(lineage: Lineage | None) -> Thinking | None:
    return (lineage and lineage.thinking) or None


def _thinking_for(template_name: str | None, lineage: Lineage | None) -> Thinking | None:
    """What a named template is to write of thoughts: as in training, if it can."""
    thinking = _thinking_of(lineage)
    if template_name is None:
        return thinking
    has_no_place = thinking == "empty" and not has_switch(named_template(template_name))
    return None if has_no_place or template_name.endswith(NOTHINK) else thinking


def choose_template(folder: ModelFolder, template_name: str | None) -> ChatTemplate:
    """The template that the model was trained with, or the named one where it renders the same.

    Raises UserError for a name that would ask the model in another form than it was taught, and where there is none.
    """
    own = folder.chat_template
    if template_name is None and own is not None:
        return own
    own_prompts = _rendered_probes(own) if own else [None] * len(_PROBES)
    chat_template = load_chat_template(folder.tokenizer, template_name, _thinking_for(template_name, folder.lineage))
    is_trained = folder.lineage is not None or folder.tokenizer_source == folder.lora_model
    # Pretraining reads text without turns: any template may be tried on it.
    if is_trained and not (folder.lineage and folder.lineage.stage == "pt"):
        for own_prompt, prompt in zip(own_prompts, _rendered_probes(chat_template), strict=True):
            if own_prompt is not None and own_prompt != prompt:
                raise UserError(
                    f"--template_name {template_name}: it asks in another form than the model was trained with: "
                    f"{_difference(prompt, own_prompt)}; leave the flag out"
                )
    return chat_template


_QUESTION = {"role": "user", "content": "probe question"}
_PROBE = [_QUESTION, {"role": "assistant", "content": "probe answer"}, _QUESTION]
_PROBES = (_PROBE, [{"role": "system", "content": "probe system"}, *_PROBE])


def _rendered_probes(chat_template: ChatTemplate) -> list[str | None]:
    """Two short conversations as text; None for one that the template refuses (some take no system turn)."""
    texts = []
    for messages in _PROBES:
        try:
            texts.append(chat_template.prompt(messages))
        except UserError:
            texts.append(None)
    return texts


def _difference(text: str | None, trained_text: str) -> str:
    """Where two renderings part."""
    if text is None:
        return "it refuses a system prompt"
    n_same = next((n for n in range(len(text)) if not trained_text.startswith(text[: n + 1])), len(text))
    return f"{text[n_same:]!r:.60} instead of {trained_text[n_same:]!r:.60}"


# ---------------------------------------------------------------- what a training leaves


def lineage_of(
    model_args: ModelArguments,
    data_args: DataArguments,
    *,
    stage: str,
    template: str | None = None,
    thinking: Thinking | None = None,
    reads_thoughts: bool = False,
    documents: str = "",
    flags: Mapping[str, str],
    flag: str = "--model_name_or_path",
) -> Lineage:
    """The record of a run, for `lineage.json` in its checkpoints.

    Args:
        template: its `--template_name`; None is the tokenizer's own.
        thinking: what the template writes of thoughts (`ChatTemplate.thinking`).
        reads_thoughts: of a reward model, whether the replies that it is trained on have thoughts.
        documents: of pretraining, their form (`DocumentEncoder.form`).
        flags: of the command, as written (`StageArgumentParser.given`).
        flag: what named the model to start from.
    """
    start = model_args.model_name_or_path
    base_model, hub_options = base_of(start), model_args.hub_options
    config = load_config(base_model, flag=flag, **hub_options).get_text_config()
    return Lineage(
        base_model=base_model,
        parent=start if base_model != start else None,
        stage=stage,
        template=template or "",
        data=data_args.dataset_name or str(data_args.train_file_dir),
        hidden_size=config.hidden_size,
        vocab_size=config.vocab_size,
        base_weights=weights_fingerprint(base_model, flag=flag, **hub_options),
        start_weights=weights_fingerprint(start, flag=flag, **hub_options),
        flags=dict(flags),
        thinking=thinking or "",
        reads_thoughts=reads_thoughts,
        documents=documents,
    )
