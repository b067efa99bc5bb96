"""UploadMedia and media_id: the same answers as with the bytes inline, every bound, ends in the middle, drain."""

import hashlib
import json
import os
import pathlib
import queue
import signal
import tempfile
import threading
import time

import daemon
import test_metrics
from support import Client, Code, DaemonTest, Picture, SANITIZED, Video, at_once, chat, example, main, pb, unittest

QUESTION = "What color is the star?"
CHUNK = 64 << 10
IMAGE, VIDEO = pb.MEDIA_KIND_IMAGE, pb.MEDIA_KIND_VIDEO


def start(kind=IMAGE, **told):
    return pb.UploadMediaRequest(start=pb.UploadMediaStart(kind=kind, **told))


def chunks(data, size=CHUNK):
    return [pb.UploadMediaRequest(chunk=data[i:i + size]) for i in range(0, len(data), size)]


def id_of(data):
    return "sha256:" + hashlib.sha256(data).hexdigest()


def by_id(media, question=QUESTION, media_id=None, **options):
    """A prompt that names the media instead of carrying it."""
    media_id = media_id or id_of(media)
    part = (pb.ContentPart(video=pb.VideoPart(media_id=media_id, **options)) if isinstance(media, Video)
            else pb.ContentPart(image=pb.ImagePart(media_id=media_id, **options)))
    return pb.Prompt(chat=pb.ChatPrompt(messages=[
        pb.Message(role="user", parts=[part, pb.ContentPart(text=question)])]))


class Feed:
    """An upload that is fed message by message."""

    def __init__(self, client, *messages, timeout=60):
        self.queue = queue.Queue()
        for message in messages:
            self.send(message)
        self.call = client.stub.UploadMedia.future(iter(self.queue.get, None), timeout=timeout)

    def send(self, message):
        self.queue.put(message)

    def end(self):
        self.send(None)
        return self.call


class UploadTest(DaemonTest):
    """A daemon whose metrics are asked, too."""

    EXTRA = ()

    @classmethod
    def setUpClass(cls):
        cls.LAYOUT = dict(extra=["--metrics-listen", "127.0.0.1:0", *cls.EXTRA])
        super().setUpClass()
        cls.metrics_address = test_metrics.metrics_address(cls.daemon)

    def upload(self, data, kind=None, size=CHUNK, client=None, **told):
        kind = kind or (VIDEO if isinstance(data, Video) else IMAGE)
        return (client or self.client).stub.UploadMedia(iter([start(kind, **told), *chunks(bytes(data), size)]),
                                                        timeout=120)

    def metrics(self):
        _, values = test_metrics.parse(test_metrics.scrape(self.metrics_address))
        return {name.removeprefix("internvld:media_"): int(x) for (name, _), x in values.items() if ":media_" in name}

    def wait_metrics(self, limit_s=30, **expected):
        """Until they have these values: a call's end is counted soon after its client sees it."""
        end = time.monotonic() + limit_s
        while (got := self.metrics()) and time.monotonic() < end:
            if all(got[k] == v for k, v in expected.items()):
                return
            time.sleep(0.02)
        raise AssertionError(f"{got}, not {expected}")


