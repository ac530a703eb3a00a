"""Measure trained models on held-out records, alone or side by side, and say whether one is better, the same or worse.

Input: files of `--test_file`, each of one form, which decides what is measured:
  dialogues   {"conversations": [...]}: the model answers the last question and the reply is compared with the
              reference; `names` lists what a right answer may call its subject
  safety      dialogues with "category": emergency, refusal or about: rates of safe replies besides
  exam        {"question", "option": {"A": ...}, "answer": "A"}: by the likelihood of the letters, and by what it writes
Output: `--output_dir` with predictions.jsonl (a line for each record and model) and metrics.json (figures with 95 %
intervals, differences from the first model, prompts, decoding, overlap of test and training data).
The prompts are those of training. `--predictions` computes the figures again from a predictions.jsonl, without a model.

    python scripts/evaluate_model.py --base_model MODEL --lora_model ADAPTER --test_file data/eval/questions.jsonl
    python scripts/evaluate_model.py --base_model MODEL --compare base SFT_ADAPTER DPO_ADAPTER --reward_model RM \\
        --test_file data/eval/questions.jsonl data/eval/exam.jsonl data/eval/safety.jsonl
"""

import hashlib
import json
import math
import random
import re
import sys
import time
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

# Before the libraries: it keeps one of them from a misleading line.
from medtune.errors import UserError, run_script

# isort: split
import torch
from loguru import logger
from tqdm import tqdm
from transformers import set_seed

from medtune.arguments import StageArgumentParser
from medtune.errors import Unusable
from medtune.measuring.intervals import bootstrap_interval, paired_bootstrap, wilson_interval
from medtune.measuring.text_metrics import (
    answer_of,
    bleu_4,
    chrf,
    distinct_n,
    invents_dose,
    names_one_of,
    refuses,
    refuses_or_warns,
    repetition_rate,
    rouge,
    sends_to_hospital,
)
from medtune.models.chat_models import (
    ChatModel,
    ChatModelArguments,
    RewardModel,
    describe_models,
    load_weights,
)
from medtune.models.generation import Decoding, generate_replies
from medtune.models.lineage import read_lineage
from medtune.output_files import new_folder
from medtune.reading.conversations import to_dialogue
from medtune.reading.encoding import encode_exchange, encode_recent
from medtune.reading.files import read_raw
from medtune.reading.finding import find_files
from medtune.reading.near_duplicates import Known
from medtune.reading.raw_files import misnamed, read_start
from medtune.reading.record_sets import read_dialogues, read_pairs
from medtune.training.log import start_log

SAFETY = ("emergency", "refusal", "about")
KEPT = ("id", "aspect", "category", "names", "exam_subject")
SECONDS_BETWEEN_LINES = 10
NEAR = 0.8  # share of character trigrams in common from which a training question counts as a copy of a test question
# Figure: whether more of it is better; None where neither is.
FIGURES = {
    "perplexity": False,
    "rouge_1": True,
    "rouge_2": True,
    "rouge_l": True,
    "bleu_4": True,
    "chrf": True,
    "named": True,
    "exam_accuracy": True,
    "exam_accuracy_written": True,
    "exam_unparsed": False,
    "sends_to_hospital": True,
    "refuses_or_warns": True,
    "over_refusal": False,
    "invents_dose": False,
    "reward": True,
    "beats_reference": True,
    "ended": True,
    "repetition": False,
    "length": None,
    "distinct_2": None,
}
RATES = ("named", "exam_accuracy", "exam_accuracy_written", "exam_unparsed", "sends_to_hospital", "refuses_or_warns")
RATES += ("over_refusal", "invents_dose", "ended")

# ---------------------------------------------------------------- arguments


@dataclass
class EvaluatedModelArguments(ChatModelArguments):
    base_model: str | None = field(
        default=None, metadata={"help": "Hub name or folder of a model; an adapter's folder stands for both."}
    )


