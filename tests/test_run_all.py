"""`run_all.sh` with a stand-in for Python: which stages run with what, and what a failure or a signal leads to.

And with the stages themselves, killed in the middle and started again.
"""

import json
import os
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
[ "$script" != "${SLEEP_AT:-}" ] || trap 'sleep 1; echo saved; exit 143' TERM
echo "the log of $script"
if [ "$script" = "${SLEEP_AT:-}" ]; then
    for _ in $(seq 600); do [ -e go ] || sleep 0.1; done
fi
[ "$script" != "${FAIL_AT:-}" ] || { echo "error: broken data at train.jsonl:3" >&2 && exit 3; }
[ -n "$output" ] || exit 0
mkdir -p "$output/checkpoint-best"
[ -n "${FULL:-}" ] || touch "$output/checkpoint-best/adapter_config.json"
"""
LAST = ["merge_peft_adapter.py", *(f"scripts/{name}.py" for name in ("evaluate_model", "write_report", "show_answers"))]


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


def calls_of(project) -> list[list[str]]:
    return [call.split() for call in (project / "calls").read_text(encoding="utf-8").splitlines()]


def run(project, *flags: str, **variables: str) -> tuple[subprocess.CompletedProcess, list[list[str]]]:
    (project / "calls").write_text("", encoding="utf-8")
    command, env = ["bash", "run_all.sh", *flags], environment(project, **variables)
    finished = subprocess.run(
        command, cwd=project, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    return finished, calls_of(project)


def flag(call: list[str], name: str) -> str:
    """The value that counts: the last one."""
    return call[len(call) - call[::-1].index(name)]


def scripts(calls: list[list[str]]) -> list[str]:
    return [call[0] for call in calls]


# ---------------------------------------------------------------- which stages run with what


def test_the_short_way(project):
    finished, calls = run(project)
    assert finished.returncode == 0, finished.stderr
    assert scripts(calls) == ["supervised_finetuning.py", "dpo_training.py", *LAST]
    sft, dpo, merge, evaluation, report, answers = map(" ".join, calls)
    assert "--model_name_or_path org/Tiny-Instruct --train_file_dir ./data/finetune" in sft
    assert "--model_name_or_path outputs-sft-tiny/checkpoint-best --train_file_dir ./data/reward" in dpo
    assert merge.endswith("--lora_model outputs-dpo-tiny/checkpoint-best --output_dir outputs-dpo-tiny-merged")
    best = "outputs-dpo-tiny/checkpoint-best"
    compared = f"--base_model {best} --compare org/Tiny-Instruct outputs-sft-tiny/checkpoint-best {best} --test_file"
    assert compared in evaluation
    assert "--runs outputs-sft-tiny outputs-dpo-tiny --evaluation outputs-eval-tiny" in report
    assert answers == "scripts/show_answers.py outputs-eval-tiny"
    assert "next: python inference.py --base_model outputs-dpo-tiny-merged --interactive" in finished.stdout
    # What a stage says stands in its own log and here.
    assert "sft: started; tail -f logs/sft.log\nthe log of supervised_finetuning.py\n" in finished.stdout
    assert (project / "logs/sft.log").read_text(encoding="utf-8") == "the log of supervised_finetuning.py\n"


def test_the_long_way(project):
    finished, calls = run(project, "--logging_steps", "1", DO_PT="1", ALIGN="both", SFT_FLAGS="--max_steps 5")
    assert finished.returncode == 0, finished.stderr
    stages = ["pretraining.py", "supervised_finetuning.py", "dpo_training.py", "reward_modeling.py", "ppo_training.py"]
    assert scripts(calls) == [*stages, *LAST]
    pt, sft, dpo, rm, ppo, merge, evaluation, *_ = calls
    assert flag(pt, "--model_name_or_path") == "org/Tiny-Instruct"
    assert flag(sft, "--model_name_or_path") == "outputs-pt-tiny/checkpoint-best"
    assert flag(sft, "--max_steps") == "5"
    assert {flag(call, "--logging_steps") for call in (pt, sft, dpo, rm, ppo)} == {"1"}
    assert flag(rm, "--model_name_or_path") == "outputs-sft-tiny/checkpoint-best"
    assert flag(ppo, "--sft_model_path") == "outputs-sft-tiny/checkpoint-best"
    assert flag(ppo, "--reward_model_path") == flag(evaluation, "--reward_model") == "outputs-rm-tiny/checkpoint-best"
    assert flag(merge, "--lora_model") == "outputs-ppo-tiny/checkpoint-best"


def test_an_estimate_asks_the_training_stages_alone(project):
    finished, calls = run(project, "--max_steps", "5", ALIGN="ppo", ESTIMATE="1")
    assert finished.returncode == 0, finished.stderr
    assert [" ".join(call) for call in calls] == ["scripts/estimate_run.py run_all.sh --max_steps 5"]
    # Which starts it again for the commands.
    finished, calls = run(project, ALIGN="ppo", ESTIMATE="1", ESTIMATE_COMMANDS="commands")
    assert finished.returncode == 0, finished.stderr
    assert scripts(calls) == ["supervised_finetuning.py", "reward_modeling.py", "ppo_training.py"]
    assert "all done" not in finished.stdout
    assert not (project / "logs/sft.log").exists()
    assert scripts(run(project, ALIGN="none", ESTIMATE="0")[1]) == ["supervised_finetuning.py", *LAST]


def test_rewards_that_can_be_checked_after_sft(project):
    (project / "exams").mkdir()
    finished, calls = run(project, ALIGN="grpo", GRPO_DATA="exams", GRPO_FLAGS="--rewards exam")
    assert finished.returncode == 0, finished.stderr
    assert scripts(calls) == ["supervised_finetuning.py", "grpo_training.py", *LAST]
    _, grpo, merge, evaluation, report, _ = calls
    assert (flag(grpo, "--sft_model_path"), flag(grpo, "--train_file_dir")) == (
        "outputs-sft-tiny/checkpoint-best",
        "exams",
    )
    assert flag(grpo, "--rewards") == "exam"
    assert flag(merge, "--lora_model") == flag(evaluation, "--base_model") == "outputs-grpo-tiny/checkpoint-best"
    assert "--runs outputs-sft-tiny outputs-grpo-tiny" in " ".join(report)


def test_every_stage_from_sft(project):
    (project / "data/exam").mkdir(parents=True)
    finished, calls = run(project, ALIGN="all")
    assert finished.returncode == 0, finished.stderr
    stages = ["dpo_training.py", "reward_modeling.py", "ppo_training.py", "grpo_training.py"]
    assert scripts(calls) == ["supervised_finetuning.py", *stages, *LAST]
    _, _, _, ppo, grpo, merge, evaluation, *_ = calls
    sft = "outputs-sft-tiny/checkpoint-best"
    assert (flag(ppo, "--sft_model_path"), flag(grpo, "--sft_model_path")) == (sft, sft)
    best = [f"outputs-{stage}-tiny/checkpoint-best" for stage in ("dpo", "ppo", "grpo")]
    assert f"--compare org/Tiny-Instruct {sft} {' '.join(best)} --reward_model" in " ".join(evaluation)
    assert flag(merge, "--lora_model") == best[-1]


def test_the_choice_of_the_cpu_holds_for_what_follows_training(project):
    for flags, devices in ((["--use_cpu", "True"], {""}), ([], {"0,1"})):
        finished, _ = run(project, *flags, ALIGN="none", CUDA_VISIBLE_DEVICES="0,1")
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


def test_the_adapter_of_an_earlier_stage_can_be_started_from(project):
    finished, calls = run(project, MODEL="outputs-pt-tiny/checkpoint-best", ALIGN="none")
    assert finished.returncode == 0, finished.stderr
    assert flag(calls[0], "--model_name_or_path") == "outputs-pt-tiny/checkpoint-best"
    assert flag(calls[0], "--output_dir") == "outputs-sft-tiny"


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"ALIGN": "kto"}, "error: ALIGN=kto: give dpo, ppo, both, grpo, all or none\n"),
        ({"DO_PT": "2"}, "error: DO_PT=2: give 0 or 1\n"),
        (
            {"ALIGN": "grpo"},
            "error: GRPO_DATA=./data/exam: no such folder; name one of exam questions\n",
        ),
        (
            {"EVAL_DATA": "data/eval"},
            "error: TRAIN_DATA and EVAL_DATA are of one stage: set PT_DATA, SFT_DATA, PAIR_DATA, PPO_DATA or "
            "GRPO_DATA, and for held-out records flags such as SFT_FLAGS='--validation_file_dir FOLDER'\n",
        ),
    ],
)
def test_settings_that_cannot_be_honoured(project, variables, message):
    finished, calls = run(project, **variables)
    assert (finished.returncode, finished.stderr, calls) == (2, message, [])


def test_on_a_terminal_the_questions_of_the_guide_are_asked(project):
    leader, follower = os.openpty()
    os.write(leader, b"y\n4\n")
    terminal = {"stdin": follower, "stdout": follower, "stderr": subprocess.PIPE}
    command = ["bash", "run_all.sh"]
    finished = subprocess.run(command, cwd=project, env=environment(project), **terminal, text=True, check=False)
    os.close(follower)
    shown = os.read(leader, 100_000).decode()
    os.close(leader)
    assert finished.returncode == 0, finished.stderr
    assert "DO_PT=1 ALIGN=none" in shown
    assert scripts(calls_of(project)) == ["pretraining.py", "supervised_finetuning.py", *LAST]


# ---------------------------------------------------------------- failures, signals, a second start


def test_a_failure_stops_it_and_names_stage_and_log_and_the_same_command_goes_on(project):
    finished, calls = run(project, FAIL_AT="dpo_training.py")
    assert finished.returncode == 3
    assert "error: broken data at train.jsonl:3\n" in finished.stdout
    message = "error: dpo ended with exit code 3: see logs/dpo.log; then the same command goes on here\n"
    assert finished.stderr == message
    assert scripts(calls) == ["supervised_finetuning.py", "dpo_training.py"]
    # Each stage is called as before, and goes on or says that it is finished.
    again, calls_again = run(project)
    assert again.returncode == 0
    assert calls_again[:2] == calls
    assert {flag(call, "--resume_from_checkpoint") for call in calls} == {"True"}
    assert (project / "logs/dpo.log").read_text(encoding="utf-8").count("the log of dpo_training.py") == 2


def trap_again() -> None:
    """Tests in the background or under nohup inherit ignored signals, which bash cannot trap."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def start_until(project, script: str, log: Path, **streams: int) -> subprocess.Popen:
    """run_all.sh, waiting in that script."""
    running = subprocess.Popen(
        ["bash", "run_all.sh"],
        cwd=project,
        env=environment(project, SLEEP_AT=script),
        stdin=subprocess.DEVNULL,
        **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | streams,
        text=True,
        start_new_session=True,
        preexec_fn=trap_again,
    )
    deadline = time.monotonic() + 30
    while not (log.is_file() and log.read_text(encoding="utf-8")):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return running


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_reaches_the_stage_once_and_its_checkpoint_is_waited_for(project, number):
    log = project / "logs/dpo.log"
    running = start_until(project, "dpo_training.py", log)
    # As the terminal does: to the whole process group.
    os.killpg(running.pid, number)
    lines, errors = running.communicate(timeout=120)
    assert running.returncode == 130
    assert errors == "interrupted: the same command goes on from the last checkpoint\n"
    assert log.read_text(encoding="utf-8") == "the log of dpo_training.py\nsaved\n"
    assert lines.endswith("saved\n")


