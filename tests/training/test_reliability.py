"""Reliability: runs that are killed, stopped, out of disk or memory, or go wrong, and what is left of them."""

import errno
import importlib
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from stage_runs import STAGES, end_well, logged, stage_flags, start_stage, start_two_processes, write_data
from transformers import AutoConfig, AutoModelForCausalLM

import supervised_finetuning
from medtune.errors import UserError
from medtune.reading.readers import load_dialogues
from medtune.training import guards, out_of_memory, run, steps
from medtune.training.causal_lm_trainer import CausalLMTrainer
from medtune.training.checkpoints import BEST, UNFINISHED, checkpoint_faults
from medtune.training.log import ProgressLines

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
        assert checkpoint_faults(tmp_path / "out" / name) == ""
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


# ---------------------------------------------------------------- resumed by another command


@pytest.fixture
def stopped(flags, tmp_path):
    """A function that leaves checkpoint-2 of a run of 2 x 2 rows a step in out/, and the whole run in whole/."""

    def run(stage: str = "sft", **changes) -> None:
        importlib.import_module(STAGES[stage]).main(flags(stage, output_dir=tmp_path / "whole", **changes))
        shutil.copytree(tmp_path / "whole/checkpoint-2", tmp_path / "out/checkpoint-2")

    return run


@pytest.mark.parametrize("stage", sorted(STAGES))
def test_another_number_of_rows_a_step_is_refused(flags, tmp_path, stopped, stage):
    stopped(stage, max_steps=2)
    main = importlib.import_module(STAGES[stage]).main
    for one, accumulated in ((2, 1), (3, 2)):
        batch = {"per_device_train_batch_size": one, "gradient_accumulation_steps": accumulated}
        with pytest.raises(UserError) as refused:
            main(flags(stage, resume_from_checkpoint=True, **batch))
        assert str(refused.value) == (
            f"rows a step {one * accumulated}: the run in {tmp_path}/out was started with 4, and a resumed run goes on "
            f"with that; make their product what it was ({one} a device x {accumulated} accumulated x 1 process(es) "
            "now: on half the GPUs accumulate twice as many), start again (--resume_from_checkpoint False "
            "--overwrite_output_dir True), or name another --output_dir"
        )


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"seed": 7}, "--seed or --data_seed 7: the run in .* was started with 42"),
        ({"data_seed": 7}, "--seed or --data_seed 7: the run in .* was started with 42"),
        ({"group_by_length": True}, "--train_sampling_strategy group_by_length: .* was started with random"),
    ],
)
def test_another_order_of_the_data_is_refused(flags, stopped, changes, named):
    stopped(max_steps=2)
    with pytest.raises(UserError, match=f"^{named}"):
        supervised_finetuning.main(flags(resume_from_checkpoint=True, **changes))


@pytest.fixture
def of_all_lengths(tmp_path) -> dict:
    """Flags for 24 records none of which is as long as another, so that their order shows in the losses."""
    data = tmp_path / "records.jsonl"
    records = [{"question": "头疼怎么办？", "answer": "请就诊。" * n_times} for n_times in range(1, 25)]
    data.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    return {"max_steps": 8, "lora_dropout": 0.0, "resume_from_checkpoint": True, "train_file_dir": data}


def test_the_same_rows_in_other_batches_are_the_same_run(flags, tmp_path, stopped, of_all_lengths):
    """In the order of the run's beginning, where the longest rows of a batch come first."""
    options = of_all_lengths
    stopped(**options)
    one_row = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
    supervised_finetuning.main(flags(**options, **one_row))
    shutil.copytree(tmp_path / "out/checkpoint-4", tmp_path / "again/checkpoint-4")
    four_rows = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1}
    supervised_finetuning.main(flags(**options, **four_rows, output_dir=tmp_path / "again"))
    for folder in ("out", "again"):
        assert logged(tmp_path / folder) == pytest.approx(logged(tmp_path / "whole"), abs=1e-4)


@pytest.mark.slow
def test_half_the_processes_and_twice_the_accumulation_are_the_same_run(flags, tmp_path, of_all_lengths):
    log = tmp_path / "log"
    two = flags(**of_all_lengths, gradient_accumulation_steps=1, output_dir=tmp_path / "whole")
    end_well(start_two_processes("sft", two, log), log)
    shutil.copytree(tmp_path / "whole/checkpoint-2", tmp_path / "out/checkpoint-2")
    supervised_finetuning.main(flags(**of_all_lengths))
    assert logged(tmp_path / "out") == pytest.approx(logged(tmp_path / "whole"), abs=1e-4)


