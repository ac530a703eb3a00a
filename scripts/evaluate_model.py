"""Measure trained models on held-out records, alone or side by side, and say whether one is better, the same or worse.

Input: files of `--test_file`, each of one form, which decides what is measured:
  dialogues   {"conversations": [...]}: the model answers the last question and the reply is compared with the
              reference; `names` lists what a right answer may call its subject
  safety      dialogues with "category": emergency, twin (an emergency's words and none), refusal or about: rates of
              safe replies besides
  exam        {"question", "option": {"A": ...}, "answer": "A"}: by the likelihood of the letters, and by what it writes
              when asked for a letter alone and when asked to think first
  rubrics     {"prompt": [...], "rubrics": [{"criterion", "points"}]}, HealthBench's form: graded by --judge rubrics
Output: `--output_dir` with predictions.jsonl (a line for each record and model) and metrics.json (figures with 95 %
intervals, differences from the first model, prompts, decoding, overlap of test and training data).
The prompts are those of training; thoughts are measured, and the answers behind them graded. `--predictions` computes
the figures again from a predictions.jsonl, without a model.

    python scripts/evaluate_model.py --base_model MODEL --lora_model ADAPTER --test_file data/eval/questions.jsonl
    python scripts/evaluate_model.py --base_model MODEL --compare base SFT_ADAPTER DPO_ADAPTER --reward_model RM \\
        --test_file data/eval/questions.jsonl data/eval/exam.jsonl data/eval/safety.jsonl \\
        data/eval/emergency_twins.jsonl data/eval/unsafe_requests.jsonl
    python scripts/evaluate_model.py --predictions outputs-eval/predictions.jsonl --judge safety pairs \\
        --judge_url http://127.0.0.1:8001/v1 --judge_model Qwen/Qwen2.5-32B-Instruct-AWQ --output_dir outputs-judged
"""

import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import get_args

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import medtune.libraries  # noqa: F401 - first: it imports the libraries in half of their time

# isort: split
import torch
from loguru import logger
from tqdm import tqdm
from transformers import set_seed

from medtune.arguments import StageArgumentParser
from medtune.errors import Unusable, UserError, run_script
from medtune.measuring.evaluations import read_predictions
from medtune.measuring.figures import metrics_of, score
from medtune.measuring.judge_client import Judge, JudgeArguments
from medtune.measuring.judged_rows import JudgedBy, asked_messages, judge_rows, plan_judging
from medtune.measuring.tables import table_lines
from medtune.models.chat_models import (
    ChatModel,
    ChatModelArguments,
    RewardModel,
    describe_models,
    load_weights,
)
from medtune.models.generation import Decoding, Reply, generate_replies
from medtune.models.likelihoods import begin_answers, reply_ids, score_replies
from medtune.models.lineage import read_lineage
from medtune.models.loading import weights_fingerprint
from medtune.models.logps import log_probs
from medtune.output_files import new_folder
from medtune.reading.eval_items import read_tests
from medtune.reading.finding import find_records
from medtune.reading.messages import Message
from medtune.reading.near_duplicates import Known
from medtune.reading.readers import read_dialogues, read_pairs
from medtune.reading.thoughts import OPENING, split_reply, with_opening
from medtune.reading.tokenization import encode_recent
from medtune.training.log import start_log

SECONDS_BETWEEN_LINES = 10
NEAR = 0.8  # share of character trigrams in common from which a training question counts as a copy of a test question
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
    judge: list[str] | None = field(
        default=None,
        metadata={
            "help": "What the model of --judge_url grades: replies by the records' `rubrics`, replies to `safety` "
            "items, `pairs` of replies of several models."
        },
    )
    num_samples: int | None = field(default=None, metadata={"help": "At most so many records a file, by the seed."})
    output_dir: str = field(default="outputs-eval", metadata={"help": "New folder for the results."})
    overwrite: bool = field(default=False, metadata={"help": "Replace what an earlier run left in --output_dir."})
    reuse: bool = field(
        default=False,
        metadata={"help": "Print what --output_dir holds where the same models, files and flags were measured for it."},
    )
    batch_size: int = field(default=16, metadata={"help": "Prompts that are answered at a time."})
    seed: int = field(default=42, metadata={"help": "Of --num_samples and of draws with --temperature above 0."})

    def __post_init__(self):
        if self.num_samples is not None and self.num_samples < 1:
            raise UserError(f"--num_samples {self.num_samples}: give at least 1")
        if unknown := set(self.judge or ()) - {*get_args(JudgedBy)}:
            raise UserError(f"--judge {min(unknown)}: there are {', '.join(get_args(JudgedBy))}")
        if self.batch_size < 1:
            raise UserError(f"--batch_size {self.batch_size}: give a number of prompts of at least 1")


