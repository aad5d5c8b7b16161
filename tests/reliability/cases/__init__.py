"""The cases of the chaos runner: what is done to a server, what must come of it, what did."""

from tests.reliability.cases import clients, ends, faults, load, machine
from tests.reliability.cases.bench import CASES, Bench, Case

__all__ = ["CASES", "Bench", "Case", "clients", "ends", "faults", "load", "machine"]
