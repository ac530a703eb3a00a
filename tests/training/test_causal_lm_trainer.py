"""The head on learned positions: its loss and gradients are the plain ones, however the rows are batched."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from tiny_families import tiny_model
from transformers import AutoModelForCausalLM, EvalPrediction, TrainerState, masking_utils

from medtune.errors import UserError
from medtune.models import logps
from medtune.models.router_loss import describe_router_loss
from medtune.training import stage_trainer
from medtune.training.causal_lm_trainer import (
    CausalLMConfig,
    CausalLMTrainer,
    Collator,
    loss_statistics,
)
from medtune.training.layout import PROBE_LENGTHS, TextsOfRow, moved_states
from medtune.training.stage_trainer import LongestFirstSampler
from supervised_finetuning import pack

IGNORED = torch.nn.CrossEntropyLoss().ignore_index


def make_rows(n_rows: int, seed: int = 0) -> Dataset:
    """Rows of 5 to 40 random ids; about a third of the tokens learned, the last always, the first never."""
    random = np.random.default_rng(seed)
    rows = []
    for index in range(n_rows):
        ids = random.integers(1, 500, size=random.integers(5, 41)).tolist()
        learned = random.random(len(ids)) < 0.35
        learned[-1], learned[0] = True, False
        labels = [token if keep else IGNORED for token, keep in zip(ids, learned, strict=True)]
        rows.append({"input_ids": ids, "labels": labels, "length": len(ids), "source": f"data.jsonl:{index + 1}"})
    return Dataset.from_list(rows)


def make_trainer(
    model, tokenizer, tmp_path, rows, *, padding_free=False, texts_of_row=None, **arguments
) -> CausalLMTrainer:
    """Of a model's folder or a model."""
    defaults = {
        "output_dir": str(tmp_path),
        "use_cpu": True,
        "bf16": False,
        "do_train": True,
        "gradient_checkpointing": False,
        "learning_rate": 1e-3,
        "max_grad_norm": 0.0,
        "optim": "sgd",
        "max_steps": 1,
        "logging_steps": 1,
        "save_strategy": "no",
        "logging_nan_inf_filter": False,
        "disable_tqdm": True,
        "padding_free": str(padding_free),
    }
    return CausalLMTrainer(
        model=AutoModelForCausalLM.from_pretrained(model) if isinstance(model, Path | str) else model,
        args=CausalLMConfig(**defaults | arguments),
        data_collator=Collator(tokenizer.pad_token_id),
        train_dataset=rows,
        eval_dataset=rows,
        texts_of_row=texts_of_row,
        processing_class=tokenizer,
    )


