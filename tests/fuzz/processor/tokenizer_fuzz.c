/*
 * Any bytes as a tokenizer.json: refused, or a tokenizer that encodes and decodes.
 */
#include <stdlib.h>
#include <string.h>

#include "daemon/processor/tokenizer_tables.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n_bytes);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n_bytes)
{
    static const char text[] = "ab abc <x>y 12\n\n  caf\xc3\xa9 <|im_start|> aaaa's";
    struct error err = {0};
    struct tokenizer *t = tokenizer_from_json((const char *)data, n_bytes, &err);
    struct arena a;
    int32_t *ids;
    int64_t n;
    size_t n_text;

    if (!t) {
        if (!err.code || !err.msg[0])
            abort();
        return 0;
    }
    arena_init(&a, (size_t)16 << 20);
    if (tokenizer_encode(t, text, strlen(text), 1000, &a, &ids, &n, &err) == 0)
        tokenizer_decode(t, ids, n, 1, &a, &n_text);
    arena_release(&a);
    tokenizer_close(t);
    return 0;
}
