"""The data contract: one form from every dialect and file kind, exact places of faults, split and cache."""

import csv
import gzip
import json
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from datasets import Dataset
from reading_cases import assistant, dumps, gpt, human, system, tool, user, write

from medtune.errors import UserError
from medtune.reading.cache import open_cache
from medtune.reading.files import read_raw
from medtune.reading.finding import content_fingerprint, find_files
from medtune.reading.holdout import split_holdout, take_samples
from medtune.reading.readers import load_dialogues, load_records, read_dialogues, read_pairs
from medtune.reading.records import BadRecord, Dialogue, Report
from medtune.reading.turns import ROLES

pytestmark = pytest.mark.usefixtures("in_tmp_path")


def write_records(name: str, records: list[dict], nested_as_text: bool = False) -> Path:
    """Write records as the file's ending says; csv cells (and on request parquet's) hold nested values as JSON."""
    path = Path(name)
    columns = list(dict.fromkeys(key for record in records for key in record))
    flat = [{key: value if isinstance(value, str) else dumps(value) for key, value in r.items()} for r in records]
    if path.suffix == ".jsonl":
        write(name, "".join(dumps(record) + "\n" for record in records))
    elif path.suffix == ".json":
        write(name, json.dumps(records, ensure_ascii=False, indent=2))
    elif path.suffix == ".csv":
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, columns, restval="")
            writer.writeheader()
            writer.writerows(flat)
    else:
        rows = [{key: r.get(key) for key in columns} for r in (flat if nested_as_text else records)]
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def read_lines(*lines: str) -> list[Dialogue | BadRecord]:
    return list(read_dialogues([write("data.jsonl", "\n".join(lines))]))


def read_one(record: object) -> Dialogue | BadRecord:
    (result,) = read_lines(dumps(record))
    return result


def talk(*turns: dict) -> dict:
    return {"conversations": turns}


def chat(*turns: dict) -> dict:
    return {"messages": turns}


GOOD = dumps({"question": "感冒了怎么办？", "answer": "多休息。"})


# --- one form -------------------------------------------------------------------------------------

# The same three dialogues: plain; with a line break and quotes; with system prompt and history.
CANONICAL = [
    [user("感冒了怎么办？"), assistant("多喝水，多休息。")],
    [user('What is "BP",\nand is 150/95 high?'), assistant("Blood pressure.\n\nYes, it is.")],
    [system("你是医生。"), user("头痛"), assistant("多久了？"), user("三天"), assistant("请就医。")],
]


def as_sharegpt(messages: list[dict]) -> dict:
    names = {"system": "system", "user": "human", "assistant": "gpt"}
    return {"conversations": [{"from": names[m["role"]], "value": m["content"]} for m in messages]}


def as_sharegpt_with_system_key(messages: list[dict]) -> dict:
    prompt = "".join(m["content"] for m in messages if m["role"] == "system")
    return as_sharegpt([m for m in messages if m["role"] != "system"]) | {"system": prompt}


def as_openai(messages: list[dict]) -> dict:
    return {"messages": messages}


def as_openai_parts(messages: list[dict]) -> dict:
    def parts(text: str) -> list[dict]:
        return [{"type": "text", "text": text[:2]}, {"type": "text", "text": text[2:]}]

    roles = {"system": "developer", "user": "user", "assistant": "assistant"}
    return {"messages": [{"role": roles[m["role"]], "content": parts(m["content"])} for m in messages]}


def as_question(messages: list[dict]) -> dict:
    prompt = "".join(m["content"] for m in messages if m["role"] == "system")
    turns = [m["content"] for m in messages if m["role"] != "system"]
    history = [[turns[i], turns[i + 1]] for i in range(0, len(turns) - 2, 2)]
    return {"question": turns[-2], "answer": turns[-1], "history": history, "system": prompt}


def as_alpaca(messages: list[dict]) -> dict:
    record = as_question(messages)
    instruction, _, about = record.pop("question").partition("\n")
    return {"instruction": instruction, "input": about, "output": record.pop("answer"), **record}


DIALECTS = [as_sharegpt, as_sharegpt_with_system_key, as_openai, as_openai_parts, as_question, as_alpaca]


@pytest.mark.parametrize("dialect", DIALECTS, ids=lambda dialect: dialect.__name__)
@pytest.mark.parametrize("name", ["d.jsonl", "d.json", "d.csv", "d.parquet", "text.parquet"])
def test_every_dialect_in_every_file_reads_to_the_same_dialogues(dialect, name):
    path = write_records(name, [dialect(messages) for messages in CANONICAL], name == "text.parquet")
    dialogues, report = load_dialogues([path])
    assert [dialogue.messages for dialogue in dialogues] == CANONICAL
    assert [dialogue.tools for dialogue in dialogues] == [None] * 3
    assert report == Report(read=3)


# Two pairs: plain; with system prompt, history and a margin.
PAIRS = [
    ([user("感冒了怎么办？")], "多喝水，多休息。", "不用管。", None),
    ([*CANONICAL[2][:3], user("三天")], "请就医。", 'Take "two",\nsir.', 1.5),
]


def as_guide_pair(prompt: list[dict], chosen: str, rejected: str) -> dict:
    record = as_question([*prompt, assistant("")])
    del record["answer"]
    return record | {"response_chosen": chosen, "response_rejected": rejected}


def as_sharegpt_pair(prompt: list[dict], chosen: str, rejected: str) -> dict:
    return as_sharegpt(prompt) | {"chosen": gpt(chosen), "rejected": gpt(rejected)}


def as_trl_texts(prompt: list[dict], chosen: str, rejected: str) -> dict:
    record = as_guide_pair(prompt, chosen, rejected)
    return {"prompt": record.pop("question"), "chosen": chosen, "rejected": rejected} | record


