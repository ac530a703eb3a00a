"""Weights in and out: paths and hub errors in one line, placement, LoRA new and continued, adapters on their base."""

import http.server
import json
import os
import shutil
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import bitsandbytes.nn.modules
import huggingface_hub.constants as hub
import pytest
import torch
from loguru import logger
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from safetensors.torch import load_file, save_file
from stage_runs import load_for_training
from tiny_families import save_mistral3, save_multimodal_model, save_multimodal_model_of_text_class, save_tiny_model
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from medtune.errors import UserError
from medtune.models import adapters, load_errors, loading, lora_layers, score_heads
from medtune.models.adapters import check_adapter_tensors, load_with_adapter
from medtune.models.families import check_same_family
from medtune.models.lineage import Lineage, base_of, check_model_path, is_adapter, read_adapter_config, read_lineage
from medtune.models.loading import (
    attention_implementation,
    load_base_model,
    load_config,
    load_tokenizer,
    placement,
    quantization_config,
    weights_fingerprint,
)
from medtune.models.lora_layers import describe_trainable
from medtune.models.reward_models import load_reward_model
from medtune.models.vocabulary import check_vocabulary, dead_rows, warn_of_dead_tokens
from medtune.reading.tokenization import load_chat_template, turn_token_ids

ALL_LINEAR = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
FLAG = "--model_name_or_path"


# ---------------------------------------------------------------- models and adapters


@pytest.fixture(scope="module")
def base(tiny_model_dir) -> str:
    return str(tiny_model_dir)


def make_adapter(base: str, folder: Path, **options) -> str:
    """Save an adapter on `base` whose B matrices are not zero, so that it changes the model."""
    torch.manual_seed(0)
    model = load_for_training(base, use_peft=True, torch_dtype="float32", **options)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(std=0.02)
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def adapter(base, tmp_path_factory) -> str:
    """A LoRA adapter on every linear layer, rank 4 and alpha 8. Read only."""
    return make_adapter(base, tmp_path_factory.mktemp("adapters") / "all", lora_rank=4, lora_alpha=8)


@pytest.fixture
def copied(tmp_path):
    """A function that copies a folder, so that a test may spoil it."""

    def copy(folder: str) -> Path:
        return Path(shutil.copytree(folder, tmp_path / f"copy-{Path(folder).name}"))

    return copy


def edit_json(file: Path, **changes) -> None:
    file.write_text(json.dumps(json.loads(file.read_text(encoding="utf-8")) | changes), encoding="utf-8")


def edit_weights(folder: Path, edit) -> None:
    """Apply `edit` to the tensors of an adapter in their order, and write what it leaves."""
    file = folder / "adapter_model.safetensors"
    weights = load_file(file)
    edit(weights)
    save_file(weights, file)


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(torch.arange(40).reshape(2, 20)).logits


def refused(action, *args, **kwargs) -> str:
    """The one line of a UserError."""
    with pytest.raises(UserError) as error:
        action(*args, **kwargs)
    assert "\n" not in str(error.value)
    return str(error.value)


# ---------------------------------------------------------------- paths


def test_a_model_and_an_adapter_are_accepted(base, adapter):
    check_model_path(base, FLAG)
    check_model_path(adapter, FLAG)
    assert (is_adapter(base), is_adapter(adapter)) == (False, True)
    assert (base_of(base), base_of(adapter)) == (base, base)


@pytest.mark.parametrize("name", ["Qwen/Qwen2.5-3B-Instruct", "gpt2"])
def test_a_hub_name_is_left_to_the_hub(name):
    check_model_path(name, FLAG)


@pytest.mark.parametrize("path", ["./none", "/no/such/model", "a/b/c", "tests/none"])
def test_a_missing_folder(path):
    assert refused(check_model_path, path, FLAG) == f"{FLAG} {path}: no such folder"


def test_a_file_and_an_empty_folder(tmp_path, write_jsonl):
    file = write_jsonl("x.jsonl", [])
    assert refused(check_model_path, str(file), FLAG) == f"{FLAG} {file}: a file; give the folder that holds the model"
    (tmp_path / "empty").mkdir()
    assert "neither config.json (a model) nor adapter_config.json" in refused(
        check_model_path, str(tmp_path / "empty"), FLAG
    )


def test_folders_without_safe_weights(copied, base):
    folder = copied(base)
    weights = folder / "model.safetensors"
    weights.rename(folder / "pytorch_model.bin")
    line = refused(check_model_path, str(folder), FLAG)
    assert line.startswith(f"{FLAG} {folder}: only pickle weights (.bin), which can run code")
    check_model_path(str(folder), FLAG, allow_pickle_weights=True)
    (folder / "pytorch_model.bin").unlink()
    assert refused(check_model_path, str(folder), FLAG).endswith("no weights (*.safetensors) in it")


def test_pickle_weights_load_only_when_allowed(copied, base):
    folder = copied(base)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    assert "only pickle weights (.bin)" in refused(load_base_model, str(folder))
    model = load_base_model(str(folder), allow_pickle_weights=True)
    assert torch.equal(logits(model), logits(load_base_model(base)))


def test_weights_without_all_that_the_configuration_asks_for(copied, base, capfd):
    folder = copied(base)
    edit_json(folder / "config.json", num_hidden_layers=4, layer_types=["full_attention"] * 4)
    fault = (
        f"{FLAG} {folder}: 24 tensors that config.json asks for are not in its weights and would be random, such as "
        "model.layers.2.input_layernorm.weight and model.layers.3.self_attn.v_proj.weight; copy or download both again"
    )
    assert refused(load_base_model, str(folder)) == fault
    assert refused(load_for_training, str(folder), use_peft=True, task_type=TaskType.SEQ_CLS, pad_token_id=0) == fault
    assert "LOAD REPORT" not in capfd.readouterr().err


def test_weights_with_more_than_the_configuration_asks_for(copied, base, capfd):
    folder = copied(base)
    edit_json(folder / "config.json", num_hidden_layers=1, layer_types=["full_attention"])
    lines = []
    sink = logger.add(lines.append, format="{message}")
    load_base_model(str(folder))
    logger.remove(sink)
    assert lines == [
        f"{FLAG} {folder}: 12 tensors of its weights have no place in the model of config.json and are left out, such "
        "as model.layers.1.input_layernorm.weight\n"
    ]
    assert "LOAD REPORT" not in capfd.readouterr().err


def test_an_incomplete_download(copied, base):
    folder = copied(base)
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert refused(check_model_path, str(folder), FLAG) == (
        f"{FLAG} {folder}: model-00002-of-00002.safetensors of its weights are missing; download it again"
    )


def test_damaged_weights(copied, base):
    folder = copied(base)
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    assert refused(load_base_model, str(folder)).startswith(f"{FLAG} {folder}: model.safetensors: damaged weights (")


