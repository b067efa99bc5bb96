/*
 * Reading questions. See eval_set.h.
 *
 * Fields of a TSV are cut and unquoted in place, in the file's own bytes; pictures stay base64
 * until they are sent.
 */
#include "client/eval_set.h"

#include <ctype.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>

#include "client/rpc.h"

#define HASH_BASIS 0xcbf29ce484222325u // FNV-1a, 64 bits
#define HASH_PRIME 0x100000001b3u
#define REFERENCE_MAX 64 // characters; a shorter "image" is another row's index
/* What InternVL's own evaluation appends. */
#define ASK_LETTER "Answer with the option's letter from the given choices directly."
#define ASK_SHORT "Answer the question using a single word or phrase."

static uint64_t hash_text(uint64_t hash, const char *s)
{
    for (; *s; s++)
        hash = (hash ^ (unsigned char)*s) * HASH_PRIME;
    return hash * HASH_PRIME;
}

static char *copy_of(const char *s, size_t n)
{
    char *copy = command_alloc(n + 1, 1);
    memcpy(copy, s, n);
    return copy;
}

static struct eval_question *add_question(struct eval_set *s)
{
    s->questions = command_grow(s->questions, s->n_questions, sizeof(*s->questions));
    struct eval_question *q = &s->questions[s->n_questions++];
    *q = (struct eval_question){.id = "",
                                .category = "all",
                                .image = "",
                                .image_path = "",
                                .question = "",
                                .hint = "",
                                .key = HASH_BASIS};
    return q;
}

static void add_answer(struct eval_question *q, const char *answer)
{
    struct eval_expected *e = &q->expected;
    e->answers = command_grow((void *)e->answers, e->n_answers, sizeof(*e->answers));
    e->answers[e->n_answers++] = answer;
}

static void choose_scorer(struct eval_expected *e, enum eval_scorer otherwise)
{
    if (e->scorer == SCORE_AUTO)
        e->scorer = otherwise;
    if (e->scorer == SCORE_AUTO)
        e->scorer = e->n_choices ? SCORE_CHOICE : SCORE_EXACT;
}

/* ---- JSONL ---- */

static const char *member(const cJSON *object, const char *name)
{
    return cJSON_GetStringValue(cJSON_GetObjectItemCaseSensitive(object, name));
}

/* A text, or a number, which becomes a text in its place; NULL for anything else. */
static const char *text_in(cJSON *parent, cJSON *item)
{
    char *printed = cJSON_IsNumber(item) ? cJSON_PrintUnformatted(item) : NULL;
    if (printed) {
        cJSON *text = cJSON_CreateString(printed);
        free(printed);
        if (cJSON_IsArray(parent))
            cJSON_ReplaceItemViaPointer(parent, item, text);
        else
            cJSON_ReplaceItemInObjectCaseSensitive(parent, item->string, text);
        item = text;
    }
    return cJSON_GetStringValue(item);
}

static void add_answers(struct eval_question *q, cJSON *root)
{
    cJSON *answer = cJSON_GetObjectItemCaseSensitive(root, "answer");
    cJSON *parent = cJSON_IsArray(answer) ? answer : root;
    cJSON *item = cJSON_IsArray(answer) ? answer->child : answer, *next;
    for (; item; item = next) {
        next = parent == answer ? item->next : NULL;
        const char *text = text_in(parent, item);
        if (text)
            add_answer(q, text);
    }
}

static int add_choices(struct eval_expected *e, const cJSON *choices)
{
    const cJSON *item;
    cJSON_ArrayForEach(item, choices)
    {
        if (!cJSON_IsString(item) || e->n_choices == EVAL_CHOICES_MAX)
            return -1;
        e->choices[e->n_choices++] = item->valuestring;
    }
    return 0;
}

/* What is wrong with the line, or NULL. */
static const char *add_line(struct eval_set *s, const char *line, enum eval_scorer score)
{
    cJSON *root = cJSON_Parse(line);
    if (!root)
        return "not JSON";
    struct eval_question *q = add_question(s);
    const char *id = text_in(root, cJSON_GetObjectItemCaseSensitive(root, "id")),
               *category = member(root, "category");
    const char *scorer = member(root, "score");
    q->root = root;
    q->id = id ? id : "";
    q->category = category ? category : "all";
    q->key = hash_text(q->key, line);
    add_answers(q, root);
    if (q->expected.n_answers == 0)
        return "\"answer\" is not a text, a number or a list of such";
    if (!cJSON_IsArray(cJSON_GetObjectItemCaseSensitive(root, "messages")))
        return "no \"messages\"";
    if (add_choices(&q->expected, cJSON_GetObjectItemCaseSensitive(root, "choices")))
        return "\"choices\" is not a list of at most 26 texts";
    if (scorer && eval_scorer_parse(scorer, &q->expected.scorer))
        return "\"score\" is not auto, exact, choice, number or anls";
    choose_scorer(&q->expected, score);
    return NULL;
}

