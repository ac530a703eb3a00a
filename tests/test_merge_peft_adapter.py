"""`merge_peft_adapter.py`: the merged model is the trained one, or nothing is written."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from random_adapters import random_adapter, save_adapter
from safetensors.torch import load_file, save_file
from stage_runs import load_for_training
from tiny_families import save_mistral3, save_multimodal_model, save_multimodal_model_of_text_class
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
    set_seed,
)

import merge_peft_adapter
from medtune.errors import UserError
from medtune.models.lineage import Lineage, read_lineage
from medtune.models.loading import weights_fingerprint
from medtune.reading.tokenization import load_chat_template
from merge_peft_adapter import Difference, comparison_prompts, difference_from, judge, main, references_of

SCRIPT = Path(merge_peft_adapter.__file__)
FILES = [
    *("chat_template.jinja", "config.json", "generation_config.json", "lineage.json", "model.safetensors"),
    *("tokenizer.json", "tokenizer_config.json"),
]
PROMPT = "感冒了应该怎么办？多喝水，注意休息。See a doctor."


@pytest.fixture(scope="module")
def inputs(tiny_tokenizer) -> dict[str, torch.Tensor]:
    return tiny_tokenizer(PROMPT, return_tensors="pt")


@pytest.fixture(autouse=True)
def few_prompts(request, monkeypatch):
    """Six prompts instead of 32, for the time."""
    if "all_prompts" not in request.fixturenames:
        monkeypatch.setattr(merge_peft_adapter, "CHINESE_QUESTIONS", merge_peft_adapter.CHINESE_QUESTIONS[:4])
        monkeypatch.setattr(merge_peft_adapter, "ENGLISH_QUESTIONS", merge_peft_adapter.ENGLISH_QUESTIONS[:2])


@pytest.fixture
def all_prompts():
    """What a user's run compares."""


@pytest.fixture
def no_weights(monkeypatch):
    """Loading weights fails the test."""
    monkeypatch.setattr(merge_peft_adapter, "load_with_adapter", lambda *args, **options: pytest.fail("loaded"))


def flags(base: Path, lora: Path, output: Path, *more: str) -> list[str]:
    return ["--base_model", str(base), "--lora_model", str(lora), "--output_dir", str(output), *more]


FLOAT32 = ("--torch_dtype", "float32")


@torch.no_grad()
def logits_of(model, inputs) -> torch.Tensor:
    return model.eval()(**inputs).logits


def unmerged(base_dir: Path, lora: Path) -> PeftModel:
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base_dir), lora)


# ---------------------------------------------------------------- the merged model


@pytest.mark.parametrize(
    "lora",
    [{}, {"use_dora": True}, {"use_rslora": True}, {"target_modules": ["q_proj", "down_proj"]}],
    ids=["all", "dora", "rslora", "two modules"],
)
def test_merged_logits_are_those_of_the_adapter_on_its_base(tiny_model_dir, tmp_path, inputs, lora):
    folder = random_adapter(tiny_model_dir, tmp_path / "adapter", **lora)
    main(flags(tiny_model_dir, folder, tmp_path / "merged", *FLOAT32))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    expected = logits_of(unmerged(tiny_model_dir, folder), inputs)
    assert torch.allclose(logits_of(merged, inputs), expected, atol=1e-4, rtol=0)
    base = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    assert not torch.allclose(logits_of(base, inputs), expected, atol=1e-2)


def test_the_folder_holds_a_whole_model(tiny_model_dir, tmp_path, capsys, all_prompts):
    folder = random_adapter(tiny_model_dir, tmp_path / "adapter", template="chatml")
    output = tmp_path / "new" / "merged"
    main(flags(tiny_model_dir, folder, output))
    assert sorted(path.name for path in output.iterdir()) == FILES
    assert [path.name for path in output.parent.iterdir()] == ["merged"]
    config = json.loads((output / "config.json").read_text(encoding="utf-8"))
    assert config["dtype"] == "bfloat16"
    assert (output / "model.safetensors").stat().st_mode == (output / "config.json").stat().st_mode

    merged_tokenizer, own = AutoTokenizer.from_pretrained(output), AutoTokenizer.from_pretrained(folder)
    assert merged_tokenizer.chat_template == own.chat_template
    assert merged_tokenizer.get_vocab() == own.get_vocab()
    assert read_lineage(output) == Lineage(
        str(tiny_model_dir),
        str(folder),
        "merge",
        "chatml",
        "data",
        hidden_size=128,
        vocab_size=config["vocab_size"],
        start_weights=weights_fingerprint(str(folder)),
        flags={"--base_model": str(tiny_model_dir), "--lora_model": str(folder), "--output_dir": str(output)},
    )
    log = capsys.readouterr().err
    assert re.search(r"\d+\.\d\d% agreement with the adapter on its base on 32 prompts", log)
    assert f"next: python inference.py --base_model {output}" in log
    assert f"-m vllm.entrypoints.openai.api_server --model {output} --host 0.0.0.0 --port 8000 --dtype bfloat16" in log
    assert "--max-model-len 2048" in log


