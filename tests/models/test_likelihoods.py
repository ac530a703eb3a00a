"""Likelihoods and scores of an evaluation: joined rows, where they pass so, give what padded ones do."""

import pytest
import torch
from tiny_families import tiny_model
from transformers import AutoTokenizer

from medtune.models.chat_models import ChatModel, ChatModelArguments, RewardModel
from medtune.models.likelihoods import score_replies
from medtune.models.logps import log_probs
from medtune.models.text_attention import SDPA, SDPA_BY_TEXT
from medtune.reading.tokenization import load_chat_template

# Three begin alike, as prompts with one system prompt do.
PROMPTS = [[*range(7, 37), 40 + n, *range(50, 50 + 3 * n)] for n in range(3)] + [[100, 101], [102]]
REPLIES = [[200, 201, 202], [203], [204] * 9, [205, 206], [207]]


@pytest.fixture
def forward_shapes(monkeypatch):
    """The shapes of `input_ids` of every forward pass, in order."""
    shapes = []
    call = torch.nn.Module.__call__

    def noted(module, *args, **kwargs):
        if "input_ids" in kwargs and hasattr(module, "get_output_embeddings"):
            shapes.append(tuple(kwargs["input_ids"].shape))
        return call(module, *args, **kwargs)

    monkeypatch.setattr(torch.nn.Module, "__call__", noted)
    return shapes


@pytest.mark.parametrize(
    ("model_type", "attention", "rows"),
    [
        ("qwen3", SDPA_BY_TEXT, (1, 55)),  # of the three longest, whose first 30 tokens stand there once
        ("gemma3_text", SDPA_BY_TEXT, (1, 115)),  # with a window
        ("lfm2", SDPA, (3, 46)),  # with convolutions
    ],
)
def test_replies_are_as_likely_as_alone(tiny_model_dir, forward_shapes, model_type, attention, rows):
    model, tokenizer = tiny_model(model_type).eval(), AutoTokenizer.from_pretrained(tiny_model_dir)
    template = load_chat_template(tokenizer, None)
    chat_model = ChatModel("tiny", "tiny", None, tokenizer, template, [], 512, model=model)
    scored = dict(score_replies(chat_model, PROMPTS, REPLIES, 3, log_probs))
    assert model.config._attn_implementation == attention
    longest = max(forward_shapes, key=lambda shape: shape[0] * shape[1])
    assert longest == rows
    for n, (prompt, reply) in enumerate(zip(PROMPTS, REPLIES, strict=True)):
        with torch.no_grad():
            logps = model(torch.tensor([prompt + reply])).logits[0, len(prompt) - 1 : -1].log_softmax(dim=-1)
        torch.testing.assert_close(scored[n][0], logps.gather(1, torch.tensor(reply)[:, None])[:, 0], atol=1e-5, rtol=0)


def test_rows_that_would_see_each_other_stay_padded(tiny_model_dir, monkeypatch):
    model, tokenizer = tiny_model("qwen3").eval(), AutoTokenizer.from_pretrained(tiny_model_dir)
    chat_model = ChatModel("tiny", "tiny", None, tokenizer, load_chat_template(tokenizer, None), [], 512, model=model)
    monkeypatch.setattr("medtune.models.text_attention.pairwise", lambda borders: [(0, borders[-1])])
    scored = dict(score_replies(chat_model, PROMPTS, REPLIES, 3, log_probs))
    assert model.config._attn_implementation == SDPA
    for n, figures in score_replies(chat_model, PROMPTS, REPLIES, 1, log_probs):
        torch.testing.assert_close(scored[n], figures, atol=1e-5, rtol=0)


def test_scores_are_those_of_each_text_alone(tiny_model_dir, reward_adapter, forward_shapes):
    scorer = RewardModel(str(reward_adapter), ChatModelArguments(str(tiny_model_dir)))
    rows = [prompt + reply for prompt, reply in zip(PROMPTS, REPLIES, strict=True)]
    alone = [scorer.score([row])[0] for row in rows]
    forward_shapes.clear()
    assert scorer.score(rows) == pytest.approx(alone, abs=1e-5)
    assert len(set(alone)) > 1
    assert forward_shapes[-1] == (1, 55 + 4 + 2)
