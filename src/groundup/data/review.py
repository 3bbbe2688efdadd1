"""What deserves a look in examples: secrets, personal data, broken encoding, absurd turns."""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator
from typing import Any

from groundup.data.cleaning import Reason

LONG = 50_000  # characters of a turn that nobody wrote as one
SENSITIVE = ("secret", "personal data")

SECRETS = {
    "a private key": r"-----BEGIN (?:[A-Z]+ )*PRIVATE KEY-----",
    "a key of AWS": r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b",
    "a token of GitHub": r"\b(?:gh[pousr]_[A-Za-z0-9]{36,}|github_pat_[A-Za-z0-9_]{60,})",
    "a token of Hugging Face": r"\bhf_[A-Za-z0-9]{30,}",
    "an API key": r"\bsk-(?:[a-z]+-)*[A-Za-z0-9_-]{20,}|\bAIza[0-9A-Za-z_-]{35}|\bxox[abprs]-[0-9A-Za-z-]{10,}",
    "a JSON web token": r"\beyJ[A-Za-z0-9_-]{10,}\.eyJ[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]{10,}",
    "a password": r"(?i:\b(?:password|passwd|api[_-]?key|secret[_-]?key|access[_-]?token)\b\"?\s*[:=]\s*[\"'][^\s\"'{<$]{8,}[\"'])"
    r"|(?i:\b(?:password|passwd)\b\s*[:=]\s*)(?=\S*\d)(?=\S*[A-Za-z])[^\s\"'{<$]{6,}",
    "a password in an address": r"\b[a-z][a-z0-9+.-]*://[^\s:/@]+:[^\s:/@{<$]{3,}@[\w.-]+",
}
PERSONAL = {
    "an e-mail address": r"\b[A-Za-z0-9][A-Za-z0-9._%+-]*@(?:[A-Za-z0-9-]+\.)+[A-Za-z]{2,}\b",
    "a telephone number": r"(?<![\d.])(?:\+\d{1,3}[ -]?(?:\(\d{1,4}\)[ -]?)?\d{2,4}(?:[ -]?\d{2,4}){2,3}|1[3-9]\d{9}|\(\d{3}\) ?\d{3}-\d{4}|\d{3}-\d{3}-\d{4})(?![\d.])",
    "an identity number": r"(?<!\d)[1-9]\d{5}(?:19|20)\d{2}(?:0[1-9]|1[0-2])(?:0[1-9]|[12]\d|3[01])\d{3}[\dXx](?!\d)",
    "a social security number (US)": r"(?<![\d-])(?!000|666|9)\d{3}-(?!00)\d{2}-(?!0000)\d{4}(?![\d-])",
    "a card number": r"(?<![\d.-])(?:\d[ -]?){12,18}\d(?![\d.-])",
    "an account number (IBAN)": r"\b[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){3,7}(?: ?[A-Z0-9]{1,3})?\b",
}
# Addresses and numbers that documents use because they are nobody's (RFC 2606; North American 555).
NOBODY = re.compile(
    r"@(?:[\w-]+\.)*(?:example|test|invalid|localhost|domain|email)\b|@(?:[\w-]+\.)*(?:example)\.\w+|\b555[ -]|123-456-7890"
)
CONTROL = re.compile(r"[\x00-\x08\x0b\x0e-\x1f]")
MOJIBAKE = re.compile(r"�|Ã[\x80-\xbf©¨¡¢¤¶¼]|â€[™œ“”\x9d¦]|锟斤拷|烫烫烫|屯屯屯|ï¿½")
_SECRET = re.compile("|".join(f"(?P<s{i}>{p})" for i, p in enumerate(SECRETS.values())))
# What a secret has in it, lower case: quick to look for, where the patterns are slow.
_SECRET_HINTS = ("private key", "akia", "asia", "ghp_", "gho_", "ghu_", "ghs_", "ghr_", "github_pat_", "hf_", "sk-", "aiza", "xox", "eyj", "://")
_NAMED_HINTS = (
    "passw",
    "api_key",
    "api-key",
    "apikey",
    "secret_key",
    "secret-key",
    "secretkey",
    "access_token",
    "access-token",
    "accesstoken",
)
_NUMBERS = re.compile("|".join(f"(?P<p{i}>{p})" for i, p in enumerate(PERSONAL.values()) if i))
_DIGIT = re.compile(r"\d")
_NUMBERS_HINT = re.compile(r"\d[\d ()-]{6,}\d|[A-Z]{2}\d\d")
_EMAIL = re.compile(next(iter(PERSONAL.values())))
_LOOP = re.compile(r"(.{1,60}?)\1{9,}", re.DOTALL)


