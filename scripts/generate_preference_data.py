"""Make preference pairs of dialogues: the reply in the data is chosen, and a worse one rejected.

Without a model, the rejected replies are bad in four ways, each as often: another question's answer, cut off, vague,
repeating itself. Half of all are longer than the chosen one, so that length tells nothing. With `--model`, the
model's own replies are rejected: of several to a prompt, the one that is the least like the reply in the data, or
with `--reward_model` the best-scored of them is chosen over the worst. System prompts and earlier turns are kept; of
a dialogue of several turns, the pair is about its longest reply. A pair differs in its answers: those are compared and
spoilt, while a thought before them stays, and a model's thought is left out where the reply in the data has none.

    python scripts/generate_preference_data.py --sft_data data/finetune/train.jsonl \\
        --output_file data/reward/preference_data.jsonl --num_samples 5000
    python scripts/generate_preference_data.py --sft_data data/finetune/train.jsonl \\
        --output_file data/reward/own_mistakes.jsonl --num_samples 2000 \\
        --model outputs-sft-qwen2.5-3b/checkpoint-best --reward_model outputs-rm-qwen2.5-3b/checkpoint-best
"""

import argparse
import random
import re
import statistics
import sys
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from medtune.devices import add_use_cpu, cpu_reason
from medtune.errors import Unusable, UserError, run_script
from medtune.output_files import new_text_file, refuse_same
from medtune.reading.finding import RecordFile, find_records
from medtune.reading.foreign_forms import add_ignore_keys
from medtune.reading.guide_form import guide_line
from medtune.reading.hub_data import add_records_flags, named_records
from medtune.reading.keys import Reading
from medtune.reading.readers import read_dialogues
from medtune.reading.records import BadRecord, Dialogue, Pair, Report
from medtune.reading.thoughts import split_reply, with_opening
from medtune.reading.words import dropped_lines, unread_lines
from medtune.sample_data.pairs import fill, repeat_beginning

if TYPE_CHECKING:
    from medtune.models.generation import Reply

ENDINGS = (".jsonl", ".jsonl.gz")

# ---------------------------------------------------------------- which replies


def draw_prompts(
    files: Sequence[RecordFile], num_samples: int, seed: int, reading: Reading | None = None
) -> tuple[list[Pair], Report]:
    """Sample `num_samples` dialogues uniformly, in their order, as pairs without a rejected reply yet.

    Only the sample is in memory (reservoir sampling, Vitter 1985).
    """
    report, rng = Report(), random.Random(seed)
    drawn: list[tuple[int, Pair]] = []
    n_usable = 0
    for dialogue in report.usable(tqdm(read_dialogues(files, reading), unit=" records", disable=None)):
        try:
            prompt = prompt_of(dialogue)
        except Unusable as error:
            report.drop(BadRecord(dialogue.source, error.reason, error.detail))
            continue
        n_usable += 1
        place = len(drawn) if len(drawn) < num_samples else rng.randrange(n_usable)
        if place < num_samples:
            drawn[place : place + 1] = [(n_usable, prompt)]
    return [prompt for _, prompt in sorted(drawn, key=lambda numbered: numbered[0])], report


def prompt_of(dialogue: Dialogue) -> Pair:
    """A pair of the turns up to the longest reply and, as chosen, that reply; raises Unusable."""
    messages = dialogue.messages
    if dialogue.tools or any(message.get("tool_calls") for message in messages):
        raise Unusable("uses tools", "pairs are made of dialogues without tools")
    replies = [n for n, message in enumerate(messages) if message["role"] == "assistant" and "weight" not in message]
    # The last turn is often a mere "you are welcome".
    longest = max(replies, key=lambda index: len(split_reply(messages[index]["content"]).answer))
    if not split_reply(messages[longest]["content"]).answer:
        raise Unusable("no answer", "its replies are thoughts alone")
    return Pair(messages[:longest], messages[longest]["content"], "", None, dialogue.source)


# ---------------------------------------------------------------- rejected replies without a model

