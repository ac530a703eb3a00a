"""Rejected replies have the failure they are named by, lengths tell nothing, and the stages read the pairs."""

import json
import random
import statistics
from collections import Counter
from pathlib import Path

import generate_preference_data
import pytest
from generate_preference_data import main
from judge_server import running_judge

from medtune.errors import UserError
from medtune.models.loading import load_tokenizer
from medtune.reading.drawn_prompts import draw_prompts
from medtune.reading.readers import load_records, read_dialogues, read_pairs
from medtune.reading.records import Pair
from medtune.sample_data.spoilt_replies import FAILURES, VAGUE, group_answers, likeness, reject_another_answer


@pytest.fixture(autouse=True)
def _in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


ORGANS = "心肝脾肺肾胃肠胆脑眼耳鼻喉牙骨"
ADVICE = [
    "少吃盐和油", "按时吃药", "每天散步半小时", "定期到医院复查", "不要熬夜", "戒烟限酒", "多吃蔬菜", "保持心情舒畅",
    "用温水泡脚", "避免提重物", "枕头不要太高", "记录每次发作", "饭后不要马上躺下", "外出带好急救药", "天冷及时添衣",
    "勤洗手常通风", "少看手机", "学会深呼吸", "控制体重", "忌生冷",
]  # fmt: skip


def dialogues(n: int, seed: int = 0) -> list[dict]:
    """Questions on different organs, with answers of 25 to 60 characters."""
    rng = random.Random(seed)
    made = []
    for number in range(n):
        organ = "".join(rng.sample(ORGANS, 3))
        answer = f"{organ}不好的人要注意：" + "，".join(rng.sample(ADVICE, rng.randint(2, 8))) + f"，{organ}才会好。"
        made.append({"question": f"{organ}不好怎么办（{number}）？", "answer": answer})
    return made


def write(records: list[dict], name: str = "sft.jsonl") -> str:
    text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    Path(name).write_text(text, encoding="utf-8")
    return name


def generate(records: list[dict], *flags: str) -> list[Pair]:
    """The pairs that are written, as a stage reads them."""
    main(["--sft_data", write(records), "--output_file", "out/pairs.jsonl", *flags])
    assert [file.name for file in Path("out").iterdir()] == ["pairs.jsonl"]
    pairs, report = load_records(read_pairs, [Path("out/pairs.jsonl")])
    assert report.dropped == {}
    return pairs


def failure_of(pair: Pair, answers: set[str]) -> str:
    """The failure, told from the texts alone."""
    if pair.rejected in answers:
        return "another answer"
    if pair.chosen.startswith(pair.rejected):
        return "cut off"
    if any(sentence in pair.rejected for sentences in VAGUE.values() for sentence in sentences):
        return "vague"
    unit = next(
        pair.rejected[:n] for n in range(1, len(pair.rejected)) if pair.rejected.startswith(pair.rejected[:n] * 2)
    )
    assert pair.chosen.startswith(unit)
    return "repeats"


# ---------------------------------------------------------------- without a model


def test_each_failure_is_as_frequent_and_lengths_overlap(capsys):
    records = dialogues(400)
    pairs = generate(records)
    reference = {record["question"]: record["answer"] for record in records}
    assert [(pair.messages[-1]["content"], pair.chosen) for pair in pairs] == list(reference.items())

    counts = Counter(failure_of(pair, set(reference.values())) for pair in pairs)
    assert counts.keys() == FAILURES.keys()
    assert all(95 <= count <= 105 for count in counts.values())
    chosen, rejected = ([len(getattr(pair, side)) for pair in pairs] for side in ("chosen", "rejected"))
    assert 0.42 < statistics.mean(r > c for c, r in zip(chosen, rejected, strict=True)) < 0.58
    assert abs(statistics.median(chosen) - statistics.median(rejected)) < 0.15 * statistics.median(chosen)

    printed = capsys.readouterr().out
    assert "out/pairs.jsonl: 400 pairs" in printed
    assert "the rejected reply is the longer one in " in printed
    assert all(f"{count} {failure}" in printed for failure, count in counts.items())


