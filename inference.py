"""Ask trained models: the guide's four questions, a file of questions, or a chat.

Input: a base model, a base with a LoRA adapter of any stage, a merged model or a full checkpoint; several with
--compare, whose adapters share one base in memory.
Output: replies on standard output, or `--output_file` with one JSON record for each record of `--data_file`; with
--reward_model each has its score. --show_thoughts prints thoughts; in the file each stands in a key of its own.
The prompt is rendered by the template that training saved with the model, so the ids are those of training.

    python inference.py --base_model Qwen/Qwen2.5-3B-Instruct --lora_model outputs-sft-qwen2.5-3b/checkpoint-best
    python inference.py --base_model outputs-dpo-qwen2.5-3b-merged --interactive
    python inference.py --base_model ... --lora_model ... --data_file questions.txt --output_file replies.jsonl
    python inference.py --base_model Qwen/Qwen2.5-3B-Instruct --compare base outputs-sft-qwen2.5-3b/checkpoint-best \
        outputs-dpo-qwen2.5-3b/checkpoint-best --reward_model outputs-rm-qwen2.5-3b/checkpoint-best
"""

import io
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple, TextIO

import medtune.libraries  # noqa: F401 - first: it imports the libraries in half of their time

# isort: split
import torch
from loguru import logger
from tqdm import tqdm
from transformers import set_seed

from medtune.arguments import StageArgumentParser
from medtune.errors import Unusable, UserError, run_script
from medtune.models.chat_models import (
    NOTICE,
    ChatModel,
    ChatModelArguments,
    RewardModel,
    describe_models,
    load_weights,
)
from medtune.models.generation import Decoding, Reply, generate_replies, stream_reply
from medtune.output_files import new_text_file
from medtune.reading.conversations import turns_to_answer
from medtune.reading.files import read_raw
from medtune.reading.finding import find_files
from medtune.reading.keys import Reading, split_keys
from medtune.reading.messages import Message
from medtune.reading.readers import load_prompts
from medtune.reading.thoughts import ReplySplitter, split_reply, with_opening
from medtune.reading.tokenization import encode_recent
from medtune.training.log import start_log

# The guide's questions.
QUESTIONS = (
    "感冒了应该怎么办？",
    "高血压患者在饮食上需要注意什么？",
    "糖尿病有哪些早期症状？",
    "如何预防心血管疾病？",
)
SECONDS_BETWEEN_LINES = 30

# ---------------------------------------------------------------- arguments


@dataclass
class InferenceArguments:
    compare: list[str] | None = field(
        default=None,
        metadata={"help": "Ask several models: `base`, folders of adapters on --base_model or of whole models."},
    )
    interactive: bool = field(default=False, metadata={"help": "Chat, one line a turn; /clear forgets, /exit leaves."})
    data_file: str | None = field(
        default=None,
        metadata={"help": "Prompts, dialogues, whose last reply is generated anew, or .txt with one question a line."},
    )
    ignore_keys: str | None = field(
        default=None, metadata={"help": "Keys of --data_file's records to read as if absent, with commas: images."}
    )
    output_file: str | None = field(default=None, metadata={"help": "New .jsonl for the replies to --data_file."})
    system: str | None = field(
        default=None, metadata={"help": "System prompt; a dialogue of --data_file that has its own keeps it."}
    )
    show_thoughts: bool = field(
        default=False, metadata={"help": "Print what the model thinks before it answers; a file holds it anyway."}
    )
    batch_size: int = field(default=8, metadata={"help": "Prompts that are answered at a time."})
    seed: int = field(default=42, metadata={"help": "Of the random draws with --temperature above 0."})

    def __post_init__(self):
        if self.interactive and self.compare:
            raise UserError("--interactive is a chat with one model; --compare asks questions: give one of them")
        if self.interactive and self.data_file:
            raise UserError("--interactive and --data_file exclude each other: give one of them")
        if bool(self.data_file) != bool(self.output_file):
            raise UserError("--data_file and --output_file belong together: give both or none")
        if self.batch_size < 1:
            raise UserError(f"--batch_size {self.batch_size}: give a number of prompts of at least 1")


