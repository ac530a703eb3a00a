"""Files that are not what their names say: data and model files are refused by name, or read as what they are."""

import gzip
import io
import json
import zipfile
from pathlib import Path

import check_data
import convert_data_format
import convert_to_pretrain_format
import preprocess_data
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from reading_cases import POINTER, POINTER_FAULT, fault_of, write

from medtune.errors import Unusable, UserError
from medtune.reading.charsets import detect_encoding
from medtune.reading.files import read_raw
from medtune.reading.finding import find_files
from medtune.reading.foreign_forms import ForeignReader
from medtune.reading.magic_bytes import misnamed
from medtune.reading.readers import load_dialogues, load_documents, read_dialogues, read_documents
from medtune.reading.records import BadRecord, Dialogue

ONE, TWO = '{"question": "头痛", "answer": "休息"}', '{"question": "咳嗽", "answer": "喝水"}'
HEADER, ROW_1, ROW_2 = "question,answer", "头痛,休息", "咳嗽,喝水"
BOM = "\ufeff"


pytestmark = pytest.mark.usefixtures("in_tmp_path")


def zipped(name: str) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr(name, ONE)
    return buffer.getvalue()


def table_of(names: list[str]) -> pyarrow.Table:
    return pyarrow.Table.from_arrays([pyarrow.array(["头痛"])] * len(names), names=names)


def parquet(names: list[str]) -> bytes:
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(table_of(names), buffer)
    return buffer.getvalue()


def arrow(names: list[str]) -> bytes:
    buffer, table = io.BytesIO(), table_of(names)
    with pyarrow.ipc.new_stream(buffer, table.schema) as writer:
        writer.write_table(table)
    return buffer.getvalue()


def refused(path: Path) -> str:
    """The one line by which a file is refused, whatever the flags, as dialogues or as documents."""
    return fault_of(load_documents if path.name.startswith("book") else load_dialogues, [path], "drop")


# ---------------------------------------------------------------- data: refused

NAMES = ["book.txt", "d.jsonl", "d.json", "d.csv", "d.tsv", "d.parquet", "d.jsonl.gz", "book.txt.gz"]
IN_EVERY_FILE = {
    "pointer": (POINTER, POINTER_FAULT),
    "pointer with CRLF": (POINTER.replace("\n", "\r\n"), POINTER_FAULT),
    "pointer with a mark": (BOM + POINTER, POINTER_FAULT),
    "pointer in UTF-16": (POINTER.encode("utf-16"), POINTER_FAULT),
    "pointer with an extension": (POINTER.replace("oid", f"ext-0-x sha256:{'0' * 64}\noid"), POINTER_FAULT),
    "pointers joined": (POINTER + POINTER, POINTER_FAULT),
    "small file's pointer": (POINTER.replace("734003200", "12"), "not the file itself of 12 bytes;"),
    "page": ("\n<!DOCTYPE html>\n<html><body>Sign in</body></html>", "a web page, such as of a login or an error"),
    "error of a store": ('<?xml version="1.0"?>\n<Error><Code>AccessDenied</Code></Error>', "a web page"),
    "hub's answer": ("Entry not found", "a server's answer (Entry not found), not the file itself"),
    "link": ("../../blobs/" + "a" * 64, "the path of a link, not the file that it leads to"),
    "zip": (zipped("train.jsonl"), "a zip archive; unpack it"),
    "workbook": (zipped("xl/workbook.xml"), "an Excel workbook; save it as CSV in UTF-8"),
    "arrow": (arrow(["question"]), "an Arrow file; write it as parquet"),
    "zeros": (b"\0" * 5000, "nothing but NUL bytes, as a full disk or a crash leaves"),
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("content", "fault"), IN_EVERY_FILE.values(), ids=IN_EVERY_FILE)
def test_a_file_that_is_none_of_data_is_refused_by_its_name(name, content, fault):
    line = refused(write(name, content))
    assert line.startswith(f"{name}: ")
    assert fault in line


