"""The RM stage: its loss and metrics, where a score is read, what it starts from and leaves, how it resumes, errors."""

import json
import math
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from guide import GUIDE_RM
from peft import PeftModel
from safetensors.torch import load_file
from stage_runs import ADAPTER_FILES, PARTS, RESULTS, logged, names, run_process, stage_flags, weights_of
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import merge_peft_adapter
import reward_modeling
from medtune.errors import UserError
from medtune.models.lineage import read_lineage
from medtune.models.reward_models import load_reward_model
from medtune.reading.tokenization import load_chat_template
from medtune.training import reward_trainer
from medtune.training.batches import PairCollator
from medtune.training.reward_trainer import RewardTrainer, bradley_terry_losses, pair_statistics
from reward_modeling import compare_with_length, set_pad_token

SIGNS = ["疼", "痒", "肿", "麻"]
LN2 = math.log(2)
HEAD = "base_model.model.score.weight"


def make_pairs(n_pairs: int) -> list[dict]:
    """Pairs in the guide's form, of many lengths; in every second one the rejected reply is the longer one."""
    return [
        {
            "system": "",
            "history": [["你好", "请说。"]] * (index % 3),
            "question": f"第{index}个病人{PARTS[index % 8]}{SIGNS[index % 4]}怎么办？",
            "response_chosen": f"{PARTS[index % 8]}{SIGNS[index % 4]}请就诊，注意休息。"
            + "多喝水，注意休息。" * (index % 2 * 9),
            "response_rejected": "不用管它，喝点酒就好。" + "会过去的。" * ((index + 1) % 2 * 4),
        }
        for index in range(n_pairs)
    ]


@pytest.fixture
def data_dir(write_jsonl) -> Path:
    return write_jsonl("data/pairs.jsonl", make_pairs(40)).parent


@pytest.fixture
def flags(tiny_model_dir, data_dir, tmp_path):
    """A short run's flags; keywords replace or add some, None removes one."""

    def build(**changes) -> list[str]:
        evaluated = {"validation_file_dir": data_dir, "do_eval": True, "max_eval_samples": 4}
        values = {"train_file_dir": data_dir, "template_name": None} | evaluated | changes
        return stage_flags("rm", tiny_model_dir, tmp_path, **values)

    return build


# ---------------------------------------------------------------- loss


def test_loss_worked_by_hand():
    chosen, rejected = torch.tensor([1.0, 0.0, -2.0]), torch.tensor([0.0, 0.0, 1.0])
    none = torch.zeros(3)
    expected = [math.log(1 + math.exp(-1)), LN2, math.log(1 + math.exp(3))]
    assert bradley_terry_losses(chosen, rejected, none, None).tolist() == pytest.approx(expected, abs=1e-6)
    margins = torch.tensor([0.5, 1.0, 0.0])
    expected = [math.log(1 + math.exp(-0.5)), math.log(1 + math.e), math.log(1 + math.exp(3))]
    assert bradley_terry_losses(chosen, rejected, margins, None).tolist() == pytest.approx(expected, abs=1e-6)
    expected = [expected[0] + 0.1 * 1**2, expected[1], expected[2] + 0.1 * (-1) ** 2]
    assert bradley_terry_losses(chosen, rejected, margins, 0.1).tolist() == pytest.approx(expected, abs=1e-6)


def test_first_loss_is_ln_2_and_with_a_margin_more(flags, write_jsonl, tmp_path):
    reward_modeling.main(flags(do_eval=None, max_steps=1))
    assert logged(tmp_path / "out")[1] == pytest.approx(LN2, abs=5e-5)
    data = write_jsonl("margins/pairs.jsonl", [pair | {"margin": 1.0} for pair in make_pairs(8)])
    reward_modeling.main(flags(do_eval=None, max_steps=1, train_file_dir=data, output_dir=tmp_path / "margins"))
    assert logged(tmp_path / "margins")[1] == pytest.approx(math.log(1 + math.e), abs=5e-5)


