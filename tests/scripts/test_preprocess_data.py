"""Preprocessing as its users start it: what is cleaned, kept, split and written, and what a stage makes of it."""

import gzip
import json
import random
import subprocess
import sys
from pathlib import Path

import preprocess_data
import pytest
from random_records import HAN, dialogue, random_dialogues, random_text
from stage_runs import words

import supervised_finetuning
from medtune.errors import UserError
from medtune.reading.readers import load_dialogues, load_documents, load_records, read_pairs
from medtune.reading.records import Dialogue, Document, Pair
from medtune.reading.words import question_of, words_of

ROOT = Path(__file__).resolve().parents[2]


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def files_below(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def preprocess(tmp_path, capsys):
    """Runs the tool on tmp_path/in into tmp_path/out; returns what it printed and the report."""

    def run(*flags, input_dir: Path | None = None, **values) -> tuple[str, dict]:
        places = {"input_dir": input_dir or tmp_path / "in", "output_dir": tmp_path / "out"}
        preprocess_data.main([*words(places | values), *flags])
        report = json.loads((tmp_path / "out.report.json").read_text(encoding="utf-8"))
        return capsys.readouterr().out, report

    return run


# ---------------------------------------------------------------- what is kept


def test_masking_is_asked_for(preprocess, write_jsonl, tmp_path):
    records = random_dialogues(10)
    records[3]["conversations"][0]["value"] += "，电话13812345678，邮箱a@b.com"
    write_jsonl("in/a.jsonl", records)
    _, report = preprocess()
    assert report["masked"] == {}
    assert "13812345678" in "".join(path.read_text() for path in tmp_path.glob("out/*/*.jsonl"))
    out, report = preprocess("--mask_personal_data", "--overwrite")
    assert report["masked"] == {"mobile numbers": 1, "e-mail addresses": 1}
    assert "masked: mobile numbers 1, e-mail addresses 1" in out
    written = "".join(path.read_text() for path in tmp_path.glob("out/*/*.jsonl"))
    assert "13812345678" not in written
    assert "，电话[手机号]，邮箱[邮箱]" in written


def test_drops_are_counted_by_reason_with_file_and_line(preprocess, write_jsonl, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rng = random.Random(0)
    question, answer = random_text(rng, 20), random_text(rng, 100)
    path = write_jsonl(
        "in/a.jsonl",
        [
            dialogue(question, answer),
            dialogue("<b>" + question + "</b>", answer),  # the same, once it is clean
            dialogue(question, answer[:50] + "嗯" + answer[51:]),
            dialogue("感冒", "&nbsp;<br>"),
            {"instruction": random_text(rng, 9), "output": random_text(rng, 30)},
            dialogue(random_text(rng, 9), random_text(rng, 30)),
            dialogue("没有回答"),
        ],
    )
    with path.open("a") as file:
        file.write("{broken\n")
    out, report = preprocess(near_duplicate_threshold=0.8, validation_size=1)
    assert report["read"] == 8
    assert report["kept"] == 3
    assert report["dropped"] == {
        "duplicate": 1,
        "near duplicate": 1,
        "empty after cleaning": 1,
        "no reply": 1,
        "broken JSON": 1,
    }
    assert report["examples"]["duplicate"] == ["in/a.jsonl:2: the same as in/a.jsonl:1"]
    (near,) = report["examples"]["near duplicate"]
    assert near.startswith("in/a.jsonl:3: ")
    assert near.endswith("% like in/a.jsonl:1")
    assert report["examples"]["empty after cleaning"] == ["in/a.jsonl:4: turn 2 (assistant) was '&nbsp;<br>'"]
    assert report["cleaned"] == {"HTML remains": 1}
    assert "kept 3 of 8 (" in out
    assert "1 dropped, broken JSON: in/a.jsonl:8: " in out
    assert report["parts"] == {"train": 2, "validation": 1}


def test_near_duplicates_are_told_by_the_threshold_and_not_by_a_shared_system_prompt(preprocess, write_jsonl):
    rng = random.Random(0)
    (record,), prompt = random_dialogues(1), random_text(rng, 500)
    others = [dialogue(random_text(rng, 10), random_text(rng, 20), system=prompt) for _ in range(20)]
    marked = json.loads(json.dumps(record))
    marked["conversations"][1]["value"] += "！"
    write_jsonl("in/a.jsonl", [record, marked, record, *others])
    assert preprocess(near_duplicate_threshold=1)[1]["dropped"] == {"duplicate": 1}
    assert preprocess("--overwrite")[1]["dropped"] == {"duplicate": 1, "near duplicate": 1}


def test_order_and_turns_stay(preprocess, write_jsonl, tmp_path):
    records = random_dialogues(30)
    records[0] |= {"system": "你是医生。"}
    records[1] = dialogue(*[turn["value"] for turn in records[1]["conversations"]], "谢谢，还有别的吗？", "没有。")
    records[2] = {
        "tools": [{"name": "find"}],
        "conversations": [
            {"from": "human", "value": "血压多少算高？帮我查一查"},
            {"from": "function_call", "value": '[{"name": "find", "arguments": {"what": "血压"}}]'},
            {"from": "observation", "value": "140/90"},
            {"from": "gpt", "value": "超过140/90。"},
        ],
    }
    source = write_jsonl("in/a.jsonl", records)
    preprocess(validation_size=0)
    given, _ = load_dialogues([source])
    written, _ = load_dialogues([tmp_path / "out/train/dialogues.jsonl"])
    assert [(d.messages, d.tools) for d in written] == [(d.messages, d.tools) for d in given]


def test_short_records_are_left_out_by_flag(preprocess, write_jsonl):
    write_jsonl("in/a.jsonl", [*random_dialogues(5), dialogue("你好", "好")])
    _, report = preprocess(min_length=10)
    assert report["dropped"] == {"too short": 1}
    assert report["examples"]["too short"][0].endswith("a.jsonl:6: 4 characters, under --min_length 10")


# ---------------------------------------------------------------- kinds and files


def test_pairs(preprocess, write_jsonl, tmp_path):
    rng = random.Random(0)
    records = [
        {"question": random_text(rng, 20), "good_answer": random_text(rng, 50), "bad_answer": random_text(rng, 40)}
        for _ in range(19)
    ]
    records.append({"question": "感冒", "response_chosen": "休息。", "response_rejected": "休息。。", "margin": 1})
    records.append(
        {
            "system": "医生",
            "history": [["发热", "多少度"]],
            "question": "39<br>度",
            "chosen": "就医",
            "rejected": "不管",
            "margin": 2,
        }
    )
    write_jsonl("in/a.jsonl", records)
    out, report = preprocess(validation_size=2)
    assert report["kind"] == "pairs"
    assert report["dropped"] == {"same replies after cleaning": 1}
    assert "next: python dpo_training.py" in out
    train, _ = load_records(read_pairs, [tmp_path / "out/train/pairs.jsonl"])
    held_out, _ = load_records(read_pairs, [tmp_path / "out/validation/pairs.jsonl"])
    assert (len(train), len(held_out)) == (18, 2)
    (last,) = [line for path in tmp_path.glob("out/*/*.jsonl") for line in read_lines(path) if line["system"]]
    assert last == {
        "system": "医生",
        "history": [["发热", "多少度"]],
        "question": "39\n度",
        "response_chosen": "就医",
        "response_rejected": "不管",
        "margin": 2.0,
    }


def test_text_lines_stay_lines(preprocess, tmp_path):
    rng = random.Random(0)
    texts = [random_text(rng, 50) for _ in range(20)]
    folder = tmp_path / "in/deep"
    folder.mkdir(parents=True)
    (folder / "a.txt").write_text("\n".join([*texts[:10], "", "<p>一</p><p>二</p>\x0c三"]), encoding="utf-8")
    (folder / "b.txt.gz").write_bytes(gzip.compress("\n".join(texts[10:]).encode()))
    out, report = preprocess(validation_size=3)
    assert (report["kind"], report["files"], report["kept"]) == ("documents", 2, 21)
    train, _ = load_documents([tmp_path / "out/train/documents.txt"])
    held_out, _ = load_documents([tmp_path / "out/validation/documents.txt"])
    assert {d.text for d in [*train, *held_out]} == {*texts, "一 二 三"}
    assert "next: python pretraining.py" in out


def test_documents_with_line_breaks_stay_records(preprocess, write_jsonl, tmp_path):
    write_jsonl("in/a.jsonl", [{"text": f"第{n}章\n感冒\n{'休息' * n}"} for n in range(1, 6)])
    preprocess(validation_size=0)
    documents, _ = load_documents([tmp_path / "out/train/documents.jsonl"])
    assert documents[0].text == "第1章\n感冒\n休息"


def test_exactly_these_files_are_left(preprocess, write_jsonl, tmp_path):
    write_jsonl("in/a.jsonl", random_dialogues(20))
    (tmp_path / "in/notes.md").write_text("notes")
    out, report = preprocess()
    assert files_below(tmp_path) - {"in/a.jsonl", "in/notes.md"} == {
        "out.report.json",
        "out/.made_by_a_tool",
        "out/lengths.png",
        "out/train/dialogues.jsonl",
        "out/validation/dialogues.jsonl",
    }
    assert (tmp_path / "out/lengths.png").read_bytes().startswith(b"\x89PNG")
    assert report["characters a record"] == dict.fromkeys(
        ["shortest", "median", "95 % at most", "99 % at most", "longest"], 81
    )
    assert report["parts"] == {"train": 18, "validation": 2}
    assert f"not read, by their endings: {tmp_path}/in/notes.md" in out
    load_dialogues([tmp_path / "out/train/dialogues.jsonl"])


# ---------------------------------------------------------------- the split


def trigrams_in_common(one: str, other: str) -> float:
    one, other = ({text[i : i + 3] for i in range(len(text) - 2)} for text in (one, other))
    return len(one & other) / len(one | other)


def questions(path: Path) -> list[str]:
    return [line["conversations"][0]["value"] for line in read_lines(path)]


def test_no_question_is_nearly_on_both_sides(preprocess, write_jsonl, tmp_path):
    rng = random.Random(0)
    records = []
    for _ in range(60):
        question = random_text(rng, 40)
        for number in range(rng.randint(1, 6)):
            position = rng.randrange(40)
            near = question[:position] + rng.choice(HAN) + question[position + 1 :]
            asked = near if number % 2 else f"{question}？"
            records.append(dialogue(asked, random_text(rng, 80)))
    rng.shuffle(records)
    write_jsonl("in/a.jsonl", records)
    preprocess(validation_size=40)
    train, held_out = (questions(tmp_path / f"out/{part}/dialogues.jsonl") for part in ("train", "validation"))
    assert len(train) + len(held_out) == len(records)
    assert 30 <= len(held_out) <= 40
    assert max(trigrams_in_common(one, other) for one in train for other in held_out) < 0.6
    assert len(set(held_out)) > 5


def test_a_greeting_is_no_question(preprocess, write_jsonl):
    rng = random.Random(0)
    records = [dialogue("你好", "你好，请讲。", random_text(rng, 30), random_text(rng, 60)) for _ in range(40)]
    write_jsonl("in/a.jsonl", records)
    assert preprocess()[1]["parts"] == {"train": 36, "validation": 4}


def test_the_seed_chooses_and_the_order_of_the_files_does_not(preprocess, write_jsonl, tmp_path):
    records = random_dialogues(40)
    chosen = []
    for order, seed in ((records, 42), (records[::-1], 42), (records, 7)):
        write_jsonl("in/a.jsonl", order)
        preprocess("--overwrite", validation_size=0.2, seed=seed)
        chosen.append(set(questions(tmp_path / "out/validation/dialogues.jsonl")))
    assert len(chosen[0]) == 8
    assert chosen[0] == chosen[1] != chosen[2]


@pytest.mark.parametrize(("flag", "sizes"), [(0, {"train": 30}), (5, {"train": 25, "validation": 5})])
def test_as_many_as_asked_for_are_held_out(preprocess, write_jsonl, flag, sizes):
    write_jsonl("in/a.jsonl", random_dialogues(30))
    assert preprocess(validation_size=flag)[1]["parts"] == sizes


# ---------------------------------------------------------------- tokens and the stage's cache


def start_the_stage(printed: str, tmp_path: Path) -> None:
    """By the command that the tool prints."""
    command = printed[printed.index("next: python supervised_finetuning.py ") :].split()[3:]
    assert command.pop() == "..."
    places = {"output_dir": tmp_path / "trained", "max_steps": 1, "save_strategy": "no"}
    supervised_finetuning.main([*command, *words(places)])


@pytest.mark.parametrize("validation_size", [4, 0])
def test_the_stage_finds_its_data_in_the_cache(
    preprocess, write_jsonl, tmp_path, tiny_model_dir, capsys, validation_size
):
    write_jsonl(
        "in/a.jsonl",
        [*random_dialogues(24), dialogue("长", random_text(random.Random(9), 200)), dialogue("a", "b<|im_end|>c")],
    )
    settings = {"template_name": "qwen", "model_max_length": 400, "cache_dir": tmp_path / "cache"}
    out, report = preprocess(tokenizer=tiny_model_dir, validation_size=validation_size, **settings)
    n_train = 20 if validation_size else 22
    assert report["dropped"] == {"too long": 1, "control token": 1}
    assert "over --model_max_length 400" in report["examples"]["too long"][0]
    assert report["tokens a record"]["longest"] <= 400
    assert f"train: {n_train} dialogues, " in out
    assert out.count("tokenized into the cache") == 2

    start_the_stage(out, tmp_path)
    log = capsys.readouterr().err
    assert log.count(", from the cache") == 2
    assert f"kept {n_train} of {n_train}" in log

    out, _ = preprocess("--overwrite", tokenizer=tiny_model_dir, validation_size=validation_size, **settings)
    assert out.count("in the cache already") == 2


def test_the_stage_s_other_settings_count(preprocess, write_jsonl, tmp_path, tiny_model_dir, capsys):
    rng = random.Random(0)
    long = [dialogue(random_text(rng, 200), random_text(rng, 20)) for _ in range(3)]
    write_jsonl("in/a.jsonl", [*random_dialogues(21), *long])
    settings = {
        "template_name": "qwen",
        "model_max_length": 400,
        "truncation": "cut_prompt_start",
        "train_on_inputs": True,
        "max_train_samples": 18,
        "max_eval_samples": 2,
        "seed": 7,
        "cache_dir": tmp_path / "cache",
    }
    out, report = preprocess(tokenizer=tiny_model_dir, validation_size=3, **settings)
    assert report["dropped"] == {}
    assert "train: 18 dialogues, " in out
    assert "eval: 2 dialogues, " in out
    flags = out[out.index("next: ") :].split()[3:-1]
    assert dict(zip(flags[::2], flags[1::2], strict=False))["--truncation"] == "cut_prompt_start"
    start_the_stage(out, tmp_path)
    assert capsys.readouterr().err.count(", from the cache") == 2


def test_pairs_and_documents_are_measured_in_tokens(preprocess, write_jsonl, tmp_path, tiny_model_dir):
    rng = random.Random(0)
    records = [
        {"question": random_text(rng, 9), "response_chosen": "好的", "response_rejected": random_text(rng, 9)}
        for _ in range(10)
    ]
    records.append({"question": "长", "response_chosen": "好", "response_rejected": random_text(rng, 60)})
    records.append({"question": random_text(rng, 200), "response_chosen": "好", "response_rejected": "不好"})
    write_jsonl("in/a.jsonl", records)
    flags = {"tokenizer": tiny_model_dir, "template_name": "qwen"}
    out, report = preprocess(**flags, max_source_length=200, max_target_length=100, model_max_length=9)
    assert report["dropped"] == {"too long": 2}
    reply, prompt = report["examples"]["too long"]
    assert reply.endswith(" tokens, over --max_target_length 100")
    assert prompt.endswith(" tokens, over --max_source_length 200")
    assert "--model_max_length 9: limits dialogues, and these are pairs" in out
    assert "no cache: " in out
    assert "next: python dpo_training.py --model_name_or_path" in out
    assert "--max_source_length 200 --max_target_length 100" in out
    assert not (tmp_path / "cache").exists()

    write_jsonl("in/a.jsonl", [{"text": random_text(rng, 300)} for _ in range(5)] + [{"text": "<|im_end|>"}])
    _, report = preprocess("--overwrite", **flags, model_max_length=128)
    assert report["dropped"] == {"control token": 1}
    assert report["tokens a record"]["shortest"] > 300


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--near_duplicate_threshold", "0"], "--near_duplicate_threshold 0.0: give a share above 0, and 1 at most"),
        (["--split_threshold", "1.5"], "--split_threshold 1.5: give a share"),
        (["--validation_size", "1.5"], "--validation_size 1.5: give a number of records, or a share below 1"),
        (["--validation_size", "-1"], "--validation_size -1.0: give a number"),
        (["--template_name", "qwen"], "--template_name qwen: counts in tokens, so name the model too: --model_name"),
        (["--max_source_length", "9"], "--max_source_length 9: counts in tokens, so name the model too"),
        (["--tokenizer", "x", "--model_max_length", "0"], "--model_max_length 0: nothing fits"),
        (["--validation_size", "20"], "cannot hold out 20 of 20 records"),
        (["--tokenizer", "no/such/model"], "--model_name_or_path no/such/model"),
    ],
)
def test_flags_that_cannot_be_honoured(preprocess, write_jsonl, tmp_path, flags, message):
    write_jsonl("in/a.jsonl", random_dialogues(20))
    with pytest.raises(UserError) as error:
        preprocess(*flags)
    assert message in str(error.value)
    assert files_below(tmp_path) == {"in/a.jsonl"}


