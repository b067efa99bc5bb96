/*
 * Start, watch, drain. See gateway.h.
 *
 * Threads: main (here: waits), signals (sigwait), completion and listener (rpc.c), processors
 * (work_queue.c), engine. Each piece of state names its owner where it is declared.
 */
#include "daemon/gateway/gateway.h"

#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <time.h>
#include <unistd.h>

#include "daemon/gateway/gateway_state.h"
#include "daemon/gateway/metrics.h"
#include "kernels/clock.h"
#include "kernels/log.h"
#include "parallel/launch.h"

#define CLOSE_MS 2000     // after the drain: for statuses to leave
#define LOST_MS 300       // after a rank is lost: for errors to leave
#define LAST_WRITES_MS 50 // of those: for sockets to take what the library has
#define STALL_CHECK_S 5
#define STALL_MS 120000            // a client that has not read or sent for so long is let go
#define SAME_SIGNAL_NS 2000000000u // one signal to a whole process group arrives more than once
#define WATCH_CALLS 256            // room for health checks beside requests

/* What ends the waiting; under its mutex. */
struct watch {
    pthread_mutex_t mutex;
    pthread_cond_t changed;
    pthread_t thread;
    int is_stopping;        // a first signal came
    uint64_t first_stop_ns; // when
    int lost_rank;          // or -1
};

static void stop_signals(sigset_t *set)
{
    sigemptyset(set);
    sigaddset(set, SIGTERM);
    sigaddset(set, SIGINT);
    sigaddset(set, SIGUSR1);
}

static void *signal_loop(void *arg)
{
    struct watch *w = arg;
    sigset_t set;
    int signal_number;

    stop_signals(&set);
    for (;;) {
        if (sigwait(&set, &signal_number))
            continue;
        pthread_mutex_lock(&w->mutex);
        if (!w->is_stopping) {
            w->is_stopping = 1;
            w->first_stop_ns = clock_now_ns();
            pthread_cond_broadcast(&w->changed);
        } else if (clock_now_ns() - w->first_stop_ns > SAME_SIGNAL_NS) {
            log_warn("gateway", "second signal: ending the job at once");
            launch_abort(1);
        }
        pthread_mutex_unlock(&w->mutex);
    }
    return NULL;
}

static void watch_open(struct watch *w)
{
    pthread_mutex_init(&w->mutex, NULL);
    pthread_cond_init(&w->changed, NULL);
    w->lost_rank = -1;
    if (pthread_create(&w->thread, NULL, signal_loop, w))
        die("cannot start the signal thread");
}

static void watch_close(struct watch *w)
{
    pthread_cancel(w->thread);
    pthread_join(w->thread, NULL);
    pthread_cond_destroy(&w->changed);
    pthread_mutex_destroy(&w->mutex);
}

static void on_lost(void *arg, int rank) // engine thread
{
    struct watch *w = arg;

    pthread_mutex_lock(&w->mutex);
    w->lost_rank = rank;
    pthread_cond_broadcast(&w->changed);
    pthread_mutex_unlock(&w->mutex);
}

static int watch_is_stopping(struct watch *w)
{
    int result;

    pthread_mutex_lock(&w->mutex);
    result = w->is_stopping;
    pthread_mutex_unlock(&w->mutex);
    return result;
}

static int watch_lost_rank(struct watch *w)
{
    int result;

    pthread_mutex_lock(&w->mutex);
    result = w->lost_rank;
    pthread_mutex_unlock(&w->mutex);
    return result;
}

/* Until a signal or a lost rank; clients that do not read or write, and media that nobody uses, are
 * looked for now and then. */
static void watch_wait(struct watch *w, struct gateway *g)
{
    struct timespec until;

    pthread_mutex_lock(&w->mutex);
    while (!w->is_stopping && w->lost_rank < 0) {
        clock_gettime(CLOCK_REALTIME, &until);
        until.tv_sec += STALL_CHECK_S;
        if (pthread_cond_timedwait(&w->changed, &w->mutex, &until) == ETIMEDOUT) {
            pthread_mutex_unlock(&w->mutex);
            rpc_server_end_stalled(g->server, STALL_MS);
            media_store_sweep(g->media, clock_now_ns());
            pthread_mutex_lock(&w->mutex);
        }
    }
    pthread_mutex_unlock(&w->mutex);
}

/* ---- start ---- */

static void raise_descriptor_limit(void)
{
    struct rlimit l;

    if (getrlimit(RLIMIT_NOFILE, &l) || l.rlim_cur == l.rlim_max)
        return;
    l.rlim_cur = l.rlim_max;
    if (setrlimit(RLIMIT_NOFILE, &l))
        log_warn("gateway", "cannot raise the limit of open files: %s", strerror(errno));
}

static void health_check_method(void *arg, struct rpc_call *c)
{
    health_check(((struct gateway *)arg)->health, c);
}

static void health_watch_method(void *arg, struct rpc_call *c)
{
    health_watch(((struct gateway *)arg)->health, c);
}

static void reflection_method(void *arg, struct rpc_call *c)
{
    reflection_answer(((struct gateway *)arg)->reflection, c);
}

