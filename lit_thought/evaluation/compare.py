"""Plain, instructed and patched, side by side on held-out pairs and on unrelated text."""

from __future__ import annotations

import html
import math
import os
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lit_thought.errors import ThoughtError, check_counts
from lit_thought.evaluation.checks import Check
from lit_thought.evaluation.metrics import TextMatch, TokenDivergence, agrees_for, repetition
from lit_thought.evaluation.perplexity import UnrelatedText
from lit_thought.files import atomic_file
from lit_thought.model.bare import bare_model, check_tokenizer
from lit_thought.model.loading import context_window, evaluating
from lit_thought.patch.card import number
from lit_thought.patch.display import html_table
from lit_thought.patch.patch import ThoughtPatch
from lit_thought.patch.provenance import template_of
from lit_thought.patch.results import RUNS, figures, items_text
from lit_thought.patch.verdict import headline, warnings
from lit_thought.patch.weights import check_absent
from lit_thought.prompts.alignment import TokenisedPair, check_context
from lit_thought.prompts.batches import PairBatch, make_batches
from lit_thought.prompts.instruction_hash import check_instruction
from lit_thought.prompts.pairs import load_pairs, pair_instructions
from lit_thought.prompts.template import DEFAULT_TEMPLATE, PromptTemplate
from lit_thought.prompts.unrelated import load_texts
from lit_thought.runs.generate import Generation, generate
from lit_thought.runs.logits import batch_logits, logit_parts
from lit_thought.settings import TextSource

__all__ = [
    "Evaluation",
    "EvaluationResult",
    "evaluate",
    "format_result",
    "output_batches",
]

