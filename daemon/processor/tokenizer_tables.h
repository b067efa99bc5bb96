/*
 * Inside the tokenizer: the tables that tokenizer_file.c builds and tokenizer.c reads. Private to
 * these files and their tests.
 */
#ifndef INTERNVLD_PROCESSOR_TOKENIZER_TABLES_H
#define INTERNVLD_PROCESSOR_TOKENIZER_TABLES_H

#define PCRE2_CODE_UNIT_WIDTH 8
#include <cjson/cJSON.h>
#include <pcre2.h>
#include <stddef.h>
#include <stdint.h>

#include "daemon/processor/bpe.h"
#include "daemon/processor/tokenizer.h"

enum { TOKEN_ADDED = 1, TOKEN_SPECIAL = 2 };

struct token {                // a free id has n_bytes 0
    uint32_t offset, n_bytes; // into tokenizer.bytes: what it decodes to
    uint32_t flags;
};
struct added_token { // content as written: what it matches in the raw text
    char *content;
    size_t n_bytes;
    int32_t id;
};

struct tokenizer {
    struct token *tokens; // [n_ids]
    int32_t n_ids;
    char *bytes;
    size_t n_bytes;
    int32_t *vocab_slots; // ids by their bytes, open addressing; -1 is free
    size_t n_vocab_slots;
    size_t longest_token_bytes;

    struct added_token *added; // [n_added], longest first among those with the same first byte
    int n_added;
    int first_added[257]; // added tokens beginning with byte b: [first_added[b], first_added[b+1])

    struct bpe bpe;
    int ignore_merges; // a pre-token that is in the vocabulary is taken whole
    int nfc;
    pcre2_code *pattern;
};

/* tokenizer_open() behind the reading of the file: the text of a tokenizer.json. */
struct tokenizer *tokenizer_from_json(const char *text, size_t n_bytes, struct error *err);
/* What DIR/tokenizer.json would hold, from vocab.json, merges.txt and the added tokens; the caller
 * frees it. NULL and an error when a file is missing, wrong, or of another class than Qwen2's. */
cJSON *tokenizer_tree_from_parts(const char *dir, struct error *err);
/* Id of a vocabulary entry with exactly these bytes, or -1. */
int32_t tokenizer_vocab_find(const struct tokenizer *t, const char *bytes, size_t n_bytes);
/* The byte that a character of the byte-level alphabet stands for, or -1 (GPT-2's
 * bytes_to_unicode). */
int tokenizer_byte_of(int32_t code_point);
/* Bytes that `text` (in the byte-level alphabet) stands for; -1 when a character is not of it. */
int64_t tokenizer_bytes_of(const char *text, size_t n_bytes, char *out);

#endif
