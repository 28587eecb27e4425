"""Instruction/input pairs as a LightningDataModule."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain, repeat
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, IterableDataset
from transformers import PreTrainedTokenizerBase

from lit_thought.errors import ThoughtError
from lit_thought.inputs.kinds import find_kind, find_template, is_long
from lit_thought.inputs.write import ENOUGH
from lit_thought.prompts.alignment import TokenisedPair, check_context
from lit_thought.prompts.batches import PairBatch, make_batches
from lit_thought.prompts.pairs import load_pairs, pair_instructions
from lit_thought.prompts.template import DEFAULT_TEMPLATE, PromptTemplate
from lit_thought.runs.generate import check_options
from lit_thought.settings import FitSettings, outputs_for, register_paths, takes_settings
from lit_thought.statistics.distributed import gather_json, share

__all__ = ["PairDataModule", "Written"]

Written = tuple[int, str, bool]
"""An output that the instructed model wrote: index of the pair, text, and whether it came to an end by itself."""

register_paths()


class PairDataModule(LightningDataModule):
    """Pairs of an instruction and an input, with or without the output.

    Each pair becomes two token sequences, with the instruction (the target run) and without it (the plain run), whose
    common tokens are compared. Where a pair has no output, the instructed model writes it: the callback sees to that
    and tells :meth:`complete`; this class runs no model.

    Where there are fewer pairs than ``inputs`` says, or none at all, the model writes the others
    (:mod:`lit_thought.inputs`); likewise the callback sees to that, and tells :meth:`add`.

    Args:
        pairs: a list of mappings, or a JSON, JSONL or CSV file, with the keys ``input``, ``output`` (optional)
            and ``instruction`` (optional, overrides the argument); None to have all of them written.
        instruction: the removable chunk of the prompt.
        template: a text with ``{input}`` and ``{output}`` (and ``{instruction}`` where the chunk is not at the
            start), ``"chat"``, ``"chat-empty"``, ``"chat-user"`` or a
            :class:`~lit_thought.prompts.template.PromptTemplate`; left out,
            :data:`~lit_thought.prompts.template.DEFAULT_TEMPLATE`, and where no pairs are given ``"chat"`` if the model
            has a chat template and the instruction is no list in the default template's form.
        val_pairs: pairs to follow the fit with, step by step; nothing is fitted on them, and the model writes none of
            their inputs.
        settings: answer_weight, batch_size, generate, inputs, kind, max_new_tokens and seed of
            :class:`~lit_thought.settings.FitSettings`.

    Attributes:
        settings: these, as a :class:`~lit_thought.settings.FitSettings`.
        given: the pairs that were given.
        given_template: their template, None where it is found with the inputs that are written.
        pairs: these, and those that were written, once :meth:`add` has run.
        kind: what the instruction was taken for, where inputs were written; else None.
        known: missing outputs that were written before; None to have them written.
        tokenised: the pairs as tokens: their prompts after :meth:`tokenise`, with all outputs after :meth:`complete`.
        written: the outputs that were written, once :meth:`complete` has run.
        outputs: the output of each pair, given or written, likewise.
        batches: the padded batches of this process's share of the pairs that :meth:`select` chose.
        num_batches: the largest number of batches of any process, likewise.

    Raises:
        ThoughtError: for pairs, an instruction or settings that cannot be used.
    """

    @takes_settings(data=True)
    def __init__(
        self,
        pairs: str | os.PathLike[str] | Sequence[Mapping[str, Any]] | None,
        instruction: str | None = None,
        template: str | PromptTemplate | None = None,
        *,
        val_pairs: str | os.PathLike[str] | Sequence[Mapping[str, Any]] | None = None,
        **settings: Any,
    ) -> None:
        super().__init__()
        self.settings = FitSettings(**settings)
        self.kind: str | None = None
        self.given = [] if pairs is None else load_pairs(pairs)
        self.pairs = list(self.given)
        self.instructions = pair_instructions(self.pairs, instruction)
        self._check_inputs(instruction)
        with _about_val_pairs():
            self.val_pairs = load_pairs(val_pairs) if val_pairs is not None else []
            self.val_instructions = pair_instructions(self.val_pairs, instruction)
        self._defaulted = template is None and bool(self.given)
        if self._defaulted:
            template = DEFAULT_TEMPLATE
        self.given_template = None if template is None else PromptTemplate.parse(template)
        self._template = self.given_template
        check_options(self.settings.generate)
        self.instruction = instruction
        self.known: list[Written] | None = None
        self.written: list[Written] = []
        self.outputs: list[str] = []
        self.tokenised: list[TokenisedPair] = []
        self.batches: list[PairBatch] = []
        self.num_batches = 0

    def _check_inputs(self, instruction: str | None) -> None:
        """Refuse fewer inputs than there are pairs, and inputs to write for no instruction."""
        wanted = self.settings.inputs
        if isinstance(wanted, int) and wanted < len(self.given):
            raise ThoughtError(
                f"inputs={wanted} is fewer than the {len(self.given)} pairs that are given. Give fewer pairs, or leave "
                "inputs out to fit all of them."
            )
        if self.to_write and (not isinstance(instruction, str) or not instruction.strip()):
            raise ThoughtError(
                f"instruction must be a text that is not empty, for which the model writes inputs; got "
                f"{instruction!r}. Give it, or pairs that have their own."
            )

    @property
    def to_write(self) -> bool:
        """Whether inputs are to be written, and have not been."""
        wanted = self.settings.inputs
        return self.kind is None and (
            not self.given or wanted == "auto" or (isinstance(wanted, int) and wanted > len(self.given))
        )

    def form(self, tokenizer: PreTrainedTokenizerBase) -> str | None:
        """What the instruction is, where that was said, or inputs were or will be written for it; else None."""
        if not self.to_write or self.settings.kind is not None:
            return self.kind or self.settings.kind
        assert self.instruction is not None
        template = find_template(tokenizer, self.instruction, self.given_template)
        return find_kind(tokenizer, self.instruction, template)

    def is_chat(self, tokenizer: PreTrainedTokenizerBase) -> bool:
        """Whether prompts go through the chat template, also where that is found with the inputs to be written."""
        if not self.to_write:
            return self.template.is_chat
        assert self.instruction is not None
        return find_template(tokenizer, self.instruction, self.given_template).is_chat

    def is_long(self, tokenizer: PreTrainedTokenizerBase) -> bool:
        """Whether the instruction is much to know, where its :meth:`form` is known: a document, or a long system
        prompt."""
        kind, text = self.form(tokenizer), self.instruction
        return kind == "document" or (kind == "system" and text is not None and is_long(tokenizer, text))

    def longest(self, tokenizer: PreTrainedTokenizerBase) -> int:
        """The most tokens of an output that the instructed model writes."""
        own = self.settings.max_new_tokens
        return outputs_for(self.is_long(tokenizer)) if own is None else own

    @property
    def expected(self) -> int:
        """How many pairs there will be, about, with those that are still to be written."""
        wanted = self.settings.inputs
        usual = min(ENOUGH.values())
        return len(self.pairs) if not self.to_write else wanted if isinstance(wanted, int) else usual

    def check_step(self, count: int | None, tokenizer: PreTrainedTokenizerBase) -> None:
        """Refuse more pairs in a step than there are, or will be, where that is known yet.

        Raises:
            ThoughtError: naming ``pairs_per_step``.
        """
        there: int | None = self.expected
        if self.to_write and not isinstance(self.settings.inputs, int):
            there = None if self.is_long(tokenizer) else ENOUGH.get(self.form(tokenizer) or "")
        if count is not None and there is not None and count > there:
            raise ThoughtError(
                f"pairs_per_step={count} is more than the {there} pairs there are. Leave it out to use all of them in "
                "every step."
            )

    @property
    def template(self) -> PromptTemplate:
        """How instruction, input and output make a prompt.

        Raises:
            ThoughtError: where that depends on the model, and no input has been written yet.
        """
        if self._template is None:
            raise ThoughtError("PairDataModule has no template yet: it comes with the inputs that the model writes.")
        return self._template

    def add(self, written: Sequence[Mapping[str, str]], template: PromptTemplate, kind: str) -> None:
        """Take inputs that were written for :attr:`instruction`.

        Args:
            written: pairs, with outputs or without.
            template: how they make a prompt.
            kind: what the instruction was taken for.
        """
        self.pairs = [*self.given, *map(dict, written)]
        self.instructions = pair_instructions(self.pairs, self.instruction)
        self._template, self.kind = template, kind

    def inputs(self) -> dict[str, Any] | None:
        """What :meth:`add` took, as JSON values for :meth:`restore`; None where nothing was written."""
        if self.kind is None:
            return None
        return {"pairs": self.pairs[len(self.given) :], "template": self.template.to_dict(), "kind": self.kind}

    def restore(self, inputs: Mapping[str, Any]) -> None:
        """Take what :meth:`inputs` gave."""
        self.add(inputs["pairs"], PromptTemplate.from_dict(inputs["template"]), inputs["kind"])

    @property
    def missing(self) -> list[int]:
        """Indices of the pairs without an output."""
        return [i for i, pair in enumerate(self.pairs) if "output" not in pair]

    def tokenise(self, tokenizer: PreTrainedTokenizerBase, limit: int) -> None:
        """Tokenise every prompt, with its output where it has one, before any long work.

        Args:
            tokenizer: the model's tokenizer.
            limit: tokens that the context window holds.

        Raises:
            ThoughtError: when one overflows the context window, counting what may yet be generated.
        """
        self.tokenised = self._tokenised(tokenizer, self.template, limit)

    def check_given(self, tokenizer: PreTrainedTokenizerBase, limit: int) -> None:
        """Refuse given and validation pairs that :meth:`tokenise` would, before inputs are written beside them.

        Raises:
            ThoughtError: as there.
        """
        assert self.instruction is not None
        self._tokenised(tokenizer, find_template(tokenizer, self.instruction, self.given_template), limit)

    def _tokenised(
        self, tokenizer: PreTrainedTokenizerBase, template: PromptTemplate, limit: int
    ) -> list[TokenisedPair]:
        longest, found = self.longest(tokenizer), []
        if self.pairs:  # without an output, too, as it will be asked
            template.tokenise(tokenizer, self.instructions[0], self.pairs[0]["input"])
        for index, (pair, instruction) in enumerate(zip(self.pairs, self.instructions, strict=True)):
            tokens = template.tokenise(tokenizer, instruction, pair["input"], pair.get("output"))
            check_context(tokens, limit, index, 0 if "output" in pair else longest)
            found.append(tokens)
        with _about_val_pairs():
            for index, (pair, instruction) in enumerate(zip(self.val_pairs, self.val_instructions, strict=True)):
                check_context(template.tokenise(tokenizer, instruction, pair["input"]), limit, index, longest)
        return found

    def is_no_chat(self, tokenizer: PreTrainedTokenizerBase) -> str:
        """A sentence where the template was left out, and is another than it would be without pairs; else empty."""
        text = self.instruction or next(iter(self.instructions))
        if not self._defaulted or not find_template(tokenizer, text, None).is_chat:
            return ""
        return (
            f"The template is {DEFAULT_TEMPLATE!r}, since pairs are given and it is left out, so that prompts are no "
            "chats. For those of the model's chat template, as without pairs, set it to chat."
        )

    def saves_nothing(self) -> str:
        """A sentence where the prompts, tokenised, are no shorter without the chunk; else empty."""
        plain, instructed = (
            sum(map(len, ids)) / len(self.tokenised)
            for ids in zip(*((pair.plain_ids, pair.instructed_ids) for pair in self.tokenised), strict=True)
        )
        if instructed > plain:
            return ""
        text = f"The chunk's tokens are not saved: prompts have {plain:.1f} without it and {instructed:.1f} with it"
        if not self.template.is_chat:
            return f"{text}."
        return (
            f"{text}, since the chat template writes a system message of its own where there is none. Where you can "
            "send an empty one, fit with the template chat-empty."
        )

    def complete(self, tokenizer: PreTrainedTokenizerBase, written: Sequence[Written], limit: int) -> None:
        """Take the missing outputs, and tokenise the pairs that they belong to.

        Args:
            tokenizer: the model's tokenizer.
            written: the output of each pair that has none.
            limit: as for :meth:`tokenise`, which comes first.
        """
        self.written = [(i, text, finished) for i, text, finished in written]
        texts = {i: text for i, text, _ in self.written}
        self.outputs = [texts[i] if i in texts else pair["output"] for i, pair in enumerate(self.pairs)]
        for i, text, finished in self.written:
            tokens = self.template.tokenise(tokenizer, self.instructions[i], self.pairs[i]["input"], text, finished)
            check_context(tokens, limit, i)
            self.tokenised[i] = tokens

    def select(self, indices: Sequence[int], answer_weight: float, device: torch.device) -> None:
        """Make :attr:`batches` of this process's share of some of the pairs, once they are tokenised.

        Args:
            indices: of the pairs, the same on every process; they may repeat.
            answer_weight: weight of the output's tokens and the token before them.
            device: where the process group's tensors live.
        """
        own = share(sorted(indices, key=self.by_length))
        self.batches = make_batches(
            [self.tokenised[i] for i in own],
            self.settings.batch_size,
            groups=[self.instructions[i] for i in own],
            answer_weight=answer_weight,
        )
        self.num_batches = max(gather_json(len(self.batches), device))

    def answer_tokens(self, count: int | None = None) -> int:
        """Tokens of all outputs, and one more for each one's end, once :meth:`complete` has run; of ``count`` pairs, as
        many as that are on average."""
        spans = [pair.output_span for pair in self.tokenised]
        total = sum(stop - start + 1 for start, stop in spans if stop > start)
        return total if count is None else round(total * count / len(spans))

    def by_length(self, index: int) -> int:
        """A key that sorts the longest prompts first."""
        return -len(self.tokenised[index].instructed_ids)

    def train_dataloader(self) -> DataLoader[PairBatch | None]:
        """The aligned batches, each lead before the batches that follow it, in the same order every epoch.

        Where another process has more, None fills up: Lightning's processes must take the same number of steps.
        """
        if not self.num_batches:
            raise ThoughtError("PairDataModule has no batches yet. Give the Trainer a ThoughtCallback.")
        own = torch.Generator()  # else the loader draws a seed for its workers from the global one
        return DataLoader(_Batches(self.batches, self.num_batches), batch_size=None, generator=own)

    def transfer_batch_to_device(
        self, batch: PairBatch | None, device: torch.device, dataloader_idx: int
    ) -> PairBatch | None:
        """Leave a batch where it is: the streams take its tokens to the device once, not once an epoch."""
        return batch


class _Batches(IterableDataset[PairBatch | None]):
    """Batches in order, then None up to a length. Iterable, so that Lightning adds no sampler that repeats some."""

    def __init__(self, batches: Sequence[PairBatch], length: int) -> None:
        self.batches, self.length = batches, length

    def __iter__(self) -> Iterator[PairBatch | None]:
        return chain(self.batches, repeat(None, self.length - len(self.batches)))

    def __len__(self) -> int:
        return self.length


@contextmanager
def _about_val_pairs() -> Iterator[None]:
    """Errors raised inside name ``val_pairs``, not ``pairs``."""
    try:
        yield
    except ThoughtError as error:
        raise ThoughtError(f"val_pairs: {str(error).removeprefix('pairs: ')}") from error