# ---------------------------------------------------------------- questions


class Question(NamedTuple):
    """A question to answer; `record` goes into the output file, `reference` is the data's own reply."""

    messages: list[Message]
    tools: list[dict] | None
    record: dict
    reference: str | None
    source: str


def read_questions(data_file: str, system: str | None, ignore_keys: str | None = None) -> list[Question]:
    """The questions of a .txt file, or of record files: their prompts, and dialogues without the last reply."""
    if Path(data_file).suffix.lower() == ".txt":
        return list(read_question_lines(Path(data_file), system))
    files, _ = find_files(data_file, "--data_file")
    questions = []
    dialogues, report = load_prompts(files, None, Reading(split_keys(ignore_keys)))
    for note in report.notes:
        logger.info(note)
    for dialogue in dialogues:
        messages, reference = dialogue.messages, None
        if messages[-1]["role"] == "assistant":
            *messages, last = messages
            reference = last["content"]
        if messages[0]["role"] != "system":
            messages = with_system(system, messages)
        record = {"messages": messages} | ({"tools": dialogue.tools} if dialogue.tools else {})
        questions.append(Question(messages, dialogue.tools, record, reference, dialogue.source))
    return questions


def read_question_lines(path: Path, system: str | None) -> Iterator[Question]:
    if not path.is_file():
        raise UserError(f"--data_file {path}: no such file")
    n_questions = 0
    for source, record in read_raw(path):
        if isinstance(record, Unusable):
            raise UserError(f"{source}: {record.reason}: {record.detail}")
        n_questions += 1
        text = record["text"].strip()
        yield Question(ask(text, system), None, {"question": text}, None, source)
    if not n_questions:
        raise UserError(f"--data_file {path}: no question in it; write one a line")


def ask(question: str, system: str | None) -> list[Message]:
    return with_system(system, [{"role": "user", "content": question}])


def with_system(system: str | None, messages: list[Message]) -> list[Message]:
    return [{"role": "system", "content": system}, *messages] if system else messages


# ---------------------------------------------------------------- prompts


def encode_questions(
    chat_model: ChatModel, questions: Sequence[Question], max_new_tokens: int, reports_cuts: bool = True
) -> list[list[int]]:
    """The prompts' ids, without the oldest exchanges if the context is too short for all.

    Raises UserError, with file:line, for a question that cannot be encoded.
    """
    prompts = []
    context = chat_model.context
    for question in questions:
        try:
            ids, n_left_out = encode_recent(
                chat_model.tokenizer,
                chat_model.chat_template,
                question.messages,
                context - max_new_tokens,
                question.tools,
            )
        except Unusable as unusable:
            hint = (
                f" (the model's context of {context} tokens less --max_new_tokens {max_new_tokens}); lower the flag or "
                "shorten the prompt"
                if unusable.reason == "prompt too long"
                else ""
            )
            raise UserError(f"{question.source}: {unusable.detail}{hint}") from None
        except UserError as error:
            raise UserError(f"{question.source}: {error}") from None
        if n_left_out and reports_cuts:
            logger.warning(
                f"{question.source}: over the context of {context} tokens: its oldest {n_left_out} turns are left out"
            )
        prompts.append(ids)
    return prompts


# ---------------------------------------------------------------- what is done with the replies


