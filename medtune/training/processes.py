"""What the processes of a launch agree on."""

from typing import TypeVar

import torch
from transformers import TrainingArguments

Value = TypeVar("Value")


def of_main_process(value: Value, args: TrainingArguments) -> Value:
    """The value that the first process has, in every process."""
    if args.world_size == 1:
        return value
    values = [value]
    torch.distributed.broadcast_object_list(values, src=0, device=args.device)
    return values[0]


def largest_of_processes(value: int, args: TrainingArguments) -> int:
    """The largest of the values that the processes have."""
    if args.world_size == 1:
        return value
    shared = torch.tensor(value, device=args.device)
    torch.distributed.all_reduce(shared, op=torch.distributed.ReduceOp.MAX)
    return int(shared)


def mean_of_processes(value: torch.Tensor, args: TrainingArguments) -> float:
    """The mean of the values that the processes have."""
    total = value.detach().clone()
    if args.world_size > 1:
        torch.distributed.all_reduce(total)
    return total.item() / args.world_size


def wait_for_all() -> None:
    if torch.distributed.is_initialized():
        torch.distributed.barrier()


def leave_process_group() -> None:
    """Wait for the other processes and close the connections; otherwise gloo's threads may abort the exit."""
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
