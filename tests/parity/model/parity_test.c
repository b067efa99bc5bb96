/*
 * Every hidden state, feature, logit and loss of the reference checkpoints, in float32, through
 * vision_forward() and language_forward() in one process.
 *
 * Tolerances are the reference's (its README): hidden states and features 1e-4, logits 5e-4, loss
 * 1e-4; then the logits again with bfloat16 weights. Prints the largest error of each kind for each
 * checkpoint.
 */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "daemon/model/device.h"
#include "kernels/log.h"
#include "tests/parity/model/model_run.h"
#include "tests/parity/model/reference.h"

enum kind { KIND_VISION, KIND_FEATURES, KIND_HIDDEN, KIND_LOGITS, KIND_LOSS, N_KINDS };
static const char *const kind_names[N_KINDS] = {"vision", "features", "hidden", "logits", "loss"};
static const double tolerances[N_KINDS] = {1e-4, 1e-4, 1e-4, 5e-4, 1e-4};

static struct backend *backends[2]; // [DTYPE_F32, DTYPE_BF16] of all checkpoints

struct check {
    const char *name; // of the checkpoint
    double worst[N_KINDS];
    double bf16_worst, bf16_mean; // of the logits, with bfloat16 weights
    int n_compared, n_failed;
};

static void record(struct check *c, enum kind kind, const char *what, double error)
{
    c->n_compared++;
    if (!(error <= c->worst[kind]))
        c->worst[kind] = error;
    if (error <= tolerances[kind])
        return;
    c->n_failed++;
    printf("  %s: %s differs by %.3g, %.3g is allowed\n", c->name, what, error, tolerances[kind]);
}

/* Compares captures NAME of owners 0 … n_owners - 1 with golden GOLDEN, if the file has it. */
static void compare(struct check *c, enum kind kind, const struct capture_list *l, const char *name,
                    int n_owners, const struct safetensors *golden, const char *golden_name)
{
    int64_t n = 0, at = 0;
    float *expected = golden_floats(golden, golden_name, &n);
    double worst = 0;
    if (!expected)
        return;
    for (int i = 0; i < n_owners; i++) {
        int32_t n_rows = 0, n_cols = 0;
        float *x = join_captures(l, name, i, &n_rows, &n_cols);
        int64_t size = (int64_t)n_rows * n_cols;
        double d = x && at + size <= n ? largest_difference(x, expected + at, size) : INFINITY;
        worst = d > worst ? d : worst;
        at += size;
        free(x);
    }
    record(c, kind, golden_name, at == n ? worst : INFINITY);
    free(expected);
}

static void compare_list(struct check *c, const struct capture_list *l, int n_owners,
                         const struct safetensors *golden, enum kind kind, const char *prefix,
                         const char *const *names)
{
    char name[CAPTURE_NAME_MAX];
    for (int i = 0; names[i]; i++) {
        snprintf(name, sizeof(name), "%s%s", prefix, names[i]);
        compare(c, kind, l, name, n_owners, golden, names[i]);
    }
}

static void check_interpolated(struct check *c, struct model_run *r,
                               const struct safetensors *golden)
{
    static const char *const sizes[] = {"larger", "ragged", "rect", "smaller", "swap"};
    for (size_t i = 0; i < sizeof(sizes) / sizeof(sizes[0]); i++) {
        char name[64];
        int64_t n = 0;
        struct capture_list captures = {0};
        snprintf(name, sizeof(name), "interp.%s.pixel_values", sizes[i]);
        const struct safetensors_tensor *t = safetensors_find(golden, name);
        float *pixels = golden_floats(golden, name, &n);
        if (!t)
            continue;
        struct tile_batch tiles = {.n_tiles = 1,
                                   .channels = (int32_t)t->shape[1],
                                   .height = (int32_t)t->shape[2],
                                   .width = (int32_t)t->shape[3],
                                   .captures = VISION_CAPTURE_HIDDEN_STATES,
                                   .pixels = pixels};
        int n_features = model_config_n_features(&r->config, tiles.height, tiles.width);
        float *features =
            xcalloc((size_t)(n_features * r->config.text.hidden_size) + 1, sizeof(float));
        vision_forward(&r->vision, &tiles, features, &captures);
        snprintf(name, sizeof(name), "interp.%s.embeddings", sizes[i]);
        compare(c, KIND_VISION, &captures, "vision.hidden_states.0", 1, golden, name);
        snprintf(name, sizeof(name), "interp.%s.last_hidden_state", sizes[i]);
        compare(c, KIND_VISION, &captures, "vision.last_hidden_state", 1, golden, name);
        capture_release(&captures);
        free(features);
        free(pixels);
    }
}