def test_a_step_is_the_same_however_it_is_cut(flags, write_jsonl, tmp_path):
    """3 x 3 leaves a micro-batch of two pairs, which count as much as the others."""
    options = {"train_file_dir": write_jsonl("eight/pairs.jsonl", make_pairs(8)), "do_eval": None, "max_steps": 3}
    options |= {"lora_dropout": 0, "learning_rate": 1e-2}
    cuts = ((8, 1), (2, 4), (3, 3), (1, 8))
    for size, steps in cuts:
        sizes = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps}
        reward_modeling.main(flags(**options, **sizes, output_dir=tmp_path / f"{size}x{steps}"))
    for name in ("loss", "grad_norm"):
        whole, *others = (list(logged(tmp_path / f"{size}x{steps}", name).values()) for size, steps in cuts)
        assert all(cut == pytest.approx(whole, abs=1e-5) for cut in others)


def test_a_loss_that_is_not_finite_stops_with_step_and_records(flags, monkeypatch):
    monkeypatch.setattr(reward_trainer, "bradley_terry_losses", lambda chosen, *_: chosen * math.nan)
    with pytest.raises(UserError, match=r"^step 1: the loss is nan at .* on .*pairs\.jsonl:\d+, .*pairs\.jsonl:\d+; "):
        reward_modeling.main(flags(max_bad_steps=1))


# ---------------------------------------------------------------- metrics


def test_metrics_worked_by_hand():
    # loss, chosen, rejected, length of the chosen reply, of the rejected one
    rows = [[0.1, 3, 1, 5, 9], [0.2, 1, 2, 5, 9], [0.3, 4, 0, 9, 5], [0.4, 2, 2, 7, 7]]
    metrics = pair_statistics(SimpleNamespace(predictions=np.array(rows, dtype=np.float32)))
    assert metrics == pytest.approx(
        {
            "loss": 0.25,
            "accuracy": 0.5,  # a tie is not right
            "margin": (2 - 1 + 4 + 0) / 4,
            "accuracy_rejected_longer": 0.5,
            "accuracy_rejected_shorter": 1.0,
            "longer_wins": (0 + 0 + 1 + 0.5) / 4,
            "mean_score": 15 / 8,
            "pairs": 4,
        }
    )
    one = pair_statistics(SimpleNamespace(predictions=np.array([[0.1, 3, 1, 5, 9]])))
    assert "accuracy_rejected_shorter" not in one


@pytest.mark.parametrize(
    ("accuracy", "longer_wins", "warning"),
    [
        (0.9, 0.5, None),
        (0.6, 0.7, 'does not beat the rule "longer wins" (60.0% against 70.0%)'),
        (0.7, 0.7, 'does not beat the rule "longer wins" (70.0% against 70.0%)'),
        (0.6, 0.2, 'does not beat the rule "shorter wins" (60.0% against 80.0%)'),
    ],
)
def test_a_model_no_better_than_length_is_warned_of(accuracy, longer_wins, warning, capfd):
    from medtune.training.log import start_log

    start_log()
    compare_with_length({"eval_accuracy": accuracy, "eval_pairs": 100.0, "eval_longer_wins": longer_wins})
    log = capfd.readouterr().err
    assert f"{accuracy:.1%} of 100 held-out pairs are ordered right (95 % interval" in log
    assert warning in log if warning else "WARNING" not in log
    if accuracy == 0.9:
        assert "82.6% to 94.5%" in log  # Wilson's interval, by hand


# ---------------------------------------------------------------- batches and padding


def test_a_batch_is_the_chosen_texts_and_then_the_rejected():
    rows = [
        {"prompt_ids": [1, 2], "chosen_ids": [3], "rejected_ids": [4, 5], "margin": math.nan, "source": "a:1"},
        {"prompt_ids": [6], "chosen_ids": [7], "rejected_ids": [8], "margin": 0.5, "source": "a:2"},
    ]
    batch = PairCollator(pad_token_id=0)(rows)
    assert batch["input_ids"].tolist() == [[1, 2, 3, 0], [6, 7, 0, 0], [1, 2, 4, 5], [6, 8, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 1], [1, 1, 0, 0]]
    assert batch["margin"].tolist() == [0.0, 0.5]
    assert batch["reply_mask"].sum(dim=1).tolist() == [1, 1, 2, 1]
    assert batch["sources"] == ["a:1", "a:2"]


