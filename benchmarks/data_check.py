"""Rows per second and peak memory of `groundup data check` on many conversations.

    python benchmarks/data_check.py [--rows 1000000] [--model FOLDER] [--quick]

The conversations are made here from words with a fixed seed: 50 to 1,500 characters, a tenth of them Chinese, one in a hundred a copy of an earlier one,
some with an empty answer, some with an e-mail address, some that are no JSON or have a role nobody knows. One fresh process checks the file with an empty cache, with `--model` also in that model's tokens.

    target: below 2 GB at a million rows
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

WORDS = ["the", "of", "and", "a", "to", "in", "is", "you", "that", "it", "he", "was", "for", "on", "are", "as", "with", "his", "they", "at", "be", "this", "have", "from", "or", "one", "had", "by", "word", "but", "not", "what", "all", "were", "we", "when", "your", "can", "said", "there", "use", "an", "each", "which", "she", "do", "how", "their", "if", "will", "up", "other", "about", "out", "many", "then", "them", "these", "so", "some", "her", "would", "make", "like", "him", "into", "time", "has", "look", "two", "more"]  # fmt: skip
CHARACTERS = "的一是不了人我在有他这为之大来以个中上们到说国和地也子时道出而要于就下得可你年生"
LIMIT = 2000  # MiB


def write_rows(path: Path, rows: int) -> None:
    rng = random.Random(0)
    with path.open("w", encoding="utf-8") as file:
        kept: list[str] = []
        for i in range(rows):
            if rng.random() < 0.01 and kept:
                file.write(rng.choice(kept))
                continue
            size = rng.randint(10, 300)
            said = "".join(rng.choices(CHARACTERS, k=size)) if i % 10 == 0 else " ".join(rng.choices(WORDS, k=size))
            if i % 1000 == 1:
                said = ""
            elif i % 1000 == 2:
                said += f" write to person{i}@university.edu"
            row = {
                "messages": [
                    {"role": "user", "content": f"question {i}: " + " ".join(rng.choices(WORDS, k=12))},
                    {"role": "assistant", "content": said},
                ]
            }
            if i % 1000 == 3:
                row["messages"][1]["role"] = "somebody"
            line = json.dumps(row, ensure_ascii=False) + "\n"
            if i % 1000 == 4:
                line = line[: len(line) // 2] + "\n"  # cut off in the middle, as by a full disk
            if len(kept) < 1000:
                kept.append(line)
            file.write(line)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--model", type=Path, help="also count in this model's tokens")
    parser.add_argument("--quick", action="store_true", help="20,000 rows")
    given = parser.parse_args()
    rows = 20_000 if given.quick else given.rows
    with tempfile.TemporaryDirectory(prefix="groundup-check-") as name:
        path = Path(name) / "rows.jsonl"
        write_rows(path, rows)
        command = [
            sys.executable,
            "-m",
            "groundup",
            "data",
            "check",
            str(path),
            "--json",
            *(["--model", str(given.model)] if given.model else []),
        ]
        begin = time.perf_counter()
        done = subprocess.run(
            command, env={**os.environ, "GROUNDUP_CACHE": str(Path(name) / "cache")}, capture_output=True, text=True, check=False
        )
        seconds = time.perf_counter() - begin
        if done.returncode not in (0, 3):
            sys.exit(f"the check failed:\n{done.stderr[-2000:]}")
        told = json.loads(done.stdout.splitlines()[-1])
        megabytes = path.stat().st_size / 2**20
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    part = {
        "name": f"{rows:,} rows, peak memory",
        "ours": round(peak),
        "peer": None,
        "unit": "MiB",
        "ratio": None,
        "target": LIMIT,
        "met": peak < LIMIT,
    }
    speed = {"name": f"{rows:,} rows of {megabytes:,.0f} MiB", "ours": round(rows / seconds, 1), "peer": None, "unit": "rows/s", "ratio": None, "target": None,
             "met": None, "remarks": {p["message"][:60]: len(p["records"]) for p in told["problems"]}}  # fmt: skip
    print(
        json.dumps(
            {"benchmark": "data_check", **{k: part[k] for k in ("ours", "peer", "unit", "ratio", "target", "met")}, "parts": [part, speed]}
        )
    )


if __name__ == "__main__":
    main()
