"""What the task files need besides their templates; lm-evaluation-harness loads it."""

from datasets import Dataset


def single_choice(dataset: Dataset) -> Dataset:
    """The questions with one right answer."""
    return dataset.filter(lambda record: record["Answer"] in ("A", "B", "C", "D", "E"))
