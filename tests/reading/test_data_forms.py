"""Encodings are told apart, and records written in the guide's form read back to the same."""

import gzip
import importlib
import json
from pathlib import Path

import pytest
from reading_cases import assistant, system, tool, user, write
from stage_runs import PARTS, STAGES, stage_flags

from medtune.reading.charsets import detect_encoding
from medtune.reading.conversations import to_dialogue, to_pair
from medtune.reading.foreign_forms import ForeignReader
from medtune.reading.guide_form import guide_line, guide_record
from medtune.reading.html_text import without_html
from medtune.reading.kinds import find_kind
from medtune.reading.records import BadRecord, Dialogue, Pair

ZH = "头痛怎么办？先休息，多喝水，三天不好请到医院。体温38.5℃。"


@pytest.mark.parametrize(
    ("content", "encoding"),
    [
        (b"", "utf-8-sig"),
        (b"plain ASCII " * 1000, "utf-8-sig"),
        (ZH.encode(), "utf-8-sig"),
        (ZH.encode("utf-8-sig"), "utf-8-sig"),
        (ZH.encode("gbk"), "gb18030"),
        ("问".encode("gbk"), "gb18030"),
        (b"id,question,answer\n" * 100_000 + ZH.encode("gbk"), "gb18030"),
        ((ZH + "㐀𠀀").encode("gb18030"), "gb18030"),
        (ZH.encode("utf-16"), "utf-16"),
        # A stray byte makes no GB18030 of a text, nor do other encodings, which would decode to other letters.
        (ZH.encode() + b"\xff" + ZH.encode(), "utf-8-sig"),
        ("fever of 38°C, café, naïve".encode("latin-1"), "utf-8-sig"),
        ("頭痛怎麼辦？請先休息，多喝水。".encode("big5"), "utf-8-sig"),
        ("головная боль".encode("cp1251"), "utf-8-sig"),
    ],
)
def test_encodings_are_told_apart(tmp_path, content, encoding):
    assert detect_encoding(write(tmp_path / "d.csv", content)) == encoding
    assert detect_encoding(write(tmp_path / "d.csv.gz", gzip.compress(content))) == encoding


def test_a_damaged_gzip_file_is_left_to_the_reader(tmp_path):
    assert detect_encoding(write(tmp_path / "d.csv.gz", gzip.compress(ZH.encode("gbk") * 99)[:-20])) == "utf-8-sig"
    assert detect_encoding(write(tmp_path / "d.jsonl.gz", b"nothing of the kind")) == "utf-8-sig"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<p>多喝水。<br/>注意&nbsp;休息</p>", "\n多喝水。\n注意\xa0休息"),
        ('<div class="a b"><a href=x.html>感冒</a>的<b>症状</b></div>', "\n感冒的症状"),
        ("<p>一</p>二<ul><li>三</li> <li>四</LI></ul>五", "\n一\n二\n\n三 \n四\n五"),
        ("<div>一</div><b>二</b>", "\n一\n二"),
        ("<td>1</td><td>2</td>", " 1 2"),
        ("白细胞 4×10<sup>9</sup>/L，CO<sub>2</sub>", "白细胞 4×10^9/L，CO2"),
        ("E/A比值&lt;1，&amp;lt;2，&#65;&#x42;", "E/A比值<1，<2，AB"),
        ("<!doctype html><script>alert(1)</script>感冒<!-- 广告 --><STYLE>p {}</STYLE>", "感冒"),
        ("<input type=checkbox checked>是", "是"),
    ],
)
def test_html_becomes_text(text, expected):
    assert without_html(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "血压 <90 mmHg, HbA1c >7%，p<0.05，<5mg",
        "若 x<a and b>c",
        "若 PaO2<b，不换药；<script>后面的话",
        "if x<p then y>q",
        "AT&T &unknown; R&D; x &notanentity; y",
        "<think>想</think>答<|im_end|>",
    ],
)
def test_what_is_no_html_stays(text):
    assert without_html(text) == text


CALL = {"name": "look_up", "arguments": {"名": "布洛芬"}}
USER, REPLY = user("q\n2"), assistant("a")
CALLING = [
    *(assistant("", tool_calls=[CALL]), tool("1")),
    *(assistant("看一下", tool_calls=[CALL, CALL]), tool("2"), tool("3")),
]


@pytest.mark.parametrize("head", [[], [system("你是医生。")]])
@pytest.mark.parametrize("before", [[], [USER, REPLY], [USER, *CALLING, REPLY]])
def test_what_is_written_reads_back_to_the_same(head, before):
    prompt = [*head, *before, USER]
    tools = [{"name": "look_up", "parameters": {}}] if before[1:2] == CALLING[:1] else None
    dialogue = Dialogue([*prompt, REPLY], tools, "d.jsonl:1")
    assert to_dialogue(guide_record(dialogue), "d.jsonl:1") == dialogue
    for margin in (None, 0.0, 1.25):
        pair = Pair(prompt, "c", "r", margin, "d.jsonl:1")
        assert to_pair(guide_record(pair), "d.jsonl:1") == pair


