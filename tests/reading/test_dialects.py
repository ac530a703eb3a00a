"""Forms of records and turns: names of roles, both sides in one object, transcripts, pairs, prompts, documents."""

import json

import pytest
from convert_data_format import main as convert_main
from convert_to_pretrain_format import main as convert_to_text
from hypothesis import given
from hypothesis import strategies as st
from reading_cases import assistant, gpt, human, reason, system, user

from medtune.errors import Unusable, UserError
from medtune.reading.conversations import to_dialogue, to_document, to_pair, to_prompt
from medtune.reading.foreign_forms import Columns, ForeignReader, known_roles, rows_of
from medtune.reading.guide_form import guide_record
from medtune.reading.keys import Reading
from medtune.reading.readers import load_prompts, read_documents
from medtune.reading.turns import ROLES, turns_of_transcript

TURNS = [user("失眠怎么办？"), assistant("规律作息。")]


def converted(tmp_path, records: object, kind: str = "sft", *flags: str) -> list[dict]:
    """What scripts/convert_data_format.py writes for a file of these records; a string is the file's text."""
    path, output = tmp_path / "raw.json", tmp_path / "out.jsonl"
    path.write_text(records if isinstance(records, str) else json.dumps(records), encoding="utf-8")
    convert_main(["--input", str(path), "--output", str(output), "--format", kind, "--overwrite", *flags])
    return [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]


# ---------------------------------------------------------------- roles

ASKS, ANSWERS = ([name for name, role in ROLES.items() if role == wanted] for wanted in ("user", "assistant"))


@pytest.mark.parametrize(
    ("asks", "answers"),
    [
        *((name, "gpt") for name in [*ASKS, "Human", "USER ", " 患者"]),
        *(("human", name) for name in [*ANSWERS, "ChatGPT", "Bot "]),
    ],
)
def test_roles_have_many_names(asks, answers):
    record = {"conversations": [{"from": asks, "value": "失眠怎么办？"}, {"from": answers, "value": "规律作息。"}]}
    assert to_dialogue(record, "d.jsonl:1").messages == TURNS


def test_other_names_are_given_by_a_flag(tmp_path, capsys):
    record = {"conversations": [{"from": "家属", "value": "失眠怎么办？"}, {"from": "药师", "value": "规律作息。"}]}
    assert "scripts/convert_data_format.py --role_map 家属=user says who it is" in reason(to_dialogue, record)
    (written,) = converted(tmp_path, [record], "sft", "--role_map", "家属=user, 药师=assistant")
    assert to_dialogue(written, "d.jsonl:1").messages == TURNS
    with pytest.raises(UserError, match="; --role_map 药师=user says who it is"):
        converted(tmp_path, [record], "sft", "--role_map", "家属=user")
    with pytest.raises(SystemExit):
        converted(tmp_path, [record], "sft", "--role_map", "家属=person")
    assert "'person' is no role" in capsys.readouterr().err
    assert known_roles("a=user,b = tool") == {"a": "user", "b": "tool"}


@pytest.mark.parametrize(
    "call",
    [
        {"role": "tool_call", "content": '{"name": "look", "arguments": {"a": "布洛芬"}}'},
        {"role": "function_call", "content": '{"name": "look", "arguments": {"a": "布洛芬"}}'},
        {"from": "function_call", "value": '{"name": "look", "arguments": "{\\"a\\": \\"布洛芬\\"}"}'},
        {"role": "assistant", "content": None, "function_call": {"name": "look", "arguments": '{"a": "布洛芬"}'}},
        {
            "role": "assistant",
            "tool_calls": [{"function": {"name": "look", "arguments": {"a": "布洛芬"}}, "name": None}],
        },
    ],
)
@pytest.mark.parametrize("tool", ["tool", "tool_response", "observation", "function"])
def test_calls_of_tools_in_all_forms(call, tool):
    turns = [user("能同服吗？"), call, {"role": tool, "content": "风险增加"}, assistant("不建议。")]
    read = to_dialogue({"messages": turns}, "d.jsonl:1").messages
    assert [message["role"] for message in read] == ["user", "assistant", "tool", "assistant"]
    assert read[1]["tool_calls"] == [{"name": "look", "arguments": {"a": "布洛芬"}}]


