"""What goes wrong before a rank is watched. A rank that hangs while the ranks find each other: the job ends by itself
when --start-timeout is over, says which rank is stopped, and leaves nothing. (A rank that hangs at the very end is
campaign.py, phase drain.) An mpirun that stays though its ranks have ended is ended by its parent. And a user that the
system does not know, without a home: systemd's dynamic users."""

import contextlib
import os
import pathlib
import shutil
import signal
import subprocess
import tempfile
import threading
import time

import daemon
from support import SANITIZED, main, unittest

START_TIMEOUT_S = 4
UNKNOWN = 54321  # a user id
N_AT_ONCE = 4  # one in three of them leaves an mpirun that hangs
MPIRUN_WITHOUT_END = """#!/bin/sh
sleep 0.5 &
exec sleep 1000
"""
MPIRUN_WITH_A_RANK = """#!/bin/sh
sleep 5 &
wait
exit 3
"""
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
            if status is not None and not any(late in d.log() for late in ("was lost", "is lost", "is gone")):
                break
        else:
            self.skipTest(f"rank {rank} was never stopped early enough")
        print(f"  rank {rank} stopped at its start: ended with {status} after {took:.1f} s", flush=True)
        self.assertNotEqual(status, 0, d.log())
        self.assertRegex(d.log(), rf"the start .* within {START_TIMEOUT_S} s: rank {rank} \(process {d.stopped}\) is "
                                  "stopped")

    def test_gateway(self):
        self.hang(0, tensor=2)

    def test_worker(self):
        self.hang(2, tensor=2)

    def test_forked(self):
        self.hang(0)


class StaleLauncher(unittest.TestCase):
    def run_under(self, mpirun):
        """A lone internvld that needs mpirun, which is this script; its status and what it says."""
        with tempfile.TemporaryDirectory() as folder:
            path = pathlib.Path(folder) / "mpirun"
            path.write_text(mpirun)
            path.chmod(0o755)
            done = subprocess.run([daemon.program("INTERNVLD_DAEMON"), "--model", daemon.DEMO_MODEL,
                                   "--tensor-parallel-size", "2"],
                                  env={**os.environ, "PATH": f"{folder}:{os.environ['PATH']}"}, capture_output=True,
                                  text=True, timeout=60)
        return done.returncode, done.stderr

    def test_is_ended(self):
        status, log = self.run_under(MPIRUN_WITHOUT_END)
        self.assertEqual(status, 128 + signal.SIGKILL, log)
        self.assertIn("every rank has ended and mpirun has not", log)

    def test_is_left_alone(self):
        """While a rank lives; the status is mpirun's."""
        self.assertEqual(self.run_under(MPIRUN_WITH_A_RANK), (3, ""))

    def test_rank_dies_connecting(self):
        """The death that makes mpirun 4.1 hang at its own end; whether it does is left to the scheduler."""
        if SANITIZED:
            self.skipTest("a sanitizer has to be loaded before anything else")
        os.environ["LD_PRELOAD"] = os.environ["INTERNVLD_DIES_CONNECTING"]
        os.environ["INTERNVLD_TEST_DIES"] = "2"
        try:
            jobs = [DiesAtStart(tensor=2) for _ in range(N_AT_ONCE)]
        finally:
            del os.environ["LD_PRELOAD"], os.environ["INTERNVLD_TEST_DIES"]
        for job in jobs:
            self.assertNotEqual(job.wait(60), 0, job.log())
            self.assertEqual(job.wait_gone(5), {}, job.log())
        n_hung = sum("every rank has ended and mpirun has not" in job.log() for job in jobs)
        print(f"  a rank died while it connected: {n_hung} of {N_AT_ONCE} mpiruns hung and were killed", flush=True)


class DiesAtStart(daemon.Daemon):
    def _wait_for_address(self, port_file, limit_s=0):
        return None  # there will be none


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
            for size in "12":  # without mpirun, and with it
                done = subprocess.run([*other, program, "--model", daemon.DEMO_MODEL, "--map", "--tensor-parallel-size",
                                       size], capture_output=True, text=True, env={**environment, "TMPDIR": folder})
                self.assertEqual(done.returncode, 0, done.stderr)
                self.assertIn("gateway", done.stdout)


if __name__ == "__main__":
    main()
