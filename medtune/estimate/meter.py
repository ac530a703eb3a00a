"""Counts the bytes of all tensors that are alive, and the operations, while code runs on tensors without memory.

The weights of a model are fake tensors of torch: they have shapes and types and no values. Whatever is computed of them
is fake too, while ids and masks are real, so that code which asks for a mask's positions runs as it is.
"""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import astuple, dataclass, field, replace

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

# CUDA's allocator gives whole blocks of so many bytes.
CUDA_BLOCK = 512
# Of one attention product of [B, heads, queries, keys], in units of 2 x B x heads x queries x keys x head size: two
# matrices in the forward pass, five in the backward pass, which computes the first one again.
ATTENTION_PRODUCTS = {"forward": 2, "backward": 5}
# The products of all experts at once, which torch 2.13's counter does not know.
GROUPED = torch.ops.aten._grouped_mm.default


@dataclass
class Work:
    """Floating point operations of matrix products and of attention, and the number of operations started."""

    products: float = 0.0
    attention: float = 0.0
    n_operations: float = 0.0

    def __sub__(self, other: "Work") -> "Work":
        return Work(*(mine - its for mine, its in zip(astuple(self), astuple(other), strict=True)))


@dataclass
class Moment:
    """Bytes alive before it and at its peak, and its work."""

    before: float
    peak: float
    work: Work = field(default_factory=Work)


class Meter(TorchDispatchMode):
    """While it is entered, every storage that an operation makes is counted until it is freed.

    block: bytes that a storage takes a multiple of.
    """

    def __init__(self, block: int = CUDA_BLOCK):
        super().__init__()
        self.block = block
        self.live, self.peak = 0, 0
        self.moments: dict[str, Moment] = {}
        self._sizes: dict[int, int] = {}
        self._work = Work()

    @contextmanager
    def moment(self, name: str) -> Iterator[None]:
        """Measure what runs in the block; of a moment that comes again the higher peak is kept, and the last work."""
        before, self.peak, self._work = self.live, self.live, Work()
        with self:
            yield
        earlier = self.moments.get(name)
        peak = self.peak if earlier is None else max(self.peak, earlier.peak)
        self.moments[name] = Moment(before, peak, self._work)

    def work(self) -> Work:
        """Of the moment so far."""
        return replace(self._work)

    def count(self, *tensors: torch.Tensor) -> int:
        """Count tensors that were made before; the bytes that this adds."""
        live = self.live
        for tensor in tensors:
            self._note(tensor)
        return self.live - live

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.namespace == "prim":
            return func(*args, **kwargs)  # which asks a tensor for its device
        if func is torch.ops.aten.index.Tensor:
            # How many are True is known of a real mask, and not of what torch would make of it beside fake states.
            args = (args[0], _without_masks(args[1]))
        result = _grouped_product(func, args, kwargs) if func is GROUPED else func(*args, **kwargs)
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._note(tensor)
        self._note_work(func, args, kwargs, result)
        return result

    def _note(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata in self._sizes:
            return
        size = -(-storage.nbytes() // self.block) * self.block
        self._sizes[storage._cdata] = size
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._forget, storage._cdata)

    def _forget(self, key: int) -> None:
        self.live -= self._sizes.pop(key)

    def _note_work(self, func, args: tuple, kwargs: dict, result: object) -> None:
        packet = func._overloadpacket
        name = packet.__name__
        if func.is_view:
            return  # starts nothing on a GPU
        self._work.n_operations += 1
        if "scaled_dot_product" in name:
            # The backward pass has the output's gradient before the query.
            is_backward = "backward" in name
            query, key = args[1:3] if is_backward else args[:2]
            *batch, n_queries, size = query.shape
            kind = "backward" if is_backward else "forward"
            pairs = torch.Size([*batch, n_queries, key.shape[-2], size]).numel()
            self._work.attention += 2 * ATTENTION_PRODUCTS[kind] * pairs
        elif func is GROUPED:  # rows of experts [rows, inputs], or of their gradient [outputs, rows]
            self._work.products += 2 * args[0].numel() * args[1].shape[-1]
        elif packet in flop_registry:
            self._work.products += flop_registry[packet](*args, **kwargs, out_val=result)


def _grouped_product(func, args: tuple, kwargs: dict) -> torch.Tensor:
    """torch 2.13 knows its shape in bfloat16 alone; CUDA has it in float32 too."""
    left, right, *others = args
    return func(left.bfloat16(), right.bfloat16(), *others, **kwargs).to(left.dtype)


def _without_masks(indices: list[torch.Tensor | None]) -> list[torch.Tensor | None]:
    """Indices of a tensor, with the positions of each mask in its place."""
    positions = []
    for index in indices:
        is_mask = index is not None and index.dtype == torch.bool
        positions += index.nonzero(as_tuple=True) if is_mask else [index]
    return positions
