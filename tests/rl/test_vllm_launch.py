"""Servers that are started for a training: which GPUs and flags they get, and that they end with it."""

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from random_adapters import random_adapter

from medtune.errors import UserError
from medtune.rl.vllm_launch import Plan, main, read_server_flags, server_command, share_gpus

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("n_servers", "gpus", "plan"),
    [
        (1, "01", Plan(["1"], "0", "0.9")),
        (2, "4567", Plan(["6", "7"], "4,5", "0.9")),
        (1, "3", Plan(["3"], "3", "0.4")),
        (2, "01", Plan(["0", "1"], "0,1", "0.4")),
        (2, "", Plan([None, None], None, "0.4")),
    ],
)
def test_servers_get_the_last_gpus_and_training_the_others(n_servers, gpus, plan):
    assert share_gpus(n_servers, list(gpus)) == plan
    assert share_gpus(n_servers, list(gpus), "0.5").memory == "0.5"


def test_more_servers_than_gpus_are_refused():
    with pytest.raises(UserError, match=r"VLLM_GPUS=3: there are 2 GPU\(s\)"):
        share_gpus(3, ["0", "1"])


def test_the_command_is_that_of_the_docs():
    """For the flags of its example."""
    text = (ROOT / "docs/vllm.md").read_text(encoding="utf-8")
    (block,) = [block for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL) if "--enable-lora" in block]
    words = shlex.split(block.partition("\nCUDA_VISIBLE_DEVICES=0")[0].replace("\\\n", ""))
    assert words[0] == "VLLM_ALLOW_RUNTIME_LORA_UPDATING=True"
    flags = "--sft_model_path Qwen/Qwen2.5-3B-Instruct --torch_dtype bfloat16 --response_length 1024"
    assert words[2:] == server_command(words[2], 8001, "0.9", read_server_flags(flags.split()))


@pytest.mark.parametrize(
    ("lora", "max_rank"), [({"r": 4}, "8"), ({"r": 24}, "32"), ({"r": 4, "use_rslora": True}, "8")]
)
def test_an_adapter_gives_its_base_and_rank(tiny_model_dir, tmp_path, lora, max_rank):
    adapter = random_adapter(tiny_model_dir, tmp_path / "adapter", **lora)
    command = server_command("python", 1, "0.9", read_server_flags(["--sft_model_path", str(adapter)]))
    assert command[command.index("--model") + 1] == str(tiny_model_dir)
    assert command[command.index("--max-lora-rank") + 1] == max_rank


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--do_train", "--sft_model_path is missing"),
        ("--sft_model_path m --vllm_url http://h", "--vllm_url http://h: "),
    ],
)
def test_flags_that_contradict_it_are_refused(words, message):
    with pytest.raises(UserError, match=message):
        read_server_flags(words.split())


# ---------------------------------------------------------------- from start to end

# Instead of vLLM's python: says that vLLM is there, and answers on the port that it gets.
VLLM = f"""#!{sys.executable}
import http.server, json, os, pathlib, sys
if sys.argv[1] == "-c":
    sys.exit(0)
if os.environ.get("FAILS"):
    sys.exit(3)
port = int(sys.argv[sys.argv.index("--port") + 1])
seen = {{"argv": sys.argv, "gpu": os.environ.get("CUDA_VISIBLE_DEVICES"), "pid": os.getpid()}}
seen["updating"] = os.environ["VLLM_ALLOW_RUNTIME_LORA_UPDATING"]
pathlib.Path(f"server-{{port}}").write_text(json.dumps(seen))
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == "/health" else 404)
        self.end_headers()
http.server.HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""
# Instead of a stage: writes down how it was called, and ends as it is told.
STAGE = """
import json, os, pathlib, signal, sys, time
def save(number, frame):
    sys.exit(128 + number)
