"""The PPO stage: what an update does, what a run leaves, resume, several processes, alarms, errors."""

import json
import math
import os
import re
import shutil
import signal
from dataclasses import fields
from functools import partial
from pathlib import Path

import pytest
import stage_runs
import torch
from build_tiny_model import write_tiny_model
from conftest import TEXTS, TINY_HEADS, TINY_SHAPE
from guide import GUIDE_PPO
from judge_server import running_judge, send
from peft import PeftModel
from safetensors.torch import load_file, save_file
from stage_runs import (
    ADAPTER_FILES,
    PARTS,
    history,
    logits_of,
    names,
    run_process,
    short_rl_run,
    train,
    updates,
    weights_of,
    words,
    write_lines,
)
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments

import merge_peft_adapter
import ppo_training
import reward_modeling
from medtune.arguments import StageArgumentParser
from medtune.errors import UserError
from medtune.measuring import judge_client
from medtune.measuring.intervals import wilson_interval
from medtune.models.adapters import load_with_adapter
from medtune.models.lineage import read_lineage
from medtune.models.loading import weights_fingerprint
from medtune.reading.tokenization import encode_exchange, load_chat_template
from medtune.rl import alarms, rollout, run
from medtune.rl.alarms import UPDATES_WITHOUT_END
from medtune.rl.arguments import RLTrainingArguments
from medtune.rl.ppo_math import value_losses
from medtune.rl.roles import Roles, load_roles
from medtune.training.checkpoints import no_other_run

ROOT = Path(__file__).resolve().parents[1]
STATE_FILES = {
    *("manifest.sha256", "optimizer.pt", "rng_state.pth", "scheduler.pt", "trainer_state.json"),
    "value_model.safetensors",
}
SIXTEEN = {"per_device_train_batch_size": 4, "max_steps": 1}  # episodes an update, where the accumulation is 4


# ---------------------------------------------------------------- what the stages before left


def train_rm(folder: Path, model: Path, *flags: str) -> Path:
    pairs = [
        {"question": f"{part}疼怎么办？", "response_chosen": f"{part}疼请就诊。", "response_rejected": "不用管。"}
        for part in PARTS
    ]
    return train(reward_modeling, folder, model, pairs, "--max_steps", "4", *flags)


@pytest.fixture(scope="module")
def rm_adapter(sft_adapter, tmp_path_factory) -> Path:
    """A reward model, an adapter on the same base. Read only."""
    return train_rm(tmp_path_factory.mktemp("rm"), sft_adapter)


def write_dialogues(folder: Path) -> Path:
    records = [
        {"question": f"第{n}个病人{PARTS[n % 8]}疼怎么办？", "answer": f"{PARTS[n % 8]}疼请就诊。"} for n in range(40)
    ]
    return write_lines(folder / "data/dialogues.jsonl", records).parent


@pytest.fixture
def data_dir(tmp_path) -> Path:
    return write_dialogues(tmp_path)


def short_run(sft_adapter: Path, rm_adapter: Path, folder: Path, **changes) -> list[str]:
    """Its flags; keywords replace or add some, None removes one."""
    own = {
        "sft_model_path": sft_adapter,
        "reward_model_path": rm_adapter,
        "train_file_dir": write_dialogues(folder),
    }
    return words(short_rl_run(folder, **own | changes))


@pytest.fixture
def flags(sft_adapter, rm_adapter, tmp_path):
    """A function that gives a short run's flags."""
    return partial(short_run, sft_adapter, rm_adapter, tmp_path)


@pytest.fixture
def kept_roles(monkeypatch) -> list[Roles]:
    """The roles of the runs, in their order."""
    kept = []

    def load(*args, **kwargs):
        roles, facts = load_roles(*args, **kwargs)
        kept.append(roles)
        return roles, facts

    monkeypatch.setattr(ppo_training, "load_roles", load)
    return kept


# ---------------------------------------------------------------- before the first update


def test_log_probs_that_are_not_the_models_own_stop_the_run(flags, tmp_path, monkeypatch):
    def load(*args, **kwargs):
        roles, facts = load_roles(*args, **kwargs)
        # Logits that hang on the place in the row, which no single state shows.
        head = roles.model.get_output_embeddings()
        head.register_forward_hook(lambda module, args, out: out * torch.linspace(0.5, 2, out.shape[-2])[:, None])
        return roles, facts

    monkeypatch.setattr(ppo_training, "load_roles", load)
    with pytest.raises(
        UserError, match=r"^--sft_model_path .*: this stage's log-probs .*: Qwen2ForCausalLM makes"
    ) as raised:
        ppo_training.main(flags())
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "out").exists(), "before the first update"


# ---------------------------------------------------------------- what an update does


def test_first_step_starts_at_ratio_one(flags, tmp_path, kept_roles, sft_adapter):
    ppo_training.main(flags(max_steps=1, num_ppo_epochs=1))
    (first,) = history(tmp_path / "out")
    assert first["objective/kl"] == pytest.approx(0.0, abs=1e-4)
    assert first["policy/ratio"] == pytest.approx(1.0, abs=1e-5)
    assert first["policy/approx_kl"] == pytest.approx(0.0, abs=1e-6)
    assert first["policy/clip_frac"] == 0.0
    assert first["policy/loss"] == pytest.approx(0.0, abs=1e-5)  # whitened advantages have mean 0
    # Only policy and value have moved.
    start, state = weights_of(sft_adapter), kept_roles[0].model.state_dict()
    for name, tensor in start.items():
        stem, _, kind = name.rpartition(".")
        assert torch.equal(state[f"{stem}.reference.{kind}"], tensor)
        assert not torch.equal(state[f"{stem}.default.{kind}"], tensor)
        assert not torch.equal(state[f"{stem}.value.{kind}"], state[f"{stem}.reward.{kind}"])


