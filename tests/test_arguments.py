"""Flags: the guide's commands as they stand, what is translated, and the one line for what is refused."""

import os
import re
import shlex
import sys
from pathlib import Path

import pytest
import torch
from guide import GUIDE_DPO, GUIDE_PPO, GUIDE_PT, GUIDE_RM, GUIDE_SFT
from test_launchers import pairs

from medtune import arguments
from medtune.arguments import DataArguments, LoraArguments, ModelArguments, RunArguments, StageArgumentParser
from medtune.errors import UserError
from medtune.training.causal_lm_trainer import CausalLMConfig
from supervised_finetuning import SFTArguments

ROOT = Path(__file__).resolve().parents[1]

SFT = [ModelArguments, DataArguments, LoraArguments, RunArguments, SFTArguments, CausalLMConfig]
REQUIRED = ["--model_name_or_path", "m", "--output_dir", "out", "--do_train"]

# The guide's table of remedies.
REMEDIES = [
    "--per_device_train_batch_size 1 --gradient_accumulation_steps 32",
    "--gradient_checkpointing True",
    "--load_in_8bit True",
    "--model_max_length 1024",
    "--lora_rank 8",
    "--flash_attn True",
    "--bf16 True --torch_dtype bfloat16",
    "--eval_steps 1000",
    "--learning_rate 1e-5",
    "--warmup_ratio 0.1",
    "--weight_decay 0.01",
    "--optim adamw_torch",
    "--optim adafactor",
    "--preprocessing_num_workers 16",
    "--overwrite_cache",
    "--report_to tensorboard",
    "--run_name NAME",
    "--resume_from_checkpoint outputs-sft-qwen2.5-3b/checkpoint-500",
    "--resume_from_checkpoint True",
]
# What a machine without a GPU has instead.
ON_THE_CPU = {"bf16": False, "fp16": False, "torch_dtype": "float32", "device_map": None, "use_cpu": True}


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch):
    """The parser reads and sets the environment; each test starts from none of it, and leaves none."""
    for name in ("TENSORBOARD_LOGGING_DIR", "TORCH_COMPILE", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


def parse(command: str = "", dataclass_types: list = SFT) -> tuple[dict, list[str]]:
    """All values by name, and the notes, of the required flags and `command`."""
    parser = StageArgumentParser(dataclass_types)
    instances = parser.parse([*REQUIRED, *shlex.split(command)])
    return {name: value for instance in instances for name, value in vars(instance).items()}, parser.notes


def refused(command: str, dataclass_types: list = SFT) -> str:
    """The one line that refuses a command."""
    with pytest.raises(UserError) as error:
        parse(command, dataclass_types)
    assert "\n" not in str(error.value)
    return str(error.value)


# ---------------------------------------------------------------- the guide


def assert_each_flag_has_its_value(command: str) -> list[str]:
    """Every flag of the command, and the device of this machine; returns the notes."""
    values, notes = parse(command)
    assert {name: values[name] for name in ON_THE_CPU} == ON_THE_CPU
    values |= {"warmup_ratio": values["warmup_steps"]}
    values |= {"group_by_length": values["train_sampling_strategy"] == "group_by_length"}
    for name, text in dict(pairs(command.split())).items():
        if name not in ON_THE_CPU:
            value = values[name][0] if isinstance(values[name], list) else values[name]
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            assert value == float(text) if is_number else text in (value, str(value)), name
    return notes


@pytest.mark.parametrize(
    "command", [GUIDE_PT, GUIDE_SFT, GUIDE_RM, GUIDE_DPO, GUIDE_PPO], ids=["pt", "sft", "rm", "dpo", "ppo"]
)
def test_the_guides_commands_mean_what_they_say(command):
    notes = assert_each_flag_has_its_value(command)
    if command == GUIDE_SFT:
        assert notes == [
            "--warmup_ratio is now --warmup_steps 0.05",
            "no CUDA device: float32 on the CPU instead of --bf16, --torch_dtype bfloat16, --device_map auto",
        ]


@pytest.mark.parametrize("flags", REMEDIES)
def test_remedies(flags):
    assert_each_flag_has_its_value(f"{GUIDE_SFT} {flags}")


# ---------------------------------------------------------------- how a flag may be written


@pytest.mark.parametrize(
    ("command", "name", "value"),
    [
        ("--do_eval", "do_eval", True),
        ("--do_eval True", "do_eval", True),
        ("--do_eval False", "do_eval", False),
        ("--gradient_checkpointing=False", "gradient_checkpointing", False),
        ("--no_gradient_checkpointing", "gradient_checkpointing", False),
        ("--learning-rate 1e-4", "learning_rate", 1e-4),
        ("--learning-rate=1e-4", "learning_rate", 1e-4),
        ("--learning_rate 1e-4 --learning_rate 3e-4", "learning_rate", 3e-4),
        ("--max_steps -1", "max_steps", -1),
        ("--run_name -x", "run_name", "-x"),
        ("--run_name a=b", "run_name", "a=b"),
        ("--run_name=a=b", "run_name", "a=b"),
        ("--run_name 'two words'", "run_name", "two words"),
        ("--run_name ''", "run_name", ""),
        ("--lr_scheduler_type cosine", "lr_scheduler_type", "cosine"),
        ("--neftune_noise_alpha 5", "neftune_noise_alpha", 5.0),
        (
            """--gradient_checkpointing_kwargs '{"use_reentrant": false}'""",
            "gradient_checkpointing_kwargs",
            {"use_reentrant": False},
        ),
        ("""--lr_scheduler_kwargs '{"num_cycles": 2}'""", "lr_scheduler_kwargs", {"num_cycles": 2}),
        ("--label_names a b", "label_names", ["a", "b"]),
    ],
)
def test_ways_to_write_a_flag(command, name, value):
    assert parse(command)[0][name] == value


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("True", True),
        ("true", True),
        ("1", True),
        ("yes", True),
        ("False", None),
        ("None", None),
        ("out/c-5", "out/c-5"),
    ],
)
def test_resume_flag_becomes_a_boolean_or_a_path(text, value):
    assert parse(f"--resume_from_checkpoint {text}")[0]["resume_from_checkpoint"] == value


