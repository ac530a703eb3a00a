"""Data sets in the hub's layout, from folders: read as their files are, by the stages and the data tools."""

import http.server
import json
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import check_data
import convert_data_format
import convert_to_pretrain_format
import generate_preference_data
import preprocess_data
import pyarrow
import pyarrow.parquet
import pytest
from stage_runs import PARTS, stage_flags, write_lines

from medtune.arguments import DataArguments, StageArgumentParser
from medtune.errors import UserError
from medtune.reading.finding import content_fingerprint
from medtune.reading.hub_data import load_splits, parse_name
from medtune.reading.parts import find_parts
from medtune.reading.readers import load_dialogues, read_dialogues, read_questions

ROOT = Path(__file__).resolve().parents[2]


def records(n_records: int, start: int = 0) -> list[dict]:
    return [
        {"question": f"第{n}个病人{PARTS[n % 8]}疼怎么办？", "answer": f"{PARTS[n % 8]}疼{n}天以上请就诊。"}
        for n in range(start, start + n_records)
    ]


@pytest.fixture
def data_set(in_tmp_path) -> str:
    """A folder in the hub's layout with the splits train, validation and test."""
    write_lines(Path("set/train.jsonl"), records(24))
    write_lines(Path("set/dev.jsonl"), records(4, start=30))
    write_lines(Path("set/test.jsonl"), records(2, start=40))
    return "set"


def write_configs() -> None:
    """Two configurations, as the head of a README.md on the hub names them."""
    heads = []
    for config in ("zh", "en"):
        write_lines(Path(f"configs/{config}/train.jsonl"), [{"question": f"{config}?", "answer": "a"}])
        heads.append(f"- config_name: {config}\n  data_files: {config}/train.jsonl\n")
    Path("configs/README.md").write_text(f"---\nconfigs:\n{''.join(heads)}---\n", encoding="utf-8")


# ---------------------------------------------------------------- names, configurations, splits


@pytest.mark.parametrize(
    ("dataset_name", "parsed"),
    [
        ("owner/name", ("owner/name", "", "train")),
        ("owner/name:zh", ("owner/name", "zh", "train")),
        ("owner/name::test", ("owner/name", "", "test")),
        ("owner/name:zh:train[:10%]", ("owner/name", "zh", "train[:10%]")),
    ],
)
def test_name_configuration_and_split(dataset_name, parsed):
    assert parse_name(dataset_name) == parsed


def test_a_split_is_read_with_its_rows_named(data_set):
    split, validation = load_splits(data_set, "cache")
    dialogues, report = load_dialogues([split])
    assert [dialogue.messages[0]["content"] for dialogue in dialogues] == [r["question"] for r in records(24)]
    assert (dialogues[0].source, dialogues[23].source) == ("set:train:row 1", "set:train:row 24")
    assert report.summary() == "kept 24 of 24"
    assert (split.others, validation.name, len(validation.rows)) == (("test",), "set:validation", 4)
    assert Path("cache/datasets").is_dir()


def test_a_slice_of_a_split_and_a_split_that_evaluates(data_set):
    split, validation = load_splits(f"{data_set}::train[10:12]", "cache")
    assert [dialogue.source for dialogue in load_dialogues([split])[0]] == [
        "set:train[10:12]:row 1",
        "set:train[10:12]:row 2",
    ]
    assert validation.name == "set:validation"
    assert load_splits(f"{data_set}::validation", "cache")[1] is None
    assert load_splits(f"{data_set}::train+validation", "cache")[1] is None


def test_a_configuration_is_named(in_tmp_path):
    write_configs()
    split, validation = load_splits("configs:en", "cache")
    assert (load_dialogues([split])[0][0].source, validation) == ("configs:en:train:row 1", None)


