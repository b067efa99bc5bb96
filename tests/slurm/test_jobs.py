"""deploy/slurm/ on a real Slurm of two nodes: serve on both, evaluate by an array of clients, cut off in the middle,
queued again; a killed rank; drains. Answers are those of a daemon without Slurm, to the byte."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import daemon
from cluster import Cluster, why_not
from support import main, unittest

QUESTIONS = daemon.ROOT / "tests/data/demo-eval/eval.jsonl"
N_QUESTIONS = 480


def answers(path):
    """Everything but times, one text a question."""
    found = []
    for line in pathlib.Path(path).read_text().splitlines():
        result = json.loads(line)
        del result["total_us"]
        found.append(json.dumps(result))
    return found


def evaluate_here(address, folder):
    out = pathlib.Path(folder) / "local.jsonl"
    subprocess.run([daemon.program("INTERNVLD_COMMAND"), "--address", address, "evaluate", QUESTIONS, "--limit",
                    str(N_QUESTIONS), "--output", out], check=True, stdout=subprocess.DEVNULL)
    return answers(out)


def wait_lines(path, n, limit_s=60):
    end = time.monotonic() + limit_s
    while not path.exists() or path.read_bytes().count(b"\n") < n:
        assert time.monotonic() < end, f"no {n} lines in {path}"
        time.sleep(0.005)


class Jobs(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.slurm = Cluster().__enter__()
        cls.environment = {"INTERNVLD_HOME": daemon.ROOT, "INTERNVLD": daemon.program("INTERNVLD_DAEMON"),
                           "INTERNVL": daemon.program("INTERNVLD_COMMAND"), daemon.MARK: "slurm",
                           "OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
                           "OMPI_MCA_mpi_yield_when_idle": "1"}
        with daemon.Daemon() as alone:
            cls.expected = evaluate_here(alone.address, cls.slurm.root)

    @classmethod
    def tearDownClass(cls):
        cls.slurm.__exit__()

    def log(self, job, task=None):
        name = f"internvld-{job}.log" if task is None else f"evaluate-{job}-{task}.log"
        path = self.slurm.root / name
        return path.read_text(errors="replace") if path.exists() else f"no {name}"

    def serve(self, name, *extra):
        endpoint = self.slurm.root / name
        job = self.slurm.submit("-N2", daemon.ROOT / "deploy/slurm/serve.sbatch", "two-by-two", daemon.DEMO_MODEL,
                                endpoint, *extra, environment=self.environment)
        self.wait_endpoint(job, endpoint)
        self.assertEqual(endpoint.stat().st_mode & 0o777, 0o600)
        return job, endpoint

    def wait_endpoint(self, job, endpoint, limit_s=90):
        end = time.monotonic() + limit_s
        while not endpoint.exists():
            if time.monotonic() > end:
                self.fail(f"no endpoint after {limit_s} s, job {self.slurm.state(job)}\n{self.log(job)}")
            time.sleep(0.05)

    def submit_evaluation(self, endpoint, results, *options, concurrency=1):
        return self.slurm.submit(*options, daemon.ROOT / "deploy/slurm/evaluate.sbatch", QUESTIONS, endpoint, results,
                                 "--limit", N_QUESTIONS, "--concurrency", concurrency, environment=self.environment)

    def test_array_cut_off_and_requeued(self):
        job, endpoint = self.serve("endpoint-array")
        results = self.slurm.root / "array"
        tasks = self.submit_evaluation(endpoint, results, "--array=0-2")
        for shard in range(3):
            wait_lines(results / f"results.{shard}.jsonl", 5)
        self.slurm.run("scontrol", "requeue", f"{tasks}_0")  # cut off in the middle; it comes back by itself
        self.slurm.run("scancel", f"{tasks}_1")
        self.slurm.wait_state(f"{tasks}_0", "COMPLETED")
        self.slurm.wait_state(f"{tasks}_2", "COMPLETED")
        self.assertFalse((results / "results.jsonl").exists(), "shard 1 cannot be complete")
        n_kept = (results / "results.1.jsonl").read_bytes().count(b"\n")
        again = self.submit_evaluation(endpoint, results, "--array=0-2")
        self.slurm.wait_state(again, "COMPLETED")
        summary = json.loads((results / "summary.1.json").read_text())
        self.assertEqual(summary["asked"], N_QUESTIONS // 3 - n_kept, "a question was asked twice, or was lost")
        self.assertEqual(json.loads((results / "summary.0.json").read_text())["asked"], 0)
        self.assertEqual(answers(results / "results.jsonl"), self.expected)
        self.assertEqual(json.loads((results / "summary.json").read_text())["overall"]["questions"], N_QUESTIONS)
        self.assertIn("<svg", (results / "report.html").read_text())
        print(f"  shard 1 was cut off after {n_kept} of {N_QUESTIONS // 3} answers", flush=True)
        self.slurm.run("scancel", "--signal=USR1", "--batch", job)
        self.slurm.wait_state(job, "COMPLETED")
        self.assertFalse(endpoint.exists())
        self.assertIn("draining", self.log(job))

    def test_rank_killed(self):
        """The job is queued again and serves; a client that was asking never notices more than a pause."""
        job, endpoint = self.serve("endpoint-killed")
        results = self.slurm.root / "killed"
        evaluation = self.submit_evaluation(endpoint, results)
        wait_lines(results / "results.0.jsonl", 30)
        before = endpoint.read_text()
        os.kill(self.rank(3), signal.SIGKILL)
        start = time.monotonic()
        while not endpoint.exists() or endpoint.read_text() == before:
            time.sleep(0.05)
            self.assertLess(time.monotonic() - start, 120, self.log(job))
        print(f"  serving again {time.monotonic() - start:.1f} s after a rank was killed", flush=True)
        self.slurm.wait_state(evaluation, "COMPLETED")
        self.assertEqual(answers(results / "results.jsonl"), self.expected, self.log(evaluation, 0))
        self.assertIn("queued again", self.log(job))
        # A plain scancel: the ranks get SIGTERM and drain.
        self.slurm.run("scancel", job)
        self.slurm.wait_state(job, "CANCELLED")
        self.wait_no_ranks()
        self.assertIn("draining", self.log(job))
        self.assertFalse(endpoint.exists())

    def test_daemon_and_client_in_one_job(self):
        results = self.slurm.root / "one"
        job = self.submit_evaluation(f"one-gpu={daemon.DEMO_MODEL}", results)
        self.slurm.wait_state(job, "COMPLETED")
        self.assertEqual(answers(results / "results.jsonl"), self.expected)
        self.wait_no_ranks()

    def processes(self):
        """{rank: pid} of ranks that Slurm started."""
        found = {}
        for entry in pathlib.Path("/proc").iterdir():
            try:
                variables = dict(x.split("=", 1) for x in (entry / "environ").read_text().split("\0") if "=" in x)
                executable = os.readlink(entry / "exe")
            except (OSError, UnicodeDecodeError):
                continue
            if variables.get("SLURM_CONF") == self.slurm.environment["SLURM_CONF"] and \
                    executable.startswith(daemon.program("INTERNVLD_DAEMON")):
                found[int(variables.get("PMIX_RANK", -1))] = int(entry.name)
        return found

    def rank(self, rank):
        return self.processes()[rank]

    def wait_no_ranks(self, limit_s=30):
        end = time.monotonic() + limit_s
        while (left := self.processes()) and time.monotonic() < end:
            time.sleep(0.1)
        self.assertEqual(left, {})


if __name__ == "__main__":
    if why_not():
        print(f"skipped: {why_not()}")
        sys.exit(77)
    main()
