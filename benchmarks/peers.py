"""Seconds per epoch of the same network on the same tensors: ours, Lightning, transformers' Trainer and fastai.

    python benchmarks/peers.py [--quick]

All train the articles' network (a 3x3 convolution, pooling, two linear layers; 693,962 parameters) on MNIST's training pictures with AdamW 1e-3
and batches of 256, without augmentation, evaluation or checkpoints inside the epoch, and with each one's own way of logging on at its default
frequency. The peers get the normalised pictures as one float tensor in a TensorDataset, as their documentation advises for data in memory; ours
gets the bytes and normalises each batch, as it always does. A peer that cannot be imported is left out, with the reason.

    pip install lightning accelerate fastai      (none of them is needed by groundup)

The sides take turns, an epoch each; the first turn of each is not counted.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from groundup import jobs
from groundup.core import console
from groundup.data.builtin.idx_sets import mnist
from groundup.models.base import build_model
from groundup.training import loop
from groundup.training.signals import StopRequest
from groundup.training.watch import Base, build_watchers

BATCH, LR = 256, 1e-3


class Net(nn.Module):
    """The network, as a plain module."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = build_model("simple_cnn", {}, (1, 28, 28), 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x)


class EpochEnd(Base):
    """Notes when an epoch of ours is over."""

    def __init__(self, steps: int) -> None:
        self.steps, self.times = steps, [0.0]

    def begin(self, state: Any, plan: Any) -> None:
        self.times = [time.perf_counter()]

    def after_step(self, state: Any, report: Any) -> None:
        if report.step % self.steps == 0:
            self.times.append(time.perf_counter())


def ours(count: int, folder: Path) -> float:
    steps = count // BATCH
    recipe = {
        "name": "peers", "task": "image-classification",
        "data": {"source": f"mnist#{count + 10_000}" if count < 60_000 else "mnist", "split": {"validation": 0}},
        "model": "simple_cnn", "optim": {"name": "adamw", "lr": LR}, "schedule": {"name": "constant"},
        "train": {"steps": steps, "batch_size": BATCH, "clip_norm": None, "device": "cpu", "save_every": "1h", "keep": "last"},
        "evaluate": {"every": 10**9},
    }  # fmt: skip
    with console.muted(), StopRequest() as stop:
        resolved, run, _ = jobs.open_run(recipe, {}, folder / str(time.monotonic_ns()), resume=False, extend=False)
        job = jobs.build(resolved, run, resume=False, trust_code=False, train_base=Path)
        watch = EpochEnd(steps)
        watchers = [*build_watchers(run, metric=job.plan.metric, tensorboard=True, profile=0, trackers=[]), watch]
        loop.train(job.state, job.batches, job.task, job.plan, job.keeper, None, watchers, stop)
        for watcher in watchers:
            watcher.end()
        run.close()
    return watch.times[-1] - watch.times[0]


def lightning(data: torch.utils.data.TensorDataset, folder: Path) -> Callable[[], float]:
    import lightning as L

    class Module(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = Net()

        def training_step(self, batch: Any, index: int) -> torch.Tensor:
            loss = F.cross_entropy(self.net(batch[0]), batch[1])
            self.log("loss", loss)
            return loss

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), lr=LR)

    class Clock(L.Callback):
        def on_train_epoch_start(self, *_: Any) -> None:
            self.begin = time.perf_counter()

        def on_train_epoch_end(self, *_: Any) -> None:
            self.seconds = time.perf_counter() - self.begin

    def run() -> float:
        clock = Clock()
        trainer = L.Trainer(max_epochs=1, accelerator="cpu", enable_checkpointing=False, enable_model_summary=False, callbacks=[clock],
                            default_root_dir=folder, enable_progress_bar=False)  # fmt: skip
        trainer.fit(Module(), torch.utils.data.DataLoader(data, BATCH, shuffle=True, drop_last=True))
        return clock.seconds

    return run


