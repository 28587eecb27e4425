"""What the recipes share: word tasks, a model with one of them, unrelated text, tables, figures and result files."""

from __future__ import annotations

import inspect
import json
import os
import platform
import random
import re
import subprocess
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, wraps
from pathlib import Path
from typing import Any

import jsonargparse
import torch
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from lit_thought import PairDataModule, ThoughtPatch, transmute
from lit_thought.errors import ThoughtError
from lit_thought.evaluation.compare import Evaluation
from lit_thought.evaluation.perplexity import unrelated_perplexity
from lit_thought.files import atomic_file, check_writable
from lit_thought.fit.preparing import prepare_pairs
from lit_thought.fit.provenance import versions
from lit_thought.prompts.pairs import load_pairs
from lit_thought.prompts.template import DEFAULT_TEMPLATE
from lit_thought.prompts.unrelated import load_texts, text_windows
from lit_thought.solve.intervals import paired_difference, wilson
from lit_thought.timing import Stopwatch

ROOT = Path(__file__).resolve().parents[1]
"""The checkout."""
DATA = ROOT / "recipes" / "data"
SIX_TASKS = (
    "common_words/country-capital",
    "common_words/antonym",
    "common_words/english-french",
    "function_vectors/singular-plural",
    "function_vectors/present-past",
    "function_vectors/capitalize",
)
TEMPLATE = DEFAULT_TEMPLATE
METHODS: dict[str, dict[str, Any]] = {
    "both": {"sites": ("attn_out", "mlp_out")},
    "auto": {
        "sites": ("attn_out", "mlp_out"),
        **dict.fromkeys(("ridge", "preserve_weight", "rank", "scale", "blocks"), "auto"),
    },
    "attn_out": {"sites": ("attn_out",)},
    "mlp_out": {"sites": ("mlp_out",)},
    "mlp_in": {"sites": ("mlp_in",)},
    "matrix": {"sites": ("mlp_in",), "parts": ("matrix",)},
    "vector": {"sites": ("mlp_in",), "parts": ("vector",)},
}
"""What the recipes compare, as arguments of ``transmute``: our default, the same with settings chosen on pairs held
back, its sites alone, the paper's site with thought matrix and thought vector together and apart."""


@dataclass(frozen=True)
class Split:
    """One split of a task, as pairs with outputs: those shown as demonstrations, those fitted, those tested."""

    name: str
    shown: list[dict[str, str]]
    labelled: list[dict[str, str]]
    test: list[dict[str, str]]

    @property
    def instruction(self) -> str:
        """The demonstrations."""
        return demonstrations(self.shown)

    @property
    def fit(self) -> list[dict[str, str]]:
        """The pairs to fit without their outputs."""
        return [{"input": pair["input"]} for pair in self.labelled]


def load_split(task: str, seed: int, shots: int = 10, fit: int = 30, test: int = 100) -> Split:
    """Shuffle a task with a seed: ``shots`` demonstrations, ``fit`` pairs to fit, up to ``test`` others.

    Args:
        task: a name below ``recipes/data`` or the path of a JSON, JSONL or CSV file of input/output pairs.
        seed: seed of the shuffle.
        shots: demonstrations in the instruction.
        fit: pairs to fit on.
        test: most pairs to test on.
    """
    path = DATA / f"{task}.json"
    pairs = load_pairs(path if path.is_file() else task)
    random.Random(seed).shuffle(pairs)
    rest = pairs[shots:]
    return Split(Path(task).stem, pairs[:shots], rest[:fit], rest[fit : fit + test])


def demonstrations(pairs: Sequence[Mapping[str, str]], form: str = TEMPLATE) -> str:
    """Pairs written in a form, one after the other."""
    return "".join(form.replace("{input}", pair["input"]).replace("{output}", pair["output"]) for pair in pairs)


