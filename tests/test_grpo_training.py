"""The GRPO stage: what an update does, what a run leaves, resume, several processes, alarms, errors."""

import json
import math
import os
import re
import signal
import threading
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import stage_runs
import torch
from judge_server import running_judge, send
from stage_runs import (
    ADAPTER_FILES,
    PARTS,
    history,
    logits_of,
    names,
    short_rl_run,
    start_stage,
    updates,
    weights_of,
    words,
    write_lines,
)
from transformers import TrainingArguments

import grpo_training
from medtune.errors import UserError
from medtune.measuring import judge_client
from medtune.measuring.intervals import wilson_interval
from medtune.models.adapters import load_with_adapter
from medtune.models.lineage import read_lineage
from medtune.rl import alarms, run
from medtune.rl.rewards import Rewards
from medtune.rl.roles import Roles, load_roles
from medtune.rl.rollout import Replies, Scorer

ROOT = Path(__file__).resolve().parents[1]
slow = partial(pytest.param, marks=pytest.mark.slow)
STATE_FILES = {"manifest.sha256", "optimizer.pt", "rng_state.pth", "scheduler.pt", "trainer_state.json"}
# A reward that the replies of a model with hardly any training differ in.
OWN_REWARDS = """
def variety(replies, records):
    return [len(set(reply.text)) for reply in replies]

def constant(replies, records):
    return [0.5] * len(replies)

def ends(replies, records):
    return [reply.ended for reply in replies]
"""


def write_exams(folder: Path) -> Path:
    records = [
        {
            "question": f"{folder.name}第{n}个病人{PARTS[n % 8]}疼，应该怎么办？",
            "option": {"A": "多喝水", "B": "请就诊", "C": "不用管"},
            "answer": "ABC"[n % 3],
        }
        for n in range(40)
    ]
    return write_lines(folder / "data/exams.jsonl", records).parent


def short_run(sft_adapter: Path, folder: Path, **changes) -> list[str]:
    """Its flags; keywords replace or add some, None removes one."""
    rewards = folder / "own.py"
    rewards.write_text(OWN_REWARDS, encoding="utf-8")
    own = {
        "sft_model_path": sft_adapter,
        "train_file_dir": write_exams(folder),
        "rewards": "variety",
        "reward_file": rewards,
        "num_generations": 4,
        "gradient_accumulation_steps": 4,
    }
    return words(short_rl_run(folder, **own | changes))


@pytest.fixture
def flags(sft_adapter, tmp_path):
    """A function that gives a short run's flags."""
    return partial(short_run, sft_adapter, tmp_path)


@pytest.fixture
def kept_roles(monkeypatch) -> list[Roles]:
    """The roles of the runs, in their order."""
    kept = []

    def load(*args, **kwargs):
        roles, facts = load_roles(*args, **kwargs)
        kept.append(roles)
        return roles, facts

    monkeypatch.setattr(grpo_training, "load_roles", load)
    return kept


def figures(entry: dict) -> dict[str, float]:
    """Those of an update that do not hang on the machine, or on how it was divided."""
    groups = ("objective", "policy", "reply", "reward", "groups")
    return {name: value for name, value in entry.items() if name.startswith(groups) and name != "policy/approx_kl"}


# ---------------------------------------------------------------- what an update does


@pytest.mark.parametrize("beta", [0, 0.1])
def test_first_step_starts_at_ratio_one_with_a_reference_only_where_it_is_needed(flags, tmp_path, kept_roles, beta):
    grpo_training.main(flags(max_steps=1, beta=beta))
    (first,) = history(tmp_path / "out")
    assert first["policy/ratio"] == pytest.approx(1.0, abs=1e-5)
    assert first["policy/clip_frac"] == 0.0
    assert 0 < first["policy/approx_kl"] < 1, "of the policy after the step"
    assert kept_roles[0].model.peft_config.keys() == ({"default", "reference"} if beta else {"default"})
    assert ("objective/token_kl" in first) == (beta > 0)


def test_the_kl_holds_the_policy_where_it_started(flags, tmp_path):
    for beta in (1e-4, 100.0):
        grpo_training.main(flags(output_dir=tmp_path / str(beta), beta=beta, max_steps=4))
    free, held = (updates(tmp_path / beta, "objective/token_kl") for beta in ("0.0001", "100.0"))
    assert free[0] == pytest.approx(0.0, abs=1e-5)
    assert free[-1] > 2 * held[-1] > 0


