"""Weights from elsewhere: real CIFAR ResNets where they are at hand, files of every kind, and what is wrong with them."""

import io
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import groundup as gu
from groundup.core.errors import ModelError
from groundup.models.base import build_model, build_to_read
from groundup.models.weights import load_into, read_state

DATA = Path(__file__).parents[3] / "shared" / "data"
SHAPE = (3, 32, 32)


@pytest.fixture
def net():
    torch.manual_seed(1)
    return build_model("resnet", {}, SHAPE, 10)


@pytest.mark.parametrize("wrapped", ["plain", "state_dict", "module", "linear", "safetensors"])
def test_files_of_every_kind(net, tmp_path, wrapped):
    state = {n: t.clone() for n, t in net.state_dict().items()}
    path = tmp_path / "权重 1.pth"
    if wrapped == "safetensors":
        path = path.with_suffix(".safetensors")
        save_file(state, path)
    elif wrapped == "linear":
        torch.save({n.replace("fc.", "linear."): t for n, t in state.items()}, path)
    elif wrapped == "module":
        torch.save({"state_dict": {"module." + n: t for n, t in state.items()}, "best_prec1": 91.7}, path)
    else:
        torch.save({"state_dict": state} if wrapped == "state_dict" else state, path)
    torch.manual_seed(2)
    other = build_model("resnet", {}, SHAPE, 10)
    assert load_into(other, path) == []
    assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), other.state_dict().values()))
    with_new_head = build_model("resnet", {}, SHAPE, 3)
    assert load_into(with_new_head, path) == ["fc.weight", "fc.bias"]
    assert torch.equal(with_new_head.conv1.weight, net.conv1.weight)


def test_what_does_not_fit_is_named(net, tmp_path):
    torch.save(net.state_dict(), tmp_path / "a.pth")
    with pytest.raises(ModelError, match="left over") as caught:
        load_into(build_model("resnet", {"depth": 18}, SHAPE, 10), tmp_path / "a.pth")
    assert caught.value.fix
    with pytest.raises(ModelError, match="no weights file"):
        read_state(tmp_path / "none.pth")
    (tmp_path / "b.pth").write_bytes(b"not a file of weights")
    with pytest.raises(ModelError, match=r"cannot be read|more than tensors"):
        read_state(tmp_path / "b.pth")


def test_a_file_that_would_run_code_is_refused(tmp_path):
    torch.save({"model": Path("x")}, tmp_path / "a.pth")
    with pytest.raises(ModelError, match="run code"):
        read_state(tmp_path / "a.pth")


def test_a_training_starts_from_weights(tmp_path):
    first = gu.train("digits-cnn", {"model": "resnet", "train.steps": 2, "watch.report": False}, out=tmp_path / "first")
    weights = first.model / "model.safetensors"
    settings = {"model": "resnet", "train.steps": 1, "optim.lr": 1e-9, "init": str(weights), "watch.report": False, "train.keep": "last"}
    second = gu.train("digits-cnn", settings, out=tmp_path / "second")
    a, b = (read_state(run.model / "model.safetensors") for run in (first, second))
    assert all(torch.allclose(a[n], b[n], atol=1e-5) for n in a if n.endswith("weight"))


