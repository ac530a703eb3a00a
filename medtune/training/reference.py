"""The reference of preference training: where the policy started, checked before step 1, log-probs kept on the disk.

Of a policy that continues an adapter it is a frozen copy of that adapter on the same base, of a new adapter the base
without it, of full weights a second model; checkpoints hold the policy alone.
"""

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from functools import partial
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, broadcast_object_list
from datasets import Dataset
from loguru import logger
from peft import PeftModel
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from medtune.errors import UserError
from medtune.models.dropout import switch_off_dropout
from medtune.models.logps import SparseHead
from medtune.models.text_attention import Layout, attend_by_text

REFERENCE = "ref"
# Largest |logp - ref_logp| of a reply before the first step, in nats, and a token of it: a sum of hundreds of nats has
# no more digits in float32.
START_GAP, START_GAP_A_TOKEN = 1e-4, 1e-5
# The same a token of the reply, where the reference's values come from the disk: in half precision other batches
# round otherwise; another model differs by about 1.
STORED_GAP = 0.01


def copy_adapter(model: PeftModel) -> None:
    """Keep the trained adapter as it is now as a frozen one, which is not saved."""
    model.add_adapter(REFERENCE, deepcopy(model.peft_config["default"]))
    for name, weights in list(model.named_parameters()):
        parts = name.split(".")
        if "default" in parts:
            copied = model.get_parameter(".".join(REFERENCE if part == "default" else part for part in parts))
            copied.requires_grad_(False).data.copy_(weights.data)
    model.save_pretrained = partial(model.save_pretrained, selected_adapters=["default"])


@contextmanager
def as_reference(model: PreTrainedModel | PeftModel) -> Iterator[None]:
    """A PEFT model with the reference's adapter, or with none where a new one is trained."""
    if not isinstance(model, PeftModel):
        yield
    elif REFERENCE not in model.peft_config:
        with model.disable_adapter():
            yield
    else:
        model.set_adapter(REFERENCE, inference_mode=True)
        try:
            yield
        finally:
            model.set_adapter("default")


def engine_without_optimizer(model: torch.nn.Module, accelerator: Accelerator) -> torch.nn.Module:
    """A DeepSpeed engine for forward passes: ZeRO-3 splits the weights, the other stages leave them whole."""
    import deepspeed

    config = deepcopy(accelerator.state.deepspeed_plugin.deepspeed_config)
    for block in ("optimizer", "scheduler"):
        config.pop(block, None)
    zero = config["zero_optimization"]
    zero.pop("offload_optimizer", None)
    zero["stage"] = 3 if zero["stage"] == 3 else 0
    engine, *_ = deepspeed.initialize(model=model, config=config)
    engine.eval()
    return engine


class Reference:
    """What the policy is held to.

    Args:
        name: for the log.
        policy: which is the reference too, as `as_reference` has it, and before training as it is.
        model: the reference of full weights, a model of its own.
    """

    def __init__(
        self,
        name: str,
        policy: PreTrainedModel | PeftModel,
        policy_head: SparseHead,
        accelerator: Accelerator,
        model: PreTrainedModel | None = None,
    ):
        self.name, self.policy, self.accelerator = name, policy, accelerator
        self.model, self.head, self.layout = policy, policy_head, Layout.PADDED
        self.uses_deepspeed = accelerator.distributed_type == DistributedType.DEEPSPEED
        if model is not None:
            switch_off_dropout(model)
            self.head = SparseHead(model, policy_head.one_pass)
            self.model = (
                engine_without_optimizer(model, accelerator)
                if self.uses_deepspeed
                else accelerator.prepare_model(model, evaluation_mode=True)
            )

    def use_layout(self, layout: Layout) -> None:
        """Pass batches through the model as the policy does."""
        self.layout = layout
        if layout is not Layout.PADDED:
            attend_by_text(self.head.model)

    @torch.no_grad()
    def logps(self, batch: dict) -> torch.Tensor:
        """[rows] log-probs in nats of the replies of a `reply_batch`."""
        was_training = self.policy.training
        self.policy.eval()  # or gradient checkpointing warns that there are no gradients
        with as_reference(self.policy):
            mask = batch["reply_mask"][:, 1:]
            by_token = self.head.logps(self.model, batch["input_ids"], batch["attention_mask"], mask, self.layout)
            logps = by_token.sum(dim=1)
        self.policy.train(was_training)
        return logps

    def check_start(
        self, policy_logps: torch.Tensor, ref_logps: torch.Tensor, n_tokens: torch.Tensor, are_stored: bool
    ) -> None:
        """Raise UserError unless the log-probs of replies under policy and reference agree before the first step.

        policy_logps, ref_logps, n_tokens: [replies], of this process; stored ones may differ by so much a token.
        """
        gather = self.accelerator.gather
        gaps, n_tokens = gather((policy_logps - ref_logps).abs()), gather(n_tokens)
        limits = STORED_GAP * n_tokens if are_stored else (START_GAP_A_TOKEN * n_tokens).clamp(min=START_GAP)
        summary = f"the largest |logp - ref_logp| of {len(gaps)} replies is {gaps.max().item():.2g} nats"
        if not (gaps < limits).all():
            remedy = (
                "--overwrite_cache True computes the stored log-probs again" if are_stored
                else "what is loaded as the policy is not what is loaded as the reference"
            )  # fmt: skip
            raise UserError(
                f"before step 1 the policy is not the reference ({self.name}): {summary}, and {limits.min():.2g} is "
                f"allowed; {remedy}"
            )
        logger.info(f"before step 1 the policy is the reference ({self.name}): {summary}")


