/*
 * The same bits whatever the layout and the batch, and the reference's greedy generations.
 *
 * One prompt with two tiles is prefilled and continued greedily: in one process alone, in chunks,
 * among other sequences, and under every T and P the checkpoint's heads and layers take (threads
 * stand for ranks). Logits, ids and log-probabilities must be bitwise equal; ids must be the
 * recorded ones.
 */
#include <math.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "daemon/model/json.h"
#include "kernels/log.h"
#include "tests/parity/model/model_run.h"
#include "tests/parity/model/reference.h"
#include "tests/parity/model/thread_comm.h"

#define N_NEW 24 // of generate.json

struct prompt {
    char dir[2048], path[4096];
    const char *name;
    int32_t ids[RUN_MAX_MODEL_LEN]; // prompt, then what is generated
    int32_t n;
    float *features; // [2 tiles]
    int32_t n_features, dim, image_token_id;
    int32_t expected[N_NEW];
    double margins[N_NEW];
};

/* What must not depend on layout or batch. */
struct trace {
    float *logits; // [n, vocab] of the prompt
    int32_t n_rows, n_cols;
    int32_t ids[N_NEW];
    struct token_logprob top[N_NEW][6]; // the token and its five best
};

static const cJSON *at(const cJSON *v, const char *key)
{
    const cJSON *x = cJSON_GetObjectItemCaseSensitive(v, key);
    if (!x)
        die("generate.json: no %s", key);
    return x;
}

static void read_prompt(struct prompt *p, const char *name)
{
    char file[4096];
    size_t n = 0;
    struct error err;
    snprintf(file, sizeof(file), "%s/goldens/%s/generate.json", p->dir, name);
    char *text = json_read_file(file, 16 << 20, &n, &err);
    cJSON *root = text ? json_parse(text, n, 12, file, &err) : NULL;
    if (!root)
        die("%s", err.msg);
    const cJSON *image = at(root, "image");
    const cJSON *record = cJSON_GetArrayItem(at(image, "fp32"), 0), *v = NULL;
    cJSON_ArrayForEach(v, cJSON_GetArrayItem(at(image, "input_ids"), 0))
    {
        p->ids[p->n++] = v->valueint;
    }
    for (int i = 0; i < N_NEW; i++) {
        p->expected[i] = cJSON_GetArrayItem(at(record, "ids"), i)->valueint;
        p->margins[i] = cJSON_GetArrayItem(at(record, "margins"), i)->valuedouble;
    }
    cJSON_Delete(root);
    free(text);
}

static void encode_tiles(struct prompt *p, struct model_run *r, const char *name)
{
    struct safetensors vision;
    struct capture_list none = {0};
    int64_t n = 0;
    golden_open(&vision, p->dir, name, "vision");
    const struct safetensors_tensor *t = safetensors_find(&vision, "pixel_values");
    float *pixels = golden_floats(&vision, "pixel_values", &n);
    struct tile_batch tiles = {.n_tiles = 2,
                               .channels = (int32_t)t->shape[1],
                               .height = (int32_t)t->shape[2],
                               .width = (int32_t)t->shape[3],
                               .pixels = pixels};
    p->dim = r->config.text.hidden_size;
    p->n_features = 2 * r->config.n_features_per_tile;
    p->image_token_id = r->config.image_token_id;
    p->features = xcalloc((size_t)p->n_features * (size_t)p->dim, sizeof(float));
    vision_forward(&r->vision, &tiles, p->features, &none);
    /* A tile alone has the bits it has in a batch. */
    float *alone = xcalloc((size_t)p->n_features * (size_t)p->dim, sizeof(float));
    size_t half = (size_t)p->n_features / 2 * (size_t)p->dim;
    tiles.n_tiles = 1;
    tiles.pixels = pixels + n / t->shape[0];
    vision_forward(&r->vision, &tiles, alone, &none);
    if (memcmp(alone, p->features + half, half * sizeof(float)) != 0)
        die("%s: a tile's features depend on its batch", name);
    free(alone);
    free(pixels);
    safetensors_release(&vision);
}

/* How the prompt is run; the layout is the model's. */
struct manner {
    int32_t chunk;    // new tokens of a prefill step; 0: all at once
    int32_t n_others; // other sequences in every batch
    int32_t first_page;
};

static void add_other(struct batch_builder *b, const struct prompt *p, int32_t i, int32_t step)
{
    /* A text sequence of its own that grows by one token a step. */
    struct sequence_part part = {.ids = p->ids + p->n - 12 + i,
                                 .first = step ? 4 + step : 0,
                                 .n = step ? 1 : 5,
                                 .first_page = 100 + 20 * i,
                                 .rope_len = 5 + step,
                                 .image_token_id = -1,
                                 .sample = 1};
    batch_add(b, &part);
}

