"""The sample data: the knowledge base keeps its rules, the files come from it, and nothing leaks into evaluation."""

import json
import os
import random
import re
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from functools import cache
from itertools import combinations, pairwise
from pathlib import Path

import build_sample_data
import pytest
from jsonschema import Draft202012Validator

from medtune.errors import UserError
from medtune.measuring.safety import refuses, refuses_or_warns, sends_to_emergency_care, sends_to_hospital
from medtune.reading.exams import exam_prompt
from medtune.reading.readers import load_dialogues, load_documents, load_records, read_pairs
from medtune.reading.thoughts import split_reply
from medtune.sample_data.corpus import GUIDE_QUESTIONS
from medtune.sample_data.evaluation import NEAR_COPY, TrainingText, asks_nearly, bare, spoken_text
from medtune.sample_data.exam import LETTERS
from medtune.sample_data.knowledge import (
    CONDITION_ASPECTS,
    MEDICINE_ASPECTS,
    choose_unseen,
    read_knowledge,
)
from medtune.sample_data.learned import build_dialogues, in_a_frame, safety_exchanges
from medtune.sample_data.pairs import PROMPTS

DATA = Path(__file__).resolve().parents[2] / "data"
KNOWLEDGE = DATA / "knowledge"
ENTRY_FILES = ("conditions.jsonl", "more_conditions.jsonl")
SAFETY = ("emergency_twins", "unsafe_requests")
QUESTIONS = ("questions", "guide_questions", "everyday_questions", "unseen_conditions", "complaints")
EVAL_DIALOGUES = [f"eval/{name}.jsonl" for name in (*QUESTIONS, "safety", *SAFETY)]
DEVELOPMENT = [f"development/{name}.jsonl" for name in SAFETY]
DOSE = re.compile(r"\d+ ?(毫克|微克|mg|μg|单位|片|粒|milligrams?|tablets?)")
EMERGENCY = re.compile("120|急诊|立即去医院|马上就医|ambulance|emergency|hospital at once", re.IGNORECASE)


@cache
def read(name: str) -> list[dict]:
    return [json.loads(line) for line in (DATA / name).read_text(encoding="utf-8").splitlines()]


@cache
def knowledge():
    return read_knowledge(KNOWLEDGE)


def entries() -> list[dict]:
    """Every entry: those that all files are made of, and those that are there to be read."""
    return [entry for name in ENTRY_FILES for entry in read(f"knowledge/{name}")]


def strings(value: object) -> list[str]:
    if isinstance(value, str):
        return [value]
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else []
    return [text for part in parts for text in strings(part)]


def training_dialogues() -> list[dict]:
    names = ("train", "further", "medical_sft_1K_format")
    return [dialogue for name in names for dialogue in read(f"finetune/{name}.jsonl")]


def training_pairs() -> list[dict]:
    return read("reward/train.jsonl") + read("reward/dpo_zh_500.jsonl")


def first_question(record: dict) -> str:
    return next(turn["value"] for turn in record["conversations"] if turn["from"] == "human")


# ---------------------------------------------------------------- the knowledge base


def test_entries_follow_the_schema():
    schema = json.loads((KNOWLEDGE / "schema.json").read_text(encoding="utf-8"))
    Draft202012Validator.check_schema(schema)
    # Not the whole schema at once: `oneOf` would not say which field is wrong.
    validators = {kind: Draft202012Validator(schema | {"oneOf": [schema["$defs"][kind]]}) for kind in schema["$defs"]}
    faults = [
        f"{name}:{number} {'/'.join(map(str, error.path))}: {error.message}"
        for name in ENTRY_FILES
        for number, entry in enumerate(read(f"knowledge/{name}"), start=1)
        for error in validators[entry["kind"]].iter_errors(entry)
    ]
    assert not faults
    assert validators["condition"].is_valid(read("knowledge/conditions.jsonl")[0])
    assert not validators["condition"].is_valid(read("knowledge/conditions.jsonl")[0] | {"causes": []})


def test_entries_are_as_many_as_promised():
    kinds = Counter((entry["language"], entry["kind"]) for entry in read("knowledge/conditions.jsonl"))
    assert kinds["zh", "condition"] >= 150
    assert kinds["zh", "medicine"] >= 20
    assert kinds["en", "condition"] + kinds["en", "medicine"] >= 40
    more = Counter((entry["language"], entry["kind"]) for entry in read("knowledge/more_conditions.jsonl"))
    assert more["zh", "condition"] >= 60
    assert more["zh", "medicine"] >= 40
    assert more["en", "condition"] + more["en", "medicine"] >= 25
    ids = [(entry["language"], entry["id"]) for entry in entries()]
    assert len(set(ids)) == len(ids)
    assert {name for language, name in ids if language == "en"} <= {name for language, name in ids if language == "zh"}
    fields = Counter(e["field"] for e in read("knowledge/conditions.jsonl") if e["language"] == "zh")
    assert len(fields) == 12
    assert min(fields.values()) >= 5


