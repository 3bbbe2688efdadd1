"""Tuning a language model on examples: ours against TRL's SFTTrainer with PEFT, seconds to finish, peak memory and the loss that comes of it.

    python benchmarks/sft_lora.py --tokenizer FOLDER --data FILE [--sizes 15M,120M] [--quick]

Models with random weights, made by transformers: `15M` in Llama's form, `120M` in Qwen3's with its table of 151,936 rows; one tokenizer and its chat template
for both sides. FILE holds instructions in Alpaca's form. Each example becomes {prompt, completion} in messages, of which both sides train the answer with its
end only. The same examples once, eight in a step, at most 512 tokens, float32, the same constant rate, AdamW, clipping at 1, LoRA of rank 16 on all linear
layers but the head. Each turn is a fresh process; sides take turns, medians count. TRL evaluates the held-out
examples once, when it is done; ours twice, before the first step and after the last.

TRL runs at its defaults but for these settings (it recomputes activations by default, and pads eight examples to the longest), and at the best that was found
for it on CPUs, without recomputation: `single`, one example at a time and eight gathered, so that nothing is padded, and `packed`, its packing one row at a
time and as many rows gathered as hold eight examples on average. More packed rows at once are slower: it lays them end to end and attention pays for the
whole length. Packed examples do not see each other (their positions begin anew, and transformers makes the mask from them), but a packed step holds about
eight examples, not always eight. TRL also trains the line break that the template puts after the end of a turn, one token per example that ours leaves out.
One code measures the held-out loss of what each side has saved.

    targets: 2 x its defaults at 15M and 3 x at 120M, 1.5 x its best; peak memory above the level after the imports at most a third of its defaults'

    pip install trl accelerate peft
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# examples, held-out examples, turns; target against the defaults
CASES = {"15M": (200, 40, 3, 2.0), "120M": (48, 16, 2, 3.0)}
SIDES = ("ours", "defaults", "single", "packed")
CONTEXT, BATCH = 512, 8
BEST: float | None = 1.5  # targets against its best settings, and of the memory at its defaults
MEMORY: float | None = 3.0
RATES = {"lora": 2e-3, "full": 5e-4}


def make_model(size: str, tokenizer: Path, folder: Path) -> None:
    """A model with random weights and the tokenizer beside it."""
    import torch
    import transformers

    torch.manual_seed(0)
    known = transformers.AutoTokenizer.from_pretrained(tokenizer)
    special = {"bos_token_id": known.bos_token_id, "eos_token_id": known.eos_token_id, "pad_token_id": known.pad_token_id}
    if size == "15M":
        config: Any = transformers.LlamaConfig(
            vocab_size=len(known), hidden_size=384, intermediate_size=1024, num_hidden_layers=8, num_attention_heads=6, num_key_value_heads=6,
            max_position_embeddings=CONTEXT, **special,
        )  # fmt: skip
    else:
        config = transformers.Qwen3Config(
            vocab_size=151_936, hidden_size=576, intermediate_size=1536, num_hidden_layers=8, num_attention_heads=9, num_key_value_heads=3, head_dim=64,
            max_position_embeddings=CONTEXT, tie_word_embeddings=True, **special,
        )  # fmt: skip
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    known.save_pretrained(folder)


def make_data(source: Path, counts: tuple[int, int], folder: Path) -> None:
    """`train.jsonl` and `validation.jsonl`."""
    records = [r for r in json.loads(source.read_text(encoding="utf-8")) if r["output"].strip()]
    folder.mkdir()
    for name, part in (("train", records[: counts[0]]), ("validation", records[counts[0] : sum(counts)])):
        with (folder / f"{name}.jsonl").open("w", encoding="utf-8") as file:
            for r in part:
                asked = f"{r['instruction']}\n{r['input']}" if r.get("input") else r["instruction"]
                row = {"prompt": [{"role": "user", "content": asked}], "completion": [{"role": "assistant", "content": r["output"]}]}
                file.write(json.dumps(row, ensure_ascii=False) + "\n")


def resident() -> float:
    """Memory of this process, MiB."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


@contextlib.contextmanager
def watched() -> Iterator[dict[str, float]]:
    """Seconds, and the peak memory above the level at the beginning."""
    found = {"peak": resident()}
    begin, level, over = time.perf_counter(), found["peak"], threading.Event()

    def look() -> None:
        while not over.wait(0.02):
            found["peak"] = max(found["peak"], resident())

    looking = threading.Thread(target=look)
    looking.start()
    try:
        yield found
    finally:
        over.set()
        looking.join()
        found.update(seconds=time.perf_counter() - begin, peak=found["peak"] - level)


