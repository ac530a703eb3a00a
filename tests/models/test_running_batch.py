"""The running batch: a row gets the tokens that it gets alone, those of `generate`, whoever shares its batch."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from tiny_families import FAMILIES, tiny_model
from transformers import AutoModelForCausalLM, GenerationConfig

from medtune.models.decoding import Decoding, draw_tokens, penalize_repetition
from medtune.models.running_batch import Row, RunningBatch, complete_rows

LENGTHS = (3, 17, 5, 9, 12, 30)
NEVER = frozenset([10**6])


@pytest.fixture(scope="module")
def model(tiny_model_dir):
    return AutoModelForCausalLM.from_pretrained(tiny_model_dir).eval()


def make_prompts(n_tokens: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(1, n_tokens, (length,), generator=generator).tolist() for length in LENGTHS]


def run_with_joins(batch: RunningBatch, rows: list[Row]) -> None:
    """Rows join while others are on their way."""
    batch.add(rows[:2])
    for _ in range(2):
        batch.step()
    batch.add(rows[2:3])
    batch.step()
    batch.add(rows[3:])
    while batch.rows:
        batch.step()


# ---------------------------------------------------------------- tokens


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_are_those_of_generate(family):
    """Of every kind of cache; half of the rows end early, so that columns and rows leave it."""
    model = tiny_model(family, initializer_range=0.15).eval()  # drawn smaller, it repeats one token
    prompts, expected = make_prompts(600), []
    for prompt in prompts:
        config = GenerationConfig(max_new_tokens=12, eos_token_id=[639], pad_token_id=0)
        expected.append(model.generate(torch.tensor([prompt]), generation_config=config)[0, len(prompt) :].tolist())
    n_tokens = [5, 12] * 3
    expected = [ids[:n] for ids, n in zip(expected, n_tokens, strict=True)]

    def rows() -> list[Row]:
        return [Row(prompt, frozenset([639]), Decoding(n)) for prompt, n in zip(prompts, n_tokens, strict=True)]

    together, joining = rows(), rows()
    complete_rows(model, together, batch_size=3)
    assert [row.ids for row in together] == expected
    run_with_joins(RunningBatch(model), joining)
    assert [row.ids for row in joining] == expected


@contextmanager
def counted_tokens(model) -> Iterator[list[int]]:
    """How many tokens, padding included, each forward pass inside the block gets."""
    counts: list[int] = []
    hook = model.register_forward_pre_hook(
        lambda _, args, inputs: counts.append(inputs["input_ids"].numel()), with_kwargs=True
    )
    yield counts
    hook.remove()


def group_rows(prompts: list[list[int]], size: int, n_tokens: int = 6) -> list[Row]:
    """A greedy reply to each prompt and others that are drawn, the replies to one prompt apart from each other."""
    return [
        Row(prompt, NEVER, Decoding(n_tokens, temperature=float(number > 0)), seed=100 * number + place)
        for number in range(size)
        for place, prompt in enumerate(prompts)
    ]


@pytest.mark.parametrize("family", FAMILIES)
def test_replies_to_one_prompt_are_those_of_each_alone_and_compute_it_once(family):
    """Of every kind of cache: of full, sliding and linear attention, and mixtures of them."""
    model = tiny_model(family, initializer_range=0.15).eval()
    prompts = make_prompts(600)[:3]
    alone, together = group_rows(prompts, 4), group_rows(prompts, 4)
    complete_rows(model, alone, batch_size=1)
    with counted_tokens(model) as counts:
        complete_rows(model, together, batch_size=12)
    assert [row.ids for row in together] == [row.ids for row in alone]
    assert counts == [3 * 17, *[12] * 5]  # not 12 * 17 at first


def test_only_a_cache_of_known_kind_is_repeated(model, monkeypatch):
    prompts = make_prompts(500)
    expected, rows = group_rows(prompts, 2), group_rows(prompts, 2)
    complete_rows(model, expected, batch_size=12)
    monkeypatch.setattr("medtune.models.running_batch.KNOWN_LAYERS", set())
    with counted_tokens(model) as counts:
        complete_rows(model, rows, batch_size=12)
    assert [row.ids for row in rows] == [row.ids for row in expected]
    assert counts == [12 * 30, *[12] * 5]


def test_equal_prompts_are_taken_together(model):
    """In batches too small for all rows; prompts of one length come mixed."""
    rows = group_rows([[5, 6, 7], [5, 7, 6]], size=4)
    with counted_tokens(model) as counts:
        complete_rows(model, rows, batch_size=4)
    assert counts == [3, *[4] * 5] * 2


def test_rows_of_a_cache_of_unknown_kind_are_computed_anew(model, monkeypatch):
    prompts = make_prompts(500)
    expected = [Row(prompt, NEVER, Decoding(8)) for prompt in prompts]
    complete_rows(model, expected, batch_size=6)
    monkeypatch.setattr("medtune.models.running_batch.KNOWN_LAYERS", set())
    rows = [Row(prompt, NEVER, Decoding(8)) for prompt in prompts]
    run_with_joins(RunningBatch(model), rows)
    assert [row.ids for row in rows] == [row.ids for row in expected]


SETTINGS = [
    Decoding(12),
    Decoding(12, temperature=1.0),
    Decoding(7, temperature=2.0, top_k=20),
    Decoding(12, temperature=1.5, top_p=0.8, repetition_penalty=1.3),
    Decoding(12, repetition_penalty=2.0),
    Decoding(3, temperature=1.0),
]


def test_each_row_keeps_its_settings_and_its_seed_in_any_batch(model):
    def rows(first_seed: int = 0) -> list[Row]:
        pairs = zip(make_prompts(500), SETTINGS, strict=True)
        return [Row(prompt, NEVER, decoding, first_seed + n) for n, (prompt, decoding) in enumerate(pairs)]

    alone, together, joining, others = rows(), rows(), rows(), rows(first_seed=100)
    complete_rows(model, alone, batch_size=1)
    complete_rows(model, together, batch_size=6)
    run_with_joins(RunningBatch(model), joining)
    complete_rows(model, others, batch_size=6)
    expected = [row.ids for row in alone]
    assert [len(ids) for ids in expected] == [decoding.max_new_tokens for decoding in SETTINGS]
    assert [row.ids for row in together] == [row.ids for row in joining] == expected
    greedy = [decoding.temperature == 0 for decoding in SETTINGS]
    assert [row.ids == ids for row, ids in zip(others, expected, strict=True)] == greedy


def test_finished_rows_are_not_computed_and_others_take_their_place(model):
    shapes = []
    hook = model.register_forward_pre_hook(
        lambda _, args, inputs: shapes.append(tuple(inputs["input_ids"].shape)), with_kwargs=True
    )
    complete_rows(model, [Row([5] * 4, NEVER, Decoding(n)) for n in (1, 2, 4, 4)], batch_size=4)
    assert shapes == [(1, 4), (3, 1), (2, 1), (2, 1)]
    shapes.clear()
    complete_rows(model, [Row([5] * length, NEVER, Decoding(n)) for length, n in ((6, 2), (5, 4), (4, 2))], 2)
    hook.remove()
    assert shapes == [(2, 6), (2, 1), (1, 4), (2, 1), (1, 1)]


# ---------------------------------------------------------------- the choice of a token


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def test_draws_follow_the_tempered_softmax():
    logits = torch.tensor([[0.0, 1.0, 2.0, -50.0]]).repeat(4000, 1)
    drawn = draw_tokens(logits, [Decoding(temperature=0.5)] * 4000, generators(*range(4000)))
    shares = torch.bincount(drawn, minlength=4) / 4000
    torch.testing.assert_close(shares, (logits[0] / 0.5).softmax(dim=0), atol=0.02, rtol=0)


def test_rows_are_drawn_by_their_own_settings_and_generators():
    logits = torch.linspace(0, 3, 50).repeat(200, 1)
    free, few, narrow = (
        Decoding(temperature=1.0),
        Decoding(temperature=1.0, top_k=2),
        Decoding(temperature=3, top_p=0.1),
    )
    drawn = draw_tokens(logits, [free, few, narrow, free] * 50, generators(*range(200))).view(50, 4)
    assert set(drawn[:, 1].tolist()) == {48, 49}
    assert drawn[:, 2].min() > 40
    assert drawn[:, 0].unique().numel() > 10
    assert drawn[1, 0] == draw_tokens(logits[:1], [free], generators(4))


def test_rounding_changes_no_draw():
    """In a batch logits are rounded otherwise; an even choice of many tokens is the most delicate."""
    logits = torch.randn(64, 50_000, generator=torch.Generator().manual_seed(0)) * 1e-2
    rounded = logits * (1 + 1e-6)
    free = [Decoding(temperature=1.0)] * 64
    drawn = [draw_tokens(one, free, generators(*range(64))) for one in (logits, rounded)]
    assert torch.equal(*drawn)


def test_probabilities_that_are_no_numbers_are_an_error():
    with pytest.raises(RuntimeError, match="chances of the next token are not numbers"):
        draw_tokens(torch.tensor([[float("nan"), 1.0]]), [Decoding(temperature=1.0)], generators(0))


def test_a_penalty_divides_what_is_above_zero_and_multiplies_what_is_below():
    penalized = penalize_repetition(torch.tensor([2.6, 2.6, -1.0, 4.0]), torch.tensor([1, 2]), 1.3)
    assert torch.equal(penalized, torch.tensor([2.6, 2.6 / 1.3, -1.3, 4.0]))