@dataclass
class EvaluationArguments:
    test_file: list[str] | None = field(
        default=None,
        metadata={"help": "Files or folders: dialogues with references, safety items (with a category), exams."},
    )
    compare: list[str] | None = field(
        default=None,
        metadata={
            "help": "Measure several models, the others against the first: `base`, folders of adapters on --base_model "
            "or of whole models."
        },
    )
    predictions: str | None = field(
        default=None, metadata={"help": "An earlier predictions.jsonl, instead of a model and test files."}
    )
    num_samples: int | None = field(default=None, metadata={"help": "At most so many records a file, by the seed."})
    output_dir: str = field(default="outputs-eval", metadata={"help": "New folder for the results."})
    overwrite: bool = field(default=False, metadata={"help": "Replace what an earlier run left in --output_dir."})
    batch_size: int = field(default=16, metadata={"help": "Prompts that are answered at a time."})
    seed: int = field(default=42, metadata={"help": "Of --num_samples and of draws with --temperature above 0."})

    def __post_init__(self):
        if self.num_samples is not None and self.num_samples < 1:
            raise UserError(f"--num_samples {self.num_samples}: give at least 1")
        if self.batch_size < 1:
            raise UserError(f"--batch_size {self.batch_size}: give a number of prompts of at least 1")


def check_together(model_args: EvaluatedModelArguments, eval_args: EvaluationArguments) -> None:
    """Refuse flags that contradict each other."""
    if bool(eval_args.predictions) == bool(model_args.base_model):
        raise UserError("--base_model and --predictions: give one of them")
    if model_args.base_model and not eval_args.test_file:
        raise UserError("--test_file is missing: name the files of dialogues, safety items or exams")
    of_models = {"--lora_model": model_args.lora_model, "--reward_model": model_args.reward_model}
    of_models |= {f"--{name}": getattr(eval_args, name) for name in ("test_file", "compare", "num_samples")}
    if eval_args.predictions and any(of_models.values()):
        given = ", ".join(flag for flag, value in of_models.items() if value)
        raise UserError(f"--predictions needs no model and takes all records: leave {given} out")
    if eval_args.compare and model_args.lora_model:
        raise UserError("--lora_model and --compare exclude each other: name the adapter after --compare")


# ---------------------------------------------------------------- test records


def read_tests(paths: Sequence[str], num_samples: int | None, seed: int) -> tuple[list[dict], dict[str, dict]]:
    """The records to measure, each with `file`, `kind` and `source`, and what is known of each file.

    Raises UserError with file:line for a record of no form.
    """
    files = dict.fromkeys(file for path in paths for file in find_files(path, "--test_file")[0])
    tests, facts = [], {}
    for file in files:
        found, n_left_out = [], 0
        for source, record in read_raw(file):
            try:
                if isinstance(record, Unusable):
                    raise record
                test = to_test(record, source)
            except Unusable as unusable:
                raise UserError(f"{source}: {unusable.reason}: {unusable.detail}") from None
            if test is None:
                n_left_out += 1
            else:
                found.append({"file": str(file), **test, "source": source})
        if n_left_out:
            logger.warning(f"{file}: {n_left_out} questions with several right answers are left out")
        if not found:
            raise UserError(f"--test_file {file}: no record to measure in it")
        n_read = len(found)
        if num_samples is not None and num_samples < n_read:
            found = [found[n] for n in sorted(random.Random(seed).sample(range(n_read), num_samples))]
        facts[str(file)] = {"records": n_read, "measured": len(found), "sha256": sha256_of(file)}
        tests += found
    return tests, facts


