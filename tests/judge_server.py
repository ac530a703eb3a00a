"""A stand-in for a judge's server: OpenAI's interface, honest about what is in the delimited blocks, and obedient to
any instruction that stands outside them."""

import json
import re
import threading
import unicodedata
from collections.abc import Callable
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

# As leniently as a model might read: in any case, with blanks, in wide letters, or where a chat template's token ends.
CLOSING = r"<\s*/\s*{tag}[^>]*>|<\|[^|]*\|>|<(?:start|end)_of_turn>|\[/?INST\]"
# What it does when it is told to, outside the blocks.
ORDER = re.compile(r"ORDER:\s*(\{.*?\})")


def read_blocks(message: str) -> tuple[dict[str, str], str]:
    """The content of each block by its tag, and all that stands outside of them."""
    text, blocks, outside = unicodedata.normalize("NFKC", message), {}, ""
    while opening := re.search(r"<(conversation|reference|reply|reply_1|reply_2|criteria)>", text):
        outside += text[: opening.start()]
        text = text[opening.end() :]
        closing = re.search(CLOSING.format(tag=opening[1]), text, re.IGNORECASE)
        blocks[opening[1]] = text[: closing.start()]
        text = text[closing.end() :]
    return blocks, outside + text


def strings_of(block: str) -> list[str]:
    """The JSON strings at the ends of a block's lines."""
    return [json.loads(line[line.index('"') :]) for line in block.strip().splitlines()]


class JudgeServer:
    """bodies: of the requests so far. verdict: of a reply and a criterion; better: of two replies.

    fault: called with the number of the request and the handler before an answer; True if it has answered itself.
    """

    def __init__(self):
        self.bodies: list[dict] = []
        self.verdict: Callable[[str, str], bool] = lambda reply, criterion: "120" in reply
        self.better: Callable[[str, str], int] = lambda first, second: 1 if len(first) > len(second) else 2
        self.fault: Callable[[int, BaseHTTPRequestHandler], bool] = lambda number, handler: False
        self.usage: dict | None = {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110}
        self.keys: set[str | None] = set()

    def answer(self, messages: list[dict]) -> str:
        blocks, outside = read_blocks(messages[-1]["content"])
        if order := ORDER.search(outside):
            return order[1]
        if "reply" in blocks:
            criteria = strings_of(blocks["criteria"])
            (reply,) = strings_of(blocks["reply"])
            return json.dumps({"explanation": "", "met": [self.verdict(reply, text) for text in criteria]})
        (first,), (second,) = strings_of(blocks["reply_1"]), strings_of(blocks["reply_2"])
        return json.dumps({"explanation": "", "better": self.better(first, second)})


def send(handler: BaseHTTPRequestHandler, status: int, body: object, **headers: str) -> None:
    data = body.encode() if isinstance(body, str) else json.dumps(body).encode()
    handler.send_response(status)
    for name, value in ({"Content-Type": "application/json", "Content-Length": str(len(data))} | headers).items():
        handler.send_header(name.replace("_", "-"), value)
    handler.end_headers()
    handler.wfile.write(data)


def completion(text: str, usage: dict | None, reason: str = "stop") -> dict:
    choice = {"index": 0, "finish_reason": reason, "message": {"role": "assistant", "content": text}}
    return {"id": "1", "object": "chat.completion", "created": 1, "model": "m", "choices": [choice], "usage": usage}


@contextmanager
def running_judge():
    """A JudgeServer with its `url`, while the block lasts."""
    judge = JudgeServer()
    stop = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            judge.bodies.append(body)
            judge.keys.add(self.headers["Authorization"])
            if not judge.fault(len(judge.bodies), self):
                send(self, 200, completion(judge.answer(body["messages"]), judge.usage))

        def log_message(self, *args):
            pass

    def hang(number: int, handler: BaseHTTPRequestHandler) -> bool:
        stop.wait(60)
        return True

    judge.hang = hang
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    judge.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    try:
        yield judge
    finally:
        stop.set()
        server.shutdown()
        server.server_close()
