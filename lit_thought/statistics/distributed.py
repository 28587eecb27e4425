"""Sums over processes: each holds the statistics of its share of the tokens, one of them solves.

Plain ``torch.distributed`` calls, for any backend. In a single process they do nothing.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from lit_thought.errors import ThoughtError
from lit_thought.solve.gram import packed, unpacked
from lit_thought.solve.sums import Statistics, VectorStatistics

__all__ = [
    "gather_json",
    "more_threads",
    "rank_and_size",
    "reduce_statistics",
    "reduce_vector",
    "share",
    "share_json",
    "share_tensors",
]

Item = TypeVar("Item")


def rank_and_size() -> tuple[int, int]:
    """This process's rank, and how many there are; 0 and 1 outside a process group."""
    if not (dist.is_available() and dist.is_initialized()):
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


@contextmanager
def more_threads(times: int) -> Iterator[None]:
    """Let PyTorch use this many times the threads it has, no more than there are cores, while other processes wait."""
    before = torch.get_num_threads()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    torch.set_num_threads(max(before, min(times * before, cores)))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def share(items: Sequence[Item]) -> Sequence[Item]:
    """The items of this process: every N-th one, so that each belongs to exactly one process."""
    rank, size = rank_and_size()
    return items[rank::size]


def reduce_statistics(stats: Statistics, owner: int, device: torch.device) -> Statistics:
    """The sum of all processes' statistics, on ``owner``; elsewhere what was passed, its sums no longer of use.

    Rows stay rows where all of them together are few, so that the owner can solve in the n × n dual.

    Args:
        stats: this process's sums, of the same layer everywhere; may be empty.
        owner: rank that will solve.
        device: where the process group's tensors live.
    """
    rank, size = rank_and_size()
    if size == 1:
        return stats
    rows = stats.rows()
    own = torch.tensor(
        [
            stats.weight,
            stats.tokens,
            stats.num_rows,
            stats.folded,
            float(stats.energy),
            rows is not None and rows[0].element_size(),
        ],
        dtype=torch.float64,
        device=device,
    )
    every = [torch.empty_like(own) for _ in range(size)]
    dist.all_gather(every, own)
    heads = torch.stack(every).cpu()
    weight, tokens, energy = float(heads[:, 0].sum()), int(heads[:, 1].sum()), heads[:, 4].sum()
    counts = [int(n) for n in heads[:, 2]]
    if not bool(heads[:, 3].any()) and sum(counts) < stats.d_in:
        dtype = torch.float32 if float(heads[:, 5].max()) == 4 else torch.float64
        empty = (torch.zeros(0, d) for d in (stats.d_in, stats.d_out))
        a, delta = (_gathered(x.to(device, dtype), counts, owner) for x in rows or empty)
        return Statistics.from_rows((a, delta), weight, tokens) if rank == owner else stats
    gram, cross = stats.sums()
    total = torch.cat([packed(gram), cross.flatten()]).to(device)
    dist.reduce(total, owner)
    if rank != owner:
        return stats
    upper, cross = total[: -cross.numel()], total[-cross.numel() :].view_as(cross)
    return Statistics.from_sums(unpacked(upper, stats.d_in), cross, energy.to(device), weight, tokens)


def _gathered(rows: Tensor, counts: Sequence[int], owner: int) -> Tensor:
    """Every process's rows, on ``owner``; elsewhere its own."""
    padded = rows.new_zeros(max(counts), rows.shape[1])
    padded[: len(rows)] = rows
    found = [torch.empty_like(padded) for _ in counts] if dist.get_rank() == owner else None
    dist.gather(padded, found, dst=owner)
    return rows if found is None else torch.cat([x[:n] for x, n in zip(found, counts, strict=True)])


def reduce_vector(stats: VectorStatistics, owner: int, device: torch.device) -> None:
    """Sum Σ w δ, energy, weight and tokens over all processes; only ``owner`` has them afterwards."""
    if rank_and_size()[1] == 1:
        return
    head = torch.tensor([stats.weight, stats.tokens, float(stats.energy)], dtype=torch.float64, device=device)
    total = stats.total.to(device).contiguous()
    for value in (head, total):
        dist.reduce(value, owner)
    stats.weight, stats.tokens, stats.total = float(head[0]), int(head[1]), total
    stats.energy = head[2].to(total)


def share_json(value: Any, owner: int, device: torch.device) -> Any:
    """``owner``'s JSON value, on every process; a ThoughtError that ``owner`` passes instead is raised everywhere."""
    rank, size = rank_and_size()
    if size > 1:
        failure = [type(value).__name__, str(value)] if isinstance(value, ThoughtError) else None
        text = json.dumps([failure, None if failure else value]).encode() if rank == owner else b""
        length = torch.tensor([len(text)], device=device)
        dist.broadcast(length, owner)
        data = torch.zeros(int(length), dtype=torch.uint8, device=device)
        if rank == owner:
            data.copy_(torch.frombuffer(bytearray(text), dtype=torch.uint8))
        dist.broadcast(data, owner)
        failure, value = json.loads(bytes(data.cpu().tolist()))
        if failure is not None:
            raise _error(*failure)
    if isinstance(value, ThoughtError):
        raise value
    return value


def _error(name: str, message: str) -> ThoughtError:
    from lit_thought import errors

    return getattr(errors, name, ThoughtError)(message)


def share_tensors(values: Sequence[Tensor] | None, owner: int, device: torch.device) -> list[Tensor]:
    """``owner``'s tensors, on every process."""
    rank, size = rank_and_size()
    if size == 1:
        assert values is not None
        return list(values)
    mine = [x.to(device).contiguous() for x in values or ()]
    kinds = share_json([[list(x.shape), str(x.dtype).removeprefix("torch.")] for x in mine], owner, device)
    if rank != owner:
        mine = [torch.empty(shape, dtype=getattr(torch, dtype), device=device) for shape, dtype in kinds]
    for tensor in mine:
        dist.broadcast(tensor, owner)
    return mine


def gather_json(value: Any, device: torch.device) -> list[Any]:
    """Every process's JSON value, by rank, on every process."""
    return [share_json(value, owner, device) for owner in range(rank_and_size()[1])]