def test_value_clip_counts_in_deviations_of_the_returns(flags, monkeypatch):
    """A reward model of ten times the scores lets the value move ten times as far."""
    clips, deviations = set(), set()
    losses, returns_of = ppo_training.value_losses, ppo_training.advantages_and_returns

    def note_clip(values, old_values, returns, cliprange_value):
        clips.add(cliprange_value)
        return losses(values, old_values, returns, cliprange_value)

    def note_returns(rewards, values, mask, *args):
        advantages, returns = returns_of(rewards, values, mask, *args)
        deviations.add(returns[mask].double().std(correction=0).item())
        return advantages, returns

    monkeypatch.setattr(ppo_training, "value_losses", note_clip)
    monkeypatch.setattr(ppo_training, "advantages_and_returns", note_returns)
    ppo_training.main(flags(max_steps=1, cliprange_value=0.3))
    (clip,), (deviation,) = clips, deviations
    assert clip == pytest.approx(0.3 * deviation, rel=1e-4)
    assert clip > 0


def test_checkpointing_and_micro_batches_change_nothing(flags, tmp_path):
    runs = {
        "whole": {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1},
        "parts": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "rollout_batch_size": 3},
        "checkpointed": {"gradient_checkpointing": True},
    }
    for name, changes in runs.items():
        ppo_training.main(flags(output_dir=tmp_path / name, max_steps=1, **changes))
    (whole,) = history(tmp_path / "whole")
    for name in ("parts", "checkpointed"):
        (other,) = history(tmp_path / name)
        for key in (key for key in whole if key.startswith(("objective", "policy", "value", "reply"))):
            assert other[key] == pytest.approx(whole[key], abs=2e-4), f"{name} {key}"


@pytest.mark.slow
def test_bandit_is_solved(flags, tmp_path, monkeypatch, tiny_model_dir):
    """A reply scores the share of its tokens that are among the first 60 of 600: the policy learns to write them."""

    def scores(self, texts):
        return torch.tensor([sum(token < 60 for token in text[-3:]) / 3 for text in texts])

    monkeypatch.setattr(Roles, "scores", scores)
    monkeypatch.setattr(alarms, "UPDATES_WITHOUT_END", 1000)  # all replies have three tokens
    size = {"per_device_train_batch_size": 32, "gradient_accumulation_steps": 1, "rollout_batch_size": 32}
    learning = {"learning_rate": 5e-3, "kl_coef": 0, "temperature": 1.0, "lr_scheduler_type": "linear"}
    bandit = {"sft_model_path": tiny_model_dir, "response_length": 3, "stop_token": "<|endoftext|>", "max_steps": 45}
    ppo_training.main(flags(**size, **learning, **bandit))
    found = updates(tmp_path / "out", "objective/score")
    assert found[0] < 0.3, found
    assert sum(found[-10:]) / 10 > 0.5, found


# ---------------------------------------------------------------- several processes


train_in = partial(stage_runs.train_in, "ppo")


