"""Environments that are broken for real, diagnosed by the doctor, mended by the commands that it prints, and found healthy again.

They install real packages through pip, so they are slow and need its package source: python -m pytest -m slow tests/env
"""

import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[2] / "src"
pytestmark = pytest.mark.slow


@pytest.fixture
def environment(tmp_path):
    """A venv that sees this environment's torch, and a function that runs a program of it."""
    folder = tmp_path / "an environment"
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    scripts = folder / ("Scripts" if os.name == "nt" else "bin")
    inside = subprocess.run(
        [str(scripts / "python"), "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])"], capture_output=True, text=True
    )
    Path(inside.stdout.strip(), "outer.pth").write_text(sysconfig.get_paths()["purelib"])
    settings = {**os.environ, "PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(SOURCE), "GROUNDUP_LANG": "en"}

    def run(command):
        return subprocess.run(command, shell=isinstance(command, str), capture_output=True, text=True, env=settings, cwd=tmp_path)

    return run


def pip_installed(run, *packages):
    done = run(["python", "-m", "pip", "install", "-q", *packages])
    if done.returncode != 0:
        pytest.skip(f"pip cannot install {packages} here: {done.stderr[-300:]}")


def diagnosis(run):
    done = run(["python", "-m", "groundup.env", "doctor", "--json"])
    assert done.returncode in (0, 3), done.stderr
    return json.loads(done.stdout)


def test_a_torchvision_of_another_build(environment):
    pip_installed(environment, "--no-deps", "torchvision==0.28.0")
    if environment(["python", "-c", "import torchvision"]).returncode == 0:
        pytest.skip("this torchvision fits this torch")
    found = diagnosis(environment)["findings"][0]
    assert found["cause_id"] == "torchvision_torch_mismatch" and "torchvision::nms does not exist" in str(found["evidence"])
    uninstall = environment(found["commands"][0])
    assert uninstall.returncode == 0, uninstall.stderr
    assert diagnosis(environment)["healthy"]


def test_a_module_made_for_numpy_1_beside_numpy_2(environment):
    pip_installed(environment, "--no-deps", "--only-binary=:all:", "pandas==2.0.3", "pytz")
    found = diagnosis(environment)["findings"][0]
    assert found["cause_id"] == "numpy2_abi_mismatch"
    downgrade = environment(found["commands"][0])
    assert downgrade.returncode == 0, downgrade.stderr
    assert environment(["python", "-c", "import numpy, pandas, torch; torch.zeros(1).numpy()"]).returncode == 0
    assert [f["cause_id"] for f in diagnosis(environment)["findings"] if f["severity"] == "blocking"] == []


def test_verify_of_the_same_environment(environment):
    done = environment(["python", "-m", "groundup.env", "verify", "--json"])
    assert done.returncode == 0 and json.loads(done.stdout)["ok"], done.stderr
