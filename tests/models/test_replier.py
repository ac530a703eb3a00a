"""`replier.py`: requests that come together share forward passes, and each gets the reply that it gets alone."""

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from functools import partial

import pytest
import torch

from medtune.models import replier as replier_module
from medtune.models import running_batch
from medtune.models.chat_models import ChatModel, ChatModelArguments, describe_model, load_weights
from medtune.models.decoding import Decoding
from medtune.models.generation import Reply
from medtune.models.replier import Replier
from medtune.models.running_batch import RunningBatch

TEXTS = ["感冒了应该怎么办？", "多喝水", "高血压患者在饮食上需要注意什么？少吃盐，多吃蔬菜和水果。", "See a doctor"]
SETTINGS = [
    Decoding(max_new_tokens=24),
    Decoding(max_new_tokens=10, temperature=1.0),
    Decoding(max_new_tokens=24, temperature=2.0, top_p=0.9),
    Decoding(max_new_tokens=6, repetition_penalty=1.5),
]


@pytest.fixture(scope="module")
def chat_model(tiny_model_dir) -> ChatModel:
    model_args = ChatModelArguments(str(tiny_model_dir))
    chat_model = describe_model(model_args)
    load_weights([chat_model], model_args)
    return chat_model


@pytest.fixture
def rows_of_passes(chat_model) -> Iterator[list[int]]:
    """How many rows each forward pass has had."""
    counts = []
    count = chat_model.model.register_forward_pre_hook(
        lambda _, args, inputs: counts.append(len(inputs["input_ids"])), with_kwargs=True
    )
    yield counts
    count.remove()


async def answer(replier: Replier, number: int, decoding: Decoding, seed: int = 5, is_streamed: bool = False) -> Reply:
    prompt = replier.chat_model.tokenizer.encode(TEXTS[number])
    items = [item async for item in replier.pieces(prompt, decoding, seed, is_streamed)]
    if is_streamed:
        assert "".join(items[:-1]).strip() == items[-1].text
    return items[-1]


def together(*calls: Callable[[], Awaitable[Reply]]) -> list[Reply]:
    async def gather() -> list:
        return await asyncio.gather(*(call() for call in calls), return_exceptions=True)

    return asyncio.run(gather())


def replies_alone(chat_model, settings=SETTINGS) -> list[Reply]:
    replier = Replier(chat_model)
    return [asyncio.run(answer(replier, number, decoding)) for number, decoding in enumerate(settings)]


