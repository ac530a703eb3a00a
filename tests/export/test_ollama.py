"""medtune/export/ollama.py: Ollama asks as training did, or there is no Modelfile."""

import copy
import re

import pytest

from medtune.export.ollama import modelfile
from medtune.reading.tokenization import load_chat_template

ENDS = [
    *("<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<turn|>", "<|end|>", "<|user|>", "<|end_of_text|>"),
    *("<|endoftext|>", "<|end_of_role|>", "<bos>"),
]
DIALOGUE = [
    {"role": "system", "content": "You are a doctor."},
    {"role": "user", "content": "头痛怎么办？"},
    {"role": "assistant", "content": "多休息。"},
    {"role": "user", "content": "What else?"},
]


@pytest.fixture
def tokenizer(tiny_tokenizer):
    own = copy.deepcopy(tiny_tokenizer)
    own.add_tokens(ENDS, special_tokens=True)
    own.bos_token = "<bos>"
    return own


def filled(text: str, messages: list[dict]) -> str:
    """The TEMPLATE of a Modelfile as Ollama fills it in: a loop over the messages with a branch for each role."""
    template = re.search(r'TEMPLATE """(.*?)"""', text, re.DOTALL)[1]
    system = re.search(r'SYSTEM """(.*?)"""', text, re.DOTALL)
    if system and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": system[1]}, *messages]
    loop = r"(.*)\{\{ range \.Messages \}\}\{\{ (.*)\{\{ end \}\}\{\{ end \}\}(.*)"
    start, branches, opening = re.fullmatch(loop, template, re.DOTALL).groups()
    cases = dict(re.findall(r'if eq \.Role "(\w+)" \}\}(.*?)(?:\{\{ else |\Z)', branches, re.DOTALL))
    turns = [cases[message["role"]].replace("{{ .Content }}", message["content"]) for message in messages]
    return start + "".join(turns) + opening


@pytest.mark.parametrize(
    "template_name",
    ["qwen", "chatml", "qwen3_5_nothink", "llama3", "llama2", "mistral", "ministral3", "gemma3", "gemma4", "phi"],
)
def test_ollama_asks_as_training_did(tokenizer, template_name):
    chat_template = load_chat_template(tokenizer, template_name)
    text = modelfile(chat_template, "model.gguf", 32768, tokenizer.bos_token)
    for messages in (DIALOGUE[1:2], DIALOGUE[:2], DIALOGUE[1:], DIALOGUE, DIALOGUE + DIALOGUE[2:]):
        assert filled(text, messages) == chat_template.prompt(messages).removeprefix("<bos>")
    lines = text.splitlines()
    assert lines[0] == "FROM ./model.gguf"
    assert f'PARAMETER stop "{chat_template.stop_tokens[0]}"' in lines
    assert "PARAMETER num_ctx 4096" in lines
    assert ('SYSTEM """You are Qwen, created by Alibaba Cloud' in text) is (template_name == "qwen")


def test_a_template_that_is_more_than_texts_around_turns_gets_no_modelfile(tokenizer):
    tokenizer.chat_template = (
        "{% for m in messages %}{{ loop.index ~ m.role ~ m.content ~ '<|im_end|>' }}{% endfor %}"
        "{{ 'assistant' if add_generation_prompt }}"
    )
    assert modelfile(load_chat_template(tokenizer, None), "model.gguf", 4096, None) is None
