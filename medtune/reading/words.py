"""The texts of records that tools count, compare and print."""

import json
from collections.abc import Sequence
from pathlib import Path

from medtune.reading.records import Dialogue, Document, Feedback, Pair, Report


def dropped_lines(report: Report) -> list[str]:
    """One line for each reason why records were dropped, with the first examples."""
    return [
        f"{count:,} dropped, {reason}: {'; '.join(report.examples(reason))}"
        for reason, count in report.dropped.most_common()
    ]


def unread_lines(unread: Sequence[Path] | Sequence[str]) -> list[str]:
    """A line for the files that no reader reads, or for the `others` of a split; none if there are none."""
    if not unread:
        return []
    more = f" and {len(unread) - 5} more" if len(unread) > 5 else ""
    why = ", by their endings" if isinstance(unread[0], Path) else ""
    return [f"not read{why}: {', '.join(map(str, unread[:5]))}{more}"]


# A first turn of fewer letters is a greeting; what follows it is the question.
_SHORTEST_QUESTION = 6


def question_of(record: Dialogue | Pair | Feedback | Document) -> str:
    """The question of a record: the first user turn, with greetings before it; a document's whole text."""
    if isinstance(record, Document):
        return record.text
    question = ""
    for message in record.messages:
        if message["role"] == "user":
            question += f"\n{message['content']}" if question else message["content"]
            if sum(map(str.isalnum, question)) >= _SHORTEST_QUESTION:
                break
    return question


def words_of(record: Dialogue | Pair | Feedback | Document) -> str:
    """The text by which near copies are found: all of a record except the system prompt, which many share."""
    if isinstance(record, Document):
        return record.text
    contents = [
        message["content"] or json.dumps(message.get("tool_calls"), ensure_ascii=False)
        for message in record.messages
        if message["role"] != "system"
    ]
    if isinstance(record, Pair):
        contents += [record.chosen, record.rejected]
    if isinstance(record, Feedback):
        contents.append(record.reply)
    return "\n".join(contents)
