/*
 * tokenizer.json to tables. Owns every refusal: what the file asks for is either done exactly or
 * named in the error. Sources: tokenizers' serialization of Qwen2Tokenizer (BPE, NFC, Split +
 * ByteLevel), GPT-2's bytes_to_unicode.
 */
#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "daemon/processor/config_file.h"
#include "daemon/processor/tokenizer_tables.h"
#include "daemon/processor/unicode.h"
#include "kernels/log.h"

#define FILE_NAME "tokenizer.json"
#define MAX_FILE_BYTES ((size_t)64 << 20)
#define MAX_ID (1 << 22)
#define MAX_TOKEN_BYTES 4096
#define MAX_ADDED 4096

static int refuse(struct error *err, const char *what)
{
    return error_set(err, ERROR_FAILED_PRECONDITION, FILE_NAME ": %s", what);
}

/* The 188 printable Latin-1 bytes stand for themselves, the others for U+0100 and up. */
static int is_printable_latin1(int b)
{
    return (b >= 0x21 && b <= 0x7e) || (b >= 0xa1 && b <= 0xac) || b >= 0xae;
}

int tokenizer_byte_of(int32_t code_point)
{
    if (code_point < 0x100)
        return is_printable_latin1(code_point) ? code_point : -1;
    int32_t k = code_point - 0x100; // the k-th byte that is not printable

    if (k <= 0x20)
        return k;
    if (k <= 0x42)
        return 0x7f + (k - 0x21);
    return k == 0x43 ? 0xad : -1;
}

int64_t tokenizer_bytes_of(const char *text, size_t n_bytes, char *out)
{
    int64_t n = 0;

    for (size_t i = 0; i < n_bytes;) {
        int32_t c;
        int k = utf8_next(text + i, n_bytes - i, &c, NULL);
        int byte = k < 0 ? -1 : tokenizer_byte_of(c);

        if (byte < 0)
            return -1;
        out[n++] = (char)byte;
        i += (size_t)k;
    }
    return n;
}

static uint64_t hash_bytes(const char *s, size_t n)
{
    uint64_t h = 0xcbf29ce484222325ull; // FNV-1a

    for (size_t i = 0; i < n; i++)
        h = (h ^ (uint8_t)s[i]) * 0x100000001b3ull;
    return h ^ h >> 29;
}

int32_t tokenizer_vocab_find(const struct tokenizer *t, const char *bytes, size_t n_bytes)
{
    size_t mask = t->n_vocab_slots - 1;

    for (size_t i = (size_t)hash_bytes(bytes, n_bytes) & mask;; i = (i + 1) & mask) {
        int32_t id = t->vocab_slots[i];

        if (id < 0)
            return -1;
        if (t->tokens[id].n_bytes == n_bytes &&
            memcmp(t->bytes + t->tokens[id].offset, bytes, n_bytes) == 0)
            return id;
    }
}

static void vocab_insert(struct tokenizer *t, int32_t id)
{
    const struct token *k = &t->tokens[id];
    size_t mask = t->n_vocab_slots - 1;
    size_t i = (size_t)hash_bytes(t->bytes + k->offset, k->n_bytes) & mask;

    while (t->vocab_slots[i] >= 0)
        i = (i + 1) & mask;
    t->vocab_slots[i] = id;
}

static int read_id(const cJSON *item, int32_t *id)
{
    double v = cJSON_IsNumber(item) ? item->valuedouble : -1;

    if (!(v >= 0 && v < MAX_ID) || v != floor(v))
        return -1;
    *id = (int32_t)v;
    return 0;
}

/* Sizes the tables: the largest id, the number of bytes that all tokens decode to at most. */
static int measure(struct tokenizer *t, const cJSON *vocab, const cJSON *added, size_t *n_vocab,
                   struct error *err)
{
    const cJSON *item;
    int32_t id, max_id = -1;
    size_t n_bytes = 0;

