"""Prompt templates: rendered text against TRL's templates, learned text and ids exactly, every error."""

import random
from datetime import datetime
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

import jinja2
import pytest
from qwen_vocab import real_qwen_tokenizer

from medtune.errors import UserError
from template import TEMPLATES, ChatTemplate, Segment, named_template

TRL_TEMPLATES = Path(find_spec("trl").submodule_search_locations[0]) / "chat_templates"

SYSTEM = {"role": "system", "content": "S"}
Q1, Q2 = {"role": "user", "content": "Q1"}, {"role": "user", "content": "Q2"}
A1, A2 = {"role": "assistant", "content": "A1"}, {"role": "assistant", "content": "A2"}
CONVERSATION = [SYSTEM, Q1, A1, Q2, A2]

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "dose",
            "description": "剂量 <mg>",
            "parameters": {"type": "object", "properties": {"drug": {"type": "string"}}},
        },
    }
]
CALLS = [
    {"name": "dose", "arguments": {"drug": "布洛芬", "age": 30}},
    {"name": "dose", "arguments": {"drug": "阿司匹林"}},
]
TOOL_TURNS = [
    Q1,
    {"role": "assistant", "content": "", "tool_calls": CALLS},
    {"role": "tool", "content": "R1"},
    {"role": "tool", "content": "R2"},
    A1,
    Q2,
    {"role": "assistant", "content": "查", "tool_calls": CALLS[:1]},
    {"role": "tool", "content": "R3"},
    A2,
]