static int load_lines(struct eval_set *s, const char *path, size_t limit, enum eval_scorer score,
                      struct internvl_error *err)
{
    size_t line_number = 0;
    char *rest = s->text, *line;
    while ((line = strsep(&rest, "\n"))) {
        line_number++;
        if (line[strspn(line, " \t\r")] == '\0')
            continue;
        if (limit && s->n_questions == limit)
            break;
        const char *why = add_line(s, line, score);
        if (why)
            return rpc_error(err, INTERNVL_INVALID_ARGUMENT, "%s:%zu: %s", path, line_number, why);
    }
    return 0;
}

/* ---- TSV ---- */

#define COLUMNS_MAX 256
struct table {
    char *rest; // NULL at the end
    char *fields[COLUMNS_MAX];
    size_t n_fields;
};

/* Cuts the next field, unquoting it in place; sets *ends_row. */
static char *next_field(struct table *t, int *ends_row)
{
    char *field = t->rest, *in = t->rest, *out = t->rest;
    int quoted = *in == '"';
    in += quoted;
    while (*in) {
        if (quoted && *in == '"' && in[1] == '"')
            in++;
        else if (quoted && *in == '"') {
            quoted = 0;
            in++;
            continue;
        } else if (!quoted && (*in == '\t' || *in == '\n'))
            break;
        *out++ = *in++;
    }
    char end = *in;
    *ends_row = end != '\t';
    t->rest = end ? in + 1 : NULL;
    if (out > field && end != '\t' && out[-1] == '\r')
        out--;
    *out = '\0';
    return field;
}

/* 0, or -1 at the end of the table. */
static int next_row(struct table *t)
{
    int ends_row = 0;
    t->n_fields = 0;
    if (!t->rest || !*t->rest)
        return -1;
    while (t->rest && !ends_row) {
        char *field = next_field(t, &ends_row);
        if (t->n_fields < COLUMNS_MAX)
            t->fields[t->n_fields++] = field;
    }
    return 0;
}

/* NULL where there is none, or "nan". */
static char *find_field(const struct table *header, const struct table *row, const char *name)
{
    for (size_t i = 0; i < header->n_fields && i < row->n_fields; i++)
        if (strcmp(header->fields[i], name) == 0)
            return strcmp(row->fields[i], "nan") == 0 ? NULL : row->fields[i];
    return NULL;
}

static const char *field_named(const struct table *header, const struct table *row,
                               const char *name)
{
    const char *field = find_field(header, row, name);
    return field ? field : "";
}

/* The quote that ends the text which begins with the quote *s, or NULL. */
static char *quoted_end(char *s)
{
    char quote = *s;
    if (quote != '\'' && quote != '"')
        return NULL;
    for (s++; *s && *s != quote; s++)
        s += *s == '\\' && s[1];
    return *s ? s : NULL;
}

/* Several answers are written as a list of Python: ['12 %', "it's 12"]. */
static int is_answer_list(char *s)
{
    char due = '['; /* in front of the next text */
    while (*s == due) {
        s += 1 + strspn(s + 1, " \n");
        char *end = quoted_end(s);
        if (!end)
            return 0;
        s = end + 1 + strspn(end + 1, " \n");
        due = ',';
    }
    return due == ',' && strcmp(s, "]") == 0;
}

/* Cuts and unquotes it in place. */
static void add_answer_list(struct eval_question *q, char *list)
{
    for (char *s = strpbrk(list, "'\""), *end; s; s = strpbrk(end + 1, "'\"")) {
        char *out = s + 1;
        end = quoted_end(s);
        for (char *in = s + 1; in < end; in++) {
            in += *in == '\\';
            *out++ = *in;
        }
        *out = '\0';
        add_answer(q, s + 1);
    }
}

