"""Exam questions of the published sets: read alike, asked in one text everywhere, counted where they cannot be used."""

import json
import re

import pytest
from check_data import main as check
from convert_data_format import main as convert
from transformers import PreTrainedTokenizerBase

from medtune.arguments import DataArguments
from medtune.errors import Unusable, UserError
from medtune.reading.encoders import DialogueEncoder, PromptEncoder
from medtune.reading.eval_items import read_tests
from medtune.reading.exams import to_exam
from medtune.reading.readers import load_records, read_dialogues, read_questions
from medtune.reading.stage_data import encode_records, prepare_part
from medtune.reading.tokenization import load_chat_template

OPTIONS = {"A": "地高辛", "B": "华法林", "C": "肝素", "D": "青霉素"}
QUESTION = "哪种药要查INR？"
LETTERED = {"opa": "地高辛", "opb": "华法林", "opc": "肝素", "opd": "青霉素"}
# The columns of the published sets, of which each record asks the same.
PUBLISHED = {
    "CMB": {"exam_type": "医师考试", "question": QUESTION, "option": OPTIONS | {"E": ""}, "answer": "B"},
    "CMExam, csv": {
        "Question": QUESTION,
        "Options": "A 地高辛\nB 华法林\nC 肝素\nD 青霉素",
        "Answer": "B",
        "Explanation": "华法林抑制维生素K。",
    },
    "CMExam, json": {
        "Question": QUESTION,
        "Options": [{"key": letter, "value": text} for letter, text in OPTIONS.items()],
        "Answer": "B",
    },
    "MedQA": {"question": QUESTION, "options": OPTIONS, "answer": "华法林", "answer_idx": "B", "meta_info": "step1"},
    "MedQA, bigbio": {
        "question": QUESTION,
        "options": [{"key": letter, "value": text} for letter, text in OPTIONS.items()],
        "answer": "华法林",
    },
    "MedMCQA": {"id": "e9", "question": QUESTION, **LETTERED, "cop": 1, "choice_type": "single", "exp": "Warfarin."},
    "ours": {"id": "zh:1", "exam_subject": "药理", "question": QUESTION, "option": OPTIONS, "answer": "B"},
}
# Of a file whose numbers count from 0.
FIRST = {"question": "哪种是强心苷？", **LETTERED, "cop": 0}
PROMPT = f"{QUESTION}\nA. 地高辛\nB. 华法林\nC. 肝素\nD. 青霉素\n"
LETTER = "请直接回答正确选项的字母。"
TAGGED = "请先思考，最后写出 <answer>X</answer>，其中 X 是正确选项的字母。"


@pytest.fixture
def encode(tiny_tokenizer: PreTrainedTokenizerBase, write_jsonl):
    """A function from records to the rows of prompts and the report of what is left out."""

    def encode_prompts(*records: dict, max_length: int = 1000, **settings):
        questions, _ = load_records(read_questions, [write_jsonl("prompts.jsonl", records)])
        chat_template = load_chat_template(tiny_tokenizer, "qwen")
        encoder = PromptEncoder(tiny_tokenizer, chat_template, max_length, "cut_prompt_start", **settings)
        return encode_records(questions, encoder)

    return encode_prompts


@pytest.mark.parametrize("record", PUBLISHED.values(), ids=PUBLISHED)
def test_published_columns_are_one_prompt_in_training_and_evaluation(record, encode, write_jsonl, tmp_path):
    file = write_jsonl("exam.jsonl", [record, FIRST])
    (test, _), _ = read_tests([str(file)], None, 0)
    assert test["messages"] == [{"role": "user", "content": PROMPT + LETTER}]
    assert (test["options"], test["answer"]) == (OPTIONS, "B")
    for form, instruction, reply in (("letter", LETTER, "B"), ("tagged", TAGGED, "<answer>B</answer>")):
        rows, _ = encode(record, FIRST, exam_format=form)
        assert json.loads(rows[0]["messages"])[0] == [{"role": "user", "content": PROMPT + instruction}]
        assert rows[0]["reply"] == reply
        known = json.loads(rows[0]["record"])
        assert (known["options"], known["answer"]) == (OPTIONS, "B")
        converted = tmp_path / f"{form}.jsonl"
        convert(["--input", str(file), "--output", str(converted), "--format", "sft", "--exam_format", form])
        turns = json.loads(converted.read_text(encoding="utf-8").splitlines()[0])["conversations"]
        assert [turn["value"] for turn in turns] == [PROMPT + instruction, reply]


