"""A run with rollouts: which evaluation is the best, and which flags a resumed run must keep."""

import math
from pathlib import Path
from types import SimpleNamespace

import pytest

from medtune.errors import UserError
from medtune.rl.arguments import PPOArguments, RLModelArguments, RLTrainingArguments, fixed_settings
from medtune.rl.log import ppo_figures
from medtune.rl.run import Run, State, resumed_state


class Keeper:
    """What `Run.keep_best` has of a run, and the updates at which it saves checkpoint-best."""

    def __init__(self, output_dir: Path):
        self.output_dir, self.state, self.shown = output_dir, State({}), ppo_figures(["judge"], None)
        self.accelerator = SimpleNamespace(is_main_process=True, wait_for_everyone=lambda: None)
        self.saved: list[int] = []

    def save_policy(self, folder: Path) -> None:
        self.saved.append(self.state.global_step)


@pytest.mark.parametrize(
    ("rewards", "saved"),
    [
        ([0.1, 0.3, 0.2], [0, 1]),
        ([0.1, math.nan, 0.3, 0.2], [0, 2]),
        ([0.3, math.nan, 0.2], [0]),
        ([0.3, None, 0.2], [0]),
        ([math.nan, 0.1, 0.0], [0, 1]),
    ],
)
def test_an_evaluation_that_nobody_judged_is_not_the_best(tmp_path, rewards, saved):
    keeper = Keeper(tmp_path)
    for update, reward in enumerate(rewards):
        keeper.state.global_step = update
        Run.keep_best(keeper, {"eval_kl": 0.0} | ({} if reward is None else {"eval_rlhf_reward": reward}))
    assert keeper.saved == saved


@pytest.mark.parametrize("flag", ["learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon"])
def test_a_resumed_optimizer_brings_its_own_settings(tmp_path, flag):
    def settings(**changes) -> dict:
        flags = RLTrainingArguments(output_dir=str(tmp_path), do_train=True, use_cpu=True, **changes)
        model_args = RLModelArguments(sft_model_path="sft")
        return fixed_settings("ppo", model_args, flags.training_arguments(), PPOArguments(), 8, 10, {})

    checkpoint = tmp_path / "checkpoint-1"
    checkpoint.mkdir()
    State(settings()).save(checkpoint / "trainer_state.json")
    assert resumed_state(str(checkpoint), settings()).settings == settings()
    with pytest.raises(UserError, match=rf"^--{flag} 0\.5: the run in .* was started with "):
        resumed_state(str(checkpoint), settings(**{flag: 0.5}))
