"""The theorems of :mod:`lit_thought.theory.exact` checked on a model, an instruction and a text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lit_thought.evaluation.metrics import token_kl
from lit_thought.model.blocks import Block
from lit_thought.model.layers import weight_of
from lit_thought.model.loading import evaluating, model_name
from lit_thought.theory.exact import Output, TokenPatches, TokenRuns, Trace, apply_token_patches
from lit_thought.timing import Stopwatch

__all__ = ["BlockErrors", "ExactReport", "LogitErrors", "format_report", "verify_exact"]

_ROWS = 32
"""Tokens whose logits are compared at a time: a few float64 copies of them are made."""


@dataclass(frozen=True)
class BlockErrors:
    """How far one block's output is from the instructed run's: the largest ``‖o − o*‖ / ‖o*‖`` over the tokens.

    Attributes:
        block: its index.
        patched: whether it was patched.
        alone, alone_plain: error of the block alone, entered by the common tokens as in the instructed run
            (single-block theorem), patched and as it is.
        sequence, sequence_plain: error in the plain run, through patched blocks (multi-block theorem) and through the
            model as it is.
        weight_change_mean, weight_change_max: ``‖ΔW_x‖_F / ‖W‖_F`` over the tokens in sequence, all first linears
            taken together; None where not patched, as are the next two.
        shift_mean: mean ``‖δ_x‖ / ‖m‖`` in sequence.
        unreachable: how many tokens have a patch that cannot be exact, alone or in sequence: a_x = 0, or a channel of
            ĥ_x = 0.
    """

    block: int
    patched: bool
    alone: float
    alone_plain: float
    sequence: float
    sequence_plain: float
    weight_change_mean: float | None = None
    weight_change_max: float | None = None
    shift_mean: float | None = None
    unreachable: int | None = None


@dataclass(frozen=True)
class LogitErrors:
    """How far a run's logits are from the instructed run's.

    Attributes:
        absolute: largest absolute difference of one logit.
        relative: largest ``‖L − L*‖ / ‖L*‖`` over the tokens.
        agreement: share of tokens with the same top-1 token.
        kl: mean KL(instructed ‖ run) in nats.
    """

    absolute: float
    relative: float
    agreement: float
    kl: float


@dataclass(frozen=True)
class ExactReport:
    """What :func:`verify_exact` found.

    Attributes:
        model: name of the model; dtype: its dtype, such as ``"float32"``.
        output: where δ_x went, ``"vector"`` or ``"norm_scale"``.
        tokens: plain tokens compared; instruction_tokens: tokens of the chunk.
        blocks: errors by block, patched or not.
        patched, plain: errors of the logits of the plain run, with the patches and without.
        seconds: wall-clock time.
    """

    model: str
    dtype: str
    output: str
    tokens: int
    instruction_tokens: int
    blocks: tuple[BlockErrors, ...]
    patched: LogitErrors
    plain: LogitErrors
    seconds: float

    @property
    def agrees(self) -> bool:
        """Whether the patched run's logits are the instructed run's but for rounding: their relative error is at most
        √ε of the model's dtype (and a number: logits that overflow agree with nothing)."""
        return self.patched.relative <= self.bound

    @property
    def bound(self) -> float:
        """√ε of the model's dtype: 3.5e-4 in float32."""
        return math.sqrt(torch.finfo(getattr(torch, self.dtype)).eps)

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON values, ``agrees`` among them; figures that are not finite become None."""

        def plain(value: Any) -> Any:
            if isinstance(value, dict):
                return {key: plain(entry) for key, entry in value.items()}
            if isinstance(value, (list, tuple)):
                return [plain(entry) for entry in value]
            return None if isinstance(value, float) and not math.isfinite(value) else value

        return {name: plain(value) for name, value in {**asdict(self), "agrees": self.agrees}.items()}


@torch.no_grad()
def verify_exact(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    instruction: str,
    text: str,
    *,
    blocks: Sequence[int] | None = None,
    output: Output | None = None,
    tokens: int | None = None,
) -> ExactReport:
    """Patch the plain run token by token and compare it with the instructed run, block by block and at the logits.

    The patches are constructed first (:func:`~lit_thought.theory.exact.token_patches`); the errors are those of
    another run of the model with these patches on its layers. Seven forward passes in all. With only some ``blocks``
    patched, the errors after them are not expected to vanish.

    Args:
        model, tokenizer, instruction, text, blocks, output, tokens: as for
            :func:`~lit_thought.theory.exact.token_patches`. The model is left bit for bit as it was, free of hooks.

    Returns:
        The errors, relative to the instructed run. They come from rounding alone where every block is patched and no
        token is unreachable.

    Raises:
        ThoughtError: as for :func:`~lit_thought.theory.exact.token_patches`.

    Source: Dherin et al. 2025, arXiv 2507.16003; Goldwaser et al. 2025, arXiv 2511.17864; Mazzawi et al. 2025,
    arXiv 2510.08734.
    """
    start = Stopwatch.now()
    runs = TokenRuns(model, tokenizer, instruction, text, blocks, output, tokens)
    model = runs.model
    with evaluating(model):
        target = runs.instructed()
        alone_plain, alone, alone_patches = _compare(runs, target, target.entrances)
        sequence_plain, sequence, patches = _compare(runs, target, None)
    errors = []
    for block in runs.blocks:
        i = block.index
        sizes: dict[str, Any] = {}
        if i in patches:
            missed = alone_patches[i].unreachable | patches[i].unreachable
            sizes = _sizes(block, patches[i], sequence.residuals[i]) | {"unreachable": int(missed.sum())}
        wanted = target.outputs[i]
        errors.append(
            BlockErrors(
                block=i,
                patched=i in patches,
                alone=_relative_error(alone.outputs[i], wanted),
                alone_plain=_relative_error(alone_plain.outputs[i], wanted),
                sequence=_relative_error(sequence.outputs[i], wanted),
                sequence_plain=_relative_error(sequence_plain.outputs[i], wanted),
                **sizes,
            )
        )
    return ExactReport(
        model=model_name(model) or type(model).__name__,
        dtype=str(target.outputs[0].dtype).removeprefix("torch."),
        output=runs.output,
        tokens=len(runs.plain_ids),
        instruction_tokens=len(runs.instructed_ids) - len(runs.plain_ids),
        blocks=tuple(errors),
        patched=_logit_errors(sequence.logits, target.logits),
        plain=_logit_errors(sequence_plain.logits, target.logits),
        seconds=Stopwatch.now() - start,
    )


def _compare(
    runs: TokenRuns, target: Trace, entrances: Sequence[Tensor] | None
) -> tuple[Trace, Trace, dict[int, TokenPatches]]:
    """The plain run without and with patches, and the patches."""
    plain = runs.plain(entrances)
    patches = runs.construct(target, entrances)
    with apply_token_patches(runs.model, patches):
        return plain, runs.plain(entrances), patches


def _relative_error(got: Tensor, wanted: Tensor) -> float:
    """The largest ‖got − wanted‖ / ‖wanted‖ over tokens, in float64; 0/0 counts as 0."""
    difference, size = (got.double() - wanted.double()).norm(dim=-1), wanted.double().norm(dim=-1)
    return float(torch.where(difference == 0, 0, difference / size).max())


def _sizes(block: Block, patch: TokenPatches, residuals: Tensor) -> dict[str, float]:
    """How large a block's patches are: ‖ΔW_x‖ / ‖W‖ (‖u vᵀ‖_F = ‖u‖ ‖v‖) and ‖δ_x‖ / ‖m‖."""
    weights = [weight_of(layer).detach().to(patch.delta) for layer in block.firsts.values()]
    values = sum(patch.values(weight).square().sum(-1) for weight in weights)
    change = torch.as_tensor(values).sqrt() * patch.keys.norm(dim=-1)
    change = change / torch.stack([weight.norm() for weight in weights]).norm()
    return {
        "weight_change_mean": float(change.mean()),
        "weight_change_max": float(change.max()),
        "shift_mean": float((patch.delta.norm(dim=-1) / residuals.to(patch.delta).norm(dim=-1)).mean()),
    }


