"""The rows that a stage will train on, read as the stage reads them, or assumed."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from medtune.errors import UserError
from medtune.estimate.plan import RunPlan
from medtune.models.lineage import is_adapter
from medtune.models.loading import load_tokenizer
from medtune.models.text_attention import LEAST_SHARED, Layout
from medtune.reading.encoders import (
    AnsweredPromptEncoder,
    DialogueEncoder,
    DocumentEncoder,
    FeedbackEncoder,
    PairEncoder,
    PromptEncoder,
)
from medtune.reading.readers import read_dialogues, read_documents, read_feedback, read_pairs, read_questions
from medtune.reading.stage_data import Data, prepare_data
from medtune.reading.thinking import thinking_of_name
from medtune.reading.tokenization import IGNORED_LABEL, load_chat_template
from medtune.rl.prompts import EVAL_PROMPTS

# The share of an assumed dialogue that is not learned.
PROMPT_SHARE = 0.5


@dataclass
class RunRows:
    """What of the rows decides memory and time.

    longest, longest_eval: the rows of the largest batches of training and of evaluation.
    lengths, eval_lengths: [rows] tokens each; of a pair, the prompt and the longer reply.
    tokens, eval_tokens: `count_tokens` of all rows.
    facts: to print.
    """

    longest: list[dict]
    longest_eval: list[dict]
    lengths: np.ndarray
    eval_lengths: np.ndarray
    tokens: dict[Layout, float]
    eval_tokens: dict[Layout, float]
    facts: dict[str, str] = field(default_factory=dict)


def find_rows(plan: RunPlan, assumed_tokens: int | None) -> RunRows:
    """The rows of the plan's data.

    assumed_tokens: of an average row, in place of the data.

    Raises UserError where the data or the tokenizer cannot be read, as the stage would.
    """
    if assumed_tokens is not None:
        return _assumed_rows(plan, assumed_tokens)
    path, hub_options = plan.model_args.model_name_or_path, plan.model_args.hub_options
    start = path if is_adapter(path) else plan.base_model
    try:
        tokenizer = load_tokenizer(start, plan.model_args.tokenizer_name_or_path, **hub_options)
    except UserError as error:
        raise UserError(
            f"{error}; or estimate without it: --assume_tokens N, tokens of an average row, before the launcher, as in "
            "estimate_run.py --assume_tokens 600 run_sft.sh"
        ) from error
    data = _read(plan, tokenizer)
    train, evaluation = data.train, data.eval
    if plan.stage == "sft" and plan.own_args.packing:
        train = plan.module.pack(train, plan.own_args.model_max_length)
    n_train, n_eval = _batch_sizes(plan)
    return RunRows(
        _longest(train, n_train),
        _longest(evaluation, n_eval) if evaluation else [],
        np.array(train["length"][:]),
        np.array(evaluation["length"][:] if evaluation else []),
        count_tokens(_lengths_of(train)),
        count_tokens(_lengths_of(evaluation) if evaluation else {}),
        data.facts,
    )


def _batch_sizes(plan: RunPlan) -> tuple[int, int]:
    if plan.is_rl:
        n = max(plan.own_args.rollout_batch_size, plan.training_args.per_device_train_batch_size)
        return n, n
    return plan.training_args.per_device_train_batch_size, plan.training_args.per_device_eval_batch_size


def _longest(rows: Dataset, n_rows: int) -> list[dict]:
    order = np.argsort(-np.array(rows["length"][:]), kind="stable")[:n_rows]
    return rows.select(order.tolist()).to_list()


# ---------------------------------------------------------------- tokens

# Of a row, each with the prompt in front of it.
REPLY_COLUMNS = ("chosen_ids", "rejected_ids", "reply_ids")


def count_tokens(lengths: Mapping[str, np.ndarray]) -> dict[Layout, float]:
    """Tokens of rows that pass through a model, without padding, by the layout.

    lengths: [rows] tokens of each column of ids.
    """
    replies = [lengths[name] for name in REPLY_COLUMNS if name in lengths]
    if not replies:
        return dict.fromkeys(Layout, float(sum(map(np.sum, lengths.values()))))
    prompts = lengths["prompt_ids"]
    n_tokens = float(np.sum(replies) + len(replies) * prompts.sum())
    n_saved = float((len(replies) - 1) * prompts[prompts >= LEAST_SHARED].sum())
    return {Layout.PADDED: n_tokens, Layout.JOINED: n_tokens, Layout.SHARED_PREFIXES: n_tokens - n_saved}


def lengths_of_rows(rows: Sequence[dict]) -> dict[str, np.ndarray]:
    """[rows] tokens of each column of ids that a pass reads."""
    names = [name for name in ("prompt_ids", "input_ids", *REPLY_COLUMNS) if name in rows[0]]
    return {name: np.array([len(row[name]) for row in rows]) for name in names}


def _lengths_of(rows: Dataset) -> dict[str, np.ndarray]:
    names = [name for name in REPLY_COLUMNS if name in rows.column_names]
    if not names:
        return {"input_ids": np.array(rows["length"][:])}
    names.append("prompt_ids")
    table = rows.select_columns(names).with_format("arrow")[:]
    return {name: np.concatenate([chunk.value_lengths().to_numpy() for chunk in table[name].chunks]) for name in names}


# ---------------------------------------------------------------- read


def _read(plan: RunPlan, tokenizer: PreTrainedTokenizerBase) -> Data:
    own, data_args = plan.own_args, plan.data_args
    if plan.stage == "pt":
        if own.streaming:
            raise UserError("--streaming True: nobody knows the rows before they are read; give --assume_tokens")
        reader, encoder = read_documents, DocumentEncoder(tokenizer, own.block_size, own.packing_across_documents)
    else:
        thinking = thinking_of_name(own.template_name, own.thinking)
        template = load_chat_template(tokenizer, own.template_name, thinking)
        if plan.stage == "sft":
            limits = (own.model_max_length, own.truncation, own.train_on_inputs)
            reader, encoder = read_dialogues, DialogueEncoder(tokenizer, template, *limits)
        elif plan.is_rl:
            data_args = replace(data_args, max_eval_samples=data_args.max_eval_samples or EVAL_PROMPTS)
            form = {"exam_format": plan.reward_args.exam_format} if plan.reward_args else {}
            limits = (own.max_source_length, own.truncation)
            kind = PromptEncoder if getattr(own, "on_policy_share", 1) == 1 else AnsweredPromptEncoder
            reader, encoder = read_questions, kind(tokenizer, template, *limits, **form)
        else:
            is_unpaired = getattr(plan.training_args, "is_unpaired", False)
            reader, kind = (read_feedback, FeedbackEncoder) if is_unpaired else (read_pairs, PairEncoder)
            encoder = kind(tokenizer, template, own.max_source_length, own.max_target_length)
    return prepare_data(reader, encoder, data_args, plan.training_args, plan.model_args.cache_dir)


# ---------------------------------------------------------------- assumed


def _assumed_rows(plan: RunPlan, n_tokens: int) -> RunRows:
    """Rows of so many tokens each, and the longest ones as long as the flags allow."""
    own, n_rows = plan.own_args, plan.data_args.max_train_samples
    if n_rows is None and plan.training_args.max_steps <= 0 and not getattr(own, "total_episodes", None):
        raise UserError("--assume_tokens: how many rows are there? Give --max_train_samples or --max_steps")
    if plan.stage == "pt":
        limit = own.block_size
    elif plan.stage == "sft":
        limit = own.model_max_length
    elif plan.is_rl:
        limit = own.max_source_length
    else:
        limit = own.max_source_length + own.max_target_length
    is_known, n_rows = n_rows is not None, n_rows or 1
    if plan.stage == "pt":
        n_rows, n_tokens = math.ceil(n_rows * n_tokens / limit), limit
    n_eval = plan.data_args.max_eval_samples or EVAL_PROMPTS if plan.training_args.do_eval else 0
    n_train_batch, n_eval_batch = _batch_sizes(plan)
    n_tokens, n_assumed = min(n_tokens, limit), f"{n_rows:,}" if is_known else "as many as the run takes,"
    of_all = f"{n_assumed} assumed, of {n_tokens} tokens each and of {limit} in the largest batch"
    longest = [_assumed_row(plan, limit, index) for index in range(n_train_batch)]
    of_row = count_tokens(lengths_of_rows(longest[:1]))
    return RunRows(
        longest,
        [_assumed_row(plan, limit, index) for index in range(n_eval_batch if n_eval else 0)],
        np.full(n_rows, n_tokens),
        np.full(n_eval, n_tokens),
        *({layout: n * n_tokens / limit * of_one for layout, of_one in of_row.items()} for n in (n_rows, n_eval)),
        {"rows": of_all},
    )


def _assumed_row(plan: RunPlan, n_tokens: int, index: int) -> dict:
    """A row that shares no prefix with one of another index."""
    ids, n_prompt = [3 * index + 1] * n_tokens, int(PROMPT_SHARE * n_tokens)
    if plan.stage == "pt":
        return {"input_ids": ids, "labels": ids, "seq_lengths": [n_tokens], "source": []}
    if plan.stage == "sft":
        return {"input_ids": ids, "labels": [IGNORED_LABEL] * n_prompt + ids[n_prompt:], "source": ""}
    if plan.is_rl:
        return {"prompt_ids": ids}
    n_prompt = min(plan.own_args.max_source_length, n_tokens)
    reply, other = ([3 * index + token] * (n_tokens - n_prompt) for token in (2, 3))
    row = {"prompt_ids": ids[:n_prompt], "source": ""}
    if getattr(plan.training_args, "is_unpaired", False):
        return row | {"reply_ids": reply, "mismatched_ids": other, "is_desirable": True}
    return row | {"chosen_ids": reply, "rejected_ids": other}


def padded_tokens(lengths: Sequence[int] | np.ndarray, batch_size: int, grouped: bool = False) -> tuple[float, float]:
    """Tokens of all batches with their padding, and the sum of the squares of the rows' padded lengths.

    grouped: like lengths together, otherwise in a random order.
    """
    order = np.sort(lengths) if grouped else np.random.default_rng(0).permutation(lengths)
    padded = np.pad(order, (0, -len(order) % batch_size)).reshape(-1, batch_size).max(axis=1).astype(float)
    return float(padded.sum() * batch_size), float((padded**2).sum() * batch_size)
