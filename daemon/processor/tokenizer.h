/*
 * Qwen2's byte-level BPE from its files: text to ids and back. Immutable after open; any
 * thread may use it.
 *
 * Encoding (Transformers Qwen2Tokenizer): split out added tokens (they match the raw text), NFC on
 * the rest (utf8proc), the pre-tokenizer's pattern (PCRE2), bytes to the 256 printable stand-ins,
 * merges by rank. Knows no devices, no ranks, no chat.
 */
#ifndef INTERNVLD_PROCESSOR_TOKENIZER_H
#define INTERNVLD_PROCESSOR_TOKENIZER_H

#include <stddef.h>
#include <stdint.h>

#include "kernels/arena.h"
#include "kernels/error.h"

struct tokenizer;

/* Reads DIR/tokenizer.json, or where there is none vocab.json, merges.txt and the added tokens
 * (other models than BPE, or normalizers other than NFC / none, are refused by name). NULL and an
 * error when it cannot be used. */
struct tokenizer *tokenizer_open(const char *dir, struct error *err);
void tokenizer_close(struct tokenizer *t); // NULL allowed

/* Ids of `text` [n_bytes] (must be valid UTF-8, else INVALID_ARGUMENT with the offset of the first
 * bad byte) in memory of `a`. More than max_tokens: OUT_OF_RANGE (encoding stops early, so a long
 * text costs no more). */
int tokenizer_encode(const struct tokenizer *t, const char *text, size_t n_bytes,
                     int64_t max_tokens, struct arena *a, int32_t **ids, int64_t *n_ids,
                     struct error *err);
int32_t tokenizer_n_ids(const struct tokenizer *t); // one past the largest id
/* Bytes of one token: *n_bytes of them, not terminated; an unknown id is 0 bytes. Borrowed. */
const char *tokenizer_token_bytes(const struct tokenizer *t, int32_t id, size_t *n_bytes);
int tokenizer_is_special(const struct tokenizer *t, int32_t id);
int32_t tokenizer_token_id(const struct tokenizer *t,
                           const char *content); // of an added token or a vocab entry; -1

/* Whole text of ids: bytes to UTF-8 with U+FFFD for each broken part, as Python's errors="replace"
 * does. NUL-terminated in `a`; NULL past the arena's budget. */
char *tokenizer_decode(const struct tokenizer *t, const int32_t *ids, int64_t n_ids,
                       int skip_special, struct arena *a, size_t *n_bytes);

/* Incremental: text appears as soon as it can no longer change, never half a code point. Embedded,
 * no allocation. */
struct detokenizer {
    const struct tokenizer *tokenizer;
    int skip_special;
    int n_held; // bytes of an unfinished code point
    char held[8];
};
void detokenizer_init(struct detokenizer *d, const struct tokenizer *t, int skip_special);
/* Upper bound of what one push writes for this id. */
size_t detokenizer_max_bytes(const struct detokenizer *d, int32_t id);
/* Appends the new text of `id` to out (room for detokenizer_max_bytes()); returns bytes written.
 * The concatenation of all pushes and of the flush equals tokenizer_decode(). */
size_t detokenizer_push(struct detokenizer *d, int32_t id, char *out);
size_t detokenizer_flush(struct detokenizer *d, char *out /* [16] */);

#endif
