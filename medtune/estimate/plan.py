"""What a stage's command asks for, read by the stage's own flags as a GPU would have it."""

import importlib
import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

from transformers import TrainingArguments

from medtune.arguments import DataArguments, LoraArguments, ModelArguments, RunArguments, StageArgumentParser
from medtune.devices import are_hidden, read_flags
from medtune.errors import UserError
from medtune.models.lineage import base_of, is_adapter, read_adapter_config
from medtune.rl.arguments import (
    GRPOArguments,
    GRPORewardArguments,
    PPOArguments,
    RewardArguments,
    RLModelArguments,
    RLRunArguments,
    RLTrainingArguments,
)
from medtune.training.causal_lm_trainer import CausalLMConfig
from medtune.training.precision import base_dtype
from medtune.training.preference_arguments import PairArguments, PreferenceConfig
from medtune.training.reward_trainer import RMTrainingArguments

# By script, the stage's name. The flags of two stages are classes of their scripts.
STAGES = {
    "pretraining": "pt",
    "supervised_finetuning": "sft",
    "reward_modeling": "rm",
    "dpo_training": "dpo",
    "ppo_training": "ppo",
    "grpo_training": "grpo",
}
_OWN_FLAGS = {
    "pt": ("PTArguments", CausalLMConfig),
    "sft": ("SFTArguments", CausalLMConfig),
    "rm": (PairArguments, RMTrainingArguments),
    "dpo": (PairArguments, PreferenceConfig),
    "ppo": (PPOArguments, RLTrainingArguments),
    "grpo": (GRPOArguments, RLTrainingArguments),
}
_REWARD_FLAGS = {"ppo": RewardArguments, "grpo": GRPORewardArguments}


# ---------------------------------------------------------------- flags


class EstimateParser(StageArgumentParser):
    """The flags as on a GPU with bfloat16, whatever this machine has; on a CPU where the command chooses it.

    zero: the block `zero_optimization` of --deepspeed's file, {} without one.
    """

    def __init__(self, dataclass_types: Sequence[type], on_cpu: bool):
        super().__init__(dataclass_types)
        self.on_cpu = on_cpu
        self.zero: dict = {}
        self.output_dir = ""

    def _settle_training_arguments(self, values: dict, given: set[str]) -> None:
        super()._settle_training_arguments(values, given)
        # A trainer makes its folder.
        self.output_dir, values["output_dir"] = values["output_dir"], tempfile.gettempdir()
        values["resume_from_checkpoint"] = None

    def _settle_deepspeed(self, values: dict) -> None:
        file = Path(values["deepspeed"])
        if not file.is_file():
            raise UserError(f"--deepspeed {file}: no such file; ds_configs/ holds some")
        try:
            self.zero = json.loads(file.read_text(encoding="utf-8")).get("zero_optimization", {})
        except (json.JSONDecodeError, AttributeError) as error:
            raise UserError(f"--deepspeed {file}: not a DeepSpeed configuration in JSON ({error})") from None
        values["deepspeed"] = None

    def _check_trackers(self, values: dict) -> None:
        values["report_to"] = ["none"]

    def _settle_device(self, values: dict, given: set[str]) -> None:
        if self.on_cpu:
            super()._settle_device(values, given)
            return
        if "bf16" in values and not {"bf16", "fp16"} & given:
            values["bf16"] = True
        if values.get("fp16"):
            values.update(bf16=True, fp16=False)  # which takes as many bytes, and a CPU has it
        # Nothing is computed here, so that what a GPU alone has must not be asked for.
        values.update(use_cpu=True, tf32=None)
        for name in ("torch_compile", "use_liger_kernel"):
            if name in values:
                values[name] = False


# ---------------------------------------------------------------- the plan


