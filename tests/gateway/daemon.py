"""Starts and stops a real internvld for a test.

A daemon is started on a free port of 127.0.0.1, found through its --port-file. Every process of its job carries
a mark in its environment: that is how ranks and orphans are found, and nothing without our mark is ever signalled.
"""

import atexit
import ctypes
import os
import pathlib
import shutil
import signal
import subprocess
import tempfile
import time
import uuid

ROOT = pathlib.Path(__file__).resolve().parents[2]
DEMO_MODEL = ROOT / "deploy/demo/model"
EXAMPLES = ROOT / "deploy/demo/examples"
MARK = "INTERNVLD_TEST_MARK"


def program(name):
    path = os.environ.get(name)
    if not path:
        raise SystemExit(f"{name} is not set: it is the path of the program under test (ctest sets it)")
    return path


def _end_with_parent():
    """Run in the child: SIGTERM when the test program dies, also when that is killed (PR_SET_PDEATHSIG)."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)


def cpu_seconds(pid):
    """That the process has used so far."""
    fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")  # utime + stime


def cpu_shares(pids, seconds):
    """{pid: share of one core} that each uses while we sleep."""
    before = {pid: cpu_seconds(pid) for pid in pids}
    start = time.monotonic()
    time.sleep(seconds)
    elapsed = time.monotonic() - start
    return {pid: (cpu_seconds(pid) - before[pid]) / elapsed for pid in pids}


def forked_rank(pid):
    """As mpirun says it in the environment, of a rank that a lone internvld forked."""
    try:
        name = pathlib.Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return {}
    return {"OMPI_COMM_WORLD_RANK": name.removeprefix("internvld.r")} if name.startswith("internvld.r") else {}


def layout_of(text):
    """"2x1x1", T x P x V, as arguments of Daemon."""
    return dict(zip(("tensor", "pipeline", "vision"), map(int, text.split("x")), strict=True))


def refusal(model, tensor, pipeline, vision=1):
    """Why the daemon does not take this layout of the model, in its own words; None when it takes it."""
    plan = subprocess.run([program("INTERNVLD_DAEMON"), "--model", str(model), "--tensor-parallel-size", str(tensor),
                           "--pipeline-parallel-size", str(pipeline), "--vision-ranks", str(vision), "--plan"],
                          capture_output=True, text=True)
    return plan.stderr.strip() if plan.returncode else None


def planned(*arguments):
    """What --plan says of each rank: {"role": ..., "weights": bytes, "KV": ..., "scratch", "process", "total"}."""
    text = subprocess.run([program("INTERNVLD_DAEMON"), *map(str, arguments), "--plan"], check=True,
                          capture_output=True, text=True).stdout
    rows = [x.split() for x in text.splitlines() if x.split()[0].isdigit()]
    names = ("weights", "KV", "scratch", "process", "total")
    return [{"role": x[1], **{n: float(v) * (1 << 20) for n, v in zip(names, x[-len(names):])}} for x in rows]


class Daemon:
    """with Daemon(tensor=2) as d: … d.address …; leaving the block drains it."""

    def __init__(self, model=DEMO_MODEL, tensor=1, pipeline=1, vision=1, dtype=None, extra=()):
        self.mark = uuid.uuid4().hex
        self.status = 0  # nothing to end yet
        folder = pathlib.Path(tempfile.mkdtemp(prefix="internvld-test-"))
        atexit.register(self._clean_up, folder)
        self.log_path, port_file = folder / "log", folder / "address"
        self.command = [program("INTERNVLD_DAEMON"), "--model", str(model), "--listen", "127.0.0.1:0",
                        "--port-file", str(port_file), "--tensor-parallel-size", str(tensor),
                        "--pipeline-parallel-size", str(pipeline), "--vision-ranks", str(vision)]
        if dtype:
            self.command += ["--dtype", dtype]
        self.command += [str(x) for x in extra]
        self.status = None
        with open(self.log_path, "wb") as log:
            self.process = subprocess.Popen(self.command, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                                            env={**os.environ, MARK: self.mark}, start_new_session=True,
                                            preexec_fn=_end_with_parent)
        self.address = self._wait_for_address(port_file)

    def _clean_up(self, folder):
        """At the end of the test program, however it ends."""
        if self.status is None:
            self.kill()
        shutil.rmtree(folder, ignore_errors=True)

    def _wait_for_address(self, port_file, limit_s=180):
        end = time.monotonic() + limit_s
        while time.monotonic() < end:
            text = port_file.read_text() if port_file.exists() else ""
            if text.endswith("\n"):
                return text.strip()
            if self.process.poll() is not None:
                self.status = self.process.returncode
                raise AssertionError(f"{' '.join(self.command)}\nexited with {self.status}:\n{self.log()}")
            time.sleep(0.02)
        self.kill()
        raise AssertionError(f"{' '.join(self.command)}\nwas not ready after {limit_s} s:\n{self.log()}")

    def log(self):
        return self.log_path.read_text(errors="replace")

    def processes(self):
        """{pid: environment} of everything alive in this job."""
        found = {}
        for entry in os.listdir("/proc"):
            if not entry.isdigit():
                continue
            try:
                raw = pathlib.Path(f"/proc/{entry}/environ").read_bytes()
                state = pathlib.Path(f"/proc/{entry}/stat").read_text().rsplit(")", 1)[1].split()[0]
            except (OSError, IndexError):
                continue
            environment = dict(x.split("=", 1) for x in raw.decode(errors="replace").split("\0") if "=" in x)
            if environment.get(MARK) == self.mark and state not in "ZX":
                found[int(entry)] = environment | forked_rank(entry)
        return found

    def ranks(self):
        """{rank: pid}"""
        by_rank = {}
        for pid, environment in self.processes().items():
            rank = environment.get("OMPI_COMM_WORLD_RANK")
            if rank is not None:
                by_rank[int(rank)] = min(pid, by_rank.get(int(rank), pid))
        return by_rank

    def terminate(self):
        self.process.send_signal(signal.SIGTERM)

    def wait(self, limit_s=120):
        """The exit status; kills the job and fails when it does not come."""
        try:
            self.status = self.process.wait(limit_s)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"the daemon did not end within {limit_s} s:\n{self.log()}") from None
        return self.status

    def stop(self):
        if self.status is None:
            self.terminate()
            self.wait()
        return self.status

    def wait_gone(self, limit_s):
        """Until no process of the job is left; what still is after limit_s is killed and returned."""
        end = time.monotonic() + limit_s
        while (left := self.processes()) and time.monotonic() < end:
            time.sleep(0.05)
        if left:
            self.kill()
        return left

    def kill(self):
        for pid in self.processes():
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        self.status = self.process.wait()

    def __enter__(self):
        return self

    def __exit__(self, kind, value, trace):
        if self.status is None and kind is not None:
            print(f"---- the daemon's log\n{self.log()}----", flush=True)
        status = self.stop()
        left = self.processes()
        if left:
            self.kill()
        text = self.log()
        if kind is None:
            assert not left, f"processes of the job outlived it: {sorted(left)}"
            assert status == 0, f"the daemon exited with {status}:\n{text}"
