"""The memory of a stage's run on one GPU, moment by moment, from its own steps on weights without memory."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from medtune.estimate.fake_models import without_flash_kernels
from medtune.estimate.meter import CUDA_BLOCK, Meter, Work
from medtune.estimate.plan import RunPlan
from medtune.estimate.role_moments import TEACHER_WEIGHTS, run_roles, run_teacher
from medtune.estimate.rows import RunRows
from medtune.estimate.shapes import Shape
from medtune.estimate.trainer_moments import dtype_of, run_trainer
from medtune.models.text_attention import Layout

GIB = 2**30
# What no tensor shows. On a GPU: the context and the libraries' workspaces, and what the allocator holds in pieces that
# fit nothing, as a share of what is allocated. Not measured here: `docs/results.md` says how they were chosen.
CUDA_CONTEXT, CUDA_FRAGMENTS = 0.7 * GIB, 0.05
# On a CPU: libraries that load with the first step, and the buffers of operations; tests/compare_memory.py sets it.
CPU_CONTEXT = 55 * 2**20
# Of DeepSpeed's buffers without a size in its file, in elements (DeepSpeed 0.19).
ZERO_BUCKET = 500_000_000
# What its own estimates add for buffers to what it offloads.
HOST_BUFFERS = 1.5
# Layers of the models that are run; more where their kinds repeat after more layers.
DEPTHS = (2, 4)


@dataclass
class Memory:
    """Bytes on a GPU, or of a process on a CPU.

    parts: what stays, by part; moments: what each moment needs beside it at its peak.
    works: of each moment; served: the moments of vLLM's servers, of which the time counts alone.
    base: of all weights of the base, whatever is shared or offloaded of them.
    host: of the machine, for what DeepSpeed offloads of all GPUs.
    teacher: of a GPU that a teacher has for itself.
    fixed, fragments: bytes, and a share of what is allocated.
    layout: how rows pass through the model, of PT, SFT, RM and DPO.
    """

    parts: dict[str, float]
    moments: dict[str, float]
    works: dict[str, Work] = field(default_factory=dict)
    served: dict[str, float] = field(default_factory=dict)
    base: float = 0.0
    host: float = 0.0
    fixed: float = 0.0
    fragments: float = 0.0
    layout: Layout = Layout.PADDED
    teacher: "Memory | None" = None

    @property
    def decides(self) -> str:
        """The moment with the highest peak."""
        return max(self.moments, key=self.moments.get)

    @property
    def allocated(self) -> float:
        return sum(self.parts.values()) + max(self.moments.values())

    @property
    def total(self) -> float:
        return self.allocated * (1 + self.fragments) + self.fixed


def measure_memory(
    plan: RunPlan,
    shape: Shape,
    rows: RunRows,
    reward_shape: Shape | None = None,
    teacher_shape: Shape | None = None,
) -> Memory:
    """Run the stage's moments at two depths, and go along the line through them to the model's own.

    reward_shape: of a reward model on a base of its own.
    teacher_shape: of a teacher that is loaded here.
    """
    depths = _depths(shape)
    measured = [_measure_at(depth, plan, shape, rows, reward_shape, teacher_shape) for depth in depths]
    parts, moments, works = _along_the_line(measured, depths, shape)
    first, last, n_layers = measured[0], measured[-1], shape.config.num_hidden_layers
    parts["base weights"] += shape.n_others * dtype_of(plan, shape.config).itemsize * plan.bits / 16
    if plan.n_split > 1:
        # Each GPU has its share of the layers; what no layer takes, such as the logits, stands on one of them.
        per_layer = {
            name: (last.moments[name] - size) / max(depths[-1] - depths[0], 1) for name, size in first.moments.items()
        }
        moments = {name: size - per_layer[name] * n_layers * (1 - 1 / plan.n_split) for name, size in moments.items()}
        parts = {name: size / plan.n_split for name, size in parts.items()}
    served = {name: moments.pop(name) for name in list(moments) if plan.servers.n and name.startswith("rollout")}
    base = parts["base weights"] * plan.n_split
    memory = Memory(parts, moments, works, served, base, layout=first.layout)
    if plan.on_cpu:
        memory.fixed = CPU_CONTEXT
    else:
        memory.fixed, memory.fragments = CUDA_CONTEXT, CUDA_FRAGMENTS
        share(memory, plan)
    if teacher_shape is not None:
        _add_teacher(memory, plan, teacher_shape, rows)
    return memory


def _add_teacher(memory: Memory, plan: RunPlan, shape: Shape, rows: RunRows) -> None:
    """Beside the student, or on a GPU of its own."""
    depths, measured = _depths(shape), []
    for depth in depths:
        meter = _new_meter(plan)
        with without_flash_kernels():
            measured.append(_measured(run_teacher(plan, shape.config, rows, depth, meter), meter))
    parts, moments, works = _along_the_line(measured, depths, shape)
    parts[TEACHER_WEIGHTS] += (
        shape.n_others * dtype_of(plan, shape.config).itemsize * plan.teacher_args.teacher_bits / 16
    )
    if plan.teacher_place == "apart":
        memory.teacher = Memory(parts, moments, fixed=memory.fixed, fragments=memory.fragments)
    else:
        memory.parts |= parts
        memory.moments |= moments
    memory.works |= works


# ---------------------------------------------------------------- depths


def _depths(shape: Shape) -> tuple[int, ...]:
    """The numbers of layers that are run."""
    n_layers, period = shape.config.num_hidden_layers, shape.period
    least, more = (period * math.ceil(depth / period) for depth in (DEPTHS[0], DEPTHS[1] - DEPTHS[0]))
    depths = (shape.n_first + least, shape.n_first + least + more)
    return depths if depths[-1] < n_layers else (n_layers,)


def _measure_at(
    n_layers: int,
    plan: RunPlan,
    shape: Shape,
    rows: RunRows,
    reward_shape: Shape | None,
    teacher_shape: Shape | None,
) -> Memory:
    meter, layout = _new_meter(plan), Layout.PADDED
    with without_flash_kernels():
        if plan.is_rl:
            of_others = [other and other.config for other in (reward_shape, teacher_shape)]
            parts = run_roles(plan, shape.config, of_others[0], rows, n_layers, meter, of_others[1])
        else:
            parts, layout = run_trainer(plan, shape.config, rows, n_layers, meter)
    return _measured(parts, meter, layout)


def _new_meter(plan: RunPlan) -> Meter:
    return Meter(1 if plan.on_cpu else CUDA_BLOCK)


def _measured(parts: dict[str, float], meter: Meter, layout: Layout = Layout.PADDED) -> Memory:
    stays = sum(parts.values())
    moments = {name: moment.peak - stays for name, moment in meter.moments.items()}
    works = {name: moment.work for name, moment in meter.moments.items()}
    return Memory(parts, moments, works, layout=layout)


def _along_the_line(
    measured: Sequence[Memory], depths: Sequence[int], shape: Shape
) -> tuple[dict[str, float], dict[str, float], dict[str, Work]]:
    """Parts, moments and works at the model's own depth."""
    first, last = measured[0], measured[-1]
    step = (shape.config.num_hidden_layers - depths[0]) / max(depths[-1] - depths[0], 1)

    def at_depth(value: float, other: float) -> float:
        return value + (other - value) * step

    parts = {name: at_depth(size, last.parts[name]) for name, size in first.parts.items()}
    moments = {name: at_depth(size, last.moments[name]) for name, size in first.moments.items()}
    works = {
        name: Work(
            *(at_depth(*pair) for pair in zip(vars(work).values(), vars(last.works[name]).values(), strict=True))
        )
        for name, work in first.works.items()
    }
    return parts, moments, works


