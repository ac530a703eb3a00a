"""--thinking: what is learned of thoughts, how prompts ask from then on, and what stops a run without the flag."""

from types import SimpleNamespace

import pytest
from reading_cases import assistant, fault_of, gpt, human, reason, tool, user
from template_cases import EXPECTED, TRL_TEMPLATES, WORDY
from template_cases import PLAIN as PLAIN_NAMES

from medtune.arguments import DataArguments
from medtune.errors import Unusable, UserError
from medtune.reading.conversations import to_dialogue, to_feedback, to_pair
from medtune.reading.encoders import DialogueEncoder, FeedbackEncoder, PairEncoder
from medtune.reading.keys import Reading
from medtune.reading.readers import read_dialogues, read_pairs, read_prompts
from medtune.reading.records import Dialogue, Feedback, Pair
from medtune.reading.reply_text import ReplyDecoder
from medtune.reading.stage_data import encode_records, prepare_data
from medtune.reading.thoughts import split_reply
from medtune.reading.tokenization import (
    IGNORED_LABEL,
    encode_dialogue,
    encode_prompt,
    encode_replies,
    load_chat_template,
)
from template import named_template

NO_LIMIT = 100_000
QUESTIONS, ANSWERS = ["咳嗽两周怎么办？", "有痰，不发热。"], ["有痰吗？", "可先观察。"]
THOUGHTS = ["先问痰。", "多为感染后。\n\n不用拍片。"]


def dialogue(replies: list[str]) -> list[dict]:
    return [turn for exchange in zip(map(user, QUESTIONS), map(assistant, replies), strict=True) for turn in exchange]


