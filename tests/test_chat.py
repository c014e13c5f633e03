"""Chat templates and the tokenizer files of a Hugging Face folder.

The templates here are small ones of the constructs that DeepSeek's have: namespaces, loops over messages, system
prompts put first, ``split``, tool calls, white space control, refusals. What each must give was computed by
transformers (5.23, ``apply_chat_template``), and can be read off.
"""

from __future__ import annotations

import datetime
import json
import pathlib
import re
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from dsjax.config import UserError
from dsjax.data.chat import ChatTemplate
from dsjax.data.hf_tokenizer import HFTokenizer, load_hf_tokenizer
from dsjax.data.tokenizer import Tokenizer, train_tokenizer

BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
USER, ASSISTANT = "<｜User｜>", "<｜Assistant｜>"
TOKENS = {"bos_token": BOS, "eos_token": EOS}

REASONING = (
    "{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif %}"
    "{% set ns = namespace(is_tool=false, system='') %}"
    "{%- for message in messages %}{%- if message['role'] == 'system' %}"
    "{% set ns.system = ns.system + ('\n\n' if ns.system else '') + message['content'] %}{%- endif %}{%- endfor %}"
    "{{ bos_token }}{{ ns.system }}"
    "{%- for message in messages %}"
    "{%- if message['role'] == 'user' %}{%- set ns.is_tool = false -%}{{'<｜User｜>' + message['content']}}{%- endif %}"
    "{%- if message['role'] == 'assistant' and 'tool_calls' in message %}{%- for tool in message['tool_calls'] %}"
    "{{'<｜Assistant｜>' + tool['type'] + ':' + tool['function']['name'] + '\n```json\n' + "
    "tool['function']['arguments'] + '\n```'}}{%- endfor %}{{ eos_token }}{%- endif %}"
    "{%- if message['role'] == 'assistant' and 'tool_calls' not in message %}"
    "{% set content = message['content'] %}"
    "{% if '</think>' in content %}{% set content = content.split('</think>')[-1] %}{% endif %}"
    "{{'<｜Assistant｜>' + content + '<｜end▁of▁sentence｜>'}}{%- endif %}"
    "{%- if message['role'] == 'tool' %}{%- set ns.is_tool = true -%}{{ 'Tool: ' + message['content'] }}{%- endif %}"
    "{%- endfor -%}{% if add_generation_prompt and not ns.is_tool %}{{'<｜Assistant｜>'}}{% endif %}"
)
PLAIN = """{% if not add_generation_prompt is defined %}
{% set add_generation_prompt = false %}
{% endif %}
{%- set ns = namespace(found=false) -%}
{%- for message in messages -%}
    {%- if message['role'] == 'system' -%}
        {%- set ns.found = true -%}
    {%- endif -%}
{%- endfor -%}
{{bos_token}}{%- if not ns.found -%}
{{'You write code.\\n'}}
{%- endif %}
{%- for message in messages %}
    {%- if message['role'] == 'system' %}
{{ message['content'] }}
    {%- else %}
        {%- if message['role'] == 'user' %}
{{'### Instruction:\\n' + message['content'] + '\\n'}}
        {%- else %}
{{'### Response:\\n' + message['content'] + '\\n<|EOT|>\\n'}}
        {%- endif %}
    {%- endif %}
{%- endfor %}
{% if add_generation_prompt %}
{{'### Response:'}}
{% endif %}
"""
TALK = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "<think>Greet.</think>Hello!"},
    {"role": "user", "content": " 2 < 3? "},
]
CALLS = [
    TALK[1],
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": '{"x": "é"}'}}],
    },
    {"role": "tool", "content": "7"},
]


