"""INTERNVLD_TRACE: the timeline of six ranks is JSON, has a row for each, whose spans nest, and every request's way."""

import collections
import json
import os
import pathlib
import signal
import tempfile
import time
import unittest

import daemon
from support import Client, at_once, chat, example, main

WORKER = {"vision 0": {"encode tiles"}, "language stage 0 shard 0": {"step"}, "language stage 0 shard 1": {"step"},
          "language stage 1 shard 0": {"step", "sample"}, "language stage 1 shard 1": {"step"}}
COLLECTIVES = {"all_reduce", "all_gather", "broadcast", "send", "recv"}
GATEWAY = {"engine": {"send tiles", "send step", "push tokens"}, "calls": {"write reply"}}
PHASES = {"request", "queue", "vision", "prefill", "decode"}


def read(path):
    """The events; a job that was killed has left an array without its end."""
    text = path.read_text()
    return json.loads(text if text.endswith("\n]\n") else text + "]"), text.endswith("\n]\n")


class Trace(unittest.TestCase):
    def setUp(self):
        self.folder = tempfile.TemporaryDirectory()
        self.addCleanup(self.folder.cleanup)
        self.path = pathlib.Path(self.folder.name) / "trace.json"
        os.environ["INTERNVLD_TRACE"] = str(self.path)
        self.addCleanup(os.environ.pop, "INTERNVLD_TRACE")

    def ask(self, address):
        client = Client(address)
        prompts = [chat(example(name), "Describe the image.") for name in ("scene-two.png", "scene-three.png")]
        prompts += [chat(f"Write {word} in capital letters.") for word in ("stop", "rat")]
        answers = at_once([lambda p=p: client.generate(p, max_tokens=12) for p in prompts])
        client.close()
        return [a.started.request_id for a in answers]

    def rows(self, events):
        """{(pid, tid): [spans]}, of which two of a row never overlap but by one holding the other."""
        rows = collections.defaultdict(list)
        for e in events:
            if e["ph"] == "X":
                rows[e["pid"], e["tid"]].append((round(e["ts"] * 1000), -round(e["dur"] * 1000), e["name"]))
        for row, spans in rows.items():
            open_until = []
            for start, minus_length, name in sorted(spans):
                while open_until and open_until[-1] <= start:
                    open_until.pop()
                end = start - minus_length
                self.assertTrue(not open_until or end <= open_until[-1], f"row {row}: {name} at {start} ns overlaps")
                open_until.append(end)
        return rows

    def check_rows(self, events):
        names = {e["pid"]: e["args"]["name"] for e in events if e["name"] == "process_name"}
        self.assertEqual(sorted(names), list(range(6)))
        threads = {e["tid"]: e["args"]["name"] for e in events if e["name"] == "thread_name"}
        self.assertEqual(sorted(threads.values()), ["calls", "engine", "processor 0", "processor 1"])
        rows = self.rows(events)
        found = {row: {name for _, _, name in spans} for row, spans in rows.items()}
        for rank in range(1, 6):
            wanted = WORKER[names[rank]]
            self.assertEqual(found[rank, 0] - COLLECTIVES, wanted, names[rank])
        by_name = collections.defaultdict(set)
        for (pid, tid), kinds in found.items():
            if pid == 0:
                by_name[threads[tid].split()[0]] |= kinds
        self.assertEqual(by_name, {**GATEWAY, "processor": {"prepare", "decode media"}})
        return rows

    def test_six_ranks(self):
        with daemon.Daemon(tensor=2, pipeline=2) as d:
            ids = self.ask(d.address)
        events, is_whole = read(self.path)
        self.assertTrue(is_whole)
        rows = self.check_rows(events)
        steps = {e["args"]["step"] for e in events if e["name"] == "push tokens"}
        for rank in range(2, 6):  # every shard of every stage ran every step
            ran = [e["args"]["step"] for e in events if e["name"] == "step" and e["pid"] == rank]
            self.assertEqual(sorted(ran), sorted(steps), f"rank {rank}")
        phases = collections.defaultdict(set)
        for e in events:
            if e["ph"] in "be":
                phases[e["args"]["request_id"], e["ph"]].add(e["name"])
        for i, request_id in enumerate(ids):
            for ph in "be":
                self.assertEqual(phases[request_id, ph], PHASES if i < 2 else PHASES - {"vision"})
        self.check_clocks(events, rows)

    def check_clocks(self, events, rows):
        """A step begins on no rank before the engine began to send it, and is over on the last before it is pushed."""
        sent = sorted(start for start, _, name in rows[0, self.tid(events, "engine")] if name == "send step")
        pushed = {e["args"]["step"]: e["ts"] for e in events if e["name"] == "push tokens"}
        first = {}
        for e in events:
            if e["name"] == "step":
                first[e["args"]["step"]] = min(e["ts"], first.get(e["args"]["step"], e["ts"]))
                if e["pid"] == 4:  # the last stage's first shard draws the tokens
                    self.assertLess(e["ts"] + e["dur"], pushed[e["args"]["step"]] + 1000)
        for start, begun in zip(sent, sorted(first.values())):
            self.assertLess(start / 1000, begun + 1000)  # clocks of ranks agree to within a millisecond

    def tid(self, events, name):
        return next(e["tid"] for e in events if e["name"] == "thread_name" and e["args"]["name"] == name)

    def test_killed(self):
        """kill -9 of the whole job in the middle of work: what is there can be read."""
        d = daemon.Daemon(tensor=2, pipeline=2)
        self.ask(d.address)
        client = Client(d.address)
        call = client.start(chat("Tell a story."), max_tokens=400, ignore_eos=True)
        for _ in range(20):
            next(call)
        d.kill()
        call.cancel()
        client.close()
        events, is_whole = read(self.path)
        self.assertFalse(is_whole)
        self.check_rows(events)

    def test_refused(self):
        """A file that cannot be made is one sentence before anything is loaded."""
        os.environ["INTERNVLD_TRACE"] = str(self.path / "not" / "there")
        with self.assertRaises(AssertionError) as caught:
            daemon.Daemon()
        self.assertIn("not/there: No such file or directory", str(caught.exception))
        self.assertNotIn("ready on", str(caught.exception))


if __name__ == "__main__":
    main()
