"""A process's place among the ranks, by its environment; what does not go together is refused at once."""

import pytest
import torch

from dspark_server.cli.ranks import Ranks
from dspark_server.engine.parallel import follow
from dspark_server.errors import ConfigError
from dspark_server.runtime.parallel import ALONE, TorchGroup

from .support import tiny_config

VARIABLES = ("RANK", "WORLD_SIZE", "NNODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr("subprocess.Popen", None)  # nothing may be started here
    return monkeypatch


@pytest.mark.parametrize("variables", [{}, {"RANK": "0", "WORLD_SIZE": "1"}, {"NNODES": "2", "NODE_RANK": "1"}])
def test_one_rank_is_alone(variables: dict[str, str], environment: pytest.MonkeyPatch) -> None:
    """Whatever a cluster has set."""
    for name, value in variables.items():
        environment.setenv(name, value)
    ranks = Ranks.start(1, 60.0)
    assert ranks.group is ALONE
    assert (ranks.group.rank, ranks.group.size) == (0, 1)
    ranks.close()
    x = torch.ones(2, 3)
    assert ranks.group.all_reduce(x) is x and ranks.group.gather(x, 3) is x


@pytest.mark.parametrize(
    ("asked", "variables", "message"),
    [
        (4, {"RANK": "0", "WORLD_SIZE": "2"}, "is 4, but WORLD_SIZE says that 2 ranks were started"),
        (1, {"RANK": "0", "WORLD_SIZE": "two"}, "WORLD_SIZE must be a whole number, not 'two'"),
        (1, {"RANK": "-1", "WORLD_SIZE": "2"}, "RANK must be a whole number, not '-1'"),
        (3, {"NNODES": "2"}, "3 cannot be spread over NNODES=2"),
        (2, {"NNODES": "2", "NODE_RANK": "2"}, "numbered from 0"),
        (2, {"NNODES": "0"}, "NNODES=0"),
        (2, {"NNODES": "2", "NODE_RANK": "0"}, "MASTER_ADDR must name the node with NODE_RANK=0"),
        (2, {"NNODES": "2", "MASTER_ADDR": "a", "MASTER_PORT": "b"}, "MASTER_PORT must be a whole number"),
    ],
)
def test_what_does_not_go_together(
    asked: int, variables: dict[str, str], message: str, environment: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        environment.setenv(name, value)
    with pytest.raises(ConfigError, match=message):
        Ranks.start(asked, 60.0)


def test_a_rank_with_another_model_refuses_to_follow() -> None:
    class Misled(TorchGroup):
        def __init__(self) -> None:
            self.rank, self.size = 1, 2

        def receive(self) -> bytes:
            return b'["0.0.9 ModelConfig(...)", "float32", null]'

    with pytest.raises(ConfigError, match="rank 1 has another model or version than rank 0"):
        follow(tiny_config(), Misled())


@pytest.mark.parametrize(("size", "total"), [(2, 6), (3, 199), (4, 4), (4, 2)])
def test_shares_are_all_there_is(size: int, total: int) -> None:
    ranks = [TorchGroup(rank, size, control=None) for rank in range(size)]  # type: ignore[arg-type]
    shares = [list(range(total))[rank.share(total)] for rank in ranks]
    assert [index for share in shares for index in share] == list(range(total))
    assert max(map(len, shares)) == -(-total // size)
