"""The SFT stage as its users start it: what it learns, which files it leaves, how it resumes, what it refuses."""

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from guide import GUIDE_SFT
from random_adapters import random_adapter
from safetensors.torch import load_file
from stage_runs import ADAPTER_FILES, RESULTS, STATE_FILES, logged, names, run_process, stage_flags, weights_of
from tiny_families import (
    install_kernels,
    save_multimodal_model,
    save_multimodal_model_of_text_class,
    save_tiny_model,
)
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, masking_utils

import supervised_finetuning
from medtune.errors import UserError
from medtune.models import text_attention
from medtune.models.adapters import load_with_adapter
from medtune.models.lineage import read_lineage
from medtune.reading import stage_data
from medtune.training import causal_lm_trainer
from medtune.training.checkpoints import MANIFEST

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "supervised_finetuning.py"


def dialogue(question: str, answer: str) -> dict:
    return {"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]}


def make_dialogues(n_dialogues: int) -> list[dict]:
    parts, signs = ["头", "胃", "背", "膝", "手", "肩", "耳", "牙"], ["疼", "痒", "肿", "麻"]
    return [
        dialogue(
            f"第{index}个病人{parts[index % 8]}{signs[index % 4]}怎么办？",
            f"{parts[index % 8]}{signs[index % 4]}{index}天以上请就诊，平时注意休息。",
        )
        for index in range(n_dialogues)
    ]


@pytest.fixture
def data_dir(write_jsonl) -> Path:
    return write_jsonl("data/dialogues.jsonl", make_dialogues(24)).parent


@pytest.fixture
def flags(tiny_model_dir, data_dir, tmp_path):
    """A function that gives a short run's flags."""

    def build(**changes) -> list[str]:
        values = {"train_file_dir": data_dir, "validation_file_dir": data_dir, "do_eval": True, "max_eval_samples": 4}
        values |= {"model_max_length": 256, "template_name": None, "per_device_eval_batch_size": None}
        return stage_flags("sft", tiny_model_dir, tmp_path, **values | changes)

    return build


# ---------------------------------------------------------------- what a run leaves


def test_a_run_leaves_exactly_these_files(flags, tmp_path, data_dir, tiny_model_dir):
    metrics = supervised_finetuning.main(flags(template_name="qwen", report_to="tensorboard"))
    out = tmp_path / "out"
    assert names(out) == {"checkpoint-2", "checkpoint-4", "checkpoint-best", "runs"} | RESULTS
    assert names(out / "checkpoint-best") == ADAPTER_FILES
    assert names(out / "checkpoint-4") == ADAPTER_FILES | STATE_FILES | {MANIFEST}
    assert any(name.startswith("events.out.tfevents") for name in names(out / "runs"))
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    results = json.loads((out / "eval_results.json").read_text())
    assert results["eval_perplexity"] == pytest.approx(torch.tensor(results["eval_loss"]).exp().item(), rel=1e-4)
    assert 0 <= results["eval_token_accuracy"] <= 1
    assert metrics["eval_loss"] == results["eval_loss"]
    assert "train_loss" in json.loads((out / "train_results.json").read_text())
    lineage = read_lineage(out / "checkpoint-best")
    assert (lineage.base_model, lineage.parent, lineage.stage) == (str(tiny_model_dir), None, "sft")
    assert (lineage.template, lineage.data) == ("qwen", str(data_dir))
    assert (lineage.flags["--train_file_dir"], lineage.flags["--do_train"]) == (str(data_dir), "True")


def test_full_weights_leave_a_model_of_its_own(flags, tmp_path):
    supervised_finetuning.main(flags(use_peft=False, max_steps=1, save_strategy="no"))
    best = tmp_path / "out" / "checkpoint-best"
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"} <= names(best)
    assert not (best / "adapter_config.json").exists()
    AutoModelForCausalLM.from_pretrained(best)


def test_best_is_the_lowest_evaluation_loss(flags, tmp_path, monkeypatch):
    scripted = iter([3.0, 1.0, 2.0, 4.0])
    monkeypatch.setattr(causal_lm_trainer, "loss_statistics", lambda prediction, **_: {"loss": next(scripted)})
    metrics = supervised_finetuning.main(flags(max_steps=4, eval_strategy="steps", eval_steps=1, save_steps=2))
    assert metrics["eval_loss"] == json.loads((tmp_path / "out" / "eval_results.json").read_text())["eval_loss"] == 1.0
    best, second, last = (
        weights_of(tmp_path / "out" / name) for name in ("checkpoint-best", "checkpoint-2", "checkpoint-4")
    )
    assert all(torch.equal(best[name], second[name]) for name in second)
    assert any(not torch.equal(best[name], last[name]) for name in last)


def test_an_early_best_survives_save_total_limit(flags, tmp_path):
    """Without learning every evaluation is as good as the first."""
    often = {"save_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
    supervised_finetuning.main(flags(save_total_limit=2, learning_rate=0, **often))
    kept = {name for name in names(tmp_path / "out") if name.startswith("checkpoint")}
    assert kept == {"checkpoint-3", "checkpoint-4", "checkpoint-best"}
    state = json.loads((tmp_path / "out/checkpoint-4/trainer_state.json").read_text())
    assert state["stateful_callbacks"]["CheckpointKeeper"]["attributes"]["best_step"] == 1


def test_without_evaluation_best_is_the_last(flags, tmp_path):
    assert supervised_finetuning.main(flags(do_eval=None)) == {}
    best, last = (weights_of(tmp_path / "out" / name) for name in ("checkpoint-best", "checkpoint-4"))
    assert all(torch.equal(best[name], last[name]) for name in last)
    assert not (tmp_path / "out" / "eval_results.json").exists()


def test_evaluation_alone_trains_nothing(flags, tmp_path):
    metrics = supervised_finetuning.main(flags(do_train=None))
    assert metrics["eval_loss"] > 0
    assert names(tmp_path / "out") == {"eval_results.json"}


def test_log_says_what_happens(flags, capfd):
    supervised_finetuning.main(flags(max_steps=13))
    log = capfd.readouterr().err
    assert "no CUDA device: float32 on the CPU" in log
    assert re.search(r"train records +kept 24 of 24", log)
    assert re.search(r"eval dialogues +kept 2 of 2, held out of the training data by the seed", log)
    assert re.search(r"batch +2 a device x 2 accumulated x 1 process\(es\) = 4 rows a step", log)
    assert re.search(r"steps +13 ", log)
    assert re.search(r"«[^»]+就诊[^»]+<\|im_end\|>»", log)
    assert re.search(r"step 3/13  epoch \d\.\d\d  loss \d+\.\d+  lr .*tokens/s  peak", log)
    assert "at the speed of the first ten steps" in log
    assert "next: python inference.py --base_model" in log.replace(Path(sys.executable).name, "python")


# ---------------------------------------------------------------- adapter lineage


def test_training_continues_an_adapter_relative_to_the_base(flags, tmp_path, tiny_model_dir):
    supervised_finetuning.main(flags(output_dir=tmp_path / "first"))
    first = tmp_path / "first" / "checkpoint-best"
    argv = flags(model_name_or_path=first, output_dir=tmp_path / "second", max_steps=1, learning_rate=1e-9)
    supervised_finetuning.main(argv)
    second = tmp_path / "second" / "checkpoint-best"
    before, after = (weights_of(folder) for folder in (first, second))
    # What the first run learned is inside: a step at a rate of almost nothing leaves it as it was.
    for name, weights in before.items():
        torch.testing.assert_close(after[name], weights, atol=1e-7, rtol=0)
    lineage = read_lineage(second)
    assert (lineage.base_model, lineage.parent) == (str(tiny_model_dir), str(first))
    model = load_with_adapter(str(tiny_model_dir), str(second), torch_dtype="float32")
    assert model.active_adapters == ["default"]


@pytest.mark.parametrize("flag", ["load_in_4bit", "load_in_8bit"])
def test_quantized_base_trains_an_adapter_in_float32(flags, tmp_path, flag):
    supervised_finetuning.main(flags(**{flag: True}, max_steps=3))
    weights = weights_of(tmp_path / "out" / "checkpoint-best")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    assert all(tensor.any() for name, tensor in weights.items() if "lora_B" in name)


@pytest.mark.parametrize(
    "options",
    [
        {"packing": True, "gradient_checkpointing": True, "use_dora": True, "optim": "adafactor"},
        {"padding_free": True, "use_rslora": True, "neftune_noise_alpha": 5, "target_modules": "q_proj,v_proj"},
        {"group_by_length": True, "modules_to_save": "embed_tokens", "flash_attn": True, "train_on_inputs": True},
    ],
    ids=lambda options: "-".join(options),
)
def test_options_train(flags, tmp_path, options):
    supervised_finetuning.main(flags(**options, max_steps=2, do_eval=None))
    assert all(loss > 0 for loss in logged(tmp_path / "out").values())
    config = json.loads((tmp_path / "out/checkpoint-best/adapter_config.json").read_text())
    assert (config["use_dora"], config["use_rslora"]) == ("use_dora" in options, "use_rslora" in options)
    assert (set(config["target_modules"]) == {"q_proj", "v_proj"}) is ("target_modules" in options)
    assert bool(config["modules_to_save"]) is ("modules_to_save" in options)


GUARD = "`causal_conv1d_fn` can't keep packed sequences apart without `causal_conv1d`"


def test_texts_of_a_joined_row_that_see_each_other_stop_the_run(flags, tmp_path, tiny_model_dir, capfd):
    model = save_tiny_model("qwen3_5_text", tmp_path / "qwen", tiny_model_dir)
    line = (
        rf"^the texts of a row see each other in this model \(qwen3_5_text: {GUARD}\); --padding_free False gives each"
    )
    with pytest.raises(UserError, match=line):
        supervised_finetuning.main(flags(model_name_or_path=model, padding_free=True))
    supervised_finetuning.main(flags(model_name_or_path=model, max_steps=1, do_eval=None, padding_free=False))
    assert "sees itself alone" not in capfd.readouterr().err


@pytest.mark.parametrize("kind", ["text", "wrapper", "adapter"])
def test_packing_without_the_kernels_it_takes_is_refused_before_data_and_weights(
    flags, tmp_path, tiny_model_dir, kind, monkeypatch
):
    save = save_multimodal_model_of_text_class if kind == "wrapper" else partial(save_tiny_model, "qwen3_5_text")
    model = save(tmp_path / "qwen", tiny_model_dir)
    if kind == "adapter":
        model = random_adapter(model, tmp_path / "adapter")
    for name in ("start_run", "prepare_data", "load_for_training"):
        monkeypatch.setattr(supervised_finetuning, name, lambda *args, **kwargs: pytest.fail("the run began"))
    line = (
        r"^the dialogues of a row would see each other: the recurrent layers of qwen3_5_text keep texts apart only by "
        r"GPU kernels that are not installed, those of causal_conv1d and flash-linear-attention "
        r"\(requirements/gpu\.txt says how\); --packing False gives each a row of its own$"
    )
    with pytest.raises(UserError, match=line):
        supervised_finetuning.main(flags(model_name_or_path=model, packing=True))


def test_packing_with_these_kernels_learns_what_rows_alone_do(flags, tmp_path, tiny_model_dir, monkeypatch, capfd):
    model = save_tiny_model("qwen3_5_text", tmp_path / "qwen", tiny_model_dir)
    short = {"model_name_or_path": model, "max_steps": 1, "lora_dropout": 0, "per_device_train_batch_size": 24}
    short |= {"gradient_accumulation_steps": 1, "save_strategy": "no", "do_eval": None, "validation_file_dir": None}
    supervised_finetuning.main(flags(**short))
    install_kernels(monkeypatch)
    supervised_finetuning.main(flags(**short, packing=True, output_dir=tmp_path / "packed"))
    log = capfd.readouterr().err
    assert "the rows of a batch are joined into one without padding: a dialogue sees itself alone" in log
    for name in ("loss", "grad_norm"):
        assert logged(tmp_path / "packed", name)[1] == pytest.approx(logged(tmp_path / "out", name)[1], rel=1e-4)


@pytest.mark.parametrize("save", [save_multimodal_model, save_multimodal_model_of_text_class, "qwen3_moe"])
def test_all_weights_of_a_model_that_is_saved_under_other_names(flags, tmp_path, tiny_model_dir, save):
    """A wrapper's parts, or experts one by one: such a run resumes, and its checkpoint-best is as complete as its base.

    Trainer would find none of the names, and go on from the base.
    """
    if isinstance(save, str):
        base = save_tiny_model(save, tmp_path / "base", tiny_model_dir)
    else:
        base = save(tmp_path / "base", tiny_model_dir)
    options = {"model_name_or_path": base, "use_peft": False, "do_eval": None, "learning_rate": 1e-2, "max_steps": 2}
    supervised_finetuning.main(flags(**options, save_steps=1))
    best = tmp_path / "out/checkpoint-best"
    shutil.copytree(tmp_path / "out/checkpoint-1", tmp_path / "again/checkpoint-1")
    supervised_finetuning.main(flags(**options, resume_from_checkpoint=True, output_dir=tmp_path / "again"))
    whole, resumed, before = (all_weights(folder) for folder in (best, tmp_path / "again/checkpoint-best", base))
    assert whole.keys() == resumed.keys() == before.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    unchanged = {name for name in whole if torch.equal(whole[name], before[name])}
    beside = {name for name in whole if any(part in name for part in ("vision", "visual", "projector"))}
    assert beside <= unchanged
    assert not {name for name in unchanged - beside if name.endswith("_proj.weight")}
    assert type(AutoConfig.from_pretrained(best)) is type(AutoConfig.from_pretrained(base))
    supervised_finetuning.main(flags(**options | {"model_name_or_path": best}, output_dir=tmp_path / "next"))


def all_weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("options", [{}, {"gradient_checkpointing": True}, {"packing": True}], ids=str)
def test_rows_without_padding_are_learned_as_padded_ones(flags, tmp_path, options, capfd):
    short = {"eval_steps": 2, "lora_dropout": 0} | options
    padded = supervised_finetuning.main(flags(**short, padding_free=False))
    assert "without padding" not in capfd.readouterr().err
    joined = supervised_finetuning.main(flags(**short, output_dir=tmp_path / "joined"))
    assert "the rows of a batch are joined into one without padding: a " in capfd.readouterr().err
    assert logged(tmp_path / "joined") == pytest.approx(logged(tmp_path / "out"), abs=1e-5)
    assert joined["eval_loss"] == pytest.approx(padded["eval_loss"], abs=1e-5)


def test_a_model_that_mixes_joined_rows_keeps_padded_ones(flags, monkeypatch, capfd):
    """Here transformers' SDPA sees the whole row as one text, as it does for some models of its own."""
    monkeypatch.setattr(text_attention, "SDPA_BY_TEXT", text_attention.SDPA)
    monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", lambda position_ids: None)
    supervised_finetuning.main(flags(max_steps=1, do_eval=None))
    assert "rows are padded, since they would not stay apart if they were joined" in capfd.readouterr().err


def test_a_resumed_run_keeps_its_rows(flags, tmp_path, capfd):
    """Dropout draws by the layout: auto goes on as the run began, and another layout is refused."""
    supervised_finetuning.main(flags(max_steps=2, padding_free=False, do_eval=None))
    capfd.readouterr()
    again = {"max_steps": 4, "do_eval": None, "resume_from_checkpoint": True}
    with pytest.raises(UserError, match=r"^--padding_free True: the run in .* was started with False"):
        supervised_finetuning.main(flags(**again, padding_free=True))
    supervised_finetuning.main(flags(**again))
    assert "without padding" not in capfd.readouterr().err


@pytest.mark.slow
def test_torch_compile_gives_the_same_loss(flags, tmp_path, monkeypatch):
    short = {"max_steps": 1, "do_eval": None, "save_strategy": "no", "lora_dropout": 0}
    supervised_finetuning.main(flags(**short))
    monkeypatch.setenv("TORCH_COMPILE", "1")
    supervised_finetuning.main(flags(**short, output_dir=tmp_path / "compiled"))
    assert logged(tmp_path / "compiled")[1] == pytest.approx(logged(tmp_path / "out")[1], abs=1e-4)
    weights = weights_of(tmp_path / "compiled" / "checkpoint-best")
    assert not any("_orig_mod" in name for name in weights)


# ---------------------------------------------------------------- data


def test_second_start_tokenizes_nothing(flags, tmp_path, monkeypatch):
    supervised_finetuning.main(flags(max_steps=1))
    calls = []
    encode = stage_data.encode_records
    monkeypatch.setattr(stage_data, "encode_records", lambda *args: calls.append(1) or encode(*args))
    supervised_finetuning.main(flags(max_steps=1, output_dir=tmp_path / "again"))
    assert calls == []
    supervised_finetuning.main(flags(max_steps=1, output_dir=tmp_path / "anew", overwrite_cache=True))
    assert len(calls) == 2  # the training part and the evaluation part
    supervised_finetuning.main(flags(max_steps=1, output_dir=tmp_path / "shorter", model_max_length=128))
    assert len(calls) == 4


def test_held_out_dialogues_are_not_trained_on(flags, tmp_path, monkeypatch):
    parts = []
    encode = stage_data.encode_records

    def recorded(chosen, *args):
        parts.append({dialogue.source for dialogue in chosen})
        return encode(chosen, *args)

    monkeypatch.setattr(stage_data, "encode_records", recorded)
    supervised_finetuning.main(flags(max_steps=1))
    trained, held_out = parts
    assert (len(trained), len(held_out)) == (22, 2)
    assert not trained & held_out
    supervised_finetuning.main(flags(max_steps=1, do_eval=None, output_dir=tmp_path / "no-eval"))
    assert len(parts[2]) == 24  # nothing is held out where nothing is evaluated


@pytest.mark.parametrize("spelling", ["{}/", "{}/../data", "{}/dialogues.jsonl"])
def test_same_files_are_the_same_however_they_are_spelled(flags, data_dir, capfd, spelling):
    supervised_finetuning.main(flags(max_steps=1, validation_file_dir=spelling.format(data_dir)))
    log = capfd.readouterr().err
    assert re.search(r"train dialogues +kept 22 of 22", log)
    assert re.search(r"eval dialogues +kept 2 of 2, held out", log)


def test_evaluation_on_some_of_the_training_files_is_refused(flags, write_jsonl, data_dir):
    write_jsonl("data/more/second.jsonl", make_dialogues(30)[24:])
    with pytest.raises(UserError, match=r"^--validation_file_dir .*: .*second\.jsonl is among the training files too"):
        supervised_finetuning.main(flags(validation_file_dir=data_dir / "more"))


def test_validation_files_of_their_own_hold_nothing_out(flags, write_jsonl, capfd):
    other = write_jsonl("other/second.jsonl", make_dialogues(30)[24:])
    supervised_finetuning.main(flags(max_steps=1, validation_file_dir=other))
    assert re.search(r"train dialogues +kept 24 of 24", capfd.readouterr().err)


def test_first_step_that_moves_nothing_stops(flags, monkeypatch):
    def freeze(*args, **kwargs):
        model = load(*args, **kwargs)
        stuck = next(p for name, p in model.named_parameters() if "lora_B" in name)
        stuck.register_hook(torch.zeros_like)
        return model

    load = supervised_finetuning.load_for_training
    monkeypatch.setattr(supervised_finetuning, "load_for_training", freeze)
    with pytest.raises(UserError, match=r"^step 1: 1 of 28 adapter matrices did not move: .*q_proj\.lora_B"):
        supervised_finetuning.main(flags())


# ---------------------------------------------------------------- what is refused


BAD_DATA = {
    "broken JSON": ('{"conversations": [', r"d\.jsonl:1: .*JSON"),
    "misspelt key": ('{"conversation": []}', r"d\.jsonl:1: .*conversations"),
    "empty conversation": ('{"conversations": []}', r"d\.jsonl:1: "),
    "no reply": ('{"conversations": [{"from": "human", "value": "头疼"}]}', r"d\.jsonl:1: .*reply"),
    "first turn from the model": ('{"conversations": [{"from": "gpt", "value": "好"}]}', r"d\.jsonl:1: "),
    "empty reply": (json.dumps(dialogue("头疼", " ")), r"d\.jsonl:1: .*empty reply"),
    "non-string value": (json.dumps(dialogue("头疼", 3)), r"d\.jsonl:1: "),
    "null": ("null", r"d\.jsonl:1: "),
    "reply longer than the limit": (json.dumps(dialogue("头疼", "休息" * 3000)), r"d\.jsonl:1: \d+ tokens, over"),
    "preference pair": (
        json.dumps({"question": "头疼", "response_chosen": "休息", "response_rejected": "不管"}),
        r"d\.jsonl:1: .*dpo_training\.py",
    ),
}


def test_keys_that_matter_are_refused_dropped_or_ignored(flags, write_jsonl, capfd):
    records = [record | {"label": n % 2 == 0} for n, record in enumerate(make_dialogues(8))]
    run_flags = partial(flags, train_file_dir=write_jsonl("d/d.jsonl", records), do_eval=None, max_steps=1)
    with pytest.raises(UserError, match=r"(?s)4 of 8 records are bad.*--ignore_keys label reads on without it"):
        supervised_finetuning.main(run_flags())
    capfd.readouterr()
    for changes, kept in (
        ({"on_bad_data": "drop"}, "kept 4 of 8 (4 not to be learned)"),
        ({"ignore_keys": "label"}, "kept 8 of 8"),
    ):
        supervised_finetuning.main(run_flags(overwrite_output_dir=True, **changes))
        assert f"train records         {kept}" in re.sub(" +(?=kept)", "         ", capfd.readouterr().err)


@pytest.mark.parametrize("case", BAD_DATA)
def test_bad_data_stops_before_the_model_loads(flags, tmp_path, monkeypatch, case):
    line, message = BAD_DATA[case]
    file = tmp_path / "bad" / "d.jsonl"
    file.parent.mkdir()
    file.write_text(line + "\n", encoding="utf-8")
    monkeypatch.setattr(supervised_finetuning, "load_for_training", lambda *a, **k: pytest.fail("a model was loaded"))
    with pytest.raises(UserError, match=message):
        supervised_finetuning.main(flags(train_file_dir=file.parent, validation_file_dir=None, do_eval=None))
    assert file.read_text(encoding="utf-8") == line + "\n"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_file_dir": "nowhere"}, r"--train_file_dir nowhere: no such file or folder"),
        ({"train_file_dir": None}, r"--train_file_dir is missing"),
        ({"train_file_dir": ""}, r"--train_file_dir is empty"),
        ({"max_steps": None, "num_train_epochs": 0}, r"--num_train_epochs 0\.0: give more than 0"),
        ({"output_dir": __file__}, r"--output_dir .*test_supervised_finetuning\.py is a file; name a folder"),
        ({"cache_dir": f"{__file__}/below"}, r"--cache_dir .*test_supervised_finetuning\.py is a file"),
        ({"model_name_or_path": "./nowhere"}, r"--model_name_or_path \./nowhere: no such folder"),
        ({"template_name": "qwenn"}, r"qwenn.*qwen"),
        ({"do_train": None, "do_eval": None}, r"neither --do_train nor --do_eval"),
        ({"lora_rnak": 8}, r"--lora_rnak is not a flag of this stage; did you mean --lora_rank\?"),
        ({"resume_from_checkpoint": "outputs/checkpoint-5"}, r"outputs/checkpoint-5: no such folder"),
        ({"load_in_4bit": True, "load_in_8bit": True}, r"exclude each other"),
        ({"load_in_4bit": True, "use_peft": False}, r"--use_peft False with a quantized base"),
        ({"target_modules": "attention"}, r"--target_modules attention: no such module.*q_proj"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_wrong_flag_is_one_line(flags, changes, message):
    with pytest.raises(UserError, match=message) as refused:
        supervised_finetuning.main(flags(**changes))
    assert "\n" not in str(refused.value)


def test_bad_input_ends_with_code_2_and_no_traceback(flags, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    finished = run_process("supervised_finetuning.py", flags(train_file_dir=empty, validation_file_dir=empty))
    assert finished.returncode == 2
    assert re.search(r"^error: --train_file_dir .*: the folder is empty; files that end in", finished.stderr, re.M)
    assert "Traceback" not in finished.stderr


def test_output_folder_with_a_run_is_never_written_over(flags, tmp_path):
    out = tmp_path / "out"
    supervised_finetuning.main(flags(max_steps=1))
    before = (out / "checkpoint-best" / "adapter_model.safetensors").read_bytes()
    with pytest.raises(UserError, match=r"holds a run already.*--resume_from_checkpoint True.*--overwrite_output_dir"):
        supervised_finetuning.main(flags(max_steps=1))
    supervised_finetuning.main(flags(max_steps=1, seed=7, overwrite_output_dir=True))
    assert (tmp_path / "out.earlier-1" / "checkpoint-best" / "adapter_model.safetensors").read_bytes() == before
    assert (out / "checkpoint-best" / "adapter_model.safetensors").read_bytes() != before


def test_a_base_that_never_learned_the_turn_tokens_is_said_once(flags, tiny_model_dir, tmp_path, capfd):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    with torch.no_grad():
        model.lm_head.weight[tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])] = 0
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "untaught")
    for base, n_lines in ((tmp_path / "untaught", 1), (tiny_model_dir, 0)):
        supervised_finetuning.main(flags(model_name_or_path=base, max_steps=1, output_dir=tmp_path / f"{n_lines}"))
        assert capfd.readouterr().err.count("<|im_start|>, <|im_end|>: the model has never learned") == n_lines


# ---------------------------------------------------------------- interruption


def start_and_wait_for(argv: list[str], file: Path) -> subprocess.Popen:
    process = subprocess.Popen(
        [sys.executable, str(SCRIPT), *argv], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 300
    while not file.exists():
        assert process.poll() is None, process.stderr.read()[-2000:]
        if time.monotonic() > deadline:
            process.kill()
            pytest.fail(f"{file} never came")
        time.sleep(0.02)
    return process


RESUMED = {"max_steps": 60, "save_steps": 5, "lora_dropout": 0.2, "lr_scheduler_type": "cosine", "do_eval": None}


@pytest.mark.slow
def test_kill_and_resume_gives_the_losses_of_an_uninterrupted_run(flags, tmp_path):
    supervised_finetuning.main(flags(**RESUMED, output_dir=tmp_path / "whole"))
    out = tmp_path / "killed"
    argv = flags(**RESUMED, output_dir=out)
    process = start_and_wait_for(argv, out / "checkpoint-10" / "trainer_state.json")
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert not (out / "train_results.json").exists()
    supervised_finetuning.main([*argv, "--resume_from_checkpoint", "True"])
    resumed, whole = logged(out), logged(tmp_path / "whole")
    assert resumed == whole
    weights, expected = (weights_of(folder / "checkpoint-best") for folder in (out, tmp_path / "whole"))
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signal_saves_a_checkpoint_and_says_interrupted(flags, tmp_path, number, code):
    out = tmp_path / "stopped"
    argv = flags(**RESUMED | {"max_steps": 5000, "save_steps": 50, "save_total_limit": 1}, output_dir=out)
    process = start_and_wait_for(argv, out / "checkpoint-50")
    process.send_signal(number)
    _, log = process.communicate(timeout=300)
    assert process.returncode == code, log[-2000:]
    (checkpoint,) = (name for name in names(out) if re.fullmatch(r"checkpoint-\d+", name))
    assert names(out / checkpoint) == ADAPTER_FILES | STATE_FILES | {MANIFEST}
    assert f"saved in {out}/{checkpoint}" in log
    assert "Traceback" not in log


def test_incomplete_checkpoint_is_passed_over(flags, tmp_path, capfd):
    supervised_finetuning.main(flags())
    (tmp_path / "out" / "checkpoint-4" / "optimizer.pt").unlink()
    supervised_finetuning.main([*flags(max_steps=6), "--resume_from_checkpoint", "True"])
    log = capfd.readouterr().err
    assert re.search(r"checkpoint-4 is not complete \(without optimizer\) and is skipped", log)
    assert re.search(r"resuming from .*checkpoint-2", log)
    assert max(logged(tmp_path / "out")) == 6


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_finished_run_started_again_changes_nothing_and_says_so(flags, tmp_path, capfd):
    argv = [*flags(max_steps=2), "--resume_from_checkpoint", "True"]  # ends within an epoch
    supervised_finetuning.main(argv)
    before = contents(tmp_path / "out")
    supervised_finetuning.main([*argv, "--overwrite_output_dir", "True"])
    assert contents(tmp_path / "out") == before
    log = capfd.readouterr().err
    assert re.search(r"holds a finished run \(2 steps\): nothing is trained", log)
    assert "nothing is overwritten, because --resume_from_checkpoint goes on" in log
    # The same run in other batches; what it learned depends on neither.
    in_other_batches = flags(max_steps=2, per_device_train_batch_size=1, gradient_accumulation_steps=4, logging_steps=2)
    assert supervised_finetuning.main([*in_other_batches, "--resume_from_checkpoint", "True"]) == {}
    other = "is finished, with other flags: --lora_rank 4 (not given then), --max_steps 1 (2 then); give those; train "
    with pytest.raises(UserError, match=re.escape(f"the run in {tmp_path / 'out'} {other}")):
        supervised_finetuning.main([*flags(max_steps=1, lora_rank=4), "--resume_from_checkpoint", "True"])
    assert contents(tmp_path / "out") == before
    supervised_finetuning.main([*flags(max_steps=5), "--resume_from_checkpoint", "True"])
    assert max(logged(tmp_path / "out")) == 5  # more steps than it had: it goes on


@pytest.mark.parametrize("use_peft", [True, False])
def test_a_run_is_not_resumed_from_a_stage_before_that_was_trained_again(flags, tmp_path, use_peft):
    first = {"output_dir": tmp_path / "first", "max_steps": 1, "use_peft": use_peft}
    supervised_finetuning.main(flags(**first))
    argv = flags(model_name_or_path=tmp_path / "first/checkpoint-best", max_steps=2, resume_from_checkpoint=True)
    supervised_finetuning.main(argv)
    assert supervised_finetuning.main(argv) == {}
    before = contents(tmp_path / "out")
    supervised_finetuning.main(flags(**first, seed=7, overwrite_output_dir=True))
    message = rf"the run in {tmp_path}/out started from other weights than {tmp_path}/first/checkpoint-best has now; "
    for steps in (2, 4):
        with pytest.raises(UserError, match=message):
            supervised_finetuning.main([*argv, "--max_steps", str(steps)])
    assert contents(tmp_path / "out") == before


def test_resume_refuses_what_the_optimizer_would_keep(flags, tmp_path, monkeypatch):
    supervised_finetuning.main(flags(max_steps=2))
    before = contents(tmp_path / "out")
    monkeypatch.setattr(supervised_finetuning, "load_for_training", lambda *a, **k: pytest.fail("a model was loaded"))
    changes = {"learning_rate": (1e-5, r"0\.001, and a resumed run"), "weight_decay": (0.1, r"0\.0")}
    changes["optim"] = ("adafactor", "adamw")
    for flag, (value, was) in changes.items():
        for where in (tmp_path / "out/checkpoint-2", True):
            with pytest.raises(UserError, match=rf"^--{flag} {value}: the run in .*out was started with {was}"):
                supervised_finetuning.main(flags(max_steps=4, resume_from_checkpoint=where, **{flag: value}))
    assert contents(tmp_path / "out") == before


def test_resume_refuses_other_data(flags, write_jsonl):
    supervised_finetuning.main(flags(max_steps=2, do_eval=None))
    write_jsonl("data/more.jsonl", make_dialogues(30)[24:])
    with pytest.raises(UserError, match=r"^rows of training data 30: the run in .* was started with 24"):
        supervised_finetuning.main(flags(max_steps=4, do_eval=None, resume_from_checkpoint=True))


def test_resume_without_a_checkpoint_starts_anew(flags, capfd):
    supervised_finetuning.main([*flags(max_steps=1), "--resume_from_checkpoint", "True"])
    assert re.search(r"--resume_from_checkpoint True: no checkpoint in .* yet", capfd.readouterr().err)


# ---------------------------------------------------------------- the guide's command, and learning


@pytest.mark.slow
def test_guide_command_with_two_processes(tiny_model_dir, tmp_path):
    out = tmp_path / "outputs-sft-qwen2.5-3b"
    here = f"--model_name_or_path {tiny_model_dir} --output_dir {out} --cache_dir {tmp_path / 'cache'}".split()
    argv = [*GUIDE_SFT.split(), *here, "--max_train_samples", "500"]
    finished = run_process("supervised_finetuning.py", argv, n_processes=2, CUDA_VISIBLE_DEVICES="0,1")
    assert finished.returncode == 0, finished.stderr[-3000:]
    assert names(out / "checkpoint-best") == ADAPTER_FILES
    log = finished.stderr
    assert "2 process(es) on the CPU" in log
    assert "= 64 rows a step" in log
    assert "instead of --bf16, --torch_dtype bfloat16, --device_map auto, CUDA_VISIBLE_DEVICES=0,1" in log
    # One process speaks, in lines: nothing twice, and no progress bar in a log.
    assert log.count("supervised fine-tuning: 2 process(es)") == 1
    assert "\r" not in log


@pytest.mark.slow
def test_fifty_dialogues_are_learned_by_heart(flags, write_jsonl, tmp_path):
    records = make_dialogues(50)
    data = write_jsonl("fifty/dialogues.jsonl", records).parent
    argv = flags(
        train_file_dir=data,
        validation_file_dir=None,
        do_eval=None,
        use_peft=False,
        template_name="qwen",
        max_steps=None,
        num_train_epochs=60,
        per_device_train_batch_size=10,
        gradient_accumulation_steps=1,
        learning_rate=3e-3,
        warmup_ratio=0.05,
        lr_scheduler_type="cosine",
        save_strategy="no",
    )
    supervised_finetuning.main(argv)
    best = tmp_path / "out" / "checkpoint-best"
    history = logged(tmp_path / "out")
    assert history[max(history)] < 0.1
    model, tokenizer = AutoModelForCausalLM.from_pretrained(best), AutoTokenizer.from_pretrained(best)
    end_token = tokenizer.convert_tokens_to_ids("<|im_end|>")
    for record in records:
        question, answer = (turn["value"] for turn in record["conversations"])
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        generated = model.generate(**prompt, max_new_tokens=80, do_sample=False)[0, prompt["input_ids"].shape[1] :]
        assert generated[-1] == end_token, f"{question}: did not stop"
        assert tokenizer.decode(generated[:-1]) == answer


def test_packing_leaves_the_cache_of_tokenized_data_whole(flags, tmp_path, capfd):
    """`datasets` writes what a cached dataset is mapped to beside it."""
    for cached in (False, True):
        supervised_finetuning.main(flags(packing=True, max_steps=1, overwrite_output_dir=True))
        assert ("from the cache" in capfd.readouterr().err) is cached