@pytest.mark.parametrize(
    ("dataset_name", "message"),
    [
        ("set:zh", "name one of its configurations: set:default; a split stands behind a second colon"),
        ("set::dev", "it has no split 'dev'; give set::train or set::validation or set::test"),
        ("configs", "name one of its configurations: configs:zh or configs:en; a split stands behind"),
        ("configs:fr", "name one of its configurations: configs:zh or configs:en; a split stands"),
        ("set::train+val", "it has no split 'val'; give set::train or set::validation or set::test"),
        ("set::train[x", "no part of a split that `datasets` knows, or an empty one; a slice is such as train[:1000]"),
        ("set::train[:0]", "no part of a split that `datasets` knows, or an empty one; a slice is such as"),
        ("json", "neither a folder here nor the name of a data set, OWNER/NAME"),
        ("no/such/folder", "neither a folder here nor the name of a data set, OWNER/NAME"),
        ("", "neither a folder here nor the name of a data set, OWNER/NAME"),
        ("script", "a script of its own makes its rows, which is not run; download its files"),
        ("nothing", "there are no data files in it that `datasets` knows"),
        ("broken", "broken/train.jsonl:2: broken JSON: Expecting ',' delimiter (column 17); write one whole record a"),
        (
            "list",
            "list/train.json:3: broken JSON: Expecting ',' or ']' (column 1); fix it, the rest of the file cannot",
        ),
        ("arrow", "cannot be prepared (ArrowInvalid: "),
        ("no_bytes", "there is no row in its files; download or copy them again"),
        ("no_rows", "there is no row in its files; download or copy them again"),
        ("set_without_dev::validation", "it has no row in the split 'validation'; give set_without_dev::train"),
        ("set::train[:200%]", "no part of a split that `datasets` knows, or an empty one; a slice is such as"),
        ("head", "cannot be prepared (ParserError: while parsing a flow sequence"),
        ("types", "cannot be prepared (ValueError: Feature type 'Nosuch' not found"),
        ("unpacked", "cannot be prepared (error: Error -3 while decompressing data"),
        ("zipped", "cannot be prepared (BadZipFile: File is not a zip file"),
        ("owner/name", "no folder of that name here, and https://huggingface.co cannot be reached: check the network"),
    ],
)
def test_what_is_wrong_is_one_line(data_set, capfd, dataset_name, message):
    write_configs()
    for path, content in {
        "no_bytes/train.jsonl": b"",
        "no_rows/train.csv": b"question,answer\n",
        "set_without_dev/train.jsonl": b'{"question": "q", "answer": "a"}\n',
        "set_without_dev/dev.jsonl": b"\n",
        "head/README.md": b"---\nconfigs: [one\n---\n",
        "types/README.md": b"---\ndataset_info:\n  features:\n  - name: question\n    dtype: nosuch\n---\n",
        "unpacked/train.jsonl.gz": b"\x1f\x8b\x08 and no more",
        "zipped/train.zip": b"PK\x03\x04 and no more",
    }.items():
        Path(path).parent.mkdir(exist_ok=True)
        Path(path).write_bytes(content)
    write_lines(Path("script/train.jsonl"), records(1))
    Path("script/script.py").touch()
    write_lines(Path("nothing/.hidden"), [])
    Path("nothing/notes.md").touch()
    write_lines(Path("broken/train.jsonl"), records(1))
    with Path("broken/train.jsonl").open("a") as file:
        file.write('{"question": "q"\n')
    write_lines(Path("list/train.json"), [])
    Path("list/train.json").write_text('[\n{"question": "q"}\n{"question": "p"}]')
    write_lines(Path("arrow/train.arrow"), [])
    Path("arrow/train.arrow").write_bytes(b"a format that only `datasets` reads")
    with pytest.raises(UserError) as refused:
        load_splits(dataset_name, "cache")
    assert str(refused.value).startswith(f"--dataset_name {dataset_name}: {message}")
    assert "\n" not in str(refused.value) + capfd.readouterr().err.rstrip("\n")


def test_files_that_are_in_no_split_are_named(data_set):
    write_lines(Path("set/more/hospital.jsonl"), records(2, start=50))
    assert load_splits(data_set, "cache")[0].others == ("test", "more/hospital.jsonl")


def test_an_empty_split_evaluates_nothing(in_tmp_path):
    write_lines(Path("set/train.jsonl"), records(3))
    Path("set/validation.jsonl").write_text("\n")
    split, validation = load_splits("set", "cache")
    assert (split.name, len(split.rows), validation) == ("set:train", 3, None)


# ---------------------------------------------------------------- every form that is read of files


