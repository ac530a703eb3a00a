"""Start vLLM servers for a training of PPO or GRPO, wait until they answer, train, and end them with it.

VLLM_GPUS of the visible GPUs have a server each; training has the others, or shares them where there are no others.
VLLM_MEMORY is the share of its GPU that a server takes, VLLM_PYTHON the python of vLLM's environment, VLLM_PORT the
first port, VLLM_FLAGS more flags for vLLM. The logs are logs/vllm-PORT.log.

    VLLM_GPUS=1 python -m medtune.launch ppo_training.py --sft_model_path ...
"""

import argparse
import ctypes
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import medtune.libraries  # noqa: F401 - first: it imports the libraries in half of their time

# isort: split
from medtune.devices import are_hidden, visible_gpus
from medtune.errors import PR_SET_PDEATHSIG, UserError, run_script
from medtune.launch import is_one_of_several_nodes
from medtune.models.adapters import DEFAULT_LORA_RANK
from medtune.models.lineage import base_of, is_adapter, read_adapter_config
from medtune.rl.arguments import RolloutArguments

# Ranks that vLLM 0.32 can be started for.
MAX_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
SECONDS_TO_START = 1800  # a large model from a slow disk
SECONDS_TO_END = 30
MEMORY_ALONE, MEMORY_SHARED = "0.9", "0.4"
# For vLLM 0.32's build for CPUs: compiled it gives other tokens, and a seeded request whose prompt it reads in parts
# ends it, "CPU Generator does not use offset".
CPU_FLAGS = ("--enforce-eager", "--max-num-batched-tokens", "16384")

# ---------------------------------------------------------------- what to start


@dataclass
class Plan:
    """Which GPUs servers and training have, None where all have what there is; and the share that a server takes."""

    of_servers: list[str | None]
    of_training: str | None
    memory: str


def share_gpus(n_servers: int, gpus: Sequence[str], memory: str = "") -> Plan:
    """The last GPUs for the servers, the others for training; all for both where none would be left."""
    if not gpus:  # vLLM's build for CPUs
        return Plan([None] * n_servers, None, memory or MEMORY_SHARED)
    if n_servers > len(gpus):
        raise UserError(f"VLLM_GPUS={n_servers}: there are {len(gpus)} GPU(s) that CUDA_VISIBLE_DEVICES shows")
    of_servers, others = list(gpus[-n_servers:]), gpus[:-n_servers]
    default = MEMORY_ALONE if others else MEMORY_SHARED
    return Plan(of_servers, ",".join(others or gpus), memory or default)


def server_command(python: str, port: int, memory: str, flags: argparse.Namespace) -> list[str]:
    """vLLM's command for the policy of these flags."""
    sft, rank = flags.sft_model_path, flags.lora_rank
    if is_adapter(sft):
        config = read_adapter_config(sft, "--sft_model_path")
        rank = max(config.r, *config.rank_pattern.values()) if config.rank_pattern else config.r
    max_rank = next((size for size in MAX_RANKS if size >= rank), MAX_RANKS[-1])
    return [
        *(python, "-m", "vllm.entrypoints.openai.api_server", "--model", base_of(sft)),
        *("--host", "127.0.0.1", "--port", str(port)),  # it opens the files that it is told of: for this machine only
        *("--dtype", flags.torch_dtype, "--max-model-len", str(flags.max_source_length + flags.response_length)),
        *("--gpu-memory-utilization", memory),
        *("--enable-lora", "--max-loras", "1", "--max-cpu-loras", "2", "--max-lora-rank", str(max_rank)),
        *("--logprobs-mode", "processed_logprobs", "--generation-config", "vllm", "--disable-uvicorn-access-log"),
        *(("--download-dir", flags.cache_dir) if flags.cache_dir else ()),
        *(("--trust-remote-code",) if flags.trust_remote_code.lower() == "true" else ()),
    ]


def read_server_flags(words: Sequence[str]) -> argparse.Namespace:
    """Of a stage's flags, those that a server depends on."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--sft_model_path", "--sft-model-path")
    parser.add_argument("--lora_rank", "--lora-rank", type=int, default=DEFAULT_LORA_RANK)
    parser.add_argument("--torch_dtype", "--torch-dtype", default="auto")
    parser.add_argument("--cache_dir", "--cache-dir")
    parser.add_argument("--trust_remote_code", "--trust-remote-code", nargs="?", const="True", default="False")
    parser.add_argument("--vllm_url", "--vllm-url")
    for name in ("max_source_length", "response_length"):
        default = getattr(RolloutArguments, name)
        parser.add_argument(f"--{name}", f"--{name.replace('_', '-')}", type=int, default=default)
    flags = parser.parse_known_args(words)[0]
    if not flags.sft_model_path:
        raise UserError("--sft_model_path is missing: VLLM_GPUS starts vLLM on the base of that model")
    if flags.vllm_url:
        raise UserError(f"--vllm_url {flags.vllm_url}: VLLM_GPUS starts servers of its own; leave one of them out")
    return flags


def find_python(environment: Mapping[str, str]) -> str:
    """The python of vLLM's environment; raises UserError where it has no vLLM."""
    own = ".venv-serve/bin/python"
    python = environment.get("VLLM_PYTHON") or (own if Path(own).is_file() else sys.executable)
    find = [python, "-c", "import importlib.util, sys; sys.exit(importlib.util.find_spec('vllm') is None)"]
    with suppress(OSError):
        if subprocess.run(find, check=False).returncode == 0:
            return python
    raise UserError(
        f"VLLM_GPUS: {python} has no vLLM; requirements/serve.txt says how to install it, VLLM_PYTHON names its python"
    )