# ---------------------------------------------------------------- turns


@pytest.mark.parametrize(
    ("asks", "answers"), [("human", "assistant"), ("user", "bot"), ("input", "output"), ("患者", "医生")]
)
@pytest.mark.parametrize("key", ["conversations", "messages"])
def test_both_sides_of_an_exchange_in_one_object(key, asks, answers):
    exchanges = [{asks: "失眠怎么办？", answers: "规律作息。"}, {asks: "要吃药吗？", answers: "先不用。"}]
    read = to_dialogue({key: [{"system": "你是医生。"} | exchanges[0], exchanges[1]]}, "d.jsonl:1").messages
    assert read == [
        system("你是医生。"), *TURNS, user("要吃药吗？"), assistant("先不用。"),
    ]  # fmt: skip
    assert to_dialogue({key: exchanges[0], "system": ""}, "d.jsonl:1").messages == TURNS


def test_an_exchange_with_a_third_text_or_without_one_side_is_refused():
    exchange = {"human": "失眠怎么办？", "assistant": "规律作息。"}
    third = reason(to_dialogue, {"messages": [exchange | {"bot": "喝酒。"}]})
    assert third.startswith("two forms") and third.endswith("--ignore_keys bot reads on without it")
    assert reason(to_dialogue, {"messages": [exchange | {"assistant": None}]}).startswith("null value: turn 1 is null")


@pytest.mark.parametrize(
    "content",
    [
        [{"type": "text", "text": "失眠怎么办？"}],
        [{"type": "text", "value": "失眠"}, {"type": "text", "value": "怎么办？"}],
        [{"text": "失眠怎么办？"}],
        [{"type": "input_text", "text": "失眠怎么办？", "image_url": None}],
    ],
)
def test_parts_of_text(content):
    assert to_dialogue({"messages": [user(content), TURNS[1]]}, "d.jsonl:1").messages == TURNS
    in_parts = [{"role": "user", "parts": content}, {"role": "model", "parts": [{"text": "规律作息。"}]}]
    assert to_dialogue({"messages": in_parts}, "d.jsonl:1").messages == TURNS


@pytest.mark.parametrize("kind", ["image_url", "image", "input_audio", "video", "thinking"])
def test_parts_of_another_kind_are_refused(kind):
    content = [{"type": "text", "text": "看图"}, {"type": kind, kind: "a"}]
    assert reason(to_dialogue, {"messages": [user(content), TURNS[1]]}) == (
        f"not text: turn 1 (user) has parts of type {kind}; only text is trained on"
    )


@pytest.mark.parametrize(
    "record",
    [
        {"messages": {"role": ["user", "assistant"], "content": ["失眠怎么办？", "规律作息。"]}},
        {"conversations": {"from": ["human", "gpt"], "value": ["失眠怎么办？", "规律作息。"]}},
        {"messages": [{"speaker": "患者", "sentence": "失眠怎么办？"}, {"speaker": "医生", "sentence": "规律作息。"}]},
    ],
)
def test_turns_in_other_shapes(record):
    assert to_dialogue(record, "d.jsonl:1").messages == TURNS


EARLIER = [system("你是医生。"), user("腿麻？"), assistant("多久了？")]


@pytest.mark.parametrize("write", [lambda turns: turns, json.dumps, lambda turns: json.dumps(turns, indent=1), str])
def test_turns_in_place_of_a_text_stay_turns(tmp_path, write):
    asked = [*EARLIER, TURNS[0]]
    record = {"question": write(asked), "answer": write([TURNS[1]])}
    assert to_dialogue(record, "d.jsonl:1").messages == [*asked, TURNS[1]]
    assert to_prompt({"prompt": write(asked)}, "d.jsonl:1").messages == asked
    (written,) = converted(tmp_path, [{"prompt": write(asked), "completion": write([TURNS[1]])}])
    assert to_dialogue(written, "d.jsonl:1").messages == [*asked, TURNS[1]]
    pair = {"question": write(asked), "chosen": write([TURNS[1]]), "rejected": "喝酒。"}
    assert to_pair(pair, "d.jsonl:1").messages == asked


