"""What no test of the engine may leave behind."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

from dspark_server import failpoints

if TYPE_CHECKING:
    from dspark_server.engine.grammar import GrammarCompiler

VOCABULARY = 512  # of the fixtures' targets; the tokenizer has fewer, as with padded embeddings


@pytest.fixture(scope="session")
def compiler() -> "GrammarCompiler":
    """Forms for `forms.TOKENIZER`, one token for each byte."""
    from dspark_server.engine.grammar import GrammarCompiler

    from .forms import TOKENIZER

    return GrammarCompiler(TOKENIZER, VOCABULARY)


@pytest.fixture(autouse=True)
def _no_hidden_failure(request: pytest.FixtureRequest, caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """The step loop goes on without a draft when drafting fails: a broken drafter must not pass for a slow one."""
    yield
    failpoints.disarm()
    if request.node.get_closest_marker("drafting_fails") is None:
        assert not [record for record in caplog.get_records("call") if "drafting failed" in record.getMessage()]
