"""Hub, token and clock, against a server on this machine."""

import email.utils
import http.server
import threading
import time
from collections.abc import Iterator

import pytest

from medtune.machine import hub
from medtune.machine.findings import FINE, NOTE, WRONG, Finding
from medtune.machine.hub import SOME_FILE, check_hub

TOKEN = "hf_secret"


class Server(http.server.BaseHTTPRequestHandler):
    """As the hub: a file, and who has a token; `answers` by path, `tokens` is what came with the requests."""

    answers: dict[str, int]
    tokens: dict[str, str | None]
    ahead = 0

    def do_GET(self):
        self.tokens[self.path] = self.headers.get("Authorization")
        code = self.answers[self.path]
        self.send_response_only(code)
        self.send_header("Date", email.utils.formatdate(time.time() - self.ahead, usegmt=True))
        if code == 302:
            self.send_header("Location", f"http://localhost:{self.server.server_port}/elsewhere")
        self.end_headers()

    def log_message(self, *words):
        pass


@pytest.fixture
def server(monkeypatch, tmp_path) -> Iterator[type[Server]]:
    """Its answers can be changed; HF_ENDPOINT leads to it."""

    class Own(Server):
        pass

    Own.answers, Own.tokens = {f"/{SOME_FILE}": 200, "/api/whoami-v2": 200, "/elsewhere": 200}, {}
    monkeypatch.delenv("HF_HUB_OFFLINE")
    for name in ("HF_TOKEN", "HF_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    for name in ("http_proxy", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Own) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{running.server_port}/")
        yield Own
        running.shutdown()


def found() -> dict[str, Finding]:
    return {finding.subject: finding for finding in check_hub()}


def test_a_mirror_that_answers_and_a_valid_token(server, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    findings = found()
    assert [finding.grade for finding in findings.values()] == [FINE] * 3
    assert findings["hub"].text.startswith("127.0.0.1 answers in 0.")
    assert server.tokens == {f"/{SOME_FILE}": None, "/api/whoami-v2": f"Bearer {TOKEN}"}


@pytest.mark.parametrize(
    ("code", "grade", "text"),
    [
        (401, WRONG, "refused (401): make another at https://huggingface.co/settings/tokens, or unset it"),
        (404, NOTE, "not checked (the answer is 404)"),
    ],
)
def test_a_token_that_is_not_taken(server, monkeypatch, code, grade, text):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    server.answers["/api/whoami-v2"] = code
    findings = found()
    assert findings["HF_TOKEN"] == Finding(grade, "HF_TOKEN", text)
    assert TOKEN not in str([*findings.values()])


def test_another_host_does_not_get_the_token(server, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    server.answers["/api/whoami-v2"] = 302
    assert found()["HF_TOKEN"].grade == FINE
    assert server.tokens["/elsewhere"] is None


@pytest.mark.parametrize("token", [f"{TOKEN}\n", f" {TOKEN}", "hf_密"])
def test_a_token_that_was_copied_badly_is_neither_sent_nor_shown(server, monkeypatch, token):
    monkeypatch.setenv("HF_TOKEN", token)
    finding = found()["HF_TOKEN"]
    assert finding.grade == WRONG
    assert token.strip() not in finding.text
    assert "/api/whoami-v2" not in server.tokens


def test_the_token_of_a_login(server, monkeypatch, tmp_path):
    file = tmp_path / "home/token"
    file.parent.mkdir()
    file.write_text(f"{TOKEN}\n")
    assert found()["HF_TOKEN"] == Finding(FINE, "HF_TOKEN", f"valid (that of {file})")
    assert server.tokens["/api/whoami-v2"] == f"Bearer {TOKEN}"
    server.answers["/api/whoami-v2"] = 401
    assert found()["HF_TOKEN"].text == (
        f"refused (401) (that of {file}): make another at https://huggingface.co/settings/tokens, or hf auth logout"
    )
    monkeypatch.setenv("HF_TOKEN", "hf_other")  # which wins
    assert found()["HF_TOKEN"].text.endswith("or unset it")
    assert server.tokens["/api/whoami-v2"] == "Bearer hf_other"


def test_no_token_is_fine(server):
    assert found()["HF_TOKEN"].grade == FINE


@pytest.mark.parametrize(("ahead", "text"), [(7200, "s ahead: "), (-600, "s behind: ")])
def test_a_wrong_clock(server, ahead, text):
    server.ahead = ahead
    clock = found()["clock"]
    assert clock.grade == WRONG
    assert text in clock.text


def test_an_address_that_is_no_hub(server):
    server.answers[f"/{SOME_FILE}"] = 404
    text = "127.0.0.1 answers 404 for a file that the hub has: HF_ENDPOINT is to be the hub or a mirror of it"
    assert found()["hub"] == Finding(WRONG, "hub", text)


def test_nobody_answers(server, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    findings = found()
    assert findings["hub"].grade == WRONG
    assert "127.0.0.1 cannot be reached ([Errno 111] Connection refused): export HF_ENDPOINT" in findings["hub"].text
    assert findings["clock"].grade == NOTE


def test_a_server_that_does_not_answer_in_time(server, monkeypatch):
    monkeypatch.setattr(hub, "SECONDS_TO_ANSWER_HUB", 0.2)
    monkeypatch.setattr(server, "do_GET", lambda self: time.sleep(1))
    assert "cannot be reached (timed out)" in found()["hub"].text


def test_offline_and_addresses_that_are_none(server, monkeypatch):
    for address in (
        "hf-mirror.com",
        "https://hf-mirror.com ",
        "https://hf-mirror.com\n",
        "http://镜像.com",
        "http://[bad",
    ):
        monkeypatch.setenv("HF_ENDPOINT", address)
        text = f"HF_ENDPOINT={address!r}: an address is https://HOST, without blanks"
        assert found() == {"hub": Finding(WRONG, "hub", text)}
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert found()["hub"].grade == FINE
    assert server.tokens == {}
