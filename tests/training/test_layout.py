"""Each stage learns the same whether the rows of a batch are padded or joined into one."""

import importlib

import pytest
import torch
from stage_runs import PARTS, STAGES, logged, stage_flags, weights_of, write_lines
from tiny_families import save_tiny_model

from medtune.errors import UserError
from medtune.training import stage_trainer
from medtune.training.causal_lm_trainer import CausalLMConfig

JOINED = "the rows of a batch are joined into one without padding"
SHARED = "a prompt that rows share passes once"


def feedback(folder):
    """Labelled replies of many lengths."""
    turns = [[{"role": "user", "content": f"第{n}个病人{PARTS[n % 8]}疼怎么办？"}] for n in range(48)]
    replies = [{"role": "assistant", "content": "请就诊。" * (1 + n % 5)} for n in range(48)]
    records = [{"messages": [*turns[n], replies[n]], "label": n % 3 > 0} for n in range(48)]
    return write_lines(folder / "feedback.jsonl", records)


@pytest.mark.parametrize(
    ("stage", "options"),
    [
        *((stage, {}) for stage in STAGES),
        ("sft", {"gradient_checkpointing": True}),
        ("sft", {"use_peft": False, "learning_rate": 1e-4}),
        ("rm", {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}),
        ("rm", {"use_peft": False, "learning_rate": 1e-4}),
        ("dpo", {"loss_type": "orpo"}),
        ("dpo", {"gradient_checkpointing": True, "modules_to_save": "lm_head"}),
        ("dpo", {"load_in_4bit": True}),
        ("dpo", {"precompute_ref_log_probs": True, "loss_type": ["sigmoid", "sft"]}),
        ("dpo", {"loss_type": "kto"}),
    ],
    ids=str,
)
def test_losses_and_weights_are_those_of_padded_rows(tmp_path, tiny_model_dir, stage, options, capfd):
    main = importlib.import_module(STAGES[stage]).main
    same = {"max_steps": 20, "lora_dropout": 0, "save_strategy": "no", "do_eval": True, "eval_steps": 10} | options
    if options.get("loss_type") == "kto":
        same["train_file_dir"] = feedback(tmp_path)
    metrics, weights = {}, {}
    for layout in ("False", "auto"):
        (folder := tmp_path / layout).mkdir()
        metrics[layout] = main(stage_flags(stage, tiny_model_dir, folder, **same, padding_free=layout))
        log = capfd.readouterr().err
        assert (JOINED in log) is (layout == "auto")
        assert (SHARED in log) is (layout == "auto" and stage in ("rm", "dpo"))
        if options.get("use_peft", True):
            weights[layout] = weights_of(folder / "out/checkpoint-best")
    losses = [logged(tmp_path / layout / "out") for layout in ("False", "auto")]
    assert len(losses[0]) == 20
    assert losses[1] == pytest.approx(losses[0], rel=1e-4, abs=1e-5)
    assert metrics["auto"]["eval_loss"] == pytest.approx(metrics["False"]["eval_loss"], rel=1e-4, abs=1e-5)
    for name, tensor in weights.get("False", {}).items():
        torch.testing.assert_close(weights["auto"][name], tensor, atol=2e-3, rtol=1e-2)  # Adam's steps of 1e-3


def test_fused_kernels_leave_the_loss_to_us(monkeypatch, tmp_path):
    """The package needs a GPU; its own losses would compute the head at every token."""
    with pytest.raises(UserError, match=r"^--use_liger_kernel: the package liger-kernel is not installed; "):
        CausalLMConfig(output_dir=str(tmp_path), do_train=True, use_liger_kernel=True)
    monkeypatch.setattr(stage_trainer, "is_liger_kernel_available", lambda: True)
    config = CausalLMConfig(output_dir=str(tmp_path), do_train=True, use_cpu=True, bf16=False, use_liger_kernel=True)
    assert config.liger_kernel_config == {"cross_entropy": False, "fused_linear_cross_entropy": False}


def test_noise_that_goes_by_the_length_of_a_row_keeps_padding(tmp_path, tiny_model_dir, capfd):
    sft = importlib.import_module(STAGES["sft"]).main
    short = {"max_steps": 1, "save_strategy": "no", "neftune_noise_alpha": 5}
    sft(stage_flags("sft", tiny_model_dir, tmp_path, **short))
    assert JOINED not in capfd.readouterr().err
    sft(stage_flags("sft", tiny_model_dir, tmp_path, **short, packing=True, output_dir=tmp_path / "packed"))
    assert "--neftune_noise_alpha: the noise goes by the length of a row" in capfd.readouterr().err


@pytest.mark.parametrize("model_type", ["gemma3_text", "mistral"])
def test_models_with_windows_pass_the_prompt_of_each_reply(tmp_path, tiny_model_dir, model_type, capfd):
    """Their masks go by distances in the row."""
    model = save_tiny_model(model_type, tmp_path / model_type, tiny_model_dir)
    short = {"max_steps": 1, "save_strategy": "no"}
    importlib.import_module(STAGES["dpo"]).main(stage_flags("dpo", model, tmp_path, **short))
    log = capfd.readouterr().err
    assert JOINED in log
    assert SHARED not in log


@pytest.mark.parametrize(("dropout", "do_train"), [(0.1, True), (0.1, False), (0.0, True)])
def test_the_log_says_where_dropout_draws_other_numbers(tmp_path, tiny_model_dir, capfd, dropout, do_train):
    """OPT's layers call the function, and have no module for it."""
    model = save_tiny_model("opt", tmp_path / "opt", tiny_model_dir, dropout=dropout)
    short = {"max_steps": 1, "save_strategy": "no", "lora_dropout": 0, "do_eval": True, "do_train": do_train}
    importlib.import_module(STAGES["sft"]).main(stage_flags("sft", model, tmp_path, **short))
    log = capfd.readouterr().err
    assert JOINED in log
    assert ("dropout draws other numbers" in log) is (dropout > 0 and do_train)
