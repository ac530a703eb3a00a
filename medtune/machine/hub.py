"""Whether models can be downloaded, from the hub or HF_ENDPOINT, whether the token is valid and the clock right."""

import email.utils
import http.client
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from medtune.machine.findings import FINE, NOTE, WRONG, Finding

HUB = "https://huggingface.co"
SOME_FILE = "Qwen/Qwen2.5-3B-Instruct/resolve/main/config.json"
SECONDS_TO_ANSWER_HUB = 5
LARGEST_SKEW = 60  # seconds


def check_hub() -> Iterator[Finding]:
    endpoint = os.environ.get("HF_ENDPOINT", "") or HUB
    if os.environ.get("HF_HUB_OFFLINE", "0").lower() in ("1", "true", "yes", "on"):
        yield Finding(FINE, "hub", "HF_HUB_OFFLINE is set: models come from folders and from the cache")
        return
    if not (address := re.fullmatch(r"https?://([\w.-]+|\[[\w:]+\])(:\d+)?(/[\w./-]*)?", endpoint, re.ASCII)):
        yield Finding(WRONG, "hub", f"HF_ENDPOINT={endpoint!r}: an address is https://HOST, without blanks")
        return
    endpoint = endpoint.rstrip("/")
    name, start = address[1], time.perf_counter()
    code, date, fault = _ask(f"{endpoint}/{SOME_FILE}")
    if code == 200:
        yield Finding(FINE, "hub", f"{name} answers in {time.perf_counter() - start:.1f} s")
    elif code:
        todo = "HF_ENDPOINT is to be the hub or a mirror of it"
        yield Finding(WRONG, "hub", f"{name} answers {code} for a file that the hub has: {todo}")
    else:
        todo = "export HF_ENDPOINT=ADDRESS_OF_A_MIRROR, or give a model folder as MODEL"
        yield Finding(WRONG, "hub", f"{name} cannot be reached ({fault}): {todo}")
    yield _check_token(endpoint)
    yield _check_clock(date)


def _check_token(endpoint: str) -> Finding:
    subject, token, file = "HF_TOKEN", os.environ.get("HF_TOKEN", ""), _token_file()
    where, unset = "", "unset it"
    if not token and os.access(file, os.R_OK):
        where, unset = f" (that of {file})", "hf auth logout"
        token = file.read_text(errors="replace").strip()
    if not token:
        return Finding(FINE, subject, "not set; gated models (Llama, Gemma) need it, Qwen does not")
    if not token.isascii() or not token.isprintable() or " " in token:
        fault = "holds a blank, a line end or another character that no token has"
        return Finding(WRONG, subject, f"{fault}{where}: copy it again")
    code, _, fault = _ask(f"{endpoint}/api/whoami-v2", token)
    if code == 200:
        return Finding(FINE, subject, f"valid{where}")
    if code in (401, 403):
        todo = f"make another at {HUB}/settings/tokens, or {unset}"
        return Finding(WRONG, subject, f"refused ({code}){where}: {todo}")
    return Finding(NOTE, subject, f"not checked{where} ({f'the answer is {code}' if code else fault})")


def _token_file() -> Path:
    """Where `hf auth login` leaves the token, which downloads send where HF_TOKEN is not set."""
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface")
    return Path(os.environ.get("HF_TOKEN_PATH") or Path(home, "token")).expanduser()


def _ask(url: str, token: str = "") -> tuple[int, str, str]:
    """The status code and the Date header of the answer, or 0 and why there is none."""
    request = urllib.request.Request(url, headers={"User-Agent": "check_machine"})
    if token:
        # Unredirected: another host that the answer names does not get it.
        request.add_unredirected_header("Authorization", f"Bearer {token}")
    try:
        with urllib.request.urlopen(request, timeout=SECONDS_TO_ANSWER_HUB) as answer:
            return answer.status, answer.headers.get("Date", ""), ""
    except urllib.error.HTTPError as error:
        return error.code, error.headers.get("Date", ""), ""
    except (OSError, ValueError, http.client.HTTPException) as error:  # no address, or no HTTP
        return 0, "", " ".join(str(getattr(error, "reason", error)).split())


def _check_clock(date: str) -> Finding:
    """Against the Date header of a server."""
    now = time.strftime("%F %T %Z")
    if not date:
        return Finding(NOTE, "clock", f"{now}, not compared since no server answered; a wrong one fails certificates")
    if (parts := email.utils.parsedate_tz(date)) is None:
        return Finding(NOTE, "clock", f"{now}, not compared since the answer has no date")
    ahead = time.time() - email.utils.mktime_tz(parts)
    if abs(ahead) <= LARGEST_SKEW:
        return Finding(FINE, "clock", now)
    skew = f"{abs(ahead):.0f} s {'ahead' if ahead > 0 else 'behind'}"
    return Finding(WRONG, "clock", f"{now}, {skew}: certificates fail; timedatectl set-ntp true, or tell the host")