def test_the_written_lines_are_the_guides():
    dialogue = Dialogue([USER, REPLY], None, "")
    assert guide_line(dialogue) == ('{"conversations":[{"from":"human","value":"q\\n2"},{"from":"gpt","value":"a"}]}\n')
    assert guide_line(Pair([USER, REPLY, USER], "好", "坏", 0.5, "")) == (
        '{"system":"","history":[["q\\n2","a"]],"question":"q\\n2","response_chosen":"好",'
        '"response_rejected":"坏","margin":0.5}\n'
    )
    tools = [{"name": "f", "id": 2**70}]
    assert json.loads(guide_line(Dialogue([USER, REPLY], tools, "")))["tools"] == tools


def test_forms_may_change_from_record_to_record(tmp_path):
    lines = ['{"ask": "q", "answer": "a"}', '{"data": ["q", "a"]}', '{"x": 1}', '{"question": "q", "answer": "a"}'] * 2
    reader = ForeignReader("dialogues")
    results = list(reader.read([write(tmp_path / "d.jsonl", "\n".join(lines))]))
    assert [isinstance(result, BadRecord) for result in results] == [False, False, True, False] * 2
    assert reader.describe() == ["2 records by the columns 'ask', 'answer'", "2 records by the columns 'data'"]


def test_a_bad_first_record_does_not_decide_how_the_others_are_read(tmp_path):
    lines = [
        '{"conversations": [{"who": "human", "value": "q"}], "query": "x", "response": "y"}',
        '{"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], "query": "x", '
        '"response": "y"}',
    ]
    first, second = ForeignReader("dialogues").read([write(tmp_path / "d.jsonl", "\n".join(lines))])
    assert first.reason == "unknown keys"
    assert [message["content"] for message in second.messages] == ["q", "a"]


@pytest.mark.parametrize(
    ("lines", "kind"),
    [
        (['{"question": "q", "answer": ""}', '{"question": "q", "answer": "a"}'], "dialogues"),
        (['{"question": "q", "good_answer": "", "bad_answer": ""}'], "pairs"),
        (['{"text": ""}'], "documents"),
        (["{}", "broken"], "dialogues"),
    ],
)
def test_faulty_records_are_of_a_kind_too(tmp_path, lines, kind):
    path = write(tmp_path / "d.jsonl", "\n".join(lines))
    assert find_kind(path, "--dir") == (kind, [path], [])


# Tool, the guide's flags, and what stands in raw.jsonl then.
GUIDE = [
    (
        "convert_data_format",
        "--input raw.jsonl --output data/finetune/train.jsonl --format sft",
        ("question", "answer"),
    ),
    ("check_data", "--dir data/finetune", None),
    ("convert_to_pretrain_format", "--input_file raw.jsonl --output_file data/pretrain/medical_corpus.txt", None),
    (
        "generate_preference_data",
        "--sft_data data/finetune/train.jsonl --output_file data/reward/preference_data.jsonl --num_samples 5000",
        None,
    ),
    ("preprocess_data", "--input_dir data/finetune --output_dir data/finetune_processed", None),
    (
        "convert_data_format",
        "--input raw.jsonl --output data/reward/train.jsonl --format dpo",
        ("question", "good_answer", "bad_answer"),
    ),
    ("check_data", "--dir data/reward", None),
]


def test_what_the_guides_lines_write_the_stages_train_on(tmp_path, monkeypatch, tiny_model_dir, capsys):
    monkeypatch.chdir(tmp_path)
    for script, flags, names in GUIDE:
        if names:
            values = ("第{n}个病人{part}疼怎么办？", "{part}疼{n}天以上请就诊，注意休息。", "第{n}次也不用管。")
            records = [
                {name: value.format(n=n, part=PARTS[n % 8]) for name, value in zip(names, values, strict=False)}
                for n in range(30)
            ]
            lines = [json.dumps(record, ensure_ascii=False) for record in records]
            Path("raw.jsonl").write_text("\n".join(lines), encoding="utf-8")
        importlib.import_module(script).main(flags.split())

    for stage, folder, kept in (("pt", "pretrain", 30), ("sft", "finetune_processed/train", 27), ("dpo", "reward", 60)):
        path = f"data/{folder}"
        flags = stage_flags(stage, tiny_model_dir, tmp_path, train_file_dir=path, max_steps=1, save_strategy="no")
        capsys.readouterr()
        importlib.import_module(STAGES[stage]).main([*flags, "--overwrite_output_dir"])
        assert f"kept {kept} of {kept}" in capsys.readouterr().err
