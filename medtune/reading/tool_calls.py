"""Calls of tools in replies: the forms in which the families write them, read into names and arguments."""

import ast
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from medtune.reading.chat_template import ChatTemplate
from medtune.reading.messages import ToolCall
from medtune.reading.thoughts import before_part_of

# The JSON schemas of a tool's arguments, by the tool's name and the argument's.
Schemas = dict[str, dict[str, dict]]


# ---------------------------------------------------------------- one reader for each form
# From the text at the first call to its calls. A ValueError or SyntaxError says that the text is none.


def _read_tagged(text: str, schemas: Schemas) -> list[ToolCall]:
    """Between <tool_call> tags: JSON of Qwen and others, XML of Qwen3.5, keys and values of GLM."""
    calls = []
    for body in re.findall(r"<tool_call>\s*(.*?)\s*</tool_call>", text, re.DOTALL):
        if body.startswith("{"):
            calls.append(_call_of_json(json.loads(body)))
        elif body.startswith("<function="):
            name = body.removeprefix("<function=").partition(">")[0]
            found = re.findall(r"<parameter=([^>\n]+)>\n?(.*?)\n?</parameter>", body, re.DOTALL)
            calls.append(_call_of_texts(name, found, schemas))
        elif name := re.match(r"([\w.-]+)\s*(?:<arg_key>|$)", body):
            found = re.findall(r"<arg_key>(.*?)</arg_key>\s*<arg_value>(.*?)</arg_value>", body, re.DOTALL)
            calls.append(_call_of_texts(name[1], found, schemas))
        else:
            raise ValueError("neither JSON nor XML, nor a name with keys and values")
    return calls


def _read_mistral(text: str, schemas: Schemas) -> list[ToolCall]:
    """[TOOL_CALLS] before a list of JSON, or before each name with its arguments behind [ARGS]."""
    first, *others = (part.strip() for part in text.split("[TOOL_CALLS]")[1:])
    if first.startswith("["):
        return list(map(_call_of_json, json.loads(first)))
    calls = []
    for part in (first, *others):
        name, arguments = re.fullmatch(r"([^\[{]+)(?:\[ARGS\])?(\{.*\})", part, re.DOTALL).groups()
        calls.append(_call_of_json({"name": name.strip(), "arguments": arguments}))
    return calls


def _read_python(text: str, schemas: Schemas) -> list[ToolCall]:
    """LFM2's lists of calls in Python, with JSON's words for true, false and null too."""
    bodies = re.findall(r"<\|tool_call_start\|>(.*?)<\|tool_call_end\|>", text, re.DOTALL)
    calls = [call for body in bodies for call in _JsonWords().visit(ast.parse(body.strip(), mode="eval")).body.elts]
    if any(call.args or None in [keyword.arg for keyword in call.keywords] for call in calls):
        raise ValueError("arguments without a name")
    return [
        {
            "name": ast.unparse(call.func),
            "arguments": {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords},
        }
        for call in calls
    ]


class _JsonWords(ast.NodeTransformer):
    def visit_Name(self, node: ast.Name) -> ast.expr:
        words = {"true": True, "false": False, "null": None}
        return ast.copy_location(ast.Constant(words[node.id]), node) if node.id in words else node


def _read_gemma(text: str, schemas: Schemas) -> list[ToolCall]:
    """Gemma 4's objects, whose keys are bare and whose strings have a token for a quotation mark."""
    calls = []
    for name, body in re.findall(r"<\|tool_call>call:([^{]+)(\{.*?\})<tool_call\|>", text, re.DOTALL):
        parts = body.split('<|"|>')
        bare = [re.sub(r"([{,])\s*([^\s{}\[\],:\"]+)\s*:", r'\1"\2":', part) for part in parts[::2]]
        strings = [json.dumps(part, ensure_ascii=False) for part in parts[1::2]]
        whole = "".join(part for pair in zip(bare, [*strings, ""], strict=True) for part in pair)
        calls.append(_call_of_json({"name": name, "arguments": whole}))
    return calls


def _read_minicpm(text: str, schemas: Schemas) -> list[ToolCall]:
    calls = []
    for name, body in re.findall(r'<function name="([^"]+)">(.*?)</function>', text, re.DOTALL):
        found = re.findall(r'<param name="([^"]+)">(?:<!\[CDATA\[(.*?)\]\]>|(.*?))</param>', body, re.DOTALL)
        calls.append(_call_of_texts(name, [(key, cdata or value) for key, cdata, value in found], schemas))
    return calls


def _read_harmony(text: str, schemas: Schemas) -> list[ToolCall]:
    """gpt-oss: one call, a message to the tool."""
    name, arguments = re.search(r"to=functions\.([^\s<]+).*?<\|message\|>(.*)", text, re.DOTALL).groups()
    return [_call_of_json({"name": name, "arguments": arguments})]


def _read_bare(text: str, schemas: Schemas) -> list[ToolCall]:
    """Llama 3: a reply that is an object, with "parameters"."""
    return [_call_of_json(json.loads(text.strip().removeprefix("<|python_tag|>")))]


