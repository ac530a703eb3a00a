"""Keys beside the texts: what changes what is learned is honoured or refused, what is about a record is not read."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reading_cases import assistant, gpt, human, reason, user

from medtune.errors import Unusable, UserError
from medtune.reading.conversations import to_dialogue, to_document, to_pair, to_prompt
from medtune.reading.foreign_forms import ForeignReader
from medtune.reading.guide_form import guide_record
from medtune.reading.keys import HARMLESS, MEDIA, OPTIONS, THOUGHTS, VERDICTS, WEIGHTS, Reading, split_keys
from medtune.reading.readers import load_dialogues

QUESTION = {"question": "被猫抓伤怎么办？", "answer": "先用肥皂水冲洗，再去医院。"}
PAIR = {"question": "牙疼怎么办？", "response_chosen": "看口腔科。", "response_rejected": "忍着。"}
TURNS = [user("头晕怎么办？"), assistant("先坐下。")]
MESSAGES = {"messages": TURNS}


def fault(make, record: dict) -> str:
    """The reason alone."""
    return reason(make, record).partition(":")[0]


def read_without(make, record: dict, *keys: str):
    """A record as a file's reader reads it with `--ignore_keys`."""
    reading = Reading(keys)
    return make(reading.without_ignored(record), "d.jsonl:1", reading)


def with_reply(**keys: object) -> dict:
    """A dialogue of two exchanges, of which the first reply has these keys."""
    return {"messages": [TURNS[0], TURNS[1] | keys, user("还晕。"), TURNS[1]]}


# ---------------------------------------------------------------- verdicts


@pytest.mark.parametrize("record", [QUESTION, MESSAGES, PAIR], ids=["question", "messages", "pair"])
@pytest.mark.parametrize("key", VERDICTS)
@pytest.mark.parametrize("value", [False, "false", "False"])
def test_a_reply_that_is_called_bad_is_not_learned(record, key, value):
    make = to_pair if record is PAIR else to_dialogue
    refused = reason(make, record | {key: value})
    advice = f"delete the record, or --ignore_keys {key} reads on without it"
    assert refused.startswith(f"not to be learned: {key!r} is {value!r}; {advice}")
    assert ("--loss_type kto" in refused) == (key in ("label", "kto_tag"))
    assert read_without(make, record | {key: value}, key)


@pytest.mark.parametrize("key", VERDICTS)
@pytest.mark.parametrize("value", [True, "true", "神经科", "positive", 3, None, "", float("nan"), ["a"]])
def test_a_good_reply_and_a_topic_are_learned(key, value):
    assert to_dialogue(QUESTION | {key: value}, "d.jsonl:1", Reading(()))


@pytest.mark.parametrize("key", ["kto_tag", "is_correct"])
@pytest.mark.parametrize(("value", "is_learned"), [(0, False), (1, True), ("0", False), ("1", True), (0.0, False)])
def test_numbers_are_a_verdict_under_two_names(key, value, is_learned):
    if is_learned:
        assert to_dialogue(QUESTION | {key: value}, "d.jsonl:1", Reading(()))
    else:
        assert fault(to_dialogue, QUESTION | {key: value}) == "not to be learned"


@pytest.mark.parametrize("value", [0, 1, "0", "1", 1.0])
def test_a_label_of_0_or_1_asks(value):
    refused = reason(to_dialogue, QUESTION | {"label": value})
    assert refused.startswith("unclear verdict: ") and "--ignore_keys label" in refused
    assert read_without(to_dialogue, QUESTION | {"label": value}, "label")
    # A text has a class, and nothing that could be a bad reply.
    assert to_document({"text": "高血压应限盐。", "label": value}, "d.jsonl:1", Reading(()))


# ---------------------------------------------------------------- weights


@pytest.mark.parametrize("key", WEIGHTS)
@pytest.mark.parametrize("value", [0, 0.0, False, "0", "false"])
def test_a_reply_of_weight_0_stays_in_the_dialogue_and_is_not_learned(key, value):
    dialogue = to_dialogue(with_reply(**{key: value}), "d.jsonl:1", Reading(()))
    assert [message.get("weight") for message in dialogue.messages] == [None, 0, None, None]
    assert to_dialogue(guide_record(dialogue), "d.jsonl:1").messages == dialogue.messages
    in_sharegpt = {
        "conversations": [human("头晕？"), gpt("先坐下。", **{key: value}), human("还晕。"), gpt("看医生。")]
    }
    assert to_dialogue(in_sharegpt, "d.jsonl:1", Reading(())).messages[1]["weight"] == 0
    ignored = read_without(to_dialogue, in_sharegpt, key)
    assert all("weight" not in message for message in ignored.messages)


