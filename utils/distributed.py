"""Data-parallel training over ``torchrun``: one process per device, equal weights everywhere.

Gradients are averaged by one flat all-reduce instead of wrapping the network in ``DistributedDataParallel``: with less
than a million parameters there is nothing to overlap, and so frozen stages, training-only adapters of the distiller and
loss terms that skip a module need no special case.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

TIMEOUT = timedelta(minutes=60)  # a rank may wait this long while another decodes or writes


@dataclass
class World:
    """The processes of a run; with ``size`` 1 every method is a no-op."""

    device: torch.device
    rank: int = 0
    size: int = 1
    control: Any = None  # gloo group for flags and Python objects, which must not stall the GPU queue

    @property
    def main(self) -> bool:
        """Whether this process writes files and talks."""
        return self.rank == 0

    def max(self, value: int) -> int:
        """The largest ``value`` of all processes."""
        if self.size == 1:
            return value
        flag = torch.tensor(value)
        dist.all_reduce(flag, dist.ReduceOp.MAX, group=self.control)
        return int(flag)

    def gather(self, value: Any) -> list:
        """``value`` of every process, by rank, on every process."""
        if self.size == 1:
            return [value]
        values = [None] * self.size
        dist.all_gather_object(values, value, group=self.control)
        return values

    @torch.no_grad()
    def average(self, tensors: Iterable[Tensor]) -> None:
        """Replace float tensors by their mean over the processes, in place."""
        tensors = list(tensors)
        if self.size == 1 or not tensors:
            return
        flat = torch.cat([t.reshape(-1) for t in tensors])
        dist.all_reduce(flat)
        flat /= self.size
        for tensor, part in zip(tensors, flat.split([t.numel() for t in tensors])):
            tensor.copy_(part.view(tensor.shape))

    def average_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Average ``.grad``; where a process has none it counts as zero."""
        if self.size == 1:
            return
        parameters = [p for p in parameters if p.requires_grad]
        for p in parameters:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        self.average(p.grad for p in parameters)

    def average_buffers(self, model: nn.Module) -> None:
        """Average BatchNorm statistics, so that every process holds the model that is saved."""
        if self.size > 1:
            self.average(b for b in model.buffers() if b.is_floating_point())

    def same_start(self, *modules: nn.Module) -> None:
        """Give every process the parameters and buffers of rank 0."""
        if self.size > 1:
            for module in modules:
                for tensor in [*module.parameters(), *module.buffers()]:
                    dist.broadcast(tensor.detach(), 0)

    def close(self) -> None:
        """Leave the process group."""
        if self.size > 1 and dist.is_initialized():
            dist.destroy_process_group()


def own_gpu(device: str) -> str:
    """``cuda`` or ``cuda:N`` with the number of this process's own GPU, if ``torchrun`` started it; else as it was."""
    rank = os.environ.get("LOCAL_RANK")
    several = int(os.environ.get("WORLD_SIZE", 1)) > 1
    return f"cuda:{rank or 0}" if several and device.startswith("cuda") else device


def start_world(device: torch.device) -> World:
    """Join the run that ``torchrun`` started, or make a world of one process.

    Args:
        device: where to compute; of several GPUs each process takes its own (``LOCAL_RANK``).
    """
    size = int(os.environ.get("WORLD_SIZE", 1))
    if device.type == "cuda":  # with its number: a tensor's device has one, and cuda != cuda:0
        device = torch.device(own_gpu(f"cuda:{device.index or 0}"))
        torch.cuda.set_device(device)  # events and pinned memory belong to the current device
    if size == 1:
        return World(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=TIMEOUT)
    control = dist.new_group(backend="gloo", timeout=TIMEOUT)
    return World(device, dist.get_rank(), size, control)
