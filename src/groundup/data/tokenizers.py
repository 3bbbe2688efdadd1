"""Tokenizers: byte-level BPE or characters, trained on the text at hand; or any one that Hugging Face's `tokenizers` reads.

What a tokenizer of ours encodes, it decodes to the same text, whatever the text: bytes and characters that it never saw have tokens too, and text
that looks like a special token ("<|endoftext|>") stays text.
"""

from __future__ import annotations

import datetime
import functools
import hashlib
import importlib.util
import itertools
import json
import math
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from numpy.typing import NDArray
from tokenizers import Regex, decoders, models, pre_tokenizers, processors, trainers

from groundup.core import files
from groundup.core.errors import DataError, ModelError, did_you_mean

END, TURN, TURN_END, PAD = "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>"
SPECIAL = [END, TURN, TURN_END, PAD]
# ChatML: each turn between its markers, the role on the first line.
CHAT_TEMPLATE = (
    "{% if tools %}{{ '<|im_start|>system\n' }}{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'] + '\n' }}{% endif %}"
    "{{ 'Tools:' }}{% for tool in tools %}{{ '\n' + (tool | tojson) }}{% endfor %}{{ '<|im_end|>\n' }}{% endif %}"
    "{% for message in messages %}{% if not (tools and loop.first and message['role'] == 'system') %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] }}{% for call in message['tool_calls'] or [] %}"
    "{{ '<tool_call>' + (call['function'] | tojson) + '</tool_call>' }}{% endfor %}{{ '<|im_end|>' + '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# For tokenizers without ChatML's markers: roles by name, the end of a text after each answer.
PLAIN_TEMPLATE = (
    "{% if tools %}{{ 'Tools:' }}{% for tool in tools %}{{ '\n' + (tool | tojson) }}{% endfor %}{{ '\n\n' }}{% endif %}"
    "{% for message in messages %}{% if message['role'] == 'assistant' %}{{ 'Assistant:' }}{% if message['content'] %}{{ ' ' + message['content'] }}"
    "{% endif %}{% for call in message['tool_calls'] or [] %}{{ ' <tool_call>' + (call['function'] | tojson) + '</tool_call>' }}{% endfor %}"
    "{{ eos_token + '\n' }}{% else %}{{ {'system': 'System: ', 'user': 'User: ', 'tool': 'Tool: '}[message['role']] + message['content'] + '\n' }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
TEMPLATES = {"chatml": CHAT_TEMPLATE, "plain": PLAIN_TEMPLATE}
# Where words begin: a word takes the space before it along, numbers are cut into at most three digits, line ends stand apart from what follows.
WORDS = r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]|\s+(?!\S)|\s"
GPT2_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN_WORDS = LLAMA3_WORDS.replace("{1,3}", "")
LINES = re.compile(r"(?<=\n)(?=\S)")
TRAINED_ON = 200_000_000  # bytes of text that a tokenizer is trained on at most: more changes its merges very little
PIECE = 200_000  # characters: longer texts are cut at line ends before they are encoded, so that memory does not grow with them


class _Words:
    """The tokens of the words met so far. Most of a text repeats words, and looking one up is many times quicker than merging its bytes anew.

    Args:
        pattern: how words are divided; one of those above, whose words come out alike alone and in their text. For ASCII only, where
            Python's `re` divides as the library does.
    """

    LIMIT = 500_000  # words kept; then all are forgotten

    def __init__(self, core: tokenizers.Tokenizer, pattern: str) -> None:
        plain = pattern.replace(r"\p{L}\p{N}", "A-Za-z0-9").replace(r"\p{L}", "[A-Za-z]").replace(r"\p{N}", "[0-9]")
        self.core, self.divide, self.table = core, re.compile(plain, re.ASCII).findall, dict[str, bytes]()
        self.cuts = pattern != GPT2_WORDS

    def parts(self, text: str) -> list[str]:
        """A text cut into parts that are ASCII and parts that are not, where a line begins with more than space: no word goes across, and (but for
        GPT-2's pattern, where it depends on what follows) none before it changes."""
        if text.isascii() or not self.cuts:
            return [text]
        return ["".join(lines) for _, lines in itertools.groupby(LINES.split(text), str.isascii)]

    def encode(self, texts: Sequence[str]) -> list[NDArray[np.uint32]]:
        words = [self.divide(text) for text in texts]
        found = [self._looked_up(part) for part in words]
        new = {word for part, bytes_ in zip(words, found) if bytes_ is None for word in part} - self.table.keys()
        if len(self.table) + len(new) > self.LIMIT:
            self.table.clear()
            new = {word for part, bytes_ in zip(words, found) if bytes_ is None for word in part}
        for word, tokens in zip(new, self.core.encode_batch_fast(list(new), add_special_tokens=False)):
            self.table[word] = np.array(tokens.ids, dtype=np.uint32).tobytes()
        whole = (self._looked_up(part) if bytes_ is None else bytes_ for part, bytes_ in zip(words, found))
        return [np.frombuffer(bytes_, dtype=np.uint32) for bytes_ in whole if bytes_ is not None]

    def _looked_up(self, words: list[str]) -> bytes | None:
        """The tokens of these words one after the other; None where one is new."""
        try:
            return b"".join(map(self.table.__getitem__, words))
        except KeyError:
            return None


class Tokenizer:
    """Text <-> token numbers.

    Args:
        core: the tokenizer of the `tokenizers` library.
        begin, end: the token before and after each document; one and the same where a tokenizer has a single separator.
        settings: what tokenizer_config.json says (chat_template and names of special tokens among it).
    """

    def __init__(self, core: tokenizers.Tokenizer, settings: dict[str, Any]) -> None:
        self.core, self.settings = core, settings
        core.encode_special_tokens = True
        core.no_truncation()
        core.no_padding()
        eos, bos, pad = (self._special(name) for name in ("eos_token", "bos_token", "pad_token"))
        self.end, self.pad = eos, pad
        self.begin = bos if bos is not None else eos
        # Whether one stands before a text is the tokenizer's own affair where it says so; where it does not, a separator of documents does.
        own = [eos] if core.post_processor is None else core.encode("a").ids[:1]
        self.begins = own == [self.begin]
        pattern = _words_of(json.loads(core.to_str()))
        self._words = None if pattern is None else _Words(core, pattern)

    def _special(self, name: str) -> int | None:
        value = self.settings.get(name)
        text = value.get("content") if isinstance(value, dict) else value
        return None if text is None else self.core.token_to_id(text)

    def __len__(self) -> int:
        """The size of the table that a model needs: the highest number + 1."""
        return max(self.core.get_vocab(with_added_tokens=True).values()) + 1

    @property
    def digest(self) -> str:
        return hashlib.sha256((self.core.to_str() + json.dumps(self.settings, sort_keys=True)).encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        """The tokens of a text, no special ones added."""
        return [t for ids in self.encode_batch(list(pieces(text))) for t in ids.tolist()]

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[np.uint32]]:
        """The tokens of several texts (none longer than PIECE), on all cores."""
        words = self._words
        if words is None:
            return [np.array(e.ids, dtype=np.uint32) for e in self.core.encode_batch_fast(list(texts), add_special_tokens=False)]
        parts = [words.parts(text) for text in texts]
        flat = [part for of in parts for part in of]
        quick = iter(words.encode([part for part in flat if part.isascii()]))
        slow = iter(self.core.encode_batch_fast([part for part in flat if not part.isascii()], add_special_tokens=False))
        found = (next(quick) if part.isascii() else np.array(next(slow).ids, dtype=np.uint32) for part in flat)
        return [np.concatenate([next(found) for _ in of]) for of in parts]

    def encode_prompt(self, text: str) -> list[int]:
        """What a model is given to go on from: the begin of a document, unless the tokenizer puts none before a text, then the text."""
        ids = self.encode(text)
        return ids if self.begin is None or (ids and not self.begins) else [self.begin, *ids]

    def encode_rendered(self, text: str) -> list[int]:
        """A rendered chat template: special tokens in it are special."""
        return list(self.encode_with_offsets(text).ids)

    def encode_with_offsets(self, text: str) -> tokenizers.Encoding:
        """As `encode_rendered`, with the place in the text of each token."""
        self.core.encode_special_tokens = False
        try:
            return self.core.encode(text, add_special_tokens=False)
        finally:
            self.core.encode_special_tokens = True

    def decode(self, ids: Sequence[int], *, special: bool = False) -> str:
        """The text of tokens; special ones are left out unless asked for."""
        return str(self.core.decode(list(ids), skip_special_tokens=not special))

    @property
    def chat_template(self) -> str | None:
        value = self.settings.get("chat_template")
        if isinstance(value, list):  # several named ones
            value = next((t["template"] for t in value if t.get("name") == "default"), value[0]["template"] if value else None)
        return value

    def render(
        self, messages: Sequence[dict[str, Any]], *, prompt: bool = True, tools: Sequence[Any] | None = None, template: str | None = None
    ) -> str:
        """Messages through the chat template, in a sandbox: a template is code that came with a download.

        Args:
            prompt: the beginning of an answer follows.
            template: another one than the tokenizer's own.

        Raises:
            ModelError: there is no template, or it refuses the messages.
        """
        from jinja2 import TemplateError

        if not (source := template or self.chat_template):
            raise ModelError(
                "this model has no chat template: it continues text, it does not answer",
                "这个模型没有对话模板：它会续写文本，但不会对话",
                fix='groundup generate MODEL "prompt"',
            )
        facts = {name: value for name, value in self.settings.items() if name.endswith("_token") and isinstance(value, str)}
        try:
            return _compiled(source).render(messages=list(messages), tools=tools or None, add_generation_prompt=prompt, **facts)
        except (TemplateError, TypeError, KeyError) as error:
            raise ModelError(
                "the chat template refuses these messages: {why}",
                "对话模板拒绝了这些消息：{why}",
                why=getattr(error, "message", None) or error,
            ) from error

    def add(self, tokens: Sequence[str]) -> None:
        """Makes these texts tokens of their own, special ones; those that are there already stay."""
        self.core.add_special_tokens([tokenizers.AddedToken(t, special=True, normalized=False) for t in tokens])

    def turn_ends(self) -> list[int]:
        """Tokens after which a model has finished: the end of a document, and of a turn."""
        names = [TURN_END, "<|eot_id|>", "<end_of_turn>", "</s>"]
        found = [self.end, *(self.core.token_to_id(n) for n in names)]
        return list(dict.fromkeys(t for t in found if t is not None))

    def save(self, folder: Path, context: int) -> None:
        """Writes tokenizer.json and tokenizer_config.json, which transformers' AutoTokenizer opens."""
        files.write_text(folder / "tokenizer.json", self.core.to_str(pretty=True))
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **self.settings}
        files.write_json(folder / "tokenizer_config.json", settings | {"model_max_length": context})


