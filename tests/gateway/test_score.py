"""Score, Embed, videos as lists of frames, and odd picture files, against a real daemon."""

import json
import math
import os
import pathlib
import struct

import numpy

import daemon
from support import Code, DaemonTest, Picture, SANITIZED, at_once, chat, example, main, part, pb, unittest

QUESTION = "What color is the star?"
REFERENCE = pathlib.Path(os.environ.get("INTERNVLD_REFERENCE") or daemon.ROOT / "tests/data/reference")
PICTURES = REFERENCE / "preprocess/images"


def bits(values):
    return [struct.pack("<f", x).hex() for x in values]


def frames(*pictures, **options):
    return pb.ContentPart(video=pb.VideoPart(frames=[bytes(x) for x in pictures], **options))


def user_parts(*parts):
    return pb.Prompt(chat=pb.ChatPrompt(messages=[pb.Message(role="user", parts=parts)]))


class Score(DaemonTest):
    LAYOUT = dict(dtype="float32")

    def score(self, prompt, continuations=(), **fields):
        wire = [pb.Continuation(text=c) if isinstance(c, str) else pb.Continuation(token_ids=pb.TokenIds(ids=c))
                for c in continuations]
        return self.client.stub.Score(pb.ScoreRequest(prompt=prompt, continuations=wire, **fields), timeout=120)

    def test_what_generate_drew(self):
        """A greedy answer scores the log-probabilities that it was drawn with, bit for bit."""
        for prompt in (chat("Write rat in capital letters."), chat(example("scene-two.png"), QUESTION)):
            drawn = self.client.generate(prompt, temperature=0, logprobs=0)
            expected = bits(x.chosen.logprob for x in drawn.logprobs)
            answer = self.score(prompt, [drawn.ids, drawn.ids[:1]])
            self.assertEqual(list(answer.scores[0].token_ids), drawn.ids)
            self.assertEqual(bits(answer.scores[0].token_logprobs), expected)
            self.assertEqual(bits(answer.scores[1].token_logprobs), expected[:1])
            self.assertTrue(answer.scores[0].is_greedy and answer.scores[1].is_greedy)
            self.assertEqual(list(answer.scores[0].token_ranks), [1] * len(drawn.ids))
            self.assertAlmostEqual(answer.scores[0].sum_logprob, sum(x.chosen.logprob for x in drawn.logprobs))
            self.assertAlmostEqual(answer.scores[0].mean_logprob, answer.scores[0].sum_logprob / len(drawn.ids))
            self.assertEqual(answer.usage.completion_tokens, len(drawn.ids) + 1)

    def test_continuations(self):
        """Many of one prompt, in any company, are what each is alone; the true answer is the likeliest."""
        words = ["yellow", "red", "blue", "green", "purple", "orange"]
        prompt = chat(example("scene-two.png"), QUESTION)
        together = self.score(prompt, words * 5)
        self.assertEqual(len(together.scores), 30)
        for i, score in enumerate(together.scores):
            alone = self.score(prompt, [words[i % 6]]) if i < 6 else together
            self.assertEqual(bits(score.token_logprobs), bits(alone.scores[i % 6 if i >= 6 else 0].token_logprobs))
        best = max(range(6), key=lambda i: together.scores[i].sum_logprob)
        self.assertEqual(words[best], "yellow")

    def test_ranks(self):
        """Ranks are those of the whole row of logits; one token that greedy would not say is enough."""
        prompt = chat("Write rat in capital letters.")
        drawn = self.client.generate(prompt, temperature=0, ignore_eos=True, max_tokens=4)
        ids = list(self.client.tokenize(chat=prompt.chat).token_ids)
        for continuation in (drawn.ids, drawn.ids[:2] + [7, 8], [9, *drawn.ids]):
            tensors, _ = self.client.forward(pb.Prompt(tokens=pb.TokenPrompt(token_ids=ids + continuation)), ["logits"])
            rows = tensors["logits"].reshape(len(ids) + len(continuation), -1)[len(ids) - 1:-1]
            expected = [int((row > row[i]).sum() + (row[:i] == row[i]).sum()) + 1 for row, i in zip(rows, continuation)]
            score, = self.score(prompt, [continuation]).scores
            self.assertEqual(list(score.token_ranks), expected)
            self.assertEqual(score.is_greedy, continuation == drawn.ids)

    def test_labels(self):
        prompt = chat(example("scene-two.png"), "Describe the image.")
        ids = list(self.client.tokenize(chat=prompt.chat).token_ids)
        labels = [-100] * (len(ids) - 9) + ids[-9:]
        _, done = self.client.forward(prompt, [], labels=labels)
        answer = self.score(prompt, labels=labels)
        self.assertAlmostEqual(answer.loss, done.loss, places=12)
        self.assertEqual(bits(answer.scores[0].token_logprobs), bits(done.token_logprobs[len(ids) - 10:len(ids) - 1]))
        self.assertEqual(list(answer.scores[0].token_ids), ids[-9:])

    def test_tiles_of_another_size(self):
        """Tiles that become another number of tokens than the model's are scored as Forward scores them."""
        pixels = numpy.random.default_rng(1).standard_normal((2, 3, 56, 56)).astype("<f4")
        tensor = pb.Tensor(shape=pixels.shape, dtype="float32", data=pixels.tobytes())
        ids, continuation = [1, *[1016] * 8, 2, 3, 4, 5], [6, 7]
        score, = self.score(pb.Prompt(tokens=pb.TokenPrompt(token_ids=ids, pixel_values=tensor)), [continuation]).scores
        _, done = self.client.forward(
            pb.Prompt(tokens=pb.TokenPrompt(token_ids=ids + continuation, pixel_values=tensor)), [],
            labels=[-100] * len(ids) + continuation)
        self.assertEqual(bits(score.token_logprobs), bits(done.token_logprobs[len(ids) - 1:-1]))

    def test_long_prompt(self):
        """The vocabulary projection runs in chunks: memory does not grow with the prompt's logits."""
        limits = self.client.model().limits
        n = 1000 if SANITIZED else limits.max_model_len - 1
        ids = [5 + i % 900 for i in range(n)]
        def peak():
            return max(int(next(x for x in pathlib.Path(f"/proc/{pid}/status").read_text().splitlines()
                                if x.startswith("VmHWM")).split()[1]) for pid in self.daemon.ranks().values())
        before = peak()
        prompt = pb.Prompt(tokens=pb.TokenPrompt(token_ids=ids))
        answer = self.score(prompt, labels=ids)
        self.assertEqual(len(answer.scores[0].token_ids), n - 1)
        after = peak()
        whole = n * self.client.model().vocab_size * 4 // 1024
        print(f"  {n} tokens scored: peak of the largest rank {before} -> {after} KiB (all logits: {whole} KiB)", flush=True)
        self.assertTrue(math.isfinite(answer.loss))

    def test_refused(self):
        prompt = chat("x")
        n = self.client.model().limits.max_continuations
        with self.assertStatus(Code.INVALID_ARGUMENT, "nothing to score"):
            self.score(prompt)
        with self.assertStatus(Code.INVALID_ARGUMENT, "exclude each other"):
            self.score(prompt, ["a"], labels=[1])
        with self.assertStatus(Code.INVALID_ARGUMENT, "limit is 64"):
            self.score(prompt, ["a"] * (n + 1))
        for empty in ("", []):
            with self.assertStatus(Code.INVALID_ARGUMENT, r"continuations\[1\] is empty"):
                self.score(prompt, ["a", empty])
        with self.assertStatus(Code.INVALID_ARGUMENT, "vocabulary"):
            self.score(prompt, [[4000000000]])
        with self.assertStatus(Code.INVALID_ARGUMENT, "max-model-len"):
            self.score(prompt, [[7] * self.client.model().limits.max_model_len])
        with self.assertStatus(Code.INVALID_ARGUMENT, "all -100"):
            self.score(prompt, labels=[-100] * len(self.client.tokenize(chat=prompt.chat).token_ids))
        self.assertEqual(len(self.score(prompt, ["a"] * n).scores), n)

    def test_cancelled(self):
        prompt = chat(example("scene-two.png"), QUESTION)
        request = pb.ScoreRequest(prompt=prompt, continuations=[pb.Continuation(text="a b c d")] * 64)
        for delay in (0.001, 0.01, 0.05):
            with self.assertStatus(Code.DEADLINE_EXCEEDED):
                self.client.stub.Score(request, timeout=delay)
            self.client.stub.Score.future(request).cancel()
        self.client.wait_idle()

    # ---- the command ----

    def test_command(self):
        scene = daemon.EXAMPLES / "scene-two.png"
        words = ["yellow", "red", "a blue star"]
        expected = self.score(chat(example("scene-two.png"), QUESTION), words)
        got = json.loads(self.internvl("score", "--json", "--image", scene, QUESTION, *words))
        for word, a, b in zip(words, got["scores"], expected.scores, strict=True):
            self.assertEqual((a["text"], a["token_ids"]), (word, list(b.token_ids)))
            self.assertEqual(bits(a["token_logprobs"]), bits(b.token_logprobs))
            self.assertEqual((a["token_ranks"], a["is_greedy"]), (list(b.token_ranks), b.is_greedy))
        table = self.internvl("score", "--image", scene, QUESTION, *words)
        for word, greedy in (("yellow", "yes|no"), ("a blue star", "no")):
            self.assertRegex(table, rf"(?m) (?:{greedy})  {word}$")
        table = self.internvl("embed", "--image", scene, "--tensor", "mean", "--tensor", "tile_mean", "x")
        for name in ("mean", "tile_mean"):
            self.assertRegex(table, rf"(?m)^{name} ")

    def test_command_media_options(self):
        """Each flag of tiling and sampling is the field of the same name."""
        def plan(part):
            return list(self.client.tokenize(chat=user_parts(part, pb.ContentPart(text="x")).chat).media)

        def said(*arguments):
            return [pb.MediaPlan(**m) for m in json.loads(self.internvl("tokenize", "--json", *arguments, "x"))["media"]]

        picture, video = daemon.EXAMPLES / "scene-two.png", next(daemon.EXAMPLES.glob("*.mp4"))
        plans = []
        for flags, options in ((("--no-crop",), dict(crop_to_patches=False)),
                               (("--min-patches", 2, "--max-patches", 4), dict(min_patches=2, max_patches=4)),
                               (("--min-patches", 2, "--no-thumbnail"), dict(min_patches=2, use_thumbnail=False))):
            wanted = plan(part(example("scene-two.png"), tiling=pb.TilingOptions(**options)))
            self.assertEqual(said("--image", picture, *flags), wanted, flags)
            plans.append(wanted[0].tiles)
        self.assertEqual(len(set(plans)), len(plans), plans)
        for flags, options in ((("--num-frames", 3), dict(num_frames=3)), (("--fps", 1), dict(fps=1)),
                               (("--all-frames",), dict(sample_frames=False)),
                               (("--num-frames", 2, "--initial-shift", 5), dict(num_frames=2, initial_shift=5))):
            self.assertEqual(said("--video", video, *flags), plan(part(example(video.name), video=options)), flags)

    # ---- Embed ----

    def embed(self, prompt, outputs):
        tensors, header, data = {}, None, b""
        for m in self.client.stub.Embed(pb.EmbedRequest(prompt=prompt, outputs=outputs), timeout=120):
            kind = m.WhichOneof("part")
            if kind == "data":
                data += m.data
                continue
            if header is not None:
                tensors[header.name] = numpy.frombuffer(data, "<f4").reshape(list(header.shape))
            header, data = (m.header if kind == "header" else None), b""
        return tensors

    def test_embed(self):
        prompt = chat(example("scene-four.png"), "Describe the image.")
        whole, _ = self.client.forward(prompt, ["last_hidden_state", "hidden_states", "image_features"])
        n_layers = self.client.model().text_layers
        self.assertEqual(whole["last_hidden_state"].tobytes(), whole[f"hidden_states.{n_layers}"].tobytes())
        names = ["last_hidden_state", "last_token", "mean", "image_features", "tile_mean", "image_mean"]
        got = self.embed(prompt, names)
        self.assertEqual(sorted(got), sorted(names))
        hidden, features = whole["last_hidden_state"], whole["image_features"]
        self.assertEqual(got["last_hidden_state"].tobytes(), hidden.tobytes())
        self.assertEqual(got["image_features"].tobytes(), features.tobytes())
        self.assertEqual(got["last_token"].tobytes(), hidden[-1].tobytes())
        wide, dim = features.astype(numpy.float64), hidden.shape[1]
        for name, expected in (("mean", hidden.astype(numpy.float64).mean(0)), ("tile_mean", wide.mean(1)),
                               ("image_mean", wide.reshape(-1, dim).mean(0))):
            self.assertEqual(got[name].shape, expected.shape, name)
            self.assertLess(numpy.abs(got[name] - expected).max(), 1e-6, name)
        alone = self.embed(prompt, ["mean"])
        self.assertEqual(list(alone), ["mean"])
        self.assertEqual(alone["mean"].tobytes(), got["mean"].tobytes())

    def test_embed_refused(self):
        for outputs, pattern in (([], "empty"), (["logits"], "not the name"), (["tile_mean"], "no picture")):
            with self.assertStatus(Code.INVALID_ARGUMENT, pattern):
                self.embed(chat("x"), outputs)

    # ---- frames ----

    def test_frames(self):
        """A video as a list of pictures: one tile each, Frame1: … Frame2: …"""
        pictures = [example(x) for x in ("scene-two.png", "scene-four.png", "scene-two.png")]
        prompt = user_parts(frames(*pictures), part("Describe the image."))
        tokens = self.client.tokenize(chat=prompt.chat)
        self.assertEqual([(m.tiles, m.grid_columns, m.grid_rows) for m in tokens.media], [(3, 1, 1)])
        text = self.client.tokenize(token_ids=pb.TokenIds(ids=tokens.token_ids)).text
        for k in (1, 2, 3):
            self.assertIn(f"Frame{k}: <img>", text)
        features, _ = self.client.forward(prompt, ["image_features"])
        for k, picture in enumerate(pictures):  # a frame is the picture as one tile
            one = user_parts(part(picture, tiling=pb.TilingOptions(crop_to_patches=False)), part("x"))
            alone, _ = self.client.forward(one, ["image_features"])
            self.assertEqual(features["image_features"][k].tobytes(), alone["image_features"][0].tobytes())
        self.assertTrue(self.client.generate(prompt, max_tokens=4).ids)

    def test_frames_refused(self):
        picture = example("scene-two.png")
        cases = ((frames(picture, b"not a picture"), "frame 2"), (frames(picture, b""), "empty"),
                 (frames(picture, num_frames=1), "cannot be sampled"), (frames(picture, fps=2), "cannot be sampled"),
                 (frames(picture, data=b"x"), "two of data, frames and media_id"),
                 (frames(*[picture] * (self.client.model().limits.max_frames + 1)), "frames; at most"))
        for wire, pattern in cases:
            with self.assertStatus(Code.INVALID_ARGUMENT, pattern):
                self.client.generate(user_parts(wire))
        self.assertEqual(self.client.generate(chat("Write rat in capital letters.")).text, "RAT")

    # ---- odd files ----

    @unittest.skipUnless(PICTURES.is_dir(), "no reference pictures")
    def test_odd_pictures(self):
        """Every file of the reference as a picture: the recorded grid, or a sentence; the daemon is unharmed."""
        recorded = json.loads((REFERENCE / "preprocess/images.json").read_text())
        recorded = {x["file"]: x for x in recorded}
        limits, n_answers, n_grids, refused = self.client.model().limits, 0, 0, []

        def ask(path):
            picture = part(Picture(path.read_bytes()), tiling=pb.TilingOptions(min_patches=1, max_patches=12))
            prompt = user_parts(picture, part("x"))
            try:
                return path.name, self.client.tokenize(chat=prompt.chat), self.client.generate(prompt, max_tokens=2)
            except Exception as error:  # an RpcError, looked at below
                return path.name, None, error

        paths = sorted(p for p in PICTURES.iterdir() if p.is_file())
        for start in range(0, len(paths), 8):
            for name, tokens, answer in at_once([lambda p=p: ask(p) for p in paths[start:start + 8]]):
                if tokens is None:
                    self.assertIn(answer.code(), (Code.INVALID_ARGUMENT, Code.UNIMPLEMENTED), f"{name}: {answer.details()}")
                    self.assertTrue(answer.details(), name)
                    refused.append(name)
                    continue
                n_answers += 1
                media = answer.started.media[0]
                self.assertEqual(list(answer.started.media), list(tokens.media), name)
                self.assertEqual(media.tokens, media.tiles * 16, name)
                self.assertLessEqual(media.tiles, limits.max_tiles)
                record = recorded.get(name, recorded.get(f"images/{name}"))
                for r in record["results"]:
                    if (r["tile"], r["crop_to_patches"], r.get("min_patches"), r.get("max_patches")) == (112, True, 1, 12):
                        n_grids += 1
                        self.assertEqual((media.grid_columns, media.grid_rows, media.tiles),
                                         (r["grid_columns"], r["grid_rows"], r["tiles"]), name)
        print(f"  {len(paths)} files: {n_answers} answered, {n_grids} recorded grids equal, refused: {', '.join(refused) or 'none'}", flush=True)
        self.assertEqual(refused, ["bmp.bmp"])
        self.assertGreater(n_grids, n_answers // 2)
        self.assertEqual(self.client.generate(chat("Write rat in capital letters.")).text, "RAT")


if __name__ == "__main__":
    main()