class Asker(NamedTuple):
    """Who is asked, and how."""

    models: list[ChatModel]
    reward_model: RewardModel | None
    decoding: Decoding
    batch_size: int
    seed: int
    show_thoughts: bool = False

    def ask(
        self,
        questions: Sequence[Question],
        prompts: Sequence[list[list[int]]],
        seed: int,
        on_progress: Callable[[int], None] | None = None,
    ) -> list[list[tuple[Reply, float | None]]]:
        """For each question the reply of each model and its score.

        Args:
            prompts: for each model those of its own template.
            seed: of the random draws.
            on_progress: called with the number of replies done, of all models together.
        """
        columns = []
        for chat_model, own_prompts in zip(self.models, prompts, strict=True):
            n_before = len(columns) * len(questions)
            set_seed(seed)  # each model draws the same random numbers
            with chat_model.in_use() as model:
                replies = generate_replies(
                    model,
                    chat_model.tokenizer,
                    own_prompts,
                    chat_model.stop_ids,
                    self.decoding,
                    self.batch_size,
                    on_progress and (lambda done, n_before=n_before: on_progress(n_before + done)),
                )
            replies = [whole_reply(chat_model, reply) for reply in replies]
            columns.append(list(zip(replies, self.scores(questions, replies), strict=True)))
        return list(map(list, zip(*columns, strict=True)))

    def scores(self, questions: Sequence[Question], replies: Sequence[Reply]) -> list[float | None]:
        if self.reward_model is None:
            return [None] * len(replies)
        rows = [
            self.reward_model.encode(question.messages, reply.text, reply.ended, question.tools)
            for question, reply in zip(questions, replies, strict=True)
        ]
        return self.reward_model.score(rows, self.batch_size)


def whole_reply(chat_model: ChatModel, reply: Reply) -> Reply:
    return replace(reply, text=with_opening(reply.text, chat_model.chat_template.opens_thought))


def print_text(text: str = "", end: str = "\n") -> None:
    sys.stdout.write(text + end)
    sys.stdout.flush()


def print_replies(asker: Asker, questions: Sequence[Question], prompts: Sequence[list[list[int]]]) -> None:
    """Ask and print, question by question, the models one below the other."""
    print_text(NOTICE)
    answers = asker.ask(questions, prompts, asker.seed)
    for question, row in zip(questions, answers, strict=True):
        print_text(f"\n{'-' * 60}\n问：{question.messages[-1]['content']}")
        for chat_model, (reply, score) in zip(asker.models, row, strict=True):
            thought, answer, _ = split_reply(reply.text)
            name = f"[{chat_model.name}] " if len(row) > 1 else ""
            if thought and asker.show_thoughts:
                print_text(f"{name}思考：{thought}")
            print_text(f"{name}答：{answer}")
            print_if_cut(reply, asker.decoding)
            if score is not None:
                print_text(f"[score {score:.3f}]")
    n_thoughts = sum(bool(split_reply(reply.text).thought) for row in answers for reply, _ in row)
    if n_thoughts and not asker.show_thoughts:
        print_text(f"\n[{n_thoughts} replies have a thought, which --show_thoughts True prints]")
    if asker.reward_model is not None:
        print_text(f"\n{'-' * 60}")
        for chat_model, column in zip(asker.models, zip(*answers, strict=True), strict=True):
            print_text(f"mean score of {chat_model.name}: {sum(score for _, score in column) / len(column):.3f}")


def print_if_cut(reply: Reply, decoding: Decoding) -> None:
    if not reply.ended:
        where = "" if split_reply(reply.text).is_closed else ", inside its thought"
        print_text(f"[cut at --max_new_tokens {decoding.max_new_tokens}{where}]")