@pytest.fixture(scope="module")
def first_update(sft_adapter, rm_adapter, tmp_path_factory) -> Path:
    """What one process leaves after an update of 16 episodes."""
    folder = tmp_path_factory.mktemp("one")
    ppo_training.main(short_run(sft_adapter, rm_adapter, folder, **SIXTEEN, gradient_accumulation_steps=4))
    return folder / "out"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("n_processes", "config"),
    [(2, None), (1, "zero2"), (2, "zero2")],
    ids=["2 processes", "1 with zero2", "2 with zero2"],
)
def test_processes_and_zero_give_the_first_update_of_one(flags, first_update, tmp_path, n_processes, config):
    config = config and ROOT / f"ds_configs/{config}.json"
    argv = flags(**SIXTEEN, gradient_accumulation_steps=4 // n_processes, deepspeed=config)
    train_in(n_processes, tmp_path, argv)
    (one,), (found,) = history(first_update), history(tmp_path / "out")
    for key in (key for key in one if key.startswith(("objective", "policy", "value", "reply"))):
        assert found[key] == pytest.approx(one[key], abs=1e-4), key
    weights, others = (weights_of(folder / "checkpoint-1") for folder in (first_update, tmp_path / "out"))
    for name, tensor in weights.items():
        torch.testing.assert_close(others[name], tensor, atol=1e-4, rtol=0)


@pytest.mark.slow
def test_resumed_run_with_zero_is_the_uninterrupted_one(flags, tmp_path):
    settings = {"max_steps": 4, "save_steps": 2, "deepspeed": ROOT / "ds_configs/zero2.json"}
    train_in(2, tmp_path, flags(output_dir=tmp_path / "whole", **settings))
    (tmp_path / "parts").mkdir()
    (tmp_path / "whole/checkpoint-2").rename(tmp_path / "parts/checkpoint-2")
    argv = flags(output_dir=tmp_path / "parts", resume_from_checkpoint=True, **settings)
    assert "resuming from" in train_in(2, tmp_path, argv)
    for name in ("objective/score", "policy/loss", "policy/grad_norm", "value/loss", "learning_rate"):
        assert updates(tmp_path / "parts", name) == updates(tmp_path / "whole", name), name
    whole, parts = (weights_of(tmp_path / name / "checkpoint-4") for name in ("whole", "parts"))
    assert all(torch.equal(parts[name], whole[name]) for name in whole)
    with pytest.raises(UserError, match=r"^processes under DeepSpeed 0: the run in .* was started with 2"):
        ppo_training.main(flags(output_dir=tmp_path / "parts", resume_from_checkpoint=True, max_steps=8,
                                gradient_accumulation_steps=4))  # fmt: skip


# ---------------------------------------------------------------- what a run leaves


def test_files_measures_and_lineage(flags, tmp_path, data_dir, sft_adapter, tiny_model_dir, capfd):
    metrics = ppo_training.main(
        flags(
            validation_file_dir=data_dir,
            max_eval_samples=3,
            eval_strategy="steps",
            eval_steps=1,
            save_steps=1,
            save_total_limit=1,
            report_to="tensorboard",
        )
    )
    out = tmp_path / "out"
    results = {"curves.png", "eval_results.json", "train_results.json", "trainer_state.json"}
    assert names(out) == {"checkpoint-2", "checkpoint-best", "runs"} | results
    assert names(out / "checkpoint-best") == ADAPTER_FILES
    assert names(out / "checkpoint-2") == ADAPTER_FILES | STATE_FILES
    assert list((out / "runs").rglob("events.out.tfevents.*"))
    log = capfd.readouterr().err
    assert len(re.findall(r"update \d/2  score ", log)) == 2
    assert len(re.findall(r"update \d  evaluation: score ", log)) == 3
    assert log.count("reply: ") == 4, "two replies before and two after"
    evaluated = [entry for entry in history(out) if "eval_score" in entry]
    best = max(evaluated, key=lambda entry: entry["eval_rlhf_reward"])
    assert metrics == json.loads((out / "eval_results.json").read_text()) == best
    lineage = read_lineage(out / "checkpoint-best")
    assert (lineage.base_model, lineage.parent, lineage.stage) == (str(tiny_model_dir), str(sft_adapter), "ppo")
    assert lineage.base_weights == weights_fingerprint(str(tiny_model_dir))


def test_adapter_on_the_original_base_is_the_trained_policy_and_merges(flags, tmp_path, tiny_model_dir, kept_roles):
    ppo_training.main(flags(max_steps=1))
    best = tmp_path / "out/checkpoint-best"
    kept_roles[0].model.set_adapter("default")
    policy = logits_of(kept_roles[0].model)
    torch.testing.assert_close(logits_of(load_with_adapter(str(tiny_model_dir), str(best))), policy)
    merged = tmp_path / "merged"
    options = f"--base_model {tiny_model_dir} --lora_model {best} --output_dir {merged} --torch_dtype float32"
    merge_peft_adapter.main(options.split())
    torch.testing.assert_close(logits_of(AutoModelForCausalLM.from_pretrained(merged)), policy, atol=1e-3, rtol=1e-3)


def test_a_resumed_run_keeps_its_rows(flags, capfd):
    """Joined or padded: other rows round otherwise."""
    ppo_training.main(flags(max_steps=1, padding_free=False))
    assert "rows are joined" not in capfd.readouterr().err
    again = {"max_steps": 2, "resume_from_checkpoint": True}
    with pytest.raises(UserError, match=r"^--padding_free True: the run in .* was started with False"):
        ppo_training.main(flags(**again, padding_free=True))
    ppo_training.main(flags(**again))
    assert "rows are joined" not in capfd.readouterr().err


def test_resumed_run_is_the_uninterrupted_one(flags, tmp_path, monkeypatch):
    settings = {"max_steps": 4, "adaptive_kl": True}
    ppo_training.main(flags(output_dir=tmp_path / "whole", **settings))
    with monkeypatch.context() as patch:
        log_update = run.log_update

        def stop(metrics, step, *rest):
            log_update(metrics, step, *rest)
            if step == 2:
                os.kill(os.getpid(), signal.SIGTERM)

        patch.setattr(run, "log_update", stop)
        with pytest.raises(SystemExit) as stopped:
            ppo_training.main(flags(output_dir=tmp_path / "parts", **settings))
    assert stopped.value.code == 128 + signal.SIGTERM
    assert names(tmp_path / "parts") == {"checkpoint-2"}
    ppo_training.main(flags(output_dir=tmp_path / "parts", resume_from_checkpoint=True, **settings))
    for name in ("objective/score", "objective/kl_coef", "policy/loss", "value/loss", "learning_rate"):
        assert updates(tmp_path / "parts", name) == updates(tmp_path / "whole", name), name
    whole, parts = (weights_of(tmp_path / name / "checkpoint-4") for name in ("whole", "parts"))
    assert all(torch.equal(parts[name], whole[name]) for name in whole)


def test_finished_run_is_left_as_it_is(flags, tmp_path, rm_adapter, capfd):
    flags = partial(flags, reward_model_path=shutil.copytree(rm_adapter, tmp_path / "rm"))
    ppo_training.main(flags(max_steps=1))
    before = (tmp_path / "out/trainer_state.json").read_bytes()
    assert ppo_training.main(flags(max_steps=1, resume_from_checkpoint=True)) == {}
    assert "holds a finished run (1 updates): nothing is trained" in capfd.readouterr().err
    assert (tmp_path / "out/trainer_state.json").read_bytes() == before
    for flag, value, was in (("seed", 7, 42), ("kl_coef", 0.5, 0.05)):
        with pytest.raises(
            UserError, match=rf"--{flag} {value}: the run in .* was started with {was}, .*; leave it as"
        ):
            ppo_training.main(flags(max_steps=2, resume_from_checkpoint=True, **{flag: value}))
    was = (
        r"episodes an update 4: the run in .* was started with 8, .*; leave it as it was \(on half the GPUs accumulate"
    )
    with pytest.raises(UserError, match=was):
        ppo_training.main(flags(max_steps=2, resume_from_checkpoint=True, gradient_accumulation_steps=1))
    with pytest.raises(UserError, match=r"is finished, with other flags: --cliprange 0\.3 \(not given then\)"):
        ppo_training.main(flags(max_steps=1, resume_from_checkpoint=True, cliprange=0.3))
    weights = load_file(tmp_path / "rm/adapter_model.safetensors")
    save_file({name: 2 * tensor for name, tensor in weights.items()}, tmp_path / "rm/adapter_model.safetensors")
    with pytest.raises(UserError, match=r"weights of the reward model \w{12}: the run in .* was started with \w{12}"):
        ppo_training.main(flags(max_steps=1, resume_from_checkpoint=True))


def test_more_updates_than_the_run_was_started_with_are_said(flags, tmp_path, capfd):
    ppo_training.main(flags(max_steps=1))
    ppo_training.main(flags(max_steps=2, resume_from_checkpoint=True))
    log = capfd.readouterr().err
    assert updates(tmp_path / "out", "learning_rate")[1] == updates(tmp_path / "out", "learning_rate")[0] / 2 > 0
    assert (
        len(re.findall(r"another learning rate schedule .*: its next rate was 0\.00e\+00, and step 2 is made", log))
        == 1
    )


def test_prompts_without_replies(flags, tmp_path, capfd):
    prompts = [{"prompt": f"{part}疼怎么办？"} for part in PARTS]
    prompts += [{"messages": [{"role": "user", "content": f"{part}肿怎么办？"}]} for part in PARTS]
    data = write_lines(tmp_path / "prompts/prompts.jsonl", prompts).parent
    ppo_training.main(flags(train_file_dir=data, max_steps=1))
    assert len(updates(tmp_path / "out", "objective/kl")) == 1
    assert "the prompts have no replies to centre them by" in capfd.readouterr().err


# ---------------------------------------------------------------- other rewards


@pytest.fixture
def exam_flags(flags, tmp_path):
    """A function that gives the flags of a short run on exam questions without a reward model."""
    questions = [
        {"question": f"第{n}题，{part}疼？", "option": {"A": "风湿", "B": part, "C": "外伤"}, "answer": "ABC"[n % 3]}
        for n, part in enumerate(PARTS * 2)
    ]
    data = write_lines(tmp_path / "exams/exam.jsonl", questions).parent
    return partial(flags, train_file_dir=data, reward_model_path=None, rewards=["exam", "length:0.5"])


def test_rewards_without_a_reward_model(exam_flags, tmp_path, kept_roles, capfd):
    ppo_training.main(exam_flags(output_dir=tmp_path / "whole", do_eval=True, save_steps=1, max_eval_samples=1))
    figures = history(tmp_path / "whole")
    for name in ("objective/score", "eval_score"):
        stem = "eval_reward_" if name.startswith("eval") else "reward/"
        entries = [entry for entry in figures if name in entry]
        assert len(entries) == 2
        for entry in entries:
            assert entry[name] == pytest.approx(entry[f"{stem}exam"] + 0.5 * entry[f"{stem}length"])
            assert f"{stem}exam_std" in entry
    assert updates(tmp_path / "whole", "reward/length")[0] < 0, "replies near the limit cost"
    roles = kept_roles[0]
    assert roles.reward_head is roles.reward_model is None
    assert "reward" not in roles.model.peft_config
    log = capfd.readouterr().err
    assert "1 x exam + 0.5 x length" in log
    assert "starts as the policy, with a head of zeros" in log
    # Resumed from the first update, it is the same run.
    shutil.copytree(tmp_path / "whole/checkpoint-1", tmp_path / "parts/checkpoint-1")
    again = {"output_dir": tmp_path / "parts", "resume_from_checkpoint": True, "do_eval": True, "max_eval_samples": 1}
    ppo_training.main(exam_flags(**again, save_steps=1))
    whole, parts = (weights_of(tmp_path / name / "checkpoint-2") for name in ("whole", "parts"))
    assert all(torch.equal(parts[name], whole[name]) for name in whole)
    with pytest.raises(
        UserError, match=r"^--rewards exam:2 length:0.5: the run in .* started with exam:1 length:0.5, "
    ):
        ppo_training.main(exam_flags(**again, rewards=["exam:2", "length:0.5"]))


def test_exam_accuracy_chooses_the_best_checkpoint(exam_flags, tmp_path, monkeypatch):
    accuracies, measure = iter((0.0, 1.0, 0.5)), ppo_training.exam_scores

    def by_evaluation(reply, form):
        return measure(reply, form) | {"exam_accuracy_tagged": next(accuracies)}

    monkeypatch.setattr(ppo_training, "exam_scores", by_evaluation)
    evaluated = {"do_eval": True, "eval_strategy": "steps", "eval_steps": 1, "max_eval_samples": 1}
    metrics = ppo_training.main(exam_flags(**evaluated, max_steps=2))
    assert (metrics["step"], metrics["eval_exam_accuracy_tagged"]) == (1, 1.0)
    assert (metrics["eval_exam_low"], metrics["eval_exam_high"]) == wilson_interval(1, 1)
    assert metrics["eval_exam_unparsed_tagged"] in (0, 1)
    assert "eval_rlhf_reward" in metrics
    assert next(accuracies, None) is None


def test_a_run_without_any_right_answer_is_stopped(exam_flags):
    with pytest.raises(UserError, match=r"^update 5: all replies of the first 5 updates have the same score, 0: "):
        ppo_training.main(exam_flags(rewards=["exam"], max_steps=6))


@pytest.mark.slow
def test_a_judges_reward_in_place_of_a_reward_models(flags, tmp_path):
    """Replies that it could not judge are replaced by others, and left out of what the evaluation averages."""
    with running_judge() as judge:
        judge.verdict = lambda reply, criterion: len(reply) % 2 == 1
        judge.fault = lambda number, handler: number % 5 == 3 and (send(handler, 400, {}) or True)
        served = {"judge_url": judge.url, "judge_model": "m", "judge_cache": tmp_path / "judged"}
        data = {"do_eval": True, "max_eval_samples": 8, "validation_file_dir": write_dialogues(tmp_path)}
        ppo_training.main(flags(reward_model_path=None, rewards="judge", **served, **data))
    entries = history(tmp_path / "out")
    assert all(math.isfinite(value) for entry in entries for value in entry.values())
    assert len([entry for entry in entries if "eval_reward_judge" in entry or "eval_score" in entry]) == 2


def test_ctrl_c_does_not_wait_for_a_judge_that_hangs(flags, tmp_path, monkeypatch):
    monkeypatch.setattr(judge_client, "SECONDS_AT_A_SIGNAL", 0)
    ended = []

    def hang(number, handler) -> bool:
        if number == 2:  # the first one tries the judge out
            os.kill(os.getpid(), signal.SIGINT)
        return number > 1 and judge.hang(number, handler) and not ended.append(number)

    with running_judge() as judge:
        judge.fault = hang
        served = {"judge_url": judge.url, "judge_model": "m", "judge_cache": tmp_path / "judged"}
        with pytest.raises(SystemExit) as stopped:
            ppo_training.main(flags(reward_model_path=None, rewards="judge", **served))
        assert not ended
    assert stopped.value.code == 128 + signal.SIGINT
    assert names(tmp_path / "out") == {"checkpoint-0"}


def test_a_reward_model_among_other_rewards(flags, tmp_path, kept_roles):
    ppo_training.main(flags(rewards=["reward_model:2", "format"], max_steps=1))
    (first,) = history(tmp_path / "out")
    assert first["objective/score"] == pytest.approx(
        2 * first["reward/reward_model"] + first["reward/format"], abs=1e-5
    )
    assert kept_roles[0].score_shift != 0, "of the reward model alone"
    assert first["reward/format"] == 0


def test_the_documents_own_rewards(flags, tmp_path):
    """The file that docs/ppo.md shows, on records with the key that it reads."""
    text = (ROOT / "docs/ppo.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    (tmp_path / "my_rewards.py").write_text(code, encoding="utf-8")
    dialogues = [{"question": f"{part}疼怎么办？", "answer": "就诊。", "keywords": [part, "诊"]} for part in PARTS]
    data = write_lines(tmp_path / "own/dialogues.jsonl", dialogues).parent
    names = ["keywords", "brevity:0.2", "reference:0.1"]
    own = {"train_file_dir": data, "reward_model_path": None, "reward_file": tmp_path / "my_rewards.py"}
    ppo_training.main(flags(**own, rewards=names, max_steps=1))
    (first,) = history(tmp_path / "out")
    assert first["reward/brevity"] == 1
    assert 0 <= first["reward/keywords"] <= 1
    assert 0 < first["reward/reference"] < 1


def test_faults_of_rewards_and_their_data_come_before_weights(exam_flags, data_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(ppo_training, "load_roles", None)
    own = tmp_path / "own.py"
    own.write_text("def mine(replies, records):\n    return [record['keywords'] for record in records]\n")
    with pytest.raises(UserError, match=r"^reward mine: .*own.py:2: KeyError: 'keywords'$"):
        ppo_training.main(exam_flags(rewards=["mine"], reward_file=own))
    with pytest.raises(UserError, match=r"dialogues.jsonl:1, .*: no answer: a reward compares with the letter of"):
        ppo_training.main(exam_flags(train_file_dir=data_dir))


# ---------------------------------------------------------------- other models


def test_full_weights_of_both(flags, tiny_model_dir, tmp_path, capfd):
    """The SFT model is the base of its own; a whole reward model stands beside it."""
    reward = train_rm(tmp_path / "rm", tiny_model_dir, "--use_peft", "False")
    ppo_training.main(flags(sft_model_path=tiny_model_dir, reward_model_path=reward, max_steps=1, lora_rank=4))
    log = capfd.readouterr().err
    assert "a model of its own: its base is not the policy's" in log
    assert "reads replies again" not in log
    lineage = read_lineage(tmp_path / "out/checkpoint-best")
    assert (lineage.base_model, lineage.parent) == (str(tiny_model_dir), None)


def test_reward_model_of_another_base_and_tokenizer(flags, tmp_path, monkeypatch, capfd):
    other = tmp_path / "other"
    write_tiny_model(other, TEXTS[:4] * 2, vocab_size=480, **TINY_SHAPE, **TINY_HEADS)
    reward = train_rm(tmp_path / "rm", other)
    read = []
    scores = Roles.scores
    monkeypatch.setattr(Roles, "scores", lambda self, texts: read.append(texts) or scores(self, texts))
    ppo_training.main(flags(reward_model_path=reward, max_steps=1))
    assert "reads replies again in its own tokens and template" in capfd.readouterr().err
    tokenizer = AutoTokenizer.from_pretrained(reward)
    question = [{"role": "user", "content": "第0个病人头疼怎么办？"}]
    prompt, reply = encode_exchange(tokenizer, load_chat_template(tokenizer, None), question, "头疼请就诊。")
    assert prompt + reply in read[0], "the dialogues' own replies are scored as the reward model learned them"
    assert all(text[-1] != tokenizer.pad_token_id for texts in read for text in texts)


@pytest.mark.parametrize("flag", ["load_in_4bit", "load_in_8bit"])
def test_quantized_base(flags, tmp_path, kept_roles, sft_adapter, flag):
    """Adapters of a whole base on a quantized one: policy and reference are one at the start, and the policy learns."""
    ppo_training.main(flags(**{flag: True}))
    quantized = {type(module).__name__ for module in kept_roles[0].model.modules()}
    assert {"load_in_4bit": "Linear4bit", "load_in_8bit": "Linear8bitLt"}[flag] in quantized
    first, second = history(tmp_path / "out")
    assert first["objective/kl"] == pytest.approx(0.0, abs=1e-4)
    assert first["policy/ratio"] != 1.0
    assert second["objective/kl"] != pytest.approx(0.0, abs=1e-4)
    start, trained = weights_of(sft_adapter), weights_of(tmp_path / "out/checkpoint-best")
    assert trained.keys() == start.keys()
    assert all(
        tensor.dtype == torch.float32 and not torch.equal(tensor, start[name]) for name, tensor in trained.items()
    )


def test_base_in_bfloat16_on_the_cpu(flags, tmp_path, kept_roles):
    """Policy and reference are one at the start, what is trained is in float32, and a resumed run keeps bfloat16."""
    ppo_training.main(flags(cpu_bf16=True, max_steps=1, num_ppo_epochs=1))
    roles, (first,) = kept_roles[0], history(tmp_path / "out")
    assert roles.model.get_input_embeddings().weight.dtype == torch.bfloat16
    trained = {weights.dtype for role in ("policy", "value") for weights in roles.trained_weights(role).values()}
    assert (
        trained == {tensor.dtype for tensor in weights_of(tmp_path / "out/checkpoint-best").values()} == {torch.float32}
    )
    assert first["objective/kl"] == 0.0
    assert first["policy/ratio"] == pytest.approx(1.0, abs=0.02)  # other batches round otherwise
    assert abs(first["policy/approx_kl"]) < 1e-3
    with pytest.raises(UserError, match=r"^--cpu_bf16 False: the run in .* was started with True"):
        ppo_training.main(flags(resume_from_checkpoint=True, max_steps=2, torch_dtype="float32"))
    ppo_training.main(flags(resume_from_checkpoint=True, max_steps=2))
    assert kept_roles[1].model.get_input_embeddings().weight.dtype == torch.bfloat16


# ---------------------------------------------------------------- alarms


def test_broken_sampler_is_noticed(flags, monkeypatch):
    def draw_evenly(logits, uniforms, temperature):
        return (torch.tensor(uniforms) * logits.shape[1]).long()

    monkeypatch.setattr(rollout, "inverse_transform", draw_evenly)
    with pytest.raises(UserError, match=r"^update \d+: replies are not drawn from the policy: .* nats a token"):
        ppo_training.main(flags(max_steps=20))


@pytest.mark.parametrize(
    ("score", "message"), [(float("nan"), "scores that are not finite"), (1.5, "different replies the same score, ")]
)
def test_broken_reward_model_is_noticed(flags, monkeypatch, score, message):
    monkeypatch.setattr(Roles, "scores", lambda self, texts: torch.full((len(texts),), score))
    with pytest.raises(UserError, match=rf"^update \d+: the reward model gives .*{message}"):
        ppo_training.main(flags(max_steps=20))


def test_a_hundred_times_the_learning_rate_is_noticed(flags):
    with pytest.raises(UserError, match=r"^update \d+: it moved the policy by .* nats a token .*lower --learning_rate"):
        ppo_training.main(flags(max_steps=20, learning_rate=1e-1, response_length=24))


def test_replies_that_never_end_are_noticed(flags):
    with pytest.raises(UserError, match=rf"no reply of {UPDATES_WITHOUT_END} updates in a row has an end token"):
        ppo_training.main(flags(max_steps=20, response_length=1, learning_rate=1e-4))


def test_gradients_that_are_not_finite_are_noticed(flags, monkeypatch):
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda weights, most: torch.tensor(float("inf")))
    with pytest.raises(UserError, match=r"^update 1: the policy's gradient is not finite; lower --learning_rate"):
        ppo_training.main(flags())


def test_losses_that_are_not_finite_are_noticed(flags, monkeypatch):
    def infinite(*args):
        losses, held = value_losses(*args)
        return losses + torch.inf, held

    monkeypatch.setattr(ppo_training, "value_losses", infinite)
    with pytest.raises(UserError, match=r"^update 1: the loss is not finite; lower --learning_rate"):
        ppo_training.main(flags())


def test_matrices_without_gradient_are_noticed(flags, monkeypatch):
    set_adapter = PeftModel.set_adapter

    def freeze_one(self, *args, **options):
        set_adapter(self, *args, **options)
        next(w for name, w in self.named_parameters() if ".lora_B.default" in name).requires_grad_(False)

    monkeypatch.setattr(PeftModel, "set_adapter", freeze_one)
    with pytest.raises(UserError, match=r"^update 1: 1 adapter matrices of the policy get no gradient, such as "):
        ppo_training.main(flags())


def test_out_of_memory_names_the_remedies_that_are_left(flags, monkeypatch):
    def fill(*args):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(ppo_training, "collect_rollout", fill)
    with pytest.raises(UserError) as raised:
        ppo_training.main(flags(gradient_checkpointing=True))
    assert str(raised.value) == (
        "out of memory; in this order: --rollout_batch_size 8 (now 16); --per_device_train_batch_size 2 "
        "--gradient_accumulation_steps 4 (now 4 and 2); --load_in_4bit True; a shorter --max_source_length or "
        "--response_length"
    )


def test_too_small_a_disk_is_refused_before_the_first_reply(flags, tmp_path, monkeypatch):
    usage = type("Usage", (), {"free": 40 * 2**20})
    monkeypatch.setattr("medtune.training.checkpoints.shutil.disk_usage", lambda folder: usage)
    message = r"the run writes 2 checkpoints of about 0\.02 GiB and checkpoint-best, .* has 0\.04 GiB left; make room"
    with pytest.raises(UserError, match=message):
        ppo_training.main(flags(save_steps=1))
    assert not (tmp_path / "out").exists()


def test_estimated_size_of_a_checkpoint(flags, tmp_path, monkeypatch):
    estimates = []
    monkeypatch.setattr(run, "refuse_small_disk", lambda output_dir, *sizes: estimates.extend(sizes))
    ppo_training.main(flags(max_steps=3, save_steps=2, save_total_limit=5))
    weights = tmp_path / "out/checkpoint-best/adapter_model.safetensors"
    last = tmp_path / "out/checkpoint-3"
    states = [last / name for name in ("adapter_model.safetensors", "value_model.safetensors", "optimizer.pt")]
    assert estimates[0] == pytest.approx(weights.stat().st_size, rel=0.1)
    assert estimates[1] == pytest.approx(sum(file.stat().st_size for file in states), rel=0.1)
    assert estimates[2:] == [2, 5]


def test_no_second_run_may_write_in_the_folder(flags, tmp_path, monkeypatch):
    collect = ppo_training.collect_rollout

    def meet_another_run(*args, **options):
        with pytest.raises(UserError, match="another run is writing in it"), no_other_run(tmp_path / "out"):
            pass
        return collect(*args, **options)

    monkeypatch.setattr(ppo_training, "collect_rollout", meet_another_run)
    ppo_training.main(flags(max_steps=1))
    with no_other_run(tmp_path / "out"):
        pass


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_peft": False}, r"^--use_peft False: the roles are adapters on one base"),
        ({"num_mini_batches": 3}, r"^--num_mini_batches 3: does not divide --gradient_accumulation_steps 2"),
        ({"do_train": None}, r"^--do_train is missing"),
        ({"max_steps": 0}, r"^--max_steps 0: give at least 1; -1 means by episodes"),
        ({"fp16": True}, r"^--fp16 is not a flag of this stage"),
        ({"neftune_noise_alpha": 5}, r"^--neftune_noise_alpha is not a flag of this stage"),
        ({"eval_steps": 0.5, "eval_strategy": "steps"}, r"^--eval_steps: invalid int value: '0\.5'"),
        ({"save_steps": 0}, r"^--save_steps 0: give a number of updates of at least 1"),
        (
            {"per_device_eval_batch_size": 2},
            r"^--per_device_eval_batch_size is not a flag of this stage, which has no use",
        ),
        ({"save_strategy": "epoch"}, r"^--save_strategy: invalid choice: 'epoch' \(choose from"),
        ({"optim": "adamm"}, r"adamm is not a valid OptimizerNames"),
        ({"total_episodes": 8}, r"^--max_steps and --total_episodes both say how long"),
        ({"total_episodes": 0}, r"^--total_episodes 0: give at least 1"),
        ({"kl_coef": -1}, r"^--kl_coef -1: give 0 or more"),
        ({"lam": 1.5}, r"^--lam 1\.5: give a number from 0 to 1"),
        ({"temperature": 0}, r"^--temperature 0\.0: give more than 0"),
        ({"stop_token": "头疼头疼"}, r"^--stop_token 头疼头疼: \d+ tokens"),
        ({"sft_model_path": "./nowhere"}, r"^--sft_model_path \./nowhere: no such folder"),
        ({"reward_model_path": "./nowhere"}, r"^--reward_model_path \./nowhere: no such folder"),
        ({"reward_model_path": None}, r"^--reward_model_path is missing: .* or score by other --rewards"),
        ({"rewards": ["exam", "reward_model", "exams"]}, r"^--rewards exams: there are exam, format, "),
        ({"train_file_dir": None}, r"^--train_file_dir is missing"),
        ({"max_source_length": 8, "truncation": "drop"}, r"40 prompt too long\), so nothing is left"),
        ({"device_map": "auto"}, r"--device_map is not a flag of this stage"),
        ({"max_bad_steps": 2}, r"--max_bad_steps is not a flag of this stage"),
    ],
    ids=str,
)
def test_errors_in_one_line(flags, changes, message):
    with pytest.raises(UserError, match=message) as raised:
        ppo_training.main(flags(**changes))
    assert "\n" not in str(raised.value)


