"""The processes that torchrun started, which share each batch; or a single process."""

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
    """The torch functions for the state of a possibly sharded model, and their options.

    The state has the layout of a single process, however model and optimizer are sharded. The
    import is slow, and fails in a torch without torch.distributed, so it is deferred.
    """
    from torch.distributed.checkpoint import state_dict

    return state_dict, state_dict.StateDictOptions(full_state_dict=True, cpu_offload=True)


class Processes:
    """A context in which only the first process prints.

    Args:
        device: with "cuda" each process uses one GPU of the machine, and they communicate by NCCL;
            with "cpu" by gloo.
        sharded: the parameters are distributed over the processes (FSDP); otherwise each process
            has all of them (DistributedDataParallel).
    """

    def __init__(self, device: str = "cpu", sharded: bool = False) -> None:
        self.rank, self.size = (
            int(os.environ.get(n, d)) for n, d in (("RANK", 0), ("WORLD_SIZE", 1))
        )
        self.started = "RANK" in os.environ  # by torchrun
        if device == "cuda" and not torch.cuda.is_available():
            fail("--device cuda: torch finds no GPU")
        if sharded and not self.started:
            fail("--fsdp: start it with torchrun, with one process per shard")
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
        """Functions that get and set the state of each random generator of a training."""
        functions = [(torch.get_rng_state, torch.set_rng_state)]
        if self.device.type == "cuda":
            get, put = torch.cuda.get_rng_state, torch.cuda.set_rng_state
            functions.append((lambda: get(self.device), lambda state: put(state, self.device)))
        return functions

    def share(self, batch: Tensor, dim: int) -> Tensor:
        """The part of a batch that belongs to this process."""
        return batch.chunk(self.size, dim)[self.rank].contiguous()

    def whole(self, part: Tensor, dim: int) -> Tensor:
        """The parts of all processes, concatenated on the CPU."""
        if self.size == 1:
            return part.cpu()
        part = part.to(self.device).contiguous()
        parts = [torch.empty_like(part) for _ in range(self.size)]
        dist.all_gather(parts, part)
        return torch.cat(parts, dim).cpu()

    def mean(self, value: Tensor) -> float:
        """The mean of a value over the processes, which have equal parts of the batch."""
        value = value.detach().clone()
        if self.size > 1:
            dist.all_reduce(value)
        return value.item() / self.size

    def any(self, flag: bool) -> bool:
        """Whether the flag is true in any process, so that all processes do the same."""
        if self.size == 1:
            return flag
        count = torch.tensor(float(flag), device=self.device)
        dist.all_reduce(count)
        return count.item() > 0

    def parallel(self, model: nn.Module) -> nn.Module:
        """The model, reducing its gradients over all processes."""
        model.to(self.device)
        if not self.started:
            return model
        if self.sharded:
            from torch.distributed.device_mesh import init_device_mesh
            from torch.distributed.fsdp import fully_shard

            # Without a mesh FSDP would use the GPUs of the machine for every device.
            mesh = init_device_mesh(self.device.type, (self.size,))
            for child in model.children():
                if any(True for _ in child.parameters()):
                    fully_shard(child, mesh=mesh)
            return fully_shard(model, mesh=mesh)
        ids = [self.device.index] if self.device.type == "cuda" else None
        return nn.parallel.DistributedDataParallel(model, device_ids=ids)

    def state(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """The state of both with the names of the plain model; complete in the first process."""
        checkpoints, whole = _checkpoints()
        weights, moments = checkpoints.get_state_dict(model, optimizer, options=whole)
        return {"model": weights, "optimizer": moments}

    def load(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]
    ) -> None:
        checkpoints, whole = _checkpoints()
        parts = {"model_state_dict": state["model"], "optim_state_dict": state["optimizer"]}
        checkpoints.set_state_dict(model, optimizer, **parts, options=whole)
