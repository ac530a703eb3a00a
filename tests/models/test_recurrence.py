"""Which models would let the texts of a row see each other, as their configurations and the installed packages tell."""

import pytest
from tiny_families import install_kernels, save_multimodal_model_of_text_class, save_tiny_model

from medtune.models.recurrence import why_texts_mix

ATTENTION_ALONE = {"layer_types": ["attention"] * 4}


@pytest.mark.parametrize(
    ("model_type", "packages"),
    [
        ("qwen3_5_text", "causal_conv1d and flash-linear-attention"),
        ("lfm2", "causal_conv1d"),
        ("granitemoehybrid", "causal_conv1d and mamba_ssm"),
        ("falcon_h1", "causal_conv1d and mamba_ssm"),
    ],
)
def test_recurrent_layers_lack_kernels(tmp_path, tiny_model_dir, model_type, packages):
    reason = why_texts_mix(str(save_tiny_model(model_type, tmp_path / "model", tiny_model_dir)))
    assert reason.startswith(f"the recurrent layers of {model_type} keep texts apart only by GPU kernels")
    assert f"those of {packages} (requirements/gpu.txt" in reason


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [("qwen3", {}), ("gemma3_text", {}), ("gpt2", {}), ("granitemoehybrid", ATTENTION_ALONE)],
)
def test_attention_needs_none(tmp_path, tiny_model_dir, model_type, changes):
    assert why_texts_mix(str(save_tiny_model(model_type, tmp_path / "model", tiny_model_dir, **changes))) == ""


def test_what_is_installed_is_not_lacking(tmp_path, tiny_model_dir, monkeypatch):
    wrapper = str(save_multimodal_model_of_text_class(tmp_path / "model", tiny_model_dir))
    assert "qwen3_5_text" in why_texts_mix(wrapper)
    install_kernels(monkeypatch)
    assert why_texts_mix(wrapper) == ""