@pytest.mark.parametrize("key", WEIGHTS)
@pytest.mark.parametrize("value", [1, 1.0, True, "true", None])
def test_a_reply_of_weight_1_is_learned_like_any(key, value):
    assert to_dialogue(with_reply(**{key: value}), "d.jsonl:1").messages == to_dialogue(with_reply(), "").messages


@pytest.mark.parametrize(
    ("record", "refused_as"),
    [
        *((with_reply(weight=value), "partial weight") for value in (0.5, 2, -1, "half")),
        *((QUESTION | {"weight": value}, "not to be learned") for value in (0, "0", "0.0", False, "False")),
        *((QUESTION | keys, "not to be learned") for keys in ({"loss_weight": 0}, {"train": False})),
        ({"messages": [TURNS[0], TURNS[1] | {"weight": 0}]}, "not to be learned"),
        ({"messages": [TURNS[0] | {"train": True}, TURNS[1]]}, "weight of a prompt"),
    ],
)
def test_a_weight_that_leaves_nothing_to_learn_or_cannot_be_honoured_is_refused(record, refused_as):
    assert fault(to_dialogue, record) == refused_as


def test_a_weight_of_a_prompt_that_does_not_ask_for_it_to_be_learned_does_no_harm():
    for keys in ({"train": False}, {"weight": 0}, {"weight": 1}):
        assert to_dialogue({"messages": [TURNS[0] | keys, TURNS[1]]}, "d.jsonl:1").messages == TURNS


def test_a_verdict_on_one_reply_keeps_it_from_being_learned():
    dialogue = to_dialogue(with_reply(label=False), "d.jsonl:1")
    assert [message.get("weight") for message in dialogue.messages] == [None, 0, None, None]


@pytest.mark.parametrize(
    "measured",
    [{"loss": 0.7}, {"loss": 0}, {"weight": 65}, {"weight": "65.5"}, {"weight": "nan"}, {"training": "3 months"}],
)
def test_a_measurement_beside_a_record_is_no_weight(measured):
    assert to_dialogue(QUESTION | measured, "d.jsonl:1") == to_dialogue(QUESTION, "d.jsonl:1")


# ---------------------------------------------------------------- thoughts


@pytest.mark.parametrize("key", [*THOUGHTS, "Complex_CoT"])
@pytest.mark.parametrize("value", ["先想原因。", [{"type": "thinking", "thinking": "先想原因。"}]])
def test_a_thought_in_a_key_of_its_own_is_read_before_the_reply(key, value):
    for record in (QUESTION | {key: value}, with_reply(**{key: value})):
        answer, reading = read_without(to_dialogue, record, key).messages[1]["content"], Reading(())
        reply = to_dialogue(record, "d.jsonl:1", reading).messages[1]["content"]
        assert reply == f"<think>\n先想原因。\n</think>\n\n{answer}"
        assert reading.thoughts_apart == f"thoughts of replies in a key of their own ({key!r}): 1"
    chosen = assistant("看口腔科。", **{key: value})
    pair = {"prompt": [TURNS[0]], "chosen": [chosen], "rejected": [assistant("忍着。")]}
    assert to_pair(pair, "d.jsonl:1").chosen == "<think>\n先想原因。\n</think>\n\n看口腔科。"


@pytest.mark.parametrize("value", [None, "", [], False, True, "on", "off"])
def test_no_thought_and_the_mode_of_thinking_are_no_thoughts(value):
    assert to_dialogue(QUESTION | {"thinking": value}, "d.jsonl:1")
    assert to_dialogue(with_reply(reasoning_content=value), "d.jsonl:1")


# ---------------------------------------------------------------- pictures


@pytest.mark.parametrize("key", MEDIA)
def test_a_record_with_a_picture_is_refused_everywhere(key):
    picture = {key: ["a.png"]}
    for make, record in (
        (to_dialogue, QUESTION | picture),
        (to_dialogue, {"messages": [TURNS[0] | picture, TURNS[1]]}),
        (to_pair, PAIR | picture),
        (to_document, {"text": "胸片正常。"} | picture),
        (to_prompt, {"question": "胸片正常吗？"} | picture),
    ):
        refused = reason(make, record)
        assert refused.startswith("not text: ") and f"--ignore_keys {key}" in refused
        assert read_without(make, record, key)
    assert to_dialogue(QUESTION | {key: []}, "d.jsonl:1")


