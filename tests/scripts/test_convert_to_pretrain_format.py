"""Texts, records and marked-up files become one document a line, which pretraining reads without a complaint."""

import gzip
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from convert_to_pretrain_format import main, without_marks

from medtune.errors import UserError
from medtune.reading.readers import load_documents


@pytest.fixture(autouse=True)
def _in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def write(name: str, content: str | bytes | list) -> str:
    path = Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, list):
        content = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in content)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return name


def convert(path: str, *flags: str) -> list[str]:
    """The documents that are written, as pretraining reads them."""
    main(["--input_file", path, "--output_file", "out/corpus.txt", *flags])
    assert [file.name for file in Path("out").iterdir()] == ["corpus.txt"]
    documents, report = load_documents([Path("out/corpus.txt")])
    assert report.dropped == {}
    assert [document.text for document in documents] == Path("out/corpus.txt").read_text(encoding="utf-8").splitlines()
    return [document.text for document in documents]


# ---------------------------------------------------------------- records


@pytest.mark.parametrize(
    ("record", "document"),
    [
        ({"text": "高血压\n是慢性病。\r\n要随诊。"}, "高血压 是慢性病。 要随诊。"),
        ({"title": "痛风", "text": "尿酸升高引起。"}, "痛风 尿酸升高引起。"),
        ({"title": "痛风", "content": "痛风由尿酸升高引起。"}, "痛风由尿酸升高引起。"),
        ({"id": 1, "标题": "痛风", "正文": "尿酸升高。"}, "痛风 尿酸升高。"),
        ({"question": "感冒怎么办？", "answer": "多喝水。\n休息。"}, "感冒怎么办？ 多喝水。 休息。"),
        ({"instruction": "i", "input": "x", "output": "o", "history": [["q", "a"]]}, "q a i x o"),
        ({"department": "内科", "title": "头晕", "ask": "头晕三天", "answer": "测血压"}, "头晕三天 测血压"),
        ({"data": ["问：q", "答：a"]}, "q a"),
        ({"question": "q", "response_chosen": "c", "response_rejected": "r"}, "q c"),
        ({"question": "q", "good_answer": "c", "bad_answer": "r"}, "q c"),
        (
            {
                "messages": [
                    {"role": "system", "content": "s"},
                    {"role": "user", "content": "q"},
                    {"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": {}}]},
                    {"role": "tool", "content": "42"},
                    {"role": "assistant", "content": "a"},
                ]
            },
            "q a",
        ),
        ("只是一段文字", "只是一段文字"),
    ],
)
def test_the_text_of_a_record(record, document):
    assert convert(write("d.jsonl", [record, record])) == [document, document]


def test_a_column_by_name():
    raw = write("d.jsonl", [{"title": "痛风", "说明": "尿酸升高。", "text": "别的"}])
    assert convert(raw, "--text_column", "说明") == ["痛风 尿酸升高。"]
    with pytest.raises(UserError, match=r"no such column: d.jsonl:1: it has 'title', '说明', 'text', not '描述'"):
        convert(raw, "--text_column", "描述", "--overwrite")


def test_columns_of_a_dialogue_by_name():
    raw = write("d.jsonl", [{"主诉": "头晕", "医嘱": "测血压"}])
    with pytest.raises(UserError, match="--text_column NAME"):
        convert(raw)
    assert convert(raw, "--question_column", "主诉", "--answer_column", "医嘱") == ["头晕 测血压"]


@pytest.mark.parametrize("encoding", ["utf-8", "gbk", "utf-16"])
def test_csv_json_and_parquet_in_a_folder(encoding):
    write("in/a.csv", "title,content\n痛风,尿酸升高。\n".encode(encoding))
    write("in/b.json", json.dumps([{"text": "一"}, {"text": "二"}]))
    write("in/c.jsonl.gz", gzip.compress('{"text": "三"}'.encode(encoding)))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"text": "四"}]), "in/d.parquet")
    write("in/e.txt", "五\n\n六".encode(encoding))
    assert convert("in") == ["痛风 尿酸升高。", "一", "二", "三", "四", "五", "六"]


# ---------------------------------------------------------------- text files

MARKDOWN = """---
title: 高血压
tags: [a, b]
---
# 高血压 #

**高血压（HTN）**是以*血压升高*为特征的_慢性病_，见[指南](http://a.b/c)、![图](x.png)和[表][1]。
肿块 2*3*4 cm，snake_case_name 不变，`代码` 留下，BP <90 mmHg & >60。

病因
----
> 引用 ~~删去~~

| 项目 | 值 |
|:---|---:|
| 收缩压 | ≥140 |

- 少盐
* [x] 运动
1. 复诊

***

```
code
```
转义 \\* 号
[1]: http://a.b
"""
PLAIN = (
    "高血压 高血压（HTN）是以血压升高为特征的慢性病，见指南、图和表。 肿块 2*3*4 cm，snake_case_name 不变，代码 留下，"
    "BP <90 mmHg & >60。 病因 引用 删去 项目 值 收缩压 ≥140 少盐 运动 1. 复诊 code 转义 * 号"
)