def test_questions_that_are_all_alike_cannot_be_split(preprocess, write_jsonl):
    rng = random.Random(0)
    write_jsonl("in/a.jsonl", [dialogue("感冒了怎么办？", random_text(rng, 50)) for _ in range(20)])
    with pytest.raises(UserError, match=r"since records with like questions stay together; .* give 0 to hold out none"):
        preprocess()


def test_places_that_cannot_be_written(preprocess, write_jsonl, tmp_path):
    source = write_jsonl("in/a.jsonl", random_dialogues(20))
    with pytest.raises(UserError, match=r"^--input_dir .*nowhere: no such file or folder"):
        preprocess(input_dir=tmp_path / "nowhere")
    argv = ["--input_dir", str(tmp_path / "in"), "--output_dir"]
    with pytest.raises(UserError, match=r"^--output_dir .*/in: "):
        preprocess_data.main([*argv, str(tmp_path / "in"), "--overwrite"])
    with pytest.raises(UserError, match=r"lies in --input_dir .*; write beside it"):
        preprocess_data.main([*argv, str(tmp_path / "in/out")])
    assert len(read_lines(source)) == 20

    preprocess()
    before = (tmp_path / "out/train/dialogues.jsonl").read_text()
    with pytest.raises(UserError, match=r"^--output_dir .*exists already"):
        preprocess()
    (tmp_path / "out.report.json").unlink()
    with pytest.raises(UserError, match=r"^--output_dir .*is not empty"):
        preprocess()
    assert (tmp_path / "out/train/dialogues.jsonl").read_text() == before
    preprocess("--overwrite", validation_size=0)
    assert not (tmp_path / "out/validation").exists()


