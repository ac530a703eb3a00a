"""What all stages of run_all.sh take together."""

from collections.abc import Sequence

from medtune.estimate.hours import HUB, MERGED
from medtune.estimate.making import Estimate, Verdict
from medtune.estimate.memory import GIB
from medtune.estimate.report import as_columns, as_cost


def total_hours(verdicts: Sequence[Verdict]) -> tuple[float, float]:
    return tuple(sum(verdict.hours.total[case] for verdict in verdicts) for case in (0, 1))


def total_cost(verdicts: Sequence[Verdict]) -> tuple[float, float] | None:
    """None where no price is known."""
    costs = [verdict.cost for verdict in verdicts]
    return None if None in costs else tuple(sum(cost[case] for cost in costs) for case in (0, 1))


def total_disk(estimates: Sequence[Estimate]) -> float:
    """Bytes; the model from the hub and the merged one are there once."""
    once = sum(max(estimate.disk.get(name, 0.0) for estimate in estimates) for name in (HUB, MERGED))
    checkpoints = (size for each in estimates for name, size in each.disk.items() if name not in (HUB, MERGED))
    return once + sum(checkpoints)


def as_total_lines(estimates: Sequence[Estimate]) -> list[str]:
    names = [estimate.script.removesuffix("_training") for estimate in estimates]
    lines = [f"all stages together: {', '.join(names)}; evaluation, merging and report are not counted"]
    if rows := [_row(names, verdicts) for verdicts in zip(*(each.verdicts for each in estimates), strict=True)]:
        lines += as_columns(rows)
    return [*lines, f"disk, GiB: {total_disk(estimates) / GIB:.1f}"]


def _row(names: Sequence[str], verdicts: Sequence[Verdict]) -> tuple[str, ...]:
    card = verdicts[0].card
    head = (card.name, f"{card.gb} GB")
    if none := [name for name, verdict in zip(names, verdicts, strict=True) if verdict.measured is None]:
        return (*head, "", "", f"does not fit: {', '.join(none)}")
    hours, cost = total_hours(verdicts), total_cost(verdicts)
    changed = [name for name, verdict in zip(names, verdicts, strict=True) if verdict.measured.flags]
    fits = f"fits with the flags above for {', '.join(changed)}" if changed else "fits"
    money = "" if cost is None else as_cost(cost, verdicts[0].price.currency)
    return (*head, "{:.1f} to {:.1f} h".format(*hours), money, fits)


def total_as_json(estimates: Sequence[Estimate]) -> dict:
    """GiB, hours and money, of cards on which all stages fit."""
    cards = []
    for verdicts in zip(*(estimate.verdicts for estimate in estimates), strict=True):
        values: dict = {"card": verdicts[0].card.name, "fits": all(verdict.measured for verdict in verdicts)}
        if values["fits"]:
            values |= {"hours": total_hours(verdicts)}
            if (cost := total_cost(verdicts)) is not None:
                values |= {"cost": cost, "currency": verdicts[0].price.currency}
        cards.append(values)
    return {"cards": cards, "disk_gib": round(total_disk(estimates) / GIB, 3)}
