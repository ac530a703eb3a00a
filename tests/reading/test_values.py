"""Values that look like text and are none, and nested values in a cell."""

import csv
import json

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st
from reading_cases import assistant, gpt, human, reason, tool, user

from medtune.errors import Unusable
from medtune.reading.conversations import to_dialogue, to_pair
from medtune.reading.readers import read_dialogues, read_documents
from medtune.reading.records import BadRecord, Document
from medtune.reading.values import holds_nothing, is_empty, parse_nested, strip_blanks

ZERO_WIDTH = ["\u200b", "\ufeff", "\u2060", "\u00ad", "\u3164", "\u2800", "\u200e\u200f", "\u3000\u200b "]


def question(question: object = "胃胀怎么办？", answer: object = "少食多餐。", **others: object) -> dict:
    return {"question": question, "answer": answer, **others}


def turns(*contents: object) -> dict:
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[n % 2], "content": content} for n, content in enumerate(contents)]}


# ---------------------------------------------------------------- null


@pytest.mark.parametrize("null", [None, float("nan")])
def test_null_is_no_text_and_an_absent_option(null):
    said = reason(to_dialogue, question(answer=null))
    assert said == "null value: 'answer' is null; write the text or delete the record"
    assert "null value: turn 2 (assistant) is null" in reason(to_dialogue, turns("a", null))
    plain = to_dialogue(question(), "d.jsonl:1")
    assert to_dialogue(question(history=null, system=null, tools=null, input=null), "d.jsonl:1") == plain


@pytest.mark.parametrize("word", ["nan", "NaN", "None", "NULL", "null", "<NA>", "NaT"])
def test_a_word_that_programs_write_for_null_is_named(word):
    for record in (question(answer=word), question(answer=f" {word}\n"), question(system=word), turns("a", word)):
        assert f"is the word {word!r}, as programs write a missing value" in reason(to_dialogue, record)
    pair = {"question": "a", "response_chosen": "b", "response_rejected": word}
    assert f"'response_rejected' is the word {word!r}" in reason(to_pair, pair)


@pytest.mark.parametrize("word", ["NA", "N/A", "无", "none", "None.", "Nan", "nano", "没有"])
def test_a_word_that_may_be_an_answer_stays(word):
    assert to_dialogue(question(answer=word), "d.jsonl:1").messages[1]["content"] == word


@pytest.mark.parametrize("key", ["history", "tools", "conversations"])
def test_a_word_for_null_in_place_of_a_list_is_named(key):
    record = {"conversations": "nan"} if key == "conversations" else question(**{key: "nan"})
    assert f"{key}' is the word 'nan'" in reason(to_dialogue, record)


def test_a_word_for_null_is_no_score():
    pair = {"question": "a", "response_chosen": "b", "response_rejected": "c"}
    scored = pair | {"margin": "nan", "score_chosen": "nan", "score_rejected": "1"}
    assert to_pair(scored, "d.jsonl:1").margin is None


def test_a_person_may_answer_none_and_a_tool_null():
    asked = turns("头痛", "有过敏吗？", "None", "好的。")
    assert to_dialogue(asked, "d.jsonl:1").messages[2]["content"] == "None"
    assert "is the word 'nan'" in reason(to_dialogue, turns("头痛", "有过敏吗？", "nan", "好的。"))
    call = assistant("", tool_calls=[{"name": "look", "arguments": {}}])
    used = [user("a"), call, tool("null"), assistant("b")]
    assert to_dialogue({"messages": used}, "d.jsonl:1").messages[2]["content"] == "null"


def test_nulls_of_unified_structs_are_absent(tmp_path):
    """Parquet gives each record, turn, tool and argument the keys of all."""
    path = tmp_path / "d.parquet"
    tools = [
        {"name": "look", "parameters": {"city": {"type": "string"}}},
        {"name": "buy", "parameters": {"what": {"type": "string"}}},
    ]
    look = {"role": "assistant", "tool_calls": [{"name": "look", "arguments": {"city": "北京"}}]}
    buy = {"role": "assistant", "tool_calls": [{"name": "buy", "arguments": {"what": "药"}}]}
    found = [tool("八"), assistant("九")]
    rows = [
        {"messages": [user("一"), assistant("二", weight=1)]},
        {"question": "三", "answer": "四"},
        {"conversations": [human("五"), gpt("六")]},
        {"messages": [user("七"), look, *found], "tools": tools},
        {"messages": [user("十"), buy]},
    ]  # fmt: skip
    names = {key for row in rows for key in row}
    table = pyarrow.Table.from_pylist([{name: row.get(name) for name in names} for row in rows])
    pyarrow.parquet.write_table(table, path)
    read = list(read_dialogues([path]))
    assert [[message["content"] for message in dialogue.messages] for dialogue in read] == [
        ["一", "二"], ["三", "四"], ["五", "六"], ["七", "", "八", "九"], ["十", ""],
    ]  # fmt: skip
    assert read[3].tools == tools
    assert read[3].messages[1]["tool_calls"] == [{"name": "look", "arguments": {"city": "北京"}}]
    assert read[4].messages[1]["tool_calls"] == [{"name": "buy", "arguments": {"what": "药"}}]


