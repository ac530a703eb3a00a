"""The built-in shapes have the published numbers of weights."""

import pytest
from tiny_families import FAMILIES, SHAPE
from transformers import CONFIG_MAPPING, Qwen2Config

from medtune.errors import UserError
from medtune.estimate.shapes import count_weights, model_config, pattern_length, shallow

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
    "meta-llama/Llama-3.2-1B-Instruct": 1_235_814_400,
    "meta-llama/Llama-3.2-3B-Instruct": 3_212_749_824,
    "meta-llama/Llama-3.1-8B-Instruct": 8_030_261_248,
    "google/gemma-2-2b-it": 2_614_341_888,
    "google/gemma-2-9b-it": 9_241_705_984,
    "google/gemma-3-1b-it": 999_885_952,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_known_shape_has_its_number_of_weights(name):
    config, source = model_config(name, "--model_name_or_path")
    assert "table" in source
    assert count_weights(config) == PUBLISHED[name]


def test_a_folder_is_read_and_an_unknown_name_is_refused(tiny_model_dir):
    config, source = model_config(str(tiny_model_dir), "--model_name_or_path")
    assert (config.hidden_size, source) == (128, "its config.json")
    with pytest.raises(
        UserError, match=r"--model_name_or_path nobody/Unknown-9B: .*built-in shapes are qwen2\.5-0\.5b"
    ):
        model_config("nobody/Unknown-9B", "--model_name_or_path")


def test_a_folder_is_never_taken_from_the_table(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "qwen2.5-3b"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_ty')
    for path in (str(folder), "qwen2.5-3b", "models/none/qwen2.5-3b", "./qwen2.5-3b-it"):
        with pytest.raises(UserError) as mistake:
            model_config(path, "--model_name_or_path")
        assert "built-in shapes" not in str(mistake.value)


@pytest.mark.parametrize("family", ["falcon_h1", "jamba", "mamba2", "lfm2", "nemotron_h"])
def test_fewer_layers_of_families_whose_kinds_of_layers_are_derived(family):
    config = CONFIG_MAPPING[family](**SHAPE | FAMILIES[family])
    assert shallow(config, 2).num_hidden_layers == 2
    assert len(shallow(config, 2).layer_types) == 2


def test_the_kinds_of_layers_repeat():
    assert pattern_length(Qwen2Config()) == 1
    config, _ = model_config("google/gemma-3-1b-it", "--model_name_or_path")
    assert pattern_length(config) == 6
