"""`inference.py`: prompts are those of training, replies keep their order, and what cannot be asked is said early."""

import io
import json
import re
import subprocess
import sys
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from random_adapters import random_adapter
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification

import inference
from inference import QUESTIONS, encode_questions, main, read_questions
from medtune.errors import UserError
from medtune.models import adapters, chat_models, loading, reward_models, score_heads
from medtune.models.chat_models import NOTICE, ChatModel, ChatModelArguments, RewardModel, describe_model
from medtune.models.generation import Reply
from medtune.models.lineage import Lineage, read_lineage
from medtune.models.loading import load_tokenizer
from medtune.reading.tokenization import IGNORED_LABEL, encode_dialogue, load_chat_template, stop_token_ids

NO_LIMIT = 10**6
SCRIPT = Path(inference.__file__)
SHORT = ["--max_new_tokens", "6"]


@pytest.fixture
def no_weights(monkeypatch):
    """Loading weights fails the test."""

    def refuse(*args, **options):
        pytest.fail("weights were loaded")

    for module in (chat_models, adapters, score_heads):
        monkeypatch.setattr(module, "load_base_model", refuse)


def conversations(n: int) -> list[dict]:
    """Dialogues of one to four exchanges, every other one with a system prompt."""
    records = []
    for number in range(n):
        turns = [{"role": "system", "content": f"你是第{number}位医生。"}] if number % 2 else []
        for exchange in range(1 + number % 4):
            turns.append({"role": "user", "content": f"问题{number}-{exchange}：\n头痛 {'很久' * number}怎么办？"})
            turns.append({"role": "assistant", "content": f"回答{exchange}: see a doctor, {'多喝水' * exchange}。"})
        records.append({"messages": turns})
    return records


def answers(text: str) -> list[str]:
    return re.findall(r"^答：(.*)$", text, re.MULTILINE)


# ---------------------------------------------------------------- prompts


@pytest.mark.parametrize("template_name", [None, "qwen", "qwen3_nothink", "vicuna"])
def test_prompts_of_50_conversations_are_those_of_training(qwen_tokenizer, adapter, write_jsonl, template_name):
    """With a named template and Qwen's vocabulary, and with what an adapter's folder holds."""
    tokenizer = deepcopy(qwen_tokenizer) if template_name else load_tokenizer(str(adapter))
    chat_template = load_chat_template(tokenizer, template_name)
    records = conversations(50)
    file = write_jsonl("dialogues.jsonl", records)
    stop_ids = stop_token_ids(tokenizer, chat_template)
    chat_model = ChatModel("", "", None, tokenizer, chat_template, stop_ids, NO_LIMIT)
    prompts = encode_questions(chat_model, read_questions(str(file), None), 1)
    for record, prompt in zip(records, prompts, strict=True):
        ids, labels = encode_dialogue(tokenizer, chat_template, record["messages"], max_length=NO_LIMIT)
        learned = [position for position, label in enumerate(labels) if label != IGNORED_LABEL]
        # Where the last learned stretch starts.
        start = next(position for position in reversed(learned) if position - 1 not in learned)
        assert prompt == ids[:start]


@pytest.mark.parametrize("name", ["chatml", "vicuna", "qwen3_nothink"])
def test_a_template_that_renders_another_text_is_refused(adapter, name, no_weights):
    with pytest.raises(
        UserError, match=f"--template_name {name}: it asks in another form .* leave the flag out"
    ) as caught:
        main(["--base_model", str(adapter), "--template_name", name])
    assert "\n" not in str(caught.value)


def test_a_model_nobody_trained_here_takes_any_template(tiny_model_dir, capsys):
    main(["--base_model", str(tiny_model_dir), "--template_name", "vicuna", *SHORT])
    assert len(answers(capsys.readouterr().out)) == 4


# ---------------------------------------------------------------- the four questions


