"""A chat page in the browser: choose a trained model, or put two side by side with their reward scores.

Input: a base model with the stages to choose from (--models), one adapter, a merged model or a full checkpoint.
Output: a page on http://127.0.0.1:7860. It keeps no conversation; prompts are those of training.

    python web_demo.py --base_model Qwen/Qwen2.5-3B-Instruct --lora_model outputs-dpo-qwen2.5-3b/checkpoint-best
    python web_demo.py --base_model Qwen/Qwen2.5-3B-Instruct --models base outputs-sft-qwen2.5-3b/checkpoint-best \\
        outputs-dpo-qwen2.5-3b/checkpoint-best --reward_model outputs-rm-qwen2.5-3b/checkpoint-best

Needs requirements/web.txt. On a rented server, reach it from home by `ssh -L 7860:127.0.0.1:7860 SERVER`.
"""

import html
import queue
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import medtune.libraries  # noqa: F401 - first: it imports the libraries in half of their time

# isort: split
import gradio as gr
from loguru import logger
from transformers import set_seed

from medtune.arguments import StageArgumentParser
from medtune.errors import Unusable, UserError, run_script
from medtune.models.chat_models import (
    LOOPBACK,
    NOTICE,
    ChatModel,
    ChatModelArguments,
    RewardModel,
    check_address,
    describe_models,
    load_weights,
)
from medtune.models.generation import Decoding, Reply, stream_reply
from medtune.reading.conversations import turns_to_answer
from medtune.reading.messages import Message
from medtune.reading.thoughts import split_reply, with_opening
from medtune.reading.tokenization import encode_recent
from medtune.training.log import start_log

EMERGENCY = (
    "紧急情况（胸痛、呼吸困难、意识不清、大出血、想自杀等）请立即拨打 120 或去急诊。 "
    "In an emergency (chest pain, trouble breathing, fainting, heavy bleeding, thoughts of suicide) call 120 or your "
    "local number now."
)
EXAMPLES = ["感冒了应该怎么办？", "高血压患者在饮食上需要注意什么？", "What should I do about a cold?"]
NO_SECOND = "不比较 none"
# The line stays in view however long the conversation is; no font comes from another server.
CSS = """
#notice {position: sticky; top: 0; z-index: 100; background: var(--block-background-fill);
         border-left: 4px solid #c0392b; padding: 8px 12px}
#left-chat .md, #right-chat .md {white-space: pre-wrap; line-height: 1.6}
"""
# Markdown would take the stars out of `0.5g*24` and strike through what stands between two `~`.
CHAT = {"render_markdown": False, "latex_delimiters": [], "buttons": ["copy"], "height": 420}
# The button copies what the chat was given, which is escaped (`as_text`); without https through a text area.
JS = """() => {
    const unescape = text => text.replaceAll("&lt;", "<").replaceAll("&gt;", ">").replaceAll("&amp;", "&");
    if (navigator.clipboard) {
        const write = navigator.clipboard.writeText.bind(navigator.clipboard);
        navigator.clipboard.writeText = text => write(unescape(text));
    } else document.addEventListener("copy", event => {
        if (event.target.parentNode !== document.body) return;
        event.clipboardData.setData("text/plain", unescape(event.target.value));
        event.preventDefault();
    });
}"""
THEME = gr.themes.Default(
    font=["system-ui", "Noto Sans CJK SC", "Microsoft YaHei", "sans-serif"], font_mono=["ui-monospace", "monospace"]
)

# ---------------------------------------------------------------- arguments


@dataclass
class WebArguments:
    models: list[str] | None = field(
        default=None,
        metadata={"help": "To choose from: `base`, folders of adapters on --base_model or of whole models."},
    )
    host: str = field(default="127.0.0.1", metadata={"help": "Address to listen on; 0.0.0.0 opens it to the network."})
    port: int = field(default=7860, metadata={"help": "Port to listen on."})


# ---------------------------------------------------------------- replies


# One thread: the models share a base whose adapters are switched, and a stopped reply ends with its next piece.
_GENERATING = ThreadPoolExecutor(max_workers=1, thread_name_prefix="generate")


class _Closed(Exception):  # noqa: N818 - it ends a generation, nothing went wrong
    """Nobody waits for the reply any more."""


def pieces_of(chat_model: ChatModel, prompt: list[int], decoding: Decoding, seed: int) -> Iterator[str | Reply]:
    """Yield the pieces of a reply, then the reply; closing the iterator ends the generation."""
    items: queue.Queue[str | Reply | BaseException] = queue.Queue()
    closed = threading.Event()

    def hand_on(item: str) -> None:
        if closed.is_set():
            raise _Closed
        items.put(item)

    def generate() -> Reply:
        with chat_model.in_use() as model:
            set_seed(seed)
            return stream_reply(model, chat_model.tokenizer, prompt, chat_model.stop_ids, decoding, hand_on)

    future = _GENERATING.submit(generate)
    future.add_done_callback(lambda done: items.put(done.exception() or done.result()))
    try:
        while not isinstance(item := items.get(), Reply):
            if isinstance(item, BaseException):
                raise item
            yield item
        yield item
    finally:
        closed.set()


