"""Edit one fact: a statement in the prompt becomes a change of weights, and other landmarks stay where they are.

    python -m recipes.tasks.edit_fact --config recipes/tasks/edit_fact.yaml

Fits a patch to a few wordings of the question, in the last blocks alone, where the runs differ in what is to be said
next. What it preserves are the same questions about other landmarks, and unrelated text. "all blocks" and "nothing
kept" leave out one of the two. Beside it, locate-and-edit: ROME's closed form for one layer (Meng et al. 2022, arXiv
2202.05262), its value read off the instructed run instead of optimised by gradients, at the subject's last token or at
the prompt's. Scored as there: efficacy (fitted wordings) and paraphrase (held-out ones) are the shares of prompts with
P(new) > P(old), neighbourhood (landmarks that no fit has seen, half of them in a held-out wording) that with
P(true) > P(new). Plain completions are prompts in which even the instructed model keeps to the old answer. Writes a
Markdown and a JSON table.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from statistics import harmonic_mean
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lit_thought import PromptTemplate, ThoughtPatch, load_model, transmute
from lit_thought.evaluation.metrics import token_kl
from lit_thought.model.blocks import find_blocks
from lit_thought.prompts.alignment import TokenisedPair
from lit_thought.prompts.batches import forward_inputs, pad
from lit_thought.prompts.unrelated import load_texts, text_windows
from lit_thought.runs.generate import generate
from lit_thought.runs.streams import Stream
from lit_thought.solve.factors import Factors
from lit_thought.solve.least_squares import solve_constrained
from lit_thought.statistics.preserve import WINDOW, Preservation, preservation
from recipes.harness import DATA, Unrelated, command_line, one_line, shown, table, write_results

COMPLETION = PromptTemplate("{input} {output}")


class Question(NamedTuple):
    """A prompt, the answer that should be the likelier one, and the one that should be the less likely."""

    input: str
    wanted: str
    other: str


class Scores(NamedTuple):
    """Of each question: log P of the wanted and of the other answer, (n,), and of all next tokens, (n, vocabulary)."""

    wanted: Tensor
    other: Tensor
    next: Tensor


def edit_fact(
    model: str = "smollm2",
    data: str = str(DATA / "landmarks.json"),
    template: str = "Q: {input}\nA: The answer is {output}\n",
    blocks: Sequence[int] | None = (22, 23, 24, 25, 26, 27, 28, 29),
    rank: int = 16,
    ridge: float = 0.0003,
    answer_weight: float = 1000.0,
    preserve_weight: float = 100.0,
    preserve_tokens: int = 4000,
    wordings: int = 3,
    edit_blocks: Sequence[int] | None = (8, 16, 24, 27),
    edit_ridge: float = 1e-6,
    edit_scale: float = 2.0,
    landmarks: int | None = None,
    unrelated_windows: int = 2,
    samples: int = 2,
    max_new_tokens: int = 6,
    out: str = "recipes/results/edit_fact",
) -> None:
    """Make the patches and score them beside the plain and the instructed model."""
    fact = json.loads(Path(data).read_text(encoding="utf-8"))
    statement, subject, new, old = fact["statement"], fact["subject"], fact["new"], fact["old"]
    fitted, known = fact["fit"], fact["landmarks"]["preserve"][:landmarks]
    questions = {
        "efficacy": [Question(_ask(wording, subject), new, old) for wording in fitted],
        "paraphrase": [Question(_ask(wording, subject), new, old) for wording in fact["paraphrase"]],
        "neighbourhood": [
            Question(_ask((fitted[0], fact["paraphrase"][0])[index % 2], landmark), city, new)
            for index, (landmark, city) in enumerate(fact["landmarks"]["neighbourhood"][:landmarks])
        ],
    }
    completions = {
        "completion": [Question(_ask(wording, subject), new, old) for wording in fact["completion"]],
        "completion_neighbourhood": [
            Question(_ask(fact["completion"][0], landmark), city, new)
            for landmark, city in fact["landmarks"]["neighbourhood"][:landmarks]
        ],
    }
    lm, tokenizer = load_model(model)
    unrelated = Unrelated(lm, tokenizer, unrelated_windows)

    pairs = [{"input": question.input, "output": new} for question in questions["efficacy"]]
    prompt = template.partition("{output}")[0].rstrip()
    kept = [
        prompt.replace("{input}", _ask(fitted[(index + 3 * number) % len(fitted)], landmark))
        for index, (landmark, _) in enumerate(known)
        for number in range(wordings)
    ]
    kept += load_texts("default", "preserve", "preserve")
    settings: dict[str, Any] = {"rank": rank, "ridge": ridge, "answer_weight": answer_weight, "progress": False}
    keep: dict[str, Any] = {"preserve": kept, "preserve_weight": preserve_weight, "preserve_tokens": preserve_tokens}
    patches: dict[str, ThoughtPatch | None] = {
        "plain": None,
        "instructed": None,
        "patched": transmute(lm, tokenizer, statement, pairs, template, blocks=blocks, **settings, **keep),
        "all blocks": transmute(lm, tokenizer, statement, pairs, template, **settings, **keep),
        "nothing kept": transmute(lm, tokenizer, statement, pairs, template, blocks=blocks, **settings, preserve=None),
    }

    ask = Asker(lm, tokenizer, PromptTemplate.parse(template), statement)
    tokens = [ask.template.tokenise(tokenizer, statement, pair["input"]) for pair in pairs]
    texts = [prompt.replace("{input}", pair["input"]) for pair in pairs]
    heads = [text[: text.lower().index(subject.lower()) + len(subject)] for text in texts]
    places = {
        "edit at subject": [len(tokenizer(head)["input_ids"]) - 1 for head in heads],
        "edit at end": [len(pair.plain_ids) - 1 for pair in tokens],
    }
    kept_windows = text_windows(tokenizer, kept, WINDOW, preserve_tokens)
    priors, _ = preservation(lm, find_blocks(lm), kept_windows)  # from the cache, where transmute put them
    chosen: dict[str, int] = {}
    for name, positions in places.items():
        best = float("-inf")
        for block, patch in closed_form(lm, tokens, positions, priors, edit_blocks, edit_ridge):
            with patch.applied(lm, check=False):
                gain = float(ask(questions["efficacy"]).wanted.mean())
            if gain > best:
                best, chosen[name], patches[name] = gain, block, edit_scale * patch
    print("Blocks chosen: " + ", ".join(f"{name}, {block}" for name, block in chosen.items()) + "\n")

    ask_on = Asker(lm, tokenizer, COMPLETION, statement)
    asked_of = [asked[index * len(asked) // samples] for asked in questions.values() for index in range(samples)]
    found: dict[str, dict[str, Scores]] = {}
    runs: dict[str, dict[str, float]] = {}
    answers: dict[str, list[str]] = {}
    for name, made in patches.items():
        instructed = name == "instructed"
        with made.applied(lm, check=False) if made is not None else nullcontext():
            found[name] = {kind: ask(asked, instructed) for kind, asked in questions.items()}
            found[name] |= {kind: ask_on(asked, instructed) for kind, asked in completions.items()}
            answers[name] = ask.answers(asked_of, instructed, max_new_tokens)
            ratio = 1.0 if made is None else unrelated.ratio(lm)
        runs[name] = summary(found[name], found["plain"], found.get("instructed"))
        runs[name]["perplexity_ratio"] = ratio
    runs["plain"] |= summary(found["plain"], found["plain"], found["instructed"])
    runs["plain"]["perplexity"] = unrelated.perplexity

    options = {"rank": rank, "ridge": ridge, "answer_weight": answer_weight, "preserve_weight": preserve_weight}
    options |= {"blocks": blocks, "preserve_tokens": preserve_tokens, "wordings": wordings}
    options |= {"edit_ridge": edit_ridge, "edit_scale": edit_scale}
    record = {"model": shown(model), "statement": statement, "settings": options, "blocks_chosen": chosen, "runs": runs}
    record |= {"samples": [question.input for question in asked_of], "answers": answers}
    page = f"“{statement}” before `{prompt.encode('unicode_escape').decode()}`; blocks chosen for the closed form: "
    page += f"`{json.dumps(chosen)}`\n\n{score_table(runs, old, new)}\n{answer_table(asked_of, answers)}"
    write_results(__file__, out, page, record)


class Asker:
    """Puts questions to the model as it is.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        template: the prompt around a question.
        statement: what stands before it in the instructed run.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, template: PromptTemplate, statement: str
    ) -> None:
        self.model, self.tokenizer, self.template, self.statement = model, tokenizer, template, statement

    @torch.no_grad()
    def __call__(self, questions: Sequence[Question], instructed: bool = False) -> Scores:
        """Score both answers of each question; sequences that differ in their last token alone are run once."""
        sequences: list[tuple[int, ...]] = []
        lengths: list[int] = []
        for question in questions:
            for answer in (question.wanted, question.other):
                pair = self.template.tokenise(self.tokenizer, self.statement, question.input, answer, finished=False)
                sequences.append(pair.instructed_ids if instructed else pair.plain_ids)
                lengths.append(pair.output_span[1] - pair.output_span[0])
        inputs = sorted({sequence[:-1] for sequence in sequences}, key=len)
        logits: dict[tuple[int, ...], Tensor] = {}
        longest = max(lengths)
        for start in range(0, len(inputs), 16):
            batch = inputs[start : start + 16]
            padded = forward_inputs(pad(batch, 0, "left").to(self.model.device), 0)
            output = self.model(**padded, logits_to_keep=longest).logits.float().log_softmax(-1)
            logits |= zip(batch, output, strict=True)
        log_p, following = [], []
        for sequence, length in zip(sequences, lengths, strict=True):
            own = logits[sequence[:-1]][longest - length :]
            log_p.append(own.gather(1, torch.tensor(sequence[-length:], device=own.device)[:, None]).sum())
            following.append(own[0])
        return Scores(torch.stack(log_p[::2]), torch.stack(log_p[1::2]), torch.stack(following[::2]))

    def answers(self, questions: Sequence[Question], instructed: bool, max_new_tokens: int) -> list[str]:
        """Greedy answers."""
        pairs = [self.template.tokenise(self.tokenizer, self.statement, question.input) for question in questions]
        prompts = [pair.instructed_ids if instructed else pair.plain_ids for pair in pairs]
        stop = self.template.stop
        written = generate(self.model, self.tokenizer, prompts, stop=stop, max_new_tokens=max_new_tokens)
        return [answer.text for answer in written]


