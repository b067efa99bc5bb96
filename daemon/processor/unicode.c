/*
 * UTF-8 walking and NFC. See unicode.h.
 *
 * NFC works on short runs: a text is cut before every code point that can neither change nor merge
 * with what stands before it, and a run of one such code point is copied. Only runs with combining
 * marks, Hangul jamo or singletons are decomposed, ordered and composed.
 */
#include "daemon/processor/unicode.h"

#include <stdlib.h>
#include <string.h>
#include <utf8proc.h>

#include "kernels/log.h"

int utf8_next(const char *s, size_t n_bytes, int32_t *code_point, int *incomplete)
{
    const uint8_t *b = (const uint8_t *)s;
    uint8_t low = 0x80, high = 0xbf; // of the second byte
    int n;
    int32_t c;

    if (incomplete)
        *incomplete = 0;
    if (b[0] < 0x80) {
        *code_point = b[0];
        return 1;
    }
    if (b[0] < 0xc2 || b[0] > 0xf4)
        return -1;
    if (b[0] < 0xe0) {
        n = 2;
        c = b[0] & 0x1f;
    } else if (b[0] < 0xf0) {
        n = 3;
        c = b[0] & 0x0f;
        low = b[0] == 0xe0 ? 0xa0 : low;   // overlong
        high = b[0] == 0xed ? 0x9f : high; // surrogates
    } else {
        n = 4;
        c = b[0] & 0x07;
        low = b[0] == 0xf0 ? 0x90 : low;
        high = b[0] == 0xf4 ? 0x8f : high; // above U+10FFFF
    }
    for (int i = 1; i < n; i++) {
        if ((size_t)i >= n_bytes) {
            if (incomplete)
                *incomplete = 1;
            return -i;
        }
        if (b[i] < low || b[i] > high)
            return -i;
        c = (int32_t)((uint32_t)c << 6 | (b[i] & 0x3fu));
        low = 0x80;
        high = 0xbf;
    }
    *code_point = c;
    return n;
}

size_t utf8_valid_prefix(const char *s, size_t n_bytes)
{
    size_t i = 0;

    while (i < n_bytes) {
        int32_t c;
        uint64_t word;

        while (n_bytes - i >= sizeof(word)) { // eight ASCII bytes at once
            memcpy(&word, s + i, sizeof(word));
            if (word & 0x8080808080808080ull)
                break;
            i += sizeof(word);
        }
        if (i == n_bytes)
            break;
        int n = utf8_next(s + i, n_bytes - i, &c, NULL);

        if (n < 0)
            break;
        i += (size_t)n;
    }
    return i;
}

int utf8_put(int32_t c, char out[4])
{
    uint32_t u = (uint32_t)c;

    if (u < 0x80) {
        out[0] = (char)u;
        return 1;
    }
    if (u < 0x800) {
        out[0] = (char)(0xc0 | u >> 6);
        out[1] = (char)(0x80 | (u & 0x3f));
        return 2;
    }
    if (u < 0x10000) {
        out[0] = (char)(0xe0 | u >> 12);
        out[1] = (char)(0x80 | (u >> 6 & 0x3f));
        out[2] = (char)(0x80 | (u & 0x3f));
        return 3;
    }
    out[0] = (char)(0xf0 | u >> 18);
    out[1] = (char)(0x80 | (u >> 12 & 0x3f));
    out[2] = (char)(0x80 | (u >> 6 & 0x3f));
    out[3] = (char)(0x80 | (u & 0x3f));
    return 4;
}

size_t utf8_lossy(const char *s, size_t n_bytes, char *out)
{
    size_t n_out = 0;

    for (size_t i = 0; i < n_bytes;) {
        int32_t c;
        int n = utf8_next(s + i, n_bytes - i, &c, NULL);

        if (n < 0) {
            memcpy(out + n_out, "\xef\xbf\xbd", 3);
            n_out += 3;
            n = -n;
        } else {
            memcpy(out + n_out, s + i, (size_t)n);
            n_out += (size_t)n;
        }
        i += (size_t)n;
    }
    return n_out;
}

void byte_buffer_append(struct byte_buffer *b, const char *s, size_t n)
{
    if (n > b->capacity - b->n) {
        size_t capacity = b->capacity ? b->capacity : 256;

        while (capacity - b->n < n)
            capacity *= 2;
        b->data = xrealloc(b->data, capacity, 1);
        b->capacity = capacity;
    }
    if (n)
        memcpy(b->data + b->n, s, n);
    b->n += n;
}

