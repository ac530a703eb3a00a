"""What surrounds training: where a run starts, what it says, what stops it."""

import builtins
import importlib
import math
from types import SimpleNamespace

import pytest
import torch
from datasets.arrow_dataset import Column
from stage_runs import STAGES, stage_flags

from medtune.arguments import RunArguments
from medtune.errors import UserError
from medtune.training import log
from medtune.training.causal_lm_trainer import CausalLMConfig
from medtune.training.guards import RECENT_STEPS, AdapterMovementCheck, BadSteps
from medtune.training.log import ProgressLines, plot_curves
from medtune.training.run import finish_run, start_run


@pytest.fixture
def arguments(tmp_path):
    def build(**changes) -> CausalLMConfig:
        return CausalLMConfig(do_train=True, output_dir=str(tmp_path / "out"), use_cpu=True, bf16=False, **changes)

    return build


# ---------------------------------------------------------------- where it starts


def test_a_start_makes_no_column_row_by_row_and_imports_no_deepspeed(tmp_path, tiny_model_dir, monkeypatch):
    """Either takes seconds of a start, and the first more with every row."""
    imported, import_module = set(), builtins.__import__

    def noted(name, *args, **kwargs):
        imported.add(name.partition(".")[0])
        return import_module(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", noted)
    monkeypatch.setattr(Column, "__iter__", lambda column: pytest.fail(f"{column.column_name} row by row"))
    importlib.import_module(STAGES["sft"]).main(stage_flags("sft", tiny_model_dir, tmp_path, max_steps=1))
    assert "datasets" in imported
    assert "deepspeed" not in imported


# ---------------------------------------------------------------- what it says


def test_versions_other_than_the_tested_ones_are_named(arguments, capfd, monkeypatch):
    found = {"torch": "2.13.0+cu130", "transformers": "5.23.0"}
    monkeypatch.setattr(log, "version", lambda package: found.get(package, "1.0"))
    start_run("a stage", arguments(), RunArguments(), ["a note"])
    lines = capfd.readouterr().err
    assert "a note" in lines
    assert "transformers 5.23.0 (tested: 5.24.0)" in lines
    assert "torch 2.13.0+cu130," in lines
    assert "torch 2.13.0+cu130 (tested" not in lines


def test_progress_line_has_all_that_tail_needs(arguments, capfd):
    start_run("a stage", arguments(), RunArguments(), [])
    lines, state = ProgressLines(), SimpleNamespace(global_step=1, max_steps=111, epoch=0.5, is_world_process_zero=True)
    for step in range(1, 13):
        state.global_step = step
        lines.on_step_end(None, state, None)
    logs = {"loss": 1.5, "learning_rate": 2e-5, "grad_norm": 0.25, "tokens_per_second": 1000.4}
    lines.on_log(None, state, None, logs=logs)
    log = capfd.readouterr().err
    assert log.count("at the speed of the first ten steps") == 1
    assert "step 12/111  epoch 0.50  loss 1.5000  lr 2.00e-05  grad norm 0.250  1000 tokens/s  peak" in log
    assert log.rstrip().endswith("left")


def test_other_processes_are_silent(arguments, capfd, monkeypatch):
    training_args = arguments()
    monkeypatch.setattr(type(training_args), "process_index", 1)
    start_run("a stage", training_args, RunArguments(), ["a note"])
    assert "a note" not in capfd.readouterr().err


@pytest.mark.parametrize(("seconds", "text"), [(59, "0 min 59 s"), (3599, "59 min 59 s"), (7260, "2 h 01 min")])
def test_duration(seconds, text):
    assert log.duration(seconds) == text


def test_curves_are_a_png(tmp_path):
    history = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}, {"step": 2, "eval_loss": 1.5}]
    plot_curves(history, tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


# ---------------------------------------------------------------- what stops it


class TwoMatrices(torch.nn.Module):
    """A LoRA pair under PEFT's names."""

    def __init__(self, b: float):
        super().__init__()
        self.layer = torch.nn.Module()
        for name, value in (("lora_A", 1.0), ("lora_B", b)):
            module = torch.nn.Module()
            module.default = torch.nn.Linear(2, 2, bias=False)
            torch.nn.init.constant_(module.default.weight, value)
            setattr(self.layer, name, module)


@pytest.mark.parametrize(
    ("b", "moved", "stuck"),
    [
        (0.0, {"lora_B"}, None),  # a new adapter: A has no gradient while B is 0
        (0.0, {"lora_A"}, "lora_B"),
        (1.0, {"lora_A", "lora_B"}, None),
        (1.0, {"lora_B"}, "lora_A"),
        (1.0, set(), "lora_A"),
    ],
)
def test_adapter_matrices_that_should_move_are_watched(b, moved, stuck):
    model = TwoMatrices(b)
    args, state = SimpleNamespace(learning_rate=1e-3, fp16=False), SimpleNamespace(global_step=1)
    optimizer = SimpleNamespace(param_groups=[{"lr": 1e-3}])
    check = AdapterMovementCheck()
    check.on_step_begin(args, state, None, model=model, optimizer=optimizer)
    with torch.no_grad():
        for name in moved:
            getattr(model.layer, name).default.weight += 1e-3
    if stuck is None:
        check.on_step_end(args, state, None, model=model)
    else:
        with pytest.raises(UserError, match=rf"^step 1: \d of 2 adapter matrices did not move: layer.{stuck}"):
            check.on_step_end(args, state, None, model=model)


def test_adapter_check_waits_for_the_warm_up():
    model, check = TwoMatrices(1.0), AdapterMovementCheck()
    args, state = SimpleNamespace(learning_rate=1e-3, fp16=False), SimpleNamespace(global_step=1)
    check.on_step_begin(args, state, None, model=model, optimizer=SimpleNamespace(param_groups=[{"lr": 0.0}]))
    check.on_step_end(args, state, None, model=model)
    assert not check.done


@pytest.mark.parametrize(
    ("largest", "loss", "is_bad"),
    [(0.1, 3.0, False), (0.1, 3.2, True), (5.0, 9.9, False), (5.0, 10.1, True), (-0.5, 2.4, False), (-0.5, 2.6, True)],
)
def test_a_loss_explodes_by_factor_and_by_nats(arguments, capfd, largest, loss, is_bad):
    start_run("a stage", arguments(), RunArguments(), [])
    trainer = SimpleNamespace(training_step=lambda model, inputs: inputs["loss"], _get_learning_rate=lambda: 1e-3)
    bad_steps = BadSteps(trainer, 3, AdapterMovementCheck())
    model, state = TwoMatrices(1.0), SimpleNamespace(global_step=0)
    for value in [largest] + [largest - 1] * (RECENT_STEPS // 2) + [loss, loss]:
        bad_steps.on_step_begin(arguments(), state, None)
        trainer.training_step(model, {"loss": torch.tensor(value), "sources": ["d.jsonl:1"]})
        bad_steps.on_pre_optimizer_step(arguments(), state, None, model=model)
    assert bad_steps.in_a_row == 2 * is_bad
    what = f"step 1: the loss is {loss:.4f}, where {largest:.4f} was the largest at learning rate 1.00e-03 on d.jsonl:1"
    said = [line.split(" | ", 1)[1] for line in capfd.readouterr().err.splitlines() if "was the largest" in line]
    assert said == [f"WARNING | {what}; bad step {n} in a row" for n in (1, 2)] * is_bad


# ---------------------------------------------------------------- a run that is finished


@pytest.mark.parametrize(("losses", "best"), [([0.2, 0.3], 0), ([0.3, 0.2], 1), ([math.nan, math.nan], 1)])
def test_results_are_those_of_the_best_evaluation_or_else_of_the_last(arguments, losses, best):
    """A run whose evaluations all overflow ends with checkpoint-best too, its last step."""
    history = [{"step": step, "eval_loss": loss} for step, loss in enumerate(losses)]
    trainer = SimpleNamespace(
        args=arguments(do_eval=True),
        eval_dataset=[1],
        state=SimpleNamespace(global_step=1, log_history=history),
        save_metrics=lambda *args, **kwargs: None,
        is_world_process_zero=lambda: False,
    )
    saved = []
    keeper = SimpleNamespace(best_step=None if math.isnan(losses[0]) else best, save_best=lambda: saved.append(1))
    assert finish_run(trainer, keeper, next_command="") == history[best]
    assert keeper.best_step == best
    assert saved == [1] * math.isnan(losses[0])


@pytest.mark.parametrize("stage", STAGES)
def test_a_finished_run_is_told_before_weights_load(stage, tiny_model_dir, tmp_path, monkeypatch, capfd):
    module = importlib.import_module(STAGES[stage])
    argv = stage_flags(stage, tiny_model_dir, tmp_path, max_steps=1, resume_from_checkpoint=True)
    module.main(argv)
    monkeypatch.setattr(module, "load_for_training", lambda *args, **kwargs: pytest.fail("weights were loaded"))
    assert module.main(argv) == {}
    assert "holds a finished run (1 steps): nothing is trained" in capfd.readouterr().err
