"""How long a person waits before anything happens: commands from a cold process, each beside a bare Python.

    python benchmarks/cold_start.py [--quick]

    groundup --help             until the process ends            peer: python -c "import torch", the price of a help that imports torch
    groundup env info --quick   until the process ends            peer: the same; it reports the machine without torch
    groundup env info           until the process ends            peer: the same; it asks torch itself, in a child process
    groundup train digits-cnn   until the first optimizer step    peer: the same; without torch there is no step

`python -c pass` is timed as well: what no command can go below. The first step is the time stamp of the first metrics row (a tracker
that ends the process there), with `watch.log_every=1` and an empty cache of prepared data, so the import of torch, reading and splitting
the data and the rehearsed step are all inside. All commands take turns, round after round, after one round that warms the disk's cache;
figures are medians of seconds. Target: the help within 0.5 s. The ratio is peer's time over ours for the help.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HELP_TARGET = 0.5  # seconds

TRACKER = '''
import os, time

class Stop:
    """Ends the process at the first row, after noting when that was."""

    def __init__(self, run):
        pass

    def begin(self, state, plan):
        pass

    def after_step(self, state, report):
        pass

    def row(self, row):
        with open(os.environ["FIRST_STEP"], "w") as file:
            file.write(repr(time.time()))
        os._exit(0)

    def end(self):
        pass
'''

PYTHON = [sys.executable]
GROUNDUP = [sys.executable, "-m", "groundup"]
TRAIN = [*GROUNDUP, "train", "digits-cnn", "--set", "watch.log_every=1", "--set", "watch.trackers=[tracker.py:Stop]"]
COMMANDS = {
    "python -c pass": [*PYTHON, "-c", "pass"],
    "python -c 'import torch'": [*PYTHON, "-c", "import torch"],
    "groundup --help": [*GROUNDUP, "--help"],
    "groundup env info --quick": [*GROUNDUP, "env", "info", "--quick"],
    "groundup env info": [*GROUNDUP, "env", "info"],
    "groundup train digits-cnn, first step": TRAIN,
}
BARE, TORCH, HELP = list(COMMANDS)[:3]


def seconds(command: list[str]) -> float:
    """From the start of the process to its end, or to the first step where it trains."""
    with tempfile.TemporaryDirectory(prefix="groundup-cold-start-") as folder:
        mark = Path(folder) / "first_step"
        (Path(folder) / "tracker.py").write_text(TRACKER, encoding="utf-8")
        environment = {**os.environ, "GROUNDUP_CACHE": str(Path(folder) / "cache"), "FIRST_STEP": str(mark)}
        begin = time.time()
        subprocess.run(command, cwd=folder, env=environment, stdout=subprocess.DEVNULL, check=True)
        end = float(mark.read_text()) if mark.exists() else time.time()
        assert mark.exists() == (command is TRAIN), "the training ended before its first step"
    return end - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one round, under 20 s: shows that it runs, too few to judge by")
    rounds = 1 if parser.parse_args().quick else 9
    times: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for k in range(rounds if rounds == 1 else rounds + 1):
        for name, command in COMMANDS.items():
            taken = seconds(command)
            if k > 0 or rounds == 1:
                times[name].append(taken)
    medians = {name: statistics.median(values) for name, values in times.items()}
    width = max(map(len, COMMANDS))
    for name, values in times.items():
        print(f"{name:{width}}  {medians[name]:6.3f} s  ({min(values):.3f} .. {max(values):.3f})")
    parts = []
    for name in COMMANDS:
        if name not in (BARE, TORCH):
            target = HELP_TARGET if name == HELP else None
            parts.append(
                {
                    "name": name,
                    "ours": round(medians[name], 3),
                    "peer": round(medians[TORCH], 3),
                    "bare_python": round(medians[BARE], 3),
                    "unit": "s",
                    "ratio": round(medians[TORCH] / medians[name], 3),
                    "target": target,
                    "met": None if target is None else medians[name] <= target,
                }
            )
    top = {key: parts[0][key] for key in ("ours", "peer", "unit", "ratio", "target", "met")}
    print(json.dumps({"benchmark": "cold_start", **top, "parts": parts}))


if __name__ == "__main__":
    main()