def test_adapters_that_are_not_whole(copied, adapter, tmp_path):
    folder = copied(adapter)
    config = folder / "adapter_config.json"
    whole = config.read_text()
    edit_json(config, base_model_name_or_path="./gone")
    assert refused(check_model_path, str(folder), FLAG) == f"{FLAG} {folder}: its base model ./gone: no such folder"
    edit_json(config, base_model_name_or_path=None)
    assert "names no base model" in refused(check_model_path, str(folder), FLAG)
    config.write_text(whole[:50])
    assert "adapter_config.json: broken JSON: " in refused(check_model_path, str(folder), FLAG)
    config.write_text('{"peft_type": "MAGIC"}')
    assert "adapter_config.json: not an adapter's configuration" in refused(check_model_path, str(folder), FLAG)
    config.write_text('{"peft_type": "IA3", "base_model_name_or_path": "x"}')
    assert "IA3 adapter; only LoRA adapters are read" in refused(check_model_path, str(folder), FLAG)
    config.write_text(whole)
    (folder / "adapter_model.safetensors").unlink()
    assert "adapter_model.safetensors is missing" in refused(check_model_path, str(folder), FLAG)
    assert refused(read_adapter_config, tmp_path / "none") == f"{tmp_path / 'none'}: no such folder"
    assert "so it is no LoRA adapter" in refused(read_adapter_config, tmp_path)


def test_lineage(tmp_path):
    lineage = Lineage("base", None, "sft", "qwen", "data/医", 128, 600)
    lineage.save(tmp_path)
    assert read_lineage(tmp_path) == lineage
    assert "医" in (tmp_path / "lineage.json").read_text(encoding="utf-8")
    for broken in ("{", '{"base_model": "b"}', "[1]", '{"other": 1}'):
        (tmp_path / "lineage.json").write_text(broken)
        assert "lineage.json: not a lineage record" in refused(read_lineage, tmp_path)
    (tmp_path / "lineage.json").unlink()
    assert read_lineage(tmp_path) is None


# ---------------------------------------------------------------- the hub


@pytest.fixture
def online(monkeypatch, tmp_path):
    """Leave the offline mode of the tests; what is set here is put back."""
    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


def use_endpoint(monkeypatch, endpoint: str) -> str:
    """What HF_ENDPOINT does where it is set before the start."""
    monkeypatch.setattr(hub, "ENDPOINT", endpoint)
    monkeypatch.setattr(hub, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}")
    return endpoint


# Answers of the hub: status, its error code, its message.
ANSWERS = {
    "gated": (403, "GatedRepo", "Access to model gated/m is restricted and you are not in the authorized list."),
    "gated-anonymous": (401, "GatedRepo", "Access to model is restricted. Please log in."),
    "unknown": (401, "RepoNotFound", "Repository not found"),
    "gone": (404, "RepoNotFound", "Repository not found"),
    "expired": (401, None, "Invalid credentials in Authorization header"),
    "empty": (404, "EntryNotFound", "Entry not found"),
}


@pytest.fixture
def mirror(online, monkeypatch):
    """A hub on this machine, as HF_ENDPOINT would name it; the owner in a model's name decides what it answers."""

    class Answer(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            owner = next(part for part in self.path.split("/") if part in ANSWERS)
            status, code, message = ANSWERS[owner]
            self.send_response(status)
            if code:
                self.send_header("X-Error-Code", code)
            self.send_header("X-Error-Message", message)
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_HEAD = do_GET  # noqa: N815

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield use_endpoint(monkeypatch, f"http://127.0.0.1:{server.server_port}")
        server.shutdown()


@pytest.mark.parametrize("load", [load_tokenizer, load_base_model, load_config])
@pytest.mark.parametrize(
    ("owner", "reason"),
    [
        ("gated", "a gated model: accept its licence on {endpoint} and set HF_TOKEN"),
        ("gated-anonymous", "a gated model: accept its licence on {endpoint} and set HF_TOKEN"),
        ("unknown", "neither a folder here nor a public model on {endpoint}: check the name"),
        ("gone", "neither a folder here nor a public model on {endpoint}: check the name"),
        ("expired", "{endpoint} does not accept the token in HF_TOKEN"),
    ],
)
def test_what_the_hub_answers(mirror, tmp_path, load, owner, reason):
    line = refused(load, f"{owner}/m", cache_dir=str(tmp_path))
    assert line.startswith(f"{FLAG} {owner}/m: {reason.format(endpoint=mirror)}")


def test_a_repository_without_a_model(mirror, tmp_path):
    assert "not a model that these versions of the libraries know" in refused(
        load_config, "empty/m", cache_dir=str(tmp_path)
    )


@pytest.mark.parametrize("load", [load_tokenizer, load_base_model, load_config])
def test_a_name_while_offline(load, tmp_path):
    assert refused(load, "owner/model", flag="--base_model", cache_dir=str(tmp_path)) == (
        f"--base_model owner/model: no folder of that name here, and {hub.ENDPOINT} cannot be reached: check the "
        "network, set HF_ENDPOINT to a mirror, or give the folder of a downloaded model"
    )


def test_without_network_the_line_comes_at_once(online, monkeypatch, tmp_path):
    """The library alone would try for 46 s a file."""
    use_endpoint(monkeypatch, "http://127.0.0.1:9")
    start = time.monotonic()
    assert "and http://127.0.0.1:9 cannot be reached" in refused(load_tokenizer, "owner/model", cache_dir=str(tmp_path))
    assert time.monotonic() - start < 15
    assert (hub.HF_HUB_OFFLINE, os.environ["HF_HUB_OFFLINE"]) == (True, "1")


def test_behind_a_proxy_the_hub_is_not_asked_directly(online, monkeypatch):
    use_endpoint(monkeypatch, "https://hub.invalid")
    monkeypatch.setenv("https_proxy", "http://proxy.invalid:1")
    load_errors.go_offline_without_hub()
    assert hub.HF_HUB_OFFLINE is False


def test_a_folder_needs_no_hub(online, monkeypatch, base):
    monkeypatch.setattr(load_errors, "go_offline_without_hub", lambda: pytest.fail("asked the hub"))
    load_tokenizer(base)


def test_a_model_that_ships_code(copied, base):
    folder = copied(base)
    edit_json(folder / "config.json", model_type="own", auto_map={"AutoConfig": "configuration_own.OwnConfig"})
    (folder / "configuration_own.py").write_text("raise SystemExit('this ran')\n")
    line = refused(load_base_model, str(folder))
    assert line == f"{FLAG} {folder}: its repository ships Python code: read it, then pass --trust_remote_code True"


def test_an_error_that_is_not_the_users_keeps_its_traceback(monkeypatch, base):
    def fail(*args, **kwargs):
        raise ValueError("the resolved shape is not connected")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", fail)
    with pytest.raises(ValueError, match="resolved shape") as error:
        load_base_model(base)
    assert not isinstance(error.value, UserError)


# ---------------------------------------------------------------- tokenizer


def test_pad_token(copied, base):
    assert load_tokenizer(base).pad_token == "<|endoftext|>"
    folder = copied(base)
    edit_json(folder / "tokenizer_config.json", pad_token=None)
    tokenizer = load_tokenizer(str(folder))
    assert (tokenizer.pad_token, tokenizer.eos_token) == ("<|im_end|>", "<|im_end|>")


def test_a_text_over_the_tokenizer_s_own_limit_is_no_indexing_error(copied, base, caplog):
    folder = copied(base)
    edit_json(folder / "tokenizer_config.json", model_max_length=4)
    for load, warned in ((AutoTokenizer.from_pretrained, True), (load_tokenizer, False)):
        tokenizer = load(str(folder))
        assert len(tokenizer("头痛发热怎么办？" * 4)["input_ids"]) > 4
        assert ("indexing errors" in caplog.text) is warned
        caplog.clear()
    tokenizer.save_pretrained(folder)
    assert json.loads((folder / "tokenizer_config.json").read_text())["model_max_length"] == 4


def test_no_end_token(copied, base):
    folder = copied(base)
    edit_json(folder / "tokenizer_config.json", eos_token=None)
    assert "no end-of-text token, so no reply would end" in refused(load_tokenizer, str(folder))


def test_a_model_without_tokenizer(copied, base):
    folder = copied(base)
    for file in folder.glob("*token*"):
        file.unlink()
    line = refused(load_tokenizer, str(folder))
    assert line.startswith(f"{FLAG} {folder}: no tokenizer in it; copy tokenizer.json and tokenizer_config.json there")


def test_an_adapters_own_tokenizer_goes_before_its_bases(copied, adapter, base):
    folder = copied(adapter)
    assert load_tokenizer(str(folder)).chat_template == load_tokenizer(base).chat_template
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = "other"
    tokenizer.save_pretrained(folder)
    assert load_tokenizer(str(folder)).chat_template == "other"


def test_a_larger_vocabulary_is_refused_and_the_embeddings_stay(base):
    tokenizer, model = load_tokenizer(base), load_base_model(base)
    n_rows = model.get_input_embeddings().num_embeddings
    check_vocabulary(tokenizer, model)
    tokenizer.add_tokens([f"<new-{number}>" for number in range(n_rows - len(tokenizer) + 1)])
    assert f"has {n_rows + 1} entries and the model embeddings for {n_rows}" in refused(
        check_vocabulary, tokenizer, model
    )
    assert model.get_input_embeddings().num_embeddings == n_rows


# ---------------------------------------------------------------- tokens that were never trained


def with_rows(rows: str) -> torch.Tensor:
    """[600, 32] random rows around a common mean, as trained ones are, with rows 7 and 8 of a kind."""
    weight = torch.randn(600, 32, generator=torch.Generator().manual_seed(0)) + 0.3
    made = {
        "zeros": torch.zeros(2, 32),
        "all but zeros": torch.randn(2, 32) * 1e-5,
        "the mean": weight.mean(dim=0) + torch.randn(2, 32) * 1e-4,
        "the same": weight[7].repeat(2, 1),
        "as the rows that fill up": weight[599].repeat(2, 1),
        "random": weight[7:9],
        "small": weight[7:9] * 0.2,
        "one a copy of another token": torch.stack([weight[7], weight[3]]),
    }
    if rows == "as the rows that fill up":
        weight[590:] = weight[599]
    weight[7:9] = made[rows]
    return weight


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("rows", "is_dead"),
    [
        *[(rows, True) for rows in ("zeros", "all but zeros", "the mean", "the same", "as the rows that fill up")],
        *[(rows, False) for rows in ("random", "small", "one a copy of another token")],
    ],
)
def test_only_rows_that_were_surely_never_trained_are_dead(rows, is_dead, dtype):
    assert dead_rows(with_rows(rows).to(dtype), [7, 8]) == ({7, 8} if is_dead else set())
    assert dead_rows(with_rows(rows).to(dtype), [100, 101]) == set()


