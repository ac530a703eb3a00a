"""Make preference pairs of dialogues, the reply in the data over a worse one; or dialogues with a model's best replies.

Without a model, the rejected replies are bad in four ways, each as often: another question's answer, cut off, vague,
repeating itself. Half of all are longer than the chosen one, so that length tells nothing. With `--model`, the
model's own replies are rejected: of several to a prompt, the one that is the least like the reply in the data, or with
`--reward_model` or `--judge` the best-scored of them is chosen over the worst. System prompts and earlier turns are
kept; of a dialogue of several turns, the pair is about its longest reply. A pair differs in its answers: those are
compared and spoilt, while a thought before them stays, and a model's thought is left out where the reply in the data
has none.
`--format sft` writes dialogues, each with the best of the model's replies, thoughts included: by `--reward_model`,
`--judge`, or for exam questions the first whose letter is right, which with the others the best must have too.
What a model has written is kept as it goes: after an interruption the same command goes on where it stopped.

    python scripts/generate_preference_data.py --sft_data data/finetune/train.jsonl \\
        --output_file data/reward/preference_data.jsonl --num_samples 5000
    python scripts/generate_preference_data.py --sft_data data/finetune/train.jsonl \\
        --output_file data/reward/own_mistakes.jsonl --num_samples 2000 \\
        --model outputs-sft-qwen2.5-3b/checkpoint-best --reward_model outputs-rm-qwen2.5-3b/checkpoint-best
    python scripts/generate_preference_data.py --format sft --sft_data data/exam/train.jsonl \\
        --output_file data/best/train.jsonl --model outputs-sft-qwen2.5-3b/checkpoint-best --num_replies 8
"""

import argparse
import hashlib
import statistics
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from medtune.devices import add_use_cpu, cpu_reason
from medtune.errors import Unusable, UserError, run_script
from medtune.made_so_far import MadeSoFar
from medtune.measuring.judge_client import Judge, Unjudged, add_judge_flags, judge_arguments
from medtune.measuring.judge_prompts import JudgeQuestion, grading_question
from medtune.measuring.rubrics import quality_rubric, rubric_score
from medtune.output_files import new_text_file, refuse_same
from medtune.reading.criteria import Criterion, to_criteria
from medtune.reading.drawn_prompts import draw_prompts
from medtune.reading.exams import Exam
from medtune.reading.finding import find_records
from medtune.reading.foreign_forms import add_ignore_keys
from medtune.reading.guide_form import guide_line
from medtune.reading.hub_data import add_records_flags, named_records
from medtune.reading.keys import Reading
from medtune.reading.records import BadRecord, Dialogue, Pair, Prompt, Report, T
from medtune.reading.thoughts import split_reply, with_opening
from medtune.reading.words import dropped_lines, unread_lines
from medtune.sample_data.spoilt_replies import likeness, split_thought, spoil_replies

if TYPE_CHECKING:
    from medtune.models.generation import Reply

ENDINGS = (".jsonl", ".jsonl.gz")
# What a model replies to: a pair that lacks a reply, or a prompt.
Asked = Pair | Prompt
# What is made of it, by name.
MADE = {kind.__name__: kind for kind in (Pair, Dialogue, BadRecord)}
# Flags that change nothing in what is made.
OF_THE_RUN = ("output_file", "overwrite", "cache_dir", "judge_url", "judge_sends_data", "judge_max_tokens")
OF_THE_RUN += ("judge_requests_per_minute", "judge_cache")

# ---------------------------------------------------------------- replies of a model

# What the replies to a prompt score, or why they have no scores.
Scores = dict["Reply", float] | Unusable


