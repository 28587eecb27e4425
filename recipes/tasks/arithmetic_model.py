"""A tiny Llama that adds or multiplies as it is told, trained once and kept in the cache.

Its texts are ``sum : 3 7 = 10 ; 12 5 = 17 ;``, ``product : 3 7 = 21 ; 12 5 = 60 ;``, with several wordings, and the
same without an instruction, where the first answer can be either and the others go on as the first one. A number is one
token. Some ordered pairs of operands are in no training text; the other order of each is in some: what a product of two
numbers is cannot be made out from other products, that the order does not matter can.
"""

from __future__ import annotations

import hashlib
import json
import math
import operator
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from lightning.pytorch import LightningModule, Trainer
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from transformers import BatchEncoding, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lit_thought import PromptTemplate
from lit_thought.errors import ThoughtError, check_counts
from lit_thought.files import atomic_folder, default_cache_dir

Pair = tuple[int, int]
OPERATIONS: dict[str, Callable[[int, int], int]] = {"sum": operator.add, "product": operator.mul}
WORDINGS = {
    "sum": ("sum :", "add :", "plus :", "the sum of :"),
    "product": ("product :", "multiply :", "times :", "the product of :"),
}
TEMPLATE = PromptTemplate("{input} = {output} ;", separator=" ")
_SPECIAL = ("<s>", "</s>")


@dataclass(frozen=True)
class Training:
    """How the tiny model is made.

    Args:
        largest: the operands are 0 to this.
        held_out: share of the pairs of two different operands that the training texts have in one order only.
        queries: questions in each training text.
        instructed: share of the training texts that say which operation.
        layers: blocks.
        width: size of the residual stream.
        heads: attention heads.
        steps: optimizer steps.
        batch_size: texts a step.
        learning_rate: highest learning rate.
        weight_decay: AdamW's.
        seed: of the weights, the texts and which pairs are held out.
    """

    largest: int = 19
    held_out: float = 0.3
    queries: int = 4
    instructed: float = 0.7
    layers: int = 3
    width: int = 96
    heads: int = 4
    steps: int = 1200
    batch_size: int = 64
    learning_rate: float = 3e-3
    weight_decay: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        check_counts(largest=self.largest, layers=self.layers, width=self.width)
        check_counts(heads=self.heads, steps=self.steps, batch_size=self.batch_size)
        if self.queries < 2:
            raise ThoughtError(f"training.queries must be 2 or more, for demonstrations; got {self.queries!r}.")
        if not 0 < self.held_out <= 1:
            raise ThoughtError(f"training.held_out must be above 0 and at most 1; got {self.held_out!r}.")
        if self.width % (2 * self.heads):
            raise ThoughtError(
                f"training.width must be a multiple of twice the {self.heads} heads; got {self.width}. Change either."
            )