static void add_row(struct eval_set *s, const struct table *header, const struct table *row,
                    enum eval_scorer score)
{
    struct eval_question *q = add_question(s);
    const char *category = field_named(header, row, "category");
    q->id = field_named(header, row, "index");
    q->category = *category ? category : "all";
    q->image = field_named(header, row, "image");
    q->image_path = field_named(header, row, "image_path");
    q->question = field_named(header, row, "question");
    q->hint = field_named(header, row, "hint");
    for (char name[2] = "A"; name[0] <= 'Z'; name[0]++) {
        const char *choice = field_named(header, row, name);
        q->expected.choices[name[0] - 'A'] = choice;
        if (*choice)
            q->expected.n_choices = (size_t)(name[0] - 'A') + 1;
    }
    for (size_t i = 0; i < row->n_fields; i++)
        q->key = hash_text(q->key, row->fields[i]);
    char *answer = find_field(header, row, "answer");
    if (answer && is_answer_list(answer))
        add_answer_list(q, answer);
    else
        add_answer(q, answer ? answer : "");
    choose_scorer(&q->expected, score);
}

static int load_table(struct eval_set *s, const char *path, size_t limit, enum eval_scorer score,
                      struct internvl_error *err)
{
    struct table header = {.rest = s->text}, row;
    if (next_row(&header))
        return 0;
    row = (struct table){.rest = header.rest};
    while (!(limit && s->n_questions == limit) && next_row(&row) == 0) {
        if (row.n_fields == 1 && row.fields[0][0] == '\0')
            continue;
        if (row.n_fields != header.n_fields)
            return rpc_error(err, INTERNVL_INVALID_ARGUMENT,
                             "%s: row %zu has %zu fields, the header has %zu", path,
                             s->n_questions + 1, row.n_fields, header.n_fields);
        add_row(s, &header, &row, score);
        const struct eval_question *q = &s->questions[s->n_questions - 1];
        if (!*q->question || !*q->expected.answers[0])
            return rpc_error(err, INTERNVL_INVALID_ARGUMENT,
                             "%s: row %zu has no question or no answer", path, s->n_questions);
    }
    return 0;
}

/* ---- base64 ---- */

static int base64_digit(char c)
{
    if (c >= 'A' && c <= 'Z')
        return c - 'A';
    if (c >= 'a' && c <= 'z')
        return c - 'a' + 26;
    if (c >= '0' && c <= '9')
        return c - '0' + 52;
    return c == '+' || c == '-' ? 62 : c == '/' || c == '_' ? 63 : -1;
}

uint8_t *base64_decode(const char *text, size_t n, size_t *n_bytes)
{
    uint8_t *bytes = command_alloc(n / 4 * 3 + 4, 1);
    uint32_t bits = 0;
    size_t n_digits = 0, n_padding = 0;
    *n_bytes = 0;
    for (size_t i = 0; i < n; i++) {
        int digit = base64_digit(text[i]);
        if (isspace((unsigned char)text[i]))
            continue;
        if (text[i] == '=' && n_padding < 2) {
            n_padding++;
            continue;
        }
        if (digit < 0 || n_padding) {
            free(bytes);
            return NULL;
        }
        bits = bits << 6 | (uint32_t)digit;
        if (++n_digits % 4 == 0)
            for (int shift = 16; shift >= 0; shift -= 8)
                bytes[(*n_bytes)++] = (uint8_t)(bits >> shift);
    }
    size_t n_left = n_digits % 4;
    if (n_left == 1 || n_digits == 0) {
        free(bytes);
        return NULL;
    }
    if (n_left)
        bits <<= 6 * (4 - n_left);
    for (size_t i = 0; n_left && i + 1 < n_left; i++)
        bytes[(*n_bytes)++] = (uint8_t)(bits >> (16 - 8 * i));
    return bytes;
}

/* ---- messages ---- */

/* The field that really holds the picture: rows may name another row by its index. */
static const char *image_of(const struct eval_set *s, const struct eval_question *q)
{
    size_t n = strlen(q->image);
    if (n == 0 || n >= REFERENCE_MAX)
        return q->image;
    for (size_t i = 0; i < s->n_questions; i++)
        if (strcmp(s->questions[i].id, q->image) == 0 &&
            strlen(s->questions[i].image) >= REFERENCE_MAX)
            return s->questions[i].image;
    return q->image;
}

