"""The roles on one base model, adapters and small heads on it: PPO's four, of which GRPO needs fewer.

role       weights                                                       trained
policy     base + adapter "default": the SFT adapter continued           yes
reference  base + adapter "reference": a copy of that start              no
reward     base + adapter "reward" + score head, or a model of its own   no
value      base + adapter "value" + head: starts as the reward model,    yes
           or without one on this base as the policy
"""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from loguru import logger
from peft import PeftModel, get_peft_model_state_dict
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from medtune.arguments import LoraArguments
from medtune.errors import UserError
from medtune.models.adapters import add_adapter, load_for_training
from medtune.models.dropout import switch_off_dropout
from medtune.models.lineage import base_of, is_adapter
from medtune.models.logps import own_logits, rounding
from medtune.models.lora_layers import describe_trainable
from medtune.models.reward_models import add_reward_adapter, load_reward_model
from medtune.models.running_batch import Row, complete_rows
from medtune.models.score_heads import ScoreHead
from medtune.models.text_attention import (
    asks_to_join,
    attend_by_text,
    border_fault,
    forward_inputs,
    joined_layout,
    places,
)
from medtune.models.text_part import inside_peft, text_config
from medtune.rl.distillation_math import Head, token_divergences
from medtune.rl.ppo_math import position_ids, token_logps

# By role, the adapter's name in PEFT where it is another.
ADAPTERS = {"policy": "default"}
# The first tokens of the first prompts, on which log-probs are compared with the model's own.
CHECKED_PROMPTS, CHECKED_TOKENS = 4, 32

# ---------------------------------------------------------------- the roles


class ValueHead(torch.nn.Module):
    """[..., hidden] states to [...] values in float32; starts as the reward model's head, less what scores are
    centred by, so that the first values are scores."""

    def __init__(self, weight: torch.Tensor, shift: float):
        super().__init__()
        self.score = ScoreHead(weight.shape[1], 1, bias=False, dtype=torch.float32)
        self.score.weight.data.copy_(weight)
        self.bias = torch.nn.Parameter(torch.tensor([-shift], dtype=torch.float32))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.score(hidden).squeeze(-1) + self.bias


