"""The rules of the house, as data: who may import whom, names, launchers, and what no file may hold."""

import ast
import re
import socket
import subprocess
import sys
from functools import cache
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# Of each room: the rooms it may import besides itself and medtune/'s own files, and the packages. template.py, which
# users edit, is texts alone: imported where one is looked up by its name, and importing no more than it says here.
ROOMS = {
    "template": ({"medtune.reading"}, set()),
    "medtune": (set(), {"torch", "transformers", "huggingface_hub", "loguru"}),
    "medtune.reading": (
        {"template"},
        {"datasets", "datasketch", "filelock", "jinja2", "loguru", "numpy", "orjson", "pyarrow", "transformers"},
    ),
    "medtune.models": (
        {"template", "medtune.reading"},
        {"torch", "transformers", "peft", "bitsandbytes", "deepspeed", "safetensors", "huggingface_hub", "loguru"},
    ),
    "medtune.export": (
        {"medtune.reading", "medtune.models"},
        {"torch", "transformers", "gguf", "xllamacpp", "safetensors", "loguru"},
    ),
    "medtune.training": (
        {"medtune.reading", "medtune.models"},
        {
            *("torch", "transformers", "peft", "accelerate", "datasets", "deepspeed", "safetensors"),
            *("loguru", "matplotlib", "numpy"),
        },
    ),
    "medtune.rl": (
        {"medtune.reading", "medtune.models", "medtune.training", "medtune.measuring"},
        {"torch", "transformers", "peft", "accelerate", "datasets", "deepspeed", "safetensors", "loguru", "matplotlib"},
    ),
    "medtune.estimate": (
        {"medtune.reading", "medtune.models", "medtune.training", "medtune.rl"},
        {"torch", "transformers", "peft", "datasets", "numpy"},
    ),
    "medtune.measuring": ({"medtune.reading"}, {"numpy", "openai", "rouge_score", "sacrebleu"}),
    "medtune.machine": (set(), {"torch", "bitsandbytes"}),
    "medtune.sample_data": ({"medtune.reading"}, set()),
}
STAGES = {"pretraining", "supervised_finetuning", "reward_modeling", "dpo_training", "ppo_training", "grpo_training"}
STAGES |= {"distillation_training"}
TOOLS = {"merge_peft_adapter", "inference", "openai_server", "web_demo"}
FORBIDDEN_NAMES = {"utils", "helpers", "tmp", "evaluate", "common", "misc"}
LAUNCHERS = ["run_pt.sh", "run_sft.sh", "run_rm.sh", "run_dpo.sh", "run_ppo.sh", "run_grpo.sh", "run_distill.sh"]

# Names that two rooms have, and files that are still too long.
DEFINED_TWICE = {"RENAMED", "IGNORED_LABEL"}

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


MEDTUNE = sorted((ROOT / "medtune").rglob("*.py"))
CODE = [*python_files(".", "scripts"), *(path for path in MEDTUNE if path.name != "__init__.py")]
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
    """The modules a file imports, inside functions and for annotations too."""
    modules = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            below = {f"{node.module}.{alias.name}" for alias in node.names}
            modules |= (below & MODULES.keys()) or {node.module or "."}
    return modules


def names_of(node: ast.Import | ast.ImportFrom) -> set[str]:
    """The modules that a statement imports."""
    return {alias.name for alias in node.names} if isinstance(node, ast.Import) else {node.module or "."}


def packages(path: Path) -> set[str]:
    """The third-party packages a file imports."""
    names = {name.partition(".")[0] for name in imports(path)}
    return names - sys.stdlib_module_names - {"medtune"} - {path.stem for path in python_files(".", "scripts")}


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def room_of(module: str) -> str:
    return module.rpartition(".")[0] or module


MODULES = {module_name(path): path for path in CODE if path.parent != ROOT / "scripts"}


# ---------------------------------------------------------------- imports


@pytest.mark.parametrize("module", [name for name in MODULES if name.startswith(("medtune.", "template"))])
def test_a_room_imports_what_lies_before_it(module):
    rooms, allowed_packages = ROOMS[room_of(module)]
    allowed_rooms = rooms | {"medtune", room_of(module)}
    local = {name for name in imports(MODULES[module]) if name in MODULES}
    assert {room_of(name) for name in local} <= allowed_rooms, local
    assert packages(MODULES[module]) <= allowed_packages


