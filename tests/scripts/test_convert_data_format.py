"""Data in its published forms becomes the guide's, and the stages read what is written without a complaint."""

import gzip
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from convert_data_format import main

from medtune.errors import UserError
from medtune.reading.readers import load_dialogues, load_records, read_pairs


@pytest.fixture(autouse=True)
def _in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def dumps(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)


def write(name: str, content: object) -> Path:
    """Write bytes or text as they are, other values as records in the form of the file's ending."""
    path = Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif isinstance(content, str):
        path.write_text(content, encoding="utf-8")
    elif path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(content), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(content, ensure_ascii=False, indent=4), encoding="utf-8")
    else:
        path.write_text("".join(dumps(record) + "\n" for record in content), encoding="utf-8")
    return path


def convert(path: str | Path, kind: str, *flags: str) -> list[dict]:
    """What the tool writes; nothing but the output is left beside it."""
    main(["--input", str(path), "--output", "out/train.jsonl", "--format", kind, *flags])
    assert [file.name for file in Path("out").iterdir()] == ["train.jsonl"]
    return [json.loads(line) for line in Path("out/train.jsonl").read_text(encoding="utf-8").splitlines()]


def said(*texts: str) -> dict:
    turns = [{"from": ("human", "gpt")[number % 2], "value": text} for number, text in enumerate(texts)]
    return {"conversations": turns}


# ---------------------------------------------------------------- the guide's forms


def test_the_guides_raw_questions_and_answers():
    raw = write("raw.jsonl", '{"question": "感冒怎么办？", "answer": "多喝水，注意休息。"}\n')
    assert convert(raw, "sft") == [said("感冒怎么办？", "多喝水，注意休息。")]


def test_the_guides_raw_pairs():
    raw = write("raw.jsonl", '{"question": "感冒怎么办？", "good_answer": "多休息。", "bad_answer": "不用管。"}\n')
    assert convert(raw, "dpo") == [
        {
            "system": "",
            "history": [],
            "question": "感冒怎么办？",
            "response_chosen": "多休息。",
            "response_rejected": "不用管。",
        }
    ]


# ---------------------------------------------------------------- published sets, in their own columns

TOYHOM = (
    "department,title,ask,answer\n"
    "心血管科,高血压患者能吃党参吗？,我有高血压，女婿拿了些党参泡水喝，您好高血压可以吃党参吗？,高血压病人可以口服党参的。\n"
    '消化科,哪家医院能治胃反流,"烧心，打隔，\n咳嗽低烧",\u3000建议你用奥美拉唑\n'
    "消化科,胃疼怎么办？,胃疼怎么办？吃了凉的,热敷。\n"
    "消化科,胃疼吃什么药？,,遵医嘱。\n"
)
OF_TOYHOM = [
    said(
        "高血压患者能吃党参吗？\n我有高血压，女婿拿了些党参泡水喝，您好高血压可以吃党参吗？",
        "高血压病人可以口服党参的。",
    ),
    said("哪家医院能治胃反流\n烧心，打隔，\n咳嗽低烧", "建议你用奥美拉唑"),
    said("胃疼怎么办？吃了凉的", "热敷。"),
    said("胃疼吃什么药？", "遵医嘱。"),
]


@pytest.mark.parametrize("encoding", ["gbk", "gb18030", "utf-8", "utf-8-sig", "utf-16"])
def test_toyhom(encoding, capsys):
    raw = write("内科5000-33000.csv", TOYHOM.encode(encoding))
    assert convert(raw, "sft") == OF_TOYHOM
    printed = capsys.readouterr().out
    assert "kept 4 of 4" in printed
    assert "4 records by the columns 'title', 'ask', 'answer'" in printed
    is_utf8 = encoding.startswith("utf-8")
    assert ("内科5000-33000.csv is " in printed) is not is_utf8
    if encoding.startswith("gb"):
        assert "内科5000-33000.csv is gb18030" in printed


def test_healthcaremagic():
    instruction = "If you are a doctor, please answer the medical questions based on the patient's description."
    raw = write(
        "train-00000-of-00001.parquet",
        [{"instruction": instruction, "input": "Doctor, I have a cough.", "output": "Hi, see a physician."}],
    )
    assert convert(raw, "sft") == [said(f"{instruction}\nDoctor, I have a cough.", "Hi, see a physician.")]