# Name: the family's special tokens with eos last, then CONVERSATION as (not learned, learned) by turns.
CHATML = ["<|im_start|>", "<|endoftext|>", "<|im_end|>"]
CHATML_PIECES = [
    "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nQ1<|im_end|>\n<|im_start|>assistant\n",
    "A1<|im_end|>",
    "\n<|im_start|>user\nQ2<|im_end|>\n<|im_start|>assistant\n",
    "A2<|im_end|>",
    "\n",
]
EMPTY = "<think>\n\n</think>\n\n"
GLM = ["[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>", "<|endoftext|>"]
LLAMA = ["<s>", "</s>"]
MISTRAL = ["<s>", "[INST]", "[/INST]", "[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]", "[AVAILABLE_TOOLS]"]
MISTRAL += ["[/AVAILABLE_TOOLS]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[ARGS]", "[THINK]", "[/THINK]", "</s>"]
LFM = ["<|startoftext|>", "<|im_start|>", "<|tool_list_start|>", "<|tool_list_end|>", "<|tool_call_start|>"]
LFM += ["<|tool_call_end|>", "<|tool_response_start|>", "<|tool_response_end|>", "<|im_end|>"]
GEMMA4 = ["<bos>", "<|turn>", "<turn|>", "<|channel>", "<channel|>", "<|think|>", "<|tool>", "<tool|>", "<|tool_call>"]
GEMMA4 += ["<tool_call|>", "<|tool_response>", "<tool_response|>", '<|"|>', "<eos>"]
HARMONY = ["<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|call|>", "<|constrain|>", "<|return|>"]
EXPECTED = {
    "qwen": (CHATML, CHATML_PIECES),
    "chatml": (CHATML, CHATML_PIECES),
    "yi": (CHATML, CHATML_PIECES),
    "internlm2": (["<s>", *CHATML], ["<s>" + CHATML_PIECES[0], *CHATML_PIECES[1:]]),
    "qwen3": (CHATML, [*CHATML_PIECES[:3], "<think>\n\n</think>\n\nA2<|im_end|>", "\n"]),
    "qwen3_nothink": (
        CHATML,
        [*CHATML_PIECES[:2], CHATML_PIECES[2] + "<think>\n\n</think>\n\n", *CHATML_PIECES[3:]],
    ),
    "qwen3_instruct_2507": (CHATML, CHATML_PIECES),
    "qwen3_5": (
        CHATML,
        [*CHATML_PIECES[:2], CHATML_PIECES[2] + "<think>\n", "\n</think>\n\nA2<|im_end|>", "\n"],
    ),
    "qwen3_5_nothink": (CHATML, [*CHATML_PIECES[:2], CHATML_PIECES[2] + EMPTY, *CHATML_PIECES[3:]]),
    "llama2": (
        LLAMA,
        ["<s>[INST] <<SYS>>\nS\n<</SYS>>\n\nQ1 [/INST]", " A1 </s>", "<s>[INST] Q2 [/INST]", " A2 </s>"],
    ),
    "llama3": (
        ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
        [
            "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nS<|eot_id|>"
            "<|start_header_id|>user<|end_header_id|>\n\nQ1<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n",
            "A1<|eot_id|>",
            "<|start_header_id|>user<|end_header_id|>\n\nQ2<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
            "A2<|eot_id|>",
        ],
    ),
    "mistral": (MISTRAL, ["<s>[INST] S\n\nQ1[/INST]", " A1</s>", "[INST] Q2[/INST]", " A2</s>"]),
    "ministral3": (
        MISTRAL,
        ["<s>[SYSTEM_PROMPT]S[/SYSTEM_PROMPT][INST]Q1[/INST]", "A1</s>", "[INST]Q2[/INST]", "A2</s>"],
    ),
    "gemma": (
        ["<bos>", "<start_of_turn>", "<end_of_turn>", "\n\n", "<eos>"],
        [
            "<bos><start_of_turn>user\nS\n\nQ1<end_of_turn>\n<start_of_turn>model\n",
            "A1<end_of_turn>",
            "\n<start_of_turn>user\nQ2<end_of_turn>\n<start_of_turn>model\n",
            "A2<end_of_turn>",
            "\n",
        ],
    ),
    "gemma4": (
        GEMMA4,
        [
            "<bos><|turn>system\nS<turn|>\n<|turn>user\nQ1<turn|>\n<|turn>model\n",
            "A1<turn|>",
            "\n<|turn>user\nQ2<turn|>\n<|turn>model\n",
            "A2<turn|>",
            "\n",
        ],
    ),
    "phi": (
        ["<s>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<|endoftext|>"],
        [
            "<|system|>\nS<|end|>\n<|user|>\nQ1<|end|>\n<|assistant|>\n",
            "A1<|end|>",
            "\n<|user|>\nQ2<|end|>\n<|assistant|>\n",
            "A2<|end|>",
            "\n<|endoftext|>",
        ],
    ),
    "deepseek": (
        ["<｜begin▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>", "<｜end▁of▁sentence｜>"],
        [
            "<｜begin▁of▁sentence｜>S<｜User｜>Q1<｜Assistant｜>",
            "A1<｜end▁of▁sentence｜>",
            "<｜User｜>Q2<｜Assistant｜>",
            "A2<｜end▁of▁sentence｜>",
        ],
    ),
    # The next header's first token ends a reply; after the last one there is none, so eos is added.
    "glm4": (
        GLM,
        [
            "[gMASK]<sop><|system|>\nS<|user|>\nQ1<|assistant|>",
            "\nA1<|user|>",
            "\nQ2<|assistant|>",
            "\nA2<|endoftext|>",
        ],
    ),
    "glm4_moe": (
        GLM,
        [
            "[gMASK]<sop><|system|>\nS<|user|>\nQ1<|assistant|>",
            "\n<think></think>\nA1<|user|>",
            "\nQ2<|assistant|>",
            "\n<think></think>\nA2<|endoftext|>",
        ],
    ),
    "gptoss": (
        HARMONY,
        [
            "<|start|>system<|message|>You are ChatGPT, a large language model trained by OpenAI.\nKnowledge cutoff: "
            f"2024-06\nCurrent date: {datetime.now():%Y-%m-%d}\n\nReasoning: medium\n\n# Valid channels: analysis, "
            "commentary, final. Channel must be included for every message.<|end|><|start|>developer<|message|># "
            "Instructions\n\nS\n\n<|end|><|start|>user<|message|>Q1<|end|><|start|>assistant",
            "<|channel|>final<|message|>A1<|end|>",
            "<|start|>user<|message|>Q2<|end|><|start|>assistant",
            "<|channel|>final<|message|>A2<|return|>",
        ],
    ),
    "granite": (
        ["<|start_of_role|>", "<|end_of_role|>", "<|end_of_text|>"],
        [
            "<|start_of_role|>system<|end_of_role|>S<|end_of_text|>\n<|start_of_role|>user<|end_of_role|>Q1"
            "<|end_of_text|>\n<|start_of_role|>assistant<|end_of_role|>",
            "A1<|end_of_text|>",
            "\n<|start_of_role|>user<|end_of_role|>Q2<|end_of_text|>\n<|start_of_role|>assistant<|end_of_role|>",
            "A2<|end_of_text|>",
            "\n",
        ],
    ),
    "lfm2": (LFM, ["<|startoftext|>" + CHATML_PIECES[0], *CHATML_PIECES[1:]]),
    "lfm2_5": (LFM, ["<|startoftext|>" + CHATML_PIECES[0], *CHATML_PIECES[1:]]),
    "minicpm": (["<s>", *CHATML], ["<s>" + CHATML_PIECES[0], *CHATML_PIECES[1:]]),
    "smollm3": (
        CHATML,
        [
            "<|im_start|>system\n## Metadata\n\nKnowledge Cutoff Date: June 2025\nToday Date: "
            f"{datetime.now():%d %B %Y}\nReasoning Mode: /think\n\n## Custom Instructions\n\nS\n\n"
            "<|im_start|>user\nQ1<|im_end|>\n<|im_start|>assistant\n",
            *CHATML_PIECES[1:],
        ],
    ),
    "baichuan2": (
        ["<s>", "<reserved_106>", "<reserved_107>", "</s>"],
        ["S<reserved_106>Q1<reserved_107>", "A1</s>", "<reserved_106>Q2<reserved_107>", "A2</s>"],
    ),
    "vicuna": (LLAMA, ["<s>S USER: Q1 ASSISTANT:", " A1</s>", "USER: Q2 ASSISTANT:", " A2</s>"]),
    "alpaca": (
        LLAMA,
        [
            "<s>S\n\n### Instruction:\nQ1\n\n### Response:\n",
            "A1</s>",
            "\n\n### Instruction:\nQ2\n\n### Response:\n",
            "A2</s>",
            "\n\n",
        ],
    ),
    "zephyr": (
        LLAMA,
        [
            "<|system|>\nS</s>\n<|user|>\nQ1</s>\n<|assistant|>\n",
            "A1</s>",
            "\n<|user|>\nQ2</s>\n<|assistant|>\n",
            "A2</s>",
            "\n",
        ],
    ),
    "plain": (LLAMA, ["<s>S\nQ1\n", "A1</s>", "\nQ2\n", "A2</s>", "\n"]),
}
EXPECTED["gemma3"] = EXPECTED["gemma"]
# The Llama families write headers as plain words, so they need a vocabulary without the others' tokens.
WORDY = {name for name, (tokens, _) in EXPECTED.items() if tokens is LLAMA}
TOOLS_TOO = {"qwen", "qwen3", "qwen3_nothink", "qwen3_instruct_2507", "qwen3_5", "qwen3_5_nothink", "glm4_moe"}
TOOLS_TOO |= {"llama3", "mistral", "ministral3", "gemma4", "gptoss", "granite", "lfm2", "lfm2_5", "minicpm"}
NO_TOOLS = set(TEMPLATES) - TOOLS_TOO
# Qwen3.5's prompts ask for a thought.
PLAIN = [name for name in TEMPLATES if name != "qwen3_5"]
# A prompt of theirs ends in a thought that earlier replies do not have.
REWRITING = {"qwen3_nothink", "qwen3_5", "qwen3_5_nothink"}


