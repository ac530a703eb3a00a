"""Each loss and its gradient are those of TRL, known where policy and reference are one, and add up over processes."""

import copy
import math
import subprocess
import sys
from collections import defaultdict
from functools import partial
from pathlib import Path
from types import MethodType, SimpleNamespace

import pytest
import torch
from datasets import Dataset
from tiny_families import tiny_model
from trl import DPOTrainer
from trl import KTOTrainer as TRLKTOTrainer
from trl import RewardTrainer as TRLRewardTrainer
from trl.experimental.cpo import CPOTrainer
from trl.experimental.orpo import ORPOTrainer
from trl.trainer.utils import add_fused_lm_head

from medtune.models import logps, text_attention
from medtune.models.logps import SparseHead, in_chunks, log_probs
from medtune.models.text_attention import Layout, attend_by_text
from medtune.reading.encoders import with_mismatched_replies
from medtune.reading.tokenization import IGNORED_LABEL
from medtune.training.batches import FeedbackCollator, PairCollator
from medtune.training.causal_lm_trainer import losses_and_hits, token_losses
from medtune.training.kto_trainer import KTOTrainer, kto_losses, mismatched_kl
from medtune.training.preference_arguments import PreferenceConfig
from medtune.training.preference_trainer import (
    PreferenceTrainer,
    hinge_losses,
    ipo_losses,
    robust_losses,
    sigmoid_losses,
)
from medtune.training.reward_trainer import bradley_terry_losses

PAIRS = [
    {"prompt_ids": [20, 21, 22], "chosen_ids": [30, 31, 32, 33], "rejected_ids": [40, 41], "source": "d.jsonl:1"},
    {"prompt_ids": [23, 24], "chosen_ids": [34], "rejected_ids": [42, 43, 44, 45, 46], "source": "d.jsonl:2"},
    {"prompt_ids": [25], "chosen_ids": [35, 36], "rejected_ids": [47, 48], "source": "d.jsonl:3"},
]
# A policy that has moved away from its reference, by so many nats.
MOVED = torch.tensor([2.0, -1.0, 0.5, -1.5, 0.3, 1.0])
ON_THE_CPU = SimpleNamespace(
    device=torch.device("cpu"), gather=lambda tensor: tensor, gather_for_metrics=lambda tensor: tensor
)


def gradients(loss: torch.Tensor, model: torch.nn.Module) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: weights.grad.clone() for name, weights in model.named_parameters() if weights.requires_grad}


def assert_alike(loss: torch.Tensor, wanted: torch.Tensor, model: torch.nn.Module, their_model=None) -> None:
    """Within 1e-5, the loss and its gradient for every weight."""
    assert loss.item() == pytest.approx(wanted.item(), abs=1e-5)
    ours, theirs = gradients(loss, model), gradients(wanted, their_model or model)
    assert any(gradient.abs().max() > 1e-3 for gradient in theirs.values())
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient, atol=1e-5, rtol=1e-5, msg=lambda text, name=name: name + text)


@pytest.fixture(autouse=True)
def share_prefixes_of_any_length(monkeypatch):
    monkeypatch.setattr(text_attention, "LEAST_SHARED", 1)


def without_init(trainer_class: type, **attributes):
    """One of our trainers with no more than what its loss reads."""
    trainer = trainer_class.__new__(trainer_class)
    vars(trainer).update(accelerator=ON_THE_CPU, **attributes)
    return trainer


def config(**options) -> PreferenceConfig:
    return PreferenceConfig(output_dir="out", do_train=True, use_cpu=True, bf16=False, report_to=[], **options)


def as_trl(trainer_class: type, model: torch.nn.Module, **attributes) -> SimpleNamespace:
    """What TRL's loss reads of its trainer."""
    add_fused_lm_head(model, outputs=("log_probs", "entropy", "mean_logits", "is_top1"))
    shared = {"accelerator": ON_THE_CPU, "model": model, "aux_loss_enabled": False, "precompute_ref_logps": True}
    trainer = SimpleNamespace(
        **shared, _metrics=defaultdict(lambda: defaultdict(list)), _total_train_tokens=0, _tp_size=1, **attributes
    )
    for name in ("_compute_kl_logps",):
        if hasattr(trainer_class, name):
            setattr(trainer, name, MethodType(getattr(trainer_class, name), trainer))
    return trainer