def test_turns_are_no_parts_of_a_text():
    said = "is a list of turns; it must be a string"
    assert said in reason(to_dialogue, {"instruction": TURNS, "output": "好。"})
    assert said in reason(to_dialogue, {"messages": [user(TURNS), TURNS[1]]})
    assert said in reason(to_dialogue, {"question": "一", "answer": "二", "system": EARLIER[:1]})


@pytest.mark.parametrize(
    "history",
    [
        [["失眠怎么办？", "规律作息。"]],
        TURNS,
        [{"human": "失眠怎么办？", "assistant": "规律作息。"}],
        json.dumps(TURNS),
    ],
)
def test_history_in_all_forms(history):
    record = {"question": "还有呢？", "answer": "少喝咖啡。", "history": history, "system_prompt": "你是医生。"}
    assert to_dialogue(record, "d.jsonl:1").messages == [
        system("你是医生。"), *TURNS, user("还有呢？"), assistant("少喝咖啡。"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    "record",
    [
        {"turns": TURNS},
        {"data": TURNS},
        {"question": None, "answer": "", "query": "失眠怎么办？", "response": "规律作息。"},
        {"Dialogue": ["病人：失眠怎么办？", "医生：规律作息。"]},
        {"dialog": "['失眠怎么办？', '规律作息。']"},
        {"input": "病人：失眠怎么办？\n医生：", "target": "规律作息。"},
        {"指令": "失眠", "输入": "怎么办？", "输出": "规律作息。"},
        {"questions": "[['失眠怎么办？', '睡不着？']]", "answers": "['规律作息。']"},
        {"dialogue": "患者：失眠怎么办？\n医生：规律作息。"},
        {"instruction": "失眠", "input": "怎么办？", "response": "规律作息。"},
        {"prompt": "失眠怎么办？", "completion": "规律作息。", "label": True},
        {"turns": [{"用户": "失眠怎么办？", "助手": "规律作息。"}]},
    ],
)
def test_forms_of_dialogues_that_the_converter_reads(tmp_path, record):
    (written,) = converted(tmp_path, [record])
    messages = to_dialogue(written, "d.jsonl:1").messages
    assert [messages[0] | {"content": messages[0]["content"].replace("\n", "")}, *messages[1:]] == TURNS


@pytest.mark.parametrize(("key", "name"), [("chat_history", "history"), ("历史", "history"), ("系统", "system")])
def test_earlier_turns_and_system_prompts_by_other_names_are_not_lost(key, name):
    record = {"question": "失眠怎么办？", "answer": "规律作息。"}
    assert reason(to_dialogue, record | {key: "你是医生。"}).endswith(f"is {key!r} meant as {name!r}?")
    assert to_dialogue(record | {key: []}, "d.jsonl:1").messages == TURNS


def test_two_texts_in_one_turn_are_refused():
    turn = {"from": "human", "value": "甲", "role": "user", "content": "乙"}
    assert reason(to_dialogue, {"messages": [turn, TURNS[1]]}).startswith("two forms")
    assert to_dialogue({"messages": [turn | {"content": "甲"}, TURNS[1]]}, "d.jsonl:1").messages[0] == user("甲")


def test_a_system_prompt_is_read_from_where_it_stands_and_two_are_refused():
    prompt = EARLIER[0]
    twice = {"messages": [prompt, *TURNS], "system": "你是医生。", "system_prompt": "你是医生。"}
    assert to_dialogue(twice, "d.jsonl:1").messages == [prompt, *TURNS]
    assert "one in 'system' and one in turn 1" in reason(to_dialogue, twice | {"system": "你是猫。"})
    two = {"messages": TURNS, "system": "你是医生。", "system_prompt": "你是猫。"}
    assert "one in 'system' and one in 'system_prompt'" in reason(to_dialogue, two)


# ---------------------------------------------------------------- transcripts

ASKED = [user("牙疼怎么办？"), assistant("疼多久了？"), user("三天。")]


def transcript(turns: list[dict], asks: str = "Human", answers: str = "Assistant", colon: str = ": ") -> str:
    names = {"user": asks, "assistant": answers}
    return "".join(f"\n\n{names[turn['role']]}{colon}{turn['content']}" for turn in turns)


@pytest.mark.parametrize(
    ("asks", "answers", "colon"),
    [
        ("Human", "Assistant", ": "),
        ("USER", "ASSISTANT", ":"),
        ("患者", "医生", "："),
        ("问", "答", "："),
        ("### Human", "### Assistant", ": "),
        ("**User", "**Bot", ":** "),
    ],
)
def test_a_transcript_in_one_text_becomes_turns(asks, answers, colon):
    names = {"asks": asks, "answers": answers, "colon": colon}
    asked = transcript([*ASKED, assistant("")], **names)
    replies = {"chosen": " 请看口腔科。", "rejected": " 忍着。"}
    expected = to_pair({"prompt": ASKED} | replies, "d.jsonl:1")
    assert to_pair({"prompt": asked} | replies, "d.jsonl:1") == expected
    assert to_pair({"question": asked} | replies, "d.jsonl:1") == expected
    assert to_pair({"instruction": asked, "input": ""} | replies, "d.jsonl:1") == expected
    whole = {key: transcript([*ASKED, assistant(reply.strip())], **names) for key, reply in replies.items()}
    assert to_pair(whole, "d.jsonl:1") == expected
    assert to_pair({"prompt": asked} | whole, "d.jsonl:1") == expected
    assert to_pair({"prompt": ASKED} | whole, "d.jsonl:1") == expected
    dialogue = [*ASKED, assistant("请看口腔科。")]
    assert to_dialogue({"question": asked, "answer": "请看口腔科。"}, "d.jsonl:1").messages == dialogue
    assert to_dialogue({"messages": whole["chosen"]}, "d.jsonl:1").messages == dialogue
    assert to_prompt({"prompt": asked}, "d.jsonl:1").messages == ASKED


@pytest.mark.parametrize(
    "text",
    [
        "Assistant: 这个词是什么意思？",
        "Human: 这个词是什么意思？",
        "患者：男，45岁，咳嗽两周。",
        "下面是对话，请总结。\nHuman: 牙疼\nAssistant: 多久了？",
        "问题：牙疼怎么办？\n答案：看医生。",
        "What does 'Human: hi' mean? Assistant: asked.",
    ],
)
def test_what_only_names_a_speaker_is_one_turn(text):
    assert turns_of_transcript(text) is None
    assert to_pair({"prompt": text, "chosen": "甲", "rejected": "乙"}, "d.jsonl:1").messages == [user(text)]


def test_a_broken_transcript_is_refused():
    twice = "Human: 牙疼\n\nHuman: 三天\n\nAssistant: 看医生"
    answered = transcript([*ASKED, assistant("请看口腔科。")])
    assert reason(to_pair, {"prompt": twice, "chosen": "甲", "rejected": "乙"}).startswith("broken transcript")
    assert reason(to_dialogue, {"question": answered, "answer": "好。"}).startswith("broken transcript")
    kept = f"总结：\n{answered}"
    assert to_dialogue({"question": kept, "answer": "好。"}, "d.jsonl:1").messages[0] == user(kept)
    assert "is a reply without its question" in reason(to_pair, {"chosen": "看医生。", "rejected": "忍着。"})


# Neither blanks at the ends, nor a line that starts with a speaker's name.
WORDS = st.text("牙疼 a1。\n", min_size=1).filter(lambda text: text == text.strip() and text)


@given(st.lists(WORDS, min_size=2, max_size=6))
def test_whatever_is_said_a_transcript_gives_it_back(texts):
    turns = [(user, assistant)[number % 2](text) for number, text in enumerate(texts)]
    assert turns_of_transcript(transcript(turns)) == turns


# ---------------------------------------------------------------- pairs

REPLIES = {"chosen": "先拉伸小腿。", "rejected": "截肢。"}


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "腿抽筋？", "messages": [user("腿抽筋？"), assistant("先拉伸小腿。")],
         "chosen": [user("腿抽筋？"), assistant("先拉伸小腿。")], "rejected": [user("腿抽筋？"), assistant("截肢。")]},
        {"messages": [user("腿抽筋？")], **REPLIES},
        {"messages": [user("腿抽筋？")], "chosen": assistant("先拉伸小腿。"), "rejected": assistant("截肢。")},
        {"messages": [user("腿抽筋？"), assistant("先拉伸小腿。")], **REPLIES},
        {"messages": [user("腿抽筋？"), assistant("先拉伸小腿。")], "rejected_response": "截肢。"},
        {"messages": [user("腿抽筋？"), assistant("先拉伸小腿。")],
         "rejected_messages": [user("腿抽筋？"), assistant("截肢。")]},
        {"conversations": [human("腿抽筋？"), gpt("先拉伸小腿。")],
         "rejected_response": "截肢。"},
        {"conversations": [human("腿抽筋？")], "chosen": gpt("先拉伸小腿。"),
         "rejected": gpt("截肢。")},
    ],
)  # fmt: skip
def test_usual_forms_of_pairs(tmp_path, record):
    scored = record | {"score_chosen": 8.5, "score_rejected": 2.0}
    for written in (record, *converted(tmp_path, [record], "dpo")):
        pair = to_pair(written, "d.jsonl:1")
        assert (pair.messages, pair.chosen, pair.rejected) == ([user("腿抽筋？")], "先拉伸小腿。", "截肢。")
    assert to_pair(scored, "d.jsonl:1").margin == 6.5
    assert reason(to_dialogue, record).startswith("preference pair")


