"""Every registered data set: a card, records, a fingerprint that repeats, splits that a task can use."""

import pytest

from groundup.core.errors import DataError
from groundup.core.recipe import Data
from groundup.core.registry import DATASETS
from groundup.data.corpus import is_text, prepare_corpus
from groundup.data.prepare import prepare

TEXTS = [name for name in DATASETS.names() if is_text(name, Data(source=name))]


def check_card(entry):
    assert entry.card.summary and entry.card.source and entry.card.licence and any("\u4e00" <= c <= "\u9fff" for c in entry.card.summary_zh)


@pytest.mark.parametrize("name", [n for n in DATASETS.names() if n not in TEXTS])
def test_the_contract(name, monkeypatch, request):
    entry = DATASETS.get(name)
    check_card(entry)
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


@pytest.mark.parametrize("name", TEXTS)
def test_the_contract_of_texts(name, monkeypatch, request):
    check_card(DATASETS.get(name))
    config = Data.model_validate({"source": name, "split": {"test": 0.2}})
    try:
        corpus = prepare_corpus(config)
    except DataError as error:
        assert "GROUNDUP_DATA" in str(error)
        monkeypatch.setenv("GROUNDUP_DATA", str(request.getfixturevalue("shared_data")))
        corpus = prepare_corpus(config)
    assert len(corpus) > 0 and corpus.fingerprint == prepare_corpus(config).fingerprint and corpus.files
    assert corpus.text(0).strip() and (len(corpus) < 10 or corpus.describe(0) != corpus.describe(len(corpus) - 1))
    assert set(corpus.splits) == {"train", "validation", "test"}
    assert sorted(i for index in corpus.splits.values() for i in index.tolist()) == list(range(len(corpus)))
    assert sum(corpus.bytes_of(split) for split in corpus.splits) == corpus.statistics["after"]["bytes"] == corpus.text_file.stat().st_size
