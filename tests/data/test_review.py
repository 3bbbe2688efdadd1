"""What deserves a look in examples: found where it is, and not where it is not."""

import json

import pytest

from groundup.data.review import remarks, sensitive


@pytest.mark.parametrize(
    "text, what",
    [
        ("key: AKIAIOSFODNN7ABCDEFG", "a key of AWS"),
        ("ghp_" + "a1B2" * 9, "a token of GitHub"),
        ("export HF=hf_" + "aB3d" * 8, "a token of Hugging Face"),
        ("sk-proj-" + "Ab1_" * 8, "an API key"),
        ("-----BEGIN RSA PRIVATE KEY-----", "a private key"),
        ('"password": "hunter2hunter2"', "a password"),
        ("write to jane.roe@university.edu please", "an e-mail address"),
        ("call 13812345678", "a telephone number"),
        ("call +44 20 7946 0958", "a telephone number"),
        ("身份证 11010519491231002X", "an identity number"),
        ("card 4111 1111 1111 1111", "a card number"),
        ("IBAN DE89 3704 0044 0532 0130 00", "an account number (IBAN)"),
    ],
)
def test_secrets_and_personal_data_are_found(text, what):
    assert what in [found for _, found in sensitive(text)]


@pytest.mark.parametrize(
    "text",
    [
        "user@example.com and 555-0100", "version 1.23.4567890", "the sum is 12345678901234567", "card 4111 1111 1111 1112", "11010519491231002A",
        "task-management skills", "hf_token = os.environ['HF']", "password: ''", "ISBN 978-3-16-148410-0", "2026-11-23 10:00:00", "春眠不觉晓", "a@b",
        "GB00", "1 000 000 000 000", "123-456-7890",
    ],
)  # fmt: skip
def test_what_only_looks_like_it_is_not(text):
    assert list(sensitive(text)) == []


def conversation(answer, question="why?"):
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


@pytest.mark.parametrize(
    "answer, code",
    [
        ("â€œhelloâ€\x9d", "encoding"), ("锟斤拷锟斤拷", "encoding"), ("bad \ufffd", "encoding"), ("x" * 60_000, "absurd"),
        ("I am sorry. " * 60, "absurd"), ("?!...", "absurd"), ("tell me about the sky please", "absurd"),
    ],
)  # fmt: skip
def test_broken_and_absurd_turns(answer, code):
    assert [r.code for r in remarks(conversation(answer, "tell me about the sky please"))] == [code]
    assert remarks(conversation("Because of the light. " + "It is so. 天空是蓝色的。")) == []


def test_check_writes_a_clean_file_and_what_it_left_out(tmp_path, capsys):
    from groundup.cli import main

    rows = [{"instruction": f"question {i}", "output": f"answer {i}"} for i in range(30)]
    rows += [{"instruction": "mail?", "output": "jane.roe@university.edu"}, {"instruction": "bad", "output": ""}, rows[0]]
    data, out = tmp_path / "数据.jsonl", tmp_path / "clean file.jsonl"
    data.write_text("\n".join(json.dumps(r, ensure_ascii=False) for r in rows), encoding="utf-8")
    assert main(["data", "check", str(data), "--fix", str(out), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["fixed"]["kept"] == 30 and facts["fixed"]["removed"] == 3
    kept = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    removed = [json.loads(line) for line in (tmp_path / "clean file.jsonl.removed.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(kept) == 30 and {r["code"] for r in removed} == {"empty", "exact duplicate", "personal data"}
    assert any("an e-mail address" in record for p in facts["problems"] for record in p["records"])
    assert main(["data", "check", str(out), "--lang", "zh"]) == 0 and "没有发现问题" in capsys.readouterr().out
    assert main(["data", "check", str(data), "--fix", str(out)]) == 2 and "exists already" in capsys.readouterr().err