@pytest.fixture(scope="module")
def tokenizers():
    """The Qwen vocabulary with the special tokens of all families, and with Llama's alone."""
    tokens = dict.fromkeys(token for tokens, _ in EXPECTED.values() for token in tokens if token.strip())
    return real_qwen_tokenizer(*tokens), real_qwen_tokenizer(*LLAMA)


def tokenizer_for(name, tokenizers):
    return tokenizers[name in WORDY]


def renderer(tokenizer, jinja, tokens, **flags):
    """`ChatTemplate.render` as in production, with the bos and eos of the template's family."""
    special = {"bos_token": tokens[0], "eos_token": tokens[-1], **flags}

    def render(messages, tools, add_generation_prompt):
        return tokenizer.apply_chat_template(
            messages,
            tools=tools,
            chat_template=jinja,
            add_generation_prompt=add_generation_prompt,
            tokenize=False,
            **special,
        )

    return render


def chat_template(name, tokenizers):
    tokens = EXPECTED[name][0]
    render = renderer(tokenizer_for(name, tokenizers), named_template(name), tokens)
    return ChatTemplate(name, render, tokens, tokens[-1])


def learned_texts(segments):
    return [segment.text for segment in segments if segment.learned]


def encode(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


# ---------------------------------------------------------------- against TRL's templates

THINKING = [
    Q1,
    {"role": "assistant", "content": "<think>\nearlier\n</think>\n\nA1"},
    Q2,
    {"role": "assistant", "content": "<think>\nlater\n</think>\n\nA2"},
]


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


ONE_CALL = [{"role": "assistant", "content": "", "tool_calls": CALLS[:1]}, {"role": "tool", "content": "R1"}]
ONE_BY_ONE = [SYSTEM, Q1, *ONE_CALL, A1, Q2, *ONE_CALL, A2]
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


def test_a_token_that_ends_a_thought_too_ends_no_reply(tokenizers):
    """gpt-oss's <|end|> stands behind its analysis, and behind the replies that others follow."""
    template = chat_template("gptoss", tokenizers)
    assert template.stop_tokens == ("<|return|>", "<|call|>")
    learned = learned_texts(template.segments([Q1, THINKING[3]]))
    analysis = "<|channel|>analysis<|message|>later<|end|><|start|>assistant"
    assert learned == [f"{analysis}<|channel|>final<|message|>A2<|return|>"]
    # One text would teach the first reply to end so; it is the last of a dialogue of its own.
    assert [learned_texts(template.segments(messages))[-1] for messages in template.examples(CONVERSATION)] == [
        f"<|channel|>final<|message|>{answer}<|return|>" for answer in ("A1", "A2")
    ]


def test_qwen3_learns_the_last_thought_only(tokenizers):
    learned = learned_texts(chat_template("qwen3", tokenizers).segments(THINKING))
    assert learned == ["A1<|im_end|>", "<think>\nlater\n</think>\n\nA2<|im_end|>"]


def test_an_earlier_reply_keeps_a_first_character_that_starts_the_empty_thought_too(tokenizers):
    messages = [Q1, {"role": "assistant", "content": "<thin>"}, Q2, A2]
    learned = learned_texts(chat_template("qwen3_nothink", tokenizers).segments(messages))
    assert learned == ["<thin><|im_end|>", "A2<|im_end|>"]


@pytest.mark.parametrize(
    ("trl_name", "tokens", "ends"),
    [
        ("qwen3_instruct_2507", CHATML, ("<|im_end|>", "<|im_end|>")),
        ("gptoss", HARMONY, ("<|end|>", "<|return|>")),
        ("llama3_2", EXPECTED["llama3"][0], ("<|eot_id|>", "<|eot_id|>")),
        ("gemma3", EXPECTED["gemma"][0], ("<end_of_turn>", "<end_of_turn>")),
        ("phi3_5", EXPECTED["phi"][0], ("<|end|>", "<|end|>")),
        ("cohere", ["<BOS>", "<|END_OF_TURN_TOKEN|>"], ("<|END_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>")),
    ],
)
def test_the_tokenizers_own_templates_work_as_well(trl_name, tokens, ends, tokenizers):
    render = renderer(tokenizers[0], (TRL_TEMPLATES / f"{trl_name}.jinja").read_text(), tokens)
    template = ChatTemplate(trl_name, render, tokens, tokens[-1])
    channel = "<|channel|>final<|message|>" if trl_name == "gptoss" else ""
    assert learned_texts(template.segments(CONVERSATION)) == [f"{channel}A1{ends[0]}", f"{channel}A2{ends[1]}"]


@pytest.mark.parametrize(
    ("name", "tokens", "stop_tokens"),
    [
        ("qwen", CHATML, ("<|im_end|>",)),
        ("qwen", ["<|im_start|>", "<|im_end|>", "<|endoftext|>"], ("<|im_end|>", "<|endoftext|>")),
        ("phi", EXPECTED["phi"][0], ("<|end|>", "<|endoftext|>")),
        ("gemma", EXPECTED["gemma"][0], ("<end_of_turn>", "<eos>")),
        ("glm4", GLM, ("<|user|>", "<|endoftext|>")),
        ("vicuna", LLAMA, ("</s>",)),
        ("glm4_moe", GLM, ("<|user|>", "<|endoftext|>", "<|observation|>")),
        ("gemma4", GEMMA4, ("<turn|>", "<eos>", "<|tool_response>")),
        ("llama3", EXPECTED["llama3"][0], ("<|eot_id|>",)),
    ],
)
def test_stop_tokens(name, tokens, stop_tokens, tokenizers):
    render = renderer(tokenizers[0], named_template(name), tokens)
    assert ChatTemplate(name, render, tokens, tokens[-1]).stop_tokens == stop_tokens


# ---------------------------------------------------------------- properties

WORDS = [
    "头痛",
    "发烧三天了。",
    "Take 200 mg",
    "no",
    "a",
    "😀",
    "👩‍⚕️",
    "é",
    "\n",
    "\n\n",
    " ",
    "1.",
    "<b>",
    "{x}",
    "{{ y }}",
]


@pytest.mark.parametrize("seed", range(10))
def test_random_conversations(seed, tokenizers):
    """Segments join to the rendered text; each learned one is its reply, which may even speak of end tokens."""
    rng = random.Random(seed)
    for name, (tokens, pieces) in EXPECTED.items():
        template = chat_template(name, tokenizers)

        def speak(words):
            return "".join(rng.choices(words, k=rng.randint(1, 12))).strip() or "好"

        replies = [speak([*WORDS, tokens[-1], "</s>"]) for _ in range(rng.randint(1, 4))]
        messages = [{"role": "system", "content": speak(WORDS)}] if rng.random() < 0.5 else []
        for reply in replies:
            messages += [{"role": "user", "content": speak(WORDS)}, {"role": "assistant", "content": reply}]
        segments = template.segments(messages)

        text = "".join(segment.text for segment in segments)
        added = tokens[-1] if name.startswith("glm4") else ""
        assert text == template.render(messages, None, False) + added
        assert all(before.learned != after.learned for before, after in pairwise(segments))
        *earlier, last = replies
        expected = [pieces[1].replace("A1", reply) for reply in earlier] + [pieces[3].replace("A2", last)]
        assert learned_texts(segments) == expected


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


@pytest.mark.parametrize("name", sorted(NO_TOOLS))
def test_templates_without_tools_say_so(name, tokenizers):
    template = chat_template(name, tokenizers)
    with pytest.raises(jinja2.TemplateError, match=f"^template {name} has no place for tools$"):
        template.prompt([Q1], TOOLS)
    with pytest.raises(jinja2.TemplateError, match=f"^template {name} has no place for a later .* role tool$"):
        template.prompt([Q1, A1, {"role": "tool", "content": "R"}])


def test_a_template_that_opens_replies_otherwise_than_it_writes_them(tokenizers):
    """DeepSeek-R1's asks for a reply with an open reasoning block."""
    tokens = EXPECTED["deepseek"][0]
    render = renderer(tokenizers[0], (TRL_TEMPLATES / "deepseekv3.jinja").read_text(), tokens)
    with pytest.raises(UserError) as error:
        ChatTemplate("R1", render, tokens, tokens[-1]).segments([Q1, A1])
    assert str(error.value) == (
        r"chat template of R1: it asks for message 2 with a text that ends in "
        r"'entence｜><｜User｜>Q1<｜Assistant｜><think>\n', but does not write the reply so; "
        "pass a --template_name that fits the model"
    )


def test_a_template_that_moves_the_system_text(tokenizers):
    """Mistral v0.3's own template puts it into the last user turn, so an earlier prompt is not in the text."""

    def render(messages, tools, ask):
        last = max(index for index, message in enumerate(messages) if message["role"] == "user")
        system = messages[0]["content"] if messages[0]["role"] == "system" else ""
        written = {
            "system": lambda index, text: "",
            "user": lambda index, text: f"[INST]{system if index == last else ''}{text}[/INST]",
            "assistant": lambda index, text: f"{text}</s>",
        }
        return "".join(written[m["role"]](index, m["content"]) for index, m in enumerate(messages))

    template = ChatTemplate("m", render, LLAMA, "</s>")
    assert learned_texts(template.segments(CONVERSATION[1:])) == ["A1</s>", "A2</s>"]
    with pytest.raises(UserError, match=r"^chat template of m: it asks for message 3 .* does not write the reply so"):
        template.segments(CONVERSATION)


@pytest.mark.parametrize("messages", [[A1, Q1, A2], [Q1, A1, A2]])
def test_a_reply_to_nothing(messages, tokenizers):
    number = 1 if messages[0] is A1 else 3
    with pytest.raises(UserError, match=f"^message {number} answers nothing: put a user or tool message before"):
        chat_template("qwen", tokenizers).segments(messages)


def test_a_template_whose_end_token_the_tokenizer_lacks(tokenizers):
    render = chat_template("qwen", tokenizers).render
    with pytest.raises(UserError) as error:
        _ = ChatTemplate("qwen", render, LLAMA, "</s>").stop_tokens
    assert str(error.value) == (
        r"chat template of qwen: it ends a reply with '<|im_end|>\n<|im_start|>user\n', which starts with no "
        "special token of the tokenizer, so no model could learn to stop; "
        "pass a --template_name that fits the model"
    )


def test_a_template_that_leaves_out_plain_text():
    template = ChatTemplate("vision", lambda messages, tools, ask: "User:<end>", ["<end>"], "<end>")
    with pytest.raises(UserError, match=r"^chat template of vision: it leaves out plain text messages; pass a"):
        template.segments([Q1, A1])


def test_a_reply_without_its_end_token():
    def render(messages, tools, ask):
        return "".join(m["content"] + ("" if m["content"] == "A2" else "<end>") for m in messages)

    with pytest.raises(UserError, match=r"^chat template of x: no <end> ends message 4; pass a"):
        ChatTemplate("x", render, ["<end>"], "<end>").segments([Q1, A1, Q2, A2])