@pytest.mark.parametrize("record", PUBLISHED.values(), ids=PUBLISHED)
def test_sft_learns_raw_questions_as_the_converter_writes_them(record, write_jsonl, tmp_path, tiny_tokenizer, capsys):
    """Asked with their options; the check of the data agrees with the stage."""
    file, converted = write_jsonl("raw/exam.jsonl", [record, FIRST]), tmp_path / "converted.jsonl"
    convert(["--input", str(file), "--output", str(converted), "--format", "sft"])
    chat_template, rows = load_chat_template(tiny_tokenizer, "qwen"), []
    for path in (file, converted):
        dialogues, _ = load_records(read_dialogues, [path])
        rows.append(encode_records(dialogues, DialogueEncoder(tiny_tokenizer, chat_template, 1000))[0])
        assert dialogues[0].messages[0]["content"] == PROMPT + LETTER
        assert [dialogue.messages[1]["content"] for dialogue in dialogues] == ["B", "A"]
    assert rows[0]["input_ids"] == rows[1]["input_ids"]
    check(["--dir", str(file.parent)])
    said = capsys.readouterr().out
    assert "exam questions, asked for the letter as in evaluation: 2, the first in " in said
    assert "verdict: a stage can train on this" in said


def test_sft_leaves_out_what_has_several_answers_and_learns_answers_in_sentences(write_jsonl, tmp_path, capsys):
    exam = {"question": QUESTION, "options": OPTIONS}
    explained = ["选B。华法林影响凝血。", "B, since warfarin acts on vitamin K", "答案：B", "华法林\n它抑制维生素K。"]
    records = [exam | {"answer": answer} for answer in ("BC", *explained, "b")]
    file = write_jsonl("exam/exam.jsonl", records)
    dialogues, report = load_records(read_dialogues, [file])
    assert report.dropped == {"several right answers": 1}
    *in_sentences, lettered = dialogues
    for dialogue, answer in zip(in_sentences, explained, strict=True):
        assert dialogue.messages == [
            {"role": "user", "content": PROMPT.strip()},
            {"role": "assistant", "content": answer},
        ]
    assert lettered.messages[1]["content"] == "B"
    check(["--dir", str(file.parent)])
    said = capsys.readouterr().out
    assert "kept 5 of 6 (1 several right answers)" in said
    assert "exam.jsonl:1: several" not in said, "no fault"
    assert "verdict: a stage can train on this" in said
    with pytest.raises(UserError, match=r"jsonl:1: broken exam question: 'answer' is '阿司匹林'; it must be one of A"):
        load_records(read_dialogues, [write_jsonl("broken.jsonl", [exam | {"answer": "阿司匹林"}])])


@pytest.mark.parametrize(
    ("keys", "listed"),
    [
        ({"variants": OPTIONS}, "'variants'"),
        ({"candidates": [*OPTIONS.values()]}, "'candidates'"),
        ({"ending0": "地高辛", "ending1": "华法林"}, "'ending0', 'ending1'"),
    ],
)
def test_sft_never_learns_a_letter_without_its_options(keys, listed, write_jsonl):
    file = write_jsonl("exam.jsonl", [{"question": QUESTION, "answer": "B"} | keys])
    for read in (read_dialogues, read_questions):
        with pytest.raises(UserError) as error:
            load_records(read, [file])
        assert "exam.jsonl:1: exam question without options: 'answer' is B, and the options seem to be in" in str(
            error.value
        )
        assert f"write them as 'options', or take {listed} out of the record" in str(error.value)
    plain = {"question": "我是哪种血型？", "answer": "A", "history": [["一", "二"], ["三", "四"]], "tags": ["血", "型"]}
    (dialogue,), _ = load_records(read_dialogues, [write_jsonl("plain.jsonl", [plain])])
    assert dialogue.messages[-2]["content"] == "我是哪种血型？"


def test_options_that_stand_in_the_question_are_asked_once():
    inside = {"question": PROMPT.strip(), "options": OPTIONS, "answer": "B"}
    assert to_exam(inside).prompt("letter") == PROMPT + LETTER
    bare = {"question": "地高辛、华法林、肝素、青霉素，哪种药要查INR？", "options": OPTIONS, "answer": "B"}
    assert "\nB. 华法林\n" in to_exam(bare).prompt("letter"), "words without their letters"


@pytest.mark.parametrize(
    ("answer", "letters"),
    [
        ("b", "B"),
        ("Ｂ", "B"),
        ("(B)", "B"),
        ("B. 华法林", "B"),
        ("肝素", "C"),
        ("AC", "AC"),
        ("C, A", "AC"),
        (["A", "C"], "AC"),
        (None, ""),
        ("", ""),
    ],
)
def test_answers_by_letter_or_by_words(answer, letters):
    assert to_exam({"question": QUESTION, "options": OPTIONS, "answer": answer}).answer == letters


