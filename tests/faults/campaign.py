"""Many faults: every role x every fault x every phase once a round, in an order drawn from a seed.

    campaign.py [--faults N] [--seed S] [--jobs J] [--only "load, kill -9"]     one round in ctest; by hand any number:

    tests/gateway/run.py tests/faults/campaign.py --faults 1000

A fault is kill -9 or SIGSTOP of one rank, or the cut link of its host (network namespaces; left out, with the reason,
where they cannot be had), while the job loads, in a prefill, in the vision stage, while decoding, idle, or while
draining. Each time: every call ends within LIMIT_S, UNAVAILABLE or, when it was quicker than the fault, well; the job
ends by itself, non-zero (a fault in a drain may come too late); no process stays; the next start answers the same.
A failed fault prints how to repeat it. J faults are under way at a time: they mostly wait. The end is a table of the
times from the fault to its consequences, by kind: those of a quiet machine are had with --jobs 1."""

import argparse
import collections
import contextlib
import dataclasses
import datetime
import itertools
import json
import os
import pathlib
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

import daemon
from support import OPTIONS, Client, Code, answer_bits, chat, example, pb, user

sys.path.append(str(daemon.ROOT / "tests/multihost"))
from hosts import Hosts, why_not  # noqa: E402
from job import Job  # noqa: E402

LIMIT_S = 5.0
SLOW = float(os.environ.get("INTERNVLD_SLOW", "4" if os.environ.get("INTERNVLD_SANITIZED") else "1"))
START_TIMEOUT_S = 4
REMOTE_LIMIT_S = 30  # for what is behind a dead link to end, once it is back
PHASES = ("load", "prefill", "vision", "decode", "idle", "drain")
ROLES = ("gateway", "vision", "language")
KILL, STOP, CUT = HOWS = ("kill -9", "SIGSTOP", "cut link")
ROUND = len(ROLES) * len(PHASES) * len(HOWS)  # 54
N_FAULTS = 6 if os.environ.get("INTERNVLD_SANITIZED") else ROUND
LAYOUTS = ({"tensor": 2}, {"pipeline": 2, "vision": 2}, {"pipeline": 2}, {})  # the last needs no mpirun
CUT_LAYOUT, CUT_SLOTS = 2, (1, 1, 2)  # its hosts: gateway; vision; language


class Fault:
    def __init__(self, layout, rank, phase, how):
        self.layout, self.rank, self.phase, self.how = layout, rank, phase, how
        self.role = ROLES[0 if rank == 0 else 1 if rank <= LAYOUTS[layout].get("vision", 1) else 2]
        self.host = ROLES.index(self.role)  # of a cut link

    def __str__(self):
        return f"layout {LAYOUTS[self.layout]}, rank {self.rank} ({self.role}), {self.phase}, {self.how}"


def all_faults(without_cuts):
    for layout, n_ranks in ((0, 4), (1, 5), (3, 3)):
        for rank, phase, how in itertools.product(range(n_ranks), PHASES, (KILL, STOP)):
            yield Fault(layout, rank, phase, how)
    if not without_cuts:
        for host, phase in itertools.product(range(len(CUT_SLOTS)), PHASES):
            yield Fault(CUT_LAYOUT, host, phase, CUT)


def rounds(draw, without_cuts):
    """Without end: each role x phase x fault once, and again with other ranks of that role."""
    groups = {}
    for fault in all_faults(without_cuts):
        groups.setdefault((fault.role, fault.phase, fault.how), []).append(fault)
    for group in groups.values():
        draw.shuffle(group)
    order = list(groups.values())
    for i in itertools.count():
        draw.shuffle(order)
        yield from (group[i % len(group)] for group in order)


def prompt_of(phase):
    if phase == "vision":
        return pb.Prompt(chat=pb.ChatPrompt(messages=[user(*[example("scene-two.png")] * 12, "How many?")])), 16
    if phase == "prefill":
        return chat("one two three " * 200), 16
    return chat(example("scene-two.png"), "Describe the image."), 3000


@dataclasses.dataclass
class Times:
    """Seconds from the fault to what followed; None where there was no such thing."""
    noticed: float | None = None  # a rank says in the log that it misses another
    not_serving: float | None = None  # says health, or its watch is over
    first_call: float | None = None  # has ended
    last_call: float | None = None
    job: float | None = None  # has ended

    def __str__(self):
        return ", ".join(f"{k} {v:.1f} s" for k, v in vars(self).items() if v is not None)


N_CALLS = 3


