"""The rules of the house, as data: who may import whom, names, launchers, and what no file may hold."""

import ast
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# Shared module: (local modules, third-party packages) it may import besides the standard library and `errors`.
SHARED = {
    "errors": (set(), set()),
    "template": (set(), set()),
    "raw_files": (set(), set()),
    "record_values": (set(), set()),
    "record_keys": ({"record_values"}, set()),
    "dialects": ({"record_keys", "record_values"}, set()),
    "records": (
        {"raw_files", "dialects", "record_keys", "record_values"},
        {"datasets", "filelock", "loguru", "pyarrow"},
    ),
    "output_files": (set(), set()),
    "data_forms": ({"raw_files", "records", "dialects", "record_keys", "record_values"}, {"orjson"}),
    "near_duplicates": (set(), {"numpy", "datasketch"}),
    "tokenization": (
        {"template", "records", "dialects", "record_keys", "record_values"},
        {"datasets", "jinja2", "numpy", "transformers"},
    ),
    "devices": (set(), {"torch"}),
    "arguments": ({"devices"}, {"torch", "transformers"}),
    "model_loading": (
        {"raw_files"},
        {"torch", "transformers", "peft", "bitsandbytes", "deepspeed", "safetensors", "huggingface_hub", "loguru"},
    ),
    "checkpoints": (set(), {"torch", "transformers", "loguru"}),
    "training_run": (
        {"checkpoints"},
        {"torch", "transformers", "accelerate", "datasets", "deepspeed", "loguru", "matplotlib", "safetensors"},
    ),
    "causal_lm_trainer": (set(), {"torch", "transformers", "trl", "loguru"}),
    "preference_trainer": (
        {"causal_lm_trainer"},
        {"torch", "transformers", "trl", "peft", "accelerate", "datasets", "numpy", "loguru"},
    ),
    "generation": (set(), {"torch", "transformers"}),
    "chat_models": (
        {"model_loading", "template", "tokenization"},
        {"torch", "transformers", "peft"},
    ),
    "text_metrics": (set(), {"rouge_score", "sacrebleu"}),
    "intervals": (set(), {"numpy"}),
    "ppo_math": (set(), {"torch"}),
    "ppo_roles": ({"model_loading", "ppo_math"}, {"torch", "transformers", "peft", "accelerate", "deepspeed"}),
    "ppo_run": (
        {"model_loading", "checkpoints"},
        {"torch", "transformers", "peft", "accelerate", "safetensors", "loguru", "matplotlib"},
    ),
}
STAGES = {"pretraining", "supervised_finetuning", "reward_modeling", "dpo_training", "ppo_training"}
TOOLS = {"merge_peft_adapter", "inference", "evaluate_model", "openai_server", "web_demo"}
FOUNDATION = {"errors", "raw_files"}  # import nothing local, so they make nothing deeper
READING = {"record_values", "record_keys", "dialects"}  # what records.py is made of, counted with it
DEEPEST_LOCAL_IMPORT = 2  # one more for the tools, which share how a trained model is made ready to be asked
FORBIDDEN_NAMES = {"utils", "helpers", "tmp", "evaluate", "common", "misc"}
LAUNCHERS = ["run_pt.sh", "run_sft.sh", "run_rm.sh", "run_dpo.sh", "run_ppo.sh"]

# Written so that this file does not hold what it forbids.
UNFINISHED = re.compile(r"\b(TO[D]O|FIX[M]E|XX[X]|HA[C]K)\b")
MACHINE_PATH = re.compile(r"(?<![\w.~$}*/-])/(?:home|root|Users|work)/\w")
EMOJI = re.compile("[\U0001f300-\U0001faff\u2600-\u27bf]")


# ---------------------------------------------------------------- what the repository holds


