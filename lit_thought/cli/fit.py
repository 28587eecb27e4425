"""``lit-thought fit``, ``solve`` and ``preserve``: what makes adapters, and what they need."""

from __future__ import annotations

import logging
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from lit_thought.cli.model import Dtype, Loading, read_instruction
from lit_thought.cli.output import Result, say, timed
from lit_thought.settings import DIRECTIONS, FitSettings, text_place

__all__ = ["fit", "preserve", "solve"]

_log = logging.getLogger("lit_thought")


def fit(
    out: str,
    pairs: str | None = None,
    instruction: str | None = None,
    instruction_file: str | None = None,
    template: str | None = None,
    val_pairs: str | None = None,
    verdict: int = 8,
    overwrite: bool = False,
    progress: bool = True,
    *,
    loading: Loading,
    settings: Mapping[str, Any],
) -> Result:
    """Turn an instruction into a PEFT LoRA adapter, and say how near it comes.

    Example: lit-thought fit --instruction "You are a pirate." --out pirate/
    Example: lit-thought fit --pairs pairs.jsonl --instruction "Answer with the opposite." --out antonym/

    Args:
        out: folder to write the adapter to.
        pairs: JSON, JSONL or CSV file with the keys input, output (optional) and instruction (optional); when left out,
            the model writes inputs itself.
        instruction: the removable chunk of the prompt.
        instruction_file: a UTF-8 text file to read it from instead.
        template: text with {input} and {output} (and {instruction} where the chunk is not at the start), "chat"
            (instruction as system message), "chat-empty" (the same, for users who send an empty one in its place) or
            "chat-user" (inside the user message); when left out,
            "Q: {input}\\nA: {output}\\n", or, where no pairs are given either, "chat" if the model has a chat template
            and the instruction is no list of that form.
        val_pairs: file of pairs to follow the fit with, step by step.
        verdict: on how many inputs the patched model is compared with the plain and the instructed one at the end: of
            val_pairs, else new ones that the model writes where it wrote those of the fit, else the last ones of the
            fit; 0 for no comparison.
        overwrite: replace the folder, and that of statistics_dir, if they exist.
        progress: show progress bars.
        loading: the model.
        settings: of the fit.
    """
    from lit_thought.errors import ThoughtError
    from lit_thought.files import check_apart, check_output_folder

    read: dict[str, Any] = {"model": loading.place, "pairs": pairs, "val_pairs": val_pairs}
    read |= {"instruction_file": instruction_file, "preserve": text_place(settings["preserve"])}
    folders = {name: settings[name] for name in ("statistics_dir", "resume_dir", "cache_dir")} | {"out": out}
    check_apart(**folders)
    for name in ("out", "statistics_dir"):
        if folders[name] is not None:
            check_output_folder(folders[name], overwrite, name, **read)
    if isinstance(verdict, bool) or verdict < 0:
        raise ThoughtError(f"verdict must be a whole number of 0 or more; got {verdict!r}.")
    text = read_instruction(instruction, instruction_file)
    from lit_thought.cli.verdict import compared, format_verdict
    from lit_thought.fit.api import transmute
    from lit_thought.fit.growing import format_growth
    from lit_thought.fit.selection import format_selection

    model: Any = None
    tokenizer: Any = None

    def load() -> Any:
        nonlocal model, tokenizer
        model, tokenizer = loading.load()
        return model, tokenizer

    options = {"val_pairs": val_pairs, "output_dir": out, "overwrite": overwrite, "progress": progress, **settings}
    try:
        patch = transmute(load, None, text, pairs, template, **options)
    except KeyboardInterrupt:
        say(_how_to_go_on(settings["resume_dir"]))
        raise
    seconds, selection = patch.provenance["seconds"], patch.provenance.get("selection")
    growth = patch.provenance.get("growth")
    for phase, value in seconds.items():
        _log.debug("%s took %.2f s", phase, value)
    size = _size(out)
    say(f"Wrote a rank-{patch.rank} adapter of {size / 1e6:.1f} MB to {out}")
    result = None
    if verdict:
        with timed("the verdict"):
            result = compared(model, tokenizer, patch, text, pairs, val_pairs, verdict, settings, progress)
    values = {"adapter": out, "rank": patch.rank, "bytes": size, "parameters": patch.num_parameters}
    values |= {"pairs": patch.provenance["settings"]["pairs"], "seconds": seconds, "verdict": result}
    values |= {"memory": patch.provenance["memory"], "selection": selection, "growth": growth}
    told = [format_growth(growth)] if growth is not None else []
    told += [format_selection(selection)] if selection is not None else []
    told += [format_verdict(result)] if result is not None else []
    told += [f"Talk to it: lit-thought chat {shlex.quote(out)}{loading.flags()}"]
    return Result(values, "\n\n".join(told))


