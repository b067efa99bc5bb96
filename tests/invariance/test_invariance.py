"""The same bits of every token id and log-probability, through real ranks of the demo model.

Fourteen prompts (text, a picture, two pictures, many tiles, greedy and seeded) are answered one by one by the smallest
layout with every cache off: that is what all others are compared with, in this very run. Then the same alone, with 63
others, in chunks of 16 and 64 tokens, from cold and warm caches (prefix and vision), preempted for want of pages and by higher
priorities, as the first of four candidates, and under other layouts. A part of it again with an int8 KV cache, compared with its own.

    test_invariance.py [--full]      --full: T 1, 2, 4, 8 x P 1, 2, 4 x V 1, 2; else three of them
"""

import itertools
import sys

from support import SANITIZED, Answer, Client, at_once, chat, example, main, part, pb, unittest, user
import daemon

FULL = "--full" in sys.argv
if FULL:
    sys.argv.remove("--full")

PASSAGE = "The red square is left of the two blue stars. " * 12
GREEDY = dict(temperature=0.0, ignore_eos=True, logprobs=3)
SEEDED = dict(temperature=1.1, top_p=0.9, top_k=60, ignore_eos=True, logprobs=2)


def tiled(name, *parts):
    """A picture cut into many tiles with a thumbnail."""
    prompt = chat(example(name), *parts)
    prompt.chat.messages[0].parts[0].image.tiling.CopyFrom(
        pb.TilingOptions(crop_to_patches=True, min_patches=4, max_patches=6, use_thumbnail=True))
    return prompt


SUBJECTS = [
    (chat("What is the opposite of old?"), dict(GREEDY, max_tokens=24)),
    (chat(PASSAGE, "Where is the square?"), dict(GREEDY, max_tokens=24)),
    (chat(PASSAGE, "Where are the stars?"), dict(SEEDED, max_tokens=24, seed=1)),
    (chat(example("scene-three.png"), "Describe the image."), dict(GREEDY, max_tokens=24)),
    (chat(example("scene-three.png"), "How many shapes are there?"), dict(SEEDED, max_tokens=20, seed=2)),
    (chat(example("chart.png"), example("word.png"), "What word is written?"), dict(GREEDY, max_tokens=16)),
    (chat(example("word.png"), example("chart.png"), "What word is written?"), dict(GREEDY, max_tokens=16)),
    (tiled("scene-four.png", "Describe the image."), dict(GREEDY, max_tokens=12, prompt_logprobs=2)),
    (tiled("number.png", PASSAGE), dict(SEEDED, max_tokens=12, seed=3, repetition_penalty=1.1)),
    (chat("Say one word."), dict(SEEDED, max_tokens=30, seed=4, presence_penalty=0.4, min_tokens=8)),
    (chat("a"), dict(GREEDY, max_tokens=40)),
    (chat(PASSAGE + PASSAGE), dict(SEEDED, max_tokens=8, seed=5, min_p=0.05)),
    (chat("Tell a story."), dict(GREEDY, max_tokens=300, prompt_logprobs=3)),
    (chat("Tell a long story."), dict(SEEDED, max_tokens=300, seed=6)),
]
FEATURES = SUBJECTS[5][0], ["image_features", "vision.hidden_states"]  # of a Forward
TEXT = [0, 1, 9, 10]
LONG = [12, 13]  # 20 pages each
SHORT = range(12)
PAGE_BYTES = 2 * 4 * 4 * 32 * 16 * 2  # key and value, layers, heads, head size, tokens, bfloat16
INT8_PAGE_BYTES = 2 * 4 * 4 * 16 * (32 + 4)  # a byte a value, a scale for each token and head
FEW = [0, 1, 2, 3, 7, 8, 9]


def layouts():
    if FULL:
        return list(itertools.product((1, 2, 4, 8), (1, 2, 4), (1, 2)))
    return [(2, 2, 2)] if SANITIZED else [(2, 2, 2), (4, 1, 1), (8, 1, 2)]


def collect(events, answer=None):
    answer = answer or Answer()
    for event in events:
        answer.add(event)
    return answer


class Daemon:
    def __init__(self, *extra, layout=(1, 1, 1)):
        tensor, pipeline, vision = layout
        self.daemon = daemon.Daemon(tensor=tensor, pipeline=pipeline, vision=vision,
                                    extra=("--threads", 1, *extra))
        self.client = Client(self.daemon.address)

    def ask(self, index, **changes):
        prompt, sampling = SUBJECTS[index]
        return self.client.generate(prompt, **{**sampling, **changes})

    def start(self, index, **fields):
        prompt, sampling = SUBJECTS[index]
        request = pb.GenerateRequest(prompt=prompt, sampling=pb.SamplingParams(**sampling), **fields)
        return self.client.stub.Generate(request, timeout=300)

    def __enter__(self):
        self.daemon.__enter__()
        return self

    def __exit__(self, *what):
        self.client.close()
        return self.daemon.__exit__(*what)