@pytest.fixture(scope="module")
def untaught(base, tmp_path_factory) -> dict[str, str]:
    """Copies of the model, its head tied or not, whose rows of the turn tokens are zeros; and a sound untied one."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    turns = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    folders = {}
    for name, tied, rows in (("tied", True, "both"), ("untied", False, "both"), ("head", False, "head")):
        model = AutoModelForCausalLM.from_pretrained(base)
        if not tied:
            model.config.tie_word_embeddings = False
            model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
        with torch.no_grad():
            model.lm_head.weight[turns] = 0
            if rows == "both":
                model.model.embed_tokens.weight[turns] = 0
        folders[name] = str(tmp_path_factory.mktemp("untaught") / name)
        model.save_pretrained(folders[name])
        tokenizer.save_pretrained(folders[name])
    return folders | {"sound": base}


@pytest.mark.parametrize(
    ("which", "options", "named"),
    [
        ("tied", {}, "<|im_start|>, <|im_end|>: --modules_to_save embed_tokens "),
        ("untied", {}, "<|im_start|>, <|im_end|>: --modules_to_save embed_tokens,lm_head "),
        ("untied", {"modules_to_save": "embed_tokens"}, "<|im_end|>: --modules_to_save lm_head "),
        ("head", {}, "<|im_end|>: --modules_to_save embed_tokens,lm_head "),
        ("tied", {"target_modules": "q_proj,embed_tokens"}, "<|im_end|>: --modules_to_save embed_tokens "),
        ("tied", {"modules_to_save": "embed_tokens"}, None),
        ("untied", {"modules_to_save": "embed_tokens,lm_head"}, None),
        ("tied", {"use_peft": False}, None),
        ("sound", {}, None),
    ],
)
def test_turn_tokens_that_no_one_trained_are_warned_of_once(untaught, log, which, options, named):
    tokenizer = load_tokenizer(untaught[which])
    chat_template = load_chat_template(tokenizer, "qwen")
    model = load_for_training(untaught[which], **{"use_peft": True} | options)
    warn_of_dead_tokens(model, tokenizer, *turn_token_ids(tokenizer, chat_template))
    lines = [line for line in log if "never learned" in line]
    assert len(lines) == (named is not None)
    for line in lines:
        tokens, _, remedy = named.partition(": ")
        assert line.startswith(f"{tokens}: the model has never learned these tokens of the template, and this adapter")
        assert remedy in line
        assert line.endswith("or --use_peft False")


# ---------------------------------------------------------------- base model


@pytest.mark.parametrize(
    ("torch_dtype", "expected"), [("auto", torch.float32), ("bfloat16", torch.bfloat16), ("float16", torch.float16)]
)
def test_dtype(base, torch_dtype, expected):
    assert load_base_model(base, torch_dtype=torch_dtype).dtype == expected


def test_auto_takes_the_checkpoints_dtype(base, tmp_path):
    load_base_model(base, torch_dtype="bfloat16").save_pretrained(tmp_path)
    assert load_base_model(str(tmp_path)).dtype == torch.bfloat16


def test_another_head_and_configuration(base):
    model = load_base_model(base, model_class=AutoModelForSequenceClassification, num_labels=1)
    assert model.score.weight.shape == (1, 128)


def test_quantization_config():
    assert quantization_config(False, False, torch.float32) is None
    assert quantization_config(False, True, torch.float32).load_in_8bit
    four = quantization_config(True, False, torch.float16)
    assert (four.load_in_4bit, four.bnb_4bit_quant_type, four.bnb_4bit_use_double_quant) == (True, "nf4", True)
    assert four.bnb_4bit_compute_dtype == torch.float16


@pytest.mark.parametrize(
    ("flash_attn", "cuda", "capability", "installed", "expected", "line"),
    [
        (False, True, (8, 0), True, None, ""),
        (True, True, (8, 0), True, "flash_attention_2", ""),
        (True, True, (8, 0), False, None, "--flash_attn: the package flash-attn is not installed"),
        (True, True, (7, 0), True, None, "--flash_attn: FlashAttention 2 needs an Ampere GPU or newer"),
        (True, False, None, True, None, "--flash_attn: FlashAttention needs a CUDA device"),
    ],
)
def test_attention_of_a_gpu(monkeypatch, log, flash_attn, cuda, capability, installed, expected, line):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(loading, "is_flash_attn_2_available", lambda: installed)
    assert attention_implementation(flash_attn) == expected
    assert [message.startswith(line) for message in log] == ([True] if line else [])


@pytest.mark.parametrize(
    ("capability", "expected"), [((9, 0), "flash_attention_3"), ((10, 0), "flash_attention_2")], ids=str
)
def test_hopper_has_an_attention_of_its_own(monkeypatch, capability, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    for version in (2, 3):
        monkeypatch.setattr(loading, f"is_flash_attn_{version}_available", lambda: True)
    assert attention_implementation(True) == expected


@pytest.fixture
def log():
    """The messages that are logged during the test."""
    messages = []
    sink = adapters.logger.add(lambda message: messages.append(message.record["message"]))
    yield messages
    adapters.logger.remove(sink)


@pytest.mark.parametrize(
    ("cuda", "n_gpus", "world_size", "device_map", "quantized", "expected"),
    [
        (False, 0, 1, "auto", False, None),
        (False, 0, 2, "auto", True, None),
        (True, 1, 1, None, False, None),
        (True, 1, 1, "auto", False, None),
        (True, 1, 1, "auto", True, {"": 0}),
        (True, 2, 1, "auto", False, "auto"),
        (True, 2, 1, "auto", True, "auto"),
        (True, 2, 1, None, True, {"": 0}),
        (True, 2, 2, "auto", False, None),  # splitting here would put both copies on both GPUs
        (True, 2, 2, "auto", True, {"": 1}),
        (True, 2, 2, None, True, {"": 1}),
    ],
)
def test_placement(monkeypatch, log, cuda, n_gpus, world_size, device_map, quantized, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: n_gpus)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setenv("WORLD_SIZE", str(world_size))
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert placement(device_map, quantized) == expected
    said = "--device_map auto: each of 2 processes holds the model on its own GPU"
    assert log == ([said] if cuda and world_size == 2 and device_map else [])


# ---------------------------------------------------------------- a new adapter


def lora_modules(model) -> dict[str, int]:
    return dict(lora_layers.lora_layers(model))


@pytest.mark.parametrize("target_modules", [None, "all", "all-linear"])
def test_all_is_every_linear_layer_but_the_head(base, target_modules):
    model = load_for_training(base, use_peft=True, target_modules=target_modules)
    assert lora_modules(model) == dict.fromkeys(ALL_LINEAR, 2)
    config = model.peft_config["default"]
    assert (config.r, config.lora_alpha, config.lora_dropout) == (16, 32, 0.05)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, _ in model.named_parameters() if ".lora_" in name}


def test_flags_reach_the_adapter(base):
    model = load_for_training(
        base,
        use_peft=True,
        target_modules="q_proj, v_proj",
        lora_rank=8,
        lora_alpha=12.5,
        lora_dropout=0.1,
        use_dora=True,
        use_rslora=True,
        modules_to_save="embed_tokens",
    )
    config = model.peft_config["default"]
    assert lora_modules(model) == {"q_proj": 2, "v_proj": 2}
    assert (config.r, config.lora_alpha, config.lora_dropout) == (8, 12.5, 0.1)
    assert (config.use_dora, config.use_rslora) == (True, True)
    assert set(config.modules_to_save) == {"embed_tokens", "model.embed_tokens"}
    assert config.task_type == TaskType.CAUSAL_LM
    assert model.get_input_embeddings().weight.requires_grad


def test_an_unknown_module_name(base):
    line = refused(load_for_training, base, use_peft=True, target_modules="query")
    assert line == (
        f"--target_modules query: no such module in {base}; it has down_proj, gate_proj, k_proj, o_proj, q_proj, "
        "up_proj, v_proj, or say all"
    )


def test_full_training(base):
    model = load_for_training(base, use_peft=False)
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("flag", ["load_in_4bit", "load_in_8bit"])
def test_a_quantized_base_is_not_trained_itself(base, monkeypatch, flag):
    for module in (adapters, score_heads):
        monkeypatch.setattr(module, "load_base_model", lambda *args, **kwargs: pytest.fail("loaded it first"))
    assert refused(load_for_training, base, use_peft=False, **{flag: True}).startswith("--use_peft False with a quant")


def test_describe_trainable(base, adapter):
    full = load_for_training(base, use_peft=False)
    n_all = sum(parameter.numel() for parameter in full.parameters())
    assert describe_trainable(full) == f"{n_all:,} of {n_all:,} parameters trained (100.00%)"
    # Rank 4 on a layer of in x out: 4 * (in + out); the tiny model has heads of 64, two for queries, one for keys.
    n_lora = 2 * 4 * (2 * (128 + 128) + 2 * (128 + 64) + 3 * (128 + 256))
    line = describe_trainable(load_for_training(adapter, use_peft=True))
    share = n_lora / (n_all + n_lora)
    assert line.startswith(f"{n_lora:,} of {n_all + n_lora:,} parameters trained ({share:.2%}); LoRA on 2 q_proj, ")


def test_describe_trainable_counts_quantized_weights_whole(base):
    plain = describe_trainable(load_for_training(base, use_peft=True, torch_dtype="float32"))
    four_bit = describe_trainable(load_for_training(base, use_peft=True, torch_dtype="float32", load_in_4bit=True))
    assert four_bit == plain


# ---------------------------------------------------------------- what an adapter on all leaves out

ATTENTION = dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), 4)
MLP = dict.fromkeys(("gate_proj", "up_proj", "down_proj"), 4)
COVERED = {
    "qwen3": ATTENTION | MLP,
    "qwen3_moe": ATTENTION | {"experts.gate_up_proj": 4, "experts.down_proj": 4},
    # Of the first layer, which has no experts, and of the shared experts.
    "glm4_moe": ATTENTION | MLP | {"experts.gate_up_proj": 3, "experts.down_proj": 3},
    "lfm2_moe": {"in_proj": 3, "out_proj": 4, "q_proj": 1, "k_proj": 1, "v_proj": 1, "w1": 1, "w2": 1, "w3": 1}
    | {"experts.gate_up_proj": 3, "experts.down_proj": 3},
    "gpt_oss": ATTENTION | {"experts.gate_up_proj": 4, "experts.down_proj": 4},
    "falcon_h1": ATTENTION | MLP | {"in_proj": 4},
}
LEFT_OUT = {
    "qwen3": "",
    "qwen3_moe": "4 mlp.gate",
    "glm4_moe": "3 mlp.gate",
    "lfm2_moe": "3 feed_forward.gate",
    "gpt_oss": "4 mlp.router",
    "falcon_h1": "4 mamba.out_proj",
}


@pytest.mark.parametrize("model_type", COVERED)
def test_all_is_every_linear_layer_and_the_experts_but_no_router(base, tmp_path, model_type, log):
    folder = str(save_tiny_model(model_type, tmp_path / model_type, Path(base)))
    model = load_for_training(folder, use_peft=True, target_modules="all")
    assert lora_modules(model) == COVERED[model_type]
    line, left_out = describe_trainable(model), LEFT_OUT[model_type]
    assert line.endswith(f"% of the matrices' weights: {left_out}") if left_out else "no adapter" not in line
    no_dropout = "--lora_dropout 0.05: 0 is used, since an adapter on experts' weights can have no dropout"
    has_experts = "experts.down_proj" in COVERED[model_type]
    assert [line for line in log if "dropout" in line] == [no_dropout] * has_experts
    # Plain PEFT loads it, and a later stage, which asks for all again, continues it.
    model.save_pretrained(tmp_path / "adapter")
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), tmp_path / "adapter")
    assert lora_modules(plain) == lora_modules(model)
    again = load_for_training(str(tmp_path / "adapter"), use_peft=True, target_modules="all")
    assert lora_modules(again) == lora_modules(model)


@pytest.mark.parametrize("model_type", ["qwen3_moe", "glm4_moe"])
def test_an_adapter_on_all_of_an_older_version_is_continued_and_resumed_as_it_is(base, tmp_path, model_type):
    """PEFT's all-linear, which `all` was: routers, and neither shared experts nor layers without experts."""
    folder = str(save_tiny_model(model_type, tmp_path / model_type, Path(base)))
    config = LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules="all-linear")
    older = get_peft_model(AutoModelForCausalLM.from_pretrained(folder), config)
    older.save_pretrained(tmp_path / "adapter")
    assert "gate" in lora_modules(older)
    continued = load_for_training(str(tmp_path / "adapter"), use_peft=True, target_modules="all")
    resumed = load_for_training(folder, use_peft=True, target_modules="all", checkpoint=str(tmp_path / "adapter"))
    assert lora_modules(continued) == lora_modules(resumed) == lora_modules(older)
    check_adapter_tensors(resumed, str(tmp_path / "adapter"), "--resume_from_checkpoint")
    new = load_for_training(folder, use_peft=True, target_modules="all")
    line = refused(check_adapter_tensors, new, str(tmp_path / "adapter"), "--resume_from_checkpoint")
    assert "tensors are in adapter_model.safetensors and not in" in line