@dataclass
class RunPlan:
    """A stage's command as its flags have it.

    module: of the stage's script.
    base_model: hub name or folder of the base of the model to start from.
    adapter: the adapter that training continues, None for a new one.
    notes: assumptions, one line each.
    """

    stage: str
    module: ModuleType
    model_args: ModelArguments
    data_args: DataArguments
    lora_args: LoraArguments
    own_args: object
    reward_args: RewardArguments | None
    training_args: TrainingArguments
    given: dict[str, str]
    zero: dict
    output_dir: str
    n_gpus: int
    on_cpu: bool
    base_model: str = ""
    continues_adapter: bool = False
    notes: list[str] = field(default_factory=list)

    @property
    def is_rl(self) -> bool:
        return self.reward_args is not None

    @property
    def zero_stage(self) -> int:
        return self.zero.get("stage", 0)

    @property
    def bits(self) -> int:
        """Of a weight of a linear layer of the base."""
        return 4 if self.model_args.load_in_4bit else 8 if self.model_args.load_in_8bit else 16

    @property
    def checkpointing(self) -> bool:
        return self.training_args.gradient_checkpointing


def load_stage(script: str) -> ModuleType:
    """The module of a stage's script. Raises UserError for another one."""
    name = Path(script).stem
    if name == "distillation_training":
        raise UserError(
            f"{script}: not estimated, the teacher is not counted yet; docs/recipes/distillation.md counts it"
        )
    if name not in STAGES:
        raise UserError(f"{script}: not a stage; there are {', '.join(f'{stage}.py' for stage in STAGES)}")
    return importlib.import_module(name)


def read_plan(module: ModuleType, argv: Sequence[str], n_gpus: int, assumed_base: str) -> RunPlan:
    """The plan of a stage's flags.

    assumed_base: the base model of an adapter that an earlier stage has yet to leave.

    Raises UserError as the stage would.
    """
    stage = STAGES[module.__name__]
    own, training = _OWN_FLAGS[stage]
    own = getattr(module, own) if isinstance(own, str) else own
    rewards = [_REWARD_FLAGS[stage]] if stage in _REWARD_FLAGS else []
    model_class, run_class = (RLModelArguments, RLRunArguments) if rewards else (ModelArguments, RunArguments)
    on_cpu = read_flags(argv).use_cpu or are_hidden()
    parser = EstimateParser(
        [model_class, DataArguments, LoraArguments, run_class, own, *rewards, training], on_cpu=on_cpu
    )
    model_args, data_args, lora_args, _, own_args, *reward_args, training_args = parser.parse(argv)
    if rewards:
        training_args = training_args.training_arguments()
        if parser.zero.get("stage") == 3:
            raise UserError("--deepspeed: PPO and GRPO take ZeRO-1 and 2; take ds_configs/zero2.json")
    plan = RunPlan(
        *(stage, module, model_args, data_args, lora_args, own_args, next(iter(reward_args), None), training_args),
        given=parser.given,
        zero=parser.zero,
        output_dir=parser.output_dir,
        n_gpus=1 if on_cpu else n_gpus,
        on_cpu=on_cpu,
    )
    _find_start(plan, assumed_base)
    if on_cpu:
        model_args.torch_dtype = base_dtype(model_args, lora_args, training_args, parser.given, None)
    return plan


def _find_start(plan: RunPlan, assumed_base: str) -> None:
    """Settle base and adapter of the model to start from, where an earlier stage has it or will have it."""
    path = plan.model_args.model_name_or_path
    if is_adapter(path):
        config = read_adapter_config(path)
        plan.base_model, plan.continues_adapter = base_of(path), True
        plan.lora_args.lora_rank, plan.lora_args.use_dora = config.r, config.use_dora
    elif _is_to_come(path):
        plan.base_model, plan.continues_adapter = assumed_base, plan.lora_args.use_peft
        plan.notes.append(f"{path} is not there yet: an adapter of these flags on {assumed_base} is assumed")
    else:
        plan.base_model = path


def _is_to_come(path: str) -> bool:
    """Whether a path is what an earlier stage leaves, and has not left yet."""
    return not Path(path).exists() and "checkpoint-" in Path(path).name


def count_gpus_of_command() -> int:
    """The GPUs that CUDA_VISIBLE_DEVICES names, or N_PROCESSES; 1 without."""
    named = os.environ.get("N_PROCESSES") or str(len(os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")))
    if not named.isdecimal():
        raise UserError(f"N_PROCESSES={named}: give a number of processes, one a GPU")
    return max(int(named), 1)
