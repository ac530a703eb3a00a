"""The built-in shapes have the published numbers of weights; headers and kinds of layers."""

import json
import shutil
from types import SimpleNamespace

import pytest
from tiny_families import FAMILIES, SHAPE, save_multimodal_model
from transformers import CONFIG_MAPPING, AutoModelForImageTextToText, Qwen2Config

from medtune.errors import UserError
from medtune.estimate.shapes import find_shape, shallow, shape_of
from medtune.models import weight_headers
from medtune.models.weight_headers import Headers, read_headers

PUBLISHED = {
    "Qwen/Qwen2.5-0.5B-Instruct": 494_032_768,
    "Qwen/Qwen2.5-1.5B": 1_543_714_304,
    "Qwen/Qwen2.5-3B-Instruct": 3_085_938_688,
    "Qwen/Qwen2.5-7B-Instruct": 7_615_616_512,
    "Qwen/Qwen2.5-14B-Instruct": 14_770_033_664,
    "Qwen/Qwen3-0.6B": 596_049_920,
    "Qwen/Qwen3-1.7B": 1_720_574_976,
    "Qwen/Qwen3-4B-Instruct-2507": 4_022_468_096,
    "Qwen/Qwen3-8B": 8_190_735_360,
    "Qwen/Qwen3-14B": 14_768_307_200,
    "Qwen/Qwen3-32B": 32_762_123_264,
    "Qwen/Qwen3-30B-A3B-Instruct-2507": 30_532_122_624,
    "meta-llama/Llama-3.2-1B-Instruct": 1_235_814_400,
    "meta-llama/Llama-3.2-3B-Instruct": 3_212_749_824,
    "meta-llama/Llama-3.1-8B-Instruct": 8_030_261_248,
    "google/gemma-2-2b-it": 2_614_341_888,
    "google/gemma-2-9b-it": 9_241_705_984,
    "google/gemma-3-1b-it": 999_885_952,
    "google/gemma-3-4b-it": 4_300_079_472 - 419_816_304,  # of all, and of vision tower and projector
}


# Of which no exact number is known, as their names have it: billions.
ABOUT = {
    "Qwen/Qwen3.5-0.8B": 0.75,
    "Qwen/Qwen3.5-4B": 4.2,
    "Qwen/Qwen3.5-9B": 8.95,
    "Qwen/Qwen3.5-35B-A3B": 34.7,
    "google/gemma-4-E2B-it": 4.6,
    "google/gemma-4-E4B-it": 7.5,
}
SIZES = {name: count / 1e9 for name, count in PUBLISHED.items()} | ABOUT


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (billions > 5)) for name, billions in SIZES.items()]
)
def test_a_known_shape_has_its_number_of_weights(name):
    shape = find_shape(name, "--model_name_or_path")
    assert "table" in shape.source
    if name in PUBLISHED:
        assert shape.n_weights == PUBLISHED[name]
    else:
        assert shape.n_weights / 1e9 == pytest.approx(ABOUT[name], rel=0.02)
    assert shape.download == 2 * shape.n_weights


def test_a_folder_is_read_and_an_unknown_name_is_refused(tiny_model_dir):
    shape = find_shape(str(tiny_model_dir), "--model_name_or_path")
    assert (shape.config.hidden_size, shape.source, shape.download) == (128, "its config.json", 0)
    with pytest.raises(
        UserError, match=r"--model_name_or_path nobody/Unknown-9B: .*built-in shapes are qwen2\.5-0\.5b"
    ):
        find_shape("nobody/Unknown-9B", "--model_name_or_path")


def test_headers_say_the_type_that_config_json_leaves_out(tiny_model_dir, tmp_path):
    folder = shutil.copytree(tiny_model_dir, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config.pop("dtype")
    (folder / "config.json").write_text(json.dumps(config))
    shape, headers = find_shape(str(folder), ""), read_headers(str(folder))
    assert str(shape.config.dtype).removeprefix("torch.") == headers.dtype == "float32"
    assert headers.n_bytes == 4 * shape.n_weights


def test_headers_of_the_hub_and_none_without_an_answer(monkeypatch):
    counts = SimpleNamespace(parameter_count={"BF16": 100, "F8_E4M3": 1000, "BOOL": 3})
    monkeypatch.setattr(weight_headers, "get_safetensors_metadata", lambda path: counts)
    assert read_headers("org/name") == Headers(200 + 1000 + 3, "bfloat16")
    monkeypatch.undo()
    assert read_headers("org/name") is None  # there is no network here


def test_other_parts_of_a_checkpoint_are_counted(tiny_model_dir, tmp_path):
    folder = save_multimodal_model(tmp_path / "model", tiny_model_dir)
    shape = find_shape(str(folder), "")
    model = AutoModelForImageTextToText.from_pretrained(folder)
    assert shape.n_weights == sum(weights.numel() for weights in model.parameters())
    text = [model.get_decoder(), model.lm_head]
    seen = {weights.data_ptr(): weights.numel() for part in text for weights in part.parameters()}
    assert shape.n_weights - shape.n_others == sum(seen.values())


def test_a_folder_is_never_taken_from_the_table(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "qwen2.5-3b"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_ty')
    for path in (str(folder), "qwen2.5-3b", "models/none/qwen2.5-3b", "./qwen2.5-3b-it"):
        with pytest.raises(UserError) as mistake:
            find_shape(path, "--model_name_or_path")
        assert "built-in shapes" not in str(mistake.value)


@pytest.mark.parametrize("family", ["falcon_h1", "jamba", "mamba2", "lfm2", "nemotron_h"])
def test_fewer_layers_of_families_whose_kinds_of_layers_are_derived(family):
    config = CONFIG_MAPPING[family](**SHAPE | FAMILIES[family])
    assert shallow(config, 2).num_hidden_layers == 2
    assert len(shallow(config, 2).layer_types) == 2


def test_the_kinds_of_layers_repeat():
    shape = shape_of(Qwen2Config(vocab_size=64, hidden_size=64, num_hidden_layers=3))
    assert (shape.n_first, shape.period) == (0, 1)
    shape = find_shape("google/gemma-3-1b-it", "--model_name_or_path")
    assert (shape.n_first, shape.period) == (0, 6)
    family = SHAPE | FAMILIES["deepseek_v3"] | {"num_hidden_layers": 7, "first_k_dense_replace": 3}
    shape = shape_of(CONFIG_MAPPING["deepseek_v3"](**family))
    assert (shape.n_first, shape.period) == (3, 1)
