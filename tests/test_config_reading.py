"""Text as settings: what is read, what is refused, and that no text ends in anything but settings or a ConfigError."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from vpd.config import SECTIONS, load, parse
from vpd.config.reading import read_file, read_value
from vpd.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3", 3), ("1_000", 1000), ("0x1f", 31), ("+1", 1), ("1e-5", 1e-5), ("-1E3", -1000.0), (".5e-3", 5e-4),
        ("true", True), ("no", False), ("null", None), ("~", None), ("'a'", "a"), ("[1, a]", [1, "a"]),
        ("{a: 1}", {"a": 1}), ("{on: 1, 1: 2, null: 3}", {"on": 1, "1": 2, "null": 3}),
        ("{<<: {a: 1}, a: 2}", {"a": 2}), ("[&a [x], *a]", [["x"], ["x"]]),
        ("2025-11-26", "2025-11-26"), ("1.2.3", "1.2.3"), ("=", "="),
    ],
)  # fmt: skip
def test_a_value_is_read(text: str, value: Any) -> None:
    found = read_value(text, "run.x")
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    "text", ["", " ", "a # b", "# a", "- a", "a: b", "a\n\n  b ", "&a", "&a b", " a ", "\n\nFeedback: ", "?", "a, b"]
)
def test_a_text_on_the_command_line_is_what_was_typed(text: str) -> None:
    assert read_value(text, "prompts.closing") == text


@pytest.mark.parametrize(
    "text",
    [
        "010", "1:40", "1:40.5", "0b_", "0x_", "1__0", "2025-13-45", "9" * 5000, "!!int 3", "!!bool x", "!x", "*a",
        "{a: 1, a: 2}", "{[a]: 1}", "[" * 3000, "[1,", "@x", '"\\ud800"', '"\\0"', "\x1b[31m", "[&a [*a]]",
    ],
)  # fmt: skip
def test_what_could_mean_two_things_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"^--run\.x has a value that is not YAML; got ") as error:
        read_value(text, "run.x")
    assert "\n" not in str(error.value) and len(str(error.value)) < 300


def test_a_small_text_of_many_aliases_is_refused() -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 9)]
    with pytest.raises(ConfigError, match="more than 10000 values"):
        read_value("{" + ", ".join(lines) + "}", "run.seed")


FILES: dict[str, tuple[bytes, str]] = {
    "a key twice": (b"optim: {learning_rate: 1, learning_rate: 2}", "the key 'learning_rate' stands twice (line 1)"),
    "a section twice": (b"run: {seed: 1}\nrun: {seed: 2}", "the key 'run' stands twice (line 2)"),
    "two documents": (b"run: {seed: 1}\n---\nrun: {seed: 2}", "is not valid YAML"),
    "a list": (b"- run", "holds no sections; got list"),
    "a word": (b"run", "holds no sections; got str"),
    "Latin-1": ("run: {output_dir: \xe9}".encode("latin-1"), "is not valid YAML"),
    "large": (b"#" * (1 << 20) + b"#", "is no settings file; got more than 1048576 bytes"),
    "a tab": (b"run:\n\tseed: 1", "is not valid YAML; got a tab (line 2)"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_none_of_settings_is_one_line(name: str, tmp_path: Path) -> None:
    content, said = FILES[name]
    (tmp_path / "run.yaml").write_bytes(content)
    with pytest.raises(ConfigError) as error:
        read_file(str(tmp_path / "run.yaml"))
    assert said in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_a_file_of_any_editor_is_read(encoding: str, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_bytes("run: {output_dir: é, seed: 3}  # ü\r\n".encode(encoding))
    assert read_file(str(tmp_path / "run.yaml")) == {"run": {"output_dir": "é", "seed": 3}}
    for empty in (b"", b"# nothing\n", b"---\n"):
        (tmp_path / "run.yaml").write_bytes(empty)
        assert read_file(str(tmp_path / "run.yaml")) == {}


WORDS = st.sampled_from(
    [
        *SECTIONS, "name", "seed", "lora", "r", "vpd", "digits", "environment", "1e5", "-3", ".nan", "0x_", "010", "no",
        "~", "&a ", "*a", "!!int ", "<<", "{", "}", "[", "]", ": ", ", ", "\n", "\n  ", "- ", "'", '"', "#", "?", "|",
        ">", "\t",
    ]
)  # fmt: skip


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.one_of(st.text(max_size=40), st.lists(WORDS, max_size=12).map("".join)))
@example(text="env: &a {name: x.py:E, k: *a}")
@example(text="? [a]\n: 1")
def test_no_text_of_a_file_ends_in_a_traceback(text: str, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_bytes(text.encode(errors="surrogatepass"))
    _parsed_or_refused(lambda: load(str(tmp_path / "run.yaml")))


@settings(max_examples=300, deadline=None)
@given(
    key=st.sampled_from(["run.seed", "run.output_dir", "env", "env.length", "feedback", "model.lora", "model.lora.r"])
    | st.sampled_from(
        ["optim.learning_rate", "algorithm.name", "run.report_to", "engine.name", "prompts.closing", "x.y"]
    ),
    value=st.one_of(st.text(max_size=30), st.lists(WORDS, max_size=8).map("".join)),
)
@example(key="feedback", value="[[environment]]")
@example(key="run.", value="1")
@example(key="algorithm.name", value="/:0")
def test_no_word_of_the_command_line_ends_in_a_traceback(key: str, value: str) -> None:
    _parsed_or_refused(lambda: load(None, [f"--{key}={value}"]))


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | WORDS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=300, deadline=None)
@given(data=st.dictionaries(st.sampled_from(SECTIONS), PLAIN, max_size=3))
def test_no_plain_data_ends_in_a_traceback(data: dict[str, Any]) -> None:
    _parsed_or_refused(lambda: parse(data))


def _parsed_or_refused(call: Any) -> None:
    """What the call gives is a whole configuration that YAML can hold, or a ConfigError."""
    try:
        config = call()
    except ConfigError:
        return
    assert parse(yaml.safe_load(config.to_yaml())) == config