@pytest.mark.parametrize(
    "record",
    [
        {"query": "腿抽筋？", "response": "先拉伸小腿。", "rejected_response": "截肢。"},
        {"instruction": "腿抽筋？", "output": "先拉伸小腿。", "rejected": "截肢。"},
        {"Prompt": "腿抽筋？", "Chosen": "先拉伸小腿。", "Rejected": "截肢。"},
        {"input": "腿抽筋？", "chosen": "先拉伸小腿。", "rejected": "截肢。"},
    ],
)
def test_forms_of_pairs_that_the_converter_reads(tmp_path, record):
    (pair,) = converted(tmp_path, [record], "dpo")
    assert (pair["question"], pair["response_chosen"], pair["response_rejected"]) == ("腿抽筋？", *REPLIES.values())


@pytest.mark.parametrize("text", ["Human: 痛\n\nAssistant: 看", "User: 一\nUser: 二\nAI: 三", '[{"role": "user"'])
def test_a_text_that_looks_like_turns_is_written_so_that_it_stays_one(text):
    asked, replied = [user(text)], [assistant(text), assistant("别的")]
    for pair in (
        to_pair({"messages": asked, "chosen": assistant("好"), "rejected": assistant("别的")}, "d.jsonl:1"),
        to_pair({"messages": [user("一")], **dict(zip(REPLIES, replied, strict=True))}, "d.jsonl:1"),
        to_pair({"messages": [user("一")], **dict(zip(REPLIES, replied[::-1], strict=True))}, "d.jsonl:1"),
    ):
        assert text in (pair.messages[0]["content"], pair.chosen, pair.rejected)
        assert to_pair(guide_record(pair), "d.jsonl:1") == pair


