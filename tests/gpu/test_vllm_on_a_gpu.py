"""vLLM on a GPU: run_serve.sh serves what was trained, and its log-probs are those of the model itself."""

import json
import os
import socket
import urllib.request
from pathlib import Path

import pytest
import torch
from stage_runs import ROOT
from transformers import AutoModelForCausalLM

from medtune.errors import UserError
from medtune.rl.vllm_launch import end_servers, find_python, start_server, wait_for

PROMPT = [7, 8, 9, 10, 11, 12]


@pytest.fixture
def served(tiny_model_dir, tmp_path, monkeypatch):
    """The address of run_serve.sh with vLLM and the tiny model."""
    try:
        python = Path(find_python(os.environ)).absolute()
    except UserError:
        pytest.skip("vLLM is not installed: requirements/serve.txt")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for name, value in {"MODEL": tiny_model_dir, "PORT": port, "GPU_MEMORY": "0.3", "MAX_LENGTH": 512}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("VLLM_PYTHON", str(python))
    log = tmp_path / "vllm.log"
    server = start_server(["bash", str(ROOT / "run_serve.sh")], None, log)
    url = f"http://127.0.0.1:{port}"
    try:
        wait_for(server, url, log)
        yield url
    finally:
        end_servers([server])


def ask(url: str, **body) -> dict:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as answer:
        return json.load(answer)


def test_its_log_probs_are_the_model_s_own(served, tiny_model_dir):
    with urllib.request.urlopen(f"{served}/v1/models", timeout=60) as models:
        name = json.load(models)["data"][0]["id"]
    body = {"model": name, "prompt": PROMPT, "max_tokens": 8, "temperature": 0, "ignore_eos": True, "logprobs": 1}
    choice = ask(f"{served}/v1/completions", **body, return_token_ids=True)["choices"][0]
    reply, logps = choice["token_ids"], choice["logprobs"]["token_logprobs"]
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.bfloat16).to("cuda").eval()
    with torch.no_grad():
        logits = model(torch.tensor([PROMPT + reply]).cuda()).logits[0, len(PROMPT) - 1 : -1].float()
    own = logits.log_softmax(-1)[range(8), reply].tolist()
    assert logps == pytest.approx(own, abs=0.1)


def test_it_chats(served):
    with urllib.request.urlopen(f"{served}/v1/models", timeout=60) as models:
        name = json.load(models)["data"][0]["id"]
    messages = [{"role": "user", "content": "感冒了怎么办？"}]
    answer = ask(f"{served}/v1/chat/completions", model=name, messages=messages, max_tokens=8)
    assert answer["usage"]["completion_tokens"] <= 8
    assert isinstance(answer["choices"][0]["message"]["content"], str)
