"""Records of the field's formats as conversations: OpenAI messages, ShareGPT, Alpaca, prompt and completion, plain text; preference pairs and ranked lists.

A conversation is kept as one line of JSON, `{"messages": [{"role", "content"}, ...], "tools": [...]}` or `{"text": ...}`, so that all that is done with
text (copies, splits, what is left out and why) is done with conversations in the same way. Preferences are `{"messages": [...], "answers": [...]}`: the
turns before the answer, and its versions, the best one first.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from typing import Any

from groundup.data.cleaning import Reason

ROLES = ("system", "user", "assistant", "tool")
# What other systems call the roles, and ShareGPT's speakers.
SPEAKERS = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "model": "assistant", "chatgpt": "assistant", "system": "system",
    "developer": "system", "tool": "tool", "observation": "tool", "function_response": "tool", "ipython": "tool", "function_call": "assistant",
}  # fmt: skip
PROMPTS, COMPLETIONS = ("prompt", "question", "query", "input", "text_a"), ("completion", "response", "answer", "output", "target")
PREFERENCE = {"chosen", "rejected", "rejected_response", "responses", "answers"}
PREFERENCES = "chosen, rejected (with prompt, messages, conversations or instruction); prompt, responses (answers) with scores or ranks"
FORMATS = "messages; conversations (ShareGPT); instruction, input, output (Alpaca); prompt, completion; text"


KINDS = {
    "NoneType": ("null", " null"), "str": ("text", "文本"), "list": ("a list", "列表"), "dict": ("an object", "对象"), "bool": ("true or false", "布尔值"),
    "int": ("a number", "数字"), "float": ("a number", "数字"),
}  # fmt: skip


def kind_of(value: Any) -> tuple[str, str]:
    """What a value is in JSON, in English and Chinese."""
    return KINDS.get(type(value).__name__, (type(value).__name__,) * 2)


def not_a_record(value: Any) -> Reason:
    found, found_zh = kind_of(value)
    return Reason("not a record", f"{found} where an object is expected", f"应为对象，却是{found_zh}", damaged=True)


def turns_key(value: Any) -> str | None:
    """Under which name a bare list of turns would stand in a record; None for what is no such list."""
    if not isinstance(value, list) or not value or not isinstance(value[0], dict):
        return None
    return next((key for mark, key in (("role", "messages"), ("from", "conversations")) if all(mark in v for v in value)), None)


def read(record: Any) -> dict[str, Any] | Reason:
    """A record as a conversation, or why it is none. Turns are counted from 1."""
    if isinstance(record, str):
        return {"text": record} if record.strip() else EMPTY_TEXT
    if not isinstance(record, dict):
        return not_a_record(record)
    record = _tidy(record)
    if PREFERENCE & record.keys():
        return Reason(
            "preference",
            "a preference, not a conversation: it has several answers to choose from",
            "这是偏好数据，不是对话：它有多个可选的回答",
            damaged=True,
        )
    if record.get("label") is False:
        return Reason("disliked", "its answer is marked as a bad one (label: false)", "它的回答被标为不好（label: false）", damaged=True)
    turns: list[Any] | Reason
    if isinstance(record.get("messages"), list):
        turns = _openai(record["messages"])
    elif isinstance(record.get("conversations", record.get("conversation")), list):
        turns = _sharegpt(record.get("conversations", record.get("conversation")), record.get("system"))
    elif "instruction" in record:
        turns = _alpaca(record)
    else:
        turns = _pair(record)
        if turns == [] and isinstance(record.get("text"), str):
            return {"text": record["text"]} if record["text"].strip() else EMPTY_TEXT
        if turns == []:
            if (key := next((k for k in ("messages", "conversations", "conversation") if k in record), None)) is not None:
                found, found_zh = kind_of(record[key])
                return Reason(
                    "format", f"{key} is {found} where a list of turns is expected", f"{key} 应为对话轮次的列表，却是{found_zh}", damaged=True
                )
            listed = ", ".join(map(str, record)) or "(none)"
            return Reason(
                "format",
                f"no format that is known: it has {listed}; known: {FORMATS}; {PREFERENCES}",
                f"格式未知：字段有 {listed}；支持：{FORMATS}；{PREFERENCES}",
                damaged=True,
            )
    if isinstance(turns, Reason):
        return turns
    if (reason := wrong(turns)) is not None:
        return reason
    tools = _tools(record)
    if isinstance(tools, Reason):
        return tools
    tests = record.get("tests", record.get("test_list"))  # what the code of an answer must pass, for pass@1
    if isinstance(tests, list):
        tests = "\n".join(map(str, tests))
    return {"messages": turns} | ({"tools": tools} if tools else {}) | ({"tests": tests} if isinstance(tests, str) and tests else {})


def read_preference(record: Any) -> dict[str, Any] | Reason:
    """A record as a preference: the turns before an answer, and two or more answers, the best one first."""
    record = _tidy(record) if isinstance(record, dict) else record
    if not isinstance(record, dict) or not PREFERENCE & record.keys():
        return Reason("format", f"no preference; known: {PREFERENCES}", f"不是偏好数据；支持：{PREFERENCES}", damaged=True)
    if "responses" in record or "answers" in record:
        answers = _ranked(record.get("responses", record.get("answers")), record.get("scores"), record.get("ranks", record.get("ranking")))
        before = _before(record)
    else:
        good, bad = record.get("chosen"), record.get("rejected", record.get("rejected_response"))
        before = _before(record)
        if good is None and not isinstance(before, Reason) and before and before[-1]["role"] == "assistant":
            good, before = before[-1]["content"], before[:-1]  # messages that end in the better answer
        if isinstance(good, list) and isinstance(bad, list) and not before:  # two conversations that differ in their ends
            first, second = _openai(good), _openai(bad)
            if isinstance(first, Reason) or isinstance(second, Reason):
                return first if isinstance(first, Reason) else second  # type: ignore[return-value]
            same = next((i for i, (a, b) in enumerate(zip(first, second)) if a != b), min(len(first), len(second)))
            before, good, bad = first[:same], first[same:], second[same:]
        answers = [_last(good), _last(bad)]
    if isinstance(before, Reason):
        return before
    if isinstance(answers, Reason):
        return answers
    for number, answer in enumerate(answers, 1):
        if not isinstance(answer, str) or not answer.strip():
            return Reason("empty", f"answer {number} is no text or empty", f"第 {number} 个回答为空或不是文本", damaged=True)
        if (reason := wrong([*before, {"role": "assistant", "content": answer}])) is not None:
            return reason
    if len(set(answers)) < len(answers):
        return Reason("nothing to learn", "two of its answers are the same", "其中两个回答相同", damaged=True)
    tools = _tools(record)
    if isinstance(tools, Reason):
        return tools
    return {"messages": before, "answers": answers} | ({"tools": tools} if tools else {})


KEYS = {"messages", "conversations", "conversation", "instruction", "history", "system", "tools", "text", *PROMPTS, *COMPLETIONS, *PREFERENCE}


def _tidy(record: dict[str, Any]) -> dict[str, Any]:
    """Keys as we know them, however they are capitalised; lists of turns that a table's cells hold as JSON."""
    if not record.keys() & KEYS:
        record = {(k.lower() if isinstance(k, str) and k.lower() in KEYS else k): v for k, v in record.items()}
    found = {}
    for key in ("messages", "conversations", "conversation", "chosen", "rejected", "responses", "answers", "scores", "ranks"):
        value = record.get(key)
        if isinstance(value, str) and value.lstrip().startswith("["):
            with contextlib.suppress(ValueError):
                found[key] = json.loads(value)
    return record | found if found else record


