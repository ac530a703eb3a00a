"""Encode records to the rows of a stage: one encoder for each kind of row, with its length limits."""

import json
import math
import sys
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from itertools import pairwise
from typing import ClassVar, Literal

import numpy as np
from datasets import Dataset, Features, Value, concatenate_datasets
from datasets import List as ListFeature
from transformers import PreTrainedTokenizerBase

from medtune.errors import Unusable, UserError
from medtune.reading.blocks import ENDS_OF_TEXT, cut_blocks, document_end_id, document_start_ids
from medtune.reading.chat_template import ChatTemplate
from medtune.reading.criteria import to_criteria
from medtune.reading.exams import Exam, ExamFormat
from medtune.reading.finding import RECORD_ENDINGS, TEXT_ENDINGS
from medtune.reading.keys import Reading
from medtune.reading.kinds import Kind
from medtune.reading.records import BadRecord, Dialogue, Document, Feedback, Pair, Prompt, Question, Report, T
from medtune.reading.thinking import Thinking
from medtune.reading.thoughts import split_reply
from medtune.reading.tokenization import (
    Truncation,
    encode_dialogue,
    encode_exchange,
    encode_prompt,
    encode_replies,
    load_chat_template,
    n_thoughts_left_out,
    refuse_control_tokens,
    shorten_prompt,
)

USUAL_END = ENDS_OF_TEXT[0]
_IDS, _LENGTH, _TEXT = ListFeature(Value("int32")), Value("int32"), Value("string")


