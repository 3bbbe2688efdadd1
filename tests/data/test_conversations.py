"""Records as conversations: all that a message says reaches the template, and what cannot be learned from is told."""

import json

import pytest

from groundup.cli import main
from groundup.data import conversations
from groundup.data.chat_tokens import render
from groundup.data.cleaning import Reason
from groundup.data.review import remarks
from groundup.data.tokenizers import train_characters

ASKED = {"role": "user", "content": "why?"}
# Reasoning before the answer; a prompt begins an answer without any.
THINKING = (
    "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' %}[{{ m.reasoning_content or '' }}]{% endif %}{{ m.content }};{% endfor %}"
    "{% if add_generation_prompt %}<assistant>[]{% endif %}"
)


def trained(*messages):
    made = conversations.read({"messages": [ASKED, *messages]})
    assert not isinstance(made, Reason), made
    tokenizer = train_characters([json.dumps(made) + THINKING])
    shown = render(tokenizer, THINKING, made)
    return shown.text, tokenizer.decode(shown.ids[shown.trained].tolist())


def test_reasoning_is_learned_with_the_answer():
    text, learned = trained({"role": "assistant", "content": "so", "reasoning_content": "hm"})
    assert text == "<user>why?;<assistant>[hm]so;" and learned == "hm]so;"
    assert trained({"role": "assistant", "content": "so"}) == ("<user>why?;<assistant>[]so;", "so;")


def test_answers_of_weight_zero_are_not_learned():
    text, learned = trained({"role": "assistant", "content": "no", "weight": 0}, ASKED, {"role": "assistant", "content": "yes", "weight": 1})
    assert "no" in text and learned == "yes;"
    for weight, code in ((0, "nothing to learn"), (0.5, "schema")):
        assert conversations.read({"messages": [ASKED, {"role": "assistant", "content": "x", "weight": weight}]}).code == code


@pytest.mark.parametrize(
    "call, said",
    [({"function": {"name": "f", "arguments": "{not json"}}, "the arguments of the call of f are not JSON"), ({"function": {}}, "no name of a function")],
)
def test_calls_that_no_program_could_read_are_told(call, said):
    assert said in conversations.read({"messages": [ASKED, {"role": "assistant", "content": "", "tool_calls": [call]}]}).en
    fine = {"function": {"name": "f", "arguments": '{"a": 1}'}}
    assert conversations.read({"messages": [ASKED, {"role": "assistant", "content": "", "tool_calls": [fine]}]})["messages"][1]["tool_calls"] == [fine]


def test_tables_hold_lists_as_json_and_headers_have_capitals():
    turns = [ASKED, {"role": "assistant", "content": "so"}]
    assert conversations.read({"messages": json.dumps(turns), "tools": "[]"}) == {"messages": turns}
    assert conversations.read({"Instruction": "why?", "Output": "so"})["messages"] == turns
    assert conversations.read_preference({"Prompt": "why?", "Chosen": "so", "Rejected": "no"})["answers"] == ["so", "no"]


def test_control_characters_are_remarked():
    assert [r.code for r in remarks({"messages": [ASKED, {"role": "assistant", "content": "a\x00b"}]})] == ["encoding"]


def test_findings_name_their_rows_and_cleaned_files_say_what_they_are(tmp_path, capsys):
    rows = [{"messages": [{"role": "user", "content": f"question {i % 15}"}, {"role": "assistant", "content": f"answer {i}"}]} for i in range(60)]
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    assert main(["data", "check", str(data), "--json"]) == 0
    twice = [p for p in json.loads(capsys.readouterr().out)["problems"] if "evaluation split" in p["message"]]
    assert twice and twice[0]["records"][0].startswith("data.jsonl line ")
    assert main(["data", "check", str(data), "--fix", str(tmp_path / "out.csv")]) == 2
    assert "lines of JSON" in capsys.readouterr().err and not (tmp_path / "out.csv").exists()