def _how_to_go_on(folder: str | None) -> str:
    """What an interrupted fit leaves."""
    if folder is None:
        return "Nothing was kept. With --resume_dir FOLDER, the same command goes on where it was interrupted."
    if not (Path(folder).expanduser() / "fit.json").exists():
        return "Nothing was finished, so nothing was kept."
    return f"What was finished is in {folder}: the same command, --resume_dir included, goes on from there."


def solve(
    statistics: str,
    out: str,
    ridge: float | None = None,
    rank: int | float | Literal["full"] | None = None,
    preserve_weight: float | None = None,
    step_size: float | None = None,
    preserve: str | None = None,
    approximate: bool = False,
    cache_dir: str | None = None,
    model: str | None = None,
    dtype: Dtype | None = None,
    device: str | None = None,
    revision: str | None = None,
    gguf_file: str | None = None,
    trust_remote_code: bool = False,
    overwrite: bool = False,
) -> Result:
    """Make an adapter of a fit's saved statistics, at its settings or at others, without running the model.

    Example: lit-thought solve sums/ --rank 8 --approximate --out antonym-8/

    Args:
        statistics: folder that fit wrote with --statistics_dir.
        out: folder to write the adapter to.
        ridge: the ridge, as for fit; the fit's when left out.
        rank: an integer, a fraction of explained energy in (0, 1), or full; the fit's when left out.
        preserve_weight: weight of the unrelated text against the pairs; the fit's when left out.
        step_size: how much of the (last) step's solution is added, in (0, 1]; the fit's when left out.
        preserve: file of preservation statistics to use instead of the cache (lit-thought preserve).
        approximate: allow other settings where sums depend on the patches that the fit solved before them, or are too
            coarse for the ridge.
        cache_dir: where the fit kept its preservation statistics ($LIT_THOUGHT_CACHE, ~/.cache/lit_thought).
        model: the model of the fit, needed for matrices at mlp_in alone: smollm2, a hub id, a local directory or a
            .gguf file.
        dtype: dtype to load it in, that of the fit; float32 when left out.
        device: where to solve, such as cuda; the CPU when left out.
        revision: revision of a hub model.
        gguf_file: the GGUF file to take from a hub id or a directory.
        trust_remote_code: run code that a hub model brings along.
        overwrite: replace the folder if it exists.
    """
    from lit_thought.errors import ThoughtError
    from lit_thought.files import check_apart, check_output_folder

    unused = {"dtype": dtype, "revision": revision, "gguf_file": gguf_file, "trust_remote_code": trust_remote_code}
    for name, value in unused.items() if model is None else ():
        if value:
            raise ThoughtError(f"{name}={value!r} has no use without --model, which is then not loaded. Leave it out.")
    options = (dtype, device, revision, gguf_file, None, trust_remote_code)
    loading = None if model is None else Loading(model, *options)
    read = {"statistics": statistics, "model": None if loading is None else loading.place, "preserve": preserve}
    check_apart(cache_dir=cache_dir, out=out)
    check_output_folder(out, overwrite, "out", **read)
    from lit_thought.statistics.saved import SavedStatistics
    from lit_thought.statistics.solve import solve_saved

    saved = SavedStatistics.load(statistics, device or "cpu")
    lm = None if loading is None else loading.load()[0]
    chosen: Any = {} if rank is None else {"rank": None if rank == "full" else rank}
    with timed("solving"):
        patch = solve_saved(
            saved,
            ridge=ridge,
            preserve_weight=preserve_weight,
            step_size=step_size,
            preserve=preserve,
            cache_dir=cache_dir,
            model=lm,
            approximate=approximate,
            **chosen,
        )
    patch.save_adapter(out, overwrite=overwrite)
    say(f"Wrote a rank-{patch.rank} adapter of {len(saved)} stages to {out}")
    values = {"adapter": out, "rank": patch.rank, "bytes": _size(out), "parameters": patch.num_parameters}
    return Result({**values, "stages": len(saved)})


