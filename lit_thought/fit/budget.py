"""Whether a fit fits: where its streams can be kept within a budget of memory.

Where they cannot, the fit is refused before any long work, with what it needs, what there is, and what to do.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import psutil
import torch
from transformers import PreTrainedModel

from lit_thought.errors import MemoryBudgetError
from lit_thought.fit.estimate import (
    Estimate,
    Load,
    estimate_bytes,
    estimate_seconds,
    fit_operations,
    weighing_operations,
)
from lit_thought.model.blocks import Block
from lit_thought.prompts.batches import PairBatch
from lit_thought.runs.runner import Stage
from lit_thought.runs.storage import Place
from lit_thought.statistics.distributed import gather_json
from lit_thought.timing import format_bytes

__all__ = ["choose_place", "free_disk", "free_memory", "needs", "plan", "room"]

_CGROUPS = Path("/sys/fs/cgroup")
_OWN_GROUPS = Path("/proc/self/cgroup")
_SHARE = 0.8  # of what is free
_WORDS = {"device": "on the device", "main": "in main memory", "disk": "on disk"}
_PLACES: dict[str, tuple[Place, ...]] = {
    "auto": ("device", "cpu", "disk"),
    "device": ("device",),
    "cpu": ("cpu",),
    "disk": ("disk",),
}


def room(device: torch.device, memory_budget: float | None = None, processes: int = 1) -> dict[str, int]:
    """Bytes that one process may take on the device, in main memory and on disk.

    Args:
        device: where the model is; on the CPU the first two are one.
        memory_budget: in GB, instead of 0.8 of what is free in memory.
        processes: on this machine, which share main memory and disk.
    """
    own = 1 if device.type == "cuda" else processes
    free = {"device": free_memory(device) / own, "main": free_memory(torch.device("cpu")) / processes}
    if memory_budget is not None:
        free = dict.fromkeys(free, memory_budget * 1e9 / _SHARE)
    return {name: int(_SHARE * count) for name, count in {**free, "disk": free_disk() / processes}.items()}


def needs(estimate: Estimate, place: Place, device: torch.device) -> dict[str, int]:
    """Bytes that a fit takes on the device, in main memory and on disk with its streams at ``place``."""
    held, work = estimate.held_bytes, estimate.work_bytes
    if place == "disk":
        return {"device": work, "disk": held}
    if place == "device" or device.type == "cpu":
        return {"device": held + work}
    return {"device": work, "main": 2 * held if device.type == "cuda" else held}  # pinned: rounded up to a power of 2


def choose_place(
    estimate: Estimate, offload: str, device: torch.device, rooms: Mapping[str, int], at_least: bool = False
) -> Place:
    """The first place at which the streams of a fit fit.

    Args:
        estimate: what it needs.
        offload: ``"device"``, ``"cpu"``, ``"disk"``, or ``"auto"`` for the first of them.
        device: where the model is.
        rooms: what there is (:func:`room`).
        at_least: whether the estimate is a lower bound, for the message.

    Raises:
        MemoryBudgetError: when it fits nowhere.
    """
    for place in _PLACES[offload]:
        if all(count <= rooms[name] for name, count in needs(estimate, place, device).items()):
            return place
    raise MemoryBudgetError(_refusal(estimate, offload, device, rooms, at_least))


def plan(
    model: PreTrainedModel,
    blocks: Sequence[Block],
    stages: Sequence[Stage],
    batches: Sequence[PairBatch],
    *,
    offload: str,
    memory_budget: float | None,
    directions: int,
    processes: int,
    steps: int,
    missing: int,
    weighings: int,
) -> Estimate:
    """Estimate a fit and choose where its streams are kept; all processes of the fit call this together.

    Args:
        model: the model, with its ``blocks``.
        stages: what a step of the fit goes through.
        batches: this process's share of a step's pairs.
        offload, memory_budget, steps: the settings of the fit.
        directions: k of the preservation statistics, 0 without.
        processes: on this machine.
        missing: most tokens of outputs that are not in the batches yet; unless it is 0, only a lower bound of the bytes
            is known.
        weighings: how often the answers are weighed by what the chunk changes.

    Raises:
        MemoryBudgetError: on every process, when the fit does not fit on one.
    """
    device, load = model.device, Load.of(batches)
    tokens = sum(gather_json(load.compared, device))
    found = estimate_bytes(model, blocks, stages, load, tokens, directions)
    refusal, place = None, found.place
    try:
        place = choose_place(found, offload, device, room(device, memory_budget, processes), at_least=missing > 0)
    except MemoryBudgetError as error:
        refusal = str(error)
    for message in gather_json(refusal, device):
        if message is not None:
            raise MemoryBudgetError(message)
    layer = blocks[stages[-1].block].sites[stages[-1].site].layer
    rows = max(1, (load.target + load.plain) // max(1, 2 * len(batches)))  # a process may have no pairs

    def seconds(own: Load) -> dict[str, float]:
        every = tokens + own.compared - load.compared
        operations = fit_operations(model, blocks, stages, own, every, directions)
        every_step = {name: steps * count for name, count in operations.items()}
        every_step["forward"] += weighings * weighing_operations(model, blocks, own)
        return estimate_seconds(every_step, layer, device, rows, steps * len(stages))

    most = sum(seconds(load.longer(missing)).values()) if missing else 0.0
    return replace(found, place=place, seconds=seconds(load), most_seconds=most)


def _refusal(estimate: Estimate, offload: str, device: torch.device, rooms: Mapping[str, int], at_least: bool) -> str:
    where = [name for name in rooms if name != "main" or device.type != "cpu"]
    there = ", ".join(f"{format_bytes(rooms[name])} {_WORDS[name]}" for name in where)
    advice = []
    if estimate.work_bytes > rooms["device"]:
        advice += ["fewer pairs or sites with fewer inputs (sites, see lit-thought inspect)"]
    else:
        advice += ["fewer or shorter pairs", "pairs_per_step", "a smaller chunk"]
        advice += [] if offload in ("auto", "disk") else ['offload="auto" or "disk"']
    return (
        f"memory_budget, offload={offload!r}: the fit needs {'at least ' if at_least else ''}"
        f"{format_bytes(estimate.total_bytes)} besides the model: {estimate.parts()}. There are {there} for it "
        f"({_SHARE} of what is free, or memory_budget). Use {', '.join(advice)}, or state a larger memory_budget in GB."
    )


def free_memory(device: torch.device) -> int:
    """Bytes that are free on a device: a GPU's own memory, else main memory, within the limits of control groups."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + unused
    return min([int(psutil.virtual_memory().available), *_left_in_groups()])


