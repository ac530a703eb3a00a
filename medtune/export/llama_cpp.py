"""llama.cpp's own tools: its converter for families that are not written here, its quantizer, and llama.cpp itself.

What the converter writes is compared through llama.cpp, which alone reads all that it writes.
"""

import json
import shutil
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import torch
from loguru import logger
from safetensors import safe_open
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from medtune.errors import UserError
from medtune.export.comparison import EncodedReply, check_same_tokens
from medtune.models.loading import weight_files
from medtune.reading.chat_template import ChatTemplate
from medtune.reading.messages import Message
from medtune.reading.tokenization import IGNORED_LABEL

CONVERTER = "convert_hf_to_gguf.py"
QUANTIZER = "llama-quantize"
# What the converter writes by itself; other types are made of the file by the quantizer.
CONVERTER_TYPES = {"f32", "f16", "bf16", "q8_0"}
# Of each reply, the tokens that llama.cpp is asked about, one at a time.
REPLY_TOKENS = 24

# ---------------------------------------------------------------- converter and quantizer


def find_converter(llama_cpp: str | None, why: str) -> Path:
    """The converter in llama.cpp's folder, and llama.cpp to compare with; or UserError.

    Args:
        llama_cpp: what `--llama_cpp` names.
        why: the reason to need it.
    """
    if llama_cpp is None:
        raise UserError(f"{why}; llama.cpp's own converter may write it: give its checkout as --llama_cpp DIR")
    if not (file := Path(llama_cpp, CONVERTER)).is_file():
        raise UserError(f"--llama_cpp {llama_cpp}: no {CONVERTER} in it; give a checkout of llama.cpp")
    if find_spec("xllamacpp") is None:
        raise UserError(
            f"{why}; what llama.cpp's converter writes is compared through llama.cpp: "
            "python -m pip install -r requirements/gguf.txt"
        )
    return file


def find_quantizer(llama_cpp: str | None, gguf_type: str) -> Path:
    """llama.cpp's quantizer, built in its folder or on the PATH; or UserError."""
    built = [Path(llama_cpp, "build/bin", QUANTIZER), Path(llama_cpp, QUANTIZER)] if llama_cpp else []
    on_path = shutil.which(QUANTIZER)
    for file in [*built, *([Path(on_path)] if on_path else [])]:
        if file.is_file():
            return file
    raise UserError(
        f"--gguf_type {gguf_type}: made by llama.cpp's {QUANTIZER}, which is neither on the PATH nor built in "
        "--llama_cpp DIR; take q8_0, or in DIR: cmake -B build && cmake --build build --target llama-quantize"
    )


def convert(converter: Path, model: str, config: PretrainedConfig, file: Path, gguf_type: str) -> None:
    """Write a model's folder as a GGUF file.

    Raises:
        UserError: the converter does not know the model or its tokenizer.
    """
    command = [sys.executable, str(converter), model, "--outfile", str(file), "--outtype", gguf_type]
    # These classes leave the layers for multi-token prediction out when they load and save, and config.json keeps them.
    if config.model_type.startswith(("qwen3_5", "qwen3_next")) and not _has_mtp(model):
        command.append("--no-mtp")
    _run(command, f"--llama_cpp {converter.parent}")


def _has_mtp(model: str) -> bool:
    for file in weight_files(model):
        with safe_open(file, framework="pt") as tensors:
            if any("mtp" in name.split(".") for name in tensors.keys()):  # noqa: SIM118 - it is no mapping
                return True
    return False


def quantize(quantizer: Path, whole: Path, file: Path, gguf_type: str) -> None:
    """Write a GGUF file of another type from one in 16 or 32 bits, which goes."""
    _run([str(quantizer), str(whole), str(file), gguf_type.upper()], f"--gguf_type {gguf_type}: {quantizer}")
    whole.unlink()


def _run(command: Sequence[str], who: str) -> None:
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    if finished.returncode:
        last = [line.strip() for line in (finished.stdout + finished.stderr).splitlines() if line.strip()][-1:]
        raise UserError(f"{who}: {''.join(last) or f'ended with {finished.returncode}'}; nothing is written")


# ---------------------------------------------------------------- llama.cpp itself

Ask = Callable[[str, dict], dict]


@contextmanager
def loaded_in_llama_cpp(file: Path, context: int) -> Iterator[Ask]:
    """llama.cpp's server with a GGUF file, in this process and on loopback: a function of path and request."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel, params.warmup = str(file), context, 1, False
    params.verbosity = 1  # errors alone
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = torch.get_num_threads()
    server = xllamacpp.Server(params)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def ask(path: str, request: dict) -> dict:
        body, kind = json.dumps(request).encode(), {"Content-Type": "application/json"}
        with opener.open(urllib.request.Request(server.listening_address + path, body, kind)) as reply:
            return json.load(reply)

    yield ask


def scores_by_llama_cpp(
    file: Path, tokenizer: PreTrainedTokenizerBase, chat_template: ChatTemplate, rows: Sequence[EncodedReply]
) -> tuple[list[EncodedReply], float]:
    """The perplexity by llama.cpp of the beginnings of the replies, and the rows with labels for these alone.

    Raises:
        UserError: it reads a text as other tokens.
    """
    scored, logps = [], []
    with loaded_in_llama_cpp(file, max(len(ids) for ids, _ in rows) + 1) as ask:
        whole = {"add_special": False, "parse_special": True}
        check_same_tokens(tokenizer, lambda text: ask("/tokenize", {"content": text} | whole)["tokens"], rows)
        _compare_prompts(ask, tokenizer, chat_template)
        for ids, labels in rows:
            of_row = [IGNORED_LABEL] * len(ids)
            for place in [place for place, label in enumerate(labels) if label != IGNORED_LABEL][:REPLY_TOKENS]:
                if (logp := _logp(ask, ids[:place], ids[place])) is not None:
                    of_row[place] = ids[place]
                    logps.append(logp)
            scored.append((ids, of_row))
    return scored, torch.tensor(logps, dtype=torch.float64).mean().neg().exp().item()


def _logp(ask: Ask, prompt_ids: list[int], token_id: int) -> float | None:
    """The log-prob of a token, or None: the server tells none of a token that leaves a character unfinished.

    It tells those of tokens that it writes, before the bias that makes it write this one.
    """
    options = {"n_predict": 1, "n_probs": 1, "temperature": 0, "logit_bias": [[token_id, 1e6]], "cache_prompt": True}
    told = ask("/completion", {"prompt": prompt_ids} | options).get("completion_probabilities", [])
    assert all(token["id"] == token_id for token in told), told
    return told[0]["logprob"] if told else None


def _compare_prompts(ask: Ask, tokenizer: PreTrainedTokenizerBase, chat_template: ChatTemplate) -> None:
    """Warn where llama.cpp makes another prompt of a question than training did, such as one that opens a thought."""
    question: list[Message] = [{"role": "user", "content": "probe question"}]
    theirs, ours = ask("/apply-template", {"messages": question})["prompt"], chat_template.prompt(question)
    # Which it adds when it reads the prompt.
    bos = tokenizer.bos_token or ""
    if theirs.removeprefix(bos) != ours.removeprefix(bos):
        logger.warning(
            f"llama.cpp asks {theirs!r:.200} where the model was trained with {ours!r:.200}: set "
            "--chat-template-kwargs of llama-server, or render the prompt yourself"
        )