@pytest.mark.parametrize(
    ("name", "content", "fault"),
    [
        ("d.jsonl", gzip.compress(ONE.encode(), mtime=0), "a gzip file; end its name in .gz"),
        ("d.csv", parquet(["question", "answer"]), "a parquet file; end its name in .parquet"),
        ("book.txt", parquet(["text"]), "a parquet file; end its name in .parquet"),
        ("d.jsonl.gz", f"{ONE}\n", "not compressed; take .gz off its name"),
        ("d.jsonl.gz", gzip.compress(POINTER.encode(), mtime=0), POINTER_FAULT),
        ("d.parquet", f"{ONE}\n", "text, not parquet; end its name in .jsonl or .csv, as it is"),
        ("d.parquet", f"{HEADER}\n{ROW_1}\n", "text, not parquet"),
        ("d.parquet", b"\xff\xfe nothing known", "not a parquet file; copy or download it again"),
        ("d.parquet", parquet(["question", "answer", "answer"]), "two columns are called 'answer'"),
        ("d.csv", f"{ONE}\n{TWO}\n", "JSON, not a table; end its name in .jsonl"),
        ("d.csv", f"[\n {ONE},\n {TWO}\n]\n", "JSON, not a table"),
        ("d.jsonl", f"{HEADER}\n{ROW_1}\n", "a table with column names; end its name in .csv"),
        ("d.json", f"id;{HEADER.replace(',', ';')}\n1;a;b\n", "a table with column names"),
        ("book.txt", f"{ONE}\n\n{TWO}\n", "JSON, not plain text; end its name in .jsonl"),
        ("book.txt", '[\n  {\n    "text": "高血压",\n    "n": 1\n  }\n]', "JSON, not plain text"),
        ("book.txt", f"{BOM}{HEADER}\n{ROW_1}\n", "a table with column names"),
        ("d.jsonl", ONE.encode("utf-16-le"), "UTF-16LE without its mark; convert it: `iconv -f UTF-16LE -t UTF-8"),
        ("d.csv", HEADER.encode("utf-16-be"), "UTF-16BE without its mark"),
        ("book.txt", f"第一行\n{POINTER}", f"book.txt:2: {POINTER_FAULT.replace(' of 734 MB', '')}"),
        ("d.csv", f"{HEADER}\n{ROW_1}\nanswer,question\n休息,头痛\n", "d.csv:3: other column names"),
        ("d.csv", f"{HEADER}\n{ROW_1}\ninstruction,output\na,b\n", "d.csv:3: other column names"),
    ],
)
def test_a_file_of_another_form_than_its_name_is_refused(name, content, fault):
    assert fault in refused(write(name, content))


def test_a_link_that_leads_nowhere_is_named():
    Path("d").mkdir()
    Path("d/train.jsonl").symlink_to("../blobs/none")
    with pytest.raises(UserError, match=r"^--in d: d/train.jsonl is a link to a file that is not there"):
        find_files("d", "--in")
    with pytest.raises(UserError, match=r"^d/train.jsonl: a link to a file that is not there"):
        list(read_dialogues([Path("d/train.jsonl")]))


def test_an_empty_file_is_a_fault_that_drop_counts():
    for name in ("d.jsonl", "d.csv", "d.parquet", "book.txt"):
        (bad,) = read_documents([write(name, "")])
        assert str(bad) == f"{name}:1: empty file: it has no bytes; copy or download it again, or delete it"
    records, report = load_dialogues([write("a.jsonl", ""), write("b.jsonl", ONE)], "drop")
    assert (len(records), report.summary()) == (1, "kept 1 of 2 (1 empty file)")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("book.txt", "甲\n乙\0\0\n丙\n"),
        ("book.csv", "text\n甲\n乙\0\0\n丙\n"),
        ("book.jsonl", '{"text": "甲"}\n\0\0\n{"text": "丙"}\n'),
    ],
)
def test_nul_bytes_spoil_their_own_record_only(name, content):
    first, bad, last = read_documents([write(name, content)])
    line = 2 + content.startswith("text")
    assert (first.text, last.text) == ("甲", "丙")
    assert str(bad).startswith(f"{name}:{line}: NUL bytes: in line {line}, as a full disk or a crash leaves")


@pytest.mark.parametrize(
    "text",
    [
        "version https://git-lfs.github.com is a page\n",
        "PAR1 is a receptor of thrombin.\n",
        "{braces} stand here\n[1] 高血压\n",
        "question, answer and reply\n",
        "Not found in the liver.\n第二行\n",
        "<90 mmHg is low.\n",
        "BZhang 2010\n",
    ],
)
def test_text_that_only_looks_like_it_is_read(text):
    assert misnamed(text.encode()) == ""
    documents, _ = load_documents([write("book.txt", text)])
    assert [document.text for document in documents] == text.splitlines()