@pytest.mark.parametrize(
    ("depth", "file", "expected"),
    [
        (20, "resnet20-12fca82f.th", 0.814),
        (20, "resnet20.safetensors", 0.814),
        pytest.param(56, "resnet56-4bfd9763.th", 0.832, marks=pytest.mark.slow),
    ],
)
def test_real_cifar_resnets_reach_their_accuracy(depth, file, expected):
    if not DATA.is_dir():
        pytest.skip("the real checkpoints are not here")
    classes = (DATA / "cifar10_subset" / "classes.txt").read_text().split()
    pictures, labels = [], []
    with zipfile.ZipFile(DATA / "cifar10_subset" / "test_jpg_2000.zip") as archive:
        for name in archive.namelist():
            if name.endswith(".jpg"):
                pictures.append(np.asarray(Image.open(io.BytesIO(archive.read(name))).convert("RGB")))
                labels.append(classes.index(name.split("/")[-2]))
    x = torch.tensor(np.stack(pictures)).permute(0, 3, 1, 2).float() / 255
    x = (x - torch.tensor([0.485, 0.456, 0.406]).view(-1, 1, 1)) / torch.tensor([0.229, 0.224, 0.225]).view(-1, 1, 1)
    model = build_model("resnet", {"depth": depth}, SHAPE, 10).eval()
    assert load_into(model, DATA / "pretrained" / "resnet_cifar10" / file) == []
    with torch.no_grad():
        hits = sum(int((model(x[i : i + 250]).argmax(1) == torch.tensor(labels[i : i + 250])).sum()) for i in range(0, len(x), 250))
    assert hits / len(labels) == pytest.approx(expected, abs=0.002)


@pytest.mark.slow
@pytest.mark.parametrize(("depth", "file", "epochs"), [(20, "resnet20-12fca82f.th", 6), (56, "resnet56-4bfd9763.th", 3)])
def test_tuning_the_cifar_resnets_closes_the_gap_that_jpeg_opened(tmp_path, depth, file, epochs):
    if not DATA.is_dir():
        pytest.skip("the real checkpoints are not here")
    folder = DATA / "cifar10_subset"
    names = (folder / "classes.txt").read_text().split()
    labels = [names[int(i)] for i in (folder / "labels_train4000.txt").read_text().split()]
    for part in range(4):
        rows = np.asarray(Image.open(folder / f"cifar10_batch_{part}.png").convert("RGB")).reshape(1000, 32, 32, 3)
        for i, pixels in enumerate(rows):
            at = tmp_path / "data" / "train" / labels[1000 * part + i] / f"{1000 * part + i}.png"
            at.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(at)
    with zipfile.ZipFile(folder / "test_jpg_2000.zip") as archive:
        archive.extractall(tmp_path / "data")
    run = gu.train(
        {
            "name": f"cifar-{depth}",
            "task": "image-classification",
            "data": {
                "source": str(tmp_path / "data"),
                "image": {"mean": "imagenet", "std": "imagenet"},
                "augment": {"jpeg": 50, "flip": 0.5, "crop": 2},
            },
            "model": {"name": "resnet", "depth": depth},
            "init": str(DATA / "pretrained" / "resnet_cifar10" / file),
            "schedule": {"warmup": 0.1},
            "train": {"epochs": epochs, "batch_size": 64},
        },
        out=tmp_path / "run",
    )
    row = run.result["before_after"]["rows"][0]
    assert row["before"] == pytest.approx({20: 0.814, 56: 0.832}[depth], abs=0.002)
    assert row["after"] >= row["before"] + 0.03


@pytest.mark.parametrize(("depth", "parameters"), [(18, 11_689_512), (34, 21_797_672), (50, 25_557_032)])
def test_the_imagenet_form_has_the_published_size_and_names(depth, parameters):
    model = build_model("resnet", {"depth": depth}, (3, 64, 64), 1000)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert {"conv1.weight", "layer2.0.downsample.0.weight", "layer4.1.bn2.running_var", "fc.bias"} <= set(model.state_dict())
    assert model(torch.rand(1, 3, 64, 64)).shape == (1, 1000)


@pytest.mark.parametrize("name", ["decoder", "gpt2", "lstm"])
def test_what_is_read_next_is_not_drawn_first(name):
    built, before = build_model(name, {}, (32,), 300), torch.get_rng_state()
    model = build_to_read(name, {}, (32,), 300)
    assert torch.equal(torch.get_rng_state(), before)
    model.load_state_dict(built.state_dict())
    constants = dict(built.named_buffers())
    assert all(torch.equal(value, constants[n]) for n, value in model.named_buffers())
    drawn = build_model(name, {}, (32,), 300)
    assert not all(torch.equal(a, b) for a, b in zip(drawn.parameters(), built.parameters()))
