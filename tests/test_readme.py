"""READMEs and pages of docs: commands are tried as far as they go without training, facts compared with the code."""

import re
import shlex
import subprocess
from functools import cache
from pathlib import Path

import pytest
from template_cases import TOOLS_TOO
from test_launchers import GUIDE, edit_block, known_flags, launch, pairs, parser_of
from test_template import COMPARED

from medtune.arguments import (
    DataArguments,
    LoraArguments,
    ModelArguments,
    RunArguments,
    StageArgumentParser,
)
from medtune.measuring.judge_client import JudgeArguments
from medtune.models.adapters import DEFAULT_LORA_ALPHA, DEFAULT_LORA_RANK
from medtune.old_flags import FIXED_FLAGS, RENAMED
from medtune.rl.arguments import GRPOArguments, GRPORewardArguments, PPOArguments, RewardArguments, RolloutArguments
from medtune.rl.distillation_arguments import DistillationArguments, TeacherArguments
from medtune.training.preference_arguments import PairArguments
from pretraining import PTArguments
from supervised_finetuning import SFTArguments
from template import TEMPLATES

ROOT = Path(__file__).resolve().parents[1]
READMES = ["README.md", "README_ZH.md"]
# Pages in both languages: what a README promises is found in it or in one of these.
PAGES = [f"docs/{name}" for name in ("guide", "data", "flags", "outputs", "trouble")]
PAGES += [f"docs/recipes/{name}" for name in ("README", "med_rlvr", "thoughts", "grpo_after_sft")]
PAGES += [f"docs/recipes/{name}" for name in ("judge_grpo", "best_of_n", "distillation")]
BOTH = [("README.md", "README_ZH.md"), *((f"{page}.md", f"{page}_ZH.md") for page in PAGES)]
BILINGUAL = [name for names in BOTH for name in names]
GUIDES, FLAGS, DATA, OUTPUTS, TROUBLE = (
    [f"docs/{name}{ending}.md" for ending in ("", "_ZH")] for name in ("guide", "flags", "data", "outputs", "trouble")
)
ALL_PAGES = [
    *BILINGUAL,
    *(
        f"docs/{name}.md"
        for name in (
            *("distillation", "estimate", "evaluation", "grpo", "models", "ppo", "reliability", "results", "serving"),
            "vllm",
        )
    ),
]
LAUNCHED = {
    "pretraining.py": "run_pt.sh",
    "supervised_finetuning.py": "run_sft.sh",
    "reward_modeling.py": "run_rm.sh",
    "dpo_training.py": "run_dpo.sh",
    "ppo_training.py": "run_ppo.sh",
    "grpo_training.py": "run_grpo.sh",
    "distillation_training.py": "run_distill.sh",
}
SHARED = [ModelArguments, DataArguments, LoraArguments, RunArguments]
OWN = {
    "pretraining.py": [PTArguments],
    "supervised_finetuning.py": [SFTArguments],
    "reward_modeling.py": [PairArguments],
    "dpo_training.py": [PairArguments],
    "ppo_training.py": [JudgeArguments, RewardArguments, RolloutArguments, PPOArguments],
    "grpo_training.py": [GRPORewardArguments, GRPOArguments],
    "distillation_training.py": [TeacherArguments, DistillationArguments],
}

# Commands that are not ours, with the words that may follow.
FOREIGN = {"mkdir", "tail", "tensorboard", "source", "export", "curl", "hf"}
# Not flags of a script: of torchrun, of the launchers' set-up, and the first words of `hf`'s.
OTHER_FLAGS = {"--nproc_per_node", "--gpu", "--active", "--dev", "--all", "--logdir", "--port", "--bind_all", "--help"}
OTHER_FLAGS |= {"--repo", "--local", "--train"}