TOOLS = {
    "convert to dialogues": (convert_data_format.main, ["--format", "sft", "--output", "o.jsonl", "--input"]),
    "convert to text": (convert_to_pretrain_format.main, ["--output_file", "o.txt", "--input_file"]),
    "preprocess": (preprocess_data.main, ["--output_dir", "o", "--input_dir"]),
}


@pytest.mark.parametrize(("main", "flags"), TOOLS.values(), ids=TOOLS)
def test_tools_refuse_a_pointer_by_its_name(main, flags):
    for name in ("d.jsonl", "d.csv", "d.parquet"):
        assert fault_of(main, [*flags, str(write(name, POINTER))]) == f"{name}: {POINTER_FAULT}"


@pytest.mark.parametrize("name", ["d.jsonl", "d.csv", "d.parquet", "book.txt"])
def test_check_data_says_that_a_file_is_a_pointer(name, capsys):
    with pytest.raises(SystemExit):
        check_data.main(["--dir", str(write(name, POINTER))])
    assert f"{name}: unreadable: {POINTER_FAULT}\n" in capsys.readouterr().out


# ---------------------------------------------------------------- data: read as what it is


def lines_of(*lines: str, end: str = "\n") -> str:
    return "".join(line + end for line in lines)


TWO_DIALOGUES = [("头痛", "休息"), ("咳嗽", "喝水")]
READ = {
    "CR in jsonl": ("d.jsonl", lines_of(ONE, TWO, end="\r"), [1, 2]),
    "CR in a list": ("d.json", lines_of("[", f"{ONE},", TWO, "]", end="\r"), [2, 3]),
    "CR in csv": ("d.csv", lines_of(HEADER, ROW_1, ROW_2, end="\r"), [2, 3]),
    "CR in csv, compressed": ("d.csv.gz", gzip.compress(lines_of(HEADER, ROW_1, ROW_2, end="\r").encode()), [2, 3]),
    "mark and no last line end": ("d.jsonl", f"{BOM}{ONE}\n{TWO}", [1, 2]),
    "second mark": ("d.jsonl", f"{BOM}{ONE}\n{BOM}{TWO}\n", [1, 2]),
    "second mark on the line": ("d.jsonl", f"{ONE}{BOM}{TWO}", ["1", "1 (record 2 on the line)"]),
    "two marks first": ("d.jsonl", f"{BOM}{BOM}{ONE}\n{TWO}\n", [1, 2]),
    "second mark in a list": ("d.json", f"[{ONE}]\n{BOM}[{TWO}]", [1, 2]),
    "second mark in csv": ("d.csv", f'{BOM}{HEADER}\n{ROW_1}\n{BOM}"咳嗽",喝水\n', [2, 3]),
    "two records on a line": ("d.jsonl", f"{ONE}{TWO}\n", ["1", "1 (record 2 on the line)"]),
    "two records and a blank": ("d.jsonl", f"\n  {ONE} \t{TWO}  \n", ["2", "2 (record 2 on the line)"]),
    "two lists": ("d.json", f"[\n{ONE}\n][\n{TWO}]\n", [2, 4]),
    "two long records": ("d.json", "\n".join(json.dumps(json.loads(r), indent=1) for r in (ONE, TWO)), [1, 5]),
    "semicolons": ("d.csv", "question;answer\n头痛;休息\n咳嗽;喝水\n", [2, 3]),
    "tabs": ("d.csv", "question\tanswer\n头痛\t休息\n咳嗽\t喝水\n", [2, 3]),
    "tsv": ("d.tsv", "question\tanswer\n头痛\t休息\n咳嗽\t喝水\n", [2, 3]),
    "bars": ("d.csv", "question|answer\n头痛|休息\n咳嗽|喝水\n", [2, 3]),
    "full-width commas": ("d.csv", "question，answer\n头痛，休息\n咳嗽，喝水\n", [2, 3]),
    "quoted semicolons": ("d.csv", '"question";"answer"\n"头痛";"休息"\n"咳嗽";"喝水"\n', [2, 3]),
    "separator named by Excel": ("d.csv", "sep=;\r\nquestion;answer\r\n头痛;休息\r\n咳嗽;喝水\r\n", [3, 4]),
    "commas beside semicolons": ("d.csv", 'question,answer,"a;b;c"\n头痛,休息,1;2\n咳嗽,喝水,"3;4"\n', [2, 3]),
}


@pytest.mark.parametrize(("name", "content", "lines"), READ.values(), ids=READ)
def test_what_is_plain_in_another_way_is_read_with_its_lines(name, content, lines):
    read = list(read_dialogues([write(name, content)]))
    assert [tuple(message["content"] for message in item.messages) for item in read] == TWO_DIALOGUES
    assert [item.source for item in read] == [f"{name}:{line}" for line in lines]


