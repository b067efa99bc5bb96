"""Calls as such: cancel, deadline, health, reflection, slow and silent readers, many at once, drain."""

import threading
import time

import grpc
from google.protobuf import descriptor_pool, message_factory
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

import daemon
from support import Answer, Client, Code, DaemonTest, SANITIZED, SERVICE, at_once, chat, example, main, pb, unittest

LONG = {"": 3500, "thread": 2000}.get(SANITIZED, 1000)  # tokens: enough that there is time for things to happen


def start_long(client, n_tokens=LONG, **fields):
    return client.start(chat("What is the opposite of old?"), max_tokens=n_tokens, ignore_eos=True, **fields)


class Calls(DaemonTest):
    def full_run_s(self):
        """How long one long stream takes when nobody stops it."""
        if not hasattr(Calls, "_full_run_s"):
            start = time.monotonic()
            self.assertEqual(sum(len(e.delta.token_ids) for e in start_long(self.client)), LONG)
            Calls._full_run_s = time.monotonic() - start
        return Calls._full_run_s

    def assert_freed(self, what):
        took, full = self.client.wait_idle(), self.full_run_s()
        print(f"  {what}: slots free after {1000 * took:.1f} ms (a whole run: {1000 * full:.0f} ms)", flush=True)
        self.assertLess(took, full / 2, "the slots were not freed, the streams just ended")

    def test_cancel(self):
        self.full_run_s()
        calls = [start_long(self.client) for _ in range(4)]
        for call in calls:
            for event in call:
                if event.WhichOneof("event") == "delta":
                    break
        self.assertEqual(self.client.model().load.running, 4)
        for call in calls:
            call.cancel()
        self.assert_freed("cancel")
        for call in calls:
            with self.assertRaises(grpc.RpcError) as caught:
                list(call)
            self.assertEqual(caught.exception.code(), Code.CANCELLED)

    def test_cancel_before_the_first_token(self):
        self.full_run_s()
        for delay in (0, 0.001, 0.005, 0.02):
            calls = [self.client.start(chat(example("scene-four.png"), "Describe the image."), max_tokens=1000,
                                       ignore_eos=True) for _ in range(3)]
            time.sleep(delay)
            for call in calls:
                call.cancel()
        self.assert_freed("cancel before the first token")

    def test_connection_lost(self):
        self.full_run_s()
        other = Client(self.daemon.address)
        call = start_long(other)
        next(call), next(call)
        other.close()
        self.assert_freed("connection lost")

    def test_deadline(self):
        full = self.full_run_s()
        calls = [start_long(self.client, timeout=full / 10) for _ in range(4)]
        for call in calls:
            with self.assertRaises(grpc.RpcError) as caught:
                list(call)
            self.assertEqual(caught.exception.code(), Code.DEADLINE_EXCEEDED)
        self.assert_freed("deadline")
        with self.assertStatus(Code.DEADLINE_EXCEEDED):
            list(start_long(self.client, timeout=0.0001))
        self.assert_freed("deadline before the start")

    def test_health(self):
        stub = health_pb2_grpc.HealthStub(self.client.channel)
        for service in ("", SERVICE):
            reply = stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=30)
            self.assertEqual(reply.status, health_pb2.HealthCheckResponse.SERVING)
        with self.assertStatus(Code.NOT_FOUND):
            stub.Check(health_pb2.HealthCheckRequest(service="nobody"), timeout=30)
        watch = stub.Watch(health_pb2.HealthCheckRequest(), timeout=30)
        self.assertEqual(next(watch).status, health_pb2.HealthCheckResponse.SERVING)
        watch.cancel()
        watch = stub.Watch(health_pb2.HealthCheckRequest(service="nobody"), timeout=30)
        self.assertEqual(next(watch).status, health_pb2.HealthCheckResponse.SERVICE_UNKNOWN)
        watch.cancel()

    def test_reflection(self):
        """A client that has no .proto: lists services, resolves types, makes a call."""
        database = ProtoReflectionDescriptorDatabase(self.client.channel)
        self.assertLessEqual({SERVICE, "grpc.health.v1.Health"}, set(database.get_services()))
        pool = descriptor_pool.DescriptorPool(database)
        request = pool.FindMessageTypeByName("internvl.v1.GenerateRequest")
        self.assertEqual([f.name for f in request.fields], [f.name for f in pb.GenerateRequest.DESCRIPTOR.fields])
        sampling = pool.FindMessageTypeByName("internvl.v1.SamplingParams")
        self.assertTrue(sampling.fields_by_name["temperature"].has_presence)
        service = pool.FindServiceByName(SERVICE)
        methods = {m.name for m in service.methods}
        self.assertEqual(methods, set(pb.DESCRIPTOR.services_by_name["InferenceService"].methods_by_name))
        self.assertLessEqual({"Generate", "Forward", "Tokenize", "GetModel"}, methods)
        method = service.methods_by_name["GetModel"]
        ask, answer = (message_factory.GetMessageClass(x) for x in (method.input_type, method.output_type))
        call = self.client.channel.unary_unary(f"/{SERVICE}/GetModel", request_serializer=ask.SerializeToString,
                                               response_deserializer=answer.FromString)
        self.assertEqual(call(ask(), timeout=30).vocab_size, 1024)

    def test_model(self):
        m = self.client.model()
        self.assertEqual((m.vocab_size, m.text_layers, m.vision_layers), (1024, 4, 4))
        self.assertEqual(m.kv_cache_dtype, m.dtype)
        self.assertEqual((m.tile_height, m.tile_width, m.tokens_per_tile), (112, 112, 16))
        self.assertEqual([r.rank for r in m.ranks], list(range(len(m.ranks))))
        self.assertEqual(len(m.ranks), 1 + m.vision_ranks + m.tensor_parallel_size * m.pipeline_parallel_size)
        self.assertEqual(m.ranks[0].role, "gateway")
        self.assertEqual(m.ranks[0].scratch_bytes, 256 << 20)  # the vision cache
        for rank in m.ranks[1:]:
            self.assertGreater(rank.weight_bytes, 0, rank.role)
        for field in pb.Limits.DESCRIPTOR.fields:
            self.assertGreater(getattr(m.limits, field.name), 0, field.name)

    def test_slow_reader(self):
        """A client that sleeps holds nobody up, and loses nothing."""
        whole = self.client.generate(chat("What is the opposite of old?"), max_tokens=LONG, ignore_eos=True)
        slow, answer = start_long(self.client), Answer()
        answer.add(next(slow))
        self.client.generate(chat("Write rat in capital letters."))
        self.client.wait_idle()  # the engine finished although nobody reads
        for event in slow:
            answer.add(event)
        self.assertEqual(answer.text, whole.text)
        self.assertEqual(answer.ids, whole.ids)

    def test_unread_streams(self):
        calls = [start_long(self.client, timeout=300) for _ in range(40)]
        other = Client(self.daemon.address)
        self.assertEqual(other.generate(chat("Write rat in capital letters.")).text, "RAT")
        self.assertEqual(self.client.generate(chat("Write rat in capital letters.")).text, "RAT")
        for call in calls:
            call.cancel()
        other.close()
        self.client.wait_idle()

    def test_64_at_once(self):
        letters = [chr(ord("a") + i % 26) for i in range(64)]

        def ask(x):
            return self.client.generate(chat(f"Write {x}at in capital letters."), logprobs=2).bits()

        alone = {x: ask(x) for x in set(letters)}
        answers = at_once([lambda x=x: ask(x) for x in letters])
        for x, a in zip(letters, answers):
            self.assertEqual(a, alone[x])

    def test_forward_and_generate_together(self):
        prompt = chat(example("scene-two.png"), "Describe the image.")
        reference, done = self.client.forward(prompt, ["logits", "image_features"], logits_to_keep=4)
        answer = self.client.generate(prompt).text
        results = at_once([lambda: self.client.forward(prompt, ["logits", "image_features"], logits_to_keep=4),
                           lambda: self.client.generate(prompt)] * 4)
        for result in results:
            if isinstance(result, Answer):
                self.assertEqual(result.text, answer)
            else:
                for name, value in reference.items():
                    self.assertEqual(value.tobytes(), result[0][name].tobytes(), name)
                self.assertEqual(result[1].token_ids, done.token_ids)


