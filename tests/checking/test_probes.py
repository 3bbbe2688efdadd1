"""Every finding on a program that has the mistake, none on the same program without it, and on others that only look odd."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from checking_cases import CASES, PRELUDE, programs
from checking_legitimate import RIGHT
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import groundup
from groundup.checking import trial
from groundup.checking.catalogue import CATALOGUE
from groundup.checking.examine import examine
from groundup.checking.explain import explain
from groundup.checking.findings import Report
from groundup.checking.script import check_script
from groundup.checking.subject import from_script
from groundup.core.errors import UserError
from groundup.core.recipe import shipped

SHARED = Path(__file__).parents[3] / "shared"


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "STEPS", 48)


def found(text: str, folder: Path, name: str = "train.py") -> Report:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return examine(from_script(path, {}))


@pytest.mark.parametrize(("finding", "number"), [(f, i) for f, cases in CASES.items() for i in range(len(cases))])
def test_a_mistake_is_found_and_its_absence_as_well(finding: str, number: int, tmp_path: Path) -> None:
    wrong, right = programs(finding, number)
    report = found(wrong, tmp_path)
    hits = [f for f in report.findings if f.finding_id == finding]
    assert hits, [f.finding_id for f in report.findings]
    assert hits[0].severity == CATALOGUE[finding]["severity"]
    assert hits[0].location
    assert "{" not in "".join((*hits[0].message, *hits[0].fix))
    assert not report.failed, report.failed
    clean = found(right, tmp_path, "right.py")
    assert [f.finding_id for f in clean.findings if f.severity != "info"] == []
    assert not clean.failed, clean.failed


@pytest.mark.parametrize("name", list(RIGHT))
def test_what_only_looks_odd_gives_no_finding(name: str, tmp_path: Path) -> None:
    report = found(PRELUDE + RIGHT[name], tmp_path)
    assert [(f.finding_id, f.location) for f in report.findings] == []
    assert not report.failed, report.failed


def test_every_finding_has_a_case_texts_in_both_languages_and_an_explanation() -> None:
    assert set(CASES) == set(CATALOGUE) - {"step.fails", "script.fails"}
    for name, entry in CATALOGUE.items():
        assert entry["severity"] in ("error", "warning", "info")
        for key in ("says", "why", "fix"):
            english, chinese = entry[key]
            assert english.isascii(), (name, key)
            assert not chinese.isascii() or key == "fix", (name, key)
        shown = explain(name)
        assert "{" not in shown["says"]
        assert name.endswith(".fails") or (shown["wrong"] and shown["right"] and shown["source"])


def test_a_cause_of_the_doctor_is_explained_and_an_unknown_name_gets_a_hint() -> None:
    assert explain("gpu_arch_dropped_by_wheel")["why"]
    with pytest.raises(UserError, match=r"loss\.softmax_before_ce"):
        explain("loss.softmax_befor_ce")


def test_nothing_is_left_behind() -> None:
    torch.manual_seed(3)
    x, y = torch.randn(64, 5), torch.randint(0, 2, (64,))
    model = nn.Sequential(nn.Linear(5, 8, bias=False), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    loader = DataLoader(TensorDataset(x, y), batch_size=16, shuffle=True)
    loss = nn.functional.cross_entropy(model(x), y)
    loss.backward()
    optimizer.step()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    state = json.dumps(optimizer.state_dict(), default=lambda t: t.tolist())
    rng, modes = torch.get_rng_state(), [m.training for m in model.modules()]
    report = groundup.check(model, nn.CrossEntropyLoss(), optimizer, loader)
    assert isinstance(report, Report)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert all(p.grad is not None and torch.equal(p.grad, grads[n]) for n, p in model.named_parameters())
    assert json.dumps(optimizer.state_dict(), default=lambda t: t.tolist()) == state
    assert torch.equal(torch.get_rng_state(), rng)
    assert [m.training for m in model.modules()] == modes
    assert torch.Tensor.backward.__module__ == "torch._tensor"
    assert not model._forward_pre_hooks


def test_a_lightning_like_module_brings_its_own_step() -> None:
    class Module(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 3), nn.Softmax(1))

        def training_step(self, batch: Any, index: int) -> Any:
            x, y = batch
            return {"loss": nn.functional.cross_entropy(self.net(x), y)}

        def configure_optimizers(self) -> Any:
            return [torch.optim.Adam(self.parameters(), lr=1e-3)], []

    data = TensorDataset(torch.randn(64, 4), torch.randint(0, 3, (64,)))
    report = groundup.check(Module(), train_loader=DataLoader(data, batch_size=16, shuffle=True))
    assert "loss.softmax_before_ce" in [f.finding_id for f in report.findings]


def test_a_model_of_transformers_is_checked_with_its_own_loss() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(vocab_size=40, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    model = transformers.AutoModelForCausalLM.from_config(config)
    ids = torch.randint(3, 40, (32, 10))
    batches = [{"input_ids": i, "attention_mask": torch.ones_like(i), "labels": torch.roll(i, -1, 1)} for i in ids.split(8)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    assert [f.finding_id for f in groundup.check(model, optimizer=optimizer, train_loader=batches).errors] == ["lm.labels_double_shift"]
    for b in batches:
        b["labels"] = b["input_ids"]
    assert not groundup.check(model, optimizer=optimizer, train_loader=batches).errors


# -- scripts ---------------------------------------------------------------------------------------------------------------------
GOOD = PRELUDE + CASES["loss.softmax_before_ce"][0][0]


def run(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "groundup", *arguments], capture_output=True, text=True, encoding="utf-8", cwd=folder, timeout=120
    )


def test_the_command_reports_in_json_and_exits_with_3(tmp_path: Path) -> None:
    folder = tmp_path / "我的 项目"
    folder.mkdir()
    (folder / "训练.py").write_bytes(b"\xef\xbb\xbf" + ("print('hello')\n" + programs("loss.nll_on_logits", 0)[0]).encode())
    done = run("check", "训练.py", "--json", "--lang", "en", folder=folder)
    assert done.returncode == 3, done.stderr
    report = json.loads(done.stdout)
    [finding] = [f for f in report["findings"] if f["severity"] == "error"]
    assert finding["finding_id"] == "loss.nll_on_logits"
    assert set(finding) == {"finding_id", "severity", "location", "message", "fix", "evidence"}
    chinese = run("check", "训练.py", "--lang", "zh", folder=folder)
    assert "原始 logits" in chinese.stdout
    renamed = GOOD.replace("model = Net()", "net = Net()").replace("model.parameters", "net.parameters").replace("loss_fn =", "criterion =")
    (folder / "other.py").write_text(renamed, encoding="utf-8")
    assert run("check", "--model", "other.py:net", folder=folder).returncode == 0


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("import time\ntime.sleep(60)\n", "was stopped after"),
        ("x = 1\n", "no 'model'"),
        ("raise SystemExit(4)\n", "ended by itself"),
        ("model = 3\n", "is a int"),
        ("", "no 'model'"),
        ("import os\nos._exit(7)\n", "exit status 7"),
    ],
)
def test_a_script_that_cannot_be_checked_says_why(text: str, says: str, tmp_path: Path) -> None:
    path = tmp_path / "a b.py"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError) as caught:
        check_script(path, limit=8.0 if "sleep" in text else 100.0)
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("text", "line", "fix"),
    [("def broken(:\n", 1, "must run by itself"), ("import torch\nmodel = nn.Linear(2, 2)\n", 2, "from torch import nn")],
)
def test_a_script_that_fails_by_itself_is_a_finding_with_its_line(text: str, line: int, fix: str, tmp_path: Path) -> None:
    path = tmp_path / "train.py"
    path.write_text(text, encoding="utf-8")
    [finding] = check_script(path).findings
    assert (finding.finding_id, finding.location) == ("script.fails", f"train.py:{line}")
    assert fix in finding.fix[0]


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no file"):
        check_script(tmp_path / "none.py")


@pytest.mark.parametrize(
    "change",
    [
        "train_loader = None",
        "train_loader = []",
        "optimizer = None",
        "loss_fn = lambda a, b: 'text'",
        "model.forward = lambda x: {'a': [x]}",
        "def train_step(*a): raise KeyError('mine')",
        "def fit(): return 1 / 0",
        "class Odd:\n    def __iter__(self): yield from [object()] * 3\ntrain_loader = Odd()",
        "evaluate = lambda model, loader: loader.nothing",
    ],
)
def test_strange_code_is_reported_and_never_a_crash(change: str, tmp_path: Path) -> None:
    report = found(f"{GOOD}\n{change}\n", tmp_path)
    assert isinstance(report.as_json(), dict)


# -- recipes ---------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["digits-mlp", "digits-cnn"])
def test_shipped_recipes_have_no_errors(name: str) -> None:
    if name not in shipped():
        pytest.skip(f"no recipe {name}")
    report = groundup.check(name)
    assert not report.errors, [f.as_json() for f in report.errors]
    assert not report.failed


# -- shared cases ----------------------------------------------------------------------------------------------------------------
@pytest.mark.slow
@pytest.mark.skipif(not (SHARED / "check_cases").is_dir(), reason="needs the shared cases")
def test_the_shared_cases_are_found_and_their_twins_are_not(tmp_path: Path) -> None:
    missed, alarms = [], []
    for folder in sorted(p for p in (SHARED / "check_cases").iterdir() if (p / "case.json").is_file()):
        case = json.loads((folder / "case.json").read_text(encoding="utf-8"))
        report = check_script(folder / "buggy.py")
        if not any(f.finding_id in (case["finding_id"], *case["also_ok"]) for f in report.findings):
            missed.append(folder.name)
        if any(f.severity != "info" for f in check_script(folder / "fixed.py").findings):
            alarms.append(folder.name)
    assert (missed, alarms) == ([], [])
