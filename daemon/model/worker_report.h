/*
 * What both kinds of worker tell about themselves: CONTROL_READY and their part of the timeline.
 */
#ifndef INTERNVLD_MODEL_WORKER_REPORT_H
#define INTERNVLD_MODEL_WORKER_REPORT_H

#include <stdint.h>

#include "daemon/model/weights.h"
#include "kernels/backend.h"
#include "parallel/control.h"

/* Logs and sends CONTROL_READY; start_ns is when loading began. */
void worker_report_ready(const struct topology *t, struct control *c, const struct backend *b,
                         uint64_t weight_bytes, uint64_t kv_bytes, uint64_t scratch_bytes,
                         uint64_t start_ns);

/* With --activation-quantization fp8, logs how many of the rank's matrices that is of. */
void worker_report_activations(const struct weights *w);

/* Sends what the timeline has recorded since; nothing without a timeline. */
void worker_report_trace(struct control *c);

#endif