def test_a_terminal_that_is_lost_is_a_signal_too(project):
    leader, follower = os.openpty()
    log = project / "logs/dpo.log"
    running = start_until(project, "dpo_training.py", log, stdout=follower, stderr=follower)
    os.close(follower)
    os.close(leader)
    os.killpg(running.pid, signal.SIGHUP)
    assert running.wait(timeout=120) == 130
    assert log.read_text(encoding="utf-8") == "the log of dpo_training.py\nsaved\n"


def test_two_runs_at_once_are_refused_also_where_a_stage_outlived_the_script(project):
    first = start_until(project, "dpo_training.py", project / "logs/dpo.log")
    for name in ("tiny", "other"):  # of another name too: the logs are the folder's
        finished, calls = run(project, NAME=name)
        assert finished.returncode == 2
        assert "error: run_all.sh or a stage of it is still at work in this folder; wait for it" in finished.stderr
        assert calls == []
        first.kill()
        first.wait()
    (project / "go").touch()
    subprocess.run(["flock", project / "logs/.run_all.lock", "true"], timeout=120, check=True)
    assert run(project)[0].returncode == 0


# ---------------------------------------------------------------- the stages themselves

STEPS = "--max_steps 12 --save_steps 2 --eval_steps 6 --logging_steps 1 --preprocessing_num_workers 1"
# Where it is killed, by what the stage says then; training stages have saved a checkpoint.
KILLED_AT = {"sft": "step 3/12 ", "ppo": "update 3/4 ", "report": ""}


