/*
 * grpc.health.v1: Check and Watch for "" and "internvl.v1.InferenceService". One bit of state, and
 * the list of those who watch it.
 */
#ifndef INTERNVLD_GATEWAY_HEALTH_H
#define INTERNVLD_GATEWAY_HEALTH_H

#include "daemon/gateway/rpc.h"

struct health;

struct health *health_new(void);    // NOT_SERVING
void health_free(struct health *h); // once no call is open
/* Any thread; every watcher hears of it. */
void health_set_serving(struct health *h, int is_serving);
/* Ends every Watch with UNAVAILABLE, and later ones at once. Any thread. */
void health_end_watches(struct health *h);

void health_check(struct health *h, struct rpc_call *c); // rpc_method.message
void health_watch(struct health *h, struct rpc_call *c); // rpc_method.message

#endif