# ---------------------------------------------------------------- log-probs on the disk


class LogpsStore:
    """The reference's log-probs of all rows, kept in a folder: computed again where data, weights or precision differ.

    Made before training, while the policy of full weights still is its own reference.
    """

    def __init__(self, folder: Path, settings: str, overwrite: bool, reference: Reference):
        self.folder, self.overwrite, self.reference = folder, overwrite, reference
        is_main = reference.accelerator.is_main_process
        self.key = settings + reference_fingerprint(reference.policy) if is_main else ""
        if reference.uses_deepspeed:  # which has not placed the model yet
            self.reference.model = engine_without_optimizer(reference.policy, reference.accelerator)

    def logps(self, ids: Dataset, batches: DataLoader, what: str) -> np.ndarray:
        """[rows, 2] float32: of the two replies of a row, from the disk where nothing has changed.

        ids: the columns of ids that these depend on.
        """
        accelerator = self.reference.accelerator
        file: list[Path | None] = [None]
        stored: list[np.ndarray | None] = [None]
        if accelerator.is_main_process:
            key = self.key + rows_fingerprint(ids)
            file[0] = self.folder / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.npy"
            if file[0].is_file() and not self.overwrite:
                stored[0] = np.load(file[0])
        broadcast_object_list(file)
        broadcast_object_list(stored)
        logps = stored[0]
        state = f"computed now, kept in {file[0]}" if logps is None else f"from {file[0]}"
        logger.info(f"reference log-probs of {what}: {state}")
        if logps is None:
            logps = self._compute(batches)
            if accelerator.is_main_process:
                self.folder.mkdir(parents=True, exist_ok=True)
                partial_file = file[0].with_suffix(f".{os.getpid()}.partial.npy")  # another run may write the same
                np.save(partial_file, logps)
                partial_file.replace(file[0])
        assert logps.shape == (len(ids), 2), (logps.shape, len(ids))
        return logps

    def _compute(self, batches: DataLoader) -> np.ndarray:
        accelerator, parts = self.reference.accelerator, []
        for batch in accelerator.prepare(batches):
            with accelerator.autocast():
                logps = self.reference.logps(batch)
            parts.append(accelerator.gather_for_metrics(torch.stack(logps.chunk(2), dim=1)).float().cpu())
        return torch.cat(parts).numpy()


def rows_fingerprint(ids: Dataset) -> str:
    """SHA-256 of all ids, in their order."""
    whole = hashlib.sha256()
    for name in ids.column_names:
        for batch in ids.select_columns([name]).iter(1000):
            for row in batch[name]:
                whole.update(np.array([len(row), *row], dtype=np.int32).tobytes())
    return whole.hexdigest()


def reference_fingerprint(model: PreTrainedModel | PeftModel) -> str:
    """SHA-256 of the reference's weights: of a PEFT model, without the adapter that is trained."""
    whole = hashlib.sha256()
    if isinstance(model, PeftModel) and REFERENCE in model.peft_config:
        config = model.peft_config[REFERENCE]
        whole.update(f"{config.r} {config.lora_alpha} {config.use_rslora} {config.use_dora}".encode())
    for name, weights in model.named_parameters():
        if ".default" not in name:
            # ZeRO-3 leaves an empty parameter and this process's part of it.
            values = getattr(weights, "ds_tensor", weights).detach().cpu().flatten()
            whole.update(f"{name} {weights.dtype} {tuple(values.shape)}".encode())
            whole.update(values.view(torch.uint8).numpy())
    return whole.hexdigest()
