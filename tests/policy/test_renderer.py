"""Tokens in, tokens out: what was sampled is never tokenised again."""

import json
import shutil
from pathlib import Path

import pytest
from families import tokenizer as family_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from rlpost.errors import ModelError
from rlpost.policy.renderer import Renderer, render_gold
from rlpost.types import Task

DEMO = Path(__file__).parents[2] / "rlpost" / "template" / "model"
TOOL = {
    "type": "function",
    "function": {"name": "find_order", "description": "finds", "parameters": {"type": "object"}},
}
ASK = [{"role": "user", "content": "Read this receipt."}]
MORE = [{"role": "user", "content": "And the date?"}]


@pytest.fixture(scope="module", params=["demo", "family"])
def renderer(request, tmp_path_factory):
    """The demo's tokenizer, and that of the tiny random families."""
    if request.param == "demo":
        return Renderer(DEMO)
    folder = tmp_path_factory.mktemp("family")
    family_tokenizer().save_pretrained(folder)
    return Renderer(folder)


def with_template(folder, template):
    """The demo's tokenizer under another template."""
    for file in DEMO.iterdir():
        if file.suffix in (".json", ".jinja"):
            shutil.copy(file, folder / file.name)
    (folder / "chat_template.jinja").write_text(template)
    return Renderer(folder)


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


# ── prompts ────────────────────────────────────────────────────────────────────────────────────


def test_the_prompt_is_the_template_of_the_model(renderer):
    text = renderer.text(ASK)
    expected = renderer.tokenizer.apply_chat_template(
        ASK, add_generation_prompt=True, enable_thinking=False, tokenize=False
    )
    assert text == expected
    assert renderer.prompt(ASK) == renderer.tokenizer.encode(text, add_special_tokens=False)
    assert renderer.tokenizer.decode(renderer.prompt(ASK)) == text


def test_thinking_is_always_passed_on(tmp_path):
    told = CHATML + "{% if enable_thinking is defined %}thinking={{ enable_thinking }}{% endif %}"
    with_template(tmp_path, told)
    assert Renderer(tmp_path, thinking=True).text(ASK).endswith("thinking=True")
    assert Renderer(tmp_path).text(ASK).endswith("thinking=False")


def test_a_reply_ends_with_the_token_that_the_template_writes_behind_it(renderer):
    assert renderer.tokenizer.decode([renderer.stop_token_ids[0]]) == "<|im_end|>"
    assert len(set(renderer.stop_token_ids)) == len(renderer.stop_token_ids)


def test_the_stop_tokens_of_the_generation_config_count_as_well(tmp_path):
    with_template(tmp_path, CHATML)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 7]}))
    assert {2, 7} <= set(Renderer(tmp_path).stop_token_ids)


def test_the_reply_is_without_its_stop_token_and_shows_other_special_ones(renderer):
    ids = renderer.tokenizer.encode("fine", add_special_tokens=False)
    stop = renderer.stop_token_ids[0]
    start = renderer.tokenizer.convert_tokens_to_ids("<|im_start|>")
    assert renderer.reply([*ids, stop]) == "fine"
    assert renderer.reply(ids) == "fine"
    assert renderer.reply([start, *ids]) == "<|im_start|>fine"  # run-on chat must be seen
    assert renderer.reply([]) == ""


# ── the second turn ────────────────────────────────────────────────────────────────────────────


def test_a_dialogue_of_sampled_tokens_reads_as_the_template_would_write_it(renderer):
    sampled = [
        *renderer.tokenizer.encode('{"total": "3.50"}', add_special_tokens=False),
        renderer.stop_token_ids[0],
    ]
    between = renderer.continuation(ASK, MORE, reply_ids=sampled)
    whole = renderer.prompt(ASK) + sampled + between
    said = [*ASK, {"role": "assistant", "content": '{"total": "3.50"}'}, *MORE]
    # the template may write no thinking block before an earlier reply, where the prompt had one
    head = renderer.text(ASK)
    tail = renderer.text(said).split('{"total": "3.50"}', 1)[1]
    assert renderer.tokenizer.decode(whole) == head + '{"total": "3.50"}' + tail


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_whatever_tokens_were_sampled_they_stand_in_the_next_prompt_as_they_are(data):
    """Random ids: invalid UTF-8, spellings the tokenizer would never choose, special tokens."""
    renderer = _demo()
    special = set(renderer.stop_token_ids)
    ids = data.draw(st.lists(st.integers(3, 300), min_size=1, max_size=12))
    ids = [i for i in ids if i not in special]
    ended = data.draw(st.booleans())
    sampled = [*ids, renderer.stop_token_ids[0]] if ended else ids
    between = renderer.continuation(ASK, MORE, reply_ids=sampled)
    plain = renderer.continuation(ASK, MORE, reply_ids=[])
    assert plain[0] == renderer.stop_token_ids[0]
    assert (between == plain[1:]) if ended else (between == plain)  # the end is said once


