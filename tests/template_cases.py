"""What tests of templates render and expect: dialogues, and each named template's text of one, with what is learned."""

from datetime import datetime
from importlib.util import find_spec
from pathlib import Path

from medtune.reading.chat_template import ChatTemplate
from template import TEMPLATES, named_template

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

THINKING = [
    Q1,
    {"role": "assistant", "content": "<think>\nearlier\n</think>\n\nA1"},
    Q2,
    {"role": "assistant", "content": "<think>\nlater\n</think>\n\nA2"},
]
ONE_CALL = [{"role": "assistant", "content": "", "tool_calls": CALLS[:1]}, {"role": "tool", "content": "R1"}]
ONE_BY_ONE = [SYSTEM, Q1, *ONE_CALL, A1, Q2, *ONE_CALL, A2]

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
# Qwen3.5's prompts ask for a thought.
PLAIN = [name for name in TEMPLATES if name != "qwen3_5"]
# A prompt of theirs ends in a thought that earlier replies do not have.
REWRITING = {"qwen3_nothink", "qwen3_5", "qwen3_5_nothink"}


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
