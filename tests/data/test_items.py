import json
import shutil

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from conftest import TINY, small_recipe
from sqft_export.data.calibration import calibration_samples
from sqft_export.data.datasets import read_rows
from sqft_export.data.items import Data, load_tokenizer, stop_ids
from sqft_export.data.scoring import final_answer
from sqft_export.errors import UserError
from sqft_export.measure.decode import generate
from sqft_export.measure.likelihood import likelihood
from sqft_export.plan.checks import check_recipe
from sqft_export.targets import target


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(TINY)


def test_prompt_and_answer_are_the_ids_of_the_whole_text(tokenizer):
    data = Data(small_recipe(), tokenizer)
    item = json.loads((TINY / "test.jsonl").read_text().splitlines()[0])
    whole = tokenizer(f"Question: {item['question']}\nAnswer: {item['answer']}")["input_ids"]
    first = data.test[0]
    assert first.prompt + first.target == [*whole, tokenizer.eos_token_id]
    assert first.prompt[0] == tokenizer.bos_token_id
    assert data.train[0].skip < len(data.train[0].ids)


def test_examples_over_the_limit_are_cut_and_counted(tokenizer):
    data = Data(small_recipe("task.sequence_length=40"), tokenizer)
    assert data.truncated > 0
    assert max(len(e.ids) for e in data.train) == 40


def test_examples_are_tokenized_as_they_are_asked_for(tokenizer):
    asked = []

    class Watched:
        eos_token_id = tokenizer.eos_token_id

        def __call__(self, texts, **options):
            asked.extend(texts)
            return tokenizer(texts, **options)

    train = Data(small_recipe(), Watched()).train
    some = [train[7], *train[-2:]]
    assert 0 < len(asked) <= 6 < len(train)
    assert some == [
        one for at, one in enumerate(train) if at in (7, len(train) - 2, len(train) - 1)
    ]


def test_train_and_test_share_no_problem():
    train, test = (
        {json.loads(line)["question"] for line in (TINY / f"{name}.jsonl").read_text().splitlines()}
        for name in ("train", "test")
    )
    assert not train & test


def test_the_embedded_task_is_what_its_script_makes():
    import itertools

    from sqft_export.builtin.tiny.pretrain import SEED
    from sqft_export.builtin.tiny.problems import is_held_out, problems

    made = itertools.islice(problems(SEED + 1, held_out=True), 20)
    stored = [json.loads(line) for line in (TINY / "test.jsonl").read_text().splitlines()[:20]]
    assert list(made) == stored
    for item in stored:
        a, op, b = _first_step(item["answer"])
        assert is_held_out(a, op, b)


def _first_step(answer: str) -> tuple[int, str, int]:
    import re

    found = re.match(r"(\d+)([+*-])(\d+)=", answer)
    assert found
    return int(found[1]), found[2], int(found[3])


def test_text_windows_are_split_in_time_and_led_by_the_start_token(tmp_path, tokenizer):
    (tmp_path / "t.txt").write_text("\n".join(f"Tom has {i} apples." for i in range(2000)))
    recipe = small_recipe(
        f"task={{kind: text, text: {tmp_path / 't.txt'}, sequence_length: 32, test_share: 0.25}}"
    )
    data = Data(recipe, tokenizer)
    assert {len(e.ids) for e in data.train} == {32}
    assert {e.ids[0] for e in data.train} == {tokenizer.bos_token_id}
    assert len(data.test) == pytest.approx(len(data.train) / 3, rel=0.1)
    last = tokenizer.decode(data.train[-1].ids)
    first = tokenizer.decode(data.test[0].prompt + data.test[0].target)
    assert int(last.split()[-2]) < int(first.split()[2])


def test_a_text_that_is_too_short_is_refused(tmp_path, tokenizer):
    (tmp_path / "t.txt").write_text("short\ntext\n")
    recipe = small_recipe(f"task={{kind: text, text: {tmp_path / 't.txt'}}}")
    with pytest.raises(UserError, match="too short for windows of 256"):
        _ = Data(recipe, tokenizer).train


def test_too_few_calibration_samples_are_refused(tokenizer):
    recipe = small_recipe("calibration.samples=7000")
    with pytest.raises(UserError, match=r"found 7000, but the training split has 6000"):
        calibration_samples(recipe, tokenizer)


