"""Named templates, their arguments, length limits, and the text that shows the loss."""

import json

import pytest
from chat_cases import (
    CONVERSATIONS,
    FIRST,
    SECOND,
    SYSTEM,
    TINY,
    TOOLS,
    encoder_of,
    loss_spans,
    tokenizer_with,
)
from transformers import AutoTokenizer

from sqft_export.data.chat import ChatEncoder, Conversation
from sqft_export.data.chat_template import ChatTemplate
from sqft_export.data.loss_text import mark_loss
from sqft_export.errors import UserError

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
WITH_TOOLS = "{{ tools | tojson + '\n' }}" + CHATML
CHOSEN = "{% if mood %}{{ mood + '\n' }}{% endif %}{% if shout is defined %}!{% endif %}" + CHATML


def test_named_templates_are_chosen_by_name_and_by_tools(tmp_path):
    """As tokenizer_config.json has a list of them."""
    tokenizer_with(CHATML).save_pretrained(tmp_path)
    (tmp_path / "chat_template.jinja").unlink(missing_ok=True)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config["chat_template"] = [
        {"name": "default", "template": CHATML},
        {"name": "tool_use", "template": WITH_TOOLS},
        {"name": "loud", "template": "LOUD " + CHATML},
    ]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    plain, loud = (ChatEncoder(ChatTemplate(tokenizer, name)) for name in (None, "loud"))
    assert plain.encode(CONVERSATIONS["single"]).text.startswith("<|im_start|>user")
    assert plain.encode(Conversation([*FIRST], TOOLS)).text.startswith('[{"type"')
    assert loud.encode(CONVERSATIONS["single"]).text.startswith("LOUD <|im_start|>")
    with pytest.raises(UserError, match=r"task\.template: found 'quiet'.*default, tool_use, loud"):
        ChatTemplate(tokenizer, "quiet", place="recipe.yaml: task.template")


def test_a_template_of_ones_own_and_none_at_all():
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    with pytest.raises(UserError, match=r"the tokenizer has no chat template; set task\.template"):
        ChatTemplate(tokenizer)
    encoded = ChatEncoder(ChatTemplate(tokenizer, CHATML)).encode(CONVERSATIONS["turns"])
    assert loss_spans(encoded) == ["Hello you<|im_end|>", "So long<|im_end|>"]
    with pytest.raises(UserError, match=r"not a Jinja template: line 1"):
        ChatTemplate(tokenizer, "{% if %}")


def test_arguments_reach_the_template_and_unknown_ones_are_refused():
    found = encoder_of(CHOSEN, arguments={"mood": "calm"}).encode(CONVERSATIONS["single"])
    assert found.text.startswith("calm\n<|im_start|>")
    with pytest.raises(
        UserError, match=r"argument 'moood' is unknown; the template reads mood, shout"
    ):
        encoder_of(CHOSEN, arguments={"moood": "calm"})
    with pytest.raises(UserError, match="argument 'add_generation_prompt' is unknown"):
        encoder_of(CHOSEN, arguments={"add_generation_prompt": True})


def test_templates_with_todays_date_are_known():
    assert encoder_of("{{ strftime_now('%d %b %Y') }}" + CHATML).template.writes_date
    assert not encoder_of(CHATML).template.writes_date


def test_templates_run_in_a_sandbox():
    spy = "{{ messages.__class__.__mro__[1].__subclasses__() }}" + CHATML
    with pytest.raises(UserError, match="refuses the conversation"):
        encoder_of(spy).encode(CONVERSATIONS["single"])


def test_whole_exchanges_are_left_out_from_the_start():
    encoder = encoder_of(CHATML)
    long = Conversation([SYSTEM, *FIRST, *SECOND, *FIRST])
    whole, last = encoder.encode(long), encoder.encode(Conversation([SYSTEM, *FIRST]))
    kept = encoder.encode(Conversation([SYSTEM, *SECOND, *FIRST]))
    for limit in range(len(last.ids), len(whole.ids) + 2):
        found = encoder.encode_within(long, limit)
        expected = next(one for one in (whole, kept, last) if len(one.ids) <= limit)
        assert (found.ids, found.loss, found.cut) == (expected.ids, expected.loss, 0)
        assert found.text.startswith("<|im_start|>system\nBe brief.")
    assert encoder.encode_within(long, len(whole.ids) - 1).dropped == 2