def trained_model(training: Training) -> tuple[Path, bool]:
    """The folder of the model with its tokenizer, and whether it had to be trained: it is kept in the cache.

    Its ``training.json`` holds the settings, the seconds that the training took by the clock and of the processor,
    and the last loss.
    """
    folder = default_cache_dir() / f"arithmetic-{cache_key(training)}"
    if folder.is_dir():
        return folder, False
    with atomic_folder(folder, overwrite=True) as temporary:
        start, busy = time.perf_counter(), time.process_time()
        tokenizer = make_tokenizer(training.largest)
        model, loss = train(training, tokenizer)
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        seconds = {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - busy}
        record = {"settings": asdict(training), **{name: round(value) for name, value in seconds.items()}, "loss": loss}
        (temporary / "training.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return folder, True


def cache_key(training: Training) -> str:
    """Hash of all that makes the model what it is: settings, wordings and the form of its texts."""
    content = json.dumps([1, asdict(training), WORDINGS, TEMPLATE.to_dict()], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def make_tokenizer(largest: int) -> PreTrainedTokenizerFast:
    """A tokenizer of whole words and whole numbers, up to the largest product; it puts ``<s>`` before a text."""
    words = sorted({word for wordings in WORDINGS.values() for wording in wordings for word in wording.split()})
    numbers = map(str, range(max(largest**2, 2 * largest) + 1))
    tokens = [*_SPECIAL, "=", ";", *words, *numbers]
    core = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="</s>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", core.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="</s>",
        clean_up_tokenization_spaces=False,
    )


def split_pairs(training: Training) -> tuple[list[Pair], list[Pair]]:
    """All ordered pairs of operands: those to train on, and those held out, whose other order is among the former."""
    numbers = range(training.largest + 1)
    every = [(a, b) for a in numbers for b in numbers]
    generator = random.Random(training.seed)
    ascending = [(a, b) for a, b in every if a < b]
    chosen = generator.sample(ascending, math.ceil(training.held_out * len(ascending)))
    held_out = [generator.choice([(a, b), (b, a)]) for a, b in chosen]
    return sorted(set(every) - set(held_out)), held_out


def question(pair: Pair) -> str:
    """The two operands as an input of the template."""
    return f"{pair[0]} {pair[1]}"


def solved(pairs: Sequence[Pair], operation: str) -> str:
    """The pairs with their answers, in a row: a training text without its instruction."""
    form, answer = TEMPLATE.text, OPERATIONS[operation]
    return " ".join(form.replace("{input}", question(p)).replace("{output}", str(answer(*p))) for p in pairs)


def told(wording: str, pairs: Sequence[Pair], operation: str) -> str:
    """The same behind an instruction."""
    return wording + TEMPLATE.separator + solved(pairs, operation)


def write_text(generator: random.Random, pairs: Sequence[Pair], queries: int, instructed: float) -> str:
    """One training text: either operation, with an instruction or (share 1 − ``instructed``) without."""
    operation = generator.choice(sorted(OPERATIONS))
    chosen = generator.choices(pairs, k=queries)
    if generator.random() < instructed:
        return told(generator.choice(WORDINGS[operation]), chosen, operation)
    return solved(chosen, operation)


def answer_labels(ids: Tensor, equals: int) -> Tensor:
    """What the model learns to predict, (texts, tokens): the answer after each ``=`` and its end; −100 elsewhere."""
    learned = torch.zeros_like(ids, dtype=torch.bool)
    learned[:, 1:] |= ids[:, :-1] == equals
    learned[:, 2:] |= ids[:, :-2] == equals
    return ids.masked_fill(~learned, -100)


class Texts(Dataset[str]):
    """The training texts, each from its own seed."""

    def __init__(self, training: Training) -> None:
        self.training, self.pairs = training, split_pairs(training)[0]

    def __len__(self) -> int:
        return self.training.steps * self.training.batch_size

    def __getitem__(self, index: int) -> str:
        generator = random.Random(f"{self.training.seed} {index}")
        return write_text(generator, self.pairs, self.training.queries, self.training.instructed)


class Learner(LightningModule):
    """Next-token training on the answers."""

    def __init__(self, model: LlamaForCausalLM, training: Training, equals: int) -> None:
        super().__init__()
        self.model, self.training_settings, self.equals = model, training, equals
        self.loss = float("nan")

    def training_step(self, batch: BatchEncoding, batch_idx: int) -> Tensor:
        labels = answer_labels(batch["input_ids"], self.equals)
        loss = self.model(**batch, labels=labels).loss
        self.loss = float(loss.detach())
        self.log("loss", self.loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> dict[str, object]:
        settings = self.training_settings
        optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=settings.learning_rate, betas=(0.9, 0.98), weight_decay=settings.weight_decay
        )
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, settings.learning_rate, total_steps=settings.steps + 1, pct_start=0.1, cycle_momentum=False
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def train(training: Training, tokenizer: PreTrainedTokenizerFast) -> tuple[LlamaForCausalLM, float]:
    """Train the model from scratch on the CPU; also the last batch's loss."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(training.seed)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(tokenizer),
                hidden_size=training.width,
                intermediate_size=4 * training.width,
                num_hidden_layers=training.layers,
                num_attention_heads=training.heads,
                num_key_value_heads=training.heads,
                max_position_embeddings=256,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        )
    learner = Learner(model, training, tokenizer.convert_tokens_to_ids("="))
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=training.steps,
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    loader = DataLoader(
        Texts(training), batch_size=training.batch_size, collate_fn=lambda texts: _encode(tokenizer, texts)
    )
    trainer.fit(learner, loader)
    return model.eval(), learner.loss


def _encode(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> BatchEncoding:
    return tokenizer(list(texts), padding=True, return_tensors="pt", return_token_type_ids=False)
