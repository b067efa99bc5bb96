/*
 * The daemon's own scheduler and vision stage, run against a model of a GPU instead of ranks: what
 * a change of policy does to the 78B class, told in seconds of simulated time.
 *
 *   scheduler_sim --model DIR --trace FILE [option...]      one line of CSV; --header: its names
 *
 * DIR holds a config.json. FILE has a line a request: arrival in seconds, prompt tokens without
 * pictures, tiles, tokens of the answer. The cost of a step on a rank is the larger of the bytes it
 * reads over the memory's rate and the products it makes over the arithmetic rate, plus what a step
 * and its all-reduces cost by themselves (machine_default below has the figures and their sources).
 * These are aims that were not measured: the simulation compares policies, it promises no speed.
 */
#include <getopt.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "daemon/engine/scheduler.h"
#include "daemon/engine/vision_stage.h"
#include "daemon/model/plan.h"
#include "kernels/log.h"
#include "parallel/shard.h"

#define STAGES_MAX 16
#define VISION_MAX 64
#define TEXT_ID 1000 // of every token that is not a picture's, prompt or drawn

/* ---- the machine ---- */

struct machine {
    double flops;        // a second, bfloat16, dense
    double bytes_per_s;  // of a GPU's memory
    double link_bytes;   // a second, of an all-reduce's payload
    double all_reduce_s; // of the smallest one
    double step_s;       // a stage's step with nothing in it: message, launches
    double memory_bytes; // of one GPU
    double memory_used;  // share of it that may be planned
};

/* An H200: data sheet 989 TFLOP/s and 4.8 TB/s, of which 60 % and 85 % are the project's aims;
 * 14 us for a small all-reduce inside a graph and 360 GB/s for a large one are published for eight
 * H100 (design notes: NCCL in graphs). */
static const struct machine machine_default = {.flops = 0.60 * 989e12,
                                               .bytes_per_s = 0.85 * 4.8e12,
                                               .link_bytes = 360e9,
                                               .all_reduce_s = 14e-6,
                                               .step_s = 0.5e-3,
                                               .memory_bytes = 141e9,
                                               .memory_used = 0.9};

/* Elements of one language layer's matrices. */
static double layer_elements(const struct text_config *t)
{
    double dim = t->hidden_size, heads = t->n_heads, kv_heads = t->n_kv_heads;

    return dim * t->head_dim * (2 * heads + 2 * kv_heads) + 3 * dim * t->intermediate_size;
}

struct cost_model {
    struct machine machine;
    struct model_config model;
    struct layout layout;
    double stage_elements[STAGES_MAX]; // of one shard's layers; lm_head is counted by its rows
    int stage_layers[STAGES_MAX];
};

static double larger(double a, double b)
{
    return a > b ? a : b;
}

/* Seconds that stage `stage` takes for the step. */
static double step_cost(const struct cost_model *c, int stage, const struct step *p)
{
    const struct text_config *t = &c->model.text;
    int n_shards = c->layout.tensor_parallel, layers = c->stage_layers[stage];
    double kv_heads = larger((double)t->n_kv_heads / n_shards, 1);
    double kv_bytes = 2.0 * kv_heads * t->head_dim * 2 * layers; // of a token
    double head_flops = 4.0 * t->n_heads / n_shards * t->head_dim * layers;
    double bytes = 2 * c->stage_elements[stage], tokens = p->n_tokens;
    double flops = 2 * c->stage_elements[stage] * tokens;

    for (int32_t i = 0; i < p->n_items; i++) {
        double end = p->items[i].start + p->items[i].n_new, n_new = p->items[i].n_new;

        bytes += kv_bytes * end;
        flops += head_flops * n_new * (end - n_new / 2);
    }
    if (stage == c->layout.pipeline_parallel - 1 && p->n_samples > 0) {
        double elements = (double)t->vocab_size * t->hidden_size / n_shards;

        bytes += 2 * elements;
        flops += 2 * elements * p->n_samples;
    }
    double seconds = larger(bytes / c->machine.bytes_per_s, flops / c->machine.flops);

    if (n_shards > 1)
        seconds +=
            2.0 * layers *
            larger(c->machine.all_reduce_s, 2.0 * tokens * t->hidden_size / c->machine.link_bytes);
    return seconds + c->machine.step_s;
}