def test_kinds_are_not_mixed(preprocess, write_jsonl):
    write_jsonl("in/a.jsonl", random_dialogues(3))
    write_jsonl("in/b.jsonl", [{"question": "a", "response_chosen": "b", "response_rejected": "c"}])
    with pytest.raises(
        UserError, match=r"holds dialogues \(.*a\.jsonl\) and pairs \(.*b\.jsonl\), which no stage reads"
    ):
        preprocess()


def test_nothing_left_is_an_error_that_says_why(preprocess, write_jsonl, tmp_path):
    write_jsonl("in/a.jsonl", [dialogue("a", "<br>"), {"conversations": []}, {"ask": "a", "reply": "b"}])
    with pytest.raises(UserError, match=r"kept 0 of 3 \(") as error:
        preprocess()
    assert "1 dropped, empty after cleaning: " in str(error.value)
    assert str(error.value).endswith("scripts/convert_data_format.py reads other forms and columns")
    (tmp_path / "in/a.jsonl").write_text("\n")
    with pytest.raises(UserError, match="there are no records in it"):
        preprocess()
    assert files_below(tmp_path) == {"in/a.jsonl"}


def test_a_file_that_cannot_be_read_on_leaves_nothing(preprocess, tmp_path, write_jsonl):
    write_jsonl("in/a.jsonl", random_dialogues(5))
    (tmp_path / "in/b.json").write_text('[{"question": "a", "answer": "b"}, {"ques')
    with pytest.raises(UserError, match=r"b\.json:1: broken JSON: "):
        preprocess()
    assert files_below(tmp_path) == {"in/a.jsonl", "in/b.json"}