def test_flags_of_transformers_have_its_defaults():
    changed = {"adam_epsilon", "learning_rate", "logging_steps"}
    others = {spec.name: spec.default for spec in fields(TrainingArguments)}
    for spec in fields(RLTrainingArguments):
        assert spec.name in changed or (spec.default or None) == (others[spec.name] or None), spec.name
    given = {"output_dir": "out", "do_train": True, "gradient_checkpointing": True, "lr_scheduler_type": "cosine"}
    given |= {"gradient_checkpointing_kwargs": '{"use_reentrant": true}', "adam_beta2": 0.9, "warmup_ratio": 0.1}
    given |= {"optim": "adafactor", "eval_steps": 3}
    words = [word for name, value in given.items() for word in (f"--{name}", str(value))]
    (training_flags,) = StageArgumentParser([RLTrainingArguments]).parse(words)
    args = training_flags.training_arguments()
    assert (args.gradient_checkpointing, args.gradient_checkpointing_kwargs) == (True, {"use_reentrant": True})
    assert (args.lr_scheduler_type, args.adam_beta2, args.get_warmup_steps(20)) == ("cosine", 0.9, 2)
    assert (args.optim, args.adam_epsilon, args.eval_steps) == ("adafactor", 1e-5, 3)


def test_what_other_stages_are_told_is_noted(monkeypatch):
    monkeypatch.setenv("TORCH_COMPILE", "1")
    parser = StageArgumentParser([RLTrainingArguments])
    flags = "--fp16 False --logging_strategy steps --ddp_find_unused_parameters False --remove_unused_columns False"
    parser.parse(["--output_dir", "out", "--do_train", *flags.split()])
    assert "TORCH_COMPILE=1 in the environment: this stage does not compile" in parser.notes
    assert [note for note in parser.notes if note.endswith("always so in this stage")] == [
        f"{flag} {value}: always so in this stage" for flag, value in zip(*[iter(flags.split())] * 2, strict=True)
    ]


