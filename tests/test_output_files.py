"""Outputs appear whole or not at all, never over an input or over what a user did not give up."""

import errno
import gzip
import os
import shutil
from pathlib import Path

import pytest

from medtune.errors import UserError
from medtune.output_files import MADE_BY_A_TOOL, new_folder, new_text_file, refuse_same, refuse_unwritable


def write(path: Path, text: str, overwrite: bool = False) -> None:
    with new_text_file(path, "--output", overwrite) as file:
        file.write(text)


def files_below(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


class TestTextFile:
    def test_writes_utf8_in_new_folders_and_leaves_nothing_else(self, tmp_path):
        write(tmp_path / "a/b/train.jsonl", "感冒\n多喝水\n")
        assert (tmp_path / "a/b/train.jsonl").read_bytes() == "感冒\n多喝水\n".encode()
        assert files_below(tmp_path) == ["a", "a/b", "a/b/train.jsonl"]

    def test_is_in_its_place_only_once_whole(self, tmp_path):
        path = tmp_path / "train.jsonl"
        with new_text_file(path, "--output", overwrite=False) as file:
            file.write("half")
            assert not path.exists()
            assert files_below(tmp_path) == [".train.jsonl.partial"]
        assert path.read_text() == "half"

    def test_a_failed_run_leaves_what_was_there(self, tmp_path):
        path = tmp_path / "train.jsonl"
        path.write_text("before")
        with pytest.raises(KeyboardInterrupt), new_text_file(path, "--output", overwrite=True) as file:
            file.write("after")
            raise KeyboardInterrupt
        assert path.read_text() == "before"
        assert files_below(tmp_path) == ["train.jsonl"]

    def test_a_killed_runs_rest_is_no_obstacle(self, tmp_path):
        (tmp_path / ".train.jsonl.partial").write_text("a much longer rest of a run that was killed")
        write(tmp_path / "train.jsonl", "new")
        assert (tmp_path / "train.jsonl").read_text() == "new"
        assert files_below(tmp_path) == ["train.jsonl"]

    def test_gz_is_compressed_and_the_same_bytes_each_time(self, tmp_path):
        write(tmp_path / "one.jsonl.gz", "感冒\n" * 100)
        write(tmp_path / "two.jsonl.gz", "感冒\n" * 100)
        content = (tmp_path / "one.jsonl.gz").read_bytes()
        assert gzip.decompress(content).decode() == "感冒\n" * 100
        assert len(content) < 100
        assert (tmp_path / "two.jsonl.gz").read_bytes() == content

    def test_refuses_an_existing_file_without_overwrite(self, tmp_path):
        path = tmp_path / "train.jsonl"
        path.write_text("before")
        with pytest.raises(UserError, match=r"^--output .*train.jsonl: exists already; .* --overwrite"):
            write(path, "after")
        assert path.read_text() == "before"
        write(path, "after", overwrite=True)
        assert path.read_text() == "after"

    def test_a_tool_that_never_overwrites_offers_no_flag_for_it(self, tmp_path):
        write(tmp_path / "train.jsonl", "before", overwrite=None)
        with pytest.raises(UserError, match=r"it exists and is not written over; name another file or move it$"):
            write(tmp_path / "train.jsonl", "after", overwrite=None)
        assert (tmp_path / "train.jsonl").read_text() == "before"

    @pytest.mark.parametrize(("text", "left"), [("half", ["train.jsonl.partial"]), ("", [])])
    def test_what_a_failed_run_wrote_can_be_kept(self, tmp_path, text, left):
        path = tmp_path / "train.jsonl"
        with (
            pytest.raises(KeyboardInterrupt),
            new_text_file(path, "--output", overwrite=None, keep_partial=True) as file,
        ):
            file.write(text)
            raise KeyboardInterrupt
        assert files_below(tmp_path) == left
        with new_text_file(path, "--output", overwrite=None, keep_partial=True) as file:
            file.write("whole")
        assert files_below(tmp_path) == ["train.jsonl"]

    @pytest.mark.parametrize("overwrite", [False, True])
    def test_refuses_a_folder(self, tmp_path, overwrite):
        for folder in (tmp_path, Path("/"), Path()):
            with pytest.raises(UserError, match=r"--output .*: a folder; name the file"):
                write(folder, "text", overwrite)

    def test_refuses_what_cannot_be_written_in_one_line(self, tmp_path):
        (tmp_path / "file").write_text("")
        for path in (tmp_path / "file/train.jsonl", tmp_path / ("long" * 70), Path("/proc/train.jsonl")):
            with pytest.raises(UserError, match=r"^--output .*: cannot be written \(.*\)$"):
                write(path, "text")
            with (
                pytest.raises(UserError, match=r"^--output .*: cannot be written \(.*\)$"),
                new_text_file(path, "--output", overwrite=None, keep_partial=True),
            ):
                pass

    def test_a_full_disk_is_one_line_and_leaves_nothing(self, tmp_path):
        with (
            pytest.raises(UserError, match="cannot be written \\(No space left on device\\)"),
            new_text_file(tmp_path / "train.jsonl", "--output", overwrite=False),
        ):
            raise OSError(errno.ENOSPC, "No space left on device")
        assert files_below(tmp_path) == []

    def test_a_folder_that_vanishes_is_said_in_one_line(self, tmp_path):
        with (
            pytest.raises(UserError, match=r"^--output .*train.jsonl: cannot be written \(No such file"),
            new_text_file(tmp_path / "out/train.jsonl", "--output", overwrite=False),
        ):
            shutil.rmtree(tmp_path / "out")

    def test_another_files_fault_is_not_the_outputs(self, tmp_path):
        with (
            pytest.raises(PermissionError, match="elsewhere"),
            new_text_file(tmp_path / "train.jsonl", "--output", overwrite=False),
        ):
            raise PermissionError(errno.EACCES, "Permission denied", str(tmp_path / "elsewhere"))

    def test_a_link_stays_a_link(self, tmp_path):
        (tmp_path / "disk").mkdir()
        (tmp_path / "disk/train.jsonl").write_text("before")
        (tmp_path / "train.jsonl").symlink_to(tmp_path / "disk/train.jsonl")
        write(tmp_path / "train.jsonl", "after", overwrite=True)
        assert (tmp_path / "train.jsonl").is_symlink()
        assert (tmp_path / "disk/train.jsonl").read_text() == "after"


class TestFolder:
    def test_is_in_its_place_only_once_whole(self, tmp_path):
        path = tmp_path / "a/processed"
        with new_folder(path, "--output_dir", overwrite=False) as folder:
            (folder / "train.jsonl").write_text("new")
            assert not path.exists()
        assert files_below(path) == [MADE_BY_A_TOOL, "train.jsonl"]
        assert files_below(path.parent) == ["processed", f"processed/{MADE_BY_A_TOOL}", "processed/train.jsonl"]

    def test_a_failed_run_leaves_what_was_there(self, tmp_path):
        with new_folder(tmp_path / "processed", "--output_dir", overwrite=False) as folder:
            (folder / "old.jsonl").write_text("old")
        with (
            pytest.raises(ZeroDivisionError),
            new_folder(tmp_path / "processed", "--output_dir", overwrite=True) as folder,
        ):
            (folder / "new.jsonl").write_text("new")
            raise ZeroDivisionError
        assert files_below(tmp_path) == ["processed", f"processed/{MADE_BY_A_TOOL}", "processed/old.jsonl"]

    def test_overwrite_replaces_what_a_tool_made(self, tmp_path):
        for name in ("old", "new"):
            with new_folder(tmp_path / "processed", "--output_dir", overwrite=True) as folder:
                (folder / name).write_text("")
        assert files_below(tmp_path / "processed") == [MADE_BY_A_TOOL, "new"]

    def test_a_tool_that_never_overwrites_leaves_what_none_replaces(self, tmp_path):
        with new_folder(tmp_path / "merged", "--output_dir", overwrite=None) as folder:
            (folder / "model").write_text("")
        assert files_below(tmp_path / "merged") == ["model"]
        for overwrite, message in (
            (None, "it holds something already; name a new folder"),
            (True, "no tool here made"),
        ):
            with (
                pytest.raises(UserError, match=message),
                new_folder(tmp_path / "merged", "--output_dir", overwrite),
            ):
                pytest.fail("the folder is written to")

    def test_an_empty_folder_is_taken(self, tmp_path):
        (tmp_path / "processed").mkdir()
        with new_folder(tmp_path / "processed", "--output_dir", overwrite=False) as folder:
            (folder / "new").write_text("")
        assert files_below(tmp_path / "processed") == [MADE_BY_A_TOOL, "new"]

    def test_refuses_a_filled_folder(self, tmp_path):
        (tmp_path / "mine.jsonl").write_text("years of work")
        for overwrite, message in ((False, "is not empty; .*--overwrite"), (True, "files that no tool here made")):
            with (
                pytest.raises(UserError, match=f"^--output_dir .*: .*{message}"),
                new_folder(tmp_path, "--output_dir", overwrite),
            ):
                pass
        assert (tmp_path / "mine.jsonl").read_text() == "years of work"

    def test_refuses_a_file(self, tmp_path):
        (tmp_path / "file").write_text("")
        with pytest.raises(UserError, match="a file; name the folder"), new_folder(tmp_path / "file", "--out", True):
            pass


class TestRefuseSame:
    def test_the_same_file_however_it_is_spelled(self, tmp_path):
        raw = tmp_path / "raw.jsonl"
        raw.write_text("")
        (tmp_path / "symbolic.jsonl").symlink_to(raw)
        (tmp_path / "hard.jsonl").hardlink_to(raw)
        for output in (raw, tmp_path / "x/../raw.jsonl", tmp_path / "symbolic.jsonl", tmp_path / "hard.jsonl"):
            with pytest.raises(UserError, match=r"^--output .*: is among the files to read"):
                refuse_same([raw], output, "--output")

    def test_a_folder_that_holds_an_input(self, tmp_path):
        raw = tmp_path / "data/deep/raw.jsonl"
        raw.parent.mkdir(parents=True)
        raw.write_text("")
        with pytest.raises(UserError, match=r"^--output_dir .*: holds .*raw.jsonl"):
            refuse_same([raw], tmp_path / "data", "--output_dir")

    def test_another_place_is_fine(self, tmp_path):
        raw = tmp_path / "raw.jsonl"
        raw.write_text("")
        refuse_same([raw], tmp_path / "train.jsonl", "--output")
        refuse_same([raw], tmp_path / "processed", "--output_dir")


class TestRefuseUnwritable:
    def test_where_no_folder_can_be_made_even_by_root(self, tmp_path):
        (tmp_path / "file").write_text("")
        (tmp_path / "link").symlink_to(tmp_path / "nowhere")
        faults = {
            Path("/proc/out"): "cannot be made or written to (No such file or directory); name another folder",
            Path("/proc/a/b"): "cannot be made or written to (No such file or directory); name another folder",
            Path("/dev/null"): "cannot be made or written to (Not a directory); name another folder",
            tmp_path / ("long" * 70): "cannot be made or written to (File name too long); name another folder",
            tmp_path / "file": f"{tmp_path}/file is a file; name a folder",
            tmp_path / "file/a/b": f"{tmp_path}/file is a file; name a folder",
            tmp_path / "link/a": f"{tmp_path}/link is a link that leads nowhere; name another folder",
        }
        for folder, fault in faults.items():
            with pytest.raises(UserError) as error:
                refuse_unwritable(folder, "--output_dir")
            assert str(error.value) == f"--output_dir {folder}: {fault}"

    def test_a_folder_for_reading_only(self, tmp_path, monkeypatch):
        monkeypatch.setattr(os, "mkdir", lambda *args: raise_error(OSError(errno.EROFS, "Read-only file system")))
        with pytest.raises(UserError, match=r"^--output_dir .*/a/b: cannot be made or written to \(Read-only file sys"):
            refuse_unwritable(tmp_path / "a/b", "--output_dir")

    def test_leaves_nothing(self, tmp_path):
        (tmp_path / "there").mkdir()
        for folder in (tmp_path / "there", tmp_path / "a/b"):
            refuse_unwritable(folder, "--output_dir")
        assert files_below(tmp_path) == ["there"]


def raise_error(error: Exception) -> None:
    raise error
