"""Chat templates: the same text as transformers makes of them, in a sandbox, within bounds."""

from pathlib import Path

import pytest
from jinja2 import TemplateSyntaxError
from transformers import PreTrainedTokenizerBase

from dspark_server.api import ServerSettings, chat_template, create_app
from dspark_server.api.chat_schema import Conversation
from dspark_server.api.chat_template import ChatTemplate
from dspark_server.engine.core import load_tokenizer
from dspark_server.errors import ConfigError, RequestError
from dspark_server.models.hub import resolve_model

from .fake_engine import FakeEngine, build_tokenizer

TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Is it <dry> & warm in Århus?",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}

# In the manner of templates in the field: whitespace control, namespaces, macros, loop controls, tools, special tokens.
TOOLED = """
{%- macro header(role) %}<|{{ role }}|>{% endmacro %}
{{- bos_token | default("") }}
{%- if tools %}
    {{- header("tools") }}
    {% for tool in tools %}
        {{- tool.function | tojson(separators=(",", ":")) }}, {{ tool | tojson(indent=2, sort_keys=true) }}
    {% endfor %}
{%- endif %}
{%- set ns = namespace(last=-1, seen=dict()) %}
{%- for message in messages %}
    {%- if message.role == "user" %}{% set ns.last = loop.index0 %}{% endif %}
{%- endfor %}
{% for message in messages %}
    {%- if message.role == "system" and not loop.first %}{% continue %}{% endif %}
    {{- header(message["role"]) }}
    {%- if message.tool_calls is defined %}
        {%- for call in message.tool_calls %}
            {{- call.function.name }}({{ call.function.arguments | tojson }})
        {%- endfor %}
    {%- elif message.role == "assistant" %}
        {%- generation %}{{ message.content | trim }}{% endgeneration %}
    {%- else %}
        {{- message.content }}
    {%- endif %}
    {{- eos_token if loop.index0 < ns.last else "" }}
{% endfor %}
{%- if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}
{{- header("assistant") if add_generation_prompt else "" }}
"""

TURNS = {
    "user": [{"role": "user", "content": "Hi <b>& 'you'</b> 🙂\n"}],
    "system": [{"role": "system", "content": ""}, {"role": "user", "content": "Hi"}],
    "long": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "  1 + 1?  "},
        {"role": "assistant", "content": " 2\n "},
        {"role": "system", "content": "Even briefer."},
        {"role": "user", "content": "<|im_end|>{{ 7 * 7 }}{% raw %}"},
    ],
    "tools": [
        {"role": "user", "content": "Weather?"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [
                {"id": "1", "type": "function", "function": {"name": "weather", "arguments": {"city": "Århus"}}}
            ],
        },
        {"role": "tool", "content": '{"dry": true}', "tool_call_id": "1"},
    ],
}


@pytest.fixture(scope="module")
def smollm2() -> PreTrainedTokenizerBase:
    return load_tokenizer(resolve_model("SmolLM2-135M-Instruct"))


def render(template: ChatTemplate, messages: list[dict], **fields: object) -> str:
    return template.render_now(Conversation(messages=messages, **fields))


@pytest.mark.parametrize("turns", TURNS)
@pytest.mark.parametrize("tools", [None, [TOOL, TOOL]])
@pytest.mark.parametrize("source", [None, TOOLED], ids=["smollm2", "tooled"])
def test_the_same_text_as_transformers(
    smollm2: PreTrainedTokenizerBase, turns: str, tools: list[dict] | None, source: str | None
) -> None:
    template = ChatTemplate(source or smollm2.chat_template, smollm2.special_tokens_map)
    fields = {"tools": tools, "tokenize": False, "chat_template": source}
    for opens in (False, True):
        expected = smollm2.apply_chat_template(TURNS[turns], add_generation_prompt=opens, **fields)
        assert render(template, TURNS[turns], tools=tools, add_generation_prompt=opens) == expected
    expected = smollm2.apply_chat_template(TURNS[turns], add_generation_prompt=True, enable_thinking=False, **fields)
    thinking = {"chat_template_kwargs": {"enable_thinking": False}}
    assert render(template, TURNS[turns], tools=tools, **thinking) == expected


