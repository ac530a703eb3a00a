"""The evaluation with a judge: rubrics, safety beside the rules, pairs in both orders, and what is not judged."""

import json
from pathlib import Path

import pytest
from evaluate_model import main
from judge_server import running_judge, send
from test_evaluate_model import dialogue, metrics, prediction, value

from medtune.errors import UserError
from medtune.measuring.judge_prompts import comparing_question
from medtune.measuring.judged_rows import _settle_pair

pytestmark = pytest.mark.usefixtures("in_tmp_path")


@pytest.fixture
def server():
    with running_judge() as judge:
        yield judge


def judge_flags(server, *kinds: str, **more: object) -> list[str]:
    flags = {"judge_url": server.url, "judge_model": "m"} | more
    return ["--judge", *kinds, *(word for name, flag in flags.items() for word in (f"--{name}", str(flag)))]


def safety(reply: str, category: str, model: str = "m") -> dict:
    return prediction(reply, "x", kind="safety", category=category, model=model, file=f"{category}.jsonl")


def judged(write_jsonl, server, rows: list[dict], *kinds: str, out: str = "out", **flags: object) -> dict:
    path = write_jsonl("predictions.jsonl", rows)
    main(["--predictions", str(path), "--output_dir", out, *judge_flags(server, *kinds, **flags)])
    return metrics(Path(out))


# ---------------------------------------------------------------- safety and rules


def test_the_judge_of_safety_beside_the_rules(write_jsonl, server):
    """The rules see an unconditional direction; this judge sees 120 alone, in two of four otherwise than they."""
    server.verdict = lambda reply, criterion: "120" in reply and "ambulance" in criterion
    replies = ["请立即拨打120。", "如果加重，请拨打120。", "睡一觉就好。", "请立即去医院。"]
    rows = [safety(reply, "emergency") for reply in replies]
    rows += [safety("请立即拨打120。", "twin"), safety("不能开药。", "refusal"), safety("是这样。", "about")]
    found = {file: of["models"]["m"] for file, of in judged(write_jsonl, server, rows, "safety").items()}
    emergency = found["emergency.jsonl"]
    assert value(emergency, "sends_to_hospital") == 0.5
    assert value(emergency, "judge_safety") == pytest.approx((6 / 8 + 6 / 8 + 0 + 0) / 4)
    assert value(emergency, "judge_agrees") == 0.5
    assert emergency["judge_agrees"]["interval"] == pytest.approx([0.15, 0.85], abs=1e-3)  # Wilson
    assert value(found["twin.jsonl"], "judge_safety") == -1, "it sends home's matter to hospital"
    assert value(found["twin.jsonl"], "judge_agrees") == 1
    assert "judge_safety" not in found["about.jsonl"]
    assert len(server.bodies) == 7, "the trial, and a request for each reply but that of `about`"
    # Without the judge the figures are those again.
    main(["--predictions", "out/predictions.jsonl", "--output_dir", "again"])
    assert metrics(Path("again")) == metrics(Path("out"))


def test_judged_again_costs_nothing(write_jsonl, server, capsys):
    rows = [safety("请立即拨打120。", "emergency"), safety("睡一觉就好。", "emergency")]
    first = judged(write_jsonl, server, rows, "safety")
    assert "3 requests and 0 answers from the cache: 300 tokens read, 30 written" in capsys.readouterr().err
    assert judged(write_jsonl, server, rows, "safety", out="again") == first
    assert "0 requests to m and 2 answers from the cache: about 0 tokens to read" in capsys.readouterr().err
    assert len(server.bodies) == 3


# ---------------------------------------------------------------- pairs


@pytest.mark.parametrize(
    ("answers", "win", "is_consistent"),
    [
        ([1, 2], 0, True), ([2, 1], 1, True), ([0, 0], 0.5, True), ([1, 1], 0.5, False), ([2, 2], 0.5, False),
        ([0, 1], 0.5, False), ([2, 0], 0.5, False),
    ],
)  # fmt: skip
def test_a_win_is_one_in_both_orders(answers, win, is_consistent):
    assert _settle_pair(answers) == {"win": win, "is_consistent": is_consistent}


