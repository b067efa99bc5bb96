/*
 * Processor threads. See work_queue.h.
 */
#include "daemon/gateway/work_queue.h"

#include <errno.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

#include "kernels/log.h"
#include "kernels/trace.h"

struct work_queue;

struct work_thread {
    struct work_queue *queue;
    pthread_t thread;
    int index;
};

struct job {
    void (*run)(void *arg);
    void *arg;
    size_t n_bytes;
};

struct work_queue {
    int n_threads, max_jobs;
    size_t max_bytes;
    struct work_thread *threads; // [n_threads]
    pthread_mutex_t mutex;
    pthread_cond_t has_work, is_idle;
    struct job *jobs; // [max_jobs] ring
    int first, n_waiting, n_running;
    size_t n_bytes;
    int is_draining, is_closing;
};

static void *work_loop(void *arg)
{
    const struct work_thread *self = arg;
    struct work_queue *q = self->queue;
    char name[32];

    snprintf(name, sizeof(name), "processor %d", self->index);
    trace_name_thread(name);
    pthread_mutex_lock(&q->mutex);
    for (;;) {
        while (!q->n_waiting && !q->is_closing)
            pthread_cond_wait(&q->has_work, &q->mutex);
        if (!q->n_waiting)
            break;
        struct job job = q->jobs[q->first];
        q->first = (q->first + 1) % q->max_jobs;
        q->n_waiting--;
        q->n_running++;
        pthread_mutex_unlock(&q->mutex);
        uint64_t begin_ns = trace_begin();
        job.run(job.arg);
        trace_end("prepare", begin_ns, "bytes", (int64_t)job.n_bytes);
        pthread_mutex_lock(&q->mutex);
        q->n_running--;
        q->n_bytes -= job.n_bytes;
        if (!q->n_waiting && !q->n_running)
            pthread_cond_broadcast(&q->is_idle);
    }
    pthread_mutex_unlock(&q->mutex);
    return NULL;
}

struct work_queue *work_queue_open(int n_threads, int max_jobs, size_t max_bytes)
{
    struct work_queue *q = xcalloc(1, sizeof(*q));

    q->n_threads = n_threads;
    q->max_jobs = max_jobs;
    q->max_bytes = max_bytes;
    q->jobs = xcalloc((size_t)max_jobs, sizeof(*q->jobs));
    q->threads = xcalloc((size_t)n_threads, sizeof(*q->threads));
    pthread_mutex_init(&q->mutex, NULL);
    pthread_cond_init(&q->has_work, NULL);
    pthread_cond_init(&q->is_idle, NULL);
    for (int i = 0; i < n_threads; i++) {
        q->threads[i] = (struct work_thread){.queue = q, .index = i};
        if (pthread_create(&q->threads[i].thread, NULL, work_loop, &q->threads[i]))
            die("cannot start processor thread %d", i);
    }
    return q;
}

int work_queue_submit(struct work_queue *q, void (*run)(void *arg), void *arg, size_t n_bytes,
                      struct error *err)
{
    int result = -1;

    pthread_mutex_lock(&q->mutex);
    if (q->is_draining) {
        error_set(err, ERROR_UNAVAILABLE, "the server is shutting down");
    } else if (q->n_waiting == q->max_jobs) {
        error_set(err, ERROR_RESOURCE_EXHAUSTED,
                  "%d requests wait to be prepared, the limit (--max-queued-requests)",
                  q->max_jobs);
    } else if (n_bytes > q->max_bytes - q->n_bytes) {
        error_set(err, ERROR_RESOURCE_EXHAUSTED,
                  "requests that wait to be prepared hold %zu bytes, and this one's %zu pass the "
                  "limit of %zu",
                  q->n_bytes, n_bytes, q->max_bytes);
    } else {
        q->jobs[(q->first + q->n_waiting) % q->max_jobs] = (struct job){run, arg, n_bytes};
        q->n_waiting++;
        q->n_bytes += n_bytes;
        pthread_cond_signal(&q->has_work);
        result = 0;
    }
    pthread_mutex_unlock(&q->mutex);
    return result;
}

int work_queue_length(struct work_queue *q)
{
    int n;

    pthread_mutex_lock(&q->mutex);
    n = q->n_waiting + q->n_running;
    pthread_mutex_unlock(&q->mutex);
    return n;
}

int work_queue_drain(struct work_queue *q, int timeout_ms)
{
    struct timespec until;
    int status = 0;
    int is_idle;

    clock_gettime(CLOCK_REALTIME, &until);
    until.tv_sec += timeout_ms / 1000;
    until.tv_nsec += (long)(timeout_ms % 1000) * 1000000;
    if (until.tv_nsec >= 1000000000) {
        until.tv_sec++;
        until.tv_nsec -= 1000000000;
    }
    pthread_mutex_lock(&q->mutex);
    q->is_draining = 1;
    while ((q->n_waiting || q->n_running) && status != ETIMEDOUT)
        status = pthread_cond_timedwait(&q->is_idle, &q->mutex, &until);
    is_idle = !q->n_waiting && !q->n_running;
    pthread_mutex_unlock(&q->mutex);
    return is_idle;
}

void work_queue_close(struct work_queue *q)
{
    pthread_mutex_lock(&q->mutex);
    q->is_draining = 1;
    q->is_closing = 1;
    pthread_cond_broadcast(&q->has_work);
    pthread_mutex_unlock(&q->mutex);
    for (int i = 0; i < q->n_threads; i++)
        pthread_join(q->threads[i].thread, NULL);
    pthread_mutex_destroy(&q->mutex);
    pthread_cond_destroy(&q->has_work);
    pthread_cond_destroy(&q->is_idle);
    free(q->threads);
    free(q->jobs);
    free(q);
}