@functools.lru_cache(maxsize=8)
def _compiled(template: str) -> Any:
    """A template in the environment that transformers gives it: the same text comes out."""
    from jinja2 import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def refuse(message: str) -> None:
        raise TemplateError(message)

    def tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    environment.filters["tojson"] = tojson
    environment.globals |= {"raise_exception": refuse, "strftime_now": lambda form: datetime.datetime.now().strftime(form)}
    return environment.from_string(template)


def pieces(text: str, size: int = PIECE) -> Iterator[str]:
    """A long text cut behind line ends (or, where there are none, anywhere) into parts of at most `size` characters."""
    start = 0
    while len(text) - start > size:
        cut = text.rfind("\n", start + size // 2, start + size) + 1 or start + size
        yield text[start:cut]
        start = cut
    if start < len(text) or not text:
        yield text[start:]


def _words_of(facts: dict[str, Any]) -> str | None:
    """The pattern by which a byte-level BPE divides ASCII text into words, where it is one of those we know and does nothing else to the text."""
    steps, normal = facts["pre_tokenizer"] or {}, facts["normalizer"] or {"type": "NFC"}
    steps = steps.get("pretokenizers", [steps])
    bytes_ = steps[-1]
    plain = (
        bytes_.get("type") == "ByteLevel" and not bytes_["add_prefix_space"] and normal["type"] == "NFC" and facts["model"]["type"] == "BPE"
    )
    if not plain or facts["model"].get("dropout") or any(not token["special"] for token in facts["added_tokens"]):
        return None
    if len(steps) == 1:
        return GPT2_WORDS if bytes_["use_regex"] else None
    split = steps[0]
    if len(steps) > 2 or bytes_["use_regex"] or split["type"] != "Split" or split["behavior"] != "Isolated" or split["invert"]:
        return None
    pattern = split["pattern"].get("Regex")
    return pattern if pattern in (WORDS, LLAMA3_WORDS, QWEN_WORDS) else None


def _settings(extra: dict[str, Any]) -> dict[str, Any]:
    return {"bos_token": END, "eos_token": END, "pad_token": PAD, "chat_template": CHAT_TEMPLATE, **extra}


def vocabulary_for(size: int) -> int:
    """A vocabulary that so many bytes of text support: the power of two nearest to their square root, from 512 to 65,536."""
    return int(min(65536, max(512, 2 ** round(math.log2(max(size, 1)) / 2))))


def train_bpe(texts: Iterable[str], vocabulary: int, *, exact: bool = True) -> Tokenizer:
    """Byte-level BPE (Sennrich et al., arXiv 1508.07909; bytes as in Radford et al., GPT-2, 2019, 2.2).

    Args:
        exact: a text that supports fewer tokens is an error.

    Raises:
        DataError: the text has too few different pieces for so large a vocabulary, or the vocabulary is too small for all bytes.
    """
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if vocabulary < len(alphabet) + len(SPECIAL):
        raise DataError(
            "task.vocabulary = {n}: the bytes and special tokens alone are {least}",
            "task.vocabulary = {n}：仅字节与特殊词元就有 {least} 个",
            n=vocabulary,
            least=len(alphabet) + len(SPECIAL),
            fix="--set task.vocabulary=512",
        )
    core = tokenizers.Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(  # type: ignore[assignment]
        [pre_tokenizers.Split(Regex(WORDS), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]  # type: ignore[list-item]
    )
    core.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, special_tokens=SPECIAL, initial_alphabet=sorted(alphabet), show_progress=False)
    _heard(lambda: core.train_from_iterator(_limited(texts), trainer))
    if (made := core.get_vocab_size()) < vocabulary and exact:
        raise DataError(
            "the text supports a vocabulary of {made} tokens, {asked} were asked for",
            "这些文本只支持 {made} 个词元的词表，而要求的是 {asked} 个",
            made=made,
            asked=vocabulary,
            fix="--set task.vocabulary={made}   or auto",
            fix_zh="--set task.vocabulary={made}   或 auto",
        )
    return _of_documents(core)


def train_characters(texts: Iterable[str], limit: int = 20_000) -> Tokenizer:
    """One token per character, most frequent first; what is not among them is written as its bytes.

    Args:
        limit: characters at most.
    """
    from collections import Counter

    count: Counter[str] = Counter()
    for text in _limited(texts):
        count.update(text)
    known = [c for c, _ in sorted(count.items(), key=lambda item: (-item[1], item[0]))[:limit]]
    names = [*SPECIAL, *(f"<0x{b:02X}>" for b in range(256)), *known]
    core = tokenizers.Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, [], byte_fallback=True))
    core.add_special_tokens(SPECIAL)
    core.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])  # type: ignore[assignment]
    return _of_documents(core)