def test_the_share_without_an_adapter(base):
    """Of matrices of 128 x 128 and 128 x 256; the tiny model has heads of 64, two for queries, one for keys."""
    model = load_for_training(base, use_peft=True, target_modules="q_proj,k_proj,v_proj,o_proj", load_in_4bit=True)
    attention, mlp = 2 * 128 * 128 + 2 * 64 * 128, 3 * 128 * 256
    share = f"; no adapter on {mlp / (attention + mlp):.1%} of the matrices' weights: "
    assert describe_trainable(model).endswith(share + "2 mlp.gate_proj, 2 mlp.up_proj, 2 mlp.down_proj")


def test_an_adapter_that_leaves_out_what_all_covers_is_refused_still(base, tmp_path):
    folder = str(save_tiny_model("glm4_moe", tmp_path / "base", Path(base)))
    model = load_for_training(folder, use_peft=True, target_modules="q_proj,v_proj", lora_dropout=0)
    model.save_pretrained(tmp_path / "adapter")
    line = refused(load_for_training, str(tmp_path / "adapter"), use_peft=True, target_modules="all", lora_dropout=0)
    assert "leaves out k_proj, o_proj, and training continues" in line


MULTIMODAL = {
    "gemma3": (save_multimodal_model, "its language model is trained; model.vision_tower, model.multi_modal_projector "
    "stay as they are"),
    "qwen3_5": (save_multimodal_model_of_text_class, "its language model alone is loaded and trained; vision comes "
    "back in a merged model"),
    "mistral3": (save_mistral3, "its language model is trained; model.vision_tower, model.multi_modal_projector stay "
    "as they are"),
}  # fmt: skip


