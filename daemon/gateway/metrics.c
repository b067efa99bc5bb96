/*
 * Prometheus' text format, version 0.0.4. See metrics.h.
 */
#include "daemon/gateway/metrics.h"

#include <dirent.h>
#include <microhttpd.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#include "daemon/gateway/listener.h"
#include "kernels/log.h"

#define CONNECTIONS_MAX 16
#define CONNECTION_BYTES ((size_t)16 << 10) // of headers; there is no body to read
#define IDLE_S 30u
#define CONTENT_TYPE "text/plain; version=0.0.4; charset=utf-8"

struct metrics {
    struct metrics_options options;
    struct listener *listener;
    struct MHD_Daemon *http;
    double start_s; // of the process's serving, since the epoch
    char *model;    // the label's value, escaped
};

/* ---- the format ---- */

static void family(FILE *f, const char *name, const char *type, const char *help)
{
    fprintf(f, "# HELP %s %s\n# TYPE %s %s\n", name, help, name, type);
}

/* One series; `labels` follow the model's, "" or ",key=\"value\"". */
static void sample(FILE *f, const struct metrics *m, const char *name, const char *labels, double x)
{
    fprintf(f, "%s{model_name=\"%s\"%s} %.17g\n", name, m->model, labels, x);
}

static void single(FILE *f, const struct metrics *m, const char *name, const char *type,
                   const char *help, double x)
{
    family(f, name, type, help);
    sample(f, m, name, "", x);
}

static void write_histogram(FILE *f, const struct metrics *m, const char *name, const char *help,
                            const struct histogram *h)
{
    uint64_t n = 0;
    char full[96];

    family(f, name, "histogram", help);
    for (int i = 0; i < h->n_bounds; i++) {
        n += h->counts[i];
        fprintf(f, "%s_bucket{model_name=\"%s\",le=\"%.12g\"} %llu\n", name, m->model, h->bounds[i],
                (unsigned long long)n);
    }
    fprintf(f, "%s_bucket{model_name=\"%s\",le=\"+Inf\"} %llu\n", name, m->model,
            (unsigned long long)h->n);
    snprintf(full, sizeof(full), "%s_sum", name);
    sample(f, m, full, "", h->sum);
    snprintf(full, sizeof(full), "%s_count", name);
    sample(f, m, full, "", (double)h->n);
}

/* ---- what is told ---- */

static void write_state(FILE *f, const struct metrics *m, const struct engine_stats *s)
{
    int32_t n_waiting = s->n_waiting + (int32_t)work_queue_length(m->options.work);

    single(f, m, "internvld:num_requests_running", "gauge", "Requests that have begun to run.",
           s->n_running);
    single(f, m, "internvld:num_requests_waiting", "gauge",
           "Requests that wait: to be decoded, for their pictures, or for a place.", n_waiting);
    single(f, m, "internvld:kv_cache_usage_perc", "gauge",
           "Share of the KV cache's pages in use; 1 is all.",
           s->n_pages > 0 ? (double)s->n_pages_used / s->n_pages : 0);
    single(f, m, "internvld:num_preemptions_total", "counter",
           "Sequences whose pages were taken from them.", (double)s->n_preempted);
    single(f, m, "internvld:prompt_tokens_total", "counter",
           "Prompt tokens of requests whose prefill is over.", (double)s->n_prompt_tokens);
    single(f, m, "internvld:generation_tokens_total", "counter", "Tokens drawn.",
           (double)s->n_generated_tokens);
    single(f, m, "internvld:prefix_cache_queries_total", "counter",
           "Prompt tokens looked up in the prefix cache.", (double)s->n_prefix_queries_tokens);
    single(f, m, "internvld:prefix_cache_hits_total", "counter",
           "Prompt tokens found in the prefix cache.", (double)s->n_prefix_hits_tokens);
    single(f, m, "internvld:mm_cache_queries_total", "counter",
           "Tiles looked up in the cache of image features.", (double)s->n_vision_queries);
    single(f, m, "internvld:mm_cache_hits_total", "counter",
           "Tiles that needed no encoding: cached, or being encoded already.",
           (double)s->n_vision_hits);
    single(f, m, "internvld:iterations_total", "counter", "Steps of the language model.",
           (double)s->n_steps);
    single(f, m, "internvld:vision_tiles_total", "counter", "Tiles encoded.", (double)s->n_tiles);
}

