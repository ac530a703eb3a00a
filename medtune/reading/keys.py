"""What keys beside the texts mean: harmless, unknown, or known to change what is learned.

A key that is known to matter is honoured; where it cannot be, the record is bad data. A key that nobody knows is
counted by its name.
"""

import re
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property, lru_cache

from medtune.errors import Unusable
from medtune.reading.thinking import THOUGHT_FORMS
from medtune.reading.thoughts import split_reply
from medtune.reading.values import holds_nothing, is_empty, text_of

_WRITTEN = {
    "leave_out": "left out (--reasoning think_tags keeps them)",
    "think_tags": "read as <think>...</think> before the reply",
    "headings": "written under headings before the reply",
}


@dataclass(frozen=True)
class Reading:
    """What the user said of the data, and what was met in it that is worth a line.

    A flag is None where the caller has no such flag, which advice then does not name.
    """

    ignore_keys: tuple[str, ...] | None = None  # keys of records and turns that are read as if they were absent
    role_map: Mapping[str, str] | None = None  # a name, and the role that it stands for
    null_words: bool = True  # whether "None" in a turn is a missing value, and not what somebody said
    thoughts: str = "think_tags"  # how thoughts in keys of their own are written, of THOUGHT_FORMS
    unread: str = "not read"  # what becomes of keys of records that nobody knows
    _notes: dict[str, list] = field(default_factory=dict)  # what: [how often, where first]
    _thought_keys: Counter[str] = field(default_factory=Counter)

    def ignoring(self, *keys: str) -> str:
        """Advice: how to read on without these keys."""
        if self.ignore_keys is None:
            return f"take {', '.join(map(repr, keys))} out of the record"
        listed = ",".join([*self.ignore_keys, *keys])
        return f"--ignore_keys {listed} reads on without {'them' if keys[1:] else 'it'}"

    def without_ignored(self, record: object) -> object:
        """A record or turn, if it is an object, without the keys to ignore."""
        if not self.ignore_keys or not isinstance(record, dict):
            return record
        return {key: value for key, value in record.items() if key not in self.ignore_keys}

    def note(self, what: str, source: str = "") -> None:
        self._notes.setdefault(what, [0, source])[0] += 1

    def note_keys(self, keys: tuple[str, ...], of: str = "of records") -> None:
        """Count keys that nobody knows."""
        for key in keys:
            self.note(f"{of}\0{key}")

    def with_thought(self, thought: str, key: str, reply: str) -> str:
        """The reply, with the thought that a key holds before it; counted."""
        self._thought_keys[key] += 1
        return THOUGHT_FORMS[self.thoughts].format(thought, reply).rstrip()

    @property
    def thoughts_apart(self) -> str:
        """How many replies had their thought in which keys; "" if none."""
        n_replies, keys = self._thought_keys.total(), ", ".join(map(repr, self._thought_keys))
        return f"thoughts of replies in a key of their own ({keys}): {n_replies:,}" if n_replies else ""

    def lines(self) -> list[str]:
        """One line for each note, one for all unknown keys of records, and one for those of turns."""
        lines = []
        for of, unread in (("of records", self.unread), ("of turns", "not read")):
            counts = [(key[len(of) + 1 :], n) for key, (n, _) in self._notes.items() if key.startswith(f"{of}\0")]
            counts.sort(key=lambda counted: -counted[1])
            if counts:
                listed = ", ".join(f"{key!r} ({n:,})" for key, n in counts[:20])
                more = f" and {len(counts) - 20} more" if len(counts) > 20 else ""
                lines.append(f"keys {of} that are {unread}: {listed}{more}")
        others = [(what, n, source) for what, (n, source) in self._notes.items() if "\0" not in what]
        if self.thoughts_apart:
            lines.append(f"{self.thoughts_apart}, {_WRITTEN[self.thoughts]}")
        return lines + [f"{what}: {n:,}, the first in {source}" for what, n, source in others]


def split_keys(listed: str | None) -> tuple[str, ...]:
    """The keys of `--ignore_keys`."""
    return tuple(sorted({key.strip() for key in (listed or "").split(",") if key.strip()}))


