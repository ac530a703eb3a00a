"""The distillation stage: what an update does, whose replies it learns from, teachers, what a run leaves, errors."""

import json
import re
import shutil
import signal
from functools import partial
from pathlib import Path

import pytest
import stage_runs
import torch
from fake_vllm import FakeVllm
from stage_runs import ADAPTER_FILES, PARTS, history, names, short_rl_run, updates, weights_of, words, write_lines
from test_grpo_training import STATE_FILES, stop_after_two_updates
from transformers import AutoModelForCausalLM, AutoTokenizer

import distillation_training
from distillation_training import is_on_policy
from medtune.errors import UserError
from medtune.models.adapters import load_with_adapter
from medtune.models.lineage import read_lineage
from medtune.rl import alarms, teacher, vllm_servers
from medtune.rl.distillation_arguments import TeacherArguments
from medtune.rl.rollout import PolicyReplies

ROOT = Path(__file__).resolve().parents[1]
slow = partial(pytest.param, marks=pytest.mark.slow)


def write_dialogues(folder: Path, n_records: int = 24) -> Path:
    records = [
        {"question": f"第{n}个病人{PARTS[n % 8]}疼？", "answer": f"{PARTS[n % 8]}疼请就诊。"} for n in range(n_records)
    ]
    return write_lines(folder / "data/dialogues.jsonl", records).parent


def short_run(student: Path, taught_by: Path, folder: Path, **changes) -> list[str]:
    """Its flags; keywords replace or add some, None removes one."""
    own = {
        "sft_model_path": student,
        "teacher_model_path": taught_by,
        "train_file_dir": write_dialogues(folder),
    }
    return words(short_rl_run(folder, **own | changes))


@pytest.fixture
def flags(tiny_model_dir, adapter, tmp_path):
    """A function that gives a short run's flags: a base with an adapter teaches a new adapter on the same base."""
    return partial(short_run, tiny_model_dir, adapter, tmp_path)


@pytest.fixture
def learned_from(monkeypatch) -> list[PolicyReplies]:
    """The replies of each update."""
    kept = []
    update = distillation_training.distillation_update

    def keep(run, its_teacher, replies, args):
        kept.append(replies)
        return update(run, its_teacher, replies, args)

    monkeypatch.setattr(distillation_training, "distillation_update", keep)
    return kept


@torch.no_grad()
def own_logps(model: torch.nn.Module, replies: PolicyReplies) -> list[torch.Tensor]:
    """Log-probs of each reply's tokens by a model's own forward pass over the text alone."""
    found = []
    for ids, is_token, mask in zip(replies.ids, replies.attention_mask, replies.mask, strict=True):
        text = ids[is_token][None]
        logps = model(input_ids=text).logits[:, :-1].log_softmax(dim=-1).gather(2, text[:, 1:, None])
        found.append(logps[0, -int(mask.sum()) :, 0])
    return found


# ---------------------------------------------------------------- what an update does


def test_rewards_are_the_teachers_log_probs_less_the_students(flags, tmp_path, tiny_model_dir, adapter, learned_from):
    distillation_training.main(flags(max_steps=1))
    (replies,) = learned_from
    student = AutoModelForCausalLM.from_pretrained(tiny_model_dir).eval()
    its_teacher = load_with_adapter(str(tiny_model_dir), str(adapter)).eval()
    ours, theirs = own_logps(student, replies), own_logps(its_teacher, replies)
    for found, expected in ((replies.policy_logps, ours), (replies.ref_logps, theirs)):
        torch.testing.assert_close(found[replies.mask], torch.cat(expected), atol=1e-4, rtol=0)
    (first,) = history(tmp_path / "out")
    kl = (torch.cat(ours) - torch.cat(theirs)).mean().item()
    assert first["teacher/kl"] == pytest.approx(kl, abs=1e-4)
    assert first["policy/loss"] == pytest.approx(kl, abs=1e-4), "the ratio is 1"
    assert first["policy/approx_kl"] > 0, "of the student after the step"


