"""Instruction/input pairs as a LightningDataModule."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lit_thought.batches import PairBatch, make_batches
from lit_thought.data_files import load_pairs
from lit_thought.errors import ThoughtError
from lit_thought.generate import generate
from lit_thought.prompts import PromptTemplate, TokenisedPair, check_context

__all__ = ["PairDataModule", "check_counts", "context_window", "generate_outputs", "pair_instructions"]

DEFAULT_TEMPLATE = "Q: {input}\nA: {output}\n"


class PairDataModule(LightningDataModule):
    """Pairs of an instruction and an input, with or without the output.

    Where a pair has no output, the instructed model writes it. Each pair becomes two token sequences, with the
    instruction (the target run) and without it (the plain run), whose common tokens are compared.

    Args:
        pairs: a list of mappings, or a JSON, JSONL or CSV file, with the keys ``input``, ``output`` (optional)
            and ``instruction`` (optional, overrides the argument).
        instruction: the removable chunk of the prompt.
        template: a text with ``{input}`` and ``{output}`` (and ``{instruction}`` where the chunk is not at the
            start), ``"chat"``, ``"chat-user"`` or a :class:`~lit_thought.prompts.PromptTemplate`.
        batch_size: pairs a batch; the patch does not depend on it.
        max_new_tokens: longest output that the instructed model may write.
        generate: further options of ``model.generate`` for those outputs; greedy when left out.
        seed: seed of that generation, where it samples.
        answer_weight: weight of the output's tokens and the token before them in the sums; others weigh 1.

    Attributes:
        outputs: the output of each pair, given or generated, once :meth:`prepare` has run.
        tokenised: the pairs as tokens, likewise.
        batches: the padded batches, likewise.

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
        answer_weight: float = 10.0,
    ) -> None:
        super().__init__()
        self.pairs = load_pairs(pairs)
        self.instructions = pair_instructions(self.pairs, instruction)
        self.template = PromptTemplate.parse(template)
        check_counts(batch_size=batch_size, max_new_tokens=max_new_tokens)
        if not isinstance(answer_weight, (int, float)) or not 0 < answer_weight < math.inf:
            raise ThoughtError(f"answer_weight must be a finite number above 0; got {answer_weight!r}.")
        try:
            json.dumps(generate, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ThoughtError(f"generate must hold JSON values only, for the patch's record ({error}).") from error
        self.instruction = instruction
        self.batch_size, self.max_new_tokens, self.seed = batch_size, max_new_tokens, seed
        self.generate_options = dict(generate or {})
        self.answer_weight = float(answer_weight)
        self.outputs: list[str] = []
        self.tokenised: list[TokenisedPair] = []
        self.batches: list[PairBatch] = []

    def check(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        """Tokenise every prompt and refuse one that overflows the context window, before any long work."""
        limit = context_window(model)
        for index, (pair, instruction) in enumerate(zip(self.pairs, self.instructions, strict=True)):
            tokens = self.template.tokenise(tokenizer, instruction, pair["input"], pair.get("output"))
            room = 0 if "output" in pair else self.max_new_tokens
            check_context(tokens, limit, index, room)

    def prepare(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, progress: bool = False) -> None:
        """Write the missing outputs with the instructed model, tokenise, align and batch all pairs."""
        self.check(model, tokenizer)
        written = generate_outputs(
            model,
            tokenizer,
            self.template,
            self.pairs,
            self.instructions,
            batch_size=self.batch_size,
            max_new_tokens=self.max_new_tokens,
            seed=self.seed,
            options=self.generate_options,
            progress=progress,
        )
        self.outputs = [text for text, _ in written]
        self.tokenised = [
            self.template.tokenise(tokenizer, instruction, pair["input"], text, finished)
            for pair, instruction, (text, finished) in zip(self.pairs, self.instructions, written, strict=True)
        ]
        limit = context_window(model)
        for index, tokens in enumerate(self.tokenised):
            check_context(tokens, limit, index)
        self.batches = make_batches(
            self.tokenised,
            self.batch_size,
            tokenizer.pad_token_id or 0,
            "right",
            self.instructions,
            self.answer_weight,
        )

    def train_dataloader(self) -> DataLoader:
        """The aligned batches, each lead before the batches that follow it, in the same order every epoch."""
        if not self.batches:
            raise ThoughtError("PairDataModule has no batches yet. Give the Trainer a ThoughtCallback.")
        return DataLoader(self.batches, batch_size=None, shuffle=False)  # type: ignore[arg-type]


def pair_instructions(pairs: Sequence[Mapping[str, str]], instruction: str | None) -> list[str]:
    """Each pair's own instruction, or the common one.

    Raises:
        ThoughtError: when a pair has neither, or an instruction is empty.
    """
    chosen = [pair.get("instruction", instruction) for pair in pairs]
    for index, text in enumerate(chosen):
        if not isinstance(text, str) or not text.strip():
            raise ThoughtError(
                f"instruction must be a text that is not empty; pair {index} has {text!r}. "
                "Pass instruction=..., or give each pair its own."
            )
    return chosen  # type: ignore[return-value]


def check_counts(**counts: int) -> None:
    """Check settings that count something.

    Raises:
        ThoughtError: for one that is not a whole number of 1 or more.
    """
    for name, value in counts.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ThoughtError(f"{name} must be a whole number of 1 or more; got {value!r}.")


def context_window(model: PreTrainedModel) -> int:
    """The longest sequence the model was made for, in tokens."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None) or 10**9


def generate_outputs(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    template: PromptTemplate,
    pairs: Sequence[Mapping[str, str]],
    instructions: Sequence[str],
    *,
    batch_size: int,
    max_new_tokens: int,
    seed: int = 0,
    options: Mapping[str, Any] | None = None,
    progress: bool = False,
) -> list[tuple[str, bool]]:
    """The output of each pair and whether it is complete: the given one, or what the instructed model writes.

    Pairs with the same instruction share one run of it.
    """
    results: dict[int, tuple[str, bool]] = {
        i: (pair["output"], True) for i, pair in enumerate(pairs) if "output" in pair
    }
    missing: dict[str, list[int]] = {}
    for i in range(len(pairs)):
        if i not in results:
            missing.setdefault(instructions[i], []).append(i)
    total = sum(map(len, missing.values()))
    with tqdm(total=total, desc="Generating outputs", unit="pair", disable=not progress or total == 0) as bar:
        for instruction, members in missing.items():
            prompts = [template.tokenise(tokenizer, instruction, pairs[i]["input"]).instructed_ids for i in members]
            before = bar.n
            texts = generate(
                model,
                tokenizer,
                prompts,
                stop=template.stop,
                max_new_tokens=max_new_tokens,
                batch_size=batch_size,
                seed=seed,
                options=options,
                progress=lambda done, before=before: bar.update(before + done - bar.n),  # type: ignore[misc]
            )
            results.update({i: (g.text, g.finished) for i, g in zip(members, texts, strict=True)})
    return [results[i] for i in range(len(pairs))]
