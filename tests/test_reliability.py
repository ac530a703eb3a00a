"""Bad days: runs that are killed, stopped, out of disk or memory, or go wrong, and what is left of them."""

import os
import random
import re
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from stage_runs import STAGES, logged, stage_flags, start_stage

import supervised_finetuning
import training_run
from training_run import BEST, UNFINISHED, ProgressLines

# Dropout, so that a resumed run needs the right random numbers; logging between steps, so it needs the sums of losses.
WHOLE = {"max_steps": 10, "save_steps": 3, "logging_steps": 2, "lora_dropout": 0.2, "lr_scheduler_type": "cosine"}
EVALUATED = WHOLE | {"do_eval": True, "max_eval_samples": 4, "eval_strategy": "steps", "eval_steps": 4}


@pytest.fixture
def flags(tiny_model_dir, tmp_path):
    return lambda stage="sft", **changes: stage_flags(stage, tiny_model_dir, tmp_path, **changes)


def assert_same_run(run: Path, expected: Path) -> None:
    """The same losses and evaluations in the log, and the same weights in the end."""
    for name in ("loss", "eval_loss"):
        assert logged(run, name) == logged(expected, name)
    weights, wanted = (load_file(folder / BEST / "adapter_model.safetensors") for folder in (run, expected))
    assert weights.keys() == wanted.keys()
    assert all(torch.equal(weights[name], wanted[name]) for name in wanted)
    assert not (run / UNFINISHED).exists()


# ---------------------------------------------------------------- signals


SENT_AT = {
    "within a step": ("on_substep_end", 5),
    "within the first step of an epoch": ("on_substep_end", 8),
    "at the end of a step": ("on_step_begin", 5),
    "at the end of a step that is evaluated": ("on_step_begin", 3),
    "within an evaluation": ("on_prediction_step", 4),
    "while a checkpoint is saved": ("on_save", 6),
}
SIGNALS = [(moment, signal.SIGTERM, 143) for moment in SENT_AT] + [("within a step", signal.SIGINT, 130)]


@pytest.fixture(scope="module")
def uninterrupted(tiny_model_dir, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    supervised_finetuning.main(stage_flags("sft", tiny_model_dir, folder, **EVALUATED))
    return folder / "out"


@pytest.mark.parametrize(("moment", "number", "code"), SIGNALS)
def test_a_signal_costs_nothing(flags, tmp_path, uninterrupted, monkeypatch, capfd, moment, number, code):
    method, step = SENT_AT[moment]

    def send(self, args, state, control, **kwargs):
        if state.global_step == step:
            os.kill(os.getpid(), number)

    with monkeypatch.context() as patch:
        patch.setattr(ProgressLines, method, send, raising=False)
        with pytest.raises(SystemExit) as stopped:
            supervised_finetuning.main(flags(**EVALUATED))
    assert stopped.value.code == code
    saved = sorted(path.name for path in (tmp_path / "out").glob("checkpoint-[0-9]*"))
    assert re.search(
        rf"{signal.Signals(number).name}: stopped at step \d+/10, saved in .*/checkpoint-\d", capfd.readouterr().err
    )
    for name in saved:
        assert training_run._faults(tmp_path / "out" / name) == ""
    supervised_finetuning.main(flags(**EVALUATED, resume_from_checkpoint=True))
    assert_same_run(tmp_path / "out", uninterrupted)


def test_signal_before_the_first_step_saves_nothing(flags, tmp_path, monkeypatch, capfd):
    def send(self, args, state, control, **kwargs):
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(ProgressLines, "on_substep_end", send, raising=False)
    with pytest.raises(SystemExit) as stopped:
        supervised_finetuning.main(flags())
    assert stopped.value.code == 143
    assert "stopped at step 0/4, before there was anything to save" in capfd.readouterr().err
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").glob("checkpoint*"))


def test_evaluations_leave_training_as_it_is(flags, tmp_path, uninterrupted):
    supervised_finetuning.main(flags(**EVALUATED | {"eval_steps": 1}))
    assert logged(tmp_path / "out") == logged(uninterrupted)


def test_a_run_killed_behind_its_last_step_trains_no_further(flags, tmp_path, uninterrupted, monkeypatch):
    """10 steps end within an epoch, where transformers would train one more."""
    monkeypatch.setattr(supervised_finetuning, "finish_run", lambda *args, **kwargs: {})
    supervised_finetuning.main(flags(**EVALUATED))
    monkeypatch.undo()
    supervised_finetuning.main(flags(**EVALUATED, resume_from_checkpoint=True))
    assert_same_run(tmp_path / "out", uninterrupted)


# ---------------------------------------------------------------- killed


def kill_again_and_again(stage: str, argv: list[str], out: Path, n_kills: int) -> None:
    """Start a run, kill it at a random moment, and again; every other time while it writes a checkpoint."""
    moments = random.Random(0)
    log = out.with_suffix(".log")
    log.touch()
    for kill in range(n_kills):
        n_bytes = log.stat().st_size
        process = start_stage(stage, argv, log)
        deadline = time.monotonic() + 300
        while process.is_alive():
            assert time.monotonic() < deadline, log.read_text()[-2000:]
            if kill % 2 and (out / UNFINISHED).exists():
                break
            if not kill % 2 and b"gradient checkpointing" in log.read_bytes()[n_bytes:]:  # it is about to train
                time.sleep(moments.uniform(0, 1.5))
                break
            time.sleep(0.002)
        process.kill()
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL), log.read_text()[-2000:]
        for checkpoint in out.glob("checkpoint-[0-9]*"):
            assert training_run._faults(checkpoint) == "", f"kill {kill} left {checkpoint}"
    process = start_stage(stage, argv, log)
    process.join(300)
    assert process.exitcode == 0, log.read_text()[-2000:]


@pytest.mark.parametrize("n_kills", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_kill_9_costs_nothing_but_the_steps_since_the_last_checkpoint(flags, tmp_path, uninterrupted, n_kills):
    options = EVALUATED | {"resume_from_checkpoint": True}
    kill_again_and_again("sft", flags(**options), tmp_path / "out", n_kills)
    assert_same_run(tmp_path / "out", uninterrupted)


@pytest.mark.slow
@pytest.mark.parametrize("stage", sorted(set(STAGES) - {"sft"}))
def test_every_stage_goes_on_after_kill_9(flags, tmp_path, stage):
    options = WHOLE | {"resume_from_checkpoint": True}
    log = tmp_path / "whole.log"
    whole = start_stage(stage, flags(stage, **options, output_dir=tmp_path / "whole"), log)
    whole.join(300)
    assert whole.exitcode == 0, log.read_text()[-2000:]
    kill_again_and_again(stage, flags(stage, **options), tmp_path / "out", n_kills=2)
    assert_same_run(tmp_path / "out", tmp_path / "whole")