def test_what_is_merged_already_is_left_and_what_was_merged_otherwise_is_refused(tiny_model_dir, tmp_path, capsys):
    folder = random_adapter(tiny_model_dir, tmp_path / "adapter")
    words = ["--lora_model", str(folder), "--output_dir", str(tmp_path / "merged")]
    main(words)  # its base is the one that the adapter names
    assert read_lineage(tmp_path / "merged").base_model == str(tiny_model_dir)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "merged").iterdir()}
    main(words)
    assert "merged holds this model already, merged by the same flags: nothing to do" in capsys.readouterr().err
    with pytest.raises(UserError, match="it holds something already"):
        main([*words, *FLOAT32])
    random_adapter(tiny_model_dir, folder, r=2)
    with pytest.raises(UserError, match="it holds something already"):
        main(words)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "merged").iterdir()} == before


@pytest.mark.parametrize("save", [save_multimodal_model_of_text_class, save_multimodal_model, save_mistral3])
def test_a_multimodal_model_is_complete_again(tiny_model_dir, tmp_path, save, capsys):
    """Vision tower, layers for multi-token prediction and configuration are the base's; the rest is the adapter's."""
    base = save(tmp_path / "base", tiny_model_dir)
    tensors = load_file(base / "model.safetensors") | {"mtp.layers.0.fc.weight": torch.randn(4, 4)}
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    (base / "preprocessor_config.json").write_text('{"image_processor_type": "Test"}', encoding="utf-8")
    (base / "tokenizer.model").write_bytes(b"vocabulary")
    torch.manual_seed(0)
    model = load_for_training(str(base), use_peft=True)
    for name, weights in model.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(weights, std=0.2)
    model.save_pretrained(tmp_path / "adapter")
    shutil.copy(base / "tokenizer.json", tmp_path / "adapter")
    main(flags(base, tmp_path / "adapter", tmp_path / "merged", *FLOAT32))

    merged = {
        name: tensor for file in (tmp_path / "merged").glob("*.safetensors") for name, tensor in load_file(file).items()
    }
    assert merged.keys() == tensors.keys()
    others = {name for name in tensors if any(part in name for part in ("vision", "visual", "projector", "mtp"))}
    assert {name for name in tensors if torch.equal(merged[name], tensors[name])} >= others
    changed = {name for name in tensors if not torch.equal(merged[name], tensors[name])}
    assert changed >= {name for name in tensors if name.endswith(("q_proj.weight", "down_proj.weight"))} - others
    assert f"unchanged from {base}: mtp (1)" in capsys.readouterr().err
    config, of_base = (AutoConfig.from_pretrained(folder) for folder in (tmp_path / "merged", base))
    assert (type(config), config.architectures) == (type(of_base), of_base.architectures)
    assert (tmp_path / "merged" / "preprocessor_config.json").is_file()
    assert (tmp_path / "merged" / "tokenizer.model").read_bytes() == b"vocabulary"
    whole = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged").eval()
    ids = torch.arange(40).reshape(2, 20)
    with torch.no_grad():
        assert torch.allclose(whole(ids).logits, model.eval()(ids).logits, atol=1e-4, rtol=0)


def test_weights_are_written_in_shards(tiny_model_dir, adapter, tmp_path, monkeypatch):
    monkeypatch.setattr(merge_peft_adapter, "MAX_SHARD_SIZE", "500KB")
    main(flags(tiny_model_dir, adapter, tmp_path / "merged"))
    index = json.loads((tmp_path / "merged/model.safetensors.index.json").read_text(encoding="utf-8"))
    assert len(set(index["weight_map"].values())) > 1
    AutoModelForCausalLM.from_pretrained(tmp_path / "merged")


