"""The settings of a fit, in one place: names, types, defaults, help and checks. Imports neither torch nor Lightning.

``transmute(…)``, ``ThoughtCallback(…)`` and ``PairDataModule(…)`` take them by name, ``lit-thought fit`` as flags, a
patch's provenance keeps those that it depends on, and ``"auto"`` chooses some: all of that derives from
:class:`FitSettings`, where a new setting is a field and a line of the docstring.
"""

from __future__ import annotations

import functools
import inspect
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, TypeVar, get_args, get_type_hints

from lit_thought.errors import ThoughtError, check_counts, did_you_mean, is_finite

__all__ = [
    "DEFAULT_SITES",
    "DIRECTIONS",
    "KINDS",
    "LONG_SITES",
    "ORDERS",
    "PARTS",
    "SITES",
    "TEMPLATES",
    "FitSettings",
    "Kind",
    "TextSource",
    "check_blocks",
    "check_parts",
    "check_rank",
    "check_sites",
    "check_solve_settings",
    "directions_for",
    "outputs_for",
    "register_paths",
    "takes_settings",
    "text_place",
]

SITES = ("attn_out", "mlp_in", "mlp_out")
"""The sites in the order in which a block's forward pass reaches them."""

DEFAULT_SITES = ("attn_out", "mlp_out")
"""What is patched, where a block has it, when sites are left out."""

DIRECTIONS = 120
"""k, how many directions of each site's inputs the preservation statistics keep one by one."""

Kind = Literal["demonstrations", "system", "document"]
KINDS: tuple[Kind, ...] = get_args(Kind)
RANK, LONG_RANK = 16, 128
"""The rank where it is left out, and that for a long instruction, which is more to know: a document, or a system prompt
with rules and facts (:func:`lit_thought.inputs.kinds.is_long`)."""

LONG_DIRECTIONS = 1024
"""k for a long instruction, whose patch is larger than others and moves more."""

OUTPUT_TOKENS, LONG_OUTPUT_TOKENS = 32, 64
"""The longest output where max_new_tokens is left out, and that for a long instruction. What an instruction changes
shows early in an answer: with the later tokens in the sums a fit takes longer and is no nearer."""

LONG_SITES = ("mlp_out",)
"""What is patched for a long instruction where sites are left out: attention's output has d inputs, which unrelated
text takes up all of, the MLP's has d_ff."""

RIDGE, PRESERVE_WEIGHT, LARGER_PRESERVE_WEIGHT = 0.03, 3.0, 8.0
"""λ₀ and ρ₀, what λ and ρ are for :data:`FEW_ANSWERS` tokens of answers or fewer, where they are left out; and ρ₀ for a
text template, whose prompts are told apart from all else, and for a long instruction, which moves unrelated text more:
a larger ρ takes little of either."""

FEW_ANSWERS = 120
"""Tokens of thirty short answers."""

ANSWER_WEIGHT = 30.0
"""The answer weight where it is left out: nothing is read off the other tokens, which need only not go astray."""

LEAST_RIDGE = 0.001
"""The smallest λ that is chosen where it is left out."""

PARTS = ("matrix", "vector")
ORDERS = ("sequential", "teacher-forced")
OFFLOAD = ("auto", "device", "cpu", "disk")

TEMPLATES = ("chat", "chat-empty", "chat-user")
"""The names that stand for prompt templates."""

TextSource = str | os.PathLike[str] | Sequence[str]
_Function = TypeVar("_Function", bound=Callable[..., Any])


_DATA = {"data": True}
"""The data module takes it, not the callback."""
_AUTO = {"auto": True}
"""It can be ``"auto"``: chosen on pairs that are held back."""
_PASSING = {"passing": True}
"""The patch does not depend on it, or not on it alone; a patch's provenance does not keep it."""


