"""Whether the rows of a batch are padded or joined into one, and the proof that texts of one row do not see each other.

Models and attention kernels differ in what they make of borders, so the model itself is asked before the first step.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from loguru import logger
from transformers import PreTrainedModel, Trainer

from medtune.errors import UserError
from medtune.models.dropout import has_dropout
from medtune.models.recurrence import why_texts_mix
from medtune.models.text_attention import (
    LEAST_SHARED,
    Layout,
    asks_to_join,
    attend_by_text,
    border_fault,
    forward_inputs,
    places,
    shares_prefixes,
)
from medtune.models.text_part import inside_peft
from medtune.training.batches import pad_right

# Tokens of the three texts in a row that show whether texts see each other.
PROBE_LENGTHS = (32, 16, 16)
# By how much of their spread states may move when a text changes that they must not see: so much, or ten times what
# rounding does, which is not more than a tenth. Sound models measure 0, leaks of untrained ones 7e-4 to 1.
LARGEST_MOVE = 5e-4
ROUNDING_MARGIN = 10
LARGEST_ROUNDING = 0.1


@dataclass(frozen=True)
class TextsOfRow:
    """What a row holds several of, such as "document", and the remedy if these attend to each other."""

    name: str
    remedy: str


JOINED_ROWS = TextsOfRow("text", "--padding_free False gives each a row of its own")


def refuse_mixed_texts(texts: TextsOfRow, path: str, **hub_options) -> None:
    """Raise UserError where the configuration of the model at `path` tells that the texts of a row see each other."""
    if reason := why_texts_mix(path, **hub_options):
        raise UserError(f"the {texts.name}s of a row would see each other: {reason}; {texts.remedy}")


def choose_layout(trainer: Trainer, model: torch.nn.Module, texts: TextsOfRow | None) -> Layout:
    """How the rows of a batch pass through the model, by the trainer's --padding_free.

    auto joins them where attention takes their borders and where that was measured to be faster: with FlashAttention,
    and on a CPU. Models with recurrent layers keep rows, and so do models that the probe finds leaks in. But where rows
    hold several texts that stay apart only so, they are joined: the kernels of recurrent layers take borders alone.

    Args:
        model: as its forward passes are called now, in DeepSpeed's engine for example.
        texts: what rows hold several of.

    Raises:
        UserError, in every process: texts of a row see each other in a layout that was asked for, or that the data has.
    """
    args, plain = trainer.args, inside_peft(trainer.model)
    is_auto, layout, joins = args.padding_free == "auto", Layout.PADDED, asks_for_joined_rows(trainer, args.device)
    if joins:
        layout, fault = _join(trainer, model, texts)
        if fault and is_auto:
            logger.info(f"rows are padded, since they would not stay apart if they were joined ({fault})")
        elif fault:
            raise _leak(texts or JOINED_ROWS, plain, fault)
    if texts and layout is Layout.PADDED:
        is_fault, summary = look_at_texts(trainer, model, layout)
        if not is_fault:
            logger.info(f"checked with three texts in a row: a {texts.name} sees itself alone ({summary})")
        elif is_auto and not joins:
            layout, summary = _join(trainer, model, texts)
        if is_fault and layout is Layout.PADDED:
            raise _leak(texts, plain, summary)
    if args.neftune_noise_alpha and (layout is not Layout.PADDED or texts):
        logger.info(
            "--neftune_noise_alpha: the noise goes by the length of a row, and is weaker where it has several texts"
        )
    return layout


def asks_for_joined_rows(trainer: Trainer, device: torch.device) -> bool:
    """Whether rows are to be joined on this device, if the probe then finds no leak."""
    args = trainer.args
    if args.padding_free == "auto" and args.neftune_noise_alpha:
        return False  # NEFTune's noise goes by the length of a row, and would be weaker in a longer one
    return asks_to_join(args.padding_free, inside_peft(trainer.model), device)


def joined_layouts(trainer: Trainer) -> tuple[Layout, ...]:
    """The layouts of joined rows, the best first, for each of which the model attends from now on.

    Of rows that have prompts in common these pass once where attention takes such rows.
    """
    plain = inside_peft(trainer.model)
    attend_by_text(plain)
    shares = trainer.rows_share_prompts and shares_prefixes(plain)
    return (Layout.SHARED_PREFIXES, Layout.JOINED) if shares else (Layout.JOINED,)


def _join(trainer: Trainer, model: torch.nn.Module, texts: TextsOfRow | None) -> tuple[Layout, str]:
    """The layout of joined rows in which the probe finds texts as they are alone; or padded rows, and what it finds."""
    plain = inside_peft(trainer.model)
    for layout in joined_layouts(trainer):
        is_fault, summary = look_at_texts(trainer, model, layout)
        if not is_fault:
            drops = trainer.args.do_train and has_dropout(plain)
            logger.info(
                f"the rows of a batch are joined into one without padding: a {(texts or JOINED_ROWS).name} sees itself "
                f"alone ({summary})"
                + ("; a prompt that rows share passes once" if layout is Layout.SHARED_PREFIXES else "")
                + ("; dropout draws other numbers than with padding" if drops else "")
            )
            return layout, ""
    attend_by_text(plain, False)
    return Layout.PADDED, summary


def _leak(texts: TextsOfRow, model: PreTrainedModel, summary: str) -> UserError:
    name = model.config.model_type
    return UserError(f"the {texts.name}s of a row see each other in this model ({name}: {summary}); {texts.remedy}")


# ---------------------------------------------------------------- the probe


def moved_states(plain: torch.Tensor, first_changed: torch.Tensor, last_changed: torch.Tensor) -> tuple[float, float]:
    """How far later texts move when the first one changes, and earlier ones when the last one does.

    Both are root mean squares in units of the spread of all states. The second is rounding, since nothing sees what
    comes after it: experts, for example, then get other tokens to multiply together.

    Args:
        plain, first_changed, last_changed: [rows, sum(PROBE_LENGTHS), hidden], any float type.
    """
    later, earlier = slice(PROBE_LENGTHS[0], None), slice(-PROBE_LENGTHS[-1])
    spread = _spread(plain)
    return (
        _root_mean_square((first_changed - plain)[:, later]) / spread,
        _root_mean_square((last_changed - plain)[:, earlier]) / spread,
    )


def _root_mean_square(states: torch.Tensor) -> float:
    return states.double().square().sum(dim=-1).mean().sqrt().item()


def _spread(states: torch.Tensor) -> float:
    return _root_mean_square(states - states.mean(dim=(0, 1), dtype=torch.float32)) or 1.0


@torch.no_grad()
def look_at_texts(trainer: Trainer, model: torch.nn.Module, layout: Layout) -> tuple[bool, str]:
    """Whether texts of a row are something else there than alone, in any process, and what shows it."""
    tokenizer = trainer.processing_class
    ordinary = [token_id for token_id in range(len(tokenizer)) if token_id not in tokenizer.added_tokens_decoder]
    generator = torch.Generator().manual_seed(0)
    *plain, other_first, other_last = (
        [ordinary[index] for index in torch.randint(len(ordinary), (length,), generator=generator)]
        for length in (*PROBE_LENGTHS, PROBE_LENGTHS[0], PROBE_LENGTHS[-1])
    )
    rows = plain, [other_first, *plain[1:]], [*plain[:-1], other_last]
    try:
        moved, rounding = moved_states(*(_states_of_row(trainer, model, row, layout) for row in rows))
        sharing = [*plain, plain[0][:LEAST_SHARED] + other_last]
        apart = 0.0 if layout is Layout.PADDED else _apart_from_alone(trainer, model, sharing, layout)
    except ValueError as error:
        return True, border_fault(error)
    figures = torch.tensor([[moved, rounding, apart]], device=trainer.args.device)
    moved, rounding, apart = trainer.accelerator.gather(figures).amax(0).tolist()
    largest = max(LARGEST_MOVE, ROUNDING_MARGIN * rounding)
    if not (moved <= largest and max(moved, rounding) <= LARGEST_ROUNDING):  # nan is a fault
        return True, f"when one changes, the states of the others move by {max(moved, rounding):.2g} of their spread"
    args = trainer.args
    is_exact = (
        args.device.type == "cpu" and inside_peft(trainer.model).dtype == torch.float32 and not (args.bf16 or args.fp16)
    )
    fault = not apart <= (LARGEST_MOVE if is_exact else LARGEST_ROUNDING)
    return fault, f"its states are those that it has alone, to {max(apart, moved):.2g} of their spread"


def _states_of_row(
    trainer: Trainer, model: torch.nn.Module, texts: Sequence[Sequence[int]], layout: Layout
) -> torch.Tensor:
    """[rows, length, hidden] inputs of the head for a row of texts, in a layout.

    The row is repeated if batches have several: some attention kernels separate texts only in a batch of one.
    """
    args = trainer.args
    is_single = layout is not Layout.PADDED or max(args.train_batch_size, args.eval_batch_size) == 1
    n_rows = 1 if is_single else 2
    ids = torch.tensor([[token_id for text in texts for token_id in text]] * n_rows, device=args.device)
    positions = torch.tensor([[position for text in texts for position in range(len(text))]] * n_rows)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "position_ids": positions.to(args.device)}
    return _states_of(trainer, model, batch, layout)


def _apart_from_alone(
    trainer: Trainer, model: torch.nn.Module, texts: Sequence[Sequence[int]], layout: Layout
) -> float:
    """How far the texts' states in one row are from those in padded rows, in units of their spread, without dropout."""
    device = trainer.args.device
    batch = {"input_ids": pad_right(texts, texts[0][0]), "attention_mask": pad_right([[1] * len(t) for t in texts], 0)}
    batch = {name: values.to(device) for name, values in batch.items()}
    modes = [(module, module.training) for module in trainer.model.modules()]
    trainer.model.eval()
    is_token = batch["attention_mask"].bool()
    joined, alone = (
        _states_of(trainer, model, batch, each)[places(is_token, batch, each)][None] for each in (layout, Layout.PADDED)
    )
    for module, mode in modes:
        module.training = mode
    return _root_mean_square(joined - alone) / _spread(alone)


