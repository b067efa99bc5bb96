/*
 * Rank 0's life: waits for the workers, serves, drains. The only folder that knows RPC.
 */
#ifndef INTERNVLD_GATEWAY_GATEWAY_H
#define INTERNVLD_GATEWAY_GATEWAY_H

#include <stdint.h>

#include "daemon/engine/engine.h"
#include "daemon/gateway/auth.h"
#include "daemon/model/config.h"
#include "daemon/processor/processor.h"
#include "parallel/control.h"
#include "parallel/topology.h"

struct gateway_options {
    const char *listen;         // "HOST:PORT", "[V6]:PORT", "unix:PATH"
    const char *metrics_listen; // as `listen`, of GET /metrics; NULL: none
    const char *port_file;      // the bound address is written there; NULL: nowhere
    const struct auth *auth;    // NULL: no token is asked
    int64_t max_message_bytes, media_ttl_s;
    uint64_t media_store_bytes, max_media_bytes; // of all uploaded media, 0: none; of one
    int max_connections, n_processor_threads, drain_timeout_s;
    int32_t stream_interval;   // tokens
    const char *dtype_name;    // "float32", "bfloat16": what the workers compute with
    const char *kv_dtype_name; // or "int8": what keys and values are held in
    struct processor_limits limits;
    struct engine_config engine;
};

/* SIGTERM, SIGINT and SIGUSR1 must be blocked in every thread of the process. Takes READY from
 * every worker, serves until the first of those signals, drains, and returns 0. An address that
 * cannot be listened on, a second signal, or a lost rank ends the whole job with status 1. Every
 * worker has been told CONTROL_STOP when it returns. `processor` and `control` stay the caller's.
 */
int gateway_run(const struct gateway_options *o, const struct model_config *m,
                const struct topology *t, const struct processor *processor,
                struct control *control);

#endif