void byte_buffer_release(struct byte_buffer *b)
{
    free(b->data);
    *b = (struct byte_buffer){0};
}

/* Never changes under NFC and never merges with what precedes it. (A code point that starts a
 * composition is not inert: what follows it may change it.) */
static int is_inert(int32_t c)
{
    if (c < 0x300)
        return 1;
    if ((c >= 0x1100 && c <= 0x11ff) || (c >= 0xd7b0 && c <= 0xd7ff))
        return 0; // Hangul jamo: composed by arithmetic, not by the table
    const utf8proc_property_t *p = utf8proc_get_property(c);

    return p->combining_class == 0 && p->decomp_seqindex == UINT16_MAX &&
           p->comb_index == UINT16_MAX;
}

struct run_buffer { // scratch of one nfc_append() call
    int32_t *chars, *sorted;
    size_t capacity;
};

static void run_buffer_reserve(struct run_buffer *r, size_t n)
{
    if (n <= r->capacity)
        return;
    r->capacity = n > 2 * r->capacity ? n : 2 * r->capacity;
    r->chars = xrealloc(r->chars, r->capacity, sizeof(*r->chars));
    r->sorted = xrealloc(r->sorted, r->capacity, sizeof(*r->sorted));
}

static int combining_class(int32_t c)
{
    return (int)utf8proc_get_property(c)->combining_class;
}

/* UAX #15 canonical ordering: a stable counting sort of marks [n] by combining class. */
static void sort_marks(int32_t *marks, int32_t *sorted, size_t n)
{
    size_t first[257] = {0};

    for (size_t i = 0; i < n; i++)
        first[combining_class(marks[i]) + 1]++;
    for (int k = 0; k < 256; k++)
        first[k + 1] += first[k];
    for (size_t i = 0; i < n; i++)
        sorted[first[combining_class(marks[i])]++] = marks[i];
    memcpy(marks, sorted, n * sizeof(*marks));
}

static void order_marks(int32_t *chars, int32_t *sorted, size_t n)
{
    for (size_t i = 0; i < n;) {
        size_t end = i;
        int ordered = 1, last = 0;

        for (; end < n; end++) {
            int class = combining_class(chars[end]);

            if (class == 0)
                break;
            ordered = ordered && class >= last;
            last = class;
        }
        if (!ordered)
            sort_marks(chars + i, sorted, end - i);
        i = end + 1;
    }
}

/* One run: decompose, order, compose, encode. */
static void normalize_run(struct byte_buffer *out, struct run_buffer *r, const char *s,
                          size_t n_bytes)
{
    const utf8proc_option_t options = UTF8PROC_STABLE | UTF8PROC_COMPOSE;
    size_t n = 0;

    for (size_t i = 0; i < n_bytes;) {
        int32_t c;
        int boundary = 0;

        i += (size_t)utf8_next(s + i, n_bytes - i, &c, NULL);
        run_buffer_reserve(r, n + 32); // the longest canonical decomposition has 4 code points
        utf8proc_ssize_t k = utf8proc_decompose_char(c, r->chars + n, 32, options, &boundary);

        if (k < 0 || k > 32)
            BUG("utf8proc_decompose_char(U+%04X) returned %ld", (unsigned)c, (long)k);
        n += (size_t)k;
    }
    order_marks(r->chars, r->sorted, n);
    utf8proc_ssize_t n_composed = utf8proc_normalize_utf32(r->chars, (utf8proc_ssize_t)n, options);

    for (utf8proc_ssize_t i = 0; i < n_composed; i++) {
        char utf8[4];

        byte_buffer_append(out, utf8, (size_t)utf8_put(r->chars[i], utf8));
    }
}

void nfc_append(struct byte_buffer *out, const char *s, size_t n_bytes)
{
    struct run_buffer r = {0};
    size_t start = 0, copied = 0, i = 0; // [copied, start) is unchanged; [start, i) is the open run
    int run_changes = 0;

    while (i < n_bytes) {
        int32_t c;
        size_t n = (size_t)utf8_next(s + i, n_bytes - i, &c, NULL);

        if (is_inert(c)) {
            if (run_changes) {
                byte_buffer_append(out, s + copied, start - copied);
                normalize_run(out, &r, s + start, i - start);
                copied = i;
            }
            start = i;
            run_changes = 0;
        } else {
            run_changes = 1;
        }
        i += n;
    }
    byte_buffer_append(out, s + copied, run_changes ? start - copied : n_bytes - copied);
    if (run_changes)
        normalize_run(out, &r, s + start, n_bytes - start);
    free(r.chars);
    free(r.sorted);
}