def _call_of_json(call: object) -> ToolCall:
    arguments = call.get("arguments", call.get("parameters", {})) if isinstance(call, dict) else None
    arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
    if not (isinstance(arguments, dict) and isinstance(call.get("name"), str)):
        raise ValueError("a call has a name and an object of arguments")
    return {"name": call["name"], "arguments": arguments}


def _call_of_texts(name: str, found: Sequence[tuple[str, str]], schemas: Schemas) -> ToolCall:
    """A call whose arguments are texts; the tool's schema says which of them are no strings."""
    types = {key: _types(schema) for key, schema in schemas.get(name, {}).items()}
    return {"name": name, "arguments": {key: _typed(text, types.get(key, set())) for key, text in found}}


def _types(schema: dict) -> set[str]:
    """The types that a schema allows: one, a list, or one of several schemas."""
    types = schema.get("type", [])
    others = (_types(other) for key in ("anyOf", "oneOf") for other in schema.get(key, ()))
    return {types} if isinstance(types, str) else set(types).union(*others)


def _typed(text: str, types: set[str]) -> object:
    if "string" in types:
        return None if "null" in types and text in ("null", "None") else text
    try:
        return json.loads(text)
    except ValueError:
        # Qwen3.5 writes Python's words.
        return {"True": True, "False": False, "None": None}.get(text, text)


# ---------------------------------------------------------------- forms


@dataclass(frozen=True)
class CallForm:
    """openings: with which of these texts a call begins; block: a regular expression of a call where words can follow
    it; is_whole: the call is the whole reply."""

    openings: Sequence[str]
    read: Callable[[str, Schemas], list[ToolCall]]
    block: str = ".*"
    is_whole: bool = False


_FORMS = (
    CallForm(("<tool_call>",), _read_tagged, r"<tool_call>.*?</tool_call>"),
    CallForm(("[TOOL_CALLS]",), _read_mistral),
    CallForm(("<|tool_call_start|>",), _read_python, r"<\|tool_call_start\|>.*?<\|tool_call_end\|>"),
    CallForm(("<|tool_call>",), _read_gemma, r"<\|tool_call>call:.*?<tool_call\|>"),
    CallForm(("<function name=",), _read_minicpm, r"<function name=.*?</function>"),
    CallForm(
        ("<|start|>assistant to=functions.", "<|channel|>commentary to=functions.", "to=functions."), _read_harmony
    ),
    CallForm(('{"name":', '{"type": "function", "name":', "<|python_tag|>"), _read_bare, is_whole=True),
)


def call_form(chat_template: ChatTemplate) -> CallForm | None:
    """The form in which a template writes calls; None where it has no place for tools, or writes none of these."""
    text = chat_template.call_text or ""
    return next((form for form in _FORMS if any(opening in text for opening in form.openings)), None)


class CallReader:
    """Splits an answer into words and calls, also while it is written: what may become a call waits for its end."""

    def __init__(self, form: CallForm | None, tools: Sequence[dict] | None):
        """form: None for an answer that is all words."""
        self.form = form
        functions = [tool.get("function") or tool for tool in tools or ()]
        self.schemas = {
            function.get("name"): (function.get("parameters") or {}).get("properties") or {} for function in functions
        }
        self.text = ""
        self.n_told = 0

    def add(self, piece: str) -> str:
        """The new words."""
        self.text += piece
        return self._news(self._words(self.text, is_whole=False))

    def end(self) -> tuple[str, list[ToolCall]]:
        """The words that waited or follow the calls, and the calls, once the answer is whole.

        What cannot be read stays words, and so does a call of a tool that was not offered.
        """
        words = self._words(self.text, is_whole=True)
        rest = self.text[len(words) :]
        try:
            calls = self.form.read(rest, self.schemas) if rest else []
            json.dumps(calls, allow_nan=False)
        except (ValueError, SyntaxError, AttributeError, TypeError, RecursionError):
            calls = []
        if not calls or {call["name"] for call in calls} - self.schemas.keys():
            return self._news(self.text), []
        after = re.sub(self.form.block, "", rest, flags=re.DOTALL).strip()
        return self._news("\n".join(filter(None, (words, after)))), calls

    def _words(self, text: str, is_whole: bool) -> str:
        """What comes before the first call."""
        if self.form is None:
            return text
        if self.form.is_whole:
            start = text.lstrip()
            openings = [opening for opening in self.form.openings if start.startswith(opening)]
            may_become = not is_whole and any(opening.startswith(start) for opening in self.form.openings)
            return "" if openings or may_become else text
        starts = [text.index(opening) for opening in self.form.openings if opening in text]
        if starts:
            return text[: min(starts)].rstrip()
        # The blanks before a call are none of the words.
        return text if is_whole else before_part_of(self.form.openings, text).rstrip()

    def _news(self, words: str) -> str:
        news = words[self.n_told :]
        self.n_told += len(news)
        return news
