/*
 * A vision rank: loads the tower and the projector, then turns tile batches into features until the
 * gateway says stop. Owns its weights and scratch; knows nothing of requests.
 */
#ifndef INTERNVLD_MODEL_VISION_WORKER_H
#define INTERNVLD_MODEL_VISION_WORKER_H

#include "daemon/model/worker.h"
#include "parallel/control.h"

/* Runs until CONTROL_STOP; returns the exit status (0). Dies on bad weights. */
int vision_worker_run(const struct worker_options *o, const struct topology *t, struct control *c);

#endif
