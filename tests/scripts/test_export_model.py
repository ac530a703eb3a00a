"""`scripts/export_model.py`: what is exported says what the model says, also to llama.cpp, or it is not written."""

import json
import shutil
from pathlib import Path

import export_model
import gguf
import pytest
import torch
from export_model import main
from tiny_families import SHAPE
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, set_seed

from medtune.errors import UserError
from medtune.export import gguf_file
from medtune.export.comparison import perplexity
from medtune.export.gguf_file import vocabulary, why_not_written
from medtune.models.generation import Decoding, generate_replies
from medtune.models.loading import load_base_model, load_tokenizer
from medtune.reading.tokenization import IGNORED_LABEL, encode_prompt, load_chat_template, stop_token_ids

QUESTIONS = ["感冒了怎么办？", "头痛", "See a doctor?", "  two  blanks\n\n龘 123"]


@pytest.fixture(scope="module")
def eval_file(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("eval") / "questions.jsonl"
    records = [{"question": question, "answer": "多喝水，see a doctor."} for question in QUESTIONS]
    file.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def model_dir(tiny_model_dir, tmp_path_factory) -> Path:
    """The tiny model with weights far from zero and biases that are not, so that a lost tensor shows."""
    folder = tmp_path_factory.mktemp("whole") / "merged"
    set_seed(2)
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(folder)
    load_tokenizer(str(tiny_model_dir)).save_pretrained(folder)
    return folder


def flags(model_dir: Path, output_dir: Path, eval_file: Path, *more: str) -> list[str]:
    return ["--model", str(model_dir), "--output_dir", str(output_dir), "--eval_file", str(eval_file), *more]


# ---------------------------------------------------------------- GGUF


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
LINEAR = {"rope_type": "linear", "factor": 4.0}


def with_config(model_dir: Path, folder: Path, **changes) -> Path:
    """A copy of the model with other fields in its config.json; weights are as they were."""
    shutil.copytree(model_dir, folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    for name, value in changes.items():
        config[name] = config[name] | value if name == "rope_parameters" and value is not None else value
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


@pytest.mark.parametrize(("gguf_type", "largest"), [("f16", 0.005), ("q8_0", 0.05), ("q4_0", 0.3)])
def test_a_gguf_file_loads_back_and_says_the_same(
    model_dir, eval_file, tiny_tokenizer, tmp_path, capsys, gguf_type, largest
):
    result = main(flags(model_dir, tmp_path / "out", eval_file, "--gguf_type", gguf_type))
    assert abs(result["after"] / result["before"] - 1) < largest
    assert (result["after"] == result["before"]) is False
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [".made_by_a_tool", "Modelfile", "model.gguf"]
    assert f"{result['before']:.4f} before, {result['after']:.4f} after" in capsys.readouterr().err
    if gguf_type == "q8_0":
        check_contents(tmp_path / "out/model.gguf", tiny_tokenizer)


def check_contents(file: Path, tokenizer) -> None:
    reader = gguf.GGUFReader(file)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert fields["general.architecture"] == "qwen2"
    assert fields["tokenizer.ggml.pre"] == "qwen2"
    assert fields["tokenizer.ggml.eos_token_id"] == tokenizer.eos_token_id
    assert fields["tokenizer.ggml.add_bos_token"] is False
    assert fields["tokenizer.chat_template"] == tokenizer.chat_template
    kinds = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert kinds["blk.0.attn_q.weight"] == kinds["token_embd.weight"] == "Q8_0"
    assert kinds["blk.0.attn_q.bias"] == kinds["output_norm.weight"] == "F32"
    assert len(kinds) == 2 + 2 * 12  # the head is the embedding


def test_qwen3_is_written_with_heads_of_its_own_size(tiny_model_dir, eval_file, tmp_path):
    """Its heads are no hidden_size / num_attention_heads wide, and have norms."""
    config = CONFIG_MAPPING["qwen3"](**SHAPE | {"head_dim": 32, "initializer_range": 0.2})
    set_seed(2)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    load_tokenizer(str(tiny_model_dir)).save_pretrained(tmp_path / "model")
    result = main(flags(tmp_path / "model", tmp_path / "out", eval_file, "--gguf_type", "f32"))
    assert result["after"] == pytest.approx(result["before"], rel=1e-4)
    fields = {name: field.contents() for name, field in gguf.GGUFReader(tmp_path / "out/model.gguf").fields.items()}
    assert fields["general.architecture"] == "qwen3"
    assert fields["qwen3.attention.key_length"] == 32


@pytest.mark.parametrize("rope", [{}, YARN, LINEAR])
def test_llama_cpp_says_what_the_model_says(model_dir, eval_file, tmp_path, rope):
    """Through llama.cpp's own chat template, tokenizer and arithmetic."""
    xllamacpp = pytest.importorskip("xllamacpp", reason="no llama.cpp: pip install xllamacpp")
    model_dir = with_config(model_dir, tmp_path / "model", rope_parameters=rope)
    main(flags(model_dir, tmp_path / "out", eval_file, "--gguf_type", "f32"))
    params = xllamacpp.CommonParams()
    params.model.path = str(tmp_path / "out/model.gguf")
    params.n_ctx, params.n_parallel, params.warmup = 512, 1, False
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    server = xllamacpp.Server(params)
    tokenizer = load_tokenizer(str(model_dir))
    chat_template = load_chat_template(tokenizer, None)
    prompts = [encode_prompt(tokenizer, chat_template, [{"role": "user", "content": text}]) for text in QUESTIONS]
    model = load_base_model(str(model_dir), torch_dtype="float32")
    decoding = Decoding(max_new_tokens=8)
    expected = generate_replies(model, tokenizer, prompts, stop_token_ids(tokenizer, chat_template), decoding)
    for question, prompt, reply in zip(QUESTIONS, prompts, expected, strict=True):
        request = {"messages": [{"role": "user", "content": question}], "max_tokens": 8, "temperature": 0}
        said = server.handle_chat_completions(request)
        assert said["usage"]["prompt_tokens"] == len(prompt)
        # The two differ in how they write a character that is cut in the middle.
        content = said["choices"][0]["message"]["content"].strip()
        assert content.rstrip("\ufffd") == reply.text.rstrip("\ufffd")
        assert len(content) > 2


@pytest.mark.parametrize(("rope", "gguf_type"), [(YARN, "f16"), (LINEAR, "q8_0")])
def test_rope_scaling_is_written(model_dir, eval_file, tmp_path, monkeypatch, rope, gguf_type):
    scaled = with_config(model_dir, tmp_path / "model", rope_parameters=rope)
    result = main(flags(scaled, tmp_path / "out", eval_file, "--gguf_type", gguf_type))
    fields = {name: field.contents() for name, field in gguf.GGUFReader(tmp_path / "out/model.gguf").fields.items()}
    written = {"rope_type": "type", "factor": "factor", "original_max_position_embeddings": "original_context_length"}
    assert {fields[f"qwen2.rope.scaling.{written[name]}"] for name in rope} == set(rope.values())
    monkeypatch.setattr(gguf_file, "ROPE_SCALING_KEYS", {})  # as if the file did not say it
    unscaled = gguf_file.load_gguf(tmp_path / "out/model.gguf")
    tokenizer = load_tokenizer(str(model_dir))
    export_args = export_model.ExportArguments("m", "o", eval_file=str(eval_file))
    rows = export_model.read_dialogues_to_compare(export_args, tokenizer, load_chat_template(tokenizer, None), 512)
    assert abs(perplexity(unscaled, rows) / result["after"] - 1) > 0.02


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "rope_type dynamic"),
        ({"rope_parameters": YARN | {"attention_factor": 1.5}}, r"attention_factor 1\.5"),
        ({"rope_parameters": YARN | {"beta_fast": 16}}, "beta_fast 16"),
        ({"rope_parameters": YARN | {"truncate": False}}, "truncate False"),
        ({"rope_parameters": YARN | {"mscale": 0.7, "mscale_all_dim": 1.0}}, r"mscale 0\.7, mscale_all_dim 1\.0"),
        ({"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1, "layer_types": None},
         "sliding_window 4"),
        ({"hidden_act": "gelu"}, "hidden_act gelu"),
        ({"head_dim": 32}, "head_dim 32"),
    ],
)  # fmt: skip
def test_a_field_that_the_file_would_leave_out_is_named(model_dir, eval_file, tmp_path, monkeypatch, changes, named):
    changed = with_config(model_dir, tmp_path / "model", **changes)
    monkeypatch.setattr(export_model, "load_base_model", lambda *a, **k: pytest.fail("a model was loaded"))
    with pytest.raises(UserError, match=rf"^--model .*model: {named} in its config.json: the GGUF file written here"):
        main(flags(changed, tmp_path / "out", eval_file))


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_parameters": YARN | {"beta_fast": 32, "beta_slow": 1, "attention_factor": None}},
        {"sliding_window": 4, "use_sliding_window": False},
        {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2, "layer_types": None},
        {"use_sliding_window": True, "sliding_window": 131072, "max_window_layers": 1, "layer_types": None},
        {"attention_dropout": 0.1, "unsloth_version": "2026.1", "use_cache": False, "head_dim": 64},
        {"rope_parameters": None, "rope_theta": 1e6, "rope_scaling": {"type": "yarn", "factor": 4.0}},
    ],
)
def test_a_field_that_changes_nothing_is_no_reason(model_dir, tmp_path, changes):
    changed = with_config(model_dir, tmp_path / "model", **changes)
    assert why_not_written(load_tokenizer(str(changed)), AutoConfig.from_pretrained(changed)) is None


