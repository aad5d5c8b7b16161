"""The command line: help, `config`, and errors as people see them."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.rich_utils import rich_render_text
from typer.testing import CliRunner, Result

from dspark_server.cli import COMMANDS, EXAMPLES, app
from dspark_server.settings import GROUPS

NAMES = [name for commands in COMMANDS.values() for name in commands]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch):
    """Runs the command in this process, without settings of the one who runs the tests."""
    for name in [name for name in os.environ if name.startswith("DSPARK_") and name != "DSPARK_CACHE_DIR"]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("COLUMNS", "200")

    def invoke(*arguments: str) -> Result:
        return CliRunner().invoke(app, arguments, prog_name="dspark-server")

    return invoke


def test_help_lists_the_commands_in_groups(run) -> None:
    text = run("--help").output
    for group, commands in COMMANDS.items():
        panel = text[text.index(f"─ {group} ─") :]
        panel = panel[: panel.index("╰")]
        assert [line.split()[1] for line in panel.splitlines()[1:] if line.split()[1:]] == list(commands)


def test_profile_prints_and_draws_what_passes_cost(run, tmp_path: Path) -> None:
    pair, plot = Path(__file__).parent / "fixtures" / "dspark_qwen3_vanilla", tmp_path / "costs.png"
    drafter = json.dumps({"method": "dspark", "model": str(pair / "draft")})
    flags = (
        "--dtype",
        "float32",
        "--max-num-batched-tokens",
        "64",
        "--max-num-seqs",
        "4",
        "--kv-cache-memory-bytes",
        "4000000",
    )
    done = run("profile", str(pair / "target"), *flags, "--speculative-config", drafter, "--again", "--plot", str(plot))
    assert done.exit_code == 0, done.output
    assert "SPS(B)" in done.output
    assert "tokens of context cost each run" in done.output
    assert plot.read_bytes().startswith(b"\x89PNG")
    without = run("profile", str(pair / "target"), *flags, "--speculative-config", '{"method": "none"}')
    assert without.exit_code != 0
    assert "needs a drafter" in without.output + without.stderr


@pytest.mark.parametrize("name", NAMES)
def test_help_of_a_command_ends_with_its_examples(name: str, run) -> None:
    text = run(name, "--help").output
    lines = [line.strip() for line in text[text.index("Examples") :].splitlines() if line.strip()]
    assert lines[1:] == list(EXAMPLES[name])
    assert EXAMPLES[name]


@pytest.mark.parametrize("example", [example for examples in EXAMPLES.values() for example in examples])
def test_examples_are_commands_that_exist(example: str) -> None:
    """Parsed, not run."""
    words = shlex.split(example.split(" > ")[0])
    name, *arguments = words[words.index("dspark-server") + 1 :]
    command = typer.main.get_command(app).commands[name]
    command.make_context(name, arguments)


def test_help_of_serve_is_grouped_and_shows_defaults(run) -> None:
    text = run("serve", "--help").output
    places = [text.index(f"─ {group} ─") for group in GROUPS]
    assert places == sorted(places)
    assert "[default: 8000]" in text
    assert "[auto|bfloat16|float16|float32; default: auto]" in text


@pytest.mark.parametrize("columns", [40, 60, 80, 200])
@pytest.mark.parametrize("name", NAMES)
def test_help_cuts_no_name_and_no_word_of_what_it_says(
    name: str, columns: int, run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    text = run(name, "--help").output
    command = typer.main.get_command(app).commands[name]
    params = command.get_params(typer.Context(command))
    assert "…" not in text
    folded = "".join(character for character in text if character not in " │\n")
    for param in params:
        for flag in (*param.opts, *param.secondary_opts):
            # Where the panel has room for it, on one line.
            assert not flag.startswith("--") or flag in (text if len(flag) <= columns - 4 else folded)
        written = rich_render_text(param.help or "")
        assert "".join(written.split()) in folded
    panels = [line for line in text.splitlines() if line[:1] in ("╭", "│", "╰")]
    assert panels and {len(line) for line in panels} == {columns}


@pytest.mark.parametrize("command", [["--help"], ["serve", "--help"], ["config"], ["config", "--markdown"]])
def test_what_only_speaks_of_settings_does_not_load_torch(command: list[str]) -> None:
    code = (
        "import sys\nfrom dspark_server.cli import app\n"
        f"try: app({command!r})\n"
        "finally: assert 'torch' not in sys.modules and 'fastapi' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_config_says_what_is_in_force_and_why(run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text("max-num-seqs: 7\nspeculative-config: {selection: lagged}\napi-key: very-secret-key")
    monkeypatch.setenv("DSPARK_PORT", "8123")
    monkeypatch.setenv("COLUMNS", "40")  # of a terminal, which this is not
    flags = ("--config", str(file), "--no-enable-prefix-caching", "--disable-access-log-for-endpoints", "/health,/live")
    shown = run("config", *flags)
    assert shown.exit_code == 0, shown.output
    lines = [line.split(maxsplit=2) for line in map(str.strip, shown.output.splitlines())]
    rows = {line[0]: line[1:] for line in lines if len(line) == 3}
    assert rows["max-num-seqs"] == ["7", f"file {file}"]
    assert rows["port"] == ["8123", "environment DSPARK_PORT"]
    assert rows["enable-prefix-caching"] == ["false", "command line"]
    assert rows["disable-access-log-for-endpoints"] == ["/health,/live", "command line"]
    assert rows["speculative-config.selection"] == ["lagged", f"file {file}"]
    assert rows["speculative-config.method"] == ["auto", "default"]
    assert rows["block-size"] == ["16", "default"]
    assert rows["api-key"] == ["********", f"file {file}"]
    whole = run("config", "--json", *flags)
    found = json.loads(whole.output)
    assert found["port"] == {"value": 8123, "source": "environment DSPARK_PORT"}
    assert found["speculative-config"]["value"]["selection"] == "lagged"
    assert found["api-key"]["value"] == "********"
    assert "very-secret-key" not in shown.output + whole.output


def test_keys_may_be_given_more_than_once(run) -> None:
    assert run("config", "--api-key", "a", "--api-key", "b").exit_code == 0
    refused = run("config", "--api-key", "a", "--api-key", "")
    assert (refused.exit_code, refused.stdout) == (1, "")


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["serve", "--max-num-seq", "3"], 2, "--max-num-seqs"),
        (["serv"], 2, "Did you mean 'serve'"),
        (["serve", "--port", "many"], 1, "dspark-server: --port must be a whole number, not 'many'."),
        (["serve", "--speculative-config", "nope"], 1, "--speculative-config is not valid JSON"),
        (["serve", "--speculative-config", '{"metod": "none"}'], 1, "Did you mean method?"),
        (["serve", "--gpu-memory-utilization", "0.9"], 1, "use --kv-cache-memory-bytes"),
        (["serve", "--device", "cuda"], 1, "--device cuda: this torch is built without CUDA"),
        (["serve", "--cuda-graph-sizes", "1,x"], 1, "must be whole numbers with commas between, not '1,x'"),
        (["serve", "--tensor-parallel-size", "0"], 1, "--tensor-parallel-size must be at least 1"),
        (
            ["serve", "--tensor-parallel-size", "2"],
            1,
            "3 key/value heads and 1536 feed-forward units: it can be 1 or 3",
        ),
        (["serve", "--config", "nowhere.yaml"], 1, "nowhere.yaml cannot be read"),
        (["serve", "--api-key-file", "nowhere"], 1, "--api-key-file nowhere cannot be read"),
        (["config", "--disable-access-log-for-endpoints", "health"], 1, "takes paths such as /health"),
        (["profile", "--port", "1"], 2, "No such option: --port"),
        (["pull", ".", "--revision", "main"], 1, "--revision main is for models from the Hugging Face Hub"),
        (["chat", "--url", "http://127.0.0.1:1"], 1, "start one with `dspark-server serve`"),
        (["chat", "--url", "http://127.0.0.1:port"], 1, "is no address"),
    ],
)
def test_errors_say_what_to_do(arguments: list[str], code: int, message: str, run) -> None:
    done = run(*arguments)
    assert done.exit_code == code, done.output
    assert message in " ".join(done.stderr.replace("│", " ").split())
    assert done.stdout == ""
    assert "Traceback" not in done.output


def test_every_command_is_registered() -> None:
    assert set(typer.main.get_command(app).commands) == set(NAMES) == set(EXAMPLES)