def test_the_failures_are_what_their_names_say():
    answers = {record["answer"] for record in dialogues(200)}
    own = {record["question"]: record["answer"] for record in dialogues(200)}
    for pair in generate(dialogues(200)):
        failure = failure_of(pair, answers)
        if failure == "another answer":
            assert pair.rejected != own[pair.messages[-1]["content"]]
            assert likeness(pair.rejected, pair.chosen) < 0.8
        elif failure == "cut off":
            assert 3 < len(pair.rejected) < len(pair.chosen)
            assert pair.rejected[-1].isalnum()
            assert pair.chosen[len(pair.rejected)].isalnum()


def test_a_thought_stays_and_the_answer_behind_it_is_spoilt(capsys):
    plain = dialogues(40)
    lead = "<think>\n想一想。\n</think>\n\n"
    without = generate(plain)
    Path("out/pairs.jsonl").unlink()
    pairs = generate([record | {"answer": lead + record["answer"]} for record in plain])
    assert [pair.chosen for pair in pairs] == [lead + pair.chosen for pair in without]
    assert [pair.rejected for pair in pairs] == [lead + pair.rejected for pair in without]
    Path("out/pairs.jsonl").unlink()
    generate([*plain, {"question": "头痛怎么办？", "answer": "<think>\n想一想。\n</think>"}])
    assert "1 dropped, no answer: sft.jsonl:41: its replies are thoughts alone" in capsys.readouterr().out


def test_english_is_answered_in_english():
    records = [
        {"question": f"What about {word}?", "answer": f"{word} is treated with {word[::-1]}, rest and plenty of water."}
        for word in ("gout", "asthma", "anemia", "migraine", "eczema", "measles", "rubella", "scurvy") * 2
    ]
    for pair in generate(records):
        assert pair.rejected.isascii()


def test_the_seed_decides_all_that_is_drawn():
    records = dialogues(60)
    first = generate(records, "--num_samples", "20", "--seed", "1")
    assert generate(records, "--num_samples", "20", "--seed", "1", "--overwrite") == first
    other = generate(records, "--num_samples", "20", "--seed", "2", "--overwrite")
    assert len(first) == len(other) == 20
    assert {pair.chosen for pair in first} != {pair.chosen for pair in other}


def test_every_dialogue_is_as_likely_to_be_drawn_and_their_order_is_kept():
    file = Path(write(dialogues(12)))
    drawn = Counter()
    for seed in range(2000):
        prompts, report = draw_prompts([file], 3, seed)
        lines = [int(prompt.source.split(":")[1]) for prompt in prompts]
        assert lines == sorted(lines)
        assert report.summary() == "kept 12 of 12"
        drawn.update(lines)
    assert all(400 < drawn[line] < 600 for line in range(1, 13))


def test_system_prompt_and_history_up_to_the_longest_reply_are_kept():
    turns = ["头晕怎么办？", "测血压。", "有点高", "少吃盐和油，按时吃药，定期到医院复查血压。", "谢谢", "不客气"]
    record = {"system": "你是医生。", "messages": []}
    record["messages"] = [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(turns)]
    pair, *_ = generate([record, *dialogues(3)])
    assert pair.messages == [{"role": "system", "content": "你是医生。"}, *record["messages"][:3]]
    assert pair.chosen == turns[3]


def test_what_cannot_be_used_is_counted(capsys):
    tool_dialogue = {
        "conversations": [
            {"from": "human", "value": "q"}, {"from": "function_call", "value": '{"name": "f", "arguments": {}}'},
            {"from": "observation", "value": "1"}, {"from": "gpt", "value": "a"},
        ]
    }  # fmt: skip
    pairs = generate([*dialogues(3), tool_dialogue, {"question": "q", "answer": ""}, {"x": 1}])
    assert len(pairs) == 3
    printed = capsys.readouterr().out
    assert "sft.jsonl: kept 3 of 6 (1 uses tools, 1 empty reply, 1 unknown keys)" in printed
    assert "1 dropped, uses tools: sft.jsonl:4: " in printed
    assert "--num_samples 5,000: there are only 3 to draw from" in printed


