"""What a check found: where, what was observed, why it is wrong, what to write instead."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from groundup.core.messages import language

Severity = Literal["error", "warning", "info"]


@dataclass
class Finding:
    """One mistake.

    Args:
        finding_id: its stable name, as 'lm.labels_not_shifted'.
        location: a module path ('model.fc1'), a key of the recipe ('task.template'), or a name of the script ('train_loader').
        message, fix: (English, Chinese); the fix is the line to write.
        evidence: the numbers that were observed.
    """

    finding_id: str
    severity: Severity
    location: str
    message: tuple[str, str]
    fix: tuple[str, str]
    evidence: dict[str, Any] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        chosen = language() == "zh"
        return {
            "finding_id": self.finding_id,
            "severity": self.severity,
            "location": self.location,
            "message": self.message[chosen],
            "fix": self.fix[chosen],
            "evidence": self.evidence,
        }


@dataclass
class Report:
    """All findings of a check.

    Args:
        passed: names of the probes that found nothing (English, Chinese).
        failed: probes that could not be carried out, and why.
    """

    findings: list[Finding] = field(default_factory=list)
    passed: list[tuple[str, str]] = field(default_factory=list)
    failed: list[tuple[str, str]] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def errors(self) -> list[Finding]:
        return [f for f in self.findings if f.severity == "error"]

    def joined(self, other: Report) -> Report:
        """Both reports as one."""
        return Report(self.findings + other.findings, self.passed + other.passed, self.failed + other.failed, self.seconds + other.seconds)

    def as_json(self) -> dict[str, Any]:
        return {
            "findings": [f.as_json() for f in self.findings],
            "passed": [name for name, _ in self.passed],
            "failed": [{"probe": name, "why": why} for name, why in self.failed],
            "seconds": round(self.seconds, 3),
        }