def sha256_of(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def to_test(record: object, source: str) -> dict | None:
    """A record as what it is measured by; None for an exam question with several right answers."""
    options = record.get("option") or record.get("options") if isinstance(record, dict) else None
    extras = {key: record[key] for key in KEPT if key in record} if isinstance(record, dict) else {}
    if not options:
        dialogue = to_dialogue(record, source)
        kind = "safety" if extras.get("category") in SAFETY else "dialogue"
        return extras | {"kind": kind, "messages": dialogue.messages, "tools": dialogue.tools}
    answer, question = record.get("answer"), record.get("question")
    is_text = isinstance(question, str) and question and isinstance(answer, str)
    if not isinstance(options, dict) or not is_text:
        raise Unusable("broken exam question", 'it needs "question", "option" as an object of letters, and "answer"')
    options = {letter: str(text) for letter, text in options.items() if text}
    answer = answer.strip()
    if len(answer) > 1 and set(answer) <= options.keys():
        return None
    if answer not in options:
        raise Unusable("broken exam question", f"the answer {answer!r} is none of {', '.join(options)}")
    messages = [{"role": "user", "content": exam_prompt(question, options)}]
    return extras | {"kind": "exam", "messages": messages, "tools": None, "options": options, "answer": answer}


def exam_prompt(question: str, options: dict[str, str]) -> str:
    """The question with its options, in its own language."""
    is_chinese = re.search("[\u4e00-\u9fff]", question)
    asked = "请直接回答正确选项的字母。" if is_chinese else "Answer with the letter of the right option."
    return "\n".join([question, *(f"{letter}. {text}" for letter, text in options.items()), asked])


# ---------------------------------------------------------------- asking a model


def encode_prompts(chat_model: ChatModel, tests: Sequence[dict], max_new_tokens: int) -> list[list[int]]:
    """The prompts' ids; UserError, with file:line, for a question that cannot be asked."""
    prompts, n_shortened = [], 0
    room = chat_model.context - max_new_tokens
    for test in tests:
        asked = test["messages"] if test["kind"] == "exam" else test["messages"][:-1]
        try:
            ids, n_left_out = encode_recent(chat_model.tokenizer, chat_model.chat_template, asked, room, test["tools"])
        except Unusable as unusable:
            raise UserError(f"{test['source']}: {unusable.detail}; lower --max_new_tokens or shorten it") from None
        except UserError as error:
            raise UserError(f"{test['source']}: {error}") from None
        n_shortened += n_left_out > 0
        prompts.append(ids)
    if n_shortened:
        logger.warning(
            f"{n_shortened} dialogues exceed the context of {chat_model.name}: their oldest turns are left out"
        )
    return prompts


def reply_ids(chat_model: ChatModel, messages: list[dict], reply: str) -> list[int]:
    """What the model should write after the prompt, its end token included."""
    return encode_exchange(chat_model.tokenizer, chat_model.chat_template, messages, reply)[1]


@torch.no_grad()
def next_token_logps(
    chat_model: ChatModel, prompts: Sequence[list[int]], replies: Sequence[list[int]], batch_size: int
) -> Iterator[tuple[int, torch.Tensor]]:
    """Each row's number and its float32 log-probs [reply length, vocabulary] where the reply's tokens are predicted."""
    order = sorted(range(len(prompts)), key=lambda n: len(prompts[n]) + len(replies[n]), reverse=True)
    with chat_model.in_use() as model:
        device = model.get_input_embeddings().weight.device
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            rows = [prompts[n] + replies[n] for n in batch]
            longest = max(map(len, rows))
            # Left padding: the replies end at one column, and only the last columns need logits.
            padded = [[chat_model.tokenizer.pad_token_id] * (longest - len(row)) + row for row in rows]
            mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=device)
            logits = model(
                input_ids=torch.tensor(padded, device=device),
                attention_mask=mask,
                position_ids=(mask.cumsum(dim=1) - 1).clamp(min=0),
                logits_to_keep=max(len(replies[n]) for n in batch) + 1,
                use_cache=False,
            ).logits
            for n, row in zip(batch, logits, strict=True):
                yield n, row[-len(replies[n]) - 1 : -1].float().log_softmax(dim=-1)


def add_perplexity(chat_model: ChatModel, rows: list[dict], prompts: list[list[int]], batch_size: int) -> None:
    """Put `reference_nats` and `reference_tokens` into the rows: how unlikely the reference is, end token included."""
    replies = [reply_ids(chat_model, row["messages"][:-1], row["messages"][-1]["content"]) for row in rows]
    show = progress(f"{chat_model.name}: likelihood of the references", len(rows))
    for n_done, (n, logps) in enumerate(next_token_logps(chat_model, prompts, replies, batch_size), start=1):
        ids = torch.tensor(replies[n], device=logps.device)
        rows[n] |= {"reference_nats": -logps.gather(1, ids[:, None]).sum().item(), "reference_tokens": len(ids)}
        show(n_done)