def test_a_null_that_an_argument_names_itself_stays():
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": '{"since": null}'}}]}
    record = {"messages": [user("a"), call]}
    assert to_dialogue(record, "d.jsonl:1").messages[1]["tool_calls"][0]["arguments"] == {"since": None}


# ---------------------------------------------------------------- nothing to see, and only an address


@pytest.mark.parametrize("blank", ZERO_WIDTH)
def test_characters_that_show_nothing_are_no_text(blank):
    assert "empty reply" in reason(to_dialogue, question(answer=blank))
    assert "empty user turn" in reason(to_dialogue, turns(blank, "b"))
    assert "empty reply" in reason(to_pair, {"question": "a", "response_chosen": "b", "response_rejected": blank})
    messages = to_dialogue(question(f"{blank}胃胀？{blank}", f"{blank}少食。{blank}"), "d.jsonl:1").messages
    assert [message["content"] for message in messages] == ["胃胀？", "少食。"]


@pytest.mark.parametrize("text", ["❤️", "👩‍⚕️", "a\u200bb", "می‌خواهم", "1 2"])
def test_what_is_part_of_a_text_stays(text):
    assert strip_blanks(f" {text} ") == text


@given(st.text())
def test_stripping_takes_only_from_the_ends_and_only_once(text):
    kept = strip_blanks(text)
    assert kept in text
    assert strip_blanks(kept) == kept
    assert kept == text.strip() or not text.isalnum()


@pytest.mark.parametrize(
    "reply",
    [
        "https://example.org/a/1.html",
        "http://a.cn",
        "www.example.org/x?y=1",
        "<https://a.org>",
        "https://a.b https://c.d",
    ],
)
def test_a_reply_that_is_only_an_address_is_refused(reply):
    assert reason(to_dialogue, question(answer=reply)).startswith("only a URL: turn 2 (assistant) is ")
    pair = {"question": "a", "response_chosen": reply, "response_rejected": "不知道。"}
    assert reason(to_pair, pair).startswith("only a URL")
    assert to_pair(pair | {"response_chosen": "少食。", "response_rejected": reply}, "d.jsonl:1").rejected == reply


@pytest.mark.parametrize("reply", ["见 https://a.org", "https://a.org 有说明", "https", "httpx 是一个库", "www"])
def test_a_reply_with_an_address_stays(reply):
    assert to_dialogue(question(answer=reply), "d.jsonl:1").messages[1]["content"] == reply


# ---------------------------------------------------------------- nested values in a cell

LISTED = [human("胃胀怎么办？"), gpt("少食多餐，别吃'辣'的\n和\"油\"的。")]


@pytest.mark.parametrize("write", [json.dumps, repr, lambda turns: repr(turns).replace("}, {", "}\n {")])
def test_a_list_in_a_cell_is_read_as_json_python_or_numpy_write_it(tmp_path, write):
    path = tmp_path / "d.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([["id", "conversations"], [1, write(LISTED)]])
    (dialogue,) = read_dialogues([path])
    assert [message["content"] for message in dialogue.messages] == [turn["value"] for turn in LISTED]


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(), lambda inner: st.lists(inner), max_leaves=8))
def test_what_python_wrote_is_read_back(value):
    assert parse_nested(repr([value]), "cell") == [value]


def test_a_cell_is_never_run():
    with pytest.raises(Unusable):
        parse_nested("[__import__('os').getcwd()]", "cell")


@pytest.mark.parametrize(
    ("value", "nothing"),
    [
        ({"bytes": None, "path": ""}, True),
        ([None, {}], True),
        (None, True),
        ("nan", True),
        ({"path": "a"}, False),
        ([0], False),
    ],
)
def test_a_struct_of_nulls_holds_nothing(value, nothing):
    assert holds_nothing(value) is nothing
    if nothing:
        assert to_dialogue(question(images=value, reasoning=value), "d.jsonl:1")


def test_empty():
    assert all(map(is_empty, [None, float("nan"), "", [], {}]))
    assert not any(map(is_empty, [0, False, 0.0, " ", [0], "nan"]))


def test_the_same_for_texts_of_pretraining(write_jsonl):
    texts = ["高血压应限盐。", "nan", "\u200b", None, "https://a.org"]
    results = list(read_documents([write_jsonl("d.jsonl", [{"text": text} for text in texts])]))
    assert [result.reason if isinstance(result, BadRecord) else result.text for result in results] == [
        "高血压应限盐。", "null value", "empty text", "null value", "https://a.org",
    ]  # fmt: skip
    assert isinstance(results[0], Document)
