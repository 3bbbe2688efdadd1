"""The source of Python's own standard library: real text that every installation has."""

from __future__ import annotations

import sysconfig
from pathlib import Path

from groundup.core.registry import DATASETS, Card
from groundup.data.items import TextSource


@DATASETS.register(
    "stdlib",
    Card(
        summary="the source of Python's standard library: some 600 files, 11 MB; differs from one version of Python to the next",
        summary_zh="Python 标准库的源代码：约 600 个文件、11 MB；随 Python 版本不同而不同",
        source="the *.py files below this Python's stdlib path, without site-packages, tests, idlelib and lib2to3",
        shapes="one document for each file",
        licence="PSF-2.0",
        limits="code and English comments; large enough to try a tokenizer and a small model, not to judge them",
    ),
)
def stdlib() -> TextSource:
    left_out = frozenset({"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__"})
    return TextSource("stdlib", (Path(sysconfig.get_path("stdlib")),), (".py",), left_out)
