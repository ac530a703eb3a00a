"""Extract the answer of a reply: the text after its thought, and the letter that answers an exam question."""

import re
import unicodedata

_THOUGHTS = (("<think(?:ing)?>", "</think(?:ing)?>"), ("## Thinking", "## Final Response"))


def answer_of(reply: str) -> str:
    """The reply without its thought, whose <think> may be in the prompt; "" if the thought does not end."""
    for opening, closing in _THOUGHTS:
        reply = re.sub(f"{opening}.*?{closing}", "", reply, flags=re.DOTALL)
        reply = re.split(opening, re.split(closing, reply)[-1])[0]
    return reply.strip()


# What stands before or behind a mark of options, such as <C> or <AC>, and says whether they are chosen.
_CHOSEN_BEFORE = re.compile(
    r"(答案|选择|选|正确的?(是|选项)|\b(answer|choice|choose|select|pick|go with|correct|right|best)\b)"
    r"([\s:=】\])]|应该?|应当|就|只|可能|最|是|为|选|\b(is|was|should|would|must|could|may|be|the|option|one|answer)\b)*$",
    re.IGNORECASE,
)
_CHOSEN_BEHIND = re.compile(
    r"([\s:→]|才|就|是|为|\b(is|are|the|most)\b)*"
    r"(正确|对的?(?!\w)|最佳|最合适|最可能|最?符合|\b(correct|right|best|better|likely|true|answer)\b)",
    re.IGNORECASE,
)
_RULED_OUT_BEFORE = re.compile(
    r"(不|别|不应|不能|不是|并非|非|排除|除了|比|n't|\b(not|neither|nor|than|exclude|rule out|instead of))"
    r"\s*选?择?\s*$",
    re.IGNORECASE,
)
_RULED_OUT_BEHIND = re.compile(
    r"([\s:→]|也|都|均|则|是|\b(is|are|can be)\b)*"
    r"(错|不|可?以?排除|吗|呢|\?|n't|\b(wrong|incorrect|not|unlikely|false|excluded|ruled out)\b)",
    re.IGNORECASE,
)
_FIRST = re.compile(r"\s*($|[.。;\n]|,(?!\s*<))(?!(.*\n)+\W*<)")  # and no list of the options
# Two marks that become one: of the same option, and of options that are named together.
_SAME = re.compile(r"<(\w)>[\s.:、()-]*<\1>")
_AND = r"和|与|或者?|还是|以?及|、|/|&|and\b|or\b|,(?=\s*<\w+>\s*(?:$|[.。;\n]))"
_TOGETHER = re.compile(rf"<(\w+)>\s*(?:{_AND})\s*选?<(\w+)>")
# "A common cold" begins with an article; hepatitis B, vitamin C and C反应蛋白 are no options.
_NO_OPTION_BEFORE = "".join(
    f"(?<!{word})" for word in ("维生素", "[Vv]itamin ", "[Hh]epatitis ", "[Tt]ype ", "[A-Za-z0-9]")
)
_NO_OPTION_BEHIND = r"(?![A-Za-z0-9]|型|超|族|反应|细胞|期|级)"


def written_letter(reply: str, options: dict[str, str]) -> str | None:
    """The letter of an answer, by letter or by the option's words; None if it names several or none.

    The last statement counts ("答案：C", "C is right"); without a statement, the only option not ruled out.
    """
    chosen, left = "", set()
    text = _mark_options(reply, options)
    for mark in re.finditer(r"<(\w+)>", text):
        before, behind = text[max(mark.start() - 60, 0) : mark.start()], text[mark.end() :]
        if _RULED_OUT_BEFORE.search(before) or _RULED_OUT_BEHIND.match(behind):
            continue
        left |= set(mark[1])
        is_first = not re.search(r"\w", text[: mark.start()]) and _FIRST.match(behind)
        if is_first or _CHOSEN_BEFORE.search(before) or _CHOSEN_BEHIND.match(behind):
            chosen = mark[1]
    letters = set(chosen) or left
    return letters.pop() if len(letters) == 1 else None


def _mark_options(reply: str, options: dict[str, str]) -> str:
    """Replace each mention of option C, by letter or by words, with <C>, and of two together with <AC>."""
    text = unicodedata.normalize("NFKC", reply.replace("\u2019", "'")).replace("<", " ")
    text = re.sub(r"[*`$_{}]|\\(text|mathrm|mathbf)\b", "", text.replace("\\boxed", "答案:"))
    lower_case = r"((?:answer|答案)(?: is|是|为)?:?\s*|^\W*)([a-z])(?![\w ])"
    text = re.sub(lower_case, lambda match: match[1] + match[2].upper(), text, flags=re.IGNORECASE)
    letters = {unicodedata.normalize("NFKC", words).lower(): letter for letter, words in reversed(options.items())}
    by_words = "|".join(
        rf"(?<![a-z0-9]){re.escape(words)}(?![a-z0-9])" if words.isascii() else re.escape(words)
        for words in sorted(letters, key=len, reverse=True)
    )
    by_letter = (
        rf"(?:选项|\boption )?[(\[]?{_NO_OPTION_BEFORE}(?!A (?!(?:is|and|or)\b)[a-z])"
        rf"(?P<letter>[{''.join(options)}]){_NO_OPTION_BEHIND}[)\]]?(?:选?项)?"
    )
    text = re.sub(
        f"(?P<words>(?i:{by_words}))|{by_letter}",
        lambda match: f"<{match['letter'] or letters[match['words'].lower()]}>",
        text,
    )
    for together in (_SAME, _TOGETHER):
        while (merged := together.sub(lambda match: f"<{''.join(filter(None, match.groups()))}>", text)) != text:
            text = merged
    return text
