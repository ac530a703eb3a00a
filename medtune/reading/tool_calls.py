"""Calls of tools in replies: the forms in which the families write them, read into names and arguments."""

import ast
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from medtune.reading.thoughts import before_part_of
from template import ChatTemplate, ToolCall

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
        else:
            found = re.findall(r"<arg_key>(.*?)</arg_key>\s*<arg_value>(.*?)</arg_value>", body, re.DOTALL)
            calls.append(_call_of_texts(re.split(r"\s|<arg_key>", body, maxsplit=1)[0], found, schemas))
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
    """LFM2's list of calls in Python, with JSON's words for true, false and null too."""
    body = re.search(r"<\|tool_call_start\|>(.*?)<\|tool_call_end\|>", text, re.DOTALL)[1]
    calls = _JsonWords().visit(ast.parse(body.strip(), mode="eval")).body.elts
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
    types = {key: schema.get("type") for key, schema in schemas.get(name, {}).items()}
    return {"name": name, "arguments": {key: _typed(text, types.get(key)) for key, text in found}}


def _typed(text: str, kind: str | None) -> object:
    if kind == "string":
        return text
    try:
        return json.loads(text)
    except ValueError:
        # Qwen3.5 writes Python's words.
        return {"True": True, "False": False, "None": None}.get(text, text)


# ---------------------------------------------------------------- forms


@dataclass(frozen=True)
class CallForm:
    """openings: with which of these texts a call begins; is_whole: the call is the whole reply."""

    openings: Sequence[str]
    read: Callable[[str, Schemas], list[ToolCall]]
    is_whole: bool = False


_FORMS = (
    CallForm(("<tool_call>",), _read_tagged),
    CallForm(("[TOOL_CALLS]",), _read_mistral),
    CallForm(("<|tool_call_start|>",), _read_python),
    CallForm(("<|tool_call>",), _read_gemma),
    CallForm(("<function name=",), _read_minicpm),
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
        """The words that waited and the calls, once the answer is whole; no calls where they cannot be read."""
        words = self._words(self.text, is_whole=True)
        try:
            calls = self.form.read(self.text[len(words) :], self.schemas) if len(words) < len(self.text) else []
        except (ValueError, SyntaxError, AttributeError, TypeError):
            calls = []
        return self._news(words if calls else self.text), calls

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
