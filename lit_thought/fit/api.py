"""One call from a model, an instruction and some inputs to a thought patch."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lit_thought.errors import ThoughtError, is_finite
from lit_thought.fit.callback import ThoughtCallback
from lit_thought.fit.data import PairDataModule
from lit_thought.fit.fitting import fit
from lit_thought.fit.module import ThoughtModule
from lit_thought.fit.selection import AUTO, check_auto, select_settings
from lit_thought.patch.patch import ThoughtPatch
from lit_thought.prompts.template import DEFAULT_TEMPLATE, PromptTemplate
from lit_thought.prompts.unrelated import TextSource

__all__ = ["fit", "transmute"]

ModelLoader = Callable[[], tuple[PreTrainedModel, PreTrainedTokenizerBase]]


def transmute(
    model: PreTrainedModel | ModelLoader,
    tokenizer: PreTrainedTokenizerBase | None = None,
    instruction: str | None = None,
    pairs: str | os.PathLike[str] | Sequence[Mapping[str, Any]] = (),
    template: str | PromptTemplate = DEFAULT_TEMPLATE,
    *,
    sites: Sequence[str] | None = None,
    parts: Sequence[str] | None = None,
    blocks: Literal["auto"] | Sequence[int] | None = None,
    order: Literal["sequential", "teacher-forced"] = "sequential",
    steps: int | None = None,
    step_size: float | None = None,
    pairs_per_step: int | None = None,
    passes: int = 1,
    rank: int | float | Literal["auto"] | None = 16,
    ridge: float | Literal["auto"] = 3e-2,
    scale: float | Literal["auto"] = 1.0,
    preserve: TextSource | None = "default",
    preserve_weight: float | Literal["auto"] | None = None,
    preserve_tokens: int = 12_000,
    answer_weight: float | None = None,
    generate: Mapping[str, Any] | None = None,
    max_new_tokens: int = 64,
    batch_size: int = 32,
    val_pairs: str | os.PathLike[str] | Sequence[Mapping[str, Any]] | None = None,
    statistics_dtype: Literal["float32", "float64"] = "float64",
    offload: Literal["auto", "device", "cpu", "disk"] | bool = "auto",
    memory_budget: float | None = None,
    resume_dir: str | os.PathLike[str] | None = None,
    statistics_dir: str | os.PathLike[str] | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    store_instruction: bool = True,
    progress: bool = True,
    seed: int = 0,
) -> ThoughtPatch:
    """Find the change of weights that makes the plain prompt behave like the instructed one.

    Thin: a ``Trainer.fit`` of :class:`~lit_thought.fit.module.ThoughtModule` over
    :class:`~lit_thought.fit.data.PairDataModule` with :class:`~lit_thought.fit.callback.ThoughtCallback`; the arguments
    are theirs. The model is left bit for bit as it was.

    Args:
        model: a frozen causal LM of transformers (``lit-thought inspect`` says what it finds in one), in any floating
            dtype or quantised; or a function without arguments that loads and returns (model, tokenizer), called once
            all other arguments have been checked.
        tokenizer: its tokenizer; left out when ``model`` is such a function.
        instruction: the removable chunk of the prompt.
        pairs: inputs, with outputs where you have them; see :class:`~lit_thought.fit.data.PairDataModule`.
        template: how instruction, input and output make a prompt.
        sites: where to patch each block: attn_out, mlp_in, mlp_out or several of them; left out, attn_out and mlp_out
            wherever a block has them.
        parts: what to solve for, matrix, vector or both; left out, a matrix, and at mlp_in a vector too.
        blocks: indices of the blocks to patch; all when left out.
        order: sequential (each block sees the blocks patched so far) or teacher-forced (the instructed run).
        steps: how often to go through the blocks, the patch so far in place; left out, 1, and 2 for mlp_in alone.
        step_size: how much of each step's solution is added, in (0, 1]; left out, 1, and 0.5 for mlp_in alone.
        pairs_per_step: pairs that a step is solved from, the next ones in turn; all pairs when left out.
        passes: how often to solve a site whose output goes through a norm (Gemma, OLMo 2); others are solved once.
        rank: rank of the patch: an integer, a fraction of explained energy in (0, 1), or None for full rank.
        ridge: λ ≥ 0, relative to the mean eigenvalue of the Gram matrix.
        scale: what to multiply the patch by. This, blocks, rank, ridge and preserve_weight can be "auto": chosen on a
            quarter of the pairs, held back first (lit_thought.fit.selection); the fit is then of all of them.
        preserve: unrelated text to leave alone: a text file, a list of texts, "default" (shipped text) or None; or a
            .safetensors file of this model's preservation statistics, from lit-thought preserve.
        preserve_weight: ρ ≥ 0, weight of the unrelated text against the pairs; left out, 3, and 1 for mlp_in alone.
        preserve_tokens: most tokens of unrelated text to use; a file of statistics has its own.
        answer_weight: weight of the output's tokens and the token before them, others weigh 1; left out, 10, and 100
            for mlp_in alone.
        generate: options of model.generate for outputs that are missing; greedy when left out.
        max_new_tokens: longest output that the instructed model may write.
        batch_size: pairs a batch; the patch does not depend on it.
        val_pairs: pairs to follow the fit with, step by step (in the patch's provenance, as history).
        statistics_dtype: dtype of the sums, float64 or float32; the solve is always float64.
        offload: where the streams are kept between uses: device (also False), cpu (main memory; also True), disk (a
            temporary file) or auto, the first of them where they fit; the patch is the same.
        memory_budget: GB that the fit may take besides the model; left out, 0.8 of what is free. A fit that cannot
            keep to it is refused before it starts.
        resume_dir: folder for the finished stages of this fit; interrupted, the same call goes on from there.
        statistics_dir: folder to keep the statistics of every stage in, to solve again at other settings.
        cache_dir: where each model's preservation statistics are kept ($LIT_THOUGHT_CACHE, ~/.cache/lit_thought).
        store_instruction: keep the instruction in the patch's record, and so in adapter, statistics and report. False
            keeps a salted hash of it, with which an evaluation checks the one that it is given. The template is kept.
        progress: show progress bars.
        seed: seed of the generated outputs, where they are sampled, and of which pairs "auto" holds back.

    Returns:
        The patch, not applied.

    Raises:
        ThoughtError: for bad input, before any long work.

    Example:
        >>> patch = transmute(model, tokenizer, "Answer with the opposite.\\n", [{"input": "hot"}])  # doctest: +SKIP
        >>> patch.save_adapter("antonym/")  # doctest: +SKIP
    """
    settings: dict[str, Any] = {
        "sites": sites,
        "parts": parts,
        "blocks": blocks,
        "order": order,
        "steps": steps,
        "step_size": step_size,
        "pairs_per_step": pairs_per_step,
        "passes": passes,
        "rank": rank,
        "ridge": ridge,
        "preserve": preserve,
        "preserve_weight": preserve_weight,
        "preserve_tokens": preserve_tokens,
        "statistics_dtype": statistics_dtype,
        "offload": offload,
        "memory_budget": memory_budget,
        "resume_dir": resume_dir,
        "statistics_dir": statistics_dir,
        "cache_dir": cache_dir,
        "store_instruction": store_instruction,
    }
    choices = {**settings, "scale": scale}
    auto = [name for name in AUTO if isinstance(choices[name], str) and choices[name] == "auto"]
    callback = ThoughtCallback(**{name: value for name, value in settings.items() if name not in auto})
    if scale != "auto" and not is_finite(scale):
        raise ThoughtError(f'scale must be a finite number or "auto"; got {scale!r}.')
    data = PairDataModule(
        pairs,
        instruction,
        template,
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        generate=generate,
        seed=seed,
        answer_weight=answer_weight,
        val_pairs=val_pairs,
    )
    if auto:
        check_auto(auto, len(data.pairs), settings)
    if not isinstance(model, PreTrainedModel) and callable(model):
        model, tokenizer = model()
    module = ThoughtModule(model, tokenizer)
    if not auto:
        patch = fit(module, data, callback, progress=progress)
        return patch if scale == 1 else scale * patch
    known = {} if scale == "auto" else {"scale": scale}
    chosen = select_settings(module, data, auto, seed=seed, progress=progress, **known, **settings)
    data.known = chosen.outputs
    patch = fit(module, data, ThoughtCallback(**chosen.settings), progress=progress)
    patch.provenance["selection"] = chosen.record
    return patch if chosen.scale == 1 else chosen.scale * patch