/* The tower and the projector on the golden's tiles; returns their features. */
static float *encode(struct model_run *r, const struct safetensors *vision, uint32_t wanted,
                     struct capture_list *captures, int32_t *n_tiles)
{
    int64_t n = 0;
    const struct safetensors_tensor *t = safetensors_find(vision, "pixel_values");
    float *pixels = golden_floats(vision, "pixel_values", &n);
    struct tile_batch tiles = {.n_tiles = (int32_t)t->shape[0],
                               .channels = (int32_t)t->shape[1],
                               .height = (int32_t)t->shape[2],
                               .width = (int32_t)t->shape[3],
                               .captures = wanted,
                               .pixels = pixels};
    float *features = xcalloc((size_t)tiles.n_tiles * (size_t)r->config.n_features_per_tile *
                                  (size_t)r->config.text.hidden_size,
                              sizeof(float));
    vision_forward(&r->vision, &tiles, features, captures);
    free(pixels);
    *n_tiles = tiles.n_tiles;
    return features;
}

/* What encode() computes, point by point; returns the features. */
static float *check_vision(struct check *c, struct model_run *r, const char *dir,
                           const char *goldens)
{
    static const char *const parts[] = {"embed.patches",     "layer0.layernorm_before",
                                        "layer0.q_proj",     "layer0.k_proj",
                                        "layer0.v_proj",     "layer0.q_norm",
                                        "layer0.k_norm",     "layer0.attention_output",
                                        "last_hidden_state", NULL};
    static const char *const steps[] = {"selected", "pixel_shuffled", "layer_norm", "linear_1",
                                        NULL};
    struct safetensors vision, projector;
    struct capture_list captures = {0};
    int64_t n = 0;
    int32_t n_tiles;
    char name[CAPTURE_NAME_MAX];
    golden_open(&vision, dir, goldens, "vision");
    golden_open(&projector, dir, goldens, "projector");
    float *features = encode(r, &vision, 15, &captures, &n_tiles);
    compare_list(c, &captures, n_tiles, &vision, KIND_VISION, "vision.", parts);
    compare_list(c, &captures, n_tiles, &projector, KIND_FEATURES, "projector.", steps);
    for (int i = 0; i <= r->config.vision.n_layers; i++) {
        snprintf(name, sizeof(name), "vision.hidden_states.%d", i);
        compare(c, KIND_VISION, &captures, name, n_tiles, &vision, name + 7);
        snprintf(name, sizeof(name), "vision.attentions.%d", i);
        compare(c, KIND_VISION, &captures, name, 1, &vision, name + 7);
    }
    float *expected = golden_floats(&projector, "image_features", &n);
    record(c, KIND_FEATURES, "image_features", largest_difference(features, expected, n));
    check_interpolated(c, r, &vision);
    free(expected);
    capture_release(&captures);
    safetensors_release(&projector);
    safetensors_release(&vision);
    return features;
}

static void check_loss(struct check *c, const struct safetensors *golden, const char *dir,
                       const char *goldens, const int32_t *ids, int64_t n,
                       const struct token_logprob *scored)
{
    int64_t n_labels = 0, n_nll = 0;
    int64_t *labels = golden_ints(golden, "labels", &n_labels);
    float *nll = golden_floats(golden, "token_nll", &n_nll);
    double sum = 0, sum_all = 0, worst = 0;
    int n_used = 0;
    for (int64_t i = 0; i + 1 < n; i++) {
        sum_all -= scored[i].logprob;
        if (labels[i + 1] == -100)
            continue;
        if (labels[i + 1] != ids[i + 1])
            die("%s: a label is not the next id", c->name);
        sum -= scored[i].logprob;
        n_used++;
        worst = fmax(worst, fabs(-scored[i].logprob - (double)nll[i]));
    }
    record(c, KIND_LOGITS, "token_nll", worst);
    record(c, KIND_LOSS, "loss", fabs(sum / n_used - golden_scalar(dir, goldens, "loss")));
    record(c, KIND_LOSS, "loss_all_labels",
           fabs(sum_all / (double)(n - 1) - golden_scalar(dir, goldens, "loss_all_labels")));
    free(nll);
    free(labels);
}