def talk(d):
    """Two turns, the first with a picture."""
    asked = user(example("scene-three.png"), "Describe the image.")
    greedy = dict(temperature=0.0, max_tokens=48, logprobs=3)
    one = d.client.generate(pb.Prompt(chat=pb.ChatPrompt(messages=[asked])), **greedy)
    said = pb.Message(role="assistant", parts=[part(one.text)])
    two = d.client.generate(pb.Prompt(chat=pb.ChatPrompt(
        messages=[asked, said, user("How many shapes are there?")])), **greedy)
    return one, two


class Compared(unittest.TestCase):
    """With `expected`, the bits of each subject, alone and without caches."""

    def check(self, index, answer, where):
        self.assertEqual(answer.bits(), self.expected[index], f"subject {index}, {where}")

    def check_all(self, d, where, indices=SHORT):
        """All at once: that they run beside each other is part of it."""
        indices = list(indices)
        answers = at_once([lambda i=i: d.ask(i) for i in indices])
        for i, answer in zip(indices, answers):
            self.check(i, answer, where)
        return answers

    def until_preempted(self, ask):
        """On a busy machine the long answers can be over before the others come: then once more, 20 times at most."""
        for _ in range(20):
            if sum(a.done.timing.preemptions for a in ask()) > 0:
                return
        self.fail("nobody was preempted")