def as_trl_messages(prompt: list[dict], chosen: str, rejected: str) -> dict:
    return {"prompt": prompt, "chosen": [assistant(chosen)], "rejected": [assistant(rejected)]}


def as_trl_conversations(prompt: list[dict], chosen: str, rejected: str) -> dict:
    return {"chosen": [*prompt, assistant(chosen)], "rejected": [*prompt, assistant(rejected)]}


PAIR_FORMS = [as_guide_pair, as_sharegpt_pair, as_trl_texts, as_trl_messages, as_trl_conversations]


@pytest.mark.parametrize("form", PAIR_FORMS, ids=lambda form: form.__name__)
@pytest.mark.parametrize("name", ["d.jsonl", "d.csv", "d.parquet"])
def test_every_form_of_pairs_in_every_file_reads_to_the_same_pairs(form, name):
    records = [form(*pair[:3]) | ({} if pair[3] is None else {"margin": pair[3]}) for pair in PAIRS]
    pairs, report = load_records(read_pairs, [write_records(name, records)])
    assert [(pair.messages, pair.chosen, pair.rejected, pair.margin) for pair in pairs] == PAIRS
    assert report == Report(read=2)


def test_a_reply_that_is_json_stays_words():
    record = as_guide_pair(PAIRS[0][0], '{"dose": "none"}', '[{"dose": 2}]')
    pairs, _ = load_records(read_pairs, [write_records("d.csv", [record])])
    assert (pairs[0].chosen, pairs[0].rejected) == ('{"dose": "none"}', '[{"dose": 2}]')


BAD_PAIRS = [
    ({"margin": "much"}, "broken margin: margin or scores are ['much', None, None]; they must be numbers"),
    ({"margin": -1}, "broken margin: the margin is -1.0; it is at least 0, or the replies are the wrong way"),
    ({"response_rejected": ""}, "empty reply: the rejected reply is empty"),
    ({"response_chosen": "不用管。"}, "same replies: chosen and rejected are the same"),
    ({"history": [["头痛"]]}, "broken history: exchange 1 of 'history' is ['头痛']; it must be [question, answer]"),
    ({"histroy": []}, "is 'histroy' meant as 'history'?"),
]


@pytest.mark.parametrize(("change", "reason"), BAD_PAIRS, ids=lambda value: "-".join(value)[:20])
def test_a_bad_pair_is_named_with_its_place(change, reason):
    record = as_guide_pair(*PAIRS[0][:3])
    if "histroy" in change:
        del record["history"]
    with pytest.raises(UserError) as refused:
        load_records(read_pairs, [write_records("d.jsonl", [record, record | change])])
    assert "d.jsonl:2: " in str(refused.value)
    assert reason in str(refused.value)


TOOLS = [{"type": "function", "function": {"name": "lookup", "parameters": {"type": "object"}}}]
TOOL_CALL = {"name": "lookup", "arguments": {"drugs": ["布洛芬", "华法林"]}}
TOOL_MESSAGES = [
    user("布洛芬和华法林能一起吃吗？"),
    assistant("", tool_calls=[TOOL_CALL]),
    tool("出血风险"),
    assistant("不建议。"),
]
OPENAI_CALL = {
    "id": "call_1",
    "type": "function",
    "function": {"name": "lookup", "arguments": dumps(TOOL_CALL["arguments"])},
}
CALLED = {"from": "function_call", "value": dumps(TOOL_CALL)}
TOOL_RECORDS = {
    "sharegpt": {
        "conversations": [
            human("布洛芬和华法林能一起吃吗？"), CALLED, {"from": "observation", "value": "出血风险"}, gpt("不建议。"),
        ],
        "tools": dumps(TOOLS),
    },
    "openai": {
        "messages": [
            TOOL_MESSAGES[0],
            assistant(None, tool_calls=[OPENAI_CALL]),
            tool("出血风险") | {"tool_call_id": "call_1"},
            TOOL_MESSAGES[3],
        ],
        "tools": TOOLS,
    },
    "plain calls": {"messages": TOOL_MESSAGES, "tools": TOOLS},
}  # fmt: skip


@pytest.mark.parametrize("name", ["d.jsonl", "d.json", "d.csv", "d.parquet"])
@pytest.mark.parametrize("record", TOOL_RECORDS.values(), ids=TOOL_RECORDS)
def test_tool_calls_read_to_the_same_dialogue(record, name):
    (dialogue,) = read_dialogues([write_records(name, [record])])
    assert dialogue.messages == TOOL_MESSAGES
    assert dialogue.tools == TOOLS


def test_several_results_may_follow_one_turn_of_calls_and_a_call_may_be_the_last_turn():
    call = assistant("查一下", tool_calls=[TOOL_CALL, {"name": "today", "arguments": ""}])
    dialogue = read_one({"messages": [user("a"), call, tool(""), tool(""), assistant("b")]})
    assert [m["role"] for m in dialogue.messages] == ["user", "assistant", "tool", "tool", "assistant"]
    assert dialogue.messages[1]["tool_calls"][1] == {"name": "today", "arguments": {}}
    assert read_one({"messages": [user("a"), call]}).messages[-1]["tool_calls"][0] == TOOL_CALL


def test_contents_are_stripped_and_line_ends_are_one_kind():
    dialogue = read_one({"conversations": [human(" \u3000头痛\r\n发热\n"), gpt("\n 多休息 ")], "id": 7, "system": " "})
    assert dialogue == Dialogue([user("头痛\n发热"), assistant("多休息")], None, "data.jsonl:1")