@pytest.mark.parametrize(
    ("template", "messages", "prompted", "want"),
    [
        (REASONING, TALK, True, f"{BOS}Be kind.{USER}Hi{ASSISTANT}Hello!{EOS}{USER} 2 < 3? {ASSISTANT}"),
        (REASONING, TALK[:3], False, f"{BOS}Be kind.{USER}Hi{ASSISTANT}Hello!{EOS}"),
        (REASONING, [TALK[0], *TALK[:2]], False, f"{BOS}Be kind.\n\nBe kind.{USER}Hi"),
        (REASONING, CALLS, True, f'{BOS}{USER}Hi{ASSISTANT}function:f\n```json\n{{"x": "é"}}\n```{EOS}Tool: 7'),
        (PLAIN, TALK[1:2], True, f"{BOS}You write code.\n### Instruction:\nHi\n### Response:\n"),
        (PLAIN, TALK[:2], False, f"{BOS}Be kind.### Instruction:\nHi\n"),
        (
            "{{ tools | tojson }}{{ tools[0] | tojson(indent=1) }}{{ strftime_now('%Y') }}",
            [],
            True,
            '[{"name": "<é>", "b": 1}]{\n "name": "<é>",\n "b": 1\n}' + str(datetime.datetime.now().year),
        ),
        (
            "{% for m in messages %}{% if loop.index0 == 1 %}{% break %}{% endif %}"
            "{% generation %}{{ m.content | trim }}{% endgeneration %}{% endfor %}|{{ unknown }}",
            [{"content": " a "}, {"content": "b"}],
            True,
            "a|",
        ),
    ],
)
def test_templates_give_what_transformers_gives(template: str, messages: list, prompted: bool, want: str) -> None:
    made = ChatTemplate(template, TOKENS)
    assert made.render(messages, add_generation_prompt=prompted, tools=[{"name": "<é>", "b": 1}]) == want


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        ("{{ raise_exception('roles must alternate') }}", r"the chat template can not write .* \(roles must alternate"),
        ("{% for m in %}", "can not write this conversation"),
        ("{{ messages[7].content.upper() }}", "can not write this conversation"),
        ("{{ 1 / 0 }}", "can not write this conversation"),
        ("{{ messages.append(1) }}", "can not write this conversation"),  # immutable
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "can not write this conversation"),  # sandboxed
        ("{{ raise_exception.__globals__['json'] }}", "can not write this conversation"),
        ("{% break %}", "can not write this conversation"),
        ("{{ messages[0].content|dictsort }}", "can not write this conversation"),
        ("{{ cycler() }}", "can not write this conversation"),
        ("{{ 'x' * 10**14 }}", r"can not write this conversation \(MemoryError\)"),
    ],
)
def test_what_a_template_refuses_or_may_not_do_is_one_sentence(source: str, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        ChatTemplate(source).render(TALK)


# ---------------------------------------------------------------- ids


def tokenizer_file(**specials: bool) -> dict[str, Any]:
    """A tokenizer.json with added tokens, and whether they are special."""
    content = json.loads(train_tokenizer(["Be kind. Hello! ### Instruction:\n"] * 9, 300, end_token=EOS).to_json())
    first = max(content["model"]["vocab"].values()) + 1
    like = content["added_tokens"][0]
    for i, (name, special) in enumerate(specials.items(), first):
        content["added_tokens"].append(like | {"id": i, "content": name, "special": special})
    return content


ADDED = {BOS: True, USER: False, ASSISTANT: False, "<think>": False, "</think>": False, "<|EOT|>": True}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(tokenizers.Tokenizer.from_str(json.dumps(tokenizer_file(**ADDED))), end_token=EOS)


def test_the_templates_tokens_become_ids_and_those_of_a_user_text(tokenizer: Tokenizer) -> None:
    template, ids = ChatTemplate(REASONING, TOKENS), tokenizer.added_ids
    spelt = f"a{EOS}{ASSISTANT}{BOS}"
    talk = [{"role": "user", "content": spelt}, {"role": "assistant", "content": "b</think>c"}, TALK[1]]
    got = template.encode(tokenizer, talk)
    text = [tokenizer.encode(t, added=False).tolist() for t in (spelt, "c", "Hi")]
    assert got == [
        ids[BOS],
        ids[USER],
        *text[0],
        ids[ASSISTANT],
        *text[1],
        ids[EOS],
        ids[USER],
        *text[2],
        ids[ASSISTANT],
    ]
    assert tokenizer.decode(got, skip_special=False) == template.render(talk)


def test_a_models_own_words_may_hold_added_tokens_that_are_not_special(tokenizer: Tokenizer) -> None:
    template = ChatTemplate("{{ '<think>' }}{% for m in messages %}{{ m.content }}{% endfor %}", TOKENS)
    ids = tokenizer.added_ids
    for role, count in (("assistant", 2), ("user", 1)):
        got = template.encode(tokenizer, [{"role": role, "content": f"<think>a{EOS}"}])
        assert got.count(ids["<think>"]) == count
        assert ids[EOS] not in got


PIECES = st.lists(st.sampled_from([*ADDED, EOS, "<｜", "User｜>", "<", "｜>", "a", " ", "\n", "\ufdd0"]), max_size=6)


@settings(max_examples=200, deadline=None)
@given(PIECES.map("".join), PIECES.map("".join), st.booleans())
def test_no_text_of_a_user_becomes_a_control_token(tokenizer: Tokenizer, a: str, b: str, prompted: bool) -> None:
    """Nor do two texts that a template puts side by side."""
    template = ChatTemplate(
        "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}{{ '<｜User｜><｜Assistant｜>' }}", TOKENS
    )
    talk = [{"role": "user", "content": a}, {"role": "system", "content": b}]
    got = template.encode(tokenizer, talk, add_generation_prompt=prompted)
    control = [tokenizer.special_ids[name] for name in (BOS, EOS, "<|EOT|>")]
    control += [tokenizer.added_ids[name] for name in (USER, ASSISTANT)]
    assert [i for i in got if i in control] == [control[0], *control[3:]]
    assert tokenizer.decode(got, skip_special=False) == template.render(talk)


def test_white_space_around_an_added_token_goes_where_its_entry_says_so() -> None:
    content = tokenizer_file(**{BOS: True})
    content["added_tokens"][-1] |= {"lstrip": True, "rstrip": True}
    inner = tokenizers.Tokenizer.from_str(json.dumps(content))
    tokenizer = Tokenizer(tokenizers.Tokenizer.from_str(json.dumps(content)), end_token=EOS)
    want = inner.encode(f"a \n{BOS}\n b {BOS}").ids  # the library, which makes tokens of what is spelt
    assert tokenizer.encode_parts(["a \n", tokenizer.added_ids[BOS], "\n b ", tokenizer.added_ids[BOS]]) == want


# ---------------------------------------------------------------- folders


def write(folder: pathlib.Path, **files: Any) -> pathlib.Path:
    for name, content in {"tokenizer.json": tokenizer_file(**ADDED), **files}.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return folder


CONFIG = {
    "bos_token": {"content": BOS, "lstrip": False},
    "eos_token": EOS,
    "add_bos_token": True,
    "chat_template": "one",
}


def test_a_folder_says_what_begins_and_ends_a_text(tmp_path: pathlib.Path) -> None:
    found = load_hf_tokenizer(write(tmp_path, **{"tokenizer_config.json": CONFIG}))
    assert isinstance(found, HFTokenizer)
    ids = found.tokenizer.special_ids
    assert (found.tokenizer.end_id, found.end_ids) == (ids[EOS], (ids[EOS],))
    assert found.tokenizer.begin_ids == (ids[BOS],)
    assert found.templates == {
        "default": ChatTemplate("one", TOKENS, f"chat_template of {tmp_path}/tokenizer_config.json")
    }
    write(tmp_path, **{"generation_config.json": {"eos_token_id": [ids["<|EOT|>"], ids[EOS]]}})
    assert load_hf_tokenizer(tmp_path).end_ids == (ids[EOS], ids["<|EOT|>"])
    write(tmp_path, **{"tokenizer_config.json": CONFIG | {"add_bos_token": False}})
    assert load_hf_tokenizer(tmp_path).tokenizer.begin_ids == ()


def test_the_end_may_be_named_by_its_id_alone(tmp_path: pathlib.Path) -> None:
    ids = {t["content"]: t["id"] for t in tokenizer_file(**ADDED)["added_tokens"]}
    found = load_hf_tokenizer(write(tmp_path, **{"config.json": {"eos_token_id": ids[EOS]}}))
    assert (found.tokenizer.end_id, found.end_ids) == (ids[EOS], (ids[EOS],))
    write(tmp_path, **{"generation_config.json": {"eos_token_id": [ids["<|EOT|>"], ids[EOS]]}})  # counts before it
    found = load_hf_tokenizer(tmp_path)
    assert (found.tokenizer.end_id, found.end_ids) == (ids["<|EOT|>"], (ids["<|EOT|>"], ids[EOS]))


def test_the_tokenizer_itself_may_put_a_token_in_front(tmp_path: pathlib.Path) -> None:
    content = tokenizer_file(**ADDED)
    bos = next(t["id"] for t in content["added_tokens"] if t["content"] == BOS)
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": BOS, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {BOS: {"id": BOS, "ids": [bos], "tokens": [BOS]}},
    }
    write(tmp_path, **{"tokenizer.json": content, "special_tokens_map.json": {"eos_token": EOS}})
    found = load_hf_tokenizer(tmp_path)
    assert found.tokenizer.begin_ids == (bos,)
    assert bos not in found.tokenizer.encode("a")
    assert found.templates == {}