def test_markdown_is_one_document_without_marks():
    assert convert(write("d.md", MARKDOWN)) == [PLAIN]


def test_rules_are_no_front_matter():
    assert without_marks("---\n正文\n---\n后文").split() == ["正文", "后文"]


def test_html_is_one_document_without_html():
    page = (
        "<!DOCTYPE html><html><head><title>糖尿病</title><style>p { color: red }</style></head><body>\n"
        "<!-- 注释 --><p class='x' id=y>多<b>饮</b>多<a href=\"http://a.b?x>1\">尿</a>&nbsp;血糖&lt;7<br/>复查</p>"
        "<script>if (a < b) { alert('<p>') }</script><table><tr><td>甲</td><td>乙</td></tr></table></body></html>"
    )
    assert convert(write("d.html", page)) == ["糖尿病 多饮多尿 血糖<7 复查 甲 乙"]


def test_tags_are_taken_out_of_every_kind_of_file():
    assert convert(write("d.jsonl", [{"text": "<p>多<em>喝水</em></p><p>休息</p>"}])) == ["多喝水 休息"]
    assert convert(write("d.txt", "多喝水<br>休息&#12290;\n"), "--overwrite") == ["多喝水 休息。"]


@pytest.mark.parametrize(
    ("split", "documents"),
    [
        ("line", ["一", "二", "三", "四"]),
        ("paragraph", ["一 二", "三 四"]),
        ("file", ["一 二 三 四"]),
    ],
)
def test_what_a_document_is_in_a_text_file(split, documents):
    for name in ("d.txt", "d.md"):
        assert convert(write(name, "一\n二\n\n \n三\n四"), "--split", split, "--overwrite") == documents
    default = "line" if name == "d.txt" else "file"
    if split == default:
        assert convert(name, "--overwrite") == documents


def test_every_kind_of_line_break_and_blank_becomes_a_space():
    text = "一\u2028二\u2029三\x0b四\x0c五\x85六\r七\u3000\u3000八\xa0九\t 十"
    assert convert(write("d.jsonl", [{"text": f"\ufeff{text}".lstrip("\ufeff")}])) == ["一 二 三 四 五 六 七 八 九 十"]


# ---------------------------------------------------------------- what is dropped


def test_short_documents_are_dropped_by_a_flag_and_counted(capsys):
    raw = write("d.txt", "短\n这一行够长了吗\n<p>短</p>\n")
    assert convert(raw) == ["短", "这一行够长了吗", "短"]
    assert convert(raw, "--min_length", "5", "--overwrite") == ["这一行够长了吗"]
    printed = capsys.readouterr().out
    assert "kept 1 of 3 (2 short)" in printed
    assert "2 dropped, short: d.txt:1, d.txt:3: 1 characters, under --min_length 5" in printed


def test_faults_are_counted_by_reason_with_examples(capsys):
    lines = ['{"text": "好"}', '{"text": ""}', '{"text": "<br>"}', '{"text": 7}', '{"text": "x"', "[1]", '{"x": 1}']
    assert convert(write("d.jsonl", "\n".join(lines))) == ["好"]
    printed = capsys.readouterr().out
    assert "kept 1 of 7" in printed
    for line in (
        "2 dropped, empty: d.jsonl:2, d.jsonl:3: ", "1 dropped, not text: d.jsonl:4: ",
            "1 dropped, broken JSON: d.jsonl:5: ",
        "1 dropped, not an object: d.jsonl:6: ", "1 dropped, unknown keys: d.jsonl:7: has the keys 'x'",
    ):  # fmt: skip
        assert line in printed


def test_a_byte_that_is_no_character_spoils_its_document_only(capsys):
    assert convert(write("d.txt", "好\n".encode() * 20 + b"\xff\n" + "的\n".encode())) == ["好"] * 20 + ["的"]
    assert "1 dropped, not in its encoding: d.txt:21: " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--input_file", "nowhere", "--output_file", "o.txt"], "--input_file nowhere: no such file or folder"),
        (["--input_file", "d.txt", "--output_file", "d.txt", "--overwrite"], "--output_file d.txt: is among the files"),
        (["--input_file", "d.txt", "--output_file", "old.txt"], "--output_file old.txt: exists already"),
        (["--input_file", "d.txt", "--output_file", "o.jsonl"], "--output_file o.jsonl: plain text is written"),
        (["--input_file", "empty.txt", "--output_file", "o.txt"], "empty.txt: no document in it"),
        (["--input_file", "cut.txt.gz", "--output_file", "o.txt"], "cut.txt.gz: not a whole gzip file"),
    ],
)
def test_a_users_mistake_is_said_and_leaves_everything_as_it_was(arguments, message):
    write("d.txt", "一\n")
    write("old.txt", "old")
    write("empty.txt", "\n \n")
    write("cut.txt.gz", gzip.compress("一\n".encode() * 1000)[:-10])
    before = {path.name: path.read_bytes() for path in Path().iterdir()}
    with pytest.raises(UserError, match=message):
        main(arguments)
    assert {path.name: path.read_bytes() for path in Path().iterdir()} == before