def sensitive(text: str) -> Iterator[tuple[str, str]]:
    """Secrets and personal data in a text: (one of SENSITIVE, what it is). Numbers with check digits are checked."""
    lower = text.lower()
    if any(hint in lower for hint in (*_SECRET_HINTS, *_NAMED_HINTS)):
        for hit in _SECRET.finditer(text):
            yield SENSITIVE[0], list(SECRETS)[int((hit.lastgroup or "s0")[1:])]
    if "@" in text:
        for hit in _EMAIL.finditer(text):
            if not NOBODY.search(hit.group()):
                yield SENSITIVE[1], "an e-mail address"
    if _DIGIT.search(text) and _NUMBERS_HINT.search(text):
        for hit in _NUMBERS.finditer(text):
            what = list(PERSONAL)[int((hit.lastgroup or "p0")[1:])]
            if not NOBODY.search(hit.group()) and _checks(what, hit.group()):
                yield SENSITIVE[1], what


def _checks(what: str, number: str) -> bool:
    """Whether the check digits of a number are right (GB 11643 for Chinese identity numbers, Luhn for cards, ISO 13616 for accounts)."""
    plain = re.sub(r"[ -]", "", number)
    if what == "an identity number":
        return "10X98765432"[sum(int(d) * 2 ** (17 - i) for i, d in enumerate(plain[:17])) % 11] == plain[17].upper()
    if what == "a card number":
        doubled = [int(d) * (2 if i % 2 else 1) for i, d in enumerate(reversed(plain))]
        return plain[0] in "3456" and len(plain) in (13, 14, 15, 16, 19) and sum(d - 9 if d > 9 else d for d in doubled) % 10 == 0
    if what == "an account number (IBAN)":
        return len(plain) >= 15 and int("".join(str(int(c, 36)) for c in plain[4:] + plain[:4])) % 97 == 1
    return True


def remarks(conversation: dict[str, Any]) -> list[Reason]:
    """What is odd about a conversation as `conversations.read` gives it; at most one remark of each kind."""
    turns = conversation.get("messages", [])
    said = [value for turn in turns for key, value in turn.items() if key != "role" and isinstance(value, str)]
    parts = [conversation["text"]] if "text" in conversation else said + conversation.get("answers", [])
    whole = "\n".join(parts)
    found: dict[str, Reason] = {}
    held = list(dict.fromkeys(sensitive(whole)))
    for kind in dict.fromkeys(kind for kind, _ in held):
        whats = [what for of, what in held if of == kind]
        found[kind] = Reason(kind, f"it holds {', '.join(whats)}", f"含有：{'、'.join(SENSITIVE_ZH[w].strip() for w in whats)}")
    if broken := CONTROL.search(whole) or (None if whole.isascii() else MOJIBAKE.search(whole)):
        found["encoding"] = Reason("encoding", f"broken characters: {broken.group()!r}", f"乱码：{broken.group()!r}")
    for number, turn in enumerate(turns, 1):
        if reason := _absurd(number, turn, turns[number - 2] if number > 1 else None):
            found.setdefault("absurd", reason)
    return list(found.values())


def _absurd(number: int, turn: dict[str, Any], before: dict[str, Any] | None) -> Reason | None:
    text = turn["content"]
    if len(text) > LONG:
        return Reason("absurd", f"turn {number} has {len(text):,} characters", f"第 {number} 轮有 {len(text):,} 个字符")
    if turn["role"] != "assistant":
        return None
    if before is not None and before["role"] == "user" and len(text) > 20 and text.strip() == before["content"].strip():
        return Reason("absurd", f"turn {number} repeats the question", f"第 {number} 轮只是重复问题")
    small = (
        len(text) > 200 and len(zlib.compress(text.encode("utf-8", "replace"), 1)) < len(text) / 5
    )  # the search alone would take too long
    if small and (loop := _LOOP.search(text)) and len(loop.group()) > len(text) / 2 and loop.group(1).strip():
        return Reason(
            "absurd", f"turn {number} goes round in a loop: {loop.group(1)[:20]!r}", f"第 {number} 轮不断重复：{loop.group(1)[:20]!r}"
        )
    if text.strip() and not re.search(r"\w", text) and len(text) > 3:
        return Reason("absurd", f"turn {number} has neither a letter nor a digit", f"第 {number} 轮没有任何文字或数字")
    return None


SENSITIVE_ZH = {
    "a private key": "私钥", "a key of AWS": "AWS 密钥", "a token of GitHub": "GitHub 令牌", "a token of Hugging Face": "Hugging Face 令牌",
    "an API key": " API 密钥", "a JSON web token": " JSON Web 令牌", "a password": "密码", "a password in an address": "网址中的密码", "a social security number (US)": "美国社会安全号码",
    "an e-mail address": "电子邮箱", "a telephone number": "电话号码",
    "an identity number": "身份证号", "a card number": "银行卡号", "an account number (IBAN)": "银行账号（IBAN）",
}  # fmt: skip