static void write_media(FILE *f, const struct metrics *m)
{
    struct media_store_stats s;

    media_store_stats(m->options.media, &s);
    single(f, m, "internvld:media_store_bytes", "gauge",
           "Bytes of uploaded media, of uploads under way too.", (double)s.n_bytes);
    single(f, m, "internvld:media_store_entries", "gauge", "Uploaded media that are kept.",
           s.n_entries);
    single(f, m, "internvld:media_uploads_running", "gauge", "Uploads under way.", s.n_uploads);
    single(f, m, "internvld:media_store_queries_total", "counter",
           "Media looked up by their id for a request.", (double)s.n_queries);
    single(f, m, "internvld:media_store_hits_total", "counter",
           "Of those, media that were there; the others have expired or were never uploaded.",
           (double)s.n_hits);
}

static void write_ends(FILE *f, const struct metrics *m, const struct observations *o)
{
    static const struct {
        enum finish_reason reason;
        const char *labels;
    } reasons[] = {
        {FINISH_STOP, ",finished_reason=\"stop\""},
        {FINISH_LENGTH, ",finished_reason=\"length\""},
        {FINISH_CANCELLED, ",finished_reason=\"abort\""},
        {FINISH_ERROR, ",finished_reason=\"error\""},
    };

    family(f, "internvld:request_success_total", "counter",
           "Requests that have ended, by why (vLLM's name: the last two were no success).");
    for (size_t i = 0; i < sizeof(reasons) / sizeof(reasons[0]); i++)
        sample(f, m, "internvld:request_success_total", reasons[i].labels,
               (double)o->n_ended[reasons[i].reason]);
}

static void write_times(FILE *f, const struct metrics *m, const struct observations *o)
{
    write_histogram(f, m, "internvld:time_to_first_token_seconds",
                    "Arrival of a request to its first token.", &o->first_token);
    write_histogram(f, m, "internvld:inter_token_latency_seconds",
                    "Between two tokens of one candidate.", &o->inter_token);
    write_histogram(f, m, "internvld:e2e_request_latency_seconds",
                    "Arrival of a request to its last token.", &o->end_to_end);
    write_histogram(f, m, "internvld:request_queue_time_seconds",
                    "Arrival of a request to its first step.", &o->queue);
    write_histogram(f, m, "internvld:request_prefill_time_seconds",
                    "First step of a request to its last prompt token.", &o->prefill);
    write_histogram(f, m, "internvld:request_decode_time_seconds",
                    "First token of a request to its last.", &o->decode);
    write_histogram(f, m, "internvld:iteration_tokens_total", "Tokens in one step.",
                    &o->iteration_tokens);
    write_histogram(f, m, "internvld:vision_queue_seconds",
                    "Arrival of a request to its first tile on a vision rank.", &o->vision_queue);
    write_histogram(f, m, "internvld:vision_encode_seconds",
                    "First tile on a vision rank to the last features back.", &o->vision_encode);
}

enum stage_field { STAGE_BUSY, STAGE_IDLE, STAGE_COLLECTIVE };

static void write_stages(FILE *f, const struct metrics *m, const struct observations *o,
                         const char *name, const char *help, enum stage_field which)
{
    char labels[64];

    family(f, name, "counter", help);
    for (int i = 0; i < o->n_stages + o->n_vision; i++) {
        int is_language = i < o->n_stages;
        const struct stage_times *t = is_language ? &o->language[i] : &o->vision[i - o->n_stages];

        if (which == STAGE_COLLECTIVE && !is_language)
            continue;
        snprintf(labels, sizeof(labels), ",stage=\"%s%d\"", is_language ? "language" : "vision",
                 is_language ? i : i - o->n_stages);
        sample(f, m, name, labels,
               which == STAGE_BUSY   ? t->busy_s
               : which == STAGE_IDLE ? t->idle_s
                                     : t->collective_s);
    }
}

