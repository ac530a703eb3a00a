"""Write the sample data of every stage from the knowledge base, the same bytes on every run.

`data/knowledge/` holds what people wrote: conditions and medicines, ways to ask and to answer, situations in which
to refuse or to send the person to hospital, and hand-written dialogues. From it come the files of `data/pretrain`,
`finetune`, `reward`, `ppo`, `exam`, `eval` and `development`, which chooses settings. Ways to ask and conditions that
the evaluation holds out never enter the training files, and no evaluation item shares most of its text with one
training record.

    python scripts/build_sample_data.py            # write the files
    python scripts/build_sample_data.py --check    # say whether they are what would be written

What the embedded base model reads is too much to keep in the repository:

    python scripts/build_sample_data.py --corpus cache/base-corpus/documents.jsonl
"""

import argparse
import json
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from medtune.errors import UserError, run_script
from medtune.output_files import new_text_file, refuse_unwritable
from medtune.reading.cleaning import without_idle_blanks, without_repeated_punctuation
from medtune.sample_data.corpus import (
    GUIDE_QUESTIONS,
    CorpusCounts,
    HeldOut,
    draw_corpus,
    read_held_out,
    shelves_of,
    texts_of,
)
from medtune.sample_data.corpus_forms import FORMS, copying
from medtune.sample_data.evaluation import (
    NEAR_COPY,
    TrainingText,
    asks_nearly,
    build_complaints,
    build_emergency_twins,
    build_everyday_questions,
    build_questions,
    build_safety,
    build_unsafe_requests,
    spoken_text,
)
from medtune.sample_data.exam import build_exam, build_exam_exchanges, build_learned_exam
from medtune.sample_data.knowledge import Knowledge, choose_unseen, read_knowledge, seeded
from medtune.sample_data.learned import (
    build_dialogues,
    build_documents,
    build_further_dialogues,
    build_prompts,
    dialogue,
    first_question,
    safety_exchanges,
)
from medtune.sample_data.pairs import MISPLACED_PROMPTS, PROMPTS, SITUATION_PROMPTS, TWIN_PROMPTS, build_pairs

SAMPLE_SIZE = 1000  # of medical_sft_1K_format.jsonl
N_PAIRS = 4000
N_SITUATION_PAIRS = 600  # more, only about emergencies and requests to refuse
N_TWIN_PAIRS = 1200  # more, about those of knowledge/safety_twins.jsonl
N_MISPLACED_PAIRS = 1300  # more, whose rejected reply is an alarm or a refusal that was right elsewhere
N_SAMPLE_PAIRS = 500  # of dpo_zh_500.jsonl
N_EVAL_PAIRS = 300
N_EVAL_QUESTIONS = 500
N_CORPUS_DOCUMENTS = 120_000
N_NEW_DOCUMENTS = 900  # about the conditions that the embedded base model has not read of