VAGUE = {
    "zh": """
这个问题不太好回答，要看具体情况。
一般来说问题不大，不用太担心。
可以先观察一段时间再说。
每个人的情况都不一样，没有统一的答案。
平时多留意自己的身体就可以了。
保持良好的生活习惯总是有好处的。
如果觉得有必要，可以去看看。
适当休息，放松心情。
这种情况很常见，很多人都有过。
有时候会好，有时候也不一定。
饮食上注意一些，具体也说不好。
可以试试一些常用的方法。
建议您多了解一些这方面的知识。
总之要综合考虑各方面的因素。
原因可能有很多，不能一概而论。
过几天看看有没有变化吧。
不同的说法都有，仅供您参考。
身体好了，自然就没事了。
该怎么做，您自己决定就好。
希望我的回答对您有帮助。
遇到这种问题不要着急。
多运动，少熬夜，差不多就行。
""".strip().splitlines(),
    "en": """
It is hard to say without knowing more.
This is usually nothing to worry about.
Everybody is different.
You could wait a while and see how it goes.
There can be many reasons for this.
A healthy way of life always helps.
Some people find that it gets better, others do not.
Just listen to your body.
It depends on a number of things.
You may want to look into it further at some point.
Try to rest and not to think about it too much.
There are different opinions on this question.
In general, it is good to be careful.
Do whatever feels right to you.
Something simple may well be enough.
It is a common question, and many people ask it.
Time will tell.
Eating well and sleeping enough is never wrong.
You can always ask somebody about it.
I hope that this helps.
All in all, several points have to be considered.
Whether that applies here is difficult to judge.
""".strip().splitlines(),
}


def language_of(text: str) -> str:
    return "zh" if len(re.findall("[\u4e00-\u9fff]", text)) > len(text) / 10 else "en"


# By language: length, text and question of the replies of all prompts, the shortest first.
Answers = dict[str, list[tuple[int, str, str]]]


def split_thought(reply: str) -> tuple[str, str]:
    """What stands before the answer, and the answer; a reply without a thought is all answer."""
    thought, answer, is_closed = split_reply(reply)
    start = reply.rindex(answer) if thought or not is_closed else 0
    return reply[:start], reply[start:]


def group_answers(prompts: Iterable[Pair]) -> Answers:
    answers: Answers = {"zh": [], "en": []}
    for prompt in prompts:
        _, answer = split_thought(prompt.chosen)
        answers[language_of(answer)].append((len(answer), answer, prompt.messages[-1]["content"]))
    return {language: sorted(entries) for language, entries in answers.items()}


def reject_another_answer(prompt: Pair, length: int, answers: Answers, rng: random.Random) -> str | None:
    """A sound answer of about that length to another question, which says something else."""
    entries = answers[language_of(prompt.chosen)]
    middle = bisect_left(entries, (length,))
    around = entries[max(0, middle - 20) : middle + 20]
    least = (0.8, None)
    for _, answer, question in rng.sample(around, len(around)):
        if question != prompt.messages[-1]["content"]:
            least = min(least, (likeness(answer, prompt.chosen), answer), key=lambda candidate: candidate[0])
            if least[0] < 0.5:
                break
    return least[1]


def reject_vague(prompt: Pair, length: int, answers: Answers, rng: random.Random) -> str | None:
    """Sentences that are true of everything."""
    language = language_of(prompt.chosen)
    return fill(VAGUE[language], length, language, rng)


def reject_cut_off(prompt: Pair, length: int, answers: Answers, rng: random.Random) -> str | None:
    """The reply that breaks off in the middle of a phrase."""
    text = prompt.chosen
    for end in range(min(length, len(text) - 1), 3, -1):
        if text[end - 1].isalnum() and text[end].isalnum():
            return text[:end]
    return None


def reject_repeats(prompt: Pair, length: int, answers: Answers, rng: random.Random) -> str | None:
    """The beginning of the reply over and over."""
    return repeat_beginning(prompt.chosen, length)