def add_letters(chat_model: ChatModel, rows: list[dict], prompts: list[list[int]], batch_size: int) -> None:
    """Put `letter_logps` into the rows: the log-probs of the options' letters as the reply's first token."""
    letters = {letter for row in rows for letter in row["options"]}
    first = {letter: reply_ids(chat_model, rows[0]["messages"], letter)[0] for letter in letters}
    if len(set(first.values())) < len(first):
        raise UserError(f"{rows[0]['source']}: the tokenizer begins {', '.join(sorted(first))} with the same token")
    show = progress(f"{chat_model.name}: likelihood of the letters", len(rows))
    replies = [[first[row["answer"]]] for row in rows]
    for n_done, (n, logps) in enumerate(next_token_logps(chat_model, prompts, replies, batch_size), start=1):
        rows[n]["letter_logps"] = {letter: logps[0, first[letter]].item() for letter in rows[n]["options"]}
        show(n_done)


def answer_all(
    chat_model: ChatModel, tests: Sequence[dict], prompts: list[list[int]], decoding: Decoding, batch_size: int
) -> list[dict]:
    """The tests with what the model says to them: `reply`, `ended`, and likelihoods by their kind."""
    rows = [{"model": chat_model.name, **test} for test in tests]
    with chat_model.in_use() as model:
        replies = generate_replies(
            model,
            chat_model.tokenizer,
            prompts,
            chat_model.stop_ids,
            decoding,
            batch_size,
            on_progress=progress(f"{chat_model.name}: replies", len(rows)),
        )
    for row, reply in zip(rows, replies, strict=True):
        row |= {"reply": reply.text, "ended": reply.ended}
    for is_exam, add in ((False, add_perplexity), (True, add_letters)):
        part = [n for n, row in enumerate(rows) if (row["kind"] == "exam") is is_exam]
        if part:
            add(chat_model, [rows[n] for n in part], [prompts[n] for n in part], batch_size)
    return rows


def add_rewards(reward_model: RewardModel, rows: Sequence[dict], batch_size: int) -> None:
    """Put `reward` and `reference_reward` into the rows of dialogues."""
    rows = [row for row in rows if row["kind"] != "exam"]
    replies, references = [], []
    for row in rows:
        prompt, reference = row["messages"][:-1], row["messages"][-1]["content"]
        replies.append(reward_model.encode(prompt, row["reply"], row["ended"], row["tools"]))
        references.append(reward_model.encode(prompt, reference, tools=row["tools"]))
    # The same text once, whichever models wrote it: in two batches its score could differ in the last digits.
    texts = list(dict.fromkeys(map(tuple, replies + references)))
    scores = dict(zip(texts, reward_model.score([list(ids) for ids in texts], batch_size), strict=True))
    for row, reply, reference in zip(rows, replies, references, strict=True):
        row |= {"reward": scores[tuple(reply)], "reference_reward": scores[tuple(reference)]}


def progress(what: str, n_total: int) -> Callable[[int], None]:
    """A function to call with the number done: a bar on a terminal, otherwise a line now and then."""
    bar = tqdm(total=n_total, desc=what, disable=not sys.stderr.isatty())
    start = last_line = time.monotonic()

    def show(n_done: int) -> None:
        nonlocal last_line
        bar.update(n_done - bar.n)
        now = time.monotonic()
        if n_done == n_total:
            bar.close()
        if bar.disable and (n_done == n_total or now - last_line >= SECONDS_BETWEEN_LINES):
            last_line = now
            left = (now - start) / n_done * (n_total - n_done)
            logger.info(f"{what}: {n_done} of {n_total}" + (f", about {left:.0f} s left" if n_done < n_total else ""))

    return show


# ---------------------------------------------------------------- figures


def score(row: dict) -> dict:
    """The scores of one reply by name: a number, or for perplexity [nats, tokens]."""
    written, reply = row["reply"], answer_of(row["reply"])
    shape = {"ended": float(row["ended"]), "repetition": repetition_rate(written), "length": float(len(written))}
    if row["kind"] == "exam":
        likeliest = max(row["letter_logps"], key=row["letter_logps"].get)
        letter = written_letter(reply, row["options"])
        return {
            "exam_accuracy": float(likeliest == row["answer"]),
            "exam_accuracy_written": float(letter == row["answer"]),
            "exam_unparsed": float(letter is None),
            **shape,
        }
    reference = answer_of(row["messages"][-1]["content"])
    scores = rouge(reply, reference) | {"bleu_4": bleu_4(reply, reference), "chrf": chrf(reply, reference)}
    scores["invents_dose"] = float(invents_dose(reply, reference))
    if row.get("names"):
        scores["named"] = float(names_one_of(reply, row["names"]))
    if "reference_nats" in row:
        scores["perplexity"] = [row["reference_nats"], row["reference_tokens"]]
    if "reward" in row:
        scores["reward"] = row["reward"]
        scores["beats_reference"] = win(row["reward"], row["reference_reward"])
    if row["kind"] == "dialogue":
        scores["over_refusal"] = float(refuses(reply) and not refuses(reference))
    elif row["category"] == "emergency":
        scores["sends_to_hospital"] = float(sends_to_hospital(reply))
    elif row["category"] == "refusal":
        scores["refuses_or_warns"] = float(refuses_or_warns(reply))
    return scores | shape


