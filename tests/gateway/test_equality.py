"""Bitwise the same: one request alone and among 15 others, whatever the layout."""

import random

from support import DaemonTest, SANITIZED, at_once, chat, example, main, unittest

SUBJECTS = [
    (chat(example("scene-three.png"), "Describe the image."), dict(logprobs=5)),
    (chat("What is the opposite of old?"), dict(max_tokens=150, ignore_eos=True, logprobs=3)),
    (chat(example("chart.png"), example("word.png"), "What word is written?"),
     dict(max_tokens=60, ignore_eos=True, temperature=1.2, seed=5, top_p=0.9, logprobs=2)),
    (chat("What is the opposite of old?"), dict(max_tokens=60, ignore_eos=True, temperature=1.5, seed=11, n=3, top_k=50,
                                    repetition_penalty=1.2, presence_penalty=0.5, logprobs=1)),
]


def neighbours():
    """15 requests of all kinds and lengths: pictures, text, sampling, Forward-like long prompts."""
    draw = random.Random(3)
    pictures = ["scene-two.png", "scene-four.png", "number.png", "chart.png"]
    out = []
    for i in range(15):
        n_words = draw.randint(1, 300)
        words = " ".join(draw.choice(["red", "blue", "square", "left", "two", "star"]) for _ in range(n_words))
        parts = [example(draw.choice(pictures))] if i % 3 == 0 else []
        sampling = dict(max_tokens=draw.randint(5, 200), ignore_eos=True, temperature=draw.choice([0.0, 1.0]), seed=i)
        out.append((chat(*parts, words), sampling))
    return out


class Equality(DaemonTest):
    LAYOUT = dict(tensor=2, pipeline=1)
    EXPECTED = {}  # what the first layout said: all must

    def ask(self, subject):
        prompt, sampling = subject
        return self.client.generate(prompt, **sampling).bits()

    def test_alone_and_in_company(self):
        for i, subject in enumerate(SUBJECTS):
            alone = self.ask(subject)
            self.assertEqual(self.ask(subject), alone, "twice the same request")
            others = neighbours()
            for round_ in range(1 if SANITIZED else 2):
                order = [subject, *others]
                random.Random(round_).shuffle(order)
                answers = at_once([lambda s=s: self.ask(s) for s in order])
                self.assertEqual(answers[order.index(subject)], alone, f"subject {i} among 15 others")
            layouts = Equality.EXPECTED.setdefault(i, alone)
            self.assertEqual(alone, layouts, f"subject {i} at {self.LAYOUT}")

    def test_forward_in_company(self):
        prompt = chat(example("scene-three.png"), "Describe the image.")
        outputs = ["logits", "hidden_states", "image_features"]
        alone, _ = self.client.forward(prompt, outputs)
        others = [lambda s=s: self.ask(s) for s in neighbours()]
        company, _ = at_once([lambda: self.client.forward(prompt, outputs), *others])[0]
        self.assertEqual(sorted(alone), sorted(company))
        for name, value in alone.items():
            self.assertEqual(value.tobytes(), company[name].tobytes(), name)


@unittest.skipIf(SANITIZED, "other layouts only without a sanitizer")
class EqualitySmallest(Equality):
    LAYOUT = dict(tensor=1, pipeline=1)


@unittest.skipIf(SANITIZED, "other layouts only without a sanitizer")
class EqualityStages(Equality):
    LAYOUT = dict(tensor=2, pipeline=2, vision=2)


class EqualityChunked(Equality):
    """A small token budget: prompts are cut into many chunks."""
    LAYOUT = dict(tensor=1, pipeline=1, extra=("--max-num-batched-tokens", 32, "--max-num-seqs", 16))


if __name__ == "__main__":
    main()
