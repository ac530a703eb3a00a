"""Ask a trained model: the guide's four questions, a file of questions, or a chat.

Input: a base model, a base with a LoRA adapter of any stage, a merged model or a full checkpoint.
Output: replies on standard output, or `--output_file` with one JSON record for each record of `--data_file`.
The prompt is rendered by the template that training saved with the model, so the ids are those of training.

    python inference.py --base_model Qwen/Qwen2.5-3B-Instruct --lora_model outputs-sft-qwen2.5-3b/checkpoint-best
    python inference.py --base_model outputs-dpo-qwen2.5-3b-merged --interactive
    python inference.py --base_model ... --lora_model ... --data_file questions.txt --output_file replies.jsonl
"""

import io
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from loguru import logger
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from arguments import StageArgumentParser
from errors import UserError, run_script
from generation import Decoding, Reply, generate_replies, stream_reply
from model_loading import (
    Lineage,
    base_of,
    check_model_path,
    check_vocabulary,
    is_adapter,
    load_base_model,
    load_config,
    load_tokenizer,
    load_with_adapter,
    read_adapter_config,
    read_lineage,
)
from records import Unusable, find_files, load_dialogues
from template import ChatTemplate, Message
from tokenization import encode_prompt, load_chat_template, refuse_control_tokens, stop_token_ids
from training_run import start_log

# The guide's questions.
QUESTIONS = (
    "感冒了应该怎么办？",
    "高血压患者在饮食上需要注意什么？",
    "糖尿病有哪些早期症状？",
    "如何预防心血管疾病？",
)
NOTICE = "回答由模型生成，仅供研究，不构成医疗建议。 Answers are generated, for research only, and no medical advice."
SECONDS_BETWEEN_LINES = 30

# ---------------------------------------------------------------- arguments


@dataclass
class InferenceModelArguments:
    base_model: str = field(metadata={"help": "Hub name or folder of a model; an adapter's folder stands for both."})
    lora_model: str | None = field(default=None, metadata={"help": "Folder of a LoRA adapter trained on it."})
    template_name: str | None = field(
        default=None, metadata={"help": "Named prompt template of template.py instead of the tokenizer's own."}
    )
    torch_dtype: Literal["auto", "bfloat16", "float16", "float32"] = field(
        default="auto", metadata={"help": "Type of the weights; auto takes the checkpoint's. float32 without CUDA."}
    )
    load_in_8bit: bool = field(default=False, metadata={"help": "Base weights in 8 bit (bitsandbytes)."})
    load_in_4bit: bool = field(default=False, metadata={"help": "Base weights in 4-bit NF4 (bitsandbytes)."})
    device_map: str | None = field(default=None, metadata={"help": "auto splits the model over several GPUs."})
    flash_attn: bool = field(
        default=False, metadata={"help": "FlashAttention 2 if it is installed, otherwise PyTorch's SDPA."}
    )
    cache_dir: str | None = field(default=None, metadata={"help": "Folder for downloaded models."})
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Run Python code that the model's repository ships."}
    )
    allow_pickle_weights: bool = field(
        default=False, metadata={"help": "Also load .bin weights, which can run code when they are opened."}
    )

    def __post_init__(self):
        if self.load_in_8bit and self.load_in_4bit:
            raise UserError("--load_in_8bit and --load_in_4bit exclude each other: give one of them")


@dataclass
class InferenceArguments:
    interactive: bool = field(default=False, metadata={"help": "Chat, one line a turn; /clear forgets, /exit leaves."})
    data_file: str | None = field(
        default=None,
        metadata={"help": "Dialogues, whose last reply is generated anew, or .txt with one question a line."},
    )
    output_file: str | None = field(default=None, metadata={"help": "New .jsonl for the replies to --data_file."})
    system: str | None = field(
        default=None, metadata={"help": "System prompt; a dialogue of --data_file that has its own keeps it."}
    )
    batch_size: int = field(default=8, metadata={"help": "Prompts that are answered at a time."})
    seed: int = field(default=42, metadata={"help": "Of the random draws with --temperature above 0."})

    def __post_init__(self):
        if self.interactive and self.data_file:
            raise UserError("--interactive and --data_file exclude each other: give one of them")
        if bool(self.data_file) != bool(self.output_file):
            raise UserError("--data_file and --output_file belong together: give both or none")
        if self.batch_size < 1:
            raise UserError(f"--batch_size {self.batch_size}: give a number of prompts of at least 1")


