/*
 * The reference set for tests: where it lies, its JSON, tensors and hashes. A file that is not
 * there is said in one line and the test goes on without it.
 *
 * The directory is INTERNVLD_REFERENCE, else what the build found (tests/data/reference, else
 * ../shared/reference beside the checkout); a file that it lacks (Qwen2's vocabulary is never in
 * the tree) is looked for in the latter too.
 */
#ifndef INTERNVLD_TESTS_PARITY_REFERENCE_H
#define INTERNVLD_TESTS_PARITY_REFERENCE_H

#include <cjson/cJSON.h>
#include <openssl/types.h>
#include <stddef.h>
#include <stdint.h>

/* DIR/NAME; one of a few static buffers. */
const char *reference_path(const char *name);
/* 1, or 0 after printing "skipped: NAME is not here". */
int reference_has(const char *name);
/* Whole file, NUL-terminated, caller frees. Dies when it cannot be read. */
char *reference_read(const char *name, size_t *n_bytes);
cJSON *reference_json(const char *name);
/* The next line of a JSON-lines text as an object, NULL at the end; advances *text. */
cJSON *reference_next_line(char **text);
/* Any path. */
char *file_read(const char *path, size_t *n_bytes);

/* Bytes of one tensor of a safetensors file, caller frees; its shape in shape[8]. NULL: no such
 * tensor. */
uint8_t *reference_tensor(const char *file, const char *tensor, int64_t *shape, size_t *n_bytes);

/* libcrypto's; sha256_hex(), in lower case, ends it and frees the context. */
struct sha256 {
    EVP_MD_CTX *context;
};
void sha256_init(struct sha256 *s);
void sha256_update(struct sha256 *s, const void *data, size_t n_bytes);
void sha256_hex(struct sha256 *s, char hex[65]);

/* cJSON shorthands; they die when the field is missing. */
const char *json_string(const cJSON *object, const char *name);
double json_number(const cJSON *object, const char *name);
const cJSON *json_item(const cJSON *object, const char *name);

#endif