@pytest.mark.parametrize("name", MULTIMODAL)
def test_of_a_multimodal_model_the_language_model_is_trained(base, tmp_path, name, log):
    """By an adapter that fits the class which others load, or whole; text gives the vision tower no gradient."""
    save, line = MULTIMODAL[name]
    folder = str(save(tmp_path / name, Path(base)))
    model = load_for_training(folder, use_peft=True)
    assert log == [f"{folder}: {line}"]
    assert not any("vision" in path or "visual" in path for path, _ in lora_layers._adapted_tensors(model))
    ids = torch.arange(40).reshape(2, 20)
    assert model(ids).logits.shape == (2, 20, 640)
    model.save_pretrained(tmp_path / "adapter")
    auto = AutoModelForImageTextToText if name == "mistral3" else AutoModelForCausalLM
    plain = PeftModel.from_pretrained(auto.from_pretrained(folder), tmp_path / "adapter")
    assert lora_modules(plain) == lora_modules(model)
    again = load_for_training(str(tmp_path / "adapter"), use_peft=True, target_modules="all")
    assert lora_modules(again) == lora_modules(model)
    whole = load_for_training(folder, use_peft=False)
    whole(ids, labels=ids).loss.backward()
    weights = dict(whole.named_parameters())
    assert (
        {path for path, each in weights.items() if each.grad is not None}
        == {path for path, each in weights.items() if each.requires_grad}
        == {path for path in weights if "vision" not in path and "projector" not in path}
    )


def test_what_an_adapter_on_a_family_cannot_have(base, tmp_path):
    experts = str(save_tiny_model("qwen3_moe", tmp_path / "experts", Path(base)))
    line = refused(load_for_training, experts, use_peft=True, use_dora=True)
    assert line == f"--use_dora True: an adapter on the experts of {experts} cannot have that; give --use_dora False"
    line = refused(load_for_training, experts, use_peft=True, target_modules="q_proj,gate_proj")
    layers = f"in {experts} gate_proj and up_proj are one layer; name both, or neither"
    assert line == f"--target_modules q_proj,gate_proj: {layers}"
    mamba = str(save_tiny_model("falcon_h1", tmp_path / "mamba", Path(base)))
    assert refused(load_for_training, mamba, use_peft=True, target_modules="q_proj,out_proj") == (
        f"--target_modules q_proj,out_proj: no adapter can be on out_proj of {mamba}; give --target_modules "
        "down_proj,gate_proj,in_proj,k_proj,o_proj,q_proj,up_proj,v_proj"
    )


def test_named_layers_are_all_that_have_the_name(base, tmp_path):
    """PEFT would leave out those of the first layer and of the shared experts; a router is trained if it is named."""
    folder = str(save_tiny_model("glm4_moe", tmp_path / "base", Path(base)))
    names = "q_proj,gate,gate_proj,up_proj,down_proj"
    model = load_for_training(folder, use_peft=True, target_modules=names)
    experts = {"experts.gate_up_proj": 3, "experts.down_proj": 3}
    assert lora_modules(model) == {"q_proj": 4, "gate": 3} | MLP | experts
    model.save_pretrained(tmp_path / "adapter")
    load_for_training(str(tmp_path / "adapter"), use_peft=True, target_modules=names)


# ---------------------------------------------------------------- quantized bases on the CPU


