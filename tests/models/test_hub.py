"""Image classifiers of transformers: opened as they were saved, with their preprocessing, and tuned like our own."""

import importlib.util
import json
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from groundup import modelfolder, pipeline
from groundup.core.errors import ModelError
from groundup.models.hub import open_foreign, transformers_preprocessor

LABELS = {0: "猫", 1: "狗", 2: "bird"}


def architectures():
    import transformers as t

    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    return {
        "vit": (t.ViTConfig(image_size=32, patch_size=8, **small), {"size": {"height": 32, "width": 32}}, "ViTImageProcessorPil"),
        "dinov2": (
            t.Dinov2Config(image_size=28, patch_size=14, **small),
            {"size": {"shortest_edge": 32}, "crop_size": {"height": 28, "width": 28}},
            "BitImageProcessorPil",
        ),
        "resnet": (
            t.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic"),
            {"size": {"shortest_edge": 32}, "crop_pct": 0.875},
            "ConvNextImageProcessorPil",
        ),
        "convnext": (
            t.ConvNextConfig(hidden_sizes=[8, 16], depths=[1, 1], num_stages=2),
            {"size": {"shortest_edge": 32}, "crop_pct": 0.875},
            "ConvNextImageProcessorPil",
        ),
        "swin": (
            t.SwinConfig(image_size=32, patch_size=4, embed_dim=8, depths=[1, 1], num_heads=[1, 2], window_size=4),
            {"size": {"height": 32, "width": 32}},
            "ViTImageProcessorPil",
        ),
    }


def processor_of(name, arguments):
    module = {"ViT": "vit", "Bit": "bit", "ConvNext": "convnext"}[name.removesuffix("ImageProcessorPil")]
    return getattr(__import__(f"transformers.models.{module}.image_processing_pil_{module}", fromlist=[name]), name)(**arguments)


def saved(folder, name):
    import transformers

    config, arguments, processor = architectures()[name]
    config.id2label, config.label2id = LABELS, {v: k for k, v in LABELS.items()}
    torch.manual_seed(0)
    net = transformers.AutoModelForImageClassification.from_config(config).eval()
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.1 * torch.randn_like(p))
    net.save_pretrained(folder)
    made = processor_of(processor, arguments)
    made.save_pretrained(folder)
    return net, made


@pytest.fixture
def photo(tmp_path):
    y, x = np.mgrid[0:60, 0:90]
    pixels = np.stack([x * 2.5, y * 4, (x + y) * 1.6], -1).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


@pytest.mark.parametrize("name", ["vit", "dinov2", "resnet", "convnext", "swin"])
def test_opened_with_the_same_outputs_and_preprocessing(tmp_path, photo, name):
    net, processor = saved(tmp_path / "模 型", name)
    loaded = modelfolder.load(tmp_path / "模 型")
    assert loaded.card["labels"] == ["猫", "狗", "bird"]
    with Image.open(photo) as picture:
        theirs = processor(picture.convert("RGB"), return_tensors="pt")["pixel_values"]
    ours = loaded.task.model_inputs(loaded.task.read(photo))
    assert ours.shape == theirs.shape and (ours - theirs).abs().max() < 0.02  # one step of 255, over the std
    with torch.no_grad():
        assert torch.allclose(loaded.model(theirs), net(theirs).logits, atol=1e-6)
        expected = net(ours).logits.softmax(1)[0]
    answer = pipeline.predict(tmp_path / "模 型", photo)[0]
    assert answer["label"] == LABELS[int(expected.argmax())] and answer["probability"] == pytest.approx(float(expected.max()), abs=1e-5)


@pytest.mark.parametrize("name", ["vit", "dinov2", "resnet", "convnext", "swin"])
def test_parts_that_tuning_needs(tmp_path, name):
    saved(tmp_path / "m", name)
    model = open_foreign(str(tmp_path / "m")).model
    groups = model.layer_groups()
    assert next(iter(groups)) == "stem" and list(groups)[-1] == "head" and "layer2" in groups
    owned = [id(p) for modules in groups.values() for m in modules for p in m.parameters()]
    assert sorted(owned) == sorted(id(p) for p in model.parameters())
    x = torch.rand(2, 3, *model.input_shape[1:])
    with torch.no_grad():
        assert torch.allclose(model.head(model.features(x)), model(x), atol=1e-6)
    model.reset_head(5)
    assert model(x).shape == (2, 5) and model.num_outputs == 5