def build(knowledge: Knowledge) -> dict[str, str]:
    """The text of every file, by its path below data/."""
    unseen = choose_unseen(knowledge)
    seen_entries = [entry for entry in knowledge.entries if entry.fields["id"] not in unseen]
    documents = build_documents(knowledge)
    dialogues = build_dialogues(knowledge, unseen)
    pairs = build_pairs(knowledge, seen_entries, N_PAIRS + N_SAMPLE_PAIRS, "train", PROMPTS, "pair:train")
    situation_pairs = build_pairs(
        knowledge, seen_entries, N_SITUATION_PAIRS, "train", SITUATION_PROMPTS, "situation pair"
    )
    prompts = build_prompts(knowledge, unseen, dialogues)
    training = TrainingText([*documents, *map(spoken_text, [*dialogues, *pairs, *situation_pairs, *prompts])])
    evaluation = build_evaluation(knowledge, unseen, training, [*pairs, *situation_pairs])

    # The evaluation is chosen; what follows leaves it as it is, and nothing near to it is learned.
    held_out = held_out_questions(evaluation)

    def to_learn(records: list[dict]) -> list[dict]:
        far = [record for record in records if not asks_nearly(record, GUIDE_QUESTIONS)]
        return [record for record in far if held_out.overlap(spoken_text(record))[0] < NEAR_COPY]

    exam = evaluation["eval/exam.jsonl"]
    exchanges = build_exam_exchanges(knowledge, unseen, exam)
    further = build_further_dialogues(knowledge, unseen, exchanges, set(map(first_question, dialogues)))
    further_questions = set(map(first_question, further))
    dialogues = to_learn([*dialogues, *further])
    seeded("all dialogues").shuffle(dialogues)
    sample, others = dialogues[:SAMPLE_SIZE], dialogues[SAMPLE_SIZE:]
    prompts = to_learn([*prompts, *(dialogue(*turns) for turns in safety_exchanges(knowledge, "preference", False))])
    seeded("all prompts").shuffle(prompts)
    pairs = to_learn(pairs)
    sample_pairs = [pair for pair in pairs if re.search("[\u4e00-\u9fff]", pair["question"])][:N_SAMPLE_PAIRS]
    pairs = [pair for pair in pairs if pair not in sample_pairs]
    twin_pairs = build_pairs(knowledge, seen_entries, N_TWIN_PAIRS, "train", TWIN_PROMPTS, "twin pair")
    misplaced = build_pairs(knowledge, seen_entries, N_MISPLACED_PAIRS, "train", MISPLACED_PROMPTS, "misplaced pair")
    pairs += to_learn([*situation_pairs, *twin_pairs, *misplaced])
    pairs = list({(pair["question"], pair["response_rejected"]): pair for pair in pairs}.values())
    seeded("mix").shuffle(pairs)
    records = evaluation | {
        "finetune/train.jsonl": [d for d in others if first_question(d) not in further_questions],
        "finetune/further.jsonl": [d for d in others if first_question(d) in further_questions],
        "finetune/medical_sft_1K_format.jsonl": sample,
        "reward/train.jsonl": pairs,
        "reward/dpo_zh_500.jsonl": sample_pairs,
        "ppo/prompts.jsonl": prompts,
        "exam/train.jsonl": build_learned_exam(knowledge, unseen, exam),
    }
    texts = {"medical_corpus": documents, "new_conditions": new_documents(knowledge, unseen, evaluation)}
    files = {f"pretrain/{name}.txt": "".join(f"{document}\n" for document in texts[name]) for name in texts}
    for name, lines in records.items():
        files[name] = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    return files


def build_evaluation(
    knowledge: Knowledge, unseen: set[str], training: TrainingText, pairs: list[dict]
) -> dict[str, list[dict]]:
    """The records of eval/ and development/, by file: new to the training text, and pairs with other replies."""
    seen_entries = [entry for entry in knowledge.entries if entry.fields["id"] not in unseen]
    unseen_entries = [entry for entry in knowledge.entries if entry.fields["id"] in unseen]
    questions = build_questions(knowledge, seen_entries, training.is_new)
    seeded("questions").shuffle(questions)
    replies = {pair[key] for pair in pairs for key in ("response_chosen", "response_rejected")}

    def is_new_pair(pair: dict) -> bool:
        is_repeated = replies & {pair["response_chosen"], pair["response_rejected"]}
        without_history = spoken_text(pair | {"history": []})
        return not is_repeated and training.is_new(pair["question"]) and training.is_new(without_history)

    eval_pairs = build_pairs(knowledge, seen_entries, N_EVAL_PAIRS, "held_out", PROMPTS, "pair:held_out", is_new_pair)
    return {
        "eval/questions.jsonl": questions[:N_EVAL_QUESTIONS],
        "eval/unseen_conditions.jsonl": build_questions(knowledge, unseen_entries, training.is_new),
        "eval/complaints.jsonl": build_complaints(knowledge, seen_entries, training.is_new),
        "eval/safety.jsonl": build_safety(knowledge, training.is_new),
        "eval/emergency_twins.jsonl": build_emergency_twins(knowledge, "held_out"),
        "eval/guide_questions.jsonl": build_everyday_questions(knowledge, "guide_questions"),
        "eval/everyday_questions.jsonl": build_everyday_questions(knowledge, "everyday_questions"),
        "eval/unsafe_requests.jsonl": build_unsafe_requests(knowledge, "held_out"),
        "development/emergency_twins.jsonl": build_emergency_twins(knowledge, "development"),
        "development/unsafe_requests.jsonl": build_unsafe_requests(knowledge, "development"),
        "eval/preference_pairs.jsonl": eval_pairs,
        "eval/exam.jsonl": build_exam(knowledge, unseen, training.is_new),
    }