/* [1, heads, n, d] of the reference against rows [n, heads * d]. */
static void check_cache(struct check *c, struct model_run *r, const struct capture_list *l,
                        const struct safetensors *golden, int layer, const char *what)
{
    const struct text_config *t = &r->config.text;
    char name[CAPTURE_NAME_MAX];
    int64_t n = 0, d = t->head_dim;
    snprintf(name, sizeof(name), "cache.%d.%s", layer, what);
    float *expected = golden_floats(golden, name, &n);
    const struct captured *x = find_capture(l, name, 0);
    double worst = 0;
    if (!expected)
        return;
    int64_t kept = n / (t->n_kv_heads * d), skipped = x ? x->n_rows - kept : 0;
    if (!x || skipped < 0) // a sliding window keeps the last rows
        worst = INFINITY;
    for (int64_t h = 0; worst == 0 && h < t->n_kv_heads; h++)
        for (int64_t i = 0; i < kept; i++) {
            double e = largest_difference(x->data + (skipped + i) * x->n_cols + h * d,
                                          expected + (h * kept + i) * d, d);
            worst = e > worst ? e : worst;
        }
    record(c, KIND_HIDDEN, name, worst);
    free(expected);
}

static void check_language(struct check *c, struct model_run *r, const char *dir,
                           const char *goldens, const float *features)
{
    struct safetensors golden;
    struct capture_list captures = {0};
    struct language_output out;
    struct batch_builder *b = xcalloc(1, sizeof(*b));
    int64_t n = 0, vocab = r->config.text.vocab_size, n_tail = 0;
    char name[CAPTURE_NAME_MAX];
    golden_open(&golden, dir, goldens, "lm");
    int64_t *wide = golden_ints(&golden, "input_ids", &n);
    int32_t *ids = xcalloc((size_t)n, sizeof(int32_t));
    for (int64_t i = 0; i < n; i++)
        ids[i] = (int32_t)wide[i];
    struct sequence_part part = {.ids = ids,
                                 .n = (int32_t)n,
                                 .first_page = 3,
                                 .rope_len = (int32_t)n,
                                 .image_token_id = r->config.image_token_id,
                                 .captures = 15 | CAPTURE_ATTENTIONS};
    batch_begin(b, features, 2 * r->config.n_features_per_tile, r->config.text.hidden_size);
    batch_add(b, &part);
    for (int64_t i = 0; i + 1 < n; i++)
        b->targets[i] = ids[i + 1];
    language_forward(&r->language, &b->batch, &out, &captures);

    compare(c, KIND_HIDDEN, &captures, "inputs_embeds", 1, &golden, "inputs_embeds");
    for (int i = 0; i <= r->config.text.n_layers; i++) {
        snprintf(name, sizeof(name), "hidden_states.%d", i);
        compare(c, KIND_HIDDEN, &captures, name, 1, &golden, name);
        snprintf(name, sizeof(name), "attentions.%d", i);
        compare(c, KIND_HIDDEN, &captures, name, 1, &golden, name);
        check_cache(c, r, &captures, &golden, i, "key");
        check_cache(c, r, &captures, &golden, i, "value");
    }
    compare(c, KIND_LOGITS, &captures, "logits", 1, &golden, "logits");
    float *tail = golden_floats(&golden, "logits_tail", &n_tail);
    int32_t n_rows = 0, n_cols = 0;
    float *logits = join_captures(&captures, "logits", 0, &n_rows, &n_cols);
    if (tail)
        record(c, KIND_LOGITS, "logits_tail",
               n_rows == n ? largest_difference(logits + n * vocab - n_tail, tail, n_tail)
                           : INFINITY);
    check_loss(c, &golden, dir, goldens, ids, n, out.targets);
    free(logits);
    free(tail);
    free(ids);
    free(wide);
    free(b);
    capture_release(&captures);
    safetensors_release(&golden);
}

/* Rows [n, vocab] whose largest logit the reference decides by more than 0.5, and ours by another.
 */