class Upload(UploadTest):
    def test_same_answers(self):
        """By id or inline: the same bits, and the tiles are those of the feature cache."""
        for media, question in ((example("scene-two.png"), QUESTION),
                                (example("moving.mp4"), "In which direction does the star move?")):
            inline = self.client.generate(chat(media, question), temperature=0, logprobs=3)
            answer = self.upload(media)
            self.assertEqual(answer.media_id, id_of(media))
            self.assertEqual((answer.n_bytes, answer.ttl_seconds), (len(media), 3600))
            self.assertEqual(answer.kind, VIDEO if isinstance(media, Video) else IMAGE)
            named = self.client.generate(by_id(media, question), temperature=0, logprobs=3)
            self.assertEqual(named.bits(), inline.bits())
            self.assertEqual(named.started.media, inline.started.media)
            self.assertGreater(named.done.usage.tiles, 0)
            self.assertEqual(named.done.usage.cached_tiles, named.done.usage.tiles)

    def test_every_method(self):
        picture = example("scene-two.png")
        self.upload(picture)
        prompts = chat(picture, QUESTION), by_id(picture)
        a, b = (self.client.tokenize(chat=p.chat) for p in prompts)
        self.assertEqual(a, b)
        self.assertEqual(len(a.media), 1)
        a, b = (self.client.forward(p, ["logits"])[0]["logits"] for p in prompts)
        self.assertEqual(a.tobytes(), b.tobytes())
        a, b = (self.client.stub.Score(pb.ScoreRequest(prompt=p, continuations=[pb.Continuation(text="yellow")]),
                                       timeout=60) for p in prompts)
        self.assertEqual(a.scores, b.scores)
        a, b = ([m for m in self.client.stub.Embed(pb.EmbedRequest(prompt=p, outputs=["image_mean"]), timeout=60)]
                for p in prompts)
        self.assertEqual([m.data for m in a], [m.data for m in b])

    def test_options(self):
        """Tiling and sampling are the request's, not the upload's."""
        picture, video = example("scene-two.png"), example("moving.mp4")
        self.upload(picture)
        self.upload(video)
        one = self.client.tokenize(chat=by_id(picture, tiling=pb.TilingOptions(crop_to_patches=False)).chat)
        self.assertEqual([m.tiles for m in one.media], [1])
        two = self.client.tokenize(chat=by_id(video, num_frames=2).chat)
        self.assertEqual([m.tiles for m in two.media], [2])

    def test_twice(self):
        """The same content is one entry, whatever its chunks and whoever sends it."""
        picture = Picture(os.urandom(200000))
        before = self.metrics()
        ids = {self.upload(picture, size=size).media_id for size in (200000, CHUNK, 1000)}
        ids |= {x.media_id for x in at_once([lambda: self.upload(picture)] * 4)}
        self.assertEqual(ids, {id_of(picture)})
        self.wait_metrics(store_entries=before["store_entries"] + 1, uploads_running=0,
                          store_bytes=before["store_bytes"] + len(picture))

    def test_told(self):
        data = os.urandom(100000)
        digest = hashlib.sha256(data).hexdigest()
        before = self.metrics()["store_entries"]
        for wrong in (dict(n_bytes=len(data) + 1), dict(n_bytes=len(data) - 1), dict(n_bytes=0)):
            with self.assertStatus(Code.INVALID_ARGUMENT, "n_bytes"):
                self.upload(data, **wrong)
        with self.assertStatus(Code.INVALID_ARGUMENT, f"not that of sha256.*{digest}"):
            self.upload(data, sha256="0" * 64)
        for wrong in ("", "0" * 63, "g" * 64, "sha256:" + digest):
            with self.assertStatus(Code.INVALID_ARGUMENT, "64 hexadecimal digits"):
                self.upload(data, sha256=wrong)
        self.wait_metrics(store_entries=before, uploads_running=0)
        self.assertEqual(self.upload(data, n_bytes=len(data), sha256=digest.upper()).media_id, "sha256:" + digest)

    def test_odd_streams(self):
        before = self.metrics()
        for messages, pattern in (([], "no message"),
                                  ([start()], "no bytes"),
                                  ([start(), *chunks(b"")], "no bytes"),
                                  ([start(), pb.UploadMediaRequest(chunk=b"")], "no bytes"),
                                  (chunks(b"abc"), "must be start"),
                                  ([start(), start()], "twice"),
                                  ([start(), *chunks(b"abc"), start()], "twice"),
                                  ([pb.UploadMediaRequest()], "neither"),
                                  ([start(0)], "kind is 0"),
                                  ([pb.UploadMediaRequest(start=pb.UploadMediaStart(kind=7))], "kind is 7")):
            with self.assertStatus(Code.INVALID_ARGUMENT, pattern):
                self.client.stub.UploadMedia(iter(messages), timeout=60)
        raw = self.client.channel.stream_unary("/internvl.v1.InferenceService/UploadMedia")
        for junk in (b"\xff" * 20, b"\x0a\x05abc", b"\x12\xff\xff\xff\xff\x7f"):
            with self.assertStatus(Code.INVALID_ARGUMENT):
                raw(iter([junk]), timeout=60)
        self.wait_metrics(uploads_running=0, store_bytes=before["store_bytes"])

    def test_cancelled(self):
        """What a client gives up in the middle leaves nothing."""
        before = self.metrics()
        data = os.urandom(3 * CHUNK)
        for how in range(3):
            feed = Feed(self.client, start(), *chunks(data), timeout=60 if how else 1)
            self.wait_metrics(uploads_running=1, store_bytes=before["store_bytes"] + len(data))
            if how == 1:
                feed.call.cancel()
            elif how == 2:  # the whole connection
                other = Client(self.daemon.address)
                lost = Feed(other, start(), *chunks(data))
                self.wait_metrics(uploads_running=2)
                other.close()
                self.assertIsNotNone(lost.call.exception(30))
                feed.call.cancel()
                lost.end()
            else:
                self.assertEqual(feed.call.exception(60).code(), Code.DEADLINE_EXCEEDED)
            feed.end()
            self.wait_metrics(**before)
        with self.assertStatus(Code.NOT_FOUND):
            self.client.generate(by_id(data))

    def test_not_found(self):
        for wrong in ("sha256:" + "0" * 64, "sha256:", "x", "sha256:" + "0" * 65, "\u00e9" * 300):
            with self.assertStatus(Code.NOT_FOUND, "upload it again"):
                self.client.generate(by_id(Picture(), media_id=wrong))
        prompt = by_id(Picture())
        prompt.chat.messages[0].parts[0].image.media_id = ""
        with self.assertStatus(Code.NOT_FOUND):
            self.client.tokenize(chat=prompt.chat)

    def test_both(self):
        picture = example("scene-two.png")
        self.upload(picture)
        for fields in (dict(image=pb.ImagePart(data=bytes(picture), media_id=id_of(picture))),
                       dict(video=pb.VideoPart(data=b"x", media_id=id_of(picture))),
                       dict(video=pb.VideoPart(frames=[bytes(picture)], media_id=id_of(picture)))):
            prompt = pb.ChatPrompt(messages=[pb.Message(role="user", parts=[pb.ContentPart(**fields)])])
            with self.assertStatus(Code.INVALID_ARGUMENT, "give one of them"):
                self.client.tokenize(chat=prompt)
        with self.assertStatus(Code.INVALID_ARGUMENT, "picture, not as a video"):
            self.client.tokenize(chat=by_id(Video(), media_id=id_of(picture)).chat)

    def test_not_a_picture(self):
        """The store takes any bytes: what they hold is found out by the request, as with data."""
        data = Picture(b"not a picture")
        self.upload(data)
        with self.assertStatus(Code.INVALID_ARGUMENT) as named:
            self.client.generate(by_id(data))
        with self.assertStatus(Code.INVALID_ARGUMENT) as inline:
            self.client.generate(chat(data, QUESTION))
        self.assertEqual(named.exception.details(), inline.exception.details())

    def test_many_at_once(self):
        """No more than max_uploads at once; a place that is free again is taken."""
        n = self.client.model().limits.max_uploads
        feeds = [Feed(self.client, start(), *chunks(bytes([i]) * 1000)) for i in range(n)]
        self.wait_metrics(uploads_running=n)
        with self.assertStatus(Code.RESOURCE_EXHAUSTED, f"{n} uploads"):
            self.upload(b"one more")
        answers = [feed.end().result(60) for feed in feeds]
        self.assertEqual([x.media_id for x in answers], [id_of(bytes([i]) * 1000) for i in range(n)])
        picture = example("scene-two.png")
        rounds = 8 if SANITIZED else 40
        at_once([lambda: self.upload(picture, size=500)] * 8 + [
            lambda: [self.client.tokenize(chat=by_id(picture).chat) for _ in range(rounds)]] * 2)
        self.wait_metrics(uploads_running=0)

    # ---- the command ----

    def test_command(self):
        scene, video = daemon.EXAMPLES / "scene-two.png", daemon.EXAMPLES / "moving.mp4"
        names = self.internvl("upload", scene, video).split()
        self.assertEqual(names, ["media:" + id_of(x.read_bytes()) for x in (scene, video)])
        told = json.loads(self.internvl("upload", "--json", video))
        self.assertEqual((told["kind"], told["n_bytes"]), ("video", video.stat().st_size))
        for option, path, name in (("--image", scene, names[0]), ("--video", video, names[1])):
            for command, *rest in (("ask", "--temperature", 0), ("tokenize", "--json"), ("embed", "--json"),
                                   ("forward", "--json"), ("score", "--json")):
                texts = [QUESTION, "yellow"] if command == "score" else [QUESTION]
                self.assertEqual(self.internvl(command, *rest, option, name, *texts),
                                 self.internvl(command, *rest, option, path, *texts), (command, option))
        talk = self.internvl("chat", "--temperature", "0", stdin=f"/image {names[0]}\n{QUESTION}\n")
        self.assertIn("yellow", talk.lower())
        self.internvl("ask", "--image", "media:sha256:" + "0" * 64, "x", status=1)
        self.assertIn("NOT_FOUND", self.errors)
        with tempfile.TemporaryDirectory() as folder:
            large = pathlib.Path(folder) / "large"
            large.write_bytes(os.urandom(5 << 20))
            self.assertEqual(self.internvl("upload", large).strip(), "media:" + id_of(large.read_bytes()))
            large.write_bytes(b"")
            self.internvl("upload", large, status=1)
            self.assertIn("INVALID_ARGUMENT", self.errors)