def test_conversations_that_do_not_hold_the_prompt_are_refused():
    whole = {key: [user("腿抽筋？"), assistant(key)] for key in ("chosen", "rejected")}
    assert reason(to_pair, {"prompt": "头疼？"} | whole).startswith("two prompts")


def test_what_stands_before_the_prompt_of_a_pair_is_not_lost():
    asked, whole = user("腿抽筋？"), {key: [user("腿抽筋？"), assistant(text)] for key, text in REPLIES.items()}
    assert to_pair({"prompt": [EARLIER[0], asked], **whole}, "d.jsonl:1").messages == [EARLIER[0], asked]
    history = {"history": [["腿麻？", "多久了？"]]}
    assert to_pair({"prompt": [asked], **REPLIES, **history}, "d.jsonl:1").messages == [*EARLIER[1:], asked]
    assert reason(to_pair, {"prompt": "腿抽筋？", **whole, **history}).startswith("two prompts")
    assert reason(to_pair, {"messages": [asked], **REPLIES, **history}).startswith("two forms")


@pytest.mark.parametrize("mark", [{"label": False}, {"weight": 0}])
def test_a_chosen_reply_that_is_marked_as_bad_is_refused(mark):
    asked, (chosen, rejected) = user("腿抽筋？"), map(assistant, REPLIES.values())
    for record in (
        {"prompt": "腿抽筋？", "chosen": chosen | mark, "rejected": rejected},
        {"chosen": [asked, chosen | mark], "rejected": [asked, rejected]},
        {"messages": [asked, chosen | mark], "rejected_response": "截肢。"},
    ):
        assert reason(to_pair, record).startswith("not to be learned")
    pair = {"prompt": "腿抽筋？", "chosen": chosen, "rejected": rejected | mark}
    assert to_pair(pair, "d.jsonl:1").rejected == "截肢。"