@cache
def tracked_files() -> list[Path]:
    """The files git tracks, and those it would add."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    listing = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if listing.returncode:
        pytest.skip("not a git checkout")
    return [path for name in listing.stdout.split("\0") if name and (path := ROOT / name).is_file()]


def readable(*suffixes: str) -> list[Path]:
    """Tracked files with one of these suffixes, data left out."""
    return [path for path in tracked_files() if path.suffix in suffixes and ROOT / "data" not in path.parents]


def python_files(*folders: str) -> list[Path]:
    return [path for folder in folders for path in sorted((ROOT / folder).glob("*.py"))]


CODE = python_files(".", "scripts")
SHELL = [*sorted(ROOT.glob("*.sh")), *sorted((ROOT / "scripts").glob("*.sh")), ROOT / ".ci/run"]


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def lines_with(pattern: re.Pattern, paths: list[Path]) -> list[str]:
    """`file:line: text` of each match."""
    return [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in paths
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
        if pattern.search(line)
    ]


def imports(path: Path) -> set[str]:
    """The top-level names of all modules a file imports, inside functions too, but not for annotations only."""
    return set(imported_names(tree(path)))


def imported_names(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
        return
    if isinstance(node, ast.Import):
        yield from (alias.name.partition(".")[0] for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        yield (node.module or ".").partition(".")[0]
    for child in ast.iter_child_nodes(node):
        yield from imported_names(child)


LOCAL = {path.stem: path for path in CODE}


# ---------------------------------------------------------------- imports


@pytest.mark.parametrize("module", [name for name in SHARED if name in LOCAL])
def test_shared_modules_import_what_the_table_allows(module):
    local, packages = SHARED[module]
    allowed = local | packages | {"errors"} - {module}
    found = imports(LOCAL[module]) - sys.stdlib_module_names
    assert found <= allowed, f"{module}.py may not import {sorted(found - allowed)}"


@pytest.mark.parametrize("module", sorted(LOCAL.keys() - SHARED.keys()))
def test_stages_and_tools_import_shared_modules_only(module):
    local = imports(LOCAL[module]) & LOCAL.keys()
    assert local <= SHARED.keys(), f"{module}.py may not import {sorted(local - SHARED.keys())}"


def test_local_imports_are_at_most_two_deep():
    def depth(module: str) -> int:
        below = imports(LOCAL[module]) & LOCAL.keys() - FOUNDATION - READING
        return 1 + max(map(depth, below)) if below else 0

    deep = {module: depth(module) for module in LOCAL if depth(module) > DEEPEST_LOCAL_IMPORT + (module in TOOLS)}
    assert not deep


def test_every_root_module_has_its_place():
    at_the_root = {path.stem for path in python_files(".")}
    assert at_the_root <= SHARED.keys() | STAGES | TOOLS


def test_root_names_shadow_no_package():
    folders = {path.name for path in ROOT.iterdir() if path.is_dir() and any(path.glob("*.py"))}
    names = {path.stem for path in CODE} | folders - {"tests", "scripts"}
    taken = sys.stdlib_module_names | packages_distributions().keys() | FORBIDDEN_NAMES
    assert not names & taken
    assert not {path.name for path in ROOT.iterdir()} & {"deepspeed", "datasets", "transformers", "trl", "peft"}


def test_every_imported_package_is_pinned():
    """A package that only another one brings in could change its version without notice."""
    files = [ROOT / f"{name}.txt" for name in ("requirements", "requirements-web", "requirements-gpu")]
    lines = [line for file in files for line in file.read_text(encoding="utf-8").splitlines()]
    pinned = {re.split(r"==", line)[0].lower().replace("-", "_") for line in lines if "==" in line}
    scripts = {path.stem for path in python_files("scripts")}
    imported = set().union(*(imports(path) for path in [*python_files("."), *python_files("scripts")]))
    packages = {name.lower() for name in imported - sys.stdlib_module_names - LOCAL.keys() - scripts}
    assert packages <= pinned, f"not in a requirements file: {sorted(packages - pinned)}"


# ---------------------------------------------------------------- Python files


@pytest.mark.parametrize("path", CODE, ids=lambda path: path.name)
def test_code(path):
    module = tree(path)
    assert ast.get_docstring(module), "a file starts with what it is for"
    for node in ast.walk(module):
        where = f"{path.name}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.ExceptHandler):
            caught = ast.unparse(node.type) if node.type else "everything"
            broad = re.search(r"\b(Exception|BaseException|everything)\b", caught)
            assert not broad, f"{where}: catches {caught}"
        if isinstance(node, ast.UnaryOp) and ast.unparse(node) == "-100":
            assert path.name == "tokenization.py", f"{where}: -100 is written in tokenization.py only"
    guarded = [node for node in module.body if isinstance(node, ast.Try) and set(imported_names(node))]
    assert not guarded, f"{path.name}:{guarded[0].lineno}: an import in a try"


@pytest.mark.parametrize("path", python_files("scripts"), ids=lambda path: path.name)
def test_scripts_find_the_root_by_the_same_line(path):
    if imports(path) & LOCAL.keys():
        line = "sys.path.insert(0, str(Path(__file__).resolve().parents[1]))"
        assert line in path.read_text(encoding="utf-8").splitlines()


@pytest.mark.parametrize("name", sorted((STAGES | TOOLS) & LOCAL.keys()))
def test_stages_and_tools_have_the_same_frame(name):
    module = tree(LOCAL[name])
    main = next(node for node in module.body if isinstance(node, ast.FunctionDef) and node.name == "main")
    assert [argument.arg for argument in main.args.args] == ["argv"]
    assert [ast.unparse(default) for default in main.args.defaults] == ["None"]
    assert ast.unparse(module.body[-1]).startswith("if __name__ == '__main__':")
    assert "os.environ" not in ast.unparse(module)


@pytest.mark.parametrize("path", CODE, ids=lambda path: path.name)
def test_a_script_imports_errors_before_the_libraries(path):
    """They import bitsandbytes, a line of which `errors` silences."""
    if "if __name__ ==" in path.read_text(encoding="utf-8"):
        at_the_top = [node for node in tree(path).body if isinstance(node, ast.Import | ast.ImportFrom)]
        order = [name for node in at_the_top for name in imported_names(node)]
        before = order[: order.index("errors")] if "errors" in order else order
        assert not {"transformers", "accelerate", "peft", "trl"} & set(before)


# ---------------------------------------------------------------- all text


def test_nothing_is_left_unfinished():
    assert not lines_with(UNFINISHED, readable(".py", ".sh", ".md", ".toml", ".txt", ".json", ""))


def test_no_path_of_some_machine():
    assert not lines_with(MACHINE_PATH, readable(".py", ".sh", ".md", ".toml", ".txt", ".json", ""))


def test_no_emoji():
    in_tests = set(python_files("tests"))  # which feed them to tokenizers
    assert not lines_with(EMOJI, [path for path in readable(".py", ".sh", ".md") if path not in in_tests])


# ---------------------------------------------------------------- shell


@pytest.mark.parametrize("path", SHELL, ids=lambda path: path.name)
def test_shell_scripts_start_the_same_way(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    assert lines[0] == "#!/usr/bin/env bash"
    assert lines[1].startswith("# "), "the header says what it does"
    code = [line for line in lines if line and not line.startswith("#")]
    assert code[0] == "set -euo pipefail"
    assert re.fullmatch(r'cd "\$\(dirname "\$0"\)(/\.\.)?"', code[1])
    assert subprocess.run(["bash", "-n", path], check=False).returncode == 0


@pytest.mark.parametrize("name", [name for name in LAUNCHERS if (ROOT / name).exists()])
def test_launchers_have_the_same_parts(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    header = text.partition("set -euo pipefail")[0]
    assert "nohup" in header
    assert "tail -f" in header
    assert "GPU" in header
    assert re.search(r"^args=\($", text, re.MULTILINE)
    assert text.count('"${args[@]}" "$@"') == 1


# ---------------------------------------------------------------- linters


@pytest.mark.parametrize("command", [["check", "--no-fix"], ["format", "--check"]], ids=" ".join)
def test_ruff(command):
    ruff = [sys.executable, "-m", "ruff", *command, "--no-cache", "."]
    result = subprocess.run(ruff, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


def test_shellcheck():
    shellcheck = Path(sys.executable).with_name("shellcheck")
    result = subprocess.run([shellcheck, *SHELL], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


# ---------------------------------------------------------------- the tests themselves


def test_network_is_blocked_and_loopback_is_not():
    with socket.socket() as client, pytest.raises(OSError, match="tests may not use the network"):
        client.connect(("192.0.2.1", 80))
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket() as client:
        client.connect(server.getsockname())