def test_huatuogpt_sft_data(capsys):
    raw = write(
        "HuatuoGPT_sft_data_v1.jsonl",
        [
            {"data": ["问：头痛怎么办？", "答：先休息。", "问:还有呢？", "答: 多喝水。"]},
            {"data": ["问：头痛怎么办？", "答：先休息。", "问：谢谢"]},
            {"data": ["问：头痛怎么办？", "先休息。"]},
            {"data": "没有"},
        ],
    )
    assert convert(raw, "sft") == [said("头痛怎么办？", "先休息。", "还有呢？", "多喝水。")]
    printed = capsys.readouterr().out
    assert "kept 1 of 4 (1 no reply, 1 unknown speaker, 1 broken JSON)" in printed
    assert "HuatuoGPT_sft_data_v1.jsonl:2: turn 3 (user) is the last" in printed
    assert "HuatuoGPT_sft_data_v1.jsonl:3: turn 2 of 'data' starts with '先休息。'" in printed


def test_cmtmedqa():
    raw = write(
        "CMtMedQA.json",
        [
            {
                "id": "j1", "cate1": "内科", "cate2": "心血管内科", "instruction": "谢谢医生", "input": "",
                "output": "不客气", "history": [["头晕怎么办？", "测血压。"], ["高了", "请就诊。"]],
            },
            {"id": "j2", "cate1": "外科", "instruction": "疼", "input": "", "output": "看外科", "history": []},
        ],
    )  # fmt: skip
    assert convert(raw, "sft") == [
        said("头晕怎么办？", "测血压。", "高了", "请就诊。", "谢谢医生", "不客气"),
        said("疼", "看外科"),
    ]


@pytest.mark.parametrize("lower", [False, True])
@pytest.mark.parametrize(
    ("reasoning", "answer"),
    [
        ("leave_out", "看心内科。"),
        ("think_tags", "<think>\n胸痛要紧。\n</think>\n\n看心内科。"),
        ("headings", "## Thinking\n\n胸痛要紧。\n\n## Final Response\n\n看心内科。"),
    ],
)
def test_huatuogpt_o1(lower, reasoning, answer, capsys):
    record = {"Question": "胸痛挂什么科？", "Complex_CoT": "胸痛要紧。\n", "Response": "看心内科。"}
    raw = write("o1.json", [{key.lower() if lower else key: value for key, value in record.items()}])
    assert convert(raw, "sft", "--reasoning", reasoning) == [said("胸痛挂什么科？", answer)]
    line = (
        "thoughts of replies in a key of their own ('complex_cot'): 1, left out (--reasoning think_tags keeps them)\n"
    )
    assert (line in capsys.readouterr().out) == (reasoning == "leave_out")


def test_every_thought_in_a_key_of_its_own_goes_the_same_way(capsys):
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "reasoning_content": "t"}]
    raw = write("raw.jsonl", [{"messages": turns}])
    assert convert(raw, "sft") == [said("q", "a")]
    assert "('reasoning_content'): 1, left out (--reasoning think_tags keeps them)" in capsys.readouterr().out
    assert convert(raw, "sft", "--reasoning", "think_tags", "--overwrite") == [said("q", "<think>\nt\n</think>\n\na")]
    assert "('reasoning_content'): 1, read as <think>...</think> before the reply" in capsys.readouterr().out


@pytest.mark.parametrize(
    "record",
    [
        {"query": "q", "response": "a"},  # ChatMed
        {"description": "d", "utterances": ["patient: q", "doctor: a"]},  # MedDialog
        {"data": ["q", "a"]},
        {"conversation": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},  # DISC-Med-SFT
        {"Question": "q", "Answer": "a"},
        {"prompt": "q", "completion": "a"},
        {"问题": "q", "回答": "a"},
        {"input": "q", "output": "a"},
    ],
)
def test_other_names_of_a_question_and_its_answer(record):
    assert convert(write("raw.jsonl", [record]), "sft") == [said("q", "a")]


# ---------------------------------------------------------------- nothing is lost on the way

TOOLS = [{"name": "look_up", "description": "查药", "parameters": {"type": "object", "properties": {}}}]
CALL = {"name": "look_up", "arguments": {"name": "布洛芬"}}
RICH = [
    {
        "system": "你是医生。",
        "tools": json.dumps(TOOLS),
        "conversations": [
            {"from": "human", "value": "布洛芬怎么吃？"},
            {"from": "function_call", "value": json.dumps(CALL)},
            {"from": "observation", "value": "饭后"},
            {"from": "gpt", "value": "饭后吃。\n每日不超过说明书的量。"},
        ],
    },
    {
        "messages": [
            {"role": "system", "content": "s"},
            {"role": "user", "content": "q"},
            {"role": "assistant", "content": "我查一下", "tool_calls": [{"function": CALL}, {"function": CALL}]},
            {"role": "tool", "content": "1"},
            {"role": "tool", "content": "2"},
            {"role": "assistant", "content": "a"},
        ],
        "tools": TOOLS,
    },
    {"instruction": "i", "input": "x", "output": "o", "system": "s", "history": [["q1", "a1"], ["q2", "a2"]]},
]


