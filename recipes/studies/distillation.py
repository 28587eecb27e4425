"""LoRA context distillation: the adapter that gradient descent finds, as a baseline.

The student is the model with a PEFT LoRA and the plain prompt, the teacher the model itself with the instruction. AdamW
minimises KL(teacher ‖ student), mean over the compared tokens that predict the output or its end: those that a fit of
``lit_thought`` makes heavier by ``answer_weight``. Tokens that all prompts of a run begin with are run once: the
teacher's for good, the student's once a step.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor
from torch.nn import Parameter
from torch.nn.functional import kl_div
from torch.optim import AdamW
from torch.optim.lr_scheduler import LinearLR
from torch.utils.data import DataLoader
from transformers import DynamicCache, PreTrainedModel

from lit_thought import ThoughtPatch
from lit_thought.errors import ThoughtError
from lit_thought.model.blocks import find_blocks
from lit_thought.model.calls import cache_arguments
from lit_thought.prompts.alignment import TokenisedPair
from lit_thought.prompts.batches import common_prefix, forward_inputs, pad
from lit_thought.runs.streams import lead_cache
from lit_thought.settings import DEFAULT_SITES
from lit_thought.solve.factors import Factors
from lit_thought.timing import Stopwatch
from recipes.harness import repeated


class Example(NamedTuple):
    """Plain token ids up to the last that predicts the output or its end, and the teacher's log probabilities at the
    last n of them, (n, vocabulary)."""

    ids: tuple[int, ...]
    teacher: Tensor


def teach(model: PreTrainedModel, pairs: Sequence[TokenisedPair], batch_size: int = 32) -> list[Example]:
    """Run the instructed prompts, the chunk once; pairs without an output are left out.

    Raises:
        ThoughtError: when no pair has an output.
    """
    plain, instructed, counts = [], [], []
    for pair in pairs:
        start, stop = pair.output_span
        matches = zip(pair.plain_positions, pair.instructed_positions, strict=True)
        rows = [match for match in matches if start < stop and start - 1 <= match[0] < stop]
        if rows:
            plain.append(pair.plain_ids[: rows[-1][0] + 1])
            instructed.append(pair.instructed_ids[: rows[-1][1] + 1])
            counts.append(len(rows))
    if not plain:
        raise ThoughtError("pairs: expected at least one with an output, got none; give outputs or generate them.")
    examples = []
    with torch.no_grad():
        shared = shared_length(instructed, counts)
        lead = lead_cache(model, instructed[0][:shared]) if shared else None
        for at in range(0, len(plain), batch_size):
            batch = slice(at, at + batch_size)
            logits = last_logits(model, instructed[batch], counts[batch], lead)
            teacher = logits.float().log_softmax(-1).split(counts[batch])
            examples += [Example(*pair) for pair in zip(plain[batch], teacher, strict=True)]
    return examples


def student_logits(model: PreTrainedModel, examples: Sequence[Example]) -> Tensor:
    """Logits of the plain run where the examples have teacher's, (n, vocabulary), with gradients where they are on."""
    ids, counts = [example.ids for example in examples], [len(example.teacher) for example in examples]
    shared = shared_length(ids, counts)
    return last_logits(model, ids, counts, lead_cache(model, ids[0][:shared]) if shared else None)


def shared_length(sequences: Sequence[Sequence[int]], counts: Sequence[int]) -> int:
    """How many tokens all sequences begin with, before the last ``counts`` of each."""
    return min(common_prefix(sequences), *(len(ids) - n for ids, n in zip(sequences, counts, strict=True)))


def last_logits(
    model: PreTrainedModel, sequences: Sequence[Sequence[int]], counts: Sequence[int], lead: DynamicCache | None
) -> Tensor:
    """Logits of the last ``counts`` tokens of each sequence, (sum of counts, vocabulary).

    Args:
        model: a causal LM.
        sequences: token ids.
        counts: how many tokens of each.
        lead: KV cache of what all of them begin with, batch size 1; it is left as it is.
    """
    cache, ahead = DynamicCache(), 0
    if lead is not None:
        ahead = lead.get_seq_length()
        cache = repeated(lead, len(sequences))
    tokens = pad([ids[ahead:] for ids in sequences], 0, "right").to(model.device)
    ends = [len(ids) - ahead for ids in sequences]
    rows = [row for row, n in enumerate(counts) for _ in range(n)]
    places = torch.tensor([at for end, n in zip(ends, counts, strict=True) for at in range(end - n, end)])
    columns, inverse = places.unique(return_inverse=True)  # the head is costly: only where some logits are wanted
    logits = model(
        **forward_inputs(tokens, ahead),
        **cache_arguments(model, cache),
        use_cache=True,
        logits_to_keep=columns.to(model.device),
    ).logits
    return logits[torch.tensor(rows), inverse]


