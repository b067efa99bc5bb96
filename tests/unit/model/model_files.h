/*
 * Small checkpoints made by the tests: a config, and safetensors files with known numbers.
 */
#ifndef INTERNVLD_TESTS_UNIT_MODEL_MODEL_FILES_H
#define INTERNVLD_TESTS_UNIT_MODEL_MODEL_FILES_H

#include "daemon/model/config.h"
#include "daemon/model/weight_list.h"

/* A valid "-hf" config.json: Qwen2, 8 query and 4 kv heads, untied, float32. */
extern const char tiny_config[];
void tiny_config_parse(struct model_config *c);
/* tiny_config with the first `from` replaced by `to`; the caller frees. Fails when it is not there.
 */
char *config_with(const char *from, const char *to);

/* A new directory under the system's temporary one, removed by remove_directory(). */
void make_directory(char *path, size_t n_bytes);
void remove_directory(const char *path);
void write_file(const char *dir, const char *name, const void *bytes, size_t n_bytes);

/* How write_checkpoint() spoils its file. */
struct checkpoint_options {
    enum weight_naming naming;
    const char *leave_out, *reshape; // canonical names, or NULL
    const char *extra;               // name of one more tensor, or NULL
    const char *dtype;               // "F32" (default) or "BF16", "F16", "I32"
};
/* DIR/model.safetensors with every tensor of the config; element i of tensor `name` is
 * checkpoint_value(name, i). */
void write_checkpoint(const char *dir, const struct model_config *c,
                      const struct checkpoint_options *o);
/* Exact in bfloat16 and float16. */
float checkpoint_value(const char *name, int64_t i);

/* header (without its length) and data put together as a safetensors file; the caller frees. */
uint8_t *safetensors_bytes(const char *header, const void *data, size_t data_bytes,
                           size_t *n_bytes);

#endif