static int count_descriptors(void)
{
    DIR *d = opendir("/proc/self/fd");
    int n = 0;

    if (!d)
        return 0;
    for (const struct dirent *e; (e = readdir(d));)
        n += e->d_name[0] != '.';
    closedir(d);
    return n - 1; // the folder's own
}

static void write_process(FILE *f, const struct metrics *m)
{
    unsigned long long size = 0, resident = 0;
    double page = (double)sysconf(_SC_PAGESIZE);
    struct rusage used;
    struct rlimit limit;
    FILE *statm = fopen("/proc/self/statm", "re");

    if (statm) {
        if (fscanf(statm, "%llu %llu", &size, &resident) != 2)
            size = resident = 0;
        fclose(statm);
    }
    getrusage(RUSAGE_SELF, &used);
    getrlimit(RLIMIT_NOFILE, &limit);
    single(f, m, "process_cpu_seconds_total", "counter", "CPU time of the gateway.",
           (double)(used.ru_utime.tv_sec + used.ru_stime.tv_sec) +
               (double)(used.ru_utime.tv_usec + used.ru_stime.tv_usec) / 1e6);
    single(f, m, "process_resident_memory_bytes", "gauge", "Resident memory of the gateway.",
           (double)resident * page);
    single(f, m, "process_virtual_memory_bytes", "gauge", "Address space of the gateway.",
           (double)size * page);
    single(f, m, "process_open_fds", "gauge", "Open file descriptors of the gateway.",
           count_descriptors());
    single(f, m, "process_max_fds", "gauge", "Its limit of open file descriptors.",
           (double)limit.rlim_cur);
    single(f, m, "process_start_time_seconds", "gauge", "When it began to serve, since the epoch.",
           m->start_s);
}

static char *write_all(const struct metrics *m, size_t *n_bytes)
{
    struct engine_stats stats;
    struct observations o;
    char *text = NULL;
    FILE *f = open_memstream(&text, n_bytes);

    if (!f)
        die("out of memory");
    engine_observe(m->options.engine, &stats, &o);
    write_state(f, m, &stats);
    write_media(f, m);
    write_ends(f, m, &o);
    write_times(f, m, &o);
    write_stages(f, m, &o, "internvld:stage_busy_seconds_total",
                 "Time inside steps; a language stage's is that of its first shard.", STAGE_BUSY);
    write_stages(f, m, &o, "internvld:stage_idle_seconds_total",
                 "Time between steps, counted when the next one is over.", STAGE_IDLE);
    write_stages(f, m, &o, "internvld:collective_seconds_total",
                 "Time inside collectives and stage transfers, waiting for others included.",
                 STAGE_COLLECTIVE);
    observations_release(&o);
    write_process(f, m);
    if (fclose(f) != 0)
        die("out of memory");
    return text;
}

/* ---- HTTP ---- */

static enum MHD_Result answer(struct MHD_Connection *c, unsigned status, char *text, size_t n_bytes)
{
    struct MHD_Response *r = MHD_create_response_from_buffer(n_bytes, text, MHD_RESPMEM_MUST_FREE);
    enum MHD_Result result;

    if (!r) {
        free(text);
        return MHD_NO;
    }
    MHD_add_response_header(r, MHD_HTTP_HEADER_CONTENT_TYPE, CONTENT_TYPE);
    if (status == MHD_HTTP_UNAUTHORIZED)
        MHD_add_response_header(r, MHD_HTTP_HEADER_WWW_AUTHENTICATE, "Bearer");
    result = MHD_queue_response(c, status, r);
    MHD_destroy_response(r);
    return result;
}