def ours(method: str, folder: Path) -> dict[str, float]:
    import groundup
    import groundup.pipeline
    import groundup.training.muon  # what a first training imports on its way

    settings = {
        "optim.lr": RATES[method], "schedule.name": "constant", "schedule.warmup": 0.0, "train.epochs": 1, "train.batch_size": BATCH, "train.keep": "last", "task.context": CONTEXT,
        "data.split.validation": "given", "data.split.test": 0.0, "evaluate.general": "none", "evaluate.answers": 0, "evaluate.every": 10**6,
        "watch.report": False, "watch.tensorboard": False,
    }  # fmt: skip
    if method == "lora":
        settings |= {"method.rank": 16, "method.alpha": 32}
    with contextlib.redirect_stdout(sys.stderr), watched() as found:
        run = groundup.tune(str(folder / "base"), str(folder / "data"), method, settings, out=folder / "ours")
    return found | {"training": run.result["seconds"]["train"]}


def rows_for(folder: Path, examples: int) -> int:
    """Packed rows that hold as many examples as a step has, on average."""
    from transformers import AutoTokenizer

    made = AutoTokenizer.from_pretrained(folder / "base")
    with (folder / "data" / "train.jsonl").open(encoding="utf-8") as file:
        texts = [made.apply_chat_template(r["prompt"] + r["completion"], tokenize=False) for r in map(json.loads, file)]
    tokens = sum(min(CONTEXT, len(ids)) for ids in made(texts)["input_ids"])
    return max(1, round(BATCH * tokens / examples / CONTEXT))


def theirs(method: str, folder: Path, side: str) -> dict[str, float]:
    import datasets
    import peft
    import transformers
    import trl

    rows = {
        n: datasets.Dataset.from_list([json.loads(line) for line in (folder / "data" / f"{n}.jsonl").open(encoding="utf-8")])
        for n in ("train", "validation")
    }
    out = folder / side
    own: dict[str, Any] = {"per_device_train_batch_size": BATCH}
    if side != "defaults":
        own = {"gradient_checkpointing": False, "per_device_train_batch_size": 1, "gradient_accumulation_steps": BATCH}
    if side == "packed":
        own |= {"packing": True, "eval_packing": False, "gradient_accumulation_steps": rows_for(folder, len(rows["train"]))}
    lora = peft.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM") if method == "lora" else None
    with contextlib.redirect_stdout(sys.stderr), watched() as found:
        arguments = trl.SFTConfig(
            output_dir=str(out), num_train_epochs=1, learning_rate=RATES[method], lr_scheduler_type="constant",
            max_length=CONTEXT, bf16=False, use_cpu=True, report_to="none", save_strategy="no", disable_tqdm=True, **own,
        )  # fmt: skip
        model = transformers.AutoModelForCausalLM.from_pretrained(folder / "base")
        trainer = trl.SFTTrainer(model, arguments, train_dataset=rows["train"], eval_dataset=rows["validation"], peft_config=lora)
        begin = time.perf_counter()
        trainer.train()
        training = time.perf_counter() - begin
        trainer.evaluate()
        trainer.save_model(str(out))
    return found | {"training": training}


def held_out(method: str, folder: Path, side: str) -> tuple[float, tuple[float, float]]:
    """The loss of what a side has saved on the held-out examples, with its interval: one code for all."""
    import numpy as np
    import torch

    from groundup import modelfolder
    from groundup.core.recipe import Data
    from groundup.data.prepare import prepare
    from groundup.evaluation.evaluate import evaluate
    from groundup.models import adapters

    tuned = folder / "ours" / "model"
    task = modelfolder.load(tuned).task
    if side == "ours":
        model = modelfolder.load(tuned).model
    elif method == "lora":
        model = modelfolder.load(folder / "base").model
        adapters.read(model, folder / side)
    else:
        model = modelfolder.load(folder / side).model
    made = prepare(type(task).reads(Data(source=str(folder / "data" / "validation.jsonl"))), classification=False, kind="text")
    index = np.sort(np.concatenate(list(made.splits.values())))
    scores = evaluate(task, model, task.prepare(made.dataset, index, torch.device("cpu")), torch.device("cpu"))
    assert scores is not None
    return scores.compute()["loss"], scores.intervals()["loss"]


