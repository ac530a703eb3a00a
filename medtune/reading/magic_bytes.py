"""Check by the first bytes of a file whether it is what its name says."""

import codecs
import re
from pathlib import Path

from medtune.errors import UserError

BLOCK = 1 << 20
UTF16_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)

_POINTER = re.compile(rb"\s*version https://(?:git-lfs|hawser)\.github\.com/spec/v\d")
_POINTER_SIZE = re.compile(rb"\ssize (\d+)")
_LINK = re.compile(rb"(?:\.\./)*(?:blobs/[0-9a-f]{40,64}|(?:\.git)?/?annex/objects/\S+)")
_HUB_ANSWER = re.compile(
    rb"(?:(?:entry|repository|revision|file) not found|(?:404:? )?not found|unauthorized|"
    rb"invalid (?:username or password|credentials[^\n]*)|access to (?:model|dataset) [^\n]*)\.?",
    re.IGNORECASE,
)
_WEB_PAGE = re.compile(rb"\s*(?:<\?xml[^>]*>\s*)?<(?:!doctype html|html|head|error)\b", re.IGNORECASE)
# By more bytes than the usual mark where that is also a word: PAR1 is a receptor too.
_BINARY_FORMS = [
    (re.compile(pattern), what)
    for pattern, what in (
        (rb"\x1f\x8b", "a gzip file; end its name in .gz"),
        (rb"PK\x03\x04[\s\S]*xl/", "an Excel workbook; save it as CSV in UTF-8"),
        (rb"PK(\x03\x04|\x05\x06)", "a zip archive; unpack it"),
        (rb"PAR1[\x01-\x08\x0e-\x1f]", "a parquet file; end its name in .parquet"),
        (rb"ARROW1\0|\xff{4}[\s\S]{2}\0\0", "an Arrow file; write it as parquet (datasets: to_parquet)"),
        (rb"BZh\d1AY|\xfd7zXZ|\x28\xb5\x2f\xfd|7z\xbc\xaf|Rar!\x1a|[\s\S]{257}ustar", "an archive; unpack it"),
        (rb"%PDF-\d", "a PDF; extract its text"),
        (rb"\xd0\xcf\x11\xe0", "an old Word or Excel file; save it as text or CSV in UTF-8"),
        (rb"SQLite format 3\0", "a SQLite database; export its table as CSV"),
    )
]


def read_start(path: Path, name: str) -> bytes:
    """The first megabyte of a file; raises UserError (beginning with `name`) if it cannot be read."""
    try:
        with path.open("rb") as file:
            return file.read(BLOCK)
    except FileNotFoundError:
        what = "a link to a file that is not there" if path.is_symlink() else "no such file"
        raise UserError(f"{name}: {what}; copy or download it again") from None
    except OSError as error:
        raise UserError(f"{name}: cannot be read ({error.strerror})") from None


def misnamed(start: bytes, is_markup: bool = False) -> str:
    """If a file is not the text or weights expected: what it is and what to do. "" otherwise.

    An HTML page is refused unless the file `is_markup`.
    """
    head = start[:1024]
    if head.startswith(UTF16_MARKS):  # as PowerShell writes
        head = head.decode("utf-16", errors="ignore").encode()
    head = head.removeprefix(codecs.BOM_UTF8)
    if _POINTER.match(head):
        size = _POINTER_SIZE.search(head)
        of_size = f" of {_in_words(int(size[1]))}" if size else ""
        return (
            f"a Git LFS pointer, not the file itself{of_size}; run `git lfs pull` where it was cloned, or download it"
        )
    for form, what in _BINARY_FORMS:
        if form.match(start):
            return what
    if start and not start.strip(b"\0"):
        return "nothing but NUL bytes, as a full disk or a crash leaves; copy or download it again"
    if is_markup:
        return ""
    if _WEB_PAGE.match(head):
        return "a web page, such as of a login or an error, not the file itself; download it again"
    whole = start.strip() if len(start) < 1024 else b""
    if _HUB_ANSWER.fullmatch(whole):
        return f"a server's answer ({whole[:60].decode(errors='replace')}), not the file itself; download it again"
    if _LINK.fullmatch(whole):
        return "the path of a link, not the file that it leads to; copy with links followed (cp -L), or download it"
    return ""


def utf16_without_mark(start: bytes) -> str:
    """The encoding of a text whose first characters are ASCII in two bytes each, and "" of any other."""
    if re.match(rb"(?:[\x01-\x7f]\0){2}", start):
        return "UTF-16LE"
    return "UTF-16BE" if re.match(rb"(?:\0[\x01-\x7f]){2}", start) else ""


def is_text(start: bytes) -> bool:
    """Whether the bytes are UTF-8 text, the last character perhaps cut off."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        return "\0" not in decoder.decode(start)
    except UnicodeDecodeError:
        return False


def _in_words(n_bytes: int) -> str:
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if n_bytes >= size:
            return f"{n_bytes / size:.3g} {unit}"
    return f"{n_bytes} bytes"
