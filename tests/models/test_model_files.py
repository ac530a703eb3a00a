"""Model files that are not what their names say are refused by name, before anything loads."""

import json
import shutil
from pathlib import Path

import check_data
import pytest
from reading_cases import POINTER, POINTER_FAULT, fault_of, write
from stage_runs import load_for_training

import inference
import merge_peft_adapter
from medtune.models.lineage import check_model_path, read_adapter_config
from medtune.models.loading import load_base_model, load_config, load_tokenizer


@pytest.fixture(scope="module")
def model(tiny_model_dir, tmp_path_factory) -> Path:
    """A model's folder with every small file that loaders read."""
    folder = shutil.copytree(tiny_model_dir, tmp_path_factory.mktemp("models") / "base")
    tokenizer = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    (folder / "vocab.json").write_text(json.dumps(tokenizer["vocab"]), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    for name in ("special_tokens_map.json", "added_tokens.json", "preprocessor_config.json"):
        (folder / name).write_text("{}", encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def adapter(model, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("adapters") / "lora"
    load_for_training(str(model), use_peft=True, torch_dtype="float32").save_pretrained(folder)
    load_tokenizer(str(model)).save_pretrained(folder)
    return folder


@pytest.fixture
def spoiled(tmp_path):
    """A function that copies a folder and writes over one of its files."""

    def copy(folder: Path, name: str, content: bytes | str) -> str:
        path = shutil.copytree(folder, tmp_path / f"copy-{folder.name}")
        (path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(path)

    return copy


FLAG = "--model_name_or_path"
SMALL_FILES = [
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "preprocessor_config.json", "model.safetensors.index.json",
    "chat_template.jinja", "merges.txt",
]  # fmt: skip


def check_path(path: str) -> None:
    check_model_path(path, FLAG)


@pytest.mark.parametrize("name", [*SMALL_FILES, "model.safetensors"])
def test_a_pointer_in_place_of_a_model_file_is_one_line_by_its_name(model, spoiled, name):
    folder = spoiled(model, name, POINTER)
    loads = [check_path, load_base_model] + [load_tokenizer, load_config] * (name != "model.safetensors")
    for load in loads:
        assert fault_of(load, folder) == f"{FLAG} {folder}: {name}: {POINTER_FAULT}"


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors", "tokenizer.json"])
def test_a_pointer_in_place_of_an_adapters_file_is_one_line_by_its_name(adapter, spoiled, name):
    folder = spoiled(adapter, name, POINTER)
    assert fault_of(check_path, folder) == f"{FLAG} {folder}: {name}: {POINTER_FAULT}"
    assert fault_of(read_adapter_config, folder) == f"{folder}: {name}: {POINTER_FAULT}"
    assert fault_of(load_for_training, folder, use_peft=True).endswith(f"{folder}: {name}: {POINTER_FAULT}")


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        ("[1]", "adapter_config.json: holds a JSON list, not an object"),
        ("{}", "adapter_config.json: not an adapter's configuration (it has no 'peft_type')"),
        ('{"r": 8}', "adapter_config.json: not an adapter's configuration ("),
        ('{"peft_type": "LORA", "r": "x"}', "adapter_config.json: 'r' is 'x'"),
        ('{"peft_type": "LORA", "lora_alpha": null}', "adapter_config.json: 'lora_alpha' is None"),
        ('{"peft_type": "LORA", "target_modules": 5}', "adapter_config.json: 'target_modules' is 5"),
        ('{"peft_type": "LORA", "base_model_name_or_path": 5}', "adapter_config.json: 'base_model_name_or_path' is 5"),
    ],
)
def test_an_adapters_configuration_that_is_none_is_one_line_by_its_name(adapter, spoiled, content, fault):
    folder = spoiled(adapter, "adapter_config.json", content)
    for load in (check_path, read_adapter_config):
        assert fault in fault_of(load, folder)


def test_a_pointer_among_several_files_of_weights_is_named(model, spoiled):
    folder = spoiled(model, "model-00002-of-00002.safetensors", POINTER)
    Path(folder, "model.safetensors").rename(Path(folder, "model-00001-of-00002.safetensors"))
    names = {name: f"model-0000{number}-of-00002.safetensors" for number, name in ((1, "a"), (2, "b"))}
    Path(folder, "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    assert fault_of(check_path, folder) == f"{FLAG} {folder}: {names['b']}: {POINTER_FAULT}"


def test_pickle_weights_may_be_a_pointer_too(model, spoiled):
    folder = spoiled(model, "pytorch_model.bin", POINTER)
    check_path(folder)  # the safetensors are read, not these
    Path(folder, "model.safetensors").unlink()
    line = fault_of(check_model_path, folder, FLAG, allow_pickle_weights=True)
    assert line == f"{FLAG} {folder}: pytorch_model.bin: {POINTER_FAULT}"


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "consolidated.safetensors", "model.gguf", "README.md", "figure.png", "results.json"]
)
def test_pointers_that_no_loader_reads_are_left(model, spoiled, name):
    folder = spoiled(model, name, POINTER)
    check_path(folder)
    load_tokenizer(folder)


def test_a_tokenizer_needs_no_weights(model, spoiled):
    load_tokenizer(spoiled(model, "model.safetensors", POINTER))


MODEL_FAULTS = [
    ("config.json", "", "empty; copy or download it again"),
    ("config.json", "[1]", "holds a JSON list, not an object"),
    (
        "config.json",
        '{"model_type": "qwen2",',
        "broken JSON: Expecting property name enclosed in double quotes (line 1",
    ),
    ("generation_config.json", '{\n "top_p": 0.8,\n}', "broken JSON: "),
    ("generation_config.json", '{"top_p": 0.8}{"top_p": 0.8}', "broken JSON: Extra data (line 1, column 15)"),
    ("tokenizer.json", "{}", "without 'added_tokens' and 'model'"),
    ("tokenizer.json", '{"added_tokens": [], "model": {"type": "BPE"}}', "tokenizer.json"),
    ("tokenizer.json", "Entry not found", "a server's answer (Entry not found)"),
    ("tokenizer.json", "<!doctype html><html></html>", "a web page"),
    ("tokenizer_config.json", '"x"', "holds a JSON str, not an object"),
    ("tokenizer_config.json", '{"added_tokens_decoder": [1]}', "tokenizer_config.json"),
    ("tokenizer_config.json", b'{"a": "\xff"}', "no JSON ('utf-8' codec can't decode"),
    ("model.safetensors.index.json", '{"metadata": {}}', "without 'weight_map'"),
    ("model.safetensors.index.json", '{"weight_map": ["a"]}', "without 'weight_map'"),
    ("chat_template.jinja", "", "empty"),
    ("chat_template.jinja", b"\0" * 99, "nothing but NUL bytes"),
    ("chat_template.jinja", "{{ '中文' }}".encode("gbk"), "no text in UTF-8"),
    ("merges.txt", "a b".encode("utf-16"), "no text in UTF-8"),
]


@pytest.mark.parametrize(("name", "content", "fault"), MODEL_FAULTS, ids=lambda value: str(value)[:24])
def test_a_model_file_that_does_not_parse_is_one_line_by_its_name(model, spoiled, name, content, fault):
    folder = spoiled(model, name, content)
    line = fault_of(load_tokenizer, folder)
    assert line.startswith(f"{FLAG} {folder}: ") and name in line and fault in line


def test_a_broken_tokenizer_of_its_own_is_said_with_its_flag(model, spoiled):
    folder = spoiled(model, "tokenizer.json", "{}")
    assert fault_of(load_tokenizer, str(model), folder).startswith(f"--tokenizer_name_or_path {folder}: tokenizer.json")


@pytest.mark.parametrize("share", [0.3, 0.6, 0.95])
def test_a_tokenizer_that_is_cut_off_is_named_by_line_and_column(model, spoiled, share):
    whole = (model / "tokenizer.json").read_bytes()
    line = fault_of(load_tokenizer, spoiled(model, "tokenizer.json", whole[: int(len(whole) * share)]))
    assert "tokenizer.json: broken JSON: " in line or "tokenizer.json: no JSON (" in line


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"hidden_size": "big"}, "config.json: Validation error for field 'hidden_size'"),
        ({"layer_types": "x"}, "config.json: Validation error for field 'layer_types'"),
        ({"dtype": "bogus"}, "config.json: AttributeError: module 'torch' has no attribute 'bogus'"),
    ],
)
def test_a_value_of_another_type_in_the_configuration_names_it(model, spoiled, change, fault):
    values = json.loads((model / "config.json").read_text(encoding="utf-8")) | change
    folder = spoiled(model, "config.json", json.dumps(values))
    assert fault_of(load_config, folder).startswith(f"{FLAG} {folder}: {fault}")


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"intermediate_size": 96}, "config.json and the weights are of two models: their sizes differ"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "Loading a GPTQ quantized model requires"),
    ],
)
def test_a_configuration_that_the_weights_or_the_packages_do_not_fit(model, spoiled, change, fault):
    values = json.loads((model / "config.json").read_text(encoding="utf-8")) | change
    folder = spoiled(model, "config.json", json.dumps(values))
    assert fault_of(load_base_model, folder).startswith(f"{FLAG} {folder}: {fault}")


