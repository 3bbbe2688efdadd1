"""Tokenizers give back every text; token streams lose nothing, mix nothing, and continue where they were interrupted."""

import _thread
import random
import threading
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from tokenizers import Regex, models, pre_tokenizers, trainers

from groundup.core.errors import DataError, ModelError
from groundup.data import tokens as module
from groundup.data.tokenizers import (
    END,
    GPT2_WORDS,
    LLAMA3_WORDS,
    QWEN_WORDS,
    WORDS,
    Tokenizer,
    open_tokenizer,
    pieces,
    train_bpe,
    train_characters,
    vocabulary_for,
)
from groundup.data.tokens import IGNORED, tokenize

TEXTS = ["def f(x):\n    return x + 1\n" * 30, "The quick brown fox. 床前明月光，疑是地上霜。\r\n\t12345 67", "", "a"]


def both():
    return {"bpe": train_bpe(TEXTS * 3, 300), "char": train_characters(TEXTS)}


def anything(rng):
    """Text of any Unicode there is: all planes, controls, marks, no surrogates; and special tokens spelled out."""
    parts = []
    for _ in range(rng.randint(0, 30)):
        kind = rng.random()
        if kind < 0.1:
            parts.append(rng.choice([END, "<|im_start|>", "<0x41>", "Ġ", "▁", "\ufeff", "\x00", "\r", "\u2028", "e\u0301", "👩‍👩‍👧"]))
        else:
            top = rng.choice([0x80, 0x800, 0x10000, 0x110000])
            point = rng.randrange(top)
            parts.append(chr(point) if not 0xD800 <= point < 0xE000 else "x")
    return "".join(parts)


@pytest.mark.parametrize("kind", ["bpe", "char"])
def test_any_text_comes_back(kind, tmp_path):
    made = both()[kind]
    made.save(tmp_path, 64)
    again = open_tokenizer(str(tmp_path))
    rng = random.Random(0)
    for text in [*TEXTS, *(anything(rng) for _ in range(400))]:
        ids = made.encode(text)
        assert made.decode(ids, special=True) == text and again.encode(text) == ids
        assert made.end not in ids, "text that looks like a special token is text"
    assert max(made.encode("".join(map(chr, range(0x20, 0x3000))))) < len(made)


@pytest.mark.filterwarnings("ignore")
def test_transformers_reads_it_alike(tmp_path):
    from transformers import AutoTokenizer

    for kind, made in both().items():
        made.save(tmp_path / kind, 64) if (tmp_path / kind).mkdir() is None else None
        peer = AutoTokenizer.from_pretrained(tmp_path / kind)
        for text in TEXTS:
            assert peer.encode(text, add_special_tokens=False) == made.encode(text)
        assert peer.eos_token_id == made.end and peer.bos_token_id == made.begin and peer.pad_token_id == made.pad
        messages = [{"role": "user", "content": "hi <|im_end|>"}, {"role": "assistant", "content": "ho"}]
        assert peer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == made.render(messages)


def test_templates_run_in_a_sandbox():
    made = both()["bpe"]
    made.settings["chat_template"] = "{{ messages.__class__.__mro__ }}"
    with pytest.raises(ModelError, match="template"):
        made.render([])
    made.settings["chat_template"] = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(ModelError, match="roles must alternate"):
        made.render([])


def test_vocabularies_fit_the_text():
    assert [vocabulary_for(n) for n in (10, 10**6, 10**7, 10**8, 10**9, 10**12)] == [512, 1024, 4096, 8192, 32768, 65536]
    with pytest.raises(DataError, match="supports a vocabulary of") as error:
        train_bpe(["one short text"], 5000)
    assert "task.vocabulary=" in error.value.fix
    with pytest.raises(DataError, match="special tokens alone"):
        train_bpe(TEXTS, 100)


def test_ctrl_c_does_not_wait_for_a_tokenizer():
    end = threading.Event()
    threading.Timer(0.3, _thread.interrupt_main).start()
    with pytest.raises(KeyboardInterrupt):
        train_bpe(iter(end.wait, True), 512)
    end.set()

    def torn():
        yield "abc"
        raise DataError("torn", "torn")

    with pytest.raises(DataError, match="torn"):
        train_bpe(torn(), 512)


