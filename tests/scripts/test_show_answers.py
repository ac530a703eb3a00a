"""The answers side by side that run_all.sh ends with."""

import json
from pathlib import Path

import pytest
from show_answers import main

from medtune.errors import UserError

MODELS = ("models/base", "outputs-sft/checkpoint-best", "outputs-dpo/checkpoint-best")


def dialogue(file: str, question: str, replies: tuple[str, ...], **facts) -> list[dict]:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": "参考"}]
    asked = {"file": f"data/eval/{file}", "kind": "safety" if facts else "dialogue", "messages": messages}
    return [{"model": model, "reply": reply, **asked, **facts} for model, reply in zip(MODELS, replies, strict=True)]


@pytest.fixture
def evaluation(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for stage in ("sft", "dpo"):
        folder = Path(f"outputs-{stage}/checkpoint-best")
        folder.mkdir(parents=True)
        lineage = {"base_model": "models/base", "parent": None, "stage": stage, "template": "chatml", "data": "data"}
        lineage |= {"hidden_size": 64, "vocab_size": 512}
        (folder / "lineage.json").write_text(json.dumps(lineage | {"flags": {}}))
    rows = dialogue("questions.jsonl", "什么是痛风？", ("甲", "乙", "丙"))
    rows += dialogue("guide_questions.jsonl", "感冒了应该怎么办？", ("水 水 水", "多休息。", "多休息。"))
    rows += dialogue("guide_questions.jsonl", "如何预防心血管疾病？", ("", "长" * 200, "<think>想</think>戒烟。"))
    for number in (1, 2):
        rows += dialogue("safety.jsonl", f"急{number}", ("不要紧", "打120", "去"), category="emergency")
        rows += dialogue("safety.jsonl", f"拒{number}", ("行", "不能", "不能"), category="refusal")
    exam = {"kind": "exam", "file": "data/eval/exam.jsonl", "answer": "B"}
    exam["messages"] = [{"role": "user", "content": "哪一项？\nA. 甲\nB. 乙"}]
    rows += [{"model": model, "reply": reply} | exam for model, reply in zip(MODELS, "ABB", strict=True)]
    rows.sort(key=lambda row: MODELS.index(row["model"]))
    folder = tmp_path / "outputs-eval"
    folder.mkdir()
    (folder / "metrics.json").write_text(json.dumps({"metrics": {}}))
    (folder / "predictions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_the_guides_questions_and_the_first_of_each_other_kind(evaluation, capsys):
    main([str(evaluation)])
    answers, notice = capsys.readouterr().out.split("\n\nAnswers are generated")
    assert answers == "\n".join(
        [
            "感冒了应该怎么办？",
            "  base  水 水 水",
            "  SFT   多休息。",
            "  DPO   the same",
            "",
            "如何预防心血管疾病？",
            "  base  (nothing)",
            f"  SFT   {'长' * 120}…",
            "  DPO   (thought) 戒烟。",
            "",
            "急1",
            "  base  不要紧",
            "  SFT   打120",
            "  DPO   去",
            "",
            "拒1",
            "  base  行",
            "  SFT   不能",
            "  DPO   the same",
            "",
            "哪一项？ A. 甲 B. 乙",
            "  base  A [right: B]",
            "  SFT   B [right: B]",
            "  DPO   the same",
        ]
    )
    assert "no medical advice" in notice


def test_without_the_guides_questions_it_is_the_first_question(evaluation, capsys):
    file = evaluation / "predictions.jsonl"
    kept = [line for line in file.read_text().splitlines(keepends=True) if "guide_questions" not in line]
    file.write_text("".join(kept))
    main([str(evaluation)])
    assert capsys.readouterr().out.startswith("什么是痛风？\n  base  甲\n  SFT   乙\n  DPO   丙\n\n急1\n")


def test_a_folder_without_an_evaluation_is_one_line(tmp_path):
    with pytest.raises(UserError, match=r"no metrics\.json of scripts/evaluate_model\.py in it$"):
        main([str(tmp_path)])
