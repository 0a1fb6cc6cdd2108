"""Text sessions: answers of every runtime, streaming, stop texts, the cache, and their limits."""

import shutil
from pathlib import Path

import pytest

import sqft_export
from conftest import test_prompts
from sqft_export.errors import UserError
from sqft_export.inference.templates import read_special_tokens, render_conversation
from sqft_export.inference.text import cut_stream
from sqft_export.report.document import read_report
from sqft_export.report.verdict import best_deployment

TEMPLATE = (
    "{% for m in messages %}{{ m.role | capitalize }}: {{ m.content }}\n{% endfor %}Assistant:"
)
CONVERSATION = [{"role": "user", "content": "Tom has 3 apples. He buys 4 more. How many?"}]
FORMS = [
    ("export-openvino", "model"),
    ("export-openvino", "packed"),
    ("export-openvino", "sparse"),
    ("export-onnx", "model"),
    ("export-onnx", "packed"),
    ("export-gguf", "model"),
    ("export-gguf", "packed"),
    ("merge", "model"),
]


@pytest.fixture(scope="module")
def reference(tiny_run) -> list[str]:
    """Answers of the merged model by torch in float32."""
    from sqft_export.inference.text import TextSession
    from sqft_export.targets import torch as in_torch

    folder = tiny_run["merge"].path / "model"
    session = TextSession(folder, in_torch.open_session(folder, True, None))
    return [session.generate(prompt, 12) for prompt in test_prompts(6)]


@pytest.mark.parametrize(("stage", "form"), FORMS)
def test_every_form_of_a_deployment_answers_as_the_merged_model(tiny_run, reference, stage, form):
    """Runtimes round activations by default, so a few of the greedy answers may differ."""
    session = sqft_export.load(tiny_run[stage].path / form)
    answers = [session.generate(prompt, 12) for prompt in test_prompts(6)]
    same = sum(one == other for one, other in zip(answers, reference, strict=True))
    assert same >= 4, (answers, reference)
    assert session.speed.tokens_per_second > 0
    assert session.template is None  # the embedded task has plain prompts


def test_a_stream_is_the_answer_in_pieces(tiny_run):
    session = sqft_export.load(tiny_run["export-onnx"].path / "model")
    (prompt,) = test_prompts(1)
    pieces = list(session.stream(prompt, 12))
    assert len(pieces) > 4
    assert "".join(pieces) == session.generate(prompt, 12)
    stopped = session.generate(prompt, 12, stop=[pieces[3]])
    assert stopped == "".join(pieces).partition(pieces[3])[0]


def test_messages_without_a_template_are_refused(tiny_run):
    session = sqft_export.load(tiny_run["export-onnx"].path / "model")
    with pytest.raises(UserError, match="no chat template"):
        session.generate(CONVERSATION)


@pytest.mark.parametrize("stage", ["export-openvino", "export-onnx", "export-gguf", "merge"])
def test_an_empty_prompt_is_refused_or_starts_at_the_start_token(tiny_run, stage):
    session = sqft_export.load(tiny_run[stage].path / "model")
    if session.encode(""):
        assert session.generate("", 2) is not None
        session.tokenizer.no_padding()
        session.tokenizer.post_processor = None  # as a tokenizer without start token
    with pytest.raises(UserError, match="the prompt has no tokens: it is empty"):
        session.generate("", 2)


def test_a_prompt_beyond_the_context_is_refused(tiny_run):
    session = sqft_export.load(tiny_run["export-onnx"].path / "model")
    with pytest.raises(UserError, match=f"context of .* is {session.context} tokens"):
        session.generate("word " * (session.context + 1))


