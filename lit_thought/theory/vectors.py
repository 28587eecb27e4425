"""Thought vectors of whole blocks: activation steering and function vectors, as the least squares has them.

The least-squares constant of the differences ``δᵢ = hᵢ⁺ − hᵢ⁻`` of a block's output at matching tokens is their mean:

    v = argmin_u Σ wᵢ ‖u − δᵢ‖² = Σ wᵢ δᵢ / Σ wᵢ

With a contrasting pair of chunks I⁺, I⁻ it is the contrastive mean difference of activation steering (Turner et al.
2023, Rimsky et al. 2024); with demonstrations against nothing, at the last token of the prompt and at one block, a
function vector in its mean-difference form (Todd et al. 2024). Mazzawi et al. 2025, arXiv 2510.08734.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lit_thought.errors import ThoughtError, check_counts
from lit_thought.evaluation.metrics import token_kl
from lit_thought.model.bare import bare_model, check_tokenizer
from lit_thought.model.blocks import find_blocks, plain_outputs
from lit_thought.model.loading import context_window, evaluating, model_name
from lit_thought.patch.patch import ThoughtPatch
from lit_thought.patch.weights import made_for
from lit_thought.prompts.alignment import TokenisedPair, check_context
from lit_thought.prompts.batches import PairBatch, make_batches
from lit_thought.prompts.pairs import load_pairs, pair_instructions
from lit_thought.prompts.template import DEFAULT_TEMPLATE, PromptTemplate
from lit_thought.runs.logits import batch_logits
from lit_thought.runs.runner import StreamRunner
from lit_thought.runs.streams import SitePatch
from lit_thought.solve.sums import VectorStatistics
from lit_thought.theory.condense import thought_vector

__all__ = ["best_block", "thought_vectors", "vector_patch"]

Tokens = Literal["all", "last"]


def thought_vectors(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    instruction: str | None,
    pairs: Sequence[Mapping[str, Any]],
    *,
    contrast: str | None = None,
    template: str | PromptTemplate = DEFAULT_TEMPLATE,
    tokens: Tokens = "all",
    batch_size: int = 32,
) -> Tensor:
    """Mean difference of every block's output between two runs of the unpatched model.

    Args:
        model: a causal LM with pre-norm blocks; left as it was.
        tokenizer: its tokenizer.
        instruction: the chunk I⁺ (a pair's own ``instruction`` overrides it).
        pairs: inputs, with outputs where their tokens should count too, as in :func:`~lit_thought.fit.api.transmute`.
        contrast: the chunk I⁻ in its place; left out, the plain run without a chunk.
        template: how chunk, input and output make a prompt.
        tokens: ``"all"``: every token that both runs share, but for the attention sink at position 0 of a plain run;
            ``"last"``: the last one before the output, which predicts it.
        batch_size: pairs a batch; the vectors do not depend on it.

    Returns:
        v, (blocks, d), float64.

    Raises:
        ThoughtError: for bad input, or a prompt longer than the context window.
    """
    if tokens not in ("all", "last"):
        raise ThoughtError(f'tokens must be "all" or "last"; got {tokens!r}.')
    if contrast is not None and not contrast.strip():
        raise ThoughtError("contrast is empty; expected a chunk to set against the instruction, or None for nothing.")
    model, tokenizer = bare_model(model), check_tokenizer(tokenizer)
    blocks = find_blocks(model)
    plain_outputs(blocks)
    batches = _batches(model, tokenizer, instruction, pairs, contrast, template, tokens, batch_size)
    vectors = []
    with evaluating(model):
        runner = StreamRunner(model, blocks, ("mlp_out",))
        for block in blocks:
            sums = VectorStatistics(block.sites["mlp_out"].d_out)
            for batch in batches:
                seen = runner.observe(batch)
                sums.update(seen.shift, seen.weights)
            vectors.append(thought_vector(sums))
            runner.finish(SitePatch())
    return torch.stack(vectors)


def vector_patch(model: PreTrainedModel, vectors: Mapping[int, Tensor], scale: float = 1.0) -> ThoughtPatch:
    """The patch that adds a vector to the output of blocks: to the bias of their MLP's output projection.

    Args:
        model: the model, for the paths of its layers and its fingerprint.
        vectors: v by block index, (d,); of a (blocks, d) tensor, ``dict(enumerate(v))``.
        scale: factor on all of them.

    Raises:
        ThoughtError: for an index without a block or a vector of another size.
    """
    model = bare_model(model)
    sites = plain_outputs(find_blocks(model))
    for index, vector in vectors.items():
        if index not in range(len(sites)):
            raise ThoughtError(f"vectors: the model has blocks 0 to {len(sites) - 1}; got one for block {index}.")
        if tuple(vector.shape) != (sites[index].d_out,):
            width = sites[index].d_out
            raise ThoughtError(f"vectors[{index}] must be ({width},), the residual stream; got {tuple(vector.shape)}.")
    name = model_name(model)
    provenance = {
        "model": name,
        "base_model": name,
        **made_for(model),
        "fan_in_fan_out": sites[0].fan_in_fan_out,
        "d_in": {sites[index].path: sites[index].d_in for index in vectors},
    }
    return ThoughtPatch({}, provenance, {sites[index].path: scale * vector for index, vector in vectors.items()})


@torch.no_grad()
def best_block(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    vectors: Tensor,
    instruction: str | None,
    pairs: Sequence[Mapping[str, Any]],
    *,
    template: str | PromptTemplate = DEFAULT_TEMPLATE,
    scale: float = 1.0,
    batch_size: int = 32,
) -> tuple[int, list[float]]:
    """The block whose vector, added alone, brings the plain run nearest to the instructed one.

    Nearest by KL(instructed ‖ plain with the vector), at the last token of each prompt. Give pairs that the vectors
    were not made from, and keep those that you test on out of both.

    Args:
        vectors: (blocks, d), from :func:`thought_vectors`.
        scale: factor on the vector.
        model, tokenizer, instruction, pairs, template, batch_size: as there.

    Returns:
        The block's index, and the mean KL of each block in nats.

    Raises:
        ThoughtError: for vectors of another shape, and as :func:`thought_vectors`.
    """
    model, tokenizer = bare_model(model), check_tokenizer(tokenizer)
    blocks = find_blocks(model)
    plain_outputs(blocks)
    if vectors.shape != (len(blocks), blocks[0].sites["mlp_out"].d_out):
        raise ThoughtError(
            f"vectors: expected one of this model's width for each of its {len(blocks)} blocks; got "
            f"{tuple(vectors.shape)}. Give those that thought_vectors returns."
        )
    batches = _batches(model, tokenizer, instruction, pairs, None, template, "last", batch_size)
    found: list[float] = []
    with evaluating(model):
        wanted = _last_logits(model, batches, "target")
        for block, vector in zip(blocks, vectors, strict=True):
            patch = ThoughtPatch({}, {}, {block.sites["mlp_out"].path: scale * vector})
            with patch.applied(model):
                found.append(float(token_kl(wanted, _last_logits(model, batches, "plain")).mean()))
    return min(range(len(found)), key=found.__getitem__), found


def _last_logits(model: PreTrainedModel, batches: Sequence[PairBatch], side: Literal["plain", "target"]) -> Tensor:
    leads: dict[int, Any] = {}
    return torch.cat([batch_logits(model, batch, side, leads) for batch in batches])


def _batches(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    instruction: str | None,
    pairs: Sequence[Mapping[str, Any]],
    contrast: str | None,
    template: str | PromptTemplate,
    tokens: Tokens,
    batch_size: int,
) -> list[PairBatch]:
    """The instructed runs as targets, the contrasting or plain ones in the place of the plain runs."""
    rows, parsed = load_pairs(pairs), PromptTemplate.parse(template)
    instructions = pair_instructions(rows, instruction)
    check_counts(batch_size=batch_size)
    tokenised = []
    for index, (row, chunk) in enumerate(zip(rows, instructions, strict=True)):
        output = row.get("output") if tokens == "all" else None
        pair = parsed.tokenise(tokenizer, chunk, row["input"], output)
        if contrast is not None:
            other = parsed.tokenise(tokenizer, contrast, row["input"], output)
            check_context(other, context_window(model), index)
            pair = _contrasted(pair, other)
        check_context(pair, context_window(model), index)
        kept = slice(-1, None) if tokens == "last" else slice(None)
        tokenised.append(
            replace(
                pair,
                plain_positions=pair.plain_positions[kept],
                instructed_positions=pair.instructed_positions[kept],
                sink=False,
            )
        )
    return make_batches(tokenised, batch_size, groups=instructions)


def _contrasted(positive: TokenisedPair, negative: TokenisedPair) -> TokenisedPair:
    """The run with I⁻ beside the run with I⁺, at the plain tokens that both contain."""
    there = dict(zip(negative.plain_positions, negative.instructed_positions, strict=True))
    matches = [
        (there[plain], here)
        for plain, here in zip(positive.plain_positions, positive.instructed_positions, strict=True)
        if plain in there
    ]
    length = len(negative.instructed_ids)
    return TokenisedPair(
        plain_ids=negative.instructed_ids,
        instructed_ids=positive.instructed_ids,
        plain_positions=tuple(p for p, _ in matches),
        instructed_positions=tuple(q for _, q in matches),
        sink=False,
        output_span=(length, length),
        exact=positive.exact and negative.exact,
    )
