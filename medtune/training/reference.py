"""The reference of preference training: where the policy started, checked before step 1, log-probs kept on the disk.

Of a policy that continues an adapter it is a frozen copy of that adapter on the same base, of a new adapter the base
without it, of full weights a second model; checkpoints hold the policy alone.
"""

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from functools import partial
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from datasets import Dataset
from loguru import logger
from peft import PeftModel
from transformers import PreTrainedModel

from medtune.errors import UserError

REFERENCE = "ref"
# Largest |logp - ref_logp| of a reply before the first step, in nats.
START_GAP = 1e-4
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
def as_reference(model: PeftModel) -> Iterator[None]:
    """The model with the reference's adapter, or with none where a new one is trained."""
    if REFERENCE not in model.peft_config:
        with model.disable_adapter():
            yield
        return
    model.set_adapter(REFERENCE, inference_mode=True)
    try:
        yield
    finally:
        model.set_adapter("default")


def engine_of_reference(model: torch.nn.Module, accelerator: Accelerator) -> torch.nn.Module:
    """A DeepSpeed engine without optimizer: ZeRO-3 splits the weights, the other stages leave them whole."""
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


def check_start(
    policy_logps: torch.Tensor, ref_logps: torch.Tensor, n_tokens: torch.Tensor, reference: str, are_stored: bool
) -> None:
    """Raise UserError unless the [replies] log-probs of policy and reference agree before the first step.

    n_tokens: [replies], of each; stored log-probs may differ by so much a token.
    """
    gaps = (policy_logps - ref_logps).abs()
    limits = STORED_GAP * n_tokens if are_stored else torch.full_like(gaps, START_GAP)
    found = f"the largest |logp - ref_logp| of {len(gaps)} replies is {gaps.max().item():.2g} nats"
    if not (gaps < limits).all():
        remedy = (
            "--overwrite_cache True computes the stored log-probs again" if are_stored
            else "what is loaded as the policy is not what is loaded as the reference"
        )  # fmt: skip
        raise UserError(
            f"before step 1 the policy is not the reference ({reference}): {found}, and {limits.min():.2g} is "
            f"allowed; {remedy}"
        )
    logger.info(f"before step 1 the policy is the reference ({reference}): {found}")


# ---------------------------------------------------------------- log-probs on the disk


def stored_logps(
    folder: Path, key: str, overwrite: bool, what: str, compute: Callable[[], np.ndarray], accelerator: Accelerator
) -> np.ndarray:
    """What `compute` gives, in every process, from the folder where nothing that the key names has changed."""
    file: list[Path | None] = [None]
    found: list[np.ndarray | None] = [None]
    if accelerator.is_main_process:
        file[0] = folder / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.npy"
        if file[0].is_file() and not overwrite:
            found[0] = np.load(file[0])
    broadcast_object_list(file)
    broadcast_object_list(found)
    if found[0] is not None:
        logger.info(f"reference log-probs of {what}: from {file[0]}")
        return found[0]
    logger.info(f"reference log-probs of {what}: computed now, kept in {file[0]}")
    logps = compute()
    if accelerator.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        partial_file = file[0].with_suffix(".partial.npy")
        np.save(partial_file, logps)
        partial_file.replace(file[0])
    return logps


def rows_fingerprint(dataset: Dataset, columns: tuple[str, ...]) -> str:
    """SHA-256 of all ids, in their order."""
    whole = hashlib.sha256()
    for name in columns:
        for ids in dataset[name]:
            whole.update(np.array([len(ids), *ids], dtype=np.int32).tobytes())
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