# ---------------------------------------------------------------- questions


class Question(NamedTuple):
    """What to answer; `record` says it in the output file, `reference` is the reply that the data has."""

    messages: list[Message]
    tools: list[dict] | None
    record: dict
    reference: str | None
    source: str


def read_questions(data_file: str, system: str | None) -> list[Question]:
    """The questions of a .txt file, or the dialogues of record files without their last replies."""
    if Path(data_file).suffix.lower() == ".txt":
        return list(read_question_lines(Path(data_file), system))
    files, _ = find_files(data_file, "--data_file")
    questions = []
    for dialogue in load_dialogues(files)[0]:
        *messages, last = dialogue.messages
        if messages[0]["role"] != "system":
            messages = with_system(system, messages)
        record = {"messages": messages} | ({"tools": dialogue.tools} if dialogue.tools else {})
        questions.append(Question(messages, dialogue.tools, record, last["content"], dialogue.source))
    return questions


def read_question_lines(path: Path, system: str | None) -> Iterator[Question]:
    if not path.is_file():
        raise UserError(f"--data_file {path}: no such file")
    n_questions = 0
    for number, line in enumerate(path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        try:
            text = line.decode().strip()
        except UnicodeDecodeError as error:
            raise UserError(f"{path}:{number}: not UTF-8 (byte {error.start + 1}); convert the file") from None
        if text:
            n_questions += 1
            yield Question(ask(text, system), None, {"question": text}, None, f"{path}:{number}")
    if not n_questions:
        raise UserError(f"--data_file {path}: no question in it; write one a line")


def ask(question: str, system: str | None) -> list[Message]:
    return with_system(system, [{"role": "user", "content": question}])


def with_system(system: str | None, messages: list[Message]) -> list[Message]:
    return [{"role": "system", "content": system}, *messages] if system else messages


# ---------------------------------------------------------------- template and prompts

_QUESTION = {"role": "user", "content": "probe question"}
_PROBE = [_QUESTION, {"role": "assistant", "content": "probe answer"}, _QUESTION]
_PROBES = (_PROBE, with_system("probe system", _PROBE))


def choose_template(
    tokenizer: PreTrainedTokenizerBase, template_name: str | None, lineage: Lineage | None, trained: bool
) -> ChatTemplate:
    """The template that the model was trained with, or the named one where it renders the same.

    Args:
        lineage: the record of the training, which names a template where the tokenizer has none.
        trained: the tokenizer was saved by a training, so its template is the one that training used.

    Raises UserError for a name that would ask the model in another form than it was taught.
    """
    own_name = lineage.template or None if lineage and tokenizer.chat_template is None else None
    has_template = tokenizer.chat_template is not None or own_name is not None
    if template_name is None or not has_template:
        return load_chat_template(tokenizer, template_name or own_name)
    own_prompts = rendered_probes(load_chat_template(tokenizer, own_name))
    chat_template = load_chat_template(tokenizer, template_name)
    # Pretraining reads text without turns: any template may be tried on it.
    if trained and not (lineage and lineage.stage == "pt"):
        for own_prompt, prompt in zip(own_prompts, rendered_probes(chat_template), strict=True):
            if own_prompt is not None and own_prompt != prompt:
                raise UserError(
                    f"--template_name {template_name}: it asks in another form than the model was trained with: "
                    f"{_difference(prompt, own_prompt)}; leave the flag out"
                )
    return chat_template


def _difference(text: str | None, trained_text: str) -> str:
    """Where two renderings part."""
    if text is None:
        return "it refuses a system prompt"
    n_same = next((n for n in range(len(text)) if not trained_text.startswith(text[: n + 1])), len(text))
    return f"{text[n_same:]!r:.60} instead of {trained_text[n_same:]!r:.60}"


def rendered_probes(chat_template: ChatTemplate) -> list[str | None]:
    """Two short conversations as text; None for one that the template refuses (some have no system turn)."""
    texts = []
    for messages in _PROBES:
        try:
            texts.append(chat_template.prompt(messages))
        except UserError:
            texts.append(None)
    return texts


def encode_questions(
    tokenizer: PreTrainedTokenizerBase,
    chat_template: ChatTemplate,
    questions: Sequence[Question],
    context: int,
    max_new_tokens: int,
) -> list[list[int]]:
    """The prompts' ids; UserError, with file:line, for one that cannot be asked within the model's context."""
    prompts = []
    for question in questions:
        try:
            refuse_control_tokens(chat_template, question.messages, question.tools)
            prompts.append(encode_prompt(tokenizer, chat_template, question.messages, question.tools))
        except (Unusable, UserError) as error:
            raise UserError(f"{question.source}: {error.detail if isinstance(error, Unusable) else error}") from None
        if len(prompts[-1]) + max_new_tokens > context:
            raise UserError(
                f"{question.source}: its prompt of {len(prompts[-1])} tokens and --max_new_tokens {max_new_tokens} "
                f"exceed the model's context of {context} tokens; lower the flag or shorten the prompt"
            )
    return prompts


# ---------------------------------------------------------------- model


def load_model(base_model: str, model_args: InferenceModelArguments) -> PreTrainedModel:
    """The base, with the adapter if there is one, on the GPU if there is one."""
    torch_dtype, device_map = model_args.torch_dtype, model_args.device_map
    if not torch.cuda.is_available():
        given = [f"--torch_dtype {torch_dtype}"] if torch_dtype in ("bfloat16", "float16") else []
        given += [f"--device_map {device_map}"] if device_map else []
        logger.info("no CUDA device: float32 on the CPU" + (f" instead of {', '.join(given)}" if given else ""))
        torch_dtype, device_map = "float32", None
    options = {
        "torch_dtype": torch_dtype,
        "load_in_4bit": model_args.load_in_4bit,
        "load_in_8bit": model_args.load_in_8bit,
        "device_map": device_map,
        "flash_attn": model_args.flash_attn,
        "cache_dir": model_args.cache_dir,
        "trust_remote_code": model_args.trust_remote_code,
        "allow_pickle_weights": model_args.allow_pickle_weights,
    }
    if model_args.lora_model:
        model = load_with_adapter(base_model, model_args.lora_model, **options)
    else:
        model = load_base_model(base_model, flag="--base_model", **options)
    if torch.cuda.is_available() and not hasattr(model, "hf_device_map"):
        model.to("cuda")
    return model.eval()


def refuse_reward_model(config, model_args: InferenceModelArguments) -> None:
    """A reward model scores replies; loaded as a language model it would speak like its base, or at random."""
    lora_model = model_args.lora_model
    if lora_model and read_adapter_config(lora_model).task_type == "SEQ_CLS":
        raise UserError(f"--lora_model {lora_model}: a reward model, which scores replies and writes none")
    if any("SequenceClassification" in name for name in config.architectures or []):
        raise UserError(f"--base_model {model_args.base_model}: a reward model, which scores replies and writes none")


# ---------------------------------------------------------------- what is done with the replies


class Speaker(NamedTuple):
    """All that a reply needs besides its prompt."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    stop_ids: list[int]
    decoding: Decoding


def say(text: str = "", end: str = "\n") -> None:
    sys.stdout.write(text + end)
    sys.stdout.flush()


def print_replies(speaker: Speaker, questions: Sequence[Question], prompts: list[list[int]], batch_size: int) -> None:
    """Ask and print, question by question."""
    say(NOTICE)
    replies = generate_replies(*speaker[:2], prompts, *speaker[2:], batch_size=batch_size)
    for question, reply in zip(questions, replies, strict=True):
        say(f"\n{'-' * 60}\n问：{question.messages[-1]['content']}\n答：{reply.text}")
        say_if_cut(reply, speaker.decoding)


def say_if_cut(reply: Reply, decoding: Decoding) -> None:
    if not reply.ended:
        say(f"[cut at --max_new_tokens {decoding.max_new_tokens}]")


def open_partial(output_file: str | None) -> Path | None:
    """The empty file that the replies go to until all are there; UserError if the place cannot be written to."""
    if output_file is None:
        return None
    path = Path(output_file)
    if path.exists():
        raise UserError(f"--output_file {path}: it exists and is not written over; name another file or move it")
    partial = path.with_name(f"{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text("", encoding="utf-8")
    except OSError as error:
        raise UserError(f"--output_file {path}: it cannot be written ({error.strerror})") from error
    return partial


def write_replies(
    speaker: Speaker,
    questions: Sequence[Question],
    prompts: list[list[int]],
    batch_size: int,
    partial: Path,
    output_file: Path,
) -> None:
    """Answer in parts of some batches, each written when it is done: what a killed run leaves is whole lines."""
    logger.info(NOTICE)
    part = 32 * batch_size
    n_ended = 0
    with partial.open("w", encoding="utf-8") as file, progress_of(len(prompts)) as show:
        for start in range(0, len(prompts), part):
            replies = generate_replies(
                *speaker[:2],
                prompts[start : start + part],
                *speaker[2:],
                batch_size=batch_size,
                on_progress=lambda done, start=start: show(start + done),
            )
            for question, reply in zip(questions[start : start + part], replies, strict=True):
                record = question.record | {"reference": question.reference, "output": reply.text, "ended": reply.ended}
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
                n_ended += reply.ended
            file.flush()
    partial.rename(output_file)
    logger.info(f"{output_file}: {len(prompts)} replies, of which {n_ended} ended by themselves")


@contextmanager
def progress_of(n_total: int) -> Iterator[Callable[[int], None]]:
    """A function that takes the number of replies done: a bar on a terminal, otherwise a line now and then."""
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


def chat(speaker: Speaker, chat_template: ChatTemplate, system: str | None, context: int) -> None:
    """Read a line, stream the reply, remember both; `/clear` forgets, `/exit` or the end of input leaves."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")  # one wrong byte does not end a chat
    if sys.stdin.isatty() and find_spec("readline"):
        import_module("readline")  # gives input() a line that can be edited
    say(f"{NOTICE}\n/clear 清空对话 forgets, /exit 退出 leaves")
    turns: list[Message] = []
    while (line := read_line()) is not None:
        question = line.strip()
        if question == "/exit":
            break
        if question == "/clear":
            turns = []
            say("对话已清空 The conversation is forgotten.")
            continue
        if question.startswith("/"):
            say(f"{question}: 没有这个命令 no such command; /clear, /exit")
            continue
        if question:
            turns = answer(speaker, chat_template, system, context, [*turns, {"role": "user", "content": question}])


