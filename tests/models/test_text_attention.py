"""Rows joined into one give what they give padded: states, scores and gradients."""

from functools import partial

import pytest
import torch
from tiny_families import tiny_model
from torch.nn.functional import scaled_dot_product_attention
from transformers import AutoModelForSequenceClassification, Qwen2Config

from medtune.models.dropout import switch_off_dropout
from medtune.models.score_heads import LastScores
from medtune.models.text_attention import Layout, attend_by_text, forward_inputs, places, shares_prefixes
from medtune.training.batches import pad_right

IDS = torch.tensor(
    [[7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17], [20, 21, 0, 0, 0, 0, 0, 0, 0, 0, 0], [30, 31, 32, 33] + [0] * 7]
)
BATCH = {"input_ids": IDS, "attention_mask": (IDS > 0).long()}
# The second text begins with 18 tokens of the first, the third with 20 of the second, and the fourth is in the first.
FIRST, OTHER = list(range(7, 37)), list(range(40, 50))
TEXTS = [FIRST, FIRST[:18] + OTHER, FIRST[:18] + OTHER[:2] + [50, 51], FIRST[:17], [52, 53, 54]]
SHARING = {"input_ids": pad_right(TEXTS, 0)} | {"attention_mask": (pad_right(TEXTS, 0) > 0).long()}


@pytest.mark.parametrize("layout", [Layout.JOINED, Layout.SHARED_PREFIXES])
def test_one_row_has_all_tokens_and_the_borders_of_the_texts(layout):
    inputs = forward_inputs(BATCH, layout)
    assert inputs["input_ids"].tolist() == [[*range(7, 18), 20, 21, 30, 31, 32, 33]]
    assert inputs["position_ids"].tolist() == [[*range(11), 0, 1, 0, 1, 2, 3]]
    assert inputs["cu_seq_lens_q"].tolist() == inputs["cu_seq_lens_k"].tolist() == [0, 11, 13, 17]
    assert (inputs["max_length_q"], inputs["max_length_k"]) == (11, 11)
    assert inputs["seq_idx"].tolist() == [[0] * 11 + [1] * 2 + [2] * 4]
    # Two texts in the first row.
    positions = torch.tensor([[*range(5), *range(6)], [0, 1] + [0] * 9, [0, 1, 2, 3] + [0] * 7])
    inputs = forward_inputs(BATCH | {"position_ids": positions}, layout)
    assert inputs["cu_seq_lens_q"].tolist() == [0, 5, 11, 13, 17]


def test_a_prefix_of_several_texts_is_there_once():
    inputs = forward_inputs(SHARING, Layout.SHARED_PREFIXES)
    assert inputs["input_ids"].tolist() == [[*FIRST, *OTHER, 50, 51, 52, 53, 54]]
    assert inputs["position_ids"].tolist() == [[*range(30), *range(18, 28), 20, 21, 0, 1, 2]]
    assert inputs["seq_idx"].tolist() == [[0] * 30 + [1] * 10 + [2] * 2 + [4] * 3]
    rows, columns = places(SHARING["attention_mask"].bool(), SHARING, Layout.SHARED_PREFIXES)
    assert inputs["input_ids"][rows, columns].tolist() == [token_id for text in TEXTS for token_id in text]
    assert inputs["position_ids"][rows, columns].tolist() == [n for text in TEXTS for n in range(len(text))]
    # A prefix of few tokens costs more than it saves.
    short = {name: values[:, 3:] for name, values in SHARING.items()}
    assert forward_inputs(short, Layout.SHARED_PREFIXES)["input_ids"].shape == (1, 27 + 25 + 2 + 14)


def test_padding_on_the_left_shares_prefixes_too():
    ids = torch.tensor([[0, 0, *FIRST[:16], 40], [0, 0, *FIRST[:16], 41], [*FIRST[:16], 42, 43, 44]])
    inputs = forward_inputs({"input_ids": ids, "attention_mask": (ids > 0).long()}, Layout.SHARED_PREFIXES)
    assert inputs["input_ids"].tolist() == [[*FIRST[:16], 40, 41, *FIRST[:16], 42, 43, 44]]


def test_padded_rows_pass_as_they_are():
    assert forward_inputs(BATCH, Layout.PADDED) == BATCH
    assert list(forward_inputs(BATCH | {"position_ids": IDS}, Layout.PADDED)) == ["input_ids", "position_ids"]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("layout", [Layout.JOINED, Layout.SHARED_PREFIXES])
