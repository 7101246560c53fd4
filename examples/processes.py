"""The processes that torchrun started, which share each batch, or this one alone."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from training import fail


def _checkpoints() -> tuple[Any, Any]:
    """torch's functions on the state of a model that may be cut into parts, and how to call them.

    The state is that of one process, whatever model and optimizer are cut into. Imported late: it
    takes its time, and a torch without torch.distributed has none.
    """
    from torch.distributed.checkpoint import state_dict

    return state_dict, state_dict.StateDictOptions(full_state_dict=True, cpu_offload=True)


class Processes:
    """As a context, in which only the first process prints.

    Args:
        device: with "cuda" each process has one of the machine's GPUs, and they talk by NCCL; with
            "cpu" by gloo.
        sharded: the model's parameters are cut among the processes (FSDP); else each has them all
            (DistributedDataParallel).
    """

    def __init__(self, device: str = "cpu", sharded: bool = False) -> None:
        self.rank, self.size = (
            int(os.environ.get(n, d)) for n, d in (("RANK", 0), ("WORLD_SIZE", 1))
        )
        self.started = "RANK" in os.environ  # by torchrun
        if device == "cuda" and not torch.cuda.is_available():
            fail("--device cuda: torch sees no GPU")
        if sharded and not self.started:
            fail("--fsdp: start it with torchrun, as many processes as there are to be parts")
        version = tuple(map(int, torch.__version__.split(".")[:2]))
        if sharded and device == "cpu" and version < (2, 7):
            fail(f"--fsdp on a CPU: expected torch 2.7 or newer, got {torch.__version__}")
        self.device = torch.device(
            device, int(os.environ.get("LOCAL_RANK", 0)) if device == "cuda" else None
        )
        gpus = torch.cuda.device_count()
        if self.device.type == "cuda" and self.device.index >= gpus:
            fail(f"expected a GPU for each process, got {gpus} for {self.device.index + 1} or more")
        self.sharded = sharded

    def __enter__(self) -> Processes:
        self.stdout = sys.stdout
        if self.started:
            if self.device.type == "cuda":
                torch.cuda.set_device(self.device)
            dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo")
            if self.rank:
                sys.stdout = open(os.devnull, "w")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if sys.stdout is not self.stdout:
            sys.stdout.close()
            sys.stdout = self.stdout
        if self.started:
            dist.destroy_process_group()

    def generators(self) -> list[tuple[Callable[[], Tensor], Callable[[Tensor], None]]]:
        """How to get and to set the state of each random generator that a training draws from."""
        found = [(torch.get_rng_state, torch.set_rng_state)]
        if self.device.type == "cuda":
            get, put = torch.cuda.get_rng_state, torch.cuda.set_rng_state
            found.append((lambda: get(self.device), lambda state: put(state, self.device)))
        return found

    def share(self, batch: Tensor, dim: int) -> Tensor:
        """This process's part of a batch."""
        return batch.chunk(self.size, dim)[self.rank].contiguous()

    def whole(self, part: Tensor, dim: int) -> Tensor:
        """The parts of all, on the CPU."""
        if self.size == 1:
            return part.cpu()
        part = part.to(self.device).contiguous()
        parts = [torch.empty_like(part) for _ in range(self.size)]
        dist.all_gather(parts, part)
        return torch.cat(parts, dim).cpu()

    def mean(self, value: Tensor) -> float:
        """Of the processes' values, which have equal parts of the batch."""
        value = value.detach().clone()
        if self.size > 1:
            dist.all_reduce(value)
        return value.item() / self.size

    def any(self, flag: bool) -> bool:
        """Whether it is true in one process: all go the same way."""
        if self.size == 1:
            return flag
        count = torch.tensor(float(flag), device=self.device)
        dist.all_reduce(count)
        return count.item() > 0

    def parallel(self, model: nn.Module) -> nn.Module:
        """The model as one that reduces its gradients over all processes."""
        model.to(self.device)
        if not self.started:
            return model
        if self.sharded:
            from torch.distributed.device_mesh import init_device_mesh
            from torch.distributed.fsdp import fully_shard

            # Without it FSDP would take the machine's GPUs whatever the device.
            mesh = init_device_mesh(self.device.type, (self.size,))
            for child in model.children():
                if any(True for _ in child.parameters()):
                    fully_shard(child, mesh=mesh)
            return fully_shard(model, mesh=mesh)
        ids = [self.device.index] if self.device.type == "cuda" else None
        return nn.parallel.DistributedDataParallel(model, device_ids=ids)

    def state(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """Of both, with the names of the model that is not parallel; whole in the first process."""
        checkpoints, whole = _checkpoints()
        weights, moments = checkpoints.get_state_dict(model, optimizer, options=whole)
        return {"model": weights, "optimizer": moments}

    def load(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]
    ) -> None:
        checkpoints, whole = _checkpoints()
        parts = {"model_state_dict": state["model"], "optim_state_dict": state["optimizer"]}
        checkpoints.set_state_dict(model, optimizer, **parts, options=whole)