@pytest.mark.parametrize("size", [0, 4, 100, 50_000])
def test_weights_that_are_cut_off_are_named_before_anything_loads(model, spoiled, size):
    folder = spoiled(model, "model.safetensors", (model / "model.safetensors").read_bytes()[:size])
    assert fault_of(check_path, folder).startswith(f"{FLAG} {folder}: model.safetensors: damaged weights (")


def test_a_model_file_that_is_a_link_to_nothing_is_named(model, spoiled):
    folder = spoiled(model, "tokenizer.json", "")
    Path(folder, "tokenizer.json").unlink()
    Path(folder, "tokenizer.json").symlink_to("../blobs/none")
    assert fault_of(load_tokenizer, folder).endswith(
        "tokenizer.json: a link to a file that is not there; copy or download it again"
    )


def test_a_file_that_was_fixed_is_read_again(model, spoiled):
    folder = spoiled(model, "config.json", "{")
    fault_of(check_path, folder)
    shutil.copy(model / "config.json", folder)
    check_path(folder)


@pytest.mark.parametrize("name", ["tokenizer.json", "config.json", "generation_config.json"])
def test_tools_say_it_in_the_same_line(model, adapter, spoiled, name, tmp_path, monkeypatch):
    folder = spoiled(model, name, POINTER)
    monkeypatch.chdir(tmp_path)
    write("d.jsonl", '{"question": "头痛", "answer": "休息"}')
    for main, flags in [
        (inference.main, ["--base_model", folder, "--data_file", "d.jsonl", "--output_file", "r.jsonl"]),
        (merge_peft_adapter.main, ["--base_model", folder, "--lora_model", str(adapter), "--output_dir", "o"]),
        (check_data.main, ["--dir", "d.jsonl", "--model_name_or_path", folder]),
    ]:
        assert fault_of(main, flags).endswith(f" {folder}: {name}: {POINTER_FAULT}")
