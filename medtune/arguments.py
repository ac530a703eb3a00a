"""Command-line flags of all stages, and a parser that never ignores one.

The guide's commands were written for older libraries. Flags that transformers 5 renamed or dropped are
translated to what they meant, each with one line in the log; a flag nobody knows is refused with the nearest known
one. On a machine without GPU the run goes on in float32 on the CPU and says so.
"""

import argparse
import difflib
import importlib.util
import json
import os
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from transformers import HfArgumentParser, TrainingArguments
from transformers.hf_argparser import string_to_bool
from transformers.integrations import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations

from medtune.devices import cpu_reason
from medtune.errors import UserError
from medtune.flag_words import check_json, check_separators, check_share, flag_or_path, one_bool, values_by_flag
from medtune.old_flags import ALWAYS_SO, FIXED_FLAGS, REMOVED, RENAMED
from medtune.output_files import refuse_unwritable


class LoadingOptions:
    """The flags of a script that loads models, as the functions that load them take them."""

    def __post_init__(self):
        if self.load_in_8bit and self.load_in_4bit:
            raise UserError("--load_in_8bit and --load_in_4bit exclude each other: give one of them")

    @property
    def hub_options(self) -> dict:
        """For configurations and tokenizers."""
        return {"cache_dir": self.cache_dir, "trust_remote_code": self.trust_remote_code}

    @property
    def loading_options(self) -> dict:
        """For weights, `hub_options` included."""
        names = ("torch_dtype", "load_in_4bit", "load_in_8bit", "device_map", "flash_attn", "allow_pickle_weights")
        return {name: getattr(self, name) for name in names} | self.hub_options


@dataclass
class ModelArguments(LoadingOptions):
    model_name_or_path: str = field(
        metadata={"help": "Hub name or folder of a model, or the folder of a LoRA adapter that training continues."}
    )
    tokenizer_name_or_path: str | None = field(
        default=None, metadata={"help": "Tokenizer, when it is not the model's own."}
    )
    torch_dtype: Literal["auto", "bfloat16", "float16", "float32"] = field(
        default="auto", metadata={"help": "Type of the base model's weights; auto takes the checkpoint's."}
    )
    cpu_bf16: Literal["auto", "True", "False", "autocast"] = field(
        default="auto",
        metadata={
            "help": "On a CPU, the frozen base of an adapter in bfloat16: auto where that is faster here; without it, "
            "and for full weights, a CPU trains in float32. autocast keeps weights in float32 and multiplies in "
            "bfloat16, for full weights too."
        },
    )
    load_in_8bit: bool = field(default=False, metadata={"help": "Base weights in 8 bit (bitsandbytes)."})
    load_in_4bit: bool = field(default=False, metadata={"help": "Base weights in 4-bit NF4 (QLoRA, bitsandbytes)."})
    device_map: Literal["auto", "balanced", "balanced_low_0", "sequential"] | None = field(
        default=None,
        metadata={"help": "auto splits the model over the GPUs of one process; under torchrun each process has one."},
    )
    flash_attn: bool = field(
        default=False, metadata={"help": "FlashAttention 2 if installed and possible, otherwise SDPA or eager."}
    )
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Run Python code that the model's repository ships."}
    )
    allow_pickle_weights: bool = field(
        default=False, metadata={"help": "Also load .bin weights, which can run code when they are opened."}
    )
    cache_dir: str | None = field(
        default=None, metadata={"help": "Folder for downloaded models, for data sets of the hub and tokenized data."}
    )