@pytest.mark.parametrize("answer", ["好。", "是", "Yes.", "12345"])
def test_one_short_reply_still_gives_a_pair(answer):
    (pair,) = generate([{"question": "要紧吗？", "answer": answer}])
    assert pair.rejected != pair.chosen


def test_another_answer_is_of_about_the_wanted_length_and_language():
    prompts, _ = draw_prompts(
        [Path(write([*dialogues(200), {"question": "q", "answer": "Drink water. " * 4}]))], 500, 0
    )
    answers, rng = group_answers(prompts), random.Random(0)
    for length in (30, 45, 60):
        found = [reject_another_answer(prompt, length, answers, rng) for prompt in prompts[:50]]
        assert all(abs(len(answer) - length) < 10 for answer in found)
        assert "Drink" not in "".join(found)
    assert reject_another_answer(prompts[-1], 50, answers, rng) is None


@pytest.mark.parametrize(
    ("text", "other", "expected"), [("abc", "abc", 1), ("abc", "xyz", 0), ("", "", 0), ("abcd", "abxx", 1 / 3)]
)
def test_likeness(text, other, expected):
    assert likeness(text, other) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--sft_data", "nowhere"], "--sft_data nowhere: no such file or folder"),
        (
            ["--sft_data", "bad.jsonl"],
            "--sft_data bad.jsonl: no usable dialogue in it\n1 dropped, unknown keys: bad.json",
        ),
        (["--output_file", "sft.jsonl", "--overwrite"], "--output_file sft.jsonl: is among the files to read"),
        (["--output_file", "old.jsonl"], "--output_file old.jsonl: exists already"),
        (["--output_file", "o.csv"], "--output_file o.csv: one pair a line is written"),
        (["--num_samples", "0"], "--num_samples 0: give a number of at least 1"),
        (["--reward_model", "x"], "--reward_model chooses among the replies of a model"),
        (
            ["--model", "x", "--reward_model", "x", "--num_replies", "1"],
            "--num_replies 1: --reward_model needs several",
        ),
        (["--model", "x", "--temperature", "0"], "--temperature 0: all 4 replies would be the same"),
        (["--model", "./nowhere"], "--model ./nowhere: no such folder"),
    ],
)
def test_a_users_mistake_is_said_and_leaves_everything_as_it_was(flags, message):
    write(dialogues(3))
    write([{"x": 1}], "bad.jsonl")
    write([], "old.jsonl")
    before = {path.name: path.read_bytes() for path in Path().iterdir()}
    with pytest.raises(UserError, match=message):
        main(["--sft_data", "sft.jsonl", "--output_file", "o.jsonl", *flags])
    assert {path.name: path.read_bytes() for path in Path().iterdir()} == before


# ---------------------------------------------------------------- with a model