def test_the_pad_token_never_ends_a_reply(tiny_model_dir):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    chat_template = load_chat_template(tokenizer, None)
    set_pad_token(tokenizer, chat_template)
    assert tokenizer.pad_token == "<|endoftext|>"
    tokenizer.pad_token = "<|im_end|>"
    set_pad_token(tokenizer, chat_template)
    assert tokenizer.pad_token not in chat_template.stop_tokens
    nothing_else = SimpleNamespace(
        added_tokens_decoder={tokenizer.eos_token_id: SimpleNamespace(special=True)},
        pad_token="<|im_end|>",
        name_or_path="a model",
        eos_token_id=tokenizer.eos_token_id,
        encode=tokenizer.encode,
        convert_tokens_to_ids=tokenizer.convert_tokens_to_ids,
    )
    with pytest.raises(UserError, match="no special token besides those that end a reply"):
        set_pad_token(nothing_else, chat_template)


def test_the_longest_pairs_come_first(flags, monkeypatch):
    lengths = []

    class Spy(PairCollator):
        def __call__(self, rows):
            lengths.extend(row["length"] for row in rows if "length" in row)
            return super().__call__(rows)

    monkeypatch.setattr(reward_modeling, "PairCollator", Spy)
    reward_modeling.main(flags(do_eval=None, max_steps=9, remove_unused_columns=False))
    assert sorted(lengths[:2], reverse=True) == sorted(lengths, reverse=True)[:2]


def test_long_prompts_and_replies_are_cut_and_said(flags, write_jsonl, capfd):
    pairs = make_pairs(12)
    pairs[0] |= {"question": "长" * 300, "response_chosen": "多休息。" * 60}
    data = write_jsonl("long/pairs.jsonl", pairs)
    reward_modeling.main(
        flags(train_file_dir=data, do_eval=None, max_steps=1, max_source_length=90, max_target_length=40)
    )
    log = re.sub(" +", " ", capfd.readouterr().err)
    assert "train pairs kept 12 of 12" in log
    found = re.search(r"train tokens the longest prompt and reply (\d+), (\d+) of 24 replies cut at 40", log)
    assert int(found[1]) <= 130
    assert 1 <= int(found[2]) < 24


# ---------------------------------------------------------------- scores of a saved model


def trained_scores(monkeypatch, argv: list[str]) -> dict[str, list[tuple[list[int], float]]]:
    """Run the stage; [(ids, score)] of its last evaluation's texts."""
    texts, predictions = [], []

    class Spy(PairCollator):
        def __call__(self, rows):
            batch = super().__call__(rows)
            rows = zip(batch["input_ids"], batch["attention_mask"], strict=True)
            texts.append([ids[mask.bool()].tolist() for ids, mask in rows])
            return batch

    def statistics(prediction):
        predictions.append(prediction.predictions)
        return pair_statistics(prediction)

    monkeypatch.setattr(reward_modeling, "PairCollator", Spy)
    monkeypatch.setattr(reward_trainer, "pair_statistics", statistics)
    reward_modeling.main(argv)
    n_batches = len(predictions[-1]) // 2
    found = []
    for batch, rows in zip(texts[-n_batches:], predictions[-1].reshape(n_batches, 2, 5), strict=True):
        found += zip(batch, [*rows[:, 1], *rows[:, 2]], strict=True)
    return found


def plain_scores(model, tokenizer, texts: list[list[int]], side: str) -> list[float]:
    tokenizer.padding_side = side
    batch = tokenizer.pad({"input_ids": texts}, return_tensors="pt")
    with torch.no_grad():
        return model(**batch).logits.squeeze(-1).tolist()


def last_token_score(model, ids: list[int]) -> float:
    """What the head makes of the last token's state, whichever token that is."""
    core = model.get_base_model() if isinstance(model, PeftModel) else model
    with torch.no_grad():
        hidden = core.model(torch.tensor([ids])).last_hidden_state
        return core.score(hidden[:, -1]).item()


