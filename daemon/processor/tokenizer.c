/*
 * Text to ids. See tokenizer.h for the contract and tokenizer_tables.h for what is read here.
 *
 * A text is cut at added tokens; each segment between them is normalised and split by the pattern
 * into pieces; each piece is merged on its own. Pieces repeat, so a long text keeps a small table
 * of those it has met: an entry points at the ids that were written the first time.
 */
#include <stdlib.h>
#include <string.h>

#include "daemon/processor/tokenizer_tables.h"
#include "daemon/processor/unicode.h"
#include "kernels/log.h"

#define MAX_PIECE_BYTES ((size_t)2 << 20) // one pre-token; its merging takes 32 times as much
#define CACHE_MIN_BYTES 4096              // shorter texts do not repay the table
#define CACHE_SLOTS 4096
#define CACHE_TEXT_BYTES 24
#define MATCH_LIMIT 100000000u
#define MATCH_HEAP_KIB 65536u
#define JIT_STACK_BYTES ((size_t)1 << 20)

struct cached_piece {
    char text[CACHE_TEXT_BYTES];
    uint32_t n_bytes; // 0: free
    uint32_t n_ids;
    size_t first; // into encoder.ids
};

struct encoder { // one call of tokenizer_encode()
    const struct tokenizer *t;
    struct byte_buffer normalized;
    struct bpe_scratch bpe;
    struct cached_piece *cache; // [CACHE_SLOTS] or NULL
    pcre2_match_data *match;
    pcre2_match_context *context;
    pcre2_jit_stack *stack;
    int32_t *ids;
    size_t n_ids, capacity, max_ids;
    struct error *err;
};

/* Room for n more ids, within the caller's limit. */
static int reserve_ids(struct encoder *e, size_t n)
{
    if (n > e->max_ids - e->n_ids)
        return error_set(e->err, ERROR_OUT_OF_RANGE, "the text has more than %zu tokens",
                         e->max_ids);
    if (n > e->capacity - e->n_ids) {
        size_t capacity = e->capacity ? e->capacity : 64;

        while (capacity - e->n_ids < n)
            capacity *= 2;
        e->ids = xrealloc(e->ids, capacity, sizeof(*e->ids));
        e->capacity = capacity;
    }
    return 0;
}

static int put_ids(struct encoder *e, const int32_t *ids, size_t n)
{
    if (reserve_ids(e, n))
        return -1;
    memcpy(e->ids + e->n_ids, ids, n * sizeof(*ids));
    e->n_ids += n;
    return 0;
}

/* Appends ids [first, first + n) once more. */
static int repeat_ids(struct encoder *e, size_t first, size_t n)
{
    if (reserve_ids(e, n))
        return -1;
    memcpy(e->ids + e->n_ids, e->ids + first, n * sizeof(*e->ids));
    e->n_ids += n;
    return 0;
}

static int merge_piece(struct encoder *e, const char *s, size_t n_bytes)
{
    const struct tokenizer *t = e->t;

    if (n_bytes > MAX_PIECE_BYTES)
        return error_set(e->err, ERROR_INVALID_ARGUMENT,
                         "the text has one word of %zu bytes; at most %zu are accepted", n_bytes,
                         MAX_PIECE_BYTES);
    if (n_bytes / t->longest_token_bytes > e->max_ids - e->n_ids)
        return error_set(e->err, ERROR_OUT_OF_RANGE, "the text has more than %zu tokens",
                         e->max_ids);
    if (t->ignore_merges) {
        int32_t id = tokenizer_vocab_find(t, s, n_bytes);

        if (id >= 0)
            return put_ids(e, &id, 1);
    }
    size_t n = bpe_encode(&t->bpe, &e->bpe, s, n_bytes);

    return put_ids(e, e->bpe.ids, n);
}

static struct cached_piece *cache_slot(struct encoder *e, const char *s, size_t n_bytes)
{
    uint64_t h = n_bytes;

    if (!e->cache || n_bytes > CACHE_TEXT_BYTES || n_bytes < 2)
        return NULL;
    for (size_t i = 0; i < n_bytes; i += 8) {
        uint64_t word = 0;

        memcpy(&word, s + i, n_bytes - i < 8 ? n_bytes - i : 8);
        h = (h ^ word) * 0x9e3779b97f4a7c15ull;
        h ^= h >> 32;
    }
    return &e->cache[h % CACHE_SLOTS];
}

static int encode_piece(struct encoder *e, const char *s, size_t n_bytes)
{
    struct cached_piece *c = cache_slot(e, s, n_bytes);

    if (n_bytes == 0)
        return 0;
    if (c && c->n_bytes == n_bytes && memcmp(c->text, s, n_bytes) == 0)
        return repeat_ids(e, c->first, c->n_ids);
    size_t first = e->n_ids;

    if (merge_piece(e, s, n_bytes))
        return -1;
    if (c) {
        memcpy(c->text, s, n_bytes);
        c->n_bytes = (uint32_t)n_bytes;
        c->n_ids = (uint32_t)(e->n_ids - first);
        c->first = first;
    }
    return 0;
}

