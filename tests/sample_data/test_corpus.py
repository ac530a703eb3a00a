"""The embedded base model's text: what is told, in how many ways, and what never is."""

import json
import random
import re
from functools import cache
from pathlib import Path

import build_sample_data
import pytest

from medtune.sample_data.corpus import GUIDE_QUESTIONS, CorpusCounts, HeldOut, draw_corpus, read_held_out, shelves_of
from medtune.sample_data.corpus_forms import ALTERNATIVES, FORMS, Composer, aspects_of, copying, reasoning, riddle
from medtune.sample_data.evaluation import NEAR_COPY, TrainingText
from medtune.sample_data.knowledge import choose_unseen, read_knowledge

DATA = Path(__file__).resolve().parents[2] / "data"
DOSE = re.compile(r"\d+ ?(毫克|微克|mg|μg|单位|片|粒|milligrams?|tablets?)")
N_DOCUMENTS = 500


@cache
def knowledge():
    return read_knowledge(DATA / "knowledge")


@cache
def shelves():
    return shelves_of(knowledge(), choose_unseen(knowledge()))


@cache
def held_out() -> HeldOut:
    return read_held_out(knowledge(), DATA / "eval")


@cache
def documents() -> tuple[str, ...]:
    return tuple(draw_corpus(shelves(), held_out(), CorpusCounts(), N_DOCUMENTS))


def composer(name: str, seed: int = 0) -> Composer:
    shelf, entry = next((shelf, e) for shelf in shelves() for e in shelf.entries if name in e.names)
    return Composer(shelf, entry, random.Random(seed))


def strings(value: object) -> list[str]:
    if isinstance(value, str):
        return [value]
    return [text for part in (value.values() if isinstance(value, dict) else value) for text in strings(part)]


# ---------------------------------------------------------------- what is held out


def test_held_out_are_the_items_of_the_evaluation_the_guides_questions_and_the_unseen_conditions():
    texts = set(held_out().texts)
    assert set(GUIDE_QUESTIONS) < texts
    assert sum(text.startswith("普通感冒多由病毒引起") for text in texts) == 1
    for path in (DATA / "eval").glob("*.jsonl"):
        for line in path.read_text(encoding="utf-8").splitlines():
            item = json.loads(line)
            assert (item["question"] if "question" in item else item["conversations"][0]["value"]) in texts
    unseen = [entry for entry in knowledge().entries if entry.fields["id"] in choose_unseen(knowledge())]
    assert all(held_out().names.fullmatch(name.upper()) for entry in unseen for name in entry.names)


def test_overlap_is_the_share_of_a_held_out_text():
    two = HeldOut(["丹毒"], ["高血压患者在饮食上需要注意什么？", "怎样预防？"])
    assert two.overlap("有人问高血压患者在饮食上需要注意什么，没有人答") == (1.0, "高血压患者在饮食上需要注意什么？")
    share, text = two.overlap("高血压患者在饮食上要当心")
    assert (share, text) == (pytest.approx(2 / 8), "高血压患者在饮食上需要注意什么？")
    assert two.overlap("今天天气很好，我们去公园散步") == (0.0, "")


def test_a_document_that_tells_what_is_held_out_is_drawn_again():
    banned = HeldOut(["高血压", "high blood pressure"], [documents()[0]])
    counts = CorpusCounts()
    drawn = list(draw_corpus(shelves(), banned, counts, 300))
    assert len(drawn) == counts.n_documents == 300
    assert documents()[0] not in drawn
    assert not [text for text in drawn if "高血压" in text or "high blood pressure" in text.lower()]
    assert counts.drawn_again["with a held-out name"] > 0
    assert counts.drawn_again["too near to an item of the evaluation"] > 0
    assert str(counts).startswith("300 documents, ")


def check_leaks(texts: list[str]) -> None:
    """By the index of the other side: no text of the evaluation stands in a document, whole or by half."""
    joined = "\n".join(re.sub(r"[\W_]+", "", text.lower()) for text in texts)
    for text in held_out().texts:
        assert re.sub(r"[\W_]+", "", text.lower()) not in joined, text
    assert max(held_out().overlap(text)[0] for text in texts) < NEAR_COPY
    assert not held_out().names.search("\n".join(texts))


def test_a_sample_holds_nothing_of_the_evaluation():
    check_leaks(list(documents()))
    index = TrainingText(documents())
    assert all(index.overlap(text) < NEAR_COPY for text in held_out().texts)
    held_out_complaints = [entry.fields["complaints"][2] for entry in knowledge().entries if not entry.is_medicine]
    assert not [complaint for complaint in held_out_complaints if complaint in "\n".join(documents())]