    *n_vocab = 0;
    cJSON_ArrayForEach(item, vocab)
    {
        if (read_id(item, &id))
            return refuse(err, "an id in model.vocab is not a whole number from 0 to 4194303");
        max_id = id > max_id ? id : max_id;
        n_bytes += strlen(item->string);
        ++*n_vocab;
    }
    cJSON_ArrayForEach(item, added)
    {
        const cJSON *content = cJSON_GetObjectItemCaseSensitive(item, "content");

        if (read_id(cJSON_GetObjectItemCaseSensitive(item, "id"), &id) || !cJSON_IsString(content))
            return refuse(err, "an entry of added_tokens has no id or no content");
        max_id = id > max_id ? id : max_id;
        n_bytes += strlen(content->valuestring);
        t->n_added++;
    }
    if (*n_vocab == 0)
        return refuse(err, "model.vocab is empty");
    if (t->n_added > MAX_ADDED)
        return refuse(err, "more than 4096 added_tokens");
    t->n_ids = max_id + 1;
    t->tokens = xcalloc((size_t)t->n_ids, sizeof(*t->tokens));
    t->bytes = xcalloc(n_bytes + 1, 1);
    t->added = xcalloc((size_t)t->n_added + 1, sizeof(*t->added));
    t->n_vocab_slots = 16;
    while (t->n_vocab_slots < 2 * *n_vocab)
        t->n_vocab_slots *= 2;
    t->vocab_slots = xcalloc(t->n_vocab_slots, sizeof(*t->vocab_slots));
    memset(t->vocab_slots, 0xff, t->n_vocab_slots * sizeof(*t->vocab_slots));
    return 0;
}

static int load_vocab(struct tokenizer *t, const cJSON *vocab, struct error *err)
{
    const cJSON *item;

    cJSON_ArrayForEach(item, vocab)
    {
        int32_t id = (int32_t)item->valuedouble;
        struct token *k = &t->tokens[id];
        int64_t n = tokenizer_bytes_of(item->string, strlen(item->string), t->bytes + t->n_bytes);

        if (n <= 0 || n > MAX_TOKEN_BYTES)
            return error_set(err, ERROR_FAILED_PRECONDITION,
                             FILE_NAME ": the model.vocab entry with id %d is %s", id,
                             n < 0    ? "not of the byte-level alphabet"
                             : n == 0 ? "empty"
                                      : "longer than 4096 bytes");
        if (k->n_bytes)
            return error_set(err, ERROR_FAILED_PRECONDITION,
                             FILE_NAME ": two model.vocab entries have the id %d", id);
        if (tokenizer_vocab_find(t, t->bytes + t->n_bytes, (size_t)n) >= 0)
            return error_set(err, ERROR_FAILED_PRECONDITION,
                             FILE_NAME ": the model.vocab entry with id %d is there twice", id);
        *k = (struct token){.offset = (uint32_t)t->n_bytes, .n_bytes = (uint32_t)n};
        t->n_bytes += (size_t)n;
        vocab_insert(t, id);
        if ((size_t)n > t->longest_token_bytes)
            t->longest_token_bytes = (size_t)n;
    }
    for (int b = 0; b < 256; b++) {
        char byte = (char)b;

        t->bpe.byte_ids[b] = tokenizer_vocab_find(t, &byte, 1);
        if (t->bpe.byte_ids[b] < 0)
            return error_set(err, ERROR_FAILED_PRECONDITION,
                             FILE_NAME ": no token for the byte 0x%02x: not a byte-level BPE", b);
    }
    return 0;
}

/* The two halves of a merge, "a b" or ["a", "b"], as pointers into the JSON text. */
static int merge_halves(const cJSON *item, const char *half[2], size_t n_bytes[2])
{
    if (cJSON_IsString(item)) {
        const char *space = strchr(item->valuestring, ' ');

        if (!space || strchr(space + 1, ' '))
            return -1;
        half[0] = item->valuestring;
        n_bytes[0] = (size_t)(space - half[0]);
        half[1] = space + 1;
    } else {
        const cJSON *left = cJSON_IsArray(item) ? item->child : NULL;

        if (!left || !left->next || left->next->next || !cJSON_IsString(left) ||
            !cJSON_IsString(left->next))
            return -1;
        half[0] = left->valuestring;
        n_bytes[0] = strlen(half[0]);
        half[1] = left->next->valuestring;
    }
    n_bytes[1] = strlen(half[1]);
    return 0;
}