@dataclass
class LoraArguments:
    use_peft: bool = field(default=True, metadata={"help": "Train a LoRA adapter; False trains all weights."})
    target_modules: str | None = field(
        default=None,
        metadata={
            "help": "Modules that get an adapter: all (the language model's linear layers and experts, no head and no "
            "routers; the log names those left out) or names with commas."
        },
    )
    lora_rank: int | None = field(default=None, metadata={"help": "Rank; 16 for a new adapter."})
    lora_alpha: float | None = field(
        default=None, metadata={"help": "The adapter is scaled by alpha / rank; 32 for a new adapter."}
    )
    lora_dropout: float = field(default=0.05, metadata={"help": "Dropout on the adapter's input."})
    use_dora: bool = field(default=False, metadata={"help": "DoRA: magnitude and direction apart."})
    use_rslora: bool = field(default=False, metadata={"help": "rsLoRA: scale by alpha / sqrt(rank)."})
    modules_to_save: str | None = field(
        default=None,
        metadata={"help": "Modules trained whole and saved with the adapter, names with commas."},
    )

    def __post_init__(self):
        if self.lora_rank is not None and self.lora_rank < 1:
            raise UserError(
                f"--lora_rank {self.lora_rank}: give at least 1; --use_peft False trains without an adapter"
            )
        if self.lora_alpha is not None and self.lora_alpha <= 0:
            raise UserError(f"--lora_alpha {self.lora_alpha}: the adapter is scaled by it; give a number above 0")
        if not 0 <= self.lora_dropout < 1:
            raise UserError(f"--lora_dropout {self.lora_dropout}: give a share from 0 to below 1")


@dataclass
class DataArguments:
    train_file_dir: str | None = field(default=None, metadata={"help": "File or folder (nested) of training records."})
    dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "Data set of the hub instead, NAME[:config[:split]]; its validation split evaluates, where it has "
            "one. Of this flag and --train_file_dir the later one counts."
        },
    )
    validation_file_dir: str | None = field(
        default=None,
        metadata={"help": "The same for evaluation; the training folder again: a seeded part is held out of it."},
    )
    max_train_samples: int | None = field(
        default=None, metadata={"help": "At most so many training records, drawn with the seed."}
    )
    max_eval_samples: int | None = field(
        default=None, metadata={"help": "At most so many evaluation records, drawn with the seed."}
    )
    preprocessing_num_workers: int = field(default=1, metadata={"help": "Processes that tokenize."})
    overwrite_cache: bool = field(default=False, metadata={"help": "Tokenize anew though the cache fits."})
    on_bad_data: Literal["error", "drop"] = field(
        default="error",
        metadata={"help": "A record that cannot be read: stop with file:line, or go on without it and count it."},
    )
    ignore_keys: str | None = field(
        default=None,
        metadata={"help": "Keys of records and turns to read as if they were absent, with commas: label,images."},
    )

    def __post_init__(self):
        for name in ("max_train_samples", "max_eval_samples"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"--{name} {value}: give a number of records of at least 1")


@dataclass
class RunArguments:
    overwrite_output_dir: bool = field(
        default=False,
        metadata={"help": "Start again in an --output_dir that holds a run; the earlier run is moved beside it."},
    )
    logging_dir: str | None = field(
        default=None, metadata={"help": "Folder of TensorBoard's events; runs/ in --output_dir without it."}
    )
    max_bad_steps: int = field(
        default=3,
        metadata={"help": "Stop after so many steps in a row whose loss is not finite or explodes."},
    )

    def __post_init__(self):
        if self.max_bad_steps < 1:
            raise UserError(f"--max_bad_steps {self.max_bad_steps}: give at least 1, which stops at the first bad step")


# Flags whose values no record keeps.
SECRETS = {"--hub_token"}
# Of a flag that is suggested for an unknown one: --packing is no --ddp_backend, whose likeness is 0.64.
LEAST_LIKENESS = 0.7
# Smaller values train nothing, or fail far from here.
AT_LEAST = {
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "learning_rate": 0,
    "seed": 0,
}