# Whether a reply is a good one, by true or false.
VERDICTS = (
    "label", "kto_tag", "is_correct", "correct", "is_good", "accepted", "is_accepted", "approved", "is_chosen",
    "desirable", "is_desirable", "thumbs_up", "valid", "is_valid", "is_right", "kto_label", "标签", "是否正确",
    "是否采纳", "是否合格",
)  # fmt: skip
# Those that KTO learns from.
FEEDBACK_KEYS = ("label", "kto_tag")
# Under these names numbers and words say so too.
CLEAR_VERDICTS = ("kto_tag", "is_correct", "是否正确", "是否采纳", "是否合格")
# Whether a turn, or the reply of a record, is learned, by true or false, or 1 or 0.
WEIGHTS = (
    "weight", "loss_weight", "loss_scale", "sample_weight", "loss", "train", "training", "trainable", "train_on_turn",
    "train_on", "train_detail", "training_detail", "output_with_loss", "with_loss", "compute_loss", "calculate_loss",
    "loss_mask", "learn", "learnable",
)  # fmt: skip
THOUGHTS = (
    "reasoning_content", "reasoning", "reasoning_text", "reasoning_details", "thinking", "thinking_content", "thought",
    "thoughts", "think", "cot", "complex_cot", "long_cot", "cot_content", "chain_of_thought", "reasoning_trace",
    "reasoning_traces", "reasoning_process", "reasoning_steps", "reasoning_chain", "think_content", "thinking_process",
    "thought_process", "thinking_trajectory", "thinking_trajectories", "deepseek_reasoning", "model_reasoning",
    "deepseek_thinking_trajectory", "gemini_thinking_trajectory", "inner_thoughts", "scratchpad", "思考", "思考过程",
    "思维链", "推理", "推理过程",
)  # fmt: skip
MODES = (
    "on", "off", "yes", "no", "auto", "none", "minimal", "low", "medium", "high", "enabled", "disabled", "true",
    "false",
)  # fmt: skip
MEDIA = (
    "image", "images", "image_url", "image_urls", "image_path", "image_paths", "img", "imgs", "picture", "pictures",
    "image_file", "image_files", "image_name", "image_id", "image_base64", "img_path", "img_name", "img_id", "photo",
    "photos", "pic", "pics", "figure_path", "图片", "图像", "video", "videos", "video_path", "audio", "audios",
    "audio_path", "pixel_values",
)  # fmt: skip
OPTIONS = ("options", "option", "choices", "option_list", "options_list", "选项", "备选答案")
# One option a key: A, opa, option_a, Choice A.
_LETTERED = re.compile(r"\s*(?:[A-H]|(?i:(?:op|opt|option|choice|选项)[_\s]*[a-h]))\s*")

# Said about a record and not in it: where it is from, what it is about, how it was judged or made.
HARMLESS = frozenset(
    """
    id _id idx index uid uuid guid no num row_id item_id doc_id docid sample_id record_id case_id data_id dialog_id
    dialogue_id conversation_id conv_id session_id chat_id prompt_id question_id answer_id qid pid turn_id message_id
    parent_id tool_call_id call_id example_id original_id source_id
    source sources src dataset data_source source_dataset dataset_name origin original_source subset config split
    url urls link href ref refs reference references citation citations license file filename file_name path doi pmid
    domain domains category categories sub_category subcategory type types kind tag tags topic topics topic_name
    subject subjects subject_name subject_id department departments cate1 cate2 class class_name classification
    disease diseases related_diseases specialty specialities keyword keywords label_name task task_name task_type
    tasks meta_info exam_type exam_class exam_subject question_type difficulty level answer_idx answer_index cop
    choice_type medical_task
    lang language languages locale country
    date time datetime timestamp created created_at create_time updated updated_at year published version
    title titles name names author authors user_name user user_id username annotator annotator_id creator model
    model_name models generator teacher
    score scores rating ratings rank ranking quality quality_score perplexity ppl reward rewards score_chosen
    score_rejected margin upvotes likes votes confidence
    length lengths len n_tokens num_tokens token_count tokens n_turns num_turns turns_count text_length
    meta metadata info extra extras additional_info notes note comment comments remark hash md5 sha256
    refusal annotations function_call audio_url finish_reason stop_reason logprobs markdown
    age gender sex height
    """.split()  # noqa: SIM905 - to be read
)


@dataclass(frozen=True)
class KeyPlan:
    """The keys of a record or turn by meaning; cached, since many records have the same keys."""

    verdicts: tuple[str, ...] = ()
    weights: tuple[str, ...] = ()
    thoughts: tuple[str, ...] = ()
    media: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    unknown: tuple[str, ...] = ()

    @cached_property
    def that_matter(self) -> tuple[str, ...]:
        return self.verdicts + self.weights + self.thoughts + self.media + self.options