def preserve(
    out: str,
    text_file: str = "default",
    preserve_tokens: int = FitSettings.preserve_tokens,
    sites: list[str] | None = None,
    directions: int = DIRECTIONS,
    chats: bool = False,
    cache_dir: str | None = None,
    overwrite: bool = False,
    progress: bool = True,
    *,
    loading: Loading,
) -> Result:
    """Write a model's preservation statistics to one small file, for fit --preserve on any machine.

    Example: lit-thought preserve smollm2 --out smollm2-preserve.safetensors

    Args:
        out: the file, ending in .safetensors.
        text_file: a UTF-8 text file of what patches should leave alone; "default" for text that the package ships.
        preserve_tokens: most tokens of it to use, and of chats.
        sites: attn_out, mlp_in, mlp_out or several, where fits can use it; when left out, attn_out and mlp_out
            wherever a block has them.
        directions: how many directions of each site's inputs are kept one by one; of the others, their mean size.
        chats: keep chats, too, that the package ships, as a fit without such a file does for text templates.
        cache_dir: where each model's statistics are kept ($LIT_THOUGHT_CACHE, ~/.cache/lit_thought).
        overwrite: replace the file if it exists.
        progress: show a progress bar.
        loading: the model.
    """
    from lit_thought.errors import ThoughtError, check_counts
    from lit_thought.files import atomic_file
    from lit_thought.model.blocks import find_blocks, require_site
    from lit_thought.prompts.unrelated import chat_windows, load_texts, text_windows
    from lit_thought.settings import DEFAULT_SITES, check_sites
    from lit_thought.statistics.preserve import preservation, preservation_bar, window_of
    from lit_thought.statistics.preserve_file import check_suffix

    check_suffix(out, "out")
    FitSettings(preserve_tokens=preserve_tokens)  # refuses what a fit does
    check_counts(directions=directions)
    chosen = DEFAULT_SITES if sites is None else check_sites(sites)
    read = load_texts(text_file, "preserve", "text_file")
    place = text_place(text_file)
    with atomic_file(out, overwrite, model=loading.place, text_file=place) as file:  # checks its path first
        lm, tokenizer = loading.load()
        blocks = find_blocks(lm)
        for name in sites or ():
            require_site(blocks, name)
        windows = text_windows(tokenizer, read, window_of(lm), preserve_tokens)
        if chats:
            talked = chat_windows(tokenizer, window_of(lm), preserve_tokens)
            if not talked:
                raise ThoughtError(
                    "chats: expected a model whose tokenizer has a chat template; this one has none, or one "
                    "that fails on a message and its answer. Leave chats out."
                )
            windows += talked
        with timed("the preservation statistics"), preservation_bar(len(blocks), progress) as advance:
            kept, _ = preservation(
                *(lm, blocks, windows, cache_dir), progress=advance, sites=chosen, directions=directions
            )
        kept.save(file)
    size = Path(out).expanduser().stat().st_size
    say(f"Wrote {size / 1e6:.1f} MB of preservation statistics to {out}")
    tokens = sum(len(window) for window in windows)
    return Result({"file": out, "bytes": size, "tokens": tokens, "directions": directions})


def _size(adapter: str) -> int:
    return (Path(adapter).expanduser() / "adapter_model.safetensors").stat().st_size
