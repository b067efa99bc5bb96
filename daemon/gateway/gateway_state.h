/*
 * What the handlers of one gateway share. Set before the server starts, then only read; what
 * changes has its own lock inside.
 */
#ifndef INTERNVLD_GATEWAY_GATEWAY_STATE_H
#define INTERNVLD_GATEWAY_GATEWAY_STATE_H

#include <stdatomic.h>

#include "daemon/engine/engine.h"
#include "daemon/gateway/convert.h"
#include "daemon/gateway/gateway.h"
#include "daemon/gateway/health.h"
#include "daemon/gateway/media_store.h"
#include "daemon/gateway/reflection.h"
#include "daemon/gateway/rpc.h"
#include "daemon/gateway/work_queue.h"
#include "daemon/processor/processor.h"
#include "parallel/batch.h"
#include "parallel/topology.h"

/* Prompts and tiles of all requests together; past it new ones are refused. */
#define MAX_REQUEST_BYTES ((size_t)4 << 30)
#define MAX_UPLOADS 32 // at once

struct gateway {
    const struct gateway_options *options;
    const struct model_config *model;
    const struct topology *topology;
    const struct processor *processor;
    struct convert convert;
    struct engine *engine;
    struct work_queue *work;
    struct media_store *media;
    struct rpc_server *server;
    struct health *health;
    struct reflection *reflection;
    struct rank_info *ranks;     // [world]
    uint64_t start_ns;           // CLOCK_MONOTONIC
    atomic_size_t request_bytes; // of prepared requests whose calls are open
};

/* rpc_method.message of each method; `arg` is the struct gateway. */
void generate_message(void *arg, struct rpc_call *c);
void forward_message(void *arg, struct rpc_call *c);
void score_message(void *arg, struct rpc_call *c);
void embed_message(void *arg, struct rpc_call *c);
void tokenize_message(void *arg, struct rpc_call *c);
void model_info_message(void *arg, struct rpc_call *c);
void upload_message(void *arg, struct rpc_call *c);
void upload_ended(void *arg, struct rpc_call *c); // rpc_method.ended

/* Uploaded media that a conversation names; they stay until media_pins_release(). */
struct media_pins {
    struct media_store *store;
    struct arena *arena;
    struct media_pin *first;
};
/* convert_conversation() with what the media_ids stand for. `pins` is to be released whether it
 * fails or not, when the conversation's bytes are no longer read, before `a` is. */
int conversation_read(struct gateway *g, const Internvl__V1__ChatPrompt *wire, struct arena *a,
                      struct media_pins *pins, struct conversation *out, struct error *err);
void media_pins_release(struct media_pins *pins);

/* Processor thread: the prompt of a Generate or Forward into `r`. For a chat, *media [*n_media]
 * points into r's arena. */
int prompt_prepare(struct gateway *g, const Internvl__V1__Prompt *wire, struct arena *scratch,
                   struct request *r, struct media_plan **media, int *n_media, struct error *err);

#endif