@dataclass(frozen=True, kw_only=True)
class FitSettings:
    """What a fit can be told, besides the model, the instruction, the pairs and the template.

    Args:
        inputs: how many pairs to fit, of which the model writes those that are not given (:mod:`lit_thought.inputs`);
            "auto" for as many as help on inputs that are held back; left out, those that are given, and where none are
            the usual number.
        kind: what the instruction is, for inputs that the model writes: demonstrations (the next inputs of the list),
            system (what users write, and of a long one what it is there for, questions about it, and its facts) or
            document (questions about it, and the text itself); documents, and system prompts of 200 tokens or more
            (long instructions), have a rank and sites of their own, where these are left out; left out, what its form
            says, for inputs that the model writes.
        sites: where to patch each block: attn_out, mlp_in (the paper's), mlp_out or several of them. A block that
            lacks one goes without (mlp_out in a mixture of experts); left out, attn_out and mlp_out, and mlp_out alone
            for a long instruction (kind).
        parts: what to solve for, matrix, vector or both; left out, a matrix, and at mlp_in a vector too.
        blocks: indices of the blocks to patch; all when left out.
        scale: what to multiply the patch by.
        order: sequential (each block's plain run has been through the blocks patched so far) or teacher-forced (it
            enters each block as the instructed run does).
        steps: how often to go through the blocks, the patch so far in place; left out, 1, and 2 for mlp_in alone.
        step_size: η in (0, 1], how much of each step's solution is added; left out, 1, and 0.5 for mlp_in alone.
        pairs_per_step: pairs that a step is solved from, the next ones each time; all pairs when left out.
        rank: rank of the patch: an integer, a fraction of explained energy in (0, 1), or None for full rank; left out
            ("usual"), 16, and 128 for a long instruction (kind).
        ridge: λ ≥ 0, relative to a weighted mean of the Gram matrix's eigenvalues, ‖Z‖² ÷ tr Z; left out, 0.03, and
            less for more answers (:meth:`weighed`).
        answer_weight: weight of the output's tokens and the token before them, others weigh 1; left out, 30, and 100
            for mlp_in alone. For a long instruction (kind) their mean, of which each has the more the more the
            instruction changes it.
        preserve: unrelated text to leave alone: a text file, a list of texts, None, or "default": shipped text and,
            where the template is not a chat's, shipped chats; or a .safetensors file of this model's preservation
            statistics, from lit-thought preserve.
        preserve_weight: ρ ≥ 0, weight of the unrelated tokens' mean Gram matrix against that of the pairs; left out, 8
            for a text template or a long instruction (kind), else 3, and less for more answers (:meth:`weighed`); 1 for
            mlp_in alone.
        preserve_tokens: most tokens of unrelated text to use, taken evenly from all of it, and of chats; a file of
            statistics has its own.
        generate: options of model.generate for outputs that are missing, such as do_sample and temperature
            (:func:`lit_thought.runs.generate.generate` lists them); greedy when left out, whatever the model's own
            generation config says.
        max_new_tokens: longest output that the instructed model may write; left out, 32, and 64 for a long instruction
            (kind).
        batch_size: pairs a batch; the patch does not depend on it.
        seed: seed of the inputs that the model writes, of outputs where they are sampled, and of which pairs "auto"
            holds back.
        offload: where the streams are kept between uses: device (also False), cpu (main memory; also True), disk (a
            temporary file) or auto, the first of them where they fit; the patch is the same.
        memory_budget: GB that each process of the fit may take besides the model; left out, 0.8 of what is free. A fit
            that cannot keep to it is refused before it starts.
        resume_dir: folder for the finished stages of this fit; interrupted, the same call goes on from there.
        statistics_dir: folder to keep the statistics of every stage in, to solve again at other settings.
        cache_dir: where each model's preservation statistics are kept ($LIT_THOUGHT_CACHE, ~/.cache/lit_thought).
        store_instruction: keep the instruction in the patch's provenance, and so in adapter, statistics and report.
            False keeps a salted hash of it, with which an evaluation checks the one that it is given, and no generated
            outputs in resume_dir. The template is kept either way.

    Raises:
        ThoughtError: for a value out of range, naming the setting.
    """

    # what to fit to
    inputs: int | Literal["auto"] | None = field(default=None, metadata=_DATA)
    kind: Kind | None = field(default=None, metadata=_DATA)
    # what to patch
    sites: Sequence[str] | None = None
    parts: Sequence[str] | None = None
    blocks: Literal["auto"] | Sequence[int] | None = field(default=None, metadata=_AUTO)
    scale: float | Literal["auto"] = field(default=1.0, metadata=_AUTO | _PASSING)
    # how to solve
    order: Literal["sequential", "teacher-forced"] = "sequential"
    steps: int | None = None
    step_size: float | None = None
    pairs_per_step: int | None = None
    rank: int | float | Literal["usual", "auto"] | None = field(default="usual", metadata=_AUTO)
    ridge: float | Literal["auto"] | None = field(default=None, metadata=_AUTO)
    answer_weight: float | None = field(default=None, metadata=_DATA)
    # what to preserve
    preserve: TextSource | None = field(default="default", metadata=_PASSING)
    preserve_weight: float | Literal["auto"] | None = field(default=None, metadata=_AUTO)
    preserve_tokens: int = 6_000
    # how to run
    generate: Mapping[str, Any] | None = field(default=None, metadata=_DATA)
    max_new_tokens: int | None = field(default=None, metadata=_DATA)
    batch_size: int = field(default=32, metadata=_DATA | _PASSING)
    seed: int = field(default=0, metadata=_DATA)
    offload: Literal["auto", "device", "cpu", "disk"] | bool = field(default="auto", metadata=_PASSING)
    memory_budget: float | None = field(default=None, metadata=_PASSING)
    # what to keep
    resume_dir: str | os.PathLike[str] | None = field(default=None, metadata=_PASSING)
    statistics_dir: str | os.PathLike[str] | None = field(default=None, metadata=_PASSING)
    cache_dir: str | os.PathLike[str] | None = field(default=None, metadata=_PASSING)
    store_instruction: bool = field(default=True, metadata=_PASSING)

    def __post_init__(self) -> None:
        if self.inputs is not None and self.inputs != "auto":
            check_counts(inputs=self.inputs)
        if self.kind is not None and self.kind not in KINDS:
            raise ThoughtError(f"kind must be one of {list(KINDS)}, or left out; got {self.kind!r}.")
        if self.sites is not None:
            object.__setattr__(self, "sites", check_sites(self.sites))
        check_parts(self.parts, self.sites or DEFAULT_SITES)
        if self.blocks != "auto":
            object.__setattr__(self, "blocks", check_blocks(self.blocks))
        if self.scale != "auto" and not is_finite(self.scale):
            raise ThoughtError(f'scale must be a finite number or "auto"; got {self.scale!r}.')
        if self.order not in ORDERS:
            raise ThoughtError(f"order must be one of {list(ORDERS)}; got {self.order!r}.")
        optional = ("steps", "pairs_per_step", "max_new_tokens")
        counts = {name: getattr(self, name) for name in optional}
        check_counts(**{name: value for name, value in counts.items() if value is not None})
        by_site = {
            name: value
            for name in ("ridge", "preserve_weight", "step_size")
            if (value := getattr(self, name)) is not None
        }
        solved = {**({} if self.rank == "usual" else {"rank": self.rank}), **by_site}
        check_solve_settings(**{name: value for name, value in solved.items() if not _is_auto(value)})
        weight = self.answer_weight
        if weight is not None and not (is_finite(weight) and weight > 0):
            raise ThoughtError(f"answer_weight must be a finite number above 0; got {weight!r}.")
        if type(self.preserve_tokens) is not int or self.preserve_tokens < 2:
            raise ThoughtError(f"preserve_tokens must be a whole number of 2 or more; got {self.preserve_tokens!r}.")
        self._check_generate()
        if type(self.seed) is not int:
            raise ThoughtError(f"seed must be a whole number; got {self.seed!r:.60}.")
        check_counts(batch_size=self.batch_size)
        place = {True: "cpu", False: "device"}[self.offload] if isinstance(self.offload, bool) else self.offload
        if place not in OFFLOAD:
            raise ThoughtError(
                f"offload must be one of {list(OFFLOAD)}, True (cpu) or False (device); got {self.offload!r}."
            )
        object.__setattr__(self, "offload", place)
        budget = self.memory_budget
        if budget is not None and not (is_finite(budget) and 0 < budget < 1e9):
            raise ThoughtError(f"memory_budget must be a number of GB above 0, or left out; got {budget!r}.")
        if not isinstance(self.store_instruction, bool):
            raise ThoughtError(f"store_instruction must be True or False; got {self.store_instruction!r}.")

    def _check_generate(self) -> None:
        if self.generate is not None and not isinstance(self.generate, Mapping):
            raise ThoughtError(f"generate must be options of model.generate by name; got {self.generate!r:.60}.")
        try:
            json.dumps(self.generate, allow_nan=False)
        except (TypeError, ValueError, RecursionError) as error:
            raise ThoughtError(f"generate must hold JSON values only, for the patch's provenance ({error}).") from error

    @classmethod
    def names(cls, **where: bool) -> tuple[str, ...]:
        """The names of all settings, or of those whose metadata say so: ``names(data=True)``, ``names(auto=True)``."""
        return tuple(
            one.name
            for one in fields(cls)
            if all(one.metadata.get(key, False) is value for key, value in where.items())
        )

    @property
    def auto(self) -> tuple[str, ...]:
        """The settings that are to be chosen."""
        return tuple(name for name in self.names(auto=True) if _is_auto(getattr(self, name)))

    def options(self, **where: bool) -> dict[str, Any]:
        """The settings by name, all or those that :meth:`names` selects."""
        return {name: getattr(self, name) for name in self.names(**where)}

    def settled(self) -> FitSettings:
        """With what depends on the sites filled in, but for what depends on the answers, too (:meth:`weighed`).

        What did best on held-back inputs of the word tasks (recipes/studies/sweep.py). A vector cannot tell inputs
        apart: at mlp_in alone it has to come from the tokens that matter, preservation can only shrink it, and it takes
        more than one step, since no block can undo what the others have added.
        """
        alone = tuple(self.sites or DEFAULT_SITES) == ("mlp_in",)
        steps, step_size, answer_weight = (2, 0.5, 100.0) if alone else (1, 1.0, ANSWER_WEIGHT)
        ridge, preserve_weight = (RIDGE, 1.0) if alone else (None, None)
        return replace(
            self,
            steps=steps if self.steps is None else self.steps,
            step_size=step_size if self.step_size is None else self.step_size,
            answer_weight=answer_weight if self.answer_weight is None else self.answer_weight,
            ridge=ridge if self.ridge is None else self.ridge,
            preserve_weight=preserve_weight if self.preserve_weight is None else self.preserve_weight,
        )

    def suited(self, long: bool, largest: int) -> FitSettings:
        """With the rank filled in, where it is left out.

        Args:
            long: whether the instruction is a long one.
            largest: the largest rank that the layers allow.
        """
        usual = min(LONG_RANK if long else RANK, largest)
        return replace(self, rank=usual if self.rank == "usual" else self.rank)

    def weighed(self, answers: int, larger: bool = False) -> FitSettings:
        """With λ and ρ filled in, where they are left out, for a number of answer tokens.

        Both are relative to a mean of the pairs' tokens, so that at fixed values more pairs would not be believed more
        than few. A prior of n₀ tokens against T of the answers is λ = λ₀ n₀ / T; ρ, which also says how far unrelated
        text may move, falls more slowly: with t = max(1, T / :data:`FEW_ANSWERS`),

            λ = max(λ₀ / t, 0.001),   ρ = ρ₀ / t^¼,   λ₀ = 0.03, ρ₀ = 3, or 8 if ``larger``.

        Args:
            answers: T, tokens that a pair's output has, and one more for its end, over all pairs of a step.
            larger: whether the template is no chat's, or the instruction a long one.
        """
        times = max(1.0, answers / FEW_ANSWERS)
        most = LARGER_PRESERVE_WEIGHT if larger else PRESERVE_WEIGHT
        return replace(
            self,
            ridge=max(RIDGE / times, LEAST_RIDGE) if self.ridge is None else self.ridge,
            preserve_weight=most / times**0.25 if self.preserve_weight is None else self.preserve_weight,
        )