class Drain(unittest.TestCase):
    """SIGTERM: what runs finishes, what comes late is turned away, the status is 0."""

    def test_drain(self):
        n_tokens = 300 if SANITIZED else 1000
        d = daemon.Daemon(tensor=2, extra=("--drain-timeout", 600))
        client = Client(d.address)
        stub = health_pb2_grpc.HealthStub(client.channel)
        watch = stub.Watch(health_pb2.HealthCheckRequest())
        self.assertEqual(next(watch).status, health_pb2.HealthCheckResponse.SERVING)
        whole = client.generate(chat("What is the opposite of old?"), max_tokens=n_tokens, ignore_eos=True)
        answers, first = [Answer() for _ in range(4)], threading.Barrier(5)

        def read(answer):
            waited = False
            for event in start_long(client, n_tokens=n_tokens):
                answer.add(event)
                if answer.n_deltas and not waited:
                    first.wait(60)
                    waited = True

        threads = [threading.Thread(target=read, args=(a,)) for a in answers]
        for t in threads:
            t.start()
        first.wait(60)
        d.terminate()
        self.assertEqual(next(watch).status, health_pb2.HealthCheckResponse.NOT_SERVING)
        late = Client(d.address)
        for late_client in (late, client):
            with self.assertRaises(grpc.RpcError) as caught:
                late_client.generate(chat("Write rat in capital letters."), timeout=30)
            self.assertEqual(caught.exception.code(), Code.UNAVAILABLE, caught.exception.details())
        for t in threads:
            t.join(120)
        for a in answers:
            self.assertIsNotNone(a.done, f"a running stream did not finish\n{d.log()}")
            self.assertEqual(a.ids, whole.ids)
        self.assertEqual(d.wait(), 0, d.log())
        self.assertEqual(d.processes(), {})
        client.close(), late.close()

    def test_idle(self):
        d = daemon.Daemon()
        d.terminate()
        self.assertEqual(d.wait(), 0, d.log())
        self.assertEqual(d.processes(), {})


if __name__ == "__main__":
    main()
