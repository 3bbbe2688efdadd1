"""Every test runs in its own folder, in English, with its own cache, and leaves torch's global settings as it found them."""

import os
import random
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # these models are too small to share between cores, and several test processes share the cores anyway

import numpy as np
import pytest
import torch

from groundup.core import console, messages


@pytest.fixture(scope="session")
def cache_folder(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session", autouse=True)
def for_all(tmp_path_factory, cache_folder):
    """For fixtures of modules, too: the cache; and few general questions, because every tuning of a language model asks them twice."""
    from groundup import before_after

    few = tmp_path_factory.mktemp("general") / "general.jsonl"
    lines = before_after.GENERAL.read_text(encoding="utf-8").splitlines()
    few.write_text("\n".join([*lines[:3], *lines[-3:]]), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GROUNDUP_CACHE", str(cache_folder))
        patch.setattr(before_after, "GENERAL", few)
        yield


@pytest.fixture(scope="session")
def language_model():
    """Trains a small language model on a text: (folder, text, overrides) -> the run."""
    import groundup as gu

    def train(folder, text, **overrides):
        (folder / "text.txt").write_text(text, encoding="utf-8")
        recipe = {
            "name": "base", "task": {"name": "language-modeling", "context": 64},
            "data": {"source": str(folder / "text.txt"), "split": {"by": "contiguous"}}, "model": {"name": "decoder", "layers": 2, "width": 32, "heads": 2},
            "train": {"steps": 5, "batch_size": 4},
        }  # fmt: skip
        return gu.train(recipe, overrides, out=folder / "run")

    return train


@pytest.fixture(autouse=True)
def isolated(tmp_path, monkeypatch, cache_folder):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GROUNDUP_CACHE", str(cache_folder))
    monkeypatch.setenv("GROUNDUP_LANG", "en")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.delenv("GROUNDUP_DATA", raising=False)
    messages.set_language(None)
    console.configure()
    threads, python_rng, numpy_rng, torch_rng = torch.get_num_threads(), random.getstate(), np.random.get_state(), torch.get_rng_state()
    torch.set_num_threads(1)
    yield
    messages.set_language(None)
    console.configure()
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(False)
    torch.set_default_dtype(torch.float32)
    torch.set_rng_state(torch_rng)
    random.setstate(python_rng)
    np.random.set_state(numpy_rng)


@pytest.fixture(scope="session")
def shared_data():
    """The real data sets that developers keep beside the repository; not part of the product."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("needs the developers' data folder beside the repository")
    return folder