@pytest.mark.parametrize("mark", ["<image>", "<IMAGE>", "<image_1>", "<|image_pad|>", "<video>", "<img src='a.png'>"])
def test_the_mark_of_a_picture_is_counted(mark):
    reading = Reading(())
    assert to_dialogue({"question": f"{mark}\n请描述胸片。", "answer": "右下肺斑片影。"}, "d.jsonl:7", reading)
    assert reading.lines()[0].endswith("of which only this word is learned: 1, the first in d.jsonl:7")


@pytest.mark.parametrize("text", ["图像 image", "<imagine>", "a < image > b", "<b>image</b>"])
def test_what_is_no_mark_is_not_counted(text):
    reading = Reading(())
    assert to_dialogue({"question": text, "answer": "b"}, "d.jsonl:1", reading)
    assert reading.lines() == []


# ---------------------------------------------------------------- options

WITH_OPTIONS = "哪种药要查INR？\nA. 阿司匹林\nB. 华法林"


@pytest.mark.parametrize(
    "options",
    [
        {"options": {"A": "阿司匹林", "B": "华法林"}},
        {"option": {"A": "阿司匹林", "B": "华法林", "C": None}},
        {"options": ["阿司匹林", "华法林"]},
        {"choices": ["A. 阿司匹林", "B、华法林"]},
        {"options": [{"key": "A", "value": "阿司匹林"}, {"key": "B", "value": "华法林"}]},
        {"choices": {"text": ["阿司匹林", "华法林"], "label": ["A", "B"]}},
        {"options": "{'A': '阿司匹林', 'B': '华法林'}"},
        {"options": '{"A": "阿司匹林", "B": "华法林"}'},
        {"options": "A. 阿司匹林\nB. 华法林"},
        {"options": "A 阿司匹林\nB 华法林"},
        {"options": ["a. 阿司匹林", "b. 华法林"]},
        {"options": [{"A": "阿司匹林"}, {"B": "华法林"}]},
        {"选项": ["阿司匹林", "华法林"]},
        {"opa": "阿司匹林", "opb": "华法林"},
        {"A": "阿司匹林", "B": "华法林", "C": ""},
        {"Choice A": "阿司匹林", "Choice B": "华法林"},
        {"option_b": "华法林", "option_a": "阿司匹林"},
    ],
    ids=lambda options: json.dumps(options, ensure_ascii=False)[:30],
)
def test_the_options_of_a_question_are_learned_with_it(options):
    exam = {"question": "哪种药要查INR？", "answer": "华法林", "answer_idx": "B"} | options
    assert to_dialogue(exam, "d.jsonl:1").messages[0]["content"] == WITH_OPTIONS
    pair = {"question": "哪种药要查INR？", "response_chosen": "华法林", "response_rejected": "水"} | options
    assert to_pair(pair, "d.jsonl:1").messages[0]["content"] == WITH_OPTIONS
    assert to_prompt({"question": "哪种药要查INR？"} | options, "d.jsonl:1").messages[0]["content"] == WITH_OPTIONS
    asked = to_dialogue(exam | {"question": WITH_OPTIONS}, "d.jsonl:1")
    assert asked.messages[0]["content"] == WITH_OPTIONS, "options that stand in the question stay once"


def test_names_of_germs_are_no_letters_of_options():
    germs = ["E. coli", "S. aureus"]
    asked = to_dialogue({"question": "哪种？", "answer": "E. coli", "options": germs}, "d.jsonl:1").messages[0]
    assert asked["content"] == "哪种？\nA. E. coli\nB. S. aureus"


@pytest.mark.parametrize("options", [[["A", "甲"], ["B", "乙"]], [{"name": "甲"}], 5, {"A": {"text": "甲"}}])
def test_options_in_an_unknown_form_are_refused(options):
    assert fault(to_dialogue, QUESTION | {"options": options}) == "broken options"


def test_options_that_no_turn_says_are_refused_beside_a_list_of_turns():
    apart = MESSAGES | {"options": ["甲药", "乙药"]}
    assert fault(to_dialogue, apart) == "options apart"
    assert read_without(to_dialogue, apart, "options")
    said = {"messages": [user("选甲药还是乙药？"), TURNS[1]], "options": ["甲药", "乙药"]}
    assert to_dialogue(said, "d.jsonl:1").messages == said["messages"]


# ---------------------------------------------------------------- two forms in one record


