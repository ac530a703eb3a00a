"""What tools count, compare and print of records."""

import json
from collections.abc import Sequence
from pathlib import Path

from medtune.reading.records import Dialogue, Document, Pair, Report


def dropped_lines(report: Report) -> list[str]:
    """For each reason why records were dropped, the first of them."""
    return [
        f"{count:,} dropped, {reason}: {'; '.join(report.examples[reason])}"
        for reason, count in report.dropped.most_common()
    ]


def unread_lines(unread: Sequence[Path]) -> list[str]:
    """The files that a tool found and has no reader for."""
    more = f" and {len(unread) - 5} more" if len(unread) > 5 else ""
    return [f"not read, by their endings: {', '.join(map(str, unread[:5]))}{more}"] if unread else []


# A first turn of fewer letters is a greeting; what follows it is the question.
_SHORTEST_QUESTION = 6


def question_of(record: Dialogue | Pair | Document) -> str:
    """What is asked: the first of the user's turns, those before it that only greet included; of a document, all."""
    if isinstance(record, Document):
        return record.text
    question = ""
    for message in record.messages:
        if message["role"] == "user":
            question += f"\n{message['content']}" if question else message["content"]
            if sum(map(str.isalnum, question)) >= _SHORTEST_QUESTION:
                break
    return question


def words_of(record: Dialogue | Pair | Document) -> str:
    """All that is said in a record but the system prompt, which many share: by this, near copies are found."""
    if isinstance(record, Document):
        return record.text
    said = [
        message["content"] or json.dumps(message.get("tool_calls"), ensure_ascii=False)
        for message in record.messages
        if message["role"] != "system"
    ]
    return "\n".join([*said, record.chosen, record.rejected] if isinstance(record, Pair) else said)