/* Prefill and N_NEW greedy tokens; every rank of a layout calls it. The trace is filled on shard 0
 * of the last stage, whose ids the others must be told: they come from `known` when not NULL. */
static void generate(struct language_model *m, struct prompt *p, const struct manner *how,
                     struct trace *t, const int32_t *known)
{
    struct batch_builder *b = xcalloc(1, sizeof(*b));
    struct language_output out;
    struct capture_list captures = {0};
    int32_t chunk = how->chunk ? how->chunk : p->n, step = 0;
    int owner = how->n_others / 2;
    for (int32_t done = 0; done < p->n + N_NEW - 1; step++) {
        int32_t n = done < p->n ? (p->n - done < chunk ? p->n - done : chunk) : 1;
        int last = done + n >= p->n;
        struct sequence_part part = {.ids = p->ids,
                                     .first = done,
                                     .n = n,
                                     .first_page = how->first_page,
                                     .rope_len = done < p->n ? p->n : done + 1,
                                     .image_token_id = p->image_token_id,
                                     .captures = done < p->n ? CAPTURE_LOGITS : 0,
                                     .sample = last};
        batch_begin(b, p->features, p->n_features, p->dim);
        for (int32_t i = 0; i < how->n_others; i++) {
            if (i == owner)
                batch_add(b, &part);
            add_other(b, p, i, step < 6 ? step : 0);
        }
        if (how->n_others == 0)
            batch_add(b, &part);
        language_forward(m, &b->batch, &out, &captures);
        done += n;
        if (!last)
            continue;
        int32_t k = done - p->n;
        for (int32_t i = 0; i < out.n_samples; i++)
            if (out.samples[i].sequence == (how->n_others ? owner : 0)) {
                t->ids[k] = out.samples[i].token.id;
                t->top[k][0] = out.samples[i].token;
                memcpy(&t->top[k][1], out.samples[i].top, 5 * sizeof(struct token_logprob));
            }
        p->ids[done] = known ? known[k] : t->ids[k];
    }
    int32_t sequence = how->n_others ? owner : 0, n_rows = 0;
    for (int32_t i = 0; i < captures.n; i++) // chunks count rows from their own first one
        if (captures.items[i].owner == sequence) {
            captures.items[i].first_row = n_rows;
            n_rows += captures.items[i].n_rows;
        }
    t->logits = join_captures(&captures, "logits", sequence, &t->n_rows, &t->n_cols);
    capture_release(&captures);
    free(b);
}

struct rank {
    struct prompt *prompt;
    const struct model_config *config;
    struct model_comm *comm;
    struct topology topology;
    struct trace trace;
    const int32_t *known;
};

static void *run_rank(void *arg)
{
    struct rank *r = arg;
    struct prompt *mine = xcalloc(1, sizeof(*mine));
    struct weights w;
    struct language_model m;
    struct error err;
    struct language_limits limits = model_run_limits();
    struct backend *b = backend_cpu_open(1, getenv("INTERNVLD_ISA"));
    struct manner plain = {.first_page = 2};
    *mine = *r->prompt;
    if (weights_open(&w, mine->path, r->config, 0, &err) != 0)
        die("%s", err.msg);
    language_init(&m, r->config, &w, b, DTYPE_F32, &r->topology, r->comm, &limits);
    weights_release(&w);
    generate(&m, mine, &plain, &r->trace, r->known);
    language_release(&m);
    backend_close(b);
    free(mine);
    return NULL;
}

static int same_trace(const struct trace *a, const struct trace *b)
{
    return a->n_rows == b->n_rows && a->n_cols == b->n_cols &&
           memcmp(a->logits, b->logits, (size_t)a->n_rows * (size_t)a->n_cols * sizeof(float)) ==
               0 &&
           memcmp(a->ids, b->ids, sizeof(a->ids)) == 0 &&
           memcmp(a->top, b->top, sizeof(a->top)) == 0;
}

static int report(const char *name, const char *what, const struct trace *base, struct trace *t)
{
    int ok = same_trace(base, t);
    printf("%-16s %-24s %s\n", name, what, ok ? "bitwise equal" : "DIFFERS");
    free(t->logits);
    *t = (struct trace){0};
    return !ok;
}

