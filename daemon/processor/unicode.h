/*
 * UTF-8 and NFC, as the tokenizer needs them. Pure functions on bytes; knows no tokens.
 *
 * Sources: Unicode 3.9 table 3-7 (well-formed UTF-8), UAX #15 (NFC). The data comes from utf8proc;
 * the ordering of combining marks is our own, because utf8proc's takes quadratic time on a long run
 * of them and a client may send one.
 */
#ifndef INTERNVLD_PROCESSOR_UNICODE_H
#define INTERNVLD_PROCESSOR_UNICODE_H

#include <stddef.h>
#include <stdint.h>

/* Length of the well-formed code point at s [n_bytes > 0], or minus the length of the maximal
 * broken part (at least 1). *incomplete (may be NULL) is set when the part runs into the end and
 * more bytes could make it whole. */
int utf8_next(const char *s, size_t n_bytes, int32_t *code_point, int *incomplete);
/* Offset of the first byte of `s` that is not part of well-formed UTF-8; n_bytes when all is. */
size_t utf8_valid_prefix(const char *s, size_t n_bytes);
/* Bytes written, 1 … 4. `c` is a Unicode scalar value. */
int utf8_put(int32_t c, char out[4]);
/* Every broken part becomes U+FFFD (Python's errors="replace", Rust's from_utf8_lossy). `out` has
 * room for 3 * n_bytes; returns bytes written. */
size_t utf8_lossy(const char *s, size_t n_bytes, char *out);

struct byte_buffer { // grows by doubling; zeroed is empty
    char *data;
    size_t n, capacity;
};
void byte_buffer_append(struct byte_buffer *b, const char *s, size_t n);
void byte_buffer_release(struct byte_buffer *b);

/* Appends the NFC form of s [n_bytes, well-formed] to `out`. */
void nfc_append(struct byte_buffer *out, const char *s, size_t n_bytes);

#endif
