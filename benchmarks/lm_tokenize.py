"""MB of text per second from a file to tokens on disk: our whole preparation against `datasets.map` with the same tokenizer.

    python benchmarks/lm_tokenize.py [--megabytes 200] [--quick]

The file is a .jsonl of documents put together from paragraphs of the standard library's source, no two alike; the tokenizer a byte-level BPE of 8,192
tokens trained on it once, before. Ours reads, decodes, normalises, filters, removes exact and near duplicates (MinHash), divides by document, counts,
tokenises and writes memory-mapped streams: what `groundup train` does before its first step. The peer reads the file with `load_dataset("json")` and
maps the tokenizer over it, batched, in one process (the tokenizer's own threads) and in two; the quicker one counts, and its two parts are printed.

Each turn is a fresh process with an empty cache; peak memory is that process's resident set, children included. Target: ratio 1.5, below 1 GB.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path
from typing import Any

TARGET, LIMIT = 1.5, 1e9
SIDES = ("ours", "map, 1 process", "map, 2 processes")


def paragraphs() -> list[str]:
    found = []
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).rglob("*.py")):
        if "site-packages" not in path.parts:
            try:
                found += [p for p in path.read_text(encoding="utf-8").split("\n\n") if p.strip()]
            except UnicodeDecodeError:
                continue
    return found


def write_text(path: Path, size: int) -> None:
    """Documents of 5 to 40 paragraphs drawn at random."""
    pool, draw = paragraphs(), random.Random(0)
    with path.open("w", encoding="utf-8") as file:
        while size > 0:
            text = "\n\n".join(draw.choices(pool, k=draw.randint(5, 40)))
            size -= len(text.encode())
            file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")


def ours(text: Path, tokenizer: Path) -> dict[str, Any]:
    import torch

    from groundup import modelfolder
    from groundup.core import console
    from groundup.core.recipe import Data
    from groundup.data.prepare import prepare

    with console.muted():
        began = time.perf_counter()
        task = modelfolder.build_task("language-modeling", {"tokenizer": str(tokenizer)})
        prepared = prepare(Data(source=str(text)), classification=False, kind="text")
        read = time.perf_counter()
        task.fit(prepared.dataset, prepared.splits["train"])
        tokens = sum(
            len(task.prepare(prepared.dataset, index, torch.device("cpu")).stream.tokens)  # type: ignore[attr-defined]
            for index in prepared.splits.values()
        )
        done = time.perf_counter()
    return {"seconds": done - began, "reading": read - began, "tokenising": done - read, "tokens": tokens, "documents": len(prepared.dataset)}


def mapped(text: Path, tokenizer: Path, processes: int) -> dict[str, Any]:
    import datasets
    from transformers import AutoTokenizer

    datasets.disable_progress_bars()
    made = AutoTokenizer.from_pretrained(tokenizer)
    end = made.eos_token_id
    began = time.perf_counter()
    data = datasets.load_dataset("json", data_files=str(text), split="train")
    read = time.perf_counter()

    def encode(batch: dict[str, Any]) -> dict[str, Any]:
        return {"input_ids": [[*ids, end] for ids in made(batch["text"], return_attention_mask=False, verbose=False)["input_ids"]]}

    rows = data.map(encode, batched=True, remove_columns=["text"], num_proc=processes if processes > 1 else None)
    done = time.perf_counter()
    return {"seconds": done - began, "reading": read - began, "tokenising": done - read, "documents": len(rows)}


def turn(side: str, text: Path, tokenizer: Path) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="groundup-tokenize-") as cache:
        environment = {**os.environ, "GROUNDUP_CACHE": cache, "HF_HOME": cache, "HF_DATASETS_CACHE": cache, "HF_HUB_OFFLINE": "1",
                       "TRANSFORMERS_VERBOSITY": "error", "TOKENIZERS_PARALLELISM": "false" if side.endswith("processes") else "true"}  # fmt: skip
        command = [sys.executable, __file__, "--turn", side, "--text", str(text), "--tokenizer", str(tokenizer)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"the turn of '{side}' failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=200)
    parser.add_argument("--quick", action="store_true", help="5 MB, one turn: shows that it runs")
    parser.add_argument("--turn", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--text", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--tokenizer", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.turn:
        found = ours(given.text, given.tokenizer) if given.turn == "ours" else mapped(given.text, given.tokenizer, 2 if "2" in given.turn else 1)
        kilobytes = [resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        print(json.dumps(found | {"peak": max(kilobytes) * 1024}))
        return
    from groundup.data.tokenizers import train_bpe

    with tempfile.TemporaryDirectory(prefix="groundup-tokenize-") as name:
        text, tokenizer = Path(name) / "text.jsonl", Path(name) / "tokenizer"
        write_text(text, (5 if given.quick else given.megabytes) * 1_000_000)
        size = text.stat().st_size / 1e6
        with text.open(encoding="utf-8") as file:
            made = train_bpe((json.loads(line)["text"] for _, line in zip(range(2000), file)), 8192)
        tokenizer.mkdir()
        made.save(tokenizer, 1024)
        found: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
        for _ in range(1 if given.quick else 3):
            for side in SIDES:
                found[side].append(turn(side, text, tokenizer))
                last = found[side][-1]
                print(f"{side}: {size / last['seconds']:.2f} MB/s ({last['reading']:.1f} s reading, {last['tokenising']:.1f} s tokenising), "
                      f"{last['documents']:,} documents, peak {last['peak'] / 1e6:,.0f} MB", flush=True)  # fmt: skip
    seconds = {side: statistics.median(f["seconds"] for f in turns) for side, turns in found.items()}
    best = min(SIDES[1:], key=lambda s: seconds[s])
    ratio = statistics.median(p["seconds"] / o["seconds"] for p, o in zip(found[best], found["ours"]))
    against_map = statistics.median(p["tokenising"] / o["seconds"] for p, o in zip(found[best], found["ours"]))
    peak = max(f["peak"] for f in found["ours"])
    parts = [
        {"name": "whole preparation", "ours": round(size / seconds["ours"], 2), "peer": round(size / seconds[best], 2), "unit": "MB/s",
         "ratio": round(ratio, 3), "target": TARGET, "met": ratio >= TARGET, "peer_side": best, "against_map_alone": round(against_map, 3)},
        {"name": "peak memory", "ours": round(peak / 1e6), "peer": round(max(f["peak"] for f in found[best]) / 1e6), "unit": "MB",
         "ratio": round(max(f["peak"] for f in found[best]) / peak, 3), "target": None, "met": peak < LIMIT},
    ]  # fmt: skip
    top = {k: parts[0][k] for k in ("ours", "peer", "unit", "ratio", "target")}
    print(json.dumps({"benchmark": "lm_tokenize", **top, "met": all(p["met"] for p in parts), "parts": parts}))


if __name__ == "__main__":
    main()
