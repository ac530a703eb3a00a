"""The launchers, with a stand-in for Python that writes down how it was called."""

import argparse
import re
import subprocess
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path

import pytest
from guide import GUIDE_DPO, GUIDE_PPO, GUIDE_PT, GUIDE_RM, GUIDE_SFT

from medtune.arguments import FIXED_FLAGS, RENAMED, StageArgumentParser

ROOT = Path(__file__).resolve().parents[1]
LAUNCHERS = sorted(path.name for path in ROOT.glob("run_*.sh") if '"${args[@]}" "$@"' in path.read_text())
STAGES = [name for name in LAUNCHERS if name != "run_serve.sh"]

# The guide's flags for each stage. The launcher goes on after an interruption where the guide starts over.
GUIDE = {
    "run_pt.sh": f"{GUIDE_PT} --block_size 1024",
    "run_sft.sh": GUIDE_SFT,
    "run_rm.sh": f"{GUIDE_RM} --max_source_length 1024 --max_target_length 512",
    "run_dpo.sh": f"{GUIDE_DPO} --max_source_length 1024 --max_target_length 512",
    "run_ppo.sh": f"""{GUIDE_PPO.replace("--model_name_or_path", "--sft_model_path")}
        --reward_model_path outputs-rm-qwen2.5-3b/checkpoint-best --max_source_length 1024 --response_length 512
        --total_episodes 10000 --missing_eos_penalty 1.0""",
}
OTHERWISE = {"overwrite_output_dir": (None, "True"), "resume_from_checkpoint": ("True", None)}

# One call a record: the folder, three variables, then the arguments, each ended by a zero byte.
STAND_IN = """#!/usr/bin/env bash
{
    printf '%s\\0' "$PWD" "${CUDA_VISIBLE_DEVICES-unset}" "${HF_HUB_OFFLINE-unset}" "$@"
    printf '\\036'
} >> "$CALLS"
[[ -z "${FAIL_AT:-}" || "$*" != *"$FAIL_AT"* ]]
"""


@dataclass
class Call:
    """How Python was started."""

    folder: str
    devices: str
    offline: str
    before: list[str]  # words before the script
    script: str
    flags: list[str]

    def last(self, flag: str) -> str | None:
        """The value that counts: the last one."""
        values = pairs(self.flags)
        return next((value for name, value in reversed(values) if name == flag.lstrip("-")), None)


def pairs(words: list[str]) -> list[tuple[str, str]]:
    """(flag without dashes, value); a flag that stands alone means True."""
    found = []
    for word in words:
        if word.startswith("--"):
            found.append((word[2:], "True"))
        else:
            found[-1] = (found[-1][0], word)
    return found


class Captured(BaseException):
    """Carries a script's parser out of its `main`."""


@cache
def parser_of(script: str) -> argparse.ArgumentParser:
    """The parser that a script makes in `main`."""

    def capture(self, *args, **kwargs):
        raise Captured(self)

    module = import_module(Path(script).stem)  # conftest.py puts scripts/ on the path
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StageArgumentParser, "parse", capture)
        patch.setattr(argparse.ArgumentParser, "parse_args", capture)
        with pytest.raises(Captured) as captured:
            module.main([])
    return captured.value.args[0]


def known_flags(script: str) -> set[str]:
    """Every flag that a script takes, the old names that its parser translates included."""
    parser = parser_of(script)
    flags = {option for action in parser._actions for option in action.option_strings}
    return flags | ({*RENAMED, *FIXED_FLAGS, "--group_by_length"} if isinstance(parser, StageArgumentParser) else set())


