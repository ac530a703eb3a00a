"""Any conversation, any record, any bytes: what holds for all of them, tried on random ones."""

import json
import unicodedata
from copy import deepcopy
from pathlib import Path

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from medtune.errors import Unusable, UserError
from medtune.reading.conversations import to_dialogue, to_pair
from medtune.reading.finding import find_files
from medtune.reading.readers import read_dialogues, read_pairs
from medtune.reading.records import BadRecord, Dialogue, Pair
from medtune.reading.tokenization import IGNORED_LABEL, encode_dialogue, encode_prompt, load_chat_template
from medtune.reading.values import ANY_NULL_WORD, strip_blanks
from template import TEMPLATES

# The tokenizer and the folder stay the same for all examples, and a busy machine is no fault of the code.
TRIED = settings(
    max_examples=25,
    database=None,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.filter_too_much],
)

MARKS = [
    *("<|im_end|>", "<|im_start|>assistant\n", "<|endoftext|>", "</s>", "[INST]", "<think>", "{{ 1 }}", "\n\n", "："),
    "👨‍👩‍👧",
]
WORDS = st.one_of(
    st.text(max_size=12), st.sampled_from(MARKS), st.sampled_from(["头疼", "感冒了怎么办？", "rest", " "])
)
TEXT = st.lists(WORDS, min_size=1, max_size=5).map("".join)


@st.composite
def conversations(draw) -> list[dict]:
    """Messages as the reading gives them: an optional system turn, then user and assistant in turn, all with words."""
    words = TEXT.map(strip_blanks).filter(lambda text: text and text not in ANY_NULL_WORD)
    system = [{"role": "system", "content": draw(words)}] if draw(st.booleans()) else []
    exchanges = draw(st.lists(st.tuples(words, words), min_size=1, max_size=3))
    turns = [(role, text) for pair in exchanges for role, text in zip(("user", "assistant"), pair, strict=True)]
    return system + [{"role": role, "content": text} for role, text in turns]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=True) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)
KEYS = ["conversations", "messages", "from", "value", "role", "content", "tool_calls", "tools", "system", "history"]
KEYS += ["instruction", "input", "output", "question", "answer", "response_chosen", "response_rejected", "chosen"]
KEYS += ["rejected", "prompt", "margin", "score_chosen", "score_rejected", "type", "text", "function", "arguments"]
NAMES = st.sampled_from(["human", "gpt", "user", "assistant", "system", "tool", "function_call", "text", "name"])
LIKE_RECORDS = st.recursive(
    JSON | NAMES,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=4),
    max_leaves=16,
)


@TRIED
@given(record=LIKE_RECORDS)
@pytest.mark.parametrize("read", [to_dialogue, to_pair])
def test_a_record_is_read_or_refused_with_a_reason(read, record):
    try:
        result = read(record, "d.jsonl:1")
    except Unusable as refused:
        assert refused.reason
        assert refused.detail
    else:
        assert isinstance(result, Dialogue | Pair)
        assert result.source == "d.jsonl:1"


@TRIED
@given(content=st.binary(max_size=200) | st.lists(JSON.map(json.dumps), max_size=4).map("\n".join).map(str.encode))
@pytest.mark.parametrize("ending", ["jsonl", "json", "csv", "parquet"])
@pytest.mark.parametrize("read", [read_dialogues, read_pairs])
def test_a_file_of_any_bytes_gives_records_or_faults_with_their_place(tmp_path, read, ending, content):
    path = tmp_path / f"d.{ending}"
    path.write_bytes(content)
    try:
        results = list(read([path]))
    except UserError as refused:
        assert "\n" not in str(refused)
        return
    for result in results:
        assert result.source.startswith(str(path)) or Path(result.source.rpartition(":")[0]).name == path.name
        if isinstance(result, BadRecord):
            assert "\n" not in str(result)


@TRIED
@given(messages=conversations())
@pytest.mark.parametrize("form", ["conversations", "messages"])
def test_a_conversation_is_read_as_it_was_written(form, messages):
    names = {"user": "human", "assistant": "gpt", "system": "system"}
    turns = messages
    if form == "conversations":
        turns = [{"from": names[message["role"]], "value": message["content"]} for message in messages]
    record = json.loads(json.dumps({form: turns}))
    written = [message | {"content": message["content"].replace("\r\n", "\n")} for message in messages]
    assume(all(message["content"] for message in written))
    assert to_dialogue(record, "d.jsonl:1").messages == written