def test_a_book_with_old_line_ends_is_a_document_a_line():
    for name, content in (("book.txt", "甲\r\r乙\r"), ("book.txt.gz", gzip.compress("甲\r\r乙\r".encode()))):
        documents, _ = load_documents([write(name, content)])
        assert [(d.text, d.source) for d in documents] == [("甲", f"{name}:1"), ("乙", f"{name}:3")]
    # So it is in front of other lines, where most are such.
    documents, _ = load_documents([write("book.txt", "甲\r乙\r丙\r丁\n")])
    assert [(d.text, d.source) for d in documents] == [(c, f"book.txt:{n}") for n, c in enumerate("甲乙丙丁", 1)]
    # Where a line feed ends a line, a lone \r is a character of it.
    documents, _ = load_documents([write("book.txt", "甲\r乙\n丙\r\n")])
    assert [d.text for d in documents] == ["甲\r乙", "丙"]


def test_line_feeds_in_the_cells_of_an_old_table_stay():
    (dialogue,) = read_dialogues([write("d.csv", 'question,answer\r"头痛\n三天",休息\r')])
    assert dialogue.messages[0]["content"] == "头痛\n三天"


def test_a_second_mark_is_no_part_of_a_document():
    documents, _ = load_documents([write("book.txt", f"{BOM}甲\n{BOM}乙\n{BOM}\n")])
    assert [document.text for document in documents] == ["甲", "乙"]


@pytest.mark.parametrize("again", [HEADER, BOM + HEADER, "Question, Answer"])
def test_a_second_header_is_a_fault_by_its_line(again):
    content = f"{HEADER}\n{ROW_1}\n{again}\n{ROW_2}\n"
    first, bad, last = read_dialogues([write("d.csv", content)])
    assert isinstance(first, Dialogue) and isinstance(last, Dialogue)
    assert str(bad) == (
        "d.csv:3: second header: the column names stand here again, as in files that were joined; delete the line"
    )


@pytest.mark.parametrize(
    ("line", "detail"),
    [
        (f"{ONE} and more", "Extra data (column 36); write one whole record a line"),
        (f"{ONE},{TWO}", "Extra data (column 35); write one whole record a line"),
        (f'{ONE}{{"question', "Unterminated string starting at (column 36); write one whole record a line"),
    ],
)
def test_a_line_that_holds_more_than_records_is_one_fault(line, detail):
    first, bad, last = read_dialogues([write("d.jsonl", f"{ONE}\n{line}\n{TWO}\n")])
    assert isinstance(first, Dialogue) and isinstance(last, Dialogue)
    assert bad == BadRecord("d.jsonl:2", "broken JSON", detail)


@pytest.mark.parametrize("header", ["text", "a;b", "正文", '"正文;一"'])
def test_a_single_column_stays_one(header):
    (source_and_record,) = ForeignReader("dialogues").read_raw(write("d.csv", f"{header}\n头痛\n"))
    assert source_and_record == ("d.csv:2", {header.strip('"'): "头痛"})


@pytest.mark.parametrize("separator", [";", "\t", "|", "；"])
def test_columns_of_unknown_names_are_separated_too_and_the_tool_says_so(separator):
    reader = ForeignReader("dialogues")
    path = write("d.csv", separator.join(("提出", "应答")) + "\n" + separator.join(("头痛", '"休息,喝水"')) + "\n")
    assert list(reader.read_raw(path)) == [("d.csv:2", {"提出": "头痛", "应答": "休息,喝水"})]
    assert reader.describe() == [f"d.csv has its cells separated by {separator!r}"]


def test_a_row_of_other_length_names_the_separator():
    (bad,) = read_dialogues([write("d.csv", "question;answer\n头痛;休息;喝水\n")])
    assert bad.detail == "3, where the header has 2; quote cells that contain ';'"


def test_converters_read_utf16_without_its_mark():
    for encoding in ("utf-16le", "utf-16be", "utf-32"):
        path = write("d.jsonl", f"{ONE}\n{TWO}\n".encode(encoding))
        assert detect_encoding(path) == encoding
        assert [item.source for item in ForeignReader("dialogues").read([path])] == ["d.jsonl:1", "d.jsonl:2"]