@lru_cache(maxsize=4000)
def sort_keys(keys: tuple[str, ...], read: tuple[str, ...]) -> KeyPlan:
    """Sort the unread keys by meaning; case, blanks and punctuation in a name do not matter."""
    rest = [key for key in keys if key not in read]
    letters = {letter_of(key) for key in rest}
    sorted_keys: dict[str, list[str]] = {}
    for key in rest:
        kind = "options" if letter_of(key) and {"A", "B"} <= letters else _KINDS.get(_bare(key), "unknown")
        sorted_keys.setdefault(kind, []).append(key)
    sorted_keys.pop("harmless", None)
    return KeyPlan(**{kind: tuple(names) for kind, names in sorted_keys.items()})


def _bare(key: str) -> str:
    """`reasoning-content` and `reasoningContent` are `reasoning_content`."""
    return re.sub(r"[\W_]+", "", key).lower()


_TABLES = {
    "verdicts": VERDICTS, "weights": WEIGHTS, "thoughts": THOUGHTS, "media": MEDIA, "options": OPTIONS,
    "harmless": HARMLESS,
}  # fmt: skip
# Where a part of a thought has its text.
_THOUGHT_PARTS = ("text", "thinking", "summary")
_KINDS = {_bare(name): kind for kind, names in _TABLES.items() for name in names}


def is_harmless(key: str) -> bool:
    return _KINDS.get(_bare(key)) == "harmless"


def letter_of(key: str) -> str:
    """The letter of the option that a key holds, "" of any other key."""
    return key.strip()[-1].upper() if _LETTERED.fullmatch(key) else ""


def check_media(record: dict, plan: KeyPlan, reading: Reading, where: str) -> None:
    """Raise Unusable where a record or turn comes with a picture, a film or a sound."""
    if keys := [key for key in plan.media if not holds_nothing(record[key]) and record[key] is not False]:
        listed = ", ".join(map(repr, keys))
        raise Unusable("not text", f"{where} has {listed}, and only text is trained on; {reading.ignoring(*keys)}")


def check_prompt_keys(turn: dict, plan: KeyPlan, reading: Reading, where: str) -> None:
    """Raise Unusable where a turn that is not the assistant's has media, or is to be learned."""
    check_media(turn, plan, reading, where)
    for key in plan.weights:
        if _truth(turn[key]):
            raise Unusable(
                "weight of a prompt",
                f"{where} has {key!r}: {turn[key]!r}, and of turns only replies are learned; {reading.ignoring(key)}",
            )


def reply_with_thought(record: dict, plan: KeyPlan, reading: Reading, where: str, reply: str) -> str:
    """The reply of a record or turn, with the thought before it that a key holds and the reply does not.

    Raises Unusable where there are two thoughts, or one that is no text.
    """
    keys = [key for key in plan.thoughts if _is_thought(record[key])]
    if not keys:
        return reply
    if reading.thoughts == "leave_out":
        return reading.with_thought("", keys[0], reply)
    texts = {_thought_text(record[key], key, where, reading): key for key in keys}
    texts = {text: key for text, key in texts.items() if text not in reply}
    if not texts:
        return reply
    if len(texts) > 1 or split_reply(reply).thought:
        raise Unusable(
            "two thoughts",
            f"{where} has a thought in {' and in '.join(map(repr, texts.values()))}"
            f"{' and another in the reply' if len(texts) == 1 else ''}; {reading.ignoring(*texts.values())}",
        )
    ((thought, key),) = texts.items()
    return reading.with_thought(thought, key, reply)


def _thought_text(value: object, key: str, where: str, reading: Reading) -> str:
    """The text of a thought: a string, a list of steps, or parts as Anthropic's and OpenRouter's interfaces give."""
    parts = value if isinstance(value, list) else [value]
    texts = [
        next((part[name] for name in _THOUGHT_PARTS if name in part), part) if isinstance(part, dict) else part
        for part in parts
    ]
    try:
        return "\n".join(text_of(text, f"{where} ({key!r})") for text in texts)
    except Unusable as fault:
        raise Unusable(fault.reason, f"{fault.detail}; {reading.ignoring(key)}") from None