static double vision_cost(const struct cost_model *c, int32_t n_tiles)
{
    const struct vision_config *v = &c->model.vision;
    double dim = v->hidden_size, tokens = v->n_patches + 1;
    double elements = v->n_layers * (4 * dim * dim + 2 * dim * v->intermediate_size);
    double flops = n_tiles * (2 * elements * tokens + 4 * tokens * tokens * dim * v->n_layers);

    return larger(2 * elements / c->machine.bytes_per_s, flops / c->machine.flops) +
           c->machine.step_s;
}

/* ---- requests ---- */

struct record { // of one line of the trace
    double arrival_s;
    int32_t n_text, n_tiles, n_output;
    double first_s, last_s; // 0: never answered
    int refused;
};

struct trace {
    struct record *records; // [n]
    int32_t n;
};

static void trace_read(struct trace *t, const char *path)
{
    FILE *f = fopen(path, "r");
    struct record r = {0};
    int32_t capacity = 0;
    char line[256];

    if (!f)
        die("%s: cannot be read", path);
    while (fgets(line, sizeof(line), f)) {
        if (line[0] == '#' || line[0] == '\n')
            continue;
        if (sscanf(line, "%lf,%d,%d,%d", &r.arrival_s, &r.n_text, &r.n_tiles, &r.n_output) != 4 ||
            r.n_text < 1 || r.n_tiles < 0 || r.n_output < 1)
            die("%s: line %d is not \"seconds,prompt tokens,tiles,answer tokens\"", path, t->n + 1);
        if (t->n == capacity) {
            capacity = capacity ? 2 * capacity : 1024;
            t->records = xrealloc(t->records, (size_t)capacity, sizeof(*t->records));
        }
        t->records[t->n++] = r;
    }
    fclose(f);
    if (t->n == 0)
        die("%s: no requests", path);
}

/* Everybody's text begins alike for a system prompt's length; no two pictures are the same. */
static struct request *make_request(const struct trace *t, int32_t index, int32_t tile_tokens,
                                    int32_t image_id)
{
    const struct record *r = &t->records[index];
    int32_t n_image = r->n_tiles * tile_tokens, n_shared = r->n_text < 64 ? r->n_text : 64;
    struct request *q = request_new((size_t)1 << 22);

    snprintf(q->id, sizeof(q->id), "%d", index);
    q->n_ids = r->n_text + n_image;
    q->ids = arena_alloc(&q->arena, (size_t)q->n_ids, sizeof(*q->ids));
    for (int32_t i = 0; i < q->n_ids; i++)
        q->ids[i] = i < n_shared             ? TEXT_ID
                    : i < n_shared + n_image ? image_id
                                             : TEXT_ID + 1 + index;
    q->image_token_id = image_id;
    q->n_image_tokens = n_image;
    q->n_tiles = r->n_tiles;
    q->tile_digests = arena_alloc(&q->arena, (size_t)r->n_tiles, sizeof(*q->tile_digests));
    for (int32_t i = 0; i < r->n_tiles; i++) {
        memcpy(q->tile_digests[i].bytes, &index, sizeof(index));
        memcpy(q->tile_digests[i].bytes + sizeof(index), &i, sizeof(i));
    }
    q->n = 1;
    q->max_tokens = r->n_output;
    q->ignore_eos = 1;
    q->arrival_ns = (uint64_t)(r->arrival_s * 1e9);
    return q;
}

/* ---- the simulated daemon ---- */

struct flight { // a step or a vision job until it is back
    double end_s;
    struct step *step; // NULL: a job
    uint64_t job_id;
};

struct sim {
    struct cost_model cost;
    struct scheduler scheduler;
    struct scheduler_config limits;
    struct vision_stage vision;
    float *no_features; // of any tile: one zero for each of its tokens
    int32_t max_queued;
    struct trace trace;
    int32_t next_arrival;
    double now_s;
    double stage_free_s[STAGES_MAX], vision_free_s[VISION_MAX];
    double stage_busy_s, vision_busy_s; // sums over stages, over ranks
    struct flight flights[STAGES_MAX + 4 * VISION_MAX];
    int n_flights;
    uint64_t n_steps, n_step_tokens;
    double policy_s; // processor time of scheduler_step() and scheduler_update()
};

static double cpu_s(void)
{
    struct timespec t;

    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
    return (double)t.tv_sec + (double)t.tv_nsec / 1e9;
}

static struct record *record_of(struct sim *s, const struct request *r)
{
    return &s->trace.records[atoi(r->id)];
}

static void fly(struct sim *s, struct flight f)
{
    if (s->n_flights == (int)(sizeof(s->flights) / sizeof(*s->flights)))
        BUG("%d flights", s->n_flights);
    s->flights[s->n_flights++] = f;
}

