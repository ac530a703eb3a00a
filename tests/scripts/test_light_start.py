"""The data tools start at once: they import nothing that takes seconds and that they do not use."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
TO_START = "torch transformers datasets scipy matplotlib"
AT_ALL = "torch transformers datasets pyarrow numpy"


@pytest.mark.parametrize(
    ("script", "flags", "slow"),
    [
        ("build_tiny_model.py", "--help", "torch transformers tokenizers"),
        ("check_data.py", "--help", TO_START),
        ("preprocess_data.py", "--help", TO_START),
        ("convert_data_format.py", "--input d.jsonl --output o.jsonl --format sft", AT_ALL),
        ("convert_to_pretrain_format.py", "--input_file d.jsonl --output_file o.txt", AT_ALL),
        ("generate_preference_data.py", "--sft_data d.jsonl --output_file o.jsonl", AT_ALL),
    ],
)
def test_a_data_tool_does_without_what_is_slow(tmp_path, write_jsonl, script, flags, slow):
    write_jsonl("d.jsonl", [{"question": "感冒了怎么办？", "answer": "多喝水。"}])
    code = f"import atexit, runpy, sys; sys.argv[1:] = {flags.split()}\n"
    code += f"atexit.register(lambda: print({set(slow.split())} & set(sys.modules)))\n"
    code += f"runpy.run_path({str(SCRIPTS / script)!r}, run_name='__main__')"
    command = [sys.executable, "-c", code]
    finished = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert finished.stdout.splitlines()[-1] == "set()"
