"""Weights of fewer bits on the CUDA back end, emulated or real, beside the CPU in the same daemon: tokens,
log-probabilities.

    daemon_quantized.py [METHOD]... [--OPTION of internvld]...

Both hold the same values and sum in float32 in different orders; the CPU is held to Transformers elsewhere. T=2 gives
the bits of T=1. Text alone: emulated threads are slow.
"""

import sys

import daemon
from support import Client, pb, position_bits

OPTIONS = [x for x in sys.argv[1:] if x.startswith("--")]
METHODS = [x for x in sys.argv[1:] if x not in OPTIONS] or ["int4"]  # every format: cuda_op_test, bit for bit
MODEL = daemon.ROOT / "tests/data/reference/checkpoints/ln-1b-style"
PROMPT = pb.Prompt(tokens=pb.TokenPrompt(token_ids=[5 + 31 * i % 900 for i in range(16)]))
LOGPROB_ABS = 1e-4  # as logits against Transformers


def ask(method, device, tensor):
    with daemon.Daemon(model=MODEL, dtype="float32", tensor=tensor, extra=(
            "--quantization", method, "--device", device, "--deterministic", "--max-num-seqs", 2, "--max-model-len", 64,
            *OPTIONS)) as d:
        client = Client(d.address)
        reply = client.generate(PROMPT, timeout=300, temperature=0, max_tokens=3, prompt_logprobs=1)
        client.close()
    return reply


def main():
    failures = []
    for method in METHODS:
        cpu, cuda, shards = ask(method, "cpu", 1), ask(method, "cuda", 1), ask(method, "cuda", 2)
        error = max(abs(a.chosen.logprob - b.chosen.logprob)
                    for a, b in zip(cpu.prompt_logprobs, cuda.prompt_logprobs, strict=True))
        print(f"  {method}: {cuda.ids}, largest difference of {len(cpu.prompt_logprobs)} log-probabilities {error:.1e}",
              flush=True)
        if cuda.ids != cpu.ids:
            failures.append(f"{method}: {cuda.ids} instead of {cpu.ids}")
        if error > LOGPROB_ABS:
            failures.append(f"{method}: log-probabilities differ by {error}")
        if shards.ids != cuda.ids or position_bits(shards.prompt_logprobs) != position_bits(cuda.prompt_logprobs):
            failures.append(f"{method}: T=2 has not the bits of T=1")
    for failure in failures:
        print("FAILED", failure)
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
