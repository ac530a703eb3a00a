"""What every test stands on: no network, one thread, a tiny tokenizer and model made in this process."""

import json
import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

# Before transformers and torch read them; child processes inherit them.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_NUM_THREADS", "1")
# The CPU also where there are GPUs, whether torch can use them or not; run_tests.sh --gpu lists them in GPU_TESTS, and
# the tests of tests/gpu have the first of them.
os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("GPU_TESTS", "").partition(",")[0]
if not os.environ["CUDA_VISIBLE_DEVICES"]:
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed prints a warning when it finds no GPU by itself

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))

LOOPBACK = ("127.", "::1", "localhost", "0.0.0.0")
TEXTS = [
    "感冒了应该怎么办？多喝水，注意休息，如果高烧不退，请及时去医院就诊。",
    "高血压患者在饮食上需要注意什么？少吃盐，多吃蔬菜和水果，按时服药，定期测量血压。",
    "糖尿病有哪些早期症状？口渴、多尿、体重下降和乏力，请到医院检查血糖。",
    "如何预防心血管疾病？戒烟限酒，适量运动，控制血压、血脂和血糖。",
    "You are a helpful assistant. Please see a doctor if the fever lasts for more than three days.",
]
TINY_SHAPE = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2}
TINY_HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests in tests/gpu are marked gpu, and left out where torch has no GPU."""
    without = pytest.mark.skip(reason="torch has no GPU here: bash run_tests.sh --gpu on a machine that has one")
    of_gpu = [item for item in items if item.path.parent.name == "gpu"]
    if of_gpu:
        import torch

        for item in of_gpu:
            item.add_marker("gpu")
            if not torch.cuda.is_available():
                item.add_marker(without)


@pytest.fixture(scope="session", autouse=True)
def _no_network():
    """Only loopback and Unix sockets can be connected to, as gloo and a local server need them."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("connect", "connect_ex"):
            patch.setattr(socket.socket, name, _local_only(getattr(socket.socket, name)))
        yield


def _local_only(connect: Callable) -> Callable:
    def guarded(self, address):
        if isinstance(address, tuple) and not str(address[0]).startswith(LOOPBACK):
            raise OSError(f"tests may not use the network: {address}")
        return connect(self, address)

    return guarded


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory) -> Path:
    """A two-layer Qwen2 and its tokenizer, as `scripts/build_tiny_model.py` saves them. Read only.

    Its blocks are larger than there: an untrained model whose blocks begin small says its last token over and over.
    """
    import torch
    from build_tiny_model import write_tiny_model
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("models") / "tiny-qwen2"
    write_tiny_model(folder, TEXTS * 2, vocab_size=600, **TINY_SHAPE, **TINY_HEADS)
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        for name, weights in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                weights /= model.config.initializer_range
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def thinking_model_dir(tiny_model_dir, tmp_path_factory) -> Path:
    """The tiny model with a template whose prompt opens a thought, as DeepSeek-R1's does. Read only."""
    import shutil

    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("models") / "thinks"
    shutil.copytree(tiny_model_dir, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template += r"""{{- "<think>\n" if add_generation_prompt else "" }}"""
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_tokenizer(tiny_model_dir):
    """The tokenizer in `tiny_model_dir`: ChatML, eos <|im_end|>, pad <|endoftext|>. Not to be changed."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_model_dir)


@pytest.fixture(scope="session")
def qwen_tokenizer():
    """The real Qwen2.5 tokenizer with its 151,643 learned entries. Not to be changed."""
    from qwen_vocab import real_qwen_tokenizer

    return real_qwen_tokenizer()


@pytest.fixture(scope="session")
def families_tokenizer():
    """The Qwen vocabulary with the tokens of all families. Its template and end tokens change from test to test."""
    from qwen_vocab import real_qwen_tokenizer
    from template_cases import EXPECTED

    tokens = dict.fromkeys(token for tokens, _ in EXPECTED.values() for token in tokens if token.strip())
    return real_qwen_tokenizer(*tokens)


@pytest.fixture(scope="session")
def tokenizers(families_tokenizer):
    """That one, and one with Llama's tokens alone, for templates that spell their headers (`WORDY`)."""
    from qwen_vocab import real_qwen_tokenizer
    from template_cases import LLAMA

    return families_tokenizer, real_qwen_tokenizer(*LLAMA)


@pytest.fixture
def in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="session")
def sft_adapter(tiny_model_dir, tmp_path_factory) -> Path:
    """What the SFT stage leaves, with the guide's rank and alpha; its replies end now and then. Read only."""
    from stage_runs import train_sft

    return train_sft(tmp_path_factory.mktemp("sft"), tiny_model_dir, "--max_steps", "12")


@pytest.fixture(scope="session")
def adapter(tiny_model_dir, tmp_path_factory) -> Path:
    """An adapter with random weights, as SFT saves one. Read only."""
    from random_adapters import random_adapter

    return random_adapter(tiny_model_dir, tmp_path_factory.mktemp("adapter") / "checkpoint-best")


@pytest.fixture(scope="session")
def reward_adapter(tiny_model_dir, tmp_path_factory) -> Path:
    """A reward model with random weights. Read only."""
    from random_adapters import random_reward_adapter

    return random_reward_adapter(tiny_model_dir, tmp_path_factory.mktemp("rm") / "checkpoint-best")


@pytest.fixture
def write_jsonl(tmp_path) -> Callable[[str, list], Path]:
    """A function that writes records, one a line, into a file below `tmp_path` and returns its path."""

    def write(name: str, records: list) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), encoding="utf-8")
        return path

    return write