class Calls(threading.Thread):
    """N_CALLS calls and a watch of health; `codes`, `ended` and `not_serving_at` once joined."""

    def __init__(self, address, phase, timeout_s=60):
        super().__init__()
        self.codes, self.ended, self.not_serving_at, self.began = [], [], None, threading.Event()
        self.address, self.client, self.phase, self.timeout_s = address, Client(address), phase, timeout_s
        self.start()

    def run(self):
        threads = [threading.Thread(target=self.watch), *(threading.Thread(target=self.call) for _ in range(N_CALLS))]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
        self.client.close()

    def watch(self):
        with grpc.insecure_channel(self.address, options=OPTIONS) as channel, contextlib.suppress(grpc.RpcError):
            health = health_pb2_grpc.HealthStub(channel)
            for answer in health.Watch(health_pb2.HealthCheckRequest(), timeout=self.timeout_s):
                if answer.status == health_pb2.HealthCheckResponse.NOT_SERVING:
                    break
        self.not_serving_at = time.monotonic()

    def call(self):
        prompt, n = prompt_of(self.phase)
        try:
            for event in self.client.start(prompt, timeout=self.timeout_s, max_tokens=n, ignore_eos=True):
                if self.phase not in ("decode", "drain") or event.WhichOneof("event") == "delta":
                    self.began.set()
            self.codes.append(Code.OK)
        except grpc.RpcError as error:
            self.codes.append(error.code())
        self.ended.append(time.monotonic())
        self.began.set()


def strike(job, fault):
    if fault.how == CUT:
        job.hosts.cut(fault.host)
        return
    pid = job.ranks().get(fault.rank)
    with contextlib.suppress(ProcessLookupError):  # it has ended
        if pid:
            os.kill(pid, signal.SIGKILL if fault.how == KILL else signal.SIGSTOP)


class Struck:
    """A job that is struck somewhere between its start and readiness; readiness may win."""

    def _wait_for_address(self, port_file, limit_s=60):
        threading.Thread(target=self._strike).start()
        try:
            return super()._wait_for_address(port_file, limit_s)
        except AssertionError as error:
            assert "was not ready" not in str(error), error
            return None  # it ended: the status tells

    def _strike(self):
        end = time.monotonic() + self.delay_s
        while time.monotonic() < end or (self.fault.rank not in self.ranks() and self.process.poll() is None):
            time.sleep(0.01)
        strike(self, self.fault)


class StruckDaemon(Struck, daemon.Daemon):
    def __init__(self, fault, draw):
        self.fault, self.delay_s = fault, draw.uniform(0.1, 0.9)
        super().__init__(**LAYOUTS[fault.layout], extra=("--start-timeout", START_TIMEOUT_S))


class StruckJob(Struck, Job):
    def __init__(self, fault, draw, hosts):
        self.fault, self.delay_s = fault, draw.uniform(0.1, 1.5)
        super().__init__(hosts, CUT_SLOTS, **LAYOUTS[fault.layout], extra=("--start-timeout", START_TIMEOUT_S),
                         supervised=("--once", "--start-limit", str(2 * START_TIMEOUT_S)))


def start_and_strike(fault, draw, expected, hosts):
    """The job, its calls (None: none) and when it was struck."""
    if fault.phase == "load":
        return StruckJob(fault, draw, hosts) if hosts else StruckDaemon(fault, draw), None, 0
    layout = LAYOUTS[fault.layout]
    job = Job(hosts, CUT_SLOTS, **layout) if hosts else daemon.Daemon(**layout)
    assert answer_bits(job.address) == expected, "the answer after a restart differs"
    calls = None
    if fault.phase != "idle":
        # From behind the gateway's own dead link nothing can be said: what ends such a call is its deadline.
        calls = Calls(job.address, fault.phase, LIMIT_S - 1 if is_unreachable(fault) else 60)
        calls.began.wait(30)
        time.sleep(draw.uniform(0, 0.05))
    if fault.phase == "drain":
        job.terminate()
        time.sleep(draw.uniform(0, 0.1))
    at = time.monotonic()
    strike(job, fault)
    return job, calls, at


def is_unreachable(fault):
    return fault.how == CUT and fault.role == "gateway"


def struck_ranks(fault):
    """A dead link takes all ranks of its host, of which any may be missed first."""
    first = sum(CUT_SLOTS[:fault.host])
    return range(first, first + CUT_SLOTS[fault.host]) if fault.how == CUT else [fault.rank]


def check_calls(fault, calls, struck_at, log):
    right = {Code.UNAVAILABLE, Code.OK} | ({Code.DEADLINE_EXCEEDED} if is_unreachable(fault) else set())
    calls.join(60)
    assert not calls.is_alive(), f"a call did not end\n{log}"
    took = max(calls.ended) - struck_at
    assert len(calls.codes) == N_CALLS and set(calls.codes) <= right, f"{calls.codes}\n{log}"
    assert took < LIMIT_S * SLOW, f"calls ended after {took:.1f} s\n{log}"


def seconds_to_notice(log, struck_at):
    """By the clock of the log's lines."""
    line = re.search(r"^(\S+)Z .* is (lost|gone): ", log, re.M)
    if not line:
        return None
    at = datetime.datetime.fromisoformat(line[1]).replace(tzinfo=datetime.timezone.utc)
    return at.timestamp() - (time.time() - time.monotonic()) - struck_at


