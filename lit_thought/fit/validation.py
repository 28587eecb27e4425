"""A fit followed: figures for the trainer's loggers, and, step by step, pairs that it does not see."""

from __future__ import annotations

from collections.abc import Mapping

from lightning.pytorch import Trainer
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lit_thought.evaluation.compare import Evaluation
from lit_thought.fit.data import PairDataModule
from lit_thought.patch.patch import ThoughtPatch

__all__ = ["Validation", "log_figures"]


def log_figures(trainer: Trainer, of: str, figures: Mapping[str, float], step: int) -> None:
    """Send ``of/…`` to all loggers of the first process, to be seen at once."""
    for logger in trainer.loggers if trainer.is_global_zero else ():
        logger.log_metrics({f"{of}/{name}": value for name, value in figures.items()}, step)
        logger.save()


class Validation:
    """How the validation pairs do before the first step and after each one.

    Creating one writes their plain and instructed outputs.
    """

    def __init__(
        self, data: PairDataModule, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, progress: bool
    ) -> None:
        self._evaluation = Evaluation(
            model,
            tokenizer,
            instruction=data.instruction,
            pairs=data.val_pairs,
            template=data.template,
            unrelated=None,
            max_new_tokens=data.longest(tokenizer),
            batch_size=data.settings.batch_size,
            progress=progress,
        )

    def rows(self, step: int, patch: ThoughtPatch, trainer: Trainer) -> list[dict[str, float]]:
        """The figures after a step, before the first one too those of the plain model as step 0; also logged, as
        ``val/…``."""
        result = self._evaluation.score(patch)
        rows = []
        for number, run in ((0, "plain"), (step, "patched"))[step > 1 :]:
            figures = {
                "fidelity": result["fidelity" if run == "patched" else "fidelity_plain"],
                "output_kl": result["output_kl"][run],
                "output_agreement": result["output_agreement"][run],
            }
            if run == "patched" and (own := result["own_text"]["kl"]) is not None:
                figures["own_text_kl"] = own
            if result["accuracy"] is not None:
                figures["accuracy"] = result["accuracy"][run]
                figures["instructed_accuracy"] = result["accuracy"]["instructed"]
            rows.append({"step": number, **figures})
            log_figures(trainer, "val", figures, number)
        return rows
