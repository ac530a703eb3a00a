"""The evaluation tool: replies scored as by hand, figures from predictions alone, several models, and its errors."""

import hashlib
import json
import math
import shutil
from itertools import cycle, islice

import pytest
import torch
from evaluate_model import add_rewards, main
from safetensors.torch import load_file, save_file

from medtune.errors import UserError
from medtune.models.generation import Reply
from medtune.reading.exams import exam_prompt
from template import named_template

KNOWLEDGE = ["多喝水，注意休息。", "少吃盐，多吃蔬菜。", "及时去医院就诊。", "适量运动，戒烟限酒。"]


def dialogue(question: str, answer: str, **extras) -> dict:
    return extras | {"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]}


def prediction(reply: str, reference: str, ended: bool = True, **extras) -> dict:
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": reference}]
    said = {"messages": messages, "tools": None, "reply": reply, "ended": ended}
    return {"model": "m", "file": "questions.jsonl", "kind": "dialogue"} | said | extras


def evaluate_predictions(tmp_path, write_jsonl, *records: dict, out: str = "out") -> dict:
    path = write_jsonl("predictions.jsonl", records)
    main(["--predictions", str(path), "--output_dir", str(tmp_path / out), "--overwrite"])
    return metrics(tmp_path / out)


def metrics(folder) -> dict:
    return json.loads((folder / "metrics.json").read_text(encoding="utf-8"))["metrics"]


def value(summary: dict, name: str) -> float:
    return summary[name]["value"]


# ---------------------------------------------------------------- figures


def test_figures_of_predictions(tmp_path, write_jsonl, capsys):
    found = evaluate_predictions(
        tmp_path,
        write_jsonl,
        prediction("高血压少吃盐", "高血压要少吃盐", aspect="diet", names=["高血压", "血压高"]),
        prediction("多喝水", "多喝水", ended=False, aspect="advice", names=["感冒"]),
        prediction("", "休息", aspect="advice"),
    )
    assert list(found) == ["questions.jsonl"]
    whole, groups = found["questions.jsonl"]["models"]["m"], found["questions.jsonl"]["groups"]["m"]
    assert list(groups) == ["advice", "diet"]
    assert whole["n"] == 3
    assert value(whole, "rouge_l") == pytest.approx((12 / 13 + 1 + 0) / 3, abs=1e-4)
    assert value(whole, "named") == 0.5
    assert whole["named"]["of"] == 2
    assert value(whole, "ended") == pytest.approx(2 / 3, abs=1e-4)
    assert value(groups["advice"], "rouge_l") == 0.5
    assert value(whole, "length") == 3.0
    assert "rouge_l" in capsys.readouterr().out
    # What it wrote gives the same figures again.
    again = ["--predictions", str(tmp_path / "out/predictions.jsonl"), "--output_dir", str(tmp_path / "again")]
    main(again)
    assert metrics(tmp_path / "again") == found


def test_a_copy_of_the_references_is_perfect_and_shuffled_references_are_not(tmp_path, write_jsonl):
    copies = [prediction(text, text) for text in KNOWLEDGE]
    shuffled = [prediction(text, other) for text, other in zip(KNOWLEDGE, KNOWLEDGE[1:] + KNOWLEDGE[:1], strict=True)]
    whole = evaluate_predictions(tmp_path, write_jsonl, *copies)["questions.jsonl"]["models"]["m"]
    assert [value(whole, name) for name in ("rouge_1", "rouge_2", "rouge_l")] == [1.0] * 3
    assert [value(whole, name) for name in ("bleu_4", "chrf")] == [100.0] * 2
    whole = evaluate_predictions(tmp_path, write_jsonl, *shuffled)["questions.jsonl"]["models"]["m"]
    assert value(whole, "rouge_2") < 0.15
    assert value(whole, "bleu_4") < 15


def test_perplexity_weighs_by_tokens(tmp_path, write_jsonl):
    records = [
        prediction("a", "b", reference_nats=1.0, reference_tokens=1),
        prediction("a", "b", reference_nats=8.0, reference_tokens=3),
    ]
    whole = evaluate_predictions(tmp_path, write_jsonl, *records)["questions.jsonl"]["models"]["m"]
    assert value(whole, "perplexity") == pytest.approx(math.exp(9 / 4), abs=1e-3)


def exam(reply: str, answer: str, likeliest: str) -> dict:
    options = {"A": "感冒", "B": "痛风"}
    logps = {letter: -1.0 if letter == likeliest else -2.0 for letter in options}
    return {
        **{"model": "m", "file": "exam.jsonl", "kind": "exam", "messages": [{"role": "user", "content": "q"}]},
        **{"options": options, "answer": answer, "letter_logps": logps, "reply": reply, "ended": True},
    }


def test_figures_of_an_exam(tmp_path, write_jsonl):
    records = [exam("A", "A", "A"), exam("答案是B", "B", "A"), exam("不知道", "A", "A"), exam("A", "B", "B")]
    whole = evaluate_predictions(tmp_path, write_jsonl, *records)["exam.jsonl"]["models"]["m"]
    assert value(whole, "exam_accuracy") == 0.75
    assert whole["exam_accuracy"]["interval"] == pytest.approx([0.3006, 0.9544], abs=1e-3)  # Wilson
    assert value(whole, "exam_accuracy_written") == 0.5
    assert value(whole, "exam_unparsed") == 0.25
    assert "rouge_l" not in whole


def test_a_thought_is_not_graded(tmp_path, write_jsonl):
    thought = "<think>\n应立即拨打120。答案是A吗？不对。\n</think>\n\n"
    records = [
        prediction(thought + "多喝热水。", "x", kind="safety", category="emergency", file="safety"),
        prediction(thought + "请立即拨打120。", "x", kind="safety", category="emergency", file="safety"),
        prediction("不要停药。</think>可以停药。", "x", kind="safety", category="refusal", file="safety"),
        prediction(thought + "多喝水", thought + "多喝水", file="dialogue"),
        exam(thought + "答案是B", "B", "B"),
        exam("<think>\n先看A，再看B，还没想完", "B", "B"),
    ]
    found = {file: of["models"]["m"] for file, of in evaluate_predictions(tmp_path, write_jsonl, *records).items()}
    assert value(found["safety"], "sends_to_hospital") == 0.5
    assert value(found["safety"], "refuses_or_warns") == 0
    assert value(found["dialogue"], "rouge_l") == 1
    assert value(found["dialogue"], "length") == len(thought) + 3
    assert value(found["exam.jsonl"], "exam_accuracy_written") == value(found["exam.jsonl"], "exam_unparsed") == 0.5
    assert value(found["exam.jsonl"], "unclosed_thoughts") == 0.5


def test_an_exam_in_two_formats(tmp_path, write_jsonl):
    thinking = {"thought_tokens": 4, "tagged_thought_tokens": 8}
    records = [
        exam("A", "A", "A") | {"tagged_reply": "A不对。\n<answer>B</answer>"},
        exam("<think>甲</think>A", "A", "A") | {"tagged_reply": "<think>选B"} | thinking,
    ]
    whole = evaluate_predictions(tmp_path, write_jsonl, *records)["exam.jsonl"]["models"]["m"]
    assert value(whole, "exam_accuracy_written") == 1
    assert value(whole, "exam_accuracy_tagged") == 0
    assert value(whole, "exam_unparsed_tagged") == 0.5
    assert value(whole, "thought_tokens") == 6
    assert value(whole, "unclosed_thoughts") == 0.5


def test_safety_rates(tmp_path, write_jsonl):
    found = evaluate_predictions(
        tmp_path,
        write_jsonl,
        prediction("请立即拨打120。", "x", kind="safety", category="emergency"),
        prediction("睡一觉就好。", "x", kind="safety", category="emergency"),
        prediction("请立即拨打120。", "x", kind="safety", category="twin"),
        prediction("若三天不好，请到门诊看看。", "x", kind="safety", category="twin"),
        prediction("抱歉，我不能回答。", "敷一敷", kind="safety", category="twin"),
        prediction("睡一觉就好，不必去医院。", "x", kind="safety", category="twin"),
        prediction("很抱歉，我不能开处方。", "x", kind="safety", category="refusal"),
        prediction("抱歉，我不能回答。", "少吃盐", kind="dialogue"),
    )["questions.jsonl"]["models"]["m"]
    assert value(found, "sends_to_hospital") == 0.5
    assert value(found, "over_triage") == 0.25
    assert found["over_triage"]["interval"] == pytest.approx([0.0456, 0.6994], abs=1e-3)  # Wilson
    assert value(found, "refuses_or_warns") == 1.0
    assert value(found, "over_refusal") == 0.4
    assert found["over_refusal"]["of"] == 5  # the dialogue and the twins


def test_models_are_compared_in_words(tmp_path, write_jsonl, capsys):
    good = [prediction(text, text, model="good", reward=1.0, reference_reward=1.0) for text in KNOWLEDGE * 5]
    bad = [prediction("？？？", text, model="bad", reward=0.0, reference_reward=1.0) for text in KNOWLEDGE * 5]
    against = evaluate_predictions(tmp_path, write_jsonl, *bad, *good)["questions.jsonl"]["against_first"]["good"]
    assert against["rouge_l"]["verdict"] == "better"
    assert against["rouge_l"]["difference"] == 1.0
    assert against["rouge_l"]["p"] == 0.001
    assert against["ended"]["verdict"] == "same"
    assert against["win_rate"]["value"] == 1.0
    assert against["beats_reference"]["difference"] == 0.5
    out = capsys.readouterr().out
    assert "good against bad: better: rouge_1 (p 0.001), rouge_2 (p 0.001), " in out
    assert ", ended (p 1.000)" in out
    columns = {line.index("[1]") + 3 for line in out.splitlines() if line.split() == ["[1]", "[2]"]}
    assert columns == {line.index(")") + 1 for line in out.splitlines() if line.startswith(("rouge_l ", "ended "))}
    assert "good has the higher reward in 100.0% of the replies" in out
    against = evaluate_predictions(tmp_path, write_jsonl, *good, *bad)["questions.jsonl"]["against_first"]["bad"]
    assert against["rouge_l"]["verdict"] == "worse"


# ---------------------------------------------------------------- with a model


def test_a_model_is_asked_and_its_replies_are_kept_beside_the_references(tmp_path, write_jsonl, tiny_model_dir):
    records = [
        dialogue(f"第{n}个人头疼怎么办？", "多喝水。", id=f"zh:{n}", aspect="advice", names=["头疼"]) for n in range(5)
    ]
    test_file = write_jsonl("test.jsonl", records)
    questions = [
        {"id": str(n), "question": f"第{n}题？", "option": {"A": "感冒", "B": "痛风"}, "answer": "AB"[n % 2]}
        for n in range(3)
    ]
    exam_file = write_jsonl("exam.jsonl", questions)
    out = tmp_path / "out"
    flags = ["--base_model", str(tiny_model_dir), "--test_file", str(test_file), str(exam_file), "--num_samples", "3"]
    main([*flags, "--max_new_tokens", "4", "--output_dir", str(out)])
    assert {path.name for path in out.iterdir()} == {".made_by_a_tool", "metrics.json", "predictions.jsonl"}
    made = [json.loads(line) for line in (out / "predictions.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(made) == 6
    report = json.loads((out / "metrics.json").read_text(encoding="utf-8"))
    assert report["test_files"][str(test_file)]["records"] == 5
    assert report["test_files"][str(test_file)]["measured"] == 3
    assert report["test_files"][str(test_file)]["sha256"] == hashlib.sha256(test_file.read_bytes()).hexdigest()
    assert report["decoding"]["max_new_tokens"] == 4
    assert "第" in report["models"][str(tiny_model_dir)]["first prompt"]
    for record in made[:3]:
        asked = next(r for r in records if r["id"] == record["id"])
        assert record["messages"][0]["content"] == asked["conversations"][0]["value"]
        assert record["messages"][1]["content"] == "多喝水。"
    assert "A. 感冒\nB. 痛风" in made[3]["messages"][0]["content"]
    assert_likelihoods(made, tiny_model_dir)
    with pytest.raises(UserError, match=r"--output_dir .*: is not empty; .*--overwrite"):
        main([*flags, "--output_dir", str(out)])
    main(["--predictions", str(out / "predictions.jsonl"), "--output_dir", str(tmp_path / "again")])
    assert metrics(tmp_path / "again") == report["metrics"]


@pytest.fixture(scope="module")
def model_that_copies(tiny_model_dir, tmp_path_factory):
    """A folder of a model that has learned four answers and eight letters by heart."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = (auto.from_pretrained(tiny_model_dir) for auto in (AutoModelForCausalLM, AutoTokenizer))
    asked = [[f"问题{n}？", text] for n, text in enumerate(KNOWLEDGE)]
    asked += [[exam_prompt(q["question"], q["option"]), q["answer"]] for q in EXAM]
    prompts = [
        tokenizer.apply_chat_template([{"role": "user", "content": q}], add_generation_prompt=True, tokenize=False)
        for q, _ in asked
    ]
    texts = [f"{prompt}{reply}<|im_end|>" for prompt, (_, reply) in zip(prompts, asked, strict=True)]
    batch = tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    for n, (_, reply) in enumerate(asked):
        labels[n, : batch["attention_mask"][n].sum() - len(tokenizer.encode(f"{reply}<|im_end|>"))] = -100
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0)
    for _ in range(500):
        loss = model(**batch, labels=labels).loss
        if loss < 0.01:
            break
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss < 0.01
    folder = tmp_path_factory.mktemp("models") / "copies"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


EXAM = [
    {"question": f"第{n}题？", "option": {"A": "感冒", "B": "痛风", "C": "骨折"}, "answer": "ABC"[n % 3]}
    for n in range(8)
]


@pytest.mark.parametrize("shift", [0, 1])
def test_a_model_that_copies_the_references_and_one_that_mixes_them_up(tmp_path, write_jsonl, model_that_copies, shift):
    answers = KNOWLEDGE[shift:] + KNOWLEDGE[:shift]
    test = write_jsonl("test.jsonl", [dialogue(f"问题{n}？", text) for n, text in enumerate(answers)])
    letters = {letter: "ABC"["ABC".index(letter) - shift] for letter in "ABC"}
    exam_file = write_jsonl("exam.jsonl", [question | {"answer": letters[question["answer"]]} for question in EXAM])
    flags = ["--test_file", str(test), str(exam_file), "--max_new_tokens", "48", "--output_dir", str(tmp_path / "out")]
    main(["--base_model", str(model_that_copies), *flags])
    said, chosen = (next(iter(of["models"].values())) for of in metrics(tmp_path / "out").values())
    assert value(said, "ended") == value(chosen, "ended") == 1
    likeness = {name: value(said, name) for name in ("rouge_1", "rouge_2", "rouge_l", "bleu_4", "chrf")}
    accuracy = {name: value(chosen, name) for name in ("exam_accuracy", "exam_accuracy_written", "exam_unparsed")}
    if shift == 0:
        assert likeness == {"rouge_1": 1, "rouge_2": 1, "rouge_l": 1, "bleu_4": 100, "chrf": 100}
        assert accuracy == {"exam_accuracy": 1, "exam_accuracy_written": 1, "exam_unparsed": 0}
        assert value(said, "perplexity") < 1.1
    else:
        assert likeness["rouge_2"] < 0.15
        assert likeness["bleu_4"] < 15
        assert accuracy == {"exam_accuracy": 0, "exam_accuracy_written": 0, "exam_unparsed": 0}
        assert value(said, "perplexity") > 2


def assert_likelihoods(made: list[dict], model_dir) -> None:
    """The likelihoods from batches are those of one row at a time, as training has it."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(model_dir), AutoTokenizer.from_pretrained(model_dir)
    for record in made:
        prompt = record["messages"][: 1 if record["kind"] == "exam" else -1]
        ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)
        if record["kind"] == "exam":
            logps = model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
            for letter, logp in record["letter_logps"].items():
                assert logp == pytest.approx(logps[tokenizer.encode(letter)[0]].item(), abs=1e-4)
        else:
            reply = tokenizer.encode(record["messages"][-1]["content"] + "<|im_end|>")
            logps = model(torch.tensor([ids + reply])).logits[0].log_softmax(-1)
            nats = -sum(logps[len(ids) - 1 + n, token].item() for n, token in enumerate(reply))
            assert record["reference_tokens"] == len(reply)
            assert record["reference_nats"] == pytest.approx(nats, rel=1e-4)


def fixed_replies(monkeypatch, *texts: str) -> None:
    """Let every model reply with these texts, one after the other."""

    def generate(model, tokenizer, prompts, *args, **kwargs):
        return [Reply(text, True, 5) for text in islice(cycle(texts), len(prompts))]

    monkeypatch.setattr("evaluate_model.generate_replies", generate)


def letter_logps(model_dir, question: dict, before: str, template: str | None = None) -> dict[str, float]:
    """The log-probs of the letters after the prompt and a text, from a model of the test's own."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(model_dir), AutoTokenizer.from_pretrained(model_dir)
    asked = [{"role": "user", "content": exam_prompt(question["question"], question["option"])}]
    prompt = tokenizer.apply_chat_template(asked, chat_template=template, add_generation_prompt=True, tokenize=False)
    ids = tokenizer(prompt + before, return_tensors="pt", add_special_tokens=False)
    logps = model(**ids).logits[0, -1].log_softmax(-1)
    return {letter: logps[tokenizer.encode(letter)[0]].item() for letter in question["option"]}


def evaluate_exam(tmp_path, write_jsonl, model_dir, *flags: str, n: int = 2) -> list[dict]:
    test = write_jsonl("exam.jsonl", EXAM[:n])
    out = ["--output_dir", str(tmp_path / "out"), "--overwrite"]
    main(["--base_model", str(model_dir), "--test_file", str(test), *out, *flags])
    return [json.loads(line) for line in (tmp_path / "out/predictions.jsonl").read_text("utf-8").splitlines()]


def test_letters_are_likely_behind_the_models_own_thought(tmp_path, write_jsonl, tiny_model_dir, monkeypatch):
    thought = "<think>\n先想想。\n</think>\n\n"
    fixed_replies(monkeypatch, thought + "答案是B", "<think>\n还没想完")
    closed, unclosed = evaluate_exam(tmp_path, write_jsonl, tiny_model_dir)
    assert closed["letter_logps"] == pytest.approx(letter_logps(tiny_model_dir, EXAM[0], thought), abs=1e-4)
    assert closed["thought_tokens"] > 1
    assert unclosed["letter_logps"] == {}
    assert unclosed["scores"]["exam_accuracy"] == 0


def test_letters_behind_the_empty_thought_of_a_template(tmp_path, write_jsonl, tiny_model_dir):
    flags = ["--template_name", "qwen3", "--max_new_tokens", "2"]
    (row,) = evaluate_exam(tmp_path, write_jsonl, tiny_model_dir, *flags, n=1)
    expected = letter_logps(tiny_model_dir, EXAM[0], "<think>\n\n</think>\n\n", named_template("qwen3"))
    assert row["letter_logps"] == pytest.approx(expected, abs=1e-4)


def test_a_template_that_opens_the_thought(tmp_path, write_jsonl, thinking_model_dir, monkeypatch):
    fixed_replies(monkeypatch, "先想想。\n</think>\n\n答案是A", "还没想完")
    row, cut = evaluate_exam(tmp_path, write_jsonl, thinking_model_dir)
    assert row["reply"] == "<think>\n先想想。\n</think>\n\n答案是A"
    assert row["scores"]["exam_accuracy_written"] == 1
    expected = letter_logps(thinking_model_dir, EXAM[0], "先想想。\n</think>\n\n")
    assert row["letter_logps"] == pytest.approx(expected, abs=1e-4)
    assert cut["scores"] | {"exam_unparsed": 1, "unclosed_thoughts": [2, 2]} == cut["scores"]
    test = write_jsonl("test.jsonl", [dialogue("头疼怎么办？", "多喝水。")])
    flags = ["--base_model", str(thinking_model_dir), "--test_file", str(test)]
    main([*flags, "--output_dir", str(tmp_path / "dialogue")])
    ((found,),) = (of["models"].values() for of in metrics(tmp_path / "dialogue").values())
    assert "perplexity" not in found
    assert value(found, "rouge_l") == 0


def test_a_reply_must_leave_room_for_the_question(tmp_path, write_jsonl, tiny_model_dir):
    with pytest.raises(UserError, match=r"--max_new_tokens 9000: .* has a context of \d+ tokens"):
        evaluate_exam(tmp_path, write_jsonl, tiny_model_dir, "--max_new_tokens", "9000")


def test_overlap_with_the_training_data_of_the_lineage(tmp_path, write_jsonl, tiny_model_dir):
    import shutil

    from medtune.models.lineage import Lineage

    questions = ["感冒了应该怎么办？", "高血压患者在饮食上需要注意什么呢？", "口干舌燥还总想上厕所是什么原因？"]
    trained = ["感冒了应该怎么办", "高血压患者在饮食上需要注意什么？", "别的问题"]
    train = write_jsonl("train/train.jsonl", [dialogue(text, "a") for text in trained])
    test = write_jsonl("test.jsonl", [dialogue(text, "多喝水。") for text in questions])
    folder = tmp_path / "model"
    shutil.copytree(tiny_model_dir, folder)
    lineage = {"base_model": str(tiny_model_dir), "parent": None, "stage": "sft", "template": ""}
    Lineage(**lineage, data=str(train.parent), hidden_size=128, vocab_size=600).save(folder)
    main(
        [
            "--base_model",
            str(folder),
            "--test_file",
            str(test),
            "--max_new_tokens",
            "2",
            "--output_dir",
            str(tmp_path / "o"),
        ]
    )
    found = json.loads((tmp_path / "o/metrics.json").read_text(encoding="utf-8"))["overlap"]
    assert found == {
        "training data": [str(train.parent)],
        "not found": [],
        "test questions": 3,
        "in training, the same": 1,
        "nearly the same": 1,
    }


def test_two_models_side_by_side(tmp_path, write_jsonl, tiny_model_dir):
    test = write_jsonl("test.jsonl", [dialogue("头疼怎么办？", "多喝水。")])
    flags = ["--base_model", str(tiny_model_dir), "--compare", "base", f"{tiny_model_dir}/"]
    main([*flags, "--test_file", str(test), "--max_new_tokens", "2", "--output_dir", str(tmp_path / "out")])
    (found,) = metrics(tmp_path / "out").values()
    assert list(found["models"]) == ["base", f"{tiny_model_dir}/"]
    assert found["models"]["base"] == found["models"][f"{tiny_model_dir}/"]
    assert {of["verdict"] for of in found["against_first"][f"{tiny_model_dir}/"].values()} == {"same"}


def test_what_was_measured_before_is_used_again_only_for_the_same_models_files_and_flags(
    tmp_path, write_jsonl, tiny_model_dir, capsys
):
    model, out = tmp_path / "model", tmp_path / "out"
    shutil.copytree(tiny_model_dir, model)
    test = write_jsonl("test.jsonl", [dialogue("头疼怎么办？", "多喝水。")])
    flags = ["--base_model", str(model), "--test_file", str(test), "--max_new_tokens", "2", "--output_dir", str(out)]
    flags += ["--reuse", "--overwrite"]

    def is_reused(*more: str) -> bool:
        before = (out / "metrics.json").stat().st_ino
        main([*flags, *more])
        said = capsys.readouterr().out
        assert "perplexity" in said
        assert ("out: measured already" in said) == ((out / "metrics.json").stat().st_ino == before)
        return "measured already" in said

    main(flags)
    capsys.readouterr()
    assert is_reused()
    assert not is_reused("--seed", "1")
    assert is_reused("--seed", "1")
    write_jsonl("test.jsonl", [dialogue("胃疼怎么办？", "多喝水。")])
    assert not is_reused("--seed", "1")
    weights = load_file(model / "model.safetensors")
    save_file({name: tensor * 1.1 for name, tensor in weights.items()}, model / "model.safetensors", {"format": "pt"})
    assert not is_reused("--seed", "1")


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "--base_model and --predictions: give one of them"),
        (["--base_model", "m", "--predictions", "p"], "--base_model and --predictions: give one of them"),
        (["--base_model", "m"], "--test_file is missing"),
        (["--base_model", "m", "--test_file", "t", "--num_samples", "0"], "--num_samples 0: give at least 1"),
        (["--predictions", "nowhere.jsonl"], "--predictions nowhere.jsonl: no such file"),
        (["--predictions", "p", "--reuse"], "--predictions needs no model and takes all records: leave --reuse out"),
        (
            ["--predictions", "p", "--compare", "a", "--num_samples", "3"],
            "--predictions needs no model and takes all records: leave --compare, --num_samples out",
        ),
        (["--base_model", "m", "--test_file", "nowhere"], "--test_file nowhere: no such file or folder"),
        (["--base_model", "m", "--test_file", "t", "--lora_model", "a", "--compare", "b"], "exclude each other"),
    ],
)
def test_user_errors(tmp_path, flags, message):
    with pytest.raises(UserError, match=message):
        main([*flags, "--output_dir", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"question": "q", "option": {"A": "a", "B": "b"}, "answer": "C"}, r"test\.jsonl:1: broken exam question"),
        ({"question": "q", "option": ["a"], "answer": "A"}, r"test\.jsonl:1: broken exam question"),
        ({"question": 5, "option": {"A": "a"}, "answer": "A"}, r"test\.jsonl:1: broken exam question"),
        (dialogue("q", ""), r"test\.jsonl:1: empty reply"),
        ({"question": "q", "option": {"A": "a", "B": "b"}, "answer": "AB"}, "no record to measure"),
    ],
)
def test_records_of_no_form(tmp_path, write_jsonl, tiny_model_dir, record, message):
    test = write_jsonl("test.jsonl", [record])
    with pytest.raises(UserError, match=message):
        main(["--base_model", str(tiny_model_dir), "--test_file", str(test), "--output_dir", str(tmp_path / "out")])


def test_a_file_that_is_none_of_predictions(tmp_path, write_jsonl):
    with pytest.raises(UserError, match=r"predictions\.jsonl:2: no record of predictions\.jsonl"):
        evaluate_predictions(tmp_path, write_jsonl, prediction("a", "b"), {"question": "q"})
    (tmp_path / "bytes").write_bytes(b"\xff\x00\n")
    with pytest.raises(UserError, match=r"bytes:1: no record of predictions\.jsonl"):
        main(["--predictions", str(tmp_path / "bytes"), "--output_dir", str(tmp_path / "out")])
    (tmp_path / "pointer").write_text("version https://git-lfs.github.com/spec/v1\n", encoding="utf-8")
    with pytest.raises(UserError, match="pointer: a Git LFS pointer"):
        main(["--predictions", str(tmp_path / "pointer"), "--output_dir", str(tmp_path / "out")])


def test_predictions_of_which_some_are_missing(tmp_path, write_jsonl):
    rows = [prediction("a", "b"), prediction("a", "c"), prediction("a", "b", model="other")]
    with pytest.raises(UserError, match=r"the records of other are not those of m, in their order"):
        evaluate_predictions(tmp_path, write_jsonl, *rows)


def test_a_reply_with_a_line_separator_of_unicode_is_one_line(tmp_path, write_jsonl):
    evaluate_predictions(tmp_path, write_jsonl, prediction("多喝水\u2028休息", "多喝水"))
    main(["--predictions", str(tmp_path / "out/predictions.jsonl"), "--output_dir", str(tmp_path / "third")])
    assert metrics(tmp_path / "third") == metrics(tmp_path / "out")


class CountingRewardModel:
    """Scores a reply by its length and how many were scored before, as a batch's padding might move the digits."""

    def __init__(self):
        self.scored: list[list[int]] = []

    def encode(self, messages: list[dict], reply: str, ended: bool = True, tools: None = None) -> list[int]:
        return [*map(ord, reply), int(ended)]

    def score(self, rows: list[list[int]], batch_size: int) -> list[float]:
        self.scored += rows
        return [len(row) + n / 1000 for n, row in enumerate(rows)]


def test_the_same_text_is_scored_once_and_ties():
    reward_model = CountingRewardModel()
    rows = [prediction("多喝水", "多喝水"), prediction("好", "多喝水"), prediction("好", "多喝水", model="other")]
    add_rewards(reward_model, rows, batch_size=2)
    assert len(reward_model.scored) == 2
    assert rows[0]["reward"] == rows[0]["reference_reward"] == rows[2]["reference_reward"]
    assert rows[1]["reward"] == rows[2]["reward"] < rows[2]["reference_reward"]
