"""The command line as a person types it, on real data; and as a program reads it."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from groundup.cli import main

FAST = ["--set", "watch.report=false", "--set", "watch.tensorboard=false"]


@pytest.fixture
def groundup(capsys):
    """Runs a command in this process: (status, standard output, standard error)."""

    def call(*arguments):
        status = main([str(a) for a in arguments])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return call


@pytest.fixture
def as_json(groundup):
    def call(*arguments, status=0):
        got, out, err = groundup(*arguments, "--json")
        assert got == status, err
        assert out.count("\n") == 1, "exactly one JSON object on standard output"
        return json.loads(out)

    return call


@pytest.fixture(scope="module")
def base(tmp_path_factory, cache_folder):
    """A small trained model that the verbs below share."""
    folder = tmp_path_factory.mktemp("base") / "low digits"
    code = f"import sys; from groundup.cli import main; sys.exit(main(['train','digits-cnn','--out',{str(folder)!r},'--set','data.classes=[0,1,2,3,4]','--set','train.epochs=5']))"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    return folder


def test_train_reports_what_the_contract_says(as_json):
    result = as_json("train", "digits-cnn", "--set", "train.steps=10", "--out", "run", *FAST)
    assert {"run", "model", "steps", "resumed_from", "split", "metrics", "seconds"} <= result.keys()
    assert result["steps"] == 10 and result["resumed_from"] is None and result["split"] == "test"
    assert set(result["seconds"]) == {"total", "train", "evaluate"} and 0 <= result["metrics"]["accuracy"] <= 1
    for name in (
        "recipe.yaml",
        "decisions.json",
        "environment.json",
        "command.txt",
        "metrics.jsonl",
        "events.jsonl",
        "checkpoints",
        "model",
    ):
        assert (Path("run") / name).exists()
    for name in ("model.safetensors", "config.json", "groundup.json", "preprocessor.json", "reference.json", "README.md"):
        assert (Path("run/model") / name).is_file()


def test_every_verb_answers_in_json(as_json, base, tmp_path):
    picture = tmp_path / "图 片.png"
    Image.fromarray(np.full((8, 8), 255, dtype=np.uint8)).save(picture)
    assert as_json("models")["models"] and as_json("tasks")["tasks"] and as_json("recipes")["recipes"]
    assert as_json("models", "simple_cnn")["arguments"]["hidden"] == 128
    assert as_json("recipes", "digits-cnn")["recipe"]["name"] == "digits-cnn"
    assert as_json("recipes", "--schema")["properties"]["train"]
    assert as_json("data", "show", "iris")["records"] == 150
    assert as_json("data", "check", "digits")["problems"] == []
    assert as_json("env", "info")["python"]
    assert as_json("evaluate", base)["metrics"]["accuracy"] > 0.8
    assert as_json("predict", base, picture)["predictions"][0]["label"] in "01234"
    assert as_json("runs", "list", "--root", base.parent)["runs"][0]["state"] == "finished"
    assert as_json("runs", "show", base)["checkpoints"]
    assert as_json("runs", "verify", base)["ok"]
    assert as_json("runs", "compare", base, base)["recipe"] == {}


def test_errors_are_json_too_and_have_a_fix(as_json):
    for arguments in (["train", "digits-cn"], ["train", "digits-cnn", "--set", "train.learning_rate=1"], ["evaluate", "nowhere"], ["data", "show", "nowhere"], ["nonsense"],
                      ["train", "digits-cnn", "--nonsense"], ["train", "digits-cnn", "--set", "nonsense"], ["models", "simple_cn"], ["runs", "show", "x"], ["tune", "x"]):  # fmt: skip
        error = as_json(*arguments, status=2)["error"]
        assert error["type"].endswith("Error") and error["message"] and "Traceback" not in error["message"], arguments


@pytest.mark.parametrize("method", ["full", "freeze", "head"])
def test_tune_to_new_labels_shows_before_and_after(as_json, base, method, tmp_path):
    before = (base / "model" / "model.safetensors").read_bytes()
    result = as_json(
        "tune",
        base,
        "--data",
        "digits",
        "--method",
        method,
        "--set",
        "data.classes=[5,6,7,8,9]",
        "--set",
        "train.epochs=4",
        "--out",
        tmp_path / "tuned",
        *FAST,
    )
    new, old = result["before_after"]["rows"]
    assert new["before"] is None and new["after"] == result["metrics"]["accuracy"] > 0.5
    assert old["before"] > 0.8 and (old["after"] == old["before"] if method == "head" else old["after"] <= old["before"] + 0.05)
    assert (base / "model" / "model.safetensors").read_bytes() == before, "the model tuned from is never changed"
    card = json.loads((tmp_path / "tuned" / "model" / "groundup.json").read_text())
    assert card["labels"] == ["5", "6", "7", "8", "9"] and card["parent"]["sha256"]


def test_tune_on_the_same_labels_keeps_the_head(as_json, base, tmp_path):
    result = as_json(
        "tune", base, "--data", "digits", "--set", "data.classes=[0,1,2,3,4]", "--set", "train.epochs=1", "--out", tmp_path / "same", *FAST
    )
    new, old = result["before_after"]["rows"]
    assert new["before"] > 0.8 and old["after"] > 0.8


def test_tuning_resumes(as_json, base, tmp_path):
    arguments = [
        "tune",
        base,
        "--data",
        "digits",
        "--method",
        "head",
        "--set",
        "data.classes=[5,6,7,8,9]",
        "--out",
        tmp_path / "tuned",
        *FAST,
    ]
    as_json(*arguments, "--set", "train.steps=4")
    longer = as_json(*arguments, "--set", "train.steps=8", "--resume", "--extend")
    assert (longer["resumed_from"], longer["steps"]) == (4, 8)


def test_evaluate_on_other_data_and_with_a_report(as_json, groundup, base, tmp_path):
    folder = tmp_path / "photos of digits 照片"
    for label in ("0", "1"):
        (folder / label).mkdir(parents=True)
        for i in range(3):
            Image.fromarray(np.random.default_rng(i).integers(0, 255, (20, 16, 3), dtype=np.uint8)).save(folder / label / f"{i}.jpg")
    result = as_json("evaluate", base, "--data", folder, "--out", tmp_path / "report")
    assert result["records"] == 6 and result["split"] == "all" and not result["same_data_as_training"]
    assert Path(result["report"]).read_text(encoding="utf-8").startswith("<!")
    (folder / "seven").mkdir()
    Image.new("L", (8, 8)).save(folder / "seven" / "x.png")
    status, _, err = groundup("evaluate", base, "--data", folder)
    assert status == 2 and "'seven', which the model does not know" in err
    assert as_json("evaluate", base, "--split", "train")["records"] > result["records"]
    status, _, err = groundup("evaluate", base, "--split", "trian")
    assert status == 2 and "'train'" in err


def test_predict_takes_pictures_folders_and_rows(groundup, as_json, base, tmp_path):
    (tmp_path / "in").mkdir()
    for name in ("a.png", "b.jpg"):
        Image.new("RGB", (30, 40), "white").save(tmp_path / "in" / name)
    assert len(as_json("predict", base, tmp_path / "in", tmp_path / "in" / "a.png")["predictions"]) == 3
    (tmp_path / "bad.png").write_bytes(b"not a picture")
    status, _, err = groundup("predict", base, tmp_path / "bad.png")
    assert status == 2 and "not a picture that can be read" in err
    as_json("train", "line-regression", "--out", "line", *FAST)
    (tmp_path / "rows.csv").write_text("x\n1\n-2\n")
    answers = as_json("predict", "line", "1.5", tmp_path / "rows.csv")["predictions"]
    assert [a["value"] for a in answers] == pytest.approx([3, 2, -4], abs=0.15)
    status, _, err = groundup("predict", "line", "1,2")
    assert status == 2 and "the model takes 1: x" in err
    (tmp_path / "rows.csv").write_text("x\n1\n?\n")  # what can be read among several is answered
    status, out, _ = groundup("predict", "line", tmp_path / "rows.csv")
    assert status == 2 and "line 2: " in out and "line 3: no value for 'x'" in out


def test_user_code_joins_by_file_and_is_trusted_on_purpose(groundup, as_json, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "net.py").write_text(
        "from torch import nn\nclass Net(nn.Module):\n    def __init__(self, input_shape, num_outputs, width=8):\n        super().__init__()\n"
        "        self.a, self.b = nn.Linear(input_shape[0], width), nn.Linear(width, num_outputs)\n    def forward(self, x): return self.b(self.a(x).relu())\n"
    )
    (tmp_path / "mine" / "points.py").write_text(
        "import numpy as np\ndef points():\n    x = np.random.default_rng(0).normal(size=(90, 2)); return x, (x[:, 0] > 0).astype(int)\n"
    )
    result = as_json("train", "linear-classifier", "--set", "model=mine/net.py:Net", "--set", "model.width=16", "--set", "data.source=mine/points.py:points",
                     "--set", "task.loss=auto", "--out", "run", *FAST)  # fmt: skip
    assert result["metrics"]["accuracy"] > 0.7 and (Path("run/model/code/net.py")).is_file()
    status, _, err = groundup("predict", "run", "1,1")
    assert status == 2 and "--trust-code" in err
    assert as_json("predict", "run", "2,0", "--trust-code")["predictions"][0]["label"] == "1"
    status, _, err = groundup("train", "linear-classifier", "--set", "model=mine/net.py:Nett", "--out", "other")
    assert status == 2 and "'Net'" in err
    status, _, err = groundup("train", "linear-classifier", "--set", "model={name: mine/net.py:Net, widht: 3}", "--out", "other")
    assert status == 2 and "'width'" in err and not Path("other").exists()


def test_a_failed_start_leaves_the_folder_free_for_the_corrected_command(groundup, as_json):
    status, _, _ = groundup("train", "digits-cnn", "--set", "data.classes=[0, 99]", "--out", "run", *FAST)
    assert status == 2 and not Path("run").exists()
    as_json("train", "digits-cnn", "--set", "train.steps=2", "--out", "run", *FAST)


def test_a_damaged_model_folder_is_refused(groundup, as_json):
    as_json("train", "line-regression", "--set", "train.steps=2", "--out", "run", *FAST)
    file = Path("run/model/model.safetensors")
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(bytes(data))
    status, _, err = groundup("predict", "run", "1")
    assert status == 2 and "model.safetensors has changed" in err
    assert as_json("runs", "verify", "run", status=3)["ok"] is False
    status, _, err = groundup("evaluate", "run/checkpoints")
    assert status == 2 and "neither a model folder nor a run folder" in err


def test_chinese_is_chinese(groundup, base):
    for arguments in (
        ["models"],
        ["tasks"],
        ["recipes"],
        ["data", "show", "digits"],
        ["data", "check", "digits"],
        ["evaluate", base],
        ["runs", "show", base],
        ["runs", "verify", base],
    ):
        status, out, _ = groundup(*arguments, "--lang", "zh")
        assert status == 0 and (any("\u4e00" <= c <= "\u9fff" for c in out) or arguments[1:2] == ["verify"]), arguments
    assert groundup("--lang", "zh", "models") == groundup("models", "--lang", "zh")
    assert groundup("--lang=zh", "--json", "models")[1] == groundup("models", "--json", "--lang", "zh")[1]
    for alone in (["--lang", "zh"], ["--lang", "zh", "--help"]):
        status, out, _ = groundup(*alone)
        assert status == 0 and "Usage" in out
    status, _, err = groundup("train", "没有", "--lang", "zh")
    assert status == 2 and "没有名为" in err and "解决办法：groundup recipes" in err
    status, _, err = groundup("models", "--lang", "fr")
    assert status == 2 and "en and zh" in err


def test_a_dry_run_shows_the_resolved_recipe(as_json, groundup, tmp_path):
    facts = as_json("train", "digits-cnn", "--dry-run", "--set", "train.epochs=1")
    assert facts["recipe"]["train"]["epochs"] == 1 and facts["decisions"]["device"]["reason"] and not (tmp_path / "runs").exists()
    status, out, _ = groundup("train", "digits-cnn", "--dry-run")
    assert status == 0 and "38,602 parameters" in out


def test_the_python_interface_is_the_same(base):
    import groundup as gu

    run = gu.train("digits-cnn", {"train.epochs": 1, "watch.report": False})
    assert run.evaluate()["metrics"] == pytest.approx(run.metrics)
    tuned = gu.tune(run, data="digits", method="head", overrides={"train.epochs": 1, "watch.report": False})
    assert tuned.result["before_after"] and gu.predict(tuned, np.zeros((8, 8), dtype=np.uint8))[0]["label"]
    with pytest.raises(gu.GroundupError, match="no recipe 'nope'"):
        gu.train("nope")


@pytest.mark.parametrize(("recipe", "floor"), [("digits-cnn", 0.93), ("digits-transfer", 0.4), ("linear-classifier", 0.85)])
def test_shipped_classifiers_learn(recipe, floor, as_json):
    assert as_json("train", recipe, *FAST)["metrics"]["accuracy"] > floor


def test_the_line_is_learned(as_json):
    assert as_json("train", "line-regression", *FAST)["metrics"]["mse"] < 0.01


def test_the_demo_runs_shows_its_commands_and_tuning_beats_scratch(as_json, groundup, monkeypatch):
    monkeypatch.setattr("groundup.demo.BUDGET", "20s")
    facts = as_json("demo", "--out", "my demo 演示")
    assert facts["comparison"]["tuned"] > facts["comparison"]["scratch"]
    report = Path(facts["report"]).read_text(encoding="utf-8")
    assert report.startswith("<!") and facts["prediction"]["true"] in "56789"
    for folder in Path("my demo 演示").glob("demo-*/command.txt"):
        assert folder.read_text()


@pytest.mark.parametrize(
    ("recipe", "floor"), [("mnist-cnn", 0.9), ("mnist-fcnn", 0.85), pytest.param("mnist-bigmodel", 0.85, marks=pytest.mark.slow)]
)
def test_mnist_recipes_learn(recipe, floor, as_json, shared_data, monkeypatch):
    monkeypatch.setenv("GROUNDUP_DATA", str(shared_data))
    assert as_json("train", recipe, "--set", "train.steps=60", "--set", "evaluate.every=60", *FAST)["metrics"]["accuracy"] > floor


def test_help_is_quick_and_teaches(groundup):
    status, out, _ = groundup("--help")
    assert status == 0 and "demo" in out and "train" in out
    status, out, _ = groundup("train", "--help")
    assert status == 0 and "--resume" in out and "optim.lr=3e-4" in out