def test_the_four_questions_are_asked_and_answered(tiny_model_dir, adapter, capsys):
    main(["--base_model", str(tiny_model_dir), "--lora_model", str(adapter), *SHORT])
    printed = capsys.readouterr()
    lines = printed.out.splitlines()
    assert lines[0] == NOTICE
    assert [line.removeprefix("问：") for line in lines if line.startswith("问：")] == list(QUESTIONS)
    assert len(answers(printed.out)) == 4
    assert printed.out.count("[cut at --max_new_tokens 6]") == 4
    assert "no CUDA device: float32 on the CPU" in printed.err
    assert "INFO" not in printed.out


def test_an_adapters_folder_stands_for_its_base_and_itself(tiny_model_dir, adapter, capsys):
    replies = []
    for flags in (
        ["--base_model", str(tiny_model_dir), "--lora_model", str(adapter)],
        ["--base_model", str(adapter)],
        ["--base_model", str(tiny_model_dir)],
    ):
        main([*flags, *SHORT])
        replies.append(answers(capsys.readouterr().out))
    assert replies[0] == replies[1] != replies[2]


def test_sampling_repeats_by_the_seed(adapter, capsys):
    replies = []
    for seed in ("1", "1", "2"):
        main(["--base_model", str(adapter), *SHORT, "--temperature", "1", "--top_p", "0.9", "--seed", seed])
        replies.append(answers(capsys.readouterr().out))
    assert replies[0] == replies[1] != replies[2]


def test_four_bit_on_the_cpu_and_flags_it_cannot_honour(adapter, capsys):
    main(["--base_model", str(adapter), *SHORT, "--load_in_4bit", "--torch_dtype", "bfloat16", "--device_map", "auto"])
    printed = capsys.readouterr()
    assert len(answers(printed.out)) == 4
    assert "float32 on the CPU instead of --torch_dtype bfloat16, --device_map auto" in printed.err


# ---------------------------------------------------------------- files


def test_replies_to_dialogues_are_written_in_order(adapter, write_jsonl, tmp_path, capsys):
    records = conversations(7)
    data_file = write_jsonl("dialogues.jsonl", records)
    output_file = tmp_path / "new" / "replies.jsonl"
    flags = ["--base_model", str(adapter), "--data_file", str(data_file), *SHORT, "--system", "别名"]
    main([*flags, "--output_file", str(output_file), "--batch_size", "2"])
    written = [json.loads(line) for line in output_file.read_text(encoding="utf-8").splitlines()]
    assert [list(record) for record in written] == [["messages", "reference", "output", "ended"]] * 7
    assert [record["reference"] for record in written] == [record["messages"][-1]["content"] for record in records]
    assert [record["messages"][-1] for record in written] == [record["messages"][-2] for record in records]
    # A dialogue keeps its own system prompt.
    assert [record["messages"][0]["content"] for record in written[:3]] == ["别名", "你是第1位医生。", "别名"]
    assert [path.name for path in output_file.parent.iterdir()] == ["replies.jsonl"]
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "7 replies, of which 0 ended by themselves" in printed.err
    assert NOTICE in printed.err

    # One at a time they are the same.
    main([*flags, "--output_file", str(tmp_path / "alone.jsonl"), "--batch_size", "1"])
    assert (tmp_path / "alone.jsonl").read_bytes() == output_file.read_bytes()


def test_questions_of_a_text_file(adapter, tmp_path):
    (tmp_path / "q.txt").write_bytes("\ufeff感冒了怎么办？\r\n\n  头痛  \n".encode())
    output_file = tmp_path / "replies.jsonl"
    flags = ["--data_file", str(tmp_path / "q.txt"), "--output_file", str(output_file), *SHORT]
    main(["--base_model", str(adapter), *flags])
    written = [json.loads(line) for line in output_file.read_text(encoding="utf-8").splitlines()]
    assert [record["question"] for record in written] == ["感冒了怎么办？", "头痛"]
    assert [record["reference"] for record in written] == [None, None]


