"""A stand-in for vLLM's server: the answers of 0.32 that training asks for, from a model in this process.

It loads the adapter folders that it is told of, and draws by its own generator. Its faults are those that users meet.
"""

import json
import threading
from contextlib import ExitStack
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import torch
from peft import PeftConfig, PeftModel
from transformers import AutoModelForCausalLM

PAGE = "<html>\nSign in " + "in\n" * 1000


class FakeVllm:
    """A server on loopback; a context.

    faults: any of `no_lora` (no such address), `ignores_adapter`, `raw_logprobs`, `dies` (at the next reply), `hangs`,
        `hangs_at_once` (it does not even say what it has), `not_vllm`, `html` and `html_replies` (a page of another
        server), `cuts` (replies end early), `another_root`.
    """

    def __init__(self, base: Path, max_model_len: int = 1024, max_lora_rank: int = 16):
        self.base, self.max_model_len, self.max_lora_rank = base, max_model_len, max_lora_rank
        self.model = AutoModelForCausalLM.from_pretrained(base)
        self.faults: set[str] = set()
        self.adapters: list[str] = []  # that are loaded, in their order
        self.history: list[tuple[str, str]] = []  # load or unload, and the adapter's name
        self.requests: list[dict] = []  # for completions
        self.lock = threading.Lock()
        self.released = threading.Event()

    def __enter__(self) -> "FakeVllm":
        fake = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                fake.answer(self, None)

            def do_POST(self):
                fake.answer(self, json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

            def log_message(self, *args):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.server.handle_error = lambda *_: None  # the client has hung up
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.released.set()
        self.server.shutdown()
        self.server.server_close()

    # ------------------------------------------------------------ answers

    def answer(self, request: BaseHTTPRequestHandler, body: dict | None) -> None:
        known = {
            "/v1/models": self.models,
            "/v1/load_lora_adapter": self.load,
            "/v1/unload_lora_adapter": self.unload,
            "/v1/completions": self.complete,
        }
        if "no_lora" in self.faults:
            known = {path: call for path, call in known.items() if "lora" not in path}
        with self.lock:
            status, answer = known[request.path](body) if request.path in known else (404, {"detail": "Not Found"})
        if status == 0:  # dies
            request.connection.close()
            return
        data = (answer if isinstance(answer, str) else json.dumps(answer)).encode()
        request.send_response(status)
        request.send_header("Content-Length", str(len(data)))
        request.end_headers()
        request.wfile.write(data)

    def models(self, _) -> tuple[int, dict | str]:
        if "hangs_at_once" in self.faults:
            self.released.wait()
        if "html" in self.faults:
            return 200, PAGE
        if "not_vllm" in self.faults:
            return 200, {"data": [{"id": "m", "object": "model"}]}
        root = "Qwen/Another" if "another_root" in self.faults else str(self.base)
        entries = [{"id": root, "root": root, "parent": None, "max_model_len": self.max_model_len}]
        return 200, {"data": entries + [{"id": n, "root": n, "parent": root} for n in self.adapters]}

    def load(self, body: dict) -> tuple[int, dict | str]:
        name, folder = body["lora_name"], body["lora_path"]
        rank = PeftConfig.from_pretrained(folder).r
        if rank > self.max_lora_rank:
            fault = f"LoRA rank {rank} is greater than max_lora_rank {self.max_lora_rank}."
            return 500, {"error": {"message": f"Call to add_lora method failed: {fault}"}}
        if isinstance(self.model, PeftModel):
            self.model.load_adapter(folder, name)
        else:
            self.model = PeftModel.from_pretrained(self.model, folder, name)
        self.adapters.append(name)
        self.history.append(("load", name))
        return 200, f"Success: LoRA adapter '{name}' added successfully."

    def unload(self, body: dict) -> tuple[int, dict | str]:
        if body["lora_name"] not in self.adapters:
            return 404, {"error": {"message": f"The lora adapter '{body['lora_name']}' cannot be found."}}
        self.adapters.remove(body["lora_name"])
        self.history.append(("unload", body["lora_name"]))
        return 200, "Success"

    def complete(self, body: dict) -> tuple[int, dict | str]:
        if "html_replies" in self.faults:
            return 200, PAGE
        if "allowed_token_ids" in body:
            logp = -3.0 if "raw_logprobs" in self.faults else 0.0
            return 200, {"choices": [{"token_ids": body["allowed_token_ids"], "logprobs": {"token_logprobs": [logp]}}]}
        if "prompt_logprobs" in body:
            self.requests.append(body)
            return (0, {}) if "dies" in self.faults else (200, {"choices": [{"prompt_logprobs": self.read(body)}]})
        if body["model"] not in self.adapters:
            return 404, {"error": {"message": f"The model `{body['model']}` does not exist."}}
        self.requests.append(body)
        if "dies" in self.faults:
            return 0, {}
        if "hangs" in self.faults:
            self.released.wait()
        ids, logps = self.generate(body)
        choice = {"prompt_token_ids": body["prompt"], "token_ids": ids, "finish_reason": "stop"}
        return 200, {"choices": [choice | {"logprobs": {"token_logprobs": logps}}]}

    @torch.no_grad()
    def read(self, body: dict) -> list[dict | None]:
        """Of each prompt token after the first its own log-prob, as `prompt_logprobs` 0 asks for."""
        assert body["model"] == str(self.base)
        assert body["prompt_logprobs"] == 0
        ids = torch.tensor(body["prompt"])
        distributions = self.model(input_ids=ids[None]).logits[0, :-1].log_softmax(dim=-1)
        logps = distributions.gather(1, ids[1:, None]).squeeze(1).tolist()
        return [None, *({str(int(i)): {"logprob": logp, "rank": 1}} for i, logp in zip(ids[1:], logps, strict=True))]

    @torch.no_grad()
    def generate(self, body: dict) -> tuple[list[int], list[float]]:
        ids, logps, cache = [], [], None
        generator = torch.Generator().manual_seed(body["seed"])
        limit = 1 if "cuts" in self.faults else body["max_tokens"]
        with ExitStack() as stack:
            if "ignores_adapter" in self.faults:
                stack.enter_context(self.model.disable_adapter())
            else:
                self.model.set_adapter(body["model"])
            step = body["prompt"]
            while len(ids) < limit and not (ids and ids[-1] in body["stop_token_ids"]):
                output = self.model(input_ids=torch.tensor([step]), cache=cache, use_cache=True)
                cache = output.cache
                distribution = (output.logits[0, -1] / (body["temperature"] or 1.0)).log_softmax(dim=-1)
                chosen = distribution.argmax()
                if body["temperature"]:
                    chosen = torch.multinomial(distribution.exp(), 1, generator=generator)[0]
                step = [int(chosen)]
                ids += step
                logps.append(float(distribution[chosen]))
        return ids, logps
