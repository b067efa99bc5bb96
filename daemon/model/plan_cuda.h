/*
 * What a rank takes of its GPU: how the CUDA back end and the groups of ranks round, pad and double
 * what a plan adds up. Pure arithmetic, as plan.h, which alone uses it.
 *
 * Not in it, for nobody has measured them: the driver's context, NCCL's buffers, recorded graphs.
 */
#ifndef INTERNVLD_MODEL_PLAN_CUDA_H
#define INTERNVLD_MODEL_PLAN_CUDA_H

#include "daemon/model/plan.h"
#include "daemon/model/weight_list.h"

/* A block of cudaMalloc's. */
uint64_t plan_cuda_block(uint64_t n_bytes);
/* Of those rows and columns of a listed weight; a shard's lanes of columns where it has any, else
 * NULL. */
uint64_t plan_cuda_weight_bytes(const struct weight_spec *s, const struct weight_list *list,
                                struct range rows, struct range columns, const struct lanes *lanes,
                                const struct plan_settings *p);
/* Of the dense values that products with it want, which all of a rank's weights share. */
uint64_t plan_cuda_dense_bytes(const struct weight_spec *s, const struct weight_list *list,
                               const struct weight_cut *cut, const struct text_config *t,
                               enum dtype dtype);
/* Of the back end and, on a language rank, its groups. */
uint64_t plan_cuda_fixed_bytes(const struct plan_settings *p, const struct topology *t,
                               const struct model_config *c);

#endif
