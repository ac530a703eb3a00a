"""The memory of the stages: bytes that are known, and what each flag does to them."""

import importlib
from dataclasses import replace
from pathlib import Path

import pytest
from datasets import Dataset
from stage_runs import RL_STAGES, STAGES, stage_flags, words, write_lines
from tiny_families import FAMILIES
from tiny_families import SHAPE as TINY
from transformers import CONFIG_MAPPING, PretrainedConfig, Qwen2Config

from medtune.errors import UserError
from medtune.estimate.cards import choose_cards
from medtune.estimate.hours import count_evaluations, count_saves, count_steps_and_tokens, estimate_hours
from medtune.estimate.making import Measured
from medtune.estimate.memory import GIB, Memory, measure_memory
from medtune.estimate.plan import RunPlan, count_gpus_of_command, read_plan
from medtune.estimate.remedies import remedies
from medtune.estimate.rows import _lengths_of, count_tokens, find_rows, padded_tokens
from medtune.estimate.shapes import find_shape, shape_of
from medtune.models.text_attention import Layout

SCRIPTS = STAGES | RL_STAGES
SLOW = ("pt", "rm", "ppo", "grpo", "distillation")


def shape(n_layers: int, vocab_size: int = 1024, hidden_size: int = 256) -> Qwen2Config:
    """Of a base that needs no file, seen as on a GPU with bfloat16."""
    return Qwen2Config(
        vocab_size=vocab_size, hidden_size=hidden_size, intermediate_size=512, num_hidden_layers=n_layers,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True, dtype="bfloat16",
    )  # fmt: skip


SHAPE = shape(5)
TEACHER = shape(7, vocab_size=1088, hidden_size=384)
N_WEIGHTS = shape_of(SHAPE).n_weights
# Of what is smaller than a block.
BLOCKS = 32 * 1024