def write_replies(
    asker: Asker,
    questions: Sequence[Question],
    prompts: Sequence[list[list[int]]],
    file: TextIO,
) -> str:
    """Answer some batches at a time and write them when done, so that a killed run leaves only whole lines.

    Returns how many replies there are.
    """
    logger.info(NOTICE)
    part, n_models = 32 * asker.batch_size, len(asker.models)
    n_ended = 0
    with progress_of(n_models * len(questions)) as show:
        for start in range(0, len(questions), part):
            some = questions[start : start + part]
            answers = asker.ask(
                some,
                [own_prompts[start : start + part] for own_prompts in prompts],
                asker.seed + start,
                on_progress=lambda done, start=start: show(n_models * start + done),
            )
            for question, row in zip(some, answers, strict=True):
                outputs = [describe_reply(reply, score) for reply, score in row]
                if n_models > 1:
                    named = zip(asker.models, outputs, strict=True)
                    outputs = [{"replies": [{"model": chat_model.name} | reply for chat_model, reply in named]}]
                record = question.record | {"reference": question.reference} | outputs[0]
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
                n_ended += sum(reply.ended for reply, _ in row)
            file.flush()
    return f"{n_models * len(questions)} replies, of which {n_ended} ended by themselves"


def describe_reply(reply: Reply, score: float | None) -> dict:
    """What the output file holds of a reply: `output` is its answer, `thought` what was thought before, if anything."""
    thought, answer, _ = split_reply(reply.text)
    described = {"output": answer} | ({"thought": thought} if thought else {}) | {"ended": reply.ended}
    return described | ({} if score is None else {"score": score})


@contextmanager
def progress_of(n_total: int) -> Iterator[Callable[[int], None]]:
    """A function to call with the number of replies done; it shows a bar on a terminal, otherwise log lines."""
    start = last_line = time.monotonic()

    def log_line(n_done: int) -> None:
        nonlocal last_line
        now = time.monotonic()
        if now - last_line >= SECONDS_BETWEEN_LINES:
            last_line = now
            logger.info(
                f"{n_done} of {n_total} replies, about {(now - start) / n_done * (n_total - n_done):.0f} s left"
            )

    if not sys.stderr.isatty():
        yield log_line
        return
    with tqdm(total=n_total, unit="reply") as bar:
        yield lambda n_done: bar.update(n_done - bar.n)


# ---------------------------------------------------------------- chat


def chat(asker: Asker, system: str | None) -> None:
    """Chat line by line with streamed replies; `/clear` starts anew, `/exit` or the end of input leaves."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")  # one wrong byte does not end a chat
    if sys.stdin.isatty() and find_spec("readline"):
        import_module("readline")  # gives input() a line that can be edited
    print_text(f"{NOTICE}\n/clear 清空对话 forgets, /exit 退出 leaves")
    turns: list[Message] = []
    while (line := read_line()) is not None:
        question = line.strip()
        if question == "/exit":
            break
        if question == "/clear":
            turns = []
            print_text("对话已清空 The conversation is forgotten.")
            continue
        if question.startswith("/"):
            print_text(f"{question}: 没有这个命令 no such command; /clear, /exit")
            continue
        if question:
            turns = answer(asker, system, [*turns, {"role": "user", "content": question}])


def read_line() -> str | None:
    """The user's next line, None at the end of input; input from a file or pipe is echoed."""
    if sys.stdin.isatty():
        try:
            return input("\n问：")
        except EOFError:
            print_text()
            return None
    line = sys.stdin.readline()
    if line.strip():
        print_text(f"\n问：{line.strip()}")
    return line or None


class ReplyPrinter:
    """Prints a reply while it is written: its thought or, unless that is shown, that there is one; then its answer."""

    def __init__(self, opened: bool, show_thoughts: bool):
        self.splitter = ReplySplitter(opened)
        self.show_thoughts = show_thoughts
        self.part = ""  # what is being printed

    def add(self, text: str) -> None:
        self._print(*self.splitter.add(text))

    def end(self) -> None:
        self._print(*self.splitter.end())
        self._begin("答")
        print_text()

    def _print(self, thought: str, answer: str) -> None:
        if thought:
            self._begin("思考")
            print_text(thought if self.show_thoughts else "", end="")
        if answer:
            self._begin("答")
            print_text(answer, end="")

    def _begin(self, part: str) -> None:
        if part != self.part:
            hidden = "…… (--show_thoughts True)" if part == "思考" and not self.show_thoughts else ""
            print_text("\n" * bool(self.part) + f"{part}：{hidden}", end="")
            self.part = part


