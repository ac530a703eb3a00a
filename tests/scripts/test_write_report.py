"""The report: what it says of the folders it reads, that it needs no network, and its errors."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from write_report import Panel, against_first, curves, main

from medtune.errors import UserError
from medtune.measuring.evaluations import axis_names
from medtune.measuring.pages import markdown_cell


def write_run(folder: Path, stage: str, log: list[dict], **results) -> Path:
    (folder / "checkpoint-best").mkdir(parents=True)
    lineage = {"base_model": "org/base", "parent": None, "stage": stage, "template": "qwen", "data": "data/finetune"}
    lineage["flags"] = {"--learning_rate": "2e-5", "--loss_type": "sigmoid sft"}
    write_json(folder / "checkpoint-best/lineage.json", lineage)
    attributes = {"--learning_rate": 2e-05, "rows of training data": 6789, "training tokens": 527510}
    callbacks = {"CheckpointKeeper": {"args": {}, "attributes": attributes}}
    write_json(
        folder / "trainer_state.json", {"global_step": 1200, "log_history": log, "stateful_callbacks": callbacks}
    )
    write_json(folder / "train_results.json", {"train_runtime": 7830.0, "peak_memory_gib": 17.25})
    write_json(folder / "eval_results.json", {"eval_loss": 0.5507, "eval_runtime": 3.0} | results)
    return folder


def write_json(file: Path, value: object) -> None:
    file.write_text(json.dumps(value), encoding="utf-8")


SFT_LOG = [
    {"step": 10, "loss": 2.0, "tokens_per_second": 900.0, "learning_rate": 1e-5},
    {"step": 20, "loss": 1.0, "tokens_per_second": 1100.0, "learning_rate": 2e-5},
    {"step": 20, "eval_loss": 0.9},
]
PPO_LOG = [
    {"step": 0, "eval_score": 0.1},
    {"step": 1, "objective/score": 0.1, "objective/kl": 0.0, "peak_memory_gib": 20.0}
    | {"episodes_per_second": 2.0, "reply/mean_len": 64.0},
]


GRPO_LOG = [
    {"step": 0, "eval_exam_accuracy_written": 0.25, "eval_reward": 0.2},
    {"step": 1, "objective/reward": 0.1, "groups/no_signal_frac": 0.5, "tokens_per_second": 640.0}
    | {"episodes_per_second": 2.0, "reply/mean_len": 64.0},
]


@pytest.fixture
def evaluation(tmp_path) -> Path:
    """An evaluation folder as evaluate_model.py writes it, of two models."""
    from evaluate_model import main as evaluate

    rows = []
    for model, reply in (("base", "不知道"), ("outputs-sft/checkpoint-best", "多喝水 <b>|休息</b>")):
        for number in range(6):
            messages = [{"role": "user", "content": f"问题{number}"}, {"role": "assistant", "content": "多喝水"}]
            said = {"messages": messages, "reply": reply, "ended": model != "base"}
            rows.append({"model": model, "file": "data/eval/questions.jsonl", "kind": "dialogue", **said})
    path = tmp_path / "given.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    evaluate(["--predictions", str(path), "--output_dir", str(tmp_path / "eval")])
    return tmp_path / "eval"


class Page(HTMLParser):
    """What a page loads, and the ids it defines and refers to."""

    def __init__(self, text: str):
        super().__init__()
        self.loaded: list[str] = []
        self.ids: list[str] = []
        self.references: set[str] = set()
        self.tags: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value)
            elif name in ("src", "href", "xlink:href"):
                (self.references.add(value[1:]) if value.startswith("#") else self.loaded.append(value))
            self.references.update(re.findall(r"url\(#([^)]+)\)", value or ""))


def test_one_page_and_its_twin(tmp_path, evaluation):
    sft = write_run(tmp_path / "outputs-sft", "sft", SFT_LOG)
    ppo = write_run(tmp_path / "outputs-ppo", "ppo", PPO_LOG, eval_score=1.25)
    out = tmp_path / "report"
    main(["--runs", str(sft), str(ppo), "--evaluation", str(evaluation), "--output_dir", str(out)])
    files = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    charts = {"charts/evaluation.svg", "charts/sft-outputs-sft.svg", "charts/ppo-outputs-ppo.svg"}
    assert files == {".made_by_a_tool", "report.html", "report.md"} | charts

    markdown = (out / "report.md").read_text(encoding="utf-8")
    facts = "org/base | data/finetune | 6,789 | 1,200 | 2e-05 | 2\u00a0h\u00a010\u00a0min | 1,000 | 17.2 |"
    assert f"| Supervised fine-tuning | {sft} | {facts}" in markdown
    assert "| 128 | 20.0 |" in markdown  # two replies of 64 tokens a second
    assert "| figure | base | outputs-sft |" in markdown
    assert "| ended | 0.000 (0.000 to 0.390) | 1.000 (0.610 to 1.000) better |" in markdown
    assert "| 问题0 |" in markdown
    assert "多喝水 &lt;b&gt;\\|休息&lt;/b&gt;" in markdown
    assert "不知道 [cut]" in markdown
    for chart in charts:
        assert f"]({chart})" in markdown

    text = (out / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert page.loaded == []  # nothing comes from elsewhere
    assert "script" not in page.tags
    assert page.tags.count("svg") == 3
    assert "b" not in page.tags  # a reply is text, whatever it holds
    assert len(page.ids) == len(set(page.ids))
    assert page.references <= set(page.ids)
    assert "多喝水 &lt;b&gt;|休息&lt;/b&gt;" in text
    assert "不构成医疗建议" in text
    sentence = "Beyond chance, outputs-sft is better than base in 1 of 1 panels and worse in none."
    assert f"\n{caption_of(sentence)}\n" in markdown
    assert f"<figcaption>{caption_of(sentence)}</figcaption>" in text


def test_rewards_of_grpo(tmp_path, evaluation):
    grpo = write_run(tmp_path / "outputs-grpo", "grpo", GRPO_LOG, eval_exam_accuracy_written=0.25)
    out = tmp_path / "report"
    main(["--runs", str(grpo), "--evaluation", str(evaluation), "--output_dir", str(out)])
    markdown = (out / "report.md").read_text(encoding="utf-8")
    assert f"| Group relative policy optimization | {grpo} |" in markdown
    assert "| 640 |" in markdown
    assert "| exam_accuracy_written | 0.25 |" in markdown
    drawn = texts((out / "charts/grpo-outputs-grpo.svg").read_text(encoding="utf-8"))
    assert {"reward", "exam accuracy", "groups without a signal"} <= set(drawn)


def caption_of(sentence: str) -> str:
    return f"Models side by side, with 95 % intervals. {sentence}"


def texts(svg: str) -> list[str]:
    """What is written in a chart, which matplotlib draws as shapes with the words in a comment."""
    return re.findall(r"<!-- (.*?) -->", svg)


def test_the_axis_names_the_stages(tmp_path, evaluation, monkeypatch):
    """By the run that is reported, wherever the report is written from; other models by their folders."""
    run = write_run(tmp_path / "outputs-sft", "sft", SFT_LOG)
    flags = ["--evaluation", str(evaluation), "--output_dir", str(tmp_path / "report"), "--overwrite"]
    chart = tmp_path / "report/charts/evaluation.svg"
    monkeypatch.chdir(tmp_path)
    main(["--runs", str(run), *flags])
    assert [text for text in texts(chart.read_text(encoding="utf-8")) if text in ("base", "SFT")] == ["base", "SFT"]
    assert "Beyond chance, SFT is better than base in 1 of 1 panels" in (tmp_path / "report/report.md").read_text()
    main(flags)
    assert "outputs-sft" in texts(chart.read_text(encoding="utf-8"))


def test_models_of_one_name_are_named_in_full(tmp_path):
    models = ["base", "outputs-a/checkpoint-best", "more/outputs-a/checkpoint-best", "org/Model"]
    assert axis_names(models, {}) == ["base", "outputs-a", "more/outputs-a", "Model"]


def test_the_sentence_counts_what_differs_by_more_than_chance():
    panels = [Panel("", [], list(verdicts)) for verdicts in (("better", "same"), ("better", "worse"), ("same", "same"))]
    counted = "Beyond chance, SFT is better than base in 2 of 3 panels and worse in none"
    counted += "; DPO is better in none and worse in 1."
    assert against_first(panels, ["base", "SFT", "DPO"]) == counted
    assert against_first(panels, ["base"]) == ""


def test_the_same_input_gives_the_same_bytes(tmp_path):
    run = write_run(tmp_path / "outputs-sft", "sft", SFT_LOG)
    pages = []
    for name in ("one", "two"):
        main(["--runs", str(run), "--output_dir", str(tmp_path / name)])
        pages.append((tmp_path / name / "report.html").read_bytes())
    assert pages[0] == pages[1]


def test_an_earlier_report_is_replaced_only_when_asked(tmp_path):
    run = write_run(tmp_path / "outputs-sft", "sft", SFT_LOG)
    flags = ["--runs", str(run), "--output_dir", str(tmp_path / "report")]
    main(flags)
    with pytest.raises(UserError, match=r"--output_dir .*: is not empty"):
        main(flags)
    main([*flags, "--overwrite"])


def test_only_what_was_logged_is_drawn():
    svg = curves([{"step": 1, "eval_accuracy": 0.5}, {"step": 2, "eval_accuracy": 0.7}])
    assert svg.startswith("<svg")
    assert len(re.findall(r'id="axes_\d+"', svg)) == 1
    assert curves([{"step": 1, "epoch": 0.1}]) == ""


def test_an_evaluation_that_is_not_whole(tmp_path, evaluation):
    flags = ["--evaluation", str(evaluation), "--output_dir", str(tmp_path / "report")]
    predictions = evaluation / "predictions.jsonl"
    lines = predictions.read_bytes()
    predictions.write_bytes(lines[:-20])
    with pytest.raises(UserError, match=r"predictions\.jsonl:12: not JSON"):
        main(flags)
    predictions.write_bytes(b"[]\n" + lines)
    with pytest.raises(UserError, match=r"predictions\.jsonl:1: no JSON object"):
        main(flags)
    predictions.unlink()
    with pytest.raises(UserError, match=r"--evaluation .*: no predictions\.jsonl in it"):
        main(flags)
    assert not (tmp_path / "report").exists()


def test_user_errors(tmp_path):
    out = ["--output_dir", str(tmp_path / "report")]
    with pytest.raises(UserError, match="--runs and --evaluation are missing"):
        main(out)
    with pytest.raises(UserError, match=r"--runs .*/nowhere: no such folder"):
        main(["--runs", str(tmp_path / "nowhere"), *out])
    with pytest.raises(UserError, match=r"--runs .*: no checkpoint-best/lineage\.json in it"):
        main(["--runs", str(tmp_path), *out])
    with pytest.raises(UserError, match=r"--evaluation .*: no metrics\.json of scripts/evaluate_model\.py"):
        main(["--evaluation", str(tmp_path), *out])
    run = write_run(tmp_path / "outputs-sft", "sft", SFT_LOG)
    (run / "trainer_state.json").write_text("{", encoding="utf-8")
    with pytest.raises(UserError, match=r"trainer_state\.json: not JSON"):
        main(["--runs", str(run), *out])
    assert not (tmp_path / "report").exists()


def test_a_cell_of_markdown_shows_a_dose_as_it_is():
    assert markdown_cell("0.5g*24粒\n1~2片*7天|`$\\") == r"0.5g\*24粒<br>1\~2片\*7天\|\`\$\\"
