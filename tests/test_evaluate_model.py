"""The evaluation tool: replies scored as by hand, figures from predictions alone, and its errors."""

import json

import evaluate_model
import pytest
from evaluate_model import main

from errors import UserError


def dialogue(question: str, answer: str, **extras) -> dict:
    return extras | {"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]}


def predictions(tmp_path, *records: dict):
    path = tmp_path / "predictions.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def prediction(reply: str, reference: str, ended: bool = True, **extras) -> dict:
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": reference}]
    return {"messages": messages, "reply": reply, "ended": ended} | extras


def metrics(folder) -> dict:
    return json.loads((folder / "metrics.json").read_text(encoding="utf-8"))["metrics"]


def test_figures_of_predictions(tmp_path, capsys):
    path = predictions(
        tmp_path,
        prediction("高血压少吃盐", "高血压要少吃盐", aspect="diet", names=["高血压", "血压高"]),
        prediction("多喝水", "多喝水", ended=False, aspect="advice", names=["感冒"]),
        prediction("", "休息", aspect="advice"),
    )
    main(["--predictions", str(path), "--output_dir", str(tmp_path / "out")])
    found = metrics(tmp_path / "out")
    assert list(found) == ["all", "advice", "diet"]
    assert found["all"]["n"] == 3
    assert found["all"]["rouge_l"] == pytest.approx((12 / 13 + 1 + 0) / 3, abs=1e-4)
    assert found["all"]["named"] == 0.5
    assert found["all"]["ended"] == pytest.approx(2 / 3, abs=1e-4)
    assert found["advice"]["rouge_l"] == 0.5
    assert found["all"]["length"] == 3.0
    assert "rouge_l" in capsys.readouterr().out
    # What it wrote gives the same figures again.
    again = ["--predictions", str(tmp_path / "out/predictions.jsonl"), "--output_dir", str(tmp_path / "again")]
    main(again)
    assert metrics(tmp_path / "again") == found


def test_a_model_is_asked_and_its_replies_are_kept_beside_the_references(tmp_path, write_jsonl, tiny_model_dir):
    records = [
        dialogue(f"第{n}个人头疼怎么办？", "多喝水。", id=f"zh:{n}", aspect="advice", names=["头疼"]) for n in range(5)
    ]
    test_file = write_jsonl("test.jsonl", records)
    out = tmp_path / "out"
    flags = ["--base_model", str(tiny_model_dir), "--test_file", str(test_file), "--num_samples", "3"]
    main([*flags, "--max_new_tokens", "4", "--output_dir", str(out)])
    assert {path.name for path in out.iterdir()} == {".made_by_a_tool", "metrics.json", "predictions.jsonl"}
    made = [json.loads(line) for line in (out / "predictions.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(made) == metrics(out)["all"]["n"] == 3
    for record in made:
        asked = next(r for r in records if r["id"] == record["id"])
        assert record["messages"][0]["content"] == asked["conversations"][0]["value"]
        assert record["messages"][1]["content"] == "多喝水。"
        assert record.keys() == {"id", "aspect", "names", "messages", "reply", "ended", "scores"}
    with pytest.raises(UserError, match=r"--output_dir .*: is not empty; .*--overwrite"):
        main([*flags, "--output_dir", str(out)])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "--base_model and --predictions: give one of them"),
        (["--base_model", "m", "--predictions", "p"], "--base_model and --predictions: give one of them"),
        (["--base_model", "m"], "--test_file is missing"),
        (["--base_model", "m", "--test_file", "t", "--num_samples", "0"], "--num_samples 0: give at least 1"),
        (["--predictions", "nowhere.jsonl"], "--predictions nowhere.jsonl: no such file"),
        (["--base_model", "m", "--test_file", "nowhere"], "--test_file nowhere: no such file or folder"),
    ],
)
def test_user_errors(flags, message):
    with pytest.raises(UserError, match=message):
        main(flags)


def test_a_file_that_is_none_of_predictions(tmp_path):
    path = predictions(tmp_path, prediction("a", "b"), {"question": "q"})
    with pytest.raises(UserError, match=r"predictions\.jsonl:2: no record of predictions\.jsonl"):
        main(["--predictions", str(path), "--output_dir", str(tmp_path / "out")])


def test_a_failure_of_inference_ends_it_with_its_code(tmp_path, write_jsonl):
    test_file = write_jsonl("test.jsonl", [dialogue("q", "a")])
    with pytest.raises(SystemExit) as ended:
        main(["--base_model", str(tmp_path), "--test_file", str(test_file), "--output_dir", str(tmp_path / "out")])
    assert ended.value.code == 2
    assert not (tmp_path / "out").exists()


def test_help_starts_without_torch():
    assert "torch" not in vars(evaluate_model)
