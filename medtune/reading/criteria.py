"""The criteria of a record's rubric, in the form of HealthBench."""

import math
from typing import NamedTuple

from medtune.errors import Unusable


class Criterion(NamedTuple):
    """points: what meeting it adds; below 0 where it describes something bad."""

    text: str
    points: float


def to_criteria(rubrics: object) -> list[Criterion]:
    """The criteria of a record's `rubrics`; raises Unusable for anything else than HealthBench's form."""
    if not isinstance(rubrics, list) or not rubrics:
        raise Unusable("broken rubrics", '\'rubrics\' must be a list of {"criterion": text, "points": number}')
    criteria = []
    for number, item in enumerate(rubrics, start=1):
        text, points = (item.get("criterion"), item.get("points")) if isinstance(item, dict) else (None, None)
        if not isinstance(text, str) or not text.strip():
            raise Unusable("broken rubrics", f"item {number} of 'rubrics' has no 'criterion' in words")
        if isinstance(points, bool) or not isinstance(points, int | float) or not math.isfinite(points) or not points:
            raise Unusable("broken rubrics", f"item {number} of 'rubrics': its points are {points!r:.40}, not a number")
        criteria.append(Criterion(text.strip(), points))
    if all(criterion.points < 0 for criterion in criteria):
        raise Unusable("broken rubrics", "no item of 'rubrics' has points above 0, so nothing can be had")
    return criteria