def test_docs_name_places_that_exist():
    table = (ROOT / "docs/ppo.md").read_text(encoding="utf-8").partition("## Implementation details")[2]
    places = re.findall(r"^\| .*? \| (`.*?) \|", table.partition("## Flags")[0], re.MULTILINE)
    files = [
        ROOT / "ppo_training.py",
        ROOT / "medtune/models/logps.py",
        ROOT / "medtune/models/running_batch.py",
        *ROOT.glob("medtune/rl/*.py"),
    ]
    code = "".join(path.read_text(encoding="utf-8") for path in files)
    assert len(places) > 15
    for name in re.findall(r"`([\w.]+)`", " ".join(places)):
        assert re.search(rf"(def|class) {name.rpartition('.')[2]}\b|^    {name.rpartition('.')[2]}: ", code, re.M), name


@pytest.mark.parametrize("name", ["zero3", "zero3_offload"])
def test_zero_3_is_refused(tmp_path, name):
    with pytest.raises(UserError, match=r"^--deepspeed .*: .*ZeRO-3 would gather all weights for every token"):
        config = str(ROOT / f"ds_configs/{name}.json")
        RLTrainingArguments(output_dir=str(tmp_path), do_train=True, use_cpu=True, deepspeed=config)


def test_reward_model_without_a_trained_head_is_refused(flags, sft_adapter, rm_adapter, tiny_model_dir, tmp_path):
    with pytest.raises(UserError, match=r"^--reward_model_path .*: no reward model: a CAUSAL_LM adapter has no score"):
        ppo_training.main(flags(reward_model_path=sft_adapter))
    with pytest.raises(UserError, match=r"^--reward_model_path .*: no reward model: it has no score head"):
        ppo_training.main(flags(reward_model_path=tiny_model_dir))
    zeros = tmp_path / "zeros"
    zeros.mkdir()
    for file in rm_adapter.iterdir():
        (zeros / file.name).write_bytes(file.read_bytes())
    weights = weights_of(rm_adapter)
    save_file({n: t * 0 if "score" in n else t for n, t in weights.items()}, zeros / "adapter_model.safetensors")
    with pytest.raises(UserError, match=r"^--reward_model_path .*: its score head is all zeros"):
        ppo_training.main(flags(reward_model_path=zeros))