# ---------------------------------------------------------------- flags of older libraries


@pytest.mark.parametrize(
    ("command", "some", "note"),
    [
        ("--group_by_length True", {"train_sampling_strategy": "group_by_length"}, "--group_by_length True is now "),
        ("--group_by_length", {"train_sampling_strategy": "group_by_length"}, "--group_by_length True is now "),
        ("--group_by_length False", {"train_sampling_strategy": "random"}, "--group_by_length False is now "),
        ("--warmup_ratio 0", {"warmup_steps": 0.0}, "--warmup_ratio is now --warmup_steps 0"),
        ("--evaluation_strategy epoch", {"eval_strategy": "epoch"}, "--evaluation_strategy is now --eval_strategy"),
        ("--per_gpu_train_batch_size 3", {"per_device_train_batch_size": 3}, "--per_gpu_train_batch_size is now "),
        ("--dataset_num_proc 3", {"preprocessing_num_workers": 3}, "--dataset_num_proc is now --preprocessing_num"),
        ("--dtype float32", {"torch_dtype": "float32"}, "--dtype is now --torch_dtype float32"),
        ("--no_cuda", {"use_cpu": True}, "--no_cuda is now --use_cpu"),
        ("--optim adamw_hf", {"optim": "adamw_torch"}, "--optim adamw_hf is gone"),
        ("--save_safetensors True", {}, "--save_safetensors True: weights are always written as safetensors"),
        ("--push_to_hub False", {"push_to_hub": False}, "--push_to_hub False: nothing is uploaded"),
    ],
)
def test_old_flag_keeps_its_meaning_and_is_noted(command, some, note):
    values, notes = parse(command)
    assert {name: values[name] for name in some} == some
    assert any(line.startswith(note) for line in notes), notes


def test_logging_dir_is_a_flag_of_our_own():
    assert parse("--logging_dir logs/x")[0]["logging_dir"] == "logs/x"
    assert "TENSORBOARD_LOGGING_DIR" not in os.environ  # a second run in this process would write there too