# ---------------------------------------------------------------- as a script


def test_the_script_ends_with_2():
    command = [sys.executable, "scripts/preprocess_data.py", "--input_dir", "no/where", "--output_dir", "out"]
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert (result.returncode, result.stderr) == (2, "error: --input_dir no/where: no such file or folder\n")


def test_the_sample_data_are_clean(tmp_path):
    """What people start from: every record is kept as it is, but for near copies."""
    preprocess_data.main(["--input_dir", str(ROOT / "data/pretrain"), "--output_dir", str(tmp_path / "out")])
    report = json.loads((tmp_path / "out.report.json").read_text())
    assert report["cleaned"] == {}
    assert set(report["dropped"]) <= {"near duplicate"}


def test_words_of_a_record_leave_the_system_prompt_out():
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "a"}]
    assert words_of(Pair(messages, "b", "c", None, "")) == "a\nb\nc"
    call = {"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": {}}]}
    assert words_of(Dialogue([*messages, call], None, "")) == 'a\n[{"name": "f", "arguments": {}}]'


def test_the_question_of_a_record_is_more_than_a_greeting():
    turns = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "你好！"},
        {"role": "assistant", "content": "请讲。"},
        {"role": "user", "content": "感冒了怎么办？"},
        {"role": "assistant", "content": "休息。"},
        {"role": "user", "content": "还有呢？"},
    ]
    assert question_of(Dialogue(turns, None, "")) == "你好！\n感冒了怎么办？"
    assert question_of(Pair(turns[3:4], "a", "b", None, "")) == "感冒了怎么办？"
    assert question_of(Document("全文", "")) == "全文"


