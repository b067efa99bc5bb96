/*
 * From the rows of a listed weight to codes and scales: one shard's part of a quantised weight.
 *
 * Whatever a group of a row is made from (the whole group, whoever owns its columns) is read by
 * every shard that has a column of it, so a value does not depend on the layout. Knows the
 * checkpoint through weights_row() only.
 */
#ifndef INTERNVLD_MODEL_WEIGHT_CODES_H
#define INTERNVLD_MODEL_WEIGHT_CODES_H

#include "daemon/model/weights.h"

/* Zeroed q <- an empty weight [n_rows, columns.n], held as `as`, whose columns are `columns` of it.
 * `codes` [n_rows, columns.n] is borrowed, the rest allocated. */
void weight_codes_init(struct quantized *q, const struct weight_spec *as, int64_t n_rows,
                       struct range columns, uint8_t *codes);
void weight_codes_release(struct quantized *q);
/* Rows q[first_row …] <- rows and columns of `s`, held as `as`, quantised from floats, rounded to
 * `dtype` before. Rows past its end are zeros. */
void weight_codes_quantize(struct quantized *q, int64_t first_row, const struct weights *w,
                           const struct weight_spec *s, const struct weight_spec *as,
                           struct range rows, struct range columns, enum dtype dtype,
                           int n_threads);

#endif
