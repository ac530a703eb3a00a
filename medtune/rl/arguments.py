"""The flags of PPO and GRPO: the models, the algorithms, and the flags of transformers that their loops honour.

Distillation has the same ones, and its own (medtune/rl/distillation_arguments.py).
"""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from transformers import TrainingArguments

from medtune.arguments import LoraArguments, ModelArguments, RunArguments
from medtune.errors import UserError
from medtune.measuring.judge_client import JudgeArguments
from medtune.reading.exams import ExamFormat
from medtune.training.checkpoints import PADDING_FREE, optimizer_settings
from medtune.training.template_choice import TemplateArguments

EPISODES_AN_UPDATE = "episodes an update"
# Of a reward and its weight: beside larger ones float32 loses the tenths that KL and other rewards are made of.
LARGEST_REWARD = 1e6


@dataclass(kw_only=True)
class RLModelArguments(ModelArguments):
    sft_model_path: str = field(
        metadata={"help": "Hub name or folder of the model to start from, or the folder of a LoRA adapter."}
    )
    model_name_or_path: str = field(default="", init=False)
    device_map: str | None = field(default=None, init=False)

    def __post_init__(self):
        super().__post_init__()
        self.model_name_or_path = self.sft_model_path


@dataclass
class RLRunArguments(RunArguments):
    max_bad_steps: int = field(default=1, init=False)  # a loss that is not finite stops the run at once


@dataclass
class RewardArguments(JudgeArguments):
    """What replies are scored by, in PPO and GRPO: a group of flags of its own for the parser, from which
    `medtune.rl.rewards.load_rewards` makes the rewards. A stage with another default has a subclass."""

    rewards: list[str] = field(
        default_factory=lambda: ["reward_model"],
        metadata={
            "help": "What replies are scored by, with weights: exam:1 format:0.2. There are exam, format, length, "
            "reference, judge, reward_model, and the functions of --reward_file. The score is the weighted sum."
        },
    )
    reward_model_path: str | None = field(
        default=None,
        metadata={"help": "For reward_model: a folder of reward_modeling.py, an adapter or a model of its own."},
    )
    reward_file: str | None = field(
        default=None, metadata={"help": "A Python file with rewards of your own: functions of replies and records."}
    )
    length_buffer: int | None = field(
        default=None,
        metadata={"help": "For length: of the last so many tokens of --response_length each costs; a fifth of them."},
    )
    exam_format: ExamFormat = field(
        default="tagged",
        metadata={"help": "Exam questions ask for thinking and then <answer>X</answer> (tagged), or for the letter."},
    )

    def __post_init__(self):
        weights = self.reward_weights
        if len(weights) < len(self.rewards):
            raise UserError(f"--rewards {' '.join(self.rewards)}: one of them is named twice")
        if not any(weights.values()):
            raise UserError(f"--rewards {' '.join(self.rewards)}: give one of them a weight other than 0")
        self.check_judge("--rewards judge" if "judge" in weights else None)
        if "reward_model" in weights and not self.reward_model_path:
            raise UserError(
                "--reward_model_path is missing: name a folder of reward_modeling.py, or score by other --rewards, "
                "such as exam:1 format:0.2"
            )
        if self.reward_model_path and "reward_model" not in weights:
            raise UserError(
                f"--reward_model_path {self.reward_model_path}: add reward_model to --rewards, or leave the path out"
            )
        if self.length_buffer is not None and "length" not in weights:
            raise UserError(f"--length_buffer {self.length_buffer}: length is missing from --rewards; add it there")
        if self.length_buffer is not None and self.length_buffer < 1:
            raise UserError(f"--length_buffer {self.length_buffer}: give at least 1")
        if self.exam_format == "letter" and weights.get("format"):
            raise UserError(
                "--exam_format letter: such prompts ask for no <answer> tag, which the reward format looks for; leave "
                "one of them out"
            )

    @property
    def reward_weights(self) -> dict[str, float]:
        """The weight of each reward of `--rewards`, 1 where none is given."""
        weights = {}
        for spec in self.rewards:
            name, _, weight = spec.partition(":")
            try:
                weights[name] = float(weight or "1")
            except ValueError:
                weights[name] = math.nan
            if not name or not abs(weights[name]) <= LARGEST_REWARD:
                raise UserError(f"--rewards {spec}: write a name, or a name and a weight such as exam:0.5")
        return weights


