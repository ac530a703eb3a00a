"""Bits per byte of models and of n-grams on held-out documents."""

import math

import compare_with_ngrams
import pytest
from compare_with_ngrams import bits_per_byte, ngram_log_probs

from medtune.errors import UserError


def test_an_ngram_model_is_a_distribution_and_knows_what_it_counted():
    log_probs = ngram_log_probs([[0, 1, 2], [0, 1, 3]], vocab_size=5, order=2)
    after_one = [math.exp(log_probs([1, token_id])[0]) for token_id in range(5)]
    assert sum(after_one) == pytest.approx(1)
    # Two kinds of tokens follow 1, in two places, so that half of the weight goes to the unigrams with one added.
    assert after_one[2] == pytest.approx(1 / 2 * 1 / 2 + 1 / 2 * (1 + 1) / (6 + 5))
    assert after_one[4] == pytest.approx(1 / 2 * (0 + 1) / (6 + 5))


def test_bits_per_byte_of_a_coin():
    # Three tokens of two bytes are told, each by one bit.
    assert bits_per_byte(lambda ids: [math.log(0.5)] * (len(ids) - 1), [[0, 1, 0], [1, 0]], [2, 2]) == 0.5


def test_models_and_ngrams_on_the_documents_that_pretraining_holds_out(tiny_model_dir, tmp_path, capsys):
    text = tmp_path / "documents.txt"
    text.write_text("".join(f"第{n}份：多喝水，多休息，三天不退热要去医院。\n" for n in range(30)), encoding="utf-8")
    results = compare_with_ngrams.main(
        ["--models", str(tiny_model_dir), "--train_file_dir", str(tmp_path), "--max_eval_samples", "2"]
    )
    assert results["5-grams of tokens"] < results["5-grams of bytes"] < 1 < results[str(tiny_model_dir)]
    assert "2 held-out documents" in capsys.readouterr().out


def test_wrong_numbers_are_refused(tmp_path):
    with pytest.raises(UserError, match="--max_eval_samples 0: give at least 1"):
        compare_with_ngrams.main(["--models", "x", "--train_file_dir", str(tmp_path), "--max_eval_samples", "0"])
