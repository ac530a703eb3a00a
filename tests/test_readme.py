"""The READMEs: every command in them is tried as far as it goes without training, every fact compared with the code."""

import ast
import json
import re
import shlex
import subprocess
from dataclasses import fields
from functools import cache
from pathlib import Path

import pytest
from test_launchers import GUIDE, edit_block, known_flags, launch, pairs, parser_of

from medtune.arguments import (
    RENAMED,
    SETTLED,
    DataArguments,
    LoraArguments,
    ModelArguments,
    RunArguments,
    StageArgumentParser,
)
from medtune.errors import UserError
from medtune.models.adapters import DEFAULT_LORA_ALPHA, DEFAULT_LORA_RANK
from medtune.reading.finding import RECORD_ENDINGS
from medtune.reading.record_sets import load_dialogues
from medtune.training.causal_lm_trainer import CausalLMConfig
from medtune.training.checkpoints import MANIFEST
from supervised_finetuning import SFTArguments
from template import TEMPLATES

ROOT = Path(__file__).resolve().parents[1]
READMES = ["README.md", "README_ZH.md"]
OURS = [ModelArguments, DataArguments, LoraArguments, RunArguments, SFTArguments]

# Commands that are not ours, with the words that may follow.
FOREIGN = {"mkdir", "tail", "tensorboard", "source", "export", "curl"}
# Not flags of a script: of torchrun, and of the launchers' set-up.
OTHER_FLAGS = {"--nproc_per_node", "--gpu", "--active", "--dev", "--all", "--logdir", "--port", "--bind_all", "--help"}


