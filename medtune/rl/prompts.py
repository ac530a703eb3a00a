"""The prompts that a model replies to: to learn from, and held out to be measured by."""

from dataclasses import dataclass, replace

from datasets import Dataset
from transformers import TrainingArguments

from medtune.arguments import DataArguments
from medtune.reading.encoders import PromptEncoder
from medtune.reading.readers import read_questions
from medtune.reading.stage_data import prepare_data

# Held-out prompts without --max_eval_samples: a reply to each is written at every evaluation.
EVAL_PROMPTS = 100


@dataclass
class Prompts:
    """The rows of training, those held out ([] without --do_eval), and the facts to log."""

    train: Dataset
    eval: list[dict]
    facts: dict[str, str]


def prepare_prompts(
    encoder: PromptEncoder, data_args: DataArguments, training_args: TrainingArguments, cache_dir: str | None
) -> Prompts:
    """Read, hold out, encode and cache the prompts. Raises UserError as `prepare_data` does."""
    n_eval = data_args.max_eval_samples or EVAL_PROMPTS
    data_args = replace(data_args, max_eval_samples=n_eval)
    data = prepare_data(read_questions, encoder, data_args, training_args, cache_dir)
    if data.eval is None:
        return Prompts(data.train, [], data.facts)
    rows = data.eval.select(range(min(n_eval, len(data.eval)))).to_list()  # a dialogue has several
    return Prompts(data.train, rows, data.facts | {"eval replies": str(len(rows))})
