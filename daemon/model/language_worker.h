/*
 * A language rank: loads one shard of one stage, then runs batches until the gateway says stop.
 * Owns its weights, scratch and KV bytes; its step is a function of (batch, weights, KV pages).
 */
#ifndef INTERNVLD_MODEL_LANGUAGE_WORKER_H
#define INTERNVLD_MODEL_LANGUAGE_WORKER_H

#include "daemon/model/worker.h"
#include "parallel/control.h"

/* Runs until CONTROL_STOP; returns the exit status (0). Dies on bad weights. Shard 0 of each stage
 * replies to every batch: the last stage with samples and target log-probabilities, the others with
 * their captures. */
int language_worker_run(const struct worker_options *o, const struct topology *t,
                        struct control *c);

#endif
