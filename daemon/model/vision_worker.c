/*
 * A vision rank (vision_worker.h).
 */
#include "daemon/model/vision_worker.h"

#include <math.h>
#include <stdlib.h>

#include "daemon/model/vision.h"
#include "daemon/model/worker_report.h"
#include "kernels/clock.h"
#include "kernels/log.h"
#include "kernels/trace.h"

static uint8_t has_not_finite(const float *x, size_t n)
{
    int ok = 1;
    for (size_t i = 0; i < n; i++)
        ok &= isfinite(x[i]) != 0;
    return !ok;
}

/* Where the features of a message land on the host, of as many native tiles as one may bring. */
struct landing {
    float *features;
    size_t capacity; // floats
};

/* One message of tiles to one message of features. */
static struct message *encode(struct vision_model *m, const struct message *request,
                              const struct landing *landing, struct capture_list *captures)
{
    struct tile_batch t;
    tile_batch_unpack(&t, request);
    uint64_t start = clock_now_ns();
    int32_t n_features = model_config_n_features(m->config, t.height, t.width);
    size_t n = (size_t)n_features * (size_t)m->config->text.hidden_size;
    size_t n_all = (size_t)t.n_tiles * n;
    float *larger = n_all > landing->capacity ? xcalloc(n_all, sizeof(*larger)) : NULL;
    float *features = larger ? larger : landing->features;
    uint8_t *not_finite = xcalloc((size_t)t.n_tiles + 1, sizeof(*not_finite));
    vision_forward(m, &t, features, captures);
    for (int32_t i = 0; i < t.n_tiles; i++)
        not_finite[i] = has_not_finite(features + (size_t)i * n, n);
    struct feature_result r = {.job_id = t.job_id,
                               .n_tiles = t.n_tiles,
                               .n_tokens_per_tile = n_features,
                               .dim = m->config->text.hidden_size,
                               .not_finite = not_finite,
                               .n_captured = captures->n,
                               .compute_ns = clock_now_ns() - start,
                               .features = features,
                               .captured = captures->items};
    trace_end("encode tiles", start, "tiles", t.n_tiles);
    struct message *reply = feature_result_pack(&r);
    free(not_finite);
    free(larger);
    capture_clear(captures);
    log_debug("vision", "job %llu: %d tiles in %.1f ms", (unsigned long long)t.job_id, t.n_tiles,
              (double)r.compute_ns / 1e6);
    return reply;
}

int vision_worker_run(const struct worker_options *o, const struct topology *t, struct control *c)
{
    uint64_t start = clock_now_ns();
    struct error err;
    struct weights w;
    struct vision_model m;
    struct capture_list captures = {0};
    struct landing landing = {0};
    struct backend *b = o->device->backend;
    if (weights_open(&w, o->model_dir, o->model, o->dummy_weights, &err) != 0)
        die("%s", err.msg);
    vision_init(&m, o->model, &w, b, o->dtype, o->max_vision_tiles, o->pixel_mean, o->pixel_std);
    worker_report_activations(&w);
    weights_release(&w);
    vision_record(&m);
    landing.capacity = (size_t)o->max_vision_tiles * (size_t)o->model->n_features_per_tile *
                       (size_t)o->model->text.hidden_size;
    landing.features = op_alloc_host(b, landing.capacity * sizeof(*landing.features));
    worker_report_ready(t, c, b, m.weight_bytes, 0, m.scratch_bytes, start);
    for (;;) {
        struct message *request = control_recv(c);
        int stop = request->type == CONTROL_STOP;
        if (request->type == CONTROL_TILES) {
            struct message *reply = encode(&m, request, &landing, &captures);
            worker_report_trace(c);
            control_reply(c, reply);
        } else if (!stop) {
            BUG("a vision rank got message type %d", (int)request->type);
        }
        message_unref(request);
        if (stop)
            break;
    }
    capture_release(&captures);
    op_free_host(b, landing.features);
    vision_release(&m);
    return 0;
}