/* Split with behaviour Isolated: matches and what lies between them are pieces. */
static int encode_pieces(struct encoder *e, const char *s, size_t n_bytes)
{
    const PCRE2_SIZE *span = pcre2_get_ovector_pointer(e->match);
    size_t done = 0, from = 0; // [done, from) was passed over by empty matches

    while (from < n_bytes) {
        int rc = pcre2_match(e->t->pattern, (PCRE2_SPTR)s, n_bytes, from, PCRE2_NO_UTF_CHECK,
                             e->match, e->context);

        if (rc == PCRE2_ERROR_NOMATCH)
            break;
        if (rc < 0)
            return error_set(e->err, ERROR_INVALID_ARGUMENT,
                             "the text cannot be split into words within the limits (code %d)", rc);
        if (span[1] <= span[0] || span[0] < from) { // empty: go on behind the next code point
            int32_t c;
            int n = utf8_next(s + from, n_bytes - from, &c, NULL);

            from += (size_t)(n < 0 ? -n : n);
            continue;
        }
        if (encode_piece(e, s + done, span[0] - done) ||
            encode_piece(e, s + span[0], span[1] - span[0]))
            return -1;
        done = from = span[1];
    }
    return encode_piece(e, s + done, n_bytes - done);
}

static int encode_segment(struct encoder *e, const char *s, size_t n_bytes)
{
    if (n_bytes == 0)
        return 0;
    if (!e->t->nfc)
        return encode_pieces(e, s, n_bytes);
    e->normalized.n = 0;
    nfc_append(&e->normalized, s, n_bytes);
    return encode_pieces(e, e->normalized.data, e->normalized.n);
}

/* The longest added token that starts at s, or NULL. */
static const struct added_token *added_at(const struct tokenizer *t, const char *s, size_t n_bytes)
{
    uint8_t b = (uint8_t)*s;

    for (int i = t->first_added[b]; i < t->first_added[b + 1]; i++) {
        const struct added_token *a = &t->added[i];

        if (a->n_bytes <= n_bytes && memcmp(a->content, s, a->n_bytes) == 0)
            return a;
    }
    return NULL;
}

static int encode_text(struct encoder *e, const char *s, size_t n_bytes)
{
    size_t done = 0;

    for (size_t i = 0; i < n_bytes;) {
        const struct added_token *a = added_at(e->t, s + i, n_bytes - i);

        if (!a) {
            i++;
            continue;
        }
        if (encode_segment(e, s + done, i - done) || put_ids(e, &a->id, 1))
            return -1;
        done = i += a->n_bytes;
    }
    return encode_segment(e, s + done, n_bytes - done);
}

static void encoder_init(struct encoder *e, const struct tokenizer *t, size_t n_bytes,
                         int64_t max_tokens, struct error *err)
{
    *e = (struct encoder){.t = t, .max_ids = max_tokens > 0 ? (size_t)max_tokens : 0, .err = err};
    e->match = pcre2_match_data_create(1, NULL);
    e->context = pcre2_match_context_create(NULL);
    e->stack = pcre2_jit_stack_create(32768, JIT_STACK_BYTES, NULL);
    if (!e->match || !e->context)
        die("out of memory for a pattern match");
    pcre2_set_match_limit(e->context, MATCH_LIMIT);
    pcre2_set_heap_limit(e->context, MATCH_HEAP_KIB);
    if (e->stack)
        pcre2_jit_stack_assign(e->context, NULL, e->stack);
    if (n_bytes >= CACHE_MIN_BYTES)
        e->cache = xcalloc(CACHE_SLOTS, sizeof(*e->cache));
}

static void encoder_release(struct encoder *e)
{
    pcre2_match_data_free(e->match);
    pcre2_match_context_free(e->context);
    pcre2_jit_stack_free(e->stack);
    byte_buffer_release(&e->normalized);
    bpe_scratch_release(&e->bpe);
    free(e->cache);
    free(e->ids);
}

int tokenizer_encode(const struct tokenizer *t, const char *text, size_t n_bytes,
                     int64_t max_tokens, struct arena *a, int32_t **ids, int64_t *n_ids,
                     struct error *err)
{
    size_t n_valid = utf8_valid_prefix(text, n_bytes);
    struct encoder e;

    if (n_valid != n_bytes)
        return error_set(err, ERROR_INVALID_ARGUMENT,
                         "the text is not UTF-8: the byte at offset %zu is wrong", n_valid);
    encoder_init(&e, t, n_bytes, max_tokens, err);
    int rc = encode_text(&e, text, n_bytes);

    if (rc == 0) {
        *ids = arena_alloc(a, e.n_ids, sizeof(**ids));
        *n_ids = (int64_t)e.n_ids;
        if (!*ids)
            rc = error_set(err, ERROR_RESOURCE_EXHAUSTED,
                           "the request is larger than its memory budget");
        else if (e.n_ids)
            memcpy(*ids, e.ids, e.n_ids * sizeof(**ids));
    }
    encoder_release(&e);
    return rc;
}

int32_t tokenizer_n_ids(const struct tokenizer *t)
{
    return t->n_ids;
}

const char *tokenizer_token_bytes(const struct tokenizer *t, int32_t id, size_t *n_bytes)
{
    if (id < 0 || id >= t->n_ids) {
        *n_bytes = 0;
        return "";
    }
    *n_bytes = t->tokens[id].n_bytes;
    return t->bytes + t->tokens[id].offset;
}

int tokenizer_is_special(const struct tokenizer *t, int32_t id)
{
    return id >= 0 && id < t->n_ids && (t->tokens[id].flags & TOKEN_SPECIAL);
}

int32_t tokenizer_token_id(const struct tokenizer *t, const char *content)
{
    size_t n_bytes = strlen(content);
    char bytes[4096];

    if (n_bytes == 0 || n_bytes > sizeof(bytes))
        return -1;
    const struct added_token *a = added_at(t, content, n_bytes);

    if (a && a->n_bytes == n_bytes)
        return a->id;
    int64_t n = tokenizer_bytes_of(content, n_bytes, bytes);

    return n < 0 ? -1 : tokenizer_vocab_find(t, bytes, (size_t)n);
}
