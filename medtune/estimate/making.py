"""The estimate of a command, made: its memory, the cards it fits on, hours, money and disk."""

from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType

from medtune.estimate.cards import FREE, Card, Price
from medtune.estimate.hours import Hours, count_steps_and_tokens, estimate_disk, estimate_hours
from medtune.estimate.memory import GIB, Memory, measure_memory
from medtune.estimate.plan import RunPlan, read_plan
from medtune.estimate.remedies import remedies
from medtune.estimate.role_moments import has_own_base
from medtune.estimate.rows import RunRows, find_rows
from medtune.estimate.shapes import Shape, find_shape
from medtune.models.lineage import base_of

WITHOUT_CHECKPOINTING = ["--gradient_checkpointing", "False"]


@dataclass(frozen=True)
class Command:
    """A stage's command, and what is assumed of it.

    base: of an adapter that an earlier stage has yet to leave.
    tokens: of an average row, in place of the data.
    """

    module: ModuleType
    argv: Sequence[str]
    n_gpus: int = 1
    base: str = ""
    tokens: int | None = None


@dataclass
class Measured:
    """A command with some flags added, and its memory. shape: of the base."""

    flags: list[str]
    plan: RunPlan
    rows: RunRows
    memory: Memory
    shape: Shape

    def fits(self, gib: float) -> bool:
        servers, room = self.plan.servers, (1 - FREE) * gib * GIB
        if self.memory.teacher and self.memory.teacher.total > room:
            return False
        if 2 * self.shape.n_weights > servers.memory * room and servers.n:
            return False  # vLLM's own weights
        return self.memory.total <= room - (servers.memory * gib * GIB if servers.share_gpus else 0.0)


@dataclass
class Verdict:
    """Whether a run fits on a card, with which change (None: it does not), and what it then takes."""

    card: Card
    measured: Measured | None = None
    hours: Hours | None = None
    price: Price | None = None

    @property
    def cost(self) -> tuple[float, float] | None:
        """Of all its GPUs."""
        if self.price is None or self.hours is None:
            return None
        n_cards = self.measured.plan.n_cards
        low, high = (n_cards * hours * self.price.per_hour for hours in self.hours.total)
        return low, high


@dataclass
class Estimate:
    """What a command takes. tokens: that it trains on, without padding; disk: bytes by what they hold."""

    script: str
    measured: Measured
    n_steps: int
    n_tokens: float
    disk: dict[str, float]
    verdicts: list[Verdict]


def measure_command(command: Command, flags: Sequence[str] = ()) -> Measured:
    """The memory of a command with flags added."""
    plan = read_plan(command.module, [*command.argv, *flags], command.n_gpus, command.base)
    flag, hub_options = "--sft_model_path" if plan.is_rl else "--model_name_or_path", plan.model_args.hub_options
    shape = find_shape(plan.base_model, flag, **hub_options)
    if shape.bits == 4 or (shape.bits == 8 and plan.bits == 16):
        plan.model_args.load_in_4bit, plan.model_args.load_in_8bit = shape.bits == 4, shape.bits == 8
    reward_shape = None
    if plan.is_rl and (base := has_own_base(plan)):
        reward_shape = find_shape(base, "--reward_model_path", **hub_options)
    teacher_shape = None
    if plan.teacher_place:
        path = plan.teacher_args.teacher_model_path
        teacher_shape = find_shape(base_of(path), "--teacher_model_path", **hub_options)
        if teacher_shape.bits < plan.teacher_args.teacher_bits:
            plan.teacher_args.teacher_bits = teacher_shape.bits
    rows = find_rows(plan, command.tokens)
    memory = measure_memory(plan, shape, rows, reward_shape, teacher_shape)
    return Measured(list(flags), plan, rows, memory, shape)


def make_estimate(command: Command, cards: Sequence[Card], prices: dict[str, Price]) -> Estimate:
    """The estimate of a command; on a CPU without cards."""
    own = measure_command(command)
    plan, tried = own.plan, [own]
    waiting = remedies(plan, int(own.rows.lengths.max()))
    verdicts = []
    for card in [] if plan.on_cpu else cards:
        while waiting and not any(each.fits(card.gib) for each in tried):
            tried.append(measure_command(command, waiting.pop(0)))
        fitting = next((each for each in tried if each.fits(card.gib)), None)
        if fitting is None:
            verdicts.append(Verdict(card))
        else:
            hours = estimate_hours(fitting.plan, fitting.memory, fitting.rows, card)
            verdicts.append(Verdict(card, fitting, hours, prices.get(card.name)))
    n_steps, n_tokens = count_steps_and_tokens(plan, own.rows, own.memory.layout)
    disk = estimate_disk(plan, own.memory, own.rows, own.shape, n_steps)
    return Estimate(command.module.__name__, own, n_steps, n_tokens, disk, verdicts)


def line_before_a_run(command: Command, gib: float) -> tuple[str, float]:
    """For the log of a run on GPUs of so many GiB: what it takes, what would be faster, and the GiB to be compared with
    what torch allocates.
    """
    own = measure_command(command)
    total, room = own.memory.total / GIB, f"{gib:.1f} GiB of a GPU"
    line = f"memory, computed: {total:.1f} of the {room} ({own.memory.decides})"
    if not own.fits(gib):
        line += "; it may not fit: python scripts/estimate_run.py before this command says what would"
    elif own.plan.checkpointing:
        without = measure_command(command, WITHOUT_CHECKPOINTING)
        if without.fits(gib):
            line += (
                f"; {' '.join(WITHOUT_CHECKPOINTING)} fits too with {without.memory.total / GIB:.1f}, and is about 1.3 "
                "times as fast"
            )
    return line, own.memory.allocated / GIB
