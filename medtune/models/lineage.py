"""From what a model's weights came: its base, and the record that each stage leaves (`lineage.json`).

Answers before anything loads: is a path an adapter, on which base, is it complete, and did a run start from it.
Adapter lineage: a path that holds `adapter_config.json` stands for its base model plus that adapter. Training
continues the adapter itself, so what a stage writes is always relative to the original base and holds all that
came before. `lineage.json` in the adapter's folder records base, parent, stage, template and data.
"""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from loguru import logger
from peft import LoraConfig, PeftConfig

from medtune.errors import UserError
from medtune.models.model_files import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    LINEAGE,
    PICKLE_WEIGHTS,
    WEIGHTS_INDEX,
    check_model_files,
    indexed_files,
)

# What PEFT takes as it stands and stumbles over later.
ADAPTER_VALUES = {
    "r": int,
    "lora_alpha": int | float,
    "target_modules": str | list | set | None,
    "modules_to_save": list | None,
    "base_model_name_or_path": str | None,
}


# Beginnings of flags that may change once a stage is finished. What its rows, its steps and its start depend on is
# compared by itself: batches, data and models.
HOW_IT_RUNS = (
    *("--output_dir", "--overwrite", "--resume", "--logging", "--report_to", "--run_name", "--disable_tqdm", "--save"),
    *("--preprocessing", "--dataloader", "--ddp", "--deepspeed", "--use_cpu", "--device_map", "--cache_dir"),
    *("--per_device", "--auto_find", "--gradient_accumulation", "--gradient_checkpointing", "--rollout_batch"),
    *("--vllm_url", "--teacher_url", "--flash_attn", "--padding_free", "--torch_compile", "--eval", "--train_file_dir"),
    *("--dataset_name", "--model_name_or_path", "--sft_model_path", "--reward_model_path", "--teacher_model_path"),
    "--teacher_device",
)


@dataclass(frozen=True)
class Lineage:
    """The origin of a checkpoint's weights: `lineage.json` in its folder.

    base_model: hub name or folder of the model that the adapter (or the full training) started from.
    parent: the adapter that training continued, None for a new one.
    stage, template, data: the script, the prompt template's name ("" is the tokenizer's own), the training data.
    hidden_size, vocab_size: of the base, so that another base is recognized.
    base_weights: `weights_fingerprint` of the base, so that a base of the same sizes is recognized too.
    start_weights: the same of what the stage started from, so that a run is not resumed on others.
    flags: of the command that trained it, with their values as written.
    thinking: what --thinking made of the template, "" without it.
    reads_thoughts: of a reward model, whether replies that it was trained on had thoughts.
    documents: of pretraining, `DocumentEncoder.form`.
    """

    base_model: str
    parent: str | None
    stage: str
    template: str
    data: str
    hidden_size: int
    vocab_size: int
    base_weights: str = ""
    start_weights: str = ""
    flags: dict[str, str] = field(default_factory=dict)
    thinking: str = ""
    reads_thoughts: bool = False
    documents: str = ""

    def save(self, folder: str | Path) -> None:
        text = json.dumps(asdict(self), indent=2, ensure_ascii=False)
        Path(folder, LINEAGE).write_text(text + "\n", encoding="utf-8")

    @property
    def asked_by(self) -> str:
        """The prompt template and what --thinking made of it, in words."""
        return (self.template or "the tokenizer's own") + (f", --thinking {self.thinking}" if self.thinking else "")

    def refuse_other_run(self, checkpoint: str, finished: bool) -> None:
        """Raise UserError if the run to resume started from other weights or was finished with other flags."""
        was = read_lineage(checkpoint)
        if was is None:
            return
        changes = {
            flag: f"{flag} {self.flags.get(flag, 'not given')} ({was.flags.get(flag, 'not given')} then)"
            for flag in sorted(self.flags.keys() | was.flags.keys())
            if self.flags.get(flag) != was.flags.get(flag) and not flag.startswith(HOW_IT_RUNS)
        }
        start, was_start = self.parent or self.base_model, was.parent or was.base_model
        is_elsewhere = start != was_start and Path(start).resolve() != Path(was_start).resolve()
        if not was.start_weights and not is_elsewhere:
            logger.warning(
                f"the run in {Path(checkpoint).parent} does not record the weights it started from, as older versions "
                f"wrote it: make sure that {start} is what it was"
            )
        # A copy elsewhere is the same start, if both are known by their weights.
        is_other = self.start_weights != was.start_weights if was.start_weights else is_elsewhere
        if is_other and is_elsewhere:
            fault = f"started from {was_start} and not from {start}; give that"
        elif is_other:
            fault = f"started from other weights than {start} has now"
        elif self.documents != was.documents:
            plain = "only the end token behind each"
            fault = f"had its documents in another form ({was.documents or plain}; now {self.documents or plain})"
        elif finished and was.flags and changes:
            fault = f"is finished, with other flags: {', '.join(changes.values())}; give those"
        else:
            return
        raise UserError(
            f"the run in {Path(checkpoint).parent} {fault}; train it again (--resume_from_checkpoint False "
            "--overwrite_output_dir True keeps it beside), or name another --output_dir"
        )