@pytest.fixture(scope="module")
def reward_models(tiny_model_dir, tmp_path_factory) -> dict[str, str]:
    """A classifier, an adapter with a head, and two without a trained one, all on the tiny model."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    folder = tmp_path_factory.mktemp("rewards")
    torch.manual_seed(0)
    base = AutoModelForSequenceClassification.from_pretrained(tiny_model_dir, num_labels=1, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    base.save_pretrained(folder / "whole")
    tokenizer.save_pretrained(folder / "whole")
    language_model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
    for task_type, model in (("SEQ_CLS", base), ("CAUSAL_LM", language_model)):
        config = LoraConfig(task_type=task_type, r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        get_peft_model(model, config).save_pretrained(folder / task_type)
    return {name: str(folder / name) for name in ("whole", "SEQ_CLS", "CAUSAL_LM")} | {"base": str(tiny_model_dir)}


MODEL_FLAGS = ["--num_samples", "6", "--num_replies", "3", "--max_new_tokens", "12", "--batch_size", "4"]


def test_a_models_replies_are_rejected_for_the_data(tiny_model_dir, capsys):
    records = dialogues(6)
    records[0] |= {"system": "你是医生。", "history": [["q", "a"]]}
    flags = ["--model", str(tiny_model_dir), *MODEL_FLAGS]
    pairs = generate(records, *flags)
    assert [pair.chosen for pair in pairs] == [record["answer"] for record in records]
    assert [len(pair.messages) for pair in pairs] == [4, 1, 1, 1, 1, 1]
    assert all(pair.rejected and pair.margin is None for pair in pairs)
    assert "rejected: 6 the model's" in capsys.readouterr().out
    assert generate(records, *flags, "--overwrite") == pairs


def test_a_run_that_was_killed_goes_on_as_the_uninterrupted_one(tiny_model_dir, monkeypatch, capsys):
    from medtune.models import generation

    flags = ["--model", str(tiny_model_dir), *MODEL_FLAGS, "--batch_size", "1", "--num_samples", "14"]
    flags = ["--sft_data", write([*dialogues(13), {"question": "长" * 2000, "answer": "短"}]), *flags]
    main([*flags, "--output_file", "whole.jsonl"])
    printed = capsys.readouterr().out
    generate_replies, n_calls = generation.generate_replies, 0

    def die_at_the_third(*args, **options):
        nonlocal n_calls
        n_calls += 1
        if n_calls == 3:
            raise KeyboardInterrupt
        return generate_replies(*args, **options)

    monkeypatch.setattr(generation, "generate_replies", die_at_the_third)
    command = [*flags, "--output_file", "out/parts.jsonl"]
    with pytest.raises(KeyboardInterrupt):
        main(command)
    (made,) = Path("out").iterdir()
    with made.open("a") as file:
        file.write('[["Pair", {"messa')
    before = made.read_bytes()
    with pytest.raises(
        UserError, match=r"interrupted had --temperature 0\.8 and not 1\.0: give the same to go on, or de"
    ):
        main([*command, "--temperature", "1.0"])
    data = Path("sft.jsonl").read_bytes()
    Path("sft.jsonl").write_bytes(data.replace("长".encode(), "常".encode()))
    with pytest.raises(UserError, match="interrupted had the drawn records "):
        main(command)
    Path("sft.jsonl").write_bytes(data)
    assert before.startswith(made.read_bytes()), "nothing but the half line is lost"
    capsys.readouterr()
    main(command)
    assert n_calls == 4, "two parts are there already, and the third was the last"
    assert Path("out/parts.jsonl").read_bytes() == Path("whole.jsonl").read_bytes()
    resumed = capsys.readouterr().out
    assert "10 of 14 are made already" in resumed
    assert resumed.splitlines()[-3:] == [line.replace("whole", "out/parts") for line in printed.splitlines()[-3:]]
    assert not made.exists()


def test_of_several_replies_the_one_least_like_the_data_is_rejected(tiny_model_dir, monkeypatch):
    from medtune.models import generation

    asked = []

    def generate_replies(model, tokenizer, prompts, stop_ids, decoding, batch_size):
        asked.append((tokenizer.batch_decode(prompts), decoding, batch_size))
        texts = ["", "多喝水，多休息", "完全不同"] * (len(prompts) // 3)
        return [generation.Reply(text, True, 3) for text in texts]

    monkeypatch.setattr(generation, "generate_replies", generate_replies)
    records = [{"question": "甲", "answer": "多喝水，多睡觉"}, {"question": "乙", "answer": "完全不同"}]
    pairs = generate(records, "--model", str(tiny_model_dir), *MODEL_FLAGS)
    assert [pair.rejected for pair in pairs] == ["完全不同", "多喝水，多休息"]
    ((prompts, decoding, batch_size),) = asked
    assert prompts[0].endswith("<|im_start|>user\n甲<|im_end|>\n<|im_start|>assistant\n")
    assert [prompt.count("乙") for prompt in prompts] == [0, 0, 0, 1, 1, 1]
    assert (decoding.max_new_tokens, decoding.temperature, decoding.top_p, batch_size) == (12, 0.8, 0.95, 4)


@pytest.mark.parametrize("thought", ["", "<think>\n想。\n</think>\n\n"])
def test_a_models_answers_are_compared_without_their_thoughts(tiny_model_dir, monkeypatch, thought):
    """And keep them where the reply in the data has one."""
    from medtune.models import generation

    texts = [
        "<think>\n多喝水\n</think>\n\n完全不同",
        "<think>\n完全不同\n</think>\n\n多喝水",
        "<think>\n完全不",
    ]
    monkeypatch.setattr(
        generation, "generate_replies", lambda *args, **_: [generation.Reply(text, True, 3) for text in texts]
    )
    records = [{"question": "甲", "answer": thought + "多喝水，多睡觉"}]
    (pair,) = generate(records, "--model", str(tiny_model_dir), *MODEL_FLAGS)
    assert pair.rejected == (texts[0] if thought else "完全不同")


@pytest.mark.parametrize("name", ["whole", "SEQ_CLS"])
def test_a_reward_model_chooses_the_best_over_the_worst(tiny_model_dir, reward_models, name, monkeypatch):
    import torch
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from medtune.models import generation

    texts = ["多喝水。", "看医生，查血压，按时吃药。", "不知道", "休息"]

    def generate_replies(model, tokenizer, prompts, stop_ids, decoding, batch_size):
        return [generation.Reply(text, text != "不知道", 3) for text in texts * (len(prompts) // 4)]

    monkeypatch.setattr(generation, "generate_replies", generate_replies)
    flags = ["--model", str(tiny_model_dir), "--reward_model", reward_models[name], "--num_replies", "4"]
    (pair,) = generate([{"question": "头晕怎么办？", "answer": "没关系"}], *flags)

    path = tiny_model_dir if name == "SEQ_CLS" else reward_models[name]
    model = AutoModelForSequenceClassification.from_pretrained(path, num_labels=1, dtype=torch.float32).eval()
    model = PeftModel.from_pretrained(model, reward_models[name]).eval() if name == "SEQ_CLS" else model
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    messages = [{"role": "user", "content": "头晕怎么办？"}]
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    read = {text: f"{prompt}{text}<|im_end|>" for text in texts} | {"不知道": f"{prompt}不知道"}  # which was cut
    score = {text: model(**tokenizer(read[text], return_tensors="pt")).logits.item() for text in texts}
    assert pair.chosen == max((text for text in texts if text != "不知道"), key=score.get)
    assert pair.rejected == min(texts, key=score.get)
    assert pair.margin == pytest.approx(score[pair.chosen] - score[pair.rejected], abs=2e-4)


def test_a_cut_reply_is_judged_as_cut(tiny_model_dir, reward_models, monkeypatch):
    """By a judge that likes an end token: a reply without one loses, though its words are as good."""

    from medtune.models import chat_models, generation

    end_id = load_tokenizer(str(tiny_model_dir)).convert_tokens_to_ids("<|im_end|>")

    def likes_ends(reward_model, rows: list[list[int]], batch_size: int = 8) -> list[float]:
        return [float(row[-1] == end_id) for row in rows]

    monkeypatch.setattr(chat_models.RewardModel, "score", likes_ends)
    given = [("好", True), ("坏", False), ("好", False)]
    monkeypatch.setattr(generation, "generate_replies", lambda *args, **_: [generation.Reply(*r, 1) for r in given])
    flags = ["--model", str(tiny_model_dir), "--reward_model", reward_models["whole"], "--num_replies", "3"]
    (pair,) = generate(dialogues(1), *flags)
    assert (pair.chosen, pair.rejected, pair.margin) == ("好", "坏", 1.0)


def test_replies_that_cannot_be_ranked_are_counted(tiny_model_dir, reward_models, monkeypatch, capsys):
    from medtune.models import generation

    given = iter([[("a", True), ("a", True)], [("b", False), ("c", False)], [("d", True), ("e", True)]])
    monkeypatch.setattr(
        generation,
        "generate_replies",
        lambda *args, **_: [generation.Reply(*r, 1) for _ in range(3) for r in next(given)],
    )
    flags = ["--model", str(tiny_model_dir), "--reward_model", reward_models["whole"], "--num_replies", "2"]
    assert len(generate(dialogues(3), *flags)) == 1
    printed = capsys.readouterr().out
    assert "1 dropped, nothing to reject: sft.jsonl:1: the replies are the same" in printed
    assert "1 dropped, no whole reply: sft.jsonl:2: every reply was cut; raise --max_new_tokens" in printed


def test_a_place_where_nothing_can_be_written_is_refused_before_weights_load(tiny_model_dir, monkeypatch):
    monkeypatch.setattr(generate_preference_data, "Sampler", lambda *args: pytest.fail("weights were loaded"))
    with pytest.raises(UserError, match=r"^--output_file /proc/x\.jsonl: cannot be written "):
        main(["--sft_data", write(dialogues(3)), "--output_file", "/proc/x.jsonl", "--model", str(tiny_model_dir)])


def test_prompts_that_do_not_fit_are_counted(tiny_model_dir, capsys):
    fault = {"system": "<|im_end|>", "question": "q", "answer": "a"}
    records = [*dialogues(2), {"question": "长" * 3000, "answer": "a"}, fault]
    assert len(generate(records, "--model", str(tiny_model_dir), *MODEL_FLAGS)) == 2
    printed = capsys.readouterr().out
    assert "1 dropped, prompt too long: sft.jsonl:3: " in printed
    assert "1 dropped, control token: sft.jsonl:4: " in printed


@pytest.mark.parametrize(
    ("model", "reward_model", "message"),
    [
        ("base", "base", "--reward_model .*: no reward model: it has no score head"),
        ("base", "CAUSAL_LM", "--reward_model .*: no reward model: a CAUSAL_LM adapter has no score head"),
        ("SEQ_CLS", None, "--model .*: a reward model, which scores replies and writes none"),
        ("whole", None, "--model .*: a reward model, which scores replies and writes none"),
    ],
)
def test_models_of_the_wrong_kind_are_refused(reward_models, model, reward_model, message):
    flags = ["--model", reward_models[model]]
    flags += ["--reward_model", reward_models[reward_model]] if reward_model else []
    with pytest.raises(UserError, match=message):
        generate(dialogues(3), *flags, *MODEL_FLAGS)
    assert not Path("out/pairs.jsonl").exists()


# ---------------------------------------------------------------- the best of several


OPTIONS = {"A": "感冒", "B": "痛风", "C": "肺炎", "D": "骨折"}
EXAMS = [{"question": f"第{n}题，是哪种病？", "option": OPTIONS, "answer": "ABCD"[n]} for n in range(3)]


def best_dialogues(records: list[dict], *flags: str) -> list[list[dict]]:
    """The messages of the dialogues that are written, as SFT reads them."""
    main(["--format", "sft", "--sft_data", write(records), "--output_file", "out/best.jsonl", *flags])
    dialogues, report = load_records(read_dialogues, [Path("out/best.jsonl")])
    assert report.dropped == {}
    return [dialogue.messages for dialogue in dialogues]


def reply_with(monkeypatch, *groups: list[tuple[str, bool]]) -> None:
    """Generation gives these replies, text and whether it has ended, to the prompts in their order."""
    from medtune.models import generation

    texts = iter(reply for group in groups for reply in group)
    monkeypatch.setattr(
        generation,
        "generate_replies",
        lambda model, tok, rows, *_, **__: [generation.Reply(*next(texts), 3) for _ in rows],
    )


def test_of_an_exams_replies_one_with_the_right_letter_is_kept_and_the_rest_counted(
    tiny_model_dir, monkeypatch, capsys
):
    right, wrong = "想。\n<answer>{}</answer>", "想。\n<answer>D</answer>"
    reply_with(
        monkeypatch,
        [(wrong, True), (right.format("A"), False), ("<think>甲</think>" + right.format("A"), True)],
        [(wrong, True), ("答案是B", True), (right.format("B") + "？", True)],
        [(right.format("C"), False), ("", True), ("想", False)],
        [("多休息。", True)] * 3,
    )
    records = [*EXAMS, *dialogues(1)]
    (messages,) = best_dialogues(records, "--model", str(tiny_model_dir), *MODEL_FLAGS)
    assert messages[-1]["content"] == "<think>甲</think>想。\n<answer>A</answer>"
    assert messages[0]["content"].startswith("第0题，是哪种病？\nA. 感冒\n")
    assert "<answer>X</answer>" in messages[0]["content"]
    printed = capsys.readouterr().out
    assert "out/best.jsonl: 1 dialogues of 4 prompts, each with the best of the model's replies" in printed
    assert "1 dropped, no right letter: sft.jsonl:2" in printed
    assert "1 dropped, no whole reply: sft.jsonl:3" in printed
    assert "1 dropped, nothing to choose by: sft.jsonl:4: it is no exam question" in printed


def test_the_best_reply_by_a_reward_model(tiny_model_dir, reward_models, monkeypatch):
    """The same replies as for pairs: the best is the one that is chosen there."""
    texts = [("多喝水。", True), ("看医生，查血压，按时吃药。", True), ("不知道", False)]
    record = {"system": "你是医生。", "question": "头晕怎么办？", "answer": "没关系"}
    flags = ["--model", str(tiny_model_dir), "--reward_model", reward_models["whole"], "--num_replies", "3"]
    reply_with(monkeypatch, texts)
    (pair,) = generate([record], *flags)
    reply_with(monkeypatch, texts)
    (messages,) = best_dialogues([record], *flags)
    assert messages == [*pair.messages, {"role": "assistant", "content": pair.chosen}]


@pytest.fixture
def judge():
    with running_judge() as server:
        yield server


def test_a_judge_chooses_by_our_rubric_or_the_records(tiny_model_dir, monkeypatch, judge, capsys):
    flags = ["--model", str(tiny_model_dir), "--num_replies", "3", "--judge", "--judge_model", "m"]
    flags += ["--judge_url", judge.url]
    judge.verdict = lambda reply, criterion: len(criterion) % len(reply) == 0
    texts = [("多喝水", True), ("甲", True), ("睡觉", True)]
    reply_with(monkeypatch, texts)
    (pair,) = generate([{"question": "头晕怎么办？", "answer": "没关系"}], *flags)
    assert pair.chosen != pair.rejected
    assert pair.margin > 0

    judge.verdict = lambda reply, criterion: criterion in reply
    rubrics = [{"criterion": "水", "points": 3}, {"criterion": "觉", "points": 5}, {"criterion": "睡", "points": -4}]
    reply_with(monkeypatch, texts)
    record = {"prompt": [{"role": "user", "content": "头晕怎么办？"}], "rubrics": rubrics}
    (messages,) = best_dialogues([record], *flags)
    assert messages[-1]["content"] == "多喝水"
    assert "judge: 3 requests and 1 answers from the cache: 300 tokens read" in capsys.readouterr().out.splitlines()[-1]


@pytest.mark.parametrize("form", ["pairs", "sft"])
def test_a_judge_is_not_paid_for_replies_that_cannot_be_chosen(tiny_model_dir, monkeypatch, judge, capsys, form):
    right, wrong = "想。\n<answer>A</answer>", "想。\n<answer>D</answer>"
    reply_with(
        monkeypatch,
        [(wrong, True), (right, True), ("甲" + right, False)],
        [("甲", False), ("乙", False), ("丙", False)],
    )
    flags = ["--model", str(tiny_model_dir), "--num_replies", "3", "--judge", "--judge_model", "m"]
    flags += ["--judge_url", judge.url, "--output_file", "o.jsonl", "--format", form]
    judge.verdict = lambda reply, criterion: "A" in reply
    first = EXAMS[0] if form == "sft" else dialogues(1)[0]
    main(["--sft_data", write([first, *dialogues(1, seed=1)]), *flags])
    # The one that is made to try the judge out is not among them.
    assert len(judge.bodies) - 1 == (1 if form == "sft" else 3)
    assert "1 dropped, no whole reply: sft.jsonl:2" in capsys.readouterr().out


def test_what_gave_nothing_is_done_anew_with_other_flags(tiny_model_dir, monkeypatch):
    """As the message asks for: raise --max_new_tokens."""
    flags = ["--model", str(tiny_model_dir), *MODEL_FLAGS, "--max_new_tokens"]
    reply_with(monkeypatch, *[[("<answer>A</answer>", False)] * 3] * 2)
    with pytest.raises(UserError, match="no reply could be chosen:\n2 dropped, no whole reply"):
        best_dialogues(EXAMS[:2], *flags, "4")
    reply_with(monkeypatch, *[[("<answer>A</answer>", True)] * 3] * 2)
    assert len(best_dialogues(EXAMS[:2], *flags, "5")) == 1


def test_a_judges_permission_is_true_or_false(capsys):
    with pytest.raises(SystemExit):
        main(["--sft_data", "x", "--output_file", "o.jsonl", "--judge_sends_data", "yes"])
    assert capsys.readouterr().err.endswith("argument --judge_sends_data: 'yes' is neither True nor False\n")


def test_a_budget_that_ends_keeps_what_was_judged_and_says_what_is_missing(tiny_model_dir, monkeypatch, judge, capsys):
    reply_with(monkeypatch, *[[(f"多喝水{n}", True), ("请打120", True), ("睡", True)] for n in range(6)])
    judge.usage = {"prompt_tokens": 1000, "completion_tokens": 10, "total_tokens": 1010}
    flags = ["--model", str(tiny_model_dir), *MODEL_FLAGS, "--batch_size", "1", "--judge", "--judge_url", judge.url]
    flags += ["--judge_model", "m", "--judge_max_tokens", "10000"]
    with pytest.raises(UserError, match=r"o\.jsonl is incomplete: the budget of --judge_max_tokens is used up"):
        main(["--format", "sft", "--sft_data", write(dialogues(6)), "--output_file", "o.jsonl", *flags])
    n_kept = len(Path("o.jsonl").read_text(encoding="utf-8").splitlines())
    assert 1 <= n_kept < 6
    assert f"{6 - n_kept} dropped, not judged: " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--format", "sft"], "--format sft chooses among the replies of a model: name that with --model"),
        (["--judge"], "--judge chooses among the replies of a model"),
        (["--model", "x", "--judge", "--reward_model", "x"], "--reward_model and --judge both score the replies"),
        (["--model", "x", "--judge"], "--judge_url is missing, which --judge needs"),
        (["--model", "x", "--judge_model", "m"], "--judge_model m: nothing is judged"),
        (["--model", "x", "--format", "sft", "--num_replies", "1"], "--num_replies 1: --format sft needs several"),
        (["--model", "x", "--format", "sft"], "--format sft: there is no exam question, .* --reward_model or --judge"),
    ],
)
def test_a_mistake_about_the_best_is_said_before_weights_load(flags, message):
    with pytest.raises(UserError, match=message):
        main(["--sft_data", write(dialogues(3)), "--output_file", "o.jsonl", *flags])
    assert not Path("o.jsonl").exists()
