"""Wrong before long: probes of a training that is about to begin, each leaving everything as it was."""

from groundup.checking.findings import Finding, Report

__all__ = ["Finding", "Report"]