class Sampler:
    """A model that answers prompts several times, and what scores its answers: a reward model, a judge, or nothing.

    made: what an earlier run has made of the first prompts, and this one goes on with.
    """

    def __init__(self, args: argparse.Namespace, judge: Judge | None, made: MadeSoFar):
        from medtune.models.chat_models import ChatModelArguments, RewardModel, describe_model, load_weights
        from medtune.models.generation import Decoding

        model_args = ChatModelArguments(
            args.model,
            template_name=args.template_name,
            torch_dtype=args.torch_dtype,
            load_in_4bit=args.load_in_4bit,
            load_in_8bit=args.load_in_8bit,
            use_cpu=args.use_cpu,
            cache_dir=args.cache_dir,
        )
        self.decoding = Decoding(
            max_new_tokens=args.max_new_tokens,
            temperature=args.temperature,
            top_p=args.top_p if args.temperature else 1.0,
        )
        self.num_replies, self.batch_size, self.judge = args.num_replies, args.batch_size, judge
        self.seed, self.made = args.seed, made
        self.chat_model = describe_model(model_args, "--model")
        self.reward_model = RewardModel(args.reward_model, model_args) if args.reward_model else None
        load_weights([self.chat_model], model_args)

    def pairs(self, prompts: Sequence[Pair]) -> Iterator[tuple[Pair, str] | BadRecord]:
        """Each prompt with the model's reply that is to be rejected."""
        is_scored = self.reward_model is not None or self.judge is not None
        scored = (lambda _, replies: whole_replies(replies) and replies), best_over_worst  # a cut one may be the worst
        how = scored if is_scored else ((lambda _, replies: replies), least_like)
        return ((made, "the model's") if isinstance(made, Pair) else made for made in self.choose(prompts, *how))

    def dialogues(self, prompts: Sequence[Prompt]) -> Iterator[Dialogue | BadRecord]:
        """Each prompt with the best of the model's replies."""
        return self.choose(prompts, candidates, best_of)

    def choose(
        self, prompts: Sequence[Asked], pick: Callable[..., list["Reply"]], of_replies: Callable[..., T]
    ) -> Iterator[T | BadRecord]:
        """What a function makes of each prompt and the scores of the picked replies: a judge is paid for each."""
        import torch

        for part in self.made.parts:
            yield from (MADE[kind](**values) for kind, values in part)
        # Some batches at a time: sorted by length, and no more replies are held.
        step = max(1, 16 * self.batch_size // self.num_replies)
        for start in range(step * len(self.made.parts), len(prompts), step):
            # Each time anew, so that a run that goes on draws the same.
            torch.manual_seed(self.seed + start)
            made: list[T | BadRecord] = []
            asked: list[tuple[Asked, list[int]]] = []
            for prompt in prompts[start : start + step]:
                try:
                    asked.append((prompt, self.encode(prompt)))
                except Unusable as error:
                    made.append(BadRecord(prompt.source, error.reason, error.detail))
            groups = []
            for prompt, replies in self.reply([prompt for prompt, _ in asked], [ids for _, ids in asked]):
                try:
                    groups.append((prompt, pick(prompt, replies)))
                except Unusable as error:
                    made.append(BadRecord(prompt.source, error.reason, error.detail))
            for (prompt, replies), scores in zip(groups, self.score(groups), strict=True):
                try:
                    if isinstance(scores, Unusable):
                        raise scores
                    made.append(of_replies(prompt, replies, scores))
                except Unusable as error:
                    made.append(BadRecord(prompt.source, error.reason, error.detail))
            yield from made
            if self.judge is not None and self.judge.stopped:
                rest = prompts[start + step :]
                yield from (BadRecord(prompt.source, "not judged", self.judge.stopped) for prompt in rest)
                return
            self.made.add([(type(one).__name__, asdict(one)) for one in made])

    def reply(self, prompts: Sequence[Asked], prompt_ids: Sequence[list[int]]) -> list[tuple[Asked, list["Reply"]]]:
        """Each prompt with the replies that can be chosen: those with an answer, each once."""
        from medtune.models.generation import generate_replies

        chat_model = self.chat_model
        rows = [ids for ids in prompt_ids for _ in range(self.num_replies)]
        with chat_model.in_use() as model:
            replies = generate_replies(
                model, chat_model.tokenizer, rows, chat_model.stop_ids, self.decoding, batch_size=self.batch_size
            )
        opened = chat_model.chat_template.opens_thought
        replies = [replace(reply, text=with_opening(reply.text, opened)) for reply in replies]
        groups = []
        for number, prompt in enumerate(prompts):
            own = replies[number * self.num_replies : (number + 1) * self.num_replies]
            distinct = {(reply.text, reply.ended): reply for reply in own if split_reply(reply.text).answer}
            groups.append((prompt, [*distinct.values()]))
        return groups

    def encode(self, prompt: Asked) -> list[int]:
        from medtune.reading.tokenization import encode_prompt, refuse_control_tokens

        chat_model = self.chat_model
        refuse_control_tokens(chat_model.chat_template, prompt.messages, None)
        ids = encode_prompt(chat_model.tokenizer, chat_model.chat_template, prompt.messages)
        if len(ids) + self.decoding.max_new_tokens > chat_model.context:
            raise Unusable(
                "prompt too long",
                f"{len(ids)} tokens and --max_new_tokens {self.decoding.max_new_tokens} exceed the model's context "
                f"of {chat_model.context}",
            )
        return ids

    # ------------------------------------------------------------ scores

    def score(self, groups: Sequence[tuple[Asked, list["Reply"]]]) -> list[Scores]:
        if self.judge is not None:
            return self.judge_all(groups)
        return [self.score_by_model(*group) if self.reward_model is not None else {} for group in groups]

    def score_by_model(self, prompt: Asked, replies: Sequence["Reply"]) -> Scores:
        try:
            rows = [self.encode_judged(prompt, reply) for reply in replies]
        except Unusable as error:
            return error
        return dict(zip(replies, self.reward_model.score(rows, self.batch_size), strict=True))

    def encode_judged(self, prompt: Asked, reply: "Reply") -> list[int]:
        """The ids for the reward model; raises Unusable for control tokens, or more ids than its context."""
        from medtune.reading.tokenization import refuse_control_tokens

        messages = [*prompt.messages, {"role": "assistant", "content": reply.text}]
        refuse_control_tokens(self.reward_model.chat_template, messages, None)
        ids = self.reward_model.encode(prompt.messages, reply.text, reply.ended)
        if len(ids) > self.reward_model.context:
            raise Unusable(
                "too long", f"{len(ids)} tokens, over the reward model's context of {self.reward_model.context}"
            )
        return ids

    def judge_all(self, groups: Sequence[tuple[Asked, list["Reply"]]]) -> list[Scores]:
        """By the record's rubrics, or ours of quality; all groups are judged together."""
        rubrics = [rubric_of(prompt) for prompt, _ in groups]
        questions = [
            judging_question(prompt, reply, rubric)
            for (prompt, replies), rubric in zip(groups, rubrics, strict=True)
            for reply in replies
        ]
        answers = iter(self.judge.ask(questions))
        scores: list[Scores] = []
        for (_, replies), rubric in zip(groups, rubrics, strict=True):
            own = list(islice(answers, len(replies)))
            unjudged = next((answer for answer in own if isinstance(answer, Unjudged)), None)
            by_reply = {} if unjudged else {r: rubric_score(rubric, met) for r, met in zip(replies, own, strict=True)}
            scores.append(Unusable("not judged", unjudged.reason) if unjudged else by_reply)
        return scores


def rubric_of(prompt: Asked) -> list[Criterion]:
    rubrics = prompt.rest.get("rubrics") if isinstance(prompt, Prompt) else None
    return to_criteria(rubrics) if rubrics else quality_rubric(prompt.messages)


def judging_question(prompt: Asked, reply: "Reply", rubric: Sequence[Criterion]) -> JudgeQuestion:
    own = prompt.reply if isinstance(prompt, Prompt) else prompt.chosen
    criteria = [criterion.text for criterion in rubric]
    return grading_question(prompt.messages, split_reply(reply.text).answer, criteria, split_reply(own).answer)


def whole_replies(replies: Sequence["Reply"]) -> list["Reply"]:
    """Those that have ended, as one that was cut is no model to follow; raises Unusable without one."""
    whole = [reply for reply in replies if reply.ended]
    if not whole:
        raise Unusable("no whole reply", "every reply was cut; raise --max_new_tokens")
    return whole


def best_over_worst(prompt: Pair, replies: Sequence["Reply"], scores: dict["Reply", float]) -> Pair:
    """The best-scored over the worst-scored reply, with the difference of their scores as margin."""
    best = max(whole_replies(replies), key=scores.get)
    worst = min((reply for reply in replies if reply.text != best.text), key=scores.get, default=best)
    if scores[best] <= scores[worst]:
        raise Unusable("nothing to reject", "the replies are the same or score the same")
    margin = round(scores[best] - scores[worst], 4)
    return replace(prompt, chosen=best.text, rejected=worst.text, margin=margin)


def least_like(prompt: Pair, replies: Sequence["Reply"], _: Scores) -> Pair:
    """The reply in the data over the one whose answer differs most from its answer, the longest of several such."""
    lead, chosen = split_thought(prompt.chosen)
    texts = {split_reply(reply.text).answer: reply.text for reply in replies}
    answers = [answer for answer in texts if answer != chosen]
    if not answers:
        raise Unusable("nothing to reject", "the model's answers are empty or the one in the data")
    answer = min(answers, key=lambda text: (likeness(text, chosen), -len(text)))
    return replace(prompt, rejected=texts[answer] if lead else answer)


def candidates(prompt: Prompt, replies: Sequence["Reply"]) -> list["Reply"]:
    """The replies that can be the best: that have ended, to an exam question with the right letter; or Unusable."""
    whole = whole_replies(replies)
    if prompt.exam is None:
        return whole
    right = [reply for reply in whole if has_right_letter(prompt.exam, reply)]
    if not right:
        raise Unusable("no right letter", "in the strict form that --rewards exam reads")
    return right


def best_of(prompt: Prompt, replies: Sequence["Reply"], scores: dict["Reply", float]) -> Dialogue:
    """The prompt with the best-scored of the candidates, or without scores an exam question's first."""
    if prompt.exam is None and not scores:
        raise Unusable("nothing to choose by", "it is no exam question; --reward_model or --judge scores its replies")
    best = max(replies, key=scores.get) if scores else replies[0]
    return Dialogue([*prompt.messages, {"role": "assistant", "content": best.text}], None, prompt.source)


def has_right_letter(exam: Exam, reply: "Reply") -> bool:
    from medtune.rl.rewards import exam_reward
    from medtune.rl.scored_replies import ScoredReply

    record = {"answer": exam.answer, "options": exam.options}
    return exam_reward(ScoredReply(reply.text, reply.n_tokens, reply.ended, [], record)) == 1


# ---------------------------------------------------------------- main


def made_so_far(args: argparse.Namespace, prompts: Sequence[Asked]) -> MadeSoFar:
    """What an interrupted run of this command has made; raises UserError if another command's is there."""
    from medtune.models.lineage import check_model_path
    from medtune.models.loading import weights_fingerprint

    settings = {f"--{name}": value for name, value in vars(args).items() if name not in OF_THE_RUN}
    for flag in (flag for flag in ("--model", "--reward_model") if settings[flag]):
        check_model_path(settings[flag], flag)
        settings[f"weights of {flag}"] = weights_fingerprint(settings[flag], flag=flag, cache_dir=args.cache_dir)[:12]
    settings["the drawn records"] = hashlib.sha256(repr(prompts).encode()).hexdigest()[:12]
    made = MadeSoFar(args.output_file, "--output_file", settings)
    if made.parts:
        print(f"{made.file}: {sum(map(len, made.parts)):,} of {len(prompts):,} are made already")
    return made


def write_pairs(pairs: Iterable[tuple[Pair, str] | BadRecord], n_prompts: int, file: TextIO) -> list[str]:
    """Write the pairs and return summary lines; raises UserError if there are none."""
    report, failures = Report(), Counter()
    chosen_lengths, rejected_lengths, margins = [], [], []
    for pair, failure in report.usable(tqdm(pairs, total=n_prompts, unit=" pairs", disable=None)):
        file.write(guide_line(pair))
        failures[failure] += 1
        chosen_lengths.append(len(pair.chosen))
        rejected_lengths.append(len(pair.rejected))
        margins += [] if pair.margin is None else [pair.margin]
    if not report.kept:
        raise UserError("\n".join(["no pair could be made:", *dropped_lines(report)]))
    longer = sum(r > c for c, r in zip(chosen_lengths, rejected_lengths, strict=True)) / report.kept
    return [
        f"{report.kept:,} pairs",
        *dropped_lines(report),
        "rejected: " + ", ".join(f"{count:,} {failure}" for failure, count in failures.most_common()),
        f"characters, median: {statistics.median(chosen_lengths):g} chosen, {statistics.median(rejected_lengths):g} "
        f"rejected; the rejected reply is the longer one in {longer:.0%}",
        *([f"margin, median: {statistics.median(margins):.4g}"] if margins else []),
    ]


def write_dialogues(dialogues: Iterable[Dialogue | BadRecord], n_prompts: int, file: TextIO) -> list[str]:
    """Write the dialogues and return summary lines; raises UserError if there are none."""
    report, lengths = Report(), []
    for dialogue in report.usable(tqdm(dialogues, total=n_prompts, unit=" dialogues", disable=None)):
        file.write(guide_line(dialogue))
        lengths.append(len(dialogue.messages[-1]["content"]))
    if not report.kept:
        raise UserError("\n".join(["no reply could be chosen:", *dropped_lines(report)]))
    lines = [f"{report.kept:,} dialogues of {report.read:,} prompts, each with the best of the model's replies"]
    return [*lines, *dropped_lines(report), f"characters of a reply, median: {statistics.median(lengths):g}"]


def check_flags(args: argparse.Namespace) -> None:
    """Refuse in one line what cannot be meant."""
    if not args.output_file.name.lower().endswith(ENDINGS):
        raise UserError(f"--output_file {args.output_file}: one pair a line is written; let it end in .jsonl")
    for name in ("num_samples", "num_replies", "batch_size", "max_new_tokens"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name} {getattr(args, name)}: give a number of at least 1")
    choosers = {"--reward_model": args.reward_model, "--judge": args.judge, "--format sft": args.format == "sft"}
    for flag in (flag for flag, is_given in choosers.items() if is_given):
        if not args.model:
            raise UserError(f"{flag} chooses among the replies of a model: name that with --model")
        if args.num_replies < 2:
            raise UserError(f"--num_replies 1: {flag} needs several to choose from")
    if args.reward_model and args.judge:
        raise UserError("--reward_model and --judge both score the replies: give one of them")
    judge_arguments(args).check_judge("--judge" if args.judge else None)
    if args.num_replies > 1 and args.temperature == 0:
        raise UserError(f"--temperature 0: all {args.num_replies} replies would be the same; give more than 0")


def main(argv: list[str] | None = None) -> None:
    """Parse the flags, draw the prompts, make pairs or dialogues, say what they are like."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_records_flags(parser, "--sft_data", "dialogues: a file, or a folder and all below it")
    parser.add_argument("--output_file", required=True, type=Path, help="the new .jsonl file, or .jsonl.gz")
    parser.add_argument("--format", choices=("pairs", "sft"), default="pairs", help="sft: the best replies of --model")
    parser.add_argument("--num_samples", type=int, default=5000, help="pairs or dialogues, drawn from all dialogues")
    parser.add_argument("--seed", type=int, default=42, help="of all that is drawn")
    add_ignore_keys(parser)
    parser.add_argument("--overwrite", action="store_true", help="replace the output if it exists")
    group = parser.add_argument_group("replies of a model")
    group.add_argument("--model", help="hub name or folder of a model, or folder of a LoRA adapter")
    group.add_argument("--reward_model", help="a classifier with one output or its LoRA adapter, which judges them")
    group.add_argument("--num_replies", type=int, default=4, help="of the model to each prompt")
    group.add_argument("--template_name", help="named prompt template instead of the tokenizer's own")
    group.add_argument("--max_new_tokens", type=int, default=512, help="a reply is cut after so many tokens")
    group.add_argument("--temperature", type=float, default=0.8, help="above 0; higher draws less likely words")
    group.add_argument("--top_p", type=float, default=0.95, help="share of the chance that is drawn from")
    group.add_argument("--batch_size", type=int, default=16, help="replies written or judged at a time")
    group.add_argument("--torch_dtype", default="auto", choices=("auto", "bfloat16", "float16", "float32"))
    group.add_argument("--load_in_4bit", action="store_true", help="base weights in 4-bit NF4 (bitsandbytes)")
    group.add_argument("--load_in_8bit", action="store_true", help="base weights in 8 bit (bitsandbytes)")
    group.add_argument("--cache_dir", help="folder for downloaded models")
    exam_help = "sft: exam questions ask for thinking and then <answer>X</answer> (tagged), or for the letter"
    group.add_argument("--exam_format", choices=("tagged", "letter"), default="tagged", help=exam_help)
    add_use_cpu(group)
    add_judge_flags(parser)
    args = parser.parse_args(argv)
    check_flags(args)
    if args.model and (reason := cpu_reason(args.use_cpu)):
        args.use_cpu = True
        print(f"{reason}: float32 on the CPU")

    files, unread = find_records(args.sft_data, args.dataset_name, "--sft_data", cache_dir=args.cache_dir)
    refuse_same(files, args.output_file, "--output_file")
    reading = Reading(args.ignore_keys)
    form = args.exam_format if args.format == "sft" else None
    bar = partial(tqdm, unit=" records", disable=None)
    prompts, report = draw_prompts(files, args.num_samples, args.seed, reading, form, bar)
    if not prompts:
        named = named_records("--sft_data", args.sft_data, args.dataset_name)
        raise UserError("\n".join([f"{named}: no usable dialogue in it", *dropped_lines(report)]))
    for line in [
        f"{args.sft_data or args.dataset_name}: {report.summary()}",
        *dropped_lines(report),
        *reading.lines(),
        *unread_lines(unread),
    ]:
        print(line)
    if len(prompts) < args.num_samples:
        print(f"--num_samples {args.num_samples:,}: there are only {len(prompts):,} to draw from")

    if args.format == "sft" and not (args.reward_model or args.judge or any(prompt.exam for prompt in prompts)):
        raise UserError(
            "--format sft: there is no exam question, whose letter would say which reply is best; give --reward_model "
            "or --judge, which score replies to any question"
        )
    judge = Judge(judge_arguments(args)) if args.judge else None
    if judge is not None:
        judge.try_out()
    with new_text_file(args.output_file, "--output_file", args.overwrite) as file:
        if args.model:
            made = made_so_far(args, prompts)
            sampler = Sampler(args, judge, made)
            try:
                if args.format == "sft":
                    lines = write_dialogues(sampler.dialogues(prompts), len(prompts), file)
                else:
                    lines = write_pairs(sampler.pairs(prompts), len(prompts), file)
            except UserError:
                if sum(map(len, made.parts)) == len(prompts):  # all was made and none is of use: nothing to go on with
                    made.delete()
                raise
        else:
            lines = write_pairs(spoil_replies(prompts, args.seed), len(prompts), file)
    print("\n".join([f"{args.output_file}: {lines[0]}", *lines[1:]]))
    if judge is not None:
        print(f"judge: {judge.usage}")
        if judge.stopped:
            raise UserError(
                f"{judge.where}: {args.output_file} is incomplete: {judge.stopped}; the same command with --overwrite "
                "goes on"
            )
    if args.model:
        made.delete()


if __name__ == "__main__":
    run_script(main)