def drop_unanswered(turns: list[Message]) -> list[Message]:
    """The turns without a last question whose reply was stopped or has no answer, which training never shows."""
    if turns and turns[-1]["role"] == "assistant" and not split_reply(turns[-1]["content"]).answer:
        turns = turns[:-1]
    return turns[:-1] if turns and turns[-1]["role"] == "user" else turns


@dataclass
class Panel:
    """One side of the page: a conversation with one model."""

    turns: list[Message]
    note: str = ""


def converse(
    chat_model: ChatModel, reward_model: RewardModel | None, system: str, panel: Panel, decoding: Decoding, seed: int
) -> Iterator[list[Message]]:
    """Answer the panel's last turn: yields the turns to display while the reply grows, then adds it."""
    with_system: list[Message] = [{"role": "system", "content": system}] if system else []
    try:
        room = chat_model.context - decoding.max_new_tokens
        messages = turns_to_answer([*with_system, *panel.turns])
        prompt, n_left_out = encode_recent(chat_model.tokenizer, chat_model.chat_template, messages, room)
    except (Unusable, UserError) as error:
        panel.note = f"不能回答 cannot be asked: {error.detail if isinstance(error, Unusable) else error}"
        panel.turns = panel.turns[:-1]
        yield panel.turns
        return
    partial, opened = "", chat_model.chat_template.opens_thought
    for piece in pieces_of(chat_model, prompt, decoding, seed):
        if isinstance(piece, Reply):
            break
        partial += piece
        yield [*panel.turns, {"role": "assistant", "content": with_opening(partial, opened)}]
    reply = with_opening(piece.text, opened)
    where = "" if split_reply(reply).is_closed else " 在思考中 inside the thought"
    notes = [f"{piece.n_tokens} tokens" + ("" if piece.ended else f"，已截断 cut{where}")]
    if n_left_out:
        notes.append(f"最早的 {n_left_out} 条已略去 the oldest {n_left_out} turns were left out")
    if reward_model is not None:
        row = reward_model.encode([*with_system, *panel.turns], reply, piece.ended)
        notes.insert(0, f"得分 score {reward_model.score([row])[0]:.3f}")
    panel.turns = [*panel.turns, {"role": "assistant", "content": reply}]
    panel.note = "； ".join(notes)
    yield panel.turns


# ---------------------------------------------------------------- page


def as_text(messages: list[Message]) -> list[dict]:
    """The messages as escaped text parts; Gradio takes strings for HTML and cuts their indentation.

    A thought is a message of its own before the answer, which is folded once it has ended.
    """
    displayed = []
    for message in messages:
        is_reply = message["role"] == "assistant"
        thought, text, is_closed = split_reply(message["content"]) if is_reply else ("", message["content"], True)
        if thought:
            metadata = {"title": "思考 Thought"} | ({"status": "done"} if is_closed else {})
            displayed.append(_text_message(message["role"], thought) | {"metadata": metadata})
        if text or not thought:
            displayed.append(_text_message(message["role"], text))
    return displayed


def _text_message(role: str, text: str) -> dict:
    return {"role": role, "content": [{"type": "text", "text": html.escape(text, quote=False)}]}