def test_words_of_an_option_that_look_like_letters_or_numbers(write_jsonl):
    counts = {"question": "几天？", "options": {"A": "3", "B": "15", "C": "2"}, "answer": "2"}
    (question,), _ = load_records(read_questions, [write_jsonl("counts.jsonl", [counts])])
    assert question.exam.answer == "C"
    assert to_exam(counts | {"answer": "15", "answer_idx": "B"}).answer == "B"
    assert to_exam({"question": "血型？", "options": {"A": "O", "B": "AB"}, "answer": "AB"}).answer == "B"
    both = {"question": "Which?", "options": {"A": "B", "B": "A"}, "answer": "B"}
    assert to_exam(both | {"answer_idx": "A"}).answer == "A"
    with pytest.raises(Unusable, match="'answer' is 'B'; it must be one of A, B"):
        to_exam(both)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answer": "E"}, "'answer' is 'E'; it must be one of A, B, C, D"),
        ({"answer": "甲"}, "'answer' is '甲'; it must be"),
        ({"answer": "肝素", "answer_idx": "A"}, "'answer_idx' is 'A' and 'answer' is '肝素'; keep the right one"),
        ({"answer": 2}, "'answer' is 2; it must be one of A, B, C, D: numbers count from 0 or from 1"),
        ({"options": {"A": "地高辛"}}, "its options are A; it needs two or more"),
    ],
)
def test_broken_exam_questions(change, message):
    with pytest.raises(Unusable, match=message) as raised:
        to_exam({"question": QUESTION, "options": OPTIONS, "answer": "B"} | change)
    assert raised.value.reason == "broken exam question"


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"question": QUESTION, "exam_subject": "药理", "answer": "B"}, "exam question without options"),
        ({"question": QUESTION, "option": {}, "answer": "b"}, "exam question without options"),
        ({"Question": QUESTION, "Options": "", "Answer": "A,C"}, "exam question without options"),
        ({"question": QUESTION, "options": "{}", "answer": "B"}, "exam question without options"),
        ({"question": QUESTION, "opa": "", "opb": "", "cop": 1}, "exam question without options"),
        ({"question": "", "option": OPTIONS, "answer": "B"}, "empty question"),
        ({"question": " \n", "option": OPTIONS, "answer": "B"}, "empty question"),
    ],
)
def test_what_an_exam_question_has_lost_is_said_and_never_learned(record, reason, write_jsonl, tmp_path, capsys):
    file, output = write_jsonl("exam.jsonl", [record, PUBLISHED["CMB"]]), tmp_path / "train.jsonl"
    convert(["--input", str(file), "--output", str(output), "--format", "sft"])
    assert f"kept 1 of 2 (1 {reason})" in capsys.readouterr().out
    with pytest.raises(UserError, match=f"exam.jsonl:1: {reason}: "):
        load_records(read_questions, [file])


def test_options_may_stand_in_the_question_and_words_may_answer_without():
    inside = {"exam_subject": "药理", "question": "哪种？\nA. 地高辛\nB. 肝素", "answer": "B"}
    in_words = {"question_type": "问答题", "question": QUESTION, "answer": "华法林", "option": {}}
    assert to_exam(inside) is to_exam(in_words) is to_exam({"question": "我是哪种血型？", "answer": "A"}) is None


@pytest.mark.parametrize(
    ("numbers", "letters"),
    [
        ([2, 0, 3], ["C", "A", "D"]),
        ([2, 1, 4], ["B", "A", "D"]),
        (["2", "4"], ["B", "D"]),  # a csv file
        ([3, 1, 0, -1], ["D", "B", "A", ""]),  # MedMCQA's test part has no answers
    ],
)
def test_the_file_shows_where_numbers_begin(numbers, letters, write_jsonl):
    records = [{"question": f"第{n}题？", **LETTERED, "cop": number} for n, number in enumerate(numbers)]
    questions, _ = load_records(read_questions, [write_jsonl("numbers.jsonl", records)])
    assert [question.exam.answer for question in questions] == letters


def test_numbers_that_do_not_show_where_they_begin_are_refused(write_jsonl):
    file = write_jsonl("numbers.jsonl", [{"question": QUESTION, **LETTERED, "cop": 2}])
    with pytest.raises(UserError, match=r"numbers.jsonl:1: broken exam question: 'cop' is 2; .*: numbers count from"):
        load_records(read_questions, [file])


