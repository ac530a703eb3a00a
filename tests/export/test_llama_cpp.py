"""medtune/export/llama_cpp.py: what llama.cpp's tools write is compared by llama.cpp itself, or not written."""

import json
from pathlib import Path
from types import SimpleNamespace

import export_model
import pytest
import torch
from safetensors.torch import save_file
from tiny_families import save_tiny_model
from transformers import AutoModelForCausalLM

from medtune.errors import UserError
from medtune.export import llama_cpp
from medtune.export.gguf_file import write_gguf
from medtune.export.llama_cpp import convert, find_converter, find_quantizer
from medtune.models.loading import load_tokenizer


def fake_converter(folder: Path, code: str) -> Path:
    folder.mkdir()
    file = folder / "convert_hf_to_gguf.py"
    file.write_text(f"import shutil, sys\n{code}\n", encoding="utf-8")
    return file


def fake_quantizer(folder: Path) -> Path:
    """Copies the file and writes down what it was asked for."""
    file = folder / "build/bin/llama-quantize"
    file.parent.mkdir(parents=True)
    file.write_text(f'#!/bin/sh\ncp "$1" "$2"\necho "$3" > {folder}/asked\n', encoding="utf-8")
    file.chmod(0o755)
    return file


# ---------------------------------------------------------------- finding them


def test_what_is_missing_is_named_before_weights_load(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"--model m: it cannot; llama\.cpp's own converter .* give its checkout"):
        find_converter(None, "--model m: it cannot")
    with pytest.raises(UserError, match=r"--llama_cpp .*: no convert_hf_to_gguf.py in it"):
        find_converter(str(tmp_path), "why")
    file = fake_converter(tmp_path / "llama.cpp", "")
    monkeypatch.setattr(llama_cpp, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"why; .*python -m pip install -r requirements/gguf.txt"):
        find_converter(str(file.parent), "why")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=r"--gguf_type q4_K_M: made by llama\.cpp's llama-quantize, which is neither"):
        find_quantizer(str(file.parent), "q4_K_M")


def test_the_quantizer_is_found_where_it_is_built(tmp_path, monkeypatch):
    built = fake_quantizer(tmp_path)
    assert find_quantizer(str(tmp_path), "q4_K_M") == built
    monkeypatch.setenv("PATH", str(built.parent))
    assert find_quantizer(None, "q4_K_M") == built


# ---------------------------------------------------------------- running them


@pytest.mark.parametrize(
    ("model_type", "tensor", "without"),
    [
        ("qwen3_5", "mtp.fc.weight", False),
        ("qwen3_5_moe_text", "model.norm.weight", True),
        ("qwen3_moe", "model.norm.weight", False),
    ],
)
def test_layers_that_a_checkpoint_lacks_are_not_asked_for(tmp_path, model_type, tensor, without):
    converter = fake_converter(tmp_path / "llama.cpp", "open(sys.argv[3], 'w').write(' '.join(sys.argv[1:]))")
    save_file({tensor: torch.ones(2)}, tmp_path / "model.safetensors")
    convert(converter, str(tmp_path), SimpleNamespace(model_type=model_type), tmp_path / "out", "bf16")
    expected = f"{tmp_path} --outfile {tmp_path / 'out'} --outtype bf16" + " --no-mtp" * without
    assert (tmp_path / "out").read_text(encoding="utf-8") == expected


def test_a_refusal_of_the_converter_is_one_line(tmp_path):
    refusal = "BPE pre-tokenizer was not recognized"
    converter = fake_converter(tmp_path / "llama.cpp", f"raise NotImplementedError('{refusal}')")
    with pytest.raises(UserError, match=rf"--llama_cpp .*llama\.cpp: NotImplementedError: {refusal}; nothing is writ"):
        convert(converter, str(tmp_path), SimpleNamespace(model_type="llama"), tmp_path / "out", "f16")


# ---------------------------------------------------------------- the whole way


@pytest.fixture
def flags(tiny_model_dir, tmp_path) -> list[str]:
    file = tmp_path / "questions.jsonl"
    record = {"question": "感冒了怎么办？ See a doctor?", "answer": "多喝水，see a doctor."}
    file.write_text(json.dumps(record, ensure_ascii=False) + "\n", encoding="utf-8")
    return ["--model", str(tiny_model_dir), "--output_dir", str(tmp_path / "out"), "--eval_file", str(file)]


@pytest.mark.parametrize(("factor", "is_sound"), [(1, True), (4, False)])
def test_what_the_converter_writes_is_compared_by_llama_cpp(
    tiny_model_dir, tmp_path, flags, monkeypatch, factor, is_sound
):
    pytest.importorskip("xllamacpp", reason="no llama.cpp: pip install -r requirements/gguf.txt")
    changes = {"head_dim": 32, "initializer_range": 0.2}  # no hidden_size / num_attention_heads
    folder = save_tiny_model("qwen3", tmp_path / "model", tiny_model_dir, **changes)
    model, made = AutoModelForCausalLM.from_pretrained(folder), tmp_path / "made.gguf"
    with torch.no_grad():
        model.model.norm.weight.mul_(factor)
    write_gguf(model, load_tokenizer(str(folder)), folder, made, "f32")
    converter = fake_converter(tmp_path / "llama.cpp", f"shutil.copy({str(made)!r}, sys.argv[3])")
    monkeypatch.setattr(export_model, "why_not_written", lambda tokenizer, config: "another family")
    flags += ["--model", str(folder), "--gguf_type", "f32", "--llama_cpp", str(converter.parent)]
    if is_sound:
        result = export_model.main(flags)
        assert result["after"] == pytest.approx(result["before"], rel=1e-3)
        assert {path.name for path in (tmp_path / "out").iterdir()} > {"model.gguf", "Modelfile"}
    else:
        with pytest.raises(UserError, match=r"perplexity moves by [+-][\d.]+%, .*nothing is written"):
            export_model.main(flags)
        assert not (tmp_path / "out").exists()


def test_the_quantizer_makes_its_types_of_16_bits(tmp_path, flags):
    fake_quantizer(tmp_path / "llama.cpp")
    result = export_model.main([*flags, "--gguf_type", "q4_K_M", "--llama_cpp", str(tmp_path / "llama.cpp")])
    assert (tmp_path / "llama.cpp/asked").read_text(encoding="utf-8") == "Q4_K_M\n"
    assert result["after"] == pytest.approx(result["before"], rel=0.02)  # as it was written, in bfloat16
    assert not (tmp_path / "out/whole.gguf").exists()