@torch.no_grad()
def closed_form(
    model: PreTrainedModel,
    pairs: Sequence[TokenisedPair],
    positions: Sequence[int],
    priors: Preservation,
    chosen: Sequence[int] | None,
    ridge: float,
) -> Iterator[tuple[int, ThoughtPatch]]:
    """ROME's rank-1 change of one MLP's output projection, for each block in turn.

    The key is the mean input of that projection at one token of each plain prompt, the value the mean difference
    that the statement makes there to the block's output.

    Args:
        model: the original model.
        pairs: the prompts.
        positions: the token of each plain prompt.
        priors: covariance of the keys that should go on giving what they gave.
        chosen: indices of the blocks; None for all.
        ridge: λ of the solve.

    Yields:
        The block's index and its patch.
    """
    blocks = find_blocks(model)
    plain = Stream(model, blocks, pad([pair.plain_ids for pair in pairs], 0, "right").to(model.device))
    target = Stream(model, blocks, pad([pair.instructed_ids for pair in pairs], 0, "right").to(model.device))
    rows = torch.arange(len(pairs))
    here = torch.tensor(positions)
    there = torch.tensor(
        [
            pair.instructed_positions[pair.plain_positions.index(position)]
            for pair, position in zip(pairs, positions, strict=True)
        ]
    )
    for block in blocks:
        _, seen = plain.run(block, ("mlp_out",))
        _, wanted = target.run(block, ("mlp_out",))
        plain.hidden, target.hidden = seen["mlp_out"].residual, wanted["mlp_out"].residual
        if chosen is not None and block.index not in chosen:
            continue
        key = seen["mlp_out"].input[rows, here].double().mean(0)
        value = (target.hidden[rows, there] - plain.hidden[rows, here]).double().mean(0)
        prior = priors.prior(block.index, "mlp_out")
        change = solve_constrained(key[None], value[None], prior=prior, ridge=ridge, name=f"block {block.index}")
        A = value[None] @ change / value.square().sum()  # ΔW = value A, of rank 1
        yield block.index, ThoughtPatch({block.sites["mlp_out"].path: Factors(A.float(), value[:, None].float())})