/* One picture, or a list of quoted ones: ['…', '…']. */
static int add_images(const char *image, struct conversation *c, const struct command_options *o,
                      struct internvl_error *err)
{
    int is_list = *image == '[';
    for (const char *s = image + is_list; *s && *s != ']';) {
        s += is_list ? strspn(s, " ,'\"\n") : 0;
        size_t n = is_list ? strcspn(s, "'\"],") : strlen(s), n_bytes;
        if (n == 0)
            break;
        uint8_t *bytes = base64_decode(s, n, &n_bytes);
        if (!bytes)
            return rpc_error(err, INTERNVL_INVALID_ARGUMENT, "the picture is not base64");
        conversation_add_bytes(c, bytes, n_bytes, o);
        s += n;
        s += is_list ? strspn(s, "'\"") : 0;
    }
    return 0;
}

static void add_text(char **text, const char *more)
{
    size_t n = *text ? strlen(*text) : 0, m = strlen(more);
    char *longer = command_alloc(n + m + 1, 1);
    if (n)
        memcpy(longer, *text, n);
    memcpy(longer + n, more, m);
    free(*text);
    *text = longer;
}

/* hint, question, "A. …" a line each, and how to answer. */
static char *table_text(const struct eval_question *q)
{
    char *text = NULL, letter[] = "\nA. ";
    if (*q->hint) {
        add_text(&text, q->hint);
        add_text(&text, "\n");
    }
    add_text(&text, q->question);
    for (size_t i = 0; i < q->expected.n_choices; i++) {
        letter[1] = (char)('A' + i);
        if (!*q->expected.choices[i])
            continue;
        add_text(&text, letter);
        add_text(&text, q->expected.choices[i]);
    }
    add_text(&text, "\n");
    add_text(&text, q->expected.n_choices ? ASK_LETTER : ASK_SHORT);
    return text;
}

int eval_set_conversation(const struct eval_set *s, const struct eval_question *q,
                          struct conversation *c, const struct command_options *o,
                          struct internvl_error *err)
{
    if (q->root)
        return conversation_from_json(c, cJSON_GetObjectItemCaseSensitive(q->root, "messages"),
                                      s->folder, o, err);
    conversation_add_message(c, "user");
    const char *image = image_of(s, q);
    if (*image && add_images(image, c, o, err))
        return -1;
    if (!*image && *q->image_path) {
        char *path = copy_of(q->image_path[0] == '/' ? "" : s->folder,
                             q->image_path[0] == '/' ? 0 : strlen(s->folder));
        add_text(&path, q->image_path);
        int rc = conversation_add_file(c, path, 0, o, err);
        free(path);
        if (rc)
            return -1;
    }
    char *text = table_text(q);
    conversation_add_text(c, text);
    free(text);
    return 0;
}

char *eval_question_text(const struct eval_question *q)
{
    char *text = NULL;
    if (!q->root)
        return table_text(q);
    const cJSON *messages = cJSON_GetObjectItemCaseSensitive(q->root, "messages"), *part;
    const cJSON *last = cJSON_GetArrayItem(messages, cJSON_GetArraySize(messages) - 1);
    const cJSON *content = cJSON_GetObjectItemCaseSensitive(last, "content");
    const cJSON *parts = cJSON_IsArray(content) ? content : NULL;
    if (cJSON_IsString(content))
        add_text(&text, content->valuestring);
    cJSON_ArrayForEach(part, parts)
    {
        const char *words = member(part, "text");
        if (words)
            add_text(&text, words);
    }
    if (!text)
        add_text(&text, "");
    return text;
}

/* ---- the set ---- */

int eval_set_load(struct eval_set *s, const char *path, size_t limit, enum eval_scorer score,
                  struct internvl_error *err)
{
    size_t n_bytes, n = strlen(path);
    s->text = read_file(path, &n_bytes, err);
    if (!s->text)
        return -1;
    const char *slash = strrchr(path, '/');
    s->folder = copy_of(path, slash ? (size_t)(slash - path) + 1 : 0);
    int is_table = n > 4 && strcasecmp(path + n - 4, ".tsv") == 0;
    int rc =
        is_table ? load_table(s, path, limit, score, err) : load_lines(s, path, limit, score, err);
    if (rc == 0 && s->n_questions == 0)
        rc = rpc_error(err, INTERNVL_INVALID_ARGUMENT, "%s holds no question", path);
    return rc;
}

void eval_set_release(struct eval_set *s)
{
    for (size_t i = 0; i < s->n_questions; i++) {
        cJSON_Delete(s->questions[i].root);
        free((void *)s->questions[i].expected.answers);
    }
    free(s->questions);
    free(s->text);
    free(s->folder);
    *s = (struct eval_set){0};
}
