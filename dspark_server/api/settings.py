"""Settings of the HTTP API. Times in seconds, sizes in bytes."""

import re
from dataclasses import dataclass
from pathlib import Path

from dspark_server.errors import ConfigError
from dspark_server.settings import check, setting

_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^/?#\s]+|null")
LOG_FORMATS = ("text", "json")
LOG_LEVELS = ("debug", "info", "warning", "error", "critical")
DRAFT_FIGURES = ("none", "summary", "detailed")


@dataclass(frozen=True)
class StructuredOutputsConfig:
    """`--structured-outputs-config`: limits on JSON answers beyond their schema; a request may set its own."""

    disable_any_whitespace: bool = setting(
        True, "No white space between the tokens of JSON; false: at most 16 blanks in a place.", group="Server"
    )
    disable_additional_properties: bool = setting(
        True,
        "Objects that name their properties and leave out `additionalProperties` have no others; false: any.",
        group="Server",
    )


@dataclass(frozen=True)
class ServerSettings:
    """Address, API keys, and limits of clients."""

    host: str = setting("127.0.0.1", "Address to listen on; 0.0.0.0 for all.", group="Server")
    port: int = setting(8000, "Port to listen on; 0 picks a free one.", group="Server", minimum=0, maximum=65535)
    api_key: tuple[str, ...] = setting(
        (),
        "Clients must send one of these keys; may be repeated. Other users of this machine see a command line: "
        "the environment or a file is safer.",
        group="Server",
        secret=True,
    )
    api_key_file: str | None = setting(
        None, "File with keys that are let in, one a line; # begins a comment.", group="Server", metavar="FILE"
    )
    allowed_origins: tuple[str, ...] = setting(
        (),
        "Web pages of these origins may use the server from a browser (CORS): a JSON list, or separated by commas, "
        "such as https://chat.example.org; * for all. Default: none.",
        group="Server",
        metavar="ORIGINS",
    )
    allowed_methods: tuple[str, ...] = setting(
        ("*",), "Methods that such pages may use.", group="Server", metavar="METHODS"
    )
    allowed_headers: tuple[str, ...] = setting(
        ("*",), "Headers that such pages may send.", group="Server", metavar="HEADERS"
    )
    allow_credentials: bool = setting(
        False, "Such pages may send cookies and the like; an Authorization header needs no permission.", group="Server"
    )
    shutdown_timeout: float = setting(
        30.0, "Seconds that running requests get to finish after SIGTERM.", group="Server", minimum=0
    )
    chat_template: str | None = setting(
        None, "Jinja file in place of the model's chat template.", group="Server", metavar="FILE"
    )
    dashboard: bool = setting(
        True, "Show what speculation does, live, at /. Its users may switch the policy.", group="Server"
    )
    structured_outputs: StructuredOutputsConfig = setting(
        StructuredOutputsConfig(),
        "JSON. How schemas of structured output are read where they leave it open; a request may say otherwise.",
        group="Server",
        name="structured-outputs-config",
        metavar="JSON",
    )
    max_body_bytes: int = setting(8 << 20, "Largest request body; beyond, clients get 413.", group="Limits", minimum=1)
    max_header_bytes: int = setting(
        64 << 10, "Largest sum of a request's headers; beyond, clients get 431.", group="Limits", minimum=1
    )
    body_timeout: float = setting(60.0, "Seconds in which a request's body must have arrived.", group="Limits", above=0)
    stall_timeout: float = setting(
        60.0,
        "Seconds for which a reader may leave more of its answer waiting than 16 KB; then it is dropped.",
        group="Limits",
        above=0,
    )
    key_max_requests: int | None = setting(
        None, "Requests an API key may have running; beyond, it gets 429. Default: any.", group="Limits", minimum=1
    )
    key_requests_per_minute: int | None = setting(
        None, "Requests an API key may send a minute; beyond, it gets 429. Default: any.", group="Limits", minimum=1
    )
    per_request_spec_decode_metrics: str = setting(
        "none", "What an answer says of its drafts.", group="Speculation", choices=DRAFT_FIGURES
    )
    log_level: str = setting("info", "The least important messages shown.", group="Logging", choices=LOG_LEVELS)
    log_format: str = setting("text", "json: one object a line.", group="Logging", choices=LOG_FORMATS)
    access_log: bool = setting(False, "One line per request.", group="Logging")
    disable_access_log_for_endpoints: tuple[str, ...] = setting(
        (), "Paths left out of the access log, such as /health,/metrics.", group="Logging", metavar="PATHS"
    )

    def __post_init__(self) -> None:
        check(self)
        self.all_api_keys()
        for origin in self.allowed_origins:
            if origin != "*" and not _ORIGIN.fullmatch(origin):
                raise ConfigError(f"--allowed-origins takes origins such as https://chat.example.org, not {origin!r}.")
        for path in self.disable_access_log_for_endpoints:
            if not path.startswith("/"):
                raise ConfigError(f"--disable-access-log-for-endpoints takes paths such as /health, not {path!r}.")

    def all_api_keys(self) -> tuple[str, ...]:
        """Return all valid keys, including those of the file; without any, every request is allowed.

        Raises ConfigError if a key is empty or not printable ASCII, or the file cannot be read or has no keys.
        """
        keys = self.api_key
        if self.api_key_file is not None:
            keys += _read_keys(self.api_key_file)
        for key in keys:
            if not key or not all("!" <= character <= "~" for character in key):
                raise ConfigError("an API key is empty, or has characters that are not printable ASCII, or spaces.")
        return keys


def _read_keys(name: str) -> tuple[str, ...]:
    try:
        lines = [line.strip() for line in Path(name).expanduser().read_text().splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--api-key-file {name} cannot be read: {error}") from None
    keys = tuple(line for line in lines if line and not line.startswith("#"))
    if not keys:
        raise ConfigError(f"--api-key-file {name} has no keys: write one a line, or leave the option out.")
    return keys
