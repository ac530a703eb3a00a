"""Score heads on the language model of any family: the same scores alone, in a batch, after reload and by the card."""

import re
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_families import save_multimodal_model, save_multimodal_model_of_text_class, save_tiny_model
from transformers import AutoTokenizer, PreTrainedModel

from medtune.errors import UserError
from medtune.models.loading import load_base_model
from medtune.models.lora_layers import linear_module_names
from medtune.models.reward_card import write_reward_card
from medtune.models.reward_models import load_reward_model
from medtune.models.score_heads import LastScores, load_scoring_base

TEXTS = ["头疼两天，要不要去医院？请就诊，注意休息。", "胃疼怎么办？", "发烧到39度，吃什么药好？先量体温，多喝水。"]
# Those of these for which transformers itself has a class with a score head are qwen3, gemma3 and qwen3_5.
FAMILIES = [
    *("gemma4_text", "lfm2", "qwen3_5"),
    *(
        pytest.param(family, marks=pytest.mark.slow)
        for family in (
            *("granite", "cohere2", "internlm3", "glm4_moe", "lfm2_moe", "qwen3_5_moe_text", "falcon_h1", "nemotron_h"),
            *("granitemoehybrid", "qwen3", "gemma3"),
        )
    ),
]
WRAPPERS = {"gemma3": save_multimodal_model, "qwen3_5": save_multimodal_model_of_text_class}


@pytest.fixture
def save_base(tmp_path, tiny_model_dir):
    """A tiny model of a family with the tests' tokenizer."""

    def save(family: str) -> Path:
        if family in WRAPPERS:
            return WRAPPERS[family](tmp_path / family, tiny_model_dir)
        return save_tiny_model(family, tmp_path / family, tiny_model_dir)

    return save


def with_random_head(base: PreTrainedModel) -> PreTrainedModel:
    torch.manual_seed(1)
    torch.nn.init.normal_(base.score.weight)
    return base.eval()


def batch_of(folder: Path) -> dict[str, torch.Tensor]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return dict(tokenizer(TEXTS, add_special_tokens=False, padding=True, return_tensors="pt"))


@torch.no_grad()
def scores_of(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> list[float]:
    return model(**batch, use_cache=False).logits[:, 0].tolist()


def scores_by_card(folder: Path, monkeypatch) -> list[float]:
    """What the lines in a saved folder's README.md give."""
    (lines,) = re.findall("```python\n(.*)```", (folder / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert "medtune" not in lines
    monkeypatch.chdir(folder)
    names = {"texts": TEXTS}
    exec(lines, names)
    return names["scores"].tolist()


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_of_a_whole_model_are_the_same_alone_in_a_batch_and_loaded_again(
    family, save_base, tmp_path, monkeypatch
):
    folder = save_base(family)
    pad_token_id = AutoTokenizer.from_pretrained(folder).pad_token_id
    model = with_random_head(load_scoring_base(str(folder), pad_token_id=pad_token_id))
    batch = batch_of(folder)
    lengths = batch["attention_mask"].sum(dim=1).tolist()
    assert len(set(lengths)) == 3
    scores = scores_of(model, batch)
    assert max(scores) - min(scores) > 0.1
    alone = [
        scores_of(model, {"input_ids": ids[None, :n]})[0] for ids, n in zip(batch["input_ids"], lengths, strict=True)
    ]
    assert scores == pytest.approx(alone, abs=1e-4)
    with torch.no_grad():
        states = model.base_model(**batch, use_cache=False).last_hidden_state
        by_hand = [(row[n - 1] @ model.score.weight[0]).item() for row, n in zip(states, lengths, strict=True)]
        assert LastScores(model)(model, batch).tolist() == pytest.approx(by_hand, abs=1e-4)
    assert scores == pytest.approx(by_hand, abs=1e-4)
    saved = tmp_path / "saved"
    model.save_pretrained(saved)
    AutoTokenizer.from_pretrained(folder).save_pretrained(saved)
    write_reward_card(saved, model)
    assert scores_of(load_reward_model(str(saved), None), batch) == pytest.approx(scores, abs=1e-6)
    assert scores_by_card(saved, monkeypatch) == pytest.approx(scores, abs=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_adapter_of_the_language_model_fits_on_it_with_a_score_head(family, save_base, tmp_path, monkeypatch):
    """By its layers' names; and what is saved with the head is loaded again by us and by its card."""
    folder, adapter = save_base(family), tmp_path / "adapter"
    layers = {name for name, _ in load_base_model(str(folder)).named_modules() if "lm_head" not in name}
    tokenizer = AutoTokenizer.from_pretrained(folder)
    base = with_random_head(load_scoring_base(str(folder), pad_token_id=tokenizer.pad_token_id))
    assert {name for name, _ in base.named_modules()} == layers | {"score"}
    modules = linear_module_names(base) - {"out_proj"}
    config = LoraConfig(task_type="SEQ_CLS", r=2, target_modules=sorted(modules), init_lora_weights=False)
    model = get_peft_model(base, config).eval()
    model.save_pretrained(adapter)
    tokenizer.save_pretrained(adapter)
    write_reward_card(adapter, model)
    batch = batch_of(folder)
    scores = scores_of(model, batch)
    with model.disable_adapter():
        assert scores_of(model, batch) != pytest.approx(scores, abs=1e-2)
    assert scores_of(load_reward_model(str(folder), str(adapter)), batch) == pytest.approx(scores, abs=1e-6)
    assert scores_by_card(adapter, monkeypatch) == pytest.approx(scores, abs=1e-4)


def test_a_model_without_attention_takes_no_score_head(save_base):
    folder = save_base("mamba2")
    with pytest.raises(UserError, match=r"mamba2: a kind of model that these versions .* give no such head$"):
        load_scoring_base(str(folder), pad_token_id=0)
