"""Photographs that are streamed by workers: killed workers, killed runs, vanished files, full caches; the weights stay those of a quiet run."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import groundup as gu
from groundup.core import files
from groundup.core.errors import DataError
from groundup.models.weights import read_state

pytestmark = pytest.mark.skipif(os.name == "nt", reason="kill -9 is POSIX")
SETTINGS = {
    "data.in_memory": False,
    "data.cached": False,
    "data.workers": 2,
    "data.image.size": 16,
    "data.augment": {"flip": 0.5, "resized_crop": 0.5, "color": 0.3, "mixup": 0.2},
    "model": {"name": "conv_net", "widths": [8, 8], "layers": [1, 1]},
    "train.steps": 40,
    "train.batch_size": 12,
    "train.save_every": 5,
    "train.keep": "last",
    "train.deterministic": True,
    "evaluate.every": 20,
    "watch.tensorboard": False,
    "watch.report": False,
}


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    place, rng = tmp_path_factory.mktemp("photos") / "照片", np.random.default_rng(0)
    for label in ("山", "sea"):
        (place / label).mkdir(parents=True)
        for i in range(40):
            pixels = rng.integers(0, 255, (40 + i, 60, 3), dtype=np.uint8) // 2 + 60 * (label == "sea")
            Image.fromarray(pixels.astype(np.uint8)).save(place / label / f"{i}.jpg", quality=85)
    return place


@pytest.fixture(scope="module")
def quiet(photos, tmp_path_factory, cache_folder):
    """The weights of a run that nothing happens to."""
    out = tmp_path_factory.mktemp("quiet") / "run"
    done = subprocess.run(
        command(photos, out),
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"OMP_NUM_THREADS": "1", "GROUNDUP_CACHE": str(cache_folder)},
    )
    assert done.returncode == 0, done.stderr
    return weights(out)


def command(photos, out, *more):
    sets = [p for k, v in (SETTINGS | {"data.source": str(photos)}).items() for p in ("--set", f"{k}={json.dumps(v, ensure_ascii=False)}")]
    return [sys.executable, "-m", "groundup", "train", "digits-cnn", *sets, "--out", str(out), "--json", *more]


def weights(out):
    return files.sha256(Path(out) / "model" / "model.safetensors")


def children(pid):
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = stat.read_text().rpartition(")")[2].split()[:2]
            if int(parent) == pid and state != "Z":  # not one that has ended and only waits to be asked for
                found.append(int(stat.parent.name))
        except (OSError, ValueError):
            continue
    return found


def test_the_same_weights_whatever_holds_the_pictures(photos):
    """In memory, as raw pixels, decoded by two workers or by none."""
    ways = {
        "memory": {"data.in_memory": True},
        "cached": {"data.cached": True},
        "workers": {},
        "alone": {"data.workers": 0},
    }
    made = {}
    for name, way in ways.items():
        made[name] = gu.train("digits-cnn", SETTINGS | {"data.source": str(photos), "train.steps": 8, "evaluate.every": 8} | way, out=name)
    states = {name: read_state(run.path / "model" / "model.safetensors") for name, run in made.items()}
    for name, state in states.items():
        assert all(np.array_equal(v, states["memory"][n]) for n, v in state.items()), name


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds the workers through /proc")
def test_a_killed_worker_changes_nothing(photos, quiet):
    killed = 0
    with subprocess.Popen(command(photos, "hurt"), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        while process.poll() is None:
            if killed < 3 and Path("hurt/checkpoints").is_dir():
                for pid in children(process.pid)[:1]:
                    with contextlib.suppress(ProcessLookupError):  # it may have ended by itself since it was found
                        os.kill(pid, signal.SIGKILL)
                        killed += 1
                    time.sleep(0.2)
            time.sleep(0.01)
        error = process.stderr.read()
    assert process.returncode == 0, error
    assert killed and weights("hurt") == quiet
    events = [json.loads(line) for line in Path("hurt/events.jsonl").read_text(encoding="utf-8").splitlines()]
    assert any(e["event"] == "worker_restart" for e in events)


@pytest.mark.slow  # the same is tested on text in test_language.py
def test_killed_runs_end_with_the_same_weights(photos, quiet):
    for step in (5, 20):
        process = subprocess.Popen(command(photos, "cut", "--resume"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        while process.poll() is None and not any(int(p.name[5:]) >= step for p in Path("cut").glob("checkpoints/step-*")):
            time.sleep(0.02)
        process.kill()
        process.communicate()
    done = subprocess.run(command(photos, "cut", "--resume"), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert weights("cut") == quiet


def test_a_picture_that_vanishes_stops_the_run_with_its_name(photos, tmp_path):
    photos = Path(shutil.copytree(photos, tmp_path / "copy"))
    run = gu.train("digits-cnn", SETTINGS | {"data.source": str(photos), "train.steps": 6, "evaluate.every": 6}, out="run")
    assert run.metrics
    (photos / "sea" / "7.jpg").write_bytes(b"overwritten")
    with pytest.raises(Exception, match=r"data has changed|7\.jpg"):
        gu.train(None, {"train.steps": 12}, out="run", resume=True, extend=True)
    bad = gu.train("digits-cnn", SETTINGS | {"data.source": str(photos), "train.steps": 2}, out="without")  # read anew it is simply skipped
    assert "7.jpg" in (bad.path / "rejected.jsonl").read_text(encoding="utf-8")
    with pytest.raises(DataError, match=r"7\.jpg"):
        gu.train("digits-cnn", SETTINGS | {"data.source": str(photos), "data.on_bad_record": "stop"}, out="strict")