def distillation_loss(teacher: Tensor, logits: Tensor) -> Tensor:
    """KL(p ‖ q) in nats, Σ_v p_v (log p_v − log q_v), mean over tokens, 0-dim, in float32 or better.

    Args:
        teacher: log p, (n, vocabulary).
        logits: the student's, (n, vocabulary); q is their softmax.
    """
    found = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
    return kl_div(found, teacher.to(found), log_target=True, reduction="sum") / len(teacher)


class Distillation(LightningModule):
    """AdamW on the LoRA factors of a student.

    Args:
        student: the model with LoRA.
        learning_rate: after a linear rise over the first ``warmup_steps`` steps it stays.
        warmup_steps: 0 for none.
    """

    def __init__(self, student: PreTrainedModel, learning_rate: float, warmup_steps: int = 0) -> None:
        super().__init__()
        self.student, self.learning_rate, self.warmup_steps = student, learning_rate, warmup_steps

    def transfer_batch_to_device(self, batch: list[Example], device: torch.device, index: int) -> list[Example]:
        """The examples as they are; tokens go to the device once they are padded."""
        return batch

    def training_step(self, batch: list[Example], batch_idx: int) -> Tensor:
        """The distillation loss of one batch."""
        return distillation_loss(torch.cat([example.teacher for example in batch]), student_logits(self.student, batch))

    def configure_optimizers(self) -> Any:
        """AdamW without weight decay, and the warm-up."""
        trained = [parameter for parameter in self.student.parameters() if parameter.requires_grad]
        optimizer = AdamW(trained, self.learning_rate, weight_decay=0.0)
        if not self.warmup_steps:
            return optimizer
        warmup = LinearLR(optimizer, 1 / (self.warmup_steps + 1), 1.0, self.warmup_steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": warmup, "interval": "step"}}


class Follow(Callback):
    """Times the parts of each step, and takes stock of the student after some steps, off the clock.

    Args:
        stopwatch: gets the seconds of forward, backward, optimizer and evaluate.
        score: what is measured of the student, by name.
        every: steps from one measurement to the next; a last one follows the last step.
        also_at: seconds of training after which there is one more.
        finished: whether the figures are good enough to stop.
        max_seconds: of training, after which it stops.
    """

    def __init__(
        self,
        stopwatch: Stopwatch,
        score: Callable[[PreTrainedModel], Mapping[str, float]],
        every: int,
        also_at: float,
        finished: Callable[[Mapping[str, float]], bool],
        max_seconds: float,
    ) -> None:
        self.stopwatch, self.score, self.every, self.also_at = stopwatch, score, every, also_at
        self.finished, self.max_seconds = finished, max_seconds
        self.began = stopwatch.now() - sum(stopwatch.seconds.values())
        self.history: list[dict[str, float]] = []
        self._mark = self.began

    @property
    def seconds(self) -> float:
        """Seconds since the beginning, what came before this callback included, without the measurements."""
        return self.stopwatch.now() - self.began - self.stopwatch.seconds["evaluate"]

    def _lap(self, name: str) -> None:
        now = self.stopwatch.now()
        self.stopwatch.seconds[name] += now - self._mark
        self._mark = now

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """A step begins."""
        self._mark = self.stopwatch.now()

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """The loss is there."""
        self._lap("forward")

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The gradients are there."""
        self._lap("backward")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Measure where it is time to, and stop where all is reached."""
        assert isinstance(pl_module, Distillation)
        self._lap("optimizer")
        seconds, step = self.seconds, trainer.global_step
        ends = seconds >= self.max_seconds or step == trainer.max_steps
        crosses = seconds >= self.also_at and all(entry["seconds"] < self.also_at for entry in self.history)
        if not (ends or crosses or step % self.every == 0):
            return
        with self.stopwatch("evaluate"):
            figures = self.score(pl_module.student)
        self.history.append({"step": step, "seconds": seconds, "loss": float(outputs["loss"]), **figures})
        trainer.should_stop = ends or self.finished(figures)


@dataclass(frozen=True)
class Distilled:
    """What :func:`distil` found.

    Attributes:
        patch: the adapter.
        seconds: teacher, adapter (putting it on), forward, backward, optimizer, and other (Lightning's); evaluate.
        history: the figures of each measurement, with step, seconds of training so far and the step's loss.
    """

    patch: ThoughtPatch
    seconds: dict[str, float]
    history: list[dict[str, float]]


def distil(
    model: PreTrainedModel,
    pairs: Sequence[TokenisedPair],
    score: Callable[[PreTrainedModel], Mapping[str, float]],
    *,
    learning_rate: float,
    rank: int = 16,
    targets: str | list[str] = "all-linear",
    batch_size: int | None = None,
    warmup_steps: int = 0,
    max_steps: int = 100,
    max_seconds: float = float("inf"),
    every: int = 10,
    also_at: float = float("inf"),
    finished: Callable[[Mapping[str, float]], bool] = lambda figures: False,
    seed: int = 0,
) -> Distilled:
    """Train a LoRA adapter until it is good enough, or the steps or seconds are up.

    Args:
        model: a frozen causal LM, left as it was.
        pairs: what to train on, with outputs: ``PairDataModule.tokenised``.
        score: what is measured of the student.
        learning_rate: of AdamW.
        rank: of the factors; alpha is the rank.
        targets: as PEFT's ``target_modules``, or ``"sites"``: the layers that lit_thought changes by default.
        batch_size: pairs a step; None for all of them.
        warmup_steps: over which the learning rate rises.
        max_steps: most steps.
        max_seconds: of training, teacher included, after which it stops.
        every: steps from one measurement to the next.
        also_at: seconds after which there is one more.
        finished: whether the figures are good enough to stop.
        seed: of the factors' initialisation and the order of the pairs.
    """
    stopwatch = Stopwatch()
    with stopwatch("teacher"):
        examples = teach(model, pairs)
    with stopwatch("adapter"), torch.random.fork_rng():
        torch.manual_seed(seed)
        student = with_lora(model, rank, targets)
    follow = Follow(stopwatch, score, every, also_at, finished, max_seconds)
    loader = DataLoader(
        examples,  # type: ignore[arg-type]
        batch_size or len(examples),
        shuffle=True,
        generator=torch.Generator().manual_seed(seed),
        collate_fn=list,
    )
    device = model.device
    trainer = Trainer(
        accelerator=device.type,
        devices=1 if device.index is None else [device.index],
        max_epochs=-1,
        max_steps=max_steps,
        callbacks=[follow],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Distillation(student.get_base_model(), learning_rate, warmup_steps), loader)
    seconds = dict(stopwatch.seconds)
    measured = sum(seconds.values()) - seconds["evaluate"]
    seconds["other"] = follow.history[-1]["seconds"] - measured
    return Distilled(lora_patch(student.get_base_model()), seconds, follow.history)


def with_lora(model: PreTrainedModel, rank: int, targets: str | list[str]) -> PeftModel:
    """A student whose frozen weights are those of ``model``, in the same memory; B starts at zero."""
    if targets == "sites":
        blocks = find_blocks(model)
        targets = [path for block in blocks for name in DEFAULT_SITES for path in block.sites[name].targets]
    shared = {id(weight): Parameter(weight.detach(), requires_grad=False) for weight in model.parameters()}
    student = copy.deepcopy(model, memo=shared)
    config = LoraConfig(r=rank, lora_alpha=rank, lora_dropout=0.0, target_modules=targets, task_type="CAUSAL_LM")
    return get_peft_model(student, config).eval()


def lora_patch(student: PreTrainedModel) -> ThoughtPatch:
    """The factors of a student as a patch of the model that it was made from."""
    factors = {
        name: Factors(layer.lora_A["default"].weight, layer.scaling["default"] * layer.lora_B["default"].weight)
        for name, layer in student.named_modules()
        if isinstance(layer, LoraLayer)
    }
    return ThoughtPatch(factors)
