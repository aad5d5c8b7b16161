"""Figures, drawn without a display by matplotlib, which is an extra: no server needs it."""

import importlib.util
from typing import TYPE_CHECKING

from dspark_server.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def check() -> None:
    """Raise ConfigError if matplotlib is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("Figures need matplotlib: pip install 'dspark-server[plots]'.")


def new_figure(width: float, height: float) -> "Figure":
    """Return an empty figure of that size in inches. Raises ConfigError if matplotlib is not installed."""
    check()
    from matplotlib.figure import Figure

    return Figure((width, height), layout="constrained")
