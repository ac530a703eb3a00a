"""In which encoding a text file is."""

import argparse
import codecs
import gzip
import re
import zlib
from pathlib import Path

from medtune.reading.magic_bytes import UTF16_MARKS, utf16_without_mark

UTF8 = "utf-8-sig"  # with or without a byte order mark


def detect_encoding(path: Path) -> str:
    """UTF-8, UTF-16 or -32, or GB18030 (with GBK and GB2312), judged by the first megabyte that is not ASCII."""
    open_bytes = gzip.open if path.suffix.lower() == ".gz" else open
    try:
        with open_bytes(path, "rb") as file:
            block = file.read(1 << 20)
            if block.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):
                return "utf-32"
            if block.startswith(UTF16_MARKS):
                return "utf-16"
            if encoding := utf16_without_mark(block):
                return encoding.lower()
            while block and block.isascii():
                block = file.read(1 << 20)
    except (EOFError, OSError, zlib.error):
        return UTF8  # the reader names the fault
    # Stray bytes in UTF-8 are few. Other 8-bit encodings may pass for GB18030, but not for its core, GB2312.
    is_chinese = _undecodable_share(block, "utf-8") > 0.1 and _undecodable_share(block, "gb2312") < 0.1
    return "gb18030" if is_chinese else UTF8


def _undecodable_share(block: bytes, encoding: str) -> float:
    """The share of the bytes above ASCII that do not decode."""
    n_high = len(block.translate(None, bytes(range(128))))
    text = block.decode(encoding, errors="surrogateescape")
    return len(re.findall("[\udc80-\udcff]", text)) / n_high if n_high else 0.0


def known_encoding(name: str) -> str:
    """For argparse: an encoding that Python has."""
    try:
        codec = codecs.lookup(name).name
    except LookupError:
        raise argparse.ArgumentTypeError(f"no encoding {name!r}; known are utf-8, gb18030, big5, utf-16 ...") from None
    return UTF8 if codec == "utf-8" else codec