def run(fault, draw, expected, hosts=None):
    job, calls, struck_at = start_and_strike(fault, draw, expected, hosts)
    status = job.status if job.status is not None else job.wait(60)
    log, times = job.log(), Times()
    if fault.phase != "load":
        times.job, times.noticed = time.monotonic() - struck_at, seconds_to_notice(log, struck_at)
    if calls:
        check_calls(fault, calls, struck_at, log)
        times.first_call, times.last_call = min(calls.ended) - struck_at, max(calls.ended) - struck_at
        if fault.phase != "drain":
            times.not_serving = calls.not_serving_at - struck_at
    if hosts:
        hosts.join(fault.host)
    left = job.wait_gone(REMOTE_LIMIT_S if hosts else LIMIT_S * SLOW)
    assert not left, f"orphans {sorted(left)}\n{log}"
    if fault.phase != "drain":
        assert status not in (0, None), f"status {status}\n{log}"
    if fault.phase in ("prefill", "vision", "decode", "idle") and not is_unreachable(fault) and fault.rank > 0:
        assert any(f"rank {r} " in log for r in struck_ranks(fault)), f"the log does not name the rank\n{log}"
    return times


def run_part(options, part):
    """Every options.jobs-th fault, from `part` on; 0 when all went as they must."""
    reason = why_not()
    faults = (f for f in rounds(random.Random(options.seed), reason is not None) if options.only in str(f))
    faults = itertools.islice(faults, options.faults)
    if part == 0 and reason:
        print(f"links are not cut: {reason}", flush=True)
    draw, n_failed = random.Random(f"{options.seed} {part}"), 0
    with daemon.Daemon(tensor=2) as d:
        expected = answer_bits(d.address)
    for i, fault in list(enumerate(faults))[part::options.jobs]:
        at = time.monotonic()
        try:
            with Hosts(len(CUT_SLOTS)) if fault.how == CUT else contextlib.nullcontext() as hosts:
                times = run(fault, draw, expected, hosts)
            print(f"fault {i}: {fault}: {times}; {time.monotonic() - at:.1f} s in all", flush=True)
            if times.job is not None:
                options.times.write(json.dumps({"kind": kind_of(fault), "load": os.getloadavg()[0], **vars(times)}))
                options.times.write("\n")
                options.times.flush()
        except AssertionError as error:
            n_failed += 1
            print(f"FAILED fault {i} (seed {options.seed}): {fault}\n{error}", flush=True)
    with daemon.Daemon(tensor=2) as d:
        assert answer_bits(d.address) == expected
    return 1 if n_failed else 0


def kind_of(fault):
    """A row of the table."""
    what = f"{fault.how}: {'gateway' if fault.role == 'gateway' else 'worker'}" if fault.how == CUT else fault.how
    return what + (", in a drain" if fault.phase == "drain" else "")


def print_table(rows):
    """Median, 95 % and longest of each kind."""
    kinds = collections.defaultdict(list)
    for row in rows:
        kinds[row["kind"]].append(row)
    names = [field.name for field in dataclasses.fields(Times)]
    print(f"seconds from the fault: median, 95 %, longest; load {statistics.median(r['load'] for r in rows):.0f}")
    print(f"{'':32}{'':>5}" + "".join(f"{name.replace('_', ' '):>18}" for name in names))
    for kind, of_kind in sorted(kinds.items()):
        cells = []
        for name in names:
            took = sorted(r[name] for r in of_kind if r[name] is not None)
            three = (statistics.median(took), took[len(took) * 95 // 100], took[-1]) if took else ()
            cells.append(" ".join(f"{x:.2f}" for x in three) or "-")
        print(f"{kind:32}{len(of_kind):>5}" + "".join(f"{cell:>18}" for cell in cells), flush=True)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--faults", type=int, default=N_FAULTS)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=6)
    parser.add_argument("--only", default="", help='faults whose description has this: "load, kill -9"')
    parser.add_argument("--part", type=int, help="one of --jobs, for the campaign's own use")
    parser.add_argument("--times", type=argparse.FileType("a"), help="where it writes its times, likewise")
    options = parser.parse_args()
    if not any(options.only in str(fault) for fault in all_faults(False)):
        parser.error(f"no fault has {options.only!r} in its description")
    if options.part is not None:
        return run_part(options, options.part)
    began = time.monotonic()
    runner = daemon.ROOT / "tests/gateway/run.py"
    command = [sys.executable, runner, pathlib.Path(__file__), "--faults", str(options.faults),
               "--seed", str(options.seed), "--jobs", str(options.jobs), "--only", options.only]
    with tempfile.NamedTemporaryFile("r") as times:
        parts = [subprocess.Popen([*command, "--part", str(i), "--times", times.name]) for i in range(options.jobs)]
        n_failed = sum(part.wait() != 0 for part in parts)
        rows = [json.loads(line) for line in times]
    if rows:
        print_table(rows)
    print(f"{options.faults} faults in {time.monotonic() - began:.0f} s: "
          f"{'some' if n_failed else 'none'} failed", flush=True)
    return 1 if n_failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