def summary(
    own: Mapping[str, Scores], plain: Mapping[str, Scores], instructed: Mapping[str, Scores] | None
) -> dict[str, float]:
    """Shares and mean probabilities by kind of question, ROME's harmonic mean, and divergences of the next token."""
    figures: dict[str, float] = {}
    for kind, scores in own.items():
        figures[kind] = float((scores.wanted > scores.other).double().mean())
        figures[f"{kind}_wanted"] = float(scores.wanted.exp().mean())
        figures[f"{kind}_other"] = float(scores.other.exp().mean())
        if instructed is not None:
            figures[f"{kind}_kl_instructed"] = float(token_kl(instructed[kind].next, scores.next).mean())
        figures[f"{kind}_kl_plain"] = float(token_kl(plain[kind].next, scores.next).mean())
    three = [figures[kind] for kind in ("efficacy", "paraphrase", "neighbourhood")]
    return {"score": harmonic_mean(three), **figures}


def score_table(runs: Mapping[str, Mapping[str, float]], old: str, new: str) -> str:
    """The runs side by side."""
    rows = {
        "score (harmonic mean of the next three)": ("score", ".2f"),
        f"efficacy: P({new}) > P({old}), fitted wordings": ("efficacy", ".2f"),
        "paraphrase: the same, held-out wordings": ("paraphrase", ".2f"),
        f"neighbourhood: P(true) > P({new}), other landmarks": ("neighbourhood", ".2f"),
        f"P({new}), held-out wordings": ("paraphrase_wanted", ".3f"),
        f"P({old}), held-out wordings": ("paraphrase_other", ".3f"),
        "P(true), other landmarks": ("neighbourhood_wanted", ".3f"),
        f"P({new}), other landmarks": ("neighbourhood_other", ".3f"),
        "KL(instructed ‖ ·), held-out wordings, nats": ("paraphrase_kl_instructed", ".3f"),
        "KL(plain ‖ ·), other landmarks, nats": ("neighbourhood_kl_plain", ".3f"),
        "unrelated perplexity ×": ("perplexity_ratio", ".3f"),
        f"plain completions: P({new}) > P({old})": ("completion", ".2f"),
        f"plain completions: P({new})": ("completion_wanted", ".3f"),
        f"plain completions: P({old})": ("completion_other", ".3f"),
        f"plain completions: P(true) > P({new}), other landmarks": ("completion_neighbourhood", ".2f"),
        f"plain completions: P({new}), other landmarks": ("completion_neighbourhood_other", ".3f"),
    }
    return table(
        ["", *runs],
        [[label, *(format(run[key], form) for run in runs.values())] for label, (key, form) in rows.items()],
    )


def answer_table(questions: Sequence[Question], answers: Mapping[str, Sequence[str]]) -> str:
    """Greedy answers to some questions."""
    rows = [
        [question.input, *(one_line(own[index], 200) for own in answers.values())]
        for index, question in enumerate(questions)
    ]
    return table(["question", *answers], rows, left=1 + len(answers))


def _ask(wording: str, landmark: str) -> str:
    return _capital(wording.format(landmark))


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


if __name__ == "__main__":
    command_line(edit_fact)