def test_calibration_reads_texts_of_its_own(tmp_path, tokenizer):
    (tmp_path / "c.txt").write_text("Tom has 3 apples. " * 200)
    (tmp_path / "c.jsonl").write_text('{"said": "Tom has 3 apples."}\n{"said": "Eva"}\n')
    settings = "calibration={samples: 2, sequence_length: 16, source: %s, field: said}"
    windows = calibration_samples(small_recipe(settings % (tmp_path / "c.txt")), tokenizer)
    assert [len(ids) for ids in windows] == [16, 16]
    assert {ids[0] for ids in windows} == {tokenizer.bos_token_id}
    texts = calibration_samples(small_recipe(settings % (tmp_path / "c.jsonl")), tokenizer)
    said = {tokenizer.decode(ids, skip_special_tokens=True) for ids in texts}
    assert said == {"Tom has 3 apples.", "Eva"}
    with pytest.raises(UserError, match=r"calibration.source: found 'c.csv'; allowed are task"):
        check_recipe(small_recipe(settings % "c.csv"), TINY)


def test_a_line_that_is_not_json_is_named(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"a": 1}\nnot json\n')
    with pytest.raises(UserError, match=r"a.jsonl:2: not JSON"):
        read_rows(tmp_path / "a.jsonl")


@pytest.mark.parametrize(
    ("text", "answer"),
    [(" 3+4=7 #### 7", "7"), ("#### 1,234 ", "1234"), ("nothing", "nothing")],
)
def test_what_is_compared_stands_after_the_last_mark(text, answer):
    assert final_answer(text, "####") == answer


def test_perplexity_is_the_cross_entropy_that_torch_computes(random_llama):
    session = target("torch").open_session(random_llama, True, None)
    prompts, targets = [[0, 5, 6], [0, 7, 8]], [[9, 10, 11], [12, 13, 1]]
    found = likelihood(session, prompts, targets)
    ids = torch.tensor([p + t for p, t in zip(prompts, targets, strict=True)])
    with torch.no_grad():
        logits = session.model(ids).logits[:, 2:-1]
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 3:].flatten())
    assert found.perplexity == pytest.approx(float(loss.exp()), rel=1e-5)


def test_greedy_generation_is_that_of_transformers(random_llama):
    session = target("torch").open_session(random_llama, True, None)
    prompts = [[0, 5, 6, 7], [0, 9, 9, 4], [0, 3]]
    ours = generate(session, prompts, 8, stop=[])
    for prompt, said in zip(prompts, ours, strict=True):
        out = session.model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
            max_new_tokens=8,
            min_new_tokens=8,
            do_sample=False,
        )
        assert out[0, len(prompt) :].tolist() == said


def test_generation_ends_before_a_stop_token(random_llama):
    session = target("torch").open_session(random_llama, True, None)
    free = generate(session, [[0, 5, 6, 7]], 8, stop=[])[0]
    stopped = generate(session, [[0, 5, 6, 7]], 8, stop=[free[3]])[0]
    assert stopped == free[: free.index(free[3])]
    assert np.array(stopped).ndim == 1


def test_every_end_token_ends_an_answer(random_llama, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(random_llama, model)
    tokenizer = AutoTokenizer.from_pretrained(model)
    (model / "generation_config.json").write_text('{"eos_token_id": [1, 7]}')
    assert stop_ids(model, tokenizer) == [1, 7]
    for wrong in ("[1, null]", "true", "-1", '"1"', "1e3", "[[1]]"):
        (model / "generation_config.json").write_text(f'{{"eos_token_id": {wrong}}}')
        with pytest.raises(UserError, match=r"generation_config.json: eos_token_id: found"):
            stop_ids(model, tokenizer)


def test_calibration_from_a_dataset_folder(tmp_path):
    """Short rows are passed over, lengths differ, the choice is seeded."""
    rows = [
        {"body": "# Title"},
        *({"body": "Tom has 3 eggs and 4 apples. " * n} for n in (2, 3, 9)),
    ]
    lines = "\n".join(json.dumps(row) for row in rows)
    (tmp_path / "train.jsonl").write_text(lines)
    options = (f"calibration={{source: {tmp_path}, field: body, samples: 3, sequence_length: 64}}",)
    recipe, tokenizer = small_recipe(*options), load_tokenizer(TINY)
    samples = calibration_samples(recipe, tokenizer)
    assert len({len(ids) for ids in samples}) == 3 and max(map(len, samples)) <= 64
    assert samples == calibration_samples(recipe, tokenizer)
    with pytest.raises(UserError, match=r"rows of .* have body"):
        recipe = small_recipe(*options, "calibration.field=text")
        calibration_samples(recipe, tokenizer)
    with pytest.raises(UserError, match=r"found 99, but .* has 3"):
        recipe = small_recipe(*options, "calibration.samples=99")
        calibration_samples(recipe, tokenizer)


def test_a_source_that_is_neither_is_refused(tmp_path):
    recipe = small_recipe(f"calibration.source={tmp_path / 'nothing'}")
    with pytest.raises(UserError, match=r"allowed are task, .* and hub:<dataset>"):
        check_recipe(recipe, TINY)
