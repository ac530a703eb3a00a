"""Copies and near copies: known similarities, the same answer in whatever steps, and no chains."""

import random

import numpy as np
import pytest
from datasketch import MinHash

from medtune.reading import near_duplicates
from medtune.reading.near_duplicates import (
    N_HASHES,
    SEED,
    Distinct,
    Groups,
    Known,
    bare_text,
    minhashes,
    shingle_hashes,
)

HAN = [chr(code) for code in range(0x4E00, 0x4E00 + 3000)]


def random_text(rng: random.Random, length: int) -> str:
    return "".join(rng.choices(HAN, k=length))


def changed(rng: random.Random, text: str, n_changes: int) -> str:
    letters = list(text)
    for position in rng.sample(range(len(letters)), n_changes):
        letters[position] = rng.choice(HAN)
    return "".join(letters)


def jaccard(one: str, other: str, size: int) -> float:
    one, other = ({text[i : i + size] for i in range(len(text) - size + 1)} for text in (one, other))
    return len(one & other) / len(one | other)


# ---------------------------------------------------------------- hashes


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("感冒了，怎么办？", "感冒了怎么办"),
        ("ＡＢＣ　１２３", "abc123"),
        ("Fever_ - 38.5 C!", "fever385c"),
        ("cafe\u0301", "café"),
        ("？！", ""),
    ],
)
def test_bare_text(text, expected):
    assert bare_text(text) == expected


def test_a_shingle_is_each_run_of_characters():
    hashes = shingle_hashes("感冒发烧咳嗽感冒发烧咳", 5)
    assert len(hashes) == 7
    assert hashes[0] == hashes[6]
    assert len(set(hashes.tolist())) == 6
    assert len(shingle_hashes("感冒", 5)) == 1
    assert shingle_hashes("感冒", 5) != shingle_hashes("发烧", 5)
    assert len(shingle_hashes("", 5)) == 1


def test_the_hashes_are_those_of_datasketch():
    text = random_text(random.Random(0), 300)
    sketch = MinHash(num_perm=N_HASHES, seed=SEED, hashfunc=int)
    sketch.update_batch(shingle_hashes(text, 5).tolist())
    assert (minhashes([text], 5)[0] == sketch.hashvalues).all()


def test_a_long_text_is_hashed_in_pieces(monkeypatch):
    text = random_text(random.Random(0), 1000)
    whole = minhashes([text, "感冒", ""], 5)
    monkeypatch.setattr(near_duplicates, "PIECE", 64)
    assert (minhashes([text, "感冒", ""], 5) == whole).all()


@pytest.mark.parametrize("n_changes", [1, 5, 20, 60])
def test_the_share_of_equal_hashes_estimates_the_share_in_common(n_changes):
    rng = random.Random(n_changes)
    errors = []
    for _ in range(40):
        text = random_text(rng, 300)
        other = changed(rng, text, n_changes)
        first, second = minhashes([text, other], 5)
        errors.append((first == second).mean() - jaccard(text, other, 5))
    assert abs(np.mean(errors)) < 0.03
    assert max(map(abs, errors)) < 0.25


@pytest.mark.parametrize(("threshold", "rows"), [(1.0, 64), (0.9, 8), (0.8, 5), (0.7, 4), (0.5, 2), (0.05, 1)])
def test_bands_are_as_long_as_the_threshold_allows(threshold, rows):
    assert near_duplicates.rows_per_band(threshold) == rows
    assert near_duplicates.chance_to_meet(threshold, rows) >= 0.95


# ---------------------------------------------------------------- keeping the first of each kind


def test_copies_and_near_copies_name_what_was_kept():
    rng = random.Random(0)
    one, other = random_text(rng, 200), random_text(rng, 200)
    distinct = Distinct(0.8)
    near = changed(rng, one, 1)
    matches = distinct.keep([one, other, one, near, f"{other}！"])
    assert matches[:2] == [None, None]
    assert matches[2] == (0, 1.0, True)
    assert matches[3].number == 0
    assert 0.8 <= matches[3].share < 1
    assert matches[4] == (1, 1.0, False)  # not the same text, but the same n-grams
    assert len(distinct) == 2
    assert distinct.keep([near, other]) == [matches[3], (1, 1.0, True)]


