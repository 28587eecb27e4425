"""A mixture of experts that behaves like a language model, made from a dense one: does attn_out alone suffice?

    python -m recipes.studies.moe --config recipes/studies/moe.yaml

No mixture of experts is small enough to come along, so the recipe makes one by sparse upcycling (Komatsuzaki et al.
2022, arXiv 2212.05055): a Mixtral whose experts are copies of the dense model's MLPs, each with its own noise, behind a
random router. Its experts are fused tensors that no LoRA on a linear layer can change, so the fit has one site,
attention's output projection. If that gives back what the instruction does to the residual stream, the router and the
experts see what they saw with the instruction; the table shows the words it gets right, and how often each token is
routed to the same experts as in the instructed run.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from statistics import mean
from typing import Any

import torch
from transformers import MixtralConfig, MixtralForCausalLM

from lit_thought import PromptTemplate, ThoughtPatch, load_model
from lit_thought.patch.results import RUNS
from recipes.harness import SIX_TASKS, TEMPLATE, Trial, command_line, load_split, shown, table, write_results

_SAME = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
    "rms_norm_eps",
    "rope_parameters",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "tie_word_embeddings",
)
"""What the mixture's configuration takes over from the dense model's."""


def moe(
    model: str = "smollm2",
    tasks: Sequence[str] = SIX_TASKS,
    seed: int = 0,
    experts: int = 8,
    experts_per_token: int = 2,
    noise: float = 0.1,
    rank: int = 16,
    shots: int = 10,
    fit: int = 30,
    test: int = 100,
    max_new_tokens: int = 12,
    out: str = "recipes/results/moe",
) -> None:
    """Upcycle, fit and test."""
    dense, tokenizer = load_model(model)
    sparse = upcycle(dense, experts, experts_per_token, noise, seed)
    del dense
    rows: list[dict[str, Any]] = []
    for task in tasks:
        trial = Trial(sparse, tokenizer, load_split(task, seed, shots, fit, test), max_new_tokens)
        patch = trial.fit(rank=rank)
        result = trial.evaluation().score(patch)
        del result["items"]
        routing = {"plain": routing_agreement(trial, None), "patched": routing_agreement(trial, patch)}
        rows.append({"task": trial.split.name, "routing": routing, **result})
        print(_line(rows[-1]), flush=True)
    head = ["task", *RUNS, "output equal to the instructed one", "perplexity ×"]
    page = table([*head, "same experts, plain", "same experts, patched"], map(_line, rows))
    settings = patch.provenance["settings"]
    page += f"\nmean fidelity {mean(row['fidelity'] for row in rows):.3f}; sites: {settings['sites']}"
    shape = f"{experts} experts, {experts_per_token} a token, noise {noise}"
    page = f"Upcycled to a mixture of experts ({shape}), seed {seed}\n\n{page}"
    record = {"model": shown(model), "shape": shape, "settings": settings, "rows": rows}
    write_results(__file__, out, page, record)


def _line(row: dict[str, Any]) -> list[str]:
    cells = [row["task"], *(f"{row['accuracy'][run]:.2f}" for run in RUNS), f"{row['fidelity']:.2f}"]
    return [*cells, f"{row['perplexity_ratio']:.3f}", *(f"{row['routing'][run]:.2f}" for run in ("plain", "patched"))]


def upcycle(dense: Any, experts: int, experts_per_token: int, noise: float, seed: int) -> MixtralForCausalLM:
    """A Mixtral with the dense model's attention, and noisy copies of its MLPs behind a random router."""
    old = dense.config
    config = MixtralConfig(
        **{name: getattr(old, name) for name in _SAME},
        num_local_experts=experts,
        num_experts_per_tok=experts_per_token,
    )
    generator = torch.Generator().manual_seed(seed)

    def copies(weight: torch.Tensor) -> torch.Tensor:
        spread = noise * weight.std()
        return torch.stack([weight + spread * torch.randn(weight.shape, generator=generator) for _ in range(experts)])

    weights = dict(dense.state_dict())
    for index in range(old.num_hidden_layers):
        mlp = f"model.layers.{index}.mlp"
        gate, up, down = (weights.pop(f"{mlp}.{name}_proj.weight") for name in ("gate", "up", "down"))
        weights[f"{mlp}.experts.gate_up_proj"] = copies(torch.cat([gate, up]))
        weights[f"{mlp}.experts.down_proj"] = copies(down)
        weights[f"{mlp}.gate.weight"] = torch.randn(experts, old.hidden_size, generator=generator)
    sparse = MixtralForCausalLM(config)
    sparse.load_state_dict(weights)
    sparse.generation_config = dense.generation_config
    return sparse.eval().requires_grad_(False)


@torch.no_grad()
def routing_agreement(trial: Trial, patch: ThoughtPatch | None) -> float:
    """Share of the experts that test prompts are routed to which are those of the instructed run, over all blocks."""
    model, template, top = trial.model, PromptTemplate.parse(TEMPLATE), trial.model.config.num_experts_per_tok
    shares = []
    for pair in trial.split.test[:20]:
        tokens = template.tokenise(trial.tokenizer, trial.split.instruction, pair["input"], pair["output"])
        wanted = _experts(model, tokens.instructed_ids, tokens.instructed_positions, top)
        with nullcontext() if patch is None else patch.applied(model, check=False):
            found = _experts(model, tokens.plain_ids, tokens.plain_positions, top)
        shares.append(float((wanted & found).sum() / wanted.sum()))
    return mean(shares)


def _experts(model: Any, ids: Sequence[int], positions: Sequence[int], top: int) -> torch.Tensor:
    """Which experts each token is routed to in each block, (blocks, tokens, experts), bool."""
    logits = model(torch.tensor([list(ids)]), output_router_logits=True).router_logits
    chosen = torch.stack([layer[list(positions)] for layer in logits])
    return torch.zeros_like(chosen, dtype=torch.bool).scatter_(-1, chosen.topk(top).indices, True)


if __name__ == "__main__":
    command_line(moe)
