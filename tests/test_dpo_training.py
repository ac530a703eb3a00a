"""The DPO stage: its losses and reference, the lineage of its adapter, what it leaves, how it resumes, its errors."""

import json
import math
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset
from guide import GUIDE_DPO
from stage_runs import (
    ADAPTER_FILES,
    PARTS,
    RESULTS,
    STATE_FILES,
    load_for_training,
    logged,
    logits_of,
    names,
    run_process,
    stage_flags,
    train_sft,
    weights_of,
)
from tiny_families import save_tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import dpo_training
import merge_peft_adapter
import pretraining
from dpo_training import DegenerationAlarm, GreedySamples, relative_fall
from medtune.errors import UserError
from medtune.models.adapters import load_with_adapter
from medtune.models.generation import Reply
from medtune.models.lineage import read_lineage
from medtune.reading.tokenization import load_chat_template
from medtune.training import preference_trainer, reference
from medtune.training.batches import PairCollator
from medtune.training.checkpoints import MANIFEST
from medtune.training.preference_arguments import PreferenceConfig
from medtune.training.preference_trainer import PreferenceTrainer
from medtune.training.reference import copy_adapter

SIGNS = ["疼", "痒", "肿", "麻"]
LN2 = math.log(2)


def make_pairs(n_pairs: int) -> list[dict]:
    """Pairs in the guide's form, of many lengths."""
    return [
        {
            "system": "",
            "history": [["你好", "请说。"]] * (index % 3),
            "question": f"第{index}个病人{PARTS[index % 8]}{SIGNS[index % 4]}怎么办？",
            "response_chosen": f"{PARTS[index % 8]}{SIGNS[index % 4]}请就诊，注意休息。",
            "response_rejected": "不用管它，喝点酒就好。" + "会过去的。" * (index % 4),
        }
        for index in range(n_pairs)
    ]


@pytest.fixture
def data_dir(write_jsonl) -> Path:
    return write_jsonl("data/pairs.jsonl", make_pairs(24)).parent


@pytest.fixture
def flags(sft_adapter, data_dir, tmp_path):
    """A function that gives a short run's flags."""

    def build(**changes) -> list[str]:
        return stage_flags(
            "dpo", sft_adapter, tmp_path, **{"train_file_dir": data_dir, "max_target_length": 64} | changes
        )

    return build


@pytest.fixture
def trainers(monkeypatch) -> list[PreferenceTrainer]:
    """The trainers of the runs that ended, in their order."""
    kept = []
    finish = dpo_training.finish_run
    monkeypatch.setattr(
        dpo_training,
        "finish_run",
        lambda trainer, *args, **kwargs: kept.append(trainer) or finish(trainer, *args, **kwargs),
    )
    return kept


@pytest.fixture(scope="module")
def sft_model(tiny_model_dir, tmp_path_factory) -> Path:
    """A model of its own. Read only."""
    return train_sft(tmp_path_factory.mktemp("full"), tiny_model_dir, "--use_peft", "False")


@torch.no_grad()
def plain_logps(model: torch.nn.Module, prompt: list[int], reply: list[int]) -> list[float]:
    """The log-prob of each token of a reply, from the logits alone."""
    logits = model.eval()(input_ids=torch.tensor([prompt + reply])).logits[0].double()
    logps = logits.log_softmax(dim=-1)[len(prompt) - 1 : -1]
    return [logps[position, token].item() for position, token in enumerate(reply)]


def log1pexp(value: float) -> float:
    return math.log1p(math.exp(value))


# ---------------------------------------------------------------- losses

ROW = {"prompt_ids": [20, 21, 22, 23], "chosen_ids": [30, 31, 32], "rejected_ids": [40, 41], "source": "d.jsonl:1"}


@pytest.fixture
def make_trainer(tiny_model_dir, tiny_tokenizer, tmp_path):
    def make(**options) -> PreferenceTrainer:
        args = PreferenceConfig(
            **{"output_dir": str(tmp_path / "out"), "do_train": True, "use_cpu": True, "bf16": False, "report_to": []},
            gradient_checkpointing=False,
            max_steps=1,
            **options,
        )
        return PreferenceTrainer(
            model=load_for_training(str(tiny_model_dir), use_peft=True),
            args=args,
            data_collator=PairCollator(tiny_tokenizer.pad_token_id),
            train_dataset=Dataset.from_list([ROW | {"length": 7}]),
            processing_class=tiny_tokenizer,
        )

    return make