def test_without_a_threshold_only_copies_go():
    assert Distinct(None).keep(["感冒怎么办？", "感冒怎么办", "感冒怎么办？"]) == [None, None, (0, 1.0, True)]


def test_a_copy_is_the_same_in_what_must_be_exact():
    matches = Distinct(0.9).keep(["感冒怎么办"] * 3, exact=["a", "b", "a"])
    assert matches == [None, (0, 1.0, False), (0, 1.0, True)]


def test_any_steps_give_the_same():
    rng = random.Random(1)
    texts = [random_text(rng, 60) for _ in range(30)]
    texts += [changed(rng, rng.choice(texts), rng.randint(0, 3)) for _ in range(120)]
    rng.shuffle(texts)
    at_once = Distinct(0.7).keep(texts)
    for step in (1, 7, 50):
        distinct = Distinct(0.7)
        in_steps = [match for start in range(0, 150, step) for match in distinct.keep(texts[start : start + step])]
        assert in_steps == at_once
    assert 30 <= sum(match is None for match in at_once) < 125


def test_what_is_let_go_is_like_what_was_kept_and_not_only_like_its_neighbour():
    rng = random.Random(2)
    long = random_text(rng, 2000)
    chain = [long[start : start + 400] for start in range(0, 1600, 20)]  # each 90 % like the next
    matches = Distinct(0.8).keep(chain)
    kept = [text for text, match in zip(chain, matches, strict=True) if match is None]
    assert len(kept) >= 15
    for text, match in zip(chain, matches, strict=True):
        assert match is None or jaccard(text, kept[match.number], 5) > 0.6


def test_near_copies_are_found_and_others_are_not():
    rng = random.Random(3)
    texts = [random_text(rng, 200) for _ in range(500)]
    distinct = Distinct(0.8)
    assert distinct.keep(texts) == [None] * 500
    near = [changed(rng, text, 2) for text in texts]  # about 90 % in common
    found = distinct.keep(near)
    assert sum(match is not None and match.number == number for number, match in enumerate(found)) >= 490
    distinct = Distinct(0.8)
    distinct.keep(texts)
    assert distinct.keep([changed(rng, text, 20) for text in texts]) == [None] * 500  # about 40 %


# ---------------------------------------------------------------- groups and look-ups


def test_groups_chain_what_is_alike_over_any_steps():
    rng = random.Random(4)
    long, other = random_text(rng, 300), random_text(rng, 60)
    chain = [long[start : start + 60] for start in range(0, 200, 5)]  # each 84 % like the next
    groups = Groups(0.7)
    groups.add([*chain[::4], other])  # 49 %
    assert len(set(groups.labels().tolist())) == len(chain[::4]) + 1
    groups.add([text for number, text in enumerate(chain) if number % 4])
    labels = groups.labels()
    assert len(labels) == len(chain) + 1
    assert len(set(labels.tolist())) == 2
    assert (labels == labels[len(chain[::4])]).sum() == 1


def test_what_is_just_over_the_threshold_is_in_one_group():
    rng = random.Random(6)
    texts = [random_text(rng, 60) for _ in range(400)]
    near = [changed(rng, text, 3) for text in texts]
    is_over = np.array([jaccard(text, other, 3) >= 0.7 for text, other in zip(texts, near, strict=True)])
    groups = Groups(0.7)
    groups.add(texts)
    groups.add(near)
    labels = groups.labels()
    assert is_over.sum() > 300
    assert (labels[:400] == labels[400:])[is_over].mean() >= 0.97


def test_many_who_ask_the_same_are_one_group():
    groups = Groups(0.7)
    for _ in range(3):
        groups.add(["感冒了怎么办？", "感冒了，怎么办", "头疼怎么办"] * 100)
    labels = groups.labels()
    assert len(labels) == 900
    assert len(set(labels.tolist())) == 2


def test_known_texts_are_found_by_the_most_like():
    rng = random.Random(5)
    one, other = random_text(rng, 60), random_text(rng, 60)
    known = Known(0.5)
    known.add([one, other, changed(rng, one, 3)])
    found = known.find([f"{one}？", changed(rng, other, 1), random_text(rng, 60), one])
    assert found[0] == found[3] == (0, 1.0, True)
    assert (found[1].number, found[1].is_copy) == (1, False)
    assert found[2] is None