@pytest.mark.parametrize("case", ["adapter", "full", "pad is eos", "from sft"])
def test_a_saved_model_scores_the_same_in_plain_transformers(
    flags, tmp_path, tiny_model_dir, sft_adapter, case, monkeypatch
):
    base, changes = tiny_model_dir, {"learning_rate": 1e-2, "do_eval": True, "max_steps": 6, "max_target_length": 30}
    if case == "full":
        changes |= {"use_peft": False, "learning_rate": 1e-3}
    elif case == "from sft":
        changes |= {"model_name_or_path": sft_adapter}
    elif case == "pad is eos":
        base = Path(shutil.copytree(tiny_model_dir, tmp_path / "base"))
        for name, change in (("tokenizer_config.json", {"pad_token": "<|im_end|>"}), ("config.json", {})):
            content = json.loads((base / name).read_text()) | change
            if name == "config.json":
                content["pad_token_id"] = content["eos_token_id"]
            (base / name).write_text(json.dumps(content))
        changes |= {"model_name_or_path": base}
    scored = trained_scores(monkeypatch, flags(**changes, save_strategy="no"))
    texts, expected = [ids for ids, _ in scored], [score for _, score in scored]
    assert len(set(map(len, texts))) > 2
    assert max(expected) - min(expected) > 0.05

    best = tmp_path / "out/checkpoint-best"
    tokenizer = AutoTokenizer.from_pretrained(best)
    if case == "full":
        model = AutoModelForSequenceClassification.from_pretrained(best).eval()
        assert (model.config.num_labels, model.config.pad_token_id) == (1, tokenizer.pad_token_id)
    else:
        head = {"num_labels": 1, "pad_token_id": tokenizer.pad_token_id}
        model = AutoModelForSequenceClassification.from_pretrained(base, **head)
        model = PeftModel.from_pretrained(model, best).eval()
    scorers = [model, load_reward_model(*((str(best), None) if case == "full" else (str(base), str(best))))]
    if case == "pad is eos":
        folders = ("--base_model", str(base), "--lora_model", str(best), "--output_dir", str(tmp_path / "merged"))
        merge_peft_adapter.main([*folders, "--torch_dtype", "float32"])
        scorers.append(AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval())
    for scorer in scorers:
        alone = [plain_scores(scorer, tokenizer, [ids], "right")[0] for ids in texts]
        assert alone == pytest.approx(expected, abs=1e-3)
        assert [last_token_score(scorer, ids) for ids in texts] == pytest.approx(expected, abs=1e-3)
        for side in ("left", "right"):
            assert plain_scores(scorer, tokenizer, texts, side) == pytest.approx(expected, abs=1e-3)


# ---------------------------------------------------------------- a run, and what it starts from


def test_a_run_leaves_exactly_these_files(flags, tmp_path, data_dir, tiny_model_dir, capfd):
    metrics = reward_modeling.main(flags())
    out = tmp_path / "out"
    assert names(out) == {"checkpoint-2", "checkpoint-4", "checkpoint-best"} | RESULTS
    assert names(out / "checkpoint-best") == ADAPTER_FILES
    config = json.loads((out / "checkpoint-best/adapter_config.json").read_text())
    assert (config["task_type"], config["base_model_name_or_path"]) == ("SEQ_CLS", str(tiny_model_dir))
    lineage = read_lineage(out / "checkpoint-best")
    assert (lineage.base_model, lineage.parent, lineage.stage) == (str(tiny_model_dir), None, "rm")
    assert (lineage.template, lineage.data) == ("", str(data_dir))
    assert metrics == json.loads((out / "eval_results.json").read_text())
    assert metrics["eval_pairs"] == 4
    assert 0 <= metrics["eval_accuracy"] <= 1
    assert {"eval_margin", "eval_longer_wins", "eval_mean_score"} <= metrics.keys()
    assert {"accuracy", "margin", "tokens_per_second"} <= {
        key for entry in json.loads((out / "trainer_state.json").read_text())["log_history"] for key in entry
    }
    log = re.sub(" +", " ", capfd.readouterr().err)
    assert "train pairs kept 36 of 36" in log
    assert "eval pairs kept 4 of 4, held out of the training data by the seed" in log
    assert re.search(r"请就诊，注意休息。[^«]*«<\|im_end\|>»\nagainst\n不用管它[^«]*«<\|im_end\|>»", log)
    assert "step 4/4 evaluation: loss" in log
    assert "held-out pairs are ordered right" in log
    assert "ppo_training.py --reward_model_path" in log