@pytest.mark.parametrize(
    ("record", "other"),
    [
        (MESSAGES | {"history": [["早先的问题", "早先的回答"]]}, "history"),
        (MESSAGES | {"conversations": [human("别的"), gpt("话")]}, "messages"),
        (QUESTION | {"instruction": "请翻译。"}, "instruction"),
        (QUESTION | {"conversation": [{"human": "别的", "assistant": "话"}]}, "conversation"),
        (QUESTION | {"input": "病历：男，45岁。"}, "input"),
        (QUESTION | {"Question": "Which nerve?", "Response": "The ulnar."}, "Question,Response"),
        (
            QUESTION | {"Question": "Which nerve?", "Complex_CoT": "Let me think.", "Response": "The ulnar."},
            "Question,Response,Complex_CoT",
        ),
        (QUESTION | {"prompt": "Which nerve?", "completion": "The ulnar."}, "prompt,completion"),
    ],
)
def test_words_of_another_form_are_not_lost(record, other):
    refused = reason(to_dialogue, record)
    assert refused.startswith("two forms: ") and f"--ignore_keys {other} reads on without" in refused
    assert read_without(to_dialogue, record, *other.split(","))


def test_advice_to_read_another_form_is_given_where_there_is_a_whole_one():
    half = MESSAGES | {"history": [["早先的问题", "早先的回答"]]}
    assert "--ignore_keys messages" not in reason(to_dialogue, half)
    whole = MESSAGES | {"instruction": "问", "output": "答"}
    assert "--ignore_keys messages reads on without it" in reason(to_dialogue, whole)
    assert read_without(to_dialogue, whole, "messages")
    lower = {"question": "一", "answer": "B", "complex_cot": "想", "response": "二"}
    assert "convert_data_format.py --ignore_keys answer reads on" in reason(to_dialogue, lower)
    reader = ForeignReader("dialogues", reading=Reading(("answer",), thoughts="leave_out"))
    assert reader.convert(lower, "d.jsonl:1").messages[1]["content"] == "二"


@pytest.mark.parametrize(
    "copy",
    [
        {"question": "头晕怎么办？"},
        {"question": "头晕怎么办？", "answer": "先坐下。"},
        {"conversations": [human("头晕怎么办？"), gpt("先坐下。")]},
        {"conversations": None, "instruction": "", "output": float("nan"), "history": []},
        {"answer": "(B)", "prompt": "头晕怎么办？"},
    ],
)
def test_a_copy_in_another_form_and_an_empty_one_do_no_harm(copy):
    assert to_dialogue(MESSAGES | copy, "d.jsonl:1").messages == TURNS


def test_thoughts_beside_exam_columns_are_found_once_the_exam_is_ignored(tmp_path):
    record = {
        "question": "Which structure?", "options": "{'A': 'A', 'B': 'B'}", "answer_idx": "B", "answer": "B",
        "Question": "Which muscle?", "Complex_CoT": "Let me think.", "Response": "The sphincter.",
    }  # fmt: skip
    path = tmp_path / "o1.json"
    path.write_text(json.dumps([record]), encoding="utf-8")
    (refused,) = ForeignReader("dialogues", reading=Reading(())).read([path])
    assert refused.reason == "two forms"
    assert "--ignore_keys question,answer,options reads on without them" in refused.detail
    reader = ForeignReader("dialogues", reading=Reading(("question", "answer", "options")))
    (dialogue,) = reader.read([path])
    assert dialogue.messages[1]["content"] == "<think>\nLet me think.\n</think>\n\nThe sphincter."


# ---------------------------------------------------------------- tools