# ---------------------------------------------------------------- the guide


@pytest.mark.slow
def test_guide_command_as_it_stands(sft_adapter, rm_adapter, data_dir, tmp_path):
    """Flag for flag; only models, data, folders and the number of episodes are this machine's."""
    argv = [
        *GUIDE_PPO.replace("--model_name_or_path", "--sft_model_path").split(),
        *[
            "--max_source_length",
            "1024",
            "--response_length",
            "512",
            "--total_episodes",
            "10000",
            "--missing_eos_penalty",
            "1.0",
        ],
        *f"--sft_model_path {sft_adapter} --reward_model_path {rm_adapter} --response_length 16".split(),
        *f"--train_file_dir {data_dir} --validation_file_dir {data_dir} --total_episodes 16".split(),
        *f"--output_dir {tmp_path / 'out'} --cache_dir {tmp_path / 'cache'}".split(),
    ]
    finished = run_process("ppo_training.py", argv, CUDA_VISIBLE_DEVICES="0,1")
    assert finished.returncode == 0, finished.stderr[-3000:]
    log = finished.stderr
    results = {"curves.png", "eval_results.json", "train_results.json", "trainer_state.json"}
    assert names(tmp_path / "out") == {"checkpoint-2", "checkpoint-best", "runs"} | results
    assert "instead of --torch_dtype bfloat16, CUDA_VISIBLE_DEVICES=0,1" in log
    assert "--total_episodes 16 decides how long to train, whatever --num_train_epochs says" in log
    assert "= 8 episodes an update" in log
    assert "\r" not in log
    assert "Warning" not in log