FORMS = {
    "sharegpt": {"conversations": [{"from": "human", "value": "头疼怎么办？"}, {"from": "gpt", "value": "请就诊。"}]},
    "messages": {"messages": [{"role": "user", "content": "头疼？"}, {"role": "assistant", "content": "请就诊。"}]},
    "alpaca": {"instruction": "头疼怎么办？", "input": "", "output": "请就诊。"},
    "history": {"question": "然后呢？", "answer": "请就诊。", "history": [["头疼怎么办？", "休息。"]]},
    "weight": {
        "messages": [
            {"role": "user", "content": "头疼？"},
            {"role": "assistant", "content": "不用管。", "weight": 0},
            {"role": "user", "content": "真的？"},
            {"role": "assistant", "content": "请就诊。"},
        ]
    },
    "tools": {
        "messages": [
            {"role": "user", "content": "我的检查结果？"},
            {
                "role": "assistant",
                "content": "",
                "tool_calls": [{"name": "results", "arguments": {"of": ["血", "尿"]}}],
            },
            {"role": "tool", "content": "正常"},
            {"role": "assistant", "content": "正常。"},
        ],
        "tools": [{"type": "function", "function": {"name": "results", "parameters": {"type": "object"}}}],
    },
    "cmb": {"question": "头疼看哪科？", "option": {"A": "神经内科", "B": "骨科"}, "answer": "A"},
    "medmcqa": {"question": "q?", "opa": "a", "opb": "b", "opc": "c", "opd": "d", "cop": 0},
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_each_form_is_read_as_from_files(in_tmp_path, form, ending):
    rows = [FORMS[form] | {"id": str(number)} for number in (1, 2)]
    path = write_lines(Path("set/train.jsonl"), rows)
    plain = list(read_questions([path]))
    if ending == "parquet":
        path.unlink()
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), "set/train-00000-of-00001.parquet")
    of_split = list(read_questions([load_splits("set", "cache")[0]]))
    assert [question.source for question in of_split] == ["set:train:row 1", "set:train:row 2"]
    for question, same in zip(of_split, plain, strict=True):
        assert (question.messages, question.tools, question.exam) == (same.messages, same.tools, same.exam)


def test_keys_that_some_rows_have_are_absent_in_the_others(in_tmp_path):
    """A table gives every object the keys of all, null where a row has none."""
    by_name = {"type": "object", "properties": {"name": {"type": "string"}}}
    other_tool = {"type": "function", "function": {"name": "look_up", "parameters": by_name}}
    for rows in (
        [FORMS["tools"], FORMS["tools"] | {"tools": [other_tool]}],
        [FORMS["cmb"], FORMS["cmb"] | {"option": {"A": "a", "B": "b", "C": "c"}}],
        [FORMS["messages"], FORMS["weight"], FORMS["history"]],
    ):
        path = write_lines(Path("set/train.jsonl"), rows)
        plain, of_split = (list(read_questions([file])) for file in (path, load_splits("set", "cache")[0]))
        assert len(of_split) == len(rows)
        for question, same in zip(of_split, plain, strict=True):
            assert (question.messages, question.tools) == (same.messages, same.tools)


def test_a_mixed_column_keeps_its_values(in_tmp_path):
    """Which `datasets` holds as JSON."""
    mixed = [{"question": "q1", "answer": "a", "extra": 1}, {"question": "q2", "answer": "b", "extra": {"x": ["y"]}}]
    write_lines(Path("set/train.jsonl"), mixed)
    assert [record for _, record in load_splits("set", "cache")[0].records()] == mixed


def test_a_fault_is_named_by_its_row(in_tmp_path):
    write_lines(Path("set/train.jsonl"), [*records(2), {"question": "没有回答的问题？", "answer": ""}])
    (fault,) = [result for result in read_dialogues([load_splits("set", "cache")[0]]) if hasattr(result, "reason")]
    assert str(fault).startswith("set:train:row 3: ")


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_a_row_that_is_not_utf_8_is_a_fault_of_its_own(in_tmp_path, ending):
    path = write_lines(Path("set/train.jsonl"), records(3))
    spoilt = path.read_bytes().replace("第1个".encode(), "第1个".encode("gb18030"))
    path.write_bytes(spoilt)
    if ending == "parquet":
        rows = [json.loads(line) for line in spoilt.decode(errors="surrogateescape").splitlines()]
        texts = [pyarrow.array([row[key].encode(errors="surrogateescape") for row in rows]) for key in rows[0]]
        table = pyarrow.table({key: text.view(pyarrow.string()) for key, text in zip(rows[0], texts, strict=True)})
        path.unlink()
        path = Path("set/train.parquet")
        pyarrow.parquet.write_table(table, path)
    for file, where in ((load_splits("set", "cache")[0], "set:train:row 2: not UTF-8"), (path, "not UTF-8")):
        report = load_dialogues([file], on_bad_data="drop")[1]
        assert report.summary().startswith("kept 2 of 3")
        (fault,) = [result for result in read_dialogues([file]) if hasattr(result, "reason")]
        assert where in str(fault)


# ---------------------------------------------------------------- training and evaluation data, the cache's key


def parts_of(do_eval: bool = True, **flags: str) -> tuple[dict[str, list[str]], bool]:
    listings, held_out = find_parts(DataArguments(**flags), do_eval, "dialogues", (".jsonl",), "cache")
    return {part: [file.name for file in listing.files] for part, listing in listings.items()}, held_out


