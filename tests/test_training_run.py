"""What surrounds training: where a run starts, what it says, what stops it."""

import json
import os
import subprocess
from types import SimpleNamespace

import pytest
import torch
from trl import SFTConfig

import training_run
from errors import UserError
from training_run import (
    BEST,
    MANIFEST,
    RECENT_STEPS,
    UNFINISHED,
    AdapterMovementCheck,
    BadSteps,
    ProgressLines,
    find_checkpoint,
    plot_curves,
    put_in_place,
    start_run,
    unfinished_folder,
    write_manifest,
)

COMPLETE = ("adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth")


@pytest.fixture
def arguments(tmp_path):
    def build(**changes) -> SFTConfig:
        return SFTConfig(output_dir=str(tmp_path / "out"), use_cpu=True, bf16=False, **changes)

    return build


def make_checkpoint(folder, without: str = "") -> None:
    folder.mkdir(parents=True)
    for name in COMPLETE:
        if name != without:
            (folder / name).write_bytes(b"x")
    if without != "trainer_state.json":
        (folder / "trainer_state.json").write_text(json.dumps({"global_step": 1}))


# ---------------------------------------------------------------- where a run starts


def test_empty_folder_starts_a_new_run(arguments, tmp_path):
    assert find_checkpoint(arguments(), overwrite_output_dir=False) is None
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    assert find_checkpoint(arguments(), overwrite_output_dir=True) is None
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"


def test_newest_checkpoint_is_by_number_not_by_name(arguments, tmp_path):
    for step in (9, 10, 100):
        make_checkpoint(tmp_path / "out" / f"checkpoint-{step}")
    (tmp_path / "out" / "checkpoint-best").mkdir()
    found = find_checkpoint(arguments(resume_from_checkpoint=True), overwrite_output_dir=False)
    assert found == str(tmp_path / "out" / "checkpoint-100")


@pytest.mark.parametrize("missing", [*COMPLETE, "trainer_state.json"])
def test_incomplete_checkpoint_is_skipped_or_refused(arguments, tmp_path, missing):
    make_checkpoint(tmp_path / "out" / "checkpoint-1")
    newest = tmp_path / "out" / "checkpoint-2"
    make_checkpoint(newest, without=missing)
    found = find_checkpoint(arguments(resume_from_checkpoint=True), overwrite_output_dir=False)
    assert found == str(tmp_path / "out" / "checkpoint-1")
    with pytest.raises(UserError, match=r"checkpoint-2: without [\w. ]+; take another checkpoint"):
        find_checkpoint(arguments(resume_from_checkpoint=str(newest)), overwrite_output_dir=False)