FAILURES: dict[str, Callable[[Pair, int, Answers, random.Random], str | None]] = {
    "another answer": reject_another_answer,
    "vague": reject_vague,
    "cut off": reject_cut_off,
    "repeats": reject_repeats,
}
# Each failure twice, and half of all longer than the chosen reply, though what is cut off is always shorter.
PLAN = [
    *(("another answer", True), ("another answer", False), ("vague", True), ("vague", False)),
    *(("cut off", False), ("cut off", False), ("repeats", True), ("repeats", True)),
]


def build_pairs(prompts: Sequence[Pair], seed: int) -> Iterator[tuple[Pair, str] | BadRecord]:
    """Each prompt with a rejected reply, and the failure it has."""
    rng = random.Random(seed)
    answers = group_answers(prompts)
    n_made: Counter[str] = Counter()
    plan: list[tuple[str, bool]] = []
    for original in prompts:
        lead, answer = split_thought(original.chosen)
        prompt = replace(original, chosen=answer)
        plan = plan or rng.sample(PLAN, len(PLAN))
        planned, is_longer = plan.pop()
        length = round(len(prompt.chosen) * (rng.uniform(1.08, 1.6) if is_longer else rng.uniform(0.6, 0.92)))
        # Where the planned failure is impossible, as to cut one word off, the rarest that is possible.
        for failure in [planned, *sorted(FAILURES.keys() - {planned}, key=lambda name: (n_made[name], name))]:
            rejected = FAILURES[failure](prompt, length, answers, rng)
            if rejected and rejected != prompt.chosen:
                n_made[failure] += 1
                yield replace(original, rejected=lead + rejected), failure
                break
        else:
            yield BadRecord(prompt.source, "nothing to reject", f"no failure can be made of {prompt.chosen!r:.40}")


def likeness(text: str, other: str) -> float:
    """The share of pairs of neighbouring characters that two texts have in common, 0 to 1."""
    first, second = (Counter(pairwise(words)) for words in (text, other))
    total = first.total() + second.total()
    return 2 * (first & second).total() / total if total else 0.0


# ---------------------------------------------------------------- rejected replies of a model