def directions_for(long: bool) -> int:
    """k of the preservation statistics for an instruction, a long one or not."""
    return LONG_DIRECTIONS if long else DIRECTIONS


def outputs_for(long: bool) -> int:
    """The longest output where that is left out, for an instruction, a long one or not."""
    return LONG_OUTPUT_TOKENS if long else OUTPUT_TOKENS


def text_place(source: Any) -> str | os.PathLike[str] | None:
    """The file of a :data:`TextSource`, for what is written to stay clear of it; None of shipped text, or a list."""
    return source if isinstance(source, (str, os.PathLike)) and source != "default" else None


def takes_settings(**where: bool) -> Callable[[_Function], _Function]:
    """A decorator: the ``**settings`` of a function are :class:`FitSettings`' own, as signature and checks go.

    Args:
        where: which of them, as for :meth:`FitSettings.names`.
    """

    def decorate(function: _Function) -> _Function:
        known = FitSettings.names(**where)
        own = inspect.signature(function)
        options = next(one.name for one in own.parameters.values() if one.kind is one.VAR_KEYWORD)

        @functools.wraps(function)
        def called(*args: Any, **given: Any) -> Any:
            for name in given.keys() - own.parameters.keys() - set(known):
                hint = did_you_mean(name, [*own.parameters, *known])
                raise TypeError(f"{function.__qualname__}() got an unexpected keyword argument {name!r}.{hint}")
            return function(*args, **given)

        parameters = [one for one in own.parameters.values() if one.name != options]
        types = get_type_hints(FitSettings)  # LightningCLI takes them from the signature
        more = [
            inspect.Parameter(one.name, inspect.Parameter.KEYWORD_ONLY, default=one.default, annotation=types[one.name])
            for one in fields(FitSettings)
            if one.name in known
        ]
        called.__signature__ = own.replace(parameters=[*parameters, *more])  # type: ignore[attr-defined]
        return called  # type: ignore[return-value]

    return decorate


