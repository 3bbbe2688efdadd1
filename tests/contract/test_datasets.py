"""Every registered data set: a card, records, a fingerprint that repeats, splits that a task can use."""

import pytest

from groundup.core.errors import DataError
from groundup.core.recipe import Data
from groundup.core.registry import DATASETS
from groundup.data.prepare import prepare


@pytest.mark.parametrize("name", DATASETS.names())
def test_the_contract(name, monkeypatch, request):
    entry = DATASETS.get(name)
    assert entry.card.summary and entry.card.source and entry.card.licence and any("\u4e00" <= c <= "\u9fff" for c in entry.card.summary_zh)
    try:
        dataset = entry.target()
    except DataError as error:
        assert "GROUNDUP_DATA" in str(error)
        monkeypatch.setenv("GROUNDUP_DATA", str(request.getfixturevalue("shared_data")))
        dataset = entry.target()
    again = entry.target()
    assert len(dataset) > 0 and dataset.fingerprint == again.fingerprint and len(dataset.digests) == len(dataset)
    assert dataset.inputs.shape[0] == len(dataset) and dataset.describe(0) != dataset.describe(len(dataset) - 1)
    regression = name in ("diabetes", "line")
    prepared = prepare(Data(source=name), classification=not regression)
    assert set(prepared.splits) == {"train", "validation", "test"}
    positions = [i for index in prepared.splits.values() for i in index.tolist()]
    assert len(positions) == len(set(positions))
