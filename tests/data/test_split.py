"""Splits: no record and no equal of it on two sides, whatever is asked for; the same records wherever their files lie."""

import itertools

import numpy as np
import pytest

from groundup.core.errors import DataError
from groundup.core.recipe import Split
from groundup.data.dataset import from_arrays
from groundup.data.prepare import labels_of
from groundup.data.split import make_splits

RNG = np.random.default_rng(0)


def vectors(n, classes=2, **options):
    return from_arrays("d", np.arange(2.0 * n).reshape(n, 2), np.arange(n) % classes, **options)


def split(dataset, stratify=True, **settings):
    return make_splits(dataset, Split(**settings), labels_of(dataset) if stratify else None)


def assert_apart(dataset, splits):
    """No position, and no equal input, on two sides."""
    for a, b in itertools.combinations(splits.values(), 2):
        assert not {dataset.digests[i] for i in a} & {dataset.digests[i] for i in b}


def test_shares_and_class_balance():
    dataset = vectors(1000, classes=4)
    splits, _ = split(dataset, validation=0.1, test=0.2)
    assert {k: len(v) for k, v in splits.items()} == {"train": 700, "validation": 100, "test": 200}
    for index in splits.values():
        counts = np.bincount(dataset.target[index])
        assert counts.max() - counts.min() <= 1
        assert np.array_equal(index, np.sort(index))
    assert sorted(np.concatenate(list(splits.values()))) == list(range(1000))


def test_seeded_and_repeatable():
    dataset = vectors(100)
    first, again, other = (split(dataset, seed=s)[0] for s in (0, 0, 1))
    assert all(np.array_equal(first[k], again[k]) for k in first)
    assert not np.array_equal(first["test"], other["test"])


def test_the_order_of_records_does_not_matter():
    dataset = vectors(200)
    shuffled = dataset.select(RNG.permutation(200))
    a, b = split(dataset)[0], split(shuffled)[0]
    for name in a:
        assert {dataset.digests[i] for i in a[name]} == {shuffled.digests[i] for i in b[name]}


def test_the_names_of_files_do_not_matter(folder, tmp_path, prepared):
    first = prepared(folder)
    moved = folder.rename(tmp_path / "moved")
    (moved / "狗" / "图 00.png").rename(moved / "狗" / "zzz.png")
    second = prepared(moved)
    for name in first.splits:
        assert {first.dataset.digests[i] for i in first.splits[name]} == {second.dataset.digests[i] for i in second.splits[name]}


@pytest.mark.parametrize("by", ["record", "contiguous"])
def test_duplicates_never_straddle(by):
    x = np.arange(300.0)[:, None] % 170
    dataset = from_arrays("d", x, np.arange(300) % 2)
    splits, notes = split(dataset, by=by)
    assert_apart(dataset, splits)
    assert any("130 records are exact duplicates" in en for en, _ in notes)


def test_a_training_record_equal_to_a_given_test_one_leaves():
    x = np.arange(20.0)[:, None]
    x[3] = x[17]
    dataset = from_arrays("d", x, np.arange(20) % 2, given={"train": range(16), "test": range(16, 20)})
    splits, notes = split(dataset, validation=0.2)
    assert splits["test"].tolist() == [16, 17, 18, 19] and 3 not in splits["train"] and 3 not in splits["validation"]
    assert_apart(dataset, splits)
    assert any("1 training records equal a held-out one" in en for en, _ in notes)


def test_the_datas_own_held_out_records_never_train():
    dataset = vectors(100, given={"train": range(60), "validation": range(60, 80), "test": range(80, 100)})
    splits, _ = split(dataset)
    assert [len(splits[k]) for k in ("train", "validation", "test")] == [60, 20, 20]
    own, _ = split(dataset, test=0.5, validation=0)
    assert set(own["train"]) | set(own["test"]) == set(range(60)) and "validation" not in own