# ---------------------------------------------------------------- what a flag leaves open


@pytest.mark.parametrize(
    ("command", "strategy"),
    [
        ("--do_eval --eval_steps 5", "steps"),
        ("--do_eval --eval_steps 5 --eval_strategy epoch", "epoch"),
        ("--do_eval --eval_steps 5 --eval-strategy no", "no"),
        ("--eval_steps 5", "no"),
        ("--do_eval", "no"),
    ],
)
def test_eval_steps_imply_the_strategy_where_evaluation_is_asked_for(command, strategy):
    assert parse(command)[0]["eval_strategy"] == strategy


@pytest.mark.parametrize(
    ("environment", "command", "compiled"),
    [("1", "", True), ("0", "", False), ("", "", False), ("1", "--torch_compile False", False)],
)
def test_torch_compile_variable(monkeypatch, environment, command, compiled):
    monkeypatch.setenv("TORCH_COMPILE", environment)
    values, notes = parse(command)
    assert values["torch_compile"] is compiled
    assert any("TORCH_COMPILE" in line for line in notes) is compiled


def test_ddp_does_not_look_for_unused_parameters_unless_told():
    assert parse()[0]["ddp_find_unused_parameters"] is False
    assert parse("--ddp_find_unused_parameters True")[0]["ddp_find_unused_parameters"] is True


def test_nan_losses_stay_in_the_log():
    assert parse()[0]["logging_nan_inf_filter"] is False


# ---------------------------------------------------------------- device and precision


@pytest.fixture
def gpu(monkeypatch):
    """Pretend that a CUDA device with or without bfloat16 is there, and look at the parser's decision alone."""

    def settle(command: str, has_bf16: bool) -> tuple[dict, list[str]]:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        # Older GPUs emulate bfloat16, and torch says yes unless it is asked without emulation.
        monkeypatch.setattr(
            torch.cuda, "is_bf16_supported", lambda including_emulation=True: has_bf16 or including_emulation
        )
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla V100")
        parser = StageArgumentParser(SFT)
        words = parser._translate([*REQUIRED, *shlex.split(command)])
        values = vars(parser.parse_args(words))
        parser._settle_device(values, {word[2:].partition("=")[0] for word in words if word.startswith("--")})
        return values, parser.notes

    return settle


@pytest.mark.parametrize(
    ("command", "bf16", "fp16"),
    [("", True, False), ("--bf16", True, False), ("--bf16 False", False, False), ("--fp16", None, True)],
)
def test_precision_on_a_gpu_with_bfloat16(gpu, command, bf16, fp16):
    values, notes = gpu(command, has_bf16=True)
    assert (values["bf16"], values["fp16"], values["use_cpu"], notes) == (bf16, fp16, False, [])


def test_precision_on_a_gpu_without_bfloat16(gpu):
    values, notes = gpu("", has_bf16=False)
    assert values["bf16"] is False
    assert notes == ["Tesla V100 has no bfloat16: training in float32; --fp16 True is faster"]
    assert gpu("--fp16 True", has_bf16=False)[0]["fp16"] is True
    with pytest.raises(UserError, match="--bf16: Tesla V100 has no bfloat16; use --fp16 True --bf16 False"):
        gpu("--bf16", has_bf16=False)


def test_gpu_keeps_dtype_and_device_map(gpu):
    values, _ = gpu("--torch_dtype bfloat16 --device_map auto", has_bf16=True)
    assert (values["torch_dtype"], values["device_map"]) == ("bfloat16", "auto")


def test_cpu_on_a_gpu_machine_is_not_called_a_lack_of_cuda(gpu):
    values, notes = gpu("--use_cpu --bf16", has_bf16=True)
    assert (values["use_cpu"], values["bf16"], values["torch_dtype"]) == (True, False, "float32")
    assert notes == ["--use_cpu: float32 on the CPU instead of --bf16"]


