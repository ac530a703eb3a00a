"""`run_all.sh` with a stand-in for Python: which stages run with what, what is skipped, and how a failure is told.

And with the stages themselves, killed one after the other.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from stage_runs import write_data

ROOT = Path(__file__).resolve().parents[1]

# Writes down its call and makes what the script would make. FAIL_AT fails in that script, SLEEP_AT waits in it for a
# file that is called go.
STAND_IN = """#!/usr/bin/env bash
[ "$1" != -c ] || exec python3 "$@"
[ "$2" != medtune.devices ] || { [[ "$*" != *--use_cpu* ]] || echo cpu; exit "${GPU_FAULT:-0}"; }
[ "$1" != -m ] || shift 2
script=$1
shift
echo "$script $*" >> calls
echo "$CUDA_VISIBLE_DEVICES" >> devices
output=
for ((n = 1; n <= $#; n++)); do
    next=$((n + 1))
    [ "${!n}" != --output_dir ] || output=${!next}
done
[ "$script" != "${SLEEP_AT:-}" ] || trap 'echo saved; exit 143' TERM
echo "the log of $script"
if [ "$script" = "${SLEEP_AT:-}" ]; then
    for _ in $(seq 600); do [ -e go ] || sleep 0.1; done
fi
[ "$script" != "${FAIL_AT:-}" ] || { echo "error: broken data at train.jsonl:3" && exit 2; }
[ ! -e "$output/config.json" ] || { echo "error: it holds something already" && exit 2; }
mkdir -p "$output/checkpoint-best"
touch "$output/metrics.json"
[ "$script" != merge_peft_adapter.py ] || touch "$output/config.json"
[ "$script" != scripts/evaluate_model.py ] || printf '%s\n' 'all.jsonl (8 records)' 'rouge_l 0.5' 1 2 3 4 5 6 7
[ -n "${FULL:-}" ] || touch "$output/checkpoint-best/adapter_config.json"
"""


@pytest.fixture
def project(tmp_path):
    """A folder with the launchers and the stand-in."""
    for path in ROOT.glob("run_*.sh"):
        shutil.copy(path, tmp_path)
    stand_in = tmp_path / "python"
    stand_in.write_text(STAND_IN, encoding="utf-8")
    stand_in.chmod(0o755)
    return tmp_path


def environment(project, **variables: str) -> dict[str, str]:
    paths = {"PATH": os.environ["PATH"], "PYTHON": str(project / "python"), "CUDA_VISIBLE_DEVICES": ""}
    return paths | {"MODEL": "org/Tiny-Instruct"} | variables


def run(project, *flags: str, **variables: str) -> tuple[subprocess.CompletedProcess, list[list[str]]]:
    (project / "calls").write_text("", encoding="utf-8")
    command = ["bash", "run_all.sh", *flags]
    finished = subprocess.run(
        command,
        cwd=project,
        env=environment(project, **variables),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    calls = (project / "calls").read_text(encoding="utf-8").splitlines()
    return finished, [call.split() for call in calls]


def flag(call: list[str], name: str) -> str:
    """The value that counts: the last one."""
    return call[len(call) - call[::-1].index(name)]


def scripts(calls: list[list[str]]) -> list[str]:
    return [call[0] for call in calls]


LAST = ["merge_peft_adapter.py", "scripts/evaluate_model.py", "scripts/write_report.py"]


def test_the_short_way(project):
    finished, calls = run(project)
    assert finished.returncode == 0, finished.stderr
    assert scripts(calls) == ["supervised_finetuning.py", "dpo_training.py", *LAST]
    sft, dpo, merge, evaluation, report = calls
    assert flag(sft, "--model_name_or_path") == "org/Tiny-Instruct"
    assert flag(sft, "--train_file_dir") == "./data/finetune"
    assert flag(dpo, "--model_name_or_path") == "outputs-sft-tiny/checkpoint-best"
    assert flag(dpo, "--train_file_dir") == "./data/reward"
    assert flag(merge, "--base_model") == "org/Tiny-Instruct"
    assert flag(merge, "--lora_model") == "outputs-dpo-tiny/checkpoint-best"
    compared = "--compare base outputs-sft-tiny/checkpoint-best outputs-dpo-tiny/checkpoint-best --test_file"
    assert compared in " ".join(evaluation)
    assert "--runs outputs-sft-tiny outputs-dpo-tiny --evaluation outputs-eval-tiny" in " ".join(report)
    assert "    the log of dpo_training.py" in finished.stdout
    assert "    all.jsonl (8 records)\n    rouge_l 0.5\n    1\n" in finished.stdout
    assert "next: python inference.py --base_model outputs-dpo-tiny-merged --interactive" in finished.stdout
    assert (project / "logs/sft.log").read_text(encoding="utf-8") == "the log of supervised_finetuning.py\n"


def test_the_long_way(project):
    finished, calls = run(project, "--logging_steps", "1", DO_PT="1", ALIGN="both", SFT_FLAGS="--max_steps 5")
    assert finished.returncode == 0, finished.stderr
    stages = ["pretraining.py", "supervised_finetuning.py", "dpo_training.py", "reward_modeling.py", "ppo_training.py"]
    assert scripts(calls) == [*stages, *LAST]
    pt, sft, dpo, rm, ppo, merge, evaluation, _ = calls
    assert flag(sft, "--model_name_or_path") == "outputs-pt-tiny/checkpoint-best"
    assert flag(sft, "--max_steps") == "5"
    assert {flag(call, "--logging_steps") for call in (pt, sft, dpo, rm, ppo)} == {"1"}
    assert flag(rm, "--model_name_or_path") == "outputs-sft-tiny/checkpoint-best"
    assert flag(ppo, "--sft_model_path") == "outputs-sft-tiny/checkpoint-best"
    assert flag(ppo, "--reward_model_path") == flag(evaluation, "--reward_model") == "outputs-rm-tiny/checkpoint-best"
    assert flag(merge, "--lora_model") == "outputs-ppo-tiny/checkpoint-best"


def test_the_choice_of_the_cpu_holds_for_what_follows_training(project):
    for flags, devices in ((["--use_cpu", "True"], {""}), ([], {"0,1"})):
        finished, _ = run(project, *flags, ALIGN="none", CUDA_VISIBLE_DEVICES="0,1", NAME=f"with{len(flags)}")
        assert finished.returncode == 0, finished.stderr
        assert set((project / "devices").read_text(encoding="utf-8").split("\n")[:-1]) == devices
        (project / "devices").unlink()


def test_gpus_that_torch_cannot_use_end_it_before_the_first_stage(project):
    finished, calls = run(project, GPU_FAULT="2")
    assert (finished.returncode, calls, finished.stdout) == (2, [], "")


def test_pretraining_starts_from_the_model_that_does_not_chat_yet(project):
    _, calls = run(project, MODEL="", DO_PT="1", ALIGN="none")
    assert flag(calls[0], "--model_name_or_path") == "Qwen/Qwen2.5-3B"
    _, calls = run(project, MODEL="", ALIGN="none")
    assert flag(calls[0], "--model_name_or_path") == "Qwen/Qwen2.5-3B-Instruct"
    assert flag(calls[0], "--output_dir") == "outputs-sft-qwen2.5-3b"


def test_whole_models_are_not_merged(project):
    finished, calls = run(project, FULL="1", ALIGN="none")
    assert scripts(calls) == ["supervised_finetuning.py", *LAST[1:]]
    assert "inference.py --base_model outputs-sft-tiny/checkpoint-best --interactive" in finished.stdout
    assert "--compare org/Tiny-Instruct outputs-sft-tiny/checkpoint-best --test_file" in " ".join(calls[1])


def test_an_adapter_to_start_from_is_merged_and_compared_on_its_base(project):
    adapter = project / "outputs-pt-tiny/checkpoint-best"
    adapter.mkdir(parents=True)
    (adapter / "adapter_config.json").write_text('{"base_model_name_or_path": "org/Tiny"}', encoding="utf-8")
    finished, calls = run(project, MODEL="outputs-pt-tiny/checkpoint-best", ALIGN="none")
    assert finished.returncode == 0, finished.stderr
    sft, merge, evaluation, _ = calls
    assert flag(sft, "--model_name_or_path") == "outputs-pt-tiny/checkpoint-best"
    assert flag(sft, "--output_dir") == "outputs-sft-tiny"
    assert flag(merge, "--base_model") == flag(evaluation, "--base_model") == "org/Tiny"
    compared = "--compare outputs-pt-tiny/checkpoint-best outputs-sft-tiny/checkpoint-best --test_file"
    assert compared in " ".join(evaluation)


def test_a_broken_adapter_to_start_from_is_refused_in_one_line(project):
    (project / "adapter").mkdir()
    (project / "adapter/adapter_config.json").write_text("{}", encoding="utf-8")
    finished, calls = run(project, MODEL="adapter")
    assert finished.returncode == 2
    assert finished.stderr == "error: adapter/adapter_config.json: it names no base model; copy or download it again\n"
    assert not calls


def test_finished_stages_are_skipped(project):
    run(project)
    finished, calls = run(project)
    assert calls == []
    assert finished.stdout.count("done already") == 5
    _, calls = run(project, ALIGN="both")
    assert scripts(calls) == ["reward_modeling.py", "ppo_training.py", *LAST]


def test_a_failure_names_the_stage_the_log_and_its_end_and_the_same_command_goes_on(project):
    finished, calls = run(project, FAIL_AT="dpo_training.py")
    assert finished.returncode == 2
    assert "error: dpo ended with exit code 2; the end of logs/dpo.log:" in finished.stderr
    assert "    error: broken data at train.jsonl:3" in finished.stderr
    assert scripts(calls) == ["supervised_finetuning.py", "dpo_training.py"]
    finished, calls = run(project)
    assert finished.returncode == 0
    assert scripts(calls) == ["dpo_training.py", *LAST]
    assert (project / "logs/dpo.log").read_text(encoding="utf-8").count("the log of dpo_training.py") == 2


def test_what_was_made_from_an_earlier_model_is_not_taken(project):
    run(project)
    later = time.time() + 60
    os.utime(project / "outputs-sft-tiny/checkpoint-best", (later, later))
    finished, _ = run(project)
    assert finished.returncode == 2
    message = "error: outputs-dpo-tiny was made from an earlier outputs-sft-tiny/checkpoint-best: move outputs-dpo-tiny"
    assert message in finished.stderr


def start_until(project, script: str, log: Path, **variables: str) -> subprocess.Popen:
    """run_all.sh, waiting in that script."""
    running = subprocess.Popen(
        ["bash", "run_all.sh"],
        cwd=project,
        env=environment(project, SLEEP_AT=script, **variables),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # Tests that run in the background inherit an ignored SIGINT, which bash cannot trap.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 30
    while not (log.is_file() and log.read_text(encoding="utf-8")):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return running


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_reaches_the_stage_once(project, number):
    log = project / "logs/dpo.log"
    running = start_until(project, "dpo_training.py", log)
    # As the terminal does: to the whole process group.
    os.killpg(running.pid, number)
    _, errors = running.communicate(timeout=30)
    assert running.returncode == 130
    assert "interrupted" in errors
    assert log.read_text(encoding="utf-8") == "the log of dpo_training.py\nsaved\n"


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"ALIGN": "kto"}, "error: ALIGN=kto: give dpo, ppo, both or none\n"),
        ({"DO_PT": "yes"}, "error: DO_PT=yes: give 0 or 1\n"),
        (
            {"EVAL_DATA": "data/eval"},
            "error: TRAIN_DATA and EVAL_DATA are of one stage: set PT_DATA, SFT_DATA, PAIR_DATA or PPO_DATA, and "
            "for held-out records flags such as SFT_FLAGS='--validation_file_dir FOLDER'\n",
        ),
    ],
)
def test_settings_that_cannot_be_honoured(project, variables, message):
    finished, calls = run(project, **variables)
    assert finished.returncode == 2
    assert finished.stderr == message
    assert calls == []


def test_two_runs_at_once_are_refused(project):
    first = start_until(project, "dpo_training.py", project / "logs/dpo.log")
    for name in ("tiny", "other"):  # of another name too: the logs are the folder's
        finished, calls = run(project, NAME=name)
        assert finished.returncode == 2
        assert "error: run_all.sh or a stage of it is still at work in this folder; wait for it" in finished.stderr
        assert calls == []
    (project / "go").touch()
    first.communicate(timeout=30)
    assert first.returncode == 0


def test_a_stage_that_outlived_the_script_is_waited_for_and_not_done_again(project):
    killed = start_until(project, "merge_peft_adapter.py", project / "logs/merge.log")
    killed.kill()
    assert killed.wait() == -signal.SIGKILL
    finished, _ = run(project)
    assert finished.returncode == 2
    assert "is still at work in this folder" in finished.stderr
    (project / "go").touch()
    subprocess.run(["flock", project / "logs/.run_all.lock", "true"], timeout=30, check=True)
    finished, calls = run(project)
    assert finished.returncode == 0, finished.stderr
    assert scripts(calls) == LAST[1:]


def test_followed_logs_show_that_a_silent_stage_is_at_work(project):
    running = start_until(project, "dpo_training.py", project / "logs/dpo.log", FOLLOW="1")
    said = [running.stdout.readline() for _ in range(7)]
    (project / "go").touch()
    rest, _ = running.communicate(timeout=30)
    assert "the log of supervised_finetuning.py\n" in said
    assert re.search(r"dpo: at work, (8|9|10) s\n$", said[-1])
    assert "at work" not in rest
    assert rest.count("rouge_l 0.5") == 1


def test_on_a_terminal_the_questions_of_the_guide_are_asked_and_the_logs_are_shown(project):
    leader, follower = os.openpty()
    (project / "calls").write_text("", encoding="utf-8")
    os.write(leader, b"y\n4\n")
    command = ["bash", "run_all.sh"]
    terminal = {"stdin": follower, "stdout": follower, "stderr": subprocess.PIPE}
    finished = subprocess.run(command, cwd=project, env=environment(project), **terminal, text=True, check=False)
    os.close(follower)
    said = os.read(leader, 100_000).decode()
    os.close(leader)
    assert finished.returncode == 0, finished.stderr
    assert "DO_PT=1 ALIGN=none" in said
    assert "\r\nthe log of pretraining.py\r\n" in said
    calls = (project / "calls").read_text(encoding="utf-8").splitlines()
    assert [call.split()[0] for call in calls] == ["pretraining.py", "supervised_finetuning.py", *LAST]


# ---------------------------------------------------------------- the stages themselves

STEPS = "--max_steps 12 --save_steps 2 --eval_steps 6 --logging_steps 1 --preprocessing_num_workers 1"
# What a stage says in its middle; training stages have saved a checkpoint then.
MIDDLE = {
    **{name: "step 3/12 " for name in ("pt", "sft", "dpo", "rm")},
    "ppo": "update 3/4 ",
    "merge": "merging ",
    "evaluation": "base: replies",
    "report": "",
}


def start_stages(folder: Path, model: Path) -> subprocess.Popen:
    """run_all.sh with all real stages, a few steps each; what it says goes to all.log."""
    with (folder / "all.log").open("ab") as log:
        return subprocess.Popen(
            ["bash", "run_all.sh"],
            cwd=folder,
            env=os.environ
            | {"PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": "", "NAME": "tiny", "MODEL": str(model)}
            | {"DO_PT": "1", "ALIGN": "both", "TEMPLATE": "chatml", "BATCH": "2", "ACCUMULATION": "2"}
            | {"PT_DATA": "data-pt", "SFT_DATA": "data-sft", "PAIR_DATA": "data-dpo"}
            | {"PT_FLAGS": f"{STEPS} --block_size 64", "SFT_FLAGS": STEPS, "DPO_FLAGS": STEPS, "RM_FLAGS": STEPS}
            | {"PPO_FLAGS": "--total_episodes 16 --response_length 8 --save_steps 1 --eval_steps 4"}
            | {"EVAL_FLAGS": "--num_samples 8 --max_new_tokens 16"},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )


def kill_all(process: subprocess.Popen) -> None:
    """As when the machine is lost: the script and all it started."""
    lost = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
    for one in lost:
        one.kill()
    psutil.wait_procs(lost)
    process.wait()


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_killed_in_the_middle_of_each_stage_it_ends_with_the_same_evaluation(tmp_path, tiny_model_dir):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for folder in (whole, killed):
        shutil.copytree(ROOT / "scripts", folder / "scripts")
        for path in [*ROOT.glob("*.py"), *ROOT.glob("*.sh"), ROOT / "requirements.txt"]:
            shutil.copy(path, folder)
        shutil.copytree(ROOT / "data/eval", folder / "data/eval")
        for stage in ("pt", "sft", "dpo"):
            write_data(stage, folder)
    started = [undisturbed := start_stages(whole, tiny_model_dir)]
    try:
        for stage, middle in MIDDLE.items():
            log = killed / f"logs/{stage}.log"
            started.append(running := start_stages(killed, tiny_model_dir))
            while not (log.is_file() and middle in log.read_text(encoding="utf-8")):
                assert running.poll() is None, (killed / "all.log").read_text(encoding="utf-8")
                time.sleep(0.02)
            kill_all(running)
            assert not list(killed.glob(f"outputs-{stage}-tiny/.done_by_run_all")), f"{stage} had ended"
        started.append(last := start_stages(killed, tiny_model_dir))
        assert last.wait() == 0, (killed / "all.log").read_text(encoding="utf-8")
        assert undisturbed.wait() == 0, (whole / "all.log").read_text(encoding="utf-8")
    finally:
        for process in started:
            if process.poll() is None:
                kill_all(process)
    for stage in list(MIDDLE)[:5]:
        assert "resuming from" in (killed / f"logs/{stage}.log").read_text(encoding="utf-8"), stage
    for name in ("predictions.jsonl", "metrics.json"):
        found, expected = ((folder / "outputs-eval-tiny" / name).read_text("utf-8") for folder in (killed, whole))
        assert found == expected
    assert len(json.loads(expected)["metrics"]) == 3  # the files of TEST_FILES