def test_an_adapter_of_a_4_bit_base_merges_into_the_unquantized_one(tiny_model_dir, tmp_path, inputs):
    set_seed(1)
    model = load_for_training(str(tiny_model_dir), use_peft=True, load_in_4bit=True, torch_dtype="float32")
    logits_of(model, inputs)  # an evaluation, after which bitsandbytes would repack the weights
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(8):
        loss = model(**inputs, labels=inputs["input_ids"]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 1
    folder = save_adapter(model, tiny_model_dir, tmp_path / "adapter")

    main(flags(tiny_model_dir, folder, tmp_path / "merged"))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert merged.dtype == torch.bfloat16
    merged.eval()
    with torch.no_grad():
        assert merged(**inputs, labels=inputs["input_ids"]).loss.item() == pytest.approx(losses[-1], abs=0.5)
    expected = logits_of(unmerged(tiny_model_dir, folder), inputs)
    assert (logits_of(merged, inputs).float() - expected).abs().max() < 0.02 * expected.abs().max()


def test_a_reward_adapter_gives_a_model_with_its_score_head(tiny_model_dir, tmp_path, inputs, capsys):
    set_seed(1)
    config = LoraConfig(task_type="SEQ_CLS", r=4, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    base = AutoModelForSequenceClassification.from_pretrained(tiny_model_dir, num_labels=1)
    model = get_peft_model(base, config)
    with torch.no_grad():
        model.base_model.model.score.modules_to_save.default.weight.mul_(30)
    folder = save_adapter(model, tiny_model_dir, tmp_path / "adapter")
    expected = logits_of(model, inputs)

    main(flags(tiny_model_dir, folder, tmp_path / "exact", *FLOAT32))
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "exact")
    assert merged.config.num_labels == 1
    assert torch.allclose(logits_of(merged, inputs), expected, atol=1e-4)
    main(flags(tiny_model_dir, folder, tmp_path / "rounded"))
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "rounded")
    assert torch.allclose(logits_of(merged, inputs).float(), expected, rtol=0.05, atol=0.05)
    assert f"next: ppo_training.py --reward_model_path {tmp_path / 'rounded'}" in capsys.readouterr().err


@pytest.mark.parametrize("lora", [{"target_modules": ["q_proj", "lm_head"]}, {"modules_to_save": ["lm_head"]}])
def test_a_head_that_shares_its_weights_with_the_embedding(tiny_model_dir, tmp_path, inputs, lora):
    folder = random_adapter(tiny_model_dir, tmp_path / "adapter", **lora)
    if "modules_to_save" in lora:
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model_dir), folder)
        with torch.no_grad():
            model.get_output_embeddings().modules_to_save.default.weight.mul_(2)
        model.save_pretrained(folder)
    expected = logits_of(unmerged(tiny_model_dir, folder), inputs)
    main(flags(tiny_model_dir, folder, tmp_path / "merged", *FLOAT32))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert not merged.config.tie_word_embeddings
    assert torch.allclose(logits_of(merged, inputs), expected, atol=1e-4, rtol=0)


# ---------------------------------------------------------------- generation settings


def test_generation_stops_at_every_end_token(tiny_model_dir, adapter, tiny_tokenizer, tmp_path):
    """A base whose own settings know <|endoftext|> alone, as Qwen's base models have it."""
    base = tmp_path / "base"
    shutil.copytree(tiny_model_dir, base)
    end, turn_end = tiny_tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>"])
    GenerationConfig(eos_token_id=end, repetition_penalty=1.05, temperature=0.7, do_sample=True).save_pretrained(base)
    main(flags(base, adapter, tmp_path / "merged"))
    config = GenerationConfig.from_pretrained(tmp_path / "merged")
    assert config.eos_token_id == [turn_end, end]
    assert config.pad_token_id == end
    assert (config.repetition_penalty, config.temperature, config.do_sample) == (1.05, 0.7, True)


