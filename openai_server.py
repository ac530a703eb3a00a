"""Serve a trained model by OpenAI's chat completions over HTTP, where vLLM is not installed.

Input: a base model, a base with a LoRA adapter, a merged model or a full checkpoint.
Output: /v1/chat/completions (whole or streamed), /v1/models and /health. Prompts are those of training;
requests that come together are answered as one batch, each as it would be alone.

    python openai_server.py --base_model outputs-dpo-qwen2.5-3b-merged
    python openai_server.py --base_model Qwen/Qwen2.5-3B-Instruct --lora_model outputs-dpo-qwen2.5-3b/checkpoint-best

Launcher: run_serve.sh, which takes vLLM where it can.
"""

import json
import re
import secrets
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from http import HTTPStatus
from itertools import groupby
from typing import Any, Literal

import medtune.libraries  # noqa: F401 - first: it imports the libraries in half of their time

# isort: split
import torch
import uvicorn
from fastapi import Depends, FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from loguru import logger
from pydantic import BaseModel, Field, field_validator, model_validator
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.middleware.cors import CORSMiddleware

from medtune.arguments import StageArgumentParser
from medtune.errors import Unusable, UserError, run_script
from medtune.models.adapter_effect import LEAST_CHANGE, describe_effect
from medtune.models.chat_models import (
    LOOPBACK,
    NOTICE,
    ChatModel,
    ChatModelArguments,
    check_address,
    describe_model,
    load_weights,
)
from medtune.models.decoding import LEAST_PENALTY, Decoding
from medtune.models.generation import Reply
from medtune.models.replier import MOST_AT_A_TIME, Replier
from medtune.reading.conversations import turns_to_answer
from medtune.reading.messages import ToolCall
from medtune.reading.thinking import THOUGHT_FORMS
from medtune.reading.thoughts import ReplySplitter, split_reply
from medtune.reading.tokenization import encode_prompt, refuse_control_tokens
from medtune.reading.tool_calls import CallReader
from medtune.reading.values import is_parts, text_of
from medtune.training.log import start_log

# Tokens of a reply whose request names no limit.
DEFAULT_MAX_TOKENS = 1024

# ---------------------------------------------------------------- arguments


@dataclass
class ServerArguments:
    host: str = field(default="127.0.0.1", metadata={"help": "Address to listen on; 0.0.0.0 opens it to the network."})
    port: int = field(default=8000, metadata={"help": "Port to listen on."})
    api_key: str | None = field(default=None, metadata={"help": "Clients have to send it as their Bearer token."})
    served_model_name: str | None = field(
        default=None,
        metadata={"help": "What requests call the model; otherwise the adapter's or model's path as given."},
    )
    max_model_len: int | None = field(
        default=None, metadata={"help": "Longest prompt and reply in tokens; otherwise what the model can."}
    )
    allowed_origins: list[str] | None = field(
        default=None,
        metadata={"help": "Pages whose browser clients may ask, such as http://localhost:3000; `*` for any (CORS)."},
    )

    def __post_init__(self):
        for origin in self.allowed_origins or ():
            if not re.fullmatch(r"\*|[a-z][a-z0-9+.-]*://[^/\s]+", origin):
                raise UserError(
                    f"--allowed_origins {origin}: no origin; give http://HOST:PORT without a path, as browsers send it"
                )
        if self.max_model_len is not None and self.max_model_len < 16:
            raise UserError(f"--max_model_len {self.max_model_len}: too little for a question; give a number of tokens")


# ---------------------------------------------------------------- what a request may say