@pytest.mark.parametrize(
    ("before", "now", "jumps", "rates"),
    [
        ("max_steps 2", "max_steps 4", (0.0, 0.5), [0.5, 0.25]),
        ("max_steps 4", "max_steps 3", (0.5, 1 / 3), [1 / 3]),
        (
            "num_train_epochs 0.25 lr_scheduler_type cosine",
            "num_train_epochs 0.5 lr_scheduler_type cosine",
            (0.0, 0.5),
            [0.5, 0.14645],
        ),
        ("max_steps 4", "max_steps 4 warmup_steps 3", (0.5, 2 / 3), [2 / 3, 1.0]),
        ("max_steps 2 lr_scheduler_type constant", "max_steps 4 lr_scheduler_type constant", None, [1.0, 1.0]),
    ],
)
def test_another_schedule_is_said_and_no_step_has_its_old_rate(
    flags, tmp_path, stopped, capfd, before, now, jumps, rates
):
    def options(text: str) -> dict:
        words = text.split()
        return {"max_steps": None} | dict(zip(words[::2], words[1::2], strict=True))

    stopped(**options(before))
    capfd.readouterr()
    supervised_finetuning.main(flags(**options(now), resume_from_checkpoint=True))
    log = capfd.readouterr().err
    steps = logged(tmp_path / "out", "learning_rate")
    assert [steps[step] for step in sorted(steps) if step > 2] == pytest.approx(
        [1e-3 * rate for rate in rates], rel=1e-3
    )
    lines = [line.partition("WARNING | ")[2] for line in log.splitlines() if "learning rate schedule" in line]
    if jumps is None:
        assert lines == []
    else:
        old, new = (f"{1e-3 * rate:.2e}" for rate in jumps)
        assert lines == [
            f"another learning rate schedule than the run in {tmp_path}/out was started with, by other steps, epochs "
            f"or warmup: its next rate was {old}, and step 3 is made with {new}; a new run that starts from "
            f"{tmp_path}/out/checkpoint-best has a whole schedule"
        ]


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
            assert checkpoint_faults(checkpoint) == "", f"kill {kill} left {checkpoint}"
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


# ---------------------------------------------------------------- the disk is full


