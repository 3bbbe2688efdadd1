"""`groundup generate` and `groundup chat`: a language model continues texts, or answers in turns; the text is shown as it comes."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from groundup import pipeline
from groundup.core import console
from groundup.core.errors import DataError, ModelError
from groundup.core.messages import say, typed
from groundup.models.generation import Sampling, TextStream, check_prompts, write


def piped(read: Callable[[], str]) -> str:
    """What comes from standard input. Raises DataError where it is not in its encoding."""
    try:
        text = read()
        text.encode()  # what Python makes of bytes that it cannot read has no encoding either
        return text
    except UnicodeError:
        raise DataError(
            "standard input is not {encoding}",
            "标准输入不是 {encoding} 编码",
            encoding=(sys.stdin.encoding or "utf-8").upper(),
            fix="iconv -f GB18030 -t UTF-8 FILE | groundup generate MODEL -",
        ) from None


def generate(model: str, prompts: Sequence[str], how: Sampling, *, as_json: bool = False, trust_code: bool = False) -> None:
    """Continues each prompt on standard output. With one prompt the text appears as it comes; several are written one after the other.

    JSON lines: {"prompt": number, "text": piece}, at the end {"done", "tokens", "seconds", "tokens_per_s", "context_full": numbers of
    the prompts whose text ended because the context was full}.
    """
    loaded, tokenizer = pipeline.language_model(model, trust_code=trust_code)
    rows = [tokenizer.encode_prompt(p) for p in prompts]
    check_prompts(loaded.model, rows)  # type: ignore[arg-type]
    how.stop_tokens = [*how.stop_tokens, *tokenizer.turn_ends()]
    begin, texts, streams = time.perf_counter(), [""] * len(rows), list[TextStream]()
    if not as_json and len(rows) == 1:
        _show(prompts[0])
    try:
        for i, piece in write(loaded.model, tokenizer, rows, how, streams, continued=True):  # type: ignore[arg-type]
            texts[i] += piece
            if as_json:
                _line({"prompt": i, "text": piece})
            elif len(rows) == 1:
                _show(piece)
    except KeyboardInterrupt:
        if not as_json and len(rows) == 1:
            _show("\n")  # what is said of it has a line of its own
        raise
    seconds, tokens = time.perf_counter() - begin, sum(len(s.ids) for s in streams)
    full = [i for i, s in enumerate(streams) if len(s.ids) < how.max_tokens and len(rows[i]) + len(s.ids) >= loaded.task.input_shape[0]]
    if as_json:
        _line({"done": True, "tokens": tokens, "seconds": round(seconds, 3), "tokens_per_s": round(tokens / seconds, 1), "context_full": full})
        return
    if len(rows) == 1:
        _show("\n")
    for prompt, text in zip(prompts, texts) if len(rows) > 1 else ():
        _show(f"{prompt}{text}\n\n")
    if full:
        console.line(say("the context of {n} tokens is full", "{n} 个词元的上下文已用满", n=loaded.task.input_shape[0]), style="yellow")
    if sys.stderr.isatty():
        sys.stderr.write(say("{n} tokens, {speed:.0f} per second\n", "{n} 个词元，每秒 {speed:.0f} 个\n", n=tokens, speed=tokens / seconds))


def chat(model: str, how: Sampling, *, system: str | None = None, as_json: bool = False, trust_code: bool = False) -> None:
    """Turns read from standard input, line by line, answers on standard output. `/reset` forgets the turns, `/quit` and Ctrl-D end.

    JSON lines: {"text": piece} as they come, {"done", "role", "content"} after each answer.
    """
    loaded, tokenizer = pipeline.language_model(model, trust_code=trust_code)
    if not tokenizer.chat_template:
        tokenizer.render([])  # says that there is none
    how.stop_tokens = [*how.stop_tokens, *tokenizer.turn_ends()]
    first = [{"role": "system", "content": system}] if system else []
    messages = list(first)
    if not as_json and "data" in loaded.card and loaded.card["task"]["name"] == "language-modeling":
        console.line(
            say(
                "! this model was trained to go on with text, not to answer: groundup tune {model} --data EXAMPLES teaches it",
                "! 这个模型只学过续写文本，没有学过对话：可用 groundup tune {model} --data 样本 来训练",
                model=typed(model),
            ),
            style="yellow",
        )
    if not as_json:
        console.line(say("/reset forgets, /quit or Ctrl-D ends", "/reset 清除对话，/quit 或 Ctrl-D 结束"), style="dim")
    while True:
        if sys.stdin.isatty() and not as_json:
            _show("> ")
        line = piped(sys.stdin.readline)
        if not line or line.strip() == "/quit":
            return
        if line.strip() == "/reset":
            messages = list(first)
            continue
        if not line.strip():
            continue
        messages.append({"role": "user", "content": line.strip()})
        prompt = tokenizer.encode_rendered(tokenizer.render(messages))
        room = loaded.task.input_shape[0] - min(how.max_tokens, loaded.task.input_shape[0] // 2)
        while len(prompt) > room and len(messages) > len(first) + 1:  # the oldest turns are forgotten first
            del messages[len(first)]
            prompt = tokenizer.encode_rendered(tokenizer.render(messages))
        answer = ""
        try:
            for _, piece in write(loaded.model, tokenizer, [prompt], how):  # type: ignore[arg-type]
                answer += piece
                _line({"text": piece}) if as_json else _show(piece)
        except KeyboardInterrupt:  # ends the answer, not the conversation
            if as_json:
                raise
        except ModelError as error:
            messages.pop()
            if as_json:
                raise
            console.line(error.localized(), style="yellow")
            continue
        _line({"done": True, "role": "assistant", "content": answer}) if as_json else _show("\n")
        messages.append({"role": "assistant", "content": answer})


def _show(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _line(value: dict[str, Any]) -> None:
    _show(json.dumps(value, ensure_ascii=False) + "\n")
