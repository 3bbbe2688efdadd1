"""Metrics against scikit-learn, independent of how records are cut into batches; intervals against a plain bootstrap."""

import math

import numpy as np
import pytest
import torch
from sklearn import metrics as sk

from groundup.metrics import ClassificationMetrics, MultiLabelMetrics, RegressionMetrics
from groundup.metrics.streamed import percentile_interval, share_interval

CUTS = ([1], [7], [64], [1000], [3, 500, 1])  # batch sizes, in turn


def feed(metrics, outputs, targets, sizes=(1000,)):
    start = turn = 0
    while start < len(targets):
        end = min(start + sizes[turn % len(sizes)], len(targets))
        metrics.update(outputs[start:end], targets[start:end], 0.5 * (end - start))
        start, turn = end, turn + 1
    return metrics


def labelled(n, classes, seed=0, strength=1.5, absent=(), never=()):
    """Random logits and labels; `absent` classes have no record, `never` are never predicted."""
    generator = torch.Generator().manual_seed(seed)
    present = torch.tensor([c for c in range(classes) if c not in absent])
    y = present[torch.randint(0, len(present), (n,), generator=generator)]
    logits = torch.randn(n, classes, generator=generator)
    logits[torch.arange(n), y] += strength
    logits[:, list(never)] = -100
    return logits, y


def sklearn_classification(y, predicted, classes):
    values = {"accuracy": sk.accuracy_score(y, predicted)}
    for average in ("macro", "weighted"):
        found = sk.precision_recall_fscore_support(y, predicted, labels=range(classes), average=average, zero_division=0)
        values |= {f"precision_{average}": found[0], f"recall_{average}": found[1], f"f1_{average}": found[2]}
    return values


@pytest.mark.parametrize(
    ("classes", "absent", "never"),
    [(2, (), ()), (5, (), ()), (5, (2,), ()), (5, (), (0,)), (8, (1, 7), (7, 3)), (77, (5,), (9,)), (3, (0, 1), ())],
)
def test_classification_equals_sklearn(classes, absent, never):
    logits, y = labelled(600, classes, absent=absent, never=never)
    metrics = feed(ClassificationMetrics([str(c) for c in range(classes)]), logits, y, (64,))
    predicted = logits.argmax(1)
    values = metrics.compute()
    for name, expected in sklearn_classification(y, predicted, classes).items():
        assert values[name] == pytest.approx(expected, abs=1e-9), name
    assert values["loss"] == pytest.approx(0.5, abs=1e-12)
    assert np.array_equal(metrics.details()["confusion"]["matrix"], sk.confusion_matrix(y, predicted, labels=range(classes)))
    each = sk.precision_recall_fscore_support(y, predicted, labels=range(classes), zero_division=0)
    for i, row in enumerate(metrics.details()["per_class"].values()):
        assert [row["precision"], row["recall"], row["f1"], row["support"]] == pytest.approx([column[i] for column in each], abs=1e-9)
    if classes > 5:
        top5 = sk.top_k_accuracy_score(y, logits.numpy(), k=5, labels=range(classes))
        assert values["top5_accuracy"] == pytest.approx(top5, abs=1e-9)
    assert set(values) == set(metrics.higher_is_better)


def test_two_classes_with_one_output():
    logits, y = labelled(300, 2)
    one = feed(ClassificationMetrics(["no", "yes"]), (logits[:, 1] - logits[:, 0])[:, None], y)
    two = feed(ClassificationMetrics(["no", "yes"]), logits, y)
    assert one.compute() == two.compute()