def turn(method: str, side: str, folder: Path) -> dict[str, Any]:
    """One side in a process of its own."""
    command = [sys.executable, __file__, "--turn", side, "--method", method, "--folder", str(folder)]
    environment = {
        **os.environ,
        "GROUNDUP_CACHE": str(folder / "cache"),
        "TRANSFORMERS_VERBOSITY": "error",
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(folder / "hf"),
    }
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"the turn of {side} failed:\n{done.stderr[-3000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def measure(method: str, size: str, given: argparse.Namespace) -> list[dict[str, Any]]:
    examples, held, turns, target = CASES[size]
    sides = SIDES
    with tempfile.TemporaryDirectory(prefix="groundup-sft-") as name:
        folder = Path(name)
        with contextlib.redirect_stdout(sys.stderr):
            make_model(size, given.tokenizer, folder / "base")
        make_data(given.data, (32, 16) if given.quick else (examples, held), folder / "data")
        found: dict[str, list[dict[str, Any]]] = {s: [] for s in sides}
        for k in range(1 if given.quick else given.turns or turns):
            for side in sides:
                if side == "ours" and k:
                    shutil.rmtree(folder / "ours")
                    for old in (folder / "cache").iterdir():
                        if old.name != "native":  # compiled once on a machine: the first turn pays for it
                            shutil.rmtree(old)
                found[side].append(turn(method, side, folder))
        os.environ["GROUNDUP_CACHE"] = str(folder / "cache")  # what this process prepares goes with the folder, too
        losses = {s: held_out(method, folder, s) for s in sides}
    middle = {s: {k: statistics.median(t[k] for t in found[s]) for k in ("seconds", "training", "peak")} for s in sides}
    parts = []
    for side in sides[1:]:
        ratio = middle[side]["seconds"] / middle["ours"]["seconds"]
        wanted = target if side == "defaults" else BEST
        low, high = losses["ours"][1]
        parts.append({
            "name": f"{size}, {side}", "ours": round(middle["ours"]["seconds"], 2), "peer": round(middle[side]["seconds"], 2), "unit": "s", "ratio": round(ratio, 3),
            "target": wanted, "met": None if wanted is None else ratio >= wanted, "ratio_of_training": round(middle[side]["training"] / middle["ours"]["training"], 3),
            "loss": round(losses["ours"][0], 4), "loss_interval": [round(low, 4), round(high, 4)], "peer_loss": round(losses[side][0], 4),
            "losses_agree": low <= losses[side][0] <= high,
        })  # fmt: skip
        memory, wanted = middle[side]["peak"] / max(middle["ours"]["peak"], 1.0), MEMORY if side == "defaults" else None
        parts.append({
            "name": f"{size}, {side}, peak memory", "ours": round(middle["ours"]["peak"]), "peer": round(middle[side]["peak"]), "unit": "MiB",
            "ratio": round(memory, 3), "target": wanted, "met": None if wanted is None else memory >= wanted,
        })  # fmt: skip
        print(
            f"{size}: ours {middle['ours']}, {side} {middle[side]}, held-out loss {losses['ours'][0]:.3f} and {losses[side][0]:.3f}",
            file=sys.stderr,
            flush=True,
        )
    return parts


def main(method: str = "lora") -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path, help="a folder with a tokenizer that has a chat template")
    parser.add_argument("--data", type=Path, help="instructions in Alpaca's form, JSON")
    parser.add_argument("--sizes", default=",".join(CASES))
    parser.add_argument("--turns", type=int, help="of each side")
    parser.add_argument("--quick", action="store_true", help="a few examples at 15M: shows that it runs, too few to judge by")
    parser.add_argument("--turn", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--method", default=method, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.turn:
        done = ours(given.method, given.folder) if given.turn == "ours" else theirs(given.method, given.folder, given.turn)
        print(json.dumps(done))
        return
    if given.tokenizer is None or given.data is None:
        parser.error("--tokenizer and --data are needed")
    parts = [part for size in (["15M"] if given.quick else given.sizes.split(",")) for part in measure(given.method, size, given)]
    timed = [p for p in parts if p["target"]]
    worst = min(timed, key=lambda p: p["ratio"] / p["target"])
    top = {k: worst[k] for k in ("ours", "peer", "unit", "ratio", "target")}
    print(json.dumps({"benchmark": f"sft_{given.method}", **top, "met": all(p["met"] for p in timed), "parts": parts}))


if __name__ == "__main__":
    main()