static int load_merges(struct tokenizer *t, const cJSON *merges, struct error *err)
{
    const cJSON *item;
    uint32_t rank = 0;

    cJSON_ArrayForEach(item, merges)
    {
        const char *half[2];
        size_t n_text[2];
        char bytes[2 * MAX_TOKEN_BYTES];
        int64_t n[2] = {0, 0};
        int32_t ids[3] = {-1, -1, -1}; // left, right, merged

        if (merge_halves(item, half, n_text) == 0 && n_text[0] <= 2 * MAX_TOKEN_BYTES &&
            n_text[1] <= 2 * MAX_TOKEN_BYTES) {
            char *whole = xcalloc(n_text[0] + n_text[1] + 1, 1);

            n[0] = tokenizer_bytes_of(half[0], n_text[0], whole);
            n[1] = n[0] < 0 ? -1 : tokenizer_bytes_of(half[1], n_text[1], whole + n[0]);
            if (n[0] > 0 && n[1] > 0 && n[0] + n[1] <= (int64_t)sizeof(bytes)) {
                memcpy(bytes, whole, (size_t)(n[0] + n[1]));
                ids[0] = tokenizer_vocab_find(t, bytes, (size_t)n[0]);
                ids[1] = tokenizer_vocab_find(t, bytes + n[0], (size_t)n[1]);
                ids[2] = tokenizer_vocab_find(t, bytes, (size_t)(n[0] + n[1]));
            }
            free(whole);
        }
        if (ids[0] < 0 || ids[1] < 0 || ids[2] < 0)
            return error_set(err, ERROR_FAILED_PRECONDITION,
                             FILE_NAME ": merge %u is not two vocabulary entries whose "
                                       "concatenation is a third",
                             rank);
        bpe_add(&t->bpe, ids[0], ids[1], rank++, ids[2]);
    }
    return 0;
}

static int check_added_flags(const cJSON *item, int32_t id, int *special, struct error *err)
{
    static const char *const refused[] = {"single_word", "lstrip", "rstrip", "normalized"};

    for (size_t i = 0; i < sizeof(refused) / sizeof(refused[0]); i++) {
        int value = 0;

        if (config_bool(item, refused[i], &value, FILE_NAME ": added_tokens", err))
            return -1;
        if (value)
            return error_set(err, ERROR_FAILED_PRECONDITION,
                             FILE_NAME ": added token %d has \"%s\": true, which is not supported",
                             id, refused[i]);
    }
    return config_bool(item, "special", special, FILE_NAME ": added_tokens", err);
}

static int compare_added(const void *pa, const void *pb)
{
    const struct added_token *a = pa, *b = pb;
    int first_a = (uint8_t)a->content[0], first_b = (uint8_t)b->content[0];

    if (first_a != first_b)
        return first_a - first_b;
    if (a->n_bytes != b->n_bytes)
        return a->n_bytes < b->n_bytes ? 1 : -1;
    return a->id - b->id;
}

