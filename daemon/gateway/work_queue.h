/*
 * The processor threads: a bounded queue of jobs and the few threads that run them, so that
 * decoding pictures and tokenising never hold up the completion thread. Knows no RPC.
 */
#ifndef INTERNVLD_GATEWAY_WORK_QUEUE_H
#define INTERNVLD_GATEWAY_WORK_QUEUE_H

#include <stddef.h>

#include "kernels/error.h"

struct work_queue;

/* max_bytes bounds the messages that waiting and running jobs hold together. */
struct work_queue *work_queue_open(int n_threads, int max_jobs, size_t max_bytes);
/* `run(arg)` will be called once, by one of the threads. RESOURCE_EXHAUSTED when jobs or bytes are
 * at their bound, UNAVAILABLE after work_queue_drain(): then it will not be called. Any thread. */
int work_queue_submit(struct work_queue *q, void (*run)(void *arg), void *arg, size_t n_bytes,
                      struct error *err);
int work_queue_length(struct work_queue *q); // waiting and running
/* No new jobs; returns 1 when all were done within timeout_ms. */
int work_queue_drain(struct work_queue *q, int timeout_ms);
/* Runs what waits, joins, frees. */
void work_queue_close(struct work_queue *q);

#endif
