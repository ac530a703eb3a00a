"""Mark where a text names the options of an exam question, by letter or by their words."""

import re
import unicodedata

# Each mention becomes ⟦C⟧, and options that are named together ⟦AC⟧.
MARK = r"⟦(\w+)⟧"

# Hepatitis B, vitamin C and C反应蛋白 are no options.
_NO_OPTION_BEFORE = "".join(
    f"(?<!{word})"
    for word in (
        *("维生素", "维", "族", "蛋白", "肝炎", "血型", "因子", "[A-Za-z0-9]", "[A-Za-z0-9]-", "&"),
        *("[Vv]itamin ", "[Hh]epatitis ", "[Tt]ype ", "[Gg]roup ", "[Ff]actor ", "[Pp]rotein ", "[Cc]lass "),
        *("[Ss]tage ", "[Gg]rade ", "[Ii]nfluenza ", "[Pp]ugh "),
    )
)
_NO_OPTION_BEHIND = (
    r"(?![A-Za-z0-9]|型|超|族|-?反应|淋巴|细胞|期|级|-?二聚体|肽|组|链|群|臂|类|'(?=\w)(?!s\b)"
    r"|[- ](?:reactive|dimer|type|cells?|lymphocytes?|peptide|section|fib|vitamins?|symptoms|strep\w*)\b"
    r"|\. ?(?:coli|difficile|diff|albicans|perfringens|botulinum|tetani|trachomatis|pneumoniae|jejuni|faecalis"
    r"|diphtheriae|neoformans|burgdorferi|anthracis|cereus|pertussis|fragilis)\b)"
)
# "A common cold" begins with an article, "A is", "A inhibits" and "so A fits" do not.
_NO_ARTICLE = (
    r"(?!(?<![a-z,'] )A (?:\d|(?!IS |AND |OR )[A-Z]{2}|(?!(?:\w+(?<![sui])s|is|was|and|or|can|could|cannot|would|will"
    r"|should|may|might|must|do|does|did|has|had|as|because|but|if|for|to|in|over|rather|instead|nor|vs|than|though"
    r"|although|while|since|alone|first|correct|incorrect|right|wrong)\b)[a-z]))"
)
_NO_PRONOUN = r"(?!I(?! is (?:the |correct|right)|\s*[.)\]:]|\s*$))"
_LOWER_CASE = re.compile(
    r"((?:答案|选项?|选择|\b(?:answer|ans|option|choice|choose|pick|select)\b)(?:'s)?"
    r"(?:[\s:.\"'(\[*]|应该?|是|为|\b(?:is|was|option|choice)\b)*|\A\W*|\()([a-j])(?![\w]|['-]\w| \w)",
    re.IGNORECASE,
)
_JOINT_WORD = re.compile(r"[、/&+和与及跟或还]|\b(?:and|or|nor)\b")
_JOINED = re.compile(
    rf"{MARK}(?P<joint>(?:\s*(?:、|/|&|\+|,|和|与|及|跟|或者?|还是|以及|\b(?:and|or|nor)\b))+"
    rf"\s*(?:选?项|选择?|\b(?:options?|choices?)\b)?\s*){MARK}"
)
# A comma alone joins options where a list goes on or ends, and not in "选C,A是错的".
_GOES_ON = re.compile(r"\s*(?:\Z|[.。;、,)\n]|均|都|皆|和|与|或|\b(?:and|or|are)\b)")
# "C. Warfarin" is one mention, whose colon shows that it was a label.
_REPEATED = re.compile(r"⟦(\w)⟧(?P<between>(?:[ .:、()\"'—-]|,?(?:即|也就是)|,? which is)*)⟦\1⟧\)?")
_COMMON_WORDS = {*("yes", "no", "maybe", "true", "false", "all", "none", "both"), *"是否有无对错能会", "不能", "不会"}


def mark_options(text: str, options: dict[str, str]) -> str:
    """The text with half-width characters and without markup, in which each mention of option C is ⟦C⟧.

    options: letter to words.
    """
    text = unicodedata.normalize("NFKC", re.sub("[\u2018\u2019]", "'", text))
    text = re.sub(r"\s*\n\s*", "\n", re.sub(r"[^\S\n]+", " ", text))
    text = re.sub(r"[*`$_{}#⟦⟧]|\\(text|math|box)\w*|</?\w+>|~~.+?~~", "", text)
    text = _LOWER_CASE.sub(
        lambda match: match[0][:-1] + match[2].upper() if match[2].upper() in options else match[0], text
    )
    letters = {_fold(words): letter for letter, words in reversed(options.items())}
    by_words = "|".join(map(_pattern_of, sorted(filter(None, letters), key=len, reverse=True))) or "(?!)"
    by_letter = (
        rf"(?:选项|\b(?i:option|choice) )?(?P<bracket>[(\[“\"'「])?{_NO_OPTION_BEFORE}{_NO_ARTICLE}{_NO_PRONOUN}"
        rf"(?P<letter>[{re.escape(''.join(options))}]){_NO_OPTION_BEHIND}(?(bracket)[)\]”\"'」]?)(?:选?项)?"
    )
    text = re.sub(
        f"(?P<words>(?i:{by_words}))|{by_letter}",
        lambda match: f"⟦{match['letter'] or letters[_fold(match['words'])]}⟧",
        text,
    )
    for pattern, join in ((_REPEATED, _merge), (_JOINED, _join)):
        while (joined := pattern.sub(join, text)) != text:
            text = joined
    return text


def _merge(match: re.Match) -> str:
    return f"⟦{match[1]}⟧" + ":" * bool(re.search("[.:、)]", match["between"]))


def _join(match: re.Match) -> str:
    first, second = match[1], match[3]
    is_comma = match["joint"].strip() == "," and (len(first) > 1 or _GOES_ON.match(match.string, match.end()))
    is_list = is_comma or _JOINT_WORD.search(match["joint"])
    return f"⟦{first}{second}⟧" if is_list and not set(first) & set(second) else match[0]


def _fold(words: str) -> str:
    return unicodedata.normalize("NFKC", words).strip().rstrip("。.").lower()


def _pattern_of(words: str) -> str:
    """The pattern of an option's words; "no" or "2" count only where they are a clause of their own."""
    if words in _COMMON_WORDS or not re.search(r"[^\W\d]", words):
        return rf"(?<![^\s,.:。、(是为])(?<![\d.] ){re.escape(words)}(?=\s*(?:[,;!)。]|\.(?!\d)|$|\n))"
    return rf"(?<![a-z0-9]){re.escape(words)}(?![a-z0-9])" if words.isascii() else re.escape(words)