static void arrive(struct sim *s)
{
    int32_t index = s->next_arrival++;
    struct record *record = &s->trace.records[index];
    struct request *r =
        make_request(&s->trace, index, s->limits.n_features_per_tile, s->cost.model.image_token_id);
    struct error err;

    if (s->scheduler.n_unstarted >= s->max_queued || scheduler_check(&s->limits, r, &err) != 0) {
        record->refused = 1;
        request_free(r);
        return;
    }
    vision_stage_add(&s->vision, scheduler_add(&s->scheduler, r), (uint64_t)(s->now_s * 1e9));
}

static void send_jobs(struct sim *s)
{
    const struct vision_job *job;

    while ((job = vision_stage_next(&s->vision, (uint64_t)(s->now_s * 1e9))) != NULL) {
        double *free_s = &s->vision_free_s[job->vision_index];
        double cost = vision_cost(&s->cost, job->n_tiles);

        *free_s = larger(*free_s, s->now_s) + cost;
        s->vision_busy_s += cost;
        fly(s, (struct flight){.end_s = *free_s, .job_id = job->job_id});
    }
}

static void send_steps(struct sim *s)
{
    for (;;) {
        double begun = cpu_s();
        struct step *p = scheduler_step(&s->scheduler, (uint64_t)(s->now_s * 1e9));

        s->policy_s += cpu_s() - begun;
        if (!p)
            return;
        double ready = s->now_s;

        for (int i = 0; i < s->cost.layout.pipeline_parallel; i++) {
            double cost = step_cost(&s->cost, i, p);

            ready = larger(ready, s->stage_free_s[i]) + cost;
            s->stage_free_s[i] = ready;
            s->stage_busy_s += cost;
        }
        s->n_steps++;
        s->n_step_tokens += (uint64_t)p->n_tokens;
        fly(s, (struct flight){.end_s = ready, .step = p});
    }
}

static void end_step(struct sim *s, struct step *p)
{
    struct sample_result *samples = xcalloc((size_t)p->n_samples + 1, sizeof(*samples));
    int32_t n = p->n_samples;

    for (int32_t i = 0; i < n; i++)
        samples[i].token.id = TEXT_ID;
    double begun = cpu_s();

    scheduler_update(&s->scheduler, p, samples, n, (uint64_t)(s->now_s * 1e9));
    s->policy_s += cpu_s() - begun;
    for (int32_t i = 0; i < s->scheduler.n_events; i++) {
        struct ticket *t = s->scheduler.events[i].ticket;

        if (!t->request)
            continue;
        struct record *r = record_of(s, t->request);

        if (r->first_s == 0)
            r->first_s = s->now_s;
        if (t->n_unfinished > 0)
            continue;
        r->last_s = s->now_s;
        vision_stage_forget(&s->vision, t);
        request_free(scheduler_remove(&s->scheduler, t));
    }
    free(samples);
}

static void end_job(struct sim *s, uint64_t job_id)
{
    struct vision_job *job = vision_stage_find(&s->vision, job_id);

    for (int32_t i = 0; i < job->n_tiles; i++)
        vision_stage_deliver(&s->vision, &job->tiles[i], s->no_features,
                             (uint64_t)(s->now_s * 1e9));
    vision_stage_end(&s->vision, job);
}

static int earliest(const struct sim *s)
{
    int best = -1;

    for (int i = 0; i < s->n_flights; i++)
        if (best < 0 || s->flights[i].end_s < s->flights[best].end_s)
            best = i;
    return best;
}

/* The next thing that happens; 0 when nothing is left. */
static int advance(struct sim *s)
{
    int i = earliest(s);
    int arrivals = s->next_arrival < s->trace.n;

    if (i < 0 && !arrivals)
        return 0;
    if (i < 0 || (arrivals && s->trace.records[s->next_arrival].arrival_s <= s->flights[i].end_s)) {
        s->now_s = s->trace.records[s->next_arrival].arrival_s;
        arrive(s);
    } else {
        struct flight f = s->flights[i];

        s->flights[i] = s->flights[--s->n_flights];
        s->now_s = f.end_s;
        if (f.step)
            end_step(s, f.step);
        else
            end_job(s, f.job_id);
    }
    send_jobs(s);
    send_steps(s);
    return 1;
}

/* ---- what came of it ---- */

static int compare_double(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;

    return x < y ? -1 : x > y;
}

static double percentile(const double *sorted, int n, double p)
{
    return n == 0 ? NAN : sorted[(int)(p * (n - 1) + 0.5)];
}