def test_checkpointing_and_micro_batches_change_nothing(flags, tmp_path):
    runs = {
        "whole": {"per_device_train_batch_size": 16, "gradient_accumulation_steps": 1},
        "parts": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 8, "rollout_batch_size": 3},
        "checkpointed": {"gradient_checkpointing": True},
    }
    for name, changes in runs.items():
        grpo_training.main(flags(output_dir=tmp_path / name, max_steps=1, num_iterations=2, **changes))
    (whole,) = history(tmp_path / "whole")
    for name in ("parts", "checkpointed"):
        assert figures(history(tmp_path / name)[0]) == pytest.approx(figures(whole), abs=2e-4), name


@pytest.mark.parametrize("loss_type", ["dapo", "gspo", *(slow(name) for name in ("grpo", "dr_grpo"))])
def test_each_loss_moves_the_policy_towards_the_reward(flags, tmp_path, loss_type):
    rates = {"learning_rate": 2e-3, "lr_scheduler_type": "constant"}
    size = {"per_device_train_batch_size": 32, "num_generations": 8, "gradient_accumulation_steps": 1}
    grpo_training.main(flags(rewards="ends", loss_type=loss_type, max_steps=8, num_iterations=2, **rates, **size))
    found = updates(tmp_path / "out", "reply/eos_frac")
    assert found == updates(tmp_path / "out", "objective/reward")
    assert sum(found[-2:]) > sum(found[:2]) + 0.4, found


def test_groups_of_equal_rewards_teach_nothing_and_are_counted(flags, tmp_path, sft_adapter):
    grpo_training.main(flags(rewards="constant"))
    assert updates(tmp_path / "out", "groups/no_signal_frac") == [1.0, 1.0]
    start, after = weights_of(sft_adapter), weights_of(tmp_path / "out/checkpoint-best")
    assert all(torch.equal(after[name], start[name]) for name in start)


def reward_some(monkeypatch, n_without: int) -> None:
    """Of each scoring the first groups of four get equal rewards, the others different ones."""

    def score(self, replies, model_scores, stop=None):
        rewards = torch.arange(len(replies), dtype=torch.float32) % 4
        rewards[: 4 * n_without] = 0
        return rewards[:, None]

    monkeypatch.setattr(Rewards, "__call__", score)


def test_other_prompts_stand_in_for_groups_without_a_signal(flags, tmp_path, monkeypatch):
    """Four groups, of which the first of each draw has no signal: with two more draws 4, then 1, which has none."""
    reward_some(monkeypatch, 1)
    grpo_training.main(flags(max_steps=1, output_dir=tmp_path / "once"))
    grpo_training.main(flags(max_steps=1, redraw_groups=2, output_dir=tmp_path / "again"))
    (once,), (again,) = (history(tmp_path / name) for name in ("once", "again"))
    assert once["groups/no_signal_frac"] == 0.25
    assert again["groups/no_signal_frac"] == 0.5, "of six groups three"
    state = json.loads((tmp_path / "again/trainer_state.json").read_text())
    assert state["groups_drawn"] == 6


def test_replies_that_are_cut_teach_nothing_where_that_is_asked_for(flags, tmp_path, monkeypatch):
    """Of the rewards of all, also of cut ones, advantages are made; the loss is that of the ended ones alone."""
    learned = []
    split = grpo_training.split_evenly

    def note(replies, learns, *args, **options):
        learned.append((replies, learns))
        return split(replies, learns, *args, **options)

    monkeypatch.setattr(grpo_training, "split_evenly", note)
    for masked in (False, True):
        grpo_training.main(flags(max_steps=1, output_dir=tmp_path / str(masked), mask_truncated_completions=masked))
    (replies, every), (_, ended) = learned
    assert torch.equal(ended, every & replies.ended)
    assert 0 < ended.sum() < every.sum()


