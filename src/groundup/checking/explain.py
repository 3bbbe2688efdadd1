"""The long explanation of a finding, or of a cause that the doctor names: what, why, a wrong and a right example, where it is documented."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from groundup.checking.catalogue import CATALOGUE
from groundup.core.errors import UserError, did_you_mean
from groundup.core.messages import language

CAUSES = Path(__file__).parents[1] / "env" / "causes.json"


def explain(name: str) -> dict[str, Any]:
    """`id`, `severity`, `says`, `why`, `fix`, and where there is one `wrong`, `right` and `source`; in the terminal's language.

    Raises:
        UserError: no such finding and no such cause.
    """
    zh = language() == "zh"
    if name in CATALOGUE:
        entry = CATALOGUE[name]
        return {"id": name, "severity": entry["severity"]} | {k: _open(entry[k][zh]) for k in ("says", "why", "fix")} | {
            k: entry.get(k, "") for k in ("wrong", "right", "source")
        }  # fmt: skip
    causes = json.loads(CAUSES.read_text(encoding="utf-8"))["causes"]
    if name in causes:
        cause, tongue = causes[name], "zh" if zh else "en"
        fixes = [f"{f[tongue]}: {f['run']}" if f.get("run") else f[tongue] for f in cause.get("fix", [])]
        return {
            "id": name, "severity": cause["severity"], "says": _open(cause["title"][tongue]), "why": _open(" ".join(e[tongue] for e in cause["explain"])),
            "fix": _open("\n".join(fixes)), "wrong": "", "right": "", "source": "groundup env doctor",
        }  # fmt: skip
    hint, hint_zh = did_you_mean(name, [*CATALOGUE, *causes])
    raise UserError(
        "there is no finding '{name}'." + hint, "没有名为 '{name}' 的发现。" + hint_zh, name=name, fix="groundup explain optim.zero_grad_missing"
    )


def _open(template: str) -> str:
    """Placeholders as '...': the numbers are those of a real finding."""
    return re.sub(r"\{[a-z_]+\}", "…", template)
