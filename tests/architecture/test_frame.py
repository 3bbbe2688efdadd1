"""What the house promises of itself: few frames, no torch for help, imports that go downwards, texts in both languages."""

import ast
import subprocess
import sys
import traceback
from pathlib import Path

import pytest
import torch

import groundup
from groundup import cli

SOURCE = Path(groundup.__file__).parent

# The level of each package (DESIGN: imports only go downwards); names of one level may use each other.
LEVELS = {
    "env": 0, "core": 0, "data": 1, "models": 1, "metrics": 1, "tasks": 2, "evaluation": 3, "training": 4, "tuning": 5, "recipes": 5,
    "modelfolder": 5, "automatic": 6, "budget": 6, "serving": 5, "exporting": 5, "jobs": 6, "before_after": 6, "checking": 6, "planning": 6, "pipeline": 6, "examples": 6, "inspecting": 7, "talking": 7, "demo": 7, "cli": 7, "__main__": 8,
}  # fmt: skip


def frames_at_backward(monkeypatch, arguments):
    seen = []
    original = torch.Tensor.backward

    def backward(self, *rest, **options):
        names = [f"{Path(f.filename).stem}.{f.name}" for f in traceback.extract_stack() if Path(f.filename).is_relative_to(SOURCE)]
        seen.append(names)
        return original(self, *rest, **options)

    monkeypatch.setattr(torch.Tensor, "backward", backward)
    assert cli.main(arguments) == 0
    return [
        names for names in seen if "loop.rehearse" not in names and "trace.step" not in names
    ]  # dry steps, on real tensors and on empty ones


@pytest.mark.parametrize("recipe", ["line-regression", "digits-cnn"])
def test_at_most_four_functions_between_the_command_and_backward(recipe, monkeypatch, tmp_path):
    found = frames_at_backward(
        monkeypatch, ["train", recipe, "--set", "train.steps=2", "--set", "watch.report=false", "--out", str(tmp_path / "run")]
    )
    assert found and all(names == ["cli.main", "pipeline.train", "loop.train", "loop.step"] for names in found)


@pytest.mark.parametrize(
    "arguments", [["--help"], ["train", "--help"], ["--version"], ["recipes", "--help"], ["recipes"], ["runs", "list"]]
)
def test_help_imports_neither_torch_nor_its_friends(arguments):
    heavy = ("torch", "transformers", "datasets", "sklearn", "matplotlib", "numpy", "pandas", "tensorboard", "PIL")
    code = (
        "import sys\nfrom groundup.cli import main\n"
        f"status = main({arguments!r})\n"
        f"found = [m for m in {heavy!r} if m in sys.modules]\nassert not found, found\nsys.exit(status)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_importing_groundup_is_standard_library_only():
    code = "import sys; before = set(sys.modules); import groundup; print([m for m in set(sys.modules) - before if m.split('.')[0] not in sys.stdlib_module_names])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "['groundup']"


def test_public_names_are_there():
    for name in groundup.__all__:
        assert getattr(groundup, name) is not None
    with pytest.raises(AttributeError, match="public names"):
        groundup.nonsense  # noqa: B018


def modules():
    return [p for p in SOURCE.rglob("*.py") if "__pycache__" not in p.parts]


@pytest.mark.parametrize("path", modules(), ids=lambda p: p.relative_to(SOURCE).as_posix())
def test_imports_go_downwards(path):
    part = path.relative_to(SOURCE).parts[0].removesuffix(".py")
    if part == "__init__":
        return
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("groundup"):
            names = [node.module] if node.module != "groundup" else [f"groundup.{a.name}" for a in node.names]
        elif isinstance(node, ast.Import):
            names = [a.name for a in node.names if a.name.startswith("groundup.")]
        for name in names:
            other = name.split(".")[1]
            assert LEVELS[other] <= LEVELS[part], f"{part} imports {other}"
            assert part != "env" or other == "env", "env stands alone"


@pytest.mark.parametrize("path", modules(), ids=lambda p: p.relative_to(SOURCE).as_posix())
def test_no_pickle_no_remote_code_no_shell(path):
    text = path.read_text(encoding="utf-8")
    for word in ("import pickle", "weights_only=False", "trust_remote_code=True", "shell=True", "allow_pickle=True"):
        assert word not in text


WRITING = {
    "--max-tokens",
    "--min-p",
    "--precision",
    "--repetition-penalty",
    "--seed",
    "--stop",
    "--temperature",
    "--top-k",
    "--top-p",
    "--trust-code",
}


def test_the_command_surface_is_pinned():
    """A verb or an option appears or goes only on purpose."""
    import typer

    group = typer.main.get_command(cli.app)
    surface = {}
    for name, command in group.commands.items():
        inner = getattr(command, "commands", None)
        for key, c in {f"{name} {k}": v for k, v in inner.items()}.items() if inner else {name: command}.items():
            surface[key] = sorted(o for p in c.params for o in p.opts if o.startswith("--"))
    common = {"--json", "--lang", "--traceback"}
    assert {k: sorted(set(v) - common) for k, v in surface.items()} == {
        "models": [], "tasks": [], "recipes": ["--schema"],
        "train": ["--budget", "--check", "--dry-run", "--extend", "--out", "--resume", "--set", "--trust-code"],
        "check": ["--data", "--method", "--model", "--name", "--set", "--timeout"],
        "explain": [],
        "plan": ["--data", "--device", "--gpus", "--method", "--nodes", "--price", "--set", "--sharding", "--trust-code"],
        "tune": ["--check", "--data", "--dry-run", "--extend", "--general", "--keep-classes", "--method", "--out", "--rehearse", "--resume", "--set", "--trust-code"],
        "evaluate": ["--against", "--data", "--harness", "--out", "--set", "--split", "--trust-code", "--views"],
        "generate": sorted(WRITING), "chat": sorted({*WRITING, "--system"}),
        "predict": ["--trust-code", "--views"], "demo": ["--out"],
        "export": ["--force", "--merge", "--out", "--to", "--trust-code"],
        "serve": ["--api-key", "--host", "--insecure", "--max-batch", "--port", "--trust-code", "--views"],
        "env": [], "data show": ["--grid", "--html", "--model", "--set"], "data check": ["--fix", "--model", "--set"],
        "runs list": ["--root"], "runs show": [], "runs compare": [], "runs verify": [],
    }  # fmt: skip
    assert all(common <= set(v) for k, v in surface.items() if k != "env")  # a program of its own, with verbs of its own
    from groundup.env.cli import VERBS

    assert list(VERBS) == ["info", "doctor", "plan", "install", "verify", "driver", "lock", "diff", "knowledge", "guide"]
