"""How much faster is generation together? Clients of the server at once and in turn, two versions side by side, and
rollouts by vLLM and by training itself.

    python scripts/build_tiny_model.py --output_dir models/tiny-qwen2
    python tests/compare_generation.py make ../smol             # SmolLM2-135M's shape, random weights, that tokenizer
    python tests/compare_generation.py clients models/tiny-qwen2
    git worktree add ../before HEAD~1
    python tests/compare_generation.py versions models/tiny-qwen2 ../before .
    VLLM_PYTHON=PATH/bin/python python tests/compare_generation.py vllm models/tiny-qwen2

Every figure is of one run, the two sides in turn, three rounds of it; the times of a round and their ratio are printed,
and of CPU time too, which tells more where other programs run.
With random weights no reply ends by itself. In `versions` a share of the vocabulary ends replies, so that drawn ones
have lengths of mean 1 / share; in `clients` each request has a limit of its own.
"""

import argparse
import json
import os
import random
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ROUNDS = 3
N_CLIENTS = 32
ENVIRONMENT = {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
# What a version runs in its own folder: seconds and tokens of 64 evaluation replies or of 32 rollouts.
PROGRAM = """
import json, sys, time, torch
sys.path.insert(0, ".")
from transformers import AutoModelForCausalLM, AutoTokenizer
kind, folder, mean_length = sys.argv[1], sys.argv[2], int(sys.argv[3])
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
tokenizer = AutoTokenizer.from_pretrained(folder)
torch.manual_seed(0)
n_tokens = len(tokenizer)
stop_ids = torch.randperm(n_tokens)[: model.config.vocab_size // mean_length].tolist()
lengths = torch.randint(20, 120, (64,)).tolist()
prompts = [torch.randint(5, n_tokens, (length,)).tolist() for length in lengths]
wall, cpu = time.perf_counter(), time.process_time()
if kind == "evaluation":
    from medtune.models.generation import Decoding, generate_replies
    decoding = Decoding(max_new_tokens=4 * mean_length, temperature=1.0)
    n_generated = sum(r.n_tokens for r in generate_replies(model, tokenizer, prompts, stop_ids, decoding, 16))
else:
    from peft import LoraConfig, get_peft_model
    from medtune.rl.rollout import Sampling, sample_replies
    from medtune.rl.roles import Roles
    roles = Roles(get_peft_model(model, LoraConfig(r=8, target_modules="all-linear")), None, None)
    sampling = Sampling(1.0, 4 * mean_length, 16, stop_ids, tokenizer.pad_token_id, 0)
    n_generated = 0
    for start in (0, 16):
        replies = sample_replies(roles, prompts[start : start + 16], range(start, start + 16), sampling)
        n_generated += int(replies.mask.sum())
print(json.dumps([time.perf_counter() - wall, time.process_time() - cpu, n_generated]))
"""

# ---------------------------------------------------------------- a server's clients


def start_server(model: Path) -> tuple[subprocess.Popen, int]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    flags = ["--base_model", model, "--served_model_name", "m", "--port", str(port), "--torch_dtype", "float32"]
    command = [sys.executable, ROOT / "openai_server.py", *flags]
    server = subprocess.Popen(command, env=os.environ | ENVIRONMENT, cwd=ROOT, stderr=subprocess.DEVNULL)
    while server.poll() is None:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health").close()
            return server, port
        except OSError:
            time.sleep(0.2)
    sys.exit(f"the server ended with {server.returncode}")


def ask(port: int, body: dict) -> str:
    headers = {"Content-Type": "application/json"}
    data = json.dumps(body).encode()
    request = urllib.request.Request(f"http://127.0.0.1:{port}/v1/chat/completions", data, headers)
    with urllib.request.urlopen(request) as answer:
        return json.load(answer)["choices"][0]["message"]["content"]


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    return sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK")


def compare_clients(model: Path, most_tokens: int) -> None:
    """Half of the requests are greedy, half drawn; each gets the same reply in turn and at once."""
    rng = random.Random(0)
    bodies = [
        {
            "messages": [{"role": "user", "content": f"第{n}个病人：{'头痛' * rng.randint(1, 20)}怎么办？"}],
            "max_tokens": rng.randint(most_tokens // 6, most_tokens),
            "temperature": n % 2,
            "seed": n,
        }
        for n in range(N_CLIENTS)
    ]
    server, port = start_server(model)
    try:
        ask(port, bodies[0])  # warms up
        for _ in range(ROUNDS):
            times = [(time.perf_counter(), cpu_seconds(server.pid))]
            in_turn = [ask(port, body) for body in bodies]
            times.append((time.perf_counter(), cpu_seconds(server.pid)))
            with ThreadPoolExecutor(N_CLIENTS) as clients:
                at_once = list(clients.map(lambda body: ask(port, body), bodies))
            times.append((time.perf_counter(), cpu_seconds(server.pid)))
            same = sum(a == b for a, b in zip(in_turn, at_once, strict=True))
            print(f"{N_CLIENTS} clients, {same} replies the same", end="")
            for kind, (begin, middle, end) in zip(("wall", "CPU"), zip(*times, strict=True), strict=True):
                print(f"; {kind} in turn {middle - begin:.1f} s, at once {end - middle:.1f} s, ", end="")
                print(f"ratio {(end - middle) / (middle - begin):.3f}", end="")
            print(flush=True)
    finally:
        server.terminate()
        server.wait(60)


# ---------------------------------------------------------------- two versions


def compare_versions(model: Path, trees: list[Path], mean_length: int) -> None:
    for kind in ("evaluation", "rollouts"):
        for _ in range(ROUNDS):
            costs = []
            for tree in trees:
                words = [sys.executable, "-c", PROGRAM, kind, model.resolve(), str(mean_length)]
                done = subprocess.run(words, cwd=tree, env=os.environ | ENVIRONMENT, stdout=subprocess.PIPE, check=True)
                wall, cpu, n_tokens = json.loads(done.stdout)
                costs.append((wall / n_tokens, cpu / n_tokens))
                print(f"{kind}, {tree}: {n_tokens} tokens, wall {wall:.1f} s, CPU {cpu:.1f} s", flush=True)
            wall, cpu = (after / before for before, after in zip(*costs, strict=True))
            print(f"{kind}: time a token, {trees[1]} against {trees[0]}: wall {wall:.3f}, CPU {cpu:.3f}", flush=True)


def make_model(folder: Path) -> None:
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9}
    shape |= {"num_key_value_heads": 3, "max_position_embeddings": 8192, "vocab_size": 49152}
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "models/tiny-qwen2")
    special = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    LlamaForCausalLM(LlamaConfig(**shape, **special, tie_word_embeddings=True)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


# ---------------------------------------------------------------- rollouts by vLLM


def cpu_seconds_of_group(leader: int) -> float:
    """Of a process and all that it started."""
    stats = [path.read_text(encoding="utf-8").rpartition(")")[2].split() for path in Path("/proc").glob("[0-9]*/stat")]
    return sum(sum(map(int, stat[11:13])) for stat in stats if int(stat[2]) == leader) / os.sysconf("SC_CLK_TCK")


def compare_vllm(model: Path, n_prompts: int, mean_length: int) -> None:
    """Both draw from the same policy in float32, with a thread each where there are two cores, as vLLM leaves one free;
    the adapter's way into the server is part of vLLM's time."""
    sys.path.insert(0, str(ROOT))
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments

    from medtune.arguments import LoraArguments
    from medtune.rl.arguments import RolloutArguments
    from medtune.rl.roles import Roles
    from medtune.rl.rollout import Sampling, collect_replies
    from medtune.rl.vllm_launch import CPU_FLAGS, end_servers, read_server_flags, server_command, start_server, wait_for
    from medtune.rl.vllm_servers import connect_servers
    from medtune.training.interruption import SignalListener

    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    url, longest = f"http://127.0.0.1:{port}", 4 * mean_length
    flags = f"--sft_model_path {model} --torch_dtype float32 --max_source_length 128 --response_length {longest}"
    command = server_command(os.environ["VLLM_PYTHON"], port, "0.3", read_server_flags(flags.split()))
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder, "vllm.log")
        server = start_server([*command, *CPU_FLAGS], None, log)
        try:
            wait_for(server, url, log)
            torch.manual_seed(0)
            torch.set_num_threads(max(os.cpu_count() - 1, 1))
            base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
            roles = Roles(get_peft_model(base, LoraConfig(r=8, target_modules="all-linear")).eval(), None, None)
            n_tokens = len(AutoTokenizer.from_pretrained(model))
            stop_ids = torch.randperm(n_tokens)[: base.config.vocab_size // mean_length].tolist()
            lengths = torch.randint(20, 120, (n_prompts,)).tolist()
            rows = [{"prompt_ids": torch.randint(5, n_tokens, (length,)).tolist()} for length in lengths]
            args = RolloutArguments(max_source_length=128, response_length=longest, vllm_url=url)
            training_args = TrainingArguments(output_dir=folder, use_cpu=True)
            servers = connect_servers(args, str(model), vars(LoraArguments(lora_rank=8)), stop_ids, training_args)
            stop, speeds = SignalListener(training_args), {}
            for round_ in range(ROUNDS + 1):  # the first one warms up
                for name, writes in (("ours", None), ("vLLM", servers)):
                    sampling = Sampling(1.0, longest, n_prompts, stop_ids, 0, seed=round_, servers=writes)
                    before = time.perf_counter(), time.process_time() + cpu_seconds_of_group(server.pid)
                    replies = collect_replies(roles, rows, range(n_prompts), sampling, stop)
                    after = time.perf_counter(), time.process_time() + cpu_seconds_of_group(server.pid)
                    wall, cpu = (end - begin for begin, end in zip(before, after, strict=True))
                    n_written = int(replies.mask.sum())
                    speeds[name] = n_written / wall, n_written / cpu
                    if round_ > 0:
                        print(f"{name}: {n_written} tokens, wall {wall:.1f} s, CPU {cpu:.1f} s", flush=True)
                if round_ > 0:
                    wall, cpu = (vllm / own for own, vllm in zip(speeds["ours"], speeds["vLLM"], strict=True))
                    print(f"tokens a second, vLLM against ours: wall {wall:.3f}, CPU {cpu:.3f}", flush=True)
        finally:
            end_servers([server])


# ---------------------------------------------------------------- main


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    make = commands.add_parser("make", help="a model of SmolLM2-135M's shape with random weights")
    make.add_argument("folder", type=Path)
    clients = commands.add_parser("clients", help=f"{N_CLIENTS} clients of the server in turn and at once")
    clients.add_argument("model", type=Path)
    clients.add_argument("--most_tokens", type=int, default=96, help="a reply has between a sixth of them and all")
    versions = commands.add_parser("versions", help="evaluation's replies and PPO's rollouts in two checkouts")
    versions.add_argument("model", type=Path)
    versions.add_argument("trees", type=Path, nargs=2)
    versions.add_argument("--mean_length", type=int, default=64, help="tokens of a reply; it is cut at four times them")
    vllm = commands.add_parser("vllm", help="rollouts by vLLM of the environment of VLLM_PYTHON, and by training")
    vllm.add_argument("model", type=Path)
    vllm.add_argument("--prompts", type=int, default=64, help="of a rollout")
    vllm.add_argument("--mean_length", type=int, default=64, help="tokens of a reply; it is cut at four times them")
    args = parser.parse_args()
    if args.command == "make":
        make_model(args.folder)
    elif args.command == "clients":
        compare_clients(args.model, args.most_tokens)
    elif args.command == "vllm":
        compare_vllm(args.model, args.prompts, args.mean_length)
    else:
        compare_versions(args.model, args.trees, args.mean_length)


if __name__ == "__main__":
    main()
