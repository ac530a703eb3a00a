"""Replies that are worse than a good one in a known way: vague, cut off, repeating themselves, to another question."""

import random
import re
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import pairwise

from medtune.reading.records import BadRecord, Pair
from medtune.reading.thoughts import split_reply
from medtune.sample_data.pairs import fill, repeat_beginning

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


def reject_broken_off(prompt: Pair, length: int, answers: Answers, rng: random.Random) -> str | None:
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
    "cut off": reject_broken_off,
    "repeats": reject_repeats,
}
# Each failure twice, and half of all longer than the chosen reply, though what is cut off is always shorter.
PLAN = [
    *(("another answer", True), ("another answer", False), ("vague", True), ("vague", False)),
    *(("cut off", False), ("cut off", False), ("repeats", True), ("repeats", True)),
]


def spoil_replies(prompts: Sequence[Pair], seed: int) -> Iterator[tuple[Pair, str] | BadRecord]:
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
