"""Two and three hosts: tensor shards inside a host, pipeline stages across. Answers equal a single host's to the
bit; ranks that do not fit together are one line; a drain under load loses nothing."""

import json
import os
import pathlib
import re
import shutil
import subprocess
import tempfile
import threading
import time
from unittest import mock

import daemon
from hosts import Hosts
from job import Job, skip_without_hosts
from support import Client, at_once, chat, example, examples, main, unittest


def answers(address, n=4):
    """The first questions of the examples, asked at once, with log-probabilities."""
    client = Client(address)
    prompts = [chat(example(e["file"]), e["question"]) for e in examples()[:n]]
    found = [a.bits() for a in at_once([lambda p=p: client.generate(p, logprobs=3, max_tokens=24) for p in prompts])]
    client.close()
    return found


class Layout(unittest.TestCase):
    def one_line(self, job):
        """The job refuses to start; what it says, which is one line."""
        status = job.wait(60)
        lines = [line for line in job.log().splitlines() if line.startswith("internvld: ")]
        self.assertEqual(len(lines), 1, job.log())
        self.assertNotEqual(status, 0)
        self.assertEqual(job.wait_gone(5), {})
        print("  " + lines[0], flush=True)
        return lines[0]

    def test_shards_inside_stages_across(self):
        with daemon.Daemon() as alone:
            expected = answers(alone.address)
        with Hosts(2) as hosts:
            with Job(hosts, [4, 2], tensor=2, pipeline=2, extra=["--map"], wait=False, supervised=None) as job:
                self.assertEqual(job.wait(60), 0, job.log())
                table = job.log()
            print(table, flush=True)
            rows = re.findall(r"^ +(\d+)  (.*?)  +(\S+) +(\d+) of (\d+)", table, re.M)
            self.assertEqual([r[2] for r in rows], [hosts.names[0]] * 4 + [hosts.names[1]] * 2)
            self.assertEqual(rows[4][1], "language stage 1 shard 0")
            with Job(hosts, [4, 2], tensor=2, pipeline=2) as job:
                self.assertEqual(answers(job.address), expected)
                client = Client(job.address)
                self.assertEqual({r.host for r in client.model().ranks}, set(hosts.names))
                client.close()
            self.assertNotIn("each layer waits", job.log())

    def test_layout_file(self):
        """deploy/launch.sh places ranks as deploy/layouts/ says."""
        with Hosts(2) as hosts:
            done = subprocess.run(
                hosts.command(0, "sh", daemon.ROOT / "deploy/launch.sh", "two-by-two", "--hosts", ",".join(hosts.names),
                              "--agent", hosts.agent, "--network", "eth0", "--", "--model", daemon.DEMO_MODEL, "--map"),
                env={**os.environ, "INTERNVLD": daemon.program("INTERNVLD_DAEMON")}, capture_output=True, text=True,
                stdin=subprocess.DEVNULL, timeout=60)
            self.assertEqual(done.returncode, 0, done.stdout + done.stderr)
            placed = re.findall(r"^ +(\d+)  .*? (iv\S+) +\d+ of \d+", done.stdout, re.M)
            self.assertEqual(placed, [(str(r), hosts.names[r > 3]) for r in range(6)], done.stdout)

    def test_three_hosts(self):
        with daemon.Daemon() as alone:
            expected = answers(alone.address, 2)
        with Hosts(3) as hosts:
            with Job(hosts, [2, 2, 2], tensor=1, pipeline=3, vision=2, supervised=None) as job:  # mpirun itself, drained by SIGUSR1
                self.assertEqual(answers(job.address, 2), expected)

    def test_shards_across_are_told(self):
        with Hosts(2) as hosts:
            with Job(hosts, [3, 1], tensor=2) as job:
                pass
            self.assertIn("each layer waits for the network twice", job.log())

    def test_disagreement(self):
        with Hosts(2) as hosts, tempfile.TemporaryDirectory() as folder:
            other = pathlib.Path(folder) / "model"
            shutil.copytree(daemon.DEMO_MODEL, other)
            config = json.loads((other / "config.json").read_text())
            config["comment"] = "another checkpoint"
            (other / "config.json").write_text(json.dumps(config))
            line = self.one_line(Job(hosts, [2, 1], wait=False, model_of_last=other))
            self.assertRegex(line, f"rank 2 on {hosts.names[1]} has another checkpoint than rank 0 on {hosts.names[0]}")
            line = self.one_line(Job(hosts, [2, 1], wait=False, model_of_last="/nowhere"))
            self.assertRegex(line, f"rank 2 on {hosts.names[1]}: .*/nowhere")
            line = self.one_line(Job(hosts, [2, 2], wait=False))
            self.assertRegex(line, "needs 1 gateway .* but the job has 4")
            version = subprocess.run([daemon.program("INTERNVLD_DAEMON"), "--version"], capture_output=True, text=True,
                                     check=True).stdout.split()[-1]
            newer = pathlib.Path(folder) / "newer"
            text = pathlib.Path(daemon.program("INTERNVLD_DAEMON")).read_bytes()
            newer.write_bytes(text.replace(f"\0{version}\0".encode(), f"\0{version[:-1]}9\0".encode()))
            newer.chmod(0o755)
            line = self.one_line(Job(hosts, [2, 1], wait=False, program_of_last=[newer]))
            self.assertEqual(line, f"internvld: rank 2 runs internvld {version[:-1]}9, rank 0 runs {version}")

    def test_gpus_disagree(self):
        """Emulated ones: a host with fewer than its ranks need, a host with another kind."""
        emulated = os.environ.get("INTERNVLD_EMULATED")
        if not emulated:
            self.skipTest("this build has no emulated CUDA")
        with mock.patch.dict(os.environ, INTERNVLD_DAEMON=emulated), Hosts(2) as hosts:
            last = hosts.names[1]
            for has, said in (("DEVICES=1", f"2 ranks on {last} need a GPU each and this build finds 1 there"),
                              ("NAME=other", f"rank 2 on {last} has a GPU of another kind (other) than rank 1 on")):
                other = ["env", f"INTERNVLD_EMULATION_{has}", emulated]
                line = self.one_line(Job(hosts, [2, 2], tensor=2, wait=False, program_of_last=other,
                                         extra=["--device", "cuda"]))
                self.assertIn(said, line)

    def test_drain_under_load(self):
        """SIGTERM to the supervisor while streams run: they all finish, the job exits 0."""
        with Hosts(2) as hosts:
            job = Job(hosts, [3, 1], pipeline=2)
            client, done, running = Client(job.address), [], threading.Barrier(7)

            def ask():
                events = client.start(chat(example("scene-two.png"), "Describe the image."), max_tokens=200,
                                      ignore_eos=True)
                first = True
                for event in events:
                    if first:
                        running.wait(60)
                        first = False
                    if event.WhichOneof("event") == "done":
                        done.append(event.done)

            threads = [threading.Thread(target=ask) for _ in range(6)]
            for t in threads:
                t.start()
            running.wait(60)
            start = time.monotonic()
            job.terminate()
            status = job.wait(60)
            for t in threads:
                t.join(60)
            client.close()
            print(f"  drained in {time.monotonic() - start:.2f} s", flush=True)
            self.assertEqual(len(done), 6, job.log())
            self.assertEqual(status, 0, job.log())
            self.assertEqual(job.wait_gone(5), {})


if __name__ == "__main__":
    skip_without_hosts()
    main()
