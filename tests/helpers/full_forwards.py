"""What every site of every block sees, from full forwards of one sequence at a time through models whose weights are
changed: nothing is shared with the library's streams."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lit_thought.model.blocks import find_blocks
from lit_thought.prompts.alignment import TokenisedPair
from lit_thought.runs.streams import SitePatch

ANSWER_WEIGHT = 3.0

Rows = tuple[Tensor, Tensor, Tensor, Tensor]
"""a, δ, the shift and the weights of one stage's compared tokens."""


def is_gpt2(model: PreTrainedModel) -> bool:
    return model.config.model_type == "gpt2"


def layer_at(model: PreTrainedModel, block: int, name: str) -> nn.Module:
    """One of the layers at the sites, without asking the library where they are."""
    if model.config.model_type != "gpt2":
        return model.get_submodule(f"model.layers.{block}.{name}")
    names = {"self_attn.o_proj": "attn.c_proj", "mlp.down_proj": "mlp.c_proj"}
    return model.get_submodule(f"transformer.h.{block}.{names.get(name, 'mlp.c_fc')}")


def first_linears(model: PreTrainedModel) -> tuple[str, ...]:
    return ("mlp.gate_proj",) if model.config.model_type == "gpt2" else ("mlp.gate_proj", "mlp.up_proj")


@torch.no_grad()
def install(changed: PreTrainedModel, original: PreTrainedModel, block: int, patches: Mapping[str, SitePatch]) -> None:
    """Give one block of ``changed`` the weights and biases of ``original`` with these patches."""
    transposed = original.config.model_type == "gpt2"
    out, down = "self_attn.o_proj", "mlp.down_proj"
    for name, site in ((out, "attn_out"), (down, "mlp_out"), *((name, "mlp_in") for name in first_linears(original))):
        weight = layer_at(original, block, name).weight.clone()
        if site in patches and (matrix := patches[site].matrix) is not None:
            delta = matrix.B @ matrix.A
            if site == "mlp_in":
                delta = (weight.T if transposed else weight) @ delta
            weight += delta.T if transposed else delta
        layer_at(changed, block, name).weight.copy_(weight)
    for name, sites in ((out, ["attn_out"]), (down, ["mlp_in", "mlp_out"])):
        vectors = [patches[site].vector for site in sites if site in patches and patches[site].vector is not None]
        bias = layer_at(original, block, name).bias
        if vectors:
            bias = nn.Parameter(sum(vectors) + (0 if bias is None else bias))
        layer_at(changed, block, name).bias = bias


def trace(
    model: PreTrainedModel, ids: Sequence[int], replaced: Mapping[int, tuple[list[int], Tensor]] | None = None
) -> tuple[list[Tensor], dict[tuple[int, str], tuple[Tensor, Tensor]]]:
    """A plain full forward: each block's entrance, and each site's input and the residual stream after it.

    At mlp_in, what the first linear layers make of it stands for their input: they alone tell how it is patched.
    ``replaced``: for a block, positions and what enters at them instead.
    """
    entrances: list[Tensor] = []
    seen: dict[tuple[int, str], tuple[Tensor, Tensor]] = {}
    handles = []
    for index, block in enumerate(model.get_decoder().get_submodule("h" if is_gpt2(model) else "layers")):

        def enter(module: nn.Module, args: tuple, index: int = index) -> tuple:
            hidden = args[0]
            if replaced and index in replaced:
                positions, values = replaced[index]
                hidden = hidden.clone()
                hidden[0, positions] = values
            entrances.append(hidden[0])
            return (hidden, *args[1:])

        def attention(module: nn.Module, args: tuple, output: Tensor, index: int = index) -> None:
            seen[index, "attn_out"] = (args[0][0], entrances[index] + output[0])

        def first(module: nn.Module, args: tuple, output: Tensor, name: str, index: int = index) -> None:
            seen[index, "mlp_in"] = (args[0][0], seen[index, "attn_out"][1])
            seen[index, name] = (args[0][0], output[0])

        def mlp(module: nn.Module, args: tuple, output: Tensor, index: int = index) -> None:
            seen[index, "mlp_out"] = (args[0][0], seen[index, "attn_out"][1] + output[0])

        handles += [
            block.register_forward_pre_hook(enter),
            layer_at(model, index, "self_attn.o_proj").register_forward_hook(attention),
            layer_at(model, index, "mlp.down_proj").register_forward_hook(mlp),
        ]
        for name in first_linears(model):
            handles.append(layer_at(model, index, name).register_forward_hook(partial(first, name=name)))
    with torch.no_grad():
        model(torch.tensor([list(ids)]), use_cache=False)
    for handle in handles:
        handle.remove()
    return entrances, seen