def test_multi_label_equals_sklearn():
    generator = torch.Generator().manual_seed(0)
    targets = (torch.rand(400, 6, generator=generator) < 0.3).float()
    targets[:, 4] = 0  # never there
    outputs = torch.randn(400, 6, generator=generator) + 2 * targets - 1
    outputs[:, 5] = -1  # never predicted
    metrics = feed(MultiLabelMetrics(list("abcdef")), outputs, targets, (33,))
    y, predicted, values = targets.int().numpy(), (outputs > 0).int().numpy(), metrics.compute()
    for average in ("macro", "micro", "weighted"):
        assert values[f"f1_{average}"] == pytest.approx(sk.f1_score(y, predicted, average=average, zero_division=0), abs=1e-9)
    assert values["precision_macro"] == pytest.approx(sk.precision_score(y, predicted, average="macro", zero_division=0), abs=1e-9)
    assert values["recall_macro"] == pytest.approx(sk.recall_score(y, predicted, average="macro", zero_division=0), abs=1e-9)
    assert values["subset_accuracy"] == pytest.approx(sk.accuracy_score(y, predicted), abs=1e-9)
    assert values["loss"] == pytest.approx(0.5 / 6, abs=1e-12)
    assert [v["support"] for v in metrics.details()["per_class"].values()] == y.sum(0).tolist()


def regression(names=("a", "b", "c"), scale=None, offset=None):
    n = len(names)
    return RegressionMetrics(list(names), np.ones(n) if scale is None else scale, np.zeros(n) if offset is None else offset)


def sklearn_regression(y, predicted):
    return {
        "mse": sk.mean_squared_error(y, predicted),
        "rmse": sk.root_mean_squared_error(y, predicted),
        "mae": sk.mean_absolute_error(y, predicted),
        "r2": sk.r2_score(y, predicted),
    }


@pytest.mark.parametrize(("spread", "offset"), [(1.0, 0.0), (1e-3, 1e6), (250.0, -40.0)])
def test_regression_equals_sklearn(spread, offset):
    generator = torch.Generator().manual_seed(0)
    targets = torch.randn(500, 3, generator=generator)
    outputs = targets + 0.3 * torch.randn(500, 3, generator=generator)
    scale, shift = np.array([spread, 1.0, 3.0]), np.array([offset, 0.0, -2.0])
    metrics = feed(regression(scale=scale, offset=shift), outputs, targets, (64,))
    y, predicted = targets.double().numpy() * scale + shift, outputs.double().numpy() * scale + shift
    for name, expected in sklearn_regression(y, predicted).items():
        assert metrics.compute()[name] == pytest.approx(expected, rel=1e-9), name
    assert metrics.details()["per_target"]["b"]["mse"] == pytest.approx(sk.mean_squared_error(y[:, 1], predicted[:, 1]), rel=1e-9)


@pytest.mark.parametrize("size", [1, 3, 7, 100])
@pytest.mark.parametrize("value", [0.1, 3.0, 1e6 + 0.1])
def test_constant_target(value, size):
    targets = torch.full((70, 1), value)
    right = feed(regression(["y"], np.array([1.3]), np.array([0.7])), targets.clone(), targets, (size,))
    wrong = feed(regression(["y"], np.array([1.3]), np.array([0.7])), targets + 1, targets, (size,))
    assert right.compute()["r2"] == 1.0 and right.intervals()["r2"] == (1.0, 1.0)
    assert wrong.compute()["r2"] == 0.0 and wrong.intervals()["r2"] == (0.0, 0.0)


@pytest.mark.parametrize("sizes", CUTS)
@pytest.mark.parametrize("kind", ["classes", "labels", "numbers"])
def test_batches_do_not_matter(kind, sizes):
    """Neither for the values nor for the intervals."""
    generator = torch.Generator().manual_seed(0)
    if kind == "classes":
        make, (outputs, targets) = (lambda: ClassificationMetrics([str(i) for i in range(7)])), labelled(300, 7)
    elif kind == "labels":
        make, targets = (lambda: MultiLabelMetrics(list("abc"))), (torch.rand(300, 3, generator=generator) < 0.4).float()
        outputs = torch.randn(300, 3, generator=generator) + targets
    else:
        make, targets = regression, torch.randn(300, 3, generator=generator) + 50
        outputs = targets + torch.randn(300, 3, generator=generator)
    whole, cut = feed(make(), outputs, targets), feed(make(), outputs, targets, sizes)
    assert cut.compute() == pytest.approx(whole.compute(), rel=1e-9)
    for name, pair in whole.intervals().items():
        assert cut.intervals()[name] == pytest.approx(pair, rel=1e-9), name


