"""`web_demo.py` in a real browser: ask, stream, switch the model, compare two; and what it does without one."""

import html
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from itertools import pairwise
from pathlib import Path

import pytest

pytest.importorskip("gradio", reason="the chat page needs requirements/web.txt")

import web_demo
from medtune.errors import UserError
from medtune.models.chat_models import NOTICE, ChatModelArguments, RewardModel, describe_models, load_weights
from medtune.models.generation import Decoding, Reply, generate_replies
from medtune.reading.tokenization import encode_prompt
from web_demo import EMERGENCY, Panel, as_text, build_page, converse, drop_unanswered, pieces_of

SCRIPT = Path(web_demo.__file__)
SHORT = Decoding(max_new_tokens=24)


@pytest.fixture(scope="module")
def models(tiny_model_dir, adapter):
    model_args = ChatModelArguments(str(tiny_model_dir))
    models = describe_models(["base", str(adapter)], "--models", model_args)
    load_weights(models, model_args)
    return models


def reply_of(chat_model, turns: list[dict]) -> str:
    prompt = encode_prompt(chat_model.tokenizer, chat_model.chat_template, turns)
    with chat_model.in_use() as model:
        return generate_replies(model, chat_model.tokenizer, [prompt], chat_model.stop_ids, SHORT)[0].text


# ---------------------------------------------------------------- replies


def test_a_conversation_grows_piece_by_piece_and_is_remembered(models, tiny_model_dir, reward_adapter):
    scorer = RewardModel(str(reward_adapter), ChatModelArguments(str(tiny_model_dir)))
    n_shown = []
    for chat_model in models:
        panel = Panel([{"role": "user", "content": "头痛"}])
        shown = list(converse(chat_model, scorer, "你是医生", panel, SHORT, 42))
        expected = reply_of(
            chat_model, [{"role": "system", "content": "你是医生"}, {"role": "user", "content": "头痛"}]
        )
        n_shown.append(len(shown))
        partial = [messages[1]["content"] for messages in shown]
        assert all(later.startswith(earlier.strip()) for earlier, later in pairwise(partial[:-1]))
        assert panel.turns == shown[-1] == [*panel.turns[:1], {"role": "assistant", "content": expected}]
        assert re.match(r"得分 score -?\d+\.\d{3}； 24 tokens，已截断 cut$", panel.note)
    assert max(n_shown) > 2


def test_what_cannot_be_asked_is_said_and_costs_no_history(models):
    before = [{"role": "user", "content": "头痛"}, {"role": "assistant", "content": "休息"}]
    for system, question, fault in (
        ("", "头痛" * 3000, "there is room for 2024"),
        ("<|im_start|>", "头痛", "holds <|im_start|>"),
    ):
        panel = Panel([*before, {"role": "user", "content": question}])
        assert list(converse(models[0], None, system, panel, SHORT, 42)) == [before]
        assert fault in panel.note
        assert panel.turns == before


def test_left_out_turns_are_said(models):
    long = [{"role": "user", "content": "水" * 900}, {"role": "assistant", "content": "水" * 900}]
    panel = Panel([*long, *long, {"role": "user", "content": "头痛"}])
    list(converse(models[0], None, "", panel, SHORT, 42))
    assert "the oldest 2 turns were left out" in panel.note or "the oldest 4 turns were left out" in panel.note
    assert len(panel.turns) == 6


def test_an_empty_reply_is_not_remembered(models, monkeypatch):
    monkeypatch.setattr(web_demo, "pieces_of", lambda *args: iter([Reply("", True, 1)]))
    panel = Panel([{"role": "user", "content": "头痛"}])
    list(converse(models[0], None, "", panel, SHORT, 42))
    assert drop_unanswered(panel.turns) == []


@pytest.mark.parametrize("opened", [False, True])
def test_a_thought_is_a_folded_message_before_the_answer(models, thinking_model_dir, monkeypatch, opened):
    """Also where the prompt opened it; while it grows it is open."""
    (thinking,) = describe_models(None, "--models", ChatModelArguments(str(thinking_model_dir)))
    pieces = ["多半<b>", "是感冒。\n</think>\n\n", "多喝水。"]
    pieces = pieces if opened else ["<think>\n", *pieces]
    reply = Reply("".join(pieces), True, 9)
    monkeypatch.setattr(web_demo, "pieces_of", lambda *args: iter([*pieces, reply]))
    panel = Panel([{"role": "user", "content": "头痛"}])
    shown = [as_text(turns)[1:] for turns in converse(thinking if opened else models[0], None, "", panel, SHORT, 42)]
    thoughts = [message["metadata"] for messages in shown for message in messages if "metadata" in message]
    assert [thought.get("status") for thought in thoughts] == [None, "done", "done", "done"]
    thought, answer = ([{"type": "text", "text": text}] for text in ("多半&lt;b&gt;是感冒。", "多喝水。"))
    assert [message["content"] for message in shown[-1]] == [thought, answer]
    assert panel.turns[-1]["content"] == "<think>\n多半<b>是感冒。\n</think>\n\n多喝水。"