def write_stand_in(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(STAND_IN, encoding="utf-8")
    path.chmod(0o755)
    return path


def start(launcher: Path, work: Path, *flags: str, **variables: str) -> tuple[subprocess.CompletedProcess, list[Call]]:
    """Start a launcher from the folder `work`; the environment holds nothing else."""
    calls = work / "calls"
    calls.write_bytes(b"")
    environment = {"PATH": "/usr/bin:/bin", "CALLS": str(calls)} | variables
    command = ["bash", str(launcher), *flags]
    finished = subprocess.run(command, cwd=work, env=environment, capture_output=True, text=True, check=False)
    recorded = []
    for record in calls.read_bytes().decode().split("\x1e")[:-1]:
        folder, devices, offline, *words = record.split("\0")[:-1]
        if "medtune.devices" in words:  # asked by the launcher itself
            continue
        at = next(index for index, word in enumerate(words) if word.endswith(".py"))
        recorded.append(Call(folder, devices, offline, words[:at], words[at], words[at + 1 :]))
    return finished, recorded


def launch(name: str, work: Path, *flags: str, **variables: str) -> Call:
    """The one call of Python that a stage's launcher makes."""
    python = write_stand_in(work / "python")
    finished, calls = start(ROOT / name, work, *flags, **{"PYTHON": str(python)} | variables)
    assert finished.returncode == 0, finished.stderr
    (call,) = calls
    return call


def edit_block(name: str) -> dict[str, str]:
    """Variable and default of each line `NAME=${NAME:-default}` of a launcher."""
    text = (ROOT / name).read_text(encoding="utf-8")
    return dict(re.findall(r"^(?:export )?(\w+)=\$\{\1:?-([^$}]*)\}", text, re.MULTILINE))


# ---------------------------------------------------------------- every stage's launcher


@pytest.mark.parametrize("name", sorted(GUIDE.keys() & set(STAGES)))
def test_without_changes_it_gives_the_flags_of_the_guide(name, tmp_path):
    wanted = dict(pairs(GUIDE[name].split()))
    found = dict(pairs(launch(name, tmp_path).flags))
    differences = {
        flag: (found.get(flag), wanted.get(flag))
        for flag in found.keys() | wanted.keys()
        if found.get(flag) != wanted.get(flag)
    }
    assert differences == {flag: values for flag, values in OTHERWISE.items() if values[0] or flag in wanted}


@pytest.mark.parametrize("name", STAGES)
def test_it_starts_the_script_in_the_project_with_flags_that_it_knows_each_once(name, tmp_path):
    call = launch(name, tmp_path, N_PROCESSES="2")  # how many is decided in one place
    assert (call.folder, call.before) == (str(ROOT), ["-m", "medtune.launch"])
    assert (ROOT / call.script).is_file()
    flags = [f"--{flag}" for flag, _ in pairs(call.flags)]
    assert set(flags) <= known_flags(call.script)
    assert len(flags) == len(set(flags))
    assert "--deepspeed" not in flags
    assert call.devices == edit_block(name)["CUDA_VISIBLE_DEVICES"]


@pytest.mark.parametrize("name", STAGES)
def test_environment_wins_over_the_edit_block(name, tmp_path):
    others = {"CUDA_VISIBLE_DEVICES", "PYTHON", "N_PROCESSES", "DEEPSPEED", "VLLM_GPUS", "VLLM_MEMORY"}
    variables = edit_block(name).keys() - others
    assert {"MODEL", "OUTPUT", "BATCH"} <= variables
    defaults = launch(name, tmp_path).flags
    for variable in variables:
        value = f"a value of {variable}"  # with blanks: the launcher must quote it
        changed = launch(name, tmp_path, **{variable: value}).flags
        assert len(changed) == len(defaults)
        different = [pair for pair in zip(defaults, changed, strict=True) if pair[0] != pair[1]]
        assert different, f"{variable} changes nothing"
        assert {new for _, new in different} == {value}


@pytest.mark.parametrize("name", STAGES)
def test_flags_after_the_name_win_over_both(name, tmp_path):
    call = launch(name, tmp_path, "--output_dir", "from the flag", "--learning_rate", "1e-5", OUTPUT="from outside")
    assert call.flags[-4:] == ["--output_dir", "from the flag", "--learning_rate", "1e-5"]
    assert call.last("--output_dir") == "from the flag"
    assert "from outside" in call.flags


@pytest.mark.parametrize("name", STAGES)
def test_what_may_be_empty_or_is_handed_on(name, tmp_path):
    own = {"DEEPSPEED": "ds_configs/zero2.json", "TEMPLATE": "", "CUDA_VISIBLE_DEVICES": "0,1,2,3"}
    call = launch(name, tmp_path, **own)
    assert call.last("--deepspeed") == ("ds_configs/zero2.json" if "DEEPSPEED" in edit_block(name) else None)
    assert call.last("--template_name") is None  # the tokenizer's own
    assert call.devices == "0,1,2,3"
    assert launch(name, tmp_path, CUDA_VISIBLE_DEVICES="").devices == ""  # hides every GPU


def test_ppo_by_other_rewards_has_no_reward_model(tmp_path):
    call = launch("run_ppo.sh", tmp_path, "--rewards", "exam:1", "format:0.2", REWARD_MODEL="")
    assert "--reward_model_path" not in call.flags
    assert call.flags[-3:] == ["--rewards", "exam:1", "format:0.2"]


@pytest.mark.parametrize("name", STAGES)
def test_the_launcher_becomes_the_script(name, tmp_path):
    """So that `kill`, given the number that `nohup ... &` printed, reaches the training, which saves a checkpoint."""
    python = tmp_path / "python"
    python.write_text("#!/usr/bin/env bash\necho $$\n", encoding="utf-8")
    python.chmod(0o755)
    environment = {"PATH": "/usr/bin:/bin", "PYTHON": str(python)}
    launcher = subprocess.Popen(["bash", str(ROOT / name)], env=environment, stdout=subprocess.PIPE, text=True)
    assert launcher.communicate()[0] == f"{launcher.pid}\n"


@pytest.mark.parametrize("name", STAGES)
def test_a_failure_of_the_script_is_one_of_the_launcher(name, tmp_path):
    python = write_stand_in(tmp_path / "python")
    finished, _ = start(ROOT / name, tmp_path, PYTHON=str(python), FAIL_AT=".py")
    assert finished.returncode == 1


@pytest.mark.parametrize("name", STAGES)
def test_header_says_how_to_run_it_in_the_background(name):
    header = (ROOT / name).read_text(encoding="utf-8").partition("set -euo pipefail")[0]
    (nohup,) = re.findall(r"^# +(.*nohup.*)$", header, re.MULTILINE)
    (tail,) = re.findall(r"^# +(tail -f .*)$", header, re.MULTILINE)
    log = tail.split()[-1]
    assert nohup == f"mkdir -p logs && nohup bash {name} > {log} 2>&1 &"