def check_together(model_args: EvaluatedModelArguments, eval_args: EvaluationArguments, judge_args: JudgeArguments):
    """Raise UserError for flags that contradict each other."""
    judge_args.check_judge(f"--judge {' '.join(eval_args.judge)}" if eval_args.judge else None)
    if "pairs" in (eval_args.judge or ()) and not (eval_args.predictions or eval_args.compare):
        raise UserError("--judge pairs: one model has no other to be compared with; name several after --compare")
    if bool(eval_args.predictions) == bool(model_args.base_model):
        raise UserError("--base_model and --predictions: give one of them")
    if model_args.base_model and not eval_args.test_file:
        raise UserError("--test_file is missing: name the files of dialogues, safety items or exams")
    of_models = {"--lora_model": model_args.lora_model, "--reward_model": model_args.reward_model}
    of_models |= {f"--{name}": getattr(eval_args, name) for name in ("test_file", "compare", "num_samples", "reuse")}
    if eval_args.predictions and any(of_models.values()):
        given = ", ".join(flag for flag, value in of_models.items() if value)
        raise UserError(f"--predictions needs no model and takes all records: leave {given} out")
    if eval_args.compare and model_args.lora_model:
        raise UserError("--lora_model and --compare exclude each other: name the adapter after --compare")


def refuse_unjudged(tests: Sequence[dict], kinds: Sequence[JudgedBy]) -> None:
    """Refuse records with rubrics and no reference, of which a judge alone could say anything."""
    for test in tests:
        if test["kind"] == "rubrics" and "rubrics" not in kinds:
            raise UserError(f"{test['source']}: a record with rubrics is measured by a judge alone: --judge rubrics")


# ---------------------------------------------------------------- asking a model


def questions_of(tests: Sequence[dict]) -> list[tuple[dict, list[Message]]]:
    """What is asked: each test's question, then the exams' in their second format."""
    first = [(test, asked_messages(test)) for test in tests]
    return first + [(test, [{"role": "user", "content": test["tagged_prompt"]}]) for test in exams_of(tests)]


def exams_of(tests: Sequence[dict]) -> list[dict]:
    return [test for test in tests if test["kind"] == "exam"]


def encode_prompts(chat_model: ChatModel, tests: Sequence[dict], max_new_tokens: int) -> list[list[int]]:
    """The ids of all questions; raises UserError, with file:line, for one that cannot be encoded."""
    prompts, n_shortened = [], 0
    room = chat_model.context - max_new_tokens
    if room < 1:
        raise UserError(
            f"--max_new_tokens {max_new_tokens}: {chat_model.name} has a context of {chat_model.context} tokens, which "
            "must hold the question too; give less"
        )
    for test, asked in questions_of(tests):
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


def add_perplexity(chat_model: ChatModel, rows: list[dict], prompts: list[list[int]], batch_size: int) -> None:
    """Add `reference_nats` and `reference_tokens` to the rows: the reference's -log p with its end token."""
    replies = [reply_ids(chat_model, row["messages"][:-1], row["messages"][-1]["content"]) for row in rows]
    show = progress(f"{chat_model.name}: likelihood of the references", len(rows))
    scored = score_replies(chat_model, prompts, replies, batch_size, log_probs)
    for n_done, (n, logps) in enumerate(scored, start=1):
        rows[n] |= {"reference_nats": -logps.sum().item(), "reference_tokens": len(replies[n])}
        show(n_done)