def loss_at(trainer: PreferenceTrainer, chosen_ratio: float, rejected_ratio: float) -> torch.Tensor:
    """The loss of ROW where the log-ratios of its replies have these values."""
    batch = trainer.data_collator([ROW])
    ref_logps = trainer.reply_logps(trainer.model, batch).detach() - torch.tensor([chosen_ratio, rejected_ratio])
    (loss,), _ = trainer.losses_and_figures(trainer.model, batch, ref_logps)
    return loss


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        # log-ratios +2 (3 tokens) and -1 (2 tokens), beta 0.1: the margin of the rewards is 0.3
        ({}, 0.5543552),  # ln(1 + e^-0.3)
        ({"beta": 1.0}, 0.0485874),  # ln(1 + e^-3)
        ({"loss_type": ["hinge"]}, 0.7),  # 1 - 0.3
        ({"loss_type": ["ipo"]}, 14.6944444),  # (2/3 + 1/2 - 1 / 0.2)^2
        ({"loss_type": ["robust"], "label_smoothing": 0.1}, 0.5168552),  # (0.9 x 0.5543552 - 0.1 x 0.8543552) / 0.8
        ({"loss_type": ["sigmoid", "hinge"], "loss_weights": [1.0, 0.5]}, 0.9043552),
    ],
    ids=str,
)
def test_loss_worked_by_hand(make_trainer, options, expected):
    assert loss_at(make_trainer(**options), 2.0, -1.0).item() == pytest.approx(expected, abs=2e-5)


@pytest.mark.parametrize("loss_type", ["orpo", "simpo"])
def test_orpo_and_simpo_worked_by_hand(make_trainer, loss_type):
    trainer = make_trainer(loss_type=[loss_type])
    chosen, rejected = (
        float(np.mean(plain_logps(trainer.model, ROW["prompt_ids"], ROW[f"{name}_ids"])))
        for name in ("chosen", "rejected")
    )
    batch = trainer.data_collator([ROW])
    trainer.note_step([batch])
    loss = trainer.compute_loss(trainer.model, batch).item()
    if loss_type == "simpo":
        expected = log1pexp(-(2.0 * (chosen - rejected) - 1.0))
    else:
        whole = plain_logps(trainer.model, ROW["prompt_ids"][:1], ROW["prompt_ids"][1:] + ROW["chosen_ids"])
        odds = [logp - math.log1p(-math.exp(logp)) for logp in (chosen, rejected)]
        expected = -np.mean(whole) + 0.1 * log1pexp(odds[1] - odds[0])
    assert loss == pytest.approx(expected, abs=1e-5)


def test_loss_that_is_not_finite_names_the_records(flags, monkeypatch):
    monkeypatch.setattr(preference_trainer, "sigmoid_losses", lambda chosen, *_: chosen * math.nan)
    with pytest.raises(UserError, match=r"^step 1: the loss is nan at .* on .*pairs\.jsonl:\d+, .*--learning_rate"):
        dpo_training.main(flags(max_bad_steps=1))


# ---------------------------------------------------------------- the reference


def test_experts_add_no_router_loss(flags, tmp_path, tiny_model_dir):
    """The policy is the reference, so the loss of the first step is ln 2 and nothing more."""
    model = save_tiny_model("qwen3_moe", tmp_path / "moe", tiny_model_dir)
    adapter = train_sft(tmp_path / "sft", model, "--lora_dropout", "0", "--target_modules", "all")
    dpo_training.main(
        flags(model_name_or_path=adapter, target_modules="all", lora_dropout=0, max_steps=1, save_strategy="no")
    )
    assert logged(tmp_path / "out")[1] == pytest.approx(math.log(2), abs=1e-5)


@pytest.mark.parametrize(
    ("start", "precompute"),
    [
        *(("sft_adapter", False), ("sft_adapter", True), ("tiny_model_dir", False), ("sft_model", False)),
        *(("full weights", False), ("full weights", True)),
    ],
)
def test_policy_starts_as_the_reference(flags, request, tmp_path, capfd, start, precompute):
    path = request.getfixturevalue("sft_model" if start == "full weights" else start)
    peft = {"use_peft": False} if start == "full weights" else {}
    dpo_training.main(flags(model_name_or_path=path, max_steps=1, precompute_ref_log_probs=precompute, **peft))
    log = capfd.readouterr().err
    named = {
        "sft_adapter": f"a frozen copy of the adapter {path} on",
        "tiny_model_dir": f"the base model {path} without the new adapter",
        "sft_model": f"the base model {path} without the new adapter",
        "full weights": f"a frozen second copy of {path}",
    }[start]
    assert re.search(rf"reference +{re.escape(named)}", log)
    (gap,) = re.findall(
        r"before step 1 the policy is the reference .*\|logp - ref_logp\| of 4 replies is (\S+) nats", log
    )
    assert float(gap) < 1e-4
    assert logged(tmp_path / "out")[1] == pytest.approx(LN2, abs=5e-5)


def test_no_adapter_has_dropout(flags, capfd):
    """Neither the policy's nor the reference's, and the log speaks of none that draws."""
    dpo_training.main(flags(max_steps=1, lora_dropout=0.3))
    log = capfd.readouterr().err
    assert "joined into one without padding" in log
    assert "dropout draws other numbers" not in log


def test_reference_that_is_silently_the_base_stops_the_run(flags, monkeypatch):
    def forget(model) -> None:
        copy_adapter(model)
        for name, weights in model.named_parameters():
            if ".lora_B.ref." in name:
                weights.data.zero_()

    monkeypatch.setattr(preference_trainer, "copy_adapter", forget)
    line = r"^before step 1 the policy is not the reference \(a frozen copy .*0\.000\d+ is allowed"
    with pytest.raises(UserError, match=line):
        dpo_training.main(flags())