def test_a_second_list_of_records_in_an_object_is_a_fault_by_its_line():
    text = json.dumps({"schema": {"fields": [{"name": "a"}]}, "train": [json.loads(ONE)], "test": [json.loads(TWO)]})
    train, test = read_dialogues([write("d.json", text.replace('"test"', '\n"test"'))])
    assert (train.source, test.source, test.reason) == ("d.json:1", "d.json:2", "second list")


def test_of_hundreds_of_keys_some_are_named():
    (bad,) = read_dialogues([write("d.json", json.dumps({str(n): {} for n in range(1000)}))])
    assert "'29' and 970 more; known are" in bad.detail


# ---------------------------------------------------------------- a key twice

TWICE = {
    "answer": ('{"question": "a", "answer": "b", "answer": "c"}', "'answer' stands 2 times in one object"),
    "the same value": ('{"question": "a", "answer": "b", "answer" : "b"}', "'answer' stands 2 times"),
    "content of a turn": (
        '{"messages": [{"role": "user", "content": "a", "content": "b"}, {"role": "assistant", "content": "c"}]}',
        "'content' stands 2 times",
    ),
    "three times": ('{"question": "a", "answer": "b", "answer": "c", "answer": "d"}', "'answer' stands 3 times"),
    "deep": ('{"question": "a", "answer": "b", "meta": [[{"k": {"x": 1, "x": 2}}]]}', "'x' stands 2 times"),
    "escaped": ('{"question": "a", "answer": "b", "\\u0061nswer": "c"}', "'answer' stands 2 times"),
    "messages": ('{"messages": [], "messages": []}', "'messages' stands 2 times"),
}


@pytest.mark.parametrize(("record", "detail"), TWICE.values(), ids=TWICE)
@pytest.mark.parametrize(
    ("name", "form"), [("d.jsonl", "{0}\n{1}\n{0}\n"), ("d.json", "[{0},\n{1},\n{0}]"), ("d.jsonl", "{0}\n{1}{0}")]
)
def test_a_key_twice_in_one_object_is_bad_data(name, form, record, detail):
    first, bad, last = read_dialogues([write(name, form.format(ONE, record))])
    assert isinstance(first, Dialogue) and isinstance(last, Dialogue)
    assert (bad.source, bad.reason) == (f"{name}:2", "key twice")
    assert bad.detail == f"{detail.partition(' in')[0]} in one object; keep one of them"


def test_a_key_twice_in_the_json_of_a_cell_is_bad_data():
    cell = '[{""from"": ""human"", ""value"": ""a"", ""value"": ""b""}, {""from"": ""gpt"", ""value"": ""c""}]'
    (bad,) = read_dialogues([write("d.csv", f'conversations\n"{cell}"\n')])
    assert (bad.source, bad.reason) == ("d.csv:2", "key twice")


# JSON as text, so that a key may stand twice in an object; strings and blanks that look like the end of a key.
_STRINGS = st.sampled_from(["a", "b", ":", '":', '\\":', " :", '{"a": 1, "a": 2}', "头痛", ""]).map(json.dumps)
_BLANKS = st.sampled_from(["", "", " ", "\t", "  "])
_JSON_TEXTS = st.recursive(
    st.one_of(_STRINGS, st.sampled_from(["1", "null", "1.5e3", "true"])),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3).map(lambda items: f"[{','.join(items)}]"),
        st.lists(st.tuples(_STRINGS, _BLANKS, _BLANKS, inner), max_size=3).map(
            lambda pairs: f"{{{','.join(f'{key}{before}:{after}{value}' for key, before, after, value in pairs)}}}"
        ),
    ),
    max_leaves=8,
)


@settings(max_examples=200, database=None, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(_JSON_TEXTS)
def test_a_key_twice_is_found_in_any_json(text):
    is_twice = []
    json.loads(text, object_pairs_hook=lambda pairs: is_twice.append(len(dict(pairs)) < len(pairs)))
    record = f'{{"question": {text}}}'
    path = Path("any.jsonl")
    path.write_text(record, encoding="utf-8")
    ((_, read),) = read_raw(path)
    assert (isinstance(read, Unusable) and read.reason == "key twice") == any(is_twice)
    assert any(is_twice) or read == json.loads(record)


def test_the_same_key_in_several_objects_is_none():
    record = '{"question": "\\"answer\\": \\"answer\\":", "answer": "b", "a": {"answer": 1}, "b": [{"answer": 2}]}'
    (dialogue,) = read_dialogues([write("d.jsonl", record)])
    assert dialogue.messages[0]["content"] == '"answer": "answer":'