static enum MHD_Result refuse(struct MHD_Connection *c, unsigned status, const char *sentence)
{
    char *text = strdup(sentence);

    return text ? answer(c, status, text, strlen(text)) : MHD_NO;
}

static int is_allowed(const struct metrics *m, struct MHD_Connection *c)
{
    const char *header;

    if (!m->options.auth)
        return 1;
    header = MHD_lookup_connection_value(c, MHD_HEADER_KIND, MHD_HTTP_HEADER_AUTHORIZATION);
    return header && auth_accepts(m->options.auth, header, strlen(header));
}

static enum MHD_Result handle(void *arg, struct MHD_Connection *c, const char *url,
                              const char *method, const char *version, const char *body,
                              size_t *n_body, void **state)
{
    const struct metrics *m = arg;
    size_t n_bytes;
    char *text;

    (void)version;
    (void)body;
    (void)state;
    if (*n_body > 0 || (strcmp(method, "GET") != 0 && strcmp(method, "HEAD") != 0))
        return refuse(c, MHD_HTTP_METHOD_NOT_ALLOWED, "only GET\n");
    if (!is_allowed(m, c))
        return refuse(c, MHD_HTTP_UNAUTHORIZED, "a bearer token is needed\n");
    if (strcmp(url, "/metrics") != 0)
        return refuse(c, MHD_HTTP_NOT_FOUND, "only /metrics\n");
    text = write_all(m, &n_bytes);
    return answer(c, MHD_HTTP_OK, text, n_bytes);
}

static void on_accepted(void *arg, int fd) // the listener's thread
{
    struct metrics *m = arg;
    struct sockaddr_storage address;
    socklen_t n = sizeof(address);

    memset(&address, 0, sizeof(address));
    if (getpeername(fd, (struct sockaddr *)&address, &n))
        n = sizeof(address.ss_family);
    MHD_add_connection(m->http, fd, (const struct sockaddr *)&address, n); // closes fd on failure
}

/* A label's value: backslash, quote and line feed are escaped. */
static char *escape_label(const char *s)
{
    char *out = xcalloc(2 * strlen(s) + 1, 1), *p = out;

    for (; *s; s++) {
        if (*s == '\\' || *s == '"' || *s == '\n')
            *p++ = '\\';
        *p++ = *s == '\n' ? 'n' : *s;
    }
    return out;
}

struct metrics *metrics_open(const struct metrics_options *o, struct error *err)
{
    struct listener *listener = listener_open(o->listen, CONNECTIONS_MAX, err);
    struct timespec now;
    struct metrics *m;

    if (!listener)
        return NULL;
    m = xcalloc(1, sizeof(*m));
    m->options = *o;
    m->listener = listener;
    m->model = escape_label(o->model_name);
    clock_gettime(CLOCK_REALTIME, &now);
    m->start_s = (double)now.tv_sec + (double)now.tv_nsec / 1e9;
    m->http =
        MHD_start_daemon(MHD_USE_EPOLL_INTERNAL_THREAD | MHD_USE_NO_LISTEN_SOCKET | MHD_USE_ITC, 0,
                         NULL, NULL, handle, m, MHD_OPTION_CONNECTION_LIMIT,
                         (unsigned)CONNECTIONS_MAX, MHD_OPTION_CONNECTION_TIMEOUT, IDLE_S,
                         MHD_OPTION_CONNECTION_MEMORY_LIMIT, CONNECTION_BYTES, MHD_OPTION_END);
    if (!m->http)
        die("cannot start the HTTP thread of --metrics-listen");
    listener_start(listener, on_accepted, m);
    return m;
}

const char *metrics_address(const struct metrics *m)
{
    return listener_address(m->listener);
}

void metrics_close(struct metrics *m)
{
    if (!m)
        return;
    listener_close(m->listener);
    MHD_stop_daemon(m->http);
    free(m->model);
    free(m);
}
