"""Calls of tools: what each template writes of one is learned, and read again whole, in pieces and not at all."""

import json

import pytest
from template_cases import (
    A1,
    CALLS,
    ONE_BY_ONE,
    ONE_CALL,
    Q1,
    TOOLS,
    TOOLS_TOO,
    chat_template,
    learned_texts,
)

from medtune.reading.thoughts import split_reply
from medtune.reading.tool_calls import CallReader, call_form

ARGUMENTS = json.dumps(CALLS[0]["arguments"], ensure_ascii=False)
TAGGED = f'<tool_call>\n{{"name": "dose", "arguments": {ARGUMENTS}}}\n</tool_call>'
XML = (
    "<tool_call>\n<function=dose>\n<parameter=drug>\n布洛芬\n</parameter>\n<parameter=age>\n30\n</parameter>\n"
    "</function>\n</tool_call>"
)
WRITTEN = {
    **dict.fromkeys(("qwen", "qwen3", "qwen3_instruct_2507", "qwen3_nothink"), f"{TAGGED}<|im_end|>"),
    "qwen3_5": f"\n</think>\n\n{XML}<|im_end|>",
    "qwen3_5_nothink": f"{XML}<|im_end|>",
    "glm4_moe": "\n<think></think>\n<tool_call>dose\n<arg_key>drug</arg_key>\n<arg_value>布洛芬</arg_value>\n"
    "<arg_key>age</arg_key>\n<arg_value>30</arg_value>\n</tool_call><|observation|>",
    "llama3": f'{{"name": "dose", "parameters": {ARGUMENTS}}}<|eot_id|>',
    "mistral": f'[TOOL_CALLS] [{{"name": "dose", "arguments": {ARGUMENTS}, "id": "call00001"}}]</s>',
    "ministral3": f"[TOOL_CALLS]dose[ARGS]{ARGUMENTS}</s>",
    "gemma4": '<|tool_call>call:dose{age:30,drug:<|"|>布洛芬<|"|>}<tool_call|><|tool_response>',
    "gptoss": f" to=functions.dose<|channel|>commentary json<|message|>{ARGUMENTS}<|call|>",
    "granite": f"{TAGGED}<|end_of_text|>",
    "lfm2": "<|tool_call_start|>[dose(drug='布洛芬', age=30)]<|tool_call_end|><|im_end|>",
    "lfm2_5": "<|tool_call_start|>[dose(drug='布洛芬', age=30)]<|tool_call_end|><|im_end|>",
    "minicpm": '<function name="dose"><param name="drug">布洛芬</param><param name="age">30</param></function>'
    "<|im_end|>",
}


def read(form, answer: str, size: int = 1000, tools=TOOLS) -> tuple[str, list[dict]]:
    reader = CallReader(form, tools)
    words = "".join(reader.add(answer[start : start + size]) for start in range(0, len(answer), size))
    rest, calls = reader.end()
    return words + rest, calls


def test_every_template_with_tools_has_an_expectation():
    assert WRITTEN.keys() == TOOLS_TOO


@pytest.mark.parametrize("name", sorted(TOOLS_TOO))
def test_a_call_is_learned_and_read_again(name, tokenizers):
    template = chat_template(name, tokenizers)
    messages = [Q1, *ONE_CALL, A1]
    texts = []
    for example in template.examples(messages):
        segments = template.segments(example, TOOLS)
        texts.append("".join(segment.text for segment in segments))
        reply = learned_texts(segments)[0]
        assert reply == WRITTEN[name]
    assert texts[0].startswith(template.prompt(messages[:1], TOOLS))
    assert texts[-1].startswith(template.prompt(messages[:3], TOOLS))
    assert "R1" in segments[2].text
    # Calls of an earlier question are read, whatever the template has left of them.
    *_, last = template.examples(ONE_BY_ONE)
    segments = template.segments(last, TOOLS, only_learned=True)
    assert "".join(segment.text for segment in segments).startswith(template.prompt(ONE_BY_ONE[:-1], TOOLS))

    end = max((token for token in template.stop_tokens if reply.endswith(token)), key=len)
    answer = split_reply(reply.removesuffix(end), template.opens_thought).answer
    for size in (1, 3, 1000):
        assert read(call_form(template), answer, size) == ("", CALLS[:1])
        if name not in ("llama3", "gptoss"):
            assert read(call_form(template), f"先查。\n{answer}", size) == ("先查。", CALLS[:1])
        assert read(call_form(template), "多喝水。", size) == ("多喝水。", [])


@pytest.mark.parametrize("name", ["qwen", "mistral", "ministral3", "gemma4", "lfm2", "minicpm", "qwen3_5_nothink"])
def test_several_calls_in_a_reply(name, tokenizers):
    template = chat_template(name, tokenizers)
    messages = [Q1, ONE_CALL[0] | {"tool_calls": CALLS}, {"role": "tool", "content": "R1"}, ONE_CALL[1], A1]
    reply = learned_texts(template.segments(messages, TOOLS))[0]
    end = next(token for token in template.stop_tokens[::-1] if reply.endswith(token))
    assert read(call_form(template), reply.removesuffix(end)) == ("", CALLS)