_LOOPS = 0.5
"""An output of which more than this is repetition loops."""
_PERPLEXITY = ("perplexity", "perplexity_ratio", "perplexity_interval", "perplexity_tokens", "perplexity_windows")
"""What :meth:`~lit_thought.evaluation.perplexity.UnrelatedText.measure` returns."""


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    patch: ThoughtPatch | str | os.PathLike[str],
    *,
    instruction: str | None = None,
    pairs: str | os.PathLike[str] | Sequence[Mapping[str, Any]] = (),
    template: str | PromptTemplate | None = None,
    check: Check | None = None,
    unrelated: TextSource | None = "default",
    perplexity_interval: float | None = 0.01,
    max_new_tokens: int = 64,
    batch_size: int = 32,
    items_file: str | os.PathLike[str] | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> EvaluationResult:
    """Compare the plain, the instructed and the patched model on pairs that the patch has not seen.

    Outputs are greedy. Divergences are measured on the instructed model's own outputs, fed to all three, and on the
    patched model's own outputs, fed to the instructed and the patched one: only the latter see what becomes of a patch
    that has left the instructed model's path.

    Args:
        model: the model the patch was made for, without the patch; left bit for bit as it was.
        tokenizer: its tokenizer.
        patch: a patch, or an adapter folder.
        instruction, pairs: as in :func:`~lit_thought.fit.api.transmute`; outputs are the reference answers.
        template: how they make a prompt; left out, the one that the patch was fitted with.
        check: a function of an answer's text that says whether it is what it should be, such as
            ``lambda text: text.isupper()``; :mod:`lit_thought.evaluation.checks` has two. An answer is an output
            without the thoughts or channels that the model's family writes before it.
        unrelated: text whose perplexity should not change: a text file, a list of texts, ``"default"`` (text
            that the package ships, other than what it preserves by default), or None to skip.
        perplexity_interval: half-width of the 95 % interval of ``perplexity_ratio`` at which enough of that text has
            been measured; None to measure all of it.
        max_new_tokens: longest output.
        batch_size: pairs a batch.
        items_file: where to write each pair's three outputs, as JSONL; a file that is there is replaced, unless it is
            that of the pairs.
        cache_dir: where the original model's losses on unrelated text are kept ($LIT_THOUGHT_CACHE,
            ~/.cache/lit_thought).
        progress: show progress bars.

    Returns:
        A JSON-able dict, which a notebook shows as a table:
        ``accuracy``, ``first_token_accuracy``: by run, share of answers that are the reference output and of those that
        begin with its first token; only over pairs that have one, None without any.
        ``recovery``: (patched − plain) ÷ (instructed − plain) accuracy; None where the latter two are equal.
        ``fidelity``: share of patched outputs equal to the instructed ones, right or wrong; ``fidelity_plain``:
        the same for the plain outputs.
        ``checked``: by run, share of outputs that pass the check; None without one.
        ``kl``, ``agreement``: of plain and patched with the instructed run, KL(instructed ‖ ·) in nats and
        share of equal top-1 tokens, mean over all compared tokens; ``output_kl``, ``output_agreement``: the
        same over the tokens that predict the output or its end.
        ``own_text``: figures of the text that the patched model writes, over its tokens as they were written, those
        that end it (an end-of-sequence token, a stop string) included. ``kl``: KL(patched ‖ instructed) and
        ``kl_reverse``: KL(instructed ‖ patched) in nats, means over the places at which the patched model wrote a
        token, both runs having read what it had written before; ``agrees_for_tokens``: of plain and patched, mean
        number of tokens that an output begins with as the instructed output does, ``agrees_for``: mean of this number
        ÷ the instructed output's tokens. By run: ``repetition``: mean share of an output's 3-grams of tokens that it
        had before, 1 − distinct ÷ all, over the outputs of three tokens or more, None without any; ``loops``: share of
        all outputs of which that is over a half; ``length``: mean tokens of an output; ``finished``: share of outputs
        that came to an end before ``max_new_tokens``.
        ``perplexity``: of the unrelated text, original and patched; ``perplexity_ratio``: patched ÷ original;
        ``perplexity_interval``: half-width of the ratio's 95 % interval
        (:func:`~lit_thought.solve.intervals.perplexity_ratio`), None for a single window; ``perplexity_tokens``: how
        many were ``measured``, of how many in the ``text``; ``perplexity_windows``: of each measured window the
        tokens, and the losses (:func:`~lit_thought.evaluation.perplexity.window_losses`).
        ``prompt_tokens``: mean per query, plain and instructed, and ``saved``.
        ``warnings``: sentences on what these figures would hide (:func:`~lit_thought.patch.verdict.warnings`).
        ``items``: input, reference and the three outputs of each pair, and where the model's family writes thoughts or
        channels the three ``answers`` without them; ``pairs``: how many.

    Raises:
        ThoughtError: for bad input, such as another instruction than that of a patch that keeps a hash of it, or no
            template where the patch does not say which one it was fitted with;
            PatchError when the patch does not fit the model, UnsupportedModelError for what is none
            (:func:`~lit_thought.model.bare.bare_model`).
    """
    patch = patch if isinstance(patch, ThoughtPatch) else ThoughtPatch.load(patch)
    rows = load_pairs(pairs)
    check_instruction(patch.provenance, instruction, rows)
    model, tokenizer = bare_model(model), check_tokenizer(tokenizer)
    check_absent(patch, model)
    patch.validate(model)
    chosen = template_of(patch.provenance, template)
    source = pairs if isinstance(pairs, (str, os.PathLike)) else None
    with atomic_file(items_file, pairs=source) if items_file is not None else nullcontext() as file:  # checks it first
        result = Evaluation(
            model,
            tokenizer,
            instruction=instruction,
            pairs=rows,
            template=chosen,
            check=check,
            unrelated=unrelated,
            perplexity_interval=perplexity_interval,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            cache_dir=cache_dir,
            progress=progress,
        ).score(patch)
        if file is not None:
            file.write_text(items_text(result["items"]), encoding="utf-8")
    return result


