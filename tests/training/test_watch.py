"""What watches a training."""

import types

import pytest

from groundup.training import watch


def test_speed_counts_steps_and_nothing_else(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(watch.time, "monotonic", lambda: now[0])
    timer, state = watch.Timer(), types.SimpleNamespace(samples=0, tokens=0)
    timer.begin(state, types.SimpleNamespace(device="cpu", peak_flops=0.0))

    def steps(count):
        for _ in range(count):
            now[0] += 1
            state.samples, state.tokens = state.samples + 4, state.tokens + 400
            timer.after_step(state, None)

    def logged(kind="train"):
        row = {"kind": kind, "samples": state.samples, "tokens": state.tokens}
        timer.row(row)
        return row.get("tokens_per_s")

    steps(10)
    assert logged() == pytest.approx(400)
    steps(9)
    now[0] += 50  # an evaluation
    logged("evaluate")
    now[0] += 7
    logged("checkpoint")
    steps(1)
    assert logged() == pytest.approx(400)