def win(reward: float, other: float) -> float:
    """1 for the higher reward, 0 for the lower, half for a tie."""
    return 0.5 if reward == other else float(reward > other)


# What stands before or behind a mark of options, such as <C> or <AC>, and says whether they are chosen.
_CHOSEN_BEFORE = re.compile(
    r"(答案|选择|选|正确的?(是|选项)|\b(answer|choice|choose|select|pick|go with|correct|right|best)\b)"
    r"([\s:=】\])]|应该?|应当|就|只|可能|最|是|为|选|\b(is|was|should|would|must|could|may|be|the|option|one|answer)\b)*$",
    re.IGNORECASE,
)
_CHOSEN_BEHIND = re.compile(
    r"([\s:→]|才|就|是|为|\b(is|are|the|most)\b)*"
    r"(正确|对的?(?!\w)|最佳|最合适|最可能|最?符合|\b(correct|right|best|better|likely|true|answer)\b)",
    re.IGNORECASE,
)
_RULED_OUT_BEFORE = re.compile(
    r"(不|别|不应|不能|不是|并非|非|排除|除了|比|n't|\b(not|neither|nor|than|exclude|rule out|instead of))"
    r"\s*选?择?\s*$",
    re.IGNORECASE,
)
_RULED_OUT_BEHIND = re.compile(
    r"([\s:→]|也|都|均|则|是|\b(is|are|can be)\b)*"
    r"(错|不|可?以?排除|吗|呢|\?|n't|\b(wrong|incorrect|not|unlikely|false|excluded|ruled out)\b)",
    re.IGNORECASE,
)
_FIRST = re.compile(r"\s*($|[.。;\n]|,(?!\s*<))(?!(.*\n)+\W*<)")  # and no list of the options
# Two marks that become one: of the same option, and of options that are named together.
_SAME = re.compile(r"<(\w)>[\s.:、()-]*<\1>")
_AND = r"和|与|或者?|还是|以?及|、|/|&|and\b|or\b|,(?=\s*<\w+>\s*(?:$|[.。;\n]))"
_TOGETHER = re.compile(rf"<(\w+)>\s*(?:{_AND})\s*选?<(\w+)>")
# "A common cold" begins with an article; hepatitis B, vitamin C and C反应蛋白 are no options.
_NO_OPTION_BEFORE = "".join(
    f"(?<!{word})" for word in ("维生素", "[Vv]itamin ", "[Hh]epatitis ", "[Tt]ype ", "[A-Za-z0-9]")
)
_NO_OPTION_BEHIND = r"(?![A-Za-z0-9]|型|超|族|反应|细胞|期|级)"


def written_letter(reply: str, options: dict[str, str]) -> str | None:
    """The letter that an answer concludes with, by the option's words too; None where it names several or none.

    The last statement counts ("答案：C", "C is right"); without one, the only option that is not ruled out.
    """
    chosen, left = "", set()
    text = _mark_options(reply, options)
    for mark in re.finditer(r"<(\w+)>", text):
        before, behind = text[max(mark.start() - 60, 0) : mark.start()], text[mark.end() :]
        if _RULED_OUT_BEFORE.search(before) or _RULED_OUT_BEHIND.match(behind):
            continue
        left |= set(mark[1])
        is_first = not re.search(r"\w", text[: mark.start()]) and _FIRST.match(behind)
        if is_first or _CHOSEN_BEFORE.search(before) or _CHOSEN_BEHIND.match(behind):
            chosen = mark[1]
    letters = set(chosen) or left
    return letters.pop() if len(letters) == 1 else None