@pytest.mark.parametrize("most", [32, 2])
def test_each_gets_the_reply_that_it_gets_alone(chat_model, rows_of_passes, monkeypatch, most):
    """Greedy or drawn, streamed or not, with a limit, a penalty and a stop text of its own."""
    alone = replies_alone(chat_model)
    stop = alone[0].text[len(alone[0].text) // 2 :][:2]
    settings = [*SETTINGS[1:], Decoding(max_new_tokens=24, stop=[stop])]
    rows_of_passes.clear()
    monkeypatch.setattr(replier_module, "MOST_AT_A_TIME", most)
    replier = Replier(chat_model)
    calls = [lambda n=n: answer(replier, n, SETTINGS[n], is_streamed=n % 2 == 0) for n in range(4)]
    *whole, stopped = together(*calls, lambda: answer(replier, 0, settings[-1]))
    assert whole == alone
    assert stopped.text == alone[0].text[: alone[0].text.index(stop)].strip()
    assert (stopped.ended, alone[0].ended) == (True, False)
    assert max(rows_of_passes) == min(most, 5)
    assert len(rows_of_passes) < sum(reply.n_tokens for reply in [*whole, stopped])


def test_draws_are_those_of_the_seed(chat_model):
    replier = Replier(chat_model)
    seeds = [7, 8, 7, -3, 2**40, None, None]
    drawn = together(*(lambda seed=seed: answer(replier, 0, SETTINGS[2], seed) for seed in seeds))
    assert drawn[0] == drawn[2]
    assert len({reply.text for reply in drawn}) == 6


def test_a_request_joins_while_a_stream_goes_on(chat_model, rows_of_passes):
    alone = replies_alone(chat_model)
    rows_of_passes.clear()
    replier = Replier(chat_model)

    async def stream_and_join() -> tuple[list, Reply, int]:
        prompt, other = replier.chat_model.tokenizer.encode(TEXTS[0]), None
        items = []
        async for item in replier.pieces(prompt, SETTINGS[0], 5, True):
            items.append(item)
            other = other or asyncio.ensure_future(answer(replier, 3, SETTINGS[3]))
        return items, await other

    items, other = asyncio.run(stream_and_join())
    assert (items[-1], other) == (alone[0], alone[3])
    assert sum(map(bool, items)) > 2
    assert rows_of_passes[0] == 1
    assert max(rows_of_passes) == 2


def test_a_cancelled_request_leaves_the_batch(chat_model, rows_of_passes):
    decoding = Decoding(max_new_tokens=200)
    (alone,) = replies_alone(chat_model, [decoding])
    rows_of_passes.clear()
    replier = Replier(chat_model)

    async def go_after_the_first_piece() -> None:
        pieces = replier.pieces(replier.chat_model.tokenizer.encode(TEXTS[2]), decoding, 5, True)
        async for _ in pieces:
            await pieces.aclose()

    reply, _ = together(lambda: answer(replier, 0, decoding), go_after_the_first_piece)
    assert reply == alone
    assert max(rows_of_passes) == 2
    assert rows_of_passes[-1] == 1
    assert rows_of_passes.count(2) < 150


def fail_above(n_rows: int, error: type[RuntimeError]) -> Callable:
    add = RunningBatch.add

    def limited(self, rows):
        if len(self.rows) + len(rows) > n_rows:
            raise error("too much")
        add(self, rows)

    return limited


def test_where_memory_is_short_fewer_are_generated_at_a_time(chat_model, rows_of_passes, monkeypatch):
    alone = replies_alone(chat_model)
    rows_of_passes.clear()
    monkeypatch.setattr(RunningBatch, "add", fail_above(2, torch.OutOfMemoryError))
    replier = Replier(chat_model)
    assert together(*(lambda n=n: answer(replier, n, SETTINGS[n]) for n in range(4))) == alone
    assert max(rows_of_passes) <= 2
    monkeypatch.setattr(RunningBatch, "add", fail_above(0, torch.OutOfMemoryError))
    failed = together(*(lambda n=n: answer(replier, n, SETTINGS[n]) for n in range(2)))
    assert [type(error) for error in failed] == [torch.OutOfMemoryError] * 2


def test_after_an_error_the_next_requests_are_answered(chat_model, monkeypatch):
    alone = replies_alone(chat_model)
    replier = Replier(chat_model)
    with monkeypatch.context() as patch:
        patch.setattr(RunningBatch, "step", lambda self: 1 / 0)
        failed = together(*(lambda n=n: answer(replier, n, SETTINGS[n]) for n in range(4)))
        assert [type(error) for error in failed] == [ZeroDivisionError] * 4
    assert together(*(lambda n=n: answer(replier, n, SETTINGS[n]) for n in range(4))) == alone


def test_a_reply_that_fails_leaves_the_others_alone(chat_model, monkeypatch):
    """Its chances are no numbers, which the draw of the whole batch sees."""
    wanted = replies_alone(chat_model)
    draw = running_batch.draw_tokens

    def fail_on_the_second(logits, decodings, generators):
        if SETTINGS[2] in decodings:
            raise RuntimeError("the chances of the next token are not numbers")
        return draw(logits, decodings, generators)

    monkeypatch.setattr(running_batch, "draw_tokens", fail_on_the_second)
    replier = Replier(chat_model)
    found = together(*(partial(answer, replier, number, setting) for number, setting in enumerate(SETTINGS)))
    assert str(found[2]) == "the chances of the next token are not numbers"
    assert [found[0], found[1], found[3]] == [wanted[0], wanted[1], wanted[3]]
