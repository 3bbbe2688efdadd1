"""Conversations as tokens: through the chat template, with a mark on each token that is trained.

What training sees is what serving renders: the prompt of an answer is the text that the template gives for the turns before it, and trained is what the
template adds for the answer, its end of turn included.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from groundup.core import files
from groundup.core.errors import DataError, ModelError
from groundup.data import cache
from groundup.data.conversations import is_learned
from groundup.data.tokenizers import TEMPLATES, Tokenizer
from groundup.data.tokens import IGNORED

FORMAT = 3  # of the files of a stream: raise it when they change


@dataclass
class Rendered:
    """One conversation for a model.

    Args:
        ids: its tokens; trained: bool, those that are to be learned.
        text: what the template gave; spans: the stretches of it that are trained.
    """

    ids: NDArray[np.uint32]
    trained: NDArray[np.bool_]
    text: str
    spans: list[tuple[int, int]]


def template_for(tokenizer: Tokenizer, wanted: str) -> tuple[str, str]:
    """The chat template to use and its name: the tokenizer's own ('auto'), or one of ours by name.

    Raises:
        DataError: there is none of that name, or it needs tokens that the tokenizer lacks.
    """
    if wanted == "auto" and tokenizer.chat_template:
        return tokenizer.chat_template, "its own"
    marked = tokenizer.core.token_to_id("<|im_start|>") is not None and tokenizer.core.token_to_id("<|im_end|>") is not None
    name = ("chatml" if marked else "plain") if wanted == "auto" else wanted
    if name not in TEMPLATES or (name == "chatml" and not marked):
        raise DataError(
            "task.template = '{name}'"
            + ("; known: auto, {known}" if name not in TEMPLATES else " needs the tokens <|im_start|> and <|im_end|>"),
            "task.template = '{name}'" + ("；可用：auto、{known}" if name not in TEMPLATES else " 需要词元 <|im_start|> 与 <|im_end|>"),
            name=name,
            known=", ".join(TEMPLATES),
            fix="--set task.template=auto" if name not in TEMPLATES else "--set 'task.add_tokens=[<|im_start|>, <|im_end|>]' --method full",
        )
    return TEMPLATES[name], name


def parse(document: str) -> dict[str, Any]:
    """A document of the corpus as a conversation; what is no JSON of ours is plain text."""
    if document.startswith(('{"messages": ', '{"text": ')):  # preferences begin with their messages, too
        try:
            found: dict[str, Any] = json.loads(document)
            return found
        except ValueError:
            pass
    return {"text": document}


def render(
    tokenizer: Tokenizer,
    template: str,
    conversation: dict[str, Any],
    train_on: str = "assistant",
    *,
    only_last: bool = False,
    context: int | None = None,
) -> Rendered:
    """A conversation as the model sees it.

    Args:
        train_on: 'assistant' (its turns and their ends) or 'all'.
        only_last: only the last turn is trained.
        context: answers that begin behind so many tokens are not looked for.

    Raises:
        ModelError: the template refuses it, or rewrites earlier turns so that no answer can be told apart.
    """
    if "text" in conversation:
        begin, end = ([] if t is None else [t] for t in (tokenizer.begin, tokenizer.end))
        ids = np.array([*begin, *tokenizer.encode(conversation["text"]), *end], dtype=np.uint32)
        trained = np.ones(len(ids), dtype=bool)
        trained[: len(begin)] = False
        return Rendered(ids, trained, conversation["text"], [(0, len(conversation["text"]))])
    messages, tools = conversation["messages"], conversation.get("tools")

    def through(count: int, prompt: bool) -> str:
        return tokenizer.render(messages[:count], prompt=prompt, tools=tools, template=template)

    text = through(len(messages), False)
    encoded = tokenizer.encode_with_offsets(text)
    starts = np.array([s for s, _ in encoded.offsets], dtype=np.int64)
    ends = np.array([e for _, e in encoded.offsets], dtype=np.int64)
    reach = int(starts[context]) if context is not None and len(starts) > context else len(text)
    beyond = False
    spans: list[tuple[int, int]] = []
    if train_on == "all":
        spans = [(0, len(text))]
    else:
        for i, message in enumerate(messages):
            if not is_learned(message) or (only_last and i + 1 < len(messages)):
                continue
            before = through(i, True)
            if len(before) > reach and text.startswith(before):
                beyond = True
                break
            if not text.startswith(before) and text.startswith(earlier := through(i, False)):
                same = next((k for k, (a, b) in enumerate(zip(before, text)) if a != b), min(len(before), len(text)))
                before = before[: max(same, len(earlier))]  # an answer that thinks, where the prompt would begin one that does not
            after = text if i + 1 == len(messages) else through(i + 1, False)
            if text.startswith(before) and text.startswith(after) and len(after) > len(before):
                spans.append((len(before), len(before) + len(after[len(before) :].rstrip("\n"))))
        if not spans and not beyond:
            raise ModelError(
                "the chat template writes earlier turns anew, so that what the assistant says cannot be told apart",
                "对话模板会改写之前的轮次，无法区分助手的回答",
                fix="--set task.template=chatml   or plain",
                fix_zh="--set task.template=chatml   或 plain",
            )
    trained = np.zeros(len(starts), dtype=bool)
    for first, last in spans:
        trained |= (starts >= first) & (ends <= last)
    return Rendered(np.array(encoded.ids, dtype=np.uint32), trained, text, spans)


@dataclass
class ConversationStream:
    """The conversations of a split.

    Args:
        tokens: uint32 [n], memory-mapped, one after the other; trained: bool [n].
        starts: int64 [conversations + 1].
        lengths: int64 [conversations], tokens of each before it was cut.
        records: int64 [conversations], which document of the split each one is.
        bytes: UTF-8 bytes of what is trained; supervised: positions that have a target.
        facts: counts of what was cut off and left out, and why.
        key: what the stream was made of: its name in the cache.
    """

    tokens: NDArray[Any]
    trained: NDArray[Any]
    starts: NDArray[np.int64]
    lengths: NDArray[np.int64]
    records: NDArray[np.int64]
    bytes: int
    supervised: int
    facts: dict[str, Any]
    key: str

    def __len__(self) -> int:
        return len(self.records)

    def fetch(self, index: NDArray[np.int64]) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any], NDArray[Any]]:
        """Conversations, packed whole into as few rows as they fit (first fit, longest first): tokens, targets, documents and owners, int64 [rows, T].

        T is the longest one's length. Targets are IGNORED but where the next token is trained. Owners: the place in `index` of each position's
        conversation, len(index) for padding.
        """
        sizes = self.starts[index + 1] - self.starts[index] - 1  # the last token predicts nothing
        t = int(sizes.max())
        rows: list[list[int]] = []
        room: list[int] = []
        for k in np.argsort(-sizes, kind="stable"):
            row = next((r for r, left in enumerate(room) if left >= sizes[k]), None)
            if row is None:
                rows.append([])
                room.append(t)
                row = len(rows) - 1
            rows[row].append(int(k))
            room[row] -= int(sizes[k])
        tokens, targets = np.zeros((len(rows), t), dtype=np.int64), np.full((len(rows), t), IGNORED, dtype=np.int64)
        documents, owners = np.zeros((len(rows), t), dtype=np.int64), np.full((len(rows), t), len(index), dtype=np.int64)
        for r, inside in enumerate(rows):
            at = 0
            for number, k in enumerate(inside):
                start, size = int(self.starts[index[k]]), int(sizes[k])
                part = slice(at, at + size)
                ids = self.tokens[start : start + size + 1].astype(np.int64)
                tokens[r, part] = ids[:-1]
                targets[r, part] = np.where(self.trained[start + 1 : start + size + 1], ids[1:], IGNORED)
                documents[r, part], owners[r, part] = number, k
                at += size
            documents[r, at:] = len(inside)
        return tokens, targets, documents, owners


def versions(conversation: dict[str, Any]) -> list[dict[str, Any]]:
    """A preference as conversations: of each pair of its best answer with another one, the best one's and the other's."""
    messages, (best, *others) = conversation["messages"], conversation["answers"]
    rest = {k: v for k, v in conversation.items() if k == "tools"}
    return [{"messages": [*messages, {"role": "assistant", "content": a}], **rest} for other in others for a in (best, other)]


NOTHING, REFUSED = "hold nothing to learn within the context", "are refused by the chat template"
LEFT_OUT_ZH = {NOTHING: "在上下文长度内没有可学习的内容", REFUSED: "被聊天模板拒绝"}


def tokenize_conversations(
    texts: Callable[[], Iterable[str]],
    count: int,
    tokenizer: Tokenizer,
    template: str,
    *,
    context: int,
    train_on: str,
    key: str,
    progress: Callable[[str, float], None] | None = None,
) -> ConversationStream:
    """The conversations of a split as tokens, from the cache or made now. What is longer than the context is cut at its end; what then holds nothing
    to learn is left out; both are counted in `facts`.

    Raises:
        DataError: nothing is left to learn from, or the disk is full.
    """
    folder = cache.cache_folder() / f"v{cache.VERSION}" / "conversations" / f"{FORMAT}-{key}"
    if not (folder / "facts.json").is_file():
        temporary = files.temporary_sibling(folder)
        try:
            temporary.mkdir(parents=True)
            lock = cache.waited(folder.with_name(f"{folder.name}.lock"))
            try:
                if not (folder / "facts.json").is_file():  # another process may have made it meanwhile
                    _write(temporary, texts(), count, tokenizer, template, context, train_on, progress)
                    shutil.rmtree(folder, ignore_errors=True)
                    os.replace(temporary, folder)
            finally:
                lock.release()
        except OSError as error:
            raise cache.unwritable(folder, error) from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    facts = files.read_json(folder / "facts.json")
    if not facts["kept"]:
        why = "; ".join(f"{n} {reason}" for reason, n in facts["left_out"].items()) or "no conversations"
        raise DataError(
            "there is nothing to learn from: {why}", "没有可学的内容：{why}", why=why, fix="groundup data check FILE --model MODEL"
        )

    def mapped(name: str, dtype: Any) -> NDArray[Any]:
        return np.memmap(folder / name, dtype=dtype, mode="r")

    starts, lengths, records = (np.fromfile(folder / name, dtype=np.int64) for name in ("starts.bin", "lengths.bin", "records.bin"))
    return ConversationStream(
        mapped("tokens.bin", np.uint32),
        mapped("trained.bin", np.bool_),
        starts,
        lengths,
        records,
        facts["bytes"],
        facts["supervised"],
        facts,
        key,
    )


def _write(
    folder: Path, texts: Iterable[str], count: int, tokenizer: Tokenizer, template: str, context: int, train_on: str, progress: Any
) -> None:
    facts: dict[str, Any] = {"kept": 0, "cut": 0, "lost_tokens": 0, "bytes": 0, "supervised": 0, "tokens": 0, "left_out": {}}
    with contextlib.ExitStack() as stack:
        names = ("tokens.bin", "trained.bin", "starts.bin", "lengths.bin", "records.bin")
        tokens, trained, starts, lengths, records = (stack.enter_context(open(folder / name, "wb")) for name in names)
        starts.write(np.int64(0).tobytes())
        for number, text in enumerate(texts):
            if progress is not None and number % 256 == 0:
                progress("tokenising", number / max(1, count))
            conversation = parse(text)
            last = "answers" in conversation  # of a preference only the answers are compared
            try:
                made = [
                    render(tokenizer, template, c, train_on, only_last=last, context=context + 1) for c in (versions(conversation) if last else [conversation])
                ]
                reason = "" if all(m.trained[1 : context + 1].any() for m in made) else NOTHING
            except ModelError:
                made, reason = [], REFUSED
            if reason:
                facts["left_out"][reason] = facts["left_out"].get(reason, 0) + 1
                continue
            facts["cut"] += any(len(m.ids) > context + 1 for m in made)
            for m in made:
                kept = min(len(m.ids), context + 1)
                facts["lost_tokens"] += len(m.ids) - kept
                tokens.write(m.ids[:kept].tobytes())
                trained.write(m.trained[:kept].tobytes())
                facts["tokens"] += kept
                facts["supervised"] += int(m.trained[1:kept].sum())
                whole = sum(len(m.text[a:b].encode()) for a, b in m.spans)
                facts["bytes"] += round(whole * int(m.trained[1:kept].sum()) / int(m.trained[1:].sum()))
                facts["kept"] += 1
                starts.write(np.int64(facts["tokens"]).tobytes())
                lengths.write(np.int64(len(m.ids)).tobytes())
                records.write(np.int64(number).tobytes())
    files.write_json(folder / "facts.json", facts)
