"""The C client (client_test.c) and the internvl command, against a real daemon."""

import json
import pathlib
import re
import signal
import subprocess
import tempfile
import time

import daemon
from made_files import read_tensors
from support import DaemonTest, chat, example, examples, main

SCENE = str(daemon.EXAMPLES / "scene-two.png")
ROOT = daemon.ROOT


class Command(DaemonTest):
    LAYOUT = dict(tensor=2)

    def test_c_client(self):
        done = subprocess.run([daemon.program("INTERNVLD_CLIENT_TEST"), self.daemon.address, SCENE], timeout=600)
        self.assertEqual(done.returncode, 0)

    def test_ask(self):
        self.assertEqual(self.internvl("ask", "Write rat in capital letters."), "RAT\n")
        for case in examples():
            media = ["--video" if case["file"].endswith(".mp4") else "--image", daemon.EXAMPLES / case["file"]]
            self.assertEqual(self.internvl("ask", *media, case["question"]), case["answer"] + "\n")
        question = "What color is the star?"
        self.assertEqual(self.internvl("ask", question, "--image", SCENE), "yellow\n", "options after the question")
        self.assertEqual(self.internvl("--address", self.daemon.address, "ask", f"--image={SCENE}", question,
                                       address=False), "yellow\n")

    def test_ask_json(self):
        a = json.loads(self.internvl("ask", "--json", "--logprobs", "2", "--image", SCENE, "What color is the star?"))
        self.assertEqual(a["candidates"][0]["text"], "yellow")
        self.assertEqual(a["candidates"][0]["finish_reason"], "stop")
        self.assertEqual(len(a["candidates"][0]["logprobs"]), len(a["candidates"][0]["token_ids"]))
        self.assertEqual(a["usage"]["completion_tokens"], len(a["candidates"][0]["token_ids"]))
        self.assertEqual(len(a["media"]), 1)

    def test_ask_options(self):
        short = json.loads(self.internvl("ask", "--max-tokens", 3, "--ignore-eos", "--json", "x"))
        self.assertEqual(short["candidates"][0]["finish_reason"], "length")
        whole = self.internvl("ask", "--image", SCENE, "Describe the image.")
        self.assertEqual(self.internvl("ask", "--image", SCENE, "Describe the image.", "--stop", "yellow"),
                         whole[:whole.index("yellow")] + "\n")
        draw = ["ask", "--temperature", "1.5", "--seed", "3", "--n", "3", "--max-tokens", "20", "--ignore-eos", "x"]
        self.assertEqual(self.internvl(*draw), self.internvl(*draw))
        several = json.loads(self.internvl(*draw, "--json"))
        self.assertEqual(len(several["candidates"]), 3)
        self.assertIn("logprob", self.internvl("ask", "--logprobs", 1, "Write rat in capital letters."))
        said = ["ask", "--prompt-logprobs", 2, "Write rat in capital letters."]
        a = json.loads(self.internvl(*said, "--json"))
        self.assertEqual(len(a["prompt_logprobs"]), a["usage"]["prompt_tokens"] - 1)
        self.assertEqual([x["rank"] for x in a["prompt_logprobs"][0]["top"]], [1, 2])
        self.assertIn("token of the prompt  (best: token logprob)", self.internvl(*said))

    def test_cache_salt(self):
        """Cached pages and tiles are found by the same salt alone (a picture's own equal tiles aside)."""
        def cached(*salt):
            usage = json.loads(self.internvl("ask", "--json", "--image", SCENE, *salt,
                                             "Describe the image that I have salted."))["usage"]
            return usage["cached_tokens"] > 0, usage["cached_tiles"] == usage["tiles"]

        self.assertEqual(cached("--cache-salt", "mine"), (False, False))
        self.assertEqual(cached("--cache-salt", "mine"), (True, True))
        self.assertEqual(cached("--cache-salt", "yours"), (False, False))
        self.internvl("ask", "--cache-salt", "x" * 257, "x", status=1)
        self.assertRegex(self.errors, r"INVALID_ARGUMENT: cache_salt has 257 bytes")

    def test_every_tensor_of_help(self):
        """forward --help names what Forward takes: each is asked for, and something of its name comes."""
        help_text = " ".join(self.internvl("forward", "--help").split())
        names = re.search(r"forward: ([a-z0-9_., ]+) \[logits\]", help_text)[1].split(", ")
        self.assertEqual(len(names), 13)
        asked = [x for name in names for x in ("--tensor", name)]
        got = json.loads(self.internvl("forward", "--json", "--image", SCENE, *asked, "x"))["tensors"]
        for name in names:
            kind = "cache" if name == "past_key_values" else name
            self.assertTrue(any(x["name"].startswith(kind) for x in got), name)

    def test_failures(self):
        with tempfile.NamedTemporaryFile(suffix=".png") as f:
            f.write(b"not a picture")
            f.flush()
            self.internvl("ask", "--image", f.name, "x", status=1)
            self.assertRegex(self.errors, r"^internvl: ask: INVALID_ARGUMENT: .+\n$")
        self.internvl("ask", "--temperature", "-1", "x", status=1)
        self.assertRegex(self.errors, r"^internvl: ask: INVALID_ARGUMENT: .*temperature")
        self.internvl("ask", "--timeout", "0.05", "--max-tokens", 3500, "--ignore-eos", "x", status=1)
        self.assertRegex(self.errors, r"internvl: ask: DEADLINE_EXCEEDED: ")

    def test_interrupt(self):
        """Ctrl-C: the call is cancelled, the slot free, the status 130."""
        command = [daemon.program("INTERNVLD_COMMAND"), "--address", self.daemon.address, "ask", "--max-tokens", "3500",
                   "--ignore-eos", "What is the opposite of old?"]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
        self.assertEqual((process.returncode, errors), (130, b""))
        self.client.wait_idle()

    def test_reader_gone(self):
        """internvl ask … | head: ends by itself."""
        command = (f"'{daemon.program('INTERNVLD_COMMAND')}' --address {self.daemon.address} ask --max-tokens 3500 "
                   "--ignore-eos 'What is the opposite of old?' | head -c 1")
        subprocess.run(["sh", "-c", command], stdout=subprocess.DEVNULL, timeout=60, check=True)
        self.client.wait_idle()

    def test_chat(self):
        lines = (f"/image {SCENE}\nHow many objects are there?\nWhat color is the star?\n"
                 "/reset\nWrite rat in capital letters.\n/quit\n")
        self.assertEqual(self.internvl("chat", stdin=lines).splitlines(), ["2", "yellow", "RAT"])
        out = self.internvl("chat", "--json", stdin="Write rat in capital letters.\nWrite hat in capital letters.")
        self.assertEqual([json.loads(x)["candidates"][0]["text"] for x in out.splitlines()][0], "RAT")
        self.assertEqual(self.internvl("chat", "--image", "/nowhere.png", stdin="x\n", status=1), "")

    def test_info(self):
        text = self.internvl("info")
        for word in ("language stage 0 shard 1", "vision 0", "gateway", "serving", "context (tokens)", "weights"):
            self.assertIn(word, text)
        rows = text[text.index("  rank  role"):].splitlines()
        self.assertEqual(len(rows), 1 + 4)
        self.assertEqual(len({len(x.rstrip()) for x in rows}), 1, "the table is not aligned:\n" + text)
        j = json.loads(self.internvl("info", "--json"))
        self.assertTrue(j["serving"])
        self.assertEqual([r["rank"] for r in j["ranks"]], [0, 1, 2, 3])
        self.assertGreater(j["limits"]["max_model_len"], 0)

    def test_tokenize(self):
        j = json.loads(self.internvl("tokenize", "--json", "Hello there, hé!"))
        ids = ",".join(map(str, j["token_ids"]))
        self.assertEqual(self.internvl("tokenize", "--ids", ids), "Hello there, hé!\n")
        self.assertEqual(len(j["tokens"]), len(j["token_ids"]))
        j = json.loads(self.internvl("tokenize", "--json", "--image", SCENE, "x"))
        expected = self.client.tokenize(chat=chat(example("scene-two.png"), "x").chat)
        self.assertEqual(j["token_ids"], list(expected.token_ids))
        self.assertIn(f"{len(expected.token_ids)} tokens", self.internvl("tokenize", "--image", SCENE, "x"))

    def test_forward(self):
        with tempfile.TemporaryDirectory() as folder:
            path = pathlib.Path(folder) / "out.safetensors"
            j = json.loads(self.internvl("forward", "--json", "--tensor", "logits", "--tensor", "image_features",
                                         "--output", path, "--image", SCENE, "x"))
            tensors = read_tensors(path)
        expected, done = self.client.forward(chat(example("scene-two.png"), "x"), ["logits", "image_features"])
        self.assertEqual(sorted(tensors), sorted(expected))
        self.assertEqual({t["name"]: t["shape"] for t in j["tensors"]}, {k: list(v.shape) for k, v in expected.items()})
        for name, value in expected.items():
            kind, got = tensors[name]
            self.assertEqual(kind, "F32")
            self.assertTrue((got == value).all(), name)
        ids = ",".join(map(str, done.token_ids))
        self.assertIn("loss ", self.internvl("forward", "--ids", "1,2,3", "--labels=-100,2,3"))
        self.internvl("forward", "--ids", ids, "--labels=1,2", status=1)

    def test_evaluate(self):
        data = ROOT / "tests/data/demo-eval/eval.jsonl"
        with tempfile.TemporaryDirectory() as folder:
            out = pathlib.Path(folder) / "out.jsonl"
            table = self.internvl("evaluate", data, "--limit", 60, "--output", out)
            results = [json.loads(x) for x in out.read_text().splitlines()]
            summary = json.loads(self.internvl("evaluate", data, "--limit", 60, "--json", "--concurrency", 3))
        expected = [json.loads(x) for x in data.read_text().splitlines()[:60]]
        self.assertEqual([r["id"] for r in results], [e["id"] for e in expected])
        correct = sum(r["reply"].strip().lower() == r["answer"].strip().lower() for r in results)
        self.assertEqual(correct, sum(r["correct"] for r in results))
        self.assertEqual((summary["overall"]["questions"], summary["overall"]["correct"]), (60, correct))
        self.assertRegex(table, rf"overall +60 +{correct} ")
        self.assertEqual(set(summary["categories"]), {e["category"] for e in expected})

    def test_answer_is_quick(self):
        """Printed, not asserted: what a person waits for one answer."""
        start = time.monotonic()
        self.internvl("ask", "--image", SCENE, "Describe the image.")
        print(f"  internvl ask with a picture: {time.monotonic() - start:.2f} s", flush=True)


if __name__ == "__main__":
    main()
