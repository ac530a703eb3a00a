"""Dialogues in the guide's form, of random characters, so that no two are alike."""

import random

HAN = [chr(code) for code in range(0x4E00, 0x4E00 + 3000)]


def dialogue(*turns: str, **more) -> dict:
    names = ("human", "gpt")
    return {"conversations": [{"from": names[n % 2], "value": turn} for n, turn in enumerate(turns)], **more}


def random_text(rng: random.Random, length: int) -> str:
    return "".join(rng.choices(HAN, k=length))


def random_dialogues(n: int, seed: int = 0) -> list[dict]:
    rng = random.Random(seed)
    return [dialogue(random_text(rng, 20), random_text(rng, 60)) for _ in range(n)]