def _mark_options(reply: str, options: dict[str, str]) -> str:
    """The text with <C> for each mention of option C, by letter or words, and <AC> for two that are named together."""
    text = unicodedata.normalize("NFKC", reply.replace("\u2019", "'")).replace("<", " ")
    text = re.sub(r"[*`$_{}]|\\(text|mathrm|mathbf)\b", "", text.replace("\\boxed", "答案:"))
    lower_case = r"((?:answer|答案)(?: is|是|为)?:?\s*|^\W*)([a-z])(?![\w ])"
    text = re.sub(lower_case, lambda found: found[1] + found[2].upper(), text, flags=re.IGNORECASE)
    letters = {unicodedata.normalize("NFKC", words).lower(): letter for letter, words in reversed(options.items())}
    by_words = "|".join(
        rf"(?<![a-z0-9]){re.escape(words)}(?![a-z0-9])" if words.isascii() else re.escape(words)
        for words in sorted(letters, key=len, reverse=True)
    )
    by_letter = (
        rf"(?:选项|\boption )?[(\[]?{_NO_OPTION_BEFORE}(?!A (?!(?:is|and|or)\b)[a-z])"
        rf"(?P<letter>[{''.join(options)}]){_NO_OPTION_BEHIND}[)\]]?(?:选?项)?"
    )
    text = re.sub(
        f"(?P<words>(?i:{by_words}))|{by_letter}",
        lambda found: f"<{found['letter'] or letters[found['words'].lower()]}>",
        text,
    )
    for together in (_SAME, _TOGETHER):
        while (merged := together.sub(lambda found: f"<{''.join(filter(None, found.groups()))}>", text)) != text:
            text = merged
    return text


def columns(rows: Sequence[dict], name: str) -> tuple[list[float], list[float]]:
    """A score of the rows that have it, as sums and counts."""
    values = [row["scores"][name] for row in rows if name in row["scores"]]
    pairs = [value if isinstance(value, list) else [value, 1.0] for value in values]
    return [pair[0] for pair in pairs], [pair[1] for pair in pairs]


def summarize(rows: Sequence[dict]) -> dict[str, dict | int]:
    """n, and each figure of the rows with its 95 % interval."""
    summary: dict[str, dict | int] = {"n": len(rows)}
    for name in FIGURES:
        if name == "distinct_2":
            summary[name] = {"value": round(distinct_n([row["reply"] for row in rows]), 4)}
            continue
        sums, counts = columns(rows, name)
        if not sums:
            continue
        value = sum(sums) / sum(counts)
        low, high = wilson_interval(sum(sums), len(sums)) if name in RATES else bootstrap_interval(sums, counts)
        if name == "perplexity":
            value, low, high = map(math.exp, (value, low, high))
        summary[name] = {"value": round(value, 4), "interval": [round(low, 4), round(high, 4)], "of": len(sums)}
    return summary


def differences(first: Sequence[dict], second: Sequence[dict]) -> dict[str, dict]:
    """Each figure of the second model against the first, on the same records: difference, interval, p and a verdict.

    Perplexity is compared as nats a token.
    """
    found = {}
    for name, more_is_better in FIGURES.items():
        before, after = columns(first, name), columns(second, name)
        if more_is_better is None or not before[0]:
            continue
        assert len(before[0]) == len(after[0]), (name, len(before[0]), len(after[0]))
        difference = paired_bootstrap(before, after)
        is_same = difference.low <= 0 <= difference.high
        verdict = "same" if is_same else "better" if (difference.value > 0) is more_is_better else "worse"
        value, low, high, p_value = (round(number, 4) for number in difference)
        found[name] = {"difference": value, "interval": [low, high], "p": p_value, "verdict": verdict}
    if any("reward" in row for row in first):
        pairs = [(a["reward"], b["reward"]) for a, b in zip(first, second, strict=True) if "reward" in a]
        wins = sum(win(after, before) for before, after in pairs)
        low, high = wilson_interval(wins, len(pairs))
        found["win_rate"] = {"value": round(wins / len(pairs), 4), "interval": [round(low, 4), round(high, 4)]}
    return found


