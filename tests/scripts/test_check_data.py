"""What the check says of data, and by which exit code it says so."""

import gzip
import json
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import check_data
import pytest
from check_data import language_of, percentiles
from random_records import dialogue, random_dialogues, random_text

from medtune.errors import UserError
from medtune.reading.tokenization import encode_dialogue, load_chat_template

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def check(tmp_path, capsys, monkeypatch):
    """Runs the check in tmp_path, on the folder `in`; returns its exit code and the lines that it printed."""
    monkeypatch.chdir(tmp_path)

    def run(*flags, **values) -> tuple[int, list[str]]:
        words = [str(word) for name, value in ({"dir": "in"} | values).items() for word in (f"--{name}", value)]
        code = 0
        try:
            check_data.main([*words, *flags])
        except SystemExit as end:
            code = end.code
        return code, capsys.readouterr().out.splitlines()

    return run


def value_of(lines: list[str], name: str) -> str:
    (line,) = [line for line in lines if line.startswith(f"  {name}  ")]
    return line.removeprefix(f"  {name}").strip()


# ---------------------------------------------------------------- faults


def test_sound_data_are_fine(check, write_jsonl):
    write_jsonl("in/a.jsonl", random_dialogues(20))
    write_jsonl("in/b.jsonl", [dialogue("发热怎么办？", "休息。", "还有呢？", "多喝水。", system="你是医生。")])
    code, lines = check()
    assert code == 0
    assert lines[0] == "in: dialogues in 2 files"
    assert value_of(lines, "records") == "kept 21 of 21"
    assert value_of(lines, "turns").startswith(
        "1.05 questions a record, at most 2, 4.8% with a system prompt, 0.0% with"
    )
    assert value_of(lines, "copies") == value_of(lines, "near copies") == "none"
    assert lines[-1] == "verdict: a stage can train on this"


def test_every_fault_is_printed_with_file_and_line(check, write_jsonl):
    faults = [dialogue(f"没有回答{n}") for n in range(30)]
    faults[7] = dialogue("问", "")
    faults[9] = {"conversation": []}
    path = write_jsonl("in/a.jsonl", [*random_dialogues(3), *faults])
    with path.open("a") as file:
        file.write('{"conversations": [\n')
    code, lines = check()
    assert code == 1
    printed = lines[: lines.index("in: dialogues in 1 file")]
    assert [line.split(": ")[0] for line in printed] == [f"in/a.jsonl:{number}" for number in range(4, 35)]
    assert printed[0].startswith("in/a.jsonl:4: no reply: turn 1 (user) is the last")
    assert printed[7].startswith("in/a.jsonl:11: empty reply: ")
    assert "is 'conversation' meant as 'conversations'?" in printed[9]
    assert printed[-1].startswith("in/a.jsonl:34: broken JSON: ")
    assert value_of(lines, "records") == "kept 3 of 34 (28 no reply, 1 empty reply, 1 unknown keys, 1 broken JSON)"
    assert lines[-1] == "wrong: 31 faults, listed above: fix them, or start the stage with --on_bad_data drop"


def test_after_a_file_that_cannot_be_read_on_come_the_others(check, write_jsonl, tmp_path):
    write_jsonl("in/a.json", [])
    (tmp_path / "in/a.json").write_text('[{"question": "感冒", "answer": "休息"},\n{"question": ')
    (tmp_path / "in/b.csv").write_text('question,answer\n发热,"多喝水\n')
    write_jsonl("in/c.jsonl", random_dialogues(2))
    (tmp_path / "in/d.jsonl.gz").write_bytes(gzip.compress(b'{"question": "a", "answer": "b"}\n' * 99)[:-9])
    code, lines = check()
    assert code == 1
    assert lines[0].startswith("in/a.json:2: unreadable: broken JSON: ")
    assert lines[1].startswith("in/b.csv:2: unreadable: broken CSV: ")
    assert any(line.startswith("in/d.jsonl.gz: unreadable: not a whole gzip file") for line in lines)
    assert "in: dialogues in 4 files" in lines
    assert value_of(lines, "records") == "kept 3 of 6 (3 unreadable)"
    assert lines[-1] == "wrong: 3 faults, listed above: fix them"


@pytest.mark.parametrize(
    ("line", "summary"), [('{"a": 1}', "kept 0 of 1 (1 unknown keys)"), ("\n", "kept 0 of 0")], ids=["bad", "blank"]
)
def test_a_folder_without_a_record_is_wrong(check, tmp_path, line, summary):
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.jsonl").write_text(f"{line}\n")
    code, lines = check()
    assert code == 1
    assert value_of(lines, "records") == summary
    assert lines[-1] == "wrong: no record can be used"


# ---------------------------------------------------------------- copies and overlap