# ---------------------------------------------------------------- cross entropy


@pytest.mark.parametrize(("chunk", "is_frozen"), [(3, False), (3, True), (1000, True)])
@pytest.mark.parametrize("model_type", ["qwen3", "gemma3_text", "granitemoehybrid", "opt", "gpt2"])
def test_token_log_probs_are_those_of_the_whole_forward_pass(model_type, chunk, is_frozen, monkeypatch):
    """Granite scales its logits, Gemma may cap them; a frozen head's gradient comes without a second pass."""
    monkeypatch.setattr(logps, "CHUNK_POSITIONS", chunk)
    changes = {"final_logit_softcapping": 2.0} if model_type == "gemma3_text" else {}
    changes |= {"logits_scaling": 3.0} if model_type == "granitemoehybrid" else {}
    model = tiny_model(model_type, **changes).eval()
    model.get_output_embeddings().requires_grad_(not is_frozen)
    ids = torch.arange(60, 84).reshape(2, 12)
    mask = torch.rand(2, 11, generator=torch.Generator().manual_seed(0)) < 0.5
    plain = model(ids, use_cache=False).logits[:, :-1][mask].float().log_softmax(dim=-1)
    wanted = plain.gather(1, ids[:, 1:][mask][:, None]).squeeze(1)
    positions = torch.nn.functional.pad(mask, (0, 1))
    (found,) = SparseHead(model)(model, {"input_ids": ids}, positions, ids[:, 1:][mask], log_probs)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)
    wanted_gradients, found_gradients = gradients(wanted.sum(), model), gradients(found.sum(), model)
    for name, gradient in wanted_gradients.items():
        torch.testing.assert_close(found_gradients[name], gradient, atol=1e-5, rtol=1e-4)
    assert model(ids).logits.shape[:2] == (2, 12)