static const struct rpc_method methods[] = {
    {"/internvl.v1.InferenceService/Generate", 0, 0, generate_message, NULL},
    {"/internvl.v1.InferenceService/Forward", 0, 0, forward_message, NULL},
    {"/internvl.v1.InferenceService/Score", 0, 0, score_message, NULL},
    {"/internvl.v1.InferenceService/Embed", 0, 0, embed_message, NULL},
    {"/internvl.v1.InferenceService/Tokenize", 0, 0, tokenize_message, NULL},
    {"/internvl.v1.InferenceService/GetModel", 0, 0, model_info_message, NULL},
    {"/internvl.v1.InferenceService/UploadMedia", 0, 1, upload_message, upload_ended},
    {"/grpc.health.v1.Health/Check", 1, 0, health_check_method, NULL},
    {"/grpc.health.v1.Health/Watch", 1, 0, health_watch_method, NULL},
    {"/grpc.reflection.v1.ServerReflection/ServerReflectionInfo", 0, 1, reflection_method, NULL},
    {"/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo", 0, 1, reflection_method,
     NULL},
};

static int open_server(struct gateway *g, struct error *err)
{
    const struct gateway_options *o = g->options;
    struct rpc_options r = {
        .listen = o->listen,
        .max_message_bytes = o->max_message_bytes,
        .max_connections = o->max_connections,
        .max_open_calls = 2 * o->engine.max_queued_requests + o->engine.max_num_seqs + WATCH_CALLS,
        .auth = o->auth,
    };

    g->server = rpc_server_open(&r, methods, (int)(sizeof(methods) / sizeof(methods[0])), g, err);
    return g->server ? 0 : -1;
}

static uint64_t own_rss_bytes(void)
{
    unsigned long long size = 0, resident = 0;
    FILE *f = fopen("/proc/self/statm", "re");

    if (f) {
        if (fscanf(f, "%llu %llu", &size, &resident) != 2)
            resident = 0;
        fclose(f);
    }
    return resident * (uint64_t)sysconf(_SC_PAGESIZE);
}

/* Not MPI_Abort: mpirun would take 2 s over it. The workers see their connections close and die at
 * once; mpirun, which saw the lost rank end, ends what else may be left. */
static _Noreturn void end_job(void)
{
    _exit(1);
}

static _Noreturn void die_lost(const struct gateway *g, int rank)
{
    char role[64];

    log_error("gateway", "rank %d (%s) is lost: ending the job", rank,
              topology_describe(g->topology, rank, role, sizeof(role)));
    end_job();
}

/* READY of every worker; -1 when a signal came first. A worker lost meanwhile ends the job. */
static int wait_ready(struct gateway *g, struct control *control, struct watch *w)
{
    struct pollfd ready = {.fd = control_fd(control), .events = POLLIN};
    int n_missing = g->topology->world - 1;

    while (n_missing > 0) {
        struct message *m;

        if (watch_is_stopping(w))
            return -1;
        if (poll(&ready, 1, 500) < 0 && errno != EINTR)
            die("poll: %s", strerror(errno));
        while ((m = control_next(control))) {
            int rank = m->rank;

            if (m->type == CONTROL_LOST)
                die_lost(g, rank);
            if (m->type != CONTROL_READY)
                BUG("message %d of rank %d before it is ready", m->type, rank);
            rank_info_unpack(&g->ranks[rank], m);
            message_unref(m);
            n_missing--;
        }
    }
    return 0;
}

static void write_port_file(const char *path, const char *address)
{
    char temporary[4096];
    FILE *f;

    if (snprintf(temporary, sizeof(temporary), "%s.%d", path, (int)getpid()) >=
        (int)sizeof(temporary))
        die("--port-file: the path is too long");
    f = fopen(temporary, "we");
    if (!f || fprintf(f, "%s\n", address) < 0 || fclose(f) || rename(temporary, path))
        die("--port-file %s: %s", path, strerror(errno));
}

static void say_ready(const struct gateway *g)
{
    const struct layout *l = &g->topology->layout;
    char line[512];
    int n = snprintf(line, sizeof(line),
                     "ready: serving %s on %s (T=%d P=%d V=%d, %s, %d ranks, load %llu ms)\n",
                     g->model->name, rpc_server_address(g->server), l->tensor_parallel,
                     l->pipeline_parallel, l->n_vision, g->options->dtype_name, g->topology->world,
                     (unsigned long long)((clock_now_ns() - g->start_ns) / 1000000u));

    if (write(STDERR_FILENO, line, (size_t)n) < 0)
        log_warn("gateway", "cannot write to standard error: %s", strerror(errno));
}

/* ---- end ---- */

static int left_ms(uint64_t until_ns)
{
    uint64_t now = clock_now_ns();

    return now >= until_ns ? 0 : (int)((until_ns - now) / 1000000u);
}