def test_every_weight_of_an_adapter_is_trained(flags, tmp_path):
    """The head in the first step, and with a head that is no longer zero the matrices too."""
    reward_modeling.main(flags(max_steps=3, save_steps=1, do_eval=None, lora_dropout=0))
    first, second, third = (weights_of(tmp_path / f"out/checkpoint-{step}") for step in (1, 2, 3))
    assert first[HEAD].any()
    assert first[HEAD].dtype == torch.float32
    matrices = [name for name in first if ".lora_" in name]
    assert all(not torch.equal(first[name], second[name]) for name in matrices if ".lora_B." in name)
    assert all(not torch.equal(second[name], third[name]) for name in matrices)
    assert len(matrices) == 28


def test_dead_gradients_stop_the_run_once_the_head_is_trained(flags, monkeypatch):
    def dead(self, model, inputs, *args, **kwargs):
        scores = model.base_model.model.score(torch.ones(2, 128))
        return bradley_terry_losses(scores[:1, 0], -scores[1:, 0], torch.zeros(1), None).sum()

    monkeypatch.setattr(RewardTrainer, "compute_loss", dead)
    with pytest.raises(UserError, match=r"^step 2: 28 of 28 adapter matrices did not move|^step 2: \d+ of 28 adapter"):
        reward_modeling.main(flags(do_eval=None))


def test_an_sft_adapter_is_the_start_and_stays_inside(flags, tmp_path, tiny_model_dir, sft_adapter):
    """A run at a rate of almost nothing leaves what SFT learned as it was, relative to the original base."""
    rates = {"learning_rate": 1e-6, "max_steps": 2, "save_steps": 1, "do_eval": None}
    reward_modeling.main(flags(model_name_or_path=sft_adapter, target_modules="all", lora_rank=16, **rates))
    learned, best = weights_of(sft_adapter), weights_of(tmp_path / "out/checkpoint-best")
    assert best.keys() - learned.keys() == {HEAD}
    assert all(torch.allclose(best[name], learned[name], atol=5e-6, rtol=0) for name in learned)
    assert any(learned[name].abs().max() > 1e-3 for name in learned if ".lora_B." in name)
    lineage = read_lineage(tmp_path / "out/checkpoint-best")
    assert (lineage.base_model, lineage.parent) == (str(tiny_model_dir), str(sft_adapter))
    tokenizers = [AutoTokenizer.from_pretrained(path) for path in (sft_adapter, tmp_path / "out/checkpoint-best")]
    assert tokenizers[0].chat_template == tokenizers[1].chat_template


def test_a_reward_model_is_trained_on(flags, tmp_path):
    reward_modeling.main(flags(learning_rate=1e-2, output_dir=tmp_path / "first"))
    first = tmp_path / "first/checkpoint-best"
    again = {"model_name_or_path": first, "learning_rate": 1e-10, "max_steps": 1, "output_dir": tmp_path / "second"}
    metrics = reward_modeling.main(flags(**again))
    before, after = weights_of(first), weights_of(tmp_path / "second/checkpoint-best")
    assert all(torch.allclose(after[name], before[name], atol=1e-7, rtol=0) for name in before)
    assert before.keys() == after.keys()
    config = json.loads((tmp_path / "second/checkpoint-best/adapter_config.json").read_text())
    assert config["modules_to_save"] == ["classifier", "score"]
    alone = reward_modeling.main(flags(model_name_or_path=first, do_train=None, output_dir=tmp_path / "evaluation"))
    assert alone["eval_loss"] == pytest.approx(metrics["eval_loss"], abs=1e-6)


