"""The lines of the log."""

import pytest
from loguru import logger

from medtune.rl.log import grpo_figures, log_evaluation, log_update


@pytest.mark.parametrize(
    ("loss", "shown"), [(-1e-9, "loss 0.0000"), (-0.0, "loss 0.0000"), (-0.25, "loss -0.2500"), (0.5, "loss 0.5000")]
)
def test_what_rounds_to_zero_has_no_minus(loss, shown):
    lines = []
    sink = logger.add(lines.append, format="{message}")
    log_update({"policy/loss": loss}, 1, 2, grpo_figures(["exam"], None), "")
    log_evaluation({"eval_reward": -1e-9}, 1)
    logger.remove(sink)
    assert lines == [f"update 1/2  {shown}\n", "update 1  evaluation: reward 0.000\n"]
