"""The moments of PPO, GRPO and distillation: rollout, scoring and update of the roles on one base, on fake weights."""

from dataclasses import replace
from pathlib import Path

import torch
from transformers import PretrainedConfig

from medtune.estimate.fake_models import fake_base, with_adapters
from medtune.estimate.generation import run_generation
from medtune.estimate.meter import Meter
from medtune.estimate.plan import RunPlan
from medtune.estimate.rows import RunRows
from medtune.estimate.trainer_moments import count_models, dtype_of, mapped_weights
from medtune.models.adapters import new_lora_config, without_head
from medtune.models.dropout import switch_off_dropout
from medtune.models.lineage import base_of, is_adapter, read_adapter_config
from medtune.models.score_heads import ScoreHead
from medtune.models.text_attention import asks_to_join, attend_by_text
from medtune.rl.roles import Roles
from medtune.rl.rollout import Replies, Sampling
from medtune.rl.teacher import LocalTeacher
from medtune.training.checkpoints import optimizer_bytes

TEACHER_WEIGHTS, TEACHERS_PASS = "the teacher", "the teacher's pass"


def run_roles(
    plan: RunPlan,
    config: PretrainedConfig,
    reward_config: PretrainedConfig | None,
    rows: RunRows,
    n_layers: int,
    meter: Meter,
    teacher_config: PretrainedConfig | None = None,
) -> dict[str, float]:
    """Run the stage's moments under the meter, with so many layers; returns the bytes of what stays, by part.

    reward_config: of a reward model on a base of its own.
    teacher_config: of a teacher that is loaded here, whose own moments are those of `run_teacher`.
    """
    own, args = plan.own_args, plan.training_args
    roles = _make_roles(plan, config, reward_config, n_layers)
    heads = [head for head in (roles.reward_head, roles.value_head) if head is not None]
    parts = count_models(meter, roles.model, roles.reward_model)
    parts["adapters and heads"] += meter.count(*(weights for head in heads for weights in head.parameters()))
    trained = {role: list(roles.trained_weights(role).values()) for role in roles.trained}
    n_bytes = sum(optimizer_bytes(weights, args) for weights in trained.values())
    states = torch.empty(n_bytes, dtype=torch.uint8, device="meta")
    parts["optimizer"] = meter.count(states)
    if len(mapped := mapped_weights(plan, config, roles.model)):
        parts["file of the weights"] = meter.count(mapped)
    if args.gradient_checkpointing:
        roles.enable_checkpointing(args.gradient_checkpointing_kwargs)

    size = own.num_generations if plan.stage == "grpo" else 1
    n_texts = max(own.rollout_batch_size, args.per_device_train_batch_size)
    prompts = [rows.longest[index // size % len(rows.longest)]["prompt_ids"] for index in range(n_texts)]
    sampled = prompts[: own.rollout_batch_size]
    in_autocast = torch.autocast("cpu", torch.bfloat16, enabled=args.bf16)
    with in_autocast:
        with torch.no_grad():
            roles._switch_to("policy")
        run_generation(roles.model.get_base_model(), sampled, own.response_length, meter, "rollout")
        text = _text(sampled, own.response_length)
        with torch.no_grad(), meter.moment("scoring"):
            _score(roles, text, own.temperature, plan)
        if teacher_config is not None and rows.longest_eval:
            with torch.no_grad(), meter.moment("evaluation"):
                _diverge(roles, text, plan, teacher_config, beta=1.0)

    text = _text(prompts[: args.per_device_train_batch_size], own.response_length)
    for _ in range(min(args.gradient_accumulation_steps, 2)):
        for role in roles.trained:
            for weights in trained[role]:
                weights.requires_grad_(True)
            with in_autocast, meter.moment(f"update of the {role}: forward pass"):
                if role == "value":
                    outputs = roles.values(*text)
                elif teacher_config is not None and own.beta is not None:
                    outputs = _diverge(roles, text, plan, teacher_config, own.beta)
                else:
                    outputs = roles.logps(role, *text, own.temperature)[0]
                loss = outputs.sum()
            with meter.moment(f"update of the {role}: backward pass"):
                loss.backward()
            del outputs, loss
    return parts


def _text(prompts: list[list[int]], n_reply: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ids, attention mask and reply mask of prompts with replies, each with a token of its own."""
    n_prompt = max(map(len, prompts))
    padding = [n_prompt - len(prompt) for prompt in prompts]
    ids = [
        [0] * n + prompt + [index + 1] * n_reply for index, (n, prompt) in enumerate(zip(padding, prompts, strict=True))
    ]
    is_token = torch.arange(n_prompt + n_reply) >= torch.tensor(padding)[:, None]
    return torch.tensor(ids), is_token, torch.ones(len(prompts), n_reply, dtype=torch.bool)


def _score(roles: Roles, text: tuple[torch.Tensor, ...], temperature: float, plan: RunPlan) -> None:
    """What is computed of a batch of replies before the update, in its order."""
    ids, is_token, _ = text
    kept = [roles.logps("policy", *text, temperature)]
    if roles.has_reference:
        kept.append(roles.logps("reference", *text, temperature))
    if roles.value_head is not None:
        kept.append(roles.values(*text))
    if plan.reward_model_path:
        roles.scores([row[mask].tolist() for row, mask in zip(ids, is_token, strict=True)])


def _diverge(
    roles: Roles, text: tuple[torch.Tensor, ...], plan: RunPlan, teacher_config: PretrainedConfig, beta: float
) -> torch.Tensor:
    """The student's divergences from a teacher whose states are there, and of whose logits a chunk is."""
    weights = roles.model.get_input_embeddings().weight  # without memory, as what is made like them
    dtype = torch.bfloat16 if plan.training_args.bf16 else dtype_of(plan, teacher_config)
    states = weights.new_empty(int(text[2].sum()), teacher_config.hidden_size, dtype=dtype)

    def head(states: torch.Tensor) -> torch.Tensor:
        return states.new_empty(len(states), teacher_config.vocab_size)

    return roles.divergences(*text, plan.own_args.temperature, states, head, beta)[0]


def run_teacher(
    plan: RunPlan, config: PretrainedConfig, rows: RunRows, n_layers: int, meter: Meter
) -> dict[str, float]:
    """Run the teacher's pass under the meter, with so many layers; returns the bytes of its weights, by part."""
    own, path = plan.own_args, plan.teacher_args.teacher_model_path
    flash = plan.model_args.flash_attn and not plan.on_cpu
    model = fake_base(config, n_layers, dtype_of(plan, config), bits=plan.teacher_args.teacher_bits, flash=flash)
    if is_adapter(path):
        model = with_adapters(model, without_head(read_adapter_config(path)))
    model = model.eval().requires_grad_(False)
    prompts = [rows.longest[index % len(rows.longest)]["prompt_ids"] for index in range(own.rollout_batch_size)]
    ids, is_token, mask = _text(prompts, own.response_length)
    sampling = Sampling(own.temperature, own.response_length, own.rollout_batch_size, [], 0, 0)
    teacher = LocalTeacher(model, sampling, path)
    parts = {TEACHER_WEIGHTS: sum(count_models(meter, model).values())}
    replies = Replies(ids=ids, attention_mask=is_token, mask=mask, ended=mask.any(dim=1))
    with torch.autocast("cpu", torch.bfloat16, enabled=plan.training_args.bf16), meter.moment(TEACHERS_PASS):
        teacher._logps(replies)
    return parts


def has_own_base(plan: RunPlan) -> str | None:
    """The base of a reward model that is not on the policy's."""
    path = plan.reward_model_path
    if not path or (not Path(path).exists() and "checkpoint-" in path):
        return None
    base = base_of(path)
    return None if is_adapter(path) and Path(base).resolve() == Path(plan.base_model).resolve() else base


def _make_roles(
    plan: RunPlan, config: PretrainedConfig, reward_config: PretrainedConfig | None, n_layers: int
) -> Roles:
    options = {"bits": plan.bits, "flash": plan.model_args.flash_attn and not plan.on_cpu}
    dtype = dtype_of(plan, config)
    base = fake_base(config, n_layers, dtype, **options)
    has_reward = bool(plan.reward_model_path)
    of_policy = new_lora_config(base, replace(plan.lora_args, lora_dropout=0.0))
    of_reward, path = of_policy, plan.reward_model_path
    if has_reward and is_adapter(path):
        of_reward = without_head(read_adapter_config(path))
    has_reference = plan.stage == "ppo" or (plan.stage == "grpo" and plan.own_args.beta > 0)
    others = {"reference": of_policy} if has_reference else {}
    shares_base = has_reward and reward_config is None
    others |= {"reward": of_reward} if shares_base else {}
    others |= {"value": of_reward if shares_base else of_policy} if plan.stage == "ppo" else {}
    model = with_adapters(base, of_policy, others)
    switch_off_dropout(model)
    reward_model = reward_head = None
    if reward_config is not None:
        # Its layers are as many as a share of the policy's, so that the line through two depths holds for both.
        n_of_reward = round(n_layers * reward_config.num_hidden_layers / config.num_hidden_layers)
        reward_model = fake_base(reward_config, max(n_of_reward, 1), dtype, scores=True, **options).eval()
        reward_model.requires_grad_(False)
    elif shares_base:
        reward_head = ScoreHead(config.hidden_size, 1, bias=False, dtype=torch.float32).requires_grad_(False)
    roles = Roles(model, reward_model, reward_head)
    if plan.stage == "ppo":
        roles.add_value_head(0.0)
    if asks_to_join(plan.own_args.padding_free, base, plan.device):
        roles.padding_free = True
        attend_by_text(base)
    return roles