def test_stored_log_probs_of_another_model_stop_the_run(flags, tiny_model_dir, monkeypatch):
    monkeypatch.setattr(reference, "reference_fingerprint", lambda model: "the same for all")
    dpo_training.main(flags(max_steps=1, precompute_ref_log_probs=True))
    other = {"model_name_or_path": tiny_model_dir, "overwrite_output_dir": True, "max_steps": 1}
    with pytest.raises(UserError, match=r"before step 1 .*--overwrite_cache True computes the stored log-probs again"):
        dpo_training.main(flags(precompute_ref_log_probs=True, **other))
    dpo_training.main(flags(precompute_ref_log_probs=True, overwrite_cache=True, **other))


def test_reference_does_not_move(flags, sft_adapter, trainers):
    dpo_training.main(flags(learning_rate=1e-2))
    start, policy = weights_of(sft_adapter), weights_of(Path(trainers[0].args.output_dir, "checkpoint-best"))
    state = trainers[0].model.state_dict()
    for name, weights in start.items():
        stem, _, kind = name.rpartition(".")
        assert torch.equal(state[f"{stem}.ref.{kind}"], weights)
        assert not torch.equal(policy[name], weights)


def test_stored_log_probs_are_used_again_and_give_the_same_run(flags, tmp_path, tiny_model_dir, capfd):
    stored = {"precompute_ref_log_probs": True, "do_eval": True, "eval_steps": 2}
    dpo_training.main(flags(output_dir=tmp_path / "live", **stored | {"precompute_ref_log_probs": False}))
    capfd.readouterr()
    dpo_training.main(flags(output_dir=tmp_path / "first", **stored))
    log = capfd.readouterr().err
    assert re.search(r"reference log-probs of 22 train pairs: computed now, kept in .*cache/ref_logps/\w{32}\.npy", log)
    # Other rates, steps and accumulation change neither data nor reference.
    dpo_training.main(flags(output_dir=tmp_path / "second", beta=0.2, learning_rate=1e-4, max_steps=1, **stored))
    log = capfd.readouterr().err
    assert re.search(r"reference log-probs of 22 train pairs: from .*\.npy", log)
    assert re.search(r"reference log-probs of 2 eval pairs: from .*\.npy", log)
    assert len(re.findall(r"(?:train|eval) tokens .*, from the cache", log)) == 2
    assert logged(tmp_path / "first") == pytest.approx(logged(tmp_path / "live"), abs=1e-5)
    assert logged(tmp_path / "first", "eval_loss") == pytest.approx(logged(tmp_path / "live", "eval_loss"), abs=1e-5)
    for changes in ({"model_name_or_path": tiny_model_dir}, {"max_target_length": 12}):
        dpo_training.main(flags(max_steps=1, overwrite_output_dir=True, **stored | changes))
        assert "train pairs: computed now" in capfd.readouterr().err
    assert len(list((tmp_path / "cache/ref_logps").iterdir())) == 6


# ---------------------------------------------------------------- adapter lineage


def test_adapter_on_the_original_base_is_the_trained_policy(flags, tmp_path, tiny_model_dir, sft_adapter, trainers):
    dpo_training.main(flags(learning_rate=1e-2))
    best = tmp_path / "out/checkpoint-best"
    trained = logits_of(trainers[0].model)
    policy = load_with_adapter(str(tiny_model_dir), str(best), torch_dtype="float32")
    torch.testing.assert_close(logits_of(policy), trained, atol=1e-5, rtol=0)
    before = load_with_adapter(str(tiny_model_dir), str(sft_adapter), torch_dtype="float32")
    assert (logits_of(before) - trained).abs().max() > 0.1
    lineage = read_lineage(best)
    assert (lineage.base_model, lineage.parent, lineage.stage) == (str(tiny_model_dir), str(sft_adapter), "dpo")
    merged = tmp_path / "merged"
    merge_peft_adapter.main(
        f"--base_model {tiny_model_dir} --lora_model {best} --output_dir {merged} --torch_dtype float32".split()
    )
    torch.testing.assert_close(logits_of(AutoModelForCausalLM.from_pretrained(merged)), trained, atol=1e-4, rtol=0)


def test_what_sft_learned_is_still_there(flags, tmp_path, tiny_model_dir, sft_adapter):
    dpo_training.main(flags(learning_rate=0, max_steps=2))
    before, after = (
        logits_of(load_with_adapter(str(tiny_model_dir), str(folder), torch_dtype="float32"))
        for folder in (sft_adapter, tmp_path / "out/checkpoint-best")
    )
    assert torch.equal(after, before)
    base = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
    assert (logits_of(base) - before).abs().max() > 0.1


