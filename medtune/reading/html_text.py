"""HTML as plain text.

By hand, since records are mostly text that is no HTML: a parser takes `x<a and b>c` for a tag, and html.parser leaves
out what follows an unclosed `<script>` and, by its version, the rest of "a<b" (CPython issue 135462).
"""

import html
import re
from html.entities import html5

_BLOCK_TAGS = (
    "address|article|aside|blockquote|body|br|caption|center|dd|div|dl|dt|figcaption|figure|footer|form|h[1-6]|head|"
    "header|hr|html|li|main|meta|nav|ol|option|p|pre|section|select|table|tbody|tfoot|thead|title|tr|ul"
)

_INLINE_TAGS = (
    "a|abbr|b|big|button|cite|code|del|em|font|i|iframe|img|input|ins|kbd|label|link|mark|q|s|samp|small|span|strike|"
    "strong|sub|sup|td|th|tt|u|var|video"
)

_TAG = re.compile(
    rf"<(?P<slash>/?)(?:(?P<block>{_BLOCK_TAGS})|(?P<inline>{_INLINE_TAGS}))"
    # What is surely a tag: "<90 mmHg" and "x<a and b>c" are none.
    r"""(?:\s+[\w:@.-]+\s*=\s*(?:"[^"]*"|'[^']*'|[^\s<>"'=]+)|\s+(?:hidden|disabled|checked|controls))*\s*/?>""",
    re.IGNORECASE,
)

_BLOCK_OR_END = re.compile(rf"\s*(?:</?(?:{_BLOCK_TAGS})\b|\Z)", re.IGNORECASE)

_NOT_SHOWN = re.compile(
    r"<!--.*?-->|<!doctype[^>]*>|<(script|style|noscript|template)\b[^>]*>.*?</\1\s*>", re.DOTALL | re.IGNORECASE
)

_ENTITY = re.compile(r"&(?:#\d{1,7}|#[xX][0-9a-fA-F]{1,6}|[a-zA-Z][a-zA-Z0-9]{1,30});")


def without_html(text: str) -> str:
    """HTML as plain text: a line for each block, a blank between cells, powers with ^, entities as characters."""
    if "&" in text:
        for _ in range(2):  # &amp;nbsp; is common
            text = _ENTITY.sub(_character, text)
    return _TAG.sub(_instead_of_tag, _NOT_SHOWN.sub("", text)) if "<" in text else text


def _character(entity: re.Match[str]) -> str:
    is_known = entity[0].startswith("&#") or entity[0][1:] in html5
    return html.unescape(entity[0]) if is_known else entity[0]


def _instead_of_tag(tag: re.Match[str]) -> str:
    if tag["block"]:
        # The next block starts its own line.
        return "" if tag["slash"] and _BLOCK_OR_END.match(tag.string, tag.end()) else "\n"
    return "" if tag["slash"] else {"sup": "^", "td": " ", "th": " "}.get(tag["inline"].lower(), "")
