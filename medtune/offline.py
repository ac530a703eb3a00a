"""Whether the hub answers: without it what was downloaded before is found at once, and anything else is refused."""

import os
import socket
from urllib.parse import urlsplit
from urllib.request import getproxies

import huggingface_hub.constants as hub
from loguru import logger


def go_offline_without_hub() -> bool:
    """Go offline if the hub does not answer, since huggingface_hub 2.4 retries for 46 s a file; True if it is so."""
    address, proxies = urlsplit(hub.ENDPOINT), getproxies()
    if hub.HF_HUB_OFFLINE or address.scheme in proxies or "all" in proxies:
        return hub.HF_HUB_OFFLINE
    try:
        port = address.port or (80 if address.scheme == "http" else 443)
        socket.create_connection((address.hostname, port), timeout=10).close()
    except OSError:
        logger.warning(f"{hub.ENDPOINT} cannot be reached: only what was downloaded before is found")
        hub.HF_HUB_OFFLINE = True
        os.environ["HF_HUB_OFFLINE"] = "1"  # PEFT reads this one
    return hub.HF_HUB_OFFLINE