@pytest.mark.parametrize("pattern", [WORDS, GPT2_WORDS, LLAMA3_WORDS, QWEN_WORDS], ids=["ours", "gpt2", "llama3", "qwen"])
def test_words_looked_up_are_what_the_library_encodes(pattern, monkeypatch):
    core = tokenizers.Tokenizer(models.BPE())
    spelled = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern == GPT2_WORDS)
    core.pre_tokenizer = (
        spelled if pattern == GPT2_WORDS else pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), spelled])
    )
    code = Path(tokenizers.__file__).read_text(encoding="utf-8")
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        [code, *TEXTS], trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, special_tokens=[END], show_progress=False)
    )
    made = Tokenizer(core, {"eos_token": END})
    assert made._words is not None
    monkeypatch.setattr(made._words, "LIMIT", 3000)  # the table is emptied on the way
    rng = random.Random(0)
    letters = "aZ'sS90 \n\r\t\x0b\x0c.,!-=()_\x1c\x1f\x7f\x00  lLvVrReEdDmMtT<|>é中"
    for _ in range(20):
        texts = [code, END, *TEXTS, *("".join(rng.choices(letters, k=rng.randint(0, 30))) for _ in range(300))]
        assert [ids.tolist() for ids in made.encode_batch(texts)] == [e.ids for e in core.encode_batch(texts, add_special_tokens=False)]
    assert [p for p, _ in pre_tokenizers.Split(Regex(WORDS), "isolated").pre_tokenize_str("x 1234567")] == ["x", " ", "123", "456", "7"]


def test_gpt2_is_opened_from_its_two_files(shared_data):
    gpt2 = open_tokenizer(str(shared_data / "tokenizers" / "gpt2"))
    assert gpt2.encode("Hello world") == [15496, 995] and gpt2.end == 50256 == gpt2.begin and len(gpt2) == 50257
    minimind = open_tokenizer(str(shared_data / "tokenizers" / "minimind"))
    assert minimind.chat_template and minimind.decode(minimind.encode("你好, world")) == "你好, world"
    with pytest.raises(DataError, match="no tokenizer"):
        open_tokenizer("/nowhere/at/all")


def test_long_texts_are_cut_without_loss():
    text = "line of text\n" * 500 + "x" * 5000
    parts = list(pieces(text, 1000))
    assert "".join(parts) == text and all(0 < len(p) <= 1000 for p in parts) and parts[0].endswith("\n")


def stream(texts, tokenizer, key, **more):
    return tokenize(lambda k: texts[k:], len(texts), sum(len(t.encode()) for t in texts), tokenizer, key, **more)


@pytest.mark.parametrize("shared", [True, False])
def test_windows_hold_every_token_once_and_targets_stay_in_their_document(shared):
    tokenizer = both()["char"]
    if not shared:
        tokenizer.begin = tokenizer.core.token_to_id("<|im_start|>")
    rng = random.Random(1)
    texts = ["".join(rng.choice("abcdef") for _ in range(rng.randint(0, 40))) for _ in range(30)]
    s = stream(texts, tokenizer, f"windows-{shared}")
    expected = []  # (input, target or none) of all documents, in order
    for i, text in enumerate(texts):
        ids = [tokenizer.begin, *tokenizer.encode(text), *([] if shared else [tokenizer.end])]
        following = [*ids[1:], tokenizer.end] if shared else [*ids[1:], IGNORED]
        expected += [(a, b, i) for a, b in zip(ids, following)]
    expected = expected[: s.inputs]  # the very last token has nothing after it
    for context in (7, 16, 1000):
        for shift in (0, 3, context - 1):
            index = np.arange(s.windows(context))
            tokens, targets, documents = s.fetch(index, context, shift)
            assert tokens.shape == targets.shape == (len(index), context)
            whole = len(index) * context
            found = {}
            for w in index:
                for t in range(context):
                    at = (w * context + t + shift) % whole
                    if at < s.inputs:
                        found[at] = (int(tokens[w, t]), int(targets[w, t]))
                        if documents is not None and t and (at - 1) % whole < s.inputs and at:
                            same = expected[at][2] == expected[at - 1][2]
                            assert (documents[w, t] == documents[w, t - 1]) == same
                    else:
                        assert targets[w, t] == IGNORED
            assert [found[at] for at in range(s.inputs)] == [(a, b) for a, b, _ in expected]
    assert s.supervised == sum(b != IGNORED for _, b, _ in expected)