@dataclass(frozen=True)
class Trial:
    """A model and a split of a task: what is fitted and what is tested, with the same prompts."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    split: Split
    max_new_tokens: int = 12

    def data(self, pairs: Sequence[Mapping[str, str]] | None = None, **options: Any) -> PairDataModule:
        """The inputs to fit, or other pairs, behind the split's instruction."""
        pairs = self.split.fit if pairs is None else pairs
        return PairDataModule(pairs, self.split.instruction, TEMPLATE, max_new_tokens=self.max_new_tokens, **options)

    def fit(self, pairs: Sequence[Mapping[str, str]] | None = None, **settings: Any) -> ThoughtPatch:
        """The patch of the inputs to fit, or of other pairs; settings as ``transmute`` takes them."""
        settings = {"max_new_tokens": self.max_new_tokens, "progress": False, **settings}
        pairs = self.split.fit if pairs is None else pairs
        return transmute(self.model, self.tokenizer, self.split.instruction, pairs, TEMPLATE, **settings)

    def evaluation(self, pairs: Sequence[Mapping[str, str]] | None = None, **options: Any) -> Evaluation:
        """The plain and the instructed run on the pairs to test, or on others, to score patches with; of unrelated text
        all is measured, so that the ratios of two patches are of the same windows."""
        common = {"instruction": self.split.instruction, "template": TEMPLATE, "max_new_tokens": self.max_new_tokens}
        common |= {"perplexity_interval": None, "progress": False}
        pairs = self.split.test if pairs is None else pairs
        return Evaluation(self.model, self.tokenizer, pairs=pairs, **{**common, **options})

    def prepared(self, pairs: Sequence[Mapping[str, str]] | None = None) -> PairDataModule:
        """The same with the outputs that the instructed model writes where there are none, in batches."""
        data = self.data(pairs)
        prepare_pairs(data, self.model, self.tokenizer)
        return data

    def completed(self) -> list[dict[str, str]]:
        """The inputs to fit, each with what the instructed model writes."""
        data = self.prepared()
        return [{**pair, "output": text} for pair, text in zip(data.pairs, data.outputs, strict=True)]


class Unrelated:
    """The first windows, of 512 tokens each, of unrelated text, and the original model's perplexity on them."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, count: int) -> None:
        texts = load_texts("default", "evaluate", "unrelated")
        self.windows: Sequence[Sequence[int]] = text_windows(tokenizer, texts, 512)[:count]
        self.perplexity = unrelated_perplexity(model, self.windows)

    def ratio(self, model: PreTrainedModel) -> float:
        """The model's perplexity as it is now, against the original one."""
        return unrelated_perplexity(model, self.windows) / self.perplexity


def equal(items: Iterable[Mapping[str, str]], run: str, other: str = "reference") -> list[bool]:
    """Of an evaluation's items, which outputs of a run are those of another, white space at their ends apart."""
    return [item[run].strip() == item[other].strip() for item in items]


def check_names(argument: str, names: Iterable[str], known: Iterable[str]) -> None:
    """Refuse names that stand for nothing.

    Raises:
        ThoughtError: A name is not among the known ones.
    """
    known = list(known)
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ThoughtError(f"{argument}: expected some of {', '.join(known)}; got {unknown}; correct the names.")


def parameters(config: Path) -> dict[str, str]:
    """What the comments of a recipe's YAML file say of each parameter, types apart."""
    about: dict[str, str] = {}
    for line in config.read_text(encoding="utf-8").splitlines():
        if found := re.match(r"(\w+):[^#]*# (?:\(.*?\) )?(.+)", line):
            name, about[name] = found[1], found[2]
        elif about and (found := re.match(r" +# (.+)", line)):
            about[name] += f" {found[1]}"
    return about


def command_line(recipe: Callable[..., None]) -> None:
    """Run a recipe with its parameters from the command line; --help says what the YAML file beside it does."""
    about = parameters(Path(inspect.getfile(recipe)).with_suffix(".yaml"))
    provenance()  # of the code that runs, whatever is committed meanwhile
    recipe.__doc__ = "\n    ".join([f"{recipe.__doc__}\n\nArgs:", *(f"{name}: {text}" for name, text in about.items())])
    jsonargparse.auto_cli(_checked(recipe), as_positional=False)