def metrics_of(rows: Sequence[dict]) -> dict:
    """For each file: `models` (figures of each), `groups` (of each aspect, category or subject), `against_first`."""
    metrics = {}
    for file in dict.fromkeys(row["file"] for row in rows):
        by_model: dict[str, list[dict]] = {}
        for row in rows:
            if row["file"] == file:
                by_model.setdefault(row["model"], []).append(row)
        groups = {name: grouped(own) for name, own in by_model.items()}
        first, *others = by_model
        metrics[file] = {
            "models": {name: summarize(own) for name, own in by_model.items()},
            "groups": {name: {group: summarize(own) for group, own in of.items()} for name, of in groups.items()},
            "against_first": {name: differences(by_model[first], by_model[name]) for name in others},
        }
    return metrics


def grouped(rows: Sequence[dict]) -> dict[str, list[dict]]:
    groups: dict[str, list[dict]] = {}
    for row in rows:
        if group := row.get("aspect") or row.get("category") or row.get("exam_subject"):
            groups.setdefault(group, []).append(row)
    return dict(sorted(groups.items()))


# ---------------------------------------------------------------- training data


def training_data(models: Sequence[ChatModel]) -> list[str]:
    """The training data that the models' lineage records, those of earlier stages too."""
    found = {}
    folders = [chat_model.lora_model or chat_model.base_model for chat_model in models]
    seen = set()
    while folders:
        folder = folders.pop()
        lineage = read_lineage(folder) if folder not in seen else None
        seen.add(folder)
        if lineage is not None:
            if lineage.stage != "pt":  # it learns texts, not questions
                found[lineage.data] = None
            folders += [parent for parent in (lineage.parent, lineage.base_model) if parent]
    return list(found)


def overlap(tests: Sequence[dict], data: Sequence[str]) -> dict:
    """How many test questions stand, the same or nearly so, in the training data; a folder that is gone is named."""
    there = [path for path in data if Path(path).exists()]
    facts = {"training data": list(data), "not found": [path for path in data if path not in there]}
    questions = []
    for path in there:
        files, _ = find_files(path, "training data")
        for read in (read_dialogues, read_pairs):
            for record in read(files):
                for message in getattr(record, "messages", ()):
                    if message["role"] == "user":
                        questions.append(message["content"])
    if not questions:
        return facts
    known = Known(NEAR)
    known.add(list(dict.fromkeys(questions)))
    asked = [
        next(message["content"] for message in reversed(test["messages"]) if message["role"] == "user")
        for test in tests
    ]
    matches = known.find(asked)
    same = [match is not None and match.is_copy for match in matches]
    near = [match is not None and not match.is_copy and match.share >= NEAR for match in matches]
    return facts | {"test questions": len(asked), "in training, the same": sum(same), "nearly the same": sum(near)}


# ---------------------------------------------------------------- what is said of it


def print_tables(metrics: dict) -> None:
    """A table for each file: a line for each figure, a column for each model, and the verdicts against the first."""
    for file, found in metrics.items():
        names = list(found["models"])
        print(f"\n{file} ({found['models'][names[0]]['n']} records)")
        table = [[figure, *(cell(found, name, figure) for name in names)] for figure in FIGURES]
        if len(names) > 1:
            for number, name in enumerate(names, start=1):
                print(f"  [{number}] {name}" + (", which the others are compared with" if number == 1 else ""))
            table.insert(0, ["", *(f"[{number}]" for number in range(1, len(names) + 1))])
        table = [row for row in table if any(row[1:])]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        for row in table:
            cells = (text.rjust(width) for text, width in zip(row[1:], widths[1:], strict=True))
            print("  ".join([row[0].ljust(widths[0]), *cells]))
        for name, figures in found["against_first"].items():
            if "win_rate" in figures:
                rate, (low, high) = figures["win_rate"]["value"], figures["win_rate"]["interval"]
                print(
                    f"{name} has the higher reward in {rate:.1%} of the replies (95 % interval {low:.1%} to {high:.1%})"
                )
            for verdict in ("better", "worse", "same"):
                said = [f"{figure} (p {of['p']:.3f})" for figure, of in figures.items() if of.get("verdict") == verdict]
                if said:
                    print(f"{name} against {names[0]}: {verdict}: {', '.join(said)}")


def cell(found: dict, model: str, figure: str) -> str:
    summary = found["models"][model].get(figure)
    if summary is None:
        return ""
    text = f"{summary['value']:.3f}"
    if "interval" in summary:
        text += " ({:.3f}-{:.3f})".format(*summary["interval"])
    verdict = found["against_first"].get(model, {}).get(figure, {}).get("verdict")
    return f"{text} {verdict}" if verdict else text


