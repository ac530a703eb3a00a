"""What a stage's command asks for, read by the stage's own flags as a GPU would have it."""

import importlib
import json
import os
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

import torch
from transformers import TrainingArguments

from medtune.arguments import DataArguments, LoraArguments, ModelArguments, RunArguments, StageArgumentParser
from medtune.devices import are_hidden, read_flags
from medtune.errors import UserError
from medtune.launch import count_nodes
from medtune.models.adapters import refuse_quantized_training
from medtune.models.lineage import base_of, is_adapter, read_adapter_config
from medtune.rl.arguments import (
    GRPOArguments,
    GRPORewardArguments,
    PPOArguments,
    RewardArguments,
    RLModelArguments,
    RLRunArguments,
    RLTrainingArguments,
    check_combination,
    check_groups,
    check_mini_batches,
)
from medtune.rl.distillation_arguments import DistillationArguments, TeacherArguments, check_teacher_flags
from medtune.rl.vllm_launch import MEMORY_ALONE, count, read_server_flags, refuse_several_nodes, share_gpus
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
    "distillation_training": "distillation",
}
_OWN_FLAGS = {
    "pt": ("PTArguments", CausalLMConfig),
    "sft": ("SFTArguments", CausalLMConfig),
    "rm": (PairArguments, RMTrainingArguments),
    "dpo": (PairArguments, PreferenceConfig),
    "ppo": (PPOArguments, RLTrainingArguments),
    "grpo": (GRPOArguments, RLTrainingArguments),
    "distillation": (DistillationArguments, RLTrainingArguments),
}
# Of what says how good replies are, in the stages with rollouts.
_OTHER_FLAGS = {"ppo": RewardArguments, "grpo": GRPORewardArguments, "distillation": TeacherArguments}


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


@dataclass(frozen=True)
class Servers:
    """vLLM's servers. memory: share of its GPU that each takes; share_gpus: whether training is on them too."""

    n: int = 0
    memory: float = 0.0
    share_gpus: bool = False


