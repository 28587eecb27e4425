"""What a model takes while it is loaded, in a process of its own: ``python loading_peak.py TINY MODEL DTYPE``.

Prints as JSON the most memory by kind, above what the process had before, in units of the weights. TINY, a model of the
same kind, is loaded first, for what is imported on the way. Linux only.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from pathlib import Path

from models import make_tokenizer

from lit_thought.model.loading import load_model

KINDS = {"RssAnon": "anonymous", "VmRSS": "resident"}  # the latter with what is mapped of files


def in_use() -> dict[str, int]:
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {kind: 1024 * int(lines[name].split()[0]) for name, kind in KINDS.items()}


def main(tiny: str, name: str, dtype: str) -> None:
    tokenizer = make_tokenizer()
    load_model(tiny, dtype=dtype, tokenizer=tokenizer)
    before = most = in_use()
    done = threading.Event()

    def watch() -> None:
        nonlocal most
        while not done.is_set():
            now = in_use()
            most = {kind: max(count, now[kind]) for kind, count in most.items()}
            time.sleep(0.001)

    watcher = threading.Thread(target=watch)
    watcher.start()
    model, _ = load_model(name, dtype=dtype, tokenizer=tokenizer)
    done.set()
    watcher.join()
    weights = sum(value.nbytes for value in model.parameters())
    print(json.dumps({kind: (most[kind] - before[kind]) / weights for kind in most}))


if __name__ == "__main__":
    main(*sys.argv[1:])
