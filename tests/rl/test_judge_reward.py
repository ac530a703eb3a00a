"""The reward `judge`: values by hand, what a reply without a judgement becomes, and a judge that answers no more."""

import json
import math
import signal
import threading

import pytest
import torch
from datasets import Dataset
from judge_server import running_judge, send
from transformers import TrainingArguments

from medtune.errors import UserError
from medtune.measuring import judge_client
from medtune.rl.arguments import RewardArguments
from medtune.rl.grpo_math import fill_missing, group_advantages, has_signal
from medtune.rl.rewards import load_rewards
from medtune.rl.rollout import Rollout, without_unjudged
from medtune.rl.scored_replies import ScoredReply
from medtune.rl.vllm_servers import ServerError
from medtune.training.interruption import SignalListener, StoppedInRolloutError

ASKED = [{"role": "user", "content": "头疼怎么办？"}]
RUBRICS = [{"criterion": "水", "points": 5}, {"criterion": "睡", "points": 3}, {"criterion": "酒", "points": -4}]


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(judge_client, "LONGEST_PAUSE", 0)
    with running_judge() as judge:
        judge.verdict = lambda reply, criterion: criterion in reply
        yield judge


@pytest.fixture
def rewards(server, tmp_path):
    flags = {"judge_url": server.url, "judge_model": "m", "judge_cache": str(tmp_path / "cache")}
    return load_rewards(RewardArguments(rewards=["judge"], **flags), response_length=40)


def reply_of(text: str, **record) -> ScoredReply:
    return ScoredReply(text, 5, True, ASKED, {"rubrics": RUBRICS} | record)


@pytest.fixture
def stop(tmp_path) -> SignalListener:
    return SignalListener(TrainingArguments(str(tmp_path), use_cpu=True))


@pytest.fixture
def judged(rewards, stop):
    return lambda *texts: rewards([reply_of(text) for text in texts], stop=stop)[:, 0].tolist()


def test_the_share_of_a_rubrics_points_of_the_answer_alone(server, rewards, judged):
    texts = ["多喝水", "喝水，睡觉", "喝酒", "<think>\n喝水\n</think>\n\n睡觉", "", "<think>\n喝水"]
    assert judged(*texts) == [5 / 8, 1, -0.5, 3 / 8, 0, 0]
    assert len(server.bodies) == 4, "all criteria at once, and nothing is asked of a reply without an answer"
    assert rewards.total(torch.tensor([[5 / 8]])).tolist() == [5 / 8]


def test_without_rubrics_ours_of_quality_beside_the_datas_reply(server, rewards, stop):
    reply = ScoredReply("多喝水", 5, True, ASKED, {"reference": "多休息"})
    server.verdict = lambda text, criterion: "参考答案" in criterion
    assert rewards([reply], stop=stop)[:, 0].tolist() == pytest.approx([5 / 16])
    message = server.bodies[0]["messages"][1]["content"]
    assert '<reference>\n"多休息"\n</reference>' in message
    assert message.count("\n6: ") == 1


def test_a_failure_is_no_reward(server, judged):
    def filter_out(number, handler) -> bool:
        is_bad = "喝酒" in server.bodies[number - 1]["messages"][1]["content"]
        return is_bad and (send(handler, 400, {"error": {"message": "filtered"}}) or True)

    server.fault = filter_out
    scores = judged("多喝水", "喝酒", "睡觉")
    assert math.isnan(scores[1])
    assert [scores[0], scores[2]] == [5 / 8, 3 / 8]


def test_a_judge_that_answers_no_more_ends_the_run_as_a_server_does(server, judged):
    server.fault = lambda number, handler: send(handler, 503, {}) or True
    with pytest.raises(ServerError, match=r"--judge_url .*: 8 questions in a row without an answer, the last: it answ"):
        judged(*(f"回答{n}" for n in range(20)))


