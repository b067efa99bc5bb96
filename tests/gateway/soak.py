"""Mixed load with random cancels for a while: memory of every rank flat, all pages free at the end.

    tests/gateway/run.py tests/gateway/soak.py [--seconds 600] [--workers 12]

Texts, pictures (some new, some seen), several candidates, beams, Forward and Score; a third are cancelled at a random
moment or by a deadline. RSS of every rank is sampled; after a fifth of the time (the caches are full then: they are
made small) a straight line is fitted. Fails when a rank grows by more than GROWTH_MIB from the fit's begin to its end,
when an answer differs from its first one, or when pages or requests are left.
"""

import argparse
import random
import threading
import time

import grpc
import numpy

import daemon
from support import Client, Code, chat, example, pb, png

GROWTH_MIB = 4.0  # the allocator's own wandering; a leak of 1 KiB a request would be ten times that
EXPECTED_ENDS = {Code.CANCELLED, Code.DEADLINE_EXCEEDED, Code.RESOURCE_EXHAUSTED}


def new_picture(draw):
    """A PNG that no cache has seen."""
    width, height = 224, 168
    return png(width, height, b"".join(b"\0" + draw.randbytes(8) * (3 * width // 8) for _ in range(height)))


class Worker(threading.Thread):
    def __init__(self, address, seed, until, fixed):
        super().__init__()
        self.client, self.draw, self.until, self.fixed = Client(address), random.Random(seed), until, fixed
        self.n_calls = self.n_cut = 0
        self.failures = []
        self.start()

    def run(self):
        while time.monotonic() < self.until and not self.failures:
            try:
                self.call()
            except grpc.RpcError as error:
                if error.code() not in EXPECTED_ENDS:
                    self.failures.append(f"{error.code()}: {error.details()}")
                self.n_cut += 1
            except Exception as error:  # an answer that is not well-formed, or our own mistake
                self.failures.append(repr(error))
            self.n_calls += 1
        self.client.close()

    def call(self):
        kind = self.draw.randrange(8)
        if kind == 0:
            answer = self.client.generate(self.fixed[0], max_tokens=24, temperature=0, timeout=60)
            if answer.ids != self.fixed[1]:
                self.failures.append(f"the answer changed: {answer.ids} instead of {self.fixed[1]}")
        elif kind == 1:
            self.client.forward(chat("one two three " * 20), ["logits", "hidden_states"], timeout=60)
        elif kind == 2:
            self.client.stub.Score(pb.ScoreRequest(prompt=chat("Say cat."), continuations=[
                pb.Continuation(text="cat"), pb.Continuation(text="dog")]), timeout=60)
        else:
            picture = new_picture(self.draw) if kind < 5 else example("scene-two.png")
            sampling = {3: {"num_beams": 3, "n": 2}, 4: {}, 5: {"n": 3, "temperature": 1.0}}
            sampling = sampling.get(kind, {"temperature": 1.0})
            deadline = self.draw.choice([60, 60, self.draw.uniform(0.005, 0.3)])
            call = self.client.start(chat(picture, "Describe the image."), deadline, ignore_eos=True,
                                     max_tokens=self.draw.choice([4, 40, 200]), **sampling)
            stop_after = self.draw.choice([None, None, self.draw.randrange(1, 20)])
            for i, _ in enumerate(call):
                if stop_after is not None and i >= stop_after:
                    call.cancel()


def rss_mib(pid):
    with open(f"/proc/{pid}/statm") as f:
        return int(f.read().split()[1]) * 4096 / 2**20


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--workers", type=int, default=12)
    a = parser.parse_args()
    failures = []
    with daemon.Daemon(tensor=2, pipeline=2, vision=1, dtype="float32", extra=(
            "--kv-cache-memory-bytes", "8M", "--max-model-len", "1024", "--vision-cache-bytes", "2M")) as d:
        client = Client(d.address)
        prompt = chat(example("scene-two.png"), "What color is the star?")
        fixed = (prompt, client.generate(prompt, max_tokens=24, temperature=0).ids)
        begin = time.monotonic()
        workers = [Worker(d.address, i, begin + a.seconds, fixed) for i in range(a.workers)]
        ranks, samples = d.ranks(), []
        while any(w.is_alive() for w in workers):
            time.sleep(min(1.0, a.seconds / 60))
            samples.append([time.monotonic() - begin, *(rss_mib(pid) for _, pid in sorted(ranks.items()))])
        for w in workers:
            w.join()
            failures += w.failures
        client.wait_idle()
        load = client.model().load
        client.close()
    if load.running or load.waiting or load.kv_pages_used:
        failures.append(f"left behind: {load}")
    samples = numpy.array([s for s in samples if a.seconds / 5 <= s[0] <= a.seconds])
    for i, rank in enumerate(sorted(ranks)):
        slope, start = numpy.polyfit(samples[:, 0], samples[:, 1 + i], 1)
        growth = slope * (samples[-1, 0] - samples[0, 0])
        print(f"rank {rank}: {samples[0, 1 + i]:.1f} MiB, then {growth:+.2f} MiB in {samples[-1, 0] - samples[0, 0]:.0f} s "
              f"(spread {samples[:, 1 + i].std():.2f})")
        if growth > GROWTH_MIB:
            failures.append(f"rank {rank} grows by {growth:.1f} MiB")
    print(f"{sum(w.n_calls for w in workers)} calls, {sum(w.n_cut for w in workers)} of them cut off, "
          f"{len(failures)} failures")
    for failure in failures[:10]:
        print(f"FAILED {failure}")
    return 1 if failures else 0


if __name__ == "__main__":
    raise SystemExit(main())
