"""Replies found in what a chat template renders: their borders, what may end them, and templates that have none."""

import random
from itertools import pairwise

import pytest
from template_cases import (
    A1,
    A2,
    CHATML,
    CONVERSATION,
    EXPECTED,
    GEMMA4,
    GLM,
    HARMONY,
    LLAMA,
    Q1,
    Q2,
    THINKING,
    TRL_TEMPLATES,
    chat_template,
    learned_texts,
    renderer,
)

from medtune.errors import UserError
from medtune.reading.chat_template import ChatTemplate
from template import named_template

# ---------------------------------------------------------------- borders and ends


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


# ---------------------------------------------------------------- random conversations

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


# ---------------------------------------------------------------- errors


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
