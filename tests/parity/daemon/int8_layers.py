"""--activation-quantization int8, layer by layer, against Transformers' own layers with weights and inputs rounded.

Each linear of the demo model in PyTorch gets the values of --quantization as its weight, and its input rounded as
kernels/quantized.h says; attention rounds queries, keys, values and e^(score - m) to bfloat16, as the daemon's does. A
layer's input is what the daemon had there, because where two computations round a number to different codes, what
follows has the noise of rounding itself: whole models in float32 and in float64 are as far apart as with and without
the rounding. Of one layer's output the error is asked to be less than a quarter of what the rounding does to it, and
less than if whole rows had one scale where lanes have their own (o_proj, down_proj).
Skipped (status 77) where one of the packages is missing.
"""

import importlib.util
import sys

import numpy

import daemon
from support import SANITIZED, Client, chat, example

SKIPPED = 77
NEEDED = ("torch", "torchvision", "transformers", "PIL")
MOST = 0.25
LANES = {"o_proj": [32] * 8, "down_proj": [64] * 4 + [32] * 4}  # lanes_of_heads(), lanes_of_columns()
IN_BFLOAT16 = ("down_proj", "fc2")  # inputs that are kept so, with or without the rounding
OUTPUTS = ("vision.hidden_states", "image_features", "hidden_states", "last_hidden_state", "logits")


def bfloat16(x):
    return x.bfloat16().to(x.dtype)


def int8(x):
    """Every row of x, to codes of a scale of its own and back."""
    import torch

    scale = x.abs().amax(-1, keepdim=True) / 127
    return torch.where(scale < 2 ** -126, 0, torch.round(x / scale.clamp(2 ** -126)) * scale)


def int4(w, group=128):
    """--quantization int4."""
    import torch

    groups = w.reshape(len(w), -1, group)
    scale = groups.gather(2, groups.abs().argmax(2, keepdim=True)) / -8
    return (torch.round(groups / scale).clamp(max=7) * scale).reshape(w.shape)


def attention(module, q, k, v, mask, scaling, **_):
    import torch

    q, k, v = bfloat16(q), bfloat16(k), bfloat16(v)
    shared = q.shape[1] // k.shape[1]
    scores = q @ k.repeat_interleave(shared, 1).transpose(2, 3) * scaling
    if mask is not None:
        scores = scores + mask
    p = torch.exp(scores - scores.amax(-1, keepdim=True))
    out = bfloat16(p) @ v.repeat_interleave(shared, 1) / p.sum(-1, keepdim=True)
    return out.transpose(1, 2).contiguous(), None


class Reference:
    """Transformers' layers; `inputs` is how those of linears are rounded: "lanes", "rows" or "bfloat16"."""

    def __init__(self, weights):
        import torch
        import transformers

        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        transformers.AttentionInterface.register("as_the_daemon", attention)
        self.model = transformers.AutoModelForImageTextToText.from_pretrained(
            daemon.DEMO_MODEL, dtype=torch.float32, attn_implementation="as_the_daemon").eval()
        self.inputs = "lanes"
        for name, linear in self.model.named_modules():
            if isinstance(linear, torch.nn.Linear):
                of_groups = weights == "int4" and ".layers." in name
                linear.weight.data = (int4 if of_groups else int8)(linear.weight.data)
                linear.register_forward_pre_hook(lambda _, x, name=name.split(".")[-1]: (self.rounded(name, x[0]),))

    def rounded(self, name, x):
        import torch

        if self.inputs == "bfloat16" or name in IN_BFLOAT16:
            x = bfloat16(x)
        if self.inputs == "bfloat16":
            return x
        lanes = LANES.get(name) if self.inputs == "lanes" else None
        return torch.cat([int8(lane) for lane in x.split(lanes or x.shape[-1], -1)], -1)

    def vision_layer(self, i, x):
        return self.model.model.vision_tower.encoder.layer[i](x)

    def projector(self, x):
        model = self.model.model
        side = int((x.shape[1] - 1) ** 0.5)
        patches = x[:, 1:].reshape(len(x), side, side, -1)
        return model.multi_modal_projector(model.pixel_shuffle(patches, model.config.downsample_ratio).flatten(1, 2))

    def language_layer(self, i, x):
        """The last one's with the norm that follows, as hidden_states have it."""
        import torch

        language = self.model.model.language_model
        n = x.shape[1]
        mask = torch.full((1, 1, n, n), -torch.inf).triu(1)
        positions = torch.arange(n)[None]
        x = language.layers[i](x, attention_mask=mask, position_ids=positions,
                               position_embeddings=language.rotary_emb(x, positions))
        x = x[0] if isinstance(x, tuple) else x
        return language.norm(x) if i == len(language.layers) - 1 else x

    def lm_head(self, x):
        return self.model.lm_head(x)


def steps(reference, ours):
    """(what, function of its input, input, output) of every layer, as the daemon had them."""
    import torch

    got = {name: torch.tensor(x) for name, x in ours.items()}
    found = []
    for prefix, layer in (("vision.", reference.vision_layer), ("", reference.language_layer)):
        n = sum(x.startswith(f"{prefix}hidden_states.") for x in got) - 1
        x = [got[f"{prefix}hidden_states.{i}"] for i in range(n + 1)]
        x = [y if y.dim() == 3 else y[None] for y in x]
        found += [(f"{prefix}layer {i}", lambda y, i=i, layer=layer: layer(i, y), x[i], x[i + 1]) for i in range(n)]
        if prefix:
            features = got["image_features"]
            found.append(("projector", reference.projector, x[n], features.reshape(len(x[n]), -1, features.shape[-1])))
    return found + [("lm_head", reference.lm_head, got["last_hidden_state"], got["logits"])]


def check(weights):
    """What was wrong."""
    import torch

    with daemon.Daemon(dtype="bfloat16", extra=("--device", "cpu", "--quantization", weights,
                                                "--activation-quantization", "int8")) as d:
        client = Client(d.address)
        ours = client.forward(chat(example("scene-two.png"), "Describe the image."), OUTPUTS)[0]
        client.close()
    reference, failures = Reference(weights), []
    for what, layer, x, y in steps(reference, ours):
        error = {}
        with torch.no_grad():
            for reference.inputs in ("bfloat16", "rows", "lanes"):
                out = layer(x).reshape(y.shape)
                error[reference.inputs] = float((out - y).square().mean().sqrt())
        of_change, has_lanes = error["lanes"] / error["bfloat16"], what.startswith("layer")
        good = of_change <= MOST and (not has_lanes or error["lanes"] < error["rows"] / 2)
        failures += [] if good else [f"{weights}: {what}"]
        rows = f", with scales of whole rows {error['rows']:.2e}" if has_lanes else ""
        print(f"  {weights}, {what}: {error['lanes']:.2e} from Transformers' (root mean square){rows}, without rounded "
              f"inputs {error['bfloat16']:.2e}: {of_change:.3f} of it{'' if good else '  FAILED'}", flush=True)
    return failures


def main():
    missing = [x for x in NEEDED if importlib.util.find_spec(x) is None]
    if missing or SANITIZED:
        print(f"skipped: {f'python module {missing[0]} is not installed' if missing else 'the release build runs it'}")
        return SKIPPED
    failures = [x for weights in ("int8", "int4") for x in check(weights)]
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