def test_without_cuda_everything_is_float32_on_the_cpu_and_said(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    values, notes = parse("--fp16 --torch_dtype float16 --device_map auto --tf32 True --use_cpu False")
    assert {name: values[name] for name in ("use_cpu", "bf16", "fp16", "tf32", "torch_dtype", "device_map")} == {
        "use_cpu": True,
        "bf16": False,
        "fp16": False,
        "tf32": None,
        "torch_dtype": "float32",
        "device_map": None,
    }
    assert notes == [
        "no CUDA device: float32 on the CPU instead of --fp16, --torch_dtype float16, --device_map auto, "
        "CUDA_VISIBLE_DEVICES=0,1"
    ]


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("command", "line"),
    [
        ("--learning_rat 1", "--learning_rat is not a flag of this stage; did you mean --learning_rate?"),
        ("--lora_r 8", "--lora_r is not a flag of this stage; did you mean --lora_rank?"),
        ("--learn 1", "--learn is not a flag of this stage; did you mean --learning_rate?"),  # argparse would take it
        ("--epochs 1", "did you mean --num_train_epochs?"),
        ("--loggin_dir x", "did you mean --logging_dir?"),
        ("--save_safetensor True", "did you mean --save_safetensors?"),
        ("-x 1", "-x is not a flag of this stage"),
        ("--bf16 True False", "False: these words belong to no flag"),
        ("--run_name two words", "words: these words belong to no flag"),
        ("--do_eval data/finetune", "--do_eval data/finetune: give True or False"),
        ("--run_name", "--run_name: expected one argument"),
        ("--learning_rate abc", "--learning_rate: invalid float value: 'abc'"),
        ("--max_steps x", "--max_steps: invalid int value: 'x'"),
        ("--max_train_samples 1.5", "--max_train_samples: invalid int value: '1.5'"),
        ("--on_bad_data foo", "--on_bad_data: invalid choice: 'foo' (choose from 'error', 'drop')"),
        ("--lr_scheduler_type foo", "--lr_scheduler_type: invalid choice: 'foo' (choose from 'linear', 'cosine'"),
        ("--torch_dtype bf16", "--torch_dtype: invalid choice: 'bf16' (choose from 'auto', 'bfloat16'"),
        ("--device_map gpu", "--device_map: invalid choice: 'gpu' (choose from 'auto'"),
        ("--gradient_checkpointing_kwargs '{use: 1}'", "--gradient_checkpointing_kwargs {use: 1}: not JSON"),
        ("--group_by_length maybe", "--group_by_length maybe: give True or False"),
        ("--padding_free maybe", "--padding_free maybe: give auto, True or False"),
        ("--group_by_length True 5", "--group_by_length True 5: give True or False"),
        ("--warmup_ratio 0.1 --warmup_steps 10", "--warmup_ratio and --warmup_steps say the same thing twice"),
        ("--warmup-ratio=0.1 --warmup-steps=10", "--warmup_ratio and --warmup_steps say the same thing twice"),
        ("--warmup_ratio 1", "--warmup_ratio 1: give a share of the steps from 0 to below 1"),
        ("--warmup_ratio 100", "--warmup_ratio 100: give a share"),
        ("--warmup_ratio abc", "--warmup_ratio abc: give a share"),
        ("--save_safetensors False", "--save_safetensors False cannot be honoured: weights are always written as"),
        ("--push_to_hub", "--push_to_hub True cannot be honoured: nothing is uploaded"),
        ("--auto_find_batch_size", "--auto_find_batch_size True cannot be honoured: it was removed; the batch stays"),
        ("--activation_offloading", "--activation_offloading was removed: --gradient_checkpointing True saves that"),
        ("--target_modules q_proj v_proj", "the names are joined by commas: --target_modules q_proj,v_proj"),
        ("--ignore_keys label, images", "the names are joined by commas: --ignore_keys label,images"),
        ("--logging_dir", "--logging_dir: expected one argument"),
        ("--load_in_8bit True --load_in_4bit True", "--load_in_8bit and --load_in_4bit exclude each other"),
        ("--max_eval_samples 0", "--max_eval_samples 0: give a number of records of at least 1"),
        ("--lora_rank 0", "--lora_rank 0: give at least 1"),
        ("--lora_alpha 0", "--lora_alpha 0.0: "),
        ("--lora_dropout 1", "--lora_dropout 1.0: give a share"),
        ("--per_device_train_batch_size 0", "--per_device_train_batch_size 0: give at least 1"),
        ("--gradient_accumulation_steps 0", "--gradient_accumulation_steps 0: give at least 1"),
        ("--learning_rate -1e-5", "--learning_rate -1e-05: give at least 0"),
        ("--seed -1", "--seed -1: give at least 0"),
        ("--load_best_model_at_end", "requires the save and eval strategy to match"),
        ("--report_to tensorbord", "--report_to tensorbord: not known; known are "),
        *(
            (f"--{name} /proc/x", f"--{name} /proc/x: cannot be made or written to (No such file or directory)")
            for name in ("output_dir", "cache_dir", "logging_dir")
        ),
        ("--do_train False", "neither --do_train nor --do_eval is given"),
    ],
)
def test_refused_in_one_line(command, line):
    assert line in refused(command)