/* Running requests finish; then the workers are told to stop. */
static void drain(struct gateway *g)
{
    uint64_t until = clock_now_ns() + (uint64_t)g->options->drain_timeout_s * 1000000000u;
    int is_done;

    log_info("gateway", "draining: %d open calls", rpc_server_open_calls(g->server));
    health_set_serving(g->health, 0);
    rpc_server_end_streams(g->server);
    is_done = work_queue_drain(g->work, left_ms(until));
    is_done &= engine_drain(g->engine, left_ms(until));
    if (!is_done)
        log_warn("gateway", "requests were cut off: they did not finish within %d s",
                 g->options->drain_timeout_s);
    health_end_watches(g->health);
}

/* Every stream has ended UNAVAILABLE: let the answers leave, then end the job. */
static _Noreturn void leave_lost(struct gateway *g, int rank)
{
    uint64_t until = clock_now_ns() + (uint64_t)LOST_MS * 1000000u;
    char role[64];

    log_error("gateway", "rank %d (%s) is lost: all calls end, and the job with them", rank,
              topology_describe(g->topology, rank, role, sizeof(role)));
    health_set_serving(g->health, 0);
    health_end_watches(g->health);
    rpc_server_end_streams(g->server);
    while (rpc_server_open_calls(g->server) > 0 && left_ms(until) > LAST_WRITES_MS)
        poll(NULL, 0, 5);
    poll(NULL, 0, LAST_WRITES_MS);
    end_job();
}

/* NULL without --metrics-listen. */
static struct metrics *open_metrics(struct gateway *g)
{
    struct metrics_options o = {.listen = g->options->metrics_listen,
                                .auth = g->options->auth,
                                .model_name = g->model->name,
                                .engine = g->engine,
                                .work = g->work,
                                .media = g->media};
    struct error err = {0};
    struct metrics *m;

    if (!o.listen)
        return NULL;
    m = metrics_open(&o, &err);
    if (!m) {
        log_error("gateway", "metrics: %s", err.msg);
        end_job();
    }
    log_info("gateway", "metrics: http://%s/metrics", metrics_address(m));
    return m;
}

static void serve(struct gateway *g, struct watch *w)
{
    rpc_server_serve(g->server);
    health_set_serving(g->health, 1);
    if (g->options->port_file) // whoever reads it may call at once
        write_port_file(g->options->port_file, rpc_server_address(g->server));
    say_ready(g);
    watch_wait(w, g);
    if (watch_lost_rank(w) < 0)
        drain(g);
    if (watch_lost_rank(w) >= 0) // perhaps while draining
        leave_lost(g, watch_lost_rank(w));
    if (g->options->port_file)
        unlink(g->options->port_file);
}

static struct media_store *open_media(const struct gateway_options *o)
{
    struct media_store_options m = {.max_bytes = o->media_store_bytes,
                                    .max_media_bytes = o->max_media_bytes,
                                    .ttl_ns = (uint64_t)o->media_ttl_s * 1000000000u,
                                    .max_uploads = MAX_UPLOADS};

    return media_store_open(&m);
}

static void stop_workers(const struct gateway *g, struct control *control)
{
    for (int rank = 1; rank < g->topology->world; rank++)
        control_send(control, rank, message_new(CONTROL_STOP, 0));
}

int gateway_run(const struct gateway_options *o, const struct model_config *m,
                const struct topology *t, const struct processor *processor,
                struct control *control)
{
    struct gateway g = {.options = o, .model = m, .topology = t, .processor = processor};
    struct watch w = {0};
    struct error err = {0};
    struct metrics *metrics = NULL;

    g.convert = (struct convert){m, o->limits, o->engine.max_model_len, o->max_message_bytes};
    g.start_ns = clock_now_ns();
    raise_descriptor_limit();
    watch_open(&w);
    g.ranks = xcalloc((size_t)t->world, sizeof(*g.ranks));
    g.health = health_new();
    g.reflection = reflection_new();
    g.work = work_queue_open(o->n_processor_threads, o->engine.max_queued_requests,
                             8 * (size_t)o->max_message_bytes);
    g.media = open_media(o);
    if (open_server(&g, &err)) { // do not wait for the workers to load
        log_error("gateway", "%s", err.msg);
        end_job();
    }
    if (wait_ready(&g, control, &w)) {
        log_info("gateway", "stopped before the model was loaded");
        health_end_watches(g.health);
        stop_workers(&g, control);
        goto out;
    }
    gethostname(g.ranks[0].host, sizeof(g.ranks[0].host) - 1);
    g.ranks[0].rss_bytes = own_rss_bytes();
    g.ranks[0].scratch_bytes = o->engine.vision_cache_bytes;
    g.ranks[0].load_ms = (clock_now_ns() - g.start_ns) / 1000000u;
    g.engine = engine_open(&o->engine, t, control, on_lost, &w);
    metrics = open_metrics(&g);
    serve(&g, &w);
out:
    metrics_close(metrics);
    rpc_server_close(g.server, CLOSE_MS);
    work_queue_close(g.work);
    media_store_close(g.media);
    if (g.engine)
        engine_close(g.engine);
    reflection_free(g.reflection);
    health_free(g.health);
    free(g.ranks);
    watch_close(&w);
    return 0;
}
