"""deploy/slurm/ on a real Slurm of two nodes: serve on both, evaluate by an array of clients, cut off in the middle,
queued again; a killed rank; drains. Answers are those of a daemon without Slurm, to the byte."""

import base64
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import daemon
from cluster import why_not
from serving import Serving
from support import main

QUESTIONS = daemon.ROOT / "tests/data/demo-eval/eval.jsonl"
N_QUESTIONS = 808  # all of them


def answers(path):
    """Everything but times, one text a question."""
    found = []
    for line in pathlib.Path(path).read_text().splitlines():
        result = json.loads(line)
        del result["total_us"]
        found.append(json.dumps(result))
    return found


def evaluate_here(address, folder, questions=QUESTIONS):
    out = pathlib.Path(folder) / f"local-{questions.stem}.jsonl"
    subprocess.run([daemon.program("INTERNVLD_COMMAND"), "--address", address, "evaluate", questions, "--output", out],
                   check=True, stdout=subprocess.DEVNULL)
    return answers(out)


def wait_lines(path, n, limit_s=60):
    end = time.monotonic() + limit_s
    while not path.exists() or path.read_bytes().count(b"\n") < n:
        assert time.monotonic() < end, f"no {n} lines in {path}"
        time.sleep(0.005)


class Jobs(Serving):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        with daemon.Daemon() as alone:
            cls.expected = evaluate_here(alone.address, cls.slurm.root)

    def submit_evaluation(self, endpoint, results, *options, concurrency=1, questions=QUESTIONS):
        return self.slurm.submit(*options, daemon.ROOT / "deploy/slurm/evaluate.sbatch", questions, endpoint, results,
                                 "--concurrency", concurrency, environment=self.environment)

    def test_array_cut_off_and_requeued(self):
        job, endpoint = self.serve("endpoint-array")
        results = self.slurm.root / "array"
        tasks = self.submit_evaluation(endpoint, results, "--array=0-2")
        for shard in range(3):
            wait_lines(results / f"results.{shard}.jsonl", 5)
        self.slurm.run("scontrol", "requeue", f"{tasks}_0")  # cut off in the middle; it comes back by itself
        self.slurm.run("scancel", f"{tasks}_1")
        os.kill(self.client(tasks, 2), signal.SIGKILL)
        self.slurm.wait_state(f"{tasks}_0", "COMPLETED")
        self.slurm.wait_state(f"{tasks}_2", "FAILED")
        self.assertFalse((results / "results.jsonl").exists(), "shards 1 and 2 cannot be complete")
        kept = [(results / f"results.{shard}.jsonl").read_bytes().count(b"\n") for shard in range(3)]
        whole = [len(range(shard, N_QUESTIONS, 3)) for shard in range(3)]
        self.assertEqual(kept[0], whole[0])
        again = self.submit_evaluation(endpoint, results, "--array=0-2")
        self.slurm.wait_state(again, "COMPLETED")
        asked = [json.loads((results / f"summary.{shard}.json").read_text())["asked"] for shard in range(3)]
        self.assertEqual(asked, [w - k for w, k in zip(whole, kept)], "a question was asked twice, or was lost")
        self.assertEqual(answers(results / "results.jsonl"), self.expected)
        self.assertEqual(json.loads((results / "summary.json").read_text())["overall"]["questions"], N_QUESTIONS)
        self.assertIn("<svg", (results / "report.html").read_text())
        print(f"  shards 1 (scancel) and 2 (kill -9) were cut off after {kept[1:]} of {whole[1:]} answers", flush=True)
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

    def test_tsv(self):
        """The field's table, pictures in base64, in one job with its daemon."""
        table = self.slurm.root / "table.tsv"
        rows = ["index\timage\tquestion\tanswer\tA\tB\tcategory"]
        image = base64.b64encode((daemon.EXAMPLES / "scene-two.png").read_bytes()).decode()
        for i, color in enumerate(("red", "green", "blue", "yellow")):
            rows.append(f"{i}\t{image}\tWhat color is the star? Is it {color}?\tA\tyes\tno\tstars")
        table.write_text("\n".join(rows) + "\n")
        results = self.slurm.root / "tsv"
        job = self.submit_evaluation(f"one-gpu={daemon.DEMO_MODEL}", results, questions=table)
        with daemon.Daemon() as alone:
            expected = evaluate_here(alone.address, self.slurm.root, table)
        self.slurm.wait_state(job, "COMPLETED")
        self.assertEqual(len(expected), 4)
        self.assertEqual(answers(results / "results.jsonl"), expected)

    def client(self, job, task):
        """The process of `internvl evaluate` of one task."""
        end = time.monotonic() + 10
        while time.monotonic() < end:
            for pid, variables in self.slurm_processes("INTERNVLD_COMMAND"):
                if (variables.get("SLURM_ARRAY_JOB_ID"), variables.get("SLURM_ARRAY_TASK_ID")) == (job, str(task)):
                    return pid
        raise AssertionError(f"no client of task {task}")

    def slurm_processes(self, program):
        """(pid, environment) of `program` in jobs of this cluster."""
        for entry in pathlib.Path("/proc").iterdir():
            try:
                variables = dict(x.split("=", 1) for x in (entry / "environ").read_text().split("\0") if "=" in x)
                executable = os.readlink(entry / "exe")
            except (OSError, UnicodeDecodeError):
                continue
            if variables.get("SLURM_CONF") == self.slurm.environment["SLURM_CONF"] and \
                    executable.startswith(daemon.program(program)):
                yield int(entry.name), variables

    def processes(self):
        """{rank: pid} of ranks that Slurm started."""
        return {int(variables.get("PMIX_RANK", -1)): pid
                for pid, variables in self.slurm_processes("INTERNVLD_DAEMON")}

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