class Sampler:
    """A model that answers prompts several times, and an optional reward model that scores the answers."""

    def __init__(self, args: argparse.Namespace):
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
        self.num_replies, self.batch_size = args.num_replies, args.batch_size
        self.chat_model = describe_model(model_args, "--model")
        self.reward_model = RewardModel(args.reward_model, model_args) if args.reward_model else None
        load_weights([self.chat_model], model_args)

    def pairs(self, prompts: Sequence[Pair]) -> Iterator[tuple[Pair, str] | BadRecord]:
        """Each prompt with the model's reply that is to be rejected."""
        from medtune.models.generation import generate_replies

        chat_model = self.chat_model
        # Some batches at a time: sorted by length, and no more replies are held.
        step = max(1, 16 * self.batch_size // self.num_replies)
        for start in range(0, len(prompts), step):
            asked: list[tuple[Pair, list[int]]] = []
            for prompt in prompts[start : start + step]:
                try:
                    asked.append((prompt, self.encode(prompt)))
                except Unusable as error:
                    yield BadRecord(prompt.source, error.reason, error.detail)
            rows = [ids for _, ids in asked for _ in range(self.num_replies)]
            with chat_model.in_use() as model:
                replies = generate_replies(
                    model, chat_model.tokenizer, rows, chat_model.stop_ids, self.decoding, batch_size=self.batch_size
                )
            opened = chat_model.chat_template.opens_thought
            replies = [replace(reply, text=with_opening(reply.text, opened)) for reply in replies]
            for number, (prompt, _) in enumerate(asked):
                own = replies[number * self.num_replies : (number + 1) * self.num_replies]
                try:
                    yield (self.best_over_worst if self.reward_model else least_like)(prompt, own), "the model's"
                except Unusable as error:
                    yield BadRecord(prompt.source, error.reason, error.detail)

    def encode(self, prompt: Pair) -> list[int]:
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

    def best_over_worst(self, prompt: Pair, replies: Sequence["Reply"]) -> Pair:
        """The best-scored over the worst-scored reply, with the difference of their scores as margin."""
        answered = [reply for reply in replies if split_reply(reply.text).answer]
        distinct = list({(reply.text, reply.ended): reply for reply in answered}.values())
        rows = [self.encode_judged(prompt, reply) for reply in distinct]
        scores = dict(zip(distinct, self.reward_model.score(rows, self.batch_size), strict=True))
        whole = [reply for reply in distinct if reply.ended]  # a reply that was cut is no model to follow
        if not whole:
            raise Unusable("no whole reply", "every reply was cut; raise --max_new_tokens")
        best = max(whole, key=scores.get)
        worst = min((reply for reply in distinct if reply.text != best.text), key=scores.get, default=best)
        if scores[best] <= scores[worst]:
            raise Unusable("nothing to reject", "the replies are the same or score the same")
        margin = round(scores[best] - scores[worst], 4)
        return replace(prompt, chosen=best.text, rejected=worst.text, margin=margin)

    def encode_judged(self, prompt: Pair, reply: "Reply") -> list[int]:
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


def least_like(prompt: Pair, replies: Sequence["Reply"]) -> Pair:
    """The reply in the data over the one whose answer differs most from its answer, the longest of several such."""
    lead, chosen = split_thought(prompt.chosen)
    texts = {split_reply(reply.text).answer: reply.text for reply in replies}
    answers = [answer for answer in texts if answer and answer != chosen]
    if not answers:
        raise Unusable("nothing to reject", "the model's answers are empty or the one in the data")
    answer = min(answers, key=lambda text: (likeness(text, chosen), -len(text)))
    return replace(prompt, rejected=texts[answer] if lead else answer)


# ---------------------------------------------------------------- main


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


def check_flags(args: argparse.Namespace) -> None:
    """Refuse in one line what cannot be meant."""
    if not args.output_file.name.lower().endswith(ENDINGS):
        raise UserError(f"--output_file {args.output_file}: one pair a line is written; let it end in .jsonl")
    for name in ("num_samples", "num_replies", "batch_size", "max_new_tokens"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name} {getattr(args, name)}: give a number of at least 1")
    if args.reward_model and not args.model:
        raise UserError("--reward_model judges the replies of a model: name that with --model")
    if args.reward_model and args.num_replies < 2:
        raise UserError("--num_replies 1: a reward model needs several to choose from")
    if args.num_replies > 1 and args.temperature == 0:
        raise UserError(f"--temperature 0: all {args.num_replies} replies would be the same; give more than 0")


def main(argv: list[str] | None = None) -> None:
    """Parse the flags, draw the prompts, make the pairs, say what they are like."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_records_flags(parser, "--sft_data", "dialogues: a file, or a folder and all below it")
    parser.add_argument("--output_file", required=True, type=Path, help="the new .jsonl file, or .jsonl.gz")
    parser.add_argument("--num_samples", type=int, default=5000, help="pairs, drawn from all dialogues")
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
    add_use_cpu(group)
    args = parser.parse_args(argv)
    check_flags(args)
    if args.model and (reason := cpu_reason(args.use_cpu)):
        args.use_cpu = True
        print(f"{reason}: float32 on the CPU")

    files, unread = find_records(args.sft_data, args.dataset_name, "--sft_data", cache_dir=args.cache_dir)
    refuse_same(files, args.output_file, "--output_file")
    reading = Reading(args.ignore_keys)
    prompts, report = draw_prompts(files, args.num_samples, args.seed, reading)
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

    with new_text_file(args.output_file, "--output_file", args.overwrite) as file:
        if args.model:
            from transformers import set_seed

            set_seed(args.seed)
            pairs = Sampler(args).pairs(prompts)
        else:
            pairs = build_pairs(prompts, args.seed)
        lines = write_pairs(pairs, len(prompts), file)
    print("\n".join([f"{args.output_file}: {lines[0]}", *lines[1:]]))


if __name__ == "__main__":
    run_script(main)
