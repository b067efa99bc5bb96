/*
 * A tokenizer.json made from the files of the older layout (OpenGVLab's own checkpoints):
 * vocab.json, merges.txt, and the added tokens of tokenizer_config.json or added_tokens.json. The
 * result is a tree of the same shape, so that what may be in a tokenizer is decided in one place,
 * tokenizer_file.c. Owns nothing.
 *
 * Source: Transformers Qwen2Tokenizer (pattern, NFC, byte-level decoder).
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "daemon/processor/config_file.h"
#include "daemon/processor/tokenizer_tables.h"

#define MAX_PART_BYTES ((size_t)64 << 20)
#define CONFIG_NAME "tokenizer_config.json"
#define ADDED_NAME "added_tokens.json"
#define MERGES_NAME "merges.txt"

/* All but the vocabulary, the merges and the added tokens of a Qwen2 tokenizer. */
static const char qwen2_frame[] =
    "{\"normalizer\": {\"type\": \"NFC\"}, \"pre_tokenizer\": {\"type\": \"Sequence\", "
    "\"pretokenizers\": [{\"type\": \"Split\", \"behavior\": \"Isolated\", \"invert\": false, "
    "\"pattern\": {\"Regex\": \"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\\\r\\\\n\\\\p{L}\\\\p{N}]?"
    "\\\\p{L}+|\\\\p{N}| ?[^\\\\s\\\\p{L}\\\\p{N}]+[\\\\r\\\\n]*|\\\\s*[\\\\r\\\\n]+|"
    "\\\\s+(?!\\\\S)|\\\\s+\"}}, {\"type\": \"ByteLevel\", \"add_prefix_space\": false, "
    "\"use_regex\": false}]}, \"decoder\": {\"type\": \"ByteLevel\"}}";

/* Only this class is known to have the frame above. */
static int check_class(const cJSON *config, struct error *err)
{
    const char *name = config_string(config, "tokenizer_class", CONFIG_NAME, err);

    if (err->code)
        return -1;
    if (!name || (strcmp(name, "Qwen2Tokenizer") && strcmp(name, "Qwen2TokenizerFast")))
        return error_set(err, ERROR_FAILED_PRECONDITION,
                         "without a tokenizer.json, " CONFIG_NAME " must have a tokenizer_class "
                         "of Qwen2Tokenizer, not \"%.64s\"",
                         name ? name : "");
    return 0;
}

/* The lines of merges.txt, "left right", but for a first line that begins with "#version". */
static cJSON *read_merges(const char *dir, struct error *err)
{
    char *text = config_file_read(dir, MERGES_NAME, MAX_PART_BYTES, NULL, err);

    if (!text)
        return NULL;
    cJSON *merges = cJSON_CreateArray();
    char *rest = text;

    for (char *line; (line = strsep(&rest, "\n"));) {
        size_t n = strlen(line);

        if (n && line[n - 1] == '\r')
            line[--n] = '\0';
        if (n == 0 || (line == text && strncmp(line, "#version", 8) == 0))
            continue;
        cJSON_AddItemToArray(merges, cJSON_CreateString(line));
    }
    free(text);
    return merges;
}

static int id_of(const char *text)
{
    char *end;
    long id = strtol(text, &end, 10);

    return *text && *end == '\0' && id >= 0 && id < 1 << 30 ? (int)id : -1;
}

/* added_tokens_decoder: {"151643": {"content": …, "special": …}, …} */
static int add_decoder(cJSON *added, cJSON *decoder, struct error *err)
{
    while (decoder->child) {
        cJSON *item = cJSON_DetachItemViaPointer(decoder, decoder->child);
        int id = id_of(item->string);

        cJSON_AddItemToArray(added, item);
        if (id < 0 || !cJSON_IsObject(item))
            return error_set(err, ERROR_FAILED_PRECONDITION,
                             CONFIG_NAME ": added_tokens_decoder has an entry that is not an id "
                                         "and an object");
        cJSON_DeleteItemFromObjectCaseSensitive(item, "id");
        cJSON_AddNumberToObject(item, "id", id);
    }
    return 0;
}

/* added_tokens.json: {"<img>": 151665, …}. Transformers takes these as special tokens when the
 * config lists them; all of InternVL's are. */
static void add_named(cJSON *added, const cJSON *named)
{
    const cJSON *item;

    cJSON_ArrayForEach(item, named)
    {
        cJSON *token = cJSON_CreateObject();

        cJSON_AddItemToObject(token, "id", cJSON_Duplicate(item, 0));
        cJSON_AddStringToObject(token, "content", item->string);
        cJSON_AddBoolToObject(token, "special", 1);
        cJSON_AddItemToArray(added, token);
    }
}

static cJSON *read_added(const char *dir, cJSON *config, struct error *err)
{
    cJSON *added = cJSON_CreateArray();
    cJSON *decoder = cJSON_GetObjectItemCaseSensitive(config, "added_tokens_decoder");

    if (cJSON_IsObject(decoder)) {
        add_decoder(added, decoder, err);
    } else {
        cJSON *named = config_file_parse(dir, ADDED_NAME, MAX_PART_BYTES, err);

        if (named)
            add_named(added, named);
        cJSON_Delete(named);
    }
    if (err->code) {
        cJSON_Delete(added);
        return NULL;
    }
    return added;
}

/* Puts what belongs to the frame into `root`, which owns it then. */
static int add_parts(cJSON *root, const char *dir, cJSON *config, struct error *err)
{
    cJSON *model = cJSON_AddObjectToObject(root, "model");
    cJSON *vocab = config_file_parse(dir, "vocab.json", MAX_PART_BYTES, err);

    cJSON_AddItemToObject(model, "vocab", vocab); // NULL is not added
    cJSON *merges = vocab ? read_merges(dir, err) : NULL;

    cJSON_AddItemToObject(model, "merges", merges);
    if (!merges && !err->code)
        error_set(err, ERROR_FAILED_PRECONDITION,
                  "%s: neither a tokenizer.json nor a vocab.json with a " MERGES_NAME, dir);
    if (!merges || check_class(config, err))
        return -1;
    cJSON *added = read_added(dir, config, err);

    cJSON_AddItemToObject(root, "added_tokens", added);
    return added ? 0 : -1;
}

cJSON *tokenizer_tree_from_parts(const char *dir, struct error *err)
{
    cJSON *config = config_file_parse(dir, CONFIG_NAME, MAX_PART_BYTES, err);
    cJSON *root = err->code ? NULL : cJSON_Parse(qwen2_frame);

    if (root && add_parts(root, dir, config, err)) {
        cJSON_Delete(root);
        root = NULL;
    }
    cJSON_Delete(config);
    return root;
}