static void report(const struct sim *s, double max_first_s, double max_token_s)
{
    double *first = xcalloc((size_t)s->trace.n, sizeof(*first));
    double *token = xcalloc((size_t)s->trace.n, sizeof(*token));
    double n_tokens = 0, last_arrival = s->trace.records[s->trace.n - 1].arrival_s;
    int n_first = 0, n_token = 0, n_good = 0, n_refused = 0;

    for (int32_t i = 0; i < s->trace.n; i++) {
        const struct record *r = &s->trace.records[i];

        n_refused += r->refused;
        if (r->last_s == 0)
            continue;
        double wait = r->first_s - r->arrival_s, pace = 0;

        first[n_first++] = wait;
        n_tokens += r->n_output;
        if (r->n_output > 1)
            token[n_token++] = pace = (r->last_s - r->first_s) / (r->n_output - 1);
        n_good += wait <= max_first_s && pace <= max_token_s;
    }
    if (n_first + n_refused != s->trace.n)
        BUG("%d of %d requests have neither answer nor refusal", n_first, s->trace.n);
    qsort(first, (size_t)n_first, sizeof(*first), compare_double);
    qsort(token, (size_t)n_token, sizeof(*token), compare_double);
    printf("%.3f,%.3f,%d,%.1f,%.4f,%.4f,%.4f,%.5f,%.5f,%.3f,%.3f,%.1f,%llu,%.1f\n",
           s->trace.n / last_arrival, n_good / last_arrival, n_refused, n_tokens / s->now_s,
           percentile(first, n_first, 0.5), percentile(first, n_first, 0.9),
           percentile(first, n_first, 0.99), percentile(token, n_token, 0.5),
           percentile(token, n_token, 0.99),
           s->stage_busy_s / s->now_s / s->cost.layout.pipeline_parallel,
           s->vision_busy_s / s->now_s / s->cost.layout.n_vision,
           (double)s->n_step_tokens / (double)s->n_steps,
           (unsigned long long)s->scheduler.n_preempted, s->policy_s * 1e6 / (double)s->n_steps);
    free(first);
    free(token);
}

static const char header[] =
    "requests_per_s,goodput_per_s,refused,tokens_per_s,ttft_p50_s,ttft_p90_s,ttft_p99_s,"
    "tpot_p50_s,tpot_p99_s,stage_busy,vision_busy,tokens_per_step,preemptions,policy_us_per_step\n";

/* ---- settings ---- */

struct settings {
    const char *model, *trace;
    struct layout layout;
    int32_t max_num_seqs, max_num_batched_tokens, max_vision_tiles, max_queued, max_model_len;
    double kv_gib, max_first_s, max_token_s;
};

static void settings_parse(struct settings *s, int argc, char **argv)
{
    static const struct option options[] = {
        {"model", 1, NULL, 'm'},
        {"trace", 1, NULL, 't'},
        {"tensor-parallel-size", 1, NULL, 'T'},
        {"pipeline-parallel-size", 1, NULL, 'P'},
        {"vision-ranks", 1, NULL, 'V'},
        {"max-num-seqs", 1, NULL, 's'},
        {"max-num-batched-tokens", 1, NULL, 'b'},
        {"max-vision-tiles", 1, NULL, 'v'},
        {"max-queued-requests", 1, NULL, 'q'},
        {"max-model-len", 1, NULL, 'l'},
        {"kv-gib", 1, NULL, 'k'},
        {"max-ttft", 1, NULL, 'F'},
        {"max-tpot", 1, NULL, 'O'},
        {"header", 0, NULL, 'h'},
        {0},
    };
    int c;

    while ((c = getopt_long(argc, argv, "", options, NULL)) != -1) {
        switch (c) {
        case 'm':
            s->model = optarg;
            break;
        case 't':
            s->trace = optarg;
            break;
        case 'T':
            s->layout.tensor_parallel = atoi(optarg);
            break;
        case 'P':
            s->layout.pipeline_parallel = atoi(optarg);
            break;
        case 'V':
            s->layout.n_vision = atoi(optarg);
            break;
        case 's':
            s->max_num_seqs = atoi(optarg);
            break;
        case 'b':
            s->max_num_batched_tokens = atoi(optarg);
            break;
        case 'v':
            s->max_vision_tiles = atoi(optarg);
            break;
        case 'q':
            s->max_queued = atoi(optarg);
            break;
        case 'l':
            s->max_model_len = atoi(optarg);
            break;
        case 'k':
            s->kv_gib = atof(optarg);
            break;
        case 'F':
            s->max_first_s = atof(optarg);
            break;
        case 'O':
            s->max_token_s = atof(optarg);
            break;
        case 'h':
            fputs(header, stdout);
            exit(0);
        default:
            exit(2);
        }
    }
    if (!s->model || !s->trace)
        die("scheduler_sim: --model and --trace are needed");
    if (s->layout.pipeline_parallel > STAGES_MAX || s->layout.n_vision > VISION_MAX)
        die("scheduler_sim: at most %d stages and %d vision ranks", STAGES_MAX, VISION_MAX);
}

