"""The errors that a user can see. Each is raised where its cause is known and turned into HTTP in api/errors.py."""


class DSparkServerError(Exception):
    """Base of every error this server raises on purpose; its message says what to do."""


class ConfigError(DSparkServerError):
    """A setting, or a combination of settings, cannot work."""


class CheckpointError(DSparkServerError):
    """A model directory is missing, damaged, or not what its config says."""


class RequestError(DSparkServerError):
    """A request cannot be served as written (HTTP 400, or `status`).

    `param` names the field of the request body at fault, if there is one.
    """

    def __init__(self, message: str, *, param: str | None = None, status: int = 400, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.status = status
        self.code = code


class CapacityError(DSparkServerError):
    """The queue is full, or the server is draining (HTTP 503 with Retry-After, in seconds)."""

    def __init__(self, message: str, *, retry_after: int = 1) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class LimitError(DSparkServerError):
    """A client has reached one of its limits (HTTP 429 with Retry-After, in seconds)."""

    def __init__(self, message: str, *, retry_after: int = 1) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class DeadlineError(DSparkServerError):
    """A request took longer than its time limit (HTTP 504)."""


class EngineDeadError(DSparkServerError):
    """The engine stopped; nothing can be served until the process is restarted (HTTP 503)."""