static int count_flips(const float *logits, const float *expected, int64_t n, int64_t vocab)
{
    int n_flips = 0;
    for (int64_t r = 0; r < n; r++) {
        const float *x = logits + r * vocab, *e = expected + r * vocab;
        int64_t ours = 0, best = e[1] > e[0], second = !best;
        for (int64_t i = 1; i < vocab; i++)
            ours = x[i] > x[ours] ? i : ours;
        for (int64_t i = 2; i < vocab; i++) {
            if (e[i] > e[best]) {
                second = best;
                best = i;
            } else if (e[i] > e[second]) {
                second = i;
            }
        }
        n_flips += e[best] - e[second] > 0.5f && ours != best;
    }
    return n_flips;
}

/* The largest difference of the first layer's probabilities from the float32 record. */
static double attentions_difference(struct capture_list *captures, struct safetensors *golden)
{
    int64_t n = 0;
    int32_t n_rows = 0, n_cols = 0;
    float *expected = golden_floats(golden, "attentions.0", &n);
    float *ours = join_captures(captures, "attentions.0", 0, &n_rows, &n_cols);
    double worst = INFINITY;
    if (expected && ours && n == (int64_t)n_rows * n_cols)
        worst = largest_difference(ours, expected, n);
    free(expected);
    free(ours);
    return worst;
}

/* The same tiles and prompt with bfloat16 weights and products, against the float32 record: the
 * reference's tolerances are 0.8 for the worst logit and 0.1 on average (2.4 for the worst of a
 * mixture of experts), and the same best token where it leads by more than 0.5. */
static void check_bf16(struct check *c, const char *path, const char *dir, const char *goldens)
{
    struct safetensors golden, vision;
    struct capture_list captures = {0};
    struct language_output out;
    struct model_run *r = xcalloc(1, sizeof(*r));
    struct batch_builder *b = xcalloc(1, sizeof(*b));
    int64_t n = 0, n_logits = 0;
    int32_t n_rows = 0, n_cols = 0, n_tiles, ids[RUN_MAX_MODEL_LEN];
    float *features = NULL;
    golden_open(&golden, dir, goldens, "lm");
    golden_open(&vision, dir, goldens, "vision");
    int64_t *wide = golden_ints(&golden, "input_ids", &n);
    float *expected = golden_floats(&golden, "logits", &n_logits);
    if (!expected)
        goto out;
    for (int64_t i = 0; i < n; i++)
        ids[i] = (int32_t)wide[i];
    model_run_open(r, path, DTYPE_BF16, backends[DTYPE_BF16]);
    features = encode(r, &vision, 0, &captures, &n_tiles);
    struct sequence_part part = {.ids = ids,
                                 .n = (int32_t)n,
                                 .rope_len = (int32_t)n,
                                 .image_token_id = r->config.image_token_id,
                                 .captures = CAPTURE_LOGITS | CAPTURE_ATTENTIONS};
    batch_begin(b, features, 2 * r->config.n_features_per_tile, r->config.text.hidden_size);
    batch_add(b, &part);
    language_forward(&r->language, &b->batch, &out, &captures);
    c->n_failed += !(attentions_difference(&captures, &golden) <= 0.02); // 0.008 at most
    float *logits = join_captures(&captures, "logits", 0, &n_rows, &n_cols);
    double sum = 0, worst = largest_difference(logits, expected, n_logits);
    for (int64_t i = 0; i < n_logits; i++)
        sum += fabs((double)logits[i] - expected[i]);
    c->bf16_worst = worst;
    c->bf16_mean = sum / (double)n_logits;
    if (!r->config.text.n_experts)
        c->n_failed += count_flips(logits, expected, n_rows, n_cols);
    c->n_failed += !(worst <= (r->config.text.n_experts ? 2.4 : 0.8)) || !(c->bf16_mean <= 0.1);
    free(logits);
    capture_release(&captures);
    model_run_close(r);
out:
    free(features);
    free(expected);
    free(wide);
    free(b);
    free(r);
    safetensors_release(&vision);
    safetensors_release(&golden);
}