def test_a_signal_breaks_off_a_judge_that_hangs_and_keeps_what_it_answers_in_time(
    server, judged, stop, tmp_path, monkeypatch
):
    monkeypatch.setattr(judge_client, "AT_A_TIME", 2)
    monkeypatch.setattr(judge_client, "SECONDS_AT_A_SIGNAL", 2)
    slow, ended = threading.Event(), []

    def hang(number, handler) -> bool:
        if "多喝水" in server.bodies[number - 1]["messages"][1]["content"]:
            return not slow.wait(60)  # it answers behind the signal
        stop.received = signal.SIGTERM
        slow.set()
        return server.hang(number, handler) and not ended.append(number)

    server.fault = hang
    with pytest.raises(StoppedInRolloutError):
        judged("多喝水", "喝水，睡觉", "睡觉", "喝酒")
    assert not ended, "the answer that does not come is not waited for"
    assert len(server.bodies) <= 3, "nor is anything asked after the signal"
    assert len([*tmp_path.glob("cache/*/*.json")]) == 1


def test_the_judge_is_tried_before_weights_load(server, rewards):
    rows = [{"messages": json.dumps([ASKED, None]), "record": json.dumps({"rubrics": RUBRICS})}]
    rewards.rehearse(Dataset.from_list(rows))
    assert len(server.bodies) == 1, "made-up replies are not sent, only counted"
    server.fault = lambda number, handler: send(handler, 200, "no", Content_Type="text/plain") or True
    rewards.judge.judge.model = "other"
    with pytest.raises(UserError, match=r"--judge_url .*: other is no judge: an answer that is not of OpenAI's form"):
        rewards.rehearse(Dataset.from_list(rows))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"rewards": ["judge"]}, "--judge_url is missing, which --rewards judge needs"),
        ({"rewards": ["exam"], "judge_model": "m"}, "--judge_model m: nothing is judged"),
        (
            {"rewards": ["judge:-1"], "judge_url": "http://127.0.0.1:9", "judge_model": "m"},
            "--rewards judge:-1: judge is higher for better replies",
        ),
    ],
)
def test_flags_that_are_refused(flags, message):
    with pytest.raises(UserError, match=message):
        load_rewards(RewardArguments(**flags), response_length=40)


# ---------------------------------------------------------------- replies without a reward


def test_in_a_group_what_is_missing_moves_no_others_advantage():
    nan = math.nan
    rewards = torch.tensor([[1.0, 1], [nan, 1], [0.0, 1], [0.5, 0], [nan, 2], [nan, 2], [nan, 2], [nan, 2]])
    filled = fill_missing(rewards, 4)
    assert filled[:4].tolist() == [[1, 1], [0.5, 1], [0, 1], [0.5, 0]]
    assert filled[4:].tolist() == [[0, 2]] * 4
    assert group_advantages(filled[:, 0], 4, scale=False).tolist() == [0.5, 0, -0.5, 0, 0, 0, 0, 0]
    assert has_signal(filled[:, 0], 4).tolist() == [True] * 4 + [False] * 4
    whole = torch.arange(8.0).view(4, 2)
    assert torch.equal(fill_missing(whole, 2), whole)


def test_in_ppo_another_reply_stands_in_for_what_is_missing():
    scores = torch.tensor([math.nan, 1.0, math.nan, 2.0, math.nan])
    ids = torch.arange(10).view(5, 2) + 1
    mask = torch.ones(5, 1, dtype=torch.bool)
    columns = {name: torch.zeros(5, 1) for name in ("policy_logps", "entropies", "variances", "values")}
    rest = {"attention_mask": torch.ones(5, 2, dtype=torch.bool), "mask": mask, "ended": mask[:, 0]}
    rollout = Rollout(ids=ids, **rest, **columns, rewards=scores[:, None], scores=scores)
    replaced = without_unjudged(rollout)
    assert replaced.scores.tolist() == [1, 1, 2, 2, 1]
    assert replaced.ids[:, 0].tolist() == [3, 3, 7, 7, 3]
    rollout.scores[:] = math.nan
    with pytest.raises(ServerError, match="the judge has judged no reply of an update"):
        without_unjudged(rollout)