class Small(UploadTest):
    """A store of 300 000 bytes, files of 200 000, messages of 100 000, kept for a second."""

    EXTRA = "--media-store-bytes", 300000, "--max-media-bytes", 200000, "--max-message-bytes", 100000, "--media-ttl", 1

    def test_bounds(self):
        limits = self.client.model().limits
        self.assertEqual((limits.max_media_bytes, limits.max_message_bytes), (200000, 100000))
        self.upload(os.urandom(200000))  # more than a message may have
        for told in ({}, dict(n_bytes=200001), dict(n_bytes=2**64 - 1)):
            with self.assertStatus(Code.RESOURCE_EXHAUSTED, "200000 bytes"):
                self.upload(os.urandom(200001), **told)
        with self.assertStatus(Code.RESOURCE_EXHAUSTED):  # one message over its own bound
            self.upload(os.urandom(150000), size=150000)
        self.wait_metrics(uploads_running=0)

    def test_evicted(self):
        """What was used least recently makes room; what is arriving does not."""
        first, second, third = (Picture(os.urandom(100000)) for _ in range(3))
        for data in (first, second):
            self.upload(data)
        feed = Feed(self.client, start(), *chunks(bytes(third)))
        self.wait_metrics(store_bytes=300000)
        other = Feed(self.client, start(), *chunks(os.urandom(200000)))  # both entries go
        self.wait_metrics(store_bytes=300000, store_entries=0, uploads_running=2)
        with self.assertStatus(Code.RESOURCE_EXHAUSTED, "all in use"):
            self.upload(b"x")
        self.assertEqual(other.end().result(60).n_bytes, 200000)
        self.assertEqual(feed.end().result(60).media_id, id_of(third))
        for data in (first, second):
            with self.assertStatus(Code.NOT_FOUND):
                self.client.generate(by_id(data))

    def test_expired(self):
        picture = example("scene-two.png")
        self.assertEqual(self.upload(picture).ttl_seconds, 1)
        self.wait_metrics(store_entries=0)  # without being asked for
        with self.assertStatus(Code.NOT_FOUND, "upload it again"):
            self.client.generate(by_id(picture))


