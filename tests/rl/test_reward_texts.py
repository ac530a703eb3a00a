"""What the reward model reads of prompts and replies: ids as it was trained on them, whatever tokens the policy has."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from template_cases import EXPECTED, TOOL_TURNS, TOOLS
from transformers import AutoTokenizer

from medtune.reading.tokenization import (
    IGNORED_LABEL,
    encode_dialogue,
    encode_exchange,
    encode_prompt,
    encode_replies,
    load_chat_template,
    stop_token_ids,
)
from medtune.rl.reward_texts import RewardTexts, load_reward_texts
from template import TEMPLATES, named_template

QUESTION = [{"role": "user", "content": "发烧怎么办？"}]
WITH_SYSTEM = [{"role": "system", "content": "你是医生。"}, *QUESTION]


def other_family(tiny_model_dir: Path, name: str, own: bool) -> RewardTexts:
    """A ChatML policy, and a reward model with the tokens of another family, its template named or its own."""
    tokenizer, reward_tokenizer = (AutoTokenizer.from_pretrained(tiny_model_dir) for _ in range(2))
    tokens = EXPECTED[name][0]
    reward_tokenizer.add_special_tokens({"additional_special_tokens": tokens})
    reward_tokenizer.bos_token, reward_tokenizer.eos_token = tokens[0], tokens[-1]
    reward_tokenizer.chat_template = named_template(name) if own else None
    policy, template = (
        load_chat_template(tokenizer, "chatml"),
        load_chat_template(reward_tokenizer, None if own else name),
    )
    return RewardTexts(tokenizer, policy, stop_token_ids(tokenizer, policy), reward_tokenizer, template)


def read_of(
    reward_texts: RewardTexts, ids: list[int], messages: list[dict], tools: list[dict] | None = None
) -> list[int]:
    return reward_texts.of_ids({"prompt_ids": [], "messages": json.dumps([messages, tools])}, ids)


@pytest.mark.parametrize("own", [False, True], ids=["named", "own"])
@pytest.mark.parametrize("name", TEMPLATES)
def test_the_reward_model_reads_what_it_was_trained_on(tiny_model_dir, name, own):
    reward_texts = other_family(tiny_model_dir, name, own)

    def trained(reply: str, messages: list[dict] = QUESTION) -> list[int]:
        limits = {"max_prompt_length": 9999, "max_reply_length": 999}
        prompt_ids, (chosen_ids, _), _ = encode_replies(
            reward_texts.reward_tokenizer, reward_texts.reward_template, messages, [reply, "别管。"], **limits
        )
        return prompt_ids + chosen_ids

    def generated(reply: str) -> list[int]:
        return reward_texts.tokenizer(reply, add_special_tokens=False)["input_ids"]

    end, reply = reward_texts.stop_ids[:1], "感冒了请多喝水，注意休息。"
    letters = [token for letter in reply for token in generated(letter)]
    assert letters != generated(reply), "tokens that the tokenizer would not make of the text"
    for ids in (generated(reply), letters, generated(f" \n{reply}\n\n")):
        assert read_of(reward_texts, ids + end, QUESTION) == trained(reply)
        assert read_of(reward_texts, ids, QUESTION) == trained(reply)[:-1], "a reply that was cut has no end token"
    assert read_of(reward_texts, generated(reply) + end, WITH_SYSTEM) == trained(reply, WITH_SYSTEM)
    later = [*QUESTION, {"role": "assistant", "content": "多少度？"}, {"role": "user", "content": "39"}]
    assert read_of(reward_texts, generated(reply) + end, later) == trained(reply, later)
    row = {"messages": json.dumps([QUESTION, None])}
    assert reward_texts.of_text(row, reply) == trained(reply), "a dialogue's own reply"

    thought = f"<think>\n先看时间。\n</think>\n\n{reply}"
    for read in (read_of(reward_texts, generated(thought) + end, QUESTION), reward_texts.of_text(row, thought)):
        assert read == trained(reply), "without its thought"
    cut = read_of(reward_texts, generated("<think>\n先看"), QUESTION)
    prompt = encode_prompt(reward_texts.reward_tokenizer, reward_texts.reward_template, QUESTION)
    assert cut == prompt == trained(reply)[: len(cut)], "a thought that was cut has no answer"
    earlier = [*QUESTION, {"role": "assistant", "content": thought}, {"role": "user", "content": "39"}]
    plain = [message | {"content": message["content"].replace(thought, reply)} for message in earlier]
    assert read_of(reward_texts, generated(thought) + end, earlier) == trained(reply, plain)
    if name.endswith("_nothink"):
        return
    reward_texts = replace(reward_texts, reads_thoughts=True)
    assert read_of(reward_texts, generated(thought) + end, QUESTION) == trained(thought), "trained with thoughts"


@pytest.mark.parametrize("name", ["qwen", "qwen3", "qwen3_nothink", "glm4_moe"])
def test_the_reward_model_reads_the_turns_of_tools_before(tiny_model_dir, name):
    reward_texts = other_family(tiny_model_dir, name, own=False)
    messages = TOOL_TURNS[:6]
    ids = reward_texts.tokenizer("多喝水。", add_special_tokens=False)["input_ids"]
    dialogue = [*messages, {"role": "assistant", "content": "多喝水。"}]
    learned, labels = encode_dialogue(
        reward_texts.reward_tokenizer, reward_texts.reward_template, dialogue, TOOLS, max_length=9999
    )
    end = max(index for index, label in enumerate(labels) if label != IGNORED_LABEL)
    assert read_of(reward_texts, ids + reward_texts.stop_ids[:1], messages, TOOLS) == learned[: end + 1]
    assert read_of(reward_texts, ids, messages, TOOLS) == learned[:end]


@pytest.mark.parametrize("name", ["qwen3", "chatml", "yi"])
def test_templates_that_ask_alike_may_write_replies_differently(tiny_model_dir, tmp_path, name):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    reward_tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    reward_template = load_chat_template(reward_tokenizer, name)
    folder = shutil.copytree(tiny_model_dir, tmp_path / "reward")
    reward_tokenizer.save_pretrained(folder)
    chat_template = load_chat_template(tokenizer, "chatml")
    stop_ids = stop_token_ids(tokenizer, chat_template)
    reward_texts = load_reward_texts(tokenizer, chat_template, stop_ids, str(folder))
    prompt_ids = encode_prompt(tokenizer, reward_texts.chat_template, QUESTION)
    assert prompt_ids == encode_prompt(reward_tokenizer, reward_template, QUESTION)
    ids = tokenizer("多喝水。", add_special_tokens=False)["input_ids"] + reward_texts.stop_ids[:1]
    read = reward_texts.of_ids({"prompt_ids": prompt_ids, "messages": json.dumps([QUESTION, None])}, ids)
    assert (reward_texts.reward_tokenizer is None) == (name != "qwen3")
    prompt_ids, reply_ids = encode_exchange(reward_tokenizer, reward_template, QUESTION, "多喝水。")
    assert read == prompt_ids + reply_ids


def test_a_reward_model_of_the_same_tokens_reads_the_policys_own(tiny_model_dir):
    """Its ids as they are, so that nothing of a reply is lost, and the end token that was trained on."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    reward_texts = RewardTexts(tokenizer, load_chat_template(tokenizer, "qwen3"), [7, 9])
    row = {"prompt_ids": [1, 2], "messages": json.dumps([QUESTION, None])}
    assert reward_texts.of_ids(row, [3, 4, 7]) == reward_texts.of_ids(row, [3, 4, 9]) == [1, 2, 3, 4, 7]
    assert reward_texts.of_ids(row, [3, 4]) == [1, 2, 3, 4]
    thought = tokenizer("<think>\n先想。\n</think>\n\n好。", add_special_tokens=False)["input_ids"]
    assert reward_texts.of_ids(row, [*thought, 9]) == reward_texts.of_text(row, "好。")
    assert replace(reward_texts, reads_thoughts=True).of_ids(row, [*thought, 9]) == [1, 2, *thought, 7]
    whole = "<|im_start|>user\n发烧怎么办？<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n好。<|im_end|>"
    assert tokenizer.decode(reward_texts.of_text(row, "好。")) == whole