@pytest.mark.parametrize("model_type", ["qwen3", "gemma3_text", "gpt2", "opt", "qwen3_moe", "glm4_moe", "afmoe"])
def test_logits_and_gradients_are_those_of_padded_rows(model_type, layout, checkpointing):
    """Gemma's window is shorter than the longest text, and GPT-2 and OPT have learned positions."""
    model = tiny_model(model_type).train()
    switch_off_dropout(model)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if layout is Layout.SHARED_PREFIXES and getattr(model.config, "sliding_window", None):
        attend_by_text(model)
        with pytest.raises(ValueError, match="packed sequences apart that share a prefix"):
            model(**forward_inputs(SHARING, layout), use_cache=False)
        return
    is_token = SHARING["attention_mask"].bool()
    weights = torch.randn(int(is_token.sum()), 640, generator=torch.Generator().manual_seed(0))
    found = []
    for each in (Layout.PADDED, layout):
        attend_by_text(model, each is layout)
        model.zero_grad()
        logits = model(**forward_inputs(SHARING, each), use_cache=False).logits[places(is_token, SHARING, each)]
        (logits * weights).mean().backward()
        found.append((logits.detach(), [weight.grad for weight in model.parameters()]))
    (padded, of_padded), (joined, of_joined) = found
    torch.testing.assert_close(joined, padded, atol=1e-5, rtol=1e-5)
    for ours, theirs in zip(of_joined, of_padded, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_flash_attention_takes_prefixes_once(monkeypatch):
    """Its kernels need a GPU; here another function has their arguments."""
    lengths = []

    def varlen(query, key, value, mask, cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k, softmax_scale, **_):
        """[1, tokens, heads, head size] each, as transformers hands them on."""
        assert mask is None
        assert torch.equal(cu_seq_lens_q, cu_seq_lens_k)
        lengths.append(cu_seq_lens_q.diff().tolist())
        assert max_length_q == max_length_k == max(lengths[-1])
        texts = zip(*(states.transpose(1, 2).split(lengths[-1], dim=2) for states in (query, key, value)), strict=True)
        attend = partial(scaled_dot_product_attention, is_causal=True, scale=softmax_scale, enable_gqa=True)
        return torch.cat([attend(*text) for text in texts], dim=2).transpose(1, 2)

    monkeypatch.setattr("transformers.integrations.flash_attention._flash_attention_forward", varlen)
    model = tiny_model("qwen3")
    is_token = SHARING["attention_mask"].bool()
    padded = model(**SHARING).logits[is_token]
    model.config._attn_implementation = "flash_attention_2"
    for layout in (Layout.JOINED, Layout.SHARED_PREFIXES):
        logits = model(**forward_inputs(SHARING, layout), use_cache=False).logits[places(is_token, SHARING, layout)]
        torch.testing.assert_close(logits, padded, atol=1e-5, rtol=1e-5)
        assert lengths.pop() == [len(text) for text in TEXTS]
    assert shares_prefixes(model)
    model.config._attn_implementation = "sdpa"
    assert not shares_prefixes(model)


def test_attention_by_text_makes_no_mask_of_the_whole_row(monkeypatch):
    """The row of a large batch would take gigabytes."""
    seen = []
    attention = torch.nn.functional.scaled_dot_product_attention

    def noted(query, key, value, attn_mask=None, **kwargs):
        seen.append((query.shape[2], attn_mask))
        return attention(query, key, value, attn_mask=attn_mask, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", noted)
    model = tiny_model("qwen3")
    attend_by_text(model)
    model(**forward_inputs(BATCH, Layout.JOINED), use_cache=False)
    assert seen == [(11, None), (2, None), (4, None)] * 4


def test_generation_with_attention_by_text_is_that_of_sdpa():
    model = tiny_model("qwen3").eval()
    left = torch.tensor([[0, 0, 7, 8], [7, 8, 9, 10]])
    prompts = {"input_ids": left, "attention_mask": (left > 0).long()}
    plain = model.generate(**prompts, max_new_tokens=6, do_sample=False)
    attend_by_text(model)
    assert torch.equal(model.generate(**prompts, max_new_tokens=6, do_sample=False), plain)


@pytest.mark.parametrize("layout", list(Layout))
def test_last_scores_are_those_of_each_text_alone(layout):
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, num_labels=1, pad_token_id=0,
    )  # fmt: skip
    model = AutoModelForSequenceClassification.from_config(config).eval()
    alone = [model(torch.tensor([text])).logits.item() for text in TEXTS]
    attend_by_text(model, layout is not Layout.PADDED)
    assert LastScores(model)(model, SHARING, layout).tolist() == pytest.approx(alone, abs=1e-5)