def _before(record: dict[str, Any]) -> list[Any] | Reason:
    """The turns before the answers; an empty list where the record has none of its own."""
    if isinstance(record.get("messages"), list):
        return _openai(record["messages"])
    if isinstance(record.get("conversations"), list):
        return _sharegpt(record["conversations"], record.get("system"))
    if "instruction" in record:
        turns = _alpaca(record | {"output": ""})
        return turns if isinstance(turns, Reason) else turns[:-1]
    turns = _pair({**{k: record[k] for k in (*PROMPTS, "system") if k in record}, "completion": ""})
    return turns if isinstance(turns, Reason) else turns[:-1]


def _last(answer: Any) -> Any:
    """The text of an answer: a text, a message, or a list of one message."""
    if isinstance(answer, list) and len(answer) == 1:
        answer = answer[0]
    if isinstance(answer, dict):
        answer = answer.get("content", answer.get("value"))
    return answer


def _ranked(responses: Any, scores: Any, ranks: Any) -> list[Any] | Reason:
    """Answers by their scores (high is better) or ranks (1 is best), which stand beside them or in them; as they stand where there are none."""
    if not isinstance(responses, list) or len(responses) < 2:
        return Reason("schema", "'responses' is not a list of two or more", "'responses' 不是至少两项的列表", damaged=True)
    texts = [r.get("text", r.get("response", r.get("content"))) if isinstance(r, dict) else r for r in responses]
    own = [[r.get(key) if isinstance(r, dict) else None for r in responses] for key in ("score", "rank")]
    scores, ranks = (given if isinstance(given, list) else inside for given, inside in zip((scores, ranks), own))
    order = (
        scores
        if any(s is not None for s in scores)
        else [None if r is None else -r for r in ranks if r is None or isinstance(r, int | float)]
    )
    if all(o is None for o in order):
        return texts
    if len(order) != len(texts) or not all(isinstance(o, int | float) for o in order):
        return Reason("schema", "not every answer has a score or a rank", "不是每个回答都有分数或名次", damaged=True)
    best = max(order)
    if all(o == best for o in order):
        return Reason("nothing to learn", "all its answers are equally good", "所有回答同样好", damaged=True)
    top = order.index(best)  # of those that are as good as the best one, one: the rest says nothing
    return [texts[top], *(t for _, t in sorted(((-o, t) for o, t in zip(order, texts) if o < best), key=lambda pair: pair[0]))]


