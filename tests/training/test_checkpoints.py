"""Checkpoints on the disk: which one a run goes on from, what is damaged, how a folder is replaced whole."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from medtune.errors import UserError
from medtune.training.causal_lm_trainer import CausalLMConfig
from medtune.training.checkpoints import (
    BEST,
    MANIFEST,
    UNFINISHED,
    delete_oldest,
    find_checkpoint,
    put_in_place,
    unfinished_folder,
    write_manifest,
)

ROOT = Path(__file__).resolve().parents[2]
COMPLETE = ("adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth")


@pytest.fixture
def arguments(tmp_path):
    def build(**changes) -> CausalLMConfig:
        return CausalLMConfig(do_train=True, output_dir=str(tmp_path / "out"), use_cpu=True, bf16=False, **changes)

    return build


def make_checkpoint(folder, without: str = "") -> None:
    folder.mkdir(parents=True)
    for name in COMPLETE:
        if name != without:
            (folder / name).write_bytes(b"x")
    if without != "trainer_state.json":
        (folder / "trainer_state.json").write_text(json.dumps({"global_step": 1}))


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


def test_checkpoints_left_behind_do_not_take_the_place_of_the_one_just_written(arguments, tmp_path):
    """The newest is damaged and skipped, so the run goes on from the one before it, with room for one."""
    for step in (200, 300):
        make_checkpoint(tmp_path / "out" / f"checkpoint-{step}", without="optimizer.pt" if step == 300 else "")
    written = tmp_path / "out" / "checkpoint-250"
    make_checkpoint(written)
    delete_oldest(written, save_total_limit=1)
    assert find_checkpoint(arguments(resume_from_checkpoint=True), overwrite_output_dir=False) == str(written)
    assert not (tmp_path / "out" / "checkpoint-200").exists()


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


LOCKS = """
import sys
from pathlib import Path
from medtune.training.checkpoints import no_other_run
with no_other_run(Path(sys.argv[1])):
    print("locked", flush=True)
    sys.stdin.read()
"""


def test_a_folder_in_which_another_run_writes_is_refused(arguments, tmp_path):
    make_checkpoint(tmp_path / "out" / "checkpoint-7")
    command = [sys.executable, "-c", LOCKS, str(tmp_path / "out")]
    other = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "locked\n"
    for changes, overwrite in (({"resume_from_checkpoint": True}, False), ({}, True)):
        with pytest.raises(UserError, match=r"^--output_dir .*out: another run is writing in it"):
            find_checkpoint(arguments(**changes), overwrite_output_dir=overwrite)
    other.kill()
    other.communicate()
    assert find_checkpoint(arguments(resume_from_checkpoint=True), overwrite_output_dir=False)
    assert find_checkpoint(arguments(resume_from_checkpoint=True), overwrite_output_dir=False)


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
