"""The reward `judge`: what share of a rubric's points a strong model gives a reply."""

import math
import os
import time
from collections.abc import Sequence

from loguru import logger

from medtune.measuring.judge_client import Judge, JudgeArguments, Unjudged
from medtune.measuring.judge_prompts import JudgeQuestion, grading_question
from medtune.measuring.rubrics import quality_rubric, rubric_score
from medtune.reading.criteria import Criterion, to_criteria
from medtune.rl.scored_replies import ScoredReply
from medtune.rl.vllm_servers import raise_in_all
from medtune.training.interruption import SignalListener, StoppedInRolloutError

SECONDS_BETWEEN_LINES = 60


class JudgeReward:
    """Scores replies by the rubrics of their records, or by ours of quality; all replies of a call are judged together.

    The processes of a run call it equally often, and each has its part of the judge's budget and rate.
    """

    def __init__(self, args: JudgeArguments):
        self.judge = Judge(args, int(os.environ.get("WORLD_SIZE", "1")))
        self.last_line = -math.inf

    def __call__(self, replies: Sequence[ScoredReply], stop: SignalListener) -> list[float]:
        """At most 1, 0 for a reply without an answer, below 0 for bad ones, NaN for one that could not be judged.

        Raises StoppedInRolloutError in all processes once a signal has reached one of them, ServerError once the judge
        of one answers no more, or its budget is used up.
        """
        rubrics = [_rubric(reply) for reply in replies]
        asked = {n: _question(reply, rubrics[n]) for n, reply in enumerate(replies) if reply.answer}
        answers = self.judge.ask([*asked.values()], is_stopped=lambda: stop.received is not None)
        answers = dict(zip(asked, answers, strict=True))
        if stop.any_received():
            raise StoppedInRolloutError
        raise_in_all(f"{self.judge.where}: {self.judge.stopped}" if self.judge.stopped else None)
        if unjudged := [answer for answer in answers.values() if isinstance(answer, Unjudged)]:
            logger.warning(f"judge: {len(unjudged)} of {len(replies)} replies have no judgement: {unjudged[0].reason}")
        if time.monotonic() - self.last_line > SECONDS_BETWEEN_LINES:
            self.log_usage()
        scores = [0.0] * len(replies)
        for n, answer in answers.items():
            scores[n] = math.nan if isinstance(answer, Unjudged) else rubric_score(rubrics[n], answer)
        return scores

    def rehearse(self, replies: Sequence[ScoredReply]) -> None:
        """Raise UserError unless the judge grades a made-up reply, and log what these replies would take."""
        self.judge.try_out()
        questions = [_question(reply, _rubric(reply)) for reply in replies]
        logger.info(f"judge: {len(replies)} replies like these: {self.judge.describe_cost(questions)}")

    def log_usage(self) -> None:
        self.last_line = time.monotonic()
        logger.info(f"judge: so far {self.judge.usage}")


def _rubric(reply: ScoredReply) -> list[Criterion]:
    return to_criteria(reply.record["rubrics"]) if "rubrics" in reply.record else quality_rubric(reply.prompt)


def _question(reply: ScoredReply, rubric: Sequence[Criterion]) -> JudgeQuestion:
    reference = reply.record.get("reference")
    return grading_question(reply.prompt, reply.answer, [criterion.text for criterion in rubric], reference)