def read_line() -> str | None:
    """The user's next line, None at the end of input; what comes from a file or pipe is printed too."""
    if sys.stdin.isatty():
        try:
            return input("\n问：")
        except EOFError:
            say()
            return None
    line = sys.stdin.readline()
    if line.strip():
        say(f"\n问：{line.strip()}")
    return line or None


def answer(
    speaker: Speaker, chat_template: ChatTemplate, system: str | None, context: int, turns: list[Message]
) -> list[Message]:
    """Stream the reply to the last turn; the turns to go on with, without it where it cannot be asked."""
    try:
        refuse_control_tokens(chat_template, turns[-1:], None)
    except Unusable as unusable:
        say(unusable.detail.replace("message 1 (user)", "it"))
        return turns[:-1]
    given_turns = turns
    room = context - speaker.decoding.max_new_tokens
    while len(prompt := encode_prompt(speaker.tokenizer, chat_template, with_system(system, turns))) > room:
        if len(turns) == 1:
            say(f"[too long: {len(prompt)} tokens, where the context and --max_new_tokens leave {max(room, 0)}]")
            return given_turns[:-1]
        turns = turns[2:]
    if len(turns) < len(given_turns):
        say(
            f"[the context of {context} tokens is full: the oldest {len(given_turns) - len(turns)} turns are forgotten]"
        )
    say("答：", end="")
    model, tokenizer, stop_ids, decoding = speaker
    reply = stream_reply(model, tokenizer, prompt, stop_ids, decoding, on_text=lambda text: say(text, end=""))
    say()
    say_if_cut(reply, decoding)
    return [*turns, {"role": "assistant", "content": reply.text}]


