"""TRL's DPO, ORPO and CPO trainers for pairs whose ids are ready, with a reference that is checked and not saved.

The reference of an adapter is TRL's frozen copy `ref` on the same base; checkpoints hold the policy alone. Before the
first step policy and reference must agree. Reference log-probs computed beforehand are kept in a folder of ours: TRL
would write them among the tokenized data, whose cache then no longer fits.
"""

import difflib
import hashlib
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import broadcast_object_list
from datasets import Dataset, concatenate_datasets
from loguru import logger
from peft import PeftModel
from torch.utils.data import DataLoader, Sampler
from transformers import Trainer
from trl import DPOConfig, DPOTrainer
from trl.experimental.cpo import CPOTrainer
from trl.experimental.orpo import ORPOTrainer
from trl.models.utils import prepare_deepspeed
from trl.trainer.dpo_trainer import DataCollatorForPreference
from trl.trainer.utils import use_adapter

from medtune.errors import UserError
from medtune.training.causal_lm_trainer import IGNORED_LABEL, LongestFirstSampler, trained_weights_kept

# Largest |logp - ref_logp| of a reply before the first step, in nats.
START_GAP = 1e-4
# The same a token of the reply, where the reference's values come from the disk: in half precision other batches
# round otherwise; another model differs by about 1.
STORED_GAP = 0.01

DPO_LOSSES = (
    *("sigmoid", "hinge", "ipo", "robust", "exo_pair", "nca_pair", "bco_pair", "sppo_hard", "aot", "aot_unpaired"),
    *("apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm"),
)
REFERENCE_FREE = ("orpo", "simpo")
SMOOTHED = {"robust", "exo_pair", "aot", "aot_unpaired", "simpo"}
F_DIVERGENCES = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")
WITH_F_DIVERGENCE = {"sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop", "sft"}
# What TRL calls the figures that the log shows.
RENAMED = {
    "rewards/accuracies": "reward_accuracy",
    "rewards/margins": "reward_margin",
    "rewards/chosen": "chosen_reward",
    "rewards/rejected": "rejected_reward",
    "logps/chosen": "chosen_logps",
    "logps/rejected": "rejected_logps",
}


# ---------------------------------------------------------------- arguments


