/*
 * Every tensor a checkpoint must hold: name, shape, where it lives, along which axis it is cut.
 *
 * One list, made from the config alone, serves three users: weights.c checks files against it
 * (missing, extra, mis-shaped), binds by it, and plan.c adds up bytes from it. Pure: reads no file.
 * The name is the one that Transformers writes for InternVLForConditionalGeneration; the other two
 * spellings are made from it.
 */
#ifndef INTERNVLD_MODEL_WEIGHT_LIST_H
#define INTERNVLD_MODEL_WEIGHT_LIST_H

#include <stddef.h>
#include <stdint.h>

#include "daemon/model/config.h"
#include "parallel/shard.h"

enum weight_home {
    HOME_VISION, // every vision rank
    HOME_FIRST,  // the first stage
    HOME_LAYER,  // the stage that has the layer
    HOME_LAST,   // the last stage
};

/* How T shards share a weight. */
enum weight_axis {
    AXIS_WHOLE,        // every shard has all of it
    AXIS_HEADS,        // rows, by query heads
    AXIS_KV_HEADS,     // rows, by kv heads
    AXIS_HEAD_COLUMNS, // columns, by query heads (o_proj: row-parallel)
    AXIS_MLP,          // rows, by the MLP's intermediate dimension
    AXIS_MLP_COLUMNS,  // columns, by the same (down_proj: row-parallel)
    AXIS_EXPERT,       // rows, by an expert's intermediate dimension
    AXIS_EXPERT_COLUMNS,
    AXIS_VOCAB, // rows, by the padded vocabulary
};

struct weight_spec {
    char name[96];
    int n_dims;
    int64_t shape[4];
    enum weight_home home;
    enum weight_axis axis;
    int layer;    // of HOME_LAYER; -1
    int optional; // lm_head, which a tied checkpoint leaves out
    /* How its values are held. Of a quantised one, group_size columns share a scale. */
    enum weight_kind kind;
    enum weight_format format;
    int64_t group_size;
    int has_zeros; // zero points
    int has_order; // every column names its group, and a shard keeps the scales of all
};

struct weight_list {
    struct weight_spec *specs; // [n], sorted by name
    int n, capacity;
};

void weight_list_init(struct weight_list *l, const struct model_config *c);
void weight_list_release(struct weight_list *l); // accepts a zeroed struct

/* NULL when the model has no such tensor. */
const struct weight_spec *weight_list_find(const struct weight_list *l, const char *name);

/* parts <- the weights that stand with *s in one linear, itself among them: q, k, v; gate, up
 * (weights.h). Returns how many. */
int weight_list_stack(const struct weight_list *l, const struct weight_spec *s,
                      const struct weight_spec *parts[3]);

/* Groups of a row that a quantised weight keeps for those columns. */
int64_t weight_spec_groups(const struct weight_spec *s, struct range columns);
/* Bytes of those rows and columns of a quantised weight: codes, scales and what goes with them. */
uint64_t weight_spec_quantized_bytes(const struct weight_spec *s, struct range rows,
                                     struct range columns);
int weight_spec_is_matrix(const struct weight_spec *s); // of a product, or a table
/* 1 when codes of both can stand in one weight (as far as their order need not be looked at). */
int weight_spec_is_like(const struct weight_spec *a, const struct weight_spec *b);
int64_t weight_spec_rows(const struct weight_spec *s);    // shape[0]
int64_t weight_spec_columns(const struct weight_spec *s); // product of the other dimensions, >= 1

/* One shard's cut of a language layer, for dense MLPs and for experts. */
struct weight_cut {
    struct layer_shard dense, expert;
    struct range vocab; // shard_vocab(): may reach past vocab_size (rows of zeros)
};
/* Error (INVALID_ARGUMENT) as layer_shard_init(). */
int weight_cut_init(struct weight_cut *cut, const struct text_config *t, int shard, int n_shards,
                    struct error *err);
/* The rows and columns of `s` that a shard has. */
void weight_cut_ranges(const struct weight_cut *cut, const struct text_config *t,
                       const struct weight_spec *s, struct range *rows, struct range *columns);

enum weight_naming {
    NAMING_HF,        // language_model.model.*, vision_tower.*: what Transformers writes
    NAMING_MEMORY,    // model.language_model.*, lm_head.*: its module names
    NAMING_OPENGVLAB, // vision_model.*, mlp1.*, packed attn.qkv
    NAMING_COUNT,
};
/* The tensor that holds `name` under another spelling, into buf; returned. *part: 0, 1, 2 when it
 * is the q, k, v third of a packed tensor's rows, else -1. */
const char *weight_disk_name(const char *name, enum weight_naming naming, char *buf, size_t n_bytes,
                             int *part);

#endif