@pytest.fixture(autouse=True)
def _on_a_gpu(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")


def plan_of(stage: str, n_gpus: int = 1, **flags) -> RunPlan:
    """Of rows of 100 tokens each."""
    is_rl = stage in RL_STAGES
    values = {"sft_model_path" if is_rl else "model_name_or_path": "base", "do_train": True, "output_dir": "out"}
    values |= {"max_train_samples": 100, "gradient_checkpointing": False, "torch_dtype": "bfloat16"}
    values |= {"per_device_train_batch_size": 2, "target_modules": "all"}
    if stage == "sft":
        values |= {"model_max_length": 100}
    elif stage == "pt":
        values |= {"block_size": 100}
    elif is_rl:
        values |= {"max_source_length": 60, "response_length": 40, "rollout_batch_size": 4, "num_train_epochs": 1}
        values |= {"teacher_model_path": "teacher"} if stage == "distillation" else {"rewards": "length:1"}
    else:
        values |= {"max_source_length": 60, "max_target_length": 40}
    if stage == "grpo":
        values |= {"num_generations": 2}
    return read_plan(importlib.import_module(SCRIPTS[stage]), words(values | flags), n_gpus, "base")


def memory_of(
    stage: str, n_gpus: int = 1, config: PretrainedConfig = SHAPE, teacher: PretrainedConfig = TEACHER, **flags
) -> Memory:
    plan = plan_of(stage, n_gpus, **flags)
    of_teacher = shape_of(teacher) if stage == "distillation" else None
    return measure_memory(plan, shape_of(config), find_rows(plan, 100), teacher_shape=of_teacher)


@pytest.fixture(scope="module")
def sft() -> Memory:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUDA_VISIBLE_DEVICES", "0")
        return memory_of("sft")


def test_weights_adapters_and_optimizer_have_their_bytes(sft):
    assert sft.parts["base weights"] == pytest.approx(2 * N_WEIGHTS, abs=BLOCKS)
    # q, k, v, o, gate, up, down: rank x (inputs + outputs)
    matrices = [(256, 256), (256, 128), (256, 128), (256, 256), (256, 512), (256, 512), (512, 256)]
    n_trained = 5 * sum(16 * (inputs + outputs) for inputs, outputs in matrices)
    assert sft.parts["adapters and heads"] == 4 * n_trained
    assert sft.parts["optimizer"] == 8 * n_trained
    assert sft.moments["optimizer step"] == pytest.approx(4 * n_trained, abs=BLOCKS)  # the gradients


@pytest.mark.parametrize("stage", ["sft", "dpo", *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_the_line_through_two_depths_meets_the_whole_model(stage, monkeypatch):
    flags = {"do_eval": True} if stage not in RL_STAGES else {"teacher": shape(5, 1088, 384)}
    by_line = memory_of(stage, **flags)
    monkeypatch.setattr("medtune.estimate.memory.DEPTHS", (5, 5))
    whole = memory_of(stage, **flags)
    assert by_line.parts == pytest.approx(whole.parts, abs=BLOCKS)
    assert by_line.moments == pytest.approx(whole.moments, rel=0.01, abs=BLOCKS)
    forward = "scoring" if stage in RL_STAGES else "evaluation"
    assert by_line.works[forward].products == pytest.approx(whole.works[forward].products)


def test_checkpointing_and_fewer_bits_take_less(sft):
    checkpointed = memory_of("sft", gradient_checkpointing=True)
    assert checkpointed.moments["backward pass"] < 0.6 * sft.moments["backward pass"]
    assert checkpointed.parts == sft.parts
    in_linear = 2 * (N_WEIGHTS - 1024 * 256)
    four, eight = memory_of("sft", load_in_4bit=True), memory_of("sft", load_in_8bit=True)
    embedding = sft.parts["base weights"] - in_linear
    assert four.parts["base weights"] - embedding == pytest.approx(in_linear / 4, rel=0.05)
    assert eight.parts["base weights"] - embedding == pytest.approx(in_linear / 2, rel=0.05)


def test_rows_and_ranks_count(sft):
    assert memory_of("sft", per_device_train_batch_size=4).moments["forward pass"] == pytest.approx(
        2 * sft.moments["forward pass"], rel=0.1
    )
    assert memory_of("sft", lora_rank=32).parts["adapters and heads"] == 2 * sft.parts["adapters and heads"]


def test_all_weights_have_gradients_and_moments(sft):
    full = memory_of("sft", use_peft=False)
    assert full.parts["adapters and heads"] == 0
    assert full.parts["optimizer"] == pytest.approx(2 * 2 * N_WEIGHTS, rel=0.01)
    assert full.moments["optimizer step"] == pytest.approx(2 * N_WEIGHTS, abs=2 * BLOCKS)


def test_dpo_holds_two_models_where_all_weights_are_trained():
    assert "second model" not in memory_of("dpo").parts
    full = memory_of("dpo", use_peft=False, max_steps=10)
    assert full.parts["second model"] == pytest.approx(full.parts["base weights"], rel=0.01)


def test_kto_passes_mismatched_replies_through_policy_and_reference():
    works = memory_of("dpo", loss_type="kto").works
    # As their own replies do, but for the gradient of the head.
    assert works["mismatched replies"].products == pytest.approx(works["forward pass"].products, rel=0.05)


def test_on_a_cpu_what_was_read_to_be_quantized_stays_mapped(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    whole, four = (memory_of("sft", load_in_4bit=four, cpu_bf16=False) for four in (False, True))
    in_linear = 2 * (N_WEIGHTS - 1024 * 256)
    assert four.parts.pop("file of the weights") == pytest.approx(in_linear, rel=0.01)
    assert four.parts.keys() == whole.parts.keys()
    assert four.moments["optimizer step"] == whole.moments["optimizer step"]


def test_ppo_has_three_adapters_on_one_base_and_grpo_one():
    ppo, grpo, with_kl = memory_of("ppo"), memory_of("grpo"), memory_of("grpo", beta=0.1)
    assert ppo.parts["base weights"] == grpo.parts["base weights"]
    one = grpo.parts["adapters and heads"]
    assert with_kl.parts["adapters and heads"] == 2 * one
    assert ppo.parts["adapters and heads"] == pytest.approx(3 * one, abs=BLOCKS)  # and the value head
    assert {"rollout: prompts", "rollout: last token", "scoring"} <= ppo.moments.keys()


def test_a_teacher_has_its_bytes_and_its_pass_beside_the_student_or_on_a_gpu_of_its_own():
    beside, grpo = memory_of("distillation"), memory_of("grpo")
    n_weights, n_embedded = shape_of(TEACHER).n_weights, 1088 * 384
    assert beside.parts["the teacher"] == pytest.approx(2 * n_weights, abs=BLOCKS)
    assert {name: size for name, size in beside.parts.items() if name != "the teacher"} == grpo.parts
    # Rows of 60 and 40 tokens, 4 of them: matrices of the layers on all, the head on the replies'; and their entropies.
    n_in_matrices = 7 * (2 * 384 * 384 + 2 * 384 * 192 + 3 * 384 * 512)
    products = 2 * 4 * (100 * n_in_matrices + 40 * n_embedded)
    assert beside.works["the teacher's pass"].products == pytest.approx(products, rel=1e-3)
    four = memory_of("distillation", teacher_bits=4).parts["the teacher"]
    assert four - 2 * n_embedded == pytest.approx(2 * n_in_matrices / 4, rel=0.05)

    apart = memory_of("distillation", teacher_device="cuda:1")
    assert apart.parts == grpo.parts
    assert apart.teacher.total == pytest.approx(
        (beside.parts["the teacher"] + beside.moments["the teacher's pass"]) * 1.05 + 0.7 * GIB, rel=1e-6
    )
    plan = plan_of("distillation", n_gpus=2, teacher_device="cuda:1", do_eval=True)
    assert (plan.n_gpus, plan.n_cards) == (1, 2), "the teacher's GPU is paid for too"
    assert not Measured([], plan, None, replace(apart, teacher=Memory({"the teacher": 30 * GIB}, {"": 0})), SHAPE).fits(
        24
    )
    (card,) = choose_cards(["H200"])
    low, high = estimate_hours(plan, apart, find_rows(plan, 100), card).phases["teacher"]
    assert 0 < low < high


@pytest.mark.slow
def test_of_whole_distributions_the_logits_of_both_models_are_there_in_chunks():
    flags = {"per_device_train_batch_size": 8, "rollout_batch_size": 8}
    sampled, whole = (memory_of("distillation", beta=beta, **flags) for beta in (None, 0.5))
    update = "update of the policy: forward pass"
    more = whole.moments[update] - sampled.moments[update]
    # Some float32 rows of the vocabulary for 128 tokens, of the 320 that there are; and the teacher's states.
    one = 4 * 128 * 1024
    assert one < more - 2 * 320 * 384 < 12 * one


def test_several_gpus_hold_buckets_and_zero_shares():
    one, two = memory_of("sft"), memory_of("sft", n_gpus=2)
    gradients = one.parts["adapters and heads"]
    assert two.parts == one.parts | {"DDP's buckets": pytest.approx(gradients, abs=BLOCKS)}
    three = memory_of("sft", n_gpus=4, deepspeed=Path(__file__).parents[2] / "ds_configs/zero3.json")
    assert three.parts["base weights"] == one.parts["base weights"] / 4
    assert three.parts["optimizer"] == pytest.approx(12 * gradients / 4 / 4, abs=BLOCKS)


def test_what_is_offloaded_stands_in_the_memory_of_the_machine():
    offloaded = memory_of("sft", n_gpus=4, deepspeed=Path(__file__).parents[2] / "ds_configs/zero3_offload.json")
    assert offloaded.parts["base weights"] == offloaded.parts["optimizer"] == 0
    n_trained = offloaded.parts["adapters and heads"] / 4
    assert offloaded.host == pytest.approx(1.5 * (2 * N_WEIGHTS + 16 * n_trained), rel=0.01)
    assert memory_of("sft").host == 0


def test_one_process_splits_its_model_over_the_gpus_that_it_sees(sft, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    monkeypatch.setenv("N_PROCESSES", "1")
    split = memory_of("sft", device_map="auto")
    assert split.parts == {name: size / 2 for name, size in sft.parts.items()}
    assert sft.moments["forward pass"] / 2 < split.moments["forward pass"] < sft.moments["forward pass"]
    assert split.base == sft.base
    plan = plan_of("sft", device_map="auto")
    assert (plan.n_gpus, plan.n_cards) == (1, 2)


# ---------------------------------------------------------------- joined rows


def test_with_flash_attention_the_prompt_of_a_pair_passes_once(monkeypatch):
    """Of two pairs with a prompt of 60 tokens and replies of 40: all layers but attention see 2 x 140 and not 400."""
    padded, flash = memory_of("rm"), memory_of("rm", flash_attn=True)
    assert (padded.layout, flash.layout) == (Layout.PADDED, Layout.SHARED_PREFIXES)
    for moment in ("forward pass", "backward pass"):
        assert flash.works[moment].products == pytest.approx(0.7 * padded.works[moment].products)
    assert flash.works["forward pass"].attention == padded.works["forward pass"].attention  # of four texts of 100
    assert flash.moments["forward pass"] < 0.8 * padded.moments["forward pass"]
    plan = plan_of("rm", flash_attn=True)
    rows = find_rows(plan, 100)
    n_tokens = [count_steps_and_tokens(plan, rows, each.layout)[1] for each in (padded, flash)]
    assert n_tokens == [3 * 100 * 200, 3 * 100 * 140]
    (card,) = choose_cards(["A100 80GB"])
    monkeypatch.setattr("medtune.estimate.hours.LAUNCH", (0.0, 0.0))  # which is all the time of so small a model
    of_flash, of_padded = (estimate_hours(plan, each, rows, card).phases["training"][1] for each in (flash, padded))
    assert 0.7 * of_padded < of_flash < 0.8 * of_padded


@pytest.mark.parametrize(
    ("stage", "flags", "layout"),
    [
        ("dpo", {"flash_attn": True}, Layout.SHARED_PREFIXES),
        ("dpo", {"flash_attn": True, "padding_free": False}, Layout.PADDED),
        ("sft", {"flash_attn": True}, Layout.JOINED),
        ("sft", {"padding_free": True}, Layout.JOINED),
        ("sft", {"flash_attn": True, "neftune_noise_alpha": 5}, Layout.PADDED),
    ],
)
def test_rows_are_joined_where_the_stage_joins_them(stage, flags, layout):
    assert memory_of(stage, **flags).layout is layout


def test_with_flash_attention_the_prompt_of_a_group_passes_once():
    padded, flash = memory_of("grpo"), memory_of("grpo", flash_attn=True)
    name = "update of the policy: backward pass"
    assert flash.works[name].products == pytest.approx(0.7 * padded.works[name].products, rel=0.02)


def test_tokens_of_pairs_in_the_data():
    rows = Dataset.from_dict(
        {
            "prompt_ids": [[1] * 20, [1] * 4, [1]],
            "chosen_ids": [[1] * 5, [1] * 6, [1]],
            "rejected_ids": [[1] * 7, [1] * 8, [1]],
        }
    ).select([1, 0])
    joined = 2 * (20 + 4) + 5 + 6 + 7 + 8
    # Prompts of less than 16 tokens pass twice.
    counted = {Layout.PADDED: joined, Layout.JOINED: joined, Layout.SHARED_PREFIXES: joined - 20}
    assert count_tokens(_lengths_of(rows)) == counted


# ---------------------------------------------------------------- families

LAYERS = {
    "granitemoehybrid": {"num_hidden_layers": 8, "layer_types": ["mamba", "attention"] * 4},
    "deepseek_v3": {"num_hidden_layers": 9, "first_k_dense_replace": 3},
    "nemotron_h": {"num_hidden_layers": 12, "layers_block_type": ["mamba", "attention", "mamba", "moe"] * 3},
    "gemma2": {"num_hidden_layers": 6, "layer_types": ["sliding_attention", "full_attention"] * 3},
    "gemma4_text": {
        "num_hidden_layers": 12, "layer_types": ["sliding_attention", "full_attention"] * 6, "num_kv_shared_layers": 6,
    },
    "qwen3_5_moe_text": {"num_hidden_layers": 12, "layer_types": (["linear_attention"] * 3 + ["full_attention"]) * 3},
}  # fmt: skip
FAST = ("deepseek_v3", "gemma2")


@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=[] if name in FAST else pytest.mark.slow) for name in LAYERS]
)
def test_layers_of_every_kind_are_counted_also_in_float32(family):
    """From a few layers; with experts, whose product torch knows in bfloat16 alone."""
    shape = shape_of(CONFIG_MAPPING[family](**TINY | FAMILIES[family] | LAYERS[family], dtype="float32"))
    plan = plan_of("sft", torch_dtype="float32")
    memory = measure_memory(plan, shape, find_rows(plan, 100))
    assert memory.parts["base weights"] == pytest.approx(4 * shape.n_weights, rel=0.06)  # blocks of 512 bytes
    assert memory.works["forward pass"].products > 0


# ---------------------------------------------------------------- GPUs and servers


def test_gpus_of_all_nodes(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")
    assert count_gpus_of_command() == 4
    monkeypatch.setenv("NNODES", "2")
    assert count_gpus_of_command() == 8
    monkeypatch.setenv("NNODES", "1:2")
    with pytest.raises(UserError, match="NNODES=1:2: give the number of machines"):
        count_gpus_of_command()


def test_servers_have_gpus_of_their_own_or_a_share_of_those_of_training(monkeypatch):
    monkeypatch.setenv("VLLM_GPUS", "1")
    alone, shared = plan_of("ppo", n_gpus=2), plan_of("ppo", n_gpus=1)
    assert (alone.n_gpus, alone.servers.memory, alone.n_cards) == (1, 0.9, 2)
    assert (shared.n_gpus, shared.servers.memory, shared.n_cards) == (1, 0.4, 1)
    memory = Memory({"base weights": 11.0 * GIB}, {"update": GIB})
    of_3b = replace(shape_of(SHAPE), n_weights=3_000_000_000)
    assert Measured([], alone, None, memory, of_3b).fits(24)
    assert Measured([], shared, None, memory, of_3b).fits(24)  # 12 of 21.6 - 9.6
    assert not Measured([], shared, None, memory, of_3b).fits(23)
    assert not Measured([], alone, None, memory, replace(of_3b, n_weights=14_000_000_000)).fits(24)
    assert plan_of("sft", n_gpus=2).n_gpus == 2  # of no stage that has replies
    monkeypatch.setenv("VLLM_GPUS", "3")
    with pytest.raises(UserError, match="VLLM_GPUS=3: there are 2"):
        plan_of("grpo", n_gpus=2)


@pytest.mark.parametrize(
    ("stage", "flags", "message"),
    [
        ("sft", {"load_in_4bit": True, "use_peft": False}, "--use_peft False with a quantized base"),
        ("ppo", {"use_peft": False}, "--use_peft False: the roles are adapters"),
        ("ppo", {"num_mini_batches": 2}, "--num_mini_batches 2: does not divide"),
        ("grpo", {"num_generations": 8}, "--num_generations 8: does not divide the 2 episodes"),
        ("distillation", {"teacher_url": "http://x:1", "beta": 1}, "--beta 1: it compares whole distributions"),
        (
            "distillation",
            {"teacher_model_path": "outputs-x/checkpoint-best"},
            "--teacher_model_path outputs-x/checkpoint-best: not there yet; name the model that it will be made of",
        ),
    ],
)
def test_what_a_stage_refuses_is_refused(stage, flags, message):
    with pytest.raises(UserError, match=message):
        plan_of(stage, **flags)


def test_replies_of_servers_take_no_memory_of_training_but_time():
    own = memory_of("grpo")
    served = memory_of("grpo", vllm_url="http://127.0.0.1:8001")
    assert served.moments == {name: size for name, size in own.moments.items() if not name.startswith("rollout")}
    assert served.served.keys() == own.moments.keys() - served.moments.keys()
    plan = plan_of("grpo", vllm_url="http://127.0.0.1:8001", max_steps=3)
    (card,) = choose_cards(["H200"])
    low, high = estimate_hours(plan, served, find_rows(plan, 100), card).phases["replies"]
    assert 0 < low < high


# ---------------------------------------------------------------- how often


def test_evaluations_and_checkpoints_by_steps_and_by_epochs():
    rows = find_rows(plan_of("sft"), 100)  # 100 rows, of 2 a step
    for flags, n_evaluations, n_saves in (
        ({"eval_strategy": "epoch", "save_strategy": "epoch"}, 1 + 3, 3),
        ({"eval_strategy": "steps", "eval_steps": 40, "save_steps": 40}, 1 + 3, 4),
        ({"eval_strategy": "steps", "eval_steps": 0.1, "save_steps": 0.5}, 1 + 10, 2),
        ({"eval_strategy": "no", "save_strategy": "no"}, 1, 1),
    ):
        plan = plan_of("sft", do_eval=True, num_train_epochs=3, **flags)
        assert (count_evaluations(plan, rows, 150), count_saves(plan, rows, 150)) == (n_evaluations, n_saves)


# ---------------------------------------------------------------- rows


def test_real_data_gives_the_longest_rows(tiny_model_dir, tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    records = [{"question": "头疼怎么办？", "answer": "请就诊。" * n} for n in range(1, 9)]
    data = write_lines(tmp_path / "data/records.jsonl", records).parent
    flags = stage_flags("sft", tiny_model_dir, tmp_path, train_file_dir=data)
    plan = read_plan(importlib.import_module("supervised_finetuning"), flags, 1, "")
    rows = find_rows(plan, None)
    assert len(rows.lengths) == 8
    assert [len(row["input_ids"]) for row in rows.longest] == sorted(rows.lengths.tolist())[-2:][::-1]
    memory = measure_memory(plan, find_shape(plan.base_model, ""), rows)
    assert 0 < memory.total < 2 * GIB


def test_padding_counts():
    assert padded_tokens([3, 3, 5, 5], 2, grouped=True) == (16, 2 * 9 + 2 * 25)
    assert padded_tokens([7, 7, 7], 2) == (4 * 7, 4 * 49)


# ---------------------------------------------------------------- remedies


def test_the_mildest_remedy_comes_first():
    flags = {"model_name_or_path": "base", "do_train": True, "output_dir": "out", "model_max_length": 2048}
    flags |= {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 8, "gradient_checkpointing": False}
    plan = read_plan(importlib.import_module("supervised_finetuning"), words(flags), 1, "")
    lists = remedies(plan, 1800)
    halved = ["--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "16"]
    single = ["--per_device_train_batch_size", "1", "--gradient_accumulation_steps", "32"]
    assert lists[:3] == [halved, single, [*single, "--gradient_checkpointing", "True"]]
    assert "--load_in_4bit" in lists[3]
    assert lists[4][-2:] == ["--model_max_length", "900"]
