/*
 * Health service. See health.h; the protocol is grpc/doc/health-checking.md.
 */
#include "daemon/gateway/health.h"

#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#include "grpc/health/v1/health.pb-c.h"
#include "kernels/log.h"

#define SERVICE "internvl.v1.InferenceService"
#define MAX_WATCHERS 256
#define MAX_ELEMENTS 64

typedef Grpc__Health__V1__HealthCheckResponse__ServingStatus serving_status;
#define UNKNOWN_SERVICE GRPC__HEALTH__V1__HEALTH_CHECK_RESPONSE__SERVING_STATUS__SERVICE_UNKNOWN
#define SERVING GRPC__HEALTH__V1__HEALTH_CHECK_RESPONSE__SERVING_STATUS__SERVING
#define NOT_SERVING GRPC__HEALTH__V1__HEALTH_CHECK_RESPONSE__SERVING_STATUS__NOT_SERVING
#define NOTHING_SENT GRPC__HEALTH__V1__HEALTH_CHECK_RESPONSE__SERVING_STATUS__UNKNOWN

struct watcher {
    struct health *health;
    struct watcher *next, *previous;
    struct rpc_call *call;
    int is_known; // the service asked for exists
    serving_status sent;
};

struct health {
    pthread_mutex_t mutex;
    int is_serving, is_ending;
    int n_watchers;
    struct watcher *watchers;
};

struct health *health_new(void)
{
    struct health *h = xcalloc(1, sizeof(*h));

    pthread_mutex_init(&h->mutex, NULL);
    return h;
}

void health_free(struct health *h)
{
    if (h->watchers)
        BUG("a health watch is still open");
    pthread_mutex_destroy(&h->mutex);
    free(h);
}

/* The mutex is held. A write under way: watcher_wake() comes back here. */
static void tell(struct watcher *w)
{
    Grpc__Health__V1__HealthCheckResponse r = GRPC__HEALTH__V1__HEALTH_CHECK_RESPONSE__INIT;

    r.status = !w->is_known ? UNKNOWN_SERVICE : w->health->is_serving ? SERVING : NOT_SERVING;
    if (w->sent != r.status && rpc_write(w->call, &r.base) == 0)
        w->sent = r.status;
    if (w->health->is_ending && w->sent == r.status) {
        struct error e;

        error_set(&e, ERROR_UNAVAILABLE, "the server is shutting down");
        rpc_finish(w->call, &e, NULL);
    }
}

static void watcher_wake(void *state)
{
    struct watcher *w = state;

    pthread_mutex_lock(&w->health->mutex);
    tell(w);
    pthread_mutex_unlock(&w->health->mutex);
}

static void watcher_closed(void *state, enum error_code why)
{
    struct watcher *w = state;
    struct health *h = w->health;

    (void)why;
    pthread_mutex_lock(&h->mutex);
    if (w->next)
        w->next->previous = w->previous;
    if (w->previous)
        w->previous->next = w->next;
    else
        h->watchers = w->next;
    h->n_watchers--;
    pthread_mutex_unlock(&h->mutex);
    rpc_call_listen(w->call, NULL, NULL);
    rpc_finish(w->call, NULL, NULL); // of a cancelled call: lets go of what the library holds
    rpc_call_unref(w->call);
    free(w);
}

void health_set_serving(struct health *h, int is_serving)
{
    pthread_mutex_lock(&h->mutex);
    h->is_serving = is_serving;
    for (struct watcher *w = h->watchers; w; w = w->next)
        tell(w);
    pthread_mutex_unlock(&h->mutex);
}

void health_end_watches(struct health *h)
{
    pthread_mutex_lock(&h->mutex);
    h->is_ending = 1;
    for (struct watcher *w = h->watchers; w; w = w->next)
        tell(w);
    pthread_mutex_unlock(&h->mutex);
}

/* Takes the request; 1 known service, 0 unknown, -1 finished with an error. */
static int read_service(struct rpc_call *c)
{
    struct arena arena;
    struct error err = {0};
    int is_known = -1;
    Grpc__Health__V1__HealthCheckRequest *q =
        (Grpc__Health__V1__HealthCheckRequest *)rpc_take_message(
            c, &grpc__health__v1__health_check_request__descriptor, MAX_ELEMENTS, &arena, &err);

    if (q)
        is_known = q->service[0] == '\0' || strcmp(q->service, SERVICE) == 0;
    else
        rpc_finish(c, &err, NULL);
    arena_release(&arena);
    return is_known;
}

void health_check(struct health *h, struct rpc_call *c)
{
    Grpc__Health__V1__HealthCheckResponse r = GRPC__HEALTH__V1__HEALTH_CHECK_RESPONSE__INIT;
    struct error err;
    int is_known = read_service(c);

    if (is_known < 0)
        return;
    if (!is_known) {
        error_set(&err, ERROR_NOT_FOUND, "the server has no such service");
        rpc_finish(c, &err, NULL);
        return;
    }
    pthread_mutex_lock(&h->mutex);
    r.status = h->is_serving ? SERVING : NOT_SERVING;
    pthread_mutex_unlock(&h->mutex);
    rpc_finish(c, NULL, &r.base);
}

void health_watch(struct health *h, struct rpc_call *c)
{
    static const struct rpc_events events = {watcher_wake, watcher_closed};
    struct watcher *w;
    int is_known = read_service(c);

    if (is_known < 0)
        return;
    pthread_mutex_lock(&h->mutex);
    if (h->n_watchers == MAX_WATCHERS) {
        struct error err;

        pthread_mutex_unlock(&h->mutex);
        error_set(&err, ERROR_RESOURCE_EXHAUSTED, "%d health watches are open, the limit",
                  MAX_WATCHERS);
        rpc_finish(c, &err, NULL);
        return;
    }
    w = xcalloc(1, sizeof(*w));
    *w = (struct watcher){.health = h,
                          .call = rpc_call_ref(c),
                          .is_known = is_known,
                          .sent = NOTHING_SENT,
                          .next = h->watchers};
    if (w->next)
        w->next->previous = w;
    h->watchers = w;
    h->n_watchers++;
    rpc_call_listen(c, &events, w);
    tell(w);
    pthread_mutex_unlock(&h->mutex);
}
