"""Settings of the HTTP edge. Times in seconds, sizes in bytes."""

from dataclasses import dataclass

from dspark_server.errors import ConfigError


@dataclass(frozen=True)
class ServerSettings:
    """Where the server listens and what it lets a client do."""

    host: str = "127.0.0.1"
    port: int = 8000  # 0: any free one
    max_body_bytes: int = 32 << 20
    max_header_bytes: int = 64 << 10
    body_timeout: float = 60.0  # a request body must have arrived
    stall_timeout: float = 60.0  # a reader that takes nothing for this long is dropped
    shutdown_timeout: float = 30.0  # running requests may finish after SIGTERM
    access_log: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"--port must be between 0 and 65535, not {self.port}.")
        for name in ("max_body_bytes", "max_header_bytes", "body_timeout", "stall_timeout"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name} must be positive.")
        if self.shutdown_timeout < 0:
            raise ConfigError("--shutdown-timeout must not be negative.")
