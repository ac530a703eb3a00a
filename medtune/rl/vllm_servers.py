"""vLLM servers that write the policy's replies: checked before weights load, given its adapter anew, asked together.

A server holds the base model and takes LoRA adapters while it runs. docs/vllm.md has the command that starts one, and
says what of a run changes with it.
"""

import http.client
import json
import math
import os
import secrets
import shutil
import socket
import tempfile
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from itertools import cycle
from pathlib import Path
from typing import TypeVar
from urllib.parse import urlsplit

from accelerate.utils import gather_object
from peft import PeftModel
from transformers import TrainingArguments

from medtune.arguments import LoraArguments
from medtune.errors import UserError
from medtune.models.adapters import save_zero_adapter
from medtune.models.lineage import base_of, is_adapter, read_adapter_config
from medtune.models.running_batch import Row
from medtune.rl.arguments import RolloutArguments
from medtune.training.interruption import SignalListener
from medtune.training.processes import of_main_process

# Requests of a process at a time; a vLLM server runs as many sequences together by itself.
CONNECTIONS = 256
# That a server may take to say what it has: nobody waits for it in the middle of anything.
SECONDS_FOR_ITS_NAME = 30
HOW_TO_START = "docs/vllm.md has the command that starts a server"
Asked = TypeVar("Asked")


class ServerError(UserError):
    """A server failed in the middle of a run, which can go on from its last update once there is one again."""


# ---------------------------------------------------------------- one server