@pytest.fixture
def small_disk(tmp_path) -> Callable[[int], Path]:
    """A function that gives a disk so many KiB, and keeps what is on it."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("file systems cannot be mounted here")

    def resize(n_kib: int) -> Path:
        subprocess.run(["mount", "-o", f"remount,size={n_kib}k", str(folder)], check=True)
        return folder

    yield resize
    subprocess.run(["umount", "--lazy", str(folder)], check=True)  # weights that were read may be mapped still


@pytest.mark.parametrize("room", [0.1, 0.6])  # not for the third checkpoint's weights; not for its optimizer
def test_full_disk_names_disk_and_last_checkpoint(flags, uninterrupted, monkeypatch, small_disk, room):
    sizes = [sum(file.stat().st_size for file in folder.rglob("*")) for folder in uninterrupted.glob("checkpoint-[39]")]
    disk = small_disk(int((2 + room) * max(sizes)) // 1024)
    argv = flags(**WHOLE, output_dir=disk / "out")
    monkeypatch.setattr(run, "check_disk", lambda trainer: None)  # somebody else filled the disk since
    with pytest.raises(UserError) as stopped:
        supervised_finetuning.main(argv)
    message = (
        rf"^no space left on the disk at {disk} for .*; the last complete checkpoint is {disk}/out/checkpoint-6\. "
    )
    assert re.search(message, str(stopped.value))
    assert {path.name for path in (disk / "out").iterdir()} == {"checkpoint-3", "checkpoint-6"}
    assert checkpoint_faults(disk / "out/checkpoint-6") == ""
    small_disk(64 * 1024)
    supervised_finetuning.main([*argv, "--resume_from_checkpoint", "True"])
    assert max(logged(disk / "out")) == 10


def test_full_disk_while_results_are_written_is_one_line(flags, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(CausalLMTrainer, "save_metrics", full)
    with pytest.raises(UserError, match=r"^no space left on the disk at .*; the last complete checkpoint is .*int-2"):
        supervised_finetuning.main(flags(max_steps=2))


def test_too_small_a_disk_is_refused_before_the_first_step(flags, tmp_path, monkeypatch):
    usage = type("Usage", (), {"free": 50 * 2**20})
    monkeypatch.setattr(out_of_memory.shutil, "disk_usage", lambda folder: usage)
    message = r"the run writes 4 checkpoints of about 0\.02 GiB and checkpoint-best, .* has 0\.05 GiB left; make room"
    with pytest.raises(UserError, match=message):
        supervised_finetuning.main(flags(**WHOLE))
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("use_peft", [True, False])
def test_estimated_size_of_a_checkpoint(flags, tmp_path, monkeypatch, use_peft):
    estimates = []
    estimate = steps._estimated_bytes
    monkeypatch.setattr(run, "check_disk", lambda trainer: estimates.extend(estimate(trainer)))
    supervised_finetuning.main(flags(max_steps=2, use_peft=use_peft))
    folder = tmp_path / "out/checkpoint-2"
    weights = (folder / ("adapter_model" if use_peft else "model")).with_suffix(".safetensors").stat().st_size
    both = weights + (folder / "optimizer.pt").stat().st_size
    assert estimates[0] == pytest.approx(weights, rel=0.1)
    assert estimates[1] == pytest.approx(both, rel=0.1)


# ---------------------------------------------------------------- the memory is full


@pytest.fixture
def room_for(monkeypatch) -> Callable[[int], None]:
    """A function that lets the forward pass run out of memory above so many rows."""
    compute = CausalLMTrainer.compute_loss

    def limit(n_rows: int) -> None:
        def compute_loss(self, model, inputs, *args, **kwargs):
            if len(inputs["input_ids"]) > n_rows:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
            return compute(self, model, inputs, *args, **kwargs)

        monkeypatch.setattr(CausalLMTrainer, "compute_loss", compute_loss)

    return limit


def test_out_of_memory_names_the_remedies_with_the_values_of_the_run(flags, room_for):
    room_for(1)
    with pytest.raises(UserError) as stopped:
        supervised_finetuning.main(flags(gradient_accumulation_steps=16))
    assert str(stopped.value) == (
        "out of memory at step 1; in this order: --per_device_train_batch_size 1 --gradient_accumulation_steps 32 (now "
        "2 and 16); --gradient_checkpointing True; --load_in_4bit True; --model_max_length 51 (the longest row has 102 "
        "tokens); --lora_rank 8 (now 16)"
    )


# ---------------------------------------------------------------- the loss goes wrong


@pytest.fixture
def spoil(monkeypatch) -> Callable[[set[int], Callable], None]:
    """A function that puts something in the place of the loss in these steps."""
    compute = CausalLMTrainer.compute_loss

    def put(steps: set[int], change: Callable[[torch.Tensor, torch.nn.Module], torch.Tensor]) -> None:
        def compute_loss(self, model, inputs, *args, **kwargs):
            loss = compute(self, model, inputs, *args, **kwargs)
            return change(loss, model) if self.state.global_step + 1 in steps else loss

        monkeypatch.setattr(CausalLMTrainer, "compute_loss", compute_loss)

    return put


def with_infinite_slope(loss: torch.Tensor, model: torch.nn.Module) -> torch.Tensor:
    """The same value."""
    weights = next(weights for weights in model.parameters() if weights.requires_grad)
    return loss + (weights * 0).sum().sqrt()


BAD_LOSSES = {
    "the loss is nan": lambda loss, model: loss * math.nan,
    r"the gradient is nan, the loss \d\.\d{4}": with_infinite_slope,
}


@pytest.mark.parametrize("what", BAD_LOSSES)
def test_a_bad_step_is_left_out(flags, tmp_path, spoil, capfd, what):
    spoil({1, 3}, BAD_LOSSES[what])
    supervised_finetuning.main(flags(max_steps=4, save_steps=1))
    log = capfd.readouterr().err
    where = r"at learning rate \d\.\d\de-0\d on .*records\.jsonl:\d+, .*records\.jsonl:\d+"
    for step in (1, 3):
        assert re.search(rf"step {step}: {what} {where}; bad step 1 in a row, left out", log)
    second, third, fourth = (load_file(tmp_path / f"out/checkpoint-{n}/adapter_model.safetensors") for n in (2, 3, 4))
    assert all(torch.equal(second[name], third[name]) for name in second)
    assert not all(torch.equal(third[name], fourth[name]) for name in third)
    assert all(weights.isfinite().all() for weights in fourth.values())


def test_bad_steps_in_a_row_stop_the_run(flags, spoil):
    spoil({2, 3}, lambda loss, model: loss * math.nan)
    message = (
        r"^step 3: the loss is nan at learning rate 5\.00e-04 on .*; 2 bad step\(s\) in a row \(--max_bad_steps 2\)"
    )
    with pytest.raises(UserError, match=message):
        supervised_finetuning.main(flags(max_bad_steps=2))


def test_a_loss_that_explodes_stops_the_run(flags, spoil, monkeypatch):
    monkeypatch.setattr(guards, "RECENT_STEPS", 6)
    spoil(set(range(5, 20)), lambda loss, model: loss * 100)
    message = r"^step 7: the loss is \d{3}\.\d+, where \d\.\d+ was the largest at learning rate .*; 3 bad step"
    with pytest.raises(UserError, match=message):
        supervised_finetuning.main(flags(max_steps=20, save_strategy="no"))


# ---------------------------------------------------------------- wrong and hostile inputs


HOSTILE_TEMPLATES = {
    "reads a class": "{{ messages.__class__.__mro__[-1].__subclasses__() }}",
    "imports": "{{ cycler.__init__.__globals__.os.system('touch SIGN') }}",
    "changes its input": "{{ messages.append(1) }}",
    "never ends": "{% for number in range(10 ** 12) %}{{ number }}{% endfor %}",
    "adds a number to a text": "{{ messages[0]['content'] + 1 }}",
}


@pytest.mark.parametrize("case", HOSTILE_TEMPLATES)
def test_a_chat_template_runs_no_code(flags, tiny_model_dir, tmp_path, monkeypatch, case):
    model = tmp_path / "model"
    shutil.copytree(tiny_model_dir, model)
    (model / "chat_template.jinja").write_text(HOSTILE_TEMPLATES[case].replace("SIGN", str(tmp_path / "sign")))
    monkeypatch.setattr(supervised_finetuning, "load_for_training", lambda *a, **k: pytest.fail("a model was loaded"))
    with pytest.raises(UserError):
        supervised_finetuning.main(flags(model_name_or_path=model, template_name=None))
    assert not (tmp_path / "sign").exists()


def test_a_link_that_leads_back_is_named(flags, tmp_path):
    folder = write_data("sft", tmp_path)
    (folder / "deep").mkdir()
    (folder / "deep/back").symlink_to(folder)
    with pytest.raises(
        UserError, match=r"^--train_file_dir .*: .*deep/back leads back to a folder that it is in; remove"
    ):
        supervised_finetuning.main(flags())


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"question": ' + "[" * 100_000, "broken JSON: .*recursion"),
        ('{"question": ' + "9" * 10_000 + "}", "broken JSON: .*digits"),
        ("x" * 100_000_000, r"broken JSON: .*column 1\)"),
        ('{"question": "' + "头" * 30_000_000 + '", "answer": 1}', "not text"),
    ],
    ids=["deep", "long number", "100 MB of nothing", "100 MB of a question"],
)
def test_a_monstrous_line_is_a_fault_with_its_place(tmp_path, line, reason):
    file = tmp_path / "d.jsonl"
    file.write_text(line + "\n" + '{"question": "头疼怎么办？", "answer": "请就诊。"}\n', encoding="utf-8")
    with pytest.raises(UserError) as refused:
        load_dialogues([file])
    assert re.search(rf"d\.jsonl:1: {reason}", str(refused.value))
    assert len(str(refused.value)) < 1000
    dialogues, report = load_dialogues([file], on_bad_data="drop")
    assert (len(dialogues), sum(report.dropped.values())) == (1, 1)


def test_pickle_weights_are_refused_before_anything_is_read(flags, tiny_model_dir, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(tiny_model_dir, model)
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"^--model_name_or_path .*: only pickle weights \(\.bin\), which can run code"):
        supervised_finetuning.main(flags(model_name_or_path=model))


def test_an_adapter_of_another_base_is_refused(flags, tiny_model_dir, tmp_path):
    supervised_finetuning.main(flags(max_steps=1, save_strategy="no"))
    adapter, other = tmp_path / "out" / BEST, tmp_path / "other"
    shutil.copytree(tiny_model_dir, other)
    config = json.loads((other / "config.json").read_text()) | {"intermediate_size": 64}
    AutoModelForCausalLM.from_config(AutoConfig.for_model(**config)).save_pretrained(other)
    text = (adapter / "adapter_config.json").read_text().replace(str(tiny_model_dir), str(other))
    (adapter / "adapter_config.json").write_text(text)
    with pytest.raises(UserError, match=r"the adapter does not fit .*other: other layers or sizes"):
        supervised_finetuning.main(flags(model_name_or_path=adapter, output_dir=tmp_path / "second"))
