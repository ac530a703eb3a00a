"""Convert dialogues or preference pairs from the form they are in to the guide's, which the stages read.

Reads jsonl, json, csv (UTF-8, GB18030 or GBK, UTF-16) and parquet, one file or all below a folder, the text files
compressed or not, or a data set of the hub (--dataset_name). Known are the guide's raw lines, every form that the
stages read, and the columns of published sets, such as Toyhom's Chinese-medical-dialogue-data, HuatuoGPT-sft-data-v1,
HuatuoGPT-o1, CMtMedQA and HealthCareMagic-100k. Other columns are named by flags. Exam questions (CMB, CMExam, MedQA,
MedMCQA) become the prompts of the evaluation, with the right letter as the reply.

    python scripts/convert_data_format.py --input raw.jsonl --output data/finetune/train.jsonl --format sft
    python scripts/convert_data_format.py --input raw.jsonl --output data/reward/train.jsonl --format dpo
    python scripts/convert_data_format.py --input my.csv --output data/finetune/my.jsonl --format sft \\
        --question_column 主诉 --answer_column 医嘱
"""

import argparse
import sys
from pathlib import Path
from typing import get_args

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from medtune.errors import UserError, run_script
from medtune.output_files import new_text_file, refuse_same
from medtune.reading.exams import ExamFormat
from medtune.reading.finding import RecordFile, find_records, some_names
from medtune.reading.foreign_forms import ForeignReader, add_reading_flags, reader_of
from medtune.reading.guide_form import guide_line
from medtune.reading.hub_data import add_records_flags
from medtune.reading.records import Report
from medtune.reading.words import dropped_lines, unread_lines

KINDS = {"sft": "dialogues", "dpo": "pairs"}
ENDINGS = (".jsonl", ".jsonl.gz")


def convert(reader: ForeignReader, files: list[RecordFile], output: Path, overwrite: bool) -> Report:
    """Write every usable record; raises UserError if there is none."""
    report = Report()
    with new_text_file(output, "--output", overwrite) as file:
        for record in report.usable(tqdm(reader.read(files), unit=" records", disable=None)):
            file.write(guide_line(record))
        if not report.kept:
            raise UserError(nothing_kept(files, report, reader))
    return report


def nothing_kept(files: list[RecordFile], report: Report, reader: ForeignReader) -> str:
    if not report.read:
        return f"{some_names(files)}: there are no records in it"
    lines = [f"none of {report.read:,} records can be used:", *dropped_lines(report), *reader.describe()]
    if "unknown keys" in report.dropped or "no pair" in report.dropped:
        lines.append(f"say which columns are meant: {reader.column_flags}")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    """Parse the flags, convert, say what was kept, dropped and found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_records_flags(parser, "--input", "a file, or a folder and all below it")
    parser.add_argument("--output", required=True, type=Path, help="the new .jsonl file, or .jsonl.gz")
    parser.add_argument("--format", required=True, choices=tuple(KINDS), help="sft: dialogues; dpo: preference pairs")
    parser.add_argument("--overwrite", action="store_true", help="replace the output if it exists")
    parser.add_argument(
        "--exam_format", choices=get_args(ExamFormat), default="letter",
        help="sft: exam questions ask for the letter at once, or for thinking and <answer>X</answer> (tagged)",
    )  # fmt: skip
    add_reading_flags(parser)
    args = parser.parse_args(argv)

    reader = reader_of(args, KINDS[args.format], args.exam_format if args.format == "sft" else None)
    if not args.output.name.lower().endswith(ENDINGS):
        raise UserError(f"--output {args.output}: one record a line is written; let it end in {' or '.join(ENDINGS)}")
    files, unread = find_records(args.input, args.dataset_name, "--input")
    refuse_same(files, args.output, "--output")
    report = convert(reader, files, args.output, args.overwrite)

    print(f"{args.output}: {report.summary()}")
    for line in [*dropped_lines(report), *reader.describe(), *unread_lines(unread)]:
        print(line)


if __name__ == "__main__":
    run_script(main)