# ---------------------------------------------------------------- several GPUs


def share(memory: Memory, plan: RunPlan) -> None:
    """Add what several processes need, and divide what DeepSpeed shares among them."""
    n, stage, parts = plan.n_gpus, plan.zero_stage, memory.parts
    gradients = _gradient_bytes(memory)
    if not stage:
        if n > 1 and not plan.is_rl:
            parts["DDP's buckets"] = gradients
        return
    # A copy of the trained weights in float32 and Adam's two moments of it; the weights themselves in bfloat16.
    n_trained = gradients / 4 if plan.lora_args.use_peft else gradients / 2
    offload = plan.zero.get("offload_optimizer", {}).get("device") == "cpu"
    parts["optimizer"] = 0.0 if offload else 12 * n_trained / n
    if offload:  # and a copy of the gradients
        memory.host += HOST_BUFFERS * 16 * n_trained
    bucket = plan.zero.get("reduce_bucket_size", ZERO_BUCKET)
    if bucket == "auto":
        bucket = 0
    if stage == 2:
        n_buckets = 2 if plan.zero.get("overlap_comm") else 1
        parts["ZeRO's buckets"] = 2 * n_buckets * bucket
    if stage == 3:
        offloads_weights = plan.zero.get("offload_param", {}).get("device") == "cpu"
        parts["base weights"] = 0.0 if offloads_weights else memory.base / n
        parts["gathered layers"] = min(memory.base, 2 * 1e9)  # stage3_max_live_parameters, in bfloat16
        if offloads_weights:
            memory.host += HOST_BUFFERS * memory.base
    if stage >= 2:
        freed = gradients * (1 - 1 / n)
        memory.moments = {
            name: max(size - freed, 0.0) if "backward" in name or "step" in name else size
            for name, size in memory.moments.items()
        }


def _gradient_bytes(memory: Memory) -> float:
    """Of all trained weights."""
    if "optimizer step" in memory.moments:
        return memory.moments["optimizer step"]
    return memory.parts["optimizer"] / 2