def test_keys_that_reward_functions_read_are_not_called_unread(tiny_tokenizer, write_jsonl, tmp_path):
    record = {"question": "头痛怎么办？", "answer": "就诊。", "metamap_phrases": ["头痛"]}
    files = [write_jsonl("prompts.jsonl", [record])]
    data_args = DataArguments(train_file_dir=str(files[0]))
    notes = {}
    for read, encoder_class in ((read_questions, PromptEncoder), (read_dialogues, DialogueEncoder)):
        encoder = encoder_class(tiny_tokenizer, load_chat_template(tiny_tokenizer, "qwen"), 100, "drop")
        part = prepare_part("train", files, False, read, encoder, data_args, 0, str(tmp_path))
        notes[encoder_class] = part.read.notes
    assert notes[PromptEncoder] == [f"keys of records that are {PromptEncoder.unread}: 'metamap_phrases' (1)"]
    assert "--reward_file" in PromptEncoder.unread
    assert notes[DialogueEncoder] == ["keys of records that are not read: 'metamap_phrases' (1)"]


def test_what_cannot_be_a_prompt_is_counted(encode):
    twice = {"question": "哪种抗凝？", "option": OPTIONS | {"D": "肝素"}, "answer": "B"}
    several = {"question": "哪些抗凝？", "option": OPTIONS, "answer": "BC"}
    long = {"question": "病史" * 300 + "？", "option": OPTIONS, "answer": "C"}
    rows, report = encode(
        PUBLISHED["CMB"], several, twice, long, {"question": "头痛怎么办？" * 100, "answer": "就诊。"}, max_length=200
    )
    same_options = "broken exam question (same options)"
    assert report.dropped == {"several right answers": 1, "prompt too long": 1, same_options: 1}
    assert len(rows) == 2, "a dialogue's prompt is cut, an exam question would be another one"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"cop": -1}, r"no right answer \(cop -1\)"),
        ({"cop": "-1"}, r"no right answer \(cop -1\)"),
    ],
)
def test_questions_that_cannot_be_answered_are_left_out_by_their_reason(
    change, reason, encode, write_jsonl, tmp_path, capsys
):
    records = [FIRST, {"question": QUESTION, **LETTERED, "cop": 1} | change]
    file, output = write_jsonl("exam.jsonl", records), tmp_path / "train.jsonl"
    convert(["--input", str(file), "--output", str(output), "--format", "sft"])
    assert re.search(f"kept 1 of 2 \\(1 {reason}\\)", capsys.readouterr().out)
    with pytest.raises(UserError, match=f"prompts.jsonl:2: {reason}: "):
        encode(*records, needed_keys=["answer"])


def test_a_prompt_that_a_reward_cannot_judge_is_refused_with_its_place(encode):
    dialogue = {"question": "头痛怎么办？", "answer": "请就诊。", "keywords": ["就诊"]}
    rows, _ = encode(dialogue, PUBLISHED["CMB"])
    assert [json.loads(row["record"]).get("answer") for row in rows] == [None, "B"]
    assert json.loads(rows[0]["record"]) == {"reference": "请就诊。", "keywords": ["就诊"]}
    with pytest.raises(UserError, match=r"prompts.jsonl:1: no answer: .*--rewards exam needs .*\n.*--on_bad_data drop"):
        encode(dialogue, PUBLISHED["CMB"], needed_keys=["answer"])
    with pytest.raises(UserError, match=r"prompts.jsonl:2: no reference: "):
        encode(dialogue, PUBLISHED["CMB"], needed_keys=["reference"])


def test_convert_counts_what_it_leaves_out_and_keeps_what_is_said_beside(tmp_path, write_jsonl, capsys):
    several = {"question": "哪些抗凝？", "option": OPTIONS, "answer": "BC"}
    twice = {"question": "哪种抗凝？", "option": OPTIONS | {"D": "肝素"}, "answer": "B"}
    file = write_jsonl("exam.jsonl", [PUBLISHED["CMB"] | {"system": "你是药师。"}, several, twice])
    output = tmp_path / "train.jsonl"
    convert(["--input", str(file), "--output", str(output), "--format", "sft"])
    (record,) = map(json.loads, output.read_text(encoding="utf-8").splitlines())
    assert record["system"] == "你是药师。"
    out = capsys.readouterr().out
    assert "kept 1 of 3 (1 several right answers, 1 broken exam question (same options))" in out
    assert "1 exam questions, asked as in evaluation (letter)" in out
