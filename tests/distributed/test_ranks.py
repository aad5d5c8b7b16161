"""A process's place among the ranks, by its environment; what does not go together is refused at once."""

import socket
from multiprocessing.connection import Connection
from typing import Any

import pytest
import torch

from dspark_server.cli.ranks import Ranks
from dspark_server.engine.ranks import follow
from dspark_server.errors import ConfigError
from dspark_server.runtime import device, group
from dspark_server.runtime.group import ONE_RANK, TorchGroup

from ..processes import processes
from .support import meet, tiny_config

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "NNODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT")


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
    ranks = Ranks.start(1, "cpu")
    assert (ranks.rank, ranks.size) == (0, 1)
    group, found = ranks.meet("cpu", 60.0)
    assert group is ONE_RANK
    assert found is None
    assert (group.rank, group.size) == (0, 1)
    ranks.close()
    x = torch.ones(2, 3)
    assert group.all_reduce(x) is x and group.gather(x, 3) is x
    assert group.least(7) == 7


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
        Ranks.start(asked, "auto")


@pytest.mark.parametrize("variables", [{}, {"NNODES": "2", "MASTER_ADDR": "a"}], ids=["one node", "two nodes"])
def test_more_ranks_than_gpus(variables: dict[str, str], environment: pytest.MonkeyPatch) -> None:
    """Refused before there are processes that would all say the same."""
    here = 8 // int(variables.get("NNODES", "1"))
    for name, value in variables.items():
        environment.setenv(name, value)
    environment.setattr(device, "cuda_devices", lambda: 3)
    with pytest.raises(ConfigError, match=f"asks for {here} GPUs on this node, and torch sees 3: .*--device cpu"):
        Ranks.start(8, "auto")


@pytest.mark.parametrize(
    ("local", "message"),
    [("2", r"LOCAL_RANK is 2, but torch sees 2 GPUs.*--device cpu"), (None, "LOCAL_RANK must be a whole number")],
)
def test_a_rank_without_a_gpu_of_its_own(local: str | None, message: str, environment: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "2", "WORLD_SIZE": "3", "LOCAL_RANK": local}.items():
        if value is not None:
            environment.setenv(name, value)
    environment.setattr(device, "cuda_devices", lambda: 2)
    with pytest.raises(ConfigError, match=message):
        Ranks.start(3, "cuda").meet("cuda", 60.0)


def test_a_rank_takes_its_gpu_first_and_its_process_ends_before_nccl(environment: pytest.MonkeyPatch) -> None:
    """Where it is then waited for on that GPU; NCCL would not end while graphs are there that use it."""
    done: list[Any] = []

    class Gpu:
        def __init__(self, name: str, index: int) -> None:
            self.where = torch.device("cuda", index)
            done.append(f"{name} {index}")

    class Met(TorchGroup):
        @classmethod
        def join(cls, store: Any, rank: int, size: int, *place: Any) -> "Met":
            done.append((store, rank, size, *place))
            group = cls(rank, size, control=None)  # type: ignore[arg-type]
            group.on_gpus = True
            return group

    for name, value in {"RANK": "7", "WORLD_SIZE": "8", "LOCAL_RANK": "3"}.items():
        environment.setenv(name, value)
    environment.setattr(device, "cuda_devices", lambda: 4)
    environment.setattr(device, "find_device", Gpu)
    environment.setattr(group, "TorchGroup", Met)
    environment.setattr(Ranks, "leave", lambda self, code: done.append(f"left with {code}"))
    environment.setattr(TorchGroup, "leave", lambda self: done.append("closed"))
    with Ranks.start(1, "auto") as ranks:
        ranks.meet("auto", 60.0)
    assert done[:3] == ["auto 3", (None, 7, 8, torch.device("cuda", 3), 60.0), "left with 0"]


def join_on(where: torch.device | None, port: int, rank: int, answer: Connection) -> None:
    try:
        TorchGroup.join(meet(port, 2), rank, 2, where)
    except ConfigError as error:
        answer.send(str(error))


def test_ranks_on_different_devices() -> None:
    """One would wait for NCCL, the other for gloo."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        store = meet(port, 2, listener)
    answers = []
    for rank, where in enumerate([torch.device("cuda", 0), None]):
        ours, theirs = processes.Pipe()
        processes.Process(target=join_on, args=(where, port, rank, theirs), daemon=True).start()
        answers.append(ours)
    said = [answer.recv() if answer.poll(60) else "nothing" for answer in answers]
    del store
    assert said == [
        f"rank {rank} has {mine}, and another rank has {theirs}: give every rank a GPU, or say --device cpu."
        for rank, (mine, theirs) in enumerate([("a GPU", "none"), ("no GPU", "one")])
    ]


def test_a_rank_with_another_model_refuses_to_follow() -> None:
    class Misled(TorchGroup):
        def __init__(self) -> None:
            self.rank, self.size = 1, 2

        def receive(self) -> bytes:
            return b'["0.0.9 ModelConfig(...)", {"dtype": "float32", "cuda_graph_sizes": []}]'

    with pytest.raises(ConfigError, match="rank 1 has another model or version than rank 0"):
        follow(tiny_config(), Misled())


@pytest.mark.parametrize(("size", "total"), [(2, 6), (3, 199), (4, 4), (4, 2)])
def test_shares_are_all_there_is(size: int, total: int) -> None:
    ranks = [TorchGroup(rank, size, control=None) for rank in range(size)]  # type: ignore[arg-type]
    shares = [list(range(total))[rank.share(total)] for rank in ranks]
    assert [index for share in shares for index in share] == list(range(total))
    assert max(map(len, shares)) == -(-total // size)
