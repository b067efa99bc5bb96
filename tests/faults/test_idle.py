"""An idle daemon burns no cores: CPU time of every process of the job over five seconds, from /proc."""

import time

import daemon
from support import Client, chat, example, main, unittest

SECONDS = 5.0
LIMIT = 0.02  # of one core


class Idle(unittest.TestCase):
    def measure(self, **layout):
        with daemon.Daemon(**layout) as d:
            client = Client(d.address)
            roles = {r.rank: r.role for r in client.model().ranks}
            client.generate(chat(example("scene-two.png"), "Describe the image."))  # everything was used once
            client.wait_idle()
            client.close()
            time.sleep(1)
            ranks = {pid: rank for rank, pid in d.ranks().items()}
            processes = sorted(d.processes())
            share = daemon.cpu_shares(processes, SECONDS)
        for pid in processes:
            name = f"rank {ranks[pid]} ({roles[ranks[pid]]})" if pid in ranks else "launcher"
            print(f"  {name}: {100 * share[pid]:.2f} % of a core", flush=True)
        for pid in processes:
            if pid in ranks:
                self.assertLess(share[pid], LIMIT, roles[ranks[pid]])

    def test_four_ranks(self):
        self.measure(tensor=2)

    def test_seven_ranks(self):
        self.measure(tensor=2, pipeline=2, vision=2)


if __name__ == "__main__":
    main()
