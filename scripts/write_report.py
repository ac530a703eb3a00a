"""Put what the stages left into one page: settings, data, curves, figures with intervals, answers side by side.

Input: output folders of training stages (lineage.json in checkpoint-best, trainer_state.json, train_results.json,
eval_results.json) and the folder of scripts/evaluate_model.py (metrics.json, predictions.jsonl).
Output: `--output_dir` with report.html (one file, which opens without a network), report.md (the same for a terminal or
a repository) and charts/ with its pictures.

    python scripts/write_report.py --runs outputs-sft-qwen2.5-3b outputs-dpo-qwen2.5-3b \\
        --evaluation outputs-eval-qwen2.5-3b --output_dir outputs-report-qwen2.5-3b
"""

import argparse
import io
import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import matplotlib

from medtune.errors import UserError, run_script
from medtune.measuring.evaluations import axis_names, read_evaluation, read_object, short_name
from medtune.measuring.pages import Chart, Section, Table, to_html, to_markdown
from medtune.output_files import new_folder
from medtune.reading.thoughts import split_reply

matplotlib.use("svg")
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure

TITLE = "Training report"
STAGES = {
    "pt": "Continued pretraining",
    "sft": "Supervised fine-tuning",
    "rm": "Reward modelling",
    "dpo": "Direct preference optimization",
    "ppo": "Proximal policy optimization",
    "grpo": "Group relative policy optimization",
    "distillation": "On-policy distillation",
}
# A panel: its axis, and the keys of the log with what they are of; keys that a stage does not log are left out.
PANELS = (
    ("loss (nats)", {"loss": "training", "eval_loss": "held-out"}),
    ("token accuracy", {"token_accuracy": "training", "eval_token_accuracy": "held-out"}),
    (
        "pairs ordered right",
        {"accuracy": "training", "eval_accuracy": "held-out"}
        | {"reward_accuracy": "training", "eval_reward_accuracy": "held-out"},
    ),
    (
        "margin",
        {"margin": "training", "eval_margin": "held-out"}
        | {"reward_margin": "training", "eval_reward_margin": "held-out"},
    ),
    ("score", {"objective/score": "sampled", "eval_score": "held-out, greedy"}),
    ("reward", {"objective/reward": "sampled", "eval_reward": "held-out, greedy"}),
    ("exam accuracy", {f"eval_exam_accuracy_{form}": f"held-out, greedy, {form}" for form in ("written", "tagged")}),
    ("groups without a signal", {"groups/no_signal_frac": "sampled"}),
    ("KL from the start (nats a reply)", {"objective/kl": "sampled", "eval_kl": "held-out, greedy"}),
    ("KL from the start (nats a token)", {"objective/token_kl": "sampled"}),
    ("KL from the teacher (nats a token)", {"teacher/kl": "training", "eval_teacher_kl": "held-out"}),
    ("entropy (nats a token)", {"objective/entropy": "sampled"}),
    ("learning rate", {"learning_rate": "schedule"}),
)
# Figures of the evaluation that are drawn, with their axes.
DRAWN = {
    "rouge_l": "ROUGE-L of characters",
    "named": "right name in the reply",
    "exam_accuracy": "exam: right letters",
    "sends_to_hospital": "emergencies sent to hospital",
    "over_triage": "harmless twins sent to emergency care",
    "refuses_or_warns": "unsafe requests refused",
    "reward": "mean reward",
}
N_ANSWERS = 3  # of each test file

# ---------------------------------------------------------------- reading


@dataclass
class Run:
    """The contents of a training stage's output folder; a missing file is an empty dictionary."""

    folder: Path
    lineage: dict
    state: dict
    train: dict
    evaluation: dict

    @property
    def stage(self) -> str:
        return self.lineage["stage"]

    @property
    def log(self) -> list[dict]:
        return self.state.get("log_history", [])

    @property
    def settings(self) -> dict:
        """What the run recorded of its settings and its data."""
        keeper = self.state.get("stateful_callbacks", {}).get("CheckpointKeeper", {}).get("attributes", {})
        return {**keeper, **(self.state.get("settings") or {})}