def test_alpaca_takes_instruction_or_input_alone():
    for record in ({"instruction": "头痛", "input": ""}, {"instruction": "", "input": "头痛"}):
        assert read_one(record | {"output": "休息", "input": record["input"] or None}).messages[0] == user("头痛")


# --- files ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["d.jsonl", "d.json", "d.csv"])
def test_bom_and_crlf_change_nothing(name):
    content = write_records(name, [as_question(messages) for messages in CANONICAL]).read_bytes()
    plain = list(read_dialogues([Path(name)]))
    crlf = b"\xef\xbb\xbf" + content.replace(b"\r\n", b"\n").replace(b"\n", b"\r\n")
    Path(name).write_bytes(crlf)
    assert list(read_dialogues([Path(name)])) == plain
    assert [dialogue.messages for dialogue in plain] == CANONICAL


def test_sources_are_exact_lines_in_jsonl_with_blank_lines_and_odd_separators():
    odd = dumps({"question": "a\u2028b\u0085c", "answer": "d"})  # only a line feed ends a line
    results = read_lines(GOOD, "", "  ", odd, "{broken", GOOD, "")
    assert [r.source for r in results] == [f"data.jsonl:{n}" for n in (1, 4, 5, 6)]
    assert results[1].messages[0]["content"] == "a\u2028b\u0085c"


def test_sources_are_the_lines_on_which_records_start_in_a_json_list():
    text = '\n[\n  {"question": "a",\n   "answer": "b"},\n  5, {"question": "c", "answer": "d"}\n,\n null]\n'
    results = list(read_dialogues([write("d.json", text)]))
    assert [r.source for r in results] == ["d.json:3", "d.json:5", "d.json:5 (record 2 on the line)", "d.json:7"]
    assert [isinstance(r, Dialogue) for r in results] == [True, False, True, False]


def test_sources_are_the_lines_on_which_rows_start_in_csv():
    text = 'question,answer\n"a\nb\n",c\n\nd,e\nf\ng,h,i\n'
    results = list(read_dialogues([write("d.csv", text)]))
    assert [r.source for r in results] == ["d.csv:2", "d.csv:6", "d.csv:7", "d.csv:8"]
    assert [result.detail for result in results[2:]] == [
        f"{n}, where the header has 2; quote cells that contain commas" for n in (1, 3)
    ]