def test_a_flag_of_another_stage_is_not_taken_for_a_neighbour():
    """Which would be --ddp_backend."""
    others = [arguments_class for arguments_class in SFT if arguments_class is not SFTArguments]
    assert refused("--packing True", others) == "--packing is not a flag of this stage"


@pytest.mark.parametrize(
    "command", ["--report_to wandb", "--report_to tensorboard wandb", "--report_to tensorboard,wandb"]
)
def test_tracker_that_is_not_installed(monkeypatch, command):
    monkeypatch.setattr(arguments, "get_available_reporting_integrations", lambda: ["tensorboard"])
    assert refused(command) == "--report_to wandb: the package is not installed; run `pip install wandb`"


@pytest.mark.parametrize("command", ["--report_to tensorboard wandb", "--report_to=tensorboard,wandb"])
def test_several_trackers(monkeypatch, command):
    monkeypatch.setattr(arguments, "get_available_reporting_integrations", lambda: ["tensorboard", "wandb"])
    assert parse(command)[0]["report_to"] == ["tensorboard", "wandb"]


def test_report_to_none_and_default():
    assert parse("--report_to none")[0]["report_to"] == []
    assert parse()[0]["report_to"] == []


def test_deepspeed_without_the_package_or_the_file(monkeypatch):
    monkeypatch.setattr(arguments.importlib.util, "find_spec", lambda name: None)
    assert refused("--deepspeed ds.json") == (
        "--deepspeed ds.json: the package is not installed; run `bash setup.sh --gpu`"
    )
    monkeypatch.setattr(arguments.importlib.util, "find_spec", lambda name: object())
    assert refused("--deepspeed ds.json") == "--deepspeed ds.json: no such file; ds_configs/ holds some"


def test_deepspeed_without_a_launcher(monkeypatch):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    message = refused(f"--deepspeed {ROOT}/ds_configs/zero2.json")
    assert re.search(r"zero2\.json: start the stage with its launcher \(DEEPSPEED=.* bash run_sft\.sh\)", message)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", r"--deepspeed .*ds\.json: not a DeepSpeed configuration in JSON"),
        ("[]", r"--deepspeed .*ds\.json: not a DeepSpeed configuration in JSON"),
        ('{"optimizer": {}}', r'its "optimizer" block would go before the flags'),
        ('{"scheduler": {}}', r'its "scheduler" block would go before the flags'),
    ],
)
def test_deepspeed_configuration_that_cannot_be_honoured(tmp_path, monkeypatch, text, message):
    monkeypatch.setenv("LOCAL_RANK", "0")
    (tmp_path / "ds.json").write_text(text, encoding="utf-8")
    assert re.search(message, refused(f"--deepspeed {tmp_path}/ds.json"))


@pytest.mark.parametrize("flag", ["--load_in_4bit True", "--load_in_8bit True"])
def test_quantized_weights_are_not_split_by_zero3(monkeypatch, flag):
    monkeypatch.setenv("LOCAL_RANK", "0")
    message = refused(f"{flag} --deepspeed {ROOT}/ds_configs/zero3.json")
    assert message.startswith(flag.split()[0] + " with ZeRO-3 (")
    assert message.endswith("quantized weights cannot be split over the GPUs; take ds_configs/zero2.json")


