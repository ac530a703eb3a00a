"""A judge: a model behind OpenAI's interface that grades replies, asked with retries, a rate limit, a budget, a cache.

An answer is kept on the disk under the request it answers, so that what was judged once costs nothing again.
"""

import argparse
import hashlib
import ipaddress
import json
import math
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields
from multiprocessing.pool import AsyncResult, ThreadPool
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from medtune.errors import UserError
from medtune.measuring.judge_prompts import JudgeQuestion, grading_question, read_answer
from medtune.output_files import refuse_unwritable

KEY = "JUDGE_API_KEY"
# Requests at a time; of each so many tries, and the seconds that an answer and the pause before a try may take.
AT_A_TIME = 32
TRIES = 5
SECONDS_FOR_A_JUDGEMENT = 180
# That answers under way still have once a signal stops a training: they are paid for.
SECONDS_AT_A_SIGNAL = 5
LONGEST_PAUSE = 60
# Of an answer, with the thought of a judge that thinks.
MAX_ANSWER_TOKENS = 2048
# So many questions in a row without an answer: the judge is gone, or cannot do it.
FAILURES_IN_A_ROW = 8


@dataclass
class JudgeArguments:
    judge_url: str | None = field(
        default=None,
        metadata={"help": "Of a server with OpenAI's interface that has the judge, such as http://127.0.0.1:8001/v1."},
    )
    judge_model: str | None = field(default=None, metadata={"help": "The judge's name on that server."})
    judge_sends_data: bool = field(
        default=False, metadata={"help": "Questions and replies may be sent to --judge_url on another machine."}
    )
    judge_max_tokens: int | None = field(
        default=None,
        metadata={"help": "Tokens, read and written, that a run may take; needed for a judge on another machine."},
    )
    judge_requests_per_minute: int | None = field(
        default=None, metadata={"help": "At most so many; without it as fast as 32 at a time are answered."}
    )
    judge_cache: str = field(
        default="outputs-judge-cache",
        metadata={"help": "Folder of the judge's answers, which are not asked for again."},
    )

    def check_judge(self, what_for: str | None) -> None:
        """Raise UserError for flags that name no judge, or one that data may not be sent to.

        what_for: the flag that asks for a judge; None where none does, and no flag may name one.
        """
        if what_for is None:
            for name in ("judge_url", "judge_model", "judge_max_tokens", "judge_requests_per_minute"):
                if value := getattr(self, name):
                    raise UserError(f"--{name} {value}: nothing is judged; say what a judge is for, or leave it out")
            return
        for name, example in (
            ("judge_url", "http://127.0.0.1:8001/v1"),
            ("judge_model", "Qwen/Qwen2.5-32B-Instruct-AWQ"),
        ):
            if not getattr(self, name):
                raise UserError(f"--{name} is missing, which {what_for} needs; for example {example}")
        for name in ("judge_max_tokens", "judge_requests_per_minute"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise UserError(f"--{name} {value}: give at least 1")
        is_here, where = is_on_this_machine(self.judge_url), f"--judge_url {self.judge_url}"
        if not is_here and not self.judge_sends_data:
            raise UserError(
                f"{where}: another machine, to which questions and replies would be sent; --judge_sends_data True "
                "allows that, if they may leave this one"
            )
        if not is_here and self.judge_max_tokens is None:
            raise UserError(f"{where}: on another machine --judge_max_tokens is needed, the tokens that you pay for")


def add_judge_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of `JudgeArguments`, for a tool without the libraries' parser."""
    group = parser.add_argument_group("a judge in place of a reward model")
    group.add_argument("--judge", action="store_true", help="the model of --judge_url scores the replies by a rubric")
    kinds = {bool: _truth, int: int, int | None: int}  # transformers' parser leaves int alone of the last
    for spec in fields(JudgeArguments):
        options = {"type": kinds.get(spec.type, str), "default": spec.default, "help": spec.metadata["help"]}
        group.add_argument(f"--{spec.name}", **options)


def _truth(word: str) -> bool:
    if word.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{word!r} is neither True nor False")
    return word.lower() == "true"


def judge_arguments(args: argparse.Namespace) -> JudgeArguments:
    """The values of the flags of `add_judge_flags`."""
    return JudgeArguments(**{spec.name: getattr(args, spec.name) for spec in fields(JudgeArguments)})


def is_on_this_machine(url: str) -> bool:
    """Whether a server's address is a loopback one; raises UserError for what is no address."""
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError:
        parts, host = urlsplit(""), None
    if parts.scheme not in ("http", "https") or not host:
        raise UserError(f"--judge_url {url}: no address of a server; give one such as http://127.0.0.1:8001/v1")
    if "@" in parts.netloc or parts.query:
        raise UserError(f"--judge_url: a key does not belong into the address; export it as {KEY}")
    with suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"


class Unjudged(NamedTuple):
    """In place of a judgement: why there is none."""

    reason: str


@dataclass
class JudgeUsage:
    """What was asked, and the tokens that it took by the server's own count."""

    requests: int = 0
    from_cache: int = 0
    read: int = 0
    written: int = 0

    def __str__(self) -> str:
        return (
            f"{self.requests:,} requests and {self.from_cache:,} answers from the cache: {self.read:,} tokens read, "
            f"{self.written:,} written"
        )


class _Request(NamedTuple):
    """key: of its answer in the cache; most_tokens: that it can take, since no token is less than a byte."""

    key: str
    question: JudgeQuestion
    most_tokens: int


class Judge:
    """The judge of the flags.

    stopped: why nothing is asked any more, "" while it is.
    usage: of this process. Of several, each has its part of budget and rate.
    """

    def __init__(self, args: JudgeArguments, n_processes: int = 1):
        """Raises UserError without a key for another machine, and for a cache that cannot be written; asks nothing."""
        from openai import DefaultHttpxClient, OpenAI  # takes a second

        self.url, self.model, self.cache = args.judge_url.rstrip("/"), args.judge_model, Path(args.judge_cache)
        self.where = f"--judge_url {args.judge_url}"
        is_here, key = is_on_this_machine(self.url), os.environ.get(KEY, "")
        if not is_here and not key:
            raise UserError(f"{self.where}: the environment variable {KEY} is missing; export the server's key in it")
        if not re.fullmatch(r"[!-~]*", key):
            raise UserError(f"{KEY}: it holds a blank or a character that no key has; export the key alone")
        refuse_unwritable(self.cache, "--judge_cache")
        self.budget = math.inf if args.judge_max_tokens is None else args.judge_max_tokens // n_processes
        self.pause = 60 * n_processes / args.judge_requests_per_minute if args.judge_requests_per_minute else 0.0
        self.client = OpenAI(
            base_url=self.url,
            api_key=key or "none",
            max_retries=0,  # ours count against the budget
            timeout=SECONDS_FOR_A_JUDGEMENT,
            # No proxy between processes of one machine, and no redirection of data to another host.
            http_client=DefaultHttpxClient(trust_env=not is_here, follow_redirects=False),
        )
        self.usage, self.stopped = JudgeUsage(), ""
        self._condition, self._ended = threading.Condition(), threading.Event()
        self._order = threading.Lock()
        self._reserved = self._failed_in_a_row = 0
        self._next_turn = 0.0

    # ------------------------------------------------------------ before and after

    def try_out(self) -> None:
        """Raise UserError unless the judge grades a made-up reply in the form that is asked for."""
        messages = [{"role": "user", "content": "感冒了怎么办？"}]
        question = grading_question(messages, "多休息，多喝水。", ["says to rest"])
        (answer,) = self.ask([question], tries=1)
        if isinstance(answer, Unjudged):
            raise UserError(f"{self.where}: {'' if self.stopped else f'{self.model} is no judge: '}{answer.reason}")

    def describe_cost(self, questions: Sequence[JudgeQuestion]) -> str:
        """What they will take: how many are not in the cache, and about how many tokens."""
        requests = {request.key: request for request in map(self._request, questions)}
        new = [request.question for key, request in requests.items() if not self._file(key).is_file()]
        n_read = sum(_about_tokens(question) for question in new)
        return (
            f"{len(new):,} requests to {self.model} and {len(requests) - len(new):,} answers from the cache: about "
            f"{n_read:,} tokens to read, and to write some hundred for each"
        )

    # ------------------------------------------------------------ asking

    def ask(
        self, questions: Sequence[JudgeQuestion], tries: int = TRIES, is_stopped: Callable[[], bool] = bool
    ) -> list[Any | Unjudged]:
        """What the judge says to each question, or why it says nothing; the same question is asked once.

        Ctrl-C stops it as a used-up budget does, so that the caller keeps what is there; another one ends the process.

        is_stopped: of a caller that handles signals itself; once it is True, no answer is waited for any longer.
        """
        keys = [self._request(question) for question in questions]
        requests = {request.key: request for request in keys}
        # Its threads are daemons: one that waits for a server does not keep the process from ending.
        with ThreadPool(AT_A_TIME) as pool:
            answers = {key: pool.apply_async(self._answer, (request, tries)) for key, request in requests.items()}
            try:
                self._wait_for(answers.values(), is_stopped)
            except KeyboardInterrupt:
                signal.signal(signal.SIGINT, signal.SIG_DFL)
                self._stop("interrupted")
                sys.stderr.write(
                    f"judge: interrupted; answers under way are paid and waited for, {SECONDS_FOR_A_JUDGEMENT} seconds "
                    "at most; Ctrl-C again ends it at once\n"
                )
                self._wait_for(answers.values(), is_stopped)
            answered = {key: answer.get() for key, answer in answers.items() if answer.ready()}
        return [answered.get(request.key, Unjudged(self.stopped)) for request in keys]

    def _wait_for(self, answers: Iterable[AsyncResult], is_stopped: Callable[[], bool]) -> None:
        end = math.inf
        for answer in answers:
            while not answer.ready() and time.monotonic() < end:
                answer.wait(1)
                if end == math.inf and is_stopped():
                    end = time.monotonic() + SECONDS_AT_A_SIGNAL
                    self._stop("interrupted")

    def _request(self, question: JudgeQuestion) -> _Request:
        asked = json.dumps([self.url, self.model, question.messages, MAX_ANSWER_TOKENS], ensure_ascii=False).encode()
        return _Request(hashlib.sha256(asked).hexdigest(), question, len(asked) + 64 + MAX_ANSWER_TOKENS)

    def _file(self, key: str) -> Path:
        return self.cache / key[:2] / f"{key}.json"

    def _answer(self, request: _Request, tries: int) -> Any | Unjudged:
        with suppress(OSError, ValueError, KeyError, TypeError):  # none there yet, or one that a killed run spoilt
            answer = request.question.read(read_answer(json.loads(self._file(request.key).read_bytes())["answer"]))
            with self._condition:
                self.usage.from_cache += 1
            return answer
        reason = ""
        for n_tried in range(tries):
            if not self._take_turn(request.most_tokens):
                return Unjudged(self.stopped)
            answer, reason, pause = self._try(request)
            if not reason:
                self._failed_in_a_row = 0
                return answer
            if pause is None:
                break
            if n_tried + 1 < tries:
                self._wait(pause or min(2**n_tried, LONGEST_PAUSE))
        with self._condition:
            self._failed_in_a_row += 1
            if self._failed_in_a_row >= FAILURES_IN_A_ROW:
                self._stop(f"{FAILURES_IN_A_ROW} questions in a row without an answer, the last: {reason}")
        return Unjudged(reason)

    def _try(self, request: _Request) -> tuple[Any, str, float | None]:
        """What is answered; or why nothing is, and the seconds until another try, 0 for the usual, None for none."""
        from openai import APIConnectionError, APIResponseValidationError, APIStatusError, APITimeoutError

        n_read, n_written, text = request.most_tokens, 0, ""
        try:
            completion = self.client.chat.completions.create(
                model=self.model, messages=request.question.messages, temperature=0, max_tokens=MAX_ANSWER_TOKENS
            )
            n_read, n_written = _tokens_of(completion, request.most_tokens)
            if not getattr(completion, "choices", None):
                other = one_line(str(getattr(completion, "error", None) or completion))
                return None, f"an answer that is not of OpenAI's form ({other!r}); most addresses end in /v1", None
            text = completion.choices[0].message.content or ""
            if completion.choices[0].finish_reason == "length":
                raise ValueError(f"cut at {MAX_ANSWER_TOKENS} tokens")
            answer = request.question.read(read_answer(text))
        except APITimeoutError:  # which may have been worked on, and paid
            return None, f"no answer within {SECONDS_FOR_A_JUDGEMENT} seconds", 0
        except APIConnectionError as error:
            n_read = 0 if type(error.__cause__).__name__ == "ConnectError" else n_read
            return None, f"no server answers there ({one_line(str(error.__cause__ or error))})", 0
        except APIStatusError as error:
            n_read = 0
            is_passing = error.status_code in (408, 409, 429) or error.status_code >= 500
            wanted = error.response.headers.get("retry-after", "")
            pause = min(float(wanted), LONGEST_PAUSE) if re.fullmatch(r"\d{1,6}(\.\d+)?", wanted) else 0.0
            hint = "; most addresses end in /v1" if error.status_code == 404 else ""
            reason = f"it answers {error.status_code}: {one_line(error.message)}{hint}"
            return None, reason, pause if is_passing else None
        except APIResponseValidationError as error:
            return None, f"an answer that is not of OpenAI's form ({one_line(str(error))})", None
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            # At temperature 0 it would say the same again.
            said = f"{one_line(text)!r} ({one_line(str(error))})"
            return None, f"an answer without the JSON that was asked for: {said}", None
        finally:
            self._settle(request.most_tokens, n_read, n_written)
        self._keep(request.key, text)
        return answer, "", None

    def _keep(self, key: str, text: str) -> None:
        """The answer on the disk, whole or not at all; where it cannot be kept, no other is paid for."""
        file = self._file(key)
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            with NamedTemporaryFile("w", dir=file.parent, encoding="utf-8", delete=False) as unfinished:
                json.dump({"model": self.model, "answer": text}, unfinished)
            Path(unfinished.name).replace(file)
        except OSError as error:
            self._stop(f"--judge_cache {self.cache}: cannot be written ({error.strerror})")

    # ------------------------------------------------------------ budget and rate

    def _take_turn(self, most_tokens: int) -> bool:
        """Wait until a request may be sent, its tokens set aside; False if none may be any more."""
        # One waits at a time, so that the last of a budget goes to the first questions and not to some of each prompt.
        with self._order, self._condition:
            while not self.stopped and self._spent + self._reserved + most_tokens > self.budget:
                if not self._reserved:
                    self._stop(
                        f"the budget of --judge_max_tokens is used up ({self._spent:,} tokens, and the next request "
                        f"may take {most_tokens:,})"
                    )
                else:
                    self._condition.wait()  # for requests that take less than was set aside
            if self.stopped:
                return False
            self._reserved += most_tokens
            now = time.monotonic()
            turn = max(self._next_turn, now)
            self._next_turn = turn + self.pause
        if self._wait(turn - now):
            return True
        with self._condition:
            self._reserved -= most_tokens
            self._condition.notify_all()
        return False

    def _wait(self, seconds: float) -> bool:
        """Whether requests may still be sent after so long; at once False where they may not."""
        return not self._ended.wait(seconds)

    @property
    def _spent(self) -> int:
        return self.usage.read + self.usage.written

    def _settle(self, most_tokens: int, n_read: int, n_written: int) -> None:
        with self._condition:
            self._reserved -= most_tokens
            self.usage.requests += 1
            self.usage.read += n_read
            self.usage.written += n_written
            self._condition.notify_all()

    def _stop(self, reason: str) -> None:
        with self._condition:
            self.stopped = self.stopped or reason
            self._ended.set()
            self._condition.notify_all()


def _tokens_of(completion: Any, most_tokens: int) -> tuple[int, int]:
    """Read and written by the server's count; all that it may have been where it counts none."""
    usage = getattr(completion, "usage", None)
    counts = [getattr(usage, name, None) for name in ("prompt_tokens", "completion_tokens")]
    return tuple(counts) if all(type(count) is int for count in counts) else (most_tokens, 0)


def _about_tokens(question: JudgeQuestion) -> int:
    """A Chinese character is about 0.7 tokens of today's vocabularies, four other characters one."""
    text = "".join(message["content"] for message in question.messages)
    n_chinese = len(re.findall("[\u3000-\u9fff\uff00-\uffef]", text))
    return round(0.7 * n_chinese + (len(text) - n_chinese) / 4)


def one_line(text: str) -> str:
    return "".join(filter(str.isprintable, " ".join(text.split())))[:120]