@cache
def text_of(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def blocks(name: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text_of(name), re.MULTILINE | re.DOTALL)


def commands(name: str) -> list[list[str]]:
    """The words of each command in the bash blocks, redirections and comments left out."""
    lines = "".join(blocks(name, "bash")).replace("\\\n", " ").splitlines()
    found = []
    for line in lines:
        words = shlex.split(line, comments=True)
        words = words[: next((index for index, word in enumerate(words) if word in (">", "&")), None)]
        found += [words] if words else []
    return found


def split_command(words: list[str]) -> tuple[dict[str, str], str, list[str]]:
    """Variables set for the command, what it starts, and the words that follow."""
    variables = {}
    while words and re.match(r"\w+=", words[0]):
        variable, _, variables[variable] = words[0].partition("=")
        words = words[1:]
    words = words[1:] if words[:1] == ["nohup"] else words
    if words[:1] == ["torchrun"]:
        assert words[1] == "--nproc_per_node"
        return variables, words[3], words[4:]
    if words[:1] in (["bash"], ["python"]):
        return variables, words[1], words[2:]
    return variables, words[0] if words else "", words[1:]


def table(name: str, heading_flag: str) -> list[list[str]]:
    """The rows, as cells, of the table whose first row begins with a flag."""
    lines = text_of(name).splitlines()
    start = next(index for index, line in enumerate(lines) if line.startswith(f"| `{heading_flag}`"))
    rows = []
    for line in lines[start:]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return rows


def flags_in(cell: str) -> list[str]:
    return re.findall(r"--\w+", cell)


ALL_COMMANDS = [
    pytest.param(name, words, id=f"{name}-{' '.join(words)[:60]}") for name in READMES for words in commands(name)
]

# ---------------------------------------------------------------- commands


@pytest.mark.parametrize("name", READMES)
def test_blocks_are_bash(name):
    assert len(blocks(name, "bash")) >= 7
    for block in blocks(name, "bash"):
        checked = subprocess.run(["bash", "-n"], input=block, capture_output=True, text=True, check=False)
        assert checked.returncode == 0, checked.stderr


def test_both_have_the_same_commands_and_the_same_output():
    assert commands("README.md") == commands("README_ZH.md")
    assert blocks("README.md", "text") == blocks("README_ZH.md", "text")


@pytest.mark.parametrize(("name", "words"), ALL_COMMANDS)
def test_command(name, words, tmp_path):
    variables, started, flags = split_command(words)
    if not started or started in FOREIGN:
        return
    assert (ROOT / started).is_file(), f"{started} is not there"
    if started == "setup.sh":
        assert all(f"{flag})" in text_of("setup.sh") for flag in flags)
    elif started == "run_tests.sh":
        assert set(flags) <= {"--all"}
    elif started == "run_demo.sh":
        assert not flags
    elif started == "run_all.sh":
        assert all(f"{variable}=${{{variable}:-" in text_of(started) for variable in variables)
    elif started.endswith(".sh"):
        call = launch(started, tmp_path, *flags, **variables)
        assert variables.keys() <= edit_block(started).keys(), "a variable that the launcher does not read"
        # --deepspeed is understood in the processes that the launcher starts (tests/training/test_deepspeed.py).
        parse(call.script, [word for word in call.flags if word not in ("--deepspeed", variables.get("DEEPSPEED"))])
    else:
        parse(started, flags)


def parse(script: str, flags: list[str]) -> None:
    """Parse as the script does; what is not installed here or not trained yet is no matter of the flags."""
    parser = parser_of(script)
    if not isinstance(parser, StageArgumentParser):
        parser.parse_args(flags)
        return
    parser = StageArgumentParser(parser.dataclass_types)
    parser.parse([word.replace("$MODEL_PATH", "Qwen/Qwen2.5-3B-Instruct") for word in flags])


def test_guide_command_stands_there_flag_for_flag():
    (words,) = [words for words in commands("README.md") if "torchrun" in words]
    variables, script, flags = split_command(words)
    assert (variables, script) == ({"CUDA_VISIBLE_DEVICES": "0,1"}, "supervised_finetuning.py")
    assert pairs(flags)[0] == ("model_name_or_path", "$MODEL_PATH")
    assert pairs(flags)[1:] == pairs(GUIDE["run_sft.sh"].split())[1:]
    assert ["MODEL_PATH=Qwen/Qwen2.5-3B-Instruct"] in commands("README.md")


@pytest.mark.parametrize("name", READMES)
def test_every_flag_named_anywhere_is_one(name):
    scripts = {split_command(words)[1] for words in commands(name)}
    scripts |= {
        script
        for sh in scripts
        if sh.startswith("run_")
        for script in re.findall(r"^exec.* (\w+\.py)", text_of(sh), re.M)
    }
    known = OTHER_FLAGS.union(*(known_flags(script) for script in scripts if script.endswith(".py")))
    assert set(flags_in(text_of(name))) <= known


@pytest.mark.parametrize("name", READMES)
def test_remedies_are_accepted(name):
    """Flags with values in the trouble table, each parsed on top of a plain command."""
    lines = [line for line in text_of(name).splitlines() if line.startswith("|")]
    remedies = {
        remedy
        for line in lines
        for remedy in re.findall(r"`(--\w+ [^`]+)`", line)
        if not re.search(r"--report_to wandb|--save_safetensors|--push_to_hub", remedy)
    }
    assert len(remedies) >= 20
    for remedy in remedies:
        plain = ["--model_name_or_path", "some/model", "--output_dir", "outputs-x", "--do_train"]
        parse("supervised_finetuning.py", [*plain, *remedy.split()])


# ---------------------------------------------------------------- tables and lists


def default_of(flag: str) -> str:
    """The default as the table writes it; `-` is none."""
    worded = {
        "--lora_rank": DEFAULT_LORA_RANK,
        "--lora_alpha": f"{DEFAULT_LORA_ALPHA:g}",
        "--target_modules": "all",
    }
    default = worded.get(flag, parser_of("supervised_finetuning.py").get_default(flag[2:]))
    return "-" if default is None else f"`{default}`"


@pytest.mark.parametrize("name", READMES)
def test_flags_table(name, tmp_path):
    launched = dict(pairs(launch("run_sft.sh", tmp_path).flags))
    rows = table(name, "--model_name_or_path")
    for flag, default, in_launcher in [(flag, *row[1:3]) for row in rows for flag in flags_in(row[0])]:
        assert default == default_of(flag), flag
        value = launched.get(flag[2:])
        assert in_launcher == ("-" if value is None else f"`{value}`"), flag
    listed = {flag for row in rows for flag in flags_in(row[0])}
    assert listed >= {f"--{spec.name}" for group in OURS for spec in fields(group)}
    assert listed <= {f"--{spec.name}" for group in [*OURS, CausalLMConfig] for spec in fields(group)}


def test_defaults_that_the_parser_does_not_hold():
    """None for rank, alpha and modules becomes what the table says, in medtune/models/adapters.py."""
    for flag in ("lora_rank", "lora_alpha", "target_modules"):
        assert parser_of("supervised_finetuning.py").get_default(flag) is None
    assert "target_modules in (None, " in text_of("medtune/models/adapters.py")


@pytest.mark.parametrize("name", READMES)
def test_renamed_flags_table(name):
    rows = table(name, "--evaluation_strategy")
    done = {flag: row[1] for row in rows for flag in flags_in(row[0])}
    assert done.keys() == RENAMED.keys() | SETTLED.keys() | {"--group_by_length"}
    for old, new in RENAMED.items():
        assert f"`{new}`" in done[old]
    for flag, (meant, _) in SETTLED.items():
        assert re.findall("`(True|False)`", done[flag]) == [str(meant), str(not meant)]


@pytest.mark.parametrize("name", READMES)
def test_templates(name):
    (line,) = [line for line in text_of(name).splitlines() if line.startswith("**") and "--template_name" in line]
    assert re.findall(r"`(\w+)`", line) == list(TEMPLATES)


@pytest.mark.parametrize("name", READMES)
def test_forms_of_data_are_read(name, write_jsonl):
    rows = [line for line in text_of(name).splitlines() if re.match(r'\| [^`|]+ \| `\{"', line)]
    assert len(rows) == 4
    examples = [json.loads(re.search(r"`(\{.*\})`", row)[1]) for row in rows]
    dialogues, report = load_dialogues([write_jsonl("train.jsonl", examples)])
    assert report.summary() == "kept 4 of 4"
    assert [len(dialogue.messages) for dialogue in dialogues] == [2] * 4
    assert all(f"`{ending}`" in text_of(name) for ending in RECORD_ENDINGS)


def test_message_about_bad_data_is_the_real_one(write_jsonl, monkeypatch, tmp_path):
    shown = blocks("README.md", "text")[1]
    records = [
        {"question": "头疼怎么办？", "answer": "休息。"},
        {"conversations": [{"from": "human", "value": "胃疼怎么办？"}]},
        {"question": "发烧怎么办？", "anwser": "多喝水。"},
    ]
    path = write_jsonl("bad/train.jsonl", records)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as refused:
        load_dialogues([path])
    assert shown == f"error: {refused.value}\n"


@pytest.mark.parametrize("name", READMES)
def test_files_of_a_run_are_those_that_the_stage_test_expects(name):
    source = text_of("tests/test_supervised_finetuning.py")
    expected = {
        node.targets[0].id: ast.literal_eval(node.value)
        for node in ast.parse(source).body
        if isinstance(node, ast.Assign) and node.targets[0].id in ("ADAPTER_FILES", "STATE_FILES")
    }
    line = next(
        line for line in text_of(name).splitlines() if "`adapter_config.json`" in line and "`optimizer.pt`" in line
    )
    best, _, numbered = line.replace("*", "").partition("`checkpoint-N/`")
    assert set(re.findall(r"`(\w+\.\w+)`", best)) == expected["ADAPTER_FILES"]
    assert set(re.findall(r"`(\w+\.\w+)`", numbered)) == expected["STATE_FILES"] | {MANIFEST}
    whole_run = ast.literal_eval(re.search(r"assert names\(out\) == (\{.*?\})", source, re.DOTALL)[1])
    first_cells = " ".join(re.findall(r"^\|([^|]+)\|", text_of(name), re.MULTILINE))
    listed = {entry.strip("/") for entry in re.findall(r"`([^`]+)`", first_cells)}
    assert {re.sub(r"-\d+$", "-N", entry) for entry in whole_run} <= listed


@pytest.mark.parametrize("name", READMES)
def test_versions_are_the_pinned_ones(name):
    pinned = dict(re.findall(r"^([\w-]+)==([\w.]+)", text_of("requirements.txt"), re.MULTILINE))
    named = dict(re.findall(r"\b([a-z]+) (\d+\.\d+\.\d+)", text_of(name)))
    assert named.keys() >= {"torch", "transformers", "trl", "peft"}
    assert named == {package: pinned[package] for package in named}


# ---------------------------------------------------------------- the text


@pytest.mark.parametrize("name", READMES)
def test_links_resolve(name):
    for target in re.findall(r"\]\(([^)]+)\)", text_of(name)):
        path, _, anchor = target.partition("#")
        if path:
            assert (ROOT / path).exists(), target
        else:
            headings = re.findall(r"^#+ (.+)$", text_of(name), re.MULTILINE)
            assert anchor in [heading.lower().replace(" ", "-") for heading in headings], target


@pytest.mark.parametrize("name", READMES)
def test_safety_stands_near_the_top(name):
    head = "\n".join(text_of(name).splitlines()[:10])
    assert "120" in head
    assert "DISCLAIMER.md" in head


@pytest.mark.parametrize("name", READMES)
def test_environment_variables_are_read_somewhere(name):
    sources = "".join(path.read_text(encoding="utf-8") for path in [*ROOT.glob("*.sh"), *ROOT.glob("*.py")])
    named = set(re.findall(r"`(?:export )?([A-Z]+_[A-Z_]+)(?:=\S*)?`", text_of(name)))
    assert {"TRAIN_DATA", "EVAL_DATA", "HF_TOKEN", "HF_ENDPOINT", "TORCH_COMPILE"} <= named
    assert not [variable for variable in named if variable not in sources]


def test_both_have_the_same_structure():
    def structure(name: str) -> list[str]:
        """Levels of headings, kinds of blocks, first cells' flags, in order."""
        return re.findall(r"^(#+|```\w+|\|)", text_of(name), re.MULTILINE)

    assert structure("README.md") == structure("README_ZH.md")
