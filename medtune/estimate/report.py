"""The estimate of a command, printed as a table, or as JSON."""

from medtune.estimate.cards import FREE
from medtune.estimate.hours import UTILISATION
from medtune.estimate.making import Estimate, Verdict
from medtune.estimate.memory import GIB, Memory
from medtune.estimate.plan import RunPlan
from medtune.models.text_attention import Layout

# ---------------------------------------------------------------- as text


def as_lines(estimate: Estimate) -> list[str]:
    plan, memory, args = estimate.measured.plan, estimate.measured.memory, estimate.measured.plan.training_args
    where = "a process on the CPU" if plan.on_cpu else "one GPU"
    checkpointing = "on" if plan.checkpointing else "off"
    n_gpus = "" if plan.on_cpu else f" x {plan.n_gpus} GPU{'s' * (plan.n_gpus > 1)}"
    if plan.n_split > 1:
        n_gpus = f", split over {plan.n_split} GPUs"
    lora = f"LoRA of rank {plan.lora_args.lora_rank or 16}" if plan.lora_args.use_peft else "all weights trained"
    unit = "updates" if plan.is_rl else "steps"
    bits = "" if plan.bits == 16 else f"{plan.bits} bits, "
    lines = [
        f"{estimate.script}.py: {plan.base_model}, {estimate.measured.shape.n_weights / 1e9:.2f} billion weights "
        f"({estimate.measured.shape.source}), "
        f"{bits}{lora}",
        f"  batch {args.per_device_train_batch_size} x {args.gradient_accumulation_steps} accumulated{n_gpus}, "
        f"gradient checkpointing {checkpointing}; {estimate.n_steps:,} {unit}, {estimate.n_tokens:,.0f} tokens",
        *(f"  {name}: {value}" for name, value in estimate.measured.rows.facts.items()),
        *(f"  note: {note}" for note in _notes(plan, memory)),
        "",
        f"memory of {where}, GiB (computed, not measured)",
    ]
    table = [(name, size / GIB) for name, size in memory.parts.items() if size]
    table += [(f"the largest moment: {memory.decides}", memory.moments[memory.decides] / GIB)]
    if memory.fixed:
        table += [("CUDA's context and workspaces" if not plan.on_cpu else "libraries", memory.fixed / GIB)]
    if memory.fragments:
        table += [(f"fragments, {memory.fragments:.0%}", memory.allocated * memory.fragments / GIB)]
    table += [("in all", memory.total / GIB)]
    if memory.host:
        table += [("and of the machine's memory, for what is offloaded", memory.host / GIB)]
    width = max(len(name) for name, _ in table)
    lines += [f"  {name:<{width}}  {size:7.2f}" for name, size in table]
    if memory.teacher:
        lines.append(f"  and of the teacher's GPU: {memory.teacher.total / GIB:.2f}")
    others = {name: size / GIB for name, size in memory.moments.items() if name != memory.decides and size}
    lines.append("  the other moments: " + ", ".join(f"{name} {size:.2f}" for name, size in others.items()))
    if estimate.verdicts:
        cards = "1 card" if plan.n_cards == 1 else f"{plan.n_cards} cards of a kind"
        lines += ["", f"on {cards} ({FREE:.0%} of the memory kept free; computed, not measured)"]
        lines += as_columns([_verdict_row(verdict) for verdict in estimate.verdicts])
        best, worst = UTILISATION
        money = "" if all(verdict.cost is None for verdict in estimate.verdicts) else f", money for {cards}"
        lines += [f"  hours at {worst:.0%} to {best:.0%} of a card's rate in bfloat16{money}"]
    disk = ", ".join(f"{name} {size / GIB:.1f}" for name, size in estimate.disk.items())
    lines += ["", f"disk, GiB: {disk}"]
    return lines


def as_columns(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  " + "  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]


def _notes(plan: RunPlan, memory: Memory) -> list[str]:
    notes, servers = list(plan.notes), plan.servers
    if servers.n:
        where = "on the GPUs of training" if servers.share_gpus else "on GPUs of their own"
        notes.append(
            f"{servers.n} server(s) of vLLM {where} write the replies and take {servers.memory:.0%} of a GPU each"
        )
    if plan.model_args.flash_attn and not plan.on_cpu:
        notes.append("--flash_attn: FlashAttention must be installed and the model able to have it")
    if memory.layout is not Layout.PADDED:
        once = ", and the prompt of both replies passes once" if memory.layout is Layout.SHARED_PREFIXES else ""
        notes.append(f"the rows of a batch are joined into one without padding{once}")
    return notes


def _verdict_row(verdict: Verdict) -> tuple[str, ...]:
    card = verdict.card
    name = (card.name, f"{card.gb} GB")
    if verdict.measured is None:
        return (*name, "", "", "", "does not fit")
    need, hours = f"{verdict.measured.memory.total / GIB:.1f} GiB", "{:.1f} to {:.1f} h".format(*verdict.hours.total)
    flags = verdict.measured.flags
    cost = "" if verdict.cost is None else as_cost(verdict.cost, verdict.price.currency)
    return (*name, need, hours, cost, " ".join(["fits with", *flags]) if flags else "fits")


def as_cost(cost: tuple[float, float], currency: str) -> str:
    return "{:.0f} to {:.0f} ".format(*cost) + currency


# ---------------------------------------------------------------- as JSON


def as_json(estimate: Estimate) -> dict:
    """GiB, hours and money, with the names of the table."""
    own, memory = estimate.measured, estimate.measured.memory
    cards = []
    for verdict in estimate.verdicts:
        values: dict = {"card": verdict.card.name, "gb": verdict.card.gb, "fits": verdict.measured is not None}
        if verdict.measured is not None:
            values |= {"flags": verdict.measured.flags, "gib": _gib(verdict.measured.memory.total)}
            values |= {"hours": verdict.hours.total}
            values |= {"seconds": verdict.hours.phases}
        if verdict.cost is not None:
            values |= {"cost": verdict.cost, "currency": verdict.price.currency}
        cards.append(values)
    return {
        "script": f"{estimate.script}.py",
        "model": own.plan.base_model,
        "weights": own.shape.n_weights,
        "gpus": own.plan.n_cards,
        "steps": estimate.n_steps,
        "tokens": estimate.n_tokens,
        "gib": _gib(memory.total),
        "allocated_gib": _gib(memory.allocated),
        "parts_gib": {name: _gib(size) for name, size in memory.parts.items()},
        "moments_gib": {name: _gib(size) for name, size in memory.moments.items()},
        "decides": memory.decides,
        "host_gib": _gib(memory.host),
        **({"teacher_gib": _gib(memory.teacher.total)} if memory.teacher else {}),
        "cards": cards,
        "disk_gib": {name: _gib(size) for name, size in estimate.disk.items()},
        "notes": _notes(own.plan, memory),
    }


def _gib(n_bytes: float) -> float:
    return round(n_bytes / GIB, 3)
