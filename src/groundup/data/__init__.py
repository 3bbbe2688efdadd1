"""Data: sources, splits, statistics, batches.

A data SPEC is a built-in name (`digits`), a path to a file, a folder or a glob, `hub:owner/name`, or `path/to/file.py:Name`; any of
them with `#500` for a seeded sample of 500. A data set of one's own is a function that returns a `Dataset` (see `from_arrays`).
"""

from groundup.core.registry import DATASETS
from groundup.data.dataset import Dataset, from_arrays

register = DATASETS.register

__all__ = ["DATASETS", "Dataset", "from_arrays", "register"]
