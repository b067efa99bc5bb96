/*
 * UploadMedia: a client's stream into the media store.
 *
 * One message at a time: it is copied and hashed on a processor thread, which then asks for the
 * next, so that a fast client is held back by flow control and not by memory. The upload belongs to
 * whoever works on it: the completion thread while a message is awaited, a processor thread while
 * one is taken. It lives while the call is open or a job runs.
 *
 * The end of a stream and a cancel look alike until the call is closed: what was stored is
 * withdrawn when nobody took the answer.
 */
#include <stdatomic.h>
#include <stdlib.h>

#include "daemon/gateway/gateway_state.h"
#include "kernels/clock.h"
#include "kernels/log.h"

#define MAX_ELEMENTS 16 // of one message

struct upload {
    struct gateway *gateway;
    struct rpc_call *call;
    atomic_int n_refs;          // the call's, and that of a job
    struct media_upload *media; // NULL before the start, and when it has failed
    Internvl__V1__MediaKind kind;
    struct media_receipt receipt; // zero before the end
    enum error_code closed_why;
};

static void upload_unref(struct upload *u)
{
    if (atomic_fetch_sub(&u->n_refs, 1) != 1)
        return;
    media_upload_free(u->media);
    if (u->closed_why)
        media_store_withdraw(u->gateway->media, &u->receipt);
    rpc_call_unref(u->call);
    free(u);
}

static void upload_wake(void *state) // nothing is written before the end
{
    (void)state;
}

static void upload_closed(void *state, enum error_code why)
{
    struct upload *u = state;

    u->closed_why = why;
    rpc_finish(u->call, NULL, NULL); // of a cancelled call: lets go of what the library holds
    rpc_call_listen(u->call, NULL, NULL);
    upload_unref(u);
}

static struct upload *upload_new(struct gateway *g, struct rpc_call *c)
{
    static const struct rpc_events events = {upload_wake, upload_closed};
    struct upload *u = xcalloc(1, sizeof(*u));

    u->gateway = g;
    u->call = rpc_call_ref(c);
    atomic_init(&u->n_refs, 1);
    rpc_call_listen(c, &events, u);
    return u;
}

/* The room is given back at once, whenever the client hears of it. */
static void refuse(struct upload *u, const struct error *err)
{
    media_upload_free(u->media);
    u->media = NULL;
    rpc_finish(u->call, err, NULL);
}

/* ---- jobs ---- */

static int take_start(struct upload *u, const Internvl__V1__UploadMediaStart *m, struct error *err)
{
    int64_t n_bytes = -1;

    if (u->media)
        return error_set(err, ERROR_INVALID_ARGUMENT, "start comes twice");
    if (m->kind != INTERNVL__V1__MEDIA_KIND__MEDIA_KIND_IMAGE &&
        m->kind != INTERNVL__V1__MEDIA_KIND__MEDIA_KIND_VIDEO)
        return error_set(err, ERROR_INVALID_ARGUMENT,
                         "start.kind is %d; it must be MEDIA_KIND_IMAGE or MEDIA_KIND_VIDEO",
                         (int)m->kind);
    if (m->_n_bytes_case)
        n_bytes = m->n_bytes < INT64_MAX ? (int64_t)m->n_bytes : INT64_MAX;
    u->kind = m->kind;
    u->media = media_upload_begin(
        u->gateway->media,
        m->kind == INTERNVL__V1__MEDIA_KIND__MEDIA_KIND_VIDEO ? PART_VIDEO : PART_IMAGE, n_bytes,
        m->_sha256_case ? m->sha256 : NULL, err);
    return u->media ? 0 : -1;
}

static int take_message(struct upload *u, struct arena *scratch, struct error *err)
{
    const Internvl__V1__UploadMediaRequest *m =
        (const Internvl__V1__UploadMediaRequest *)rpc_take_message(
            u->call, &internvl__v1__upload_media_request__descriptor, MAX_ELEMENTS, scratch, err);

    if (!m)
        return -1;
    if (m->part_case == INTERNVL__V1__UPLOAD_MEDIA_REQUEST__PART_START)
        return take_start(u, m->start, err);
    if (m->part_case != INTERNVL__V1__UPLOAD_MEDIA_REQUEST__PART_CHUNK)
        return error_set(err, ERROR_INVALID_ARGUMENT, "a message is neither start nor chunk");
    if (!u->media)
        return error_set(err, ERROR_INVALID_ARGUMENT, "the first message must be start");
    return media_upload_add(u->media, m->chunk.data, m->chunk.len, err);
}

static void upload_take(void *arg)
{
    struct upload *u = arg;
    struct arena scratch = {0};
    struct error err = {0};
    int status = rpc_check_waiting(u->call, &err);

    if (!status)
        status = take_message(u, &scratch, &err);
    arena_release(&scratch);
    if (status)
        refuse(u, &err);
    else
        rpc_read_next(u->call);
    upload_unref(u);
}

static void upload_finish(void *arg)
{
    Internvl__V1__UploadMediaResponse response = INTERNVL__V1__UPLOAD_MEDIA_RESPONSE__INIT;
    struct upload *u = arg;
    struct error err = {0};

    if (rpc_check_waiting(u->call, &err) ||
        media_upload_finish(u->media, clock_now_ns(), &u->receipt, &err)) {
        refuse(u, &err);
    } else {
        response.media_id = u->receipt.id;
        response.n_bytes = u->receipt.n_bytes;
        response.kind = u->kind;
        response.ttl_seconds = (uint64_t)u->gateway->options->media_ttl_s;
        media_upload_free(u->media);
        u->media = NULL;
        rpc_finish(u->call, NULL, &response.base);
    }
    upload_unref(u);
}

/* ---- the completion thread ---- */

static void submit(struct upload *u, void (*run)(void *arg))
{
    struct error err;

    atomic_fetch_add(&u->n_refs, 1);
    if (work_queue_submit(u->gateway->work, run, u, rpc_message_bytes(u->call), &err)) {
        refuse(u, &err);
        upload_unref(u);
    }
}

void upload_message(void *arg, struct rpc_call *c)
{
    struct upload *u = rpc_call_state(c);

    submit(u ? u : upload_new(arg, c), upload_take);
}

void upload_ended(void *arg, struct rpc_call *c)
{
    struct upload *u = rpc_call_state(c);
    struct error err;

    (void)arg;
    if (u) {
        submit(u, upload_finish);
        return;
    }
    error_set(&err, ERROR_INVALID_ARGUMENT, "the call carries no message");
    rpc_finish(c, &err, NULL);
}