def refuse_thoughts(record: dict, plan: KeyPlan, reading: Reading, advice: str, replies: str = "") -> None:
    """Raise Unusable where a key of a record holds a thought that no reply has, and it is open before which."""
    keys = [key for key in plan.thoughts if _is_thought(record[key]) and reading.thoughts != "leave_out"]
    if keys := [key for key in keys if _thought_text(record[key], key, "the record", reading) not in replies]:
        listed = ", ".join(map(repr, keys))
        raise Unusable("thought apart", f"the record has a thought in {listed}; {advice}, or {reading.ignoring(*keys)}")


def check_reply_keys(record: dict, plan: KeyPlan, reading: Reading, where: str, of_turn: bool = False) -> str:
    """The key that marks the reply of a record or turn as one not to learn, "" if no key does.

    Raises Unusable where a key cannot be honoured.
    """
    if of_turn:
        check_media(record, plan, reading, where)
    for key in plan.verdicts:
        if not _is_approved(record[key], key, reading, where):
            return key
    for key in plan.weights:
        if not _is_weighed(record[key], key, reading, where, of_turn):
            return key
    return ""


def _is_approved(value: object, key: str, reading: Reading, where: str) -> bool:
    """False if the key marks the reply as bad; a value that is no verdict is taken for a topic."""
    if is_empty(value):
        return True
    truth = _truth(value)
    if truth is None and key.strip().lower() in CLEAR_VERDICTS:
        return value not in ("否", "错") and _zero_or_one(value) is not False
    if truth is None and _zero_or_one(value) is not None:
        raise Unusable(
            "unclear verdict",
            f"{where} has {key!r}: {value!r}; if 0 marks bad replies, take those records out, and then, or if it is a "
            f"topic, {reading.ignoring(key)}",
        )
    return truth is not False


def _is_weighed(value: object, key: str, reading: Reading, where: str, of_turn: bool) -> bool:
    """False if the weight is 0 or false. Raises Unusable for a weight between 0 and 1."""
    with suppress(ValueError):  # a cell of a csv file
        value = float(value) if isinstance(value, str) else value
    if is_empty(value):
        return True
    truth, name = _truth(value), key.strip().lower()
    if truth is None and not of_turn and (isinstance(value, str) or name == "loss"):
        return True  # beside a whole record: a word, or a measurement
    truth = _zero_or_one(value) if truth is None else truth
    if truth is None and not of_turn and name == "weight" and isinstance(value, int | float) and value > 1:
        return True  # a person's
    if truth is None:
        raise Unusable(
            "partial weight",
            f"{where} has {key!r}: {value!r}; a reply is learned (1) or not (0); {reading.ignoring(key)}",
        )
    return truth


def _is_thought(value: object) -> bool:
    """Whether a value is a thought (text or parts), and not the name of a thinking mode."""
    return (
        not holds_nothing(value)
        and not isinstance(value, bool | int | float)
        and str(value).strip().lower() not in MODES
    )


def _truth(value: object) -> bool | None:
    """True and false, also as a cell of a csv file has them."""
    if isinstance(value, bool):
        return value
    return {"true": True, "false": False}.get(value.strip().lower()) if isinstance(value, str) else None


def is_labelled(record: dict) -> bool:
    """Whether a key for KTO says that the reply is good or bad, and does not hold a topic."""
    return any(_verdict(record.get(key)) is not None for key in FEEDBACK_KEYS)


def feedback_of(record: dict, reading: Reading) -> bool:
    """Whether a KTO record's reply is marked as good. Raises Unusable if no key says so clearly."""
    given = {key: record[key] for key in FEEDBACK_KEYS if not is_empty(record.get(key))}
    if not given:
        listed = " or ".join(map(repr, FEEDBACK_KEYS))
        raise Unusable("no label", f"it has no {listed} with true for a good reply and false for a bad one; add it")
    truths = set()
    for key, value in given.items():
        truth = _verdict(value)
        if truth is None:
            advice = f"which is neither true nor false; {reading.ignoring(key)}"
            raise Unusable("unclear label", f"{key!r} is {value!r:.80}, {advice}")
        truths.add(truth)
    if len(truths) > 1:
        raise Unusable("unclear label", f"{' and '.join(map(repr, FEEDBACK_KEYS))} contradict each other; keep one")
    return truths.pop()


def _verdict(value: object) -> bool | None:
    return _zero_or_one(value) if _truth(value) is None else _truth(value)


def _zero_or_one(value: object) -> bool | None:
    return {"0": False, "1": True, "0.0": False, "1.0": True}.get(str(value).strip())
