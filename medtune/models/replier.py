"""The replies to requests that come while others are generated: one batch that they join and leave."""

import asyncio
import secrets
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future, ThreadPoolExecutor

from medtune.models.chat_models import ChatModel
from medtune.models.decoding import Decoding
from medtune.models.generation import Reply, ReplyRow, ready_to_generate
from medtune.models.running_batch import RunningBatch

# Replies that are generated at a time; further requests wait.
MOST_AT_A_TIME = 32
SECONDS_BETWEEN_LOOKS = 0.5


class ServedReply(ReplyRow):
    """The reply to one request, which hands on its pieces if it is streamed, and the whole when it is finished.

    is_abandoned: nobody waits for it any more; it leaves the batch with its next token.
    """

    def __init__(
        self,
        chat_model: ChatModel,
        prompt: list[int],
        decoding: Decoding,
        seed: int,
        is_streamed: bool,
        hand_on: Callable[[str | Reply | BaseException], None],
    ):
        on_text = hand_on if is_streamed else None
        super().__init__(chat_model.tokenizer, prompt, chat_model.stop_ids, decoding, seed, on_text)
        self.hand_on = hand_on
        self.is_abandoned = False

    def append(self, token: int) -> None:
        super().append(token)
        if self.finished and not self.is_abandoned:
            self.hand_on(self.reply())

    def is_complete(self) -> bool:
        return self.is_abandoned or super().is_complete()


class Replier:
    """Generates the replies to all requests that wait as one batch, on one thread, since adapters are shared."""

    def __init__(self, chat_model: ChatModel):
        self.chat_model = chat_model
        self.thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="generate")
        self.running: list[ServedReply] = []
        self.waiting: deque[ServedReply] = deque()
        self.is_busy = False
        self.lock = threading.Lock()  # of `waiting` and `is_busy`, which two threads change

    async def pieces(
        self, prompt: list[int], decoding: Decoding, seed: int | None, is_streamed: bool
    ) -> AsyncIterator[str | Reply]:
        """Pieces of text as they come, then the reply; closing the iterator ends the generation.

        Without a stream the pieces are empty, for the caller to see from time to time whether its client is there.
        """
        loop = asyncio.get_running_loop()
        queue: asyncio.Queue[str | Reply | BaseException] = asyncio.Queue()

        def hand_on(item: str | Reply | BaseException) -> None:
            if not reply.is_abandoned:
                loop.call_soon_threadsafe(queue.put_nowait, item)

        # Without a seed every reply draws anew.
        seed = secrets.randbits(32) if seed is None else seed
        reply = ServedReply(self.chat_model, prompt, decoding, seed, is_streamed, hand_on)
        with self.lock:
            self.waiting.append(reply)
        self._start()
        try:
            while True:
                try:
                    item = await asyncio.wait_for(queue.get(), None if is_streamed else SECONDS_BETWEEN_LOOKS)
                except TimeoutError:
                    item = ""
                if isinstance(item, BaseException):
                    raise item
                yield item
                if isinstance(item, Reply):
                    return
        finally:
            reply.is_abandoned = True

    def _start(self) -> None:
        """Let the thread generate, unless it does or nobody waits."""
        with self.lock:
            if not self.is_busy and self.waiting:
                self.is_busy = True
                self.thread.submit(self._generate).add_done_callback(self._end)

    def _generate(self) -> None:
        """Generate until nobody waits; who comes joins the batch at its next token."""
        most = MOST_AT_A_TIME
        with self.chat_model.in_use() as model, ready_to_generate(model) as core:
            batch = RunningBatch(core)
            while joining := self._admit(most):
                try:
                    if newcomers := [reply for reply in joining if reply not in batch.rows]:
                        batch.add(newcomers)
                    if batch.rows:
                        batch.step()
                    self.running = list(batch.rows)
                except RuntimeError as error:  # of memory, or of one reply: fewer at a time tell which
                    most, batch = self._halve(error), RunningBatch(core)

    def _admit(self, most: int) -> list[ServedReply]:
        """The replies to generate, with those that have waited longest where there is room."""
        with self.lock:
            while self.waiting and len(self.running) < most:
                reply = self.waiting.popleft()
                if not reply.is_abandoned:
                    self.running.append(reply)
            self.is_busy = bool(self.running)
            return list(self.running)

    def _halve(self, error: RuntimeError) -> int:
        """Let all go back to the head of the queue, keeping their tokens; how many to generate at a time from now on.

        A single reply fails with the error.
        """
        unfinished = [reply for reply in self.running if not reply.finished]
        self.running = []
        if len(unfinished) <= 1:
            for reply in unfinished:
                reply.hand_on(error)
            return MOST_AT_A_TIME
        with self.lock:
            self.waiting.extendleft(reversed(unfinished))
        return len(unfinished) // 2

    def _end(self, done: Future) -> None:
        """After an error the running replies fail, and those that wait are generated."""
        if error := done.exception():
            with self.lock:
                failed, self.running, self.is_busy = self.running, [], False
            for reply in failed:
                reply.hand_on(error)
            self._start()
