"""The `dspark-server` command. Slow imports (torch: seconds) are left to the commands that need them."""

import sys
from collections.abc import Callable
from typing import Annotated

import typer

from dspark_server import __version__
from dspark_server.cli import chat, models, serving, training
from dspark_server.cli.help import Command

app = typer.Typer(
    name="dspark-server",
    help="Lossless speculative inference server (DSpark): drafts in blocks, verifies what is likely to survive.",
    epilog="dspark-server COMMAND --help explains each, with examples.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


@app.callback(invoke_without_command=True)
def _version(version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    if version:
        typer.echo(__version__)
        raise typer.Exit()


COMMANDS: dict[str, dict[str, Callable[..., None]]] = {
    "Serving": {"serve": serving.serve, "config": serving.config, "chat": chat.chat},
    "Models": {
        "pull": models.pull,
        "memory": models.memory,
        "profile": models.profile,
        "conformance": models.conformance,
    },
    "Drafters": {
        "data": training.data,
        "train": training.train,
        "calibrate": training.calibrate,
        "eval": training.evaluate,
    },
}
EXAMPLES = {
    "serve": (
        "dspark-server serve",
        "dspark-server serve Qwen/Qwen3-0.6B --port 9000 --max-num-seqs 32",
        "dspark-server serve --config serve.yaml --api-key-file keys.txt",
        """dspark-server serve MODEL --speculative-config '{"method": "dspark", "model": "DRAFTER_DIR"}'""",
        "DSPARK_MAX_MODEL_LEN=4096 dspark-server serve",
    ),
    "config": (
        "dspark-server config --config serve.yaml --port 9000",
        "dspark-server config --json",
        "dspark-server config --markdown > docs/configuration.md",
    ),
    "chat": (
        "dspark-server chat",
        'dspark-server chat --system "Answer in one sentence." --temperature 0',
        "echo 'Name three colours.' | dspark-server chat --url http://127.0.0.1:9000",
    ),
    "pull": ("dspark-server pull", "dspark-server pull Qwen/Qwen3-0.6B --revision main"),
    "memory": ("dspark-server memory ./DeepSeek-V4-Flash-0731 --tensor-parallel-size 8 --gpu-memory 139",),
    "profile": ("dspark-server profile --again --plot sps.png", "dspark-server profile --max-num-batched-tokens 512"),
    "conformance": ("dspark-server conformance fixtures/dspark_qwen3_vanilla",),
    "data": (
        "dspark-server data answers.npz --prompts gsm8k-train.jsonl",
        "dspark-server data answers.npz --starters starters.jsonl --self 1000 --temperatures 1,0.7",
    ),
    "train": ("dspark-server train configs/train/smollm2.yaml",),
    "calibrate": ("dspark-server calibrate build/drafter --corpus answers.npz",),
    "eval": (
        "dspark-server eval --prompts math.jsonl --prompts code.jsonl --temperature 1",
        "dspark-server eval --prompts math.jsonl --drafter build/drafter --no-baseline --json",
    ),
}

for _group, _commands in COMMANDS.items():
    for _name, _command in _commands.items():
        _epilog = "\n".join(("[bold]Examples[/bold]", *EXAMPLES[_name]))
        app.command(name=_name, cls=Command, rich_help_panel=_group, epilog=_epilog)(_command)


def main() -> None:
    """Entry point."""
    sys.exit(app())