@pytest.mark.slow
def test_the_whole_corpus_holds_nothing_of_the_evaluation(tmp_path, capsys):
    build_sample_data.main(["--data_dir", str(DATA), "--corpus", str(tmp_path / "corpus.jsonl")])
    print(capsys.readouterr().out)
    lines = (tmp_path / "corpus.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) == build_sample_data.N_CORPUS_DOCUMENTS
    texts = [json.loads(line)["text"] for line in lines]
    assert tuple(texts[:N_DOCUMENTS]) == documents()
    assert not [text for text in texts if DOSE.search(text)]
    check_leaks(texts)


# ---------------------------------------------------------------- what is told


def test_the_script_writes_the_same_documents_each_time(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(build_sample_data, "N_CORPUS_DOCUMENTS", 40)
    path = tmp_path / "below/corpus.jsonl"
    contents = []
    for _ in range(2):
        build_sample_data.main(["--data_dir", str(DATA), "--corpus", str(path)])
        contents.append(path.read_bytes())
    assert contents[0] == contents[1]
    assert [json.loads(line) for line in contents[0].splitlines()] == [{"text": text} for text in documents()[:40]]
    assert re.search(r"40 documents, [\d,]+ characters; .*nearest to what is held out: 0\.", capsys.readouterr().out)


def test_documents_are_plain_text_without_doses_or_words_of_a_chat_template():
    for text in documents():
        assert not re.search(r"[\[\]{}|<]|im_start|\bassistant\b|\buser\b", text), text
        assert not DOSE.search(text), text
        assert text == text.strip()


def test_every_seen_entry_is_told_equally_often():
    turns = [entry for shelf in shelves() for entry in shelf.entries]
    unseen = choose_unseen(knowledge())
    assert not [entry for entry in turns if entry.fields["id"] in unseen]
    assert {entry.key for entry in knowledge().entries if entry.fields["id"] not in unseen} < {e.key for e in turns}
    n_more = len((DATA / "knowledge/more_conditions.jsonl").read_text(encoding="utf-8").splitlines())
    assert len(turns) == len(knowledge().entries) - sum(e.fields["id"] in unseen for e in knowledge().entries) + n_more


def test_a_sentence_has_the_name_or_the_word_that_stands_for_it():
    for shelf in shelves():
        for number, entry in enumerate(shelf.entries):
            c = Composer(shelf, entry, random.Random(number))
            for aspect in aspects_of(entry):
                sentence = c.sentence(entry, aspect, "NAME")
                assert any(name.lower() in sentence.lower() for name in ["NAME", *entry.names]), sentence


def test_a_fact_is_told_in_many_wordings_and_the_name_comes_first_and_last():
    c = composer("急性支气管炎")
    told = {c.sentence(c.entry, "symptoms", "急性支气管炎") for _ in range(300)}
    frames = {re.sub("|".join(c.entry.fields["symptoms"]), "", sentence) for sentence in told}
    assert len(frames) > 100
    before = [s for s in told if "低热几天即退" in s and s.index("急性支气管炎") > s.index("低热几天即退")]
    after = [s for s in told if "低热几天即退" in s and s.index("急性支气管炎") < s.index("低热几天即退")]
    assert len(before) > 20 < len(after)


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
def test_each_form_differs_from_draw_to_draw(form):
    for shelf in shelves():
        drawn = {form(Composer(shelf, entry, random.Random(n))) for n, entry in enumerate(shelf.entries[:40])}
        assert len(drawn - {None}) >= 15


def test_every_aspect_has_wordings_headings_and_questions():
    for shelf in shelves():
        for entry in shelf.entries:
            for aspect in aspects_of(entry):
                assert shelf.forms[entry.fields["kind"]][aspect], aspect
                assert shelf.forms["questions"][entry.fields["kind"]][aspect]
                assert shelf.forms["headings"][aspect]


def test_alternatives_are_closed_and_not_nested():
    for text in strings([shelf.forms for shelf in shelves()]):
        assert not re.search(r"[\[\]|]", ALTERNATIVES.sub("", text)), text


def test_an_emergency_is_told_with_the_ambulance():
    c = composer("急性心肌梗死")
    for seed in range(60):
        for form in (reasoning, riddle):
            document = form(composer("急性心肌梗死", seed))
            assert document is None or "120" in document
        assert "120" in c.sentence(c.entry, "department", "心梗")


def test_a_riddle_does_not_tell_the_name_before_the_answer_and_reasoning_ends_with_it():
    for seed in range(40):
        assert (document := reasoning(composer("偏头痛", seed)))
        assert re.search("偏头痛|头痛", document)
        if document := riddle(composer("痛风", seed)):
            clue = re.split("。|？|：|\n", document)
            assert "痛风" not in "".join(clue[:2])


def test_what_is_copied_stands_there_twice():
    for seed in range(60):
        document = copying(composer("偏头痛", seed))
        runs = [document[start : start + 2] for start in range(len(document) - 1)]
        assert len(set(runs)) < len(runs), document


# ---------------------------------------------------------------- what continued pretraining adds


def test_the_new_documents_are_about_the_conditions_that_the_corpus_leaves_out():
    new = (DATA / "pretrain/new_conditions.txt").read_text(encoding="utf-8").splitlines()
    assert len(new) == len(set(new)) == build_sample_data.N_NEW_DOCUMENTS
    assert sum(bool(held_out().names.search(document)) for document in new) > 0.9 * len(new)
    assert max(held_out().overlap(document)[0] for document in new) < NEAR_COPY
    unseen = [entry for entry in knowledge().entries if entry.fields["id"] in choose_unseen(knowledge())]
    for entry in unseen:
        told = sum(any(name.lower() in document.lower() for name in entry.names) for document in new)
        assert told > 10, entry.key