# Fields of OpenAI's and vLLM's interface that this server lacks, each with the values that change no reply.
NEUTRAL: dict[str, tuple] = {
    "add_generation_prompt": (True,),
    "add_special_tokens": (False,),
    "bad_words": ([],),
    "best_of": (1,),
    "chat_template_kwargs": ({},),
    "continue_final_message": (False,),
    "documents": ([],),
    "early_stopping": (False,),
    "echo": (False,),
    "enable_search": (False,),
    "frequency_penalty": (0,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "ignore_eos": (False,),
    "include_reasoning": (True,),
    "include_stop_str_in_output": (False,),
    "length_penalty": (1,),
    "logit_bias": ({},),
    "logprobs": (False,),
    "min_p": (0,),
    "min_tokens": (0,),
    "mirostat": (0,),
    "modalities": (["text"],),
    "n": (1,),
    "presence_penalty": (0,),
    "priority": (0,),
    "response_format": ({"type": "text"},),
    "return_token_ids": (False,),
    "return_tokens_as_token_ids": (False,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "stop_token_ids": ([],),
    "tool_choice": ("none", "auto"),
    "top_logprobs": (0,),
    "typical_p": (1,),
    "use_beam_search": (False,),
    "verbosity": ("medium",),
}
# Fields that change no reply whatever they say.
UNREAD = ("cache_salt", "metadata", "parallel_tool_calls", "prediction", "prompt_cache_key", "prompt_cache_options")
UNREAD += ("prompt_cache_retention", "request_id", "safety_identifier", "service_tier", "session_id", "store", "user")
# Where clients send a thought back: DeepSeek's name and that of earlier versions of vLLM, and vLLM's name by now.
THOUGHT_FIELDS = ("reasoning_content", "reasoning")


class Turn(BaseModel, extra="allow"):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Any = None

    @model_validator(mode="after")
    def _only_text(self):
        for name, value in (self.model_extra or {}).items():
            # Null, `false` and an empty list of tool calls say nothing; no template of training writes names.
            if not value or name in ("name", "id", "tool_call_id"):
                continue
            if name not in (*THOUGHT_FIELDS, "tool_calls"):
                raise ValueError(f"{name}: {_quote(value)} is not supported; a turn here has a role and a text")
            if self.role != "assistant":
                what = "call tools" if name == "tool_calls" else "have thoughts"
                raise ValueError(f"{name}: {_quote(value)} is not supported; only turns of the assistant {what}")
            if name in THOUGHT_FIELDS and not isinstance(value, str):
                raise ValueError(f"{name}: {_quote(value)} is not supported; a thought is a string")
        return self

    def as_message(self, number: int) -> dict:
        """The turn as training has it: a thought before the answer, of which the template keeps what it did there.

        number: of the turn, for messages.

        Raises Unusable for two thoughts that differ.
        """
        content, where = self.content, f"turn {number} ({self.role})"
        fields = {name: self.extra(name) or "" for name in THOUGHT_FIELDS}
        thoughts = {value.strip(): name for name, value in fields.items() if value.strip()}
        if thoughts and is_parts(content):
            content = text_of(content, where)
        if thoughts and isinstance(content, str):
            if inside := split_reply(content).thought:
                thoughts.setdefault(inside, "content")
            if len(thoughts) > 1:
                names = " and in ".join(thoughts.values())
                raise Unusable("two thoughts", f"{where} has different thoughts in {names}; send one of them")
            content = content if inside else THOUGHT_FORMS["think_tags"].format(*thoughts, content)
        message = {"role": "system" if self.role == "developer" else self.role, "content": content}
        calls = self.extra("tool_calls")
        return message | {"tool_calls": calls} if calls else message

    def extra(self, name: str) -> Any:
        """A field that not every turn has."""
        return (self.model_extra or {}).get(name)


class ChatRequest(BaseModel, extra="forbid"):
    """A request; other OpenAI fields that would change the reply are refused, not ignored."""

    model: str | None = None
    messages: list[Turn] = Field(min_length=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: dict | None = None
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    tools: list[dict] | None = None
    tool_choice: str | None = None
    # vLLM's names for what OpenAI's interface lacks.
    top_k: int | None = Field(None, ge=-1)
    repetition_penalty: float | None = Field(None, ge=LEAST_PENALTY)

    @model_validator(mode="before")
    @classmethod
    def _only_what_is_honoured(cls, body):
        json.dumps(body, ensure_ascii=False).encode()  # a ValueError for half of a surrogate pair, which JSON can hold
        if not isinstance(body, dict):
            return body
        read, faults = {}, []
        for name, value in body.items():
            if name in cls.model_fields and name not in NEUTRAL:
                read[name] = value
            elif name in NEUTRAL and value is not None and value not in NEUTRAL[name]:
                choices = " or ".join(map(_quote, NEUTRAL[name]))
                faults.append(f"{name}: {_quote(value)} is not supported; leave it out or give {choices}")
            elif name in cls.model_fields:
                read[name] = value
            elif name not in NEUTRAL and name not in UNREAD and value is not None:
                faults.append(f"{name}: {_quote(value)} is not supported; leave it out")
        if faults:
            raise ValueError("; ".join(faults))
        return read

    @field_validator("tools")
    @classmethod
    def _only_functions(cls, tools):
        for tool in tools or ():
            function = tool.get("function")
            if not (isinstance(function, dict) and isinstance(function.get("name"), str)):
                raise ValueError(
                    f'{_quote(tool)} is not supported; a tool is {{"type": "function", "function": {{...}}}}'
                )
            schema = function.get("parameters") or {}
            if not (isinstance(schema, dict) and isinstance(schema.get("properties") or {}, dict)):
                raise ValueError(f"{_quote(tool)}: parameters are a JSON schema, with properties as an object")
        return tools

    def decoding(self, room: int) -> Decoding:
        """Greedy unless a temperature asks for more."""
        max_new_tokens = self.max_completion_tokens or self.max_tokens or max(min(DEFAULT_MAX_TOKENS, room), 1)
        temperature = self.temperature or 0.0
        return Decoding(
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=(self.top_p or 1.0) if temperature else 1.0,
            top_k=max(self.top_k or 0, 0) if temperature else 0,
            repetition_penalty=self.repetition_penalty or 1.0,
            stop=[self.stop] if isinstance(self.stop, str) else self.stop,
        )

    def offered_tools(self) -> list[dict] | None:
        return None if self.tool_choice == "none" else self.tools or None

    def seed_of_draws(self) -> int | None:
        """None for no seed, which is -1 in vLLM's interface."""
        return None if self.seed == -1 else self.seed


def _quote(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 80 else f"{text[:80]}..."


def results_in_order(turns: Sequence[Turn]) -> list[Turn]:
    """The turns with the results of tools in the order of their calls, in which templates without ids have them.

    Raises Unusable for the result of no call of the turn before, and for a call with none or several.
    """
    ordered: list[Turn] = []
    calls: list = []
    for is_result, group in groupby(turns, key=lambda turn: turn.role == "tool"):
        group = list(group)
        ids = [call["id"] for call in calls if isinstance(call, dict) and "id" in call]
        given = [turn.extra("tool_call_id") for turn in group]
        if is_result and ids:
            if others := [name for name in given if name not in ids]:
                raise Unusable("no such call", f"a turn of a tool has tool_call_id {others[0]}; the calls have {ids}")
            group.sort(key=lambda turn: ids.index(turn.extra("tool_call_id")))
        if is_result and calls and (len(group) != len(calls) or any(given.count(name) != 1 for name in ids)):
            of_ids = f" with tool_call_id {given}; the calls have {ids}" if ids else ""
            what = f"{len(calls)} tool_calls are followed by {len(group)} turns of tools{of_ids}"
            raise Unusable("not one result a call", f"{what}; send one result for each call")
        calls = group[-1].extra("tool_calls") or []
        if not isinstance(calls, list):
            raise Unusable("no list of calls", f"tool_calls {calls!r}: give a list")
        ordered += group
    return ordered


def encode_request(chat_model: ChatModel, request: ChatRequest) -> tuple[list[int], Decoding]:
    """The prompt's ids and the decoding; raises HTTPException 400 for a request that cannot be answered."""
    chat_template, tools = chat_model.chat_template, request.offered_tools()
    if tools and chat_model.call_form is None:
        why = "writes no calls of tools, or none that are read here; leave it out"
        raise HTTPException(HTTPStatus.BAD_REQUEST, f"tools: the chat template of {chat_template.name} {why}")
    try:
        turns = results_in_order(request.messages)
        messages = turns_to_answer([turn.as_message(number) for number, turn in enumerate(turns, 1)])
        refuse_control_tokens(chat_template, messages, tools)
        prompt = encode_prompt(chat_model.tokenizer, chat_template, messages, tools)
        decoding = request.decoding(chat_model.context - len(prompt))
    except Unusable as unusable:
        raise HTTPException(HTTPStatus.BAD_REQUEST, unusable.detail) from None
    except UserError as error:
        raise HTTPException(HTTPStatus.BAD_REQUEST, str(error).removeprefix("--")) from None
    if len(prompt) + decoding.max_new_tokens > chat_model.context:
        raise HTTPException(
            HTTPStatus.BAD_REQUEST,
            f"the prompt of {len(prompt)} tokens and a reply of {decoding.max_new_tokens} exceed the context of "
            f"{chat_model.context} tokens; shorten the messages or lower max_tokens",
        )
    return prompt, decoding


# ---------------------------------------------------------------- the interface


def build_app(chat_model: ChatModel, name: str, api_key: str | None, allowed_origins: Sequence[str] = ()) -> FastAPI:
    """The routes, with errors in OpenAI's form."""
    replier = Replier(chat_model)
    started = int(time.time())

    def check_api_key(request: Request) -> None:
        given = request.headers.get("authorization", "").removeprefix("Bearer ")
        if api_key and not secrets.compare_digest(given.encode(), api_key.encode()):
            raise HTTPException(HTTPStatus.UNAUTHORIZED, "send the API key as Authorization: Bearer KEY")

    app = FastAPI(title=name, docs_url=None, redoc_url=None, openapi_url=None)
    if allowed_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=allowed_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            allow_private_network=True,  # a page of the internet may ask a server at home
        )

    @app.exception_handler(StarletteHTTPException)
    async def say_refusal(request: Request, error: StarletteHTTPException) -> JSONResponse:
        return _error(error.status_code, str(error.detail))

    @app.exception_handler(RequestValidationError)
    async def say_faults(request: Request, error: RequestValidationError) -> JSONResponse:
        return _error(HTTPStatus.BAD_REQUEST, "; ".join(map(_describe_fault, error.errors())))

    @app.exception_handler(torch.cuda.OutOfMemoryError)
    async def say_out_of_memory(request: Request, error: torch.cuda.OutOfMemoryError) -> JSONResponse:
        return _error(HTTPStatus.SERVICE_UNAVAILABLE, "out of GPU memory; shorten the messages or lower max_tokens")

    @app.exception_handler(Exception)  # whose traceback goes to the log all the same
    async def say_unexpected(request: Request, error: Exception) -> JSONResponse:
        return _error(HTTPStatus.INTERNAL_SERVER_ERROR, "an unexpected error, which is in the server's log")

    @app.get("/health")
    async def health() -> dict:
        return {"status": "ok"}

    @app.get("/v1/models", dependencies=[Depends(check_api_key)])
    async def models() -> dict:
        entry = {"id": name, "object": "model", "created": started, "owned_by": "local"}
        return {"object": "list", "data": [entry | {"max_model_len": chat_model.context}]}

    @app.post("/v1/chat/completions", dependencies=[Depends(check_api_key)])
    async def chat_completions(http_request: Request, request: ChatRequest):
        if request.model not in (None, name):
            raise HTTPException(HTTPStatus.NOT_FOUND, f"no model {request.model} here; this server has {name}")
        prompt, decoding = encode_request(chat_model, request)
        pieces = replier.pieces(prompt, decoding, request.seed_of_draws(), bool(request.stream))
        head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": name}
        if request.stream:
            with_usage = bool((request.stream_options or {}).get("include_usage"))
            events = _events(chat_model, request, pieces, head, len(prompt), with_usage)
            return StreamingResponse(events, media_type="text/event-stream")
        async for piece in pieces:
            if isinstance(piece, Reply):
                thought, answer, _ = split_reply(piece.text, chat_model.chat_template.opens_thought)
                reader = _call_reader(chat_model, request)
                words = reader.add(answer)
                rest, calls = reader.end()
                message = {"role": "assistant", "content": words + rest} | _thought_field(thought) | _calls_field(calls)
                choice = {"index": 0, "message": message, "finish_reason": _finish_reason(piece, calls)}
                usage = _usage(chat_model, len(prompt), piece)
                return head | {"object": "chat.completion", "choices": [choice], "usage": usage}
            if await http_request.is_disconnected():
                await pieces.aclose()
                raise HTTPException(499, "the client has gone")
        raise AssertionError("a generation ended without a reply")

    return app


def _error(status: int, message: str) -> JSONResponse:
    kind = "invalid_request_error" if status < HTTPStatus.INTERNAL_SERVER_ERROR else "server_error"
    return JSONResponse({"error": {"message": message, "type": kind, "param": None, "code": status}}, status)


def _describe_fault(fault: dict) -> str:
    """Describe a pydantic error: field, value, and what is supported."""
    where = "".join(f"{part}: " for part in [".".join(map(str, fault["loc"][1:]))] if part)
    if fault["type"] == "value_error":  # raised here, and whole
        return where + str(fault["ctx"]["error"])
    if fault["type"] in ("missing", "json_invalid"):
        return where + fault["msg"]
    return f"{where}{_quote(fault['input'])} is not supported; {fault['msg'][0].lower()}{fault['msg'][1:]}"


def _finish_reason(reply: Reply, calls: list[ToolCall]) -> str:
    if not reply.ended:
        return "length"
    return "tool_calls" if calls else "stop"


def _call_reader(chat_model: ChatModel, request: ChatRequest) -> CallReader:
    tools = request.offered_tools()
    return CallReader(chat_model.call_form if tools else None, tools)


def _calls_field(calls: list[ToolCall]) -> dict:
    """OpenAI's field for calls, in messages and in the deltas of a stream."""
    entries = []
    for index, call in enumerate(calls):
        function = {"name": call["name"], "arguments": json.dumps(call["arguments"], ensure_ascii=False)}
        entries.append(
            {"index": index, "id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": function}
        )
    return {"tool_calls": entries} if entries else {}


def _thought_field(thought: str) -> dict:
    """vLLM's field for a thought, in messages and in the deltas of a stream."""
    return {"reasoning_content": thought} if thought else {}


def _usage(chat_model: ChatModel, n_prompt: int, reply: Reply) -> dict:
    """OpenAI's counts; those of the reply include its thought, which is also counted by itself without its marks."""
    thought = split_reply(reply.text, chat_model.chat_template.opens_thought).thought
    # Of an odd text more tokens can be made than were generated.
    n_thought = min(len(chat_model.tokenizer.encode(thought, add_special_tokens=False)), reply.n_tokens)
    return {
        "prompt_tokens": n_prompt,
        "completion_tokens": reply.n_tokens,
        "total_tokens": n_prompt + reply.n_tokens,
        "completion_tokens_details": {"reasoning_tokens": n_thought},
    }


async def _events(
    chat_model: ChatModel,
    request: ChatRequest,
    pieces: AsyncIterator[str | Reply],
    head: dict,
    n_prompt: int,
    with_usage: bool,
) -> AsyncIterator[str]:
    """Server-sent events in OpenAI's form; an error after the first event is sent as an event too."""
    splitter = ReplySplitter(chat_model.chat_template.opens_thought)
    reader = _call_reader(chat_model, request)

    def event(delta: dict, finish_reason: str | None = None, **more) -> str:
        choice = {"index": 0, "delta": delta, "finish_reason": finish_reason}
        chunk = head | {"object": "chat.completion.chunk", "choices": [choice]} | more
        return f"data: {json.dumps(chunk, ensure_ascii=False)}\n\n"

    def text_events(thought: str, words: str) -> list[str]:
        deltas = (_thought_field(thought), {"content": words} if words else {})
        return [event(delta) for delta in deltas if delta]

    try:
        yield event({"role": "assistant", "content": ""})
        async for piece in pieces:
            if isinstance(piece, Reply):
                thought, answer = splitter.end()
                words = reader.add(answer)
                rest, calls = reader.end()
                for text_event in text_events(thought, words + rest):
                    yield text_event
                if calls:
                    yield event(_calls_field(calls))
                yield event({}, _finish_reason(piece, calls))
                if with_usage:
                    yield event({}, choices=[], usage=_usage(chat_model, n_prompt, piece))
            else:
                thought, answer = splitter.add(piece)
                for text_event in text_events(thought, reader.add(answer)):
                    yield text_event
    except (RuntimeError, ValueError) as error:
        logger.error(f"a stream broke off: {error}")
        fault = {"message": str(error), "type": "server_error", "param": None, "code": 500}
        yield f"data: {json.dumps({'error': fault}, ensure_ascii=False)}\n\n"
    finally:
        await pieces.aclose()
    yield "data: [DONE]\n\n"


# ---------------------------------------------------------------- main


def main(argv: Sequence[str] | None = None) -> None:
    # ------------------------------------------------------------ arguments
    parser = StageArgumentParser([ChatModelArguments, ServerArguments])
    model_args, server_args = parser.parse(argv)
    if model_args.reward_model:
        raise UserError("--reward_model: a server writes replies and scores none; leave the flag out")
    check_address(server_args.host, server_args.port)
    start_log()
    for note in parser.notes:
        logger.info(note)

    # ------------------------------------------------------------ model
    chat_model = describe_model(model_args)
    name = server_args.served_model_name or chat_model.name
    if server_args.max_model_len is not None:
        if server_args.max_model_len > chat_model.context:
            logger.info(f"--max_model_len {server_args.max_model_len}: the model has {chat_model.context}")
        chat_model.context = min(chat_model.context, server_args.max_model_len)
    load_weights([chat_model], model_args)
    if chat_model.lora_model:
        change = chat_model.change_by_adapter()
        logger.log("INFO" if change >= LEAST_CHANGE else "WARNING", describe_effect(chat_model.lora_model, change))

    # ------------------------------------------------------------ serve
    app = build_app(chat_model, name, server_args.api_key, server_args.allowed_origins or ())
    address = f"http://{server_args.host}:{server_args.port}"
    logger.info(NOTICE)
    context = f"context {chat_model.context} tokens"
    logger.info(f"{name} at {address}/v1, {context}, up to {MOST_AT_A_TIME} replies at a time")
    if server_args.host not in LOOPBACK and not server_args.api_key:
        logger.warning(f"--host {server_args.host} without --api_key: whoever reaches this port can ask")
    # A signal lets the running requests finish.
    uvicorn.run(app, host=server_args.host, port=server_args.port, log_level="info", access_log=False)


if __name__ == "__main__":
    run_script(main)
