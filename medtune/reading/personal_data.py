"""Personal data in a text, masked."""

import re

# With the separators people type; not as a part of a longer number.
_PERSONAL = {
    "ID numbers": re.compile(
        r"(?<![0-9])[1-9]\d{5}(?:19|20)\d{2}(?:0[1-9]|1[0-2])(?:0[1-9]|[12]\d|3[01])\d{3}[\dXx](?![0-9A-Za-z])"
    ),
    "mobile numbers": re.compile(r"(?<![0-9])(?<![0-9]\.)(?:(?:\+|00)?86[- ]?)?1[3-9]\d(?:[- ]?\d{4}){2}(?![0-9])"),
    "e-mail addresses": re.compile(
        r"(?<![\w.+-])[A-Za-z0-9](?:[\w.+-]{0,63})@(?:[A-Za-z0-9-]{1,63}\.)+[A-Za-z]{2,24}(?![\w-])", re.ASCII
    ),
}
_MASKS = {
    "ID numbers": ("[身份证号]", "[ID number]"),
    "mobile numbers": ("[手机号]", "[mobile number]"),
    "e-mail addresses": ("[邮箱]", "[e-mail]"),
}
# One character for one, so that what is found stands at the same place.
_ASCII_DIGITS = str.maketrans("０１２３４５６７８９＠．－＋Ｘｘ", "0123456789@.-+Xx")
_CHINESE = re.compile("[\u4e00-\u9fff]")


def mask_personal_data(text: str) -> tuple[str, list[str]]:
    """The text with placeholders in its own language, and the kinds of data they stand for."""
    kinds = []
    for kind, pattern in _PERSONAL.items():
        spans = [match.span() for match in pattern.finditer(text.translate(_ASCII_DIGITS))]
        for start, end in reversed(spans):
            mask = _MASKS[kind][0 if _CHINESE.search(text) else 1]
            text = text[:start] + mask + text[end:]
        kinds += [kind] * len(spans)
    return text, kinds