def test_a_thought_without_an_answer_is_not_remembered(models, monkeypatch):
    monkeypatch.setattr(web_demo, "pieces_of", lambda *args: iter([Reply("<think>\n多半", False, 2)]))
    panel = Panel([{"role": "user", "content": "头痛"}])
    list(converse(models[0], None, "", panel, SHORT, 42))
    assert "已截断 cut 在思考中 inside the thought" in panel.note
    assert drop_unanswered(panel.turns) == []


def test_turns_that_training_never_shows_are_not_asked(models):
    panel = Panel([{"role": "user", "content": "头痛"}, {"role": "user", "content": "还有呢"}])
    list(converse(models[0], None, "", panel, SHORT, 42))
    assert panel.note == "不能回答 cannot be asked: turns 1 and 2 are both from the user; join them"


def test_closing_a_reply_ends_its_generation(models):
    pieces = pieces_of(models[0], [1, 2, 3], Decoding(max_new_tokens=2000), 42)
    next(pieces)
    pieces.close()
    # It would have kept the thread for all 2000 tokens.
    assert web_demo._GENERATING.submit(int).result(timeout=60) == 0
    *_, last = pieces_of(models[0], [1, 2, 3], SHORT, 42)
    assert isinstance(last, Reply)


def test_any_failure_of_a_generation_reaches_the_page(models, monkeypatch):
    def fail(*args):
        raise KeyError("lost")

    monkeypatch.setattr(web_demo, "stream_reply", fail)
    with pytest.raises(KeyError, match="lost"):
        list(pieces_of(models[0], [1, 2, 3], SHORT, 42))


def test_a_chat_is_given_text_and_no_markup(models):
    said = [{"role": "user", "content": "1~2片*3次\n  <b>&lt;"}]
    text = "1~2片*3次\n  &lt;b&gt;&amp;lt;"
    assert as_text(said) == [{"role": "user", "content": [{"type": "text", "text": text}]}]
    chats = [block for block in build_page(models[:1], None).blocks.values() if block.get_block_name() == "chatbot"]
    assert [chat.render_markdown for chat in chats] == [False, False]
    assert [chat.latex_delimiters for chat in chats] == [[], []]


def test_an_address_that_cannot_be_listened_on_is_refused_before_weights_load(tiny_model_dir, monkeypatch):
    monkeypatch.setattr(web_demo, "load_weights", lambda *args: pytest.fail("the weights are loaded"))
    with pytest.raises(UserError, match="--port 99999: give a number from 1 to 65535"):
        web_demo.main(["--base_model", str(tiny_model_dir), "--port", "99999"])
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(UserError, match="Address already in use"):
        web_demo.main(["--base_model", str(tiny_model_dir), "--port", str(taken.getsockname()[1])])


def test_flags_that_exclude_each_other(tiny_model_dir, adapter):
    flags = ["--base_model", str(tiny_model_dir), "--lora_model", str(adapter), "--models", "base"]
    with pytest.raises(UserError, match="name the adapter after --models"):
        web_demo.main(flags)


# ---------------------------------------------------------------- the page


@pytest.fixture(scope="module")
def address(tiny_model_dir, adapter, reward_adapter, tmp_path_factory):
    """The page as a user starts it."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("web") / "web.log"
    command = [sys.executable, SCRIPT, "--base_model", tiny_model_dir, "--models", "base", adapter, "--port", port]
    command += ["--reward_model", reward_adapter]
    with log.open("w") as file:
        server = subprocess.Popen(list(map(str, command)), stdout=file, stderr=subprocess.STDOUT)
    address = f"http://127.0.0.1:{port}"
    for _ in range(600):
        if server.poll() is not None:
            pytest.fail(log.read_text(encoding="utf-8"))
        try:
            urllib.request.urlopen(address).close()
            break
        except OSError:
            time.sleep(0.5)
    yield address
    server.terminate()
    server.wait(60)


@pytest.fixture
def chromium():
    """A real browser."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="no playwright: pip install playwright")
    program = shutil.which("chromium") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("no Chromium: apt-get install chromium")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield browser
        browser.close()


