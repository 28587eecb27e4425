"""Instruction/input pairs as a LightningDataModule."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain, repeat
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, IterableDataset
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lit_thought.errors import ThoughtError, check_counts, is_finite
from lit_thought.evaluation.compare import Evaluation
from lit_thought.model.loading import context_window
from lit_thought.model.sharding import is_sharded
from lit_thought.prompts.alignment import TokenisedPair, check_context
from lit_thought.prompts.batches import PairBatch, make_batches
from lit_thought.prompts.pairs import load_pairs, pair_instructions
from lit_thought.prompts.template import DEFAULT_TEMPLATE, PromptTemplate
from lit_thought.runs.generate import Generation, generate
from lit_thought.statistics.distributed import gather_json, share

__all__ = ["PairDataModule"]


class PairDataModule(LightningDataModule):
    """Pairs of an instruction and an input, with or without the output.

    Where a pair has no output, the instructed model writes it. Each pair becomes two token sequences, with the
    instruction (the target run) and without it (the plain run), whose common tokens are compared.

    Args:
        pairs: a list of mappings, or a JSON, JSONL or CSV file, with the keys ``input``, ``output`` (optional)
            and ``instruction`` (optional, overrides the argument).
        instruction: the removable chunk of the prompt.
        template: a text with ``{input}`` and ``{output}`` (and ``{instruction}`` where the chunk is not at the
            start), ``"chat"``, ``"chat-user"`` or a :class:`~lit_thought.prompts.template.PromptTemplate`.
        batch_size: pairs a batch; the patch does not depend on it.
        max_new_tokens: longest output that the instructed model may write.
        generate: further options of ``model.generate`` for those outputs; greedy when left out.
        seed: seed of that generation, where it samples; what is drawn also depends on the number of processes.
        answer_weight: weight of the output's tokens and the token before them in the sums; others weigh 1. Left out,
            10, and 100 where the fit patches mlp_in alone.
        val_pairs: pairs to follow the fit with, step by step; nothing is fitted on them.

    Attributes:
        known: missing outputs that :meth:`write` wrote before, in the form of :attr:`written`; None to write them.
        outputs: the output of each pair, given or generated, once :meth:`prepare` has run.
        written: the generated ones: index of the pair, text, and whether it came to an end by itself, likewise.
        tokenised: the pairs as tokens, likewise.
        batches: the padded batches of this process's share of the pairs, likewise.
        num_batches: the largest number of batches of any process, likewise.
        applied_answer_weight: the answer weight in use, likewise.

    Raises:
        ThoughtError: for pairs, an instruction or settings that cannot be used.
    """

    def __init__(
        self,
        pairs: str | os.PathLike[str] | Sequence[Mapping[str, Any]],
        instruction: str | None = None,
        template: str | PromptTemplate = DEFAULT_TEMPLATE,
        *,
        batch_size: int = 32,
        max_new_tokens: int = 64,
        generate: Mapping[str, Any] | None = None,
        seed: int = 0,
        answer_weight: float | None = None,
        val_pairs: str | os.PathLike[str] | Sequence[Mapping[str, Any]] | None = None,
    ) -> None:
        super().__init__()
        self.pairs = load_pairs(pairs)
        self.instructions = pair_instructions(self.pairs, instruction)
        with _about_val_pairs():
            self.val_pairs = load_pairs(val_pairs) if val_pairs is not None else []
            self.val_instructions = pair_instructions(self.val_pairs, instruction)
        self.template = PromptTemplate.parse(template)
        check_counts(batch_size=batch_size, max_new_tokens=max_new_tokens)
        if answer_weight is not None and not (is_finite(answer_weight) and answer_weight > 0):
            raise ThoughtError(f"answer_weight must be a finite number above 0; got {answer_weight!r}.")
        if generate is not None and not isinstance(generate, Mapping):
            raise ThoughtError(f"generate must be options of model.generate by name; got {generate!r:.60}.")
        try:
            json.dumps(generate, allow_nan=False)
        except (TypeError, ValueError, RecursionError) as error:
            raise ThoughtError(f"generate must hold JSON values only, for the patch's record ({error}).") from error
        self.instruction = instruction
        self.batch_size, self.max_new_tokens, self.seed = batch_size, max_new_tokens, seed
        self.generate_options = dict(generate or {})
        self.answer_weight = answer_weight
        self.applied_answer_weight = answer_weight
        self.known: list[tuple[int, str, bool]] | None = None
        self.outputs: list[str] = []
        self.written: list[tuple[int, str, bool]] = []
        self.tokenised: list[TokenisedPair] = []
        self.batches: list[PairBatch] = []
        self.num_batches = 0

    def check(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[TokenisedPair]:
        """Tokenise every prompt, with its output where it has one, before any long work.

        Raises:
            ThoughtError: when one overflows the context window, counting what may yet be generated.
        """
        limit = context_window(model)
        prompts = []
        for index, (pair, instruction) in enumerate(zip(self.pairs, self.instructions, strict=True)):
            tokens = self.template.tokenise(tokenizer, instruction, pair["input"], pair.get("output"))
            check_context(tokens, limit, index, 0 if "output" in pair else self.max_new_tokens)
            prompts.append(tokens)
        with _about_val_pairs():
            for index, (pair, instruction) in enumerate(zip(self.val_pairs, self.val_instructions, strict=True)):
                tokens = self.template.tokenise(tokenizer, instruction, pair["input"])
                check_context(tokens, limit, index, self.max_new_tokens)
        return prompts

    def prepare(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        prompts: Sequence[TokenisedPair] | None = None,
        progress: bool = False,
        default_answer_weight: float = 10.0,
        written: Sequence[tuple[int, str, bool]] | None = None,
    ) -> None:
        """Write the missing outputs with the instructed model, align and batch all pairs.

        Args:
            model: the instructed model.
            tokenizer: its tokenizer.
            prompts: what :meth:`check` returned for them, where it was called already.
            progress: show a progress bar.
            default_answer_weight: where the data module has no ``answer_weight`` of its own.
            written: missing outputs that were written before, in the form of :attr:`written`; :attr:`known` when left
                out.
        """
        checked = self.check(model, tokenizer) if prompts is None else prompts
        before = self.known if written is None else written
        self.written = list(before if before is not None else self.write(model, tokenizer, checked, progress))
        every = {i: Generation(text, finished) for i, text, finished in self.written}
        self.outputs = [every[i].text if i in every else self.pairs[i]["output"] for i in range(len(self.pairs))]
        self.tokenised = list(checked)
        limit = context_window(model)
        for index, generation in every.items():
            instruction, text = self.instructions[index], self.pairs[index]["input"]
            tokens = self.template.tokenise(tokenizer, instruction, text, generation.text, generation.finished)
            check_context(tokens, limit, index)
            self.tokenised[index] = tokens
        self.applied_answer_weight = default_answer_weight if self.answer_weight is None else self.answer_weight
        self.select(tokenizer, range(len(self.pairs)), model.device)

    def write(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        prompts: Sequence[TokenisedPair],
        progress: bool = False,
    ) -> list[tuple[int, str, bool]]:
        """Write the missing outputs with the instructed model, in the form of :attr:`written`.

        Args:
            model: the instructed model.
            tokenizer: its tokenizer.
            prompts: what :meth:`check` returned for them.
            progress: show a progress bar.
        """
        every = self._write_missing(model, tokenizer, prompts, progress)
        return [(i, generation.text, generation.finished) for i, generation in sorted(every.items())]

    def select(self, tokenizer: PreTrainedTokenizerBase, indices: Sequence[int], device: torch.device) -> None:
        """Make :attr:`batches` of this process's share of some of the pairs, once they are tokenised.

        Args:
            tokenizer: the model's tokenizer.
            indices: of the pairs, the same on every process; they may repeat.
            device: where the process group's tensors live.
        """
        assert self.applied_answer_weight is not None
        self.batches = self.batched(tokenizer, self.tokenised, indices, self.applied_answer_weight)
        self.num_batches = max(gather_json(len(self.batches), device))

    def batched(
        self,
        tokenizer: PreTrainedTokenizerBase,
        prompts: Sequence[TokenisedPair],
        indices: Sequence[int],
        answer_weight: float = 1.0,
    ) -> list[PairBatch]:
        """The batches of this process's share of some of the pairs, given all of them as tokens."""
        own = share(sorted(indices, key=lambda i: -len(prompts[i].instructed_ids)))
        return make_batches(
            [prompts[i] for i in own],
            self.batch_size,
            tokenizer.pad_token_id or 0,
            "right",
            [self.instructions[i] for i in own],
            answer_weight,
        )

    def evaluation(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, progress: bool) -> Evaluation:
        """What the validation pairs are scored with; writes their plain and instructed outputs."""
        return Evaluation(
            model,
            tokenizer,
            instruction=self.instruction,
            pairs=self.val_pairs,
            template=self.template,
            unrelated=None,
            max_new_tokens=self.max_new_tokens,
            batch_size=self.batch_size,
            progress=progress,
        )

    def _write_missing(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        prompts: Sequence[TokenisedPair],
        progress: bool,
    ) -> dict[int, Generation]:
        """What the instructed model writes where an output is missing; pairs with one instruction share its run.

        Each process writes its share, and of a sharded model, whose processes must go through it together, all of them.
        """
        missing: dict[str, list[int]] = {}
        absent = [i for i, pair in enumerate(self.pairs) if "output" not in pair]
        for i in absent if is_sharded(model) else share(absent):
            missing.setdefault(self.instructions[i], []).append(i)
        total = sum(map(len, missing.values()))
        written: dict[int, Generation] = {}
        with tqdm(total=total, desc="Generating outputs", unit="pair", disable=not progress or total == 0) as bar:
            for members in missing.values():
                before = bar.n
                outputs = generate(
                    model,
                    tokenizer,
                    [prompts[i].instructed_ids for i in members],
                    stop=self.template.stop,
                    max_new_tokens=self.max_new_tokens,
                    batch_size=self.batch_size,
                    seed=self.seed,
                    progress=lambda done, before=before: bar.update(before + done - bar.n),  # type: ignore[misc]
                    options=self.generate_options,
                    keep_special=self.template.is_chat,
                )
                written |= zip(members, outputs, strict=True)
        own = [[i, generation.text, generation.finished] for i, generation in written.items()]
        every = gather_json(own, model.device)
        return {i: Generation(text, finished) for part in every for i, text, finished in part}

    def train_dataloader(self) -> DataLoader[PairBatch | None]:
        """The aligned batches, each lead before the batches that follow it, in the same order every epoch.

        Where another process has more, None fills up: Lightning's processes must take the same number of steps.
        """
        if not self.num_batches:
            raise ThoughtError("PairDataModule has no batches yet. Give the Trainer a ThoughtCallback.")
        return DataLoader(_Batches(self.batches, self.num_batches), batch_size=None)

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
        raise ThoughtError(f"val_pairs: {error}") from error
