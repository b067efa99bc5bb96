"""Weights of fewer bits on the CUDA back end, emulated or real, beside the CPU in the same daemon: tokens,
log-probabilities.

    daemon_quantized.py [METHOD]... [--OPTION of internvld]...

In float32 both hold the same values and sum in different orders; the CPU is held to Transformers elsewhere. In bfloat16
CUDA rounds values that the CPU does not (kernels/quantized.h), so that only nearness is asked. T=2 gives the bits of
T=1 in both: of products with dense values, and of codes; its ranks read and pack with three threads. Text
alone: emulated threads are slow.
"""

import sys

import daemon
from support import Client, pb, position_bits

OPTIONS = [x for x in sys.argv[1:] if x.startswith("--")]
METHODS = [x for x in sys.argv[1:] if x not in OPTIONS] or ["int4"]  # every format: cuda_op_test
MODEL = daemon.ROOT / "tests/data/reference/checkpoints/ln-1b-style"
PROMPT = pb.Prompt(tokens=pb.TokenPrompt(token_ids=[5 + 31 * i % 900 for i in range(16)]))
# As logits against Transformers; in bfloat16 the CPU itself is 0.08 from its float32 here.
LOGPROB_ABS = {"float32": 1e-4, "bfloat16": 0.2}


def ask(method, dtype, device, tensor, threads):
    with daemon.Daemon(model=MODEL, dtype=dtype, tensor=tensor, extra=(
            "--quantization", method, "--device", device, "--deterministic", "--max-num-seqs", 2, "--max-model-len", 64,
            "--threads", threads, *OPTIONS)) as d:
        client = Client(d.address)
        reply = client.generate(PROMPT, timeout=300, temperature=0, max_tokens=3, prompt_logprobs=1)
        client.close()
    return reply


def check(method, dtype):
    """The failures of one method and type, as text."""
    cpu, cuda, shards = (ask(method, dtype, *x) for x in (("cpu", 1, 1), ("cuda", 1, 1), ("cuda", 2, 3)))
    error = max(abs(a.chosen.logprob - b.chosen.logprob)
                for a, b in zip(cpu.prompt_logprobs, cuda.prompt_logprobs, strict=True))
    print(f"  {method} {dtype}: {cuda.ids}, largest difference of {len(cpu.prompt_logprobs)} log-probabilities {error:.1e}",
          flush=True)
    if dtype == "float32" and cuda.ids != cpu.ids:
        yield f"{method} {dtype}: {cuda.ids} instead of {cpu.ids}"
    if error > LOGPROB_ABS[dtype]:
        yield f"{method} {dtype}: log-probabilities differ by {error}"
    if shards.ids != cuda.ids or position_bits(shards.prompt_logprobs) != position_bits(cuda.prompt_logprobs):
        yield f"{method} {dtype}: T=2 has not the bits of T=1"


def main():
    failures = [failure for method in METHODS for dtype in LOGPROB_ABS for failure in check(method, dtype)]
    for failure in failures:
        print("FAILED", failure)
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
