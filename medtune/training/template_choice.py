"""The prompt template of a stage: its flags, and which thoughts it writes."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from loguru import logger

from medtune.models.lineage import read_lineage
from medtune.reading.thinking import Thinking, thinking_of_name
from medtune.training.checkpoints import refuse_changed


@dataclass
class TemplateArguments:
    template_name: str | None = field(
        default=None, metadata={"help": "Named prompt template of template.py instead of the tokenizer's own."}
    )
    thinking: Literal["keep", "drop", "empty"] | None = field(
        default=None,
        metadata={
            "help": "Thoughts before replies (<think>...</think>, reasoning_content): learned as they are, left out, "
            "or an empty one in the place of each; prompts ask so from then on. Without it as the model was trained."
        },
    )


def choose_thinking(template_args: TemplateArguments, start: str, checkpoint: str | None) -> Thinking | None:
    """--thinking; without it what the run to resume, or the model to start from, was trained with.

    Another choice than the model's is a new start, and logged as one.

    Args:
        start: hub name or folder of the model.
        checkpoint: of the run to resume.

    Raises UserError where a resumed run was begun with another choice, or the template's name contradicts the flag.
    """
    begun = read_lineage(checkpoint) if checkpoint else None
    thinking = thinking_of_name(template_args.template_name, template_args.thinking)
    if thinking and begun:
        refuse_changed(Path(checkpoint), {"--thinking": begun.thinking or "not given"}, {"--thinking": thinking})
    before = begun or read_lineage(start)
    if thinking is None and before and before.thinking:
        logger.info(f"--thinking {before.thinking}: as {checkpoint or start} was trained")
        return before.thinking
    if before and before.thinking and thinking != before.thinking:
        flag = "" if template_args.thinking else f"--template_name {template_args.template_name}: "
        logger.warning(
            f"{flag}--thinking {thinking}: {start} learned with {before.thinking}; prompts and replies differ from "
            "what it learned"
        )
    return thinking
