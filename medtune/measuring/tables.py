"""The tables of an evaluation, as lines of text."""

from collections.abc import Iterator

from medtune.measuring.figures import FIGURES


def table_lines(metrics: dict) -> Iterator[str]:
    """A table for each file: a line for each figure, a column for each model, and the verdicts against the first."""
    for file, file_metrics in metrics.items():
        names = list(file_metrics["models"])
        yield f"\n{file} ({file_metrics['models'][names[0]]['n']} records)"
        table = [[figure, *(_cell(file_metrics, name, figure) for name in names)] for figure in FIGURES]
        if len(names) > 1:
            for number, name in enumerate(names, start=1):
                yield f"  [{number}] {name}" + (", which the others are compared with" if number == 1 else "")
            table.insert(0, ["", *(f"[{number}]" for number in range(1, len(names) + 1))])
        table = [row for row in table if any(row[1:])]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        for row in table:
            cells = (text.rjust(width) for text, width in zip(row[1:], widths[1:], strict=True))
            yield "  ".join([row[0].ljust(widths[0]), *cells])
        for name, figures in file_metrics["against_first"].items():
            yield from _lines_against_first(name, names[0], figures)


def _lines_against_first(name: str, first: str, figures: dict) -> Iterator[str]:
    if "win_rate" in figures:
        rate, (low, high) = figures["win_rate"]["value"], figures["win_rate"]["interval"]
        yield f"{name} has the higher reward in {rate:.1%} of the replies (95 % interval {low:.1%} to {high:.1%})"
    if preferred := figures.get("judge_win_rate"):
        if "incomplete" in preferred:
            yield f"{name}: the judge has compared {preferred['judged']} of {preferred['of']} replies: incomplete"
        else:
            low, high = preferred["interval"]
            yield (
                f"the judge prefers {name} to {first} in {preferred['value']:.1%} of the replies (95 % interval "
                f"{low:.1%} to {high:.1%}), and says the same in both orders of {preferred['consistent']:.0%}"
            )
    for verdict in ("better", "worse", "same"):
        figures_of_verdict = [
            f"{figure} (p {of['p']:.3f})" for figure, of in figures.items() if of.get("verdict") == verdict
        ]
        if figures_of_verdict:
            yield f"{name} against {first}: {verdict}: {', '.join(figures_of_verdict)}"


def _cell(file_metrics: dict, model: str, figure: str) -> str:
    of_model = file_metrics["models"][model]
    if left_out := of_model.get("incomplete", {}).get(figure):
        return f"incomplete ({left_out['judged']} of {left_out['of']})"
    summary = of_model.get(figure)
    if summary is None:
        return ""
    text = f"{summary['value']:.3f}"
    if "interval" in summary:
        text += " ({:.3f}-{:.3f})".format(*summary["interval"])
    verdict = file_metrics["against_first"].get(model, {}).get(figure, {}).get("verdict")
    return f"{text} {verdict}" if verdict else text