@dataclass
class Roles:
    """One base model with an adapter for each role; a reward model on another base is separate.

    A role learns where gradients are enabled. Its backward pass comes before the next role's forward pass, which
    freezes this one's weights.
    """

    model: PeftModel
    reward_model: PreTrainedModel | PeftModel | None
    reward_head: ScoreHead | None
    value_head: ValueHead | None = None
    score_shift: float = 0.0
    padding_free: bool = False  # rows pass through the base model joined into one

    @property
    def trained(self) -> tuple[str, ...]:
        """The roles that learn."""
        return ("policy",) if self.value_head is None else ("policy", "value")

    @property
    def has_reference(self) -> bool:
        return "reference" in self.model.peft_config

    def add_value_head(self, score_shift: float, weight: float = 1.0) -> None:
        """Centre the scores, and start the value head from the reward model's, so that its first values are scores.

        weight: of the reward model among the rewards.
        """
        self.score_shift = score_shift
        if self.reward_head is None:
            head = ValueHead(torch.zeros(1, text_config(self.model.config).hidden_size), 0.0)
        else:
            head = ValueHead(self.reward_head.weight.detach() * weight, score_shift * weight)
        self.value_head = head.to(self.model.device)

    def enable_checkpointing(self, settings: dict | None) -> None:
        self.model.get_base_model().gradient_checkpointing_enable(settings or {"use_reentrant": False})

    @torch.no_grad()
    def complete(self, rows: list[Row]) -> None:
        """Generate the policy's replies to the prompts of the rows."""
        self._switch_to("policy")
        complete_rows(self.model.get_base_model(), rows, len(rows))

    def logps(
        self, role: str, ids: torch.Tensor, attention_mask: torch.Tensor, mask: torch.Tensor, temperature: float
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """[B, T] log-probs, entropies and variances of `token_logps` of the reply tokens under policy or reference, 0
        outside the mask, by a full forward pass.

        Sampling computes log-probs with a cache; learning compares two full forward passes (detail).
        """
        states, head = predicting_states(self.model.get_base_model(), self._outputs(role, ids, attention_mask), mask)
        # Detail: the temperature of sampling divides the logits here too.
        flat = token_logps(states, ids[:, -mask.shape[1] :][mask], head, temperature, self._has_frozen_head())
        return tuple(at_tokens(mask, values) for values in flat)

    def divergences(
        self,
        ids: torch.Tensor,
        attention_mask: torch.Tensor,
        mask: torch.Tensor,
        temperature: float,
        teacher_states: torch.Tensor,
        teacher_head: Head,
        beta: float,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """[B, T] `token_divergences` of the policy from a teacher at the reply tokens, 0 outside the mask.

        teacher_states, teacher_head: `predicting_states` of the teacher.
        """
        core = self.model.get_base_model()
        states, head = predicting_states(core, self._outputs("policy", ids, attention_mask), mask)
        of_teacher = teacher_states, teacher_head
        flat = token_divergences(states, head, *of_teacher, temperature, beta, self._has_frozen_head())
        return tuple(at_tokens(mask, values) for values in flat)

    def _has_frozen_head(self) -> bool:
        return not any(weight.requires_grad for weight in self.model.get_output_embeddings().parameters())

    def base_logps(
        self, ids: torch.Tensor, attention_mask: torch.Tensor, mask: torch.Tensor, temperature: float
    ) -> torch.Tensor:
        """[B, T] log-probs of the reply tokens under the base without an adapter."""
        with self.model.disable_adapter():
            return self.logps("policy", ids, attention_mask, mask, temperature)[0]

    @torch.no_grad()
    def check_logps(
        self, prompts: list[list[int]], temperature: float, where: str, padding_free: str = "False"
    ) -> None:
        """Raise UserError, beginning with `where`, unless `logps` are those of the model's own forward pass.

        padding_free: the flag; with auto rows are joined if that gives the same.
        """
        own = OwnLogps(self.model, prompts, temperature)

        def difference() -> float:
            return own.difference(self.logps("policy", own.ids, own.mask, own.mask[:, 1:], temperature)[0])

        base = self.model.get_base_model()
        own.refuse_other(difference(), where)
        if not asks_to_join(padding_free, base, own.ids.device):
            return
        self.padding_free = True
        attend_by_text(base)
        try:
            apart = difference()
            fault = "" if apart <= own.explained else f"log-probs move by {apart:.2g} nats a token"
        except ValueError as error:
            fault = border_fault(error)
        if not fault:
            logger.info(f"rows are joined into one without padding; their log-probs are the same to {apart:.2g} nats")
        elif padding_free == "auto":
            self.padding_free = False
            attend_by_text(base, False)
        else:
            raise UserError(
                f"--padding_free True: the rows do not stay apart in {type(base).__name__} ({fault}); leave it out"
            )

    def values(self, ids: torch.Tensor, attention_mask: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """[B, T] value before each reply token, 0 outside the mask: the policy's mask (detail)."""
        n_reply = mask.shape[1]
        states = self._outputs("value", ids, attention_mask).last_hidden_state
        return self.value_head(states[:, -n_reply - 1 : -1]) * mask

    @torch.no_grad()
    def scores(self, texts: list[list[int]]) -> torch.Tensor:
        """[B] scores of prompts with replies, at the last token of each (detail: never at a pad)."""
        device = self.model.device
        longest = max(map(len, texts))
        # A model of transformers takes the last token that is not this one; here the mask says where the end is.
        pad = 0 if self.reward_model is None else text_config(self.reward_model.config).pad_token_id
        ids = torch.tensor([text + [pad] * (longest - len(text)) for text in texts], device=device)
        lengths = torch.tensor([len(text) for text in texts], device=device)
        mask = torch.arange(longest, device=device) < lengths[:, None]
        if self.reward_model is not None:
            states = self.reward_model(input_ids=ids, attention_mask=mask.long(), output_hidden_states=False)
            return states.logits.float().squeeze(-1)
        states = self._outputs("reward", ids, mask).last_hidden_state
        return self.reward_head(states[torch.arange(len(texts), device=device), lengths - 1]).squeeze(-1)

    def trained_weights(self, role: str) -> dict[str, torch.nn.Parameter]:
        """The trained weights by name: the adapter of policy or value, and the value head."""
        adapter = ADAPTERS.get(role, role)
        weights = {name: weight for name, weight in self.model.named_parameters() if adapter in name.split(".")[-2:]}
        return weights | (dict(self.value_head.named_parameters()) if role == "value" else {})

    def _outputs(self, role: str, ids: torch.Tensor, attention_mask: torch.Tensor) -> ModelOutput:
        """What the backbone gives in a role; [B, L, hidden] last states among it."""
        self._switch_to(role)
        backbone = self.model.get_base_model().base_model
        batch = {"input_ids": ids, "attention_mask": attention_mask.long()}
        if not self.padding_free:
            # Detail: positions from the mask, whatever the padding.
            return backbone(**batch, position_ids=position_ids(attention_mask), use_cache=False)
        # The replies of a group share their prompt, which passes once where it can.
        layout = joined_layout(self.model.get_base_model())
        outputs = backbone(**forward_inputs(batch, layout), use_cache=False)
        is_token, joined = attention_mask.bool(), outputs.last_hidden_state
        states = joined.new_zeros(*ids.shape, joined.shape[-1])
        own = joined[places(is_token, batch, layout)]
        outputs.last_hidden_state = states.index_put(is_token.nonzero(as_tuple=True), own)
        return outputs

    def _switch_to(self, role: str) -> None:
        learns = torch.is_grad_enabled()
        self.model.set_adapter(ADAPTERS.get(role, role), inference_mode=not learns)
        self.model.train(learns)  # gradient checkpointing asks for it; there is no dropout


# ---------------------------------------------------------------- states and log-probs of any model


def predicting_states(core: PreTrainedModel, outputs: ModelOutput, mask: torch.Tensor) -> tuple[torch.Tensor, Head]:
    """[N, hidden] states of the backbone's outputs that predict the N tokens of a [B, T] reply mask, and the head that
    makes [N, V] logits of them as the model does."""
    states = outputs.last_hidden_state[:, -mask.shape[1] - 1 : -1][mask]
    return states, partial(own_logits, core, type(outputs))


def at_tokens(mask: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """[B, T] of [N] float32 values of the tokens of a mask, 0 elsewhere."""
    return torch.zeros(mask.shape, device=mask.device).masked_scatter(mask, values)


class OwnLogps:
    """Log-probs of the first prompts by a model's own forward pass, with which those of a stage are compared.

    ids, mask: [N, L] without padding; the log-probs are of the tokens from the second on.
    """

    @torch.no_grad()
    def __init__(self, model: PreTrainedModel | PeftModel, prompts: list[list[int]], temperature: float):
        width = min(CHECKED_TOKENS, *map(len, prompts))
        rows = [prompt[:width] for prompt in prompts[:CHECKED_PROMPTS]]
        rows.append(rows[0][: width // 2] + rows[-1][width // 2 :])  # and one that begins as another does
        self.model_name = type(inside_peft(model)).__name__
        self.ids = torch.tensor(rows, device=model.device)
        self.mask = torch.ones_like(self.ids, dtype=torch.bool)
        logits = model(input_ids=self.ids, attention_mask=self.mask.long(), use_cache=False).logits[:, :-1]
        distributions = (logits.float() / temperature).log_softmax(dim=-1)
        self.logps = distributions.gather(2, self.ids[:, 1:, None]).squeeze(2)
        self.explained = rounding(logits.dtype)

    def difference(self, logps: torch.Tensor) -> float:
        """In nats a token."""
        return (logps - self.logps).abs().mean().item()

    def refuse_other(self, apart: float, where: str) -> None:
        """Raise UserError, beginning with `where`, if this difference is more than rounding, or no number."""
        if not apart <= self.explained:
            raise UserError(
                f"{where}: this stage's log-probs differ from those of the model's own forward pass by {apart:.2g} "
                f"nats a token, where rounding explains {self.explained:.2g}: {self.model_name} makes its logits in a "
                "way that it does not follow, and would be trained on wrong probabilities; take another model"
            )


def load_roles(
    sft: str,
    rm: str | None,
    lora: LoraArguments,
    device: torch.device,
    with_reference: bool = True,
    with_value: bool = True,
    checkpoint: str | None = None,
    **base_options,
) -> tuple[Roles, dict[str, str]]:
    """Load the base once, with the adapters of the roles that fit on it; and the facts to log.

    Args:
        sft, rm: what --sft_model_path and --reward_model_path name.
        with_reference, with_value: whether these roles are needed; one that is not takes no memory.
        lora: of a policy that starts a new adapter; checkpoint: of the run that is resumed.
        base_options: of `load_base_model`.
    """
    # Detail: no dropout in any role, or policy and reference would differ by chance.
    dropout, lora = lora.lora_dropout, replace(lora, lora_dropout=0.0)
    flag = {} if is_adapter(sft) else {"flag": "--sft_model_path"}
    model = load_for_training(sft, lora, checkpoint=checkpoint, **flag, **base_options)
    policy = f"{sft}: {describe_trainable(model)}"
    switch_off_dropout(model)
    start = {name: tensor.clone() for name, tensor in get_peft_model_state_dict(model).items()}
    config, facts = model.peft_config["default"], {"policy": policy}
    if with_reference:
        add_adapter(model, "reference", config, start, f"--sft_model_path {sft}")
        facts["reference"] = "the policy's start, an adapter on its base"

    shares_base = rm is not None and is_adapter(rm) and Path(base_of(rm)).resolve() == Path(base_of(sft)).resolve()
    reward_model = reward_head = None
    if shares_base:
        weight = add_reward_adapter(model, rm, "reward")
        reward_head = ScoreHead(weight.shape[1], 1, bias=False, dtype=torch.float32).requires_grad_(False)
        reward_head.weight.data.copy_(weight)
        facts["reward"] = f"{rm}, an adapter on the same base"
    elif rm is not None:
        reward_model = load_reward_model(base_of(rm), rm if is_adapter(rm) else None, **base_options).requires_grad_(
            False
        )
        facts["reward"] = f"{rm}, a model of its own: its base is not the policy's"
    if with_value and shares_base:
        matrices = get_peft_model_state_dict(model, adapter_name="reward")
        # Detail: the value model starts as the reward model.
        add_adapter(model, "value", model.peft_config["reward"], matrices, f"--reward_model_path {rm}")
        facts["value"] = "starts as the reward model"
    elif with_value:
        add_adapter(model, "value", config, start, f"--sft_model_path {sft}")
        facts["value"] = "starts as the policy, with a head of zeros: no reward model is on its base"
    if dropout:
        facts["dropout"] = "off in all roles: it would blur what is compared"
    if not (base_options.get("load_in_4bit") or base_options.get("load_in_8bit")):
        model.to(device)
        if reward_model is not None:
            reward_model.to(device)
    if reward_head is not None:
        reward_head.to(device)
    return Roles(model, reward_model, reward_head), facts
