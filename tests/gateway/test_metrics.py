"""GET /metrics: the format, the names and types, and that the figures are those of a known load."""

import os
import re
import tempfile
import time
import unittest
import urllib.error
import urllib.request

import daemon
from support import Client, chat, example, main

LABEL = re.compile(r'([a-zA-Z_][a-zA-Z0-9_]*)="((?:[^"\\\n]|\\["\\n])*)"(?:,|$)')
LINE = re.compile(r"([a-zA-Z_:][a-zA-Z0-9_:]*)(?:\{(.*)\})? (\S+)$")
COUNTERS = ["num_preemptions_total", "prompt_tokens_total", "generation_tokens_total", "prefix_cache_queries_total",
            "prefix_cache_hits_total", "mm_cache_queries_total", "mm_cache_hits_total", "iterations_total",
            "vision_tiles_total", "media_store_queries_total", "media_store_hits_total", "request_success_total", "stage_busy_seconds_total", "stage_idle_seconds_total",
            "collective_seconds_total"]
GAUGES = ["num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "media_store_bytes", "media_store_entries",
          "media_uploads_running"]
HISTOGRAMS = ["time_to_first_token_seconds", "inter_token_latency_seconds", "e2e_request_latency_seconds",
              "request_queue_time_seconds", "request_prefill_time_seconds", "request_decode_time_seconds",
              "iteration_tokens_total", "vision_queue_seconds", "vision_encode_seconds"]
TYPES = {**{"internvld:" + n: "counter" for n in COUNTERS}, **{"internvld:" + n: "gauge" for n in GAUGES},
         **{"internvld:" + n: "histogram" for n in HISTOGRAMS},
         "process_cpu_seconds_total": "counter", "process_resident_memory_bytes": "gauge",
         "process_virtual_memory_bytes": "gauge", "process_open_fds": "gauge", "process_max_fds": "gauge",
         "process_start_time_seconds": "gauge"}


def parse(text):
    """({family: type}, {(name, labels): value}), as strict as promtool: every family is declared once, in one block."""
    types, values, current = {}, {}, None
    assert text.endswith("\n")
    for line in text[:-1].split("\n"):
        if line.startswith("# HELP "):
            current = line.split(" ", 3)[2]
            assert len(line.split(" ", 3)) == 4 and current not in types, line
            continue
        if line.startswith("# TYPE "):
            _, _, name, kind = line.split(" ")
            assert name == current and kind in ("counter", "gauge", "histogram"), line
            types[name] = kind
            continue
        match = LINE.match(line)
        assert match, line
        name, labels = match[1], match[2] or ""
        assert LABEL.sub("", labels) == "", line
        base = re.sub("_(bucket|sum|count)$", "", name) if types[current] == "histogram" else name
        assert base == current, f"{line} in the block of {current}"
        key = name, tuple(sorted(m.groups() for m in LABEL.finditer(labels)))
        assert key not in values, f"twice: {line}"
        values[key] = float(match[3])
    return types, values


def scrape(address, path="/metrics", token=None):
    request = urllib.request.Request(f"http://{address}{path}", headers={"Authorization": token} if token else {})
    with urllib.request.urlopen(request, timeout=30) as answer:
        assert answer.headers["Content-Type"].startswith("text/plain; version=0.0.4")
        return answer.read().decode()


def metrics_address(d):
    """From the log, which mpirun passes on a little later than the daemon writes it."""
    end = time.monotonic() + 30
    while time.monotonic() < end:
        match = re.search(r"metrics: http://(\S+)/metrics", d.log())
        if match:
            return match[1]
        time.sleep(0.02)
    raise AssertionError("the log does not say where the metrics are")


