"""Words of messages for people."""


def counted(count: int, noun: str) -> str:
    """A number with its noun, as in "1 thread" and "2 threads"."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
