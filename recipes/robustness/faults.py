"""Faults in the middle of a fit, and what they leave behind: a part of scorecard.py.

Each fault strikes a small fit that writes all that a fit can write. Afterwards the model must be bit for bit what
it was, without a hook, and each output folder must be whole or not there, with nothing hidden beside it. Faults
that end the process (SIGKILL), or last as long as it does (limits, another user), strike a forked copy of it. Where
a fit was killed, the next one must succeed, with the patch of a fit that nothing struck, and remove what the killed
one left.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import resource
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import safetensors.torch
import torch
from transformers import PreTrainedModel

from lit_thought import PairDataModule, ThoughtCallback, ThoughtModule, ThoughtPatch, files
from lit_thought.errors import ThoughtError
from lit_thought.fit import preparing, preserving
from lit_thought.fit.fitting import fit
from lit_thought.patch import adapter
from lit_thought.runs.runner import StreamRunner
from lit_thought.statistics.saved import SavedStatistics
from lit_thought.statistics.stage import StageSums
from recipes.robustness.tiny import INSTRUCTION, PAIRS, TEXTS, tiny_model, tiny_tokenizer

Target = tuple[Any, str]
"""What has a function, and the name that it has there."""
TOKENIZER = tiny_tokenizer()
_NOBODY = 65534
_HOOKS = ("setup", "on_fit_start", "on_train_epoch_start", "on_train_batch_start", "on_train_batch_end")
_STAGES: tuple[Target, ...] = (
    *((ThoughtCallback, name) for name in (*_HOOKS, "on_train_epoch_end")),
    (preparing, "generate"),
    (preserving, "preservation"),
    *((StreamRunner, name) for name in ("open", "finish")),
    (StageSums, "solve"),
    (adapter, "model_card"),
    (files, "_replace_folder"),
)
"""What is called at every stage of a fit: the callback's hooks, and the steps that take long or write."""
_WRITERS: tuple[Target, ...] = ((safetensors.torch, "serialize_file"), (Path, "write_text"))


@dataclass(frozen=True)
class Outcome:
    """What a fault left behind.

    Args:
        fault: its class.
        where: the place that it struck.
        end: the exception, or how the process ended; None where the fit went on to its end.
        unchanged: whether the model was bit for bit what it was, without a hook; None where its process is gone.
        partial: names of what is not whole, or hidden, among the outputs.
        again: of a killed fit, whether the next one has the patch of one that nothing struck, and nothing hidden is
            left; None elsewhere.
    """

    fault: str
    where: str
    end: str | None
    unchanged: bool | None
    partial: list[str]
    again: bool | None = None

    @property
    def fine(self) -> bool:
        return self.end is not None and self.unchanged is not False and self.again is not False and not self.partial


def snapshot(model: PreTrainedModel) -> dict[str, Any]:
    """Everything of a model that a fit must leave alone."""
    modules = dict(model.named_modules())
    hooks = {(name, kind): len(found) for name, module in modules.items() for kind, found in _hooks(module)}
    return {
        "bits": {name: hashlib.sha256(_raw(value)).hexdigest() for name, value in model.state_dict().items()},
        "hooks": hooks,
        "attributes": {name: sorted(vars(module)) for name, module in modules.items()},
        "training": {name: module.training for name, module in modules.items()},
        "gradients": {name: value.requires_grad for name, value in model.named_parameters()},
    }


def _hooks(module: torch.nn.Module) -> Iterator[tuple[str, Any]]:
    return ((kind, found) for kind, found in vars(module).items() if kind.endswith("_hooks"))


def _raw(value: torch.Tensor) -> bytes:
    return value.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def run_fit(model: PreTrainedModel, folder: Path, resume: bool = False, overwrite: bool = False) -> ThoughtPatch:
    """A fit that generates, preserves and writes an adapter, and statistics or, to ``resume``, its finished stages."""
    kept = {"resume_dir": folder / "unfinished"} if resume else {"statistics_dir": folder / "sums"}
    callback = ThoughtCallback(
        rank=2,
        preserve=TEXTS,
        cache_dir=folder / "cache",
        output_dir=folder / "adapter",
        overwrite=overwrite,
        **kept,  # type: ignore[arg-type]
    )
    data = PairDataModule(PAIRS, INSTRUCTION, max_new_tokens=3, batch_size=2)
    return fit(ThoughtModule(model, TOKENIZER), data, callback, progress=False)


def partial(folder: Path) -> list[str]:
    """What is hidden among the outputs of :func:`run_fit`, and the folders that are there but not whole."""
    found = [str(path.relative_to(folder)) for path in folder.rglob("*") if path.name.startswith(".")]
    readers: dict[str, Callable[[Path], object]] = {
        "adapter": ThoughtPatch.load,
        "sums": lambda path: list(SavedStatistics.load(path).stages()),
    }
    for name, read in readers.items():
        if (folder / name).exists():
            try:
                read(folder / name)
            except ThoughtError:
                found.append(name)
    return sorted(found)


