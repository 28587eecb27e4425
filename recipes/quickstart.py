"""The main job on the embedded model: demonstrations of antonyms become an adapter.

    python recipes/quickstart.py --config recipes/quickstart.yaml

Fits the patch from nothing but the demonstrations, saves it as a PEFT adapter, loads that with PEFT alone, checks that
it is the same model, and compares plain, instructed and patched on words that were not fitted.
"""

from __future__ import annotations

import random
import tempfile
from pathlib import Path

import jsonargparse
import torch
from peft import PeftModel

from lit_thought import evaluate, load_model, transmute
from lit_thought.evaluation.compare import format_result
from lit_thought.files import check_output_folder
from lit_thought.prompts.pairs import load_pairs
from lit_thought.prompts.template import DEFAULT_TEMPLATE

DATA = Path(__file__).parent / "data"


def quickstart(
    model: str = "smollm2",
    task: str = "common_words/antonym",
    seed: int = 0,
    rank: int = 16,
    test: int = 30,
    out: str | None = None,
) -> None:
    """Fit, save, reload with PEFT, evaluate, print the table.

    Args:
        model: "smollm2" (the embedded default), a hub id or a local directory.
        task: a word task below recipes/data, or a JSON, JSONL or CSV file of input/output pairs.
        seed: seed of the choice of demonstrations and test words.
        rank: rank of the adapter.
        test: most test words.
        out: folder to write the adapter to; a temporary one when left out.
    """
    if out is not None:
        check_output_folder(out, argument="out")
    print(f"Loading {model} …")
    lm, tokenizer = load_model(model)
    file = DATA / f"{task}.json"
    pairs = load_pairs(file if file.is_file() else task)
    random.Random(seed).shuffle(pairs)
    instruction = "".join(DEFAULT_TEMPLATE.format(**pair) for pair in pairs[:10])

    print(f"Transmuting this instruction into weights; the model writes the inputs itself:\n\n{instruction}")
    patch = transmute(lm, tokenizer, instruction, rank=rank, max_new_tokens=12)
    fitted = {pair["input"] for pair in patch.provenance["inputs"]["pairs"]}
    unseen = [pair for pair in pairs[10:] if pair["input"] not in fitted][:test]

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(out) if out is not None else Path(scratch) / "adapter"
        patch.save_adapter(folder)
        size = (folder / "adapter_model.safetensors").stat().st_size
        print(f"Saved a rank-{patch.rank} PEFT adapter: {size / 1e6:.1f} MB")

        prompt = tokenizer(f"Q: {unseen[0]['input']}\nA:", return_tensors="pt")
        with torch.no_grad(), patch.applied(lm):
            direct = lm(**prompt).logits
        adapted = PeftModel.from_pretrained(lm, str(folder))
        with torch.no_grad():
            difference = (adapted(**prompt).logits - direct).abs().max()
        print(f"Loaded by PEFT; largest difference of logits from the patched model: {difference:.1e}\n")
        lm = adapted.unload()

    result = evaluate(lm, tokenizer, patch, instruction=instruction, pairs=unseen, max_new_tokens=12)
    print(format_result(result))


if __name__ == "__main__":
    jsonargparse.auto_cli(quickstart)