def test_an_empty_given_split_counts_as_none():
    dataset = vectors(50, given={"train": range(50), "test": []})
    splits, notes = split(dataset)
    assert len(splits["test"]) == 10 and any("20 % of the records" in en for en, _ in notes)


@pytest.mark.parametrize("name", ["validation", "test"])
def test_a_given_split_that_is_not_there(name):
    with pytest.raises(DataError, match=f"data.split.{name} = given, and d has no {name} split"):
        split(vectors(20), **{name: "given"})


def test_groups_are_never_divided():
    dataset = vectors(200)
    dataset.groups = np.array([f"patient {i // 5}" for i in range(200)])
    splits, _ = split(dataset, by="group")
    sides = [{dataset.groups[i] for i in index} for index in splits.values()]
    assert len(splits) == 3 and not any(a & b for a, b in itertools.combinations(sides, 2))


def test_groups_joined_by_equal_inputs():
    x = np.arange(60.0)[:, None]
    x[10], x[59] = x[0], x[20]  # ties the groups 0 and 1, and 2 and 5
    dataset = from_arrays("d", x, np.arange(60) % 2)
    dataset.groups = np.arange(60) // 10
    splits, _ = split(dataset, by="group", test=0.3, validation=0.2)
    assert_apart(dataset, splits)
    where = {group: {name for name, index in splits.items() if group in dataset.groups[index]} for group in range(6)}
    assert all(len(sides) == 1 for sides in where.values())
    assert where[0] == where[1] and where[2] == where[5]


def test_groups_need_a_column():
    with pytest.raises(DataError, match="needs a column of groups"):
        split(vectors(20), by="group")


def test_contiguous_keeps_time_in_order():
    splits, _ = split(vectors(100), by="contiguous")
    assert splits["train"].tolist() == list(range(70))
    assert splits["validation"].tolist() == list(range(70, 80)) and splits["test"].tolist() == list(range(80, 100))


def test_tiny_classes_keep_a_training_record():
    target = np.array([0] * 90 + [1] * 3 + [2] * 2 + [3])
    dataset = from_arrays("d", np.arange(96.0)[:, None], target)
    splits, _ = split(dataset, test=0.4, validation=0.4)
    assert set(target[splits["train"]]) == {0, 1, 2, 3}


def test_what_tiny_classes_cannot_give_is_not_taken_from_the_next():
    target = np.array([*range(60), *[60] * 20])
    dataset = from_arrays("d", np.arange(80.0)[:, None], np.char.mod("%03d", target))
    splits, _ = split(dataset, test=0.2, validation=0)
    assert (target[splits["train"]] == 60).sum() >= 14


def test_nothing_left_to_train_on():
    with pytest.raises(DataError, match="nothing is left to train on"):
        split(vectors(4, given={"test": range(4)}))
    with pytest.raises(DataError, match="nothing is left"):
        split(vectors(2), by="contiguous", test=0.5, validation=0.3)
    with pytest.raises(DataError, match="is for text"):
        split(vectors(4), by="document")


def test_no_held_out_share():
    splits, _ = split(vectors(20), test=0, validation=0)
    assert list(splits) == ["train"] and len(splits["train"]) == 20


def test_few_training_samples_are_balanced(prepared):
    data = prepared("digits", train_samples=50)
    assert np.bincount(data.dataset.target[data.splits["train"]]).tolist() == [5] * 10
    assert len(data.splits["test"]) == len(prepared("digits").splits["test"])
    assert len(prepared("diabetes", classification=False, train_samples=7).splits["train"]) == 7


def test_classes_may_be_chosen(prepared):
    data = prepared("digits", classes=[3, "7"])
    assert set(labels_of(data.dataset)) == {"3", "7"}
    with pytest.raises(DataError, match="digits has no label '12'"):
        prepared("digits", classes=[12])


def test_shares_are_checked():
    with pytest.raises(ValueError, match=r"take 1\.1 of the records"):
        Split(validation=0.6, test=0.5)