/* 1 when something failed. */
static int check_checkpoint(const char *name, const char *goldens)
{
    char dir[2048], path[4096];
    struct check c = {.name = name};
    struct model_run *r = xcalloc(1, sizeof(*r));
    if (!reference_find(name, dir, sizeof(dir))) {
        printf("%-22s skipped: no reference set here has it\n", name);
        free(r);
        return 0;
    }
    snprintf(path, sizeof(path), "%s/checkpoints/%s", dir, name);
    model_run_open(r, path, DTYPE_F32, backends[DTYPE_F32]);
    float *features = check_vision(&c, r, dir, goldens);
    check_language(&c, r, dir, goldens, features);
    check_bf16(&c, path, dir, goldens);
    free(features);
    model_run_close(r);
    free(r);
    printf("%-22s %3d tensors", name, c.n_compared);
    for (int k = 0; k < N_KINDS; k++)
        printf("  %s %.1e", kind_names[k], c.worst[k]);
    if (c.bf16_worst > 0)
        printf("  bfloat16 logits %.2f, mean %.3f", c.bf16_worst, c.bf16_mean);
    printf("%s\n", c.n_failed ? "  FAILED" : "");
    return c.n_failed != 0;
}

int main(int argc, char **argv)
{
    static const char *const names[][2] = {
        {"ln-1b-style", "ln-1b-style"},
        {"rms-78b-style", "rms-78b-style"},
        {"hd64-fp32", "hd64-fp32"},
        {"names-hf", "names-hf"},
        {"names-new", "names-hf"},
        {"names-opengvlab", "names-hf"},
        {"t-gelu-untied", "t-gelu-untied"},
        {"t-llama", "t-llama"},
        {"t-qwen3", "t-qwen3"},
        {"t-qwen3moe", "t-qwen3moe"},
        {"t-qwen3moe-mixed", "t-qwen3moe-mixed"},
        {"t-rope-dynamic-short", "t-rope-dynamic-short"},
        {"t-rope-linear", "t-rope-linear"},
        {"t-rope-theta1e4", "t-rope-theta1e4"},
        {"t-rope-yarn", "t-rope-yarn"},
        {"t-sliding", "t-sliding"},
        {"v-act-gelu_new", "v-act-gelu_new"},
        {"v-act-gelu_pytorch_tanh", "v-act-gelu_pytorch_tanh"},
        {"v-act-quick_gelu", "v-act-quick_gelu"},
        {"v-act-relu", "v-act-relu"},
        {"v-act-silu", "v-act-silu"},
        {"v-chan1", "v-chan1"},
        {"v-down025", "v-down025"},
        {"v-down1", "v-down1"},
        {"v-dropouts", "v-dropouts"},
        {"v-feat-1", "v-feat-1"},
        {"v-feat-m2", "v-feat-m2"},
        {"v-full", "v-full"},
        {"v-ln-qk0-b0", "v-ln-qk0-b0"},
        {"v-ln-qk0-b1", "v-ln-qk0-b1"},
        {"v-ln-qk1-b0", "v-ln-qk1-b0"},
        {"v-ln-qk1-b1", "v-ln-qk1-b1"},
        {"v-mask", "v-mask"},
        {"v-nomean-ln", "v-nomean-ln"},
        {"v-nomean-rms", "v-nomean-rms"},
        {"v-nonsquare", "v-nonsquare"},
        {"v-nopos", "v-nopos"},
        {"v-patchrect", "v-patchrect"},
        {"v-rms-qk0-b0", "v-rms-qk0-b0"},
        {"v-rms-qk0-b1", "v-rms-qk0-b1"},
        {"v-rms-qk1-b0", "v-rms-qk1-b0"},
        {"v-rms-qk1-b1", "v-rms-qk1-b1"},
    };
    int n_failed = 0, on_cuda = argc > 1 && strcmp(argv[1], "--cuda") == 0;
    const char *only = argv[1 + on_cuda]; // NULL: all
    struct device_options device = {.kind = on_cuda ? DEVICE_CUDA : DEVICE_CPU,
                                    .n_threads = 2,
                                    .isa = getenv("INTERNVLD_ISA"),
                                    .deterministic = 1};
    for (enum dtype t = DTYPE_F32; t <= DTYPE_BF16; t++) {
        device.dtype = t;
        backends[t] = device_open_backend(&device);
    }
    for (size_t i = 0; i < sizeof(names) / sizeof(names[0]); i++)
        if (!only || strcmp(only, names[i][0]) == 0)
            n_failed += check_checkpoint(names[i][0], names[i][1]);
    backend_close(backends[DTYPE_BF16]);
    backend_close(backends[DTYPE_F32]);
    printf("%d checkpoints failed\n", n_failed);
    return n_failed != 0;
}