/* Weights and pages of the layout, as the daemon would plan them on such GPUs. */
static int32_t plan_pages(struct cost_model *c, const struct settings *s)
{
    struct plan_settings p = {.layout = s->layout,
                              .dtype = DTYPE_BF16,
                              .kv_dtype = DTYPE_BF16,
                              .activation_dtype = DTYPE_BF16,
                              .page_size = 16,
                              .kv_budget_bytes = (uint64_t)1 << 40,
                              .max_model_len = s->max_model_len,
                              .max_num_seqs = s->max_num_seqs,
                              .max_num_batched_tokens = s->max_num_batched_tokens,
                              .max_vision_tiles = s->max_vision_tiles};
    struct plan plan;
    struct error err;
    double held = 0;

    if (plan_make(&plan, &c->model, &p, &err) != 0)
        die("%s", err.msg);
    for (int i = 0; i < plan.n_ranks; i++)
        held = larger(held, (double)(plan.ranks[i].weight_bytes + plan.ranks[i].scratch_bytes));
    plan_release(&plan);
    double budget = s->kv_gib > 0 ? s->kv_gib * 0x1p30
                                  : c->machine.memory_bytes * c->machine.memory_used - held;

    if (budget <= 0)
        die("%.1f GB of weights and scratch leave no memory for KV pages", held / 1e9);
    p.kv_budget_bytes = (uint64_t)budget;
    if (plan_make(&plan, &c->model, &p, &err) != 0)
        die("%s", err.msg);
    int32_t n_pages = plan.n_pages;

    plan_release(&plan);
    return n_pages;
}

static void sim_init(struct sim *s, const struct settings *set)
{
    struct cost_model *c = &s->cost;
    struct error err;

    c->machine = machine_default;
    c->layout = set->layout;
    if (model_config_load(&c->model, set->model, &err) != 0)
        die("%s", err.msg);
    for (int i = 0; i < set->layout.pipeline_parallel; i++) {
        struct range layers =
            shard_layers(c->model.text.n_layers, i, set->layout.pipeline_parallel);

        c->stage_layers[i] = (int)layers.n;
        c->stage_elements[i] =
            layer_elements(&c->model.text) * (double)layers.n / set->layout.tensor_parallel;
    }
    trace_read(&s->trace, set->trace);
    s->max_queued = set->max_queued;
    s->limits = (struct scheduler_config){.page_size = 16,
                                          .n_pages = plan_pages(c, set),
                                          .max_model_len = set->max_model_len,
                                          .max_num_seqs = set->max_num_seqs,
                                          .max_num_batched_tokens = set->max_num_batched_tokens,
                                          .n_batches_in_flight = set->layout.pipeline_parallel,
                                          .feature_dim = 1,
                                          .enable_prefix_caching = 1,
                                          .n_features_per_tile = c->model.n_features_per_tile};
    scheduler_init(&s->scheduler, &s->limits);
    vision_stage_init(&s->vision, set->layout.n_vision, set->max_vision_tiles, 1 << 20,
                      c->model.n_features_per_tile, 0);
    s->no_features = xcalloc((size_t)c->model.n_features_per_tile, sizeof(*s->no_features));
}

int main(int argc, char **argv)
{
    struct settings set = {.layout = {.tensor_parallel = 8, .pipeline_parallel = 2, .n_vision = 2},
                           .max_num_seqs = 256,
                           .max_num_batched_tokens = 2048,
                           .max_vision_tiles = 4,
                           .max_queued = 256,
                           .max_model_len = 32768,
                           .max_first_s = 3,
                           .max_token_s = 0.06};
    struct sim s = {0};

    settings_parse(&set, argc, argv);
    sim_init(&s, &set);
    while (advance(&s))
        ;
    report(&s, set.max_first_s, set.max_token_s);
    scheduler_release(&s.scheduler);
    vision_stage_release(&s.vision);
    free(s.no_features);
    free(s.trace.records);
    return 0;
}
