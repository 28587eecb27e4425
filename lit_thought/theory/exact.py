"""The exact, token-dependent patch: the plain run at a token, with that token's own weights, is the instructed run.

A block computes ``o = m + W' φ(W norm(m) + b) + b'`` from the residual stream m after attention. At a token x let m* be
the residual of the instructed run, which saw the chunk I, and m that of the plain run, which did not:

    δ_x = m* − m,   a_x = norm(m),   δᵃ_x = norm(m*) − a_x.

Then ``W ← W + (W δᵃ_x) a_xᵀ / ‖a_x‖²`` (rank 1) on every first linear, gate and up alike, gives ``W norm(m*)``, and
``b' ← b' + δ_x`` gives ``m + δ_x = m*``: the block puts out o*. That is the single-block theorem (Dherin et al. 2025,
arXiv 2507.16003). The next block of the plain run then sees the instructed stream at x, and so on by induction to the
logits (multi-block theorem, Goldwaser et al. 2025, arXiv 2511.17864; Mazzawi et al. 2025, arXiv 2510.08734).

Where a norm follows the MLP, ``o = m + g ⊙ ĥ`` with ĥ the normalised, unscaled MLP output, and δ_x has no way in
before that norm: ``g ← g + δ_x / ĥ_x`` changes its scale instead (Goldwaser et al. 2025), or δ_x is added after it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lit_thought.errors import ThoughtError, UnsupportedModelError
from lit_thought.model.bare import bare_model, check_tokenizer, uncompiled
from lit_thought.model.blocks import Block, find_blocks
from lit_thought.model.calls import find_decoder, hidden_of, unwrapped
from lit_thought.model.discovery import wider
from lit_thought.model.layers import weight_of
from lit_thought.model.loading import context_window, evaluating
from lit_thought.prompts.template import PromptTemplate
from lit_thought.settings import check_blocks

__all__ = ["TokenPatches", "TokenRuns", "Trace", "apply_token_patches", "check_texts", "token_patches"]

Order = Literal["sequential", "teacher-forced"]
Output = Literal["vector", "norm_scale"]

_TEMPLATE = PromptTemplate("{instruction}{input}{output}")


@dataclass(frozen=True)
class TokenPatches:
    """The exact patches of one block, one for each of the n plain tokens; float32 or better, on the model's device.

    Attributes:
        block: index of the block.
        token_ids: the plain tokens, (n,).
        target_positions: where their counterparts are in the instructed run, (n,).
        a: norm(m) of the plain run, (n, d).
        delta_a: δᵃ = norm(m*) − norm(m), (n, d).
        delta: δ = m* − m, (n, d).
        norm_scale: δ / ĥ, to be added to the scale of the norm after the MLP, (n, d); 0 where that is not finite.
            None where δ itself is added, to the output bias of the MLP or, in post-norm blocks, after that norm.
    """

    block: int
    token_ids: Tensor
    target_positions: Tensor
    a: Tensor
    delta_a: Tensor
    delta: Tensor
    norm_scale: Tensor | None = None

    @property
    def keys(self) -> Tensor:
        """a_x / ‖a_x‖², (n, d): what every first linear's update reads its input with; 0 where a_x = 0."""
        squared = self.a.square().sum(-1, keepdim=True)
        return torch.where(squared > 0, self.a / squared, 0)

    @property
    def unreachable(self) -> Tensor:
        """Tokens that no patch of this form corrects, (n,) bool: a_x = 0 but δᵃ_x ≠ 0, or a channel of ĥ_x is 0 but
        that of δ_x is not."""
        missed = self.keys.eq(0).all(-1) & self.delta_a.ne(0).any(-1)
        if self.norm_scale is not None:
            missed |= (self.norm_scale.eq(0) & self.delta.ne(0)).any(-1)
        return missed

    def values(self, weight: Tensor) -> Tensor:
        """W δᵃ_x of every token, (n, d_ff), for a first linear's weight W, (d_ff, d)."""
        return self.delta_a @ weight.detach().to(self.delta_a).T

    def rank_one(self, weight: Tensor, index: int) -> tuple[Tensor, Tensor]:
        """The change of one first linear for one token: ΔW = u vᵀ with u = W δᵃ_x and v = a_x / ‖a_x‖².

        Args:
            weight: W, (d_ff, d), any floating dtype: :func:`~lit_thought.model.layers.weight_of` a layer.
            index: the token, among the n.

        Returns:
            u (d_ff,) and v (d,), in the dtype of the patch.

        Raises:
            ThoughtError: when the weight is not (d_ff, d), or there is no such token.
        """
        n, d = self.a.shape
        if weight.ndim != 2 or weight.shape[1] != d:
            raise ThoughtError(
                f"weight: expected (d_ff, {d}), got {tuple(weight.shape)}. Pass weight_of(layer) of a first linear: "
                "GPT-2 stores weights transposed."
            )
        if not -n <= index < n:
            raise ThoughtError(f"index={index}; expected one of the {n} tokens, 0 to {n - 1}.")
        return weight.detach().to(self.delta_a) @ self.delta_a[index], self.keys[index]