def test_every_row_of_the_embedding_has_a_token(tiny_tokenizer):
    rows = list(vocabulary(tiny_tokenizer, len(tiny_tokenizer) + 3))
    assert [text for text, _ in rows[-3:]] == [f"[PAD{len(tiny_tokenizer) + n}]" for n in range(3)]
    assert rows[tiny_tokenizer.eos_token_id] == (tiny_tokenizer.eos_token, gguf.TokenType.CONTROL)
    assert len({text for text, _ in rows}) == len(rows)


# ---------------------------------------------------------------- bitsandbytes


@pytest.mark.parametrize("kind", ["bnb-8bit", "bnb-4bit"])
def test_a_quantized_model_loads_back(model_dir, eval_file, tmp_path, kind):
    result = main(flags(model_dir, tmp_path / "out", eval_file, "--format", kind))
    assert abs(result["after"] / result["before"] - 1) < 1
    quantized = load_base_model(str(tmp_path / "out"))
    assert quantized.config.quantization_config.load_in_4bit is (kind == "bnb-4bit")
    size = (tmp_path / "out/model.safetensors").stat().st_size
    assert size < (model_dir / "model.safetensors").stat().st_size
    assert load_tokenizer(str(tmp_path / "out")).chat_template


# ---------------------------------------------------------------- the comparison, refusals