def test_missing_model_and_output_dir():
    with pytest.raises(UserError, match=r"the following arguments are required: --model_name_or_path;"):
        StageArgumentParser(SFT).parse(["--output_dir", "out"])
    with pytest.raises(UserError, match=r"--output_dir is missing"):
        StageArgumentParser(SFT).parse(["--model_name_or_path", "m", "--do_train", "--output_dir", ""])


def test_torch_compile_variable_with_another_word(monkeypatch):
    monkeypatch.setenv("TORCH_COMPILE", "maybe")
    assert refused("") == "TORCH_COMPILE maybe: give True or False"


# ---------------------------------------------------------------- the set of flags


# Flags of other trainers that would do nothing here.
MEANINGLESS = [
    *("max_length", "truncation_mode", "dataset_text_field", "dataset_kwargs", "eos_token"),
    *("pad_token", "chat_template_path", "completion_only_loss", "assistant_only_loss", "packing_strategy"),
    *("eval_packing", "loss_type", "pad_to_multiple_of", "model_init_kwargs", "shuffle_dataset"),
    "router_aux_loss_coef",
]


@pytest.mark.parametrize("name", MEANINGLESS)
def test_field_without_a_meaning_here_is_no_flag(name):
    assert f"--{name} is not a flag of this stage" in refused(f"--{name} 1")


def test_help_names_every_flag_once(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as ended:
        StageArgumentParser(SFT).parse(["--help"])
    assert ended.value.code == 0
    listed = re.findall(r"^  (?:-h, )?(--[\w-]+)", capsys.readouterr().out, flags=re.MULTILINE)
    assert len(listed) == len(set(listed))
    assert {"--help", "--model_name_or_path", "--lora_rank", "--learning_rate", "--model_max_length"} <= set(listed)
    assert not [flag for flag in listed if "-" in flag[2:]]


def test_parser_reads_the_command_line_by_default(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["supervised_finetuning.py", *REQUIRED, "--seed", "7"])
    *_, training_args = StageArgumentParser(SFT).parse()
    assert training_args.seed == 7


def test_parser_without_training_arguments_needs_no_output_dir():
    (model_args,) = StageArgumentParser([ModelArguments]).parse(["--model_name_or_path", "m", "--load-in-4bit"])
    assert model_args.load_in_4bit is True


def test_flags_are_kept_as_they_were_written():
    parser = StageArgumentParser(SFT)
    command = ["--model_name_or_path", "a/b", "--output_dir", "out", "--do-train", "--learning-rate", "2e-5"]
    command += ["--evaluation_strategy", "no", "--report_to", "none", "tensorboard", "--report_to", "none"]
    parser.parse([*command, "--hub_token", "hf_secret"])
    assert parser.given == {
        "--model_name_or_path": "a/b",
        "--output_dir": "out",
        "--do_train": "True",
        "--learning_rate": "2e-5",
        "--eval_strategy": "no",
        "--report_to": "none",
    }


def test_autocast_on_the_cpu_is_asked_for_by_flag():
    values, notes = parse("--cpu_bf16 autocast --bf16 --torch_dtype bfloat16")
    assert (values["bf16"], values["torch_dtype"]) == (True, "float32")
    assert notes == [
        "no CUDA device: float32 weights, products in bfloat16 on the CPU instead of --torch_dtype bfloat16"
    ]
    assert refused("--cpu_bf16 autocast --bf16 False") == (
        "--cpu_bf16 autocast: not with --bf16 False; leave one of them out"
    )


def test_notes_belong_to_one_parser():
    assert StageArgumentParser(SFT).notes is not StageArgumentParser(SFT).notes


@pytest.mark.parametrize(
    ("words", "value"), [("", "True"), ("true", "True"), ("no", "False"), ("auto", "auto"), ("False", "False")], ids=str
)
@pytest.mark.parametrize("name", ["padding_free", "cpu_bf16"])
def test_a_flag_with_auto_reads_the_words_of_other_booleans(name, words, value):
    assert parse(f"--{name} {words}")[0][name] == value
