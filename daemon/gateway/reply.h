/*
 * One Generate or Forward call on its way back: from the request's stream to wire messages, one
 * write in flight, until the stream is done and the call is closed.
 *
 * Made on the completion thread when the call's message is there; a processor thread then fills in
 * `request` and hands it to the engine with reply_submit(), or gives up with reply_refuse(). After
 * that only the completion thread touches it. It frees itself.
 */
#ifndef INTERNVLD_GATEWAY_REPLY_H
#define INTERNVLD_GATEWAY_REPLY_H

#include <stdint.h>

#include "daemon/engine/request.h"
#include "daemon/engine/stream.h"
#include "daemon/gateway/rpc.h"
#include "daemon/processor/processor.h"
#include "internvl/v1/internvl.pb-c.h"

struct gateway;
struct reply;

enum reply_kind { REPLY_GENERATE, REPLY_FORWARD };

struct reply *reply_new(struct gateway *g, struct rpc_call *c, enum reply_kind kind);
struct gateway *reply_gateway(const struct reply *r);
struct rpc_call *reply_call(const struct reply *r);

/* Processor thread, exactly one of the two, as its last act on the reply. */
/* Takes the request over. `media` [n_media] is copied; `outputs` is enum output of convert.h (0 for
 * Generate). */
void reply_submit(struct reply *r, struct request *request, const struct media_plan *media,
                  int n_media, uint32_t outputs);
void reply_refuse(struct reply *r, const struct error *err);

/* A media plan as the wire has it. */
void reply_media_plan(Internvl__V1__MediaPlan *out, const struct media_plan *plan,
                      int tokens_per_tile);
void reply_usage(Internvl__V1__Usage *out, const struct usage *u);
void reply_timing(Internvl__V1__Timing *out, const struct timing *t);

#endif
