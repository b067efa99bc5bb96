/*
 * GET /metrics for Prometheus: what the engine counts and what this process uses, as text.
 *
 * Its own listener and one thread (libmicrohttpd); it reads snapshots and changes nothing. Names
 * are vLLM's under "internvld:", so that dashboards and habits carry over; what vLLM has no name
 * for is internvld:vision_*, internvld:media_*, internvld:stage_* and
 * internvld:collective_seconds_total.
 */
#ifndef INTERNVLD_GATEWAY_METRICS_H
#define INTERNVLD_GATEWAY_METRICS_H

#include "daemon/engine/engine.h"
#include "daemon/gateway/auth.h"
#include "daemon/gateway/media_store.h"
#include "daemon/gateway/work_queue.h"
#include "kernels/error.h"

struct metrics;

struct metrics_options {
    const char *listen;      // as gateway_options.listen
    const struct auth *auth; // a token that scrapers must carry; NULL: none
    const char *model_name;  // the label of every series; borrowed
    struct engine *engine;   // borrowed until metrics_close(), as are `work` and `media`
    struct work_queue *work;
    struct media_store *media;
};

/* NULL and an error when the address cannot be listened on. */
struct metrics *metrics_open(const struct metrics_options *o, struct error *err);
const char *metrics_address(const struct metrics *m); // as bound. Borrowed
void metrics_close(struct metrics *m);                // joins the thread; NULL allowed

#endif