@dataclass
class GRPORewardArguments(RewardArguments):
    rewards: list[str] = field(
        default_factory=lambda: ["exam"], metadata=RewardArguments.__dataclass_fields__["rewards"].metadata
    )


@dataclass
class RolloutArguments(TemplateArguments):
    max_source_length: int = field(default=1024, metadata={"help": "Longest prompt in tokens."})
    truncation: Literal["drop", "cut_prompt_start"] = field(
        default="cut_prompt_start",
        metadata={
            "help": "A prompt over --max_source_length: left out, or without its oldest exchanges and its start."
        },
    )
    response_length: int = field(default=512, metadata={"help": "A reply is cut after so many tokens."})
    total_episodes: int | None = field(
        default=None, metadata={"help": "Replies to learn from in all; without it --num_train_epochs of the prompts."}
    )
    padding_free: Literal["auto", "True", "False"] = field(
        default="auto",
        metadata={
            "help": "Join rows into one, so that none is padded; auto: with FlashAttention or on a CPU, if log-probs "
            "stay the same."
        },
    )
    rollout_batch_size: int = field(default=16, metadata={"help": "Replies that a device generates at a time."})
    stop_token: str | None = field(
        default=None, metadata={"help": "The token that ends a reply; without it the template's and the tokenizer's."}
    )
    temperature: float = field(default=0.7, metadata={"help": "Of sampling, and of the log-probs learned from."})
    vllm_url: str | None = field(
        default=None,
        metadata={"help": "vLLM servers that write the replies, such as http://127.0.0.1:8001; several with commas."},
    )
    vllm_is_cap: float | None = field(
        default=None,
        metadata={
            "help": "Cap of the ratios of policy and vLLM that weight its tokens in the loss, without it 2; 0: no "
            "weights."
        },
    )

    def __post_init__(self):
        self.refuse_zero("response_length", "rollout_batch_size", "temperature")
        if self.vllm_is_cap and not self.vllm_is_cap >= 1:
            raise UserError(f"--vllm_is_cap {self.vllm_is_cap:g}: give at least 1, or 0 for no weights")
        if self.vllm_is_cap is not None and not self.vllm_url:
            raise UserError(f"--vllm_is_cap {self.vllm_is_cap:g}: --vllm_url is missing, whose tokens it weights")
        if self.vllm_is_cap is None:
            self.vllm_is_cap = 2.0
        check_server_urls("--vllm_url", self.vllm_url)
        if self.max_source_length < 8:
            raise UserError(f"--max_source_length {self.max_source_length}: no prompt fits; give a number of tokens")
        if self.total_episodes is not None and self.total_episodes < 1:
            raise UserError(f"--total_episodes {self.total_episodes}: give at least 1")

    @property
    def server_urls(self) -> list[str]:
        """The addresses of `--vllm_url`."""
        return split_urls(self.vllm_url)

    def refuse_zero(self, *names: str) -> None:
        """Raise UserError for a flag whose value is not above 0."""
        for name in names:
            if getattr(self, name) <= 0:
                raise UserError(f"--{name} {getattr(self, name)}: give more than 0")

    def refuse_negative(self, *names: str) -> None:
        """Raise UserError for a flag whose value is below 0."""
        for name in names:
            if getattr(self, name) < 0:
                raise UserError(f"--{name} {getattr(self, name):g}: give 0 or more")


_GIVE_URL = "no address of a server; give http://127.0.0.1:8001, several with commas"


def split_urls(urls: str | None) -> list[str]:
    return [url.strip() for url in (urls or "").split(",") if url.strip()]


def check_server_urls(flag: str, urls: str | None) -> None:
    """Raise UserError unless all are `http://host:port`."""
    if urls and not split_urls(urls):
        raise UserError(f"{flag} {urls}: {_GIVE_URL}")
    for url in split_urls(urls):
        _check_server_url(f"{flag} {url}", url)


def _check_server_url(where: str, url: str) -> None:
    try:
        parts = urlsplit(url)
        has_host = parts.hostname is not None and parts.port != 0
    except ValueError:
        raise UserError(f"{where}: {_GIVE_URL}") from None
    if parts.scheme not in ("http", "https") or not has_host:
        raise UserError(f"{where}: {_GIVE_URL}")
    if parts.scheme == "https":
        raise UserError(f"{where}: servers are asked without encryption; give http://{parts.netloc}")
    if parts.path.strip("/") or parts.query or parts.fragment:
        raise UserError(f"{where}: paths are added here; give http://{parts.netloc}")


