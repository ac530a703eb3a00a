"""The text of replies: marks of thoughts and of calls survive decoding, others do not, at every token."""

from itertools import pairwise

import pytest
from qwen_vocab import real_qwen_tokenizer
from template_cases import GEMMA4, HARMONY, MISTRAL

from medtune.reading.reply_text import ReplyDecoder
from medtune.reading.thoughts import split_reply

ANALYSIS, FINAL = "<|channel|>analysis<|message|>先问痰。<|end|><|start|>assistant", "<|channel|>final<|message|>"


@pytest.fixture(scope="module")
def tokenizer():
    return real_qwen_tokenizer(*dict.fromkeys([*GEMMA4, *HARMONY, *MISTRAL]))


@pytest.mark.parametrize(
    ("reply", "parts"),
    [
        (f"{ANALYSIS}{FINAL}有痰吗？", ("先问痰。", "有痰吗？", True)),
        (f"{FINAL}有痰吗？", ("", "有痰吗？", True)),
        ("<|channel|>analysis<|message|>先问", ("先问", "", False)),
        ("<|channel>thought\n先问痰。\n<channel|>有痰吗？", ("先问痰。", "有痰吗？", True)),
        ("<|channel>thought\n先问", ("先问", "", False)),
        ("[THINK]先问痰。[/THINK]有痰吗？", ("先问痰。", "有痰吗？", True)),
        ("<think>\n先问痰。\n</think>\n\n有痰吗？", ("先问痰。", "有痰吗？", True)),
        ("有痰吗？<|im_end|>", ("", "有痰吗？", True)),
        ("[TOOL_CALLS]dose[ARGS]{}", ("", "[TOOL_CALLS]dose[ARGS]{}", True)),
        (f"{ANALYSIS} to=functions.f<|channel|>commentary json<|message|>{{}}", ("先问痰。", None, True)),
    ],
)
def test_the_parts_of_a_reply_whatever_its_marks(tokenizer, reply, parts):
    decode = ReplyDecoder(tokenizer)
    ids = tokenizer.encode(reply, add_special_tokens=False)
    thought, answer, is_closed = split_reply(decode(ids))
    assert (thought, is_closed) == (parts[0], parts[2])
    assert answer == parts[1] or (parts[1] is None and "to=functions.f" in answer)
    # Of a stream nothing is taken back.
    texts = [decode(ids[:n]) for n in range(len(ids) + 1)]
    assert all(longer.startswith(text.rstrip("�")) for text, longer in pairwise(texts))
    assert not any("<|channel" in text or "<|start" in text for text in texts if parts[1] is not None)


def test_a_tokenizer_without_such_marks_decodes_as_before(qwen_tokenizer):
    ids = qwen_tokenizer.encode("<think>\n想\n</think>\n\n答<|im_end|>\n<tool_call>", add_special_tokens=False)
    assert ReplyDecoder(qwen_tokenizer)(ids) == qwen_tokenizer.decode(ids, skip_special_tokens=True)