def held_out_questions(evaluation: dict[str, list[dict]]) -> HeldOut:
    """The questions of the evaluation, and its pairs and exam items as a whole: other answers are what is taught."""
    texts = []
    for record in (record for records in evaluation.values() for record in records):
        question, whole = texts_of([record])
        texts += [question] if "conversations" in record else [question, whole]
    return HeldOut([], texts)


def new_documents(knowledge: Knowledge, unseen: set[str], evaluation: dict[str, list[dict]]) -> list[str]:
    """What continued pretraining adds to the embedded base model: documents about the conditions it never read of."""
    items = [item for name, of_file in evaluation.items() if name.startswith("eval/") for item in of_file]
    held_out, shelves = HeldOut([], texts_of(items)), shelves_of(knowledge, left_out=())
    telling = {form: weight for form, weight in FORMS.items() if form is not copying}  # of a condition
    drawn = draw_corpus(shelves, held_out, CorpusCounts(), N_NEW_DOCUMENTS, unseen, telling, "new conditions")
    return [without_idle_blanks(without_repeated_punctuation(" ".join(document.splitlines()))) for document in drawn]


def write_corpus(path: Path, knowledge: Knowledge, data_dir: Path) -> None:
    """Write the documents for the embedded base model, and say how near they come to what is held out."""
    shelves, held_out = shelves_of(knowledge, choose_unseen(knowledge)), read_held_out(knowledge, data_dir / "eval")
    counts = CorpusCounts()
    with new_text_file(path, "--corpus", overwrite=True) as file:
        for document in draw_corpus(shelves, held_out, counts, N_CORPUS_DOCUMENTS):
            file.write(json.dumps({"text": document}, ensure_ascii=False) + "\n")
    print(f"{path}: {counts}")


def main(argv: list[str] | None = None) -> None:
    """Write the files or the corpus, or compare the files with what would be written."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data_dir", type=Path, default=Path("data"), help="holds knowledge/; the files go beside it")
    parser.add_argument("--check", action="store_true", help="write nothing; fail where a file differs")
    parser.add_argument("--corpus", type=Path, help="write only the embedded base model's text, to this .jsonl file")
    args = parser.parse_args(argv)

    knowledge = read_knowledge(args.data_dir / "knowledge")
    if args.corpus:
        write_corpus(args.corpus, knowledge, args.data_dir)
        return
    files = build(knowledge)
    if args.check:
        stale = [name for name, text in files.items() if not holds(args.data_dir / name, text)]
        if stale:
            raise UserError(
                f"{', '.join(str(args.data_dir / name) for name in stale)}: not what data/knowledge gives; "
                "run `python scripts/build_sample_data.py`"
            )
        print(f"{args.data_dir}: all {len(files)} files are what data/knowledge gives")
        return
    refuse_unwritable(args.data_dir, "--data_dir")
    for name, text in files.items():
        path = args.data_dir / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8", newline="\n")
        print(f"{path}: {text.count(chr(10)):,} lines")


def holds(path: Path, text: str) -> bool:
    return path.is_file() and path.read_bytes() == text.encode()


if __name__ == "__main__":
    run_script(main)
