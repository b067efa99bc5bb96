"""What goes wrong before a rank is watched. A rank that hangs while the ranks find each other: the job ends by itself
when --start-timeout is over, says which rank is stopped, and leaves nothing. (A rank that hangs at the very end is
campaign.py, phase drain.) And a user that the system does not know, without a home: systemd's dynamic users."""

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
import threading
import time

import daemon
from support import main, unittest

START_TIMEOUT_S = 4
UNKNOWN = 54321  # a user id
N_TRIES = 10  # a rank may be in before the signal comes


class HungAtStart(daemon.Daemon):
    """`rank` is stopped as soon as it is seen."""

    def __init__(self, rank, **layout):
        self.rank, self.stopped = rank, None
        super().__init__(extra=("--start-timeout", START_TIMEOUT_S), **layout)

    def _wait_for_address(self, port_file, limit_s=60):
        threading.Thread(target=self._stop).start()
        try:
            return super()._wait_for_address(port_file, limit_s)
        except AssertionError as error:
            assert "was not ready" not in str(error), error
            return None  # it ended by itself: the status tells

    def _stop(self):
        while self.stopped is None and self.process.poll() is None:
            pid = self.ranks().get(self.rank)
            if pid:
                with contextlib.suppress(ProcessLookupError):  # it has ended
                    os.kill(pid, signal.SIGSTOP)
                    self.stopped = pid
            time.sleep(0.002)


class HungStart(unittest.TestCase):
    def hang(self, rank, **layout):
        for _ in range(N_TRIES):
            start = time.monotonic()
            d = HungAtStart(rank, **layout)
            took = time.monotonic() - start
            status = d.status
            d.kill()
            if status is not None and "was lost" not in d.log() and "is lost" not in d.log():
                break
        else:
            self.skipTest(f"rank {rank} was never stopped early enough")
        print(f"  rank {rank} stopped at its start: ended with {status} after {took:.1f} s", flush=True)
        self.assertNotEqual(status, 0, d.log())
        self.assertRegex(d.log(), rf"the start .* within {START_TIMEOUT_S} s: rank {rank} \(process {d.stopped}\) is "
                                  "stopped")

    def test_gateway(self):
        self.hang(0)

    def test_worker(self):
        self.hang(2)


class UnknownUser(unittest.TestCase):
    def test_no_home(self):
        if os.geteuid() != 0 or not shutil.which("setpriv"):
            self.skipTest("not root, or no setpriv: nobody else can be played")
        with tempfile.TemporaryDirectory() as folder:
            os.chown(folder, UNKNOWN, UNKNOWN)
            environment = {k: v for k, v in os.environ.items() if k != "HOME"}
            program = daemon.program("INTERNVLD_DAEMON")
            other = ["setpriv", f"--reuid={UNKNOWN}", f"--regid={UNKNOWN}", "--clear-groups"]
            for option, path in (("-x", program), ("-r", daemon.DEMO_MODEL / "config.json")):
                if subprocess.run([*other, "test", option, path]).returncode != 0:
                    self.skipTest(f"another user cannot read {path}")
            done = subprocess.run([*other, program, "--model", daemon.DEMO_MODEL, "--map"], capture_output=True,
                                  text=True, env={**environment, "TMPDIR": folder})
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertIn("gateway", done.stdout)


if __name__ == "__main__":
    main()