@pytest.mark.parametrize("flag", ["load_in_4bit", "load_in_8bit"])
def test_every_lora_matrix_learns_after_an_evaluation(base, adapter, flag):
    """bitsandbytes 0.50.2 would repack 4-bit weights in the first evaluation, and most gradients would be gone."""
    model = load_for_training(adapter, use_peft=True, torch_dtype="float32", **{flag: True})
    before = logits(model)
    plain = logits(load_for_training(adapter, use_peft=True, torch_dtype="float32"))
    assert (before - plain).abs().mean() < 0.4 * plain.std()
    model.train()
    ids = torch.arange(40).reshape(2, 20)
    model(ids, labels=ids).loss.backward()
    lora = {name: parameter for name, parameter in model.named_parameters() if ".lora_" in name}
    assert len(lora) == 2 * 2 * len(ALL_LINEAR)
    without = [name for name, parameter in lora.items() if parameter.grad is None or not parameter.grad.any()]
    assert not without


def test_bitsandbytes_does_not_repack_on_this_cpu(monkeypatch, base):
    """Where the CPU has the instructions; the test above cannot fail on one without."""
    monkeypatch.setattr(bitsandbytes.nn.modules, "has_avx512bf16", lambda: True)
    load_base_model(base, load_in_4bit=True)
    assert not bitsandbytes.nn.modules.has_avx512bf16()


def test_bitsandbytes_is_left_alone_on_a_gpu(monkeypatch, base):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(loading, "_keep_bitsandbytes_weights_plain", lambda: pytest.fail("patched"))
    monkeypatch.setattr(loading, "placement", lambda *args: None)
    monkeypatch.setattr(loading, "_load_with_attention", lambda load, *args: (load.keywords, None))
    monkeypatch.setattr(loading, "check_loaded", lambda *args, **kwargs: None)
    kwargs = load_base_model(base, load_in_4bit=True)
    assert kwargs["quantization_config"].load_in_4bit
    assert kwargs["quantization_config"].bnb_4bit_compute_dtype == torch.bfloat16


# ---------------------------------------------------------------- an adapter continued


def test_a_continued_adapter_starts_where_it_ended(base, adapter):
    model = load_for_training(adapter, use_peft=True, torch_dtype="float32", lora_dropout=0.3)
    saved = load_file(Path(adapter) / "adapter_model.safetensors")
    for name, tensor in saved.items():
        loaded = model.get_parameter(name.replace(".weight", ".default.weight"))
        assert torch.equal(loaded, tensor)
        assert loaded.requires_grad
    config = model.peft_config["default"]
    assert (config.r, config.lora_alpha, config.lora_dropout, config.inference_mode) == (4, 8, 0.3, False)
    assert list(model.peft_config) == ["default"]
    assert not torch.allclose(logits(model), logits(load_base_model(base)), atol=1e-3)


def test_a_continued_adapter_stays_relative_to_the_original_base(base, adapter, tmp_path):
    model = load_for_training(adapter, use_peft=True, torch_dtype="float32")
    model.save_pretrained(tmp_path)
    assert base_of(str(tmp_path)) == base
    assert torch.equal(logits(load_with_adapter(base, str(tmp_path))), logits(model))


@pytest.mark.parametrize(
    "flags",
    [
        {},
        {"target_modules": "all"},
        {"target_modules": "all-linear"},
        {"target_modules": "v_proj,q_proj,k_proj,o_proj,gate_proj,up_proj,down_proj"},
        {"lora_rank": 4, "lora_alpha": 8.0},
    ],
)
def test_flags_that_the_adapter_fits(adapter, flags):
    assert lora_modules(load_for_training(adapter, use_peft=True, **flags)) == dict.fromkeys(ALL_LINEAR, 2)


@pytest.mark.parametrize(
    ("flags", "start"),
    [
        ({"lora_rank": 8}, "--lora_rank 8: the adapter in {adapter} has 4, and training continues it; leave the flag"),
        ({"lora_alpha": 16.0}, "--lora_alpha 16: the adapter in {adapter} has 8"),
        (
            {"target_modules": "q_proj"},
            "--target_modules q_proj: the adapter in {adapter} has down_proj,gate_proj,k_proj,o_proj,q_proj,up_proj,",
        ),
        ({"use_dora": True}, "--use_dora True: the adapter in {adapter} has False"),
        ({"use_rslora": True}, "--use_rslora True: the adapter in {adapter} has False"),
        ({"modules_to_save": "embed_tokens"}, "--modules_to_save embed_tokens: the adapter in {adapter} has none"),
        ({"use_peft": False}, "{adapter} is a LoRA adapter and --use_peft False trains full weights: merge it first"),
        ({"task_type": TaskType.SEQ_CLS, "pad_token_id": 0, "lora_rank": 8}, "--lora_rank 8: the adapter in {adapter}"),
    ],
)
def test_an_adapter_of_another_shape_is_refused_before_weights_load(adapter, monkeypatch, flags, start):
    for module in (adapters, score_heads):
        monkeypatch.setattr(module, "load_base_model", lambda *args, **kwargs: pytest.fail("loaded it first"))
    assert refused(load_for_training, adapter, **{"use_peft": True} | flags).startswith(start.format(adapter=adapter))


def test_all_is_refused_where_the_adapter_leaves_layers_out(base, tmp_path):
    narrow = make_adapter(base, tmp_path, target_modules="q_proj,v_proj")
    assert lora_modules(load_for_training(narrow, use_peft=True)) == {"q_proj": 2, "v_proj": 2}
    line = refused(load_for_training, narrow, use_peft=True, target_modules="all")
    assert "leaves out down_proj, gate_proj, k_proj, o_proj, up_proj, and training continues it" in line


def test_a_reward_adapter_is_not_taken_for_a_language_model(base, tmp_path):
    reward = load_base_model(base, model_class=AutoModelForSequenceClassification, num_labels=1)
    config = LoraConfig(task_type=TaskType.SEQ_CLS, r=2, target_modules=["q_proj"])
    get_peft_model(reward, config).save_pretrained(tmp_path)
    line = refused(load_for_training, str(tmp_path), use_peft=True)
    assert line == f"{tmp_path} is a SEQ_CLS adapter; this stage continues a CAUSAL_LM adapter"


@pytest.mark.parametrize("options", [{"use_dora": True}, {"use_rslora": True}, {"modules_to_save": "embed_tokens"}])
def test_every_kind_of_adapter_continues_as_it_was(base, tmp_path, options):
    saved = make_adapter(base, tmp_path / "first", lora_rank=2, **options)
    model = load_for_training(saved, use_peft=True, torch_dtype="float32")
    for name, value in options.items():
        found = getattr(model.peft_config["default"], name)
        assert value in found if name == "modules_to_save" else found == value
    assert torch.equal(logits(model), logits(load_with_adapter(base, saved, torch_dtype="float32")))
    if "modules_to_save" in options:
        assert model.get_input_embeddings().weight.requires_grad
        assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_adapter_files_that_do_not_fit_their_model(copied, adapter):
    def first(weights):
        return next(iter(weights))

    damage = {
        "14 tensors are in": lambda weights: [weights.pop(name) for name in list(weights) if "layers.1" in name],
        "1 tensors are in": lambda weights: weights.update(
            {first(weights).replace("layers.0", "layers.7"): torch.ones(1)}
        ),
        "1 tensors hold nan or inf": lambda weights: weights[first(weights)].fill_(float("nan")),
        "other layers or sizes": lambda weights: weights.update({first(weights): torch.ones(4, 3)}),
    }
    for expected, edit in damage.items():
        folder = copied(adapter)
        edit_weights(folder, edit)
        line = refused(load_for_training, str(folder), use_peft=True)
        assert line.startswith(f"{FLAG} {folder}: "), line
        assert expected in line
        shutil.rmtree(folder)
    folder = copied(adapter)
    (folder / "adapter_model.safetensors").write_bytes(b"\0" * 443)
    assert f"{folder}: adapter_model.safetensors: nothing but NUL bytes" in refused(
        load_for_training, str(folder), use_peft=True
    )


