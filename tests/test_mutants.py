"""The mutants must still apply, and name tests that exist: a run of them takes long, and a stale one says nothing."""

import subprocess
import sys

import pytest

from tests.mutants import MUTANTS, ROOT, Mutant


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_mutant_applies_and_its_test_exists(mutant: Mutant) -> None:
    for file, text, replacement in mutant.edits:
        assert (ROOT / file).read_text().count(text) == 1, file
        assert text != replacement
    file, *names = mutant.killer.split("[")[0].split("::")
    assert all(f" {name}" in (ROOT / file).read_text() for name in names), mutant.killer


def test_cases_that_mutants_name_exist(request: pytest.FixtureRequest) -> None:
    """A case that is not there would kill nothing: pytest drops it silently beside the test that it is a case of."""
    cases = {mutant.killer for mutant in MUTANTS if "[" in mutant.killer}
    assert cases
    known = {item.nodeid for item in request.session.items}
    absent = {case.split("::")[0] for case in cases} - {each.split("::")[0] for each in known}
    if absent:  # this run is not of the whole suite
        command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-o", "addopts=", "-p", "no:cacheprovider"]
        done = subprocess.run([*command, *sorted(absent)], cwd=ROOT, capture_output=True, text=True, check=True)
        known |= set(done.stdout.splitlines())
    assert cases - known == set()