def test_templates_by_name_in_the_config_or_in_files(tmp_path: pathlib.Path) -> None:
    named = [{"name": "default", "template": "a"}, {"name": "tool_use", "template": "b"}]
    found = load_hf_tokenizer(write(tmp_path, **{"tokenizer_config.json": CONFIG | {"chat_template": named}}))
    assert {name: t.source for name, t in found.templates.items()} == {"default": "a", "tool_use": "b"}
    write(tmp_path, **{"chat_template.jinja": "c\n", "chat_templates/rag.jinja": "d"})
    found = load_hf_tokenizer(tmp_path)  # files count before the config
    assert {name: t.source for name, t in found.templates.items()} == {"default": "c\n", "rag": "d"}
    assert found.templates["rag"].tokens == TOKENS


@pytest.mark.parametrize(
    ("files", "sentence"),
    [
        ({}, "neither tokenizer_config.json nor special_tokens_map.json has an eos_token"),
        ({"config.json": {"eos_token_id": 9999}}, "no eos_token_id of .* config.json is a special token"),
        ({"tokenizer_config.json": "[1]"}, "tokenizer_config.json: holds a list, not an object"),
        ({"tokenizer_config.json": "{"}, "tokenizer_config.json: not JSON"),
        ({"tokenizer_config.json": {"eos_token": 3}}, "tokenizer_config.json: eos_token is 3; it must be a text"),
        ({"tokenizer_config.json": {"eos_token": "<x>"}}, "the tokenizer has no special token '<x>'"),
        ({"tokenizer_config.json": CONFIG | {"bos_token": "<x>"}}, "bos_token is '<x>', which is no special token"),
        ({"tokenizer_config.json": CONFIG | {"chat_template": 5}}, "chat_template 'default' is 5; it must be a text"),
        ({"tokenizer_config.json": CONFIG | {"chat_template": ["a"]}}, "each entry must have a name and a template"),
        (
            {"tokenizer_config.json": CONFIG, "generation_config.json": {"eos_token_id": "2"}},
            re.escape("eos_token_id is ['2']; it must be an id, or a list of ids"),
        ),
    ],
)
def test_a_wrong_file_is_named(tmp_path: pathlib.Path, files: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        load_hf_tokenizer(write(tmp_path, **files))