def test_the_validation_split_evaluates_or_a_part_is_held_out(data_set):
    write_lines(Path("alone/train.jsonl"), records(20))
    write_lines(Path("files/f.jsonl"), records(2))
    assert parts_of(dataset_name="set") == ({"train": ["set:train"], "eval": ["set:validation"]}, False)
    assert parts_of(dataset_name="set", do_eval=False) == ({"train": ["set:train"]}, False)
    assert parts_of(dataset_name="alone") == ({"train": ["alone:train"], "eval": ["alone:train"]}, True)
    named = parts_of(dataset_name="set", validation_file_dir="files")
    assert named == ({"train": ["set:train"], "eval": ["f.jsonl"]}, False)
    with pytest.raises(UserError, match=r"^--validation_file_dir set/dev.jsonl: lies in the folder of --dataset_name"):
        parts_of(dataset_name="set", validation_file_dir="set/dev.jsonl")


def test_the_key_of_the_cache_is_of_content_and_split(data_set):
    def key(dataset_name: str) -> str:
        return content_fingerprint([load_splits(dataset_name, "cache")[0]])

    keys = [key(name) for name in ("set", "set::test", "set::train[:2]", "set")]
    assert keys[0] == keys[3]
    write_lines(Path("set/train.jsonl"), records(24, start=1))
    assert len({*keys, key("set")}) == 4


def test_a_data_set_is_streamed(in_tmp_path, tiny_tokenizer):
    import pretraining
    from medtune.reading.encoders import DocumentEncoder

    write_lines(Path("set/train.jsonl"), [{"text": f"{number} 感冒了多喝水。"} for number in range(20)])
    training_args = SimpleNamespace(max_steps=1, do_eval=False, seed=42, accelerator_config=SimpleNamespace())
    data_args = DataArguments(dataset_name="set")
    data = pretraining.stream_data(DocumentEncoder(tiny_tokenizer, 16, False), data_args, training_args, "cache")
    assert data.facts == {"train split": "set:train, streamed"}
    assert all(source.startswith("set:train:row ") for source in next(iter(data.train))["source"])
    training_args.do_eval = True
    with pytest.raises(UserError, match=r"^--streaming True: no part of the training files is held out"):
        pretraining.stream_data(DocumentEncoder(tiny_tokenizer, 16, False), data_args, training_args, "cache")


def test_training_questions_of_an_evaluation(data_set):
    from evaluate_model import overlap

    asked = [*(record["question"] for record in records(2)), "别的问题，谁也没有问过？"]
    tests = [{"messages": [{"role": "user", "content": question}]} for question in asked]
    found = overlap(tests, {"set": True, "owner/gone": True, "gone": False}, "cache")
    assert (found["not found"], found["test questions"]) == (["owner/gone", "gone"], 3)
    assert found["in training, the same"] == 2


# ---------------------------------------------------------------- flags: the later one counts


def data_flags(*argv: str) -> tuple[tuple, list[str]]:
    parser = StageArgumentParser([DataArguments])
    (data_args,) = parser.parse(argv)
    return (data_args.dataset_name, data_args.train_file_dir, data_args.validation_file_dir), parser.notes


def test_of_both_flags_the_later_one_counts():
    of_launcher = ("--train_file_dir", "data", "--validation_file_dir", "data")
    assert data_flags(*of_launcher, "--dataset_name", "owner/name") == (
        ("owner/name", None, None),
        [f"{flag} data: --dataset_name comes later and counts" for flag in of_launcher[::2]],
    )
    others = ("--train_file_dir", "data", "--validation_file_dir", "others")
    assert data_flags(*others, "--dataset_name", "owner/name")[0] == ("owner/name", None, "others")
    assert data_flags("--dataset_name", "owner/name", *of_launcher) == (
        (None, "data", "data"),
        ["--dataset_name owner/name: --train_file_dir comes later and counts"],
    )
    assert data_flags("--validation_file_dir", "v", "--dataset_name", "o/n") == (("o/n", None, "v"), [])


# ---------------------------------------------------------------- the stages and the tools


def test_a_stage_trains_on_a_data_set(data_set, tmp_path, tiny_model_dir, capfd):
    import supervised_finetuning

    flags = stage_flags("sft", tiny_model_dir, tmp_path, do_eval=True, max_steps=1)
    supervised_finetuning.main([*flags, "--dataset_name", data_set])
    log = capfd.readouterr().err
    assert "train split set:train, 24 rows; not read: test" in " ".join(log.split())
    assert "eval dialogues kept 4 of 4" in " ".join(log.split())
    assert f"--train_file_dir {tmp_path / 'data-sft'}: --dataset_name comes later and counts" in log
    lineage = json.loads((tmp_path / "out/checkpoint-best/lineage.json").read_text(encoding="utf-8"))
    assert (lineage["data"], lineage["flags"]["--dataset_name"]) == ("set", "set")