class Metrics(unittest.TestCase):
    def value(self, name, **labels):
        found = [v for (n, l), v in self.values.items() if n == name and labels.items() <= dict(l).items()]
        self.assertEqual(len(found), 1, f"{name} {labels}")
        return found[0]

    def read(self, address):
        self.types, self.values = parse(scrape(address))

    def read_at_rest(self, address):
        """The cancelled call's last step may still be on its way: it is counted when sent, observed when back."""
        end = time.monotonic() + 10
        while True:
            self.read(address)
            sent, back = (self.value(f"internvld:{n}") for n in ("iterations_total", "iteration_tokens_total_count"))
            if sent == back or time.monotonic() > end:
                return
            time.sleep(0.01)

    def check_histograms(self):
        for name, kind in self.types.items():
            if kind != "histogram":
                continue
            buckets = [(float(dict(l)["le"]), v) for (n, l), v in self.values.items() if n == name + "_bucket"]
            self.assertEqual(buckets, sorted(buckets), name)
            self.assertEqual([v for _, v in buckets], sorted(v for _, v in buckets), name)
            self.assertEqual(buckets[-1], (float("inf"), self.value(name + "_count")), name)

    def test_a_known_load(self):
        extra = ["--metrics-listen", "127.0.0.1:0", "--no-enable-prefix-caching"]
        with daemon.Daemon(pipeline=2, vision=2, extra=extra) as d:
            address = metrics_address(d)
            client = Client(d.address)
            self.read(address)
            before = self.values
            self.assertEqual({n: self.types.get(n) for n in TYPES}, TYPES)
            answers = [client.generate(chat("Say something."), max_tokens=n, ignore_eos=True) for n in (5, 9)]
            for _ in range(2):  # the second time the picture's features are known
                answers.append(client.generate(chat(example("scene-two.png"), "Describe the image."), max_tokens=40))
            call = client.start(chat("Count."), max_tokens=200, ignore_eos=True)
            next(call)
            call.cancel()
            client.wait_idle()
            self.read_at_rest(address)
            self.compare(before, answers)
            with self.assertRaises(urllib.error.HTTPError) as caught:
                scrape(address, "/")
            self.assertEqual(caught.exception.code, 404)
            client.close()

    def compare(self, before, answers):
        self.check_histograms()
        for (name, labels), old in before.items():
            family = re.sub("_(bucket|sum|count)$", "", name)
            kind = self.types.get(name) or self.types[family]
            if kind != "gauge":
                self.assertGreaterEqual(self.values[name, labels], old, name)
        usage = [a.done.usage for a in answers]
        n_tokens = sum(u.completion_tokens for u in usage)
        ends = [self.value("internvld:request_success_total", finished_reason=r)
                for r in ("stop", "length", "abort", "error")]
        self.assertEqual(ends, [sum(a.finish == 1 for a in answers), sum(a.finish == 2 for a in answers), 1, 0])
        cancelled = self.value("internvld:generation_tokens_total") - n_tokens
        self.assertTrue(0 <= cancelled < 200, cancelled)
        self.assertGreaterEqual(self.value("internvld:prompt_tokens_total"), sum(u.prompt_tokens for u in usage))
        tiles, cached = sum(u.tiles for u in usage), sum(u.cached_tiles for u in usage)
        self.assertEqual(usage[-1].cached_tiles, usage[-1].tiles)
        self.assertEqual(self.value("internvld:vision_tiles_total"), tiles - cached)
        self.assertEqual(self.value("internvld:mm_cache_queries_total"), tiles)
        self.assertEqual(self.value("internvld:mm_cache_hits_total"), cached)
        self.assertEqual(self.value("internvld:e2e_request_latency_seconds_count"), 4)
        self.assertEqual(self.value("internvld:vision_encode_seconds_count"), 2)
        total_s = sum(a.done.timing.total_us for a in answers) / 1e6
        self.assertAlmostEqual(self.value("internvld:e2e_request_latency_seconds_sum"), total_s, places=4)
        self.assertIn(self.value("internvld:time_to_first_token_seconds_count"), (4, 5))
        gaps = self.value("internvld:inter_token_latency_seconds_count")
        self.assertTrue(n_tokens - 4 <= gaps < n_tokens + 200, gaps)
        self.assertEqual(self.value("internvld:iteration_tokens_total_count"), self.value("internvld:iterations_total"))
        self.assertGreater(self.value("internvld:stage_busy_seconds_total", stage="language1"), 0)
        self.assertEqual(self.value("internvld:num_requests_running"), 0)
        self.assertEqual(self.value("internvld:kv_cache_usage_perc"), 0)
        self.assertGreater(self.value("process_resident_memory_bytes"), 1e6)

    def test_a_token(self):
        with daemon.Daemon(extra=["--metrics-listen", "127.0.0.1:0", "--auth-token-file", self.token_file()]) as d:
            address = metrics_address(d)
            for token in (None, "Bearer wrong-wrong-wrong-wrong"):
                with self.assertRaises(urllib.error.HTTPError) as caught:
                    scrape(address, token=token)
                self.assertEqual(caught.exception.code, 401)
            parse(scrape(address, token="Bearer " + "k" * 32))

    def token_file(self):
        handle, path = tempfile.mkstemp()
        self.addCleanup(os.unlink, path)
        os.write(handle, b"k" * 32 + b"\n")
        os.close(handle)
        return path

    def test_other_machines_need_a_token(self):
        with self.assertRaisesRegex(AssertionError, "--metrics-listen 0.0.0.0:0 can be reached"):
            daemon.Daemon(extra=["--metrics-listen", "0.0.0.0:0"])
        with self.assertRaisesRegex(AssertionError, "--metrics-listen: nowhere: expected HOST:PORT"):
            daemon.Daemon(extra=["--metrics-listen", "nowhere"])


if __name__ == "__main__":
    main()
