"""What a client can get wrong: each has its status code and a sentence, and a stream beside it never notices."""

import math
import struct
import threading

import grpc

from support import Client, Code, DaemonTest, Picture, SERVICE, Video, chat, example, main, pb, png, user

INVALID = Code.INVALID_ARGUMENT
MARKER = "QQQQ"
LITTLE = b"\0" * 1000  # of the rows that a picture promises
WIDTH = 256  # hidden size of the demo's language model


def cases():
    picture = bytes(example("scene-two.png"))
    many = [example("scene-two.png")] * 40  # 40 times several tiles
    yield "corrupt picture", INVALID, chat(Picture(picture[:len(picture) // 2]), "x"), {}
    yield "text as a picture", INVALID, chat(Picture(b"GIF89a, no: this is text"), "x"), {}
    yield "empty picture", INVALID, chat(Picture(b""), "x"), {}
    yield "picture of 4 gigapixels", INVALID, chat(png(65500, 65500, LITTLE), "x"), {}
    yield "picture that says more than it has", INVALID, chat(png(1000, 1000, LITTLE), "x"), {}
    yield "corrupt video", INVALID, chat(Video(bytes(example("moving.mp4"))[:600]), "x"), {}
    yield "picture as a video", INVALID, chat(Video(b"\0" * 5000), "x"), {}
    yield "unknown role", INVALID, pb.Prompt(chat=pb.ChatPrompt(messages=[pb.Message(
        role="tool", parts=[pb.ContentPart(text="x")])])), {}
    yield "no role", INVALID, pb.Prompt(chat=pb.ChatPrompt(messages=[pb.Message(
        parts=[pb.ContentPart(text="x")])])), {}
    yield "too long a prompt", INVALID, chat("word " * 20000), {}
    yield "too many tiles", INVALID, chat(*many, "x"), {}
    yield "too many pictures", INVALID, chat(*[Picture(picture)] * 100, "x"), {}
    yield "no prompt", INVALID, pb.Prompt(), {}
    yield "no messages", INVALID, pb.Prompt(chat=pb.ChatPrompt()), {}
    yield "no tokens", INVALID, pb.Prompt(tokens=pb.TokenPrompt()), {}
    yield "an empty part", INVALID, pb.Prompt(chat=pb.ChatPrompt(messages=[pb.Message(
        role="user", parts=[pb.ContentPart()])])), {}
    yield "token outside the vocabulary", INVALID, pb.Prompt(tokens=pb.TokenPrompt(token_ids=[1, 99999])), {}
    yield "image tokens without as many features", INVALID, pb.Prompt(tokens=pb.TokenPrompt(
        token_ids=[1, 1016, 2], pixel_values=pb.Tensor(shape=[1, 3, 112, 112], dtype="float32",
                                                       data=bytes(4 * 3 * 112 * 112)))), {}
    yield "tensor whose bytes do not fit its shape", INVALID, pb.Prompt(tokens=pb.TokenPrompt(
        token_ids=[1016] * 16, pixel_values=pb.Tensor(shape=[1, 3, 112, 112], dtype="float32", data=b"1234"))), {}
    yield "prompt_logprobs of inputs_embeds", INVALID, pb.Prompt(tokens=pb.TokenPrompt(inputs_embeds=pb.Tensor(
        shape=[1, WIDTH], dtype="float32", data=bytes(4 * WIDTH)))), {"prompt_logprobs": 1}
    for what, ids, shape, values in (("of another width", [], [2, 3], [0.0] * 6), ("beside ids", [1], [1, 1], [0.0]),
                                     ("without rows", [], [0, WIDTH], []), ("cut short", [], [2, WIDTH], [0.0]),
                                     ("not finite", [], [1, WIDTH], [math.nan] * WIDTH),
                                     ("too many", [], [2**62, WIDTH], [0.0])):
        yield f"inputs_embeds {what}", INVALID, pb.Prompt(tokens=pb.TokenPrompt(token_ids=ids, inputs_embeds=pb.Tensor(
            shape=shape, dtype="float32", data=struct.pack(f"<{len(values)}f", *values)))), {}
    yield "literal <IMG_CONTEXT>", INVALID, chat("what is <IMG_CONTEXT> here?"), {}
    yield "literal <video>", INVALID, chat("what is <video> here?"), {}
    text = chat("x")
    for name, value in (("n", 0), ("n", 17), ("temperature", -1.0), ("temperature", math.nan),
                        ("temperature", math.inf), ("top_p", 0.0), ("top_p", 1.5), ("top_p", math.nan),
                        ("min_p", -0.1), ("repetition_penalty", 0.0), ("repetition_penalty", math.nan),
                        ("presence_penalty", 3.0), ("frequency_penalty", -math.inf), ("max_tokens", 0),
                        ("max_tokens", 100000), ("max_tokens", 2**32 - 1), ("min_tokens", 100000),
                        ("logprobs", 1000), ("prompt_logprobs", 21), ("stop", [""]), ("stop", ["x"] * 1000),
                        ("stop_token_ids", [99999]), ("stop_token_ids", list(range(1000)))):
        shown = value if not isinstance(value, list) or len(value) < 3 else f"{len(value)} of them"
        sampling = {name: value, **({"temperature": 1.0} if name == "n" else {})}
        yield f"{name} {shown}", INVALID, text, sampling
    yield "logit_bias of an unknown token", INVALID, text, {"logit_bias": [pb.LogitBias(token_id=99999, bias=1)]}
    yield "logit_bias NaN", INVALID, text, {"logit_bias": [pb.LogitBias(token_id=1, bias=math.nan)]}
    yield "logit_bias of too many", INVALID, text, {"logit_bias": [pb.LogitBias(token_id=1, bias=1)] * 5000}
    yield "a 100 MB message", Code.RESOURCE_EXHAUSTED, chat(Picture(bytes(100 << 20)), "x"), {}


class Healthy(threading.Thread):
    """A stream on a connection of its own, running while the error happens."""

    def __init__(self, address):
        super().__init__()
        self.client, self.answer, self.error = Client(address), None, None
        self.started = threading.Event()

    def run(self):
        try:
            prompt = chat(example("scene-three.png"), "Describe the image.")
            self.started.set()
            self.answer = self.client.generate(prompt, max_tokens=100, ignore_eos=True, logprobs=2)
        except grpc.RpcError as error:
            self.error = error
        finally:
            self.client.close()


class Errors(DaemonTest):
    def beside_a_stream(self, function):
        healthy = Healthy(self.daemon.address)
        healthy.start()
        healthy.started.wait()
        try:
            function()
        finally:
            healthy.join()
        self.assertIsNone(healthy.error)
        bits = healthy.answer.bits()
        expected = self.__class__.__dict__.get("expected") or bits
        self.__class__.expected = expected
        self.assertEqual(bits, expected, "the stream beside it changed")

    def test_table(self):
        client = Client(self.daemon.address)
        for name, code, prompt, sampling in cases():
            with self.subTest(name):
                def bad():
                    with self.assertStatus(code) as caught:
                        client.generate(prompt, **sampling)
                    print(f"  {name}: {code.name}: {caught.exception.details()[:150]}", flush=True)
                self.beside_a_stream(bad)
        client.close()
        self.client.wait_idle()

    def test_bytes_that_are_no_message(self):
        """What a Python client would not send: invalid UTF-8, NUL, garbage, a cut message."""
        def call(data):
            method = self.client.channel.unary_stream(f"/{SERVICE}/Generate", request_serializer=lambda x: x,
                                                      response_deserializer=pb.GenerateResponse.FromString)
            return list(method(data, timeout=60))

        good = pb.GenerateRequest(prompt=chat(f"a {MARKER} b")).SerializeToString()
        role = pb.GenerateRequest(prompt=pb.Prompt(chat=pb.ChatPrompt(messages=[pb.Message(
            role=MARKER, parts=[pb.ContentPart(text="x")])]))).SerializeToString()
        identifier = pb.GenerateRequest(request_id=MARKER, prompt=chat("x")).SerializeToString()
        marker = MARKER.encode()
        million = pb.GenerateRequest(prompt=pb.Prompt(chat=pb.ChatPrompt(messages=[pb.Message()] * 1000000)))
        million = million.SerializeToString()
        self.assertTrue(call(good))
        for name, data in (("invalid UTF-8", good.replace(marker, b"\xff\xfe\xfd\xfc")),
                           ("a surrogate", good.replace(marker, b"\xed\xa0\x80x")),
                           ("a cut character", good.replace(marker, b"xx\xe4\xbd")),
                           ("NUL in the text", good.replace(marker, b"x\0yz")),
                           ("NUL in the role", role.replace(marker, b"user"[:3] + b"\0")),
                           ("NUL in the id", identifier.replace(marker, b"ab\0c")),
                           ("garbage", b"\xff" * 100),
                           ("a cut message", good[:-3]),
                           ("a group", b"\x0b" * 50),
                           ("a million empty messages", million)):
            with self.subTest(name):
                def bad():
                    with self.assertRaises(grpc.RpcError) as caught:
                        call(data)
                    self.assertIn(caught.exception.code(), (INVALID, Code.RESOURCE_EXHAUSTED))
                    print(f"  {name}: {caught.exception.code().name}: {caught.exception.details()[:150]}", flush=True)
                self.beside_a_stream(bad)

    def test_unknown_method(self):
        for path in (f"/{SERVICE}/Nope", "/nobody.v1.Nothing/Call", "/"):
            with self.subTest(path):
                def bad():
                    with self.assertStatus(Code.UNIMPLEMENTED):
                        self.client.channel.unary_unary(path)(b"", timeout=30)
                self.beside_a_stream(bad)

    def test_other_calls(self):
        """Forward and Tokenize refuse as Generate does."""
        prompt = chat("hello")
        token_prompt = pb.Prompt(tokens=pb.TokenPrompt(token_ids=[1, 2, 3]))
        forward = [("unknown output", prompt, dict(outputs=["weights"])),
                   ("vision output without a picture", prompt, dict(outputs=["image_features"])),
                   ("too few labels", token_prompt, dict(labels=[1])),
                   ("a label outside the vocabulary", token_prompt, dict(labels=[1, 2, 99999])),
                   ("a position outside the prompt", token_prompt, dict(outputs=["logits"], logits_positions=[3]))]
        for name, bad_prompt, fields in forward:
            with self.subTest(name), self.assertStatus(INVALID):
                self.client.forward(bad_prompt, **fields)
        with self.assertStatus(INVALID):
            self.client.tokenize()
        with self.assertStatus(INVALID):
            self.client.tokenize(token_ids=pb.TokenIds(ids=[99999]))
        with self.assertStatus(INVALID):
            self.client.tokenize(chat=pb.ChatPrompt(messages=[user(Picture(b"no"), "x")]))
        for identifier in ("x" * 65, "a b", "ä"):
            with self.subTest(identifier), self.assertStatus(INVALID):
                list(self.client.start(prompt, request_id=identifier))


if __name__ == "__main__":
    main()