@pytest.mark.parametrize("beta", [None, 0.5, slow(0), slow(1)])
def test_each_loss_brings_the_student_nearer_to_its_teacher(flags, tmp_path, monkeypatch, beta):
    monkeypatch.setattr(alarms, "UPDATES_WITHOUT_END", 100)  # the base has never learned to end
    evaluated = {"validation_file_dir": tmp_path / "data", "max_eval_samples": 8, "do_eval": True}
    size = {"per_device_train_batch_size": 16, "gradient_accumulation_steps": 1}
    rate = {"learning_rate": 3e-3, "lr_scheduler_type": "constant"}
    metrics = distillation_training.main(flags(beta=beta, max_steps=8, **size, **rate, **evaluated))
    before, after = updates(tmp_path / "out", "eval_teacher_kl")
    assert 0 < after < 0.6 * before
    assert metrics["eval_teacher_kl"] == after, "the lowest is the best"


def test_a_teacher_that_is_the_student_teaches_nothing(flags, tmp_path, tiny_model_dir):
    distillation_training.main(flags(teacher_model_path=tiny_model_dir, max_steps=1, padding_free=False))
    (first,) = history(tmp_path / "out")
    assert first["teacher/kl"] == pytest.approx(0, abs=1e-6)
    moved = [
        name
        for name, tensor in weights_of(tmp_path / "out/checkpoint-best").items()
        if "lora_B" in name and tensor.any()
    ]
    assert not moved or first["policy/grad_norm"] < 1e-5


def test_checkpointing_and_micro_batches_change_nothing(flags, tmp_path):
    runs = {
        "whole": {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1},
        "parts": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "rollout_batch_size": 3},
        "checkpointed": {"gradient_checkpointing": True},
    }
    for name, changes in runs.items():
        distillation_training.main(flags(output_dir=tmp_path / name, max_steps=1, beta=0.5, **changes))
    (whole,) = history(tmp_path / "whole")
    for name in ("parts", "checkpointed"):
        (found,) = history(tmp_path / name)
        for figure in ("teacher/kl", "policy/loss", "policy/grad_norm", "objective/entropy"):
            assert found[figure] == pytest.approx(whole[figure], abs=2e-4), (name, figure)


# ---------------------------------------------------------------- whose replies


def test_the_share_is_exact_and_in_turns():
    for share, n_own in ((1, 20), (0, 0), (0.5, 10), (0.25, 5), (0.7, 14)):
        assert sum(is_on_policy(update, share) for update in range(20)) == n_own
    assert [is_on_policy(update, 0.25) for update in range(8)] == [False, False, False, True] * 2


def test_the_other_updates_learn_from_the_datas_replies(flags, tmp_path, learned_from, tiny_tokenizer):
    """As SFT learns them, with the end token; a longer one is cut as the student's own are."""
    data = write_lines(
        tmp_path / "mixed/dialogues.jsonl",
        [{"question": "头疼？", "answer": "就诊"}, {"question": "胃疼？", "answer": "请马上去医院就诊" * 4}],
    )
    distillation_training.main(
        flags(train_file_dir=data, beta=0.5, on_policy_share=0.5, max_steps=2, gradient_accumulation_steps=1)
    )
    of_data, of_student = learned_from
    short = [*tiny_tokenizer.encode("就诊"), tiny_tokenizer.convert_tokens_to_ids("<|im_end|>")]
    cut = tiny_tokenizer.encode("请马上去医院就诊" * 4)[:12]
    assert sorted(of_data.reply_ids()) == sorted([short, cut] * 2)
    assert of_data.ended.tolist().count(True) == 2
    assert not {tuple(ids) for ids in of_student.reply_ids()} & {tuple(short), tuple(cut)}
    first, second = history(tmp_path / "out")
    assert "reply/mean_len" in second
    assert "reply/mean_len" not in first, "of the data's replies nothing is said of the student"


# ---------------------------------------------------------------- teachers


def test_a_server_teaches_as_the_model_does(flags, tmp_path, tiny_model_dir, adapter):
    """The base teaches an adapter on it."""
    evaluated = {"validation_file_dir": tmp_path / "data", "max_eval_samples": 4, "do_eval": True, "max_steps": 1}
    models = {"sft_model_path": adapter, "teacher_model_path": tiny_model_dir, "max_source_length": 100}
    distillation_training.main(flags(output_dir=tmp_path / "here", **models, **evaluated))
    with FakeVllm(tiny_model_dir) as server:
        distillation_training.main(flags(teacher_url=server.url, output_dir=tmp_path / "there", **models, **evaluated))
        server.max_model_len = 64
        with pytest.raises(
            UserError, match=r"^--teacher_url \S+: the server's context is 64 tokens, .* ask for 113; start"
        ):
            distillation_training.main(flags(teacher_url=server.url, output_dir=tmp_path / "short", **models))
    (_, here, _), (_, there, _) = history(tmp_path / "here"), history(tmp_path / "there")
    for figure in ("teacher/kl", "policy/loss", "policy/grad_norm", "policy/approx_kl"):
        assert there[figure] == pytest.approx(here[figure], abs=1e-4), figure
    exact, sampled = (updates(tmp_path / name, "eval_teacher_kl")[0] for name in ("here", "there"))
    assert sampled == pytest.approx(exact, abs=max(0.5 * exact, 0.1)), "an estimate from 4 replies"


