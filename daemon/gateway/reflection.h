/*
 * Server reflection, v1 and v1alpha (the same bytes on the wire), from the descriptor set that the
 * proto folder embeds. Stateless; knows no service of ours in particular.
 */
#ifndef INTERNVLD_GATEWAY_REFLECTION_H
#define INTERNVLD_GATEWAY_REFLECTION_H

#include "daemon/gateway/rpc.h"

struct reflection;

struct reflection *reflection_new(void); // reads the embedded set
void reflection_free(struct reflection *r);
void reflection_answer(const struct reflection *r, struct rpc_call *c); // rpc_method.message

#endif