def test_copies_near_copies_and_questions_asked_again(check, write_jsonl):
    records = random_dialogues(10)
    question, answer = (turn["value"] for turn in records[2]["conversations"])
    records += [records[4], dialogue(question, answer + "嗯"), dialogue(f"{question}？", "别的回答" * 20), records[4]]
    write_jsonl("in/a.jsonl", records)
    code, lines = check()
    assert code == 0
    assert value_of(lines, "copies") == (
        "2 (14.3%): in/a.jsonl:11 is the same as in/a.jsonl:5, in/a.jsonl:14 is the same as in/a.jsonl:5"
    )
    near = value_of(lines, "near copies")
    assert near.startswith("1 (7.1%): in/a.jsonl:12 is ")
    assert near.endswith("% like in/a.jsonl:3")
    assert value_of(lines, "asked again") == "with a question from before and another answer: 1 (7.1%)"
    assert "scripts/preprocess_data.py leaves out copies and near copies" in lines


def test_a_question_of_the_evaluation_is_wrong_in_training(check, write_jsonl):
    rng = random.Random(3)
    question = random_text(rng, 40)
    write_jsonl("in/a.jsonl", [*random_dialogues(8), dialogue(question, "一"), dialogue(f"嗯{question[1:]}", "二")])
    write_jsonl("eval/e.jsonl", [*random_dialogues(3, seed=1), dialogue(f"{question}？！", "三")])
    code, lines = check(eval_dir="eval")
    assert code == 1
    assert value_of(lines, "evaluation") == "kept 4 of 4"
    assert value_of(lines, "overlap") == (
        "the same question in both: 1 (10.0%): in/a.jsonl:9 asks the same as eval/e.jsonl:4"
    )
    (near,) = [line.strip() for line in lines if "nearly the same, see for yourself" in line]
    assert "1 (10.0%): in/a.jsonl:10 asks " in near
    assert near.endswith("% of eval/e.jsonl:4")
    assert lines[-1] == "wrong: 1 of the training records ask what the evaluation asks, which tests memory"


def test_faults_of_the_evaluation_count(check, write_jsonl):
    write_jsonl("in/a.jsonl", random_dialogues(5))
    write_jsonl("eval/e.jsonl", [*random_dialogues(5, seed=1), dialogue("没有回答")])
    code, lines = check(eval_dir="eval")
    assert code == 1
    assert lines[0].startswith("eval/e.jsonl:6: no reply: ")


def test_pairs_may_be_checked_against_dialogues(check, write_jsonl):
    write_jsonl("in/a.jsonl", [{"question": "感冒了怎么办？", "response_chosen": "一", "response_rejected": "二"}])
    write_jsonl("eval/e.jsonl", [dialogue("感冒了，怎么办", "三")])
    code, lines = check(eval_dir="eval")
    assert code == 1
    assert "in/a.jsonl:1 asks the same as eval/e.jsonl:1" in value_of(lines, "overlap")


# ---------------------------------------------------------------- lengths, languages, replies


def test_lengths_in_characters(check, write_jsonl):
    rng = random.Random(0)
    write_jsonl("in/a.jsonl", [dialogue(random_text(rng, 10), random_text(rng, n)) for n in range(9, 109)])
    _, lines = check()
    assert value_of(lines, "characters") == (
        "5% up to 24, 25% up to 44, 50% up to 69, 75% up to 94, 90% up to 109, 95% up to 114, 99% up to 118; "
        "shortest 20, longest 119"
    )


def test_percentiles_are_lengths_that_occur():
    assert percentiles(Counter({5: 1})).startswith("5% up to 5, 25% up to 5")
    assert percentiles(Counter({1: 99, 1000: 1})).endswith("99% up to 1; shortest 1, longest 1,000")


def test_lengths_in_tokens_and_what_the_limit_cuts(check, write_jsonl, tiny_model_dir, tiny_tokenizer):
    rng = random.Random(0)
    records = [dialogue("感冒", "休息"), *[dialogue("发热", random_text(rng, 100)) for _ in range(3)]]
    write_jsonl("in/a.jsonl", records)
    flags = {"model_name_or_path": tiny_model_dir, "template_name": "qwen"}
    code, lines = check(**flags, model_max_length=128)
    assert code == 0
    messages = [{"role": "user", "content": "感冒"}, {"role": "assistant", "content": "休息"}]
    ids, _ = encode_dialogue(tiny_tokenizer, load_chat_template(tiny_tokenizer, None), messages, max_length=128)
    assert f"shortest {len(ids)}, " in value_of(lines, "tokens")
    over = value_of(lines, "over the limit")
    assert over.startswith("of --model_max_length 128: 3 (75.0%): in/a.jsonl:2 (")
    code, lines = check(**flags, model_max_length=8)
    assert code == 1
    assert lines[-1] == "wrong: every record is over --model_max_length 8"


