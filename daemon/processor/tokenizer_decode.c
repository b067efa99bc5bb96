/*
 * Ids to text, whole and incremental. See tokenizer.h.
 */
#include <string.h>

#include "daemon/processor/tokenizer.h"
#include "daemon/processor/unicode.h"

static const char replacement[3] = {'\xef', '\xbf', '\xbd'}; // U+FFFD

void detokenizer_init(struct detokenizer *d, const struct tokenizer *t, int skip_special)
{
    *d = (struct detokenizer){.tokenizer = t, .skip_special = skip_special};
}

size_t detokenizer_max_bytes(const struct detokenizer *d, int32_t id)
{
    size_t n;

    tokenizer_token_bytes(d->tokenizer, id, &n);
    return 3 * (n + sizeof(d->held)); // every byte may be a broken part of its own
}

/* Joins the held bytes and the first of `s`; returns how many bytes of `s` were taken. */
static size_t finish_held(struct detokenizer *d, const char *s, size_t n_bytes, char *out,
                          size_t *n_out)
{
    char joined[8];
    size_t n_new = n_bytes < 4 ? n_bytes : 4;
    int32_t c;
    int incomplete;

    memcpy(joined, d->held, (size_t)d->n_held);
    memcpy(joined + d->n_held, s, n_new);
    int n = utf8_next(joined, (size_t)d->n_held + n_new, &c, &incomplete);

    if (incomplete) { // then n_new is n_bytes: three more bytes finish any code point
        memcpy(d->held, joined, (size_t)d->n_held + n_new);
        d->n_held += (int)n_new;
        return n_bytes;
    }
    size_t n_taken = (size_t)(n < 0 ? -n : n) - (size_t)d->n_held;

    memcpy(out, n < 0 ? replacement : joined, n < 0 ? sizeof(replacement) : (size_t)n);
    *n_out = n < 0 ? sizeof(replacement) : (size_t)n;
    d->n_held = 0;
    return n_taken;
}

size_t detokenizer_push(struct detokenizer *d, int32_t id, char *out)
{
    size_t n_bytes, n_out = 0, i = 0;
    const char *s = tokenizer_token_bytes(d->tokenizer, id, &n_bytes);

    if (n_bytes == 0 || (d->skip_special && tokenizer_is_special(d->tokenizer, id)))
        return 0;
    if (d->n_held > 0)
        i = finish_held(d, s, n_bytes, out, &n_out);
    while (i < n_bytes) {
        int32_t c;
        int incomplete;
        int n = utf8_next(s + i, n_bytes - i, &c, &incomplete);

        if (incomplete) {
            d->n_held = (int)(n_bytes - i);
            memcpy(d->held, s + i, n_bytes - i);
            break;
        }
        memcpy(out + n_out, n < 0 ? replacement : s + i, n < 0 ? sizeof(replacement) : (size_t)n);
        n_out += n < 0 ? sizeof(replacement) : (size_t)n;
        i += (size_t)(n < 0 ? -n : n);
    }
    return n_out;
}

size_t detokenizer_flush(struct detokenizer *d, char *out)
{
    if (d->n_held == 0)
        return 0;
    memcpy(out, replacement, sizeof(replacement)); // one unfinished code point is one broken part
    d->n_held = 0;
    return sizeof(replacement);
}

char *tokenizer_decode(const struct tokenizer *t, const int32_t *ids, int64_t n_ids,
                       int skip_special, struct arena *a, size_t *n_bytes)
{
    struct detokenizer d;
    size_t n_max = 16;

    detokenizer_init(&d, t, skip_special);
    for (int64_t i = 0; i < n_ids; i++) {
        size_t n;

        tokenizer_token_bytes(t, ids[i], &n);
        n_max += 3 * n; // ids [int64] of at most 4096 bytes each: no overflow before memory ends
    }
    char *out = arena_alloc(a, n_max, 1);
    size_t n_out = 0;

    if (!out)
        return NULL;
    for (int64_t i = 0; i < n_ids; i++)
        n_out += detokenizer_push(&d, ids[i], out + n_out);
    n_out += detokenizer_flush(&d, out + n_out);
    out[n_out] = '\0';
    *n_bytes = n_out;
    return out;
}
