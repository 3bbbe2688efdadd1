"""What `groundup plan` says before a training against what the training takes: memory of tensors, resident memory, seconds of a step.

    python benchmarks/plan_accuracy.py [--quick] [--only NAME,...] [--skip measured|published]

First part, measured here. For each configuration one fresh process plans it and another one trains it for a few steps: the training's own job, its own
data, the way of attention that it chose itself. Measured are

    tensors    the most bytes of tensors that stand in three steps, by the events of torch's allocator
    resident   the most memory that the process holds while it trains (VmHWM, reset before the first of these steps), above what it held after its imports,
               those included that a training does on its way (Linux only)
    seconds    the median step, without the profiler; against the middle of the interval that was planned

Steps differ: examples of other lengths, and documents that end within a row, whose masks are kept. The tensors are those of the step with the largest
micro-batch among the first ones, of the one before and of the one after; the seconds are those of the first steps, as many as a few seconds hold.

Second part, published: figures that others measured on GPUs with their own programs, against what is planned for the same shape, batch and method. The
shapes are written here as a config.json each; no weights are needed. Where their way of training differs from ours in what it keeps, the row says so and
does not count.

    targets: tensors within 5 %, resident memory within 15 %, seconds within 20 % of the interval's middle, published memory within 15 %; each row on its own
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

BARS = {"tensors": 0.05, "resident": 0.15, "seconds": 0.20, "published": 0.15}
TEXT = {"data.source": "stdlib#40", "task.vocabulary": 1024, "train.batch_size": 8, "train.micro_batch_size": 8, "optim.name": "adamw"}
TUNING = {"train.batch_size": 8, "task.context": 256, "evaluate.general": "none"}
# name -> (recipe, or the method of a tuning), changes of it
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "digits-cnn": ("digits-cnn", {}),
    "digits, resnet-20": ("digits-cnn", {"model": {"name": "resnet", "depth": 20}, "train.batch_size": 128}),
    "digits, micro-batches of 16": ("digits-cnn", {"train.micro_batch_size": 16}),
    "mnist-cnn": ("mnist-cnn", {}),
    "mnist, vit": ("mnist-cnn", {"model": {"name": "vit"}, "optim.lr": 1e-3}),
    "decoder 1M, adamw": ("gpt-stdlib", TEXT),
    "decoder 1M, muon": ("gpt-stdlib", TEXT | {"optim.name": "muon"}),
    "decoder 1M, auto": ("gpt-stdlib", {"data.source": "stdlib#40"}),
    "decoder 1M, context 512": ("gpt-stdlib", TEXT | {"task.context": 512}),
    "decoder 1M, micro-batches of 2": ("gpt-stdlib", TEXT | {"train.micro_batch_size": 2}),
    "decoder 1M, all recomputed": ("gpt-stdlib", TEXT | {"train.checkpointing": "whole"}),
    "decoder 1M, attention recomputed": ("gpt-stdlib", TEXT | {"train.checkpointing": "selective"}),
    "decoder 5M, adamw": ("gpt-stdlib", TEXT | {"model.size": "5M"}),
    "decoder 5M, muon, all recomputed": ("gpt-stdlib", TEXT | {"model.size": "5M", "optim.name": "muon", "train.checkpointing": "whole"}),
    "decoder 15M, adamw": ("gpt-stdlib", TEXT | {"model.size": "15M", "train.batch_size": 4, "train.micro_batch_size": 4}),
    "tuning, lora": ("lora", TUNING),
    "tuning, full": ("full", TUNING),
}
QUICK = ("digits-cnn", "decoder 1M, adamw", "tuning, lora")
METHODS = ("lora", "full")
PATIENCE = 4.0  # seconds of counted steps


# -- what is planned and trained -------------------------------------------------------------------------------------------------------
def make_base(folder: Path) -> None:
    """A Llama of transformers with random weights, a tokenizer trained on the examples, and examples in messages of many lengths."""
    import torch
    import transformers

    from groundup.data.tokenizers import train_bpe

    chance = random.Random(0)
    words = ["the", "a", "model", "step", "token", "weight", "memory", "of", "in", "to", "is", "was", "fast", "slow", "because", "where", "when", "plan"]  # fmt: skip

    def said(least: int, most: int) -> str:
        return " ".join(chance.choice(words) for _ in range(chance.randint(least, most)))

    rows = [(said(4, 40), said(4, 160)) for _ in range(512)]
    with (folder / "examples.jsonl").open("w", encoding="utf-8") as file:
        for asked, answered in rows:
            messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
            file.write(json.dumps({"messages": messages}) + "\n")
    source = (Path(importlib.import_module("typing").__file__ or "")).read_text(encoding="utf-8")
    tokenizer = train_bpe([source, *(f"{a} {b}" for a, b in rows)], 1024, exact=False)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=8192, hidden_size=256, intermediate_size=704, num_hidden_layers=6, num_attention_heads=4, num_key_value_heads=4,
        max_position_embeddings=512, tie_word_embeddings=True, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    (folder / "base").mkdir()
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder / "base")
    tokenizer.save(folder / "base", 512)


def recipe_of(case: str, folder: Path) -> Any:
    from groundup.core.recipe import load
    from groundup.pipeline import tuning_recipe

    name, changes = CASES[case]
    if name in METHODS:
        return tuning_recipe(str(folder / "base"), str(folder / "examples.jsonl"), name, changes)
    return load(name, changes)


# -- the turns, each a process of its own ----------------------------------------------------------------------------------------------
def predict(case: str, folder: Path) -> dict[str, Any]:
    import groundup
    from groundup import pipeline
    from groundup.core import console
    from groundup.planning import devices, forecast

    attention: list[str | None] = [None]
    real_steps = pipeline._real_steps

    def noted(*given: Any) -> dict[str, Any]:
        found = real_steps(*given)
        attention[0] = found["attention"]
        return found

    pipeline._real_steps = noted
    recipe = recipe_of(case, folder)
    with console.muted():
        facts = groundup.plan(recipe, {})
        ways = {}
        if attention[0] is not None:
            subject = forecast.subject_of(recipe)
            subject.model.attention_path = other = "explicit" if attention[0] == "sdpa" else "sdpa"
            found = forecast.forecast(subject, devices.find("cpu"))
            found.libraries = facts["resident"] - facts["memory"]["peak"]  # as measured with the other way
            ways[other] = {"tensors": found.peak, "resident": found.resident}
    seconds = facts["step_seconds"]
    return {
        "attention": attention[0],
        "ways": ways,
        "tensors": facts["memory"]["peak"],
        "owners": {k: v for k, v in facts["memory"].items() if k not in ("peak", "capacity")},
        "resident": facts["resident"],
        "seconds": sum(seconds) / 2,
        "calibrated": facts.get("calibrated"),
        "micro_batch_size": facts["micro_batch_size"],
        "took": facts["seconds"],
    }


def held_by(thing: Any, depth: int = 4) -> int:
    """Bytes of the arrays and tensors that the attributes of an object hold: the encoded data."""
    import numpy as np
    import torch

    found: dict[int, int] = {}

    def look(x: Any, depth: int) -> None:
        if isinstance(x, torch.Tensor):
            found[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        elif isinstance(x, np.memmap):
            return  # the system's own cache, not the process's memory
        elif isinstance(x, np.ndarray):
            found[x.ctypes.data] = x.nbytes
        elif depth and isinstance(x, (list, tuple)) and len(x) < 100:
            for part in x:
                look(part, depth - 1)
        elif depth and isinstance(x, dict) and len(x) < 100:
            look(list(x.values()), depth - 1)
        elif depth and hasattr(x, "__dict__") and not isinstance(x, type):
            for part in list(vars(x).values()):
                look(part, depth - 1)

    look(thing, depth)
    return sum(found.values())


def measure(case: str, folder: Path, imports: list[str]) -> dict[str, Any]:
    import torch

    import groundup.pipeline
    from groundup import jobs
    from groundup.core import console
    from groundup.core.device import forget_peak, status_bytes
    from groundup.training import loop

    for name in imports:
        with contextlib.suppress(Exception):  # parts that only exist while something else is being imported
            importlib.import_module(name)
    gc.collect()
    before, level, files = set(sys.modules), status_bytes("VmRSS"), status_bytes("RssFile")
    with console.muted():
        recipe, run, _ = jobs.open_run(recipe_of(case, folder), {}, folder / f"run-{time.monotonic_ns()}", resume=False, extend=False)
        forget_peak()
        job = jobs.build(recipe, run, resume=False, trust_code=False, train_base=lambda name: groundup.pipeline.train(name).path)
    model = job.state.model
    job.plan.stage(0, job.state.total).enter(model)
    built, building = status_bytes("VmRSS"), status_bytes("VmHWM")
    forget_peak()
    times: list[float] = []
    while len(times) < 4 or (sum(times) < PATIENCE and len(times) < 60):
        began = time.perf_counter()
        loop.step(job.state, job.batches, job.task, job.plan)
        times.append(time.perf_counter() - began)
    highest, after, files = status_bytes("VmHWM"), status_bytes("VmRSS"), status_bytes("RssFile") - files
    late = sorted(n for n in set(sys.modules) - before if not n.startswith("__"))
    tensors = peak_of_tensors(job)
    run.close()
    return {
        "tensors": tensors,
        "resident": highest - level if level else None,
        "seconds": statistics.median(times[1:]),
        "spread": [min(times[1:]), max(times[1:])],
        "steps": len(times) - 1,
        "attention": getattr(model, "attention_path", None),
        "micro_batch_size": job.batches.micro_batch_size,
        "imports": level,
        "built": built - level,
        "building": building - level,
        "after": after - level,
        "files": files,
        "encoded": held_by(job.batches.encoded),
        "records": held_by(job.prepared.dataset),
        "late": late,
        "threads": torch.get_num_threads(),
    }


def peak_of_tensors(job: Any) -> int:
    """The most bytes of tensors in three steps: what stands before them, and the allocator's events since."""
    import torch

    from groundup.training import loop

    model = job.state.model
    model.zero_grad(set_to_none=True)
    states = [v for o in job.state.optimizers for s in o.state.values() for v in s.values() if isinstance(v, torch.Tensor)]
    averaged = list((getattr(job.state, "ema", None) or {}).values())
    storages = {}
    for t in (*model.parameters(), *model.buffers(), *states, *averaged):
        storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
    worst = 1
    if job.task.kind == "text":
        sizes = [max(sum(t.nbytes for t in vars(b).values() if isinstance(t, torch.Tensor)) for b in job.batches.micro(k)) for k in range(16)]
        worst = max(1, sizes.index(max(sizes)))
    job.state.step = worst - 1
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        for _ in range(3):
            loop.step(job.state, job.batches, job.task, job.plan)
    events = sorted((e for e in profile.kineto_results.events() if e.name() == "[memory]"), key=lambda e: e.start_ns())
    now = most = 0
    for event in events:
        now += event.nbytes()
        most = max(most, now)
    return most + sum(storages.values())


