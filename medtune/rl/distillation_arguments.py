"""The flags of on-policy distillation: the teacher, and how the student learns from it."""

from dataclasses import dataclass, field
from typing import Literal

from medtune.errors import UserError
from medtune.rl.arguments import RolloutArguments, check_server_urls


@dataclass(kw_only=True)
class TeacherArguments:
    teacher_model_path: str = field(
        metadata={"help": "Hub name or folder of the teacher, or of its LoRA adapter; of the student's tokenizer."}
    )
    teacher_bits: Literal[16, 8, 4] = field(
        default=16, metadata={"help": "Bits of the teacher's weights: 8 and 4 by bitsandbytes, 16 as --torch_dtype."}
    )
    teacher_device: str | None = field(
        default=None,
        metadata={
            "help": "Where the teacher is, such as cuda:1, without it beside the student; of several processes each "
            "takes the next GPU."
        },
    )
    teacher_url: str | None = field(
        default=None,
        metadata={"help": "vLLM servers that have the teacher, such as http://127.0.0.1:8002; several with commas."},
    )

    def __post_init__(self):
        check_server_urls("--teacher_url", self.teacher_url)
        for name, default in (("teacher_bits", 16), ("teacher_device", None)):
            value = getattr(self, name)
            if self.teacher_url and value != default:
                raise UserError(f"--{name} {value}: the teacher of --teacher_url is not loaded here; leave one out")


@dataclass
class DistillationArguments(RolloutArguments):
    temperature: float = field(default=1.0, metadata={"help": "Of sampling, and of both models' log-probs."})
    beta: float | None = field(
        default=None,
        metadata={
            "help": "Learn whole distributions by the generalized Jensen-Shannon divergence: 0 is the KL of the "
            "teacher from the student, 1 that of the student from the teacher; without it by a reward of the sampled "
            "tokens."
        },
    )
    on_policy_share: float = field(
        default=1.0,
        metadata={"help": "Share of the updates that learn from the student's replies; the others from the data's."},
    )

    def __post_init__(self):
        super().__post_init__()
        for name in ("beta", "on_policy_share"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise UserError(f"--{name} {value:g}: give a number from 0 to 1")
        if self.on_policy_share < 1 and self.beta is None:
            raise UserError(
                f"--on_policy_share {self.on_policy_share:g}: the reward is an estimate from tokens that the student "
                "drew, which the data's replies are not; give --beta too, such as 0.5"
            )


def check_teacher_flags(teacher_args: TeacherArguments, args: DistillationArguments) -> None:
    """Refuse what a server's log-probs, of the tokens that are there at temperature 1, are not enough for."""
    if not teacher_args.teacher_url:
        return
    if args.beta is not None:
        raise UserError(
            f"--beta {args.beta:g}: it compares whole distributions, and --teacher_url gives the log-probs of the "
            "sampled tokens alone; leave --beta out, or --teacher_url, and the teacher is loaded here"
        )
    if args.temperature != 1:
        raise UserError(
            f"--temperature {args.temperature:g}: the log-probs of --teacher_url are those at 1; leave it out"
        )