@pytest.fixture(scope="module", params=["export-openvino", "export-onnx", "export-gguf"])
def chat_session(request, tiny_run, tmp_path_factory):
    """A deployment with a chat template, as a chat task leaves it; its seal is taken off."""
    folder = tmp_path_factory.mktemp("chat") / "model"
    shutil.copytree(tiny_run[request.param].path / "model", folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    (folder / "provenance.json").unlink()
    return sqft_export.load(folder)


def test_messages_are_rendered_with_the_template_of_the_folder(chat_session):
    tokens = read_special_tokens(chat_session.folder)
    text = render_conversation(TEMPLATE, CONVERSATION, tokens)
    ids = chat_session.tokenizer.encode(text, add_special_tokens=False).ids
    assert chat_session.encode(CONVERSATION) == ids


def test_a_continued_conversation_computes_only_its_new_tokens(chat_session):
    """And gives the same answer as the whole conversation at once."""
    first = chat_session.generate(CONVERSATION, 8)
    longer = [
        *CONVERSATION,
        {"role": "assistant", "content": first.strip()},
        {"role": "user", "content": "Tom eats 2. How many are left?"},
    ]
    prompt = chat_session.encode(longer)
    continued = chat_session.generate(longer, 8)
    computed = chat_session.speed.prompt_tokens
    fresh = sqft_export.load(chat_session.folder)
    assert fresh.generate(longer, 8) == continued
    assert fresh.speed.prompt_tokens == len(prompt)
    assert computed < len(prompt)


def test_stop_texts_are_found_across_pieces():
    pieces = ["one ", "tw", "o th", "ree ", "four"]
    assert "".join(cut_stream(pieces, ["two"])) == "one "
    assert "".join(cut_stream(pieces, ["e four", "zzz"])) == "one two thre"
    assert "".join(cut_stream(pieces, [])) == "one two three four"
    assert list(cut_stream(pieces, [])) == pieces  # nothing waits without stop texts


def test_characters_of_several_tokens_are_whole(tiny_run):
    """A token may hold only the first byte of a character."""
    session = sqft_export.load(tiny_run["export-gguf"].path / "model")
    text = "Grüße 世界 👍🏽 e\u0301"
    ids = session.tokenizer.encode(text, add_special_tokens=False).ids
    assert "".join(session._decode(ids)) == session.tokenizer.decode(ids)
    assert all("\ufffd" not in piece for piece in session._decode(ids))


def test_a_run_is_its_best_deployment(tiny_run):
    from sqft_export.inference.locate import deployments_of_run, find_deployment

    run = tiny_run["report"].path.parent
    found = {one.name for one in deployments_of_run(run)}
    assert {"OpenVINO", "ONNX Runtime", "llama.cpp", "llama.cpp, packed"} <= found
    report = read_report(tiny_run["report"].path / "report.json")
    taken = find_deployment(run)
    assert taken.row.id == report.best.id
    ours = [row for row in report.rows if row.kind == "deployment"]
    best = best_deployment(report.rows)
    highest = max(row.accuracy for row in ours)
    assert best.interval[1] >= highest
    for row in ours:
        if row.interval[1] >= highest:
            assert row.tpot.median_ms >= best.tpot.median_ms
    assert sqft_export.load(run).folder == taken.path


def test_verified_deployments_are_found_before_the_report(tiny_run, tmp_path):
    """A run can be used while its comparison with other models goes on."""
    from sqft_export.inference.locate import deployments_of_run, find_deployment

    run = tiny_run["report"].path.parent
    for name, artifact in tiny_run.items():
        if name not in ("benchmark", "report"):
            (tmp_path / artifact.path.name).symlink_to(artifact.path)
    measured = deployments_of_run(run)
    ours = {
        one.name for one in measured if "lora" not in one.path.name and one.execution == "stock"
    }
    assert {one.name for one in deployments_of_run(tmp_path)} == ours
    assert find_deployment(tmp_path).row is None
    (tmp_path / tiny_run["verify"].path.name).unlink()
    with pytest.raises(UserError, match="neither a deployment nor a finished run"):
        find_deployment(tmp_path)


def test_a_folder_that_is_neither_deployment_nor_run_is_told(tmp_path):
    with pytest.raises(UserError, match="neither a deployment nor a finished run"):
        sqft_export.load(tmp_path)
    with pytest.raises(UserError, match="no such folder"):
        sqft_export.load(Path("nowhere"))