@dataclass
class RunPlan:
    """A stage's command as its flags have it.

    module: of the stage's script.
    n_gpus: processes of training, one a GPU, on all nodes; n_split: GPUs over which --device_map splits a process.
    servers: of vLLM, which write the replies of PPO, GRPO and distillation.
    teacher_place: of distillation's teacher: "beside" the student, "apart" on a GPU of its own for each of training, or
        "" where it is not counted.
    base_model: hub name or folder of the base of the model to start from.
    continues_adapter: whether training continues one.
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
    n_split: int = 1
    servers: Servers = Servers()
    teacher_args: TeacherArguments | None = None
    teacher_place: str = ""
    base_model: str = ""
    continues_adapter: bool = False
    notes: list[str] = field(default_factory=list)

    @property
    def is_rl(self) -> bool:
        return self.stage in _OTHER_FLAGS

    @property
    def reward_model_path(self) -> str | None:
        return self.reward_args and self.reward_args.reward_model_path

    @property
    def device(self) -> torch.device:
        """Of the run, whatever this machine has."""
        return torch.device("cpu" if self.on_cpu else "cuda")

    @property
    def n_cards(self) -> int:
        """GPUs that are paid for."""
        of_training = self.n_gpus * (2 if self.teacher_place == "apart" else self.n_split)
        return of_training + (0 if self.servers.share_gpus else self.servers.n)

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
    argv, n_gpus, servers = _start_servers(stage, argv, n_gpus)
    others = [_OTHER_FLAGS[stage]] if stage in _OTHER_FLAGS else []
    model_class, run_class = (RLModelArguments, RLRunArguments) if others else (ModelArguments, RunArguments)
    on_cpu = read_flags(argv).use_cpu or are_hidden()
    parser = EstimateParser(
        [model_class, DataArguments, LoraArguments, run_class, own, *others, training], on_cpu=on_cpu
    )
    model_args, data_args, lora_args, _, own_args, *other_args, training_args = parser.parse(argv)
    if others:
        training_args = training_args.training_arguments()
        if parser.zero.get("stage") == 3:
            raise UserError("--deepspeed: PPO, GRPO and distillation take ZeRO-1 and 2; take ds_configs/zero2.json")
        check_combination(lora_args, own_args, training_args)
        if stage == "grpo":
            check_groups(own_args, training_args, 1 if on_cpu else n_gpus)
        elif stage == "ppo":
            check_mini_batches(own_args, training_args)
        else:
            check_teacher_flags(*other_args, own_args)
        if servers.n == 0 and (n_servers := len(own_args.server_urls)):
            servers = Servers(n_servers, float(MEMORY_ALONE))
    refuse_quantized_training(lora_args.use_peft, model_args.load_in_4bit or model_args.load_in_8bit)
    others = dict.fromkeys(("reward_args", "teacher_args"))
    others["teacher_args" if stage == "distillation" else "reward_args"] = next(iter(other_args), None)
    plan = RunPlan(
        *(stage, module, model_args, data_args, lora_args, own_args),
        **others,
        training_args=training_args,
        given=parser.given,
        zero=parser.zero,
        output_dir=parser.output_dir,
        n_gpus=1 if on_cpu else n_gpus,
        on_cpu=on_cpu,
        n_split=_count_split(model_args, n_gpus) if not on_cpu else 1,
        servers=servers,
    )
    _find_start(plan, assumed_base)
    if plan.teacher_args is not None:
        _find_teacher(plan)
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
        plan.base_model, plan.continues_adapter = base_of(assumed_base), plan.lora_args.use_peft
        plan.notes.append(f"{path} is not there yet: an adapter of these flags on {assumed_base} is assumed")
    else:
        plan.base_model = path


def _find_teacher(plan: RunPlan) -> None:
    """Settle where the teacher is. Raises UserError for one that is not there yet."""
    args = plan.teacher_args
    if args.teacher_url or (args.teacher_device == "cpu" and not plan.on_cpu):
        where = f"the servers of {args.teacher_url}" if args.teacher_url else "the CPU"
        plan.notes.append(f"the teacher is on {where}, and not counted")
        return
    if _is_to_come(args.teacher_model_path):
        raise UserError(
            f"--teacher_model_path {args.teacher_model_path}: not there yet; name the model that it will be made of"
        )
    # The first one's GPU comes behind those of training.
    named = re.fullmatch(r"cuda:([1-9]\d*)", args.teacher_device or "")
    is_apart = named is not None and not plan.on_cpu
    plan.teacher_place = "apart" if is_apart else "beside"
    if is_apart:
        plan.n_gpus = min(plan.n_gpus, int(named[1]))


def _is_to_come(path: str) -> bool:
    """Whether a path is what an earlier stage leaves, and has not left yet."""
    return not Path(path).exists() and "checkpoint-" in Path(path).name


# ---------------------------------------------------------------- GPUs


def count_gpus_of_command() -> int:
    """On each node those that CUDA_VISIBLE_DEVICES names, or N_PROCESSES; 1 without."""
    named = os.environ.get("N_PROCESSES") or str(_count_visible())
    if not named.isdecimal():
        raise UserError(f"N_PROCESSES={named}: give a number of processes, one a GPU")
    return max(int(named), 1) * count_nodes(os.environ)


def _count_visible() -> int:
    return len(os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(","))


def _count_split(model_args: ModelArguments, n_gpus: int) -> int:
    """The GPUs over which one process splits its model: with N_PROCESSES=1 all that it sees."""
    is_split = model_args.device_map and n_gpus == 1 and os.environ.get("N_PROCESSES") == "1"
    return _count_visible() if is_split else 1


def _start_servers(stage: str, argv: Sequence[str], n_gpus: int) -> tuple[Sequence[str], int, Servers]:
    """The flags, GPUs of training and servers that VLLM_GPUS makes of a command, as `medtune.rl.vllm_launch` does."""
    if os.environ.get("VLLM_GPUS", "") in ("", "0") or stage not in _OTHER_FLAGS:
        return argv, n_gpus, Servers()
    refuse_several_nodes(os.environ)
    read_server_flags(argv)  # refuses --vllm_url beside it
    n_servers, memory = count(os.environ, "VLLM_GPUS", "1"), os.environ.get("VLLM_MEMORY", "")
    shares = share_gpus(n_servers, [str(index) for index in range(n_gpus)], memory)
    try:
        of_server = float(shares.memory)
    except ValueError:
        raise UserError(f"VLLM_MEMORY={memory}: give a share of a GPU, such as {MEMORY_ALONE}") from None
    n_training = len(shares.of_training.split(","))
    urls = ",".join(["http://127.0.0.1:8001"] * n_servers)
    servers = Servers(n_servers, of_server, share_gpus=n_training + n_servers > n_gpus)
    return [*argv, "--vllm_url", urls], n_training, servers
