"""Convert texts, dialogues or pairs to what continued pretraining reads: plain text, one document a line.

Reads txt, markdown, html, jsonl, json, csv and parquet, one file or all below a folder, the text files compressed or
not. A line of a .txt is a document, and so is a whole .md or .html, unless `--split` says otherwise; of a record, its
text, what is said in its dialogue, or its question and better reply. Front matter, markdown's marks and HTML's tags
are taken out, and line breaks inside a document become spaces.

    python scripts/convert_to_pretrain_format.py --input_file your_medical_data.jsonl \\
        --output_file data/pretrain/medical_corpus.txt
    python scripts/convert_to_pretrain_format.py --input_file textbooks/ --output_file data/pretrain/books.txt \\
        --split paragraph --min_length 20
"""

import argparse
import re
import sys
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from medtune.errors import Unusable, UserError, run_script
from medtune.output_files import new_text_file, refuse_same
from medtune.reading.conversations import lone_reply
from medtune.reading.files import open_text
from medtune.reading.finding import RECORD_ENDINGS, RecordFile, display_path, ending_of, find_records, some_names
from medtune.reading.foreign_forms import ForeignReader, add_reading_flags, reader_of
from medtune.reading.html_text import without_html
from medtune.reading.hub_data import add_records_flags
from medtune.reading.keys import check_media, sort_keys
from medtune.reading.records import BadRecord, Dialogue, Pair, Report
from medtune.reading.values import holds_nothing, text_of
from medtune.reading.words import dropped_lines, unread_lines

MARKDOWN = (".md", ".markdown")
ENDINGS = (".txt", *MARKDOWN, ".html", ".htm", *RECORD_ENDINGS)
TEXT_COLUMNS = ("text", "content", "contents", "article", "body", "abstract", "document", "正文", "内容")
TITLE_COLUMNS = ("title", "标题")

# ---------------------------------------------------------------- markdown

# By patterns: a parser of CommonMark makes 234 cm of 2*3*4 cm, and leaves the marks of **注意：**请 where they are.
FRONT_MATTER = re.compile(r"\A\s*(---|\+\+\+)[ \t]*\n(?=\s*[\w\"'-]+\s*[:=]).*?\n\1[ \t]*(\n|\Z)", re.DOTALL)
MARKS = [
    (re.compile(pattern, re.MULTILINE), replacement)
    for pattern, replacement in (
        (r"^[ \t]*(```|~~~).*$", ""),  # fences; what is between them stays
        (r"^[ \t]*(?:([-*_])[ \t]*)(?:\1[ \t]*){2,}$", ""),  # rules
        (r"^[ \t]*\|?[ \t:]*-{2,}[-| \t:]*$", ""),  # the line below the head of a table
        (r"^[ \t]*={3,}[ \t]*$", ""),  # the line below a heading
        (r"^[ \t]*\[[^\]\n]+\]:[ \t]*\S+.*$", ""),  # where links lead
        (r"^[ \t]*(>[ \t]*)+", ""),  # quotations
        (r"^[ \t]*#{1,6}[ \t]+|[ \t]+#+[ \t]*$", ""),  # headings
        (r"^[ \t]*[-*+][ \t]+(\[[ xX]\][ \t]+)?", ""),  # items
        (r"!?\[([^\]\n]*)\]\([^)\n]*\)", r"\1"),  # links and pictures
        (r"!?\[([^\]\n]+)\]\[[^\]\n]*\]", r"\1"),
        (r"<(https?://[^>\s]+)>", r"\1"),
        (r"(\*{2,3}|~~)(?=\S)([^*~\n]+?)(?<=\S)\1", r"\2"),  # emphasis
        (r"(?<![\d*])\*(?=[^\s*])([^*\n]+?)(?<=\S)\*(?![\d*])", r"\1"),  # but 2*3*4 cm stays
        (r"(?<![A-Za-z0-9_])(_{1,3})(?=\S)([^_\n]+?)(?<=\S)\1(?![A-Za-z0-9_])", r"\2"),
        (r"`+([^`\n]+)`+", r"\1"),
        (r"[ \t]*(?<!\\)\|[ \t]*", " "),  # cells
        (r"\\([\\`*_{}\[\]()#+\-.!|>~])", r"\1"),  # escapes
    )
]