static int load_added(struct tokenizer *t, const cJSON *added, struct error *err)
{
    const cJSON *item;
    int n = 0;

    cJSON_ArrayForEach(item, added)
    {
        struct added_token *a = &t->added[n];
        const char *content = cJSON_GetObjectItemCaseSensitive(item, "content")->valuestring;
        int special = 0;

        a->id = (int32_t)cJSON_GetObjectItemCaseSensitive(item, "id")->valuedouble;
        if (check_added_flags(item, a->id, &special, err))
            return -1;
        a->n_bytes = strlen(content);
        if (a->n_bytes == 0 || a->n_bytes > MAX_TOKEN_BYTES ||
            utf8_valid_prefix(content, a->n_bytes) != a->n_bytes)
            return error_set(err, ERROR_FAILED_PRECONDITION,
                             FILE_NAME ": added token %d is empty, too long or not UTF-8", a->id);
        a->content = xstrdup(content);
        n++;
        struct token *k = &t->tokens[a->id];
        /* tokenizers' ByteLevel decoder: a token wholly of the alphabet decodes to what it stands
         * for, any other to its own bytes */
        int64_t n_decoded = tokenizer_bytes_of(content, a->n_bytes, t->bytes + t->n_bytes);

        if (n_decoded < 0) {
            memcpy(t->bytes + t->n_bytes, content, a->n_bytes);
            n_decoded = (int64_t)a->n_bytes;
        }
        if (k->flags & TOKEN_ADDED ||
            (k->n_bytes && (k->n_bytes != n_decoded ||
                            memcmp(t->bytes + k->offset, t->bytes + t->n_bytes, k->n_bytes))))
            return error_set(err, ERROR_FAILED_PRECONDITION,
                             FILE_NAME ": the id %d of an added token is another token's", a->id);
        k->offset = (uint32_t)t->n_bytes;
        k->n_bytes = (uint32_t)n_decoded;
        k->flags = TOKEN_ADDED | (special ? TOKEN_SPECIAL : 0);
        t->n_bytes += (size_t)n_decoded;
        if (a->n_bytes > t->longest_token_bytes)
            t->longest_token_bytes = a->n_bytes;
    }
    qsort(t->added, (size_t)t->n_added, sizeof(*t->added), compare_added);
    for (int b = 0, i = 0; b <= 256; b++) {
        while (i < t->n_added && (uint8_t)t->added[i].content[0] < b)
            i++;
        t->first_added[b] = i;
    }
    return 0;
}

/* Oniguruma's \s is the White_Space property; PCRE2's has U+180E besides. Writes it out. */
static char *explicit_whitespace(const char *pattern, struct error *err)
{
    static const char members[] = "\\x{9}-\\x{d}\\x{20}\\x{85}\\x{a0}\\x{1680}\\x{2000}-\\x{200a}"
                                  "\\x{2028}\\x{2029}\\x{202f}\\x{205f}\\x{3000}";
    struct byte_buffer out = {0};
    int in_class = 0;

    for (const char *p = pattern; *p; p++) {
        if (*p == '\\' && p[1]) {
            int is_space = p[1] == 's', is_other = p[1] == 'S';

            if (is_other && in_class) {
                refuse(err, "the Split pattern has \\S inside a class, which is not supported");
                byte_buffer_release(&out);
                return NULL;
            }
            if (is_space || is_other) {
                if (!in_class)
                    byte_buffer_append(&out, is_space ? "[" : "[^", is_space ? 1 : 2);
                byte_buffer_append(&out, members, strlen(members));
                if (!in_class)
                    byte_buffer_append(&out, "]", 1);
            } else {
                byte_buffer_append(&out, p, 2);
            }
            p++;
            continue;
        }
        in_class = *p == '[' ? 1 : *p == ']' ? 0 : in_class;
        byte_buffer_append(&out, p, 1);
    }
    byte_buffer_append(&out, "", 1);
    return out.data;
}

static int compile_pattern(struct tokenizer *t, const char *regex, struct error *err)
{
    int code;
    PCRE2_SIZE offset;

    if (strlen(regex) > 4096)
        return refuse(err, "the Split pattern is longer than 4096 bytes");
    char *pattern = explicit_whitespace(regex, err);

    if (!pattern)
        return -1;
    t->pattern = pcre2_compile((PCRE2_SPTR)pattern, PCRE2_ZERO_TERMINATED, PCRE2_UTF | PCRE2_UCP,
                               &code, &offset, NULL);
    free(pattern);
    if (!t->pattern) {
        char message[160] = "";

        pcre2_get_error_message(code, (PCRE2_UCHAR *)message, sizeof(message));
        return error_set(err, ERROR_FAILED_PRECONDITION, FILE_NAME ": the Split pattern: %s",
                         message);
    }
    pcre2_jit_compile(t->pattern, PCRE2_JIT_COMPLETE); // where there is no JIT it is interpreted
    return 0;
}

