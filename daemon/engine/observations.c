/*
 * Counting (observations.h). Bounds are those of vLLM's loggers, so that its dashboards can be
 * used.
 */
#include "daemon/engine/observations.h"

#include <stdlib.h>
#include <string.h>

#include "kernels/log.h"

#define HISTOGRAM(list)                                                                            \
    (struct histogram)                                                                             \
    {                                                                                              \
        .bounds = list, .n_bounds = (int)(sizeof(list) / sizeof((list)[0]))                        \
    }

static const double first_token_bounds[] = {0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1,
                                            0.25,  0.5,   0.75, 1,    2.5,  5,    7.5,  10,
                                            20,    40,    80,   160,  640,  2560};
static const double inter_token_bounds[] = {0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5,
                                            0.75, 1,     2.5,  5,     7.5, 10,   20,  40,  80};
static const double request_bounds[] = {0.3, 0.5, 0.8, 1,  1.5, 2,   2.5, 5,   10,   15,  20,
                                        30,  40,  50,  60, 120, 240, 480, 960, 1920, 7680};
static const double iteration_bounds[] = {1,   8,    16,   32,   64,   128,  256,
                                          512, 1024, 2048, 4096, 8192, 16384};

void observations_init(struct observations *o, int n_stages, int n_vision)
{
    *o = (struct observations){.first_token = HISTOGRAM(first_token_bounds),
                               .inter_token = HISTOGRAM(inter_token_bounds),
                               .end_to_end = HISTOGRAM(request_bounds),
                               .queue = HISTOGRAM(request_bounds),
                               .prefill = HISTOGRAM(request_bounds),
                               .decode = HISTOGRAM(request_bounds),
                               .iteration_tokens = HISTOGRAM(iteration_bounds),
                               .vision_queue = HISTOGRAM(first_token_bounds),
                               .vision_encode = HISTOGRAM(first_token_bounds),
                               .n_stages = n_stages,
                               .n_vision = n_vision};
    o->language = xcalloc((size_t)n_stages, sizeof(*o->language));
    o->vision = xcalloc((size_t)n_vision, sizeof(*o->vision));
}

void observations_release(struct observations *o)
{
    free(o->language);
    free(o->vision);
    *o = (struct observations){0};
}

void observations_copy(struct observations *to, const struct observations *from)
{
    struct stage_times *language = to->language, *vision = to->vision;
    if (to->n_stages != from->n_stages || to->n_vision != from->n_vision)
        BUG("observations of %d and %d stages", to->n_stages, from->n_stages);
    *to = *from;
    to->language = language;
    to->vision = vision;
    memcpy(language, from->language, (size_t)from->n_stages * sizeof(*language));
    memcpy(vision, from->vision, (size_t)from->n_vision * sizeof(*vision));
}

void histogram_add(struct histogram *h, double x)
{
    int i = 0;
    while (i < h->n_bounds && x > h->bounds[i])
        i++;
    h->counts[i]++;
    h->n++;
    h->sum += x;
}

void stage_times_add(struct stage_times *s, uint64_t now_ns, uint64_t compute_ns, uint64_t wait_ns)
{
    uint64_t begin_ns = now_ns > compute_ns ? now_ns - compute_ns : 0;
    if (s->last_end_ns > 0 && begin_ns > s->last_end_ns)
        s->idle_s += (double)(begin_ns - s->last_end_ns) / 1e9;
    s->last_end_ns = now_ns;
    s->busy_s += (double)compute_ns / 1e9;
    s->collective_s += (double)wait_ns / 1e9;
}

void observations_add_request(struct observations *o, enum finish_reason reason, int n_tiles,
                              const struct timing *t)
{
    o->n_ended[reason]++;
    if (reason != FINISH_STOP && reason != FINISH_LENGTH)
        return;
    histogram_add(&o->end_to_end, (double)t->total_us / 1e6);
    histogram_add(&o->queue, (double)t->queue_us / 1e6);
    histogram_add(&o->prefill, (double)t->prefill_us / 1e6);
    if (t->first_token_us > 0)
        histogram_add(&o->decode, (double)(t->total_us - t->first_token_us) / 1e6);
    if (n_tiles > 0)
        histogram_add(&o->vision_encode, (double)t->vision_us / 1e6);
}
