"""A Python client made from proto/ the way any user would make one, and what the tests share."""

import atexit
import concurrent.futures
import contextlib
import dataclasses
import json
import os
import shutil
import struct
import subprocess
import sys
import tempfile
import time
import unittest

import grpc
from grpc_tools import protoc

import daemon
import made_files

ROOT = daemon.ROOT


def _generate():
    """Stubs of proto/ in a folder of this process."""
    folder = tempfile.mkdtemp(prefix="internvl-stubs-")
    atexit.register(shutil.rmtree, folder, True)
    status = protoc.main(["protoc", f"-I{ROOT / 'proto'}", f"--python_out={folder}", f"--grpc_python_out={folder}",
                          "internvl/v1/internvl.proto"])
    assert status == 0, "protoc failed"
    sys.path.insert(0, folder)


_generate()
from internvl.v1 import internvl_pb2 as pb  # noqa: E402
from internvl.v1 import internvl_pb2_grpc as pb_grpc  # noqa: E402

SANITIZED = os.environ.get("INTERNVLD_SANITIZED", "")  # the build's -fsanitize= value: slow, so tests do less
SERVICE = "internvl.v1.InferenceService"
OPTIONS = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1),
           ("grpc.use_local_subchannel_pool", 1), ("grpc.enable_http_proxy", 0)]
Code = grpc.StatusCode


class Picture(bytes):
    """The bytes of a picture file, as a part of a message."""


class Video(bytes):
    """The bytes of a video file."""


def example(name):
    data = (daemon.EXAMPLES / name).read_bytes()
    return Video(data) if name.endswith(".mp4") else Picture(data)


def examples():
    return json.loads((daemon.EXAMPLES / "examples.json").read_text())


def part(x, tiling=None, video=None):
    if isinstance(x, Picture):
        return pb.ContentPart(image=pb.ImagePart(data=bytes(x), tiling=tiling))
    if isinstance(x, Video):
        message = pb.VideoPart(data=bytes(x), **(video or {}))
        return pb.ContentPart(video=message)
    return pb.ContentPart(text=x)


def user(*parts):
    return pb.Message(role="user", parts=[part(x) for x in parts])


def chat(*parts):
    return pb.Prompt(chat=pb.ChatPrompt(messages=[user(*parts)]))


def png(width, height, rows):
    return Picture(made_files.png(width, height, rows))


@dataclasses.dataclass
class Candidate:
    text: str = ""
    ids: list = dataclasses.field(default_factory=list)
    logprobs: list = dataclasses.field(default_factory=list)
    finish: int = 0
    stop_string: str = ""
    stop_token_id: int | None = None
    score: float | None = None


def position_bits(positions):
    return tuple((x.token_id, x.rank, struct.pack("<f", x.logprob).hex())
                 for p in positions for x in [p.chosen, *p.top])


@dataclasses.dataclass
class Answer:
    candidates: dict = dataclasses.field(default_factory=dict)
    n_deltas: int = 0
    prompt_logprobs: list = dataclasses.field(default_factory=list)  # from the prompt's second token on
    started: object = None
    done: object = None

    def add(self, event):
        kind = event.WhichOneof("event")
        if kind == "started":
            assert self.started is None and self.n_deltas == 0, "Started is not first"
            self.started = event.started
        elif kind == "prompt_logprobs":
            assert self.started is not None and self.n_deltas == 0, "prompt_logprobs outside Started … deltas"
            assert event.prompt_logprobs.first_position == len(self.prompt_logprobs) + 1, "a gap in the prompt"
            self.prompt_logprobs += event.prompt_logprobs.positions
        elif kind == "done":
            assert self.done is None, "two Dones"
            self.done = event.done
        else:
            delta = event.delta
            assert self.started is not None and self.done is None, "a delta outside Started … Done"
            c = self.candidates.setdefault(delta.candidate, Candidate())
            assert c.finish == 0, "a delta after the candidate's end"
            self.n_deltas += 1
            c.text += delta.text
            c.ids += delta.token_ids
            c.logprobs += delta.logprobs
            c.finish = delta.finish_reason
            c.score = delta.score if delta.HasField("score") else None
            c.stop_string = delta.stop_string
            c.stop_token_id = delta.stop_token_id if delta.HasField("stop_token_id") else None

    @property
    def text(self):
        return self.candidates[0].text

    @property
    def ids(self):
        return self.candidates[0].ids

    @property
    def finish(self):
        return self.candidates[0].finish

    @property
    def logprobs(self):
        return self.candidates[0].logprobs

    def bits(self):
        """Ids and the bits of every log-probability, of all candidates: what must not change."""
        out = []
        for index, c in sorted(self.candidates.items()):
            out.append((index, tuple(c.ids), c.text, c.finish, position_bits(c.logprobs)))
        if self.prompt_logprobs:
            out.append(("prompt", position_bits(self.prompt_logprobs)))
        return out