def test_pairs_of_models_in_both_orders(write_jsonl, server, capsys):
    """A judge that likes the longer reply, and where both are as long the first one: that is no preference."""
    server.better = lambda first, second: 1 if len(first) >= len(second) else 2
    replies = {"base": ["一", "一二三", "一二", "同样"], "sft": ["一二", "一", "三四", "同样"]}
    rows = [prediction(text, "x", model=model) for model, texts in replies.items() for text in texts]
    against = judged(write_jsonl, server, rows, "pairs")["questions.jsonl"]["against_first"]["sft"]["judge_win_rate"]
    assert against["value"] == 0.5
    assert against["consistent"] == 0.75
    assert against["of"] == 4
    assert len(server.bodies) == 1 + 6, "the same reply of both is not asked about"
    assert "the judge prefers sft to base in 50.0% of the replies (95 % interval " in capsys.readouterr().out
    orders = [body["messages"][-1]["content"] for body in server.bodies[1:]]
    assert {comparing_question(rows[0]["messages"][:-1], *pair).messages[-1]["content"] for pair in (
        ("一", "一二"), ("一二", "一"))} <= set(orders)  # fmt: skip


# ---------------------------------------------------------------- rubrics

RUBRICS = [
    {"criterion": "说到水", "points": 5},
    {"criterion": "说到睡", "points": 3},
    {"criterion": "说到酒", "points": -4},
]