@dataclass
class Trace:
    """What one run left at the tokens compared, by block: (n, d) each, in the model's dtype.

    Attributes:
        entrances: input of the block.
        residuals: m, after attention.
        inputs: norm(m).
        outputs: o, of the block.
        logits: (n, vocabulary); None where the run was made without the head.
    """

    entrances: list[Tensor]
    residuals: list[Tensor]
    inputs: list[Tensor]
    outputs: list[Tensor]
    logits: Tensor | None = None


def token_patches(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    instruction: str,
    text: str,
    *,
    blocks: Sequence[int] | None = None,
    output: Output | None = None,
    order: Order = "sequential",
    tokens: int | None = None,
) -> dict[int, TokenPatches]:
    """Construct the exact patches of every token of ``text``, as if ``instruction`` stood before it.

    Two forward passes: the instructed run on ``instruction + text``, and the plain run on ``text`` that meets each
    block's patch as soon as it is known. The attention sink, token 0 where the tokenizer puts no BOS, is a token like
    any other here; its counterpart is the token right after the chunk.

    Args:
        model: a causal LM of a family that :func:`~lit_thought.model.blocks.find_blocks` knows; left as it was.
        tokenizer: its tokenizer, a fast one.
        instruction: the chunk I, with any separator that is to stand before the text.
        text: at least two tokens.
        blocks: which blocks to patch; all when None.
        output: where δ_x goes: ``"vector"`` (the output bias, or after the output norm) or ``"norm_scale"`` (post-norm
            blocks only). None for norm_scale in post-norm blocks and vector in others.
        order: ``"sequential"``: the plain run passes through the blocks patched so far (multi-block theorem).
            ``"teacher-forced"``: the common tokens enter each block as in the instructed run (single-block theorem).
        tokens: use at most so many tokens of the text; all when None.

    Returns:
        The patches by block, computed in the model's dtype, or float32 where that is narrower.

    Raises:
        ThoughtError: for bad input, a text too short or too long for the context window;
            UnsupportedModelError for an architecture that is not supported.

    Source: Dherin et al. 2025, arXiv 2507.16003; Goldwaser et al. 2025, arXiv 2511.17864.
    """
    if order not in ("sequential", "teacher-forced"):
        raise ThoughtError(f"order={order!r}; expected 'sequential' or 'teacher-forced'.")
    runs = TokenRuns(model, tokenizer, instruction, text, blocks, output, tokens)
    with evaluating(runs.model):
        target = runs.instructed()
        return runs.construct(target, target.entrances if order == "teacher-forced" else None)


@contextmanager
def apply_token_patches(model: PreTrainedModel, patches: Mapping[int, TokenPatches]) -> Iterator[PreTrainedModel]:
    """Inside, the model's layers put out what their weights would after each token's own patch.

    Run it on exactly the tokens that the patches were made for, in one pass: ``model(patches[0].token_ids[None])``.
    Forward hooks do it with the input that each layer really receives, ``W x + (W δᵃ_x) (a_xᵀ x) / ‖a_x‖²``; weights
    stay untouched, and the hooks go when the block is left, by an exception too.

    Args:
        model: the model the patches were made for.
        patches: by block, as :func:`token_patches` returns them.

    Raises:
        ThoughtError: when the model lacks one of the blocks or has another width, and, inside, when it is run on
            another number of tokens.
    """
    found = find_blocks(model)
    _check_blocks(found)
    for index, patch in patches.items():
        width = patch.delta.shape[-1]
        own = found[0].sites["mlp_out"].d_out
        if not 0 <= index < len(found) or own != width:
            raise ThoughtError(
                f"patches: expected those of this model ({len(found)} blocks, width {own}), "
                f"got block {index} of width {width}. Apply them to the model they were made for."
            )
    with ExitStack() as stack:
        stack.enter_context(uncompiled(bare_model(model)))
        for index in patches:
            _register(stack, _patch_hooks(found[index], patches))
        yield model