signal.signal(signal.SIGTERM, save)
names = ("CUDA_VISIBLE_DEVICES", "VLLM_GPUS")
seen = {"argv": sys.argv[1:], "environment": {name: os.environ.get(name) for name in names}}
pathlib.Path("stage.part").write_text(json.dumps(seen))
os.rename("stage.part", "stage")
time.sleep(float(os.environ["SECONDS"]))
sys.exit(int(os.environ["CODE"]))
"""


def free_port() -> int:
    """The first of two that are free."""
    while True:
        with socket.create_server(("127.0.0.1", 0)) as first:
            port = first.getsockname()[1]
            try:
                with socket.create_server(("127.0.0.1", port + 1)):
                    return port
            except OSError:
                continue


WORDS = ["ppo_training.py", "--sft_model_path", "Qwen/Qwen2.5-3B"]


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A function that makes a machine of so many GPUs, with stand-ins for vLLM and a stage in the working folder."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}

    def machine(n_gpus: int = 0, seconds: float = 0, code: int = 0, **variables: str) -> None:
        listing = "".join(f"echo 'GPU {index}: a card'\n" for index in range(n_gpus))
        for name, text in {
            "vllm-python": VLLM,
            "ppo_training.py": STAGE,
            "nvidia-smi": f"#!/bin/sh\n{listing}",
        }.items():
            (tmp_path / name).write_text(text)
            (tmp_path / name).chmod(0o755)
        variables = {
            **{"PYTHONPATH": str(ROOT), "PATH": f"{tmp_path}:{os.environ['PATH']}"},
            **{"CUDA_VISIBLE_DEVICES": ",".join(map(str, range(n_gpus))), "SECONDS": str(seconds), "CODE": str(code)},
            **{"VLLM_GPUS": "1", "VLLM_PYTHON": str(tmp_path / "vllm-python"), "VLLM_PORT": str(free_port())},
        } | variables
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        monkeypatch.chdir(tmp_path)

    yield machine
    for number, handler in handlers.items():
        signal.signal(number, handler)


def calls(folder: Path) -> tuple[list[dict], dict]:
    """How the servers and the stage were called, the servers in the order of their ports."""
    servers = [json.loads(file.read_text()) for file in sorted(folder.glob("server-*"))]
    return servers, json.loads((folder / "stage").read_text())


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def ends(pid: int) -> bool:
    deadline = time.monotonic() + 60
    while is_running(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not is_running(pid)


@pytest.mark.parametrize(
    ("n_gpus", "variables", "of_servers", "of_training", "memory"),
    [
        (2, {}, ["1"], "0", "0.9"),
        (1, {"VLLM_MEMORY": "0.3"}, ["0"], "0", "0.3"),
        (0, {"VLLM_GPUS": "2"}, ["", ""], "", "0.4"),
    ],
)
def test_servers_run_while_the_stage_does(machine, tmp_path, capfd, n_gpus, variables, of_servers, of_training, memory):
    machine(n_gpus, code=7, VLLM_FLAGS="--dtype half", **variables)
    with pytest.raises(SystemExit) as ended:
        main(WORDS)
    assert ended.value.code == 7
    out = capfd.readouterr().out
    servers, stage = calls(tmp_path)
    assert [server["gpu"] for server in servers] == of_servers
    ports = []
    for server in servers:
        words = server["argv"]
        assert words[words.index("--host") + 1] == "127.0.0.1"
        assert words[words.index("--gpu-memory-utilization") + 1] == memory
        assert words[-2:] == ["--dtype", "half"]
        assert ("--enforce-eager" in words) == (n_gpus == 0)
        assert server["updating"] == "True"
        ports.append(words[words.index("--port") + 1])
        assert f"logs/vllm-{ports[-1]}.log" in out
        assert (tmp_path / f"logs/vllm-{ports[-1]}.log").is_file()
        assert ends(server["pid"])
    urls = ",".join(f"http://127.0.0.1:{port}" for port in ports)
    assert stage["argv"] == ["--sft_model_path", "Qwen/Qwen2.5-3B", "--vllm_url", urls]
    assert stage["environment"] == {"CUDA_VISIBLE_DEVICES": of_training, "VLLM_GPUS": None}


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGKILL, -signal.SIGKILL)])
def test_a_signal_ends_the_stage_and_then_the_servers(machine, tmp_path, number, code):
    machine(seconds=600)
    launcher = subprocess.Popen([sys.executable, "-m", "medtune.launch", *WORDS], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 300
    while not (tmp_path / "stage").is_file():
        assert launcher.poll() is None, launcher.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    ((server,), _) = calls(tmp_path)
    launcher.send_signal(number)
    assert launcher.wait(120) == code
    assert ends(server["pid"])


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"FAILS": "1"}, r"vLLM ended with 3 before it answered: logs/vllm-\d+.log says why"),
        ({"VLLM_PYTHON": "none"}, "VLLM_GPUS: none has no vLLM; requirements/serve.txt says"),
        ({"VLLM_GPUS": "two"}, "VLLM_GPUS=two: give a number"),
        ({"NNODES": "2"}, "VLLM_GPUS with NNODES: "),
    ],
)
def test_what_prevents_a_server_is_one_line(machine, tmp_path, variables, message):
    machine(**variables)
    with pytest.raises(UserError, match=message):
        main(WORDS)
    assert not (tmp_path / "stage").exists()


def test_a_port_in_use_is_refused(machine):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        machine(VLLM_PORT=str(port))
        with pytest.raises(UserError, match=f"VLLM_PORT: {port} cannot be listened on"):
            main(WORDS)
