"""The text of generated ids: words, thoughts as `<think>...</think>` whatever marks a family has, and calls of tools.

gpt-oss and Gemma 4 write a thought into a channel, Magistral between [THINK] and [/THINK], with tokens that a plain
decoding leaves out, so that thought and answer would run into each other.
"""

import re
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from medtune.reading.thoughts import OPENING

# Special tokens inside replies that mean something; all others are left out.
_HARMONY = ("<|channel|>", "<|message|>", "<|start|>", "<|end|>", "<|constrain|>")
_KEPT = {
    *("<think>", "</think>", "<|channel>", "<channel|>", "[THINK]", "[/THINK]"),
    *("<tool_call>", "</tool_call>", "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"),
    *("<function", "</function>", "<param", "</param>", "<|python_tag|>"),
    *("[TOOL_CALLS]", "[ARGS]", "<|tool_call_start|>", "<|tool_call_end|>", "<|tool_call>", "<tool_call|>", '<|"|>'),
}
_MARK = re.compile(
    r"(?P<opening><\|channel\|>analysis<\|message\|>|<\|channel>thought\n|\[THINK\])"
    r"|(?P<closing><\|end\|>|<channel\|>|\[/THINK\])"
    r"|<\|start\|>assistant(?=<\|channel\|>)|<\|channel\|>(?:final|commentary)<\|message\|>"
    # A mark of which a part is written so far.
    r"|<\|start\|>[a-z]*\Z|<\|channel\|>[a-z]*\Z|<\|channel>[a-z]*\Z"
)


class ReplyDecoder:
    """Decodes replies of one tokenizer; the text of a longer reply begins with that of its start."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        special = {id: str(token) for id, token in tokenizer.added_tokens_decoder.items() if token.special}
        kept = _KEPT | set(_HARMONY if "<|channel|>" in special.values() else ())
        self.left_out = {id for id, token in special.items() if token not in kept}
        self.keeps_some = len(self.left_out) < len(special)

    def __call__(self, ids: Sequence[int]) -> str:
        """The text of a reply without its end token; a mark that breaks off at the end is left out."""
        if not self.keeps_some:
            return self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        ids = [id for id in ids if id not in self.left_out]
        return _MARK.sub(_thought_mark, self.tokenizer.decode(ids, clean_up_tokenization_spaces=False))


def _thought_mark(mark: re.Match) -> str:
    if mark["opening"]:
        return OPENING
    if not mark["closing"]:
        return ""
    is_line_start = mark.string[: mark.start()].endswith("\n")
    return ("" if is_line_start else "\n") + "</think>\n\n"