class VllmServer:
    """One server, asked by JSON over HTTP, past the proxies of the environment."""

    def __init__(self, url: str, seconds_to_answer: float, flag: str = "--vllm_url"):
        self.where = f"{flag} {url}"
        self.seconds_to_answer = seconds_to_answer
        parts = urlsplit(url)
        self.address = parts.hostname, parts.port or 80
        self.connections: set[http.client.HTTPConnection] = set()

    def ask(self, path: str, body: dict | None = None, seconds: float = math.inf) -> str:
        """What it answers to a GET, or to a POST with a body; raises ServerError where that is no success.

        seconds: to answer in, where that is less than for other requests.
        """
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get("VLLM_API_KEY"):
            headers["Authorization"] = f"Bearer {key}"
        connection = http.client.HTTPConnection(*self.address, timeout=min(seconds, self.seconds_to_answer))
        self.connections.add(connection)
        try:
            connection.request("POST" if body else "GET", path, json.dumps(body) if body else None, headers)
            answer = connection.getresponse()
            text = answer.read().decode(errors="replace")
        except (OSError, http.client.HTTPException) as error:
            reason = one_short_line(str(error)) or type(error).__name__
            raise ServerError(f"{self.where}: no answer from a server there ({reason}); {HOW_TO_START}") from error
        finally:
            self.connections.discard(connection)
            connection.close()
        if answer.status != http.client.OK:
            raise ServerError(f"{self.where}: {path} is answered by {answer.status}: {error_message(text)}")
        return text

    def hang_up(self) -> None:
        """Break off the requests in progress, which end with a ServerError."""
        for connection in list(self.connections):
            with suppress(OSError, AttributeError):  # not connected yet, or not any more
                connection.sock.shutdown(socket.SHUT_RDWR)

    # ------------------------------------------------------------ adapters

    def load(self, name: str, folder: Path) -> None:
        self.ask("/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(folder.resolve())})

    def unload(self, name: str) -> None:
        self.ask("/v1/unload_lora_adapter", {"lora_name": name})

    # ------------------------------------------------------------ replies

    def complete(self, row: Row, model: str) -> None:
        """Write the reply to a row, with its tokens' log-probs, under the adapter of this name."""
        text = self.ask("/v1/completions", completion_request(row, model))
        try:
            (choice,) = json.loads(text)["choices"]
            prompt, ids, logps = choice["prompt_token_ids"], choice["token_ids"], choice["logprobs"]["token_logprobs"]
        except (ValueError, KeyError, TypeError) as error:
            raise ServerError(
                f"{self.where}: an answer without token_ids and logprobs ({one_short_line(text)}); {HOW_TO_START}"
            ) from error
        for token in ids:
            if row.finished:
                break
            row.append(token)
        if prompt != row.prompt or row.ids != ids or not row.finished or len(logps) != len(ids):
            raise ServerError(
                f"{self.where}: a reply is not what was asked for ({len(ids)} tokens, {choice.get('finish_reason')}, "
                f"of at most {row.decoding.max_new_tokens} up to the first end token): the server was stopped, or it "
                "generates in a way of its own"
            )
        row.logps = logps

    # ------------------------------------------------------------ log-probs

    def logps(self, ids: list[int], n_reply: int, model: str) -> list[float]:
        """Log-probs of the last ids, those of a reply, under the model of this name at temperature 1."""
        # A server generates at least one token, which nobody reads; 0 asks for the ids that are there alone.
        text = self.ask("/v1/completions", {"model": model, "prompt": ids, "max_tokens": 1, "prompt_logprobs": 0})
        try:
            (choice,) = json.loads(text)["choices"]
            of_reply = choice["prompt_logprobs"][len(ids) - n_reply :]
            return [entry[str(token)]["logprob"] for entry, token in zip(of_reply, ids[-n_reply:], strict=True)]
        except (ValueError, KeyError, TypeError) as error:
            raise ServerError(
                f"{self.where}: an answer without prompt_logprobs of these ids ({one_short_line(text)}); {HOW_TO_START}"
            ) from error


def completion_request(row: Row, model: str) -> dict:
    """The body that asks for a reply with our end tokens, drawn from the whole distribution."""
    return {
        "model": model,
        "prompt": row.prompt,
        "max_tokens": row.decoding.max_new_tokens,
        "temperature": row.decoding.temperature,
        # Each said, because a server may take others from generation_config.json.
        **{"top_p": 1.0, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0},
        **{"presence_penalty": 0.0, "frequency_penalty": 0.0},
        "seed": row.seed,
        # vLLM takes those of generation_config.json besides, unless it ignores the end token, which is among ours.
        **{"stop_token_ids": sorted(row.stop_ids), "ignore_eos": True},
        **{"return_token_ids": True, "logprobs": 0},  # those of the tokens themselves
    }


def error_message(text: str) -> str:
    """The message in an answer of OpenAI's form, or the start of any other answer, in one line."""
    with suppress(ValueError, KeyError, TypeError):
        return " ".join(str(json.loads(text)["error"]["message"]).split())[:300]
    return one_short_line(text)


def one_short_line(text: str) -> str:
    """The first 80 characters, without line breaks and what else cannot be printed."""
    return "".join(filter(str.isprintable, " ".join(text.split())))[:80]


# ---------------------------------------------------------------- all of them


class VllmServers:
    """The servers of a run; the processes ask each for their own prompts, and the first gives them the adapter."""

    def __init__(self, servers: Sequence[VllmServer], training_args: TrainingArguments):
        self.servers = servers
        self.is_main = training_args.process_index == 0
        # No other run's names, also none that a killed run has left there.
        self.run = of_main_process(f"policy-{secrets.token_hex(4)}", training_args)
        self.n_loaded = 0
        output_dir = Path(training_args.output_dir)
        output_dir.mkdir(parents=True, exist_ok=True)
        if self.is_main:
            self.folder = Path(tempfile.mkdtemp(prefix=".vllm-", dir=output_dir))
            weakref.finalize(self, shutil.rmtree, self.folder, ignore_errors=True)

    def load_policy(self, model: PeftModel) -> None:
        """Give each server the policy's adapter as it is, in place of the one before."""
        before, self.n_loaded = self.name, self.n_loaded + 1
        failure = None
        if self.is_main:
            model.save_pretrained(str(self.folder / self.name), selected_adapters=["default"])
            try:
                for server in self.servers:
                    server.load(self.name, self.folder / self.name)
                    if self.n_loaded > 1:
                        server.unload(before)
            except ServerError as error:
                failure = str(error)
            shutil.rmtree(self.folder / before, ignore_errors=True)
        raise_in_all(failure)

    def describe(self, cap: float) -> str:
        weights = f"tokens weighted by ratios of up to {cap:g}" if cap else "no weights"
        urls = ", ".join(server.where.removeprefix("--vllm_url ") for server in self.servers)
        return (
            f"by vLLM at {urls}, seeded by episode, {weights}; as it rounds otherwise in other batches, a run that is "
            "repeated or resumed is not bitwise the same"
        )

    @property
    def name(self) -> str:
        """Of the adapter that was loaded last."""
        return f"{self.run}-{self.n_loaded}"

    def complete(self, rows: Sequence[Row], stop: SignalListener) -> str | None:
        """Write the replies to the rows, all at once; what failed in this process, None if all are written.

        A signal to this process breaks them off.
        """
        return ask_together(self.servers, rows, lambda server, row: server.complete(row, self.name), stop)


def ask_together(
    servers: Sequence[VllmServer],
    requests: Sequence[Asked],
    ask: Callable[[VllmServer, Asked], None],
    stop: SignalListener,
) -> str | None:
    """Make all requests at once, each of a server in its turn; what failed in this process, None if nothing did.

    A signal to this process breaks them off.
    """

    def failure_of(server: VllmServer, request: Asked) -> str | None:
        try:
            ask(server, request)
        except ServerError as error:
            return str(error)
        return None

    failure = None
    with ThreadPoolExecutor(min(len(requests), CONNECTIONS)) as pool:
        pending = {pool.submit(failure_of, *each) for each in zip(cycle(servers), requests, strict=False)}
        while pending:
            done, pending = wait(pending, timeout=1, return_when=FIRST_COMPLETED)
            failure = failure or next(filter(None, map(Future.result, done)), None)
            if failure or stop.received:
                pending = {future for future in pending if not future.cancel()}
                for server in servers:
                    server.hang_up()
    return failure


def raise_in_all(failure: str | None) -> None:
    """Raise ServerError in all processes, which all must ask, if something failed in one of them."""
    if failures := [failure for failure in gather_object([failure]) if failure]:
        raise ServerError(failures[0])


# ---------------------------------------------------------------- before weights load


def connect_servers(
    args: RolloutArguments,
    sft: str,
    lora: LoraArguments,
    stop_ids: Sequence[int],
    training_args: TrainingArguments,
    **hub_options,
) -> VllmServers | None:
    """The servers of --vllm_url, each of which can write this policy's replies; None without the flag.

    Args:
        sft: what --sft_model_path names.
        lora: of a policy that starts a new adapter.

    Raises UserError for an adapter that vLLM cannot have, a server that is not there or has another base or too short
    a context, and one that does not take the adapter.
    """
    if not args.vllm_url:
        return None
    config = read_adapter_config(sft) if is_adapter(sft) else None
    for name in ("use_dora", "modules_to_save"):
        if getattr(lora, name) or getattr(config, name, None):
            whose = f"--{name}" if getattr(lora, name) else f"--sft_model_path {sft} has {name}"
            raise UserError(f"{whose}: vLLM has no such adapters; leave it out, or --vllm_url")
    servers = [VllmServer(url, training_args.ddp_timeout) for url in args.server_urls]
    for server in servers:
        served_name(server, base_of(sft), args.max_source_length + args.response_length)
    connected = VllmServers(servers, training_args)
    failure = None
    if connected.is_main:
        try:
            _try_adapter(connected, sft, lora, stop_ids, **hub_options)
        except ServerError as error:
            failure = str(error)
    raise_in_all(failure)
    return connected


def served_name(server: VllmServer, base: str, n_tokens: int, whose: str = "the policy's base") -> str:
    """What the server calls its model. Raises UserError unless that is this base, with a context of so many tokens."""
    text = server.ask("/v1/models", seconds=SECONDS_FOR_ITS_NAME)
    try:
        (model, *_) = (entry for entry in json.loads(text)["data"] if not entry["parent"])
        name, root, context = model["id"], model["root"], int(model["max_model_len"])
    except (ValueError, KeyError, TypeError) as error:
        answered = f"it answered {one_short_line(text)}"
        raise ServerError(f"{server.where}: not a vLLM server ({answered}); {HOW_TO_START}") from error
    if root != base and Path(root).resolve() != Path(base).resolve():
        raise ServerError(f"{server.where}: the server has the model {root}; start it with {whose}, {base}")
    if context < n_tokens:
        raise ServerError(
            f"{server.where}: the server's context is {context} tokens, --max_source_length and --response_length ask "
            f"for {n_tokens}; start it with --max-model-len {n_tokens}"
        )
    return name


def _try_adapter(servers: VllmServers, sft: str, lora: LoraArguments, stop_ids: Sequence[int], **hub_options) -> None:
    """Raise ServerError unless each server takes the policy's adapter and gives log-probs at the sampling temperature.

    A new adapter is still zeros: as such it shows rank and layers.
    """
    name, folder = f"{servers.run}-trial", Path(sft)
    if not is_adapter(sft):
        folder = servers.folder / name
        folder.mkdir()
        save_zero_adapter(folder, sft, lora, **hub_options)
    for server in servers.servers:
        try:
            server.load(name, folder)
        except ServerError as error:
            raise ServerError(
                f"{error}; it must take this adapter while it runs (--enable-lora, --max-lora-rank, and "
                f"VLLM_ALLOW_RUNTIME_LORA_UPDATING=True); {HOW_TO_START}"
            ) from error
        # The only token that may come has all of the probability, and keeps its own where nothing is processed.
        request = {"model": name, "prompt": [stop_ids[0]], "max_tokens": 1, "logprobs": 0, "temperature": 1.0}
        answer = server.ask("/v1/completions", request | {"allowed_token_ids": [stop_ids[0]]})
        server.unload(name)
        try:
            (logp,) = json.loads(answer)["choices"][0]["logprobs"]["token_logprobs"]
        except (ValueError, KeyError, IndexError, TypeError) as error:
            raise ServerError(
                f"{server.where}: an answer without logprobs ({one_short_line(answer)}); {HOW_TO_START}"
            ) from error
        if logp < -1e-3:
            raise ServerError(
                f"{server.where}: its log-probs are those before the temperature; start it with --logprobs-mode "
                "processed_logprobs"
            )
    shutil.rmtree(servers.folder / name, ignore_errors=True)
