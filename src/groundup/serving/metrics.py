"""What the server counts, in Prometheus' text format (version 0.0.4)."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
ROWS = (1, 2, 4, 8, 16, 32, 64)


class Histogram:
    def __init__(self, name: str, words: str, bounds: tuple[float, ...]) -> None:
        self.name, self.words, self.bounds = name, words, bounds
        self.counts, self.sum = [0] * (len(bounds) + 1), 0.0

    def add(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value

    def lines(self) -> list[str]:
        found, total = [f"# HELP {self.name} {self.words}", f"# TYPE {self.name} histogram"], 0
        for bound, count in zip((*(f"{b:g}" for b in self.bounds), "+Inf"), self.counts):
            total += count
            found.append(f'{self.name}_bucket{{le="{bound}"}} {total}')
        return [*found, f"{self.name}_sum {self.sum:.6f}", f"{self.name}_count {total}"]


class Metrics:
    """Requests by path and status, the time to answer POST /predict, and the rows of forward passes. `in_flight`: requests being answered."""

    def __init__(self) -> None:
        self.requests: Counter[tuple[str, int]] = Counter()
        self.latency = Histogram("groundup_request_seconds", "Time to answer POST /predict.", SECONDS)
        self.batches = Histogram("groundup_batch_rows", "Inputs of one forward pass.", ROWS)
        self.in_flight = 0

    def text(self, queued: int) -> str:
        lines = ["# HELP groundup_requests_total Requests by path and status.", "# TYPE groundup_requests_total counter"]
        lines += [f'groundup_requests_total{{path="{p}",status="{s}"}} {n}' for (p, s), n in sorted(self.requests.items())]
        for name, words, value in (
            ("groundup_in_flight", "Requests that are being answered.", self.in_flight),
            ("groundup_queued_rows", "Inputs that are being decoded or wait for the model.", queued),
        ):
            lines += [f"# HELP {name} {words}", f"# TYPE {name} gauge", f"{name} {value}"]
        return "\n".join([*lines, *self.latency.lines(), *self.batches.lines()]) + "\n"