def test_chunks_are_computed_again_in_the_backward_pass():
    torch.manual_seed(0)
    logits = torch.randn(23, 11, requires_grad=True)
    ids, calls = torch.randint(0, 11, (23,)), []

    def compute(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        calls.append(len(ids))
        return losses_and_hits(logits, ids, label_smoothing=0.1)

    losses, hits = in_chunks(lambda logits: logits, logits, ids, compute, chunk=10)
    wanted = torch.nn.functional.cross_entropy(logits, ids, reduction="none", label_smoothing=0.1)
    torch.testing.assert_close(losses, wanted)
    assert torch.equal(hits.bool(), logits.argmax(dim=-1) == ids)
    (gradient,) = torch.autograd.grad(losses.sum(), logits)
    torch.testing.assert_close(gradient, torch.autograd.grad(wanted.sum(), logits)[0])
    assert sorted(calls) == [3, 3, 10, 10, 10, 10]


def test_cross_entropy_is_that_of_trl_and_in_float32():
    model = tiny_model("qwen3")
    labels = torch.arange(60, 84).reshape(2, 12)
    labels[0, 3:6], labels[:, 0] = IGNORED_LABEL, IGNORED_LABEL
    ids = torch.arange(60, 84).reshape(2, 12)
    learned = labels[:, 1:] != IGNORED_LABEL
    their_model = copy.deepcopy(model)
    add_fused_lm_head(their_model)
    wanted = their_model(ids, labels=labels, fused_lm_head=True).loss
    compute = partial(losses_and_hits, label_smoothing=0.0)
    positions = torch.nn.functional.pad(learned, (0, 1))
    losses, _ = SparseHead(model)(model, {"input_ids": ids}, positions, labels[:, 1:][learned], compute)
    assert_alike(losses.mean(), wanted, model, their_model)
    rounded = torch.tensor([[10.0, 9.99, 0.0]], dtype=torch.bfloat16)
    assert token_losses(rounded, torch.tensor([0])).item() == pytest.approx(math.log(2), abs=0.05)
    assert token_losses(rounded, torch.tensor([0])).dtype == torch.float32


# ---------------------------------------------------------------- a reward model


@pytest.mark.parametrize("centering", [None, 0.1])
def test_bradley_terry_is_that_of_trl(centering):
    scores = torch.nn.Linear(3, 1)
    inputs = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
    margins = torch.tensor([0.0, 0.5, 2.0])

    def model(**kwargs) -> SimpleNamespace:
        return SimpleNamespace(logits=scores(inputs))

    theirs = SimpleNamespace(
        args=SimpleNamespace(center_rewards_coefficient=centering),
        accelerator=ON_THE_CPU,
        model=scores,
        _metrics=defaultdict(lambda: defaultdict(list)),
        _total_train_tokens=0,
        _tp_size=1,
    )
    batch = {"input_ids": inputs, "attention_mask": torch.ones(6, 3), "margin": margins}
    wanted = TRLRewardTrainer.compute_loss(theirs, model, batch)
    chosen, rejected = scores(inputs).squeeze(-1).chunk(2)
    assert_alike(bradley_terry_losses(chosen, rejected, margins, centering).mean(), wanted, scores)


# ---------------------------------------------------------------- pairs


def our_pair_loss(
    model: torch.nn.Module, moved: torch.Tensor = MOVED, layout: Layout = Layout.PADDED, **options
) -> tuple[torch.Tensor, dict]:
    """The loss where the policy's log-probs lie `moved` above the reference's; and the batch with these."""
    args = config(**options)
    batch = PairCollator(pad_token_id=0)(PAIRS)
    attend_by_text(model, layout is not Layout.PADDED)
    trainer = without_init(PreferenceTrainer, args=args, head=SparseHead(model), layout=layout)
    ref_logps = trainer.reply_logps(model, batch).detach() - moved
    trainer.note_step([batch])
    losses, _ = trainer.losses_and_figures(model, batch, ref_logps if args.has_reference else None)
    ref_chosen, ref_rejected = ref_logps.chunk(2)
    theirs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    theirs |= {"completion_mask": batch["reply_mask"].long()}
    return losses.mean(), theirs | {"ref_chosen_logps": ref_chosen, "ref_rejected_logps": ref_rejected}


@pytest.mark.parametrize("layout", list(Layout))
@pytest.mark.parametrize(
    "options",
    [
        *({"loss_type": [name]} for name in ("sigmoid", "hinge", "ipo", "sft")),
        {"loss_type": ["robust"], "label_smoothing": 0.2},
        {"loss_type": ["sigmoid", "sft", "ipo"], "loss_weights": [1.0, 0.5, 0.1], "beta": 0.3},
    ],
    ids=lambda options: "-".join(options["loss_type"]),
)
def test_losses_with_a_reference_are_those_of_trl(options, layout):
    model = tiny_model("qwen3")
    loss, batch = our_pair_loss(model, layout=layout, **options)
    names = options["loss_type"]
    their_model = copy.deepcopy(model)
    their_trainer = as_trl(
        DPOTrainer,
        their_model,
        beta=options.get("beta", 0.1),
        loss_types=names,
        loss_weights=options.get("loss_weights", [1.0] * len(names)),
        label_smoothing=options.get("label_smoothing", 0.0),
        ld_alpha=None,
        f_divergence_type="reverse_kl",
        use_weighting=False,
    )
    wanted = DPOTrainer._compute_loss(their_trainer, their_model, batch, return_outputs=False)
    assert_alike(loss, wanted, model, their_model)


@pytest.mark.parametrize("layout", list(Layout))
@pytest.mark.parametrize(
    ("trainer_class", "options"),
    [
        (ORPOTrainer, {"loss_type": ["orpo"], "beta": 0.3}),
        (CPOTrainer, {"loss_type": ["simpo"], "beta": 2.0, "simpo_gamma": 0.7, "label_smoothing": 0.1}),
    ],
    ids=["orpo", "simpo"],
)
def test_losses_without_a_reference_are_those_of_trl(trainer_class, options, layout):
    model = tiny_model("qwen3")
    loss, batch = our_pair_loss(model, layout=layout, **options)
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, IGNORED_LABEL)
    ready = {f"concatenated_{name}": batch[name] for name in ("input_ids", "attention_mask")}
    theirs = SimpleNamespace(
        accelerator=ON_THE_CPU,
        aux_loss_enabled=False,
        is_encoder_decoder=False,
        padding_value=0,
        pad_token_id=0,
        beta=options["beta"],
        loss_type=options["loss_type"][0],
        simpo_gamma=options.get("simpo_gamma"),
        label_smoothing=options.get("label_smoothing", 0.0),
        alpha=0.0,
        cpo_alpha=0.0,
        concatenated_inputs=lambda *args, **kwargs: ready | {"concatenated_labels": labels},
        get_batch_logps=trainer_class.get_batch_logps,
    )
    for name in ("concatenated_forward", "odds_ratio_loss", "cpo_loss"):
        if hasattr(trainer_class, name):
            setattr(theirs, name, MethodType(getattr(trainer_class, name), theirs))
    wanted, _ = trainer_class.get_batch_loss_metrics(theirs, model, {"chosen_labels": batch["input_ids"][:3]})
    assert_alike(loss, wanted, model, model)