# ---------------------------------------------------------------- labelled replies


def test_labelled_replies_keep_their_labels(preprocess, write_jsonl, tmp_path):
    records = random_dialogues(20)
    key = ("label", "kto_tag")
    marked = [record | {key[number % 2]: number % 3 == 0} for number, record in enumerate(records)]
    marked[4]["conversations"][1]["value"] += "<br>"
    good = dialogue("咳嗽三天了怎么办？", random_text(random.Random(1), 80), label=True)
    bad = dialogue("咳嗽三天了怎么办？", random_text(random.Random(1), 80) + "不必就医。", label=False)
    write_jsonl("in/a.jsonl", [*marked, marked[0], records[0], good, bad, bad | {"kto_tag": False}])
    out, report = preprocess(validation_size=4)
    assert report["kind"] == "replies"
    assert report["dropped"] == {"duplicate": 2, "no label": 1}
    assert report["examples"]["duplicate"][1].endswith("a.jsonl:25: the same as " + str(tmp_path / "in/a.jsonl:24"))
    written = {part: read_lines(tmp_path / f"out/{part}/replies.jsonl") for part in ("train", "validation")}
    assert [len(lines) for lines in written.values()] == [18, 4]
    expected = [{"conversations": record["conversations"], "label": n % 3 == 0} for n, record in enumerate(records)]
    expected += [good, bad]
    expected[4]["conversations"][1]["value"] = expected[4]["conversations"][1]["value"].removesuffix("<br>")
    by_text = {json.dumps(record) for record in expected}
    assert {json.dumps(record) for lines in written.values() for record in lines} == by_text
    assert "next: python dpo_training.py --loss_type kto --train_file_dir " in out


def test_thoughts_in_keys_are_kept_counted_and_cached_by_the_choice(preprocess, write_jsonl, tmp_path, tiny_model_dir):
    records = random_dialogues(12)
    for record in records:
        record["conversations"][-1]["reasoning_content"] = "先想，电话13812345678。"
    write_jsonl("in/a.jsonl", records)
    values = {"model_name_or_path": tiny_model_dir, "template_name": "qwen3", "thinking": "empty"}
    out, report = preprocess("--mask_personal_data", **values, validation_size=2, cache_dir=tmp_path / "cache")
    line = "thoughts of replies in a key of their own ('reasoning_content'): 12, read as <think>...</think> before the "
    line += "reply"
    assert line in out
    assert report["notes"] == [line]
    assert "--thinking empty" in out.splitlines()[-1]
    for record in read_lines(tmp_path / "out/train/dialogues.jsonl"):
        assert record["conversations"][-1]["value"].startswith("<think>\n先想，电话[手机号]。\n</think>\n\n")
    command = [*out.splitlines()[-1].split(" ")[3:-1], "--max_steps", "1", "--output_dir", str(tmp_path / "run")]
    supervised_finetuning.main([*command, "--gradient_checkpointing", "False"])