class EvaluationResult(dict[str, Any]):
    """What :func:`evaluate` returns: a dict, told in a line, and as a table in notebooks."""

    def __repr__(self) -> str:
        top, ratio = headline(self), self["perplexity_ratio"]
        note = f" ({top['note']})" if top["note"] else ""
        told = [f"{top['label']} {top['value']}{note}", f"{self['pairs']} pairs"]
        told += [] if ratio is None else [f"unrelated perplexity × {number(ratio, 3)}"]
        told += [f"{len(self['warnings'])} warnings"] if self["warnings"] else []
        return f"{type(self).__name__}({'; '.join(told)})"

    def _repr_markdown_(self) -> str:
        return format_result(self)

    def _repr_html_(self) -> str:
        rows = [
            (label, *(number(values.get(run), digits) for run in RUNS)) for _, label, values, digits in figures(self)
        ]
        table = html_table(repr(self)[len(type(self).__name__) + 1 : -1], rows, ("", *RUNS))
        return table + "".join(f"<p>Warning: {html.escape(sentence)}</p>" for sentence in self["warnings"])


class Evaluation:
    """What does not depend on the patch, done once for several patches; the arguments are :func:`evaluate`'s, but for
    the template, which is the default one where it is left out.

    Creating one writes the plain and the instructed outputs; the original model's losses on unrelated text are kept
    from one patch to the next.
    """

    @torch.no_grad()
    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        instruction: str | None = None,
        pairs: str | os.PathLike[str] | Sequence[Mapping[str, Any]] = (),
        template: str | PromptTemplate = DEFAULT_TEMPLATE,
        check: Check | None = None,
        unrelated: TextSource | None = "default",
        perplexity_interval: float | None = 0.01,
        max_new_tokens: int = 64,
        batch_size: int = 32,
        cache_dir: str | os.PathLike[str] | None = None,
        progress: bool = True,
    ) -> None:
        model, tokenizer = self.model, self.tokenizer = bare_model(model), check_tokenizer(tokenizer)
        self.rows = load_pairs(pairs)
        self.instructions = pair_instructions(self.rows, instruction)
        self.template = PromptTemplate.parse(template)
        self.form, self.ending = self.template.chat_form(tokenizer), self.template.ending(tokenizer)
        check_counts(batch_size=batch_size, max_new_tokens=max_new_tokens)
        if check is not None and not callable(check):
            raise ThoughtError(f"check must be a function of an answer's text, or None; got {check!r}.")
        self.check = check
        self.max_new_tokens, self.batch_size, self.progress = max_new_tokens, batch_size, progress
        texts = load_texts(unrelated, "evaluate", "unrelated") if unrelated is not None else None
        self.prompts = [
            self.template.tokenise(tokenizer, instruction, row["input"])
            for instruction, row in zip(self.instructions, self.rows, strict=True)
        ]
        for index, prompt in enumerate(self.prompts):
            check_context(prompt, context_window(model), index, max_new_tokens)
        self.unrelated = (
            UnrelatedText(model, tokenizer, texts, perplexity_interval, cache_dir, progress)
            if texts is not None
            else None
        )
        with evaluating(model):
            self.plain = self._write("plain", [prompt.plain_ids for prompt in self.prompts])
            self.instructed = self._write_instructed()
        # at once, so that a check that fails does so before a patch is measured
        self.passing = self._passing({"plain": self.plain, "instructed": self.instructed})
        self.completed = [
            self.template.tokenise(tokenizer, instruction, row["input"], output.text, output.finished)
            for instruction, row, output in zip(self.instructions, self.rows, self.instructed, strict=True)
        ]

    @torch.no_grad()
    def score(self, patch: ThoughtPatch) -> EvaluationResult:
        """The comparison that :func:`evaluate` returns, for one patch."""
        with evaluating(self.model):
            with patch.applied(self.model):
                patched = self._write("patched", [prompt.plain_ids for prompt in self.prompts])
            checked = {**self.passing, **self._passing({"patched": patched})} or None
            perplexity = dict.fromkeys(_PERPLEXITY) if self.unrelated is None else self.unrelated.measure(patch)
            divergence = self._divergences(patch)
            outputs = {"plain": self.plain, "instructed": self.instructed, "patched": patched}
            own_text = {**self._own_divergence(patch, patched), **_written(outputs)}
        texts = {run: [output.text for output in outputs[run]] for run in RUNS}
        answers = {run: [self.form.answer(text) for text in texts[run]] for run in RUNS}
        answered = [i for i, row in enumerate(self.rows) if "output" in row]
        accuracy = first_accuracy = None
        if answered:
            references = [self.rows[i]["output"] for i in answered]
            accuracy = {run: _match([answers[run][i] for i in answered], references) for run in RUNS}
            firsts = {i: self._first_token(i, self.rows[i]["output"]) for i in answered}
            first_accuracy = {
                run: sum(self._first_token(i, answers[run][i]) == first for i, first in firsts.items()) / len(answered)
                for run in RUNS
            }
        plain = sum(len(prompt.plain_ids) for prompt in self.prompts) / len(self.prompts)
        instructed = sum(len(prompt.instructed_ids) for prompt in self.prompts) / len(self.prompts)
        result = {
            "pairs": len(self.rows),
            "accuracy": accuracy,
            "first_token_accuracy": first_accuracy,
            "recovery": _recovery(accuracy),
            "fidelity": _match(texts["patched"], texts["instructed"]),
            "fidelity_plain": _match(texts["plain"], texts["instructed"]),
            "checked": checked,
            **divergence,
            "own_text": own_text,
            **perplexity,
            "prompt_tokens": {"plain": plain, "instructed": instructed, "saved": instructed - plain},
            "items": [
                {"input": row["input"], "reference": row.get("output"), **{run: texts[run][i] for run in RUNS}}
                | ({"answers": {run: answers[run][i] for run in RUNS}} if self.form.header else {})
                for i, row in enumerate(self.rows)
            ],
        }
        return EvaluationResult({**result, "warnings": list(warnings(result).values())})

    def _passing(self, outputs: Mapping[str, Sequence[Generation]]) -> dict[str, float]:
        """The share of each run's outputs that pass the check; nothing without one."""
        if self.check is None:
            return {}
        return {run: _passing(self.check, [self.form.answer(one.text) for one in own]) for run, own in outputs.items()}

    def _write(self, run: str, prompts: Sequence[Sequence[int]]) -> list[Generation]:
        """Greedy outputs of the model as it is now."""
        shown = {"desc": f"Evaluating {run}", "unit": "output", "disable": not self.progress, "leave": False}
        with tqdm(total=len(prompts), **shown) as bar:
            return generate(
                self.model,
                self.tokenizer,
                prompts,
                max_new_tokens=self.max_new_tokens,
                batch_size=self.batch_size,
                progress=lambda done: bar.update(done - bar.n) and None,
                **self.ending,
            )

    def _write_instructed(self) -> list[Generation]:
        """The pairs of each instruction together, so that they share one run of it."""
        outputs: dict[int, Generation] = {}
        for instruction in dict.fromkeys(self.instructions):
            members = [i for i, own in enumerate(self.instructions) if own == instruction]
            written = self._write("instructed", [self.prompts[i].instructed_ids for i in members])
            outputs |= zip(members, written, strict=True)
        return [outputs[i] for i in range(len(self.rows))]

    def _first_token(self, index: int, output: str) -> int | None:
        """The first token of an output's own text (some tokenizers make a token of the space before a digit)."""
        pair = self.template.tokenise(self.tokenizer, self.instructions[index], self.rows[index]["input"], output)
        start, stop = pair.output_span
        return pair.plain_ids[start] if start < stop else None

    def _divergences(self, patch: ThoughtPatch) -> dict[str, dict[str, float]]:
        """KL and agreement of the plain and the patched run with the instructed one, over all compared tokens and
        over those that predict the output or its end (the tokens that ``answer_weight`` makes heavier)."""
        batches = output_batches(self.completed, self.instructions, self.batch_size)
        runs = ("plain", "patched")
        prefixes = ("", "output_")
        metrics = {(run, prefix): TokenDivergence(sync_on_compute=False) for run in runs for prefix in prefixes}
        leads: dict[str, dict[int, Any]] = {run: {} for run in RUNS}
        shown = {"desc": "Comparing token by token", "unit": "batch", "disable": not self.progress, "leave": False}
        for batch in tqdm(batches, **shown):
            for part, _ in logit_parts(self.model, batch, torch.ones(len(batch.weights), dtype=torch.bool)):
                wanted = batch_logits(self.model, part, "target", leads["instructed"])
                for run in runs:
                    with patch.applied(self.model, check=False) if run == "patched" else nullcontext():
                        got = batch_logits(self.model, part, "plain", leads[run])
                    for prefix, weights in zip(prefixes, (part.weights, part.answers), strict=True):
                        metrics[run, prefix].to(wanted.device).update(wanted, got, weights.to(wanted.device))
        computed = {key: metric.compute() for key, metric in metrics.items()}
        return {
            prefix + name: {run: float(computed[run, prefix][name]) for run in runs}
            for prefix in prefixes
            for name in ("kl", "agreement")
        }

    def _own_divergence(self, patch: ThoughtPatch, outputs: Sequence[Generation]) -> dict[str, float | None]:
        """KL of the patched and the instructed run, in both directions, where the patched model wrote its outputs."""
        pairs = [_continued(*own) for own in zip(self.prompts, (output.tokens for output in outputs), strict=True)]
        batches = output_batches(pairs, self.instructions, self.batch_size)
        metrics = {name: TokenDivergence(sync_on_compute=False) for name in ("kl", "kl_reverse")}
        leads: dict[str, dict[int, Any]] = {"instructed": {}, "patched": {}}
        shown = {"desc": "Comparing on its own text", "unit": "batch", "disable": not self.progress, "leave": False}
        for batch in tqdm(batches, **shown):
            for part, _ in logit_parts(self.model, batch, batch.answers > 0):
                own = part.answers > 0
                instructed = batch_logits(self.model, part, "target", leads["instructed"], own)
                with patch.applied(self.model, check=False):
                    patched = batch_logits(self.model, part, "plain", leads["patched"], own)
                runs, weights = (patched, instructed), part.answers[own].to(patched.device)
                for metric, (reference, other) in zip(metrics.values(), (runs, runs[::-1]), strict=True):
                    metric.to(patched.device).update(reference, other, weights)
        values = {name: float(metric.compute()["kl"]) for name, metric in metrics.items()}
        return {name: value if math.isfinite(value) else None for name, value in values.items()}


