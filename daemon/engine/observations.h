/*
 * What the engine has seen, as operators count it: histograms of times and sizes, ends by reason,
 * how long each stage waited.
 *
 * Plain data that only grows. The engine thread owns one and lends out copies; whoever prints it
 * (daemon/gateway/metrics.c) knows names, this knows meanings and bounds (vLLM's, so that
 * dashboards fit). Times are seconds.
 */
#ifndef INTERNVLD_ENGINE_OBSERVATIONS_H
#define INTERNVLD_ENGINE_OBSERVATIONS_H

#include <stdint.h>

#include "daemon/engine/request.h"
#include "daemon/engine/stream.h"

#define HISTOGRAM_BOUNDS_MAX 24

struct histogram {
    const double *bounds; // [n_bounds] upper, included, growing; static
    int n_bounds;
    uint64_t counts[HISTOGRAM_BOUNDS_MAX + 1]; // of each bound alone; the last: above all
    uint64_t n;
    double sum;
};

struct stage_times {
    uint64_t last_end_ns; // of the stage's latest step; 0: none yet
    double idle_s;        // between steps, counted when the next one is back
    double collective_s;  // inside collectives, waiting included
    double busy_s;        // from a step's begin to its end
};

struct observations {
    struct histogram first_token, inter_token, end_to_end, queue, prefill, decode;
    struct histogram iteration_tokens;
    struct histogram vision_queue, vision_encode; // arrival to first tile sent; to features back
    uint64_t n_ended[FINISH_ERROR + 1];           // requests, by why they ended
    int n_stages, n_vision;
    struct stage_times *language; // [n_stages] each stage's shard 0
    struct stage_times *vision;   // [n_vision] each rank
};

void observations_init(struct observations *o, int n_stages, int n_vision);
void observations_release(struct observations *o); // accepts a zeroed struct
/* Both initialised with the same stages. */
void observations_copy(struct observations *to, const struct observations *from);

void histogram_add(struct histogram *h, double x);
/* A stage's step is back after compute_ns of work, wait_ns of it inside collectives. */
void stage_times_add(struct stage_times *s, uint64_t now_ns, uint64_t compute_ns, uint64_t wait_ns);
/* A request has ended, for `reason`; its times count when it was answered (STOP, LENGTH). */
void observations_add_request(struct observations *o, enum finish_reason reason, int n_tiles,
                              const struct timing *t);

#endif