static int check_layout(struct prompt *p, const struct model_config *c, const struct trace *base,
                        int n_stages, int n_shards)
{
    int n = n_stages * n_shards;
    struct rank *ranks = xcalloc((size_t)n, sizeof(*ranks));
    pthread_t threads[64];
    struct thread_job *job = thread_job_new(n_stages, n_shards);
    char what[32];
    for (int i = 0; i < n; i++) {
        ranks[i] = (struct rank){.prompt = p, .config = c, .known = base->ids};
        ranks[i].topology = (struct topology){.role = ROLE_LANGUAGE,
                                              .layout = {1, n_shards, n_stages},
                                              .stage = i / n_shards,
                                              .shard = i % n_shards};
        ranks[i].comm = thread_job_comm(job, i / n_shards, i % n_shards);
        pthread_create(&threads[i], NULL, run_rank, &ranks[i]);
    }
    for (int i = 0; i < n; i++)
        pthread_join(threads[i], NULL);
    snprintf(what, sizeof(what), "T=%d P=%d", n_shards, n_stages);
    int failed = report(p->name, what, base, &ranks[(n_stages - 1) * n_shards].trace);
    thread_job_free(job);
    free(ranks);
    return failed;
}

static int check_greedy(const struct prompt *p, const struct trace *t)
{
    for (int i = 0; i < N_NEW; i++) {
        if (t->ids[i] == p->expected[i])
            continue;
        printf("%-16s greedy: token %d is %d, the reference has %d (margin %.5f)\n", p->name, i,
               t->ids[i], p->expected[i], p->margins[i]);
        return p->margins[i] >= 2e-3; // the reference's own rule
    }
    printf("%-16s greedy: %d tokens equal\n", p->name, N_NEW);
    return 0;
}

/* `quantization`: a name of --quantization, int4 in groups of 32. */
static int check_checkpoint(const char *name, const char *quantization)
{
    struct error err;
    struct prompt *p = xcalloc(1, sizeof(*p));
    struct model_run *r = xcalloc(1, sizeof(*r));
    struct trace base = {0}, t = {0};
    int failed = 0;
    p->name = name;
    if (!reference_find(name, p->dir, sizeof(p->dir))) {
        printf("%-16s skipped: no reference set here has it\n", name);
        goto out;
    }
    snprintf(p->path, sizeof(p->path), "%s/checkpoints/%s", p->dir, name);
    if (quantization_parse(&r->config.quantization, quantization, 32, &err) != 0)
        die("%s", err.msg);
    struct backend *b = backend_cpu_open(2, getenv("INTERNVLD_ISA"));
    model_run_open(r, p->path, DTYPE_F32, b);
    read_prompt(p, name);
    encode_tiles(p, r, name);
    generate(&r->language, p, &(struct manner){.first_page = 2}, &base, NULL);
    if (r->config.quantization.method == QUANTIZATION_NONE)
        failed += check_greedy(p, &base);
    else
        printf("%-16s quantised: %s\n", name, quantization);
    generate(&r->language, p, &(struct manner){.chunk = 7, .first_page = 40}, &t, NULL);
    failed += report(name, "chunks of 7", &base, &t);
    generate(&r->language, p, &(struct manner){.n_others = 6, .first_page = 300}, &t, NULL);
    failed += report(name, "among 6 others", &base, &t);
    generate(&r->language, p, &(struct manner){.chunk = 16, .n_others = 9, .first_page = 70}, &t,
             NULL);
    failed += report(name, "chunks of 16 among 9", &base, &t);
    for (int stages = 1; stages <= 3 && stages <= r->config.text.n_layers; stages++)
        for (int shards = 1; shards <= 8; shards *= 2) {
            struct weight_cut cut;
            if (weight_cut_init(&cut, &r->config.text, 0, shards, &err) == 0)
                failed += check_layout(p, &r->config, &base, stages, shards);
        }
    free(base.logits);
    free(p->features);
    model_run_close(r);
    backend_close(b);
out:
    free(r);
    free(p);
    return failed;
}

int main(void)
{
    static const char *const names[] = {
        "ln-1b-style",      "rms-78b-style",
        "hd64-fp32",        "names-hf",
        "t-gelu-untied",    "t-llama",
        "t-qwen3",          "t-qwen3moe",
        "t-qwen3moe-mixed", "t-rope-dynamic-short",
        "t-rope-linear",    "t-rope-theta1e4",
        "t-rope-yarn",      "t-sliding",
        "v-chan1",          "v-down025",
        "v-down1",          "v-feat-1",
        "v-full",           "v-mask",
        "v-nomean-rms",     "v-nonsquare",
        "v-nopos",          "v-patchrect",
    };
    int failed = 0;
    for (size_t i = 0; i < sizeof(names) / sizeof(names[0]); i++)
        failed += check_checkpoint(names[i], "none");
    failed += check_checkpoint("ln-1b-style", "int8");
    failed += check_checkpoint("rms-78b-style", "int4");
    failed += check_checkpoint("ln-1b-style", "fp8");
    failed += check_checkpoint("ln-1b-style", "bitsandbytes-nf4");
    failed += check_checkpoint("rms-78b-style", "bitsandbytes-fp4");
    printf("%d comparisons failed\n", failed);
    return failed != 0;
}