class Off(UploadTest):
    EXTRA = "--media-store-bytes", 0

    def test_off(self):
        limits = self.client.model().limits
        self.assertEqual((limits.max_media_bytes, limits.max_uploads), (0, 0))
        with self.assertStatus(Code.FAILED_PRECONDITION, "media-store-bytes"):
            self.upload(b"abc")
        with self.assertStatus(Code.FAILED_PRECONDITION, "media-store-bytes"):
            self.client.generate(by_id(Picture(b"abc")))


class Drain(unittest.TestCase):
    def test_drain(self):
        """An upload in the middle ends UNAVAILABLE, whether its client sends or not, and holds nothing up."""
        with daemon.Daemon(extra=["--drain-timeout", 60]) as d:
            client = Client(d.address)
            idle = Feed(client, start(), *chunks(b"abc"))
            busy, is_over = Feed(client, start()), threading.Event()

            def send():
                while not is_over.wait(0.001):
                    busy.send(pb.UploadMediaRequest(chunk=b"x" * 100))

            sender = threading.Thread(target=send)
            sender.start()
            client.model()
            time.sleep(0.2)  # both have begun, or else are refused as new ones: the same status
            d.process.send_signal(signal.SIGTERM)
            errors = [x.call.exception(60) for x in (idle, busy)]
            is_over.set()
            sender.join()
            for feed in (idle, busy):
                feed.end()
            self.assertEqual([e.code() for e in errors], [Code.UNAVAILABLE] * 2, errors)
            self.assertEqual(d.wait(), 0)
            self.assertNotIn("cut off", d.log())
            client.close()


if __name__ == "__main__":
    main()