def read_lineage(folder: str | Path) -> Lineage | None:
    """The lineage recorded in a checkpoint's folder; None without a record (another tool's adapter)."""
    file = Path(folder, LINEAGE)
    if not file.is_file():
        return None
    try:
        return Lineage(**json.loads(file.read_text(encoding="utf-8")))
    except (json.JSONDecodeError, TypeError) as error:
        raise UserError(f"{file}: not a lineage record ({error}); restore it or delete it") from error


def is_adapter(path: str | Path) -> bool:
    return Path(path, ADAPTER_CONFIG).is_file()


def read_adapter_config(path: str | Path, flag: str = "") -> LoraConfig:
    """The LoRA configuration of an adapter folder, or UserError where it is no complete LoRA adapter."""
    where = f"{flag} {path}".lstrip()
    if not Path(path).is_dir():
        raise UserError(f"{where}: no such folder")
    if not is_adapter(path):
        raise UserError(f"{where}: no {ADAPTER_CONFIG} in it, so it is no LoRA adapter")
    check_model_files(path, flag, with_weights=True)
    try:
        config = PeftConfig.from_pretrained(str(path))
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{Path(path, ADAPTER_CONFIG)}: not an adapter's configuration ({error})") from error
    if config.peft_type is None:
        raise UserError(f"{Path(path, ADAPTER_CONFIG)}: not an adapter's configuration (it has no 'peft_type')")
    if not isinstance(config, LoraConfig):
        raise UserError(f"{path}: a {config.peft_type} adapter; only LoRA adapters are read here")
    for name, kind in ADAPTER_VALUES.items():
        if not isinstance(value := getattr(config, name), kind):
            raise UserError(f"{Path(path, ADAPTER_CONFIG)}: {name!r} is {value!r:.60}; copy or download it again")
    if not Path(path, ADAPTER_WEIGHTS).is_file():
        raise UserError(f"{path}: {ADAPTER_WEIGHTS} is missing; take another checkpoint of that run")
    if not config.base_model_name_or_path:
        raise UserError(f"{Path(path, ADAPTER_CONFIG)}: names no base model; fill in base_model_name_or_path")
    return config


def base_of(path: str) -> str:
    """The base model's hub name or folder: an adapter's recorded base, or the path itself."""
    return read_adapter_config(path).base_model_name_or_path if is_adapter(path) else path


def tokenizer_source(path: str, base_model: str | None = None) -> str:
    """The folder of a model's tokenizer: an adapter's own, which has its template, or else its base's.

    Args:
        base_model: an adapter's base where it is not the recorded one.
    """
    if not is_adapter(path) or Path(path, "tokenizer_config.json").is_file():
        return path
    return base_model or base_of(path)


def check_model_path(path: str, flag: str, allow_pickle_weights: bool = False) -> None:
    """Refuse in one line a local path that holds no model; a hub name is left to the hub.

    Raises UserError for a missing or incomplete folder, and for pickle weights unless they are allowed.
    """
    folder = Path(path)
    looks_local = path.startswith((".", "/", "~")) or path.count("/") > 1 or Path(path.split("/")[0]).is_dir()
    if not folder.exists() and looks_local:
        raise UserError(f"{flag} {path}: no such folder")
    if folder.is_file():
        raise UserError(f"{flag} {path}: a file; give the folder that holds the model")
    if not folder.is_dir():
        return
    check_model_files(path, flag, with_weights=True, allow_pickle_weights=allow_pickle_weights)
    if is_adapter(folder):
        base = read_adapter_config(folder).base_model_name_or_path
        check_model_path(base, f"{flag} {path}: its base model", allow_pickle_weights)
        return
    names = {file.name for file in folder.iterdir()}
    if "config.json" not in names:
        raise UserError(f"{flag} {path}: neither config.json (a model) nor {ADAPTER_CONFIG} (an adapter) in it")
    if not any(name.endswith(".safetensors") for name in names):
        if not any(name.endswith(".bin") for name in names):
            raise UserError(f"{flag} {path}: no weights (*.safetensors) in it")
        if not allow_pickle_weights:
            raise UserError(f"{flag} {path}: only {PICKLE_WEIGHTS}")
    index = folder / WEIGHTS_INDEX
    if index.is_file():
        absent = sorted(indexed_files(index) - names)
        if absent:
            raise UserError(f"{flag} {path}: {', '.join(absent)} of its weights are missing; download it again")