def test_perplexity_by_hand():
    class Even(torch.nn.Module):
        """Every token of four is as likely."""

        device = torch.device("cpu")

        def forward(self, input_ids, use_cache):
            return type("Output", (), {"logits": torch.zeros(*input_ids.shape, 4)})

    assert perplexity(Even(), [([0, 1, 2], [IGNORED_LABEL, 1, 2]), ([3, 3], [IGNORED_LABEL, 3])]) == pytest.approx(4)


@pytest.mark.parametrize(
    ("kind", "factor"),
    [("gguf_type f16", 3), ("gguf_type q8_0", 3), ("gguf_type q4_0", -3)],
)
def test_a_file_that_says_something_else_is_not_written(model_dir, eval_file, tmp_path, monkeypatch, kind, factor):
    tensors_of = gguf_file.tensors_of
    monkeypatch.setattr(
        gguf_file,
        "tensors_of",
        lambda model: ((name, tensor * (factor if "o_proj" in name else 1)) for name, tensor in tensors_of(model)),
    )
    with pytest.raises(UserError, match=r"perplexity moves by [+-][\d.]+%, .*differs too much; nothing is written"):
        main(flags(model_dir, tmp_path / "out", eval_file, *f"--{kind}".split()))
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_exported(model_dir, eval_file, tmp_path):
    other = with_config(model_dir, tmp_path / "other", architectures=["LlamaForCausalLM"])
    with pytest.raises(UserError, match=r"LlamaForCausalLM; GGUF is written here for Qwen2.* give its checkout as --l"):
        main(flags(other, tmp_path / "out", eval_file))
    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine").touch()
    with pytest.raises(UserError, match=r"--output_dir .*: is not empty"):
        main(flags(model_dir, tmp_path / "full", eval_file))
    with pytest.raises(UserError, match="--model nowhere: no such folder"):
        main(flags(Path("./nowhere"), tmp_path / "out", eval_file))
    config = AutoConfig.from_pretrained(model_dir, architectures=["Qwen2ForSequenceClassification"])
    shutil.copytree(model_dir, tmp_path / "rm")
    config.save_pretrained(tmp_path / "rm")
    with pytest.raises(UserError, match=r"--model .*rm: a reward model"):
        main(flags(tmp_path / "rm", tmp_path / "out", eval_file, "--format", "bnb-4bit"))
    with pytest.raises(UserError, match="--num_samples 0"):
        main(flags(model_dir, tmp_path / "out", eval_file, "--num_samples", "0"))


def test_a_misspelt_flag_is_told_the_right_one(model_dir, eval_file, tmp_path):
    with pytest.raises(UserError, match="--gguf_tpye is not a flag of this stage; did you mean --gguf_type"):
        main(flags(model_dir, tmp_path / "out", eval_file, "--gguf_tpye", "f16"))
