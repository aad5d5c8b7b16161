"""The mutants must still apply, and name tests that exist: a run of them takes long, and a stale one says nothing."""

import pytest

from tests.mutants import MUTANTS, ROOT, Mutant


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_mutant_applies_and_its_test_exists(mutant: Mutant) -> None:
    for file, text, replacement in mutant.edits:
        assert (ROOT / file).read_text().count(text) == 1, file
        assert text != replacement
    file, *names = mutant.killer.split("[")[0].split("::")
    assert all(f" {name}" in (ROOT / file).read_text() for name in names), mutant.killer