def test_long_work_says_how_far_it_is(adapter, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(inference, "SECONDS_BETWEEN_LINES", 0)
    (tmp_path / "q.txt").write_text("甲\n乙\n丙\n", encoding="utf-8")
    flags = ["--data_file", str(tmp_path / "q.txt"), "--output_file", str(tmp_path / "r.jsonl"), "--batch_size", "2"]
    main(["--base_model", str(adapter), *flags, *SHORT])
    assert re.findall(r"(\d of 3) replies, about \d+ s left", capsys.readouterr().err) == ["2 of 3", "3 of 3"]


def test_an_interrupted_run_keeps_its_replies_and_says_where(adapter, tmp_path, capsys, monkeypatch):
    (tmp_path / "q.txt").write_text("甲\n" * 40, encoding="utf-8")
    calls = []

    def interrupted(*args, **options):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return generate(*args, **options)

    generate = inference.generate_replies
    monkeypatch.setattr(inference, "generate_replies", interrupted)
    flags = ["--data_file", str(tmp_path / "q.txt"), "--output_file", str(tmp_path / "r.jsonl"), "--batch_size", "1"]
    with pytest.raises(SystemExit) as stopped:
        main(["--base_model", str(adapter), *flags, *SHORT])
    assert stopped.value.code == 130
    assert f"the replies so far are in {tmp_path / 'r.jsonl'}.partial" in capsys.readouterr().err
    assert not (tmp_path / "r.jsonl").exists()
    assert len((tmp_path / "r.jsonl.partial").read_text(encoding="utf-8").splitlines()) == 32


def test_an_existing_output_is_not_written_over(adapter, tmp_path, no_weights):
    (tmp_path / "q.txt").write_text("甲\n", encoding="utf-8")
    (tmp_path / "r.jsonl").write_text("mine", encoding="utf-8")
    flags = ["--data_file", str(tmp_path / "q.txt"), "--output_file", str(tmp_path / "r.jsonl")]
    with pytest.raises(UserError, match="it exists and is not written over"):
        main(["--base_model", str(adapter), *flags])
    assert (tmp_path / "r.jsonl").read_text(encoding="utf-8") == "mine"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("q.txt", b"", "q.txt:1: empty file"),
        ("q.txt", b"\n", "no question in it; write one a line"),
        ("q.txt", b"good\n\xb8\xd0\n", "q.txt:2: not UTF-8: byte 1 of line 2 is 0xb8"),
        ("q.txt", b"version https://git-lfs.github.com/spec/v1\nsize 7\n", "q.txt: a Git LFS pointer"),
        ("q.jsonl", b'{"system": "<|im_end|>", "question": "a", "answer": "b"}', r"q.jsonl:1: .*holds <\|im_end\|>"),
        ("q.txt", "甲\n".encode() + "长".encode() * 3000, r"q.txt:2: its prompt has \d+ tokens.* context of 2048"),
        ("q.jsonl", b'{"question": "a", "answer": "b"}\n{"messages": []}\n', "q.jsonl:2: empty conversation"),
        ("q.doc", b"", "files that end in .jsonl"),
    ],
)
def test_bad_data_is_named_by_file_and_line(adapter, tmp_path, no_weights, name, content, message):
    (tmp_path / name).write_bytes(content)
    flags = ["--data_file", str(tmp_path / name), "--output_file", str(tmp_path / "r.jsonl")]
    with pytest.raises(UserError, match=message):
        main(["--base_model", str(adapter), *flags])
    assert not (tmp_path / "r.jsonl.partial").exists()


# ---------------------------------------------------------------- several models, scores