@dataclass
class PPOArguments(RolloutArguments):
    missing_eos_penalty: float = field(
        default=0.0, metadata={"help": "Taken off the score of a reply that has no end token."}
    )
    kl_coef: float = field(default=0.05, metadata={"help": "Reward lost for a nat of KL from the reference."})
    adaptive_kl: bool = field(default=False, metadata={"help": "Steer --kl_coef so that the KL nears --target_kl."})
    target_kl: float = field(default=6.0, metadata={"help": "Adaptive: KL of a reply in nats to steer to."})
    kl_horizon: int = field(default=10000, metadata={"help": "Adaptive: episodes over which --kl_coef adapts."})
    stop_at_kl: float = field(default=50.0, metadata={"help": "Stop when the mean KL of a reply exceeds it, in nats."})
    num_ppo_epochs: int = field(default=4, metadata={"help": "Passes over the replies of an update."})
    num_mini_batches: int = field(default=1, metadata={"help": "Optimizer steps in a pass."})
    cliprange: float = field(default=0.2, metadata={"help": "Clip of the probability ratio."})
    cliprange_value: float = field(
        default=0.2, metadata={"help": "Clip of a value's change, in standard deviations of the returns."}
    )
    vf_coef: float = field(default=0.1, metadata={"help": "Factor of the value loss."})
    gamma: float = field(default=1.0, metadata={"help": "Discount of later rewards."})
    lam: float = field(default=0.95, metadata={"help": "Lambda of GAE."})
    whiten_rewards: bool = field(default=False, metadata={"help": "Scale token rewards to variance 1."})

    def __post_init__(self):
        super().__post_init__()
        self.refuse_zero("stop_at_kl", "num_ppo_epochs", "num_mini_batches", "cliprange", "cliprange_value")
        self.refuse_zero("target_kl", "kl_horizon")
        self.refuse_negative("missing_eos_penalty", "kl_coef", "vf_coef")
        for name in ("gamma", "lam"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"--{name} {getattr(self, name):g}: give a number from 0 to 1")


@dataclass
class GRPOArguments(RolloutArguments):
    temperature: float = field(default=1.0, metadata={"help": "Of sampling, and of the log-probs learned from."})
    num_generations: int = field(default=8, metadata={"help": "Replies to a prompt, which are compared: a group."})
    loss_type: Literal["dapo", "grpo", "dr_grpo", "gspo"] = field(
        default="dapo",
        metadata={
            "help": "dapo: each token counts the same; grpo: each reply; dr_grpo: over a constant; gspo: as grpo, with "
            "one ratio a reply."
        },
    )
    epsilon: float = field(default=0.2, metadata={"help": "Clip of the probability ratio downwards."})
    epsilon_high: float | None = field(
        default=None, metadata={"help": "And upwards; without it as --epsilon. DAPO takes 0.28."}
    )
    beta: float = field(default=0.0, metadata={"help": "Factor of the KL from the start; 0 needs no reference."})
    scale_rewards: Literal["group", "none"] = field(
        default="group", metadata={"help": "Advantages over the standard deviation of their group, or as they are."}
    )
    num_iterations: int = field(default=1, metadata={"help": "Optimizer steps on the replies of an update."})
    redraw_groups: int = field(
        default=0,
        metadata={"help": "Take other prompts for groups of equal rewards, at most so many times an update."},
    )
    mask_truncated_completions: bool = field(
        default=False, metadata={"help": "Learn nothing from a reply that is cut at --response_length."}
    )
    stop_at_kl: float = field(
        default=1.0,
        metadata={
            "help": "Stop when the mean KL of a token exceeds it, in nats: of an update, with --beta from the start."
        },
    )

    def __post_init__(self):
        super().__post_init__()
        self.refuse_zero("epsilon", "num_iterations", "stop_at_kl")
        self.refuse_negative("beta", "redraw_groups")
        if self.num_generations < 2:
            raise UserError(f"--num_generations {self.num_generations}: give at least 2, which are compared")
        if self.epsilon >= 1:
            raise UserError(f"--epsilon {self.epsilon:g}: give less than 1, of which ratios are clipped")
        if self.epsilon_high is None:
            self.epsilon_high = self.epsilon
        self.refuse_zero("epsilon_high")


