"""Cost models and loads for the tests of who drafts and how much is verified, and Algorithm 1 in a line."""

import numpy as np

from dspark_server.speculation.cost_model import CostModel, Profile
from dspark_server.speculation.prefix_scheduler import Load, StepCost, theta_by_count


def cost_model(verify: list[float], draft: float = 0.0, attention: float = 0.0) -> CostModel:
    """Verification of B tokens takes verify[B - 1] seconds, a draft `draft` whoever takes part."""
    sizes = tuple(range(1, len(verify) + 1))
    drafts = ((1, 64), (draft, draft * 1.001)) if draft else ((), ())
    return CostModel(Profile(sizes, tuple(verify), drafts[0], drafts[1], 0.0, attention), len(verify), 64)


def linear(fixed: float, each: float, size: int = 100) -> CostModel:
    return cost_model([fixed + each * tokens for tokens in range(1, size + 1)])


def load(requests: int, room: int = 1000) -> Load:
    return Load(sampling=requests, tokens=requests, room=room)


def early_stop(survivals: np.ndarray, cost: StepCost, load: Load, floor: float | None = None) -> int:
    """Algorithm 1 over ranked survivals [n]: how many, stopping where Theta first fails to rise."""
    seconds = cost.upto(len(survivals))
    most = min(cost.room(load, floor), len(survivals))
    theta = theta_by_count(survivals, seconds, load)[: most + 1]
    stops = np.nonzero(theta[1:] <= theta[:-1])[0]
    return int(stops[0]) if len(stops) else most
