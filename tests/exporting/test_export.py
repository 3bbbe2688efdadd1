"""What is exported computes the same, at any batch size, from pixels or numbers as a program has them; else no file and exit status 3."""

import json

import numpy as np
import pytest
import torch
from torch import nn

from groundup import modelfolder, pipeline
from groundup.core.errors import GateError, GroundupError, UserError
from groundup.exporting import export as module

SHORT = {"train.steps": 6, "watch.report": False, "watch.tensorboard": False}


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    place = tmp_path_factory.mktemp("exported")
    colour = {"data.image.channels": 3, "data.image.size": 32, "data.source": "digits#120"}
    for name, settings in {
        "simple_cnn": {},
        "resnet": {"model": "resnet", **colour},
        "vit": {"model": {"name": "vit", "width": 32, "depth": 2}, "evaluate.views.flip": True, **colour},
        "convnext": {"model": "convnext", **colour},
    }.items():
        pipeline.train("digits-cnn", SHORT | {"name": name} | settings, out=place / name)
    pipeline.train("linear-classifier", SHORT, out=place / "linear-classifier")
    pipeline.train("line-regression", SHORT, out=place / "line-regression")
    return place


@pytest.mark.parametrize("name", ["simple_cnn", "resnet", "vit", "convnext", "linear-classifier", "line-regression"])
@pytest.mark.parametrize("to", ["onnx", "torch-export"])
def test_the_file_answers_like_the_model(models, tmp_path, name, to):
    if to == "onnx":
        onnxruntime = pytest.importorskip("onnxruntime", reason="needs the onnx extra")
        pytest.importorskip("onnxscript", reason="needs the onnx extra")
    result = pipeline.export(models / name, to, tmp_path / "导出 file")
    assert result["file"].endswith(module.SUFFIX[to]) and result["largest_difference"] <= 1e-4
    loaded = modelfolder.load(models / name)
    rng = np.random.default_rng(0)
    raw = (
        rng.integers(0, 256, (3, *loaded.task.input_shape), dtype=np.uint8)
        if loaded.task.kind == "image"
        else rng.random((3, *loaded.task.input_shape))
    )
    inputs = raw if loaded.task.kind == "image" else raw.astype(np.float32)
    if to == "onnx":
        session = onnxruntime.InferenceSession(result["file"], providers=["CPUExecutionProvider"])
        outputs = torch.from_numpy(session.run(None, {"inputs": inputs})[0])
    else:
        outputs = torch.export.load(result["file"]).module()(torch.from_numpy(inputs))
    if name == "line-regression":
        wanted = [loaded.predict(row.tolist())["value"] for row in raw]
        assert outputs[:, 0].tolist() == pytest.approx(wanted, abs=1e-3)
    else:
        for row, answer in zip(raw, loaded.task.answers(outputs)):
            expected = loaded.predict(row if loaded.task.kind == "image" else row.tolist())
            assert answer["label"] == expected["label"] and answer["probability"] == pytest.approx(expected["probability"], abs=1e-4)
    card = json.loads((tmp_path / f"导出 file{module.SUFFIX[to]}.json").read_text(encoding="utf-8"))
    assert card["labels"] == loaded.card.get("labels") and card["parity"]["batch_sizes"] == [1, 2, 5] and card["inputs"]["name"] == "inputs"


def test_a_difference_ends_it_without_a_file(models, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_torch_export", lambda whole, example, path: lambda x: whole(x) + 1e-2)
    with pytest.raises(GateError, match="differ from the model's") as caught:
        pipeline.export(models / "simple_cnn", "torch-export", tmp_path / "x.pt2")
    assert caught.value.exit_status == 3 and not list(tmp_path.glob("*"))


def test_a_baked_in_batch_size_is_found():
    assert module._difference(torch.zeros(1, 3), torch.zeros(2, 3)) == float("inf")


def test_mistakes(models, tmp_path):
    with pytest.raises(UserError, match="known are onnx"):
        pipeline.export(models / "simple_cnn", "gguf")
    (tmp_path / "x.pt2").write_text("mine")
    with pytest.raises(UserError, match="exists already"):
        pipeline.export(models / "simple_cnn", "torch-export", tmp_path / "x.pt2")
    assert (tmp_path / "x.pt2").read_text() == "mine"


def test_a_model_that_cannot_be_exported_says_why(models, tmp_path, monkeypatch):
    class Fickle(nn.Module):
        def forward(self, x):
            return x.flatten(1)[:, :10] * (2.0 if float(x.sum()) > 0 else 1.0)

    monkeypatch.setattr(modelfolder.Loaded, "answering", property(lambda self: Fickle()))
    monkeypatch.setattr(modelfolder, "replay", lambda loaded: 0.0)
    with pytest.raises(GroundupError, match=r"torch.export cannot take this model"):
        pipeline.export(models / "simple_cnn", "torch-export", tmp_path / "x.pt2")