class BruteForce:
    """What each stage sees, from one pair and one full forward at a time."""

    def __init__(
        self,
        model: PreTrainedModel,
        pairs: Sequence[TokenisedPair],
        order: str = "sequential",
        answer_weight: float = ANSWER_WEIGHT,
    ) -> None:
        self.model, self.order = model, order
        self.changed = copy.deepcopy(model)
        self.blocks = len(find_blocks(model))
        self.patches: dict[tuple[int, str], SitePatch] = {}
        self.comparisons = []  # plain ids, the target run, (plain position, target position, weight)
        sinks = Counter(pair.plain_ids[:1] for pair in pairs if pair.sink)
        for ids, number in sinks.items():
            self.comparisons.append((ids, self.trace(model, ids), [(0, 0, float(number))]))
        for pair in pairs:
            start, stop = pair.output_span
            matches = [
                (p, q, answer_weight if start < stop and start - 1 <= p < stop else 1.0)
                for p, q in zip(pair.plain_positions, pair.instructed_positions, strict=True)
            ]
            self.comparisons.append((pair.plain_ids, self.trace(model, pair.instructed_ids), matches))

    def trace(
        self, model: PreTrainedModel, ids: Sequence[int], replaced: Mapping[int, tuple[list[int], Tensor]] | None = None
    ) -> tuple[list[Tensor], Any]:
        """Entrances and sites of one full forward."""
        return trace(model, ids, replaced)

    def install(self, patches: Mapping[tuple[int, str], SitePatch]) -> None:
        """Put patches in place of what these sites had."""
        self.patches |= patches
        for index in {block for block, _ in patches}:
            here = {site: patch for (block, site), patch in self.patches.items() if block == index}
            install(self.changed, self.model, index, here)

    def runs(self, block: int) -> Iterator[tuple[Any, Any, list[int], list[int], Tensor]]:
        """Of each comparison the changed and the target run's sites, the positions in both, and the weights."""
        for plain, (goals, goal), matches in self.comparisons:
            here, there = [p for p, _, _ in matches], [q for _, q, _ in matches]
            forced = None
            if self.order == "teacher-forced":  # the first block's entrance is the embedding
                forced = {index: (here, goals[index][there]) for index in range(1, block + 1)}
            _, seen = self.trace(self.changed, plain, forced)
            yield seen, goal, here, there, torch.tensor([weight for _, _, weight in matches], dtype=torch.float64)

    def observe(self, block: int, site: str) -> Rows:
        """A stage's rows."""
        columns: list[list] = [[], [], [], []]
        for seen, goal, here, there, weight in self.runs(block):
            a, residual = (x[here] for x in seen[block, site])
            shift = goal[block, site][1][there] - residual
            delta = shift
            if site == "mlp_in":  # δ is what W δ, the error of the first linear layers' outputs, comes from
                weights, errors = [], []
                for name in first_linears(self.model):
                    matrix = layer_at(self.model, block, name).weight.detach()
                    weights.append(matrix if is_gpt2(self.model) else matrix.T)
                    errors.append(goal[block, name][1][there] - seen[block, name][1][here])
                delta = torch.cat(errors, dim=1) @ torch.linalg.pinv(torch.cat(weights, dim=1))
                vector = self.patches.get((block, site), SitePatch()).vector
                shift = shift if vector is None else shift - vector
            for column, values in zip(columns, (a, delta, shift, weight), strict=True):
                column.append(values)
        return tuple(map(torch.cat, columns))  # type: ignore[return-value]