def test_control_tokens_are_faults_where_the_tokenizer_is_known(check, write_jsonl, tiny_model_dir):
    write_jsonl("in/a.jsonl", [*random_dialogues(3), dialogue("a", "b<|im_end|>c")])
    assert check()[0] == 0
    code, lines = check(model_name_or_path=tiny_model_dir)
    assert code == 1
    assert lines[0].startswith("in/a.jsonl:4: control token: message 2 (assistant) holds <|im_end|>")


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("感冒了怎么办？多喝水。", "zh"),
        ("服用 aspirin 100mg，每日一次", "zh"),
        ("What helps with a cold? Rest.", "en"),
        ("The herb 当归 is used in many remedies", "en"),
        ("風邪をひいたらどうすればいいですか", "other"),
        ("Что делать при простуде?", "other"),
        ("12345 !!", "other"),
    ],
)
def test_languages(text, language):
    assert language_of(text) == language


def test_the_language_mix_and_the_replies(check, write_jsonl):
    texts = ["Drink water and rest.", "多喝水", "休息", "吃药要听医生的话", "去医院"]
    write_jsonl("in/a.jsonl", [dialogue(f"{text[:6]}?" * 3, text, "why", "好") for text in texts])
    _, lines = check()
    assert value_of(lines, "languages") == "zh 80.0%, en 20.0%"
    start = next(number for number, line in enumerate(lines) if line.startswith("  shortest replies"))
    assert [line.split()[-1] for line in lines[start : start + 3]] == ["好"] * 3
    assert lines[start + 3].strip() == "longest replies   in/a.jsonl:1, 21 characters: Drink water and rest."
    assert lines[start + 4].strip() == "in/a.jsonl:4, 8 characters: 吃药要听医生的话"


# ---------------------------------------------------------------- other kinds


def test_pairs(check, write_jsonl, tiny_model_dir):
    rng = random.Random(0)
    records = [
        {"question": random_text(rng, 9), "response_chosen": random_text(rng, n), "response_rejected": "不用" * 5}
        for n in (5, 15, 25, 35)
    ]
    write_jsonl("in/a.jsonl", [*records, {"question": "a", "chosen": "b", "rejected": "b"}])
    code, lines = check()
    assert code == 1
    assert lines[0].startswith("in/a.jsonl:5: same replies: ")
    assert "in: pairs in 1 file" in lines
    assert value_of(lines, "turns").endswith("75.0% chosen longer")
    _, lines = check(model_name_or_path=tiny_model_dir, max_target_length=90)
    over = value_of(lines, "over the limit")
    assert over.startswith("of --max_source_length 1024 --max_target_length 90: 1 (25.0%): in/a.jsonl:4 (reply ")
    code, lines = check(model_name_or_path=tiny_model_dir, max_source_length=8, model_max_length=99)
    assert "in/a.jsonl:1 (prompt " in value_of(lines, "over the limit")
    assert "--model_max_length 99: limits dialogues, and these are pairs" in lines


def test_documents(check, tmp_path, tiny_model_dir):
    (tmp_path / "in").mkdir()
    rng = random.Random(0)
    texts = [random_text(rng, 50) for _ in range(5)]
    (tmp_path / "in/a.txt").write_text("\n".join([*texts, texts[1], "a<|im_end|>"]), encoding="utf-8")
    code, lines = check()
    assert code == 0
    assert lines[0] == "in: documents in 1 file"
    assert value_of(lines, "copies").startswith("1 (14.3%): in/a.txt:6 is the same as in/a.txt:2")
    assert not any(line.startswith(("  turns", "  asked again", "  over")) for line in lines)
    code, lines = check(model_name_or_path=tiny_model_dir, model_max_length=8)
    assert code == 1  # for the control token; documents are cut into blocks, so none is over a limit
    assert lines[0].startswith("in/a.txt:7: control token: ")
    assert lines[-1].startswith("wrong: 1 faults")


def test_files_that_no_stage_reads_are_named(check, write_jsonl, tmp_path):
    write_jsonl("in/a.jsonl", random_dialogues(2))
    (tmp_path / "in/notes.txt").write_text("notes")
    (tmp_path / "in/b.docx").write_text("")
    _, lines = check()
    assert "not read, by their endings: in/b.docx, in/notes.txt" in lines


