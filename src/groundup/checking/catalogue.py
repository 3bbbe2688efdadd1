"""The texts of all findings: what is said, why it is wrong, what to write. One entry per `finding_id`, in English and Chinese."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

CATALOGUE: dict[str, dict[str, Any]] = json.loads((Path(__file__).parent / "catalogue.json").read_text(encoding="utf-8"))
