/*
 * What is said of a request at its end. See ticket_report.h.
 */
#include "daemon/engine/ticket_report.h"

#include "kernels/log.h"
#include "kernels/trace.h"

uint64_t since_us(uint64_t from_ns, uint64_t to_ns)
{
    return from_ns == 0 || to_ns < from_ns ? 0 : (to_ns - from_ns) / 1000;
}

void ticket_measure(const struct ticket *t, uint64_t now, struct usage *u, struct timing *m)
{
    const struct request *r = t->request;
    uint64_t first_step_ns = t->first_step_ns ? t->first_step_ns : now;
    *u = (struct usage){.prompt_tokens = r->n_ids,
                        .image_tokens = r->n_image_tokens,
                        .cached_tokens = t->n_cached_tokens,
                        .tiles = r->n_tiles,
                        .cached_tiles = t->n_cached_tiles};
    for (int32_t i = 0; i < r->n; i++)
        u->completion_tokens += t->beams ? t->beams->finished[i].n_ids : t->sequences[i].n_output;
    *m = (struct timing){.queue_us = since_us(r->arrival_ns, first_step_ns),
                         .media_us = r->media_ns / 1000,
                         .vision_us = since_us(t->vision_start_ns, t->vision_end_ns),
                         .prefill_us = since_us(t->first_step_ns, t->prefill_end_ns),
                         .first_token_us = since_us(r->arrival_ns, t->first_token_ns),
                         .total_us = since_us(r->arrival_ns, now),
                         .preemptions = t->n_preempted};
}

void request_log(const struct request *r, const struct usage *u, const struct timing *m,
                 enum finish_reason finish, const struct error *err)
{
    log_info("engine",
             "request %s: %d prompt tokens (%d of images), %d drawn, queue %.1f ms, vision %.1f "
             "ms, prefill %.1f ms, total %.1f ms, preempted %u times, %s%s%s",
             r->id, u->prompt_tokens, u->image_tokens, u->completion_tokens,
             (double)m->queue_us / 1e3, (double)m->vision_us / 1e3, (double)m->prefill_us / 1e3,
             (double)m->total_us / 1e3, m->preemptions,
             err                     ? error_code_name(err->code)
             : finish == FINISH_STOP ? "stop"
                                     : "length",
             err ? ": " : "", err ? err->msg : "");
}

void ticket_trace(const struct ticket *t)
{
    const struct request *r = t->request;
    uint64_t now = trace_begin(), begun = t->first_step_ns ? t->first_step_ns : now;
    if (now == 0)
        return;
    trace_phase(t->number, r->id, "request", r->arrival_ns, now);
    trace_phase(t->number, r->id, "queue", r->arrival_ns, begun);
    trace_phase(t->number, r->id, "vision", t->vision_start_ns, t->vision_end_ns);
    trace_phase(t->number, r->id, "prefill", t->first_step_ns, t->prefill_end_ns);
    trace_phase(t->number, r->id, "decode", t->prefill_end_ns, now);
}
