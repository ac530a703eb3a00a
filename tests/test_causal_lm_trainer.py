"""The head on learned positions: its loss and gradients are the plain ones, however the rows are batched."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from transformers import AutoModelForCausalLM, EvalPrediction, TrainerState
from trl import SFTConfig

from causal_lm_trainer import (
    LOSS_CHUNK,
    CausalLMTrainer,
    Collator,
    LongestFirstSampler,
    loss_statistics,
    token_losses,
)
from errors import UserError
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


def make_trainer(model_dir, tokenizer, tmp_path, rows, *, padding_free=False, **arguments) -> CausalLMTrainer:
    defaults = {
        "output_dir": str(tmp_path),
        "use_cpu": True,
        "bf16": False,
        "max_length": None,
        "gradient_checkpointing": False,
        "learning_rate": 1e-3,
        "max_grad_norm": 0.0,
        "optim": "sgd",
        "max_steps": 1,
        "logging_steps": 1,
        "save_strategy": "no",
        "logging_nan_inf_filter": False,
        "disable_tqdm": True,
    }
    return CausalLMTrainer(
        model=AutoModelForCausalLM.from_pretrained(model_dir),
        args=SFTConfig(**defaults | arguments),
        data_collator=Collator(tokenizer.pad_token_id, padding_free),
        train_dataset=rows,
        eval_dataset=rows,
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
    [(8, 1, "padded"), (2, 4, "padded"), (1, 8, "padded"), (8, 1, "grouped"), (4, 2, "padding free"), (1, 2, "packed")],
)
def test_loss_and_gradients_equal_the_plain_ones(
    tiny_model_dir, tiny_tokenizer, tmp_path, batch_size, accumulation, layout
):
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
sys.path[:0] = [{root!r}, {tests!r}]
from transformers import AutoTokenizer
from errors import run_script
from training_run import leave_process_group
from test_causal_lm_trainer import ONE_STEP, make_rows, make_trainer, trained_loss_and_gradients
def main():
    tokenizer = AutoTokenizer.from_pretrained({model!r})
    trainer = make_trainer({model!r}, tokenizer, {out!r}, make_rows(8), per_device_train_batch_size=2,
                           gradient_accumulation_steps=2, **ONE_STEP)
    loss, gradients = trained_loss_and_gradients(trainer)
    if trainer.args.process_index == 0:
        torch.save((trainer.args.world_size, loss, gradients), {out!r} + "/result.pt")
    leave_process_group()
run_script(main)
"""


def test_two_processes_equal_the_plain_loss_and_gradients(tiny_model_dir, tmp_path):
    script = tmp_path / "two.py"
    tests = Path(__file__).parent
    paths = {"root": str(tests.parent), "tests": str(tests), "model": str(tiny_model_dir), "out": str(tmp_path)}
    script.write_text(TWO_PROCESSES.format(**paths), encoding="utf-8")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    finished = subprocess.run([*command, str(script)], capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr[-3000:]
    world_size, loss, gradients = torch.load(tmp_path / "result.pt")
    expected_loss, expected = plain_loss_and_gradients(tiny_model_dir, make_rows(8))
    assert world_size == 2
    assert loss == pytest.approx(expected_loss, abs=1e-5)
    for name, gradient in expected.items():
        torch.testing.assert_close(gradients[name], gradient, atol=1e-5, rtol=1e-4)


def test_token_losses_in_chunks_equal_cross_entropy():
    torch.manual_seed(0)
    n_positions = 2 * LOSS_CHUNK + 7
    logits = torch.randn(n_positions, 11, requires_grad=True)
    plain_logits = logits.detach().clone().requires_grad_()
    targets = torch.randint(0, 11, (n_positions,))
    losses, hits = token_losses(logits, targets)
    expected = F.cross_entropy(plain_logits, targets, reduction="none")
    torch.testing.assert_close(losses, expected)
    assert torch.equal(hits, plain_logits.argmax(-1) == targets)
    losses.sum().backward()
    expected.sum().backward()
    torch.testing.assert_close(logits.grad, plain_logits.grad)


def test_token_losses_are_computed_in_float32():
    logits = torch.tensor([[10.0, 9.99, 0.0]], dtype=torch.bfloat16)
    losses, _ = token_losses(logits, torch.tensor([0]))
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses, F.cross_entropy(logits.float(), torch.tensor([0]), reduction="none"))


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
    assert seen[0][0] == sum(label != IGNORED for row in rows for label in row["labels"])
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


def test_batch_with_nothing_to_learn_stops_with_the_records(tiny_model_dir, tiny_tokenizer, tmp_path):
    row = {"input_ids": [1, 2, 3], "labels": [IGNORED] * 3, "length": 3, "source": "d.jsonl:9"}
    trainer = make_trainer(tiny_model_dir, tiny_tokenizer, tmp_path, Dataset.from_list([row]))
    with pytest.raises(UserError, match=r"^step 1: no token to learn in d.jsonl:9"):
        trainer.train()


def test_packed_rows_name_all_their_sources(tiny_tokenizer):
    rows = make_rows(6)
    packed = pack(rows, max_length=80)
    batch = Collator(tiny_tokenizer.pad_token_id, padding_free=True)([packed[index] for index in range(len(packed))])
    assert sorted(batch["sources"]) == sorted(rows["source"])
    assert batch["n_tokens"] == sum(rows["length"]) == batch["input_ids"].numel()
    assert (batch["position_ids"] == 0).sum() == 6
    assert json.dumps(packed["length"][:]) == json.dumps([len(ids) for ids in packed["input_ids"]])


def test_neftune_is_on_in_training_and_off_in_evaluation(tiny_model_dir, tiny_tokenizer, tmp_path):
    rows = make_rows(4)
    noisy = make_trainer(tiny_model_dir, tiny_tokenizer, tmp_path, rows, neftune_noise_alpha=5.0)
    plain = make_trainer(tiny_model_dir, tiny_tokenizer, tmp_path, rows)
    assert noisy.evaluate()["eval_loss"] == plain.evaluate()["eval_loss"]
    assert noisy.train().training_loss != plain.train().training_loss