def test_values_where_policy_and_reference_are_one():
    same = torch.zeros(3)
    for losses, value in (
        (sigmoid_losses(same, same, 0.1), math.log(2)),
        (hinge_losses(same, same, 0.1), 1.0),
        (ipo_losses(same, same, 0.1), 25.0),
        (robust_losses(same, same, 0.1, 0.2), math.log(2)),
        (kto_losses(same, torch.tensor([True, False, True]), mismatched_kl(same), 0.1), 0.5),
        (kto_losses(same, torch.tensor([True] * 3), mismatched_kl(same), 0.1, 2.0, 1.0), 1.0),
        (bradley_terry_losses(same, same, same), math.log(2)),
    ):
        assert losses.tolist() == pytest.approx([value] * 3, abs=1e-6)


# ---------------------------------------------------------------- single replies

FEEDBACK = [
    {"prompt_ids": [20, 21, 22], "reply_ids": [30, 31], "is_desirable": True, "length": 5, "source": "d.jsonl:1"},
    {"prompt_ids": [23, 24], "reply_ids": [34], "is_desirable": False, "length": 3, "source": "d.jsonl:2"},
    {"prompt_ids": [25], "reply_ids": [35, 36, 37], "is_desirable": True, "length": 4, "source": "d.jsonl:3"},
    {"prompt_ids": [26, 27], "reply_ids": [38, 39], "is_desirable": False, "length": 4, "source": "d.jsonl:4"},
]


def kto_loss(
    model: torch.nn.Module,
    rows: list[dict],
    moved: torch.Tensor,
    accelerator=ON_THE_CPU,
    layout: Layout = Layout.PADDED,
    **options,
):
    """[rows] losses where the log-ratios of replies and mismatched replies are `moved`; and the batch."""
    batch = FeedbackCollator(pad_token_id=0)(rows)
    attend_by_text(model, layout is not Layout.PADDED)
    args = config(loss_type=["kto"], **options)
    trainer = without_init(KTOTrainer, args=args, head=SparseHead(model), layout=layout)
    ref_logps = trainer.reply_logps(model, batch).detach() - moved
    batch["ref_logps"] = ref_logps
    trainer.kl = mismatched_kl(accelerator.gather(trainer.mismatched_ratios(model, batch)))
    return trainer.losses_and_figures(model, trainer.matched(batch), ref_logps[: len(rows)])[0], batch


