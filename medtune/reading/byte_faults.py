"""Find byte faults in a text (not UTF-8, truncated, NUL bytes) and their place."""

import re
from typing import TYPE_CHECKING

from medtune.errors import Unusable

if TYPE_CHECKING:
    import pyarrow


def line_fault(text: str, first_line: int) -> Unusable | None:
    """What is wrong with the bytes of a text that has no form by which it would show."""
    try:
        if 0 not in text.encode():  # the fastest search of all
            return None
    except UnicodeEncodeError:
        return utf8_fault(text, first_line=first_line)
    line = first_line + text.count("\n", 0, text.index("\0"))
    return Unusable("NUL bytes", f"in line {line}, as a full disk or a crash leaves; copy or download the file again")


# The first bytes of a UTF-8 character, as `surrogateescape` reads them.
_CUT_CHARACTER = re.compile("[\udcc2-\udcf4][\udc80-\udcbf]{0,2}")


def utf8_fault(
    text: str, start: int = 0, end: int | None = None, first_line: int = 1, bytes_before: int = 0
) -> Unusable | None:
    """Name the first byte of `text[start:end]` that was not UTF-8 in the file, if there is one.

    `first_line` is the number of the line on which `text` starts, `bytes_before` the bytes before it on that line.
    """
    try:
        text[start:end].encode()
        return None
    except UnicodeEncodeError as error:
        position = start + error.start
    line_start = text.rfind("\n", 0, position) + 1
    line = first_line + text.count("\n", 0, line_start)
    byte = len(text[line_start:position].encode(errors="surrogateescape")) + 1 + (0 if line_start else bytes_before)
    value = ord(text[position]) - 0xDC00
    if _CUT_CHARACTER.fullmatch(text, position):
        return Unusable(
            "cut off", f"the file ends within a character, at byte {byte} of line {line}; copy or download it again"
        )
    encoding = "UTF-16" if value == 0xFF else "GB18030"  # FF opens Windows' UTF-16; GB18030 includes GBK
    return Unusable(
        "not UTF-8",
        f"byte {byte} of line {line} is {value:#04x}; convert the file, probably by "
        f"`iconv -f {encoding} -t UTF-8 OLD > NEW`",
    )


def readable_rows(table: "pyarrow.Table | pyarrow.RecordBatch") -> list[dict | Unusable]:
    """A table's rows, Unusable for those whose bytes are not UTF-8, which parquet and `datasets` do not check."""
    try:
        return table.to_pylist()
    except UnicodeDecodeError as error:
        if table.num_rows > 1:
            return [record for row in range(table.num_rows) for record in readable_rows(table.slice(row, 1))]
        value = error.object[error.start]
        return [Unusable("not UTF-8", f"byte {value:#04x} in a text; make the file again from texts in UTF-8")]
