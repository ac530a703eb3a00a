"""Flags of preference training: limits of the replies, the losses, their settings and refused combinations."""

import difflib
from dataclasses import dataclass, field

from medtune.errors import UserError
from medtune.training.stage_trainer import StageTrainingArguments
from medtune.training.template_choice import TemplateArguments

DPO_LOSSES = ("sigmoid", "hinge", "ipo", "robust", "sft")
REFERENCE_FREE = ("orpo", "simpo")
UNPAIRED = ("kto",)
SMOOTHED = ("robust", "simpo")
# Of older versions and of TRL.
REMOVED_LOSSES = (
    *("exo_pair", "nca_pair", "bco_pair", "sppo_hard", "aot", "aot_unpaired", "apo_zero", "apo_down", "discopop"),
    "sigmoid_norm",
)


@dataclass
class PairArguments(TemplateArguments):
    """Template and limits of the replies that the reward model and DPO compare."""

    max_source_length: int = field(
        default=1024,
        metadata={"help": "Longest prompt in tokens; a longer one loses its oldest exchanges, then its start."},
    )
    max_target_length: int = field(
        default=512, metadata={"help": "Longest reply in tokens; a longer one is cut and gets no end token."}
    )

    def __post_init__(self):
        for name in ("max_source_length", "max_target_length"):
            if getattr(self, name) < 8:
                raise UserError(f"--{name} {getattr(self, name)}: too little to compare; give a number of tokens")


@dataclass
class PreferenceConfig(StageTrainingArguments):
    learning_rate: float = field(default=1e-6, metadata={"help": "Highest learning rate."})
    loss_type: list[str] = field(
        default_factory=lambda: ["sigmoid"],
        metadata={
            "help": f"One or several of {', '.join(DPO_LOSSES)}; or alone, without a reference, one of "
            f"{', '.join(REFERENCE_FREE)}; or kto, which learns from single replies with a label."
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
        default=0.0, metadata={"help": f"Share of pairs taken to be the wrong way; for {', '.join(SMOOTHED)}."}
    )
    desirable_weight: float = field(default=1.0, metadata={"help": "kto: how much a reply with the label true counts."})
    undesirable_weight: float = field(
        default=1.0, metadata={"help": "kto: how much a reply with the label false counts."}
    )
    precompute_ref_log_probs: bool | None = field(
        default=None,
        metadata={
            "help": "The reference's log-probs once before training, kept in --cache_dir; on if epochs are several."
        },
    )
    precompute_ref_batch_size: int | None = field(
        default=None, metadata={"help": "Rows at a time for that; the batch sizes of training and evaluation without."}
    )

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
        if self.precompute_ref_log_probs is None:
            self.precompute_ref_log_probs = self.has_reference and self.max_steps <= 0 and self.num_train_epochs > 1
        if not self.do_train and self.has_reference:
            raise UserError(
                "--do_eval without --do_train: the model would be compared with itself as the reference, and every "
                "reward would be 0; scripts/evaluate_model.py measures a trained model"
            )

    @property
    def has_reference(self) -> bool:
        return not set(self.loss_type) & set(REFERENCE_FREE)

    @property
    def is_unpaired(self) -> bool:
        return self.loss_type == ["kto"]

    @property
    def weighted_losses(self) -> dict[str, float]:
        return dict(zip(self.loss_type, self.loss_weights or [1.0] * len(self.loss_type), strict=True))

    def _check_losses(self) -> None:
        """Refuse unknown losses, and options that these losses have no use for."""
        losses, known = self.loss_type, (*DPO_LOSSES, *REFERENCE_FREE, *UNPAIRED)
        listed = " ".join(losses)
        for name in losses:
            if name in REMOVED_LOSSES:
                raise UserError(f"--loss_type {name}: was removed; take sigmoid, or another of {', '.join(known)}")
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(known)}"
                raise UserError(f"--loss_type {name}: not known; {hint}")
        if len(set(losses)) < len(losses):
            raise UserError(f"--loss_type {listed}: one is named twice; --loss_weights makes it count more")
        if self.loss_weights is not None and len(self.loss_weights) != len(losses):
            raise UserError(
                f"--loss_weights: {len(self.loss_weights)} for {len(losses)} losses ({listed}); give one for each"
            )
        if self.loss_weights is not None and min(self.loss_weights) <= 0:
            raise UserError(f"--loss_weights {min(self.loss_weights):g}: give numbers above 0, or leave the loss out")
        if set(losses) & {*REFERENCE_FREE, *UNPAIRED}:
            options = {
                "another --loss_type": len(losses) > 1,
                "--loss_weights": self.loss_weights is not None,
                "--precompute_ref_log_probs": self.precompute_ref_log_probs and not self.has_reference,
            }
            for option, is_given in options.items():
                if is_given:
                    why = "stands alone" if self.has_reference else "stands alone and has no reference"
                    raise UserError(f"--loss_type {listed}: it {why}; leave out {option}")
        for name in ("desirable_weight", "undesirable_weight"):
            if not getattr(self, name) > 0:
                raise UserError(f"--{name} {getattr(self, name):g}: give a number above 0, or leave those replies out")
            if getattr(self, name) != 1 and not self.is_unpaired:
                raise UserError(f"--{name}: --loss_type {listed} has no use for it; kto does")
        if self.simpo_gamma != type(self).simpo_gamma and losses != ["simpo"]:
            raise UserError(f"--simpo_gamma: --loss_type {listed} has no use for it; simpo does")
        if self.precompute_ref_batch_size is not None and self.precompute_ref_log_probs is False:
            raise UserError("--precompute_ref_batch_size: it has no effect beside --precompute_ref_log_probs False")
        if self.label_smoothing_factor:
            raise UserError("--label_smoothing_factor: pairs have no labels to smooth; --label_smoothing is for them")
        if not 0 <= self.label_smoothing < 0.5:
            raise UserError(f"--label_smoothing {self.label_smoothing:g}: give a share from 0 to below 0.5")
        if self.label_smoothing and not set(SMOOTHED) & set(losses):
            raise UserError(f"--label_smoothing: --loss_type {listed} has no use for it; {', '.join(SMOOTHED)} do")
