"""The processes of one training run: one alone, or those that torchrun started, one a GPU (NCCL) or on CPUs (gloo)."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn


@dataclass(frozen=True)
class Group:
    """One process among its `world`; alone, all of these are trivial."""

    rank: int
    world: int
    device: torch.device

    @property
    def first(self) -> bool:
        """Whether this is the process that writes and prints."""
        return self.rank == 0

    def share(self, batch: Tensor) -> Tensor:
        """The process's part of a batch that all of them know: contiguous, and of one size for all."""
        size = len(batch) // self.world
        return batch[self.rank * size : (self.rank + 1) * size]

    def sum(self, values: Tensor) -> Tensor:
        """The sum over all processes, element by element."""
        if self.world > 1:
            values = values.to(self.device, copy=True)
            dist.all_reduce(values)
        return values

    def any(self, flags: Tensor) -> list[bool]:
        """For each flag, whether any process has raised it."""
        return [bool(flag) for flag in self.sum(flags.int()) > 0]

    def wait(self) -> None:
        """Until every process is here."""
        self.any(torch.tensor([False]))

    def statistics(self, network: nn.Module) -> Tensor:
        """Batch norm's running statistics of all processes: (world, n)."""
        mine = torch.cat([buffer.flatten() for buffer in network.buffers() if buffer.is_floating_point()])
        everyone = torch.zeros(self.world, len(mine), device=mine.device)
        everyone[self.rank] = mine
        return self.sum(everyone)  # to add zeros changes nothing

    def set_statistics(self, network: nn.Module, everyone: Tensor) -> None:
        """Give this process its row of what `statistics` returned."""
        start = 0
        for buffer in network.buffers():
            if buffer.is_floating_point():
                buffer.copy_(everyone[self.rank, start : start + buffer.numel()].view_as(buffer))
                start += buffer.numel()

    def average_statistics(self, network: nn.Module) -> None:
        """Make batch norm's running statistics the mean of all processes': each saw its part of the batches."""
        if self.world > 1:
            for buffer in network.buffers():
                if buffer.is_floating_point():
                    dist.all_reduce(buffer)
                    buffer /= self.world


@contextmanager
def join() -> Iterator[Group]:
    """Its place in the group that torchrun's variables describe, or alone. May be nested."""
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
    if world == 1 or dist.is_initialized():
        yield Group(rank, world, device)
        return
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield Group(rank, world, device)
    finally:
        dist.destroy_process_group()