def free_disk() -> int:
    """Bytes that are free for temporary files; none where these are kept in main memory (tmpfs)."""
    folder = tempfile.gettempdir()
    device = os.stat(folder).st_dev
    for mount in psutil.disk_partitions(all=True):
        if mount.fstype in ("tmpfs", "ramfs") and _device_of(mount.mountpoint) == device:
            return 0
    return int(psutil.disk_usage(folder).free)


def _device_of(folder: str) -> int | None:
    try:
        return os.stat(folder).st_dev
    except OSError:
        return None


def _left_in_groups() -> list[int]:
    """What this process's control groups, and those around them, leave it of main memory (Linux)."""
    try:
        lines = _OWN_GROUPS.read_text(encoding="ascii").splitlines()
    except OSError:
        return []
    left = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers in ("", "memory"):
            root = _CGROUPS / controllers
            inner = root / path.lstrip("/")
            inside = [group for group in (inner, *inner.parents) if group.is_relative_to(root)]
            left += [found for group in inside if (found := _left_in_group(group)) is not None]
    return left


def _left_in_group(group: Path) -> int | None:
    """The limit less what is in use, without the cached files that give way; None without a limit."""
    for limit, used, cached in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        try:
            most = int((group / limit).read_text(encoding="ascii"))
            stat = dict(line.split() for line in (group / "memory.stat").read_text(encoding="ascii").splitlines())
            return max(0, most - int((group / used).read_text(encoding="ascii")) + int(stat.get(cached, 0)))
        except (OSError, ValueError):  # not there, or no limit ("max")
            continue
    return None