def test_replies_to_one_prompt_stay_together_where_rows_are_joined(tmp_path):
    prompts, n_tokens = torch.tensor([[1, 2], [3, 4], [1, 2], [3, 4], [1, 2]]), torch.tensor([1, 2, 4, 3, 2])
    mask = torch.arange(4) < n_tokens[:, None]
    whole = torch.cat([torch.ones_like(prompts, dtype=torch.bool), mask], dim=1)
    ids = torch.cat([prompts, mask.long()], dim=1)
    replies = Replies(ids=ids, attention_mask=whole, mask=mask, ended=mask.any(dim=1))
    args = TrainingArguments(str(tmp_path), use_cpu=True, per_device_train_batch_size=3)
    learns = torch.tensor([True, True, True, True, True])
    for by_prompt, rows in ((False, [[2, 3, 1], [4, 0]]), (True, [[0, 2, 4], [1, 3]])):
        assert [part.tolist() for part, _ in grpo_training.split_evenly(replies, learns, args, by_prompt)] == rows


def test_a_judges_reward_and_replies_that_it_could_not_judge(flags, tmp_path, monkeypatch):
    """A judge that likes odd lengths, and gives no answer for replies of some: they are left out, not scored 0."""
    monkeypatch.setattr(judge_client, "LONGEST_PAUSE", 0)
    with running_judge() as judge:
        judge.verdict = lambda reply, criterion: len(reply) % 2 == 1
        judge.fault = lambda number, handler: number % 5 == 3 and (send(handler, 400, {}) or True)
        served = {"judge_url": judge.url, "judge_model": "m", "judge_cache": tmp_path / "judged"}
        grpo_training.main(flags(rewards="judge", reward_file=None, **served))
        judge.fault = lambda number, handler: send(handler, 500, {}) or True
        more = flags(rewards="judge", reward_file=None, max_steps=4, resume_from_checkpoint=True, **served)
        with pytest.raises(UserError, match=r"8 questions in a row .*; saved in .*checkpoint-2, and the same command"):
            grpo_training.main(more)
    unjudged = updates(tmp_path / "out", "reply/unjudged_frac")
    assert 0 < max(unjudged) < 0.5
    assert all(math.isfinite(value) for entry in history(tmp_path / "out") for value in entry.values())
    assert min(updates(tmp_path / "out", "reward/judge_std")) > 0


def test_a_signal_does_not_wait_for_a_judge_that_hangs(flags, tmp_path, monkeypatch, capfd):
    """In the second update: the first is saved, and goes on as if nothing had been."""
    monkeypatch.setattr(judge_client, "SECONDS_AT_A_SIGNAL", 0)
    hangs, ended, log_update = threading.Event(), [], run.log_update
    monkeypatch.setattr(run, "log_update", lambda *given: (hangs.set(), log_update(*given)))

    def hang(number, handler) -> bool:
        if hangs.is_set():
            os.kill(os.getpid(), signal.SIGTERM)
            return judge.hang(number, handler) and not ended.append(number)
        return False

    with running_judge() as judge:
        judge.verdict = lambda reply, criterion: len(reply) % 2 == 1
        served = {"judge_url": judge.url, "judge_model": "m", "judge_cache": tmp_path / "judged"}
        judging = partial(flags, rewards="judge", reward_file=None, **served)
        grpo_training.main(judging(output_dir=tmp_path / "whole"))
        (tmp_path / "judged").rename(tmp_path / "judged before")
        hangs.clear()
        judge.fault = hang
        with pytest.raises(SystemExit) as stopped:
            grpo_training.main(judging())
        assert not ended
    assert stopped.value.code == 128 + signal.SIGTERM
    last_line = capfd.readouterr().err.splitlines()[-1]
    assert re.search(r"SIGTERM: stopped at update 1/2, saved in .*/out/checkpoint-1; the same command with", last_line)
    with running_judge() as judge:
        judge.verdict = lambda reply, criterion: len(reply) % 2 == 1
        grpo_training.main(judging(judge_url=judge.url, resume_from_checkpoint=True))
    assert updates(tmp_path / "out", "objective/reward") == updates(tmp_path / "whole", "objective/reward")


# ---------------------------------------------------------------- several processes, resume

train_in = partial(stage_runs.train_in, "grpo")


