/* Spans to lines of JSON, or to a list; see trace.h. */
#include "kernels/trace.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "kernels/clock.h"
#include "kernels/log.h"

#define LAST_BYTES 256 // room for the event that says that the file is full, and the end
#define LINE_BYTES 512

static struct {
    int is_on; // set once, before there are other threads
    /* the owner */
    pthread_mutex_t mutex; // guards the next block
    int fd;                // -1: none, or full
    uint64_t n_bytes, max_bytes;
    int n_threads; // that have a row
    uint64_t start_ns;
    /* a recorder */
    int64_t clock_offset_ns;
    struct trace_span *spans; // [n_spans]
    int n_spans, spans_capacity;
} trace = {.mutex = PTHREAD_MUTEX_INITIALIZER, .fd = -1};

static _Thread_local int own_row; // of rank 0's; 0: the thread has no name yet

/* ---- lines ---- */

static void write_line(const char *line, size_t n)
{
    ssize_t written = write(trace.fd, line, n);
    if (written < 0 || (size_t)written != n) {
        log_warn("trace", "the timeline ends here: %s",
                 written < 0 ? strerror(errno) : "the disk is full");
        close(trace.fd);
        trace.fd = -1;
    }
    trace.n_bytes += n;
}

/* Of one event, without the comma before it. */
static void add_event(const char *event)
{
    char line[LINE_BYTES + 8];
    pthread_mutex_lock(&trace.mutex);
    const char *before = trace.n_bytes ? ",\n" : "[\n";
    int n = snprintf(line, sizeof(line), "%s%s", before, event);
    if (trace.fd < 0) {
        ; // it ended
    } else if (trace.n_bytes + (uint64_t)n + LAST_BYTES <= trace.max_bytes) {
        write_line(line, (size_t)n);
    } else {
        n = snprintf(line, sizeof(line),
                     "%s{\"name\":\"the trace is full\",\"ph\":\"i\",\"s\":\"g\",\"ts\":%.3f,"
                     "\"pid\":0,\"tid\":0}\n]\n",
                     before, (double)(clock_now_ns() - trace.start_ns) / 1e3);
        write_line(line, (size_t)n);
        close(trace.fd);
        trace.fd = -1;
        log_warn("trace", "the timeline is full after %llu bytes",
                 (unsigned long long)trace.n_bytes);
    }
    pthread_mutex_unlock(&trace.mutex);
}

static double micros(uint64_t ns)
{
    return ns > trace.start_ns ? (double)(ns - trace.start_ns) / 1e3 : 0;
}

static void add_span(int rank, int row, const struct trace_span *s)
{
    char event[LINE_BYTES], args[64] = "";
    if (s->label[0])
        snprintf(args, sizeof(args), ",\"args\":{\"%.15s\":%lld}", s->label, (long long)s->value);
    snprintf(event, sizeof(event),
             "{\"name\":\"%.15s\",\"ph\":\"X\",\"ts\":%.3f,\"dur\":%.3f,\"pid\":%d,\"tid\":%d%s}",
             s->name, micros(s->begin_ns),
             s->end_ns > s->begin_ns ? micros(s->end_ns) - micros(s->begin_ns) : 0, rank, row,
             args);
    add_event(event);
}

static void add_name(const char *what, int rank, int row, const char *name)
{
    char event[LINE_BYTES];
    snprintf(event, sizeof(event),
             "{\"name\":\"%s\",\"ph\":\"M\",\"pid\":%d,\"tid\":%d,\"args\":{\"name\":\"%.64s\"}}",
             what, rank, row, name);
    add_event(event);
}

/* ---- the owner ---- */

int trace_open(const char *path, uint64_t max_bytes, struct error *err)
{
    trace.fd = open(path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
    if (trace.fd < 0)
        return error_set(err, ERROR_INVALID_ARGUMENT, "%.200s: %s", path, strerror(errno));
    trace.n_bytes = 0;
    trace.max_bytes = max_bytes;
    trace.n_threads = 0;
    trace.start_ns = clock_now_ns();
    trace.is_on = 1;
    return 0;
}

void trace_close(void)
{
    pthread_mutex_lock(&trace.mutex);
    if (trace.fd >= 0) {
        write_line("\n]\n", 3);
        if (trace.fd >= 0)
            close(trace.fd);
    }
    trace.fd = -1;
    free(trace.spans);
    trace.spans = NULL;
    trace.n_spans = trace.spans_capacity = 0;
    trace.start_ns = 0;
    trace.is_on = 0;
    pthread_mutex_unlock(&trace.mutex);
}

void trace_name_rank(int rank, const char *name)
{
    char event[LINE_BYTES];
    if (!trace.is_on)
        return;
    add_name("process_name", rank, 0, name);
    snprintf(event, sizeof(event),
             "{\"name\":\"process_sort_index\",\"ph\":\"M\",\"pid\":%d,\"tid\":0,\"args\":{"
             "\"sort_index\":%d}}",
             rank, rank);
    add_event(event);
}

void trace_name_thread(const char *name)
{
    if (!trace.is_on)
        return;
    pthread_mutex_lock(&trace.mutex);
    own_row = ++trace.n_threads;
    pthread_mutex_unlock(&trace.mutex);
    add_name("thread_name", 0, own_row, name);
}

void trace_rank(int rank, const struct trace_span *spans, int n)
{
    for (int i = 0; trace.is_on && i < n; i++)
        add_span(rank, 0, &spans[i]);
}

void trace_phase(uint64_t id, const char *text_id, const char *name, uint64_t begin_ns,
                 uint64_t end_ns)
{
    char event[LINE_BYTES];
    if (!trace.is_on || begin_ns == 0 || end_ns < begin_ns)
        return;
    for (int i = 0; i < 2; i++) {
        snprintf(event, sizeof(event),
                 "{\"name\":\"%s\",\"cat\":\"request\",\"ph\":\"%s\",\"id\":\"%llu\",\"ts\":%.3f,"
                 "\"pid\":0,\"tid\":0,\"args\":{\"request_id\":\"%.64s\"}}",
                 name, i == 0 ? "b" : "e", (unsigned long long)id,
                 micros(i == 0 ? begin_ns : end_ns), text_id);
        add_event(event);
    }
}

/* ---- a recorder ---- */

void trace_record(int64_t clock_offset_ns)
{
    trace.clock_offset_ns = clock_offset_ns;
    trace.is_on = 1;
}

static void keep(const struct trace_span *s)
{
    if (trace.n_spans == trace.spans_capacity) {
        trace.spans_capacity = trace.spans_capacity ? 2 * trace.spans_capacity : 64;
        trace.spans = xrealloc(trace.spans, (size_t)trace.spans_capacity, sizeof(*trace.spans));
    }
    trace.spans[trace.n_spans++] = *s;
}

int trace_take(const struct trace_span **spans)
{
    int n = trace.n_spans;
    *spans = trace.spans;
    trace.n_spans = 0;
    return n;
}

/* ---- both ---- */

uint64_t trace_begin(void)
{
    return trace.is_on ? clock_now_ns() : 0;
}

void trace_end(const char *name, uint64_t begin_ns, const char *label, int64_t value)
{
    if (!trace.is_on || begin_ns == 0)
        return;
    uint64_t offset = (uint64_t)trace.clock_offset_ns;
    struct trace_span s = {
        .begin_ns = begin_ns + offset, .end_ns = clock_now_ns() + offset, .value = value};
    snprintf(s.name, sizeof(s.name), "%s", name);
    snprintf(s.label, sizeof(s.label), "%s", label);
    if (trace.start_ns) // the owner
        add_span(0, own_row, &s);
    else
        keep(&s);
}