class TokenRuns:
    """The plain and the instructed run of one instruction and text, and the patches between them.

    Creating one checks every argument and runs nothing; the arguments are :func:`token_patches`'s.

    Attributes:
        blocks: every block of the model; ``chosen``: indices of those to patch.
        output: where δ_x goes.
        plain_ids, instructed_ids: tokens of the two runs, (n,) and (length,).
        target_positions: counterparts of the plain tokens in the instructed run, (n,).
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        instruction: str,
        text: str,
        blocks: Sequence[int] | None = None,
        output: Output | None = None,
        tokens: int | None = None,
    ) -> None:
        model = self.model = bare_model(model)
        tokenizer = check_tokenizer(tokenizer)
        self.blocks = find_blocks(model)
        _check_blocks(self.blocks)
        self.chosen = check_blocks(blocks, len(self.blocks)) or list(range(len(self.blocks)))
        self.output = _check_output(output, self.blocks)
        check_texts(instruction, text, tokens)
        pair = _TEMPLATE.tokenise(tokenizer, instruction, text)
        shift = len(pair.instructed_ids) - len(pair.plain_ids)
        positions = ([shift] if pair.sink else []) + list(pair.instructed_positions)
        head = sum(position == index for index, position in enumerate(positions))  # BOS
        count = len(positions) - head
        if count < 2:
            raise ThoughtError(f"text: expected at least 2 tokens, got {count} in {text!r}. Pass a longer text.")
        positions = positions[: head + min(count, tokens or count)]
        length = positions[-1] + 1
        limit = context_window(model)
        if length > limit:
            raise ThoughtError(
                f"text: expected instruction and text to have at most {limit} tokens together (the model's context "
                f"window), got {length}, {shift} of them the instruction. Shorten them, or use fewer tokens."
            )
        self.plain_ids = torch.tensor(pair.plain_ids[: len(positions)], device=model.device)
        self.instructed_ids = torch.tensor(pair.instructed_ids[:length], device=model.device)
        self.target_positions = torch.tensor(positions, device=model.device)

    def instructed(self) -> Trace:
        """The instructed run, read at the counterparts of the plain tokens."""
        return self._run(self.instructed_ids, self.target_positions)

    def plain(self, entrances: Sequence[Tensor] | None = None) -> Trace:
        """The plain run of the model as it is now.

        Args:
            entrances: (n, d) by block, to replace each block's input with; such a run has no logits.
        """
        return self._run(self.plain_ids, slice(None), entrances, head=entrances is None)

    def construct(self, target: Trace, entrances: Sequence[Tensor] | None = None) -> dict[int, TokenPatches]:
        """The patches that make the plain run, with ``entrances`` as in :meth:`plain`, put out what ``target`` did."""
        patches: dict[int, TokenPatches] = {}
        with ExitStack() as stack:
            for index in self.chosen:
                _register(stack, self._construct_hooks(self.blocks[index], target, patches))
                _register(stack, _patch_hooks(self.blocks[index], patches))
            self._run(self.plain_ids, slice(None), entrances, head=False)
        return patches

    def _construct_hooks(
        self, block: Block, target: Trace, patches: dict[int, TokenPatches]
    ) -> Iterator[tuple[nn.Module, Any]]:
        """Hooks that put the block's patches into ``patches`` while the plain run passes through it."""

        def read(module: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> None:
            wide = wider(output.dtype)
            m, a = given[0][0].to(wide), output[0].to(wide)
            delta_a, delta = target.inputs[block.index].to(wide) - a, target.residuals[block.index].to(wide) - m
            patches[block.index] = TokenPatches(block.index, self.plain_ids, self.target_positions, a, delta_a, delta)

        assert block.mlp_norm is not None
        yield block.mlp_norm, read
        if self.output == "norm_scale" and block.output_norm is not None:
            unscaled = _unscaled(block.output_norm)

            def scale(module: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> None:
                patch = patches[block.index]
                change = patch.delta / unscaled(given[0].to(patch.delta))[0]
                patches[block.index] = replace(patch, norm_scale=torch.where(change.isfinite(), change, 0))

            yield block.output_norm, scale

    @torch.no_grad()
    def _run(
        self, ids: Tensor, rows: Tensor | slice, entrances: Sequence[Tensor] | None = None, head: bool = True
    ) -> Trace:
        """One forward pass over one sequence, read at ``rows``."""
        trace = Trace([], [], [], [])

        def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            hidden = hidden_of(args, kwargs)
            if entrances is not None:
                hidden = entrances[len(trace.entrances)][None]
            trace.entrances.append(hidden[0, rows])
            return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})

        def norm(module: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> None:
            trace.residuals.append(given[0][0, rows])
            trace.inputs.append(output[0, rows])

        def leave(module: nn.Module, given: tuple[Any, ...], output: Any) -> None:
            trace.outputs.append(unwrapped(output)[0, rows])

        with ExitStack() as stack:
            for block in self.blocks:
                stack.callback(block.module.register_forward_pre_hook(enter, with_kwargs=True).remove)
                _register(stack, [(block.mlp_norm, norm), (block.module, leave)])
            output = (self.model if head else find_decoder(self.model))(input_ids=ids[None], use_cache=False)
        trace.logits = output.logits[0, rows] if head else None
        return trace


def _patch_hooks(block: Block, patches: Mapping[int, TokenPatches]) -> Iterator[tuple[nn.Module, Any]]:
    """Forward hooks that make the block's layers put out what they would with ``patches[block.index]``."""

    def hook(change: Callable[[TokenPatches, nn.Module, Tensor], Tensor]) -> Any:
        def add(module: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> Tensor:
            patch = patches[block.index]
            if output.shape[:-1] != (1, len(patch.delta)):
                raise ThoughtError(
                    f"the patches of block {block.index} belong to one sequence of {len(patch.delta)} tokens, but the "
                    f"model was run on {tuple(output.shape[:-1])}. Run it on token_ids[None] in one pass."
                )
            return (output + change(patch, module, given[0].to(patch.delta))).to(output.dtype)

        return add

    def first_linear(patch: TokenPatches, layer: nn.Module, x: Tensor) -> Tensor:
        return (patch.keys * x).sum(-1, keepdim=True) * patch.values(weight_of(layer))

    for layer in block.firsts.values():
        yield layer, hook(first_linear)
    if block.output_norm is None:
        yield block.sites["mlp_out"].layer, hook(lambda patch, layer, x: patch.delta)
        return
    unscaled = _unscaled(block.output_norm)
    yield (
        block.output_norm,
        hook(lambda patch, norm, x: patch.delta if patch.norm_scale is None else patch.norm_scale * unscaled(x)),
    )


def _unscaled(norm: nn.Module) -> Callable[[Tensor], Tensor]:
    """A norm without its scale: x ↦ ĥ, whether the scale is the weight or, as in Gemma, 1 + weight.

    Its output is affine in the weight, so ĥ is the difference of its outputs at weights 1 and 0; nothing is divided.
    """
    ones, zeros = copy.deepcopy(norm), copy.deepcopy(norm)
    for module, value in ((ones, 1.0), (zeros, 0.0)):
        assert isinstance(module.weight, Tensor)
        nn.init.constant_(module.weight, value)
    return lambda x: ones.forward(x) - zeros.forward(x)


def _register(stack: ExitStack, hooks: Any) -> None:
    """Register (module, forward hook) pairs until ``stack`` closes."""
    for module, hook in hooks:
        stack.callback(module.register_forward_hook(hook).remove)


def check_texts(instruction: str, text: str, tokens: int | None) -> None:
    """Check what can be checked of :func:`token_patches`'s arguments without a model.

    Raises:
        ThoughtError: for a blank instruction or text, or a ``tokens`` below 2.
    """
    for name, value in (("instruction", instruction), ("text", text)):
        if not isinstance(value, str) or not value.strip():
            raise ThoughtError(f"{name}: expected a string that is not blank, got {value!r}.")
    if tokens is not None and (type(tokens) is not int or tokens < 2):
        raise ThoughtError(f"tokens={tokens!r}; expected a whole number of 2 or more, or None for the whole text.")


def _check_blocks(blocks: Sequence[Block]) -> None:
    """Refuse models with a block that does not end with ``o = m + norm(MLP(norm(m)))``, with or without that norm."""
    for block in blocks:
        site = block.sites.get("mlp_out")
        ends = site is not None and site.point is None and site.projections[0].multiplier == 1
        if not block.firsts or block.mlp_norm is None or not ends:
            why = block.missing.get("mlp_in", "what its MLP puts out is scaled, or is not the end of the block")
            raise UnsupportedModelError(
                f"not supported: exact patches of block {block.index}: {why}. transmute works on this model."
            )


def _check_output(output: Output | None, blocks: Sequence[Block]) -> Output:
    post_norm = blocks[0].output_norm is not None
    if output is None:
        return "norm_scale" if post_norm else "vector"
    if output not in ("vector", "norm_scale"):
        raise ThoughtError(f"output={output!r}; expected 'vector', 'norm_scale' or None (what suits the model).")
    if output == "norm_scale" and not post_norm:
        raise ThoughtError(
            "output='norm_scale' needs a norm after the MLP: these blocks have none. Pass output='vector'."
        )
    return output