def test_full_weights_are_trained_and_trained_on(flags, tmp_path):
    full = {"use_peft": False, "save_strategy": "no", "do_eval": None}
    reward_modeling.main(flags(**full, output_dir=tmp_path / "first"))
    assert logged(tmp_path / "first")[1] == pytest.approx(LN2, abs=5e-5)
    first = tmp_path / "first/checkpoint-best"
    again = flags(**full, model_name_or_path=first, max_steps=1, learning_rate=1e-10, output_dir=tmp_path / "second")
    reward_modeling.main(again)
    before, after = (load_file(folder / "model.safetensors") for folder in (first, tmp_path / "second/checkpoint-best"))
    assert before["score.weight"].any()
    assert all(torch.allclose(after[name], before[name], atol=1e-7, rtol=0) for name in before)


@pytest.mark.parametrize("flag", ["load_in_4bit", "load_in_8bit"])
def test_quantized_base_trains_adapter_and_head_in_float32(flags, tmp_path, sft_adapter, flag):
    reward_modeling.main(flags(**{flag: True}, model_name_or_path=sft_adapter, max_steps=3))
    weights = weights_of(tmp_path / "out/checkpoint-best")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    assert weights[HEAD].any()
    assert any((tensor != tensor.bfloat16().float()).any() for name, tensor in weights.items() if ".lora_" in name)


def test_dropout_of_the_adapter_is_on_unless_refused(flags, tmp_path):
    runs = {"with": {}, "without": {"disable_dropout": True}, "none": {"lora_dropout": 0}}
    for name, changes in runs.items():
        reward_modeling.main(
            flags(**{"lora_dropout": 0.5} | changes, do_eval=None, output_dir=tmp_path / name, learning_rate=1e-2)
        )
    losses = {name: list(logged(tmp_path / name).values()) for name in runs}
    assert losses["without"] == losses["none"] != losses["with"]


def test_it_learns_what_is_better(flags, write_jsonl, capfd):
    separate = write_jsonl("eval/pairs.jsonl", make_pairs(60)[40:])
    options = {"validation_file_dir": separate, "max_eval_samples": None, "max_steps": 30, "learning_rate": 5e-3}
    metrics = reward_modeling.main(flags(**options, save_strategy="no"))
    assert metrics["eval_longer_wins"] == 0.5
    assert metrics["eval_accuracy"] == 1.0
    assert metrics["eval_loss"] < 0.3
    assert "does not beat" not in capfd.readouterr().err


# ---------------------------------------------------------------- resume, several processes, the guide


@pytest.mark.parametrize("kind", [{"lora_dropout": 0.2}, {"use_peft": False, "center_rewards_coefficient": 0.01}])
def test_resume_gives_the_losses_of_an_uninterrupted_run(flags, tmp_path, kind):
    kind |= {"lr_scheduler_type": "cosine", "eval_strategy": "steps", "eval_steps": 1}
    reward_modeling.main(flags(**kind, output_dir=tmp_path / "whole"))
    reward_modeling.main(flags(**kind))
    (tmp_path / "out/loss.png").unlink()
    reward_modeling.main(flags(**kind, resume_from_checkpoint=str(tmp_path / "out/checkpoint-2")))
    for name in ("loss", "eval_loss"):
        assert logged(tmp_path / "out", name) == logged(tmp_path / "whole", name)


def test_best_is_the_lowest_evaluation_loss(flags, tmp_path, monkeypatch):
    scripted = iter([3.0, 1.0, 2.0, 4.0])
    shared = {"accuracy": 1.0, "pairs": 4.0, "longer_wins": 0.5}
    monkeypatch.setattr(reward_trainer, "pair_statistics", lambda prediction: {"loss": next(scripted)} | shared)
    metrics = reward_modeling.main(flags(eval_strategy="steps", eval_steps=1))
    assert metrics["eval_loss"] == 1.0
    best, second = weights_of(tmp_path / "out/checkpoint-best"), weights_of(tmp_path / "out/checkpoint-2")
    assert all(torch.equal(best[name], second[name]) for name in second)