@cache
def text_of(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def blocks(name: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text_of(name), re.MULTILINE | re.DOTALL)


def commands(name: str) -> list[list[str]]:
    """The words of each command in the bash blocks, redirections and comments left out."""
    lines = "".join(blocks(name, "bash")).replace("\\\n", " ").replace(" && ", "\n").splitlines()
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


def section(name: str, heading: str) -> list[str]:
    """The lines from a heading that holds this text to the next heading."""
    _, found, rest = text_of(name).partition(next(line for line in headings(name) if heading in line))
    assert found, heading
    return re.split(r"^#+ ", rest, maxsplit=1, flags=re.MULTILINE)[0].splitlines()


def headings(name: str) -> list[str]:
    return re.findall(r"^#+ .+$", re.sub(r"^```.*?^```$", "", text_of(name), flags=re.M | re.S), re.MULTILINE)


def table(lines: list[str], first_cell: str) -> list[list[str]]:
    """The rows, as cells, of the table in whose first row the first cell begins with this."""
    start = next(index for index, line in enumerate(lines) if line.startswith(f"| {first_cell}"))
    rows = []
    for line in lines[start:]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return rows


def flags_in(cell: str) -> list[str]:
    return re.findall(r"--\w+", cell)


ALL_COMMANDS = [
    pytest.param(name, words, id=f"{name}-{' '.join(words)[:60]}") for name in BILINGUAL for words in commands(name)
]

# ---------------------------------------------------------------- commands


@pytest.mark.parametrize("name", BILINGUAL)
def test_blocks_are_bash(name):
    assert len(blocks(name, "bash")) >= (4 if name in READMES else 7 if name in GUIDES else 0)
    for block in blocks(name, "bash"):
        checked = subprocess.run(["bash", "-n"], input=block, capture_output=True, text=True, check=False)
        assert checked.returncode == 0, checked.stderr


@pytest.mark.parametrize(("english", "chinese"), BOTH)
def test_both_have_the_same_commands_and_the_same_output(english, chinese):
    assert commands(english) == commands(chinese)
    assert blocks(english, "text") == blocks(chinese, "text")


@pytest.mark.parametrize(("name", "words"), ALL_COMMANDS)
def test_command(name, words, tmp_path):
    variables, started, flags = split_command(words)
    if not started or started in FOREIGN:
        return
    assert (ROOT / started).is_file(), f"{started} is not there"
    if started == "setup.sh":
        assert all(f"{flag})" in text_of("setup.sh") for flag in flags)
    elif started == "run_tests.sh":
        assert not flags or flags[-2] == "-k"
        check_tests(flags[:-2], flags[-1] if flags else "")
    elif started in ("run_demo.sh", "check_machine.sh"):
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


def check_tests(files: list[str], expression: str) -> None:
    """The files are there, and some test in them has each word of the expression."""
    text = "".join(text_of(file) for file in files)
    for word in set(re.findall(r"\w+", expression)) - {"or", "and", "not"}:
        assert word in text, f"no test of {files} has {word}"


def parse(script: str, flags: list[str]) -> None:
    """Parse as the script does; what is not installed here or not trained yet is no matter of the flags."""
    parser = parser_of(script)
    if not isinstance(parser, StageArgumentParser):
        parser.parse_args(flags)
        return
    parser = StageArgumentParser(parser.dataclass_types)
    parser.parse([word.replace("$MODEL_PATH", "Qwen/Qwen2.5-3B-Instruct") for word in flags])


def test_guide_command_stands_there_flag_for_flag():
    (words,) = [words for words in commands("docs/guide.md") if "torchrun" in words]
    variables, script, flags = split_command(words)
    assert (variables, script) == ({"CUDA_VISIBLE_DEVICES": "0,1"}, "supervised_finetuning.py")
    assert pairs(flags)[0] == ("model_name_or_path", "$MODEL_PATH")
    assert pairs(flags)[1:] == pairs(GUIDE["run_sft.sh"].split())[1:]
    assert ["MODEL_PATH=Qwen/Qwen2.5-3B-Instruct"] in commands("docs/guide.md")


@pytest.mark.parametrize("name", ALL_PAGES)
def test_commands_that_show_a_promise_find_their_tests(name):
    for line in re.findall(r"\bpytest ((?:tests/\S+\.py ?)+(?:-k (?:\"[^\"]+\"|\w+))?)", text_of(name)):
        words = shlex.split(line)
        check_tests([word for word in words if word.endswith(".py")], words[-1] if "-k" in words else "")


@pytest.mark.parametrize("name", BILINGUAL)
def test_every_flag_named_anywhere_is_one(name):
    scripts = {split_command(words)[1] for words in commands(name)} | set(LAUNCHED)
    known = OTHER_FLAGS.union(*(known_flags(script) for script in scripts if script.endswith(".py")))
    tried = r"^```bash try\n.*?^```$"  # tests/test_recipes.py runs them
    assert set(flags_in(re.sub(tried, "", text_of(name), flags=re.MULTILINE | re.DOTALL))) <= known


@pytest.mark.parametrize("name", TROUBLE)
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


def default_of(script: str, flag: str) -> str:
    """The default as the tables write it; `-` is none."""
    worded = {
        "--lora_rank": DEFAULT_LORA_RANK,
        "--lora_alpha": f"{DEFAULT_LORA_ALPHA:g}",
        "--target_modules": "all",
    }
    default = worded.get(flag, parser_of(script).get_default(flag[2:]))
    return "-" if default is None else f"`{' '.join(default) if isinstance(default, list) else default}`"


def check_flags(rows: list[list[str]], script: str, groups: list[type]) -> None:
    """Each default is the script's, and no flag of the groups is left out."""
    listed = {flag: row[1] for row in rows for flag in flags_in(row[0])}
    assert listed == {flag: default_of(script, flag) for flag in listed}
    assert set(listed) <= known_flags(script)
    # Own fields: a group may inherit flags of another one.
    assert set(listed) >= {f"--{name}" for group in groups for name in vars(group)["__annotations__"]}


@pytest.mark.parametrize("name", FLAGS)
def test_flags_of_all_stages(name):
    check_flags(table(text_of(name).splitlines(), "`--model_name_or_path`"), "supervised_finetuning.py", SHARED)


@pytest.mark.parametrize("name", FLAGS)
@pytest.mark.parametrize("script", OWN)
def test_flags_of_a_stage(name, script):
    check_flags(table(section(name, f"`{script}`"), "`--"), script, OWN[script])


@pytest.mark.parametrize("name", FLAGS)
def test_flags_that_the_launchers_set(name, tmp_path):
    rows = table(text_of(name).splitlines(), "`--train_file_dir` | `./data/pretrain`")
    paths = {"model_name_or_path", "sft_model_path", "reward_model_path", "teacher_model_path", "output_dir"}
    for number, launcher in enumerate(LAUNCHED.values(), start=1):
        launched = dict(pairs(launch(launcher, tmp_path).flags))
        listed = {row[0].strip("`-"): row[number].strip("`") for row in rows if row[number] != "-"}
        assert listed == {flag: value for flag, value in launched.items() if flag not in paths}, launcher


def test_defaults_that_the_parser_does_not_hold():
    """None for rank, alpha and modules becomes what the table says, in medtune/models/adapters.py."""
    for flag in ("lora_rank", "lora_alpha", "target_modules"):
        assert parser_of("supervised_finetuning.py").get_default(flag) is None
    assert "target_modules in (None, " in text_of("medtune/models/adapters.py")


@pytest.mark.parametrize("name", FLAGS)
def test_renamed_flags_table(name):
    rows = table(text_of(name).splitlines(), "`--evaluation_strategy`")
    done = {flag: row[1] for row in rows for flag in flags_in(row[0])}
    assert done.keys() == RENAMED.keys() | FIXED_FLAGS.keys() | {"--group_by_length"}
    for old, new in RENAMED.items():
        assert f"`{new}`" in done[old]
    for flag, (meant, _) in FIXED_FLAGS.items():
        assert re.findall("`(True|False)`", done[flag]) == [str(meant), str(not meant)]


@pytest.mark.parametrize("name", FLAGS)
def test_templates(name):
    (line,) = [line for line in text_of(name).splitlines() if line.startswith("**") and "--template_name" in line]
    assert re.findall(r"`(\w+)`", line) == list(TEMPLATES)


def test_table_of_templates():
    named = []
    for row in table(section("docs/models.md", "Templates"), "`--template_name`")[2:]:
        names, copies = (set(re.findall(r"`(\w+)`", cell)) for cell in row[:2])
        assert copies == {trl_name for name, trl_name, *_ in COMPARED if name in names}
        assert (row[2] == "-") == (not names & TOOLS_TOO)
        named += names
    assert sorted(named) == sorted(TEMPLATES)


# ---------------------------------------------------------------- the text


@pytest.mark.parametrize("name", ALL_PAGES)
def test_links_resolve(name):
    for target in re.findall(r"\]\(([^)]+)\)", text_of(name)):
        if target.startswith("http"):
            continue
        path, _, anchor = target.partition("#")
        page = (ROOT / name).parent / path if path else ROOT / name
        assert page.exists(), target
        if anchor:
            lines = headings(page.resolve().relative_to(ROOT).as_posix())
            anchors = [re.sub(r"[^\w\- ]", "", line.lstrip("# ").lower()).replace(" ", "-") for line in lines]
            assert anchor in anchors, target


@pytest.mark.parametrize("name", READMES)
def test_every_page_is_linked_from_the_front_page(name):
    chinese = name.endswith("_ZH.md")
    pages = {page.relative_to(ROOT).as_posix() for page in (ROOT / "docs").rglob("*.md")}
    own = {page for page in pages if page.endswith("_ZH.md") == chinese or page not in BILINGUAL}
    # A folder of pages by the one that lists them.
    own = {page for page in own if page.count("/") == 1 or "/README" in page}
    assert own <= set(re.findall(r"\]\((docs/[\w/]+\.md)\)", text_of(name)))
    assert pages == set(ALL_PAGES) - set(READMES)


@pytest.mark.parametrize("name", READMES)
def test_table_of_the_stages(name):
    """Scripts with their launchers, in the table of the front page; the memory is that of the launcher's header."""
    rows = [line for line in text_of(name).splitlines() if line.startswith("| ") and "](run_" in line]
    named = {}
    for row in rows:
        script, launcher = re.findall(r"\]\((\w+\.(?:py|sh))\)", row)
        named[script] = launcher
        header = text_of(launcher).partition("set -euo pipefail")[0]
        assert f"of {re.search('([0-9]+) GB', row)[1]} GB or more" in header, launcher
    assert named == LAUNCHED | {"openai_server.py": "run_serve.sh"}


def files_of_the_map(name: str) -> list[str]:
    """The paths in the tree of the front page; what is indented lies in the folder above it."""
    unnamed = re.sub(r"^```\w+\n.*?^```$", "", text_of(name), flags=re.MULTILINE | re.DOTALL)
    (tree,) = re.findall(r"^```\n(.*?)^```$", unnamed, re.MULTILINE | re.DOTALL)
    folders: dict[int, str] = {}
    paths = []
    for line in tree.splitlines():
        depth = len(line) - len(line.lstrip())
        above = next((folders[at] for at in sorted(folders, reverse=True) if at < depth), "")
        for word in re.match(r"[^ ]+(?: [^ ]+)*", line.strip())[0].split():
            paths.append(above + word)
            if word.endswith("/"):
                folders = {at: folder for at, folder in folders.items() if at < depth} | {depth: above + word}
    return paths


def test_the_map_names_files_that_are_there():
    paths = files_of_the_map("README.md")
    assert paths == files_of_the_map("README_ZH.md")
    assert not [path for path in paths if not list(ROOT.glob(path))]
    for name in READMES:
        named = re.findall(r"`((?:medtune/)?[\w/]+\.py)`", text_of(name))
        assert named
        assert not [path for path in named if not (ROOT / path).is_file()]


@pytest.mark.parametrize("name", READMES)
def test_safety_stands_near_the_top(name):
    head = "\n".join(text_of(name).splitlines()[:10])
    assert "120" in head
    assert "DISCLAIMER.md" in head


@pytest.mark.parametrize("name", FLAGS)
def test_environment_variables_are_read_somewhere(name):
    files = [*ROOT.glob("*.sh"), *ROOT.glob("*.py"), *ROOT.glob("medtune/**/*.py")]
    sources = "".join(path.read_text(encoding="utf-8") for path in files)
    named = set(re.findall(r"`(?:export )?([A-Z]+_[A-Z_]+)(?:=\S*)?`", text_of(name)))
    assert {"TRAIN_DATA", "EVAL_DATA", "PPO_DATA", "GRPO_DATA", "HF_TOKEN", "HF_ENDPOINT", "TORCH_COMPILE"} <= named
    assert not [variable for variable in named if variable not in sources]


@pytest.mark.parametrize(("english", "chinese"), BOTH)
def test_both_have_the_same_structure(english, chinese):
    def structure(name: str) -> list[str]:
        """Levels of headings, kinds of blocks, first cells' flags, in order."""
        return re.findall(r"^(#+|```\w+|\|)", text_of(name), re.MULTILINE)

    assert structure(english) == structure(chinese)


@pytest.mark.parametrize("name", [name for name in BILINGUAL if name.endswith("_ZH.md")])
def test_chinese_has_one_term_for_a_thing(name):
    """Base model, continued pretraining and loss; no word that no native reader would write."""
    other_words = "底座|基座(?!模型)|继续预训练|短跑|机器丢失|非数|损失|默认不用"
    assert not re.findall(other_words, text_of(name))
