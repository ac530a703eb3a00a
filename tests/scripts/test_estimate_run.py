"""The estimate as a command: with launchers, in JSON, and its mistakes in one line each."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import estimate_run
import pytest
from stage_runs import write_lines

from medtune.errors import UserError
from medtune.estimate.cards import CARDS, Price, choose_cards, read_prices
from medtune.estimate.total import as_total_lines, total_as_json

ROOT = Path(__file__).resolve().parents[2]
SFT = "supervised_finetuning.py --do_train --output_dir out --per_device_train_batch_size 2"


@pytest.fixture
def estimate(capsys, monkeypatch, in_tmp_path):
    """Runs the command and returns what it printed."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")

    def run(command: str) -> str:
        estimate_run.main(command.split())
        return capsys.readouterr().out

    return run


def test_a_table_of_cards(estimate, tiny_model_dir):
    text = estimate(f"--assume_tokens 64 {SFT} --model_name_or_path {tiny_model_dir} --max_train_samples 640")
    assert "supervised_finetuning.py" in text
    assert "computed, not measured" in text
    for card in CARDS:
        assert card.name in text
    assert "hours at 25% to 50% of a card's rate in bfloat16, money for 1 card" in text
    assert "does not fit" not in text


def test_json_has_hours_and_money(estimate, tiny_model_dir):
    command = f"{SFT} --model_name_or_path {tiny_model_dir} --max_train_samples 640 --model_max_length 64"
    one, two = (
        json.loads(estimate(f"--json --price 10 --gpus {n} --card RTX4090,H200 --assume_tokens 64 {command}"))
        for n in (1, 2)
    )
    assert [card["card"] for card in one["cards"]] == ["RTX 4090", "H200"]
    assert (one["steps"], two["steps"]) == (3 * 320, 3 * 160)  # of 2 rows, and of 4
    assert one["tokens"] == 3 * 640 * 64
    card = one["cards"][0]
    assert card["cost"] == pytest.approx([10 * hours for hours in card["hours"]])
    assert 0 < card["hours"][0] < card["hours"][1]
    assert (
        one["gib"]
        > one["allocated_gib"]
        == pytest.approx(sum(one["parts_gib"].values()) + one["moments_gib"][one["decides"]], abs=0.01)
    )


@pytest.mark.slow
def test_a_small_card_gets_the_mildest_change(estimate):
    command = "--do_train --output_dir out --model_name_or_path Qwen/Qwen2.5-7B --max_train_samples 1000"
    flags = "--per_device_train_batch_size 4 --gradient_checkpointing True --torch_dtype bfloat16"
    command = f"--json --card RTX4080,RTX4090,H200 --assume_tokens 500 supervised_finetuning.py {command} {flags}"
    small, middle, large = json.loads(estimate(command))["cards"]
    assert large["flags"] == []
    assert middle["flags"][:2] == ["--per_device_train_batch_size", "1"] or middle["flags"][:2] == [
        "--per_device_train_batch_size", "2",
    ]  # fmt: skip
    assert "--load_in_4bit" in small["flags"]
    assert small["gib"] < 0.9 * 15.6 < middle["gib"] < 0.9 * 23.5 < large["gib"]


def test_an_adapter_that_is_to_come_is_assumed(estimate):
    command = "dpo_training.py --do_train --output_dir out --model_name_or_path outputs-sft/checkpoint-best"
    flags = "--max_steps 10 --flash_attn True"
    text = estimate(f"--base_model Qwen/Qwen2.5-0.5B --card H200 --assume_tokens 300 {command} {flags}")
    assert "outputs-sft/checkpoint-best is not there yet: an adapter of these flags on Qwen/Qwen2.5-0.5B" in text
    assert "rows: as many as the run takes, assumed, of 300 tokens each" in text
    assert "the rows of a batch are joined into one without padding, and the prompt of both replies passes once" in text


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("", "no command to estimate"),
        (f"--card RTX9999 {SFT}", "--card RTX9999: not known; known are RTX 4080"),
        ("train.py --do_train", r"train.py: not a stage; there are pretraining.py"),
        ("run_nothing.sh", "run_nothing.sh: no such file"),
        (f"{ROOT}/run_demo.sh", "run_demo.sh: starts no training stage"),
        (f"{ROOT}/setup.sh", "setup.sh: starts no training stage"),
        (
            f"{SFT} --card=H200",
            "--card: a flag of the estimate, which stands before the command: estimate_run.py --card",
        ),
        (f"--price nan {SFT}", "--price nan: give a number above 0"),
        (f"--price -1 {SFT}", "--price -1.0: give a number above 0"),
        (f"--assume_tokens 0 {SFT}", "--assume_tokens 0: give a number above 0"),
        (f"--assume_tokens 9 {SFT} --model_name_or_path Qwen/Qwen2.5-3B", "how many rows are there"),
        (f"{SFT} --model_name_or_path nobody/Closed-3B", r"nobody/Closed-3B: .*built-in shapes are"),
        (
            f"{SFT} --model_name_or_path Qwen/Qwen2.5-3B --train_file_dir data",
            "Qwen2.5-3B: .*--assume_tokens N, tokens of an average row, before the launcher",
        ),
        (f"{SFT} --model_name_or_path x --lerning_rate 1", "--lerning_rate is not a flag of this stage; did you mean"),
        (f"{SFT} --model_name_or_path x --deepspeed none.json", "--deepspeed none.json: no such file"),
    ],
)
def test_a_mistake_is_one_line(estimate, command, message):
    with pytest.raises(UserError, match=message) as mistake:
        estimate(command)
    assert "\n" not in str(mistake.value)