def _continued(prompt: TokenisedPair, tokens: Sequence[int]) -> TokenisedPair:
    """Both runs of a prompt with an output's tokens, as they were written, but the last one, which neither reads. The
    places that predict one of them, the last one too, are those of the output."""
    read, plain, instructed = tuple(tokens[:-1]), len(prompt.plain_ids), len(prompt.instructed_ids)
    return replace(
        prompt,
        plain_ids=prompt.plain_ids + read,
        instructed_ids=prompt.instructed_ids + read,
        plain_positions=prompt.plain_positions + tuple(range(plain, plain + len(read))),
        instructed_positions=prompt.instructed_positions + tuple(range(instructed, instructed + len(read))),
        output_span=(plain, plain + len(tokens)),
    )


def _written(outputs: Mapping[str, Sequence[Generation]]) -> dict[str, dict[str, float | None]]:
    """What can be told of the runs' outputs without the model."""
    wanted = [output.tokens for output in outputs["instructed"]]
    common = {
        run: [agrees_for(output.tokens, other) for output, other in zip(outputs[run], wanted, strict=True)]
        for run in ("plain", "patched")
    }
    repeated = {run: [repetition(output.tokens) for output in outputs[run]] for run in RUNS}
    return {
        "agrees_for": {
            run: _mean([count / len(other) for count, other in zip(counts, wanted, strict=True) if other])
            for run, counts in common.items()
        },
        "agrees_for_tokens": {run: _mean(counts) for run, counts in common.items()},
        "repetition": {
            run: _mean([share for share in shares if share is not None]) for run, shares in repeated.items()
        },
        "loops": {run: _mean([(share or 0) > _LOOPS for share in shares]) for run, shares in repeated.items()},
        "length": {run: _mean([len(output.tokens) for output in outputs[run]]) for run in RUNS},
        "finished": {run: _mean([output.finished for output in outputs[run]]) for run in RUNS},
    }


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def output_batches(pairs: Sequence[TokenisedPair], instructions: Sequence[str], batch_size: int) -> list[PairBatch]:
    """Batches of completed pairs, without attention sinks, which the instructed run does not have."""
    batches = make_batches(pairs, batch_size, groups=instructions)
    return [batch for batch in batches if batch.plain is not batch.target]