def as_read(conversation: dict[str, Any]) -> str:
    """A conversation or preference as a line of a file that `read` or `read_preference` makes the same of."""
    if "answers" not in conversation:
        return line(conversation)
    return line({("responses" if k == "answers" else k): v for k, v in conversation.items()})


def line(conversation: dict[str, Any]) -> str:
    return json.dumps(conversation, ensure_ascii=False)


def wrong(turns: Sequence[dict[str, Any]]) -> Reason | None:
    """What is wrong with the turns of a conversation."""
    if not turns:
        return EMPTY_TEXT._replace(en="the conversation is empty")
    before = ""
    for number, turn in enumerate(turns, 1):
        role = turn["role"]
        if role == "system" and number > 1:
            return _order(number, "'system' may only come first", "'system' 只能在最前面")
        if role == before and role in ("user", "system"):
            return _order(number, f"'{role}' follows '{role}'", f"'{role}' 接在 '{role}' 之后")
        if role == "tool" and before not in ("assistant", "tool"):
            return _order(number, "'tool' follows no call", "'tool' 之前没有调用")
        if role == "assistant" and before in ("", "system"):
            return _order(number, "'assistant' speaks before 'user'", "'assistant' 在 'user' 之前发言")
        if not turn["content"].strip() and not turn.get("tool_calls"):
            return Reason("empty", f"turn {number} ('{role}') is empty", f"第 {number} 轮（'{role}'）为空", damaged=True)
        before = role
    if not any(turn["role"] == "assistant" for turn in turns):
        return Reason("nothing to learn", "it has no turn of the assistant", "没有 assistant 的发言", damaged=True)
    if not any(is_learned(turn) for turn in turns):
        return Reason("nothing to learn", "all its answers have weight 0", "所有回答的 weight 都是 0", damaged=True)
    return None


def is_learned(turn: dict[str, Any]) -> bool:
    """Whether a turn is one that the model learns to say."""
    return turn["role"] == "assistant" and turn.get("weight", 1) != 0


EMPTY_TEXT = Reason("empty", "the text is empty", "内容为空", damaged=True)


def _order(number: int, why: str, why_zh: str) -> Reason:
    return Reason("order", f"turn {number}: {why}", f"第 {number} 轮：{why_zh}", damaged=True)


def _text(value: Any) -> str | None:
    """The text of a message's content: a string, null, or parts of which only those of text are read."""
    if value is None:
        return ""
    if isinstance(value, list) and all(isinstance(p, dict) and p.get("type") == "text" and isinstance(p.get("text"), str) for p in value):
        return "".join(p["text"] for p in value)
    return value if isinstance(value, str) else None


def _call_problem(call: dict[str, Any]) -> tuple[str, str] | None:
    """What is wrong with a call of a tool; its arguments are an object, or one written as JSON."""
    function = call.get("function", call)
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        return "a call has no name of a function", "有一个调用没有函数名"
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except ValueError:
            name = function["name"]
            return f"the arguments of the call of {name} are not JSON", f"对 {name} 的调用，其参数不是 JSON"
    return None


def _turn(number: int, role: Any, content: Any, calls: Any = None, more: dict[str, Any] | None = None) -> dict[str, Any] | Reason:
    """more: what else a message says, for its template: reasoning_content, name, tool_call_id ...; `weight` 0 (of OpenAI's format): not to be learned."""
    known = SPEAKERS.get(role.lower()) if isinstance(role, str) else None
    if known is None:
        shown = repr(role)
        return Reason("role", f"turn {number} has role {shown}; expected one of {', '.join(ROLES)}",
                      f"第 {number} 轮的角色是 {shown}；应为 {', '.join(ROLES)} 之一", damaged=True)  # fmt: skip
    text = _text(content)
    if text is None:
        return Reason("content", f"turn {number}: its content is not text", f"第 {number} 轮：内容不是文本", damaged=True)
    if calls is not None and not (isinstance(calls, list) and all(isinstance(c, dict) for c in calls)):
        return Reason(
            "content", f"turn {number}: tool_calls is not a list of objects", f"第 {number} 轮：tool_calls 不是对象列表", damaged=True
        )
    if problem := next((p for call in calls or [] if (p := _call_problem(call))), None):
        return Reason("content", f"turn {number}: {problem[0]}", f"第 {number} 轮：{problem[1]}", damaged=True)
    more = {k: v for k, v in (more or {}).items() if k not in ("role", "content", "tool_calls") and v is not None}
    if more.get("weight", 1) not in (0, 1):
        return Reason("schema", f"turn {number}: weight is neither 0 nor 1", f"第 {number} 轮：weight 应为 0 或 1", damaged=True)
    return {"role": known, "content": text, **({"tool_calls": calls} if calls else {}), **more}


