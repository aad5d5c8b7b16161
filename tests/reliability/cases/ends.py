"""The engine that cannot go on, the process that is killed, and the one that is asked to end."""

import signal
import time
from collections.abc import Callable

from tests.reliability.cases.bench import CASES, Bench, Case, case, fates, one_error_each
from tests.reliability.support import EXIT_DEAD, bodies, body

# -- the engine cannot go on ------------------------------------------------------------------------------------------


def _dies(fault: dict[str, str], seconds: float, reason: str) -> Callable[[Bench], str]:
    def run(bench: Bench) -> str:
        server = bench.start(engine={"step_timeout": 1.0, "max_num_seqs": 4})
        assert server.ask().ok
        with server.asking(bodies(10, 900)) as answers:
            server.wait(lambda: server.figures()["running"] == 4, "busy")
            server.arm(**fault)
            began = time.monotonic()
            server.wait(lambda: server.http.get("/health").json() == {"status": "dead"}, "dead", seconds)
            unready = time.monotonic() - began
            live = server.live()
        told = time.monotonic() - began
        assert not any(answer.ok for answer in answers)
        one_error_each(answers)
        assert any(reason in (answer.error or "") for answer in answers), answers[0]
        code = server.exit_code()
        assert live and code == EXIT_DEAD and told < seconds + 1, (live, code, told)
        return f"/health 503 after {unready:.1f} s, /live 200; all 10 told once by {told:.1f} s; exit code {code}"

    return run


_DEAD = "every waiter gets one error within 1 s, /health 503 while /live 200, exit code not 0"
for _name, _expected, _faults, _seconds, _reason in (
    ("step thread dies", _DEAD, {"engine__thread": "die"}, 1.0, "its thread ended"),
    ("step thread dies in a step", _DEAD, {"step__verify": "die"}, 1.0, "its thread ended"),
    ("forward always raises", _DEAD, {"step__verify": "raise:RuntimeError"}, 1.0, "The engine"),
    (
        "forward hangs (--step-timeout 1)",
        "the same, 1 s after the deadline",
        {"step__verify": "hang"},
        2.0,
        "not ended",
    ),
):
    CASES.append(Case(_name, _expected, _dies(_faults, _seconds, _reason)))


@case("long prompt, slow steps (--step-timeout 1)", "each chunk is life: ready all the time, the prompt is served")
def _long_prefill(bench: Bench) -> str:
    server = bench.start(engine={"step_timeout": 1.0, "max_num_batched_tokens": 80})
    server.arm(step__plan="sleep:0.3")
    readings = []
    with server.asking([body(1, 2, prompt=[5] * 900)]) as answers:
        end = time.monotonic() + 3
        while time.monotonic() < end:
            readings.append(server.ready())
            time.sleep(0.05)
    assert answers[0].ok and all(readings), (answers, readings)
    assert answers[0].seconds > 3
    return f"prompt served in {answers[0].seconds:.1f} s; {len(readings)} of {len(readings)} probes ready"


@case("process stopped for 3 s (--step-timeout 1)", "no hang is seen; it goes on")
def _stopped(bench: Bench) -> str:
    server = bench.start(engine={"step_timeout": 1.0})
    server.arm(step__plan="sleep:0.02")
    with server.asking(bodies(4, 100)) as answers:
        server.wait(lambda: server.figures()["running"] == 4, "busy")
        server.signal(signal.SIGSTOP)
        time.sleep(3)
        server.signal(signal.SIGCONT)
    assert all(answer.ok for answer in answers), answers
    return f"{fates(answers)}; ready"


@case("SIGKILL and restart", "clients see a cut connection; a new process says the same tokens")
def _kill(bench: Bench) -> str:
    server = bench.start()
    expected = server.ask().tokens
    with server.asking(bodies(4, 900)) as answers:
        server.wait(lambda: server.figures()["running"] >= 3, "busy")
        server.signal(signal.SIGKILL)
    assert not any(answer.ok for answer in answers)
    assert server.exit_code() == -signal.SIGKILL
    assert bench.start().ask().tokens == expected
    return f"{fates(answers)}; after the restart the canary is equal"


# -- shutdown ---------------------------------------------------------------------------------------------------------


def _sigterm(timeout: float, signals: int, finish: bool) -> Callable[[Bench], str]:
    def run(bench: Bench) -> str:
        server = bench.start(settings={"shutdown_timeout": timeout})
        server.arm(step__plan="sleep:0.01")
        with server.asking(bodies(4, 400)) as answers:
            server.wait(lambda: server.figures()["running"] == 4, "busy")
            server.signal(signal.SIGTERM)
            began = time.monotonic()
            server.wait(lambda: server.http.get("/health").json() == {"status": "draining"}, "draining", 2)
            refused = server.ask()
            assert refused.status == 503 and "retry-after" in refused.headers, refused
            for _ in range(signals - 1):
                server.signal(signal.SIGTERM)
        one_error_each(answers)
        assert all(answer.ok == finish for answer in answers), answers
        code = server.exit_code()
        took = time.monotonic() - began
        assert code == 0 and (finish or took < timeout + 2 or signals > 1), (code, took)
        if signals > 1:
            assert took < 3, took
        return f"503 to new ones; {fates(answers)}; exit code {code} after {took:.1f} s"

    return run


CASES.append(Case("SIGTERM, time enough", "all finish, exit code 0", _sigterm(60, 1, True)))
CASES.append(Case("SIGTERM, 1 s given", "the rest get one error each, exit code 0", _sigterm(1, 1, False)))
CASES.append(Case("SIGTERM twice", "at once: one error each, exit code 0", _sigterm(60, 2, False)))


@case("SIGTERM when idle", "exit code 0 at once")
def _sigterm_idle(bench: Bench) -> str:
    server = bench.start()
    began = time.monotonic()
    server.signal(signal.SIGTERM)
    code = server.exit_code()
    assert code == 0 and time.monotonic() - began < 3
    return f"exit code {code} after {time.monotonic() - began:.1f} s"
