/*
 * What is said of a request at its end: usage and timing for the reply, a line of the log, phases
 * of the timeline. Reads tickets and changes nothing; knows no stream and no engine.
 */
#ifndef INTERNVLD_ENGINE_TICKET_REPORT_H
#define INTERNVLD_ENGINE_TICKET_REPORT_H

#include "daemon/engine/scheduler.h"
#include "daemon/engine/stream.h"

/* Microseconds; 0 where the first has not been, or came later. */
uint64_t since_us(uint64_t from_ns, uint64_t to_ns);
/* Of a ticket whose request still is; `now` is CLOCK_MONOTONIC, ns. */
void ticket_measure(const struct ticket *t, uint64_t now, struct usage *u, struct timing *m);
/* One line. err NULL: all went well. */
void request_log(const struct request *r, const struct usage *u, const struct timing *m,
                 enum finish_reason finish, const struct error *err);
/* The request's way through the daemon; nothing where no timeline is written. */
void ticket_trace(const struct ticket *t);

#endif