def _checked(recipe: Callable[..., None]) -> Callable[..., None]:
    """The recipe, which refuses a place where its results cannot be written before it begins."""

    @wraps(recipe)
    def run(**values: Any) -> None:
        if values.get("out") is not None:
            check_writable(Path(values["out"]).parent, "out")
        recipe(**values)

    return run


def shown(model: str | Path) -> str:
    """A model's name for results: of a path on this machine the last part only."""
    return Path(model).name if Path(model).exists() else str(model)


# --- tables, figures, files ------------------------------------------------------------------------------------------


def table(head: Sequence[object], rows: Iterable[Sequence[object]], left: int = 1) -> str:
    """A Markdown table; all but the first ``left`` columns are of numbers, and None is a dash."""
    marks = ["---"] * left + ["---:"] * (len(head) - left)
    lines = ["| " + " | ".join(map(str, head)) + " |", f"|{'|'.join(marks)}|"]
    lines += ["| " + " | ".join("–" if cell is None else str(cell) for cell in row) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def one_line(text: str, longest: int) -> str:
    """A text as a table takes it."""
    return " ".join(text.split()).replace("|", "\\|")[:longest]


def share(hits: Sequence[bool], digits: int = 2, once: Sequence[bool] | None = None) -> str:
    """A share with its 95 % interval (Wilson), for a table. Where an item is among the hits more than once, as it may
    be of several seeds, the interval is of those that ``once`` marks."""
    apart = _marked(hits, once)
    low, high = wilson(sum(apart), len(apart))
    return f"{sum(hits) / len(hits):.{digits}f} ({low:.2f} to {high:.2f})"


def difference(
    after: Sequence[bool], before: Sequence[bool], digits: int = 2, once: Sequence[bool] | None = None
) -> str:
    """The difference of two shares of the same items with its 95 % interval (Newcombe), for a table; ``once`` as for
    :func:`share`."""
    value = (sum(after) - sum(before)) / len(after)
    _, low, high = paired_difference(_marked(after, once), _marked(before, once))
    return f"{value:+.{digits}f} ({low:+.2f} to {high:+.2f})"


def _marked(hits: Sequence[bool], once: Sequence[bool] | None) -> Sequence[bool]:
    return hits if once is None else [hit for hit, kept in zip(hits, once, strict=True) if kept]


def timed(method: Callable[[], ThoughtPatch]) -> tuple[ThoughtPatch, float]:
    """A method's change and its seconds, without those of unrelated text's statistics, which serve every fit."""
    start = Stopwatch.now()
    patch = method()
    return patch, Stopwatch.now() - start - patch.provenance.get("seconds", {}).get("preserve", 0.0)


def panels(count: int, width: float, height: float, **options: Any) -> tuple[Figure, list[Axes]]:
    """A figure with so many panels side by side."""
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, list(figure.subplots(1, count, squeeze=False, **options)[0])


def save_figure(figure: Figure, out: str | Path) -> None:
    """Write a figure to ``out`` with the suffix .svg, the same bytes for the same figure."""
    with rc_context({"svg.hashsalt": "lit_thought"}), atomic_file(f"{out}.svg") as temporary:
        figure.savefig(temporary, format="svg", metadata={"Date": None})


def write_results(script: str, out: str | Path, page: str, record: Mapping[str, Any]) -> None:
    """Print a page, and write it and its record to ``out`` with the suffixes .md and .json.

    Args:
        script: the recipe's ``__file__``. The page begins with its command, and the record's model and settings.
        out: path without suffix.
        page: Markdown.
        record: gets :func:`provenance`, which the page ends with, unless it has its own.
    """
    record = {**provenance(), **record}
    module = ".".join(Path(script).resolve().relative_to(ROOT).with_suffix("").parts)
    head = f"`python -m {module}`" + (f" on {record['model']}" if "model" in record else "")
    head += f"; settings: `{json.dumps(record['settings'])}`" if "settings" in record else ""
    packages = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    page = f"{head}\n\n{page.rstrip()}\n\nCommit {record['commit']}; {packages}.\n"
    print(f"\n{page}", flush=True)
    for suffix, content in ((".md", page), (".json", json.dumps(record, indent=1) + "\n")):
        with atomic_file(f"{out}{suffix}") as temporary:
            temporary.write_text(content, encoding="utf-8")


def nearer(kl: Mapping[str, float], digits: int = 1) -> str:
    """How much of the plain model's divergence from the instructed one is gone, 1 − patched ÷ plain, in percent."""
    return f"{1 - kl['patched'] / kl['plain']:.{digits}%}"


def earlier_runs(files: Iterable[str], model: str, settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The runs in records that :func:`runs_record` made.

    Raises:
        ThoughtError: They are of another model or other settings.
    """
    runs = []
    for file in files:
        record = json.loads(Path(file).read_text(encoding="utf-8"))
        if (record["model"], record["settings"]) != (model, settings):
            raise ThoughtError(
                f"done: expected results of {model} with {dict(settings)}; {file} is of {record['model']} with "
                f"{record['settings']}; leave it out, or set the same."
            )
        runs += [run for run in record["runs"] if run not in runs]
    return runs


def runs_record(model: str, settings: Mapping[str, Any], runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A record of runs that may be of several days: each has its ``commit``, the record has all of them."""
    commits = ", ".join(dict.fromkeys(str(run["commit"]) for run in runs))
    return {"model": model, "settings": dict(settings), "runs": list(runs), "commit": commits}


@cache
def provenance() -> dict[str, Any]:
    """For a record: ``commit``, what git calls the checkout when the recipe starts, or None without git, and
    ``versions``.

    Changed files make it dirty, but for results, of which one recipe writes some after another.
    """
    commit = _git("describe", "--always")
    changed = _git("status", "--porcelain", "--untracked-files=no", "--", ":(top)", ":(top,exclude)recipes/results")
    return {"commit": f"{commit}-dirty" if commit and changed else commit, "versions": versions()}


def _git(*command: str) -> str | None:
    try:
        done = subprocess.run(["git", *command], capture_output=True, text=True, cwd=ROOT, check=False)
    except OSError:
        return None
    return done.stdout.strip() or None


def repeated(cache: DynamicCache, size: int) -> DynamicCache:
    """A KV cache of batch size 1 for a batch of so many, in the same memory; it is left as it is."""
    shape = (size, -1, -1, -1)
    return DynamicCache([(keys.expand(shape), values.expand(shape)) for keys, values, _ in cache])


def patch_difference(one: ThoughtPatch, other: ThoughtPatch) -> float:
    """The largest ‖ΔW − ΔW'‖ / ‖ΔW‖ over the layers, and the same of their vectors; NaN where there is one."""
    deltas = [(of.delta(torch.float64), other.factors[path].delta(torch.float64)) for path, of in one.factors.items()]
    deltas += [(vector.double(), other.vectors[path].double()) for path, vector in one.vectors.items()]
    return float(torch.stack([(mine - theirs).norm() / mine.norm() for mine, theirs in deltas]).max())


def machine(device: torch.device) -> str:
    """What a time was measured on."""
    name = f"{os.cpu_count()} CPU cores"
    if device.type == "cuda":
        name = f"{torch.cuda.get_device_name(device)}, CUDA {torch.version.cuda}"
    threads = torch.get_num_threads()
    return f"{name}, {threads} threads, torch {torch.__version__}, Python {platform.python_version()}"


def measured_on(runs: Iterable[Mapping[str, Any]]) -> str:
    """A line for each ``machine`` of some runs."""
    return "\n".join(f"Measured on {name}." for name in dict.fromkeys(run["machine"] for run in runs))
