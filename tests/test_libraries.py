"""What a start imports, and that nothing of how it does so is left behind."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ["pretraining", "supervised_finetuning", "reward_modeling", "dpo_training", "ppo_training", "grpo_training"]
SCRIPTS += ["distillation_training", "inference", "merge_peft_adapter", "openai_server"]

# Each takes from a tenth of a second to seconds, and no script needs it to know its flags.
UNUSED = ["scipy.optimize", "torch._inductor.compile_fx", "torch._functorch.aot_autograd", "trl", "deepspeed"]
UNUSED += ["torch.utils.tensorboard", "matplotlib", "datasketch", "rouge_score", "sacrebleu", "sklearn"]

HELP = f"""
import sys
from importlib import import_module
for name in {SCRIPTS}:
    try:
        import_module(name).main(["--help"])
    except SystemExit:
        print(name, [module for module in {UNUSED} if module in sys.modules], file=sys.stderr)
"""

AFTERWARDS = """
import gc, os
import medtune.libraries
import scipy.optimize
import torch
compiled = []
torch.compile(lambda x: x + 1, backend=lambda graph, _: compiled.append(graph) or graph)(torch.ones(1))
print(len(compiled), gc.isenabled(), os.environ.get("TORCHDYNAMO_DISABLE"))
"""


def python(code: str, **variables: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **variables}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True)


def test_help_imports_nothing_that_it_does_not_need():
    assert python(HELP).stderr.splitlines() == [f"{name} []" for name in SCRIPTS]


def test_what_is_hidden_while_the_libraries_are_imported_is_there_afterwards():
    assert python(AFTERWARDS, TORCHDYNAMO_DISABLE="0").stdout.split() == ["1", "True", "0"]