def test_chain_of_pretraining_sft_and_dpo(flags, tmp_path, tiny_model_dir, trainers):
    text = tmp_path / "documents.txt"
    text.write_text("\n".join(f"{part}疼时请休息，三天不好请就诊。" for part in PARTS), encoding="utf-8")
    options = "--do_train --max_steps 2 --learning_rate 1e-2 --gradient_checkpointing False --block_size 32"
    files = f"--train_file_dir {text} --output_dir {tmp_path / 'pt'} --cache_dir {tmp_path / 'cache'}"
    pretraining.main(f"--model_name_or_path {tiny_model_dir} {options} {files}".split())
    pt_adapter = tmp_path / "pt/checkpoint-best"
    adapter = train_sft(tmp_path / "sft", pt_adapter)
    dpo_training.main(flags(model_name_or_path=adapter))
    best = tmp_path / "out/checkpoint-best"
    assert read_lineage(adapter).parent == str(pt_adapter)
    assert (read_lineage(best).base_model, read_lineage(best).parent) == (str(tiny_model_dir), str(adapter))
    policy = load_with_adapter(str(tiny_model_dir), str(best), torch_dtype="float32")
    torch.testing.assert_close(logits_of(policy), logits_of(trainers[0].model), atol=1e-5, rtol=0)
    trainers[0].model.set_adapter("ref")
    started = load_with_adapter(str(tiny_model_dir), str(adapter), torch_dtype="float32")
    torch.testing.assert_close(logits_of(trainers[0].model), logits_of(started), atol=1e-5, rtol=0)


def test_adapter_on_a_full_sft_model(flags, tmp_path, sft_model, trainers):
    dpo_training.main(flags(model_name_or_path=sft_model))
    best = tmp_path / "out/checkpoint-best"
    assert names(best) == ADAPTER_FILES
    assert (read_lineage(best).base_model, read_lineage(best).parent) == (str(sft_model), None)
    policy = load_with_adapter(str(sft_model), str(best), torch_dtype="float32")
    torch.testing.assert_close(logits_of(policy), logits_of(trainers[0].model), atol=1e-5, rtol=0)


def test_full_weights_leave_a_model_of_its_own(flags, tmp_path, sft_model, trainers):
    dpo_training.main(flags(model_name_or_path=sft_model, use_peft=False, max_steps=2))
    best = tmp_path / "out/checkpoint-best"
    assert {"config.json", "model.safetensors", "tokenizer.json", "lineage.json"} <= names(best)
    assert "adapter_config.json" not in names(best)
    model, before = (AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32) for path in (best, sft_model))
    torch.testing.assert_close(logits_of(model), logits_of(trainers[0].model), atol=1e-5, rtol=0)
    assert not torch.equal(logits_of(model), logits_of(before))
    assert torch.equal(logits_of(trainers[0].reference.model), logits_of(before))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora_rank": 8}, r"^--lora_rank 8: the adapter in .* has 16, and training continues it"),
        ({"target_modules": "q_proj,v_proj"}, r"^--target_modules q_proj,v_proj: the adapter in .* has "),
        ({"use_peft": False}, r"is a LoRA adapter and --use_peft False trains full weights"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_adapter_of_another_shape_is_refused(flags, changes, message):
    with pytest.raises(UserError, match=message):
        dpo_training.main(flags(**changes))


def test_wrong_base_is_refused(flags, tmp_path, tiny_model_dir):
    from build_tiny_model import write_tiny_model
    from conftest import TEXTS, TINY_HEADS

    dpo_training.main(flags(max_steps=1, save_strategy="no"))
    other = tmp_path / "other"
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    write_tiny_model(other, TEXTS * 2, vocab_size=600, **shape, **TINY_HEADS)
    with pytest.raises(UserError, match=r"^--base_model .*hidden size 64.* is not the base of"):
        load_with_adapter(str(other), str(tmp_path / "out/checkpoint-best"))
    sibling = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    sibling.model.layers[1].mlp.up_proj.weight.data *= 1.01
    sibling.save_pretrained(tmp_path / "sibling")
    with pytest.raises(UserError, match=r"^--base_model .*sibling is not the base of .* the weights are others"):
        load_with_adapter(str(tmp_path / "sibling"), str(tmp_path / "out/checkpoint-best"))


# ---------------------------------------------------------------- what a run leaves


@pytest.mark.parametrize("loss_type", ["sigmoid", "orpo", "simpo"])
def test_a_run_leaves_exactly_these_files(flags, tmp_path, sft_adapter, tiny_model_dir, loss_type, capfd):
    metrics = dpo_training.main(flags(do_eval=True, eval_steps=2, loss_type=loss_type))
    out = tmp_path / "out"
    assert names(out) == {"checkpoint-2", "checkpoint-4", "checkpoint-best"} | RESULTS
    assert names(out / "checkpoint-best") == ADAPTER_FILES
    assert names(out / "checkpoint-4") == ADAPTER_FILES | STATE_FILES | {MANIFEST}
    assert json.loads((out / "eval_results.json").read_text()) == pytest.approx(metrics)
    wanted = {"reward_accuracy", "reward_margin", "chosen_logps", "rejected_logps", "samples_ended", "loss"}
    assert {f"eval_{name}" for name in wanted} <= metrics.keys()
    lineage = read_lineage(out / "checkpoint-best")
    assert (lineage.base_model, lineage.parent, lineage.template) == (str(tiny_model_dir), str(sft_adapter), "qwen")
    before, after = weights_of(sft_adapter), weights_of(out / "checkpoint-best")
    assert before.keys() == after.keys()
    assert all(not torch.equal(before[name], after[name]) for name in before)
    log = capfd.readouterr().err
    assert re.search(r"step 2/4  evaluation: loss \S+  reward_accuracy \S+  reward_margin \S+  chosen_logps ", log)
    assert log.count("sample for ") == 2 * 2  # two questions, two evaluations
    assert re.search(r"next: \S+ inference\.py --base_model .*--lora_model .*checkpoint-best", log)
    assert re.search(rf"reference +{'none: ' + loss_type if loss_type != 'sigmoid' else 'a frozen copy'}", log)


def test_evaluation_is_of_pairs_not_of_batches(flags, tmp_path, write_jsonl, tiny_model_dir, sft_adapter):
    """Three pairs in batches of two, from logits alone."""
    data = write_jsonl("eval/pairs.jsonl", make_pairs(30)[24:27])
    metrics = dpo_training.main(flags(do_eval=True, eval_steps=4, validation_file_dir=data, learning_rate=1e-2))
    tokenizer = AutoTokenizer.from_pretrained(sft_adapter)
    template = load_chat_template(tokenizer, "qwen")
    policy, reference = (
        load_with_adapter(str(tiny_model_dir), str(folder), torch_dtype="float32")
        for folder in (tmp_path / "out/checkpoint-best", sft_adapter)
    )
    chosen, rejected, margins = [], [], []
    for pair in make_pairs(30)[24:27]:
        turns = [("user", pair["question"])]
        for question, answer in reversed(pair["history"]):
            turns = [("user", question), ("assistant", answer), *turns]
        prompt = tokenizer(
            template.prompt([{"role": role, "content": text} for role, text in turns], None), add_special_tokens=False
        )["input_ids"]
        ratios = []
        for name, kept in (("response_chosen", chosen), ("response_rejected", rejected)):
            reply = tokenizer(pair[name] + "<|im_end|>", add_special_tokens=False)["input_ids"]
            kept.append(sum(plain_logps(policy, prompt, reply)))
            ratios.append(kept[-1] - sum(plain_logps(reference, prompt, reply)))
        margins.append(0.1 * (ratios[0] - ratios[1]))
    assert metrics["eval_chosen_logps"] == pytest.approx(np.mean(chosen), abs=1e-3)
    assert metrics["eval_rejected_logps"] == pytest.approx(np.mean(rejected), abs=1e-3)
    assert metrics["eval_reward_margin"] == pytest.approx(np.mean(margins), abs=1e-3)
    assert metrics["eval_reward_accuracy"] == pytest.approx(np.mean([margin > 0 for margin in margins]), abs=1e-6)
    assert metrics["eval_loss"] == pytest.approx(np.mean([log1pexp(-margin) for margin in margins]), abs=1e-4)


@pytest.mark.parametrize("flag", ["load_in_4bit", "load_in_8bit"])
def test_quantized_base_trains_an_adapter_in_float32(flags, tmp_path, flag):
    dpo_training.main(flags(**{flag: True}, max_steps=2))
    weights = weights_of(tmp_path / "out/checkpoint-best")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}


