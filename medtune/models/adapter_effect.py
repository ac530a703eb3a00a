"""What an adapter changes: the log-probs of a first token with it and without; here asked of a vLLM server.

    python -m medtune.models.adapter_effect outputs-dpo-qwen2.5-3b/checkpoint-best PID --host 127.0.0.1 --port 8000

It waits until the server answers or its process has ended, and prints one line. A greedy reply would not do: a changed
model may begin with the same words.
"""

import argparse
import json
import os
import sys
import time
import urllib.request
from collections.abc import Sequence

QUESTION = {"role": "user", "content": "你好"}
# Log-probs that differ by less are the same, computed in another order.
LEAST_CHANGE = 1e-5

SECONDS_BETWEEN_TRIES = 2


def describe_effect(adapter: str, change: float) -> str:
    """The line about an adapter; change: the largest difference of a first token's log-prob."""
    if change < LEAST_CHANGE:
        return (
            f"adapter {adapter} changes nothing: the log-probs of a first token are the base model's; check that it "
            "was trained, and on this base model"
        )
    return f"adapter {adapter}: the log-probs of a first token differ from the base model's by up to {change:.3g}"


def served_change(url: str, adapter: str) -> float:
    """The largest difference among the likeliest first tokens with the adapter and without, asked of a vLLM server."""
    (base,) = (model["parent"] for model in _ask(f"{url}/v1/models")["data"] if model["id"] == adapter)
    with_adapter, without = (_first_logps(url, name) for name in (adapter, base))
    shared = with_adapter.keys() & without.keys()
    return max((abs(with_adapter[token] - without[token]) for token in shared), default=float("inf"))


def _first_logps(url: str, model: str) -> dict[str, float]:
    body = {"model": model, "messages": [QUESTION], "max_tokens": 1, "temperature": 0}
    answer = _ask(f"{url}/v1/chat/completions", body | {"logprobs": True, "top_logprobs": 5})
    (token,) = answer["choices"][0]["logprobs"]["content"]
    return {entry["token"]: entry["logprob"] for entry in token["top_logprobs"]}


def _ask(url: str, body: dict | None = None) -> dict:
    headers = {"Content-Type": "application/json"}
    if key := os.environ.get("VLLM_API_KEY"):
        headers["Authorization"] = f"Bearer {key}"
    data = None if body is None else json.dumps(body).encode()
    with urllib.request.urlopen(urllib.request.Request(url, data, headers)) as answer:
        return json.load(answer)


def _answers(url: str, process: int) -> bool:
    """Whether the server answers, once it does, or once its process has ended."""
    while True:
        try:
            with urllib.request.urlopen(f"{url}/health"):
                return True
        except OSError:
            time.sleep(SECONDS_BETWEEN_TRIES)
        try:
            os.kill(process, 0)
        except ProcessLookupError:
            return False


def address_to_ask(host: str, port: str) -> str:
    """The URL of a server that listens on a host and a port; one that listens on all of them is asked on this one."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("adapter", help="its name at the server")
    parser.add_argument("process", type=int, help="the id of the server's process")
    parser.add_argument("--host")
    parser.add_argument("--port")
    args, _ = parser.parse_known_args(argv)  # the server's own flags stand behind
    url = address_to_ask(args.host, args.port)
    if not _answers(url, args.process):
        return
    try:
        line = describe_effect(args.adapter, served_change(url, args.adapter))
    except (OSError, ValueError, LookupError) as error:
        line = f"what adapter {args.adapter} changes is not known: {url} did not tell its log-probs ({error!r:.100})"
    sys.stderr.write(f"{line}\n")


if __name__ == "__main__":
    main()