def test_the_check_reads_the_splits_that_a_stage_would(data_set, capsys):
    write_lines(Path("set/dev.jsonl"), [*records(1), *records(3, start=30)])
    with pytest.raises(SystemExit):
        check_data.main(["--dataset_name", data_set])
    printed = capsys.readouterr().out
    assert "set:train: dialogues\n" in printed
    assert "\nnot read: test\n" in printed
    assert "the same question in both: 1 (4.2%): set:train:row 1 asks the same as set:validation:row 1" in printed


def test_the_tools_take_a_data_set(data_set, capsys):
    preprocess_data.main(["--dataset_name", data_set, "--output_dir", "clean"])
    assert 20 < len(load_dialogues([Path("clean/train/dialogues.jsonl")])[0]) < 24  # the rest validates
    convert_data_format.main(["--dataset_name", f"{data_set}::test", "--output", "o.jsonl", "--format", "sft"])
    assert len(load_dialogues([Path("o.jsonl")])[0]) == 2
    convert_to_pretrain_format.main(["--dataset_name", f"{data_set}::test", "--output_file", "o.txt"])
    assert Path("o.txt").read_text(encoding="utf-8").startswith("第40个病人")
    generate_preference_data.main(
        ["--dataset_name", data_set, "--output_file", "pairs.jsonl", "--num_samples", "5", "--cache_dir", "cache"]
    )
    assert len(Path("pairs.jsonl").read_text(encoding="utf-8").splitlines()) == 5
    assert capsys.readouterr().out.count("\nnot read: t") == 4


@pytest.mark.parametrize("argv", [[], ["--dir", "d", "--dataset_name", "o/n"]])
def test_a_tool_is_given_files_or_a_data_set(argv, capsys):
    with pytest.raises(SystemExit):
        check_data.main(argv)
    assert "--dataset_name" in capsys.readouterr().err


# ---------------------------------------------------------------- a mirror


SHA = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def mirror():
    """A hub on this machine with one data set, owner/name; the paths that it was asked for."""
    content = "".join(json.dumps(record) + "\n" for record in records(3)).encode()
    file = {"type": "file", "path": "train.jsonl", "oid": "1" * 40, "size": len(content)}
    answers = {
        f"/api/datasets/owner/name/tree/{SHA}": json.dumps([file]).encode(),
        f"/api/datasets/owner/name/paths-info/{SHA}": json.dumps([file]).encode(),
        f"/datasets/owner/name/resolve/{SHA}/train.jsonl": content,
    }
    info = {"id": "owner/name", "sha": SHA, "siblings": [{"rfilename": "train.jsonl"}]}
    asked = []

    class Answer(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            path = self.path.partition("?")[0].rstrip("/")
            asked.append(path)
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            body = answers.get(path)
            if body is None and path.startswith("/api/datasets/owner/name") and "/tree/" not in path:
                body = json.dumps(info).encode()
            self.send_response(200 if body is not None else 404)
            if body is None:
                self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("X-Repo-Commit", SHA)
            self.send_header("ETag", '"1"')
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body or b"")))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body or b"")

        do_HEAD = do_POST = do_GET  # noqa: N815

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", asked
        server.shutdown()


@pytest.mark.slow
def test_a_mirror_is_asked_once_and_then_the_cache_is_read(mirror, tmp_path, monkeypatch):
    """In processes of their own, since HF_ENDPOINT is read at the start."""
    endpoint, asked = mirror
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    command = [sys.executable, ROOT / "scripts/convert_data_format.py", "--dataset_name", "owner/name"]

    def convert(output: str, endpoint: str) -> str:
        monkeypatch.setenv("HF_ENDPOINT", endpoint)
        flags = ["--output", tmp_path / output, "--format", "sft"]
        finished = subprocess.run([*command, *flags], capture_output=True, text=True, check=False)
        assert finished.returncode == 0, finished.stderr
        return finished.stdout.splitlines()[0]

    assert convert("a.jsonl", endpoint) == f"{tmp_path / 'a.jsonl'}: kept 3 of 3"
    assert f"/datasets/owner/name/resolve/{SHA}/train.jsonl" in asked
    assert convert("b.jsonl", "http://127.0.0.1:9") == f"{tmp_path / 'b.jsonl'}: kept 3 of 3"