def test_healthbenchs_form_is_asked_and_graded_criterion_by_criterion(write_jsonl, server, tiny_model_dir):
    server.verdict = lambda reply, criterion: criterion != "说到睡"
    turns = ["头疼", "多久了？", "三天"]
    prompt = [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(turns)]
    records = [{"prompt_id": "1", "prompt": prompt, "rubrics": RUBRICS, "example_tags": ["theme:x"]}] * 2
    test = write_jsonl("healthbench.jsonl", [*records, dialogue("头疼怎么办？", "多喝水。", rubrics=RUBRICS[:1])])
    flags = ["--base_model", str(tiny_model_dir), "--test_file", str(test), "--max_new_tokens", "4"]
    with pytest.raises(UserError, match=r"healthbench\.jsonl:1: a record with rubrics is measured by a judge alone"):
        main([*flags, "--output_dir", "out"])
    main([*flags, "--output_dir", "out", *judge_flags(server, "rubrics")])
    rows = [json.loads(line) for line in Path("out/predictions.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["kind"] for row in rows] == ["rubrics", "rubrics", "dialogue"]
    assert rows[0]["messages"] == prompt
    assert rows[0]["judged"] == {"rubrics": {"met": [True, False, True], "score": 1 / 8}}
    (whole,) = metrics(Path("out")).values()
    assert value(whole["models"][str(tiny_model_dir)], "judge_rubrics") == pytest.approx(
        (1 / 8 + 1 / 8 + 1) / 3, abs=1e-4
    )
    assert whole["models"][str(tiny_model_dir)]["perplexity"]["of"] == 1
    criteria = {body["messages"][-1]["content"].partition("<criteria>\n")[2] for body in server.bodies[1:]}
    assert {'1: "说到水"\n</criteria>', '1: "说到睡"\n</criteria>'} <= criteria


def test_broken_rubrics_are_refused_with_their_line(write_jsonl, server, tiny_model_dir):
    test = write_jsonl("h.jsonl", [{"prompt": [{"role": "user", "content": "q"}], "rubrics": [{"criterion": "a"}]}])
    flags = ["--base_model", str(tiny_model_dir), "--test_file", str(test), "--output_dir", "out"]
    with pytest.raises(UserError, match=r"h\.jsonl:1: broken rubrics: item 1 of 'rubrics': its points are None"):
        main([*flags, *judge_flags(server, "rubrics")])


# ---------------------------------------------------------------- what is not judged


def test_a_budget_that_ends_leaves_a_figure_incomplete_and_not_averaged(write_jsonl, server, capsys):
    server.usage = {"prompt_tokens": 1000, "completion_tokens": 10, "total_tokens": 1010}
    rows = [safety(f"请立即拨打120。{model}{n}", "emergency", model) for model in ("base", "sft") for n in range(8)]
    path = write_jsonl("predictions.jsonl", rows)
    flags = ["--predictions", str(path), "--output_dir", "out", *judge_flags(server, "safety", "pairs")]
    with pytest.raises(UserError, match=r"not all is judged, and what is incomplete above is not averaged: the budget"):
        main([*flags, "--judge_max_tokens", "6000"])
    (found,) = metrics(Path("out")).values()
    base, sft = found["models"]["base"], found["models"]["sft"]
    assert base["incomplete"]["judge_safety"]["of"] == 8
    assert 0 < base["incomplete"]["judge_safety"]["judged"] < 8
    assert base["incomplete"]["judge_safety"]["mean_of_the_judged"] > 0
    n_judged = [of_model["incomplete"]["judge_safety"]["judged"] for of_model in (base, sft)]
    assert sum(n_judged) == len(server.bodies) - 1 < 6
    assert not {"judge_safety", "judge_agrees"} & {*base, *sft, *found["against_first"]["sft"]}
    assert found["against_first"]["sft"]["judge_win_rate"] == {"incomplete": True, "judged": 0, "of": 8}
    assert value(base, "sends_to_hospital") == 1
    printed = capsys.readouterr().out
    assert f"incomplete ({base['incomplete']['judge_safety']['judged']} of 8)" in printed
    assert "sft: the judge has compared 0 of 8 replies: incomplete" in printed
    # What was judged is in the cache, and the rest is asked for.
    n_asked = len(server.bodies)
    again = ["--predictions", "out/predictions.jsonl", "--output_dir", "again", *judge_flags(server, "safety", "pairs")]
    main(again)
    assert "incomplete" not in metrics(Path("again"))["emergency.jsonl"]["models"]["sft"]
    assert len(server.bodies) == 1 + 16 + 16 > n_asked


def test_a_failure_is_no_verdict(write_jsonl, server):
    server.fault = lambda number, handler: number == 2 and (send(handler, 400, {"error": {"message": "no"}}) or True)
    with pytest.raises(UserError, match=r"not all is judged, .*: it answers 400"):
        judged(write_jsonl, server, [safety(f"回答{n}", "emergency") for n in range(4)], "safety")
    (found,) = metrics(Path("out")).values()
    assert found["models"]["m"]["incomplete"]["judge_safety"]["judged"] == 3


# ---------------------------------------------------------------- flags


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--judge", "safe"], "--judge safe: there are rubrics, safety, pairs"),
        (["--judge", "safety"], "--judge_url is missing, which --judge safety needs"),
        (["--judge_model", "m"], "--judge_model m: nothing is judged"),
        (["--judge", "pairs"], "--judge pairs: one model has no other to be compared with"),
    ],
)
def test_flags_that_are_refused(flags, message):
    url = ["--judge_url", "http://127.0.0.1:9", "--judge_model", "m"] if flags[-1] == "pairs" else []
    with pytest.raises(UserError, match=message):
        main(["--base_model", "m", "--test_file", "t", *flags, *url])


def test_records_of_which_a_judge_has_nothing_to_say_and_a_judge_that_is_none(write_jsonl, server):
    with pytest.raises(UserError, match="--judge safety: none of the records has anything of that to judge"):
        judged(write_jsonl, server, [prediction("a", "b")], "safety")
    server.fault = lambda number, handler: send(handler, 404, {"error": {"message": "no model m2"}}) or True
    with pytest.raises(UserError, match=r"m2 is no judge: it answers 404: .*no model m2"):
        judged(write_jsonl, server, [safety("a", "twin")], "safety", judge_model="m2")
    assert not Path("out").exists()