def without_marks(text: str) -> str:
    """Markdown as plain text."""
    text = FRONT_MATTER.sub("", text)
    for pattern, replacement in MARKS:
        text = pattern.sub(replacement, text)
    return text


# ---------------------------------------------------------------- documents


class DocumentReader:
    """Reads the documents of files of any kind, each as one line of text or as a BadRecord."""

    def __init__(self, dialogues: ForeignReader, pairs: ForeignReader, text_column: str, split: str, min_length: int):
        self.dialogues = dialogues
        self.pairs = pairs
        self.text_column = text_column
        self.split = split
        self.min_length = min_length
        self.keys_of_pairs: set[tuple[str, ...]] = set()

    def read(self, files: Iterable[RecordFile]) -> Iterator[str | BadRecord]:
        """One result a document, in order."""
        for path in files:
            pieces = self.dialogues.read_raw(path) if ending_of(path) in RECORD_ENDINGS else self.read_text_file(path)
            for source, piece in pieces:
                try:
                    yield self.document(piece, source)
                except Unusable as error:
                    yield BadRecord(source, error.reason, error.detail)

    def read_text_file(self, path: Path) -> Iterator[tuple[str, str]]:
        """(source, text) of the lines, the paragraphs or all of a file."""
        is_markdown = ending_of(path) in MARKDOWN
        split = self.split or ("line" if ending_of(path) == ".txt" else "file")
        with open_text(path, self.dialogues.encoding_of(path)) as file:
            for number, text in split_text(file, split):
                yield f"{display_path(path)}:{number}", without_marks(text) if is_markdown else text

    def document(self, piece: object, source: str) -> str:
        """A record or a text as one line; raises Unusable if it has no text."""
        if isinstance(piece, Unusable):
            raise piece
        if isinstance(piece, str):
            try:
                piece.encode()
            except UnicodeEncodeError:
                raise Unusable(
                    "not in its encoding", "it has bytes that are no characters; name the --encoding"
                ) from None
        else:
            piece = self.text_of(piece, source)
        text = " ".join(without_html(piece).split())
        if not text:
            raise Unusable("empty", "there is no text in it")
        if len(text) < self.min_length:
            raise Unusable("short", f"{len(text)} characters, under --min_length {self.min_length}")
        return text

    def text_of(self, record: object, source: str) -> str:
        """The text of a record: its text column, or its turns."""
        if not isinstance(record, dict):
            raise Unusable("not an object", f"the record is {record!r:.60}; it must be an object or a text")
        if self.text_column and self.text_column not in record:
            raise Unusable("no such column", f"it has {', '.join(map(repr, record))}, not {self.text_column!r}")
        reading = self.dialogues.reading
        record = reading.without_ignored(record)
        keys = tuple(record)
        check_media(record, sort_keys(keys, ()), reading, "the record")
        if self.text_column or "text" in _lowered(keys):
            columns = dict(zip(_lowered(keys), record.values(), strict=True))
            return with_title(record[self.text_column] if self.text_column else columns["text"], columns)
        if keys in self.keys_of_pairs:
            return spoken_text(self.pairs.convert(record, source))
        try:
            return spoken_text(self.dialogues.convert(record, source))
        except Unusable as error:
            if reply := lone_reply(record, reading):
                return reply
            if error.reason == "preference pair":
                self.keys_of_pairs.add(keys)
                return spoken_text(self.pairs.convert(record, source))
            columns = dict(zip(_lowered(keys), record.values(), strict=True))
            text = next((columns[name] for name in TEXT_COLUMNS if name in columns), None)
            if text is not None and error.reason == "unknown keys":
                return with_title(text, columns)
            raise