def test_texts_that_go_on_are_one_document():
    tokenizer = both()["char"]
    texts, going_on = ["abc", "def", "ghi", "jkl"], np.array([False, True, False, True])
    for shared in (True, False):
        if not shared:
            tokenizer.begin = tokenizer.core.token_to_id("<|im_start|>")
        whole = stream(["abcdef", "ghijkl"], tokenizer, f"whole-{shared}")
        parts = stream(texts, tokenizer, f"parts-{shared}", going_on=going_on)
        assert parts.tokens.tolist() == whole.tokens.tolist() and parts.starts.tolist() == whole.starts.tolist()


def test_an_interrupted_stream_continues(monkeypatch):
    tokenizer = both()["bpe"]
    texts = [f"document {i}: " + "word " * (i % 7) for i in range(200)]
    whole = stream(texts, tokenizer, "whole")
    monkeypatch.setattr(module, "BATCH", 300)
    clock = iter(range(0, 100000, 10))
    monkeypatch.setattr(module.time, "monotonic", lambda: next(clock))  # every group is committed

    class Killed(BaseException):
        pass

    def dying(k):
        for i, text in enumerate(texts[k:]):
            if i + k == 120 and k < 100:
                raise Killed
            yield text

    with pytest.raises(Killed):
        tokenize(dying, len(texts), 1, tokenizer, "killed")
    asked = []
    again = tokenize(lambda k: asked.append(k) or texts[k:], len(texts), 1, tokenizer, "killed")
    assert 0 < asked[0] <= 120
    assert np.array_equal(again.tokens, whole.tokens) and np.array_equal(again.starts, whole.starts)


def test_two_processes_that_tokenise_the_same_text_do_not_disturb_each_other(tmp_path):
    """Each appends to the files of the cache: the second one waits for the first."""
    import os
    import subprocess
    import sys

    code = (
        "import time\nfrom groundup.data.tokens import tokenize\nfrom groundup.data.tokenizers import train_bpe\n"
        "texts = [f'text number {i} of some' for i in range(200)]\nmade = train_bpe(texts * 3, 300, exact=False)\n"
        "def slowly(k):\n    for text in texts[k:]:\n        time.sleep(0.002)\n        yield text\n"
        "stream = tokenize(slowly, len(texts), 4000, made, 'same')\n"
        "print(len(stream.tokens), int(stream.tokens.sum()))"
    )
    environment = os.environ | {"GROUNDUP_CACHE": str(tmp_path)}
    both = [subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    told = {p.communicate(timeout=120)[0] for p in both}
    assert len(told) == 1 and told != {""}


def test_a_prompt_begins_as_its_tokenizer_says():
    """As transformers' own: with a begin where its post-processor puts one, without where it puts none; ours separate documents by one token."""
    import tokenizers
    from tokenizers import processors

    from groundup.data.tokenizers import SPECIAL, Tokenizer, train_bpe

    ours = train_bpe(["a word and another word " * 20], 300, exact=False)
    assert ours.encode_prompt("a")[0] == ours.begin and ours.encode_prompt("") == [ours.begin]
    core = tokenizers.Tokenizer.from_str(ours.core.to_str())
    chat = {"bos_token": SPECIAL[1], "eos_token": SPECIAL[2]}
    assert Tokenizer(core, chat).encode_prompt("a") == ours.encode("a"), "a begin of turns is none of texts"
    begin = core.token_to_id(SPECIAL[1])
    core.post_processor = processors.TemplateProcessing(single=f"{SPECIAL[1]} $A", special_tokens=[(SPECIAL[1], begin)])
    assert Tokenizer(core, chat).encode_prompt("a") == [begin, *ours.encode("a")]