static const char *type_of(const cJSON *object)
{
    const cJSON *type = cJSON_GetObjectItemCaseSensitive(object, "type");

    return cJSON_IsString(type) ? type->valuestring : "";
}

static int is_true(const cJSON *object, const char *name)
{
    return cJSON_IsTrue(cJSON_GetObjectItemCaseSensitive(object, name));
}

static int load_normalizer(struct tokenizer *t, const cJSON *root, struct error *err)
{
    const cJSON *n = cJSON_GetObjectItemCaseSensitive(root, "normalizer");

    if (n && strcmp(type_of(n), "Sequence") == 0) {
        n = cJSON_GetObjectItemCaseSensitive(n, "normalizers");
        n = cJSON_GetArraySize(n) == 1 ? n->child : n;
    }
    t->nfc = n && strcmp(type_of(n), "NFC") == 0;
    if (n && !cJSON_IsNull(n) && !t->nfc)
        return refuse(err, "the normalizer is neither NFC nor null");
    return 0;
}

static int load_pre_tokenizer(struct tokenizer *t, const cJSON *root, struct error *err)
{
    const cJSON *p = cJSON_GetObjectItemCaseSensitive(root, "pre_tokenizer");
    const cJSON *list = cJSON_GetObjectItemCaseSensitive(p, "pretokenizers");
    const cJSON *split = cJSON_IsArray(list) ? list->child : NULL;
    const cJSON *bytes = split ? split->next : NULL;
    const cJSON *behavior = cJSON_GetObjectItemCaseSensitive(split, "behavior");
    const cJSON *regex = cJSON_GetObjectItemCaseSensitive(
        cJSON_GetObjectItemCaseSensitive(split, "pattern"), "Regex");

    if (strcmp(type_of(p), "Sequence") || !bytes || bytes->next ||
        strcmp(type_of(split), "Split") || strcmp(type_of(bytes), "ByteLevel"))
        return refuse(err, "the pre_tokenizer is not a Sequence of Split and ByteLevel");
    if (!cJSON_IsString(regex))
        return refuse(err, "the Split pre_tokenizer has no Regex pattern");
    if (!cJSON_IsString(behavior) || strcmp(behavior->valuestring, "Isolated") ||
        is_true(split, "invert"))
        return refuse(err, "the Split pre_tokenizer is not Isolated, or it is inverted");
    if (is_true(bytes, "add_prefix_space") || is_true(bytes, "use_regex"))
        return refuse(err, "the ByteLevel pre_tokenizer has add_prefix_space or use_regex");
    return compile_pattern(t, regex->valuestring, err);
}

/* Nothing may be added around the ids, and the decoder must be the byte-level one. */
static int check_ends(const cJSON *root, struct error *err)
{
    const cJSON *post = cJSON_GetObjectItemCaseSensitive(root, "post_processor");
    const cJSON *decoder = cJSON_GetObjectItemCaseSensitive(root, "decoder");
    const char *type = type_of(post);
    const cJSON *item;

    if (post && !cJSON_IsNull(post) && strcmp(type, "ByteLevel") &&
        strcmp(type, "TemplateProcessing"))
        return refuse(err, "the post_processor is neither ByteLevel, TemplateProcessing nor null");
    cJSON_ArrayForEach(item, cJSON_GetObjectItemCaseSensitive(post, "single"))
    {
        if (!cJSON_GetObjectItemCaseSensitive(item, "Sequence"))
            return refuse(err, "the post_processor adds tokens, which is not supported");
    }
    if (strcmp(type_of(decoder), "ByteLevel"))
        return refuse(err, "the decoder is not ByteLevel");
    return 0;
}