def test_one_exchange_that_is_too_long_is_cut_at_its_end():
    encoder = encoder_of(CHATML)
    last = encoder.encode(Conversation([*SECOND]))
    found = encoder.encode_within(CONVERSATIONS["turns"], len(last.ids) - 3)
    assert found.ids == last.ids[:-3] and found.cut > 0 and found.dropped == 2
    assert len(found.ids) == len(found.loss) == len(found.offsets)
    assert not any(encoder.encode_within(CONVERSATIONS["single"], 4).loss)


def test_given_answers_stay_out_of_the_loss_after_truncation():
    encoder = encoder_of(CHATML)
    conversation = Conversation([SYSTEM, *FIRST, *SECOND, *FIRST], prompt=5)
    assert loss_spans(encoder.encode(conversation)) == ["Hello you<|im_end|>"]
    limit = len(encoder.encode(conversation).ids) - 1
    assert loss_spans(encoder.encode_within(conversation, limit)) == ["Hello you<|im_end|>"]


def test_the_last_answer_follows_its_prompt():
    """What is generated on, and what perplexity is measured on."""
    encoder = encoder_of(CHATML)
    encoded = encoder.encode(CONVERSATIONS["turns"])
    start, end = encoded.last_answer
    assert encoder.prompt_ids(CONVERSATIONS["turns"]) == encoded.ids[:start]
    assert encoder.template.tokenizer.decode(encoded.ids[start:end]) == "So long<|im_end|>"


def test_marked_templates_use_their_markers():
    marked = CHATML.replace(
        "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}",
        "{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}{% generation %}"
        "{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}"
        "{{ '<|im_end|>\n' }}",
    )
    encoder = encoder_of(marked)
    assert loss_spans(encoder.encode(CONVERSATIONS["turns"])) == ["Hello you", "So long"]
    given = Conversation(CONVERSATIONS["turns"].messages, prompt=3)
    assert loss_spans(encoder.encode(given)) == ["So long"]


def test_the_loss_is_shown_in_brackets():
    encoder = encoder_of(CHATML)
    first, *lines = mark_loss(encoder.encode(CONVERSATIONS["system"])).split("\n")
    assert lines == [
        "<|im_start|>system",
        "Be brief.<|im_end|>",
        "<|im_start|>user",
        "Hi there<|im_end|>",
        "<|im_start|>assistant",
        "\u27e6Hello you<|im_end|>\u27e7",
        "<|im_start|>user",
        "Bye now<|im_end|>",
        "<|im_start|>assistant",
        "\u27e6So long<|im_end|>\u27e7",
        "",
    ]
    encoded = encoder.encode(CONVERSATIONS["system"])
    assert first.startswith(f"{len(encoded.ids)} tokens, {sum(encoded.loss)} in the loss")


def test_shown_text_is_cut_escaped_and_says_what_is_left_out():
    encoder = encoder_of(CHATML)
    bell = [{"role": "user", "content": "a\x1b[31mb\x07" + "x" * 500}, FIRST[1]]
    shown = mark_loss(encoder.encode(Conversation(bell)), longest=300)
    assert "\\x1b[31mb\\x07" in shown and "\x1b" not in shown
    assert "characters ...]" in shown and shown.endswith("Hello you<|im_end|>\u27e7\n")
    limit = len(encoder.encode(CONVERSATIONS["turns"]).ids) - 1
    assert "2 messages at the start left out" in mark_loss(
        encoder.encode_within(CONVERSATIONS["turns"], limit)
    )
    emoji = Conversation([FIRST[0], {"role": "assistant", "content": "\U0001f600"}])
    assert "\u27e6\U0001f600<|im_end|>\u27e7" in mark_loss(encoder.encode(emoji))
