"""A rank is killed, or hangs, while streams run: the streams end UNAVAILABLE, the job ends non-zero, naming the
rank, and nothing of it stays. Times are printed; the bounds asserted are generous (the aim is 2 s)."""

import os
import signal
import threading
import time

import grpc

import daemon
from support import Client, Code, chat, example, main, unittest

LIMIT_S = 10.0
LIMIT_HANG_S = 30.0


class LostRank(unittest.TestCase):
    def streams(self, client, n):
        """n long streams with a picture, each running; their outcomes are filled in as they end."""
        running, outcomes = threading.Barrier(n + 1), []

        def read():
            waited = False
            try:
                for event in client.start(chat(example("scene-two.png"), "Describe the image."), max_tokens=3500,
                                          ignore_eos=True):
                    if event.WhichOneof("event") == "delta" and not waited:
                        waited = True
                        running.wait(60)
                outcomes.append((time.monotonic(), "finished"))
            except grpc.RpcError as error:
                outcomes.append((time.monotonic(), error.code()))

        threads = [threading.Thread(target=read) for _ in range(n)]
        for t in threads:
            t.start()
        running.wait(60)
        return threads, outcomes

    def lose(self, rank, how, limit_s, **layout):
        d = daemon.Daemon(**layout)
        client = Client(d.address)
        role = client.model().ranks[rank].role
        ranks = d.ranks()
        self.assertEqual(sorted(ranks), list(range(len(ranks))))
        threads, outcomes = self.streams(client, 4)
        start = time.monotonic()
        os.kill(ranks[rank], how)
        status = d.wait(60)
        ended = time.monotonic() - start
        for t in threads:
            t.join(60)
        last = max(when for when, _ in outcomes) - start
        client.close()
        time.sleep(0.1)
        left = d.processes()
        print(f"  rank {rank} ({role}), signal {how.name}: streams over after {last:.2f} s, job after {ended:.2f} s, "
              f"status {status}", flush=True)
        log = d.log()
        if left:
            d.kill()
        self.assertEqual([code for _, code in outcomes], [Code.UNAVAILABLE] * 4, log)
        self.assertNotEqual(status, 0, log)
        self.assertRegex(log, rf"\brank {rank}\b", "the log does not name the rank")
        self.assertEqual(left, {}, f"orphans\n{log}")
        self.assertLess(max(ended, last), limit_s, log)

    def test_killed_gateway(self):
        self.lose(0, signal.SIGKILL, LIMIT_S, tensor=2)

    def test_killed_vision(self):
        self.lose(1, signal.SIGKILL, LIMIT_S, tensor=2)

    def test_killed_language_shards(self):
        self.lose(2, signal.SIGKILL, LIMIT_S, tensor=2)
        self.lose(3, signal.SIGKILL, LIMIT_S, tensor=2)

    def test_killed_stages(self):
        self.lose(3, signal.SIGKILL, LIMIT_S, pipeline=2, vision=2)
        self.lose(4, signal.SIGKILL, LIMIT_S, pipeline=2, vision=2)

    def test_hung(self):
        """SIGSTOP: no connection breaks, only heartbeats stay away."""
        self.lose(1, signal.SIGSTOP, LIMIT_HANG_S, tensor=2)
        self.lose(2, signal.SIGSTOP, LIMIT_HANG_S, tensor=2)

    def test_launcher_killed(self):
        """kill -9 of the process that the user started: nothing may stay."""
        d = daemon.Daemon()
        d.process.kill()
        d.process.wait()
        start, left = time.monotonic(), d.processes()
        while left and time.monotonic() - start < LIMIT_S:
            time.sleep(0.05)
            left = d.processes()
        print(f"  launcher killed: nothing left after {time.monotonic() - start:.2f} s", flush=True)
        log = d.log()
        if left:
            d.kill()
        self.assertEqual(left, {}, f"orphans\n{log}")


if __name__ == "__main__":
    main()
