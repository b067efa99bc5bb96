/*
 * Any bytes as text: refused, or encoded to ids that decode to the NFC form of the text (checked
 * where no added token, before which NFC starts anew, can occur).
 */
#include <stdlib.h>
#include <string.h>

#include "daemon/processor/tokenizer.h"
#include "daemon/processor/unicode.h"
#include "tests/unit/processor/checkpoint.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n_bytes);

static const struct tokenizer *the_tokenizer(void)
{
    static struct tokenizer *t;
    struct error err = {0};
    char dir[256];

    if (t)
        return t;
    checkpoint_make(dir);
    t = tokenizer_open(dir, &err);
    checkpoint_remove(dir);
    if (!t)
        abort();
    return t;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n_bytes)
{
    const struct tokenizer *t = the_tokenizer();
    const char *text = (const char *)data;
    struct byte_buffer nfc = {0};
    struct error err = {0};
    struct arena a;
    int32_t *ids;
    int64_t n;
    size_t n_text;

    arena_init(&a, (size_t)64 << 20);
    if (tokenizer_encode(t, text, n_bytes, 1 << 20, &a, &ids, &n, &err)) {
        if (utf8_valid_prefix(text, n_bytes) == n_bytes)
            abort();
    } else if (!memchr(text, '<', n_bytes)) {
        char *back = tokenizer_decode(t, ids, n, 0, &a, &n_text);

        nfc_append(&nfc, text, n_bytes);
        if (!back || n_text != nfc.n || (n_text && memcmp(back, nfc.data, n_text)))
            abort();
    }
    byte_buffer_release(&nfc);
    arena_release(&a);
    return 0;
}