SAID = [
    "阿莫西林0.5g*24粒，每次2粒*3次/日*7天",
    "每次1~2片，每日2~3次，能吃*3*天吗？<b>谢谢</b>",
    "*a* ~~b~~ __c__ _d_ `e` #1 > 2 < 3 & &lt; &amp;nbsp; $x$ $$y$$ \\( z \\) \\* \\n | a | b |",
    "1. 一\n2) 二\n- 三\n\n---\n# 四\n> 五\n    六  七\n|a|b|\n|-|-|\n```\nx*y*z\n```",
    "https://example.com/a_b_c?x=1&y=2 [l](http://x) ![i](http://x/i.png) <img src=x onerror=alert(1)><!-- x -->O2<9%",
]


@pytest.mark.slow
def test_text_is_shown_and_copied_as_it_was_said(chromium, models, monkeypatch):
    """Of both sides; the model repeats the question in two pieces."""

    def repeat(chat_model, chat_template, messages, room):
        question[:] = [messages[-1]["content"]]
        return [1], 0

    def pieces(*args):
        (text,) = question
        yield from (text[: len(text) // 2], text[len(text) // 2 :], Reply(text, True, 1))

    question: list[str] = []
    monkeypatch.setattr(web_demo, "encode_recent", repeat)
    monkeypatch.setattr(web_demo, "pieces_of", pieces)
    demo = build_page(models[:1], None)
    looks = {"css": web_demo.CSS, "js": web_demo.JS}
    _, address, _ = demo.launch(prevent_thread_lock=True, ssr_mode=False, quiet=True, **looks)
    try:
        page = chromium.new_page()
        page.context.grant_permissions(["clipboard-read", "clipboard-write"])
        page.goto(address)
        for n_before, text in enumerate(SAID):
            page.locator("#question textarea").fill(text)
            page.locator("#send").click()
            page.locator("#left-chat .bot.message").nth(n_before).wait_for()
            page.wait_for_function(
                f"document.querySelectorAll('#left-chat button[aria-label^=Copy]').length > {n_before}"
            )
            for side in ("user", "bot"):
                bubble = page.locator(f"#left-chat .{side}.message").nth(n_before)
                page.wait_for_function("([e, text]) => e.innerText == text", arg=[bubble.element_handle(), text])
            page.locator("#left-chat button[aria-label^=Copy]").last.click()
            assert page.evaluate("navigator.clipboard.readText()") == text
    finally:
        demo.close()


@pytest.mark.slow
def test_ask_stream_switch_and_compare_in_a_browser(chromium, address):
    from playwright.sync_api import expect

    page = chromium.new_page(viewport={"width": 1280, "height": 1000})
    page.set_default_timeout(120_000)
    elsewhere = []
    page.on("request", lambda request: request.url.startswith(address) or elsewhere.append(request.url))
    page.goto(address)
    notice = page.locator("#notice")
    expect.set_options(timeout=60_000)
    expect(notice).to_contain_text(NOTICE)
    expect(notice).to_contain_text(EMERGENCY.split("。")[0])

    # The adapter is chosen first; greedy, 512 tokens.
    page.locator("#question textarea").fill("头痛")
    page.locator("#send").click()
    bot = page.locator("#left-chat .bot.message")
    expect(bot).to_have_count(1)
    expect(page.locator("#left-note")).to_contain_text("tokens")
    expect(page.locator("#left-note")).to_contain_text("score")
    expect(page.locator("#question textarea")).to_have_value("")

    # Two side by side.
    page.locator("#right-model input").click()
    page.get_by_role("option", name="base").click()
    page.locator("#question textarea").fill("感冒了")
    page.locator("#send").click()
    expect(page.locator("#right-note")).to_contain_text("score")
    expect(page.locator("#left-chat .bot.message")).to_have_count(2)
    expect(page.locator("#right-chat .bot.message")).to_have_count(1)

    # Another model starts another conversation; the line is still in view.
    page.locator("#left-model input").click()
    page.get_by_role("option", name="base").click()
    expect(page.locator("#left-chat .bot.message")).to_have_count(0)
    expect(notice).to_be_in_viewport()
    page.locator("#clear").click()
    expect(page.locator("#right-chat .bot.message")).to_have_count(0)
    assert elsewhere == []


def test_the_page_answers_its_own_client(address, models, adapter):
    from gradio_client import Client

    client = Client(address, verbose=False)
    job = client.submit("头痛", str(adapter), "不比较 none", "", 0, 1, 24, 42, api_name="/talk")
    question, left, right, *_, note, _ = job.result(timeout=120)
    assert question == ""
    assert right == []
    assert "score" in note
    (part,) = left[1]["content"]
    assert html.unescape(part["text"]) == reply_of(models[1], [{"role": "user", "content": "头痛"}])
    assert len(job.outputs()) > 1
