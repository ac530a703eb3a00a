"""The moments of PT, SFT, RM and DPO: their trainers' own steps on the largest batch, on fake weights."""

import torch
from peft import TaskType
from torch._subclasses.fake_tensor import FakeTensor
from transformers import PretrainedConfig

from medtune.estimate.fake_models import QuantizedLinear, drop_out_as_on_cuda, fake_base, with_adapters
from medtune.estimate.generation import run_generation
from medtune.estimate.meter import Meter
from medtune.estimate.plan import RunPlan
from medtune.estimate.rows import RunRows
from medtune.models.adapters import new_lora_config
from medtune.models.text_attention import Layout
from medtune.training.batches import FeedbackCollator, PairCollator
from medtune.training.causal_lm_trainer import CausalLMTrainer, Collator
from medtune.training.checkpoints import optimizer_bytes
from medtune.training.kto_trainer import KTOTrainer
from medtune.training.layout import asks_for_joined_rows, joined_layouts
from medtune.training.preference_trainer import PreferenceTrainer
from medtune.training.reward_trainer import RewardTrainer
from medtune.training.stage_trainer import StageTrainer

PAD = 0
# Of DPO's samples before an evaluation: replies, and tokens of each.
N_SAMPLES, SAMPLE_TOKENS = 8, 256


def dtype_of(plan: RunPlan, config: PretrainedConfig) -> torch.dtype:
    """Of the base's weights."""
    name = plan.model_args.torch_dtype
    return _dtype_of_file(config) if name == "auto" else getattr(torch, name)


def _dtype_of_file(config: PretrainedConfig) -> torch.dtype:
    return getattr(torch, str(config.dtype or "float32").removeprefix("torch."))


def run_trainer(
    plan: RunPlan, config: PretrainedConfig, rows: RunRows, n_layers: int, meter: Meter
) -> tuple[dict[str, float], Layout]:
    """Run the stage's moments under the meter, with so many layers.

    Returns the bytes of what stays, by part, and how rows pass through a model that keeps them apart.
    """
    args = plan.training_args
    trainer, parts = _make_trainer(plan, config, rows, n_layers, meter)
    if not plan.on_cpu:
        drop_out_as_on_cuda(trainer.model)
    model = trainer.accelerator.prepare_model(trainer.model)  # with autocast
    if args.gradient_checkpointing:
        settings = args.gradient_checkpointing_kwargs or {"use_reentrant": False}
        trainer.model.gradient_checkpointing_enable(settings)
    trained = [weights for weights in trainer.model.parameters() if weights.requires_grad]
    states = torch.empty(optimizer_bytes(trained, args), dtype=torch.uint8, device="meta")
    parts["optimizer"] = meter.count(states)
    if len(mapped := mapped_weights(plan, config, trainer.model)):
        parts["file of the weights"] = meter.count(mapped)

    largest, largest_eval = (_with_ref_logps(batch, trainer) for batch in (rows.longest, rows.longest_eval))

    # With accumulated gradients the second micro-batch is the larger one.
    trainer.model.train()
    if isinstance(trainer, KTOTrainer):
        inputs = trainer._prepare_inputs(trainer.data_collator(largest))
        with meter.moment("mismatched replies"):
            trainer.mismatched_ratios(model, inputs)
    for _ in range(min(args.gradient_accumulation_steps, 2)):
        inputs = trainer._prepare_inputs(trainer.data_collator(largest))
        n_items = torch.tensor(args.gradient_accumulation_steps * sum(map(_n_items, rows.longest)))
        with meter.moment("forward pass"):
            loss = trainer.compute_loss(model, inputs, num_items_in_batch=n_items)
        with meter.moment("backward pass"):
            loss.backward()
        del loss
    with meter.moment("optimizer step"):
        pass
    for weights in trained:
        weights.grad = None

    if rows.longest_eval:
        trainer.model.eval()
        inputs = trainer._prepare_inputs(trainer.data_collator(largest_eval))
        with torch.no_grad(), meter.moment("evaluation"):
            trainer.compute_loss(model, inputs)
        if plan.stage == "dpo":
            n_prompt = max(len(row["prompt_ids"]) for row in rows.longest_eval)
            n_tokens = min(plan.own_args.max_target_length, SAMPLE_TOKENS)
            core = trainer.model.get_base_model() if plan.lora_args.use_peft else trainer.model
            run_generation(core, [[1] * n_prompt] * N_SAMPLES, n_tokens, meter, "samples")
    return parts, trainer.layout


