"""What pydantic finds wrong with a value, as people say it, in English and Chinese."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from groundup.core.errors import GroundupError


def explain(problem: Mapping[str, Any]) -> tuple[str, str, bool]:
    """One of pydantic's problems in English and Chinese; and whether it is a whole sentence rather than what was expected."""
    kind, facts = problem["type"], problem.get("ctx", {})
    if kind == "value_error":
        error = facts.get("error")
        return (error.en, error.zh, True) if isinstance(error, GroundupError) else (str(error), str(error), True)
    number = {"greater_than": (">", "gt"), "greater_than_equal": (">=", "ge"), "less_than": ("<", "lt"), "less_than_equal": ("<=", "le")}
    if kind in number:
        sign, key = number[kind]
        return f"a number {sign} {facts[key]:g}", f"{sign} {facts[key]:g} 的数", False
    if kind == "literal_error":
        listed = str(facts["expected"]).replace(" or ", ", ")
        return (f"one of {listed}", f"{listed.replace(', ', '、')} 之一", False) if "," in listed else (listed, listed, False)
    if kind == "model_type":
        from groundup.core.recipe import Named, Section

        sections: list[type[Any]] = [Named, *Section.__subclasses__()]
        section = next((s for s in sections if s.__name__ == facts.get("class_name")), Named)
        first = next(iter(section.model_fields))
        return f"a mapping of keys, as {{{first}: ...}}", f"键值映射，如 {{{first}: ...}}", False
    if kind in _EXPECTED:
        return *_EXPECTED[kind], False
    return problem["msg"], problem["msg"], True


_EXPECTED = {
    "float_type": ("a number", "数字"),
    "float_parsing": ("a number", "数字"),
    "finite_number": ("a finite number", "有限的数"),
    "int_type": ("a whole number", "整数"),
    "int_parsing": ("a whole number", "整数"),
    "int_from_float": ("a whole number", "整数"),
    "string_type": ("a text", "文本"),
    "bool_type": ("true or false", "true 或 false"),
    "bool_parsing": ("true or false", "true 或 false"),
    "list_type": ("a list", "列表"),
    "tuple_type": ("a list", "列表"),
    "sequence_str": ("a list, as [one, two]", "列表，如 [甲, 乙]"),
    "dict_type": ("a mapping of keys", "键值映射"),
    "missing": ("another value in the list", "再多一个值的列表"),
    "too_long": ("a shorter list", "更短的列表"),
    "string_pattern_mismatch": ("letters, digits, '_', '-' and '.' only", "仅含字母、数字、'_'、'-' 和 '.' 的名称"),
    "invalid_key": ("a key that is text", "文本形式的键"),
}


def expectations(problems: list[Any]) -> tuple[str, str]:
    """What several problems of one key say together."""
    told = list(dict.fromkeys(explain(p) for p in problems))
    english, chinese = [en for en, _, whole in told if whole], [zh for _, zh, whole in told if whole]
    if expected := [(en, zh) for en, zh, whole in told if not whole]:
        english.append("expected " + " or ".join(en for en, _ in expected))
        joined = " 或 ".join(zh for _, zh in expected)
        chinese.append(f"应为 {joined}" if joined.isascii() or joined[0] in "'<>" else f"应为{joined}")
    return "; ".join(english), "；".join(chinese)