class Client:
    def __init__(self, address, token=None):
        self.channel = grpc.insecure_channel(address, options=OPTIONS)
        self.stub = pb_grpc.InferenceServiceStub(self.channel)
        self.metadata = (("authorization", f"Bearer {token}"),) if token else ()

    def start(self, prompt, timeout=None, request_id="", **sampling):
        """The running call: iterate, cancel, …"""
        request = pb.GenerateRequest(request_id=request_id, prompt=prompt,
                                     sampling=pb.SamplingParams(**sampling))
        return self.stub.Generate(request, timeout=timeout, metadata=self.metadata)

    def generate(self, prompt, timeout=120, **sampling):
        answer = Answer()
        for event in self.start(prompt, timeout, **sampling):
            answer.add(event)
        assert answer.done is not None, "the stream ended without Done"
        return answer

    def forward(self, prompt, outputs=(), timeout=120, **fields):
        """({name: numpy array}, ForwardDone)"""
        import numpy
        tensors, header, data, done = {}, None, bytearray(), None

        def finish():
            if header is not None:
                assert header.dtype == "float32"
                tensors[header.name] = numpy.frombuffer(bytes(data), "<f4").reshape(header.shape)

        request = pb.ForwardRequest(prompt=prompt, outputs=outputs, **fields)
        for message in self.stub.Forward(request, timeout=timeout):
            kind = message.WhichOneof("part")
            if kind == "data":
                assert len(message.data) <= 1 << 20, "a chunk over 1 MiB"
                data += message.data
            else:
                finish()
                header, data = (message.header, bytearray()) if kind == "header" else (None, bytearray())
                done = message.done if kind == "done" else None
        assert done is not None, "the stream ended without Done"
        return tensors, done

    def tokenize(self, timeout=60, **fields):
        return self.stub.Tokenize(pb.TokenizeRequest(**fields), timeout=timeout)

    def model(self):
        return self.stub.GetModel(pb.GetModelRequest(), timeout=60)

    def wait_idle(self, limit_s=60):
        """Seconds until nothing runs, nothing waits."""
        start = time.monotonic()
        while time.monotonic() - start < limit_s:
            load = self.model().load
            if load.running == 0 and load.waiting == 0:
                return time.monotonic() - start
        raise AssertionError(f"after {limit_s} s still running {load.running}, waiting {load.waiting}")

    def close(self):
        self.channel.close()


def answer_bits(address):
    """Of one answer about a picture: what must be the same from any daemon of this model."""
    client = Client(address)
    bits = client.generate(chat(example("scene-two.png"), "Describe the image."), max_tokens=24, logprobs=1).bits()
    client.close()
    return bits


def at_once(functions):
    """Runs them all at the same time; their results in order."""
    with concurrent.futures.ThreadPoolExecutor(len(functions)) as pool:
        return [f.result() for f in [pool.submit(f) for f in functions]]


class DaemonTest(unittest.TestCase):
    """One daemon for all tests of a class, whose LAYOUT are Daemon's arguments."""

    LAYOUT = {}

    @classmethod
    def setUpClass(cls):
        cls.daemon = daemon.Daemon(**cls.LAYOUT)
        cls.client = Client(cls.daemon.address)

    @classmethod
    def tearDownClass(cls):
        cls.client.close()
        with cls.daemon:
            pass

    def internvl(self, *arguments, status=0, stdin="", address=True):
        """What the command says; its standard error in self.errors. address False: it is not told where we are."""
        environment = {**os.environ, **({"INTERNVL_ADDRESS": self.daemon.address} if address else {})}
        done = subprocess.run([daemon.program("INTERNVLD_COMMAND"), *map(str, arguments)], input=stdin,
                              capture_output=True, text=True, env=environment, timeout=300)
        self.assertEqual(done.returncode, status, f"{arguments}: {done.stdout}\n{done.stderr}")
        self.errors = done.stderr
        return done.stdout

    @contextlib.contextmanager
    def assertStatus(self, code, pattern="."):
        with self.assertRaises(grpc.RpcError) as caught:
            yield caught
        error = caught.exception
        self.assertEqual(error.code(), code, error.details())
        self.assertTrue(error.details(), "an error without a sentence")
        self.assertRegex(error.details(), pattern)


def main():
    """Runs the tests of the calling script; prints how long each took."""
    unittest.main(module="__main__", argv=[sys.argv[0], "-v", *sys.argv[1:]])


__all__ = ["Answer", "Client", "Code", "DaemonTest", "Picture", "ROOT", "SANITIZED", "SERVICE", "Video", "answer_bits", "at_once",
           "chat", "example", "examples", "main", "part", "pb", "pb_grpc", "png", "position_bits", "unittest", "user"]
