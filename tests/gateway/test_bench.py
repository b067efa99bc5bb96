"""internvl bench: closed and open loop, made-up and given requests; figures that fit together. No speed is asserted."""

import csv
import json
import pathlib
import tempfile

import daemon
from support import DaemonTest, main


class Bench(DaemonTest):
    def bench(self, *arguments):
        return json.loads(self.internvl("bench", "--json", "--warm-up", "1", *arguments))

    def check(self, figures, n, n_tokens):
        self.assertEqual((figures["requests"], figures["failed"]), (n, 0))
        self.assertEqual(figures["output_tokens"], n_tokens)
        for key in ("ttft_ms", "tpot_ms", "e2e_ms"):
            self.assertTrue(0 <= figures[key]["p50"] <= figures[key]["p90"] <= figures[key]["p99"], figures)
            self.assertTrue(figures[key]["p50"] > 0 or key == "tpot_ms", figures)  # two tokens may be one message
        self.assertLess(figures["ttft_ms"]["p50"], figures["e2e_ms"]["p99"])

    def test_closed_loop(self):
        with tempfile.TemporaryDirectory() as folder:
            path = pathlib.Path(folder, "out.csv")
            for _ in range(2):
                figures = self.bench("--concurrency", "4", "--num-requests", "9", "--output-len", "7", "--csv", str(path))
                self.check(figures, 9, 63)
            rows = list(csv.DictReader(path.read_text().splitlines()))
        self.assertEqual([(r["concurrency"], r["requests"]) for r in rows], [("4", "9")] * 2)

    def test_open_loop_with_pictures(self):
        picture = str(daemon.EXAMPLES / "scene-two.png")
        self.check(self.bench("--request-rate", "50", "--num-requests", "5", "--output-len", "3", "--image", picture), 5, 15)

    def test_requests_of_a_file(self):
        with tempfile.TemporaryDirectory() as folder:
            path = pathlib.Path(folder, "requests.jsonl")
            line = {"id": "a", "category": "c", "messages": [{"role": "user", "content": "Hello"}], "answer": "x"}
            path.write_text(json.dumps(line) + "\n" + json.dumps({**line, "id": "b"}) + "\n")
            self.check(self.bench(str(path), "--num-requests", "3", "--output-len", "2"), 3, 6)


if __name__ == "__main__":
    main()