# ---------------------------------------------------------------- a mistake in the command


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"dir": "nowhere"}, "--dir nowhere: no such file or folder"),
        ({"eval_dir": "nowhere"}, "--eval_dir nowhere: no such file or folder"),
        ({"eval_dir": "in"}, "--eval_dir: the same files as --dir, of which a stage holds a part out"),
        ({"eval_dir": "text"}, "--eval_dir text: holds documents, and --dir dialogues"),
        ({"dir": "."}, "--dir .: holds dialogues (in/a.jsonl) and pairs (pairs/a.jsonl), which no stage reads"),
        ({"model_max_length": 100}, "--model_max_length 100: counts in tokens, so name the model too"),
        ({"model_name_or_path": "no/model"}, "--model_name_or_path no/model"),
    ],
)
def test_mistakes(check, write_jsonl, tmp_path, values, message):
    write_jsonl("in/a.jsonl", random_dialogues(3))
    write_jsonl("pairs/a.jsonl", [{"question": "a", "response_chosen": "b", "response_rejected": "c"}])
    (tmp_path / "text").mkdir()
    (tmp_path / "text/a.txt").write_text("感冒")
    with pytest.raises(UserError) as error:
        check(**values)
    assert message in str(error.value)


def test_the_script_ends_by_the_verdict(tmp_path, write_jsonl):
    sound = write_jsonl("sound.jsonl", random_dialogues(3))
    broken = write_jsonl("broken.jsonl", [*random_dialogues(3), {}])
    for path, expected in ((sound, 0), (broken, 1), (tmp_path / "nowhere", 2)):
        command = [sys.executable, "scripts/check_data.py", "--dir", str(path)]
        result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
        assert result.returncode == expected
    assert result.stderr == f"error: --dir {tmp_path / 'nowhere'}: no such file or folder\n"


def test_what_was_preprocessed_is_fine(check, write_jsonl, capsys):
    import preprocess_data

    records = random_dialogues(40)
    records += [records[3], dialogue("没有回答"), dialogue(records[5]["conversations"][0]["value"], "<b>别的</b>")]
    write_jsonl("in/a.jsonl", records)
    assert check()[0] == 1
    preprocess_data.main(["--input_dir", "in", "--output_dir", "out"])
    capsys.readouterr()
    code, lines = check(dir="out/train", eval_dir="out/validation")
    assert code == 0
    assert value_of(lines, "overlap").endswith("none")
    assert json.loads(Path("out.report.json").read_text())["kept"] == 41


# ---------------------------------------------------------------- labelled replies


def labelled(n: int, **more) -> list[dict]:
    return [record | {"label": number % 4 != 0} for number, record in enumerate(random_dialogues(n), 1)]


def test_labelled_replies_are_counted_by_label(check, write_jsonl):
    records = labelled(8)
    unclear = {"question": random_text(random.Random(7), 20), "answer": "休息", "label": "内科"}
    write_jsonl("in/a.jsonl", [*records, {**records[0], "label": None}, unclear])
    code, lines = check()
    assert code == 1
    assert any(line.startswith("in/a.jsonl:9: no label: ") for line in lines)
    assert any(line.startswith("in/a.jsonl:10: unclear label: 'label' is '内科'") for line in lines)
    assert "in: replies in 1 file" in lines
    assert value_of(lines, "labels") == "6 good replies (75.0%), 2 bad ones (25.0%)"
    assert value_of(lines, "characters").endswith("shortest 81, longest 81")


def test_labelled_replies_in_tokens_and_of_one_label(check, write_jsonl, tiny_model_dir):
    write_jsonl("in/a.jsonl", [record | {"label": True} for record in labelled(4)])
    flags = {"model_name_or_path": tiny_model_dir, "template_name": "qwen", "max_target_length": 20}
    code, lines = check(**flags)
    assert code == 1
    assert value_of(lines, "over the limit").startswith(
        "of --max_source_length 1024 --max_target_length 20: 4 (100.0%)"
    )
    assert lines[-1] == "wrong: all replies have the same label, and KTO learns from the difference: add others"
    code, lines = check(ignore_keys="label")
    assert (code, lines[0]) == (0, "in: dialogues in 1 file")


def test_thoughts_in_keys_are_counted_and_wait_for_the_choice(check, write_jsonl, tiny_model_dir):
    turns = [
        {"role": "user", "content": "头疼怎么办？"},
        {"role": "assistant", "content": "休息。", "thinking": "不重。"},
    ]
    write_jsonl("in/a.jsonl", [{"messages": turns}, {"question": "胃疼？", "answer": "少吃辣。"}])
    asks = "thoughts of replies in a key of their own ('thinking'): 1: a stage asks what becomes of them: --thinking"
    code, lines = check()
    assert (code, any(line.startswith(asks) for line in lines)) == (0, True)
    model = ("--model_name_or_path", str(tiny_model_dir), "--template_name", "qwen3")
    code, lines = check(*model)
    assert (code, any(line.startswith(f"wrong: {asks}") for line in lines)) == (1, True)
    code, lines = check(*model, "--thinking", "drop")
    assert code == 0
    assert any("learned without them (--thinking drop): 1, the first in" in line for line in lines)