def start_stages(folder: Path, model: Path, **variables: str) -> subprocess.Popen:
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
            | {"EVAL_FLAGS": "--num_samples 8 --max_new_tokens 16"}
            | variables,
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


def results(folder: Path) -> dict[Path, bytes]:
    """All files of the outputs but the report, which is written each time, and the trackers' own."""
    files = {path for path in folder.glob("outputs-*/**/*") if path.is_file()}
    return {path: path.read_bytes() for path in files if not {"outputs-report-tiny", "runs"} & set(path.parts)}


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_killed_and_started_again_it_ends_with_the_same_evaluation_and_does_nothing_twice(tmp_path, tiny_model_dir):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for folder in (whole, killed):
        for name in ("medtune", "scripts", "templates"):
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        for path in [*ROOT.glob("*.py"), *ROOT.glob("*.sh"), ROOT / "requirements.txt"]:
            shutil.copy(path, folder)
        shutil.copytree(ROOT / "data/eval", folder / "data/eval")
        for stage in ("pt", "sft", "dpo"):
            write_data(stage, folder)
    started = [undisturbed := start_stages(whole, tiny_model_dir)]

    def run_again(**variables: str) -> tuple[int, str]:
        n_before = (killed / "all.log").stat().st_size
        started.append(again := start_stages(killed, tiny_model_dir, **variables))
        return again.wait(), (killed / "all.log").read_bytes()[n_before:].decode()

    try:
        for stage, middle in KILLED_AT.items():
            log = killed / f"logs/{stage}.log"
            started.append(running := start_stages(killed, tiny_model_dir))
            while not (log.is_file() and middle in log.read_text(encoding="utf-8")):
                assert running.poll() is None, (killed / "all.log").read_text(encoding="utf-8")
                time.sleep(0.02)
            kill_all(running)
            last_started = (killed / "all.log").read_text(encoding="utf-8").rpartition(": started")[0].split()[-1]
            assert last_started == stage, f"{stage} had ended"
        before = results(killed)
        code, last = run_again()
        assert (code, results(killed) == before) == (0, True), last
        assert undisturbed.wait() == 0, (whole / "all.log").read_text(encoding="utf-8")
        code, changed = run_again(PT_FLAGS=f"{STEPS} --block_size 64 --lora_rank 4")
        assert (code, results(killed) == before) == (2, True)
    finally:
        for process in started:
            if process.poll() is None:
                kill_all(process)
    for stage in ("sft", "ppo"):
        assert "resuming from" in (killed / f"logs/{stage}.log").read_text(encoding="utf-8"), stage
    for name in ("predictions.jsonl", "metrics.json"):
        found, expected = ((folder / "outputs-eval-tiny" / name).read_text("utf-8") for folder in (killed, whole))
        assert found == expected
    assert len(json.loads(expected)["metrics"]) == 7  # the files of TEST_FILES
    assert last.count("holds a finished run") == 5
    assert "outputs-ppo-tiny-merged holds this model already" in last
    assert "outputs-eval-tiny: measured already" in last
    assert (killed / "outputs-report-tiny/report.html").is_file()
    assert "outputs-pt-tiny is finished, with other flags: --lora_rank 4 (16 then)" in changed
    assert "error: pt ended with exit code 2: see logs/pt.log" in changed