def test_bad_data_is_named_by_file_and_line(estimate, tiny_model_dir, tmp_path):
    data = write_lines(tmp_path / "data/records.jsonl", [{"question": "a", "answer": "b"}, {"question": "a"}])
    with pytest.raises(UserError, match=r"records\.jsonl:2"):
        estimate(f"{SFT} --model_name_or_path {tiny_model_dir} --train_file_dir {data.parent}")


def test_a_part_of_a_name_is_enough_for_a_card():
    names = [card.name for card in choose_cards(["4090", "a100", "H20", "rtx4090"])]
    assert names == ["RTX 4090", "A100 40GB", "A100 80GB", "H20"]


def test_a_price_is_one_of_a_known_card(tmp_path):
    assert {"RTX 4090", "A100 40GB", "A100 80GB"} <= read_prices().keys()
    file = tmp_path / "prices.csv"
    file.write_text("card,per_hour,currency\nRTX 4090,5,CNY\n", encoding="utf-8-sig")
    assert read_prices(file) == {"RTX 4090": Price(5.0, "CNY")}
    for line, fault in {
        "A100 40GB,cheap,CNY": "prices.csv:3: per_hour 'cheap' is no price",
        "A100 40GB,-5,CNY": "prices.csv:3: per_hour '-5' is no price",
        "A100 40GB,nan,CNY": "prices.csv:3: per_hour 'nan' is no price",
        "RTX 4090D,4,CNY": "prices.csv:3: RTX 4090D: not known",
        "A100,4,CNY": "prices.csv:3: A100: name one of A100 40GB, A100 80GB",
        "# mine": "prices.csv:3: a line is card,per_hour,currency",
    }.items():
        file.write_text(f"card,per_hour,currency\nRTX 4090,5,CNY\n{line}\n")
        with pytest.raises(UserError, match=f"^{re.escape(fault)}"):
            read_prices(file)
    file.write_bytes("card,per_hour,currency\nRTX 4090,5,人民币\n".encode("gbk"))
    with pytest.raises(UserError, match="is to be a file in UTF-8"):
        read_prices(file)
    with pytest.raises(UserError, match="No such file"):
        read_prices(tmp_path / "none.csv")


@pytest.mark.slow
def test_all_stages_are_one_document_with_their_total(tiny_model_dir):
    environment = os.environ | {
        "MODEL": str(tiny_model_dir),
        "ALIGN": "dpo",
        "CUDA_VISIBLE_DEVICES": "0",
        "DO_PT": "0",
        "SFT_FLAGS": "--max_steps 7",
    }
    own = ["--json", "--price", "10", "--assume_tokens", "64", "--card", "RTX4090,H200"]
    command = [sys.executable, "scripts/estimate_run.py", *own, "run_all.sh", "--max_steps", "4"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    whole = json.loads(done.stdout)
    sft, dpo = whole["stages"]
    assert (sft["script"], sft["steps"], dpo["script"], dpo["steps"]) == (
        *("supervised_finetuning.py", 7),
        *("dpo_training.py", 4),
    )
    assert dpo["model"] == str(tiny_model_dir)  # the base of SFT's adapter
    for index, card in enumerate(whole["total"]["cards"]):
        assert card["cost"] == pytest.approx([sum(pair) for pair in zip(*(
            stage["cards"][index]["cost"] for stage in (sft, dpo)), strict=True)])  # fmt: skip
    parts = [sum(size for name, size in stage["disk_gib"].items() if name != "merged model") for stage in (sft, dpo)]
    assert whole["total"]["disk_gib"] == pytest.approx(sum(parts) + dpo["disk_gib"]["merged model"], abs=0.003)


def test_a_total_names_the_stages_that_do_not_fit():
    def estimate(script: str, hours: float, flags: list[str] | None) -> SimpleNamespace:
        measured = None if flags is None else SimpleNamespace(flags=flags)
        verdict = SimpleNamespace(
            card=CARDS[0], measured=measured, hours=SimpleNamespace(total=(hours, 2 * hours)),
            cost=(5 * hours, 10 * hours), price=Price(5, "CNY"),
        )  # fmt: skip
        disk = {"model from the hub": 6 * 2**30, "2 checkpoints": 2**30, "merged model": 6 * 2**30}
        return SimpleNamespace(script=script, verdicts=[verdict], disk=disk)

    sft, dpo = estimate("supervised_finetuning", 1.0, []), estimate("dpo_training", 2.0, ["--load_in_4bit", "True"])
    header, card, disk = as_total_lines([sft, dpo])
    assert header.startswith("all stages together: supervised_finetuning, dpo;")
    assert card.split("  ")[1:] == [
        "RTX 4080",
        "16 GB",
        "3.0 to 6.0 h",
        "15 to 30 CNY",
        "fits with the flags above for dpo",
    ]
    assert disk == "disk, GiB: 14.0"
    assert total_as_json([sft, dpo])["cards"] == [
        {"card": "RTX 4080", "fits": True, "hours": (3.0, 6.0), "cost": (15.0, 30.0), "currency": "CNY"}
    ]
    too_large = estimate("ppo_training", 1.0, None)
    assert as_total_lines([sft, too_large])[1].endswith("does not fit: ppo")
    assert total_as_json([sft, too_large])["cards"] == [{"card": "RTX 4080", "fits": False}]


def test_a_launcher_is_estimated_with_its_own_flags(tiny_model_dir):
    environment = os.environ | {"ESTIMATE": "1", "MODEL": str(tiny_model_dir), "PYTHON": sys.executable}
    environment |= {"CUDA_VISIBLE_DEVICES": "0,1"}
    words = ["bash", "run_sft.sh", "--model_max_length", "1024", "--max_train_samples", "40"]
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "batch 2 x 16 accumulated x 2 GPUs" in done.stdout