@pytest.mark.parametrize(
    "options",
    [
        {"gradient_checkpointing": True, "group_by_length": True, "remove_unused_columns": False},
        {"loss_type": ["sigmoid", "sft", "ipo"], "loss_weights": [1, 0.5, 0.1]},
        {"loss_type": "robust", "label_smoothing": 0.1},
        {"loss_type": "orpo", "gradient_checkpointing": True, "remove_unused_columns": False},
    ],
    ids=lambda options: "-".join(options),
)
def test_option_trains(flags, tmp_path, options):
    dpo_training.main(flags(**options, max_steps=2))
    losses = logged(tmp_path / "out")  # of robust they may be below 0
    assert len(losses) == 2
    assert all(math.isfinite(loss) for loss in losses.values())
    assert losses[1] != losses[2]


# ---------------------------------------------------------------- samples and alarms


def test_samples_are_eight_different_questions(tiny_model_dir, tiny_tokenizer, monkeypatch, capfd):
    rows = [{"prompt_ids": [index // 2], "source": f"d.jsonl:{index}"} for index in range(24)]
    texts = ["头疼请休息。", "请就诊请就诊请就诊请就诊请就诊请就诊请就诊"] * 4
    replies = [Reply(text, ended=index < 6, n_tokens=9) for index, text in enumerate(texts)]
    asked = []
    monkeypatch.setattr(
        dpo_training, "generate_replies", lambda model, tokenizer, prompts, *args: asked.append(prompts) or replies
    )
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    samples = GreedySamples(Dataset.from_list(rows), tokenizer, load_chat_template(tokenizer, "qwen"), 1000)
    assert samples.decoding.max_new_tokens == dpo_training.SAMPLE_TOKENS
    assert samples.decoding.temperature == 0
    metrics = samples(None)
    assert asked == [[[index] for index in range(8)]]
    assert metrics["samples_ended"] == 0.75
    assert metrics["samples_repeating"] == 4
    assert 0.3 < metrics["sample_repetition"] < 0.5


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([-100, -101, -102], None),  # too few
        ([-100, -104, -108, -112], 0.12),
        ([-50, -100, -104, -108, -112], 0.12),  # of the last three steps
        ([-100, -104, -103, -112], None),
        ([-100, -104, -104, -112], None),
    ],
)
def test_fall(values, expected):
    assert relative_fall(values) == (None if expected is None else pytest.approx(expected))


@pytest.fixture
def warnings_of():
    """The warnings at the last of some evaluations, given by their mean chosen log-probs."""
    from loguru import logger

    def warn(chosen_logps: list[float], n_repeating: int = 0, **args) -> list[str]:
        lines = []
        sink = logger.add(lambda message: lines.append(message.record["message"]), level="WARNING")
        history = [{"eval_chosen_logps": value, "eval_chosen_reward": 0.1 * (value + 100)} for value in chosen_logps]
        state = SimpleNamespace(log_history=history, global_step=9)
        args = SimpleNamespace(**{"has_reference": True, "beta": 0.1} | args)
        DegenerationAlarm().on_evaluate(args, state, None, metrics={"eval_samples_repeating": n_repeating})
        logger.remove(sink)
        return lines

    return warn


def test_alarm_when_chosen_log_probs_fall_steadily(warnings_of):
    # The reference, where the policy started, stood at -100.
    (line,) = warnings_of([-103, -106, -110])
    assert line.startswith("step 9: the chosen replies become less likely from evaluation to evaluation")
    assert "(log-probs -100.0, -103.0, -106.0, -110.0)" in line
    assert warnings_of([-103, -106, -110], has_reference=False) == []
    assert warnings_of([-100.1, -100.2, -100.3]) == []
    assert warnings_of([-103, -102, -110]) == []


def test_alarm_when_samples_repeat_themselves(warnings_of):
    assert warnings_of([-100], n_repeating=1) == []
    (line,) = warnings_of([-100], n_repeating=2)
    assert line.startswith("step 9: 2 samples repeat themselves")


def test_alarm_rings_in_a_run(flags, capfd):
    """At a rate that breaks it a tiny model babbles."""
    dpo_training.main(flags(do_eval=True, eval_steps=2, max_steps=8, learning_rate=3e-2, beta=5, max_target_length=256))
    log = capfd.readouterr().err
    assert re.search(r"WARNING.*(samples repeat themselves|become less likely)", log)


# ---------------------------------------------------------------- what is refused


BAD_PAIRS = {
    "no rejected reply": ({"question": "头疼", "response_chosen": "休息"}, r"d\.jsonl:1: "),
    "same replies": (
        {"question": "头疼", "response_chosen": "休息", "response_rejected": "休息"},
        r"d\.jsonl:1: same replies",
    ),
    "dialogue": (
        {"conversations": [{"from": "human", "value": "头疼"}, {"from": "gpt", "value": "好"}]},
        r"d\.jsonl:1: ",
    ),
}


@pytest.mark.parametrize("case", BAD_PAIRS)
def test_bad_data_stops_before_the_model_loads(flags, write_jsonl, monkeypatch, case):
    record, message = BAD_PAIRS[case]
    monkeypatch.setattr(dpo_training, "load_for_training", lambda *a, **k: pytest.fail("a model was loaded"))
    with pytest.raises(UserError, match=message):
        dpo_training.main(flags(train_file_dir=write_jsonl("bad/d.jsonl", [record])))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"beta": 0}, r"^--beta 0: it holds the policy to the reference"),
        ({"beta": -0.1}, r"^--beta -0\.1: "),
        ({"loss_type": "sigmiod"}, r"^--loss_type sigmiod: not known; did you mean sigmoid\?"),
        ({"loss_type": "kto_pair"}, r"^--loss_type kto_pair: not known"),
        ({"loss_type": ["sigmoid", "orpo"]}, r"^--loss_type sigmoid orpo: it stands alone .*another --loss_type"),
        ({"loss_type": "simpo", "precompute_ref_log_probs": True}, r"leave out --precompute_ref_log_probs"),
        ({"loss_type": ["kto", "sft"]}, r"^--loss_type kto sft: it stands alone; leave out another --loss_type"),
        ({"loss_type": "kto", "undesirable_weight": 0}, r"^--undesirable_weight 0: give a number above 0"),
        ({"desirable_weight": 2}, r"^--desirable_weight: --loss_type sigmoid has no use for it; kto does"),
        ({"loss_type": ["sigmoid", "sft"], "loss_weights": [1]}, r"^--loss_weights: 1 for 2 losses"),
        ({"loss_weights": [0]}, r"^--loss_weights 0: give numbers above 0"),
        ({"label_smoothing": 0.1}, r"^--label_smoothing: --loss_type sigmoid has no use for it"),
        ({"label_smoothing": 0.5, "loss_type": "robust"}, r"^--label_smoothing 0\.5: give a share"),
        ({"label_smoothing_factor": 0.1}, r"^--label_smoothing_factor: pairs have no labels"),
        (
            {"loss_type": "exo_pair"},
            r"^--loss_type exo_pair: was removed; take sigmoid, or another of sigmoid, hinge, ",
        ),
        (
            {"loss_type": "sigmoid,sft"},
            r"^--loss_type sigmoid,sft: several are given with blanks: --loss_type sigmoid s",
        ),
        ({"loss_weights": "1, 0.5"}, r"^--loss_weights 1, 0\.5: several are given with blanks: --loss_weights 1 0\.5$"),
        ({"ld_alpha": 0.5}, r"^--ld_alpha was removed: --loss_type simpo takes the length"),
        ({"f_divergence_type": "reverse_kl"}, r"^--f_divergence_type was removed: the reverse KL is always taken; le"),
        ({"loss_type": ["sft", "sft"]}, r"^--loss_type sft sft: one is named twice"),
        ({"use_weighting": True}, r"^--use_weighting was removed: leave it out"),
        ({"do_train": None, "do_eval": True}, r"^--do_eval without --do_train: .* compared with itself"),
        ({"do_train": None}, r"^neither --do_train nor --do_eval"),
        ({"max_target_length": 4}, r"^--max_target_length 4: too little"),
        ({"max_length": 100}, r"^--max_length is not a flag of this stage"),
        ({"sync_ref_model": True}, r"^--sync_ref_model is not a flag of this stage"),
        ({"train_file_dir": None}, r"^--train_file_dir is missing"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_wrong_flag_is_one_line(flags, monkeypatch, changes, message):
    monkeypatch.setattr(dpo_training, "load_for_training", lambda *a, **k: pytest.fail("a model was loaded"))
    with pytest.raises(UserError, match=message) as refused:
        dpo_training.main(flags(**changes))
    assert "\n" not in str(refused.value)


def test_length_limits_cut_and_are_counted(flags, write_jsonl, capfd):
    data = write_jsonl("long/pairs.jsonl", make_pairs(8))
    dpo_training.main(flags(train_file_dir=data, max_steps=1, max_source_length=64, max_target_length=12))
    log = capfd.readouterr().err
    n_cut, n_replies = map(int, re.search(r"train tokens .*?(\d+) of (\d+) replies cut at 12", log).groups())
    assert (n_replies, n_cut > 0) == (16, True)
    assert int(re.search(r"the longest prompt and reply (\d+)", log).group(1)) <= 76


# ---------------------------------------------------------------- single replies (KTO)


def make_feedback(n_rows: int) -> list[dict]:
    """Dialogues with a label, in two dialects; two of three replies are good ones."""
    rows = []
    for index, pair in enumerate(make_pairs(n_rows)):
        is_good = index % 3 != 2
        reply = pair["response_chosen"] if is_good else pair["response_rejected"]
        if index % 2:
            turns = [{"role": "user", "content": pair["question"]}, {"role": "assistant", "content": reply}]
            rows.append({"messages": turns, "label": is_good})
        else:
            turns = [{"from": "human", "value": pair["question"]}, {"from": "gpt", "value": reply}]
            rows.append({"conversations": turns, "kto_tag": is_good})
    return rows


@pytest.fixture
def feedback(write_jsonl) -> dict:
    """Flags of a run with KTO."""
    folder = write_jsonl("kto/rows.jsonl", make_feedback(24)).parent
    return {"loss_type": "kto", "train_file_dir": folder, "validation_file_dir": folder}


@pytest.mark.parametrize("precompute", [False, True])
def test_kto_learns_from_single_replies(flags, feedback, tmp_path, sft_adapter, capfd, precompute):
    options = {"do_eval": True, "eval_steps": 4, "max_steps": 8, "learning_rate": 3e-3, "desirable_weight": 1.5}
    metrics = dpo_training.main(flags(**feedback, **options, precompute_ref_log_probs=precompute))
    log = capfd.readouterr().err
    assert re.search(r"train replies +kept 22 of 22", log)
    assert re.search(r"train tokens .*; 1\d replies desirable, \d undesirable", log)
    assert re.search(r"the first reply, (un)?desirable, between « and »", log)
    assert re.search(r"before step 1 the policy is the reference .* of 2 replies is \S+ nats", log)
    losses = logged(tmp_path / "out")
    good = logged(tmp_path / "out", "kl")
    assert good[1] == pytest.approx(0, abs=1e-5)
    n_good = round((losses[1] / 0.5 - 1) / 0.5 * 4)  # of four replies; the good ones count 1.5
    assert losses[1] == pytest.approx(0.5 * (1.5 * n_good + 4 - n_good) / 4, abs=1e-5)
    assert {"eval_loss", "eval_kl", "eval_reward_accuracy", "eval_reward_margin"} <= metrics.keys()
    assert names(tmp_path / "out/checkpoint-best") == ADAPTER_FILES
    stored = tmp_path / "cache/ref_logps"
    assert (len(list(stored.iterdir())) if stored.exists() else 0) == (2 if precompute else 0)


def test_kto_needs_other_prompts(flags, write_jsonl):
    same = [{"question": "头疼", "answer": answer, "label": answer == "休息"} for answer in ("休息", "喝酒")]
    data = write_jsonl("same/rows.jsonl", same)
    with pytest.raises(
        UserError, match=r"^KTO sets replies against other prompts, and the 2 of a part have the same: add others"
    ):
        dpo_training.main(flags(loss_type="kto", train_file_dir=data))


# ---------------------------------------------------------------- interruption, several processes, the guide


@pytest.mark.parametrize("losses", [["sigmoid", "sft"], ["orpo"], ["kto"]], ids="-".join)
def test_steps_and_evaluations_are_the_same_however_they_are_cut(flags, write_jsonl, tmp_path, losses):
    """With replies of several lengths, for what is a mean over tokens, and a KL that is not clipped at each row."""
    rows = [pair | {"response_chosen": pair["response_chosen"] * (1 + n % 3)} for n, pair in enumerate(make_pairs(16))]
    rows = make_feedback(16) if losses == ["kto"] else rows
    data = {"train_file_dir": write_jsonl("train/rows.jsonl", rows[:8])}  # one step an epoch, of all rows
    data |= {"validation_file_dir": write_jsonl("eval/rows.jsonl", rows[8:])}
    options = data | {"loss_type": losses, "do_eval": True, "max_steps": 3, "learning_rate": 1e-2, "eval_steps": 3}
    for output, (batch, accumulation) in (("whole", (8, 1)), ("cut", (2, 4)), ("rows", (1, 8))):
        sizes = {"per_device_train_batch_size": batch, "per_device_eval_batch_size": batch}
        cut = {"gradient_accumulation_steps": accumulation, "output_dir": tmp_path / output}
        dpo_training.main(flags(**options | sizes | cut))
    for output in ("cut", "rows"):
        for name in ("loss", "grad_norm", "eval_loss"):
            whole = list(logged(tmp_path / "whole", name).values())
            assert list(logged(tmp_path / output, name).values()) == pytest.approx(whole, abs=2e-4, rel=2e-4)


@pytest.mark.parametrize("options", [{}, {"precompute_ref_log_probs": True}, {"loss_type": "kto"}], ids=str)
def test_resume_gives_the_losses_of_an_uninterrupted_run(flags, feedback, tmp_path, tiny_model_dir, options):
    options = (feedback if options.get("loss_type") == "kto" else options) | {
        "do_eval": True,
        "eval_steps": 2,
        "lr_scheduler_type": "cosine",
    }
    dpo_training.main(flags(output_dir=tmp_path / "whole", **options))
    dpo_training.main(flags(**options))
    (tmp_path / "out/loss.png").unlink()
    resumed = {"resume_from_checkpoint": tmp_path / "out/checkpoint-2"} | options
    with pytest.raises(
        UserError, match=rf"^the run in .*/out started from .*sft.* and not from {tiny_model_dir}; give that; train"
    ):
        dpo_training.main(flags(model_name_or_path=tiny_model_dir, **resumed))
    dpo_training.main(flags(**resumed))
    for name in ("loss", "eval_loss", "eval_chosen_logps", "reward_margin"):
        assert logged(tmp_path / "out", name) == logged(tmp_path / "whole", name)
    assert len(logged(tmp_path / "out")) == 4
    weights, expected = (weights_of(tmp_path / name / "checkpoint-best") for name in ("out", "whole"))
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


@pytest.mark.slow
@pytest.mark.parametrize("is_kto", [False, True])
def test_two_processes_give_the_losses_of_one(flags, feedback, tmp_path, is_kto):
    options = {"do_eval": True, "eval_steps": 2, "precompute_ref_log_probs": not is_kto} | (feedback if is_kto else {})
    one = {"output_dir": tmp_path / "one", "cache_dir": tmp_path / "other-cache"}
    dpo_training.main(flags(per_device_train_batch_size=2, **options, **one))
    finished = run_process("dpo_training.py", flags(per_device_train_batch_size=1, **options), n_processes=2)
    assert finished.returncode == 0, finished.stderr[-3000:]
    assert "2 process(es)" in finished.stderr
    assert finished.stderr.count("before step 1 the policy is the reference") == 1
    for name in ("loss", "eval_loss", "eval_reward_margin"):
        assert logged(tmp_path / "out", name) == pytest.approx(logged(tmp_path / "one", name), abs=1e-4)
    assert names(tmp_path / "out/checkpoint-best") == ADAPTER_FILES


def test_the_guides_command_as_it_stands(sft_adapter, data_dir, tmp_path):
    """Flag for flag; only model, data, folders and the number of steps are this machine's."""
    argv = [
        *f"{GUIDE_DPO} --max_source_length 1024 --max_target_length 512".split(),
        *f"--model_name_or_path {sft_adapter} --train_file_dir {data_dir} --validation_file_dir {data_dir}".split(),
        *f"--output_dir {tmp_path / 'out'} --cache_dir {tmp_path / 'cache'} --max_steps 2".split(),
    ]
    finished = run_process("dpo_training.py", argv, CUDA_VISIBLE_DEVICES="0,1")
    assert finished.returncode == 0, finished.stderr[-3000:]
    log = finished.stderr
    assert names(tmp_path / "out") == {"checkpoint-2", "checkpoint-best", "runs"} | RESULTS
    assert names(tmp_path / "out/checkpoint-best") == ADAPTER_FILES
    assert "instead of --bf16, --torch_dtype bfloat16, --device_map auto, CUDA_VISIBLE_DEVICES=0,1" in log
    assert "= 32 rows a step" in log
    assert "dropout                 off, not --lora_dropout 0.05" in log
    assert "\r" not in log
    assert "Warning" not in log