def _of_documents(core: tokenizers.Tokenizer) -> Tokenizer:
    """The separator stands before a text, as it does before every document of a training: whoever opens the folder with transformers gets it, too."""
    end = core.token_to_id(END)
    core.post_processor = processors.TemplateProcessing(single=f"{END} $A", pair=f"{END} $A {END} $B", special_tokens=[(END, end)])  # type: ignore[assignment]
    return Tokenizer(core, _settings({}))


def _heard(work: Callable[[], None]) -> None:
    """Long work outside Python, on a thread of its own: Ctrl-C is heard meanwhile, and ends the process without waiting for it."""
    failed: list[BaseException] = []

    def begin() -> None:
        try:
            work()
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=begin, daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(0.2)  # without a limit Windows would not hear it
    if failed:
        raise failed[0]


def _limited(texts: Iterable[str]) -> Iterator[str]:
    seen = 0
    for text in texts:
        for piece in pieces(text):
            yield piece
            seen += len(piece.encode())
            if seen >= TRAINED_ON:
                return


def open_tokenizer(where: str) -> Tokenizer:
    """A tokenizer from a folder (tokenizer.json, GPT-2's two files, or anything that transformers reads), a tokenizer.json, or `hub:owner/name`.

    Raises:
        DataError: nothing there that can be read.
    """
    path = Path(where.removeprefix("hub:")).expanduser()
    if not path.exists() and not re.fullmatch(r"hub:[\w.-]+(/[\w.-]+)?", where):
        hint, hint_zh = did_you_mean(where, ("char", "bpe"))
        raise DataError(
            "no tokenizer '{where}': there is no such folder or file." + hint,
            "没有分词器 '{where}'：没有这个目录或文件。" + hint_zh,
            where=where,
            fix="--set task.tokenizer=bpe   trains one on the text; hub:OWNER/NAME fetches one",
            fix_zh="--set task.tokenizer=bpe   可在文本上训练一个；hub:所有者/名称 可从 hub 下载",
        )
    if path.is_file() and path.name in ("tokenizer.json", "tokenizer.model"):
        path = path.parent  # what lies beside it belongs to it
    try:
        if path.is_file():
            return Tokenizer(tokenizers.Tokenizer.from_file(str(path)), {})
        if path.is_dir():
            settings = files.read_json(path / "tokenizer_config.json") if (path / "tokenizer_config.json").is_file() else {}
            if (path / "chat_template.jinja").is_file():
                settings["chat_template"] = (path / "chat_template.jinja").read_text(encoding="utf-8")
            if (path / "tokenizer.json").is_file():
                return Tokenizer(tokenizers.Tokenizer.from_file(str(path / "tokenizer.json")), settings)
            for vocabulary, merges in (("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe")):
                if (path / vocabulary).is_file() and (path / merges).is_file():
                    return _gpt2(path / vocabulary, path / merges, settings)
            if (path / "tokenizer.model").is_file() and importlib.util.find_spec("sentencepiece") is None:
                raise DataError(
                    "'{where}' has a SentencePiece model only, and the package that reads it is missing",
                    "'{where}' 只有 SentencePiece 模型，但缺少读取它的软件包",
                    where=where,
                    fix="pip install sentencepiece protobuf   (or a folder with a tokenizer.json)",
                    fix_zh="pip install sentencepiece protobuf   （或使用带 tokenizer.json 的目录）",
                )
        from transformers import AutoTokenizer

        opened = AutoTokenizer.from_pretrained(str(path) if path.is_dir() else where.removeprefix("hub:"))
        core = tokenizers.Tokenizer.from_str(opened.backend_tokenizer.to_str())
        special = {name: str(value) for name, value in opened.special_tokens_map.items() if isinstance(value, str)}
        return Tokenizer(core, special | {"chat_template": opened.chat_template})
    except DataError:
        raise
    except Exception as error:
        raise DataError(
            "no tokenizer can be read from '{where}': {why}",
            "无法从 '{where}' 读取分词器：{why}",
            where=where,
            why=" ".join(str(error).split())[:200] or type(error).__name__,
            fix="--set task.tokenizer=bpe   trains one on the text",
            fix_zh="--set task.tokenizer=bpe   可在文本上训练一个",
        ) from error


def _gpt2(vocabulary: Path, merges: Path, settings: dict[str, Any]) -> Tokenizer:
    core = tokenizers.Tokenizer(models.BPE.from_file(str(vocabulary), str(merges)))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    core.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    if core.token_to_id(END) is not None:
        core.add_special_tokens([END])
    return Tokenizer(core, {"bos_token": END, "eos_token": END, **settings})


def gpt2_for_comparison() -> Tokenizer | None:
    """GPT-2's tokenizer, where it lies on this machine already ($GROUNDUP_DATA/tokenizers/gpt2, the cache, the hub's cache); nothing is fetched."""
    import os

    from groundup.data.cache import cache_folder

    places = [Path(root).expanduser() / "tokenizers" / "gpt2" for root in (os.environ.get("GROUNDUP_DATA"), cache_folder()) if root]
    hub = Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser() / "hub" / "models--openai-community--gpt2" / "snapshots"
    places += sorted(hub.glob("*"))
    for place in places:
        if (place / "tokenizer.json").is_file() or (place / "vocab.bpe").is_file() or (place / "merges.txt").is_file():
            return open_tokenizer(str(place))
    return None