def test_no_module_imports_itself_by_way_of_others():
    def check(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, path
        if module not in sound:
            for name in imports(MODULES[module]) & MODULES.keys():
                check(name, (*path, module))
            sound.add(module)

    sound: set[str] = set()
    for module in MODULES:
        check(module, ())


@pytest.mark.parametrize("path", python_files(".", "scripts"), ids=lambda path: path.name)
def test_no_script_imports_a_script(path):
    at_the_root = {path.stem for path in python_files(".", "scripts")} - {"template"}
    assert not imports(path) & at_the_root


def test_every_root_module_has_its_place():
    assert {path.stem for path in python_files(".")} <= STAGES | TOOLS | {"template"}


def test_root_names_shadow_no_package():
    folders = {path.name for path in ROOT.iterdir() if path.is_dir() and any(path.glob("*.py"))}
    names = {path.stem for path in python_files(".", "scripts")} | folders - {"tests", "scripts"}
    taken = sys.stdlib_module_names | packages_distributions().keys() | FORBIDDEN_NAMES
    assert not names & taken
    assert not {path.name for path in ROOT.iterdir()} & {"deepspeed", "datasets", "transformers", "trl", "peft"}


def test_every_imported_package_is_pinned():
    """A package that only another one brings in could change its version without notice."""
    files = [
        ROOT / f"{name}.txt" for name in ("requirements", *(f"requirements/{name}" for name in ("web", "gpu", "gguf")))
    ]
    lines = [line for file in files for line in file.read_text(encoding="utf-8").splitlines()]
    pinned = {re.split(r"==", line)[0].lower().replace("-", "_") for line in lines if "==" in line}
    imported = {name.lower() for path in CODE for name in packages(path)}
    assert imported <= pinned, f"not in a requirements file: {sorted(imported - pinned)}"


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
        if isinstance(node, ast.Try):
            guarded = [child for child in node.body if isinstance(child, ast.Import | ast.ImportFrom)]
            assert not guarded, f"{where}: an import in a try"


def test_a_file_of_more_than_500_lines_says_why():
    """By a sentence of its docstring with the words "over 500 lines"."""
    files = {path for path in CODE if path.parent != ROOT}
    long = {path.name for path in files if len(path.read_text(encoding="utf-8").splitlines()) > 500}
    assert long == {path.name for path in files if "over 500 lines" in " ".join(ast.get_docstring(tree(path)).split())}


def test_a_public_name_of_medtune_is_defined_once():
    """`main` is what a file does that is run with `python -m`."""
    places: dict[str, list[str]] = {}
    for path in MEDTUNE:
        for node in tree(path).body:
            names = [ast.unparse(target) for target in getattr(node, "targets", [])]
            names += [node.name] if isinstance(node, ast.FunctionDef | ast.ClassDef) else []
            for name in names:
                places.setdefault(name, []).append(path.name)
    twice = {name for name, files in places.items() if len(files) > 1 and not name.startswith("_")}
    assert twice <= DEFINED_TWICE | {"main"}, {name: places[name] for name in twice}


@pytest.mark.parametrize("path", python_files("scripts"), ids=lambda path: path.name)
def test_scripts_find_the_root_by_the_same_line(path):
    if imports(path) & MODULES.keys():
        line = "sys.path.insert(0, str(Path(__file__).resolve().parents[1]))"
        assert line in path.read_text(encoding="utf-8").splitlines()


@pytest.mark.parametrize("name", sorted((STAGES | TOOLS) & MODULES.keys()))
def test_stages_and_tools_have_the_same_frame(name):
    module = tree(MODULES[name])
    main = next(node for node in module.body if isinstance(node, ast.FunctionDef) and node.name == "main")
    assert [argument.arg for argument in main.args.args] == ["argv"]
    assert [ast.unparse(default) for default in main.args.defaults] == ["None"]
    assert ast.unparse(module.body[-1]).startswith("if __name__ == '__main__':")
    assert "os.environ" not in ast.unparse(module)


@pytest.mark.parametrize("path", CODE, ids=lambda path: path.name)
def test_a_script_imports_the_libraries_by_libraries_py(path):
    """Which takes half of the time, and silences a line of theirs."""
    if "if __name__ ==" in path.read_text(encoding="utf-8"):
        nodes = [node for node in tree(path).body if isinstance(node, ast.Import | ast.ImportFrom)]
        order = [name for node in nodes for name in names_of(node)]
        before = order[: order.index("medtune.libraries")] if "medtune.libraries" in order else order
        packages = {"torch", "transformers", "accelerate", "peft", "trl", "datasets"}
        assert not packages & {name.partition(".")[0] for name in before}


@pytest.mark.parametrize("path", CODE, ids=lambda path: path.name)
def test_trl_is_imported_where_it_is_used_alone(path):
    """It takes seconds."""
    atop = {
        name for node in tree(path).body if isinstance(node, ast.Import | ast.ImportFrom) for name in names_of(node)
    }
    assert "trl" not in {name.partition(".")[0] for name in atop}


# ---------------------------------------------------------------- all text


def test_nothing_is_left_unfinished():
    assert not lines_with(UNFINISHED, readable(".py", ".sh", ".md", ".toml", ".txt", ".json", ""))


def test_no_path_of_some_machine():
    assert not lines_with(MACHINE_PATH, readable(".py", ".sh", ".md", ".toml", ".txt", ".json", ""))


def test_no_emoji():
    in_tests = set((ROOT / "tests").rglob("*.py"))  # which feed them to tokenizers
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
