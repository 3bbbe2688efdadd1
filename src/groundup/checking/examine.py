"""All probes on one subject. A probe that fails is reported as such; what the others found stays."""

from __future__ import annotations

import time
from collections.abc import Callable

from groundup.checking.findings import Finding, Report
from groundup.checking.probes import PROBES, Probe
from groundup.checking.subject import Enough, Subject
from groundup.checking.trial import Trial

ORDER = {"error": 0, "warning": 1, "info": 2}


def examine(
    subject: Subject,
    told: Callable[[str, str, float], None] = lambda en, zh, share: None,
    seconds: float = 14.0,
    probes: list[tuple[str, str, Probe]] = PROBES,
) -> Report:
    """Puts a model with its data, loss and optimizer to every probe, and leaves all of them as they were.

    Args:
        told: (English, Chinese, share done) before each probe.
        seconds: the time after which long probes (short trainings) are shortened.
    """
    begin = time.monotonic()
    report, trial = Report(), Trial(subject, seconds)
    for number, (name, name_zh, probe) in enumerate(probes):
        told(name, name_zh, number / len(probes))
        found: list[Finding] = []
        try:
            for finding in probe(trial):
                found.append(finding)
        except (Exception, Enough) as error:
            report.failed.append((name, f"{type(error).__name__}: {error}"))
        report.findings += found
        if not found and (not report.failed or report.failed[-1][0] != name):
            report.passed.append((name, name_zh))
    report.findings = _unique(report.findings)
    if not report.errors and probes is PROBES:
        _failure(trial, report)
    report.findings.sort(key=lambda f: ORDER[f.severity])
    report.seconds = time.monotonic() - begin
    return report


def _unique(findings: list[Finding]) -> list[Finding]:
    seen: set[tuple[str, str]] = set()
    kept = []
    for f in findings:
        if (f.finding_id, f.location) not in seen:
            seen.add((f.finding_id, f.location))
            kept.append(f)
    return kept


def _failure(trial: Trial, report: Report) -> None:
    """The step raised something that no probe has explained."""
    if trial.batch is None:
        return
    own = trial.subject.fit is not None or trial.subject.train_step is not None
    error = trial.step.error or (trial.events.error if own else trial.trained.error)
    if error is None:
        return
    op = trial.step.tape.failed
    line = f"{op.file.rsplit('/', 1)[-1]}:{op.line}" if op is not None and op.file else ""
    place = trial.place(op) if op is not None else trial.outside()
    report.findings.append(trial.found("step.fails", place, op, error=f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:300],
                                       source_line=line or "traceback"))  # fmt: skip
