"""One call from a model and an instruction to a thought patch."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lit_thought.errors import ThoughtError
from lit_thought.fit.callback import ThoughtCallback
from lit_thought.fit.data import PairDataModule
from lit_thought.fit.fitting import fit
from lit_thought.fit.growing import grow
from lit_thought.fit.module import ModelLoader, ThoughtModule
from lit_thought.fit.selection import OF_THE_LAST_FIT, check_auto, select_settings
from lit_thought.patch.patch import ThoughtPatch
from lit_thought.patch.provenance import plain_json
from lit_thought.prompts.template import PromptTemplate
from lit_thought.settings import FitSettings, takes_settings

__all__ = ["transmute"]


@takes_settings()
def transmute(
    model: str | os.PathLike[str] | ModelLoader | PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None = None,
    instruction: str | None = None,
    pairs: str | os.PathLike[str] | Sequence[Mapping[str, Any]] | None = None,
    template: str | PromptTemplate | None = None,
    *,
    val_pairs: str | os.PathLike[str] | Sequence[Mapping[str, Any]] | None = None,
    output_dir: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    progress: bool = True,
    **settings: Any,
) -> ThoughtPatch:
    """Find the change of weights that makes the plain prompt behave like the instructed one.

    Thin: a ``Trainer.fit`` of :class:`~lit_thought.fit.module.ThoughtModule` over
    :class:`~lit_thought.fit.data.PairDataModule` with :class:`~lit_thought.fit.callback.ThoughtCallback`. The model is
    left bit for bit as it was.

    Args:
        model: a frozen causal LM of transformers (``lit-thought inspect`` says what it finds in one), in any floating
            dtype or quantised, compiled or not (it runs uncompiled here, and is compiled again after); or a name that
            :func:`~lit_thought.model.loading.load_model` takes, or a function without arguments that returns (model,
            tokenizer): these load it once all other arguments have been checked. What else is refused:
            :func:`~lit_thought.model.bare.bare_model`.
        tokenizer: its tokenizer; left out where the model is loaded.
        instruction: the removable chunk of the prompt.
        pairs: inputs, with outputs where you have them; left out, the model writes them itself, and beside given ones
            as many as ``inputs`` says; see :class:`~lit_thought.fit.data.PairDataModule`.
        template: how instruction, input and output make a prompt; see there, too.
        val_pairs: pairs to follow the fit with, step by step (in the patch's provenance, as history).
        output_dir: folder to write the adapter to at the end; not written when left out.
        overwrite: replace ``output_dir``, and ``statistics_dir``, if they exist.
        progress: show progress bars.
        settings: those of :class:`~lit_thought.settings.FitSettings`. blocks, rank, ridge, scale and preserve_weight
            can be ``"auto"``: chosen on a quarter of the pairs, held back first (:mod:`lit_thought.selection`); the
            fit is then of all of them. With ``inputs="auto"`` the model writes and fits as many as help on others
            (:mod:`lit_thought.fit.growing`).

    Returns:
        The patch, not applied.

    Raises:
        ThoughtError: for bad input, before any long work.

    Example:
        >>> patch = transmute(model, tokenizer, "Answer with the opposite.\\n", [{"input": "hot"}])  # doctest: +SKIP
        >>> patch.save_adapter("antonym/")  # doctest: +SKIP
    """
    chosen = FitSettings(**settings)
    auto, options = chosen.auto, chosen.options(data=False)
    callback = ThoughtCallback(
        output_dir=output_dir,
        overwrite=overwrite,
        **{name: value for name, value in options.items() if name not in auto},
    )
    data = PairDataModule(pairs, instruction, template, val_pairs=val_pairs, **chosen.options(data=True))
    if auto:
        check_auto(auto, data.expected, options)
    if chosen.inputs == "auto" and chosen.pairs_per_step is not None and chosen.pairs_per_step > data.expected // 2:
        raise ThoughtError(
            f'pairs_per_step={chosen.pairs_per_step}: with inputs="auto" the first fits have fewer pairs than there '
            "will be. Leave it out, or give a number of inputs."
        )
    module = ThoughtModule(model, tokenizer)
    if auto or chosen.inputs == "auto":  # else the fit does, before anything is written
        callback.check(module, data, preserved=True)
    told: dict[str, Any] = {}
    patch: ThoughtPatch | None = None
    if data.to_write and chosen.inputs == "auto":
        usual = {name: value for name, value in options.items() if name not in (*auto, *OF_THE_LAST_FIT)}
        grown = grow(module, data, lambda: ThoughtCallback(**usual), progress)
        data, told["growth"] = grown.data, grown.provenance
        if not any(options.get(name) for name in (*auto, *OF_THE_LAST_FIT)):
            patch = grown.patch
    if auto:
        selection = select_settings(module, data, auto, seed=chosen.seed, progress=progress, **options)
        data.known, told["selection"] = selection.outputs, selection.provenance
        callback = ThoughtCallback(output_dir=output_dir, overwrite=overwrite, **selection.settings)
    if patch is None:
        callback.told = told
        return fit(module, data, callback, progress=progress)
    patch.provenance |= plain_json(told)
    if output_dir is not None:
        patch.save_adapter(output_dir, overwrite=overwrite)
    return patch