# ---------------------------------------------------------------- main


def main(argv: Sequence[str] | None = None) -> None:
    # ------------------------------------------------------------ arguments
    parser = StageArgumentParser([InferenceModelArguments, InferenceArguments, Decoding])
    model_args, inference_args, decoding = parser.parse(argv)
    check_model_path(model_args.base_model, "--base_model", model_args.allow_pickle_weights)
    if model_args.lora_model:
        if is_adapter(model_args.base_model):
            raise UserError(
                f"--base_model {model_args.base_model}: an adapter too; a later stage's adapter holds what came "
                f"before, so give the base: --base_model {base_of(model_args.base_model)}"
            )
    elif is_adapter(model_args.base_model):
        model_args.lora_model = model_args.base_model
    base_model = base_of(model_args.base_model)

    # ------------------------------------------------------------ run
    start_log()
    for note in parser.notes:
        logger.info(note)
    set_seed(inference_args.seed)

    # ------------------------------------------------------------ tokenizer and template
    hub_options = {"cache_dir": model_args.cache_dir, "trust_remote_code": model_args.trust_remote_code}
    config = load_config(base_model, flag="--base_model", **hub_options)
    refuse_reward_model(config, model_args)
    # An adapter's own tokenizer has the template it was trained with; another tool's adapter may have none.
    lora_model = model_args.lora_model
    has_tokenizer = lora_model is not None and Path(lora_model, "tokenizer_config.json").is_file()
    tokenizer = load_tokenizer(lora_model if has_tokenizer else base_model, flag="--base_model", **hub_options)
    lineage = read_lineage(lora_model or base_model)
    chat_template = choose_template(
        tokenizer, model_args.template_name, lineage, trained=has_tokenizer or lineage is not None
    )
    context = getattr(config.get_text_config(), "max_position_embeddings", None) or sys.maxsize

    # ------------------------------------------------------------ data
    if inference_args.data_file:
        questions = read_questions(inference_args.data_file, inference_args.system)
    else:  # a chat asks none of its own
        fixed = () if inference_args.interactive else QUESTIONS
        questions = [Question(ask(text, inference_args.system), None, {}, None, text) for text in fixed]
    prompts = encode_questions(tokenizer, chat_template, questions, context, decoding.max_new_tokens)
    partial = open_partial(inference_args.output_file)

    # ------------------------------------------------------------ model
    model = load_model(base_model, model_args)
    check_vocabulary(tokenizer, model)
    speaker = Speaker(model, tokenizer, stop_token_ids(tokenizer, chat_template), decoding)

    # ------------------------------------------------------------ replies
    try:
        if inference_args.interactive:
            chat(speaker, chat_template, inference_args.system, context)
        elif partial is not None:
            write_replies(
                speaker, questions, prompts, inference_args.batch_size, partial, Path(inference_args.output_file)
            )
        else:
            print_replies(speaker, questions, prompts, inference_args.batch_size)
    except torch.cuda.OutOfMemoryError as error:
        raise UserError("out of GPU memory; in this order: a smaller --batch_size, --load_in_4bit True") from error
    except KeyboardInterrupt:
        say()
        if not inference_args.interactive:
            logger.warning(f"interrupted{f'; the replies so far are in {partial}' if partial else ''}")
            sys.exit(130)


if __name__ == "__main__":
    run_script(main)