@pytest.mark.slow
def test_two_processes_give_the_losses_of_one_with_twice_the_accumulation(flags, write_jsonl, tmp_path):
    """Every step takes all pairs, so that their order does not matter; five held-out pairs fill no whole batch."""
    data = {
        "train_file_dir": write_jsonl("eight/pairs.jsonl", make_pairs(8)),
        "validation_file_dir": write_jsonl("five/pairs.jsonl", make_pairs(40)[8:13]),
    }
    options = data | {"lora_dropout": 0, "learning_rate": 1e-2, "max_eval_samples": None}
    result = run_process("reward_modeling.py", flags(**options, output_dir=tmp_path / "two"), n_processes=2)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "2 process(es)" in result.stderr
    reward_modeling.main(flags(**options, gradient_accumulation_steps=4, output_dir=tmp_path / "one"))
    for name in ("loss", "grad_norm"):
        one, two = (list(logged(tmp_path / folder, name).values()) for folder in ("one", "two"))
        assert len(one) == 4
        assert two == pytest.approx(one, rel=1e-4, abs=1e-5)
    one, two = (json.loads((tmp_path / folder / "eval_results.json").read_text()) for folder in ("one", "two"))
    for name in ("eval_loss", "eval_accuracy", "eval_margin", "eval_longer_wins", "eval_pairs"):
        assert two[name] == pytest.approx(one[name], abs=1e-5), name


def test_the_guides_command_as_it_stands(data_dir, tmp_path, sft_adapter, capfd):
    """Flag for flag, from an SFT adapter; only model, data and folders are this machine's."""
    argv = [
        *f"{GUIDE_RM} --max_source_length 1024 --max_target_length 512".split(),
        "--model_name_or_path", str(sft_adapter), "--train_file_dir", str(data_dir),
        "--validation_file_dir", str(data_dir), "--output_dir", str(tmp_path / "outputs-rm-qwen2.5-3b"),
        "--cache_dir", str(tmp_path / "cache"),
    ]  # fmt: skip
    reward_modeling.main(argv)
    out = tmp_path / "outputs-rm-qwen2.5-3b"
    assert logged(out)[1] == pytest.approx(LN2, abs=5e-5)
    assert weights_of(out / "checkpoint-best")[HEAD].any()
    assert any((out / "runs").iterdir())
    assert "instead of --bf16, --torch_dtype bfloat16, --device_map auto" in capfd.readouterr().err


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_source_length": 4}, "--max_source_length 4: too little"),
        ({"max_target_length": 4}, "--max_target_length 4: too little"),
        ({"train_file_dir": None}, "--train_file_dir is missing"),
        ({"label_smoothing_factor": 0.1}, "--label_smoothing_factor: the loss of pairs has no labels"),
        ({"do_train": None, "do_eval": None}, "neither --do_train nor --do_eval"),
        ({"do_train": None}, "no trained score head to evaluate; add --do_train"),
        ({"max_length": 100}, "--max_length is not a flag of this stage"),
        ({"template_name": "nonesuch"}, "nonesuch"),
        ({"load_in_4bit": True, "use_peft": False}, "--use_peft False with a quantized base"),
    ],
)
def test_what_cannot_be_done_is_one_line(flags, changes, message):
    with pytest.raises(UserError, match=message):
        reward_modeling.main(flags(**changes))


def test_bad_data_is_named_before_weights_load(flags, data_dir, monkeypatch):
    monkeypatch.setattr(
        reward_modeling, "load_for_training", lambda *args, **kwargs: pytest.fail("weights were loaded")
    )
    with (data_dir / "pairs.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"question": "q", "response_chosen": "a"}\n')
    with pytest.raises(UserError, match=r"pairs\.jsonl:41: "):
        reward_modeling.main(flags())


def test_other_pairs_than_the_resumed_run_had_are_refused(flags, write_jsonl, tmp_path):
    reward_modeling.main(flags())
    (tmp_path / "out/loss.png").unlink()
    other = write_jsonl("other/pairs.jsonl", make_pairs(20))
    with pytest.raises(UserError, match="rows of training data"):
        reward_modeling.main(flags(train_file_dir=other, validation_file_dir=other, resume_from_checkpoint=True))