def _match(texts: Sequence[str], references: Sequence[str]) -> float:
    metric = TextMatch(sync_on_compute=False)
    metric.update(texts, references)
    return float(metric.compute())


def _passing(check: Check, answers: Sequence[str]) -> float:
    """The share of answers that pass.

    Raises:
        ThoughtError: naming the answer at which the check itself fails.
    """
    passed = 0
    for text in answers:
        try:
            passed += bool(check(text))
        except ThoughtError:
            raise
        except Exception as error:
            raise ThoughtError(
                f"check fails on the answer {text!r:.80} ({type(error).__name__}: {error}). It must say of any "
                "text whether it passes."
            ) from error
    return passed / len(answers)


def _recovery(accuracy: dict[str, float] | None) -> float | None:
    if accuracy is None or accuracy["instructed"] == accuracy["plain"]:
        return None
    return (accuracy["patched"] - accuracy["plain"]) / (accuracy["instructed"] - accuracy["plain"])


def format_result(result: Mapping[str, Any], samples: int = 5) -> str:
    """The comparison as a small Markdown table, with a few three-way samples."""

    lines = [f"| {result['pairs']} held-out pairs | " + " | ".join(RUNS) + " |", "|---|" + "---:|" * len(RUNS)]
    for _, label, values, digits in figures(result):
        lines.append(f"| {label} | " + " | ".join(number(values.get(run), digits) for run in RUNS) + " |")
    top, recovery, ratio = headline(result), result["recovery"], result["perplexity_ratio"]
    if top["key"] == "difference":
        last = [f"{top['label']} {top['value']} ({top['note']})"]
    else:
        last = [] if recovery is None else [f"recovery {number(recovery)}"]
        last.append(f"fidelity {number(result['fidelity'])}")
    if ratio is not None:
        last.append(f"unrelated perplexity × {number(ratio, 3)}")
    if result.get("perplexity_interval") is not None:
        tokens = result["perplexity_tokens"]
        last[-1] += f" ± {number(result['perplexity_interval'], 3)}"
        last[-1] += f" ({tokens['measured']:,} of {tokens['text']:,} tokens)"
    lines += ["", ", ".join(last)]
    for sentence in warnings(result).values():
        lines += ["", f"Warning: {sentence}"]
    if samples and result["items"]:
        lines += ["", "| input | " + " | ".join(RUNS) + " |", "|---|" + "---|" * len(RUNS)]
        for item in result["items"][:samples]:
            cells = [item["input"], *(item[run] for run in RUNS)]
            lines.append("| " + " | ".join(_one_line(text) for text in cells) + " |")
    return "\n".join(lines)


def _one_line(text: str, width: int = 60) -> str:
    text = " ".join(text.split()).replace("|", "\\|")
    return text if len(text) <= width else text[: width - 1] + "…"
