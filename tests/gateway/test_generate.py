"""Generate, as a Python client sees it: answers, streaming, every sampling parameter."""

import contextlib
import json
import math

import grpc

import daemon
from support import (Answer, Client, Code, DaemonTest, Picture, ROOT, at_once, chat, example, examples, main, pb,
                     position_bits, user)

STOP, LENGTH = pb.FINISH_REASON_STOP, pb.FINISH_REASON_LENGTH
END = 994  # <|im_end|> of the demo model


class Generate(DaemonTest):
    def describe(self, **sampling):
        return self.client.generate(chat(example("scene-two.png"), "Describe the image."), **sampling)

    def free(self, n_tokens=40, **sampling):
        """A long noisy answer."""
        return self.client.generate(chat("What is the opposite of old?"), max_tokens=n_tokens, ignore_eos=True,
                                    **sampling)

    def test_text(self):
        a = self.client.generate(chat("Write rat in capital letters."))
        self.assertEqual(a.text, "RAT")
        self.assertEqual(a.finish, STOP)
        self.assertEqual(a.done.usage.image_tokens, 0)

    def test_examples(self):
        """Pictures and a video with known answers, several at once."""
        cases = examples()
        answers = at_once([lambda c=c: self.client.generate(chat(example(c["file"]), c["question"])) for c in cases])
        for case, a in zip(cases, answers):
            with self.subTest(file=case["file"], question=case["question"]):
                self.assertEqual(a.text, case["answer"])
                self.assertEqual([x for x in a.ids if x != END], [x for x in case["tokens"] if x != END])
                self.assertEqual(a.finish, STOP)
                self.assertGreater(a.done.usage.image_tokens, 0)
                self.assertEqual(a.started.prompt_tokens, a.done.usage.prompt_tokens)
                self.assertEqual(len(a.started.media), 1)
                self.assertEqual(a.started.media[0].tokens, a.done.usage.image_tokens)
                self.assertEqual(a.started.media[0].tiles, a.done.usage.tiles)

    def test_two_pictures(self):
        """Questions about the first and the second of two pictures, as Transformers answered them."""
        folder = ROOT / "tests/data/demo-eval"
        lines = [json.loads(x) for x in (folder / "eval.jsonl").read_text().splitlines()]
        for q in [x for x in lines if x["category"] == "multi_which" and x["hf_min_margin"] > 0.1][:8]:
            if q["messages"][0]["role"] != "user":
                continue
            parts = [Picture((folder / x["path"]).read_bytes()) if x["type"] == "image" else x["text"]
                     for x in q["messages"][0]["content"]]
            a = self.client.generate(chat(*parts))
            self.assertEqual(a.text, q["hf_answer"], q["id"])
            self.assertEqual(len(a.started.media), 2)

    def test_multi_turn_and_system(self):
        messages = [pb.Message(role="system", parts=[pb.ContentPart(text="Answer briefly.")]),
                    user(example("scene-two.png"), "How many objects are there?"),
                    pb.Message(role="assistant", parts=[pb.ContentPart(text="2")]),
                    user("What color is the star?")]
        a = self.client.generate(pb.Prompt(chat=pb.ChatPrompt(messages=messages)))
        self.assertEqual(a.text, "yellow")

    def test_continue_final_message(self):
        whole = self.describe()
        begun = pb.Message(role="assistant", parts=[pb.ContentPart(text="A purple square")])
        prompt = pb.ChatPrompt(messages=[user(example("scene-two.png"), "Describe the image."), begun],
                               continue_final_message=True)
        a = self.client.generate(pb.Prompt(chat=prompt))
        self.assertEqual("A purple square" + a.text, whole.text)

    def test_stream_is_incremental(self):
        """Deltas come while the answer is made, and together are the answer."""
        call = self.client.start(chat("What is the opposite of old?"), max_tokens=1000, ignore_eos=True)
        streamed, running_at_first = Answer(), None
        for event in call:
            streamed.add(event)
            if running_at_first is None and streamed.n_deltas == 1:
                running_at_first = self.client.model().load.running
        whole = self.free(1000)
        self.assertEqual(running_at_first, 1, "the first delta came after the last token")
        self.assertGreater(streamed.n_deltas, 10)
        self.assertEqual(streamed.text, whole.text)
        self.assertEqual(streamed.ids, whole.ids)
        self.assertEqual(len(whole.ids), 1000)

    def test_stream_interval(self):
        """Fewer messages, the same answer; a reader that is slow gets fewer still."""
        each = self.free(45)
        with daemon.Daemon(extra=("--stream-interval", 8)) as d, contextlib.closing(Client(d.address)) as client:
            together = client.generate(chat("What is the opposite of old?"), max_tokens=45, ignore_eos=True)
        self.assertEqual((together.ids, together.text), (each.ids, each.text))
        self.assertIn(together.n_deltas, range(2, 1 + 5 + 1 + 1))  # the first token, five times 8, the rest

    def test_text_is_the_tokens(self):
        a = self.free(200, skip_special_tokens=False, logprobs=0)
        self.assertEqual(len(a.logprobs), len(a.ids))
        text = b"".join(x.chosen.token for x in a.logprobs).decode(errors="replace")
        self.assertEqual(a.text, text)
        decoded = self.client.tokenize(token_ids=pb.TokenIds(ids=a.ids), skip_special_tokens=False)
        self.assertEqual(a.text, decoded.text)

    def test_token_prompt(self):
        """The ids that Tokenize shows, generated from directly, give the chat's answer."""
        prompt = chat("Write rat in capital letters.")
        ids = self.client.tokenize(chat=prompt.chat).token_ids
        a = self.client.generate(pb.Prompt(tokens=pb.TokenPrompt(token_ids=ids)), logprobs=3)
        self.assertEqual(a.bits(), self.client.generate(prompt, logprobs=3).bits())

    def test_logprobs(self):
        a = self.describe(logprobs=5)
        self.assertEqual(len(a.logprobs), len(a.ids))
        for token_id, position in zip(a.ids, a.logprobs):
            self.assertEqual(position.chosen.token_id, token_id)
            self.assertEqual(position.chosen.rank, 1)  # greedy
            self.assertEqual([x.rank for x in position.top], [1, 2, 3, 4, 5])
            self.assertEqual(position.top[0], position.chosen)
            values = [x.logprob for x in position.top]
            self.assertEqual(values, sorted(values, reverse=True))
            self.assertLessEqual(sum(math.exp(x) for x in values), 1.0001)
        self.assertEqual([len(x.top) for x in self.describe(logprobs=0).logprobs], [0] * len(a.ids))
        self.assertEqual(self.describe().logprobs, [])

    def test_logprobs_are_forwards(self):
        """The log-probabilities of a generation are those of one pass over prompt and answer."""
        import numpy
        prompt = self.client.tokenize(chat=chat("What is the opposite of old?").chat).token_ids
        a = self.free(30, logprobs=0)
        ids = list(prompt) + a.ids
        tensors, _ = self.client.forward(pb.Prompt(tokens=pb.TokenPrompt(token_ids=ids)), ["logits"])
        logits = tensors["logits"].reshape(len(ids), -1).astype(numpy.float64)
        logits -= logits.max(1, keepdims=True)
        logits -= numpy.log(numpy.exp(logits).sum(1, keepdims=True))
        for i, (token_id, position) in enumerate(zip(a.ids, a.logprobs)):
            self.assertAlmostEqual(position.chosen.logprob, logits[len(prompt) - 1 + i, token_id], delta=1e-3)

    def test_prompt_logprobs(self):
        """Of every token of the prompt but the first; what one pass over it gives; whatever is cached, and for all n."""
        import numpy
        prompt = chat(example("scene-three.png"), "Describe the image.")
        ids = list(self.client.tokenize(chat=prompt.chat).token_ids)
        _, done = self.client.forward(prompt, [], labels=ids)
        self.client.generate(prompt, max_tokens=1)  # its pages are cached
        expected = None
        for fields in (dict(prompt_logprobs=0), dict(prompt_logprobs=3), dict(prompt_logprobs=20),
                       dict(prompt_logprobs=3, n=3, temperature=1.0, seed=2), dict(prompt_logprobs=3, num_beams=3)):
            a = self.client.generate(prompt, max_tokens=5, **fields)
            k = fields["prompt_logprobs"]
            self.assertEqual([p.chosen.token_id for p in a.prompt_logprobs], ids[1:])
            self.assertEqual([p.chosen.logprob for p in a.prompt_logprobs], list(done.token_logprobs[:-1]))
            self.assertEqual(a.done.usage.cached_tokens, 0)
            for p in a.prompt_logprobs:
                self.assertEqual([x.rank for x in p.top], list(range(1, k + 1)))
                self.assertTrue(p.chosen in p.top if p.chosen.rank <= k else p.chosen not in p.top)
            if k == 3:
                expected = expected or position_bits(a.prompt_logprobs)
                self.assertEqual(position_bits(a.prompt_logprobs), expected, fields)
        self.assertGreater(self.client.generate(prompt, max_tokens=1).done.usage.cached_tokens, 0)
        self.assertEqual(self.client.generate(prompt, max_tokens=5).prompt_logprobs, [])
        one = pb.Prompt(tokens=pb.TokenPrompt(token_ids=[5]))
        self.assertEqual(self.client.generate(one, prompt_logprobs=2, max_tokens=1).prompt_logprobs, [])

    def test_prompt_logprobs_come_in_messages(self):
        """As long a prompt as there can be, with the most at each position: several messages, none over 1 MiB."""
        n = self.client.model().limits.max_model_len - 2
        prompt = pb.Prompt(tokens=pb.TokenPrompt(token_ids=[5 + i % 900 for i in range(n)]))
        sizes = []
        for event in self.client.start(prompt, 120, prompt_logprobs=20, max_tokens=2):
            if event.WhichOneof("event") == "prompt_logprobs":
                sizes.append((len(event.prompt_logprobs.positions), event.ByteSize()))
        self.assertEqual(sum(x for x, _ in sizes), n - 1)
        self.assertGreater(len(sizes), (n - 1) // 98)
        self.assertLess(max(x for _, x in sizes), 1 << 20)

    def test_n_and_seed(self):
        draw = dict(temperature=1.5, n=4, seed=7, logprobs=2)
        a, b = self.free(**draw), self.free(**draw)
        self.assertEqual(sorted(a.candidates), [0, 1, 2, 3])
        self.assertEqual(a.bits(), b.bits())
        self.assertEqual(len({tuple(c.ids) for c in a.candidates.values()}), 4)
        self.assertEqual(a.done.usage.completion_tokens, 160)
        self.assertEqual(a.started.seed, 7)
        alone = self.free(**{**draw, "n": 1})
        self.assertEqual(alone.ids, a.ids, "candidate 0 depends on n")
        self.assertNotEqual(self.free(**{**draw, "seed": 8}).ids, a.ids)

    def test_seed_of_the_server(self):
        a, b = self.free(temperature=1.5), self.free(temperature=1.5)
        self.assertNotEqual(a.started.seed, b.started.seed)
        again = self.free(temperature=1.5, seed=a.started.seed)
        self.assertEqual(again.ids, a.ids)

    def test_filters(self):
        """top_k 1, a tiny top_p and min_p 1 leave the likeliest token alone."""
        greedy = self.free(temperature=0)
        for filtered in (dict(top_k=1), dict(top_p=1e-6), dict(min_p=1.0)):
            with self.subTest(filtered):
                self.assertEqual(self.free(temperature=2.0, seed=1, **filtered).ids, greedy.ids)
        a = self.free(200, temperature=3.0, seed=1, top_k=3, logprobs=0)
        self.assertLessEqual({x.chosen.rank for x in a.logprobs}, {1, 2, 3})
        self.assertGreater(len({x.chosen.rank for x in a.logprobs}), 1)

    def test_stop_strings(self):
        whole = self.describe().text  # A purple square on the left and a yellow star at the bottom left.
        for stop in ("yellow", "ow st", "square on", "."):
            with self.subTest(stop=stop):
                a = self.describe(stop=["nowhere", stop])
                self.assertEqual(a.text, whole[:whole.index(stop)])
                self.assertEqual((a.finish, a.candidates[0].stop_string), (STOP, stop))
                a = self.describe(stop=[stop], include_stop_str_in_output=True)
                self.assertEqual(a.text, whole[:whole.index(stop) + len(stop)])
        self.assertEqual(self.describe(stop=["left and not"]).text, whole, "held back text was lost")

    def test_stop_token_ids(self):
        ids = self.describe().ids
        a = self.describe(stop_token_ids=[ids[3]])
        self.assertEqual((a.finish, a.candidates[0].stop_token_id), (STOP, ids[3]))
        self.assertEqual(a.ids[:3], ids[:3])
        self.assertLessEqual(len(a.ids), 4)
        self.assertEqual(self.describe().candidates[0].stop_token_id in (None, END), True)

    def test_lengths(self):
        a = self.describe(max_tokens=3)
        self.assertEqual((len(a.ids), a.finish), (3, LENGTH))
        self.assertEqual(a.done.usage.completion_tokens, 3)
        short = self.client.generate(chat("Write rat in capital letters."), min_tokens=6, max_tokens=20)
        self.assertGreaterEqual(len(short.ids), 6)
        self.assertNotIn(END, short.ids[:6])
        a = self.free(17)
        self.assertEqual((len(a.ids), a.finish), (17, LENGTH))

    def test_penalties(self):
        plain = self.free(100)
        for penalty in (dict(repetition_penalty=3.0), dict(presence_penalty=2.0), dict(frequency_penalty=2.0)):
            with self.subTest(penalty):
                a = self.free(100, **penalty)
                self.assertGreater(len(set(a.ids)), len(set(plain.ids)))
                self.assertEqual(a.ids, self.free(100, **penalty).ids)
        self.assertEqual(self.free(100, repetition_penalty=1.0, presence_penalty=0, frequency_penalty=0).ids, plain.ids)

    def test_logit_bias(self):
        ids = self.describe().ids
        a = self.describe(max_tokens=4, logit_bias=[pb.LogitBias(token_id=33, bias=100)])
        self.assertEqual(a.ids, [33] * 4)
        a = self.describe(logit_bias=[pb.LogitBias(token_id=ids[0], bias=-100)])
        self.assertNotIn(ids[0], a.ids)

    def test_beam_search(self):
        prompt = chat(example("scene-two.png"), "Describe the image.")
        greedy = self.client.generate(prompt, max_tokens=24, temperature=0)
        found = self.client.generate(prompt, max_tokens=24, num_beams=4, n=3)
        self.assertEqual(len(found.candidates), 3)
        scores = [found.candidates[i].score for i in range(3)]
        self.assertEqual(scores, sorted(scores, reverse=True))
        self.assertEqual(len({tuple(c.ids) for c in found.candidates.values()}), 3)
        scored = self.client.stub.Score(pb.ScoreRequest(prompt=prompt, continuations=[
            pb.Continuation(token_ids=pb.TokenIds(ids=ids)) for ids in [greedy.ids, *(c.ids for c in
                                                                      found.candidates.values())]]), timeout=60)
        for score, ours in zip(scored.scores[1:], scores):  # of length 1: the mean
            self.assertAlmostEqual(score.mean_logprob, ours, delta=1e-4)
        self.assertGreaterEqual(scores[0], scored.scores[0].mean_logprob - 1e-4)
        self.assertEqual(found.done.usage.completion_tokens, sum(len(c.ids) for c in found.candidates.values()))

    def test_beam_search_refusals(self):
        for sentence, fields in (("num_beams", {"num_beams": 11}), ("num_beams", {"num_beams": 0}),
                                 ("temperature", {"num_beams": 2, "temperature": 0.5}),
                                 ("top_k", {"num_beams": 2, "top_k": 5}), ("logprobs", {"num_beams": 2, "logprobs": 1}),
                                 ("stop", {"num_beams": 2, "stop": ["x"]}), ("beams", {"num_beams": 2, "n": 3}),
                                 ("length_penalty", {"length_penalty": 2.0}),
                                 ("length_penalty", {"num_beams": 2, "length_penalty": float("nan")}),
                                 ("length_penalty", {"num_beams": 2, "length_penalty": -100.0, "max_tokens": 12}),
                                 ("early_stopping", {"num_beams": 2, "early_stopping": 3}),
                                 ("at most 6", {"num_beams": 7, "stop_token_ids": [5]})):
            with self.subTest(fields=fields), self.assertRaises(grpc.RpcError) as raised:
                self.client.generate(chat("Hello"), **{"max_tokens": 4, **fields})
            self.assertEqual(raised.exception.code(), Code.INVALID_ARGUMENT)
            self.assertIn(sentence, raised.exception.details())

    def test_tiling_options(self):
        prompt = chat("Describe the image.")
        picture = pb.ImagePart(data=bytes(example("scene-two.png")), tiling=pb.TilingOptions(crop_to_patches=False))
        prompt.chat.messages[0].parts.insert(0, pb.ContentPart(image=picture))
        a = self.client.generate(prompt, max_tokens=1)
        self.assertEqual(a.started.media[0].tiles, 1)

    def test_video_options(self):
        prompt = chat("What color is the object?")
        clip = pb.VideoPart(data=bytes(example("moving.mp4")), num_frames=4)
        prompt.chat.messages[0].parts.insert(0, pb.ContentPart(video=clip))
        a = self.client.generate(prompt, max_tokens=1)
        self.assertEqual(a.started.media[0].tiles, 4)

    def test_request_id(self):
        events = list(self.client.start(chat("Write rat in capital letters."), request_id="my-request.1"))
        self.assertEqual(events[0].started.request_id, "my-request.1")
        self.assertTrue(self.client.generate(chat("Write rat in capital letters.")).started.request_id)

    def test_timing(self):
        for _ in range(2):  # the second time, if not before, no tile is encoded
            done = self.describe().done
            self.assertEqual(done.timing.vision_us > 0, done.usage.cached_tiles < done.usage.tiles)
            self.assertGreater(done.timing.prefill_us, 0)
            self.assertLessEqual(done.timing.first_token_us, done.timing.total_us)
        self.assertEqual(done.usage.cached_tiles, done.usage.tiles)


if __name__ == "__main__":
    main()
