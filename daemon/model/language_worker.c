/*
 * A language rank (language_worker.h).
 */
#include "daemon/model/language_worker.h"

#include <stdlib.h>

#include "daemon/model/language.h"
#include "daemon/model/worker_report.h"
#include "kernels/clock.h"
#include "kernels/log.h"
#include "kernels/trace.h"

static uint64_t waited_ns(const struct model_comm *comm)
{
    uint64_t ns = 0;
    if (comm && comm->shards)
        ns += comm->shards->wait_ns;
    if (comm && comm->stages)
        ns += comm->stages->wait_ns;
    return ns;
}

/* Runs one batch; shard 0 replies. */
static void step(struct language_model *m, struct control *c, const struct message *request,
                 struct capture_list *captures)
{
    struct batch b;
    struct language_output out;
    batch_unpack(&b, request);
    uint64_t start = clock_now_ns(), waited = waited_ns(m->comm);
    language_forward(m, &b, &out, captures);
    struct step_result r = {.step_id = b.step_id,
                            .stage = m->stage,
                            .n_samples = out.n_samples,
                            .n_targets = out.n_targets,
                            .n_captured = captures->n,
                            .compute_ns = clock_now_ns() - start,
                            .wait_ns = waited_ns(m->comm) - waited,
                            .samples = out.samples,
                            .targets = out.targets,
                            .captured = captures->items};
    log_debug("language", "step %llu: %d tokens, %d sequences in %.2f ms, %.2f waiting",
              (unsigned long long)b.step_id, b.n_tokens, b.n_sequences, (double)r.compute_ns / 1e6,
              (double)r.wait_ns / 1e6);
    trace_end("step", start, "step", (int64_t)b.step_id);
    worker_report_trace(c);
    if (m->shard == 0)
        control_reply(c, step_result_pack(&r));
    capture_clear(captures);
}

int language_worker_run(const struct worker_options *o, const struct topology *t, struct control *c)
{
    uint64_t start = clock_now_ns();
    struct error err;
    struct weights w;
    struct language_model m;
    struct capture_list captures = {0};
    struct language_limits limits = {.max_tokens = o->max_num_batched_tokens,
                                     .max_sequences = o->max_num_seqs,
                                     .max_model_len = o->max_model_len,
                                     .page_size = o->page_size,
                                     .n_pages = o->n_pages,
                                     .kv_dtype = o->kv_dtype};
    struct backend *b = o->device->backend;
    if (weights_open(&w, o->model_dir, o->model, o->dummy_weights, &err) != 0)
        die("%s", err.msg);
    language_init(&m, o->model, &w, b, o->dtype, t, &o->device->comm, &limits);
    worker_report_activations(&w);
    weights_release(&w);
    language_record(&m);
    worker_report_ready(t, c, b, m.weight_bytes, m.kv.n_bytes, m.scratch_bytes, start);
    for (;;) {
        struct message *request = control_recv(c);
        int stop = request->type == CONTROL_STOP;
        if (request->type == CONTROL_BATCH)
            step(&m, c, request, &captures);
        else if (!stop)
            BUG("a language rank got message type %d", (int)request->type);
        message_unref(request);
        if (stop)
            break;
    }
    capture_release(&captures);
    language_release(&m);
    return 0;
}