def _states_of(trainer: Trainer, model: torch.nn.Module, batch: dict, layout: Layout) -> torch.Tensor:
    """Inputs of the head, [rows, length, hidden] or [1, tokens, hidden]."""
    plain, states = inside_peft(trainer.model), []
    vocabulary_head = plain.get_output_embeddings()

    def note(head: torch.nn.Module, inputs: tuple[torch.Tensor]) -> tuple | None:
        states.append(inputs[0])
        return (inputs[0][:, :1],) if head is vocabulary_head else None  # the most costly layer, for nothing

    handle = (vocabulary_head or plain.score).register_forward_pre_hook(note)
    try:
        # With training's dropout, but the same each time; training's random state is restored.
        with (
            torch.random.fork_rng(devices=range(torch.cuda.device_count())),
            trainer.compute_loss_context_manager(),
            _not_compiled(trainer),
        ):
            torch.manual_seed(0)
            (model if trainer.is_deepspeed_enabled else trainer.model)(**forward_inputs(batch, layout), use_cache=False)
    finally:
        handle.remove()
    return states[0]


def _not_compiled(trainer: Trainer) -> AbstractContextManager:
    """Layers as they are: torch.compile would compile them for passes that training does not make."""
    return torch.compiler.set_stance("force_eager") if trainer.args.torch_compile else nullcontext()