def test_generation_settings_that_transformers_would_not_save(tiny_model_dir, adapter, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(tiny_model_dir, base)
    (base / "generation_config.json").write_text('{"temperature": 0.6, "top_p": 0.9}', encoding="utf-8")
    main(flags(base, adapter, tmp_path / "merged"))
    config = GenerationConfig.from_pretrained(tmp_path / "merged")
    assert (config.temperature, config.top_p, config.do_sample) == (0.6, 0.9, True)


# ---------------------------------------------------------------- the check


def lose_the_adapter(model: PeftModel):
    return model.unload()


def merge_twice(model: PeftModel):
    model.base_model.merge_adapter()
    for module in model.modules():
        if getattr(module, "merged_adapters", None):
            module.merged_adapters.clear()
    return model.merge_and_unload()


def spoil_a_weight(model: PeftModel):
    merged = model.merge_and_unload()
    merged.model.layers[0].mlp.up_proj.weight.data[0, 0] = float("nan")
    return merged


@pytest.mark.parametrize(
    ("broken_merge", "torch_dtype"),
    [
        (lose_the_adapter, "float32"),
        (lose_the_adapter, "bfloat16"),
        (merge_twice, "bfloat16"),
        (spoil_a_weight, "float32"),
    ],
)
def test_a_broken_merge_leaves_nothing(tiny_model_dir, adapter, tmp_path, monkeypatch, broken_merge, torch_dtype):
    monkeypatch.setattr(merge_peft_adapter, "merge", broken_merge)
    output = tmp_path / "there" / "merged"
    with pytest.raises(UserError, match="the merged model is not the trained one, so nothing is written: ") as caught:
        main(flags(tiny_model_dir, adapter, output, "--torch_dtype", torch_dtype))
    assert "\n" not in str(caught.value)
    assert list(output.parent.iterdir()) == []


def test_what_a_killed_run_left_is_cleared_away(tiny_model_dir, adapter, tmp_path):
    (tmp_path / ".merged.partial").mkdir()
    (tmp_path / ".merged.partial/model-00001-of-00002.safetensors").write_text("half", encoding="utf-8")
    (tmp_path / "merged").mkdir()
    main(flags(tiny_model_dir, adapter, tmp_path / "merged"))
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]
    assert sorted(path.name for path in (tmp_path / "merged").iterdir()) == FILES


class Saying(torch.nn.Module):
    """A model that says fixed logits, [positions, vocabulary]."""

    device = torch.device("cpu")

    def __init__(self, logits: list[list[float]]):
        super().__init__()
        self.logits = torch.tensor(logits)

    def forward(self, input_ids, use_cache):
        return SimpleNamespace(logits=self.logits[None])


CLEAR = [[8.0, 2.0, 0.0], [0.0, 8.0, 1.0]]
CLOSE = [[8.0, 2.0, 0.0], [0.0, 8.0, 7.9]]  # 0.1 is under two units of 2**-7 x 8 in bfloat16, over them in float16


@pytest.mark.parametrize(
    ("unmerged_logits", "logits", "torch_dtype", "agreement", "largest"),
    [
        (CLEAR, CLEAR, "float32", 1.0, 0.0),
        (CLEAR, [[7.0, 2.0, 0.0], [0.0, 8.0, 1.0]], "float32", 1.0, 1.0),
        (CLEAR, [[1.0, 2.0, 0.0], [0.0, 8.0, 1.0]], "bfloat16", 0.5, 7.0),
        (CLOSE, [[8.0, 2.0, 0.0], [0.0, 8.0, 8.1]], "bfloat16", 1.0, 0.2),
        (CLOSE, [[8.0, 2.0, 0.0], [0.0, 8.0, 8.1]], "float16", 0.5, 0.2),
        (CLEAR, [[float("nan")] * 3, [0.0, 8.0, 1.0]], "bfloat16", 0.5, float("nan")),
    ],
)
def test_agreement_by_hand(unmerged_logits, logits, torch_dtype, agreement, largest):
    references = references_of(Saying(unmerged_logits), [[1, 2]])
    found = difference_from(references, Saying(logits), [[1, 2]], torch_dtype)
    assert found.agreement == agreement
    assert found.largest == pytest.approx(largest, nan_ok=True, abs=1e-5)


@pytest.mark.parametrize(("score", "torch_dtype", "agreement"), [(4.1, "bfloat16", 1.0), (4.1, "float32", 0.0)])
def test_scores_agree_within_their_tolerance(score, torch_dtype, agreement):
    references = references_of(Saying([[4.0]]), [[1, 2]])
    assert difference_from(references, Saying([[score]]), [[1, 2]], torch_dtype).agreement == agreement


def test_a_change_that_rounding_hides_is_said(capsys):
    from loguru import logger

    logger.remove()
    logger.add(sys.stderr)
    judge(Difference(0.995, 0.02, 0.1), Difference(0.97, 0.03, 0.1), "bfloat16")
    assert "rounding to bfloat16 hides much of it" in capsys.readouterr().err
    judge(Difference(0.995, 0.002, 0.1), Difference(0.5, 0.3, 2.0), "bfloat16")
    assert "hides" not in capsys.readouterr().err
    with pytest.raises(UserError, match=r"98\.90% agreement"):
        judge(Difference(0.989, 0.002, 0.1), Difference(0.5, 0.3, 2.0), "bfloat16")