# ---------------------------------------------------------------- servers


def start_server(command: Sequence[str], gpu: str | None, log: Path) -> subprocess.Popen:
    """A server that a signal to the terminal's processes does not reach, and that ends with this process."""
    environment = os.environ | {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True"}
    if gpu is not None:
        environment["CUDA_VISIBLE_DEVICES"] = gpu
    end_with_parent = partial(ctypes.CDLL(None).prctl, PR_SET_PDEATHSIG, signal.SIGTERM)
    log.parent.mkdir(exist_ok=True)
    with log.open("w") as file:
        return subprocess.Popen(
            command, env=environment, stdout=file, stderr=file, start_new_session=True, preexec_fn=end_with_parent
        )


def wait_for(server: subprocess.Popen, url: str, log: Path) -> None:
    """Wait until it answers; raises UserError if it ends or does not."""
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    for _ in range(SECONDS_TO_START):
        if (code := server.poll()) is not None:
            raise UserError(f"vLLM ended with {code} before it answered: {log} says why")
        with suppress(OSError), direct.open(f"{url}/health", timeout=10):
            return
        time.sleep(1)
    raise UserError(f"vLLM did not answer within {SECONDS_TO_START} s: {log} says what it does")


def end_servers(servers: Sequence[subprocess.Popen]) -> None:
    """With the processes that they started."""
    for server in servers:
        with suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGTERM)
    for server in servers:
        with suppress(subprocess.TimeoutExpired):
            server.wait(SECONDS_TO_END)
        with suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)


# ---------------------------------------------------------------- main


def refuse_several_nodes(environment: Mapping[str, str]) -> None:
    if is_one_of_several_nodes(environment):
        raise UserError(
            "VLLM_GPUS with NNODES: the adapter goes to the servers of one machine; train on one, or without"
        )


def check_ports(ports: Sequence[int]) -> None:
    for port in ports:
        with socket.socket() as free:
            free.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                free.bind(("127.0.0.1", port))
            except OSError as error:
                raise UserError(f"VLLM_PORT: {port} cannot be listened on ({error.strerror}); give another") from error


def count(environment: Mapping[str, str], name: str, default: str) -> int:
    """A variable that is a number above 0."""
    value = environment.get(name) or default
    if not value.isdecimal() or int(value) < 1:
        raise UserError(f"{name}={value}: give a number")
    return int(value)


def main(argv: Sequence[str] | None = None) -> None:
    words = list(sys.argv[1:] if argv is None else argv)
    refuse_several_nodes(os.environ)
    flags, python = read_server_flags(words), find_python(os.environ)
    gpus = [] if are_hidden() else visible_gpus()
    plan = share_gpus(count(os.environ, "VLLM_GPUS", "1"), gpus, os.environ.get("VLLM_MEMORY", ""))
    first = count(os.environ, "VLLM_PORT", "8001")
    ports = range(first, first + len(plan.of_servers))
    check_ports(ports)

    servers: list[subprocess.Popen] = []
    training: subprocess.Popen | None = None

    def hand_on(number: int, frame: object) -> None:
        if training is None:
            sys.exit(128 + number)
        training.send_signal(number)

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup
            signal.signal(number, hand_on)
    try:
        more = shlex.split(os.environ.get("VLLM_FLAGS", ""))
        logs = [Path(f"logs/vllm-{port}.log") for port in ports]
        for port, gpu, log in zip(ports, plan.of_servers, logs, strict=True):
            command = server_command(python, port, plan.memory, flags)
            servers.append(start_server([*command, *(() if gpu else CPU_FLAGS), *more], gpu, log))
        urls = [f"http://127.0.0.1:{port}" for port in ports]
        where = "the CPU" if plan.of_training is None else f"GPU {', '.join(plan.of_servers)}"
        shares = f"vLLM starts on {where}, training has {plan.of_training or 'the CPU'}"
        sys.stdout.write(f"{shares}; {', '.join(map(str, logs))}\n")
        sys.stdout.flush()
        for server, url, log in zip(servers, urls, logs, strict=True):
            wait_for(server, url, log)
        environment = {name: value for name, value in os.environ.items() if name != "VLLM_GPUS"}
        environment |= {"LAUNCHER_PID": str(os.getpid())}  # if this process is killed, training gets SIGTERM
        if plan.of_training is not None:
            environment["CUDA_VISIBLE_DEVICES"] = plan.of_training
        command = [sys.executable, "-m", "medtune.launch", *words, "--vllm_url", ",".join(urls)]
        training = subprocess.Popen(command, env=environment)
        code = training.wait()
    finally:
        end_servers(servers)
    sys.exit(code if code >= 0 else 128 - code)


if __name__ == "__main__":
    run_script(main)