def build_page(models: Sequence[ChatModel], reward_model: RewardModel | None) -> gr.Blocks:
    by_name = {chat_model.name: chat_model for chat_model in models}
    names = list(by_name)

    def talk(
        question, left_name, right_name, system, temperature, top_p, max_new_tokens, seed, left_turns, right_turns
    ):
        """Answer on the left, then on the right; the input box is cleared first."""
        # A box that nobody has touched sends None.
        question, system, seed = (question or "").strip(), (system or "").strip(), int(seed or 0)
        if not question:
            yield gr.skip()
            return
        decoding = Decoding(
            max_new_tokens=int(max_new_tokens),
            temperature=float(temperature),
            top_p=float(top_p) if temperature > 0 else 1.0,
        )
        panels = [Panel(drop_unanswered(left_turns)), Panel(drop_unanswered(right_turns))]
        sides = [(panels[0], left_name)] + ([(panels[1], right_name)] if right_name != NO_SECOND else [])
        for panel, _ in sides:
            panel.turns = [*panel.turns, {"role": "user", "content": question}]
        displayed = [panel.turns for panel in panels]
        for index, (panel, name) in enumerate(sides):
            for messages in converse(by_name[name], reward_model, system, panel, decoding, seed):
                displayed[index] = messages
                turns, notes = zip(*((panel.turns, panel.note) for panel in panels), strict=True)
                yield "", *map(as_text, displayed), *turns, *notes

    def side_by_side(right_name):
        return gr.update(visible=right_name != NO_SECOND), [], [], ""

    with gr.Blocks(title="医疗对话 Medical dialogue", analytics_enabled=False) as page:
        gr.Markdown(f"**{NOTICE}**\n\n**{EMERGENCY}**", elem_id="notice")
        left_turns, right_turns = gr.State([]), gr.State([])
        with gr.Row():
            left_name = gr.Dropdown(names, value=names[-1], label="模型 Model", elem_id="left-model", min_width=240)
            second = {"value": NO_SECOND, "label": "与之比较 Compare with", "elem_id": "right-model"}
            right_name = gr.Dropdown([NO_SECOND, *names], **second, min_width=240)
        with gr.Row():
            with gr.Column():
                left_chat = gr.Chatbot(label="模型 Model", elem_id="left-chat", **CHAT)
                left_note = gr.Markdown(elem_id="left-note")
            with gr.Column(visible=False) as right_column:
                right_chat = gr.Chatbot(label="比较 Compared", elem_id="right-chat", **CHAT)
                right_note = gr.Markdown(elem_id="right-note")
        question = gr.Textbox(
            label="问题 Question", placeholder="请输入问题 Ask a question", lines=2, max_length=8000, elem_id="question"
        )
        with gr.Row():
            send = gr.Button("发送 Send", variant="primary", elem_id="send")
            stop = gr.Button("停止 Stop", elem_id="stop")
            clear = gr.Button("清空 Clear", elem_id="clear")
        gr.Examples(EXAMPLES, question, label="例子 Examples")
        with gr.Accordion("设置 Settings", open=False):
            system = gr.Textbox(label="系统提示 System prompt", max_length=4000)
            with gr.Row():
                temperature = gr.Slider(0, 2, value=0, step=0.1, label="温度 Temperature (0: greedy)")
                top_p = gr.Slider(0.05, 1, value=1, step=0.05, label="top_p")
                max_new_tokens = gr.Slider(1, 8192, value=512, step=1, label="最多词元 Most new tokens")
                seed = gr.Number(value=42, precision=0, minimum=0, maximum=2**32 - 1, label="随机种子 Seed")

        inputs = [
            *(question, left_name, right_name, system, temperature, top_p, max_new_tokens, seed),
            *(left_turns, right_turns),
        ]
        outputs = [question, left_chat, right_chat, left_turns, right_turns, left_note, right_note]
        asking = gr.on([send.click, question.submit], talk, inputs, outputs, concurrency_limit=1, api_name="talk")
        stop.click(None, cancels=[asking])
        forgotten = [left_chat, right_chat, left_turns, right_turns, left_note, right_note]
        # The chat's delete button must clear the state too, or the model would remember hidden turns.
        forgetting = [clear.click, left_chat.clear, right_chat.clear]
        gr.on(forgetting, lambda: ([], [], [], [], "", ""), None, forgotten, cancels=[asking], api_name=False)
        left_name.change(lambda: ([], [], ""), None, [left_chat, left_turns, left_note], api_name=False)
        right_name.change(side_by_side, right_name, [right_column, right_chat, right_turns, right_note], api_name=False)
    return page


# ---------------------------------------------------------------- main


def main(argv: Sequence[str] | None = None) -> None:
    # ------------------------------------------------------------ arguments
    parser = StageArgumentParser([ChatModelArguments, WebArguments])
    model_args, web_args = parser.parse(argv)
    check_address(web_args.host, web_args.port)
    start_log()
    for note in parser.notes:
        logger.info(note)

    # ------------------------------------------------------------ models
    models = describe_models(web_args.models, "--models", model_args)
    reward_model = RewardModel(model_args.reward_model, model_args) if model_args.reward_model else None
    load_weights(models, model_args)

    # ------------------------------------------------------------ page
    if web_args.host not in LOOPBACK:
        logger.warning(f"--host {web_args.host}: whoever reaches port {web_args.port} can ask")
    page = build_page(models, reward_model)
    logger.info(f"the chat page: http://{web_args.host}:{web_args.port}")
    page.launch(
        server_name=web_args.host,
        server_port=web_args.port,
        theme=THEME,
        css=CSS,
        js=JS,
        share=False,
        quiet=True,  # it would advise a public link
        ssr_mode=False,
        show_error=True,
        footer_links=[],
    )


if __name__ == "__main__":
    run_script(main)