# -- published figures -----------------------------------------------------------------------------------------------------------------
def llama(
    layers: int, width: int, heads: int, kv_heads: int, hidden: int, vocabulary: int, context: int, tied: bool = False
) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": layers, "hidden_size": width, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "intermediate_size": hidden, "vocab_size": vocabulary, "max_position_embeddings": context, "rms_norm_eps": 1e-5,
        "hidden_act": "silu", "tie_word_embeddings": tied,
    }  # fmt: skip


CONFIGS = {
    "llama-3.2-3b": llama(28, 3072, 24, 8, 8192, 128_256, 131_072, True),
    "llama-3-8b": llama(32, 4096, 32, 8, 14_336, 128_256, 8192),
    "llama-2-7b": llama(32, 4096, 32, 32, 11_008, 32_000, 4096),
    "llama-2-13b": llama(40, 5120, 40, 40, 13_824, 32_000, 4096),
    "stablelm-3b": {
        "architectures": ["GPTNeoXForCausalLM"], "model_type": "gpt_neox", "num_hidden_layers": 16, "hidden_size": 4096, "num_attention_heads": 32,
        "intermediate_size": 16_384, "vocab_size": 50_688, "max_position_embeddings": 4096, "rotary_pct": 0.25, "use_parallel_residual": True,
        "hidden_act": "gelu", "layer_norm_eps": 1e-5, "tie_word_embeddings": False,
    },
    "gpt2-124m": {
        "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "n_layer": 12, "n_embd": 768, "n_head": 12, "n_positions": 1024, "vocab_size": 50_304,
        "layer_norm_epsilon": 1e-5, "activation_function": "gelu_new", "tie_word_embeddings": True,
    },
}  # fmt: skip
GIB, MIB, GB = 2**30, 2**20, 10**9
QV = {"method.rank": 8, "method.alpha": 16, "method.dropout": 0.05, "method.targets": ["q_proj", "v_proj"]}
NEOX = QV | {"method.targets": ["query_key_value"]}
ADAPTED = {"method.rank": 64, "method.alpha": 128, "method.targets": ["q_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]}
TUNE = {"task.context": 4096, "train.batch_size": 2, "train.micro_batch_size": 2}
RECOMPUTED = TUNE | {"train.checkpointing": "whole"}
TITAN = {"task.context": 8192, "train.micro_batch_size": 2, "train.checkpointing": "selective"}


def lit(config: str, micro: int, length: int, figure: float, other: str | None = None) -> dict[str, Any]:
    return {
        "name": f"{config}, LoRA on q and v, micro-batch {micro}", "source": "lit-gpt tutorials/resource-tables.md at 8641822", "config": config,
        "method": "lora", "overrides": (NEOX if config.startswith("stable") else QV) | {"task.context": length, "train.batch_size": micro, "train.micro_batch_size": micro},
        "weights": "bfloat16", "published": figure, "unit": "GB", "differs": other,
    }  # fmt: skip


def tune(name: str, overrides: dict[str, Any], figure: float, method: str = "full", other: str | None = None) -> dict[str, Any]:
    return {
        "name": f"Llama 3.2 3B, {name}", "source": "torchtune README.md at 1814feb17", "config": "llama-3.2-3b", "method": method, "overrides": overrides,
        "weights": "bfloat16", "published": figure, "unit": "GiB", "differs": other,
    }  # fmt: skip


def titan(gpus: int, figure: float) -> dict[str, Any]:
    return {
        "name": f"Llama 3 8B, FSDP2 on {gpus}", "source": "torchtitan, figures of its Llama 3 8B", "config": "llama-3-8b", "method": "full",
        "overrides": TITAN | {"train.batch_size": 2 * gpus}, "weights": "float32", "published": figure, "unit": "GiB", "gpus": gpus,
        "differs": "their logits are whole and in float32 besides, and they keep every second product of all layers: not counted",
    }  # fmt: skip


PUBLISHED: list[dict[str, Any]] = [
    tune("all trained, eager", TUNE, 60.0, other="their logits are whole (2.0 GiB in bfloat16, more in float32): not counted"),
    tune("all trained, compiled, loss in chunks", TUNE, 42.9, other="compiled: fused operations keep less: not counted"),
    tune("all trained, loss in chunks, all recomputed", RECOMPUTED, 24.9),
    tune("LoRA, all recomputed", RECOMPUTED | ADAPTED, 8.5, "lora"),
    tune("QLoRA, all recomputed", RECOMPUTED | ADAPTED | {"method.bits": 4}, 4.6, "lora"),
    lit("llama-2-7b", 1, 1304, 21.30),
    lit("llama-2-7b", 2, 1304, 29.07),
    lit("llama-2-13b", 1, 1304, 38.12),
    lit("stablelm-3b", 1, 1034, 9.69),
    lit("stablelm-3b", 2, 1034, 12.10),
    lit("stablelm-3b", 4, 1034, 16.92),
    {
        "name": "GPT-2 124M, activations of 56 x 1024", "source": "llm.c", "config": "gpt2-124m", "method": "full", "overrides": {
            "task.context": 1024, "train.batch_size": 56, "train.micro_batch_size": 56}, "weights": "bfloat16", "published": 18_564, "unit": "MiB",
        "owners": ("activations", "logits"), "differs": "a backward pass written by hand, whole logits (5,502 MiB): not counted",
    },
    titan(8, 82.4),
    titan(128, 67.0),
]  # fmt: skip


def published(folder: Path, quick: bool) -> list[dict[str, Any]]:
    """Each row planned; rows that could not be are there with the reason."""
    from groundup.planning import devices, forecast, shapes

    rows = []
    for row in PUBLISHED[2:3] if quick else PUBLISHED:
        where = folder / row["config"]
        where.mkdir(exist_ok=True)
        (where / "config.json").write_text(json.dumps(CONFIGS[row["config"]]), encoding="utf-8")
        began = time.monotonic()
        try:
            subject = shapes.subject_of_shape(str(where / "config.json"), row["method"], row["overrides"], row["weights"])
            found = forecast.forecast(subject, devices.find("mi300x"), row.get("gpus", 1))  # with room for all: nothing is halved
        except Exception as error:  # a row that cannot be planned is said, not hidden
            rows.append({**row, "failed": f"{type(error).__name__}: {error}"[:300]})
            continue
        part = found.memory if "owners" not in row else {k: found.moments["activations"].get(k, 0) for k in row["owners"]}
        size = {"GiB": GIB, "MiB": MIB, "GB": GB}[row["unit"]]
        owners = {k: round(v / size, 2) for k, v in part.items()}
        rows.append({**row, "planned": sum(part.values()) / size, "by": owners, "took": round(time.monotonic() - began, 1)})
    return rows


# -- the whole -------------------------------------------------------------------------------------------------------------------------
def turn(what: str, folder: Path, *, case: str = "", imports: list[str] | None = None, quick: bool = False) -> Any:
    command = [sys.executable, __file__, "--turn", what, "--case", case, "--folder", str(folder), *(["--quick"] if quick else [])]
    environment = {**os.environ, "GROUNDUP_CACHE": str(folder / "cache"), "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    done = subprocess.run(command, env=environment, input=json.dumps(imports or []), capture_output=True, text=True, check=False)
    if done.returncode:
        return {"failed": done.stderr.strip()[-1500:]}
    return json.loads(done.stdout.splitlines()[-1])


def kind_of(case: str) -> str:
    name, changes = CASES[case]
    return "tuning" if name in METHODS else f"text {changes.get('train.checkpointing', '')}" if name.startswith("gpt") else "vision"


def part_of(name: str, planned: float, taken: float, unit: str, bar: float, **facts: Any) -> dict[str, Any]:
    ratio = planned / taken
    return {"name": name, "ours": round(planned, 4), "peer": round(taken, 4), "unit": unit, "ratio": round(ratio, 3), "target": bar,
            "met": abs(ratio - 1) <= bar, **facts}  # fmt: skip


def measured_part(names: list[str], folder: Path) -> list[dict[str, Any]]:
    if any(kind_of(n) == "tuning" for n in names) and (made := turn("base", folder)) and "failed" in made:
        sys.exit(f"the base of the tunings could not be made:\n{made['failed']}")
    parts: list[dict[str, Any]] = []
    imports: dict[str, list[str]] = {}
    print(f"{'':34}{'tensors, MiB':>24}{'resident, MiB':>28}{'seconds of a step':>28}")
    for case in names:
        kind = kind_of(case)
        if kind not in imports:  # what such a training imports on its way
            imports[kind] = turn("measure", folder, case=case).get("late", [])
        planned = turn("predict", folder, case=case)
        taken = turn("measure", folder, case=case, imports=imports[kind])
        if "failed" in planned or "failed" in taken:
            why = (planned.get("failed") or taken.get("failed")).splitlines()[-1]
            print(f"{case:34}left out: {why}", flush=True)
            continue
        other = taken["attention"] if planned["attention"] not in (None, taken["attention"]) else None
        if other:  # which way is faster was measured twice, and came out differently: memory is compared of the same way
            planned |= planned["ways"][other]
        line = f"{case:34}"
        for what, unit, size, form in (("tensors", "MiB", MIB, ",.1f"), ("resident", "MiB", MIB, ",.0f"), ("seconds", "s", 1, ".4f")):
            if planned[what] is None or not taken[what]:
                line += " -"
                continue
            facts = {k: taken[k] for k in ("attention", "micro_batch_size", "threads")} | {"planned_attention": planned["attention"]}
            if what == "resident":
                facts |= {k: round(taken[k] / MIB, 1) for k in ("imports", "built", "building", "after", "files", "encoded", "records")}
                facts["above_tensors"] = round((taken["resident"] - planned["tensors"]) / MIB, 1)
            if what == "seconds":
                facts |= {"calibrated": bool(planned["calibrated"]), "spread": [round(s, 4) for s in taken["spread"]]}
            part = part_of(f"{case}: {what}", planned[what] / size, taken[what] / size, unit, BARS[what], **facts)
            parts.append(part)
            mark = " " if part["met"] else "!"
            line += f"{part['ours']:>10{form}} /{part['peer']:>9{form}} {part['ratio'] - 1:+6.1%}{mark}"
        print(line + (f"  (planned with {planned['attention']}, trained with {other})" if other else ""), flush=True)
    return parts


def published_part(folder: Path, quick: bool) -> list[dict[str, Any]]:
    rows = turn("published", folder, quick=quick)
    if isinstance(rows, dict):
        print(f"no shapes: {rows['failed'].splitlines()[-1]}")
        return []
    parts = []
    print(f"\n{'planned without weights':58}{'planned':>10}{'published':>11}")
    for row in rows:
        if "failed" in row:
            print(f"{row['name']:58}left out: {row['failed'].splitlines()[0]}")
            continue
        note = row["differs"] or ""
        part = part_of(
            row["name"],
            row["planned"],
            row["published"],
            row["unit"],
            BARS["published"],
            source=row["source"],
            by=row["by"],
            differs=row["differs"],
        )
        mark = " " if part["met"] or row["differs"] else "!"
        print(f"{row['name']:58}{part['ours']:>10,.2f}{part['peer']:>11,.2f} {row['unit']:3} {part['ratio'] - 1:+6.1%}{mark} {note}")
        parts.append(part)
    titans = [p for p in parts if "FSDP2" in p["name"]]
    if len(titans) == 2:  # what their program keeps besides is the same on 8 and on 128: only the shards differ
        few, many = titans
        part = part_of(
            "Llama 3 8B, FSDP2, on 8 more than on 128",
            few["ours"] - many["ours"],
            few["peer"] - many["peer"],
            "GiB",
            BARS["published"],
            differs="what the allocator had reserved, blocks of other moments included: not counted",
        )
        print(f"{part['name']:58}{part['ours']:>10,.2f}{part['peer']:>11,.2f} GiB {part['ratio'] - 1:+6.1%}{' ' if part['met'] else '!'}")
        parts.append(part)
    return parts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="three configurations and one published figure")
    parser.add_argument("--only", help="names of configurations, with ';' between them")
    parser.add_argument("--skip", choices=("measured", "published"))
    parser.add_argument("--turn", choices=("base", "predict", "measure", "published"), help=argparse.SUPPRESS)
    parser.add_argument("--case", default="", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.turn:
        with contextlib.redirect_stdout(sys.stderr):
            if given.turn == "base":
                found: Any = make_base(given.folder) or {}
            elif given.turn == "predict":
                found = predict(given.case, given.folder)
            elif given.turn == "measure":
                found = measure(given.case, given.folder, json.loads(sys.stdin.read() or "[]"))
            else:
                found = published(given.folder, given.quick)
        print(json.dumps(found))
        return
    names = given.only.split(";") if given.only else list(QUICK) if given.quick else list(CASES)
    with tempfile.TemporaryDirectory(prefix="groundup-plan-accuracy-") as name:
        folder = Path(name)
        parts = [] if given.skip == "measured" else measured_part(names, folder)
        parts += [] if given.skip == "published" else published_part(folder, given.quick)
    counted = [p for p in parts if not p.get("differs")]
    if not counted:
        sys.exit("nothing could be compared")
    worst = max(counted, key=lambda p: abs(p["ratio"] - 1) / p["target"])
    top = {k: worst[k] for k in ("ours", "peer", "unit", "ratio", "target")}
    print(json.dumps({"benchmark": "plan_accuracy", "worst": worst["name"], **top, "met": all(p["met"] for p in counted), "parts": parts}))


if __name__ == "__main__":
    main()