def _with_ref_logps(rows: list[dict], trainer: StageTrainer) -> list[dict]:
    """The rows, with the reference's log-probs where they are computed before training."""
    if not getattr(trainer.args, "precompute_ref_log_probs", False):
        return rows
    return [row | dict.fromkeys(trainer.ref_columns, 0.0) for row in rows]


def _n_items(row: dict) -> int:
    return len(row["labels"]) if "labels" in row else 1


def _make_trainer(
    plan: RunPlan, config: PretrainedConfig, rows: RunRows, n_layers: int, meter: Meter
) -> tuple[StageTrainer, dict[str, float]]:
    """The stage's trainer, and the bytes of its models."""
    args, stage = plan.training_args, plan.stage
    options = {"bits": plan.bits, "flash": plan.model_args.flash_attn and not plan.on_cpu}
    dtype = dtype_of(plan, config)
    model = fake_base(config, n_layers, dtype, scores=stage == "rm", **options)
    if plan.lora_args.use_peft:
        task = TaskType.SEQ_CLS if stage == "rm" else TaskType.CAUSAL_LM
        model = with_adapters(model, new_lora_config(model, plan.lora_args, task))
    ref_model = None
    keywords = {"model": model, "args": args, "eval_dataset": rows.longest_eval or None}
    if stage in ("pt", "sft"):
        trainer = CausalLMTrainer(data_collator=Collator(PAD), **keywords)
    elif stage == "rm":
        trainer = RewardTrainer(data_collator=PairCollator(PAD), **keywords)
    else:
        trainer_class, collator = (
            (KTOTrainer, FeedbackCollator) if args.is_unpaired else (PreferenceTrainer, PairCollator)
        )
        is_computed_before, args.precompute_ref_log_probs = args.precompute_ref_log_probs, False
        if args.has_reference and not plan.lora_args.use_peft and not is_computed_before:
            ref_model = fake_base(config, n_layers, dtype, **options).requires_grad_(False)
        trainer = trainer_class(
            data_collator=collator(PAD), continues_adapter=plan.continues_adapter, ref_model=ref_model, **keywords
        )
        args.precompute_ref_log_probs = is_computed_before
        trainer.start_is_checked = True
        trainer.kl = torch.zeros(())
    joins = asks_for_joined_rows(trainer, plan.device)
    trainer.layout, trainer.layout_is_chosen = joined_layouts(trainer)[0] if joins else Layout.PADDED, True
    if stage == "dpo":
        trainer.reference.use_layout(trainer.layout)
    return trainer, count_models(meter, model, ref_model)


def count_models(meter: Meter, model: torch.nn.Module, *others: torch.nn.Module | None) -> dict[str, float]:
    """Count the weights: of the base, which are fake or frozen, of adapters and heads, and of other models."""
    weights = [*model.parameters(), *model.buffers()]
    parts = {
        "base weights": meter.count(*(each for each in weights if isinstance(each, FakeTensor))),
        "adapters and heads": meter.count(*(each for each in weights if not isinstance(each, FakeTensor))),
    }
    for other in others:
        if other is not None:
            parts["second model"] = meter.count(*other.parameters(), *other.buffers())
    return parts


def mapped_weights(plan: RunPlan, config: PretrainedConfig, model: torch.nn.Module) -> torch.Tensor:
    """[weights] that a CPU keeps of the model's file beside quantized ones: what was read to make them.

    The embedding is a part of the mapped file, and holds all of it.
    """
    is_quantized = plan.on_cpu and plan.bits < 16
    layers = (module for module in model.modules() if is_quantized and isinstance(module, QuantizedLinear))
    n_read = sum(layer.in_features * layer.out_features for layer in layers)
    return torch.empty(n_read, dtype=_dtype_of_file(config), device="meta")
