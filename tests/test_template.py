"""The named prompt templates: rendered text against TRL's templates, learned text and ids exactly, every refusal."""

import jinja2
import pytest
from template_cases import (
    A1,
    A2,
    CONVERSATION,
    EXPECTED,
    ONE_BY_ONE,
    ONE_CALL,
    PLAIN,
    Q1,
    Q2,
    REWRITING,
    SYSTEM,
    THINKING,
    TOOL_TURNS,
    TOOLS,
    TOOLS_TOO,
    TRL_TEMPLATES,
    chat_template,
    learned_texts,
    renderer,
    tokenizer_for,
)

from medtune.errors import UserError
from medtune.reading.chat_template import Segment
from template import TEMPLATES, named_template


def encode(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


# ---------------------------------------------------------------- against TRL's templates


def as_sent(messages: list[dict]) -> list[dict]:
    """In OpenAI's form, in which a call lies under "function"."""
    return [
        message | {"tool_calls": [{"type": "function", "function": call} for call in message["tool_calls"]]}
        if "tool_calls" in message
        else message
        for message in messages
    ]


def thinking_apart(key: str) -> list[dict]:
    return [Q1, A1 | {key: "earlier"}, Q2, A2 | {key: "later"}]


PLAIN_CASES = [([Q1], None), ([Q1, A1], None), ([Q1, A1, Q2, A2], None)]
SYSTEM_CASES = [([SYSTEM, *messages], tools) for messages, tools in PLAIN_CASES]
CALL_CASES = [(messages, TOOLS) for messages in ([Q1], [SYSTEM, Q1], ONE_BY_ONE[:3], ONE_BY_ONE[:4], ONE_BY_ONE)]
TOOL_CASES = [(messages, TOOLS) for messages in (TOOL_TURNS[:4], TOOL_TURNS)]
ALL_CASES = [*PLAIN_CASES, *SYSTEM_CASES, *CALL_CASES, *TOOL_CASES, (TOOL_TURNS, None)]
THINKING_CASES = [(THINKING, None), (THINKING[:2], None), (thinking_apart("reasoning_content"), None)]
# Gemma 4's own puts words beside a call behind the result, where no reply could have them.
WORDLESS_CASES = [*PLAIN_CASES, *SYSTEM_CASES, *CALL_CASES, (TOOL_TURNS[:5], TOOLS)]
HARMONY_THOUGHTS = [(thinking_apart("thinking"), None), ([Q1, ONE_CALL[0] | {"thinking": "T"}, ONE_CALL[1]], TOOLS)]
HARMONY_THOUGHTS += [([*messages, A1, Q2], tools) for messages, tools in HARMONY_THOUGHTS[1:]]


# The template, TRL's copy of the model's own, flags of the latter, and dialogues with tools.
COMPARED = [
    ("qwen", "qwen2_5", {}, ALL_CASES),
    ("qwen3", "qwen3", {"enable_thinking": True}, ALL_CASES + THINKING_CASES),
    ("qwen3_nothink", "qwen3", {"enable_thinking": False}, ALL_CASES + THINKING_CASES),
    ("qwen3_instruct_2507", "qwen3_instruct_2507", {}, ALL_CASES),
    ("qwen3_5", "qwen3_5_think", {}, ALL_CASES + THINKING_CASES),
    ("qwen3_5_nothink", "qwen3_5_nothink", {}, ALL_CASES + THINKING_CASES),
    ("qwen3_5", "qwen3_6", {}, ALL_CASES + THINKING_CASES),
    ("llama3", "llama3", {}, PLAIN_CASES + SYSTEM_CASES),
    ("llama3", "llama3_1", {}, CALL_CASES),
    ("gemma", "gemma", {}, PLAIN_CASES),
    ("gemma", "gemma3", {}, PLAIN_CASES + SYSTEM_CASES),
    ("gemma3", "gemma3", {}, PLAIN_CASES + SYSTEM_CASES),
    ("gemma4", "gemma4_v5", {}, [*WORDLESS_CASES, THINKING_CASES[2]]),
    ("phi", "phi3", {}, PLAIN_CASES + SYSTEM_CASES),
    ("deepseek", "deepseekv3", {}, PLAIN_CASES + SYSTEM_CASES),
    ("glm4_moe", "glm4moe", {}, ALL_CASES + THINKING_CASES),
    ("gptoss", "gptoss", {}, PLAIN_CASES + SYSTEM_CASES + CALL_CASES + HARMONY_THOUGHTS),
    ("lfm2", "lfm2_v2", {}, ALL_CASES),
    ("lfm2_5", "lfm2_2_5_v2", {}, [*ALL_CASES, THINKING_CASES[2]]),
]


@pytest.mark.parametrize(("name", "trl_name", "flags", "cases"), COMPARED)
def test_text_and_ids_are_those_of_trl(name, trl_name, flags, cases, tokenizers):
    tokenizer, tokens = tokenizer_for(name, tokenizers), EXPECTED[name][0]
    ours = renderer(tokenizer, named_template(name), tokens)
    theirs = renderer(tokenizer, (TRL_TEMPLATES / f"{trl_name}.jinja").read_text(), tokens, **flags)
    for messages, tools in cases:
        for ask in (False, True):
            expected = theirs(as_sent(messages), tools, ask)
            if trl_name == "deepseekv3":
                # On purpose: TRL's opens a reasoning block that the replies it renders do not have.
                expected = expected.removesuffix("<think>\n")
            text = ours(messages, tools, ask)
            assert text == expected
            assert encode(tokenizer, text) == encode(tokenizer, expected)


SCHEMAS = {
    "drug": {"type": "string", "description": "药名"},
    "form": {"type": "string", "enum": ["tablet", "syrup"]},
    "times": {"type": "array", "items": {"type": "string"}, "description": "when"},
    "age": {"type": "integer", "nullable": True},
    "patient": {"type": "object", "properties": {"weight": {"type": "number"}}, "required": ["weight"]},
}


@pytest.mark.parametrize(("name", "trl_name"), [("gemma4", "gemma4_v5"), ("gptoss", "gptoss")])
def test_declarations_of_tools_are_those_of_trl(name, trl_name, tokenizers):
    tokenizer, tokens = tokenizer_for(name, tokenizers), EXPECTED[name][0]
    parameters = {"type": "object", "properties": SCHEMAS, "required": ["drug"]}
    tools = [TOOLS[0], {"type": "function", "function": {"name": "n", "description": "d", "parameters": parameters}}]
    texts = [
        renderer(tokenizer, jinja, tokens)([Q1], tools, True)
        for jinja in (named_template(name), (TRL_TEMPLATES / f"{trl_name}.jinja").read_text())
    ]
    assert texts[0] == texts[1]


# ---------------------------------------------------------------- what is learned


def test_every_named_template_has_an_expectation():
    assert EXPECTED.keys() == TEMPLATES.keys()


@pytest.mark.parametrize("name", TEMPLATES)
def test_segments_are_exact(name, tokenizers):
    template = chat_template(name, tokenizers)
    expected = [Segment(text, index % 2 == 1) for index, text in enumerate(EXPECTED[name][1])]
    assert template.segments(CONVERSATION) == expected


@pytest.mark.parametrize("name", TEMPLATES)
def test_generation_continues_the_training_text(name, tokenizers):
    template = chat_template(name, tokenizers)
    text = "".join(segment.text for segment in template.segments(CONVERSATION))
    assert text.startswith(template.prompt(CONVERSATION[:4]))
    assert text.startswith(template.prompt(CONVERSATION[:2])) == (name not in REWRITING)


@pytest.mark.parametrize("name", PLAIN)
def test_training_ids_are_inference_ids_then_the_reply(name, tokenizers):
    template, tokenizer = chat_template(name, tokenizers), tokenizer_for(name, tokenizers)
    messages = [
        {"role": "system", "content": "你是一名医生。"},
        {"role": "user", "content": "感冒了应该怎么办？"},
        {"role": "assistant", "content": "1. 多喝水；\n\n2. Rest 😀."},
        {"role": "user", "content": "\n还有吗"},
        {"role": "assistant", "content": "（没有了）"},
    ]
    segments = template.segments(messages)
    encoding = tokenizer(
        "".join(segment.text for segment in segments), add_special_tokens=False, return_offsets_mapping=True
    )
    ids, offsets = encoding["input_ids"], encoding["offset_mapping"]
    done = 0
    for segment in segments:
        end = done + len(segment.text)
        inside = [i for i, (a, b) in zip(ids, offsets, strict=True) if done <= a and b <= end]
        assert tokenizer.decode(inside) == segment.text, "a token crosses the border of a segment"
        if segment.learned:
            before = [i for i, (_, b) in zip(ids, offsets, strict=True) if b <= done]
            assert before == encode(tokenizer, "".join(s.text for s in segments)[:done])
        done = end
    last_prompt = encode(tokenizer, template.prompt(messages[:4]))
    assert ids[: len(last_prompt)] == last_prompt


@pytest.mark.parametrize(
    ("name", "calls"),
    [
        (
            "qwen",
            [
                '<tool_call>\n{"name": "dose", "arguments": {"drug": "布洛芬", "age": 30}}\n</tool_call>\n'
                '<tool_call>\n{"name": "dose", "arguments": {"drug": "阿司匹林"}}\n</tool_call><|im_end|>',
                "A1<|im_end|>",
                '查\n<tool_call>\n{"name": "dose", "arguments": {"drug": "布洛芬", "age": 30}}\n</tool_call><|im_end|>',
                "A2<|im_end|>",
            ],
        ),
        (
            "glm4_moe",
            [
                "\n<think></think>\n<tool_call>dose\n<arg_key>drug</arg_key>\n<arg_value>布洛芬</arg_value>\n"
                "<arg_key>age</arg_key>\n<arg_value>30</arg_value>\n</tool_call>\n<tool_call>dose\n"
                "<arg_key>drug</arg_key>\n<arg_value>阿司匹林</arg_value>\n</tool_call><|observation|>",
                "\n<think></think>\nA1<|user|>",
                "\n<think></think>\n查\n<tool_call>dose\n<arg_key>drug</arg_key>\n<arg_value>布洛芬</arg_value>\n"
                "<arg_key>age</arg_key>\n<arg_value>30</arg_value>\n</tool_call><|observation|>",
                "\n<think></think>\nA2<|endoftext|>",
            ],
        ),
    ],
)
def test_tool_calls_are_learned_and_tool_results_are_not(name, calls, tokenizers):
    template = chat_template(name, tokenizers)
    segments = template.segments(TOOL_TURNS, TOOLS)
    assert learned_texts(segments) == calls
    assert "R1" in segments[2].text
    assert "".join(segment.text for segment in segments).startswith(template.prompt(TOOL_TURNS[:4], TOOLS))


@pytest.mark.parametrize("name", sorted(TOOLS_TOO))
def test_openai_tool_calls_render_as_ours(name, tokenizers):
    """A server hands the template `{"function": {...}}` and content None."""
    sent = [turn | {"content": None} if turn.get("tool_calls") else turn for turn in as_sent(ONE_BY_ONE)]
    render = chat_template(name, tokenizers).render
    assert render(sent, TOOLS, False) == render(ONE_BY_ONE, TOOLS, False)


def test_qwen3_learns_the_last_thought_only(tokenizers):
    learned = learned_texts(chat_template("qwen3", tokenizers).segments(THINKING))
    assert learned == ["A1<|im_end|>", "<think>\nlater\n</think>\n\nA2<|im_end|>"]


# ---------------------------------------------------------------- properties


@pytest.mark.parametrize("name", TEMPLATES)
def test_white_space_around_texts_changes_no_border(name, tokenizers):
    template = chat_template(name, tokenizers)
    messages = [{**message, "content": f" \n{message['content']}\n "} for message in CONVERSATION]
    learned = learned_texts(template.segments(messages))
    pieces = EXPECTED[name][1]
    assert ["".join(text.split()) for text in learned] == ["".join(text.split()) for text in pieces[1::2]]


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_system_text_is_never_lost(name, tokenizers):
    template = chat_template(name, tokenizers)
    system = {"role": "system", "content": "严谨的医生"}
    for messages in ([system, Q1], [system, Q1, A1, Q2], [system, A1, Q1]):
        assert template.prompt(messages).count("严谨的医生") == 1


def test_default_system_texts(tokenizers):
    prompts = {name: chat_template(name, tokenizers).prompt([Q1]) for name in ("qwen", "vicuna", "alpaca")}
    assert prompts == {
        "qwen": "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\nQ1<|im_end|>\n<|im_start|>assistant\n",
        "vicuna": "<s>A chat between a curious user and an artificial intelligence assistant. The assistant gives "
        "helpful, detailed, and polite answers to the user's questions. USER: Q1 ASSISTANT:",
        "alpaca": "<s>Below is an instruction that describes a task. Write a response that appropriately completes "
        "the request.\n\n### Instruction:\nQ1\n\n### Response:\n",
    }


# ---------------------------------------------------------------- errors


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(UserError) as error:
        named_template("Qwen2")
    assert str(error.value) == (
        "--template_name Qwen2: no such template; did you mean qwen? known are alpaca, baichuan2, chatml, "
        "deepseek, gemma, gemma3, gemma4, glm4, glm4_moe, gptoss, granite, internlm2, lfm2, lfm2_5, llama2, llama3, "
        "minicpm, ministral3, mistral, phi, plain, qwen, qwen3, qwen3_5, qwen3_5_nothink, qwen3_instruct_2507, "
        "qwen3_nothink, smollm3, vicuna, yi, zephyr"
    )
    with pytest.raises(UserError, match="no such template; known are alpaca"):
        named_template("#")


@pytest.mark.parametrize("name", sorted(set(TEMPLATES) - TOOLS_TOO))
def test_templates_without_tools_say_so(name, tokenizers):
    template = chat_template(name, tokenizers)
    with pytest.raises(jinja2.TemplateError, match=f"^template {name} has no place for tools$"):
        template.prompt([Q1], TOOLS)
    with pytest.raises(jinja2.TemplateError, match=f"^template {name} has no place for a later .* role tool$"):
        template.prompt([Q1, A1, {"role": "tool", "content": "R"}])
