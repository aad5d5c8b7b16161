"""More than the server can do at once."""

import time
from concurrent.futures import ThreadPoolExecutor

from tests.reliability.cases.bench import Bench, case, fates
from tests.reliability.soak import Soak
from tests.reliability.support import Server, body


@case("64 streams, KV pool a quarter of the demand", "all finish, preemptions > 0, outputs equal the solo run")
def _preemption(bench: Bench) -> str:
    asked = [body(seed, 100, stream=True) for seed in range(64)]
    # 64 requests of some 110 tokens, 4 a block: 1,800 blocks.
    server, roomy = bench.start(engine={"num_blocks": 450}), bench.start(engine={"num_blocks": 4096})
    solo = [roomy.ask(each).tokens for each in asked]
    answers = server.ask_all(asked)
    assert all(answer.ok for answer in answers)
    assert [answer.tokens for answer in answers] == solo
    preemptions = server.figures()["preemptions"]
    assert preemptions > 0
    server.wait_idle()
    return f"64 of 64 equal, {preemptions:.0f} preemptions, all blocks back"


@case("burst of 1,000 on a queue of 64", "the refused get 503 + Retry-After, the admitted all finish", slow=True)
def _burst(bench: Bench) -> str:
    server = bench.start(engine={"max_num_seqs": 16, "max_num_queued_reqs": 48})
    answers = server.ask_all([body(seed % 50, 20) for seed in range(1000)])
    done = [answer for answer in answers if answer.ok]
    refused = [answer for answer in answers if answer.status == 503]
    assert len(done) + len(refused) == 1000 and len(done) >= 64, fates(answers)
    assert all("retry-after" in answer.headers for answer in refused)
    server.wait_idle()
    return f"{len(done)} finished, {len(refused)} refused with 503 + Retry-After"


@case("goodput at 3 x capacity", "at least 80 % of its peak", slow=True)
def _goodput(bench: Bench) -> str:
    # Steps of 20 ms, whatever is in them: the device is the bottleneck, not this machine's other core.
    server = bench.start(engine={"max_num_seqs": 8, "max_num_queued_reqs": 16, "queue_timeout": 2.0})
    server.arm(step__plan="sleep:0.02")
    began = time.monotonic()
    answers = server.ask_all([body(seed, 24) for seed in range(64)][:24])
    capacity = sum(answer.ok for answer in answers) / (time.monotonic() - began)
    found = {}
    for load in (0.5, 0.9, 1.5, 3.0):
        found[load] = open_loop(server, load * capacity, 8.0)
        server.wait_idle(20)
    peak = max(found.values())
    assert found[3.0] >= 0.8 * peak, found
    shown = ", ".join(f"{load:g} x: {value:.1f}/s" for load, value in found.items())
    return f"capacity {capacity:.1f}/s; goodput at {shown}: {100 * found[3.0] / peak:.0f} %"


def open_loop(server: Server, rate: float, seconds: float) -> float:
    """Requests that finished, of those sent at `rate` a second, over the time until the last had its answer."""

    began = time.monotonic()
    with ThreadPoolExecutor(128) as pool:
        futures = []
        while (late := time.monotonic() - began) < seconds:
            if len(futures) < late * rate:
                futures.append(pool.submit(server.ask, body(len(futures) % 40, 24)))
            else:
                time.sleep(0.002)
        answers = [future.result() for future in futures]
    assert all(answer.ok or answer.status == 503 for answer in answers), fates(answers)
    return sum(answer.ok for answer in answers) / (time.monotonic() - began)


@case("one key floods, another sends one by one", "the other waits its turn, not the flood's end")
def _fair(bench: Bench) -> str:
    server = bench.start(engine={"max_num_seqs": 2}, settings={"api_key": ("flood", "calm")})

    server.arm(step__plan="sleep:0.01")
    with ThreadPoolExecutor(60) as pool:
        flood = [pool.submit(server.ask, body(seed, 60), key="flood") for seed in range(60)]
        server.wait(lambda: server.figures()["in_flight"] >= 50, "busy")
        calm = [server.ask(body(seed, 60), key="calm") for seed in range(5)]
        left = sum(not future.done() for future in flood)
        answers = [future.result() for future in flood]
    assert all(answer.ok for answer in (*answers, *calm))
    assert left > 25, f"only {left} of the flood were left"
    mean = sum(answer.seconds for answer in calm) / 5
    return f"5 calm requests took {mean:.1f} s each while {left} of 60 of the flood still waited"


@case(
    "soak with faults at 70 % of capacity",
    "canaries equal; behind each round no block held; files, threads, tasks, RSS flat",
    slow=True,
)
def _soak(bench: Bench) -> str:
    server = bench.start(engine={"max_num_seqs": 8, "num_blocks": 512})
    report = Soak(server).run(bench.soak)
    assert not report.problems, report.problems[:3]
    return str(report)