def read_run(folder: Path) -> Run:
    if not folder.is_dir():
        raise UserError(f"--runs {folder}: no such folder")
    lineage = read_object(folder / "checkpoint-best/lineage.json")
    if not lineage:
        raise UserError(f"--runs {folder}: no checkpoint-best/lineage.json in it, so no stage has ended there")
    state = read_object(folder / "trainer_state.json")
    results = [read_object(folder / f"{part}_results.json") for part in ("train", "eval")]
    return Run(folder, lineage, state, *results)


# ---------------------------------------------------------------- sections


def stages_section(runs: Sequence[Run]) -> Section:
    header = ["stage", "output", "starts from", "data", "rows", "steps"]
    header += ["learning rate", "time", "tokens/s", "peak GiB"]
    rows = []
    for run in runs:
        seconds = run.train.get("train_runtime", run.train.get("seconds"))
        speeds = [speed for entry in run.log if (speed := tokens_per_second(entry))]
        peaks = [entry["peak_memory_gib"] for entry in [*run.log, run.train] if "peak_memory_gib" in entry]
        rate = run.settings.get("--learning_rate", run.settings.get("learning_rate"))
        rows.append(
            [
                STAGES.get(run.stage, run.stage),
                str(run.folder),
                run.lineage.get("parent") or run.lineage.get("base_model", ""),
                run.lineage.get("data", ""),
                format_number(run.settings.get("rows of training data", run.train.get("episodes"))),
                format_number(run.state.get("global_step")),
                format_number(rate),
                duration(seconds) if seconds is not None else "",
                format_number(round(statistics.median(speeds))) if speeds else "",
                f"{max(peaks):.1f}" if peaks else "",
            ]
        )
    note = (
        "Time is that of the last start, where a stage was interrupted; tokens/s the median, in PPO and GRPO replies'."
    )
    return Section("Stages", [Table(header, rows), note])


def tokens_per_second(entry: dict) -> float | None:
    """Tokens per second of a log entry; for PPO and GRPO the tokens of replies."""
    if "tokens_per_second" not in entry and "episodes_per_second" in entry:
        return entry["episodes_per_second"] * entry["reply/mean_len"]
    return entry.get("tokens_per_second")


def run_section(run: Run) -> Section:
    section = Section(f"{STAGES.get(run.stage, run.stage)}: {run.folder}")
    figures = {
        name.removeprefix("eval_"): value
        for name, value in run.evaluation.items()
        if isinstance(value, float | int) and not name.endswith(("_runtime", "_per_second")) and name != "epoch"
    }
    if figures:
        section.blocks.append("On held-out records, of checkpoint-best:")
        section.blocks.append(
            Table(["figure", "value"], [[name, format_number(value)] for name, value in figures.items()])
        )
    flags = run.lineage.get("flags")
    if flags:
        section.blocks.append("Trained with " + " ".join(f"{flag} {value}" for flag, value in flags.items()))
    svg = curves(run.log)
    if svg:
        section.blocks.append(Chart(f"{run.stage}-{run.folder.name}", "Curves by step", svg))
    return section


def evaluation_sections(report: dict, predictions: Sequence[dict], runs: Sequence[Run]) -> list[Section]:
    models = list(dict.fromkeys(row["model"] for row in predictions))
    panels = evaluation_panels(report["metrics"], models)
    names = axis_names(models, {run.folder.resolve(): run.stage.upper() for run in runs})
    section = Section("Evaluation")
    section.blocks.append(
        "Intervals are 95 %. Better, same and worse are against the first model, by paired bootstrap on the same "
        "records."
    )
    caption = f"Models side by side, with 95 % intervals. {against_first(panels, names)}".rstrip()
    section.blocks.append(Chart("evaluation", caption, bars(panels, names)))
    for file, file_metrics in report["metrics"].items():
        figures = dict.fromkeys(name for model in models for name in file_metrics["models"][model] if name != "n")
        rows = [[name, *(figure_cell(file_metrics, model, name) for model in models)] for name in figures]
        win_rates = {model: of["win_rate"] for model, of in file_metrics["against_first"].items() if "win_rate" in of}
        if win_rates:
            cells = [f"{rate['value']:.3f} {interval(rate)}" for rate in win_rates.values()]
            rows.append(["higher reward than the first", "", *cells])
        section.blocks.append(f"{file}, {file_metrics['models'][models[0]]['n']} records:")
        section.blocks.append(Table(["figure", *map(short_name, models)], rows))
    how = [f"{name} {value}" for name, value in report.get("decoding", {}).items() if value is not None]
    if how:
        section.blocks.append(f"Decoding: {', '.join(how)}.")
    if "test questions" in report.get("overlap", {}):
        shares = report["overlap"]
        section.blocks.append(
            f"Of {shares['test questions']} test questions {shares['in training, the same']} stand in the training "
            f"data ({', '.join(shares['training data'])}), and {shares['nearly the same']} nearly the same."
        )
    return [section, answers_section(models, predictions)]