def test_sources_are_rows_in_parquet_and_paths_are_relative_below_the_working_directory(tmp_path, monkeypatch):
    records = [{"question": "a", "answer": "b"}, {"question": "a", "answer": None}]
    path = write_records("d.parquet", records)
    assert [r.source for r in read_dialogues([path])] == ["d.parquet:row 1", "d.parquet:row 2"]
    assert next(read_dialogues([path.absolute()])).source == "d.parquet:row 1"
    Path("elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    assert next(read_dialogues([tmp_path / "d.parquet"])).source == f"{tmp_path.as_posix()}/d.parquet:row 1"


def test_json_and_jsonl_are_told_apart_by_content():
    record = json.loads(GOOD)
    write("lines.json", f"{GOOD}\n{GOOD}\n")
    write("list.jsonl", json.dumps([record, record], indent=1))
    write("one.json", f"\n{json.dumps(record, indent=1)}\n")
    write("empty.json", " [ ]\n")
    sources = [r.source for r in read_dialogues(find_files(".", "--train_file_dir")[0])]
    assert sources == ["lines.json:1", "lines.json:2", "list.jsonl:2", "list.jsonl:6", "one.json:2"]


def test_an_empty_csv_cell_of_an_optional_column_counts_as_absent():
    path = write("d.csv", "instruction,input,output,history,system,tools\n头痛,,休息,,,\n")
    assert next(read_dialogues([path])).messages == [user("头痛"), assistant("休息")]


def test_a_dialogue_longer_than_the_csv_modules_limit_is_read():
    answer = "药" * 200_000
    (dialogue,) = read_dialogues([write("d.csv", f"question,answer\na,{answer}\n")])
    assert dialogue.messages[1]["content"] == answer


def test_files_are_found_in_nested_folders_sorted_and_without_hidden_ones():
    for name in ("b/c.CSV", "b/a.jsonl", "z.json", "README.md", ".hidden.jsonl", ".cache/x.jsonl", "b/notes.docx"):
        write(f"data/{name}", "")
    write("disk/linked.jsonl", "")
    Path("data/link").symlink_to(Path("disk").absolute())
    files, unread = find_files("data", "--train_file_dir")
    names = ["b/a.jsonl", "b/c.CSV", "link/linked.jsonl", "z.json"]
    assert files == [Path("data", name) for name in names]
    assert unread == [Path("data/README.md"), Path("data/b/notes.docx")]
    assert find_files("data/z.json", "--train_file_dir") == ([Path("data/z.json")], [])
    assert find_files("data", "--train_file_dir", (".md",))[0] == [Path("data/README.md")]


def test_nothing_to_read_is_an_error_that_names_the_flag():
    Path("empty").mkdir()
    for number in range(7):
        write(f"other/{number}.xlsx", "")
    endings = "files that end in .jsonl, .json, .csv, .tsv, .parquet are read"
    for path, message in {
        "nowhere": "--train_file_dir nowhere: no such file or folder",
        "empty": f"--train_file_dir empty: the folder is empty; {endings}",
        "other": f"--train_file_dir other: found only 0.xlsx, 1.xlsx, 2.xlsx, 3.xlsx, 4.xlsx and 2 more; {endings}",
        "other/0.xlsx": f"--train_file_dir other/0.xlsx: found only 0.xlsx; {endings}",
    }.items():
        with pytest.raises(UserError) as error:
            find_files(path, "--train_file_dir")
        assert str(error.value) == message


REST = "the rest of the file cannot be read"
TO_CONVERT = "convert the file, probably by `iconv -f GB18030 -t UTF-8 OLD > NEW`"
FATAL = {
    f"d.json:3: broken JSON: Expecting ',' delimiter (column 18); fix it, {REST}": (
        f'[\n{GOOD},\n{{"question": "a" "answer": "b"}},\n{GOOD}]'
    ),
    f"d.json:2: broken JSON: Expecting ',' or ']' (column 1); fix it, {REST}": f"[{GOOD}\n{GOOD}]",
    f"d.jsonl:2: broken JSON: Text after the list's end (column 1); fix it, {REST}": f"[{GOOD}]\n{GOOD}",
    f"d.csv:3: broken CSV: unexpected end of data; close each quote and double the quotes inside a cell, {REST}": (
        'question,answer\na,b\n"c,d\ne,f\n'
    ),
    f"d.csv:2: broken CSV: ',' expected after '\"'; close each quote and double the quotes inside a cell, {REST}": (
        'question,answer\n"he said "no"",b\n'
    ),
    f"d.csv:1: not UTF-8: byte 1 of line 1 is 0xce; {TO_CONVERT}": ("问题,回答\na,b\n".encode("gbk")),
    # The second byte of this character in GBK is a backslash, so that it breaks the JSON, too.
    f"d.json:2: not UTF-8: byte 15 of line 2 is 0xd5; {TO_CONVERT}": ('[\n{"question": "誠"}]'.encode("gbk")),
    "d.json:2: cut off: the file ends within a character, at byte 15 of line 2; copy or download it again": (
        f'[{GOOD},\n{{"question": "感'.encode()[:-1]
    ),
    "d.csv:1: two columns are called 'question'; rename one or take it out": "question,question,answer,,\na,b,c,,\n",
}


@pytest.mark.parametrize(("message", "content"), FATAL.items(), ids=lambda value: str(value)[:30])
def test_a_fault_that_hides_the_rest_of_a_file_stops_the_run_even_under_drop(message, content):
    with pytest.raises(UserError) as error:
        load_dialogues([write(message.partition(":")[0], content)], "drop")
    assert str(error.value) == message


def test_a_damaged_parquet_file_is_named():
    with pytest.raises(UserError, match=r"^d\.parquet: not a whole parquet file \(.*copy or download it again$"):
        load_dialogues([write("d.parquet", b"PAR1 and no more")], "drop")


def test_a_file_that_ends_within_a_character_is_cut_off():
    _, bad = read_dialogues([write("d.jsonl", f'{GOOD}\n{{"question": "感'.encode()[:-2])])
    assert str(bad) == (
        "d.jsonl:2: cut off: the file ends within a character, at byte 15 of line 2; copy or download it again"
    )


# --- faults in one record -------------------------------------------------------------------------

# What is said of a record, and the record.
FAULTS = [
    (
        "broken JSON: Unterminated string starting at (column 19); write one whole record a line",
        '{"question": "a", "ans',
    ),
    ("not an object: the record is null; it must be an object", "null"),
    ("not an object: the record is a string; it must be an object", '"a"'),
    ("not an object: the record is a number; it must be an object", "5"),
    (
        "unknown keys: has no keys; known are 'conversations', or 'messages', or 'instruction' "
        "with 'output', or 'question' with 'answer'",
        "{}",
    ),
    (
        "unknown keys: has the keys 'question', 'anwser'; known are 'conversations', or "
        "'messages', or 'instruction' with 'output', or 'question' with 'answer'; is 'anwser' meant as 'answer'?",
        {"question": "a", "anwser": "b"},
    ),
    (
        "unknown keys: has the keys 'question', 'answer', 'histroy', 'department'; is 'histroy' meant as 'history'?",
        {"question": "a", "answer": "b", "histroy": [], "department": "内科"},
    ),
    (
        "unknown keys: turn 1 has the keys 'form', 'value'; known are 'from' and 'value', or "
        "'role' and 'content'; is 'form' meant as 'from'?",
        {"conversations": [{"form": "human", "value": "a"}, gpt("b")]},
    ),
    (
        "preference pair: has the keys 'system', 'history', 'question', 'response_chosen', "
        "'response_rejected'; reward_modeling.py and dpo_training.py read such pairs",
        {"system": "", "history": [], "question": "a", "response_chosen": "b", "response_rejected": "c"},
    ),
    (
        "preference pair: has the keys 'conversations', 'chosen', 'rejected'; reward_modeling.py "
        "and dpo_training.py read such pairs",
        {"conversations": [human("a")], "chosen": "b", "rejected": "c"},
    ),
    ("plain text: has the keys 'text'; pretraining.py reads text without dialogue", {"text": "高血压是……"}),
    ("not a list: 'conversations' is null; it must be a list of turns", {"conversations": None}),
    (
        "broken JSON: 'conversations' is not JSON: Expecting property name enclosed in double "
        "quotes (character 3); write it with json.dumps",
        {"conversations": "[{'from': human}]"},
    ),
    ("empty conversation: it has no turns; delete the record", {"conversations": []}),
    ("not an object: turn 1 is a string; it must be an object with role and content", {"messages": ["a", "b"]}),
    (
        "unknown role: "
        f"turn 2 is from '药师'; known are {', '.join(ROLES)}; "
        "scripts/convert_data_format.py --role_map 药师=user says who it is",
        talk(human("a"), {"from": "药师", "value": "b"}),
    ),
    ("null value: turn 2 (gpt) is null; write the text or delete the record", talk(human("a"), gpt(None))),
    (
        "null value: turn 2 (assistant) is null; write the text or delete the record",
        chat(user("a"), assistant(None, tool_calls=None)),
    ),
    ("null value: 'answer' is null; write the text or delete the record", {"question": "a", "answer": None}),
    ("not text: turn 1 (human) is a number; it must be a string", talk(human(38.5), gpt("b"))),
    ("not text: 'question' is an object; it must be a string", {"question": {"a": 1}, "answer": "b"}),
    (
        "not text: turn 1 (user) has parts of type image_url; only text is trained on",
        chat(user([{"type": "image_url", "image_url": "x"}]), assistant("b")),
    ),
    (
        "broken character: 'question' has half a character, \\ud83d; write it anew",
        '{"question": "a \\ud83d", "answer": "b"}',
    ),
    (
        "starts with the model: turn 1 (assistant) comes before any question; start with the user",
        talk(gpt("a"), human("b"), gpt("c")),
    ),
    (
        "starts with the model: turn 2 (assistant) comes before any question; start with the user",
        chat(system("s"), assistant("a")),
    ),
    ("two turns in a row: turns 1 and 2 are both from the user; join them", talk(human("a"), human("b"), gpt("c"))),
    ("two turns in a row: turns 2 and 3 are both from the assistant; join them", talk(human("a"), gpt("b"), gpt("c"))),
    ("two turns in a row: turns 2 and 3 are both from the assistant; join them", talk(human("a"), CALLED, gpt("c"))),
    (
        "turns out of order: turn 3 (tool) comes after: assistant; needed is: user",
        chat(user("a"), assistant("b"), tool("c"), assistant("d")),
    ),
    (
        "turns out of order: turn 3 (user) comes after: tool call; needed is: tool",
        talk(human("a"), CALLED, human("c"), gpt("d")),
    ),
    ("system not first: turn 2 (system) must be turn 1", chat(user("a"), system("s"), assistant("b"))),
    (
        "two system prompts: one in 'system' and one in turn 1; keep one",
        {"messages": [system("s"), user("a"), assistant("b")], "system": "t"},
    ),
    ("empty reply: turn 2 (assistant) is empty; write it or delete the record", talk(human("a"), gpt(" \n"))),
    (
        "empty reply: turn 2 (assistant) is empty; write it or delete the record",
        {"question": "c", "answer": "d", "history": [["a", ""]]},
    ),
    (
        "empty user turn: turn 3 (user) is empty; write it or delete the record",
        talk(human("a"), gpt("b"), human(""), gpt("c")),
    ),
    ("no reply: turn 1 (user) is the last; add the reply or delete the turn", talk(human("a"))),
    ("no reply: turn 3 (user) is the last; add the reply or delete the turn", talk(human("a"), gpt("b"), human("c"))),
    ("no reply: turn 3 (tool) is the last; add the reply or delete the turn", {"messages": TOOL_MESSAGES[:3]}),
    (
        "broken history: exchange 1 of 'history' is 'a'; it must be [question, answer]",
        {"question": "c", "answer": "d", "history": ["a", "b"]},
    ),
    (
        "broken tool call: turn 2 (function_call) needs a name and an object of arguments, found {'arguments': {}}",
        talk(human("a"), {"from": "function_call", "value": '{"arguments": {}}'}),
    ),
    (
        "broken tool call: turn 1 (user) has tool_calls; only the assistant calls tools",
        chat(user("a", tool_calls=[TOOL_CALL]), assistant("b")),
    ),
    (
        "broken tools: 'tools' is {'name': 'lookup'}; it must be a list of objects",
        {"messages": [user("a"), assistant("b")], "tools": '{"name": "lookup"}'},
    ),
]


@pytest.mark.parametrize(("fault", "record"), FAULTS, ids=[fault[:40] for fault, _ in FAULTS])
def test_a_fault_is_named_with_its_line_and_spoils_no_other_record(fault, record):
    line = record if isinstance(record, str) else dumps(record)
    before, bad, after = read_lines(GOOD, line, GOOD)
    assert str(bad) == f"data.jsonl:2: {fault}"
    assert isinstance(before, Dialogue) and isinstance(after, Dialogue)


@pytest.mark.parametrize("name", ["d.jsonl", "d.json", "d.csv"])
def test_a_byte_that_is_not_utf8_spoils_its_own_record_only(name):
    content = write_records(name, [{"question": "é头痛", "answer": n} for n in "abc"]).read_bytes()
    lines = content.replace(b"\r\n", b"\n").split(b"\n")
    number = [i for i, line in enumerate(lines) if "é".encode() in line][1]
    lines[number] = lines[number].replace("é".encode(), "é".encode("latin-1"))
    first, bad, last = read_dialogues([write(name, b"\n".join(lines))])
    assert isinstance(first, Dialogue) and isinstance(last, Dialogue)
    assert bad.reason == "not UTF-8"
    byte = lines[number].index(b"\xe9") + 1
    assert bad.detail == (
        f"byte {byte} of line {number + 1} is 0xe9; convert the file, probably by `iconv -f GB18030 -t UTF-8 OLD > NEW`"
    )


def test_utf16_is_recognized():
    first = next(read_dialogues([write("d.jsonl", GOOD.encode("utf-16"))]))
    assert first.source == "d.jsonl:1"
    assert first.detail.startswith("byte 1 of line 1 is 0xff") and "iconv -f UTF-16 " in first.detail


# --- load and report ------------------------------------------------------------------------------


def test_bad_records_stop_the_run_and_the_same_fault_is_one_line():
    path = write("d.jsonl", "\n".join([GOOD, *['{"question": "a", "answer": ""}'] * 11, "{", GOOD]))
    with pytest.raises(UserError) as error:
        load_dialogues([path])
    assert str(error.value).split("\n") == [
        "12 of 14 records are bad:",
        "  d.jsonl:2, d.jsonl:3, d.jsonl:4 and 8 more: empty reply: turn 2 (assistant) is empty; write it or "
        "delete the record",
        "  d.jsonl:13: broken JSON: Expecting property name enclosed in double quotes (column 2); write one whole "
        "record a line",
        "fix them, or go on without them: --on_bad_data drop",
    ]


def test_the_first_ten_faults_hold_every_reason():
    path = write("d.jsonl", "\n".join([GOOD, *(f'{{"question": "a", "answr{n}": ""}}' for n in range(12)), "{"]))
    with pytest.raises(UserError) as error:
        load_dialogues([path])
    lines = str(error.value).split("\n")
    assert lines[0] == "13 of 14 records are bad; the first ten faults:"
    places = [line.split(": ")[0].strip() for line in lines[1:-1]]
    assert places == ["d.jsonl:2", "d.jsonl:14", *(f"d.jsonl:{n}" for n in range(3, 11))]


def test_dropped_records_are_counted_by_reason():
    path = write("d.jsonl", "\n".join([GOOD, *['{"question": "a", "answer": ""}'] * 4, "{", GOOD]))
    dialogues, report = load_dialogues([path], "drop")
    assert [dialogue.source for dialogue in dialogues] == ["d.jsonl:1", "d.jsonl:7"]
    assert report.summary() == "kept 2 of 7 (4 empty reply, 1 broken JSON)"
    assert report.examples("empty reply") == [
        "d.jsonl:2, d.jsonl:3, d.jsonl:4 and 1 more: turn 2 (assistant) is empty; write it or delete the record"
    ]


def test_a_later_step_adds_its_drops_and_the_report_survives_json():
    report = Report(read=1000)
    assert report.summary() == "kept 1000 of 1000"
    for number in range(12):
        report.drop(BadRecord(f"d.jsonl:{number}", "too long", "2310 tokens, --model_max_length is 2048"))
    assert report.summary() == "kept 988 of 1000 (12 too long)"
    assert Report.from_dict(json.loads(json.dumps(report.as_dict()))) == report


@pytest.mark.parametrize("on_bad_data", ["error", "drop"])
def test_nothing_kept_is_an_error(on_bad_data):
    with pytest.raises(UserError) as error:
        load_dialogues([write("d.jsonl", '{"text": "a"}\n')], on_bad_data)
    assert str(error.value).split("\n") == [
        "1 of 1 records are bad:",
        "  d.jsonl:1: plain text: has the keys 'text'; pretraining.py reads text without dialogue",
        "no record can be used",
    ]
    with pytest.raises(UserError, match=r"^no records in e\.csv, e\.jsonl$"):
        load_dialogues([write("e.csv", "question,answer\n"), write("e.jsonl", "\n")], on_bad_data)


# --- samples and split ----------------------------------------------------------------------------


def dialogue(question: str, number: int = 0) -> Dialogue:
    return Dialogue([user(question), assistant(str(number))], None, f"d.jsonl:{number}")


def test_samples_are_seeded_and_keep_their_order():
    items = list(range(100))
    chosen = take_samples(items, 10, seed=1)
    assert len(chosen) == 10 and chosen == sorted(chosen) == take_samples(items, 10, seed=1)
    assert chosen != take_samples(items, 10, seed=2)
    assert take_samples(items, None, seed=1) == take_samples(items, 100, seed=1) == items


def test_a_question_never_falls_on_both_sides():
    copies = ["感冒了怎么办？", "感冒了怎么办", " 感冒了，怎么办?!", "What is BP?", "what is ＢＰ", "What is ＂bp＂?"]
    dialogues = [dialogue(question, number) for number, question in enumerate(copies)]
    dialogues += [dialogue(f"question {number % 40}", number) for number in range(6, 100)]
    for seed in range(20):
        train, held_out = split_holdout(dialogues, 20, seed, "--max_eval_samples")
        assert 15 <= len(held_out) <= 20
        assert sorted(d.source for d in train + held_out) == sorted(d.source for d in dialogues)
        sides = [{d.messages[0]["content"] for d in side} for side in (train, held_out)]
        assert not sides[0] & sides[1]
        for group in (set(copies[:3]), set(copies[3:])):
            assert not (group & sides[0] and group & sides[1])


def test_the_split_depends_on_seed_and_questions_alone():
    dialogues = [dialogue(f"question {number}", number) for number in range(100)]
    train, held_out = split_holdout(dialogues, 0.1, seed=7, flag="--eval_share")
    assert (len(train), len(held_out)) == (90, 10)
    assert (train, held_out) == split_holdout(dialogues, 10, seed=7, flag="--max_eval_samples")
    assert [d for d in dialogues if d in held_out] == held_out
    backwards = split_holdout(dialogues[::-1], 10, seed=7, flag="--max_eval_samples")
    assert backwards == (train[::-1], held_out[::-1])
    assert held_out != split_holdout(dialogues, 10, seed=8, flag="--max_eval_samples")[1]


def test_too_few_dialogues_to_split_is_an_error():
    with pytest.raises(UserError) as error:
        split_holdout([dialogue("a"), dialogue("A.")], 1, seed=1, flag="--max_eval_samples")
    assert str(error.value) == (
        "--max_eval_samples 1: cannot hold out 1 of 2 records (1 of them different) and train on the rest; "
        "lower it or give validation files of their own"
    )
    with pytest.raises(UserError, match="cannot hold out 5 of 2 records"):
        split_holdout([dialogue("a"), dialogue("b")], 5, seed=1, flag="--max_eval_samples")


def test_reading_is_deterministic():
    write_records("data/b.json", [as_openai(messages) for messages in CANONICAL])
    write_records("data/a.csv", [as_alpaca(messages) for messages in CANONICAL])
    first, second = (load_dialogues(find_files("data", "--train_file_dir")[0]) for _ in range(2))
    assert first == second
    assert [d.source for d in first[0]] == [
        "data/a.csv:2", "data/a.csv:3", "data/a.csv:6", "data/b.json:2", "data/b.json:14", "data/b.json:26"
    ]  # fmt: skip


# --- cache ----------------------------------------------------------------------------------------


def build_once_more() -> tuple[Dataset, dict]:
    with Path("builds.txt").open("a") as file:
        file.write("built\n")
    return Dataset.from_dict({"input_ids": [[1, 2], [3]]}), Report(read=2).as_dict()


def cached_dataset(cache_dir, key: dict, build: Callable, overwrite: bool = False) -> tuple[Dataset, dict, bool]:
    with open_cache(cache_dir, key, overwrite) as cache:
        was_cached = cache.rows is not None
        if not was_cached:
            cache.save(*build())
    return cache.rows, cache.report, was_cached


def count_builds() -> int:
    return len(Path("builds.txt").read_text().split())


def test_the_fingerprint_changes_with_each_byte_and_name():
    paths = [write("a.jsonl", GOOD), write("b.jsonl", GOOD)]
    fingerprint = content_fingerprint(paths)
    assert content_fingerprint([path.absolute() for path in paths]) == fingerprint
    write("b.jsonl", GOOD.replace("多", "少"))
    changed = content_fingerprint(paths)
    renamed = content_fingerprint([paths[0], write("c.jsonl", GOOD)])
    assert len({fingerprint, changed, renamed, content_fingerprint(paths[::-1])}) == 4


def test_a_cache_hit_does_not_build_and_any_key_part_rebuilds():
    key = {"data": "abc", "max_length": 2048}
    built, built_report, was_cached = cached_dataset("cache/deep", key, build_once_more)
    assert not was_cached
    loaded, report, was_cached = cached_dataset("cache/deep", dict(reversed(key.items())), build_once_more)
    assert was_cached and count_builds() == 1
    assert loaded[:] == built[:] == {"input_ids": [[1, 2], [3]]}
    assert report == built_report == Report(read=2).as_dict()
    for changed in ({"data": "abd"}, {"max_length": 1024}, {"template": "qwen"}):
        assert not cached_dataset("cache/deep", key | changed, build_once_more)[2]
    assert count_builds() == 4


def test_overwrite_builds_again():
    for number in (1, 2, 3):
        assert not cached_dataset("cache", {}, build_once_more, overwrite=True)[2]
        assert count_builds() == number


@pytest.mark.parametrize(
    ("pattern", "damage"),
    [
        ("*.arrow", lambda file: file.write_bytes(file.read_bytes()[:-8])),
        ("state.json", Path.unlink),
        ("manifest.json", Path.unlink),
        ("manifest.json", lambda file: file.write_text("{")),
    ],
)
def test_a_damaged_cache_is_built_again(pattern, damage):
    cached_dataset("cache", {}, build_once_more)
    damage(next(Path("cache").glob(f"*/{pattern}")))
    dataset, _, was_cached = cached_dataset("cache", {}, build_once_more)
    assert not was_cached and count_builds() == 2 and dataset[:] == {"input_ids": [[1, 2], [3]]}
    assert cached_dataset("cache", {}, build_once_more)[2]


def test_a_build_that_was_killed_leaves_nothing_that_is_trusted(monkeypatch):
    def die(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "replace", die)
        cached_dataset("cache", {}, build_once_more)
    assert not cached_dataset("cache", {}, build_once_more)[2]
    assert len([path for path in Path("cache").iterdir() if path.is_dir()]) == 1


def build_slowly() -> tuple[Dataset, dict]:
    time.sleep(0.5)
    return build_once_more()


def prepare_in_process(folder, barrier, results) -> None:
    os.chdir(folder)
    for cache_dir, overwrite in CACHES:
        barrier.wait()
        dataset, report, was_cached = cached_dataset(cache_dir, {}, build_slowly, overwrite)
        results.put((cache_dir, dataset[:], report, was_cached))


CACHES = (("absent", False), ("rebuilt", True))


def test_processes_started_together_build_once(tmp_path, monkeypatch):
    cached_dataset("rebuilt", {}, build_once_more)
    monkeypatch.setenv("LOCAL_RANK", "0")  # torchrun sets it in each process
    spawn = multiprocessing.get_context("spawn")
    barrier, results = spawn.Barrier(2), spawn.Queue()
    processes = [spawn.Process(target=prepare_in_process, args=(tmp_path, barrier, results)) for _ in range(2)]
    for process in processes:
        process.start()
    found = sorted((results.get(timeout=120) for _ in range(4)), key=lambda result: (result[0], result[3]))
    for process in processes:
        process.join()
    assert count_builds() == 3
    rows, report = {"input_ids": [[1, 2], [3]]}, Report(read=2).as_dict()
    assert found == [(name, rows, report, was_cached) for name, _ in CACHES for was_cached in (False, True)]


# --- import ----------------------------------------------------------------------------------------


def test_the_import_is_light():
    heavy = "{'datasets', 'pyarrow', 'torch', 'transformers'}"
    root = Path(__file__).resolve().parents[2]
    command = f"import sys, medtune.reading.readers; assert not {heavy} & {{*sys.modules}}"
    subprocess.run([sys.executable, "-c", command], cwd=root, check=True)


# ---------------------------------------------------------------- large and compressed files


def qa(question: str, answer: str) -> dict:
    return {"question": question, "answer": answer}


@pytest.mark.parametrize("indent", [None, 0, 2], ids=["one line", "a value a line", "indented"])
def test_a_json_list_larger_than_what_is_held_reads_to_the_same_records_and_lines(indent):
    records = [qa(f"问{number}😀", "答" * (number % 700)) for number in range(3000)]
    records[1500]["answer"] = "很长" * 2_000_000
    text = json.dumps(records, ensure_ascii=False, indent=indent)
    read = list(read_raw(write("d.json", text)))
    assert [record for _, record in read] == records
    if indent is not None:
        line_of = [number for number, line in enumerate(text.split("\n"), 1) if line.strip() == "{"]
        assert [source for source, _ in read] == [f"d.json:{line}" for line in line_of]
    else:
        assert read[2][0] == "d.json:1 (record 3 on the line)"


def test_a_fault_behind_much_of_a_json_list_is_named_by_its_line_and_column():
    lines = [dumps(qa(f"q{number}", "多喝水" * 300)) for number in range(3000)]
    body = ",\n".join(lines)
    with pytest.raises(UserError, match=r"^d.json:3002: broken JSON: Expecting ',' or '\]' \(column 2\)"):
        list(read_raw(write("d.json", f"[\n{body}\n x]")))
    one_line = ",".join(lines)
    with pytest.raises(UserError, match=rf"^d.json:1: broken JSON: Expecting value \(column {len(one_line) + 3}\)"):
        list(read_raw(write("d.json", f"[{one_line},x]")))
    with pytest.raises(UserError, match=r"^d.json:1: broken JSON: Unterminated string"):
        list(read_raw(write("d.json", f'[{one_line},"x')))
    bad = f"[{one_line},".encode() + b'{"question": "\xff"}]'
    *_, (source, record) = read_raw(write("d.json", bad))
    assert source == "d.json:1 (record 3001 on the line)"
    assert record.detail.startswith(f"byte {len(f'[{one_line},'.encode()) + 15} of line 1 is 0xff")


def test_numbers_are_not_cut_where_more_is_read():
    numbers = [10**15 + number for number in range(200_000)]
    assert [record for _, record in read_raw(write("d.json", json.dumps(numbers)))] == numbers


@pytest.mark.parametrize("name", ["d.jsonl.gz", "d.json.gz", "d.csv.GZ"])
def test_compressed_text_files_are_read_like_the_others(name):
    write_records(Path(name).stem, [qa("感冒了怎么办？", "多休息。")] * 3)
    plain = Path(Path(name).stem)
    write(name, gzip.compress(plain.read_bytes()))
    plain.unlink()
    files, unread = find_files(".", "--train_file_dir")
    assert (files, unread) == ([Path(name)], [])
    dialogues, _ = load_dialogues(files)
    assert [d.messages[1]["content"] for d in dialogues] == ["多休息。"] * 3
    assert dialogues[0].source.startswith(f"{name}:")


@pytest.mark.parametrize(
    "damage", [lambda c: c[:-20], lambda c: c[:30] + b"xxxx" + c[34:], lambda c: b"\xff\xfe not gzip at all"]
)
def test_a_damaged_gzip_file_is_named(damage):
    content = gzip.compress("".join(dumps(qa(f"q{n}", f"a{n * n}")) + "\n" for n in range(200)).encode())
    with pytest.raises(UserError, match=r"^d.jsonl.gz: not a whole gzip file \(.*\); copy or download it again$"):
        list(read_raw(write("d.jsonl.gz", damage(content))))


def test_parquet_has_its_own_compression():
    assert find_files(write("d.jsonl", "{}"), "--in")[0]
    with pytest.raises(UserError, match=r"found only d.parquet.gz"):
        find_files(write("d.parquet.gz", ""), "--in")


# --- a list in an object --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content",
    [
        '{"data": [\n' + GOOD + ",\n" + GOOD + "]}",
        '{"version": "1.0", "meta": {"n": 2}, "data": [\n' + GOOD + ",\n" + GOOD + '], "total": 2}\n',
        '\ufeff{"train":[\n' + GOOD + "\n,\n" + GOOD + "\n]}",
        '{\n"records": [' + GOOD + ",\n" + GOOD + "]\n}\n",
        '{"data": [\n' + GOOD + ']}\n{"data": [' + GOOD + "]}",
    ],
)
@pytest.mark.parametrize("name", ["d.json", "d.jsonl"])
def test_a_list_in_an_object_is_read_record_by_record(name, content):
    results = list(read_dialogues([write(name, content)]))
    assert [result.messages[0]["content"] for result in results] == ["感冒了怎么办？"] * 2
    assert results[0].source == f"{name}:2"


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"data": [human("甲"), gpt("乙")]}, "unknown keys"),
        ({"question": "甲", "answer": "乙", "examples": [{"q": "丙"}]}, None),
        ({"id": 7, "messages": [user("甲"), assistant("乙")], "items": [{"q": "丙"}]}, None),
    ],
)
def test_what_only_looks_like_a_list_in_an_object_is_a_record(record, reason):
    result = read_one(record)
    assert (result.reason if isinstance(result, BadRecord) else None) == reason


def test_a_fault_in_a_list_in_an_object_is_named_with_its_line():
    path = write("d.json", '{"data": [\n' + GOOD + ',\n{"question": "a"},\n' + GOOD + "]}")
    assert [getattr(result, "reason", "") for result in read_dialogues([path])] == ["", "unknown keys", ""]
    with pytest.raises(UserError, match=r"^d.json:3: broken JSON"):
        list(read_dialogues([write("d.json", '{"data": [\n' + GOOD + ",\n{broken")]))
    with pytest.raises(UserError, match=r"^d.json:3: broken JSON: Text after the list's end"):
        list(read_dialogues([write("d.json", '{"data": [\n' + GOOD + "]}\n[1]")]))