@contextlib.contextmanager
def striking(target: Target, number: int, strike: Callable[..., object], after: bool = False) -> Iterator[list[int]]:
    """Call ``strike`` with the arguments of the ``number``-th call of a function, before it or ``after`` it.

    Yields:
        A list with an entry for each call of the function.
    """
    genuine = getattr(*target)
    calls: list[int] = []

    def patched(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        due = len(calls) == number
        if due and not after:
            strike(*args)
        result = genuine(*args, **kwargs)
        if due and after:
            strike(*args)
        return result

    with mock.patch.object(*target, patched):
        yield calls


def points(targets: Sequence[Target], most: int, resume: bool = False) -> list[tuple[Target, int]]:
    """The first calls that a fit makes of each function, ``most`` at most, as (function, number)."""
    with contextlib.ExitStack() as stack:
        calls = {target: stack.enter_context(striking(target, 0, lambda *_: None)) for target in targets}
        run_fit(tiny_model(), Path(stack.enter_context(tempfile.TemporaryDirectory())), resume)
    return [(target, number) for target, own in calls.items() for number in range(1, min(most, len(own)) + 1)]


def _name(target: Target, number: int) -> str:
    return f"{target[1]}, call {number}"


def _struck(
    fault: str,
    where: str,
    inject: contextlib.AbstractContextManager[Any],
    spoil: Callable[[PreTrainedModel], object] | None = None,
) -> Outcome:
    """The outcome of a fault in this process; ``spoil`` changes the model beforehand."""
    model = tiny_model()
    if spoil is not None:
        spoil(model)
    before = snapshot(model)
    end = None
    with tempfile.TemporaryDirectory() as root:
        try:
            with inject:
                run_fit(model, Path(root))
        except (Exception, KeyboardInterrupt) as error:
            end = type(error).__name__
        return Outcome(fault, where, end, snapshot(model) == before, partial(Path(root)))


# --- the faults ------------------------------------------------------------------------------------------------------


def disk_full(most: int = 20) -> Iterator[Outcome]:
    """No room at the first write of a file, the second, and so on, half of it written."""
    for target, number in points(_WRITERS, most):
        yield _struck("disk full", _name(target, number), striking(target, number, _no_room))


def _no_room(*args: Any) -> None:
    """Write half a file to the path among the arguments, and fail as a full disk does."""
    _half(*args)
    raise OSError(errno.ENOSPC, "No space left on device")


def _half(*args: Any) -> None:
    next(Path(arg) for arg in args if isinstance(arg, (str, os.PathLike))).write_bytes(b"half a file")


def size_limit(sizes: tuple[int, ...] = (0, 500, 3_000, 8_000)) -> Iterator[Outcome]:
    """The system itself refuses to write more than so many bytes to a file (RLIMIT_FSIZE)."""
    for size in sizes:

        def limit(size: int = size) -> None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

        yield _struck_in_a_fork("file size limit", f"{size} bytes", limit)


def permission_denied(most: int = 3) -> Iterator[Outcome]:
    """The folder of the outputs belongs to somebody else; folders and files cannot be made or renamed."""

    def become_nobody() -> None:
        if os.geteuid() == 0:
            os.setresuid(_NOBODY, _NOBODY, _NOBODY)

    yield _struck_in_a_fork("permission denied", "a folder of another user", become_nobody, mode=0o555)
    for target, number in points([(os, "rename"), (os, "replace"), (Path, "mkdir"), (Path, "rename")], most):
        yield _struck("permission denied", _name(target, number), striking(target, number, _forbid))


def _forbid(*_: Any) -> None:
    raise PermissionError(errno.EACCES, "Permission denied")


def control_c(most: int = 2) -> Iterator[Outcome]:
    """Ctrl-C at every stage."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored by what a shell put in the background
    try:
        for target, number in points((*_STAGES, (ThoughtCallback, "teardown")), most):
            yield _struck("Ctrl-C", _name(target, number), striking(target, number, _press_control_c))
    finally:
        signal.signal(signal.SIGINT, before)


def _press_control_c(*_: Any) -> None:
    signal.raise_signal(signal.SIGINT)


def not_finite() -> Iterator[Outcome]:
    """NaN and infinite weights in the embeddings and in every layer of the last block."""
    layers = [f"self_attn.{name}_proj" for name in "qvo"] + [f"mlp.{name}_proj" for name in ("gate", "up", "down")]
    for name in ("embed_tokens", *layers, "input_layernorm", "post_attention_layernorm"):
        path = name if name == "embed_tokens" else f"layers.1.{name}"
        for value in (float("nan"), float("inf")):

            def spoil(model: PreTrainedModel, path: str = path, value: float = value) -> None:
                with torch.no_grad():
                    model.model.get_submodule(path).weight[..., 1] = value

            yield _struck("weights not finite", f"{path}, {value}", contextlib.nullcontext(), spoil)


def failing_forward() -> Iterator[Outcome]:
    """The forward pass of a block raises: at its first call, and at later ones."""
    for block in (0, 1):
        for number in (1, 2, 4, 8):
            yield _struck("forward raises", f"block {block}, call {number}", _failing_block(block, number))


@contextlib.contextmanager
def _failing_block(block: int, number: int) -> Iterator[None]:
    kind = type(tiny_model().model.layers[block])
    genuine, calls = kind.forward, []

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.self_attn.layer_idx == block:
            calls.append(1)
            if len(calls) == number:
                raise RuntimeError("the forward pass of this model raises")
        return genuine(self, *args, **kwargs)

    with mock.patch.object(kind, "forward", forward):
        yield


def killed(most: int = 2, every: int = 1) -> Iterator[Outcome]:
    """SIGKILL at every stage, and in the middle of every file; of fits with statistics, and of fits to be resumed.

    Args:
        most: calls of each stage.
        every: strike at every so many of the places.
    """
    with tempfile.TemporaryDirectory() as root:
        run_fit(tiny_model(), Path(root))
        wanted = _changes(Path(root))
    for resume in (False, True):
        places = [(*point, False) for point in points(_STAGES, most, resume)]
        places += [(*point, True) for point in points([(files, "_replace_folder")], 3, resume)]
        places += [(*point, False) for point in points(_WRITERS, 6 * most, resume)]
        for target, number, after in places[::every]:
            yield _killed_at(target, number, after, resume, wanted)


def _killed_at(target: Target, number: int, after: bool, resume: bool, wanted: dict[str, torch.Tensor]) -> Outcome:
    def kill(*args: Any) -> None:
        if target in _WRITERS:
            _half(*args)
        os.kill(os.getpid(), signal.SIGKILL)

    where = f"{_name(target, number)}{', after it' if after else ''}{', to be resumed' if resume else ''}"
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root)

        def run() -> None:
            with striking(target, number, kill, after):
                run_fit(tiny_model(), folder, resume)

        status = _fork(run)
        # what has a hidden name is for the next fit to remove; what has its own must be whole
        found = [name for name in partial(folder) if not any(part.startswith(".") for part in Path(name).parts)]
        end = "killed" if status == -signal.SIGKILL else None
        try:
            run_fit(tiny_model(), folder, resume, overwrite=True)
            again = _near(_changes(folder), wanted) and not partial(folder) and not (folder / "unfinished").exists()
        except ThoughtError:
            again = False
        return Outcome("SIGKILL", where, end, None, found, again)


def _changes(folder: Path) -> dict[str, torch.Tensor]:
    factors = ThoughtPatch.load(folder / "adapter").factors
    return {path: change.delta(torch.float64) for path, change in factors.items()}


def _near(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> bool:
    """Whether nothing but rounding is between two patches."""
    return found.keys() == wanted.keys() and all(
        bool((found[path] - change).norm() <= 1e-3 * change.norm()) for path, change in wanted.items()
    )


def _struck_in_a_fork(fault: str, where: str, prepare: Callable[[], None], mode: int = 0o777) -> Outcome:
    """The outcome of a fault that lasts as long as its process."""
    failed, went_on, changed = 10, 11, 12

    def run() -> None:
        model = tiny_model()
        before = snapshot(model)
        prepare()
        end = went_on
        try:
            run_fit(model, folder)
        except Exception:
            end = failed
        os._exit(end if snapshot(model) == before else changed)

    with tempfile.TemporaryDirectory() as root:
        folder = Path(root) / "outputs"
        folder.mkdir()
        folder.chmod(mode)
        Path(root).chmod(0o755)
        status = _fork(run)
        folder.chmod(0o755)
        end = {failed: "an exception", changed: "an exception", went_on: None}.get(status, f"status {status}")
        return Outcome(fault, where, end, status in (failed, went_on), partial(folder))


def _fork(run: Callable[[], None]) -> int:
    """The exit status of a copy of this process that runs it; minus the signal that ended it."""
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        try:
            run()
        except BaseException:
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


FAULTS: dict[str, Callable[[], Iterator[Outcome]]] = {
    "disk full": disk_full,
    "file size limit": size_limit,
    "permission denied": permission_denied,
    "Ctrl-C": control_c,
    "weights not finite": not_finite,
    "forward raises": failing_forward,
    "SIGKILL": killed,
}
