"""The patch as users have it: a change, with the methods that put it on a model and that read and write its files."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Self, Unpack

import torch
from huggingface_hub import CommitInfo
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lit_thought.patch import adapter, control_vector, hub, weights
from lit_thought.patch.change import Change

if TYPE_CHECKING:
    from lit_thought.patch.chat import Chat, ChatOptions

__all__ = ["ThoughtPatch"]


class ThoughtPatch(Change):
    """A patch to put on models, to save and to share.

    What it holds, its arguments and its algebra (``0.5 * patch``, ``patch_a + patch_b``, ``truncate``) are those of
    :class:`~lit_thought.patch.change.Change`. All methods that make or read a patch return one of this class.
    """

    # On a model

    def validate(self, model: nn.Module, check: bool = True) -> None:
        """Check that the patch fits ``model``, changing nothing.

        Args:
            model: the model whose module paths the patch names.
            check: also compare fingerprints, where the patch has one: is this the model it was made for?
                Patches that are on ``model`` now do not count as a change of it; one that was fitted while others
                were on asks for these.

        Raises:
            PatchError: on a missing module, one that is no linear layer, a wrong shape, a weight or bias that is
                shared, sharded other than by rows, or not loaded, or another model.
        """
        weights.validate(self, model, check)

    def apply_(self, model: nn.Module, check: bool = True) -> None:
        """Add the patch to the model's weights and biases, in place; ``remove_`` takes it off again.

        Every target is checked before the first weight changes, and a failure midway puts all of them back.
        The sum is computed in float32 (float64 for float64 weights) and rounded to the weight's dtype once.
        Patches stack: one that is fitted while others are on is made for the model with these, and goes on after
        them, on top (or with them, as their sum); they come off in any order.
        One copy of each touched weight and bias is kept until the last patch on it is removed. While a patch is
        on, do not change what it touches by other means: removal would undo that change too.

        A layer without a bias that gets a vector has one while such a patch is on, in the dtype of its weight, and
        ``bias=None`` again after. Do not ``save_pretrained`` the model meanwhile: its config knows of no such bias,
        so loading would drop it. Save the patch instead.

        A quantised layer (bitsandbytes, GPTQ, AWQ, HQQ, FP8, torchao and so on) keeps its weight, and the patch sits
        *beside* it: a forward hook computes ``B (A x)`` and adds it, and the vector, to the layer's output in float32,
        rounded to the output's dtype once for all patches there. Removing the last of them removes the hook. A model
        with such layers that is compiled: apply first, compile after, as compiled code runs no hook that is new to it.

        Args:
            model: the model to change; in the wrappers that come off by :func:`~lit_thought.model.bare.unwrap`, too.
            check: refuse a model with another fingerprint than the one the patch was made for.

        Raises:
            PatchError: see ``validate``; also if this patch, or its equal, is applied already, or a sum would leave the
                range of the weight's dtype (float16's ends at 65504).
        """
        weights.apply(self, model, check)

    def remove_(self, model: nn.Module) -> None:
        """Take the patch off again. Weights and biases are then, bit for bit, as if it had never been applied.

        Patches applied before or after it stay on, in their order. Its equal does as well as the patch itself, such as
        the same adapter loaded once more.

        Raises:
            PatchError: if this patch is not applied to ``model``.
        """
        weights.remove(self, model)

    def applied(self, model: nn.Module, check: bool = True) -> AbstractContextManager[nn.Module]:
        """Apply for the length of a ``with`` block; leaving it, by an exception too, removes the patch."""
        return weights.applied(self, model, check)

    def chat(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, **options: Unpack[ChatOptions]) -> Chat:
        """Talk to the model: :meth:`~lit_thought.patch.chat.Chat.ask` answers plain, instructed and patched.

        Args:
            model: the model that the patch was made for, without it.
            tokenizer: its tokenizer.
            options: ``instruction``, ``template`` and ``max_new_tokens``: see :class:`~lit_thought.patch.chat.Chat`,
                also for what is raised.
        """
        from lit_thought.patch.chat import Chat

        return Chat(self, model, tokenizer, **options)

    # On disk and on the hub

    @classmethod
    def load(cls, path: str | os.PathLike[str], model: nn.Module | None = None) -> Self:
        """Read an adapter folder; with ``model``, also check that the patch fits it (see ``validate``)."""
        return cls._of(adapter.read_adapter(path), model)

    def save_adapter(
        self, path: str | os.PathLike[str], overwrite: bool = False, dtype: torch.dtype = torch.float32
    ) -> None:
        """Write a PEFT adapter folder (see :func:`lit_thought.patch.adapter.write_adapter`)."""
        adapter.write_adapter(self, path, overwrite=overwrite, dtype=dtype)

    @classmethod
    def load_control_vector(cls, path: str | os.PathLike[str], model: PreTrainedModel) -> Self:
        """Read llama.cpp's form of thought vectors (see
        :func:`lit_thought.patch.control_vector.read_control_vector`)."""
        return cls._of(control_vector.read_control_vector(path, model))

    def save_control_vector(
        self, path: str | os.PathLike[str], model: PreTrainedModel, overwrite: bool = False, check: bool = True
    ) -> None:
        """Write llama.cpp's form of thought vectors (see
        :func:`lit_thought.patch.control_vector.write_control_vector`)."""
        control_vector.write_control_vector(self, path, model, overwrite=overwrite, check=check)

    @classmethod
    def from_pretrained(
        cls,
        repo_id_or_path: str | os.PathLike[str],
        model: nn.Module | None = None,
        **options: Unpack[hub.FetchOptions],
    ) -> Self:
        """Read an adapter from a repository on the hub, or from a folder as ``load`` does.

        Args:
            repo_id_or_path: ``owner/name``, or a folder, which comes first.
            model: also check that the patch fits it (see ``validate``).
            options: ``revision``, ``token``, ``cache_dir``, ``local_files_only`` and ``subfolder``: see
                :func:`lit_thought.patch.hub.adapter_folder`, also for what is raised.
        """
        return cls._of(hub.fetch_adapter(repo_id_or_path, **options), model)

    def push_to_hub(
        self, repo_id: str, dtype: torch.dtype = torch.float32, **options: Unpack[hub.PushOptions]
    ) -> CommitInfo:
        """Share the patch as a PEFT adapter in a repository on the hub.

        Args:
            repo_id: ``owner/name``; made if there is none.
            dtype: of the stored factors and vectors.
            options: ``private``, ``token``, ``revision``, ``commit_message``, ``create_pr``, ``license``, ``language``,
                ``base_model`` and ``evaluation``: see :func:`lit_thought.patch.hub.push_adapter`, also for what is
                raised.
        """
        return hub.push_change(self, repo_id, dtype, **options)

    @classmethod
    def _of(cls, change: Change, model: nn.Module | None = None) -> Self:
        patch = cls(change.factors, change.provenance, change.vectors)
        if model is not None:
            patch.validate(model)
        return patch