def test_dialogues_keep_system_tools_and_history():
    raw = write("raw.jsonl", RICH)
    before, _ = load_dialogues([raw])
    convert(raw, "sft")
    after, report = load_dialogues([Path("out/train.jsonl")])
    assert report.summary() == "kept 3 of 3"
    assert [(d.messages, d.tools) for d in after] == [(d.messages, d.tools) for d in before]


PAIRS = [
    {
        "system": "s", "history": [["q1", "a1"], ["q2", "a2"]], "question": "q3",
        "response_chosen": "c", "response_rejected": "r", "margin": 1.5,
    },
    {"prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}], "chosen": "c", "rejected": "r"},
    {"conversations": RICH[0]["conversations"][:3], "system": "s", "chosen": "c", "rejected": "r"},
    {"instruction": "i", "input": "x", "chosen": "c", "rejected": "r", "score_chosen": 3, "score_rejected": 1},
    {
        "chosen": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "c"}],
        "rejected": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "r"}],
    },
]  # fmt: skip


def test_pairs_keep_system_history_tools_and_margin():
    raw = write("raw.jsonl", PAIRS)
    before, _ = load_records(read_pairs, [raw])
    written = convert(raw, "dpo")
    after, report = load_records(read_pairs, [Path("out/train.jsonl")])
    assert report.summary() == "kept 5 of 5"
    parts = ("messages", "chosen", "rejected", "margin")
    assert [[getattr(p, part) for part in parts] for p in after] == [
        [getattr(p, part) for part in parts] for p in before
    ]
    guides = {"system", "history", "question", "response_chosen", "response_rejected"}
    assert [record.keys() - {"margin"} == guides for record in written] == [True, True, False, True, True]


@pytest.mark.parametrize(
    "record", [{"query": "q", "Better": "c", "worse": "r"}, {"Question": "q", "Chosen": "c", "Rejected": "r"}]
)
def test_other_names_of_a_pair(record):
    (pair,) = convert(write("raw.jsonl", [record]), "dpo")
    assert (pair["question"], pair["response_chosen"], pair["response_rejected"]) == ("q", "c", "r")


# ---------------------------------------------------------------- files


def test_a_folder_of_all_kinds_compressed_or_not():
    write("raw/a.csv", TOYHOM.encode("gbk"))
    write("raw/b.jsonl.gz", gzip.compress(dumps({"question": "q", "answer": "a"}).encode()))
    write("raw/c.csv.gz", gzip.compress(TOYHOM.encode("gbk")))
    write("raw/deep/d.parquet", [{"data": ["问：q", "答：a"]}])
    assert convert("raw", "sft") == [*OF_TOYHOM, said("q", "a"), *OF_TOYHOM, said("q", "a")]


def test_what_is_not_read_is_said(capsys):
    write("raw/a.jsonl", [{"question": "q", "answer": "a"}])
    write("raw/README.md", "#")
    convert("raw", "sft")
    assert "not read, by their endings: raw/README.md" in capsys.readouterr().out


def test_the_output_may_be_compressed():
    raw = write("raw.jsonl", [{"question": "感冒", "answer": "休息"}])
    main(["--input", str(raw), "--output", "train.jsonl.gz", "--format", "sft"])
    assert load_dialogues([Path("train.jsonl.gz")])[0][0].messages[1]["content"] == "休息"


def test_an_encoding_that_is_not_found_is_named():
    raw = write("raw.csv", "question,answer\n感冒怎麼辦,多休息\n".encode("big5"))
    with pytest.raises(UserError, match=r"not UTF-8: raw\.csv:2: .* name the file's --encoding"):
        convert(raw, "sft")
    assert convert(raw, "sft", "--encoding", "big5") == [said("感冒怎麼辦", "多休息")]
    with pytest.raises(SystemExit):
        convert(raw, "sft", "--encoding", "klingon")


def test_a_byte_outside_the_encoding_spoils_its_record_only(capsys):
    content = TOYHOM.encode("gbk").replace("热敷".encode("gbk"), b"\xff\xff")
    assert convert(write("raw.csv", content), "sft") == [OF_TOYHOM[0], OF_TOYHOM[1], OF_TOYHOM[3]]
    assert "1 dropped, not gb18030: raw.csv:5: " in capsys.readouterr().out


# ---------------------------------------------------------------- columns by name

ODD = [{"主诉": "头晕", "现病史": "三天", "医嘱": "测血压", "差评": "别管", "身份": "你是医生。", "之前": [["q", "a"]]}]