def test_a_server_that_dies_costs_nothing(flags, tmp_path, tiny_model_dir, adapter, monkeypatch):
    update = distillation_training.distillation_update
    with FakeVllm(tiny_model_dir) as server:

        def die_after(*args):
            server.faults = {"dies"}
            return update(*args)

        monkeypatch.setattr(distillation_training, "distillation_update", die_after)
        models = {"sft_model_path": adapter, "teacher_model_path": tiny_model_dir, "teacher_url": server.url}
        models |= {"max_source_length": 100}
        with pytest.raises(
            UserError, match=r"^--teacher_url .*no answer .*; saved in \S+/checkpoint-1, and the same com"
        ):
            distillation_training.main(flags(**models))
        with pytest.raises(
            UserError, match=rf"^--teacher_url {server.url}: the server has the model \S+; start it with"
        ):
            server.faults = {"another_root"}
            distillation_training.main(flags(output_dir=tmp_path / "other", **models))


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("html_replies", "an answer without prompt_logprobs of these ids \\(<html>"),
        ("hangs_at_once", "no answer from a server there \\(timed out\\)"),
    ],
)
def test_a_server_is_tried_before_the_students_weights_load(
    flags, tmp_path, tiny_model_dir, adapter, monkeypatch, fault, message
):
    monkeypatch.setattr(distillation_training, "load_roles", lambda *_, **__: pytest.fail("the student was loaded"))
    monkeypatch.setattr(vllm_servers, "SECONDS_FOR_ITS_NAME", 0.5)
    with FakeVllm(tiny_model_dir) as server:
        server.faults = {fault}
        models = {"sft_model_path": adapter, "teacher_model_path": tiny_model_dir, "teacher_url": server.url}
        with pytest.raises(UserError, match=rf"^--teacher_url {server.url}: {message}"):
            distillation_training.main(flags(**models, max_source_length=100))


def other_tokenizer(source: Path, folder: Path) -> Path:
    """A copy of a model in whose vocabulary two words have changed places."""
    shutil.copytree(source, folder)
    file = folder / "tokenizer.json"
    values = json.loads(file.read_text(encoding="utf-8"))
    vocabulary = values["model"]["vocab"]
    first, second = sorted(vocabulary)[300:302]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    file.write_text(json.dumps(values), encoding="utf-8")
    return folder


def test_a_teacher_of_another_tokenizer_is_refused_before_weights_load(flags, tmp_path, tiny_model_dir, monkeypatch):
    monkeypatch.setattr(teacher, "load_base_model", None)
    monkeypatch.setattr(distillation_training, "load_roles", None)
    other = other_tokenizer(tiny_model_dir, tmp_path / "other")
    message = rf"^--teacher_model_path {other}: its tokenizer is not the student's: 2 of \d+ tokens have another id"
    with pytest.raises(UserError, match=message) as raised:
        distillation_training.main(flags(teacher_model_path=other))
    assert "\n" not in str(raised.value)