class StageArgumentParser(HfArgumentParser):
    """HfArgumentParser that translates old flags, refuses unknown ones and explains itself in one line.

    `notes` has one line for each flag that was changed. `given` has the flags of the command and their values as
    written, for the lineage, with old names translated and secrets left out.
    """

    def __init__(self, dataclass_types: Sequence[type]):
        # Abbreviated flags are off: argparse would take a typo such as `--learning` for a flag it prefixes.
        super().__init__(dataclass_types, allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        self.notes: list[str] = []
        self.given: dict[str, str] = {}
        for action in self._actions:
            if action.option_strings[0].startswith("--"):
                # Dashes are read as underscores below, so help and messages name a flag once.
                action.option_strings = action.option_strings[:1]
        if "--report_to" in self._option_string_actions:
            self._option_string_actions["--report_to"].nargs = "+"

    def error(self, message: str):
        raise UserError(f"{message.removeprefix('argument ')}; `python {sys.argv[0]} --help` lists the flags")

    def parse(self, argv: Sequence[str] | None = None) -> tuple:
        """Return one instance of each dataclass; raise `UserError` for a flag or value that cannot be honoured."""
        argv = self._translate(list(sys.argv[1:] if argv is None else argv))
        namespace, unknown = self.parse_known_args(argv)
        if unknown:
            raise UserError(self._unknown_flag_message(unknown))
        values = vars(namespace)
        by_flag = values_by_flag(argv)
        self.given = {flag: value for flag, value in by_flag.items() if flag not in SECRETS}
        given = {flag.removeprefix("--") for flag in by_flag}
        self._settle_training_arguments(values, given)
        if "use_cpu" in values and values.get("base_model", "") is not None:  # an evaluation may need no model
            self._settle_device(values, given)
        instances = []
        for dataclass_type in self.dataclass_types:
            names = {name for name, spec in dataclass_type.__dataclass_fields__.items() if spec.init}
            with warnings.catch_warnings():
                # transformers 5.24 warns of its own rename of gradient_checkpointing.
                warnings.filterwarnings("ignore", message=".*gradient_checkpointing.*deprecated")
                try:
                    instances.append(dataclass_type(**{name: values[name] for name in names}))
                except (ValueError, ImportError) as error:
                    raise UserError(" ".join(str(error).split())) from error
        return tuple(instances)

    def _translate(self, argv: list[str]) -> list[str]:
        """Rewrite old flags to what they meant, and give a bare `--flag` of a boolean its `True`."""
        given: list[tuple[str, list[str]]] = []
        loose: list[str] = []  # words before the first flag
        for word in argv:
            if word.startswith("--"):
                flag, has_value, value = word.partition("=")
                given.append(("--" + flag[2:].replace("-", "_"), [value] if has_value else []))
            else:
                (given[-1][1] if given else loose).append(word)
        if {"--warmup_ratio", "--warmup_steps"} <= {flag for flag, _ in given}:
            raise UserError("--warmup_ratio and --warmup_steps say the same thing twice: give one of them")
        given = self._without_overruled_data(given)
        return [*loose, *(word for flag, values in given for word in self._translate_flag(flag, values))]

    def _without_overruled_data(self, given: list[tuple[str, list[str]]]) -> list[tuple[str, list[str]]]:
        """Leave out files before --dataset_name, or that before files, so that flags win over those of a launcher."""
        data = [(flag, values) for flag, values in given if flag in ("--train_file_dir", "--dataset_name")]
        if len({flag for flag, _ in data}) < 2:
            return given
        last, _ = data[-1]
        overruled = [flag_and_values for flag_and_values in data if flag_and_values[0] != last]
        # The training folder again, of which a part would be held out.
        overruled += [("--validation_file_dir", values) for flag, values in overruled if flag == "--train_file_dir"]
        overruled = [flag_and_values for flag_and_values in given if flag_and_values in overruled]
        self.notes += [f"{flag} {' '.join(values)}: {last} comes later and counts" for flag, values in overruled]
        return [flag_and_values for flag_and_values in given if flag_and_values not in overruled]

    def _translate_flag(self, flag: str, values: list[str]) -> list[str]:
        if flag in FIXED_FLAGS:
            meant, reason = FIXED_FLAGS[flag]
            requested = one_bool(flag, values)
            if requested is not meant:
                raise UserError(f"{flag} {requested} cannot be honoured: {reason}; leave the flag out")
            self.notes.append(f"{flag} {requested}: {reason}")
            return []
        if flag in self._option_string_actions:
            action = self._option_string_actions[flag]
            if action.type is string_to_bool and len(values) < 2:
                values = [str(one_bool(flag, values))]
            elif {"True", "False"} < (words := set(action.choices or ())) and words.isdisjoint(values):
                *first, last = action.choices
                values = [str(one_bool(flag, values, f"{', '.join(first)} or {last}"))]
            if flag == "--optim" and values == ["adamw_hf"]:
                self.notes.append("--optim adamw_hf is gone: adamw_torch, the same algorithm, is used")
                values = ["adamw_torch"]
            for value in values:
                check_json(flag, value)
            check_separators(flag, values, takes_several=action.nargs == "+")
            # In one word, so that argparse does not take a value such as -1e-3 for a flag.
            return [f"{flag}={values[0]}"] if len(values) == 1 else [flag, *values]
        if [ALWAYS_SO.get(flag)] == values:
            self.notes.append(f"{flag} {values[0]}: always so in this stage")
            return []
        if flag in RENAMED:
            if flag == "--warmup_ratio":
                check_share(flag, values)
            self.notes.append(f"{flag} is now {RENAMED[flag]} {' '.join(values)}".rstrip())
            return self._translate_flag(RENAMED[flag], values)
        if flag == "--group_by_length":
            grouped = one_bool(flag, values)
            strategy = "group_by_length" if grouped else "random"
            self.notes.append(f"--group_by_length {grouped} is now --train_sampling_strategy {strategy}")
            return ["--train_sampling_strategy", strategy]
        return [flag, *values]

    def _unknown_flag_message(self, unknown: list[str]) -> str:
        known = [option for option in self._option_string_actions if option.startswith("--") and "-" not in option[2:]]
        known += [*RENAMED, *FIXED_FLAGS, "--group_by_length"]
        flags = [word for word in unknown if word.startswith("-")]
        if not flags:
            return f"{' '.join(unknown)}: these words belong to no flag; quote values that contain blanks"
        hints = []
        for flag in flags:
            if flag in REMOVED:
                hints.append(f"{flag} was removed: {REMOVED[flag]}")
                continue
            if flag.removeprefix("--") in TrainingArguments.__dataclass_fields__:
                hints.append(f"{flag} is not a flag of this stage, which has no use for it; leave it out")
                continue
            near = difflib.get_close_matches(flag, known, n=1, cutoff=LEAST_LIKENESS)
            near = near or [option for option in known if flag.removeprefix("--") in option]
            meant = f"; did you mean {near[0]}?" if len(near) == 1 else ""
            hints.append(f"{flag} is not a flag of this stage{meant}")
        return ". ".join(hints)

    def _settle_training_arguments(self, values: dict, given: set[str]) -> None:
        """Set what the flags leave open: device, precision, evaluation strategy, trackers."""
        if "max_steps" not in values:  # of no stage
            return
        if not values["output_dir"]:
            raise UserError("--output_dir is missing: name the folder for checkpoints and results")
        for name, least in AT_LEAST.items():
            if name in values and values[name] < least:
                raise UserError(f"--{name} {values[name]}: give at least {least}")
        if values["max_steps"] <= 0 and values["num_train_epochs"] <= 0:
            raise UserError(f"--num_train_epochs {values['num_train_epochs']}: give more than 0, or --max_steps")
        for name, default in (("output_dir", ""), ("cache_dir", "cache"), ("logging_dir", "")):
            if folder := values.get(name) or default:
                refuse_unwritable(Path(folder), f"--{name}")
        if values["resume_from_checkpoint"] is not None:
            values["resume_from_checkpoint"] = flag_or_path(values["resume_from_checkpoint"])
        if "eval_strategy" not in given and values["do_eval"] and values["eval_steps"] is not None:
            values["eval_strategy"] = "steps"
            self.notes.append("--eval_steps without --eval_strategy: --eval_strategy steps is used")
        if values["disable_tqdm"] is None:
            values["disable_tqdm"] = not sys.stderr.isatty()
        if "torch_compile" not in given and one_bool("TORCH_COMPILE", [os.environ.get("TORCH_COMPILE") or "0"]):
            is_flag = "torch_compile" in values
            values["torch_compile"] = True
            does = "--torch_compile True" if is_flag else "this stage does not compile"
            self.notes.append(f"TORCH_COMPILE=1 in the environment: {does}")
        if values["deepspeed"]:
            self._settle_deepspeed(values)
        if values.get("ddp_find_unused_parameters") is None:
            values["ddp_find_unused_parameters"] = False  # every trained parameter takes part in each step
        # Without the flag transformers keeps the running mean in the log where the loss was nan, which hides it.
        values["logging_nan_inf_filter"] = False
        self._check_trackers(values)

    def _settle_deepspeed(self, values: dict) -> None:
        _check_deepspeed(values["deepspeed"])
        stage = _zero_stage(values["deepspeed"])
        quantized = [f"--{name}" for name in ("load_in_4bit", "load_in_8bit") if values.get(name)]
        if stage == 3 and quantized:
            raise UserError(
                f"{quantized[0]} with ZeRO-3 ({values['deepspeed']}): quantized weights cannot be split over the "
                "GPUs; take ds_configs/zero2.json"
            )
        if values.get("device_map"):
            self.notes.append(f"--device_map {values['device_map']}: DeepSpeed places the model")
            values["device_map"] = None

    def _check_trackers(self, values: dict) -> None:
        """Split `a,b` and refuse a tracker that is not installed, which transformers would do in the first step."""
        report_to = values["report_to"]
        words = report_to if isinstance(report_to, list) else [report_to or "none"]
        trackers = values["report_to"] = [tracker for word in words for tracker in word.split(",") if tracker]
        for tracker in trackers:
            if tracker not in (*INTEGRATION_TO_CALLBACK, "none", "all"):
                raise UserError(f"--report_to {tracker}: not known; known are {', '.join(INTEGRATION_TO_CALLBACK)}")
            if tracker not in (*get_available_reporting_integrations(), "none", "all"):
                raise UserError(f"--report_to {tracker}: the package is not installed; run `pip install {tracker}`")

    def _settle_device(self, values: dict, given: set[str]) -> None:
        reason = cpu_reason(values["use_cpu"])
        if not reason and "bf16" in values:
            # Without the argument, torch 2.13 also says yes where bfloat16 is emulated, which is slow.
            has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
            if values["bf16"] and not has_bf16:
                raise UserError(f"--bf16: {torch.cuda.get_device_name()} has no bfloat16; use --fp16 True --bf16 False")
            if "bf16" not in given and "fp16" not in given:
                values["bf16"] = has_bf16
                if not has_bf16:
                    name = torch.cuda.get_device_name()
                    faster = "; --fp16 True is faster" if "fp16" in values else ""
                    self.notes.append(f"{name} has no bfloat16: training in float32{faster}")
        if not reason:
            return
        # Without use_cpu, two torchrun processes on such a machine are two trainings in one folder, each alone.
        values["use_cpu"] = True
        in_autocast = values.get("cpu_bf16") == "autocast"
        replaced = [
            f"--{name}" for name in ("bf16", "fp16") if values.get(name) and not (in_autocast and name == "bf16")
        ]
        if values.get("torch_dtype") in ("bfloat16", "float16"):
            replaced.append(f"--torch_dtype {values['torch_dtype']}")
        if values.get("device_map"):
            replaced.append(f"--device_map {values['device_map']}")
        if os.environ.get("CUDA_VISIBLE_DEVICES"):
            replaced.append(f"CUDA_VISIBLE_DEVICES={os.environ['CUDA_VISIBLE_DEVICES']}")
        if in_autocast and "bf16" in given and not values["bf16"]:
            raise UserError("--cpu_bf16 autocast: not with --bf16 False; leave one of them out")
        values.update(bf16=in_autocast, fp16=False, tf32=None)
        if "torch_dtype" in values:
            values.update(torch_dtype="float32", device_map=None)
        instead = f" instead of {', '.join(replaced)}" if replaced else ""
        precision = "float32 weights, products in bfloat16" if in_autocast else "float32"
        self.notes.append(f"{reason}: {precision} on the CPU{instead}")


def _check_deepspeed(config_file: str) -> None:
    if importlib.util.find_spec("deepspeed") is None:
        raise UserError(f"--deepspeed {config_file}: the package is not installed; run `bash setup.sh --gpu`")
    if not Path(config_file).is_file():
        raise UserError(f"--deepspeed {config_file}: no such file; ds_configs/ holds some")
    if "LOCAL_RANK" not in os.environ:
        raise UserError(
            f"--deepspeed {config_file}: start the stage with its launcher (DEEPSPEED={config_file} bash run_sft.sh) "
            "or with torchrun, for one process too"
        )


def _zero_stage(config_file: str) -> int:
    try:
        config = json.loads(Path(config_file).read_text(encoding="utf-8"))
        stage = config.get("zero_optimization", {}).get("stage", 0)
    except (json.JSONDecodeError, AttributeError) as error:
        raise UserError(f"--deepspeed {config_file}: not a DeepSpeed configuration in JSON ({error})") from None
    for block in ("optimizer", "scheduler"):
        if block in config:
            raise UserError(
                f'--deepspeed {config_file}: its "{block}" block would go before the flags (--optim, --learning_rate, '
                "--lr_scheduler_type) without a word; take it out"
            )
    return stage