@dataclass
class PreferenceConfig(DPOConfig):
    """DPOConfig without what ready ids leave without a meaning, and with what ORPO and SimPO need."""

    loss_type: list[str] = field(
        default_factory=lambda: ["sigmoid"],
        metadata={
            "help": f"One or several of {', '.join(DPO_LOSSES)}; or alone, without a reference, one of "
            f"{', '.join(REFERENCE_FREE)}."
        },
    )
    loss_weights: list[float] | None = field(
        default=None, metadata={"help": "A factor for each of several --loss_type; without it 1 each."}
    )
    beta: float | None = field(
        default=None,
        metadata={"help": "How closely the policy is held to the reference; 0.1 without the flag, for simpo 2."},
    )
    simpo_gamma: float = field(
        default=1.0, metadata={"help": "simpo: by how much beta x the mean log-prob of the chosen reply should lead."}
    )
    label_smoothing: float = field(
        default=0.0, metadata={"help": f"Share of pairs taken to be the wrong way; for {', '.join(sorted(SMOOTHED))}."}
    )

    max_length: int | None = field(default=sys.maxsize, init=False)
    truncation_mode: str = field(default="keep_start", init=False)
    dataset_num_proc: int | None = field(default=None, init=False)
    model_init_kwargs: dict | None = field(default=None, init=False)
    trust_remote_code: bool = field(default=False, init=False)
    pad_token: str | None = field(default=None, init=False)
    pad_to_multiple_of: int | str | None = field(default=None, init=False)
    padding_free: bool = field(default=False, init=False)
    # The reference passes through the same model: with dropout it would differ from the policy by chance.
    disable_dropout: bool = field(default=True, init=False)
    router_aux_loss_coef: float | None = field(default=0.0, init=False)
    use_liger_kernel: bool = field(default=False, init=False)
    activation_offloading: bool = field(default=False, init=False)
    sync_ref_model: bool = field(default=False, init=False)
    ref_model_mixup_alpha: float = field(default=0.6, init=False)
    ref_model_sync_steps: int = field(default=512, init=False)
    # Fields of ORPOConfig and CPOConfig. SimPO is CPO's loss without its likelihood of the chosen reply.
    max_completion_length: int | None = field(default=None, init=False)
    padding_value: int | None = field(default=None, init=False)
    generate_during_eval: bool = field(default=False, init=False)
    is_encoder_decoder: bool | None = field(default=None, init=False)
    cpo_alpha: float = field(default=0.0, init=False)
    alpha: float = field(default=0.0, init=False)

    def __post_init__(self):
        if self.beta is None:
            self.beta = 2.0 if self.loss_type == ["simpo"] else 0.1
        if not self.beta > 0:
            raise UserError(
                f"--beta {self.beta:g}: it holds the policy to the reference, and without it nothing does; give a "
                "number above 0, such as 0.1"
            )
        self._check_losses()
        super().__post_init__()
        if not self.do_train and not self.do_eval:
            raise UserError("neither --do_train nor --do_eval is given, so there is nothing to do")
        if not self.do_train and self.has_reference:
            raise UserError(
                "--do_eval without --do_train: the model would be compared with itself as the reference, and every "
                "reward would be 0; scripts/evaluate_model.py measures a trained model"
            )

    @property
    def has_reference(self) -> bool:
        return not set(self.loss_type) & set(REFERENCE_FREE)

    def _check_losses(self) -> None:
        """Refuse unknown losses, and options that these losses would not heed."""
        losses, known = self.loss_type, (*DPO_LOSSES, *REFERENCE_FREE)
        for name in losses:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(known)}"
                raise UserError(f"--loss_type {name}: not known; {hint}")
        said = " ".join(losses)
        if self.loss_weights is not None and len(self.loss_weights) != len(losses):
            raise UserError(
                f"--loss_weights: {len(self.loss_weights)} for {len(losses)} losses ({said}); give one for each"
            )
        if self.loss_weights is not None and min(self.loss_weights) <= 0:
            raise UserError(f"--loss_weights {min(self.loss_weights):g}: give numbers above 0, or leave the loss out")
        if not self.has_reference:
            options = {
                "another --loss_type": len(losses) > 1,
                "--loss_weights": self.loss_weights is not None,
                "--precompute_ref_log_probs": self.precompute_ref_log_probs,
                "--ld_alpha": self.ld_alpha is not None,
                "--use_weighting": self.use_weighting,
                "--f_divergence_type": self.f_divergence_type != "reverse_kl",
            }
            for option, is_given in options.items():
                if is_given:
                    raise UserError(f"--loss_type {said}: it stands alone and has no reference; leave out {option}")
        if self.label_smoothing_factor:
            raise UserError("--label_smoothing_factor: pairs have no labels to smooth; --label_smoothing is for them")
        if not 0 <= self.label_smoothing < 0.5:
            raise UserError(f"--label_smoothing {self.label_smoothing:g}: give a share from 0 to below 0.5")
        if self.label_smoothing and not SMOOTHED & set(losses):
            raise UserError(f"--label_smoothing: --loss_type {said} does not heed it; {', '.join(sorted(SMOOTHED))} do")
        if "exo_pair" in losses and not self.label_smoothing:
            raise UserError("--loss_type exo_pair needs --label_smoothing; its paper takes 0.001")
        if self.f_divergence_type not in F_DIVERGENCES:
            raise UserError(
                f"--f_divergence_type {self.f_divergence_type}: not known; known are {', '.join(F_DIVERGENCES)}"
            )
        if self.f_divergence_type != "reverse_kl" and not set(losses) <= WITH_F_DIVERGENCE:
            raise UserError(
                f"--f_divergence_type: of the losses, {', '.join(sorted(WITH_F_DIVERGENCE))} take another divergence"
            )
        if self.use_weighting and {"aot", "aot_unpaired"} & set(losses):
            raise UserError(f"--use_weighting: --loss_type {said} sorts the pairs, so they cannot be weighted")
        if self.ld_alpha is not None and not 0 <= self.ld_alpha <= 1:
            raise UserError(f"--ld_alpha {self.ld_alpha:g}: give a number from 0 to 1")
        if self.ld_alpha is not None and self.precompute_ref_log_probs:
            raise UserError("--ld_alpha with --precompute_ref_log_probs: give one of them")