def test_a_teacher_with_more_tokens_than_the_student_is_welcome(flags, tmp_path, tiny_model_dir):
    """As those of a later generation of a family."""
    folder = tmp_path / "later"
    shutil.copytree(tiny_model_dir, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<later>"])
    tokenizer.save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.resize_token_embeddings(model.config.vocab_size + 8)
    model.save_pretrained(folder)
    distillation_training.main(flags(teacher_model_path=folder, max_steps=1, beta=0.5))
    (first,) = history(tmp_path / "out")
    assert first["teacher/kl"] > 0


@pytest.mark.slow
def test_a_quantized_teacher(flags, tmp_path, tiny_model_dir, monkeypatch):
    loaded = []
    load = distillation_training.load_teacher

    def keep(*args, **options):
        loaded.append(load(*args, **options))
        return loaded[0]

    monkeypatch.setattr(distillation_training, "load_teacher", keep)
    distillation_training.main(flags(teacher_bits=4, max_steps=1))
    assert "Linear4bit" in {type(module).__name__ for module in loaded[0].model.modules()}
    assert loaded[0].description.endswith("4 bit, on cpu")
    assert not any(weights.requires_grad for weights in loaded[0].model.parameters())


@pytest.mark.parametrize(
    ("named", "n_processes", "expected"),
    [
        (None, 1, "cpu"),
        ("meta", 1, "^--teacher_device meta: no device of a teacher; give one such as cuda:1, or cpu"),
        ("cuda:1", 1, "cuda:1"),
        ("cuda:2", 2, "cuda:3"),
        ("cpu", 2, "cpu"),
        ("cuda:3", 2, r"^--teacher_device cuda:3: 2 process\(es\) have teachers up to cuda:4, and there are 4"),
        ("gpu1", 1, r"^--teacher_device gpu1: no device; give one such as cuda:1"),
    ],
)
def test_the_teachers_device(monkeypatch, named, n_processes, expected):
    """Of the last of these processes, on a machine with four GPUs."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(n_processes))
    monkeypatch.setenv("LOCAL_RANK", str(n_processes - 1))
    args = TeacherArguments(teacher_model_path="m", teacher_device=named)
    if expected.startswith("^"):
        with pytest.raises(UserError, match=expected):
            teacher.choose_device(args, torch.device("cpu"))
    else:
        assert str(teacher.choose_device(args, torch.device("cpu"))) == expected


# ---------------------------------------------------------------- several processes, resume


@pytest.mark.slow
@pytest.mark.parametrize("config", [None, "zero2"])
@pytest.mark.parametrize("beta", [None, 0.5])
def test_two_processes_and_zero_give_the_first_update_of_one(flags, tmp_path, config, beta):
    evaluated = {"validation_file_dir": tmp_path / "data", "max_eval_samples": 3, "do_eval": True, "max_steps": 1}
    distillation_training.main(flags(output_dir=tmp_path / "one", beta=beta, **evaluated))
    config = config and ROOT / f"ds_configs/{config}.json"
    two = flags(gradient_accumulation_steps=1, deepspeed=config, beta=beta, **evaluated)
    stage_runs.train_in("distillation", 2, tmp_path, two)
    for one, other in zip(history(tmp_path / "one"), history(tmp_path / "out"), strict=True):
        for figure in ("eval_teacher_kl", "eval_mean_len", "teacher/kl", "policy/loss", "policy/grad_norm"):
            assert other.get(figure) == pytest.approx(one.get(figure), abs=1e-4), figure
    weights, others = (weights_of(tmp_path / name / "checkpoint-1") for name in ("one", "out"))
    for name, tensor in weights.items():
        torch.testing.assert_close(others[name], tensor, atol=1e-4, rtol=0)


def test_resumed_run_is_the_uninterrupted_one(flags, tmp_path, monkeypatch):
    settings = {"max_steps": 3, "beta": 0.5, "on_policy_share": 0.5}
    distillation_training.main(flags(output_dir=tmp_path / "whole", **settings))
    with monkeypatch.context() as patch:
        stop_after_two_updates(patch, signal.SIGTERM)
        with pytest.raises(SystemExit) as stopped:
            distillation_training.main(flags(output_dir=tmp_path / "parts", **settings))
    assert stopped.value.code == 128 + signal.SIGTERM
    assert names(tmp_path / "parts") == {"checkpoint-2"}
    distillation_training.main(flags(output_dir=tmp_path / "parts", resume_from_checkpoint=True, **settings))
    for name in ("teacher/kl", "policy/loss", "policy/approx_kl", "learning_rate"):
        assert updates(tmp_path / "parts", name) == updates(tmp_path / "whole", name), name
    ours, theirs = (weights_of(tmp_path / name / "checkpoint-3") for name in ("parts", "whole"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


# ---------------------------------------------------------------- what a run leaves


def test_files_measures_and_lineage(flags, tmp_path, tiny_model_dir, adapter, capfd):
    evaluated = {"validation_file_dir": tmp_path / "data", "max_eval_samples": 3, "eval_strategy": "steps"}
    kept = {"eval_steps": 1, "save_steps": 1, "save_total_limit": 1}
    metrics = distillation_training.main(flags(**evaluated, **kept))
    out = tmp_path / "out"
    results = {"curves.png", "eval_results.json", "train_results.json", "trainer_state.json"}
    assert names(out) == {"checkpoint-2", "checkpoint-best"} | results
    assert names(out / "checkpoint-best") == ADAPTER_FILES
    assert names(out / "checkpoint-2") == ADAPTER_FILES | STATE_FILES
    log = capfd.readouterr().err
    assert len(re.findall(r"update \d/2  teacher kl ", log)) == 2
    assert len(re.findall(r"update \d  evaluation: teacher_kl ", log)) == 3
    entries = [entry for entry in history(out) if "eval_teacher_kl" in entry]
    best = min(entries, key=lambda entry: entry["eval_teacher_kl"])
    assert metrics == json.loads((out / "eval_results.json").read_text()) == best
    lineage = read_lineage(out / "checkpoint-best")
    assert (lineage.base_model, lineage.parent, lineage.stage) == (str(tiny_model_dir), None, "distillation")
    assert lineage.flags["--teacher_model_path"] == str(adapter)

    assert distillation_training.main(flags(**evaluated, **kept, resume_from_checkpoint=True)) == {}
    with pytest.raises(UserError, match=r"^--beta 0\.5: the run in .* was started with None, .*; leave it as"):
        distillation_training.main(flags(**evaluated, **kept, resume_from_checkpoint=True, beta=0.5))


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teacher_model_path": None}, r"^the following arguments are required: --teacher_model_path"),
        ({"teacher_model_path": "./nowhere"}, r"^--teacher_model_path \./nowhere: no such folder"),
        ({"use_peft": False}, r"^--use_peft False: the roles are adapters on one base"),
        ({"beta": 1.5}, r"^--beta 1\.5: give a number from 0 to 1"),
        ({"on_policy_share": -0.5, "beta": 0}, r"^--on_policy_share -0\.5: give a number from 0 to 1"),
        (
            {"on_policy_share": 0.5},
            r"^--on_policy_share 0\.5: the reward is an estimate from tokens that the student drew",
        ),
        ({"teacher_bits": 2}, r"^--teacher_bits: invalid choice: '?2'? \(choose from"),
        ({"teacher_url": "127.0.0.1:8002"}, r"^--teacher_url 127\.0\.0\.1:8002: no address of a server"),
        (
            {"teacher_url": "http://127.0.0.1:1", "beta": 0.5},
            r"^--beta 0\.5: it compares whole distributions, and --teach",
        ),
        (
            {"teacher_url": "http://127.0.0.1:1", "temperature": 0.7},
            r"^--temperature 0\.7: the log-probs of --teacher_url",
        ),
        (
            {"teacher_url": "http://127.0.0.1:1", "teacher_bits": 4},
            r"^--teacher_bits 4: the teacher of --teacher_url is not",
        ),
        (
            {"teacher_url": "http://127.0.0.1:1"},
            r"^--teacher_model_path \S+: an adapter; a server of --teacher_url has it",
        ),
        (
            {"max_source_length": 10**6},
            r"^--teacher_model_path \S+: its context is \d+ tokens, and prompts and replies have",
        ),
        ({"rewards": "exam"}, r"^--rewards is no"),
    ],
    ids=str,
)
def test_errors_in_one_line(flags, changes, message):
    with pytest.raises(UserError, match=message) as raised:
        distillation_training.main(flags(**changes))
    assert "\n" not in str(raised.value)


def test_prompts_without_replies_are_refused_where_those_are_learned(flags, tmp_path):
    data = write_lines(
        tmp_path / "asked/asked.jsonl", [{"conversations": [{"from": "human", "value": "头疼怎么办？"}]}]
    )
    with pytest.raises(UserError, match=r"asked\.jsonl:1: no reply: a dialogue that ends"):
        distillation_training.main(flags(train_file_dir=data, beta=0.5, on_policy_share=0.5))


def test_a_reward_model_is_no_teacher(flags, reward_adapter):
    with pytest.raises(UserError, match=r"^--teacher_model_path \S+: a reward model, which scores replies"):
        distillation_training.main(flags(teacher_model_path=reward_adapter))