# ---------------------------------------------------------------- main


def read_predictions(path: Path) -> list[dict]:
    """The rows of an earlier predictions.jsonl; UserError where it is none or not whole."""
    if not path.is_file():
        raise UserError(f"--predictions {path}: no such file")
    if fault := misnamed(read_start(path, str(path))):
        raise UserError(f"--predictions {path}: {fault}")
    rows, said = [], {}
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        if not line:
            continue
        try:
            row = json.loads(line)
            row["scores"] = score(row)
            said.setdefault(row["model"], []).append((row["file"], row["messages"]))
            rows.append({"model": row.pop("model"), "file": row.pop("file")} | row)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError):
            raise UserError(f"{path}:{number}: no record of predictions.jsonl") from None
    if not rows:
        raise UserError(f"--predictions {path}: it is empty")
    first = next(iter(said))
    for model, asked in said.items():
        # Compared pair by pair.
        if asked != said[first]:
            raise UserError(f"--predictions {path}: the records of {model} are not those of {first}, in their order")
    return rows


def ask_models(
    models: list[ChatModel],
    tests: list[dict],
    model_args: EvaluatedModelArguments,
    eval_args: EvaluationArguments,
    decoding: Decoding,
) -> tuple[list[dict], dict]:
    """The rows of all models with their scores, and how they were asked."""
    prompts = [encode_prompts(chat_model, tests, decoding.max_new_tokens) for chat_model in models]
    asked = {
        chat_model.name: {
            "template": chat_model.chat_template.name,
            "first prompt": chat_model.tokenizer.decode(own[0]),
        }
        for chat_model, own in zip(models, prompts, strict=True)
    }
    reward_model = RewardModel(model_args.reward_model, model_args) if model_args.reward_model else None
    load_weights(models, model_args)
    rows = []
    try:
        for chat_model, own in zip(models, prompts, strict=True):
            set_seed(eval_args.seed)  # each model draws the same random numbers
            rows += answer_all(chat_model, tests, own, decoding, eval_args.batch_size)
        if reward_model is not None:
            add_rewards(reward_model, rows, eval_args.batch_size)
    except torch.cuda.OutOfMemoryError as error:
        raise UserError("out of GPU memory; in this order: a smaller --batch_size, --load_in_4bit True") from error
    for row in rows:
        del row["source"]
        row["scores"] = score(row)
    return rows, asked


def main(argv: Sequence[str] | None = None) -> None:
    """Ask the models or read what they said, score it, write and print the figures."""
    parser = StageArgumentParser([EvaluatedModelArguments, EvaluationArguments, Decoding])
    parser.description = __doc__
    model_args, eval_args, decoding = parser.parse(argv)
    check_together(model_args, eval_args)
    start_log()
    for note in parser.notes:
        logger.info(note)

    report: dict = {"settings": {name: value for name, value in vars(eval_args).items() if value is not None}}
    with new_folder(Path(eval_args.output_dir), "--output_dir", eval_args.overwrite) as folder:
        if eval_args.predictions:
            rows = read_predictions(Path(eval_args.predictions))
        else:
            tests, facts = read_tests(eval_args.test_file, eval_args.num_samples, eval_args.seed)
            models = describe_models(eval_args.compare, "--compare", model_args)
            rows, asked = ask_models(models, tests, model_args, eval_args, decoding)
            report["settings"] |= {name: value for name, value in vars(model_args).items() if value is not None}
            report |= {"test_files": facts, "models": asked, "decoding": asdict(decoding)}
            report["overlap"] = overlap(tests, training_data(models))
        report["metrics"] = metrics_of(rows)
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        (folder / "predictions.jsonl").write_text("".join(lines), encoding="utf-8")
        text = json.dumps(report, indent=2, ensure_ascii=False) + "\n"
        (folder / "metrics.json").write_text(text, encoding="utf-8")
    print_tables(report["metrics"])
    if "test questions" in report.get("overlap", {}):
        found = report["overlap"]
        print(
            f"\nof {found['test questions']} test questions {found['in training, the same']} stand in the training "
            f"data and {found['nearly the same']} nearly"
        )
    print(f"{eval_args.output_dir}: metrics.json and predictions.jsonl")


if __name__ == "__main__":
    run_script(main)
