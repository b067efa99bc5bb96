"""A rank is killed, or hangs, while streams run: the streams end UNAVAILABLE with the reason, health is NOT_SERVING,
the job ends non-zero, naming the rank, and nothing of it stays. One rank a fault: campaign.py has every role and phase. And
the launcher is killed. Times are printed; the bounds asserted are generous (the aim is 2 s)."""

import os
import pathlib
import signal
import time

import daemon
from streams import Streams
from support import main, unittest

LIMIT_S, LIMIT_HANG_S = 10.0, 20.0


class LostRank(unittest.TestCase):
    def lose(self, rank, how, limit_s, **layout):
        d = daemon.Daemon(**layout)
        streams = Streams(d.address)
        start = time.monotonic()
        os.kill(d.ranks()[rank], how)
        d.wait(60)
        streams.check_lost(self, d, rank, start, f"rank {rank}, {how.name}", limit_s)
        self.assertEqual(d.wait_gone(0.1), {}, f"orphans\n{d.log()}")

    def test_killed(self):
        self.lose(2, signal.SIGKILL, LIMIT_S, tensor=2)

    def test_stopped(self):
        """No connection breaks, only heartbeats stay away."""
        self.lose(1, signal.SIGSTOP, LIMIT_HANG_S, tensor=2)

    def test_leaves_no_files(self):
        """Also when every rank is killed at once: what they share in memory is in a folder of mpirun's parent."""
        d = daemon.Daemon(tensor=2)
        words = {word for pid in d.processes() for word in pathlib.Path(f"/proc/{pid}/cmdline").read_text().split("\0")}
        folder, = (pathlib.Path(word) for word in words if word.startswith("/dev/shm/internvld-"))
        self.assertTrue(any(path.is_file() for path in folder.iterdir()))
        for pid in d.ranks().values():
            os.kill(pid, signal.SIGKILL)
        self.assertNotEqual(d.wait(60), 0)
        self.assertFalse(folder.exists())

    def test_launcher_killed(self):
        """kill -9 of the process that the user started: nothing may stay."""
        for parent_of, tensor in (("the ranks", 1), ("mpirun", 2)):
            d = daemon.Daemon(tensor=tensor)
            d.process.kill()
            d.process.wait()
            start = time.monotonic()
            self.assertEqual(d.wait_gone(LIMIT_S), {}, f"orphans\n{d.log()}")
            print(f"  parent of {parent_of} killed: nothing left after {time.monotonic() - start:.2f} s", flush=True)


if __name__ == "__main__":
    main()
