"""The cases of the chaos runner: what is done to a server, what must come of it, what did."""

from tests.reliability.cases import clients, ends, faults, load, machine
from tests.reliability.cases.bench import CASES as _REGISTERED
from tests.reliability.cases.bench import Bench, Case

_ORDER = [module.__name__ for module in (faults, ends, clients, load, machine)]
CASES = sorted(_REGISTERED, key=lambda case: _ORDER.index(case.run.__module__))

__all__ = ["CASES", "Bench", "Case"]