_DEMO: list[Renderer] = []


def _demo():
    if not _DEMO:
        _DEMO.append(Renderer(DEMO))
    return _DEMO[0]


def test_a_continuation_depends_on_the_reply_only_by_its_end(renderer):
    stop = renderer.stop_token_ids[0]
    first = renderer.continuation(ASK, MORE, reply_ids=[5, 6, stop])
    assert first == renderer.continuation(ASK, MORE, reply_ids=[9, 9, 9, stop])


def test_a_reply_ended_by_another_stop_token_still_gets_the_templates_end_of_turn(renderer):
    other = renderer.tokenizer.convert_tokens_to_ids("<|endoftext|>")
    between = renderer.continuation(ASK, MORE, reply_ids=[5, other])
    assert between[0] == renderer.stop_token_ids[0]


def test_a_template_that_forgets_earlier_replies_is_refused_for_dialogues(tmp_path):
    forgetful = with_template(
        tmp_path,
        "{% for m in messages %}{% if m['role'] == 'user' %}<|im_start|>user\n{{ m['content'] }}"
        "<|im_end|>\n{% endif %}{% endfor %}<|im_start|>assistant\n",
    )
    with pytest.raises(ModelError, match="does not keep earlier replies"):
        forgetful.continuation(ASK, MORE, reply_ids=[5])


# ── what a template cannot do ──────────────────────────────────────────────────────────────────


def test_tools_are_shown_by_the_demos_template():
    renderer = Renderer(DEMO)
    renderer.check(Task(id="a", messages=ASK, tools=[TOOL]))
    assert "find_order" in renderer.text(ASK, tools=[TOOL])
    assert renderer.prompt(ASK, tools=[TOOL]) != renderer.prompt(ASK)


def test_a_template_that_shows_tools_passes_and_one_that_does_not_is_refused(tmp_path):
    ask = Task(id="a", messages=ASK, tools=[TOOL])
    (tmp_path / "with").mkdir()
    (tmp_path / "without").mkdir()
    showing = "{% for t in tools or [] %}{{ t | tojson }}{% endfor %}" + CHATML
    with_template(tmp_path / "with", showing).check(ask)
    with pytest.raises(ModelError, match="does not show tools to the model"):
        with_template(tmp_path / "without", CHATML).check(ask)


def test_a_template_that_drops_the_system_message_is_refused(tmp_path):
    quiet = CHATML.replace(
        "{% for m in messages %}", "{% for m in messages if m['role'] != 'system' %}"
    )
    ask = Task(id="a", messages=[{"role": "system", "content": "Answer in JSON."}, *ASK])
    with pytest.raises(ModelError, match=r"drops the system message.*move its text"):
        with_template(tmp_path, quiet).check(ask)


def test_a_template_that_refuses_the_messages_is_quoted(tmp_path):
    strict = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('No system!') }}{% endif %}"
    )
    with pytest.raises(ModelError, match="No system!"):
        with_template(tmp_path, strict + CHATML).text([{"role": "system", "content": "x"}, *ASK])


def test_a_model_without_a_template_is_refused(tmp_path):
    with_template(tmp_path, CHATML)
    (tmp_path / "chat_template.jinja").unlink()
    with pytest.raises(ModelError, match="has no chat template; take an instruct model"):
        Renderer(tmp_path)


def test_a_folder_without_a_tokenizer_is_refused(tmp_path):
    shutil.copy(DEMO / "config.json", tmp_path)
    (tmp_path / "chat_template.jinja").write_text(CHATML)
    with pytest.raises(ModelError, match="tokenizer"):
        Renderer(tmp_path)


# ── gold ───────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("answer", "text"),
    [("plain", "plain"), ({"a": "é"}, '{"a": "é"}'), ([1, None], "[1, null]"), (3, "3")],
)
def test_a_gold_answer_is_written_as_the_reply_it_would_be(answer, text):
    assert render_gold(answer) == text