@lru_cache(maxsize=4000)
def _lowered(keys: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(key.strip().lower() for key in keys)


def split_text(lines: Iterable[str], split: str) -> Iterator[tuple[int, str]]:
    """(number of its first line, text) of each line or paragraph that is not blank, or of all in one."""
    if split == "file":
        yield 1, "".join(lines)
        return
    paragraph: list[str] = []
    start = 1
    for number, line in enumerate(lines, start=1):
        is_blank = not line.strip()
        if not is_blank:
            start = start if paragraph else number
            paragraph.append(line)
        if paragraph and (is_blank or split == "line"):
            yield start, "".join(paragraph)
            paragraph = []
    if paragraph:
        yield start, "".join(paragraph)


def with_title(text: object, columns: dict) -> str:
    """The text after its title, since the text often does not name its subject."""
    if not isinstance(text, str):
        raise Unusable("not text", f"its text is {text!r:.60}; it must be a string")
    text_of(text, "its text")
    titles = (columns[name] for name in TITLE_COLUMNS if isinstance(columns.get(name), str))
    title = text_of(next((title for title in titles if not holds_nothing(title)), ""), "its title", ())
    return text if text.lstrip().startswith(title) else f"{title}\n{text}"


def spoken_text(item: Dialogue | Pair) -> str:
    """The text of all user and assistant turns, in a pair with the chosen reply, without system prompt and tools."""
    words = []
    for message in item.messages:
        if "weight" in message:
            raise Unusable("not to be learned", "a reply in it is marked as a bad one; delete the record or the mark")
        if message["role"] in ("user", "assistant"):
            words.append(message["content"])
    return "\n".join([*words, item.chosen] if isinstance(item, Pair) else words)


# ---------------------------------------------------------------- main


def convert(reader: DocumentReader, files: list[RecordFile], output: Path, overwrite: bool) -> Report:
    """Write every document; raises UserError if there is none."""
    report = Report()
    with new_text_file(output, "--output_file", overwrite) as file:
        for text in report.usable(tqdm(reader.read(files), unit=" documents", disable=None)):
            file.write(f"{text}\n")
        if not report.kept:
            lines = [f"{some_names(files)}: no document in it ({report.read:,} read)", *dropped_lines(report)]
            if "unknown keys" in report.dropped:
                lines.append("say which column is the text: --text_column NAME")
            raise UserError("\n".join(lines))
    return report


def main(argv: list[str] | None = None) -> None:
    """Parse the flags, convert, say what was kept, dropped and found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_records_flags(parser, "--input_file", "a file, or a folder and all below it")
    parser.add_argument("--output_file", required=True, type=Path, help="the new .txt file, or .txt.gz")
    parser.add_argument("--overwrite", action="store_true", help="replace the output if it exists")
    parser.add_argument("--min_length", type=int, default=0, help="drop documents of fewer characters")
    parser.add_argument(
        "--split", choices=("line", "paragraph", "file"), default="",
        help="what is a document in a text file; by default a line of a .txt, and a whole .md or .html",
    )  # fmt: skip
    parser.add_argument("--text_column", default="", metavar="NAME", help="the column of records that is the text")
    add_reading_flags(parser)
    args = parser.parse_args(argv)

    if not args.output_file.name.lower().endswith((".txt", ".txt.gz")):
        raise UserError(f"--output_file {args.output_file}: plain text is written; let it end in .txt or .txt.gz")
    dialogues = reader_of(args, "dialogues")
    pairs = ForeignReader("pairs", encoding=args.encoding, reading=dialogues.reading)
    files, unread = find_records(args.input_file, args.dataset_name, "--input_file", ENDINGS)
    refuse_same(files, args.output_file, "--output_file")
    reader = DocumentReader(dialogues, pairs, args.text_column, args.split, args.min_length)
    report = convert(reader, files, args.output_file, args.overwrite)

    print(f"{args.output_file}: {report.summary()}")
    for line in [*dropped_lines(report), *dialogues.describe(), *unread_lines(unread)]:
        print(line)


if __name__ == "__main__":
    run_script(main)