def plain_loss_and_gradients(model_dir, rows) -> tuple[float, dict[str, torch.Tensor]]:
    """Row by row with full logits and no padding: the mean over all learned tokens."""
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    n_learned = sum(label != IGNORED for row in rows for label in row["labels"])
    total = 0.0
    for row in rows:
        logits = model(torch.tensor([row["input_ids"]])).logits[0, :-1]
        loss = F.cross_entropy(logits, torch.tensor(row["labels"][1:]), reduction="sum") / n_learned
        loss.backward()
        total += loss.item()
    return total, {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def trained_loss_and_gradients(trainer) -> tuple[float, dict[str, torch.Tensor]]:
    """One step of plain gradient descent: the change of the weights, divided by the rate, is the gradient."""
    before = {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}
    trainer.train()
    rate = trainer.args.learning_rate
    after = {name: parameter.detach() for name, parameter in trainer.model.named_parameters()}
    # The log's loss, since only that one is a mean over processes.
    return trainer.state.log_history[0]["loss"], {name: (before[name] - after[name]) / rate for name in before}


ONE_STEP = {"lr_scheduler_type": "constant", "learning_rate": 1.0}


@pytest.mark.parametrize(
    ("batch_size", "accumulation", "layout"),
    [
        *((8, 1, "padded"), (2, 4, "padded"), (1, 8, "padded"), (8, 1, "grouped"), (4, 2, "padding free")),
        *((1, 2, "packed"), (8, 1, "chunks")),
    ],
)
def test_loss_and_gradients_equal_the_plain_ones(
    tiny_model_dir, tiny_tokenizer, tmp_path, monkeypatch, batch_size, accumulation, layout
):
    if layout == "chunks":
        monkeypatch.setattr(logps, "CHUNK_POSITIONS", 10)
    rows = make_rows(8)
    expected_loss, expected = plain_loss_and_gradients(tiny_model_dir, rows)
    if layout == "packed":
        n_tokens = sum(rows["length"])
        rows = pack(rows, max_length=(n_tokens // 2) + 20)
        assert len(rows) == 2
    trainer = make_trainer(
        tiny_model_dir,
        tiny_tokenizer,
        tmp_path,
        rows,
        padding_free=layout in ("padding free", "packed"),
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=accumulation,
        train_sampling_strategy="group_by_length" if layout == "grouped" else "random",
        **ONE_STEP,
    )
    loss, gradients = trained_loss_and_gradients(trainer)
    assert loss == pytest.approx(expected_loss, abs=1e-5)
    for name, gradient in expected.items():
        torch.testing.assert_close(gradients[name], gradient, atol=1e-5, rtol=1e-4, msg=lambda m, name=name: name + m)


TWO_PROCESSES = """
import json, sys
from pathlib import Path
import torch
sys.path[:0] = [{root!r}, {tests!r}, {tests!r} + "/training"]
from transformers import AutoTokenizer
from medtune.errors import run_script
from medtune.training.processes import leave_process_group
from test_causal_lm_trainer import ONE_STEP, make_rows, make_trainer, trained_loss_and_gradients
def main():
    tokenizer = AutoTokenizer.from_pretrained({model!r})
    trainer = make_trainer({model!r}, tokenizer, {out!r}, make_rows(8), per_device_train_batch_size=2,
                           gradient_accumulation_steps=2, **ONE_STEP)
    loss, gradients = trained_loss_and_gradients(trainer)
    joined = make_trainer({model!r}, tokenizer, {out!r}, make_rows(5), padding_free=True, per_device_eval_batch_size=2)
    evaluated = joined.evaluate()["eval_loss"]
    if trainer.args.process_index == 0:
        torch.save((trainer.args.world_size, loss, gradients, evaluated), {out!r} + "/result.pt")
    leave_process_group()
run_script(main)
"""


def test_two_processes_equal_the_plain_loss_and_gradients(tiny_model_dir, tmp_path):
    script = tmp_path / "two.py"
    tests = Path(__file__).parents[1]
    paths = {"root": str(tests.parent), "tests": str(tests), "model": str(tiny_model_dir), "out": str(tmp_path)}
    script.write_text(TWO_PROCESSES.format(**paths), encoding="utf-8")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    finished = subprocess.run([*command, str(script)], capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr[-3000:]
    world_size, loss, gradients, evaluated = torch.load(tmp_path / "result.pt")
    expected_loss, expected = plain_loss_and_gradients(tiny_model_dir, make_rows(8))
    assert world_size == 2
    assert loss == pytest.approx(expected_loss, abs=1e-5)
    for name, gradient in expected.items():
        torch.testing.assert_close(gradients[name], gradient, atol=1e-5, rtol=1e-4)
    # Five rows in batches of two times two: what fills the last one up counts once.
    assert evaluated == pytest.approx(plain_loss_and_gradients(tiny_model_dir, make_rows(5))[0], abs=1e-5)


def test_evaluation_is_a_mean_over_tokens():
    # Two examples: loss 2 on one token, losses that sum to 1 on three tokens.
    statistics = np.array([[2.0, 0.0, 1.0], [1.0, 2.0, 3.0]])
    metrics = loss_statistics(EvalPrediction(predictions=statistics, label_ids=statistics))
    assert metrics == pytest.approx({"loss": 0.75, "perplexity": np.exp(0.75), "token_accuracy": 0.5})


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_evaluation_does_not_depend_on_the_batches(tiny_model_dir, tiny_tokenizer, tmp_path, batch_size):
    rows = make_rows(7, seed=3)
    trainer = make_trainer(tiny_model_dir, tiny_tokenizer, tmp_path, rows, per_device_eval_batch_size=batch_size)
    metrics = trainer.evaluate()
    expected_loss, _ = plain_loss_and_gradients(tiny_model_dir, rows)
    assert metrics["eval_loss"] == pytest.approx(expected_loss, abs=1e-5)
    assert metrics["eval_perplexity"] == pytest.approx(np.exp(expected_loss), rel=1e-5)


def test_evaluation_keeps_no_logits(tiny_model_dir, tiny_tokenizer, tmp_path):
    trainer = make_trainer(tiny_model_dir, tiny_tokenizer, tmp_path, make_rows(4))
    batch = trainer.data_collator([trainer.train_dataset[index] for index in range(4)])
    loss, logits, labels = trainer.prediction_step(trainer.model, batch, prediction_loss_only=False)
    assert loss is None
    assert logits.shape == labels.shape == (4, 3)


def test_head_sees_learned_positions_only(tiny_model_dir, tiny_tokenizer, tmp_path):
    rows = make_rows(4)
    trainer = make_trainer(tiny_model_dir, tiny_tokenizer, tmp_path, rows, per_device_train_batch_size=4)
    seen = []
    trainer.model.get_output_embeddings().register_forward_hook(lambda head, inputs, logits: seen.append(logits.shape))
    trainer.train()
    n_learned = sum(label != IGNORED for row in rows for label in row["labels"])
    assert [tuple(shape[:-1]) for shape in seen] == [(1,), (1, n_learned)]  # one within the pass
    # Without labels (generation) the head is the plain one.
    trainer.model(torch.tensor([[1, 2, 3]]))
    assert tuple(seen[-1][:2]) == (1, 3)


@pytest.mark.parametrize("group_by_length", [False, True])
def test_first_step_takes_the_longest_rows(tiny_model_dir, tiny_tokenizer, tmp_path, group_by_length):
    rows = make_rows(20)
    trainer = make_trainer(tiny_model_dir, tiny_tokenizer, tmp_path, rows, per_device_train_batch_size=3)
    sampler = LongestFirstSampler(trainer, rows["length"], seed=1, group_by_length=group_by_length)
    first, again = list(sampler), list(sampler)
    assert sorted(first) == list(range(20))
    assert first == again
    assert [rows["length"][index] for index in first[:3]] == sorted(rows["length"], reverse=True)[:3]
    trainer.state = TrainerState(epoch=1.0)
    second = list(sampler)
    assert sorted(second) == list(range(20))
    assert second != first
    trainer.state = TrainerState(epoch=1.4)  # where a run resumes within the second epoch
    assert list(sampler) == second


def test_tokens_a_second_are_those_of_training(tiny_model_dir, tiny_tokenizer, tmp_path, monkeypatch):
    """A step takes a second here, an evaluation a thousand."""
    rows = make_rows(4)
    options = {"max_steps": 4, "eval_strategy": "steps", "eval_steps": 1}
    trainer = make_trainer(tiny_model_dir, tiny_tokenizer, tmp_path, rows, per_device_train_batch_size=1, **options)
    seconds, training_step = [0], trainer.training_step

    def take(n_seconds: int) -> None:
        seconds[0] += n_seconds

    monkeypatch.setattr(stage_trainer, "time", SimpleNamespace(monotonic=lambda: seconds[0]))
    trainer._window_start = 0
    trainer.training_step = lambda *args, **kwargs: take(1) or training_step(*args, **kwargs)
    trainer.evaluate = lambda **kwargs: take(1000) or {"eval_loss": 1.0}
    trainer.train()
    rates = [entry["tokens_per_second"] for entry in trainer.state.log_history if "loss" in entry]
    assert sorted(rates) == sorted(rows["length"])


def test_batch_with_nothing_to_learn_stops_with_the_records(tiny_model_dir, tiny_tokenizer, tmp_path):
    row = {"input_ids": [1, 2, 3], "labels": [IGNORED] * 3, "length": 3, "source": "d.jsonl:9"}
    trainer = make_trainer(tiny_model_dir, tiny_tokenizer, tmp_path, Dataset.from_list([row]))
    with pytest.raises(UserError, match=r"^step 1: no token to learn in d.jsonl:9"):
        trainer.train()


def test_packed_rows_name_all_their_sources(tiny_tokenizer):
    rows = make_rows(6)
    packed = pack(rows, max_length=80)
    batch = Collator(tiny_tokenizer.pad_token_id)([packed[index] for index in range(len(packed))])
    assert sorted(batch["sources"]) == sorted(rows["source"])
    assert batch["attention_mask"].sum(dim=1).tolist() == packed["length"][:]
    assert (batch["position_ids"][batch["attention_mask"].bool()] == 0).sum() == 6
    assert json.dumps(packed["length"][:]) == json.dumps([len(ids) for ids in packed["input_ids"]])


def test_neftune_is_on_in_training_and_off_in_evaluation(tiny_model_dir, tiny_tokenizer, tmp_path):
    rows = make_rows(4)
    noisy = make_trainer(tiny_model_dir, tiny_tokenizer, tmp_path, rows, neftune_noise_alpha=5.0)
    plain = make_trainer(tiny_model_dir, tiny_tokenizer, tmp_path, rows)
    assert noisy.evaluate()["eval_loss"] == plain.evaluate()["eval_loss"]
    assert noisy.train().training_loss != plain.train().training_loss


# ---------------------------------------------------------------- texts of one row

LAYOUTS = {"rows": {"padding_free": False}, "flattened": {"padding_free": True}}
REFUSAL = r"^the texts of a row see each other in this model \({}: {}.*\); do this$"
MOVES = r"when one changes, the states of the others move by [\d.e-]+ of their spread"
GUARD = "`causal_conv1d_fn` can't keep packed sequences apart without `causal_conv1d`"


def check_rows(model, tokenizer, tmp_path, layout: str, **arguments) -> None:
    """An evaluation, whose first batch has the check before it."""
    rows = make_rows(4)
    rows = rows.add_column("seq_lengths", [[length] for length in rows["length"]])
    alone = TextsOfRow("text", "do this")
    make_trainer(model, tokenizer, tmp_path, rows, texts_of_row=alone, **LAYOUTS[layout], **arguments).evaluate()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("model_type", "dtype"),
    [
        ("qwen3", torch.bfloat16),
        ("gpt2", torch.float32),
        ("gemma3_text", torch.float32),
        ("qwen3_moe", torch.bfloat16),
        ("glm4_moe", torch.float32),
    ],
)
def test_attention_and_experts_keep_the_texts_of_a_row_apart(tiny_tokenizer, tmp_path, model_type, dtype, layout):
    check_rows(tiny_model(model_type).to(dtype), tiny_tokenizer, tmp_path, layout)


@pytest.mark.parametrize(("model_type", "dtype"), [("opt", torch.bfloat16), ("afmoe", torch.float32)])
def test_attention_by_text_needs_no_mask_of_the_models_own(tiny_tokenizer, tmp_path, model_type, dtype):
    """These see other texts where transformers masks a row."""
    check_rows(tiny_model(model_type).to(dtype), tiny_tokenizer, tmp_path, "flattened")


@pytest.mark.parametrize(
    ("model_type", "layout", "found", "dtype"),
    [
        ("qwen3_5_text", "rows", MOVES, torch.bfloat16),
        ("qwen3_5_text", "flattened", GUARD, torch.float32),
        ("qwen3_next", "rows", MOVES, torch.float32),
        ("lfm2", "rows", MOVES, torch.float32),
        ("lfm2", "rows", MOVES, torch.bfloat16),
        ("lfm2", "flattened", GUARD, torch.float32),
        ("granitemoehybrid", "rows", MOVES, torch.float32),
        ("falcon_h1", "rows", MOVES, torch.float32),
        ("jamba", "rows", MOVES, torch.bfloat16),
        ("jamba", "flattened", MOVES, torch.float32),
        ("mamba2", "flattened", MOVES, torch.float32),
        ("opt", "rows", MOVES, torch.float32),
        ("gpt_oss", "rows", MOVES, torch.float32),
        ("gpt_oss", "flattened", MOVES, torch.bfloat16),
    ],
)
def test_texts_of_a_row_that_see_each_other_stop_the_run(tiny_tokenizer, tmp_path, model_type, layout, found, dtype):
    """Untrained models, whose layers do little to what passes through them."""
    attention = "eager" if model_type in ("gpt_oss", "mamba2") else "sdpa"
    model = tiny_model(model_type, attention).to(dtype)
    with pytest.raises(UserError, match=REFUSAL.format(model_type, found)):
        check_rows(model, tiny_tokenizer, tmp_path, layout)


@pytest.mark.parametrize("all_see_all", [False, True])
def test_rows_are_checked_as_many_as_a_batch_has(tiny_tokenizer, tmp_path, monkeypatch, all_see_all):
    """FlashAttention keeps the texts of a batch of one row apart, and not those of a batch of several."""
    of_one_row = masking_utils.find_packed_sequence_indices

    def as_flash_attention(position_ids: torch.Tensor) -> torch.Tensor | None:
        if len(position_ids) == 1:
            return of_one_row(position_ids)
        return torch.zeros_like(position_ids) if all_see_all else None

    monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", as_flash_attention)
    sizes = {"per_device_train_batch_size": 1, "per_device_eval_batch_size": 1}
    check_rows(tiny_model("qwen3"), tiny_tokenizer, tmp_path, "rows", **sizes)
    for changed in sizes:
        several = sizes | {changed: 2}
        check_rows(tiny_model("qwen3"), tiny_tokenizer, tmp_path, "flattened", **several)
        with pytest.raises(UserError, match=REFUSAL.format("qwen3", MOVES)):
            check_rows(tiny_model("qwen3"), tiny_tokenizer, tmp_path, "rows", **several)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("use_lora", [False, True])
def test_the_check_leaves_training_as_it_is(tiny_tokenizer, tmp_path, use_lora, checkpointing):
    """With dropout, and with noise on the embeddings: training goes on with its own random numbers."""

    def losses(texts_of_row: TextsOfRow | None) -> list[float]:
        model = tiny_model("qwen3", attention_dropout=0.1)
        if use_lora:
            model = get_peft_model(model, LoraConfig(target_modules="all-linear", lora_dropout=0.3))
        trainer = make_trainer(
            model,
            tiny_tokenizer,
            tmp_path,
            make_rows(8),
            padding_free=True,
            texts_of_row=texts_of_row,
            max_steps=3,
            neftune_noise_alpha=5.0,
            gradient_checkpointing=checkpointing,
        )
        trainer.train()
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    assert losses(TextsOfRow("text", "do this")) == losses(None)


def test_rounding_of_other_tokens_is_no_leak():
    """Experts multiply other tokens together where a text changes, which rounds otherwise."""
    generator = torch.Generator().manual_seed(0)
    plain = torch.randn(1, sum(PROBE_LENGTHS), 32, generator=generator)

    def moved(by: float) -> torch.Tensor:
        return plain + by * torch.randn(plain.shape, generator=generator)

    leak, rounding = moved_states(plain, moved(1e-2), moved(1e-2))
    assert leak == pytest.approx(1e-2, rel=0.2)
    assert rounding == pytest.approx(1e-2, rel=0.2)
    assert moved_states(plain, plain, plain) == (0, 0)
    # States that all grow or shift alike have the same leak.
    assert moved_states(9 * plain + 5, 9 * moved(0.5) + 5, 9 * plain + 5)[0] == pytest.approx(0.5, rel=0.2)


# ---------------------------------------------------------------- experts


@pytest.mark.parametrize(("batch_size", "accumulation", "checkpointing"), [(4, 1, False), (2, 2, False), (4, 1, True)])
def test_the_load_of_trained_routers_is_balanced(tiny_tokenizer, tmp_path, batch_size, accumulation, checkpointing):
    """The loss and its gradients are the model's own with its coefficient, however a step is cut."""
    row = make_rows(1)[0]
    own = tiny_model("qwen3_moe", router_aux_loss_coef=0.5)
    ids, labels = torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])
    outputs = own(ids, labels=labels, output_router_logits=True)
    outputs.loss.backward()
    assert outputs.aux_loss > 1  # which is 1 times the experts of a token where they have the same load
    model = tiny_model("qwen3_moe", router_aux_loss_coef=0.5)
    options = {"per_device_train_batch_size": batch_size, "gradient_accumulation_steps": accumulation} | ONE_STEP
    rows = Dataset.from_list([row] * 4)
    trainer = make_trainer(model, tiny_tokenizer, tmp_path, rows, gradient_checkpointing=checkpointing, **options)
    loss, gradients = trained_loss_and_gradients(trainer)
    assert loss == pytest.approx(outputs.loss.item(), abs=1e-4)
    for name, weights in own.named_parameters():
        assert torch.allclose(gradients[name], weights.grad, atol=1e-5), name
    assert trainer.evaluate()["eval_loss"] < loss  # which is the cross entropy alone


@pytest.mark.parametrize("named", [False, True])
def test_an_adapter_balances_the_routers_that_it_is_on(tiny_tokenizer, tmp_path, named):
    model = tiny_model("qwen3_moe", router_aux_loss_coef=0.5)
    config = LoraConfig(target_modules=["q_proj", "gate"] if named else ["q_proj"])
    trainer = make_trainer(get_peft_model(model, config), tiny_tokenizer, tmp_path, make_rows(4))
    assert trainer.router_loss_weight == (0.5 if named else 0)
    loss = trained_loss_and_gradients(trainer)[0]
    expected = trainer.evaluate()["eval_loss"]
    assert loss > expected + 0.5 if named else loss == pytest.approx(expected, abs=0.01)


@pytest.mark.parametrize(
    ("model_type", "line"),
    [
        ("qwen3_moe", "a mixture of experts whose routers are trained, with 0.001 times their load-balancing loss"),
        (
            "glm4_moe",
            "a mixture of experts; its routers' load-balancing loss is not added: Glm4MoeForCausalLM computes none",
        ),
        ("granitemoehybrid", ""),
        ("qwen3", ""),
    ],
)
def test_what_is_said_of_the_routers_loss(model_type, line):
    model = tiny_model(model_type)
    assert describe_router_loss(model) == line
    if line:
        for weights in model.parameters():
            weights.requires_grad_(False)
        assert describe_router_loss(model).endswith("is not added: they are not trained")


def test_a_hybrid_without_experts_trains(tiny_tokenizer, tmp_path):
    """Its class has a router loss, and nothing to compute it from."""
    trainer = make_trainer(tiny_model("granitemoehybrid"), tiny_tokenizer, tmp_path, make_rows(4))
    assert trainer.train().training_loss > 0


# ---------------------------------------------------------------- resuming


def test_an_optimizer_of_other_weights_is_refused(tiny_model_dir, tiny_tokenizer, tmp_path):
    """As of a run that trained a vision tower too."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    options = {"save_strategy": "steps", "save_steps": 1, "max_steps": 2}
    make_trainer(model, tiny_tokenizer, tmp_path, make_rows(4), **options).train()
    model.model.norm.requires_grad_(False)
    trainer = make_trainer(model, tiny_tokenizer, tmp_path, make_rows(4), **options)
    with pytest.raises(UserError, match=r"checkpoint-1: its optimizer is of other weights than this version trains"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