def _logit_errors(got: Tensor | None, wanted: Tensor | None) -> LogitErrors:
    assert got is not None
    assert wanted is not None
    errors: list[tuple[float, float]] = []
    agree, kl = 0, 0.0
    for logits, reference in zip(got.split(_ROWS), wanted.split(_ROWS), strict=True):
        logits, reference = logits.double(), reference.double()
        errors.append((float((logits - reference).abs().max()), _relative_error(logits, reference)))
        agree += int((logits.argmax(-1) == reference.argmax(-1)).sum())
        kl += float(token_kl(reference, logits).sum())
    # unlike Python's, NaN where there is one
    absolute, relative = torch.tensor(errors, dtype=torch.float64).max(0).values.tolist()
    return LogitErrors(absolute, relative, agree / len(wanted), kl / len(wanted))


def format_report(report: ExactReport) -> str:
    """The report as two small Markdown tables, of logits and of errors and sizes by block, and in words whether the two
    runs agree."""
    patched = sum(block.patched for block in report.blocks)
    lines = [
        f"Exact per-token patches of {patched} of {len(report.blocks)} blocks of {report.model} ({report.dtype}, "
        f"output: {report.output}); {report.tokens} tokens of text, {report.instruction_tokens} of instruction, "
        f"{report.seconds:.1f} s.",
        "",
        "| logits against the instructed run | plain | patched |",
        "|---|---:|---:|",
        f"| largest absolute error | {report.plain.absolute:.1e} | {report.patched.absolute:.1e} |",
        f"| largest relative error | {report.plain.relative:.1e} | {report.patched.relative:.1e} |",
        f"| top-1 agreement | {report.plain.agreement:.2%} | {report.patched.agreement:.2%} |",
        f"| KL(instructed ‖ ·), nats a token | {report.plain.kl:.1e} | {report.patched.kl:.1e} |",
        "",
        "Largest error of a block's output over the tokens, ‖o − o*‖ / ‖o*‖: alone on the instructed run's input, and "
        "in sequence.",
        "",
        "| block | alone, plain | alone, patched | sequence, plain | sequence, patched | ‖ΔW‖/‖W‖ mean | max "
        "| ‖δ‖/‖m‖ mean |",
        "|---:|" + "---:|" * 7,
    ]
    for block in report.blocks:
        errors = (block.alone_plain, block.alone, block.sequence_plain, block.sequence)
        sizes = (block.weight_change_mean, block.weight_change_max, block.shift_mean)
        cells = [f"{error:.1e}" for error in errors]
        cells += ["–" if size is None else f"{size:.1e}" for size in sizes]
        lines.append(f"| {block.block} | " + " | ".join(cells) + " |")
    missed = sum(block.unreachable or 0 for block in report.blocks)
    if missed:
        lines += ["", f"{missed} patches cannot be exact: their norm(m), or a channel of the normalised output, is 0."]
    return "\n".join([*lines, "", _verdict(report)])


def _verdict(report: ExactReport) -> str:
    """Whether the two runs agree, and by which figure."""
    found = (
        "with the instruction, and without it but with each token's own weights, the logits differ by at most "
        f"{report.patched.relative:.1e} of their norm ({report.plain.relative:.1e} without these weights)"
    )
    top = f"{report.patched.agreement:.0%}".replace("%", " %") + " of the top-1 tokens are the same"
    rounding = f"{report.dtype} rounds to within {report.bound:.1e} (√ε)"
    return f"The two runs {'agree' if report.agrees else 'do not agree'}: {found}; {rounding}. {top}."
