"""ROUGE against values worked by hand."""

import pytest

from text_metrics import names_one_of, repetition_rate, rouge


def test_rouge_of_characters():
    # Six of seven characters in order; recall 6/7, precision 6/6.
    assert rouge("高血压少吃盐", "高血压要少吃盐")["rouge_l"] == pytest.approx(12 / 13)
    assert rouge("高血压少吃盐", "高血压要少吃盐")["rouge_2"] == pytest.approx(2 * 4 / (5 + 6))
    assert rouge("盐吃少", "少吃盐") == {"rouge_1": 1.0, "rouge_2": 0.0, "rouge_l": pytest.approx(1 / 3)}


def test_repeated_characters_count_once_each():
    assert rouge("aaaa", "ab")["rouge_1"] == pytest.approx(2 * 1 / (4 + 2))


def test_rouge_knows_no_blanks_and_no_case_and_no_empty_reply():
    assert rouge("See a Doctor", "see  a doctor")["rouge_l"] == 1.0
    assert rouge("", "多喝水") == {"rouge_1": 0.0, "rouge_2": 0.0, "rouge_l": 0.0}


def test_names():
    assert names_one_of("可能是Type 2 Diabetes。", ["糖尿病", "type 2 diabetes"])
    assert not names_one_of("多喝水", ["糖尿病"])


def test_repetition():
    assert repetition_rate("abcdefgh") == 0.0
    assert repetition_rate("abcdabcd") == pytest.approx(1 / 5)  # abcd bcda cdab dabc abcd
    assert repetition_rate("啊啊啊啊啊啊啊啊") == pytest.approx(4 / 5)
    assert repetition_rate("abc") == 0.0