def answer(asker: Asker, system: str | None, turns: list[Message]) -> list[Message]:
    """Stream the reply to the last turn. Returns the turns with it, or without the last one if it failed."""
    (chat_model,) = asker.models
    tokenizer, chat_template, decoding = chat_model.tokenizer, chat_model.chat_template, asker.decoding
    try:
        room = chat_model.context - decoding.max_new_tokens
        messages = turns_to_answer(with_system(system, turns))
        prompt, n_left_out = encode_recent(tokenizer, chat_template, messages, room)
    except Unusable as unusable:
        print_text(f"[{unusable.detail}]")
        return turns[:-1]
    if n_left_out:
        print_text(f"[the context of {chat_model.context} tokens is full: the oldest {n_left_out} turns are forgotten]")
        turns = turns[n_left_out:]
    printer = ReplyPrinter(chat_template.opens_thought, asker.show_thoughts)
    with chat_model.in_use() as model:
        reply = stream_reply(model, tokenizer, prompt, chat_model.stop_ids, decoding, printer.add)
    printer.end()
    reply = whole_reply(chat_model, reply)
    print_if_cut(reply, decoding)
    question = Question(with_system(system, turns), None, {}, None, "")
    for score in asker.scores([question], [reply]):
        if score is not None:
            print_text(f"[score {score:.3f}]")
    # A reply without an answer is not remembered: training never shows one.
    return [*turns, {"role": "assistant", "content": reply.text}] if split_reply(reply.text).answer else turns[:-1]


# ---------------------------------------------------------------- main


def main(argv: Sequence[str] | None = None) -> None:
    # ------------------------------------------------------------ arguments
    parser = StageArgumentParser([ChatModelArguments, InferenceArguments, Decoding])
    model_args, inference_args, decoding = parser.parse(argv)

    # ------------------------------------------------------------ run
    start_log()
    for note in parser.notes:
        logger.info(note)
    set_seed(inference_args.seed)

    # ------------------------------------------------------------ tokenizers and templates
    models = describe_models(inference_args.compare, "--compare", model_args)

    # ------------------------------------------------------------ data
    if inference_args.data_file:
        questions = read_questions(inference_args.data_file, inference_args.system, inference_args.ignore_keys)
    else:  # a chat asks none of its own
        fixed = () if inference_args.interactive else QUESTIONS
        questions = [Question(ask(text, inference_args.system), None, {}, None, text) for text in fixed]
    prompts = [
        encode_questions(chat_model, questions, decoding.max_new_tokens, reports_cuts=chat_model is models[0])
        for chat_model in models
    ]
    output_file = inference_args.output_file
    output = (
        new_text_file(Path(output_file), "--output_file", overwrite=None, keep_partial=True)
        if output_file
        else nullcontext()
    )
    with output as file:
        # -------------------------------------------------------- models
        reward_model = RewardModel(model_args.reward_model, model_args) if model_args.reward_model else None
        load_weights(models, model_args)
        asker = Asker(
            *(models, reward_model, decoding, inference_args.batch_size, inference_args.seed),
            show_thoughts=inference_args.show_thoughts,
        )

        # -------------------------------------------------------- replies
        try:
            if inference_args.interactive:
                chat(asker, inference_args.system)
            elif file is not None:
                summary = write_replies(asker, questions, prompts, file)
            else:
                print_replies(asker, questions, prompts)
        except torch.cuda.OutOfMemoryError as error:
            raise UserError("out of GPU memory; in this order: a smaller --batch_size, --load_in_4bit True") from error
        except KeyboardInterrupt:
            print_text()
            if not inference_args.interactive:
                logger.warning(f"interrupted{f'; the replies so far are in {output_file}.partial' if file else ''}")
                sys.exit(130)
    if output_file:
        logger.info(f"{output_file}: {summary}")


if __name__ == "__main__":
    run_script(main)
