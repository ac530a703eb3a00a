"""Jobs run by this project and by TRL, and what is counted of them."""

import json

import compare_speed
import pytest
import torch
from compare_speed import Job, Shape, read_files, read_printed, run_side, training_flops, write_examples
from peft import LoraConfig, get_peft_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from medtune.errors import UserError

TINY = Shape("llama", 64, 128, 8, 4, 2, 4096)


def test_losses_and_seconds_in_the_lines_of_trl():
    log = """Loading weights: 100%
{'loss': '10.89', 'grad_norm': '5.8', 'learning_rate': '1e-03', 'num_tokens': '984', 'epoch': '0.5'}
{'loss': 9.5, 'epoch': 1.0}
{'train_runtime': '249.3', 'train_loss': '10.2', 'epoch': '1'}
"""
    assert read_printed(log) == (249.3, [10.89, 9.5])


def test_flops_of_a_model_are_those_that_torch_counts():
    config = LlamaConfig(**TINY._asdict(), tie_word_embeddings=True, attn_implementation="eager")
    model = get_peft_model(LlamaForCausalLM(config), LoraConfig(r=compare_speed.RANK, target_modules="all-linear"))
    n_tokens, n_learned = 96, 32
    with FlopCounterMode(display=False) as counter:
        ids = torch.ones(1, n_tokens, dtype=torch.long)
        model(input_ids=ids, logits_to_keep=n_learned).logits.sum().backward()
    # Torch multiplies the half of attention that is masked too, and asks no gradient of the embeddings below.
    masked_half = 6 * n_tokens**2 * TINY.hidden_size * TINY.num_hidden_layers
    counted = counter.get_total_flops() - masked_half
    assert training_flops(TINY, "sft", [(n_tokens, n_learned)]) == pytest.approx(counted, rel=0.04)


def test_flops_of_the_stages():
    linear = sum(count * n_in * n_out for (n_in, n_out), count in TINY.linear().items())
    assert linear == 8 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128)
    sft, dpo, reward = (training_flops(TINY, stage, [(10, 4)]) for stage in ("sft", "dpo", "reward"))
    head, attention = 2 * 64 * 4096 * 4, 8 * 2 * 10**2 * 64
    assert sft - reward == 2 * head
    assert dpo - sft == 2 * linear * 10 + attention + head


def test_a_job_of_ours(tiny_model_dir, tmp_path):
    write_examples(tmp_path / "data", [("感冒了怎么办？", "多喝水，注意休息。" * (1 + n)) for n in range(8)])
    job = Job("sft", "tiny", 8)
    run = run_side("ours", job, tiny_model_dir, tmp_path / "data", tmp_path / "run", compare_speed.ROOT)
    training, losses = read_files(tmp_path / "run" / "out")
    assert len(losses) == 2  # steps of 4
    assert (run["training_seconds"], run["first_loss"], run["last_loss"]) == (training, *losses)
    assert 0 < training < run["seconds"]
    assert 0.2 < run["peak_gib"] < 4
    with pytest.raises(UserError, match=r"ours ended with 2(.|\n)*--no_such_flag"):
        run_side(
            "ours", job, tiny_model_dir, tmp_path / "data", tmp_path / "run", compare_speed.ROOT, "--no_such_flag 1"
        )


def test_mistakes_in_the_command(tmp_path):
    with pytest.raises(UserError, match=r"--baseline .*: no checkout of this project"):
        compare_speed.main(["--baseline", str(tmp_path)])
    with pytest.raises(UserError, match="--rounds and --examples: give numbers above 0"):
        compare_speed.main(["--rounds", "0"])


@pytest.mark.slow
def test_both_sides_do_the_same_job(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(
        compare_speed, "SHAPES", dict.fromkeys(compare_speed.SHAPES, TINY._replace(num_hidden_layers=2))
    )
    monkeypatch.setattr(compare_speed, "STEPS", {"rows": [(128, 2)]})
    monkeypatch.setattr(compare_speed, "DIALOGUES", (20, 40))
    jobs = ["dpo", "ppo-update"]
    found = compare_speed.main(
        [
            *("--jobs", *jobs, "--peers", "trl", "--rounds", "1", "--examples", "0.25", "--ours", "--max_grad_norm 1"),
            *("--scaling", "rows", "dialogues", "--output", str(tmp_path / "speed.json")),
        ]
    )
    assert json.loads((tmp_path / "speed.json").read_text()) == json.loads(json.dumps(found))
    for job in jobs:
        medians = found["jobs"][job]["medians"]
        assert medians.keys() == ({"ours"} if job == "ppo-update" else {"ours", "trl"})
        for side in medians.values():
            assert side["first_loss"] == pytest.approx(medians["ours"]["first_loss"], abs=0.1)
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len({row.count("|") for row in rows[: 2 + 2 + 1]}) == 1  # two of the header, two of DPO, one of PPO
    assert [row["rows"] for row in found["scaling"]["rows"]] == [2]
    assert [row["dialogues"] for row in found["scaling"]["dialogues"]] == [5, 10]