# ---------------------------------------------------------------- reward models

REWARD = {"task_type": TaskType.SEQ_CLS, "pad_token_id": 3}
HEAD = "base_model.model.score.modules_to_save.default.weight"
IN_FILE = "base_model.model.score.weight"


def save_with_tokenizer(model, base: str, folder: Path) -> Path:
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def reward_adapter(base, adapter, tmp_path_factory) -> str:
    """A reward model grown from `adapter`, with a trained head and the tokenizer. Read only."""
    torch.manual_seed(0)
    model = load_for_training(adapter, use_peft=True, torch_dtype="float32", **REWARD)
    model.get_parameter(HEAD).data.normal_()
    return str(save_with_tokenizer(model, base, tmp_path_factory.mktemp("rewards") / "adapter"))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_dora": True},
        {"use_rslora": True, "target_modules": "q_proj,up_proj"},
        {"modules_to_save": "embed_tokens"},
        {"modules_to_save": "lm_head"},
        {"target_modules": "q_proj,lm_head"},
    ],
    ids=str,
)
def test_a_reward_model_starts_from_a_language_models_adapter(base, tmp_path, options):
    start = make_adapter(base, tmp_path / "start", lora_rank=4, **options)
    model = load_for_training(start, use_peft=True, torch_dtype="float32", **REWARD)
    model.save_pretrained(tmp_path / "reward")
    before, after = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("start", "reward"))
    carried = {name for name in before if "lm_head" not in name.split(".")}
    assert carried
    assert after.keys() == carried | {IN_FILE}
    assert all(torch.equal(after[name], before[name]) for name in carried)
    assert not model.get_parameter(HEAD).any()
    assert model.get_parameter(HEAD).requires_grad
    assert model.config.pad_token_id == 3
    assert logits(model).tolist() == [[0.0], [0.0]]
    config = read_adapter_config(tmp_path / "reward")
    assert (config.task_type, config.base_model_name_or_path) == ("SEQ_CLS", base)


def test_hidden_states_are_those_of_the_language_model(base, adapter):
    """What was learned before is what the head reads."""
    model = load_for_training(adapter, use_peft=True, torch_dtype="float32", **REWARD).eval()
    speaker = load_with_adapter(base, adapter, torch_dtype="float32").eval()
    ids = torch.arange(40).reshape(2, 20)
    with torch.no_grad():
        hidden, expected = (m(ids, output_hidden_states=True).hidden_states[-1] for m in (model, speaker))
    assert torch.equal(hidden, expected)


@pytest.mark.parametrize("flag", [None, "load_in_4bit", "load_in_8bit"])
def test_the_head_is_in_float32_on_every_base(base, flag):
    options = {flag: True} if flag else {"torch_dtype": "bfloat16"}
    model = load_for_training(base, use_peft=True, **options, **REWARD)
    assert model.get_parameter(HEAD).dtype == torch.float32
    assert lora_modules(model) == dict.fromkeys(ALL_LINEAR, 2)
    model.get_parameter(HEAD).data.normal_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores = logits(model)
    assert scores.dtype == torch.float32
    assert not torch.equal(scores, scores.bfloat16().float())


def test_a_saved_reward_model_is_loaded_as_it_was(base, reward_adapter, tmp_path):
    trained = load_for_training(reward_adapter, use_peft=True, torch_dtype="float32", **REWARD)
    assert trained.get_parameter(HEAD).any()
    assert trained.get_parameter(HEAD).requires_grad
    model = load_reward_model(base, reward_adapter, torch_dtype="float32")
    assert not model.training
    assert torch.equal(logits(model), logits(trained))
    assert logits(model).abs().min() > 0.01
    assert model.config.pad_token_id == AutoTokenizer.from_pretrained(base).pad_token_id

    whole = load_for_training(base, use_peft=False, **REWARD)
    assert not whole.score.weight.any()
    whole.score.weight.data.normal_()
    folder = str(save_with_tokenizer(whole, base, tmp_path))
    for again in (load_reward_model(folder, None), load_for_training(folder, use_peft=False, **REWARD)):
        assert torch.equal(logits(again), logits(whole))


def test_a_head_that_is_missing_or_was_never_trained_is_refused(base, adapter, reward_adapter, copied, monkeypatch):
    for module in (adapters, score_heads):
        monkeypatch.setattr(module, "load_base_model", lambda *args, **kwargs: pytest.fail("loaded it first"))
    line = refused(load_reward_model, base, adapter)
    assert line.startswith(f"--reward_model_path {adapter}: no reward model: a CAUSAL_LM adapter has no score head")
    assert refused(load_reward_model, base, None).startswith(f"--reward_model_path {base}: no reward model: it has no")
    folder = copied(reward_adapter)
    edit_weights(folder, lambda weights: weights[IN_FILE].zero_())
    assert "its score head is all zeros, so it was never trained" in refused(load_reward_model, base, str(folder))
    edit_weights(folder, lambda weights: weights.pop(IN_FILE))
    assert "holds no score head; take another checkpoint" in refused(load_reward_model, base, str(folder))


def test_a_whole_model_whose_head_was_never_trained_is_refused(base, tmp_path):
    untrained = load_for_training(base, use_peft=False, **REWARD)
    folder = str(save_with_tokenizer(untrained, base, tmp_path))
    assert "its score head is all zeros, so it was never trained" in refused(load_reward_model, folder, None)


def test_what_cannot_be_a_reward_model(base, tmp_path):
    classifier = AutoModelForSequenceClassification.from_pretrained(base, num_labels=3)
    classifier.save_pretrained(tmp_path / "three")
    line = refused(load_for_training, str(tmp_path / "three"), use_peft=True, **REWARD)
    assert line.endswith("a classifier with 3 classes; a reward model gives one score")
    mamba = save_tiny_model("mamba2", tmp_path / "mamba2", Path(base))
    line = refused(load_for_training, str(mamba), use_peft=True, **REWARD)
    assert line.endswith("a kind of model that these versions of the libraries give no such head")


@pytest.mark.parametrize("flash_attn", [False, True])
def test_attention_is_what_the_model_can_have(base, tmp_path, flash_attn, monkeypatch, log):
    """Asked for FlashAttention, as where its package is there: Gemma 3's wrapper cannot have it, nor gpt-oss SDPA."""
    if flash_attn:
        monkeypatch.setattr(loading, "attention_implementation", lambda flash_attn: "flash_attention_2")
    gpt_oss = str(save_tiny_model("gpt_oss", tmp_path / "gpt_oss", Path(base)))
    gemma = str(save_multimodal_model(tmp_path / "gemma3", Path(base)))
    assert load_base_model(gpt_oss, flash_attn=flash_attn).config._attn_implementation == "eager"
    assert load_base_model(gemma, flash_attn=flash_attn).config._attn_implementation == "sdpa"
    eager = "eager attention is used, whose memory grows with the square of the length"
    assert [line.endswith(eager) for line in log if "GptOssForCausalLM has no SDPA" in line] == [True]
    refused_flash = [line for line in log if line.startswith("--flash_attn:")]
    assert len(refused_flash) == 2 * flash_attn
    assert all(line.endswith("; it goes without") for line in refused_flash)