# ---------------------------------------------------------------- batches


class PreferenceCollator:
    """TRL's collator, chosen replies first and rejected ones behind them, with the records' `file:line`."""

    def __init__(self, pad_token_id: int):
        self.collate = DataCollatorForPreference(pad_token_id=pad_token_id)

    def __call__(self, examples: Sequence[dict]) -> dict:
        return self.collate(examples) | {"sources": [example["source"] for example in examples]}


def reply_labels(batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """[2 x pairs, length] ids of the replies, and the ignored label elsewhere."""
    return batch["input_ids"].masked_fill(batch["completion_mask"] == 0, IGNORED_LABEL)


# ---------------------------------------------------------------- what the three trainers share


class PreferenceMixin:
    """In front of one of TRL's trainers: rows of `prompt_ids`, `chosen_ids`, `rejected_ids`, `length` and `source`.

    `sample` is called with the model before each evaluation; the figures it returns stand in its log. An evaluation's
    figures are means over pairs; with several processes the pairs that fill the last batch up count twice.
    """

    def __init__(self, model: torch.nn.Module, sample: Callable[[torch.nn.Module], dict] | None = None, **kwargs):
        self._sample = sample
        self._sampled: dict[str, float] = {}
        self._eval_sizes: list[int] = []
        self._window = {"n_tokens": 0, "start": time.monotonic()}
        with trained_weights_kept(model):
            super().__init__(model=model, **kwargs)
        if isinstance(self.model, PeftModel):
            # Checkpoints hold what is learned: the reference is where the run started, and comes from there again.
            self.model.save_pretrained = partial(self.model.save_pretrained, selected_adapters=["default"])

    def create_model_card(self, *args, **kwargs) -> None:
        """None: TRL would write a README.md of its own into the user's output folder."""

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = [
            *("prompt_ids", "chosen_ids", "rejected_ids", "source", "ref_chosen_logps", "ref_rejected_logps")
        ]

    def _get_train_sampler(self, train_dataset=None) -> Sampler[int]:
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        grouped = self.args.train_sampling_strategy == "group_by_length"
        return LongestFirstSampler(self, self.train_dataset["length"], seed, grouped)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        del inputs["sources"]
        loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if self.model.training:
            self._window["n_tokens"] += int(inputs["attention_mask"].sum()) * self.args.world_size
        return loss

    def evaluate(self, *args, **kwargs) -> dict[str, float]:
        self._sampled = self._sample(self.model) if self._sample else {}
        return super().evaluate(*args, **kwargs)

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        self._eval_sizes.append(len(inputs["sources"]))
        return super().prediction_step(model, self._prepare_inputs(inputs), True, ignore_keys)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Trainer's log, with the means of what the batches gave, under plain names."""
        is_eval = any(name.startswith("eval_") for name in logs)
        stored = self._metrics if self.args.has_reference else self._stored_metrics
        stored = stored["eval" if is_eval else "train"]
        prefix = "eval_" if is_eval else ""
        if is_eval or "loss" in logs:
            for name, values in stored.items():
                name = name.removeprefix("eval_")
                sizes = self._eval_sizes if len(values) == len(self._eval_sizes) and is_eval else [1] * len(values)
                mean = math.fsum(value * size for value, size in zip(values, sizes, strict=True)) / sum(sizes)
                logs[prefix + RENAMED.get(name, name)] = mean
        if is_eval:
            logs.update({f"eval_{name}": value for name, value in self._sampled.items()})
            self._eval_sizes.clear()
        elif "loss" in logs:
            window, now = self._window, time.monotonic()
            logs["tokens_per_second"] = round(window["n_tokens"] / max(now - window["start"], 1e-9), 1)
            self._window = {"n_tokens": 0, "start": now}
        stored.clear()
        Trainer.log(self, logs, start_time)


# ---------------------------------------------------------------- with a reference


class DPOPairTrainer(PreferenceMixin, DPOTrainer):
    """DPOTrainer; stops before the first step unless the policy is the reference.

    Args:
        reference: its name, for the log.
        ref_logps_dir: where log-probs computed beforehand are kept; `overwrite_ref_logps` computes them again.
    """

    def __init__(self, *, reference: str, ref_logps_dir: Path, overwrite_ref_logps: bool = False, **kwargs):
        self.reference = reference
        self.ref_logps_dir = ref_logps_dir
        self.overwrite_ref_logps = overwrite_ref_logps
        self.start_is_checked = False
        super().__init__(**kwargs)

    def _prepare_dataset(self, dataset: Dataset, *args) -> Dataset:
        return dataset

    def compute_loss(self, model, inputs, *args, **kwargs):
        if self.model.training and self.state.global_step == 0 and not self.start_is_checked:
            self._check_start(model, inputs)
            self.start_is_checked = True
        return super().compute_loss(model, inputs, *args, **kwargs)

    @torch.no_grad()
    def _check_start(self, model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> None:
        """Compare the log-probs of the first batch's replies under policy and reference; UserError if they differ."""
        was_training = model.training
        model.eval()
        policy_logps = reply_logps(model, inputs)
        is_stored = self.precompute_ref_logps
        if is_stored:
            ref_logps = torch.cat([inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]])
        elif isinstance(self.model, PeftModel):
            with use_adapter(self.accelerator.unwrap_model(self.model), "ref"):
                ref_logps = reply_logps(self.model, inputs)
        else:
            ref_logps = reply_logps(self.ref_model, inputs)
        model.train(was_training)
        gaps = self.accelerator.gather((policy_logps - ref_logps).abs())
        n_tokens = self.accelerator.gather(inputs["completion_mask"].sum(dim=1))
        limits = STORED_GAP * n_tokens if is_stored else torch.full_like(gaps, START_GAP)
        found = f"the largest |logp - ref_logp| of {len(gaps)} replies is {gaps.max().item():.2g} nats"
        if not (gaps < limits).all():
            remedy = (
                "--overwrite_cache True computes the stored log-probs again" if is_stored
                else "what is loaded as the policy is not what is loaded as the reference"
            )  # fmt: skip
            raise UserError(
                f"before step 1 the policy is not the reference ({self.reference}): {found}, and {limits.min():.2g} is "
                f"allowed; {remedy}"
            )
        logger.info(f"before step 1 the policy is the reference ({self.reference}): {found}")

    def _precompute_ref_logps(self, dataset: Dataset, name: str, batch_size: int) -> Dataset:
        """The rows with `ref_chosen_logps` and `ref_rejected_logps`, from the disk where nothing has changed."""
        file: list[Path | None] = [None]
        found: list[np.ndarray | None] = [None]
        if self.accelerator.is_main_process:
            settings = f"bf16 {self.args.bf16} fp16 {self.args.fp16} "
            key = settings + pairs_fingerprint(dataset) + reference_fingerprint(self.ref_model or self.model)
            file[0] = Path(self.ref_logps_dir, f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.npy")
            if file[0].is_file() and not self.overwrite_ref_logps:
                found[0] = np.load(file[0])
        broadcast_object_list(file)
        broadcast_object_list(found)
        logps = found[0]
        logger.info(
            f"reference log-probs of {len(dataset)} {name} pairs: "
            + (f"computed now, kept in {file[0]}" if logps is None else f"from {file[0]}")
        )
        if logps is None:
            logps = self._ref_logps(dataset, batch_size)
            if self.accelerator.is_main_process:
                self.ref_logps_dir.mkdir(parents=True, exist_ok=True)
                partial_file = file[0].with_suffix(".partial.npy")
                np.save(partial_file, logps)
                partial_file.replace(file[0])
        assert logps.shape == (len(dataset), 2), (logps.shape, len(dataset))
        columns = {"ref_chosen_logps": logps[:, 0], "ref_rejected_logps": logps[:, 1]}
        return concatenate_datasets([dataset, Dataset.from_dict(columns)], axis=1)

    def _ref_logps(self, dataset: Dataset, batch_size: int) -> np.ndarray:
        """[pairs, 2] float32: the reference's log-probs of the chosen and the rejected reply."""
        rows = DataLoader(dataset, batch_size=batch_size, collate_fn=self.data_collator)
        if self.is_deepspeed_enabled and self.ref_model is None:
            # DeepSpeed has not placed the model yet.
            self._precompute_engine = self._precompute_engine or prepare_deepspeed(self.model, self.accelerator)
        model = self._precompute_engine or self.ref_model or self.model
        model.eval()
        parts = []
        for batch in self.accelerator.prepare(rows):
            del batch["sources"]
            logps = torch.stack(self.compute_ref_log_probs(model, batch), dim=1)
            parts.append(self.accelerator.gather_for_metrics(logps).float().cpu())
        return torch.cat(parts).numpy()


def reply_logps(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """[2 x pairs] log-probs of the replies; the model carries TRL's fused head."""
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    return model(**inputs, labels=reply_labels(batch), use_cache=False, fused_lm_head=True).log_probs.sum(dim=1)


def pairs_fingerprint(dataset: Dataset) -> str:
    """SHA-256 of all ids, in their order."""
    whole = hashlib.sha256()
    for name in ("prompt_ids", "chosen_ids", "rejected_ids"):
        for ids in dataset[name]:
            whole.update(np.array([len(ids), *ids], dtype=np.int32).tobytes())
    return whole.hexdigest()


def reference_fingerprint(model: torch.nn.Module) -> str:
    """SHA-256 of the reference's weights: of a PEFT model, without the adapter that is trained."""
    whole = hashlib.sha256()
    if isinstance(model, PeftModel):
        config = model.peft_config["ref"]
        whole.update(f"{config.r} {config.lora_alpha} {config.use_rslora} {config.use_dora}".encode())
    for name, weights in model.named_parameters():
        if ".default" not in name:
            # ZeRO-3 leaves an empty parameter and this process's part of it.
            values = getattr(weights, "ds_tensor", weights).detach().cpu().flatten()
            whole.update(f"{name} {weights.dtype} {tuple(values.shape)}".encode())
            whole.update(values.view(torch.uint8).numpy())
    return whole.hexdigest()


# ---------------------------------------------------------------- without a reference


class ReferenceFreeTrainer(PreferenceMixin):
    """In front of TRL's ORPO and CPO trainers, which know texts only: they get an empty row, and then ready batches."""

    def __init__(self, *, train_dataset: Dataset, eval_dataset: Dataset | None = None, **kwargs):
        nothing = Dataset.from_dict({"prompt_ids": [[0]]})
        super().__init__(train_dataset=nothing, eval_dataset=nothing if eval_dataset else None, **kwargs)
        self.train_dataset, self.eval_dataset = train_dataset, eval_dataset
        self.use_dpo_data_collator = True  # otherwise ORPOTrainer warns in each step of an evaluation

    @staticmethod
    def tokenize_row(row: dict) -> dict:
        return row

    @staticmethod
    def concatenated_inputs(batch: dict[str, torch.Tensor], **kwargs) -> dict[str, torch.Tensor]:
        return {
            "concatenated_input_ids": batch["input_ids"],
            "concatenated_attention_mask": batch["attention_mask"],
            "concatenated_labels": reply_labels(batch),
        }

    def concatenated_forward(self, model, batch):
        n_pairs = len(batch["input_ids"]) // 2
        return super().concatenated_forward(model, batch | {"chosen_labels": batch["input_ids"][:n_pairs]})


class ORPOPairTrainer(ReferenceFreeTrainer, ORPOTrainer):
    """Cross entropy on prompt and chosen reply, and beta x the log odds ratio of the replies' mean log-probs."""


class SimPOPairTrainer(ReferenceFreeTrainer, CPOTrainer):
    """The logistic loss on beta x the difference of the replies' mean log-probs, less gamma."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.loss_type = "simpo"  # CPOTrainer knows one loss, our flag a list
        self.simpo_gamma = self.args.simpo_gamma