class Invariance(Compared):
    @classmethod
    def setUpClass(cls):
        with Daemon("--no-enable-prefix-caching", "--vision-cache-bytes", 0) as d:
            cls.expected = [d.ask(i).bits() for i in range(len(SUBJECTS))]
            cls.cold_talk = talk(d)
            cls.features, _ = d.client.forward(*FEATURES)

    def test_prefix_cache(self):
        with Daemon() as d:
            cold = [d.ask(i) for i in SHORT]
            warm = [d.ask(i) for i in SHORT]
            for i in SHORT:
                self.check(i, cold[i], "cold")
                self.check(i, warm[i], "warm")
                n = warm[i].done.usage.prompt_tokens
                known = 0 if "prompt_logprobs" in SUBJECTS[i][1] else (n - 1) // 16 * 16
                self.assertEqual(warm[i].done.usage.cached_tokens, known, f"subject {i}")
                self.assertEqual(warm[i].done.usage.cached_tiles, warm[i].done.usage.tiles, f"subject {i}")
            self.assertEqual(cold[0].done.usage.cached_tokens, 0)
            for i in (4, 6):  # the pictures of the one before
                self.assertLess(cold[i - 1].done.usage.cached_tiles, cold[i - 1].done.usage.tiles, f"subject {i - 1}")
                self.assertEqual(cold[i].done.usage.cached_tiles, cold[i].done.usage.tiles, f"subject {i}")
            self.assertGreater(cold[2].done.usage.cached_tokens, 100, "the passage was there")
            self.check_all(d, "warm, beside each other")
            answer = collect(d.start(1, cache_salt="mine"))
            self.check(1, answer, "another salt")
            self.assertEqual(answer.done.usage.cached_tokens, 0, "another salt")
            for known in (cold[3].done.usage.cached_tiles, cold[3].done.usage.tiles):  # its own, from the second on
                answer = collect(d.start(3, cache_salt="mine"))
                self.check(3, answer, "another salt")
                self.assertEqual(answer.done.usage.cached_tiles, known, "another salt")
            for i in (2, 4, 8):  # n = 1 is the first of n = 4
                several = d.ask(i, n=4)
                self.assertEqual(several.bits()[0], self.expected[i][0], f"subject {i}, the first of four")

    def test_second_turn(self):
        """It continues from the pages and tiles of the turn with the picture; answers are those without caches."""
        cold = self.cold_talk
        with Daemon() as d:
            warm = talk(d)
        for turn in (0, 1):
            self.assertEqual(warm[turn].bits(), cold[turn].bits(), f"turn {turn + 1}")
        self.assertEqual((cold[1].done.usage.cached_tokens, cold[1].done.usage.cached_tiles), (0, 0))
        self.assertGreaterEqual(warm[1].done.usage.cached_tokens, warm[0].done.usage.prompt_tokens // 16 * 16)
        self.assertGreater(warm[1].done.usage.tiles, 0)
        self.assertEqual(warm[1].done.usage.cached_tiles, warm[1].done.usage.tiles)

    def test_features(self):
        """What Forward gives of the vision stage: the same with known tiles, and captured ones are always encoded."""
        (prompt, outputs), wanted = FEATURES, self.features
        with Daemon() as on:
            for where, captured in (("cold", 0), ("warm", 0), ("captured", 1), ("warm again", 0)):
                found, done = on.client.forward(prompt, outputs[:1 + captured])
                self.assertEqual(set(found), set(wanted) if captured else {"image_features"})
                for name in found:
                    self.assertEqual(found[name].tobytes(), wanted[name].tobytes(), f"{name}, {where}")
                if where != "cold":
                    self.assertEqual(done.usage.cached_tiles, 0 if captured else done.usage.tiles, where)

    def test_company(self):
        """With 63 others of the same kinds; chunks as they come."""
        with Daemon("--no-enable-prefix-caching") as d:
            indices = [i % len(SHORT) for i in range(16 if SANITIZED else 64)]
            answers = at_once([lambda i=i: d.ask(i) for i in indices])
            for i, answer in zip(indices, answers):
                self.check(i, answer, "with others")

    def test_chunks(self):
        for n_tokens in (16, 64):
            with Daemon("--max-num-batched-tokens", n_tokens, "--max-num-seqs", 16) as d:
                self.check_all(d, f"chunks of {n_tokens}")

    def test_preempted(self):
        """A KV cache that cannot hold two long answers, then two places that the more urgent take."""
        for extra in ((), ("--no-enable-prefix-caching",)):
            with Daemon("--kv-cache-memory-bytes", 32 * PAGE_BYTES, "--max-model-len", 512, "--max-num-seqs", 16,
                        *extra) as d:
                self.until_preempted(lambda: self.check_all(d, "short of pages", [*LONG, *TEXT]))
        with Daemon("--max-num-seqs", 2) as d:
            self.until_preempted(lambda: self.give_way(d))

    def give_way(self, d):
        calls = [d.start(i, priority=1) for i in LONG]
        begun = [collect([next(call), next(call)]) for call in calls]  # Started, a token: they run
        urgent = at_once([lambda i=i: collect(d.start(i, priority=0)) for i in TEXT])
        for i, answer in zip(TEXT, urgent):
            self.check(i, answer, "urgent")
        answers = [collect(call, answer) for call, answer in zip(calls, begun)]
        for i, answer in zip(LONG, answers):
            self.check(i, answer, "gave way to the urgent")
        return answers

    def test_layouts(self):
        for layout in layouts():
            with Daemon(layout=layout) as d:
                self.check_all(d, f"layout {layout}")


class Repeated:
    """A part of the above with OPTIONS, against bits of its own."""

    @classmethod
    def setUpClass(cls):
        cls.expected = {}
        with Daemon("--no-enable-prefix-caching", "--vision-cache-bytes", 0, *cls.OPTIONS) as d:
            for i in [*FEW, *LONG]:
                cls.expected[i] = d.ask(i).bits()

    def test_caches_and_company(self):
        with Daemon(*self.OPTIONS) as d:
            for where in ("cold", "warm"):
                for i in FEW:
                    answer = d.ask(i)
                    self.check(i, answer, where)
                    if where == "warm" and "prompt_logprobs" not in SUBJECTS[i][1]:
                        n = answer.done.usage.prompt_tokens
                        self.assertEqual(answer.done.usage.cached_tokens, (n - 1) // 16 * 16, f"subject {i}")
            self.check_all(d, "beside each other", 4 * FEW)
            self.assertEqual(d.ask(2, n=4).bits()[0], self.expected[2][0], "the first of four")

    def test_chunks_and_preemption(self):
        with Daemon(*self.OPTIONS, "--max-num-batched-tokens", 16, "--max-num-seqs", 16, "--kv-cache-memory-bytes",
                    32 * self.BYTES_OF_PAGE, "--max-model-len", 512) as d:
            self.assertEqual(d.client.model().load.kv_pages, 32)
            self.until_preempted(lambda: self.check_all(d, "short of pages", [*LONG, 0, 1, 9]))

    def test_layouts(self):
        for layout in [(2, 1, 1), (1, 2, 1)]:
            with Daemon(*self.OPTIONS, layout=layout) as d:
                self.check_all(d, f"layout {layout}", FEW)


class Int8Pages(Repeated, Compared):
    OPTIONS, BYTES_OF_PAGE = ("--kv-cache-dtype", "int8"), INT8_PAGE_BYTES

    def test_attentions(self):
        found = []
        for options in ((), self.OPTIONS):
            with Daemon(*options) as d:
                self.assertEqual(d.client.model().kv_cache_dtype, "int8" if options else "bfloat16")
                found.append(d.client.forward(SUBJECTS[3][0], ["attentions"])[0]["attentions.0"])
        self.assertLess(abs(found[1] - found[0]).max(), 0.05, "keys as a capture reads them")
        self.assertGreater(abs(found[1] - found[0]).max(), 0)


class Int8Activations(Repeated, Compared):
    """Products with codes of 4 bits in groups, and of 8 (vision, lm_head)."""

    OPTIONS = ("--device", "cpu", "--quantization", "int4", "--activation-quantization", "int8")
    BYTES_OF_PAGE = PAGE_BYTES


if __name__ == "__main__":
    main()