def test_there_are_32_prompts_with_and_without_a_template(tiny_tokenizer, all_prompts):
    with_turns = comparison_prompts(tiny_tokenizer, load_chat_template(tiny_tokenizer, None))
    without = comparison_prompts(tiny_tokenizer, None)
    assert len(with_turns) == len(without) == len({tuple(ids) for ids in with_turns}) == 32
    assert tiny_tokenizer.decode(without[0]).startswith("感冒了应该怎么办？")


def test_a_base_without_turns_merges_too(tiny_model_dir, tmp_path, inputs):
    """Pretraining on a base that has no chat template."""
    base = tmp_path / "base"
    shutil.copytree(tiny_model_dir, base)
    (base / "chat_template.jinja").unlink()
    folder = random_adapter(base, tmp_path / "adapter")
    (folder / "chat_template.jinja").unlink()
    lineage = read_lineage(folder)
    Lineage(lineage.base_model, None, "pt", "", "data", 128, lineage.vocab_size).save(folder)
    main(flags(base, folder, tmp_path / "merged", *FLOAT32))
    assert sorted(path.name for path in (tmp_path / "merged").iterdir()) == [f for f in FILES if "jinja" not in f]


# ---------------------------------------------------------------- refusals


def test_a_wrong_base_is_refused(tiny_model_dir, tmp_path, no_weights):
    folder = random_adapter(tiny_model_dir, tmp_path / "adapter")
    Lineage("elsewhere/Qwen2.5-3B", None, "sft", "qwen", "data", hidden_size=2048, vocab_size=151936).save(folder)
    with pytest.raises(UserError, match=r"\(hidden size 128, vocabulary \d+\) is not the base of"):
        main(flags(tiny_model_dir, folder, tmp_path / "merged"))
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"--output_dir": "USED"}, "it holds something already; name a new folder"),
        ({"--output_dir": "USED/file"}, "used/file is a file; name a folder"),
        ({"--output_dir": "/proc/x"}, "--output_dir /proc/x: cannot be made or written to"),
        ({"--base_model": "ADAPTER"}, "an adapter; give the base model it was trained on"),
        ({"--base_model": "./nowhere"}, "--base_model ./nowhere: no such folder"),
        ({"--lora_model": "./nowhere"}, "./nowhere: no such folder"),
        ({"--lora_model": "BASE"}, "no adapter_config.json in it"),
        ({"--torch_dtype": "int8"}, "--torch_dtype"),
    ],
)
def test_what_cannot_be_honoured_is_refused(tiny_model_dir, adapter, tmp_path, no_weights, change, message):
    used = tmp_path / "used"
    used.mkdir()
    (used / "file").write_text("mine", encoding="utf-8")
    places = {"BASE": str(tiny_model_dir), "ADAPTER": str(adapter), "USED": str(used), "USED/file": str(used / "file")}
    words = dict(zip(*[iter(flags(tiny_model_dir, adapter, tmp_path / "merged"))] * 2, strict=True)) | change
    with pytest.raises(UserError, match=message) as caught:
        main([word for flag, value in words.items() for word in (flag, places.get(value, value))])
    assert "\n" not in str(caught.value)
    assert (used / "file").read_text(encoding="utf-8") == "mine"


def test_a_full_disk_is_noticed_first(tiny_model_dir, adapter, tmp_path, monkeypatch, no_weights):
    monkeypatch.setattr(merge_peft_adapter.shutil, "disk_usage", lambda path: SimpleNamespace(free=100_000))
    with pytest.raises(UserError, match=r"the merged weights take 0\.0 GB and .* has 0\.0 GB free"):
        main(flags(tiny_model_dir, adapter, tmp_path / "deep" / "merged"))
    assert list(tmp_path.iterdir()) == []


def test_a_quantized_base_is_refused(tiny_model_dir, adapter, tmp_path, no_weights):
    base = tmp_path / tiny_model_dir.name
    shutil.copytree(tiny_model_dir, base)
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (base / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(UserError, match="its weights are quantized; give the model it was made from"):
        main(flags(base, adapter, tmp_path / "merged"))


def test_the_guides_command(tiny_model_dir, adapter, tmp_path):
    """As a user runs it."""
    command = [sys.executable, str(SCRIPT), *flags(tiny_model_dir, adapter, tmp_path / "merged")]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout == ""
    assert "Warning" not in result.stderr
    assert sorted(path.name for path in (tmp_path / "merged").iterdir()) == FILES
