"""Rows of chat data as conversations."""

import json

import pytest

from sqft_export.data.columns import conversation_of, drop_seen, kind_of_rows
from sqft_export.errors import UserError

USER = {"role": "user", "content": "Hi"}
ANSWER = {"role": "assistant", "content": "Hello"}
CALL = {"name": "f", "arguments": {"x": 1}}
SCHEMA = {"name": "f", "parameters": {"type": "object", "properties": {}}}


def messages_of(row: dict, **options) -> list[dict]:
    return conversation_of(row, "data.jsonl:3", **options).messages


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [USER, ANSWER]},
        {"messages": json.dumps([USER, ANSWER])},
        {"messages": [USER | {"name": None, "tool_calls": None}, ANSWER]},
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
        {"conversations": [USER, ANSWER]},
        {"prompt": "Hi", "completion": "Hello"},
        {"prompt": [USER], "completion": [ANSWER]},
        {"prompt": [USER], "completion": "Hello"},
        {"instruction": "Hi", "output": "Hello"},
        {"instruction": "Hi", "input": "", "output": "Hello"},
        {"instruction": "Hi", "input": None, "output": "Hello"},
        {"prompt": "Hi", "answer": "Hello", "id": 7},
        {"messages": [USER | {"content": [{"type": "text", "text": "Hi"}]}, ANSWER]},
    ],
)
def test_every_kind_of_row_is_the_same_conversation(row):
    assert messages_of(row) == [USER, ANSWER]


def test_alpaca_input_follows_the_instruction():
    row = {"instruction": "Add", "input": "1 2", "output": 3, "system": "Be brief."}
    system, user, answer = messages_of(row)
    assert system == {"role": "system", "content": "Be brief."}
    assert (user["content"], answer["content"]) == ("Add\n\n1 2", "3")


def test_a_mapping_names_other_columns():
    row = {"question": "Hi", "reply": "Hello", "prompt": "other"}
    mapping = {"prompt": "question", "completion": "reply"}
    assert kind_of_rows(row, "data.csv", mapping) == "completion"
    assert messages_of(row, mapping=mapping) == [USER, ANSWER]


def test_answers_of_a_prompt_are_given():
    row = {"prompt": [USER, ANSWER, USER], "completion": [ANSWER]}
    assert conversation_of(row, "x").prompt == 3
    assert conversation_of({"messages": [USER, ANSWER]}, "x").prompt == 0


def test_tools_and_calls_take_the_form_that_templates_expect():
    flat = {"role": "assistant", "content": None, "tool_calls": [CALL]}
    text = {"role": "assistant", "tool_calls": [{"function": CALL | {"arguments": '{"x": 1}'}}]}
    shared = {"from": "function_call", "value": json.dumps(CALL)}
    expected = {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"type": "function", "function": CALL}],
    }
    for called in (flat, text, shared):
        row = {"messages": [USER, called, {"from": "observation", "value": "2"}, ANSWER]}
        found = conversation_of(row | {"tools": json.dumps([SCHEMA])}, "x")
        assert found.messages == [USER, expected, {"role": "tool", "content": "2"}, ANSWER]
        assert found.tools == [{"type": "function", "function": SCHEMA}]
    assert conversation_of({"messages": [USER, ANSWER], "tools": ""}, "x").tools is None


def test_fields_that_templates_read_are_kept():
    row = {"messages": [USER, ANSWER | {"reasoning_content": "hm"}]}
    assert messages_of(row)[1]["reasoning_content"] == "hm"


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"text": "x"}, r"data\.jsonl:3: found the columns text; chat data has messages; conv"),
        ({"prompt": "x", "chosen": "y"}, "found the columns prompt, chosen; chat data has"),
        ({"messages": []}, "messages: found a list; a list of messages is expected"),
        ({"messages": "[{"}, "messages: not JSON"),
        ({"messages": ["Hi"]}, r"messages\[0\]: found a str"),
        ({"messages": [{"role": "narrator", "content": "x"}]}, r"messages\[0\]: role: found 'narr"),
        ({"messages": [{"content": "x"}]}, "role: found None"),
        ({"messages": [USER, {"role": "assistant"}]}, r"messages\[1\]: content: found null"),
        ({"messages": [USER]}, "has no message of the assistant"),
        ({"messages": [USER, ANSWER | {"weight": 0}]}, "weight: found 0"),
        ({"prompt": "Hi", "completion": True}, "completion: found a bool"),
        ({"instruction": "x", "output": {"a": 1}}, "output: found a dict"),
        ({"messages": [USER, ANSWER], "tools": "{}"}, "tools: found a dict"),
        (
            {"messages": [USER, ANSWER | {"content": [{"type": "image"}]}]},
            "found a block of image; only text",
        ),
        ({"messages": [USER, ANSWER | {"tool_calls": ["f"]}]}, "a list of {name, arguments}"),
    ],
)
def test_a_wrong_row_is_named_with_what_is_allowed(row, said):
    with pytest.raises(UserError, match=r"data\.jsonl:3") as error:
        conversation_of(row, "data.jsonl:3")
    assert error.match(said)


def test_a_later_row_without_a_column_and_a_mapping_without_one():
    with pytest.raises(UserError, match=r"data\.csv:9: reply is missing or null; found the col"):
        conversation_of(
            {"prompt": "Hi", "reply": None},
            "data.csv:9",
            kind="completion",
            mapping={"completion": "reply"},
        )
    with pytest.raises(UserError, match=r"task\.columns names answr"):
        kind_of_rows(["prompt", "answer"], "data.csv", {"answer": "answr"})


def test_rows_that_were_trained_on_are_set_apart():
    """Two kinds of rows may hold the same conversation."""
    train = [conversation_of({"prompt": "Hi", "completion": "Hello"}, "train.jsonl:1")]
    same = conversation_of({"messages": [USER, ANSWER]}, "test.jsonl:1")
    other = conversation_of({"messages": [USER, ANSWER], "tools": [SCHEMA]}, "test.jsonl:2")
    new, old = drop_seen([same, other], train)
    assert new == [other] and old == [same]