def trainer(data: torch.utils.data.TensorDataset, folder: Path) -> Callable[[], float]:
    import accelerate  # noqa: F401 - the Trainer needs it
    from transformers import Trainer, TrainerCallback, TrainingArguments

    class Model(Net):
        def forward(self, pixels: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:  # type: ignore[override]
            logits = self.inner(pixels)
            return {"loss": F.cross_entropy(logits, labels), "logits": logits}

    class Clock(TrainerCallback):
        def on_epoch_begin(self, *_: Any, **__: Any) -> None:
            self.begin = time.perf_counter()

        def on_epoch_end(self, *_: Any, **__: Any) -> None:
            self.seconds = time.perf_counter() - self.begin

    def collate(rows: list[Any]) -> dict[str, torch.Tensor]:
        return {"pixels": torch.stack([r[0] for r in rows]), "labels": torch.stack([r[1] for r in rows])}

    def run() -> float:
        clock = Clock()
        arguments = TrainingArguments(output_dir=str(folder), num_train_epochs=1, per_device_train_batch_size=BATCH, learning_rate=LR,
                                      lr_scheduler_type="constant", weight_decay=0.01, save_strategy="no", report_to=[], use_cpu=True,
                                      dataloader_drop_last=True, remove_unused_columns=False, disable_tqdm=True, max_grad_norm=0.0)  # fmt: skip
        made = Trainer(Model(), arguments, train_dataset=data, data_collator=collate, callbacks=[clock])
        made.train()
        return clock.seconds

    return run


def fastai(data: torch.utils.data.TensorDataset, folder: Path) -> Callable[[], float]:
    import fastai.callback.progress  # noqa: F401 - gives Learner its no_bar
    from fastai.callback.core import Callback
    from fastai.data.core import DataLoaders
    from fastai.data.load import DataLoader
    from fastai.learner import Learner

    class Clock(Callback):
        def before_train(self) -> None:
            self.begin = time.perf_counter()

        def after_train(self) -> None:
            self.seconds = time.perf_counter() - self.begin

    def run() -> float:
        clock = Clock()
        loader = DataLoader(data, bs=BATCH, shuffle=True, drop_last=True, num_workers=0)
        learner = Learner(DataLoaders(loader, loader), Net(), loss_func=nn.CrossEntropyLoss(), opt_func=_adamw, lr=LR, cbs=clock, path=folder)
        with learner.no_bar(), learner.no_logging():
            learner.fit(1)
        return clock.seconds

    def _adamw(params: Any, lr: float, **_: Any) -> Any:
        from fastai.optimizer import OptimWrapper

        return OptimWrapper(params, torch.optim.AdamW, lr=lr)

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tenth of the pictures, one counted turn: shows that it runs")
    quick = parser.parse_args().quick
    warnings.filterwarnings("ignore")
    for name in ("lightning", "lightning.pytorch", "transformers", "accelerate"):
        logging.getLogger(name).setLevel(logging.ERROR)
    count, turns = (6_000, 2) if quick else (60_000, 5)
    source = mnist()
    index = source.given["train"][:count]
    pixels = (source.inputs.fetch(index).float() / 255 - 0.1307) / 0.3081
    data = torch.utils.data.TensorDataset(pixels, torch.from_numpy(source.target[index].astype("int64")))
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        sides: dict[str, Callable[[], float]] = {"ours": lambda: ours(count, folder)}
        for make in (lightning, trainer, fastai):
            try:
                sides[make.__name__] = make(data, folder)
            except ImportError as error:
                print(f"{make.__name__} is left out: {error}", flush=True)
        rows: dict[str, list[float]] = {name: [] for name in sides}
        for turn in range(turns):
            for name, run in sides.items():
                seconds = run()
                if turn:
                    rows[name].append(seconds)
            print(f"turn {turn}: " + ", ".join(f"{name} {v[-1]:.2f} s" for name, v in rows.items() if v), flush=True)
    parts = []
    for name in [n for n in rows if n != "ours"]:
        ratio = statistics.median(b / a for a, b in zip(rows["ours"], rows[name]))
        parts.append({"name": name, "ours": round(statistics.median(rows["ours"]), 3), "peer": round(statistics.median(rows[name]), 3),
                      "unit": "s per epoch", "ratio": round(ratio, 3), "target": 1.0, "met": ratio > 1.0})  # fmt: skip
    if not parts:
        raise SystemExit("no peer is installed: pip install lightning accelerate fastai")
    worst = min(parts, key=lambda p: p["ratio"])
    top = {key: worst[key] for key in ("ours", "peer", "unit", "ratio", "target", "met")}
    print(json.dumps({"benchmark": "peers", **top, "met": all(p["met"] for p in parts), "parts": parts}))


if __name__ == "__main__":
    main()