# ---------------------------------------------------------------- columns that are named

BY_COLUMNS = Columns(question=("主诉", "病史"), answer="医嘱")


def test_beside_columns_that_are_named_nothing_is_lost():
    def read(**others: object):
        reader = ForeignReader("dialogues", BY_COLUMNS, reading=Reading(()))
        return reader.convert(
            {"主诉": "失眠", "病史": float("nan"), "医嘱": "规律作息。", **others}, "d:1"
        ), reader.describe()

    noted, found = read(科室="内科", 答案="别的", functions=[{"name": "f"}], system_prompt="你是医生。")
    assert noted.messages == [EARLIER[0], user("失眠"), TURNS[1]]
    assert noted.tools == [{"name": "f"}]
    assert found == ["keys of records that are not read: '科室' (1)"]
    thinking, _ = read(思考="先想。")
    assert thinking.messages[-1]["content"] == f"<think>\n先想。\n</think>\n\n{TURNS[1]['content']}"
    for lost in ({"历史": [["a", "b"]]}, {"图片": "a.png"}):
        with pytest.raises(Unusable):
            read(**lost)


def test_faults_name_the_columns_of_the_file():
    with pytest.raises(Unusable) as refused:
        ForeignReader("dialogues", BY_COLUMNS).convert({"主诉": "失眠", "病史": "", "医嘱": None}, "d:1")
    assert refused.value.detail.startswith("'医嘱' is null")
    with pytest.raises(Unusable) as refused:
        ForeignReader("dialogues").convert({"chat": {"turn_1": {}}}, "d:1")
    assert refused.value.detail.startswith("'chat' is an object")


# ---------------------------------------------------------------- columns and lists of wordings


def test_one_of_the_wordings_of_a_question_is_taken(tmp_path):
    records = [
        {"questions": [["荨麻疹有哪些症状？", "得了荨麻疹会怎样？"]], "answers": ["皮肤出现风团。"]},
        {"questions": [["甲亢要忌口吗？"], ["甲亢饮食注意什么？"]], "answers": ["减少高碘食物。", "遵医嘱。"]},
    ]
    written = [[turn["value"] for turn in record["conversations"]] for record in converted(tmp_path, records)]
    assert written == [
        ["荨麻疹有哪些症状？", "皮肤出现风团。"],
        ["甲亢要忌口吗？", "减少高碘食物。"],
        ["甲亢饮食注意什么？", "遵医嘱。"],
    ]


@pytest.mark.parametrize(
    "columns",
    [
        {"question": ["一？", "二？"], "answer": ["甲。", "乙。"]},
        {"question": {"0": "一？", "1": "二？"}, "answer": {"0": "甲。", "1": "乙。"}, "id": {"0": 7, "1": 8}},
        {"instruction": ["一？", "二？"], "input": ["", ""], "output": ["甲。", "乙。"], "source": "book"},
    ],
)
def test_columns_of_lists_are_records(tmp_path, columns):
    written = [[turn["value"] for turn in record["conversations"]] for record in converted(tmp_path, [columns])]
    assert written == [["一？", "甲。"], ["二？", "乙。"]]


@pytest.mark.parametrize(
    "record",
    [
        {"messages": TURNS},
        {"prompt": [user("一")], "chosen": [assistant("二")], "rejected": [assistant("三")]},
        {"question": "一", "answer": "二", "history": [["三", "四"]]},
        {"question": ["一", "二"], "answer": ["三"]},
        "一",
    ],
)
def test_what_is_one_record_stays_one(record):
    assert rows_of(record) is None


def test_a_row_of_columns_is_named(tmp_path):
    path = tmp_path / "d.json"
    path.write_text(json.dumps([{"question": ["一？", "二？"], "answer": ["甲。", ""]}]), encoding="utf-8")
    *_, bad = ForeignReader("dialogues").read([path])
    assert str(bad).startswith(f"{path}:1 (row 2): empty reply")