def test_columns_by_name():
    raw = write("raw.jsonl", ODD)
    names = ["--question_column", "主诉", "现病史", "--system_column", "身份", "--history_column", "之前"]
    assert convert(raw, "sft", *names, "--answer_column", "医嘱") == [
        {"system": "你是医生。", **said("q", "a", "头晕\n三天", "测血压")}
    ]
    pair = ["--chosen_column", "医嘱", "--rejected_column", "差评", "--overwrite"]
    assert convert(raw, "dpo", *names, *pair) == [
        {
            "system": "你是医生。",
            "history": [["q", "a"]],
            "question": "头晕\n三天",
            "response_chosen": "测血压",
            "response_rejected": "别管",
        }
    ]


def test_a_pairs_better_reply_becomes_a_dialogue_by_name():
    raw = write("raw.jsonl", [{"question": "q", "response_chosen": "c", "response_rejected": "r"}])
    assert convert(raw, "sft", "--question_column", "question", "--answer_column", "response_chosen") == [
        said("q", "c")
    ]


def test_columns_that_are_not_found_are_listed_with_the_flags():
    raw = write("raw.jsonl", ODD)
    for kind, flags in (
        ("sft", "--question_column NAME --answer_column NAME"),
        ("dpo", "--question_column NAME --chosen_column NAME --rejected_column NAME"),
    ):
        with pytest.raises(UserError) as error:
            convert(raw, kind)
        assert "raw.jsonl:1: has the keys '主诉', '现病史', '医嘱', '差评', '身份', '之前'" in str(error.value)
        assert str(error.value).endswith(f"say which columns are meant: {flags}")
    assert not Path("out/train.jsonl").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--question_column", "主诉"], "--answer_column: name these too"),
        (["--answer_column", "医嘱"], "--question_column: name these too"),
        (
            ["--question_column", "问", "--answer_column", "医嘱"],
            "no such column: raw.jsonl:1: has '主诉', '现病史', '医嘱', '差评', '身份', '之前'; the flags name '问'",
        ),
    ],
)
def test_flags_that_name_too_little_or_nothing(flags, message):
    with pytest.raises(UserError, match=message):
        convert(write("raw.jsonl", ODD), "sft", *flags)


def test_two_columns_that_both_could_be_meant_are_not_guessed_between():
    raw = write("raw.jsonl", [{"query": "q", "problem": "p", "response": "a"}])
    with pytest.raises(UserError, match="say which columns are meant"):
        convert(raw, "sft")


# ---------------------------------------------------------------- faults


def test_faults_are_counted_by_reason_with_examples(capsys):
    lines = [
        '{"question": "q", "answer": "a"}',
        '{"question": "q", "answer": ""}',
        '{"question": "q"',
        '{"question": "", "answer": "a"}',
        '{"question": "q", "answer": null}',
        "[1]",
        '{"question": "q", "response_chosen": "c", "response_rejected": "r"}',
    ]
    assert convert(write("raw.jsonl", "\n".join(lines)), "sft") == [said("q", "a")]
    printed = capsys.readouterr().out
    assert "kept 1 of 7" in printed
    for line in (
        "1 dropped, empty reply: raw.jsonl:2: ",
        "1 dropped, broken JSON: raw.jsonl:3: ",
        "1 dropped, empty user turn: raw.jsonl:4: ",
        "1 dropped, null value: raw.jsonl:5: ",
        "1 dropped, not an object: raw.jsonl:6: ",
        "1 dropped, preference pair: raw.jsonl:7: ",
    ):
        assert line in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--input", "nowhere", "--output", "o.jsonl"], "--input nowhere: no such file or folder"),
        (["--input", "raw.jsonl", "--output", "raw.jsonl", "--overwrite"], "--output raw.jsonl: is among the files"),
        (["--input", "raw.jsonl", "--output", "old.jsonl"], "--output old.jsonl: exists already"),
        (["--input", "raw.jsonl", "--output", "o.csv"], r"--output o.csv: one record a line is written"),
        (["--input", "empty.jsonl", "--output", "o.jsonl"], "empty.jsonl: there are no records in it"),
        (["--input", "broken.csv", "--output", "o.jsonl"], "broken.csv:2: broken CSV"),
        (["--input", "broken.parquet", "--output", "o.jsonl"], "broken.parquet: not a whole parquet file"),
    ],
)
def test_a_users_mistake_is_said_and_leaves_everything_as_it_was(arguments, message):
    write("raw.jsonl", [{"question": "q", "answer": "a"}])
    write("old.jsonl", "old")
    write("empty.jsonl", "\n")
    write("broken.csv", 'question,answer\n"a,b\n')
    write("broken.parquet", b"PAR1 and so on")
    before = {path.name: path.read_bytes() for path in Path().iterdir()}
    with pytest.raises(UserError, match=message):
        main([*arguments, "--format", "sft"])
    assert {path.name: path.read_bytes() for path in Path().iterdir()} == before