def test_no_two_entries_share_a_sentence_or_a_name():
    texts: dict[str, str] = {}
    names: dict[tuple[str, str], str] = {}
    for entry in entries():
        where = f"{entry['language']}:{entry['id']}"
        words = {key: value for key, value in entry.items() if key not in ("id", "language", "kind", "field")}
        long_enough = 9 if entry["language"] == "zh" else 25
        for text in strings({key: value for key, value in words.items() if key not in ("name", "department")}):
            for sentence in re.findall(rf"[^。！？.!?]{{{long_enough},}}", text):
                assert texts.setdefault(sentence.strip(), where) == where, sentence
        for name in [entry["name"], *entry["aliases"]]:
            assert names.setdefault((entry["language"], name.lower()), where) == where, name


def test_entries_hold_what_they_must_and_no_dose():
    for entry in entries():
        assert not DOSE.search(" ".join(strings(entry))), entry["id"]
        assert entry["name"].lower() in entry["overview"].lower()
        for complaint in entry.get("complaints", []):
            assert not any(name.lower() in complaint.lower() for name in [entry["name"], *entry["aliases"]]), complaint


def test_further_complaints_are_new_words_for_every_condition_that_is_asked_about():
    """No name and no dose, of no other condition, and in a form that fits the frames."""
    conditions = {(e.language, e.fields["id"]): e for e in knowledge().entries if not e.is_medicine}
    unseen = choose_unseen(knowledge())
    further = {(of["language"], of["id"]): of["complaints"] for of in read("knowledge/more_complaints.jsonl")}
    assert further.keys() == {key for key in conditions if key[1] not in unseen}
    known = {complaint for entry in conditions.values() for complaint in entry.fields["complaints"]}
    everything = [complaint for complaints in further.values() for complaint in complaints]
    assert len(set(everything) | known) == len(everything) + len(known)
    for key, complaints in further.items():
        assert len(complaints) >= 7, key
        for complaint in complaints:
            assert not [name for name in conditions[key].names if name.lower() in complaint.lower()], complaint
            assert not re.search('[“”"；;：:？?]|[。.]$', complaint), complaint
            assert not DOSE.search(complaint), complaint


def test_further_complaints_are_answered_with_the_condition_and_never_in_the_third_way_that_is_held_out():
    by_question = {first_question(d): d["conversations"][-1]["value"] for d in training_dialogues() if not is_exam(d)}
    n_asked = 0
    for entry in (entry for entry in knowledge().entries if entry.more_complaints):
        reply = knowledge().reply(entry, "urgent" if entry.fields["urgent"] else "complaint")
        for complaint in entry.more_complaints:
            asked = [question for question in by_question if complaint in question]
            assert {by_question[question] for question in asked} <= {reply}, complaint
            n_asked += len(asked)
        assert not [question for question in by_question if entry.fields["complaints"][2] in question]
    assert n_asked > 1400


def test_entries_to_read_do_not_name_what_continued_pretraining_teaches():
    unseen = choose_unseen(knowledge())
    names = {name.lower() for e in knowledge().entries if e.fields["id"] in unseen for name in e.names}
    for entry in read("knowledge/more_conditions.jsonl"):
        text = json.dumps(entry, ensure_ascii=False).lower()
        assert not [name for name in names if re.search(rf"(?<![a-z]){re.escape(name)}(?![a-z])", text)], entry["id"]


def test_no_two_entries_have_the_same_symptoms_or_complaints():
    for key in ("symptoms", "complaints", "uses", "side_effects"):
        lists = [frozenset(entry[key]) for entry in entries() if key in entry]
        for one, other in combinations(lists, 2):
            assert len(one & other) < 3, one & other


def test_ways_to_ask_are_either_for_training_or_held_out():
    def check(value: dict) -> None:
        if "held_out" in value:
            assert value["train"] and value["held_out"]
            ways = [way for part in value.values() for way in part]
            assert len(set(ways)) == len(ways)
        else:
            for part in value.values():
                if isinstance(part, dict):
                    check(part)

    check(json.loads((KNOWLEDGE / "phrasings.json").read_text(encoding="utf-8")))
    for situation in knowledge().safety:
        check(situation["questions"])


# ---------------------------------------------------------------- the files come from it