def test_tools_of_a_pair_are_kept():
    tools = [{"name": "get_weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}]
    pair = to_pair(PAIR | {"tools": json.dumps(tools)}, "d.jsonl:1")
    assert pair.tools == tools
    assert to_pair(guide_record(pair), "d.jsonl:1") == pair


# ---------------------------------------------------------------- all keys


def test_a_thought_that_the_reply_says_too_does_no_harm():
    said = QUESTION | {"answer": "<think>\n先问痰。\n</think>\n\n有痰吗？"}
    assert to_dialogue(said | {"reasoning_content": "先问痰。\n"}, "d.jsonl:1").messages[1]["content"] == said["answer"]
    assert to_dialogue({"messages": [TURNS[0], TURNS[1] | {"thinking": "先坐下。"}]}, "d.jsonl:1").messages == TURNS
    assert fault(to_dialogue, said | {"reasoning_content": "再问热。"}) == "two thoughts"


def test_a_key_has_one_meaning():
    tables = [VERDICTS, WEIGHTS, THOUGHTS, MEDIA, OPTIONS, HARMLESS]
    names = [name for table in tables for name in table]
    assert sorted(names) == sorted(set(names))


@pytest.mark.parametrize(
    ("key", "value"),
    [("isCorrect", False), ("is-correct", "0"), ("reasoningContent", {"a": 1}), ("Image Path", "a.png")],
)
def test_marks_and_capitals_in_a_name_do_not_matter(key, value):
    assert fault(to_dialogue, QUESTION | {key: value})


@pytest.mark.parametrize(("value", "is_learned"), [("是", True), ("否", False), (0, False), (1, True)])
def test_a_verdict_in_chinese(value, is_learned):
    record = QUESTION | {"是否正确": value}
    assert to_dialogue(record, "d.jsonl:1") if is_learned else fault(to_dialogue, record)


def test_unknown_keys_are_counted_by_name_and_harmless_ones_are_not(write_jsonl):
    records = [QUESTION | {"id": n, "source": "a", "科室": "内科"} for n in range(3)]
    records[0]["triage"] = "green"
    records.append({"messages": [TURNS[0] | {"name": "甲", "mood": "calm"}, TURNS[1]]})
    dialogues, report = load_dialogues([write_jsonl("d.jsonl", records)])
    assert len(dialogues) == 4
    assert report.notes == [
        "keys of records that are not read: '科室' (3), 'triage' (1)",
        "keys of turns that are not read: 'mood' (1)",
    ]


def test_advice_names_keys_as_they_are_written(write_jsonl):
    path = write_jsonl("d.jsonl", [{"Question": "一", "Answer": "二", "LABEL": False}])
    (refused,) = ForeignReader("dialogues", reading=Reading(())).read([path])
    assert "--ignore_keys LABEL reads on without it" in refused.detail
    (dialogue,) = ForeignReader("dialogues", reading=Reading(("LABEL",))).read([path])
    assert dialogue.messages[1]["content"] == "二"


def test_advice_names_no_flag_that_the_caller_does_not_have(write_jsonl):
    path = write_jsonl("d.jsonl", [QUESTION | {"images": ["a.png"]}])
    with pytest.raises(UserError) as refused:
        load_dialogues([path], None)
    assert "--" not in str(refused.value).replace(str(path), "")
    assert "take 'images' out of the record" in str(refused.value)


def test_ignored_keys_are_split_at_commas():
    assert split_keys(" label, images,,label") == ("images", "label")
    assert split_keys(None) == ()


VALUES = st.one_of(st.none(), st.booleans(), st.integers(-2, 3), st.floats(), st.text(max_size=5), st.lists(st.text()))
KEYS = st.sampled_from([*VERDICTS, *WEIGHTS, *THOUGHTS, *MEDIA, *OPTIONS, *sorted(HARMLESS)[:40], "unheard_of"])


@settings(max_examples=100, deadline=None)
@given(
    st.dictionaries(KEYS, VALUES, max_size=4), st.sampled_from([QUESTION, MESSAGES, PAIR, {"text": "高血压应限盐。"}])
)
def test_whatever_stands_beside_the_texts_they_are_learned_as_they_are_or_refused(extra, record):
    """No other text is ever learned, but options and thoughts; and ignoring all of it reads the record as it is."""
    make = to_pair if record is PAIR else to_document if "text" in record else to_dialogue
    plain = make(record, "d.jsonl:1", Reading(()))
    assert read_without(make, record | extra, *extra) == plain
    try:
        read = make(record | extra, "d.jsonl:1", Reading(()))
    except Unusable as refused:
        assert any(key in refused.detail or repr(value) in refused.detail for key, value in extra.items()) or (
            refused.reason == "broken options"
        )
    else:
        if not set(extra) & {*OPTIONS, *THOUGHTS}:
            assert read == plain


def test_bad_records_are_left_out_and_counted_by_reason(write_jsonl):
    records = [QUESTION, QUESTION | {"label": False}, QUESTION | {"image": "a.png"}]
    records += [QUESTION | {"reasoning": "嗯。", "thought": "哦。"}]
    dialogues, report = load_dialogues([write_jsonl("d.jsonl", records)], "drop", Reading(()))
    assert len(dialogues) == 1
    assert report.dropped == {"not to be learned": 1, "not text": 1, "two thoughts": 1}
