"""``lit-thought export``."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from lit_thought.cli.model import Dtype, Loading
from lit_thought.cli.output import Result, say
from lit_thought.errors import ThoughtError

__all__ = ["export"]


def export(
    adapter: str,
    out: str,
    format: Literal["peft", "gguf", "merged", "control-vector"] = "peft",
    rank: int | None = None,
    dtype: Literal["float32", "bfloat16", "float16"] | None = None,
    model: str | None = None,
    revision: str | None = None,
    gguf_file: str | None = None,
    trust_remote_code: bool = False,
    model_type: str | None = None,
    overwrite: bool = False,
) -> Result:
    """Write an adapter for other programs: PEFT and vLLM, llama.cpp, or as a whole model.

    Example: lit-thought export antonym/ --format gguf --out antonym.gguf

    Args:
        adapter: adapter folder that fit wrote, or one on the hub, as OWNER/NAME.
        out: what to write: a folder (peft, merged) or a .gguf file (gguf, control-vector).
        format: peft (a folder for PEFT and vLLM, at a rank that vLLM takes), gguf (a LoRA file for llama.cpp's --lora),
            merged (the model with the patch in its weights, as safetensors) or control-vector (for llama.cpp's
            --control-vector; of a patch of vectors alone, from fit --sites mlp_in --parts vector --blocks 1 2 …, all
            blocks but 0).
        rank: the rank of a peft folder, one that vLLM takes; the smallest that holds the patch when left out.
        dtype: of the numbers written; when left out, the base model's own for merged, else float32. For control-vector,
            whose numbers are float32, the dtype to load the model in.
        model: the base model, for merged and control-vector: smollm2 (when left out), a hub id, a local directory or a
            .gguf file.
        revision: revision of a hub model.
        gguf_file: the GGUF file to take from a hub id or a directory.
        trust_remote_code: run code that a hub model brings along.
        model_type: the base's architecture, such as llama, for gguf; what the adapter says when left out.
        overwrite: replace what is at OUT.
    """
    source: dict[str, Any] = {"model": model, "revision": revision, "gguf_file": gguf_file}
    source["trust_remote_code"] = trust_remote_code or None
    with_base = format in ("merged", "control-vector")
    unused: dict[str, Any] = {} if with_base else dict(source)
    unused |= {} if format == "peft" else {"rank": rank}
    unused |= {} if format == "gguf" else {"model_type": model_type}
    for name, value in unused.items():
        if value is not None:
            raise ThoughtError(f"{name}={value!r} has no use for the format {format}. Leave it out.")
    load_as: Dtype | None = "auto" if format == "merged" else dtype
    loading = None
    if with_base:
        options = (revision, gguf_file, None, trust_remote_code)
        loading = Loading(model or "smollm2", load_as, None, *options)
    import torch

    from lit_thought.files import atomic_file, check_output_folder
    from lit_thought.model.loading import fingerprint_with
    from lit_thought.patch.control_vector import check_vectors
    from lit_thought.patch.export import export_adapter, export_merged
    from lit_thought.patch.export_gguf import export_gguf
    from lit_thought.patch.hub import adapter_folder
    from lit_thought.patch.patch import ThoughtPatch

    place = adapter_folder(adapter, argument="adapter")
    if format in ("peft", "merged"):
        check_output_folder(out, overwrite, adapter=place, model=None if loading is None else loading.place)
    patch = ThoughtPatch.load(place)
    if format == "control-vector":
        check_vectors(patch)
    stored = torch.float32 if dtype is None else getattr(torch, dtype)
    if format == "peft":
        export_adapter(patch, out, rank, overwrite, stored)
    elif format == "gguf":
        export_gguf(patch, out, model_type, stored, overwrite)
    elif loading is not None and format == "merged":
        base, tokenizer = loading.load()
        if dtype is not None and patch.provenance.get("fingerprint") == fingerprint_with(base, {}, stored):
            base = base.to(stored)  # as the fit had it
        export_merged(patch, base, out, tokenizer, None if dtype is None else stored, overwrite)
    elif loading is not None:
        with atomic_file(out, overwrite, model=loading.place, adapter=place) as file:  # checks its path first
            base, _ = loading.load()
            patch.save_control_vector(file, base)
    size = _size(Path(out).expanduser())
    say(f"Wrote {size / 1e6:.1f} MB to {out}")
    return Result({"out": out, "format": format, "bytes": size})


def _size(path: Path) -> int:
    """Bytes of a file, or of all files in a folder."""
    return sum(file.stat().st_size for file in ([path] if path.is_file() else path.rglob("*")))
