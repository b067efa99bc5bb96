/*
 * From a listed weight to codes and scales: one shard's part of a quantised weight, made from rows
 * of floats or taken from a quantised checkpoint.
 *
 * Whatever a group of a row is made from (the whole group, whoever owns its columns) is read by
 * every shard that has a column of it, so a value does not depend on the layout. Knows the
 * checkpoint through weights_row() and weights_codes() only.
 */
#ifndef INTERNVLD_MODEL_WEIGHT_CODES_H
#define INTERNVLD_MODEL_WEIGHT_CODES_H

#include "daemon/model/weights.h"

/* Zeroed q <- an empty weight [n_rows, columns.n], held as `as`, whose columns are `columns` of it.
 * `codes` [n_rows, columns.n] is borrowed, the rest allocated. */
void weight_codes_init(struct quantized *q, const struct weights *w, const struct weight_spec *as,
                       int64_t n_rows, struct range columns, uint8_t *codes);
void weight_codes_release(struct quantized *q);
/* Rows q[first_row …] <- rows and columns of `s`, held as `as`: the checkpoint's codes, or else
 * quantised from floats, rounded to `dtype` before, by the threads of `b`. Rows past its end are
 * zeros. Returns the bytes read of the files. */
uint64_t weight_codes_read(struct quantized *q, int64_t first_row, const struct weights *w,
                           const struct weight_spec *s, const struct weight_spec *as,
                           struct range rows, struct range columns, enum dtype dtype,
                           struct backend *b);
/* Columns of one row of a weight of which the checkpoint has codes, as values [columns.n]. Returns
 * the bytes read. */
uint64_t weight_codes_values(const struct weights *w, const struct weight_spec *s, int64_t row,
                             struct range columns, float *values);

#endif
