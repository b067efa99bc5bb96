"""Many faults, one after another: every role x every fault x every phase, in an order drawn from a seed.

    campaign.py [--faults N] [--seed S]      52 in ctest (6 under a sanitizer); by hand any number:

    tests/gateway/run.py tests/faults/campaign.py --faults 1000

A fault is kill -9 or SIGSTOP of one rank (cut links are tests/multihost), while the model loads, in a prefill, in the
vision stage, while decoding, idle, or while draining. Each time: every call ends within LIMIT_S, UNAVAILABLE or, when
it was quicker than the fault, well; the job ends non-zero (a fault in a drain may come too late); no process stays;
the next start answers the same. A failed fault prints how to repeat it."""

import argparse
import itertools
import os
import random
import signal
import threading
import time

import grpc

import daemon
from support import Client, Code, chat, example, pb, user

LIMIT_S = 5.0
# A rank that hangs inside MPI's own start is noticed by nobody in the job: this is deploy/supervise.sh --start-limit.
START_LIMIT_S = 6.0
N_FAULTS = 6 if os.environ.get("INTERNVLD_SANITIZED") else 52
LOADED_FACTOR = float(os.environ.get("INTERNVLD_SLOW", "2"))  # a busy machine is no failure
PHASES = ("load", "prefill", "vision", "decode", "idle", "drain")
LAYOUTS = ({"tensor": 2}, {"pipeline": 2, "vision": 2})
RANKS = {0: 4, 1: 5}  # of each layout


class Fault:
    def __init__(self, layout, rank, phase, how):
        self.layout, self.rank, self.phase, self.how = layout, rank, phase, how

    def __str__(self):
        return f"layout {LAYOUTS[self.layout]}, rank {self.rank}, {self.phase}, {self.how.name}"


def all_faults():
    return [Fault(layout, rank, phase, how)
            for layout in range(len(LAYOUTS)) for rank in range(RANKS[layout]) for phase in PHASES
            for how in (signal.SIGKILL, signal.SIGSTOP)]


def prompt_of(phase):
    if phase == "vision":
        return pb.Prompt(chat=pb.ChatPrompt(messages=[user(*[example("scene-two.png")] * 12, "How many?")])), 16
    if phase == "prefill":
        return chat("one two three " * 200), 16
    return chat(example("scene-two.png"), "Describe the image."), 3000


class Calls(threading.Thread):
    """Three calls; `codes` and `ended` once joined."""

    def __init__(self, address, phase):
        super().__init__()
        self.codes, self.ended, self.began = [], 0.0, threading.Event()
        self.client, self.phase = Client(address), phase
        self.start()

    def run(self):
        threads = [threading.Thread(target=self.call) for _ in range(3)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
        self.ended = time.monotonic()
        self.client.close()

    def call(self):
        prompt, n = prompt_of(self.phase)
        try:
            for event in self.client.start(prompt, timeout=60, max_tokens=n, ignore_eos=True):
                if self.phase not in ("decode", "drain") or event.WhichOneof("event") == "delta":
                    self.began.set()
            self.codes.append(Code.OK)
        except grpc.RpcError as error:
            self.codes.append(error.code())
        self.began.set()


def expected_answer(address):
    client = Client(address)
    bits = client.generate(chat(example("scene-two.png"), "Describe the image."), max_tokens=24, logprobs=1).bits()
    client.close()
    return bits


def wait_gone(d, limit_s=5 * LOADED_FACTOR):
    end = time.monotonic() + limit_s
    while (left := d.processes()) and time.monotonic() < end:
        time.sleep(0.05)
    if left:
        d.kill()
    return left


class Struck(daemon.Daemon):
    """A daemon that is struck somewhere between its start and readiness; readiness may win."""

    def __init__(self, fault, draw):
        self.fault, self.delay_s = fault, draw.uniform(0.1, 0.9)
        super().__init__(**LAYOUTS[fault.layout])

    def _wait_for_address(self, port_file, limit_s=START_LIMIT_S):
        threading.Thread(target=self._strike).start()
        try:
            return super()._wait_for_address(port_file, limit_s)
        except AssertionError:
            return None  # it ended: the status tells

    def _strike(self):
        time.sleep(self.delay_s)
        end = time.monotonic() + 10
        while time.monotonic() < end:
            pid = self.ranks().get(self.fault.rank)
            if pid:
                strike(pid, self.fault.how)
                return
            time.sleep(0.01)


def strike(pid, how):
    try:
        os.kill(pid, how)
    except ProcessLookupError:
        pass  # it has ended


def run(fault, draw, expected):
    start = 0.0
    if fault.phase == "load":
        d, calls = Struck(fault, draw), None
    else:
        d = daemon.Daemon(**LAYOUTS[fault.layout])
        assert expected_answer(d.address) == expected, "the answer after a restart differs"
        pid = d.ranks()[fault.rank]
        calls = Calls(d.address, fault.phase) if fault.phase != "idle" else None
        if calls:
            calls.began.wait(30)
            time.sleep(draw.uniform(0, 0.05))
        if fault.phase == "drain":
            d.terminate()
            time.sleep(draw.uniform(0, 0.1))
        start = time.monotonic()
        strike(pid, fault.how)
    status = d.status if d.status is not None else d.wait(60)
    log = d.log()
    if calls:
        calls.join(60)
        assert not calls.is_alive(), f"a call did not end\n{log}"
        took = calls.ended - start
        assert all(c in (Code.UNAVAILABLE, Code.OK) for c in calls.codes), f"{calls.codes}\n{log}"
        assert took < LIMIT_S * LOADED_FACTOR, f"calls ended after {took:.1f} s\n{log}"
    left = wait_gone(d)
    assert not left, f"orphans {sorted(left)}\n{log}"
    if fault.phase in ("prefill", "vision", "decode", "idle"):
        assert status not in (0, None), f"status {status}\n{log}"


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--faults", type=int, default=int(os.environ.get("INTERNVLD_FAULTS", N_FAULTS)))
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    draw = random.Random(options.seed)
    faults = all_faults()
    draw.shuffle(faults)
    with daemon.Daemon(tensor=2) as d:
        expected = expected_answer(d.address)
    began, failures = time.monotonic(), []
    for i, fault in enumerate(itertools.islice(itertools.cycle(faults), options.faults)):
        at = time.monotonic()
        try:
            run(fault, draw, expected)
            print(f"fault {i}: {fault}: {time.monotonic() - at:.1f} s", flush=True)
        except AssertionError as error:
            failures.append(fault)
            print(f"FAILED fault {i} (seed {options.seed}): {fault}\n{error}", flush=True)
    print(f"{options.faults} faults in {time.monotonic() - began:.0f} s, {len(failures)} failed", flush=True)
    with daemon.Daemon(tensor=2) as d:
        assert expected_answer(d.address) == expected
    return 1 if failures else 0


if __name__ == "__main__":
    raise SystemExit(main())
