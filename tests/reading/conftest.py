"""What several files of this folder stand on."""

import pytest
from qwen_vocab import real_qwen_tokenizer
from test_template import EXPECTED


@pytest.fixture
def in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="session")
def families_tokenizer():
    """The Qwen vocabulary with the tokens of all families. Its template and end tokens change from test to test."""
    tokens = dict.fromkeys(token for tokens, _ in EXPECTED.values() for token in tokens if token.strip())
    return real_qwen_tokenizer(*tokens)