def _all(turns: Sequence[dict[str, Any] | Reason]) -> list[Any] | Reason:
    return next((t for t in turns if isinstance(t, Reason)), list(turns))


def _openai(messages: list[Any]) -> list[Any] | Reason:
    made: list[dict[str, Any] | Reason] = []
    for number, message in enumerate(messages, 1):
        if not isinstance(message, dict) or "role" not in message:
            return Reason("schema", f"turn {number} has no 'role'", f"第 {number} 轮没有 'role'", damaged=True)
        made.append(_turn(number, message["role"], message.get("content"), message.get("tool_calls"), message))
    return _all(made)


def _sharegpt(turns: Any, system: Any) -> list[Any] | Reason:
    made: list[dict[str, Any] | Reason] = [_turn(0, "system", system)] if isinstance(system, str) and system.strip() else []
    for number, turn in enumerate(turns, 1):
        speaker = turn.get("from", turn.get("role")) if isinstance(turn, dict) else None
        if speaker is None:
            return Reason("schema", f"turn {number} has no 'from'", f"第 {number} 轮没有 'from'", damaged=True)
        value = turn.get("value", turn.get("content"))
        if speaker == "function_call":
            try:
                calls = json.loads(value)
            except (TypeError, ValueError):
                return Reason("content", f"turn {number}: the call is not JSON", f"第 {number} 轮：调用不是 JSON", damaged=True)
            made.append(
                _turn(number, speaker, "", [{"type": "function", "function": c} for c in (calls if isinstance(calls, list) else [calls])])
            )
        else:
            made.append(_turn(number, speaker, value, more={"weight": turn.get("weight")}))
    return _all(made)


def _alpaca(record: dict[str, Any]) -> list[Any] | Reason:
    instruction, more, output = (record.get(k) or "" for k in ("instruction", "input", "output"))
    if "output" not in record:
        return Reason("schema", "it has 'instruction' and no 'output'", "有 'instruction' 但没有 'output'", damaged=True)
    history = record.get("history") or []
    if not isinstance(history, list) or not all(isinstance(h, list | tuple) and len(h) == 2 for h in history):
        return Reason("schema", "'history' is not a list of pairs", "'history' 不是成对的列表", damaged=True)
    if not all(isinstance(v, str) for v in (instruction, more, output)):
        return Reason("content", "instruction, input and output must be texts", "instruction、input、output 应为文本", damaged=True)
    turns: list[tuple[str, Any]] = [("system", record["system"])] if record.get("system") else []
    for asked, answered in history:
        turns += [("user", asked), ("assistant", answered)]
    turns += [("user", f"{instruction}\n{more}" if more.strip() else instruction), ("assistant", output)]
    return _all([_turn(n, role, content) for n, (role, content) in enumerate(turns, 1)])


def _pair(record: dict[str, Any]) -> list[Any] | Reason:
    """A question and its answer, texts or lists of messages; an empty list where there is no such pair."""
    prompt = next((k for k in PROMPTS if k in record), None)
    completion = next((k for k in COMPLETIONS if k in record and k != prompt), None)
    if prompt is None or completion is None:
        return []
    first, second = record[prompt], record[completion]
    before = _openai(first) if isinstance(first, list) else _all([_turn(1, "user", first)])
    if isinstance(before, Reason):
        return before
    after = _openai(second) if isinstance(second, list) else _all([_turn(len(before) + 1, "assistant", second)])
    if isinstance(after, Reason):
        return after
    system = record.get("system")
    return ([{"role": "system", "content": system}] if isinstance(system, str) and system.strip() else []) + before + after


def _tools(record: dict[str, Any]) -> list[Any] | Reason:
    value = record.get("tools")
    if isinstance(value, str) and value.strip():
        try:
            value = json.loads(value)
        except ValueError:
            return Reason("schema", "'tools' is not JSON", "'tools' 不是 JSON", damaged=True)
    if value is not None and not isinstance(value, list | str):
        return Reason("schema", "'tools' is not a list", "'tools' 不是列表", damaged=True)
    return value if isinstance(value, list) else []
