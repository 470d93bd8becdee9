"""One process or many: all that the trainings say to one another across processes.

    python train.py                                   # one process
    torchrun --nproc_per_node=2 train.py              # two, on this machine

torchrun starts a script several times and gives each process a *rank*. Every process holds the
whole model and works on its part of every batch; rank 0 writes files and draws progress bars. NCCL
carries what lies on GPUs, and gloo the rest. Without torchrun there is one process, rank 0, and the
functions here give back what they are given.
"""

import hashlib
import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


def connect(device: torch.device) -> torch.device:
    """Connect this process with the others that torchrun has started, if it has -> its device."""
    if "RANK" not in os.environ or dist.is_initialized():
        return device
    if device.type == "cuda":  # one GPU for each process of a machine
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=timedelta(hours=2))  # data may be prepared meanwhile
    return device


def rank() -> int:
    """The number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def part(n: int) -> slice:
    """The part of n things that is for this process. All parts together are all things, and none
    is larger than another if n is a multiple of the number of processes."""
    return slice(n * rank() // world_size(), n * (rank() + 1) // world_size())


def wait() -> None:
    """Go on when all processes have come here."""
    if dist.is_initialized():
        dist.barrier()


def sum_(*tensors: Tensor) -> None:
    """Tensors become their sums over all processes, in place and with the same bits in each."""
    if dist.is_initialized():
        for t in tensors:
            dist.all_reduce(t)


def from_first_(*tensors: Tensor) -> None:
    """Tensors become those of rank 0, in place."""
    if dist.is_initialized():
        for t in tensors:
            dist.broadcast(t, 0)


def highest(number: int) -> int:
    """The highest of the numbers of all processes."""
    if dist.is_initialized():
        every = torch.tensor(int(number))
        dist.all_reduce(every, dist.ReduceOp.MAX)
        number = int(every)
    return number


def gather(thing: Any) -> list:
    """A thing of every process, by rank. Tensors in it should lie on the CPU."""
    things = [thing] * world_size()
    if dist.is_initialized():
        dist.all_gather_object(things, thing)
    return things


def mean(sums: dict, n: int) -> dict:
    """Sums over n things of this process -> the means over the things of all processes."""
    if not dist.is_initialized():
        return {name: v / n for name, v in sums.items()}
    every = gather(({name: float(v) for name, v in sums.items()}, n))
    total = sum(n for _, n in every)
    return {name: sum(s.get(name, 0.0) for s, _ in every) / total for name in every[-1][0]}


def data_parallel(model: nn.Module, method: str = "forward") -> Callable:
    """A method of a model. With several processes, the gradients of what it returns become the
    means over all processes; so if each has its part of a batch, they are those of the batch."""
    if not dist.is_initialized():
        return getattr(model, method)
    from_first_(*model.state_dict().values())
    return DistributedDataParallel(_Method(model, method))


class _Method(nn.Module):
    """A module whose forward is a method of a model. It shows the parameters that are trained and
    hides the rest, which would be sent round in every step: codebooks stay the same without."""

    def __init__(self, model: nn.Module, method: str):
        super().__init__()
        self.trained = nn.ParameterList(p for p in model.parameters() if p.requires_grad)
        self.call = getattr(model, method)

    def forward(self, *args, **options):
        return self.call(*args, **options)


def same_everywhere(model: nn.Module) -> bool:
    """Whether a model has the same bits in all processes."""
    if not dist.is_initialized():
        return True
    bits = [t.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
            for t in model.state_dict().values()]
    return len(set(gather(hashlib.sha256(b"".join(bits)).hexdigest()))) == 1
