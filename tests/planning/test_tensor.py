"""What one device of a group holds that shares every layer."""

import pytest

import groundup
from groundup.core.errors import RecipeError
from groundup.planning import devices, shapes
from groundup.planning.forecast import forecast

TINY = {"model.layers": 2, "task.context": 64, "task.vocabulary": 600, "train.batch_size": 8, "train.micro_batch_size": 2}
H100 = devices.find("h100")


def planned(changes=None, *, method="full", **options):
    subject = shapes.subject_of_shape("5M", method, TINY | (changes or {}))
    return subject, forecast(subject, H100, **options)


def test_each_device_holds_its_share_of_the_matrices_and_whole_norms():
    subject, whole = planned()
    _, part = planned(gpus=2, sharding="tensor")
    norms = sum(p.numel() for p in subject.model.parameters() if p.ndim == 1)
    matrices = part.parameters[0] - norms
    assert part.parameters == whole.parameters
    assert part.memory["weights"] == pytest.approx(4 * (matrices / 2 + norms), rel=0.01)
    assert part.moments["activations"]["optimizer"] == pytest.approx(8 * (matrices / 2 + norms), rel=0.01)
    one, all_of_it = (found.moments["activations"]["activations"] for found in (part, whole))
    assert one < all_of_it < 2 * one
    assert part.flops == pytest.approx(whole.flops, rel=0.05)
    assert part.cache == whole.cache / 2
    layers, tokens = (
        2,
        8 * 64,
    )  # two sums in each pass of a layer, one at the table and one at the head; of bfloat16, each sent (n - 1) / n twice
    assert part.traffic == (4 * layers + 2) * 2 * 0.5 * tokens * subject.model.width * 2


def test_groups_divide_the_rest_as_fsdp():
    _, group = planned(gpus=2, sharding="tensor")
    _, groups = planned(gpus=4, sharding="tensor", nodes=2)
    assert groups.gpus == 4 and groups.moments["activations"]["optimizer"] == pytest.approx(
        group.moments["activations"]["optimizer"] / 2, rel=0.02
    )


def test_the_model_is_left_whole_and_adapters_are_divided():
    subject, whole = planned(method="lora")
    shapes_before = [tuple(p.shape) for p in subject.model.parameters()]
    part = forecast(subject, H100, gpus=2, sharding="tensor")
    assert [tuple(p.shape) for p in subject.model.parameters()] == shapes_before
    assert part.memory["adapters"] < whole.memory["adapters"] < 2 * part.memory["adapters"]  # of each pair one is whole on both


@pytest.mark.parametrize(("changes", "group"), [({}, 3), ({"model.experts": 2}, 2), ({"model.hidden": 1001}, 2)])
def test_what_cannot_be_divided_is_refused(changes, group):
    with pytest.raises(RecipeError, match="heads, kv_heads"):
        planned(changes | {"train.batch_size": 6}, gpus=group, sharding="tensor")


def test_the_option():
    facts = groundup.plan("5M", TINY, device="h100", gpus=2, nodes=2, sharding="tensor")
    assert facts["gpus"] == 4 and facts["sharding"] == "tensor" and facts["fits"]
