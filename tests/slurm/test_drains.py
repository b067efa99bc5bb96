"""Drains under load as Slurm makes them: a plain scancel (SIGTERM to the ranks of srun), scancel --signal=USR1 --batch,
and a time limit that Slurm announces 60 s before. No accepted request is lost, and the job leaves by itself.

    test_drains.py [DRAINS]      3 in ctest; and one time limit"""

import random
import sys
import time

import daemon
from cluster import why_not
from serving import Serving
from support import main, unittest

sys.path.append(str(daemon.ROOT / "tests/faults"))
from test_drain import Load  # noqa: E402

N_CLIENTS = 6
N_DRAINS = 3


class Drains(Serving):
    def load(self, endpoint):
        host, token = endpoint.read_text().split()
        address = f"127.0.0.1:{host.rsplit(':', 1)[1]}"  # both nodes are this machine
        return [Load(address, token) for _ in range(N_CLIENTS)]

    def check(self, clients, job, state, endpoint):
        for c in clients:
            c.join(120)
            self.assertFalse(c.is_alive())
        self.slurm.wait_state(job, state)
        self.assertEqual([x for c in clients for x in c.lost], [], self.log(job))
        self.assertIn("draining", self.log(job))
        self.assertFalse(endpoint.exists())
        n_done = sum(c.n_done for c in clients)
        self.assertGreater(n_done, 0)
        return n_done

    def test_scancel(self):
        draw, start, n_done = random.Random(1), time.monotonic(), 0
        for i in range(N_DRAINS):
            job, endpoint = self.serve(f"endpoint-{i}")
            clients = self.load(endpoint)
            time.sleep(draw.uniform(0.5, 1.5))
            is_plain = i % 2 == 0
            self.slurm.run("scancel", *(() if is_plain else ("--signal=USR1", "--batch")), job)
            n_done += self.check(clients, job, "CANCELLED" if is_plain else "COMPLETED", endpoint)
        print(f"  {N_DRAINS} drains in {time.monotonic() - start:.0f} s, {n_done} requests, none lost", flush=True)

    def test_time_limit(self):
        """Slurm counts limits in minutes: with two of them USR1 comes within the first."""
        start = time.monotonic()
        job, endpoint = self.serve("endpoint-limit", sbatch=("--time=2",))
        clients = self.load(endpoint)
        n_done = self.check(clients, job, "COMPLETED", endpoint)
        print(f"  time limit of 120 s: drained after {time.monotonic() - start:.0f} s, {n_done} requests, none lost",
              flush=True)


if __name__ == "__main__":
    if why_not():
        print(f"skipped: {why_not()}")
        sys.exit(77)
    if len(sys.argv) > 1:
        N_DRAINS = int(sys.argv.pop())
    main()