@pytest.mark.slow
@pytest.mark.parametrize("config", [None, "zero2"])
def test_two_processes_and_zero_give_the_first_update_of_one(flags, tmp_path, config):
    grpo_training.main(flags(output_dir=tmp_path / "one", max_steps=1, beta=0.1))
    config = config and ROOT / f"ds_configs/{config}.json"
    train_in(2, tmp_path, flags(max_steps=1, gradient_accumulation_steps=2, beta=0.1, deepspeed=config))
    (one,), (two,) = history(tmp_path / "one"), history(tmp_path / "out")
    assert figures(two) == pytest.approx(figures(one), abs=1e-4)
    weights, others = (weights_of(tmp_path / name / "checkpoint-1") for name in ("one", "out"))
    for name, tensor in weights.items():
        torch.testing.assert_close(others[name], tensor, atol=1e-4, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("config", [None, "zero2"])
def test_processes_with_unequal_parts_of_the_groups_go_on(flags, tmp_path, config):
    """Groups of 3 in two processes, of which some have no signal: one has more replies to learn from than the other."""
    config = config and ROOT / f"ds_configs/{config}.json"
    size = {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 3, "num_generations": 3}
    own = tmp_path / "sometimes.py"
    by_prompt = "[len(r.text) * (len(r.prompt[-1]['content']) % 2) for r in replies]"
    own.write_text(f"def sometimes(replies, records):\n    return {by_prompt}\n")
    train_in(2, tmp_path, flags(**size, rewards="sometimes", reward_file=own, deepspeed=config))
    assert 0 < updates(tmp_path / "out", "groups/no_signal_frac")[0] < 1


def stop_after_two_updates(monkeypatch, number: int) -> None:
    log_update = run.log_update

    def stop(metrics, step, *rest):
        log_update(metrics, step, *rest)
        if step == 2:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(run, "log_update", stop)


RESUMED = {"max_steps": 3, "num_iterations": 2, "redraw_groups": 1, "beta": 0.01}


def assert_same_run(parts: Path, whole: Path) -> None:
    for name in ("objective/reward", "objective/token_kl", "policy/loss", "policy/approx_kl", "learning_rate"):
        assert updates(parts, name) == updates(whole, name), name
    ours, theirs = (weights_of(folder / "checkpoint-3") for folder in (parts, whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_resumed_run_is_the_uninterrupted_one(flags, tmp_path, monkeypatch):
    grpo_training.main(flags(output_dir=tmp_path / "whole", **RESUMED))
    with monkeypatch.context() as patch:
        stop_after_two_updates(patch, signal.SIGTERM)
        with pytest.raises(SystemExit) as stopped:
            grpo_training.main(flags(output_dir=tmp_path / "parts", **RESUMED))
    assert stopped.value.code == 128 + signal.SIGTERM
    assert names(tmp_path / "parts") == {"checkpoint-2"}
    grpo_training.main(flags(output_dir=tmp_path / "parts", resume_from_checkpoint=True, **RESUMED))
    assert_same_run(tmp_path / "parts", tmp_path / "whole")


@pytest.mark.slow
def test_a_run_killed_with_9_goes_on_as_the_uninterrupted_one(flags, tmp_path):
    settings = RESUMED | {"save_steps": 1}
    grpo_training.main(flags(output_dir=tmp_path / "whole", **settings))
    log, parts = tmp_path / "log", tmp_path / "parts"
    process = start_stage("grpo", flags(output_dir=parts, **settings), log)
    while not (parts / "checkpoint-2").is_dir():
        assert process.is_alive(), log.read_text()[-3000:]
        time.sleep(0.01)
    process.kill()
    process.join()
    grpo_training.main(flags(output_dir=parts, resume_from_checkpoint=True, **settings))
    assert_same_run(parts, tmp_path / "whole")


# ---------------------------------------------------------------- what a run leaves


def test_files_measures_and_lineage(flags, tmp_path, sft_adapter, tiny_model_dir, kept_roles, capfd):
    data = write_exams(tmp_path)
    evaluated = {"validation_file_dir": data, "max_eval_samples": 3, "eval_strategy": "steps", "eval_steps": 1}
    kept = {"save_steps": 1, "save_total_limit": 1, "report_to": "tensorboard"}
    metrics = grpo_training.main(flags(**evaluated, **kept))
    out = tmp_path / "out"
    results = {"curves.png", "eval_results.json", "train_results.json", "trainer_state.json"}
    assert names(out) == {"checkpoint-2", "checkpoint-best", "runs"} | results
    assert names(out / "checkpoint-best") == ADAPTER_FILES
    assert names(out / "checkpoint-2") == ADAPTER_FILES | STATE_FILES
    assert list((out / "runs").rglob("events.out.tfevents.*"))
    log = capfd.readouterr().err
    assert len(re.findall(r"update \d/2  reward ", log)) == 2
    assert len(re.findall(r"update \d  evaluation: reward ", log)) == 3
    assert log.count("reply: ") == 4, "two replies before and two after"
    entries = [entry for entry in history(out) if "eval_reward" in entry]
    best = max(entries, key=lambda entry: entry["eval_exam_accuracy_tagged"])
    assert metrics == json.loads((out / "eval_results.json").read_text()) == best
    lineage = read_lineage(out / "checkpoint-best")
    assert (lineage.base_model, lineage.parent, lineage.stage) == (str(tiny_model_dir), str(sft_adapter), "grpo")
    if best["step"] == 2:
        kept_roles[0].model.set_adapter("default")
        found = logits_of(load_with_adapter(str(tiny_model_dir), str(out / "checkpoint-best")))
        torch.testing.assert_close(found, logits_of(kept_roles[0].model))


def test_exam_accuracy_is_of_the_replies_evaluated(flags, tmp_path, monkeypatch):
    """By letter, by an option's words, by none, and wrong ones."""
    texts = ["答案：A", "我选 B。", "不用管", "说不清", "<think>应该是 B</think>答案为 C", "<think>应该是 A"]
    held_out = write_exams(tmp_path / "held-out")
    read, right = Scorer.read, []

    def rewrite(self, rows, of_ids):
        found = read(self, rows, of_ids)
        if len(found) == len(texts):  # an evaluation
            found = [replace(reply, text=text) for reply, text in zip(found, texts, strict=True)]
            letters = ["A", "B", "C", None, "C", None]
            right[:] = [reply.record["answer"] == letter for reply, letter in zip(found, letters, strict=True)]
        return found

    monkeypatch.setattr(Scorer, "read", rewrite)
    evaluated = {"validation_file_dir": held_out, "max_eval_samples": 6, "do_eval": True}
    metrics = grpo_training.main(flags(max_steps=1, **evaluated))
    assert metrics["eval_exam_accuracy_tagged"] == pytest.approx(sum(right) / 6)
    assert (metrics["eval_exam_low"], metrics["eval_exam_high"]) == wilson_interval(sum(right), 6)
    assert metrics["eval_exam_unparsed_tagged"] == pytest.approx(2 / 6)


def test_finished_run_is_left_as_it_is(flags, tmp_path, capfd):
    grpo_training.main(flags(max_steps=1))
    before = (tmp_path / "out/trainer_state.json").read_bytes()
    assert grpo_training.main(flags(max_steps=1, resume_from_checkpoint=True)) == {}
    assert "holds a finished run (1 updates): nothing is trained" in capfd.readouterr().err
    assert (tmp_path / "out/trainer_state.json").read_bytes() == before
    for flag, value, was in (("beta", 0.5, "0.0"), ("num_generations", 8, 4), ("loss_type", "gspo", "dapo")):
        with pytest.raises(
            UserError, match=rf"--{flag} {value}: the run in .* was started with {was}, .*; leave it as"
        ):
            grpo_training.main(flags(max_steps=2, resume_from_checkpoint=True, **{flag: value}))


# ---------------------------------------------------------------- other models


def test_full_weights_and_a_quantized_base(flags, tiny_model_dir, tmp_path, kept_roles):
    grpo_training.main(flags(sft_model_path=tiny_model_dir, load_in_4bit=True, beta=0.1, lora_rank=4))
    quantized = {type(module).__name__ for module in kept_roles[0].model.modules()}
    assert "Linear4bit" in quantized
    first, second = history(tmp_path / "out")
    assert first["objective/token_kl"] == pytest.approx(0.0, abs=1e-4)
    assert second["objective/token_kl"] > first["objective/token_kl"]
    lineage = read_lineage(tmp_path / "out/checkpoint-best")
    assert (lineage.base_model, lineage.parent) == (str(tiny_model_dir), None)


def test_a_reward_model_is_one_of_the_rewards(flags, tmp_path, sft_adapter, reward_adapter, kept_roles):
    rewards = {"rewards": ["reward_model:2", "variety:0.1"], "reward_model_path": reward_adapter}
    grpo_training.main(flags(max_steps=1, **rewards))
    (first,) = history(tmp_path / "out")
    expected = 2 * first["reward/reward_model"] + 0.1 * first["reward/variety"]
    assert first["objective/reward"] == pytest.approx(expected, abs=1e-5)
    assert kept_roles[0].model.peft_config.keys() == {"default", "reward"}


# ---------------------------------------------------------------- alarms


def test_a_reward_that_all_replies_share_stops_the_run(flags, monkeypatch):
    monkeypatch.setattr(alarms, "GROUPS_WITHOUT_SIGNAL", 24)  # 6 updates of 4 groups
    message = r"^update 6: no group of 6 updates in a row has replies of different rewards \(0\.5 on average\)"
    with pytest.raises(UserError, match=message):
        grpo_training.main(flags(max_steps=20, rewards="constant"))


def test_too_far_from_the_start_or_too_large_a_step_stops_the_run(flags):
    with pytest.raises(UserError, match=r"^update \d+: the KL from the reference is [\d.]+ nats a token, over --stop"):
        grpo_training.main(flags(max_steps=20, beta=1e-6, stop_at_kl=3e-3, learning_rate=2e-4))
    with pytest.raises(UserError, match=r"^update \d+: it moved the policy by \S+ nats a token .*over --stop_at_kl"):
        grpo_training.main(flags(stop_at_kl=1e-4))


def test_out_of_memory_names_the_remedies_that_are_left(flags, monkeypatch):
    def fill(*args):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(grpo_training, "collect_replies", fill)
    with pytest.raises(UserError, match=r"^out of memory; in this order: --rollout_batch_size 8 \(now 16\); --per_dev"):
        grpo_training.main(flags())


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_peft": False}, r"^--use_peft False: the roles are adapters on one base"),
        ({"num_generations": 1}, r"^--num_generations 1: give at least 2"),
        (
            {"num_generations": 5},
            r"^--num_generations 5: does not divide the 16 episodes of an update \(4 a device x",
        ),
        ({"loss_type": "bnpo"}, r"^--loss_type: invalid choice: 'bnpo' \(choose from"),
        ({"scale_rewards": "batch"}, r"^--scale_rewards: invalid choice: 'batch' \(choose from"),
        ({"beta": -1}, r"^--beta -1: give 0 or more"),
        ({"epsilon": 1}, r"^--epsilon 1: give less than 1"),
        ({"epsilon_high": 0}, r"^--epsilon_high 0\.0: give more than 0"),
        ({"num_iterations": 0}, r"^--num_iterations 0: give more than 0"),
        ({"redraw_groups": -1}, r"^--redraw_groups -1: give 0 or more"),
        ({"total_episodes": 8}, r"^--max_steps and --total_episodes both say how long"),
        ({"rewards": "exams"}, r"^--rewards exams: there are exam, format"),
        ({"kl_coef": 0.1}, r"^--kl_coef is not a flag of this stage"),
        ({"sft_model_path": "./nowhere"}, r"^--sft_model_path \./nowhere: no such folder"),
        ({"rewards": "reward_model", "reward_file": None}, r"^--reward_model_path is missing"),
        ({"do_train": None}, r"^--do_train is missing"),
    ],
    ids=str,
)
def test_errors_in_one_line(flags, changes, message):
    with pytest.raises(UserError, match=message) as raised:
        grpo_training.main(flags(**changes))
    assert "\n" not in str(raised.value)


def test_docs_name_places_that_exist():
    text = (ROOT / "docs/grpo.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| .* \| `(\w+)` \| [^|]+ \|$", text.partition("| detail |")[2], re.MULTILINE)
    code = "".join(
        path.read_text(encoding="utf-8") for path in [ROOT / "grpo_training.py", *ROOT.glob("medtune/rl/*.py")]
    )
    assert len(rows) == 10
    assert not [name for name in rows if not re.search(rf"(def|class) {name}\b", code)]