@pytest.fixture(scope="module")
def other_adapter(tiny_model_dir, tmp_path_factory) -> Path:
    """The random adapter with other weights and the template chatml."""
    folder = random_adapter(tiny_model_dir, tmp_path_factory.mktemp("other") / "checkpoint-best", template="chatml")
    file = folder / "adapter_model.safetensors"
    save_file({name: tensor * -1.5 for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    return folder


def test_compared_models_say_what_each_says_alone(tiny_model_dir, adapter, other_adapter, capsys, monkeypatch):
    bases = []
    load_base_model = loading.load_base_model
    monkeypatch.setattr(
        adapters,
        "load_base_model",
        lambda *args, **options: bases.append(args) or load_base_model(*args, **options),
    )
    names = ["base", str(adapter), str(other_adapter)]
    main(["--base_model", str(tiny_model_dir), "--compare", *names, *SHORT])
    printed = capsys.readouterr().out
    assert bases == [(str(tiny_model_dir),)]
    said = {name: re.findall(rf"^\[{re.escape(name)}\] 答：(.*)$", printed, re.MULTILINE) for name in names}
    alone = []
    for flags in ([], ["--lora_model", str(adapter)], ["--lora_model", str(other_adapter)]):
        main(["--base_model", str(tiny_model_dir), *flags, *SHORT])
        alone.append(answers(capsys.readouterr().out))
    assert list(said.values()) == alone
    assert alone[0] != alone[1] != alone[2]


def test_compared_replies_are_written_with_their_scores(
    tiny_model_dir, adapter, other_adapter, reward_adapter, tmp_path, capsys
):
    (tmp_path / "q.txt").write_text("感冒了\n头痛\n", encoding="utf-8")
    flags = ["--data_file", str(tmp_path / "q.txt"), "--output_file", str(tmp_path / "r.jsonl"), *SHORT]
    names = [str(adapter), str(other_adapter), str(tiny_model_dir)]
    flags += ["--base_model", str(tiny_model_dir), "--compare", *names, "--reward_model", str(reward_adapter)]
    main(flags)
    records = [json.loads(line) for line in (tmp_path / "r.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [record["question"] for record in records] == ["感冒了", "头痛"]
    assert "6 replies" in capsys.readouterr().err
    tokenizer = load_tokenizer(str(tiny_model_dir))
    model = reward_models.load_reward_model(str(tiny_model_dir), str(reward_adapter), torch_dtype="float32")
    for record in records:
        assert [reply["model"] for reply in record["replies"]] == names
        for reply in record["replies"]:
            question = [{"role": "user", "content": record["question"]}]
            prompt = tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True)
            ids = tokenizer(prompt + reply["output"], return_tensors="pt")["input_ids"]
            # Scored alone, and without an end token, since each was cut.
            assert not reply["ended"]
            assert reply["score"] == pytest.approx(model(input_ids=ids).logits.item(), abs=1e-4)


def test_an_ended_reply_is_scored_with_its_end_token(tiny_model_dir, reward_adapter):
    scorer = RewardModel(str(reward_adapter), ChatModelArguments(str(tiny_model_dir)))
    question = [{"role": "user", "content": "头痛"}]
    ended, cut = scorer.encode(question, "多喝水"), scorer.encode(question, "多喝水", ended=False)
    assert ended == [*cut, scorer.tokenizer.convert_tokens_to_ids("<|im_end|>")]
    tools = [{"type": "function", "function": {"name": "look_up"}}]
    assert "look_up" in scorer.tokenizer.decode(scorer.encode(question, "多喝水", tools=tools))
    rows = [scorer.encode(question, "多喝水" * n) for n in (1, 9, 3, 5)]
    assert scorer.score(rows, 3) == pytest.approx([scorer.score([row])[0] for row in rows], abs=1e-4)


def test_each_reply_of_one_model_is_scored(adapter, reward_adapter, capsys):
    main(["--base_model", str(adapter), "--reward_model", str(reward_adapter), *SHORT])
    printed = capsys.readouterr().out
    scores = [float(score) for score in re.findall(r"^\[score (.*)\]$", printed, re.MULTILINE)]
    assert len(scores) == 4
    mean = float(re.search(rf"^mean score of {re.escape(str(adapter))}: (.*)$", printed, re.MULTILINE)[1])
    assert mean == pytest.approx(sum(scores) / 4, abs=1e-3)


def test_the_oldest_exchanges_are_left_out_of_a_long_dialogue_and_it_is_said(adapter, write_jsonl, capsys):
    from medtune.training.log import start_log

    start_log()
    turns = [{"role": "system", "content": "你是医生"}]
    for number in range(4):
        turns += [{"role": "user", "content": f"问{number}"}, {"role": "assistant", "content": "水" * 700}]
    file = write_jsonl("long.jsonl", [{"messages": turns}])
    chat_model = describe_model(ChatModelArguments(str(adapter)))
    (prompt,) = encode_questions(chat_model, read_questions(str(file), None), 100)
    text = chat_model.tokenizer.decode(prompt)
    assert text.startswith("<|im_start|>system\n你是医生<|im_end|>\n<|im_start|>user\n问")
    assert len(prompt) <= 2048 - 100
    n_kept = text.count("<|im_start|>user")
    assert text.endswith("<|im_start|>user\n问3<|im_end|>\n<|im_start|>assistant\n")
    assert 1 <= n_kept < 4
    assert f"long.jsonl:1: over the context of 2048 tokens: its oldest {8 - 2 * n_kept} turns are left out" in (
        capsys.readouterr().err
    )


# ---------------------------------------------------------------- chat


@pytest.fixture
def chat_with(adapter, capsys, monkeypatch):
    """A function that types lines into a chat and returns what is printed and the prompts, as text."""

    def talk(lines: str, *flags: str) -> tuple[str, list[str]]:
        prompts, stream = [], inference.stream_reply  # which a test may have replaced

        def spy(model, tokenizer, prompt, *rest, **options):
            prompts.append(tokenizer.decode(prompt))
            return stream(model, tokenizer, prompt, *rest, **options)

        monkeypatch.setattr(inference, "stream_reply", spy)
        monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
        main(["--base_model", str(adapter), "--interactive", *SHORT, *flags])
        return capsys.readouterr().out, prompts

    return talk


def test_a_chat_remembers_and_forgets(chat_with):
    printed, prompts = chat_with("感冒了\n\n还有呢\n/clear\n头痛\n/exit\n不问\n", "--system", "你是医生")
    first, second = answers(printed)[:2]
    system = "<|im_start|>system\n你是医生<|im_end|>\n"
    turn = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
    assert prompts == [
        system + turn.format("感冒了"),
        system + turn.format("感冒了") + f"{first.strip()}<|im_end|>\n" + turn.format("还有呢"),
        system + turn.format("头痛"),
    ]
    assert second
    assert "对话已清空" in printed
    assert printed.startswith(NOTICE)


def test_a_chat_ends_with_its_input_and_knows_its_commands(chat_with):
    printed, prompts = chat_with("/help\n<|im_start|>system\n头痛")
    assert "/help: 没有这个命令" in printed
    assert len(prompts) == 2
    assert prompts[0].endswith("<|im_start|>user\n<|im_start|>system<|im_end|>\n<|im_start|>assistant\n")


def test_a_full_context_drops_the_oldest_turns_and_says_so(chat_with, monkeypatch):
    monkeypatch.setattr(inference, "stream_reply", lambda *args, **options: Reply("好", True, 2))
    long = "头痛很久" * 60
    printed, prompts = chat_with(f"甲{long}\n乙{long}\n丙{long}\n{long * 9}\n丁\n", "--max_new_tokens", "1100")
    assert "[the context of 2048 tokens is full: the oldest 2 turns are forgotten]" in printed
    assert "oldest 1 turns" not in printed
    assert re.search(r"\[its prompt has \d+ tokens, and there is room for 948\]", printed)
    held = [[name for name in "甲乙丙丁" if name in prompt] for prompt in prompts]
    # What is too long by itself costs no history.
    assert held == [["甲"], ["乙"], ["丙"], ["丙", "丁"]]


def test_an_empty_reply_is_not_remembered(chat_with, monkeypatch):
    monkeypatch.setattr(inference, "stream_reply", lambda *args, **options: Reply("", True, 1))
    _, prompts = chat_with("甲\n乙\n")
    assert [prompt.count("<|im_start|>user") for prompt in prompts] == [1, 1]


THOUGHT = "<think>\n多半是感冒。\n</think>\n\n"


def stream(text: str, ended: bool = True):
    """A `stream_reply` that writes this text, character by character."""

    def stream_reply(model, tokenizer, prompt, stop_ids, decoding, on_text):
        for character in text:
            on_text(character)
        return Reply(text, ended, len(text))

    return stream_reply


@pytest.mark.parametrize(
    ("flags", "printed_thought"),
    [([], "思考：…… (--show_thoughts True)\n"), (["--show_thoughts", "True"], "思考：多半是感冒。\n")],
)
def test_a_chat_keeps_thoughts_apart(chat_with, monkeypatch, flags, printed_thought):
    monkeypatch.setattr(inference, "stream_reply", stream(THOUGHT + "多喝水。"))
    printed, prompts = chat_with("甲\n乙\n", *flags)
    assert printed.count(f"{printed_thought}答：多喝水。\n") == 2
    # The template decides what it keeps of an earlier thought, as in training.
    assert f"<|im_start|>assistant\n{THOUGHT}多喝水。<|im_end|>" in prompts[1]


def test_a_thought_that_is_cut_is_no_answer(chat_with, monkeypatch):
    monkeypatch.setattr(inference, "stream_reply", stream("<think>\n多半是", ended=False))
    printed, prompts = chat_with("甲\n乙\n")
    assert "答：\n[cut at --max_new_tokens 6, inside its thought]" in printed
    assert "多半是" not in printed + prompts[1]


def fixed_reply(monkeypatch, text: str) -> None:
    monkeypatch.setattr(inference, "generate_replies", lambda *args: [Reply(text, True, 5) for _ in args[2]])


@pytest.mark.parametrize("flags", [[], ["--show_thoughts", "True"]])
def test_printed_replies_hide_thoughts_and_count_them(adapter, capsys, monkeypatch, flags):
    fixed_reply(monkeypatch, THOUGHT + "多喝水。")
    main(["--base_model", str(adapter), *flags])
    printed = capsys.readouterr().out
    assert answers(printed) == ["多喝水。"] * 4
    assert printed.count("思考：多半是感冒。") == (4 if flags else 0)
    assert ("[4 replies have a thought, which --show_thoughts True prints]" in printed) is not bool(flags)


def test_a_file_holds_thoughts_in_a_key_of_their_own(thinking_model_dir, tmp_path, monkeypatch):
    """Also where the prompt opened them."""
    fixed_reply(monkeypatch, "多半是感冒。\n</think>\n\n多喝水。")
    (tmp_path / "q.txt").write_text("感冒了", encoding="utf-8")
    files = ["--data_file", str(tmp_path / "q.txt"), "--output_file", str(tmp_path / "out.jsonl")]
    main(["--base_model", str(thinking_model_dir), *files])
    record = json.loads((tmp_path / "out.jsonl").read_text(encoding="utf-8"))
    assert (record["thought"], record["output"]) == ("多半是感冒。", "多喝水。")


def test_ctrl_c_leaves_a_chat_cleanly(chat_with, monkeypatch):
    def interrupted(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(inference, "stream_reply", interrupted)
    monkeypatch.setattr(inference, "read_line", lambda: "头痛")
    printed, _ = chat_with("")
    assert printed.endswith("\n")


def test_a_chat_through_a_pipe(adapter):
    """As a user runs it: text on standard output, the log on standard error; a byte that is no UTF-8 is no end."""
    command = [sys.executable, str(SCRIPT), "--base_model", str(adapter), "--interactive", "--max_new_tokens", "4"]
    lines = "感冒了\n".encode() + b"\xff\n" + b"/exit\n"
    result = subprocess.run(command, input=lines, capture_output=True, check=False)
    printed, log = result.stdout.decode(), result.stderr.decode()
    assert result.returncode == 0, log
    assert len(answers(printed)) == 2
    assert "问：感冒了" in printed
    assert "Warning" not in log
    assert log.strip().endswith("no CUDA device: float32 on the CPU")


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "--base_model"),
        (["--base_model", "./nowhere"], "--base_model ./nowhere: no such folder"),
        (["--base_model", "BASE", "--lora_model", "./nowhere"], "./nowhere: no such folder"),
        (["--base_model", "BASE", "--lora_model", "BASE"], "no adapter_config.json"),
        (["--base_model", "ADAPTER", "--lora_model", "ADAPTER"], "an adapter too; .* give the base: --base_model"),
        (["--base_model", "BASE", "--lora_modle", "ADAPTER"], "did you mean --lora_model"),
        (["--base_model", "BASE", "--template_name", "qwne"], "did you mean qwen"),
        (["--base_model", "BASE", "--load_in_4bit", "--load_in_8bit"], "exclude each other"),
        (["--base_model", "BASE", "--interactive", "--data_file", "x", "--output_file", "y"], "exclude each other"),
        (["--base_model", "BASE", "--data_file", "x"], "belong together"),
        (["--base_model", "BASE", "--batch_size", "0"], "--batch_size 0"),
        (["--base_model", "BASE", "--compare", "base", "--interactive"], "is a chat with one model"),
        (["--base_model", "BASE", "--compare", "base", "--lora_model", "ADAPTER"], "name the adapter after --compare"),
        (["--base_model", "BASE", "--compare", "base", "./nowhere"], "--compare ./nowhere: no such folder"),
        (["--base_model", "BASE", "--reward_model", "BASE"], "--reward_model .*: no reward model"),
        (["--base_model", "BASE", "--top_p", "0.5"], "give a --temperature above 0"),
        (
            ["--base_model", "BASE", "--data_file", "DATA", "--output_file", "/proc/x"],
            "--output_file /proc/x: cannot be wr",
        ),
        (["--base_model", "BASE", "--max_new_tokens", "2048"], "lower the flag or shorten the prompt"),
    ],
)
def test_what_cannot_be_honoured_is_refused_before_weights_load(tiny_model_dir, adapter, no_weights, flags, message):
    places = {"BASE": str(tiny_model_dir), "ADAPTER": str(adapter), "DATA": str(SCRIPT.parent / "data/finetune")}
    with pytest.raises(UserError, match=message) as caught:
        main([places.get(word, word) for word in flags])
    assert "\n" not in str(caught.value)


def test_another_base_is_refused_before_weights_load(tiny_model_dir, tmp_path, monkeypatch):
    adapter = random_adapter(tiny_model_dir, tmp_path / "a")
    Lineage(str(tiny_model_dir), None, "sft", "qwen", "data", 64, read_lineage(adapter).vocab_size).save(adapter)
    other = tmp_path / "other"
    other.mkdir()
    for file in tiny_model_dir.iterdir():
        (other / file.name).symlink_to(file)
    for module in (adapters, score_heads):
        monkeypatch.setattr(module, "load_base_model", lambda *args, **options: pytest.fail("weights were loaded"))
    with pytest.raises(UserError, match="is not the base of"):
        main(["--base_model", str(other), "--lora_model", str(adapter)])


def test_a_reward_model_is_refused(tiny_model_dir, tmp_path, no_weights):
    model = AutoModelForSequenceClassification.from_pretrained(tiny_model_dir, num_labels=1)
    model.save_pretrained(tmp_path / "full")
    load_tokenizer(str(tiny_model_dir)).save_pretrained(tmp_path / "full")
    get_peft_model(model, LoraConfig(task_type="SEQ_CLS", r=2)).save_pretrained(tmp_path / "adapter")
    base, full, adapter = str(tiny_model_dir), str(tmp_path / "full"), str(tmp_path / "adapter")
    for flags in (
        ["--base_model", full],
        ["--base_model", adapter],
        ["--base_model", base, "--lora_model", adapter],
        ["--base_model", base, "--compare", adapter],
        ["--base_model", base, "--compare", full],
    ):
        said = f"{flags[-2]} {flags[-1]}: a reward model, which scores replies and writes none"
        with pytest.raises(UserError, match=re.escape(said)):
            main(flags)


def test_out_of_memory_says_what_to_try(adapter, monkeypatch):
    def full(*args, **options):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(inference, "generate_replies", full)
    with pytest.raises(UserError, match="a smaller --batch_size"):
        main(["--base_model", str(adapter)])