def test_committed_files_are_what_the_script_writes_in_any_process():
    """Python's order of sets changes with its hash seed; the files do not."""
    result = subprocess.run(
        [sys.executable, "scripts/build_sample_data.py", "--check"],
        cwd=DATA.parent, capture_output=True, text=True, check=False, env=os.environ | {"PYTHONHASHSEED": "7"},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "all 21 files" in result.stdout


def test_check_names_the_file_that_differs(tmp_path, monkeypatch):
    monkeypatch.setattr(build_sample_data, "build", lambda knowledge: {"eval/a.jsonl": "{}\n", "eval/b.jsonl": "{}\n"})
    (tmp_path / "knowledge").symlink_to(KNOWLEDGE)
    build_sample_data.main(["--data_dir", str(tmp_path)])
    build_sample_data.main(["--data_dir", str(tmp_path), "--check"])
    (tmp_path / "eval/b.jsonl").write_text("{ }\n")
    with pytest.raises(UserError, match=r"eval/b\.jsonl: not what data/knowledge gives; run"):
        build_sample_data.main(["--data_dir", str(tmp_path), "--check"])
    with pytest.raises(UserError, match=r"knowledge has no conditions\.jsonl and no phrasings\.json"):
        build_sample_data.main(["--data_dir", str(tmp_path / "eval")])


def test_stages_read_all_of_it_without_a_complaint():
    dialogues, report = load_dialogues(sorted((DATA / "finetune").glob("*.jsonl")))
    assert len(dialogues) == report.read >= 5000
    pairs, report = load_records(read_pairs, sorted((DATA / "reward").glob("*.jsonl")))
    assert len(pairs) == report.read >= 2500
    prompts, report = load_dialogues(sorted((DATA / "ppo").glob("*.jsonl")))
    assert len(prompts) == report.read >= 500
    documents, report = load_documents([DATA / "pretrain/medical_corpus.txt"])
    assert len(documents) == report.read >= 3 * len(knowledge().entries)
    for name in (*EVAL_DIALOGUES, *DEVELOPMENT):
        load_dialogues([DATA / name])
    load_records(read_pairs, [DATA / "eval/preference_pairs.jsonl"])


def test_every_entry_has_three_different_documents():
    documents = (DATA / "pretrain/medical_corpus.txt").read_text(encoding="utf-8").splitlines()
    assert len(set(documents)) == len(documents)
    for entry in knowledge().entries:
        about = [document for document in documents if entry.fields["name"] in document]
        assert len(about) >= 3, entry.key


# ---------------------------------------------------------------- dialogues


def test_dialogues_have_the_guides_form():
    assert len(read("finetune/train.jsonl")) >= 4000
    assert len(read("finetune/medical_sft_1K_format.jsonl")) == 1000
    for record in training_dialogues():
        assert record.keys() == {"conversations"}
        assert all(turn.keys() == {"from", "value"} for turn in record["conversations"])


def test_dialogues_are_of_every_kind():
    dialogues = training_dialogues()
    with_system = [d for d in dialogues if d["conversations"][0]["from"] == "system"]
    assert 0.1 < len(with_system) / len(dialogues) < 0.3
    n_turns = Counter(sum(turn["from"] == "human" for turn in d["conversations"]) for d in dialogues)
    assert n_turns[2] >= 200
    assert n_turns[3] >= 50
    first_replies = [next(t["value"] for t in d["conversations"] if t["from"] == "gpt") for d in dialogues]
    assert sum("我需要再了解一些情况" in reply for reply in first_replies) >= 100
    assert sum("立即拨打120" in reply for reply in first_replies) >= 100
    assert sum("我不能" in reply for reply in first_replies) >= 50
    questions = [first_question(d) for d in dialogues]
    assert len(set(questions)) == len(questions)
    assert sum(question.isascii() for question in questions) >= 500


def test_all_of_every_seen_entry_is_asked_about():
    unseen = choose_unseen(knowledge())
    replies = {turn["value"] for d in training_dialogues() for turn in d["conversations"] if turn["from"] == "gpt"}
    for entry in knowledge().entries:
        if entry.fields["id"] not in unseen:
            for aspect in MEDICINE_ASPECTS if entry.is_medicine else CONDITION_ASPECTS:
                assert knowledge().reply(entry, aspect) in replies, (entry.key, aspect)


def test_emergencies_are_sent_to_hospital_and_no_reply_gives_a_dose():
    asked_openly = [d for d in training_dialogues() if not is_exam(d)]
    by_question = {first_question(d): d["conversations"][-1]["value"] for d in asked_openly}
    urgent = [entry for entry in knowledge().entries if not entry.is_medicine and entry.fields["urgent"]]
    assert len(urgent) >= 15
    for entry in urgent:
        asked = [question for question in by_question if any(c in question for c in entry.fields["complaints"])]
        assert asked, entry.key
        assert all(re.search("120|ambulance", by_question[question]) for question in asked), entry.key
        assert re.search("120|ambulance", knowledge().reply(entry, "advice"))
    for situation in knowledge().safety:
        if situation["category"] == "emergency":
            assert EMERGENCY.search(situation["reply"]), situation["id"]
    for d in training_dialogues():
        for turn in d["conversations"]:
            assert turn["from"] != "gpt" or not DOSE.search(turn["value"]), turn["value"]


def is_exam(record: dict) -> bool:
    return re.search(r"^E\. ", first_question(record), re.MULTILINE) is not None


def test_exam_questions_in_dialogues_are_asked_and_answered_as_the_stages_do():
    asked = Counter()
    names = {entry.fields["name"]: entry for entry in knowledge().entries}
    for d in filter(is_exam, training_dialogues()):
        question, reply = first_question(d), d["conversations"][-1]["value"]
        options = dict(re.findall(r"^([A-E])\. (.+)$", question, re.MULTILINE))
        form = "tagged" if "<answer>X</answer>" in question else "letter"
        assert question == exam_prompt(question.split("\n")[0], options, form)
        thought, answer, is_closed = split_reply(reply)
        letter = re.fullmatch("<answer>([A-E])</answer>" if form == "tagged" else "([A-E])", answer)[1]
        assert is_closed
        assert bool(thought) is (form == "tagged")
        asked[form] += 1
        asked[letter] += 1
        if thought:
            named, right = re.match("这像是([^，。]+)(?:，该看([^。]+))?。", thought).groups()
            assert named in names
            assert (right or named) == options[letter]
            steps = re.findall("([A-E])是([^，]+)，(不是|对)。", thought)
            assert [(*step, "不是") for step in list(options.items())[: "ABCDE".index(letter)]] == steps[:-1]
            assert steps[-1] == (letter, options[letter], "对")
    assert asked["tagged"] > 500
    assert asked["letter"] > 250
    assert max(asked[letter] for letter in LETTERS) - min(asked[letter] for letter in LETTERS) < 20


def test_only_exam_questions_are_answered_with_thoughts():
    others = [d for d in training_dialogues() if not is_exam(d)]
    assert not [turn["value"] for d in others for turn in d["conversations"] if "think>" in turn["value"]]


def test_lay_words_ask_for_what_the_reply_tells():
    by_question = {first_question(d): d["conversations"][-1]["value"] for d in training_dialogues()}
    n_asked = 0
    for entry in knowledge().entries:
        lay = knowledge().phrasings[entry.language]["lay_questions"][entry.fields["kind"]]
        assert lay["questions"].keys() == set(entry.aspects)
        space = "" if entry.language == "zh" else " "
        ways = [opening.format(n=name) + space for opening in lay["openings"] for name in entry.names]
        for aspect, questions in lay["questions"].items():
            found = [by_question[asked] for way in ways for q in questions if (asked := way + q) in by_question]
            assert set(found) <= {knowledge().reply(entry, aspect)}, (entry.key, aspect)
            n_asked += len(found)
    assert n_asked > 1000


def test_safety_twins_are_as_many_as_promised_and_the_rules_read_their_replies():
    n_asked, kinds = Counter(), Counter()
    for situation in knowledge().safety_twins:
        category, reply = situation["category"], situation["reply"]
        assert sends_to_hospital(reply) if category == "emergency" else refuses_or_warns(reply), reply
        kinds[category, situation["language"]] += 1
        for asked in situation["questions"]:
            n_asked[category] += 1
            if "twin" in asked:
                n_asked[category, "twin"] += 1
                assert not sends_to_emergency_care(asked["twin_reply"]), asked
                assert not refuses(asked["twin_reply"]), asked
                assert words_of(asked["question"]) & words_of(asked["twin"]), asked
    assert n_asked["emergency"] == n_asked["emergency", "twin"] >= 600
    assert n_asked["refusal"] >= 400
    assert n_asked["refusal", "twin"] >= 350
    assert kinds["emergency", "zh"] >= 25
    assert kinds["refusal", "zh"] >= 15
    texts = [text for situation in knowledge().safety_twins for text in strings(situation)]
    assert not [text for text in texts if DOSE.search(text)]


def test_safety_twins_are_learned_bare_and_in_frames_and_the_rest_is_for_ppo():
    by_question = {first_question(d): d["conversations"][-1]["value"] for d in training_dialogues()}
    for are_framed in (False, True):
        for question, reply in safety_exchanges(knowledge(), "train", are_framed):
            assert by_question[question] == reply
    prompts = {first_question(d): d["conversations"][-1]["value"] for d in read("ppo/prompts.jsonl")}
    for question, reply in safety_exchanges(knowledge(), "preference", False):
        assert prompts[question] == reply
        assert question not in by_question
    rng = random.Random(0)
    assert "爸爸胸口疼，" in in_a_frame(knowledge(), "爸爸胸口疼。", True, rng)
    assert in_a_frame(knowledge(), "怎么洗？", False, rng).endswith("，怎么洗？")


# ---------------------------------------------------------------- prompts of PPO


def test_prompts_are_not_in_the_fine_tuning_files_and_hold_every_situation():
    asked = {first_question(d) for d in training_dialogues()}
    prompts = [first_question(d) for d in read("ppo/prompts.jsonl")]
    assert len(set(prompts)) == len(prompts)
    assert not set(prompts) & asked
    for situation in knowledge().safety:
        assert set(situation["questions"]["preference"]) <= set(prompts)
        assert situation["category"] == "about" or len(situation["questions"]["preference"]) >= 8
    assert sum(question.isascii() for question in prompts) >= 100


# ---------------------------------------------------------------- preference pairs


@pytest.mark.parametrize("name", ["reward/train.jsonl", "reward/dpo_zh_500.jsonl", "eval/preference_pairs.jsonl"])
def test_length_alone_tells_nothing(name):
    """ "Longer wins" is right half of the time, and both replies have the same range of lengths."""
    chosen = [len(pair["response_chosen"]) for pair in read(name)]
    rejected = [len(pair["response_rejected"]) for pair in read(name)]
    longer_wins = sum(c > r for c, r in zip(chosen, rejected, strict=True)) / len(chosen)
    assert 0.45 <= longer_wins <= 0.55
    # The chance that some chosen reply is longer than some rejected one (the area under the curve).
    counts = Counter(rejected)
    area = sum(sum(n * ((c > r) + 0.5 * (c == r)) for r, n in counts.items()) / len(rejected) for c in chosen) / len(
        chosen
    )
    assert 0.4 <= area <= 0.6


def test_pairs_have_the_guides_form():
    assert len(read("reward/train.jsonl")) >= 2000
    assert len(read("reward/dpo_zh_500.jsonl")) == 500
    assert len(read("eval/preference_pairs.jsonl")) == 300
    form = {"system", "history", "question", "response_chosen", "response_rejected"}
    assert all(pair.keys() == form for pair in training_pairs())
    assert sum(bool(pair["history"]) for pair in training_pairs()) >= 50
    assert sum(bool(pair["system"]) for pair in training_pairs()) >= 200
    keys = [(pair["question"], pair["response_rejected"]) for pair in training_pairs()]
    assert len(set(keys)) == len(keys)
    assert all(not DOSE.search(pair["response_chosen"]) for pair in training_pairs())


def test_rejected_replies_fail_as_named():
    by_failure = {failure: [] for failure in PROMPTS}
    for pair in read("eval/preference_pairs.jsonl"):
        by_failure[pair["failure"]].append(pair)
    assert min(map(len, by_failure.values())) >= 40
    pools = knowledge().bad_replies
    for failure, pairs in by_failure.items():
        n_longer = sum(len(pair["response_rejected"]) > len(pair["response_chosen"]) for pair in pairs)
        assert 0.3 <= n_longer / len(pairs) <= 0.7, failure
        for pair in pairs:
            chosen, rejected = pair["response_chosen"], pair["response_rejected"]
            if failure == "cut off":
                assert rejected[-1].isalnum(), rejected
                assert rejected.startswith(chosen[:10])
            if failure == "repeats":
                assert re.search(r"(.{4,}?)\s?\1", rejected), rejected
            if failure == "invents a dose":
                assert DOSE.search(rejected), rejected
            if failure == "vague":
                assert any(sentence in rejected for language in pools for sentence in pools[language]["vague"])
            if failure == "ignores a red flag":
                assert EMERGENCY.search(chosen), chosen
                assert any(sentence in rejected for language in pools for sentence in pools[language]["reassuring"])
            if failure == "wrong condition":
                assert not set(names_in(pair["question"])) & set(names_in(rejected)), rejected


def test_alarms_and_refusals_are_rejected_too_where_they_do_not_belong():
    """Else a reward model learns that they are better, whatever was asked, and PPO finds that out."""
    situations = [*knowledge().safety, *knowledge().safety_twins]
    for category in ("emergency", "refusal"):
        replies = {situation["reply"] for situation in situations if situation["category"] == category}
        n_chosen = sum(pair["response_chosen"] in replies for pair in training_pairs())
        n_rejected = sum(pair["response_rejected"] in replies for pair in training_pairs())
        assert n_rejected > 650, category
        assert 0.55 < n_rejected / n_chosen < 1.1, category


def test_nobody_in_danger_has_the_number_to_call_in_despair_rejected():
    situations = [*knowledge().safety, *knowledge().safety_twins]
    replies = {s["reply"] for s in situations if s["category"] in ("emergency", "refusal")}
    in_despair = {reply for reply in replies if "12356" in reply or "crisis line" in reply}
    assert len(in_despair) > 8
    misplaced = [pair for pair in training_pairs() if pair["response_rejected"] in in_despair]
    assert misplaced
    assert not [pair for pair in misplaced if pair["response_chosen"] in replies]


def test_dialogues_ask_about_nearly_all_further_entries_and_the_evaluation_about_none():
    asked = "\n".join(record["conversations"][-2]["value"] for record in training_dialogues()).lower()
    entries = knowledge().more_entries
    assert sum(any(name.lower() in asked for name in entry.names) for entry in entries) > 0.95 * len(entries)
    for part in ("eval", "development"):
        for path in (DATA / part).glob("*.jsonl"):
            assert not [e for e in entries if f'"id": "{e.fields["id"]}:' in path.read_text(encoding="utf-8")]


def test_some_pairs_are_in_words_that_neither_dialogues_nor_held_out_pairs_have():
    def pieces(wording: str) -> list[str]:
        return [piece for piece in re.split(r"\{[^}]*\}", wording) if len(piece.encode()) >= 24]

    kinds = [language[kind] for language in knowledge().phrasings.values() for kind in ("replies", "medicine_replies")]
    frames = [wordings for kind in kinds for wordings in kind.values()]
    known = {piece for wordings in frames for wording in wordings[:2] for piece in pieces(wording)}
    new = tuple({piece for wordings in frames for wording in wordings[2:] for piece in pieces(wording)} - known)
    assert len(new) >= 60

    def is_reworded(reply: str) -> bool:
        return any(piece in reply for piece in new)

    assert 0.1 <= sum(is_reworded(pair["response_chosen"]) for pair in training_pairs()) / len(training_pairs()) <= 0.3
    for d in training_dialogues():
        assert not any(is_reworded(turn["value"]) for turn in d["conversations"] if turn["from"] == "gpt")
    assert not any(is_reworded(pair["response_chosen"]) for pair in read("eval/preference_pairs.jsonl"))


def test_rejected_replies_to_situations_are_bad_sentences_or_off_the_point():
    situations = {
        question: situation
        for situation in knowledge().safety
        for part in ("train", "preference")
        for question in situation["questions"][part]
    }
    pairs = [pair for pair in training_pairs() if pair["question"] in situations]
    assert len({pair["question"] for pair in pairs}) >= 0.7 * len(situations)
    pools = knowledge().bad_replies
    bad = [sentence for pool in pools.values() for kind in ("dangerous", "reassuring") for sentence in pool[kind]]
    off_the_point = [pair for pair in pairs if not any(sentence in pair["response_rejected"] for sentence in bad)]
    assert 0.33 <= len(off_the_point) / len(pairs) <= 0.5
    for pair in pairs:
        assert pair["response_chosen"] == situations[pair["question"]]["reply"]
        assert not re.search("立即拨打|[Cc]all an ambulance", pair["response_rejected"])


def test_pairs_on_twins_reject_calm_words_for_an_emergency_and_alarm_for_its_twin():
    pools = knowledge().bad_replies
    bad = {kind: [s for pool in pools.values() for s in pool[kind]] for kind in ("alarming", "compliant", "unhelpful")}
    by_question = {}
    for situation in knowledge().safety_twins:
        for asked in situation["questions"]:
            by_question[bare(asked["question"])] = (situation["category"], situation["reply"], asked.get("twin_reply"))
            if "twin" in asked:
                twin = f"twin of {situation['category']}"
                by_question[bare(asked["twin"])] = (twin, asked["twin_reply"], situation["reply"])
    elsewhere = {situation["reply"] for situation in [*knowledge().safety, *knowledge().safety_twins]}
    n_pairs, for_the_twin, of_pool = Counter(), Counter(), Counter()
    for pair in training_pairs():
        text = bare(pair["question"])
        about = next((about for question, about in by_question.items() if question in text), None)
        if about is None:
            continue
        category, reply, reply_to_twin = about
        assert pair["response_chosen"] == reply
        rejected = pair["response_rejected"]
        if rejected in elsewhere - {reply_to_twin}:
            continue  # a misplaced one
        n_pairs[category] += 1
        for_the_twin[category] += rejected == reply_to_twin
        pool = {"refusal": "compliant", "twin of emergency": "alarming", "twin of refusal": "unhelpful"}.get(category)
        of_pool[category] += pool is not None and any(sentence in rejected for sentence in bad[pool])
        if category == "emergency":
            assert not sends_to_hospital(rejected), rejected
        if category == "refusal":
            assert not refuses(rejected), rejected
    assert min(n_pairs.values()) > 250
    assert all(0.15 <= for_the_twin[category] / n <= 0.5 for category, n in n_pairs.items()), for_the_twin
    assert all(of_pool[category] / n > 0.2 for category, n in n_pairs.items() if category != "emergency"), of_pool


def names_in(text: str) -> list[str]:
    """The ids of the entries that a text names in full."""
    return [entry.fields["id"] for entry in knowledge().entries if entry.fields["name"].lower() in text.lower()]


# ---------------------------------------------------------------- evaluation


@cache
def learned() -> TrainingText:
    documents = [line for file in (DATA / "pretrain").glob("*.txt") for line in file.read_text("utf-8").splitlines()]
    return TrainingText(
        [
            *documents,
            *map(spoken_text, training_dialogues()),
            *map(spoken_text, training_pairs()),
            *map(spoken_text, [*read("ppo/prompts.jsonl"), *read("exam/train.jsonl")]),
        ]
    )


def test_overlap_is_the_share_of_one_record():
    text = TrainingText(["高血压患者在饮食上需要注意什么？少吃盐。", "糖尿病患者要少吃糖，按时测量血糖。"])
    assert text.overlap("高血压患者，在饮食上需要注意什么") == 1.0
    assert text.overlap("今天天气很好，我们去公园散步吧") == 0.0
    assert text.overlap("糖尿病患者要少吃糖；高血压患者在饮食上") == pytest.approx(2 / 11)


def test_no_evaluation_question_stands_in_the_training_files():
    asked = {first_question(d) for d in [*training_dialogues(), *read("ppo/prompts.jsonl")]}
    asked |= {pair["question"] for pair in training_pairs()}
    for name in (*EVAL_DIALOGUES, *DEVELOPMENT):
        for record in read(name):
            question = first_question(record)
            assert question not in asked
            assert learned().overlap(question) < NEAR_COPY, question
    assert not [r for r in [*training_dialogues(), *training_pairs()] if asks_nearly(r, GUIDE_QUESTIONS)]
    assert not [r for r in [*read("ppo/prompts.jsonl"), *read("exam/train.jsonl")] if asks_nearly(r, GUIDE_QUESTIONS)]
    known = first_question(training_dialogues()[5])
    assert learned().overlap(known) == 1.0


def test_a_short_question_is_near_without_a_run_of_eight_characters():
    for text, is_near in (("感冒了怎么办？", True), ("流感了应该怎么办", True), ("感冒为什么会流鼻涕？", False)):
        pair = {"history": [[text, ""]], "question": "好的", "response_chosen": "", "response_rejected": ""}
        record = {"conversations": [{"from": "human", "value": text}, {"from": "gpt", "value": GUIDE_QUESTIONS[0]}]}
        assert asks_nearly(pair, GUIDE_QUESTIONS) is asks_nearly(record, GUIDE_QUESTIONS) is is_near, text


def test_every_emergency_has_a_twin_that_shares_words_with_it():
    for folder, n_pairs in (("eval", 100), ("development", 40)):
        pairs: dict[str, dict[str, dict]] = {}
        for record in read(f"{folder}/emergency_twins.jsonl"):
            assert record["id"] == f"{record['pair']}:{record['category']}"
            pairs.setdefault(record["pair"], {})[record["category"]] = record
        assert len(pairs) == n_pairs
        for name, pair in pairs.items():
            assert pair.keys() == {"emergency", "twin"}, name
            assert words_of(first_question(pair["emergency"])) & words_of(first_question(pair["twin"])), name
            assert not any(DOSE.search(record["conversations"][-1]["value"]) for record in pair.values()), name
    assert len(read("eval/unsafe_requests.jsonl")) == 60
    assert len(read("development/unsafe_requests.jsonl")) == 20


def words_of(text: str) -> set[str]:
    """The words of an English text, the pairs of neighbouring characters of a Chinese one."""
    if text.isascii():
        return set(re.findall(r"[a-z']+", text.lower()))
    return {pair for pair in map("".join, pairwise(text)) if pair.isalnum()}


def test_development_items_are_about_other_situations_than_held_out_ones_and_in_other_words():
    held_out = TrainingText(first_question(record) for name in EVAL_DIALOGUES for record in read(name))
    for name in DEVELOPMENT:
        for record in read(name):
            assert held_out.overlap(first_question(record)) < 0.2, record["id"]
    for name in SAFETY:
        situations = {"held_out": set(), "development": set()}
        for situation in read(f"knowledge/{name}.jsonl"):
            situations[situation["part"]].add(situation["id"])
        assert not situations["held_out"] & situations["development"]


def test_no_evaluation_pair_and_no_exam_item_stands_in_the_training_files():
    replies = {pair[key] for pair in training_pairs() for key in ("response_chosen", "response_rejected")}
    for pair in read("eval/preference_pairs.jsonl"):
        assert learned().overlap(pair["question"]) < NEAR_COPY
        assert learned().overlap(spoken_text(pair | {"history": []})) < NEAR_COPY
        assert pair["response_chosen"] not in replies
        assert pair["response_rejected"] not in replies
    for item in read("eval/exam.jsonl"):
        assert learned().overlap(item["question"]) < NEAR_COPY
        assert learned().overlap(spoken_text(item)) < NEAR_COPY


def test_unseen_conditions_are_in_the_pretraining_text_only():
    unseen = [e for e in knowledge().entries if e.fields["id"] in choose_unseen(knowledge())]
    assert len({entry.fields["id"] for entry in unseen}) == 15
    asked = {record["id"].split(":")[1] for record in read("eval/unseen_conditions.jsonl")}
    assert asked == {entry.fields["id"] for entry in unseen}
    pretraining = (DATA / "pretrain/medical_corpus.txt").read_text(encoding="utf-8")
    elsewhere = json.dumps([training_dialogues(), training_pairs(), read("eval/questions.jsonl")], ensure_ascii=False)
    for entry in unseen:
        assert entry.fields["name"] in pretraining
        assert not [name for name in entry.names if name.lower() in elsewhere.lower()], entry.key


def test_questions_name_what_a_right_answer_names():
    assert len(read("eval/questions.jsonl")) == 500
    for record in read("eval/questions.jsonl") + read("eval/unseen_conditions.jsonl"):
        reply = record["conversations"][-1]["value"]
        assert any(name.lower() in reply.lower() for name in record["names"]), record["id"]


@pytest.mark.parametrize(("name", "n_items"), [("eval/exam.jsonl", 300), ("exam/train.jsonl", 1806)])
def test_exam_has_one_right_letter_and_options_of_one_kind(name, n_items):
    exam = read(name)
    assert len(exam) == n_items
    counts = Counter(item["answer"] for item in exam).values()
    assert max(counts) - min(counts) <= 1
    names = {entry.fields["name"]: entry for entry in knowledge().entries}
    departments = {e.fields["department"] for e in knowledge().entries}
    right_is_longest = 0
    for item in exam:
        options = list(item["option"].values())
        assert tuple(item["option"]) == tuple(LETTERS)
        assert len(set(options)) == 5
        kind = departments if "department" in item["id"] else names.keys()
        assert set(options) <= set(kind)
        right = item["option"][item["answer"]]
        assert all(abs(len(option) - len(right)) <= max(2, len(right) // 3) for option in options)
        right_is_longest += len(right) > max(len(option) for option in options if option != right)
    assert right_is_longest / len(exam) < 0.3


def test_new_entries_leave_other_dialogues_as_they_are():
    whole = knowledge()
    fewer = replace(whole, entries=whole.entries[:-1])
    before, after = ({json.dumps(d) for d in build_dialogues(k, set())} for k in (fewer, whole))
    assert before <= after


def test_readme_counts_are_right():
    text = (DATA / "README.md").read_text(encoding="utf-8")
    listed = dict(re.findall(r"^\| `([\w/.]+)` \| ([\d,]+) \| \D", text, re.MULTILINE))
    assert len(listed) == 29
    for name, count in listed.items():
        assert (DATA / name).read_text(encoding="utf-8").count("\n") == int(count.replace(",", "")), name
    stated = re.findall(
        r"(\d+) (?:more )?conditions and (\d+) medicines in Chinese, (\d+) and (\d+) of them in English", text
    )
    order = [("zh", "condition"), ("zh", "medicine"), ("en", "condition"), ("en", "medicine")]
    for name, counts in zip(ENTRY_FILES, stated, strict=True):
        kinds = Counter((entry["language"], entry["kind"]) for entry in read(f"knowledge/{name}"))
        assert [int(count) for count in counts] == [kinds[key] for key in order], name
