/*
 * The timeline: what every thread of every rank was doing, as Chrome trace events, which Perfetto
 * and chrome://tracing open.
 *
 * One rank owns the file (trace_open()): its spans are written at once. The others record theirs
 * (trace_record()) until trace_take() takes them, to be sent to the owner, who writes them with
 * trace_rank(). Neither was called: every function returns after one look at a flag, and no clock
 * is read. Knows no roles: names come from outside.
 *
 * The file is an array of events, a line each, written whole: a job that is killed leaves an array
 * without its "]", which both viewers take. A file that is full ends with an event that says so.
 */
#ifndef INTERNVLD_KERNELS_TRACE_H
#define INTERNVLD_KERNELS_TRACE_H

#include <stdint.h>

#include "kernels/error.h"

struct trace_span {
    uint64_t begin_ns, end_ns; // of the owner's clock
    int64_t value;             // what `label` says
    char name[16], label[16];  // of letters, digits, blanks, _; label "": no value
};

/* The owner, rank 0: never more than max_bytes go into the file. */
int trace_open(const char *path, uint64_t max_bytes, struct error *err);
/* A recorder, whose clock is clock_offset_ns behind the owner's. */
void trace_record(int64_t clock_offset_ns);
void trace_close(void); // of either; nothing without

/* Now, CLOCK_MONOTONIC; 0 when there is no trace. */
uint64_t trace_begin(void);
/* The calling thread did `name` from begin_ns, of trace_begin() or the same clock, until now.
 * Spans of a thread nest. Nothing when begin_ns is 0. */
void trace_end(const char *name, uint64_t begin_ns, const char *label, int64_t value);

/* The owner's side. Rows are (rank, thread); a thread of rank 0 names its own row. */
void trace_name_rank(int rank, const char *name);
void trace_name_thread(const char *name);
void trace_rank(int rank, const struct trace_span *spans, int n);
/* A phase of something that is no thread's; those of one id stand below each other and may nest.
 * Nothing when begin_ns is 0 or end_ns before it. */
void trace_phase(uint64_t id, const char *text_id, const char *name, uint64_t begin_ns,
                 uint64_t end_ns);

/* The recorder's side: what was recorded since; valid until the next span. 0: nothing. */
int trace_take(const struct trace_span **spans);

#endif