@pytest.mark.parametrize("layout", list(Layout))
@pytest.mark.parametrize("kl_moved", [[0.5, 1.0, -0.2, 2.0], [-1.0, -1.0, -1.0, 0.1]], ids=["kl", "kl below 0"])
def test_kto_is_that_of_trl(kl_moved, layout):
    model = tiny_model("qwen3")
    rows = list(with_mismatched_replies(Dataset.from_list(FEEDBACK)))
    moved = torch.tensor([1.0, -0.5, 2.0, 0.7, *kl_moved])
    weights = {"desirable_weight": 1.3, "undesirable_weight": 0.8}
    losses, batch = kto_loss(model, rows, moved, beta=0.3, layout=layout, **weights)
    theirs = {
        "label": batch["is_desirable"],
        "ref_logps": batch["ref_logps"][:4],
        "ref_KL_logps": batch["ref_logps"][4:],
    }
    for prefix, part in (("", slice(4)), ("KL_", slice(4, None))):
        theirs |= {f"{prefix}{name}": batch[name][part] for name in ("input_ids", "attention_mask")}
        theirs[f"{prefix}completion_mask"] = batch["reply_mask"][part].long()
    their_model = copy.deepcopy(model)
    their_trainer = as_trl(TRLKTOTrainer, their_model, beta=0.3, loss_type="kto", calculate_KL=True, **weights)
    wanted = TRLKTOTrainer._compute_loss(their_trainer, their_model, theirs, return_outputs=False)
    assert_alike(losses.mean(), wanted, model, their_model)


TWO_PROCESSES = """
import sys
import torch
import torch.distributed as dist
sys.path[:0] = {paths!r}
from types import SimpleNamespace
from datasets import Dataset
from test_losses import FEEDBACK, kto_loss, with_mismatched_replies
from tiny_families import tiny_model
def gather(tensor):
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, tensor.contiguous())
    return torch.cat(parts)
dist.init_process_group("gloo")
rows = list(with_mismatched_replies(Dataset.from_list(FEEDBACK)))
moved = torch.tensor([1.0, -0.5, 2.0, 0.7, 0.5, 1.0, -0.2, 2.0])
mine = [2 * dist.get_rank(), 2 * dist.get_rank() + 1]
torch.manual_seed(0)
model = tiny_model("qwen3")
moved_of_mine = moved[mine + [4 + i for i in mine]]
losses, _ = kto_loss(model, [rows[i] for i in mine], moved_of_mine, SimpleNamespace(gather=gather), beta=0.3)
(losses.sum() / 4).backward()
loss = losses.detach().sum() / 4
gradients = {{name: weights.grad for name, weights in model.named_parameters()}}
for tensor in (loss, *gradients.values()):
    dist.all_reduce(tensor)
if dist.get_rank() == 0:
    torch.save((dist.get_world_size(), model.state_dict(), loss, gradients), {out!r})
dist.destroy_process_group()
"""


def test_two_processes_give_kto_of_one_with_twice_the_rows(tmp_path):
    tests = Path(__file__).parents[1]
    script, out = tmp_path / "two.py", tmp_path / "result.pt"
    paths = [str(tests.parent), str(tests), str(tests / "training")]
    script.write_text(TWO_PROCESSES.format(paths=paths, out=str(out)), encoding="utf-8")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr[-3000:]
    n_processes, weights, loss, found = torch.load(out)
    assert n_processes == 2
    model = tiny_model("qwen3")
    model.load_state_dict(weights)
    rows = list(with_mismatched_replies(Dataset.from_list(FEEDBACK)))
    losses, _ = kto_loss(model, rows, torch.tensor([1.0, -0.5, 2.0, 0.7, 0.5, 1.0, -0.2, 2.0]), beta=0.3)
    assert losses.mean().item() == pytest.approx(loss.item(), abs=1e-6)
    for name, gradient in gradients(losses.mean(), model).items():
        torch.testing.assert_close(found[name], gradient, atol=1e-6, rtol=1e-5)