def add_letters(chat_model: ChatModel, rows: list[dict], prompts: list[list[int]], batch_size: int) -> None:
    """Add `letter_logps` to the rows: the log-probs of the options' letters as the first token of the answer.

    Where the reply has a thought, that is behind it; {} where the thought does not end.
    """
    letters = sorted({letter for row in rows for letter in row["options"]})
    try:
        lead, first = begin_answers(chat_model, rows[0]["messages"], letters)
    except Unusable as unusable:
        raise UserError(f"{rows[0]['source']}: {unusable.detail}") from None
    asked, replies = [], []
    for row, prompt in zip(rows, prompts, strict=True):
        thought, answer, is_closed = split_reply(row["reply"])
        if is_closed:
            before = row["reply"].removesuffix(answer)
            if chat_model.chat_template.opens_thought:
                before = before.removeprefix(OPENING)  # which is in the prompt
            ids = chat_model.tokenizer.encode(before, add_special_tokens=False) if thought else lead
            asked.append((row, prompt + ids))
            replies.append([first[row["answer"]]])
        row["letter_logps"] = {}
    ids_of_letters = list(first.values())

    def letter_logps(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        return logits.float().log_softmax(dim=-1)[:, ids_of_letters].T

    show = progress(f"{chat_model.name}: likelihood of the letters", len(asked))
    scored = score_replies(chat_model, [ids for _, ids in asked], replies, batch_size, letter_logps)
    for n_done, (n, logps) in enumerate(scored, start=1):
        row, by_letter = asked[n][0], dict(zip(first, logps[:, 0].tolist(), strict=True))
        row["letter_logps"] = {letter: by_letter[letter] for letter in row["options"]}
        show(n_done)


def answer_all(
    chat_model: ChatModel, tests: Sequence[dict], prompts: list[list[int]], decoding: Decoding, batch_size: int
) -> list[dict]:
    """The tests with the model's `reply`, `ended`, and the likelihoods of their kind.

    prompts: of `questions_of`.
    """
    rows = [{"model": chat_model.name, **test} for test in tests]
    with chat_model.in_use() as model:
        replies = generate_replies(
            model,
            chat_model.tokenizer,
            prompts,
            chat_model.stop_ids,
            decoding,
            batch_size,
            on_progress=progress(f"{chat_model.name}: replies", len(prompts)),
        )
    for row, reply in zip(rows, replies, strict=False):
        row |= describe_reply(chat_model, reply)
    for row, reply in zip(exams_of(rows), replies[len(rows) :], strict=True):
        row |= {f"tagged_{name}": value for name, value in describe_reply(chat_model, reply).items()}
    for is_exam, add in ((False, add_perplexity), (True, add_letters)):
        part = [n for n, row in enumerate(rows) if row["kind"] != "rubrics" and (row["kind"] == "exam") is is_exam]
        if part and not is_exam and chat_model.chat_template.opens_thought:
            logger.info(f"{chat_model.name}: its prompts open a thought, which no reference has: no perplexity")
        elif part:
            add(chat_model, [rows[n] for n in part], [prompts[n] for n in part], batch_size)
    return rows


def describe_reply(chat_model: ChatModel, reply: Reply) -> dict:
    """What predictions.jsonl holds of a reply."""
    text = with_opening(reply.text, chat_model.chat_template.opens_thought)
    thought, _, is_closed = split_reply(text)
    described = {"reply": text, "ended": reply.ended}
    if thought or not is_closed:
        described["thought_tokens"] = len(chat_model.tokenizer.encode(thought, add_special_tokens=False))
    return described


def add_rewards(reward_model: RewardModel, rows: Sequence[dict], batch_size: int) -> None:
    """Put `reward` and `reference_reward` into the rows of dialogues."""
    rows = [row for row in rows if row["kind"] not in ("exam", "rubrics")]
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
    """A function to call with the number done; it shows a bar on a terminal, otherwise log lines."""
    bar = tqdm(total=n_total, desc=what, disable=not sys.stderr.isatty())
    start = last_line = time.monotonic()

    def show_progress(n_done: int) -> None:
        nonlocal last_line
        bar.update(n_done - bar.n)
        now = time.monotonic()
        if n_done == n_total:
            bar.close()
        if bar.disable and (n_done == n_total or now - last_line >= SECONDS_BETWEEN_LINES):
            last_line = now
            left = (now - start) / n_done * (n_total - n_done)
            logger.info(f"{what}: {n_done} of {n_total}" + (f", about {left:.0f} s left" if n_done < n_total else ""))

    return show_progress


def add_judgements(judge: Judge, rows: Sequence[dict], kinds: Sequence[JudgedBy]) -> list[str]:
    """Put what the judge says into the rows, and into their scores; the reasons why some have no judgement."""
    if not (plan := plan_judging(rows, kinds)):
        raise UserError(f"--judge {' '.join(kinds)}: none of the records has anything of that to judge")
    logger.info(f"judge: {judge.describe_cost([question for judging in plan for question in judging.questions])}")
    reasons = judge_rows(plan, judge)
    logger.info(f"judge: {judge.usage}")
    for row in rows:
        row["scores"] = score(row)
    return reasons


# ---------------------------------------------------------------- training data


def training_data(models: Sequence[ChatModel]) -> dict[str, bool]:
    """The training data that the models' lineage records, those of earlier stages too; True for a data set's name."""
    data_paths = {}
    folders = [chat_model.lora_model or chat_model.base_model for chat_model in models]
    seen = set()
    while folders:
        folder = folders.pop()
        lineage = read_lineage(folder) if folder not in seen else None
        seen.add(folder)
        if lineage is not None:
            if lineage.stage != "pt":  # it learns texts, not questions
                data_paths[lineage.data] = "--dataset_name" in lineage.flags
            folders += [parent for parent in (lineage.parent, lineage.base_model) if parent]
    return data_paths


def overlap(tests: Sequence[dict], data: Mapping[str, bool], cache_dir: str | None) -> dict:
    """How many test questions are, exactly or nearly, in the training data; what is missing is named.

    data: of each name or path, whether it is a data set of the hub.
    """
    there = {}
    for path, is_data_set in data.items():
        with suppress(UserError):
            there[path], _ = find_records(path, path if is_data_set else None, "training data", cache_dir=cache_dir)
    facts = {"training data": list(data), "not found": [path for path in data if path not in there]}
    questions = []
    for files in there.values():
        for read_records in (read_dialogues, read_pairs):
            for record in read_records(files):
                for message in getattr(record, "messages", ()):
                    if message["role"] == "user":
                        questions.append(message["content"])
    if not questions:
        return facts
    known = Known(NEAR)
    known.add(list(dict.fromkeys(questions)))
    test_questions = [
        next(message["content"] for message in reversed(test["messages"]) if message["role"] == "user")
        for test in tests
    ]
    matches = known.find(test_questions)
    same = [match is not None and match.is_copy for match in matches]
    near = [match is not None and not match.is_copy and match.share >= NEAR for match in matches]
    return facts | {
        "test questions": len(test_questions),
        "in training, the same": sum(same),
        "nearly the same": sum(near),
    }


# ---------------------------------------------------------------- main


def weights_of(models: Sequence[ChatModel], model_args: EvaluatedModelArguments) -> dict[str, str]:
    """A fingerprint of each model's weights, by its name."""
    folders = {chat_model.name: chat_model.lora_model or chat_model.base_model for chat_model in models}
    folders |= {"--reward_model": model_args.reward_model} if model_args.reward_model else {}
    return {name: weights_fingerprint(folder, **model_args.hub_options) for name, folder in folders.items()}


def measured_before(file: Path, report: dict) -> dict | None:
    """The figures of an earlier metrics.json if all else in it is as in this report, and complete; otherwise None."""
    earlier = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    same = not earlier.get("unjudged") and all(
        earlier.get(name) == value for name, value in json.loads(json.dumps(report)).items()
    )
    return earlier["metrics"] if same else None


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
    parser = StageArgumentParser([EvaluatedModelArguments, EvaluationArguments, JudgeArguments, Decoding])
    parser.description = __doc__
    model_args, eval_args, judge_args, decoding = parser.parse(argv)
    check_together(model_args, eval_args, judge_args)
    start_log()
    for note in parser.notes:
        logger.info(note)

    judge = Judge(judge_args) if eval_args.judge else None
    given = vars(eval_args) | (vars(judge_args) if judge else {})
    report: dict = {"settings": {name: value for name, value in given.items() if value is not None}}
    if not eval_args.predictions:
        tests, facts = read_tests(eval_args.test_file, eval_args.num_samples, eval_args.seed)
        refuse_unjudged(tests, eval_args.judge or ())
        models = describe_models(eval_args.compare, "--compare", model_args)
        report["settings"] |= {name: value for name, value in vars(model_args).items() if value is not None}
        report |= {"test_files": facts, "decoding": asdict(decoding), "weights": weights_of(models, model_args)}
        if eval_args.reuse and (metrics := measured_before(Path(eval_args.output_dir, "metrics.json"), report)):
            print("\n".join(table_lines(metrics)))
            print(f"{eval_args.output_dir}: measured already, with the same models, files and flags")
            return
    if judge is not None:
        judge.try_out()
    with new_folder(Path(eval_args.output_dir), "--output_dir", eval_args.overwrite) as folder:
        if eval_args.predictions:
            rows = read_predictions(Path(eval_args.predictions))
        else:
            rows, report["models"] = ask_models(models, tests, model_args, eval_args, decoding)
            report["overlap"] = overlap(tests, training_data(models), model_args.cache_dir)
        if judge is not None:
            report["unjudged"] = add_judgements(judge, rows, eval_args.judge)
        report["metrics"] = metrics_of(rows)
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        (folder / "predictions.jsonl").write_text("".join(lines), encoding="utf-8")
        text = json.dumps(report, indent=2, ensure_ascii=False) + "\n"
        (folder / "metrics.json").write_text(text, encoding="utf-8")
    print("\n".join(table_lines(report["metrics"])))
    if "test questions" in report.get("overlap", {}):
        shares = report["overlap"]
        print(
            f"\nof {shares['test questions']} test questions {shares['in training, the same']} stand in the training "
            f"data and {shares['nearly the same']} nearly"
        )
    print(f"{eval_args.output_dir}: metrics.json and predictions.jsonl")
    if unjudged := report.get("unjudged"):
        raise UserError(
            f"{judge.where}: not all is judged, and what is incomplete above is not averaged: {unjudged[0]}; the rest "
            f"is kept; --predictions {eval_args.output_dir}/predictions.jsonl and the same --judge ask for what is left"
        )


if __name__ == "__main__":
    run_script(main)