static int check_model(const cJSON *model, struct error *err)
{
    static const char *const affixes[] = {"continuing_subword_prefix", "end_of_word_suffix"};

    if (model && *type_of(model) && strcmp(type_of(model), "BPE"))
        return error_set(err, ERROR_FAILED_PRECONDITION, FILE_NAME ": the model is \"%.32s\"; %s",
                         type_of(model), "BPE is supported");
    for (int i = 0; i < 2; i++) {
        const char *affix = config_string(model, affixes[i], FILE_NAME, err);

        if (err->code)
            return -1;
        if (affix && *affix)
            return error_set(err, ERROR_FAILED_PRECONDITION,
                             FILE_NAME ": model.%s is not supported", affixes[i]);
    }
    const cJSON *dropout = cJSON_GetObjectItemCaseSensitive(model, "dropout");

    if (dropout && !cJSON_IsNull(dropout) && dropout->valuedouble != 0)
        return refuse(err, "model.dropout is not supported");
    if (is_true(model, "byte_fallback"))
        return refuse(err, "model.byte_fallback is not supported");
    if (!cJSON_IsObject(cJSON_GetObjectItemCaseSensitive(model, "vocab")) ||
        !cJSON_IsArray(cJSON_GetObjectItemCaseSensitive(model, "merges")))
        return refuse(err, "model.vocab is not an object or model.merges is not a list");
    return 0;
}

static int load(struct tokenizer *t, const cJSON *root, struct error *err)
{
    const cJSON *model = cJSON_GetObjectItemCaseSensitive(root, "model");
    const cJSON *vocab = cJSON_GetObjectItemCaseSensitive(model, "vocab");
    const cJSON *merges = cJSON_GetObjectItemCaseSensitive(model, "merges");
    const cJSON *added = cJSON_GetObjectItemCaseSensitive(root, "added_tokens");
    size_t n_vocab;

    if (check_model(model, err) || check_ends(root, err) || load_normalizer(t, root, err) ||
        load_pre_tokenizer(t, root, err) || measure(t, vocab, added, &n_vocab, err))
        return -1;
    bpe_init(&t->bpe, (size_t)cJSON_GetArraySize(merges));
    t->ignore_merges = is_true(model, "ignore_merges");
    if (load_vocab(t, vocab, err) || load_merges(t, merges, err) || load_added(t, added, err))
        return -1;
    return 0;
}

static struct tokenizer *tokenizer_from_tree(const cJSON *root, struct error *err)
{
    struct tokenizer *t = xcalloc(1, sizeof(*t));

    if (load(t, root, err)) {
        tokenizer_close(t);
        return NULL;
    }
    return t;
}

struct tokenizer *tokenizer_from_json(const char *text, size_t n_bytes, struct error *err)
{
    cJSON *root = cJSON_ParseWithLength(text, n_bytes);
    struct tokenizer *t = NULL;

    if (cJSON_IsObject(root))
        t = tokenizer_from_tree(root, err);
    else
        refuse(err, "not a JSON object");
    cJSON_Delete(root);
    return t;
}

static struct tokenizer *open_parts(const char *dir, struct error *err)
{
    cJSON *root = tokenizer_tree_from_parts(dir, err);

    if (!root)
        return NULL;
    struct tokenizer *t = tokenizer_from_tree(root, err);
    struct error cause = *err;

    cJSON_Delete(root);
    if (!t) // what was refused stands in vocab.json, merges.txt or the added tokens
        error_set(err, cause.code, "%s: vocab.json and merges.txt, read as %s", dir, cause.msg);
    return t;
}

struct tokenizer *tokenizer_open(const char *dir, struct error *err)
{
    size_t n_bytes;
    char *text = config_file_read(dir, FILE_NAME, MAX_FILE_BYTES, &n_bytes, err);

    if (!text)
        return err->code == ERROR_OK ? open_parts(dir, err) : NULL;
    struct tokenizer *t = tokenizer_from_json(text, n_bytes, err);

    free(text);
    return t;
}

void tokenizer_close(struct tokenizer *t)
{
    if (!t)
        return;
    for (int i = 0; t->added && i < t->n_added; i++)
        free(t->added[i].content);
    free(t->added);
    free(t->tokens);
    free(t->bytes);
    free(t->vocab_slots);
    bpe_release(&t->bpe);
    pcre2_code_free(t->pattern);
    free(t);
}