@dataclass
class RLTrainingArguments:
    """The flags that the loop shares with transformers' TrainingArguments, with the same meaning.

    A step is an update. `training_arguments` makes transformers' own of them.
    """

    output_dir: str | None = field(default=None, metadata={"help": "Folder for checkpoints and results."})
    do_train: bool = field(default=False, metadata={"help": "Train; without it there is nothing to do."})
    do_eval: bool = field(default=False, metadata={"help": "Reply to held-out prompts before and after training."})
    eval_strategy: Literal["no", "steps"] = field(default="no", metadata={"help": "steps: every --eval_steps too."})
    eval_steps: int | None = field(
        default=None, metadata={"help": "An evaluation every so many updates; without it every --logging_steps."}
    )
    per_device_train_batch_size: int = field(default=8, metadata={"help": "Episodes of a device at a time."})
    gradient_accumulation_steps: int = field(
        default=1, metadata={"help": "An update has so many times --per_device_train_batch_size episodes on a device."}
    )
    num_train_epochs: float = field(default=3.0, metadata={"help": "Passes over the prompts."})
    max_steps: int = field(default=-1, metadata={"help": "Updates in all, in place of --num_train_epochs."})
    learning_rate: float = field(default=1e-5, metadata={"help": "Highest learning rate, of policy and value model."})
    lr_scheduler_type: str = field(default="linear", metadata={"help": "Schedule of the learning rate."})
    lr_scheduler_kwargs: str | None = field(default=None, metadata={"help": "Its settings, as JSON."})
    warmup_steps: float = field(default=0, metadata={"help": "Updates of warmup; below 1 a share of all updates."})
    weight_decay: float = field(default=0.0, metadata={"help": "Weight decay."})
    adam_beta1: float = field(default=0.9, metadata={"help": "Beta1 of Adam."})
    adam_beta2: float = field(default=0.999, metadata={"help": "Beta2 of Adam."})
    adam_epsilon: float = field(default=1e-5, metadata={"help": "Epsilon of Adam."})  # detail
    max_grad_norm: float = field(default=1.0, metadata={"help": "Gradients are clipped to this norm; 0 for never."})
    optim: str = field(default="adamw_torch_fused", metadata={"help": "Optimizer, by transformers' name."})
    optim_args: str | None = field(default=None, metadata={"help": "Its settings, name=value with commas."})
    logging_steps: int = field(default=1, metadata={"help": "A line in the log every so many updates."})
    logging_first_step: bool = field(default=False, metadata={"help": "A line for the first update too."})
    save_strategy: Literal["no", "steps"] = field(default="steps", metadata={"help": "no: a checkpoint at the end."})
    save_steps: int = field(default=500, metadata={"help": "A checkpoint every so many updates."})
    save_total_limit: int | None = field(default=None, metadata={"help": "Keep so many checkpoints."})
    resume_from_checkpoint: str | None = field(
        default=None, metadata={"help": "True goes on from the newest checkpoint, a folder from that one."}
    )
    bf16: bool = field(default=False, metadata={"help": "Compute in bfloat16; on a GPU that has it the default."})
    tf32: bool | None = field(default=None, metadata={"help": "TF32 in float32 products."})
    gradient_checkpointing: bool = field(default=False, metadata={"help": "Less memory, more time."})
    gradient_checkpointing_kwargs: str | None = field(default=None, metadata={"help": "Its settings, as JSON."})
    use_cpu: bool = field(default=False, metadata={"help": "The CPU, though there is a GPU."})
    seed: int = field(default=42, metadata={"help": "Of the order of prompts and of all draws."})
    report_to: str = field(default="none", metadata={"help": "Trackers: tensorboard, wandb, ..."})
    run_name: str | None = field(default=None, metadata={"help": "The run's name there."})
    disable_tqdm: bool | None = field(default=None, metadata={"help": "No progress bars."})
    ddp_timeout: int = field(default=1800, metadata={"help": "Seconds to wait for other processes, and for vLLM."})
    ddp_backend: str | None = field(default=None, metadata={"help": "How processes talk: nccl or gloo."})
    deepspeed: str | None = field(default=None, metadata={"help": "A configuration of ZeRO-1 or 2: ds_configs/."})

    def __post_init__(self):
        if self.deepspeed:
            zero = json.loads(Path(self.deepspeed).read_text(encoding="utf-8")).get("zero_optimization", {})
            if zero.get("stage") not in (1, 2):
                raise UserError(
                    f"--deepspeed {self.deepspeed}: this stage takes ZeRO-1 and 2; ZeRO-3 would gather all weights for "
                    "every token that is generated. Take ds_configs/zero2.json, and --load_in_4bit True if memory is "
                    "short"
                )
        if not self.do_train:
            raise UserError("--do_train is missing; scripts/evaluate_model.py measures a trained model")
        if self.max_steps < 1 and self.max_steps != -1:
            raise UserError(f"--max_steps {self.max_steps}: give at least 1; -1 means by episodes")
        for name in ("eval_steps", "save_steps", "logging_steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"--{name} {value}: give a number of updates of at least 1")

    def training_arguments(self) -> TrainingArguments:
        """transformers' own of these, which starts the processes and knows optimizers and schedules."""
        values = dict(vars(self))
        for kind in ("", "_kwargs"):  # transformers 5.24 warns of the old name
            values[f"activation_checkpointing{kind}"] = values.pop(f"gradient_checkpointing{kind}")
        try:
            # To accelerate, which would take one model for it, a run under DeepSpeed is a run like any other.
            training_args = TrainingArguments(**values | {"deepspeed": None})
        except (ValueError, ImportError) as error:
            raise UserError(" ".join(str(error).split())) from error
        training_args.deepspeed = self.deepspeed
        return training_args


def check_combination(lora_args: LoraArguments, args: RolloutArguments, training_args: TrainingArguments) -> None:
    """Refuse flags that contradict each other."""
    if not lora_args.use_peft:
        raise UserError(
            "--use_peft False: the roles are adapters on one base, so the policy is one too; a model of full weights "
            "is welcome as --sft_model_path"
        )
    if training_args.max_steps > 0 and args.total_episodes is not None:
        raise UserError("--max_steps and --total_episodes both say how long to train: give one of them")


def check_mini_batches(ppo_args: PPOArguments, training_args: TrainingArguments) -> None:
    """Refuse minibatches that differ in size."""
    if training_args.gradient_accumulation_steps % ppo_args.num_mini_batches:
        raise UserError(
            f"--num_mini_batches {ppo_args.num_mini_batches}: does not divide --gradient_accumulation_steps "
            f"{training_args.gradient_accumulation_steps}, so minibatches would differ in size"
        )


def check_groups(grpo_args: GRPOArguments, training_args: TrainingArguments, n_processes: int) -> None:
    """Refuse groups that an update, or for --redraw_groups the processes, cannot have whole."""
    size = grpo_args.num_generations
    per_update = training_args.per_device_train_batch_size * training_args.gradient_accumulation_steps * n_processes
    if per_update % size:
        made_of = f"{training_args.per_device_train_batch_size} a device x {training_args.gradient_accumulation_steps}"
        raise UserError(
            f"--num_generations {size}: does not divide the {per_update} episodes of an update ({made_of} accumulated "
            f"x {n_processes} process(es)); give another --gradient_accumulation_steps"
        )
    if grpo_args.redraw_groups and size % n_processes:
        raise UserError(f"--redraw_groups: {n_processes} processes share a group of {size}; give as many or a multiple")


def fixed_settings(
    stage: str,
    model_args: RLModelArguments,
    training_args: TrainingArguments,
    args: RolloutArguments,
    per_update: int,
    n_prompts: int,
    own: dict[str, object],
) -> dict[str, object]:
    """The settings that a resumed run must keep; `own` are those of the stage alone."""
    return {
        "stage": stage,
        "--sft_model_path": model_args.sft_model_path,
        "--seed": training_args.seed,
        **optimizer_settings(training_args),
        **own,
        EPISODES_AN_UPDATE: per_update,
        "training prompts": n_prompts,
        "processes under DeepSpeed": training_args.world_size if training_args.deepspeed else 0,
        **({} if args.padding_free == "auto" else {PADDING_FREE: args.padding_free}),
    }