@settings(TRIED, max_examples=150)
@given(messages=conversations(), name=st.sampled_from(sorted(TEMPLATES)))
def test_exactly_the_replies_are_learned(tiny_tokenizer, name, messages):
    """In text and in tokens; what stands before a reply is the prompt that asks for it."""
    tokenizer = deepcopy(tiny_tokenizer)
    try:
        chat_template = load_chat_template(tokenizer, name)
    except UserError:  # its end token is none of this tokenizer's
        return
    replies = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    try:
        segments = chat_template.segments(messages)
        ids, labels = encode_dialogue(tokenizer, chat_template, messages, max_length=10**6)
    except (Unusable, UserError):  # a text that fakes a turn, a reply that no token border ends
        return
    text = chat_template.render(messages, None, False)
    assert "".join(segment.text for segment in segments) in (text, text + tokenizer.eos_token)
    learned = [segment.text for segment in segments if segment.learned]
    assert len(learned) == len(replies)
    for piece, index in zip(learned, replies, strict=True):
        assert messages[index]["content"].strip() in piece
        assert piece.rstrip().endswith(chat_template.stop_tokens)
    at = [index for index, label in enumerate(labels) if label != IGNORED_LABEL]
    assert [labels[index] for index in at] == [ids[index] for index in at]
    starts = [index for index in at if labels[index - 1] == IGNORED_LABEL]
    ends = [index + 1 for index in at if [*labels, IGNORED_LABEL][index + 1] == IGNORED_LABEL]
    runs = list(zip(starts, ends, strict=True))
    assert len(runs) == len(replies)
    said = [tokenizer.decode(ids[start:end]) for start, end in runs]
    assert said == [unicodedata.normalize("NFC", piece) for piece in learned]  # as Qwen's tokenizer does
    # Of the last reply: qwen3_nothink begins it as its prompt does, and shows earlier ones without an empty thought.
    start = runs[-1][0]
    assert ids[:start] == encode_prompt(tokenizer, chat_template, messages[: replies[-1]])


@TRIED
@given(messages=conversations(), mark=st.sampled_from(["<|im_end|>", "<|im_start|>", "<|endoftext|>"]))
def test_no_text_closes_a_turn(tiny_tokenizer, messages, mark):
    """In a question it is words, in a reply a fault."""
    tokenizer = deepcopy(tiny_tokenizer)
    chat_template = load_chat_template(tokenizer, "qwen")
    for message in messages:
        if message["role"] != "user":
            message["content"] = "好。"
    messages[-2]["content"] += mark
    ids, _ = encode_dialogue(tokenizer, chat_template, messages, max_length=10**6)
    n_turns = len(messages) + (messages[0]["role"] != "system")
    written = [tokenizer.decode([token_id]) for token_id in ids if token_id in tokenizer.added_tokens_decoder]
    assert written == ["<|im_start|>", "<|im_end|>"] * n_turns
    text = unicodedata.normalize("NFC", chat_template.render(messages, None, False))
    assert tokenizer.decode(ids) == text
    prompt = encode_prompt(tokenizer, chat_template, messages[:-1])
    assert ids[: len(prompt)] == prompt
    messages[-1]["content"] += mark
    with pytest.raises(Unusable) as refused:
        encode_dialogue(tokenizer, chat_template, messages, max_length=10**6)
    assert refused.value.reason == "control token"


@TRIED
@given(
    names=st.lists(st.text(st.characters(exclude_characters="/\0", codec="utf-8"), min_size=1, max_size=8), max_size=4)
)
def test_files_are_found_whatever_they_are_called(tmp_path_factory, names):
    folder = tmp_path_factory.mktemp("names")
    wanted = {f"{name}.jsonl" for name in names if not name.startswith(".")}
    for name in wanted:
        (folder / name).touch()
    if not wanted:
        with pytest.raises(UserError, match="the folder is empty"):
            find_files(folder, "--train_file_dir")
        return
    files, unread = find_files(folder, "--train_file_dir")
    assert ({file.name for file in files}, unread) == (wanted, [])