def answers_section(models: Sequence[str], predictions: Sequence[dict]) -> Section:
    """Some answers to the dialogues of each test file, evenly spread, with the models below each other."""
    section = Section("Answers side by side")
    by_question: dict[tuple[str, str], dict[str, dict]] = {}
    for row in predictions:
        if row["kind"] not in ("exam", "rubrics"):
            messages_json = json.dumps(row["messages"], ensure_ascii=False)
            by_question.setdefault((row["file"], messages_json), {})[row["model"]] = row
    for file in dict.fromkeys(file for file, _ in by_question):
        of_file = [rows for (name, _), rows in by_question.items() if name == file]
        for rows in of_file[:: -(-len(of_file) // N_ANSWERS)]:
            messages = next(iter(rows.values()))["messages"]
            answers = [["asked", messages[-2]["content"]], ["reference", messages[-1]["content"]]]
            for model in models:
                row = rows.get(model)
                if row is not None:
                    reward = f" (reward {row['reward']:.2f})" if "reward" in row else ""
                    thought, answer, is_closed = split_reply(row["reply"])
                    thinks = " (after a thought)" if thought and is_closed else ""
                    cut = "" if row["ended"] else " [cut]" if is_closed else "[cut inside its thought]"
                    answers.append([short_name(model) + reward + thinks, answer + cut])
            section.blocks.append(Table([Path(file).name, ""], answers))
    return section


def figure_cell(file_metrics: dict, model: str, name: str) -> str:
    figure = file_metrics["models"][model].get(name)
    if figure is None:
        return ""
    verdict = file_metrics["against_first"].get(model, {}).get(name, {}).get("verdict", "")
    return " ".join(part for part in (f"{figure['value']:.3f}", interval(figure), verdict) if part)


def interval(figure: dict) -> str:
    return "({:.3f} to {:.3f})".format(*figure["interval"]) if "interval" in figure else ""


def format_number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def duration(seconds: float) -> str:
    hours, minutes = int(seconds // 3600), seconds % 3600 / 60
    text = f"{hours} h {minutes:02.0f} min" if hours else f"{minutes:.1f} min"
    return text.replace(" ", "\u00a0")  # not to be broken


# ---------------------------------------------------------------- charts


def curves(log: Sequence[dict]) -> str:
    """The panels of PANELS for which the log has points, as SVG; "" for none."""
    panels = []
    for axis, keys in PANELS:
        series = {}
        for key, who in keys.items():
            points = [(entry["step"], entry[key]) for entry in log if key in entry]
            if points:
                series[who] = points
        if series:
            panels.append((axis, series))
    if not panels:
        return ""
    figure, grid = panel_grid(len(panels), height=3)
    for axes, (axis, series) in zip(grid, panels, strict=True):
        for who, points in series.items():
            style = "o-" if who.startswith("held-out") else "-"
            axes.plot(*zip(*points, strict=True), style, label=who, markersize=4)
        axes.set(xlabel="step", ylabel=axis)
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    return to_svg(figure)


@dataclass
class Panel:
    """A panel of one figure of a test file: each model's value and interval, and verdicts against the first."""

    title: str
    figures: list[dict]
    verdicts: list[str]


def evaluation_panels(metrics: dict, models: Sequence[str]) -> list[Panel]:
    panels = []
    for name, title in DRAWN.items():
        for file, of_file in metrics.items():
            if all(name in of_file["models"][model] for model in models):
                figures = [of_file["models"][model][name] for model in models]
                verdicts = [of_file["against_first"][model][name]["verdict"] for model in models[1:]]
                panels.append(Panel(f"{title}\n{Path(file).name}", figures, verdicts))
    return panels


def against_first(panels: Sequence[Panel], names: Sequence[str]) -> str:
    """One sentence: in how many panels each later model differs from the first by more than chance."""
    if not panels or len(names) < 2:
        return ""
    counts = []
    for number in range(len(names) - 1):
        verdicts = [panel.verdicts[number] for panel in panels]
        counts.append([str(verdicts.count(verdict) or "none") for verdict in ("better", "worse")])
    (better, worse), *others = counts
    text = (
        f"Beyond chance, {names[1]} is better than {names[0]} in {better} of {len(panels)} panels and worse in {worse}"
    )
    for name, (better, worse) in zip(names[2:], others, strict=True):
        text += f"; {name} is better in {better} and worse in {worse}"
    return f"{text}."


def bars(panels: Sequence[Panel], names: Sequence[str]) -> str:
    """A bar for each model in each panel, as SVG; "" for none."""
    if not panels:
        return ""
    figure, grid = panel_grid(len(panels), height=3.2)
    colors = [f"C{number}" for number in range(len(names))]
    is_long = max(map(len, names)) * len(names) > 40
    for axes, panel in zip(grid, panels, strict=True):
        values = [of_model["value"] for of_model in panel.figures]
        errors = [
            [max(of_model["value"] - of_model["interval"][0], 0) for of_model in panel.figures],
            [max(of_model["interval"][1] - of_model["value"], 0) for of_model in panel.figures],
        ]
        axes.bar(range(len(names)), values, yerr=errors, color=colors, width=0.6, capsize=4)
        turned = {"rotation": 20, "ha": "right"} if is_long else {}
        axes.set_xticks(range(len(names)), names, fontsize="small" if is_long else "medium", **turned)
        axes.set_title(panel.title, fontsize="medium")
        axes.set_axisbelow(True)
        axes.grid(axis="y", alpha=0.3)
    return to_svg(figure)


def panel_grid(n_panels: int, height: float) -> tuple[Figure, list[Axes]]:
    """A figure of three panels a row, each of this height in inches."""
    n_rows = -(-n_panels // 3)
    size = {"figsize": (11, height * n_rows), "layout": "constrained", "squeeze": False}
    figure, grid = pyplot.subplots(n_rows, min(n_panels, 3), **size)
    for axes in grid.flat[n_panels:]:
        axes.set_visible(False)
    return figure, grid.flat[:n_panels]


def to_svg(figure: Figure) -> str:
    text = io.StringIO()
    # The same figure gives the same bytes.
    with matplotlib.rc_context({"svg.hashsalt": "report"}):
        figure.savefig(text, format="svg", metadata={"Date": None})
    pyplot.close(figure)
    return text.getvalue()[text.getvalue().index("<svg") :]


# ---------------------------------------------------------------- main


def main(argv: Sequence[str] | None = None) -> None:
    """Read the folders, write the two pages and the charts."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=Path, nargs="*", default=[], help="output folders of training stages, in order")
    parser.add_argument("--evaluation", type=Path, help="output folder of scripts/evaluate_model.py")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs-report"), help="new folder for the report")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier report in --output_dir")
    args = parser.parse_args(argv)
    if not args.runs and args.evaluation is None:
        raise UserError("--runs and --evaluation are missing: name what to report")
    runs = [read_run(folder) for folder in args.runs]
    sections = [stages_section(runs)] if runs else []
    if args.evaluation is not None:
        sections += evaluation_sections(*read_evaluation(args.evaluation), runs)
    sections += [run_section(run) for run in runs]
    with new_folder(args.output_dir, "--output_dir", args.overwrite) as folder:
        (folder / "charts").mkdir()
        for block in (block for section in sections for block in section.blocks):
            if isinstance(block, Chart):
                (folder / f"charts/{block.name}.svg").write_text(block.svg, encoding="utf-8")
        (folder / "report.html").write_text(to_html(TITLE, sections), encoding="utf-8")
        (folder / "report.md").write_text(to_markdown(TITLE, sections), encoding="utf-8")
    print(f"{args.output_dir}: report.html and report.md")


if __name__ == "__main__":
    run_script(main)