@dataclass
class Encoder(ABC):
    """Turns one record into one row. Its other fields are the limits, which are part of the cache key."""

    kind: ClassVar[str]  # what the records are called
    features: ClassVar[Features]  # of a row; every row has `source` ("file:line") and `length` (of what it costs)
    endings: ClassVar[Sequence[str]] = RECORD_ENDINGS  # of the files that hold such records
    unread: ClassVar[str] = Reading.unread  # what becomes of keys of records that no dialect has

    tokenizer: PreTrainedTokenizerBase

    @property
    def thinking(self) -> Thinking | None:
        """What the template writes of thoughts; None without the flag."""
        return None

    def __call__(self, record: T) -> dict:
        """The row of a record. Raises Unusable for a fault, and where nothing is left within the limits."""
        (row,) = self.rows([record])
        if isinstance(row, Unusable):
            raise row
        return row

    def rows(self, records: Sequence[T]) -> list[dict | Unusable]:
        """The row of each record, or why it has none."""
        rows: list[dict | Unusable] = []
        for record in records:
            try:
                rows.append(self.row(record))
            except Unusable as fault:
                rows.append(fault)
            except UserError as error:
                rows.append(Unusable("not renderable", str(error)))
        return rows

    @abstractmethod
    def row(self, record: T) -> dict:
        """As a call, but where the template cannot render the record UserError."""

    def examples(self, record: T) -> list:
        """The examples that become one row each: the record itself, or its parts."""
        return [record]

    def finish(self, rows: Dataset, report: Report) -> Dataset:
        """Process all rows together, and add to the report what is known only then."""
        return rows

    @abstractmethod
    def describe(self, rows: Dataset) -> str:
        """The tokens of the finished rows, in words."""

    @property
    def limits(self) -> dict:
        """The flags that decide the rows, as JSON values."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if name not in ("tokenizer", "chat_template")}


@dataclass
class TemplateEncoder(Encoder):
    """Of records with replies, whose thoughts are learned or not."""

    chat_template: ChatTemplate

    @property
    def thinking(self) -> Thinking | None:
        return self.chat_template.thinking

    @property
    def left_out_thoughts(self) -> str:
        """What is counted of the thoughts that are not learned."""
        if self.chat_template.learns_thoughts:
            return "thoughts of earlier replies, left out by the template while the replies are learned"
        return f"thoughts of replies that are learned without them (--thinking {self.thinking})"

    def note_left_out(self, rows: Dataset, report: Report) -> None:
        notes = Reading()
        for n_left_out, source in zip(rows["n_thoughts_left_out"][:], rows["source"][:], strict=True):
            for _ in range(n_left_out):
                notes.note(self.left_out_thoughts, source)
        report.notes += notes.lines()


@dataclass
class DialogueEncoder(TemplateEncoder):
    """Rows of `input_ids` and `labels`, as `encode_dialogue` makes them."""

    kind = "dialogues"
    features = Features(input_ids=_IDS, labels=_IDS, length=_LENGTH, n_thoughts_left_out=_LENGTH, source=_TEXT)

    max_length: int
    truncation: Truncation = "drop"
    train_on_inputs: bool = False

    def examples(self, record: Dialogue) -> list[Dialogue]:
        if self.train_on_inputs:  # which learns all that is written, as it is
            return [record]
        return [replace(record, messages=messages) for messages in self.chat_template.examples(record.messages)]

    def row(self, record: Dialogue) -> dict:
        ids, labels = encode_dialogue(self.tokenizer, self.chat_template, record.messages, record.tools, **self.limits)
        n_left_out = n_thoughts_left_out(self.chat_template, record.messages, record.tools)
        return {"input_ids": ids, "labels": labels, "length": len(ids), "n_thoughts_left_out": n_left_out}

    def finish(self, rows: Dataset, report: Report) -> Dataset:
        self.note_left_out(rows, report)
        if n_further := len(rows) - len(set(rows["source"][:])):
            report.notes.append(
                f"dialogues of several questions as one example for each, {n_further} more than dialogues: the "
                "template writes earlier replies otherwise than it asks for them, so each is learned as the last"
            )
        return rows.remove_columns("n_thoughts_left_out")

    def describe(self, rows: Dataset) -> str:
        return f"{sum(rows['length'][:]):,}, the longest dialogue {max(rows['length'][:])}"


@dataclass
class PairEncoder(TemplateEncoder):
    """Rows with the ids of a prompt and of both replies; `length` counts the prompt and the longer reply.

    A prompt over its limit loses its oldest exchanges, then the start of the question; a reply over its limit is cut
    and gets no end token. `margin` is NaN where the data has none. `n_thoughts` are those of the two replies' ids.
    """

    kind = "pairs"
    features = Features(
        prompt_ids=_IDS,
        chosen_ids=_IDS,
        rejected_ids=_IDS,
        margin=Value("float32"),
        n_cut=_LENGTH,
        n_thoughts=_LENGTH,
        n_thoughts_left_out=_LENGTH,
        length=_LENGTH,
        source=_TEXT,
    )

    max_prompt_length: int
    max_reply_length: int

    def row(self, record: Pair) -> dict:
        replies = (record.chosen, record.rejected)
        prompt_ids, (chosen_ids, rejected_ids), n_cut = encode_replies(
            self.tokenizer, self.chat_template, record.messages, replies, record.tools, **self.limits
        )
        if chosen_ids == rejected_ids:
            if not (n_cut or self.chat_template.learns_thoughts):
                same = f"the replies differ in their thoughts alone, which --thinking {self.thinking} leaves out"
                raise Unusable("same answers", same)
            same = f"both replies begin with the same --max_target_length {self.max_reply_length} tokens"
            raise Unusable("same within the limit", same)
        n_thoughts = sum(bool(split_reply(reply).thought) for reply in replies)
        n_learned = n_thoughts if self.chat_template.learns_thoughts else 0
        margin = math.nan if record.margin is None else record.margin
        length = len(prompt_ids) + max(len(chosen_ids), len(rejected_ids))
        ids = {"prompt_ids": prompt_ids, "chosen_ids": chosen_ids, "rejected_ids": rejected_ids}
        counts = {"n_cut": n_cut, "n_thoughts": n_learned, "n_thoughts_left_out": n_thoughts - n_learned}
        return ids | counts | {"margin": margin, "length": length}

    def finish(self, rows: Dataset, report: Report) -> Dataset:
        self.note_left_out(rows, report)
        return rows.remove_columns("n_thoughts_left_out")

    def describe(self, rows: Dataset) -> str:
        n_cut = sum(rows["n_cut"][:])
        cut = f", {n_cut} of {2 * len(rows)} replies cut at {self.max_reply_length}" if n_cut else ""
        return f"the longest prompt and reply {max(rows['length'][:])}{cut}"


class ScoredPairEncoder(PairEncoder):
    """The same rows for the reward model, whose loss knows margins."""

    def describe(self, rows: Dataset) -> str:
        margins = [margin for margin in rows["margin"][:] if not math.isnan(margin)]
        stated = f"; {len(margins)} with a margin, {np.mean(margins):.3g} on average" if margins else ""
        return super().describe(rows) + stated


@dataclass
class FeedbackEncoder(TemplateEncoder):
    """Rows of a prompt, its reply, whether it is a good one, and another prompt's reply (`mismatched_ids`).

    The limits are those of pairs; `length` is that of the prompt and the longer reply.
    """

    kind = "replies"
    features = Features(
        prompt_ids=_IDS,
        reply_ids=_IDS,
        is_desirable=Value("bool"),
        is_cut=Value("bool"),
        n_thoughts_left_out=_LENGTH,
        length=_LENGTH,
        source=_TEXT,
    )

    max_prompt_length: int
    max_reply_length: int

    def row(self, record: Feedback) -> dict:
        prompt_ids, (reply_ids,), n_cut = encode_replies(
            self.tokenizer, self.chat_template, record.messages, [record.reply], record.tools, **self.limits
        )
        is_left_out = bool(split_reply(record.reply).thought) and not self.chat_template.learns_thoughts
        columns = {"prompt_ids": prompt_ids, "reply_ids": reply_ids, "is_cut": n_cut > 0}
        columns |= {"n_thoughts_left_out": int(is_left_out)}
        return columns | {"length": len(prompt_ids) + len(reply_ids), "is_desirable": record.is_desirable}

    def finish(self, rows: Dataset, report: Report) -> Dataset:
        self.note_left_out(rows, report)
        rows = rows.remove_columns("n_thoughts_left_out")
        if len(kinds := set(rows["is_desirable"][:])) == 1:
            kind = "desirable" if kinds.pop() else "undesirable"
            report.notes.append(f"all replies are {kind}: KTO learns from the difference, so add some that are not")
        return with_mismatched_replies(rows) if len(rows) else rows

    def describe(self, rows: Dataset) -> str:
        n_good, n_cut = sum(rows["is_desirable"][:]), sum(rows["is_cut"][:])
        cut = f", {n_cut} of {len(rows)} replies cut at {self.max_reply_length}" if n_cut else ""
        counts = f"{n_good} replies desirable, {len(rows) - n_good} undesirable"
        return f"the longest prompt and reply {max(rows['length'][:])}{cut}; {counts}"


def with_mismatched_replies(rows: Dataset) -> Dataset:
    """The rows, each with the reply to the next different prompt, from which KTO estimates its KL term.

    So the estimate depends neither on batches nor on processes. Raises UserError where all prompts are the same.
    """
    prompts, replies = rows["prompt_ids"][:], rows["reply_ids"][:]
    partner = next((index for index in range(len(rows)) if prompts[index] != prompts[-1]), None)
    if partner is None:
        raise UserError(
            f"KTO sets replies against other prompts, and the {len(rows)} of a part have the same: add others"
        )
    partners = [partner]
    for index in reversed(range(len(rows) - 1)):
        partner = index + 1 if prompts[index + 1] != prompts[index] else partner
        partners.append(partner)
    mismatched = [replies[partner] for partner in reversed(partners)]
    longest = [max(len(reply), len(other)) for reply, other in zip(replies, mismatched, strict=True)]
    lengths = [len(prompt) + length for prompt, length in zip(prompts, longest, strict=True)]
    columns = Dataset.from_dict(
        {"mismatched_ids": mismatched, "length": lengths}, Features(mismatched_ids=_IDS, length=_LENGTH)
    )
    return concatenate_datasets([rows.remove_columns("length"), columns], axis=1)


_NEEDED = {
    "answer": "a reward compares with the letter of the right option: --rewards exam needs questions with options and "
    "'answer' or 'answer_idx'",
    "reference": "a reward compares with the data's own answer: --rewards reference needs questions with answers in "
    "words",
}


@dataclass
class PromptEncoder(TemplateEncoder):
    """The prompt before each answer to a user's turn, with its history; each prompt once.

    A dialogue that ends with the user asks too. Rows of `prompt_ids`, `messages` (JSON of the messages that these ids
    stand for, and the tools), `reply` (the dialogue's own answer, "" without) and `record`: JSON of the keys beside the
    dialogue, with `answer` (the right letter) and `options` for an exam question, else `reference` (the reply).
    "cut_prompt_start" leaves out the oldest exchanges of a prompt over the limit, then the start of its question; an
    exam question, of which that would make another one, is left out.

    exam_format: how exam questions are asked. needed_keys: what every `record` must have; `rubrics` only in sound form,
    where it has some.
    """

    kind = "prompts"
    features = Features(prompt_ids=_IDS, messages=_TEXT, reply=_TEXT, record=_TEXT, length=_LENGTH, source=_TEXT)
    unread = "read by functions of --reward_file alone"

    max_prompt_length: int
    truncation: Literal["drop", "cut_prompt_start"]
    exam_format: ExamFormat = "tagged"
    needed_keys: Sequence[str] = ()

    def examples(self, record: Question) -> list[Prompt]:
        # Rubrics are about the answer to the last question.
        earlier = {key: value for key, value in record.rest.items() if key != "rubrics"}
        prompts = [
            Prompt(record.messages[: index + 1], record.tools, reply["content"], record.source, rest=earlier)
            for index, (message, reply) in enumerate(pairwise([*record.messages, {"role": "", "content": ""}]))
            if message["role"] == "user"
        ]
        prompts[-1] = replace(prompts[-1], rest=record.rest)
        return prompts if record.exam is None else [self._as_exam(prompts[-1], record.exam)]

    def _as_exam(self, prompt: Prompt, exam: Exam) -> Prompt:
        """The prompt in the encoder's form of exam questions."""
        *before, _ = prompt.messages
        messages = [*before, {"role": "user", "content": exam.prompt(self.exam_format)}]
        return replace(prompt, messages=messages, reply=exam.reply(self.exam_format) if exam.answer else "", exam=exam)

    def _record(self, prompt: Prompt) -> dict:
        """What rewards may know of the prompt. Raises Unusable where a needed key is not in it."""
        exam = prompt.exam and prompt.exam.with_one_answer()
        known = {"reference": prompt.reply} if exam is None else {"answer": exam.answer, "options": exam.options}
        if "rubrics" in self.needed_keys and "rubrics" in prompt.rest:
            to_criteria(prompt.rest["rubrics"])
        for key in (key for key in self.needed_keys if key != "rubrics"):
            if exam and key == "answer":
                exam.refuse_unanswered()
            if not known.get(key):
                raise Unusable(f"no {key}", _NEEDED[key])
        return prompt.rest | known

    def row(self, record: Prompt) -> dict:
        known = json.dumps(self._record(record), ensure_ascii=False, default=str)
        messages, tools, limit = record.messages, record.tools, self.max_prompt_length
        refuse_control_tokens(self.chat_template, messages, tools)
        while len(ids := encode_prompt(self.tokenizer, self.chat_template, messages, tools)) > limit:
            is_cut = self.truncation == "cut_prompt_start" and record.exam is None
            messages = shorten_prompt(self.tokenizer, messages, n_excess=len(ids) - limit) if is_cut else None
            if messages is None:
                raise Unusable("prompt too long", f"{len(ids)} tokens, over --max_source_length {limit}")
        dialogue = json.dumps([messages, tools], ensure_ascii=False)
        columns = {"prompt_ids": ids, "messages": dialogue, "reply": record.reply, "record": known}
        return columns | {"length": len(ids)}

    def finish(self, rows: Dataset, report: Report) -> Dataset:
        first: dict[tuple[int, ...], str] = {}
        distinct = []
        for index, (ids, source) in enumerate(zip(rows["prompt_ids"], rows["source"], strict=True)):
            if tuple(ids) in first:
                report.drop(BadRecord(source, "same prompt", f"as {first[tuple(ids)]}"))
            else:
                first[tuple(ids)] = source
                distinct.append(index)
        return rows.select(distinct)

    def describe(self, rows: Dataset) -> str:
        return f"the longest prompt {max(rows['length'][:])}"


@dataclass
class AnsweredPromptEncoder(PromptEncoder):
    """Prompts whose rows also have `reply_ids`: the dialogue's own answer with its end token, as SFT learns it."""

    kind = "prompts and replies"
    features = Features(PromptEncoder.features | {"reply_ids": _IDS})

    def row(self, record: Prompt) -> dict:
        if not record.reply:
            raise Unusable("no reply", "a dialogue that ends with the user's turn has no reply to learn from")
        row = super().row(record)
        messages, tools = json.loads(row["messages"])
        _, reply_ids = encode_exchange(self.tokenizer, self.chat_template, messages, record.reply, tools)
        return row | {"reply_ids": reply_ids}


@dataclass
class DocumentEncoder(Encoder):
    """Rows of ids of a document between its marks; `cut_blocks` joins and cuts them into the final rows."""

    kind = "documents"
    features = Features(input_ids=_IDS, length=_LENGTH, source=_TEXT)
    block_features = Features(input_ids=_IDS, labels=_IDS, seq_lengths=_IDS, length=_LENGTH, source=ListFeature(_TEXT))
    endings = TEXT_ENDINGS

    block_size: int = 1024
    packing_across_documents: bool = False
    one_document_a_row: bool = False

    def __post_init__(self):
        self.start_ids, self.end_id = document_start_ids(self.tokenizer), document_end_id(self.tokenizer)

    @property
    def form(self) -> str:
        """What a resumed run goes on with: the tokens around a document and its rows; "" for blocks of documents with
        nothing but <|endoftext|>, or else the eos, behind each.
        """
        marks = self.tokenizer.convert_ids_to_tokens([*self.start_ids, self.end_id])
        added = map(str, self.tokenizer.added_tokens_decoder.values())
        usual = USUAL_END if USUAL_END in added else self.tokenizer.eos_token
        parts = ["between " + " ".join(marks)] if marks != [usual] else []
        return ", ".join(parts + ["in rows of its own"] * self.one_document_a_row)

    @cached_property
    def _control_tokens(self) -> list[str]:
        return [str(token) for token in self.tokenizer.added_tokens_decoder.values() if token.special]

    def row(self, record: Document) -> dict:
        return self(record)

    def rows(self, records: Sequence[Document]) -> list[dict | Unusable]:
        texts = [record.text for record in records]  # together, so that the tokenizer uses its threads
        encoded = self.tokenizer(texts, add_special_tokens=False, return_attention_mask=False)["input_ids"]
        rows: list[dict | Unusable] = []
        for text, ids in zip(texts, encoded, strict=True):
            if token := next((token for token in self._control_tokens if token in text), None):
                rows.append(Unusable("control token", f"it holds {token}, which is no word but a mark; take it out"))
            else:
                ids = [*self.start_ids, *ids, self.end_id]
                rows.append({"input_ids": ids, "length": len(ids)})
        return rows

    def finish(self, rows: Dataset, report: Report) -> Dataset:
        return Dataset.from_dict(self.blocks(rows.with_format("numpy")[:]), self.block_features)

    def blocks(self, documents: dict[str, list]) -> dict[str, list]:
        """`cut_blocks` of columns `input_ids` and `source`."""
        return cut_blocks(documents, **self.limits)

    def describe(self, rows: Dataset) -> str:
        return f"{sum(rows['length'][:]):,} in {len(rows):,} blocks of at most {self.block_size}"


def unlimited_encoder(
    kind: Kind, tokenizer: PreTrainedTokenizerBase, template_name: str | None, thinking: Thinking | None = None
) -> Encoder:
    """The encoder of a kind of records without limits, for the tools that measure them."""
    if kind == "documents":
        return DocumentEncoder(tokenizer)
    chat_template = load_chat_template(tokenizer, template_name, thinking)
    if kind in ("pairs", "replies"):
        encoder_class = PairEncoder if kind == "pairs" else FeedbackEncoder
        return encoder_class(tokenizer, chat_template, max_prompt_length=sys.maxsize, max_reply_length=sys.maxsize)
    return DialogueEncoder(tokenizer, chat_template, max_length=sys.maxsize)