def test_truncated_state_counts_as_missing(arguments, tmp_path):
    make_checkpoint(tmp_path / "out" / "checkpoint-3")
    (tmp_path / "out" / "checkpoint-3" / "trainer_state.json").write_text('{"global_')
    with pytest.raises(UserError, match=r"without a readable trainer_state\.json"):
        find_checkpoint(arguments(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-3")), False)


@pytest.mark.parametrize("damage", ["cut", "changed", "gone"])
def test_damage_is_told_by_the_manifest(arguments, tmp_path, damage):
    for step in (1, 2):
        make_checkpoint(tmp_path / "out" / f"checkpoint-{step}")
        (tmp_path / "out" / f"checkpoint-{step}" / "tokenizer.json").write_text("a tokenizer")
        write_manifest(tmp_path / "out" / f"checkpoint-{step}")
    newest = tmp_path / "out" / "checkpoint-2"
    assert find_checkpoint(arguments(resume_from_checkpoint=True), overwrite_output_dir=False) == str(newest)
    if damage == "gone":
        (newest / "tokenizer.json").unlink()
    else:
        (newest / "tokenizer.json").write_text("a token" if damage == "cut" else "b tokenizer")
    found = find_checkpoint(arguments(resume_from_checkpoint=True), overwrite_output_dir=False)
    assert found == str(tmp_path / "out" / "checkpoint-1")
    with pytest.raises(UserError, match=r"checkpoint-2: damaged: tokenizer\.json; take another checkpoint"):
        find_checkpoint(arguments(resume_from_checkpoint=str(newest)), overwrite_output_dir=False)


@pytest.mark.parametrize("content", [b"no line of it", b"\xff\x00"])
def test_a_broken_manifest_is_a_damage(arguments, tmp_path, content):
    for step in (1, 2):
        make_checkpoint(tmp_path / "out" / f"checkpoint-{step}")
    newest = tmp_path / "out" / "checkpoint-2"
    (newest / MANIFEST).write_bytes(content)
    found = find_checkpoint(arguments(resume_from_checkpoint=True), overwrite_output_dir=False)
    assert found == str(tmp_path / "out" / "checkpoint-1")
    with pytest.raises(UserError, match=rf"checkpoint-2: damaged: {MANIFEST}; take another checkpoint"):
        find_checkpoint(arguments(resume_from_checkpoint=str(newest)), overwrite_output_dir=False)


def test_manifest_is_what_sha256sum_reads(tmp_path):
    make_checkpoint(tmp_path / "checkpoint-1")
    write_manifest(tmp_path / "checkpoint-1")
    command = ["sha256sum", "--check", "--strict", MANIFEST]
    assert subprocess.run(command, cwd=tmp_path / "checkpoint-1", check=False).returncode == 0


def test_what_a_killed_run_left_is_cleared(arguments, tmp_path):
    unfinished = tmp_path / "out" / UNFINISHED
    (unfinished / "checkpoint-9").mkdir(parents=True)
    assert find_checkpoint(arguments(resume_from_checkpoint=True), overwrite_output_dir=False) is None
    assert not unfinished.exists()
    for folder in (unfinished / BEST, unfinished / f"{BEST}.replaced"):  # killed between the two moves
        folder.mkdir(parents=True)
        (folder / "who").write_text(folder.name)
    make_checkpoint(tmp_path / "out" / "checkpoint-3")
    assert find_checkpoint(arguments(resume_from_checkpoint=True), overwrite_output_dir=False)
    assert (tmp_path / "out" / BEST / "who").read_text() == f"{BEST}.replaced"
    assert not unfinished.exists()


def test_a_run_that_was_stopped_before_its_first_checkpoint_starts_again(arguments, tmp_path):
    (tmp_path / "out" / BEST).mkdir(parents=True)
    assert find_checkpoint(arguments(resume_from_checkpoint=True), overwrite_output_dir=False) is None
    assert (tmp_path / "out.earlier-1" / BEST).is_dir()


def test_a_folder_is_replaced_whole(tmp_path):
    for text in ("old", "new"):
        (unfinished_folder(tmp_path / BEST) / "weights").write_text(text)
        put_in_place(tmp_path / BEST)
        assert (tmp_path / BEST / "weights").read_text() == text
    assert [path.name for path in tmp_path.iterdir()] == [BEST]


def test_output_folder_that_takes_no_files_is_refused(arguments, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)
    with pytest.raises(
        UserError, match=rf"^--output_dir {tmp_path}/out: {tmp_path} cannot be written to; name another"
    ):
        find_checkpoint(arguments(), overwrite_output_dir=False)


def test_resume_goes_before_overwrite(arguments, tmp_path):
    make_checkpoint(tmp_path / "out" / "checkpoint-7")
    found = find_checkpoint(arguments(resume_from_checkpoint=True), overwrite_output_dir=True)
    assert found == str(tmp_path / "out" / "checkpoint-7")


def test_overwriting_keeps_every_earlier_run(arguments, tmp_path):
    for number in (1, 2):
        make_checkpoint(tmp_path / "out" / "checkpoint-5")
        (tmp_path / "out" / "mark").write_text(str(number))
        assert find_checkpoint(arguments(), overwrite_output_dir=True) is None
        assert not (tmp_path / "out").exists()
    assert [(tmp_path / f"out.earlier-{number}" / "mark").read_text() for number in (1, 2)] == ["1", "2"]


# ---------------------------------------------------------------- what it says


def test_versions_other_than_the_tested_ones_are_named(arguments, capfd, monkeypatch):
    found = {"torch": "2.13.0+cu130", "transformers": "5.23.0"}
    monkeypatch.setattr(training_run, "version", lambda package: found.get(package, "1.0"))
    start_run("a stage", arguments(), ["a note"])
    log = capfd.readouterr().err
    assert "a note" in log
    assert "transformers 5.23.0 (tested: 5.24.0)" in log
    assert "torch 2.13.0+cu130," in log
    assert "torch 2.13.0+cu130 (tested" not in log


def test_progress_line_has_all_that_tail_needs(arguments, capfd):
    start_run("a stage", arguments(), [])
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
    start_run("a stage", training_args, ["a note"])
    assert "a note" not in capfd.readouterr().err


@pytest.mark.parametrize(("seconds", "text"), [(59, "0 min 59 s"), (3599, "59 min 59 s"), (7260, "2 h 01 min")])
def test_duration(seconds, text):
    assert training_run.duration(seconds) == text


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
    ("usual", "loss", "is_bad"),
    [(0.02, 2.9, False), (0.02, 3.1, True), (1.5, 5.9, False), (1.5, 6.1, True), (-1.0, 3.9, False), (-1.0, 4.1, True)],
)
def test_a_loss_explodes_by_factor_and_by_nats(arguments, capfd, usual, loss, is_bad):
    start_run("a stage", arguments(), [])
    trainer = SimpleNamespace(training_step=lambda model, inputs: inputs["loss"], _get_learning_rate=lambda: 1e-3)
    bad_steps = BadSteps(trainer, 3, AdapterMovementCheck())
    model, state = TwoMatrices(1.0), SimpleNamespace(global_step=0)
    for value in [usual] * (RECENT_STEPS // 2) + [loss]:
        bad_steps.on_step_begin(arguments(), state, None)
        trainer.training_step(model, {"loss": torch.tensor(value), "sources": ["d.jsonl:1"]})
        bad_steps.on_pre_optimizer_step(arguments(), state, None, model=model)
    assert bad_steps.in_a_row == is_bad
    line = f"step 1: the loss is {loss:.4f} after a median of {usual:.4f} at learning rate 1.00e-03 on d.jsonl:1"
    assert (line in capfd.readouterr().err) == is_bad