# ---------------------------------------------------------------- prompts without a reply


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "头晕怎么办？"},
        {"prompt": [user("头晕怎么办？")]},
        {"question": "头晕怎么办？"},
        {"question": "头晕怎么办？", "answer": ""},
        {"instruction": "头晕怎么办？", "input": "", "output": ""},
        {"instruction": "头晕怎么办？", "output": None},
        {"messages": [user("头晕怎么办？")]},
        {"messages": [user("头晕怎么办？"), assistant("")]},
        {"conversations": [human("头晕怎么办？")]},
        {"conversation": [{"input": "头晕怎么办？", "output": ""}]},
    ],
)
def test_a_prompt_needs_no_reply(record):
    assert to_prompt(record, "d.jsonl:1").messages == [user("头晕怎么办？")]
    with pytest.raises(Unusable):
        to_dialogue(record, "d.jsonl:1")


def test_what_judges_a_reply_does_not_matter_for_a_prompt():
    record = {"messages": [user("一"), assistant("二") | {"weight": 0}, user("三"), assistant("四")], "label": False}
    assert to_prompt(record, "d.jsonl:1").messages == [user("一"), assistant("二"), user("三"), assistant("四")]


def test_prompts_out_of_order_are_refused(write_jsonl):
    path = write_jsonl("d.jsonl", [{"messages": [user("一"), user("二")]}])
    with pytest.raises(UserError, match="two turns in a row") as refused:
        load_prompts([path], None)
    assert "--on_bad_data" not in str(refused.value)


# ---------------------------------------------------------------- texts for pretraining


@pytest.mark.parametrize(
    "record",
    [
        {"conversation": [{"input": "", "output": "高血压应限盐。"}]},
        {"conversation": [{"system": "", "input": "", "output": "高血压应限盐。"}]},
        {"messages": [assistant("高血压应限盐。")]},
        {"conversations": [gpt("高血压应限盐。")]},
        {"instruction": "", "input": "", "output": "高血压应限盐。"},
        {"text": "高血压应限盐。"},
    ],
)
def test_a_reply_to_nothing_is_a_document(tmp_path, write_jsonl, record):
    path, output = write_jsonl("d.jsonl", [record]), tmp_path / "out.txt"
    assert [document.text for document in read_documents([path])] == ["高血压应限盐。"]
    convert_to_text(["--input_file", str(path), "--output_file", str(output)])
    assert output.read_text(encoding="utf-8") == "高血压应限盐。\n"


@pytest.mark.parametrize(
    "record",
    [
        {"messages": [assistant("高血压应限盐。") | {"loss": False}]},
        {"messages": [assistant("高血压应限盐。")], "images": ["a.png"]},
        {"instruction": "", "output": "高血压应限盐。", "label": False},
    ],
)
def test_a_reply_to_nothing_is_no_document_where_it_is_not_learned(record):
    with pytest.raises(Unusable):
        to_document(record, "d.jsonl:1", Reading(()))


def test_what_is_not_learned_and_words_for_null_do_not_get_into_a_text(tmp_path, write_jsonl):
    bad_reply = {"messages": [TURNS[0], TURNS[1] | {"weight": 0}, *TURNS]}
    records = [bad_reply, {"text": "nan"}, {"content": "NaN"}, {"title": "nan", "content": "高血压应限盐。"}]
    path, output = write_jsonl("d.jsonl", records), tmp_path / "out.txt"
    convert_to_text(["--input_file", str(path), "--output_file", str(output)])
    assert output.read_text(encoding="utf-8") == "高血压应限盐。\n"


def test_a_dialogue_is_no_document():
    assert reason(to_document, {"messages": TURNS}).startswith("no text")


# ---------------------------------------------------------------- advice


def test_advice_guesses_no_key_that_is_far():
    assert "meant as" not in reason(to_dialogue, {"version": "1.0", "data": [1]})
    assert "meant as" not in reason(to_dialogue, {"conversation_id": "1", "question_id": 2, "chat": []})
    assert "is 'anwser' meant as 'answer'?" in reason(to_dialogue, {"question": "一", "anwser": "二"})
    assert reason(to_dialogue, {"question": "一"}).endswith("let a model answer by inference.py --data_file")
    assert reason(to_dialogue, {"prompt": "一", "completion": "二"}).endswith("convert_data_format.py reads more forms")