def register_paths() -> None:
    """Let jsonargparse, and so LightningCLI, take a text alone for a path: its own way makes one of anything, of a list
    of pairs or of null too."""
    from jsonargparse.typing import register_type

    def read(value: Any) -> str:
        if not isinstance(value, str):
            raise ValueError(f"expected a string, got {value!r}")
        return value

    register_type(os.PathLike, deserializer=read, fail_already_registered=False)


def check_sites(sites: Sequence[str]) -> tuple[str, ...]:
    """Return ``sites`` in forward order.

    Raises:
        ThoughtError: when ``sites`` is empty, repeats a site or names one that does not exist.
    """
    names = _listed(sites)
    if not names or any(name not in SITES for name in names) or len(set(names)) != len(names):
        raise ThoughtError(
            f"sites must name one or more of {list(SITES)}, each once; got {list(names)!r}.{_nearest(names, SITES)} "
            "Leave it out for the default, attn_out and mlp_out wherever a block has them."
        )
    return tuple(name for name in SITES if name in names)


def _nearest(names: Iterable[str], known: Sequence[str]) -> str:
    """What the first name that is not known may have meant."""
    return next((did_you_mean(str(name), known) for name in names if name not in known), "")


def check_parts(parts: Sequence[str] | None, sites: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """What to solve for at each site.

    Args:
        parts: ``"matrix"``, ``"vector"`` or both; None for each site's own form: a matrix, and at mlp_in, where the
            matrix corrects norm(m) but not m itself, a vector too.
        sites: the sites of the fit.

    Raises:
        ThoughtError: for an unknown part, or for both at an output projection, where both explain the same error.
    """
    if parts is None:
        return {site: PARTS if site == "mlp_in" else ("matrix",) for site in sites}
    names = _listed(parts)
    if not names or any(name not in PARTS for name in names) or len(set(names)) != len(names):
        raise ThoughtError(
            f"parts must name one or both of {list(PARTS)}, each once; got {list(names)!r}.{_nearest(names, PARTS)} "
            "Leave it out for each site's own form."
        )
    outputs = [site for site in sites if site != "mlp_in"]
    if len(names) == 2 and outputs:
        raise ThoughtError(
            f"parts={list(names)!r} with sites={list(sites)!r}: at {outputs[0]} a matrix and a vector explain the same "
            "error. Choose one of them, or leave parts out."
        )
    return {site: tuple(name for name in PARTS if name in names) for site in sites}


def check_blocks(blocks: Sequence[int] | None, count: int | None = None) -> list[int] | None:
    """Return indices of blocks in ascending order, or None for all of them.

    Args:
        blocks: indices from 0 on, each once, or None.
        count: how many blocks the model has, where that is known.

    Raises:
        ThoughtError: for anything else, or an index the model does not have.
    """
    if blocks is None:
        return None
    chosen = list(blocks) if isinstance(blocks, Iterable) else []
    if not chosen or any(isinstance(i, bool) or not isinstance(i, int) or i < 0 for i in chosen):
        raise ThoughtError(
            f"blocks must be indices of blocks, from 0 on; got {blocks!r}. Leave it out for all of them."
        )
    if len(set(chosen)) != len(chosen):
        raise ThoughtError(f"blocks must name each block once; got {chosen!r}.")
    if count is not None and max(chosen) >= count:
        raise ThoughtError(f"blocks: the model has blocks 0 to {count - 1}; got {max(chosen)}.")
    return sorted(chosen)


def check_rank(rank: int | float | None, limit: int) -> None:
    """Check a rank setting.

    Args:
        rank: an int in 1..limit, a fraction of explained energy in (0, 1), or None for full rank.
        limit: the largest rank that the layers allow, min(d_in, d_out).

    Raises:
        ThoughtError: for anything else.
    """
    if rank is None:
        return
    whole = isinstance(rank, int) and not isinstance(rank, bool)
    if whole and not 1 <= rank <= limit:
        raise ThoughtError(
            f"rank must be between 1 and {limit}, the largest rank these layers allow; got {rank}. "
            "Use None for full rank."
        )
    if not whole and not (isinstance(rank, float) and 0 < rank < 1):
        raise ThoughtError(
            f"rank must be an integer, a fraction of explained energy between 0 and 1, or None; got {rank!r}."
        )


def check_solve_settings(ridge: Any = 0.0, rank: Any = None, preserve_weight: Any = 0.0, step_size: Any = 1.0) -> None:
    """Check what can be checked of a solve's settings without a model.

    Raises:
        ThoughtError: for one out of range.
    """
    check_rank(rank, 10**9)
    for name, value in (("ridge", ridge), ("preserve_weight", preserve_weight)):
        if not is_finite(value) or value < 0:
            raise ThoughtError(f"{name} must be a finite number ≥ 0; got {value!r}.")
    if not (is_finite(step_size) and 0 < step_size <= 1):
        raise ThoughtError(f"step_size must be above 0 and at most 1; got {step_size!r}.")


def _is_auto(value: Any) -> bool:
    return isinstance(value, str) and value == "auto"


def _listed(names: Any) -> tuple[Any, ...]:
    """One name, or several."""
    return (names,) if isinstance(names, str) or not isinstance(names, Iterable) else tuple(names)
