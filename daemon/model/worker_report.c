/*
 * What both kinds of worker tell about themselves (worker_report.h).
 */
#include "daemon/model/worker_report.h"

#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "kernels/clock.h"
#include "kernels/log.h"
#include "kernels/trace.h"
#include "parallel/batch.h"

/* Resident bytes of this process: the second number of /proc/self/statm, in pages. 0: unknown. */
static uint64_t resident_bytes(void)
{
    unsigned long long total = 0, resident = 0;
    FILE *f = fopen("/proc/self/statm", "r");
    if (!f)
        return 0;
    if (fscanf(f, "%llu %llu", &total, &resident) != 2)
        resident = 0;
    fclose(f);
    return resident * (uint64_t)sysconf(_SC_PAGESIZE);
}

void worker_report_ready(const struct topology *t, struct control *c, const struct backend *b,
                         uint64_t weight_bytes, uint64_t kv_bytes, uint64_t scratch_bytes,
                         uint64_t start_ns)
{
    const double mib = 1 << 20;
    char role[64];
    struct rank_info info = {.rank = t->rank,
                             .weight_bytes = weight_bytes,
                             .kv_bytes = kv_bytes,
                             .scratch_bytes = scratch_bytes,
                             .rss_bytes = resident_bytes(),
                             .load_ms = (clock_now_ns() - start_ns) / 1000000};
    if (gethostname(info.host, sizeof(info.host) - 1) != 0)
        snprintf(info.host, sizeof(info.host), "unknown");
    snprintf(info.device, sizeof(info.device), "%s", b->ops->describe(b));
    log_info("model",
             "%s ready on %s (%s): weights %.1f MiB, KV %.1f MiB, scratch %.1f MiB, %llu ms",
             topology_describe(t, t->rank, role, sizeof(role)), info.host, info.device,
             (double)weight_bytes / mib, (double)kv_bytes / mib, (double)scratch_bytes / mib,
             (unsigned long long)info.load_ms);
    control_reply(c, rank_info_pack(&info));
}

void worker_report_activations(const struct weights *w)
{
    if (w->x_format != WEIGHT_FLOAT)
        log_info("model", "activations in %s: %d of %d products; the other weights are %s",
                 weight_format_name(w->x_format), w->n_x_rounded, w->n_products,
                 w->x_format == WEIGHT_FP8 ? "floats or have scales of groups"
                                           : "no integers or have columns in no order");
}

void worker_report_trace(struct control *c)
{
    const struct trace_span *spans;
    size_t n_bytes = (size_t)trace_take(&spans) * sizeof(*spans);
    if (n_bytes == 0)
        return;
    struct message *m = message_new(CONTROL_TRACE, n_bytes);
    memcpy(m->payload, spans, n_bytes);
    control_reply(c, m);
}