@pytest.mark.parametrize("name", ["qwen", "lfm2", "gemma4", "minicpm", "qwen3_5_nothink"])
def test_words_behind_a_call_are_kept(name, tokenizers):
    """Those of a call that was cut off too."""
    form = call_form(chat_template(name, tokenizers))
    call = WRITTEN[name].removesuffix("<|im_end|>").removesuffix("<|tool_response>")
    for after in ("胸痛请立即拨打120。", call[: len(call) // 2]):
        for size in (1, 1000):
            assert read(form, f"先查。{call}{after}", size) == (f"先查。\n{after}", CALLS[:1])


def test_calls_of_tools_that_were_not_offered_stay_words(tokenizers):
    other = TAGGED.replace('"dose"', '"rm_rf"')
    assert read(call_form(chat_template("qwen", tokenizers)), other) == (other, [])


def test_templates_without_tools_have_no_form(tokenizers):
    for name in ("gemma3", "smollm3", "vicuna"):
        assert call_form(chat_template(name, tokenizers)) is None
    assert read(None, TAGGED) == (TAGGED, [])


SCHEMA = {
    "drug": {"type": "string"},
    "count": {"type": "integer"},
    "daily": {"type": "boolean"},
    "times": {"type": "array"},
    "patient": {"type": "object"},
}
TYPED = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": SCHEMA}}}]
VALUES = {"drug": "12", "count": 12, "daily": True, "times": ["早", "晚"], "patient": {"weight": 7.5, "note": None}}


@pytest.mark.parametrize("name", sorted(TOOLS_TOO))
def test_arguments_keep_their_types(name, tokenizers):
    """Also where the form writes texts: the tool's schema says what they are."""
    template = chat_template(name, tokenizers)
    calls = [{"name": "f", "arguments": VALUES}]
    reply = learned_texts(template.segments([Q1, ONE_CALL[0] | {"tool_calls": calls}, ONE_CALL[1], A1], TYPED))[0]
    end = max((token for token in template.stop_tokens if reply.endswith(token)), key=len)
    answer = split_reply(reply.removesuffix(end), template.opens_thought).answer
    assert read(call_form(template), answer, tools=TYPED) == ("", calls)


@pytest.mark.parametrize(
    ("name", "answer"),
    [
        ("qwen", '<tool_call>\n{"name": "dose", "arguments": {"drug'),
        ("qwen", "<tool_call>\n{dose}\n</tool_call>"),
        ("mistral", "[TOOL_CALLS] dose"),
        ("lfm2", "<|tool_call_start|>[dose(drug='it's')]<|tool_call_end|>"),
        ("llama3", '{"name": "dose"'),
        ("llama3", '{"age": 30}'),
        ("gptoss", "to=functions.dose<|message|>{"),
        ("qwen", "<tool_call>\nI do not know\n</tool_call>"),
        ("qwen", "<tool_call></tool_call>"),
        ("qwen", '<tool_call>{"name": "dose", "arguments": {"age": NaN}}</tool_call>'),
        ("qwen", '<tool_call>{"name": "dose", "arguments": {"a": ' + "[" * 5000 + "</tool_call>"),
        ("llama3", '{"name": "阿司匹林", "dose": 3}'),
        ("lfm2", "<|tool_call_start|>[dose('布洛芬', age=30)]<|tool_call_end|>"),
        ("lfm2", "<|tool_call_start|>[dose(drug={'a', 'b'})]<|tool_call_end|>"),
    ],
)
def test_what_cannot_be_read_stays_words(name, answer, tokenizers):
    assert read(call_form(chat_template(name, tokenizers)), answer, 2) == (answer, [])


@pytest.mark.parametrize(
    ("name", "answer"),
    [
        ("gptoss", f"<|channel|>commentary to=functions.dose <|constrain|>json<|message|>{ARGUMENTS}"),
        ("gptoss", f"<|start|>assistant to=functions.dose<|channel|>commentary json<|message|>{ARGUMENTS}"),
        ("llama3", f'<|python_tag|>{{"type": "function", "name": "dose", "parameters": {ARGUMENTS}}}'),
        ("mistral", f'[TOOL_CALLS][{{"name": "dose", "arguments": {ARGUMENTS}}}]'),
        ("qwen", f"<tool_call>{json.dumps({'name': 'dose', 'arguments': ARGUMENTS})}</tool_call>"),
    ],
)
def test_other_ways_to_write_the_same(name, answer, tokenizers):
    assert read(call_form(chat_template(name, tokenizers)), answer) == ("", CALLS[:1])