# ---------------------------------------------------------------- base and adapter together


def test_an_adapter_on_its_base_and_on_a_copy(base, adapter, copied, log):
    expected = logits(load_for_training(adapter, use_peft=True))
    model = load_with_adapter(base, adapter)
    assert torch.equal(logits(model), expected)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert log == []

    copy = str(copied(base))
    Lineage(base, None, "sft", "", "data", 128, model.config.vocab_size).save(adapter)
    try:
        assert torch.equal(logits(load_with_adapter(copy, adapter)), expected)
    finally:
        Path(adapter, "lineage.json").unlink()
    assert log == [f"{adapter} was trained on {base}; {copy} has the same sizes and is used as its base"]


def test_a_base_of_the_same_sizes_is_told_by_its_weights(base, adapter, copied, tmp_path):
    """As a chat model is from the base model that it was made of: one tensor differs."""
    folder, other = copied(adapter), copied(base)
    weights = load_file(other / "model.safetensors")
    name = next(name for name in weights if name.endswith("q_proj.weight"))
    save_file(weights | {name: weights[name] * 1.01}, other / "model.safetensors", metadata={"format": "pt"})
    sizes = {"hidden_size": 128, "vocab_size": load_config(base).vocab_size}
    Lineage(base, None, "sft", "", "data", **sizes, base_weights=weights_fingerprint(base)).save(folder)
    assert refused(check_same_family, str(other), str(folder)) == (
        f"--base_model {other} is not the base of {folder}, which was trained on {base}: the sizes are the same, the "
        f"weights are others (a copy in float16 may differ too: empty base_weights in {folder}/lineage.json to use it)"
    )
    for dtype in ("float32", "bfloat16"):  # sharded, and without a tied head
        copy = tmp_path / dtype
        load_base_model(base, torch_dtype=dtype).save_pretrained(copy, max_shard_size="200KB")
        assert len(list(copy.glob("*.safetensors"))) > 1
        check_same_family(str(copy), str(folder))


def test_a_base_that_was_trained_again_is_not_the_one_of_its_adapter(base, adapter, copied):
    folder, own = copied(adapter), copied(base)
    record = Lineage(str(own), None, "dpo", "", "data", 128, load_config(base).vocab_size)
    replace(record, base_weights=weights_fingerprint(str(own))).save(folder)
    check_same_family(str(own), str(folder))
    weights = load_file(own / "model.safetensors")
    save_file({name: tensor * 1.01 for name, tensor in weights.items()}, own / "model.safetensors", {"format": "pt"})
    assert refused(check_same_family, str(own), str(folder)) == (
        f"--base_model {own}: its weights are not those that {folder} was trained on any more; give a copy of those, "
        "or train the adapter again"
    )


def test_pickle_and_quantized_weights_have_no_fingerprint(base, copied):
    folder = copied(base)
    pickle = (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert weights_fingerprint(str(folder)) == ""
    pickle.rename(folder / "model.safetensors")
    assert weights_fingerprint(str(folder)) == weights_fingerprint(base) != ""
    edit_json(folder / "config.json", quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    assert weights_fingerprint(str(folder)) == ""


def test_another_path_to_the_same_folder(base, adapter, tmp_path, log):
    (tmp_path / "link").symlink_to(base)
    check_same_family(str(tmp_path / "link"), adapter)
    check_same_family(f"{base}/", adapter)
    assert log == []


def lineage_of(base_model: str, hidden_size: int = 128, vocab_size: int = 0) -> Lineage:
    return Lineage(base_model, None, "sft", "", "data", hidden_size, vocab_size)


@pytest.mark.parametrize(
    "recorded", ["Qwen/Qwen2.5-3B-Instruct", "outputs-pt/checkpoint-best", "outputs-sft/copy-tiny-qwen2"]
)
def test_another_base_is_refused_by_its_sizes(base, adapter, copied, recorded):
    """Also under the recorded base's last name, which every checkpoint-best has."""
    other, folder = copied(base), copied(adapter)
    vocab_size = load_config(base).vocab_size
    lineage_of(recorded, 2048, 151936).save(folder)
    line = refused(check_same_family, str(other), str(folder))
    assert line == (
        f"--base_model {other} (hidden size 128, vocabulary {vocab_size}) is not the base of {folder}, which was "
        f"trained on {recorded} (2048, 151936)"
    )


def test_without_lineage_only_the_name_tells(base, adapter, copied, log):
    folder = copied(adapter)
    edit_json(folder / "adapter_config.json", base_model_name_or_path="Qwen/Qwen2.5-3B-Instruct")
    line = refused(check_same_family, base, str(folder))
    assert line == (
        f"--lora_model {folder} was trained on Qwen/Qwen2.5-3B-Instruct, not on {base}, and has no lineage.json to "
        "compare by: pass --base_model Qwen/Qwen2.5-3B-Instruct"
    )
    edit_json(folder / "adapter_config.json", base_model_name_or_path="Qwen/tiny-qwen2")
    check_same_family(base, str(folder))
    assert log == [f"{folder} was trained on Qwen/tiny-qwen2; {base} is assumed to be a copy of it"]


def test_an_adapter_on_a_base_of_other_sizes(base, adapter, tmp_path):
    from build_tiny_model import build_model

    tokenizer = load_tokenizer(base)
    other = tmp_path / "tiny-qwen2"
    build_model(tokenizer, hidden_size=64, intermediate_size=128, num_hidden_layers=2).save_pretrained(other)
    line = refused(load_with_adapter, str(other), adapter)
    assert line == f"--lora_model {adapter}: the adapter does not fit {other}: other layers or sizes"


def test_an_adapter_on_a_shallower_base(base, adapter, tmp_path):
    """PEFT drops the tensors of the layers that are not there without a word."""
    from build_tiny_model import build_model
    from conftest import TINY_HEADS, TINY_SHAPE

    other = tmp_path / "tiny-qwen2"
    build_model(load_tokenizer(base), **TINY_SHAPE | {"num_hidden_layers": 1}, **TINY_HEADS).save_pretrained(other)
    line = refused(load_with_adapter, str(other), adapter)
    assert "14 tensors are in adapter_model.safetensors and not in" in line


@pytest.mark.parametrize(("torch_dtype", "warned"), [("bfloat16", True), ("float32", False)])
def test_full_weights_in_half_precision_are_warned_of(tiny_model_dir, capfd, torch_dtype, warned):
    logger.remove()
    logger.add(sys.stderr, format="{message}")
    load_for_training(str(tiny_model_dir), use_peft=False, torch_dtype=torch_dtype)
    assert ("trained in bfloat16, which rounds small updates away" in capfd.readouterr().err) == warned