@pytest.mark.parametrize("method", ["head", "gradual"])
def test_tuned_saved_and_opened_again(tmp_path, method):
    saved(tmp_path / "我的 模型", "vit")
    rng = np.random.default_rng(0)
    for k, label in enumerate(("红", "蓝")):
        (tmp_path / "data" / label).mkdir(parents=True)
        for i in range(20):
            pixels = rng.integers(0, 120, (20, 30, 3), dtype=np.uint8)
            pixels[..., 2 * k] += 130
            Image.fromarray(pixels).save(tmp_path / "data" / label / f"{i}.png")
    run = pipeline.tune(
        tmp_path / "我的 模型",
        str(tmp_path / "data"),
        method,
        {"train.epochs": 4, "train.batch_size": 8, "optim.lr": 0.01},
        out=tmp_path / "run",
    )
    assert run.metrics["accuracy"] > 0.8
    recipe = (run.path / "recipe.yaml").read_text(encoding="utf-8")
    assert "hidden_size" not in recipe  # the architecture's numbers come with the weights
    loaded = run.load()
    assert loaded.architecture == "transformers" and loaded.arguments["config"]["hidden_size"] == 32
    assert modelfolder.replay(loaded) < 1e-5
    assert run.evaluate()["metrics"]["accuracy"] == pytest.approx(run.metrics["accuracy"])
    again = pipeline.tune(run, str(tmp_path / "data"), "full", {"train.steps": 1}, out=tmp_path / "again")
    assert again.result["before_after"]["rows"][0]["before"] is not None
    resumed = pipeline.train(None, out=run.path, resume=True)
    assert resumed.metrics == run.metrics


def test_features_without_a_classifier_can_only_be_tuned(tmp_path, photo):
    import transformers

    config = architectures()["vit"][0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        transformers.ViTModel(config, add_pooling_layer=False).save_pretrained(tmp_path / "m")
    with pytest.raises(ModelError, match="has no classifier"):
        pipeline.predict(tmp_path / "m", photo)
    assert modelfolder.load(tmp_path / "m").task.state()["labels"] == []


def test_what_is_refused(tmp_path):
    saved(tmp_path / "m", "vit")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    (tmp_path / "m" / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoModel": "evil.Model"}}))
    with pytest.raises(ModelError, match="code of its own"):
        modelfolder.load(tmp_path / "m")
    (tmp_path / "m" / "config.json").write_text("{")
    with pytest.raises(ModelError, match="cannot be read"):
        modelfolder.load(tmp_path / "m")
    (tmp_path / "m" / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(ModelError, match="does not say num_hidden_layers"):
        modelfolder.load(tmp_path / "m")
    (tmp_path / "m" / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(ModelError, match="cannot be opened as an image classifier"):
        modelfolder.load(tmp_path / "m")
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    (tmp_path / "m" / "model.safetensors").write_bytes(b"torn")
    with pytest.raises(ModelError, match="cannot be opened"):
        modelfolder.load(tmp_path / "m")
    (tmp_path / "m" / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="holds no weights"):
        modelfolder.load(tmp_path / "m")
    with pytest.raises(ModelError, match="hub:nobody/nothing cannot be had"):
        modelfolder.load("hub:nobody/nothing@main")


def test_preprocessors_in_their_forms(tmp_path):
    def read(facts, config=None):
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(facts))
        return transformers_preprocessor(tmp_path, config or {})

    assert read({"size": 224, "image_mean": [0.1], "image_std": [0.2]})["mean"] == [0.1, 0.1, 0.1]
    assert read({"size": {"shortest_edge": 384}, "crop_pct": 0.875})["resize"]["mode"] == "stretch"
    cropped = read({"size": {"shortest_edge": 256}, "do_center_crop": True, "crop_size": 224, "resample": 3})
    assert cropped["shape"] == [3, 224, 224] and cropped["resize"] == {"mode": "crop", "short_side": 256, "filter": "bicubic"}
    assert read({"size": 8, "do_normalize": False})["std"] == [1.0] * 3
    with pytest.raises(ModelError, match="does not bring pixels to"):
        read({"size": 8, "rescale_factor": 0.0078})


def test_timm_is_named_where_it_is_missing():
    if importlib.util.find_spec("timm") is not None:
        pytest.skip("timm is installed")
    with pytest.raises(ModelError, match="timm cannot be imported"):
        modelfolder.load("timm:resnet18")
