"""One process or many: all that the processes of a training say to one another.

    torchrun --nproc_per_node=2 train.py      # two processes on this machine

torchrun starts a script several times and gives each process a *rank*. Every process holds the
whole model and works on its part of every batch; rank 0 writes files and draws bars. NCCL carries
what lies on GPUs, gloo the rest. Without torchrun there is one process, rank 0, and the functions
here give back what they are given.
"""

import os
from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


def connect(device: torch.device) -> torch.device:
    """Connect this process with the others that torchrun has started, if it has -> its device."""
    if "RANK" in os.environ and not dist.is_initialized():
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))  # each has its own
            torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(hours=2))  # rank 0 may prepare data
    return device


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def part(n: int) -> slice:
    """The part of n things that is for this process; of equal size in all, if n allows it."""
    return slice(n * rank() // world_size(), n * (rank() + 1) // world_size())


def gather(thing) -> list:
    """A thing of every process, by rank. Tensors in it lie on the CPU."""
    things = [thing] * world_size()
    if dist.is_initialized():
        dist.all_gather_object(things, thing)
    return things


def wait() -> None:
    """Go on when all processes have come here."""
    if dist.is_initialized():
        dist.barrier()


def sum_(*tensors: Tensor, op=dist.ReduceOp.SUM) -> None:
    """Tensors become their sums over all processes, in place and with the same bits in each."""
    for t in tensors if dist.is_initialized() else ():
        dist.all_reduce(t, op)


def from_first_(*tensors: Tensor) -> None:
    """Tensors become those of rank 0, in place."""
    for t in tensors if dist.is_initialized() else ():
        dist.broadcast(t, 0)


def highest(number: int) -> int:
    """The highest of the numbers of all processes."""
    every = torch.tensor(int(number))
    sum_(every, op=dist.ReduceOp.MAX)
    return int(every)


def mean(sums: dict, n: int) -> dict:
    """Sums over n things of this process -> the means over the things of all processes."""
    if world_size() == 1:
        return {name: float(v) / n for name, v in sums.items()}
    every = gather(({name: float(v) for name, v in sums.items()}, n))
    total = sum(n for _, n in every)
    return {name: sum(s.get(name, 0.0) for s, _ in every) / total for name in every[-1][0]}


def same_everywhere(model: nn.Module) -> bool:
    """Whether a model is the same in all processes."""
    differ = False
    for t in model.state_dict().values():
        first = t.clone()
        from_first_(first)
        differ = differ or not torch.equal(first, t)
    return not highest(differ)


def contact_lost(error: RuntimeError) -> bool:
    """Whether an error means that another process has ended."""
    return dist.is_initialized() and (isinstance(error, dist.DistError) or "gloo" in str(error))


class Method(nn.Module):
    """A method of a model as a module. It shows the parameters that are trained, and hides the
    rest, which would be sent round in every step: codebooks stay the same without."""

    def __init__(self, model: nn.Module, method: str):
        super().__init__()
        self.trained = nn.ParameterList(p for p in model.parameters() if p.requires_grad)
        self.call = getattr(model, method)

    def forward(self, *args, **options):
        return self.call(*args, **options)


def data_parallel(model: nn.Module, method: str = "forward", some_unused: bool = False
                  ) -> Callable:
    """A method of a model, such that gradients of what it returns become means over all processes:
    if each has its part of a batch, they are those of the batch. some_unused: whether there may be
    steps that do not reach all parameters."""
    if not dist.is_initialized():
        return getattr(model, method)
    from_first_(*model.state_dict().values())
    return DistributedDataParallel(Method(model, method), find_unused_parameters=some_unused)