@pytest.mark.parametrize("text", ["2 is", "2 is ", " 2 is\n", "", "2 is\ue000"])
@pytest.mark.parametrize("source", [None, TOOLED], ids=["smollm2", "tooled"])
def test_a_message_is_continued_as_in_transformers(
    smollm2: PreTrainedTokenizerBase, source: str | None, text: str
) -> None:
    messages = [{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": text}]
    template = ChatTemplate(source or smollm2.chat_template, smollm2.special_tokens_map)
    expected = smollm2.apply_chat_template(
        messages, tokenize=False, continue_final_message=True, chat_template=source, add_generation_prompt=False
    )
    assert render(template, messages, continue_final_message=True) == expected


def test_smollm2_gets_its_default_system_message(smollm2: PreTrainedTokenizerBase) -> None:
    template = ChatTemplate.load(smollm2, None)
    assert render(template, TURNS["user"][:1]).startswith(
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM"
    )
    developer = [{"role": "developer", "content": "Be brief."}, *TURNS["user"]]
    assert render(template, developer).startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi")


def test_named_templates() -> None:
    template = ChatTemplate({"default": "plain", "tool_use": "tools", "rag": "documents"})
    assert render(template, TURNS["user"]) == "plain"
    assert render(template, TURNS["user"], tools=[TOOL]) == "tools"
    assert render(template, TURNS["user"], tools=[TOOL], tool_choice="none") == "plain"
    assert render(ChatTemplate({"default": "plain"}), TURNS["user"], tools=[TOOL]) == "plain"
    with pytest.raises(RequestError, match="no chat template"):
        render(ChatTemplate({"rag": "documents"}), TURNS["user"])


def test_a_template_that_knows_developers_gets_them() -> None:
    template = ChatTemplate("{% if messages[0].role == 'developer' %}yes{% endif %}")
    assert render(template, [{"role": "developer", "content": "a"}]) == "yes"


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__class__.__base__ }}",
        "{{ raise_exception.__globals__.json }}",
        "{{ strftime_now.__code__.co_code }}",
        "{{ cycler.__init__.__globals__.os }}",
        "{{ '{0.__class__.__base__}'.format(messages) }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update({'a': 1}) }}",
    ],
)
def test_the_sandbox_holds(source: str) -> None:
    with pytest.raises(RequestError, match="unsafe"):
        render(ChatTemplate(source), TURNS["user"])


@pytest.mark.parametrize(
    "source",
    [
        "{{ raise_exception('too ' ~ 'x' * 10000) }}",
        "{{ messages[0].content + 1 }}",
        "{{ nothing.at.all }}",
        "{{ 1 // 0 }}",
        "{{ range(10000000) | list }}",
        "{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}",
    ],
)
def test_what_a_template_does_wrong_is_the_requests_error(source: str) -> None:
    with pytest.raises(RequestError) as caught:
        render(ChatTemplate(source), TURNS["user"])
    assert (caught.value.status, caught.value.param) == (400, "messages")
    assert len(str(caught.value)) < 400


def test_the_prompt_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "MAX_PROMPT", 1000)
    template = ChatTemplate("{% for n in range(100000) %}{{ messages[0].content }}{% endfor %}")
    with pytest.raises(RequestError, match="too long"):
        render(template, TURNS["user"])


def test_a_message_that_is_not_shown_cannot_be_continued() -> None:
    with pytest.raises(RequestError) as caught:
        render(ChatTemplate("{{ messages[0].role }}"), TURNS["user"], continue_final_message=True)
    assert caught.value.param == "continue_final_message"


def test_the_date() -> None:
    assert render(ChatTemplate("{{ strftime_now('%d %b') }}"), TURNS["user"])[2] == " "


def test_a_template_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "template.jinja"
    tokenizer = build_tokenizer()
    for wrong, message in (("{% if %}", "line 1"), ("\n{{ a", "line 2"), (None, "cannot be read")):
        if wrong is not None:
            path.write_text(wrong)
        with pytest.raises(ConfigError, match=message):
            ChatTemplate.load(tokenizer, str(path if wrong is not None else tmp_path / "absent"))
    with pytest.raises(ConfigError, match="--chat-template"):
        create_app(FakeEngine(), ServerSettings(chat_template=str(path)))
    path.write_text("mine {{ eos_token }}")
    assert render(ChatTemplate.load(tokenizer, str(path)), TURNS["user"]) == "mine <|end|>"
    with pytest.raises(TemplateSyntaxError):
        ChatTemplate("{% if %}")