PLAIN = dialogue(ANSWERS)
THINKING = dialogue(
    [f"<think>\n{thought}\n</think>\n\n{answer}" for thought, answer in zip(THOUGHTS, ANSWERS, strict=True)]
)
# The thoughts in keys of their own, and under headings.
APART = [turn | ({"reasoning_content": THOUGHTS[n // 2]} if n % 2 else {}) for n, turn in enumerate(PLAIN)]
HEADED = dialogue([f"## Thinking\n\n{t}\n\n## Final Response\n\n{a}" for t, a in zip(THOUGHTS, ANSWERS, strict=True)])


# Which named template has the tokens of a model's own.
OWN_TOKENS = {"gptoss": "gptoss", "gemma4_v5": "gemma4", "lfm2_2_5_v2": "lfm2_5"}


@pytest.fixture
def load(tokenizers):
    """A function from the name of a template, or `own/` and TRL's name of a model's own, to tokenizer and template."""

    def load(name: str, thinking: str | None):
        tokenizer, is_own = tokenizers[name in WORDY], name.startswith("own/")
        own_tokens = EXPECTED[OWN_TOKENS.get(name.removeprefix("own/"), "qwen3")][0]
        tokens = own_tokens if is_own else EXPECTED[name][0]
        tokenizer.bos_token, tokenizer.eos_token = tokens[0], tokens[-1]
        if is_own:
            tokenizer.chat_template = (TRL_TEMPLATES / f"{name.removeprefix('own/')}.jinja").read_text(encoding="utf-8")
        return tokenizer, load_chat_template(tokenizer, None if is_own else name, thinking)

    return load


def learned(tokenizer, chat_template, messages: list[dict], tools: list[dict] | None = None) -> tuple[list[str], str]:
    """The texts of the learned stretches, and the end of the last prompt, once its ids are those at inference."""
    ids, labels = encode_dialogue(tokenizer, chat_template, messages, tools, max_length=NO_LIMIT)
    places = [index for index, label in enumerate(labels) if label != IGNORED_LABEL]
    starts = [index for index in places if labels[index - 1] == IGNORED_LABEL]
    ends = [index + 1 for index in places if [*labels, IGNORED_LABEL][index + 1] == IGNORED_LABEL]
    assert ids[: starts[-1]] == encode_prompt(tokenizer, chat_template, messages[:-1], tools)
    texts = [tokenizer.decode(ids[start:end]) for start, end in zip(starts, ends, strict=True)]
    for text, start, end in zip(texts, starts, ends, strict=True):
        assert ids[start:end] == tokenizer(text, add_special_tokens=False)["input_ids"]
    return texts, tokenizer.decode(ids[: starts[-1]]).rpartition(QUESTIONS[-1])[2]


# ---------------------------------------------------------------- what is learned

END, HEADER, EMPTY = "<|im_end|>", "<|im_end|>\n<|im_start|>assistant\n", "<think>\n\n</think>\n\n"
BARE = [f"{answer}{END}" for answer in ANSWERS]
WHOLE = [f"<think>\n{thought}\n</think>\n\n{answer}{END}" for thought, answer in zip(THOUGHTS, ANSWERS, strict=True)]
OPENED = [reply.removeprefix("<think>\n") for reply in WHOLE]
GLM = [f"\n{ANSWERS[0]}<|user|>", f"\n{ANSWERS[1]}<|endoftext|>"]
GEMMA4 = [f"{ANSWERS[0]}<turn|>", f"<|channel>thought\n{THOUGHTS[1]}\n<channel|>{ANSWERS[1]}<turn|>"]
MODEL_TURN = "<turn|>\n<|turn>model\n"
FINALS = [f"<|channel|>final<|message|>{a}{end}" for a, end in zip(ANSWERS, ("<|end|>", "<|return|>"), strict=True)]
HARMONY = [FINALS[0], f"<|channel|>analysis<|message|>{THOUGHTS[1]}<|end|><|start|>assistant{FINALS[1]}"]
HARMONY_END = "<|end|><|start|>assistant"
CASES = [
    # Qwen3 leaves the thoughts of earlier replies out.
    ("qwen3", "keep", [BARE[0], WHOLE[1]], HEADER),
    ("qwen3", "drop", BARE, HEADER),
    ("qwen3", "empty", BARE, HEADER + EMPTY),
    ("qwen3_nothink", None, BARE, HEADER + EMPTY),
    ("qwen3_nothink", "empty", BARE, HEADER + EMPTY),
    ("own/qwen3", "keep", [BARE[0], WHOLE[1]], HEADER),
    ("own/qwen3", "drop", BARE, HEADER),
    ("own/qwen3", "empty", BARE, HEADER + EMPTY),
    # Qwen3.6 opens the thought in the prompt.
    ("own/qwen3_6", "keep", [BARE[0], OPENED[1]], HEADER + "<think>\n"),
    ("own/qwen3_6", "drop", BARE, HEADER),
    ("own/qwen3_6", "empty", BARE, HEADER + EMPTY),
    # Off until it is switched on.
    ("own/qwen3_5_nothink", "keep", [BARE[0], OPENED[1]], HEADER + "<think>\n"),
    ("own/qwen3_5_nothink", "drop", BARE, HEADER),
    # It reads reasoning_content alone, and leaves nothing out.
    ("own/qwen3_8", "keep", OPENED, HEADER + "<think>\n"),
    ("own/qwen3_8", "drop", BARE, HEADER),
    ("own/qwen3_8", "empty", BARE, HEADER + EMPTY),
    ("glm4_moe", "keep", ["\n<think></think>" + GLM[0], f"\n<think>{THOUGHTS[1]}</think>{GLM[1]}"], "<|assistant|>"),
    ("glm4_moe", "drop", GLM, "<|assistant|>"),
    ("glm4_moe", "empty", GLM, "/nothink<|assistant|>\n<think></think>"),
    # Templates without a place write what the text says.
    ("chatml", None, WHOLE, HEADER),
    ("chatml", "keep", WHOLE, HEADER),
    ("chatml", "drop", BARE, HEADER),
    ("own/qwen2_5", "keep", WHOLE, HEADER),
    ("own/qwen2_5", "drop", BARE, HEADER),
    ("qwen3_5", "keep", [BARE[0], OPENED[1]], HEADER + "<think>\n"),
    ("qwen3_5", "drop", BARE, HEADER),
    ("qwen3_5", "empty", BARE, HEADER + EMPTY),
    ("qwen3_5_nothink", None, BARE, HEADER + EMPTY),
    ("minicpm", "keep", [BARE[0], OPENED[1]], HEADER + "<think>\n"),
    ("minicpm", "drop", BARE, HEADER),
    ("minicpm", "empty", BARE, HEADER + EMPTY),
    ("smollm3", "keep", WHOLE, HEADER),
    ("smollm3", "empty", BARE, f"{HEADER}{EMPTY[:-1]}"),
    # Thoughts in channels; without the flag too, since in the text they would be words.
    *((name, thinking, GEMMA4, MODEL_TURN) for name in ("gemma4", "own/gemma4_v5") for thinking in ("keep", None)),
    *((name, "drop", [f"{answer}<turn|>" for answer in ANSWERS], MODEL_TURN) for name in ("gemma4", "own/gemma4_v5")),
    *((name, thinking, HARMONY, HARMONY_END) for name in ("gptoss", "own/gptoss") for thinking in ("keep", None)),
    *((name, "drop", FINALS, HARMONY_END) for name in ("gptoss", "own/gptoss")),
    ("lfm2_5", "keep", [BARE[0], f"<think>{THOUGHTS[1]}</think>{BARE[1]}"], HEADER),
    ("own/lfm2_2_5_v2", "keep", [BARE[0], f"<think>{THOUGHTS[1]}</think>{BARE[1]}"], HEADER),
]


@pytest.mark.parametrize(("name", "thinking", "replies", "prompt_end"), CASES)
def test_what_is_learned_and_how_prompts_end(load, name, thinking, replies, prompt_end):
    tokenizer, chat_template = load(name, thinking)
    assert learned(tokenizer, chat_template, THINKING) == (replies, prompt_end)
    apart = to_dialogue({"messages": APART}, "d.jsonl:1").messages
    assert learned(tokenizer, chat_template, apart) == (replies, prompt_end)
    if thinking in ("drop", "empty"):
        assert learned(tokenizer, chat_template, PLAIN) == (replies, prompt_end)
        assert learned(tokenizer, chat_template, HEADED) == (replies, prompt_end)
    # What is saved with the model asks in the same way, where it is read again by a stage, a tool or a server.
    saved, asked = tokenizer.chat_template, chat_template.prompt(THINKING[:3])
    assert load_chat_template(tokenizer, None, chat_template.thinking).prompt(THINKING[:3]) == asked
    assert tokenizer.chat_template == saved
    by_server = tokenizer.apply_chat_template(PLAIN[:3], add_generation_prompt=True, tokenize=False)
    assert by_server == chat_template.prompt(PLAIN[:3])


# DeepSeek-V3.1's switch, and its mark of no thought: without an opening one, in all turns.
V3_1 = r"""
{%- set thinking = thinking if thinking is defined else false %}
{%- for message in messages %}
  {%- set mark = "</think>" if message.role == "assistant" else "" %}
  {{- "<|im_start|>" ~ message.role ~ "\n" ~ mark ~ message.content.split("</think>")[-1] ~ "<|im_end|>\n" }}
{%- endfor %}
{%- if add_generation_prompt %}{{- "<|im_start|>assistant\n" ~ ("<think>" if thinking else "</think>") }}{%- endif %}"""


def test_deepseek_v3_1s_own_switch(load):
    tokenizer, _ = load("chatml", None)
    tokenizer.chat_template = V3_1
    assert learned(tokenizer, load_chat_template(tokenizer, None, "empty"), THINKING) == (BARE, HEADER + "</think>")
    assert tokenizer.chat_template == "{%- set thinking = false %}" + V3_1
    with pytest.raises(UserError, match="writes no thoughts"):
        load_chat_template(tokenizer, None, "keep")


EVERY_WAY = [
    *((name, None) for name in PLAIN_NAMES),
    *(
        (name, thinking)
        for name in ("qwen3", "qwen3_5", "glm4_moe", "minicpm")
        for thinking in ("keep", "drop", "empty")
    ),
    *((name, thinking) for name in ("gptoss", "gemma4", "lfm2_5", "smollm3") for thinking in ("keep", "drop")),
    *((f"own/{name}", thinking) for name in ("qwen3", "qwen3_6", "qwen3_8") for thinking in ("keep", "drop", "empty")),
    *((f"own/{name}", "keep") for name in OWN_TOKENS),
    *((f"own/{name}", thinking) for name in ("qwen3_5_think", "nemotron_3_nano") for thinking in ("keep", "empty")),
]


@pytest.mark.parametrize(("name", "thinking"), EVERY_WAY)
def test_every_reply_is_learned_behind_the_prompt_that_inference_gives(load, name, thinking):
    """Also where the template rewrites earlier replies; with `keep` each is learned with its thought."""
    tokenizer, chat_template = load(name, thinking)
    messages = THINKING if thinking else PLAIN
    rows, _ = encode_records([Dialogue(messages, None, "d:1")], DialogueEncoder(tokenizer, chat_template, NO_LIMIT))
    prompts, replies = [], []
    for ids, labels in zip(rows["input_ids"], rows["labels"], strict=True):
        for place, label in enumerate(labels):
            if label != IGNORED_LABEL and labels[place - 1] == IGNORED_LABEL:
                length = [*labels[place:], IGNORED_LABEL].index(IGNORED_LABEL)
                prompts.append(ids[:place])
                replies.append(ids[place : place + length])
    assert prompts == [encode_prompt(tokenizer, chat_template, messages[:turn]) for turn in (1, 3)]
    stops = tokenizer.convert_tokens_to_ids(list(chat_template.stop_tokens))
    decode = ReplyDecoder(tokenizer)
    for ids, thought, answer in zip(replies, THOUGHTS, ANSWERS, strict=True):
        assert ids[-1] in stops
        parts = split_reply(decode(ids[:-1]), chat_template.opens_thought)
        assert parts == (thought if thinking == "keep" else "", answer, True)


@pytest.mark.parametrize(
    ("name", "lengths", "weights"),
    [
        # Qwen3's empty thought stands before a call only while no result follows, Qwen3.5's until the next question.
        ("qwen3_nothink", [4, 6, 8], [[0, 1], [0, 0, 1], [0, 0, 0, 1]]),
        ("qwen3_5_nothink", [6, 8], [[0, 1, 1], [0, 0, 0, 1]]),
        ("chatml", [8], [[0, 1, 1, 1]]),
    ],
)
def test_examples_of_a_dialogue_with_a_call_and_a_reply_that_is_not_learned(load, name, lengths, weights):
    _, chat_template = load(name, None)
    call = {"role": "assistant", "content": "", "tool_calls": [{"name": "dose", "arguments": {}}]}
    turns = [user("一"), assistant("1") | {"weight": 0}, user("二"), call, tool("结果"), assistant("2")]
    turns += [user("三"), assistant("3")]
    examples = chat_template.examples(turns)
    assert [len(messages) for messages in examples] == lengths
    assert weights == [[turn.get("weight", 1) for turn in each if turn["role"] == "assistant"] for each in examples]
    assert chat_template.examples(turns[:2]) == [turns[:2]]


def test_several_examples_of_a_dialogue_are_noted(load):
    dialogues = [Dialogue(PLAIN, None, f"d:{line}") for line in (1, 2)]
    rows, report = encode_records(dialogues, DialogueEncoder(*load("qwen3_5_nothink", None), NO_LIMIT))
    assert rows["source"] == ["d:1", "d:1", "d:2", "d:2"]
    assert report.notes == [
        "dialogues of several questions as one example for each, 2 more than dialogues: the template writes earlier "
        "replies otherwise than it asks for them, so each is learned as the last"
    ]


@pytest.mark.parametrize("name", ["qwen3", "own/qwen3", "own/qwen3_6", "glm4_moe"])
def test_a_choice_is_changed_by_another(load, name):
    tokenizer, _ = load(name, None)
    came, written = tokenizer.chat_template, {}
    for thinking in ("keep", "drop", "empty"):
        written[thinking] = load_chat_template(load(name, None)[0], None, thinking).prompt(PLAIN[:3])
    tokenizer.chat_template = came
    for thinking in ("drop", "empty", "keep", "drop", "keep"):
        assert load_chat_template(tokenizer, None, thinking).prompt(PLAIN[:3]) == written[thinking]


@pytest.mark.parametrize("name", PLAIN_NAMES)
def test_data_without_thoughts_gives_the_ids_that_it_gave_without_the_flag(load, name):
    """Which other tests compare with the table in template_cases.py."""
    ids_and_labels = encode_dialogue(*load(name, None), PLAIN, max_length=NO_LIMIT)
    changing = {"qwen3": ["drop", "empty"], "glm4_moe": ["drop", "empty"], "minicpm": ["keep", "empty"]}
    changing |= {"gemma4": ["keep", "empty"]}
    changing |= {nothink: ["keep", "drop"] for nothink in ("qwen3_nothink", "qwen3_5_nothink")}
    for thinking in {"keep", "drop", "empty"} - {*changing.get(name, ["empty"])}:
        assert encode_dialogue(*load(name, thinking), PLAIN, max_length=NO_LIMIT) == ids_and_labels


def test_a_tool_call_keeps_its_thought(load):
    call = {"name": "dose", "arguments": {"drug": "布洛芬"}}
    turns = [
        user("布洛芬吃多少？"),
        {"role": "assistant", "content": None, "tool_calls": [call], "reasoning": "先查。"},
    ]
    turns += [tool("200 mg"), assistant("200 mg。", reasoning_content="查到了。")]
    messages = to_dialogue({"messages": turns}, "d.jsonl:1").messages
    said = '<tool_call>\n{"name": "dose", "arguments": {"drug": "布洛芬"}}\n</tool_call><|im_end|>'
    for thinking, thoughts in (
        ("keep", ("<think>\n先查。\n</think>\n\n", "<think>\n查到了。\n</think>\n\n")),
        ("empty", ("", "")),
    ):
        texts, _ = learned(*load("own/qwen3", thinking), messages)
        assert texts == [thoughts[0] + said, thoughts[1] + "200 mg。<|im_end|>"]


# ---------------------------------------------------------------- choices that cannot be


ASKS = "qwen3_nothink asks for replies with an empty thought; leave the flag out, or take --template_name qwen3"
NO_PLACE = (
    "has no place for thoughts, so none for an empty one; --thinking drop leaves them out, or pass a --template_name"
)


@pytest.mark.parametrize(
    ("name", "thinking", "message"),
    [
        ("qwen3_nothink", "keep", f"--thinking keep: --template_name {ASKS}"),
        ("qwen3_nothink", "drop", f"--thinking drop: --template_name {ASKS}"),
        ("vicuna", "empty", f"--thinking empty: the chat template of vicuna {NO_PLACE} .*"),
        (
            "own/deepseek_r1_distill",
            "drop",
            "--thinking drop: the chat template of .* begins every reply with a thought.*",
        ),
        ("own/deepseek_r1_distill", "keep", "--thinking keep: the chat template of .* writes no thoughts; choose .*"),
    ],
)
def test_a_template_that_cannot_is_refused_in_a_line(load, name, thinking, message):
    with pytest.raises(UserError, match=f"^{message}$"):
        load(name, thinking)


@pytest.mark.parametrize(
    ("name", "thinking"),
    [
        *(("qwen3", thinking) for thinking in ("keep", "drop", "empty", None)),
        *((name, "keep") for name in ("own/qwen3", "own/qwen3_6", "glm4_moe", "chatml")),
        *(("chatml", "drop"), ("qwen3_nothink", None)),
    ],
)
def test_a_thought_without_an_answer_is_refused_at_its_place(load, name, thinking):
    encoder = DialogueEncoder(*load(name, thinking), NO_LIMIT)
    lone = [user("咳嗽？"), assistant("<think>\n想一想病毒")]
    _, report = encode_records([Dialogue(lone, None, "d:2")], encoder, on_bad_data="drop")
    assert report.examples("thought without answer") == [
        "d:2: message 2 (assistant) is a thought alone, which teaches to end without an answer; "
        "write it behind </think>, or delete the record"
    ]
    with pytest.raises(Unusable, match="thought without answer"):
        encode_replies(*load(name, thinking), lone[:1], [lone[1]["content"]], max_prompt_length=99, max_reply_length=99)


def test_without_the_flag_a_thought_alone_is_words_where_the_template_has_no_other(load):
    for name, reply in (("chatml", "<think>\n先问痰"), ("qwen3", "<think>\n先问痰\n</think>\n\n")):
        assert learned(*load(name, None), [user("咳嗽？"), assistant(reply)])[0] == [reply + END]


def test_a_prompt_that_opens_a_thought_which_the_reply_lacks(load):
    with pytest.raises(Unusable, match="merged token") as fault:
        encode_dialogue(*load("own/qwen3_6", "keep"), PLAIN, max_length=NO_LIMIT)
    assert fault.value.detail.endswith(
        "the prompt opens a thought that it lacks, so write one, or ask with --thinking empty"
    )


# ---------------------------------------------------------------- keys of their own

QUESTION = {"question": QUESTIONS[0], "answer": ANSWERS[0]}


@pytest.mark.parametrize(
    "record",
    [
        {"messages": APART[:2]},
        {"messages": [APART[0], PLAIN[1] | {"reasoning": THOUGHTS[0], "reasoning_details": "先问痰。\n"}]},
        {"messages": PLAIN[:2], "reasoning_content": THOUGHTS[0]},
        {"conversations": [human(QUESTIONS[0]), gpt(ANSWERS[0], thinking=THOUGHTS[0])]},
        QUESTION | {"thought": THOUGHTS[0]},
        QUESTION | {"思考过程": [THOUGHTS[0]]},
        QUESTION | {"reasoning_details": [{"type": "reasoning.text", "text": THOUGHTS[0]}]},
        {"question": QUESTIONS[0], "answer": THINKING[1]["content"], "cot": THOUGHTS[0]},
    ],
)  # fmt: skip
def test_a_thought_in_a_key_stands_before_its_reply(record):
    assert to_dialogue(record, "d.jsonl:1").messages == THINKING[:2]
    if "question" in record:
        feedback = to_feedback(record | {"label": True}, "d.jsonl:1")
        assert feedback.reply == THINKING[1]["content"]


def test_thoughts_of_pairs_and_histories():
    chosen, rejected = APART[1], assistant("不管。", thinking="懒得想。")
    pair = to_pair({"prompt": QUESTIONS[0], "chosen": [chosen], "rejected": [rejected]}, "d.jsonl:1")
    assert (pair.chosen, pair.rejected) == (THINKING[1]["content"], "<think>\n懒得想。\n</think>\n\n不管。")
    record = {
        "question": QUESTIONS[1],
        "history": [[QUESTIONS[0], ANSWERS[0]]],
        "answer": ANSWERS[1],
        "cot": THOUGHTS[1],
    }
    assert to_dialogue(record, "d.jsonl:1").messages == [*PLAIN[:3], THINKING[3]]


BESIDE_A_DIALOGUE = "write it as 'reasoning_content' into the turn that it led to, or --ignore_keys cot"
BESIDE_A_PAIR = "write it into the reply that it led to, as <think>...</think>, or --ignore_keys cot"


@pytest.mark.parametrize(
    ("make", "record", "said"),
    [
        (
            to_dialogue,
            QUESTION | {"cot": "甲", "thought": "乙"},
            "two thoughts: the record has a thought in 'cot' and in 'th",
        ),
        (
            to_dialogue,
            {"question": "疼？", "answer": "<think>甲</think>休息。", "cot": "乙"},
            "two thoughts: the record has a thought in 'cot' and another in the reply; --ignore_keys cot reads on",
        ),
        (
            to_dialogue,
            {"messages": PLAIN, "cot": "甲"},
            f"thought apart: the record has a thought in 'cot'; {BESIDE_A_DIALOGUE}",
        ),
        (
            to_pair,
            {"prompt": "疼？", "chosen": "休息。", "rejected": "不管。", "cot": "甲"},
            f"thought apart: the record has a thought in 'cot'; {BESIDE_A_PAIR}",
        ),
        (
            to_dialogue,
            QUESTION | {"reasoning_details": [{"type": "reasoning.encrypted", "data": "甲"}]},
            "not text: the record ('reasoning_details') is an object; it must be a string; "
            "--ignore_keys reasoning_details reads on without it",
        ),
        (
            to_dialogue,
            {"messages": [PLAIN[0], assistant("", reasoning_content="甲")]},
            "empty reply: turn 2 (assistant)",
        ),
    ],
)
def test_thoughts_that_cannot_be_read(make, record, said):
    assert reason(make, record).startswith(said)


# ---------------------------------------------------------------- rows of a stage


def prepare(read_records, encoder, file, folder):
    data_args, training_args = DataArguments(train_file_dir=str(file)), SimpleNamespace(do_eval=False, seed=42)
    return prepare_data(read_records, encoder, data_args, training_args, str(folder))


def test_without_the_flag_keys_stop_the_run_with_their_number_and_the_choices(load, write_jsonl, tmp_path):
    file = write_jsonl("d.jsonl", [{"messages": APART}, {"messages": PLAIN}, {"messages": THINKING}])
    line = (
        "d.jsonl: thoughts of replies in a key of their own ('reasoning_content'): 2; say what becomes of them: "
        "--thinking keep (thoughts are learned), drop (they are left out) or empty (an empty one is in their place)"
    )
    for read_records in (read_dialogues, read_prompts):
        assert fault_of(prepare, read_records, DialogueEncoder(*load("chatml", None), NO_LIMIT), file, tmp_path) == line
    pairs = write_jsonl("p.jsonl", [{"prompt": "疼？", "chosen": APART[1], "rejected": "不管。"}])
    encoder = PairEncoder(*load("qwen3", None), NO_LIMIT, NO_LIMIT)
    assert fault_of(prepare, read_pairs, encoder, pairs, tmp_path).startswith("p.jsonl: thoughts of replies in a key")
    # The name of a template may be the choice, and the cache knows it.
    rows = {}
    for name, thinking in (("qwen3", "keep"), ("qwen3_nothink", None), ("qwen3", "drop"), ("qwen3", "keep")):
        encoder = DialogueEncoder(*load(name, thinking), NO_LIMIT)
        data = prepare(read_dialogues, encoder, file, tmp_path)
        ids = [tuple(ids) for ids in data.train["input_ids"]]
        assert rows.setdefault((name, thinking), ids) == ids
    assert len(set(map(tuple, rows.values()))) == 3


@pytest.mark.parametrize(
    ("thinking", "note"),
    [
        (None, "thoughts of earlier replies, left out by the template while the replies are learned: 1"),
        ("drop", "thoughts of replies that are learned without them (--thinking drop): 2"),
        ("empty", "thoughts of replies that are learned without them (--thinking empty): 2"),
    ],
)  # fmt: skip
def test_thoughts_that_are_not_learned_are_counted(load, thinking, note):
    dialogues = [Dialogue(messages, None, f"d:{line}") for line, messages in enumerate((PLAIN, THINKING), 1)]
    _, report = encode_records(dialogues, DialogueEncoder(*load("qwen3", thinking), NO_LIMIT))
    assert report.notes[0] == f"{note}, the first in d:2"
    assert len(report.notes) == (2 if thinking == "empty" else 1)


def test_thoughts_of_pairs_and_labelled_replies(load):
    thinking, other = THINKING[1]["content"], "<think>\n别的。\n</think>\n\n" + ANSWERS[0]
    pairs = [Pair(PLAIN[:1], thinking, reply, None, f"d:{line}") for line, reply in enumerate(("不管。", other), 1)]
    rows, report = encode_records(pairs, PairEncoder(*load("qwen3", "keep"), NO_LIMIT, NO_LIMIT))
    assert (rows["n_thoughts"], report.summary(), report.notes) == ([1, 2], "kept 2 of 2", [])
    tokenizer, chat_template = load("qwen3", "empty")
    rows, report = encode_records(pairs, PairEncoder(tokenizer, chat_template, NO_LIMIT, NO_LIMIT))
    assert (rows["n_thoughts"], report.summary()) == ([0], "kept 1 of 2 (1 same answers)")
    assert report.examples("same answers") == [
        "d:2: the replies differ in their thoughts alone, which --thinking empty leaves out"
    ]
    assert report.notes == ["thoughts of replies that are learned without them (--thinking empty): 1, the first in d:1"]
    assert tokenizer.decode(rows[0]["prompt_ids"]).endswith(HEADER + EMPTY)
    assert tokenizer.decode(rows[0]["chosen_ids"]) == BARE[0]
    feedback = [Feedback([user(f"{n}")], thinking, n > 0, f"d:{n}") for n in range(2)]
    rows, report = encode_records(feedback, FeedbackEncoder(tokenizer, chat_template, NO_LIMIT, NO_LIMIT))
    assert [tokenizer.decode(ids) for ids in rows["reply_ids"]] == [BARE[0]] * 2
    assert report.notes == ["thoughts of replies that are learned without them (--thinking empty): 2, the first in d:0"]


def test_the_named_templates_read_the_key_as_the_models_own_do(tokenizers):
    tokenizer = tokenizers[0]
    for name, theirs in (("qwen3", "qwen3"), ("glm4_moe", "glm4moe")):
        jinja = (TRL_TEMPLATES / f"{theirs}.jinja").read_text(encoding="utf-8")
        for options in ({}, {"enable_thinking": False}, {"enable_thinking": True}):
            for messages, asks in ((APART, False), (APART[:3], True), (THINKING, False)):
                texts = [
                    tokenizer.apply_chat_template(
                        messages, chat_template=template, tokenize=False, add_generation_prompt=asks, **options
                    )
                    for template in (named_template(name), jinja)
                ]
                assert texts[0] == texts[1]
    assert Reading().thoughts_apart == ""
