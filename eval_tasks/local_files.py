"""What the task files need besides their templates; lm-evaluation-harness loads it."""

from datasets import Dataset


def single_choice(dataset: Dataset) -> Dataset:
    """The questions with one right answer."""
    column = "Answer" if "Answer" in dataset.column_names else "answer"
    return dataset.filter(lambda record: record[column] is not None and len(record[column]) == 1)