def test_intervals_contain_the_value_and_shrink():
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(3200, 3, generator=generator), torch.randn(3200, 3, generator=generator)
    logits, labels = labelled(3200, 7)
    many = (torch.rand(3200, 4, generator=generator) < 0.4).float()
    for make, outputs, targets in (
        (lambda: ClassificationMetrics([str(i) for i in range(7)]), logits, labels),
        (lambda: MultiLabelMetrics(list("abcd")), torch.randn(3200, 4, generator=generator) + many, many),
        (regression, y + x, y),
    ):
        few, all_of_them = feed(make(), outputs[:200], targets[:200]), feed(make(), outputs, targets)
        for metrics in (few, all_of_them):
            values = metrics.compute()
            assert set(metrics.intervals()) == set(values) - {"loss"}
            for name, (low, high) in metrics.intervals().items():
                assert low <= values[name] <= high, name
        for name, (low, high) in all_of_them.intervals().items():
            wide = few.intervals()[name]
            assert 2.5 < (wide[1] - wide[0]) / (high - low) < 6.5, name  # a sixteenth of the records: four times as wide


def plain_bootstrap(score, n, resamples=600):
    random = np.random.default_rng(1)
    return percentile_interval(np.array([score(random.integers(0, n, n)) for _ in range(resamples)]))


def test_intervals_are_those_of_a_plain_bootstrap():
    logits, labels = labelled(400, 6)
    y, predicted = labels.numpy(), logits.argmax(1).numpy()
    found = feed(ClassificationMetrics([str(i) for i in range(6)]), logits, labels).intervals()
    for name, score in {
        "accuracy": lambda i: (y[i] == predicted[i]).mean(),
        "f1_macro": lambda i: sk.f1_score(y[i], predicted[i], average="macro", labels=range(6), zero_division=0),
    }.items():
        assert found[name] == pytest.approx(plain_bootstrap(score, 400), abs=0.012), name

    generator = torch.Generator().manual_seed(0)
    targets = torch.randn(400, 1, generator=generator)
    outputs = targets + 0.5 * torch.randn(400, 1, generator=generator)
    t, p = targets.numpy()[:, 0], outputs.numpy()[:, 0]
    found = feed(regression(["y"]), outputs, targets).intervals()
    assert found["mse"] == pytest.approx(plain_bootstrap(lambda i: ((t[i] - p[i]) ** 2).mean(), 400), abs=0.012)
    assert found["r2"] == pytest.approx(plain_bootstrap(lambda i: sk.r2_score(t[i], p[i]), 400), abs=0.02)


def test_share_interval_is_wilsons():
    # Newcombe, Two-sided confidence intervals for the single proportion, 1998, table I, method 3.
    for hits, total, expected in (
        (81, 263, (0.2553, 0.3662)),
        (15, 148, (0.0624, 0.1605)),
        (0, 20, (0.0, 0.1611)),
        (1, 29, (0.0061, 0.1718)),
    ):
        assert share_interval(hits, total) == pytest.approx(expected, abs=5e-5)
    low, high = share_interval(10, 10)  # all right is not certain
    assert 0.6 < low < 0.8 and high == 1.0


def test_empty_sets_are_nan_without_intervals():
    for metrics in (
        ClassificationMetrics(list("ab")),
        ClassificationMetrics([str(i) for i in range(9)]),
        MultiLabelMetrics(list("ab")),
        regression(),
    ):
        values = metrics.compute()
        assert set(values) == set(metrics.higher_is_better) and all(math.isnan(v) for v in values.values())
        assert metrics.intervals() == {}
        metrics.details()


def test_top5_is_offered_only_where_it_exists():
    assert "top5_accuracy" not in ClassificationMetrics(list("abc")).higher_is_better
    assert "top5_accuracy" in ClassificationMetrics(list("abcdef")).higher_is_better


def test_without_resampling_only_the_intervals_are_missing():
    generator = torch.Generator().manual_seed(0)
    targets = torch.randn(50, 3, generator=generator)
    metrics = regression()
    metrics.resampling = False
    feed(metrics, targets + 1, targets)
    assert metrics.compute()["mse"] == pytest.approx(1.0, rel=1e-6) and metrics.intervals() == {}
